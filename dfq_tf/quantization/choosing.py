"""Chooses between settings of calibration by what they do to images held out.

Generated images do not reach as far as real ones. A range wider than they need is an
insurance: its steps are coarser, and less of real images is cut off at its ends. What
it saves cannot be measured without real images. What it costs can, and that decides:
the widest ranges are taken that cost little (docs/experiments/images_and_ranges.md).

What ranges cost is told by the scores' SQNR. What corrected biases gain is told by the
SQNR but for a common factor, which changes no class: with kernels of 4 bits they may
make all scores smaller by a factor, and gain 3 dB but for that.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from dfq_tf.graph import (
    Classifier,
    check_images,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.bias_correction import with_corrected_biases
from dfq_tf.quantization.calibration import (
    magnitudes_of,
    observe,
    observed_ranges,
    widened,
    with_ranges,
)
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.noise import scale_free_sqnr, sqnr
from dfq_tf.quantization.ranges import Histogram, Range
from dfq_tf.settings import BitWidths, CalibrationConfig

# The most that wider ranges may cost, in dB of the scores' SQNR; and an SQNR so high
# that they may cost more.
MOST_COST, ENOUGH = 2.0, 25.0
# The least that moved biases must gain. Less is chance, and was a loss on real images.
LEAST_GAIN = 0.5
# Of the images, so many calibrate nothing: by them is chosen.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.25, 256


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Quantized networks of one float network, by the same images, untrained.

    Their settings are those that do best. Begun with is the narrowest: ranges of least
    squared error, without margins. Then are tried, and kept or not: the margins that
    the settings give; minimum and maximum, where they say 'auto'; corrected biases,
    where they want them. What hangs on no width is found once.

    Attributes:
      network: from `post_training.float_network`.
      images: uint8 pixels, (n, height, width, channels). If there is anything to
        choose, the first quarter of them, at most 256, is held out. If there are fewer
        than four, all that the settings want is done, and 'auto' is least squares.
      config: what to try.

    Raises:
      ModelError: the images do not fit the network.
    """

    network: Classifier
    images: np.ndarray
    config: CalibrationConfig = CalibrationConfig()

    def __post_init__(self) -> None:
        """Checks the images."""
        check_images(self.images, self.network.image_shape)

    @functools.cached_property
    def _quantized(self) -> dict[BitWidths, QuantizedNetwork]:
        """What has been made."""
        return {}

    def quantized(self, widths: BitWidths) -> QuantizedNetwork:
        """The network of some widths of weights and activations; made once.

        Raises:
          UnsupportedLayerError: a layer cannot have activations of these widths.
          TrainingError: the images or the network's answers say nothing.
        """
        if widths not in self._quantized:
            self._quantized[widths] = self._of(widths)
        return self._quantized[widths]

    def _of(self, widths: BitWidths) -> QuantizedNetwork:
        grids.check_widths(self.network.graph, widths)
        trial = _Trial(self, widths)
        widest = trial.widest()
        best = as_stored(widest)
        if self.config.bias_correction:
            corrected = as_stored(with_corrected_biases(widest, self.calibrating))
            gain = trial.rated(corrected, True) - trial.rated(best, True)
            if not self._num_held_out or gain >= LEAST_GAIN:
                return corrected
        return best

    @functools.cached_property
    def _num_held_out(self) -> int:
        config = self.config
        is_open = config.bias_correction or config.activation_range == "auto"
        if not is_open and config == without_margins(config):
            return 0
        return min(_MOST_HELD_OUT, int(_HELD_OUT_SHARE * len(self.images)))

    @property
    def calibrating(self) -> np.ndarray:
        """The images that set ranges and correct biases."""
        return self.images[self._num_held_out :]

    @property
    def held_out(self) -> np.ndarray:
        """The images by which is chosen, perhaps none."""
        return self.images[: self._num_held_out]

    @functools.cached_property
    def histograms(self) -> dict[str, Histogram]:
        """What the other images make of the float network, see `calibration.observe`.

        Raises:
          TrainingError: see `observe`.
        """
        with_counts = self.config.activation_range != "min_max"
        return observe(self.network, self.calibrating, with_counts=with_counts)

    @functools.cached_property
    def _ranges(self) -> dict[tuple[Any, ...], dict[str, Range]]:
        """What has been found."""
        return {}

    def ranges(
        self, widths: BitWidths, settings: CalibrationConfig
    ) -> dict[str, Range]:
        """Ranges of activations with the margins of the settings, see `calibrate`.

        What they are without margins is found once.
        """
        graph = self.network.graph
        bits = grids.activation_bits(graph, widths)
        key = (settings.activation_range, *bits.items())
        if key not in self._ranges:
            self._ranges[key] = observed_ranges(self.histograms, bits, settings)
        return widened(graph, self._ranges[key], bits, settings)

    @functools.cached_property
    def exact(self) -> np.ndarray | None:
        """The float network's scores of the images held out; None without any."""
        return self.network.scores(self.held_out) if self._num_held_out else None


class _Trial:
    """Makes networks of one pair of widths and several settings, and rates them."""

    def __init__(self, calibrated: Calibrated, widths: BitWidths) -> None:
        config, graph = calibrated.config, calibrated.network.graph
        self._magnitudes = magnitudes_of(graph, widths, config.weight_range)
        self._calibrated, self._widths, self._config = calibrated, widths, config

    def rated(self, quantized: QuantizedNetwork, is_scale_free: bool = False) -> float:
        """SQNR of the scores of images held out; 0 without any."""
        exact = self._calibrated.exact
        if exact is None:
            return 0.0
        measure = scale_free_sqnr if is_scale_free else sqnr
        return measure(exact, quantized.uncompiled_scores(self._calibrated.held_out))

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
        is_auto = self._config.activation_range == "auto"
        if is_auto and self._calibrated.exact is not None:
            changes.append({"activation_range": "min_max"})
        return changes

    def _made(self, settings: CalibrationConfig) -> QuantizedNetwork:
        widths, network = self._widths, self._calibrated.network
        ranges = self._calibrated.ranges(widths, settings)
        return with_ranges(network, ranges, widths, magnitudes=self._magnitudes)


def without_margins(config: CalibrationConfig) -> CalibrationConfig:
    """Settings for images that reach as far as those of the task."""
    return dataclasses.replace(config, pooled_margin=1.0, logits_margin=1.0)


def as_stored(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with biases as a file will hold them."""
    return network.with_room_for_biases().with_rounded_biases()
