"""Data-dependent twins of the data-free methods: what real images would have given.

Q, QAT and QAT-KD of the paper's tables. They share the student, its ranges and its
optimizer with DF-Q and DF-QAT-KD; only the images differ. Nothing data-free imports
this module.
"""

import os
from collections.abc import Mapping

import numpy as np

from dfq_tf import api
from dfq_tf.compat import tf
from dfq_tf.distillation import phases, steps
from dfq_tf.distillation.teacher import observe
from dfq_tf.errors import ConfigError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.quantization.integers import round_biases
from dfq_tf.settings import BitWidths, CalibrationConfig, DistillationConfig
from dfq_tf.training import memory
from dfq_tf.training.augmentation import augment_pixels
from dfq_tf.training.loop import Evaluate, run_loop
from dfq_tf.with_data.supervised import Order, supervised_step


def quantize_with_data(
    teacher: Classifier,
    images: np.ndarray,
    widths: BitWidths = BitWidths(),
    config: CalibrationConfig = CalibrationConfig(),
) -> Classifier:
    """Q: ranges from real images, nothing trained.

    Args:
      teacher: the trained classifier.
      images: real images, uint8 (n, height, width, channels); the first
        `config.calibration_images` of them are used.
      widths: bits of weights and activations.
      config: how ranges are found.

    Returns:
      The fake-quantized student.
    """
    graph, description = api.float_network(teacher, config)
    images = images[: config.calibration_images]
    return api.post_training_student(graph, description, images, widths, config)


def train_with_data(
    teacher: Classifier,
    student: Classifier,
    images: np.ndarray,
    labels: np.ndarray | None,
    config: DistillationConfig,
    *,
    augmentation: str,
    seed: int,
    precision: str = "auto",
    directory: str | os.PathLike[str] | None = None,
    evaluate: Evaluate | None = None,
    show_progress: bool = True,
) -> dict[str, float]:
    """QAT-KD or QAT: trains a student in place on real images.

    It takes as many student steps as DF-QAT-KD, of the same size, with the same
    optimizer.

    Args:
      teacher: what the student answers like.
      student: from `quantize_with_data`.
      images: the training images, uint8 (n, height, width, channels).
      labels: integer (n,), for QAT, the cross-entropy with them; None for QAT-KD,
        the distillation loss.
      config: rounds, student steps per round, batch size, student's optimizer.
      augmentation: see `augmentation.augment`.
      seed: decides the order of the images.
      precision: of the teacher.
      directory: for checkpoints and scalars; None keeps none.
      evaluate: measures the student now and then, see `loop.run_loop`.
      show_progress: whether to show a bar.

    Returns:
      The last measurements.

    Raises:
      ConfigError: a batch is larger than the training set.
      TrainingError: a loss or a weight became infinite or NaN.
    """
    config = memory.with_batch_size(config, teacher.model)
    if len(images) < config.batch_size:
        raise ConfigError(
            f"batch_size is {config.batch_size}, but there are only {len(images)} "
            "training images"
        )
    observed = observe(teacher, precision)
    optimizer = phases.student_optimizer(student.model, config)
    order = Order(len(images), config.batch_size, seed)

    @phases.compiled
    def train_step(
        pixels: tf.Tensor, labels: tf.Tensor | None, index: tf.Tensor
    ) -> Mapping[str, tf.Tensor]:
        mean = teacher.description.input_mean
        pixels = augment_pixels(pixels, mean, augmentation, (seed, index))
        if labels is None:
            logits = observed(pixels)[0]
            return steps.distillation_step(
                student,
                optimizer,
                pixels,
                logits,
                temperature=config.temperature,
                weight_decay=config.student_weight_decay,
            )
        inputs = student.description.normalize(pixels)
        return supervised_step(
            student.model, optimizer, inputs, labels, config.student_weight_decay
        )

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
        {"student": student.model, "student_optimizer": optimizer},
        directory,
        evaluate=evaluate,
        evaluate_every=max(1, num_steps // 10),
        show_progress=show_progress,
    )
    round_biases(student.model)
    return measurements
