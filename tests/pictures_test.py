import pathlib

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.reports import pictures


class WritePreviewTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ((8, 8, 1), 3), ((64, 5, 3), 3), ((65, 9, 4), 2), ((9, 100, 1), 1)
    )
    def test_small_images_are_enlarged_and_large_ones_are_not(self, shape, times):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (3, *shape), np.uint8)
        pictures.write_preview(images, self.get_temp_dir(), "made")
        path = pathlib.Path(self.get_temp_dir()) / "made.png"
        picture = tf.io.decode_png(path.read_bytes(), channels=shape[2]).numpy()
        height, width = shape[:2]
        for i, image in enumerate(images):
            left = times * i * (width + 1)
            part = picture[: times * height, left : left + times * width]
            enlarged = np.repeat(np.repeat(image, times, axis=0), times, axis=1)
            self.assertAllEqual(part, enlarged)


if __name__ == "__main__":
    tf.test.main()
