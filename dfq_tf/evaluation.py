"""How good a classifier is: accuracy on labels, agreement with another classifier.

Everything here takes scores, (n, num_classes), and does not care who made them.
"""

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.description import ModelDescription


def keras_scores(
    model: keras.Model,
    description: ModelDescription,
    images: np.ndarray,
    batch_size: int = 500,
) -> np.ndarray:
    """Scores of images by a Keras model.

    Args:
      model: takes normalised images.
      description: says how pixels are normalised.
      images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
      batch_size: images per pass.

    Returns:
      float32 (n, num_classes), what the model's last layer gives.
    """

    @tf.function(reduce_retracing=True)
    def scores(pixels: tf.Tensor) -> tf.Tensor:
        inputs = description.normalize(tf.cast(pixels, tf.float32))
        return model(inputs, training=False)

    starts = range(0, len(images), batch_size)
    return np.concatenate(
        [scores(tf.constant(images[i : i + batch_size])).numpy() for i in starts]
    )


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest score is the label's, in [0, 1]."""
    return float(np.mean(np.argmax(scores, axis=-1) == labels))


def agreement(scores: np.ndarray, other_scores: np.ndarray) -> float:
    """Share of rows where both have their largest score in the same class, in [0, 1]."""
    return accuracy(scores, np.argmax(other_scores, axis=-1))
