"""Bias correction (Nagel et al., ICCV 2019): undoes the shift that rounding causes.

Rounded weights and clipped activations move the mean of a layer's output, and layers
add such shifts up. The bias takes the shift back, channel by channel.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.context import counted
from dfq_tf.graph import (
    FLOAT,
    KINDS,
    Classifier,
    Graph,
    Node,
    compute,
    has_kernel,
    images_per_pass,
    largest_output,
    num_values,
)
from dfq_tf.quantization.network import QuantizedNetwork

_BATCH_SIZE = 128
# All images go through a layer before the next: these bound the memory they take, the
# pixels of all, and a layer's outputs, of which so many are alive at a time.
_MOST_VALUES = 2**24
_ALIVE = 4

Batches = list[tf.Tensor]


def with_corrected_biases(
    network: QuantizedNetwork, images: np.ndarray
) -> QuantizedNetwork:
    """Gives each channel the mean that it has in the float network.

    b <- b + E[y] - E[y'], with y the float output of a node with a kernel, y' that of
    the quantized network, and the mean over images and positions. Nodes are corrected
    in order, so that each sees what the corrected ones before it give; what a node
    without a bias shifts, the next with one takes back.

    Args:
      network: its weights are those of the float network.
      images: uint8 (n, height, width, channels); generated ones, for data-free
        quantization. Of large images, or for large layers, only the first are used.
    """
    graph = network.graph
    images = images[: max(1, _MOST_VALUES // math.prod(images.shape[1:]))]
    layer = FLOAT * largest_output(graph)
    images = images[: images_per_pass(_ALIVE * layer, len(images))]
    # Of the float network, the outputs of all layers are alive at a time.
    size = FLOAT * num_values(graph)
    batch_size = images_per_pass(size, _BATCH_SIZE)
    batches = [
        network.description.normalize(tf.cast(images[i : i + batch_size], tf.float32))
        for i in range(0, len(images), batch_size)
    ]
    means = _float_means(network.classifier, batches)
    corrected: dict[str, dict[str, np.ndarray]] = {}
    # Node by node, all batches at once: one is corrected before the next runs.
    outputs: dict[str, Batches] = {graph.image.name: batches}
    for node in counted(list(graph.nodes.values())[1:], "biases of layers"):
        name = node.name
        sources = list(zip(*(outputs[source] for source in node.inputs)))
        weights: dict[str, Any] = dict(node.weights)
        if has_kernel(node):
            weights["kernel"] = network.rounded_kernel(node, weights["kernel"])
        formula = KINDS[node.kind].compute
        exact = [formula(node, inputs, weights) for inputs in sources]
        outputs[name] = [network.rounded_output(node, each) for each in exact]
        if "bias" in weights:
            shift = (means[name] - _channel_means(outputs[name])).astype(np.float32)
            corrected[name] = {"bias": weights["bias"] + shift}
            outputs[name] = [network.rounded_output(node, y + shift) for y in exact]
        _drop_unread(graph, node, outputs)
    return network.with_weights(corrected)


def _float_means(
    network: Classifier, batches: Sequence[tf.Tensor]
) -> dict[str, np.ndarray]:
    """Mean of each channel of each kernel node's output, float64 (channels,)."""
    graph, weights = network.graph, network.weights
    names = [node.name for node in graph.nodes.values() if has_kernel(node)]

    def run(inputs: tf.Tensor) -> list[tf.Tensor]:
        return compute(graph, inputs, names, weights=weights)

    if len(batches) > 1:  # compiling takes longer than one pass
        run = traced(run, tf.TensorSpec((None, *network.image_shape), tf.float32))
    per_batch = [
        [_channel_means([y]) for y in run(batch)]
        for batch in counted(batches, "passes of images")
    ]
    shares = [len(b) for b in batches]
    return {
        name: np.average(values, axis=0, weights=shares)
        for name, values in zip(names, zip(*per_batch))
    }


def _drop_unread(graph: Graph, node: Node, outputs: dict[str, Batches]) -> None:
    """Forgets the outputs that nothing behind a node reads."""
    for source in node.inputs:
        if graph.consumers(source)[-1].name == node.name:
            outputs.pop(source, None)


def _channel_means(batches: Sequence[tf.Tensor]) -> np.ndarray:
    """Mean over images and positions, float64 (channels,)."""
    sums = [
        tf.reduce_sum(tf.cast(b, tf.float64), tf.range(b.shape.rank - 1))
        for b in batches
    ]
    count = sum(tf.size(b) // b.shape[-1] for b in batches)
    return (tf.add_n(sums) / tf.cast(count, tf.float64)).numpy()
