"""Integer grids: what integers mean, which outputs share a grid, how many bits.

All who need to know whose range an output has ask `owners`: ranges, bits, the student's
quantizers, the writer and the reports.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dfq_tf.errors import ConfigError, UnsupportedLayerError
from dfq_tf.graph import (
    GLOBAL_POOLS,
    KINDS,
    Bounds,
    Exactly,
    Graph,
    Node,
    frozen,
    layers,
    unique_name,
)
from dfq_tf.settings import BitWidths, MixedWidths

LARGEST_INT8 = 127
_LARGEST_INT16 = 2**15 - 1
# Of one channel's factor over that of most: beyond it, images say how far it reaches.
_MOST_APART = 4.0
# LiteRT sums the integers of an average in int32, and adds half a value to round. Of
# int16, so many always fit; of int8, more than the largest image has.
_MOST_SUMMED_INT16 = (2**31 - 1) // _LARGEST_INT16 - 1


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

    @property
    def ends(self) -> tuple[np.float32, np.float32]:
        """The lowest and the highest value, of a tensor with one scale."""
        (scale,) = self.scale.astype(np.float32)
        lowest, highest = (
            scale * np.float32(integer - self.zero_point)
            for integer in (self.lowest, self.highest)
        )
        return lowest, highest

    def same_as(self, other: "Grid") -> bool:
        """Whether the same integers mean the same values."""
        same_scale = np.array_equal(self.scale, other.scale)
        return same_scale and self.zero_point == other.zero_point


def is_symmetric(num_bits: int) -> bool:
    """Whether activations of this width have a range around 0: those of int16 do."""
    return num_bits > 8


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
    largest, top = 2**num_bits - 1, LARGEST_INT8
    scale = (np.float32(high) - np.float32(low)) / np.float32(largest)
    # As TensorFlow's fake quantization moves 0 onto the grid.
    zero = int(np.clip(np.floor(-np.float32(low) / scale + 0.5), 0, largest))
    return Grid(np.array([scale]), zero + top - largest, top - largest, top)


def as_int16(grid: Grid) -> Grid:
    """The same values of an 8-bit grid among int16's, on a finer grid."""
    scale = grid.scale / np.float32(128)
    return Grid(scale, 0, -_LARGEST_INT16, _LARGEST_INT16)


def slope_integers(slopes: Sequence[float]) -> tuple[np.ndarray, float]:
    """The slopes of a prelu in int8, (channels,), and what one step of them is worth.

    All channels have one scale. Slopes that `with_rounded_slopes` gives stay what they
    are.

    Args:
      slopes: one for each channel.
    """
    values = np.asarray(slopes, np.float64)
    scale = float(np.float32(np.abs(values).max() / LARGEST_INT8)) or 1.0
    return np.rint(values / scale).astype(np.int8), scale


def with_rounded_slopes(graph: Graph) -> Graph:
    """The graph whose prelu nodes have the slopes that a file will hold.

    Args:
      graph: of a network; it is given back if it has no such node.
    """
    rounded = {}
    for name, node in graph.nodes.items():
        if node.kind == "prelu":
            integers, scale = slope_integers(node.settings["slopes"])
            slopes = {"slopes": tuple((integers * scale).tolist())}
            rounded[name] = [dataclasses.replace(node, settings=frozen(slopes))]
    return graph.replaced(rounded) if rounded else graph


# Which outputs there are, and who shares a grid.


def is_taken_in(graph: Graph, name: str) -> bool:
    """Whether the ReLU behind a node is in the node's operator.

    The node's own output is then never stored, and must not be quantized.
    """
    consumers = graph.consumers(name)
    return (
        KINDS[graph.nodes[name].kind].takes_in_relu
        and len(consumers) == 1
        and consumers[0].kind == "relu"
    )


def shares_grid(graph: Graph, node: Node) -> bool:
    """Whether a node's output has the grid of its inputs.

    Its operator copies integers and cannot rescale. So it is with a ReLU behind such an
    operator, unless the ReLU has a top where its range must end.
    """
    if KINDS[node.kind].grid == "shared":
        return True
    (source, *others) = graph.sources(node) or [node]
    return (
        node.kind == "relu"
        and not others
        and KINDS[source.kind].grid == "shared"
        and KINDS[node.kind].bounds(node, 8) is None
    )


def owners(graph: Graph) -> dict[str, str]:
    """Whose grid the stored output of each node has.

    Nodes that copy integers form a group with all their inputs; the first node of a
    group owns its grid.

    Returns:
      Name of a node -> name of the owner, which is one of `measured`. Neither the
      image nor a node that `is_taken_in` is among them.
    """
    owner: dict[str, str] = {}
    for name, node in list(graph.nodes.items())[1:]:
        if is_taken_in(graph, name):
            continue
        owner[name] = name
        if shares_grid(graph, node):
            groups = {owner[source] for source in node.inputs}
            first = next(each for each in owner if each in groups)
            united = {*groups, name}
            owner = {k: first if v in united else v for k, v in owner.items()}
    return owner


def is_average(node: Node) -> bool:
    """Whether a node's output is an average of integers, on their own grid."""
    return node.kind == "average_pool"


def _is_rounded(node: Node) -> bool:
    """Whether a node's output has other values than its inputs, on their own grid."""
    return is_average(node) or node.kind == "bilinear_upsampling"


def groups(graph: Graph) -> dict[str, list[str]]:
    """Owner of a grid -> the nodes whose outputs have it, in order."""
    found: dict[str, list[str]] = {}
    for name, owner in owners(graph).items():
        found.setdefault(owner, []).append(name)
    return found


def measured(graph: Graph) -> list[str]:
    """Names of the nodes whose outputs are measured and quantized, the pixels first.

    The rest are taken in, or have no other values than their one input. An average
    and what lies between pixels have others, and are rounded, though on their input's
    grid.
    """
    return [
        name
        for name, node in list(graph.nodes.items())[1:]
        if not is_taken_in(graph, name)
        and (
            KINDS[node.kind].grid == "own" or len(node.inputs) > 1 or _is_rounded(node)
        )
    ]


def pooled(graph: Graph) -> set[str]:
    """Names of the global pools, and of the nodes behind them that have one position.

    A gate's product with the whole map, as of squeeze-and-excite, is none of them.
    """
    found: set[str] = set()
    for name, node in graph.nodes.items():
        is_behind = any(source in found for source in node.inputs)
        has_one_position = all(size == 1 for size in node.shape[:-1])
        if node.kind in GLOBAL_POOLS or (is_behind and has_one_position):
            found.add(name)
    return found


def bounds_of(graph: Graph, names: list[str], num_bits: int) -> Bounds:
    """What the operators of nodes that share a grid demand of it; the first demand."""
    demands = (
        KINDS[graph.nodes[n].kind].bounds(graph.nodes[n], num_bits) for n in names
    )
    return next((each for each in demands if each is not None), None)


def separated(graph: Graph) -> Graph:
    """Puts a requantize where a grid cannot be shared.

    A node that copies integers of several inputs needs one grid for all. Where they
    demand different ones, as a sigmoid and a convolution do, those with a demand are
    rescaled first, however many poolings and reshapes lie between.
    """
    while True:
        found = _first_conflict(graph)
        if found is None:
            return graph
        node, sources = found
        taken, inputs, copies = set(graph.nodes), [], {}
        for name in node.inputs:
            if name in sources and name not in copies:
                copy = unique_name(taken, f"{name}_requantized")
                taken.add(copy)
                copies[name] = layers.node("requantize", copy, [graph.nodes[name]])
            inputs.append(copies[name].name if name in copies else name)
        graph = graph.replaced({node.name: [*copies.values(), node.reading(*inputs)]})


def _first_conflict(graph: Graph) -> tuple[Node, list[str]] | None:
    """The first node whose inputs demand different grids, and those that demand any.

    Widths come later, so those of 8 and of 16 bits count: pixels may demand what a
    curve does of 8 bits, and not of 16.
    """
    nothing = None, None
    demands: dict[str, tuple[Bounds, Bounds]] = {}
    for name, node in list(graph.nodes.items())[1:]:
        if not shares_grid(graph, node):
            bounds = KINDS[node.kind].bounds
            demands[name] = bounds(node, 8), bounds(node, 16)
            continue
        found = [demands[source] for source in node.inputs]
        if len(set(found)) > 1:
            return node, [s for s in node.inputs if demands[s] != nothing]
        demands[name] = found[0]
    return None


# How many bits.


def activation_bits(graph: Graph, widths: BitWidths) -> dict[str, int]:
    """Bits of the output of each of `measured`.

    Pixels have 8, and what only moves or scales their channels has 8 or more. So have
    sigmoid and tanh, whose range is fixed, and the logits, on which the answer hangs.
    What no convolution or dense layer reads has at least `num_bits_sum`, a gate and
    what it scales among it: no kernel is multiplied with it. Outputs that share a grid
    share the most bits of any of them.
    """
    width, owner, names = widths.num_bits_activation, owners(graph), measured(graph)
    multiplying = filter(_multiplies, graph.nodes.values())
    read = {owner.get(source) for node in multiplying for source in node.inputs}
    most = dict.fromkeys(owners_of_logits(graph, owner), 8)
    of_pixels = _of_pixels(graph)
    for name in names:
        node = graph.nodes[name]
        least = widths.num_bits_sum if owner[name] not in read else width
        is_fixed = isinstance(KINDS[node.kind].bounds(node, 8), Exactly)
        if is_fixed or name in of_pixels:
            least = 8
        bits = 8 if node.kind == "pixels" else max(least, width)
        most[owner[name]] = max(bits, most.get(owner[name], 0))
    return {name: most[owner[name]] for name in names}


def owners_of_logits(graph: Graph, owner: Mapping[str, str]) -> set[str]:
    """Whose grids the logits have, and what an exact kernel alone makes them of.

    Such a kernel makes two logits of the one score of two classes.

    Args:
      graph: of `post_training.float_network`.
      owner: from `owners`, of the same graph.
    """
    node, found = graph.last, {owner[graph.output]}
    while layers.has_kernel(node) and _is_exact(node):
        (node,) = graph.sources(node)
        found.add(owner.get(node.name, node.name))
    return found


def _multiplies(node: Node) -> bool:
    """Whether a node is a convolution or a dense layer, not one factor per channel."""
    return layers.has_kernel(node) and not _is_factor(node)


def _is_factor(node: Node) -> bool:
    """Whether a node is a depthwise convolution of 1x1: one factor per channel.

    So is what is left of a BatchNormalization behind a sum, or of a normalisation of
    pixels that is no zero point.
    """
    is_depthwise = node.kind == "depthwise_conv"
    return is_depthwise and node.weights["kernel"].shape[:2] == (1, 1)


def _of_pixels(graph: Graph) -> set[str]:
    """The pixels, and what hangs on them alone: moved, averaged, scaled by channel.

    Few bits would leave few greys of them.
    """
    found: set[str] = set()
    for name, node in graph.nodes.items():
        is_behind = all(source in found for source in node.inputs)
        is_same = node.kind == "requantize" or shares_grid(graph, node)
        is_led_on = is_same or _scales_channels(graph, node)
        if node.kind == "pixels" or is_behind and is_led_on:
            found.add(name)
    return found


def _scales_channels(graph: Graph, node: Node) -> bool:
    """Whether a node is one factor per channel, or the ReLU that its operator takes."""
    if node.kind != "relu":
        return _is_factor(node)
    (source,) = graph.sources(node)
    return _is_factor(source) and is_taken_in(graph, source.name)


def known_ranges(graph: Graph) -> dict[str, tuple[float, float]]:
    """Ranges that need no images: of what a factor for each channel makes of pixels.

    A normalisation that is no zero point is one, and so is a BatchNormalization on the
    image. Behind a reshape none is known: a factor of a place that is always black may
    be huge. Nor is it where one channel is scaled much farther than most.

    Returns:
      Name of such a factor, or of the ReLU that its operator takes in -> what the
      darkest and the brightest pixels become, the widest of all channels.
    """
    ends: dict[str, list[np.ndarray]] = {}
    found: dict[str, tuple[float, float]] = {}
    for name, node in graph.nodes.items():
        if node.kind == "pixels":
            ends[name] = [np.array([node.settings[end]]) for end in ("low", "high")]
        elif _scales_channels(graph, node):
            (source,) = node.inputs
            if source in ends and not _is_lopsided(node):
                a, b = (_scaled(node, values) for values in ends[source])
                ends[name] = [np.minimum(a, b), np.maximum(a, b)]
                found[name] = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
    return found


def _is_lopsided(node: Node) -> bool:
    """Whether a factor is much larger for one channel than for most.

    A channel that was the same in all images has such a factor. It would take the grid
    from all others.
    """
    if node.kind == "relu":
        return False
    scales = np.abs(node.weights["kernel"])
    return bool(scales.max() > _MOST_APART * np.median(scales))


def _scaled(node: Node, values: np.ndarray) -> np.ndarray:
    """What a factor or its ReLU makes of one value for each channel, or for all."""
    if node.kind == "relu":
        return np.clip(values, 0.0, node.settings["top"])
    kernel = node.weights["kernel"][0, 0].astype(np.float64)
    return (kernel * values[:, None]).ravel() + node.weights.get("bias", 0.0)


def check_widths(graph: Graph, widths: BitWidths) -> None:
    """Raises UnsupportedLayerError, naming all layers that cannot have these widths.

    Args:
      graph: of a network, rewritten for integers; or not, for widths that name no node.
      widths: bits of weights and activations.

    Raises:
      ConfigError: the bits of a kernel are given that is not there.
    """
    kernel_bits(graph, widths)
    if not is_symmetric(widths.num_bits_activation):
        return
    found = [(node, _reason_at_16_bits(graph, node)) for node in graph.nodes.values()]
    problems = [layers.problem(node, reason) for node, reason in found if reason]
    if problems:
        advice = "Take activations of 8 bits or fewer, as with --widths=W8A8"
        raise UnsupportedLayerError.of(problems, advice)


def _reason_at_16_bits(graph: Graph, node: Node) -> str | None:
    count = 0
    if node.kind == "global_average_pool":
        (source,) = graph.sources(node)
        count = math.prod(side or 1 for side in source.shape[:2])
    elif node.kind == "average_pool":
        count = math.prod(node.settings["size"])
    if count > _MOST_SUMMED_INT16:
        return (
            f"it averages {count:,} values of 16 bits, whose sum LiteRT keeps in 32 "
            f"bits, with room for {_MOST_SUMMED_INT16:,}"
        )
    if KINDS[node.kind].operator == "DEPTH_TO_SPACE":
        return "LiteRT has DEPTH_TO_SPACE, of which it consists, for 8 bits alone"
    if KINDS[node.kind].operator == "LOOKUP":
        return "it is read from a table of 256 values, too few for 16 bits"
    if KINDS[node.kind].operator == "NORMALIZE":
        return "it has sums of 32 bits, too few for squares of 16 bits"
    return None


def _is_exact(node: Node) -> bool:
    """Whether any number of bits holds a kernel: all in it is one number, -it, or 0."""
    kernel = np.abs(node.weights["kernel"])
    return bool(np.all((kernel == 0) | (kernel == kernel.max(initial=0))))


def _ends(graph: Graph, names: set[str]) -> tuple[set[str], set[str]]:
    """Of some nodes, those that none of them precedes, and those that none follows."""
    nodes, after, before = list(graph.nodes.values()), set[str](), set[str]()
    for node in nodes:
        if any(source in names or source in after for source in node.inputs):
            after.add(node.name)
    for node in reversed(nodes):
        if node.name in names or node.name in before:
            before.update(node.inputs)
    return names - after, names - before


def kernel_bits(graph: Graph, widths: BitWidths) -> dict[str, int]:
    """Bits of the kernel of each node that has one.

    Several stems have a first kernel each, and several heads a last one.

    Raises:
      ConfigError: the bits of a kernel are given that is not there.
    """
    with_kernels = [n for n in graph.nodes.values() if layers.has_kernel(n)]
    whole = [node for node in with_kernels if node.kind != "depthwise_conv"]
    # A mean of channels, say, needs no bits: it is not what is meant by a first layer.
    others = {n.name for n in whole if not _is_exact(n)} or {n.name for n in whole}
    first, last = _ends(graph, others)
    bits = {
        node.name: widths.num_bits_depthwise
        if node.kind == "depthwise_conv"
        else widths.num_bits_weight
        for node in with_kernels
    }
    bits |= dict.fromkeys(last, widths.num_bits_last)
    bits |= dict.fromkeys(first, widths.num_bits_first)
    given = dict(widths.layer_bits) if isinstance(widths, MixedWidths) else {}
    for name in given:
        if name not in bits:
            raise ConfigError(
                f"layer_bits names {name!r}, which is no node with a kernel; those are "
                + ", ".join(bits)
            )
    return {**bits, **given}
