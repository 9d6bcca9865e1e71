"""Several devices that train as one: a step's batch is shared out between replicas.

What a step computes is what one device would compute on the whole batch: terms of the
whole batch take their means over all replicas, noise is drawn for the whole batch and
cut (`replicas`), and gradients are averaged (`optimizers`). Several processes, each a
worker with devices of its own, do the same over a network. But a batch that does not
divide between the replicas is another one than on one device: see `round_batch`.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf, tfmot, traced
from dfq_tf.errors import ConfigError, TrainingError
from dfq_tf.settings import AUTO, STRATEGIES, check_value
from dfq_tf.training.copies import cloned
from dfq_tf.training.replicas import num_replicas, replica_concat, replica_mean

_EXAMPLE = (
    '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, '
    '"task": {"type": "worker", "index": 0}}'
)

# How TensorFlow says, depending on when it notices, that a worker is gone.
LOST_WORKER = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnavailableError,
)


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Which devices train.

    Args:
      name: 'none', one device; 'mirrored', all GPUs of this machine, or its logical
        CPUs where it has no GPU; 'multi_worker', the workers that TF_CONFIG names, of
        which this process is one. The last must be made before TensorFlow has
        computed anything, and waits for the other workers.

    Raises:
      ConfigError: there is no such name, or TF_CONFIG is not as it must be.

    Warns:
      UserWarning: there is one CPU in the place of GPUs.
    """
    check_value("distribute", name, {"choices": STRATEGIES})
    if name == "none":
        return tf.distribute.get_strategy()
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU")
        devices = devices or tf.config.list_logical_devices("CPU")
        if [device.device_type for device in devices] == ["CPU"]:
            warnings.warn(
                "distribute is mirrored, for all GPUs, but TensorFlow sees none: the "
                "CPU trains. docs/devices.md, in the project's folder, says how "
                "TensorFlow finds a GPU",
                stacklevel=2,
            )
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    text = os.environ.get("TF_CONFIG", "")
    _check_tf_config(text)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    # Among others: the port is taken, or TensorFlow was in use before.
    except (tf.errors.OpError, RuntimeError) as error:
        raise ConfigError(
            f"TF_CONFIG is {text!r}: the workers cannot be started, for {error}"
        ) from error


def _check_tf_config(text: str) -> None:
    """Raises ConfigError unless it names workers, and which of them this one is."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(
            f"TF_CONFIG is {text!r}: {problem}. distribute=multi_worker needs it in "
            "the environment of each worker, with an index of its own, such as "
            f"TF_CONFIG='{_EXAMPLE}'"
        )

    if not text:
        raise refuse("it is not set")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise refuse(f"it is not JSON ({error})") from error
    cluster = config.get("cluster") if isinstance(config, dict) else None
    if not isinstance(cluster, dict) or set(cluster) != {"worker"}:
        raise refuse("its cluster must list workers, and nothing else")
    workers = cluster["worker"]
    if (
        not isinstance(workers, list)
        or not workers
        or not all(map(_is_address, workers))
    ):
        raise refuse("its workers must be a list of host:port")
    if len(set(workers)) < len(workers):
        raise refuse("two of its workers have the same host:port")
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") != "worker":
        raise refuse("its task must be of type worker")
    index = task.get("index")
    if type(index) is not int or not 0 <= index < len(workers):
        raise refuse(f"the index of its task must be in 0 to {len(workers) - 1}")


def _is_address(value: Any) -> bool:
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def worker_index(strategy: tf.distribute.Strategy | None) -> int:
    """Which of the workers this process is; 0 where there is one process."""
    if strategy is None or _num_workers(strategy) == 1:
        return 0
    return strategy.cluster_resolver.task_id


def check_one_process(strategy: tf.distribute.Strategy | None, what: str) -> None:
    """Raises ConfigError if several workers would do what one does by itself.

    Args:
      strategy: None for one device.
      what: is done, for the message.
    """
    if strategy is not None and _num_workers(strategy) > 1:
        raise ConfigError(
            f"distribute is multi_worker, of {_num_workers(strategy)} workers, but "
            f"{what} is for one process; run it with --distribute=none on one machine"
        )


def check_batch(
    strategy: tf.distribute.Strategy | None,
    batch_size: int,
    num_generators: int = 1,
    name: str = "batch_size",
) -> None:
    """Raises ConfigError unless a batch has a size, and each replica an equal share.

    Args:
      strategy: None for one device.
      batch_size: images per step, of all replicas together.
      num_generators: each makes an equal part of a batch.
      name: what the batch size is called.
    """
    count = _num_replicas(strategy)
    multiple = count * num_generators
    if batch_size == AUTO:
        raise ConfigError(
            f"{name} is {AUTO}, auto, where a number is needed; "
            "batch_size.with_batch_size finds one, or name it"
        )
    if count > 1 and batch_size % multiple:
        parts = (
            f", for each of {num_generators} generators" if num_generators > 1 else ""
        )
        raise ConfigError(
            f"{name} is {batch_size}, which does not divide into equal shares for "
            f"{count} replicas{parts}; it must be a multiple of {multiple}, such as "
            f"{-(-batch_size // multiple) * multiple}. Or train on fewer devices, with "
            "--distribute=none on one"
        )


def round_batch(
    strategy: tf.distribute.Strategy | None, batch_size: int, num_generators: int = 1
) -> int:
    """A batch like the given one that `check_batch` allows.

    Args:
      strategy: None for one device.
      batch_size: is not exceeded, unless each replica and generator needs an image.
      num_generators: each makes a part of a batch.
    """
    count = _num_replicas(strategy)
    if count == 1:
        return max(batch_size, num_generators)
    multiple = count * num_generators
    return max(multiple, batch_size // multiple * multiple)


def check_device(strategy: tf.distribute.Strategy | None) -> None:
    """Raises ConfigError for one device that is not the first: that would train.

    Args:
      strategy: None for the first device.
    """
    if strategy in (None, tf.distribute.get_strategy()) or _num_replicas(strategy) > 1:
        return
    (name, *_) = strategy.extended.worker_devices
    device = tf.DeviceSpec.from_string(name)
    if device.device_index:
        raise ConfigError(
            f"strategy is of {device.device_type}:{device.device_index} alone, and one "
            "device trains where TensorFlow puts it, on the first. Hide the others "
            "before TensorFlow starts, as with CUDA_VISIBLE_DEVICES="
            f"{device.device_index}, and give no strategy"
        )


def everywhere(
    step: Callable[..., Any], strategy: tf.distribute.Strategy | None
) -> Callable[..., Any]:
    """A function that runs a step on all replicas, to be compiled.

    Args:
      step: takes whole batches; what it gives must be the same on all replicas.
      strategy: None for one device; with one replica the result is the step itself.
    """
    if strategy is None or _num_replicas(strategy) == 1:
        return step

    @functools.wraps(step)
    def first_of_all(*arguments: Any) -> Any:
        return tf.nest.map_structure(
            lambda result: strategy.experimental_local_results(result)[0],
            strategy.run(step, arguments),
        )

    return first_of_all


def scope(strategy: tf.distribute.Strategy | None) -> Any:
    """A `with` block in which variables are made on all replicas.

    Args:
      strategy: None for one device.
    """
    if strategy is None or _num_replicas(strategy) == 1:
        return contextlib.nullcontext()
    return strategy.scope()


class Copies:
    """Copies of models, with variables on all replicas, and the way back.

    With one replica there are none: models stand for themselves.

    Args:
      strategy: None for one device.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None) -> None:
        self._strategy: Any = strategy
        self._pairs: list[tuple[keras.Model, keras.Model]] = []

    def of(self, model: keras.Model) -> keras.Model:
        """A copy whose BN layers, when training, see the whole batch.

        Each worker's copy holds the values that worker 0 has: what the others have
        computed themselves may differ by rounding.
        """
        if _num_replicas(self._strategy) == 1:
            return model
        with scope(self._strategy), tfmot.quantization.keras.quantize_scope():
            copy = cloned(model, _copied)
        copy.set_weights(from_first_worker(self._strategy, model.get_weights()))
        self._pairs.append((model, copy))
        return copy

    def write_back(self) -> None:
        """Gives the models the values that their copies have now."""
        for model, copy in self._pairs:
            model.set_weights(copy.get_weights())

    def up_to_date(self, function: Callable[[], Any] | None) -> Any:
        """A function of the models that sees them as their copies are now."""
        if function is None or not self._pairs:
            return function

        def called() -> Any:
            self.write_back()
            return function()

        return called


def _copied(layer: keras.layers.Layer, gives_output: bool) -> keras.layers.Layer:
    kind = layer.__class__
    if isinstance(layer, keras.layers.BatchNormalization):
        kind = _WholeBatchNormalization
    return kind.from_config(layer.get_config())


class _WholeBatchNormalization(keras.layers.BatchNormalization):
    """Statistics of the whole batch, computed as one device does.

    Keras' own synchronized layer takes the variance as E[x^2] - E[x]^2, which loses
    digits, and stores a variance that is smaller than that of one device.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: Any = None
    ) -> tf.Tensor:
        """Normalises; `training` must be known when the function is traced."""
        if not training or not self.trainable:
            return super().call(inputs, training=False)
        values = tf.cast(inputs, tf.float32)
        axes = [i for i in range(values.shape.rank) if i not in self.axis]
        mean = replica_mean(tf.reduce_mean(values, axes, keepdims=True))
        squares = tf.math.squared_difference(values, mean)
        variance = replica_mean(tf.reduce_mean(squares, axes, keepdims=True))
        unbiased = variance
        if self.fused:  # as the layer then does on one device
            number = tf.cast(tf.size(values) / tf.size(mean), tf.float32)
            number *= num_replicas()
            unbiased = variance * number / tf.maximum(number - 1, 1)
        for stored, value in (
            (self.moving_mean, mean),
            (self.moving_variance, unbiased),
        ):
            change = stored - tf.reshape(value, stored.shape)
            stored.assign_sub(change * (1 - self.momentum))
        scale, shift = (
            None if weight is None else tf.reshape(weight, mean.shape)
            for weight in (self.gamma, self.beta)
        )
        outputs = tf.nn.batch_normalization(
            values, mean, variance, shift, scale, self.epsilon
        )
        return tf.cast(outputs, inputs.dtype)


@contextlib.contextmanager
def names_lost_workers(strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """A `with` block, or a decorator, that says so if a worker is lost.

    Args:
      strategy: None for one device.

    Raises:
      TrainingError: another worker ended, or cannot be reached.
    """
    try:
        yield
    except LOST_WORKER as error:
        if _num_workers(strategy) == 1:
            raise
        raise TrainingError(
            "a worker was lost: it ended, or cannot be reached. Start all workers "
            "again with the same commands; they continue from their last checkpoint"
        ) from error


def of_all_workers(
    values: Sequence[int], *, strategy: tf.distribute.Strategy | None
) -> np.ndarray:
    """What each worker has, known to all: int64 (workers, values).

    All workers must call it at the same point.

    Args:
      values: as many on each worker.
      strategy: None for one device.
    """
    row = np.array([values], np.int64)
    workers = _num_workers(strategy)
    if workers == 1:
        return row
    with names_lost_workers(strategy):
        rows = _row_gatherer(strategy, len(values))(tf.constant(row)).numpy()
    return rows[:: len(rows) // workers]  # those of one worker's replicas are the same


@functools.cache
def _row_gatherer(strategy: tf.distribute.Strategy, length: int) -> Any:
    gather = everywhere(replica_concat, strategy)
    return traced(gather, tf.TensorSpec((1, length), tf.int64))


def from_first_worker(
    strategy: tf.distribute.Strategy | None, arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The arrays that worker 0 has; all workers must call it at the same point.

    Args:
      strategy: None for one device.
      arrays: of the same shapes and types on each worker.
    """
    if _num_workers(strategy) == 1:
        return list(arrays)

    def summed(*tensors: tf.Tensor) -> list[tf.Tensor]:
        context = tf.distribute.get_replica_context()
        is_first = context.replica_id_in_sync_group == 0
        parts = [tf.where(is_first, t, tf.zeros_like(t)) for t in tensors]
        return context.all_reduce(tf.distribute.ReduceOp.SUM, parts)

    # All of one type, to travel together; tfmot's counters are small integers.
    specs = [tf.TensorSpec(array.shape, tf.float32) for array in arrays]
    tensors = [tf.constant(array, tf.float32) for array in arrays]
    with names_lost_workers(strategy):
        results = traced(everywhere(summed, strategy), *specs)(*tensors)
    return [r.numpy().astype(a.dtype) for r, a in zip(results, arrays)]


def _num_replicas(strategy: tf.distribute.Strategy | None) -> int:
    return 1 if strategy is None else strategy.num_replicas_in_sync


def _num_workers(strategy: tf.distribute.Strategy | None) -> int:
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 1
    return len(strategy.cluster_resolver.cluster_spec().job_tasks("worker"))
