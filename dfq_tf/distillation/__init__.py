"""Generators against students: the data-free training."""

from dfq_tf.distillation.batch_size import with_batch_size
from dfq_tf.distillation.generator import generate, held_out, make_generators
from dfq_tf.distillation.phases import WarmedUp, make_bank, warmed_up
from dfq_tf.distillation.teacher import observe

__all__ = [
    "WarmedUp",
    "generate",
    "held_out",
    "make_bank",
    "make_generators",
    "observe",
    "warmed_up",
    "with_batch_size",
]
