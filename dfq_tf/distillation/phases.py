"""The two phases of data-free training: warm-up, then students, and generators too."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.distillation import batch_size, steps
from dfq_tf.distillation.bank import ImageBank
from dfq_tf.distillation.generator import generate, make_generators
from dfq_tf.distillation.pool import Pool, capacity
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.graph import FLOAT, Classifier
from dfq_tf.settings import PHASE_SETTINGS, BudgetConfig, DistillationConfig
from dfq_tf.training import (
    Copies,
    Evaluate,
    Learner,
    check_batch,
    devices,
    drawn_by,
    everywhere,
    mean_seconds,
    optimizers,
    random_states,
    replica_slice,
    round_batch,
    run_loop,
    unchanged,
)

# Added to the seed for the images of a pool: others calibrate, or are held out.
POOL_SEED = 3
# The settings on which the generators' warm-up hangs: those that all phases share, but
# for the weight of the auxiliary loss, which is alone there.
_WARM_UP_SETTINGS = {field.name for field in dataclasses.fields(DistillationConfig)} - {
    *PHASE_SETTINGS,
    "num_students",
    "alpha",
}


@dataclasses.dataclass(frozen=True)
class WarmedUp:
    """A teacher, and generators that make images like those it was trained on.

    Attributes:
      teacher: frozen, with its BN statistics.
      generators: warmed up.
    """

    teacher: ObservedTeacher
    generators: list[keras.Model]


def warmed_up(
    teacher: ObservedTeacher,
    context: Context[DistillationConfig],
    bank: ImageBank | None = None,
) -> WarmedUp:
    """What distillation and quantization begin with.

    Args:
      teacher: what the students will learn from, on the context's devices.
      context: of the run.
      bank: takes the images of the warm-up.

    Raises:
      ConfigError: the batch has no size.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.

    Warns:
      UserWarning: the teacher has no BN layers: nothing keeps the images close to the
        training data.
    """
    warn_without_statistics(teacher)
    generators = make_generators(teacher.image_shape, context)
    warm_up(teacher, generators, context, bank)
    return WarmedUp(teacher, generators)


def warn_without_statistics(teacher: ObservedTeacher) -> None:
    """Warns of generated images that follow nothing but the teacher's answers."""
    if not teacher.bn_inputs:
        warnings.warn(
            "the teacher has no BatchNormalization: its generated images follow no "
            "statistics of the training data, only the teacher's answers to them",
            stacklevel=3,
        )


def warm_up(
    teacher: ObservedTeacher,
    generators: Sequence[keras.Model],
    context: Context[DistillationConfig],
    bank: ImageBank | None = None,
) -> dict[str, float]:
    """Trains the generators alone, in place, on the auxiliary loss.

    Args:
      teacher: frozen, on the context's devices.
      generators: from `make_generators`.
      context: its settings have the steps, their batch size, weights of the terms.
      bank: takes the images of all steps, with the teacher's answers.

    Returns:
      The last measurements; empty if an earlier run had finished.

    Raises:
      ConfigError: the batch has no size.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
    """
    config = context.settings
    check_batch(None, config.batch_size)  # of several devices it is rounded
    config = dataclasses.replace(config, batch_size=warm_up_batch(context))
    copies = Copies(context.strategy)
    state = new_state(copies, context, teacher, generators, config.warm_up_steps)

    def on_device(seed_and_step: tf.Tensor) -> steps.GeneratorStep:
        return steps.warm_up_step(state, config, seed_and_step)

    step = compiled(on_device, context.strategy)

    def one_step(index: int) -> steps.Measurements:
        made = step(tf.constant([context.seed, index]))
        if bank is not None:
            bank.add(made.images.numpy(), made.teacher_logits.numpy())
        return made.measurements

    others = () if bank is None else ("bank_images",)
    measurements = run_loop(
        "warm_up",
        one_step,
        config.warm_up_steps,
        trackables(
            bank, generator=state.generators, optimizer=state.generator_optimizers
        ),
        context,
        identity=warm_up_identity(teacher, context, others),
    )
    copies.write_back()
    return measurements


def check_shares(context: Context[DistillationConfig]) -> None:
    """Raises ConfigError if a batch of `distill` does not divide between the devices.

    What is learnt from a pool alone comes in batches that are rounded, as those of the
    warm-up are: see `student_batch`.
    """
    config, strategy = context.settings, context.strategy
    is_rounded = config.pool_images and not config.generator_steps
    check_batch(
        None if is_rounded else strategy, config.batch_size, config.num_generators
    )


def warm_up_identity(
    teacher: ObservedTeacher,
    context: Context[DistillationConfig],
    others: Collection[str] = (),
) -> dict[str, str]:
    """What the warmed-up generators hang on, see `run_loop`.

    Args:
      teacher: what they learnt from.
      context: of the run.
      others: names of settings that count too.
    """
    return identity_of(teacher, context, _WARM_UP_SETTINGS.union(others))


def warm_up_batch(context: Context[DistillationConfig]) -> int:
    """Generated images per warm-up step, which all devices can share."""
    config = context.settings
    size = min(config.warm_up_batch_size, config.batch_size)
    return round_batch(context.strategy, size, config.num_generators)


def distill(
    warmed: WarmedUp,
    students: Sequence[Learner],
    context: Context[DistillationConfig],
    *,
    name: str = "distillation",
    identity: Mapping[str, str] | None = None,
    bank: ImageBank | None = None,
    images: Callable[[], np.ndarray] | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, float]:
    """Trains students, and generators against them, all in place.

    Each round takes `generator_steps`, all on fresh noise, then `student_steps`: with
    `pool_images`, on crops of a pool that the teacher has answered; with
    `bank_images`, on images of past generator steps; with `share_images`, on those of
    the round's generator steps, in turn; else on fresh noise too.

    Args:
      warmed: the teacher, and generators that have been warmed up; none are needed for
        a pool of given images, without generator steps.
      students: float or fake-quantized; they give logits.
      context: its settings have the rounds, batch size, learning rates, weights of the
        terms.
      name: of the phase, see `run_loop`.
      identity: what else the phase hangs on, see `run_loop`.
      bank: what the warm-up filled; by default a new one, if the settings want one.
      images: makes the `pool_count` images of a pool, uint8 (n, height, width,
        channels), once there is a round to take; by default the generators do.
      evaluate: measures the students now and then, see `run_loop`.

    Returns:
      The last measurements, of an earlier run none; `rounds`, if `max_minutes` is set.

    Raises:
      ConfigError: the batch does not divide between the devices.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
    """
    config, teacher, made = context.settings, warmed.teacher, warmed.generators
    check_shares(context)
    copies = Copies(context.strategy)
    state = new_state(copies, context, teacher, made, config.rounds, students)
    if bank is None:
        bank = make_bank(students[0], config, context.seed)
    known = {**identity_of(teacher, context), **(identity or {})}
    one_round = _Round(state, context, bank, _make_pool(warmed, images, context))
    rounds = _affordable_rounds(one_round, name, known, context)
    measurements = run_loop(
        name,
        one_round,
        rounds,
        one_round.trackables,
        context,
        identity=known,
        evaluate=copies.up_to_date(evaluate),
        evaluate_every=max(1, rounds // 10),
        measure_every=1,  # of large images, one round takes minutes
    )
    copies.write_back()
    return {**measurements, **({"rounds": rounds} if config.max_minutes else {})}


def run_names(name: str) -> tuple[str, str]:
    """What `distill` calls the runs of a phase, for `seconds_in_steps`."""
    return name, f"{name}_timing"


def _make_pool(
    warmed: WarmedUp,
    images: Callable[[], np.ndarray] | None,
    context: Context[DistillationConfig],
) -> Pool | None:
    """A pool of the images, or of those of the generators; None if none is wanted."""
    config, teacher, seed = context.settings, warmed.teacher, context.seed
    if not config.pool_images:
        return None
    count = pool_count(config, teacher.image_shape)

    def generated() -> np.ndarray:
        return generate(warmed.generators, config, count, seed + POOL_SEED)

    small = dataclasses.replace(config, batch_size=student_batch(context))
    return Pool(teacher, images or generated, count, small, seed, compiled)


def pool_count(config: DistillationConfig, shape: tuple[int, int, int]) -> int:
    """Images of a pool: whole batches, one at least, that fit into memory."""
    most = min(config.pool_images, batch_size.BANK_MEMORY // math.prod(shape))
    return max(1, most // config.batch_size) * config.batch_size


def pool_bytes(config: DistillationConfig, shape: tuple[int, int, int]) -> int:
    """About what a pool takes in memory; 0 where none is wanted.

    Args:
      config: has a number for the batch size.
      shape: of an image.
    """
    if not config.pool_images:
        return 0
    size = min(config.pool_batch_size, config.batch_size)
    answered, others = capacity(size, shape)
    # The images are there twice: as they were made, and in variables.
    count = 2 * pool_count(config, shape) + answered * size
    return (count + others * bool(config.noise_share)) * math.prod(shape)


def student_batch(context: Context[DistillationConfig]) -> int:
    """Images per student step: fewer with a pool; all devices can share them."""
    config = context.settings
    if not config.pool_images:
        return config.batch_size
    size = min(config.pool_batch_size, config.batch_size)
    return round_batch(context.strategy, size)


def _affordable_rounds(
    one_round: "_Round",
    name: str,
    identity: Mapping[str, str],
    context: Context[DistillationConfig],
) -> int:
    """As many rounds as are asked for, or as there is time for.

    How long a round takes is measured once; a run that goes on keeps to what was found.
    The learning rates end with them.
    """
    config, found = context.settings, tf.Variable(0, trainable=False)
    if not (config.max_minutes and config.rounds):
        return config.rounds

    def measure(index: int) -> Mapping[str, tf.Tensor]:
        affordable = int(60 * config.max_minutes / max(one_round.seconds(), 1e-9))
        rounds = min(config.rounds, max(1, affordable))
        of_all = devices.of_all_workers([rounds], strategy=context.strategy)
        found.assign(int(of_all.min()))
        return {"rounds": found.read_value()}

    _, timing = run_names(name)
    run_loop(timing, measure, 1, {"rounds": found}, context, identity=identity)
    one_round.end_after(int(found.numpy()))
    return int(found.numpy())


class _Round:
    """Takes the steps of a round: it is called with the round's number."""

    def __init__(
        self,
        state: steps.State,
        context: Context[DistillationConfig],
        bank: ImageBank | None,
        pool: Pool | None,
    ) -> None:
        self._state, self._bank, self._pool = state, bank, pool
        self._config, self._seed = context.settings, context.seed
        config = answered = context.settings
        if pool is not None:  # its images are changed before the teacher answers them
            answered = dataclasses.replace(config, student_augmentation="none")

        def generator_step(seed_and_step: tf.Tensor) -> steps.GeneratorStep:
            return steps.generator_step(state, config, seed_and_step)

        def student_step(seed_and_step: tf.Tensor) -> steps.Measurements:
            return steps.student_step(state, config, seed_and_step)

        def answered_step(
            images: tf.Tensor, logits: tf.Tensor, seed_and_step: tf.Tensor
        ) -> steps.Measurements:
            images, logits = replica_slice(images), replica_slice(logits)
            return steps.answered_step(state, answered, images, logits, seed_and_step)

        self._generator_step, self._student_step, self._answered_step = (
            compiled(step, context.strategy)
            for step in (generator_step, student_step, answered_step)
        )
        with devices.scope(context.strategy):
            states = random_states(student.model for student in state.students)
        self._student_step, self._answered_step = (
            drawn_by(step, states) for step in (self._student_step, self._answered_step)
        )

    def __call__(self, index: int) -> steps.Measurements:
        """The last measurements of each kind of step."""
        if self._pool is not None:
            self._pool.fill()
        measurements: steps.Measurements = {}
        made: list[steps.GeneratorStep] = []
        first = index * self._config.generator_steps
        for i in range(self._config.generator_steps):
            made.append(self._generator_step(tf.constant([self._seed, first + i])))
            measurements |= made[-1].measurements
            if self._bank is not None:
                self._bank.add(made[-1].images.numpy(), made[-1].teacher_logits.numpy())
            if self._pool is not None:
                self._pool.add(made[-1].images)
        first = index * self._config.student_steps
        for i in range(self._config.student_steps):
            measurements |= self._train_students(made, i, first + i)
        return measurements

    @property
    def trackables(self) -> dict[str, Any]:
        """All that rounds change, by name."""
        state, pool = self._state, self._pool
        grows = self._config.generator_steps > 0
        return trackables(
            self._bank,
            generator=state.generators,
            generator_optimizer=state.generator_optimizers,
            student=[student.model for student in state.students],
            student_optimizer=state.student_optimizers,
            pool=[] if pool is None else pool.changing(grows),
        )

    def end_after(self, rounds: int) -> None:
        """Lets the learning rates reach 0 after so many rounds."""
        assert self._state.rounds is not None
        self._state.rounds.assign(rounds)

    def seconds(self) -> float:
        """About how long a round takes; takes some steps for it, and undoes them."""
        config, made = self._config, list[steps.GeneratorStep]()

        def generator_step(number: int) -> steps.Measurements:
            made[:] = [self._generator_step(tf.constant([self._seed, number]))]
            return made[0].measurements

        def student_step(number: int) -> steps.Measurements:
            return self._train_students(made, 0, number)

        total, first, uses = 0.0, 0, 1
        if self._pool is not None:
            self._pool.fill()
            first, uses = self._pool.usual_steps
        with unchanged(self._variables):
            if config.generator_steps:
                each = mean_seconds(generator_step, range(1))
                total += config.generator_steps * each
            each = mean_seconds(student_step, range(first, first + uses))
        return total + config.student_steps * each

    @property
    def _variables(self) -> list[tf.Variable]:
        """What steps change, without banked images; of answers, their number."""
        state, pool = self._state, self._pool
        optimizers = [*state.generator_optimizers, *state.student_optimizers]
        models = [*state.generators, *(each.model for each in state.students)]
        return [
            *(v for each in optimizers for v in _variables_of(each)),
            *(v for each in models for v in each.variables),
            *([] if pool is None else [pool.answered.added]),
        ]

    def _train_students(
        self, made: Sequence[steps.GeneratorStep], index: int, number: int
    ) -> steps.Measurements:
        """A step on images of wherever the settings say.

        Args:
          made: what the generator steps of the round have made.
          index: of the step in the round.
          number: of the step in the run.
        """
        seed_and_step = tf.constant([self._seed, number])
        size = self._config.batch_size
        if self._pool is not None:
            images, logits = self._pool.draw(number)
        elif self._bank:
            images, logits = map(tf.constant, self._bank.draw(size, number))
        elif self._config.share_images or self._bank is not None:
            images, logits = _shared(made, index, size)
        else:
            return self._student_step(seed_and_step)
        return self._answered_step(images, logits, seed_and_step)


def _variables_of(optimizer: Any) -> Sequence[tf.Variable]:
    """Keras' newer optimizers have a list, the legacy ones a method."""
    found = optimizer.variables
    return found() if callable(found) else found


def _shared(
    made: Sequence[steps.GeneratorStep], index: int, batch_size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """One batch of what generator steps have made, images of all generators in it."""
    each = made[index % len(made)]
    stride = len(each.images) // batch_size
    start = index // len(made) % stride
    return each.images[start::stride], each.teacher_logits[start::stride]


def make_bank(
    network: Classifier | Learner, config: DistillationConfig, seed: int
) -> ImageBank | None:
    """An empty bank for a network's images and classes; None if none is wanted.

    Args:
      network: teacher or student.
      config: says how many images it holds, if they fit into batch_size.BANK_MEMORY.
      seed: decides what is drawn.
    """
    if not config.bank_images:
        return None
    shape, classes = network.image_shape, network.num_classes
    image_bytes = math.prod(shape) + FLOAT * classes
    most = batch_size.BANK_MEMORY // image_bytes
    return ImageBank(min(config.bank_images, most), shape, classes, seed)


def compiled(
    step: Callable[..., Any], strategy: tf.distribute.Strategy | None = None
) -> Any:
    """Compiles a step, to run on all devices of a strategy; None for one device.

    One device is compiled for by XLA if it is a GPU: it halves the speed of CPUs.
    """
    on_all = everywhere(step, strategy)
    use_xla = on_all is step and bool(tf.config.get_visible_devices("GPU"))
    return tf.function(on_all, jit_compile=use_xla or None, autograph=False)


def new_state(
    copies: Copies,
    context: Context[DistillationConfig],
    teacher: ObservedTeacher,
    generators: Sequence[keras.Model],
    rounds: int,
    students: Sequence[Learner] = (),
) -> steps.State:
    """A training at its begin: copies on all devices, with optimizers.

    Args:
      copies: makes the copies of the networks; of one device, these themselves.
      context: of the run.
      teacher: frozen.
      generators: are trained.
      rounds: after which learning rates are 0, until `State.rounds` says otherwise.
      students: none in the warm-up, where each round is a step of the generators.
    """
    config = context.settings
    generators = [copies.of(generator) for generator in generators]
    students = [Learner(copies.of(s.model), s.description) for s in students]
    with devices.scope(context.strategy):
        number = tf.Variable(rounds, trainable=False, dtype=tf.int64)
        each = config.generator_steps if students else 1
        return steps.State(
            teacher,
            generators,
            [
                optimizers.adam(g, config.generator_learning_rate, number, each)
                for g in generators
            ],
            students,
            [student_optimizer(s.model, config, number) for s in students],
            number,
        )


def student_optimizer(
    model: keras.Model, config: DistillationConfig, rounds: tf.Variable | None = None
) -> Any:
    """The student's optimizer, built, with a cosine decay over all student steps.

    Args:
      model: is trained.
      config: says which optimizer, and the student steps of a round.
      rounds: a variable for their number; by default that of the settings.
    """
    rate, times = config.student_learning_rate, config.student_steps
    number: Any = config.rounds if rounds is None else rounds
    if config.student_optimizer == "adam":
        return optimizers.adam(model, rate, number, times)
    return optimizers.sgd(model, rate, number, config.student_momentum, times)


def identity_of(
    teacher: ObservedTeacher,
    context: Context[DistillationConfig] | Context[BudgetConfig],
    names: Collection[str] | None = None,
) -> dict[str, str]:
    """What a phase hangs on, see `run_loop`; of the settings, by default all."""
    description = teacher.description
    feeding = f"{description.input_mean}, {description.input_scale}"
    values = dataclasses.asdict(context.settings)
    return {
        "teacher": f"{teacher.graph.digest()}, fed with {feeding}",
        "seed": str(context.seed),
        "precision": context.precision,
        **{
            name: str(value)
            for name, value in values.items()
            if names is None or name in names
        },
    }


def trackables(bank: ImageBank | None, **groups: Sequence[Any]) -> dict[str, Any]:
    """Names for what a checkpoint keeps: generator, generator_1, generator_2, ..."""
    named = {
        f"{name}_{i}" if i else name: each
        for name, group in groups.items()
        for i, each in enumerate(group)
    }
    return named if bank is None else {**named, "bank": bank}
