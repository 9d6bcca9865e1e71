"""What functions are made of: nodes for arithmetic, activations, and their like.

Models write the same function in many ways: `x / 127.5 - 1`, a Rescaling layer, an
operation of TensorFlow or of Keras 3. Here each becomes nodes of the kinds that
`graph.layers` has, and is split where no kind computes it alone.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.graph import Node, Shape, layers, unique_name

# Slope and offset of max(0, min(1, slope * x + offset)): Keras 3's hard sigmoid, which
# is relu6(x + 3) / 6, and that of Keras 2, which has another slope.
_HARD_SIGMOIDS = {
    "hard_sigmoid": (1 / 6, 0.5),
    "hard_sigmoid_keras2": (0.2, 0.5),
}
# Activations x * f(x), and f.
_GATED = {"silu": "sigmoid", "hard_silu": "hard_sigmoid"}
# Activations that are a kind with settings.
_WITH_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu6": ("relu", {"top": 6.0}),
    "leaky_relu": ("leaky_relu", {"slope": 0.2}),  # the slope that Keras has here
    "gelu_by_tanh": ("gelu", {"approximate": True}),
}
# Operations of two operands.
ARITHMETIC = ("add", "subtract", "multiply", "divide", "maximum", "minimum")
_REDUCTIONS = {"mean": "global_average_pool", "max": "global_max_pool"}


class Unknown(Exception):
    """A layer cannot be written as nodes; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Found:
    """A layer of Keras, as plain data.

    Attributes:
      name: of the node that it is to become.
      kind: its class.
      config: its settings, by the names that Keras has for them.
      weights: in Keras' order.
      sources: the nodes that it reads.
      shape: of its output, without the batch, as Keras says.
      is_keras2: whether it is a layer of tf_keras.
      function: calls it on an array.
      activation: the function or object that it has as its activation, if it has one.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    weights: Sequence[np.ndarray]
    sources: Sequence[Node]
    shape: Shape
    is_keras2: bool
    function: Callable[[np.ndarray], Any]
    activation: Any = None


class Maker:
    """Makes the nodes that one layer becomes.

    Args:
      layer: its name, which one of the nodes may have.
      before: the nodes of the layers before it, by name.
      reserved: names of other layers, which no node of this one may have.

    Attributes:
      layer: as given.
      before: as given.
      nodes: those made so far, in order; the last gives the layer's output. A layer
        without nodes passes its input on.
    """

    def __init__(
        self, layer: str, before: Mapping[str, Node], reserved: Collection[str]
    ) -> None:
        self.layer = layer
        self.before = before
        self.nodes: list[Node] = []
        self._taken = {*before, *reserved, layer}

    def add(
        self,
        kind: str,
        name: str,
        sources: Sequence[Node],
        settings: Mapping[str, Any] | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
        also: Sequence[str] = (),
    ) -> Node:
        """Makes a node, as `layers.node` does.

        Args:
          kind: of the node.
          name: of the node; it gets a number if it is taken.
          sources: the nodes that it reads.
          settings: of the node.
          weights: of the node.
          also: further layers that the node stands for.
        """
        if name != self.layer:
            name = unique_name(self._taken, name)
        self._taken.add(name)
        of = (self.layer, *also)
        self.nodes.append(layers.node(kind, name, sources, settings, weights, of))
        return self.nodes[-1]


def activate(maker: Maker, activation: str, name: str, source: Node) -> None:
    """Adds the nodes of an activation.

    Args:
      maker: makes them.
      activation: a kind without settings, 'linear', or one of those above.
      name: of the node that gives it.
      source: what it is computed of.
    """
    if activation == "linear":
        return
    if activation in _HARD_SIGMOIDS:
        slope, offset = _HARD_SIGMOIDS[activation]
        line = affine(maker, f"{name}_affine", source, slope, offset)
        maker.add("relu", name, [line], {"top": 1.0})
    elif activation in _GATED:
        activate(maker, _GATED[activation], f"{name}_gate", source)
        maker.add("multiply", name, [source, maker.nodes[-1]])
    else:
        kind, settings = _WITH_SETTINGS.get(activation, (activation, {}))
        maker.add(kind, name, [source], settings)


def relu(
    maker: Maker, name: str, source: Node, settings: Mapping[str, float | None]
) -> None:
    """Adds a ReLU that may have a 'top' or a 'slope' below 0.

    Raises:
      Unknown: it has both, a 'threshold', or a top that is not above 0.
    """
    top, slope, threshold = (
        None if settings.get(setting) is None else float(settings[setting] or 0)
        for setting in ("top", "slope", "threshold")
    )
    if threshold:
        raise Unknown(f"its threshold is {threshold:g}; only a ReLU without is known")
    if top is not None and top <= 0:
        raise Unknown(f"its largest value is {top:g}; only one above 0 is known")
    if top is not None and slope:
        raise Unknown(
            f"it has a largest value ({top:g}) and a slope for values below 0 "
            f"({slope:g}); only a ReLU with one of the two is known"
        )
    if slope:
        maker.add("leaky_relu", name, [source], {"slope": slope})
    else:
        maker.add("relu", name, [source], {"top": top})


def softmax(maker: Maker, name: str, source: Node, axis: Any) -> None:
    """Adds a softmax over an axis, the batch being axis 0.

    Raises:
      Unknown: it is not the last one.
    """
    last = len(source.shape)
    if axis not in (-1, last, [-1], [last], (-1,), (last,)):
        raise Unknown(f"it is over the axis {axis}; only the last axis can be")
    maker.add("softmax", name, [source])


def affine(maker: Maker, name: str, source: Node, scale: Any, offset: Any) -> Node:
    """Adds `scale * x + offset`, each one number or one for each channel.

    Raises:
      Unknown: one of them is something else.
    """
    values = {"scale": scale, "offset": offset}
    settings = {key: per_channel(value, source) for key, value in values.items()}
    plain = {
        key: tuple(value.tolist()) if value.ndim else float(value)
        for key, value in settings.items()
    }
    return maker.add("affine", name, [source], plain)


def per_channel(constant: Any, source: Node) -> np.ndarray:
    """A constant as float64 () or (channels,).

    Raises:
      Unknown: it is no finite number, and no vector of one for each channel.
    """
    value = np.asarray(constant, np.float64)
    if not np.isfinite(value).all():
        raise Unknown("one of its constants is not finite")
    if value.size == 1:
        return value.reshape(())
    if value.shape[-1] == value.size == source.shape[-1]:
        return value.reshape(-1)
    raise Unknown(
        f"it has a constant of shape {value.shape}; only one number, or one for each "
        "channel, has an integer form"
    )


def merge(maker: Maker, kind: str, name: str, sources: Sequence[Node]) -> Node:
    """Adds a kind of two inputs; of more inputs, a chain of them."""
    so_far, *rest = sources
    for i, source in enumerate(rest, start=1):
        link = name if i == len(rest) else f"{name}_{i}_of_many"
        so_far = maker.add(kind, link, [so_far, source])
    return so_far


def operate(
    maker: Maker,
    operation: str,
    operands: Sequence[Any],
    settings: Mapping[str, Any],
    shape: Shape,
) -> None:
    """Adds the nodes of an operation that a model calls as a function.

    Args:
      maker: makes them; the last has its layer's name.
      operation: a key of `keras_names.FUNCTIONS` or of `keras_names.ACTIVATIONS`.
      operands: nodes and constants.
      settings: its other arguments.
      shape: of the output, without the batch.

    Raises:
      Unknown: there are no nodes for it.
    """
    if operation in ARITHMETIC:
        _arithmetic(maker, operation, operands, settings)
        return
    if not all(isinstance(operand, Node) for operand in operands):
        raise Unknown("one of its inputs is a constant")
    first, name = operands[0], maker.layer
    axis = settings.get("axis", -1)
    if operation == "stack":
        _stack(maker, operands, axis, shape)
    elif operation in _REDUCTIONS:
        _reduce(maker, operation, first, axis, settings.get("keepdims"))
    elif operation == "concatenate":
        if len(operands) > 1:  # of one, that
            maker.add("concatenate", name, operands, {"axis": axis})
    elif operation == "channels":
        _index(maker, first, settings["key"])
    elif operation == "axes":
        _change_axes(maker, first, settings.get("axis"), shape)
    elif operation == "pad":
        _pad(maker, first, settings)
    elif operation == "reshape":
        _reshape(maker, first, shape)
    elif operation == "transpose":
        _transpose(maker, first, settings.get("order"))
    elif operation == "softmax":
        softmax(maker, name, first, axis)
    else:
        _of_one_value(maker, operation, first, settings)


def _arithmetic(
    maker: Maker, operation: str, operands: Sequence[Any], settings: Mapping[str, Any]
) -> None:
    left, right = operands
    is_first = isinstance(left, Node)
    if is_first and isinstance(right, Node):
        if operation == "divide":
            raise Unknown(f"there is no integer form of the {operation} of two tensors")
        if len(left.shape) != len(right.shape):
            raise Unknown(f"it merges shapes {left.shape} and {right.shape}")
        maker.add(operation, maker.layer, [left, right])
        return
    if settings.get("data_format") == "NCHW":
        raise Unknown("its data_format is NCHW")
    source, constant = (left, right) if is_first else (right, left)
    value = per_channel(constant, source)
    if operation in ("maximum", "minimum"):
        if operation == "minimum" or value.any():
            raise Unknown(f"it is the {operation} of a tensor and {value.tolist()}")
        maker.add("relu", maker.layer, [source])
        return
    if operation == "divide":
        if not is_first:
            raise Unknown("there is no integer form of a division by a tensor")
        if (value == 0).any():
            raise Unknown("it divides by 0")
        operation, value = "multiply", 1 / value
    scale, offset = {
        "add": (1.0, value),
        "subtract": (1.0, -value) if is_first else (-1.0, value),
        "multiply": (value, 0.0),
    }[operation]
    affine(maker, maker.layer, source, scale, offset)


def _stack(maker: Maker, picks: Sequence[Node], axis: Any, shape: Shape) -> None:
    """Single channels of one image, one behind the other, are read from the image."""
    images = {pick.inputs for pick in picks}
    is_one = len(images) == 1 and {pick.kind for pick in picks} == {"channels"}
    if not is_one or len(shape) != 3 or axis not in (-1, 3):
        raise Unknown("only a stack of channels of one image has an integer form")
    image = maker.before[picks[0].inputs[0]]
    order = tuple(channel for pick in picks for channel in pick.settings["order"])
    of = tuple(dict.fromkeys(layer for pick in picks for layer in pick.layers))
    maker.add("channels", maker.layer, [image], {"order": order}, also=of)


def _reduce(
    maker: Maker, operation: str, source: Node, axis: Any, keepdims: Any
) -> None:
    axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    is_image = len(source.shape) == 3
    if is_image and axes in ((3,), (-1,)):
        _reduce_channels(maker, operation, source, bool(keepdims))
        return
    if not is_image or tuple(sorted(axes)) not in ((1, 2), (-3, -2)):
        raise Unknown(
            f"it is over the axes {axis} of {source.shape}; only height and width of "
            "an image, or its channels, have an integer form"
        )
    settings = {"keepdims": bool(keepdims)}
    maker.add(_REDUCTIONS[operation], maker.layer, [source], settings)


def _reduce_channels(
    maker: Maker, operation: str, source: Node, keepdims: bool
) -> None:
    """Adds the largest channel of each position, or the mean of all, a convolution."""
    *sides, channels = source.shape
    last = maker.layer
    name = last if keepdims else f"{last}_kept"
    if operation == "max":
        reduced = maker.add("channel_max", name, [source])
    else:
        count = channels or 1
        shares = np.full((1, 1, count, 1), 1 / count)
        reduced = maker.add("conv", name, [source], weights={"kernel": shares})
    if not keepdims:
        _reshape(maker, reduced, tuple(sides))


def _reshape(maker: Maker, source: Node, shape: Shape) -> None:
    sizes: tuple[Any, ...] = (*shape, *source.shape)
    rank = len(shape)
    if None not in sizes and math.prod(sizes[:rank]) != math.prod(sizes[rank:]):
        raise Unknown(f"it makes {shape} of {source.shape}")
    if shape.count(None) > 1:
        raise Unknown(f"it makes {shape}, of which two sizes may be any")
    target = tuple(-1 if size is None else size for size in shape)
    maker.add("reshape", maker.layer, [source], {"shape": target})


def _change_axes(maker: Maker, source: Node, axis: Any, shape: Shape) -> None:
    """Adds axes of length 1, or takes them off; `axis` is in the longer shape."""
    if axis is None and not shape:
        raise Unknown(
            "it names no axes to take off, and of one image the batch is one too; name "
            "them, such as tf.squeeze(x, [1, 2])"
        )
    old, rank = source.shape, 1 + max(len(source.shape), len(shape))
    axes = () if axis is None else tuple(np.ravel(axis) % rank)
    if 0 in axes:
        raise Unknown("it changes the axis of the batch")
    # The model may not know all sizes; the image that it is read for has them.
    if axes and len(shape) > len(old):
        sizes = iter(old)
        shape = tuple(1 if i in axes else next(sizes) for i in range(1, rank))
    elif axes:
        shape = tuple(size for i, size in enumerate(old, 1) if i not in axes)
    _reshape(maker, source, shape)


def _transpose(maker: Maker, source: Node, order: Any) -> None:
    """Adds another order of the axes, the batch being axis 0; None is the reversed."""
    rank = 1 + len(source.shape)
    axes = range(rank)[::-1] if order is None else np.ravel(order) % rank
    batch, *others = map(int, axes)
    if batch != 0:
        raise Unknown("it moves the axis of the batch")
    if others != sorted(others):
        maker.add("transpose", maker.layer, [source], {"order": tuple(others)})


def _pad(maker: Maker, source: Node, settings: Mapping[str, Any]) -> None:
    mode, value = str(settings.get("mode", "constant")), settings.get("value")
    if mode.lower() != "constant" or np.any(value):
        what = f"a constant of {value}" if mode.lower() == "constant" else mode
        raise Unknown(f"it pads with {what}; only zeros have an integer form")
    margins = np.asarray(settings["margins"]).tolist()
    if len(source.shape) != 3 or len(margins) != 4 or any(margins[0] + margins[3]):
        raise Unknown(
            f"it pads {source.shape} by {margins}, the batch first; only height and "
            "width of an image have an integer form"
        )
    sides = tuple(map(tuple, margins[1:3]))
    maker.add("pad", maker.layer, [source], {"margins": sides})


def _index(maker: Maker, source: Node, key: Any) -> None:
    """Adds `source[key]`, the batch being axis 0: channels, or axes of length 1.

    Raises:
      Unknown: it is something else.
    """
    parts = [
        slice(k["start"], k["stop"], k["step"]) if isinstance(k, dict) else k
        for k in (key if isinstance(key, (tuple, list)) else [key])
    ]
    old = [part for part in parts if part is not None]
    if len(old) < len(parts) and all(map(_is_whole, old)):
        # A batch of two, of which nothing is stored: where is it now?
        sizes = (size or 0 for size in source.shape)
        batch, *sides = np.broadcast_to(0, (2, *sizes))[tuple(parts)].shape
        if batch != 2:
            raise Unknown("it adds an axis before that of the batch")
        _reshape(maker, source, tuple(size or None for size in sides))
        return
    order = _indexed_channels(source, parts)
    maker.add("channels", maker.layer, [source], {"order": order})


def _is_whole(part: Any) -> bool:
    """Whether a part of an index takes all of an axis, or of several."""
    return part is Ellipsis or (isinstance(part, slice) and part == slice(None))


def _indexed_channels(source: Node, key: Sequence[Any]) -> tuple[int, ...]:
    """The numbers of the channels that `source[key]` gives, the batch being axis 0.

    Raises:
      Unknown: the index is of another axis too, or computed.
    """
    *others, last = key
    is_whole = all(map(_is_whole, others))
    is_last = len(others) == 3 or others.count(Ellipsis) == 1
    parts = [last]
    if isinstance(last, slice):
        parts = [p for p in (last.start, last.stop, last.step) if p is not None]
    is_known = all(isinstance(part, (int, np.integer)) for part in parts)
    if len(source.shape) != 3 or not (is_whole and is_last and is_known):
        raise Unknown(
            f"it takes {tuple(key)} of {source.shape}; only channels of an image have "
            "an integer form, such as x[..., ::-1], and axes of length 1, such as "
            "x[:, None]"
        )
    return tuple(np.atleast_1d(np.arange(source.shape[-1] or 0)[last]).tolist())


def _of_one_value(
    maker: Maker, operation: str, source: Node, settings: Mapping[str, Any]
) -> None:
    name = maker.layer
    if operation == "negative":
        affine(maker, name, source, -1.0, 0.0)
    elif operation == "clip":
        low, top = settings.get("low"), settings.get("top")
        if low != 0 or top is None or top <= 0:
            raise Unknown(f"it clips to {low} .. {top}; only 0 .. x can be")
        maker.add("relu", name, [source], {"top": float(top)})
    elif operation == "cast":
        if "float" not in str(settings.get("dtype", "float")):
            raise Unknown(f"it casts to {settings['dtype']}")
    elif operation == "relu" and settings:
        relu(maker, name, source, settings)
    elif operation in ("leaky_relu", "elu") and "slope" in settings:
        maker.add(operation, name, [source], {"slope": float(settings["slope"])})
    elif operation == "gelu":
        is_approximate = bool(settings.get("approximate", False))
        maker.add("gelu", name, [source], {"approximate": is_approximate})
    else:
        activate(maker, operation, name, source)
