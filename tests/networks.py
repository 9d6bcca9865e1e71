"""Small networks of the families that the package quantizes, with random weights.

Their batch normalisations hold random statistics, scales and shifts: a network
whose BN is still that of its construction would hide most folding mistakes.
"""

import functools
from collections.abc import Callable

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.models import build_model
from dfq_tf.training.learner import Learner

layers = keras.layers

NUM_CLASSES = 5


def wrn_10_1() -> keras.Model:
    return build_model("wrn_10_1", (16, 16, 3), NUM_CLASSES)


def vgg_like() -> keras.Model:
    """Sequential: conv, BN, ReLU, max pooling, flatten, dropout, dense."""
    return keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(12, 3, padding="same", use_bias=False),
            layers.BatchNormalization(scale=False),
            layers.Activation("relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Dense(NUM_CLASSES),
        ]
    )


def resnet_like() -> keras.Model:
    """Post-activation residual blocks: conv, BN, add, ReLU; a strided projection."""
    image = layers.Input((8, 8, 3))
    x = _conv_bn(image, 8)
    x = layers.ReLU()(x)
    y = layers.ReLU()(_conv_bn(x, 8))
    x = layers.ReLU()(layers.Add()([x, _conv_bn(y, 8)]))
    y = layers.ReLU()(_conv_bn(x, 12, strides=2))
    shortcut = _conv_bn(x, 12, size=1, strides=2)
    x = layers.ReLU()(layers.Add()([shortcut, _conv_bn(y, 12)]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES)(x))


def mobilenet_like() -> keras.Model:
    """Depthwise with multipliers 1 and 2, separable, ReLU6, an inverted residual."""
    image = layers.Input((8, 8, 3))
    x = layers.ReLU(6.0)(_conv_bn(image, 8))
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    y = layers.ReLU(6.0)(layers.BatchNormalization()(y))
    x = layers.Add()([x, _conv_bn(y, 8, size=1)])
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2)(x)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(12, 3, padding="same", use_bias=False)(x)
    x = layers.Activation(tf.nn.relu6)(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES)(x))


def densenet_like() -> keras.Model:
    """BN, ReLU, conv, and concatenation of what went in with what came out."""
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same")(image)
    for _ in range(2):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = layers.Conv2D(4, 3, padding="same", use_bias=False)(y)
        x = layers.Concatenate()([x, y])
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.AveragePooling2D()(_conv_bn(x, 8, size=1))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES)(x))


def bn_first() -> keras.Model:
    """A BN that no layer can take in: on the pixels, and after an activation."""
    image = layers.Input((8, 8, 3))
    x = layers.BatchNormalization()(image)
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(8, 3, strides=2, padding="same")(x)
    x = layers.LeakyReLU(0.2)(x)
    x = layers.Flatten()(x)
    x = layers.BatchNormalization()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES)(x))


def padded_pooling() -> keras.Model:
    """Zero padding before valid convolutions, average pooling, a softmax at the end."""
    image = layers.Input((8, 8, 1))
    x = layers.ZeroPadding2D(1)(image)
    x = layers.Conv2D(8, 3, use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.AveragePooling2D()(x)
    x = layers.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = layers.Conv2D(12, 3, strides=2)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Flatten()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES, activation="softmax")(x))


def mobilenet_v3_like() -> keras.Model:
    """Swish, hard swish, squeeze and excite, tanh, and ranges that are fixed."""
    image = layers.Input((8, 8, 3))
    x = layers.Activation("swish")(_conv_bn(image, 8))
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    y = layers.Conv2D(4, 1, activation="relu")(y)
    x = layers.Multiply()([x, layers.Dense(8, activation="sigmoid")(y)])
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x))
    y = layers.Rescaling(1 / 6)(layers.ReLU(6.0)(layers.Rescaling(1.0, 3.0)(x)))
    x = layers.Multiply()([x, y])
    y = layers.Activation("hard_sigmoid")(_conv_bn(x, 4, size=1))
    z = layers.Conv2D(4, 1, activation="tanh")(x)
    z = layers.Subtract()([y, z])
    z = layers.ReLU(1.5)(layers.MaxPooling2D(padding="same")(z))
    x = layers.Concatenate()([layers.AveragePooling2D()(x), z])
    x = layers.Add()([x, x, _conv_bn(x, 12)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(NUM_CLASSES)(x))


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "wrn_10_1": wrn_10_1,
    "vgg_like": vgg_like,
    "resnet_like": resnet_like,
    "mobilenet_like": mobilenet_like,
    "densenet_like": densenet_like,
    "bn_first": bn_first,
    "padded_pooling": padded_pooling,
    "mobilenet_v3_like": mobilenet_v3_like,
}


# Three that have much besides convolutions between them. What is to hold for each of
# NETWORKS is tested with the others in `make test-long`.
FEW = ("resnet_like", "padded_pooling", "mobilenet_v3_like")
OTHERS = tuple(name for name in NETWORKS if name not in FEW)


@functools.cache
def build(
    name: str,
    seed: int = 0,
    mean: tuple[float, ...] = (120.0,),
    scale: tuple[float, ...] = (1 / 64,),
) -> Classifier:
    """A network of NETWORKS, with random weights and BN statistics; it is shared.

    Args:
      name: key of NETWORKS.
      seed: decides the weights.
      mean: of the description.
      scale: of the description.
    """
    return as_classifier(learner(name, seed, mean, scale))


def learner(
    name: str,
    seed: int = 0,
    mean: tuple[float, ...] = (120.0,),
    scale: tuple[float, ...] = (1 / 64,),
) -> Learner:
    """As `build`, the Keras model itself."""
    keras.utils.set_random_seed(seed)
    model = NETWORKS[name]()
    randomize(model, seed)
    output = "softmax" if name == "padded_pooling" else "logits"
    names = tuple(f"class {i}" for i in range(NUM_CLASSES))
    return Learner(model, ModelDescription(mean, scale, output, names))


def randomize(model: keras.Model, seed: int) -> None:
    """Gives biases and BN layers random values, channels of different sizes."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            for variable in layer.weights:
                kind = variable.name.split("/")[-1].split(":")[0]
                low, high = {
                    "gamma": (0.3, 2.0),
                    "beta": (-0.5, 0.5),
                    "moving_mean": (-0.5, 0.5),
                    "moving_variance": (0.2, 3.0),
                }[kind]
                variable.assign(rng.uniform(low, high, variable.shape))
        elif getattr(layer, "bias", None) is not None:
            layer.bias.assign(rng.normal(0, 0.2, layer.bias.shape))


def images(shape: tuple[int, int, int], count: int, seed: int = 0) -> np.ndarray:
    """uint8 images, half of them noise, half smooth and reaching 0 and 255."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count - count // 2, *shape))
    height, width, channels = shape
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = rng.uniform(-1, 1, (count // 2, 2, channels))
    smooth = (
        rows[None, :, :, None] * slopes[:, None, None, 0]
        + columns[None, :, :, None] * slopes[:, None, None, 1]
    )
    low = smooth.min(axis=(1, 2, 3), keepdims=True)
    high = smooth.max(axis=(1, 2, 3), keepdims=True)
    smooth = np.round(255 * (smooth - low) / (high - low))
    return np.concatenate([noise, smooth]).astype(np.uint8)


def _conv_bn(x: tf.Tensor, channels: int, size: int = 3, strides: int = 1) -> tf.Tensor:
    x = layers.Conv2D(channels, size, strides, padding="same", use_bias=False)(x)
    return layers.BatchNormalization()(x)
