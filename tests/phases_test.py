import contextlib
import copy
import dataclasses
import functools
import glob
import warnings
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf, traced
from dfq_tf.distillation import batch_size, phases, pool, steps
from dfq_tf.distillation import generator as generators_module
from dfq_tf.distillation.generator import (
    SAMPLE,
    build_generator,
    generate,
    make_generators,
    sample_noise,
)
from dfq_tf.distillation.phases import WarmedUp
from dfq_tf.distillation.rounds import Rounds
from dfq_tf.distillation.teacher import observe
from dfq_tf.errors import ConfigError, TrainingError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.layers import resized
from dfq_tf.procedural import natural_noise
from dfq_tf.settings import qat_recipe
from dfq_tf.training import devices, loop
from dfq_tf.training.learner import Learner
from tests import helpers

_CONFIG = qat_recipe(
    "paper",
    batch_size=4,
    noise_dim=3,
    warm_up_steps=6,
    rounds=4,
    generator_steps=1,
    student_steps=2,
    student_learning_rate=0.01,
)


@functools.cache
def _small_teacher():
    """For smaller images than those of a model that is read."""
    teacher = helpers.small_classifier((8, 8, 1))
    graph = resized(teacher.graph, (4, 4, 1))
    return Classifier(graph, teacher.description)


@functools.cache
def _observed(precision="float32"):
    return observe(_small_teacher(), precision)


def _small_generators(config, precision="float32"):
    small = functools.partial(build_generator, channels=8)
    context = helpers.context(config, seed=1, precision=precision)
    with mock.patch.object(generators_module, "build_generator", small):
        return make_generators((4, 4, 1), context)


# Both are built, and one taken: a second pair shares nothing with the first.
_generators = helpers.Reused(lambda i: _small_generators(SeveralTest.config)[i])
_generator = helpers.Reused(lambda precision: _small_generators(_CONFIG, precision)[0])
_student_model = helpers.Reused(
    lambda seed: helpers.small_learner((4, 4, 1), seed=seed).model
)


def _student(seed):
    return Learner(_student_model(seed), helpers.description(4))


class _Runs:
    """Networks with the same weights each time."""

    def __init__(self, precision="float32"):
        self.teacher = _observed(precision)
        self.generator = _generator(precision)
        self.student = _student(5)

    @property
    def weights(self):
        return [*self.generator.weights, *self.student.model.weights]

    def warm_up(self, directory=None, config=_CONFIG, seed=2):
        context = helpers.context(config, seed=seed, directory=directory)
        return phases.warm_up(self.teacher, [self.generator], context)

    def distill(self, directory=None, config=_CONFIG, seed=2, **kwargs):
        context = helpers.context(config, seed=seed, directory=directory)
        warmed = WarmedUp(self.teacher, [self.generator])
        return phases.distill(warmed, [self.student], context, **kwargs)


def _weights_of(teacher):
    return tf.nest.flatten(teacher.weights)


def _interrupting(interrupted_at, **changes):
    """A loop that saves when it may, at every other step; one step interrupts it."""
    changes = changes or {"measure_every": 2}

    def run_loop(name, step, *args, **kwargs):
        def interrupted(index):
            if index == interrupted_at:
                raise KeyboardInterrupt
            return step(index)

        kwargs |= {"save_seconds": 0, **changes}
        return loop.run_loop(name, interrupted, *args, **kwargs)

    return mock.patch.object(phases, "run_loop", run_loop)


class PhasesTestCase(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        _generator.begin()
        _student_model.begin()


class WarmUpTest(PhasesTestCase):
    @parameterized.parameters("float32", "bfloat16")
    def test_decreases_the_auxiliary_loss(self, precision):
        runs = _Runs(precision)
        noise_seed = tf.constant([9, 9])

        def auxiliary_loss():
            copy = keras.models.clone_model(runs.generator)
            copy.set_weights(runs.generator.get_weights())
            optimizer = keras.optimizers.SGD(0.0)
            optimizer.build(copy.trainable_variables)
            state = steps.State(runs.teacher, [copy], [optimizer])
            step = steps.warm_up_step(state, _CONFIG, noise_seed)
            return step.measurements["auxiliary_loss"]

        before = auxiliary_loss()
        last = runs.warm_up(config=dataclasses.replace(_CONFIG, warm_up_steps=30))
        self.assertLess(auxiliary_loss(), 0.7 * before)
        self.assertLess(last["auxiliary_loss"], before)

    @helpers.eagerly()
    def test_seed_decides_the_result(self):
        runs = [_Runs() for _ in range(3)]
        for run, seed in zip(runs, (2, 2, 3)):
            run.warm_up(seed=seed)
        self.assertTrue(helpers.all_equal(runs[0].weights, runs[1].weights))
        self.assertFalse(helpers.all_equal(runs[0].weights, runs[2].weights))

    @helpers.eagerly()
    def test_leaves_the_teacher_bit_for_bit(self):
        runs = _Runs()
        before = helpers.copies(_weights_of(runs.teacher))
        runs.warm_up()
        self.assertTrue(helpers.all_equal(_weights_of(runs.teacher), before))

    @helpers.eagerly()
    def test_interrupted_run_continues_to_the_same_weights(self):
        whole = _Runs()
        whole.warm_up()
        directory = self.get_temp_dir()
        interrupted = _Runs()
        with _interrupting(3), self.assertRaises(KeyboardInterrupt):
            interrupted.warm_up(directory)
        self.assertFalse(helpers.all_equal(interrupted.weights, whole.weights))
        continued = _Runs()
        continued.warm_up(directory)
        self.assertTrue(helpers.all_equal(continued.weights, whole.weights))

    @helpers.eagerly()
    def test_finished_run_is_not_repeated(self):
        directory = self.get_temp_dir()
        first = _Runs()
        first.warm_up(directory)
        second = _Runs()
        with mock.patch.object(steps, "warm_up_step") as step:
            self.assertEqual(second.warm_up(directory), {})
        step.assert_not_called()
        self.assertTrue(helpers.all_equal(second.weights, first.weights))

    def test_zero_steps_leave_the_generator_as_it_is(self):
        runs = _Runs()
        before = helpers.copies(runs.weights)
        runs.warm_up(config=dataclasses.replace(_CONFIG, warm_up_steps=0))
        self.assertTrue(helpers.all_equal(runs.weights, before))

    def test_loss_that_is_not_finite_is_named(self):
        runs = _Runs()
        means = [mean * np.nan for mean in runs.teacher.means]
        runs.teacher = dataclasses.replace(runs.teacher, means=means)
        # At the first step: after it, the generator and all its terms are bad.
        with self.assertRaisesRegex(
            TrainingError, "warm_up: auxiliary_loss, bn_statistics_loss is not finite"
        ):
            runs.warm_up(config=dataclasses.replace(_CONFIG, warm_up_steps=1))


class DistillTest(PhasesTestCase):
    def test_takes_the_steps_of_each_round_on_noise_of_their_own(self):
        taken = []

        def recording(name):
            def step(state, config, seed_and_step):
                tf.py_function(
                    lambda s: taken.append((name, *map(int, s))), [seed_and_step], []
                )
                measured = {name: tf.constant(0.0)}
                if name == "student":
                    return measured
                return steps.GeneratorStep(measured, tf.zeros(()), tf.zeros(()))

            return step

        with (
            mock.patch.object(steps, "generator_step", recording("generator")),
            mock.patch.object(steps, "student_step", recording("student")),
        ):
            _Runs().distill(config=dataclasses.replace(_CONFIG, rounds=2))
        self.assertEqual(
            taken,
            [
                ("generator", 2, 0),
                ("student", 2, 0),
                ("student", 2, 1),
                ("generator", 2, 1),
                ("student", 2, 2),
                ("student", 2, 3),
            ],
        )

    def test_student_learns_to_answer_as_the_teacher(self):
        runs = _Runs()
        config = dataclasses.replace(
            _CONFIG,
            batch_size=16,
            rounds=40,
            generator_steps=0,
            student_learning_rate=0.05,
        )
        images = generate([runs.generator], config, 64, seed=3)
        teacher = _small_teacher().scores(images)

        def disagreement():
            difference = tf.nn.softmax(runs.student.scores(images))
            return np.abs(difference - tf.nn.softmax(teacher)).mean()

        before = disagreement()
        runs.distill(config=config)
        self.assertLess(disagreement(), 0.7 * before)

    def test_leaves_the_teacher_and_trains_both_others(self):
        runs = _Runs()
        teacher = helpers.copies(_weights_of(runs.teacher))
        generator = helpers.copies(runs.generator.trainable_variables)
        student = helpers.copies(runs.student.model.trainable_variables)
        last = runs.distill()
        self.assertTrue(helpers.all_equal(_weights_of(runs.teacher), teacher))
        for before, after in (
            (generator, runs.generator.trainable_variables),
            (student, runs.student.model.trainable_variables),
        ):
            self.assertFalse(helpers.all_equal(before, after))
        self.assertContainsSubset({"generator_loss", "distillation_loss"}, last)

    @helpers.eagerly()
    def test_no_generator_steps_leave_the_generator(self):
        runs = _Runs()
        generator = helpers.copies(runs.generator.trainable_variables)
        runs.distill(config=dataclasses.replace(_CONFIG, generator_steps=0))
        self.assertTrue(
            helpers.all_equal(runs.generator.trainable_variables, generator)
        )

    def test_interrupted_run_continues_to_the_same_weights(self):
        whole = _Runs()
        whole.distill()
        directory = self.get_temp_dir()
        interrupted = _Runs()
        with _interrupting(3), self.assertRaises(KeyboardInterrupt):
            interrupted.distill(directory)
        self.assertFalse(helpers.all_equal(interrupted.weights, whole.weights))
        continued = _Runs()
        continued.distill(directory)
        self.assertTrue(helpers.all_equal(continued.weights, whole.weights))

    @helpers.eagerly()
    def test_layers_that_draw_numbers_continue_to_the_same_weights(self):
        directory, weights = self.get_temp_dir(), []
        # Another one, and an interrupted one that goes on.
        for each in (None, None, directory, directory):
            runs = _Runs()
            runs.student = helpers.noisy_learner((4, 4, 1))
            is_interrupted = each and not glob.glob(f"{directory}/*")
            with _interrupting(3) if is_interrupted else contextlib.nullcontext():
                with contextlib.suppress(KeyboardInterrupt):
                    runs.distill(each)
            weights.append(helpers.copies(runs.weights))
        whole, same, interrupted, continued = weights
        self.assertTrue(helpers.all_equal(same, whole))
        self.assertFalse(helpers.all_equal(interrupted, whole))
        self.assertTrue(helpers.all_equal(continued, whole))

    @helpers.eagerly()
    def test_each_round_may_be_followed_by_a_checkpoint(self):
        """Of large images one takes minutes."""
        directory = self.get_temp_dir()
        with _interrupting(3, save_seconds=0), self.assertRaises(KeyboardInterrupt):
            _Runs().distill(directory)
        self.assertLen(glob.glob(f"{directory}/checkpoints/*/ckpt-3.index"), 1)

    @helpers.eagerly()
    def test_finished_run_is_not_repeated(self):
        directory = self.get_temp_dir()
        first = _Runs()
        first.distill(directory)
        second = _Runs()
        self.assertEqual(second.distill(directory), {})
        self.assertTrue(helpers.all_equal(second.weights, first.weights))

    def test_evaluations_make_a_curve_of_about_ten_points(self):
        directory = self.get_temp_dir()
        runs = _Runs()
        config = dataclasses.replace(_CONFIG, rounds=23, generator_steps=0)
        kernel = runs.student.model.trainable_variables[0]
        values = []

        def evaluate():
            values.append(float(kernel[0, 0, 0, 0]))
            return {"kernel": values[-1]}

        runs.distill(directory, config, evaluate=evaluate)
        with open(f"{directory}/distillation_curve.csv") as file:
            header, *rows = file.read().splitlines()
        self.assertEqual(header, "step,minutes,kernel")
        steps_of, _, measured = np.loadtxt(rows, delimiter=",").T
        self.assertAllEqual(steps_of, [*range(0, 23, 2), 23])
        self.assertAllClose(measured, values, rtol=1e-4)
        # The student is measured as it is: it moves on.
        self.assertLen(set(values), len(values))
        self.assertEqual(values[-1], float(kernel[0, 0, 0, 0]))
        blind = _Runs()
        blind.distill(config=config)
        self.assertTrue(helpers.all_equal(blind.weights, runs.weights))

    def test_steps_read_no_variable_that_a_gpu_does_not_hold(self):
        """Those of int32 are in the memory of the CPU, where XLA does not reach."""
        copies, students = devices.Copies(None), [_student(5)]
        context = helpers.context(_CONFIG)
        state = phases.new_state(copies, context, _observed(), [], 4, students)

        def step(images, logits):
            at = tf.constant([2, 0])
            return steps.answered_step(state, _CONFIG, images, logits, at)

        images = tf.TensorSpec((4, 4, 4, 1), tf.uint8)
        read = traced(step, images, tf.TensorSpec((4, 4), tf.float32)).variables
        self.assertIn(id(state.rounds), [id(variable) for variable in read])
        self.assertNotIn(tf.int32, [variable.dtype for variable in read])


class PoolTest(PhasesTestCase):
    """Student steps on crops of images that are made once."""

    CONFIG = qat_recipe(
        "pool",
        batch_size=4,
        noise_dim=3,
        rounds=4,
        student_steps=2,
        student_learning_rate=0.01,
        pool_images=12,
        pool_batch_size=2,
        answer_uses=3,
        noise_share=0.0,
        mixup_share=0.0,
        cutmix_share=0.0,
        max_minutes=0.0,
    )
    IMAGES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)

    def distill(self, directory=None, **changes):
        runs = _Runs()
        config = dataclasses.replace(self.CONFIG, **changes)
        images = None if config.generator_steps else lambda: self.IMAGES
        return runs, runs.distill(directory, config, images=images)

    def test_student_learns_the_answers_to_the_images(self):
        seen = []
        step = steps.answered_step

        def watched(state, config, images, logits, seed_and_step):
            self.assertEqual(config.student_augmentation, "none")
            seen.append((images.numpy(), logits.numpy()))
            return step(state, config, images, logits, seed_and_step)

        with (
            helpers.eagerly(),
            mock.patch.object(steps, "answered_step", watched),
            mock.patch.object(steps, "student_step", side_effect=AssertionError),
        ):
            runs, _ = self.distill(student_augmentation="none")
        self.assertLen(seen, 4 * 2)
        known = {image.tobytes() for image in self.IMAGES}
        for images, logits in seen:
            self.assertEqual(images.shape, (2, 4, 4, 1))
            self.assertLessEqual({image.tobytes() for image in images}, known)
            self.assertAllClose(logits, _small_teacher().scores(images), atol=1e-4)
        self.assertFalse(helpers.all_equal(_Runs().weights, runs.weights))

    def test_it_needs_no_generator_where_images_are_given(self):
        runs = _Runs()
        context = helpers.context(self.CONFIG, seed=2)
        warmed = WarmedUp(runs.teacher, [])
        phases.distill(warmed, [runs.student], context, images=lambda: self.IMAGES)
        same, _ = self.distill()
        self.assertTrue(
            helpers.all_equal(runs.student.model.weights, same.student.model.weights)
        )

    @parameterized.parameters(0, 1)
    def test_interrupted_run_continues_to_the_same_weights(self, generator_steps):
        # Few answered batches, so that they are those of several moments.
        with helpers.eagerly(), mock.patch.object(pool, "_ANSWERED", 3):
            changes = dict(generator_steps=generator_steps)
            whole, _ = self.distill(**changes)
            directory = self.get_temp_dir()
            with _interrupting(3), self.assertRaises(KeyboardInterrupt):
                self.distill(directory, **changes)
            continued, _ = self.distill(directory, **changes)
        self.assertTrue(helpers.all_equal(continued.weights, whole.weights))

    @parameterized.parameters(0.0, 60.0)
    def test_finished_run_makes_no_images(self, max_minutes):
        changes = dict(noise_share=0.5, rounds=1, max_minutes=max_minutes)
        config, directory = (
            dataclasses.replace(self.CONFIG, **changes),
            self.get_temp_dir(),
        )
        images = mock.Mock(return_value=self.IMAGES)
        with (
            helpers.eagerly(),
            mock.patch.object(pool, "_OTHERS", 4),
            mock.patch.object(
                pool, "natural_noise", side_effect=natural_noise
            ) as noise,
        ):
            for _ in range(2):
                runs = _Runs()
                runs.distill(directory, config, images=images)
                self.assertEqual((images.call_count, noise.call_count), (1, 1))

    def test_images_of_generator_steps_take_the_place_of_the_oldest(self):
        made, added = [], []
        step, add = steps.generator_step, pool.Pool.add

        def watched(*args):
            made.append(step(*args))
            return made[-1]

        def adding(self, images):
            added.append(np.array(images))
            add(self, images)

        with (
            helpers.eagerly(),
            mock.patch.object(steps, "generator_step", watched),
            mock.patch.object(pool.Pool, "add", adding),
        ):
            self.distill(generator_steps=1)
        self.assertLen(added, 1 + 4)  # those of the generators before the first round
        self.assertEqual(added[0].shape, (12, 4, 4, 1))
        for images, generator_step in zip(added[1:], made):
            self.assertAllEqual(images, generator_step.images)

    def test_rounds_are_those_that_there_is_time_for(self):
        directory = self.get_temp_dir()
        with (
            helpers.eagerly(),
            mock.patch.object(phases._Round, "seconds", return_value=25.0) as timed,
        ):
            limited, _ = self.distill(directory, max_minutes=1.0)
            self.assertEqual(timed.call_count, 1)
            again, measured = self.distill(directory, max_minutes=1.0)
            self.assertEqual((timed.call_count, measured), (1, {"rounds": 2}))
            shorter, _ = self.distill(rounds=2)
            less, _ = self.distill(max_minutes=0.1)
            one, _ = self.distill(rounds=1)
        for same, other in ((limited, shorter), (again, shorter), (less, one)):
            self.assertTrue(helpers.all_equal(same.weights, other.weights))

    def test_timing_changes_nothing(self):
        for changes in (
            dict(),
            dict(student_optimizer="sgd", generator_steps=1),
        ):
            with helpers.eagerly():
                timed, _ = self.distill(max_minutes=60.0, **changes)
                untimed, _ = self.distill(**changes)
            self.assertTrue(helpers.all_equal(timed.weights, untimed.weights))

    def test_of_a_pool_are_whole_batches_that_fit(self):
        counts = [
            phases.pool_count(
                dataclasses.replace(self.CONFIG, pool_images=n), (4, 4, 1)
            )
            for n in (1, 11, 12)
        ]
        self.assertEqual(counts, [4, 8, 12])
        large = dataclasses.replace(self.CONFIG, pool_images=10**6)
        count = phases.pool_count(large, (512, 512, 3))
        self.assertLessEqual(count * 512 * 512 * 3, 2**29)
        self.assertGreater(count * 512 * 512 * 3, 2**28)

    def test_memory_is_that_of_all_its_images(self):
        config = qat_recipe("pool", batch_size=128)
        cifar, large = (32, 32, 3), (224, 224, 3)
        # Twice 8,192 images, 32 answered batches of 32, and 4,096 of noise.
        expected = (2 * 8192 + 32 * 32 + 4096) * 32 * 32 * 3
        self.assertEqual(phases.pool_bytes(config, cifar), expected)
        plain = dataclasses.replace(config, noise_share=0.0)
        expected -= 4096 * 32 * 32 * 3
        self.assertEqual(phases.pool_bytes(plain, cifar), expected)
        # As much as 512 MiB twice, and a quarter of it twice.
        most = 2.5 * 512 * 2**20
        self.assertBetween(phases.pool_bytes(config, large), 0.9 * most, most)
        paper = qat_recipe("paper", batch_size=128)
        self.assertEqual(phases.pool_bytes(paper, large), 0)


class SharesTest(PhasesTestCase):
    """A batch of seven does not divide between two devices."""

    def shares(self, name, **changes):
        config = qat_recipe(name, batch_size=7, **changes)
        devices = mock.Mock(num_replicas_in_sync=2)
        return helpers.context(config, strategy=devices)

    @parameterized.parameters(("paper", {}), ("pool", dict(generator_steps=1)))
    def test_batches_of_generator_steps_must_divide(self, name, changes):
        context = self.shares(name, **changes)
        with self.assertRaisesRegex(
            ConfigError, "^batch_size is 7, which does not div"
        ):
            phases.check_shares(context)

    def test_those_of_a_pool_and_of_the_warm_up_are_rounded(self):
        context = self.shares("pool")
        phases.check_shares(context)
        sizes = phases.student_batch(context), phases.warm_up_batch(context)
        self.assertEqual(sizes, (6, 6))

    def test_they_are_looked_at_before_the_warm_up(self):
        with (
            mock.patch.object(phases, "warm_up", side_effect=AssertionError("work")),
            self.assertRaisesRegex(ConfigError, "^batch_size is 7, which does not div"),
        ):
            Rounds(_observed(), [_student(5)], self.shares("paper"))


class IdentityTest(parameterized.TestCase, tf.test.TestCase):
    """What a checkpoint must have in common with the run that continues it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.runs = _Runs()

    def identity(self, phase, teacher=None, **changes):
        runs = self.runs
        if teacher is not None:
            runs = copy.copy(runs)
            runs.teacher = teacher
        with mock.patch.object(phases, "run_loop") as run_loop:
            getattr(runs, phase)(**changes)
        return run_loop.call_args.kwargs["identity"]

    def changed(self, phase, **changes):
        """The names of what differs."""
        before, after = self.identity(phase), self.identity(phase, **changes)
        return {key for key in after if before[key] != after[key]}

    @parameterized.parameters("warm_up", "distill")
    def test_teacher_and_seed_count(self, phase):
        graph = self.runs.teacher.graph
        bias = graph.last.weights["bias"] + np.float32(1e-3)
        other = graph.with_weights({graph.output: {"bias": bias}})
        teacher = dataclasses.replace(self.runs.teacher, graph=other)
        self.assertEqual(self.changed(phase, teacher=teacher), {"teacher"})
        description = dataclasses.replace(self.runs.teacher.description, input_mean=[7])
        teacher = dataclasses.replace(self.runs.teacher, description=description)
        self.assertEqual(self.changed(phase, teacher=teacher), {"teacher"})
        self.assertEqual(self.changed(phase, seed=5), {"seed"})

    @parameterized.parameters(
        ("generator_learning_rate", 0.5, True),
        ("warm_up_steps", 7, True),
        ("batch_size", 8, True),
        ("rounds", 9, False),
        ("student_learning_rate", 0.5, False),
        ("bank_images", 8, False),
        ("alpha", 0.5, False),
    )
    def test_settings_of_the_phase_count(self, name, value, is_of_warm_up):
        config = dataclasses.replace(_CONFIG, **{name: value})
        expected = {name} if is_of_warm_up else set()
        self.assertEqual(self.changed("warm_up", config=config), expected)
        self.assertEqual(self.changed("distill", config=config), {name})

    def test_what_the_caller_knows_counts(self):
        self.assertEqual(self.identity("distill", identity={"a": "b"})["a"], "b")

    def test_names_of_the_classes_do_not_count(self):
        names = tuple("wxyz")
        description = dataclasses.replace(
            self.runs.teacher.description, class_names=names
        )
        teacher = dataclasses.replace(self.runs.teacher, description=description)
        self.assertEmpty(self.changed("distill", teacher=teacher))


class SeveralTest(PhasesTestCase):
    """Two generators, two students, and a bank."""

    config = dataclasses.replace(
        _CONFIG, num_generators=2, rounds=4, generator_steps=2, bank_images=20
    )

    def setUp(self):
        super().setUp()
        _generators.begin()

    def _networks(self):
        students = [_student(i) for i in (5, 6)]
        return WarmedUp(_observed(), [*map(_generators, (0, 1))]), students

    def _models(self, networks):
        warmed, students = networks
        return [*warmed.generators, *(student.model for student in students)]

    def _weights(self, networks):
        return [w for model in self._models(networks) for w in model.weights]

    def _distill(self, networks, directory=None):
        context = helpers.context(self.config, seed=2, directory=directory)
        with helpers.eagerly():
            return phases.distill(*networks, context)

    def test_generators_differ(self):
        first, second = self._networks()[0].generators
        self.assertFalse(helpers.all_equal(first.weights, second.weights))

    def test_all_of_them_are_trained(self):
        networks = self._networks()
        trained = [model.trainable_variables for model in self._models(networks)]
        before = [*map(helpers.copies, trained)]
        config = dataclasses.replace(self.config, rounds=1, generator_steps=1)
        with helpers.eagerly():
            phases.distill(*networks, helpers.context(config, seed=2))
        for weights, others in zip(trained, before):
            self.assertFalse(helpers.all_equal(weights, others))

    def _made_and_seen(self, networks, config, bank=None):
        """What generator steps give, and what student steps are given."""
        made, seen = [], []
        generator_step, answered_step = steps.generator_step, steps.answered_step

        def watched_generator_step(*args):
            result = generator_step(*args)
            tf.py_function(lambda *x: made.append([*map(np.array, x)]), result[1:], [])
            return result

        def watched_answered_step(state, config, images, logits, seed):
            tf.py_function(
                lambda *x: seen.append([*map(np.array, x)]), [images, logits], []
            )
            return answered_step(state, config, images, logits, seed)

        with (
            mock.patch.object(steps, "generator_step", watched_generator_step),
            mock.patch.object(steps, "answered_step", watched_answered_step),
            mock.patch.object(steps, "student_step") as fresh,
            helpers.eagerly(),
        ):
            phases.distill(*networks, helpers.context(config, seed=2), bank=bank)
        fresh.assert_not_called()
        return made, seen

    @helpers.eagerly()
    def test_shared_images_are_those_of_the_round_in_turn(self):
        config = dataclasses.replace(
            self.config, bank_images=0, share_images=True, rounds=2, student_steps=5
        )
        made, seen = self._made_and_seen(self._networks(), config)
        self.assertLen(made, 4)
        self.assertLen(seen, 10)
        for i, batch in enumerate(seen):
            # Two generator steps of 2 x 4 images, so four batches, then again.
            images = made[2 * (i // 5) + i % 5 % 2]
            start = (0, 0, 1, 1, 0)[i % 5]
            for drawn, all_of_them in zip(batch, images):
                self.assertAllEqual(drawn, all_of_them[start::2])

    def test_a_bank_holds_no_more_than_fits_into_memory(self):
        student = helpers.small_learner((6, 5, 3), num_classes=4)
        config = dataclasses.replace(self.config, bank_images=10)
        # Each image has 90 bytes, and four answers of four bytes.
        for budget, expected in ((106 * 7 + 105, 7), (10**6, 10)):
            with mock.patch.object(batch_size, "BANK_MEMORY", budget):
                bank = phases.make_bank(student, config, seed=2)
            bank.add(np.zeros((20, 6, 5, 3), np.uint8), np.zeros((20, 4), np.float32))
            self.assertLen(bank, expected)
        # Those of the recipe, at the sizes that results are published for.
        bank = phases.make_bank(
            helpers.small_classifier((64, 64, 3), num_classes=200),
            dataclasses.replace(self.config, bank_images=40_000),
            seed=2,
        )
        self.assertEqual(bank._images.shape[0], 40_000)

    @parameterized.parameters(False, True)
    def test_generators_that_can_learn_little_come_with_a_warning(self, has_bn):
        image = keras.layers.Input((8, 8, 3))
        x = keras.layers.BatchNormalization()(image) if has_bn else image
        x = keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(x))
        teacher = observe(helpers.classifier(keras.Model(image, x)))
        config = dataclasses.replace(self.config, warm_up_steps=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            phases.warmed_up(teacher, helpers.context(config))
        said = [str(w.message) for w in caught]
        found = any(m.startswith("the teacher has no BatchNorm") for m in said)
        self.assertEqual(found, not has_bn)

    @helpers.eagerly()
    @pytest.mark.long
    def test_a_bank_keeps_the_images_of_the_warm_up(self):
        config = dataclasses.replace(self.config, warm_up_steps=3, bank_images=1000)
        folder = self.get_temp_dir()

        def warmed_up(directory):
            warmed, students = self._networks()
            bank = phases.make_bank(students[0], config, seed=2)
            context = helpers.context(config, seed=2, directory=directory)
            phases.warm_up(warmed.teacher, warmed.generators, context, bank)
            return (warmed, students), bank

        networks, bank = warmed_up(folder)
        self.assertLen(bank, 3 * 8)
        # A run that finds it finished has the same bank.
        self.assertEqual(warmed_up(folder)[1].serialize(), bank.serialize())
        old = {image.tobytes() for image in bank.draw(1000, 0)[0]}
        made, seen = self._made_and_seen(networks, config, bank)
        new = {image.tobytes() for images, _ in made for image in images}
        drawn = {image.tobytes() for images, _ in seen for image in images}
        self.assertContainsSubset(drawn, old | new)
        self.assertNotEmpty(drawn & old)
        self.assertNotEmpty(drawn & new)

    @helpers.eagerly()
    @pytest.mark.long
    def test_students_train_on_the_images_of_generator_steps(self):
        made, seen = self._made_and_seen(self._networks(), self.config)
        self.assertLen(made, 8)
        self.assertLen(seen, 8)
        for i, (images, logits) in enumerate(seen):
            # Two generator steps a round, of 8 images; the bank holds 20.
            past = made[: 2 * (i // 2 + 1)]
            known = {
                (image.tobytes(), answer.tobytes())
                for each in zip(*(np.concatenate(x)[-20:] for x in zip(*past)))
                for image, answer in [each]
            }
            drawn = {(x.tobytes(), y.tobytes()) for x, y in zip(images, logits)}
            self.assertLen(images, 4)
            self.assertContainsSubset(drawn, known)

    @pytest.mark.long
    @helpers.eagerly()
    def test_interrupted_run_continues_to_the_same_weights(self):
        whole, directory = self._networks(), self.get_temp_dir()
        self._distill(whole)
        interrupted = self._networks()
        with _interrupting(3), self.assertRaises(KeyboardInterrupt):
            self._distill(interrupted, directory)
        continued = self._networks()
        self._distill(continued, directory)
        self.assertTrue(
            helpers.all_equal(self._weights(continued), self._weights(whole))
        )
        self.assertFalse(
            helpers.all_equal(self._weights(interrupted), self._weights(whole))
        )

    def test_a_batch_of_images_has_some_of_each_generator(self):
        generators = self._networks()[0].generators
        both = generate(generators, self.config, 4, seed=1)
        noise = sample_noise(self.config, tf.constant([1, 0]), SAMPLE)
        for i, generator in enumerate(generators):
            pixels = generator(noise[2 * i : 2 * i + 2], training=True)
            half = both[2 * i : 2 * i + 2]
            self.assertAllClose(half.astype(float), pixels, rtol=0, atol=0.501)


class CompiledTest(parameterized.TestCase):
    @parameterized.parameters(([0], True), ([], None))
    def test_xla_is_for_a_gpu_that_the_program_has_not_hidden(self, gpus, expected):
        with (
            mock.patch.object(tf.config, "list_physical_devices", return_value=[0]),
            mock.patch.object(tf.config, "get_visible_devices", return_value=gpus),
            mock.patch.object(tf, "function") as function,
        ):
            phases.compiled(abs)
        self.assertEqual(function.call_args.kwargs["jit_compile"], expected)


class StudentOptimizerTest(parameterized.TestCase, tf.test.TestCase):
    def _displacements(self, num_steps, **settings):
        """How far each step moves a weight whose gradient is 1 throughout."""
        config = dataclasses.replace(
            _CONFIG,
            rounds=5,
            student_steps=2,
            student_learning_rate=0.1,
            **settings,
        )
        return helpers.displacements(
            lambda model: phases.student_optimizer(model, config), num_steps
        )

    def test_sgd_decays_to_0_over_all_student_steps(self):
        # 5 rounds of 2 steps.
        cosine = 0.05 * (1 + np.cos(np.pi * np.arange(12).clip(max=10) / 10))
        moved = self._displacements(12, student_optimizer="sgd", student_momentum=0.0)
        self.assertAllClose(moved, cosine, atol=1e-6)

    def test_sgd_has_nesterov_momentum(self):
        moved = self._displacements(2, student_optimizer="sgd", student_momentum=0.5)
        first, second = 0.1, 0.05 * (1 + np.cos(np.pi / 10))
        velocity = 0.5 * first + second
        self.assertAllClose(
            moved, [0.5 * first + first, 0.5 * velocity + second], rtol=1e-5
        )

    def test_adam_moves_by_the_learning_rate_whatever_the_gradient(self):
        cosine = 0.05 * (1 + np.cos(np.pi * np.arange(12).clip(max=10) / 10))
        moved = self._displacements(12, student_optimizer="adam")
        self.assertAllClose(moved, cosine, atol=1e-5)

    @parameterized.parameters("adam", "sgd")
    def test_is_built_so_that_steps_are_traced_once_and_a_checkpoint_restores(
        self, name
    ):
        config = dataclasses.replace(_CONFIG, student_optimizer=name)
        image = keras.layers.Input((1,))
        models = [
            keras.Model(image, keras.layers.Dense(1, use_bias=False)(image))
            for _ in range(2)
        ]
        traces = []

        def new(model):
            optimizer = phases.student_optimizer(model, config)
            (weight,) = model.trainable_variables

            @tf.function
            def step(gradient):
                traces.append(name)
                optimizer.apply_gradients([(gradient * tf.ones_like(weight), weight)])

            return step, tf.train.Checkpoint(model=model, optimizer=optimizer)

        (step, checkpoint), (other_step, other) = map(new, models)
        for gradient in (1.0, 3.0):
            step(tf.constant(gradient))
        path = checkpoint.save(f"{self.get_temp_dir()}/{name}")
        step(tf.constant(0.5))
        self.assertLen(traces, 1)

        other.restore(path).assert_consumed()
        other_step(tf.constant(0.5))
        self.assertAllEqual(models[0].get_weights()[0], models[1].get_weights()[0])


if __name__ == "__main__":
    tf.test.main()
