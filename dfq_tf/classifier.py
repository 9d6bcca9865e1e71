"""A classifier: a Keras model with the description of its input and output."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np
import tensorflow_model_optimization as tfmot

from dfq_tf import memory
from dfq_tf.compat import keras, tf, traced
from dfq_tf.description import ModelDescription, description_path
from dfq_tf.errors import ModelError
from dfq_tf.files import replacing

MODEL_SUFFIXES = (".keras", ".h5")

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


def check_is_classifier(model: keras.Model) -> None:
    """Raises ModelError unless `model` maps one image batch to one row of scores."""
    is_graph = isinstance(model, keras.Sequential) or getattr(
        model, "_is_graph_network", False
    )
    if not isinstance(model, keras.Model) or not is_graph:
        raise ModelError(
            f"the model is a {type(model).__module__}.{type(model).__name__}; it must "
            "be a functional or Sequential tf_keras (Keras 2) model, whose layers can "
            "be rewritten. tf.keras makes Keras 3 models unless TF_USE_LEGACY_KERAS=1"
        )
    inputs, outputs = model.inputs or [], model.outputs or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs; it must "
            "be built, take one image and give one row of class scores"
        )
    if len(model.input_shape) != 4 or None in model.input_shape[1:]:
        raise ModelError(
            f"the model's input shape is {model.input_shape}; it must be "
            "(None, height, width, channels) with fixed sizes"
        )
    if len(model.output_shape) != 2 or not model.output_shape[-1]:
        raise ModelError(
            f"the model's output shape is {model.output_shape}; it must be "
            "(None, num_classes)"
        )


def load_classifier(
    path: str | os.PathLike[str],
    describe: Callable[[int], ModelDescription] | None = None,
) -> Classifier:
    """Reads a classifier from a `.keras` or `.h5` file that tf_keras wrote.

    Args:
      path: the model's file.
      describe: gives the description of a model with so many classes; by default
        it is read from the `.json` file beside the model.

    Raises:
      ModelError: the file is absent, truncated, or not a Keras 2 model; or there is
        no description.
      ConfigError: the description does not fit the model.
    """
    model = load_model(path)
    check_is_classifier(model)
    if describe is None:
        return Classifier(model, ModelDescription.load(description_path(path)))
    return Classifier(model, describe(model.output_shape[-1]))


def load_model(path: str | os.PathLike[str]) -> keras.Model:
    """Reads a tf_keras model whole, with one clear error if that fails.

    Raises:
      ModelError: as in `load_classifier`.
    """
    path = pathlib.Path(path)
    if path.suffix not in MODEL_SUFFIXES:
        raise ModelError(
            f"{path} is not a model file; its name must end in "
            f"{' or '.join(MODEL_SUFFIXES)}"
        )
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    try:
        with tfmot.quantization.keras.quantize_scope():
            return keras.models.load_model(path, compile=False)
    # Keras raises many kinds for a damaged file: from zipfile, h5py, json, itself.
    except Exception as error:
        raise ModelError(
            f"{path} cannot be read as a tf_keras (Keras 2) model; it may be "
            f"truncated or written by Keras 3. The reader said: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
