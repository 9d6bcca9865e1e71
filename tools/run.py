"""The whole path in one command: a teacher in, integer TFLite files out.

    python tools/run.py --flagfile=tools/flagfiles/quickstart.cfg
    python tools/run.py --teacher=model.keras --input_mean=0 --input_scale=1/255

Trains the teacher if --teacher names a network instead of a file, and puts the data
away. Distils into another network if --student names one, with no data. Quantizes
that, or the teacher itself, with no data, converts the results, and measures all of
them if a data set is given. Give the same command again to continue a run that was
interrupted.
"""

import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common, convert, distill, quantize, teacher_flags, train_teacher
from dfq_tf import api, models
from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier, agreement, model_name
from dfq_tf.importing import MODEL_SUFFIXES, as_classifier, files_of
from dfq_tf.quantization import QuantizedNetwork, float_network
from dfq_tf.reports import costs, facts, page
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUTO_METHOD,
    GENERATED,
    METHODS,
    BitWidths,
    CalibrationConfig,
    FileConfig,
    TeacherConfig,
)
from dfq_tf.tflite import TFLiteClassifier, proof
from dfq_tf.training import check_batch
from dfq_tf.with_data import datasets, yardsticks
from dfq_tf.with_data.datasets import accuracy

FLAGS = common.FLAGS

# Where training made a network worse: what says so, and what is kept.
_KEPT = {
    "unreconstructed_is_kept": "network before reconstruction",
    "untrained_is_kept": "network before training",
}
# Images on which a file is compared with the student that it was made of.
_COMPARED_IMAGES = 1000


def read_or_check_teacher() -> Classifier | None:
    """Reads the teacher if --teacher names a file; checks the name if it is one.

    Returns:
      The teacher, or None if it is to be trained.
    """
    name = FLAGS.teacher
    is_there = bool(files_of(pathlib.Path(name))) or (
        # A folder of its name, such as a run's, does not hide a network.
        pathlib.Path(name).exists() and not models.is_model_name(name)
    )
    if name.endswith(MODEL_SUFFIXES) or is_there:
        return teacher_flags.read_teacher(name)
    if not models.is_model_name(name):
        raise ConfigError(
            f"teacher is {name!r}, neither a {' or '.join(MODEL_SUFFIXES)} file nor a "
            f"network that the project builds: {'; '.join(models.MODEL_NAMES)}"
        )
    if not FLAGS.dataset:
        raise ConfigError(
            f"teacher is {name!r}, a network to be trained; name the training data "
            "with --dataset, or a trained model's file with --teacher"
        )
    given = teacher_flags.given()
    if given:
        each = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(
            f"{each}, but teacher is {name!r}, a network to be trained: its training "
            "says all that such flags say. Leave it out, or name a trained model's "
            "file with --teacher"
        )
    batch_size = common.config_from_flags(TeacherConfig).teacher_batch_size
    check_batch(common.strategy(), batch_size, name="teacher_batch_size")
    return None


def untrained(
    teacher: Classifier | None, dataset: datasets.Dataset | None
) -> Classifier:
    """What is to be quantized; its weights are random where they are to be trained.

    Args:
      teacher: None if it is to be trained on the data set.
      dataset: None without.

    Raises:
      ConfigError: a network has impossible numbers in its name.
    """
    if teacher is None:
        assert dataset is not None
        new = train_teacher.new_teacher(FLAGS.teacher, dataset, "teacher")
        teacher = as_classifier(new)
    if not FLAGS.student:
        return teacher
    return as_classifier(distill.new_learner(teacher))


def row(
    workdir: Workdir,
    key: str,
    scores: np.ndarray,
    labels: np.ndarray | None,
    teacher_scores: np.ndarray,
    **more: float | str,
) -> None:
    """Rates a model's scores and keeps the result in metrics.json under `key`."""
    workdir.add_metrics(
        **{
            key: {
                "accuracy": None if labels is None else accuracy(scores, labels),
                "agreement": agreement(scores, teacher_scores),
                "images": len(scores),
                **more,
            }
        }
    )


def table(metrics: dict) -> str:
    """The results, a line per model."""
    # The yardstick has the widths alone: no size is asked of it.
    of_q, asked = quantize.widths_from_flags().name, quantize.asked_widths()
    lines = [f"{'':24} accuracy  agreement       size"]
    for key, title in (
        ("teacher", "teacher float"),
        ("student", "student float"),
        ("q", "Q (real images) *"),
        *quantize.TITLES.items(),
    ):
        if key not in metrics:
            continue
        if key not in ("teacher", "student"):
            title = f"{title} {of_q if key == 'q' else asked}"
        result = metrics[key]
        accuracy = result["accuracy"]
        lines.append(
            f"{title:24} "
            f"{'-' if accuracy is None else f'{100 * accuracy:.2f} %':>8}  "
            f"{100 * result['agreement']:>7.2f} %  "
            f"{result['bytes'] / 1000:>6.1f} kB"
        )
    for method, title in quantize.TITLES.items():
        made = metrics.get(f"{method}_training", {})
        for key, which in _KEPT.items():
            if made.get(key):
                lines.append(
                    f"{title}: the {which} agreed more on images held out, and is it"
                )
    for method, title in quantize.TITLES.items():
        worst = metrics.get(method, {}).get("worst_layer")
        if worst:
            lines.append(f"{title}: the noisiest layer is {worst}")
    if "q" in metrics:
        lines.append("* data-dependent yardstick: no part of the data-free models")
    return "\n".join(lines)


def main() -> None:
    """Runs every stage that has not been run in this workdir yet."""
    methods, widths = methods_from_flags(), quantize.widths_from_flags()
    teacher_config = common.config_from_flags(TeacherConfig)
    check_flags(methods, widths)
    common.check_workdir(resolved=resolved_flags())
    teacher = read_or_check_teacher()
    if FLAGS.student and teacher is not None:
        # It need not be fit for quantization: its student, one of ours, is.
        api.check_trains(teacher)
    dataset = common.dataset_from_flags() if teacher is None else None
    quantize.check_settings(untrained(teacher, dataset), methods, widths)
    if teacher is not None:  # a data set may have to be downloaded
        teacher, dataset = teacher_flags.with_dataset(teacher)
    workdir = open_workdir(teacher, dataset)

    if teacher is None:
        assert dataset is not None
        teacher = trained(dataset, teacher_config, workdir)
    network = None
    if FLAGS.student:
        network = distill.distilled_student(teacher, dataset, workdir)
    made, preparation = {}, quantize.Preparation(teacher, network, workdir)
    for method in methods:
        made[method] = make_file(preparation, method)
    if further := further_method(teacher, made[methods[0]][0], workdir):
        made[further] = make_file(preparation, further)
    measure(teacher, network, made, dataset, workdir)
    print(table(workdir.metrics()))
    print(f"\nThe page of the run: {page.write(workdir.path)}")
    print("Wrote:")
    for name in sorted(p.name for p in workdir.path.iterdir() if p.is_file()):
        print(f"  {workdir.path / name}")


def check_flags(methods: list[str], widths: BitWidths) -> None:
    """Refuses, before anything is read, what flags alone tell.

    Args:
      methods: that are made in any case.
      widths: of all of them.

    Raises:
      ConfigError: a flag is wrong, or contradicts another one.
    """
    file_config()
    if FLAGS.yardstick and not FLAGS.dataset:
        raise ConfigError("yardstick needs real images; name them with --dataset")
    quantize.check_settings(None, methods, widths)
    if FLAGS.methods == [AUTO_METHOD]:
        calibration = common.config_from_flags(CalibrationConfig)
        api.check_reconstructs(AUTO_METHOD, calibration, common.strategy())
    if not FLAGS.teacher:
        raise ConfigError(
            "teacher is empty; name a model file, or a network to train, with --teacher"
        )
    check_student()


def resolved_flags() -> dict[str, Any]:
    """Name -> value of the flags whose default is a recipe's."""
    of_student = distill.resolved_flags() if FLAGS.student else {}
    return quantize.resolved_flags() | of_student


def trained(
    dataset: datasets.Dataset, config: TeacherConfig, workdir: Workdir
) -> Classifier:
    """The teacher that --teacher names, trained; or read if an earlier call trained it.

    Args:
      dataset: what to train on.
      config: how to train.
      workdir: keeps it.

    Raises:
      ConfigError: --minutes are too few for what comes behind it.
    """
    if FLAGS.student and not (workdir.path / "teacher.keras").exists():
        new = train_teacher.new_teacher(FLAGS.teacher, dataset)
        distill.check_minutes(as_classifier(new))
    common.say(f"Training the teacher {FLAGS.teacher} on {dataset.name}")
    teacher = train_teacher.trained_teacher(FLAGS.teacher, dataset, config, workdir)
    common.say("The data is put away. From here on, no image of it is used.")
    return teacher


def open_workdir(
    teacher: Classifier | None, dataset: datasets.Dataset | None
) -> Workdir:
    """The folder of the run.

    Args:
      teacher: None if it is to be trained, on the data set.
      dataset: None without.

    Raises:
      ConfigError: the folder has labels of other classes.
      WorkdirError: see `Workdir`.
    """
    if teacher is not None:
        class_names: Sequence[str] = teacher.description.class_names
    else:
        assert dataset is not None
        class_names = dataset.class_names
    convert.check_labels(class_names, pathlib.Path(FLAGS.workdir))
    makes = [page.NAME]
    if FLAGS.student:
        makes.append("student.keras")
    if teacher is None:
        makes.append("teacher.keras")
    for method in METHODS:
        makes += [f"{method}.keras", f"{method}.tflite"]
    return common.open_workdir(resolved=resolved_flags(), makes=makes)


def methods_from_flags() -> list[str]:
    """The methods that are made in any case.

    Raises:
      ConfigError: --methods is empty, or 'auto' is not alone.
    """
    methods = FLAGS.methods
    if not methods:
        raise ConfigError(
            f"methods is empty; it takes auto, or some of {', '.join(METHODS)}. To "
            "distil and not quantize, run tools/distill.py"
        )
    if methods == [AUTO_METHOD]:
        return [METHODS[0]]
    if AUTO_METHOD in methods:
        raise ConfigError(
            f"methods is {','.join(methods)!r}; {AUTO_METHOD} stands alone: it chooses"
        )
    if unknown := [each for each in methods if each not in METHODS]:
        raise ConfigError(
            f"methods has {unknown[0]!r}; it takes {AUTO_METHOD} alone, or some of "
            f"{', '.join(METHODS)}"
        )
    return methods


def further_method(
    teacher: Classifier, network: QuantizedNetwork, workdir: Workdir
) -> str | None:
    """What --methods=auto makes behind DF-Q, None for nothing; says so, and why.

    Args:
      teacher: the trained classifier.
      network: the first that was made.
      workdir: has its metrics.
    """
    if FLAGS.methods != [AUTO_METHOD]:
        return None
    training = workdir.metrics()["df_q_training"]
    share = training.get("expected_agreement")
    said = "How far DF-Q agrees with the float network cannot be told"
    if share is not None:
        said = (
            f"DF-Q is expected to agree with the float network on {100 * share:.1f} % "
            "of images of which that is sure"
        )
    method = api.needed_method(teacher, network, share)
    if method == METHODS[0]:
        common.say(f"{said}: nothing more is done; --methods=df_q,df_rec does more")
        return None
    common.say(
        f"{said}, {quantize.asked_widths()}: {quantize.TITLES[method]} is made too"
    )
    return method


def file_config() -> FileConfig:
    """What the flags say of the files, whose model has the name of its network."""
    return common.file_config(model_name(FLAGS.student or FLAGS.teacher or ""))


def make_file(
    preparation: quantize.Preparation, method: str
) -> tuple[QuantizedNetwork, bytes]:
    """The quantized network, and the content of METHOD.tflite; made if need be."""
    workdir = preparation.workdir
    began = time.monotonic() - quantize.earlier_seconds(workdir, method)
    path = workdir.path / f"{method}.tflite"
    is_new = not path.exists()
    file = file_config()
    quantized, content = quantize.quantize_network(preparation, method, file)
    content = convert.convert_network(quantized, path, file, content)
    if is_new:
        seconds = round(time.monotonic() - began, 1)
        workdir.add_metrics(**{f"{method}_seconds": seconds})
    return quantized, content


def check_student() -> None:
    """Refuses wrong settings of the distillation before any work is done.

    Raises:
      ConfigError: --student is no network, or flags of the distillation are given
        without it.
    """
    if not FLAGS.student:
        for name in ("recipe", *distill.distillation_flags()):
            if FLAGS[name].value != FLAGS[name].default:
                raise ConfigError(
                    f"{name} is {FLAGS[name].value}, but there is no student: it "
                    "belongs to the distillation into another network, which --student "
                    "names. Quantization-aware training has flags that begin with qat_"
                )
        return
    distill.check_flags()


def measure(
    teacher: Classifier,
    network: Classifier | None,
    made: Mapping[str, tuple[QuantizedNetwork, bytes]],
    dataset: datasets.Dataset | None,
    workdir: Workdir,
) -> None:
    """Measures teacher and files: on the test split, or else on images held out.

    Args:
      teacher: the float teacher.
      network: the float network that was quantized; None for the teacher.
      made: method -> the quantized network, and its file's content.
      dataset: None without.
      workdir: takes the results.
    """
    images, labels, kept = images_that_measure(next(iter(made)), dataset, workdir)
    with common.stage(f"evaluation of the teacher on {len(images):,} images"):
        teacher_scores = teacher.scores(images)
        for key, model in (("teacher", teacher), ("student", network)):
            if model is not None:
                scores = teacher_scores if model is teacher else model.scores(images)
                size = model.num_bytes
                row(workdir, key, scores, labels, teacher_scores, bytes=size, **kept)
    source = network or teacher
    exact = float_network(source, common.config_from_flags(CalibrationConfig))
    for method, (quantized, content) in made.items():
        tflite = TFLiteClassifier(content)
        facts.add(workdir.path, method, file=tflite.interface())
        worst = quantize.measure_noise(
            source, exact, quantized, content, workdir.path, method
        )
        with common.stage(f"evaluation of {quantize.TITLES[method]}"):
            scores, latency = tflite.scores(images), tflite.latency()
            compared = images[:_COMPARED_IMAGES]
            difference = proof.largest_difference(quantized, content, compared)
        row(
            workdir,
            method,
            scores,
            labels,
            teacher_scores,
            bytes=len(content),
            latency_ms=latency,
            xnnpack_pieces=tflite.num_pieces,
            worst_layer=f"{worst.name}, {worst.own_db:.1f} dB",
            largest_difference_in_steps=difference,
            compared_images=len(compared),
            **kept,
        )
    if FLAGS.yardstick:
        assert dataset is not None
        with common.stage("yardstick, with real images"):
            content = real_data_file(source, dataset)
            scores = TFLiteClassifier(content).scores(images)
        row(workdir, "q", scores, labels, teacher_scores, bytes=len(content))
    add_peak(workdir)


def images_that_measure(
    first: str, dataset: datasets.Dataset | None, workdir: Workdir
) -> tuple[np.ndarray, np.ndarray | None, dict[str, str]]:
    """The test images with their labels, or else the images that a method held out.

    Args:
      first: the method that was made first.
      dataset: None without.
      workdir: has the images held out.

    Returns:
      Images; labels, None without; and what metrics.json keeps of images held out:
      their kind, see `Source.kind`.
    """
    if dataset:
        test = dataset.load("test")
        return test.images, test.labels, {}
    images = np.load(workdir.path / f"{first}_images.npy")
    shown = facts.read(workdir.path, first).get("generated", {})
    return images, None, {"kind": shown.get("kind", GENERATED)}


def add_peak(workdir: Workdir) -> None:
    """Keeps the most memory that this call, or an earlier one that trained, took."""
    before = workdir.metrics().get("peak_memory_mib", 0)
    peak = round(costs.peak_bytes() / 2**20)
    workdir.add_metrics(peak_memory_mib=max(before, peak))


def real_data_file(source: Classifier, dataset: datasets.Dataset) -> bytes:
    """The file whose ranges come from real training images, the yardstick."""
    images = dataset.load("train").images
    calibration = common.config_from_flags(CalibrationConfig)
    widths = quantize.widths_from_flags()
    calibrated = yardsticks.calibrated_with_data(source, images, calibration)
    return proof.convert(calibrated.quantized(widths), config=file_config())


def define_flags() -> None:
    """Defines the flags of this tool: those of the stages."""
    common.define_dataset_flags(None)
    common.define(
        "Data",
        "yardstick",
        bool,
        False,
        "Report beside the results what ranges from real training images would give.",
    )
    common.define(
        "Teacher",
        "teacher",
        pathlib.Path,
        None,
        "Model file (.keras or .h5), or a network to train on --dataset first: "
        f"{'; '.join(models.MODEL_NAMES)}.",
    )
    teacher_flags.define()
    # The rest belongs to tools/train_teacher.py.
    names = ("teacher_epochs", "augmentation", "teacher_initial_scale")
    common.define_config("Teacher training", TeacherConfig, names)
    common.define(
        "Data-free training",
        "methods",
        list,
        [AUTO_METHOD],
        "What to make: df_q finds ranges and trains nothing; df_rec also reconstructs "
        "one block after the other; df_qat_kd trains the student, df_rec_kd that of "
        "reconstructed blocks; auto makes df_q, and another where that is not enough.",
    )
    quantize.define_generator_flags()
    distill.define_distillation_flags()
    quantize.define_quantization_flags()
    quantize.define_widths_flag()
    common.define_file_flags()
    common.define_run_flags("runs/run")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
