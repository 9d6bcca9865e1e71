"""Supervised training of a teacher, on labelled images given as arrays."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.errors import ConfigError
from dfq_tf.settings import TeacherConfig
from dfq_tf.training import (
    Copies,
    Learner,
    augment,
    check_batch,
    devices,
    everywhere,
    optimizers,
    replica_mean,
    replica_slice,
    run_loop,
    with_precision,
)
from dfq_tf.with_data.progressive_resizing import of_any_size, resize, resized_shape

# Of SGD, by Nesterov.
_MOMENTUM = 0.9


def train_teacher(
    teacher: Learner,
    images: np.ndarray,
    labels: np.ndarray,
    context: Context[TeacherConfig],
) -> None:
    """Trains `teacher.model` in place: SGD with Nesterov momentum, cosine decay to 0.

    The same seed gives the same order and the same augmentation, also after an
    interruption: both are drawn from (seed, step).

    Args:
      teacher: the model, with logits as outputs, and its description.
      images: uint8 (n, height, width, channels).
      labels: integer (n,), in [0, num_classes).
      context: its settings have the epochs, batch size and optimizer's numbers; weights
        are float32 whatever its precision.

    Raises:
      ConfigError: a batch is larger than the training set, or does not divide between
        the devices; or images are to be resized, and the model cannot take them.
      TrainingError: the loss or a weight became infinite or NaN, or a worker was lost.
    """
    config = context.settings
    batch_size = config.teacher_batch_size
    check_batch(context.strategy, batch_size, name="teacher_batch_size")
    steps_per_epoch = len(images) // batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"teacher_batch_size is {batch_size}, but there are only {len(images)} "
            "training images"
        )
    num_steps = config.teacher_epochs * steps_per_epoch
    trained = _to_train(teacher.model, context)
    copies = Copies(context.strategy)
    model = copies.of(trained)
    with devices.scope(context.strategy):
        optimizer = optimizers.sgd(
            model, config.teacher_learning_rate, num_steps, _MOMENTUM
        )
    train_step = _compiled_step(
        model, teacher.description.normalize, optimizer, context
    )
    order = Order(len(images), batch_size, context.seed)
    size = teacher.image_shape[:2]

    def step(index: int) -> Mapping[str, tf.Tensor]:
        chosen = order.batch(index)
        return train_step(
            tf.constant(images[chosen]),
            tf.constant(labels[chosen], tf.int32),
            tf.constant(index),
            _shape_in(index // steps_per_epoch, size, config),
        )

    trackables = {"model": model, "optimizer": optimizer}
    run_loop("teacher", step, num_steps, trackables, context)
    copies.write_back()
    teacher.model.set_weights(trained.get_weights())


def _to_train(model: keras.Model, context: Context[TeacherConfig]) -> keras.Model:
    """A copy in the context's precision, for all sizes that the images will have."""
    size = model.input_shape[1:3]
    smallest = _shape_in(0, size, context.settings)
    if smallest != size:
        model = of_any_size(model, smallest)
    return with_precision(model, context.precision)


def _shape_in(
    epoch: int, size: tuple[int, int], config: TeacherConfig
) -> tuple[int, int]:
    """Size of the images in an epoch."""
    scale, num_epochs = config.teacher_initial_scale, config.teacher_epochs
    return resized_shape(*size, scale, epoch, num_epochs)


def _compiled_step(
    model: keras.Model,
    normalize: Callable[[tf.Tensor], tf.Tensor],
    optimizer: Any,
    context: Context[TeacherConfig],
) -> Any:
    """(pixels, labels, index of the step, size of the images) -> measurements."""
    config = context.settings

    def step_on_device(
        pixels: tf.Tensor, labels: tf.Tensor, index: tf.Tensor, shape: tuple[int, int]
    ) -> Mapping[str, tf.Tensor]:
        inputs = normalize(tf.cast(replica_slice(pixels), tf.float32))
        inputs = augment(inputs, config.augmentation, (context.seed, index))
        return supervised_step(
            model,
            optimizer,
            resize(inputs, shape),
            replica_slice(labels),
            config.teacher_weight_decay,
        )

    return tf.function(everywhere(step_on_device, context.strategy), autograph=False)


def supervised_step(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    inputs: tf.Tensor,
    labels: tf.Tensor,
    weight_decay: float,
) -> dict[str, tf.Tensor]:
    """One step on the cross-entropy with the labels, plus an L2 penalty on kernels.

    Args:
      model: gives logits, (batch, num_classes).
      optimizer: built for the model's trainable variables.
      inputs: float32 (batch, height, width, channels), normalised; of several
        replicas, each has its share.
      labels: int32 (batch,).
      weight_decay: see `optimizers.descend`.

    Returns:
      'loss', the mean cross-entropy in nats, and 'accuracy' in [0, 1], both before
      the step.
    """
    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        loss = tf.reduce_mean(losses)
    optimizers.descend(tape, loss, model, optimizer, weight_decay)
    predictions = tf.argmax(logits, axis=-1, output_type=labels.dtype)
    accuracy = tf.reduce_mean(tf.cast(predictions == labels, tf.float32))
    return replica_mean({"loss": loss, "accuracy": accuracy})


class Order:
    """The shuffled order of the images, epoch by epoch."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1

    def batch(self, index: int) -> np.ndarray:
        """Indices of the images of step `index`; an incomplete last batch is left."""
        epoch, position = divmod(index, self._num_images // self._batch_size)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._permutation = rng.permutation(self._num_images)
            self._epoch = epoch
        start = position * self._batch_size
        return self._permutation[start : start + self._batch_size]
