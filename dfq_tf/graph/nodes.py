"""A network as plain data: what every rewrite, range, writer and report works on.

A `Graph` holds nodes in topological order, each with a kind of the table in
`graph.layers`, its settings, and its float weights as NumPy arrays. No Keras object
is in it. `layers.node` makes nodes, `running.compute` runs a graph.
"""

import dataclasses
import hashlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# (height, width, channels) of an image, (n,) of a vector; None is any size.
Shape = tuple[int | None, ...]


def frozen(values: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """A mapping that nobody can change."""
    return types.MappingProxyType(dict(values or {}))


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation. `layers.node` makes it, and finds its shape.

    Attributes:
      name: unique in its graph; it lives on as the name of a tensor in the file.
      kind: a key of `layers.KINDS`.
      inputs: names of the nodes whose outputs it reads, in order.
      shape: of its output, without the batch.
      settings: the values that its kind has, and no others.
      weights: by role, such as 'kernel', float32.
      layers: names of the user's layers that this node stands for.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: Shape
    settings: Mapping[str, Any] = dataclasses.field(default_factory=frozen)
    weights: Mapping[str, np.ndarray] = dataclasses.field(default_factory=frozen)
    layers: tuple[str, ...] = ()

    def with_weights(self, **weights: np.ndarray) -> "Node":
        """The node with some weights exchanged or added, as float32."""
        values = {role: np.asarray(w, np.float32) for role, w in weights.items()}
        return dataclasses.replace(self, weights=frozen({**self.weights, **values}))

    def reading(self, *inputs: str) -> "Node":
        """The node with other inputs of the same shapes."""
        return dataclasses.replace(self, inputs=inputs)


class Graph:
    """Nodes in topological order, from one image to one output.

    Args:
      nodes: each behind what it reads; the first is the image. Nodes that do not
        lead to the output are left out.
      output: name of the node whose output is the network's.

    Attributes:
      nodes: name -> Node.
      output: as given.

    Raises:
      ValueError: a name stands twice, a node reads one that is not before it, the
        first node is not the only one without inputs, or there is no such output.
    """

    def __init__(self, nodes: Iterable[Node], output: str) -> None:
        given = list(nodes)
        seen: set[str] = set()
        for i, node in enumerate(given):
            if node.name in seen or not seen.issuperset(node.inputs):
                raise ValueError(f"node {node.name} is there twice, or reads {seen}")
            if bool(i) != bool(node.inputs):
                raise ValueError(f"node {node.name}: the first alone has no inputs")
            seen.add(node.name)
        if output not in seen:
            raise ValueError(f"the output {output} is none of {seen}")
        needed = {given[0].name, *leading_to(given, [output])}
        self.nodes: Mapping[str, Node] = types.MappingProxyType(
            {node.name: node for node in given if node.name in needed}
        )
        self.output = output
        self._consumers: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for name in dict.fromkeys(node.inputs):
                self._consumers[name].append(node)

    @property
    def image(self) -> Node:
        """The first node, of kind 'image'."""
        return next(iter(self.nodes.values()))

    @property
    def last(self) -> Node:
        """The node that gives the network's output."""
        return self.nodes[self.output]

    def digest(self) -> str:
        """SHA-256 of what the graph computes, in hexadecimal: names do not count."""
        numbers = {name: i for i, name in enumerate(self.nodes)}
        contents = hashlib.sha256()
        for node in self.nodes.values():
            inputs = [numbers[name] for name in node.inputs]
            settings = sorted(node.settings.items())
            contents.update(repr((node.kind, inputs, node.shape, settings)).encode())
            for role, weight in sorted(node.weights.items()):
                contents.update(f"{role}{weight.shape}{weight.dtype}".encode())
                contents.update(weight.tobytes())
        contents.update(f"{numbers[self.output]}".encode())
        return contents.hexdigest()

    def consumers(self, name: str) -> Sequence[Node]:
        """The nodes that read the output of `name`, each once, in order."""
        return self._consumers[name]

    def sources(self, node: Node) -> list[Node]:
        """The nodes that a node reads, in order."""
        return [self.nodes[name] for name in node.inputs]

    def replaced(
        self,
        replacements: Mapping[str, Iterable[Node]],
        renamed: Mapping[str, str] | None = None,
    ) -> "Graph":
        """A graph with some nodes exchanged.

        The user's layers go along: a new node without layers gets those of the node
        in whose place it stands; a node that is read instead of another one gets the
        other one's layers too.

        Args:
          replacements: name of a node -> the nodes that stand in its place, in
            topological order; an empty list removes it.
          renamed: name of a node that is gone -> the node whose output is read
            instead.
        """
        renamed = renamed or {}

        def final(name: str) -> str:
            while name in renamed:
                name = renamed[name]
            return name

        taken_over: dict[str, tuple[str, ...]] = {}
        for gone in renamed:
            heir = final(gone)
            taken_over[heir] = taken_over.get(heir, ()) + self.nodes[gone].layers
        nodes: list[Node] = []
        for name, node in self.nodes.items():
            for new in replacements.get(name, [node]):
                layers = (new.layers or node.layers) + taken_over.get(new.name, ())
                nodes.append(
                    dataclasses.replace(
                        new,
                        inputs=tuple(map(final, new.inputs)),
                        layers=tuple(dict.fromkeys(layers)),
                    )
                )
        return Graph(nodes, final(self.output))

    def with_weights(self, weights: Mapping[str, Mapping[str, Any]]) -> "Graph":
        """A graph of the same nodes with other weights.

        Args:
          weights: name of a node -> role -> array.
        """
        changed = {n: [self.nodes[n].with_weights(**w)] for n, w in weights.items()}
        return self.replaced(changed)


def leading_to(nodes: Sequence[Node], names: Iterable[str]) -> set[str]:
    """Names of the nodes on which the outputs of some nodes hang, themselves too.

    Args:
      nodes: each behind what it reads.
      names: of nodes.
    """
    needed = set(names)
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return needed


def unique_name(taken: Iterable[str], name: str) -> str:
    """`name`, or the first of `name_2`, `name_3`, ... that is not taken."""
    taken = set(taken)
    candidates = (name if i == 1 else f"{name}_{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)
