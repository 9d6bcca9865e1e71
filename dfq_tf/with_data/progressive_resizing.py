"""Progressive resizing: small images in the first epochs, which cost less.

The idea is fast.ai's (Howard, 2018); EfficientNetV2 (Tan and Le, 2021) trains so too.
A convolution's cost grows with the square of the side.
"""

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError

# Share of the epochs over which images grow; in the rest, and in the last epoch in any
# case, they have their full size.
_GROWTH = 0.8
# Sizes are multiples of this share of the full one, so that there are few of them:
# each is compiled once, and halves without a rest where the full size does.
_PARTS = 8


def resized_shape(
    height: int, width: int, initial_scale: float, epoch: int, num_epochs: int
) -> tuple[int, int]:
    """Size of the images in one epoch: it grows evenly, in steps of an eighth.

    Args:
      height: of the full images, in pixels.
      width: of the full images, in pixels.
      initial_scale: side in the first epoch over the full side, in (0, 1].
      epoch: from 0 to num_epochs - 1.
      num_epochs: of the whole training; over its first 80 % images grow, and in the
        last one they are full.

    Returns:
      (height, width), at least an eighth of the full ones and at least 1.
    """
    is_last = epoch == num_epochs - 1
    progress = 1.0 if is_last else min(1.0, epoch / (_GROWTH * num_epochs))
    scale = initial_scale + (1 - initial_scale) * progress
    parts = max(1, int(_PARTS * scale + 1e-6))  # 1e-6: 0.7 + 0.3 is not quite 1
    return max(1, round(height * parts / _PARTS)), max(1, round(width * parts / _PARTS))


def resize(images: tf.Tensor, shape: tuple[int, int]) -> tf.Tensor:
    """Resizes images bilinearly; when they shrink, each pixel is a weighted mean.

    Args:
      images: float32 (batch, height, width, channels).
      shape: the new (height, width).

    Returns:
      float32 (batch, *shape, channels); `images` itself if that is their size.
    """
    if tuple(images.shape[1:3]) == shape:
        return images
    return tf.image.resize(images, shape, antialias=True)


def of_any_size(model: keras.Model, smallest: tuple[int, int]) -> keras.Model:
    """Copies a functional model so that it takes images of other sizes.

    Args:
      model: takes images of one size.
      smallest: (height, width) of the smallest that it has to take.

    Returns:
      A model with its own variables, holding the same values.

    Raises:
      ConfigError: the weights of the model depend on the size of its images, or a
        layer has nothing left of the smallest.
    """
    num_channels = model.input_shape[-1]
    inputs = keras.Input((None, None, num_channels), name=model.input_names[0])
    try:
        copy = keras.models.clone_model(model, input_tensors=inputs)
        copy(keras.Input((*smallest, num_channels)))
    except ValueError as error:
        height, width = smallest
        raise ConfigError(
            f"teacher_initial_scale makes images of {height} x {width} pixels, which "
            f"{model.name} cannot take ({error}); set it nearer to 1, or to 1"
        ) from error
    copy.set_weights(model.get_weights())
    return copy
