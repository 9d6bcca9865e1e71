"""Measures a Keras or TFLite classifier on the test split of a data set.

    python tools/evaluate.py --model=runs/cifar10/df_q.tflite --dataset=cifar10

With --teacher, its agreement with that model too. Flags such as --input_mean say what a
Keras file does not that has no description (.json) beside it. Writes nothing, but into
the folder that --workdir names, if it does.
"""

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common, teacher_flags
from dfq_tf import api
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph import Classifier, agreement, description_beside
from dfq_tf.importing import load_classifier
from dfq_tf.quantization import QuantizedNetwork, student
from dfq_tf.tflite import TFLiteClassifier
from dfq_tf.with_data import datasets
from dfq_tf.with_data.accuracy import accuracy

FLAGS = common.FLAGS

# Flags that a Keras file may need beside its description.
_OF_ANY_MODEL = ("head", "allow_code", "image_size")
# What can be measured.
Model = Classifier | QuantizedNetwork | TFLiteClassifier


def read_model(path: str) -> Model:
    """Reads a `.tflite`, `.keras` or `.h5` classifier, or a quantized student.

    Raises:
      ConfigError: a flag that says what the file does not is wrong, or missing.
      ModelError: there is no such file, or it cannot be read.
    """
    if not path.endswith(".tflite"):
        if student.is_student_file(path):
            return api.load_quantized(path)
        said = teacher_flags.arguments() if _needs_flags(path) else _of_any_model()
        return load_classifier(path, **said)
    if not pathlib.Path(path).is_file():
        raise ModelError(f"there is no model file {path}")
    return TFLiteClassifier(pathlib.Path(path).read_bytes())


def _of_any_model() -> dict[str, Any]:
    """What flags say that no description does."""
    said = teacher_flags.arguments()
    return {name: said[name] for name in _OF_ANY_MODEL}


def _needs_flags(path: str) -> bool:
    return not path.endswith(".tflite") and description_beside(path) is None


def _check_flags(paths: list[str]) -> None:
    """Raises ConfigError if flags are given that no file has a use for."""
    given = teacher_flags.given()
    if not all(path.endswith(".tflite") for path in paths):
        given = {k: value for k, value in given.items() if k not in _OF_ANY_MODEL}
    if given and not any(map(_needs_flags, paths)):
        each = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(
            f"{each}, but {' and '.join(paths)} need no such flag: a .tflite file "
            "says all itself, and a .json beside a Keras file does. Leave it out"
        )


def main() -> None:
    """Measures and reports."""
    if not FLAGS.model:
        raise ConfigError("model is empty; name a model file with --model")
    if not FLAGS.dataset:
        raise ConfigError(
            "dataset is empty; name the labelled images with --dataset, one of "
            f"{', '.join(datasets.dataset_names())}"
        )
    _check_flags([FLAGS.model, *filter(None, [FLAGS.teacher])])
    with common.stage("reading", common.LONG_READING):
        model = read_model(FLAGS.model)
        teacher = read_model(FLAGS.teacher) if FLAGS.teacher else None
    dataset = common.dataset_from_flags()
    for each in (model, teacher):
        if each is not None:
            fed = each.classifier if isinstance(each, QuantizedNetwork) else each
            teacher_flags.check_fits(fed, dataset)
    workdir = common.open_workdir() if FLAGS.workdir else None
    with common.stage(f"evaluation of {FLAGS.model}"):
        test = dataset.load("test")
        scores = model.scores(test.images)
    right = accuracy(scores, test.labels)
    measured = {"accuracy": right, "images": len(test.labels)}
    print(f"Accuracy: {100 * right:.2f} % of {len(test.labels)} test images")
    if teacher is not None:
        with common.stage(f"evaluation of {FLAGS.teacher}"):
            same = agreement(scores, teacher.scores(test.images))
        measured["agreement"] = same
        print(f"Agreement with the teacher: {100 * same:.2f} %")
    if workdir is not None:
        workdir.add_metrics(**measured)


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Models", "model", str, None, "File to measure (.tflite, .keras, .h5)."
    )
    common.define("Models", "teacher", str, None, "File to compare it with.")
    teacher_flags.define()
    common.define_dataset_flags(None)
    common.define_run_flags(None, trains=False)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="model")
