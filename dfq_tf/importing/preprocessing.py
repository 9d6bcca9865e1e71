"""Layers at the head of a model that prepare its input.

A file takes raw pixels, and their quantization is the preprocessing: one affine
function per channel, `scale * pixel + offset`, costs nothing there.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.graph import Graph, ModelDescription, Node, layers, unique_name
from dfq_tf.importing.operations import Found, Maker, Unknown, affine, operate

_MOST = 255  # of a pixel
# Channels may be scaled so differently: the others have two steps of 8 bits left then.
_MOST_APART = 100
# Pictures whose mean is lower are hardly any.
_LEAST_MEAN = 16
# What is made of pixels is no larger: dark pictures too have a deviation of 8 or more.
_MOST_UNITS = 32
# How far a Lambda layer may be from a function, as a share of its values.
_FUNCTION_TOLERANCE = 1e-5
# Arrays of NumPy and tensors, as Keras 3 writes them.
_ARRAYS = ("__numpy__", "__tensor__")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the head of a model does to its input: `scale * x + offset`.

    Attributes:
      scale: float64 () or (channels,); 1 by default.
      offset: float64 () or (channels,); 0 by default.
    """

    scale: np.ndarray = dataclasses.field(default_factory=lambda: np.ones(()))
    offset: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all() and (self.offset == 0).all())

    @property
    def is_of_pixels(self) -> bool:
        """Whether it was made for pixels, 0 to 255, by what it makes of them.

        That is a few units. What makes more was made for smaller numbers, such as
        pixels / 255; unless it takes the mean of pixels away, and scales nothing.
        """
        of_black = np.abs(self.offset)
        most = np.maximum(of_black, np.abs(_MOST * self.scale + self.offset))
        takes_mean = (np.abs(self.scale) == 1) & (of_black >= _LEAST_MEAN)
        return bool(((most <= _MOST_UNITS) | takes_mean).all())

    @property
    def takes_pixels(self) -> bool:
        """Whether a model that does this first takes pixels as they are.

        What does nothing stands for more, of several branches, see
        `take_preprocessing`.
        """
        return self.is_nothing or self.is_of_pixels

    def then(self, other: "Preprocessing") -> "Preprocessing":
        """This one, and another behind it."""
        return Preprocessing(
            self.scale * other.scale, self.offset * other.scale + other.offset
        )

    def unordered(self, order: np.ndarray) -> "Preprocessing":
        """The same of channels 0, 1, ..., if this one is of channels in an order."""
        back = np.argsort(order)
        scale, offset = (
            v[back] if v.size > 1 else v for v in (self.scale, self.offset)
        )
        return Preprocessing(scale, offset)

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
# Kinds whose outputs lie between the values of an image, or are 0.
_PIXEL_KEEPING = (
    *_MOVING,
    "average_pool",
    "bilinear_upsampling",
    "channels",
    "concatenate",
    "crop",
    "max_pool",
    "nearest_upsampling",
    "pad",
)


def take_preprocessing(graph: Graph) -> tuple[Graph, Preprocessing | None]:
    """Takes the affine nodes at the head off.

    Another order of the channels among them, as BGR, stays, before all else. Behind
    reshapes, as of images without channels, those of one scale and offset are taken;
    behind crops, all.
    Those of several branches stay, and those behind a padding, whose zeros they change.

    Returns:
      The network without them, and what they did: None if they did nothing, and one
      that does nothing if all pixels come to such nodes first, and these stay.
    """
    taken: dict[str, str] = {}
    found: Preprocessing | None = None
    image = graph.image
    order = np.arange(
        image.shape[-1] or 0
    )  # the channels of the image, as they come here
    name = head = image.name
    moved = ""  # the last node that has put the pixels elsewhere
    is_mixed = False  # whether the last axis may be other than channels
    while True:
        readers = graph.consumers(name)
        if len(readers) != 1 or readers[0].name == graph.output:
            break
        (node,) = readers
        if node.kind in (*_MOVING, "crop"):
            moved = node.name
            is_mixed |= node.kind != "crop"
        elif node.kind == "affine":
            step = _of_affine(node)
            if (step.scale <= 0).any():
                break  # the quantization of pixels keeps their order
            if is_mixed and max(step.scale.size, step.offset.size) > 1:
                break
            found = (found or Preprocessing()).then(step.unordered(order))
            taken[node.name] = moved or head
        elif not moved and layers.is_order(node, len(order)):
            order = order[list(node.settings["order"])]
            if head != image.name:
                taken[head] = image.name
            head = node.name
        else:
            break
        name = node.name
    if found is None or found.is_nothing:
        found = Preprocessing() if _is_prepared(graph) else None
    replacements: dict[str, list[Node]] = {name: [] for name in taken}
    if head != image.name:
        settings = {"order": tuple(order.tolist())}
        replacements[head] = [layers.node("channels", head, [image], settings)]
    return graph.replaced(replacements, taken), found


def _is_prepared(graph: Graph) -> bool:
    """Whether all pixels come to affine nodes that are made for them, and stay."""
    names = [graph.image.name]
    for name in names:
        readers = graph.consumers(name)
        if not readers:
            return False
        for node in readers:
            top = node.settings.get("top", 0)  # of a ReLU, None for none
            is_idle = node.kind == "relu" and (top is None or top >= _MOST)
            if node.kind in _PIXEL_KEEPING or is_idle:
                names.append(node.name)
            elif node.kind != "affine" or not _of_affine(node).is_of_pixels:
                return False
    return True


def _of_affine(node: Node) -> Preprocessing:
    """What an affine node does."""
    scale, offset = node.settings["scale"], node.settings["offset"]
    return Preprocessing(np.asarray(scale, float), np.asarray(offset, float))


def _add_rescaling(maker: Maker, found: Found) -> None:
    scale, offset = (_array(found.config[name]) for name in ("scale", "offset"))
    affine(maker, found.name, found.sources[0], scale, offset)


def _array(value: Any) -> Any:
    """A setting that may be an array, as Keras 3 writes it."""
    is_written = isinstance(value, Mapping) and value.get("class_name") in _ARRAYS
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
    check_scales(1 / deviation)
    scale, offset = 1 / deviation, -mean / deviation
    if found.config.get("invert"):
        scale, offset = deviation, mean
    affine(maker, found.name, found.sources[0], scale, offset)


def check_scales(scales: np.ndarray) -> None:
    """Refuses factors of an image's channels that have no room on one integer grid.

    Args:
      scales: () or (channels,).

    Raises:
      Unknown: a channel is scaled _MOST_APART times as far as another one.
    """
    scales = np.abs(np.atleast_1d(scales))
    least, most = scales.min(), scales.max()
    if most > _MOST_APART * least > 0:
        far = np.flatnonzero(scales > _MOST_APART * least)
        which = f"channel{'s' * (far.size > 1)} {', '.join(map(str, far))}"
        raise Unknown(
            f"it scales {which} {most / least:.3g} times as far as the others, of "
            "which 8 bits leave nothing then. Such a channel was the same in all "
            "images that the layer has seen: set its variance to that of another one, "
            "which changes nothing while it stays so, or train without it"
        )


def _add_lambda(maker: Maker, found: Found) -> None:
    """What a Python function computes, found from what it gives.

    Raises:
      Unknown: nothing that is known here, or the function fails.
    """
    (source,) = found.sources
    rng = np.random.default_rng(0)
    low = 0 if source.kind == "image" else -255
    images = rng.uniform(low, 255, (4, *(size or 8 for size in source.shape)))
    images[0], images[1] = 0.0, 255.0
    # What goes by the lowest and highest value does another thing to this one.
    pale = 20 + images[2:3] / 8
    probes = []
    for given in (images.astype(np.float32), pale.astype(np.float32)):
        try:
            given_back = np.asarray(found.function(given), np.float64)
        # It is the user's, and may raise anything.
        except Exception as error:
            raise Unknown(
                f"its Python function fails on images of {source.shape}: "
                f"{type(error).__name__}. Write it as Keras layers"
            ) from error
        probes.append((given.astype(np.float64), given_back))
    line = _affine_of(probes)
    if line is not None:
        affine(maker, found.name, source, *line)
        return
    for operation, settings, function in _functions(source, found.shape):
        if all(_is_close(function(x), y) for x, y in probes):
            operate(maker, operation, [source], settings, found.shape)
            return
    raise Unknown(
        "its Python function is not one scale and one offset for each channel, nor a "
        "mean or maximum of channels or places, nor a reshape"
    )


# Images and what a function gives for them.
_Probe = tuple[np.ndarray, np.ndarray]


def _affine_of(probes: Sequence[_Probe]) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and offset of a function, one of each channel; None if it is another one.

    Args:
      probes: of images, the first of zeros, and the second of 255.
    """
    if any(x.shape != y.shape for x, y in probes):
        return None
    zeros, full = probes[0][1][:2]
    axes = tuple(range(zeros.ndim - 1))
    offset = zeros.mean(axes)
    scale = (full.mean(axes) - offset) / 255
    if not all(_is_close(scale * x + offset, y) for x, y in probes):
        return None
    return _rounded(scale), _rounded(offset)


def _functions(source: Node, shape: Sequence[int | None]) -> Iterator[Any]:
    """Functions that a Lambda layer may be: operation, its settings, its NumPy twin."""
    sizes: tuple[Any, ...] = (*shape, *source.shape)
    rank = len(shape)
    if None not in sizes and math.prod(sizes[:rank]) == math.prod(sizes[rank:]):
        yield "reshape", {}, lambda x: x.reshape(len(x), *shape)
    if len(source.shape) == 3:
        choices = itertools.product(("mean", "max"), ((1, 2), (3,)), (True, False))
        for operation, axes, keepdims in choices:
            settings = {"axis": axes, "keepdims": keepdims}
            twin = getattr(np, operation)
            yield operation, settings, functools.partial(twin, **settings)


def _is_close(expected: np.ndarray, given: np.ndarray) -> bool:
    if expected.shape != given.shape:
        return False
    most = _FUNCTION_TOLERANCE * max(1.0, np.abs(given).max())
    return bool(np.abs(expected - given).max() <= most)


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


def _add_center_crop(maker: Maker, found: Found) -> None:
    """Both sides lose the same; an odd row or column goes at the end."""
    (source,) = found.sources
    if found.shape == source.shape:
        return
    larger = [
        -1 if side is None or target is None else side - target
        for side, target in zip(source.shape[:2], found.shape[:2])
    ]
    if min(larger) < 0:
        _add_resizing(maker, found)  # refuses it: Keras makes smaller images larger
        return
    margins = tuple((more // 2, more - more // 2) for more in larger)
    maker.add("crop", found.name, found.sources, {"margins": margins})


# Layers that bring images of any size to one; what they are given has the right one.
_RESIZING = ("RandomCrop", "Resizing")
# Class of a layer -> what adds its nodes.
LAYERS: dict[str, Callable[[Maker, Found], None]] = {
    "CenterCrop": _add_center_crop,
    "Lambda": _add_lambda,
    "Normalization": _add_normalization,
    "Rescaling": _add_rescaling,
    **dict.fromkeys(_RESIZING, _add_resizing),
}
