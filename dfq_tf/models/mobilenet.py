"""MobileNet V1 (Howard et al., 2017), with a width multiplier."""

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.models.layers import bn_relu, classifier_head, conv

layers = keras.layers

# Channels at full width and strides of the depthwise separable blocks.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
# Below this side, the first convolution keeps the resolution.
_SIDE_OF_STRIDED_STEM = 64


def mobilenet_v1(
    percent: int, input_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Builds MobileNet V1: depthwise and 1x1 convolutions, each with BN and ReLU.

    Args:
      percent: width multiplier in percent, 100 for the original's channels; channels
        are rounded to a multiple of 8.
      input_shape: (height, width, channels) of the images. Images below 64 pixels
        keep their resolution in the first convolution.
      num_classes: number of outputs.

    Returns:
      A functional model from (batch, *input_shape) to (batch, num_classes) logits.

    Raises:
      ConfigError: percent is below 1 or above 400.
    """
    if not 1 <= percent <= 400:
        raise ConfigError(
            f"percent is {percent}; the width of a MobileNet is 1 to 400 percent"
        )

    def width(channels: int) -> int:
        return max(8, 8 * round(channels * percent / 800))

    image = layers.Input(input_shape, name="image")
    strides = 2 if min(input_shape[:2]) >= _SIDE_OF_STRIDED_STEM else 1
    x = bn_relu(conv(image, width(32), 3, strides, name="stem_conv"), "stem")
    for index, (channels, strides) in enumerate(_BLOCKS, start=1):
        x = _block(x, width(channels), strides, f"block{index}")
    logits = classifier_head(x, num_classes)
    return keras.Model(image, logits, name=f"mobilenet_v1_{percent}")


def _block(x: tf.Tensor, channels: int, strides: int, name: str) -> tf.Tensor:
    x = layers.DepthwiseConv2D(
        3,
        strides,
        padding="same",
        use_bias=False,
        depthwise_initializer="he_normal",
        name=f"{name}_depthwise",
    )(x)
    x = bn_relu(x, f"{name}_1")
    return bn_relu(conv(x, channels, 1, name=f"{name}_conv"), f"{name}_2")
