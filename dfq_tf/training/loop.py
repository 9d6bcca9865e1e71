"""The one training loop: it calls a step, reports, saves and resumes.

What a step does is the caller's business. The loop owns the counter, the progress
bar, the TensorBoard scalars, the checkpoints, and the check that all stays finite.
"""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tqdm

from dfq_tf.compat import keras, tf
from dfq_tf.errors import TrainingError
from dfq_tf.files import write_text
from dfq_tf.training.devices import of_all_workers

Step = Callable[[int], Mapping[str, tf.Tensor]]
Evaluate = Callable[[], Mapping[str, float]]

# Checkpoints of each run. With two, workers that were stopped while they saved have
# one in common.
_KEPT = 2


def run_loop(
    name: str,
    step: Step,
    num_steps: int,
    trackables: Mapping[str, Any],
    directory: str | os.PathLike[str] | None = None,
    *,
    strategy: tf.distribute.Strategy | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 50,
    measure_every: int = 10,
    save_seconds: float = 60.0,
    show_progress: bool = True,
) -> dict[str, float]:
    """Calls `step(0)`, ..., `step(num_steps - 1)`, continuing where a run left off.

    Args:
      name: what the progress bar says, and the folder of the TensorBoard scalars.
      step: takes the step's number, changes variables, returns scalar measurements.
      num_steps: how many steps the whole run has.
      trackables: all that the step changes: models and optimizers, by name.
      directory: where checkpoints (`checkpoints/NAME`) and scalars
        (`tensorboard/NAME`) are kept; None keeps nothing.
      strategy: the devices that `step` runs on; its workers, each with a directory of
        its own, save and restore at the same steps. None for one device.
      evaluate: called before the first step, every `evaluate_every` steps and at the
        end; its measurements go to `NAME_curve.csv`, beside the minutes that the steps
        took, and to TensorBoard. Not called without a directory.
      evaluate_every: steps between two evaluations.
      measure_every: steps between two reports of the measurements.
      save_seconds: least time between two checkpoints; one is saved at the end too.
      show_progress: whether to show a bar on the terminal.

    Returns:
      The last measurements; empty if the run had already ended.

    Raises:
      TrainingError: a measurement or a weight is not finite. The last good
        checkpoint is kept. Or the workers have no checkpoint in common, or it is of
        other networks or optimizers.
    """
    counter = tf.Variable(0, dtype=tf.int64, trainable=False)
    seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
    manager = writer = None
    if directory is not None:
        checkpoint = tf.train.Checkpoint(
            steps_done=counter, seconds_in_steps=seconds, **trackables
        )
        folder = pathlib.Path(directory) / "checkpoints" / name
        manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=_KEPT)
        newest = _newest_checkpoint(name, manager, strategy)
        if newest:
            _restore(name, checkpoint, newest)
        writer = tf.summary.create_file_writer(
            str(pathlib.Path(directory) / "tensorboard" / name)
        )
    first = int(counter.numpy())
    measurements: dict[str, float] = {}
    saved_at = time.monotonic()
    bar = tqdm.tqdm(
        total=num_steps,
        initial=first,
        desc=name,
        unit="step",
        disable=not show_progress or first == num_steps,
        dynamic_ncols=True,
        # A log file needs no line every half second.
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    curve = _Curve(name, directory, first, writer)
    if directory is None:
        evaluate = None  # there is nowhere to put it
    with bar:
        for index in range(first, num_steps):
            if evaluate is not None and index % evaluate_every == 0:
                curve.add(index, float(seconds), evaluate())
            began = time.monotonic()
            tensors = step(index)
            # Reading them waits for the step's end.
            measurements = {key: float(value) for key, value in tensors.items()}
            seconds.assign_add(time.monotonic() - began)
            counter.assign_add(1)
            done = index + 1
            bar.update()
            _check_measurements(name, done, measurements, manager)
            if done % measure_every and done != num_steps:
                continue
            bar.set_postfix(
                {k: f"{v:.4g}" for k, v in measurements.items()}, refresh=False
            )
            if writer is not None:
                with writer.as_default(step=done):
                    for key, value in measurements.items():
                        tf.summary.scalar(key, value)
            if evaluate is not None and done == num_steps:
                curve.add(done, float(seconds), evaluate())
            is_due = time.monotonic() - saved_at >= save_seconds
            # Their clocks differ, but saving takes all workers at once.
            if of_all_workers([is_due], strategy=strategy).any() or done == num_steps:
                _check_weights(name, done, trackables, manager)
                if manager is not None:
                    manager.save(checkpoint_number=done)
                saved_at = time.monotonic()
    if writer is not None:
        writer.close()
    return measurements


def _newest_checkpoint(
    name: str, manager: Any, strategy: tf.distribute.Strategy | None
) -> str | None:
    """The newest checkpoint that all workers have; None if none has any."""
    paths = {int(path.rpartition("-")[2]): path for path in manager.checkpoints}
    padded = [*[-1] * _KEPT, *paths][-_KEPT:]
    found = [set(steps) - {-1} for steps in of_all_workers(padded, strategy=strategy)]
    common = set.intersection(*found)
    if any(found) and not common:
        each = ", ".join(
            f"worker {i} of {' and '.join(map(str, sorted(steps))) or 'none'}"
            for i, steps in enumerate(found)
        )
        raise TrainingError(
            f"{name}: the workers have checkpoints of steps that they do not share: "
            f"{each}. Copy the folder checkpoints/{name} of one worker to all others, "
            "or delete it on all of them"
        )
    return paths[max(common)] if common else None


def _restore(name: str, checkpoint: tf.train.Checkpoint, path: str) -> None:
    try:
        status = checkpoint.restore(path)
        status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        # Without this, what it lacks would silently start anew.
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{name}: the checkpoint {path} is of another version or other networks "
            f"({reason}). Name another --workdir, or delete its folder"
        ) from error
    status.expect_partial()


class _Curve:
    """The rows of NAME_curve.csv; those of a run that was interrupted stay."""

    def __init__(
        self,
        name: str,
        directory: str | os.PathLike[str] | None,
        first: int,
        writer: Any,
    ) -> None:
        self._path = None
        self._lines: list[str] = []
        self._writer = writer
        if directory is not None:
            self._path = pathlib.Path(directory) / f"{name}_curve.csv"
            if first and self._path.exists():
                header, *rows = self._path.read_text().splitlines()
                kept = [row for row in rows if int(row.split(",")[0]) < first]
                self._lines = [header, *kept]

    def add(self, done: int, seconds: float, values: Mapping[str, float]) -> None:
        """Adds a row; the header comes from the first one's names."""
        if self._path is None:
            return
        if not self._lines:
            self._lines.append(",".join(["step", "minutes", *values]))
        numbers = [seconds / 60, *values.values()]
        self._lines.append(",".join([str(done), *(f"{v:.6g}" for v in numbers)]))
        write_text(self._path, "\n".join(self._lines) + "\n")
        with self._writer.as_default(step=done):
            for key, value in values.items():
                tf.summary.scalar(f"evaluation/{key}", value)


def _check_measurements(
    name: str, done: int, measurements: Mapping[str, float], manager: Any
) -> None:
    bad = [key for key, value in measurements.items() if not np.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{name}: {', '.join(bad)} is not finite at step {done}; "
            f"{_kept(manager)}. Lower the learning rate, or use --precision=float32"
        )


def _check_weights(
    name: str, done: int, trackables: Mapping[str, Any], manager: Any
) -> None:
    for key, trackable in trackables.items():
        if isinstance(trackable, keras.Model):
            for variable in trackable.variables:
                if not np.isfinite(variable.numpy()).all():
                    raise TrainingError(
                        f"{name}: the weight {variable.name} of {key} is not finite "
                        f"at step {done}; {_kept(manager)}. Lower the learning rate, "
                        "or use --precision=float32"
                    )


def _kept(manager: Any) -> str:
    latest = manager.latest_checkpoint if manager is not None else None
    return f"the last good checkpoint is {latest}" if latest else "nothing was saved"
