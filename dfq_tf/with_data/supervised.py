"""Supervised training of a teacher, on labelled images given as arrays."""

import os
from collections.abc import Mapping

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.settings import TeacherConfig
from dfq_tf.training import optimizers
from dfq_tf.training.augmentation import augment
from dfq_tf.training.copies import with_precision
from dfq_tf.training.devices import Copies, check_batch, everywhere, names_lost_workers
from dfq_tf.training.loop import run_loop
from dfq_tf.training.replicas import replica_mean, replica_slice
from dfq_tf.with_data.progressive_resizing import of_any_size, resize, resized_shape


@names_lost_workers
def train_teacher(
    teacher: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    config: TeacherConfig,
    *,
    seed: int = 0,
    precision: str = "auto",
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> None:
    """Trains `teacher.model` in place: SGD with Nesterov momentum, cosine decay to 0.

    The same seed gives the same order and the same augmentation, also after an
    interruption: both are drawn from (seed, step).

    Args:
      teacher: the model, with logits as outputs, and its description.
      images: uint8 (n, height, width, channels).
      labels: integer (n,), in [0, num_classes).
      config: epochs, batch size and optimizer settings.
      seed: any non-negative integer.
      precision: see `resolve_precision`; weights are float32 in any case.
      strategy: the devices, see `distribution.make_strategy`; None for one.
      directory: for checkpoints and scalars; None keeps none.
      show_progress: whether to show a bar.

    Raises:
      ConfigError: a batch is larger than the training set, or does not divide between
        the devices; or images are to be resized, and the model cannot take them.
      TrainingError: the loss or a weight became infinite or NaN, or a worker was lost.
    """
    check_batch(strategy, config.teacher_batch_size, name="teacher_batch_size")
    steps_per_epoch = len(images) // config.teacher_batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"teacher_batch_size is {config.teacher_batch_size}, but there are only "
            f"{len(images)} training images"
        )
    num_steps = config.teacher_epochs * steps_per_epoch
    _, height, width, _ = images.shape

    def shape_in(epoch: int) -> tuple[int, int]:
        scale, num_epochs = config.teacher_initial_scale, config.teacher_epochs
        return resized_shape(height, width, scale, epoch, num_epochs)

    smallest = shape_in(0)
    is_resized = smallest != (height, width)
    trained = with_precision(
        of_any_size(teacher.model, smallest) if is_resized else teacher.model, precision
    )
    copies = Copies(strategy)
    model = copies.of(trained)
    with copies.scope():
        optimizer = optimizers.sgd(
            model, config.teacher_learning_rate, num_steps, config.teacher_momentum
        )

    def step_on_device(
        pixels: tf.Tensor, labels: tf.Tensor, index: tf.Tensor, shape: tuple[int, int]
    ) -> Mapping[str, tf.Tensor]:
        pixels = tf.cast(replica_slice(pixels), tf.float32)
        inputs = teacher.description.normalize(pixels)
        inputs = augment(inputs, config.augmentation, (seed, index))
        return supervised_step(
            model,
            optimizer,
            resize(inputs, shape),
            replica_slice(labels),
            config.teacher_weight_decay,
        )

    train_step = tf.function(everywhere(step_on_device, strategy))

    order = Order(len(images), config.teacher_batch_size, seed)

    def step(index: int) -> Mapping[str, tf.Tensor]:
        chosen = order.batch(index)
        return train_step(
            tf.constant(images[chosen]),
            tf.constant(labels[chosen], tf.int32),
            tf.constant(index),
            shape_in(index // steps_per_epoch),
        )

    run_loop(
        "teacher",
        step,
        num_steps,
        {"model": model, "optimizer": optimizer},
        directory,
        strategy=strategy,
        show_progress=show_progress,
    )
    copies.write_back()
    teacher.model.set_weights(trained.get_weights())


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
