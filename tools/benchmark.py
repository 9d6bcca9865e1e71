"""Times the training steps on random weights, and counts what they compute.

    python tools/benchmark.py --model=wrn_40_2 --student=wrn_16_1 --student_steps=1

For a float student and for a fake-quantized one: the median time of each step, its
floating-point operations by network and direction, and the share of the machine's
matrix peak that it reaches. A round is as the flags say. Run it on an idle machine; no
data is used.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common
from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.distillation import make_generators, observe, phases, steps, with_batch_size
from dfq_tf.graph import Classifier, ModelDescription
from dfq_tf.importing import as_classifier
from dfq_tf.quantization import calibrate, float_network, student, with_ranges
from dfq_tf.settings import (
    BitWidths,
    DistillationConfig,
    RunConfig,
    check_value,
    qat_recipe,
    recipe_settings,
)
from dfq_tf.training import Copies, Learner, resolve_precision, with_precision

FLAGS = common.FLAGS

# Side of the matrices whose product gives the peak.
_SIDE = 4096
# How networks of a step begin the names of their operations; all others are students.
_ROLES = ("generator", "teacher")


def median_seconds(step: Callable[[int], object], count: int) -> float:
    """Median time of `step(index)` over `count` calls, after three to warm up."""
    times = []
    for index in range(count + 3):
        began = time.perf_counter()
        step(index)
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


def matrix_peak(precision: str) -> float:
    """GFLOP/s of a large matrix product in float32 or bfloat16."""
    kind = {"float32": tf.float32, "bfloat16": tf.bfloat16}[precision]
    matrix = tf.cast(tf.random.stateless_normal((_SIDE, _SIDE), (0, 0)), kind)
    product = tf.function(lambda: tf.matmul(matrix, matrix)[0, 0])
    return 2 * _SIDE**3 / median_seconds(lambda _: product().numpy(), 5) / 1e9


def count_operations(graph: Any) -> dict[str, float]:
    """Floating-point operations of convolutions and dense layers in a step's graph.

    A multiplication and an addition are two. What goes over each value once (batch
    normalization, ReLU, sums, losses) is left out: it is bound by memory.

    Args:
      graph: of a step traced with batches of a known size.

    Returns:
      'teacher forward', 'generator backward', ... -> GFLOP.
    """
    counts: dict[str, float] = collections.defaultdict(float)
    for op in _live_operations(graph):
        if op.type in ("Conv2D", "DepthwiseConv2dNative"):
            values, kernel = op.outputs[0], op.inputs[1]
        elif op.type.endswith("BackpropInput"):
            values, kernel = op.inputs[2], op.inputs[1]
        elif op.type.endswith("BackpropFilter"):
            values, kernel = op.inputs[2], op.outputs[0]
        elif op.type == "MatMul":
            values, kernel = op.outputs[0], op.inputs[0]
        else:
            continue
        if op.type == "MatMul":
            products = kernel.shape[0 if op.get_attr("transpose_a") else 1]
        elif op.type.startswith("Depthwise"):
            products = np.prod(kernel.shape[:2])
        else:
            products = np.prod(kernel.shape[:3])
        scope = op.name.split("/")
        direction = "backward" if scope[0] == "gradient_tape" else "forward"
        name = scope[direction == "backward"]
        role = next((role for role in _ROLES if name.startswith(role)), "student")
        counts[f"{role} {direction}"] += 2 * values.shape.num_elements() * products
    return {key: count / 1e9 for key, count in sorted(counts.items())}


def _live_operations(graph: Any) -> set[Any]:
    """What a function runs: gradients that nobody asked for are traced, not run."""
    todo = [*(tensor.op for tensor in graph.outputs), *graph.control_outputs]
    live: set[Any] = set()
    while todo:
        op = todo.pop()
        if op not in live:
            live.add(op)
            todo += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    return live


def random_network(flag: str, classes: int, side: int) -> Learner:
    """The network that a flag names, its weights random, for side x side x 3 pixels."""
    shape = (side, side, 3)
    return Learner(
        models.build_model(FLAGS[flag].value, shape, classes, flag),
        ModelDescription((120,), (1 / 64,), "logits", tuple(map(str, range(classes)))),
    )


def time_steps(
    state: steps.State, config: DistillationConfig, count: int, peak: float
) -> dict[str, dict[str, Any]]:
    """Times each step, and a round of them.

    Args:
      state: the networks and what trains them.
      config: gives the batch size, the number of generators and the steps of a round.
      count: how often each step is timed.
      peak: GFLOP/s that the machine can do.

    Returns:
      Step -> seconds, operations in GFLOP, share of the peak.
    """
    results: dict[str, dict[str, Any]] = {}
    for step in (
        steps.warm_up_step,
        steps.generator_step,
        steps.student_step,
        _answered_step(state, config),
    ):
        compiled = phases.compiled(functools.partial(step, state, config))
        graph = compiled.get_concrete_function(tf.TensorSpec((2,), tf.int32)).graph

        def call(index: int, compiled: Callable = compiled) -> object:
            result = compiled(tf.constant([FLAGS.seed, index]))
            return [value.numpy() for value in tf.nest.flatten(result)]

        results[step.__name__] = _report(
            median_seconds(call, count), count_operations(graph), peak
        )
    is_fresh = not (config.bank_images or config.share_images)
    parts = {
        "generator_step": config.generator_steps,
        "student_step" if is_fresh else "answered_step": config.student_steps,
    }
    operations: dict[str, float] = collections.defaultdict(float)
    for name, times in parts.items():
        for key, value in results[name]["gflop"].items():
            operations[key] += times * value
    seconds = sum(times * results[name]["seconds"] for name, times in parts.items())
    results["round"] = _report(seconds, operations, peak)
    return results


def _answered_step(state: steps.State, config: DistillationConfig) -> Any:
    """The step on images whose answers are known, here random ones."""
    rng = np.random.default_rng(FLAGS.seed)
    shape = (config.batch_size, *state.students[0].image_shape)
    images = tf.constant(rng.integers(0, 256, shape, np.uint8))
    answers = rng.normal(size=(len(images), state.students[0].num_classes))
    logits = tf.constant(answers, tf.float32)

    def answered_step(
        state: steps.State, config: DistillationConfig, seed_and_step: tf.Tensor
    ) -> steps.Measurements:
        return steps.answered_step(state, config, images, logits, seed_and_step)

    return answered_step


def new_state(
    teacher: Classifier, students: list[Learner], context: Context[DistillationConfig]
) -> steps.State:
    """A training at its begin.

    Args:
      teacher: its images and classes are the students'.
      students: float or fake-quantized.
      context: gives the number of generators, the precision, and the seed.
    """
    generators = make_generators(teacher.image_shape, context)
    observed, rounds = observe(teacher, context.precision), context.settings.rounds
    return phases.new_state(
        Copies(None), context, observed, generators, rounds, students
    )


def quantized_twin(network: Learner) -> Learner:
    """A fake-quantized student, calibrated on noise."""
    shape = (64, *network.image_shape)
    noise = np.random.default_rng(FLAGS.seed).integers(0, 256, shape, np.uint8)
    exact = float_network(as_classifier(network))
    ranges = calibrate(exact, noise)
    quantized = with_ranges(exact, ranges, BitWidths())
    return Learner(student.build(quantized), quantized.description)


def _report(seconds: float, gflop: dict[str, float], peak: float) -> dict[str, Any]:
    share = sum(gflop.values()) / seconds / peak
    return {
        "seconds": round(seconds, 4),
        "gflop": {key: round(value, 3) for key, value in gflop.items()},
        "share_of_peak": round(share, 3),
    }


def main() -> None:
    """Times and reports."""
    make = functools.partial(qat_recipe, "paper")
    config = common.config_from_flags(DistillationConfig, make=make)
    run = common.config_from_flags(RunConfig)
    check_value("steps", FLAGS.steps, {"minimum": 1})
    keras.utils.set_random_seed(run.seed)
    teacher = as_classifier(random_network("model", 10, 32))
    flag = "student" if FLAGS.student else "model"
    networks = [random_network(flag, 10, 32) for _ in range(config.num_students)]
    config = with_batch_size(config, teacher, networks[0])
    precision = resolve_precision(run.precision)
    context = Context(config, run.seed, precision, None, None, False)
    floats = [
        Learner(with_precision(each.model, precision), each.description)
        for each in networks
    ]
    quantized = list(map(quantized_twin, networks))
    peak = matrix_peak(precision)
    report = {
        "teacher": FLAGS.model,
        "student": FLAGS[flag].value,
        "batch_size": config.batch_size,
        "num_generators": config.num_generators,
        "num_students": config.num_students,
        "precision": precision,
        "matrix_peak_gflops": round(peak),
    }
    for kind, students in (("float student", floats), ("QAT student", quantized)):
        state = new_state(teacher, students, context)
        with common.stage(f"steps of the {kind}"):
            report[kind] = time_steps(state, config, FLAGS.steps, peak)
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
    common.define_config(
        "Data-free training",
        DistillationConfig,
        recipe_settings("paper"),
        recipes={"paper": dataclasses.asdict(qat_recipe("paper"))},
    )
    common.define_config("Run", RunConfig, ("seed", "precision"))
    common.define_progress_flag()


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
