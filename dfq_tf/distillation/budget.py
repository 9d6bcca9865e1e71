"""Distillation from scratch in a given time: the recipe `budget`.

A round makes one batch of new images, which goes into the bank, and takes student steps
on crops of the bank's images, and of others, that the teacher has answered. `plan`
decides how many rounds there are.
"""

import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf import photographs
from dfq_tf.compat import keras, tf
from dfq_tf.context import Context, counted, stage
from dfq_tf.distillation import phases, steps
from dfq_tf.distillation.batch_size import BANK_MEMORY
from dfq_tf.distillation.generator import AUGMENTATION, STUDENT, make_generators
from dfq_tf.distillation.plan import (
    SPARE,
    KeptPlan,
    Pace,
    Plan,
    plan_for,
    plan_of_steps,
)
from dfq_tf.distillation.pool import (
    OTHERS_SEED,
    Answers,
    Store,
    answer_store,
    capacity,
)
from dfq_tf.distillation.synthesis import Synthesizer
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.errors import ConfigError
from dfq_tf.procedural import natural_noise
from dfq_tf.settings import BudgetConfig
from dfq_tf.training import (
    Evaluate,
    Learner,
    drawn_by,
    flip,
    mean_seconds,
    optimizers,
    random_states,
    run_loop,
    unchanged,
)

# Images from which no student learns: they are compared with the teacher on them.
_HELD_OUT_IMAGES = 256
_MAKERS = {
    "noise": natural_noise,
    "photographs": photographs.crops,
}
# Answered batches that are kept, over those that there are before the first student
# step. Of few, a student learns those that it saw last by heart
# (docs/experiments/distillation.md).
_KEPT_ANSWERS = 10
_TIMED = range(3)
_NAME = "distillation"


class Training(tf.Module):
    """Everything that a distillation changes, and the steps that change it.

    Args:
      teacher: frozen.
      students: are trained in place; of the context's precision.
      context: of the run.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        students: Sequence[Learner],
        context: Context[BudgetConfig],
    ) -> None:
        super().__init__(name="budget")
        config = context.settings
        self.teacher, self.students, self._context = teacher, students, context
        self.generators: list[keras.Model] = make_generators(
            teacher.image_shape, context
        )
        opponents = students if config.adversarial_weight else ()
        self.synthesizers = [
            Synthesizer(teacher, generator, opponents, config)
            for generator in self.generators
        ]
        size, shape = config.batch_size, (config.batch_size, *teacher.image_shape)
        most = min(config.bank_images, BANK_MEMORY // math.prod(shape[1:]))
        self.bank = Store(max(1, most // size), images=(shape, tf.uint8))
        self.held_out = Store(
            max(2, math.ceil(_HELD_OUT_IMAGES / size)), images=(shape, tf.uint8)
        )
        num_kept, count = capacity(size, teacher.image_shape, _KEPT_ANSWERS)
        others = _others(teacher, context, count)
        answered = answer_store(teacher, size, num_kept)
        self.answers = Answers(teacher, self.bank, others, config, answered)
        self.total_student_steps = tf.Variable(1, dtype=tf.int64)
        # What has gone by, and what of it in rounds with student steps: seconds.
        self.seconds = tf.Variable(0.0, dtype=tf.float64)
        self.learning_seconds = tf.Variable(0.0, dtype=tf.float64)
        self.student_optimizers = [
            _optimizer(student, config, self.total_student_steps)
            for student in students
        ]

    @property
    def all_variables(self) -> list[tf.Variable]:
        """Everything that steps change, each once, in an order that stays."""
        found = [
            *(v for each in self.synthesizers for v in each.all_variables),
            *self.bank.variables,
            *self.held_out.variables,
            *self.answers.variables,
            *(v for each in self.students for v in each.model.variables),
            *(v for each in self.student_optimizers for v in each.variables),
        ]
        return list({id(v): v for v in found}.values())

    def student_step(self, seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        """Trains the students on images that are answered."""
        config = self._context.settings
        seed = tf.random.fold_in(seed_and_step, STUDENT)
        images, logits = self.answers.store.draw(config.batch_size, seed)
        if config.student_augmentation == "crop_flip":
            # An answer holds for the mirror image too, nearly: it serves several steps.
            images = flip(images, tf.random.fold_in(seed_and_step, AUGMENTATION))
        pixels = tf.cast(images, tf.float32)
        return steps.descend_students(
            self.students, self.student_optimizers, config, pixels, logits
        )


def _optimizer(student: Learner, config: BudgetConfig, num_steps: tf.Variable) -> Any:
    """What trains a student, its rates 0 after so many steps."""
    rate, momentum = config.student_learning_rate, config.student_momentum
    if config.student_optimizer == "sgd":
        return optimizers.sgd(student.model, rate, num_steps, momentum)
    share = config.muon_learning_rate
    return optimizers.muon(student.model, rate, share, num_steps, momentum)


def _others(
    teacher: ObservedTeacher, context: Context[BudgetConfig], count: int
) -> dict[str, np.ndarray]:
    """So many images of each kind that has a share and needs no generator."""
    seed = context.seed + OTHERS_SEED
    return {
        kind: make(seed, count, teacher.image_shape)
        for kind, make in _MAKERS.items()
        if context.settings.share_of(kind)
    }


def check_devices(strategy: tf.distribute.Strategy | None) -> None:
    """Raises ConfigError if several devices are to train: the recipe takes one."""
    if strategy is not None and strategy.num_replicas_in_sync > 1:
        raise ConfigError(
            f"{strategy.num_replicas_in_sync} devices are to train, but the recipe "
            "budget trains on one. Take another recipe (--recipe=bank), or one device "
            "(--distribute=none)"
        )


class Budget:
    """A distillation that ends in time.

    Args:
      teacher: frozen, on one device.
      students: are trained in place; of the context's precision.
      context: of the run.

    Raises:
      ConfigError: there are several devices, or too little time.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        students: Sequence[Learner],
        context: Context[BudgetConfig],
    ) -> None:
        self._began = time.monotonic()
        check_devices(context.strategy)
        phases.warn_without_statistics(teacher)
        self._context, self._config = context, context.settings
        with stage("images of formulas", context.progress):
            self._training = Training(teacher, students, context)
        self._num_held_out = self._training.held_out.num_batches
        shape = teacher.image_shape
        self._num_answered, _ = capacity(self._config.batch_size, shape)
        self._compile()
        self._plan = self._planned()
        self._round_ended = time.monotonic()
        if not self._is_begun:  # else the checkpoint has them
            with stage("images held out", context.progress):
                for number in counted(range(self._num_held_out), "batches"):
                    self._make_batch(number, held_out=True)

    @property
    def generators(self) -> list[keras.Model]:
        """As they were for the newest batch of each."""
        return self._training.generators

    @property
    def held_out(self) -> np.ndarray:
        """Images from which no student learns, uint8 (n, height, width, channels)."""
        return self._training.held_out.all()["images"]

    def sample(self, count: int) -> np.ndarray:
        """Some of the images in the bank, spread over all of it, uint8."""
        images = self._training.bank.all()["images"]
        places = np.linspace(len(images) - 1, 0, min(count, len(images)))
        return images[places.astype(int)]

    def run(
        self,
        identity: Mapping[str, str] | None = None,
        evaluate: Evaluate | None = None,
    ) -> dict[str, float]:
        """Takes all rounds, or those that are left of them.

        Args:
          identity: what else the run hangs on, see `run_loop`.
          evaluate: measures the students now and then.

        Returns:
          The last measurements; empty if an earlier run had finished.

        Raises:
          TrainingError: a loss or a weight became infinite or NaN.
        """
        training, plan = self._training, self._plan.at(0)
        self._round_ended = time.monotonic()
        training.seconds.assign(self._round_ended - self._began)
        return run_loop(
            _NAME,
            self._round,
            lambda index: self._plan.at(index).rounds,
            phases.trackables(
                None,
                training=[training],
                student=[student.model for student in training.students],
                student_optimizer=training.student_optimizers,
            ),
            self._context,
            identity={
                **phases.identity_of(training.teacher, self._context),
                "plan": repr(plan),
                "answered batches": str(training.answers.store.num_batches),
                **(identity or {}),
            },
            evaluate=evaluate,
            evaluate_every=math.ceil(plan.rounds / 10),
            measure_every=1,
            # Rounds without student steps say nothing of how long the others take.
            seconds_left=None if self._config.steps else self._seconds_left,
        )

    def _seconds_left(self) -> float:
        return max(0.0, 60 * self._config.minutes - float(self._training.seconds))

    def _round(self, index: int) -> steps.Measurements:
        """One batch of new images, and the student steps of the round, if any."""
        self._revise(index)
        plan = self._plan.at(index)
        measurements = self._take(index, plan)
        now = time.monotonic()
        took, self._round_ended = now - self._round_ended, now
        self._training.seconds.assign_add(took)
        if index > plan.first:  # that one has the answers of the beginning
            self._training.learning_seconds.assign_add(took)
        return measurements

    def _revise(self, index: int) -> None:
        """Looks at the time that is left, where it is due."""
        config, training, plan = self._config, self._training, self._plan
        if config.steps or not plan.is_due(index):
            return
        measured = index - plan.at(0).first - 1
        each = float(training.learning_seconds) / measured
        plan.revise(index, self._seconds_left(), each)

    def _take(self, index: int, plan: Plan) -> steps.Measurements:
        """The steps of a round."""
        training = self._training
        training.total_student_steps.assign(plan.total_student_steps)
        number, done = self._num_held_out + index, index - plan.first
        # Its very first batches are poor. The last ones before the students begin are
        # held out in their place: the generator has learnt, and is against nobody yet.
        is_held_out = -self._num_held_out <= done < 0 and self._has_learnt(plan)
        # Where there is a student, the newest images are learnt from with the answers
        # that the generator has had for them, which cost nothing.
        measurements = self._make_batch(number, is_held_out, gives_answers=done > 0)
        if done < 0:
            return measurements
        if done == 0:
            weight = self._config.adversarial_weight
            for synthesizer in training.synthesizers:
                synthesizer.adversarial_weight.assign(weight)
            for number in range(self._num_answered):
                self._answer(self._step(number))
        answered = self._num_answered + done * plan.answers_in_round
        for i in range(plan.student_steps):
            if i % plan.answer_uses == 0:
                self._answer(self._step(answered + i // plan.answer_uses))
            number = done * plan.student_steps + i
            measurements |= self._student_step(self._step(number))
        return measurements

    def _has_learnt(self, plan: Plan) -> bool:
        """Whether batches enough for the bank come before those to be held out."""
        return plan.first >= 2 * self._num_held_out

    @property
    def _is_begun(self) -> bool:
        """Whether a run left checkpoints here, as the loop's manager finds them.

        A file that no list names is what was left of a save that was cut off.
        """
        folder = self._context.directory
        if folder is None:
            return False
        kept = pathlib.Path(folder) / "checkpoints" / _NAME
        return tf.train.get_checkpoint_state(str(kept)) is not None

    def _step(self, number: int) -> tf.Tensor:
        return tf.constant([self._context.seed, number])

    def _compile(self) -> None:
        training = self._training
        self._answer = phases.compiled(training.answers.refresh)
        states = random_states(student.model for student in training.students)
        self._student_step = drawn_by(phases.compiled(training.student_step), states)
        stores = (training.bank, training.held_out)
        self._makers = [
            each.makers(stores, self._context.seed, training.answers.store)
            for each in training.synthesizers
        ]

    def _make_batch(
        self, number: int, held_out: bool = False, gives_answers: bool = False
    ) -> steps.Measurements:
        """A batch of new images, which go into the bank, or to those held out."""
        makers = self._makers[number % len(self._makers)]
        return makers[held_out](number, gives_answers)

    def _planned(self) -> KeptPlan:
        """The plan: that of the steps, or one written down before, or a new one.

        What is written down is kept while there are checkpoints: if it is of another
        run, the loop refuses to go on from these.
        """
        config, context = self._config, self._context
        if config.steps:
            plan = KeptPlan(None, config)
            plan.first = plan_of_steps(config)
            return plan
        identity = phases.identity_of(self._training.teacher, context)
        student = self._training.students[0].model
        identity["weights of the student"] = str(student.count_params())
        plan = KeptPlan(context.directory, config)
        if plan.first and (plan.identity == identity or self._is_begun):
            return plan
        with stage("pace of this machine", context.progress):
            pace = self._pace()
        spent = time.monotonic() - self._began + self._num_held_out * pace.batch
        left = (60 * config.minutes - spent) * (1 - SPARE)
        plan.begin(plan_for(config, pace, left, spent), pace, identity)
        return plan

    def _pace(self) -> Pace:
        """Takes some steps of each kind, and undoes them."""
        with unchanged(self._training.all_variables):
            for number in range(len(self._makers)):  # all of them are compiled
                self._make_batch(number)
                self._make_batch(number, held_out=True)
            batch = mean_seconds(self._make_batch, range(1))
            answers = mean_seconds(lambda i: self._answer(self._step(i)), _TIMED)
            student = mean_seconds(lambda i: self._student_step(self._step(i)), _TIMED)
        return Pace(self._num_answered * answers, batch, answers, student)
