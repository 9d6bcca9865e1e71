"""Images from which blocks learn: better ones than those that calibrate, and slower.

A generator that is warmed up makes images much like each other. Here it goes on as that
of the recipe `budget` does (`synthesis`): for each batch it learns anew, from a start
that all batches learn together, and its noise is fitted too. What blocks learn from
such images holds for real ones (docs/experiments/few_bits.md).
"""

import math

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.context import Context
from dfq_tf.distillation import phases
from dfq_tf.distillation.pool import Store
from dfq_tf.distillation.synthesis import Synthesizer
from dfq_tf.settings import BudgetConfig, DistillationConfig
from dfq_tf.training import run_loop, with_precision

_NAME = "lessons"
# Batches that teach the start alone: the first ones are far from what BN remembers.
_FIRST = 16
# Of each batch: more than in `budget`, as few batches are made.
_STEPS = 10
# A mirror image may be of another class: of letters, say.
_AUGMENTATION = "crop"


def synthesized(
    warmed: phases.WarmedUp, count: int, context: Context[DistillationConfig]
) -> np.ndarray:
    """Images of batches that the generator learns for, each anew.

    Args:
      warmed: the teacher, with BN layers, and generators that are warmed up: the first
        one is the start, and none is changed.
      count: how many images.
      context: of the run, on one device; its directory keeps checkpoints.

    Returns:
      uint8 (count, height, width, channels).

    Raises:
      TrainingError: a loss or a weight became infinite or NaN.
    """
    size = phases.warm_up_batch(context)
    config = BudgetConfig(
        batch_size=size,
        generator_steps=_STEPS,
        student_augmentation=_AUGMENTATION,
        draws_first_layer=False,  # it is warmed up
    )
    generator = with_precision(warmed.generators[0], context.precision)
    synthesizer = Synthesizer(warmed.teacher, generator, (), config)
    num_batches = math.ceil(count / size)
    store = Store(num_batches, images=((size, *warmed.teacher.image_shape), tf.uint8))
    (make_batch,) = synthesizer.makers([store], context.seed)
    # The store is a ring: the newest batches take the places of the first ones.
    run_loop(
        _NAME,
        make_batch,
        _FIRST + num_batches,
        {"synthesizer": synthesizer, "images": store},
        context,
        identity={
            **phases.warm_up_identity(warmed.teacher, context),
            "images": str(count),
        },
        measure_every=1,
    )
    return store.all()["images"][:count]


def spread(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Images of both, as evenly spread as can be: any part has its share of each.

    Args:
      first: uint8 (m, height, width, channels).
      second: uint8 (n, height, width, channels).

    Returns:
      uint8 (m + n, height, width, channels), either's in their order.
    """
    places = [(np.arange(len(each)) + 0.5) / len(each) for each in (first, second)]
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate([first, second])[order]
