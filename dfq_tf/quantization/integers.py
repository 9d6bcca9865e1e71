"""The integers that a fake-quantized student stands for.

Fake quantization computes with the real numbers scale * (q - zero_point). This module
reads scales, zero points and integers off the student, whatever they are written to.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.graph.graph import Graph, Node
from dfq_tf.quantization import apply, registry
from dfq_tf.quantization.quantizers import WeightQuantizer, is_symmetric

_LARGEST_INT8 = 127


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of a tensor: scale * (q - zero_point), lowest <= q <= highest.

    Attributes:
      scale: float32 (1,), or (channels,) for a kernel with one scale per output.
      zero_point: the integer that stands for 0.
      lowest: smallest integer.
      highest: largest integer.
    """

    scale: np.ndarray
    zero_point: int
    lowest: int
    highest: int


@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """One layer of the student, in integers.

    Attributes:
      node: the layer without its wrapper: class, configuration, inputs, shape.
      num_bits_weight: bits of the kernel, None without one.
      kernel: int8, in Keras' layout, or None.
      kernel_grid: what the kernel's integers mean, or None.
      bias: float32 (channels,), or None.
      output: what the output's integers mean; None where it is never stored, or has
        the grid of its input.
    """

    node: Node
    num_bits_weight: int | None = None
    kernel: np.ndarray | None = None
    kernel_grid: Grid | None = None
    bias: np.ndarray | None = None
    output: Grid | None = None


def integer_layers(model: keras.Model) -> tuple[Graph, dict[str, IntegerLayer]]:
    """Reads a student of `apply.quantize_graph`.

    Returns:
      The network without its wrappers, and its layers by the names in there.
    """
    wrapped = Graph.from_model(model)
    names = {
        name: apply.unwrapped_name(model.get_layer(name)) for name in wrapped.nodes
    }
    layers = {}
    for name, node in wrapped.nodes.items():
        layer = model.get_layer(name)
        inner = layer.layer if apply.range_variables(layer) else layer
        plain = Node(
            names[name],
            type(inner),
            inner.get_config(),
            (),
            tuple(names[source] for source in node.inputs),
            node.shape,
        )
        layers[plain.name] = _integer_layer(plain, layer)
    graph = Graph((layer.node for layer in layers.values()), names[wrapped.output_name])
    grids = [layer.output for layer in layers.values() if layer.output]
    if any(grid.highest > _LARGEST_INT8 for grid in grids):
        # Pixels of 8 bits among layers of 16: the same values on a finer grid.
        layers = {
            name: dataclasses.replace(layer, output=_as_int16(layer.output))
            for name, layer in layers.items()
        }
    return graph, layers


def _as_int16(grid: Grid | None) -> Grid | None:
    if grid is None or grid.highest > _LARGEST_INT8:
        return grid
    return Grid(grid.scale / np.float32(128), 0, -(2**15) + 1, 2**15 - 1)


def round_biases(model: keras.Model) -> None:
    """Rounds each bias to the integers that a file will hold.

    A bias is added to the sums of products of input and kernel, so it comes in steps
    of (input scale * kernel scale), which are coarse where widths are small. After
    this, the student computes what its file does.

    Args:
      model: of `apply.quantize_graph`, changed in place.
    """
    graph, layers = integer_layers(model)
    for layer in model.layers:
        variables = apply.range_variables(layer)
        if "bias" in variables:
            integer = layers[apply.unwrapped_name(layer)]
            scale = bias_scale(graph, layers, integer)
            bias = variables["bias"]
            bias.assign(np.rint(bias.numpy() / scale) * scale)


def bias_scale(
    graph: Graph, layers: Mapping[str, IntegerLayer], layer: IntegerLayer
) -> np.ndarray:
    """What one step of a layer's bias is worth, float64 (channels,) or (1,)."""
    source = layers[registry.range_owner(graph, layer.node.inputs[0])]
    assert source.output is not None and layer.kernel_grid is not None
    return source.output.scale.astype(np.float64) * layer.kernel_grid.scale


def activation_grid(low: float, high: float, num_bits: int) -> Grid:
    """The integers of an activation in a range.

    Those of 8 bits and fewer are the topmost of the 2^n integers in int8: what is too
    large for the range is then cut off by int8 itself. Those of 16 bits are symmetric.

    Args:
      low: lowest value, at most 0.
      high: highest value, at least 0.
      num_bits: 2 to 8, or 16.
    """
    if is_symmetric(num_bits):
        highest = 2 ** (num_bits - 1) - 1
        scale = np.float32(high) / np.float32(highest)
        return Grid(np.array([scale]), 0, -highest, highest)
    largest, top = 2**num_bits - 1, _LARGEST_INT8
    scale = (np.float32(high) - np.float32(low)) / np.float32(largest)
    # As TensorFlow's fake quantization moves 0 onto the grid.
    zero = int(np.clip(np.floor(-np.float32(low) / scale + 0.5), 0, largest))
    return Grid(np.array([scale]), zero + top - largest, top - largest, top)


def _integer_layer(node: Node, layer: keras.layers.Layer) -> IntegerLayer:
    variables = apply.range_variables(layer)
    if not variables:
        return IntegerLayer(node)
    config = layer.quantize_config
    output = None
    if config.num_bits_activation is not None:
        low, high = (float(variables[f"output_{end}"]) for end in ("min", "max"))
        output = activation_grid(low, high, config.num_bits_activation)
    name = registry.KERNELS.get(node.kind)
    if name is None:
        return IntegerLayer(node, output=output)
    ((_, quantizer),) = config.get_weights_and_quantizers(layer.layer)
    kernel, grid = kernel_integers(
        quantizer, *(variables[f"{name}{end}"].numpy() for end in ("", "_min", "_max"))
    )
    bias = variables["bias"].numpy() if "bias" in variables else None
    return IntegerLayer(node, config.num_bits_weight, kernel, grid, bias, output)


def kernel_integers(
    quantizer: WeightQuantizer, kernel: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, Grid]:
    """A kernel in integers.

    Args:
      quantizer: what quantizes it.
      kernel: float32, in Keras' layout.
      low: the ranges' lower ends, () or (channels,).
      high: the ranges' upper ends.

    Returns:
      int8 like `kernel`, and what the integers mean.
    """
    largest = 2 ** (quantizer.num_bits - 1) - 1
    scale = np.atleast_1d(high).astype(np.float32) / np.float32(largest)
    values = quantizer(kernel, training=False, weights={"min": low, "max": high})
    per_output = scale
    if quantizer.is_depthwise and quantizer.per_channel:
        per_output = scale.reshape(kernel.shape[2:])
    integers = np.rint(np.asarray(values) / per_output).astype(np.int8)
    return integers, Grid(scale, 0, -largest, largest)
