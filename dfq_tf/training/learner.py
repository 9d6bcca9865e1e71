"""A network that learns: a Keras model with the description of its input and output."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import is_of_layers, keras, tf, traced
from dfq_tf.errors import ModelError, class_of
from dfq_tf.graph import (
    ALIVE,
    FLOAT,
    MOST_SCORED,
    ModelDescription,
    described_at,
    images_per_pass,
    in_batches,
)


@dataclasses.dataclass(frozen=True)
class Learner:
    """A network that is trained, and how to feed and read it.

    Attributes:
      model: a functional or Sequential tf_keras model from normalised images,
        (batch, height, width, channels), to (batch, num_classes). Training changes its
        weights in place.
      description: how pixels become its input, what its outputs are.
    """

    model: keras.Model
    description: ModelDescription

    def __post_init__(self) -> None:
        """Raises ModelError or ConfigError if model and description do not fit."""
        check_model(self.model)
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
        """What the model's last layer gives for images, by its weights of now.

        Args:
          images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
          batch_size: images per pass; None for 250, or as many as fit into memory.

        Returns:
          float32 (n, num_classes).

        Raises:
          ModelError: there is no image, or they are of another shape, or no pixels.
        """
        size = batch_size or self._images_per_pass
        return in_batches(self._compiled, images, self.image_shape, size)

    def logits(self, pixels: tf.Tensor, training: bool) -> tf.Tensor:
        """Outputs for float32 pixels, float32 (batch, num_classes), differentiable.

        Args:
          pixels: (batch, height, width, channels) in [0, 255].
          training: as in Keras.
        """
        return self.model(self.description.normalize(pixels), training=training)

    @functools.cached_property
    def _images_per_pass(self) -> int:
        size = FLOAT * largest_tensor(self._compiled)
        return images_per_pass(ALIVE * size, MOST_SCORED)

    @functools.cached_property
    def _compiled(self) -> Callable[[tf.Tensor], tf.Tensor]:
        """Scores of one batch of pixels, compiled once for all calls."""

        def scores(pixels: tf.Tensor) -> tf.Tensor:
            return self.logits(pixels, training=False)

        return traced(scores, tf.TensorSpec((None, *self.image_shape), tf.float32))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to `path` (.keras or .h5) and the description beside it.

        Raises:
          ConfigError: the name has another ending.
        """
        with described_at(path, self.description) as temporary:
            self.model.save(temporary)


def random_states(models: Iterable[keras.Model]) -> list[tf.random.Generator]:
    """Has the layers that draw numbers, such as Dropout, draw them by states.

    Keras' own way hangs on all that the program has drawn before, and no checkpoint
    has it.

    Args:
      models: are changed. None of their steps is traced yet, and the call is in the
        scope of the devices that hold them.

    Returns:
      The state of each such layer, for `drawn_by`.
    """
    found = []
    for layer in (layer for model in models for layer in model._flatten_layers()):
        drawing: Any = getattr(layer, "_random_generator", None)
        if hasattr(drawing, "RNG_STATEFUL"):  # Keras' own
            drawing._rng_type, drawing._built = drawing.RNG_STATEFUL, True
            drawing._generator = tf.random.Generator.from_seed(0, "philox")
            found.append(drawing._generator)
    return found


def drawn_by(
    step: Callable[..., Any], states: Sequence[tf.random.Generator]
) -> Callable[..., Any]:
    """A step in which all that layers draw follows from its last argument.

    Args:
      step: its last argument is a (seed, step) pair.
      states: from `random_states`.
    """

    def called(*arguments: Any) -> Any:
        if states:
            seed, number = map(int, arguments[-1])
            key = tf.constant(seed << 32 | number, tf.int64)
            for i, state in enumerate(states):
                state.reset_from_key_counter(key, tf.constant((0, i), tf.int64))
        return step(*arguments)

    return called


def num_model_values(model: keras.Model) -> int:
    """Values in the outputs of all layers of a model, for one image.

    A layer counts as often as it is called, and a model inside by its layers, once.
    """
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += num_model_values(layer)
            continue
        for i in range(len(layer.inbound_nodes)):
            for output in tf.nest.flatten(layer.get_output_at(i)):
                total += math.prod(size or 1 for size in output.shape[1:])
    return total


def largest_tensor(function: Any) -> int:
    """Values in the largest tensor of a compiled function, for one image.

    Args:
      function: from `compat.traced`, for batches of any size.
    """
    shapes = [
        tensor.shape
        for operation in function.graph.get_operations()
        for tensor in operation.outputs
    ]
    return max(
        math.prod(shape[1:])
        for shape in shapes
        if shape.rank and shape[0] is None and shape[1:].is_fully_defined()
    )


def check_model(model: Any) -> None:
    """Raises ModelError unless a tf_keras model maps an image batch to rows of scores.

    Of Keras 3, `importing.classifiers` makes a Classifier, which does not learn.
    """
    if not is_of_layers(model):
        raise ModelError(
            f"the model is a {class_of(model)}; a "
            "network that learns must be a functional or Sequential model of tf_keras "
            "(Keras 2)"
        )
    inputs, outputs = model.inputs or [], model.outputs or []
    shapes = [tuple(tensor.shape) for tensor in (*inputs, *outputs)]
    ranks = [len(shape) for shape in shapes]
    if ranks != [4, 2] or any(None in shape[1:] for shape in shapes):
        raise ModelError(
            f"the model's inputs and outputs are {shapes}; it must be built, take one "
            "image, (None, height, width, channels) with fixed sizes, and give "
            "(None, num_classes)"
        )
