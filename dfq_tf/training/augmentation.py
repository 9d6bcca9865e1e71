"""Changes to images that leave their class as it is: random crops and flips."""

from collections.abc import Sequence
from typing import Any

from dfq_tf.compat import tf
from dfq_tf.training.replicas import num_replicas, replica_slice


def augment(inputs: tf.Tensor, augmentation: str, seed_and_step: Any) -> tf.Tensor:
    """Crops each image at random after padding it with zeros, and may flip it.

    Args:
      inputs: (batch, height, width, channels), normalised, so that 0 is the mean; of
        several replicas, each has its share, and random numbers of its own.
      augmentation: 'none', 'crop' or 'crop_flip'. The padding is an eighth of the
        height above and below, and of the width left and right, rounded down: 4 pixels
        of 32, and none of 7.
      seed_and_step: two integers or an int32 (2,); the random numbers depend on them
        and on nothing else.

    Returns:
      A tensor like `inputs`.
    """
    if augmentation == "none":
        return inputs
    _, height, width, _ = inputs.shape
    batch = tf.shape(inputs)[0] * num_replicas()
    margins = [side // 8 for side in (height, width)]
    seeds = tf.random.split(tf.cast(tf.stack(seed_and_step), tf.int32), 2)
    padded = tf.pad(inputs, [[0, 0], *([each, each] for each in margins), [0, 0]])
    # The limit is one number, so that each margin draws for both axes.
    drawn = [
        tf.random.stateless_uniform((2, batch, 1), seeds[0], 0, 2 * m + 1, tf.int32)
        for m in margins
    ]
    rows = replica_slice(drawn[0][0]) + tf.range(height)
    columns = replica_slice(drawn[1][1]) + tf.range(width)
    if augmentation == "crop_flip":
        chances = tf.random.stateless_uniform((batch, 1), seeds[1])
        is_flipped = replica_slice(chances) < 0.5
        columns = tf.where(is_flipped, tf.reverse(columns, [1]), columns)
    cropped = tf.gather(padded, rows, axis=1, batch_dims=1)
    return tf.gather(cropped, columns, axis=2, batch_dims=1)


def flip(images: tf.Tensor, seed_and_step: Any) -> tf.Tensor:
    """Mirrors each image, left to right, or leaves it, as likely.

    Args:
      images: (batch, height, width, channels).
      seed_and_step: see `augment`.

    Returns:
      A tensor like `images`.
    """
    seed = tf.cast(tf.stack(seed_and_step), tf.int32)
    chances = tf.random.stateless_uniform((tf.shape(images)[0], 1, 1, 1), seed)
    return tf.where(chances < 0.5, tf.reverse(images, [2]), images)


def augment_pixels(
    pixels: tf.Tensor,
    input_mean: Sequence[float],
    augmentation: str,
    seed_and_step: Any,
) -> tf.Tensor:
    """As `augment`, for images that are not normalised: pads with the mean pixel.

    Args:
      pixels: uint8 or float32 (batch, height, width, channels) in [0, 255].
      input_mean: see `ModelDescription`. Where no pixel can have it, the nearest one
        pads: the students' images are kept in uint8.
      augmentation: see `augment`.
      seed_and_step: see `augment`.

    Returns:
      float32, of the same shape.
    """
    pixels = tf.cast(pixels, tf.float32)
    if augmentation == "none":
        return pixels
    mean = tf.clip_by_value(tf.constant(input_mean, tf.float32), 0.0, 255.0)
    return augment(pixels - mean, augmentation, seed_and_step) + mean
