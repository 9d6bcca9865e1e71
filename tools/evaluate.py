"""Measures a Keras or TFLite classifier on the test split of a data set.

    python tools/evaluate.py --model=runs/cifar10/df_q.tflite --dataset=cifar10

With --teacher, its agreement with that model too.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf import data, evaluation, export
from dfq_tf.classifier import Classifier
from dfq_tf.errors import ConfigError, DataError, ModelError
from dfq_tf.importing import load_classifier
from tools import common

FLAGS = common.FLAGS

# What can be measured.
Model = Classifier | export.TFLiteClassifier


def read_model(path: str) -> Model:
    """Reads a `.tflite`, `.keras` or `.h5` classifier.

    Raises:
      ModelError: there is no such file, or it cannot be read.
    """
    if not path.endswith(".tflite"):
        return load_classifier(path)
    if not pathlib.Path(path).is_file():
        raise ModelError(f"there is no model file {path}")
    return export.TFLiteClassifier(pathlib.Path(path).read_bytes())


def check_fits(model: Model, dataset: data.Dataset) -> None:
    """Raises DataError if the model's classes or images are not the data set's."""
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


def main() -> None:
    """Measures and reports."""
    if not FLAGS.model:
        raise ConfigError("model is empty; name a model file with --model")
    model = read_model(FLAGS.model)
    teacher = read_model(FLAGS.teacher) if FLAGS.teacher else None
    dataset = common.dataset_from_flags()
    for each in (model, teacher):
        if each is not None:
            check_fits(each, dataset)
    workdir = common.open_workdir(pathlib.Path(FLAGS.model + ".evaluate"))
    test = dataset.load("test")
    scores = model.scores(test.images)
    accuracy = evaluation.accuracy(scores, test.labels)
    workdir.add_metrics(accuracy=accuracy, images=len(test.labels))
    print(f"Accuracy: {100 * accuracy:.2f} % of {len(test.labels)} test images")
    if teacher is not None:
        agreement = evaluation.agreement(scores, teacher.scores(test.images))
        workdir.add_metrics(agreement=agreement)
        print(f"Agreement with the teacher: {100 * agreement:.2f} %")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Models", "model", str, None, "File to measure (.tflite, .keras, .h5)."
    )
    common.define("Models", "teacher", str, None, "File to compare it with.")
    common.define_dataset_flags("cifar10")
    common.define_run_flags(None, trains=False)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
