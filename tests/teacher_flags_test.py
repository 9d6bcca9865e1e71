"""What a user says of a teacher's file: labels, and paths that begin at home."""

import dataclasses
import os
from unittest import mock

from absl.testing import absltest, parameterized

from tools import teacher_flags
from dfq_tf.errors import ConfigError, DataError
from dfq_tf.tflite import TFLiteClassifier
from dfq_tf.with_data.datasets import Dataset
from tests.helpers import new_folder, small_classifier
from tests.tool_runner import run_in_process

# As of ImageNet's classes two are called crane.
TWICE = ("crane", *(f"bird {letter}" for letter in "abcdefghijklmnopqr"), "crane")


class DatasetTest(parameterized.TestCase):
    @parameterized.parameters(("0123", "wxyz"), ("abcd", "abcd"))
    def test_a_data_set_names_classes_that_nobody_has_named(self, own, expected):
        dataset = Dataset("pets", (8, 8, 3), tuple("wxyz"), self.fail)
        teacher = small_classifier()
        said = dataclasses.replace(teacher.description, class_names=tuple(own))
        teacher = dataclasses.replace(teacher, description=said)
        given = mock.Mock(dataset="pets", labels=None)
        with (
            mock.patch.object(teacher_flags, "FLAGS", given),
            mock.patch.object(
                teacher_flags.common, "dataset_from_flags", return_value=dataset
            ),
        ):
            found, _ = teacher_flags.with_dataset(teacher)
        self.assertEqual(found.description.class_names, tuple(expected))


class LabelsTest(parameterized.TestCase):
    def read(self, content):
        path = new_folder() / "labels.txt"
        path.write_bytes(content)
        return teacher_flags.read_labels(str(path))

    @parameterized.named_parameters(
        ("plain", b"cat\ndog\n", ("cat", "dog")),
        ("no_line_end", b"cat\ndog", ("cat", "dog")),
        ("of_windows", b"\xef\xbb\xbfcat\r\ndog\r\n\r\n", ("cat", "dog")),
        ("blank_at_the_end", b"cat\ndog\n\n \n\t\n", ("cat", "dog")),
        ("numbered", b"0 Cattle\n1 Sheep\n2 Goat \n", ("Cattle", "Sheep", "Goat")),
        ("numbered_colon", b"0:Cattle\n1: Sheep\n", ("Cattle", "Sheep")),
        ("numbered_comma", b"0,Cattle\n1,Sheep\n", ("Cattle", "Sheep")),
        ("times", b"0:30\n1:15\n2.5\n", ("0:30", "1:15", "2.5")),
        ("numbered_names", b"0 1 cat\n1 2 dogs\n", ("1 cat", "2 dogs")),
        (
            "counts",
            b"0 fingers\n1 finger\n2 fingers\n3 fingers\n",
            ("0 fingers", "1 finger", "2 fingers", "3 fingers"),
        ),
        ("lengths", b"0,5 mm\n1,5 mm\n", ("0,5 mm", "1,5 mm")),
        ("all_times", b"0:30\n1:15\n2:45\n", ("0:30", "1:15", "2:45")),
        ("one_begins_with_a_digit", b"0:20 km/h\n1:Stop\n", ("20 km/h", "Stop")),
        (
            "two_of_many_are_the_same",
            "".join(f"{i} {name}\n" for i, name in enumerate(TWICE)).encode(),
            TWICE,
        ),
        ("from_one", b"1 Cattle\n2 Sheep\n", ("1 Cattle", "2 Sheep")),
        ("not_all", b"0 Cattle\n1 Sheep\nGoat\n", ("0 Cattle", "1 Sheep", "Goat")),
        ("out_of_order", b"0 Cattle\n2 Sheep\n", ("0 Cattle", "2 Sheep")),
        ("numbers_alone", b"0\n1\n2\n", ("0", "1", "2")),
        ("digits_in_front", b"0th\n1st\n", ("0th", "1st")),
    )
    def test_names_are(self, content, expected):
        self.assertEqual(self.read(content), expected)

    @parameterized.parameters(b"", b"\n\n", b"cat\n\ndog\n", b"\ncat\n", b"0 a\n\n2 b")
    def test_empty_lines_are_refused(self, content):
        with self.assertRaisesRegex(ConfigError, "labels is .*empty"):
            self.read(content)

    def test_other_bytes_are_refused(self):
        with self.assertRaisesRegex(ConfigError, "labels is .*read as text"):
            self.read(b"\xff\xfe\x00\x9f")


class FitsTest(parameterized.TestCase):
    @parameterized.parameters(
        (("cat", "dog", "cow", "hen"), None),
        (("a", "b", "c", "d"), None),
        (("cat", "cow", "dog", "hen"), "class 1 is 'cow' of the model and 'dog' of"),
    )
    def test_classes_in_another_order_are_refused(self, names, message):
        """Accuracy would be that of a model which takes dogs for cows."""
        dataset = Dataset("pets", (8, 8, 3), ("cat", "dog", "cow", "hen"), self.fail)
        teacher = small_classifier()
        said = dataclasses.replace(teacher.description, class_names=names)
        file = mock.Mock(
            spec=TFLiteClassifier,
            num_classes=4,
            image_shape=(8, 8, 3),
            class_names=names,
        )
        for model in (dataclasses.replace(teacher, description=said), file):
            if message is None:
                teacher_flags.check_fits(model, dataset)
                continue
            with self.assertRaisesRegex(DataError, f"of dataset pets .* {message}"):
                teacher_flags.check_fits(model, dataset)


class HomeTest(parameterized.TestCase):
    @parameterized.parameters(
        ("inspect_model", "~/absent.keras"),
        ("inspect_model", "--teacher=~/absent.keras"),
        ("inspect_model", "--teacher=x.keras", "--labels=~/absent.txt"),
        ("evaluate", "--model=~/absent.keras", "--dataset=digits"),
        ("curves", "--curves=one:~/absent.csv"),
        ("report", "--workdirs=~/absent"),
    )
    def test_paths_may_begin_at_home(self, tool, *flags):
        home = str(new_folder())
        with mock.patch.dict(os.environ, HOME=home):
            result = run_in_process(tool, *flags)
        self.assertNotEqual(result.returncode, 0)
        self.assertRegex(result.stderr, f"^error: [^\n]*{home}/absent")


if __name__ == "__main__":
    absltest.main()
