"""A teacher of scikit-learn's digits that takes seconds to train, and its images."""

import functools

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.with_data import datasets as data

layers = keras.layers


@functools.cache
def split(name: str) -> data.Split:
    """The images and labels of 'train' or 'test'."""
    return data.open_dataset("digits").load(name)


@functools.cache
def teacher() -> Classifier:
    """Two conv-BN-ReLU blocks and a dense layer; the same each time, and shared."""
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
    description = ModelDescription((120.0,), (1 / 64,), "logits", tuple("0123456789"))
    result = Classifier(keras.Model(image, x), description)
    train = split("train")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    result.model.compile(keras.optimizers.Adam(0.01), loss)
    inputs = description.normalize(train.images.astype(np.float32))
    result.model.fit(inputs, train.labels, batch_size=64, epochs=6, verbose=0)
    return result
