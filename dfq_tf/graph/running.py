"""Runs a graph: its float function, or that of its integers by two hooks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfq_tf.compat import tf
from dfq_tf.graph.layers import KINDS
from dfq_tf.graph.nodes import Graph, Node, leading_to

FLOAT = 4  # bytes of a value

# What a pass without gradients may take, in bytes: more images would not make it
# faster.
PASS_MEMORY = 2 * 2**30

# Images that are scored in one pass, and how many tensors as large as the largest may
# be alive in it.
MOST_SCORED, ALIVE = 250, 4

# (node, values) -> values: what a hook does to kernels or outputs.
Hook = Callable[[Node, Any], Any]


def keep(node: Node, values: Any) -> Any:
    """The hook that changes nothing."""
    return values


def compute(
    graph: Graph,
    images: tf.Tensor,
    wanted: Sequence[str],
    *,
    weights: Mapping[str, Mapping[str, Any]] | None = None,
    kernel: Hook = keep,
    output: Hook = keep,
) -> list[tf.Tensor]:
    """Outputs of some nodes, for images; what they do not hang on is not computed.

    Args:
      graph: the network.
      images: normalised, (batch, height, width, channels); all nodes compute in their
        type.
      wanted: names of nodes.
      weights: name of a node -> role -> tensor or variable, as from `frozen_weights`;
        by default the graph's own.
      kernel: changes each kernel before it is used; not called for other weights.
      output: changes each node's output, before others read it.

    Returns:
      One tensor for each of `wanted`.
    """
    nodes = list(graph.nodes.values())
    needed = leading_to(nodes, wanted)
    nodes = [node for node in nodes[1:] if node.name in needed]
    last_use: dict[str, str] = {}
    for node in nodes:
        last_use.update(dict.fromkeys(node.inputs, node.name))
    outputs: dict[str, Any] = {graph.image.name: images}
    for node in nodes:
        name = node.name
        own = dict(node.weights if weights is None else weights[name])
        if "kernel" in own:
            own["kernel"] = kernel(node, own["kernel"])
        inputs = [outputs[source] for source in node.inputs]
        outputs[name] = output(node, KINDS[node.kind].compute(node, inputs, own))
        for source in set(node.inputs):  # what nothing reads any more
            if last_use[source] == name and source not in wanted:
                del outputs[source]
    return [outputs[name] for name in wanted]


def frozen_weights(
    graph: Graph, precision: str = "float32"
) -> dict[str, dict[str, tf.Variable]]:
    """The weights of a graph as variables that nothing trains.

    Compiled functions share variables, where each would hold constants of its own.

    Args:
      graph: the network.
      precision: 'float32' or 'bfloat16', of kernels and biases. BatchNormalization
        keeps float32.
    """
    kept = {"batch_normalization"}
    return {
        node.name: {
            role: tf.Variable(
                tf.cast(value, tf.float32 if node.kind in kept else precision),
                trainable=False,
            )
            for role, value in node.weights.items()
        }
        for node in graph.nodes.values()
    }


def num_values(graph: Graph) -> int:
    """Values in the outputs of all nodes, for one image."""
    return sum(math.prod(size or 1 for size in n.shape) for n in graph.nodes.values())


def largest_output(graph: Graph) -> int:
    """Values in the largest output of a node, for one image."""
    return max(math.prod(size or 1 for size in n.shape) for n in graph.nodes.values())


def images_per_pass(bytes_per_image: int, most: int, least: int = 1) -> int:
    """How many images go through a network: as many as PASS_MEMORY has room for.

    Args:
      bytes_per_image: what is alive at a time.
      most: as many at most.
      least: as many in any case.
    """
    return max(least, min(most, PASS_MEMORY // bytes_per_image))
