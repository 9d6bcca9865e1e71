"""Layer normalization in integers: sums of 32 bits, and a table of 1 / sqrt(n).

TFLite has no such operator. In a chain of operators of 8 bits, squares and their mean
would have 8 bits too, which is too few: values far apart have squares farther apart.
Here sums are exact. Of a row of n integers q, let m be the mean, rounded, and

  e = q - m,  rest = sum(e),  spread = times (sum(e^2) - rest^2 / n) + epsilon's share.

Then (e - rest / n) sqrt(times n) / sqrt(spread) is the normalized value. `times`, a
power of two, keeps what rows of few different values have behind the point.
"""

import math
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.quantization import Grid
from dfq_tf.tflite.flatbuffer import TYPES, File, Tensor

# The table has 1 / sqrt(n) up to this n, in steps of 1 / _ONE. A larger spread is
# divided by _STEP, whose root is _ROOT, until it is in the table: entries from 128 on
# are met there, so that rounding the spread moves a root by 0.2 % at most.
_ENTRIES, _STEP, _ROOT, _ONE = 8192, 64, 8, 2**18
# How large `times` n is at most, where n is not larger itself.
_FINE = 2048
# The largest e^2, and the largest variance of int8.
_LARGEST_SQUARE, _LARGEST_VARIANCE = 255**2, 127.5**2
# Of longer rows than _LONG, the mean's rest is kept in 512ths of an integer, so that
# its product with a root stays in 32 bits.
_LONG, _PARTS_OF_LONG = 2048, 512
_LARGEST_INT32 = 2**31 - 1


def add(
    file: File,
    name: str,
    source: Tensor,
    output: Tensor,
    epsilon: float,
    *,
    is_centered: bool,
) -> None:
    """Adds the operators that normalize the last axis of a tensor.

    Args:
      file: gets them.
      name: what the names of the tensors between begin with.
      source: int8, of rows of at most `layers.LONGEST_ROW` values.
      output: int8, of the same shape.
      epsilon: is added to the variance, in the unit of the values.
      is_centered: whether the mean is taken off; without, the mean of the squares takes
        the variance's place.
    """
    assert source.grid is not None
    chain, length = _Chain(file, name, source), source.shape[-1]
    times = 2 ** max(0, int(math.log2(_FINE / length)))
    integers = chain.cast(source)
    if is_centered:
        total = chain.sum(integers)
        mean = chain.add("FLOOR_DIV", chain.add("ADD", total, length // 2), length)
        rest = chain.add("SUB", total, chain.add("MUL", mean, length))
        apart = chain.add("SUB", integers, mean)
    else:
        rest = None
        apart = chain.add("SUB", integers, source.grid.zero_point)
    squares = chain.sum(chain.add("MUL", apart, apart))
    spread = chain.add("MUL", squares, times)
    largest: float = _LARGEST_SQUARE
    if rest is not None:
        share = chain.add("MUL", chain.add("MUL", rest, rest), times)
        spread = chain.add("SUB", spread, chain.add("FLOOR_DIV", share, length))
        largest = _LARGEST_VARIANCE
    highest = math.ceil(largest * length * times)
    share_of_epsilon = epsilon * length * times / float(source.grid.scale[0]) ** 2
    added = round(min(share_of_epsilon, _LARGEST_INT32 - highest))
    spread = chain.add("ADD", spread, added)
    root, one = chain.inverse_root(spread, highest + added)
    scale = np.array([math.sqrt(times * length) / one], np.float32)
    grid = Grid(scale, 0, -_LARGEST_INT32, _LARGEST_INT32)
    if rest is None:
        values = chain.add("MUL", apart, root, grid)
    else:
        shorter = -(-length // _PARTS_OF_LONG) if length > _LONG else 1
        if shorter > 1:
            rest = chain.add("FLOOR_DIV", rest, shorter)
        moved = chain.add("MUL", rest, root)
        moved = chain.add("FLOOR_DIV", moved, round(length / shorter))
        values = chain.add("SUB", chain.add("MUL", apart, root), moved, grid)
    file.operator("QUANTIZE", 2, [values], output, schema.QuantizeOptionsT())


class _Chain:
    """Adds operators of int32, one behind the other."""

    def __init__(self, file: File, name: str, source: Tensor) -> None:
        self._file, self._name, self._count = file, name, 0
        self._axis = file.numbers([len(source.shape) - 1])

    def add(
        self, operator: str, left: Tensor, right: Tensor | int, grid: Grid | None = None
    ) -> Tensor:
        """An operator of two tensors, or of one and a number, the smaller repeated."""
        inputs = [left, self._tensor(right)]
        shape = left.shape
        if not isinstance(right, int) and math.prod(right.shape) > math.prod(shape):
            shape = right.shape
        return self._added(operator, inputs, shape, _OPTIONS[operator](), grid=grid)

    def cast(self, source: Tensor) -> Tensor:
        """The integers themselves, in 32 bits."""
        options = schema.CastOptionsT()
        options.inDataType, options.outDataType = TYPES[source.dtype], _INT32
        return self._added("CAST", [source], source.shape, options)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of each row, as a row of one value."""
        options = schema.ReducerOptionsT()
        options.keepDims = True
        shape = (*values.shape[:-1], 1)
        return self._added("SUM", [values, self._axis], shape, options)

    def inverse_root(self, values: Tensor, highest: int) -> tuple[Tensor, int]:
        """1 / sqrt(value), and the integer that stands for 1.

        Args:
          values: from 0 on; 0 is taken for 1.
          highest: none is higher.
        """
        levels = [values]
        while highest >= _ENTRIES:
            highest = -(-highest // _STEP)
            half = self.add("ADD", levels[-1], _STEP // 2)
            levels.append(self.add("FLOOR_DIV", half, _STEP))
        factor, (*others, index) = 1, levels
        root_factor = self._file.numbers([factor])
        for level in reversed(others):
            factor *= _ROOT
            is_fine = self._added(
                "LESS",
                [level, self._tensor(_ENTRIES)],
                level.shape,
                schema.LessOptionsT(),
                np.bool_,
            )
            index = self._chosen(is_fine, level, index)
            root_factor = self._chosen(is_fine, self._tensor(factor), root_factor)
        table = self._file.numbers(_table(), "[1 / sqrt(n)]")
        options = schema.GatherOptionsT()
        root = self._added("GATHER", [table, index], index.shape, options)
        return self.add("MUL", root, root_factor), factor * _ONE

    def _chosen(self, where: Tensor, this: Tensor, other: Tensor) -> Tensor:
        inputs, options = [where, this, other], schema.SelectV2OptionsT()
        return self._added("SELECT_V2", inputs, where.shape, options)

    def _tensor(self, value: Tensor | int) -> Tensor:
        return self._file.numbers([value]) if isinstance(value, int) else value

    def _added(
        self,
        operator: str,
        inputs: list[Tensor],
        shape: tuple[int, ...],
        options: Any,
        dtype: Any = np.int32,
        grid: Grid | None = None,
    ) -> Tensor:
        self._count += 1
        name = f"{self._name}/{self._count}"
        output = self._file.tensor(name, shape, dtype, grid)
        self._file.operator(operator, 1, inputs, output, options)
        return output


_INT32 = TYPES[np.dtype(np.int32)]
_OPTIONS = {
    "ADD": schema.AddOptionsT,
    "FLOOR_DIV": schema.FloorDivOptionsT,
    "MUL": schema.MulOptionsT,
    "SUB": schema.SubOptionsT,
}


def _table() -> np.ndarray:
    """1 / sqrt(n) in steps of 1 / _ONE: int32 (_ENTRIES,)."""
    n = np.maximum(np.arange(_ENTRIES), 1)
    return np.rint(_ONE / np.sqrt(n)).astype(np.int32)
