"""A Keras functional model as plain data: what a rewrite reads, changes and builds.

A `Graph` holds one `Node` per call of a layer, in topological order, with the
layer's configuration and its weights as NumPy arrays. Rewriting is then work on
dictionaries; `Graph.build` turns the result into a Keras model again.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.errors import LayerProblem, UnsupportedLayerError

Wrap = Callable[["Node", keras.layers.Layer], keras.layers.Layer]


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of one layer.

    Attributes:
      name: unique in its graph; the name of the layer that `build` makes.
      layer_class: the Keras class of the layer.
      config: what `layer_class.from_config` takes.
      weights: what `layer.set_weights` takes, float32.
      inputs: names of the nodes whose outputs are the inputs, in order.
      shape: the output's shape without the batch.
    """

    name: str
    layer_class: Any
    config: Mapping[str, Any]
    weights: tuple[np.ndarray, ...]
    inputs: tuple[str, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layer: Any,
        name: str,
        inputs: Iterable[str],
        shape: Iterable[int],
        weights: Iterable[np.ndarray] = (),
    ) -> "Node":
        """A node with the class and the configuration of a tf_keras layer."""
        # Without `trainable`: the twin of a frozen layer is trained like any other.
        config = {k: v for k, v in layer.get_config().items() if k != "trainable"}
        return cls(
            name, type(layer), config, tuple(weights), tuple(inputs), tuple(shape)
        )

    @property
    def kind(self) -> str:
        """The name of the layer's class, such as 'Conv2D'."""
        return self.layer_class.__name__


class Unreadable:
    """Stands in a graph for a layer that cannot be read, with its inputs and shape."""


class Graph:
    """Nodes in topological order, from one input to one output.

    Attributes:
      nodes: name -> Node; a node comes after its inputs.
      input_name: the node of class InputLayer.
      output_name: the node whose output is the model's.
      made_of: name of a node that rewriting made -> the node of the first graph in
        whose place it stands.
      renamed: name of a node that rewriting took away -> the node that gives its
        output since.
    """

    def __init__(self, nodes: Iterable[Node], output_name: str) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.output_name = output_name
        self.input_name = next(iter(self.nodes))
        self.made_of: dict[str, str] = {}
        self.renamed: dict[str, str] = {}

    @classmethod
    def from_model(cls, model: Any, reader: "Reader | None" = None) -> "Graph":
        """Reads a functional or Sequential model; models inside it are laid flat.

        A layer that is called more than once becomes one node per call, each with
        its own copy of the weights.

        Args:
          model: a tf_keras model, or what the reader can read.
          reader: how its calls become nodes; by default each layer is one, as it is.

        Raises:
          UnsupportedLayerError: layers give several outputs, or are called with
          arguments that are no inputs; all such layers are named.
        """
        reading = read_layers(model, reader or Reader())
        reading.check()
        return reading.graph

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read the output of `name`, each once."""
        return [node for node in self.nodes.values() if name in node.inputs]

    def replaced(
        self, replacements: Mapping[str, Iterable[Node]], renamed: Mapping[str, str]
    ) -> "Graph":
        """A graph with some nodes exchanged.

        Args:
          replacements: name of a node -> the nodes that stand in its place, in
            topological order; an empty list removes it.
          renamed: name of a node that is gone -> the node whose output is read
            instead.
        """

        def final(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        nodes: list[Node] = []
        made_of: dict[str, str] = {}
        for name, node in self.nodes.items():
            for new in replacements.get(name, [node]):
                inputs = tuple(map(final, new.inputs))
                nodes.append(dataclasses.replace(new, inputs=inputs))
                made_of[new.name] = self.origin(name)
        graph = Graph(nodes, final(self.output_name))
        graph.made_of = made_of
        graph.renamed = {**self.renamed, **renamed}
        return graph

    def origin(self, name: str) -> str:
        """The node of the first graph in whose place a node stands: often itself."""
        return self.made_of.get(name, name)

    def with_head(self, head: Iterable[Node]) -> "Graph":
        """A graph with a chain of nodes between the input and what reads it.

        Args:
          head: nodes in order; the first reads the input of this graph.
        """
        head = list(head)
        image, *rest = self.nodes.values()
        behind = {image.name: head[-1].name}
        rest = [
            dataclasses.replace(
                node, inputs=tuple(behind.get(name, name) for name in node.inputs)
            )
            for node in rest
        ]
        graph = Graph([image, *head, *rest], self.output_name)
        graph.made_of = {**self.made_of, **{n.name: image.name for n in head}}
        graph.renamed = self.renamed
        return graph

    def build(
        self, wrap: Wrap | None = None, outputs: Iterable[str] | None = None
    ) -> keras.Model:
        """Builds a Keras functional model with these layers and weights.

        Args:
          wrap: called with each node but the input and its new layer; returns the
            layer to call in its place, which must train the same weights.
          outputs: names of the nodes whose outputs the model gives, a list of them;
            by default the model gives the one output of the graph.
        """
        tensors: dict[str, Any] = {}
        for node in self.nodes.values():
            layer = node.layer_class.from_config({**node.config, "name": node.name})
            if not node.inputs:
                tensors[node.name] = layer.output
                continue
            inputs = [tensors[name] for name in node.inputs]
            arguments = inputs[0] if len(inputs) == 1 else inputs
            called = wrap(node, layer) if wrap else layer
            tensors[node.name] = called(arguments)
            # A wrapper has weights of its own besides those of the layer inside.
            weights = layer.weights if called is layer else called.trainable_weights
            for variable, value in zip(weights, node.weights, strict=True):
                variable.assign(value)
        image = tensors[self.input_name]
        if outputs is None:
            return keras.Model(image, tensors[self.output_name], name="network")
        return keras.Model(image, [tensors[name] for name in outputs], name="network")


@dataclasses.dataclass(frozen=True)
class LayerRead:
    """One call of a layer, as it was found in a model.

    Attributes:
      name: of the layer; another one for each further call.
      kind: its class.
      shape: of its output without the batch; None is a size that may be any.
      parameters: numbers in its weights.
      nodes: names of the nodes that it became; the last gives its output.
      problem: why it cannot be read, or None.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...]
    parameters: int
    nodes: tuple[str, ...]
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """A model as it was read.

    Attributes:
      graph: its nodes; Unreadable ones stand for layers that cannot be read.
      layers: what was found, the input first, each behind what it reads.
      problems: one for each layer that cannot be read.
    """

    graph: Graph
    layers: Sequence[LayerRead]
    problems: Sequence[LayerProblem]

    def check(self) -> None:
        """Raises UnsupportedLayerError if a layer cannot be read; it names all."""
        if self.problems:
            raise UnsupportedLayerError.of(self.problems)


def read_layers(model: Any, reader: "Reader") -> Reading:
    """Reads a model as `Graph.from_model` does, but to its end, whatever it finds."""
    nodes: dict[str, Node] = {}
    problems: list[LayerProblem] = []
    layers: list[LayerRead] = []
    (output,) = _add_nodes(nodes, problems, layers, model, None, reader)
    graph = Graph(_sorted(nodes, output), output)
    layers.sort(key=lambda layer: graph.input_name not in layer.nodes)
    return Reading(graph, layers, problems)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one layer, as it is found in a model.

    Attributes:
      layer: what was called.
      inputs: the symbolic tensors that it was called on.
      outputs: the symbolic tensors that it gave.
      args: positional arguments, the inputs among them.
      kwargs: arguments by name.
    """

    layer: Any
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


class Reader:
    """Reads tf_keras models, each layer as one node. Others read more, or otherwise.

    Attributes:
      has_rewritten: whether a node is not the layer that it was read from.
    """

    has_rewritten = False

    def ends(self, model: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """The symbolic inputs and outputs of a model."""
        return model.inputs, model.outputs

    def origin(self, tensor: Any) -> tuple[Any, int]:
        """The layer that gave a symbolic tensor, and in which of its calls."""
        layer, index, _ = tensor._keras_history
        return layer, index

    def call(self, layer: Any, index: int) -> Call:
        """One of a layer's calls."""
        inbound = layer._inbound_nodes[index]
        outputs = inbound.outputs
        return Call(
            layer,
            [] if self.is_input(layer) else inbound.keras_inputs,
            outputs if isinstance(outputs, (list, tuple)) else [outputs],
            inbound.call_args,
            inbound.call_kwargs,
        )

    def is_model(self, layer: Any) -> bool:
        """Whether a layer is a model, whose own layers are read."""
        return isinstance(layer, keras.Model)

    def is_input(self, layer: Any) -> bool:
        """Whether a layer is the input of a model."""
        return isinstance(layer, keras.layers.InputLayer)

    def nodes(
        self, call: Call, sources: Sequence[Node], taken: Collection[str]
    ) -> list[Node]:
        """The nodes that a call becomes; the last gives its output.

        Args:
          call: of a layer that is no model.
          sources: the nodes that give its inputs, in order.
          taken: names that are not free.

        Raises:
          UnsupportedLayerError: it cannot become nodes.
        """
        check_call(call)
        layer = call.layer
        return [
            Node.of(
                layer,
                unique_name(taken, layer.name),
                [source.name for source in sources],
                call.outputs[0].shape[1:],
                layer.get_weights(),
            )
        ]


def check_call(call: Call) -> None:
    """Raises UnsupportedLayerError unless a call has inputs alone, and one output."""
    further = {
        name: value
        for name, value in call.kwargs.items()
        if value is not None and not (name == "training" and not value)
    }
    if len(call.args) > 1 or further:
        what = ", ".join(further) or "positional arguments"
        raise unsupported(
            call.layer,
            f"it is called with more than its inputs ({what}); use a layer that has "
            "them as settings",
        )
    if len(call.outputs) != 1:
        raise unsupported(
            call.layer, "it gives several outputs; only layers with one can be"
        )


def unsupported(layer: Any, reason: str) -> UnsupportedLayerError:
    """The error that says why a layer cannot be quantized."""
    return UnsupportedLayerError.of(
        [LayerProblem(layer.name, type(layer).__name__, reason)]
    )


def _add_nodes(
    nodes: dict[str, Node],
    problems: list[LayerProblem],
    layers: list[LayerRead],
    model: Any,
    feeds: list[str] | None,
    reader: Reader,
) -> list[str]:
    """Adds the nodes of `model`; returns the names of those that give its outputs.

    Args:
      nodes: filled in place.
      problems: filled in place; a layer that cannot be read leaves a node that
        only passes its shape on, so that all such layers are found at once.
      layers: filled in place.
      model: a functional or Sequential model.
      feeds: for a model inside another, the nodes that feed its inputs.
      reader: reads the model.
    """
    names: dict[tuple[int, int], str] = {}
    model_inputs, model_outputs = reader.ends(model)
    if feeds is not None:
        for tensor, feed in zip(model_inputs, feeds):
            layer, index = reader.origin(tensor)
            names[id(layer), index] = feed
    # Depth first, with a stack in place of recursion.
    stack = [reader.origin(tensor) for tensor in model_outputs]
    while stack:
        layer, index = stack[-1]
        if (id(layer), index) in names:
            stack.pop()
            continue
        call = reader.call(layer, index)
        origins = [reader.origin(tensor) for tensor in call.inputs]
        missing = [o for o in origins if (id(o[0]), o[1]) not in names]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        inputs = [names[id(o[0]), o[1]] for o in origins]
        try:
            if reader.is_model(layer):
                check_call(call)
                made = _add_nodes(nodes, problems, layers, layer, inputs, reader)
                names[id(layer), index] = made[-1]
                continue
            new = reader.nodes(call, [nodes[name] for name in inputs], nodes)
            problem = None
        except UnsupportedLayerError as error:
            problems.extend(error.problems)
            problem = error.problems[0].reason
            shape = tuple(call.outputs[0].shape[1:])
            name = unique_name(nodes, layer.name)
            new = [Node(name, Unreadable, {}, (), tuple(inputs), shape)]
        layers.append(_layer_read(call, new, problem))
        nodes.update({node.name: node for node in new})
        names[id(layer), index] = new[-1].name
    ends = [reader.origin(tensor) for tensor in model_outputs]
    return [names[id(layer), index] for layer, index in ends]


def _layer_read(call: Call, nodes: Sequence[Node], problem: str | None) -> LayerRead:
    weights = getattr(call.layer, "weights", ())  # an operation has none
    return LayerRead(
        nodes[-1].name,
        type(call.layer).__name__,
        tuple(call.outputs[0].shape[1:]),
        sum(math.prod(weight.shape) for weight in weights),
        tuple(node.name for node in nodes),
        problem,
    )


def unique_name(taken: Iterable[str], name: str) -> str:
    """`name`, or the first of `name_2`, `name_3`, ... that is not taken."""
    taken = set(taken)
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)


def _sorted(nodes: Mapping[str, Node], output: str) -> list[Node]:
    """The nodes, in their order, the input first and without what leads nowhere."""
    needed, todo = {output}, [output]
    while todo:
        for name in nodes[todo.pop()].inputs:
            if name not in needed:
                needed.add(name)
                todo.append(name)
    kept = [node for name, node in nodes.items() if name in needed]
    return sorted(kept, key=lambda node: bool(node.inputs))
