"""How one run runs: what the stages of a training share."""

import contextlib
import contextvars
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, TypeVar

import tqdm

from dfq_tf.compat import tf
from dfq_tf.files import expanded
from dfq_tf.settings import (
    BudgetConfig,
    DistillationConfig,
    RunConfig,
    TeacherConfig,
)

S = TypeVar("S", bound=DistillationConfig | BudgetConfig | TeacherConfig)
T = TypeVar("T")
# A stage that lasts so many seconds is worth a line, and parts of it so many a bar.
WORTH_A_LINE, _WORTH_A_BAR = 2.0, 1.0
# Seconds between the lines of a training in a log.
_BETWEEN_LINES = 60.0
# tqdm's bar, with the time that the training says is left in place of tqdm's estimate.
_BAR_TEXT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{postfix}]"
# What a terminal is told that is being done.
_shown: contextvars.ContextVar["_Shown | None"] = contextvars.ContextVar(
    "_shown", default=None
)
_lines_alone: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "_lines_alone", default=False
)


@contextlib.contextmanager
def lines_alone(is_wanted: bool = True) -> Iterator[None]:
    """A terminal sees no bars in the block, but the lines that a log has."""
    token = _lines_alone.set(is_wanted)
    try:
        yield
    finally:
        _lines_alone.reset(token)


def _stream() -> Any:
    """The standard error stream, of any class; None where there is none to write to."""
    stream = sys.stderr
    return None if getattr(stream, "closed", False) else stream


def _has_bars() -> bool:
    stream = _stream()
    is_terminal = hasattr(stream, "isatty") and stream.isatty()
    return is_terminal and not _lines_alone.get()


def _tell(text: str, end: str = "\n") -> None:
    """Writes to the standard error stream at once, if there is one."""
    stream = _stream()
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            print(text, end=end, file=stream, flush=hasattr(stream, "flush"))


@contextlib.contextmanager
def stage(
    name: str, progress: bool, least_seconds: float = WORTH_A_LINE
) -> Iterator[None]:
    """Says that something is being done, and how long it has taken.

    A terminal is told when it begins, on the standard error stream, and sees a bar for
    what is `counted` in the block. A line stays there, and in a log, if it has taken
    seconds. What raises leaves no line.

    Args:
      name: of the stage, such as 'calibration'.
      progress: whether anything is said.
      least_seconds: how long it must have taken for a line.
    """
    began = time.monotonic()
    shown = _Shown(name) if progress and _has_bars() else None
    if shown:
        shown.tell()
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)
        if shown:
            shown.clear()
    seconds = time.monotonic() - began
    if progress and seconds >= least_seconds:
        _tell(f"{name}: done in {seconds:.0f} s")


def counted(items: Collection[T], what: str) -> Iterator[T]:
    """Goes through the parts of a stage, with a bar where a terminal shows the stage.

    So that no function need be told whether anybody looks: outside of a stage, or
    inside of other parts that are counted, nothing is shown.

    Args:
      items: the parts.
      what: they are, such as 'layers'.
    """
    shown = _shown.get()
    return iter(items) if shown is None else shown.counted(items, what)


class _Shown:
    """A stage on a terminal."""

    def __init__(self, name: str) -> None:
        self._name, self._is_counting = name, False

    def tell(self) -> None:
        _tell(f"{self._name} ...", end="")

    def clear(self) -> None:
        blank = " " * (len(self._name) + 4)
        _tell(f"\r{blank}\r", end="")

    def counted(self, items: Collection[T], what: str) -> Iterator[T]:
        if self._is_counting:
            yield from items
            return
        self._is_counting = True
        try:
            yield from tqdm.tqdm(
                items,
                desc=f"{self._name}: {what}",
                leave=False,
                dynamic_ncols=True,
                mininterval=0.5,
                delay=_WORTH_A_BAR,
            )
        finally:
            self._is_counting = False
        self.clear()
        self.tell()


class _TimedBar(tqdm.tqdm):
    """A bar of a training that knows how long it still takes."""

    def __init__(self, seconds_left: Callable[[], float] | None, **kwargs: Any) -> None:
        self._seconds_left = seconds_left
        super().__init__(bar_format=_BAR_TEXT if seconds_left else None, **kwargs)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `bar_format` may name: tqdm's own, and the time that is left."""
        left = self._seconds_left() if self._seconds_left else 0.0
        return {**super().format_dict, "left": self.format_interval(left)}


class TrainingShown:
    """How far a training is: a bar on a terminal; in a log a line a minute.

    Args:
      name: of the training.
      total: its steps.
      first: those that an earlier run took.
      progress: whether anything is said.
      seconds_left: says how long the training still takes, where it knows; without, the
        steps that are left are taken to be as long as those that are done.
    """

    def __init__(
        self,
        name: str,
        total: int,
        first: int,
        progress: bool,
        seconds_left: Callable[[], float] | None = None,
    ) -> None:
        self._name, self._first, self._done, self._total = name, first, first, total
        is_shown = progress and first < total
        self._has_lines = is_shown and not _has_bars()
        self._seconds_left = seconds_left
        self._bar = _TimedBar(
            seconds_left,
            total=total,
            initial=first,
            desc=name,
            unit="step",
            disable=not is_shown or self._has_lines,
            dynamic_ncols=True,
            mininterval=0.5,
        )
        self._measured = ""
        self._began = self._told = time.monotonic()

    def close(self, is_done: bool) -> None:
        """Ends the bar. A log has a line if all is done and has taken seconds."""
        self._bar.close()
        seconds = time.monotonic() - self._began
        if self._has_lines and is_done and seconds >= WORTH_A_LINE:
            count = self._done - self._first
            more, end = " more" if self._first else "", "" if count == 1 else "s"
            self._say(f"{count}{more} step{end}, done in {seconds:.0f} s")

    def step(self, total: int) -> None:
        """One more step is done, of so many."""
        self._done, self._total = self._done + 1, total
        self._bar.total = total
        self._bar.update()

    def measured(self, measurements: Mapping[str, float]) -> None:
        """Shows measurements, on the bar or if it is time for a line."""
        texts = {key: f"{value:.4g}" for key, value in measurements.items()}
        self._bar.set_postfix(texts, refresh=False)
        self._measured = "".join(f", {key} {text}" for key, text in texts.items())
        now = time.monotonic()
        if self._has_lines and now - self._told >= _BETWEEN_LINES:
            self._told, taken = now, now - self._began
            steps, rest = self._done - self._first, self._total - self._done
            left = self._seconds_left() if self._seconds_left else taken / steps * rest
            self._say(f"step {self._done} of {self._total}, about {left:.0f} s left")

    def _say(self, what: str) -> None:
        _tell(f"{self._name}: {what}{self._measured}")


@dataclasses.dataclass(frozen=True)
class Context(Generic[S]):
    """Made once for each run, handed on, and never changed.

    A function takes it if it reads three of its fields, or hands it on to one that
    does. The networks are not in it: they are what flows.

    Attributes:
      settings: of the training; the batch size is a number.
      seed: decides all random numbers.
      precision: 'float32' or 'bfloat16', see `copies.resolve_precision`.
      strategy: the devices that train, see `devices.make_strategy`; None for one.
      directory: for checkpoints and scalars, ~ is the home folder; None keeps nothing.
      progress: whether to show what is being done: bars on a terminal, else lines.
    """

    settings: S
    seed: int
    precision: str
    strategy: tf.distribute.Strategy | None
    directory: str | os.PathLike[str] | None
    progress: bool

    def __post_init__(self) -> None:
        """Raises ConfigError if seed or precision are out of their limits."""
        checked = RunConfig(seed=self.seed, precision=self.precision)
        # An integer of NumPy would overflow where others are added to it.
        object.__setattr__(self, "seed", checked.seed)
        if self.directory is not None:
            object.__setattr__(self, "directory", expanded(self.directory))
