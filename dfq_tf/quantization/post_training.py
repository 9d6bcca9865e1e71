"""DF-Q but for the images: a classifier becomes a quantized network, untrained."""

import dataclasses

import numpy as np

from dfq_tf.graph import (
    Classifier,
    Graph,
    ModelDescription,
    equalize,
    layers,
    rewriting,
    unique_name,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.choosing import Calibrated
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.ranges import Range
from dfq_tf.settings import BitWidths, CalibrationConfig

_MAX_PIXEL = 255.0


def float_network(
    teacher: Classifier, calibration: CalibrationConfig = CalibrationConfig()
) -> Classifier:
    """The float network that a quantized one is the twin of.

    It gives logits; each of its nodes has an integer form; its second node stands for
    the quantization of the pixels.

    Args:
      teacher: the trained classifier.
      calibration: says whether neighbouring layers are balanced.

    Raises:
      UnsupportedLayerError: layers have no integer form, or weights are not finite;
        all such layers are named.
      ModelError: the last layer does not give what the description says.
    """
    graph = rewriting.fold(rewriting.logits_graph(teacher.graph, teacher.description))
    rewriting.check_supported(graph)
    network = with_pixels(graph, teacher.description)
    graph = grids.separated(network.graph)
    if calibration.equalize:
        graph = equalize(graph)
    return Classifier(graph, network.description)


def with_pixels(graph: Graph, description: ModelDescription) -> Classifier:
    """A rewritten network, with the quantization of the pixels before it.

    One integer mean and one scale are that quantization's zero point and scale. Any
    other normalisation becomes a 1x1 depthwise convolution behind raw pixels.

    Args:
      graph: from `rewriting.fold`; gives logits.
      description: of the classifier.
    """
    description = dataclasses.replace(description, output="logits")
    mean, scale = description.input_mean, description.input_scale
    is_zero_point = (
        len(set(mean)) == len(set(scale)) == 1
        and mean[0].is_integer()
        and 0 <= mean[0] <= _MAX_PIXEL
    )
    fed = description
    if not is_zero_point:
        fed = dataclasses.replace(description, input_mean=(0.0,), input_scale=(1.0,))
    low, high = pixel_range(fed)
    name = unique_name(graph.nodes, "pixels")
    image = graph.image
    head = [layers.node("pixels", name, [image], {"low": low, "high": high})]
    if not is_zero_point:
        channels = np.ones(image.shape[-1] or 0)
        scales = np.asarray(scale, np.float64) * channels
        shifts = -np.asarray(mean, np.float64) * scales
        normalize = unique_name([*graph.nodes, name], "normalize")
        head.append(rewriting.affine_node(normalize, head[0], scales, shifts))
    behind = {image.name: head[-1].name}
    rest = [
        node.reading(*(behind.get(source, source) for source in node.inputs))
        for node in list(graph.nodes.values())[1:]
    ]
    output = behind.get(graph.output, graph.output)
    return Classifier(Graph([image, *head, *rest], output), fed)


def pixel_range(description: ModelDescription) -> Range:
    """What pixels 0 and 255 become; known without any image."""
    low, high = (description.normalize(np.float32(p)) for p in (0.0, _MAX_PIXEL))
    return float(np.ravel(low)[0]), float(np.ravel(high)[0])


def post_training(
    network: Classifier,
    images: np.ndarray,
    widths: BitWidths = BitWidths(),
    config: CalibrationConfig = CalibrationConfig(),
) -> QuantizedNetwork:
    """A quantized network with ranges from images, nothing trained.

    For several widths, `choosing.Calibrated` looks at the float network once.

    Args:
      network: from `float_network`.
      images: uint8 (n, height, width, channels); generated ones give DF-Q, real ones
        the data-dependent yardstick Q.
      widths: bits of weights and activations.
      config: how ranges are found, and whether biases are corrected.

    Raises:
      ModelError: the images do not fit the network.
      UnsupportedLayerError: a layer cannot have activations of these widths.
      TrainingError: the images or the network's answers say nothing, see `calibrate`.
    """
    return Calibrated(network, images, config).quantized(widths)
