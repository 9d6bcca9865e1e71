"""The blocks of a network: parts with one input and one output, one behind the other.

A residual block, or an inverted bottleneck, is one part: what lies between two nodes
that no path goes around. Where nothing branches, each layer is a block.
"""

from collections.abc import Iterator, Sequence

from dfq_tf.graph.layers import GLOBAL_POOLS, has_kernel, image
from dfq_tf.graph.nodes import Graph, Node


def blocks_of(graph: Graph) -> list[Graph]:
    """The blocks of a network, from the image to the output; each has a kernel.

    A layer without a kernel, such as a ReLU, stands with the block before it. A global
    pool stands with the layer behind it: an average tells little of the errors in what
    it averages. A depthwise convolution stands with the layer behind it, and a 1x1
    convolution that widens its input with the depthwise one that it feeds, as in an
    inverted bottleneck.

    Args:
      graph: of a network.

    Returns:
      Graphs of the same nodes. In each, in place of the image, stands what the block
      reads, under the name of the node that gives it. No graph if no node has a kernel.
    """
    parts = list(_parts(graph))
    groups: list[list[Node]] = [[]]
    is_open = True  # whether the block goes on, whatever comes
    for i, part in enumerate(parts):
        is_pool = part[0].kind in GLOBAL_POOLS
        if not is_open and (is_pool or _kinds(part)):
            groups.append([])
        groups[-1] += part
        if is_pool or _kinds(part):
            is_open = not _kinds(part) or _goes_on(graph, part, parts[i + 1 :])
    if len(groups) > 1 and not _kinds(groups[-1]):
        groups[-2:] = [groups[-2] + groups[-1]]
    if not _kinds(groups[-1]):
        return []
    ends = [graph.image.name, *(group[-1].name for group in groups)]
    return [
        Graph([image(end, graph.nodes[end].shape), *group], group[-1].name)
        for end, group in zip(ends, groups)
    ]


def _parts(graph: Graph) -> Iterator[list[Node]]:
    """The nodes behind the image, cut at each that no path goes around."""
    nodes = list(graph.nodes.values())
    last_use = {source: i for i, node in enumerate(nodes) for source in node.inputs}
    part: list[Node] = []
    furthest = 0  # the last node that reads one before this one
    for i, node in enumerate(nodes[1:], start=1):
        part.append(node)
        if furthest <= i:
            yield part
            part = []
        furthest = max(furthest, last_use.get(node.name, i))


def _kinds(part: Sequence[Node]) -> set[str]:
    """The kinds of its nodes that have a kernel."""
    return {node.kind for node in part if has_kernel(node)}


def _goes_on(graph: Graph, part: list[Node], behind: Sequence[list[Node]]) -> bool:
    """Whether a part with kernels stands with the one behind it."""
    if _kinds(part) == {"depthwise_conv"}:
        return True
    (first, *others) = filter(has_kernel, part)
    if others or first.kind != "conv" or first.weights["kernel"].shape[:2] != (1, 1):
        return False
    following: set[str] = next(filter(None, map(_kinds, behind)), set())
    (source,) = graph.sources(first)
    is_wider = (first.shape[-1] or 0) > (source.shape[-1] or 0)
    return is_wider and following == {"depthwise_conv"}
