import dataclasses

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.distillation import pool
from dfq_tf.distillation.teacher import observe
from dfq_tf.settings import BudgetConfig
from tests import helpers

SHAPE = (8, 8, 3)
# Every image as it is in the bank.
PLAIN = BudgetConfig(
    batch_size=16,
    student_augmentation="none",
    noise_share=0.0,
    mixup_share=0.0,
    cutmix_share=0.0,
)


def _store(num_batches=3, size=2):
    return pool.Store(
        num_batches, images=((size, 1), tf.uint8), logits=((size, 2), tf.float32)
    )


def _add(store, *numbers):
    values = np.array(numbers)[:, None]
    logits = values * [1.0, -1.0]
    store.add(
        images=tf.constant(values, tf.uint8), logits=tf.constant(logits, tf.float32)
    )


class StoreTest(tf.test.TestCase):
    def drawn(self, store):
        images, logits = store.draw(400, tf.constant([0, 1]))
        self.assertAllEqual(logits, images.numpy() * [1.0, -1.0])  # rows stay whole
        return sorted(set(images.numpy().ravel()))

    def test_gives_what_it_holds_and_nothing_of_what_is_empty(self):
        store = _store()
        _add(store, 5, 6)
        self.assertEqual(self.drawn(store), [5, 6])
        _add(store, 7, 8)
        self.assertEqual(self.drawn(store), [5, 6, 7, 8])
        self.assertAllEqual(store.all()["images"][:, 0], [5, 6, 7, 8])

    def test_newest_batch_takes_the_place_of_the_oldest(self):
        store = _store()
        for first in (1, 3, 5, 7):
            _add(store, first, first + 1)
        self.assertEqual(self.drawn(store), [3, 4, 5, 6, 7, 8])
        self.assertCountEqual(store.all()["images"][:, 0], [3, 4, 5, 6, 7, 8])

    def test_rows_are_equally_likely(self):
        store = _store()
        _add(store, 0, 1)
        _add(store, 2, 3)
        images, _ = store.draw(4000, tf.constant([3, 4]))
        counts = np.bincount(images.numpy().ravel())
        self.assertAllClose(counts, [1000] * 4, atol=4 * np.sqrt(4000 * 3 / 16))


class CapacityTest(parameterized.TestCase):
    @parameterized.parameters(
        (128, (32, 32, 3), 32, 4096),
        (128, (32, 32, 3), 320, 4096, 10),
        (32, (224, 224, 3), 27, 891),  # a quarter of 512 MiB each
        (32, (224, 224, 3), 27, 891, 10),
        (128, (512, 512, 3), 2, 170),
        (128, (8192, 8192, 3), 2, 1),
    )
    def test_what_is_kept_fits_into_memory(self, size, shape, batches, others, times=1):
        self.assertEqual(pool.capacity(size, shape, times), (batches, others))


class AnswersTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.teacher = helpers.small_classifier(SHAPE)
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (16, *SHAPE)).astype(np.uint8)

    def answered(self, images=None, others=None, **settings):
        """One batch: what the students see, and the teacher's answers."""
        images = self.images if images is None else images
        config = dataclasses.replace(PLAIN, batch_size=len(images), **settings)
        bank = pool.Store(1, images=(images.shape, tf.uint8))
        bank.add(images=tf.constant(images))
        observed = observe(self.teacher)
        store = pool.answer_store(observed, len(images), 2)
        answers = pool.Answers(observed, bank, others or {}, config, store)
        self.told = answers.refresh(tf.constant([1, 2]))
        found = answers.store.all()
        return found["images"], found["logits"]

    @parameterized.parameters("none", "crop_flip")
    def test_answers_are_to_the_very_images_that_students_see(self, augmentation):
        images, logits = self.answered(student_augmentation=augmentation)
        self.assertAllClose(logits, self.teacher.scores(images), atol=1e-4)
        known = {image.tobytes() for image in self.images}
        kept = [image.tobytes() in known for image in images]
        self.assertEqual(all(kept), augmentation == "none")

    def test_end_of_an_answer_can_be_waited_for(self):
        """A GPU goes on when the call has returned, and its time is measured."""
        _, logits = self.answered()
        self.assertEqual([*self.told], ["mean_logit"])
        self.assertAllClose(self.told["mean_logit"], logits.mean())

    @parameterized.parameters(-40.0, 300.0)
    def test_so_they_are_where_no_pixel_has_the_mean(self, mean):
        description = self.teacher.description
        description = dataclasses.replace(description, input_mean=(mean,))
        self.teacher = dataclasses.replace(self.teacher, description=description)
        images, logits = self.answered(student_augmentation="crop")
        self.assertAllClose(logits, self.teacher.scores(images), atol=1e-4)

    def test_mixup_is_a_mean_of_two_images(self):
        images = np.zeros((64, *SHAPE), np.uint8)
        images[::2] = 200
        mixed, _ = self.answered(images, mixup_share=1.0)
        # Both of one kind in half of the cases; else evenly between the two.
        self.assertAllEqual(mixed, np.broadcast_to(mixed[:, :1, :1, :1], mixed.shape))
        between = (mixed[:, 0, 0, 0] > 0) & (mixed[:, 0, 0, 0] < 200)
        self.assertBetween(between.mean(), 0.25, 0.75)

    def test_cutmix_puts_a_box_of_one_image_into_another(self):
        images = np.zeros((64, *SHAPE), np.uint8)
        images[::2] = 200
        mixed, _ = self.answered(images, cutmix_share=1.0)
        with_box = 0
        for image in mixed:
            values = np.unique(image)
            self.assertContainsSubset(values, [0, 200])
            if len(values) == 2:
                with_box += 1
                self.assertTrue(_is_box(image == 0) or _is_box(image == 200))
        self.assertGreater(with_box, 10)

    def test_each_kind_has_about_its_share(self):
        size = 600
        images = np.full((size, *SHAPE), 1, np.uint8)
        others = {
            kind: np.full((7, *SHAPE), value, np.uint8)
            for kind, value in (("noise", 50), ("photographs", 120))
        }
        shares = dict(noise_share=0.3, photographs_share=0.1)
        found, _ = self.answered(images, others, **shares)
        counts = [np.mean(found[:, 0, 0, 0] == v) for v in (1, 50, 120)]
        error = 4 * 0.5 / np.sqrt(size)
        self.assertAllClose(counts, [0.6, 0.3, 0.1], atol=error)


def _is_box(inside):
    """Whether it is all pixels of some rows and columns, all channels alike."""
    plane = inside[..., 0]
    rows, columns = plane.any(1), plane.any(0)
    edges = [np.abs(np.diff(line.astype(int))).sum() for line in (rows, columns)]
    return (
        (inside == plane[..., None]).all()
        and (plane == rows[:, None] & columns).all()
        and max(edges) <= 2
    )


if __name__ == "__main__":
    tf.test.main()
