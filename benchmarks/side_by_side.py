"""Times our generator and student steps beside two others, in turn, on one machine.

    python benchmarks/side_by_side.py

- ours: tools/benchmark.py's steps, float and fake-quantized student;
- plain: the same steps with the generator written the usual way, `UpSampling2D` and
  a 3x3 convolution, and the float student in mixed bfloat16 too.

WRN-16-1 to WRN-16-1, batch 128, random weights. One round is one generator step and
one student step; the rounds alternate, so that a drift of the machine meets all.
"""

import functools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.distillation import phases, steps
from dfq_tf.distillation.generator import ToPixels, make_generators
from dfq_tf.distillation.teacher import observe
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import student as quantized_student
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import CalibrationConfig, DistillationConfig
from dfq_tf.training import optimizers
from dfq_tf.training.copies import resolve_precision, with_precision
from dfq_tf.training.learner import Learner

ROUNDS = 15
layers = keras.layers


def plain_generator(noise_dim: int) -> keras.Model:
    """The usual generator for 32x32 images, with UpSampling2D."""
    noise = x = layers.Input((noise_dim,))
    x = layers.Reshape((8, 8, 128))(layers.Dense(8 * 8 * 128)(x))
    x = layers.BatchNormalization()(x)
    for filters in (128, 64):
        x = layers.UpSampling2D()(x)
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.LeakyReLU(0.2)(layers.BatchNormalization()(x))
    x = layers.Conv2D(3, 3, padding="same")(x)
    return keras.Model(noise, ToPixels(dtype="float32")(x))


def network() -> Learner:
    """WRN-16-1 with random weights."""
    description = ModelDescription((120,), (1 / 64,), "logits", tuple("0123456789"))
    return Learner(models.build_model("wrn_16_1", (32, 32, 3), 10), description)


def one_round(generator: keras.Model, student: Learner, config, teacher):
    """A function that runs one generator step and one student step."""
    state = steps.State(
        teacher,
        [generator],
        [optimizers.adam(generator, 1e-3, 1000)],
        [student],
        [optimizers.sgd(student.model, 1e-3, 1000, 0.9)],
    )
    compiled = [
        phases.compiled(functools.partial(step, state, config))
        for step in (steps.generator_step, steps.student_step)
    ]

    def run(index: int) -> None:
        for step in compiled:
            for value in tf.nest.flatten(step(tf.constant([0, index]))):
                value.numpy()

    return run


def main() -> None:
    """Times and prints the medians."""
    keras.utils.set_random_seed(0)
    config = DistillationConfig(batch_size=128)
    precision = resolve_precision("auto")
    teacher = as_classifier(network())
    observed = observe(teacher, precision)
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    calibration = CalibrationConfig(bias_correction=False)
    quantized = post_training(float_network(teacher), noise, config=calibration)
    twin = Learner(quantized_student.build(quantized), quantized.description)
    half = network()
    half = Learner(with_precision(half.model, precision), half.description)
    plain = with_precision(plain_generator(config.noise_dim), precision)
    context = Context(config, 0, precision, None, None, False)
    first, second = (make_generators(teacher.image_shape, context)[0] for _ in "ab")
    rounds = {
        "plain generator, bfloat16 student": one_round(plain, half, config, observed),
        "ours, float32 student": one_round(first, network(), config, observed),
        "ours, fake-quantized student": one_round(second, twin, config, observed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    for index in range(ROUNDS + 2):
        for name, run in rounds.items():
            began = time.perf_counter()
            run(index)
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        median = statistics.median(times[2:])
        print(
            f"{name:36} {median:.3f} s, {2 * config.batch_size / median:.0f} images/s"
        )


if __name__ == "__main__":
    main()
