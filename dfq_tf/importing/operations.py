"""What functions are made of: nodes for arithmetic and for activations.

Models write the same function in many ways: `x / 127.5 - 1`, a Rescaling layer, an
operation of TensorFlow or of Keras 3. Here each becomes nodes of a few kinds, which
the quantization knows.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.errors import LayerProblem, UnsupportedLayerError
from dfq_tf.graph.graph import Node, unique_name

layers = keras.layers
T = TypeVar("T")

# An operand of arithmetic: the output of a node, or a constant.
Operand = Node | np.ndarray

# Slope and offset of max(0, min(1, slope * x + offset)): Keras 3's hard sigmoid, which
# is relu6(x + 3) / 6, and that of Keras 2, which has another slope.
_HARD_SIGMOIDS = {
    "hard_sigmoid": (1 / 6, 0.5),
    "hard_sigmoid_keras2": (0.2, 0.5),
}
# Activations x * f(x), and f.
_GATED = {
    "silu": "sigmoid",
    "swish": "sigmoid",
    "hard_silu": "hard_sigmoid",
    "hard_swish": "hard_sigmoid",
}
_PLAIN = ("linear", "sigmoid", "tanh", "softmax")
# Operations of two operands.
ARITHMETIC = ("add", "subtract", "multiply", "divide")
_MERGES = {
    "add": layers.Add,
    "subtract": layers.Subtract,
    "multiply": layers.Multiply,
}
_IMAGE_AXES = ((1, 2), (-3, -2))


class Unknown(Exception):
    """A function cannot be written as nodes; the message is the reason."""


def activation_nodes(
    activation: str, source: Node, name: str, taken: Collection[str]
) -> list[Node]:
    """Nodes that compute an activation.

    Args:
      activation: by the name it has in Keras 3; 'hard_sigmoid_keras2' is the one of
        Keras 2.
      source: what it is computed of.
      name: of the last of the nodes.
      taken: names that are not free, `name` not among them.

    Raises:
      Unknown: there are no nodes for it.
    """
    inputs, shape = (source.name,), source.shape
    if activation in _PLAIN:
        return [Node.of(layers.Activation(activation), name, inputs, shape)]
    if activation == "relu":
        return [relu_node(name, inputs, shape)]
    if activation == "relu6":
        return [relu_node(name, inputs, shape, 6.0)]
    if activation in _HARD_SIGMOIDS:
        slope, offset = _HARD_SIGMOIDS[activation]
        affine = unique_name([*taken, name], f"{name}_affine")
        return [
            rescaling_node(affine, inputs, shape, slope, offset),
            relu_node(name, (affine,), shape, 1.0),
        ]
    if activation in _GATED:
        gate = unique_name([*taken, name], f"{name}_gate")
        return [
            *activation_nodes(_GATED[activation], source, gate, [*taken, name]),
            Node.of(layers.Multiply(), name, (source.name, gate), shape),
        ]
    if activation == "leaky_relu":
        return [Node.of(layers.LeakyReLU(0.2), name, inputs, shape)]
    raise Unknown(f"its activation is {activation}")


def relu_node(
    name: str, inputs: Sequence[str], shape: Sequence[int], top: float | None = None
) -> Node:
    """max(0, x), or with a top min(top, max(0, x))."""
    return Node.of(layers.ReLU(top), name, inputs, shape)


def rescaling_node(
    name: str, inputs: Sequence[str], shape: Sequence[int], scale: Any, offset: Any
) -> Node:
    """`scale * x + offset`, each a number or (channels,)."""
    layer = layers.Rescaling(_as_setting(scale), _as_setting(offset))
    return Node.of(layer, name, inputs, shape)


def _as_setting(value: Any) -> Any:
    return np.asarray(value, np.float64).tolist()


def arithmetic_nodes(
    operation: str,
    operands: Sequence[Operand],
    name: str,
    shape: Sequence[int],
) -> list[Node]:
    """Nodes for 'add', 'subtract', 'multiply' or 'divide' of two operands.

    Args:
      operation: one of these.
      operands: two, at least one of them a node.
      name: of the node.
      shape: of the output, without the batch.

    Raises:
      Unknown: a constant is no number for all channels and no vector of one for each.
    """
    left, right = operands
    if isinstance(left, Node) and isinstance(right, Node):
        if operation not in _MERGES:
            raise Unknown(f"there is no integer form of the {operation} of two tensors")
        return [Node.of(_MERGES[operation](), name, (left.name, right.name), shape)]
    source = left if isinstance(left, Node) else right
    assert isinstance(source, Node)
    constant = _per_channel(right if isinstance(left, Node) else left, source)
    one, zero = np.ones_like(constant), np.zeros_like(constant)
    is_first = source is left
    if operation == "divide" and not is_first:
        raise Unknown("there is no integer form of a division by a tensor")
    if operation == "divide":
        if (constant == 0).any():
            raise Unknown("it divides by 0")
        operation, constant = "multiply", 1 / constant
    scale, offset = {
        "add": (one, constant),
        "subtract": (one, -constant) if is_first else (-one, constant),
        "multiply": (constant, zero),
    }[operation]
    return [rescaling_node(name, (source.name,), shape, scale, offset)]


def _per_channel(constant: Any, source: Node) -> np.ndarray:
    """A constant as a number or (channels,)."""
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


def reduction_nodes(
    operation: str,
    source: Node,
    name: str,
    axis: Any,
    keepdims: bool,
) -> list[Node]:
    """Nodes for the 'mean' or 'max' over height and width.

    Raises:
      Unknown: it is over other axes.
    """
    axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    if len(source.shape) != 3 or tuple(sorted(axes)) not in _IMAGE_AXES:
        raise Unknown(
            f"it is over the axes {axis} of {source.shape}; only height and width of "
            "an image have an integer form"
        )
    kinds = {
        "mean": layers.GlobalAveragePooling2D,
        "max": layers.GlobalMaxPooling2D,
    }
    channels = source.shape[-1]
    shape = (1, 1, channels) if keepdims else (channels,)
    layer = kinds[operation](keepdims=keepdims)
    return [Node.of(layer, name, (source.name,), shape)]


def reshape_node(source: Node, name: str, shape: Sequence[int]) -> Node:
    """The same numbers in another shape, without the batch."""
    if math.prod(shape) != math.prod(source.shape):
        raise Unknown(f"it makes {tuple(shape)} of {source.shape}")
    return Node.of(layers.Reshape(tuple(shape)), name, (source.name,), shape)


def concatenate_node(
    sources: Sequence[Node], name: str, axis: int, shape: Sequence[int]
) -> Node:
    """Several outputs side by side along an axis, the batch being axis 0."""
    inputs = [source.name for source in sources]
    return Node.of(layers.Concatenate(axis=axis), name, inputs, shape)


def channels_node(source: Node, name: str, channels: np.ndarray) -> Node:
    """Some channels of an image, in any order: a 1x1 convolution with ones in it."""
    kernel = np.eye(source.shape[-1], dtype=np.float32)[:, channels][None, None]
    return _one_by_one(kernel, name, (source.name,), source.shape)


def picked_channels(node: Node) -> np.ndarray | None:
    """The numbers of the channels that a node gives; None if it does another thing."""
    if node.kind != "Conv2D":
        return None
    kernel, *bias = node.weights
    config = node.config
    is_plain = (
        not bias
        and config["activation"] in (None, "linear")
        and tuple(config["strides"]) == (1, 1)
        and config["groups"] == 1
    )
    if not is_plain or kernel.shape[:2] != (1, 1):
        return None
    channels = kernel[0, 0].argmax(axis=0)
    is_same = np.array_equal(kernel[0, 0], np.eye(kernel.shape[2])[:, channels])
    return channels if is_same else None


def channel_order(node: Node) -> np.ndarray | None:
    """As `picked_channels`, of a node that gives each channel of its input once."""
    channels = picked_channels(node)
    if channels is None or sorted(channels) != list(range(node.weights[0].shape[2])):
        return None
    return channels


def indexed_channels(source: Node, key: Any) -> np.ndarray:
    """The numbers of the channels that `source[key]` gives, the batch being axis 0.

    Raises:
      Unknown: the index is of another axis too, or computed.
    """
    *others, last = key if isinstance(key, (tuple, list)) else (key,)
    is_whole = all(each is Ellipsis or each == slice(None) for each in others)
    is_last = len(others) == 3 or others.count(Ellipsis) == 1
    parts = [last.start, last.stop, last.step] if isinstance(last, slice) else [last]
    is_known = all(part is None or isinstance(part, int) for part in parts)
    if len(source.shape) != 3 or not (is_whole and is_last and is_known):
        raise Unknown(
            f"it takes {key} of {source.shape}; only channels of an image have an "
            "integer form, such as x[..., ::-1]"
        )
    return np.atleast_1d(np.arange(source.shape[-1])[last])


def stack_node(sources: Sequence[Node], name: str, axis: Any) -> Node:
    """Single channels of one image, one behind the other.

    Raises:
      Unknown: it stacks other things.
    """
    inputs = sources[0].inputs
    if axis not in (-1, 3) or any(
        picked_channels(source) is None or source.inputs != inputs for source in sources
    ):
        raise Unknown("only a stack of channels of one image has an integer form")
    kernel = np.concatenate([source.weights[0] for source in sources], axis=-1)
    return _one_by_one(kernel, name, inputs, sources[0].shape)


def _one_by_one(
    kernel: np.ndarray, name: str, inputs: Sequence[str], shape: Sequence[int]
) -> Node:
    channels = kernel.shape[-1]
    layer = layers.Conv2D(channels, 1, use_bias=False)
    return Node.of(layer, name, inputs, (*shape[:-1], channels), [kernel])


def nodes_or_unsupported(make: Callable[[], T], name: str, kind: str) -> T:
    """What `make` gives; Unknown becomes the error that names the layer."""
    try:
        return make()
    except Unknown as error:
        problem = LayerProblem(name, kind, str(error))
        raise UnsupportedLayerError.of([problem]) from error


def operation_nodes(
    operation: str,
    operands: Sequence[Operand],
    settings: Mapping[str, Any],
    name: str,
    shape: Sequence[int],
    taken: Collection[str],
) -> list[Node]:
    """Nodes of one operation that a model calls as a function.

    Args:
      operation: 'add', 'subtract', 'multiply', 'divide', 'negative', 'mean', 'max',
        'concatenate', 'stack', 'channels', 'reshape', 'clip', 'identity', or an
        activation.
      operands: nodes and constants.
      settings: 'axis' and 'keepdims', 'low' and 'top', or 'key', of those that have
        them.
      name: of the last node.
      shape: of the output, without the batch.
      taken: names that are not free.

    Raises:
      Unknown: there are no nodes for it.
    """
    if operation in ARITHMETIC:
        return arithmetic_nodes(operation, operands, name, shape)
    sources = [operand for operand in operands if isinstance(operand, Node)]
    first = sources[0]
    if operation == "negative":
        return [rescaling_node(name, (first.name,), shape, -1.0, 0.0)]
    if operation in ("mean", "max"):
        axis, keepdims = settings.get("axis"), bool(settings.get("keepdims"))
        return reduction_nodes(operation, first, name, axis, keepdims)
    if operation == "concatenate":
        return [concatenate_node(sources, name, settings.get("axis", -1), shape)]
    if operation == "stack":
        return [stack_node(sources, name, settings.get("axis"))]
    if operation == "channels":
        channels = indexed_channels(first, settings["key"])
        return [channels_node(first, name, channels)]
    if operation == "reshape":
        return [reshape_node(first, name, shape)]
    if operation == "clip":
        low, top = settings.get("low"), settings.get("top")
        if low != 0 or top is None or top <= 0:
            raise Unknown(f"it clips to {low} .. {top}; only 0 .. x can be")
        return [relu_node(name, (first.name,), shape, float(top))]
    if operation == "identity":
        return activation_nodes("linear", first, name, taken)
    return activation_nodes(operation, first, name, taken)
