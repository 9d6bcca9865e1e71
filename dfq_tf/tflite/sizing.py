"""A quantized network whose file has a given size: bits of single kernels."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier
from dfq_tf.quantization import (
    MIXED_BITS,
    QuantizedNetwork,
    chosen_bits,
    kernel_noise,
    with_any_ranges,
)
from dfq_tf.settings import BitWidths, FileConfig, MixedWidths
from dfq_tf.tflite.forms import LayerCosts, has_choice, layer_costs
from dfq_tf.tflite.writer import write

_KIB = 1024
# Kept free: how many numbers tensors share hangs on their values, which may change.
_RESERVE = 256
# How often the bytes of the whole file may correct the sum of its layers'.
_MOST_TRIALS = 8


@dataclasses.dataclass(frozen=True)
class SizedLayer:
    """A layer with a kernel, and what its width does.

    Attributes:
      name: of the node.
      bits: of its kernel.
      form: in which the file has it, such as 'FULLY_CONNECTED int4'.
      num_bytes: of its weights in the file.
      milliseconds: by the table of kernel costs; None where that says nothing.
      noise: power of the noise that this width alone makes in the logits of the
        images that calibrate, over the power of the logits.
    """

    name: str
    bits: int
    form: str
    num_bytes: int
    milliseconds: float | None
    noise: float


class _Sizes:
    """What files of one network may weigh: of 8-bit kernels, of the fewest bits.

    Args:
      network: with 8-bit weights; on its ranges sizes hang hardly.
      file: says the size that is asked for.

    Raises:
      ConfigError: no file is so small; it says how small one can be.
    """

    def __init__(self, network: QuantizedNetwork, file: FileConfig) -> None:
        self._network, self._file = network, file
        self.costs = _costs(network, file)
        self.num_bytes = {key: cost.num_bytes for key, cost in self.costs.items()}
        self.smallest = {
            name: min(MIXED_BITS, key=lambda bits: (self.num_bytes[name, bits], -bits))
            for name in network.kernel_bits
        }
        self.whole, least = self.of(network.kernel_bits), self.of(self.smallest)
        self.asked = self.whole * (file.size_share or 0) or file.target_kib * _KIB
        if min(self.whole, least + _RESERVE) > self.asked:
            favors = has_choice(network, file) and file.favor != "size"
            raise _too_small(file, self.whole, least + _RESERVE, favors)

    def of(self, bits: Mapping[str, int]) -> int:
        """Bytes of the file of kernels of so many bits."""
        # The ranges stay those of 8 bits: the size does not hang on them.
        changed = dataclasses.replace(self._network, kernel_bits=bits)
        return len(write(changed.with_room_for_biases(), self._file))


def file_bytes(network: Classifier) -> int:
    """Bytes of the int8 file of a float network, nearly: no range is known yet.

    Args:
      network: from `float_network`.
    """
    return len(write(with_any_ranges(network), FileConfig()))


def check_size(network: Classifier, widths: BitWidths, file: FileConfig) -> None:
    """Raises ConfigError if no file of a float network is as small as asked for.

    Args:
      network: from `float_network`.
      widths: of the network.
      file: says the size.
    """
    _Sizes(with_any_ranges(network, widths), file)


def sized_widths(
    network: QuantizedNetwork,
    images: np.ndarray,
    widths: BitWidths,
    file: FileConfig,
    weight_range: str,
) -> tuple[MixedWidths, list[SizedLayer]]:
    """The widths of a network whose file is no larger than asked for.

    Args:
      network: with 8-bit weights.
      images: those that calibrate, uint8 (n, height, width, channels).
      widths: of the network.
      file: says the size.
      weight_range: 'min_max' or 'mse'.

    Returns:
      The same widths, but for those of kernels; and what they do, for each layer.

    Raises:
      ConfigError: no file is so small; it says how small one can be.
    """
    sizes = _Sizes(network, file)

    def fewer(noise: Mapping[tuple[str, int], float]) -> Mapping[str, int]:
        most = sizes.asked - _RESERVE
        to_save = sizes.whole - most
        for _ in range(_MOST_TRIALS):
            found = chosen_bits(noise, sizes.num_bytes, to_save)
            if (excess := sizes.of(found) - most) <= 0:
                return found
            to_save += excess
        return sizes.smallest

    bits: Mapping[str, int] = network.kernel_bits
    noise: dict[tuple[str, int], float] = {}  # the network as it is makes none
    if sizes.whole > sizes.asked:
        noise = kernel_noise(network, images, weight_range)
        bits = fewer(noise)
    layers = [
        _sized(name, each, sizes.costs[name, each], noise.get((name, each), 0.0))
        for name, each in bits.items()
    ]
    mixed = MixedWidths(**vars(widths) | {"layer_bits": tuple(bits.items())})
    return mixed, layers


def _sized(name: str, bits: int, costs: LayerCosts, noise: float) -> SizedLayer:
    form, time = costs.form.name, costs.milliseconds
    return SizedLayer(name, bits, form, costs.num_bytes, time, noise)


def _costs(
    network: QuantizedNetwork, file: FileConfig
) -> dict[tuple[str, int], LayerCosts]:
    """What each kernel costs in each width: (node, bits) -> costs."""
    costs = {}
    for bits in MIXED_BITS:
        all_same = dict.fromkeys(network.kernel_bits, bits)
        changed = dataclasses.replace(network, kernel_bits=all_same)
        for name, cost in layer_costs(changed, file).items():
            costs[name, bits] = cost
    return costs


def _too_small(file: FileConfig, whole: int, least: int, favors: bool) -> ConfigError:
    """What to ask for; `favors` says whether favor='size' may make the file smaller."""
    name = str(file.size_setting)
    advice = ""
    if favors:
        advice = ". With favor='size' (--favor=size of tools/run.py) it may be smaller"
    if least >= whole:
        return ConfigError(
            f"{name} is {getattr(file, name)!r}, and fewer bits make this file hardly "
            f"smaller: it has {whole:,} bytes with 8-bit weights, most of which are no "
            f"weights. Leave {name} out{advice}"
        )
    share, sizes = np.ceil(1000 * least / whole) / 1000, f"{-(-least // _KIB)} KiB"
    if share < 1:  # no other share is one that can be asked for
        sizes = f"{share:g}x or {sizes}"
    return ConfigError(
        f"{name} is {getattr(file, name)!r}, and the smallest file has {least:,} "
        f"bytes, {least / whole:.3f}x of the {whole:,} of 8-bit weights: ask for "
        f"{sizes} at the least{advice}"
    )


def as_table(layers: Sequence[SizedLayer]) -> str:
    """A line for each layer, for readers."""
    lines = [
        f"{'layer':32} {'bits':>4} {'form':>22} {'bytes':>9} {'noise':>9} {'ms':>8}"
    ]
    for layer in layers:
        time = "-" if layer.milliseconds is None else f"{layer.milliseconds:.4f}"
        lines.append(
            f"{layer.name:32} {layer.bits:>4} {layer.form:>22} {layer.num_bytes:>9,} "
            f"{layer.noise:>9.1e} {time:>8}"
        )
    return "\n".join(lines)
