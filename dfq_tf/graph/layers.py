"""The table of layers: what each kind of node means, in float and in integers.

Whoever wants to know something of a layer asks `KINDS`: its shape, its float function,
who shares its integer grid, its TFLite operator, what it costs, why it may be refused.
What Keras calls a kind stands in `importing.keras_names`; how an operator with options
is encoded, in `tflite.operators`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.errors import LayerProblem
from dfq_tf.graph.nodes import Graph, Node, Shape, frozen

Weights = Mapping[str, Any]
REQUIRED = object()
# The kinds that make one position of an image.
GLOBAL_POOLS = ("global_average_pool", "global_max_pool")


class Exactly(NamedTuple):
    """The range that an operator asks for."""

    low: float
    high: float


class NoFurther(NamedTuple):
    """Where the range of an operator's output ends at the latest."""

    high: float


Bounds = Exactly | NoFurther | None


def _never(node: Node) -> bool:
    return False


def _always(node: Node) -> bool:
    return True


def _shape_of_first(node: Node, shapes: Sequence[Shape]) -> Shape:
    return shapes[0]


def _no_bounds(node: Node, num_bits: int) -> Bounds:
    return None


def _no_macs(node: Node) -> int:
    return 0


def _no_reason(node: Node) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a kind of node is.

    Attributes:
      says: its formula or meaning, one line.
      compute: (node, inputs, weights) -> output: its float meaning in TensorFlow, in
        the type of its inputs, differentiable. Inputs have the batch as first axis.
      settings: name -> default; REQUIRED has none.
      weights: roles, in order; a 'bias' may be left out.
      shape: (node, shapes of its inputs) -> shape of its output, without the batch.
      grid: 'own': it computes new values, in a grid of their own. 'shared': it moves,
        picks or averages integers and cannot rescale, so it has its inputs' grid.
      bounds: (node, bits of its output) -> what its operator demands of its range.
      kernel_inputs: axis of the kernel that is the input's channels; None without.
      kernel_outputs: how many trailing axes of the kernel are the output's channels;
        0 without a kernel.
      takes_in_relu: whether its operator ends in a ReLU, if one alone reads it.
      homogeneous: (node) -> whether f(s x) = s f(x) for a factor s > 0 per channel.
      operator: its TFLite operator; '' for a kind that no file has. LOOKUP is a table
        of 256 entries, exact for any function of one value at 8 bits.
      macs: (node) -> multiply-accumulates for one image.
      refuses: (node) -> why no integer file can have it, or None.
    """

    says: str
    compute: Callable[[Node, Sequence[Any], Weights], Any]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=frozen)
    weights: tuple[str, ...] = ()
    shape: Callable[[Node, Sequence[Shape]], Shape] = _shape_of_first
    grid: str = "own"
    bounds: Callable[[Node, int], Bounds] = _no_bounds
    kernel_inputs: int | None = None
    kernel_outputs: int = 0
    takes_in_relu: bool = False
    homogeneous: Callable[[Node], bool] = _never
    operator: str = "LOOKUP"
    macs: Callable[[Node], int] = _no_macs
    refuses: Callable[[Node], str | None] = _no_reason


# Shapes.


def _windows(size: int | None, window: int, stride: int, padding: str) -> int | None:
    """How many windows fit along an axis."""
    if size is None:
        return None
    if padding == "same":
        return -(-size // stride)
    return (size - window) // stride + 1


def _window_shape(node: Node, shape: Shape, window: Sequence[int]) -> Shape:
    strides, padding = node.settings["strides"], node.settings["padding"]
    sides = zip(shape[:2], window, strides)
    return tuple(_windows(*side, padding) for side in sides)


def _conv_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    kernel = node.weights["kernel"].shape
    dilated = [(k - 1) * d + 1 for k, d in zip(kernel, node.settings["dilation"])]
    channels = math.prod(kernel[-KINDS[node.kind].kernel_outputs :])
    return (*_window_shape(node, shapes[0], dilated), channels)


def _dense_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    return (*shapes[0][:-1], node.weights["kernel"].shape[-1])


def _pool_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    return (*_window_shape(node, shapes[0], node.settings["size"]), shapes[0][-1])


def _global_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    channels = shapes[0][-1]
    return (1, 1, channels) if node.settings["keepdims"] else (channels,)


def _merged_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    """Axes of length 1 are repeated; a vector is an image of one pixel to an image."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(
        next((size for size in sizes if size != 1), 1) for sizes in zip(*padded)
    )


def _concatenated_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    axis = concatenation_axis(node.settings["axis"], len(shapes[0]))
    sizes = [shape[axis] for shape in shapes]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])


def concatenation_axis(axis: int, rank: int) -> int:
    """The axis of a shape without the batch, of one that counts the batch as 0."""
    return axis % (rank + 1) - 1


def _reshaped(node: Node, shapes: Sequence[Shape]) -> Shape:
    target = node.settings["shape"]
    if -1 not in target:
        return tuple(target)
    if None in shapes[0]:
        return tuple(None if size == -1 else size for size in target)
    known = math.prod(size for size in target if size != -1)
    rest = math.prod(shapes[0]) // known  # type: ignore[arg-type]
    return tuple(rest if size == -1 else size for size in target)


def _padded_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    sides = zip(shapes[0][:2], node.settings["margins"])
    padded = (None if side is None else side + sum(m) for side, m in sides)
    return (*padded, shapes[0][-1])


def _cropped_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    sides = zip(shapes[0][:2], node.settings["margins"])
    cropped = (None if side is None else side - sum(m) for side, m in sides)
    return (*cropped, shapes[0][-1])


def _upsampled_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    sides = zip(shapes[0][:2], node.settings["size"])
    larger = (None if side is None else side * factor for side, factor in sides)
    return (*larger, shapes[0][-1])


def _transposed_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    return tuple(shapes[0][axis - 1] for axis in node.settings["order"])


def _conv_transpose_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    strides, surplus = node.settings["strides"], _surplus(node)
    sides = zip(shapes[0][:2], strides, surplus)
    larger = (None if n is None else n * stride + more for n, stride, more in sides)
    return (*larger, node.weights["kernel"].shape[-1])


def _surplus(node: Node) -> tuple[int, ...]:
    """By how much a transposed convolution gives more than stride times its input."""
    if node.settings["padding"] == "same":
        return (0, 0)
    sides = zip(node.weights["kernel"].shape, node.settings["strides"])
    return tuple(max(window - stride, 0) for window, stride in sides)


def _blocks_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    (*sides, channels), block = shapes[0], node.settings["block"]
    larger = (None if side is None else side * block for side in sides)
    return (*larger, None if channels is None else channels // block**2)


def _picked_shape(node: Node, shapes: Sequence[Shape]) -> Shape:
    return (*shapes[0][:-1], len(node.settings["order"]))


# Float meanings.


def _first(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return inputs[0]


def _with_bias(values: Any, weights: Weights) -> Any:
    return tf.nn.bias_add(values, weights["bias"]) if "bias" in weights else values


def _conv(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    settings, (values,) = node.settings, inputs
    strides, dilation = tuple(settings["strides"]), tuple(settings["dilation"])
    if tuple(weights["kernel"].shape[:2]) == (1, 1) and strides != (1, 1):
        # The same values. With strides, the gradient of a kernel of few channels writes
        # past its memory in oneDNN (TensorFlow 2.21), and the program ends.
        values, strides = values[:, :: strides[0], :: strides[1]], (1, 1)
    convolve = _grouped_conv2d if settings["groups"] > 1 else _conv2d
    function = convolve(strides, settings["padding"].upper(), dilation)
    return _with_bias(function(values, weights["kernel"]), weights)


def _conv2d(strides: Sequence[int], padding: str, dilations: Sequence[int]) -> Any:
    return functools.partial(
        tf.nn.conv2d, strides=strides, padding=padding, dilations=dilations
    )


@functools.cache  # each new function would be compiled anew
def _grouped_conv2d(
    strides: Sequence[int], padding: str, dilations: Sequence[int]
) -> Any:
    """TensorFlow has kernels of grouped convolutions on GPUs only, and in XLA."""
    function = _conv2d(strides, padding, dilations)
    return tf.function(function, jit_compile=True, autograph=False)


def _depthwise_conv(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    strides, dilation = node.settings["strides"], node.settings["dilation"]
    padding, kernel = node.settings["padding"].upper(), weights["kernel"]
    if len(set(strides)) > 1 or max(strides) > 1 and max(dilation) > 1:
        # TensorFlow's kernels of depthwise convolutions have neither.
        kernel = tf.reshape(kernel, (*kernel.shape[:2], 1, -1))
        values = _grouped_conv2d(strides, padding, dilation)(inputs[0], kernel)
    else:
        values = tf.nn.depthwise_conv2d(
            inputs[0], kernel, (1, *strides, 1), padding, dilations=dilation
        )
    return _with_bias(values, weights)


def _dense(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    if values.shape.rank == 2:
        return _with_bias(tf.matmul(values, weights["kernel"]), weights)
    product = tf.tensordot(values, weights["kernel"], [[values.shape.rank - 1], [0]])
    return _with_bias(product, weights)


def _batch_normalization(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    roles = ("gamma", "beta", "mean", "variance")
    # Statistics stay float32 whatever the values are.
    gamma, beta, mean, variance = (tf.cast(weights[r], tf.float32) for r in roles)
    epsilon = node.settings["epsilon"]
    if values.shape.rank == 4:
        return tf.raw_ops.FusedBatchNormV3(
            x=values,
            scale=gamma,
            offset=beta,
            mean=mean,
            variance=variance,
            epsilon=epsilon,
            is_training=False,
        ).y
    normalized = tf.nn.batch_normalization(
        tf.cast(values, tf.float32), mean, variance, beta, gamma, epsilon
    )
    return tf.cast(normalized, values.dtype)


def _layer_normalization(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    # As with batch normalization, statistics stay float32.
    values = tf.cast(inputs[0], tf.float32)
    if node.settings["is_centered"]:
        values -= tf.reduce_mean(values, axis=-1, keepdims=True)
    square = tf.reduce_mean(tf.square(values), axis=-1, keepdims=True)
    return tf.cast(
        values * tf.math.rsqrt(square + node.settings["epsilon"]), inputs[0].dtype
    )


def _affine(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    scale, offset = (
        tf.constant(node.settings[name], values.dtype) for name in ("scale", "offset")
    )
    return values * scale + offset


def _relu(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    top = node.settings["top"]
    if top == 6:
        return tf.nn.relu6(inputs[0])
    values = tf.nn.relu(inputs[0])
    return values if top is None else tf.minimum(values, tf.cast(top, values.dtype))


def _unfused(values: Any) -> Any:
    """Values that TensorFlow's optimizer does not take into the operation behind.

    It makes one operation of a convolution, batch normalisation and tanh, and of a
    convolution, swish and a leaky ReLU, which then has no kernel on CPUs; and one of a
    convolution, a bias, a sum and a leaky ReLU, which has lost the slope.
    """
    return tf.ensure_shape(values, values.shape)


def _leaky_relu(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.nn.leaky_relu(_unfused(inputs[0]), node.settings["slope"])


def _gelu(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    """The share exactly, or by a tanh (Hendrycks & Gimpel 2016)."""
    return tf.nn.gelu(inputs[0], approximate=node.settings["approximate"])


def _of_one(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """The meaning of a kind that is a function of each value."""
    return lambda node, inputs, weights: function(inputs[0])


def _elu(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    slope = tf.cast(node.settings["slope"], inputs[0].dtype)
    return tf.where(inputs[0] > 0, inputs[0], slope * tf.nn.elu(inputs[0]))


def _tanh(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.nn.tanh(_unfused(inputs[0]))


def _merge(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The meaning of a kind of two inputs, of which a vector meets each pixel."""

    def compute(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
        rank = max(values.shape.rank for values in inputs)
        padded = []
        for values in inputs:
            while values.shape.rank < rank:
                values = tf.expand_dims(values, 1)
            padded.append(values)
        return function(*padded)

    return compute


def _concatenate(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.concat(inputs, axis=node.settings["axis"])


def _max_pool(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    size, strides, padding = (node.settings[k] for k in ("size", "strides", "padding"))
    return tf.nn.max_pool2d(inputs[0], size, strides, padding.upper())


def _average_pool(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    size, strides, padding = (node.settings[k] for k in ("size", "strides", "padding"))
    return tf.nn.avg_pool2d(inputs[0], size, strides, padding.upper())


def _global_average_pool(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.reduce_mean(inputs[0], [1, 2], keepdims=node.settings["keepdims"])


def _global_max_pool(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.reduce_max(inputs[0], [1, 2], keepdims=node.settings["keepdims"])


def _channel_max(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.reduce_max(inputs[0], axis=-1, keepdims=True)


def _reshape(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    sizes = [-1 if size is None else size for size in node.shape]
    return tf.reshape(inputs[0], (tf.shape(inputs[0])[0], *sizes))


def _pad(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.pad(inputs[0], [(0, 0), *node.settings["margins"], (0, 0)])


def _crop(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    (top, bottom), (left, right) = node.settings["margins"]
    return values[:, top : -bottom or None, left : -right or None]


def _sides(images: Any) -> list[Any]:
    """Height and width, numbers where they are known."""
    return [images.shape[axis] or tf.shape(images)[axis] for axis in (1, 2)]


def _nearest_upsampling(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    rows, columns = node.settings["size"]
    return tf.repeat(tf.repeat(inputs[0], rows, axis=1), columns, axis=2)


def _bilinear_upsampling(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    size = [n * factor for n, factor in zip(_sides(values), node.settings["size"])]
    return tf.cast(tf.image.resize(values, size), values.dtype)


def _transpose(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.transpose(inputs[0], (0, *node.settings["order"]))


def _prelu(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,) = inputs
    slopes = tf.constant(node.settings["slopes"], values.dtype)
    return tf.where(values > 0, values, slopes * values)


def _conv_transpose(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    (values,), strides = inputs, node.settings["strides"]
    batch, outputs = tf.shape(values)[0], weights["kernel"].shape[-1]
    all_sides = zip(_sides(values), strides, _surplus(node))
    sides = [n * stride + more for n, stride, more in all_sides]
    larger = tf.nn.conv2d_transpose(
        values,
        tf.transpose(weights["kernel"], (0, 1, 3, 2)),
        tf.stack([batch, *sides, outputs]),
        strides,
        node.settings["padding"].upper(),
    )
    return _with_bias(larger, weights)


def _depth_to_space(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.nn.depth_to_space(inputs[0], node.settings["block"])


def _channels(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    return tf.gather(inputs[0], node.settings["order"], axis=-1)


def _unknown(node: Node, inputs: Sequence[Any], weights: Weights) -> Any:
    raise ValueError(f"{node.name} cannot be computed: {node.settings['reason']}")


# Ranges, factors, costs and refusals.


def _relu_bounds(node: Node, num_bits: int) -> Bounds:
    """A top that no operator has is where the range, and so the integers, end."""
    top = node.settings["top"]
    return None if top in (None, 6) else NoFurther(top)


def _curve_bounds(low: float, high: float) -> Callable[[Node, int], Bounds]:
    """LiteRT's curves ask for all integers: these bounds at 8 bits, +-1 at 16."""
    return lambda node, num_bits: (
        Exactly(-32767 / 32768, 32767 / 32768) if num_bits > 8 else Exactly(low, high)
    )


def _pixel_bounds(node: Node, num_bits: int) -> Bounds:
    low, high = node.settings["low"], node.settings["high"]
    widest = max(abs(low), abs(high))  # ranges of 16 bits are symmetric
    return Exactly(-widest, widest) if num_bits > 8 else Exactly(low, high)


def _is_without_top(node: Node) -> bool:
    return node.settings["top"] is None


def _kernel_macs(node: Node) -> int:
    """Each value of an output takes one column of the kernel."""
    places = math.prod(size or 1 for size in node.shape[:-1])
    return places * node.weights["kernel"].size


def _conv_transpose_macs(node: Node) -> int:
    """Each value of the input is multiplied by a row of the kernel."""
    sides = zip(node.shape, _surplus(node), node.settings["strides"])
    places = math.prod(
        1 if side is None else (side - more) // stride for side, more, stride in sides
    )
    return places * node.weights["kernel"].size


def _conv_transpose_reason(node: Node) -> str | None:
    strides = node.settings["strides"]
    if len(set(strides)) == 1:
        return None
    return (
        f"it has the strides {strides}; only one stride for both axes has an integer "
        "form for any batch"
    )


def _nearest_reason(node: Node) -> str | None:
    if max(node.settings["size"]) <= _MOST_REPEATED:
        return None
    return (
        f"it repeats pixels {node.settings['size']} times; LiteRT finds the right one "
        f"up to {_MOST_REPEATED} times"
    )


def _bilinear_reason(node: Node) -> str | None:
    size = node.settings["size"]
    if all(factor & (factor - 1) == 0 for factor in size):
        return None
    return (
        f"it makes images {size} times as large between pixels; LiteRT has positions "
        "in 1024ths of a pixel, so that only powers of two are exact. Take them, or "
        "interpolation='nearest'"
    )


def _dense_reason(node: Node) -> str | None:
    if len(node.shape) in (1, 3):
        return None
    shape = (*node.shape[:-1], len(node.weights["kernel"]))
    return (
        f"it has an input of shape {shape}; only vectors and images can be quantized, "
        "put a Flatten before it"
    )


def _affine_reason(node: Node) -> str | None:
    return (
        f"it has an input of shape {node.shape}; only images and vectors can be "
        "quantized"
    )


def _layer_normalization_reason(node: Node) -> str | None:
    length = node.shape[-1] or 0
    if length <= LONGEST_ROW:
        return None
    return (
        f"it normalizes {length:,} values at a time, whose squares have sums of more "
        f"than 32 bits; up to {LONGEST_ROW:,} have an integer form"
    )


def _unfolded(what: str) -> Callable[[Node], str | None]:
    return lambda node: what


# LiteRT divides by a factor in float32, which is exact for all sizes up to this one.
_MOST_REPEATED = 40
# The squares of so many distances of int8 have a sum of 32 bits.
LONGEST_ROW = (2**31 - 1) // 255**2
_WINDOW = {"strides": (1, 1), "padding": "valid", "dilation": (1, 1)}
_POOL = {"size": REQUIRED, "strides": REQUIRED, "padding": "valid"}

KINDS: dict[str, Kind] = {
    "image": Kind(
        says="the image that the network is fed, normalised",
        compute=_first,
        operator="",
    ),
    "pixels": Kind(
        says="the quantization of the pixels: low and high are what 0 and 255 become",
        compute=_first,
        settings={"low": REQUIRED, "high": REQUIRED},
        bounds=_pixel_bounds,
        operator="QUANTIZE",
    ),
    "conv": Kind(
        says="convolution, kernel (height, width, inputs / groups, outputs)",
        compute=_conv,
        settings={**_WINDOW, "groups": 1},
        weights=("kernel", "bias"),
        shape=_conv_shape,
        kernel_inputs=2,
        kernel_outputs=1,
        takes_in_relu=True,
        operator="CONV_2D",
        macs=_kernel_macs,
    ),
    "depthwise_conv": Kind(
        says="each channel by kernels of its own, (height, width, inputs, multiplier)",
        compute=_depthwise_conv,
        settings=_WINDOW,
        weights=("kernel", "bias"),
        shape=_conv_shape,
        kernel_inputs=2,
        kernel_outputs=2,
        takes_in_relu=True,
        operator="DEPTHWISE_CONV_2D",
        macs=_kernel_macs,
    ),
    "conv_transpose": Kind(
        says="transposed convolution, kernel (height, width, inputs, outputs)",
        compute=_conv_transpose,
        settings={"strides": (1, 1), "padding": "valid"},
        weights=("kernel", "bias"),
        shape=_conv_transpose_shape,
        kernel_inputs=2,
        kernel_outputs=1,
        operator="",
        macs=_conv_transpose_macs,
        refuses=_conv_transpose_reason,
    ),
    "dense": Kind(
        says="x kernel + bias, kernel (inputs, outputs), for each pixel of an image",
        compute=_dense,
        weights=("kernel", "bias"),
        shape=_dense_shape,
        kernel_inputs=0,
        kernel_outputs=1,
        takes_in_relu=True,
        operator="FULLY_CONNECTED",
        macs=_kernel_macs,
        refuses=_dense_reason,
    ),
    "batch_normalization": Kind(
        says="gamma (x - mean) / sqrt(variance + epsilon) + beta, for each channel",
        compute=_batch_normalization,
        settings={"epsilon": REQUIRED},
        weights=("gamma", "beta", "mean", "variance"),
        operator="",
        refuses=_affine_reason,
    ),
    "layer_normalization": Kind(
        says="(x - mean) / sqrt(variance + epsilon), of the last axis; not centered, "
        "x / sqrt(mean of x^2 + epsilon)",
        compute=_layer_normalization,
        settings={"epsilon": REQUIRED, "is_centered": True},
        operator="NORMALIZE",
        refuses=_layer_normalization_reason,
    ),
    "affine": Kind(
        says="scale x + offset, each a number or one for each channel",
        compute=_affine,
        settings={"scale": REQUIRED, "offset": REQUIRED},
        operator="",
        refuses=_affine_reason,
    ),
    "relu": Kind(
        says="max(0, x), and min(top, .) if there is a top",
        compute=_relu,
        settings={"top": None},
        bounds=_relu_bounds,
        homogeneous=_is_without_top,
        operator="RELU",
    ),
    "leaky_relu": Kind(
        says="x, and slope x below 0",
        compute=_leaky_relu,
        settings={"slope": REQUIRED},
        homogeneous=_always,
        operator="LEAKY_RELU",
    ),
    "prelu": Kind(
        says="x, and below 0 x times a slope of its channel",
        compute=_prelu,
        settings={"slopes": REQUIRED},
        homogeneous=_always,
        operator="PRELU",
    ),
    "sigmoid": Kind(
        says="1 / (1 + exp(-x))",
        compute=_of_one(tf.nn.sigmoid),
        bounds=_curve_bounds(0.0, 255 / 256),
        operator="LOGISTIC",
    ),
    "tanh": Kind(
        says="tanh(x)",
        compute=_tanh,
        bounds=_curve_bounds(-1.0, 127 / 128),
        operator="TANH",
    ),
    "softplus": Kind(
        says="log(1 + exp(x))",
        compute=_of_one(tf.math.softplus),
    ),
    "elu": Kind(
        says="x, and slope (exp(x) - 1) below 0",
        compute=_elu,
        settings={"slope": 1.0},
    ),
    "selu": Kind(
        says="1.0507 x, and 1.7581 (exp(x) - 1) below 0 (Klambauer et al. 2017)",
        compute=_of_one(tf.nn.selu),
    ),
    "gelu": Kind(
        says="x times the share of a normal distribution that lies below x",
        compute=_gelu,
        settings={"approximate": False},
    ),
    "mish": Kind(
        says="x tanh(log(1 + exp(x)))",
        compute=_of_one(lambda x: x * tf.tanh(tf.math.softplus(x))),
    ),
    "exponential": Kind(
        says="exp(x)",
        compute=_of_one(tf.exp),
    ),
    "softmax": Kind(
        says="exp(x) / sum exp(x), over the last axis",
        compute=_of_one(tf.nn.softmax),
        operator="",
        refuses=_unfolded("a softmax that is not at the network's end is not known"),
    ),
    "add": Kind(
        says="x + y",
        compute=_merge(tf.add),
        shape=_merged_shape,
        takes_in_relu=True,
        operator="ADD",
    ),
    "subtract": Kind(
        says="x - y",
        compute=_merge(tf.subtract),
        shape=_merged_shape,
        takes_in_relu=True,
        operator="SUB",
    ),
    "multiply": Kind(
        says="x y",
        compute=_merge(tf.multiply),
        shape=_merged_shape,
        takes_in_relu=True,
        operator="MUL",
    ),
    "maximum": Kind(
        says="the larger one of x and y",
        compute=_merge(tf.maximum),
        shape=_merged_shape,
        grid="shared",
        operator="MAXIMUM",
    ),
    "minimum": Kind(
        says="the smaller one of x and y",
        compute=_merge(tf.minimum),
        shape=_merged_shape,
        grid="shared",
        operator="MINIMUM",
    ),
    "concatenate": Kind(
        says="inputs side by side along an axis, the batch being axis 0",
        compute=_concatenate,
        settings={"axis": -1},
        shape=_concatenated_shape,
        grid="shared",
        operator="CONCATENATION",
    ),
    "max_pool": Kind(
        says="the largest value of each window, for each channel",
        compute=_max_pool,
        settings=_POOL,
        shape=_pool_shape,
        grid="shared",
        homogeneous=_always,
        operator="MAX_POOL_2D",
    ),
    "average_pool": Kind(
        says="the mean of each window, for each channel",
        compute=_average_pool,
        settings=_POOL,
        shape=_pool_shape,
        grid="shared",
        homogeneous=_always,
        operator="AVERAGE_POOL_2D",
    ),
    "global_average_pool": Kind(
        says="the mean over height and width, for each channel",
        compute=_global_average_pool,
        settings={"keepdims": False},
        shape=_global_shape,
        homogeneous=_always,
        operator="MEAN",
    ),
    "global_max_pool": Kind(
        says="the largest value over height and width, for each channel",
        compute=_global_max_pool,
        settings={"keepdims": False},
        shape=_global_shape,
        grid="shared",
        homogeneous=_always,
        operator="REDUCE_MAX",
    ),
    "channel_max": Kind(
        says="the largest value of all channels, for each position",
        compute=_channel_max,
        shape=lambda node, shapes: (*shapes[0][:-1], 1),
        grid="shared",
        operator="REDUCE_MAX",
    ),
    "reshape": Kind(
        says="the same numbers in another shape; a size of -1 is the rest",
        compute=_reshape,
        settings={"shape": REQUIRED},
        shape=_reshaped,
        grid="shared",
        homogeneous=_always,  # where the last axis keeps its length, see equalization
        operator="RESHAPE",
    ),
    "pad": Kind(
        says="rows and columns of zeros: margins ((top, bottom), (left, right))",
        compute=_pad,
        settings={"margins": REQUIRED},
        shape=_padded_shape,
        grid="shared",
        homogeneous=_always,
        operator="PAD",
    ),
    "crop": Kind(
        says="without rows and columns: margins ((top, bottom), (left, right))",
        compute=_crop,
        settings={"margins": REQUIRED},
        shape=_cropped_shape,
        grid="shared",
        homogeneous=_always,
        operator="STRIDED_SLICE",
    ),
    "nearest_upsampling": Kind(
        says="each pixel several times: size (rows, columns)",
        compute=_nearest_upsampling,
        settings={"size": REQUIRED},
        shape=_upsampled_shape,
        grid="shared",
        homogeneous=_always,
        operator="RESIZE_NEAREST_NEIGHBOR",
        refuses=_nearest_reason,
    ),
    "bilinear_upsampling": Kind(
        says="size times as many pixels, those between others in proportion to both",
        compute=_bilinear_upsampling,
        settings={"size": REQUIRED},
        shape=_upsampled_shape,
        grid="shared",
        homogeneous=_always,
        operator="RESIZE_BILINEAR",
        refuses=_bilinear_reason,
    ),
    "transpose": Kind(
        says="axes in another order: of the input's, which count from 1",
        compute=_transpose,
        settings={"order": REQUIRED},
        shape=_transposed_shape,
        grid="shared",
        operator="TRANSPOSE",
    ),
    "depth_to_space": Kind(
        says="each pixel's channels as a block of pixels, of block x block",
        compute=_depth_to_space,
        settings={"block": REQUIRED},
        shape=_blocks_shape,
        grid="shared",
        operator="DEPTH_TO_SPACE",
    ),
    "channels": Kind(
        says="some channels of an image, in any order",
        compute=_channels,
        settings={"order": REQUIRED},
        shape=_picked_shape,
        operator="",
        refuses=_unfolded("its channels cannot be reordered here"),
    ),
    "requantize": Kind(
        says="the same values in another grid",
        compute=_first,
        operator="MUL",
    ),
    "unknown": Kind(
        says="a layer that is not known: 'layer_kind' is its class",
        compute=_unknown,
        settings={"reason": REQUIRED, "layer_kind": REQUIRED},
        shape=lambda node, shapes: node.shape,
        operator="",
        refuses=lambda node: node.settings["reason"],
    ),
}


def macs_of(nodes: Iterable[Node]) -> int:
    """Multiply-accumulates of nodes, for one image."""
    return sum(KINDS[node.kind].macs(node) for node in nodes)


def is_order(node: Node, channels: int | None) -> bool:
    """Whether a node gives each channel of its input once, in some order."""
    is_choice = node.kind == "channels"
    return is_choice and sorted(node.settings["order"]) == list(range(channels or 0))


def node(
    kind: str,
    name: str,
    sources: Sequence[Node],
    settings: Mapping[str, Any] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    layers: Collection[str] = (),
) -> Node:
    """Makes a node of the table: the only way to one, besides `image` and `unknown`.

    Args:
      kind: a key of KINDS.
      name: of the node.
      sources: the nodes that it reads, in order.
      settings: those that differ from the kind's defaults.
      weights: by role; they become float32.
      layers: the user's layers that it stands for.

    Raises:
      ValueError: the kind has no such setting or weight, or needs one that is missing.
    """
    entry, given = KINDS[kind], {**KINDS[kind].settings, **(settings or {})}
    arrays = {
        role: np.asarray(value, np.float32) for role, value in (weights or {}).items()
    }
    missing = {k for k, v in given.items() if v is REQUIRED}
    missing |= {*entry.weights} - {"bias"} - arrays.keys()
    roles = {*entry.weights}
    further = (given.keys() - entry.settings.keys()) | (arrays.keys() - roles)
    if missing or further:
        raise ValueError(f"{kind} {name} lacks {missing}, and has no {further}")
    made = Node(
        name,
        kind,
        tuple(source.name for source in sources),
        (),
        frozen(given),
        frozen(arrays),
        tuple(layers),
    )
    return _with_shape(made, [source.shape for source in sources])


def image(name: str, shape: Shape, layers: Collection[str] = ()) -> Node:
    """The first node of a graph."""
    return Node(name, "image", (), tuple(shape), layers=tuple(layers))


def unknown(
    name: str, sources: Sequence[Node], shape: Shape, layer_kind: str, reason: str
) -> Node:
    """A node that stands for a layer of which no node can be made."""
    settings = frozen({"reason": reason, "layer_kind": layer_kind})
    inputs = tuple(source.name for source in sources)
    return Node(name, "unknown", inputs, tuple(shape), settings, layers=(name,))


def _with_shape(node: Node, shapes: Sequence[Shape]) -> Node:
    return dataclasses.replace(node, shape=KINDS[node.kind].shape(node, shapes))


def resized(graph: Graph, image_shape: Shape) -> Graph:
    """The graph for images of another shape: all shapes are found anew."""
    nodes: dict[str, Node] = {}
    for name, each in graph.nodes.items():
        if not each.inputs:
            nodes[name] = dataclasses.replace(each, shape=tuple(image_shape))
        else:
            nodes[name] = _with_shape(each, [nodes[n].shape for n in each.inputs])
    return Graph(nodes.values(), graph.output)


def has_kernel(node: Node) -> bool:
    """Whether the node has a kernel, which is quantized."""
    return KINDS[node.kind].kernel_outputs > 0


def reads_all_channels(node: Node) -> bool:
    """Whether an axis of the node's kernel is all the channels of its input."""
    has_axis = KINDS[node.kind].kernel_inputs is not None
    return has_axis and node.settings.get("groups", 1) == 1


def along_inputs(node: Node, factors: np.ndarray) -> np.ndarray:
    """Factors of the channels of a node's input, in a shape to multiply its kernel."""
    trailing = node.weights["kernel"].ndim - 1 - (KINDS[node.kind].kernel_inputs or 0)
    return factors.reshape((-1,) + (1,) * trailing)


def by_output(node: Node, kernel: np.ndarray) -> np.ndarray:
    """A kernel as a matrix, (weights of one output, outputs)."""
    outputs = math.prod(kernel.shape[-KINDS[node.kind].kernel_outputs :])
    return kernel.reshape(-1, outputs)


def title(node: Node) -> str:
    """What messages and tables call the node's kind."""
    return node.settings["layer_kind"] if node.kind == "unknown" else node.kind


def layer_of(node: Node) -> str:
    """The name of the user's layer that the node stands for."""
    return node.layers[0] if node.layers else node.name


def problem(node: Node, reason: str) -> LayerProblem:
    """Why a node has no integer form, under the name of the user's layer."""
    return LayerProblem(layer_of(node), title(node), reason)
