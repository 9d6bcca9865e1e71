"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016) for small images."""

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError

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
    x = _conv(x, 16, 3, name="stem")
    for group, channels in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range(1, (depth - 4) // 6 + 1):
            strides = 2 if group > 1 and block == 1 else 1
            x = _block(x, channels, strides, name=f"group{group}_block{block}")
    x = _bn_relu(x, "head")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    logits = layers.Dense(num_classes, name="logits")(x)
    return keras.Model(image, logits, name=f"wrn_{depth}_{width}")


def _block(x: tf.Tensor, channels: int, strides: int, name: str) -> tf.Tensor:
    activated = _bn_relu(x, f"{name}_1")
    # A projection reads the activated input; an identity shortcut the raw one.
    shortcut = x
    if x.shape[-1] != channels or strides != 1:
        shortcut = _conv(activated, channels, 1, strides, name=f"{name}_shortcut")
    y = _conv(activated, channels, 3, strides, name=f"{name}_conv1")
    y = _conv(_bn_relu(y, f"{name}_2"), channels, 3, name=f"{name}_conv2")
    return layers.Add(name=f"{name}_add")([shortcut, y])


def _conv(
    x: tf.Tensor, channels: int, size: int, strides: int = 1, *, name: str
) -> tf.Tensor:
    return layers.Conv2D(
        channels,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)


def _bn_relu(x: tf.Tensor, name: str) -> tf.Tensor:
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
    return layers.ReLU(name=f"{name}_relu")(x)
