"""One gradient step each: warm-up, generator, student.

Each takes the state and a (seed, step) pair, from which all its noise comes, changes
one kind of network and returns its measurements. On several replicas, each has its
share of the batch, and all return the same: what one device would.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import losses
from dfq_tf.distillation.generator import (
    AUGMENTATION,
    GENERATOR,
    STUDENT,
    WARM_UP,
    draw_parts,
    sample_noise,
)
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.settings import BudgetConfig, DistillationConfig
from dfq_tf.training import (
    Learner,
    augment_pixels,
    descend,
    replica_concat,
    replica_mean,
    replica_slice,
)

Measurements = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class State:
    """The networks and what trains them.

    Attributes:
      teacher: frozen.
      generators: each from noise to float32 pixels in [0, 255].
      generator_optimizers: one for each generator, built.
      students: none during the warm-up.
      student_optimizers: one for each student, built.
      rounds: scalar int64 variable, if learning rates hang on it: they are 0 after so
        many.
    """

    teacher: ObservedTeacher
    generators: Sequence[keras.Model]
    generator_optimizers: Sequence[Any]
    students: Sequence[Learner] = ()
    student_optimizers: Sequence[Any] = ()
    rounds: tf.Variable | None = None


class GeneratorStep(NamedTuple):
    """What a step of the generators gives.

    Attributes:
      measurements: the losses, each the mean over the generators.
      images: of all generators, as they were before the step, uint8
        (num_generators * batch_size, height, width, channels).
      teacher_logits: the teacher's answers to them, float32 (..., num_classes).
    """

    measurements: Measurements
    images: tf.Tensor
    teacher_logits: tf.Tensor


def warm_up_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> GeneratorStep:
    """Trains each generator on the auxiliary loss alone, on noise of its own."""

    def loss(
        pixels: tf.Tensor, logits: tf.Tensor, auxiliary: tf.Tensor
    ) -> tuple[tf.Tensor, Measurements]:
        return auxiliary, {}

    return _descend_generators(state, config, seed_and_step, WARM_UP, loss)


def generator_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> GeneratorStep:
    """Trains each generator to find images on which students and teacher differ.

    Its loss is alpha * auxiliary loss - distillation loss, the latter the mean over
    the students. They run with training=False: moving averages that they may have
    stay where they are.
    """
    ramp = tf.constant(1.0)
    if config.adversarial_ramp_steps:
        done = tf.cast(seed_and_step[1] + 1, tf.float32)
        ramp = tf.minimum(done / config.adversarial_ramp_steps, 1.0)

    def loss(
        pixels: tf.Tensor, logits: tf.Tensor, auxiliary: tf.Tensor
    ) -> tuple[tf.Tensor, Measurements]:
        differences = [
            losses.distillation_loss(logits, student.logits(pixels, False))
            for student in state.students
        ]
        distillation = tf.add_n(differences) / len(differences)
        value = config.alpha * auxiliary - ramp * distillation
        return value, {"generator_loss": value}

    return _descend_generators(state, config, seed_and_step, GENERATOR, loss)


def _descend_generators(
    state: State,
    config: DistillationConfig,
    seed_and_step: tf.Tensor,
    stream: int,
    loss: Callable[..., tuple[tf.Tensor, Measurements]],
) -> GeneratorStep:
    """One step of each generator on `loss` of its pixels, logits and auxiliary loss."""
    measured, images, answers = [], [], []
    for generator, optimizer, noise in _with_noise(
        state, config, seed_and_step, stream
    ):
        with tf.GradientTape() as tape:
            pixels = generator(noise, training=True)
            logits, auxiliary, parts = _auxiliary_loss(state, config, pixels)
            value, more = loss(pixels, logits, auxiliary)
        descend(tape, value, generator, optimizer)
        measured.append({**more, "auxiliary_loss": auxiliary, **parts})
        images.append(tf.cast(tf.round(replica_concat(pixels)), tf.uint8))
        answers.append(replica_concat(logits))
    return GeneratorStep(
        _means(measured), tf.concat(images, axis=0), tf.concat(answers, axis=0)
    )


def student_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains the students to answer as the teacher does, on fresh images."""
    parts = draw_parts(state.generators, config, seed_and_step, STUDENT)
    # Of several replicas, each has a share of each part: part by part, an image has
    # the random numbers that it has on one device.
    changed = [
        _augmented(state, config, part, tf.random.fold_in(seed_and_step, i))
        for i, part in enumerate(parts)
    ]
    pixels = tf.concat(changed, axis=0)
    logits, _ = state.teacher(pixels)
    return descend_students(
        state.students, state.student_optimizers, config, pixels, logits
    )


def answered_step(
    state: State,
    config: DistillationConfig,
    images: tf.Tensor,
    teacher_logits: tf.Tensor,
    seed_and_step: tf.Tensor,
) -> Measurements:
    """Trains the students on images whose answers are known.

    With `student_augmentation`, the images are changed at random, and the answers
    stay: the teacher would say much the same, and is not asked again.

    Args:
      state: its students are changed.
      config: augmentation, temperature, weight decay.
      images: uint8 (batch, height, width, channels).
      teacher_logits: float32 (batch, num_classes).
      seed_and_step: decides the augmentation.

    Returns:
      As `distillation_step`, each the mean over the students.
    """
    pixels = _augmented(state, config, images, seed_and_step)
    return descend_students(
        state.students, state.student_optimizers, config, pixels, teacher_logits
    )


def _augmented(
    state: State,
    config: DistillationConfig,
    images: tf.Tensor,
    seed_and_step: tf.Tensor,
) -> tf.Tensor:
    """The pixels that students see: changed at random, if the settings say so."""
    seed = tf.random.fold_in(seed_and_step, AUGMENTATION)
    mean = state.teacher.description.input_mean
    return augment_pixels(images, mean, config.student_augmentation, seed)


def descend_students(
    students: Sequence[Learner],
    student_optimizers: Sequence[Any],
    config: DistillationConfig | BudgetConfig,
    pixels: tf.Tensor,
    teacher_logits: tf.Tensor,
) -> Measurements:
    """Trains each student on the same images.

    Args:
      students: are changed.
      student_optimizers: one for each.
      config: temperature, weight decay.
      pixels: float32 (batch, height, width, channels).
      teacher_logits: float32 (batch, num_classes).

    Returns:
      As `distillation_step`, each the mean over the students.
    """
    return _means(
        [
            distillation_step(
                student,
                optimizer,
                pixels,
                teacher_logits,
                temperature=config.temperature,
                weight_decay=config.student_weight_decay,
            )
            for student, optimizer in zip(students, student_optimizers)
        ]
    )


def distillation_step(
    student: Learner,
    optimizer: Any,
    images: tf.Tensor,
    teacher_logits: tf.Tensor,
    *,
    temperature: float = 1.0,
    weight_decay: float = 0.0,
) -> Measurements:
    """Trains a student to answer as the teacher does on some images.

    Args:
      student: gives logits.
      optimizer: built for the student.
      images: uint8 or float32 (batch, height, width, channels) in [0, 255].
      teacher_logits: float32 (batch, num_classes).
      temperature: see `losses.distillation_loss`.
      weight_decay: see `optimizers.descend`.

    Returns:
      'distillation_loss' and 'agreement' in [0, 1], both before the step.
    """
    pixels = tf.cast(images, tf.float32)
    teacher_logits = tf.stop_gradient(teacher_logits)
    with tf.GradientTape() as tape:
        student_logits = student.logits(pixels, training=True)
        loss = losses.distillation_loss(teacher_logits, student_logits, temperature)
    descend(tape, loss, student.model, optimizer, weight_decay)
    same = tf.equal(tf.argmax(teacher_logits, -1), tf.argmax(student_logits, -1))
    agreement = tf.reduce_mean(tf.cast(same, tf.float32))
    return {"distillation_loss": loss, "agreement": agreement}


def _with_noise(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor, stream: int
) -> Iterator[tuple[keras.Model, Any, tf.Tensor]]:
    """Each generator, its optimizer, and a batch of noise of its own."""
    count = len(state.generators)
    noise = sample_noise(config, seed_and_step, stream, count)
    noises = map(replica_slice, tf.split(noise, count))
    return zip(state.generators, state.generator_optimizers, noises)


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


def _means(measured: Sequence[Measurements]) -> Measurements:
    means = {
        key: tf.add_n([each[key] for each in measured]) / len(measured)
        for key in measured[0]
    }
    return replica_mean(means)
