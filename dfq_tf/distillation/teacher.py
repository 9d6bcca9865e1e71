"""A teacher that shows what enters its BN layers, and what they have stored."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import (
    FLOAT,
    KINDS,
    Classifier,
    Graph,
    ModelDescription,
    Node,
    has_kernel,
    images_per_pass,
    logits_graph,
    num_values,
    running,
)
from dfq_tf.training import devices


@dataclasses.dataclass(frozen=True)
class ObservedTeacher:
    """A frozen teacher and its BN statistics.

    Attributes:
      graph: from normalised images to logits.
      description: how pixels become the network's input.
      weights: of the graph's nodes: variables that nothing changes.
      precision: 'float32' or 'bfloat16': what all nodes compute in but the last ones,
        from the last kernel on, which compute in float32.
      bn_inputs: names of the nodes whose outputs enter the BN layers.
      means: stored moving mean of each BN layer, float32 (channels,).
      variances: stored moving variance of each BN layer, float32 (channels,).
      epsilons: what each BN layer adds to variances.
    """

    graph: Graph
    description: ModelDescription
    # With these, a notebook would show pages.
    weights: Mapping[str, Mapping[str, tf.Variable]] = dataclasses.field(repr=False)
    precision: str
    bn_inputs: list[str] = dataclasses.field(repr=False)
    means: list[tf.Tensor] = dataclasses.field(repr=False)
    variances: list[tf.Tensor] = dataclasses.field(repr=False)
    epsilons: list[float] = dataclasses.field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images."""
        return self.graph.image.shape  # type: ignore[return-value]

    @property
    def num_classes(self) -> int:
        """Length of an answer."""
        return self.graph.last.shape[-1]  # type: ignore[return-value]

    def __call__(self, pixels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Logits, and what enters each BN layer, for float32 pixels in [0, 255].

        BN layers use what they have stored: the teacher never changes.
        """
        with tf.name_scope("teacher"):
            images = tf.cast(self.description.normalize(pixels), self.precision)
            end = _end_of(self.graph)
            count = len(end[0].inputs)
            wanted = [*end[0].inputs, *self.bn_inputs]
            found = running.compute(self.graph, images, wanted, weights=self.weights)
            read = [tf.cast(values, tf.float32) for values in found[:count]]
            for node in end:
                read = [KINDS[node.kind].compute(node, read, self.weights[node.name])]
        return read[0], found[count:]


def observe(
    teacher: Classifier,
    precision: str = "float32",
    strategy: tf.distribute.Strategy | None = None,
) -> ObservedTeacher:
    """Copies a teacher as one that shows its BN inputs.

    Args:
      teacher: any classifier, with or without BN layers.
      precision: 'float32' or 'bfloat16'.
      strategy: the devices that run it; None for one. Each worker gets the weights that
        worker 0 has.
    """
    graph = logits_graph(teacher.graph, teacher.description)
    norms = [n for n in graph.nodes.values() if n.kind == "batch_normalization"]
    graph = _of_first_worker(graph, strategy)
    with devices.scope(strategy):
        weights = running.frozen_weights(graph, precision)
        for node in _end_of(graph):
            weights[node.name] = {
                role: tf.Variable(value, trainable=False)
                for role, value in node.weights.items()
            }
    return ObservedTeacher(
        graph,
        teacher.description,
        weights,
        precision,
        [node.inputs[0] for node in norms],
        [tf.constant(node.weights["mean"]) for node in norms],
        [tf.constant(node.weights["variance"]) for node in norms],
        [node.settings["epsilon"] for node in norms],
    )


def distance_of(
    teacher: ObservedTeacher,
    images: np.ndarray,
    strategy: tf.distribute.Strategy | None = None,
) -> float | None:
    """How far the statistics are that images cause from those that the teacher has.

    Each channel's distance is that of `losses.bn_statistics_loss`,
    KL(N(m, v) || N(mu, var)), with what the BN layer adds to variances added to both;
    then the mean over the channels of a layer, and the most of all layers: where one
    layer sees other values than it knows, what follows does too.

    Args:
      teacher: with or without BN layers.
      images: uint8 (count, height, width, channels).
      strategy: the devices of the run; None for one. Workers get what the first found.

    Returns:
      In nats, at least 0; None for a teacher without BN layers.
    """
    if not teacher.bn_inputs:
        return None
    count = images_per_pass(FLOAT * num_values(teacher.graph), len(images))
    means = [np.zeros(mean.shape) for mean in teacher.means]
    squares = [np.zeros(mean.shape) for mean in teacher.means]
    for start in range(0, len(images), count):
        part = images[start : start + count]
        share = len(part) / len(images)
        _, found = teacher(tf.constant(part, tf.float32))
        for mean, square, values in zip(means, squares, found):
            values = tf.cast(values, tf.float32)
            axes = range(values.shape.rank - 1)
            mean += share * tf.reduce_mean(values, axes).numpy()
            square += share * tf.reduce_mean(tf.square(values), axes).numpy()
    distances = []
    stored = zip(means, squares, teacher.means, teacher.variances, teacher.epsilons)
    for mean, square, mu, variance, epsilon in stored:
        v = np.maximum(square - mean**2, 0) + epsilon
        var = variance.numpy().astype(np.float64) + epsilon
        divergence = (
            ((mean - mu.numpy()) ** 2 + v) / (2 * var) - 0.5 - 0.5 * np.log(v / var)
        )
        distances.append(float(divergence.mean()))
    (first,) = devices.from_first_worker(strategy, [np.array(max(distances))])
    return float(first)


def _end_of(graph: Graph) -> list[Node]:
    """What computes the logits: the nodes from the last kernel on, in order.

    The last node alone where the way back to a kernel branches, or leads through a BN
    layer: what enters that is compared in the teacher's precision.
    """
    nodes = [graph.last]
    while not has_kernel(nodes[0]):
        sources = graph.sources(nodes[0])
        if len(sources) != 1 or nodes[0].kind == "batch_normalization":
            return [graph.last]
        nodes = [*sources, *nodes]
    return nodes


def _of_first_worker(graph: Graph, strategy: tf.distribute.Strategy | None) -> Graph:
    places = [(n.name, role) for n in graph.nodes.values() for role in n.weights]
    arrays: list[np.ndarray] = [graph.nodes[n].weights[role] for n, role in places]
    values: dict[str, dict[str, np.ndarray]] = {}
    for (name, role), array in zip(places, devices.from_first_worker(strategy, arrays)):
        values.setdefault(name, {})[role] = array
    return graph.with_weights(values)
