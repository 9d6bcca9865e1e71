"""The two phases of data-free training: warm-up, then generator against student."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dfq_tf import steps
from dfq_tf.bn_statistics import ObservedTeacher
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import DistillationConfig
from dfq_tf.loop import Evaluate, run_loop
from dfq_tf.models import build_generator
from dfq_tf.precision import with_precision


def make_generator(
    teacher: Classifier, config: DistillationConfig, seed: int, precision: str
) -> keras.Model:
    """A generator with random weights for the teacher's images.

    Args:
      teacher: gives the shape of the images.
      config: gives the noise's length.
      seed: decides the random weights.
      precision: see `resolve_precision`.
    """
    generator = build_generator(config.noise_dim, teacher.image_shape, seed=seed)
    return with_precision(generator, precision)


def warm_up(
    teacher: ObservedTeacher,
    generator: keras.Model,
    config: DistillationConfig,
    *,
    seed: int,
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> dict[str, float]:
    """Trains the generator alone, in place, on the auxiliary loss.

    Args:
      teacher: frozen.
      generator: from `make_generator`.
      config: steps, batch size, weights of the terms.
      seed: decides the noise.
      directory: for checkpoints and scalars; None keeps none.
      show_progress: whether to show a bar.

    Returns:
      The last measurements; empty if an earlier run had finished.

    Raises:
      TrainingError: a loss or a weight became infinite or NaN.
    """
    optimizer = _adam(generator, config.generator_learning_rate, config.warm_up_steps)
    state = steps.State(teacher, generator, optimizer)

    @compiled
    def step(seed_and_step: tf.Tensor) -> steps.Measurements:
        return steps.warm_up_step(state, config, seed_and_step)

    return run_loop(
        "warm_up",
        lambda index: step(tf.constant([seed, index])),
        config.warm_up_steps,
        {"generator": generator, "optimizer": optimizer},
        directory,
        show_progress=show_progress,
    )


def distill(
    teacher: ObservedTeacher,
    generator: keras.Model,
    student: Classifier,
    config: DistillationConfig,
    *,
    seed: int,
    directory: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    show_progress: bool = True,
) -> dict[str, float]:
    """Trains student and generator against each other, both in place.

    Each round takes `generator_steps`, then `student_steps`, all on fresh noise.

    Args:
      teacher: frozen.
      generator: warmed up.
      student: float or fake-quantized; gives logits.
      config: rounds, batch size, learning rates, weights of the terms.
      seed: decides the noise.
      directory: for checkpoints and scalars; None keeps none.
      evaluate: measures the student now and then, see `run_loop`; nothing is chosen
        by it.
      show_progress: whether to show a bar.

    Returns:
      The last measurements; empty if an earlier run had finished.

    Raises:
      TrainingError: a loss or a weight became infinite or NaN.
    """
    rounds = config.distillation_rounds
    generator_optimizer = _adam(
        generator, config.generator_learning_rate, rounds * config.generator_steps
    )
    optimizer = student_optimizer(student.model, config)
    state = steps.State(teacher, generator, generator_optimizer, student, optimizer)

    @compiled
    def generator_step(seed_and_step: tf.Tensor) -> steps.Measurements:
        return steps.generator_step(state, config, seed_and_step)

    @compiled
    def student_step(seed_and_step: tf.Tensor) -> steps.Measurements:
        return steps.student_step(state, config, seed_and_step)

    def one_round(index: int) -> steps.Measurements:
        measurements: steps.Measurements = {}
        for step, count in (
            (generator_step, config.generator_steps),
            (student_step, config.student_steps),
        ):
            for i in range(count):
                measurements |= step(tf.constant([seed, index * count + i]))
        return measurements

    return run_loop(
        "distillation",
        one_round,
        rounds,
        {
            "generator": generator,
            "generator_optimizer": generator_optimizer,
            "student": student.model,
            "student_optimizer": optimizer,
        },
        directory,
        evaluate=evaluate,
        evaluate_every=max(1, rounds // 10),
        show_progress=show_progress,
    )


def generate(
    generator: keras.Model, config: DistillationConfig, num_images: int, seed: int
) -> np.ndarray:
    """Draws images from a generator, without changing it.

    Args:
      generator: from noise to pixels.
      config: gives the batch size: BN layers use the statistics of the batch, as in
        training.
      num_images: how many images.
      seed: decides the noise.

    Returns:
      uint8 (num_images, height, width, channels): pixels as an app has them.
    """
    before = generator.get_weights()

    @tf.function(autograph=False)
    def batch(seed_and_step: tf.Tensor) -> tf.Tensor:
        noise = steps.sample_noise(config, seed_and_step, steps.SAMPLE)
        pixels = generator(noise, training=True)
        return tf.cast(tf.round(pixels), tf.uint8)

    num_batches = -(-num_images // config.batch_size)
    images = [batch(tf.constant([seed, i])).numpy() for i in range(num_batches)]
    generator.set_weights(before)  # training=True moved the moving averages
    return np.concatenate(images)[:num_images]


def compiled(step: Callable[..., Any]) -> Any:
    """Compiles a step; by XLA where there is a GPU, as it halves the speed of CPUs."""
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    return tf.function(step, jit_compile=has_gpu or None, autograph=False)


def _cosine(learning_rate: float, num_steps: int) -> Any:
    return keras.optimizers.schedules.CosineDecay(learning_rate, max(1, num_steps))


def student_optimizer(model: keras.Model, config: DistillationConfig) -> Any:
    """The student's optimizer, built, with a cosine decay over all student steps."""
    num_steps = config.distillation_rounds * config.student_steps
    if config.student_optimizer == "adam":
        return _adam(model, config.student_learning_rate, num_steps)
    optimizer = keras.optimizers.SGD(
        _cosine(config.student_learning_rate, num_steps),
        momentum=config.student_momentum,
        nesterov=True,
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def _adam(model: keras.Model, learning_rate: float, num_steps: int) -> Any:
    optimizer = keras.optimizers.Adam(_cosine(learning_rate, num_steps))
    optimizer.build(model.trainable_variables)
    return optimizer
