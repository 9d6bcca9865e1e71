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
      num_bits: of the integers.
    """
    assert histogram.counts is not None
    extremes = min(histogram.low, 0.0), max(histogram.high, 0.0)
    is_one_sided = 0.0 in extremes
    shares = _SHARES if is_one_sided else _COARSE_SHARES
    lows = np.unique(extremes[0] * shares)
    highs = np.unique(extremes[1] * shares)
    candidates = [(float(low), float(high)) for low in lows for high in highs]
    values, counts = histogram.centers, histogram.counts
    errors = [
        np.dot(counts, np.square(values - _rounded(values, *candidate, num_bits)))
        for candidate in candidates
    ]
    return candidates[int(np.argmin(errors))]


def kernel_magnitudes(
    kernel: np.ndarray, num_bits: int, *, per_channel: bool, method: str
) -> np.ndarray:
    """Half the range of a kernel, symmetric around 0.

    Args:
      kernel: (..., outputs).
      num_bits: of the integers, -(2^(n-1) - 1) .. 2^(n-1) - 1.
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
        steps = 2 ** (num_bits - 1) - 1
        least = np.full(largest.shape, np.inf)
        for share in _SHARES:
            scale = np.where(largest > 0, share * largest / steps, 1.0)
            rounded = scale * np.minimum(np.rint(values / scale), steps)
            error = np.square(values - rounded).sum(axis=0)
            best = np.where(error < least, share * largest, best)
            least = np.minimum(error, least)
    return best if per_channel else best[0]


def _rounded(values: np.ndarray, low: float, high: float, num_bits: int) -> np.ndarray:
    scale = (high - low) / (2**num_bits - 1)
    if scale == 0:
        return np.zeros_like(values)
    zero_point = np.rint(-low / scale)
    integers = np.clip(np.rint(values / scale) + zero_point, 0, 2**num_bits - 1)
    return scale * (integers - zero_point)
