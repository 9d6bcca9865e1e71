"""VGG-11 (Simonyan and Zisserman, ICLR 2015) with BatchNormalization."""

from dfq_tf.compat import keras
from dfq_tf.errors import ConfigError
from dfq_tf.models.layers import bn_relu, classifier_head, conv

layers = keras.layers

# Channels of the 3x3 convolutions of each group; a 2x2 max pooling ends each.
_GROUPS = {11: ((64,), (128,), (256, 256), (512, 512), (512, 512))}
_SMALLEST_SIDE = 2 ** len(_GROUPS[11])


def vgg(depth: int, input_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Builds VGG-11: its convolutions, each with BN and ReLU, and one dense layer.

    The two hidden dense layers of the original, which are for images of 224x224, are
    left out, as is usual for small images.

    Args:
      depth: 11.
      input_shape: (height, width, channels) of the images, at least 32x32.
      num_classes: number of outputs.

    Returns:
      A functional model from (batch, *input_shape) to (batch, num_classes) logits.

    Raises:
      ConfigError: another depth, or images that are too small to be halved 5 times.
    """
    if depth not in _GROUPS:
        raise ConfigError(f"depth is {depth}; a VGG here has {sorted(_GROUPS)}")
    if min(input_shape[:2]) < _SMALLEST_SIDE:
        raise ConfigError(
            f"input_shape is {input_shape}; vgg_{depth} halves images 5 times, so it "
            f"needs sides of at least {_SMALLEST_SIDE} pixels"
        )
    image = x = layers.Input(input_shape, name="image")
    for group, widths in enumerate(_GROUPS[depth], start=1):
        for index, channels in enumerate(widths, start=1):
            name = f"group{group}_{index}"
            x = bn_relu(conv(x, channels, 3, name=f"{name}_conv"), name)
        x = layers.MaxPooling2D(name=f"group{group}_pool")(x)
    return keras.Model(image, classifier_head(x, num_classes), name=f"vgg_{depth}")
