"""Measures a Keras or TFLite classifier on the test split of a data set.

    python tools/evaluate.py --model=runs/cifar10/df_q.tflite --dataset=cifar10

With --teacher, its agreement with that model too. Flags such as --input_mean say how a
Keras file is fed: the teacher, and the model where it has no description (.json) beside
it or there is no such teacher. Writes nothing, but into the folder that --workdir
names, if it does.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common, teacher_flags
from dfq_tf import api
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph import Classifier, agreement, description_beside
from dfq_tf.importing import load_classifier
from dfq_tf.quantization import QuantizedNetwork, student
from dfq_tf.tflite import TFLiteClassifier
from dfq_tf.with_data import datasets
from dfq_tf.with_data.datasets import accuracy

FLAGS = common.FLAGS

# Flags that any Keras file may need: no description says so much.
_OF_ANY_MODEL = ("head", "allow_code", "image_size")
# What can be measured.
Model = Classifier | QuantizedNetwork | TFLiteClassifier


def read_model(path: str, teacher: str | None = None) -> Model:
    """Reads a `.tflite`, `.keras` or `.h5` classifier, or a quantized student.

    Args:
      path: of the file.
      teacher: the file that it is compared with, if there is one. If both are float
        models, the flags are the teacher's, and a model goes by its own description.

    Raises:
      ConfigError: a flag that says what the file does not is wrong, or missing.
      ModelError: there is no such file, or it cannot be read.
    """
    if _takes_flags(path):
        said = teacher_flags.arguments()
        if teacher and _takes_flags(teacher) and description_beside(path) is not None:
            said = {name: said[name] for name in _OF_ANY_MODEL}
        return load_classifier(path, **said)
    if not path.endswith(".tflite"):
        return api.load_quantized(path)
    if not pathlib.Path(path).is_file():
        raise ModelError(f"there is no model file {path}")
    return TFLiteClassifier(pathlib.Path(path).read_bytes())


def _takes_flags(path: str) -> bool:
    return not (path.endswith(".tflite") or student.is_student_file(path))


def _check_flags(paths: list[str]) -> None:
    """Raises ConfigError if flags are given that no file has a use for."""
    given = teacher_flags.given()
    if given and not any(map(_takes_flags, paths)):
        each = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(
            f"{each}, but {' and '.join(paths)} need no such flag: a .tflite file and "
            "a quantized student say all themselves. Leave it out"
        )


def main() -> None:
    """Measures and reports."""
    if not FLAGS.model:
        raise ConfigError("model is empty; name a model file with --model")
    if not FLAGS.dataset:
        raise ConfigError(
            "dataset is empty; name the labelled images with --dataset, one of "
            f"{', '.join(datasets.dataset_names())}. {datasets.OTHER_IMAGES}"
        )
    _check_flags([FLAGS.model, *filter(None, [FLAGS.teacher])])
    if FLAGS.workdir is not None:
        common.check_workdir()
    with common.stage("reading", common.LONG_READING):
        model = read_model(FLAGS.model, FLAGS.teacher)
        teacher = read_model(FLAGS.teacher) if FLAGS.teacher else None
    dataset = common.dataset_from_flags()
    for each in (model, teacher):
        if each is not None:
            fed = each.classifier if isinstance(each, QuantizedNetwork) else each
            teacher_flags.check_fits(fed, dataset)
    workdir = common.open_workdir() if FLAGS.workdir is not None else None
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
        "Models", "model", pathlib.Path, None, "File to measure (.tflite, .keras, .h5)."
    )
    common.define("Models", "teacher", pathlib.Path, None, "File to compare it with.")
    teacher_flags.define()
    common.define_dataset_flags(None)
    common.define_run_flags(None, trains=False)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="model")
