"""Fake quantization with ranges that a calibration sets, behind tfmot's interface.

A value x in a range [lo, hi] of n bits is mapped to lo' + s * round((x - lo') / s),
s = (hi - lo) / (2^n - 1), after clipping to the range; lo' is lo moved so that 0 is
one of the values. The gradient is 1 inside the range and 0 outside (the
straight-through estimator). That is TensorFlow's FakeQuantWithMinMaxVars, which the
TFLite converter turns into integer arithmetic. Ranges never move by themselves.
"""

from typing import Any

import tensorflow_model_optimization as tfmot

from dfq_tf.compat import keras, tf


def is_symmetric(num_bits: int) -> bool:
    """Whether activations of this width have a range around 0: int16's do."""
    return num_bits > 8


@keras.utils.register_keras_serializable("dfq_tf")
class ActivationQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Per-tensor affine quantization of a layer's output.

    More than 8 bits are symmetric around 0, as TFLite has it for int16: the range is
    then set to -m .. m.

    Args:
      num_bits: number of bits, 2 to 16.
    """

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits

    def build(
        self, tensor_shape: Any, name: str, layer: keras.layers.Layer
    ) -> dict[str, tf.Variable]:
        """Makes the range, two scalars, as weights of `layer`; tfmot calls this."""
        return {
            "min": _range_weight(layer, f"{name}_min", (), -6.0),
            "max": _range_weight(layer, f"{name}_max", (), 6.0),
        }

    def __call__(
        self, inputs: tf.Tensor, training: bool, weights: dict, **kwargs: Any
    ) -> tf.Tensor:
        """Fake-quantizes a tensor of any shape; `training` makes no difference."""
        return tf.quantization.fake_quant_with_min_max_vars(
            inputs,
            weights["min"],
            weights["max"],
            self.num_bits,
            narrow_range=is_symmetric(self.num_bits),
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"num_bits": self.num_bits}


@keras.utils.register_keras_serializable("dfq_tf")
class WeightQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Symmetric quantization of a kernel, to -(2^(n-1) - 1) .. 2^(n-1) - 1.

    Args:
      num_bits: number of bits, 2 to 8.
      per_channel: one range per output channel, or one for the whole kernel.
      is_depthwise: whether the output channels are the last two axes, (channels,
        multiplier), rather than the last.
    """

    def __init__(
        self, num_bits: int, per_channel: bool, is_depthwise: bool = False
    ) -> None:
        self.num_bits = num_bits
        self.per_channel = per_channel
        self.is_depthwise = is_depthwise

    def build(
        self, tensor_shape: Any, name: str, layer: keras.layers.Layer
    ) -> dict[str, tf.Variable]:
        """Makes the range as weights of `layer`; tfmot calls this."""
        shape: tuple[int, ...] = ()
        if self.per_channel:
            outputs = tensor_shape[-2:] if self.is_depthwise else tensor_shape[-1:]
            shape = (int(tf.TensorShape(outputs).num_elements()),)
        return {
            "min": _range_weight(layer, f"{name}_min", shape, -1.0),
            "max": _range_weight(layer, f"{name}_max", shape, 1.0),
        }

    def __call__(
        self, inputs: tf.Tensor, training: bool, weights: dict, **kwargs: Any
    ) -> tf.Tensor:
        """Fake-quantizes a kernel; `training` makes no difference."""
        if not self.per_channel:
            return tf.quantization.fake_quant_with_min_max_vars(
                inputs, weights["min"], weights["max"], self.num_bits, True
            )
        kernel = inputs
        if self.is_depthwise:
            kernel = tf.reshape(inputs, (*inputs.shape[:2], 1, -1))
        kernel = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            kernel, weights["min"], weights["max"], self.num_bits, True
        )
        return tf.reshape(kernel, inputs.shape) if self.is_depthwise else kernel

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "num_bits": self.num_bits,
            "per_channel": self.per_channel,
            "is_depthwise": self.is_depthwise,
        }


def _range_weight(
    layer: keras.layers.Layer, name: str, shape: tuple[int, ...], value: float
) -> tf.Variable:
    return layer.add_weight(
        name=name,
        shape=shape,
        initializer=keras.initializers.Constant(value),
        trainable=False,
        dtype=tf.float32,
    )
