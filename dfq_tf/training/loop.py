"""The one training loop: it calls a step, reports, saves and resumes.

What a step does is the caller's business. The loop owns the counter, the progress
bar, the TensorBoard scalars, the checkpoints, and the check that all stays finite.
"""

import contextlib
import csv
import io
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.context import Context, TrainingShown
from dfq_tf.errors import TrainingError
from dfq_tf.files import (
    damaged,
    locked,
    read_object,
    read_text,
    released,
    write_text,
)
from dfq_tf.training.devices import LOST_WORKER, names_lost_workers, of_all_workers

Step = Callable[[int], Mapping[str, tf.Tensor]]
Evaluate = Callable[[], Mapping[str, float]]

# What a directory that cannot be written makes Python and TensorFlow raise. What they
# raise if a worker is lost is not among them.
_UNWRITABLE = (
    OSError,
    tf.errors.DataLossError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnknownError,
)
# What TensorFlow raises for a damaged checkpoint; IndexError where a file is cut off.
_UNREADABLE = (IndexError, tf.errors.OpError)
# The file beside the checkpoints that says whose they are.
_IDENTITY = "identity.json"
# What a checkpoint calls the seconds that the steps have taken.
_SECONDS = "seconds_in_steps/.ATTRIBUTES/VARIABLE_VALUE"
# Checkpoints of each run. With two, workers that were stopped while they saved have
# one in common.
_KEPT = 2


def run_loop(
    name: str,
    step: Step,
    num_steps: int | Callable[[int], int],
    trackables: Mapping[str, Any],
    context: Context,
    *,
    identity: Mapping[str, str] | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 50,
    measure_every: int = 10,
    save_seconds: float = 60.0,
    seconds_left: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Calls `step(0)`, `step(1)`, and so on, continuing where a run left off.

    Args:
      name: what the progress bar says, and the folder of the TensorBoard scalars.
      step: takes the step's number, changes variables, returns scalar measurements.
      num_steps: of the whole run; or a function of a step's number, asked beside it.
      trackables: all that the step changes: models and optimizers, by name.
      context: its directory keeps `checkpoints/NAME` and `tensorboard/NAME`. Workers,
        each with a directory of its own, save and restore at the same steps.
      identity: what the run hangs on, name -> value, kept beside the checkpoints; those
        of a run with another value of one of them are refused. None looks at nothing.
      evaluate: called before the first step, every `evaluate_every` steps and at the
        end; its measurements go to `NAME_curve.csv`, beside the minutes that the steps
        took, and to TensorBoard. Not called without a directory.
      evaluate_every: steps between two evaluations.
      measure_every: steps between two reports of the measurements.
      save_seconds: least time between two checkpoints; one is saved at the end too.
      seconds_left: of the run, for its bar; None goes by the steps that are done.

    Returns:
      The last measurements; empty if the run had already ended.

    Raises:
      TrainingError: a measurement or a weight is not finite; the last good checkpoint
        is kept. Or the workers have no checkpoint in common, or it is damaged, of other
        models or settings, or in use; a worker was lost; nothing can be written.
    """
    measurements: dict[str, float] = {}
    with (
        names_lost_workers(context.strategy),
        _alone(name, context.directory),
        _Progress(
            name, num_steps, trackables, context, identity, evaluate, seconds_left
        ) as progress,
    ):
        index = progress.first
        while index < progress.length(index):
            if index % evaluate_every == 0:
                progress.evaluate()
            measurements = progress.take(step, index)
            is_last = index + 1 >= progress.length(index)
            index += 1
            if is_last or index % measure_every == 0:
                progress.report(measurements, is_last)
                progress.save(is_last, save_seconds)
    return measurements


def seconds_in_steps(directory: str | os.PathLike[str], *names: str) -> float:
    """How long runs took until their newest checkpoints, so that more can be added.

    Args:
      directory: as in the context of `run_loop`.
      *names: of the runs, or patterns of names such as 'df_rec_*_of_*'.

    Returns:
      Seconds in steps of all of them together; 0 without checkpoints.

    Raises:
      TrainingError: a checkpoint is damaged.
    """
    folder, seconds = pathlib.Path(directory) / "checkpoints", 0.0
    for path in {path for name in names for path in folder.glob(name)}:
        if newest := tf.train.latest_checkpoint(str(path)):
            try:
                reader = tf.train.load_checkpoint(newest)
                seconds += float(reader.get_tensor(_SECONDS))
            except _UNREADABLE as error:
                raise _damaged(path.name, newest, error) from error
    return seconds


def begin_anew(
    name: str, directory: str | os.PathLike[str], identity: Mapping[str, str]
) -> None:
    """Removes what a run of another identity has left, which `run_loop` would refuse.

    Args:
      name: of the run.
      directory: as in the context of `run_loop`.
      identity: as of `run_loop`; that of the run that is to come.

    Raises:
      ConfigError: what the run before has written down is damaged.
    """
    places = [pathlib.Path(directory) / kind for kind in ("checkpoints", "tensorboard")]
    before = read_object(places[0] / name / _IDENTITY)
    if any(before.get(key) != value for key, value in identity.items()):
        for place in places:
            shutil.rmtree(place / name, ignore_errors=True)


@contextlib.contextmanager
def _alone(name: str, directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """Keeps the checkpoints of a run for this process until the block ends.

    Args:
      name: of the run.
      directory: as in the context of `run_loop`.

    Raises:
      TrainingError: another process has them.
    """
    descriptor = None
    if directory is not None:
        folder = pathlib.Path(directory) / "checkpoints" / name
        with contextlib.suppress(OSError):  # whatever is written next says why
            folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = locked(folder)
        except BlockingIOError as error:
            raise TrainingError(
                f"{name}: another process is at work in {os.fspath(directory)}. Wait "
                "until it has ended, or name another directory (--workdir)"
            ) from error
    try:
        yield
    finally:
        if descriptor is not None:
            released(descriptor)


class _Progress:
    """What a run has done: its counter, clock, bar, scalars, curve and checkpoints.

    Entering it restores the newest checkpoint; leaving it closes its files. The
    arguments are those of `run_loop`.
    """

    def __init__(
        self,
        name: str,
        num_steps: int | Callable[[int], int],
        trackables: Mapping[str, Any],
        context: Context,
        identity: Mapping[str, str] | None,
        evaluate: Evaluate | None,
        seconds_left: Callable[[], float] | None,
    ) -> None:
        self._name, self._trackables, self._context = name, trackables, context
        self._done = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._manager = self._writer = self._evaluate = None
        if context.directory is not None:
            self._evaluate = evaluate  # without, there is nowhere to put it
            self._open(pathlib.Path(context.directory), identity or {})
        self.first = int(self._done.numpy())
        self._curve = _Curve(name, context.directory, self.first, self._writer)
        self._saved_at = time.monotonic()
        self._num_steps = num_steps
        total = self.length(self.first)
        self._shown = TrainingShown(
            name, total, self.first, context.progress, seconds_left
        )

    def _open(self, directory: pathlib.Path, identity: Mapping[str, str]) -> None:
        """Restores the newest checkpoint, and opens the file of the scalars."""
        checkpoint = tf.train.Checkpoint(
            steps_done=self._done, seconds_in_steps=self._seconds, **self._trackables
        )
        folder = directory / "checkpoints" / self._name
        manager = tf.train.CheckpointManager(checkpoint, str(folder), max_to_keep=_KEPT)
        self._manager = manager
        with self._writing():
            _claim(self._name, folder, bool(manager.checkpoints), identity)
        newest = _newest_checkpoint(self._name, manager, self._context.strategy)
        if newest:
            _restore(self._name, checkpoint, newest)
        with self._writing():
            self._writer = tf.summary.create_file_writer(
                str(directory / "tensorboard" / self._name)
            )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._shown.close(is_done=kind is None)
        if self._writer is not None:
            with self._writing():
                self._writer.close()

    @property
    def _steps(self) -> int:
        return int(self._done.numpy())

    def length(self, index: int) -> int:
        """How many steps there are, before or after the step of this number."""
        return self._num_steps(index) if callable(self._num_steps) else self._num_steps

    def evaluate(self) -> None:
        """Adds a row to the curve, if there is one."""
        if self._evaluate is not None:
            values = self._evaluate()
            with self._writing():
                self._curve.add(self._steps, float(self._seconds), values)

    def take(self, step: Step, index: int) -> dict[str, float]:
        """Takes a step, and returns its measurements, which must be finite."""
        began = time.monotonic()
        tensors = step(index)
        # Reading them waits for the step's end.
        measurements = {key: float(value) for key, value in tensors.items()}
        self._seconds.assign_add(time.monotonic() - began)
        self._done.assign_add(1)
        self._shown.step(self.length(index))
        bad = [key for key, value in measurements.items() if not np.isfinite(value)]
        if bad:
            raise self._not_finite(", ".join(bad))
        return measurements

    def report(self, measurements: Mapping[str, float], is_last: bool) -> None:
        """Shows measurements, and writes them as scalars; the last ones end a curve."""
        self._shown.measured(measurements)
        if self._writer is not None:
            with self._writing(), self._writer.as_default(step=self._steps):
                for key, value in measurements.items():
                    tf.summary.scalar(key, value)
        if is_last:
            self.evaluate()

    def save(self, is_last: bool, save_seconds: float) -> None:
        """Saves a checkpoint if it is time, after a look at all weights."""
        is_due = time.monotonic() - self._saved_at >= save_seconds
        # Their clocks differ, but saving takes all workers at once.
        due = of_all_workers([is_due], strategy=self._context.strategy)
        if not (due.any() or is_last):
            return
        for key, trackable in self._trackables.items():
            if isinstance(trackable, keras.Model):
                for variable in trackable.variables:
                    if not np.isfinite(variable.numpy()).all():
                        raise self._not_finite(f"the weight {variable.name} of {key}")
        if self._manager is not None:
            with self._writing():
                _save(self._manager, self._steps)
        self._saved_at = time.monotonic()

    def _not_finite(self, what: str) -> TrainingError:
        return TrainingError(
            f"{self._name}: {what} is not finite at step {self._steps}; {self._kept}. "
            "Lower the learning rate, or use --precision=float32, in another directory "
            "(--workdir)"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises TrainingError if what the block writes cannot be written."""
        try:
            yield
        except _UNWRITABLE as error:
            raise TrainingError(
                f"{self._name}: {self._context.directory} cannot be written at step "
                f"{self._steps}: {_reason(error)}; {self._kept}. Make room there, and "
                "give the same command again to continue; or name another folder"
            ) from error

    @property
    def _kept(self) -> str:
        latest = self._manager.latest_checkpoint if self._manager is not None else None
        return (
            f"the last good checkpoint is {latest}" if latest else "nothing was saved"
        )


def _claim(
    name: str, folder: pathlib.Path, has_checkpoints: bool, identity: Mapping[str, str]
) -> None:
    """Writes down whose checkpoints there will be; refuses those of another run.

    Args:
      name: of the run.
      folder: of its checkpoints.
      has_checkpoints: whether there are some.
      identity: of the run, see `run_loop`. What else the run before had written down
        does not matter to this one.

    Raises:
      TrainingError: there are checkpoints of another run.
    """
    path = folder / _IDENTITY
    if not has_checkpoints:
        if identity:
            write_text(path, json.dumps(dict(identity), indent=2) + "\n")
        return
    before = read_object(path)
    changes = [
        f"  {key}: {before.get(key, '(not known)')} -> {value}"
        for key, value in identity.items()
        if before.get(key) != value
    ]
    if changes:
        raise TrainingError(
            f"{name}: {folder} has the checkpoints of another run. Name another "
            "directory (--workdir), or delete that folder. What differs:\n"
            + "\n".join(changes)
        )


def _save(manager: Any, steps_done: int) -> None:
    """Saves a checkpoint; if that fails, nothing of it is left behind."""
    folder = pathlib.Path(manager.directory)
    try:
        manager.save(checkpoint_number=steps_done)
    except BaseException:
        name = f"ckpt-{steps_done}"
        state = tf.train.get_checkpoint_state(folder)
        known = state.all_model_checkpoint_paths if state else ()
        if name not in (pathlib.PurePath(path).name for path in known):
            for path in [*folder.glob(f"{name}.*"), *folder.glob("checkpoint.tmp*")]:
                path.unlink(missing_ok=True)
            shutil.rmtree(folder / f"{name}_temp", ignore_errors=True)
        raise


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
    # The last one: a variable of another type.
    except (AssertionError, ValueError, tf.errors.InvalidArgumentError) as error:
        # Without this, what it lacks would silently start anew.
        raise TrainingError(
            f"{name}: the checkpoint {path} is of another version or other networks "
            f"({_reason(error)}). Name another --workdir, or delete its folder"
        ) from error
    except _UNREADABLE as error:
        if isinstance(error, LOST_WORKER):
            raise
        raise _damaged(name, path, error) from error
    status.expect_partial()


def _damaged(name: str, path: str, error: BaseException) -> TrainingError:
    return TrainingError(
        f"{name}: the checkpoint {path} is damaged, or a file of it is gone "
        f"({_reason(error)}). Name another --workdir, or delete its folder"
    )


def _reason(error: BaseException) -> str:
    """What it says, without the operation that TensorFlow puts around it."""
    return re.sub(r"\{\{.*?\}\} | \[Op:.*", "", str(error).splitlines()[0])


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
                try:
                    header, *rows = read_text(self._path).splitlines()
                    kept = [row for row in rows if int(row.split(",")[0]) < first]
                except ValueError as error:
                    raise damaged(self._path, error) from error
                self._lines = [header, *kept]

    def add(self, done: int, seconds: float, values: Mapping[str, float]) -> None:
        """Adds a row; the header comes from the first one's names."""
        if self._path is None:
            return
        header = _line(["step", "minutes", *values])
        if not self._lines:
            self._lines.append(header)
        elif self._lines[0] != header:
            raise TrainingError(
                f"{self._path} has the columns {self._lines[0]}, and what is measured "
                f"now are {header}. Measure the same, or name another folder"
            )
        numbers = [seconds / 60, *values.values()]
        self._lines.append(_line([str(done), *(f"{v:.6g}" for v in numbers)]))
        write_text(self._path, "\n".join(self._lines) + "\n")
        with self._writer.as_default(step=done):
            for key, value in values.items():
                tf.summary.scalar(f"evaluation/{key}", value)


def _line(cells: Sequence[str]) -> str:
    """A line of a table; a name with a comma in it has quotes around it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()
