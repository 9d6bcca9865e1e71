"""One gradient step each: warm-up, generator, student.

Each takes the state and a (seed, step) pair, from which all its noise comes, changes
one network and returns its measurements.
"""

import dataclasses
from typing import Any

from dfq_tf import losses
from dfq_tf.bn_statistics import ObservedTeacher
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import DistillationConfig

Measurements = dict[str, tf.Tensor]

# Each kind of step draws noise of its own from the same (seed, step).
_WARM_UP, _GENERATOR, _STUDENT, SAMPLE = range(4)


@dataclasses.dataclass(frozen=True)
class State:
    """The networks and what trains them.

    Attributes:
      teacher: frozen.
      generator: from noise to float32 pixels in [0, 255].
      generator_optimizer: built for the generator.
      student: None during the warm-up.
      student_optimizer: None during the warm-up.
    """

    teacher: ObservedTeacher
    generator: keras.Model
    generator_optimizer: Any
    student: Classifier | None = None
    student_optimizer: Any = None


def sample_noise(
    config: DistillationConfig, seed_and_step: tf.Tensor, stream: int
) -> tf.Tensor:
    """Standard normal noise, float32 (batch_size, noise_dim).

    Args:
      config: gives the shape.
      seed_and_step: int32 (2,).
      stream: which of the independent noises of that step.
    """
    seed = tf.random.fold_in(seed_and_step, stream)
    return tf.random.stateless_normal((config.batch_size, config.noise_dim), seed)


def warm_up_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains the generator on the auxiliary loss alone."""
    noise = sample_noise(config, seed_and_step, _WARM_UP)
    with tf.GradientTape() as tape:
        pixels = state.generator(noise, training=True)
        _, loss, measurements = _auxiliary_loss(state, config, pixels)
    _apply(tape, loss, state.generator, state.generator_optimizer)
    return {"auxiliary_loss": loss, **measurements}


def generator_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains the generator to find images on which student and teacher differ.

    Its loss is alpha * auxiliary loss - distillation loss. The student runs with
    training=False: moving averages that it may have stay where they are.
    """
    assert state.student is not None
    noise = sample_noise(config, seed_and_step, _GENERATOR)
    with tf.GradientTape() as tape:
        pixels = state.generator(noise, training=True)
        teacher_logits, auxiliary, measurements = _auxiliary_loss(state, config, pixels)
        student_logits = _logits(state.student, pixels, training=False)
        distillation = losses.distillation_loss(teacher_logits, student_logits)
        loss = config.alpha * auxiliary - distillation
    _apply(tape, loss, state.generator, state.generator_optimizer)
    return {"generator_loss": loss, "auxiliary_loss": auxiliary, **measurements}


def student_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains the student to answer as the teacher does, on fresh images."""
    noise = sample_noise(config, seed_and_step, _STUDENT)
    # The batch's own statistics, as when the generator learnt to make these images.
    pixels = tf.stop_gradient(state.generator(noise, training=True))
    assert state.student is not None
    return distillation_step(
        state.teacher, state.student, state.student_optimizer, pixels
    )


def distillation_step(
    teacher: ObservedTeacher, student: Classifier, optimizer: Any, pixels: tf.Tensor
) -> Measurements:
    """Trains a student to answer as the teacher does on some images.

    Args:
      teacher: frozen.
      student: gives logits.
      optimizer: built for the student.
      pixels: float32 (batch, height, width, channels) in [0, 255].

    Returns:
      'distillation_loss' in nats and 'agreement' in [0, 1], both before the step.
    """
    teacher_logits = tf.stop_gradient(teacher(pixels)[0])
    with tf.GradientTape() as tape:
        student_logits = _logits(student, pixels, training=True)
        loss = losses.distillation_loss(teacher_logits, student_logits)
    _apply(tape, loss, student.model, optimizer)
    same = tf.equal(tf.argmax(teacher_logits, -1), tf.argmax(student_logits, -1))
    agreement = tf.reduce_mean(tf.cast(same, tf.float32))
    return {"distillation_loss": loss, "agreement": agreement}


def _logits(student: Classifier, pixels: tf.Tensor, training: bool) -> tf.Tensor:
    return student.model(student.description.normalize(pixels), training=training)


def _auxiliary_loss(
    state: State, config: DistillationConfig, pixels: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, Measurements]:
    """The teacher's logits, L_aux, and its parts. The signs live here only."""
    logits, bn_inputs = state.teacher(pixels)
    bn_statistics = losses.bn_statistics_loss(
        bn_inputs, state.teacher.means, state.teacher.variances
    )
    instance = losses.instance_entropy(logits)
    batch = losses.batch_entropy(logits)
    loss = (
        config.bn_statistics_weight * bn_statistics
        + config.instance_entropy_weight * instance
        - config.batch_entropy_weight * batch
    )
    parts = {
        "bn_statistics_loss": bn_statistics,
        "instance_entropy": instance,
        "batch_entropy": batch,
    }
    return logits, loss, parts


def _apply(
    tape: tf.GradientTape, loss: tf.Tensor, model: keras.Model, optimizer: Any
) -> None:
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
