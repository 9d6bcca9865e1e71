"""What quantizing a network will cost on this machine: time and memory, measured."""

import dataclasses
import functools
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from dfq_tf.compat import tf
from dfq_tf.context import Context
from dfq_tf.distillation import (
    ObservedTeacher,
    choose_source,
    known_source,
    make_generators,
    observe,
    phases,
    steps,
    with_batch_size,
)
from dfq_tf.graph import Classifier
from dfq_tf.quantization import float_network, student, with_any_ranges
from dfq_tf.settings import (
    GENERATED,
    CalibrationConfig,
    DistillationConfig,
    RunConfig,
)
from dfq_tf.training import Copies, Learner, resolve_precision

# Images of the steps that are timed, fewer of large ones: what a step takes besides its
# images, which a multiple of it would count too often, tells less there.
_FEWEST, _MOST, _PIXELS = 8, 32, 32 * 96 * 96
# How often a step is timed; the least counts, since other work only adds to it.
_TIMES = 2
# What is asked about: a quantization by the defaults.
_CONFIG, _CALIBRATION, _RUN = DistillationConfig(), CalibrationConfig(), RunConfig()


@dataclasses.dataclass(frozen=True)
class Costs:
    """What to expect, roughly.

    Attributes:
      df_q_seconds: of the calibration, and of the generators' warm-up where their
        images calibrate.
      df_qat_kd_seconds: of those, and of the training behind them.
      memory_bytes: of the whole process at its peak.
      batch_size: images of a step.
      cores: of the processor, that were there for it.
    """

    df_q_seconds: float
    df_qat_kd_seconds: float
    memory_bytes: float
    batch_size: int
    cores: int


@dataclasses.dataclass(frozen=True)
class _Timed:
    """One kind of step.

    Attributes:
      compile_seconds: once, before the first of them.
      seconds: of a step.
      grown_bytes: by how much the first one has raised the peak of memory.
    """

    compile_seconds: float
    seconds: float
    grown_bytes: int


def measure(teacher: Classifier) -> Costs:
    """Takes a few steps of each kind, on few images, and multiplies.

    The first of each, which allocates, is not timed. The images of a pool are not
    counted: they cost little beside the steps.

    Args:
      teacher: what is to be quantized.
    """
    config, shape = with_batch_size(_CONFIG, teacher), teacher.image_shape
    batch = min(_MOST, max(_FEWEST, _PIXELS // (shape[0] * shape[1])))
    small = dataclasses.replace(config, batch_size=batch)
    precision = resolve_precision(_RUN.precision)
    context = Context(small, _RUN.seed, precision, None, None, False)
    full = dataclasses.replace(context, settings=config)
    observed = _observed(teacher, context)
    known = known_source(_CALIBRATION.images, shape, bool(observed.bn_inputs))
    has_generators = known in (GENERATED, None)
    state = _state(teacher, observed, context, has_generators)
    base = peak_bytes()
    timed = {"students": _timed(_learnt_from_pool(state, small), state, context)}
    if has_generators:
        timed["warm_up"] = _timed(steps.warm_up_step, state, context)
    # Photographs are looked at behind the steps, of whose memory that would hide some.
    source = known or choose_source(observed, _CALIBRATION.images, _RUN.seed).name
    if source != GENERATED:
        timed.pop("warm_up", None)
    warm_up, df_q_seconds = timed.get("warm_up"), 0.0
    if warm_up:
        images = config.warm_up_steps * phases.warm_up_batch(full)
        df_q_seconds = warm_up.compile_seconds + warm_up.seconds * images / batch
    # A calibration image passes networks about as often as one of such a step.
    seconds = (warm_up or timed["students"]).seconds / batch
    df_q_seconds += seconds * _CALIBRATION.image_count(shape)
    return Costs(
        df_q_seconds,
        df_q_seconds + _training_seconds(timed["students"], full, batch),
        _peak(base, timed, full, batch),
        config.batch_size,
        _cores(),
    )


def _training_seconds(
    students: _Timed, context: Context[DistillationConfig], batch: int
) -> float:
    """Of all behind the calibration, by steps on `batch` images."""
    config, size = context.settings, phases.student_batch(context)
    per_round = config.student_steps * students.seconds * size / batch
    most = 60 * config.max_minutes
    return students.compile_seconds + min(config.rounds * per_round, most)


def _learnt_from_pool(state: steps.State, config: DistillationConfig) -> Any:
    """A student step on answered images, with its share of the teacher's answers."""
    shape = state.teacher.image_shape
    images = tf.zeros((config.batch_size, *shape), tf.uint8)

    def step(
        state: steps.State, config: DistillationConfig, seed_and_step: tf.Tensor
    ) -> steps.Measurements:
        count = max(1, config.batch_size // config.answer_uses)
        answers, _ = state.teacher(tf.cast(images[:count], tf.float32))
        logits = tf.repeat(tf.reduce_mean(answers, 0, keepdims=True), len(images), 0)
        return steps.answered_step(state, config, images, logits, seed_and_step)

    return step


def _peak(
    base: float,
    timed: Mapping[str, _Timed],
    context: Context[DistillationConfig],
    batch: int,
) -> float:
    """The peak of a process that takes steps of their real sizes."""
    sizes = {
        "students": phases.student_batch(context),
        "warm_up": phases.warm_up_batch(context),
    }
    peak, grown = base, 0
    for name, each in timed.items():
        # The peak stays where the hungriest step so far has left it.
        grown += each.grown_bytes
        peak = max(peak, memory_bytes(base, grown, batch, sizes[name]))
    return peak


def memory_bytes(base: float, grown: float, measured: int, batch_size: int) -> float:
    """The peak of a process that trains.

    Args:
      base: what it has before the first step.
      grown: what steps on `measured` images have added.
      measured: images of a measured step.
      batch_size: images of a real one.
    """
    return base + grown * batch_size / measured


def _observed(
    teacher: Classifier, context: Context[DistillationConfig]
) -> ObservedTeacher:
    with warnings.catch_warnings():
        # Of a teacher without BN: whoever asks for costs says so better.
        warnings.simplefilter("ignore", UserWarning)
        return observe(teacher, context.precision)


def _state(
    teacher: Classifier,
    observed: ObservedTeacher,
    context: Context[DistillationConfig],
    has_generators: bool,
) -> steps.State:
    """Networks and optimizers of a training; the student's ranges mean nothing."""
    shape = teacher.image_shape
    generators = make_generators(shape, context) if has_generators else []
    quantized = with_any_ranges(float_network(teacher))
    learner = Learner(student.build(quantized), quantized.description)
    rounds = context.settings.rounds
    return phases.new_state(
        Copies(None), context, observed, generators, rounds, [learner]
    )


def _timed(
    step: Callable[..., Any], state: steps.State, context: Context[DistillationConfig]
) -> _Timed:
    began = time.perf_counter()
    compiled = phases.compiled(functools.partial(step, state, context.settings))
    compiled.get_concrete_function(tf.TensorSpec((2,), tf.int32))

    def take(index: int) -> float:
        started = time.perf_counter()
        results = compiled(tf.constant([context.seed, index]))
        _ = [value.numpy() for value in tf.nest.flatten(results)]  # waits for its end
        return time.perf_counter() - started

    before = peak_bytes()
    take(0)
    grown, compile_seconds = peak_bytes() - before, time.perf_counter() - began
    seconds = min(take(1 + i) for i in range(_TIMES))
    return _Timed(compile_seconds, seconds, grown)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
