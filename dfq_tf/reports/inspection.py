"""What a model is, and what each of its layers becomes in an integer file.

Nothing here knows a rule of its own: the model goes through the rewriting that its
quantization would do, and each layer is followed to the operators that a file of the
rewritten network has.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph, LayerRead, Node, Unreadable
from dfq_tf.graph.rewriting import (
    activation_name,
    drop_training_only,
    logits_graph,
    two_class_logits,
)
from dfq_tf.importing import classifiers
from dfq_tf.importing.preprocessing import Preprocessing
from dfq_tf.quantization import apply
from dfq_tf.tflite import writer
from dfq_tf.tflite.writer import Outline

_WITH_KERNEL = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a model.

    Attributes:
      name: of the layer.
      kind: its class, such as 'Conv2D'.
      shape: of its output without the batch; None is a size that may be any.
      parameters: numbers in its weights.
      becomes: what it is in the file: its operators, such as 'LOGISTIC, MUL'; 'in
        NAME' where another layer has taken it in; or why it is not there.
      problem: why it cannot be quantized, or None.
    """

    name: str
    kind: str
    shape: tuple[int | None, ...]
    parameters: int
    becomes: str
    problem: str | None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
      is_keras3: whether it is a model of Keras 3.
      image_shape: (height, width, channels).
      num_outputs: scores that the model gives; one is of two classes.
      gives: 'logits', 'softmax' or 'sigmoid'.
      description: how pixels become the model's input, its own preprocessing
        included; None if neither the model nor the user says.
      rows: a line for each layer.
      num_batch_normalizations: what generated images go by.
      parameters: numbers in all weights.
      multiply_accumulates: of convolutions and dense layers, for one image, without
        those that cannot be read.
      file_bytes: size of the int8 file; None if there can be none.
      classifier: the model as it is quantized; None if it cannot be. One that does
        not say how it is fed takes pixels as they are here.
    """

    is_keras3: bool
    image_shape: tuple[int, int, int]
    num_outputs: int
    gives: str
    description: ModelDescription | None
    rows: Sequence[Row]
    num_batch_normalizations: int
    parameters: int
    multiply_accumulates: int
    file_bytes: int | None
    classifier: Classifier | None

    @property
    def problems(self) -> list[Row]:
        """The layers that cannot be quantized."""
        return [row for row in self.rows if row.problem]


def inspect(model: Any, **arguments: Any) -> Inspection:
    """Reads a model and looks at each of its layers.

    Args:
      model: as in `importing.as_classifier`.
      **arguments: as in `importing.as_classifier`. What is missing there, and how a
        model is fed, is left open here.

    Raises:
      ModelError: the file cannot be read, the model is no image classifier, or it
        does another thing when it is rebuilt.
      ConfigError: an argument does not fit the model.
    """
    reading = classifiers.read(model, **arguments)
    network = classifiers.network(reading)
    whole = reading.graph
    outputs = network.graph.nodes[network.graph.output_name].shape[-1]
    names = ("",) * outputs
    feeding = network.feeding or Preprocessing()
    description = classifiers.described(feeding, network.gives, names)

    fate = _Fate(reading.layers)
    fate.note_unread(whole)
    graph = logits_graph(network.graph, description)
    fate.note_end(network.graph, graph)
    if network.is_binary:
        graph = fate.through(two_class_logits, graph)
    fate.note_gone(graph, drop_training_only(graph), lambda _: "dropped")
    for rewrite in apply.PASSES:
        graph = fate.through(rewrite, graph)
    graph, fed = apply.with_pixels(graph, description)
    # Otherwise an operator of its own does what the preprocessing did.
    is_free = fed.input_mean == description.input_mean

    def of_head(node: Node) -> str | None:
        if node.kind != "Rescaling":
            return "dropped"
        return "input quantization" if is_free else None

    fate.note_gone(whole, network.graph, of_head)
    outline = writer.outline(graph)
    rows = [fate.row(layer, graph, outline) for layer in reading.layers]

    is_whole = not any(row.problem for row in rows)
    classifier = None
    if is_whole:
        fed_reading = reading if network.feeding else reading.fed_pixels()
        classifier = classifiers.classifier_of(fed_reading)
    return Inspection(
        is_keras3=reading.told.is_keras3,
        image_shape=whole.nodes[whole.input_name].shape,  # type: ignore[arg-type]
        num_outputs=outputs,
        gives=network.gives,
        description=description if network.feeding else None,
        rows=rows,
        num_batch_normalizations=sum(row.kind == "BatchNormalization" for row in rows),
        parameters=int(reading.told.model.count_params()),
        multiply_accumulates=multiply_accumulates(network.graph),
        file_bytes=outline.num_bytes if is_whole else None,
        classifier=classifier,
    )


def multiply_accumulates(graph: Graph) -> int:
    """Those of convolutions and dense layers, for one image.

    Args:
      graph: before or after `rewrite.fold`. Layers whose size may be any count as
        one pixel.
    """
    return sum(
        # Each value of an output takes one column of the kernel.
        math.prod(size or 1 for size in node.shape[:-1]) * weights.size
        for node in graph.nodes.values()
        if node.kind in _WITH_KERNEL
        for weights in node.weights
        if weights.ndim > 1
    )


class _Fate:
    """Follows each layer of a model through the rewriting.

    Args:
      layers: what was found in the model.
    """

    def __init__(self, layers: Sequence[LayerRead]) -> None:
        self._layer_of = {node: layer.name for layer in layers for node in layer.nodes}
        # All by the names of the nodes as they were read: why one cannot be, what
        # became of one that is gone, and what else happened to one that is there.
        self._reasons = {
            layer.nodes[-1]: layer.problem for layer in layers if layer.problem
        }
        self._gone: dict[str, str] = {}
        self._remarks: dict[str, str] = {}

    def through(self, rewrite: Callable[[Graph], Graph], graph: Graph) -> Graph:
        """Rewrites a graph; what the rewrite refuses is noted, and made Unreadable."""
        while True:
            try:
                return rewrite(graph)
            except UnsupportedLayerError as error:
                refused = {
                    problem.name: problem.reason
                    for problem in error.problems
                    if graph.nodes[problem.name].layer_class is not Unreadable
                }
                if not refused:
                    return graph  # all of them are noted
                for name, reason in refused.items():
                    self._reasons.setdefault(graph.origin(name), reason)
                blanks = {
                    name: [_unreadable(graph.nodes[name])] for name in sorted(refused)
                }
                graph = graph.replaced(blanks, {})

    def note_gone(
        self, before: Graph, after: Graph, what: Callable[[Node], str | None]
    ) -> None:
        """Notes what became of the nodes that a step has taken away.

        Args:
          before: the step.
          after: the step.
          what: says it of a node; None where a node has gone into another one.
        """
        for name, node in before.nodes.items():
            said = None if name in after.nodes else what(node)
            if said is not None:
                self._gone[before.origin(name)] = said

    def note_unread(self, graph: Graph) -> None:
        """Notes the nodes whose readers read past them, as a stack of channels does."""
        for name in self._layer_of.keys() - graph.nodes.keys():
            self._gone[name] = "in what reads it"

    def note_end(self, before: Graph, after: Graph) -> None:
        """Notes what has become of the softmax or sigmoid at the end."""
        self.note_gone(before, after, lambda _: "taken off: the file gives logits")
        last = before.nodes[before.output_name]
        kept = after.nodes.get(last.name)
        if kept is not None and activation_name(kept) != activation_name(last):
            self._remarks[last.name] = f"; {activation_name(last)} taken off"

    def row(self, layer: LayerRead, graph: Graph, outline: Outline) -> Row:
        """What a layer becomes.

        Args:
          layer: as it was found.
          graph: at the end of all rewriting.
          outline: of the file of `graph`.
        """
        reasons = [self._reasons[node] for node in layer.nodes if node in self._reasons]
        problem = reasons[0] if reasons else None
        return Row(
            layer.name,
            layer.kind,
            layer.shape,
            layer.parameters,
            f"NOT POSSIBLE: {problem}"
            if problem
            else self._becomes(layer, graph, outline),
            problem,
        )

    def _becomes(self, layer: LayerRead, graph: Graph, outline: Outline) -> str:
        operators = [
            _qualified(operator, node)
            for name, node in graph.nodes.items()
            if graph.origin(name) in layer.nodes
            for operator in outline.operators[name]
        ]
        if operators:
            return ", ".join(operators) + self._remarks.get(layer.nodes[-1], "")
        if layer.nodes[-1] in self._gone:
            return self._gone[layer.nodes[-1]]
        hosts = []
        for name in layer.nodes:
            while name in graph.renamed:
                name = graph.renamed[name]
            name = outline.taken_in.get(name, name)
            hosts.append(self._layer_of[graph.origin(name)])
        return "in " + ", ".join(dict.fromkeys(hosts))


def _unreadable(node: Node) -> Node:
    return dataclasses.replace(node, layer_class=Unreadable, config={}, weights=())


def _qualified(operator: str, node: Node) -> str:
    is_affine = operator == "DEPTHWISE_CONV_2D" and node.weights[0].shape[:2] == (1, 1)
    return f"1x1 {operator}" if is_affine else operator
