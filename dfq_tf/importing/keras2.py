"""Reads tf_keras (Keras 2) models that users bring into a `Graph`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph.graph import Call, Node, Reader, check_call, unique_name
from dfq_tf.importing.operations import (
    ARITHMETIC,
    Operand,
    Unknown,
    nodes_or_unsupported,
    operation_nodes,
)
from dfq_tf.importing.preprocessing import TRAINING_ONLY, preprocessing_nodes

# TensorFlow function -> operation of `nodes.operation_nodes`, and its arguments'
# names in order, operands first.
_FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "__operators__.add": ("add", ("x", "y")),
    "math.add": ("add", ("x", "y")),
    "nn.bias_add": ("add", ("value", "bias")),
    "math.subtract": ("subtract", ("x", "y")),
    "math.multiply": ("multiply", ("x", "y")),
    "math.truediv": ("divide", ("x", "y")),
    "math.divide": ("divide", ("x", "y")),
    "math.negative": ("negative", ("x",)),
    "math.reduce_mean": ("mean", ("input_tensor", "axis", "keepdims")),
    "math.reduce_max": ("max", ("input_tensor", "axis", "keepdims")),
    "concat": ("concatenate", ("values", "axis")),
    "__operators__.getitem": ("channels", ("x", "key")),
    "reshape": ("reshape", ("tensor", "shape")),
    "clip_by_value": ("clip", ("t", "low", "top")),
    "cast": ("identity", ("x", "dtype")),
    "identity": ("identity", ("input",)),
    "nn.relu": ("relu", ("features",)),
    "nn.relu6": ("relu6", ("features",)),
    "nn.silu": ("silu", ("features",)),
    "nn.softmax": ("softmax", ("logits", "axis")),
    "math.sigmoid": ("sigmoid", ("x",)),
    "nn.sigmoid": ("sigmoid", ("x",)),
    "math.tanh": ("tanh", ("x",)),
    "nn.tanh": ("tanh", ("x",)),
}
# What some arguments of TensorFlow are called in `nodes.operation_nodes`.
_RENAMED = {
    "clip_value_min": "low",
    "clip_value_max": "top",
    "keep_dims": "keepdims",
    "slice_spec": "key",
}

# Functions that a model file may call.
KNOWN_FUNCTIONS = frozenset(_FUNCTIONS)


class Keras2Reader(Reader):
    """Reads functions and preprocessing layers too, as nodes of the known kinds."""

    def nodes(
        self, call: Call, sources: Sequence[Node], taken: Collection[str]
    ) -> list[Node]:
        """As in `Reader`."""
        layer = call.layer
        kind, shape = type(layer).__name__, tuple(call.outputs[0].shape[1:])
        name = unique_name(taken, layer.name)
        if kind in ("TFOpLambda", "SlicingOpLambda"):
            self.has_rewritten = True
            return nodes_or_unsupported(
                lambda: _function_nodes(call, sources, name, shape, taken), name, kind
            )
        if len(sources) == 1 and type(layer).__module__.startswith("tf_keras."):
            made = nodes_or_unsupported(
                lambda: preprocessing_nodes(
                    kind,
                    layer.get_config(),
                    layer.get_weights(),
                    lambda images: layer(tf.constant(images)).numpy(),
                    sources[0],
                    name,
                    shape,
                ),
                name,
                kind,
            )
            if made is not None:
                check_call(call)
                self.has_rewritten |= kind not in TRAINING_ONLY
                return made
        return super().nodes(call, sources, taken)


def _function_nodes(
    call: Call,
    sources: Sequence[Node],
    name: str,
    shape: tuple[int, ...],
    taken: Collection[str],
) -> list[Node]:
    function = call.layer.get_config()["function"]
    if function not in _FUNCTIONS:
        raise Unknown(f"there is no integer form of TensorFlow's {function}")
    operation, parameters = _FUNCTIONS[function]
    arguments: dict[str, Any] = dict(zip(parameters, call.args))
    arguments |= {_RENAMED.get(k, k): v for k, v in call.kwargs.items()}
    if operation == "channels":
        arguments["key"] = _index(arguments.get("key"), shape, sources[0])
    needed = parameters[: _num_operands(operation)]
    if not arguments.keys() >= set(needed):
        raise Unknown(f"TensorFlow's {function} is called without {needed}")
    operands, settings = split_operands(
        [arguments.pop(p) for p in needed],
        arguments,
        {id(tensor): node for tensor, node in zip(call.inputs, sources)},
    )
    return operation_nodes(operation, operands, settings, name, shape, taken)


def _index(key: Any, shape: tuple[int, ...], source: Node) -> Any:
    """An index as it was written: Keras 2 keeps slices as dictionaries.

    Raises:
      Unknown: it takes one channel, and with it an axis.
    """
    if len(shape) != len(source.shape):
        raise Unknown("it takes one channel alone; x[..., i : i + 1] keeps the axis")
    return [
        slice(k["start"], k["stop"], k["step"]) if isinstance(k, dict) else k
        for k in (key if isinstance(key, (list, tuple)) else (key,))
    ]


def _num_operands(operation: str) -> int:
    return 2 if operation in ARITHMETIC else 1


def split_operands(
    given: Sequence[Any], settings: Mapping[str, Any], nodes: Mapping[int, Node]
) -> tuple[list[Operand], dict[str, Any]]:
    """The operands of an operation, and its settings.

    Args:
      given: symbolic tensors, lists of them, and constants.
      settings: the arguments that are no operands.
      nodes: id of a symbolic tensor -> the node that gives it.

    Raises:
      Unknown: a setting is a tensor.
    """
    operands: list[Operand] = []
    for value in given:
        is_list = isinstance(value, (list, tuple))
        has_tensors = is_list and any(id(each) in nodes for each in value)
        for each in value if has_tensors else [value]:
            node = nodes.get(id(each))
            operands.append(np.asarray(each) if node is None else node)
    if any(id(value) in nodes for value in settings.values()):
        raise Unknown("one of its settings is computed by the model")
    return operands, dict(settings)
