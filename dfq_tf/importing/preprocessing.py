"""Layers at the head of a model that prepare its input.

A file takes raw pixels, and their quantization is the preprocessing: one affine
function per channel, `scale * pixel + offset`, costs nothing there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.graph import Graph, ModelDescription, Node, layers, unique_name
from dfq_tf.importing.operations import Found, Maker, Unknown, affine

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

    def reversed(self) -> "Preprocessing":
        """The same, of channels in the reversed order."""
        scale, offset = np.atleast_1d(self.scale), np.atleast_1d(self.offset)
        return Preprocessing(scale[::-1], offset[::-1])


def described(
    feeding: Preprocessing, output: str, class_names: Sequence[str]
) -> ModelDescription:
    """The description of a network that pixels reach through `feeding`."""
    scale = feeding.scale
    mean = -feeding.offset / scale + 0.0  # + 0 makes 0 of -0
    return ModelDescription(as_tuple(mean), as_tuple(scale), output, tuple(class_names))


def as_tuple(values: Any) -> tuple[float, ...]:
    """Numbers of channels; one, if all are the same."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    return tuple(values[:1] if (values == values[0]).all() else values)


def reversed_channels(graph: Graph) -> Graph:
    """A network that takes blue first, made to take red first."""
    inner = graph.image
    outer = dataclasses.replace(inner, name=unique_name(graph.nodes, f"{inner.name}_0"))
    order = tuple(reversed(range(inner.shape[-1] or 0)))
    channels = layers.node("channels", inner.name, [outer], {"order": order})
    return graph.replaced({inner.name: [outer, channels]})


# Kinds that put each value of an image somewhere, and change none.
_MOVING = ("reshape", "transpose")


def take_preprocessing(graph: Graph) -> tuple[Graph, Preprocessing | None]:
    """Takes the affine nodes at the head off.

    Another order of the channels among them, as BGR, stays, before all else. Behind
    reshapes, as of images without channels, those of one scale and offset are taken.

    Returns:
      The network without them, and what they did; None if there was nothing.
    """
    taken: dict[str, str] = {}
    found: Preprocessing | None = None
    image = graph.image
    order = np.arange(
        image.shape[-1] or 0
    )  # the channels of the image, as they come here
    name = head = image.name
    moved = ""  # the last node that has put the pixels elsewhere
    while True:
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].name == graph.output:
            break
        (node,) = readers
        if node.kind in _MOVING:
            moved = node.name
        elif node.kind == "affine":
            scale = np.asarray(node.settings["scale"], np.float64)
            offset = np.asarray(node.settings["offset"], np.float64)
            if (scale <= 0).any():
                break  # the quantization of pixels keeps their order
            if moved and max(scale.size, offset.size) > 1:
                break
            step = Preprocessing(*(_unordered(v, order) for v in (scale, offset)))
            found = (found or Preprocessing()).then(step)
            taken[node.name] = moved or head
        elif not moved and _is_order(node, len(order)):
            order = order[list(node.settings["order"])]
            if head != image.name:
                taken[head] = image.name
            head = node.name
        else:
            break
        name = node.name
    replacements: dict[str, list[Node]] = {name: [] for name in taken}
    if head != image.name:
        settings = {"order": tuple(order.tolist())}
        replacements[head] = [layers.node("channels", head, [image], settings)]
    return graph.replaced(replacements, taken), found


def _is_order(node: Node, channels: int) -> bool:
    """Whether the node gives each channel of its input once."""
    is_choice = node.kind == "channels"
    return is_choice and sorted(node.settings["order"]) == list(range(channels))


def _unordered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Values of channels in an order, as those of the channels 0, 1, ..."""
    return values[np.argsort(order)] if values.size > 1 else values


def _add_rescaling(maker: Maker, found: Found) -> None:
    scale, offset = (_array(found.config[name]) for name in ("scale", "offset"))
    affine(maker, found.name, found.sources[0], scale, offset)


def _array(value: Any) -> Any:
    """A setting that may be an array, as Keras 3 writes it."""
    is_written = isinstance(value, Mapping) and value.get("class_name") == "__numpy__"
    return value["config"]["value"] if is_written else value


def _add_normalization(maker: Maker, found: Found) -> None:
    """(x - mean) / max(sqrt(variance), 1e-7), or the inverse of it."""
    axis, last = found.config.get("axis", -1), len(found.shape)
    axes = axis if isinstance(axis, (list, tuple)) else () if axis is None else (axis,)
    if not {*axes} <= {-1, last}:
        raise Unknown(
            f"it has axis {axis}; only one mean and variance, or one for each channel, "
            "have an integer form"
        )
    if found.weights:
        mean, variance = found.weights[:2]
    else:
        mean, variance = (_array(found.config.get(k)) for k in ("mean", "variance"))
    if mean is None or variance is None:
        raise Unknown("it has no mean and variance; call its adapt method first")
    mean, variance = (np.asarray(value, np.float64) for value in (mean, variance))
    deviation = np.maximum(np.sqrt(variance), 1e-7)
    scale, offset = 1 / deviation, -mean / deviation
    if found.config.get("invert"):
        scale, offset = deviation, mean
    affine(maker, found.name, found.sources[0], scale, offset)


def _add_lambda(maker: Maker, found: Found) -> None:
    (source,) = found.sources
    is_positive = source.kind == "image"
    scale, offset = _probed(found.function, source.shape, is_positive)
    affine(maker, found.name, source, scale, offset)


def _probed(
    function: Callable[[np.ndarray], Any],
    shape: Sequence[int | None],
    is_positive: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset of a function, found from what it gives.

    Args:
      function: of images.
      shape: of an image.
      is_positive: whether it is of pixels as they are, 0 to 255.

    Raises:
      Unknown: it is not affine, with one scale and one offset for each channel.
    """
    rng = np.random.default_rng(0)
    low = 0 if is_positive else -255
    images = rng.uniform(low, 255, (4, *(size or 8 for size in shape)))
    images = images.astype(np.float32)
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


def _add_resizing(maker: Maker, found: Found) -> None:
    """Images of the right size stay as they are."""
    (source,) = found.sources
    if found.shape != source.shape:
        raise Unknown(
            f"it makes images of {found.shape} of those of {source.shape}; take it "
            "out, and let the app give images of that size"
        )


# Layers that bring images of any size to one; what they are given has the right one.
_RESIZING = ("CenterCrop", "RandomCrop", "RandomHeight", "RandomWidth", "Resizing")
# Class of a layer -> what adds its nodes.
LAYERS: dict[str, Callable[[Maker, Found], None]] = {
    "Lambda": _add_lambda,
    "Normalization": _add_normalization,
    "Rescaling": _add_rescaling,
    **dict.fromkeys(_RESIZING, _add_resizing),
}
