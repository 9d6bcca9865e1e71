import pathlib
import time
from unittest import mock

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl.testing import parameterized
from tensorflow_datasets import download

from dfq_tf.compat import tf
from dfq_tf.errors import DataError
from dfq_tf.with_data import datasets as data

# Where a checkout may have the TFDS files of CIFAR-10.
TFDS = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tfds"


class AccuracyTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ([0, 1, 2, 0], 1.0), ([0, 1, 2, 1], 0.75), ([1, 2, 0, 1], 0.0)
    )
    def test_accuracy_is_share_of_labels_with_largest_score(self, labels, expected):
        scores = [[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.1, 0.2, 0.3], [9.0, 0, 0]]
        found = data.accuracy(np.array(scores), np.array(labels))
        self.assertEqual(found, expected)


class DigitsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(("train", 1438), ("test", 359))
    def test_sizes_and_types(self, split, size):
        dataset = data.open_dataset("digits")
        images, labels = (lambda s: (s.images, s.labels))(dataset.load(split))
        self.assertEqual(images.shape, (size, *dataset.image_shape))
        self.assertEqual(images.dtype, np.uint8)
        self.assertEqual((images.min(), images.max()), (0, 255))
        self.assertEqual(labels.shape, (size,))
        self.assertEqual(labels.dtype, np.int32)
        self.assertAllEqual(np.unique(labels), np.arange(10))
        self.assertLen(dataset.class_names, 10)

    def test_splits_are_disjoint_and_complete(self):
        from sklearn import datasets

        dataset = data.open_dataset("digits")
        train, test = dataset.load("train"), dataset.load("test")
        merged = np.empty((1797, 8, 8), np.float64)
        labels = np.empty(1797, np.int64)
        is_test = np.arange(1797) % 5 == 4
        for split, chosen in ((train, ~is_test), (test, is_test)):
            merged[chosen] = split.images[..., 0]
            labels[chosen] = split.labels
        digits = datasets.load_digits()
        self.assertAllEqual(labels, digits.target)
        self.assertAllEqual(merged, np.round(digits.images * 255 / 16))


class OpenDatasetTest(tf.test.TestCase):
    def test_unknown_name_lists_the_choices(self):
        with self.assertRaisesRegex(
            DataError,
            r"dataset is 'imagenet'; it must be one of \['digits', 'cifar10'.*\]. "
            "Labelled images of your own are measured .*docs/own_model.md, in the "
            "project's folder",
        ):
            data.open_dataset("imagenet")

    def test_names_can_be_listed(self):
        self.assertContainsSubset(
            ["digits", "cifar10", "cifar100"], data.dataset_names()
        )

    def test_packages_that_are_not_installed_are_named(self):
        for name, module, package in (
            ("digits", "sklearn.datasets", "scikit-learn"),
            ("cifar10", "tensorflow_datasets", "tensorflow-datasets"),
        ):
            # As in a plain `pip install dfq_tf`.
            with mock.patch.dict("sys.modules", {module: None}):
                with self.assertRaisesRegex(
                    DataError,
                    rf"{package}, .* not installed: pip install '\.\[data\]' in the .*"
                    r"'dfq_tf\[data\]'",
                ):
                    data.open_dataset(name)

    def test_absent_folder(self):
        folder = self.get_temp_dir() + "/absent"
        with self.assertRaisesRegex(
            DataError, f"data_dir is '{folder}'; there is no such folder"
        ):
            data.open_dataset("cifar10", folder)

    def test_without_network_fails_within_seconds(self):
        folder = self.get_temp_dir()
        start = time.monotonic()
        with mock.patch.object(
            requests, "head", side_effect=requests.exceptions.ConnectionError("down")
        ):
            with self.assertRaisesRegex(
                DataError,
                f"cifar10 is not in data_dir {folder} and cannot be downloaded"
                r".*tfds build cifar10.*--data_dir",
            ):
                data.open_dataset("cifar10", folder)
        self.assertLess(time.monotonic() - start, 30)

    def test_failed_download_and_full_disk_are_told_apart(self):
        for error, message in (
            (
                download.DownloadError("404"),
                "cannot be downloaded: 404. Elsewhere, prepare it",
            ),
            (
                download.download_manager.NonMatchingChecksumError("other bytes"),
                "cannot be downloaded: other bytes. Elsewhere, .*tfds build cifar10",
            ),
            (
                requests.exceptions.ReadTimeout("Read timed out."),
                "cannot be downloaded: Read timed out.. Elsewhere, prepare it",
            ),
            (
                OSError(28, "No space left on device"),
                f"cannot be written to data_dir {self.get_temp_dir()}: .*No space left",
            ),
        ):
            with (
                mock.patch.object(requests, "head"),
                mock.patch.object(
                    tfds.core.DatasetBuilder, "download_and_prepare", side_effect=error
                ),
                self.assertRaisesRegex(DataError, f"cifar10 .*{message}.*--data_dir"),
            ):
                data.open_dataset("cifar10", self.get_temp_dir())

    def test_cifar10(self):
        if not (TFDS / "cifar10").is_dir():
            self.skipTest(f"CIFAR-10 is not in {TFDS}")
        dataset = data.open_dataset("cifar10", str(TFDS))
        test = dataset.load("test")
        self.assertEqual(dataset.image_shape, (32, 32, 3))
        self.assertEqual(dataset.class_names[0], "airplane")
        self.assertEqual(test.images.shape, (10000, 32, 32, 3))
        self.assertEqual(test.images.dtype, np.uint8)
        self.assertEqual(test.labels.dtype, np.int32)
        self.assertAllEqual(np.bincount(test.labels), np.full(10, 1000))


if __name__ == "__main__":
    tf.test.main()
