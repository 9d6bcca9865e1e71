"""Balances the weights of neighbouring layers: cross-layer equalization.

One scale for a whole kernel rounds its small channels to nothing. A factor per
channel moves between a layer and the layers that read it without any change of what
they compute together, so it is chosen to give both sides the same range (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction").
"""

import dataclasses

import numpy as np

from dfq_tf.graph.graph import Graph, Node
from dfq_tf.graph.rewriting import activation_name

# A layer and all layers with kernels that read its output.
Pair = tuple[Node, list[Node]]

# Layers that are f(s * x) = s * f(x) for a factor s > 0 of each channel. ReLU,
# Activation, Reshape and Flatten are so in some of their forms.
_HOMOGENEOUS = (
    "LeakyReLU",
    "MaxPooling2D",
    "AveragePooling2D",
    "GlobalAveragePooling2D",
    "GlobalMaxPooling2D",
    "ZeroPadding2D",
)
_HOMOGENEOUS_ACTIVATIONS = ("linear", "relu")
# The logarithm of a factor that makes no difference any more.
_CONVERGED = 1e-3
# Least range of a kernel that is balanced, as a share of its bias.
_SMALLEST_KERNEL = 1e-3


def equalize(graph: Graph, iterations: int = 20) -> Graph:
    """The same function, with equal ranges in each pair of layers.

    Of channel c, let r1 be the largest magnitude in the kernel that writes it, and r2
    the largest in all kernels that read it. With

      s = sqrt(r1 * r2) / r2

    kernel and bias of the first are divided by s, and the kernels of the second are
    multiplied by s: all ranges of the channel become sqrt(r1 * r2). A channel without
    weights on one side, or with next to none beside its bias, stays as it is. A layer
    that several read has them as one second side. As a layer may be the second of one
    pair and the first of the next, all pairs are gone through until no factor changes.

    Args:
      graph: from `quantization.apply.integer_ready`; it stays as it is.
      iterations: the most passes over all pairs.

    Returns:
      A graph of the same nodes with other weights, float32.
    """
    pairs = equalized_pairs(graph)
    weights = {
        node.name: [weight.astype(np.float64) for weight in node.weights]
        for first, readers in pairs
        for node in (first, *readers)
    }
    for _ in range(iterations):
        changes = [_equalize_pair(weights, *pair) for pair in pairs]
        if max(changes, default=0.0) < _CONVERGED:
            break
    equalized = {
        name: dataclasses.replace(
            graph.nodes[name], weights=tuple(v.astype(np.float32) for v in values)
        )
        for name, values in weights.items()
    }
    return graph.replaced({name: [node] for name, node in equalized.items()}, {})


def equalized_pairs(graph: Graph) -> list[Pair]:
    """Each convolution whose channels can be scaled, and the convolutions that read it.

    Between the two are only layers that pass a factor of a channel on.
    """
    pairs = []
    for node in graph.nodes.values():
        if (
            node.kind in ("Conv2D", "DepthwiseConv2D")
            and activation_name(node) in _HOMOGENEOUS_ACTIVATIONS
        ):
            readers = _readers(graph, node)
            if readers:
                pairs.append((node, readers))
    return pairs


def _readers(graph: Graph, node: Node) -> list[Node]:
    """All kernels behind the node's channels; none if one cannot undo a factor."""
    readers = []
    todo = [node.name]
    while todo:
        name = todo.pop()
        if name == graph.output_name:
            return []
        for consumer in graph.consumers(name):
            if _has_kernel_of_all_channels(consumer):
                readers.append(consumer)
            elif _passes_factors_on(graph, consumer):
                todo.append(consumer.name)
            else:
                return []
    return readers


def _has_kernel_of_all_channels(node: Node) -> bool:
    """Whether axis 2 of the node's kernel is the channels of its input."""
    return node.kind == "DepthwiseConv2D" or (
        node.kind == "Conv2D" and node.config["groups"] == 1
    )


def _passes_factors_on(graph: Graph, node: Node) -> bool:
    """Whether a positive factor of an input channel becomes one of the output's."""
    if node.kind == "Activation":
        return activation_name(node) in _HOMOGENEOUS_ACTIVATIONS
    if node.kind == "ReLU":
        return node.config["max_value"] is None and not node.config["threshold"]
    if node.kind in ("Reshape", "Flatten"):
        # With a last axis of the same length, no channel moves to another place.
        return node.shape[-1] == graph.nodes[node.inputs[0]].shape[-1]
    is_over_last_axis = node.config.get("data_format") in (None, "channels_last")
    return node.kind in _HOMOGENEOUS and is_over_last_axis


def _equalize_pair(
    weights: dict[str, list[np.ndarray]], first: Node, readers: list[Node]
) -> float:
    """Equalizes one pair in `weights`; returns the largest logarithm of a factor."""
    kernel, *bias = weights[first.name]
    # The outputs are the last axis, or the last two of a depthwise kernel.
    by_output = kernel.reshape(-1, first.shape[-1])
    first_ranges = np.abs(by_output).max(axis=0)
    second_ranges = np.max(
        [np.abs(weights[node.name][0]).max(axis=(0, 1, 3)) for node in readers], axis=0
    )
    # A bias is scaled too. Behind a kernel next to nothing it would become huge, and
    # the range of the activations with it.
    floor = _SMALLEST_KERNEL * np.abs(bias[0]) if bias else 0.0
    is_alive = (first_ranges > floor) & (second_ranges > 0)
    # sqrt(r1 / r2) is sqrt(r1 * r2) / r2.
    factors = np.sqrt(
        np.divide(
            first_ranges, second_ranges, out=np.ones_like(first_ranges), where=is_alive
        )
    )
    scaled = (by_output / factors).reshape(kernel.shape)
    weights[first.name] = [scaled, *(value / factors for value in bias)]
    for node in readers:
        kernel, *bias = weights[node.name]
        weights[node.name] = [kernel * factors[:, None], *bias]
    return np.abs(np.log(factors)).max()
