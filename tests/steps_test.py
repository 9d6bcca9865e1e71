import dataclasses

import numpy as np
from absl.testing import parameterized

from dfq_tf import losses, steps
from dfq_tf.bn_statistics import observe
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import DistillationConfig
from dfq_tf.models import build_generator
from tests import helpers

_CONFIG = DistillationConfig(
    batch_size=6,
    noise_dim=5,
    alpha=0.3,
    bn_statistics_weight=0.5,
    instance_entropy_weight=2.0,
    batch_entropy_weight=3.0,
)


def _state(seed=0, learning_rate=0.01):
    keras.utils.set_random_seed(seed)
    generator = build_generator(_CONFIG.noise_dim, (8, 8, 3), channels=4)
    student = helpers.small_classifier(seed=seed + 2)
    state = steps.State(
        observe(helpers.small_classifier(seed=seed + 1)),
        generator,
        keras.optimizers.SGD(learning_rate),
        student,
        keras.optimizers.SGD(learning_rate),
    )
    state.generator_optimizer.build(generator.trainable_variables)
    state.student_optimizer.build(student.model.trainable_variables)
    return state


def _seed(step=0):
    return tf.constant([7, step])


class SampleNoiseTest(parameterized.TestCase, tf.test.TestCase):
    def _noise(self, seed, step, stream, **changes):
        config = dataclasses.replace(_CONFIG, **changes)
        return steps.sample_noise(config, tf.constant([seed, step]), stream).numpy()

    def test_depends_on_seed_step_and_stream(self):
        base = self._noise(1, 2, 3)
        self.assertNotAllClose(base, self._noise(2, 2, 3))
        self.assertNotAllClose(base, self._noise(1, 3, 3))
        self.assertNotAllClose(base, self._noise(1, 2, 0))
        self.assertNotAllClose(base, self._noise(2, 1, 3))

    def test_depends_on_nothing_else(self):
        base = self._noise(1, 2, 3)
        tf.random.set_seed(99)
        tf.random.normal((3,))
        self.assertAllEqual(base, self._noise(1, 2, 3))
        graph = tf.function(lambda s: steps.sample_noise(_CONFIG, s, 3))
        self.assertAllEqual(base, graph(tf.constant([1, 2])))

    def test_is_standard_normal(self):
        noise = self._noise(0, 0, 0, batch_size=200, noise_dim=100)
        self.assertEqual(noise.shape, (200, 100))
        self.assertAllClose(noise.mean(), 0.0, atol=0.03)
        self.assertAllClose(noise.std(), 1.0, atol=0.03)
        self.assertAllClose(np.mean(np.abs(noise) < 1), 0.6827, atol=0.02)


class WarmUpStepTest(tf.test.TestCase):
    def test_changes_the_generator_alone(self):
        state = _state()
        generator = helpers.copies(state.generator.trainable_variables)
        teacher = helpers.copies(state.teacher.model.weights)
        student = helpers.copies(state.student.model.weights)
        steps.warm_up_step(state, _CONFIG, _seed())
        for before, after in zip(generator, state.generator.trainable_variables):
            if "conv" in after.name and "bias" in after.name:
                continue  # a BN behind it takes any bias off: its gradient is 0
            self.assertNotAllEqual(before, after, msg=after.name)
        self.assertTrue(helpers.all_equal(teacher, state.teacher.model.weights))
        self.assertTrue(helpers.all_equal(student, state.student.model.weights))

    def test_measures_the_weighted_terms_of_its_images(self):
        state = _state()
        # Of a copy: the step moves the generator.
        generator = keras.models.clone_model(state.generator)
        generator.set_weights(state.generator.get_weights())
        noise = steps.sample_noise(_CONFIG, _seed(), 0)
        logits, inputs = state.teacher(generator(noise, training=True))
        bn = losses.bn_statistics_loss(
            inputs, state.teacher.means, state.teacher.variances
        )
        instance, batch = losses.instance_entropy(logits), losses.batch_entropy(logits)
        measured = steps.warm_up_step(state, _CONFIG, _seed())
        self.assertAllClose(measured["bn_statistics_loss"], bn, rtol=1e-4)
        self.assertAllClose(measured["instance_entropy"], instance, rtol=1e-4)
        self.assertAllClose(measured["batch_entropy"], batch, rtol=1e-4)
        self.assertAllClose(
            measured["auxiliary_loss"], 0.5 * bn + 2 * instance - 3 * batch, rtol=1e-4
        )

    def test_decreases_its_loss(self):
        state = _state()
        values = [
            steps.warm_up_step(state, _CONFIG, _seed())["auxiliary_loss"].numpy()
            for _ in range(8)
        ]
        self.assertLess(values[-1], 0.8 * values[0])


class GeneratorStepTest(tf.test.TestCase):
    def test_leaves_teacher_and_student_bit_for_bit(self):
        state = _state()
        generator = helpers.copies(state.generator.trainable_variables)
        teacher = helpers.copies(state.teacher.model.weights)
        student = helpers.copies(state.student.model.weights)
        optimizer = helpers.copies(state.student_optimizer.variables)
        steps.generator_step(state, _CONFIG, _seed())
        self.assertTrue(helpers.all_equal(teacher, state.teacher.model.weights))
        self.assertTrue(helpers.all_equal(student, state.student.model.weights))
        self.assertTrue(helpers.all_equal(optimizer, state.student_optimizer.variables))
        self.assertFalse(
            helpers.all_equal(generator, state.generator.trainable_variables)
        )

    def test_loss_is_alpha_times_auxiliary_less_distillation(self):
        state = _state()
        generator = keras.models.clone_model(state.generator)
        generator.set_weights(state.generator.get_weights())
        noise = steps.sample_noise(_CONFIG, _seed(), 1)
        pixels = generator(noise, training=True)
        distillation = losses.distillation_loss(
            state.teacher(pixels)[0], state.student.scores(pixels.numpy())
        )
        measured = steps.generator_step(state, _CONFIG, _seed())
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
            steps.generator_step(state, config, _seed())["generator_loss"].numpy()
            for _ in range(8)
        ]
        # alpha is 0: the loss is the negative distillation loss.
        self.assertLess(values[-1], 1.1 * values[0])
        self.assertLess(values[0], 0.0)

    def test_moves_by_the_gradient_of_its_loss(self):
        state = _state(learning_rate=1.0)
        generator = keras.models.clone_model(state.generator)
        generator.set_weights(state.generator.get_weights())
        noise = steps.sample_noise(_CONFIG, _seed(), 1)
        with tf.GradientTape() as tape:
            pixels = generator(noise, training=True)
            logits, inputs = state.teacher(pixels)
            bn = losses.bn_statistics_loss(
                inputs, state.teacher.means, state.teacher.variances
            )
            student = state.student.model((pixels - 120.0) / 64, training=False)
            loss = 0.3 * (
                0.5 * bn
                + 2 * losses.instance_entropy(logits)
                - 3 * losses.batch_entropy(logits)
            ) - losses.distillation_loss(logits, student)
        variable = generator.get_layer("to_image").kernel
        expected = variable - tape.gradient(loss, variable)
        steps.generator_step(state, _CONFIG, _seed())
        self.assertAllClose(
            state.generator.get_layer("to_image").kernel, expected, rtol=1e-3, atol=1e-4
        )


class StudentStepTest(tf.test.TestCase):
    def test_leaves_teacher_and_generator_bit_for_bit(self):
        state = _state()
        generator = helpers.copies(state.generator.trainable_variables)
        optimizer = helpers.copies(state.generator_optimizer.variables)
        teacher = helpers.copies(state.teacher.model.weights)
        student = helpers.copies(state.student.model.trainable_variables)
        steps.student_step(state, _CONFIG, _seed())
        self.assertTrue(helpers.all_equal(teacher, state.teacher.model.weights))
        self.assertTrue(
            helpers.all_equal(generator, state.generator.trainable_variables)
        )
        self.assertTrue(
            helpers.all_equal(optimizer, state.generator_optimizer.variables)
        )
        for before, after in zip(student, state.student.model.trainable_variables):
            self.assertNotAllEqual(before, after, msg=after.name)

    def test_equals_a_gradient_step_on_the_distillation_loss(self):
        state = _state(learning_rate=0.5)
        generator = keras.models.clone_model(state.generator)
        generator.set_weights(state.generator.get_weights())
        student = keras.models.clone_model(state.student.model)
        student.set_weights(state.student.model.get_weights())
        noise = steps.sample_noise(_CONFIG, _seed(), 2)
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
        for variable, value in zip(state.student.model.trainable_variables, expected):
            self.assertAllClose(variable, value, rtol=1e-3, atol=1e-4)

    def test_student_equal_to_teacher_agrees_and_stays(self):
        teacher = helpers.small_classifier()
        # A student in inference mode, as one whose BN is folded: no BN to update.
        teacher.model.get_layer("bn1").trainable = False
        teacher.model.get_layer("bn2").trainable = False
        optimizer = keras.optimizers.SGD(0.01)
        optimizer.build(teacher.model.trainable_variables)
        state = dataclasses.replace(
            _state(),
            teacher=observe(teacher),
            student=teacher,
            student_optimizer=optimizer,
        )
        before = helpers.copies(teacher.model.weights)
        measured = steps.student_step(state, _CONFIG, _seed())
        self.assertAllClose(measured["distillation_loss"], 0.0, atol=1e-5)
        self.assertEqual(measured["agreement"].numpy(), 1.0)
        for variable, value in zip(teacher.model.weights, before):
            self.assertAllClose(variable, value, atol=1e-4)


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


class DistillationStepTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(0)
        self.pixels = rng.uniform(0, 255, (5, 4, 4, 1)).astype(np.float32)
        classifier = helpers.small_classifier((4, 4, 1))
        self.teacher = observe(classifier)
        self.teacher_logits = classifier.scores(self.pixels)
        # A student whose gradient can be written down: one dense layer.
        image = keras.layers.Input((4, 4, 1))
        logits = keras.layers.Dense(4)(keras.layers.Flatten()(image))
        model = helpers.randomise(keras.Model(image, logits), seed=1)
        fed = dataclasses.replace(
            helpers.description(4), input_mean=(100.0,), input_scale=(0.01,)
        )
        self.student = Classifier(model, fed)

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
            self.teacher, self.student, optimizer, tf.constant(self.pixels)
        )
        self.assertAllClose(measured["distillation_loss"], loss, rtol=1e-4)
        agreement = np.mean(p.argmax(axis=1) == q.argmax(axis=1))
        self.assertAllClose(measured["agreement"], agreement)
        self.assertBetween(agreement, 0.1, 0.9)
        after = self.student.model.weights
        self.assertAllClose(after[0], kernel - 0.5 * inputs.T @ d_logits, atol=1e-5)
        self.assertAllClose(after[1], bias - 0.5 * d_logits.sum(axis=0), atol=1e-5)
        self.assertNotAllClose(after[0], kernel, atol=1e-3)

    def test_leaves_the_teacher_bit_for_bit(self):
        before = helpers.copies(self.teacher.model.weights)
        optimizer = keras.optimizers.SGD(0.5)
        optimizer.build(self.student.model.trainable_variables)
        steps.distillation_step(
            self.teacher, self.student, optimizer, tf.constant(self.pixels)
        )
        self.assertTrue(helpers.all_equal(self.teacher.model.weights, before))

    def test_repeated_steps_end_in_agreement(self):
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build(self.student.model.trainable_variables)
        measured = [
            steps.distillation_step(
                self.teacher, self.student, optimizer, tf.constant(self.pixels)
            )
            for _ in range(30)
        ]
        first, last = (float(measured[i]["distillation_loss"]) for i in (0, -1))
        self.assertLess(last, 0.2 * first)
        self.assertEqual(float(measured[-1]["agreement"]), 1.0)


if __name__ == "__main__":
    tf.test.main()
