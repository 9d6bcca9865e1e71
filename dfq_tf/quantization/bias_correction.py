"""Bias correction (Nagel et al., ICCV 2019): undoes the shift that rounding causes.

Rounded weights and clipped activations move the mean of a layer's output, and layers
add such shifts up. The bias takes the shift back, channel by channel.
"""

import math
from collections.abc import Sequence

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply, registry
from dfq_tf.training import memory

_BATCH_SIZE = 128
# All images go through a layer before the next: these bound the memory they take, the
# pixels of all, and a layer's outputs, of which so many are alive at a time.
_MOST_VALUES = 2**24
_ALIVE = 4


def correct_biases(
    graph: Graph, description: ModelDescription, student: Classifier, images: np.ndarray
) -> None:
    """Gives each channel the mean that it has in the float network.

    b <- b + E[y] - E[y'], with y the float output of a layer with a kernel, y' that of
    the student, and the mean over images and positions. Layers are corrected in
    order, so that each sees what the corrected ones before it give; what a layer
    without a bias shifts, the next with one takes back.

    Args:
      graph: the float network that the student was made of.
      description: how pixels become inputs.
      student: from `quantization.apply.quantize_graph`, changed in place.
      images: uint8 (n, height, width, channels); generated ones, for data-free
        quantization. Of large images, or for large layers, only the first are used.
    """
    images = images[: max(1, _MOST_VALUES // math.prod(images.shape[1:]))]
    layer = memory.FLOAT * max(math.prod(node.shape) for node in graph.nodes.values())
    images = images[: memory.images_per_pass(_ALIVE * layer, len(images))]
    # Of the float network, the outputs of all layers are alive at a time.
    network = memory.FLOAT * memory.graph_size(graph)
    batch_size = memory.images_per_pass(network, _BATCH_SIZE)
    quantized = Graph.from_model(student.model)
    names = [n.name for n in graph.nodes.values() if n.kind in registry.KERNELS]
    reference = graph.build(outputs=names)
    batches = [
        description.normalize(tf.cast(images[i : i + batch_size], tf.float32))
        for i in range(0, len(images), batch_size)
    ]
    per_batch = [
        [_channel_means([y]) for y in tf.nest.flatten(reference(b, training=False))]
        for b in batches
    ]
    shares = [len(b) for b in batches]
    means = {
        name: np.average(values, axis=0, weights=shares)
        for name, values in zip(names, zip(*per_batch))
    }
    # Layer by layer, all batches at once: a layer is corrected before the next runs.
    outputs: dict[str, list[tf.Tensor]] = {quantized.input_name: batches}
    for name, node in list(quantized.nodes.items())[1:]:
        layer = student.model.get_layer(name)
        sources = list(zip(*(outputs[source] for source in node.inputs)))
        outputs[name] = _called(layer, sources)
        variables = apply.range_variables(layer)
        if "bias" in variables:
            shift = means[apply.unwrapped_name(layer)] - _channel_means(outputs[name])
            variables["bias"].assign_add(shift)
            outputs[name] = _called(layer, sources)
        for source in node.inputs:  # what nothing reads any more
            if quantized.consumers(source)[-1].name == name:
                outputs.pop(source, None)


def _called(
    layer: keras.layers.Layer, sources: list[tuple[tf.Tensor, ...]]
) -> list[tf.Tensor]:
    return [
        layer(list(inputs) if len(inputs) > 1 else inputs[0], training=False)
        for inputs in sources
    ]


def _channel_means(batches: Sequence[tf.Tensor]) -> np.ndarray:
    """Mean over images and positions, float64 (channels,)."""
    sums = [
        tf.reduce_sum(tf.cast(b, tf.float64), tf.range(b.shape.rank - 1))
        for b in batches
    ]
    count = sum(tf.size(b) // b.shape[-1] for b in batches)
    return (tf.add_n(sums) / tf.cast(count, tf.float64)).numpy()
