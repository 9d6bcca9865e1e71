import pathlib
import zipfile
from unittest import mock

import numpy as np
import pytest
import requests
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import DataError
from dfq_tf.with_data import datasets as data
from dfq_tf.with_data import tiny_imagenet

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/tiny-imagenet-200-subset.zip"
FOLDER = "tiny-imagenet-200"


def jpeg(color):
    """A picture of one color; of one channel if it is a number."""
    color = np.atleast_1d(color)
    pixels = np.broadcast_to(color, (64, 64, len(color))).astype(np.uint8)
    return tf.io.encode_jpeg(pixels, quality=100).numpy()


# Three training images, two of goldfish, of which one is grey, and two to test on.
MEMBERS = {
    f"{FOLDER}/wnids.txt": b"n02504458\nn01443537\n",
    f"{FOLDER}/train/n01443537/images/n01443537_0.JPEG": jpeg((255, 120, 0)),
    f"{FOLDER}/train/n01443537/images/n01443537_1.JPEG": jpeg(90),
    f"{FOLDER}/train/n01443537/n01443537_boxes.txt": b"n01443537_0.JPEG\t0\t0\t9\t9\n",
    f"{FOLDER}/train/n02504458/images/n02504458_7.JPEG": jpeg((200, 180, 160)),
    f"{FOLDER}/test/images/test_0.JPEG": jpeg((1, 2, 3)),
    f"{FOLDER}/val/images/val_0.JPEG": jpeg((200, 180, 160)),
    f"{FOLDER}/val/images/val_1.JPEG": jpeg((255, 120, 0)),
    f"{FOLDER}/val/val_annotations.txt": (
        b"val_0.JPEG\tn02504458\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t5\t6\t7\t8\n"
    ),
}


class TinyImagenetTest(parameterized.TestCase, tf.test.TestCase):
    def archive(self, members):
        path = pathlib.Path(self.get_temp_dir()) / "tiny-imagenet-200.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                # Without the time: the same members are the same archive.
                archive.writestr(zipfile.ZipInfo(name), content)
        return str(path)

    def open(self, members):
        folder = pathlib.Path(self.get_temp_dir()) / "tfds"
        folder.mkdir(exist_ok=True)
        return data.open_dataset("tiny_imagenet", str(folder), self.archive(members))

    def colors(self, split, dataset):
        """Class name and mean color of each image, in any order."""
        return sorted(
            (dataset.class_names[label], *np.rint(image.mean(axis=(0, 1))).astype(int))
            for image, label in zip(split.images, split.labels)
        )

    def test_images_have_their_labels(self):
        dataset = self.open(MEMBERS)
        self.assertEqual(dataset.image_shape, (64, 64, 3))
        self.assertLen(set(dataset.class_names), 200)
        for name, expected in (
            (
                "train",
                [("African elephant", 200, 180, 160)]
                + [("goldfish", 90, 90, 90), ("goldfish", 255, 120, 0)],
            ),
            ("test", [("African elephant", 200, 180, 160), ("goldfish", 255, 120, 0)]),
        ):
            split = dataset.load(name)
            self.assertEqual(split.images.dtype, np.uint8)
            self.assertEqual(split.labels.dtype, np.int32)
            found = self.colors(split, dataset)
            self.assertEqual([each[0] for each in found], [e[0] for e in expected])
            # JPEG is not exact.
            self.assertAllClose(
                [each[1:] for each in found], [e[1:] for e in expected], atol=3
            )

    def test_archive_is_read_once(self):
        self.open(MEMBERS)
        folder = pathlib.Path(self.get_temp_dir()) / "tfds"
        again = data.open_dataset("tiny_imagenet", str(folder))
        self.assertLen(again.load("train").images, 3)

    def test_home_and_checksum_are_known(self):
        # As several users of the archive have published them.
        info = tiny_imagenet.TinyImagenet.url_infos[tiny_imagenet.URL]
        self.assertEqual(info.size, 248_100_043)
        self.assertStartsWith(info.checksum, "6198c8ae015e2b3e007c7841da39ec06")

    @parameterized.parameters(
        (f"{FOLDER}/../evil.txt", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("other/file.txt", "outside the folder"),
        (f"{FOLDER}/..\\evil.txt", "outside the folder"),
    )
    def test_members_outside_its_folder_are_refused(self, name, message):
        with self.assertRaisesRegex(DataError, f"^archive is .*{message} {FOLDER}: "):
            self.open({**MEMBERS, name: b"x"})

    @parameterized.parameters(
        (f"{FOLDER}/wnids.txt",), (f"{FOLDER}/val/val_annotations.txt",)
    )
    def test_what_lacks_a_table_is_refused(self, name):
        members = {key: value for key, value in MEMBERS.items() if key != name}
        with self.assertRaisesRegex(DataError, f"which has no {name}; it must be"):
            self.open(members)

    def test_what_lacks_training_images_is_refused(self):
        members = {k: v for k, v in MEMBERS.items() if "/images/n" not in k}
        with self.assertRaisesRegex(DataError, r"which has no \S+/train/n"):
            self.open(members)

    @parameterized.parameters(
        {f"{FOLDER}/wnids.txt": b"n01443537\nn00000001\n"},
        {f"{FOLDER}/train/n00000001/images/n00000001_0.JPEG": b""},
    )
    def test_another_class_is_refused(self, **members):
        with self.assertRaisesRegex(DataError, "not one of the 200: n00000001; it"):
            self.open({**MEMBERS, **members})

    @parameterized.parameters(
        (
            b"val_9.JPEG\tn01443537\n",
            f"which has no {FOLDER}/val/images/val_9.JPEG; it",
        ),
        (b"val_0.JPEG\tn00000001\t0\n", "not one of the 200: n00000001; it"),
        (b"val_0.JPEG n01443537\n", "a line without image and class: 'val_0.JPEG n0"),
        (b"\xff", "which cannot be read: 'utf-8' codec"),
    )
    def test_table_of_test_images_must_fit(self, table, message):
        with self.assertRaisesRegex(DataError, f"^archive is .*{message}"):
            self.open({**MEMBERS, f"{FOLDER}/val/val_annotations.txt": table})

    def test_another_archive_in_the_same_folder_is_refused(self):
        self.open(MEMBERS)
        self.assertLen(self.open(MEMBERS).load("train").images, 3)
        fewer = {k: v for k, v in MEMBERS.items() if "n01443537_1" not in k}
        with self.assertRaisesRegex(
            DataError, "^archive is .*another one, in .*Delete that folder, leave out"
        ):
            self.open(fewer)
        folder = pathlib.Path(self.get_temp_dir()) / "tfds"
        found = data.open_dataset("tiny_imagenet", str(folder))
        self.assertLen(found.load("train").images, 3)
        # What was downloaded has no note, and its home's checksum stands for it.
        (note,) = folder.rglob("archive.sha256")
        note.unlink()
        with self.assertRaisesRegex(DataError, "^archive is .*another one, in "):
            self.open(MEMBERS)
        info = tiny_imagenet.TinyImagenet.url_infos[tiny_imagenet.URL]
        with mock.patch.object(tiny_imagenet, "digest", return_value=info.checksum):
            self.assertLen(self.open(MEMBERS).load("train").images, 3)

    def test_without_network_it_is_fetched_elsewhere(self):
        with mock.patch.object(
            requests, "head", side_effect=requests.exceptions.ConnectionError("down")
        ):
            with self.assertRaisesRegex(
                DataError,
                f"tiny_imagenet is not in .* no network.*fetch {tiny_imagenet.URL} and "
                "name the file with --archive here$",
            ):
                data.open_dataset("tiny_imagenet", self.get_temp_dir())

    def test_refused_archive_leaves_nothing(self):
        folder = pathlib.Path(self.get_temp_dir()) / "tfds"
        with self.assertRaises(DataError):
            self.open({"a": b"b"})
        self.assertEmpty(list(folder.iterdir()))

    @parameterized.parameters("absent.zip", __file__)
    def test_what_is_no_zip_file_is_refused(self, path):
        with self.assertRaisesRegex(DataError, "^archive is .*, which cannot be read"):
            data.open_dataset("tiny_imagenet", self.get_temp_dir(), path)

    def test_archive_of_another_data_set_is_refused(self):
        with self.assertRaisesRegex(
            DataError,
            "^archive is 'a.zip', but dataset is 'digits': only tiny_imagenet",
        ):
            data.open_dataset("digits", None, "a.zip")

    @pytest.mark.long
    def test_real_archive(self):
        if not REAL.exists():
            self.skipTest(f"there is no {REAL}")
        dataset = data.open_dataset("tiny_imagenet", self.get_temp_dir(), str(REAL))
        test = dataset.load("test")
        self.assertEqual(test.images.shape, (10_000, 64, 64, 3))
        self.assertAllEqual(np.bincount(test.labels), np.full(200, 50))
        self.assertAllEqual(np.bincount(dataset.load("train").labels), np.full(200, 50))


if __name__ == "__main__":
    tf.test.main()
