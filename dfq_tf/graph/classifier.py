"""A classifier: a graph with the description of its input and output."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.context import counted
from dfq_tf.errors import ModelError, class_of
from dfq_tf.graph import running
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.nodes import Graph


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and how to feed and read it. Nothing changes it.

    Attributes:
      graph: from normalised images, (batch, height, width, channels), to
        (batch, num_classes).
      description: how pixels become its input, what its outputs are.
    """

    graph: Graph
    description: ModelDescription

    def __post_init__(self) -> None:
        """Raises ModelError or ConfigError if graph and description do not fit."""
        image, scores = self.graph.image.shape, self.graph.last.shape
        if len(image) != 3 or None in image or len(scores) != 1:
            raise ModelError(
                f"the network makes {scores} of images of {image}; a classifier takes "
                "(height, width, channels) of fixed sizes and gives (num_classes,)"
            )
        self.description.check_fits(self.image_shape, self.num_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.graph.image.shape  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        """The number of outputs."""
        return self.graph.last.shape[0]  # type: ignore[return-value]

    @property
    def num_bytes(self) -> int:
        """Size of the float32 weights, in bytes."""
        nodes = self.graph.nodes.values()
        return sum(w.nbytes for node in nodes for w in node.weights.values())

    def scores(self, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """What the last node gives for images.

        Args:
          images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
          batch_size: images per pass; None for 250, or as many as fit into memory.

        Returns:
          float32 (n, num_classes).

        Raises:
          ModelError: there is no image, or they are of another shape, or no pixels.
        """
        if batch_size is None:
            size = running.FLOAT * running.largest_output(self.graph)
            batch_size = running.images_per_pass(
                running.ALIVE * size, running.MOST_SCORED
            )
        return in_batches(self._compiled, images, self.image_shape, batch_size)

    @functools.cached_property
    def weights(self) -> dict[str, dict[str, tf.Variable]]:
        """The graph's weights as variables, for functions that are compiled.

        With constants, TensorFlow's optimizer fuses operations for which it has no
        kernel, such as a convolution with batch normalisation and tanh.
        """
        return running.frozen_weights(self.graph)

    @functools.cached_property
    def _compiled(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Scores of one batch of pixels, compiled once for all calls."""
        weights = self.weights  # variables are made outside of compiled functions

        def scores(pixels: tf.Tensor) -> tf.Tensor:
            inputs = self.description.normalize(pixels)
            wanted = [self.graph.output]
            return running.compute(self.graph, inputs, wanted, weights=weights)[0]

        return traced(scores, tf.TensorSpec((None, *self.image_shape), tf.float32))


def check_images(images: np.ndarray, image_shape: Sequence[int]) -> None:
    """Raises ModelError unless images fit a network.

    Args:
      images: must be (n, *image_shape), n at least 1.
      image_shape: (height, width, channels) of what the network takes.
    """
    if not isinstance(images, np.ndarray):
        raise ModelError(
            f"the images are a {class_of(images)}; give "
            "an array of NumPy, (n, height, width, channels), as np.stack makes of "
            "several images"
        )
    if images.ndim != 4 or not len(images):
        raise ModelError(
            f"the images are an array of shape {images.shape}; give at least one, as "
            "(n, height, width, channels)"
        )
    if images.shape[1:] != tuple(image_shape):
        raise ModelError(
            f"the images are {images.shape[1:]} each, but the network takes "
            f"(height, width, channels) = {tuple(image_shape)}"
        )


def _check_pixels(images: np.ndarray) -> None:
    """Raises ModelError unless all values are in [0, 255], and not divided by 255."""
    if images.dtype == np.uint8:
        return
    if images.dtype.kind not in "iuf":
        raise ModelError(
            f"the images are {images.dtype}; give uint8 or float32 pixels, 0 to 255"
        )
    low, high = images.min(), images.max()
    # Binarised digits too: no picture of floats has pixels of 0 and 1 of 255 alone.
    is_divided = images.dtype.kind == "f" and 0 < high <= 1
    if not (low >= 0 and high <= 255) or is_divided:
        raise ModelError(
            f"the images have values from {low:g} to {high:g}; give pixels as they "
            "are, 0 to 255: the network's description says how they are normalised"
        )


def in_batches(
    function: Callable[[tf.Tensor], tf.Tensor],
    images: np.ndarray,
    image_shape: Sequence[int],
    batch_size: int,
) -> np.ndarray:
    """What a function gives for images, some at a time.

    Args:
      function: takes float32 pixels, (batch, *image_shape).
      images: uint8 or float32 pixels, (n, *image_shape), at least one.
      image_shape: (height, width, channels).
      batch_size: images per pass.

    Raises:
      ModelError: there is no image, or they are of another shape, or no pixels.
    """
    check_images(images, image_shape)
    _check_pixels(images)
    starts = range(0, len(images), batch_size)
    batches = (
        images[i : i + batch_size].astype(np.float32)
        for i in counted(starts, "passes of images")
    )
    return np.concatenate([function(tf.constant(batch)).numpy() for batch in batches])


def softmax(scores: np.ndarray) -> np.ndarray:
    """The probabilities that logits stand for, as NumPy computes them.

    Args:
      scores: (..., num_classes).

    Returns:
      float64, of the same shape.
    """
    powers = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def agreement(scores: np.ndarray, others: np.ndarray) -> float:
    """Share of images for which two classifiers have the same class, in [0, 1].

    Args:
      scores: (n, num_classes).
      others: (n, num_classes), of the other one.
    """
    return float(np.mean(np.argmax(scores, axis=-1) == np.argmax(others, axis=-1)))
