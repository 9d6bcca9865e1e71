"""A float network becomes integers: ranges, grids, quantized network, student."""

from dfq_tf.quantization.calibration import (
    calibrate,
    with_any_ranges,
    with_ranges,
)
from dfq_tf.quantization.choosing import Calibrated, without_margins
from dfq_tf.quantization.grids import (
    Grid,
    check_widths,
    is_taken_in,
    kernel_bits,
    measured,
    slope_integers,
)
from dfq_tf.quantization.mixed_widths import (
    MIXED_BITS,
    chosen_bits,
    kernel_noise,
    with_kernel_bits,
)
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.noise import decibels, powers, sqnr
from dfq_tf.quantization.post_training import float_network, with_pixels
from dfq_tf.quantization.reconstruction import (
    BLOCK_MEMORY,
    FittedBlock,
    Reconstructed,
    reconstruct,
    run_names,
)

__all__ = [
    "BLOCK_MEMORY",
    "Calibrated",
    "FittedBlock",
    "Grid",
    "MIXED_BITS",
    "QuantizedNetwork",
    "Reconstructed",
    "calibrate",
    "check_widths",
    "chosen_bits",
    "decibels",
    "float_network",
    "is_taken_in",
    "kernel_bits",
    "kernel_noise",
    "measured",
    "powers",
    "reconstruct",
    "run_names",
    "slope_integers",
    "sqnr",
    "with_any_ranges",
    "with_pixels",
    "with_kernel_bits",
    "with_ranges",
    "without_margins",
]
