"""A classifier: a Keras model with the description of its input and output."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf, traced
from dfq_tf.errors import ModelError
from dfq_tf.files import replacing
from dfq_tf.graph.description import ModelDescription, description_path
from dfq_tf.training import memory

# Images per pass, and how many tensors as large as the largest may be alive in it.
_MOST_IMAGES, _ALIVE = 250, 4


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and how to feed and read it: a teacher, or a student.

    Attributes:
      model: a functional or Sequential tf_keras model from normalised images,
        (batch, height, width, channels), to (batch, num_classes).
      description: how pixels become its input, what its outputs are.
    """

    model: keras.Model
    description: ModelDescription

    def __post_init__(self) -> None:
        """Raises ModelError or ConfigError if model and description do not fit."""
        check_is_classifier(self.model)
        self.description.check_fits(self.image_shape, self.num_classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return tuple(self.model.input_shape[1:])

    @property
    def num_classes(self) -> int:
        """The number of outputs."""
        return self.model.output_shape[-1]

    def scores(self, images: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """What the model's last layer gives for images.

        Args:
          images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
          batch_size: images per pass; None for 250, or as many as fit into memory.

        Returns:
          float32 (n, num_classes).
        """
        batch_size = batch_size or self._images_per_pass
        starts = range(0, len(images), batch_size)
        batches = (images[i : i + batch_size].astype(np.float32) for i in starts)
        return np.concatenate(
            [self._compiled_scores(tf.constant(batch)).numpy() for batch in batches]
        )

    @functools.cached_property
    def _images_per_pass(self) -> int:
        size = memory.FLOAT * memory.largest_tensor(self._compiled_scores)
        return memory.images_per_pass(_ALIVE * size, _MOST_IMAGES)

    @functools.cached_property
    def _compiled_scores(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Scores of one batch of pixels, compiled once for all calls."""

        def scores(pixels: tf.Tensor) -> tf.Tensor:
            return self.model(self.description.normalize(pixels), training=False)

        return traced(scores, tf.TensorSpec((None, *self.image_shape), tf.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to `path` (.keras) and the description beside it."""
        # The description goes in place first: whoever finds the model finds it too.
        with replacing(path) as temporary:
            self.model.save(temporary)
            self.description.save(description_path(path))


def check_is_classifier(model: Any) -> None:
    """Raises ModelError unless a tf_keras model maps an image batch to rows of scores.

    Of Keras 3, `importing.as_classifier` makes one.
    """
    check_has_layers(model)
    check_ends(model.inputs, model.outputs)


def check_has_layers(model: Any) -> None:
    """Raises ModelError unless it is a tf_keras model whose layers can be read."""
    is_graph = isinstance(model, keras.Sequential) or getattr(
        model, "_is_graph_network", False
    )
    if not isinstance(model, keras.Model) or not is_graph:
        raise ModelError(
            f"the model is a {type(model).__module__}.{type(model).__name__}; it must "
            "be a functional or Sequential model, whose layers can be rewritten: of "
            "tf_keras (Keras 2), or of Keras 3 through dfq_tf.as_classifier"
        )


def check_ends(inputs: Any, outputs: Any, *, any_size: bool = False) -> None:
    """Raises ModelError unless there is one image in and one row of scores out.

    Args:
      inputs: symbolic inputs of a model of Keras 2 or 3; None if it is not built.
      outputs: symbolic outputs.
      any_size: whether height and width of the image may be unknown.
    """
    inputs, outputs = inputs or [], outputs or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs; it must "
            "be built, take one image and give one row of class scores"
        )
    shape, scores = tuple(inputs[0].shape), tuple(outputs[0].shape)
    if len(shape) != 4 or shape[-1] is None or (None in shape[1:] and not any_size):
        raise ModelError(
            f"the model's input shape is {shape}; it must be "
            "(None, height, width, channels) with fixed sizes"
        )
    if len(scores) != 2 or not scores[-1]:
        raise ModelError(
            f"the model's output shape is {scores}; it must be (None, num_classes)"
        )
