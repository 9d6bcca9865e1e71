"""Data-dependent twins of the data-free methods: what real images would have given.

Q, QAT and QAT-KD of the paper's tables, and REC, reconstruction. They share the
network, its ranges and its optimizer with DF-Q, DF-QAT-KD and DF-REC; only the images
differ. Nothing data-free imports this module.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.context import Context
from dfq_tf.distillation import observe, phases, steps
from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier
from dfq_tf.quantization import (
    Calibrated,
    QuantizedNetwork,
    float_network,
    reconstruct,
    student,
    without_margins,
)
from dfq_tf.settings import (
    CalibrationConfig,
    DistillationConfig,
    ReconstructionConfig,
)
from dfq_tf.training import Learner, augment_pixels, run_loop
from dfq_tf.with_data.supervised import Order, supervised_step


def calibrated_with_data(
    teacher: Classifier,
    images: np.ndarray,
    config: CalibrationConfig = CalibrationConfig(),
) -> Calibrated:
    """Makes Q of any widths: ranges from real images, nothing trained.

    Args:
      teacher: the trained classifier.
      images: real images, uint8 (n, height, width, channels); the first of them are
        used, as many as `config.image_count` says.
      config: how ranges are found; without margins, which stand for what generated
        images lack.
    """
    config = without_margins(config)
    images = images[: config.image_count(teacher.image_shape)]
    return Calibrated(float_network(teacher, config), images, config)


def reconstruct_with_data(
    network: QuantizedNetwork,
    calibrated: Calibrated,
    config: ReconstructionConfig,
    context: Context[DistillationConfig],
) -> QuantizedNetwork:
    """REC: a network whose blocks have learnt on real images, on one device.

    Args:
      network: of `calibrated`; it is not changed.
      calibrated: from `calibrated_with_data`; blocks learn on its images.
      config: of the reconstruction.
      context: of the run. It has no strategy.

    Raises:
      TrainingError: an error is not finite.
    """
    exact, images = calibrated.network, calibrated.images
    run = functools.partial(run_loop, context=context)
    made = reconstruct(network, exact, images, config, context.seed, run, "rec")
    return made.network


def train_with_data(
    teacher: Classifier,
    network: QuantizedNetwork,
    images: np.ndarray,
    labels: np.ndarray | None,
    context: Context[DistillationConfig],
    *,
    augmentation: str,
    evaluate: Callable[[Learner], Mapping[str, float]] | None = None,
) -> tuple[QuantizedNetwork, dict[str, float]]:
    """QAT-KD or QAT: real images, and the student steps of DF-QAT-KD, on one device.

    Args:
      teacher: what the student answers like.
      network: from `calibrated_with_data`; it is not changed.
      images: the training images, uint8 (n, height, width, channels).
      labels: integer (n,), for QAT, the cross-entropy with them; None for QAT-KD,
        the distillation loss.
      context: its settings have the rounds, student steps per round, batch size and
        student's optimizer; its seed decides the order of the images. It has no
        strategy.
      augmentation: see `augmentation.augment`.
      evaluate: measures the student now and then, see `loop.run_loop`.

    Returns:
      The trained network, and the last measurements.

    Raises:
      ConfigError: a batch is larger than the training set.
      TrainingError: a loss or a weight became infinite or NaN.
    """
    config = context.settings
    batch_size = phases.student_batch(context)
    _check_is_enough(images, batch_size)
    learner = Learner(student.build(network, config.trains_ranges), network.description)
    optimizer = phases.student_optimizer(learner.model, config)
    train_step = _compiled_step(teacher, learner, optimizer, context, augmentation)
    order = Order(len(images), batch_size, context.seed)

    def step(index: int) -> Mapping[str, tf.Tensor]:
        chosen = order.batch(index)
        return train_step(
            tf.constant(images[chosen]),
            None if labels is None else tf.constant(labels[chosen], tf.int32),
            tf.constant(index),
        )

    num_steps = config.rounds * config.student_steps
    measurements = run_loop(
        "qat_kd" if labels is None else "qat",
        step,
        num_steps,
        {"student": learner.model, "student_optimizer": optimizer},
        context,
        identity={"rounds": str(config.rounds)},  # its learning rates hang on them
        evaluate=None if evaluate is None else lambda: evaluate(learner),
        evaluate_every=max(1, num_steps // 10),
    )
    return student.trained(network, learner.model), measurements


def _check_is_enough(images: np.ndarray, batch_size: int) -> None:
    if len(images) < batch_size:
        raise ConfigError(
            f"batch_size is {batch_size}, but there are only {len(images)} "
            "training images"
        )


def _compiled_step(
    teacher: Classifier,
    learner: Learner,
    optimizer: Any,
    context: Context[DistillationConfig],
    augmentation: str,
) -> Any:
    """(pixels, labels or None, index of the step) -> measurements."""
    config, seed = context.settings, context.seed
    observed = observe(teacher, context.precision)

    def train_step(
        pixels: tf.Tensor, labels: tf.Tensor | None, index: tf.Tensor
    ) -> Mapping[str, tf.Tensor]:
        mean = teacher.description.input_mean
        pixels = augment_pixels(pixels, mean, augmentation, (seed, index))
        if labels is None:
            return steps.distillation_step(
                learner,
                optimizer,
                pixels,
                observed(pixels)[0],
                temperature=config.temperature,
                weight_decay=config.student_weight_decay,
            )
        inputs = learner.description.normalize(pixels)
        return supervised_step(
            learner.model, optimizer, inputs, labels, config.student_weight_decay
        )

    return phases.compiled(train_step)
