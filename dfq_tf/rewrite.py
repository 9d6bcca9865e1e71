"""Rewrites a float network so that each of its layers has an integer twin.

Every rewrite leaves the function as it was, within float rounding: batch
normalisation goes into the weights before it, or becomes a 1x1 depthwise
convolution, and what does nothing at inference goes.
"""

import dataclasses

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.description import ModelDescription
from dfq_tf.errors import ModelError, UnsupportedLayerError
from dfq_tf.graph import Graph, Node, unique_name

layers = keras.layers

# Layers that pass their input on unchanged at inference.
_TRAINING_ONLY = (
    "Dropout",
    "SpatialDropout2D",
    "AlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "ActivityRegularization",
)


def fold(graph: Graph) -> Graph:
    """The rewritten network: no batch normalisation, no training-only layers.

    Raises:
      UnsupportedLayerError: a batch normalisation is not over the last axis.
    """
    graph = drop_training_only(graph)
    graph = split_separable(graph)
    return fold_batch_normalization(graph)


def logits_graph(graph: Graph, description: ModelDescription) -> Graph:
    """The network up to its logits: a softmax at its end is taken off.

    Args:
      graph: the classifier.
      description: says whether the classifier gives logits or softmax.

    Raises:
      ModelError: the description says softmax, and the last layer has none.
    """
    if description.output == "logits":
        return graph
    last = graph.nodes[graph.output_name]
    if last.kind == "Softmax" or (
        last.kind == "Activation" and activation_name(last) == "softmax"
    ):
        return graph.replaced({last.name: []}, {last.name: last.inputs[0]})
    if activation_name(last) == "softmax":
        linear = dataclasses.replace(
            last, config={**last.config, "activation": "linear"}
        )
        return graph.replaced({last.name: [linear]}, {})
    raise ModelError(
        f"the description says that the model gives softmax, but its last layer "
        f"{last.name} ({last.kind}) has no softmax; if it gives logits, say so"
    )


def activation_name(node: Node) -> str:
    """The node's `activation` setting, 'linear' if it has none."""
    activation = node.config.get("activation") or "linear"
    if isinstance(activation, dict):  # a function registered by name
        activation = activation["config"]
    return activation if isinstance(activation, str) else str(activation)


def is_relu(node: Node) -> bool:
    """Whether the node is a ReLU or ReLU6, which a layer before it can take in."""
    if node.kind == "Activation":
        return activation_name(node) in ("relu", "relu6")
    config = node.config
    return (
        node.kind == "ReLU"
        and config["max_value"] in (None, 6, 6.0)
        and not config["negative_slope"]
        and not config["threshold"]
    )


def drop_training_only(graph: Graph) -> Graph:
    """Removes the layers that do nothing at inference."""
    gone = {
        name: node.inputs[0]
        for name, node in graph.nodes.items()
        if node.kind in _TRAINING_ONLY
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
        depthwise = _node(
            layers.DepthwiseConv2D(
                config["kernel_size"],
                config["strides"],
                config["padding"],
                config["depth_multiplier"],
                dilation_rate=config["dilation_rate"],
                use_bias=False,
            ),
            depthwise_name,
            (depthwise_kernel,),
            node.inputs,
            (*node.shape[:-1], int(np.prod(depthwise_kernel.shape[2:]))),
        )
        conv = _node(
            layers.Conv2D(
                config["filters"],
                1,
                activation=keras.activations.deserialize(config["activation"]),
                use_bias=config["use_bias"],
            ),
            name,
            tuple(pointwise),
            (depthwise_name,),
            node.shape,
        )
        replacements[name] = [depthwise, conv]
    return graph.replaced(replacements, {})


def fold_batch_normalization(graph: Graph) -> Graph:
    """Removes every BatchNormalization.

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
        if node.kind != "BatchNormalization":
            continue
        scale, shift = batch_normalization_affine(node)
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
            replacements[name] = _depthwise_affine(graph, node, scale, shift)
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
        if len(source.shape) != 1:
            raise UnsupportedLayerError(
                f"layer {name} (Dense) has an input of shape {source.shape}; only "
                "vectors can be quantized, put a Flatten before it"
            )
        before = unique_name(taken, f"{name}_as_pixel")
        middle = unique_name(taken, f"{name}_as_conv")
        taken |= {before, middle}
        (units,), pixel = node.shape, (1, 1, *source.shape)
        kernel, *bias = node.weights
        conv = _node(
            layers.Conv2D(
                units,
                1,
                activation=keras.activations.deserialize(node.config["activation"]),
                use_bias=node.config["use_bias"],
            ),
            middle,
            (kernel[None, None], *bias),
            (before,),
            (1, 1, units),
        )
        replacements[name] = [
            _node(layers.Reshape(pixel), before, (), node.inputs, pixel),
            conv,
            _node(layers.Reshape((units,)), name, (), (middle,), (units,)),
        ]
    return graph.replaced(replacements, {})


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
        raise UnsupportedLayerError(
            f"layer {node.name} (BatchNormalization) has axis {axis}; only the last "
            "axis, the channels, can be quantized"
        )
    weights = [w.astype(np.float64) for w in node.weights]
    gamma = weights.pop(0) if node.config["scale"] else np.ones(weights[0].shape)
    beta = weights.pop(0) if node.config["center"] else np.zeros(weights[0].shape)
    return gamma, beta, weights[0], weights[1]


def _can_take_in(node: Node) -> bool:
    kinds = ("Conv2D", "DepthwiseConv2D", "Dense")
    return node.kind in kinds and activation_name(node) == "linear"


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
    graph: Graph, node: Node, scale: np.ndarray, shift: np.ndarray
) -> list[Node]:
    """`scale * x + shift` on an image or a vector, under the node's name."""
    if len(node.shape) == 3:
        return [affine_node(node.name, scale, shift, node.inputs, node.shape)]
    if len(node.shape) != 1:
        raise UnsupportedLayerError(
            f"layer {node.name} (BatchNormalization) has an input of shape "
            f"{node.shape}; only images and vectors can be quantized"
        )
    # A vector becomes an image of one pixel and back.
    before = unique_name(graph.nodes, f"{node.name}_as_pixel")
    middle = unique_name(graph.nodes, f"{node.name}_affine")
    pixel = (1, 1, *node.shape)
    return [
        _node(layers.Reshape(pixel), before, (), node.inputs, pixel),
        affine_node(middle, scale, shift, (before,), pixel),
        _node(layers.Reshape(node.shape), node.name, (), (middle,), node.shape),
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
    return _node(layers.DepthwiseConv2D(1), name, weights, inputs, shape)


def _node(
    layer: keras.layers.Layer,
    name: str,
    weights: tuple[np.ndarray, ...],
    inputs: tuple[str, ...],
    shape: tuple[int, ...],
) -> Node:
    return Node(name, type(layer), layer.get_config(), weights, inputs, shape)
