"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016) for small images."""

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.models.layers import bn_relu, classifier_head, conv

layers = keras.layers


def wide_resnet(
    depth: int, width: int, input_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Builds WRN-depth-width, pre-activation, without dropout.

    Args:
      depth: number of convolutions along the longest path plus 1, 6 n + 4.
      width: multiplier of the 16, 32 and 64 channels of the three groups.
      input_shape: (height, width, channels) of the images.
      num_classes: number of outputs.

    Returns:
      A functional model from (batch, *input_shape) to (batch, num_classes) logits.

    Raises:
      ConfigError: depth is not 6 n + 4, or a size is below 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ConfigError(
            f"depth is {depth}; a WRN needs 10, 16, 22, 28, ... (6 n + 4)"
        )
    if width < 1:
        raise ConfigError(f"width is {width}; it must be at least 1")
    image = x = layers.Input(input_shape, name="image")
    x = conv(x, 16, 3, name="stem")
    for group, channels in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(1, (depth - 4) // 6 + 1):
            strides = 2 if group > 1 and block == 1 else 1
            x = _block(x, channels, strides, name=f"group{group}_block{block}")
    x = bn_relu(x, "head")
    logits = classifier_head(x, num_classes)
    return keras.Model(image, logits, name=f"wrn_{depth}_{width}")


def _block(x: tf.Tensor, channels: int, strides: int, name: str) -> tf.Tensor:
    activated = bn_relu(x, f"{name}_1")
    # A projection reads the activated input; an identity shortcut the raw one.
    shortcut = x
    if x.shape[-1] != channels or strides != 1:
        shortcut = conv(activated, channels, 1, strides, name=f"{name}_shortcut")
    y = conv(activated, channels, 3, strides, name=f"{name}_conv1")
    y = conv(bn_relu(y, f"{name}_2"), channels, 3, name=f"{name}_conv2")
    return layers.Add(name=f"{name}_add")([shortcut, y])
