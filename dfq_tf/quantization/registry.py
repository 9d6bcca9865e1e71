"""What each layer becomes in integers: which weights and which outputs are quantized.

The converter fuses some layers into one integer operator. A tensor inside such an
operator is never stored, so it must not be fake-quantized either.
"""

from typing import Any

import tensorflow_model_optimization as tfmot

from dfq_tf.compat import keras, tf
from dfq_tf.errors import LayerProblem, UnsupportedLayerError
from dfq_tf.graph.graph import Graph, Node
from dfq_tf.graph.rewriting import activation_name, is_relu
from dfq_tf.quantization.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    is_symmetric,
)
from dfq_tf.quantization.ranges import Range
from dfq_tf.settings import BitWidths

# Layers with a kernel -> the attribute that holds it.
KERNELS = {"Conv2D": "kernel", "DepthwiseConv2D": "depthwise_kernel"}
# Layers that compute new values.
_COMPUTING = (
    "Add",
    "Subtract",
    "Multiply",
    "GlobalAveragePooling2D",
    "LeakyReLU",
    "Concatenate",
)
# Layers of two inputs whose operator takes a ReLU in.
MERGES = ("Add", "Subtract", "Multiply")
# Activations with an operator of their own, and the range that it asks for: all
# integers of 8 bits, or of 16, with steps of 1/256 and 1/128, or 1/32768.
_FIXED_RANGES: dict[str, Range] = {
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),
}
_FIXED_RANGE_16 = (-32767 / 32768, 32767 / 32768)
# Layers whose integer output has the scale of their input.
SAME_SCALE = (
    "MaxPooling2D",
    "AveragePooling2D",
    "GlobalMaxPooling2D",
    "Flatten",
    "Reshape",
    "ZeroPadding2D",
)
_POOLING = ("MaxPooling2D", "AveragePooling2D")
_FUSED_ACTIVATIONS = ("linear", "relu", "relu6")

SUPPORTED = (
    "Conv2D, DepthwiseConv2D, SeparableConv2D, Dense, BatchNormalization, the "
    "activations relu, relu6, leaky_relu, swish, sigmoid, tanh, hard_swish and "
    "hard_sigmoid, Add, Subtract, Multiply, Concatenate, Flatten, Reshape, "
    "ZeroPadding2D, max and average pooling, Rescaling and Normalization, dropout, "
    "noise and augmentation layers"
)


def check_supported(graph: Graph) -> None:
    """Raises UnsupportedLayerError, naming all layers that have no integer form.

    Args:
      graph: a network that `rewrite.fold` has rewritten.
    """
    reasons = {node.name: _problem(node) for node in graph.nodes.values()}
    problems = [
        LayerProblem(name, graph.nodes[name].kind, reason)
        for name, reason in reasons.items()
        if reason
    ]
    if problems:
        raise UnsupportedLayerError.of(problems, f"What can be: {SUPPORTED}")


def _problem(node: Node) -> str | None:
    activation = activation_name(node)
    if node.config.get("data_format", "channels_last") not in ("channels_last", None):
        return "its data_format is channels_first"
    if node.kind in KERNELS:
        if activation not in _FUSED_ACTIVATIONS:
            return f"its activation is {activation}"
        return None
    if node.kind in MERGES and len(node.inputs) != 2:
        return f"it has {len(node.inputs)} inputs; write it as layers of two inputs"
    if is_relu(node) or node.kind in ("InputLayer", *_COMPUTING, *SAME_SCALE):
        return None
    if node.kind == "Activation":
        if activation in _FIXED_RANGES:
            return None
        return f"its activation is {activation}"
    if node.kind == "ReLU":
        return "only a ReLU without slope and threshold is known"
    return "there is no integer form for it here"


def fixed_range(node: Node, num_bits: int) -> Range | None:
    """The range that a node's operator asks for; None if it takes any.

    Args:
      node: of a network that `rewrite.fold` has rewritten.
      num_bits: 8 or 16.
    """
    if node.kind != "Activation" or activation_name(node) not in _FIXED_RANGES:
        return None
    if is_symmetric(num_bits):
        return _FIXED_RANGE_16
    return _FIXED_RANGES[activation_name(node)]


def has_quantized_output(graph: Graph, node: Node) -> bool:
    """Whether the integer network stores this node's output with a scale of its own."""
    if node.kind in ("InputLayer", *SAME_SCALE):
        return False
    consumers = graph.consumers(node.name)
    is_fused = (
        node.kind in (*KERNELS, *MERGES)
        and len(consumers) == 1
        and is_relu(consumers[0])
        and node.name != graph.output_name
        and activation_name(node) == "linear"
    )
    return not is_fused


def tied_outputs(graph: Graph) -> list[set[str]]:
    """Groups of nodes whose outputs must share one range.

    A concatenation copies integers, so its inputs need the scale of its output. A
    ReLU behind a pooling becomes a part of it, and a pooling cannot change the scale.
    """
    groups: list[set[str]] = []
    for node in graph.nodes.values():
        if _keeps_scale(graph, node):
            group = {node.name, *(range_owner(graph, name) for name in node.inputs)}
            for other in [g for g in groups if g & group]:
                group |= other
                groups.remove(other)
            groups.append(group)
    return groups


def _keeps_scale(graph: Graph, node: Node) -> bool:
    """Whether this node's integer operator, not in SAME_SCALE, cannot rescale."""
    if is_relu(node):
        return graph.nodes[node.inputs[0]].kind in _POOLING
    return node.kind == "Concatenate"


def range_owner(graph: Graph, name: str) -> str:
    """The node whose range the output of `name` has."""
    while graph.nodes[name].kind in SAME_SCALE:
        name = graph.nodes[name].inputs[0]
    return name


@keras.utils.register_keras_serializable("dfq_tf")
class LayerQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """Tells tfmot's wrapper which tensors of one layer to fake-quantize.

    Args:
      kernel: the attribute that holds the kernel, None for a layer without one.
      num_bits_weight: bits of the kernel, None for a layer without one.
      num_bits_activation: bits of the output, None if it is not quantized.
      per_channel: one range per output channel of the kernel, or one in all.
    """

    def __init__(
        self,
        kernel: str | None,
        num_bits_weight: int | None,
        num_bits_activation: int | None,
        per_channel: bool,
    ) -> None:
        self.kernel = kernel
        self.num_bits_weight = num_bits_weight
        self.num_bits_activation = num_bits_activation
        self.per_channel = per_channel

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list:
        """The kernel and its quantizer; tfmot calls this when it builds the wrapper."""
        if self.kernel is None or self.num_bits_weight is None:
            return []
        is_depthwise = self.kernel == "depthwise_kernel"
        quantizer = WeightQuantizer(
            self.num_bits_weight, self.per_channel, is_depthwise
        )
        return [(getattr(layer, self.kernel), quantizer)]

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list:
        """None: a fused activation is quantized as the layer's output."""
        return []

    def set_quantize_weights(
        self, layer: keras.layers.Layer, quantize_weights: list[tf.Tensor]
    ) -> None:
        """Puts the fake-quantized kernel in place; tfmot calls this at each call."""
        if self.kernel is not None:
            setattr(layer, self.kernel, quantize_weights[0])

    def set_quantize_activations(
        self, layer: keras.layers.Layer, quantize_activations: list
    ) -> None:
        """Nothing to put in place; tfmot calls this at each call."""
        del layer, quantize_activations

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list:
        """The output's quantizer, if it has one."""
        if self.num_bits_activation is None:
            return []
        return [ActivationQuantizer(self.num_bits_activation)]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "kernel": self.kernel,
            "num_bits_weight": self.num_bits_weight,
            "num_bits_activation": self.num_bits_activation,
            "per_channel": self.per_channel,
        }


def quantize_configs(graph: Graph, widths: BitWidths) -> dict[str, LayerQuantizeConfig]:
    """The configuration of each node's wrapper, by the node's name."""
    bits = activation_bits(graph, widths)
    return {
        name: LayerQuantizeConfig(
            KERNELS.get(node.kind),
            weight_bits(graph, node, widths) if node.kind in KERNELS else None,
            bits.get(name),
            widths.per_channel,
        )
        for name, node in graph.nodes.items()
    }


def weight_bits(graph: Graph, node: Node, widths: BitWidths) -> int:
    """Bits of the kernel of a node that has one."""
    if node.kind == "DepthwiseConv2D":
        return widths.num_bits_depthwise
    convolutions = [n.name for n in graph.nodes.values() if n.kind == "Conv2D"]
    if node.name == convolutions[0]:
        return widths.num_bits_first
    if node.name == convolutions[-1]:
        return widths.num_bits_last
    return widths.num_bits_weight


def activation_bits(graph: Graph, widths: BitWidths) -> dict[str, int]:
    """Bits of each output that is stored with a scale of its own.

    Pixels have 8. Sigmoid and tanh, whose range is fixed, have 8 or more, and so have
    the logits, on which the answer hangs. Outputs that share a range share the most
    bits of any of them.
    """
    width = widths.num_bits_activation
    bits = {
        name: width if fixed_range(node, 8) is None else max(8, width)
        for name, node in graph.nodes.items()
        if has_quantized_output(graph, node)
    }
    pixels = graph.consumers(graph.input_name)[0]
    if pixels.kind == "Activation":
        bits[pixels.name] = 8
    logits = range_owner(graph, graph.output_name)
    bits[logits] = max(8, bits[logits])
    for group in tied_outputs(graph):
        members = group & bits.keys()
        bits.update(dict.fromkeys(members, max(bits[name] for name in members)))
    return bits
