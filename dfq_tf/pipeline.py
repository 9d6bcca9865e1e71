"""The whole path: a trained classifier in, an integer TFLite model out, no data."""

import dataclasses
import os

import numpy as np

from dfq_tf import bn_statistics, calibration, export, training
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras
from dfq_tf.config import BitWidths, DistillationConfig, RunConfig, check_method
from dfq_tf.quantization import apply


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
        widths=widths,
        seed=seed,
        precision=precision,
        directory=directory,
        show_progress=show_progress,
    )
    return Quantized(student, export.convert(student), generator, measurements)


def make_student(
    teacher: Classifier,
    *,
    method: str,
    config: DistillationConfig,
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
      widths: bits of weights and activations.
      seed: decides all random numbers.
      precision: of teacher and generator.
      directory: for checkpoints, or None.
      show_progress: whether to show bars.

    Returns:
      The fake-quantized student, the generator and the last measurements.
    """
    check_method(method)
    RunConfig(seed=seed, precision=precision)
    apply.check_widths(widths)
    graph, description = apply.integer_ready(teacher)
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
    images = training.generate(generator, config, config.calibration_images, seed)
    ranges = calibration.calibrate(graph, description, images)
    student = apply.quantize_graph(graph, description, widths, ranges)
    measurements: dict[str, float] = {}
    if method == "df_qat_kd":
        measurements = training.distill(
            observed,
            generator,
            student,
            config,
            seed=seed,
            directory=directory,
            show_progress=show_progress,
        )
    return student, generator, measurements


def quantize_with_data(
    teacher: Classifier, images: np.ndarray, widths: BitWidths = BitWidths()
) -> Classifier:
    """The data-dependent yardstick: the same network, ranges from real images.

    Args:
      teacher: the trained classifier.
      images: real images, uint8 (n, height, width, channels).
      widths: bits of weights and activations.

    Returns:
      The fake-quantized student, nothing trained.
    """
    graph, description = apply.integer_ready(teacher)
    ranges = calibration.calibrate(graph, description, images)
    return apply.quantize_graph(graph, description, widths, ranges)
