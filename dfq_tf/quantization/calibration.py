"""Finds activation ranges from images, without any gradient."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.context import counted
from dfq_tf.errors import TrainingError
from dfq_tf.graph import (
    FLOAT,
    Classifier,
    Exactly,
    Graph,
    NoFurther,
    by_output,
    compute,
    images_per_pass,
    num_values,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.ranges import (
    SMALLEST_RANGE,
    Histogram,
    Range,
    kernel_magnitudes,
    least_squares_range,
    percentile_range,
)
from dfq_tf.settings import BitWidths, CalibrationConfig

_BINS = 2048
# Images per pass.
_MOST_IMAGES = 128


def calibrate(
    network: Classifier,
    images: np.ndarray,
    widths: BitWidths = BitWidths(),
    config: CalibrationConfig = CalibrationConfig(),
    batch_size: int | None = None,
) -> dict[str, Range]:
    """Ranges of the outputs of a float network.

    Args:
      network: from `post_training.float_network`.
      images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
        Generated ones, for data-free quantization; real ones are the yardstick.
      widths: bits of the activations, on which the least squared error depends.
      config: how ranges are found, 'auto' as 'mse'; those of 16 bits are the extremes
        in any case.
      batch_size: images per pass, on which ranges do not depend; None for 128, or as
        many as fit into memory.

    Returns:
      Name of each of `grids.measured` -> range, holding 0. The pixels' is that of
      pixels 0 to 255.

    Raises:
      TrainingError: an output is not finite, or the images say nothing: they are all
        the same, or the network answers the same to all of them.
    """
    with_counts = config.activation_range != "min_max"
    histograms = observe(network, images, batch_size, with_counts)
    bits = grids.activation_bits(network.graph, widths)
    ranges = observed_ranges(histograms, bits, config)
    return widened(network.graph, ranges, bits, config)


def observed_ranges(
    histograms: Mapping[str, Histogram],
    bits: Mapping[str, int],
    config: CalibrationConfig,
) -> dict[str, Range]:
    """Ranges by what has been observed, as they are.

    Args:
      histograms: of each of `grids.measured`, from `observe`.
      bits: of each of `grids.measured`.
      config: how ranges are found.
    """
    method = config.activation_range

    def range_of(name: str, histogram: Histogram) -> Range:
        is_exact = histogram.counts is None or grids.is_symmetric(bits[name])
        if is_exact or method == "min_max":
            return histogram.low, histogram.high
        if method == "percentile":
            return percentile_range(histogram, config.activation_percentile)
        return least_squares_range(histogram, bits[name])

    return {
        name: range_of(name, histograms[name])
        for name in counted(list(histograms), "ranges of layers")
    }


def widened(
    graph: Graph,
    ranges: Mapping[str, Range],
    bits: Mapping[str, int],
    config: CalibrationConfig,
) -> dict[str, Range]:
    """Ranges with the margins of the settings, as `calibrate` gives them.

    Args:
      graph: of `post_training.float_network`.
      ranges: from `observed_ranges`.
      bits: of each of `grids.measured`.
      config: says the margins.
    """
    return fitted_ranges(graph, with_margins(graph, ranges, config), bits)


def with_margins(
    graph: Graph, ranges: Mapping[str, Range], config: CalibrationConfig
) -> dict[str, Range]:
    """Widens the ranges where real images reach further than generated ones.

    The generator follows what BatchNormalization has stored. Behind the last of it,
    from a global pool to the logits, nothing holds it: measured on eight networks, real
    logits reach 1.4 to 5 times as far, hidden layers hardly further
    (docs/experiments/images_and_ranges.md).
    No range goes past the top of a ReLU.

    Args:
      graph: of `post_training.float_network`.
      ranges: of each of `grids.measured`, on the images that calibrate.
      config: says how much.
    """
    owner, pooled = grids.owners(graph), grids.pooled(graph)
    of_logits = grids.owners_of_logits(graph, owner)
    result = {}
    for name, (low, high) in ranges.items():
        low, high = min(low, 0.0), max(high, 0.0)
        if owner[name] in of_logits:
            more = (config.logits_margin - 1) / 2 * (high - low)
            low, high = low - more, high + more
        elif name in pooled:
            low, high = config.pooled_margin * low, config.pooled_margin * high
        top = graph.nodes[name].settings.get("top")
        if top is not None:
            high = min(high, top)
        result[name] = (low, high)
    return result


def with_ranges(
    network: Classifier,
    ranges: dict[str, Range],
    widths: BitWidths,
    weight_range: str = "mse",
    magnitudes: Mapping[str, np.ndarray] | None = None,
) -> QuantizedNetwork:
    """A quantized network with given ranges of its outputs.

    Args:
      network: from `float_network`.
      ranges: of each of `grids.measured`.
      widths: bits of weights and activations.
      weight_range: 'min_max' or 'mse', see `ranges.kernel_magnitudes`.
      magnitudes: of `magnitudes_of`, where they have been found already.
    """
    graph = grids.with_rounded_slopes(network.graph)
    if graph is not network.graph:
        network = Classifier(graph, network.description)
    if magnitudes is None:
        magnitudes = magnitudes_of(graph, widths, weight_range)
    bits = grids.activation_bits(graph, widths)
    kernel_bits = grids.kernel_bits(graph, widths)
    fitted = fitted_ranges(graph, ranges, bits)
    quantized = QuantizedNetwork(network, bits, fitted, kernel_bits, magnitudes)
    return quantized.with_room_for_biases()


def with_any_ranges(
    network: Classifier, widths: BitWidths = BitWidths()
) -> QuantizedNetwork:
    """A quantized network whose ranges mean nothing: to see what it costs.

    Scales and zero points differ as real ones do, which the bytes of a file hang on: it
    has once what tensors share.

    Args:
      network: from `float_network`.
      widths: bits of weights and activations.
    """
    graph = network.graph
    ranges: dict[str, Range] = {}
    measured = set(grids.measured(graph))
    for i, group in enumerate(grids.groups(graph).values()):
        names = [name for name in group if name in measured]
        is_positive = all(graph.nodes[name].kind == "relu" for name in names)
        below = 0.0 if is_positive else (1 + i % 254) / 255
        size = 0.999**i
        ranges.update(dict.fromkeys(names, (-below * size, (1 - below) * size)))
    return with_ranges(network, ranges, widths, "min_max")


def magnitudes_of(
    graph: Graph,
    widths: BitWidths,
    weight_range: str,
    names: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
    """Half the range of each kernel.

    Args:
      graph: rewritten for integers.
      widths: as in `with_ranges`.
      weight_range: as in `with_ranges`.
      names: the nodes that are asked for; None for all that have a kernel.
    """
    bits = grids.kernel_bits(graph, widths)
    asked = [name for name in bits if names is None or name in names]
    return {
        name: kernel_magnitudes(
            by_output(graph.nodes[name], graph.nodes[name].weights["kernel"]),
            bits[name],
            per_channel=widths.per_channel,
            method=weight_range,
        )
        for name in counted(asked, "ranges of kernels")
    }


def fitted_ranges(
    graph: Graph, ranges: Mapping[str, Range], bits: Mapping[str, int]
) -> dict[str, Range]:
    """Makes measured ranges fit for integers.

    Each range is widened to hold 0, which must be one of the integers; outputs that
    share a grid share the widest, within what their operators demand; those of 16 bits
    are symmetric. Of factors of pixels, the range is what is known and not measured.

    Args:
      graph: of `post_training.float_network`.
      ranges: of each of `grids.measured`.
      bits: of each of `grids.measured`.

    Raises:
      TrainingError: a range is not finite.
    """
    known = grids.known_ranges(graph)
    ranges = {name: known.get(name, each) for name, each in ranges.items()}
    result: dict[str, Range] = {}
    for group in grids.groups(graph).values():
        members = [name for name in group if name in ranges]
        for name in members:
            check_finite(name, *ranges[name])
        low = min(0.0, *(ranges[name][0] for name in members))
        high = max(0.0, *(ranges[name][1] for name in members))
        if high - low <= SMALLEST_RANGE:
            low, high = 0.0, 1.0  # outputs of nothing but 0 have any scale
        num_bits = bits[members[0]]
        bounds = grids.bounds_of(graph, group, num_bits)
        if isinstance(bounds, NoFurther):
            high = min(high, bounds.high)
        if grids.is_symmetric(num_bits):
            low, high = -max(-low, high), max(-low, high)
        if isinstance(bounds, Exactly):
            low, high = bounds
        result.update({name: (low, high) for name in members})
    return {name: result[name] for name in ranges}


def check_finite(name: str, low: float, high: float) -> None:
    """Raises TrainingError unless both ends of a range are finite."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise TrainingError(
            f"the output of layer {name} is not finite on the calibration images: "
            f"its range is {low} to {high}"
        )


def observe(
    network: Classifier,
    images: np.ndarray,
    batch_size: int | None = None,
    with_counts: bool = True,
) -> dict[str, Histogram]:
    """The distribution of each measured output of the float network.

    Args:
      network: as in `calibrate`, like the other arguments.
      images: pixels.
      batch_size: images per pass.
      with_counts: whether to count values in bins, in a second pass.

    Raises:
      TrainingError: an output is not finite, or the images say nothing.
    """
    _check_images_differ(images)
    if batch_size is None:
        # All outputs are alive at a time. Two images, at least, can be compared.
        size = FLOAT * num_values(network.graph)
        batch_size = images_per_pass(size, _MOST_IMAGES, least=2)
    graph = network.graph
    names, weights = grids.measured(graph), network.weights

    def passes(function: Callable[..., tf.Tensor]) -> list[np.ndarray]:
        def batch(pixels: tf.Tensor) -> tf.Tensor:
            inputs = network.description.normalize(pixels)
            outputs = compute(graph, inputs, names, weights=weights)
            return tf.stack([function(i, o) for i, o in enumerate(outputs)])

        run: Callable[[tf.Tensor], tf.Tensor] = batch
        if len(images) > batch_size:  # compiling takes longer than one pass
            run = traced(batch, tf.TensorSpec((None, *images.shape[1:]), tf.float32))
        starts = range(0, len(images), batch_size)
        return [
            run(tf.constant(images[i : i + batch_size], tf.float32)).numpy()
            for i in counted(starts, "passes of images")
        ]

    statistics = np.array(passes(lambda _, o: _extremes_and_spread(o)))
    lows, highs = statistics[..., 0].min(axis=0), statistics[..., 1].max(axis=0)
    for name, low, high in zip(names, lows, highs):
        check_finite(name, float(low), float(high))
    # What the answers are made of: behind it, values are moved at most.
    _check_answers_differ(names[-1], statistics[:, -1], len(images))
    counts: list[np.ndarray | None] = [None] * len(names)
    if with_counts:
        # A constant output has no bins; one that is a little wider has.
        tops = np.where(lows < highs, highs, lows + np.maximum(1, np.abs(lows)))
        in_bins = passes(
            lambda i, o: tf.histogram_fixed_width(
                o, [lows[i], tops[i]], _BINS, tf.int64
            )
        )
        counts = list(np.sum(in_bins, axis=0))
    return {
        name: Histogram(float(low), float(high), count)
        for name, low, high, count in zip(names, lows, highs, counts)
    }


def _check_images_differ(images: np.ndarray) -> None:
    """Raises TrainingError if several images are all the same."""
    if len(images) > 1 and all(np.array_equal(i, images[0]) for i in images[1:]):
        raise TrainingError(
            f"the {len(images)} calibration images are all the same; ranges need "
            "images that differ. If they were generated, warm up longer"
        )


def _check_answers_differ(name: str, statistics: np.ndarray, num_images: int) -> None:
    """Raises TrainingError if a network answers the same to all images.

    Args:
      name: of the last node.
      statistics: of its output, (batches, 3), as of `_extremes_and_spread`.
      num_images: in all batches.
    """
    is_same = not np.ptp(statistics, axis=0)[:2].any()
    if num_images > 1 and is_same and not statistics[:, 2].any():
        raise TrainingError(
            f"the output of layer {name}, the last, is the same for all "
            f"{num_images} calibration images, from {statistics[:, 0].min()} to "
            f"{statistics[:, 1].max()}; the network is damaged or the images are blank"
        )


def _extremes_and_spread(outputs: tf.Tensor) -> tf.Tensor:
    """Lowest, highest, and the largest difference of two images in one place."""
    highest, lowest = tf.reduce_max(outputs, axis=0), tf.reduce_min(outputs, axis=0)
    return tf.stack(
        [
            tf.reduce_min(lowest),
            tf.reduce_max(highest),
            tf.reduce_max(highest - lowest),
        ]
    )
