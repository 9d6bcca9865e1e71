"""Balances the weights of neighbouring layers: cross-layer equalization.

One scale for a whole kernel rounds its small channels to nothing. A factor per
channel moves between a layer and the layers that read it without any change of what
they compute together, so it is chosen to give both sides the same range (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction").
"""

import numpy as np

from dfq_tf.graph.layers import KINDS, along_inputs, by_output, reads_all_channels
from dfq_tf.graph.nodes import Graph, Node

# A kernel node and all kernel nodes that read its output.
Pair = tuple[Node, list[Node]]

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
    weights on one side, or with next to none beside its bias, stays as it is. A node
    that several read has them as one second side. As a layer may be the second of one
    pair and the first of the next, all pairs are gone through until no factor changes.

    Args:
      graph: from `quantization.post_training.float_network`; it stays as it is.
      iterations: the most passes over all pairs.

    Returns:
      A graph of the same nodes with other weights, float32.
    """
    pairs = equalized_pairs(graph)
    weights = {
        node.name: {role: w.astype(np.float64) for role, w in node.weights.items()}
        for first, readers in pairs
        for node in (first, *readers)
    }
    for _ in range(iterations):
        changes = [_equalize_pair(weights, *pair) for pair in pairs]
        if max(changes, default=0.0) < _CONVERGED:
            break
    return graph.with_weights(weights)


def equalized_pairs(graph: Graph) -> list[Pair]:
    """Each kernel node whose channels can be scaled, and the kernel nodes behind it.

    Between the two are only nodes that pass a factor of a channel on.
    """
    pairs = []
    for node in graph.nodes.values():
        if node.kind in ("conv", "depthwise_conv", "dense"):
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
        if name == graph.output:
            return []
        for consumer in graph.consumers(name):
            if reads_all_channels(consumer):
                readers.append(consumer)
            elif _passes_factors_on(graph, consumer):
                todo.append(consumer.name)
            else:
                return []
    return readers


def _passes_factors_on(graph: Graph, node: Node) -> bool:
    """Whether a positive factor of an input channel becomes one of the output's."""
    if node.kind == "reshape":
        # With a last axis of the same length, no channel moves to another place.
        return node.shape[-1] == graph.sources(node)[0].shape[-1]
    return KINDS[node.kind].homogeneous(node)


def _equalize_pair(
    weights: dict[str, dict[str, np.ndarray]], first: Node, readers: list[Node]
) -> float:
    """Equalizes one pair in `weights`; returns the largest logarithm of a factor."""
    written = weights[first.name]
    matrix = by_output(first, written["kernel"])
    first_ranges = np.abs(matrix).max(axis=0)
    second_ranges = np.max([_input_ranges(weights, node) for node in readers], axis=0)
    # A bias is scaled too. Behind a kernel next to nothing it would become huge, and
    # the range of the activations with it.
    floor = _SMALLEST_KERNEL * np.abs(written["bias"]) if "bias" in written else 0.0
    is_alive = (first_ranges > floor) & (second_ranges > 0)
    # sqrt(r1 / r2) is sqrt(r1 * r2) / r2.
    factors = np.sqrt(
        np.divide(
            first_ranges, second_ranges, out=np.ones_like(first_ranges), where=is_alive
        )
    )
    written["kernel"] = (matrix / factors).reshape(written["kernel"].shape)
    if "bias" in written:
        written["bias"] = written["bias"] / factors
    for node in readers:
        kernel = weights[node.name]["kernel"]
        weights[node.name]["kernel"] = kernel * along_inputs(node, factors)
    return np.abs(np.log(factors)).max()


def _input_ranges(weights: dict[str, dict[str, np.ndarray]], node: Node) -> np.ndarray:
    """Largest magnitude in the kernel for each channel of its input."""
    kernel = np.abs(weights[node.name]["kernel"])
    axis = KINDS[node.kind].kernel_inputs
    return kernel.max(axis=tuple(i for i in range(kernel.ndim) if i != axis))
