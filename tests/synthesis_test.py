import contextlib
import dataclasses
import itertools
from unittest import mock

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.distillation.generator import build_generator
from dfq_tf.distillation.pool import Store
from dfq_tf.distillation.synthesis import Synthesizer
from dfq_tf.distillation.teacher import observe
from dfq_tf.settings import BudgetConfig
from dfq_tf.training.learner import Learner
from tests import helpers

SHAPE = (8, 8, 3)
CONFIG = BudgetConfig(
    batch_size=8, noise_dim=5, student_augmentation="none", generator_steps=3
)
FIRST = tf.constant([0, 1])

_generator = helpers.Reused(lambda: build_generator(5, SHAPE, channels=8))
_student = helpers.Reused(lambda: helpers.small_learner(SHAPE).model)


class SynthesizerTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        _generator.begin()
        _student.begin()
        self.teacher = observe(helpers.small_classifier(SHAPE))
        self.generator = _generator()

    def made(self, students=(), **settings):
        config = dataclasses.replace(CONFIG, **settings)
        return Synthesizer(self.teacher, self.generator, students, config)

    def pixels(self, synthesizer):
        """What the generator makes of the noise at hand, as it is now."""
        return self.generator(synthesizer._latents, training=True).numpy()

    def test_each_batch_starts_from_the_start_and_other_noise(self):
        synthesizer = self.made()
        before = helpers.copies(self.generator.trainable_variables[2:])
        drawn = []
        for number in (1, 2):
            synthesizer.begin(tf.constant([0, number]))
            now = self.generator.trainable_variables[2:]
            self.assertTrue(helpers.all_equal(now, before))
            drawn.append(synthesizer._latents.numpy())
            self.assertAllInRange(synthesizer._classes, 0, 3)
            synthesizer.improve(FIRST)  # moves the generator, and Adam's means
            self.assertFalse(helpers.all_equal(now, before))
        self.assertNotAllClose(*drawn)
        self.assertNotAllClose(synthesizer._latents, drawn[1])

    def test_first_layer_is_drawn_anew_for_each_batch_as_the_generator_draws_it(self):
        synthesizer = self.made(synthesis_learning_rate=0.1)
        layer = self.generator.get_layer("dense")
        first, bias = helpers.copies(layer.weights)
        kernels = []
        for number in (1, 2, 1):
            synthesizer.begin(tf.constant([0, number]))
            kernels.append(layer.kernel.numpy())
            self.assertAllEqual(layer.bias, bias)
            synthesizer.improve(FIRST)
            self.assertNotAllClose(layer.kernel, kernels[-1])
            self.assertNotAllClose(layer.bias, bias)
            synthesizer.keep(FIRST)
        self.assertAllEqual(kernels[2], kernels[0])
        for one, other in itertools.combinations([*kernels[:2], first], 2):
            self.assertLess(abs(np.corrcoef(one.flat, other.flat)[0, 1]), 0.3)
        # A uniform distribution: its ends, and its standard deviation.
        reach = np.sqrt(6 / sum(first.shape))
        for kernel in kernels:
            self.assertAllInRange(kernel, -reach, reach)
            self.assertAllClose(np.std(kernel), reach / np.sqrt(3), rtol=0.15)

    def test_first_layer_is_learnt_with_the_others_if_it_is_not_drawn(self):
        synthesizer = self.made(draws_first_layer=False)
        layer = self.generator.get_layer("dense")
        before = layer.kernel.numpy()
        synthesizer.begin(FIRST)
        self.assertAllEqual(layer.kernel, before)
        synthesizer.improve(FIRST)
        synthesizer.keep(FIRST)
        synthesizer.begin(tf.constant([0, 2]))
        # As far as Adam's first step of the start.
        rate = CONFIG.synthesis_learning_rate * CONFIG.generator_steps
        moved = np.abs(layer.kernel.numpy() - before)
        self.assertAllClose(np.median(moved), rate, rtol=0.05)

    def test_a_batch_hangs_on_nothing_of_the_one_before_but_the_start(self):
        synthesizer = self.made()
        results = []
        for number in (1, 7, 1):
            synthesizer.begin(tf.constant([0, number]))
            results.append(
                [synthesizer.improve(tf.constant([0, step])) for step in (1, 2)]
            )
        self.assertAllClose(results[2], results[0], rtol=1e-5)
        self.assertNotAllClose(results[1], results[0])

    def test_images_of_the_least_loss_are_kept(self):
        # Steps so long that the first images stay the best.
        synthesizer = self.made(synthesis_learning_rate=50.0)
        synthesizer.begin(FIRST)
        first = self.pixels(synthesizer)
        losses = [synthesizer.improve(FIRST)["synthesis_loss"] for _ in range(3)]
        self.assertLess(losses[0], min(losses[1:]))
        self.assertAllEqual(synthesizer.keep(FIRST), np.rint(first))

    def test_steps_lower_the_loss_and_the_last_images_are_kept(self):
        synthesizer = self.made(synthesis_learning_rate=0.01)
        synthesizer.begin(FIRST)
        losses = []
        for _ in range(6):
            last = self.pixels(synthesizer)
            losses.append(float(synthesizer.improve(FIRST)["synthesis_loss"]))
        self.assertLess(losses[-1], 0.9 * losses[0])
        self.assertEqual(losses[-1], min(losses))
        self.assertAllEqual(synthesizer.keep(FIRST), np.rint(last))

    def test_makers_number_all_steps_and_each_fills_its_store(self):
        synthesizer = self.made()
        stores = [Store(2, images=((8, *SHAPE), tf.uint8)) for _ in range(2)]
        drawn = {"begin": [], "improve": [], "keep": []}
        with contextlib.ExitStack() as patches:
            patches.enter_context(helpers.eagerly())
            for name, numbers in drawn.items():

                def step(at, real=getattr(synthesizer, name), numbers=numbers):
                    numbers.append(tuple(at.numpy()))
                    return real(at)

                patches.enter_context(mock.patch.object(synthesizer, name, step))
            first, second = synthesizer.makers(stores, seed=7)
            second(4)
            found = first(5)
        self.assertEqual(drawn["begin"], [(7, 4), (7, 5)])
        self.assertEqual(drawn["keep"], drawn["begin"])
        self.assertEqual(drawn["improve"], [(7, i) for i in range(12, 18)])
        self.assertIn("bn_distance", found)
        batches = [store.all()["images"] for store in stores]
        self.assertAllEqual(batches[0], synthesizer._best)
        self.assertEqual(batches[1].shape, batches[0].shape)
        self.assertNotAllEqual(batches[1], batches[0])

    def test_what_the_teacher_said_in_the_later_half_is_given_away(self):
        synthesizer = self.made(student_augmentation="crop", generator_steps=4)
        kept, given = (
            Store(
                4,
                images=((8, *SHAPE), tf.uint8),
                **({"logits": ((8, 4), tf.float32)} if has_logits else {}),
            )
            for has_logits in (False, True)
        )
        with helpers.eagerly():
            (make,) = synthesizer.makers([kept], seed=0, answered=given)
            make(0)
            self.assertEqual(given.added, 0)
            make(1, gives_answers=True)
        self.assertEqual(given.added, 2)
        found = given.all()
        # Of the pixels that are given away with it, before they were rounded.
        expected = helpers.small_classifier(SHAPE).scores(found["images"])
        error = np.std(found["logits"] - expected)
        self.assertLess(error, 0.05 * np.std(expected, axis=0).mean())
        self.assertNotAllEqual(*np.split(found["images"], 2))

    def test_start_moves_down_the_sum_of_all_gradients_of_its_batch(self):
        synthesizer = self.made()
        start = helpers.copies(synthesizer._start)
        synthesizer.begin(FIRST)
        total = [np.zeros_like(value) for value in start]
        for _ in range(2):
            with tf.GradientTape() as tape:
                pixels = self.generator(synthesizer._latents, training=True)
                loss, *_ = self.loss(synthesizer, pixels)
            weights = self.generator.trainable_variables[2:]
            for each, gradient in zip(total, tape.gradient(loss, weights)):
                each += gradient.numpy()
            synthesizer.improve(FIRST)
        for found, gradient in zip(synthesizer._gradients, total):
            self.assertAllClose(found, gradient, rtol=1e-3, atol=1e-3)
        synthesizer.keep(FIRST)
        # Adam's first step is its learning rate long, whatever the gradient.
        rate = CONFIG.synthesis_learning_rate * CONFIG.generator_steps
        for before, now, gradient in zip(start, synthesizer._start, total):
            large = np.abs(gradient) > 1e-2
            self.assertTrue(large.any() or gradient.ndim == 1)
            expected = before - rate * np.sign(gradient)
            self.assertAllClose(now.numpy()[large], expected[large], atol=1e-4)

    def loss(self, synthesizer, pixels, past=None):
        """A twin of the loss, the moments with those of the past, and the logits."""
        logits, inputs = self.teacher(pixels)
        found = [tf.reduce_mean(x, range(x.shape.rank - 1)) for x in inputs]
        found += [tf.math.reduce_variance(x, range(x.shape.rank - 1)) for x in inputs]
        wanted = [*self.teacher.means, *self.teacher.variances]
        mixed = [0.9 * p + 0.1 * f for p, f in zip(past or wanted, found)]
        distance = sum(tf.norm(m - w) for m, w in zip(mixed, wanted))
        chosen = tf.gather(
            tf.nn.log_softmax(logits), synthesizer._classes, batch_dims=1
        )
        loss = 10.0 * distance - 0.4 * tf.reduce_mean(chosen)
        return loss, mixed, logits

    def test_loss_is_of_bn_statistics_and_wanted_classes(self):
        synthesizer = self.made()
        synthesizer.begin(FIRST)
        expected, past, _ = self.loss(synthesizer, self.pixels(synthesizer))
        found = synthesizer.improve(FIRST)["synthesis_loss"]
        self.assertAllClose(found, expected, rtol=1e-4)
        synthesizer.keep(FIRST)
        # Nine tenths are the statistics of the batches before, which count as right
        # where there are none.
        synthesizer.begin(tf.constant([0, 2]))
        pixels = self.pixels(synthesizer)
        expected, *_ = self.loss(synthesizer, pixels, past)
        found = synthesizer.improve(FIRST)["synthesis_loss"]
        self.assertAllClose(found, expected, rtol=1e-4)

    def test_students_are_fooled_where_they_agree(self):
        student = Learner(_student(), helpers.description(4))
        synthesizer = self.made([student])
        synthesizer.begin(FIRST)
        pixels = self.pixels(synthesizer)
        without, _, logits = self.loss(synthesizer, pixels)
        synthesizer.adversarial_weight.assign(2.0)
        # The teacher's twin, but that half of the images lose their class.
        top = np.sort(logits.numpy())[:, -2:]
        bias = np.zeros(4)
        bias[logits.numpy().argmax(-1)] = -np.median(top[:, 1] - top[:, 0])
        student.model.layers[-1].bias.assign_add(bias)
        theirs = student.logits(pixels, training=False)
        p = tf.nn.softmax(logits).numpy()
        divergence = (p * (np.log(p) - tf.nn.log_softmax(theirs).numpy())).sum(-1)
        agree = logits.numpy().argmax(-1) == theirs.numpy().argmax(-1)
        self.assertBetween(agree.sum(), 1, len(agree) - 1)
        expected = without - 2.0 * (divergence * agree).mean()
        before = helpers.copies(student.model.weights)
        found = synthesizer.improve(FIRST)["synthesis_loss"]
        self.assertAllClose(found, expected, rtol=1e-4)
        self.assertTrue(helpers.all_equal(student.model.weights, before))


if __name__ == "__main__":
    tf.test.main()
