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
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf import data, evaluation, memory, pipeline, preview, training
from dfq_tf.classifier import Classifier
from dfq_tf.config import (
    AUTO,
    METHODS,
    PHASE_SETTINGS,
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    RunConfig,
    check_method,
    check_value,
    parse_widths,
)
from dfq_tf.description import OUTPUTS, description_path
from dfq_tf.distribution import check_batch
from dfq_tf.errors import ConfigError
from dfq_tf.files import replacing
from dfq_tf.importing import load_classifier
from dfq_tf.quantization import apply
from dfq_tf.workdir import Workdir
from tools import common, evaluate

FLAGS = common.FLAGS

# Of the flags of quantization-aware training.
_PREFIX = "qat_"


def define_teacher_flags() -> None:
    """Defines the flags that say what a teacher file does not."""
    group = "Teacher"
    common.define(
        group,
        "input_mean",
        list,
        [],
        "Mean in pixels, one value or one per channel: the model's input is "
        "(pixel - mean) * scale. Not needed where a .json lies beside the model, or "
        "the model has a layer for it, such as Rescaling.",
    )
    common.define(
        group, "input_scale", list, [], "Scale, like --input_mean; such as 1/255."
    )
    common.define(
        group,
        "output",
        str,
        None,
        f"What the model gives: one of {', '.join(OUTPUTS)}. By default what its last "
        "layer says.",
    )
    common.define(
        group,
        "labels",
        str,
        None,
        "Text file with the names of the classes, a line each, in the order of the "
        "model's outputs.",
    )
    common.define(
        group,
        "image_size",
        list,
        [],
        "Height and width, for a model that takes images of any size.",
    )
    common.define(
        group,
        "allow_code",
        bool,
        False,
        "Run Python code that the model's file holds, as Lambda layers do. Only for a "
        "file whose maker you trust.",
    )


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


def teacher_arguments() -> dict[str, Any]:
    """What the flags say of a teacher: arguments of `importing.as_classifier`.

    Raises:
      ConfigError: a flag is wrong.
    """
    mean, scale = (
        common.floats(name, FLAGS[name].value) or None
        for name in ("input_mean", "input_scale")
    )
    size = common.floats("image_size", FLAGS.image_size)
    if size and (len(size) != 2 or any(s != int(s) or s < 1 for s in size)):
        raise ConfigError(
            f"image_size is {','.join(FLAGS.image_size)!r}; give height and width"
        )
    if FLAGS.output is not None:
        check_value("output", FLAGS.output, {"choices": OUTPUTS})
    return dict(
        input_mean=mean,
        input_scale=scale,
        output=FLAGS.output,
        class_names=read_labels(FLAGS.labels) if FLAGS.labels else None,
        image_size=[int(s) for s in size] or None,
        allow_code=FLAGS.allow_code,
    )


def read_teacher(path: str, class_names: tuple[str, ...] | None = None) -> Classifier:
    """Reads a teacher, as the flags say.

    Args:
      path: the model's file.
      class_names: where neither --labels nor a description has them; by default 0, 1,
        2, ...

    Raises:
      ConfigError: a flag is wrong, or one is missing.
      ModelError: the file cannot be read.
    """
    arguments = teacher_arguments()
    teacher = load_classifier(path, **arguments)
    names = arguments["class_names"]
    has_numbers = teacher.description.class_names == tuple(
        map(str, range(teacher.num_classes))
    )
    if names is None and has_numbers and len(class_names or ()) == teacher.num_classes:
        description = dataclasses.replace(
            teacher.description, class_names=tuple(class_names or ())
        )
        teacher = Classifier(teacher.model, description)
    return teacher


def read_labels(path: str) -> tuple[str, ...]:
    """The names of the classes in a text file, a line each.

    Raises:
      ConfigError: it cannot be read, is empty, or has an empty line.
    """
    try:
        names = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"labels is {path!r}, which cannot be read as text: {error}"
        ) from error
    names = [name.strip() for name in names]
    if not names or not all(names):
        raise ConfigError(
            f"labels is {path!r}, which is empty or has an empty line; write one name "
            "on each line"
        )
    return tuple(names)


def teacher_and_dataset() -> tuple[Classifier, data.Dataset | None]:
    """The teacher's file, and the labelled images if --dataset names some.

    Raises:
      DataError: they do not fit each other.
    """
    dataset = common.dataset_from_flags() if FLAGS.dataset else None
    teacher = read_teacher(FLAGS.teacher, dataset.class_names if dataset else None)
    if dataset:
        evaluate.check_fits(teacher, dataset)
    return teacher, dataset


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
    student, generators, measurements = pipeline.make_student(
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
    count = pipeline.held_out_count(teacher.image_shape)
    images = training.generate(generators, config, count, run.seed + 1)
    agreement = evaluation.agreement(student.scores(images), teacher.scores(images))
    with replacing(workdir.path / f"{method}_images.npy") as temporary:
        np.save(temporary, images)
    preview.write_preview(images[:100], workdir.path, method)
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
            pipeline.check_trains(teacher)
        apply.integer_ready(teacher)


def main() -> None:
    """Quantizes and reports."""
    if not FLAGS.teacher:
        raise ConfigError("teacher is empty; name a model file with --teacher")
    widths_from_flags()
    check_settings(None, [FLAGS.method])
    teacher = read_teacher(FLAGS.teacher)
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
    define_teacher_flags()
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
