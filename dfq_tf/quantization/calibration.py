"""Finds activation ranges from images, without any gradient."""

from collections.abc import Callable

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.errors import TrainingError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply, registry
from dfq_tf.quantization.quantizers import is_symmetric
from dfq_tf.quantization.ranges import (
    Histogram,
    Range,
    least_squares_range,
    percentile_range,
)
from dfq_tf.settings import BitWidths, CalibrationConfig
from dfq_tf.training import memory

_BINS = 2048
# Images per pass.
_MOST_IMAGES = 128


def calibrate(
    graph: Graph,
    description: ModelDescription,
    images: np.ndarray,
    widths: BitWidths = BitWidths(),
    config: CalibrationConfig = CalibrationConfig(),
    batch_size: int | None = None,
) -> dict[str, Range]:
    """Ranges of the outputs of the float network's quantized layers.

    Args:
      graph: from `quantization.apply.integer_ready`.
      description: from `quantization.apply.integer_ready`.
      images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
        Generated ones, for data-free quantization; real ones are the yardstick.
      widths: bits of the activations, on which the least squared error depends.
      config: how ranges are found; those of 16 bits are the extremes in any case.
      batch_size: images per pass, on which ranges do not depend; None for 128, or as
        many as fit into memory.

    Returns:
      node name -> range, holding 0. The input's is that of pixels 0 to 255.

    Raises:
      TrainingError: an output is not finite, or the images say nothing: they are all
        the same, or the network answers the same to all of them.
    """
    if len(images) > 1 and all(np.array_equal(i, images[0]) for i in images[1:]):
        raise TrainingError(
            f"the {len(images)} calibration images are all the same; ranges need "
            "images that differ. If they were generated, warm up longer"
        )
    if batch_size is None:
        # All outputs are alive at a time. Two images, at least, can be compared.
        size = memory.FLOAT * memory.graph_size(graph)
        batch_size = memory.images_per_pass(size, _MOST_IMAGES, least=2)
    method = config.activation_range
    histograms = observe(
        graph, description, images, batch_size, with_counts=method != "min_max"
    )
    bits = registry.activation_bits(graph, widths)

    def range_of(name: str, histogram: Histogram) -> Range:
        if histogram.counts is None or is_symmetric(bits[name]):
            return histogram.low, histogram.high
        if method == "percentile":
            return percentile_range(histogram, config.activation_percentile)
        return least_squares_range(histogram, bits[name])

    ranges = {name: range_of(name, each) for name, each in histograms.items()}
    return apply.checked_ranges(graph, description, ranges)


def observe(
    graph: Graph,
    description: ModelDescription,
    images: np.ndarray,
    batch_size: int,
    with_counts: bool,
) -> dict[str, Histogram]:
    """The distribution of each quantized layer's output in the float network.

    Args:
      graph: as in `calibrate`, like the other arguments.
      description: how pixels become inputs.
      images: pixels.
      batch_size: images per pass.
      with_counts: whether to count values in bins, in a second pass.

    Raises:
      TrainingError: an output is not finite, or the last layer's is always the same.
    """
    names = apply.quantized_nodes(graph)
    model = graph.build(outputs=names)

    def passes(function: Callable[..., tf.Tensor]) -> list[np.ndarray]:
        def batch(pixels: tf.Tensor) -> tf.Tensor:
            # Keras gives a lone output bare, and not in a list.
            outputs = model(description.normalize(pixels), training=False)
            outputs = tf.nest.flatten(outputs)
            return tf.stack([function(i, o) for i, o in enumerate(outputs)])

        shape = (None, *images.shape[1:])
        compiled = traced(batch, tf.TensorSpec(shape, tf.float32))
        return [
            compiled(tf.constant(images[i : i + batch_size], tf.float32)).numpy()
            for i in range(0, len(images), batch_size)
        ]

    statistics = np.array(passes(lambda _, o: _extremes_and_spread(o)))
    lows, highs = statistics[..., 0].min(axis=0), statistics[..., 1].max(axis=0)
    for name, low, high in zip(names, lows, highs):
        apply.check_finite(name, float(low), float(high))
    logits = names.index(registry.range_owner(graph, graph.output_name))
    is_same = not np.ptp(statistics[:, logits], axis=0)[:2].any()
    if len(images) > 1 and is_same and not statistics[:, logits, 2].any():
        raise TrainingError(
            f"the output of layer {names[logits]}, the last, is the same for all "
            f"{len(images)} calibration images, from {lows[logits]} to "
            f"{highs[logits]}; the network is damaged or the images are blank"
        )
    counts: list[np.ndarray | None] = [None] * len(names)
    if with_counts:
        # A constant output has no bins; one that is a little wider has.
        tops = np.where(lows < highs, highs, lows + np.maximum(1, np.abs(lows)))
        counts = list(
            np.sum(
                passes(
                    lambda i, o: tf.histogram_fixed_width(
                        o, [lows[i], tops[i]], _BINS, tf.int64
                    )
                ),
                axis=0,
            )
        )
    return {
        name: Histogram(float(low), float(high), count)
        for name, low, high, count in zip(names, lows, highs, counts)
    }


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
