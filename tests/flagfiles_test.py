"""Flagfiles of the paper: their networks are built, and take a step of each kind."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import types
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver, parameterized

from tools import common, distill, quantize
from tools import run as run_tool
from dfq_tf import api, models
from dfq_tf.compat import keras, tf
from dfq_tf.distillation import budget, generator, pool
from dfq_tf.errors import ConfigError, WorkdirError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import AUTO, BitWidths, CalibrationConfig, qat_recipe, recipe
from dfq_tf.training.learner import Learner
from dfq_tf.with_data import datasets
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tools/flagfiles"
FLAGFILES = sorted(FOLDER.glob("*_to_*.cfg"))
# Those of digits, but for the one whose figures mean nothing.
OF_DIGITS = [
    path
    for path in sorted(FOLDER.glob("*.cfg"))
    if re.search(r"(?m)^--dataset=(digits|mnist|svhn)", path.read_text())
    and path.stem != "smoke"
]
# Images and classes of the data sets, so that none need be there.
DATASETS = {
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "tiny_imagenet": ((64, 64, 3), 200),
}


# One step of each kind, on two images.
FAST = dict(batch_size=2, generator_steps=1, student_steps=1)


class FlagfilesTest(parameterized.TestCase, tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        if "student" not in flags.FLAGS:
            run_tool.define_flags()

    def setUp(self):
        super().setUp()
        # Two steps are not worth compiling.
        tf.config.run_functions_eagerly(True)
        self.addCleanup(tf.config.run_functions_eagerly, False)

    @parameterized.parameters(
        ("auto", 0.97, "df_rec"),
        ("auto", 0.98, None),
        ("auto", None, None),
        ("df_q", 0.5, None),
    )
    @flagsaver.flagsaver
    def test_auto_goes_on_where_little_agreement_is_expected(
        self, methods, share, expected
    ):
        flags.FLAGS(["run", f"--methods={methods}"])
        workdir = Workdir(helpers.new_folder(), {})
        told = {} if share is None else {"expected_agreement": share}
        workdir.add_metrics(df_q_training=told)
        network = types.SimpleNamespace(bits={"a": 8}, kernel_bits={"a": 8})
        teacher = helpers.small_classifier()
        found = run_tool.further_method(teacher, network, workdir)
        self.assertEqual(found, expected)

    @parameterized.parameters("bfloat16", "float32")
    @flagsaver.flagsaver
    def test_flags_say_how_a_run_runs(self, precision):
        flags.FLAGS(["run", "--seed=7", f"--precision={precision}", "--noprogress"])
        found = common.context(quantize.qat_config(), None)
        self.assertEqual(
            (found.seed, found.precision, found.progress), (7, precision, False)
        )

    @flagsaver.flagsaver
    def test_yardstick_has_its_ranges_from_training_images(self):
        flags.FLAGS(["run", "--dataset=digits", "--widths=W4A8"])
        train = types.SimpleNamespace(images="those that train")
        dataset = types.SimpleNamespace(load={"train": train}.get)
        with (
            mock.patch.object(run_tool.yardsticks, "calibrated_with_data") as made,
            mock.patch.object(run_tool.proof, "convert", return_value=b"a") as convert,
        ):
            self.assertEqual(run_tool.real_data_file("source", dataset), b"a")
        self.assertEqual(made.call_args.args[:2], ("source", "those that train"))
        widths = BitWidths(num_bits_weight=4)
        made.return_value.quantized.assert_called_once_with(widths)
        self.assertEqual(convert.call_args.kwargs["config"], run_tool.file_config())

    def _teacher(self, path):
        """The network that a flagfile names, with random weights; flags are set."""
        flags.FLAGS(["run", f"--flagfile={path}"])
        self.assertIn(flags.FLAGS.dataset, datasets.dataset_names())
        self.assertEqual(flags.FLAGS.workdir, f"runs/{path.stem}")
        shape, classes = DATASETS[flags.FLAGS.dataset]
        keras.utils.set_random_seed(0)
        learner = Learner(
            models.build_model(flags.FLAGS.teacher, shape, classes),
            ModelDescription(
                (120,), (1 / 64,), "logits", tuple(map(str, range(classes)))
            ),
        )
        return as_classifier(learner)

    @parameterized.named_parameters((path.stem, path) for path in FLAGFILES)
    @flagsaver.flagsaver
    def test_flags_of_the_papers_loop_give_it(self, path):
        self.assertIn("Their loop: docs/distillation.md.", path.read_text())
        page = (ROOT / "docs/distillation.md").read_text()
        (line,) = re.findall(r"(?m)^    (--recipe=paper .*)$", page)
        flags.FLAGS(["run", f"--flagfile={path}", *line.split()])
        warm_up = {"warm_up_steps": 300, "warm_up_batch_size": 128}
        expected = recipe("paper", batch_size=256, **warm_up)
        self.assertEqual(distill.distillation_config(), expected)

    @parameterized.named_parameters((path.stem, path) for path in OF_DIGITS)
    @flagsaver.flagsaver
    def test_digits_are_not_mirrored(self, path):
        flags.FLAGS(["run", f"--flagfile={path}"])
        self.assertEqual(flags.FLAGS.augmentation, "crop")
        self.assertEqual(quantize.qat_config().student_augmentation, "crop")
        if flags.FLAGS.student:
            config = distill.distillation_config()
            self.assertEqual(config.student_augmentation, "crop")

    @flagsaver.flagsaver
    @pytest.mark.long
    def test_networks_of_a_pair_are_built_and_trained(self):
        self.check_pair(FOLDER / "svhn_wrn40_2_to_wrn16_1.cfg")

    @parameterized.named_parameters((path.stem, path) for path in FLAGFILES)
    @flagsaver.flagsaver
    @pytest.mark.long
    def test_networks_are_built_and_trained(self, path):
        self.check_pair(path)

    def check_pair(self, path):
        teacher = self._teacher(path)
        student = flags.FLAGS.student
        run_tool.check_student()
        config = dataclasses.replace(
            distill.distillation_config(), steps=1, bank_images=4, **FAST
        )
        new = distill.new_learner(teacher)
        self.assertEqual(
            new.model.count_params(),
            models.build_model(
                student, teacher.image_shape, teacher.num_classes
            ).count_params(),
        )
        with (
            mock.patch.multiple(pool, _OTHERS=4, _ANSWERED=2),
            mock.patch.object(budget, "_HELD_OUT_IMAGES", 4),
        ):
            result = api.distill(
                teacher, new, config=config, precision="float32", show_progress=False
            )
        self.assertFalse(
            helpers.all_equal(
                result.student.model.trainable_variables,
                new.model.trainable_variables,
            )
        )
        self.assertContainsSubset(
            {"synthesis_loss", "distillation_loss"}, result.measurements
        )
        self.assertGreater(quantize.qat_config().rounds, 0)

    @flagsaver.flagsaver
    def test_folder_called_as_a_network_does_not_hide_it(self):
        flags.FLAGS(["run", "--teacher=wrn_10_1", "--dataset=digits"])
        folder, before = helpers.new_folder(), os.getcwd()
        (folder / "wrn_10_1").mkdir()
        os.chdir(folder)
        self.addCleanup(os.chdir, before)
        self.assertIsNone(run_tool.read_or_check_teacher())  # to be trained

    def test_memory_of_an_earlier_call_is_kept_where_it_was_more(self):
        workdir = Workdir(helpers.new_folder(), {})
        run_tool.add_peak(workdir)
        now = workdir.metrics()["peak_memory_mib"]
        self.assertGreater(now, 0)
        for before, kept in ((10 * now, 10 * now), (1, now)):
            workdir.add_metrics(peak_memory_mib=before)
            run_tool.add_peak(workdir)
            self.assertGreaterEqual(workdir.metrics()["peak_memory_mib"], kept)

    @parameterized.parameters(("bank", 1000), ("paper", 80000))
    @flagsaver.flagsaver
    def test_length_that_a_recipe_has_not_is_told_and_not_written(self, name, rounds):
        flags.FLAGS(["run", f"--workdir={self.get_temp_dir()}", "--student=wrn_10_1"])
        flags.FLAGS(["run", f"--recipe={name}", "--minutes=10", "--steps=0"])
        with self.assertWarnsRegex(
            UserWarning,
            f"^minutes is 10, of which the recipe {name} .*--rounds={rounds}, .*max_mi",
        ) as warned:
            distill.check_flags()
        self.assertLen(warned.warnings, 1)
        resolved = distill.resolved_flags()
        text = (common.open_workdir(resolved=resolved).path / "flags.cfg").read_text()
        self.assertIn(f"--rounds={rounds}\n", text)
        self.assertNotIn("--minutes=", text)
        self.assertNotIn("--steps=", text)

    @parameterized.parameters(([], AUTO, "auto"), (["--batch_size=64"], 64, "64"))
    @flagsaver.flagsaver
    def test_batch_size_is_read_back_from_the_flags_of_a_run(self, given, size, text):
        folder = self.get_temp_dir()
        flags.FLAGS(["run", f"--workdir={folder}", *given])
        path = common.open_workdir().path / "flags.cfg"
        self.assertIn(f"--batch_size={text}\n", path.read_text())
        before = path.read_bytes()
        flags.FLAGS(["run", "--batch_size=7"])
        flags.FLAGS(["run", f"--flagfile={path}"])
        for config in (quantize.qat_config(), distill.distillation_config()):
            self.assertEqual(config.batch_size, size)
        common.open_workdir()  # other flags would be refused
        self.assertEqual(path.read_bytes(), before)

    @flagsaver.flagsaver
    def test_digests_are_of_what_flags_name_and_not_of_what_is_called_alike(self):
        folder, before = helpers.new_folder(), os.getcwd()
        for name in ("raw", "generated", "digits", "wrn_10_1", "wrn_16_1", "mine"):
            (folder / name).mkdir()
            (folder / name / "a.png").write_bytes(b"1")
        (folder / "labels.txt").write_text("cat\n")
        (folder / "softmax").write_text("no class")
        os.chdir(folder)
        self.addCleanup(os.chdir, before)
        networks = ["--teacher=wrn_10_1", "--student=wrn_16_1", "--labels=labels.txt"]
        others = ["--dataset=digits", "--feeding=raw", "--output=softmax"]
        labels = {"labels": hashlib.sha256(b"cat\n").hexdigest()}
        both = {"images": hashlib.sha256(b"1").hexdigest(), **labels}
        for images, expected in (("generated", labels), ("mine", both)):
            flags.FLAGS(["run", *networks, *others])
            flags.FLAGS(["run", f"--images={images}", f"--workdir=run_{images}"])
            said = io.StringIO()
            listed = mock.Mock(side_effect=common.photographs.files_in)
            with (
                mock.patch.object(common, "LONG_READING", 0.0),
                mock.patch.object(common.photographs, "files_in", listed),
                contextlib.redirect_stderr(said),
            ):
                path = common.open_workdir().path / "run.json"
            # A folder may hold many pictures, on a slow disk.
            self.assertEqual(listed.call_count, images == "mine")
            self.assertEqual(json.loads(path.read_text())["digests"], expected)
            is_said = "digest of mine: done in" in said.getvalue()
            self.assertEqual(is_said, images == "mine")

    @flagsaver.flagsaver
    def test_where_the_data_lies_is_written_and_may_be_elsewhere_later(self):
        folder, places = helpers.new_folder(), (helpers.new_folder(), "elsewhere")
        for place in places:
            given = [f"--data_dir={place}", f"--archive={place}/a.zip"]
            flags.FLAGS(["run", f"--workdir={folder}", *given])
            text = (common.open_workdir().path / "flags.cfg").read_text()
            self.assertContainsSubset(given, text.splitlines())
            self.assertNotIn("--workdir=", text)
            self.assertNotIn("--progress=", text)

    @flagsaver.flagsaver
    def test_folder_that_tensorflow_takes_for_a_pattern_is_refused(self):
        folder = helpers.new_folder()
        flags.FLAGS(["run", f"--workdir={folder}/[1]"])
        with self.assertRaisesRegex(
            ConfigError, r"^workdir is '.*/\[1\]', with \[ in it, .*Name a folder with"
        ):
            common.open_workdir()
        self.assertEmpty([*folder.iterdir()])

    @parameterized.parameters(
        ([], qat_recipe("pool")),
        (["--qat_recipe=paper"], qat_recipe("paper")),
        (
            ["--qat_recipe=paper", "--qat_rounds=7", "--warm_up_steps=5"],
            qat_recipe("paper", rounds=7, warm_up_steps=5),
        ),
        (["--qat_max_minutes=3"], qat_recipe("pool", max_minutes=3.0)),
        (
            ["--qat_student_augmentation=crop"],
            qat_recipe("pool", student_augmentation="crop"),
        ),
    )
    @flagsaver.flagsaver
    def test_recipe_of_the_quantized_student(self, given, expected):
        folder = self.get_temp_dir()
        flags.FLAGS(["run", f"--workdir={folder}", *given])
        self.assertEqual(quantize.qat_config(), expected)
        resolved = quantize.resolved_flags()
        path = common.open_workdir(resolved=resolved).path / "flags.cfg"
        flags.FLAGS(["run", "--qat_recipe=pool", "--qat_rounds=9"])
        flags.FLAGS(["run", f"--flagfile={path}"])
        self.assertEqual(quantize.qat_config(), expected)

    @flagsaver.flagsaver
    def test_unknown_recipe_of_the_quantized_student_is_refused(self):
        flags.FLAGS(["run", "--qat_recipe=bank"])
        with self.assertRaisesRegex(
            ConfigError,
            r"^qat_recipe is 'bank'; it must be one of \['pool', 'paper'\]$",
        ):
            quantize.qat_config()

    @flagsaver.flagsaver
    def test_folder_of_a_version_without_a_flag_is_taken(self):
        flags.FLAGS(["run", f"--workdir={self.get_temp_dir()}", "--alpha=0.5"])
        path = common.open_workdir().path / "flags.cfg"
        text = path.read_text()
        path.write_text(text.replace("--teacher_initial_scale=1.0\n", ""))
        common.open_workdir()
        self.assertEqual(path.read_text(), text)
        path.write_text(text.replace("--alpha=0.5\n", ""))  # 0.5 is not its default
        with self.assertRaisesRegex(WorkdirError, r"--alpha: .* -> 0\.5$"):
            common.open_workdir()

    @flagsaver.flagsaver
    def test_folder_of_a_version_without_a_flag_has_the_recipes_value(self):
        folder, given = self.get_temp_dir(), "--qat_student_augmentation=crop"
        flags.FLAGS(["run", f"--workdir={folder}"])
        resolved = quantize.resolved_flags()
        path = common.open_workdir(resolved=resolved).path / "flags.cfg"
        text = path.read_text()
        self.assertIn("--qat_student_augmentation=crop_flip\n", text)
        path.write_text(text.replace("--qat_student_augmentation=crop_flip\n", ""))
        common.open_workdir(resolved=resolved)
        self.assertEqual(path.read_text(), text)
        flags.FLAGS(["run", f"--workdir={folder}", given])
        with self.assertRaisesRegex(WorkdirError, r"augmentation: crop_flip -> crop$"):
            common.open_workdir(resolved=quantize.resolved_flags())

    @parameterized.parameters(
        ((32, 32, 3), "df_qat_kd", None),
        ((224, 224, 3), "df_qat_kd", r"; the pool of images takes about 1,\d{3} MiB$"),
        ((224, 224, 3), "df_q", None),
    )
    @flagsaver.flagsaver
    def test_plan_tells_of_a_large_pool(self, shape, method, expected):
        flags.FLAGS(["run", "--images=photographs"])
        config = dataclasses.replace(quantize.qat_config(), batch_size=64)
        teacher = helpers.small_classifier((8, 8, 3))
        with mock.patch.object(type(teacher), "image_shape", shape):
            said = quantize.plan(teacher, None, method, config)
        if expected is None:
            self.assertNotIn("pool", said)
        else:
            self.assertRegex(said, expected)

    @parameterized.parameters(
        ("df_q", ["--images=generated"], 32),
        ("df_qat_kd", ["--images=photographs"], 32),
        ("df_qat_kd", ["--qat_recipe=paper", "--images=photographs"], 64),
    )
    @flagsaver.flagsaver
    def test_plan_tells_of_a_step_that_is_taken(self, method, given, images):
        flags.FLAGS(["run", "--batch_size=64", *given])
        teacher = helpers.small_classifier((8, 8, 3))
        said = quantize.plan(teacher, None, method, quantize.qat_config())
        self.assertRegex(said, rf"; a step of {images} images takes about \d+ MiB, ")

    @parameterized.parameters("df_q", "df_rec", "df_rec_kd")
    @flagsaver.flagsaver
    def test_plan_tells_how_much_is_kept_between_blocks(self, method):
        flags.FLAGS(["run", "--batch_size=64", "--images=photographs"])
        teacher = helpers.small_classifier((8, 8, 3))
        said = quantize.plan(teacher, None, method, quantize.qat_config())
        is_said = "; what enters and leaves blocks takes up to 3 GiB more" in said
        self.assertEqual(is_said, method != "df_q", said)

    @flagsaver.flagsaver
    def test_plan_tells_how_many_pictures_there_are(self):
        folder = helpers.new_folder()
        for name in ("a.png", "b.jpg", "c.webp"):
            (folder / name).touch()
        flags.FLAGS(["run", f"--images={folder}"])
        teacher = helpers.small_classifier((8, 8, 3))
        said = quantize.plan(teacher, None, "df_q", quantize.qat_config())
        self.assertIn("calibration on crops of 2 pictures (left out: 1 .webp);", said)
        self.assertIn(f"; on {common.device()}; the program takes", said)

    @flagsaver.flagsaver
    def test_mobilenet_is_to_be_quantized_itself(self):
        path = FOLDER / "tiny_imagenet_mobilenet_v1.cfg"
        flags.FLAGS(["run", f"--flagfile={path}"])
        self.assertIsNone(flags.FLAGS.student)
        self.assertEqual(quantize.widths_from_flags(), BitWidths())
        self.assertGreater(quantize.qat_config().rounds, 0)

    @flagsaver.flagsaver
    @pytest.mark.long
    def test_mobilenet_is_quantized_and_trained(self):
        teacher = self._teacher(FOLDER / "tiny_imagenet_mobilenet_v1.cfg")
        self.assertIsNone(flags.FLAGS.student)
        config = dataclasses.replace(
            quantize.qat_config(),
            rounds=1,
            max_minutes=0.0,
            warm_up_steps=1,
            pool_images=4,
            **FAST,
        )
        with (
            mock.patch.object(generator, "held_out_count", return_value=4),
            mock.patch.object(pool, "_OTHERS", 4),
            # After one step the student may well agree less, and a warning says so.
            mock.patch.object(api.warnings, "warn"),
        ):
            result = api.quantize(
                teacher,
                method="df_qat_kd",
                config=config,
                calibration=CalibrationConfig(calibration_images=4),
                widths=quantize.widths_from_flags(),
                precision="float32",
                show_progress=False,
            )
        self.assertContainsSubset(
            {"generator_loss", "distillation_loss"}, result.measurements
        )


if __name__ == "__main__":
    tf.test.main()
