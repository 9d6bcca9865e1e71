"""What a training step does about the other replicas that take it at the same time.

Each replica has an equal share of the step's batch. In a step that runs on one device,
and outside of steps, all of this does nothing and adds no operation.
"""

from typing import Any

from dfq_tf.compat import tf


def num_replicas() -> int:
    """How many replicas run the step that this is called in; 1 outside of one."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_mean(tensors: Any) -> Any:
    """The mean over the replicas of a tensor that each has; it has a gradient.

    Args:
      tensors: one, or a structure of them; the same shapes on all replicas.
    """
    if num_replicas() == 1:
        return tensors
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, tensors)


def replica_slice(batch: tf.Tensor) -> tf.Tensor:
    """This replica's part of the whole batch, which must divide: (batch / n, ...)."""
    if num_replicas() == 1:
        return batch
    index = tf.distribute.get_replica_context().replica_id_in_sync_group
    return tf.reshape(batch, (num_replicas(), -1, *batch.shape[1:]))[index]


def replica_concat(part: tf.Tensor) -> tf.Tensor:
    """The whole batch of the parts that each replica has, as `replica_slice` cut it.

    Args:
      part: (batch / n, ...), of float32 or another type that TensorFlow can gather:
        uint8 is none.
    """
    if num_replicas() == 1:
        return part
    part = tf.identity(part)  # on this replica's device: an argument is on none
    return tf.distribute.get_replica_context().all_gather(part, axis=0)
