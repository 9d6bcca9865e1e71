"""The losses of Choi et al. 2020, as functions of tensors.

Each is of one replica's images, or of the whole batch where it says so; see
`replicas`. `steps` says who minimises what: the student minimises `distillation_loss`,
the generator alpha times a weighted sum of the BN statistics and the two entropies,
called the auxiliary loss there, less the distillation loss.
"""

import functools
from collections.abc import Sequence
from typing import Any

from dfq_tf.compat import tf
from dfq_tf.training import replica_mean

# Keeps the logarithm of a variance finite where all values are the same.
_TINY = 1e-10


def distillation_loss(
    teacher_logits: tf.Tensor, student_logits: tf.Tensor, temperature: float = 1.0
) -> tf.Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) * T^2, the mean over the batch.

    The factor keeps the size of the gradient where T changes (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network").

    Args:
      teacher_logits: float32 (batch, num_classes).
      student_logits: float32 (batch, num_classes).
      temperature: T, above 0.

    Returns:
      float32 scalar, at least 0, in nats for T = 1; 0 where the two agree everywhere.
    """
    divergences = _divergences(
        teacher_logits / temperature, student_logits / temperature
    )
    return temperature**2 * tf.reduce_mean(divergences)


def agreeing_divergence(
    teacher_logits: tf.Tensor, student_logits: tf.Tensor
) -> tf.Tensor:
    """KL(softmax(teacher) || softmax(student)) where both have the same first class.

    Args:
      teacher_logits: float32 (batch, num_classes).
      student_logits: float32 (batch, num_classes).

    Returns:
      float32 scalar in nats, at least 0: the sum over these images by the batch size.
    """
    divergences = _divergences(teacher_logits, student_logits)
    same = tf.equal(tf.argmax(teacher_logits, -1), tf.argmax(student_logits, -1))
    return tf.reduce_mean(tf.where(same, divergences, 0.0))


def _divergences(teacher_logits: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """KL(softmax(teacher) || softmax(student)) of each image, float32 (batch,)."""
    teacher_log = tf.nn.log_softmax(teacher_logits)
    student_log = tf.nn.log_softmax(student_logits)
    return tf.reduce_sum(tf.exp(teacher_log) * (teacher_log - student_log), axis=-1)


def instance_entropy(logits: tf.Tensor) -> tf.Tensor:
    """Mean entropy of the class distribution of each image.

    Low when each image is clearly of one class; the generator minimises it.

    Args:
      logits: float32 (batch, num_classes), of the teacher.

    Returns:
      float32 scalar in nats, in [0, log(num_classes)].
    """
    log_probabilities = tf.nn.log_softmax(logits)
    entropies = -tf.reduce_sum(tf.exp(log_probabilities) * log_probabilities, axis=-1)
    return tf.reduce_mean(entropies)


def batch_entropy(logits: tf.Tensor) -> tf.Tensor:
    """Entropy of the mean class distribution of a batch.

    High when a batch covers all classes; the generator maximises it.

    Args:
      logits: float32 (batch, num_classes), of the teacher.

    Returns:
      float32 scalar in nats, in [0, log(num_classes)].
    """
    mean = replica_mean(tf.reduce_mean(tf.nn.softmax(logits), axis=0))
    return -tf.reduce_sum(mean * tf.math.log(mean + _TINY))


def channel_moments(values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel, over the batch and the positions.

    TensorFlow's kernel of batch normalization finds both, and one more pass of it is
    their gradient: a third of the time that reductions and their gradients take.

    Args:
      values: (batch, ..., channels), of any float type.

    Returns:
      Two tensors, float32 (channels,): the mean, and the variance that divides by the
      number of values.
    """
    channels = values.shape[-1]
    if values.shape.rank != 4:
        values = tf.reshape(values, (-1, 1, 1, channels))
    return _moments(values)


@tf.custom_gradient
def _moments(values: tf.Tensor) -> tuple[Any, Any]:
    zeros = tf.zeros(values.shape[-1])
    # The kernel takes no epsilon of 0; one that is added and taken off does nothing.
    epsilon = 1e-3
    kernel = functools.partial(tf.raw_ops.FusedBatchNormV3, x=values, epsilon=epsilon)
    found = kernel(
        scale=zeros + 1, offset=zeros, mean=[], variance=[], is_training=True
    )
    count = tf.cast(tf.size(values) / values.shape[-1], tf.float32)
    mean = found.batch_mean
    variance = found.batch_variance * ((count - 1) / count)  # its divides by count - 1

    def gradient(d_mean: tf.Tensor, d_variance: tf.Tensor) -> tf.Tensor:
        """(d_mean + 2 d_variance (values - mean)) / count, as scale and offset."""
        return kernel(
            scale=2 * d_variance / count,
            offset=(d_mean - 2 * d_variance * mean) / count,
            mean=zeros,
            variance=zeros + 1 - epsilon,
            is_training=False,
        ).y

    return (mean, variance), gradient


def bn_statistics_loss(
    inputs: Sequence[tf.Tensor],
    means: Sequence[tf.Tensor],
    variances: Sequence[tf.Tensor],
) -> tf.Tensor:
    """Distance of a batch's BN statistics from those that the teacher stores.

    The sum over layers and channels of the KL divergence of two Gaussians,
    KL(N(m, v) || N(mu, var)) = ((m - mu)^2 + v) / (2 var) - ln(sqrt(v / var)) - 1/2,
    with m and v over the batch and the positions.

    Args:
      inputs: what enters each BN layer, (batch, ..., channels), of any float type.
      means: the stored moving means mu, float32 (channels,) each.
      variances: the stored moving variances var, float32 (channels,) each.

    Returns:
      float32 scalar in nats, at least 0; 0 for a teacher without BN layers.
    """
    total = tf.constant(0.0)
    for values, mu, var in zip(inputs, means, variances):
        m, v = channel_moments(values)
        mean = replica_mean(m)
        # Of the whole batch: the mean of the variances, and the variance of the means.
        m, v = mean, replica_mean(v + tf.math.squared_difference(m, mean))
        divergence = (tf.square(m - mu) + v) / (2 * (var + _TINY)) - 0.5
        divergence -= 0.5 * (tf.math.log(v + _TINY) - tf.math.log(var + _TINY))
        total += tf.reduce_sum(divergence)
    return total


def bn_distance(found: Sequence[tf.Tensor], stored: Sequence[tf.Tensor]) -> tf.Tensor:
    """Sum of the Euclidean distances of moments from those that the teacher stores.

    The loss of Yin et al. 2020, "Dreaming to Distill". Unlike `bn_statistics_loss`, it
    does not divide by variances: layers of large values count for more.

    Args:
      found: means or variances, float32 (channels,) each.
      stored: the same of the BN layers.
    """
    total = tf.constant(0.0)
    for each, wanted in zip(found, stored):
        # The square root has no gradient at 0.
        total += tf.sqrt(tf.reduce_sum(tf.square(each - wanted)) + _TINY)
    return total
