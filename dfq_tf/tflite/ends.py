"""The ends of a file: what it takes and gives, and the operators that make it so.

A quantized network goes from pixels to logits. Around it, a file may have its pixels in
another type, and behind its logits a softmax or sigmoid, and another type again.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.graph import softmax
from dfq_tf.quantization import Grid
from dfq_tf.settings import FileConfig
from dfq_tf.tflite.flatbuffer import File, Tensor
from dfq_tf.tflite.forms import Integers
from dfq_tf.tflite.operators import version_of

_UINT8, _INT8, _INT16 = (np.dtype(name) for name in ("uint8", "int8", "int16"))
_FLOAT32 = np.dtype(np.float32)
# What LiteRT demands of probabilities.
_PROBABILITIES = {
    _INT8: Grid(np.array([1 / 256], np.float32), -128, -128, 127),
    _INT16: Grid(np.array([1 / 32768], np.float32), 0, -32768, 32767),
}
# What makes probabilities of logits; the one score of two classes is the second.
_FUNCTIONS = {
    "softmax": ("SOFTMAX",),
    "sigmoid": ("LOGISTIC",),
    "score": ("SOFTMAX", "STRIDED_SLICE"),
}
# uint8 less int8, of the same values.
_SHIFT = 128


class Step(NamedTuple):
    """An operator behind the logits.

    Attributes:
      operator: its name, such as 'SOFTMAX'.
      dtype: of its output.
      grid: what the integers of its output mean; None for floats.
    """

    operator: str
    dtype: np.dtype
    grid: Grid | None


@dataclasses.dataclass(frozen=True)
class Ends:
    """What a file takes and gives.

    Attributes:
      input_type: of the pixels: uint8; int8, pixel - 128; or float32, normalised as
        the network's description says.
      output_name: what the file gives: 'probabilities' or 'logits'.
      output_type: uint8, int8, int16 or float32.
      grid: what the integers of the output mean; for float32, those before them.
      steps: the operators behind the logits, in order.
      class_names: one for each output.
    """

    input_type: np.dtype
    output_name: str
    output_type: np.dtype
    grid: Grid
    steps: Sequence[Step]
    class_names: tuple[str, ...]


def ends_of(network: Integers, config: FileConfig | None) -> Ends:
    """What the file of a network takes and gives.

    Args:
      network: gives logits.
      config: what is asked for; None for pixels in uint8, and the logits as the
        network has them.
    """
    own = _INT16 if network.is_wide else _INT8
    grid, steps = network.grid(network.graph.output), list[Step]()
    function = network.description.probabilities
    names = network.description.class_names
    if config is None:
        return Ends(_UINT8, "logits", own, grid, steps, names)
    if config.file_output == "logits":
        function = None
    elif config.file_output == "probabilities":
        function = function or "softmax"
    if function == "score" and names != ("0", "1"):
        function = "softmax"  # whoever names both classes wants to read both
    elif function == "score":
        names = names[1:]
    auto = _INT16 if network.is_wide else _UINT8
    asked = config.output_type
    output_type = auto if asked == "auto" else np.dtype(asked)
    if function:
        grid = _PROBABILITIES[own]
        steps = [Step(operator, own, grid) for operator in _FUNCTIONS[function]]
    steps += _type_changes(own, grid, output_type)
    grid = next((step.grid for step in reversed(steps) if step.grid), grid)
    gives = "probabilities" if function else "logits"
    return Ends(np.dtype(config.input_type), gives, output_type, grid, steps, names)


def _type_changes(own: np.dtype, grid: Grid, wanted: np.dtype) -> list[Step]:
    """The operators that make another type of int8 or int16.

    Args:
      own: the type that there is.
      grid: what its integers mean.
      wanted: the type that is to be.
    """
    if wanted == own:
        return []
    if wanted == _FLOAT32:
        return [Step("DEQUANTIZE", _FLOAT32, None)]
    steps = []
    if own == _INT16:  # there is no way from int16 to uint8 but by int8
        coarse = Grid(grid.scale * np.float32(256), 0, -128, 127)
        grid = _PROBABILITIES[_INT8] if grid is _PROBABILITIES[_INT16] else coarse
        steps.append(Step("QUANTIZE", _INT8, grid))
    if wanted == _UINT8:
        unsigned = Grid(grid.scale, grid.zero_point + _SHIFT, 0, 255)
        steps.append(Step("QUANTIZE", _UINT8, unsigned))
    return steps


# The input.


def pixels_as(
    pixels: np.ndarray, dtype: np.dtype, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Pixels as a file takes them, of the same shape.

    Args:
      pixels: uint8 (..., channels).
      dtype: what the file takes: uint8, int8 or float32.
      mean: float32 pixels are (pixel - mean) / std; (1,) or (channels,).
      std: see `mean`.
    """
    if dtype == _FLOAT32:
        values = pixels.astype(np.float32) - np.array(mean, np.float32)
        return values / np.array(std, np.float32)
    return pixels if dtype == _UINT8 else (pixels ^ _SHIFT).view(np.int8)


def image_grid(network: Integers, dtype: np.dtype) -> Grid | None:
    """What the integers of the input mean; None for floats.

    Args:
      network: its pixels have one mean, a whole number, and one scale.
      dtype: of the input.
    """
    said = network.description
    scale = np.array(said.input_scale[:1], np.float32)
    unsigned = Grid(scale, round(said.input_mean[0]), 0, 255)
    signed = Grid(scale, unsigned.zero_point - _SHIFT, -128, 127)
    return {_UINT8: unsigned, _INT8: signed}.get(dtype)


# The output.


def add_answers(file: File, network: Integers, logits: Tensor, ends: Ends) -> Tensor:
    """Adds the operators behind the logits.

    Args:
      file: gets them.
      network: of the file.
      logits: what the network gives.
      ends: of the file.

    Returns:
      What the file gives.
    """
    tensor = logits
    for i, step in enumerate(ends.steps, start=1):
        name = ends.output_name
        name = name if i == len(ends.steps) else f"{name}/{step.operator.lower()}"
        while name in network.graph.nodes:  # a layer of the user's may be called so
            name += "_"
        shape, constants, options = tensor.shape, [], None
        if step.operator == "SOFTMAX":
            options = schema.SoftmaxOptionsT()
            options.beta = 1.0
        elif step.operator == "STRIDED_SLICE":  # the second column, of any batch
            shape = (*shape[:-1], 1)
            options = schema.StridedSliceOptionsT()
            options.beginMask = options.endMask = 1
            constants = [
                file.constant(f"{name}/{role}", np.array(numbers, np.int32))
                for role, numbers in (("begin", (0, 1)), ("end", (0, 2)))
            ]
            constants.append(file.constant(f"{name}/strides", np.ones(2, np.int32)))
        output = file.tensor(name, shape, step.dtype, step.grid)
        inputs = [tensor, *constants]
        version = version_of(step.operator, inputs, network.is_wide)
        file.operator(step.operator, version, inputs, output, options)
        tensor = output
    return tensor


def answers(logits: np.ndarray, ends: Ends) -> np.ndarray:
    """What a file gives for its logits, as NumPy computes it.

    Args:
      logits: what the integers of the logits mean, float32 (n, num_classes).
      ends: of the file.

    Returns:
      What the file's output means, float64 (n, number of outputs).
    """
    values = logits.astype(np.float64)
    for operator, _, grid in ends.steps:
        if operator == "SOFTMAX":
            values = softmax(values)
        elif operator == "LOGISTIC":
            values = 1 / (1 + np.exp(-values))
        elif operator == "STRIDED_SLICE":
            values = values[:, 1:]
        if grid is not None:
            integers = np.rint(values / grid.scale) + grid.zero_point
            integers = np.clip(integers, grid.lowest, grid.highest)
            values = (integers - grid.zero_point) * grid.scale
    return values
