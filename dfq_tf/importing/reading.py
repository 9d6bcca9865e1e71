"""Walks a Keras model call by call, to its end, and gives a graph of own kinds.

The models of Keras 2 (tf_keras) and Keras 3 differ in where they keep what was called
with what; two dialects tell that. What a layer becomes is the same table for both.
"""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_tf.compat import is_of_layers, keras3, tf
from dfq_tf.errors import LayerProblem
from dfq_tf.graph import Graph, Node, Shape, layers, unique_name
from dfq_tf.importing import keras_names, operations
from dfq_tf.importing.operations import Found, Maker, Unknown

# Layers that change pixels, or nothing, whatever the size of the image is.
_OF_PIXELS = keras_names.TRAINING_ONLY | {"Normalization", "Rescaling"}


@dataclasses.dataclass(frozen=True)
class LayerRead:
    """One call of a layer, as it was found in a model.

    Attributes:
      name: of the layer; another one for each further call.
      kind: its class.
      shape: of its output without the batch; None is a size that may be any.
      parameters: numbers in its weights.
      problem: why it cannot be read, or None.
      is_frozen: whether the training left it as it was: it is not trainable, or, in
        Keras 2, is called with training=False.
    """

    name: str
    kind: str
    shape: Shape
    parameters: int
    problem: str | None
    is_frozen: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model as it was read.

    Attributes:
      graph: its nodes; unknown ones stand for layers that cannot be read.
      layers: what was found, the input first, each behind what it reads.
    """

    graph: Graph
    layers: Sequence[LayerRead]

    @property
    def problems(self) -> list[LayerProblem]:
        """One for each layer that cannot be read."""
        return [
            LayerProblem(layer.name, layer.kind, layer.problem)
            for layer in self.layers
            if layer.problem
        ]


class _Call(NamedTuple):
    """One call of one layer, as it is found in a model.

    Attributes:
      layer: what was called.
      inputs: the symbolic tensors that it was called on.
      outputs: the symbolic tensors that it gave.
      args: positional arguments, the inputs among them.
      kwargs: arguments by name.
      sources: names of the calls that gave its inputs.
      before: of one output of a split, the outputs before it.
      is_inference: whether it is made with training=False, or a model around it is, and
        that goes before how the whole model is called: in Keras 2.
    """

    layer: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    sources: tuple[str, ...] = ()
    before: Sequence[Any] = ()
    is_inference: bool = False

    @property
    def kind(self) -> str:
        """The class of the layer."""
        return type(self.layer).__name__

    @property
    def shape(self) -> Shape:
        """Of the output, without the batch; () if TensorFlow does not know it."""
        shape = self.outputs[0].shape
        is_unknown = isinstance(shape, tf.TensorShape) and shape.rank is None
        return () if is_unknown else tuple(shape[1:])

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name that say something."""
        return {k: v for k, v in self.kwargs.items() if not _is_nothing(v)}


class _Keras2:
    """Where tf_keras keeps what a model is made of."""

    package = "tf_keras."
    # In their lists or dictionaries.
    kept_inputs, kept_outputs = "_nested_inputs", "_nested_outputs"

    def origin(self, tensor: Any) -> tuple[Any, int, int]:
        """The layer that gave a symbolic tensor, in which call, as which output."""
        return tuple(tensor._keras_history)  # type: ignore[return-value]

    def call(self, layer: Any, index: int) -> _Call:
        """One of a layer's calls."""
        node = layer._inbound_nodes[index]
        outputs = tf.nest.flatten(node.outputs)
        args, kwargs = node.call_args, node.call_kwargs
        if self.function(layer) is None:
            args, kwargs = _with_training_named(layer, args, kwargs)
        return _Call(
            layer,
            node.keras_inputs,
            outputs,
            args,
            kwargs,
            is_inference=kwargs.get("training") is False,
        )

    def is_network(self, layer: Any) -> bool:
        """Whether it is a model whose layers can be read."""
        return is_of_layers(layer)

    def function(self, layer: Any) -> str | None:
        """The name of a function that was called; None of a layer."""
        if type(layer).__name__ not in ("TFOpLambda", "SlicingOpLambda"):
            return None
        return layer.symbol or f"{layer.function.__name__}, which is not public"


class _Keras3:
    """Where Keras 3 keeps what a model is made of."""

    package = "keras."
    kept_inputs, kept_outputs = "_inputs_struct", "_outputs_struct"

    def origin(self, tensor: Any) -> tuple[Any, int, int]:
        history = tensor._keras_history
        return history.operation, history.node_index, history.tensor_index

    def call(self, layer: Any, index: int) -> _Call:
        node = layer._inbound_nodes[index]
        # How the whole model is called decides on training, whatever is written here:
        # in training, training=False is no more than nothing; of augmentation, Keras
        # writes training=True where nothing was said.
        kwargs = dict(node.arguments.kwargs)
        kwargs.pop("training", None)
        args = node.arguments.args
        if not args and len(kwargs) == 1 and self.function(layer) is None:
            args, kwargs = tuple(kwargs.values()), {}  # layer(inputs=x)
        return _Call(layer, node.input_tensors, node.output_tensors, args, kwargs)

    def is_network(self, layer: Any) -> bool:
        is_functional = hasattr(getattr(layer, "_functional", layer), "operations")
        return isinstance(layer, keras3().Model) and is_functional

    def function(self, layer: Any) -> str | None:
        is_layer = isinstance(layer, keras3().layers.Layer)
        return None if is_layer else type(layer).__name__


def _with_training_named(
    layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a call with `training` by its name, also of `base(x, False)`.

    Keras 3 takes nothing but tensors by their place.
    """
    if len(args) < 2:
        return args, kwargs
    names = [*inspect.signature(layer.call).parameters][: len(args)]
    if "training" not in names:
        return args, kwargs
    place = names.index("training")
    others = [*args[:place], *args[place + 1 :]]
    return others, {**kwargs, "training": args[place]}


def _is_nothing(value: Any) -> bool:
    """Whether an argument says nothing: None, or Nones alone."""
    values = list(value.values()) if isinstance(value, Mapping) else value
    return values is None or (
        isinstance(values, list) and all(map(_is_nothing, values))
    )


def _is_input(layer: Any) -> bool:
    return type(layer).__name__ == "InputLayer"


def is_keras3(model: Any) -> bool:
    """Whether it is a model or layer of Keras 3."""
    modules = [each.__module__ for each in type(model).__mro__]
    return any(module.split(".")[0] == "keras" for module in modules)


def _dialect(model: Any) -> _Keras2 | _Keras3:
    return _Keras3() if is_keras3(model) else _Keras2()


def has_layers(model: Any) -> bool:
    """Whether it is a functional or Sequential model, of Keras 2 or 3."""
    return _dialect(model).is_network(model)


def named_outputs(model: Any) -> dict[str, Any]:
    """The symbolic outputs of a model by name.

    The name is the key where the model gives a dictionary, else that of the layer.
    """
    dialect = _dialect(model)
    given = getattr(model, dialect.kept_outputs, None)
    if isinstance(given, Mapping) and len(given) == len(model.outputs):
        return {str(name): given[name] for name in given}
    outputs: dict[str, Any] = {}
    for tensor in model.outputs:
        outputs[unique_name(outputs, dialect.origin(tensor)[0].name)] = tensor
    return outputs


def resized_to(model: Any) -> tuple[str, tuple[int, int]] | None:
    """The size to which a model brings the images that it is given, of any size.

    Returns:
      The name of its Resizing layer, and (height, width); None if it has none before
      what hangs on the size.
    """
    calls: dict[str, _Call] = {}
    dialect = _dialect(model)
    _add_calls(calls, model, None, dialect)
    (name,) = (name for name, call in calls.items() if _is_input(call.layer))
    while True:
        readers = [k for k, call in calls.items() if name in call.sources]
        if len(readers) != 1:
            return None
        (name,) = readers
        layer = calls[name].layer
        if type(layer).__name__ == "Resizing":
            return name, (int(layer.height), int(layer.width))
        is_of_pixels = type(layer).__name__ in _OF_PIXELS
        is_arithmetic = _operation_of(layer, dialect) in operations.ARITHMETIC
        if not is_of_pixels and not is_arithmetic:
            return None


def outputs_of(model: Any, images: np.ndarray) -> np.ndarray:
    """What the one output of a model is, at inference.

    Args:
      model: of Keras 2 or 3; one that gives a list or a dictionary of one is fine.
      images: float32, (batch, height, width, channels).
    """
    with warnings.catch_warnings():
        # Keras 3 warns of inputs in a dictionary; there is one, which Keras finds.
        warnings.simplefilter("ignore", UserWarning)
        (values,) = tf.nest.flatten(model(images, training=False))
    to_numpy = keras3().ops.convert_to_numpy if is_keras3(model) else np.asarray
    return to_numpy(values)


def read_layers(model: Any, image_shape: Shape | None = None) -> Reading:
    """Reads a functional or Sequential model to its end, whatever it finds.

    Models inside it are laid flat. A layer that is called more than once becomes nodes
    for each call, each with its own copy of the weights.

    Args:
      model: of Keras 2 or 3, with one input and one output.
      image_shape: (height, width, channels) of the images; by default what the model
        says.
    """
    dialect = _dialect(model)
    calls: dict[str, _Call] = {}
    (output,) = _add_calls(calls, model, None, dialect)
    calls = _needed(calls, output)
    nodes: dict[str, Node] = {}
    gives: dict[str, str] = {}  # name of a call -> the node that gives its output
    problems: dict[str, str] = {}
    for name, call in calls.items():
        sources = [nodes[gives[source]] for source in call.sources]
        maker = Maker(name, nodes, calls)
        try:
            if _is_input(call.layer):
                made = _input(name, image_shape or call.shape, call.shape)
            else:
                _add_nodes(maker, call, sources, dialect)
                made = maker.nodes
        except Unknown as error:
            problems[name] = str(error)
            made = [layers.unknown(name, sources, call.shape, call.kind, str(error))]
        nodes.update({node.name: node for node in made})
        gives[name] = made[-1].name if made else sources[0].name
    graph = Graph(nodes.values(), gives[output])
    found = [
        LayerRead(
            name,
            call.kind,
            call.shape,
            # A function has no weights.
            sum(math.prod(w.shape) for w in getattr(call.layer, "weights", ())),
            problems.get(name),
            call.is_inference or not getattr(call.layer, "trainable", True),
        )
        for name, call in calls.items()
    ]
    return Reading(graph, sorted(found, key=lambda layer: layer.kind != "InputLayer"))


def _input(name: str, image_shape: Shape, own: Shape) -> list[Node]:
    """The image; and without its one channel, for a model that takes none."""
    image = layers.image(name, image_shape, layers=(name,))
    if len(own) != 2:
        return [image]
    settings = {"shape": image_shape[:2]}
    return [image, layers.node("reshape", f"{name}_rows", [image], settings)]


def _add_calls(
    calls: dict[str, _Call],
    model: Any,
    feeds: Sequence[str] | None,
    dialect: _Keras2 | _Keras3,
    is_inference: bool = False,
) -> list[str]:
    """Adds the calls of a model; returns the names of those that give its outputs.

    Args:
      calls: by unique names, each behind what it reads; filled in place.
      model: a functional or Sequential model.
      feeds: for a model inside another, the calls that feed its inputs.
      dialect: of the model.
      is_inference: whether it is inside another, which calls it with training=False.
    """
    # A call -> what gives each of its outputs.
    names: dict[tuple[int, int], Sequence[str]] = {}

    def key(tensor: Any) -> tuple[int, int]:
        layer, index, _ = dialect.origin(tensor)
        return id(layer), index

    def name_of(tensor: Any) -> str:
        found = names[key(tensor)]
        return found[min(dialect.origin(tensor)[2], len(found) - 1)]

    if feeds is not None:
        names.update(zip(map(key, model.inputs), ([feed] for feed in feeds)))
    # Depth first, with a stack in place of recursion.
    stack = [dialect.origin(tensor)[:2] for tensor in model.outputs]
    while stack:
        layer, index = stack[-1]
        if (id(layer), index) in names:
            stack.pop()
            continue
        call = dialect.call(layer, index)
        inputs, inferring = _needed_inputs(call, dialect), call.is_inference
        call = call._replace(inputs=inputs, is_inference=is_inference or inferring)
        missing = [each for each in call.inputs if key(each) not in names]
        if missing:
            stack.extend(dialect.origin(each)[:2] for each in missing)
            continue
        stack.pop()
        if dialect.is_network(layer) and _argument_problem(call) is None:
            fed = list(map(name_of, _fed(layer, call.args[0], dialect)))
            names[id(layer), index] = _add_calls(
                calls, layer, fed, dialect, call.is_inference
            )
        else:
            parts = [call]
            if _operation_of(layer, dialect) == "split":
                parts = _parts_of_split(call)
            names[id(layer), index] = found = []
            sources = tuple(map(name_of, call.inputs))
            for part in parts:
                found.append(unique_name(calls, layer.name))
                calls[found[-1]] = part._replace(sources=sources)
    return list(map(name_of, model.outputs))


def _needed_inputs(call: _Call, dialect: _Keras2 | _Keras3) -> Sequence[Any]:
    """The symbolic tensors on which the output of a call hangs.

    A reshape may be told sizes that the model computes, such as tf.shape(x)[0]; its own
    shape says them.
    """
    if _is_input(call.layer):
        return []
    if _operation_of(call.layer, dialect) == "reshape":
        first = call.args[0] if call.args else call.kwargs.get("tensor")
        return [each for each in call.inputs if each is first] or call.inputs
    return call.inputs


def _fed(model: Any, given: Any, dialect: _Keras2 | _Keras3) -> Sequence[Any]:
    """What a model inside another is given, in the order of its inputs.

    Args:
      model: the one that was called.
      given: a tensor, or several: in a dictionary they go by name, as Keras has it.
      dialect: of the model.
    """
    kept = getattr(model, dialect.kept_inputs, None)
    names = [dialect.origin(each)[0].name for each in model.inputs]
    if isinstance(kept, Mapping):
        names = sorted(kept)
    if isinstance(given, Mapping) and given.keys() >= set(names):
        given = [given[name] for name in names]
    return tf.nest.flatten(given)


def _operation_of(layer: Any, dialect: _Keras2 | _Keras3) -> str:
    """The key in `keras_names.FUNCTIONS` of a function that was called; '' of none."""
    return keras_names.SIGNATURES.get(dialect.function(layer) or "", ("", ()))[0]


def _parts_of_split(call: _Call) -> list[_Call]:
    """A call for each output."""
    outputs = call.outputs
    return [
        call._replace(outputs=[output], before=outputs[:i])
        for i, output in enumerate(outputs)
    ]


def _needed(calls: Mapping[str, _Call], output: str) -> dict[str, _Call]:
    """The calls that an output is computed of, in their order.

    Of a model inside another, some outputs may not be used.
    """
    needed, todo = set(), [output]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo.extend(calls[name].sources)
    return {name: call for name, call in calls.items() if name in needed}


def _call_problem(call: _Call) -> str | None:
    """Why a layer cannot be read as it is called, if it is no model."""
    problem = _argument_problem(call)
    if problem is None and len(call.outputs) != 1:
        return "it gives several outputs; only layers with one can be"
    return problem


def _argument_problem(call: _Call) -> str | None:
    """Why a layer cannot be read as it is called: it has more than inputs."""
    if call.named.get("training"):
        return (
            "it is called with training=True, so that it does what it does in "
            "training, such as drawing numbers, whenever the model is used; build the "
            "model without that argument, and give it the same weights"
        )
    further = call.named.keys() - {"training"}
    if len(call.args) > 1 or further:
        what = ", ".join(sorted(further)) or "positional arguments"
        return (
            f"it is called with more than its inputs ({what}); use a layer that has "
            "them as settings"
        )
    if len(tf.nest.flatten(call.args)) > len(call.inputs):
        return (
            "one of its inputs is a constant; only arithmetic can have one, such as "
            "x + constant"
        )
    return None


def _add_nodes(
    maker: Maker, call: _Call, sources: Sequence[Node], dialect: _Keras2 | _Keras3
) -> None:
    """Adds the nodes that a call becomes.

    Raises:
      Unknown: there are none.
    """
    layer, function = call.layer, dialect.function(call.layer)
    if function and len(call.outputs) != 1:
        raise Unknown("it gives several outputs; write slices, such as x[..., :c]")
    problem = None if function else _call_problem(call)
    if problem:
        raise Unknown(problem)
    for tensor, source in zip(call.inputs, sources):
        # The node has kept one axis more.
        is_alone = source.kind == "channels" and len(tensor.shape) != 4
        if is_alone and function != "Stack":
            raise Unknown(
                f"it reads one channel alone, {source.name}; only a stack of channels "
                "has an integer form"
            )
    _check_is_keras(layer, dialect)
    if function:
        _add_function(maker, function, call, sources)
        return
    if call.kind == "SpectralNormalization":
        # Training has divided the kernel by its norm; now it is the layer's own.
        layer = layer.layer
        _check_is_keras(layer, dialect)
    found = Found(
        maker.layer,
        type(layer).__name__,
        _config(layer),
        [np.asarray(weight) for weight in layer.get_weights()],
        sources,
        call.shape,
        is_keras2=isinstance(dialect, _Keras2),
        function=lambda images: outputs_of(layer, images),
        activation=getattr(layer, "activation", None),
    )
    keras_names.add_layer(maker, found)


def _config(layer: Any) -> dict[str, Any]:
    """The settings of a layer, without those that say how its weights are trained.

    Raises:
      Unknown: Keras cannot write them down.
    """
    bare = object.__new__(type(layer))
    for name, value in vars(layer).items():
        only_trains = name.endswith(keras_names.TRAINING_SETTINGS)
        vars(bare)[name] = None if only_trains else value
    try:
        return bare.get_config()
    # It asks objects and functions of the user, which may raise anything.
    except Exception as error:
        raise Unknown(
            f"Keras cannot write its settings down ({type(error).__name__}): one of "
            "them, as a rule its activation, is an object or a function of your own. "
            "Give it one of Keras, or write it as Keras layers"
        ) from error


def _check_is_keras(layer: Any, dialect: _Keras2 | _Keras3) -> None:
    """Raises Unknown for a class that is not Keras' own."""
    if not type(layer).__module__.startswith(dialect.package):
        raise Unknown("it is a class of your own, whose function is not known here")


def _add_function(
    maker: Maker, function: str, call: _Call, sources: Sequence[Node]
) -> None:
    is_keras2 = not function[0].isupper()
    if function not in keras_names.SIGNATURES:
        what = f"TensorFlow's {function}" if is_keras2 else "this operation"
        raise Unknown(f"there is no integer form of {what}")
    operation, parameters = keras_names.SIGNATURES[function]
    is_narrower = len(call.shape) < len(sources[0].shape)
    if is_keras2 and operation == "channels" and is_narrower:
        # Keras 2 has no stack here that would read it.
        raise Unknown("it takes one channel alone; x[..., i : i + 1] keeps the axis")
    arguments = _arguments(call, parameters)
    nodes = {id(tensor): node for tensor, node in zip(call.inputs, sources)}
    operands: list[Any] = []
    for _ in range(2 if operation in operations.ARITHMETIC else 1):
        value = arguments.pop(next(iter(arguments), ""), None)
        is_list = isinstance(value, (list, tuple))
        has_tensors = is_list and any(id(each) in nodes for each in value)
        for each in value if has_tensors else [value]:
            operands.append(nodes.get(id(each), each))
    if any(id(value) in nodes for value in tf.nest.flatten(arguments)):
        raise Unknown("one of its settings is computed by the model")
    names = keras_names.ARGUMENTS
    settings = {names.get(name, name): value for name, value in arguments.items()}
    if operation == "split":
        operation, settings = "channels", {"key": _key_of_split(call, settings)}
    operations.operate(maker, operation, operands, settings, call.shape)


def _key_of_split(call: _Call, settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """The index of one output of a split.

    Raises:
      Unknown: it is no split of channels.
    """
    shape, axis = call.inputs[0].shape, settings.get("axis", 0)
    if axis not in (-1, len(shape) - 1):
        raise Unknown(f"it splits the axis {axis}; only channels of an image can be")
    first = sum(output.shape[-1] for output in call.before)
    return (..., slice(first, first + call.shape[-1]))


def _arguments(call: _Call, parameters: Sequence[str]) -> dict[str, Any]:
    """All arguments of a function by name, in the order of its parameters.

    Raises:
      Unknown: there are others.
    """
    # Of layers Nones in a list say nothing; of functions they may be new axes.
    named = {k: v for k, v in call.kwargs.items() if v is not None and k != "name"}
    if not parameters:  # of one value, whatever its name is
        parameters = ("x",) if call.args else tuple(named)[:1]
    further = [*map(str, call.args[len(parameters) :]), *({*named} - {*parameters})]
    if further:
        raise Unknown(f"it is called with {', '.join(further)}, which is not known")
    # An operation of Keras 3 has some of its arguments as attributes.
    given = {**vars(call.layer), **dict(zip(parameters, call.args)), **named}
    return {name: given[name] for name in parameters if name in given}
