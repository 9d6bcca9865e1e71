"""The whole path: a trained classifier in, an integer TFLite model out, no data."""

import dataclasses
import os

import numpy as np

from dfq_tf import bn_statistics, equalization, export, training
from dfq_tf.bias_correction import correct_biases
from dfq_tf.calibration import calibrate
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras
from dfq_tf.config import (
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    RunConfig,
    check_method,
)
from dfq_tf.description import ModelDescription
from dfq_tf.graph import Graph
from dfq_tf.loop import Evaluate
from dfq_tf.precision import with_precision
from dfq_tf.quantization import apply
from dfq_tf.quantization.integers import round_biases


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What comes out.

    Attributes:
      student: the fake-quantized model, a Keras model that can be trained further.
      tflite: the content of the `.tflite` file: uint8 pixels in, int8 logits out.
      generator: makes images that the teacher takes for its training data.
      measurements: the last losses of the training; empty for DF-Q, and for a run
        that had finished before.
    """

    student: Classifier
    tflite: bytes
    generator: keras.Model
    measurements: dict[str, float]


def quantize(
    teacher: Classifier,
    *,
    method: str = "df_qat_kd",
    config: DistillationConfig = DistillationConfig(),
    calibration: CalibrationConfig = CalibrationConfig(),
    widths: BitWidths = BitWidths(),
    seed: int = 0,
    precision: str = "auto",
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Quantized:
    """Quantizes a classifier to an integer TFLite model, using no data.

    A generator is warmed up on what the teacher knows of its training data; its
    images give the activation ranges (DF-Q). For DF-QAT-KD, student and generator
    are then trained against each other (Choi et al. 2020).

    Args:
      teacher: the trained classifier; it is not changed.
      method: 'df_q', nothing trained but the generator, or 'df_qat_kd'.
      config: steps, batch size, learning rates, weights of the losses.
      calibration: how ranges are found, and what helps them.
      widths: bits of weights and activations.
      seed: decides all random numbers.
      precision: 'auto', 'float32' or 'bfloat16', of teacher and generator.
      directory: keeps checkpoints: the same call there continues where it was
        interrupted. None keeps nothing.
      show_progress: whether to show a bar for each stage.

    Raises:
      ConfigError: a setting is out of its limits.
      UnsupportedLayerError: a layer has no integer form; it is named.
      TrainingError: a loss or a weight became infinite or NaN.
      ExportError: the converter gave a file that is not integer-only.
    """
    student, generator, measurements = make_student(
        teacher,
        method=method,
        config=config,
        calibration=calibration,
        widths=widths,
        seed=seed,
        precision=precision,
        directory=directory,
        show_progress=show_progress,
    )
    return Quantized(student, export.convert(student), generator, measurements)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all students of one teacher start from.

    Attributes:
      teacher: frozen, with its BN statistics.
      graph: the float network, rewritten for integers.
      description: how that network is fed.
      generator: warmed up.
      images: calibration images drawn from it, uint8.
    """

    teacher: bn_statistics.ObservedTeacher
    graph: Graph
    description: ModelDescription
    generator: keras.Model
    images: np.ndarray


def prepare(
    teacher: Classifier,
    *,
    config: DistillationConfig,
    calibration: CalibrationConfig,
    seed: int,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
) -> Prepared:
    """Everything that does not depend on bit widths: rewriting and warm-up.

    Args:
      teacher: as in `quantize`, like the other arguments.
      config: settings of the training.
      calibration: says how many images are drawn, and whether layers are balanced.
      seed: decides all random numbers.
      precision: of teacher and generator.
      directory: for the warm-up's checkpoints, or None.
      show_progress: whether to show a bar.
    """
    RunConfig(seed=seed, precision=precision)
    graph, description = float_network(teacher, calibration)
    observed = bn_statistics.observe(teacher, precision)
    generator = training.make_generator(teacher, config, seed, precision)
    training.warm_up(
        observed,
        generator,
        config,
        seed=seed,
        directory=directory,
        show_progress=show_progress,
    )
    count = calibration.calibration_images
    images = training.generate(generator, config, count, seed)
    return Prepared(observed, graph, description, generator, images)


def float_network(
    teacher: Classifier, calibration: CalibrationConfig
) -> tuple[Graph, ModelDescription]:
    """The float network that a student is the quantized twin of, and how it is fed.

    Args:
      teacher: the trained classifier.
      calibration: says whether neighbouring layers are balanced.

    Raises:
      UnsupportedLayerError: a layer has no integer form; it is named.
    """
    graph, description = apply.integer_ready(teacher)
    if calibration.equalize:
        graph = equalization.equalize(graph)
    return graph, description


def post_training_student(
    graph: Graph,
    description: ModelDescription,
    images: np.ndarray,
    widths: BitWidths,
    config: CalibrationConfig,
) -> Classifier:
    """A student with ranges from images, nothing trained.

    Args:
      graph: from `float_network`.
      description: from `float_network`.
      images: uint8 (n, height, width, channels); generated ones give DF-Q, real ones
        the data-dependent yardstick Q.
      widths: bits of weights and activations.
      config: how ranges are found, and whether biases are corrected.
    """
    ranges = calibrate(graph, description, images, widths, config)
    student = apply.quantize_graph(
        graph, description, widths, ranges, config.weight_range
    )
    if config.bias_correction:
        correct_biases(graph, description, student, images)
    round_biases(student.model)
    return student


def distilled_student(
    prepared: Prepared,
    student: Classifier,
    *,
    config: DistillationConfig,
    seed: int,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
    evaluate: Evaluate | None = None,
) -> tuple[keras.Model, dict[str, float]]:
    """Trains a student in place, against a copy of the warmed-up generator.

    Args:
      prepared: from `prepare`.
      student: from `post_training_student`.
      config: settings of the training.
      seed: decides all random numbers.
      precision: of the generator.
      directory: for checkpoints, or None.
      show_progress: whether to show a bar.
      evaluate: measures the student now and then, see `loop.run_loop`.

    Returns:
      The generator as it is after that, and the last measurements.
    """
    generator = with_precision(prepared.generator, precision)
    measurements = training.distill(
        prepared.teacher,
        generator,
        student,
        config,
        seed=seed,
        directory=directory,
        evaluate=evaluate,
        show_progress=show_progress,
    )
    round_biases(student.model)
    return generator, measurements


def make_student(
    teacher: Classifier,
    *,
    method: str,
    config: DistillationConfig,
    calibration: CalibrationConfig,
    widths: BitWidths,
    seed: int,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
) -> tuple[Classifier, keras.Model, dict[str, float]]:
    """All of `quantize` but the conversion.

    Args:
      teacher: as in `quantize`, like the other arguments.
      method: 'df_q' or 'df_qat_kd'.
      config: settings of the training.
      calibration: how ranges are found.
      widths: bits of weights and activations.
      seed: decides all random numbers.
      precision: of teacher and generator.
      directory: for checkpoints, or None.
      show_progress: whether to show bars.

    Returns:
      The fake-quantized student, the generator and the last measurements.
    """
    check_method(method)
    prepared = prepare(
        teacher,
        config=config,
        calibration=calibration,
        seed=seed,
        precision=precision,
        directory=directory,
        show_progress=show_progress,
    )
    student = post_training_student(
        prepared.graph, prepared.description, prepared.images, widths, calibration
    )
    if method == "df_q":
        return student, prepared.generator, {}
    generator, measurements = distilled_student(
        prepared,
        student,
        config=config,
        seed=seed,
        precision=precision,
        directory=directory,
        show_progress=show_progress,
    )
    return student, generator, measurements
