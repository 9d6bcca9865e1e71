"""A trained teacher of scikit-learn's digits, and its images.

`python -m tests.digits`, from the project's root, makes its file anew, in seconds.
"""

import functools
import pathlib

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.importing.files import read_model
from dfq_tf.training.learner import Learner
from dfq_tf.with_data import datasets as data

PATH = pathlib.Path(__file__).parent / "data" / "digits_teacher.keras"
DESCRIPTION = ModelDescription((120.0,), (1 / 64,), "logits", tuple("0123456789"))

layers = keras.layers


@functools.cache
def split(name: str) -> data.Split:
    """The images and labels of 'train' or 'test'."""
    return data.open_dataset("digits").load(name)


@functools.cache
def teacher() -> Classifier:
    """The teacher; the same each time, and shared."""
    return as_classifier(learner())


def learner() -> Learner:
    """Its Keras model, a new one each time."""
    return Learner(read_model(PATH), DESCRIPTION)


def train() -> Learner:
    """Two conv-BN-ReLU blocks and a dense layer, trained for 6 epochs."""
    keras.utils.set_random_seed(0)
    image = x = layers.Input((8, 8, 1))
    for i, (filters, strides) in enumerate(((16, 1), (32, 2)), start=1):
        x = layers.Conv2D(
            filters, 3, strides, padding="same", use_bias=False, name=f"conv{i}"
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"bn{i}")(x)
        x = layers.ReLU(name=f"relu{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(10, name="logits")(x)
    model = keras.Model(image, x)
    train_split = split("train")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    inputs = DESCRIPTION.normalize(train_split.images.astype(np.float32))
    model.fit(inputs, train_split.labels, batch_size=64, epochs=6, verbose=0)
    # Without the optimizer, whose state is larger than the network.
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    return Learner(plain, DESCRIPTION)


if __name__ == "__main__":
    train().save(PATH)
