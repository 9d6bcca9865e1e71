"""The generator: noise to images, in pixel space. Its network, and what it makes."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.context import Context, counted
from dfq_tf.errors import ConfigError
from dfq_tf.settings import BudgetConfig, DistillationConfig
from dfq_tf.training import replica_slice, with_precision

layers = keras.layers

# Each kind of step draws random numbers of its own from the same (seed, step).
WARM_UP, GENERATOR, STUDENT, SAMPLE, AUGMENTATION, SYNTHESIS, ANSWER = range(7)

# Generated images on which students are compared with the teacher, and their bytes.
_HELD_OUT_IMAGES, _LEAST_HELD_OUT = 1000, 100
_HELD_OUT_BYTES = 32 * 2**20

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

    Memory grows no faster than the image: with 128 channels and 8 to 640 pixels a
    side, the outputs of all layers have 80 to 320 values for each pixel of the image,
    and up to 710 at sizes that leave a wide margin, such as 9x33.

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
    _check_sizes(noise_dim, image_shape, channels)
    height, width, depth = image_shape
    doublings = _num_doublings(height, width)
    grid = tuple(math.ceil(side / 2**doublings) for side in (height, width))
    # Every layer its own numbers, without touching the random state of the program.
    seeds = itertools.count(seed * (doublings + 2))
    kernels = map(keras.initializers.GlorotUniform, seeds)
    noise = x = layers.Input((noise_dim,), name="noise")
    units = math.prod(grid) * channels
    x = layers.Dense(units, kernel_initializer=next(kernels), name="dense")(x)
    x = layers.Reshape((*grid, channels), name="grid")(x)
    x = layers.BatchNormalization(name="grid_bn")(x)
    for i in range(1, doublings + 1):
        filters = channels // 2 if i == doublings else channels
        # Half as many each time the side doubles beyond 32 pixels.
        filters = min(filters, max(_LEAST_FILTERS, channels * 32 // (max(grid) * 2**i)))
        x = _doubling(x, filters, next(kernels), i)
    x = layers.Conv2D(
        depth, 3, padding="same", kernel_initializer=next(kernels), name="to_image"
    )(x)
    surplus = [g * 2**doublings - side for g, side in zip(grid, (height, width))]
    if any(surplus):
        margins = tuple((s // 2, s - s // 2) for s in surplus)
        x = layers.Cropping2D(margins, name="crop")(x)
    images = ToPixels(name="pixels", dtype="float32")(x)
    return keras.Model(noise, images, name="generator")


def _check_sizes(
    noise_dim: int, image_shape: tuple[int, int, int], channels: int
) -> None:
    if min(noise_dim, *image_shape, channels) < 1:
        raise ConfigError(
            f"noise_dim {noise_dim}, image_shape {image_shape} and channels {channels} "
            "must all be at least 1"
        )


def _num_doublings(height: int, width: int) -> int:
    """Two up to 32 pixels, and more for larger images: the grid stays small.

    No more than make a narrow image's shorter side of a single row: further ones would
    make rows to be cropped. Its grid is longer instead.
    """
    longer, shorter = max(height, width), min(height, width)
    return max(2, math.ceil(math.log2(min(longer / 8, shorter))))


def _doubling(x: tf.Tensor, filters: int, initializer: Any, index: int) -> tf.Tensor:
    """Twice the height and width."""
    x = UpsampledConv2D(filters, initializer, name=f"up_conv{index}")(x)
    x = layers.BatchNormalization(name=f"bn{index}")(x)
    return layers.LeakyReLU(0.2, name=f"leaky_relu{index}")(x)


def make_generators(
    image_shape: tuple[int, int, int],
    context: Context[DistillationConfig] | Context[BudgetConfig],
) -> list[keras.Model]:
    """Generators with random weights, each its own.

    Args:
      image_shape: (height, width, channels) of their images.
      context: its settings give their number and the noise's length, its seed the
        weights.
    """
    config = context.settings
    # Large odd strides, so that runs of neighbouring seeds share no generator.
    seeds = (context.seed + 1_000_003 * i for i in range(config.num_generators))
    built = [
        build_generator(config.noise_dim, image_shape, seed=seed) for seed in seeds
    ]
    if context.precision == "float32":
        return built
    return [with_precision(generator, context.precision) for generator in built]


def sample_noise(
    config: DistillationConfig,
    seed_and_step: tf.Tensor,
    stream: int,
    num_batches: int = 1,
) -> tf.Tensor:
    """Standard normal noise, float32 (num_batches * batch_size, noise_dim).

    Args:
      config: gives the sizes.
      seed_and_step: int32 (2,).
      stream: which of the independent noises of that step.
      num_batches: how many batches of it.
    """
    seed = tf.random.fold_in(seed_and_step, stream)
    shape = (num_batches * config.batch_size, config.noise_dim)
    return tf.random.stateless_normal(shape, seed)


def draw_parts(
    generators: Sequence[keras.Model],
    config: DistillationConfig,
    seed_and_step: tf.Tensor,
    stream: int,
) -> list[tf.Tensor]:
    """One batch of images, of which each generator makes its share.

    BN layers use the statistics of the batch, as when the generators learnt to make
    these images.

    Args:
      generators: where the batch does not divide, the first ones make one more.
      config: gives the sizes.
      seed_and_step: int32 (2,).
      stream: see `sample_noise`.

    Returns:
      The images of each generator, float32 (share, height, width, channels) in
      [0, 255], without gradient; of several replicas, each has its share of them.
    """
    noise = sample_noise(config, seed_and_step, stream)
    share, rest = divmod(config.batch_size, len(generators))
    sizes = [share + (i < rest) for i in range(len(generators))]
    noises = tf.split(noise, sizes)
    return [
        tf.stop_gradient(generator(part, training=True))
        for generator, part in zip(generators, map(replica_slice, noises))
    ]


class Sampler:
    """Draws images from generators, without changing them; it compiles once.

    Args:
      generators: from noise to pixels; each makes its share of a batch.
      config: gives the batch size: BN layers use the statistics of the batch, as in
        training.
    """

    def __init__(
        self, generators: Sequence[keras.Model], config: DistillationConfig
    ) -> None:
        self._generators, self._batch_size = generators, config.batch_size

        @tf.function(autograph=False)
        def batch(seed_and_step: tf.Tensor) -> tf.Tensor:
            parts = draw_parts(generators, config, seed_and_step, SAMPLE)
            return tf.cast(tf.round(tf.concat(parts, axis=0)), tf.uint8)

        self._batch = batch

    def __call__(self, num_images: int, seed: int) -> np.ndarray:
        """Images, as `generate` gives them, of the generators as they are now."""
        before = [generator.get_weights() for generator in self._generators]
        # One array from the start: large images are not there twice.
        shape = self._generators[0].output_shape[1:]
        images = np.empty((num_images, *shape), np.uint8)
        starts = range(0, num_images, self._batch_size)
        for i, start in enumerate(counted(starts, "batches")):
            part = images[start : start + self._batch_size]
            part[:] = self._batch(tf.constant([seed, i]))[: len(part)]
        for generator, weights in zip(self._generators, before):
            generator.set_weights(weights)  # training=True moved the moving averages
        return images


def generate(
    generators: Sequence[keras.Model],
    config: DistillationConfig,
    num_images: int,
    seed: int,
) -> np.ndarray:
    """Draws images from generators once; several times, a `Sampler` takes less time.

    Args:
      generators: as of `Sampler`.
      config: as of `Sampler`.
      num_images: how many images.
      seed: decides the noise.

    Returns:
      uint8 (num_images, height, width, channels): pixels as an app has them.
    """
    return Sampler(generators, config)(num_images, seed)


def held_out_count(image_shape: tuple[int, int, int]) -> int:
    """How many generated images are held out: 1000, fewer if they are large."""
    fitting = _HELD_OUT_BYTES // math.prod(image_shape)
    return max(_LEAST_HELD_OUT, min(_HELD_OUT_IMAGES, fitting))
