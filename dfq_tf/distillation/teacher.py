"""A teacher that shows what enters its BN layers, and what they have stored."""

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import (
    KINDS,
    Classifier,
    Graph,
    ModelDescription,
    logits_graph,
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
      precision: 'float32' or 'bfloat16': what all nodes compute in but the last one,
        which computes in float32.
      bn_inputs: names of the nodes whose outputs enter the BN layers.
      means: stored moving mean of each BN layer, float32 (channels,).
      variances: stored moving variance of each BN layer, float32 (channels,).
    """

    graph: Graph
    description: ModelDescription
    weights: Mapping[str, Mapping[str, tf.Variable]]
    precision: str
    bn_inputs: list[str]
    means: list[tf.Tensor]
    variances: list[tf.Tensor]

    def __call__(self, pixels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Logits, and what enters each BN layer, for float32 pixels in [0, 255].

        BN layers use what they have stored: the teacher never changes.
        """
        with tf.name_scope("teacher"):
            images = tf.cast(self.description.normalize(pixels), self.precision)
            last = self.graph.last
            wanted = [*last.inputs, *self.bn_inputs]
            found = running.compute(self.graph, images, wanted, weights=self.weights)
            count = len(last.inputs)
            read = [tf.cast(values, tf.float32) for values in found[:count]]
            logits = KINDS[last.kind].compute(last, read, self.weights[last.name])
        return logits, found[count:]


def observe(
    teacher: Classifier,
    precision: str = "float32",
    strategy: tf.distribute.Strategy | None = None,
) -> ObservedTeacher:
    """Copies a teacher as one that shows its BN inputs.

    Args:
      teacher: any classifier. Without BN layers it works all the same, with a warning:
        nothing then keeps the images close to the training data.
      precision: 'float32' or 'bfloat16'.
      strategy: the devices that run it; None for one. Each worker gets the weights that
        worker 0 has.
    """
    graph = logits_graph(teacher.graph, teacher.description)
    norms = [n for n in graph.nodes.values() if n.kind == "batch_normalization"]
    if not norms:
        warnings.warn(
            "the teacher has no BatchNormalization: its generated images follow no "
            "statistics of the training data, only the entropies of its answers",
            stacklevel=2,
        )
    graph = _of_first_worker(graph, strategy)
    with devices.scope(strategy):
        weights = running.frozen_weights(graph, precision)
        weights[graph.output] = {
            role: tf.Variable(value, trainable=False)
            for role, value in graph.last.weights.items()
        }
    return ObservedTeacher(
        graph,
        teacher.description,
        weights,
        precision,
        [node.inputs[0] for node in norms],
        [tf.constant(node.weights["mean"]) for node in norms],
        [tf.constant(node.weights["variance"]) for node in norms],
    )


def _of_first_worker(graph: Graph, strategy: tf.distribute.Strategy | None) -> Graph:
    places = [(n.name, role) for n in graph.nodes.values() for role in n.weights]
    arrays: list[np.ndarray] = [graph.nodes[n].weights[role] for n, role in places]
    values: dict[str, dict[str, np.ndarray]] = {}
    for (name, role), array in zip(places, devices.from_first_worker(strategy, arrays)):
        values.setdefault(name, {})[role] = array
    return graph.with_weights(values)
