"""Decides how a model is fed: by what is said, what it does itself, and remembers."""

import dataclasses
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np

from dfq_tf.errors import ConfigError
from dfq_tf.graph import Graph, ModelDescription, check_count
from dfq_tf.importing import feeding as feedings
from dfq_tf.importing.preprocessing import Preprocessing, described


@dataclasses.dataclass(frozen=True)
class Said:
    """What is said of the way in which pixels become the input of a model.

    Attributes:
      given: what pixels go through before the model; None if nobody says.
      is_bgr: whether the model is fed blue first, with all else of `given` in this
        order.
      is_by_user: whether the user says so in arguments, and no file does.
      is_on_top: whether the user knows that the model has preprocessing of its own.
    """

    given: Preprocessing | None = None
    is_bgr: bool = False
    is_by_user: bool = False
    is_on_top: bool = False

    def fed(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels, red first, as the model's input, float32 of the same shape."""
        values = pixels[..., ::-1] if self.is_bgr else pixels
        if self.given is not None:
            values = self.given.scale * values + self.given.offset
        return values.astype(np.float32)

    @property
    def feeding(self) -> feedings.Feeding | None:
        """The same, as the usual ways are written."""
        if self.given is None:
            return None
        numbers = described(self.given, "logits", ())
        return feedings.Feeding(numbers.input_mean, numbers.input_scale, self.is_bgr)


def said_by(
    input_mean: Any,
    input_scale: Any,
    feeding: str | None,
    input_on_top: bool,
    description: ModelDescription | None,
) -> Said:
    """What the user says, or else the description beside the model's file.

    The first arguments are those of `classifiers.as_classifier`.

    Raises:
      ConfigError: they contradict each other, or cannot be.
    """
    given, is_bgr = _given(input_mean, input_scale, feeding)
    is_by_user = given is not None
    if given is None and description is not None:
        given, _ = _given(description.input_mean, description.input_scale)
    return Said(given, is_bgr, is_by_user, input_on_top)


def decide(
    graph: Graph,
    own: Preprocessing | None,
    said: Said,
    frozen: Collection[str] = (),
    integers: str = "",
) -> tuple[Said, feedings.Found | None]:
    """What a network is fed, if anybody or anything says so.

    Args:
      graph: the network, with the preprocessing at its head.
      own: what that preprocessing does, or None.
      said: what is said.
      frozen: names of nodes that the training left as they were.
      integers: the type of the network's input, such as 'uint8', if it takes integers;
        pixels as they are then.

    Returns:
      `said`, with the way that was found if nobody says any, or pixels as they are if
      the model prepares them; and what a BatchNormalization says, None if there is
      none, or it does not contradict.

    Raises:
      ConfigError: what is said does not fit the network.
    """
    if said.given is not None:
        channels = graph.image.shape[-1] or 0
        check_count("input_scale", said.given.scale.size, channels)
        check_count("input_mean", said.given.offset.size, channels)
    _check_given_once(said, own)
    if integers:
        _check_as_they_are(said, integers)
        return dataclasses.replace(said, given=Preprocessing()), None
    if said.given is not None and not said.is_by_user:
        return said, None
    if said.given is None and own is not None and own.takes_pixels:
        said = dataclasses.replace(said, given=Preprocessing())
    found = feedings.find(graph, said.feeding, frozen)
    if found is not None and found.is_taken:
        given, is_bgr = _given(None, None, found.name)
        said = dataclasses.replace(said, given=given, is_bgr=is_bgr)
    return said, found


def how_to_say(found: feedings.Found | None, own: Preprocessing | None) -> str:
    """That nobody says how the model is fed, and how to say it.

    Args:
      found: what a BatchNormalization says.
      own: what the model's own preprocessing does, which was not made for pixels; or
        None.
    """
    text = "input_mean and input_scale are not given, and the model "
    on_top = ""
    if own is None:
        text += (
            "has no preprocessing layer that says how pixels, 0 to 255, become its "
            "input. "
        )
    else:
        low, high = np.min(own.offset), np.max(255 * own.scale + own.offset)
        text += (
            f"makes {low:.4g} to {high:.4g} of pixels, 0 to 255, by preprocessing of "
            "its own, which was made for other numbers. "
        )
        on_top = " --input_on_top"
    if found is not None:
        distances = ", ".join(f"{n} {d:.2f}" for n, d in found.distances.items())
        what = "leaves it open"
        if found.is_frozen:
            what = (
                "was frozen, by trainable=False or, in Keras 2, a call with "
                "training=False, and tells only how it was fed before that"
            )
        text += (
            f"Its BatchNormalization {found.layer} {what}: the distances "
            f"between what it remembers and what pictures cause are {distances}. "
        )
        if found.is_suggested:
            text += f"Say --feeding={found.name}{on_top} if all training fed it so. "
    return text + (
        f"Give both: --input_mean=0 --input_scale=1/255{on_top} for a model that was "
        "trained on pixels / 255, or --input_mean=0 --input_scale=1 for raw pixels; or "
        f"--feeding, one of {', '.join(feedings.FEEDINGS)}"
    )


def warn(said: Said, found: feedings.Found | None, own: Preprocessing | None) -> None:
    """Warns of a feeding that was found, is not what is said, or comes on top.

    Args:
      said: what was said, before the decision.
      found: what a BatchNormalization says.
      own: what the model's own preprocessing does, or None.
    """
    _warn_of_both(said, own)
    if found is None or not found.is_clear:
        return
    flags, arguments = f"--feeding={found.name}", f"feeding={found.name!r}"
    if own is not None:
        flags, arguments = f"{flags} --input_on_top", f"{arguments}, input_on_top=True"
    near = (
        f"{found.name}, comes within {found.distances[found.name]:.2f} of what its "
        f"BatchNormalization {found.layer} remembers, the next one, "
        f"{found.next_name}, within {found.distances[found.next_name]:.2f}"
    )
    if found.is_taken:
        warnings.warn(
            "the model does not say how it is fed. Of the usual ways one, "
            f"{near}: it is taken. {flags} ({arguments}) says so, "
            "input_mean and input_scale say otherwise",
            stacklevel=4,
        )
        return
    what = "input_mean and input_scale may be wrong"
    if said.given is None:
        what = "the model's own preprocessing may not be all that its training had"
    warnings.warn(
        f"{what}: pictures that are fed so do not cause what the model remembers of "
        f"its training. Of the usual ways one, {near}. Compare with {flags} "
        f"({arguments})",
        stacklevel=4,
    )


def _warn_of_both(said: Said, own: Preprocessing | None) -> None:
    """Warns where the description beside a file comes before the model's own."""
    given = None if said.is_by_user else said.given
    if own is None or own.is_nothing or given is None or given.is_nothing:
        return
    numbers = described(given, "logits", ())
    warnings.warn(
        f"the .json beside the model says input_mean {numbers.input_mean} and "
        f"input_scale {numbers.input_scale}, and the model has preprocessing of its "
        "own, such as a Rescaling layer: both apply, one behind the other. If the "
        "model takes pixels as they are, write input_mean [0] and input_scale [1] "
        "there",
        stacklevel=5,
    )


def _check_as_they_are(said: Said, integers: str) -> None:
    """Raises ConfigError if other than pixels as they are is said of such an input."""
    if said.given is None or said.given.is_nothing:
        return
    numbers = described(said.given, "logits", ())
    raise ConfigError(
        f"input_mean {numbers.input_mean} and input_scale {numbers.input_scale} are "
        f"given, but the model's Input takes integers ({integers}), which are pixels "
        "as they are. Leave input_mean and input_scale, or feeding, out; in a .json "
        "beside the model write [0] and [1]"
    )


def _check_given_once(said: Said, own: Preprocessing | None) -> None:
    """Raises ConfigError for pixels that would be prepared twice, or on top of nothing.

    Args:
      said: what the user says.
      own: what the model does itself.
    """
    given = said.given if said.is_by_user else None
    if said.is_on_top and given is None:
        raise ConfigError(
            "input_on_top is given without input_mean and input_scale, or feeding; say "
            "what is to come on top, or leave it out"
        )
    if said.is_on_top and own is None:
        raise ConfigError(
            "input_on_top is given, but the model has no preprocessing of its own; "
            "leave it out"
        )
    if given is None or own is None or said.is_on_top:
        return
    if given.is_nothing:
        return  # raw pixels, as they come in any case
    numbers = described(given, "logits", ())
    raise ConfigError(
        f"input_mean {numbers.input_mean} and input_scale {numbers.input_scale} are "
        "given, and the model has preprocessing of its own, such as a Rescaling layer: "
        "both would apply, one behind the other. If the model takes pixels as they "
        "are, leave input_mean and input_scale, or feeding, out; if its own is to "
        "come behind them, say so with input_on_top=True (--input_on_top)"
    )


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    """An argument as numbers; ConfigError if it is something else."""
    try:
        numbers = np.atleast_1d(np.asarray(value, np.float64))
        if numbers.ndim > 1:
            raise ValueError("numbers of numbers")
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is {value!r}; give a number, or one for each channel"
        ) from error
    return tuple(numbers.tolist())


def _given(
    input_mean: Any, input_scale: Any, feeding: str | None = None
) -> tuple[Preprocessing | None, bool]:
    """What the user says that pixels go through, and whether blue comes first.

    Returns:
      (None, False) if the user says nothing.
    """
    is_bgr = False
    if feeding is not None:
        if input_mean is not None or input_scale is not None:
            raise ConfigError(
                f"feeding is {feeding!r}, and input_mean is {input_mean} and "
                f"input_scale is {input_scale}; give one or the other"
            )
        if not isinstance(feeding, str) or feeding not in feedings.FEEDINGS:
            raise ConfigError(
                f"feeding is {feeding!r}; it must be one of "
                f"{', '.join(feedings.FEEDINGS)}"
            )
        input_mean, input_scale, is_bgr = feedings.FEEDINGS[feeding]
    if (input_mean is None) != (input_scale is None):
        raise ConfigError(
            f"input_mean is {input_mean} and input_scale is {input_scale}; give both "
            "or neither"
        )
    if input_mean is None:
        return None, False
    # Checks the values, whatever the model is.
    checked = ModelDescription(
        _numbers("input_mean", input_mean),
        _numbers("input_scale", input_scale),
        "logits",
        (),
    )
    mean, scale = np.array(checked.input_mean), np.array(checked.input_scale)
    if 1 not in (mean.size, scale.size) and mean.size != scale.size:
        raise ConfigError(
            f"input_mean has {mean.size} values and input_scale {scale.size}; give "
            "one value, or one for each channel"
        )
    return Preprocessing(scale, -mean * scale), is_bgr
