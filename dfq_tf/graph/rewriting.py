"""Rewrites a float network so that each of its nodes has an integer twin.

Every rewrite leaves the function as it was, within float rounding: batch
normalisation goes into the weights before it, or becomes a 1x1 depthwise
convolution, and a softmax at the end goes.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from dfq_tf.errors import LayerProblem, ModelError, UnsupportedLayerError
from dfq_tf.graph import layers
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.layers import KINDS
from dfq_tf.graph.nodes import Graph, Node, frozen, unique_name

# What a network may have, for messages.
SUPPORTED = (
    "Conv2D, DepthwiseConv2D, SeparableConv2D, Conv2DTranspose, Dense, "
    "BatchNormalization, LayerNormalization, GroupNormalization, RMSNormalization, "
    "UnitNormalization, the activations of Keras (relu, relu6, leaky_relu, elu, selu, "
    "gelu, swish, mish, softplus, sigmoid, tanh, exponential, hard_swish and "
    "hard_sigmoid), PReLU, Add, Average, Subtract, Multiply, Maximum, Minimum, "
    "Concatenate, Flatten, Reshape, Permute, ZeroPadding2D, Cropping2D, UpSampling2D, "
    "max and average pooling, also of the whole map, Rescaling and Normalization, "
    "dropout, noise and augmentation layers"
)


def fold(graph: Graph) -> Graph:
    """The rewritten network: no batch normalisation, affine functions or channels."""
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph


def check_supported(graph: Graph) -> None:
    """Raises UnsupportedLayerError, naming all layers without an integer form.

    Args:
      graph: what `fold` gives.
    """
    problems = refused(graph)
    if problems:
        raise UnsupportedLayerError.of(problems, f"What can be: {SUPPORTED}")


def refused(graph: Graph) -> list[LayerProblem]:
    """Why nodes have no integer form, or have weights that are not finite.

    Args:
      graph: what `fold` gives.
    """
    reasons = {node.name: _reason(node) for node in graph.nodes.values()}
    return [
        layers.problem(graph.nodes[name], reason)
        for name, reason in reasons.items()
        if reason
    ]


def _reason(node: Node) -> str | None:
    if not all(np.isfinite(weight).all() for weight in node.weights.values()):
        return (
            "it has NaN or infinite weights; the model was damaged, or its training "
            "diverged"
        )
    return KINDS[node.kind].refuses(node)


# The end of a network.

# What may lie between the layer that computes a logit and a sigmoid.
_AFTER_A_LOGIT = ("affine", "batch_normalization", "global_average_pool", "reshape")


def logits_graph(graph: Graph, description: ModelDescription) -> Graph:
    """The network up to its logits: a softmax or sigmoid at its end is taken off.

    Args:
      graph: the classifier's.
      description: says whether the classifier gives logits, softmax or sigmoid.

    Raises:
      ModelError: the description says softmax or sigmoid, and the last node has none.
    """
    name = description.output
    if name == "logits":
        return graph
    last = graph.last
    if head_activation(graph) != name:
        layer = f"{layers.layer_of(last)} ({layers.title(last)})"
        raise ModelError(
            f"the description says that the model gives {name}, but its last layer "
            f"{layer} has no {name}; if it gives logits, say so"
        )
    return graph.replaced({last.name: []}, {last.name: last.inputs[0]})


def head_activation(graph: Graph) -> str:
    """What the last node gives: 'logits', 'softmax' or 'sigmoid'."""
    kind = graph.last.kind
    return kind if kind in ("softmax", "sigmoid") else "logits"


def activation_last(graph: Graph) -> Graph:
    """Takes a softmax or sigmoid behind the reshapes at the end of a network.

    Args:
      graph: gives one row of scores.
    """
    node = graph.last
    while node.kind == "reshape":
        (node,) = graph.sources(node)
    is_known = node.kind == "sigmoid" or node.shape[-1:] == graph.last.shape
    is_last = node.name == graph.output or len(graph.consumers(node.name)) > 1
    if node.kind not in ("softmax", "sigmoid") or is_last or not is_known:
        return graph
    rest = graph.replaced({node.name: []}, {node.name: node.inputs[0]})
    last = layers.node(node.kind, node.name, [rest.last], layers=node.layers)
    return Graph([*rest.nodes.values(), last], last.name)


def two_class_logits(graph: Graph, is_logit: bool = False) -> Graph:
    """Two logits in place of one: -z / 2 and z / 2, whose softmax is sigmoid(z).

    Args:
      graph: gives one logit z, of the second of two classes.
      is_logit: whether a sigmoid stood behind it, so that it is one whatever gives it.

    Raises:
      UnsupportedLayerError: the last node gives no such logit, but a function of one.
    """
    last = graph.last
    behind = _behind_a_logit(graph)
    kernel = graph.sources(behind[0])[0] if behind else last
    if kernel.kind in ("dense", "conv"):
        made = {kernel.name: [source := _halves(graph, kernel)]}
        for node in behind:
            source = _of_two(node, source)
            made[node.name] = [source]
        return graph.replaced(made)
    if is_logit or last.kind in _AFTER_A_LOGIT:
        weights = {"kernel": np.array([[-0.5, 0.5]])}
        name = unique_name(graph.nodes, f"{last.name}_of_two_classes")
        two = layers.node("dense", name, [last], weights=weights)
        two = dataclasses.replace(two, layers=last.layers)
        return Graph([*graph.nodes.values(), two], two.name)
    problem = layers.problem(
        last,
        "it is the end of a model that gives one score, for two classes, and only "
        "a Dense layer can be made to give two, or a pooling, reshape or "
        "normalisation behind one, with a sigmoid or nothing behind it. Let the "
        "model end with Dense(1) or Dense(1, activation='sigmoid')",
    )
    raise UnsupportedLayerError.of([problem])


def _behind_a_logit(graph: Graph) -> list[Node]:
    """The nodes at the end that only move, scale or average one logit, in order."""
    behind: list[Node] = []
    node = graph.last
    while node.kind in _AFTER_A_LOGIT:
        (source,) = graph.sources(node)
        if source.shape[-1:] != (1,) or len(graph.consumers(source.name)) != 1:
            break
        behind.insert(0, node)
        node = source
    return behind


def _halves(graph: Graph, node: Node) -> Node:
    """The kernel node that gives -z / 2 and z / 2 where one gives z."""
    halves = {
        role: np.concatenate([-weight / 2, weight / 2], axis=-1)
        for role, weight in node.weights.items()
    }
    return layers.node(node.kind, node.name, graph.sources(node), node.settings, halves)


def _of_two(node: Node, source: Node) -> Node:
    """A node behind a logit z, behind -z / 2 and z / 2: it gives its own halves."""
    kind, settings = node.kind, dict(node.settings)
    if kind in ("affine", "batch_normalization"):
        (scale,), (offset,) = affine_of(node)
        kind = "affine"
        halves = (-float(offset) / 2, float(offset) / 2)
        settings = {"scale": float(scale), "offset": halves}
    elif kind == "reshape":
        settings["shape"] = (*node.shape[:-1], 2)
    return layers.node(kind, node.name, [source], settings)


# What `fold` does.

# Kinds of nodes that give the largest of some values of a channel.
_MAXIMA = ("max_pool", "global_max_pool")


def fold_channel_orders(graph: Graph) -> Graph:
    """Lets the kernels of convolutions reorder channels, in place of nodes before."""
    for name in list(graph.nodes):
        node = graph.nodes[name]  # another one may have gone into it
        if node.kind != "channels" or name == graph.output:
            continue
        if not layers.is_order(node, graph.sources(node)[0].shape[-1]):
            continue
        behind = _with_channels_of(graph, name, np.argsort(node.settings["order"]))
        if behind is not None:
            graph = graph.replaced({**behind, name: []}, {name: node.inputs[0]})
    return graph


def _with_channels_of(
    graph: Graph, name: str, order: np.ndarray
) -> dict[str, list[Node]] | None:
    """What stands for the readers of a node whose channels come in another order.

    Args:
      graph: is not changed.
      name: of the node.
      order: where each of the channels that come was before.

    Returns:
      Name of a convolution -> another one; None if something else reads the node.
    """
    replacements = {}
    for reader in graph.consumers(name):
        if reader.kind == "pad":
            behind = _with_channels_of(graph, reader.name, order)
            if behind is None:
                return None
            replacements.update(behind)
        elif reader.kind == "conv" and reader.settings["groups"] == 1:
            kernel = reader.weights["kernel"][:, :, order]
            replacements[reader.name] = [reader.with_weights(kernel=kernel)]
        else:
            return None
    return replacements


def channels_as_convolution(graph: Graph) -> Graph:
    """Writes a choice of channels as a 1x1 convolution with ones in its kernel."""
    replacements = {}
    for name, node in graph.nodes.items():
        if node.kind == "channels" and len(node.shape) == 3:
            sources = graph.sources(node)
            eye = np.eye(sources[0].shape[-1])  # type: ignore[arg-type]
            kernel = eye[:, list(node.settings["order"])][None, None]
            conv = layers.node("conv", name, sources, weights={"kernel": kernel})
            replacements[name] = [conv]
    return graph.replaced(replacements)


def relu_before_pooling(graph: Graph) -> Graph:
    """Writes the ReLU of a maximum as the maximum of ReLUs, which is the same.

    What is before the maximum takes the ReLU in, and its grid ends where that does:
    none of the integers is for values that the ReLU cuts off.
    """
    for name in list(graph.nodes):
        relu = graph.nodes[name]
        pools = _maxima_before(graph, relu) if relu.kind == "relu" else []
        if not pools:
            continue
        (source,) = graph.sources(pools[0])
        is_free = len(graph.consumers(source.name)) == 1
        if not is_free or not KINDS[source.kind].takes_in_relu:
            continue
        # The names stay with the places, and the user's layers with what they do.
        places, moved = [*(pool.name for pool in pools), name], {}
        for place, node in zip(places, [relu, *pools]):
            source = layers.node(
                node.kind, place, [source], node.settings, layers=node.layers
            )
            moved[place] = [source]
        graph = graph.replaced(moved)
    return graph


def _maxima_before(graph: Graph, node: Node) -> list[Node]:
    """The nodes in a row before another one that give maxima to nothing else."""
    (source,) = graph.sources(node)
    if source.kind not in _MAXIMA or len(graph.consumers(source.name)) != 1:
        return []
    return [*_maxima_before(graph, source), source]


def scale_before_relu(graph: Graph) -> Graph:
    """Writes s * relu(x), s > 0, as a ReLU of s * x, whose top is s times as high.

    A scale behind an affine function or a convolution costs nothing, as in relu6(x +
    3) / 6, which becomes min(1, max(0, x / 6 + 0.5)).
    """
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        if node.kind != "affine":
            continue
        scale, offset = affine_of(node)
        relu = graph.nodes[node.inputs[0]]
        is_scale = (scale == scale[0]).all() and scale[0] > 0 and not offset.any()
        if (
            not is_scale
            or relu.kind != "relu"
            or relu.name in replacements
            or len(graph.consumers(relu.name)) != 1
        ):
            continue
        top = relu.settings["top"]
        top = None if top is None else float(top * scale[0])
        # The ReLU takes the name of the scale, whose output it gives now. The user's
        # layers stay with what they do.
        scaled = dataclasses.replace(node, name=relu.name, inputs=relu.inputs)
        settings = frozen({"top": top})
        behind = dataclasses.replace(
            relu, name=name, inputs=(relu.name,), settings=settings
        )
        replacements[relu.name], replacements[name] = [scaled], [behind]
    return graph.replaced(replacements)


def fold_behind_normalization(graph: Graph) -> Graph:
    """Lets the kernels behind a layer normalization do its scale and offset.

    So it costs nothing, and the normalized values, of which all have about the same
    spread, are what is rounded: scales tell channels apart ("gamma migration", Wei et
    al. 2022, "Outlier Suppression"). Where a reader has no kernel, or zeros around its
    input, which have no offset, nothing changes.
    """
    for name in list(graph.nodes):
        node = graph.nodes[name]
        if node.kind != "affine" or name == graph.output:
            continue
        (source,), readers = graph.sources(node), graph.consumers(name)
        scale, offset = affine_of(node)
        is_behind = source.kind == "layer_normalization"
        if is_behind and all(_takes_affine(each, offset) for each in readers):
            behind = {each.name: [_of_affine(each, scale, offset)] for each in readers}
            graph = graph.replaced({**behind, name: []}, {name: source.name})
    return graph


def _takes_affine(reader: Node, offset: np.ndarray) -> bool:
    """Whether a node computes the same of `scale * x + offset` with other weights."""
    if not layers.reads_all_channels(reader) or reader.kind == "conv_transpose":
        return False
    is_padded = reader.settings.get("padding") == "same"
    is_padded = is_padded and reader.weights["kernel"].shape[:2] != (1, 1)
    return not (is_padded and offset.any())


def _of_affine(reader: Node, scale: np.ndarray, offset: np.ndarray) -> Node:
    """The kernel node that computes of x what the reader does of scale * x + offset."""
    kernel = reader.weights["kernel"].astype(np.float64)
    bias = reader.weights.get("bias", np.zeros(1)).astype(np.float64)
    scales, offsets = (layers.along_inputs(reader, each) for each in (scale, offset))
    # The bias is what the kernel makes of an image of offsets.
    summed = layers.by_output(reader, kernel * offsets).sum(axis=0)
    return reader.with_weights(kernel=kernel * scales, bias=bias + summed)


def fold_batch_normalization(graph: Graph) -> Graph:
    """Removes every batch_normalization and affine: both are `scale * x + shift`.

    One that alone reads a kernel's output goes into that kernel and bias. Any other
    becomes a 1x1 depthwise convolution, which computes the same. One on something
    that is neither an image nor a vector stays, to be refused.
    """
    replacements: dict[str, list[Node]] = {}
    renamed: dict[str, str] = {}
    current = dict(graph.nodes)  # with the folded weights, for BN after BN
    taken = set(graph.nodes)
    for name in list(graph.nodes):
        node = current[name]
        if node.kind not in ("batch_normalization", "affine"):
            continue
        scale, shift = affine_of(node)
        source = node.inputs[0]
        while source in renamed:
            source = renamed[source]
        producer = current[source]
        if layers.has_kernel(producer) and len(graph.consumers(node.inputs[0])) == 1:
            current[source] = _scaled(producer, scale, shift)
            replacements[source] = [current[source]]
            replacements[name] = []
            renamed[name] = source
        elif len(node.shape) in (1, 3):
            replacements[name] = _depthwise_affine(taken, node, producer, scale, shift)
            taken.update(each.name for each in replacements[name])
            current[name] = replacements[name][-1]
    return graph.replaced(replacements, renamed)


def affine_of(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, float64 (channels,), of a batch_normalization or affine.

    Of batch normalisation with the moving mean m and variance v: scale = gamma /
    sqrt(v + epsilon) and shift = beta - m * scale.
    """
    if node.kind == "batch_normalization":
        gamma, beta, mean, variance = (
            node.weights[role].astype(np.float64)
            for role in ("gamma", "beta", "mean", "variance")
        )
        scale = gamma / np.sqrt(variance + node.settings["epsilon"])
        return scale, beta - mean * scale
    ones = np.ones(node.shape[-1])  # type: ignore[arg-type]
    return ones * node.settings["scale"], ones * node.settings["offset"]


def _scaled(node: Node, scale: np.ndarray, shift: np.ndarray) -> Node:
    """The kernel node whose output is `scale * output + shift`."""
    kernel = node.weights["kernel"].astype(np.float64)
    bias = node.weights.get("bias", np.zeros(1)).astype(np.float64)
    # The outputs of a depthwise kernel are its last two axes.
    factor = scale.reshape(kernel.shape[-KINDS[node.kind].kernel_outputs :])
    return node.with_weights(kernel=kernel * factor, bias=bias * scale + shift)


def _depthwise_affine(
    taken: set[str], node: Node, source: Node, scale: np.ndarray, shift: np.ndarray
) -> list[Node]:
    """`scale * x + shift` on an image or a vector, under the node's name."""
    if len(node.shape) == 3:
        return [affine_node(node.name, source, scale, shift)]
    # A vector becomes an image of one pixel and back.
    pixel = layers.node(
        "reshape",
        unique_name(taken, f"{node.name}_as_pixel"),
        [source],
        {"shape": (1, 1, *node.shape)},
    )
    middle = unique_name(taken, f"{node.name}_affine")
    changed = affine_node(middle, pixel, scale, shift)
    back = layers.node("reshape", node.name, [changed], {"shape": node.shape})
    return [pixel, changed, back]


def affine_node(name: str, source: Node, scale: np.ndarray, shift: np.ndarray) -> Node:
    """A 1x1 depthwise convolution that computes `scale * x + shift` per channel.

    Args:
      name: of the node.
      source: gives an image.
      scale: (channels,).
      shift: (channels,).
    """
    weights = {"kernel": scale.reshape(1, 1, -1, 1), "bias": shift}
    return layers.node("depthwise_conv", name, [source], weights=weights)


def whole_averages(graph: Graph) -> Graph:
    """Writes an average over the whole image as the global one.

    An average pooling keeps the grid of its input, in which means, which are small
    beside the values, have few steps. The global one has a grid of its own.
    """
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        if node.kind != "average_pool" or node.shape[:2] != (1, 1):
            continue
        (source,) = graph.sources(node)
        sides = zip(node.settings["size"], source.shape[:2])
        if all(side is not None and size >= side for size, side in sides):
            settings = {"keepdims": True}
            replacements[name] = [
                layers.node("global_average_pool", name, [source], settings)
            ]
    return graph.replaced(replacements)


def transposed_convolutions(graph: Graph) -> Graph:
    """Writes a transposed convolution as a convolution whose pixels become blocks.

    TFLite's own operator has the batch among its constants. Of a stride s, the s x s
    outputs that one position of the input begins are channels of a convolution, each
    with the weights that meet it; depth_to_space makes pixels of them. A ReLU that
    alone reads it comes before, where the convolution takes it in.
    """
    replacements: dict[str, list[Node]] = {}
    renamed: dict[str, str] = {}
    taken = set(graph.nodes)
    for name, node in graph.nodes.items():
        if node.kind != "conv_transpose" or len(set(node.settings["strides"])) > 1:
            continue
        readers = graph.consumers(name)
        relu = readers[0] if len(readers) == 1 and readers[0].kind == "relu" else None
        replacements[name] = _as_convolution(taken, graph, node, relu)
        taken.update(each.name for each in replacements[name])
        if relu is not None:
            replacements[relu.name], renamed[relu.name] = [], name
    return graph.replaced(replacements, renamed)


def _as_convolution(
    taken: set[str], graph: Graph, node: Node, relu: Node | None
) -> list[Node]:
    """The nodes of a transposed convolution and its ReLU; the last has its name."""
    kernel, stride = node.weights["kernel"], node.settings["strides"][0]
    before, after, first, last = zip(*(_transposed_side(node, axis) for axis in (0, 1)))
    weights = {"kernel": _block_kernel(kernel, stride)}
    if "bias" in node.weights:
        weights["bias"] = np.tile(node.weights["bias"], stride**2)
    margins, crops = tuple(zip(before, after)), tuple(zip(first, last))
    is_same = margins == _same_margins(weights["kernel"])
    padding = {"padding": "same" if is_same else "valid"}
    steps: list[tuple[str, dict, dict]] = [("conv", padding, weights)]
    if np.any(margins) and not is_same:
        steps.insert(0, ("pad", {"margins": margins}, {}))
    if relu is not None:
        steps.append(("relu", dict(relu.settings), {}))
    if stride > 1:
        steps.append(("depth_to_space", {"block": stride}, {}))
    if np.any(crops):
        steps.append(("crop", {"margins": crops}, {}))
    (source,) = graph.sources(node)
    nodes: list[Node] = []
    for i, (kind, settings, arrays) in enumerate(steps, start=1):
        inner = f"{node.name}_{kind}"
        name = node.name if i == len(steps) else unique_name(taken, inner)
        of = relu.layers if kind == "relu" and relu is not None else node.layers
        source = layers.node(kind, name, [source], settings, arrays, of)
        nodes.append(source)
    return nodes


def _transposed_side(node: Node, axis: int) -> tuple[int, int, int, int]:
    """Zeros before and after an axis of the input, and what is cut off the output.

    With n positions and a kernel of k, its whole output has positions 0 to (n - 1) s +
    k - 1, of which 'same' leaves the first (k - s) // 2 out and has n s.
    """
    size, stride = node.weights["kernel"].shape[axis], node.settings["strides"][axis]
    surplus = max(size - stride, 0)
    is_same = node.settings["padding"] == "same"
    start, more = (surplus // 2, 0) if is_same else (0, surplus)
    taps = -(-size // stride)
    # Blocks from the one with the first output on, to the one with the last.
    first = start // stride
    beyond = (start + more - 1) // stride + 1
    cut = start - first * stride
    return taps - 1 - first, beyond, cut, (beyond - first) * stride - more - cut


def _same_margins(kernel: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The zeros around an image with which a convolution keeps its size."""
    sizes = kernel.shape[:2]
    return tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in sizes)


def _block_kernel(kernel: np.ndarray, stride: int) -> np.ndarray:
    """The kernel of a convolution that gives blocks of a transposed one's outputs.

    Args:
      kernel: (height, width, inputs, outputs).
      stride: of the transposed convolution.

    Returns:
      (ceil(height / stride), ceil(width / stride), inputs, stride^2 outputs).
    """
    height, width, inputs, outputs = kernel.shape
    rows, columns = -(-height // stride), -(-width // stride)
    margins = (rows * stride - height, columns * stride - width)
    padded = np.pad(kernel, [(0, margins[0]), (0, margins[1]), (0, 0), (0, 0)])
    blocks = padded.reshape(rows, stride, columns, stride, inputs, outputs)
    turned = np.transpose(blocks[::-1, :, ::-1], (0, 2, 4, 1, 3, 5))
    return turned.reshape(rows, columns, inputs, stride**2 * outputs)


# What `fold` does, in order.
PASSES: tuple[Callable[[Graph], Graph], ...] = (
    whole_averages,
    fold_channel_orders,
    channels_as_convolution,
    scale_before_relu,
    fold_behind_normalization,
    fold_batch_normalization,
    relu_before_pooling,
    transposed_convolutions,
)
