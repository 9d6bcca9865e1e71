"""The tools as a user meets them: processes, exit codes, messages, files."""

import csv
import fcntl
import functools
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from tools import common, compare, inspect_model, quantize, run, train_teacher
from dfq_tf import api
from dfq_tf.compat import tf
from dfq_tf.distillation import generator, phases
from dfq_tf.errors import ConfigError, WorkdirError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.reports import costs, facts
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import qat_recipe
from dfq_tf.with_data import datasets
from tests import helpers
from tests.helpers import new_folder
from tests.tool_runner import ROOT, run_in_process, run_tool

SMOKE = ROOT / "tools/flagfiles/smoke.cfg"
DIGITS = "--teacher=tests/data/digits_teacher.keras"
TOOLS = (
    "run",
    "train_teacher",
    "quantize",
    "convert",
    "evaluate",
    "compare",
    "distill",
    "layer_noise",
    "inspect_model",
    "benchmark",
)


def states(folder, *patterns):
    """Path -> content, and when it was written, of the files of some patterns."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for pattern in patterns
        for path in folder.glob(pattern)
        if path.is_file()
    }


class RunTest(tf.test.TestCase):
    """One run of everything, and what may be done with it afterwards."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = new_folder() / "run"
        few = "--qat_student_steps=2"
        cls.flags = (f"--flagfile={SMOKE}", few, f"--workdir={cls.workdir}")
        cls.process = cls.run_of_all()

    @classmethod
    def run_of_all(cls):
        # A few steps, which are not worth compiling.
        few = mock.patch.object(generator, "held_out_count", return_value=48)
        small = mock.patch.object(phases, "pool_count", return_value=256)
        prepared = mock.patch.object(api, "prepare", wraps=api.prepare)
        with helpers.eagerly(), few, small, prepared as cls.prepared:
            return cls.tool("run", *cls.flags)

    @staticmethod
    def tool(name, *flags):
        return run_in_process(name, *flags)

    def test_run_ends_with_table_and_files(self):
        self.assertEqual(self.process.returncode, 0, self.process.stderr)
        for title in ("teacher float", "DF-Q W8A8", "DF-QAT-KD W8A8"):
            self.assertRegex(
                self.process.stdout, rf"{title} +\d+\.\d\d % +\d+\.\d\d % +\d+\.\d kB"
            )
        written = re.findall(r"^  (/\S+)$", self.process.stdout, re.MULTILINE)
        names = {pathlib.Path(path).name for path in written}
        self.assertContainsSubset(
            {"df_q.tflite", "df_qat_kd.tflite", "labels.txt", "metrics.json"}, names
        )
        for path in written:
            self.assertGreater(pathlib.Path(path).stat().st_size, 0)

    def test_terminal_shows_no_log_lines(self):
        lines = re.split(r"[\r\n]+", self.process.stderr)
        others = [
            line
            for line in lines
            if line.strip()
            and not re.match(
                r"(teacher|warm_up|distillation|df_qat_kd|preparation|calibration|"
                r"(expected )?agreement|file and its|images|noise of|evaluation of|"
                r"writing of).*: ",
                line,
            )
        ]
        self.assertEqual(others, [])

    def test_table_is_metrics_of_the_written_files(self):
        from dfq_tf.tflite.running import TFLiteClassifier
        from dfq_tf.with_data import datasets

        metrics = json.loads((self.workdir / "metrics.json").read_text())
        test = datasets.open_dataset("digits").load("test")
        for method in ("df_q", "df_qat_kd"):
            content = (self.workdir / f"{method}.tflite").read_bytes()
            predictions = TFLiteClassifier(content).scores(test.images).argmax(-1)
            accuracy = np.mean(predictions == test.labels)
            self.assertAlmostEqual(metrics[method]["accuracy"], accuracy)
            self.assertEqual(metrics[method]["bytes"], len(content))
            self.assertIn(f"{100 * accuracy:.2f} %", self.process.stdout)

    def test_noisiest_layer_is_named_and_charted(self):
        for title, method in (("DF-Q", "df_q"), ("DF-QAT-KD", "df_qat_kd")):
            table = (self.workdir / f"{method}_noise.csv").read_text()
            rows = list(csv.DictReader(table.splitlines()))
            worst = min(rows, key=lambda row: float(row["own_db"]))
            self.assertIn(
                f"{title}: the noisiest layer is {worst['name']}", self.process.stdout
            )
            chart = (self.workdir / f"{method}_noise.png").read_bytes()
            self.assertEqual(tf.io.decode_png(chart).shape.rank, 3)

    def test_page_says_what_the_run_has_measured(self):
        path = self.workdir / "report.html"
        self.assertIn(f"The page of the run: {path}\n", self.process.stdout)
        text = path.read_text()
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        for key in ("teacher", "df_q", "df_qat_kd"):
            self.assertIn(f"{100 * metrics[key]['accuracy']:.1f}\xa0%", text)
        for section in ("images", "noise", "ranges", "layers", "training", "app"):
            self.assertIn(f'<section id="{section}">', text)
        for name in ("wrn_10_1", "teacher.keras", "df_qat_kd.tflite"):
            self.assertIn(name, text)
        self.assertIn("python tools/run.py --flagfile=", text)
        layers = json.loads((self.workdir / "df_q_page.json").read_text())["layers"]
        table = (self.workdir / "df_q_noise.csv").read_text()
        names = [row["name"] for row in csv.DictReader(table.splitlines())]
        self.assertEqual([layer["name"] for layer in layers], names)
        # Layers that BatchNormalization remembers, some of them inside kernels.
        self.assertGreater(sum(layer["bn_low"] is not None for layer in layers), 5)

    def test_images_that_set_the_ranges_are_those_that_are_not_held_out(self):
        """Of the 32 images of the flagfile, a quarter chooses between settings."""
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        for method in ("df_q", "df_qat_kd"):
            (count,) = metrics[f"{method}_training"]["calibration_sources"].values()
            self.assertEqual(count, 32 - 8)
        text = (self.workdir / "report.html").read_text()
        self.assertRegex(text, r"\b24 [^<]* set the ranges of the file")

    def test_kinds_of_images_that_count_are_kept_where_any_do(self):
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        for method in ("df_q", "df_qat_kd"):
            training = metrics[f"{method}_training"]
            is_told = "expected_agreement" in training
            self.assertEqual(bool(training["expected_on"]), is_told)

    def test_noise_of_a_file_is_what_the_run_said(self):
        folder = new_folder()
        for name in ("df_q.tflite", "df_q_images.npy"):
            shutil.copy(self.workdir / name, folder)
        process = self.tool(
            "layer_noise",
            f"--teacher={self.workdir}/teacher.keras",
            f"--tflite={folder}/df_q.tflite",
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(
            (folder / "df_q_noise.csv").read_text(),
            (self.workdir / "df_q_noise.csv").read_text(),
        )
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        worst = metrics["df_q"]["worst_layer"].removesuffix(" dB")
        self.assertIn(f"The noisiest layer is {worst}", process.stdout)

    def test_what_is_to_be_done_is_said_once_before_it_is_done(self):
        plans = re.findall(r"^(DF-.*) steps of warm-up.*$", self.process.stdout, re.M)
        self.assertEqual(plans, ["DF-Q W8A8: up to 4", "DF-QAT-KD W8A8: up to 4"])
        (trained,) = re.findall(
            r"^DF-QAT-KD W8A8: .* rounds .*$", self.process.stdout, re.M
        )
        self.assertRegex(trained, r"; a step of \d+ images takes about [1-9]\d* MiB, ")

    def test_it_is_kept_that_the_warm_up_is_in_the_time_of_the_first_method(self):
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        self.assertEqual(metrics["warm_up_in"], "df_q")

    def test_both_methods_share_one_preparation(self):
        self.assertEqual(self.prepared.call_count, 1)

    def test_labels_are_class_names_in_order(self):
        labels = (self.workdir / "labels.txt").read_text().split()
        self.assertEqual(labels, list("0123456789"))

    def test_same_command_again_trains_nothing_and_changes_no_model(self):
        before = {
            p: p.read_bytes()
            for pattern in ("*.tflite", "*.keras")
            for p in self.workdir.glob(pattern)
        }
        again = self.tool("run", *self.flags, "--quiet", "--noprogress")
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(again.stderr, "")
        self.assertStartsWith(again.stdout.lstrip(), "accuracy")  # the table
        self.assertEqual(before, {p: p.read_bytes() for p in before})

    def test_other_flags_in_same_workdir_are_refused_with_the_difference(self):
        flags_before = (self.workdir / "flags.cfg").read_text()
        other = run_in_process("run", *self.flags, "--warm_up_steps=5")
        self.assertEqual(other.returncode, 1)
        self.assertIn("--warm_up_steps: 4 -> 5", other.stderr)
        self.assertNotIn("Traceback", other.stderr)
        self.assertEqual((self.workdir / "flags.cfg").read_text(), flags_before)


class MeasuringImagesTest(tf.test.TestCase):
    def test_images_held_out_are_those_of_the_first_method_and_so_is_their_kind(self):
        folder = new_folder()
        for method, kind, pixel in (
            ("df_q", "photographs", 7),
            ("df_qat_kd", "generated", 9),
        ):
            np.save(folder / f"{method}_images.npy", np.full((2, 4, 4, 1), pixel))
            facts.add(folder, method, generated={"kind": kind})
        workdir = types.SimpleNamespace(path=folder)
        images, labels, kept = run.images_that_measure("df_q", None, workdir)
        self.assertAllEqual(images, np.full((2, 4, 4, 1), 7))
        self.assertIsNone(labels)
        self.assertEqual(kept, {"kind": "photographs"})

    def test_labelled_images_are_of_no_such_kind(self):
        split = types.SimpleNamespace(images=np.zeros((2, 4, 4, 1)), labels=[0, 1])
        dataset = types.SimpleNamespace(load={"test": split}.get)
        found = run.images_that_measure("df_q", dataset, None)
        self.assertEqual(found, (split.images, split.labels, {}))


@pytest.mark.long
class WholeRunTest(RunTest):
    """The same of a process that compiles its steps, and of a further one."""

    test_both_methods_share_one_preparation = None  # another process tells nothing

    @classmethod
    def run_of_all(cls):
        return cls.tool("run", *cls.flags)

    @staticmethod
    def tool(name, *flags):
        return run_tool(name, *flags)

    def test_written_flagfile_repeats_the_run(self):
        again = self.workdir.with_name(self.workdir.name + "_again")
        process = run_tool(
            "run", f"--flagfile={self.workdir}/flags.cfg", f"--workdir={again}"
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        for name in ("flags.cfg", "df_q.tflite", "df_qat_kd.tflite"):
            self.assertEqual(
                (again / name).read_bytes(), (self.workdir / name).read_bytes(), name
            )

    def test_killed_run_continues_to_the_same_file(self):
        workdir = self.workdir.with_name(self.workdir.name + "_killed")
        flags = (f"--flagfile={SMOKE}", f"--workdir={workdir}")
        process = subprocess.Popen(
            [sys.executable, ROOT / "tools/run.py", *flags],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
        )
        # The warm-up is done: what comes next is interrupted.
        deadline = time.time() + 200
        while not list(workdir.glob("checkpoints/warm_up/*.index")):
            self.assertLess(time.time(), deadline)
            self.assertIsNone(process.poll())
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.assertFalse((workdir / "df_qat_kd.tflite").exists())
        again = run_tool("run", *flags)
        self.assertEqual(again.returncode, 0, again.stderr)
        for name in ("df_q.tflite", "df_qat_kd.tflite"):
            self.assertEqual(
                (workdir / name).read_bytes(), (self.workdir / name).read_bytes(), name
            )

    def test_stages_one_by_one_give_the_same_file(self):
        folder = self.workdir.with_name(self.workdir.name + "_stages")
        smoke = shlex.split(SMOKE.read_text(), comments=True)
        training = ("--warm_up_steps", "--distillation", "--batch", "--calibration")
        flags = [flag for flag in smoke if flag.startswith(training)]
        flags += [f"--teacher={self.workdir}/teacher.keras", f"--workdir={folder}"]
        flags += ["--method=df_q"]
        process = run_tool("quantize", *flags)
        self.assertEqual(process.returncode, 0, process.stderr)
        # It goes on where it may have been interrupted, behind the student.
        noise, kept = folder / "df_q_noise.csv", folder / "df_q_page.json"
        measured, facts = noise.read_text(), json.loads(kept.read_text())
        kept.write_text(json.dumps({"generated": facts["generated"]}))
        noise.unlink()
        process = run_tool("quantize", *flags)
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(noise.read_text(), measured)
        self.assertEqual(json.loads(kept.read_text()), facts)
        text = (folder / "report.html").read_text()
        self.assertIn('<section id="noise">', text)
        self.assertNotIn('<section id="app">', text)  # there is no file yet
        (name,) = [f.partition("=")[2] for f in smoke if f.startswith("--teacher=")]
        process = run_tool(
            "convert", f"--student={folder}/df_q.keras", f"--model_name={name}"
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(
            (folder / "df_q.tflite").read_bytes(),
            (self.workdir / "df_q.tflite").read_bytes(),
        )
        # A file is made anew once it is deleted, with other flags too.
        (folder / "df_q.tflite").unlink()
        process = run_in_process(
            "convert", f"--student={folder}/df_q.keras", "--model_version=9"
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        # A teacher without a description needs the flags; a file with one, none.
        shutil.copy(self.workdir / "teacher.keras", folder / "bare.keras")
        metrics = json.loads((self.workdir / "metrics.json").read_text())["df_q"]
        said = ModelDescription.load(self.workdir / "teacher.json")
        flags = [
            f"--input_mean={','.join(map(str, said.input_mean))}",
            f"--input_scale={','.join(map(str, said.input_scale))}",
        ]
        for teacher, needed in (
            (self.workdir / "teacher.keras", []),
            (folder / "bare.keras", flags),
        ):
            with self.subTest(teacher.name):
                before = sorted(folder.rglob("*"))
                process = run_in_process(
                    "evaluate",
                    f"--model={folder}/df_q.tflite",
                    f"--teacher={teacher}",
                    "--dataset=digits",
                    *needed,
                )
                self.assertEqual(sorted(folder.rglob("*")), before)
                accuracy, agreement = metrics["accuracy"], metrics["agreement"]
                self.assertIn(f"Accuracy: {100 * accuracy:.2f} %", process.stdout)
                self.assertIn(f"teacher: {100 * agreement:.2f} %", process.stdout)
        # A folder that is named gets the figures, and belongs to these flags.
        named = ["--dataset=digits", f"--workdir={folder}/figures"]
        process = run_in_process("evaluate", f"--model={folder}/df_q.tflite", *named)
        self.assertEqual(process.returncode, 0, process.stderr)
        written = json.loads((folder / "figures/metrics.json").read_text())
        self.assertEqual(written["accuracy"], metrics["accuracy"])
        # Told before the model is read, whose flags are not given.
        process = run_in_process("evaluate", f"--model={folder}/bare.keras", *named)
        self.assertEqual(process.returncode, 1)
        self.assertIn("holds a run with other flags", process.stderr)


@pytest.mark.long
class DistillTest(tf.test.TestCase):
    """A run with another network as the student."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = new_folder() / "run"
        cls.student_flags = (
            "--student=wrn_10_2",
            "--recipe=bank",
            "--rounds=2",
            "--student_steps=2",
            "--num_students=2",
            "--num_generators=2",
            "--bank_images=100",
            "--batch_size=auto",
        )
        cls.flags = (
            f"--flagfile={SMOKE}",
            *cls.student_flags,
            f"--workdir={cls.workdir}",
        )
        cls.process = run_tool("run", *cls.flags)

    def test_student_is_in_the_table_and_in_a_file(self):
        from dfq_tf.importing.classifiers import load_classifier
        from dfq_tf.with_data import datasets

        self.assertEqual(self.process.returncode, 0, self.process.stderr)
        self.assertRegex(
            self.process.stdout,
            r"teacher float +\S+ % +100.00 %.*\nstudent float .*\nDF-Q W8A8 .*\n"
            r"DF-QAT-KD W8A8 ",
        )
        student = load_classifier(self.workdir / "student.keras")
        test = datasets.open_dataset("digits").load("test")
        accuracy = np.mean(student.scores(test.images).argmax(-1) == test.labels)
        metrics = json.loads((self.workdir / "metrics.json").read_text())
        self.assertAlmostEqual(metrics["student"]["accuracy"], accuracy)
        training = metrics["student_training"]
        self.assertLen(training["agreements_on_generated_images"], 2)
        self.assertEqual(training["batch_size"], 128)
        self.assertEqual(metrics["warm_up_in"], "student")
        self.assertEqual(metrics["df_q_training"]["batch_size"], 128)
        # The int8 file is of the student, which is wider than the teacher.
        bytes_of = {key: metrics[key]["bytes"] for key in ("teacher", "student")}
        self.assertGreater(bytes_of["student"], 2 * bytes_of["teacher"])
        self.assertGreater(metrics["df_q"]["bytes"], bytes_of["teacher"] / 1.2)
        for name in ("distillation_curve.csv", "df_qat_kd_curve.csv"):
            is_there = (self.workdir / name).exists()
            self.assertEqual(is_there, name == "distillation_curve.csv")
        with (self.workdir / "distillation_curve.csv").open() as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["step"] for row in rows], ["0", "1", "2"])
        self.assertContainsSubset(
            {"agreement_on_generated_images", "accuracy"}, rows[0]
        )

    def test_tool_alone_gives_the_same_student(self):
        smoke = shlex.split(SMOKE.read_text(), comments=True)
        shared = [f for f in smoke if f.startswith(("--warm_up_steps", "--batch"))]
        folder = self.workdir.with_name("alone")
        teacher = new_folder() / "teacher.keras"
        shutil.copy(self.workdir / "teacher.keras", teacher)
        description = (self.workdir / "teacher.json").read_text()
        teacher.with_suffix(".json").write_text(description)
        flags = (
            *shared,
            *self.student_flags,
            f"--teacher={teacher}",
            f"--workdir={folder}",
        )
        process = run_tool("distill", *flags)
        self.assertEqual(process.returncode, 0, process.stderr)
        # What the recipe means today is written, so that it holds tomorrow.
        self.assertIn("\n--temperature=20.0\n", (folder / "flags.cfg").read_text())
        text = (folder / "report.html").read_text()
        self.assertIn("The student answers as the teacher on", text)
        self.assertIn("Distillation into another network", text)
        # Another teacher of the same name is not taken for the one of before.
        other = description.replace('"9"', '"nine"')
        self.assertNotEqual(other, description)
        teacher.with_suffix(".json").write_text(other)
        process = run_in_process("distill", *flags)
        self.assertEqual(process.returncode, 1)
        self.assertIn(f"--teacher: {teacher}, whose content has chang", process.stderr)
        from dfq_tf.importing.files import read_model

        one, other = (
            read_model(path / "student.keras") for path in (folder, self.workdir)
        )
        for weights, others in zip(one.weights, other.weights):
            self.assertAllEqual(weights, others)

    def test_recipe_budget_is_the_default(self):
        folder = self.workdir.with_name("budget")
        flags = ("--steps=3", "--student_steps=2", "--generator_steps=1")
        with helpers.eagerly():
            process = run_in_process(
                "distill",
                *flags,
                f"--teacher={self.workdir}/teacher.keras",
                "--student=wrn_10_1",
                "--batch_size=4",
                f"--workdir={folder}",
            )
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertIn(
            "recipe budget: 4 student steps (--steps=3, in whole rounds)",
            process.stdout,
        )
        self.assertRegex(process.stdout, r"whole rounds\); on .+; a step of 4 images")
        written = (folder / "flags.cfg").read_text()
        self.assertContainsSubset(
            {"--recipe=budget", "--minutes=30.0", "--mixup_share=0.075"},
            set(written.splitlines()),
        )
        self.assertNotIn("--rounds", written)
        metrics = json.loads((folder / "metrics.json").read_text())
        self.assertIn("synthesis_loss", metrics["student_training"])
        self.assertTrue((folder / "student.png").exists())

    def test_workers_must_have_the_same_flags_and_files(self):
        from dfq_tf.training import devices

        teacher = new_folder() / "teacher.keras"
        folder = teacher.with_name("run")
        sent = []

        def with_another_worker(values, strategy):
            sent.append(list(values))
            return np.array([values, sent[0]])

        def distill(source, seed):
            shutil.copy(source, teacher)
            shutil.copy(source.with_suffix(".json"), teacher.with_suffix(".json"))
            flags = (f"--teacher={teacher}", f"--workdir={folder}", f"--seed={seed}")
            return run_in_process("distill", *flags, "--student=wrn_10_2")

        with mock.patch.object(devices, "of_all_workers", with_another_worker):
            with mock.patch.object(
                common, "Workdir", side_effect=WorkdirError("come through")
            ):
                for source, seed, error in (
                    ("teacher", 0, "error: come through"),
                    ("teacher", 1, "error: the workers 1 have other flags"),
                    ("student", 0, "error: the workers 1 have other flags"),
                    ("teacher", 0, "error: come through"),
                ):
                    shutil.rmtree(folder, ignore_errors=True)
                    process = distill(self.workdir / f"{source}.keras", seed)
                    self.assertStartsWith(process.stderr, error)
                    # What is refused makes no folder.
                    self.assertEqual(folder.exists(), "come through" in error)

    def test_written_flagfile_is_the_same_run(self):
        # In the same folder: other flags would be refused, and nothing is repeated.
        patterns = ("*.tflite", "*.keras", "checkpoints/*/*")
        before = states(self.workdir, *patterns)
        again = run_tool(
            "run", f"--flagfile={self.workdir}/flags.cfg", f"--workdir={self.workdir}"
        )
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertContainsSubset(
            ["student.keras", "df_q.tflite", "identity.json"],
            [path.name for path in before],
        )
        self.assertEqual(states(self.workdir, *patterns), before)


class StudentsAccuracyTest(tf.test.TestCase):
    def test_page_says_on_how_many_images_a_student_was_measured(self):
        learner, folder = helpers.small_learner((8, 8, 1), 10), new_folder() / "run"
        images = np.zeros((4, 8, 8, 1), np.uint8)
        made = api.Distilled(learner, [0.75], [], images, {}, 4)
        with mock.patch.object(api, "distill", return_value=made):
            process = run_in_process(
                "distill",
                "tests/data/digits_teacher.keras",
                "--student=wrn_10_1",
                "--dataset=digits",
                f"--workdir={folder}",
            )
        self.assertEqual(process.returncode, 0, process.stderr)
        text = (folder / "report.html").read_text()
        self.assertIn("359 labelled images of digits, which took no part", text)
        called = f"tools/run.py --teacher={folder}/student.keras --dataset=digits"
        self.assertEndsWith(process.stdout, f"{called} --workdir={folder}/file\n")


class MinutesTest(tf.test.TestCase):
    def test_too_few_are_refused_before_the_teacher_is_trained(self):
        flags = ("--teacher=wrn_10_1", "--student=wrn_10_1", "--dataset=digits")
        few = ("--minutes=1e-3", "--batch_size=4", "--student_steps=1")
        few += ("--generator_steps=1",)
        workdir, error = new_folder() / "run", WorkdirError("it is trained")
        training = mock.patch.object(
            train_teacher, "trained_teacher", side_effect=error
        )
        # The second finds the folder free.
        for more, message in (
            (few, r"minutes is 0\.001; this machine needs at least [\d.]+ for one ba"),
            (("--steps=1",), "it is trained"),
        ):
            with helpers.eagerly(), training:
                process = run_in_process("run", *flags, *more, f"--workdir={workdir}")
            self.assertRegex(process.stderr, f"(?m)^error: {message}")

    def test_the_default_is_asked_about_too(self):
        """Large images may need more, which is told before hours of training."""
        error = ConfigError("minutes is 30, too few")
        with (
            mock.patch.object(api, "check_minutes", side_effect=error),
            mock.patch.object(train_teacher, "trained_teacher") as training,
        ):
            process = run_in_process(
                "run",
                "--teacher=wrn_10_1",
                "--student=wrn_10_1",
                "--dataset=digits",
                "--batch_size=4",
                f"--workdir={new_folder()}/run",
            )
        self.assertRegex(process.stderr, "(?m)^error: minutes is 30, too few$")
        training.assert_not_called()


class SeveralWorkersTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (
            (),
            "the reconstruction that the method auto may do "
            "(the method df_q does none)",
        ),
        (("--methods=df_q,df_rec",), "the reconstruction"),
        (("--methods=df_rec_kd",), "the reconstruction"),
    )
    def test_a_reconstruction_is_refused_at_once(self, flags, what):
        from dfq_tf.training import devices

        folder = new_folder() / "run"
        with mock.patch.object(devices, "_num_workers", return_value=2):
            process = run_in_process(
                "run",
                "--teacher=wrn_10_1",
                "--dataset=digits",
                f"--workdir={folder}",
                *flags,
            )
        self.assertEqual(
            process.stderr,
            f"error: distribute is multi_worker, of 2 workers, but {what} is for one "
            "process; run it with --distribute=none on one machine\n",
        )
        self.assertFalse(folder.exists())

    @parameterized.parameters("auto", "df_q,df_rec")
    def test_so_is_that_from_one_image(self, methods):
        process = run_in_process(
            "run",
            "--teacher=wrn_10_1",
            "--dataset=digits",
            f"--methods={methods}",
            "--calibration_images=1",
            f"--workdir={new_folder()}/run",
        )
        self.assertRegex(process.stderr, "^error: calibration_images is 1; the reconst")


class NotesTest(tf.test.TestCase):
    """What stands below the table of a comparison."""

    def test_photographs_are_told_of_the_rows_that_learnt_from_them(self):
        rows = [
            {"widths": widths, "method": method, **more}
            for widths, method, more in (
                ("float", "float", {}),
                ("W8A8", "df_q", {}),
                ("W8A8", "df_rec", {"photographs_share": 0.5}),
                ("W8A8", "df_qat_kd", {"photographs_share": 0.0}),
                ("W8A8", "df_rec_kd", {"photographs_share": 0.25}),
            )
        ]
        told = [line for line in compare.notes(rows).split("\n") if "photo" in line]
        self.assertLen(told, 1)
        self.assertEndsWith(told[0], ": W8A8 DF-REC, W8A8 DF-REC-KD")
        self.assertNotIn("photo", compare.notes(rows[:2]))
        share = [row["photographs_share"] for row in self.read(compare.as_csv(rows))]
        self.assertEqual(share, ["", "", "0.5", "0.0", "0.25"])

    def read(self, text):
        return csv.DictReader(text.splitlines())


class EarlierSecondsTest(tf.test.TestCase):
    """What a call that was interrupted had spent counts in the time of a method."""

    def setUp(self):
        super().setUp()
        self.workdir = Workdir(new_folder(), {})
        for name, seconds in (
            ("warm_up", 1),
            ("lessons", 2),
            ("df_rec_timing", 0.5),
            ("df_rec_1_of_2", 4),
            ("df_rec_2_of_2", 8),
            ("df_qat_kd", 16),
            ("distillation", 32),
        ):
            self.interrupt(name, seconds)

    def interrupt(self, name, seconds):
        """Leaves a checkpoint of a run behind so many seconds of steps."""
        folder = self.workdir.path / "checkpoints" / name
        checkpoint = tf.train.Checkpoint(
            seconds_in_steps=tf.Variable(float(seconds), dtype=tf.float64)
        )
        tf.train.CheckpointManager(checkpoint, str(folder), 1).save()

    def earlier(self, *methods):
        return [quantize.earlier_seconds(self.workdir, each) for each in methods]

    def test_first_method_has_the_warm_up_and_each_its_own_steps(self):
        self.assertEqual(
            self.earlier("df_q", "df_rec", "df_qat_kd", "df_rec_kd"),
            [1, 15.5, 17, 15.5],
        )

    def test_what_is_made_has_its_own_time_and_others_do_not_share_it(self):
        self.workdir.add_metrics(df_q_training={"seconds": 64.0}, warm_up_in="df_q")
        (self.workdir.path / "df_q.keras").touch()
        self.assertEqual(self.earlier("df_q", "df_rec", "df_qat_kd"), [64, 14.5, 16])
        (self.workdir.path / "df_rec.keras").touch()
        self.assertEqual(self.earlier("df_rec", "df_rec_kd"), [0, 0])

    def test_a_second_reconstruction_has_none_of_the_steps_that_both_share(self):
        self.workdir.add_metrics(warm_up_in="df_rec_kd")
        (self.workdir.path / "df_rec_kd.keras").touch()
        self.assertEqual(self.earlier("df_rec"), [0])

    def test_generators_that_have_distilled_are_warmed_up_already(self):
        self.workdir.add_metrics(warm_up_in="student")
        self.assertEqual(self.earlier("df_q", "df_qat_kd"), [0, 16])

    def test_warm_up_counts_in_what_was_made_behind_it(self):
        """Neither `budget` nor DF-Q of photographs has one, though both are made."""
        self.workdir.add_metrics(student_training={"seconds": 3.0})
        (self.workdir.path / "df_q.keras").touch()
        self.assertEqual(self.earlier("df_qat_kd"), [17])
        # Killed before its network was written, it is made again, warm-up and all.
        self.workdir.add_metrics(**quantize.warm_up_of(self.workdir, "df_qat_kd"))
        self.assertEqual(self.earlier("df_qat_kd", "df_rec_kd"), [17, 14.5])

    def test_whose_warm_up_it_was_is_kept_once_there_was_one(self):
        shutil.rmtree(self.workdir.path / "checkpoints/warm_up")
        self.assertEqual(quantize.warm_up_of(self.workdir, "student"), {})
        self.interrupt("warm_up", 1)
        found = quantize.warm_up_of(self.workdir, "df_q")
        self.assertEqual(found, {"warm_up_in": "df_q"})
        self.workdir.add_metrics(**found)
        self.assertEqual(quantize.warm_up_of(self.workdir, "df_qat_kd"), {})

    def test_steps_that_measured_how_long_a_round_takes_count_too(self):
        self.interrupt("df_qat_kd_timing", 128)
        self.assertEqual(self.earlier("df_qat_kd", "df_q"), [1 + 16 + 128, 1])


class BatchSizeTest(tf.test.TestCase):
    def test_it_is_the_distillations_where_that_has_warmed_up_alone(self):
        """`budget` warms nothing up, and its steps have one generator at a time."""
        network, workdir = helpers.small_classifier(), Workdir(new_folder(), {})
        workdir.add_metrics(student_training={"batch_size": 16})
        config = qat_recipe("paper", num_generators=4)

        def batch_size():
            return quantize.Preparation(network, network, workdir).config.batch_size

        with (
            mock.patch.object(quantize, "qat_config", return_value=config),
            mock.patch.object(common, "strategy", return_value=None),
        ):
            self.assertEqual(batch_size(), 128)  # what auto takes of small networks
            workdir.add_metrics(warm_up_in="student")
            self.assertEqual(batch_size(), 16)


@pytest.mark.long
class CompareTest(tf.test.TestCase):
    """A comparison on digits, with a row that cannot be made."""

    WIDTHS = ("W8A8", "W4A16")
    METHODS = ("q", "qat", "qat_kd", "noise", "df_q", "df_qat_kd")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = new_folder()
        smoke = [f"--flagfile={SMOKE}", "--methods=df_q", f"--workdir={cls.folder}/run"]
        process = run_tool("run", *smoke)
        assert process.returncode == 0, process.stderr
        cls.flags = (
            f"--teacher={cls.folder}/run/teacher.keras",
            "--dataset=digits",
            f"--compare_widths={','.join(cls.WIDTHS)}",
            "--warm_up_steps=2",
            "--qat_rounds=2",
            "--qat_max_minutes=1e-6",  # for one of them
            "--calibration_images=32",
        )
        cls.workdir = cls.folder / "compare"
        cls.process = run_tool(
            "compare", *cls.flags, "--batch_size=32", f"--workdir={cls.workdir}"
        )

    def rows(self, workdir):
        with (workdir / "table.csv").open() as file:
            return list(csv.DictReader(file))

    def test_table_has_a_column_for_each_method_and_a_line_for_each_width(self):
        self.assertEqual(self.process.returncode, 0, self.process.stderr)
        text = (self.workdir / "table.txt").read_text()
        self.assertIn(text.strip(), self.process.stdout)
        self.assertRegex(
            text,
            r"float +Q \* +QAT \* +QAT-KD \* +DF-Q, noise +DF-Q +DF-QAT-KD\n"
            r"W8A8( +\d+\.\d\d){7}\nW4A16( +\d+\.\d\d){7}\n",
        )

    def test_rows_are_measurements_of_the_files(self):
        from dfq_tf.tflite.running import TFLiteClassifier
        from dfq_tf.with_data import datasets

        test = datasets.open_dataset("digits").load("test")
        rows = self.rows(self.workdir)
        names = [(row["widths"], row["method"]) for row in rows]
        expected = [(w, m) for w in self.WIDTHS for m in self.METHODS]
        self.assertEqual(names, [("float", "float"), *expected])
        for row in rows[1:]:
            path = self.workdir / row["widths"] / f"{row['method']}.tflite"
            content = path.read_bytes()
            self.assertEqual(int(row["bytes"]), len(content))
            predictions = TFLiteClassifier(content).scores(test.images).argmax(-1)
            accuracy = np.mean(predictions == test.labels)
            self.assertAlmostEqual(float(row["accuracy"]), accuracy, places=6)
            self.assertGreater(float(row["latency_ms"]), 0)
            types = "int8" if row["widths"] == "W8A8" else "int4+int8"
            self.assertEqual(row["weights"], types)
        sizes = {row["widths"]: int(row["bytes"]) for row in rows}
        self.assertLess(sizes["W4A16"], 0.7 * sizes["W8A8"])

    def test_plots_and_curves_are_there(self):
        for name in ("size.png", "curves.png"):
            image = tf.io.decode_png((self.workdir / name).read_bytes())
            self.assertGreater(np.std(image), 0, name)
        for kind, steps in (("df_qat_kd", 1), ("qat", 10), ("qat_kd", 10)):
            with (self.workdir / "W4A16" / f"{kind}_curve.csv").open() as file:
                rows = list(csv.DictReader(file))
            self.assertEqual([int(r["step"]) for r in rows], list(range(steps + 1)))
        rounds = {row["method"]: row["rounds"] for row in self.rows(self.workdir)}
        for kind in ("df_qat_kd", "qat", "qat_kd"):
            self.assertEqual(int(rounds[kind]), 1, kind)

    def test_multi_label_teacher_teaches_nobody(self):
        said = ModelDescription((0,), (1,), "sigmoid", tuple("ab"))
        teacher = types.SimpleNamespace(description=said)
        given = types.SimpleNamespace(columns=[])
        with mock.patch.object(compare, "FLAGS", given):
            left = compare.taught_by(teacher, ["q", "qat", "df_q", "df_qat_kd"])
            self.assertEqual(left, ["q", "df_q"])
            given.columns = ["df_q", "df_rec_kd"]
            with self.assertRaisesRegex(ConfigError, "from which no student can be"):
                compare.taught_by(teacher, given.columns)
            self.assertEqual(compare.taught_by(teacher, ["df_rec"]), ["df_rec"])

    def test_curve_of_a_training_that_was_interrupted_waits_for_its_end(self):
        workdir = self.folder / "interrupted"
        shutil.copytree(self.workdir, workdir)
        metrics = json.loads((workdir / "metrics.json").read_text())
        del metrics["rows"]["W8A8/df_qat_kd"]
        metrics["rows"]["W8A8/qat"] = {
            "widths": "W8A8",
            "method": "qat",
            "failure": "NaN",
        }
        curve = workdir / "W8A8" / "df_qat_kd_curve.csv"
        begun = curve.read_text().splitlines(keepends=True)[:2]
        self.assertStartsWith(begun[1], "0,")
        curve.write_text("".join(begun))
        with mock.patch.object(compare.plots, "save") as save:
            compare.write_results(
                types.SimpleNamespace(path=workdir, metrics=lambda: metrics)
            )
        figure, path = save.call_args.args
        self.assertEqual(path.name, "curves.png")
        _, names = figure.axes[0].get_legend_handles_labels()
        self.assertCountEqual(
            names, ["W8A8 QAT-KD", "W4A16 QAT", "W4A16 QAT-KD", "W4A16 DF-QAT-KD"]
        )

    def test_only_rows_that_are_missing_are_made(self):
        workdir = self.folder / "again"
        shutil.copytree(self.workdir, workdir)
        path = workdir / "metrics.json"
        metrics = json.loads(path.read_text())
        made = metrics["rows"].pop("W8A8/df_qat_kd")
        files = {p: p.read_bytes() for p in workdir.glob("W*/*.tflite")}
        path.write_text(json.dumps(metrics))
        warm_up = states(workdir, "checkpoints/warm_up/*")
        self.assertNotEmpty(warm_up)
        again = run_tool(
            "compare", *self.flags, "--batch_size=32", f"--workdir={workdir}"
        )
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertEqual(re.findall(r"^W\S+ \S+.*$", again.stdout, re.M)[0][:4], "W8A8")
        self.assertEqual(states(workdir, "checkpoints/warm_up/*"), warm_up)
        rows = json.loads(path.read_text())["rows"]
        self.assertEqual(rows["W8A8/df_qat_kd"]["accuracy"], made["accuracy"])
        self.assertLen(rows, 13)
        self.assertEqual(files, {p: p.read_bytes() for p in files})

    def test_failed_row_is_shown_and_the_others_are_made(self):
        # More images than the training set has: QAT cannot be, what needs no data can.
        workdir = self.folder / "failed"
        process = run_tool(
            "compare",
            *self.flags,
            "--qat_recipe=paper",  # whose batches are no smaller
            "--batch_size=1500",
            "--columns=qat,df_q",
            f"--workdir={workdir}",
        )
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr, "error: a row failed; see the table")
        self.assertNotIn("Traceback", process.stderr)
        self.assertRegex(process.stdout, r"W8A8 +\d+\.\d\d +failed +\d+\.\d\d\n")
        self.assertIn("failed: batch_size is 1500, but there are", process.stdout)
        for row in self.rows(workdir):
            is_qat = row["method"] == "qat"
            self.assertEqual("batch_size is 1500" in row["failure"], is_qat)
            self.assertEqual(bool(row["accuracy"]), not is_qat)


class ReconstructionTest(tf.test.TestCase):
    """Blocks that learn to round, by tools, for a trained teacher of digits."""

    FLAGS = (
        "--teacher=tests/data/digits_teacher.keras",
        "--dataset=digits",
        "--images=photographs",
        "--calibration_images=64",
        "--rec_steps=20",
        "--rec_minutes=0",
        "--batch_size=8",
    )

    def tool(self, name, *flags):
        few = mock.patch.object(generator, "held_out_count", return_value=48)
        with helpers.eagerly(), few:
            process = run_in_process(name, *self.FLAGS, *flags)
        self.assertEqual(process.returncode, 0, process.stderr)
        return process

    def test_auto_goes_on_to_blocks_where_bits_are_few(self):
        workdir = new_folder() / "run"
        flags = ("--methods=auto", "--widths=W2A8", f"--workdir={workdir}")
        self.assertIn("W2A8: DF-REC is made too", self.tool("run", *flags).stdout)
        made = sorted(path.name for path in workdir.glob("*.tflite"))
        self.assertEqual(made, ["df_q.tflite", "df_rec.tflite"])

    def test_no_labelled_image_is_asked_for_while_files_are_made(self):
        order, load, make = [], datasets._load_digits, quantize.quantize_network

        def loaded(split):
            order.append(split)
            return load(split)

        def made(*args):
            order.append("begin")
            result = make(*args)
            order.append("end")
            return result

        with (
            mock.patch.object(datasets, "_load_digits", loaded),
            mock.patch.object(quantize, "quantize_network", made),
        ):
            workdir = new_folder() / "run"
            self.tool("run", "--methods=df_q,df_rec", f"--workdir={workdir}")
        self.assertEqual(order, ["begin", "end", "begin", "end", "test"])

    def test_run_makes_blocks_learn_and_says_how(self):
        workdir = new_folder() / "run"
        flags = ("--methods=df_q,df_rec", "--widths=W2A8", f"--workdir={workdir}")
        process = self.tool("run", *flags)
        self.assertRegex(
            process.stdout,
            r"(?m)^DF-REC W2A8: calibration, reconstruction of blocks; on .*; the p",
        )
        self.assertRegex(
            process.stdout,
            "20 steps of each block, on 64 images, those that judge among them; "
            "--rec_steps=20 --rec_minutes=0 rep",
        )
        self.assertRegex(
            process.stdout,
            "(?m)^Learnt from crops of the photographs that ship with the project al",
        )
        metrics = json.loads((workdir / "metrics.json").read_text())
        made = metrics["df_rec_training"]
        self.assertEqual(made["photographs_share"], 1)
        found = made["reconstruction_steps"], made["reconstruction_images"]
        self.assertEqual(found, (20, 64))
        self.assertEqual(
            [b["name"] for b in made["blocks"]], ["relu1", "relu2", "logits"]
        )
        self.assertGreater(
            made["blocks"][1]["after_db"], made["blocks"][1]["before_db"]
        )
        for name in ("relu1", "relu2", "logits"):
            self.assertRegex(process.stdout, rf"(?m)^{name} .* dB +[\d.]+ dB$")
        accuracies = [metrics[each]["accuracy"] for each in ("df_q", "df_rec")]
        self.assertGreater(accuracies[1], accuracies[0])
        self.assertLessEqual(metrics["df_rec"]["largest_difference_in_steps"], 1)
        before = (workdir / "df_rec.tflite").read_bytes()
        again = self.tool("run", *flags)
        self.assertNotIn("reconstruction of blocks", again.stdout)
        self.assertEqual((workdir / "df_rec.tflite").read_bytes(), before)

    @pytest.mark.long
    def test_comparison_has_all_that_reconstructs(self):
        workdir = new_folder() / "compare"
        columns = ("rec", "df_rec", "df_rec_kd")
        flags = ("--compare_widths=W2A8", f"--columns={','.join(columns)}")

        def unchanged(prepared, network, *others):
            return network, [], {}

        with mock.patch.object(api, "trained", side_effect=unchanged):
            self.tool("compare", *flags, f"--workdir={workdir}")
        metrics = json.loads((workdir / "metrics.json").read_text())
        rows = {row["method"]: row for row in metrics["rows"].values()}
        self.assertEqual([*rows], ["float", *columns])
        files = [(workdir / f"W2A8/{name}.tflite").read_bytes() for name in columns]
        self.assertTrue(files[0] != files[1])
        self.assertTrue(files[1] == files[2])  # training starts from there
        made = metrics["reconstructions"]["W2A8"]
        self.assertEqual(made["reconstruction_steps"], 20)
        # The last row took no step of it, and has cost as much all the same.
        minutes = metrics["shared_minutes"]
        spent = minutes["W2A8 reconstruction"] + minutes["images"] + minutes["lessons"]
        for name in ("df_rec", "df_rec_kd"):
            self.assertGreater(rows[name]["minutes"], spent)
        shares = [rows[name].get("photographs_share") for name in columns]
        self.assertEqual(shares, [None, 1, 1])  # the yardstick learns from the data set
        folders = sorted(p.name for p in (workdir / "W2A8/checkpoints").iterdir())
        blocks = [f"{kind}_{i}_of_3" for kind in ("df_rec", "rec") for i in (1, 2, 3)]
        self.assertEqual(folders, blocks)


class BadInputTest(parameterized.TestCase, tf.test.TestCase):
    """Each is one message and an exit code, and writes nothing."""

    @parameterized.parameters(
        ("run", 2, ["--dataset=digits"], "teacher is empty"),
        ("run", 2, ["--teacher=lenet_5"], "teacher is 'lenet_5'.*wrn_DEPTH_WIDTH"),
        (
            "run",
            2,
            ["--teacher=vgg_99", "--dataset=digits"],
            "teacher is 'vgg_99': depth is 99; a VGG",
        ),
        ("run", 2, ["--teacher=wrn_10_1"], "name the training data with --dataset"),
        ("run", 2, ["--teacher=wrn_11_1", "--dataset=digits"], "depth is 11"),
        (
            "run",
            1,
            ["--teacher=wrn_10_1", "--dataset=nope"],
            "dataset is 'nope'.*digits",
        ),
        ("run", 1, ["--teacher=absent.keras"], "there is no model file absent.keras"),
        ("run", 2, ["--teacher=wrn_10_1", "--no_such_flag=1"], "no_such_flag"),
        ("run", 2, ["--flagfile=absent.cfg"], "absent.cfg"),
        ("run", 2, ["--batch_size=x"], "batch_size=x: it must be .*least 1, or auto"),
        ("run", 2, ["--warm_up_steps=-1"], "warm_up_steps is -1.*at least 0"),
        ("run", 2, ["--batch_size=0"], "batch_size=0: it must be .*least 1, or auto"),
        ("run", 2, ["--batch_size=-2"], "batch_size=-2: it must be .*least 1, or auto"),
        ("run", 2, ["--num_bits_first=1"], "num_bits_first is 1; .*at least 2"),
        ("run", 2, ["--widths=4/8"], "widths is '4/8'; write .* as W4A8"),
        ("run", 2, ["--widths=W9A8"], "num_bits_weight is 9.*at most 8"),
        ("run", 2, ["--widths=W8A12"], "num_bits_activation is 12.*8 or 16"),
        ("run", 2, ["--widths=W1A8"], "num_bits_weight is 1; .*at least 2"),
        ("run", 2, ["--qat_temperature=4"], "Unknown command line flag"),
        ("run", 2, ["--widths=W4A1"], "num_bits_activation is 1; .*at least 2"),
        ("run", 2, ["--activation_range=best"], "activation_range is 'best'.*mse"),
        (
            "run",
            2,
            ["--images=photographs", "--logits_margin=3"],
            "logits_margin is 3.0, which has no effect where images is 'photographs'",
        ),
        ("compare", 2, [], "teacher is empty"),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--compare_widths=W8A8,W4A8,W8A8"],
            "compare_widths is 'W8A8,W4A8,W8A8'; name each pair of widths once",
        ),
        (
            "compare",
            2,
            ["--teacher=absent.keras", "--compare_widths=W8A8,W1A8"],
            "error: compare_widths is 'W1A8': num_bits_weight is 1; .*at least 2",
        ),
        (
            "compare",
            2,
            ["--teacher=absent.keras", "--compare_widths=4"],
            "error: compare_widths is '4'; write the bits of weights and activations",
        ),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--compare_widths=W9A8"],
            "num_bits_weight is 9",
        ),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--columns=df_q,magic"],
            "columns has 'magic'; each must be one of",
        ),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--columns=qat"],
            "columns has 'qat', which needs real images; name them with --dataset",
        ),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--augmentation=mixup"],
            "augmentation is 'mixup'; it must be one of",
        ),
        ("run", 2, ["--precision=int3"], "precision is 'int3'.*bfloat16"),
        (
            "run",
            2,
            ["--qat_student_learning_rate=nan"],
            "qat_student_learning_rate is nan",
        ),
        ("run", 2, ["--methods=df_q,magic"], "methods has 'magic'; .*auto.*df_qat_kd"),
        ("run", 2, ["--methods="], "methods is empty.*tools/distill.py"),
        (
            "run",
            2,
            ["--methods=auto,df_q"],
            "methods is 'auto,df_q'; auto stands alone",
        ),
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--rounds=7"],
            "rounds is 7, but there is no student: .*begin with qat_",
        ),
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--recipe=paper"],
            "recipe is paper, but there is no student",
        ),
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--student=wrn_11_1"],
            "student is 'wrn_11_1': depth is 11; a WRN needs",
        ),
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--student=small.keras"],
            "student is 'small.keras', no network that the project builds: .*WIDTH",
        ),
        ("run", 2, ["--widths=W1A8"], "widths is 'W1A8': num_bits_weight is 1; .*2"),
        (
            "compare",
            2,
            ["--teacher=a.keras", "--compare_widths="],
            "compare_widths is empty; name some, such as W8A8,W4A8",
        ),
        (
            "run",
            2,
            [
                "--teacher=wrn_10_1",
                "--dataset=digits",
                "--student=wrn_10_1",
                "--recipe=soup",
            ],
            "recipe is 'soup'; it must be one of",
        ),
        ("distill", 2, [], "teacher is empty; name it with --teacher"),
        ("distill", 2, ["--teacher=a.keras"], "student is empty; name it with"),
        (
            "distill",
            2,
            ["--teacher=a.keras", "--student=wrn_10_1", "--temperature=0"],
            "temperature is 0.0; it must be above 0",
        ),
        (
            "distill",
            2,
            ["--teacher=a.keras", "--student=wrn_10_1", "--rounds=3"],
            "rounds is 3, but the recipe budget has no such setting; it has minutes",
        ),
        (
            "distill",
            2,
            ["--teacher=a.keras", "--student=wrn_10_1", "--warm_up_steps=3"],
            "warm_up_steps is 3, but the recipe budget has no such setting; leave",
        ),
        (
            "distill",
            2,
            ["--teacher=a.keras", "--student=wrn_10_1", "--noise_share=0.9"],
            "the shares are noise_share 0.9, .* 1.05 together; they must be at most 1",
        ),
        (
            "run",
            2,
            ["--yardstick", "--teacher=wrn_10_1"],
            "yardstick needs real images",
        ),
        ("quantize", 2, [], "teacher is empty"),
        (
            "quantize",
            2,
            ["--teacher=a.keras", "--method=auto"],
            "method is 'auto'; it must be one of .'df_q', 'df_rec'",
        ),
        (
            "quantize",
            2,
            ["--teacher=a.keras", "--favor=nice"],
            "favor is 'nice'; it must be one of",
        ),
        ("convert", 2, [], "student is empty"),
        ("convert", 1, ["--student=absent.keras"], "no model file absent.keras"),
        ("evaluate", 2, ["--model=absent.tflite"], "dataset is empty; name the label"),
        (
            "evaluate",
            1,
            ["--model=absent.tflite", "--dataset=digits"],
            "no model file absent.tflite",
        ),
        (
            "run",
            2,
            ["--teacher=tests/data/digits_teacher.keras", "--images=/absent/pictures"],
            "the folder of pictures '/absent/pictures' is not there",
        ),
        # Neither is there any training before these are refused.
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--images=/absent/pictures"],
            "the folder of pictures '/absent/pictures' is not there",
        ),
        (
            "run",
            2,
            ["--teacher=wrn_10_1", "--dataset=digits", "--target_kib=1"],
            "target_kib is 1",
        ),
        (
            "run",
            2,
            [
                "--teacher=tests/data/digits_teacher.keras",
                "--student=wrn_10_1",
                "--target_kib=1",
            ],
            "target_kib is 1",
        ),
        (
            "evaluate",
            2,
            ["--model=absent.tflite", "--dataset=digits", "--input_scale=1"],
            r"input_scale is \['1'\], but absent.tflite need no such flag",
        ),
        ("evaluate", 2, ["a.keras", "stray"], "unexpected argument 'stray'"),
    )
    def test_bad_input_is_one_message(self, tool, exit_code, flags, message):
        workdir = new_folder() / "run"
        process = run_in_process(tool, *flags, f"--workdir={workdir}")
        self.assertEqual(process.returncode, exit_code, process.stderr)
        self.assertRegex(process.stderr, r"^error: ")
        self.assertRegex(process.stderr, f"(?s){message}")
        self.assertNotIn("Traceback", process.stderr)
        self.assertFalse(workdir.exists())

    def test_layer_noise_without_what_it_needs_is_one_message(self):
        folder = new_folder()
        (folder / "images.npy").write_text("no images")
        (folder / "a.tflite").touch()
        teacher = "--teacher=tests/data/digits_teacher.keras"
        tflite = f"--tflite={folder}/a.tflite"
        for exit_code, flags, message in (
            (2, [teacher], "tflite is empty; name a file with --tflite"),
            (2, [teacher, tflite, "--num_images=0"], "num_images is 0; .*at least 1"),
            (1, [teacher, "--tflite=absent.tflite"], "no model file absent.tflite"),
            (1, [teacher[10:], "--tflite=absent.tflite"], "no model file absent"),
            (1, [teacher, tflite], "there are no images in .*a_images.npy; name"),
            (1, [teacher, tflite, f"--images={folder}/images.npy"], "is no .npy file"),
            (1, [teacher, tflite, f"--images={folder}"], "is a folder; name a .npy"),
            (
                2,
                [teacher, tflite, f"--images={folder}", "--dataset=digits"],
                f"images is '{folder}' and dataset is 'digits'; give one of them",
            ),
        ):
            process = run_in_process("layer_noise", *flags)
            self.assertEqual(process.returncode, exit_code, process.stderr)
            self.assertRegex(process.stderr, f"(?m)^error: .*{message}")
            self.assertNotIn("Traceback", process.stderr)
            self.assertLen(list(folder.iterdir()), 2)

    def test_layer_noise_of_images_that_are_cut_off_or_none_is_one_message(self):
        folder, array, archive = new_folder(), io.BytesIO(), io.BytesIO()
        (folder / "a.tflite").touch()
        np.save(array, np.zeros((1, 8, 8, 1), np.uint8))
        np.savez(archive, np.zeros((1, 8, 8, 1), np.uint8))
        whole = archive.getvalue()
        for content in (b"", array.getvalue()[:-1], whole, whole[:-9]):
            (folder / "images.npy").write_bytes(content)
            with mock.patch("tools.teacher_flags.read_teacher"):
                process = run_in_process(
                    "layer_noise",
                    DIGITS,
                    f"--tflite={folder}/a.tflite",
                    f"--images={folder}/images.npy",
                )
            self.assertEqual(process.returncode, 1, process.stderr)
            message = "^error: .*images.npy is no .npy file of images: "
            self.assertRegex(process.stderr, f"(?m){message}")
            self.assertNotIn("Traceback", process.stderr)

    def test_layer_noise_that_cannot_be_written_is_told_before_the_work(self):
        folder = new_folder()
        (folder / "a.tflite").touch()
        # No permission holds root back.
        with mock.patch("os.access", return_value=False):
            process = run_in_process(
                "layer_noise", DIGITS, f"--tflite={folder}/a.tflite"
            )
        self.assertEqual(process.returncode, 2, process.stderr)
        self.assertRegex(
            process.stderr,
            f"^error: tflite is '.*', but {folder}, which is to have a_noise.csv, "
            "cannot be written; copy the file, .* to another folder\n$",
        )

    @parameterized.parameters(
        ("run", 1, ["--teacher=absent.keras"], "there is no model file absent.keras"),
        ("run", 2, [DIGITS, "--student=small.keras"], "student is 'small.keras', no"),
        ("run", 2, [DIGITS, "--images=/absent"], "images is '/absent': the folder"),
        ("run", 2, ["--teacher=wrn_10_1", "--student=a"], "student is 'a', no"),
        ("run", 2, ["--teacher=wrn_10_1", "--pooled_margin=0"], "pooled_margin is 0"),
        ("distill", 1, ["--teacher=absent.keras", "--student=wrn_10_1"], "there is no"),
        ("distill", 2, [DIGITS, "--student=wrn_11_1"], "student is 'wrn_11_1': depth"),
        ("compare", 1, ["--teacher=absent.keras"], "there is no model file absent"),
        ("train_teacher", 2, ["--model=lenet"], "model is 'lenet'; the project builds"),
    )
    def test_what_is_wrong_is_told_before_data_is_opened(
        self, tool, exit_code, flags, message
    ):
        """Which may be downloaded for minutes."""
        from dfq_tf.with_data import datasets

        workdir = new_folder() / "run"
        flags = (*flags, "--dataset=cifar10", f"--workdir={workdir}")
        with mock.patch.object(datasets, "open_dataset") as opened:
            process = run_in_process(tool, *flags)
        self.assertEqual(process.returncode, exit_code, process.stderr)
        self.assertStartsWith(process.stderr, f"error: {message}")
        opened.assert_not_called()

    def test_flag_that_was_wrong_may_be_mended_in_the_same_workdir(self):
        flags = ("--dataset=digits", "--model=wrn_10_1", f"--workdir={new_folder()}/a")
        for size in (5000, 6000):
            process = run_in_process(
                "train_teacher", *flags, f"--teacher_batch_size={size}"
            )
            self.assertEqual(process.returncode, 2, process.stderr)
            self.assertRegex(process.stderr, f"^error: teacher_batch_size is {size}, ")

    def test_workdir_of_a_run_that_goes_on_is_refused_until_that_has_ended(self):
        folder = new_folder()
        flags = ("--dataset=digits", "--model=wrn_10_1", f"--workdir={folder}")
        flags += ("--teacher_batch_size=5000",)
        other = os.open(folder, os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        (folder / "flags.cfg").write_text("--of=the other run\n")
        for _ in range(2):
            process = run_in_process("train_teacher", *flags)
            self.assertEqual(process.returncode, 1, process.stderr)
            self.assertRegex(
                process.stderr,
                f"^error: workdir is '{folder}', where another run is at work. .*"
                "name another folder with --workdir",
            )
        self.assertEqual([p.name for p in folder.iterdir()], ["flags.cfg"])
        (folder / "flags.cfg").unlink()
        os.close(other)
        for _ in range(2):  # a run of before is no other
            process = run_in_process("train_teacher", *flags)
            self.assertRegex(process.stderr, "^error: teacher_batch_size is 5000")

    OF_ABSENT_FILES = (
        ("run", "--teacher=absent.keras"),
        ("run", "--teacher=wrn_10_1", "--dataset=absent"),
        ("train_teacher", "--dataset=absent"),
        ("distill", "--teacher=absent.keras", "--student=wrn_10_1"),
        ("quantize", "--teacher=absent.keras"),
        ("compare", "--teacher=absent.keras"),
        ("convert", "--student=absent.keras"),
        ("evaluate", "--model=absent.keras", "--dataset=digits"),
    )

    @parameterized.parameters(*OF_ABSENT_FILES)
    def test_empty_workdir_is_refused_before_all_else(self, tool, *flags):
        """As $FOLDER is where the shell has no such variable: not the current one."""
        process = run_in_process(tool, *flags, "--workdir=")
        self.assertEqual(process.returncode, 2, process.stderr)
        self.assertStartsWith(
            process.stderr, "error: workdir is empty; name a folder with --workdir"
        )

    @parameterized.parameters(*OF_ABSENT_FILES)
    def test_workdir_of_another_run_is_refused_before_all_else(self, tool, *flags):
        folder = new_folder()
        (folder / "flags.cfg").write_text("--of=another run\n")
        process = run_in_process(tool, *flags, f"--workdir={folder}")
        self.assertEqual(process.returncode, 1, process.stderr)
        self.assertStartsWith(
            process.stderr,
            f"error: workdir is '{folder}', which holds a run with other flags",
        )
        self.assertEqual([path.name for path in folder.iterdir()], ["flags.cfg"])

    def test_workdir_that_cannot_be_written_is_one_message(self):
        in_the_way = new_folder() / "file"
        in_the_way.touch()
        process = run_in_process(
            "run", f"--flagfile={SMOKE}", f"--workdir={in_the_way}/run"
        )
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr, "^error: workdir is .*cannot be written")

    def test_teacher_that_does_not_fit_the_data_is_one_message(self):
        from dfq_tf.models import build_model
        from dfq_tf.training.learner import Learner

        folder = new_folder()
        for shape, classes, message in (
            ((8, 8, 1), 7, "the model has 7 classes, but dataset digits has 10"),
            ((16, 16, 1), 10, r"the model takes images of \(16, 16, 1\), but those"),
        ):
            names = tuple(map(str, range(classes)))
            description = ModelDescription((0,), (1 / 255,), "logits", names)
            teacher = Learner(build_model("wrn_10_1", shape, classes), description)
            teacher.save(folder / "teacher.keras")
            process = run_in_process(
                "run",
                f"--teacher={folder}/teacher.keras",
                "--dataset=digits",
                f"--workdir={folder}/run",
            )
            self.assertEqual(process.returncode, 1)
            self.assertRegex(process.stderr, message)
            self.assertFalse((folder / "run").exists())

    def test_float_student_is_refused_by_convert(self):
        from dfq_tf.models import build_model
        from dfq_tf.training.learner import Learner

        folder = new_folder()
        description = ModelDescription((0,), (1,), "logits", tuple("01"))
        model = build_model("wrn_10_1", (8, 8, 1), 2)
        Learner(model, description).save(folder / "float.keras")
        process = run_in_process("convert", f"--student={folder}/float.keras")
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr, "^error: the student is a float model")
        self.assertFalse((folder / "float.tflite").exists())


class EvaluateTest(tf.test.TestCase):
    """Measuring a model that is not the user's to write beside."""

    def test_model_of_images_of_any_size_with_its_description(self):
        layers = tf.keras.layers
        path = new_folder() / "any.keras"
        image = layers.Input((None, None, 1))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(image))
        tf.keras.Model(image, layers.Dense(10)(x)).save(path)
        names = [str(number) for number in range(10)]
        said = {"input_mean": [0], "input_scale": [1], "output": "logits"}
        path.with_suffix(".json").write_text(json.dumps({**said, "class_names": names}))
        flags = (f"--model={path}", "--dataset=digits")
        process = run_in_process("evaluate", *flags)
        self.assertRegex(process.stderr, "--image_size=HEIGHT,WIDTH")
        process = run_in_process("evaluate", *flags, "--image_size=8,8")
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertRegex(process.stdout, r"\d\.\d+ %")

    def test_nothing_is_written_beside_the_model(self):
        folder = new_folder()
        for name in ("digits_teacher.keras", "digits_teacher.json"):
            shutil.copy(ROOT / "tests/data" / name, folder)
        before = sorted(folder.rglob("*"))
        flags = (f"--model={folder}/digits_teacher.keras", "--dataset=digits")
        process = run_in_process("evaluate", *flags)
        self.assertRegex(process.stdout, r"^Accuracy: 9\d\.\d\d % of 359 test images$")
        self.assertEqual(sorted(folder.rglob("*")), before)
        process = run_in_process("evaluate", *flags, f"--workdir={folder}/figures")
        self.assertEqual(process.returncode, 0, process.stderr)
        written = json.loads((folder / "figures/metrics.json").read_text())
        self.assertEqual(written["images"], 359)

    def test_flags_are_of_the_teacher_with_a_description_too(self):
        from dfq_tf.importing.classifiers import load_classifier
        from dfq_tf.with_data import datasets

        path = ROOT / "tests/data/digits_teacher.keras"
        test = datasets.open_dataset("digits").load("test")
        described, told = (
            load_classifier(path, **said).scores(test.images).argmax(-1)
            for said in ({}, {"feeding": "0..1"})
        )
        flags = (f"--model={path}", "--dataset=digits", "--feeding=0..1")
        for more, found in (((), told), ((f"--teacher={path}",), described)):
            process = run_in_process("evaluate", *flags, *more)
            self.assertEqual(process.returncode, 0, process.stderr)
            right = f"Accuracy: {100 * np.mean(found == test.labels):.2f} %"
            self.assertIn(right, process.stdout)
        same = f"teacher: {100 * np.mean(described == told):.2f} %"
        self.assertIn(same, process.stdout)
        self.assertNotIn("100.00", process.stdout)

    def test_head_may_be_said_of_a_described_model(self):
        flags = ("--model=tests/data/digits_teacher.keras", "--dataset=digits")
        process = run_in_process("evaluate", *flags, "--head=no_such")
        self.assertEqual(process.returncode, 2)
        self.assertRegex(process.stderr, "^error: head is 'no_such', but the model has")


class InspectModelTest(tf.test.TestCase):
    """The report on a model, as a user reads it."""

    def save(self, *behind):
        from dfq_tf.compat import keras

        layers = keras.layers
        model = keras.Sequential(
            [
                layers.Input((16, 16, 3)),
                layers.Conv2D(4, 3, use_bias=False, name="block1_conv"),
                layers.BatchNormalization(name="block1_bn"),
                layers.ReLU(name="block1_relu"),
                *behind,
                layers.Flatten(name="flat"),
                layers.Dense(2, activation="softmax", name="scores"),
            ]
        )
        path = new_folder() / "model.keras"
        model.save(path)
        return path

    def inspect(self, path, *flags, run=run_in_process):
        before = sorted(path.parent.iterdir())
        process = run("inspect_model", str(path), *flags)
        self.assertEqual(sorted(path.parent.iterdir()), before)
        for line in process.stdout.splitlines():
            if path.name not in line:  # a shell may need quotes in the rest
                self.assertLessEqual(len(line), 100, line)
        self.assertNotIn("Traceback", process.stderr)
        return process

    def test_good_model(self):
        self.check_good_model(run_in_process)

    @pytest.mark.long
    def test_good_model_in_a_process(self):
        self.check_good_model(run_tool)

    def check_good_model(self, run):
        flags = ("--input_mean=0", "--input_scale=1/255", "--costs")
        process = self.inspect(self.save(), *flags, run=run)
        self.assertEqual(process.returncode, 0, process.stderr)
        # On a slow machine, how long the steps took.
        lines = re.sub(r"(?m)^[\w .]+: done in \d+ s\n", "", process.stderr)
        self.assertEqual(lines, "")
        for pattern in (
            r"^images +16 x 16 pixels, channels: 3$",
            r"^classes +2$",
            r"^gives +softmax$",
            r"^input .* mean 0, scale 0.00392157$",
            r"^block1_conv +Conv2D +14x14x4 +108 CONV_2D$",
            r"^block1_bn +BatchNormalization +14x14x4 +16 in block1_conv$",
            r"^block1_relu +ReLU +14x14x4 +in block1_conv$",
            r"^scores +Dense +2 +1,570 FULLY_CONNECTED.*$",
            r"^BN layers +1$",
            r"^parameters +1,694$",
            r"^MACs +22,736 for one image$",
            r"^int8 file +about \d kB$",
            r"^DF-Q +about \d+ (seconds|minutes)$",
            r"^DF-REC +about 20 minutes more ",
            r"^DF-QAT-KD +about \d+ (seconds|minutes), ",
            r"^memory +about [\d.]+ GiB at batch_size 128$",
            r"^made +DF-Q by the command below, and DF-REC if ",
            r"^All layers can be quantized.$",
        ):
            self.assertRegex(process.stdout, re.compile(pattern, re.M))

    def test_methods_that_the_next_command_makes_are_named(self):
        cost = costs.Costs(60.0, 1500.0, 2**30, 128, 2)
        lines = inspect_model.expectation(cost, is_exclusive=True)
        self.assertIn("DF-QAT-KD     about 25 minutes, those of DF-Q in it", lines)
        made = " ".join(lines[-1].split())
        self.assertIn("DF-QAT-KD with --methods=df_qat_kd alone", made)
        # From scores each by itself no student learns.
        lines = inspect_model.expectation(cost, is_exclusive=False)
        self.assertStartsWith(lines[2], "DF-QAT-KD     not possible: ")
        self.assertNotIn("df_qat_kd", "".join(lines))

    def test_bad_model(self):
        from dfq_tf.compat import keras

        layers = keras.layers
        path = self.save(
            layers.Softmax(axis=1, name="rows"), layers.Masking(name="masked")
        )
        process = self.inspect(path)
        self.assertEqual(process.returncode, 1)
        self.assertRegex(
            process.stderr, "^error: 2 of 8 layers cannot be quantized; see above$"
        )
        self.assertRegex(process.stdout, r"input +NOT KNOWN: [\s\S]*--input_mean=0")
        self.assertRegex(process.stdout, r"masked +Masking +14x14x4 +NOT POSSIBLE: ")
        self.assertRegex(process.stdout, r"block1_bn .* in block1_conv\n")
        listed = process.stdout[process.stdout.index("Cannot be quantized:") :]
        self.assertRegex(listed, r"  masked \(Masking\): there is no integer form")
        self.assertRegex(listed, r"  rows \(Softmax\): it is over the axis 1")
        self.assertNotIn("DF-Q", process.stdout)

    def test_model_that_does_not_say_its_input_can_be_quantized(self):
        process = self.inspect(self.save())
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertRegex(process.stdout, r"input +NOT KNOWN: [\s\S]*--input_mean=0")
        self.assertNotIn("DF-Q", process.stdout)

    def test_score_and_feeding_that_may_be_anything_are_asked_for(self):
        from dfq_tf.compat import keras

        layers = keras.layers
        path = new_folder() / "model.keras"
        keras.Sequential(
            [layers.Rescaling(1 / 255, input_shape=(8, 8, 3)), layers.Flatten()]
            + [layers.Dense(1)]
        ).save(path)
        process = self.inspect(path)
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertRegex(process.stdout, r"gives +NOT KNOWN: one score [^\n]*--output=")
        last = process.stdout.splitlines()[-1]
        self.assertEndsWith(last, f"--teacher={path} --output=logits")

        process = self.inspect(path, "--feeding=0..1")
        self.assertEqual(process.returncode, 2)
        self.assertRegex(process.stderr, "^error: .*: both would apply")
        process = self.inspect(path, "--feeding=0..1", "--input_on_top")
        self.assertRegex(process.stdout, "input .*scale 1.53787e-05")
        self.assertIn("--input_on_top", process.stdout.splitlines()[-1])

    def test_preprocessing_of_other_numbers_than_pixels_has_something_before_it(self):
        from dfq_tf.compat import keras

        layers = keras.layers
        path = new_folder() / "model.keras"
        keras.Sequential(
            [layers.Rescaling(2.0, -1.0, input_shape=(8, 8, 3)), layers.Flatten()]
            + [layers.Dense(3)]
        ).save(path)
        process = self.inspect(path)
        self.assertRegex(
            process.stdout,
            r"input +NOT KNOWN: its own [\s\S]* --input_on_top if it was",
        )
        flags = shlex.split(process.stdout.splitlines()[-1])[2:]
        process = self.inspect(path, *flags[1:])
        self.assertRegex(process.stdout, "input .*mean 127.5, scale 0.00784314")

    def test_what_to_type_next_can_be_pasted(self):
        folder = new_folder() / "it's mine"
        folder.mkdir()
        path = self.save().rename(folder / "a model.keras")
        labels = folder / "the labels.txt"
        labels.write_text("cat\ndog\n")
        named = (f"--labels={labels}", "--input_scale=1/127.5", "--input_mean=127.5")
        fed = {"--input_mean=0", "--input_scale=1/255"}
        for flags, more in ((named, set()), ((), fed)):
            process = self.inspect(path, *flags)
            self.assertEqual(process.returncode, 0, process.stderr)
            python, tool, *given = shlex.split(process.stdout.splitlines()[-1])
            self.assertTrue(os.path.samefile(ROOT / python, sys.executable))
            self.assertTrue(os.path.samefile(ROOT / tool, ROOT / "tools/run.py"))
            self.assertEqual({*given}, {f"--teacher={path}", *flags, *more})
            # All is read, and refused for what comes next.
            process = run_in_process("run", *given, f"--workdir={path}/run")
            self.assertRegex(process.stderr, r"\Aerror: workdir is .*cannot be written")

    def test_wrong_arguments_are_one_message(self):
        file = new_folder() / "flags.cfg"
        file.write_text("--teacher=c.keras\n")
        for exit_code, flags, message in (
            (2, [], "teacher is empty; name a model file"),
            (2, ["a.keras", "b.keras"], "unexpected argument 'b.keras'"),
            (2, ["a.keras", "--teacher=b.keras"], "teacher is given twice: 'a.keras'"),
            (1, ["absent.keras"], "there is no model file absent.keras"),
            (1, [f"--flagfile={file}", "absent.keras"], ".* no model file absent"),
            (1, ["absent.keras", f"--flagfile={file}"], ".* no model file absent"),
            (2, ["a.keras", "--teacher", "b.keras"], "teacher is given twice"),
            (2, ["a.keras", "--image_size=3"], "image_size is '3'; give height and"),
        ):
            process = run_in_process("inspect_model", *flags)
            self.assertEqual(process.returncode, exit_code, process.stderr)
            self.assertRegex(process.stderr, f"^error: {message}")
            self.assertNotIn("Traceback", process.stderr)
            self.assertEqual(process.stdout, "")


class HelpTest(parameterized.TestCase, tf.test.TestCase):
    def flags(self, tool, form):
        """Name and explanation of each flag that the help shows, under a heading."""
        process = run_in_process(tool, form)
        self.assertEqual(process.returncode, 0, process.stderr)
        _, *groups = re.split(r"^(?=[A-Z][\w ,()-]+:$)", process.stdout, flags=re.M)
        self.assertNotEmpty(groups)
        found = re.findall(r"^  --(\w+).*\n +(\S.*)", process.stdout, re.MULTILINE)
        self.assertLen(dict(found), len(found))
        return dict(found)

    @parameterized.parameters(*TOOLS)
    def test_help_groups_and_explains_every_flag(self, tool):
        first, full = (self.flags(tool, form) for form in ("--help", "--helpfull"))
        of_training = {"seed", "precision"}
        if tool in ("convert", "evaluate", "layer_noise", "inspect_model"):
            self.assertNoCommonElements(of_training, full)
            self.assertIn("student" if tool == "convert" else "teacher", first)
        else:
            self.assertContainsSubset(of_training, first)
        self.assertContainsSubset(first.items(), full.items())
        for name, text in full.items():
            self.assertGreater(len(text), 10, name)

    @parameterized.parameters(*TOOLS)
    def test_first_help_can_be_taken_in(self, tool):
        self.assertLessEqual(len(self.flags(tool, "--help")), 30)
        process = run_in_process(tool, "--help")
        hidden = len(self.flags(tool, "--helpfull")) - len(self.flags(tool, "--help"))
        (line,) = re.findall(r"--helpfull shows (\d+) more", process.stdout) or ["0"]
        self.assertEqual(int(line), hidden)

    @parameterized.parameters(*TOOLS)
    def test_lines_of_stages_can_be_turned_off(self, tool):
        self.assertIn("progress", self.flags(tool, "--helpfull"))

    def test_run_accepts_what_only_the_full_help_shows(self):
        full = self.flags("run", "--helpfull")
        for name in ("alpha", "temperature", "qat_student_learning_rate", "allow_code"):
            self.assertNotIn(name, self.flags("run", "--help"))
            self.assertIn(name, full)
        # Those of its stages that are seldom changed are theirs alone.
        self.assertNotIn("teacher_weight_decay", full)
        teacher = self.flags("train_teacher", "--help")
        self.assertIn("teacher_weight_decay", teacher)


class DocumentsTest(tf.test.TestCase):
    """Commands in the documents name tools, flags and files that exist."""

    def test_commands_parse(self):
        documents = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
        documents += [*ROOT.glob("students/*.md"), *ROOT.glob("teachers/*.md")]
        documents += ROOT.glob("tools/flagfiles/*.cfg")
        commands = [
            (path.name, shlex.split(match.replace("\\\n", " ")))
            for path in documents
            for match in re.findall(
                r"python (tools/(?:[^\n`]|(?<=\\)\n)+)", path.read_text()
            )
        ]
        self.assertGreater(len(commands), 5)
        known = {}
        for document, (tool, *flags) in commands:
            self.assertTrue((ROOT / tool).exists(), f"{document}: {tool}")
            if tool not in known:
                text = run_in_process(pathlib.Path(tool).stem, "--helpfull").stdout
                known[tool] = set(re.findall(r"^  --(\w+)", text, re.M)) | {"flagfile"}
            if tool == "tools/inspect_model.py":
                model, *flags = flags  # its model needs no --
                self.assertEndsWith(model, ".keras")
            if tool == "tools/report.py":
                flags = [flag for flag in flags if flag.startswith("--")]  # folders
            for flag in flags:
                name, _, value = flag.lstrip("-").partition("=")
                name = name.removeprefix("no") if name not in known[tool] else name
                self.assertIn(name, known[tool], f"{document}: {tool} {flag}")
                if name == "flagfile":
                    self.assertTrue((ROOT / value).exists(), f"{document}: {value}")

    def test_links_lead_somewhere(self):
        """Each file is there, and each heading, by the names that GitHub gives them."""

        def names_of_headings(path):
            text = re.sub(r"(?ms)^```.*?^```", "", path.read_text())
            titles = re.findall(r"(?m)^#+ (.+)$", text)
            titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in titles]
            plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
            return [title.replace(" ", "-") for title in plain]

        pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        pages += [*ROOT.glob("students/*.md"), *ROOT.glob("teachers/*.md")]
        links = [
            (page, target, anchor)
            for page in pages
            for target, _, anchor in re.findall(
                r"\]\(([^)\s#:]*)(#([^)\s]+))?\)", page.read_text()
            )
        ]
        self.assertGreater(len(links), 80)
        for page, target, anchor in links:
            file = page.parent / target if target else page
            self.assertTrue(file.exists(), f"{page.name}: {target}")
            if anchor:
                found = names_of_headings(file)
                self.assertIn(anchor, found, f"{page.name}: {target}")

    @pytest.mark.long
    def test_python_examples_run(self):
        import dfq_tf

        def examples_of(path):
            return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)

        (own_model,) = examples_of(ROOT / "README.md")  # own_model_test runs it
        self.assertIn("my_model", own_model)
        documents = [ROOT / f"docs/{name}.md" for name in ("own_model", "distillation")]
        examples = [code for path in documents for code in examples_of(path)]
        self.assertLen(examples, 3)
        folder = new_folder()
        (folder / "teachers").symlink_to(ROOT / "teachers")
        np.save(folder / "my_images.npy", np.zeros((2, 32, 32, 3), np.uint8))
        np.save(folder / "my_labels.npy", np.array([0, 1]))
        config = dfq_tf.DistillationConfig(batch_size=8, warm_up_steps=2, rounds=1)
        distill = functools.partial(dfq_tf.distill, config=config, show_progress=False)
        quantize = functools.partial(
            dfq_tf.quantize,
            config=config,
            calibration=dfq_tf.CalibrationConfig(calibration_images=8),
            show_progress=False,
        )
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        scope = {}
        with mock.patch.multiple(dfq_tf, quantize=quantize, distill=distill):
            for code in examples:
                exec(compile(code, "docs", "exec"), scope)
        self.assertLess(
            len(scope["quantized"].tflite), (folder / "model.tflite").stat().st_size
        )
        model = dfq_tf.TFLiteClassifier((folder / "model.tflite").read_bytes())
        self.assertEqual(model.image_shape, (32, 32, 3))
        self.assertEqual(model.num_classes, 10)

    def test_flags_in_flagfiles_exist(self):
        known = {
            tool: set(
                re.findall(
                    r"^  --(\w+)", run_in_process(tool, "--helpfull").stdout, re.M
                )
            )
            for tool in ("run", "compare")
        }
        for path in ROOT.glob("tools/flagfiles/*.cfg"):
            (tool,) = set(re.findall(r"python tools/(\w+)\.py", path.read_text()))
            for flag in shlex.split(path.read_text(), comments=True):
                self.assertIn(flag[2:].split("=")[0], known[tool], path.name)


if __name__ == "__main__":
    tf.test.main()
