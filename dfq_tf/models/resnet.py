"""Residual networks (He et al., CVPR 2016), the variant for small images.

The stem is one 3x3 convolution without pooling, as for CIFAR: a 32x32 image has 4x4
positions at the end.
"""

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.models.layers import bn, bn_relu, classifier_head, conv

layers = keras.layers

# Blocks of two convolutions in each of the four stages.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def resnet(
    depth: int, input_shape: tuple[int, int, int], num_classes: int
) -> keras.Model:
    """Builds ResNet-18 or ResNet-34, post-activation, with projection shortcuts.

    Args:
      depth: 18 or 34.
      input_shape: (height, width, channels) of the images.
      num_classes: number of outputs.

    Returns:
      A functional model from (batch, *input_shape) to (batch, num_classes) logits.

    Raises:
      ConfigError: another depth.
    """
    if depth not in _BLOCKS:
        raise ConfigError(f"depth is {depth}; a ResNet here has {sorted(_BLOCKS)}")
    image = layers.Input(input_shape, name="image")
    x = bn_relu(conv(image, 64, 3, name="stem_conv"), "stem")
    for stage, blocks in enumerate(_BLOCKS[depth], start=1):
        for block in range(1, blocks + 1):
            strides = 2 if stage > 1 and block == 1 else 1
            x = _block(x, 32 * 2**stage, strides, f"stage{stage}_block{block}")
    logits = classifier_head(x, num_classes)
    return keras.Model(image, logits, name=f"resnet_{depth}")


def _block(x: tf.Tensor, channels: int, strides: int, name: str) -> tf.Tensor:
    shortcut = x
    if strides != 1 or x.shape[-1] != channels:
        shortcut = conv(x, channels, 1, strides, name=f"{name}_shortcut_conv")
        shortcut = bn(shortcut, f"{name}_shortcut")
    y = bn_relu(conv(x, channels, 3, strides, name=f"{name}_conv1"), f"{name}_1")
    y = bn(conv(y, channels, 3, name=f"{name}_conv2"), f"{name}_2")
    y = layers.Add(name=f"{name}_add")([shortcut, y])
    return layers.ReLU(name=f"{name}_relu")(y)
