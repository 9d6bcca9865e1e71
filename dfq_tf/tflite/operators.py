"""How each TFLite operator is written: its further inputs, options and version.

Operators without options and constants need no entry in the table: LOGISTIC and TANH
have none. LOOKUP, LOOKUP_OF_INT8, NORMALIZE, POINTWISE, RELU_IN_MUL and
TRANSPOSE_OF_FOUR are no operators of TFLite, but others or several.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.compat import tf
from dfq_tf.errors import ExportError
from dfq_tf.graph import (
    KINDS,
    Node,
    concatenation_axis,
    frozen,
    title,
)
from dfq_tf.quantization import Grid, slope_integers
from dfq_tf.tflite import normalization, targets
from dfq_tf.tflite.flatbuffer import TYPES, File, Tensor
from dfq_tf.tflite.forms import DENSE, Form, Integers, unfolding_margins

# The oldest version of each operator that has int8, and int16, activations. That of
# FULLY_CONNECTED would be 4, but runtimes before TensorFlow 2.10 take its scales per
# channel for 0, without a word. None of them knows version 10: they refuse the file.
_VERSIONS = {
    "ADD": (2, 3),
    "AVERAGE_POOL_2D": (2, 3),
    "CAST": (1, 1),
    "CONCATENATION": (2, 3),
    "CONV_2D": (3, 4),
    "DEPTHWISE_CONV_2D": (3, 5),
    "DEPTH_TO_SPACE": (2, 2),
    "DEQUANTIZE": (2, 3),
    "FULLY_CONNECTED": (10, 10),
    "GATHER": (2, 4),
    "LEAKY_RELU": (2, 2),
    "LOGISTIC": (2, 3),
    "MAXIMUM": (2, 4),
    "MAX_POOL_2D": (2, 3),
    "MEAN": (2, 3),
    "MINIMUM": (2, 4),
    "MUL": (2, 4),
    "PAD": (2, 3),
    "PRELU": (1, 1),
    "QUANTIZE": (2, 2),
    "REDUCE_MAX": (2, 3),
    "RELU": (2, 3),
    "RELU6": (2, 3),
    "RESHAPE": (1, 1),
    "RESIZE_BILINEAR": (3, 4),
    "RESIZE_NEAREST_NEIGHBOR": (2, 4),
    "SOFTMAX": (2, 3),
    "STRIDED_SLICE": (2, 4),
    "SUB": (2, 5),
    "TANH": (2, 3),
    "TRANSPOSE": (2, 5),
}
# The same with a kernel of 4 or 2 bits.
_NARROW_VERSIONS = {
    4: {
        "CONV_2D": (7, 7),
        "DEPTHWISE_CONV_2D": (7, 7),
        "FULLY_CONNECTED": (10, 13),
    },
    2: {"FULLY_CONNECTED": (14, 14)},
}
# XNNPACK puts no more tensors side by side at a time.
_MOST_CONCATENATED = 5
# Of the 64 bits of a bias beside int16 activations, LiteRT takes 48.
_BIAS_BITS = {False: 32, True: 48}


@dataclasses.dataclass(frozen=True)
class Operation:
    """A node whose operator is to be written.

    Attributes:
      file: gets the operator and its constants.
      network: has the integers.
      node: what is written.
      sources: the tensors that it reads, in order.
      output: the tensor that it fills.
      activation: 'NONE', or what the operator ends in, 'RELU' or 'RELU6'.
      instead: operator of the node's kind -> what is written in its place.
      form: of the node's kernel; None where it has none.
    """

    file: File
    network: Integers
    node: Node
    sources: Sequence[Tensor]
    output: Tensor
    activation: str
    instead: Mapping[str, str] = dataclasses.field(default_factory=frozen)
    form: Form | None = None

    def constant(self, name: str, values: np.ndarray) -> Tensor:
        """Adds a constant of plain numbers, named after the node."""
        return self.file.constant(f"{self.node.name}/{name}", values)

    def add(
        self,
        name: str,
        inputs: Sequence[Tensor],
        options: Any = None,
        *,
        output: Tensor | None = None,
    ) -> None:
        """Adds an operator, in the version that its tensors ask for.

        Args:
          name: such as 'CONV_2D'.
          inputs: its inputs in order.
          options: of the schema.
          output: what it fills; by default the output of the node.
        """
        version = version_of(name, inputs, self.network.is_wide)
        self.file.operator(name, version, inputs, output or self.output, options)


def version_of(name: str, inputs: Sequence[Tensor], is_wide: bool) -> int:
    """The version that an operator needs.

    Args:
      name: such as 'CONV_2D'.
      inputs: its inputs.
      is_wide: whether activations are int16.
    """
    fewest = min(tensor.num_bits for tensor in inputs)
    return _NARROW_VERSIONS.get(fewest, _VERSIONS)[name][is_wide]


def write(operation: Operation) -> None:
    """Writes the operator of a node, as `KINDS` names it, or what stands in its place.

    Raises:
      ExportError: there is none for these integers.
    """
    name = KINDS[operation.node.kind].operator
    name = operation.instead.get(name, name)
    if name in _OPERATORS:
        _OPERATORS[name](operation)
    else:
        operation.add(name, operation.sources)


def _check_narrow(operation: Operation, why: str) -> None:
    """Raises ExportError, which says why, where activations are int16."""
    if operation.network.is_wide:
        raise ExportError(
            f"layer {operation.node.name} ({title(operation.node)}) {why} and cannot "
            "have activations of 16 bits; take 8 or fewer"
        )


def fused_activation(relu: Node) -> str:
    """What an operator ends in that takes a ReLU in: 'RELU' or 'RELU6'.

    Any other top is the end of the ReLU's range, where the integers end too.
    """
    return "RELU6" if relu.settings["top"] == 6 else "RELU"


# Operators with a kernel.


def _conv(operation: Operation) -> None:
    """A kernel of (outputs, height, width, inputs)."""
    assert operation.form is not None
    if operation.form.operator == DENSE:
        _unfolded_conv(operation)
        return
    integers, grid = operation.network.kernel_integers(operation.node.name)
    kernel = _kernel(operation, np.transpose(integers, (3, 0, 1, 2)), grid, 0)
    options = schema.Conv2DOptionsT()
    _set_window(options, operation)
    _add_with_kernel(operation, "CONV_2D", kernel, options)


def _depthwise_conv(operation: Operation) -> None:
    """A kernel of (1, height, width, outputs)."""
    integers, grid = operation.network.kernel_integers(operation.node.name)
    height, width, channels, multiplier = integers.shape
    flat = integers.reshape(1, height, width, channels * multiplier)
    kernel = _kernel(operation, flat, grid, 3)
    options = schema.DepthwiseConv2DOptionsT()
    _set_window(options, operation)
    options.depthMultiplier = multiplier
    _add_with_kernel(operation, "DEPTHWISE_CONV_2D", kernel, options)


def _fully_connected(operation: Operation) -> None:
    """A kernel of (outputs, inputs); an image is a batch of pixels."""
    integers, grid = operation.network.kernel_integers(operation.node.name)
    kernel = _kernel(operation, integers.T, grid, 0)
    options = schema.FullyConnectedOptionsT()
    options.fusedActivationFunction = _activation(operation.activation)
    options.keepNumDims = len(operation.node.shape) > 1
    _add_with_kernel(operation, "FULLY_CONNECTED", kernel, options)


def _pointwise(operation: Operation) -> None:
    """A dense layer as a 1x1 CONV_2D: all that run it take a scale for each output."""
    (source,), output, node = operation.sources, operation.output, operation.node
    integers, grid = operation.network.kernel_integers(node.name)
    kernel = _kernel(operation, integers.T[:, None, None], grid, 0)
    options = schema.Conv2DOptionsT()
    options.padding = schema.Padding.VALID
    options.strideH = options.strideW = 1
    options.fusedActivationFunction = _activation(operation.activation)
    if len(node.shape) > 1:
        _add_with_kernel(operation, "CONV_2D", kernel, options)
        return
    pixel, answer = (
        operation.file.tensor(
            f"{node.name}/{name}", _as_pixel(each.shape), each.dtype, each.grid
        )
        for name, each in (("input", source), ("pixel", output))
    )
    _add_reshape(operation, source, pixel)
    bias = _bias(operation, output.shape[-1])
    operation.add("CONV_2D", [pixel, kernel, bias], options, output=answer)
    _add_reshape(operation, answer, output)


def _as_pixel(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a vector, with its batch, as that of an image of one pixel."""
    batch, size = shape
    return batch, 1, 1, size


def _add_with_kernel(
    operation: Operation, name: str, kernel: Tensor, options: Any
) -> None:
    bias = _bias(operation, operation.node.shape[-1] or 1)
    operation.add(name, [*operation.sources, kernel, bias], options)


def _kernel(operation: Operation, values: np.ndarray, grid: Grid, axis: int) -> Tensor:
    """Adds a kernel, in TFLite's layout."""
    assert operation.form is not None
    name, bits = f"{operation.node.name}/kernel", operation.form.num_bits
    return operation.file.constant(name, values, grid, axis, num_bits=bits)


def _bias(operation: Operation, channels: int) -> Tensor:
    """Adds a bias, zeros where the node has none.

    Raises:
      ExportError: it does not fit into its integers.
    """
    node, network = operation.node, operation.network
    scale = network.bias_scale(node.name)
    bias = node.weights.get("bias", np.zeros(channels))
    values = np.rint(bias / scale)
    highest = 2 ** (_BIAS_BITS[network.is_wide] - 1) - 1
    if not (np.abs(values) <= highest).all():
        raise ExportError(
            f"the bias of layer {node.name} ({title(node)}) reaches "
            f"{np.abs(values).max():.3g} steps of its integers, which end at "
            f"{highest}: the ranges of its input and kernel are too small for it"
        )
    dtype = np.int64 if network.is_wide else np.int32
    grid = Grid(scale.astype(np.float32), 0, -highest, highest)
    return operation.file.constant(f"{node.name}/bias", values.astype(dtype), grid)


def _set_window(options: Any, operation: Operation) -> None:
    """What convolutions and poolings have in common."""
    settings = operation.node.settings
    options.padding = getattr(schema.Padding, settings["padding"].upper())
    options.strideH, options.strideW = settings["strides"]
    options.fusedActivationFunction = _activation(operation.activation)
    if "dilation" in settings:
        options.dilationHFactor, options.dilationWFactor = settings["dilation"]


def _activation(name: str) -> int:
    return getattr(schema.ActivationFunctionType, name)


# A convolution as a FULLY_CONNECTED: what lies below each position of its kernel is
# brought together by operators that XNNPACK has too, so that no piece of the graph is
# left to slower ones: rows first, then columns.


def _unfolded_conv(operation: Operation) -> None:
    """A kernel of (outputs, width * height * inputs)."""
    integers, grid = operation.network.kernel_integers(operation.node.name)
    values = np.transpose(integers, (3, 1, 0, 2)).reshape(integers.shape[-1], -1)
    kernel = _kernel(operation, values, grid, 0)
    source = _with_margins(operation)
    shape = source.shape
    for axis in (1, 2):
        source, shape = _unfolded(operation, source, shape, axis)
    options = schema.FullyConnectedOptionsT()
    options.fusedActivationFunction = _activation(operation.activation)
    options.keepNumDims = True
    inputs = [
        _in_shape(operation, source, shape),
        kernel,
        _bias(operation, len(values)),
    ]
    operation.add("FULLY_CONNECTED", inputs, options)


def _with_margins(operation: Operation) -> Tensor:
    """What a convolution reads, with the integer that stands for 0 around it."""
    (source,) = operation.sources
    margins = unfolding_margins(source.shape[1:], operation.node)
    if not np.any(margins):
        return source
    sides = (size + sum(margin) for size, margin in zip(source.shape[1:], margins))
    padded = _between(operation, (1, *sides, source.shape[-1]))
    numbers = operation.file.numbers([(0, 0), *margins, (0, 0)])
    operation.add("PAD", [source, numbers], schema.PadOptionsT(), output=padded)
    return padded


def _unfolded(
    operation: Operation, source: Tensor, shape: tuple[int, ...], axis: int
) -> tuple[Tensor, tuple[int, ...]]:
    """What a kernel meets along an axis, as channels of each of its positions.

    A stride s splits the axis into pixels and s places in each. So no slice needs a
    stride, which XNNPACK does not know.

    Args:
      operation: of a convolution.
      source: as large as `shape`.
      shape: (1, height, width, channels).
      axis: 1 or 2.

    Returns:
      The tensor, and the shape that it is to have in the same sense.
    """
    node, count = operation.node, operation.output.shape[axis]
    size = node.weights["kernel"].shape[axis - 1]
    stride, step = (node.settings[each][axis - 1] for each in ("strides", "dilation"))
    if size == stride == 1:
        return source, shape
    split = shape
    if stride > 1:
        split = (*shape[:axis], shape[axis] // stride, stride, *shape[axis + 1 :])
    source = _in_shape(operation, source, split)
    slices = []
    for i in range(size):
        begin, taken = [0] * len(split), list(split)
        begin[axis], taken[axis] = i * step, count
        if stride > 1:
            begin[axis : axis + 2] = divmod(i * step, stride)
            taken[axis + 1] = 1
        slices.append(_slice(operation, source, begin, taken))
    channels = size * shape[-1]
    if size > 1:
        block = slices[0].shape
        joined = _between(operation, (*block[:-1], channels))
        _concatenate(operation, slices, len(block) - 1, joined)
        slices = [joined]
    return slices[0], (*shape[:axis], count, *shape[axis + 1 : -1], channels)


def _concatenate(
    operation: Operation, tensors: Sequence[Tensor], axis: int, output: Tensor
) -> None:
    """Puts tensors of one grid side by side: as many at a time as XNNPACK takes."""
    options = schema.ConcatenationOptionsT()
    options.axis = axis
    while len(tensors) > _MOST_CONCATENATED:
        some, others = tensors[:_MOST_CONCATENATED], tensors[_MOST_CONCATENATED:]
        shape = list(some[0].shape)
        shape[axis] = sum(each.shape[axis] for each in some)
        joined = _between(operation, shape)
        operation.add("CONCATENATION", some, options, output=joined)
        tensors = [joined, *others]
    operation.add("CONCATENATION", tensors, options, output=output)


def _slice(
    operation: Operation, source: Tensor, begin: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """A block of a tensor, of any batch: STRIDED_SLICE, as SLICE has one batch.

    Where all of an axis is taken, its ends are 0 behind a mask, for more slices to
    share their constants.
    """
    block = _between(operation, shape)
    options, end = schema.StridedSliceOptionsT(), [0] * len(shape)
    options.beginMask = options.endMask = 0
    for axis, (whole, first, size) in enumerate(zip(source.shape, begin, shape)):
        if size == whole:
            options.beginMask |= 1 << axis
            options.endMask |= 1 << axis
        else:
            end[axis] = first + size
    numbers = (begin, end, [1] * len(shape))
    inputs = [source, *map(operation.file.numbers, numbers)]
    operation.add("STRIDED_SLICE", inputs, options, output=block)
    return block


def _in_shape(operation: Operation, source: Tensor, shape: Sequence[int]) -> Tensor:
    """The same integers in another shape, of any batch."""
    if source.shape == tuple(shape):
        return source
    reshaped = _between(operation, shape)
    target = (-1, *shape[1:])
    options = schema.ReshapeOptionsT()
    options.newShape = np.array(target, np.int32)
    inputs = [source, operation.file.numbers(target)]
    operation.add("RESHAPE", inputs, options, output=reshaped)
    return reshaped


def _between(operation: Operation, shape: Sequence[int]) -> Tensor:
    """A tensor between a node's sources and its operator, of the first one's grid."""
    source, file = operation.sources[0], operation.file
    name = f"between/{file.num_tensors}"  # short: there are many
    return file.tensor(name, shape, source.dtype, source.grid)


# Operators of two inputs.


def _add(operation: Operation) -> None:
    options = schema.AddOptionsT()
    options.potScaleInt16 = False
    _merge(operation, "ADD", options)


def _sub(operation: Operation) -> None:
    options = schema.SubOptionsT()
    options.potScaleInt16 = False
    _merge(operation, "SUB", options)


def _mul(operation: Operation) -> None:
    if operation.node.kind == "requantize":
        _times_one(operation)
    else:
        _merge(operation, "MUL", schema.MulOptionsT())


def _times_one(operation: Operation, activation: str = "NONE") -> None:
    """The same values in another grid, or a ReLU of them.

    QUANTIZE would say that, but is less exact: XNNPACK has its factor in 256ths, and
    LiteRT's own kernel rounds twice.
    """
    (source,) = operation.sources
    grid = Grid(np.array([1 / 127], np.float32), 0, -127, 127)
    values = np.full((1,) * len(source.shape), 127, source.dtype)
    one = operation.file.constant(f"{operation.node.name}/one", values, grid)
    options = schema.MulOptionsT()
    options.fusedActivationFunction = _activation(activation)
    operation.add("MUL", [source, one], options)


def _merge(operation: Operation, name: str, options: Any) -> None:
    """An operator of two tensors that may end in a ReLU."""
    options.fusedActivationFunction = _activation(operation.activation)
    operation.add(name, _side_by_side(operation), options)


def _maximum(operation: Operation) -> None:
    _choice(operation, "MAXIMUM")


def _minimum(operation: Operation) -> None:
    _choice(operation, "MINIMUM")


def _choice(operation: Operation, name: str) -> None:
    inputs = _side_by_side(operation)
    operation.add(name, inputs, schema.MaximumMinimumOptionsT())


def _side_by_side(operation: Operation) -> list[Tensor]:
    """The two inputs; a vector beside an image becomes one pixel."""
    rank = len(operation.output.shape)
    inputs = []
    for i, source in enumerate(operation.sources):
        if len(source.shape) < rank:
            # The operator would take the batch of a vector for a width.
            missing = (1,) * (rank - len(source.shape))
            shape = (source.shape[0], *missing, *source.shape[1:])
            pixel = operation.file.tensor(
                f"{operation.node.name}/input_{i}", shape, source.dtype, source.grid
            )
            _add_reshape(operation, source, pixel)
            source = pixel
        inputs.append(source)
    return inputs


def _concatenation(operation: Operation) -> None:
    rank = len(operation.node.shape)
    axis = concatenation_axis(operation.node.settings["axis"], rank) + 1
    _concatenate(operation, operation.sources, axis, operation.output)


# Operators that move, pick or average.


def _average_pool(operation: Operation) -> None:
    _pool(operation, "AVERAGE_POOL_2D")


def _max_pool(operation: Operation) -> None:
    _pool(operation, "MAX_POOL_2D")


def _pool(operation: Operation, name: str) -> None:
    options = schema.Pool2DOptionsT()
    _set_window(options, operation)
    options.filterHeight, options.filterWidth = operation.node.settings["size"]
    operation.add(name, operation.sources, options)


def _mean(operation: Operation) -> None:
    _reduce(operation, "MEAN")


def _reduce_max(operation: Operation) -> None:
    _reduce(operation, "REDUCE_MAX")


def _reduce(operation: Operation, name: str) -> None:
    """Over height and width, or over the channels."""
    is_of_channels = operation.node.kind == "channel_max"
    numbers = np.array([3] if is_of_channels else [1, 2], np.int32)
    axes = operation.constant("axes", numbers)
    options = schema.ReducerOptionsT()
    options.keepDims = is_of_channels or bool(operation.node.settings["keepdims"])
    operation.add(name, [*operation.sources, axes], options)


def _reshape(operation: Operation) -> None:
    _add_reshape(operation, operation.sources[0], operation.output)


def _add_reshape(operation: Operation, source: Tensor, output: Tensor) -> None:
    """RESHAPE to the shape of the output, whatever the batch is."""
    target = np.array((-1, *output.shape[1:]), np.int32)
    options = schema.ReshapeOptionsT()
    options.newShape = target
    name = "shape" if output is operation.output else f"shape_{output.index}"
    inputs = [source, operation.constant(name, target)]
    operation.add("RESHAPE", inputs, options, output=output)


def _pad(operation: Operation) -> None:
    """PAD with the integer that stands for 0."""
    rows, columns = operation.node.settings["margins"]
    margins = np.array([(0, 0), rows, columns, (0, 0)], np.int32)
    inputs = [*operation.sources, operation.constant("margins", margins)]
    operation.add("PAD", inputs, schema.PadOptionsT())


def _strided_slice(operation: Operation) -> None:
    """Some rows and columns, of any batch, with all channels."""
    (top, _), (left, _) = operation.node.settings["margins"]
    _, height, width, _ = operation.output.shape
    corners = {
        "begin": (0, top, left, 0),
        "end": (0, top + height, left + width, 0),
        "strides": (1, 1, 1, 1),
    }
    constants = [
        operation.constant(name, np.array(numbers, np.int32))
        for name, numbers in corners.items()
    ]
    options = schema.StridedSliceOptionsT()
    options.beginMask = options.endMask = 0b1001  # of batch and channels, all
    operation.add("STRIDED_SLICE", [*operation.sources, *constants], options)


def _resize_nearest_neighbor(operation: Operation) -> None:
    """In its oldest version, which knows no half pixels: of whole factors, the same."""
    options = schema.ResizeNearestNeighborOptionsT()
    _resize(operation, "RESIZE_NEAREST_NEIGHBOR", options)


def _resize_bilinear(operation: Operation) -> None:
    options = schema.ResizeBilinearOptionsT()
    options.halfPixelCenters = True
    _resize(operation, "RESIZE_BILINEAR", options)


def _resize(operation: Operation, name: str, options: Any) -> None:
    size = operation.constant("size", np.array(operation.output.shape[1:3], np.int32))
    operation.add(name, [*operation.sources, size], options)


def _normalize(operation: Operation) -> None:
    """Each row by its own mean and variance.

    Raises:
      ExportError: the integers are int16.
    """
    (source,), node = operation.sources, operation.node
    _check_narrow(operation, "has sums of 32 bits")
    normalization.add(
        operation.file,
        node.name,
        source,
        operation.output,
        node.settings["epsilon"],
        is_centered=node.settings["is_centered"],
    )


def _transpose(operation: Operation) -> None:
    order = (0, *operation.node.settings["order"])
    _add_transpose(operation, operation.sources[0], order, operation.output)


def _add_transpose(
    operation: Operation, source: Tensor, order: Sequence[int], output: Tensor
) -> None:
    inputs = [source, operation.constant("order", np.array(order, np.int32))]
    operation.add("TRANSPOSE", inputs, schema.TransposeOptionsT(), output=output)


def _transpose_of_four(operation: Operation) -> None:
    """The same where kernels take few axes: of many, those side by side are one.

    Of a shuffle of channels, (batch, rows, columns, groups, channels), three are left.
    """
    (source,), order = operation.sources, (0, *operation.node.settings["order"])
    if len(order) <= targets.MOST_AXES:
        _transpose(operation)
        return
    groups = targets.axes_together(order)
    before = sorted(groups)
    sides = [math.prod(source.shape[axis] for axis in group) for group in before]
    places = [before.index(group) for group in groups]
    moved = _between(operation, [sides[place] for place in places])
    _add_transpose(operation, _in_shape(operation, source, sides), places, moved)
    _add_reshape(operation, moved, operation.output)


def _depth_to_space(operation: Operation) -> None:
    options = schema.DepthToSpaceOptionsT()
    options.blockSize = operation.node.settings["block"]
    operation.add("DEPTH_TO_SPACE", operation.sources, options)


# Operators of one value.


def _relu(operation: Operation) -> None:
    """RELU or RELU6 that no operator before has taken in."""
    operation.add(fused_activation(operation.node), operation.sources)


def _relu_in_mul(operation: Operation) -> None:
    """The same where RELU6 is wrong: TFLite Micro takes both grids for one."""
    _times_one(operation, fused_activation(operation.node))


def _leaky_relu(operation: Operation) -> None:
    options = schema.LeakyReluOptionsT()
    options.alpha = float(operation.node.settings["slope"])
    operation.add("LEAKY_RELU", operation.sources, options)


def _prelu(operation: Operation) -> None:
    """A slope for each channel; those of a leaky ReLU are all the same."""
    settings, shape = operation.node.settings, operation.output.shape
    slopes = settings.get("slopes") or (settings["slope"],) * shape[-1]
    integers, scale = slope_integers(slopes)
    integers = integers.reshape((1,) * (len(shape) - 2) + shape[-1:])
    grid = Grid(np.array([scale], np.float32), 0, -127, 127)
    constant = operation.file.constant(f"{operation.node.name}/slopes", integers, grid)
    operation.add("PRELU", [*operation.sources, constant])


def _quantize(operation: Operation) -> None:
    """The integers of the graph for the pixels of its input."""
    (source,) = operation.sources
    if source.dtype == np.uint8 and operation.output.dtype == np.int16:
        # There is no way from uint8 to int16 but by int8.
        assert source.grid is not None
        grid = Grid(source.grid.scale, source.grid.zero_point - 128, -128, 127)
        name = f"{operation.node.name}/int8"
        half_way = operation.file.tensor(name, source.shape, np.int8, grid)
        _add_quantize(operation, source, half_way)
        source = half_way
    _add_quantize(operation, source, operation.output)


def _add_quantize(operation: Operation, source: Tensor, output: Tensor) -> None:
    operation.add("QUANTIZE", [source], schema.QuantizeOptionsT(), output=output)


def _lookup(operation: Operation) -> None:
    """Any function of one value: each of the 256 integers has its answer in a table.

    Raises:
      ExportError: the integers are int16.
    """
    (source,), node = operation.sources, operation.node
    _check_narrow(operation, "is read from a table of 256 values")
    assert source.grid is not None
    grid = Grid(source.grid.scale, source.grid.zero_point + 128, 0, 255)
    name = f"{node.name}/unsigned"
    unsigned = operation.file.tensor(name, source.shape, np.uint8, grid)
    _add_quantize(operation, source, unsigned)
    _look_up(operation, _cast_to_int32(operation, unsigned, "index"))


def _lookup_of_int8(operation: Operation) -> None:
    """The same without uint8, whose CAST TFLite Micro lacks, without an error.

    Raises:
      ExportError: the integers are int16.
    """
    (source,) = operation.sources
    _check_narrow(operation, "is read from a table of 256 values")
    signed = _cast_to_int32(operation, source, "signed")
    shape = (1,) * len(source.shape)
    half = operation.constant("half", np.full(shape, 128, np.int32))
    name = f"{operation.node.name}/index"
    index = operation.file.tensor(name, source.shape, np.int32)
    options = schema.AddOptionsT()
    options.potScaleInt16 = False
    operation.add("ADD", [signed, half], options, output=index)
    _look_up(operation, index)


def _cast_to_int32(operation: Operation, source: Tensor, name: str) -> Tensor:
    """The integers of a tensor as plain numbers."""
    wide = operation.file.tensor(
        f"{operation.node.name}/{name}", source.shape, np.int32
    )
    options = schema.CastOptionsT()
    options.inDataType, options.outDataType = TYPES[source.dtype], TYPES[wide.dtype]
    operation.add("CAST", [source], options, output=wide)
    return wide


def _look_up(operation: Operation, index: Tensor) -> None:
    """The answers to all integers, of which an index, 0 to 255, picks."""
    (source,), node, output = operation.sources, operation.node, operation.output
    assert source.grid is not None and output.grid is not None
    values = _table(node, source.grid, output.grid)
    table = operation.file.constant(f"{node.name}/table", values, output.grid)
    operation.add("GATHER", [table, index], schema.GatherOptionsT())


def _table(node: Node, source: Grid, output: Grid) -> np.ndarray:
    """What a node makes of each int8, from -128 on: int8 (256,)."""
    inputs = source.scale * (np.arange(-128, 128) - source.zero_point)
    column = tf.constant(inputs[:, None], tf.float32)
    values = KINDS[node.kind].compute(node, [column], node.weights).numpy().ravel()
    integers = np.rint(values / output.scale) + output.zero_point
    return np.clip(integers, output.lowest, output.highest).astype(np.int8)


_OPERATORS: dict[str, Callable[[Operation], None]] = {
    "ADD": _add,
    "AVERAGE_POOL_2D": _average_pool,
    "CONCATENATION": _concatenation,
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise_conv,
    "DEPTH_TO_SPACE": _depth_to_space,
    "FULLY_CONNECTED": _fully_connected,
    "LEAKY_RELU": _leaky_relu,
    "LOOKUP": _lookup,
    "LOOKUP_OF_INT8": _lookup_of_int8,
    "MAXIMUM": _maximum,
    "MAX_POOL_2D": _max_pool,
    "MEAN": _mean,
    "MINIMUM": _minimum,
    "MUL": _mul,
    "NORMALIZE": _normalize,
    "PAD": _pad,
    "POINTWISE": _pointwise,
    "PRELU": _prelu,
    "QUANTIZE": _quantize,
    "REDUCE_MAX": _reduce_max,
    "RELU": _relu,
    "RELU_IN_MUL": _relu_in_mul,
    "RESHAPE": _reshape,
    "RESIZE_BILINEAR": _resize_bilinear,
    "RESIZE_NEAREST_NEIGHBOR": _resize_nearest_neighbor,
    "STRIDED_SLICE": _strided_slice,
    "SUB": _sub,
    "TRANSPOSE": _transpose,
    "TRANSPOSE_OF_FOUR": _transpose_of_four,
}
