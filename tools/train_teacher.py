"""Trains a teacher on labelled images.

    python tools/train_teacher.py --dataset=cifar10 --model=wrn_16_1

Writes WORKDIR/teacher.keras and, beside it, teacher.json, which says how pixels
become the model's input. Real data is used here, and nowhere after.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common
from dfq_tf import models
from dfq_tf.compat import keras
from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier, ModelDescription
from dfq_tf.importing import as_classifier, load_classifier
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import TeacherConfig
from dfq_tf.training import Learner, check_batch
from dfq_tf.with_data import datasets
from dfq_tf.with_data.datasets import accuracy
from dfq_tf.with_data.supervised import train_teacher

FLAGS = common.FLAGS

# One integer mean and one scale for all channels, of a power of two, are exactly an
# integer quantization of the input: see ModelDescription.
INPUT_MEAN, INPUT_SCALE = 120.0, 1 / 64


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define_dataset_flags("cifar10")
    common.define(
        "Teacher",
        "model",
        str,
        "wrn_16_1",
        f"Network: {'; '.join(models.MODEL_NAMES)}.",
    )
    common.define_config("Teacher", TeacherConfig, first=True)
    common.define_run_flags("runs/teacher")


def new_teacher(
    name: str, dataset: datasets.Dataset, argument: str = "model"
) -> Learner:
    """A network for the images and classes of a data set, weights random.

    Args:
      name: of the network, see `models.MODEL_NAMES`.
      dataset: what it is to be trained on.
      argument: what a message calls the name.

    Raises:
      ConfigError: there is no such network.
    """
    names = dataset.class_names
    return Learner(
        models.build_model(name, dataset.image_shape, len(names), argument),
        ModelDescription((INPUT_MEAN,), (INPUT_SCALE,), "logits", names),
    )


def trained_teacher(
    name: str, dataset: datasets.Dataset, config: TeacherConfig, workdir: Workdir
) -> Classifier:
    """Trains the network `name`, or reads it if an earlier run trained it.

    Args:
      name: of the network, see `models.MODEL_NAMES`.
      dataset: what to train on.
      config: how to train.
      workdir: where checkpoints and the trained teacher are kept.
    """
    path = workdir.path / "teacher.keras"
    if common.is_made(path):
        return load_classifier(path)
    context = common.context(config, workdir.path)
    train = dataset.load("train")
    keras.utils.set_random_seed(context.seed)
    teacher = new_teacher(name, dataset)
    train_teacher(teacher, train.images, train.labels, context)
    teacher.save(path)
    return as_classifier(teacher)


def main() -> None:
    """Trains, measures and reports."""
    config = common.config_from_flags(TeacherConfig)
    if not models.is_model_name(FLAGS.model):  # before a data set is downloaded
        raise ConfigError(
            f"model is {FLAGS.model!r}; the project builds: "
            f"{'; '.join(models.MODEL_NAMES)}"
        )
    check_batch(common.strategy(), config.teacher_batch_size, name="teacher_batch_size")
    common.check_workdir()
    dataset = common.dataset_from_flags()
    new_teacher(FLAGS.model, dataset)  # refuses a wrong name before anything is written
    workdir = common.open_workdir(makes=["teacher.keras"])
    teacher = trained_teacher(FLAGS.model, dataset, config, workdir)
    with common.stage("evaluation of the teacher"):
        test = dataset.load("test")
        scores = teacher.scores(test.images)
    right = accuracy(scores, test.labels)
    workdir.add_metrics(teacher_accuracy=right)
    print(f"Teacher: {100 * right:.2f} % of {len(test.labels)} test images")
    print(f"Wrote {workdir.path / 'teacher.keras'} and {workdir.path / 'teacher.json'}")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
