"""Rewrites a float network so that each of its layers has an integer twin.

Every rewrite leaves the function as it was, within float rounding: batch
normalisation goes into the weights before it, or becomes a 1x1 depthwise
convolution, and what does nothing at inference goes.
"""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.errors import LayerProblem, ModelError, UnsupportedLayerError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph, Node, unique_name
from dfq_tf.importing.operations import (
    Unknown,
    activation_nodes,
    channel_order,
    relu_node,
)
from dfq_tf.importing.preprocessing import TRAINING_ONLY

layers = keras.layers

_KERNELS = ("Conv2D", "DepthwiseConv2D", "Dense")
# Activations that the operator of a kernel takes in, and those with one of their own.
_FUSED = ("relu", "relu6")
_INTEGER_ACTIVATIONS = ("sigmoid", "tanh")


def fold(graph: Graph) -> Graph:
    """The rewritten network: no batch normalisation, no training-only layers.

    Raises:
      UnsupportedLayerError: a batch normalisation is not over the last axis.
    """
    for rewrite in PASSES:
        graph = rewrite(graph)
    return graph


def logits_graph(graph: Graph, description: ModelDescription) -> Graph:
    """The network up to its logits: a softmax or sigmoid at its end is taken off.

    Args:
      graph: the classifier.
      description: says whether the classifier gives logits, softmax or sigmoid.

    Raises:
      ModelError: the description says softmax or sigmoid, and the last layer has none.
    """
    name = description.output
    if name == "logits":
        return graph
    last = graph.nodes[graph.output_name]
    if head_activation(graph) != name:
        raise ModelError(
            f"the description says that the model gives {name}, but its last layer "
            f"{last.name} ({last.kind}) has no {name}; if it gives logits, say so"
        )
    if last.kind in ("Softmax", "Activation"):
        return graph.replaced({last.name: []}, {last.name: last.inputs[0]})
    linear = dataclasses.replace(last, config={**last.config, "activation": "linear"})
    return graph.replaced({last.name: [linear]}, {})


def head_activation(graph: Graph) -> str:
    """What the last layer gives: 'logits', 'softmax' or 'sigmoid'."""
    last = graph.nodes[graph.output_name]
    name = "softmax" if last.kind == "Softmax" else activation_name(last)
    return name if name in ("softmax", "sigmoid") else "logits"


def two_class_logits(graph: Graph) -> Graph:
    """Two logits in place of one: -z / 2 and z / 2, whose softmax is sigmoid(z).

    Args:
      graph: gives one logit z, of the second of two classes.

    Raises:
      UnsupportedLayerError: the last layer has no kernel to split.
    """
    last = graph.nodes[graph.output_name]
    if last.kind != "Dense" or activation_name(last) != "linear":
        raise _unsupported(
            last,
            "it gives the one score of a model of two classes, and only a Dense layer "
            "can be made to give two",
        )
    halves = [np.concatenate([-w / 2, w / 2], axis=-1) for w in last.weights]
    two = dataclasses.replace(
        last,
        config={**last.config, "units": 2},
        weights=tuple(halves),
        shape=(*last.shape[:-1], 2),
    )
    return graph.replaced({last.name: [two]}, {})


def activation_name(node: Node) -> str:
    """The node's `activation` setting, 'linear' if it has none."""
    activation = node.config.get("activation") or "linear"
    if isinstance(activation, dict):  # a function registered by name
        activation = activation["config"]
    return activation if isinstance(activation, str) else str(activation)


def is_relu(node: Node) -> bool:
    """Whether the node is min(top, max(0, x)), which a layer before it can take in."""
    if node.kind == "Activation":
        return activation_name(node) in ("relu", "relu6")
    config = node.config
    return (
        node.kind == "ReLU"
        and (config["max_value"] is None or config["max_value"] > 0)
        and not config["negative_slope"]
        and not config["threshold"]
    )


def relu_top(node: Node) -> float | None:
    """Where a layer that `is_relu` cuts off, None if nowhere."""
    if node.kind == "Activation":
        return 6.0 if activation_name(node) == "relu6" else None
    top = node.config["max_value"]
    return None if top is None else float(top)


def drop_training_only(graph: Graph) -> Graph:
    """Removes the layers that do nothing at inference."""
    gone = {
        name: node.inputs[0]
        for name, node in graph.nodes.items()
        if node.kind in TRAINING_ONLY
        or (node.kind == "Activation" and activation_name(node) == "linear")
    }
    return graph.replaced({name: [] for name in gone}, gone)


def split_separable(graph: Graph) -> Graph:
    """Writes each SeparableConv2D as a depthwise convolution and a 1x1 convolution."""
    taken = set(graph.nodes)
    replacements = {}
    for name, node in graph.nodes.items():
        if node.kind != "SeparableConv2D":
            continue
        config = node.config
        depthwise_name = unique_name(taken, f"{name}_depthwise")
        taken.add(depthwise_name)
        depthwise_kernel, *pointwise = node.weights
        depthwise = Node.of(
            layers.DepthwiseConv2D(
                config["kernel_size"],
                config["strides"],
                config["padding"],
                config["depth_multiplier"],
                dilation_rate=config["dilation_rate"],
                use_bias=False,
            ),
            depthwise_name,
            node.inputs,
            (*node.shape[:-1], int(np.prod(depthwise_kernel.shape[2:]))),
            (depthwise_kernel,),
        )
        conv = Node.of(
            layers.Conv2D(
                config["filters"],
                1,
                activation=keras.activations.deserialize(config["activation"]),
                use_bias=config["use_bias"],
            ),
            name,
            (depthwise_name,),
            node.shape,
            pointwise,
        )
        replacements[name] = [depthwise, conv]
    return graph.replaced(replacements, {})


def fold_channel_orders(graph: Graph) -> Graph:
    """Lets the kernels of convolutions reorder channels, in place of layers before."""
    for name in list(graph.nodes):
        node = graph.nodes[name]  # another one may have gone into it
        order = channel_order(node)
        if order is None:
            continue
        behind = _with_channels_of(graph, name, np.argsort(order))
        if behind is not None:
            replacements = {**behind, name: []}
            graph = graph.replaced(replacements, {name: node.inputs[0]})
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
        if reader.kind == "ZeroPadding2D":
            behind = _with_channels_of(graph, reader.name, order)
            if behind is None:
                return None
            replacements.update(behind)
        elif reader.kind == "Conv2D" and reader.config["groups"] == 1:
            kernel, *bias = reader.weights
            weights = (kernel[:, :, order], *bias)
            new = dataclasses.replace(reader, weights=weights)
            replacements[reader.name] = [new]
        else:
            return None
    return replacements


def split_activations(graph: Graph) -> Graph:
    """Writes activations that no integer operator has as nodes that one has.

    swish(x) is x * sigmoid(x), and a hard sigmoid is a ReLU with a top of 1. A layer
    with such an activation becomes a linear one and these.
    """
    taken = set(graph.nodes)
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        activation = activation_name(node)
        if activation in (*_FUSED, "linear") or name == graph.output_name:
            continue
        linear = node
        if node.kind == "Activation":
            if activation in _INTEGER_ACTIVATIONS:
                continue
            source, before = graph.nodes[node.inputs[0]], []
        elif node.kind in _KERNELS:
            linear = dataclasses.replace(
                node,
                name=unique_name(taken, f"{name}_linear"),
                config={**node.config, "activation": "linear"},
            )
            source, before = linear, [linear]
        else:
            continue
        if activation == "hard_sigmoid":
            activation = "hard_sigmoid_keras2"
        try:
            nodes = activation_nodes(activation, source, name, taken | {linear.name})
        except Unknown:
            continue  # the quantization refuses it, by its name
        replacements[name] = [*before, *nodes]
        taken.update(each.name for each in replacements[name])
    return graph.replaced(replacements, {})


def split_merges(graph: Graph) -> Graph:
    """Writes Add and Multiply of three inputs and more as a chain of those of two."""
    taken = set(graph.nodes)
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        if node.kind not in ("Add", "Multiply") or len(node.inputs) < 3:
            continue
        chain: list[Node] = []
        so_far = node.inputs[0]
        for i, source in enumerate(node.inputs[1:]):
            is_last = i == len(node.inputs) - 2
            link = name if is_last else unique_name(taken, f"{name}_{i + 1}_of_many")
            taken.add(link)
            chain.append(dataclasses.replace(node, name=link, inputs=(so_far, source)))
            so_far = link
        replacements[name] = chain
    return graph.replaced(replacements, {})


def scale_before_relu(graph: Graph) -> Graph:
    """Writes s * relu(x), s > 0, as a ReLU of s * x, whose top is s times as high.

    A scale behind an affine function or a convolution costs nothing, as in relu6(x +
    3) / 6, which becomes min(1, max(0, x / 6 + 0.5)).
    """
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        if node.kind != "Rescaling":
            continue
        scale, offset = affine(node)
        relu = graph.nodes[node.inputs[0]]
        is_scale = (scale == scale[0]).all() and scale[0] > 0 and not offset.any()
        if (
            not is_scale
            or not is_relu(relu)
            or relu.name in replacements
            or len(graph.consumers(relu.name)) != 1
        ):
            continue
        top = relu_top(relu)
        top = None if top is None else top * scale[0]
        # The scale keeps the name of the ReLU, and the ReLU takes that of the scale.
        replacements[relu.name] = [
            dataclasses.replace(node, name=relu.name, inputs=relu.inputs)
        ]
        replacements[name] = [relu_node(name, (relu.name,), node.shape, top)]
    return graph.replaced(replacements, {})


def with_ranges_of_their_own(graph: Graph) -> Graph:
    """Puts an affine layer that changes nothing where a range cannot be shared.

    A concatenation copies integers, so its inputs share a range, and so do a pooling
    and the ReLU behind it. But the operators of sigmoid and tanh have fixed ranges,
    and a ReLU with a top ends where its range does.
    """
    taken = set(graph.nodes)
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        shares_all = node.kind == "Concatenate"
        is_behind_pooling = _has_fixed_range(node) and (
            graph.nodes[node.inputs[0]].kind in ("MaxPooling2D", "AveragePooling2D")
        )
        inputs: list[str] = []
        copies: list[Node] = []
        for source in (graph.nodes[n] for n in node.inputs):
            inputs.append(source.name)
            if is_behind_pooling or (shares_all and _has_fixed_range(source)):
                inputs[-1] = unique_name(taken, f"{source.name}_copy")
                made = _identity(taken, source, inputs[-1])
                taken.update(each.name for each in made)
                copies += made
        if copies:
            changed = dataclasses.replace(node, inputs=tuple(inputs))
            replacements[name] = [*copies, changed]
    return graph.replaced(replacements, {})


def _identity(taken: Collection[str], source: Node, name: str) -> list[Node]:
    copy = dataclasses.replace(source, name=name, inputs=(source.name,))
    ones = np.ones(source.shape[-1])
    return _depthwise_affine(taken, copy, ones, 0 * ones)


def _has_fixed_range(node: Node) -> bool:
    if is_relu(node):
        return relu_top(node) not in (None, 6.0)
    return node.kind == "Activation" and activation_name(node) in _INTEGER_ACTIVATIONS


def fold_batch_normalization(graph: Graph) -> Graph:
    """Removes every BatchNormalization and Rescaling: both are `scale * x + shift`.

    One that alone reads a linear convolution or dense layer goes into its weights
    and bias. Any other becomes a 1x1 depthwise convolution, which computes the same.

    Raises:
      UnsupportedLayerError: its axis is not the last one.
    """
    replacements: dict[str, list[Node]] = {}
    renamed: dict[str, str] = {}
    current = dict(graph.nodes)  # with the folded weights, for BN after BN
    for name in list(graph.nodes):
        node = current[name]
        if node.kind not in ("BatchNormalization", "Rescaling"):
            continue
        scale, shift = affine(node)
        source = node.inputs[0]
        while source in renamed:
            source = renamed[source]
        producer = current[source]
        if _can_take_in(producer) and len(graph.consumers(node.inputs[0])) == 1:
            current[source] = _scaled(producer, scale, shift)
            replacements[source] = [current[source]]
            replacements[name] = []
            renamed[name] = source
        else:
            replacements[name] = _depthwise_affine(graph.nodes, node, scale, shift)
            current[name] = replacements[name][-1]
    return graph.replaced(replacements, renamed)


def dense_as_convolution(graph: Graph) -> Graph:
    """Writes each Dense as a 1x1 convolution of one pixel, which computes the same.

    The TFLite converter takes one scale per output of a convolution's kernel, but not
    of a dense layer's.

    Raises:
      UnsupportedLayerError: the input of a Dense is not a vector.
    """
    taken = set(graph.nodes)
    replacements: dict[str, list[Node]] = {}
    for name, node in graph.nodes.items():
        if node.kind != "Dense":
            continue
        source = graph.nodes[node.inputs[0]]
        kernel, *bias = node.weights
        (*_, units) = node.shape
        conv_layer = layers.Conv2D(
            units,
            1,
            activation=keras.activations.deserialize(node.config["activation"]),
            use_bias=node.config["use_bias"],
        )
        weights = (kernel[None, None], *bias)
        if len(source.shape) == 3:  # of one pixel or more, each by itself
            conv = Node.of(conv_layer, name, node.inputs, node.shape, weights)
            replacements[name] = [conv]
            continue
        if len(source.shape) != 1:
            raise _unsupported(
                node,
                f"it has an input of shape {source.shape}; only vectors and images can "
                "be quantized, put a Flatten before it",
            )
        before = unique_name(taken, f"{name}_as_pixel")
        middle = unique_name(taken, f"{name}_as_conv")
        taken |= {before, middle}
        pixel = (1, 1, *source.shape)
        conv = Node.of(conv_layer, middle, (before,), (1, 1, units), weights)
        replacements[name] = [
            Node.of(layers.Reshape(pixel), before, node.inputs, pixel),
            conv,
            Node.of(layers.Reshape((units,)), name, (middle,), (units,)),
        ]
    return graph.replaced(replacements, {})


def affine(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, float64 (channels,), of a BatchNormalization or Rescaling.

    Raises:
      UnsupportedLayerError: see `batch_normalization_affine`.
    """
    if node.kind == "BatchNormalization":
        return batch_normalization_affine(node)
    channels = node.shape[-1:]
    scale, offset = (
        np.broadcast_to(np.asarray(node.config[key], np.float64), channels)
        for key in ("scale", "offset")
    )
    return scale, offset


def batch_normalization_affine(node: Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift, float64 (channels,), that a BatchNormalization applies.

    With the moving mean m and variance v: scale = gamma / sqrt(v + epsilon) and
    shift = beta - m * scale.

    Raises:
      UnsupportedLayerError: its axis is not the last one.
    """
    gamma, beta, mean, variance = batch_normalization_weights(node)
    scale = gamma / np.sqrt(variance + node.config["epsilon"])
    return scale, beta - mean * scale


def batch_normalization_weights(
    node: Node,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Gamma, beta, moving mean and moving variance, float64 (channels,) each.

    Raises:
      UnsupportedLayerError: its axis is not the last one.
    """
    axis = node.config["axis"]
    axis = axis[0] if isinstance(axis, (list, tuple)) else axis
    if axis not in (-1, len(node.shape)):
        raise _unsupported(
            node, f"it has axis {axis}; only the last axis, the channels, can be"
        )
    weights = [w.astype(np.float64) for w in node.weights]
    gamma = weights.pop(0) if node.config["scale"] else np.ones(weights[0].shape)
    beta = weights.pop(0) if node.config["center"] else np.zeros(weights[0].shape)
    return gamma, beta, weights[0], weights[1]


def _can_take_in(node: Node) -> bool:
    return node.kind in _KERNELS and activation_name(node) == "linear"


def _scaled(node: Node, scale: np.ndarray, shift: np.ndarray) -> Node:
    """The layer whose output is `scale * output + shift`."""
    kernel = node.weights[0].astype(np.float64)
    bias = node.weights[1].astype(np.float64) if node.config["use_bias"] else 0.0
    # A depthwise kernel is (height, width, channels, multiplier): its outputs are the
    # last two axes. Any other kernel has its outputs on the last axis.
    factor = scale
    if node.kind == "DepthwiseConv2D":
        factor = scale.reshape(kernel.shape[2:])
    weights = (kernel * factor, bias * scale + shift)
    return dataclasses.replace(
        node,
        config={**node.config, "use_bias": True},
        weights=tuple(w.astype(np.float32) for w in weights),
    )


def _depthwise_affine(
    taken: Collection[str], node: Node, scale: np.ndarray, shift: np.ndarray
) -> list[Node]:
    """`scale * x + shift` on an image or a vector, under the node's name."""
    if len(node.shape) == 3:
        return [affine_node(node.name, scale, shift, node.inputs, node.shape)]
    if len(node.shape) != 1:
        raise _unsupported(
            node,
            f"it has an input of shape {node.shape}; only images and vectors can be "
            "quantized",
        )
    # A vector becomes an image of one pixel and back.
    before = unique_name(taken, f"{node.name}_as_pixel")
    middle = unique_name(taken, f"{node.name}_affine")
    pixel = (1, 1, *node.shape)
    return [
        Node.of(layers.Reshape(pixel), before, node.inputs, pixel),
        affine_node(middle, scale, shift, (before,), pixel),
        Node.of(layers.Reshape(node.shape), node.name, (middle,), node.shape),
    ]


def affine_node(
    name: str,
    scale: np.ndarray,
    shift: np.ndarray,
    inputs: tuple[str, ...],
    shape: tuple[int, ...],
) -> Node:
    """A 1x1 depthwise convolution that computes `scale * x + shift` per channel.

    Args:
      name: of the node.
      scale: (channels,).
      shift: (channels,).
      inputs: the one node that it reads.
      shape: (height, width, channels), of its input and output.
    """
    weights = (
        scale.reshape(1, 1, -1, 1).astype(np.float32),
        shift.astype(np.float32),
    )
    return Node.of(layers.DepthwiseConv2D(1), name, inputs, shape, weights)


def _unsupported(node: Node, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError.of([LayerProblem(node.name, node.kind, reason)])


# What `fold` does, in order.
PASSES: tuple[Callable[[Graph], Graph], ...] = (
    drop_training_only,
    split_separable,
    fold_channel_orders,
    split_activations,
    split_merges,
    scale_before_relu,
    fold_batch_normalization,
    with_ranges_of_their_own,
)
