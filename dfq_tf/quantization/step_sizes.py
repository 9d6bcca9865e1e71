"""Step sizes that learn beside the weights (LSQ, Esser et al. 2020).

The step size is what it was at first times a growth g, and what it does to a value x
on the grid, y = s round(x / s), is found as if rounding and clipping stayed the same:

    dy/ds = (y - x) / s inside the range,    y / s outside.

The gradient of x is 1 inside the range and 0 outside (straight-through).
"""

from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import Exactly, NoFurther
from dfq_tf.quantization import grids
from dfq_tf.quantization.network import (
    QuantizedNetwork,
    fake_quantized_kernel,
    fake_quantized_output,
)

# Step sizes of so many bits and more stay: their width is an insurance. From global
# pools on it is worth more, since generated images reach less far there, and stays with
# fewer bits: a WRN-16-1 of 4-bit activations had 2 dB less without it, while a
# ResNet-20 of 3 bits had 0.8 points of agreement more (docs/experiments/few_bits.md).
INSURED_BITS, _INSURED_POOLED_BITS = 8, 4
_LEAST_GROWTH = np.float32(0.1)


def within(growth: tf.Tensor, most: Any = np.inf) -> tf.Tensor:
    """A growth within its limits; beyond them it still learns the way back."""
    return growth + tf.stop_gradient(clipped(growth, most) - growth)


def clipped(growth: Any, most: Any = np.inf) -> Any:
    """A growth within its limits, of NumPy or TensorFlow as it came."""
    is_numpy = isinstance(growth, (np.ndarray, np.generic))
    clip = np.clip if is_numpy else tf.clip_by_value
    return clip(growth, _LEAST_GROWTH, most)


def grown_output(
    values: tf.Tensor,
    low: Any,
    high: Any,
    growth: tf.Tensor,
    num_bits: int,
    is_average: bool = False,
) -> tf.Tensor:
    """`network.fake_quantized_output` in a range that is `growth` times as wide.

    Args:
      values: float32.
      low: the range's lower end before it grew.
      high: its upper end.
      growth: scalar, within its limits; it gets a gradient.
      num_bits: 2 to 8.
      is_average: as of `network.fake_quantized_output`.
    """

    @tf.custom_gradient
    def rounded(x: tf.Tensor, growth: tf.Tensor) -> tuple[tf.Tensor, Any]:
        ends = low * growth, high * growth
        y = fake_quantized_output(x, *ends, num_bits, is_average)

        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            inside = tf.raw_ops.FakeQuantWithMinMaxVarsGradient(
                gradients=upstream,
                inputs=x,
                min=ends[0],
                max=ends[1],
                num_bits=num_bits,
            )[0]
            moved = tf.reduce_sum(upstream * y) - tf.reduce_sum(inside * x)
            return inside, moved / growth

        return y, gradients

    return rounded(values, growth)


def grown_kernel(
    kernel: tf.Tensor, high: Any, growth: tf.Tensor, num_bits: int
) -> tf.Tensor:
    """`network.fake_quantized_kernel` in a range that is `growth` times as wide.

    Args:
      kernel: float32, its outputs on the last axes.
      high: largest magnitude before it grew, () or (channels,).
      growth: of the shape of `high`, within its limits; it gets a gradient.
      num_bits: 2 to 8.
    """

    @tf.custom_gradient
    def rounded(x: tf.Tensor, growth: tf.Tensor) -> tuple[tf.Tensor, Any]:
        y = fake_quantized_kernel(x, high * growth, num_bits)

        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            columns = (-1, *high.shape)
            is_inside = tf.abs(tf.reshape(x, columns)) <= high * growth
            inside = upstream * tf.reshape(tf.cast(is_inside, x.dtype), x.shape)
            moved = tf.reshape(upstream * y - inside * x, columns)
            return inside, tf.reduce_sum(moved, axis=0) / growth

        return y, gradients

    return rounded(kernel, growth)


def growing(network: QuantizedNetwork) -> dict[str, float]:
    """Owners of grids whose step size may learn -> how many times as wide it may get.

    Those may not whose width is an insurance: of 8 bits and more, and of 4 and more
    from global pools on. Nor those that an operator fixes.
    """
    pooled, found = grids.pooled(network.graph), {}
    for owner, members in network.groups.items():
        bits = network.bits[owner]
        bounds = grids.bounds_of(network.graph, members, bits)
        insured = _INSURED_POOLED_BITS if pooled & {*members} else INSURED_BITS
        if bits < insured and not isinstance(bounds, Exactly):
            found[owner] = _most(network, owner, bounds)
    return found


def _most(network: QuantizedNetwork, owner: str, bounds: Any) -> float:
    if not isinstance(bounds, NoFurther):
        return float("inf")
    grid = grids.activation_grid(*network.ranges[owner], network.bits[owner])
    return float(np.float32(bounds.high) / grid.ends[1])
