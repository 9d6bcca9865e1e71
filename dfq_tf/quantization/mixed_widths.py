"""Bits of single kernels, for a file of a given size, chosen without data.

A kernel of fewer bits saves bytes and makes noise. What noise it makes in the logits is
measured on the images that calibrate, of each kernel alone. Then bytes are saved where
a byte costs the least noise, as if the noises of several kernels added up.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from dfq_tf.context import counted
from dfq_tf.quantization.calibration import magnitudes_of
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.noise import powers
from dfq_tf.settings import MixedWidths

# The widths that a kernel may have; the others take no less room.
MIXED_BITS = (8, 4, 2)
# (name of a node, bits of its kernel) -> something of it.
Choices = Mapping[tuple[str, int], float]

_MOST_IMAGES = 64


def with_kernel_bits(
    network: QuantizedNetwork, bits: Mapping[str, int], weight_range: str
) -> QuantizedNetwork:
    """The network with other bits of some kernels, and the ranges that these want.

    Args:
      network: from `post_training`.
      bits: node -> bits of its kernel.
      weight_range: 'min_max' or 'mse', see `ranges.kernel_magnitudes`.
    """
    given = tuple(bits.items())
    widths = MixedWidths(per_channel=network.is_per_channel, layer_bits=given)
    found = magnitudes_of(network.graph, widths, weight_range, tuple(bits))
    changed = dataclasses.replace(
        network,
        kernel_bits={**network.kernel_bits, **bits},
        kernel_ranges={**network.kernel_ranges, **found},
    )
    return changed.with_room_for_biases()


def kernel_noise(
    network: QuantizedNetwork, images: np.ndarray, weight_range: str
) -> dict[tuple[str, int], float]:
    """The noise that each kernel of few bits makes in the logits, alone.

    Args:
      network: from `post_training`, with 8 bits.
      images: uint8 (n, height, width, channels), of which the first 64 are used.
      weight_range: as in `with_kernel_bits`.

    Returns:
      (node, bits), bits of MIXED_BITS -> power of the noise over that of the logits of
      the network as it is; 0 for 8.
    """
    images = images[:_MOST_IMAGES]
    exact = network.uncompiled_scores(images)
    noise = {}
    for name in counted(list(network.kernel_bits), "noise of kernels"):
        for bits in MIXED_BITS:
            noise[name, bits] = 0.0
            if bits < 8:
                changed = with_kernel_bits(network, {name: bits}, weight_range)
                signal, power = powers(exact, changed.uncompiled_scores(images))
                noise[name, bits] = float(power / signal) if signal else 0.0
    return noise


def chosen_bits(noise: Choices, num_bytes: Choices, to_save: float) -> dict[str, int]:
    """Node -> bits of its kernel, of as little noise as may be.

    Args:
      noise: of each kernel in each width.
      num_bytes: that a file has of each.
      to_save: how many bytes fewer than with 8 bits everywhere.

    Returns:
      The widths; where so much cannot be saved, those of the fewest bytes.
    """
    bits = {name: 8 for name, _ in noise}

    def saved(name: str, fewer: int) -> float:
        return num_bytes[name, bits[name]] - num_bytes[name, fewer]

    def price(move: tuple[str, int]) -> float:
        name, fewer = move
        return (noise[move] - noise[name, bits[name]]) / saved(*move)

    total, moves = 0.0, []
    while total < to_save:
        open_moves = [
            (name, fewer)
            for name, fewer in noise
            if fewer < bits[name] and saved(name, fewer) > 0
        ]
        if not open_moves:
            break
        name, fewer = move = min(open_moves, key=price)
        total += saved(*move)
        moves.append((name, bits[name]))
        bits[name] = fewer
    # The last move may have made an earlier one needless.
    for name, before in sorted(moves, key=lambda m: noise[m] - noise[m[0], bits[m[0]]]):
        back = num_bytes[name, before] - num_bytes[name, bits[name]]
        if before > bits[name] and back > 0 and total - back >= to_save:
            total -= back
            bits[name] = before
    return bits
