"""Chooses between settings of calibration by what they do to images held out.

Generated images do not reach as far as real ones. A range wider than they need is an
insurance: its steps are coarser, and less of real images is cut off at its ends. What
it saves cannot be measured without real images. What it costs can, and that decides:
the widest ranges are taken that cost little (measured in docs/results.md).
"""

import dataclasses
from typing import Any

import numpy as np

from dfq_tf.graph import Classifier, running
from dfq_tf.quantization.bias_correction import with_corrected_biases
from dfq_tf.quantization.calibration import observe, ranges_of, with_ranges
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.settings import BitWidths, CalibrationConfig

# The most that wider ranges may cost, in dB of the scores' SQNR, and where it is so high
# that it may cost more.
MOST_COST, ENOUGH = 2.0, 25.0
# The least that moved biases must gain. Less is chance, and was a loss on real images.
LEAST_GAIN = 0.5
_MOST_IMAGES = 128


def chosen(
    network: Classifier,
    images: np.ndarray,
    held_out: np.ndarray,
    widths: BitWidths,
    config: CalibrationConfig,
) -> QuantizedNetwork:
    """A quantized network, untrained, by the settings that do best.

    Begun with is the narrowest: ranges of least squared error, without margins. Then
    are tried, and kept or not: the margins that the settings give; minimum and maximum,
    where they say 'auto'; corrected biases, where they want them.

    Args:
      network: from `post_training.float_network`.
      images: uint8 pixels, (n, height, width, channels), which calibrate.
      held_out: others, by which is chosen; if there are none, all that the settings
        want is done, and 'auto' is least squares.
      widths: bits of weights and activations.
      config: what to try.

    Raises:
      TrainingError: the images or the network's answers say nothing.
    """
    with_counts = config.activation_range != "min_max"
    histograms = observe(network, images, with_counts=with_counts)
    exact = network.scores(held_out) if len(held_out) else None

    def rated(quantized: QuantizedNetwork) -> float:
        return 0.0 if exact is None else sqnr(exact, _scores(quantized, held_out))

    def made(settings: CalibrationConfig) -> QuantizedNetwork:
        ranges = ranges_of(network.graph, histograms, widths, settings)
        return with_ranges(network, ranges, widths, config.weight_range)

    settings = without_margins(config)
    best = made(settings)
    rating = rated(best)
    changes: list[dict[str, Any]] = [
        {"pooled_margin": config.pooled_margin, "logits_margin": config.logits_margin}
    ]
    if config.activation_range == "auto" and exact is not None:
        changes.append({"activation_range": "min_max"})
    for change in changes:
        wider = dataclasses.replace(settings, **change)
        if wider != settings:
            candidate = made(wider)
            result = rated(candidate)
            if result >= min(rating - MOST_COST, ENOUGH):
                settings, best, rating = wider, candidate, result
    best, plain = as_stored(best), best
    if config.bias_correction:
        corrected = as_stored(with_corrected_biases(plain, images))
        if exact is None or rated(corrected) >= rated(best) + LEAST_GAIN:
            return corrected
    return best


def without_margins(config: CalibrationConfig) -> CalibrationConfig:
    """Settings for images that reach as far as those of the task."""
    return dataclasses.replace(config, pooled_margin=1.0, logits_margin=1.0)


def as_stored(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with biases as a file will hold them."""
    return network.with_room_for_biases().with_rounded_biases()


def _scores(network: QuantizedNetwork, images: np.ndarray) -> np.ndarray:
    """The network's scores; nothing is compiled for so few images."""
    size = running.FLOAT * running.num_values(network.graph)
    count = running.images_per_pass(size, _MOST_IMAGES)
    passes = [images[i : i + count] for i in range(0, len(images), count)]
    output = [network.graph.output]
    return np.concatenate([network.outputs(each, output)[0] for each in passes])


def sqnr(exact: np.ndarray, scores: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio of scores, in dB.

    Args:
      exact: of the float network, (n, num_classes).
      scores: of a quantized one, the same shape.
    """
    signal = np.square(exact.astype(np.float64)).sum()
    noise = np.square(exact.astype(np.float64) - scores).sum()
    smallest = np.finfo(np.float64).tiny
    return float(10 * np.log10(max(signal, smallest) / max(noise, smallest)))
