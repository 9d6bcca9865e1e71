"""Flags that describe a teacher file, and reading it as they say."""

import dataclasses
import pathlib
import re
from typing import Any

from tools import common
from dfq_tf.errors import ConfigError, DataError
from dfq_tf.files import read_text
from dfq_tf.graph import OUTPUTS, Classifier
from dfq_tf.importing import FEEDINGS, load_classifier
from dfq_tf.settings import check_value
from dfq_tf.tflite import TFLiteClassifier
from dfq_tf.with_data import datasets

FLAGS = common.FLAGS


# Name, type, default and help of each flag that says what a teacher file does not.
_DESCRIBING: tuple[tuple[str, type, Any, str], ...] = (
    (
        "input_mean",
        list,
        [],
        "Mean in pixels, one value or one per channel: the model's input is "
        "(pixel - mean) * scale. Not needed where a .json lies beside the model, or "
        "the model has a layer for it, such as Rescaling.",
    ),
    ("input_scale", list, [], "Scale, like --input_mean; such as 1/255."),
    (
        "feeding",
        str,
        None,
        "In place of both, the name of a usual way: one of "
        f"{', '.join(FEEDINGS)}. By default the model's BatchNormalization is asked, "
        "where nobody says.",
    ),
    (
        "output",
        str,
        None,
        f"What the model gives: one of {', '.join(OUTPUTS)}. By default what its last "
        "layer says.",
    ),
    (
        "labels",
        pathlib.Path,
        None,
        "Text file with the names of the classes, a line each, in the order of the "
        "model's outputs.",
    ),
    (
        "image_size",
        list,
        [],
        "Height and width, for a model that takes images of any size.",
    ),
    (
        "head",
        str,
        None,
        "The output to quantize, of a model that gives several: its layer or key.",
    ),
    (
        "input_on_top",
        bool,
        False,
        "--input_mean and --input_scale, or --feeding, come before the preprocessing "
        "of a model that has its own.",
    ),
    (
        "allow_code",
        bool,
        False,
        "Run Python code that the model's file holds, as Lambda layers do. Only for a "
        "file whose maker you trust.",
    ),
)


def define() -> None:
    """Defines the flags that say what a teacher file does not."""
    for name, *rest in _DESCRIBING:
        # Who needs the others is told so by the message that a file gets.
        is_first = name not in ("head", "input_on_top", "allow_code")
        common.define("Teacher", name, *rest, first=is_first)


def given() -> dict[str, Any]:
    """Name -> value of those of the flags that say other than their default does.

    A written flagfile has the defaults too: they say nothing.
    """
    values = {name: FLAGS[name].value for name, *_ in _DESCRIBING}
    return {n: value for n, value in values.items() if value != FLAGS[n].default}


def arguments() -> dict[str, Any]:
    """What the flags say of a teacher: arguments of `as_classifier`.

    Raises:
      ConfigError: a flag is wrong.
    """
    mean, scale = (
        common.floats(name, FLAGS[name].value) or None
        for name in ("input_mean", "input_scale")
    )
    size = common.floats("image_size", FLAGS.image_size)
    if size and (len(size) != 2 or any(s != int(s) or s < 1 for s in size)):
        raise ConfigError(
            f"image_size is {','.join(FLAGS.image_size)!r}; give height and width"
        )
    if FLAGS.output is not None:
        check_value("output", FLAGS.output, {"choices": OUTPUTS})
    return dict(
        input_mean=mean,
        input_scale=scale,
        feeding=FLAGS.feeding,
        output=FLAGS.output,
        class_names=read_labels(FLAGS.labels) if FLAGS.labels else None,
        image_size=[int(s) for s in size] or None,
        head=FLAGS.head,
        input_on_top=FLAGS.input_on_top,
        allow_code=FLAGS.allow_code,
    )


def read_teacher(path: str) -> Classifier:
    """Reads a teacher, as the flags say.

    Raises:
      ConfigError: a flag is wrong, or one is missing.
      ModelError: the file cannot be read.
    """
    said = arguments()
    with common.stage(f"reading of {path}", common.LONG_READING):
        return load_classifier(path, **said)


def read_labels(path: str) -> tuple[str, ...]:
    """The names of the classes in a text file, a line each.

    Numbers in front, '0 Cattle', '1 Sheep' and so on, as Teachable Machine writes them,
    or '0:Cattle' or '0,Cattle', are no part of the names. They stay where many names
    would be the same without them, as of '0 fingers', '1 finger' and '2 fingers', and
    where all lines are as '0:30' or '0,5 mm'. Empty lines at the end are none.

    Raises:
      ConfigError: it cannot be read, is empty, or has an empty line.
    """
    try:
        names = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"labels is {path!r}, which cannot be read as text: {error}. Name a text "
            "file in UTF-8"
        ) from error
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    numbered = [
        re.fullmatch(rf"{i}[\s:,]\s*(.+)", name) for i, name in enumerate(names)
    ]
    rest = [match[1] for match in numbered if match]
    is_value = all(re.match(rf"{i}[:,]\d", name) for i, name in enumerate(names))
    # Of ImageNet's thousand names two come twice.
    is_count = 10 * (len(rest) - len(set(rest))) > len(rest)
    # One line alone may well be a name.
    if len(names) > 1 and len(rest) == len(names) and not (is_value or is_count):
        names = rest
    if not names or not all(names):
        raise ConfigError(
            f"labels is {path!r}, which is empty or has an empty line; write one name "
            "on each line"
        )
    return tuple(names)


def with_dataset(teacher: Classifier) -> tuple[Classifier, datasets.Dataset | None]:
    """The labelled images, if --dataset names some, for a teacher that has been read.

    They come last: they may have to be downloaded, which takes minutes.

    Args:
      teacher: from `read_teacher`.

    Returns:
      The teacher, its classes named as the data set's where nobody else has named them;
      and the data set, None without.

    Raises:
      DataError: they do not fit each other.
    """
    if not FLAGS.dataset:
        return teacher, None
    dataset = common.dataset_from_flags()
    check_fits(teacher, dataset)
    numbers = tuple(map(str, range(teacher.num_classes)))
    said = teacher.description
    if not FLAGS.labels and said.class_names == numbers:
        said = dataclasses.replace(said, class_names=dataset.class_names)
        teacher = Classifier(teacher.graph, said)
    return teacher, dataset


def check_fits(model: Classifier | TFLiteClassifier, dataset: datasets.Dataset) -> None:
    """Raises DataError if the model's classes or images are not the data set's.

    Or if they are the same classes in another order.
    """
    classes = len(dataset.class_names)
    if model.num_classes != classes:
        raise DataError(
            f"the model has {model.num_classes} classes, but dataset {dataset.name} "
            f"has {classes}; name the data set that the model was trained on with "
            "--dataset"
        )
    if model.image_shape != dataset.image_shape:
        raise DataError(
            f"the model takes images of {model.image_shape}, but those of dataset "
            f"{dataset.name} are {dataset.image_shape}; name the data set that the "
            "model was trained on with --dataset"
        )
    wanted = dataset.class_names
    names = (
        model.class_names
        if isinstance(model, TFLiteClassifier)
        else model.description.class_names
    )
    if sorted(names) == sorted(wanted) and names != wanted:
        place = next(i for i in range(classes) if names[i] != wanted[i])
        raise DataError(
            f"the model has the classes of dataset {dataset.name} in another order: "
            f"class {place} is {names[place]!r} of the model and {wanted[place]!r} of "
            "the data set, whose labels would count as wrong. If the names are wrong, "
            "mend them, in --labels or in the model's .json; else name another data set"
        )
