"""How many images a training step takes, so that it fits into memory.

Nothing here asks how much the machine has: the same command takes the same batches
everywhere, and a run continues on another machine as it began.
"""

import dataclasses
import functools
import math
import warnings
from typing import TypeVar

from dfq_tf.compat import tf
from dfq_tf.distillation.generator import build_generator
from dfq_tf.graph import FLOAT, Classifier, num_values
from dfq_tf.settings import AUTO, BudgetConfig, DistillationConfig
from dfq_tf.training import Learner, num_model_values, round_batch

C = TypeVar("C", bound=DistillationConfig | BudgetConfig)

# What one training step may take, in bytes. The program itself, its data and what the
# allocator keeps come on top: one to two GiB.
STEP_MEMORY = 4 * 2**30
# What the banked images may take, in bytes; a checkpoint copies them.
BANK_MEMORY = 512 * 2**20

_MOST_IMAGES, _LEAST_IMAGES = 128, 2
# Share of the outputs of teacher and students that a step keeps, of which some share
# their memory. Measured in float32 on a CPU, with all of the generator's, which it does
# keep: 0.46 for MobileNet V2 at 224x224, 0.6 for WRN-40-2 at 32x32, 0.68 for two
# convolutions at 512x512.
_KEPT = 0.75


def step_bytes_per_image(
    teacher: Classifier,
    network: Classifier | Learner,
    config: DistillationConfig | BudgetConfig,
) -> int:
    """About what a step of the generators takes per image, in bytes.

    That is the largest step: it goes through each generator, the teacher and all
    students, and back. A student counts twice, as fake quantization keeps one more
    copy of each output.

    Args:
      teacher: what the students learn from.
      network: a student, or what it is the quantized twin of.
      config: gives the number of generators and students.
    """
    generator = _generator_values(teacher.image_shape)
    networks = _num_values(teacher) + config.num_students * 2 * _num_values(network)
    values = _at_once(config) * (generator + _KEPT * networks)
    return math.ceil(FLOAT * values)


def _at_once(config: DistillationConfig | BudgetConfig) -> int:
    """Generators in a step; those of `budget` take turns."""
    return 1 if isinstance(config, BudgetConfig) else config.num_generators


def largest_step(
    teacher: Classifier,
    network: Classifier | Learner | None,
    config: DistillationConfig,
    warm_up: int,
    students: int,
) -> tuple[int, int]:
    """Images of the largest step of a training, and about its bytes.

    Args:
      teacher: what the students learn from.
      network: a student, or what it is the quantized twin of; None for a warm-up alone.
      config: gives the number of generators and students, and of their steps.
      warm_up: images of a step of the warm-up, which has no student; 0 for none.
      students: images of a step of the students; the teacher has answered them before.
    """
    shown = _generator_values(teacher.image_shape) + _KEPT * _num_values(teacher)
    steps = [(warm_up, math.ceil(FLOAT * config.num_generators * shown))]
    if network is not None:
        learnt = _KEPT * config.num_students * 2 * _num_values(network)
        steps.append((students, math.ceil(FLOAT * learnt)))
        if config.generator_steps:
            each = step_bytes_per_image(teacher, network, config)
            steps.append((config.batch_size, each))
    size, each = max(steps, key=lambda step: step[0] * step[1])
    return size, size * each


@functools.cache
def _generator_values(image_shape: tuple[int, int, int]) -> int:
    return num_model_values(build_generator(1, image_shape))


def _num_values(network: Classifier | Learner) -> int:
    if isinstance(network, Learner):
        return num_model_values(network.model)
    return num_values(network.graph)


def with_batch_size(
    config: C,
    teacher: Classifier,
    network: Classifier | Learner | None = None,
    strategy: tf.distribute.Strategy | None = None,
) -> C:
    """Settings with a number for the batch size; the same ones if they have it.

    In place of AUTO comes the largest power of two, from 2 to 128, whose step fits
    into STEP_MEMORY; on several devices, the next lower multiple of what they need, or
    else the least that they need.

    Args:
      config: the settings.
      teacher: what the students learn from.
      network: a student, or what it is the quantized twin of; None for the teacher.
      strategy: the devices that train; None for one.

    Warns:
      UserWarning: not even the smallest batch fits.
    """
    if config.batch_size != AUTO:
        return config
    each = step_bytes_per_image(teacher, network or teacher, config)
    fitting = max(_LEAST_IMAGES, min(_MOST_IMAGES, STEP_MEMORY // each))
    power = 2 ** math.floor(math.log2(fitting))
    batch_size = round_batch(strategy, power, _at_once(config))
    if batch_size * each > STEP_MEMORY:
        warnings.warn(
            f"a training step takes about {batch_size * each / 2**30:.1f} GiB of "
            f"memory, with the smallest batch, of {batch_size} images; smaller images "
            "or a smaller network take less",
            stacklevel=2,
        )
    return dataclasses.replace(config, batch_size=batch_size)
