"""The whole path: a trained classifier in, an integer TFLite model out, no data.

Or first, with `distill`, into a smaller network, and that one quantized.
"""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.distillation import phases
from dfq_tf.distillation import teacher as bn_statistics
from dfq_tf.distillation.bank import ImageBank
from dfq_tf.errors import ConfigError
from dfq_tf.graph import equalization, evaluation
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.graph.rewriting import head_activation
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import apply
from dfq_tf.quantization.bias_correction import correct_biases
from dfq_tf.quantization.calibration import calibrate
from dfq_tf.quantization.integers import round_biases
from dfq_tf.settings import (
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    RunConfig,
    check_method,
    recipe,
)
from dfq_tf.tflite import export
from dfq_tf.training import memory
from dfq_tf.training.copies import with_precision
from dfq_tf.training.loop import Evaluate

# Generated images on which students are compared with the teacher, and their bytes.
_HELD_OUT_IMAGES = 1000
_HELD_OUT_BYTES = 32 * 2**20
# How much less they may agree after training: two standard errors, and some more.
_TOLERATED_LOSS = 0.02


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What comes out.

    Attributes:
      student: the fake-quantized model, a Keras model that can be trained further.
      tflite: the content of the `.tflite` file: uint8 pixels in, int8 logits out.
      generators: make images that the teacher takes for its training data.
      measurements: of the training, empty for DF-Q: the agreement with the teacher on
        held-out generated images, before and after it, and the last losses, which a
        run that had finished before no longer has.
    """

    student: Classifier
    tflite: bytes
    generators: Sequence[keras.Model]
    measurements: dict[str, float]


def quantize(
    teacher: Any,
    network: Classifier | None = None,
    *,
    method: str = "df_qat_kd",
    config: DistillationConfig = DistillationConfig(),
    calibration: CalibrationConfig = CalibrationConfig(),
    widths: BitWidths = BitWidths(),
    seed: int = 0,
    precision: str = "auto",
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Quantized:
    """Quantizes a classifier to an integer TFLite model, using no data.

    A generator is warmed up on what the teacher knows of its training data; its
    images give the activation ranges (DF-Q). For DF-QAT-KD, student and generator
    are then trained against each other (Choi et al. 2020).

    Args:
      teacher: the trained classifier; or a model or file that says itself how it is
        fed, of which `as_classifier` makes one. It is not changed.
      network: what is quantized: None for the teacher itself, or a network that has
        learnt from it, as `distill` gives; it is not changed.
      method: 'df_q', nothing trained but the generator, or 'df_qat_kd'.
      config: steps, batch size, learning rates, weights of the losses.
      calibration: how ranges are found, and what helps them.
      widths: bits of weights and activations.
      seed: decides all random numbers.
      precision: 'auto', 'float32' or 'bfloat16', of teacher and generator.
      strategy: the devices that train, see `distribution.make_strategy`; None for one.
      directory: keeps checkpoints: the same call there continues where it was
        interrupted. None keeps nothing.
      show_progress: whether to show a bar for each stage.

    Raises:
      ConfigError: a setting is out of its limits, or teacher and network do not fit;
        or a model does not say how it is fed.
      ModelError: the teacher is no image classifier, or its file cannot be read.
      UnsupportedLayerError: a layer has no integer form; it is named.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
      ExportError: the converter gave a file that is not integer-only.
    """
    student, generators, measurements = make_student(
        as_classifier(teacher),
        network,
        method=method,
        config=config,
        calibration=calibration,
        widths=widths,
        seed=seed,
        precision=precision,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    return Quantized(student, export.convert(student), generators, measurements)


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A student that has learnt from a teacher, and no data.

    Attributes:
      student: float32, of the network that was asked for.
      agreements: share of held-out generated images, in [0, 1], on which each
        student answers as the teacher does; `student` is the best of them.
      generators: as they were at the end.
      measurements: the last losses; empty for a run that had finished before.
    """

    student: Classifier
    agreements: Sequence[float]
    generators: Sequence[keras.Model]
    measurements: dict[str, float]


def distill(
    teacher: Any,
    student: Classifier,
    *,
    config: DistillationConfig = recipe("bank"),
    seed: int = 0,
    precision: str = "auto",
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    evaluate: Callable[[Classifier], Mapping[str, float]] | None = None,
    show_progress: bool = True,
) -> Distilled:
    """Teaches a network to answer as the teacher does, using no data.

    Generators are warmed up on what the teacher knows of its training data, then
    trained against the students (Choi et al. 2020).

    Args:
      teacher: as in `quantize`; it is not changed.
      student: a network for the same images and classes. Students start from its
        weights, the second and further ones from random ones; it is not changed.
      config: see `config.recipe`.
      seed: decides all random numbers.
      precision: 'auto', 'float32' or 'bfloat16', of all networks.
      strategy: the devices that train, see `distribution.make_strategy`; None for one.
      directory: keeps checkpoints: the same call there continues where it was
        interrupted. None keeps nothing.
      evaluate: measures the first student now and then, beside its agreement with the
        teacher on held-out generated images; both go to `distillation_curve.csv`.
        Nothing is chosen by it.
      show_progress: whether to show a bar for each stage.

    Raises:
      ConfigError: a setting is out of its limits, teacher and student do not fit, or
        the student does not give logits.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
    """
    teacher = as_classifier(teacher)
    check_trains(teacher)
    check_pair(teacher, student)
    _check_gives_logits(student)
    config = memory.with_batch_size(config, teacher.model, student.model, strategy)
    bank = phases.make_bank(student, config, seed)
    warmed = warmed_up(
        teacher,
        config=config,
        seed=seed,
        bank=bank,
        precision=precision,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    images = _held_out(warmed.generators, config, seed)
    answers = teacher.scores(images)
    copies = [student.model] + [
        models.randomized(student.model, seed + i)
        for i in range(1, config.num_students)
    ]
    students = [
        Classifier(with_precision(model, precision), student.description)
        for model in copies
    ]

    def measured() -> dict[str, float]:
        scores = students[0].scores(images)
        return {
            "agreement_on_generated_images": evaluation.agreement(scores, answers),
            **(evaluate(students[0]) if evaluate else {}),
        }

    measurements = phases.distill(
        warmed.teacher,
        warmed.generators,
        students,
        config,
        seed=seed,
        bank=bank,
        strategy=strategy,
        directory=directory,
        evaluate=measured,
        show_progress=show_progress,
    )
    agreements = [evaluation.agreement(s.scores(images), answers) for s in students]
    best = students[int(np.argmax(agreements))].model
    trained = Classifier(with_precision(best, "float32"), student.description)
    return Distilled(trained, agreements, warmed.generators, measurements)


def check_trains(teacher: Classifier) -> None:
    """Raises ConfigError if nothing can learn from the teacher's answers.

    The losses compare the softmax of logits, which says nothing of how high all of them
    are; but scores of classes that do not exclude each other hang on that.
    """
    if teacher.description.output == "sigmoid":
        raise ConfigError(
            "the teacher gives sigmoid scores, of classes that do not exclude each "
            "other, from which no student can be trained. To quantize the teacher "
            "itself without training, take the method df_q (--methods=df_q)"
        )


def _check_gives_logits(student: Classifier) -> None:
    """Raises ConfigError for an output that the losses would mistake for logits."""
    output = student.description.output
    head = head_activation(Graph.from_model(student.model))
    if (output, head) != ("logits", "logits"):
        raise ConfigError(
            f"the student's description says {output}, its last layer gives {head}; "
            "a student learns logits: let it end without softmax or sigmoid, and say "
            "output='logits' in its description"
        )


def _held_out(
    generators: Sequence[keras.Model], config: DistillationConfig, seed: int
) -> np.ndarray:
    """Images of other noise than that of training and calibration."""
    count = held_out_count(generators[0].output_shape[1:])
    return phases.generate(generators, config, count, seed + 1)


def held_out_count(image_shape: tuple[int, int, int]) -> int:
    """How many generated images are held out: 1000, fewer if they are large."""
    return max(100, min(_HELD_OUT_IMAGES, _HELD_OUT_BYTES // math.prod(image_shape)))


def check_pair(teacher: Classifier, student: Classifier) -> None:
    """Raises ConfigError unless both take the same images and give the same classes."""
    for name, theirs, its in (
        ("image shape", teacher.image_shape, student.image_shape),
        ("number of classes", teacher.num_classes, student.num_classes),
        (
            "class names",
            teacher.description.class_names,
            student.description.class_names,
        ),
    ):
        if theirs != its:
            raise ConfigError(
                f"the student's {name} is {its}, the teacher's {theirs}; the student "
                "must be made for the teacher's images and classes"
            )


@dataclasses.dataclass(frozen=True)
class WarmedUp:
    """A teacher, and generators that make images like those it was trained on.

    Attributes:
      teacher: frozen, with its BN statistics.
      generators: warmed up.
    """

    teacher: bn_statistics.ObservedTeacher
    generators: list[keras.Model]


def warmed_up(
    teacher: Classifier,
    *,
    config: DistillationConfig,
    seed: int,
    bank: ImageBank | None = None,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
    strategy: tf.distribute.Strategy | None = None,
) -> WarmedUp:
    """What distillation and quantization begin with.

    Args:
      teacher: as in `quantize`, like the other arguments.
      config: settings of the training.
      seed: decides all random numbers.
      bank: takes the images of the warm-up.
      precision: of teacher and generators.
      directory: for checkpoints, or None.
      show_progress: whether to show a bar.
      strategy: the devices that train; None for one.
    """
    RunConfig(seed=seed, precision=precision)
    config = memory.with_batch_size(config, teacher.model, strategy=strategy)
    observed = bn_statistics.observe(teacher, precision)
    generators = phases.make_generators(teacher, config, seed, precision)
    phases.warm_up(
        observed,
        generators,
        config,
        seed=seed,
        bank=bank,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    return WarmedUp(observed, generators)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all students of one network start from.

    Attributes:
      teacher: frozen, with its BN statistics.
      graph: the float network, rewritten for integers.
      description: how that network is fed.
      generators: warmed up.
      images: calibration images drawn from them, uint8.
      held_out: other images drawn from them, which train and calibrate nothing.
      answers: the teacher's scores for those.
    """

    teacher: bn_statistics.ObservedTeacher
    graph: Graph
    description: ModelDescription
    generators: list[keras.Model]
    images: np.ndarray
    held_out: np.ndarray
    answers: np.ndarray


def prepare(
    teacher: Classifier,
    network: Classifier | None = None,
    *,
    config: DistillationConfig,
    calibration: CalibrationConfig,
    seed: int,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
    strategy: tf.distribute.Strategy | None = None,
) -> Prepared:
    """Everything that does not depend on bit widths: rewriting and warm-up.

    Args:
      teacher: as in `quantize`, like the other arguments.
      network: what is to be quantized; None for the teacher.
      config: settings of the training.
      calibration: says how many images are drawn, and whether layers are balanced.
      seed: decides all random numbers.
      precision: of teacher and generators.
      directory: for the warm-up's checkpoints, or None.
      show_progress: whether to show a bar.
      strategy: the devices that train; None for one.
    """
    network = network or teacher
    check_pair(teacher, network)
    config = memory.with_batch_size(config, teacher.model, network.model, strategy)
    graph, description = float_network(network, calibration)
    warmed = warmed_up(
        teacher,
        config=config,
        seed=seed,
        precision=precision,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    count = calibration.calibration_images
    images = phases.generate(warmed.generators, config, count, seed)
    held_out = _held_out(warmed.generators, config, seed)
    return Prepared(
        warmed.teacher,
        graph,
        description,
        warmed.generators,
        images,
        held_out,
        teacher.scores(held_out),
    )


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
    strategy: tf.distribute.Strategy | None = None,
) -> tuple[list[keras.Model], dict[str, float]]:
    """Trains a student in place, against copies of the warmed-up generators.

    Args:
      prepared: from `prepare`.
      student: from `post_training_student`.
      config: settings of the training, with the batch size of `prepare`.
      seed: decides all random numbers.
      precision: of the generators.
      directory: for checkpoints, or None.
      show_progress: whether to show a bar.
      evaluate: measures the student now and then, see `loop.run_loop`.
      strategy: the devices that train; None for one.

    Returns:
      The generators as they are after that, and the last measurements, with the
      agreement with the teacher on held-out generated images before and after.

    Warns:
      UserWarning: the training made that agreement worse.
    """

    def agreement() -> float:
        return evaluation.agreement(student.scores(prepared.held_out), prepared.answers)

    before = agreement()
    generators = [with_precision(g, precision) for g in prepared.generators]
    measurements = phases.distill(
        prepared.teacher,
        generators,
        [student],
        config,
        seed=seed,
        strategy=strategy,
        name="df_qat_kd",
        directory=directory,
        evaluate=evaluate,
        show_progress=show_progress,
    )
    round_biases(student.model)
    after = agreement()
    if after < before - _TOLERATED_LOSS:
        warnings.warn(
            "training made the student agree less with the teacher on held-out "
            f"generated images: {100 * before:.1f} % before it, {100 * after:.1f} % "
            "after. Lower its learning rate, or take the student that is not trained",
            stacklevel=2,
        )
    found = {"held_out_agreement_before": before, "held_out_agreement_after": after}
    return generators, {**measurements, **found}


def make_student(
    teacher: Classifier,
    network: Classifier | None = None,
    *,
    method: str,
    config: DistillationConfig,
    calibration: CalibrationConfig,
    widths: BitWidths,
    seed: int,
    precision: str,
    directory: str | os.PathLike[str] | None,
    show_progress: bool,
    strategy: tf.distribute.Strategy | None = None,
) -> tuple[Classifier, list[keras.Model], dict[str, float]]:
    """All of `quantize` but the conversion.

    Args:
      teacher: as in `quantize`, like the other arguments.
      network: what is quantized; None for the teacher.
      method: 'df_q' or 'df_qat_kd'.
      config: settings of the training.
      calibration: how ranges are found.
      widths: bits of weights and activations.
      seed: decides all random numbers.
      precision: of teacher and generator.
      directory: for checkpoints, or None.
      show_progress: whether to show bars.
      strategy: the devices that train; None for one.

    Returns:
      The fake-quantized student, the generators and the last measurements.
    """
    check_method(method)
    if method == "df_qat_kd":
        check_trains(teacher)
    network = network or teacher
    config = memory.with_batch_size(config, teacher.model, network.model, strategy)
    prepared = prepare(
        teacher,
        network,
        config=config,
        calibration=calibration,
        seed=seed,
        precision=precision,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    student = post_training_student(
        prepared.graph, prepared.description, prepared.images, widths, calibration
    )
    if method == "df_q":
        return student, prepared.generators, {}
    generators, measurements = distilled_student(
        prepared,
        student,
        config=config,
        seed=seed,
        precision=precision,
        strategy=strategy,
        directory=directory,
        show_progress=show_progress,
    )
    return student, generators, measurements
