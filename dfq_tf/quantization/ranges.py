"""Estimators of ranges: lowest and highest, a percentile, least squared error.

All of it is NumPy on histograms and kernels; no network is known here.
"""

import dataclasses

import numpy as np

# Lowest and highest value of a tensor.
Range = tuple[float, float]

# A range below it is as good as none: float32 has no steps so small.
SMALLEST_RANGE = 1e-20

# Shares of the full range that are tried where the squared error is minimised.
_SHARES = np.linspace(1.0, 0.1, 91)
_COARSE_SHARES = np.linspace(1.0, 0.1, 31)
# Ranges that are tried together: what they need stays in the processor's cache.
_TOGETHER = 256


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How often values fell into equal bins between the lowest and the highest.

    Attributes:
      low: the lowest value.
      high: the highest value.
      counts: (bins,); None if only the extremes are known.
    """

    low: float
    high: float
    counts: np.ndarray | None = None

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin, float64 (bins,)."""
        assert self.counts is not None
        width = (self.high - self.low) / len(self.counts)
        return self.low + width * (np.arange(len(self.counts)) + 0.5)


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The range that leaves out the tails beyond a percentile, and holds 0.

    Args:
      histogram: with counts.
      percentile: in (50, 100]: the share of values below the upper end, and of those
        above the lower end.
    """
    assert histogram.counts is not None
    below = np.cumsum(histogram.counts) / np.sum(histogram.counts)
    centers, share = histogram.centers, percentile / 100
    places = np.searchsorted(below, [1 - share, share]).clip(max=len(centers) - 1)
    low, high = map(float, centers[places])
    if share == 1:
        low, high = histogram.low, histogram.high
    return min(low, 0.0), max(high, 0.0)


def least_squares_range(histogram: Histogram, num_bits: int) -> Range:
    """The range, within the extremes, whose rounding and clipping err least.

    Each end that is not 0 is tried at shares of its extreme; the error is the mean
    square over the histogram, each value taken as the middle of its bin.

    Args:
      histogram: with counts.
      num_bits: of the integers, at most 8.
    """
    extremes = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if histogram.low == histogram.high:
        return extremes  # one value, which is an end
    is_one_sided = 0.0 in extremes
    shares = _SHARES if is_one_sided else _COARSE_SHARES
    lows = np.unique(extremes[0] * shares)
    highs = np.unique(extremes[1] * shares)
    candidates = [(float(low), float(high)) for low in lows for high in highs]
    errors = _squared_errors(histogram, np.array(candidates), num_bits)
    return candidates[int(np.argmin(errors))]


def _squared_errors(
    histogram: Histogram, ranges: np.ndarray, num_bits: int
) -> np.ndarray:
    """Summed squared error of each range, up to a number that all of them share.

    The bins whose values become the same integer lie side by side. Of values v that
    become q, sum (v - q)^2 = sum v^2 - 2 q sum v + q^2 count, and differences of
    running sums give both sums: one term for each integer, not for each bin.

    Args:
      histogram: with counts; its extremes differ.
      ranges: (n, 2), the lowest value, 0 or below, and the highest, 0 or above.
      num_bits: of the integers.
    """
    values, counts = histogram.centers, histogram.counts
    running = np.cumsum([counts, counts * values], axis=1)
    running = np.pad(running, ((0, 0), (1, 0)))
    integers = np.arange(2**num_bits)
    errors = []
    for start in range(0, len(ranges), _TOGETHER):
        lows, highs = np.split(ranges[start : start + _TOGETHER], 2, axis=1)
        scales = (highs - lows) / integers[-1]
        rounded = scales * (integers - np.rint(-lows / scales))
        bounds = rounded[:, :-1] + scales / 2
        places = np.ceil((bounds - values[0]) / (values[1] - values[0]))
        places = places.clip(0, len(values)).astype(int)
        places = np.pad(places, ((0, 0), (1, 1)), constant_values=(0, len(values)))
        count, total = np.diff(running[:, places], axis=-1)
        errors.append(np.sum(rounded * (rounded * count - 2 * total), axis=1))
    return np.concatenate(errors)


def largest_integer(num_bits: int) -> int:
    """The largest integer of a kernel; the smallest is as far below 0.

    Args:
      num_bits: 2 or more.
    """
    return 2 ** (num_bits - 1) - 1


def kernel_magnitudes(
    kernel: np.ndarray, num_bits: int, *, per_channel: bool, method: str
) -> np.ndarray:
    """Half the range of a kernel, symmetric around 0.

    Args:
      kernel: (..., outputs).
      num_bits: of the integers, see `largest_integer`.
      per_channel: one per output, or one in all.
      method: 'min_max', the largest magnitude, or 'mse', the share of it whose
        rounding and clipping have the least squared error.

    Returns:
      float64 (outputs,), or () if not `per_channel`; 0 for a kernel of zeros.
    """
    values = np.abs(kernel.astype(np.float64)).reshape(-1, kernel.shape[-1])
    if not per_channel:
        values = values.reshape(-1, 1)
    largest = values.max(axis=0)
    best = largest
    if method == "mse":
        steps = largest_integer(num_bits)
        least = np.full(largest.shape, np.inf)
        for share in _SHARES:
            scale = np.where(largest > 0, share * largest / steps, 1.0)
            rounded = scale * np.minimum(np.rint(values / scale), steps)
            error = np.square(values - rounded).sum(axis=0)
            best = np.where(error < least, share * largest, best)
            least = np.minimum(error, least)
    return best if per_channel else best[0]
