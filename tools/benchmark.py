"""Times one generator step and one student step, on random weights.

    python tools/benchmark.py --model=wrn_16_1

Reports the median over --steps of each, for a float student and for a fake-quantized
one. Run it on an idle machine; no data is used.
"""

import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf import bn_statistics, calibration, models, optimizers, steps, training
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import BitWidths, DistillationConfig, RunConfig
from dfq_tf.description import ModelDescription
from dfq_tf.precision import resolve_precision, with_precision
from dfq_tf.quantization import apply
from tools import common

FLAGS = common.FLAGS


def median_seconds(step: Callable[[int], object], count: int) -> float:
    """Median time of `step(index)` over `count` calls, after three to warm up."""
    times = []
    for index in range(count + 3):
        began = time.perf_counter()
        step(index)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def random_classifier(name: str, classes: int, side: int) -> Classifier:
    """A network with random weights, for images of side x side x 3."""
    return Classifier(
        models.build_model(name, (side, side, 3), classes),
        ModelDescription((120,), (1 / 64,), "logits", tuple(map(str, range(classes)))),
    )


def time_steps(
    teacher: Classifier, student: Classifier, config: DistillationConfig, count: int
) -> dict[str, float]:
    """Median seconds of each step.

    Args:
      teacher: its images and classes are the student's.
      student: float or fake-quantized.
      config: gives the batch size.
      count: how often each step is timed.
    """
    run = common.config_from_flags(RunConfig)
    generators = training.make_generators(teacher, config, run.seed, run.precision)
    state = steps.State(
        bn_statistics.observe(teacher, run.precision),
        generators,
        [optimizers.adam(g, 1e-3, 1000) for g in generators],
        [student],
        [training.student_optimizer(student.model, config)],
    )
    seconds = {}
    for step in (steps.warm_up_step, steps.generator_step, steps.student_step):
        compiled = training.compiled(functools.partial(step, state, config))

        def call(index: int, compiled: Callable = compiled) -> object:
            result = compiled(tf.constant([run.seed, index]))
            return [value.numpy() for value in tf.nest.flatten(result)]

        seconds[step.__name__] = median_seconds(call, count)
    compiled = training.compiled(functools.partial(steps.banked_step, state, config))
    rng = np.random.default_rng(run.seed)
    shape = (config.batch_size, *teacher.image_shape)
    images = tf.constant(rng.integers(0, 256, shape, np.uint8))
    logits = tf.constant(rng.normal(size=(len(images), 10)), tf.float32)
    seconds["banked_step"] = median_seconds(
        lambda _: [value.numpy() for value in compiled(images, logits).values()], count
    )
    return seconds


def main() -> None:
    """Times and reports."""
    config = common.config_from_flags(DistillationConfig)
    run = common.config_from_flags(RunConfig)
    keras.utils.set_random_seed(run.seed)
    teacher = random_classifier(FLAGS.model, 10, 32)
    name = FLAGS.student or FLAGS.model
    student = random_classifier(name, 10, 32)
    half = with_precision(student.model, run.precision)
    graph, description = apply.integer_ready(student)
    noise = np.random.default_rng(run.seed).integers(0, 256, (64, 32, 32, 3), np.uint8)
    ranges = calibration.calibrate(graph, description, noise)
    quantized = apply.quantize_graph(graph, description, BitWidths(), ranges)
    results = {}
    for kind, model in (
        ("float student", Classifier(half, student.description)),
        ("QAT student", quantized),
    ):
        seconds = time_steps(teacher, model, config, FLAGS.steps)
        pair = seconds["generator_step"] + seconds["student_step"]
        results[kind] = {**seconds, "images_per_second": 2 * config.batch_size / pair}
    report = {
        "teacher": FLAGS.model,
        "student": name,
        "batch_size": config.batch_size,
        "precision": resolve_precision(run.precision),
        **results,
    }
    print(json.dumps(report, indent=2))


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define("Networks", "model", str, "wrn_16_1", "Network that is the teacher.")
    common.define(
        "Networks",
        "student",
        str,
        None,
        "Network that is the student (default: that of --model).",
    )
    common.define("Timing", "steps", int, 15, "How often each step is timed.")
    common.define_config("Data-free training", DistillationConfig)
    common.define_config("Run", RunConfig, common.ONE_DEVICE)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
