"""What the network builders share: convolutions whose BatchNormalization follows."""

from dfq_tf.compat import keras, tf

layers = keras.layers


def conv(
    x: tf.Tensor, channels: int, size: int, strides: int = 1, *, name: str
) -> tf.Tensor:
    """A convolution with 'same' padding and without bias."""
    return layers.Conv2D(
        channels,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)


def bn(x: tf.Tensor, name: str) -> tf.Tensor:
    """BatchNormalization, called NAME_bn."""
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)


def bn_relu(x: tf.Tensor, name: str) -> tf.Tensor:
    """BatchNormalization and ReLU, called NAME_bn and NAME_relu."""
    return layers.ReLU(name=f"{name}_relu")(bn(x, name))


def classifier_head(x: tf.Tensor, num_classes: int) -> tf.Tensor:
    """Global average pooling and a dense layer: logits."""
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return layers.Dense(num_classes, name="logits")(x)
