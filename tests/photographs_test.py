import re
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf import photographs
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError
from tests import helpers


def folder_of(*pictures):
    """A folder with these pictures, as PNG files."""
    folder = helpers.new_folder()
    for i, picture in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(tf.io.encode_png(picture).numpy())
    return folder


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def unchanged():
    """Crops are whole pictures, in their own colours, but turned and flipped."""
    return mock.patch.multiple(
        photographs,
        _LEAST_SHARE=1.0,
        _CONTRAST=0.0,
        _COLOUR=(1.0, 1.0),
        _TINT=0.0,
        _BRIGHTNESS=0.0,
    )


def turned(image):
    """The eight ways in which a square image can lie, as bytes."""
    flipped = [image[::i, ::j] for i in (1, -1) for j in (1, -1)]
    return [np.ascontiguousarray(np.swapaxes(f, 0, k)) for f in flipped for k in (0, 1)]


class CropsTest(tf.test.TestCase, parameterized.TestCase):
    def test_whole_pictures_lie_in_all_eight_ways(self):
        original = picture(6, 6)
        with unchanged():
            images = photographs.crops(0, 64, (6, 6, 3), folder_of(original))
        ways = {way.tobytes() for way in turned(original)}
        self.assertEqual({image.tobytes() for image in images}, ways)

    def test_smaller_images_are_means_of_pixels(self):
        original = picture(12, 12)
        means = original.astype(np.float32).reshape(6, 2, 6, 2, 3).mean((1, 3))
        with unchanged():
            (image,) = photographs.crops(0, 1, (6, 6, 3), folder_of(original))
        ways = [np.rint(way).astype(np.uint8) for way in turned(means)]
        self.assertIn(image.tobytes(), [way.tobytes() for way in ways])

    def test_crops_are_parts(self):
        original = np.zeros((20, 30, 3), np.uint8)
        original[..., 0] = np.arange(20)[:, None]
        original[..., 1] = np.arange(30)
        with unchanged(), mock.patch.object(photographs, "_LEAST_SHARE", 0.02):
            images = photographs.crops(0, 200, (4, 4, 3), folder_of(original))
        self.assertAllEqual(images[..., 2], np.zeros((200, 4, 4)))
        spans = np.ptp(images.reshape(200, 16, 3).astype(int), axis=1)
        # From a fiftieth of the picture's pixels to nearly all that a square has.
        self.assertLess(spans[:, 0].min(), 5)
        self.assertGreater(spans[:, 0].max(), 14)

    def test_draws_follow_the_seed(self):
        folder = folder_of(picture(20, 30), picture(30, 20, seed=1))
        shape = (8, 6, 3)
        images = photographs.crops(3, 12, shape, folder)
        self.assertEqual((images.shape, images.dtype), ((12, *shape), np.uint8))
        self.assertAllEqual(images, photographs.crops(3, 12, shape, folder))
        self.assertNotAllEqual(images, photographs.crops(4, 12, shape, folder))
        self.assertLen({image.tobytes() for image in images}, 12)

    def test_grey_images_are_means_of_colours_and_alpha_is_full(self):
        folder = folder_of(picture(20, 20))
        colours = photographs.crops(0, 5, (8, 8, 3), folder).astype(float)
        grey = photographs.crops(0, 5, (8, 8, 1), folder)
        inside = ((colours > 0) & (colours < 255)).all(-1)
        self.assertAllClose(
            grey[..., 0][inside], colours.mean(-1)[inside], atol=1.01, rtol=0
        )
        alpha = photographs.crops(0, 5, (8, 8, 4), folder)
        self.assertAllEqual(alpha[..., :3], colours)
        self.assertAllEqual(alpha[..., 3], np.full((5, 8, 8), 255))

    def test_pictures_smaller_than_the_images_are_enlarged(self):
        folder = folder_of(np.full((3, 2, 3), 77, np.uint8))
        with unchanged():
            images = photographs.crops(0, 2, (9, 9, 3), folder)
        self.assertAllEqual(images, np.full((2, 9, 9, 3), 77))

    def test_hidden_files_and_folders_are_no_pictures(self):
        folder = helpers.new_folder()
        (folder / "a.png").write_bytes(b"1")
        (folder / "._a.png").write_bytes(b"2")
        (folder / "b.png").mkdir()
        self.assertEqual(photographs.pictures_in(folder), [folder / "a.png"])

    def test_folder_without_any_has_those_of_the_folders_in_it(self):
        folder = helpers.new_folder()
        names = ("cat/a.png", "cat/.b.png", "cat/c.webp", ".d/e.png", "dog/f.jpg")
        for name in (*names, "g.TIF"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        both = [folder / "cat/a.png", folder / "dog/f.jpg"]
        self.assertEqual(photographs.pictures_in(folder), both)
        said = photographs.described(folder)
        self.assertEqual(said, "2 pictures (left out: 1 .tif, 1 .webp)")
        (folder / "own.bmp").touch()
        self.assertEqual(photographs.pictures_in(folder), [folder / "own.bmp"])
        said = photographs.described(folder)
        self.assertEqual(said, "1 picture (left out: 1 .tif)")

    def test_crops_of_classes_are_those_of_one_folder(self):
        two = [picture(20, 30), picture(30, 20, seed=1)]
        folder = helpers.new_folder()
        for name, each in zip("ab", two):
            folder_of(each).rename(folder / name)
        shape = (8, 6, 3)
        images = photographs.crops(3, 12, shape, folder)
        self.assertAllEqual(images, photographs.crops(3, 12, shape, folder_of(*two)))

    def test_folders_that_will_not_do_are_refused(self):
        folder = helpers.new_folder()
        with self.assertRaisesRegex(ConfigError, "has no picture; .*jpg"):
            photographs.crops(0, 1, (4, 4, 3), folder)
        (folder / "a.webp").touch()
        message = r"has no picture \(left out: 1 \.webp\); it, or the folders in it, m"
        with self.assertRaisesRegex(ConfigError, message):
            photographs.crops(0, 1, (4, 4, 3), folder)
        with self.assertRaisesRegex(ConfigError, "'~of_nobody/a' is not there"):
            photographs.crops(0, 1, (4, 4, 3), "~of_nobody/a")
        missing = folder / "missing"
        with self.assertRaisesRegex(ConfigError, f"{missing}' is not there"):
            photographs.crops(0, 1, (4, 4, 3), missing)
        (folder / "torn.JPG").write_bytes(b"\xff\xd8\xff torn")
        with self.assertRaisesRegex(ConfigError, "torn.JPG' cannot be read; take"):
            photographs.crops(0, 1, (4, 4, 3), folder)
        with self.assertRaisesRegex(ConfigError, "torn.JPG' cannot be read; take it"):
            photographs.check_pictures(folder)
        (folder / "torn.JPG").unlink()
        (folder / "notes.png").write_text("no picture")
        with self.assertRaisesRegex(ConfigError, "notes.png' cannot be read; take it"):
            photographs.check_pictures(folder)
        photographs.check_pictures(photographs.FOLDER)


class CheckTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(("JPG", tf.io.encode_jpeg), ("png", tf.io.encode_png))
    def test_picture_that_ends_too_soon_is_told_before_any_crop(self, suffix, encode):
        path = helpers.new_folder() / f"a.{suffix}"
        content = encode(picture(20, 30)).numpy()
        for _ in range(2):
            path.write_bytes(content)
            photographs.check_pictures(path.parent)
            path.write_bytes(content[: len(content) // 2])
            with self.assertRaisesRegex(ConfigError, f"a.{suffix}' cannot be read"):
                photographs.check_pictures(path.parent)

    def test_pictures_are_read_once_and_of_many_the_first(self):
        folder = folder_of(picture(4, 4), picture(4, 4, seed=1), picture(4, 4, seed=2))
        sizes = [path.stat().st_size for path in photographs.pictures_in(folder)]
        with (
            mock.patch.object(photographs, "_READ_FIRST", sum(sizes) - 1),
            mock.patch.object(photographs, "_read") as read,
        ):
            for _ in range(2):
                photographs.check_pictures(folder)
        names = [call.args[0].name for call in read.call_args_list]
        self.assertEqual(names, ["0.png", "1.png"])


class ShippedTest(tf.test.TestCase):
    def test_each_is_named_with_a_licence_that_gives_it_to_all(self):
        readme = (photographs.FOLDER / "README.md").read_text()
        rows = re.findall(r"\| (\S+\.jpg) \|.*\|.*(public domain|CC0).* \|\n", readme)
        names = [path.name for path in photographs.pictures_in(photographs.FOLDER)]
        self.assertEqual([name for name, _ in rows], names)
        self.assertLen(names, 5)
        self.assertLess(
            sum(p.stat().st_size for p in photographs.FOLDER.iterdir()), 3e5
        )


if __name__ == "__main__":
    tf.test.main()
