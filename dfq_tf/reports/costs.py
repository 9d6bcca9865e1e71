"""What quantizing a network will cost on this machine: time and memory, measured."""

import dataclasses
import functools
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from dfq_tf.compat import tf
from dfq_tf.distillation import phases, steps
from dfq_tf.distillation import teacher as bn_statistics
from dfq_tf.graph.classifier import Classifier
from dfq_tf.quantization import apply
from dfq_tf.settings import BitWidths, CalibrationConfig, DistillationConfig, RunConfig
from dfq_tf.training import memory, optimizers

# Images of the steps that are timed, fewer of large ones: what a step takes besides its
# images, which a multiple of it would count too often, tells less there.
_FEWEST, _MOST, _PIXELS = 8, 32, 32 * 96 * 96
# How often a step is timed; the least counts, since other work only adds to it.
_TIMES = 2


@dataclasses.dataclass(frozen=True)
class Costs:
    """What to expect, roughly.

    Attributes:
      df_q_seconds: of generator warm-up and calibration.
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


def measure(
    teacher: Classifier,
    config: DistillationConfig = DistillationConfig(),
    calibration: CalibrationConfig = CalibrationConfig(),
    run: RunConfig = RunConfig(),
) -> Costs:
    """Takes a few steps of each kind, on few images, and multiplies.

    The first of each, which allocates, is not timed. The teacher is not changed.

    Args:
      teacher: what is to be quantized.
      config: says how many steps there are, and of how many images; it keeps no bank
        of images.
      calibration: says how many images it takes.
      run: seed and precision.
    """
    config = memory.with_batch_size(config, teacher.model)
    height, width, _ = teacher.image_shape
    batch = min(_MOST, max(_FEWEST, _PIXELS // (height * width)))
    batch = max(batch, config.num_generators)
    small = dataclasses.replace(config, batch_size=batch)
    with warnings.catch_warnings():
        # Of a teacher without BN: whoever asks for costs says so better.
        warnings.simplefilter("ignore", UserWarning)
        observed = bn_statistics.observe(teacher, run.precision)
    generators = phases.make_generators(teacher, small, run.seed, run.precision)
    student = _student(teacher)
    state = steps.State(
        observed,
        generators,
        [optimizers.adam(g, small.generator_learning_rate, 2) for g in generators],
        [student],
        [phases.student_optimizer(student.model, small)],
    )
    base = _peak_bytes()
    warm_up = _timed(steps.warm_up_step, state, small, run.seed)
    generator = _timed(steps.generator_step, state, small, run.seed)
    student_step = _timed(steps.student_step, state, small, run.seed)
    times = config.batch_size / batch
    per_step = (
        config.generator_steps * generator.seconds
        + config.student_steps * student_step.seconds
    )
    # A calibration image passes networks about as often as one of the warm-up.
    df_q = warm_up.compile_seconds + warm_up.seconds * (
        times * config.warm_up_steps + calibration.calibration_images / batch
    )
    training_seconds = times * config.rounds * per_step
    compile_seconds = generator.compile_seconds + student_step.compile_seconds
    # The peak stays where the hungriest step has left it.
    grown = sum(t.grown_bytes for t in (warm_up, generator, student_step))
    return Costs(
        df_q,
        df_q + compile_seconds + training_seconds,
        memory_bytes(base, grown, batch, config.batch_size),
        config.batch_size,
        _cores(),
    )


def memory_bytes(base: float, grown: float, measured: int, batch_size: int) -> float:
    """The peak of a process that trains.

    Args:
      base: what it has before the first step.
      grown: what steps on `measured` images have added.
      measured: images of a measured step.
      batch_size: images of a real one.
    """
    return base + grown * batch_size / measured


def _student(teacher: Classifier) -> Classifier:
    """A quantized student whose ranges mean nothing: its steps take as long."""
    graph, description = apply.integer_ready(teacher)
    anything = dict.fromkeys(apply.quantized_nodes(graph), (-1.0, 1.0))
    ranges = apply.checked_ranges(graph, description, anything)
    return apply.quantize_graph(graph, description, BitWidths(), ranges, "min_max")


def _timed(
    step: Callable[..., Any], state: steps.State, config: DistillationConfig, seed: int
) -> _Timed:
    began = time.perf_counter()
    compiled = phases.compiled(functools.partial(step, state, config))
    compiled.get_concrete_function(tf.TensorSpec((2,), tf.int32))

    def take(index: int) -> float:
        started = time.perf_counter()
        results = compiled(tf.constant([seed, index]))
        _ = [value.numpy() for value in tf.nest.flatten(results)]  # waits for its end
        return time.perf_counter() - started

    before = _peak_bytes()
    take(0)
    grown, compile_seconds = _peak_bytes() - before, time.perf_counter() - began
    seconds = min(take(1 + i) for i in range(_TIMES))
    return _Timed(compile_seconds, seconds, grown)


def _peak_bytes() -> int:
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
