import dataclasses
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, TrainingError
from dfq_tf.settings import TeacherConfig
from dfq_tf.training import loop
from dfq_tf.with_data import supervised
from dfq_tf.with_data.datasets import accuracy
from tests import helpers

_CONFIG = TeacherConfig(
    teacher_epochs=3,
    teacher_batch_size=8,
    teacher_learning_rate=0.05,
    augmentation="crop_flip",
)


class OrderTest(tf.test.TestCase):
    def _epochs(self, num_epochs=3, seed=1):
        """Batches of 3 out of 10 images, (epochs, 9)."""
        order = supervised.Order(10, 3, seed)
        batches = [order.batch(index) for index in range(3 * num_epochs)]
        return np.reshape(batches, (num_epochs, 9))

    def test_an_epoch_has_no_image_twice_and_an_order_of_its_own(self):
        epochs = self._epochs()
        for epoch in epochs:
            self.assertLen(set(epoch), 9)
            self.assertContainsSubset(set(epoch), set(range(10)))
            self.assertNotAllEqual(epoch, np.sort(epoch))
        self.assertLen({tuple(epoch) for epoch in epochs}, 3)

    def test_seed_decides_the_order(self):
        self.assertAllEqual(self._epochs(), self._epochs())
        self.assertNotAllEqual(self._epochs(), self._epochs(seed=2))

    def test_begins_at_any_step(self):
        expected = self._epochs().reshape(9, 3)
        for index in range(9):
            fresh = supervised.Order(10, 3, seed=1)
            self.assertAllEqual(fresh.batch(index), expected[index])
        back_and_forth = supervised.Order(10, 3, seed=1)
        for index in (7, 0, 4, 8, 1):
            self.assertAllEqual(back_and_forth.batch(index), expected[index])

    def test_one_batch_may_be_all_images(self):
        order = supervised.Order(4, 4, seed=0)
        for index in range(3):
            self.assertCountEqual(order.batch(index), range(4))


class SupervisedStepTest(tf.test.TestCase):
    def test_equals_sgd_by_hand_with_decay_of_kernels_only(self):
        rng = np.random.default_rng(0)
        image = keras.layers.Input((2, 2, 1))
        logits = keras.layers.Dense(3)(keras.layers.Flatten()(image))
        model = helpers.randomise(keras.Model(image, logits))
        kernel, bias = helpers.copies(model.weights)
        inputs = rng.normal(size=(5, 2, 2, 1)).astype(np.float32)
        labels = np.array([0, 2, 1, 1, 0], np.int32)

        x = inputs.reshape(5, 4)
        scores = x @ kernel + bias
        p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(5), labels]).mean()
        d_scores = (p - np.eye(3)[labels]) / 5
        d_kernel = x.T @ d_scores + 0.3 * kernel
        d_bias = d_scores.sum(axis=0)

        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(model.trainable_variables)
        measured = supervised.supervised_step(
            model, optimizer, tf.constant(inputs), tf.constant(labels), 0.3
        )
        self.assertAllClose(measured["loss"], loss, rtol=1e-5)
        accuracy = (scores.argmax(axis=1) == labels).mean()
        self.assertAllClose(measured["accuracy"], accuracy)
        self.assertAllClose(model.weights[0], kernel - 0.5 * d_kernel, atol=1e-5)
        self.assertAllClose(model.weights[1], bias - 0.5 * d_bias, atol=1e-5)

    def test_decay_spares_scales_and_shifts(self):
        model = helpers.small_learner().model
        inputs = tf.constant(helpers.random_inputs(model))
        labels = tf.constant([0, 1, 2, 3])
        results = []
        for weight_decay in (0.0, 0.5):
            copy = keras.models.clone_model(model)
            copy.set_weights(model.get_weights())
            optimizer = keras.optimizers.SGD(1.0)
            optimizer.build(copy.trainable_variables)
            supervised.supervised_step(copy, optimizer, inputs, labels, weight_decay)
            results.append(copy.trainable_variables)
        for start, plain, decayed in zip(model.trainable_variables, *results):
            decay = 0.5 if "kernel" in start.name else 0.0
            self.assertAllClose(plain - decay * start, decayed, atol=1e-4)

    def test_moves_the_moving_averages(self):
        model = helpers.small_learner().model
        optimizer = keras.optimizers.SGD(1e-9)
        optimizer.build(model.trainable_variables)
        inputs = tf.constant(helpers.random_inputs(model))
        bn = model.get_layer("bn1")
        batch_mean = np.mean(model.get_layer("conv1")(inputs), axis=(0, 1, 2))
        expected = bn.momentum * bn.moving_mean + (1 - bn.momentum) * batch_mean
        supervised.supervised_step(
            model, optimizer, inputs, tf.constant([0, 1, 2, 3]), 0.0
        )
        self.assertAllClose(bn.moving_mean, expected, atol=1e-5)


def _toy_problem(num_images=64):
    """Dark and bright images, each class told by its mean."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, num_images)
    images = (
        rng.integers(0, 100, (num_images, 8, 8, 1)) + 120 * labels[:, None, None, None]
    )
    return images.astype(np.uint8), labels


def _teacher():
    return helpers.small_learner((8, 8, 1), num_classes=2, seed=3)


def _train(teacher, config=_CONFIG, **kwargs):
    context = helpers.context(config, **kwargs)
    supervised.train_teacher(teacher, *_toy_problem(), context)
    return teacher.model.weights


class TrainTeacherTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters("float32", "bfloat16")
    def test_learns_a_separable_problem(self, precision):
        teacher = _teacher()
        images, labels = _toy_problem()
        before = accuracy(teacher.scores(images), labels)
        # Enough steps for the moving averages of BN, of momentum 0.99.
        for name in ("bn1", "bn2"):
            teacher.model.get_layer(name).momentum = 0.8
        config = dataclasses.replace(
            _CONFIG, teacher_epochs=5, augmentation="none", teacher_weight_decay=0.0
        )
        _train(teacher, config, precision=precision)
        self.assertLess(before, 0.9)
        self.assertEqual(accuracy(teacher.scores(images), labels), 1.0)

    @pytest.mark.long
    def test_seed_decides_the_result(self):
        one, same, other = (_train(_teacher(), seed=seed) for seed in (1, 1, 2))
        self.assertTrue(helpers.all_equal(one, same))
        self.assertFalse(helpers.all_equal(one, other))

    def test_interrupted_run_continues_to_the_same_weights(self):
        whole = _train(_teacher(), seed=1)
        directory = self.get_temp_dir()

        def run_loop(name, step, *args, **kwargs):
            def interrupted(index):
                if index == 13:
                    raise KeyboardInterrupt
                return step(index)

            return loop.run_loop(
                name, interrupted, *args, measure_every=4, save_seconds=0, **kwargs
            )

        with mock.patch.object(supervised, "run_loop", run_loop):
            with self.assertRaises(KeyboardInterrupt):
                _train(_teacher(), seed=1, directory=directory)
        continued = _train(_teacher(), seed=1, directory=directory)
        self.assertTrue(helpers.all_equal(continued, whole))
        # And once more, of the finished run.
        again = _train(_teacher(), seed=1, directory=directory)
        self.assertTrue(helpers.all_equal(again, whole))

    def test_every_epoch_shows_each_image_once_in_another_order(self):
        seen = []

        def step(model, optimizer, inputs, labels, weight_decay):
            tf.py_function(lambda x: seen.append(x.numpy()), [inputs[:, 0, 0, 0]], [])
            return {"loss": tf.constant(0.0)}

        images = np.zeros((10, 8, 8, 1), np.uint8)
        images += np.arange(10, dtype=np.uint8)[:, None, None, None]
        config = dataclasses.replace(
            _CONFIG, teacher_batch_size=3, augmentation="none", teacher_epochs=2
        )
        with mock.patch.object(supervised, "supervised_step", step):
            supervised.train_teacher(
                _teacher(), images, np.zeros(10, np.int64), helpers.context(config)
            )
        self.assertLen(seen, 6)  # 9 of 10 images, twice: the rest is no whole batch
        numbers = np.rint(np.stack(seen) * 64 + 120).astype(int).reshape(2, 9)
        for epoch in numbers:
            self.assertLen(set(epoch), 9)
        self.assertNotAllEqual(*numbers)

    @pytest.mark.long
    def test_images_grow_and_the_teacher_keeps_its_size(self):
        sizes = []

        def step(model, optimizer, inputs, labels, weight_decay):
            self.assertEqual(model.input_shape, (None, None, None, 1))
            tf.py_function(lambda x: sizes.append(x.shape[1:3]), [inputs], [])
            return supervised_step(model, optimizer, inputs, labels, weight_decay)

        supervised_step = supervised.supervised_step
        config = dataclasses.replace(
            _CONFIG, teacher_batch_size=32, teacher_epochs=5, teacher_initial_scale=0.5
        )
        teacher = _teacher()
        before = helpers.copies(teacher.model.weights)
        with mock.patch.object(supervised, "supervised_step", step):
            _train(teacher, config)
        # Two steps an epoch; the fifth epoch is the last 20 %.
        expected = np.repeat([4, 5, 6, 7, 8], 2)
        self.assertAllEqual(sizes, np.stack([expected, expected], axis=1))
        self.assertEqual(teacher.model.input_shape, (None, 8, 8, 1))
        self.assertFalse(helpers.all_equal(teacher.model.weights, before))

    @parameterized.parameters(np.uint8, np.int32, np.int64)
    @helpers.eagerly()
    def test_labels_may_be_any_integers(self, dtype):
        images, labels = _toy_problem(8)
        config = dataclasses.replace(_CONFIG, teacher_epochs=1)
        results = []
        for chosen in (labels.astype(dtype), labels.astype(np.int32)):
            teacher = _teacher()
            context = helpers.context(config)
            supervised.train_teacher(teacher, images, chosen, context)
            results.append(teacher.model.weights)
        self.assertTrue(helpers.all_equal(*results))

    def test_batch_larger_than_the_training_set_is_refused(self):
        config = dataclasses.replace(_CONFIG, teacher_batch_size=65)
        with self.assertRaisesRegex(
            ConfigError,
            "teacher_batch_size is 65, but there are only 64 training images",
        ):
            _train(_teacher(), config)

    def test_loss_that_is_not_finite_is_named_and_keeps_the_model(self):
        teacher = _teacher()
        before = helpers.copies(teacher.model.weights)
        config = dataclasses.replace(_CONFIG, teacher_learning_rate=1e30)
        with self.assertRaisesRegex(TrainingError, "teacher: loss is not finite"):
            _train(teacher, config)
        self.assertTrue(helpers.all_equal(teacher.model.weights, before))


if __name__ == "__main__":
    tf.test.main()
