"""The two phases of data-free training: warm-up, then generators against students."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import steps
from dfq_tf.distillation.bank import ImageBank
from dfq_tf.distillation.generator import build_generator
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.graph.classifier import Classifier
from dfq_tf.settings import DistillationConfig
from dfq_tf.training import memory, optimizers
from dfq_tf.training.copies import with_precision
from dfq_tf.training.devices import Copies, check_batch, everywhere, names_lost_workers
from dfq_tf.training.loop import Evaluate, run_loop
from dfq_tf.training.replicas import replica_slice


def make_generators(
    teacher: Classifier, config: DistillationConfig, seed: int, precision: str
) -> list[keras.Model]:
    """Generators with random weights, each its own, for the teacher's images.

    Args:
      teacher: gives the shape of the images.
      config: gives their number and the noise's length.
      seed: decides the random weights.
      precision: see `resolve_precision`.
    """
    # Large odd strides, so that runs of neighbouring seeds share no generator.
    return [
        with_precision(
            build_generator(
                config.noise_dim, teacher.image_shape, seed=seed + 1_000_003 * i
            ),
            precision,
        )
        for i in range(config.num_generators)
    ]


@names_lost_workers
def warm_up(
    teacher: ObservedTeacher,
    generators: Sequence[keras.Model],
    config: DistillationConfig,
    *,
    seed: int,
    bank: ImageBank | None = None,
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> dict[str, float]:
    """Trains the generators alone, in place, on the auxiliary loss.

    Args:
      teacher: frozen.
      generators: from `make_generators`.
      config: steps, batch size, weights of the terms.
      seed: decides the noise.
      bank: takes the images of all steps, with the teacher's answers.
      strategy: the devices, see `distribution.make_strategy`; None for one.
      directory: for checkpoints and scalars; None keeps none.
      show_progress: whether to show a bar.

    Returns:
      The last measurements; empty if an earlier run had finished.

    Raises:
      ConfigError: the batch does not divide between the devices.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
    """
    check_batch(strategy, config.batch_size, config.num_generators)
    copies = Copies(strategy)
    teacher = _frozen_copy(teacher, strategy)
    generators = [copies.of(generator) for generator in generators]
    with copies.scope():
        adams = [
            optimizers.adam(g, config.generator_learning_rate, config.warm_up_steps)
            for g in generators
        ]
    state = steps.State(teacher, generators, adams)

    @functools.partial(compiled, strategy=strategy)
    def step(seed_and_step: tf.Tensor) -> steps.GeneratorStep:
        return steps.warm_up_step(state, config, seed_and_step)

    def one_step(index: int) -> steps.Measurements:
        made = step(tf.constant([seed, index]))
        if bank is not None:
            bank.add(made.images.numpy(), made.teacher_logits.numpy())
        return made.measurements

    trackables = _numbered(generator=generators, optimizer=adams)
    measurements = run_loop(
        "warm_up",
        one_step,
        config.warm_up_steps,
        trackables if bank is None else {**trackables, "bank": bank},
        directory,
        strategy=strategy,
        show_progress=show_progress,
    )
    copies.write_back()
    return measurements


@names_lost_workers
def distill(
    teacher: ObservedTeacher,
    generators: Sequence[keras.Model],
    students: Sequence[Classifier],
    config: DistillationConfig,
    *,
    seed: int,
    bank: ImageBank | None = None,
    strategy: tf.distribute.Strategy | None = None,
    name: str = "distillation",
    directory: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    show_progress: bool = True,
) -> dict[str, float]:
    """Trains students and generators against each other, all in place.

    Each round takes `generator_steps`, all on fresh noise, then `student_steps`: on
    fresh noise too; or, with `bank_images`, on images of past generator steps; or,
    with `share_images`, on those of the round's generator steps, in turn.

    Args:
      teacher: frozen.
      generators: warmed up.
      students: float or fake-quantized; they give logits.
      config: rounds, batch size, learning rates, weights of the terms.
      seed: decides the noise.
      bank: what the warm-up filled; by default a new one, if the settings want one.
      strategy: the devices, see `distribution.make_strategy`; None for one.
      name: of the phase, see `run_loop`.
      directory: for checkpoints and scalars; None keeps none.
      evaluate: measures the students now and then, see `run_loop`; nothing is chosen
        by it.
      show_progress: whether to show a bar.

    Returns:
      The last measurements; empty if an earlier run had finished.

    Raises:
      ConfigError: the batch does not divide between the devices.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
    """
    check_batch(strategy, config.batch_size, config.num_generators)
    rounds = config.rounds
    num_steps = rounds * config.generator_steps
    copies = Copies(strategy)
    teacher = _frozen_copy(teacher, strategy)
    generators = [copies.of(generator) for generator in generators]
    students = [dataclasses.replace(s, model=copies.of(s.model)) for s in students]
    with copies.scope():
        adams = [
            optimizers.adam(g, config.generator_learning_rate, num_steps)
            for g in generators
        ]
        student_optimizers = [student_optimizer(s.model, config) for s in students]
    state = steps.State(teacher, generators, adams, students, student_optimizers)
    if bank is None:
        bank = make_bank(students[0], config, seed)

    on_devices = functools.partial(compiled, strategy=strategy)

    @on_devices
    def generator_step(seed_and_step: tf.Tensor) -> steps.GeneratorStep:
        return steps.generator_step(state, config, seed_and_step)

    @on_devices
    def student_step(seed_and_step: tf.Tensor) -> steps.Measurements:
        return steps.student_step(state, config, seed_and_step)

    @on_devices
    def answered_step(
        images: tf.Tensor, logits: tf.Tensor, seed_and_step: tf.Tensor
    ) -> steps.Measurements:
        images, logits = replica_slice(images), replica_slice(logits)
        return steps.answered_step(state, config, images, logits, seed_and_step)

    def one_round(index: int) -> steps.Measurements:
        measurements: steps.Measurements = {}
        made: list[steps.GeneratorStep] = []
        first = index * config.generator_steps
        for i in range(first, first + config.generator_steps):
            made.append(generator_step(tf.constant([seed, i])))
            measurements |= made[-1].measurements
            if bank is not None:
                bank.add(made[-1].images.numpy(), made[-1].teacher_logits.numpy())
        first = index * config.student_steps
        for i in range(first, first + config.student_steps):
            seed_and_step = tf.constant([seed, i])
            if bank is not None:
                images, logits = map(tf.constant, bank.draw(config.batch_size, i))
            elif config.share_images:
                images, logits = _shared(made, i - first, config.batch_size)
            else:
                measurements |= student_step(seed_and_step)
                continue
            measurements |= answered_step(images, logits, seed_and_step)
        return measurements

    trackables = _numbered(
        generator=generators,
        generator_optimizer=adams,
        student=[student.model for student in students],
        student_optimizer=student_optimizers,
    )
    measurements = run_loop(
        name,
        one_round,
        rounds,
        trackables if bank is None else {**trackables, "bank": bank},
        directory,
        strategy=strategy,
        evaluate=copies.up_to_date(evaluate),
        evaluate_every=max(1, rounds // 10),
        show_progress=show_progress,
    )
    copies.write_back()
    return measurements


def make_bank(
    network: Classifier, config: DistillationConfig, seed: int
) -> ImageBank | None:
    """An empty bank for a network's images and classes; None if none is wanted.

    Args:
      network: teacher or student.
      config: says how many images it holds, if they fit into memory.BANK_MEMORY.
      seed: decides what is drawn.
    """
    if not config.bank_images:
        return None
    shape, classes = network.image_shape, network.num_classes
    most = memory.BANK_MEMORY // (math.prod(shape) + memory.FLOAT * classes)
    return ImageBank(min(config.bank_images, most), shape, classes, seed)


def _shared(
    made: Sequence[steps.GeneratorStep], index: int, batch_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """One batch of what generator steps have made, images of all generators in it."""
    each = made[index % len(made)]
    stride = len(each.images) // batch_size
    start = index // len(made) % stride
    return each.images[start::stride], each.teacher_logits[start::stride]


def generate(
    generators: Sequence[keras.Model],
    config: DistillationConfig,
    num_images: int,
    seed: int,
) -> np.ndarray:
    """Draws images from generators, without changing them.

    Args:
      generators: from noise to pixels; each makes its share of a batch.
      config: gives the batch size: BN layers use the statistics of the batch, as in
        training.
      num_images: how many images.
      seed: decides the noise.

    Returns:
      uint8 (num_images, height, width, channels): pixels as an app has them.
    """
    before = [generator.get_weights() for generator in generators]

    @tf.function(autograph=False)
    def batch(seed_and_step: tf.Tensor) -> tf.Tensor:
        pixels = steps.draw_pixels(generators, config, seed_and_step, steps.SAMPLE)
        return tf.cast(tf.round(pixels), tf.uint8)

    # One array from the start: large images are not there twice.
    images = np.empty((num_images, *generators[0].output_shape[1:]), np.uint8)
    for i, start in enumerate(range(0, num_images, config.batch_size)):
        part = images[start : start + config.batch_size]
        part[:] = batch(tf.constant([seed, i]))[: len(part)]
    for generator, weights in zip(generators, before):
        generator.set_weights(weights)  # training=True moved the moving averages
    return images


def compiled(
    step: Callable[..., Any], strategy: tf.distribute.Strategy | None = None
) -> Any:
    """Compiles a step, to run on all devices of a strategy; None for one device.

    One device is compiled for by XLA if it is a GPU: it halves the speed of CPUs.
    """
    on_all = everywhere(step, strategy)
    use_xla = on_all is step and bool(tf.config.list_physical_devices("GPU"))
    return tf.function(on_all, jit_compile=use_xla or None, autograph=False)


def student_optimizer(model: keras.Model, config: DistillationConfig) -> Any:
    """The student's optimizer, built, with a cosine decay over all student steps."""
    num_steps = config.rounds * config.student_steps
    if config.student_optimizer == "adam":
        return optimizers.adam(model, config.student_learning_rate, num_steps)
    return optimizers.sgd(
        model, config.student_learning_rate, num_steps, config.student_momentum
    )


def _frozen_copy(
    teacher: ObservedTeacher, strategy: tf.distribute.Strategy | None
) -> ObservedTeacher:
    """The teacher on all devices; nothing is ever written back to the given one."""
    return dataclasses.replace(teacher, model=Copies(strategy).of(teacher.model))


def _numbered(**groups: Sequence[Any]) -> dict[str, Any]:
    """Names for what a checkpoint keeps: generator, generator_1, generator_2, ..."""
    return {
        f"{name}_{i}" if i else name: each
        for name, group in groups.items()
        for i, each in enumerate(group)
    }
