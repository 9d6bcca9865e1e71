import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import losses, steps
from dfq_tf.distillation.generator import build_generator, draw_parts, sample_noise
from dfq_tf.distillation.teacher import observe
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.layers import resized
from dfq_tf.settings import qat_recipe
from dfq_tf.training.learner import Learner
from tests import helpers

_CONFIG = qat_recipe(
    "paper",
    batch_size=6,
    noise_dim=5,
    alpha=0.3,
    bn_statistics_weight=0.5,
    instance_entropy_weight=2.0,
    batch_entropy_weight=3.0,
)


# Of the same weights for the same seed.
_generator = helpers.Reused(
    lambda seed: build_generator(_CONFIG.noise_dim, (8, 8, 3), channels=4, seed=seed)
)
_student_model = helpers.Reused(lambda seed: helpers.small_learner(seed=seed).model)


@functools.cache
def _teacher(seed):
    return observe(helpers.small_classifier(seed=seed))


class StepTestCase(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        _generator.begin()
        _student_model.begin()


def _state(seed=0, learning_rate=0.01):
    generator = _generator(seed)
    student = Learner(_student_model(seed + 2), helpers.description(4))
    state = steps.State(
        _teacher(seed + 1),
        [generator],
        [_sgd(generator, learning_rate)],
        [student],
        [_sgd(student.model, learning_rate)],
    )
    return state


def _sgd(model, learning_rate):
    optimizer = keras.optimizers.SGD(learning_rate)
    optimizer.build(model.trainable_variables)
    return optimizer


def _weights_of(teacher):
    return tf.nest.flatten(teacher.weights)


def _seed(step=0):
    return tf.constant([7, step])


class WarmUpStepTest(StepTestCase):
    def test_changes_the_generator_alone(self):
        state = _state()
        generator = helpers.copies(state.generators[0].trainable_variables)
        teacher = helpers.copies(_weights_of(state.teacher))
        student = helpers.copies(state.students[0].model.weights)
        steps.warm_up_step(state, _CONFIG, _seed())
        for before, after in zip(generator, state.generators[0].trainable_variables):
            if "conv" in after.name and "bias" in after.name:
                continue  # a BN behind it takes any bias off: its gradient is 0
            self.assertNotAllEqual(before, after, msg=after.name)
        self.assertTrue(helpers.all_equal(teacher, _weights_of(state.teacher)))
        self.assertTrue(helpers.all_equal(student, state.students[0].model.weights))

    def test_measures_the_weighted_terms_of_its_images(self):
        state = _state()
        # Of a copy: the step moves the generator.
        generator = keras.models.clone_model(state.generators[0])
        generator.set_weights(state.generators[0].get_weights())
        noise = sample_noise(_CONFIG, _seed(), 0)
        logits, inputs = state.teacher(generator(noise, training=True))
        bn = losses.bn_statistics_loss(
            inputs, state.teacher.means, state.teacher.variances
        )
        instance, batch = losses.instance_entropy(logits), losses.batch_entropy(logits)
        measured = steps.warm_up_step(state, _CONFIG, _seed()).measurements
        self.assertAllClose(measured["bn_statistics_loss"], bn, rtol=1e-4)
        self.assertAllClose(measured["instance_entropy"], instance, rtol=1e-4)
        self.assertAllClose(measured["batch_entropy"], batch, rtol=1e-4)
        self.assertAllClose(
            measured["auxiliary_loss"], 0.5 * bn + 2 * instance - 3 * batch, rtol=1e-4
        )

    def test_decreases_its_loss(self):
        state = _state()
        values = [
            float(
                steps.warm_up_step(state, _CONFIG, _seed()).measurements[
                    "auxiliary_loss"
                ]
            )
            for _ in range(8)
        ]
        self.assertLess(values[-1], 0.8 * values[0])


class GeneratorStepTest(StepTestCase):
    def test_leaves_teacher_and_student_bit_for_bit(self):
        state = _state()
        generator = helpers.copies(state.generators[0].trainable_variables)
        teacher = helpers.copies(_weights_of(state.teacher))
        student = helpers.copies(state.students[0].model.weights)
        optimizer = helpers.copies(state.student_optimizers[0].variables)
        steps.generator_step(state, _CONFIG, _seed())
        self.assertTrue(helpers.all_equal(teacher, _weights_of(state.teacher)))
        self.assertTrue(helpers.all_equal(student, state.students[0].model.weights))
        self.assertTrue(
            helpers.all_equal(optimizer, state.student_optimizers[0].variables)
        )
        self.assertFalse(
            helpers.all_equal(generator, state.generators[0].trainable_variables)
        )

    def test_loss_is_alpha_times_auxiliary_less_distillation(self):
        state = _state()
        generator = keras.models.clone_model(state.generators[0])
        generator.set_weights(state.generators[0].get_weights())
        noise = sample_noise(_CONFIG, _seed(), 1)
        pixels = generator(noise, training=True)
        distillation = losses.distillation_loss(
            state.teacher(pixels)[0], state.students[0].scores(pixels.numpy())
        )
        measured, _, _ = steps.generator_step(state, _CONFIG, _seed())
        self.assertGreater(distillation, 0.01)
        self.assertAllClose(
            measured["generator_loss"],
            0.3 * measured["auxiliary_loss"] - distillation,
            rtol=1e-4,
        )

    def test_increases_the_disagreement(self):
        state = _state(learning_rate=0.003)
        config = dataclasses.replace(_CONFIG, alpha=0.0)
        values = [
            steps.generator_step(state, config, _seed())[0]["generator_loss"].numpy()
            for _ in range(8)
        ]
        # alpha is 0: the loss is the negative distillation loss.
        self.assertLess(values[-1], 1.1 * values[0])
        self.assertLess(values[0], 0.0)

    def test_moves_by_the_gradient_of_its_loss(self):
        state = _state(learning_rate=1.0)
        generator = keras.models.clone_model(state.generators[0])
        generator.set_weights(state.generators[0].get_weights())
        noise = sample_noise(_CONFIG, _seed(), 1)
        with tf.GradientTape() as tape:
            pixels = generator(noise, training=True)
            logits, inputs = state.teacher(pixels)
            bn = losses.bn_statistics_loss(
                inputs, state.teacher.means, state.teacher.variances
            )
            student = state.students[0].model((pixels - 120.0) / 64, training=False)
            loss = 0.3 * (
                0.5 * bn
                + 2 * losses.instance_entropy(logits)
                - 3 * losses.batch_entropy(logits)
            ) - losses.distillation_loss(logits, student)
        variable = generator.get_layer("to_image").kernel
        expected = variable - tape.gradient(loss, variable)
        steps.generator_step(state, _CONFIG, _seed())
        self.assertAllClose(
            state.generators[0].get_layer("to_image").kernel,
            expected,
            rtol=1e-3,
            atol=1e-4,
        )


class StudentStepTest(StepTestCase):
    def test_leaves_teacher_and_generator_bit_for_bit(self):
        state = _state()
        generator = helpers.copies(state.generators[0].trainable_variables)
        optimizer = helpers.copies(state.generator_optimizers[0].variables)
        teacher = helpers.copies(_weights_of(state.teacher))
        student = helpers.copies(state.students[0].model.trainable_variables)
        steps.student_step(state, _CONFIG, _seed())
        self.assertTrue(helpers.all_equal(teacher, _weights_of(state.teacher)))
        self.assertTrue(
            helpers.all_equal(generator, state.generators[0].trainable_variables)
        )
        self.assertTrue(
            helpers.all_equal(optimizer, state.generator_optimizers[0].variables)
        )
        for before, after in zip(student, state.students[0].model.trainable_variables):
            self.assertNotAllEqual(before, after, msg=after.name)

    def test_equals_a_gradient_step_on_the_distillation_loss(self):
        state = _state(learning_rate=0.5)
        generator = keras.models.clone_model(state.generators[0])
        generator.set_weights(state.generators[0].get_weights())
        student = keras.models.clone_model(state.students[0].model)
        student.set_weights(state.students[0].model.get_weights())
        noise = sample_noise(_CONFIG, _seed(), 2)
        pixels = generator(noise, training=True)
        teacher_logits, _ = state.teacher(pixels)
        with tf.GradientTape() as tape:
            logits = student((pixels - 120.0) / 64, training=True)
            loss = losses.distillation_loss(teacher_logits, logits)
        gradients = tape.gradient(loss, student.trainable_variables)
        expected = [v - 0.5 * g for v, g in zip(student.trainable_variables, gradients)]
        measured = steps.student_step(state, _CONFIG, _seed())
        self.assertAllClose(measured["distillation_loss"], loss, rtol=1e-4)
        same = np.argmax(teacher_logits, -1) == np.argmax(logits, -1)
        self.assertAllClose(measured["agreement"], same.mean())
        for variable, value in zip(
            state.students[0].model.trainable_variables, expected
        ):
            self.assertAllClose(variable, value, rtol=1e-3, atol=1e-4)

    def test_student_equal_to_teacher_agrees_and_stays(self):
        student = helpers.small_learner()
        # A student in inference mode, as one whose BN is folded: no BN to update.
        student.model.get_layer("bn1").trainable = False
        student.model.get_layer("bn2").trainable = False
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(student.model.trainable_variables)
        state = dataclasses.replace(
            _state(),
            teacher=_teacher(0),
            students=[student],
            student_optimizers=[optimizer],
        )
        before = helpers.copies(student.model.weights)
        measured = steps.student_step(state, _CONFIG, _seed())
        self.assertAllClose(measured["distillation_loss"], 0.0, atol=1e-5)
        self.assertEqual(measured["agreement"].numpy(), 1.0)
        for variable, value in zip(student.model.weights, before):
            self.assertAllClose(variable, value, atol=1e-4)


def _copy(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def _drawn(generators, config):
    """A batch of a student step, of all generators in one."""
    return tf.concat(draw_parts(generators, config, _seed(), 2), axis=0)


class SeveralTest(parameterized.TestCase, StepTestCase):
    """Two generators and two students of different weights."""

    def setUp(self):
        super().setUp()
        self.state = self._several()

    def _several(self, learning_rate=0.01):
        one, other = _state(0, learning_rate), _state(10, learning_rate)
        return steps.State(
            one.teacher,
            [*one.generators, *other.generators],
            [*one.generator_optimizers, *other.generator_optimizers],
            [*one.students, *other.students],
            [*one.student_optimizers, *other.student_optimizers],
        )

    def _noises(self, stream):
        noise = sample_noise(_CONFIG, _seed(), stream, num_batches=2)
        self.assertEqual(noise.shape, (12, 5))
        return noise[:6], noise[6:]

    def _differences(self, pixels):
        """Distillation loss of each student."""
        logits = self.state.teacher(pixels)[0]
        return [
            losses.distillation_loss(logits, student.scores(pixels.numpy()))
            for student in self.state.students
        ]

    def test_warm_up_trains_each_generator_on_noise_of_its_own(self):
        pairs = list(zip(map(_copy, self.state.generators), self._noises(0)))
        expected = []
        for generator, noise in pairs:
            alone = _state()
            alone = dataclasses.replace(
                alone, generators=[generator], generator_optimizers=[_sgd(generator, 0)]
            )
            with mock.patch.object(steps, "sample_noise", return_value=noise):
                loss = steps.warm_up_step(alone, _CONFIG, _seed()).measurements
            expected.append(float(loss["auxiliary_loss"]))
        measured, _, _ = steps.warm_up_step(self.state, _CONFIG, _seed())
        self.assertNotAllClose(expected[0], expected[1])
        self.assertAllClose(measured["auxiliary_loss"], np.mean(expected), rtol=1e-4)

    def test_generators_must_fool_the_mean_student(self):
        expected = [
            np.mean(self._differences(_copy(generator)(noise, training=True)))
            for generator, noise in zip(self.state.generators, self._noises(1))
        ]
        measured, _, _ = steps.generator_step(self.state, _CONFIG, _seed())
        self.assertAllClose(
            0.3 * measured["auxiliary_loss"] - measured["generator_loss"],
            np.mean(expected),
            rtol=1e-4,
        )

    def test_generator_step_moves_each_generator_as_if_it_were_alone(self):
        state = self._several(learning_rate=0.5)
        alone = self._several(learning_rate=0.5)
        noises = self._noises(1)
        for i, noise in enumerate(noises):
            each = dataclasses.replace(
                alone,
                generators=[alone.generators[i]],
                generator_optimizers=[alone.generator_optimizers[i]],
            )
            with mock.patch.object(steps, "sample_noise", return_value=noise):
                steps.generator_step(each, _CONFIG, _seed())
        steps.generator_step(state, _CONFIG, _seed())
        for one, other in zip(state.generators, alone.generators):
            for variable, value in zip(
                one.trainable_variables, other.trainable_variables
            ):
                self.assertAllClose(variable, value, atol=1e-5)

    @parameterized.parameters((0, steps.warm_up_step), (1, steps.generator_step))
    def test_gives_the_images_before_the_step_and_the_answers(self, stream, step):
        expected = tf.concat(
            [
                _copy(generator)(noise, training=True)
                for generator, noise in zip(self.state.generators, self._noises(stream))
            ],
            axis=0,
        )
        _, images, logits = step(self.state, _CONFIG, _seed())
        self.assertEqual(images.dtype, tf.uint8)
        self.assertAllClose(tf.cast(images, tf.float32), expected, rtol=0, atol=0.501)
        self.assertAllClose(logits, self.state.teacher(expected)[0], atol=1e-4)

    def test_batch_of_students_is_drawn_from_all_generators(self):
        config = dataclasses.replace(_CONFIG, batch_size=7)
        noise = sample_noise(config, _seed(), 2)
        expected = [
            _copy(self.state.generators[0])(noise[:4], training=True),
            _copy(self.state.generators[1])(noise[4:], training=True),
        ]
        pixels = _drawn(self.state.generators, config)
        self.assertAllClose(pixels, tf.concat(expected, axis=0), atol=1e-3)

    def test_student_step_trains_each_student_on_the_same_images(self):
        pixels = _drawn([_copy(each) for each in self.state.generators], _CONFIG)
        alone = self._several()
        logits = alone.teacher(pixels)[0]
        expected = [
            steps.distillation_step(student, optimizer, pixels, logits)
            for student, optimizer in zip(alone.students, alone.student_optimizers)
        ]
        measured = steps.student_step(self.state, _CONFIG, _seed())
        for key, value in measured.items():
            self.assertAllClose(value, np.mean([each[key] for each in expected]))
        for one, other in zip(self.state.students, alone.students):
            for variable, value in zip(one.model.weights, other.model.weights):
                self.assertAllClose(variable, value, atol=1e-5)

    def _answered(self, images, logits, **settings):
        """Of fresh students: what the step measures, and their weights after it."""
        state = self._several()
        config = dataclasses.replace(_CONFIG, share_images=True, **settings)
        measured = steps.answered_step(state, config, images, logits, _seed())
        weights = [w.numpy() for s in state.students for w in s.model.weights]
        return measured, weights

    def test_answered_step_trains_each_student_on_the_images_it_is_given(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
        logits = rng.normal(size=(6, 4)).astype(np.float32)
        alone = self._several()
        for student, optimizer in zip(alone.students, alone.student_optimizers):
            steps.distillation_step(student, optimizer, tf.constant(images), logits)
        expected = [w for s in alone.students for w in s.model.weights]
        for value, weight in zip(self._answered(images, logits)[1], expected):
            self.assertAllClose(value, weight, atol=1e-5)

    def test_fresh_images_are_augmented_before_the_teacher_is_asked(self):
        fresh = _drawn([_copy(each) for each in self.state.generators], _CONFIG)
        seen = []

        def watched(student, optimizer, pixels, answers, **settings):
            seen.append((pixels, answers))
            return {"distillation_loss": tf.constant(0.0)}

        config = dataclasses.replace(_CONFIG, student_augmentation="crop")
        with mock.patch.object(steps, "distillation_step", watched):
            steps.student_step(self.state, config, _seed())
        pixels, answers = seen[0]
        for result, image in zip(pixels.numpy(), fresh.numpy()):
            padded = np.pad(image - 120.0, [(1, 1), (1, 1), (0, 0)]) + 120.0
            windows = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
            self.assertLess(min(abs(result - w).max() for w in windows), 1e-2)
        self.assertNotAllClose(pixels, fresh)
        self.assertAllClose(answers, self.state.teacher(pixels)[0], atol=1e-4)

    def test_answered_step_augments_the_images_and_keeps_the_answers(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
        logits = rng.normal(size=(6, 4)).astype(np.float32)
        seen = []
        step = steps.distillation_step

        def watched(student, optimizer, pixels, answers, **settings):
            seen.append((pixels.numpy(), answers))
            return step(student, optimizer, pixels, answers, **settings)

        with mock.patch.object(steps, "distillation_step", watched):
            self._answered(images, logits, student_augmentation="crop_flip")
        self.assertLen(seen, 2)
        for pixels, answers in seen:
            # Both students see the same.
            self.assertAllEqual(pixels, seen[0][0])
            self.assertAllEqual(answers, logits)
        cut = [
            [
                helpers.offset_in_padded(each, image, 120.0)
                for each in (result, result[:, ::-1])
            ]
            for result, image in zip(seen[0][0], images)
        ]
        self.assertNotIn([None, None], cut)
        self.assertGreater(len({str(each) for each in cut}), 3)

    def test_ramp_lets_the_distillation_loss_in_slowly(self):
        self.check_ramp(1, 0.5)

    @parameterized.parameters((0, 0.25), (3, 1.0), (10, 1.0))
    @pytest.mark.long
    def test_ramp_ends_at_the_full_weight(self, step, weight):
        self.check_ramp(step, weight)

    def check_ramp(self, step, weight):
        seed = _seed(step)
        full, _, _ = steps.generator_step(self._several(), _CONFIG, seed)
        config = dataclasses.replace(_CONFIG, adversarial_ramp_steps=4)
        ramped, _, _ = steps.generator_step(self.state, config, seed)
        distillation = 0.3 * full["auxiliary_loss"] - full["generator_loss"]
        self.assertAllClose(
            ramped["generator_loss"],
            0.3 * full["auxiliary_loss"] - weight * distillation,
            rtol=1e-4,
        )


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class DistillationStepTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.pixels = rng.uniform(0, 255, (5, 4, 4, 1)).astype(np.float32)
        teacher = helpers.small_classifier((8, 8, 1))
        graph = resized(teacher.graph, (4, 4, 1))
        self.teacher = observe(Classifier(graph, teacher.description))
        self.teacher_logits = self.teacher(self.pixels)[0].numpy()
        # A student whose gradient can be written down: one dense layer.
        image = keras.layers.Input((4, 4, 1))
        logits = keras.layers.Dense(4)(keras.layers.Flatten()(image))
        model = helpers.randomise(keras.Model(image, logits), seed=1)
        fed = dataclasses.replace(
            helpers.description(4), input_mean=(100.0,), input_scale=(0.01,)
        )
        self.student = Learner(model, fed)

    def test_equals_a_gradient_step_in_numpy(self):
        kernel, bias = helpers.copies(self.student.model.weights)
        # Each is fed as its own description says.
        inputs = ((self.pixels - 100) * 0.01).reshape(5, 16)
        logits = inputs @ kernel + bias
        p, q = _softmax(self.teacher_logits), _softmax(logits)
        loss = np.sum(p * np.log(p / q), axis=1).mean()
        d_logits = (q - p) / 5
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(self.student.model.trainable_variables)
        measured = steps.distillation_step(
            self.student, optimizer, tf.constant(self.pixels), self.teacher_logits
        )
        self.assertAllClose(measured["distillation_loss"], loss, rtol=1e-4)
        agreement = np.mean(p.argmax(axis=1) == q.argmax(axis=1))
        self.assertAllClose(measured["agreement"], agreement)
        self.assertBetween(agreement, 0.1, 0.9)
        after = self.student.model.weights
        self.assertAllClose(after[0], kernel - 0.5 * inputs.T @ d_logits, atol=1e-5)
        self.assertAllClose(after[1], bias - 0.5 * d_logits.sum(axis=0), atol=1e-5)
        self.assertNotAllClose(after[0], kernel, atol=1e-3)

    def test_temperature_softens_and_weight_decay_pulls(self):
        kernel, bias = helpers.copies(self.student.model.weights)
        inputs = ((self.pixels - 100) * 0.01).reshape(5, 16)
        logits = inputs @ kernel + bias
        p, q = _softmax(self.teacher_logits / 4), _softmax(logits / 4)
        # The gradient of 16 KL(p || q) with logits / 4 within.
        d_logits = 16 / 4 * (q - p) / 5
        optimizer = _sgd(self.student.model, 0.5)
        measured = steps.distillation_step(
            self.student,
            optimizer,
            tf.constant(self.pixels),
            self.teacher_logits,
            temperature=4.0,
            weight_decay=0.1,
        )
        loss = 16 * np.sum(p * np.log(p / q), axis=1).mean()
        self.assertAllClose(measured["distillation_loss"], loss, rtol=1e-4)
        after = self.student.model.weights
        expected = kernel - 0.5 * (inputs.T @ d_logits + 0.1 * kernel)
        self.assertAllClose(after[0], expected, atol=1e-5)
        self.assertAllClose(after[1], bias - 0.5 * d_logits.sum(axis=0), atol=1e-5)

    def test_bytes_are_taken_as_pixels(self):
        images = np.round(self.pixels).astype(np.uint8)
        results = []
        for each in (images, images.astype(np.float32)):
            optimizer = _sgd(self.student.model, 0.0)
            results.append(
                steps.distillation_step(
                    self.student, optimizer, tf.constant(each), self.teacher_logits
                )
            )
        self.assertAllEqual(*(r["distillation_loss"] for r in results))

    def test_leaves_the_teacher_bit_for_bit(self):
        before = helpers.copies(_weights_of(self.teacher))
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(self.student.model.trainable_variables)
        steps.distillation_step(
            self.student, optimizer, tf.constant(self.pixels), self.teacher_logits
        )
        self.assertTrue(helpers.all_equal(_weights_of(self.teacher), before))

    def test_repeated_steps_end_in_agreement(self):
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build(self.student.model.trainable_variables)
        measured = [
            steps.distillation_step(
                self.student, optimizer, tf.constant(self.pixels), self.teacher_logits
            )
            for _ in range(30)
        ]
        first, last = (float(measured[i]["distillation_loss"]) for i in (0, -1))
        self.assertLess(last, 0.2 * first)
        self.assertEqual(float(measured[-1]["agreement"]), 1.0)


if __name__ == "__main__":
    tf.test.main()
