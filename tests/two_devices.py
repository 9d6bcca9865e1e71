"""What runs on two devices, by devices_test, in a process of its own.

TensorFlow makes logical devices only before it has computed anything.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf import api
from dfq_tf.compat import keras, tf
from dfq_tf.distillation import generator, phases, steps
from dfq_tf.distillation.generator import build_generator
from dfq_tf.distillation.phases import warmed_up
from dfq_tf.distillation.teacher import observe
from dfq_tf.errors import ConfigError
from dfq_tf.quantization import student as quantized_student
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import CalibrationConfig, TeacherConfig, qat_recipe
from dfq_tf.training import devices, optimizers
from dfq_tf.training.copies import with_precision
from dfq_tf.training.learner import Learner
from dfq_tf.training.replicas import replica_concat, replica_mean, replica_slice
from dfq_tf.with_data import supervised
from tests import helpers

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)

_CONFIG = qat_recipe(
    "paper",
    batch_size=8,
    noise_dim=5,
    warm_up_steps=3,
    rounds=4,
    student_steps=2,
    alpha=0.3,
    bn_statistics_weight=0.5,
    instance_entropy_weight=2.0,
    batch_entropy_weight=3.0,
    student_weight_decay=0.01,
    temperature=2.0,
)


@functools.cache
def _mirrored():
    return devices.make_strategy("mirrored")


class ReplicasTest(tf.test.TestCase):
    def _run(self, step, *arguments):
        strategy = _mirrored()
        results = tf.function(lambda *a: strategy.run(step, a))(*arguments)
        return strategy.experimental_local_results(results)

    def test_logical_cpus_are_the_devices(self):
        self.assertEqual(_mirrored().num_replicas_in_sync, 2)

    def test_slices_are_equal_shares_in_order(self):
        batch = tf.reshape(tf.range(24.0), (6, 2, 2))
        first, second = self._run(replica_slice, batch)
        self.assertAllEqual(first, batch[:3])
        self.assertAllEqual(second, batch[3:])

    def test_concat_undoes_slice(self):
        batch = tf.reshape(tf.range(24.0), (6, 4))
        for whole in self._run(lambda b: replica_concat(replica_slice(b)), batch):
            self.assertAllEqual(whole, batch)

    def test_gradient_of_mean_is_that_of_the_whole_batch(self):
        x = tf.constant([1.0, 2, 3, 5, 8, 13])

        def step(batch):
            part = replica_slice(batch)
            with tf.GradientTape() as tape:
                tape.watch(part)
                # Of whole-batch and of own values; the loss is the mean of both.
                mean = replica_mean(tf.reduce_mean(part))
                loss = mean**3 + tf.reduce_mean(part**2) * mean
            # `descend` divides by the number of replicas.
            return replica_mean(loss), tape.gradient(loss, part) / 2

        with tf.GradientTape() as tape:
            tape.watch(x)
            mean = tf.reduce_mean(x)
            loss = mean**3 + tf.reduce_mean(x**2) * mean
        expected = tape.gradient(loss, x)
        results = self._run(step, x)
        self.assertAllClose([each[0] for each in results], [loss, loss])
        self.assertAllClose(tf.concat([each[1] for each in results], 0), expected)


class BatchNormalizationTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(
        shape=((4, 4, 3), (5,)),
        precision=("float32", "bfloat16"),
        is_inside=(False, True),
    )
    def test_is_that_of_one_device(self, shape, precision, is_inside):
        """Also in a model inside of another one."""
        image = keras.layers.Input(shape)
        layer = keras.layers.BatchNormalization(momentum=0.8)
        outputs = keras.Sequential([layer])(image) if is_inside else layer(image)
        outputs = keras.layers.ReLU()(outputs)  # so that the BN is not the output
        model = with_precision(
            helpers.randomise(keras.Model(image, outputs)), precision
        )
        copies = devices.Copies(_mirrored())
        copy = copies.of(model)
        # A mean a hundred times the deviation: E[x^2] - E[x]^2 would lose it.
        offset = 100.0 if precision == "float32" else 1.0
        batch = offset + tf.random.stateless_normal((6, *shape), (1, 2))
        expected = model(batch, training=True)

        def step(batch):
            return replica_concat(copy(replica_slice(batch), training=True))

        found = tf.function(devices.everywhere(step, _mirrored()))(batch)
        bound = 1e-4 if precision == "float32" else 2e-2
        self.assertAllClose(found, expected, atol=bound)
        moved = model.get_weights()
        copies.write_back()
        for one, other in zip(model.get_weights(), moved):
            self.assertAllClose(one, other, rtol=1e-5)

    def test_frozen_layer_stays(self):
        image = keras.layers.Input((3,))
        layer = keras.layers.BatchNormalization()
        model = helpers.randomise(keras.Model(image, layer(image)))
        layer.trainable = False
        before = helpers.copies(model.weights)
        copies = devices.Copies(_mirrored())
        copy = copies.of(model)
        step = devices.everywhere(
            lambda batch: replica_concat(copy(replica_slice(batch), training=True)),
            _mirrored(),
        )
        batch = tf.random.stateless_normal((4, 3), (1, 2))
        self.assertAllClose(tf.function(step)(batch), model(batch), atol=1e-6)
        copies.write_back()
        self.assertTrue(helpers.all_equal(model.weights, before))


class _Networks:
    """Networks with the same weights each time, in a state of plain SGD."""

    def __init__(self, count, student, strategy=None, learning_rate=0.5):
        self.copies = devices.Copies(strategy)
        teacher = observe(helpers.small_classifier(seed=1), strategy=strategy)
        keras.utils.set_random_seed(0)
        self.generators = [
            helpers.randomise(
                build_generator(_CONFIG.noise_dim, (8, 8, 3), channels=4, seed=i), i
            )
            for i in range(count)
        ]
        students = [student(seed=5 + i) for i in range(count)]
        self.models = [*self.generators, *(s.model for s in students)]
        copies = [self.copies.of(model) for model in self.models]
        with devices.scope(strategy):
            trained = [self._sgd(model, learning_rate) for model in copies]
        self.state = steps.State(
            teacher,
            copies[:count],
            trained[:count],
            [
                dataclasses.replace(s, model=copy)
                for s, copy in zip(students, copies[count:])
            ],
            trained[count:],
        )

    def _sgd(self, model, learning_rate):
        return optimizers.sgd(model, learning_rate, 100, 0.0)


@functools.cache
def _quantized(seed) -> QuantizedNetwork:
    network = float_network(helpers.small_classifier(seed=seed))
    images = np.random.default_rng(seed).integers(0, 256, (16, 8, 8, 3), np.uint8)
    config = CalibrationConfig(bias_correction=False)
    return post_training(network, images, config=config)


def _quantized_student(seed):
    network = _quantized(seed)
    return Learner(quantized_student.build(network), network.description)


def _watched(module, name):
    return mock.patch.object(module, name, wraps=getattr(module, name))


# Images in a step: of two students on one device, then on each of two.
_SHARES = [8, 8, 8, 8, 4, 4, 4, 4]


class StepTest(parameterized.TestCase, tf.test.TestCase):
    """Each step moves all networks as on one device, and measures the same."""

    def _check(self, step, count=1, student=helpers.small_learner):
        results, weights, before = [], [], None
        for strategy in (None, _mirrored()):
            networks = _Networks(count, student, strategy)
            before = [m.get_weights() for m in networks.models]
            run = phases.compiled(functools.partial(step, networks.state), strategy)
            # On one device the two steps are not worth compiling.
            with contextlib.nullcontext() if strategy else helpers.eagerly():
                for i in range(2):
                    result = run(tf.constant([7, i]))
            networks.copies.write_back()
            results.append(result)
            weights.append([m.get_weights() for m in networks.models])
        one, two = results
        tf.nest.map_structure(
            lambda x, y: self.assertAllClose(
                tf.cast(x, tf.float32), tf.cast(y, tf.float32), rtol=1e-4, atol=1e-4
            ),
            one if isinstance(one, dict) else one[0],
            two if isinstance(two, dict) else two[0],
        )
        moved = 0
        for name, first, then, other in zip(
            [w.name for m in networks.models for w in m.weights],
            *(sum(each, []) for each in (before, *weights)),
        ):
            self.assertAllClose(then, other, rtol=1e-4, atol=1e-5, msg=name)
            moved = max(moved, np.abs(then - first).max())
        self.assertGreater(moved, 0.01)
        return results

    def test_warm_up(self):
        self._check(lambda state, s: steps.warm_up_step(state, _CONFIG, s))

    @parameterized.parameters(1, 2)
    def test_generator_step(self, count):
        (_, images, logits), (_, others, answers) = self._check(
            lambda state, s: steps.generator_step(state, _CONFIG, s), count
        )
        # In the same order, generator after generator.
        self.assertEqual(images.shape, (8 * count, 8, 8, 3))
        self.assertAllClose(
            tf.cast(images, tf.float32), tf.cast(others, tf.float32), rtol=0, atol=1
        )
        self.assertAllClose(logits, answers, atol=1e-3)

    @parameterized.parameters("none", "crop_flip")
    def test_student_step(self, augmentation):
        config = dataclasses.replace(_CONFIG, student_augmentation=augmentation)
        with _watched(steps, "distillation_step") as step:
            self._check(lambda state, s: steps.student_step(state, config, s), 2)
        self.assertEqual(
            [call.args[2].shape[0] for call in step.call_args_list], _SHARES
        )

    @parameterized.parameters(
        (2, helpers.small_learner, "none"),
        (1, helpers.small_learner, "crop_flip"),
        (1, _quantized_student, "none"),
    )
    def test_answered_step(self, count, student, augmentation):
        config = dataclasses.replace(_CONFIG, student_augmentation=augmentation)

        def step(state, seed):
            pixels = tf.random.stateless_uniform((8, 8, 8, 3), seed, 0, 255)
            logits = tf.random.stateless_normal((8, 4), seed)
            return steps.answered_step(
                state, config, replica_slice(pixels), replica_slice(logits), seed
            )

        self._check(step, count, student)

    def test_quantized_student_against_generator(self):
        self._check(
            lambda state, s: steps.generator_step(state, _CONFIG, s)[0],
            student=_quantized_student,
        )

    def test_supervised_step(self):
        def step(state, seed):
            inputs = tf.random.stateless_normal((8, 8, 8, 3), seed)
            labels = tf.random.stateless_uniform((8,), seed, 0, 4, tf.int32)
            return supervised.supervised_step(
                state.students[0].model,
                state.student_optimizers[0],
                replica_slice(inputs),
                replica_slice(labels),
                0.01,
            )

        self._check(step)


class WholeTest(parameterized.TestCase, tf.test.TestCase):
    def _small_generators(self):
        small = functools.partial(build_generator, channels=8)
        return mock.patch.object(generator, "build_generator", small)

    def test_distillation(self):
        config = dataclasses.replace(
            _CONFIG,
            bank_images=40,
            student_optimizer="sgd",
            student_learning_rate=0.01,
        )
        results, curves = [], []
        for strategy in (None, _mirrored()):
            seen, folder = [], f"{self.get_temp_dir()}/{len(results)}"
            student = helpers.small_learner(seed=5)
            kernel = student.model.get_weights()[0]
            with self._small_generators(), _watched(steps, "answered_step") as step:
                result = api.distill(
                    helpers.small_classifier(seed=1),
                    student,
                    config=config,
                    seed=3,
                    precision="float32",
                    strategy=strategy,
                    directory=folder,
                    evaluate=lambda s, seen=seen: (
                        seen.append(s.model.get_weights()) or {}
                    ),
                    show_progress=False,
                )
            self.assertAllEqual(student.model.get_weights()[0], kernel)
            shares = [call.args[2].shape[0] for call in step.call_args_list]
            self.assertEqual(shares, [4, 4] if strategy else [8])
            results.append(result)
            curves.append(seen)
        one, two = results
        for key, value in one.measurements.items():
            self.assertAllClose(value, two.measurements[key], rtol=0.01, atol=0.01)
        # What `evaluate` saw moved on, and is that of one device.
        self.assertLen(curves[0], 5)
        self.assertNotAllClose(curves[1][0][0], curves[1][-1][0])
        for weights, others in zip(curves[0], curves[1]):
            for weight, other in zip(weights, others):
                self.assertAllClose(weight, other, rtol=0.01, atol=0.01)
        for model, other in zip(
            [one.student.model, *one.generators], [two.student.model, *two.generators]
        ):
            for variable, value in zip(model.weights, other.weights):
                self.assertIsInstance(value, tf.Variable)
                self.assertNotIsInstance(value, tf.distribute.DistributedValues)
                if "conv" in variable.name and "bias" in variable.name:
                    continue  # its gradient is 0 but for rounding, and Adam divides
                self.assertAllClose(variable, value, rtol=0.02, atol=0.02)

    @parameterized.parameters(
        {},
        # The steps that are timed are undone on both.
        dict(pool_images=16, pool_batch_size=4, max_minutes=60.0),
    )
    def test_quantization(self, **settings):
        config = dataclasses.replace(
            _CONFIG,
            rounds=2,
            warm_up_steps=1,
            student_optimizer="sgd",
            student_learning_rate=0.5,
            **settings,
        )
        distill, before, after = phases.distill, [], []

        def watched(warmed, students, *args, **kwargs):
            before.append(helpers.copies(students[0].model.trainable_variables))
            return distill(warmed, students, *args, **kwargs)

        for strategy in (None, _mirrored()):
            with (
                self._small_generators(),
                mock.patch.object(phases, "distill", watched),
                # So short a training need not have helped.
                mock.patch.object(
                    api, "better", lambda _, before, after, what: (after, 0.0, 1.0)
                ),
            ):
                result = api.quantize(
                    helpers.small_classifier(seed=1),
                    method="df_qat_kd",
                    config=config,
                    calibration=CalibrationConfig(calibration_images=16),
                    precision="float32",
                    strategy=strategy,
                    show_progress=False,
                )
            after.append(helpers.copies(result.student.trainable_variables))
        for first, one, two in zip(before[1], *after):
            self.assertAllClose(one, two, atol=1e-4)
            # Ten times what may differ: what was trained came back.
            self.assertGreater(np.abs(two - first).max(), 1e-3)

    def test_batches_of_a_pool_are_rounded(self):
        """Seven images do not divide. Student steps take four of five, and no more."""
        settings = dict(batch_size=7, generator_steps=0, rounds=1)
        pool = dict(pool_images=16, pool_batch_size=5)
        with _watched(steps, "answered_step") as step:
            api.quantize(
                helpers.small_classifier(seed=1),
                method="df_qat_kd",
                config=dataclasses.replace(_CONFIG, **settings, **pool),
                calibration=CalibrationConfig(
                    calibration_images=16, images="procedural"
                ),
                precision="float32",
                strategy=_mirrored(),
                show_progress=False,
            )
        shares = {call.args[2].shape[0] for call in step.call_args_list}
        self.assertEqual(shares, {2})

    @parameterized.parameters("none", "crop_flip")
    def test_teacher(self, augmentation):
        config = TeacherConfig(
            teacher_epochs=1, teacher_batch_size=8, augmentation=augmentation
        )
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (32, 8, 8, 3), np.uint8)
        labels = rng.integers(0, 4, 32)
        teachers = []
        for strategy, share in ((None, 8), (_mirrored(), 4)):
            teacher = helpers.small_learner(seed=2)
            context = helpers.context(config, strategy=strategy)
            with _watched(supervised, "supervised_step") as step:
                supervised.train_teacher(teacher, images, labels, context)
            for call in step.call_args_list:
                self.assertEqual([x.shape[0] for x in call.args[2:4]], [share, share])
            teachers.append(teacher)
        before = helpers.small_learner(seed=2).model.weights
        one, two = (teacher.model.weights for teacher in teachers)
        self.assertFalse(helpers.all_equal(one, before))
        for variable, value in zip(one, two):
            self.assertAllClose(variable, value, rtol=1e-3, atol=1e-4)

    def test_interrupted_run_continues_to_the_same_weights(self):
        config = dataclasses.replace(_CONFIG, rounds=0, warm_up_steps=4)
        teacher, folder = helpers.small_classifier(seed=1), self.get_temp_dir()

        def warmed(directory, interrupted_at=None):
            def run_loop(name, step, *args, **kwargs):
                def watched(index):
                    if index == interrupted_at:
                        raise KeyboardInterrupt
                    return step(index)

                settings = dict(measure_every=2, save_seconds=0)
                return loop_run(name, watched, *args, **settings, **kwargs)

            loop_run = phases.run_loop
            with (
                self._small_generators(),
                mock.patch.object(phases, "run_loop", run_loop),
            ):
                context = helpers.context(
                    config, seed=1, strategy=_mirrored(), directory=directory
                )
                observed = observe(teacher, strategy=context.strategy)
                return warmed_up(observed, context).generators[0]

        with self.assertRaises(KeyboardInterrupt):
            warmed(folder, 3)
        whole, continued = warmed(None), warmed(folder)
        self.assertTrue(helpers.all_equal(whole.weights, continued.weights))

    def test_layers_that_draw_numbers_continue_to_the_same_weights(self):
        config = dataclasses.replace(_CONFIG, warm_up_steps=1)
        folder, loop_run = self.get_temp_dir(), phases.run_loop

        def distilled(directory, interrupted_at=None):
            def run_loop(name, step, *args, **kwargs):
                def watched(index):
                    if name == "distillation" and index == interrupted_at:
                        raise KeyboardInterrupt
                    return step(index)

                return loop_run(name, watched, *args, save_seconds=0, **kwargs)

            with (
                self._small_generators(),
                mock.patch.object(phases, "run_loop", run_loop),
            ):
                result = api.distill(
                    helpers.small_classifier(seed=1),
                    helpers.noisy_learner(),
                    config=config,
                    precision="float32",
                    strategy=_mirrored(),
                    directory=directory,
                    show_progress=False,
                )
            return result.student.model.weights

        with self.assertRaises(KeyboardInterrupt):
            distilled(folder, 2)
        whole, continued = distilled(None), distilled(folder)
        self.assertTrue(helpers.all_equal(whole, continued))

    @parameterized.parameters(
        (dict(batch_size=7), "batch_size is 7.* for 2 replicas; .*of 2, such as 8"),
        (
            dict(batch_size=6, num_generators=2),
            "batch_size is 6.*for each of 2 generators; .*multiple of 4, such as 8",
        ),
    )
    def test_batch_that_does_not_divide_is_refused(self, changes, message):
        config = dataclasses.replace(_CONFIG, **changes)
        with self.assertRaisesRegex(ConfigError, message):
            api.distill(
                helpers.small_classifier(),
                helpers.small_learner(),
                config=config,
                strategy=_mirrored(),
                show_progress=False,
            )
        images, labels = np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, int)
        with self.assertRaisesRegex(ConfigError, "teacher_batch_size is 9"):
            supervised.train_teacher(
                helpers.small_learner(),
                images,
                labels,
                helpers.context(
                    TeacherConfig(teacher_batch_size=9), strategy=_mirrored()
                ),
            )


if __name__ == "__main__":
    tf.test.main()
