"""What a model file does not say: how pixels become its input, what its output is.

The description is stored as JSON beside the model file, `teacher.keras` having
`teacher.json`. This module imports no TensorFlow.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.files import (
    MODEL_SUFFIXES,
    check_text,
    expanded,
    is_of_keras,
    read_text,
    replacing,
    write_text,
)

OUTPUTS = ("logits", "softmax", "sigmoid")
PROBABILITIES = ("softmax", "sigmoid", "score")
# What Keras writes one file for; of any other name it makes a folder.
_WRITTEN = (".keras", ".h5", ".hdf5")


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """How a classifier is fed and read.

    The model's input is `(pixel - input_mean) * input_scale`, pixels in [0, 255].

    Attributes:
      input_mean: one value for all channels, or one per channel, in pixels.
      input_scale: one value for all channels, or one per channel, above 0.
      output: 'logits', 'softmax' or 'sigmoid', what the model's last layer gives;
        sigmoid scores are of classes that do not exclude each other.
      class_names: one name per output, in the order of the outputs.
      probabilities: what makes probabilities of the logits: 'softmax'; 'sigmoid', of
        each by itself; 'score', the second of a softmax of two, for a model that gives
        one score. None if that is not known. What the last layer gives, if it is not
        logits, says it too.
    """

    input_mean: tuple[float, ...]
    input_scale: tuple[float, ...]
    output: str
    class_names: tuple[str, ...]
    probabilities: str | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError if a value is out of range."""
        for name in ("input_mean", "input_scale"):
            values = getattr(self, name)
            try:
                if isinstance(values, (str, bytes)):
                    raise TypeError("it is a text, of which each digit would be one")
                object.__setattr__(self, name, tuple(float(v) for v in values))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{name} is {values!r}; give one number, or one for each channel, "
                    f"such as [127.5]: {error}"
                ) from error
            if not values or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"{name} is {values}; give one finite value or more")
        if any(v <= 0 for v in self.input_scale):
            raise ConfigError(
                f"input_scale is {self.input_scale}; every value must be above 0"
            )
        if self.output not in OUTPUTS:
            raise ConfigError(
                f"output is {self.output!r}; it must be one of {list(OUTPUTS)}"
            )
        names: Any = self.class_names
        # Of a network that no classifier has yet, all are empty.
        if not isinstance(names, tuple) or any(name != "" for name in names):
            object.__setattr__(self, "class_names", names_of_classes(names))
        self._add_probabilities()

    def _add_probabilities(self) -> None:
        """Of a model that gives probabilities, its output says which they are."""
        if self.output != "logits" and self.probabilities is None:
            object.__setattr__(self, "probabilities", self.output)
        allowed = (None, *PROBABILITIES) if self.output == "logits" else (self.output,)
        if self.probabilities not in allowed:
            raise ConfigError(
                f"probabilities is {self.probabilities!r} and output is "
                f"{self.output!r}; it must be one of {list(allowed)}"
            )

    @property
    def is_exclusive(self) -> bool:
        """Whether an image is of one class: not so of sigmoid scores, of logits too."""
        return self.probabilities != "sigmoid"

    def check_fits(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        """Raises ConfigError if a model of this shape cannot have this description.

        Args:
          input_shape: (height, width, channels) of the model's input.
          num_classes: the number of the model's outputs.
        """
        channels = input_shape[-1]
        for name in ("input_mean", "input_scale"):
            check_count(name, len(getattr(self, name)), channels)
        names_of_classes(self.class_names)
        if len(self.class_names) != num_classes:
            raise ConfigError(
                f"class_names has {len(self.class_names)} names for a model with "
                f"{num_classes} outputs; give one name per output, in "
                "--labels or in the description"
            )
        if self.probabilities == "score" and num_classes != 2:
            raise ConfigError(
                f"probabilities is 'score' for a model with {num_classes} outputs; one "
                "score stands for two"
            )

    def normalize(self, pixels: Any) -> Any:
        """Turns float pixels in [0, 255] into the model's input, same shape."""
        mean = np.asarray(self.input_mean, np.float32)
        scale = np.asarray(self.input_scale, np.float32)
        return (pixels - mean) * scale

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the description to `path` as JSON, replacing it whole."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelDescription":
        """Reads a description.

        Raises:
          ModelError: the file is absent, is not JSON or misses a field.
        """
        try:
            fields = json.loads(read_text(path))
            _check_names(fields)
            return cls(**fields)
        except FileNotFoundError as error:
            raise ModelError(
                f"there is no description {path}; give the input's mean and scale "
                "(--input_mean, --input_scale), or write that file, of which "
                "docs/own_model.md, in the project's folder, has an example"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{path} is not a model description: {error}. docs/own_model.md, in "
                "the project's folder, has an example. If it is something else, give "
                "it another name"
            ) from error


def _check_names(fields: Any) -> None:
    """Raises ValueError unless there is a description in these fields of JSON."""
    if not isinstance(fields, Mapping):
        raise ValueError("it must be a mapping of names to values")
    known = dataclasses.fields(ModelDescription)
    needed = [each.name for each in known if each.default is dataclasses.MISSING]
    lacking = [name for name in needed if name not in fields]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    unknown = sorted(fields.keys() - {each.name for each in known})
    if unknown:
        raise ValueError(f"it has {', '.join(unknown)}, which no description has")


def names_of_classes(given: Any) -> tuple[str, ...]:
    """The names of classes as somebody gives them, in their order.

    Two classes may have the same name, as in ImageNet; but not all of them.

    Raises:
      ConfigError: they are no names, or have no order, or say nothing.
    """
    try:
        given = tuple(given) if isinstance(given, Iterator) else given
        names = tuple(map(str, given))
    except TypeError:
        names = None
    if names is None or isinstance(given, (Mapping, set, frozenset, bytes, str)):
        raise ConfigError(
            f"class_names is {given!r}; give a name for each class, in their order, "
            "such as ['cat', 'dog']"
        )
    for name in given:
        if name is None or isinstance(name, (bytes, float)):
            raise ConfigError(
                f"class_names has {name!r}, a {type(name).__name__}; give texts (str), "
                "such as b'cat'.decode() makes of bytes"
            )
    if not all(name.strip() for name in names):
        raise ConfigError(
            f"class_names is {given!r}, in which a name is empty; give one for each "
            "class"
        )
    if len(names) > 1 and len(set(names)) == 1:
        raise ConfigError(
            f"class_names has {len(names)} times {names[0]!r} and no other name; give "
            'each class its own; in a .json beside the model write "0", "1" and so on, '
            "else leave class_names out for numbers"
        )
    for name in names:
        check_text("class_names", name)
        if "".join(name.splitlines()) != name:
            raise ConfigError(
                f"class_names has {name!r}, which is more than one line, or ends "
                "one; a file of labels has a line for each class. Take the names "
                "without line breaks, as text.splitlines() gives them"
            )
    return names


def check_count(name: str, count: int, channels: int) -> None:
    """Raises ConfigError unless there is one value, or one for each channel.

    Args:
      name: of the setting.
      count: of its values.
      channels: of the images.
    """
    if count not in (1, channels):
        raise ConfigError(
            f"{name} has {count} values for a model with {channels} input channels; "
            f"give one value or {channels}"
        )


def description_beside(
    model_path: str | os.PathLike[str],
) -> ModelDescription | None:
    """The description beside a model; None if there is none.

    A file of that name that Keras wrote, `model.to_json()`, is no description.

    Raises:
      ModelError: the file is not JSON or misses a field.
    """
    path = description_path(model_path)
    try:
        if not path.is_file() or is_of_keras(json.loads(read_text(path))):
            return None
    except (OSError, ValueError):
        pass  # `load` says what is wrong
    return ModelDescription.load(path)


def model_name(model_path: str | os.PathLike[str]) -> str:
    """The name of a model's file or folder, without an ending that models have.

    What follows the last dot of another name, such as `net_0.25`, is part of it.
    """
    path = _named(model_path)
    return path.stem if path.suffix in (*MODEL_SUFFIXES, ".json") else path.name


def description_path(model_path: str | os.PathLike[str]) -> pathlib.Path:
    """Where the description of the model in `model_path` is kept."""
    path = _named(model_path)
    return path.with_name(f"{model_name(path)}.json")


def _named(model_path: str | os.PathLike[str]) -> pathlib.Path:
    """A path that ends in a name, for "." and ".." too."""
    path = expanded(model_path)
    return path.resolve() if model_path and path.name in ("", "..") else path


@contextlib.contextmanager
def described_at(
    path: str | os.PathLike[str], description: ModelDescription
) -> Iterator[pathlib.Path]:
    """Gives a temporary path; a model written there becomes `path`, described.

    If the block raises, the model and the description in place stay as they were.

    Args:
      path: of the model.
      description: written beside it.

    Raises:
      ConfigError: no model file has such a name.
    """
    if not os.fspath(path).endswith(_WRITTEN):
        raise ConfigError(
            f"path is {os.fspath(path)!r}; the name of a model's file must end in "
            ".keras or .h5, such as 'student.keras'"
        )
    # The description goes in place first: whoever finds the model finds it too.
    with replacing(path) as temporary:
        yield temporary
        description.save(description_path(path))
