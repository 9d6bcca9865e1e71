import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.distillation.bank import ImageBank


def _batch(first, count):
    """Images and answers that tell their number."""
    numbers = np.arange(first, first + count)
    images = np.broadcast_to(numbers[:, None, None, None], (count, 2, 3, 1))
    logits = numbers[:, None] * np.array([1.0, -1.0])
    return images.astype(np.uint8), logits.astype(np.float32)


class ImageBankTest(parameterized.TestCase, tf.test.TestCase):
    def _bank(self, capacity=6, seed=0):
        return ImageBank(capacity, (2, 3, 1), 2, seed)

    def _numbers(self, bank):
        """The numbers of the images that the bank gives, after many draws."""
        images, logits = bank.draw(500, 0)
        self.assertEqual(images.shape, (500, 2, 3, 1))
        self.assertEqual(images.dtype, np.uint8)
        self.assertEqual(logits.dtype, np.float32)
        for image, answer in zip(images, logits):
            # Each comes whole, and with its own answer.
            self.assertLen(np.unique(image), 1)
            self.assertAllEqual(answer, [image[0, 0, 0], -float(image[0, 0, 0])])
        return sorted(set(images[:, 0, 0, 0].tolist()))

    def test_gives_what_it_has_before_it_is_full(self):
        bank = self._bank()
        bank.add(*_batch(10, 4))
        self.assertLen(bank, 4)
        self.assertEqual(self._numbers(bank), [10, 11, 12, 13])

    @parameterized.parameters(1, 2, 4, 5)
    def test_the_last_images_take_the_place_of_the_oldest(self, size):
        bank = self._bank()
        for first in range(0, 20, size):
            bank.add(*_batch(first, size))
        last = 20 + (-20) % size
        self.assertLen(bank, 6)
        self.assertEqual(self._numbers(bank), list(range(last - 6, last)))

    def test_more_images_than_it_holds_leave_the_last(self):
        bank = self._bank(capacity=3)
        bank.add(*_batch(0, 8))
        self.assertEqual(self._numbers(bank), [5, 6, 7])

    def test_draws_each_image_as_often(self):
        bank = self._bank()
        bank.add(*_batch(0, 6))
        images, _ = bank.draw(60_000, 3)
        counts = np.bincount(images[:, 0, 0, 0])
        self.assertAllClose(counts, np.full(6, 10_000), atol=500)

    def test_seed_and_step_decide_the_draw(self):
        one, same, other = self._bank(), self._bank(), self._bank(seed=1)
        for bank in (one, same, other):
            bank.add(*_batch(0, 6))
        base = one.draw(20, 4)[0]
        one.draw(20, 5)
        self.assertAllEqual(base, same.draw(20, 4)[0])
        self.assertNotAllEqual(base, one.draw(20, 5)[0])
        self.assertNotAllEqual(base, other.draw(20, 4)[0])

    @parameterized.parameters(4, 9)
    def test_comes_back_from_a_checkpoint(self, count):
        bank, restored = self._bank(), self._bank()
        bank.add(*_batch(0, count))
        path = tf.train.Checkpoint(bank=bank).save(f"{self.get_temp_dir()}/bank")
        tf.train.Checkpoint(bank=restored).restore(path).assert_consumed()
        self.assertLen(restored, len(bank))
        self.assertAllEqual(restored.draw(50, 1)[0], bank.draw(50, 1)[0])
        self.assertAllEqual(restored.draw(50, 1)[1], bank.draw(50, 1)[1])
        # And goes on in the same place.
        for each in (bank, restored):
            each.add(*_batch(100, 2))
        self.assertAllEqual(restored.draw(50, 2)[0], bank.draw(50, 2)[0])


if __name__ == "__main__":
    tf.test.main()
