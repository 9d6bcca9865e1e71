"""The signal-to-quantization-noise ratio (SQNR).

SQNR = 10 log10(sum of float outputs^2 / sum of (quantized - float outputs)^2), in dB.
"""

import math

import numpy as np


def powers(signal: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Sums of the squares of a signal, and of its noise: float64 (2,)."""
    power = np.sum(np.square(signal, dtype=np.float64))
    noise = np.sum(np.square(noisy.astype(np.float64) - signal))
    return np.array([power, noise])


def decibels(power: float, noise: float) -> float:
    """SQNR of such sums: inf without noise, -inf without a signal."""
    if noise == 0:
        return math.inf
    return float(10 * np.log10(power / noise)) if power else -math.inf


def sqnr(exact: np.ndarray, scores: np.ndarray) -> float:
    """SQNR of scores, in dB.

    Args:
      exact: of the float network, (n, num_classes).
      scores: of a quantized one, the same shape.
    """
    return decibels(*powers(exact, scores))


def scale_free_sqnr(exact: np.ndarray, scores: np.ndarray) -> float:
    """SQNR of scores times the factor, at least 0, with which it is highest; in dB.

    A factor that all scores have in common changes no class, but counts as noise in
    `sqnr`: with few bits that can be most of it.

    Args:
      exact: as of `sqnr`.
      scores: as of `sqnr`.
    """
    signal, noisy = (np.ravel(each).astype(np.float64) for each in (exact, scores))
    own = float(noisy @ noisy)
    factor = max(0.0, float(signal @ noisy) / own) if own else 0.0
    return sqnr(signal, factor * noisy)
