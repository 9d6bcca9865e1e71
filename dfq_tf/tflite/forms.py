"""In which of several forms a file has a kernel: its operator, and bits per weight.

All forms of a layer give the same integers, but for an int4 CONV_2D, whose sums LiteRT
rounds twice. LiteRT's fast part, XNNPACK, takes int4 and int2 kernels of
FULLY_CONNECTED alone. A 1x1 convolution is a FULLY_CONNECTED at each pixel. Any other
one is, once the pixels below each position of its kernel lie side by side: see
`operators`. Which form is best hangs on bytes and on time.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from dfq_tf.graph import KINDS, Graph, ModelDescription, Node, Shape, has_kernel
from dfq_tf.quantization import Grid
from dfq_tf.settings import FileConfig
from dfq_tf.tflite import kernel_costs, targets
from dfq_tf.tflite.kernel_costs import KernelCosts
from dfq_tf.tflite.targets import Target

DENSE = "FULLY_CONNECTED"
# Bits in which a file may have a weight.
_STORED_BITS = (8, 4, 2)

# With --favor=balanced: how many times as long as int8's a form may take.
MOST_SLOWER = 1.3
# What an operator that moves pixels adds to a file, with its tensors (measured).
_OPERATOR_BYTES = 170


class Integers(Protocol):
    """What is asked of a quantized network; see `QuantizedNetwork`."""

    @property
    def graph(self) -> Graph:
        """The network."""

    @property
    def description(self) -> ModelDescription:
        """How the network is fed and read."""

    @property
    def kernel_bits(self) -> Mapping[str, int]:
        """Bits of each kernel."""

    @property
    def is_wide(self) -> bool:
        """Whether activations are int16."""

    def grid(self, name: str) -> Grid:
        """What the integers of a stored output mean."""

    def kernel_integers(self, name: str) -> tuple[np.ndarray, Grid]:
        """A kernel in int8, and what its integers mean."""

    def bias_scale(self, name: str) -> np.ndarray:
        """What one step of a bias is worth."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a file has a kernel.

    Attributes:
      operator: of TFLite.
      num_bits: in which each weight is stored: 8, 4 or 2.
    """

    operator: str
    num_bits: int

    @property
    def name(self) -> str:
        """Such as 'FULLY_CONNECTED int4'."""
        return f"{self.operator} int{self.num_bits}"


def has_choice(network: Integers, config: FileConfig) -> bool:
    """Whether a file may have a kernel in several forms.

    They are chosen by times, which are those of LiteRT beside int8 activations.

    Args:
      network: has the integers.
      config: says what the file is for.
    """
    return targets.has_forms(config.target) and not network.is_wide


def chosen(network: Integers, config: FileConfig) -> dict[str, Form]:
    """Node with a kernel -> the form in which a file has it.

    Args:
      network: has the integers.
      config: says what is favoured, and what the file is for.

    Raises:
      ConfigError: the table of kernel costs cannot be read.
    """
    costs = kernel_costs.read(config.kernel_costs)
    target, may_choose = targets.TARGETS[config.target], has_choice(network, config)
    return {
        name: _best(network, node, config.favor, costs)
        if may_choose
        else _fewest_bits(network, node, target)
        for name, node in network.graph.nodes.items()
        if has_kernel(node)
    }


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """What a layer costs in a file.

    Attributes:
      form: of its kernel.
      num_bytes: of its weights, with the operators before it.
      milliseconds: of one image, by the table; None where it says nothing: of a
        depthwise kernel, beside int16 activations, and for other targets.
    """

    form: Form
    num_bytes: int
    milliseconds: float | None


def layer_costs(network: Integers, config: FileConfig) -> dict[str, LayerCosts]:
    """Node with a kernel -> what it costs in the form that `chosen` gives it."""
    table = kernel_costs.read(config.kernel_costs)
    has_times = has_choice(network, config)
    costs = {}
    for name, form in chosen(network, config).items():
        node = network.graph.nodes[name]
        is_known = has_times and node.kind != "depthwise_conv"
        time = milliseconds(node, form, table) if is_known else None
        costs[name] = LayerCosts(form, num_bytes(node, form), time)
    return costs


def _best(network: Integers, node: Node, favor: str, costs: KernelCosts) -> Form:
    forms = possible(network, node)
    plain = forms[0]
    if node.kind == "depthwise_conv":
        # It has few weights, and XNNPACK takes none of int4.
        return forms[-1] if favor == "size" else plain
    fewest = min(form.num_bits for form in forms)
    if favor != "speed" and fewest == plain.num_bits:
        return plain
    time = {form: milliseconds(node, form, costs) for form in forms}
    size = {form: num_bytes(node, form) for form in forms}
    if favor == "speed":
        return min(forms, key=lambda form: (time[form], size[form]))
    if favor == "balanced":
        most = MOST_SLOWER * time[plain]
        forms = [form for form in forms if time[form] <= most]
    return min(forms, key=lambda form: (size[form], time[form]))


def _fewest_bits(network: Integers, node: Node, target: Target) -> Form:
    """The operator of the target, with int4 where the kernel has so few bits."""
    # LiteRT misreads an int4 kernel of a depthwise convolution behind int16.
    is_misread = network.is_wide and node.kind == "depthwise_conv"
    is_misread |= target.misreads_int4(node)
    bits = 8 if is_misread else max(4, _stored_bits(network.kernel_bits[node.name]))
    operator = KINDS[node.kind].operator
    if target.instead.get(operator) == "POINTWISE":
        operator = "CONV_2D"
    return Form(operator, bits)


def possible(network: Integers, node: Node) -> list[Form]:
    """All forms of a layer beside int8 activations; int8 by its own operator first.

    Of a FULLY_CONNECTED with int4 or int2, XNNPACK wants the weights of each output to
    begin with a byte.
    """
    operator, kernel = KINDS[node.kind].operator, node.weights["kernel"]
    fewest = _stored_bits(network.kernel_bits[node.name])
    stored = [bits for bits in _STORED_BITS if bits >= fewest]
    inputs = kernel.size // kernel.shape[-1]
    dense = [Form(DENSE, bits) for bits in stored if inputs * bits % 8 == 0]
    if operator == DENSE:
        return dense
    forms = [Form(operator, bits) for bits in stored if bits >= 4]
    is_conv = node.kind == "conv" and _unfolds(network, node)
    return forms + dense if is_conv else forms


def _stored_bits(num_bits: int) -> int:
    """The fewest bits in which a file can have weights of so many bits."""
    return min(bits for bits in _STORED_BITS if bits >= num_bits)


def milliseconds(node: Node, form: Form, costs: KernelCosts) -> float:
    """What a convolution or a dense layer costs in a form."""
    kernel = node.weights["kernel"]
    positions = math.prod(size or 1 for size in node.shape[:-1])
    size, strides = (1, 1), (1, 1)
    if node.kind == "conv":
        size, strides = kernel.shape[:2], node.settings["strides"]
    inputs, outputs = kernel.shape[-2:]
    return costs.of(form.name, size, strides, positions, inputs, outputs)


def num_bytes(node: Node, form: Form) -> int:
    """What a layer's weights take in a form, with the operators before it."""
    kernel = node.weights["kernel"]
    payload = math.ceil(kernel.size * form.num_bits / 8)
    if node.kind != "conv" or form.operator != DENSE:
        return payload
    moves, has_strides = 0, False
    for size, stride in zip(kernel.shape[:2], node.settings["strides"]):
        if size > 1:
            moves += size + 1  # slices, and what puts them side by side
        elif stride > 1:
            moves += 1
        moves += stride > 1
        has_strides |= stride > 1
    has_margins = node.settings["padding"] == "same" and moves
    return payload + _OPERATOR_BYTES * (moves + has_strides + bool(has_margins))


# Pixels below a kernel.


def _unfolds(network: Integers, node: Node) -> bool:
    """Whether a convolution can be a FULLY_CONNECTED."""
    (source,) = network.graph.sources(node)
    if None in (*source.shape, *node.shape) or node.settings["groups"] > 1:
        return False
    return all(after >= 0 for _, after in unfolding_margins(source.shape, node))


def unfolding_margins(shape: Shape, node: Node) -> list[tuple[int, int]]:
    """How many rows and columns must lie around an image: (before, after) of each axis.

    So many that the positions of the kernel fit, and that a stride divides the side.

    Args:
      shape: of the image, (height, width, channels), all of them known.
      node: a convolution that reads it.
    """
    margins = []
    for axis in (0, 1):
        side, count = shape[axis] or 1, node.shape[axis] or 1
        stride = node.settings["strides"][axis]
        kernel = node.weights["kernel"].shape[axis]
        extent = (kernel - 1) * node.settings["dilation"][axis] + 1
        before = 0
        if node.settings["padding"] == "same":
            before = max((count - 1) * stride + extent - side, 0) // 2
        whole = stride * (count + (extent - 1) // stride)
        margins.append((before, whole - before - side))
    return margins
