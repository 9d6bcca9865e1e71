"""Distillation from scratch in a number of rounds: the recipes `paper` and `bank`."""

from collections.abc import Mapping, Sequence

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.context import Context
from dfq_tf.distillation import generator, phases
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.settings import DistillationConfig
from dfq_tf.training import Evaluate, Learner


class Rounds:
    """Generators that are warmed up, then trained against the students.

    Args:
      teacher: frozen, on the context's devices.
      students: are trained in place; of the context's precision.
      context: of the run.

    Attributes:
      held_out: images that train nothing, uint8 (n, height, width, channels).

    Raises:
      ConfigError: the batch does not divide between the devices.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        students: Sequence[Learner],
        context: Context[DistillationConfig],
    ) -> None:
        phases.check_shares(context)  # before the warm-up, which takes any batch
        self._students, self._context = students, context
        self._bank = phases.make_bank(students[0], context.settings, context.seed)
        self._warmed = phases.warmed_up(teacher, context, self._bank)
        self.held_out = self.sample(generator.held_out_count(teacher.image_shape))

    @property
    def generators(self) -> list[keras.Model]:
        """As they are now."""
        return self._warmed.generators

    def sample(self, count: int) -> np.ndarray:
        """Images of the generators as they are now, uint8.

        They are of other noise than training and calibration have.
        """
        context = self._context
        config, seed = context.settings, context.seed + 1
        return generator.generate(self.generators, config, count, seed)

    def run(
        self,
        identity: Mapping[str, str] | None = None,
        evaluate: Evaluate | None = None,
    ) -> dict[str, float]:
        """See `phases.distill`."""
        return phases.distill(
            self._warmed,
            self._students,
            self._context,
            identity=identity,
            bank=self._bank,
            evaluate=evaluate,
        )
