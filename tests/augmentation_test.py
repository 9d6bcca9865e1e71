import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.training.augmentation import augment, augment_pixels, flip
from tests import helpers


def _images(num_images=6, height=16, width=12, channels=2):
    rng = np.random.default_rng(0)
    # No zeros: these come from the padding alone.
    return rng.uniform(1, 2, (num_images, height, width, channels)).astype(np.float32)


def _windows(image, margins):
    """Every window of a zero-padded image, by its offset."""
    height, width, _ = image.shape
    (tall, wide) = margins
    padded = np.pad(image, [(tall, tall), (wide, wide), (0, 0)])
    return {
        (row, column): padded[row : row + height, column : column + width]
        for row in range(2 * tall + 1)
        for column in range(2 * wide + 1)
    }


def _offset(result, image, margins):
    """Where `result` was cut out of the padded image; None if nowhere."""
    for offset, window in _windows(image, margins).items():
        if np.array_equal(result, window):
            return offset
    return None


class AugmentTest(parameterized.TestCase, tf.test.TestCase):
    def _augmented(self, images, augmentation, step=0, seed=1):
        return augment(
            tf.constant(images), augmentation, (seed, tf.constant(step))
        ).numpy()

    def test_none_changes_nothing(self):
        self.assertAllEqual(self._augmented(_images(), "none"), _images())

    @parameterized.parameters(
        (16, 12, (2, 1)), (32, 32, (4, 4)), (8, 15, (1, 1)), (9, 64, (1, 8))
    )
    def test_crop_is_a_window_of_the_padded_image(self, height, width, margins):
        """Padded by an eighth of each side, whatever the other one is."""
        images = _images(20, height=height, width=width)
        offsets = [
            _offset(result, image, margins)
            for result, image in zip(self._augmented(images, "crop"), images)
        ]
        self.assertNotIn(None, offsets)
        # Both axes move, and not together.
        self.assertGreater(len({row for row, _ in offsets}), 1)
        self.assertGreater(len({column for _, column in offsets}), 1)
        self.assertGreater(len({row - column for row, column in offsets}), 1)

    @parameterized.parameters(1, 2, 7)
    def test_a_side_below_8_is_not_padded(self, side):
        """A pixel more would be half of it, or all."""
        for shape, margins in (((side, 9), (0, 1)), ((9, side), (1, 0))):
            images = _images(20, *shape)
            offsets = [
                _offset(result, image, margins)
                for result, image in zip(self._augmented(images, "crop"), images)
            ]
            self.assertNotIn(None, offsets)
            self.assertLen(set(offsets), 3)  # the longer side moves
        images = _images(40, side, 7)
        self.assertAllEqual(self._augmented(images, "crop"), images)
        flipped = self._augmented(images, "crop_flip")
        is_same = (flipped == images).all((1, 2, 3))
        self.assertAllEqual(flipped[~is_same], images[~is_same][:, :, ::-1])
        self.assertBetween(is_same.sum(), 8, 32)

    def test_crop_reaches_every_offset(self):
        images = _images(200, height=8, width=8, channels=1)
        offsets = {
            _offset(result, image, (1, 1))
            for result, image in zip(self._augmented(images, "crop"), images)
        }
        self.assertEqual(offsets, {(i, j) for i in range(3) for j in range(3)})

    def test_crop_flip_flips_about_half_of_the_windows(self):
        images = _images(60)
        flipped = 0
        for result, image in zip(self._augmented(images, "crop_flip"), images):
            is_flipped = _offset(result, image, (2, 1)) is None
            if is_flipped:
                self.assertIsNotNone(_offset(result[:, ::-1], image, (2, 1)))
            flipped += is_flipped
        self.assertBetween(flipped, 18, 42)

    def test_flip_mirrors_about_half_of_the_images(self):
        images = np.arange(60 * 2 * 3 * 1).reshape(60, 2, 3, 1).astype(np.uint8)
        found = [flip(tf.constant(images), (1, step)).numpy() for step in (0, 1, 0)]
        for flipped in found:
            is_same = (flipped == images).all((1, 2, 3))
            is_mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
            self.assertAllEqual(is_same, ~is_mirrored)
            self.assertBetween(is_mirrored.sum(), 18, 42)
        self.assertAllEqual(found[0], found[2])
        self.assertNotAllEqual(found[0], found[1])

    def test_depends_on_seed_and_step_alone(self):
        base = self._augmented(_images(), "crop_flip")
        tf.random.set_seed(5)
        self.assertAllEqual(base, self._augmented(_images(), "crop_flip"))
        self.assertNotAllEqual(base, self._augmented(_images(), "crop_flip", step=1))
        self.assertNotAllEqual(base, self._augmented(_images(), "crop_flip", seed=2))


class AugmentPixelsTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(3)
        self.images = rng.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)

    def _augmented(self, kind, mean):
        return augment_pixels(
            tf.constant(self.images), mean, kind, (1, tf.constant(5))
        ).numpy()

    @parameterized.parameters(
        ((120.0,),), ((0.0,),), ((125.3,),), ((123.7, 116.3, 103.5),)
    )
    def test_crop_pads_with_the_mean_pixel(self, mean):
        results = self._augmented("crop", mean)
        self.assertEqual(results.dtype, np.float32)
        offsets = [
            helpers.offset_in_padded(result, image, mean)
            for result, image in zip(results, self.images)
        ]
        self.assertNotIn(None, offsets)
        self.assertLen(set(offsets), 9)

    @parameterized.parameters(
        ((-40.0,), 0.0), ((300.0,), 255.0), ((-1.0, 120.0, 256.0), (0.0, 120.0, 255.0))
    )
    def test_a_mean_that_no_pixel_has_pads_with_the_nearest(self, mean, padding):
        offsets = [
            helpers.offset_in_padded(result, image, padding)
            for result, image in zip(self._augmented("crop", mean), self.images)
        ]
        self.assertNotIn(None, offsets)
        self.assertLen(set(offsets), 9)

    def test_none_leaves_the_pixels(self):
        self.assertAllClose(self._augmented("none", (120.0,)), self.images)

    def test_crop_flip_flips_half_of_them(self):
        flipped = 0
        for result, image in zip(self._augmented("crop_flip", (120.0,)), self.images):
            if helpers.offset_in_padded(result, image, 120.0) is None:
                flipped += 1
                mirrored = helpers.offset_in_padded(result[:, ::-1], image, 120.0)
                self.assertIsNotNone(mirrored)
        self.assertBetween(flipped, 18, 42)


if __name__ == "__main__":
    tf.test.main()
