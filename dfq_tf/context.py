"""How one run runs: what the stages of a training share."""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

from dfq_tf.compat import tf
from dfq_tf.settings import (
    BudgetConfig,
    DistillationConfig,
    RunConfig,
    TeacherConfig,
)

S = TypeVar("S", bound=DistillationConfig | BudgetConfig | TeacherConfig)
# A stage without a bar that lasts so many seconds is worth a line.
_WORTH_A_LINE = 2.0


@contextlib.contextmanager
def stage(
    name: str, progress: bool, least_seconds: float = _WORTH_A_LINE
) -> Iterator[None]:
    """Says that something without a bar is being done, and how long it has taken.

    A terminal is told when it begins, on the standard error stream. A line stays there,
    and in a log, if it has taken seconds. What raises leaves no line.

    Args:
      name: of the stage, such as 'calibration'.
      progress: whether anything is said.
      least_seconds: how long it must have taken for a line.
    """
    began = time.monotonic()
    is_seen = progress and sys.stderr.isatty()
    if is_seen:
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_seen:
            print(f"\r{' ' * (len(name) + 4)}\r", end="", file=sys.stderr, flush=True)
    seconds = time.monotonic() - began
    if progress and seconds >= least_seconds:
        print(f"{name}: done in {seconds:.0f} s", file=sys.stderr, flush=True)


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
      directory: for checkpoints and scalars; None keeps nothing.
      progress: whether to show a bar for each stage.
    """

    settings: S
    seed: int
    precision: str
    strategy: tf.distribute.Strategy | None
    directory: str | os.PathLike[str] | None
    progress: bool

    def __post_init__(self) -> None:
        """Raises ConfigError if seed or precision are out of their limits."""
        RunConfig(seed=self.seed, precision=self.precision)
