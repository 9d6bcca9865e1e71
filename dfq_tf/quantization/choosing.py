"""Chooses between settings of calibration by what they do to images held out.

Generated images do not reach as far as real ones. A range wider than they need is an
insurance: its steps are coarser, and less of real images is cut off at its ends. What
it saves cannot be measured without real images. What it costs can, and that decides:
the widest ranges are taken that cost little (measured in docs/results.md).
"""

import dataclasses
from typing import Any

import numpy as np

from dfq_tf.context import counted
from dfq_tf.graph import FLOAT, Classifier, images_per_pass, num_values
from dfq_tf.quantization.bias_correction import with_corrected_biases
from dfq_tf.quantization.calibration import (
    magnitudes_of,
    observe,
    ranges_of,
    with_ranges,
)
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.noise import sqnr
from dfq_tf.settings import BitWidths, CalibrationConfig

# The most that wider ranges may cost, in dB of the scores' SQNR; and an SQNR so high
# that they may cost more.
MOST_COST, ENOUGH = 2.0, 25.0
# The least that moved biases must gain. Less is chance, and was a loss on real images.
LEAST_GAIN = 0.5
# Of the images, so many calibrate nothing: by them is chosen.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.25, 256
_MOST_IMAGES = 128


def chosen(
    network: Classifier,
    images: np.ndarray,
    widths: BitWidths,
    config: CalibrationConfig,
) -> QuantizedNetwork:
    """A quantized network, untrained, by the settings that do best.

    Begun with is the narrowest: ranges of least squared error, without margins. Then
    are tried, and kept or not: the margins that the settings give; minimum and maximum,
    where they say 'auto'; corrected biases, where they want them.

    Args:
      network: from `post_training.float_network`.
      images: uint8 pixels, (n, height, width, channels). If there is anything to
        choose, the first quarter of them, at most 256, is held out. If there are fewer
        than four, all that the settings want is done, and 'auto' is least squares.
      widths: bits of weights and activations.
      config: what to try.

    Raises:
      TrainingError: the images or the network's answers say nothing.
    """
    is_open = config.bias_correction or config.activation_range == "auto"
    count = 0
    if is_open or config != without_margins(config):
        count = min(_MOST_HELD_OUT, int(_HELD_OUT_SHARE * len(images)))
    held_out, images = images[:count], images[count:]
    trial = _Trial(network, images, held_out, widths, config)
    widest = trial.widest()
    best = as_stored(widest)
    if config.bias_correction:
        corrected = as_stored(with_corrected_biases(widest, images))
        gain = trial.rated(corrected) - trial.rated(best)
        if not count or gain >= LEAST_GAIN:
            return corrected
    return best


class _Trial:
    """Makes networks of several settings, and rates them; arguments as of `chosen`."""

    def __init__(
        self,
        network: Classifier,
        images: np.ndarray,
        held_out: np.ndarray,
        widths: BitWidths,
        config: CalibrationConfig,
    ) -> None:
        with_counts = config.activation_range != "min_max"
        self._histograms = observe(network, images, with_counts=with_counts)
        self._magnitudes = magnitudes_of(network.graph, widths, config.weight_range)
        self._network, self._widths, self._config = network, widths, config
        self._held_out = held_out
        self._exact = network.scores(held_out) if len(held_out) else None

    def rated(self, quantized: QuantizedNetwork) -> float:
        """SQNR of the scores of images held out; 0 without any."""
        if self._exact is None:
            return 0.0
        return sqnr(self._exact, _scores(quantized, self._held_out))

    def widest(self) -> QuantizedNetwork:
        """The network of the widest ranges that cost little."""
        config = self._config
        settings = without_margins(config)
        best = self._made(settings)
        rating = self.rated(best)
        for change in self._changes():
            wider = dataclasses.replace(settings, **change)
            if wider == settings:
                continue
            candidate = self._made(wider)
            result = self.rated(candidate)
            if result >= min(rating - MOST_COST, ENOUGH):
                settings, best, rating = wider, candidate, result
        return best

    def _changes(self) -> list[dict[str, Any]]:
        """What makes ranges wider, in the order in which it is tried."""
        names = ("pooled_margin", "logits_margin")
        changes = [{name: getattr(self._config, name) for name in names}]
        if self._config.activation_range == "auto" and self._exact is not None:
            changes.append({"activation_range": "min_max"})
        return changes

    def _made(self, settings: CalibrationConfig) -> QuantizedNetwork:
        graph = self._network.graph
        ranges = ranges_of(graph, self._histograms, self._widths, settings)
        return with_ranges(
            self._network, ranges, self._widths, magnitudes=self._magnitudes
        )


def without_margins(config: CalibrationConfig) -> CalibrationConfig:
    """Settings for images that reach as far as those of the task."""
    return dataclasses.replace(config, pooled_margin=1.0, logits_margin=1.0)


def as_stored(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with biases as a file will hold them."""
    return network.with_room_for_biases().with_rounded_biases()


def _scores(network: QuantizedNetwork, images: np.ndarray) -> np.ndarray:
    """The network's scores; nothing is compiled for so few images."""
    size = FLOAT * num_values(network.graph)
    count = images_per_pass(size, _MOST_IMAGES)
    starts = counted(range(0, len(images), count), "passes of images")
    passes = (images[i : i + count] for i in starts)
    output = [network.graph.output]
    return np.concatenate([network.outputs(each, output)[0] for each in passes])
