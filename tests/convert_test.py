"""tools/convert.py where its student, or its folder, is not as it should be."""

from unittest import mock

import numpy as np

from tools import common, quantize
from dfq_tf.compat import tf
from dfq_tf.files import read_text
from dfq_tf.graph.description import ModelDescription
from dfq_tf.quantization import student
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import FileConfig
from dfq_tf.tflite import metadata
from dfq_tf.tflite.running import TFLiteClassifier
from tests import networks
from tests.helpers import new_folder, small_learner
from tests.tool_runner import run_in_process


class ReconstructionLineTest(tf.test.TestCase):
    def test_images_are_counted_among_those_that_blocks_learn_from(self):
        for count, told in (
            (20, "on 20 of 32 images, for memory, those that judge among them;"),
            (32, "on 32 images, those that judge among them;"),
        ):
            result = mock.Mock()
            result.measurements = dict(
                reconstruction_steps=5, reconstruction_images=count
            )
            # As many are made for it besides.
            result.prepared.images, result.prepared.lessons = range(16), range(32)
            self.assertIn(told, quantize.reconstruction_line(result))


class CommandTest(tf.test.TestCase):
    def test_file_is_made_as_its_size_was_asked_for(self):
        command = quantize.converting("runs/a b.keras", FileConfig())
        called = common.command_of("convert")
        self.assertEqual(command, f"{called} 'runs/a b.keras'")
        file = FileConfig(target_size="0.5x", favor="size", kernel_costs="my costs")
        command = quantize.converting("a.keras", file)
        self.assertEndsWith(command, " a.keras --favor=size '--kernel_costs=my costs'")


class ConvertTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = new_folder()
        cls.path = cls.folder / "df_q.keras"
        teacher = networks.build("padded_pooling")
        images = networks.images(teacher.image_shape, 16)
        student.save(post_training(float_network(teacher), images), cls.path)

    def convert(self, *flags):
        return run_in_process("convert", f"--student={self.path}", *flags)

    def refused(self, message, *flags):
        before = sorted(self.folder.iterdir())
        process = self.convert(*flags)
        self.assertRegex(process.stderr, rf"\Aerror: [^\n]*{message}[^\n]*\n\Z")
        self.assertEqual(sorted(self.folder.iterdir()), before)
        return process.returncode

    def test_folder_that_cannot_be_written_needs_another_file(self):
        # No permission holds root back.
        with mock.patch("os.access", return_value=False):
            for flags in ((), ("--workdir=/tmp/other",)):
                message = "df_q.tflite', but .* cannot be written; .* with --tflite"
                self.assertEqual(self.refused(message, *flags), 2)
        in_the_way = self.path / "a.tflite"
        message = "df_q.keras cannot be written; name a file in another folder with"
        self.assertEqual(self.refused(message, f"--tflite={in_the_way}"), 2)

    def test_what_is_no_name_of_such_a_file_is_refused(self):
        message = "tflite is '.*', a folder; name a file with --tflite, such as '.*/mo"
        self.assertEqual(self.refused(message, f"--tflite={self.folder}"), 2)
        for name in ("a", "a b.keras", "a.tflite.bak"):
            path = self.folder / name
            message = f"tflite is '{path}'; its name must end in .tflite, .* --tflite="
            self.assertEqual(self.refused(message, f"--tflite={path}"), 2)
        message = "--tflite='.*/a b.keras.tflite'"
        self.assertEqual(self.refused(message, f"--tflite={self.folder}/a b.keras"), 2)

    def test_float_model_is_no_student(self):
        teacher = new_folder() / "teacher.keras"
        small_learner().model.save(teacher)
        process = run_in_process("convert", str(teacher))
        self.assertEqual(process.returncode, 1)
        message = "error: the student is a float model without fake quantization; make"
        self.assertStartsWith(process.stderr, message)

    def test_student_without_its_description_says_whence_to_get_it(self):
        description = self.path.with_suffix(".json")
        content = description.read_bytes()
        description.unlink()
        try:
            code = self.refused(
                "no description .*df_q.json, which was written together"
            )
        finally:
            description.write_bytes(content)
        self.assertEqual(code, 1)

    def test_flags_say_what_the_file_takes_gives_and_is(self):
        tflite = new_folder() / "a.tflite"
        flags = ("--input_type=int8", "--output_type=float32", "--model_version=1.2")
        process = self.convert(f"--tflite={tflite}", *flags)
        self.assertEqual(process.returncode, 0, process.stderr)
        content = tflite.read_bytes()
        said = metadata.read(content)
        self.assertEqual((said.name, said.version), ("a", "1.2"))
        self.assertEqual(said.output_name, "probabilities")
        self.assertEqual((said.mean, said.output_range), ((128.0,), (0.0, 1.0)))
        scores = TFLiteClassifier(content).scores(networks.images((8, 8, 1), 3))
        self.assertAllClose(scores.sum(-1), np.ones(3), atol=0.02)

    def test_wrong_words_for_the_file_are_refused(self):
        for flag, message in (
            (
                "--file_output=softmax",
                r"file_output is 'softmax'; it must be one of \[",
            ),
            ("--output_type=int16", r"output_type is 'int16'; it must be one of \['au"),
            (
                "--model_license=a\nb",
                r"model_license is 'a\\nb', more than one line; g",
            ),
            (
                "--model_author=\udcff",
                r"model_author is '\\udcff', which is no valid UTF",
            ),
        ):
            self.assertEqual(self.refused(message, flag), 2)

    def test_what_the_target_does_not_take_is_refused(self):
        for target, name, value in (
            ("ethos_u", "input_type", "float32"),
            ("edge_tpu", "output_type", "float32"),
            ("micro", "favor", "size"),
            ("micro", "kernel_costs", "dfq_tf/tflite/kernel_costs.json"),
        ):
            message = f"{name} is '{value}', and the target is {target}: "
            flags = f"--target={target}", f"--{name}={value}"
            self.assertEqual(self.refused(message, *flags), 2)

    def test_labels_of_another_file_are_kept(self):
        folder = new_folder()
        (folder / "labels.txt").write_text("Cattle\nSheep\n")
        message = "labels.txt, which is to name the classes .* there and names others"
        self.assertEqual(self.refused(message, f"--tflite={folder}/a.tflite"), 2)
        self.assertEqual((folder / "labels.txt").read_text(), "Cattle\nSheep\n")
        self.assertLen(list(folder.iterdir()), 1)

    def test_labels_of_the_same_classes_are_kept(self):
        names = ModelDescription.load(self.path.with_suffix(".json")).class_names
        for text in (
            "\n".join(names),
            "\r\n".join(names),
            "".join(f"{i} {name}\n" for i, name in enumerate(names)),
        ):
            labels = new_folder() / "labels.txt"
            labels.write_bytes(text.encode())
            process = self.convert(f"--tflite={labels.with_name('a.tflite')}")
            self.assertEqual(process.returncode, 0, process.stderr)
            self.assertEqual(labels.read_bytes().decode(), text)

    def test_file_may_be_elsewhere_and_labels_are_utf_8(self):
        json = self.path.with_suffix(".json")
        description = ModelDescription.load(json)
        names = ("žába", *description.class_names[1:])
        fed = (description.input_mean, description.input_scale)
        ModelDescription(*fed, "logits", names, "softmax").save(json)
        tflite = new_folder() / "new" / "a.tflite"
        process = self.convert(f"--tflite={tflite}")
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(
            TFLiteClassifier(tflite.read_bytes()).num_classes, networks.NUM_CLASSES
        )
        labels = read_text(tflite.with_name("labels.txt")).splitlines()
        self.assertEqual(tuple(labels), names)


if __name__ == "__main__":
    tf.test.main()
