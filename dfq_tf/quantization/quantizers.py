"""Fake quantization behind tfmot's interface: which tensors of a node, and how.

A value x in a range [lo, hi] of n bits is mapped to lo' + s * round((x - lo') / s),
s = (hi - lo) / (2^n - 1), after clipping to the range; lo' is lo moved so that 0 is
one of the values. The gradient is 1 inside the range and 0 outside (the
straight-through estimator). That is TensorFlow's FakeQuantWithMinMaxVars. Ranges stay
as they are, or their step sizes learn, see `step_sizes`.
"""

from typing import Any

from dfq_tf.compat import keras, tf, tfmot
from dfq_tf.quantization.network import fake_quantized_kernel, fake_quantized_output
from dfq_tf.quantization.step_sizes import grown_kernel, grown_output, within


@keras.utils.register_keras_serializable("dfq_tf")
class ActivationQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Per-tensor affine quantization of a node's output.

    Args:
      num_bits: 2 to 8, or 16, whose range is symmetric.
      is_average: see `network.fake_quantized_output`.
      most_growth: how many times as wide the range may learn to become; None if it
        stays.
    """

    def __init__(
        self,
        num_bits: int,
        is_average: bool = False,
        most_growth: float | None = None,
    ) -> None:
        self.num_bits = num_bits
        self.is_average = is_average
        self.most_growth = most_growth

    def build(
        self, tensor_shape: Any, name: str, layer: keras.layers.Layer
    ) -> dict[str, tf.Variable]:
        """Makes the range, two scalars, as weights of `layer`; tfmot calls this."""
        weights = {
            "min": _range_weight(layer, f"{name}_min", (), -6.0),
            "max": _range_weight(layer, f"{name}_max", (), 6.0),
        }
        if self.most_growth is not None:
            weights["growth"] = _range_weight(layer, f"{name}_growth", (), 1.0, True)
        return weights

    def __call__(
        self, inputs: tf.Tensor, training: bool, weights: dict, **kwargs: Any
    ) -> tf.Tensor:
        """Fake-quantizes a tensor of any shape; `training` makes no difference."""
        low, high = weights["min"], weights["max"]
        bits, is_average = self.num_bits, self.is_average
        if self.most_growth is None:
            return fake_quantized_output(inputs, low, high, bits, is_average)
        growth = within(weights["growth"], self.most_growth)
        return grown_output(inputs, low, high, growth, bits, is_average)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_bits": self.num_bits,
            "is_average": self.is_average,
            "most_growth": self.most_growth,
        }


@keras.utils.register_keras_serializable("dfq_tf")
class WeightQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Symmetric quantization of a kernel, to -(2^(n-1) - 1) .. 2^(n-1) - 1.

    Args:
      num_bits: number of bits, 2 to 8.
      num_ranges: outputs of the kernel, each with a range; 0 for one range in all.
      grows: whether the ranges learn.
    """

    def __init__(self, num_bits: int, num_ranges: int, grows: bool = False) -> None:
        self.num_bits = num_bits
        self.num_ranges = num_ranges
        self.grows = grows

    def build(
        self, tensor_shape: Any, name: str, layer: keras.layers.Layer
    ) -> dict[str, tf.Variable]:
        """Makes the largest magnitudes as a weight of `layer`; tfmot calls this."""
        shape = (self.num_ranges,) if self.num_ranges else ()
        weights = {"max": _range_weight(layer, f"{name}_max", shape, 1.0)}
        if self.grows:
            weights["growth"] = _range_weight(layer, f"{name}_growth", shape, 1.0, True)
        return weights

    def __call__(
        self, inputs: tf.Tensor, training: bool, weights: dict, **kwargs: Any
    ) -> tf.Tensor:
        """Fake-quantizes a kernel; `training` makes no difference."""
        if not self.grows:
            return fake_quantized_kernel(inputs, weights["max"], self.num_bits)
        growth = within(weights["growth"])
        return grown_kernel(inputs, weights["max"], growth, self.num_bits)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_bits": self.num_bits,
            "num_ranges": self.num_ranges,
            "grows": self.grows,
        }


@keras.utils.register_keras_serializable("dfq_tf")
class NodeQuantizeConfig(tfmot.quantization.keras.QuantizeConfig):
    """Tells tfmot's wrapper which tensors of one node to fake-quantize.

    Args:
      kernel_bits: bits of the kernel, None for a node without one.
      kernel_ranges: outputs of the kernel, each with a range; 0 for one in all.
      bits: bits of the output, None if it is not quantized.
      is_average: of the output, see `network.fake_quantized_output`.
      kernel_grows: whether the kernel's ranges learn.
      most_growth: of the output, see `ActivationQuantizer`.
    """

    def __init__(
        self,
        kernel_bits: int | None,
        kernel_ranges: int,
        bits: int | None,
        is_average: bool = False,
        kernel_grows: bool = False,
        most_growth: float | None = None,
    ) -> None:
        self.kernel_bits = kernel_bits
        self.kernel_ranges = kernel_ranges
        self.bits = bits
        self.is_average = is_average
        self.kernel_grows = kernel_grows
        self.most_growth = most_growth

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list:
        """The kernel and its quantizer; tfmot calls this when it builds the wrapper."""
        if self.kernel_bits is None:
            return []
        quantizer = WeightQuantizer(
            self.kernel_bits, self.kernel_ranges, self.kernel_grows
        )
        return [(layer.kernel, quantizer)]

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list:
        """None: an activation is a node of its own."""
        return []

    def set_quantize_weights(
        self, layer: keras.layers.Layer, quantize_weights: list[tf.Tensor]
    ) -> None:
        """Puts the fake-quantized kernel in place; tfmot calls this at each call."""
        if quantize_weights:
            (layer.kernel,) = quantize_weights

    def set_quantize_activations(
        self, layer: keras.layers.Layer, quantize_activations: list
    ) -> None:
        """Nothing to put in place; tfmot calls this at each call."""
        del layer, quantize_activations

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list:
        """The output's quantizer, if it has one."""
        if self.bits is None:
            return []
        return [ActivationQuantizer(self.bits, self.is_average, self.most_growth)]

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "kernel_bits": self.kernel_bits,
            "kernel_ranges": self.kernel_ranges,
            "bits": self.bits,
            "is_average": self.is_average,
            "kernel_grows": self.kernel_grows,
            "most_growth": self.most_growth,
        }


def _range_weight(
    layer: keras.layers.Layer,
    name: str,
    shape: tuple[int, ...],
    value: float,
    trainable: bool = False,
) -> tf.Variable:
    return layer.add_weight(
        name=name,
        shape=shape,
        initializer=keras.initializers.Constant(value),
        trainable=trainable,
        dtype=tf.float32,
    )
