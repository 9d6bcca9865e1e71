"""Quantizes a trained classifier, using no data.

    python tools/quantize.py --teacher=teacher.keras --method=df_qat_kd

Warms a generator up, sets the ranges from its images (df_q), reconstructs one block
after the other on them (df_rec), and trains the quantized student on such images
(df_qat_kd, or df_rec_kd behind reconstruction). Writes
WORKDIR/METHOD.keras, which tools/convert.py turns into a TFLite file,
WORKDIR/METHOD.png, images held out, and WORKDIR/report.html, the page of the run.
"""

import dataclasses
import functools
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common, convert, teacher_flags
from dfq_tf import api, photographs
from dfq_tf.context import Context
from dfq_tf.distillation import (
    Sampler,
    check_source,
    known_source,
    phases,
    with_batch_size,
)
from dfq_tf.distillation.batch_size import largest_step
from dfq_tf.errors import ConfigError
from dfq_tf.files import replacing
from dfq_tf.graph import Classifier, agreement, description_path
from dfq_tf.quantization import (
    BLOCK_MEMORY,
    FittedBlock,
    QuantizedNetwork,
    float_network,
    run_names,
    student,
)
from dfq_tf.reports import facts, layer_noise, page, pictures, record
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUTO,
    GENERATED,
    METHODS,
    PHASE_SETTINGS,
    QAT_RECIPES,
    RECONSTRUCTING,
    SIZE_SETTINGS,
    SOURCES,
    TRAINING,
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    FileConfig,
    ReconstructionConfig,
    RunConfig,
    check_value,
    parse_widths,
    qat_recipe,
)
from dfq_tf.tflite import as_table, check_target_takes
from dfq_tf.training import check_batch, seconds_in_steps

FLAGS = common.FLAGS

# What a reader calls the methods.
TITLES = {method: record.TITLES[method] for method in METHODS}
# Images on which the layers' noise is measured.
_NOISE_IMAGES = 64
# What a file's size hangs on, besides the widths.
_OF_SIZE = ("target", "favor", "kernel_costs")
# A pool of so many bytes is told of before.
_WORTH_SAYING = 256 * 2**20
# Of the flags of quantization-aware training.
_PREFIX = "qat_"
# In metrics.json: in whose time the warm-up counts, a method's or the student's.
_WARM_UP, STUDENT = "warm_up_in", "student"


def define_generator_flags() -> None:
    """Defines the flags that all data-free phases share."""
    names = [f.name for f in dataclasses.fields(DistillationConfig)]
    phase = {*PHASE_SETTINGS, "num_students"}
    shared = [name for name in names if name not in phase]
    common.define_config("Data-free training", DistillationConfig, shared)


def define_quantization_flags() -> None:
    """Defines the flags of the quantization, but those of `define_generator_flags`."""
    group = "Quantization-aware training (df_qat_kd)"
    common.define(
        group,
        f"{_PREFIX}recipe",
        str,
        "pool",
        "Where its images come from: pool takes crops of images that are made before; "
        "paper is the loop of Choi et al. 2020, a generator against the student. One "
        f"of: {', '.join(QAT_RECIPES)}.",
        first=False,
    )
    common.define_config(
        group,
        DistillationConfig,
        PHASE_SETTINGS,
        prefix=_PREFIX,
        recipes={name: dataclasses.asdict(qat_recipe(name)) for name in QAT_RECIPES},
    )
    common.define_config("Reconstruction (df_rec)", ReconstructionConfig)
    common.define_config("Calibration", CalibrationConfig)
    common.define_config("Bit widths", BitWidths)


def qat_config() -> DistillationConfig:
    """The settings of warm-up and quantization-aware training, from the flags."""
    make = functools.partial(qat_recipe, FLAGS[f"{_PREFIX}recipe"].value)
    config = common.config_from_flags(DistillationConfig, _PREFIX, PHASE_SETTINGS, make)
    # Several students are for the distillation into another network.
    return dataclasses.replace(config, num_students=1)


def resolved_flags() -> dict[str, Any]:
    """Name -> value of the flags of training whose default is the recipe's."""
    named = {f"{_PREFIX}{k}": v for k, v in dataclasses.asdict(qat_config()).items()}
    return {name: value for name, value in named.items() if name in FLAGS}


def define_widths_flag() -> None:
    """Defines --widths, and the size by which widths may be chosen."""
    common.define(
        "Bit widths",
        "widths",
        str,
        BitWidths().name,
        "Bits of weights, 2 to 8, and of activations, 2 to 8 or 16, such as W4A8.",
    )
    common.define_config("Bit widths", FileConfig, SIZE_SETTINGS, first=True)


def widths_from_flags() -> BitWidths:
    """The bit widths that the flags ask for.

    Raises:
      ConfigError: --widths is not of that form, or a width is out of its limits.
    """
    return parse_widths(FLAGS.widths, common.config_from_flags(BitWidths))


def asked_widths() -> str:
    """What the flags ask of the file, for readers: its size, or else its widths."""
    sizes = {name: str(FLAGS[name].value) for name in SIZE_SETTINGS}
    return record.asked_widths({**sizes, "widths": widths_from_flags().name})


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What all methods of a run share: made when the first of them needs it.

    Attributes:
      teacher: the trained classifier.
      network: what is quantized, None for the teacher itself.
      workdir: keeps METHOD.keras, METHOD.png, checkpoints and metrics.
    """

    teacher: Classifier
    network: Classifier | None
    workdir: Workdir

    @functools.cached_property
    def config(self) -> DistillationConfig:
        """The settings, with a number for the batch size."""
        config, metrics = qat_config(), self.workdir.metrics()
        if config.batch_size == AUTO and metrics.get(_WARM_UP) == STUDENT:
            # The distillation's, with which the generators have been warmed up.
            distilled = metrics["student_training"]
            config = dataclasses.replace(config, batch_size=distilled["batch_size"])
        return with_batch_size(config, self.teacher, self.network, common.strategy())

    @functools.cached_property
    def prepared(self) -> api.Prepared:
        """Where the images come from, and all that is made of them."""
        calibration = common.config_from_flags(CalibrationConfig)
        return api.prepare(self.teacher, self._source, calibration, self._context)

    def check(self, method: str, file: FileConfig) -> None:
        """Raises ConfigError or UnsupportedLayerError for what would fail later."""
        api.check_quantizes(
            method,
            self.teacher,
            self._source,
            widths_from_flags(),
            common.config_from_flags(CalibrationConfig),
            file,
            self._context,
        )

    @property
    def _source(self) -> Classifier:
        return self.teacher if self.network is None else self.network

    @property
    def _context(self) -> Context[DistillationConfig]:
        return common.context(self.config, self.workdir.path)


def quantize_network(
    preparation: Preparation, method: str, file: FileConfig = FileConfig()
) -> tuple[QuantizedNetwork, bytes | None]:
    """Makes the quantized network, or reads it if an earlier run made it.

    Args:
      preparation: of the run.
      method: one of METHODS.
      file: what the TFLite file takes and gives.

    Returns:
      The network; and the content of its TFLite file, None where the network was read.
    """
    workdir, teacher = preparation.workdir, preparation.teacher
    path = workdir.path / f"{method}.keras"
    if common.is_made(path, description_path(path)):
        return api.load_quantized(path), None
    config = preparation.config
    common.say(plan(teacher, preparation.network, method, config))
    began = time.monotonic() - earlier_seconds(workdir, method)
    preparation.check(method, file)
    result = api.quantize_prepared(
        preparation.prepared,
        method,
        widths_from_flags(),
        common.config_from_flags(ReconstructionConfig),
        file,
    )
    seconds = round(time.monotonic() - began, 1)
    with common.stage("images held out"):
        same = _agreement(teacher, result, config, path)
    training: dict[str, Any] = {
        "seconds": seconds,
        "agreement_on_held_out_images": same,
        "batch_size": config.batch_size,
        "calibration_sources": {
            result.source.kind: len(result.prepared.calibrated.calibrating)
        },
        "images": result.source.name,
        "images_distance": result.source.distance,
        "expected_on": result.prepared.telling,
        **result.measurements,
    }
    training |= _tables(result, config)
    warm_up = warm_up_of(workdir, method)
    workdir.add_metrics(**{f"{method}_training": training}, **warm_up)
    _say_images(result)
    with common.stage(f"writing of {path.name}"):
        student.save(result.network, path)
    return result.network, result.tflite


def earlier_seconds(workdir: Workdir, method: str) -> float:
    """Seconds that calls which were interrupted have spent on a method.

    Args:
      workdir: of the run.
      method: one of METHODS.

    Returns:
      If its network is made, all that this took; else what its steps took until their
      newest checkpoints.
    """
    made = [name for name in METHODS if (workdir.path / f"{name}.keras").exists()]
    metrics = workdir.metrics()
    if method in made:
        return metrics.get(f"{method}_training", {}).get("seconds", 0.0)
    names = [*phases.run_names(method)] if method in TRAINING else []
    if metrics.get(_WARM_UP, method) == method:
        names.append("warm_up")
    if method in RECONSTRUCTING and not set(made) & set(RECONSTRUCTING):
        names += ["lessons", *run_names()]
    return seconds_in_steps(workdir.path, *names)


def warm_up_of(workdir: Workdir, name: str) -> dict[str, str]:
    """What metrics.json is to keep of whose time the warm-up counts in.

    Args:
      workdir: of the run.
      name: of what was made just now: a method, or STUDENT.

    Returns:
      Nothing where that is known already, or no generator was warmed up.
    """
    is_known = _WARM_UP in workdir.metrics()
    is_new = not is_known and seconds_in_steps(workdir.path, "warm_up") > 0
    return {_WARM_UP: name} if is_new else {}


def _say_images(result: api.Quantized) -> None:
    """Says which images calibrated and taught."""
    common.say(f"Images for the ranges: {result.source}")
    if share := result.measurements.get("photographs_share"):
        common.say(f"Learnt from {_lessons(share)} (--images=generated: none)")


def _lessons(photographs_share: float) -> str:
    """What blocks and students learnt from, photographs among it."""
    photographs = "crops of the photographs that ship with the project"
    if photographs_share == 1:
        return f"{photographs} alone"
    percent = f"{100 * photographs_share:.0f} %"
    return f"such images, {percent} of them replaced by {photographs}"


def plan(
    teacher: Classifier,
    network: Classifier | None,
    method: str,
    config: DistillationConfig,
) -> str:
    """One line: what is to be done, where, and with how much memory. Bars say how long.

    Args:
      teacher: the trained classifier.
      network: what is quantized; None for the teacher.
      method: one of METHODS.
      config: has a number for the batch size.
    """
    images = common.config_from_flags(CalibrationConfig).images
    kinds = {node.kind for node in teacher.graph.nodes.values()}
    has_memory = "batch_normalization" in kinds
    source = known_source(images, teacher.image_shape, has_memory)
    trains, work = method in TRAINING, ["calibration"]
    context, warm_up = common.context(config, pathlib.Path()), 0
    if source is not None and source not in SOURCES:
        work = [f"calibration on crops of {photographs.described(source)}"]
    needs = trains and config.needs_generators
    if needs or source in (GENERATED, None):
        unless = "" if needs or source else ", unless photographs are near"
        work.insert(0, f"up to {config.warm_up_steps:,} steps of warm-up{unless}")
        warm_up = phases.warm_up_batch(context)
    memory = "the program takes 1 to 2 GiB"
    if warm_up or trains:
        learns, students = network or teacher, phases.student_batch(context)
        largest = largest_step(
            teacher, learns if trains else None, config, warm_up, students
        )
        memory = common.step_memory(*largest)
    if method in RECONSTRUCTING:
        work.append("reconstruction of blocks")
        kept = BLOCK_MEMORY / 2**30
        memory += f"; what enters and leaves blocks takes up to {kept:g} GiB more"
    if trains:
        most = f", at most {config.max_minutes:g} minutes" if config.max_minutes else ""
        work.append(f"{config.rounds:,} rounds of training{most}")
        pool = phases.pool_bytes(config, teacher.image_shape)
        if pool > _WORTH_SAYING:
            memory += f"; the pool of images takes about {pool / 2**20:,.0f} MiB"
    return (
        f"{TITLES[method]} {asked_widths()}: {', '.join(work)}; on {common.device()}; "
        f"{memory}"
    )


def _tables(result: api.Quantized, config: DistillationConfig) -> dict[str, Any]:
    """What was chosen for layers, and done for blocks; it prints them too.

    It also prints what repeats a run of which the clock decided the length.
    """
    tables = {}
    for key, show in (("layers", as_table), ("blocks", blocks_as_table)):
        if parts := getattr(result, key):
            tables[key] = [dataclasses.asdict(part) for part in parts]
            common.say(show(parts))
    if "reconstruction_steps" in result.measurements:
        common.say(reconstruction_line(result))
    if "rounds" in result.measurements:
        common.say(training_line(result.measurements["rounds"], config))
    return tables


def training_line(rounds: float, config: DistillationConfig) -> str:
    """For how many rounds there was time; what repeats it on any machine."""
    return (
        f"Training: {rounds:.0f} of {config.rounds:,} rounds; "
        f"--qat_rounds={rounds:.0f} --qat_max_minutes=0 repeats it"
    )


def reconstruction_line(result: api.Quantized) -> str:
    """On how many images blocks have learnt, in how many steps; what repeats it."""
    steps, count = (
        result.measurements[f"reconstruction_{what}"] for what in ("steps", "images")
    )
    images = f"{count:,} images"
    if count < len(result.prepared.lessons):
        images = f"{count:,} of {len(result.prepared.lessons):,} images, for memory"
    return (
        f"Reconstruction: {steps:,} steps of each block, on {images}, those that "
        f"judge among them; --rec_steps={steps} --rec_minutes=0 repeats it"
    )


def blocks_as_table(blocks: Sequence[FittedBlock]) -> str:
    """A line for each block, for readers."""
    lines = [f"{'block, by its last layer':40} {'SQNR before':>12} {'after':>9}"]
    for block in blocks:
        before, after = block.before_db, block.after_db
        lines.append(f"{block.name:40} {before:>9.1f} dB {after:>6.1f} dB")
    return "\n".join(lines)


def _agreement(
    teacher: Classifier,
    result: api.Quantized,
    config: DistillationConfig,
    path: pathlib.Path,
) -> float:
    """Agreement on images held out, which it keeps, for other tools too.

    They are generated as the generators do at the end; without generators, of where
    the calibration images came from.

    Args:
      teacher: the trained classifier.
      result: has the network, and the generators as they are after its training.
      config: gives the batch size.
      path: of METHOD.keras; the files beside it are METHOD_images.npy and METHOD.png.
    """
    images, scores = result.held_out, result.prepared.answers
    if result.generators and result.generators is not result.prepared.generators:
        seed = common.config_from_flags(RunConfig).seed + 1
        images = Sampler(result.generators, config)(len(images), seed)
        scores = teacher.scores(images)
    with replacing(path.with_name(f"{path.stem}_images.npy")) as temporary:
        np.save(temporary, images)
    pictures.write_preview(images[:100], path.parent, path.stem)
    kind = GENERATED if result.generators else result.source.kind
    shown = facts.generated(images, scores, teacher.description, kind)
    facts.add(path.parent, path.stem, generated=shown)
    return agreement(result.network.scores(images), scores)


def measure_noise(
    source: Classifier,
    exact: Classifier,
    network: QuantizedNetwork,
    content: bytes,
    folder: pathlib.Path,
    method: str,
) -> layer_noise.LayerNoise:
    """Charts the noise of a file's layers, and keeps for the page what they hold.

    Args:
      source: the float network that was quantized.
      exact: the same, rewritten for integers, see `layer_noise.measure`.
      network: quantized.
      content: of its file.
      folder: has METHOD_images.npy, and gets METHOD_noise.csv and METHOD_noise.png.
      method: that made the file.

    Returns:
      The noisiest layer.
    """
    images = np.load(folder / f"{method}_images.npy")[:_NOISE_IMAGES]
    with common.stage(f"noise of the layers, {TITLES[method]}"):
        noise = layer_noise.measure(exact, content, images)
        title = f"{TITLES[method]} {asked_widths()}"
        layer_noise.write_report(noise, folder / f"{method}_noise", title)
    has_memory = not common.config_from_flags(CalibrationConfig).equalize
    layers = facts.layers(source, network, noise, has_memory)
    takes_16_bits = facts.takes_16_bits(network.graph)
    facts.add(folder, method, layers=layers, takes_16_bits=takes_16_bits)
    return layer_noise.worst(noise)


def check_settings(
    teacher: Classifier | None, methods: list[str], *widths: BitWidths
) -> None:
    """Raises, before any work, if a flag is wrong or a layer cannot be quantized.

    Makes the devices that train, and so comes before any network is read.

    Args:
      teacher: what is to be quantized, its weights of no matter; None where it is not
        read yet.
      methods: some of METHODS.
      *widths: that all its layers must be able to have, in a file of --target.
    """
    for method in methods:
        check_value("method", method, {"choices": METHODS})
    common.config_from_flags(RunConfig)
    config, file = qat_config(), common.config_from_flags(FileConfig)
    calibration = common.config_from_flags(CalibrationConfig)
    common.config_from_flags(ReconstructionConfig)
    for each in widths:
        check_target_takes(file, each)
    strategy = common.strategy()
    for method in methods:
        api.check_reconstructs(method, calibration, strategy)
    if config.batch_size != AUTO:
        check_batch(strategy, config.batch_size, config.num_generators)
    if teacher is not None:
        with common.stage("pictures"):
            check_source(calibration.images)
        if not set(methods).isdisjoint(TRAINING):
            api.check_trains(teacher)
        network = float_network(teacher)
        for each in widths:
            api.check_file(network, each, file)


def main() -> None:
    """Quantizes and reports."""
    if not FLAGS.teacher:
        raise ConfigError("teacher is empty; name a model file with --teacher")
    widths = widths_from_flags()
    check_settings(None, [FLAGS.method], widths)
    common.check_workdir(resolved=resolved_flags())
    teacher = teacher_flags.read_teacher(FLAGS.teacher)
    check_settings(teacher, [FLAGS.method], widths)
    workdir = common.open_workdir(
        resolved=resolved_flags(), makes=[page.NAME, f"{FLAGS.method}.keras"]
    )
    file = common.config_from_flags(FileConfig)
    preparation = Preparation(teacher, None, workdir)
    network, content = quantize_network(preparation, FLAGS.method, file)
    if content is None and "layers" not in facts.read(workdir.path, FLAGS.method):
        # An earlier run was interrupted before its noise was measured.
        content = convert.content_of(network, file)
    if content is not None:
        exact = float_network(teacher, common.config_from_flags(CalibrationConfig))
        measure_noise(teacher, exact, network, content, workdir.path, FLAGS.method)
    metrics = workdir.metrics()[f"{FLAGS.method}_training"]
    print(
        "Agreement with the teacher on images held out: "
        f"{100 * metrics['agreement_on_held_out_images']:.1f} %"
    )
    print(f"The page of the run: {page.write(workdir.path)}")
    student = f"{workdir.path / FLAGS.method}.keras"
    print(f"Wrote {student}; its file is made by")
    print(f"  {converting(student, file)}")


def converting(student: str, file: FileConfig) -> str:
    """The command that makes the file whose size the widths were chosen for."""
    flags = [
        f"--{name}={value}"
        for name in _OF_SIZE
        if (value := getattr(file, name)) != getattr(FileConfig(), name)
    ]
    return f"{common.command_of('convert')} {shlex.join([student, *flags])}"


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Teacher", "teacher", pathlib.Path, None, "Model file (.keras or .h5)."
    )
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
    common.define_config("TFLite file", FileConfig, _OF_SIZE)
    common.define_run_flags("runs/quantize")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
