"""What a model is, and what each of its layers becomes in an integer file.

Nothing here knows a rule of its own: the model goes through the rewriting that its
quantization would do, and each layer is followed to the operators that a file of the
rewritten network has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph import (
    Classifier,
    Graph,
    ModelDescription,
    Node,
    macs_of,
    rewriting,
)
from dfq_tf.importing import classifiers
from dfq_tf.quantization import float_network, grids, with_pixels
from dfq_tf.tflite import Outline, file_bytes, outline


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
      is_unclear: whether it gives one score, of which nobody says that it is a logit.
      description: how pixels become the model's input, its own preprocessing
        included; None if neither the model nor the user says.
      is_on_top: whether the model has preprocessing of its own: what is said of its
        input comes before that.
      findings: what nobody said and was found, as arguments that say it.
      rows: a line for each layer.
      num_batch_normalizations: what generated images go by.
      parameters: numbers in all weights.
      multiply_accumulates: of convolutions and dense layers, for one image, without
        those that cannot be read.
      file_bytes: size of the int8 file; None if there can be none.
      classifier: the model as it is quantized; None if it cannot be. One that does
        not say how it is fed takes pixels as they are here, and an unclear score is a
        logit.
    """

    is_keras3: bool
    image_shape: tuple[int, int, int]
    num_outputs: int
    gives: str
    is_unclear: bool
    description: ModelDescription | None
    is_on_top: bool
    findings: Mapping[str, Any]
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
      model: as in `classifiers.as_classifier`.
      **arguments: as in `classifiers.as_classifier`. What is missing there, and how a
        model is fed, is left open here.

    Raises:
      ModelError: the file cannot be read, the model is no image classifier, or it
        does another thing when it is rebuilt.
      ConfigError: an argument does not fit the model.
    """
    reading = classifiers.read(model, **arguments)
    network = reading.network
    outputs = network.graph.last.shape[-1] or 1
    feeding = network.feeding or classifiers.Preprocessing()
    description = classifiers.described(feeding, network.gives, ("",) * outputs)

    followed = _follow(network, description)
    rows = [followed.row(layer) for layer in reading.layers]
    is_whole = not any(row.problem for row in rows)
    classifier = None
    if is_whole:
        fed_reading = reading if network.feeding else reading.fed_pixels()
        if network.is_unclear:
            fed_reading = fed_reading.giving_logits()
        classifier = classifiers.classifier_of(fed_reading, compiles=False)
    return Inspection(
        is_keras3=reading.told.is_keras3,
        image_shape=reading.graph.image.shape,  # type: ignore[arg-type]
        num_outputs=outputs,
        gives=network.gives,
        is_unclear=network.is_unclear,
        description=description if network.feeding else None,
        is_on_top=network.own is not None,
        findings=reading.findings,
        rows=rows,
        num_batch_normalizations=sum(
            row.kind.endswith("BatchNormalization") for row in rows
        ),
        parameters=int(reading.told.model.count_params()),
        multiply_accumulates=macs_of(network.graph.nodes.values()),
        file_bytes=file_bytes(float_network(classifier)) if classifier else None,
        classifier=classifier,
    )


def _follow(network: classifiers.Network, description: ModelDescription) -> "_Followed":
    """Rewrites a network as its quantization would, whatever is refused.

    Args:
      network: as it was read.
      description: of it.
    """
    graph = rewriting.logits_graph(network.graph, description)
    taken_off = None if graph.output == network.graph.output else network.graph.last
    problems = {}
    if network.is_binary:
        try:
            is_logit = network.gives == "sigmoid"
            graph = rewriting.two_class_logits(graph, is_logit)
        except UnsupportedLayerError as error:
            problems = {each.name: each.reason for each in error.problems}
    graph = rewriting.fold(graph)
    problems = {p.name: p.reason for p in rewriting.refused(graph)} | problems
    description = dataclasses.replace(
        description,
        output="logits",
        class_names=tuple(map(str, range(graph.last.shape[-1] or 1))),
        probabilities=None if problems else network.probabilities,
    )
    fed = with_pixels(graph, description)
    graph = grids.separated(fed.graph)
    return _Followed(
        graph,
        outline(graph, fed.description),
        problems,
        taken_off,
        # Otherwise an operator of its own does what the preprocessing did.
        is_free=fed.description.input_mean == description.input_mean,
    )


@dataclasses.dataclass(frozen=True)
class _Followed:
    """The layers of a model in its rewritten network, and in the outline of its file.

    Attributes:
      graph: at the end of all rewriting. Its nodes know the layers that they stand
        for; the first of them is named in the table.
      outline: of the file of `graph`.
      problems: layer -> why it is refused.
      taken_off: the softmax or sigmoid that was the network's end, or None.
      is_free: whether the quantization of the pixels does the preprocessing.
    """

    graph: Graph
    outline: Outline
    problems: Mapping[str, str]
    taken_off: Node | None
    is_free: bool

    def row(self, layer: classifiers.LayerRead) -> Row:
        """What a layer becomes."""
        problem = layer.problem or self.problems.get(layer.name)
        becomes = f"NOT POSSIBLE: {problem}" if problem else self._becomes(layer)
        return Row(
            layer.name, layer.kind, layer.shape, layer.parameters, becomes, problem
        )

    def _becomes(self, layer: classifiers.LayerRead) -> str:
        operators = [
            _qualified(operator, node)
            for name, node in self.graph.nodes.items()
            if self._layers(node)[0] == layer.name
            for operator in self.outline.operators[name]
        ]
        if layer.name == self._end():
            operators += self.outline.behind
        if operators:
            return ", ".join(operators)
        nodes = [n for n in self.graph.nodes.values() if layer.name in n.layers]
        if not nodes:
            return "dropped"
        if self.is_free and all(not node.inputs for node in nodes):
            return "input quantization"
        return "in " + ", ".join(dict.fromkeys(map(self._host, nodes)))

    def _end(self) -> str:
        """The layer that what stands behind the logits is told of."""
        end = self.taken_off
        return self._host(self.graph.last) if end is None else end.layers[0]

    def _layers(self, node: Node) -> Sequence[str]:
        """The layers that a node stands for; what feeds the network is the image's."""
        return node.layers or self.graph.image.layers

    def _host(self, node: Node) -> str:
        """The layer in whose operator a node is."""
        host = self.outline.taken_in.get(node.name, node.name)
        return self._layers(self.graph.nodes[host])[0]


def _qualified(operator: str, node: Node) -> str:
    is_affine = operator == "DEPTHWISE_CONV_2D" and (
        node.weights["kernel"].shape[:2] == (1, 1)
    )
    return f"1x1 {operator}" if is_affine else operator
