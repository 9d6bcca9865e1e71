"""Writes an integer network as a TFLite file, tensor by tensor.

The file says what the student computes, and nothing else: every scale, zero point and
integer is the student's, and every tensor bears the name of its layer. TensorFlow's
own converter does as well at W8A8 and W4A8; of the same students it makes files that
answer differently at W3A8, files that LiteRT cannot run at W8A16, and none at W4A4
(docs/results.md).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.compat import keras
from dfq_tf.errors import ExportError
from dfq_tf.graph.graph import Graph, Node
from dfq_tf.graph.rewriting import activation_name, is_relu, relu_top
from dfq_tf.quantization import registry
from dfq_tf.quantization.integers import Grid, IntegerLayer, bias_scale, integer_layers

INPUT_NAME, OUTPUT_NAME = "image", "logits"

# Weights of so few bits go two to a byte.
INT4_BITS = 4

_SCHEMA_VERSION = 3
_BUFFER_ALIGNMENT = 16  # what the schema asks for
_OPS = schema.BuiltinOperator
_TYPES = {
    np.dtype(np.uint8): schema.TensorType.UINT8,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int16): schema.TensorType.INT16,
    np.dtype(np.int32): schema.TensorType.INT32,
    np.dtype(np.int64): schema.TensorType.INT64,
}
# The oldest version of each operator that has int8, and int16, activations.
_VERSIONS = {
    _OPS.ADD: (2, 3),
    _OPS.AVERAGE_POOL_2D: (2, 3),
    _OPS.CONCATENATION: (2, 3),
    _OPS.CONV_2D: (3, 4),
    _OPS.DEPTHWISE_CONV_2D: (3, 5),
    _OPS.LEAKY_RELU: (2, 2),
    _OPS.LOGISTIC: (2, 3),
    _OPS.MAXIMUM: (2, 3),
    _OPS.MAX_POOL_2D: (2, 3),
    _OPS.MEAN: (2, 3),
    _OPS.MUL: (2, 4),
    _OPS.PAD: (2, 3),
    _OPS.QUANTIZE: (2, 2),
    _OPS.REDUCE_MAX: (2, 3),
    _OPS.RELU: (2, 3),
    _OPS.RELU6: (2, 3),
    _OPS.RESHAPE: (1, 1),
    _OPS.SUB: (2, 5),
    _OPS.TANH: (2, 3),
}
_INT4_VERSION = 7  # of both convolutions, with an int4 kernel
_ACTIVATIONS = {
    "linear": schema.ActivationFunctionType.NONE,
    "relu": schema.ActivationFunctionType.RELU,
    "relu6": schema.ActivationFunctionType.RELU6,
}
_OPERATOR_NAMES = {
    code: name for name, code in vars(_OPS).items() if isinstance(code, int)
}
# Of an outline: the integers of int8 as they are.
_BLANK_GRID = Grid(np.ones(1, np.float32), 0, -128, 127)
_CURVES = {"sigmoid": _OPS.LOGISTIC, "tanh": _OPS.TANH}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in the file: where, what its integers mean, and their type."""

    index: int
    grid: Grid
    dtype: np.dtype


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes lie where the schema wants them, which Pack forgets."""

    def Pack(self, builder: Any) -> Any:
        """Writes the buffer; the flatbuffers library calls this."""
        if self.data is not None and len(self.data):
            builder.StartVector(1, len(self.data), _BUFFER_ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
            data = builder.EndVector()
        schema.BufferStart(builder)
        if self.data is not None and len(self.data):
            schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


def write(model: keras.Model, image_scale: float, image_zero_point: int) -> bytes:
    """Writes a student as a TFLite file: uint8 pixels in, integer logits out.

    Args:
      model: the student's, from `quantization.apply.quantize_graph`.
      image_scale: what one step of a pixel is worth to the model.
      image_zero_point: the pixel that stands for 0.

    Returns:
      The content of the file.

    Raises:
      ExportError: the student has a layer that cannot be written.
    """
    graph, layers = integer_layers(model)
    writer = _Writer(graph, layers)
    writer.add_image(image_scale, image_zero_point)
    for layer in layers.values():
        writer.add_layer(layer)
    return writer.finish()


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the file of a network would be.

    Attributes:
      operators: node -> the operators that are written for it, in order, such as
        'CONV_2D'; none where another node's operator has taken it in.
      taken_in: node -> the node whose operator has taken it in, as that of a
        convolution takes in a ReLU.
      num_bytes: size of the file.
    """

    operators: dict[str, tuple[str, ...]]
    taken_in: dict[str, str]
    num_bytes: int


def outline(graph: Graph) -> Outline:
    """Writes the file of a network at W8A8, with zeros for its integers.

    Args:
      graph: from `quantization.apply.with_pixels`; a node of a kind that no operator
        has is passed over.
    """
    nodes = [
        # A size that may be any counts as one: nothing hangs on it here.
        dataclasses.replace(node, shape=tuple(size or 1 for size in node.shape))
        for node in graph.nodes.values()
    ]
    graph = Graph(nodes, graph.output_name)
    (pixels,) = graph.consumers(graph.input_name)
    layers = {node.name: _blank_layer(graph, node) for node in nodes}
    # Pixels have a range of their own, which a concatenation has to change.
    grid = dataclasses.replace(_BLANK_GRID, scale=np.full(1, 2, np.float32))
    layers[pixels.name] = IntegerLayer(pixels, output=grid)
    writer = _Writer(graph, layers)
    operators: dict[str, tuple[str, ...]] = {}
    taken_in: dict[str, str] = {}
    writer.add_image(2.0, 0)
    operators[pixels.name] = writer.operators()
    for name, layer in layers.items():
        done, stored = len(writer.operators()), set(writer.stored)
        if layer.node.kind in _OPERATORS or name in stored or not layer.node.inputs:
            writer.add_layer(layer)
        else:
            writer.pass_over(layer)
        operators.setdefault(name, writer.operators()[done:])
        others = set(writer.stored) - stored - {name}
        taken_in.update(dict.fromkeys(others, name))
    return Outline(operators, taken_in, len(writer.finish()))


def _blank_layer(graph: Graph, node: Node) -> IntegerLayer:
    output = _BLANK_GRID if registry.has_quantized_output(graph, node) else None
    if node.kind not in registry.KERNELS:
        return IntegerLayer(node, output=output)
    shape: tuple[int, ...] = node.weights[0].shape
    kernel = np.zeros(shape, np.int8)
    # See `rewrite`: a depthwise kernel has its outputs on its last two axes.
    channels = math.prod(shape[2 if node.kind == "DepthwiseConv2D" else 3 :])
    grid = dataclasses.replace(_BLANK_GRID, scale=np.ones(channels, np.float32))
    return IntegerLayer(node, 8, kernel, grid, None, output)


class _Writer:
    """Collects tensors, buffers and operators, and packs them."""

    def __init__(self, graph: Graph, layers: dict[str, IntegerLayer]) -> None:
        self._graph = graph
        self._layers = layers
        self._subgraph = schema.SubGraphT()
        self._subgraph.tensors = []
        self._subgraph.operators = []
        self._buffers: list[Any] = [schema.BufferT()]  # the first means 'none'
        self._codes: dict[tuple[int, int], int] = {}
        # What the output of each node is in the file.
        self.stored: dict[str, _Tensor] = {}
        grids = [layer.output for layer in layers.values() if layer.output]
        self._is_wide = any(grid.highest > 127 for grid in grids)
        self._dtype = np.dtype(np.int16 if self._is_wide else np.int8)

    # The path of the data: image, layers, file.

    def add_image(self, scale: float, zero_point: int) -> None:
        """The uint8 input, and its pixels as the first layer reads them."""
        image = self._graph.nodes[self._graph.input_name]
        (pixels,) = self._graph.consumers(image.name)
        scales = np.array([scale], np.float32)
        raw = self._add_tensor(
            image.name, (1, *image.shape), np.uint8, Grid(scales, zero_point, 0, 255)
        )
        self._image = raw.index
        grid = self._layers[pixels.name].output
        assert grid is not None
        if self._is_wide:  # there is no way from uint8 to int16 but by int8
            half_way = Grid(scales, zero_point - 128, -128, 127)
            raw = self._quantized(raw, f"{pixels.name}/int8", half_way, np.int8)
        self.stored[pixels.name] = self._quantized(raw, pixels.name, grid, self._dtype)

    def add_layer(self, layer: IntegerLayer) -> None:
        """The operator of one layer; none if another layer has taken it in."""
        node = layer.node
        if node.name in self.stored or node.kind == "InputLayer":
            return
        sources = [self.stored[name] for name in node.inputs]
        fused, name, activation = layer, node.name, activation_name(node)
        is_merge = node.kind in (*registry.KERNELS, *registry.MERGES)
        if is_merge and not registry.has_quantized_output(self._graph, node):
            (relu,) = self._graph.consumers(name)
            fused, name = self._layers[relu.name], relu.name
            activation = _relu_name(relu)
        grid = fused.output or sources[0].grid
        output = self._add_tensor(name, (1, *node.shape), self._dtype, grid)
        if node.kind not in _OPERATORS:
            raise ExportError(f"layer {node.name} ({node.kind}) cannot be written")
        _OPERATORS[node.kind](self, layer, sources, output, activation)
        if fused.output is not None:
            output = self._cut_off(output, name, activation)
        self.stored[name] = output

    def pass_over(self, layer: IntegerLayer) -> None:
        """A layer that has no operator: its output alone."""
        node = layer.node
        self.stored[node.name] = self._add_tensor(
            node.name, (1, *node.shape), self._dtype, layer.output or _BLANK_GRID
        )

    def operators(self) -> tuple[str, ...]:
        """The names of the operators so far."""
        codes = list(self._codes)
        return tuple(
            _OPERATOR_NAMES[codes[operator.opcodeIndex][0]]
            for operator in self._subgraph.operators
        )

    def finish(self) -> bytes:
        """The file's content."""
        subgraph = self._subgraph
        output = self.stored[self._graph.output_name].index
        subgraph.inputs, subgraph.outputs = [self._image], [output]
        subgraph.name = "main"
        model = schema.ModelT()
        model.version = _SCHEMA_VERSION
        model.description = "dfq_tf"
        model.subgraphs = [subgraph]
        model.buffers = self._buffers
        model.operatorCodes = [_code(*key) for key in self._codes]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [_tensor_map(INPUT_NAME, self._image)]
        signature.outputs = [_tensor_map(OUTPUT_NAME, output)]
        model.signatureDefs = [signature]
        builder = flatbuffers.Builder(2**16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    # What the operators are made of.

    def add_operator(
        self,
        code: int,
        inputs: Sequence[int],
        output: _Tensor,
        options: Any = None,
        *,
        is_int4: bool = False,
    ) -> None:
        """Adds an operator, whose options name their own type."""
        version = _VERSIONS[code][self._is_wide]
        if is_int4:
            version = _INT4_VERSION
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault((code, version), len(self._codes))
        operator.inputs, operator.outputs = list(inputs), [output.index]
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self._subgraph.operators.append(operator)

    def add_constant(
        self, name: str, values: np.ndarray, grid: Grid | None = None, axis: int = 0
    ) -> int:
        """Adds a constant of the type of its values; returns its index."""
        data = np.ascontiguousarray(values).view(np.uint8).ravel()
        return self._append(name, values.shape, _TYPES[values.dtype], grid, axis, data)

    def add_kernel(
        self, layer: IntegerLayer, values: np.ndarray, axis: int
    ) -> tuple[int, bool]:
        """Adds a kernel, in TFLite's layout; returns its index, and if it is int4."""
        assert layer.num_bits_weight is not None
        name = f"{layer.node.name}/kernel"
        # LiteRT misreads an int4 kernel of a depthwise convolution behind int16.
        is_depthwise = layer.node.kind == "DepthwiseConv2D"
        if layer.num_bits_weight > INT4_BITS or (is_depthwise and self._is_wide):
            return self.add_constant(name, values, layer.kernel_grid, axis), False
        kind = schema.TensorType.INT4
        data = packed_int4(values)
        return self._append(
            name, values.shape, kind, layer.kernel_grid, axis, data
        ), True

    def add_bias(self, layer: IntegerLayer, channels: int) -> int:
        """Adds a bias, zeros where the layer has none; returns its index."""
        scale = bias_scale(self._graph, self._layers, layer)
        bias = np.zeros(channels) if layer.bias is None else layer.bias
        # Of the 64 bits beside int16 activations, LiteRT takes 48.
        bits, dtype = (48, np.int64) if self._is_wide else (32, np.int32)
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        values = np.clip(np.rint(bias / scale), lowest, highest)
        grid = Grid(scale.astype(np.float32), 0, lowest, highest)
        return self.add_constant(f"{layer.node.name}/bias", values.astype(dtype), grid)

    def _add_tensor(
        self, name: str, shape: Sequence[int], dtype: Any, grid: Grid
    ) -> _Tensor:
        dtype = np.dtype(dtype)
        index = self._append(name, shape, _TYPES[dtype], grid)
        return _Tensor(index, grid, dtype)

    def _append(
        self,
        name: str,
        shape: Sequence[int],
        kind: int,
        grid: Grid | None,
        axis: int = 0,
        data: np.ndarray | None = None,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = name, list(map(int, shape)), kind
        tensor.buffer = 0
        if data is not None:
            buffer = _AlignedBuffer()
            buffer.data = data.tobytes()
            tensor.buffer = len(self._buffers)
            self._buffers.append(buffer)
        if grid is not None:
            quantization = schema.QuantizationParametersT()
            quantization.scale = grid.scale.astype(np.float32)
            quantization.zeroPoint = np.full(
                grid.scale.shape, grid.zero_point, np.int64
            )
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self._subgraph.tensors.append(tensor)
        return len(self._subgraph.tensors) - 1

    def _quantized(self, source: _Tensor, name: str, grid: Grid, dtype: Any) -> _Tensor:
        """A tensor, in another grid."""
        shape = self._subgraph.tensors[source.index].shape
        output = self._add_tensor(name, shape, dtype, grid)
        self.add_operator(
            _OPS.QUANTIZE, [source.index], output, schema.QuantizeOptionsT()
        )
        return output

    def _cut_off(self, tensor: _Tensor, name: str, activation: str) -> _Tensor:
        """Keeps a tensor of fewer than 8 bits from going below its lowest integer.

        Above, int8 itself ends where they do; and a ReLU ends at the zero point.
        """
        grid = tensor.grid
        is_cut_off = activation != "linear" and grid.zero_point == grid.lowest
        if self._is_wide or grid.lowest == -128 or is_cut_off:
            return tensor
        self._subgraph.tensors[tensor.index].name = f"{name}/raw"
        shape = self._subgraph.tensors[tensor.index].shape
        lowest = self.add_constant(
            f"{name}/lowest", np.full((1,) * len(shape), grid.lowest, np.int8), grid
        )
        output = self._add_tensor(name, shape, tensor.dtype, grid)
        options = schema.MaximumMinimumOptionsT()
        self.add_operator(_OPS.MAXIMUM, [tensor.index, lowest], output, options)
        return output

    # One method for each kind of operator.

    def conv(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """CONV_2D: a kernel of (outputs, height, width, inputs)."""
        assert layer.kernel is not None
        config = layer.node.config
        kernel, is_int4 = self.add_kernel(
            layer, np.transpose(layer.kernel, (3, 0, 1, 2)), 0
        )
        bias = self.add_bias(layer, layer.kernel.shape[-1])
        options = schema.Conv2DOptionsT()
        _set_window(options, config, config["strides"], activation)
        options.dilationHFactor, options.dilationWFactor = config["dilation_rate"]
        inputs = [sources[0].index, kernel, bias]
        self.add_operator(_OPS.CONV_2D, inputs, output, options, is_int4=is_int4)

    def depthwise_conv(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """DEPTHWISE_CONV_2D: a kernel of (1, height, width, outputs)."""
        assert layer.kernel is not None
        config = layer.node.config
        height, width, channels, multiplier = layer.kernel.shape
        flat = layer.kernel.reshape(1, height, width, channels * multiplier)
        kernel, is_int4 = self.add_kernel(layer, flat, 3)
        bias = self.add_bias(layer, channels * multiplier)
        options = schema.DepthwiseConv2DOptionsT()
        _set_window(options, config, config["strides"], activation)
        options.dilationHFactor, options.dilationWFactor = config["dilation_rate"]
        options.depthMultiplier = multiplier
        inputs = [sources[0].index, kernel, bias]
        self.add_operator(
            _OPS.DEPTHWISE_CONV_2D, inputs, output, options, is_int4=is_int4
        )

    def merge(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """ADD, SUB and MUL of two tensors."""
        options: Any
        if layer.node.kind == "Add":
            code, options = _OPS.ADD, schema.AddOptionsT()
            options.potScaleInt16 = False
        elif layer.node.kind == "Subtract":
            code, options = _OPS.SUB, schema.SubOptionsT()
            options.potScaleInt16 = False
        else:
            code, options = _OPS.MUL, schema.MulOptionsT()
        options.fusedActivationFunction = _ACTIVATIONS[activation]
        self.add_operator(code, [s.index for s in sources], output, options)

    def concatenate(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """CONCATENATION, which copies integers: pixels come into its grid first."""
        del activation
        inputs = []
        for index, source in enumerate(sources):
            same = (
                source.grid.zero_point == output.grid.zero_point
                and source.grid.scale == output.grid.scale
            )
            if not same:
                name = f"{layer.node.name}/input_{index}"
                source = self._quantized(source, name, output.grid, self._dtype)
            inputs.append(source.index)
        options = schema.ConcatenationOptionsT()
        rank = len(layer.node.shape) + 1
        options.axis = layer.node.config["axis"] % rank
        self.add_operator(_OPS.CONCATENATION, inputs, output, options)

    def pool(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """MAX_POOL_2D and AVERAGE_POOL_2D."""
        del activation
        config = layer.node.config
        is_max = layer.node.kind == "MaxPooling2D"
        options = schema.Pool2DOptionsT()
        _set_window(options, config, config["strides"], "linear")
        options.filterHeight, options.filterWidth = config["pool_size"]
        code = _OPS.MAX_POOL_2D if is_max else _OPS.AVERAGE_POOL_2D
        self.add_operator(code, [sources[0].index], output, options)

    def reduce(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """MEAN and REDUCE_MAX over height and width."""
        del activation
        name = f"{layer.node.name}/axes"
        axes = self.add_constant(name, np.array([1, 2], np.int32))
        options = schema.ReducerOptionsT()
        options.keepDims = bool(layer.node.config["keepdims"])
        is_max = layer.node.kind == "GlobalMaxPooling2D"
        code = _OPS.REDUCE_MAX if is_max else _OPS.MEAN
        self.add_operator(code, [sources[0].index, axes], output, options)

    def reshape(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """RESHAPE to the shape of the layer's output."""
        del activation
        shape = np.array((1, *layer.node.shape), np.int32)
        target = self.add_constant(f"{layer.node.name}/shape", shape)
        options = schema.ReshapeOptionsT()
        options.newShape = shape
        self.add_operator(_OPS.RESHAPE, [sources[0].index, target], output, options)

    def pad(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """PAD with the integer that stands for 0."""
        del activation
        rows, columns = layer.node.config["padding"]
        margins = np.array([(0, 0), rows, columns, (0, 0)], np.int32)
        target = self.add_constant(f"{layer.node.name}/margins", margins)
        inputs = [sources[0].index, target]
        self.add_operator(_OPS.PAD, inputs, output, schema.PadOptionsT())

    def activation(
        self,
        layer: IntegerLayer,
        sources: Sequence[_Tensor],
        output: _Tensor,
        activation: str,
    ) -> None:
        """RELU, RELU6, LEAKY_RELU that no layer has taken in, LOGISTIC and TANH."""
        inputs = [sources[0].index]
        if activation in _CURVES:
            self.add_operator(_CURVES[activation], inputs, output)
            return
        if layer.node.kind == "LeakyReLU":
            options = schema.LeakyReluOptionsT()
            options.alpha = float(layer.node.config["alpha"])
            self.add_operator(_OPS.LEAKY_RELU, inputs, output, options)
            return
        is_relu6 = _relu_name(layer.node) == "relu6"
        self.add_operator(_OPS.RELU6 if is_relu6 else _OPS.RELU, inputs, output)


_OPERATORS: dict[str, Callable[..., None]] = {
    "Conv2D": _Writer.conv,
    "DepthwiseConv2D": _Writer.depthwise_conv,
    "Add": _Writer.merge,
    "Subtract": _Writer.merge,
    "Multiply": _Writer.merge,
    "Concatenate": _Writer.concatenate,
    "MaxPooling2D": _Writer.pool,
    "AveragePooling2D": _Writer.pool,
    "GlobalAveragePooling2D": _Writer.reduce,
    "GlobalMaxPooling2D": _Writer.reduce,
    "Reshape": _Writer.reshape,
    "Flatten": _Writer.reshape,
    "ZeroPadding2D": _Writer.pad,
    "ReLU": _Writer.activation,
    "Activation": _Writer.activation,
    "LeakyReLU": _Writer.activation,
}


def packed_int4(values: np.ndarray) -> np.ndarray:
    """Integers in -8 .. 7, two to a byte, the first in the lower half.

    Args:
      values: int8, of any shape.

    Returns:
      uint8 (ceil(size / 2),); a last lone integer has a 0 beside it.
    """
    halves = values.ravel().view(np.uint8) & 0x0F
    halves = np.pad(halves, (0, halves.size % 2))
    return halves[0::2] | (halves[1::2] << 4)


def _set_window(
    options: Any, config: Any, strides: tuple[int, int], activation: str
) -> None:
    is_same = config["padding"] == "same"
    options.padding = schema.Padding.SAME if is_same else schema.Padding.VALID
    options.strideH, options.strideW = strides
    options.fusedActivationFunction = _ACTIVATIONS[activation]


def _relu_name(node: Node) -> str:
    """'relu' or 'relu6', of a layer that `is_relu`.

    Any other top is the end of its range, where the integers end too.
    """
    assert is_relu(node)
    return "relu6" if relu_top(node) == 6 else "relu"


def _code(code: int, version: int) -> Any:
    operator_code = schema.OperatorCodeT()
    operator_code.builtinCode = code
    # Readers of files older than 2020 look here.
    operator_code.deprecatedBuiltinCode = min(
        code, _OPS.PLACEHOLDER_FOR_GREATER_OP_CODES
    )
    operator_code.version = version
    return operator_code


def _tensor_map(name: str, index: int) -> Any:
    tensor_map = schema.TensorMapT()
    tensor_map.name, tensor_map.tensorIndex = name, index
    return tensor_map
