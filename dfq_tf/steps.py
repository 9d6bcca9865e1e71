"""One gradient step each: warm-up, generator, student.

Each takes the state and a (seed, step) pair, from which all its noise comes, changes
one kind of network and returns its measurements. On several replicas, each has its
share of the batch, and all return the same: what one device would.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dfq_tf import losses
from dfq_tf.bn_statistics import ObservedTeacher
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import DistillationConfig
from dfq_tf.optimizers import descend
from dfq_tf.replicas import replica_concat, replica_mean, replica_slice

Measurements = dict[str, tf.Tensor]

# Each kind of step draws noise of its own from the same (seed, step).
_WARM_UP, _GENERATOR, _STUDENT, SAMPLE = range(4)


@dataclasses.dataclass(frozen=True)
class State:
    """The networks and what trains them.

    Attributes:
      teacher: frozen.
      generators: each from noise to float32 pixels in [0, 255].
      generator_optimizers: one for each generator, built.
      students: none during the warm-up.
      student_optimizers: one for each student, built.
    """

    teacher: ObservedTeacher
    generators: Sequence[keras.Model]
    generator_optimizers: Sequence[Any]
    students: Sequence[Classifier] = ()
    student_optimizers: Sequence[Any] = ()


def sample_noise(
    config: DistillationConfig,
    seed_and_step: tf.Tensor,
    stream: int,
    num_batches: int = 1,
) -> tf.Tensor:
    """Standard normal noise, float32 (num_batches * batch_size, noise_dim).

    Args:
      config: gives the sizes.
      seed_and_step: int32 (2,).
      stream: which of the independent noises of that step.
      num_batches: how many batches of it.
    """
    seed = tf.random.fold_in(seed_and_step, stream)
    shape = (num_batches * config.batch_size, config.noise_dim)
    return tf.random.stateless_normal(shape, seed)


def draw_pixels(
    generators: Sequence[keras.Model],
    config: DistillationConfig,
    seed_and_step: tf.Tensor,
    stream: int,
) -> tf.Tensor:
    """One batch of images, of which each generator makes its share.

    BN layers use the statistics of the batch, as when the generators learnt to make
    these images.

    Args:
      generators: where the batch does not divide, the first ones make one more.
      config: gives the sizes.
      seed_and_step: int32 (2,).
      stream: see `sample_noise`.

    Returns:
      float32 (batch_size, height, width, channels) in [0, 255], without gradient; of
      several replicas, each has its share.
    """
    noise = sample_noise(config, seed_and_step, stream)
    share, rest = divmod(config.batch_size, len(generators))
    sizes = [share + (i < rest) for i in range(len(generators))]
    noises = tf.split(noise, sizes)
    images = [
        generator(part, training=True)
        for generator, part in zip(generators, map(replica_slice, noises))
    ]
    return tf.stop_gradient(tf.concat(images, axis=0))


def warm_up_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains each generator on the auxiliary loss alone, on noise of its own.

    Returns:
      The losses, each the mean over the generators.
    """
    measured = []
    for generator, optimizer, noise in _with_noise(
        state, config, seed_and_step, _WARM_UP
    ):
        with tf.GradientTape() as tape:
            pixels = generator(noise, training=True)
            _, loss, measurements = _auxiliary_loss(state, config, pixels)
        descend(tape, loss, generator, optimizer)
        measured.append({"auxiliary_loss": loss, **measurements})
    return _means(measured)


def generator_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> tuple[Measurements, tf.Tensor, tf.Tensor]:
    """Trains each generator to find images on which students and teacher differ.

    Its loss is alpha * auxiliary loss - distillation loss, the latter the mean over
    the students. They run with training=False: moving averages that they may have
    stay where they are.

    Returns:
      The losses, each the mean over the generators; the images of all generators, as
      they were before the step, uint8 (num_generators * batch_size, height, width,
      channels); and the teacher's logits for them, float32.
    """
    ramp = tf.constant(1.0)
    if config.adversarial_ramp_steps:
        done = tf.cast(seed_and_step[1] + 1, tf.float32)
        ramp = tf.minimum(done / config.adversarial_ramp_steps, 1.0)
    measured, images, answers = [], [], []
    for generator, optimizer, noise in _with_noise(
        state, config, seed_and_step, _GENERATOR
    ):
        with tf.GradientTape() as tape:
            pixels = generator(noise, training=True)
            logits, auxiliary, measurements = _auxiliary_loss(state, config, pixels)
            differences = [
                losses.distillation_loss(logits, _logits(student, pixels, False))
                for student in state.students
            ]
            distillation = tf.add_n(differences) / len(differences)
            loss = config.alpha * auxiliary - ramp * distillation
        descend(tape, loss, generator, optimizer)
        measured.append(
            {"generator_loss": loss, "auxiliary_loss": auxiliary, **measurements}
        )
        images.append(tf.cast(tf.round(replica_concat(pixels)), tf.uint8))
        answers.append(replica_concat(logits))
    return _means(measured), tf.concat(images, axis=0), tf.concat(answers, axis=0)


def student_step(
    state: State, config: DistillationConfig, seed_and_step: tf.Tensor
) -> Measurements:
    """Trains the students to answer as the teacher does, on fresh images."""
    pixels = draw_pixels(state.generators, config, seed_and_step, _STUDENT)
    return banked_step(state, config, pixels, state.teacher(pixels)[0])


def banked_step(
    state: State,
    config: DistillationConfig,
    images: tf.Tensor,
    teacher_logits: tf.Tensor,
) -> Measurements:
    """Trains the students on images whose answers are known.

    Args:
      state: its students are changed.
      config: temperature, weight decay.
      images: uint8 or float32 (batch, height, width, channels) in [0, 255].
      teacher_logits: float32 (batch, num_classes).

    Returns:
      As `distillation_step`, each the mean over the students.
    """
    return _means(
        [
            distillation_step(
                student,
                optimizer,
                images,
                teacher_logits,
                temperature=config.temperature,
                weight_decay=config.student_weight_decay,
            )
            for student, optimizer in zip(state.students, state.student_optimizers)
        ]
    )


def distillation_step(
    student: Classifier,
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
        student_logits = _logits(student, pixels, training=True)
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


def _means(measured: Sequence[Measurements]) -> Measurements:
    means = {
        key: tf.add_n([each[key] for each in measured]) / len(measured)
        for key in measured[0]
    }
    return replica_mean(means)
