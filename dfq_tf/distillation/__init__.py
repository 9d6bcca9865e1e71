"""Generators against students: the data-free training."""

from dfq_tf.distillation.batch_size import with_batch_size
from dfq_tf.distillation.budget import Budget, check_devices, plan_of_steps
from dfq_tf.distillation.generator import Sampler, held_out_count, make_generators
from dfq_tf.distillation.lessons import spread, synthesized
from dfq_tf.distillation.phases import WarmedUp, warmed_up
from dfq_tf.distillation.rounds import Rounds
from dfq_tf.distillation.sources import (
    Source,
    check_source,
    choose_source,
    known_source,
    photographs_share,
    with_photographs,
)
from dfq_tf.distillation.teacher import ObservedTeacher, observe

__all__ = [
    "Budget",
    "ObservedTeacher",
    "Rounds",
    "Sampler",
    "Source",
    "WarmedUp",
    "check_devices",
    "check_source",
    "choose_source",
    "held_out_count",
    "known_source",
    "make_generators",
    "observe",
    "photographs_share",
    "plan_of_steps",
    "spread",
    "synthesized",
    "warmed_up",
    "with_batch_size",
    "with_photographs",
]
