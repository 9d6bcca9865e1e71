"""The bytes of a TFLite file: tensors, constants and operators, and their packing.

Nothing here knows a layer, nor what an operator computes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.quantization import Grid

INPUT_NAME = "image"

_SCHEMA_VERSION = 3
_BUFFER_ALIGNMENT = 16  # what the schema asks for
_CODES = {name: v for name, v in vars(schema.BuiltinOperator).items() if name.isupper()}
_LARGEST_OLD_CODE = _CODES["PLACEHOLDER_FOR_GREATER_OP_CODES"]
# numpy type -> what the schema calls it.
TYPES = {
    np.dtype(name): getattr(schema.TensorType, name.upper())
    for name in ("uint8", "int8", "int16", "int32", "int64", "float32", "bool")
}
# Bits of integers that lie several to a byte -> what the schema calls them.
_PACKED_TYPES = {4: schema.TensorType.INT4, 2: schema.TensorType.INT2}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      index: where it stands among the tensors.
      shape: with the batch, which is 1.
      dtype: of its integers; those of 4 and 2 bits are int8 here.
      grid: what its integers mean; None if they are just numbers.
      num_bits: bits of an integer in the file.
    """

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    grid: Grid | None
    num_bits: int


class File:
    """Collects tensors, buffers and operators, and packs them."""

    def __init__(self) -> None:
        self._subgraph = schema.SubGraphT()
        self._subgraph.tensors = []
        self._subgraph.operators = []
        self._buffers: list[Any] = [schema.BufferT()]  # the first means 'none'
        self._codes: dict[tuple[str, int], int] = {}
        self._operators: list[str] = []
        self._numbers: dict[str, Tensor] = {}

    @property
    def operators(self) -> Sequence[str]:
        """The names of the operators so far, such as 'CONV_2D'."""
        return tuple(self._operators)

    @property
    def num_tensors(self) -> int:
        """How many tensors there are so far."""
        return len(self._subgraph.tensors)

    def tensor(
        self, name: str, shape: Sequence[int], dtype: Any, grid: Grid | None = None
    ) -> Tensor:
        """Adds a tensor that an operator will fill.

        Args:
          name: unique in the file.
          shape: with the batch.
          dtype: of its integers.
          grid: what they mean.
        """
        return self._added(name, shape, np.dtype(dtype), grid)

    def constant(
        self,
        name: str,
        values: np.ndarray,
        grid: Grid | None = None,
        axis: int = 0,
        *,
        num_bits: int | None = None,
    ) -> Tensor:
        """Adds a constant.

        Args:
          name: unique in the file.
          values: integers.
          grid: what they mean.
          axis: of a grid of several scales, the axis that they go along.
          num_bits: 4 or 2 to store int8 that fit into so few bits in them; None for
            all bits of their type.
        """
        num_bits = num_bits or 8 * values.dtype.itemsize
        data = packed(values, num_bits) if num_bits < 8 else values
        added = self._added(name, values.shape, values.dtype, grid, axis, num_bits)
        self._subgraph.tensors[added.index].buffer = self._buffer(data.tobytes())
        return added

    def numbers(self, values: Any, name: str = "") -> Tensor:
        """A constant of plain numbers, int32; those that ask for the same share it.

        Args:
          values: the numbers.
          name: of the constant; by default the numbers themselves.
        """
        array = np.array(values, np.int32)
        name = name or str(array.tolist()).replace(" ", "")
        if name not in self._numbers:
            self._numbers[name] = self.constant(name, array)
        return self._numbers[name]

    def rename(self, tensor: Tensor, name: str) -> None:
        """Gives a tensor another name."""
        self._subgraph.tensors[tensor.index].name = name

    def operator(
        self,
        name: str,
        version: int,
        inputs: Sequence[Tensor],
        output: Tensor,
        options: Any = None,
    ) -> None:
        """Adds an operator.

        Args:
          name: in the schema's BuiltinOperator, such as 'CONV_2D'.
          version: what a runtime must know of it.
          inputs: its inputs in order.
          output: what it fills.
          options: an object of the schema, whose class names the options' type.
        """
        operator = schema.OperatorT()
        key = name, version
        operator.opcodeIndex = self._codes.setdefault(key, len(self._codes))
        operator.inputs = np.array([tensor.index for tensor in inputs], np.int32)
        operator.outputs = np.array([output.index], np.int32)
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = options
        self._subgraph.operators.append(operator)
        self._operators.append(name)

    def finish(
        self,
        image: Tensor,
        output: Tensor,
        output_name: str,
        metadata: Mapping[str, bytes],
    ) -> bytes:
        """The file's content.

        Args:
          image: the one input.
          output: the one output.
          output_name: what the signature calls it.
          metadata: name -> content of further buffers.
        """
        subgraph = self._subgraph
        subgraph.inputs, subgraph.outputs = [image.index], [output.index]
        subgraph.name = "main"
        model = schema.ModelT()
        model.version = _SCHEMA_VERSION
        model.description = "dfq_tf"
        model.subgraphs = [subgraph]
        model.buffers = self._buffers
        model.operatorCodes = [_code(*key) for key in self._codes]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs = [_tensor_map(INPUT_NAME, image)]
        signature.outputs = [_tensor_map(output_name, output)]
        model.signatureDefs = [signature]
        model.metadata = [self._metadata(*each) for each in metadata.items()]
        return _packed(model)

    def _metadata(self, name: str, content: bytes) -> Any:
        metadata = schema.MetadataT()
        metadata.name, metadata.buffer = name, self._buffer(content)
        return metadata

    def _buffer(self, content: bytes) -> int:
        """Adds a buffer; its number."""
        buffer = _AlignedBuffer()
        buffer.data = content
        self._buffers.append(buffer)
        return len(self._buffers) - 1

    def _added(
        self,
        name: str,
        shape: Sequence[int],
        dtype: np.dtype,
        grid: Grid | None,
        axis: int = 0,
        num_bits: int | None = None,
    ) -> Tensor:
        num_bits = num_bits or 8 * dtype.itemsize
        tensor = schema.TensorT()
        tensor.name, tensor.shape = name, np.array(shape, np.int32)
        tensor.type = _PACKED_TYPES.get(num_bits, TYPES[dtype])
        tensor.buffer = 0
        if grid is not None:
            quantization = _Quantization()
            quantization.scale = grid.scale.astype(np.float32)
            quantization.zeroPoint = np.full(
                grid.scale.shape, grid.zero_point, np.int64
            )
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self._subgraph.tensors.append(tensor)
        index = len(self._subgraph.tensors) - 1
        return Tensor(index, tuple(map(int, shape)), dtype, grid, num_bits)


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


class _Quantization(schema.QuantizationParametersT):
    """What integers mean; tensors of the same grid share one table."""

    def Pack(self, builder: Any) -> Any:
        """Writes the table, unless the file has it already."""
        vectors = (self.scale.tobytes(), self.zeroPoint.tobytes())
        key = "quantization", *vectors, self.quantizedDimension
        if key not in builder.shared:
            builder.shared[key] = super().Pack(builder)
        return builder.shared[key]


class _Builder(flatbuffers.Builder):
    """Writes each vector of numbers once, however many tables have it.

    Nearly all zero points of kernels and biases are 0, eight bytes for each channel,
    and shapes are few: together some per cent of a small file.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.shared: dict[Any, int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        """Where the vector is; the flatbuffers library calls this."""
        key = x.dtype.str, x.tobytes()
        if key not in self.shared:
            self.shared[key] = super().CreateNumpyVector(x)
        return self.shared[key]


def with_all_outputs(content: bytes) -> bytes:
    """A file that gives what each of its operators writes, not the last one alone.

    So the kernels that a file runs with can be looked at, XNNPACK's among them.

    Args:
      content: of a file of `File.finish`.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    operators = model.subgraphs[0].operators
    return _with_outputs(model, [i for each in operators for i in each.outputs])


def with_output(content: bytes, name: str) -> bytes:
    """A file that gives one of its tensors, in place of what it gives.

    Args:
      content: of a file of `File.finish`.
      name: of the tensor.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    names = [tensor.name.decode() for tensor in model.subgraphs[0].tensors]
    return _with_outputs(model, [names.index(name)])


def _with_outputs(model: Any, outputs: Sequence[int]) -> bytes:
    model.subgraphs[0].outputs = list(outputs)
    model.signatureDefs = None
    for i, old in enumerate(model.buffers):
        model.buffers[i] = _AlignedBuffer()
        model.buffers[i].data = None if old.data is None else bytes(old.data)
    return _packed(model)


def _packed(model: Any) -> bytes:
    builder = _Builder(2**16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def packed(values: np.ndarray, num_bits: int) -> np.ndarray:
    """Integers of few bits, several to a byte, the first in the lowest bits.

    Args:
      values: int8, of any shape, in -8 .. 7 or -2 .. 1.
      num_bits: 4 or 2.

    Returns:
      uint8 (ceil(size * num_bits / 8),); the last byte is filled with zeros.
    """
    count = 8 // num_bits
    parts = values.ravel().view(np.uint8) & (2**num_bits - 1)
    parts = np.pad(parts, (0, -parts.size % count)).reshape(-1, count)
    shifts = np.arange(count, dtype=np.uint8) * np.uint8(num_bits)
    return np.bitwise_or.reduce(parts << shifts, axis=1).astype(np.uint8)


def _code(name: str, version: int) -> Any:
    operator_code = schema.OperatorCodeT()
    operator_code.builtinCode = _CODES[name]
    # Readers of files older than 2020 look here.
    operator_code.deprecatedBuiltinCode = min(_CODES[name], _LARGEST_OLD_CODE)
    operator_code.version = version
    return operator_code


def _tensor_map(name: str, tensor: Tensor) -> Any:
    tensor_map = schema.TensorMapT()
    tensor_map.name, tensor_map.tensorIndex = name, tensor.index
    return tensor_map
