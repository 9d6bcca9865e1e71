"""What any training needs: loop, optimizers, devices, timing."""

from dfq_tf.training.augmentation import augment, augment_pixels, flip
from dfq_tf.training.copies import randomized, resolve_precision, with_precision
from dfq_tf.training.devices import (
    Copies,
    check_batch,
    check_device,
    check_one_process,
    everywhere,
    round_batch,
)
from dfq_tf.training.learner import (
    Learner,
    check_model,
    drawn_by,
    num_model_values,
    random_states,
)
from dfq_tf.training.loop import Evaluate, begin_anew, run_loop, seconds_in_steps
from dfq_tf.training.optimizers import descend
from dfq_tf.training.replicas import replica_concat, replica_mean, replica_slice
from dfq_tf.training.timing import mean_seconds, unchanged

__all__ = [
    "Copies",
    "Evaluate",
    "Learner",
    "augment",
    "augment_pixels",
    "begin_anew",
    "check_batch",
    "check_device",
    "check_model",
    "check_one_process",
    "descend",
    "drawn_by",
    "everywhere",
    "flip",
    "mean_seconds",
    "num_model_values",
    "random_states",
    "randomized",
    "replica_concat",
    "replica_mean",
    "replica_slice",
    "resolve_precision",
    "round_batch",
    "run_loop",
    "seconds_in_steps",
    "unchanged",
    "with_precision",
]
