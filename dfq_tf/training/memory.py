"""How many images go through networks together, so that they fit into memory.

Nothing here asks how much the machine has: the same command takes the same batches
everywhere, and a run continues on another machine as it began.
"""

import dataclasses
import math
import warnings
from typing import Any

from dfq_tf.compat import keras, tf
from dfq_tf.distillation.generator import build_generator
from dfq_tf.graph.graph import Graph
from dfq_tf.settings import AUTO, DistillationConfig
from dfq_tf.training.devices import round_batch

# What one training step may take, in bytes. The program itself, its data and what the
# allocator keeps come on top: one to two GiB.
STEP_MEMORY = 4 * 2**30
# What a pass without gradients may take: more images would not make it faster.
PASS_MEMORY = 2 * 2**30
# What the banked images may take, in bytes; a checkpoint copies them.
BANK_MEMORY = 512 * 2**20

FLOAT = 4  # bytes of a value

_MOST_IMAGES, _LEAST_IMAGES = 128, 2
# Share of the outputs of teacher and students that a step keeps, of which some share
# their memory. Measured in float32 on a CPU, with all of the generator's, which it does
# keep: 0.46 for MobileNet V2 at 224x224, 0.6 for WRN-40-2 at 32x32, 0.68 for two
# convolutions at 512x512.
_KEPT = 0.75


def outputs_size(model: keras.Model) -> int:
    """Values in the outputs of all layers of a model, for one image."""
    return graph_size(Graph.from_model(model))


def graph_size(graph: Graph) -> int:
    """Values in the outputs of all nodes, for one image."""
    return sum(math.prod(node.shape) for node in graph.nodes.values())


def largest_tensor(function: Any) -> int:
    """Values in the largest tensor of a compiled function, for one image.

    Args:
      function: from `compat.traced`, for batches of any size.
    """
    shapes = [
        tensor.shape
        for operation in function.graph.get_operations()
        for tensor in operation.outputs
    ]
    return max(
        math.prod(shape[1:])
        for shape in shapes
        if shape.rank and shape[0] is None and shape[1:].is_fully_defined()
    )


def images_per_pass(bytes_per_image: int, most: int, least: int = 1) -> int:
    """How many images go through a network: as many as PASS_MEMORY has room for.

    Args:
      bytes_per_image: what is alive at a time.
      most: as many at most.
      least: as many in any case.
    """
    return max(least, min(most, PASS_MEMORY // bytes_per_image))


def step_bytes_per_image(
    teacher: keras.Model, network: keras.Model, config: DistillationConfig
) -> int:
    """About what a step of the generators takes per image, in bytes.

    That is the largest step: it goes through each generator, the teacher and all
    students, and back. A student counts twice, as fake quantization keeps one more
    copy of each output.

    Args:
      teacher: from images to scores.
      network: of the students, or what they are the quantized twins of.
      config: gives the number of generators and students.
    """
    generator = build_generator(1, tuple(teacher.input_shape[1:]))
    networks = outputs_size(teacher) + config.num_students * 2 * outputs_size(network)
    values = config.num_generators * (outputs_size(generator) + _KEPT * networks)
    return math.ceil(FLOAT * values)


def with_batch_size(
    config: DistillationConfig,
    teacher: keras.Model,
    network: keras.Model | None = None,
    strategy: tf.distribute.Strategy | None = None,
) -> DistillationConfig:
    """Settings with a number for the batch size; the same ones if they have it.

    In place of AUTO comes the largest power of two, from 2 to 128, whose step fits
    into STEP_MEMORY; on several devices, the next lower multiple of what they need, or
    else the least that they need.

    Args:
      config: the settings.
      teacher: from images to scores.
      network: of the students, or what they are the quantized twins of; None for the
        teacher.
      strategy: the devices that train; None for one.

    Warns:
      UserWarning: not even the smallest batch fits.
    """
    if config.batch_size != AUTO:
        return config
    each = step_bytes_per_image(teacher, network or teacher, config)
    fitting = max(_LEAST_IMAGES, min(_MOST_IMAGES, STEP_MEMORY // each))
    power = 2 ** math.floor(math.log2(fitting))
    batch_size = round_batch(strategy, power, config.num_generators)
    if batch_size * each > STEP_MEMORY:
        warnings.warn(
            f"a training step takes about {batch_size * each / 2**30:.1f} GiB of "
            f"memory, with the smallest batch, of {batch_size} images; smaller images "
            "or a smaller network take less",
            stacklevel=2,
        )
    return dataclasses.replace(config, batch_size=batch_size)
