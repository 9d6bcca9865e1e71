"""Tests of the images that are made for blocks to learn from."""

import math
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.distillation import lessons, phases
from dfq_tf.distillation.generator import build_generator, generate
from dfq_tf.distillation.synthesis import Synthesizer
from dfq_tf.distillation.teacher import distance_of, observe
from dfq_tf.settings import BudgetConfig, DistillationConfig
from tests import digits, helpers

SHAPE = (8, 8, 3)
CONFIG = DistillationConfig(batch_size=8, noise_dim=5, warm_up_steps=3)


def made(count, **kwargs):
    """Images for a teacher of small images, and the generator that they began with."""
    teacher = observe(helpers.small_classifier(SHAPE))
    generator = build_generator(5, SHAPE, channels=8)
    warmed = phases.WarmedUp(teacher, [generator])
    context = helpers.context(CONFIG, **kwargs)
    return lessons.synthesized(warmed, count, context), generator


class SynthesizedTest(tf.test.TestCase):
    def test_they_are_the_newest_of_a_synthesizer_that_starts_from_the_generator(self):
        with mock.patch.object(lessons, "_FIRST", 2):
            found, generator = made(12, seed=3)
        teacher = observe(helpers.small_classifier(SHAPE))
        config = BudgetConfig(
            batch_size=8,
            generator_steps=10,
            student_augmentation="crop",
            draws_first_layer=False,
        )
        twin = Synthesizer(teacher, build_generator(5, SHAPE, 8), (), config)
        improve, batches, step = phases.compiled(twin.improve), [], 0
        for number in range(4):
            twin.begin(tf.constant([3, number]))
            for _ in range(10):
                improve(tf.constant([3, step]))
                step += 1
            batches.append(twin.keep(tf.constant([3, number])).numpy())
        self.assertEqual((found.dtype, found.shape), (np.uint8, (12, *SHAPE)))
        # The ring of two batches: the third in place of the first.
        self.assertAllEqual(found, np.concatenate(batches[2:])[:12])
        self.assertNotAllEqual(batches[2], batches[3])
        fresh = build_generator(5, SHAPE, channels=8)
        self.assertTrue(helpers.all_equal(generator.weights, fresh.weights))

    def test_they_are_nearer_to_what_batch_normalization_remembers(self):
        teacher = observe(digits.teacher())
        generator = build_generator(5, teacher.image_shape, channels=8)
        warmed = phases.WarmedUp(teacher, [generator])
        found = lessons.synthesized(warmed, 32, helpers.context(CONFIG))
        before = generate([generator], CONFIG, 32, seed=0)
        distances = [distance_of(teacher, images) for images in (before, found)]
        self.assertLess(distances[1], 0.1 * distances[0])

    def test_a_run_that_was_stopped_goes_on(self):
        with (
            helpers.eagerly(),
            mock.patch.object(lessons, "_FIRST", 2),
            mock.patch.object(lessons, "_STEPS", 1),
        ):
            self.check_stopped()

    def check_stopped(self):
        whole, _ = made(16)
        folder = helpers.new_folder()
        real, taken = lessons.run_loop, []

        def stopped(name, step, *args, **kwargs):
            def failing(number):
                if number == 3:
                    raise KeyboardInterrupt
                return step(number)

            return real(name, failing, *args, **kwargs, save_seconds=0)

        with mock.patch.object(lessons, "run_loop", stopped):
            with self.assertRaises(KeyboardInterrupt):
                made(16, directory=folder)

        def counted(name, step, *args, **kwargs):
            return real(name, lambda n: taken.append(n) or step(n), *args, **kwargs)

        with mock.patch.object(lessons, "run_loop", counted):
            rest, _ = made(16, directory=folder)
            self.assertEqual(taken, [3])
            self.assertAllEqual(rest, whole)
            again, _ = made(16, directory=folder)
        self.assertEqual(taken, [3])
        self.assertAllEqual(again, whole)


class SpreadTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((8, 8), (9, 3), (5, 12), (4, 0), (0, 4))
    def test_any_part_has_its_share_of_each(self, first, second):
        numbers = np.arange(first + second, dtype=np.uint8)[:, None, None, None]
        order = lessons.spread(numbers[:first], numbers[first:]).ravel()
        self.assertAllEqual(order[order < first], range(first))
        self.assertAllEqual(order[order >= first], range(first, first + second))
        share = first / (first + second)
        for count in range(1, len(order) + 1):
            expected = count * share
            self.assertBetween(
                (order[:count] < first).sum(),
                math.floor(expected) - 1,
                math.ceil(expected) + 1,
            )


if __name__ == "__main__":
    tf.test.main()
