"""A float network becomes integers: ranges, grids, quantized network, student."""

from dfq_tf.quantization.calibration import calibrate
from dfq_tf.quantization.grids import Grid, check_widths, is_taken_in
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.post_training import (
    float_network,
    with_pixels,
    with_ranges,
)

__all__ = [
    "Grid",
    "QuantizedNetwork",
    "calibrate",
    "check_widths",
    "float_network",
    "is_taken_in",
    "with_pixels",
    "with_ranges",
]
