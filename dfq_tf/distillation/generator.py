"""The generator: noise to images, in pixel space."""

import itertools
import math
from typing import Any

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError

layers = keras.layers

# Of a doubling, however large its output is; unless fewer channels are asked for.
_LEAST_FILTERS = 16


@keras.utils.register_keras_serializable("dfq_tf")
class UpsampledConv2D(keras.layers.Layer):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with zero padding.

    From (b, h, w, c) to (b, 2 h, 2 w, filters). After the upsampling, neighbours are
    equal, so that only 4 of the 9 products of each output are different ones. One
    transposed convolution with a 4x4 kernel, made of sums of the 3x3 kernel's weights,
    computes the same in 4/9 of the multiplications, and has an XLA gradient, which
    `UpSampling2D` lacks.

    Args:
      filters: channels of the output.
      kernel_initializer: of the 3x3 kernel.
    """

    # Row i of the 4x4 kernel is the sum of these rows of the 3x3 kernel.
    _SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))

    def __init__(
        self,
        filters: int,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape: Any) -> None:
        """Makes the 3x3 kernel and the bias."""
        self.kernel = self.add_weight(
            "kernel",
            (3, 3, input_shape[-1], self.filters),
            initializer=self.kernel_initializer,
        )
        self.bias = self.add_weight("bias", (self.filters,), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Upsamples and convolves."""
        sums = tf.constant(self._SUMS, inputs.dtype)
        kernel = tf.einsum("ai,bj,ijcf->abfc", sums, sums, self.kernel)
        _, height, width, _ = inputs.shape
        shape = (tf.shape(inputs)[0], 2 * height, 2 * width, self.filters)
        outputs = tf.nn.conv2d_transpose(inputs, kernel, shape, 2, "SAME")
        return tf.nn.bias_add(outputs, self.bias)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


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

    Dense to a grid with `channels` channels, a quarter of the image or, above 32
    pixels, at most 8 pixels a side, BN; then per doubling: upsampling, 3x3
    convolution, BN, leaky ReLU 0.2, the last doubling with half the channels; then a
    3x3 convolution to the image's channels and tanh; of a grid that does not double to
    the image's size, the margin is cropped. This is the network that public
    re-implementations of Choi et al. 2020 use for 32x32 images, except that it ends
    in pixels, where theirs ends in a BN without scale and shift: pixels reach the
    whole range that real images have.

    Memory: what a pass forward and back keeps grows no faster than the image. With 128
    channels and 8 to 512 pixels a side, the outputs of all layers are at most 710
    values for each pixel of the image, 4 bytes each; that is at sizes that leave a
    wide margin, such as 9x33. There are about 320 at 8x8 to 64x64, 110 at 224x224 and
    80 at 512x512 and 8x512.

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
    # No more than make a narrow image's shorter side of a single row: further ones
    # would make rows to be cropped. Its grid is longer instead.
    longer, shorter = max(height, width), min(height, width)
    doublings = max(2, math.ceil(math.log2(min(longer / 8, shorter))))
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
        # Half as many each time the side doubles beyond 32 pixels.
        filters = min(filters, max(_LEAST_FILTERS, channels * 32 // (max(grid) * 2**i)))
        x = UpsampledConv2D(filters, initializer(), name=f"up_conv{i}")(x)
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
