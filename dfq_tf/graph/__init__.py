"""The representation of a network, the rewrites of it, and what a classifier is."""

from dfq_tf.graph.blocks import blocks_of
from dfq_tf.graph.classifier import (
    Classifier,
    agreement,
    check_images,
    in_batches,
    softmax,
)
from dfq_tf.graph.description import (
    OUTPUTS,
    ModelDescription,
    described_at,
    description_beside,
    description_path,
)
from dfq_tf.graph.equalization import equalize
from dfq_tf.graph.layers import (
    GLOBAL_POOLS,
    KINDS,
    Bounds,
    Exactly,
    NoFurther,
    by_output,
    concatenation_axis,
    has_kernel,
    macs_of,
    problem,
    title,
)
from dfq_tf.graph.nodes import Graph, Node, Shape, frozen, leading_to, unique_name
from dfq_tf.graph.rewriting import (
    activation_last,
    head_activation,
    logits_graph,
    two_class_logits,
)
from dfq_tf.graph.running import (
    ALIVE,
    FLOAT,
    MOST_SCORED,
    compute,
    frozen_weights,
    images_per_pass,
    keep,
    largest_output,
    num_values,
)

__all__ = [
    "ALIVE",
    "FLOAT",
    "GLOBAL_POOLS",
    "images_per_pass",
    "num_values",
    "Bounds",
    "Classifier",
    "Exactly",
    "Graph",
    "KINDS",
    "MOST_SCORED",
    "ModelDescription",
    "NoFurther",
    "Node",
    "OUTPUTS",
    "Shape",
    "activation_last",
    "agreement",
    "blocks_of",
    "by_output",
    "check_images",
    "compute",
    "concatenation_axis",
    "described_at",
    "description_beside",
    "description_path",
    "equalize",
    "frozen",
    "frozen_weights",
    "has_kernel",
    "head_activation",
    "in_batches",
    "keep",
    "largest_output",
    "leading_to",
    "logits_graph",
    "macs_of",
    "problem",
    "softmax",
    "title",
    "two_class_logits",
    "unique_name",
]
