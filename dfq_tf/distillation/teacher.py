"""A teacher that shows what enters its BN layers, and what they have stored."""

import dataclasses
import warnings

from dfq_tf.compat import keras, tf
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.graph.rewriting import (
    batch_normalization_weights,
    drop_training_only,
    logits_graph,
)
from dfq_tf.training.copies import with_precision


@dataclasses.dataclass(frozen=True)
class ObservedTeacher:
    """A frozen teacher and its BN statistics.

    Attributes:
      model: from normalised images to a list: float32 logits, then the input of each
        BN layer.
      description: how pixels become the model's input.
      means: stored moving mean of each BN layer, float32 (channels,).
      variances: stored moving variance of each BN layer, float32 (channels,).
    """

    model: keras.Model
    description: ModelDescription
    means: list[tf.Tensor]
    variances: list[tf.Tensor]

    def __call__(self, pixels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Logits, and what enters each BN layer, for float32 pixels in [0, 255].

        BN layers use what they have stored: the teacher never changes.
        """
        outputs = self.model(self.description.normalize(pixels), training=False)
        # Keras gives a lone output bare, and not in a list.
        logits, *inputs = tf.nest.flatten(outputs)
        return logits, inputs


def observe(teacher: Classifier, precision: str = "float32") -> ObservedTeacher:
    """Copies a teacher as one that shows its BN inputs.

    Args:
      teacher: any functional classifier. Without BN layers it works all the same,
        with a warning: nothing then keeps the images close to the training data.
      precision: see `resolve_precision`.
    """
    graph = logits_graph(Graph.from_model(teacher.model), teacher.description)
    graph = drop_training_only(graph)
    layers = [n for n in graph.nodes.values() if n.kind == "BatchNormalization"]
    if not layers:
        warnings.warn(
            "the teacher has no BatchNormalization: its generated images follow no "
            "statistics of the training data, only the entropies of its answers",
            stacklevel=2,
        )
    model = graph.build(outputs=[graph.output_name, *(n.inputs[0] for n in layers)])
    statistics = [batch_normalization_weights(layer)[2:] for layer in layers]
    return ObservedTeacher(
        with_precision(model, precision),
        teacher.description,
        [tf.constant(mean, tf.float32) for mean, _ in statistics],
        [tf.constant(variance, tf.float32) for _, variance in statistics],
    )
