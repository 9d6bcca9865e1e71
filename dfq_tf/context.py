"""How one run runs: what the stages of a training share."""

import dataclasses
import os
from typing import Generic, TypeVar

from dfq_tf.compat import tf
from dfq_tf.settings import DistillationConfig, RunConfig, TeacherConfig

S = TypeVar("S", DistillationConfig, TeacherConfig)


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
