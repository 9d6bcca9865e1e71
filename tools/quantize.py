"""Quantizes a trained classifier, using no data.

    python tools/quantize.py --teacher=teacher.keras --method=df_qat_kd

Warms a generator up, sets the ranges from its images (df_q), and trains the
quantized student against it (df_qat_kd). Writes WORKDIR/METHOD.keras, which
tools/convert.py turns into a TFLite file, and WORKDIR/METHOD.png, generated images.
"""

import dataclasses
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf import api
from dfq_tf.distillation import phases
from dfq_tf.errors import ConfigError
from dfq_tf.files import replacing
from dfq_tf.graph import evaluation
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import description_path
from dfq_tf.importing.classifiers import load_classifier
from dfq_tf.quantization import apply
from dfq_tf.reports import pictures
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUTO,
    METHODS,
    PHASE_SETTINGS,
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    RunConfig,
    check_method,
    parse_widths,
)
from dfq_tf.training import memory
from dfq_tf.training.devices import check_batch
from tools import common, teacher_flags

FLAGS = common.FLAGS

# Of the flags of quantization-aware training.
_PREFIX = "qat_"


def define_generator_flags() -> None:
    """Defines the flags that all data-free phases share."""
    names = [f.name for f in dataclasses.fields(DistillationConfig)]
    phase = {*PHASE_SETTINGS, "num_students"}
    shared = [name for name in names if name not in phase]
    common.define_config("Data-free training", DistillationConfig, shared)


def define_quantization_flags() -> None:
    """Defines the flags of the quantization, but those of `define_generator_flags`."""
    common.define_config(
        "Quantization-aware training (df_qat_kd)",
        DistillationConfig,
        PHASE_SETTINGS,
        prefix=_PREFIX,
    )
    common.define_config("Calibration", CalibrationConfig)
    common.define_config("Bit widths", BitWidths)


def qat_config() -> DistillationConfig:
    """The settings of warm-up and quantization-aware training, from the flags."""
    return common.config_from_flags(DistillationConfig, _PREFIX)


def define_widths_flag() -> None:
    """Defines --widths, both bit widths in one."""
    common.define(
        "Bit widths",
        "widths",
        str,
        None,
        "Bits of weights and activations in one, such as W4A8, in place of "
        "--num_bits_weight and --num_bits_activation.",
    )


def widths_from_flags() -> BitWidths:
    """The bit widths that the flags ask for.

    Raises:
      ConfigError: --widths contradicts the flags that it stands for.
    """
    widths = common.config_from_flags(BitWidths)
    if FLAGS.widths is None:
        return widths
    result = parse_widths(FLAGS.widths, widths)
    for name in ("num_bits_weight", "num_bits_activation"):
        given = getattr(widths, name)
        if FLAGS[name].present and given != getattr(result, name):
            raise ConfigError(
                f"widths is {FLAGS.widths!r}, but {name} is {given}; give one of them"
            )
    return result


def quantize_network(
    teacher: Classifier, network: Classifier | None, method: str, workdir: Workdir
) -> Classifier:
    """Makes the quantized student, or reads it if an earlier run made it.

    Args:
      teacher: the trained classifier.
      network: what is quantized, None for the teacher itself.
      method: one of METHODS.
      workdir: keeps METHOD.keras, METHOD.png, checkpoints and metrics.
    """
    path = workdir.path / f"{method}.keras"
    if common.is_made(path, description_path(path)):
        return load_classifier(path)
    run = common.config_from_flags(RunConfig)
    strategy = common.strategy()
    model = (network or teacher).model
    config = memory.with_batch_size(qat_config(), teacher.model, model, strategy)
    began = time.monotonic()
    student, generators, measurements = api.make_student(
        teacher,
        network,
        method=method,
        config=config,
        calibration=common.config_from_flags(CalibrationConfig),
        widths=widths_from_flags(),
        seed=run.seed,
        precision=run.precision,
        strategy=strategy,
        directory=workdir.path,
        show_progress=FLAGS.progress,
    )
    seconds = time.monotonic() - began
    # Other noise than that of training and calibration.
    count = api.held_out_count(teacher.image_shape)
    images = phases.generate(generators, config, count, run.seed + 1)
    agreement = evaluation.agreement(student.scores(images), teacher.scores(images))
    with replacing(workdir.path / f"{method}_images.npy") as temporary:
        np.save(temporary, images)
    pictures.write_preview(images[:100], workdir.path, method)
    workdir.add_metrics(
        **{
            f"{method}_training": {
                "seconds": round(seconds, 1),
                "agreement_on_generated_images": agreement,
                "batch_size": config.batch_size,
                **measurements,
            }
        }
    )
    student.save(path)
    return student


def check_settings(teacher: Classifier | None, methods: list[str]) -> None:
    """Raises, before any work, if a flag is wrong or a layer cannot be quantized.

    Makes the devices that train, and so comes before any network is read.
    """
    for method in methods:
        check_method(method)
    common.config_from_flags(RunConfig)
    config = qat_config()
    common.config_from_flags(CalibrationConfig)
    strategy = common.strategy()
    if config.batch_size != AUTO:
        check_batch(strategy, config.batch_size, config.num_generators)
    if teacher is not None:
        if "df_qat_kd" in methods:
            api.check_trains(teacher)
        apply.integer_ready(teacher)


def main() -> None:
    """Quantizes and reports."""
    if not FLAGS.teacher:
        raise ConfigError("teacher is empty; name a model file with --teacher")
    widths_from_flags()
    check_settings(None, [FLAGS.method])
    teacher = teacher_flags.read_teacher(FLAGS.teacher)
    check_settings(teacher, [FLAGS.method])
    workdir = common.open_workdir()
    quantize_network(teacher, None, FLAGS.method, workdir)
    metrics = workdir.metrics()[f"{FLAGS.method}_training"]
    print(
        "Agreement with the teacher on generated images: "
        f"{100 * metrics['agreement_on_generated_images']:.1f} %"
    )
    print(f"Wrote {workdir.path / FLAGS.method}.keras; now run tools/convert.py")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define("Teacher", "teacher", str, None, "Model file (.keras or .h5).")
    teacher_flags.define()
    common.define(
        "Data-free training",
        "method",
        str,
        "df_qat_kd",
        f"One of: {', '.join(METHODS)}.",
    )
    define_generator_flags()
    define_quantization_flags()
    define_widths_flag()
    common.define_run_flags("runs/quantize")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
