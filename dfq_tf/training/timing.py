"""How long steps take: some are taken for it, and undone."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf


@contextlib.contextmanager
def unchanged(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """Gives variables the values back that they had before the block.

    Args:
      variables: all that the steps in the block change; their values are copied.
    """
    kept = [(variable, variable.numpy()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)


def mean_seconds(step: Callable[[int], Any], numbers: Sequence[int]) -> float:
    """The mean time of steps, once the first of them is compiled.

    Args:
      step: takes its number, and returns tensors.
      numbers: of the steps that are timed; the first is taken once more, before.
    """

    def take(number: int) -> None:
        tf.nest.map_structure(np.asarray, step(number))  # waits for its end

    take(numbers[0])
    began = time.monotonic()
    for number in numbers:
        take(number)
    return (time.monotonic() - began) / len(numbers)
