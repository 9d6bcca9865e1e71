"""A Keras functional model as plain data: what a rewrite reads, changes and builds.

A `Graph` holds one `Node` per call of a layer, in topological order, with the
layer's configuration and its weights as NumPy arrays. Rewriting is then work on
dictionaries; `Graph.build` turns the result into a Keras model again.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.errors import UnsupportedLayerError

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

    @property
    def kind(self) -> str:
        """The name of the layer's class, such as 'Conv2D'."""
        return self.layer_class.__name__


class Graph:
    """Nodes in topological order, from one input to one output.

    Attributes:
      nodes: name -> Node; a node comes after its inputs.
      input_name: the node of class InputLayer.
      output_name: the node whose output is the model's.
    """

    def __init__(self, nodes: Iterable[Node], output_name: str) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.output_name = output_name
        self.input_name = next(iter(self.nodes))

    @classmethod
    def from_model(cls, model: keras.Model) -> "Graph":
        """Reads a functional or Sequential model; models inside it are laid flat.

        A layer that is called more than once becomes one node per call, each with
        its own copy of the weights.

        Raises:
          UnsupportedLayerError: a layer gives several outputs, or is called with
          arguments that are no inputs.
        """
        nodes: dict[str, Node] = {}
        (output,) = _add_nodes(nodes, model, None)
        return cls(_sorted(nodes, output), output)

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

        nodes = [
            dataclasses.replace(new, inputs=tuple(map(final, new.inputs)))
            for name, node in self.nodes.items()
            for new in replacements.get(name, [node])
        ]
        return Graph(nodes, final(self.output_name))

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
        return Graph([image, *head, *rest], self.output_name)

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


def _add_nodes(
    nodes: dict[str, Node], model: keras.Model, feeds: list[str] | None
) -> list[str]:
    """Adds the nodes of `model`; returns the names of those that give its outputs.

    Args:
      nodes: filled in place.
      model: a functional or Sequential model.
      feeds: for a model inside another, the nodes that feed its inputs.
    """
    names: dict[tuple[int, int], str] = {}
    if feeds is not None:
        for tensor, feed in zip(model.inputs, feeds):
            layer, index, _ = tensor._keras_history
            names[id(layer), index] = feed
    # Depth first, with a stack in place of recursion.
    stack = [tensor._keras_history[:2] for tensor in model.outputs]
    while stack:
        layer, index = stack[-1]
        if (id(layer), index) in names:
            stack.pop()
            continue
        inbound = layer._inbound_nodes[index]
        sources = [t._keras_history[:2] for t in inbound.keras_inputs]
        if isinstance(layer, keras.layers.InputLayer):
            sources = []
        missing = [s for s in sources if (id(s[0]), s[1]) not in names]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        inputs = [names[id(s[0]), s[1]] for s in sources]
        _check_call(layer, inbound)
        if isinstance(layer, keras.Model):
            (names[id(layer), index],) = _add_nodes(nodes, layer, inputs)
        else:
            names[id(layer), index] = _add_node(nodes, layer, inbound, inputs)
    return [names[id(t._keras_history[0]), t._keras_history[1]] for t in model.outputs]


def _check_call(layer: keras.layers.Layer, inbound: Any) -> None:
    """Refuses a call whose arguments are not all inputs: a node cannot hold them."""
    further = {
        name: value
        for name, value in inbound.call_kwargs.items()
        if value is not None and not (name == "training" and not value)
    }
    if len(inbound.call_args) > 1 or further:
        raise UnsupportedLayerError(
            f"layer {layer.name} ({type(layer).__name__}) is called with more than its "
            f"inputs ({', '.join(further) or 'positional arguments'}); use a layer "
            "that has them as settings, such as Add in place of +"
        )


def _add_node(
    nodes: dict[str, Node], layer: keras.layers.Layer, inbound: Any, inputs: list[str]
) -> str:
    if isinstance(inbound.outputs, (list, tuple)):
        raise UnsupportedLayerError(
            f"layer {layer.name} ({type(layer).__name__}) gives several outputs; only "
            "layers with one output can be quantized"
        )
    name = unique_name(nodes, layer.name)
    nodes[name] = Node(
        name=name,
        layer_class=type(layer),
        # Without `trainable`: the twin of a frozen layer is trained like any other.
        config={k: v for k, v in layer.get_config().items() if k != "trainable"},
        weights=tuple(layer.get_weights()),
        inputs=tuple(inputs),
        shape=tuple(inbound.outputs.shape[1:]),
    )
    return name


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
