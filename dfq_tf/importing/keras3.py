"""Reads Keras 3 models into a `Graph` of tf_keras layers, which tfmot accepts.

Layers of the same name have the same settings and weights in both, but for what the
table below says. Keras 3 computes with any of its backends; only configurations and
NumPy arrays are taken from it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.graph.graph import Call, Node, Reader, check_call, unique_name
from dfq_tf.importing.keras2 import split_operands
from dfq_tf.importing.operations import (
    Unknown,
    activation_nodes,
    nodes_or_unsupported,
    operation_nodes,
)
from dfq_tf.importing.preprocessing import preprocessing_nodes

layers = keras.layers

# Activations that tf_keras has under the same name, and a layer may hold itself.
_SAME_ACTIVATIONS = ("linear", "relu", "softmax", "sigmoid", "tanh")

_CONV = ("kernel_size", "strides", "padding", "data_format", "dilation_rate")
_POOL = ("pool_size", "strides", "padding", "data_format")
# Keras 3 layer -> the settings that its namesake in tf_keras takes over.
_LAYERS: dict[str, tuple[str, ...]] = {
    "Add": (),
    "AveragePooling2D": _POOL,
    "BatchNormalization": ("axis", "momentum", "epsilon", "center", "scale"),
    "Concatenate": ("axis",),
    "Conv2D": ("filters", *_CONV, "groups", "use_bias"),
    "Dense": ("units", "use_bias"),
    "DepthwiseConv2D": (*_CONV, "depth_multiplier", "use_bias"),
    "Flatten": ("data_format",),
    "GlobalAveragePooling2D": ("data_format", "keepdims"),
    "GlobalMaxPooling2D": ("data_format", "keepdims"),
    "MaxPooling2D": _POOL,
    "Multiply": (),
    "ReLU": ("max_value", "negative_slope", "threshold"),
    "SeparableConv2D": ("filters", *_CONV, "depth_multiplier", "use_bias"),
    "Softmax": ("axis",),
    "Subtract": (),
    "ZeroPadding2D": ("padding", "data_format"),
}
# Operation of Keras 3 -> that of `nodes.operation_nodes`, how many operands it has,
# and what its attributes are called there.
_OPERATIONS: dict[str, tuple[str, int, Mapping[str, str]]] = {
    "Add": ("add", 2, {}),
    "Subtract": ("subtract", 2, {}),
    "Multiply": ("multiply", 2, {}),
    "TrueDivide": ("divide", 2, {}),
    "Divide": ("divide", 2, {}),
    "Negative": ("negative", 1, {}),
    "Mean": ("mean", 1, {"axis": "axis", "keepdims": "keepdims"}),
    "Max": ("max", 1, {"axis": "axis", "keepdims": "keepdims"}),
    "Concatenate": ("concatenate", 1, {"axis": "axis"}),
    "GetItem": ("channels", 1, {}),
    "Stack": ("stack", 1, {"axis": "axis"}),
    "Reshape": ("reshape", 1, {}),
    "Clip": ("clip", 1, {"x_min": "low", "x_max": "top"}),
    "Cast": ("identity", 1, {}),
    "Relu": ("relu", 1, {}),
    "Relu6": ("relu6", 1, {}),
    "Sigmoid": ("sigmoid", 1, {}),
    "HardSigmoid": ("hard_sigmoid", 1, {}),
    "Silu": ("silu", 1, {}),
    "HardSilu": ("hard_silu", 1, {}),
    "Tanh": ("tanh", 1, {}),
    "Softmax": ("softmax", 1, {}),
}

# Operations that a model file may call.
KNOWN_OPERATIONS = frozenset(_OPERATIONS)


class Keras3Reader(Reader):
    """Reads the layers and operations of a Keras 3 model.

    Args:
      keras3: the module `keras`, of version 3.
    """

    has_rewritten = True

    def __init__(self, keras3: Any) -> None:
        self._keras3 = keras3

    def origin(self, tensor: Any) -> tuple[Any, int]:
        """As in `Reader`."""
        history = tensor._keras_history
        return history.operation, history.node_index

    def call(self, layer: Any, index: int) -> Call:
        """As in `Reader`."""
        inbound = layer._inbound_nodes[index]
        arguments = inbound.arguments
        # How the whole model is called decides on training, whatever is written here:
        # of augmentation, Keras writes training=True where nothing was said.
        kwargs = {k: v for k, v in arguments.kwargs.items() if k != "training"}
        return Call(
            layer,
            [] if self.is_input(layer) else inbound.input_tensors,
            inbound.output_tensors,
            arguments.args,
            kwargs,
        )

    def is_model(self, layer: Any) -> bool:
        """As in `Reader`."""
        return isinstance(layer, self._keras3.Model)

    def is_input(self, layer: Any) -> bool:
        """As in `Reader`."""
        return isinstance(layer, self._keras3.layers.InputLayer)

    def nodes(
        self, call: Call, sources: Sequence[Node], taken: Collection[str]
    ) -> list[Node]:
        """As in `Reader`, with layers of tf_keras in place of those of Keras 3."""
        layer, kind = call.layer, type(call.layer).__name__
        if len(call.outputs) != 1:
            check_call(call)
        name = unique_name(taken, layer.name)
        shape = tuple(call.outputs[0].shape[1:])

        def make() -> list[Node]:
            if kind != "Stack":
                _check_whole_images(call, sources)
            if not isinstance(layer, self._keras3.layers.Layer):
                return _operation_nodes(call, sources, name, shape, taken)
            check_call(call)
            return self._layer_nodes(layer, sources, name, shape, taken)

        return nodes_or_unsupported(make, name, kind)

    def _layer_nodes(
        self,
        layer: Any,
        sources: Sequence[Node],
        name: str,
        shape: tuple[int, ...],
        taken: Collection[str],
    ) -> list[Node]:
        kind = type(layer).__name__
        if not type(layer).__module__.startswith("keras."):
            raise Unknown("it is a class of your own, whose function is not known here")
        config = layer.get_config()
        weights = [np.asarray(value) for value in layer.get_weights()]
        if self.is_input(layer):
            return [input_node(name, shape)]
        to_numpy = self._keras3.ops.convert_to_numpy
        made = preprocessing_nodes(
            kind, config, weights, lambda x: to_numpy(layer(x)), sources[0], name, shape
        )
        if made is not None:
            return made
        if any(
            value.dtype.kind != "f" and value.dtype.name != "bfloat16"
            for value in weights
        ):
            kinds = sorted({value.dtype.name for value in weights})
            raise Unknown(f"its weights are {', '.join(kinds)}; give a float model")
        weights = [value.astype(np.float32) for value in weights]
        if kind == "Activation":
            return activation_nodes(_activation(config), sources[0], name, taken)
        inputs = [source.name for source in sources]
        if kind == "Reshape":
            return [Node.of(layers.Reshape(shape), name, inputs, shape)]
        if kind == "LeakyReLU":
            leaky = layers.LeakyReLU(config["negative_slope"])
            return [Node.of(leaky, name, inputs, shape)]
        if kind not in _LAYERS:
            raise Unknown("Keras 3 layers of this class are not known here")
        settings = {key: config[key] for key in _LAYERS[kind]}
        twin = getattr(layers, kind)
        activation = _activation(config)
        if activation in _SAME_ACTIVATIONS:
            if activation != "linear":
                settings["activation"] = activation
            return [Node.of(twin(**settings), name, inputs, shape, weights)]
        before = unique_name([*taken, name], f"{name}_linear")
        linear = Node.of(twin(**settings), before, inputs, shape, weights)
        return [
            linear,
            *activation_nodes(activation, linear, name, [*taken, before]),
        ]


def _check_whole_images(call: Call, sources: Sequence[Node]) -> None:
    """Raises Unknown if something is read of which a node has kept one more axis."""
    for tensor, source in zip(call.inputs, sources):
        if len(tensor.shape) - 1 != len(source.shape):
            raise Unknown(
                f"it reads one channel alone, {source.name}; only a stack of channels "
                "has an integer form"
            )


def _operation_nodes(
    call: Call,
    sources: Sequence[Node],
    name: str,
    shape: tuple[int, ...],
    taken: Collection[str],
) -> list[Node]:
    kind = type(call.layer).__name__
    if kind not in _OPERATIONS:
        raise Unknown("there is no integer form of this operation")
    operation, num_operands, attributes = _OPERATIONS[kind]
    # Operands may be given by name as well: x, or x1 and x2.
    named = [call.kwargs[name] for name in sorted(call.kwargs)]
    given, rest = [*call.args, *named][:num_operands], call.args[num_operands:]
    nodes = {id(tensor): node for tensor, node in zip(call.inputs, sources)}
    settings = {
        theirs: getattr(call.layer, ours) for ours, theirs in attributes.items()
    }
    if operation == "channels":
        (settings["key"],) = rest
    operands, settings = split_operands(given, settings, nodes)
    return operation_nodes(operation, operands, settings, name, shape, taken)


def input_node(name: str, shape: Sequence[int | None]) -> Node:
    """The input of a network, float32, of any batch size."""
    config = {"batch_input_shape": (None, *shape), "dtype": "float32"}
    return Node(name, layers.InputLayer, config, (), (), tuple(shape))  # type: ignore[arg-type]


def _activation(config: Mapping[str, Any]) -> str:
    """The name of a layer's activation, 'linear' if it has none."""
    activation = config.get("activation") or "linear"
    if isinstance(activation, dict):  # an object, or a function registered by name
        inner = activation.get("config")
        activation = inner if isinstance(inner, str) else activation["class_name"]
    return str(activation)
