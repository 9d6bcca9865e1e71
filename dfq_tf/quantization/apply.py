"""Builds the fake-quantized student of a network and sets its ranges."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow_model_optimization as tfmot

from dfq_tf.compat import keras
from dfq_tf.errors import LayerProblem, TrainingError, UnsupportedLayerError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph, Node, unique_name
from dfq_tf.graph.rewriting import PASSES as FOLDING
from dfq_tf.graph.rewriting import affine_node, dense_as_convolution, logits_graph
from dfq_tf.quantization import registry
from dfq_tf.quantization.quantizers import is_symmetric
from dfq_tf.quantization.ranges import Range, kernel_magnitudes
from dfq_tf.settings import BitWidths

_MAX_PIXEL = 255.0

# Least range of a kernel as a share of its bias. The bias is an int32 in steps of
# (input scale * kernel scale): behind the tiny kernel of a dead channel it would
# overflow, and the converter would cut it off without a word.
_SMALLEST_KERNEL = 1e-4


def integer_ready(teacher: Classifier) -> tuple[Graph, ModelDescription]:
    """The float network, rewritten so that each of its layers has an integer twin.

    Its first node after the input stands for the quantization of the pixels. One
    integer mean and one scale are that quantization's zero point and scale. Any
    other normalisation becomes a 1x1 depthwise convolution behind raw pixels.

    Args:
      teacher: the float network.

    Returns:
      The graph, which gives logits, and how it is fed.

    Raises:
      UnsupportedLayerError: a layer has no integer form, or a weight is not finite.
      ModelError: its last layer does not give what the description says.
    """
    graph = logits_graph(Graph.from_model(teacher.model), teacher.description)
    for rewrite in PASSES:
        graph = rewrite(graph)
    return with_pixels(graph, teacher.description)


def _with_finite_weights(graph: Graph) -> Graph:
    problems = [
        LayerProblem(
            node.name,
            node.kind,
            "it has NaN or infinite weights; the model was damaged, or its training "
            "diverged",
        )
        for node in graph.nodes.values()
        if not all(np.isfinite(weight).all() for weight in node.weights)
    ]
    if problems:
        raise UnsupportedLayerError.of(problems)
    return graph


def _supported(graph: Graph) -> Graph:
    registry.check_supported(graph)
    return graph


# What a network that gives logits goes through, in order; each step either leaves its
# function as it is or raises UnsupportedLayerError, with the layers in `problems`.
PASSES: tuple[Callable[[Graph], Graph], ...] = (
    _with_finite_weights,
    *FOLDING,
    dense_as_convolution,
    _supported,
)


def with_pixels(
    graph: Graph, description: ModelDescription
) -> tuple[Graph, ModelDescription]:
    """A rewritten network, with the quantization of the pixels before it.

    Args:
      graph: has gone through PASSES.
      description: of the classifier.

    Returns:
      As `integer_ready`.
    """
    description = dataclasses.replace(description, output="logits")
    mean, scale = description.input_mean, description.input_scale
    name = unique_name(graph.nodes, "pixels")
    image = graph.nodes[graph.input_name]
    head = [
        Node(
            name,
            keras.layers.Activation,
            {"activation": "linear"},
            (),
            (image.name,),
            image.shape,
        )
    ]
    is_zero_point = (
        len(set(mean)) == len(set(scale)) == 1
        and mean[0].is_integer()
        and 0 <= mean[0] <= _MAX_PIXEL
    )
    if not is_zero_point:
        channels = image.shape[-1]
        scales = np.broadcast_to(np.asarray(scale, np.float64), (channels,))
        shifts = -np.asarray(mean, np.float64) * scales
        normalize = affine_node(
            unique_name([*graph.nodes, name], "normalize"),
            scales,
            shifts,
            (name,),
            image.shape,
        )
        head.append(normalize)
        description = dataclasses.replace(
            description, input_mean=(0.0,), input_scale=(1.0,)
        )
    return graph.with_head(head), description


def quantize_graph(
    graph: Graph,
    description: ModelDescription,
    widths: BitWidths,
    ranges: Mapping[str, Range],
    weight_range: str = "mse",
) -> Classifier:
    """Builds the fake-quantized twin of a float network.

    Args:
      graph: from `integer_ready`.
      description: from `integer_ready`.
      widths: bits of weights and activations.
      ranges: for each node of `quantized_nodes`, its output's range, as from
        `calibration.calibrate`.
      weight_range: 'min_max' or 'mse', see `ranges.kernel_magnitudes`.

    Returns:
      A classifier whose model is a tf_keras functional model of tfmot wrappers. Its
      weights are trained as those of any model; its ranges stay as they are.
    """
    configs = registry.quantize_configs(graph, widths)

    def wrap(node: Node, layer: keras.layers.Layer) -> keras.layers.Layer:
        config = configs[node.name]
        if config.kernel is None and config.num_bits_activation is None:
            return layer
        return tfmot.quantization.keras.QuantizeWrapperV2(layer, config)

    model = graph.build(wrap)
    for name, (low, high) in ranges.items():
        bits = configs[name].num_bits_activation or 0
        if is_symmetric(bits):
            low, high = -max(-low, high), max(-low, high)
        low, high = registry.fixed_range(graph.nodes[name], bits) or (low, high)
        variables = range_variables(model.get_layer(f"quant_{name}"))
        variables["output_min"].assign(low)
        variables["output_max"].assign(high)
    set_weight_ranges(model, weight_range)
    return Classifier(model, description)


def quantized_nodes(graph: Graph) -> list[str]:
    """Names of the nodes whose outputs have a range, the pixels' first."""
    return [
        node.name
        for node in graph.nodes.values()
        if registry.has_quantized_output(graph, node)
    ]


def pixel_range(description: ModelDescription) -> Range:
    """What pixels 0 and 255 become; known without any image."""
    low, high = (description.normalize(np.float32(p)) for p in (0.0, _MAX_PIXEL))
    return float(np.ravel(low)[0]), float(np.ravel(high)[0])


def checked_ranges(
    graph: Graph, description: ModelDescription, ranges: Mapping[str, Range]
) -> dict[str, Range]:
    """Makes measured ranges fit for integers.

    Each range is widened to hold 0, which must be one of the integers; outputs that
    must share a range share the widest; the input's range is that of the pixels.

    Raises:
      TrainingError: a range is not finite.
    """
    result: dict[str, Range] = {}
    for name, (low, high) in ranges.items():
        check_finite(name, low, high)
        low, high = min(low, 0.0), max(high, 0.0)
        # An output that is 0 throughout has any scale.
        result[name] = (low, high) if low < high else (0.0, 1.0)
    for group in registry.tied_outputs(graph):
        members = [name for name in group if name in result]
        shared = (
            min(result[name][0] for name in members),
            max(result[name][1] for name in members),
        )
        result.update({name: shared for name in members})
    pixels = graph.consumers(graph.input_name)[0].name
    return {**result, pixels: pixel_range(description)}


def check_finite(name: str, low: float, high: float) -> None:
    """Raises TrainingError unless both ends of a range are finite."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise TrainingError(
            f"the output of layer {name} is not finite on the calibration images: "
            f"its range is {low} to {high}"
        )


def set_weight_ranges(model: keras.Model, method: str) -> None:
    """Sets the range of every quantized kernel.

    Args:
      model: of `quantize_graph`.
      method: 'min_max' or 'mse', see `ranges.kernel_magnitudes`.
    """
    for layer in model.layers:
        variables = range_variables(layer)
        for name in registry.KERNELS.values():
            if f"{name}_max" not in variables:
                continue
            kernel = variables[name].numpy()
            shape = variables[f"{name}_max"].shape
            if shape.rank:
                # One per output: the trailing axes that make up the channels.
                kernel = kernel.reshape(-1, shape[0])
            magnitudes = kernel_magnitudes(
                kernel,
                layer.quantize_config.num_bits_weight,
                per_channel=bool(shape.rank),
                method=method,
            )
            if "bias" in variables:
                bias = np.abs(variables["bias"].numpy())
                bias = bias if shape.rank else bias.max()
                magnitudes = np.maximum(magnitudes, _SMALLEST_KERNEL * bias)
            magnitudes = np.where(magnitudes > 0, magnitudes, 1.0)  # all zeros
            variables[f"{name}_min"].assign(-magnitudes)
            variables[f"{name}_max"].assign(magnitudes)


def is_quantized(model: keras.Model) -> bool:
    """Whether the model has tfmot's wrappers, as from `quantize_graph`."""
    return any(map(range_variables, model.layers))


def range_variables(layer: keras.layers.Layer) -> dict[str, "keras.Variable"]:
    """Weights of a tfmot wrapper by their short names: kernel, kernel_min, ..."""
    if not isinstance(layer, tfmot.quantization.keras.QuantizeWrapperV2):
        return {}
    return {v.name.split("/")[-1].split(":")[0]: v for v in layer.weights}


def unwrapped_name(layer: keras.layers.Layer) -> str:
    """The name that a layer of the student has in the float network."""
    return layer.layer.name if range_variables(layer) else layer.name
