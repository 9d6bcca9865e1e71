"""How a distillation in a given time divides it, and what it writes down of that.

The number of rounds comes from the pace of this machine. It is revised on the way, as a
machine is faster or slower than in the first minute. What is decided is written down
with the round from which on it holds, so that a run that goes on does as it did before.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dfq_tf.errors import ConfigError
from dfq_tf.files import damaged, read_object, write_text
from dfq_tf.settings import BudgetConfig

_PLAN = "distillation_plan.json"
# The number of rounds is looked at again so often.
_REVISIONS = 10
# Part of the time that the curve and the checkpoints take; rounds have it in them, once
# they are measured.
SPARE = 0.03


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that each kind of step takes on this machine.

    Attributes:
      start: for the answers that there are before the first student step.
      batch: to make a batch of new images, with all its generator steps.
      answers: for the teacher to answer a batch.
      student: a step of the students.
    """

    start: float
    batch: float
    answers: float
    student: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the budget is divided.

    Attributes:
      rounds: each makes one batch of new images.
      first: so many of them come before the students' first step.
      student_steps: in each round from then on.
      answer_uses: student steps for each batch that is answered.
    """

    rounds: int
    first: int
    student_steps: int
    answer_uses: int

    @property
    def total_student_steps(self) -> int:
        """Student steps in all rounds."""
        return (self.rounds - self.first) * self.student_steps

    @property
    def answers_in_round(self) -> int:
        """Batches that the teacher answers in a round with student steps."""
        return math.ceil(self.student_steps / self.answer_uses)

    def seconds(self, pace: Pace) -> float:
        """How long all rounds take."""
        answers = (self.rounds - self.first) * self.answers_in_round
        return (
            pace.start
            + self.rounds * pace.batch
            + answers * pace.answers
            + self.total_student_steps * pace.student
        )


def plan_of_steps(config: BudgetConfig) -> Plan:
    """The plan of the student steps that are asked for, in whole rounds."""
    learning = math.ceil(config.steps / config.student_steps)
    first = round(learning * config.first_share / (1 - config.first_share))
    rounds = first + learning
    return Plan(rounds, first, config.student_steps, config.answer_uses)


def plan_of_rounds(config: BudgetConfig, rounds: int) -> Plan:
    """The plan of so many rounds."""
    first = min(int(config.first_share * rounds), rounds - 1)
    return Plan(rounds, first, config.student_steps, config.answer_uses)


def plan_for(config: BudgetConfig, pace: Pace, seconds: float, spent: float) -> Plan:
    """As many rounds as fit into the time that is left.

    Args:
      config: its minutes are named where they do not suffice.
      pace: of this machine.
      seconds: what is left for rounds, without SPARE.
      spent: what has gone by, in seconds.

    Raises:
      ConfigError: there is no time for one round.
    """
    least = plan_of_rounds(config, 1).seconds(pace)
    if least > seconds:
        needed = spent + least / (1 - SPARE)
        way_out = "batch_size, generator_steps or student_steps"
        if seconds <= 0:
            way_out = (
                "generator_steps, or a batch_size above 128: the beginning and the "
                "images held out leave no time for others"
            )
        raise ConfigError(
            f"minutes is {config.minutes:g}; this machine needs at least "
            f"{math.ceil(needed / 6) / 10:g} for one batch of images and "
            f"{config.student_steps} student steps on it. Give more minutes, or lower "
            f"{way_out}"
        )
    rounds, step = 1, 2 ** math.ceil(math.log2(seconds / pace.batch + 1))
    while step:
        longer = plan_of_rounds(config, rounds + step)
        if longer.seconds(pace) <= seconds:
            rounds += step
        else:
            step //= 2
    return plan_of_rounds(config, rounds)


class KeptPlan:
    """The plan of a run, and how it was revised: in memory, and in the run's folder.

    Args:
      directory: of the run; what an earlier run has written there is read. None keeps
        the plan in memory alone.
      config: of the run.

    Raises:
      OSError: the file cannot be read.
      ConfigError: it is damaged.
    """

    def __init__(
        self, directory: str | os.PathLike[str] | None, config: BudgetConfig
    ) -> None:
        self._path = None if directory is None else pathlib.Path(directory) / _PLAN
        self._known = {} if self._path is None else read_object(self._path)
        self._revised: dict[int, int] = {}
        self.first: Plan | None = None
        if self._path is not None and self._known:
            if not isinstance(self._known.get("rounds"), int):
                raise damaged(self._path, "it says no rounds")
            self.first = plan_of_rounds(config, self._known["rounds"])
            self._revised = _numbers(self._path, self._known.get("revised", {}))

    @property
    def identity(self) -> Any:
        """What the run hangs on that has written the plan; None if nothing is there."""
        return self._known.get("identity")

    def begin(self, plan: Plan, pace: Pace, identity: Mapping[str, str]) -> None:
        """Keeps a plan, in place of one that may be there."""
        self.first, self._revised = plan, {}
        measured = dataclasses.asdict(pace)
        self._known = dict(
            rounds=plan.rounds, revised={}, pace=measured, identity=dict(identity)
        )
        self._write()

    def at(self, index: int) -> Plan:
        """The plan as it holds in the round of this number; there must be a plan."""
        assert self.first is not None
        from_here = [number for number in self._revised if number <= index]
        if not from_here:
            return self.first
        return dataclasses.replace(self.first, rounds=self._revised[max(from_here)])

    def is_due(self, index: int) -> bool:
        """Whether the number of rounds is to be looked at again before this round.

        Not after one round with student steps: the first one takes longer than others.
        """
        plan = self.at(0)
        done = index - plan.first
        every = math.ceil((plan.rounds - plan.first) / _REVISIONS)
        return done > 1 and done % every == 0 and index not in self._revised

    def revise(self, index: int, left: float, each: float) -> None:
        """Has as many rounds from here on as fit into the time, one at least.

        Args:
          index: the round before which the time was looked at.
          left: seconds that are left.
          each: seconds that a round with student steps takes.
        """
        self._revised[index] = index + max(1, int(left / each))
        self._known["revised"] = self._revised
        self._write()

    def _write(self) -> None:
        if self._path is not None:
            write_text(self._path, json.dumps(self._known, indent=2) + "\n")


def _numbers(path: pathlib.Path, found: Any) -> dict[int, int]:
    """Names and values of an object in JSON, all of them whole numbers."""
    try:
        return {int(name): int(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise damaged(path, "what it says of revised rounds") from error
