"""The generator: noise to images, in pixel space."""

import itertools
import math

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError

layers = keras.layers


@keras.utils.register_keras_serializable("dfq_tf")
class RepeatPixels(keras.layers.Layer):
    """Nearest-neighbour upsampling by 2: (b, h, w, c) to (b, 2 h, 2 w, c).

    Written with a broadcast, since the gradient of `UpSampling2D` has no XLA kernel.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Repeats each pixel 2 x 2 times."""
        _, height, width, channels = inputs.shape
        pixels = tf.reshape(inputs, (-1, height, 1, width, 1, channels))
        pixels = tf.tile(pixels, (1, 1, 2, 1, 2, 1))
        return tf.reshape(pixels, (-1, 2 * height, 2 * width, channels))


@keras.utils.register_keras_serializable("dfq_tf")
class ToPixels(keras.layers.Layer):
    """Maps any real number to a pixel value: 255 (1 + tanh x) / 2, in [0, 255]."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Squashes each value; same shape."""
        return 127.5 * (1.0 + tf.tanh(inputs))


def build_generator(
    noise_dim: int,
    image_shape: tuple[int, int, int],
    channels: int = 128,
    seed: int = 0,
) -> keras.Model:
    """Builds the generator for images of any size.

    Dense to a grid of an eighth to a quarter of the image with `channels` channels,
    BN; then per doubling: upsampling, 3x3 convolution, BN, leaky ReLU 0.2, the last
    doubling with half the channels; then a 3x3 convolution to the image's channels
    and tanh. This is the network that public re-implementations of Choi et al. 2020
    use for 32x32 images, except that it ends in pixels, where theirs ends in a BN
    without scale and shift: pixels reach the whole range that real images have.

    Args:
      noise_dim: length of a noise vector.
      image_shape: (height, width, channels) of the images.
      channels: channels of the first grid.
      seed: decides the random weights.

    Returns:
      A functional model from noise, (batch, noise_dim) standard normal, to images,
      float32 (batch, *image_shape) in [0, 255].

    Raises:
      ConfigError: a size is below 1.
    """
    height, width, depth = image_shape
    if min(noise_dim, height, width, depth, channels) < 1:
        raise ConfigError(
            f"noise_dim {noise_dim}, image_shape {image_shape} and channels {channels} "
            "must all be at least 1"
        )
    # Two doublings up to 32 pixels, and more for larger images: the grid stays small.
    doublings = max(2, math.ceil(math.log2(max(height, width) / 8)))
    grid = tuple(math.ceil(side / 2**doublings) for side in (height, width))
    # Every layer its own numbers, without touching the random state of the program.
    seeds = itertools.count(seed * (doublings + 2))

    def initializer() -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(next(seeds))

    noise = x = layers.Input((noise_dim,), name="noise")
    x = layers.Dense(
        grid[0] * grid[1] * channels, kernel_initializer=initializer(), name="dense"
    )(x)
    x = layers.Reshape((*grid, channels), name="grid")(x)
    x = layers.BatchNormalization(name="grid_bn")(x)
    for i in range(1, doublings + 1):
        filters = channels // 2 if i == doublings else channels
        x = RepeatPixels(name=f"up{i}")(x)
        x = layers.Conv2D(
            filters,
            3,
            padding="same",
            kernel_initializer=initializer(),
            name=f"conv{i}",
        )(x)
        x = layers.BatchNormalization(name=f"bn{i}")(x)
        x = layers.LeakyReLU(0.2, name=f"leaky_relu{i}")(x)
    x = layers.Conv2D(
        depth, 3, padding="same", kernel_initializer=initializer(), name="to_image"
    )(x)
    surplus = [g * 2**doublings - side for g, side in zip(grid, (height, width))]
    if any(surplus):
        x = layers.Cropping2D(
            tuple((s // 2, s - s // 2) for s in surplus), name="crop"
        )(x)
    images = ToPixels(name="pixels", dtype="float32")(x)
    return keras.Model(noise, images, name="generator")
