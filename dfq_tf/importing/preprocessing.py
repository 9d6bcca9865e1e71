"""Layers at the head of a model that prepare its input, and layers that only train.

A file takes raw pixels, and their quantization is the preprocessing: one affine
function per channel, `scale * pixel + offset`, costs nothing there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.graph.graph import Graph, Node
from dfq_tf.importing.operations import (
    Unknown,
    activation_nodes,
    channel_order,
    channels_node,
    rescaling_node,
)

# Layers that pass their input on unchanged, except while they are trained.
TRAINING_ONLY = frozenset(
    """
    ActivityRegularization AlphaDropout AugMix AutoContrast CutMix Dropout Equalization
    GaussianDropout GaussianNoise Identity MixUp RandAugment RandomBrightness
    RandomColorDegeneration RandomColorJitter RandomContrast RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert
    RandomPerspective RandomPosterization RandomRotation RandomSaturation
    RandomSharpness RandomShear RandomTranslation RandomZoom Solarization
    SpatialDropout2D
    """.split()
)
# Layers that bring images of any size to one; what they are given has the right one.
_RESIZING = ("CenterCrop", "RandomCrop", "RandomHeight", "RandomWidth", "Resizing")
# How far a Lambda layer may be from an affine function, as a share of its values.
_AFFINE_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the head of a model does to its input: `scale * x + offset`.

    Attributes:
      scale: float64 () or (channels,); 1 by default.
      offset: float64 () or (channels,); 0 by default.
    """

    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(()))
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))

    def then(self, other: "Preprocessing") -> "Preprocessing":
        """This one, and another behind it."""
        return Preprocessing(
            self.scale * other.scale, self.offset * other.scale + other.offset
        )


def preprocessing_nodes(
    kind: str,
    config: Mapping[str, Any],
    weights: Sequence[np.ndarray],
    function: Callable[[np.ndarray], Any],
    source: Node,
    name: str,
    shape: Sequence[int],
) -> list[Node] | None:
    """Nodes for a layer that prepares images, or that only training needs.

    Args:
      kind: the class of the layer, of Keras 2 or 3.
      config: of the layer.
      weights: of the layer.
      function: calls the layer on an array.
      source: what it reads.
      name: of the node.
      shape: of its output, without the batch.

    Returns:
      The nodes; None for a layer of another kind.

    Raises:
      Unknown: the layer cannot become part of the input's quantization.
    """
    inputs = (source.name,)
    if kind in TRAINING_ONLY or (kind in _RESIZING and tuple(shape) == source.shape):
        return activation_nodes("linear", source, name, ())
    if kind in _RESIZING:
        raise Unknown(
            f"it makes images of {tuple(shape)} of those of {source.shape}; take it "
            "out, and let the app give images of that size"
        )
    if kind == "Rescaling":
        scale, offset = config["scale"], config["offset"]
        return [rescaling_node(name, inputs, shape, _vector(scale), _vector(offset))]
    if kind == "Normalization":
        scale, offset = _normalization(config, weights)
        return [rescaling_node(name, inputs, shape, scale, offset)]
    if kind == "Lambda":
        scale, offset = _probed(function, source.shape)
        return [rescaling_node(name, inputs, shape, scale, offset)]
    return None


def take_preprocessing(graph: Graph) -> tuple[Graph, Preprocessing | None]:
    """Takes the affine layers at the head off.

    Another order of the channels among them, as BGR, stays, before all else.

    Returns:
      The network without them, and what they did; None if there was nothing.
    """
    taken: dict[str, str] = {}
    found: Preprocessing | None = None
    image = graph.nodes[graph.input_name]
    order = np.arange(image.shape[-1])  # the channels of the image, as they come here
    name = head = image.name
    while True:
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].name == graph.output_name:
            break
        (node,) = readers
        if node.kind == "Rescaling":
            scale = np.asarray(node.config["scale"], np.float64)
            offset = np.asarray(node.config["offset"], np.float64)
            if (scale <= 0).any():
                break  # the quantization of pixels keeps their order
            step = Preprocessing(*(_unordered(v, order) for v in (scale, offset)))
            found = (found or Preprocessing()).then(step)
        elif (channels := channel_order(node)) is not None:
            order = order[channels]
            if head != image.name:
                taken[head] = image.name
            name = head = node.name
            continue
        elif not _is_identity(node):
            break
        taken[node.name] = head
        name = node.name
    replacements: dict[str, list[Node]] = {name: [] for name in taken}
    if head != image.name:
        replacements[head] = [channels_node(image, head, order)]
    return graph.replaced(replacements, taken), found


def _unordered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Values of channels in an order, as those of the channels 0, 1, ..."""
    return values[np.argsort(order)] if values.size > 1 else values


def _is_identity(node: Node) -> bool:
    return node.kind == "Activation" and node.config.get("activation") == "linear"


def _vector(value: Any) -> np.ndarray:
    value = np.asarray(value, np.float64)
    return value.reshape(()) if value.size == 1 else value.reshape(-1)


def _normalization(
    config: Mapping[str, Any], weights: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a Normalization: (x - mean) / max(sqrt(variance), 1e-7)."""
    if weights:
        mean, variance = weights[:2]
    elif config.get("mean") is not None and config.get("variance") is not None:
        mean, variance = config["mean"], config["variance"]
    else:
        raise Unknown("it has no mean and variance; call its adapt method first")
    mean, deviation = _vector(mean), np.maximum(np.sqrt(_vector(variance)), 1e-7)
    if config.get("invert"):
        return deviation, mean
    return 1 / deviation, -mean / deviation


def _probed(
    function: Callable[[np.ndarray], Any], shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a function of pixels, found from what it gives.

    Raises:
      Unknown: it is not affine, with one scale and one offset for each channel.
    """
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (4, *shape)).astype(np.float32)
    images[0], images[1] = 0.0, 255.0
    outputs = np.asarray(function(images), np.float64)
    if outputs.shape == images.shape:
        axes = tuple(range(len(shape) - 1))
        offset = outputs[0].mean(axes)
        scale = (outputs[1].mean(axes) - offset) / 255
        error = np.abs(scale * images + offset - outputs).max()
        if error <= _AFFINE_TOLERANCE * max(1.0, np.abs(outputs).max()):
            return _rounded(scale), _rounded(offset)
    raise Unknown(
        "its Python function is not one scale and one offset for each channel"
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    """To the seven digits that float32 has; one number if all channels agree."""
    values = np.array([float(f"{value:.7g}") for value in values])
    values[np.abs(values) < 1e-6] = 0.0
    return values[0] if (values == values[0]).all() else values
