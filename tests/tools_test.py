"""The tools as a user meets them: processes, exit codes, messages, files."""

import functools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = ROOT / "tools/flagfiles/smoke.cfg"
TOOLS = ("run", "train_teacher", "quantize", "convert", "evaluate", "benchmark")


def run_tool(name, *flags, timeout=300):
    return subprocess.run(
        [sys.executable, ROOT / f"tools/{name}.py", *flags],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def new_folder():
    return pathlib.Path(tempfile.mkdtemp(prefix="dfq_tf_"))


class RunTest(tf.test.TestCase):
    """One run of everything, and what may be done with it afterwards."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.workdir = new_folder() / "run"
        cls.flags = (f"--flagfile={SMOKE}", f"--workdir={cls.workdir}")
        cls.process = run_tool("run", *cls.flags)

    def test_run_ends_with_table_and_files(self):
        self.assertEqual(self.process.returncode, 0, self.process.stderr)
        for title in ("teacher float", "DF-Q int8", "DF-QAT-KD int8"):
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
            if line.strip() and not re.match(r"(teacher|warm_up|distillation): ", line)
        ]
        self.assertEqual(others, [])

    def test_table_is_metrics_of_the_written_files(self):
        from dfq_tf import TFLiteClassifier, data

        metrics = json.loads((self.workdir / "metrics.json").read_text())
        test = data.open_dataset("digits").load("test")
        for method in ("df_q", "df_qat_kd"):
            content = (self.workdir / f"{method}.tflite").read_bytes()
            predictions = TFLiteClassifier(content).scores(test.images).argmax(-1)
            accuracy = np.mean(predictions == test.labels)
            self.assertAlmostEqual(metrics[method]["accuracy"], accuracy)
            self.assertEqual(metrics[method]["bytes"], len(content))
            self.assertIn(f"{100 * accuracy:.2f} %", self.process.stdout)

    def test_labels_are_class_names_in_order(self):
        labels = (self.workdir / "labels.txt").read_text().split()
        self.assertEqual(labels, list("0123456789"))

    def test_same_command_again_trains_nothing_and_changes_no_model(self):
        before = {
            p: p.read_bytes()
            for pattern in ("*.tflite", "*.keras")
            for p in self.workdir.glob(pattern)
        }
        again = run_tool("run", *self.flags)
        self.assertEqual(again.returncode, 0, again.stderr)
        self.assertNotIn("step/s", again.stderr)
        self.assertEqual(before, {p: p.read_bytes() for p in before})

    def test_other_flags_in_same_workdir_are_refused_with_the_difference(self):
        flags_before = (self.workdir / "flags.cfg").read_text()
        other = run_tool("run", *self.flags, "--warm_up_steps=5")
        self.assertEqual(other.returncode, 1)
        self.assertIn("--warm_up_steps: 4 -> 5", other.stderr)
        self.assertNotIn("Traceback", other.stderr)
        self.assertEqual((self.workdir / "flags.cfg").read_text(), flags_before)

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
        process = run_tool(
            "quantize",
            *flags,
            f"--teacher={self.workdir}/teacher.keras",
            "--method=df_q",
            f"--workdir={folder}",
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        process = run_tool("convert", f"--student={folder}/df_q.keras")
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertEqual(
            (folder / "df_q.tflite").read_bytes(),
            (self.workdir / "df_q.tflite").read_bytes(),
        )
        process = run_tool(
            "evaluate",
            f"--model={folder}/df_q.tflite",
            f"--teacher={self.workdir}/teacher.keras",
            "--dataset=digits",
        )
        metrics = json.loads((self.workdir / "metrics.json").read_text())["df_q"]
        self.assertIn(f"Accuracy: {100 * metrics['accuracy']:.2f} %", process.stdout)
        self.assertIn(f"teacher: {100 * metrics['agreement']:.2f} %", process.stdout)


class BadInputTest(parameterized.TestCase, tf.test.TestCase):
    """Each is one message and an exit code, and writes nothing."""

    @parameterized.parameters(
        ("run", 2, ["--dataset=digits"], "teacher is empty"),
        ("run", 2, ["--teacher=vgg_99"], "teacher is 'vgg_99'.*wrn_DEPTH_WIDTH"),
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
        ("run", 2, ["--batch_size=x"], "batch_size"),
        ("run", 2, ["--warm_up_steps=-1"], "warm_up_steps is -1.*at least 0"),
        ("run", 2, ["--batch_size=0"], "batch_size is 0.*at least 1"),
        ("run", 2, ["--num_bits_weight=9"], "num_bits_weight is 9.*at most 8"),
        ("run", 2, ["--num_bits_weight=4"], "num_bits_weight is 4.*only 8 and 8"),
        ("run", 2, ["--precision=int3"], "precision is 'int3'.*bfloat16"),
        ("run", 2, ["--student_learning_rate=nan"], "student_learning_rate is nan"),
        ("run", 2, ["--methods=df_q,magic"], "method is 'magic'.*df_qat_kd"),
        (
            "run",
            2,
            ["--yardstick", "--teacher=wrn_10_1"],
            "yardstick needs real images",
        ),
        ("quantize", 2, [], "teacher is empty"),
        ("convert", 2, [], "student is empty"),
        ("convert", 1, ["--student=absent.keras"], "no model file absent.keras"),
        ("evaluate", 1, ["--model=absent.tflite"], "no model file absent.tflite"),
        ("evaluate", 2, ["stray"], "unexpected argument 'stray'"),
    )
    def test_bad_input_is_one_message(self, tool, exit_code, flags, message):
        workdir = new_folder() / "run"
        process = run_tool(tool, *flags, f"--workdir={workdir}")
        self.assertEqual(process.returncode, exit_code, process.stderr)
        self.assertRegex(process.stderr, r"^error: ")
        self.assertRegex(process.stderr, f"(?s){message}")
        self.assertNotIn("Traceback", process.stderr)
        self.assertFalse(workdir.exists())

    def test_workdir_that_cannot_be_written_is_one_message(self):
        in_the_way = new_folder() / "file"
        in_the_way.touch()
        process = run_tool("run", f"--flagfile={SMOKE}", f"--workdir={in_the_way}/run")
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr, "^error: workdir is .*cannot be written")

    def test_teacher_that_does_not_fit_the_data_is_one_message(self):
        from dfq_tf import Classifier, ModelDescription
        from dfq_tf.models import build_model

        folder = new_folder()
        for shape, classes, message in (
            ((8, 8, 1), 7, "the model has 7 classes, but dataset digits has 10"),
            ((16, 16, 1), 10, r"the model takes images of \(16, 16, 1\), but those"),
        ):
            names = tuple(map(str, range(classes)))
            description = ModelDescription((0,), (1 / 255,), "logits", names)
            teacher = Classifier(build_model("wrn_10_1", shape, classes), description)
            teacher.save(folder / "teacher.keras")
            process = run_tool(
                "run",
                f"--teacher={folder}/teacher.keras",
                "--dataset=digits",
                f"--workdir={folder}/run",
            )
            self.assertEqual(process.returncode, 1)
            self.assertRegex(process.stderr, message)
            self.assertFalse((folder / "run").exists())

    def test_float_student_is_refused_by_convert(self):
        from dfq_tf import Classifier, ModelDescription
        from dfq_tf.models import build_model

        folder = new_folder()
        description = ModelDescription((0,), (1,), "logits", tuple("01"))
        model = build_model("wrn_10_1", (8, 8, 1), 2)
        Classifier(model, description).save(folder / "float.keras")
        process = run_tool("convert", f"--student={folder}/float.keras")
        self.assertEqual(process.returncode, 1)
        self.assertRegex(process.stderr, "^error: the student is a float model")
        self.assertFalse((folder / "float.tflite").exists())


class HelpTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*TOOLS)
    def test_help_groups_and_explains_every_flag(self, tool):
        process = run_tool(tool, "--help")
        self.assertEqual(process.returncode, 0, process.stderr)
        _, *groups = re.split(r"^(?=[A-Z][\w ,-]+:$)", process.stdout, flags=re.M)
        self.assertNotEmpty(groups)
        flags = re.findall(r"^  --(\w+).*\n +(\S.*)", process.stdout, re.MULTILINE)
        self.assertContainsSubset({"seed", "precision"}, dict(flags))
        for name, text in flags:
            self.assertGreater(len(text), 10, name)


class DocumentsTest(tf.test.TestCase):
    """Commands in the documents name tools, flags and files that exist."""

    def test_commands_parse(self):
        documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
        documents += ROOT.glob("teachers/*.md")
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
                text = run_tool(pathlib.Path(tool).stem, "--help").stdout
                known[tool] = set(re.findall(r"^  --(\w+)", text, re.M)) | {"flagfile"}
            for flag in flags:
                name, _, value = flag.lstrip("-").partition("=")
                name = name.removeprefix("no") if name not in known[tool] else name
                self.assertIn(name, known[tool], f"{document}: {tool} {flag}")
                if name == "flagfile":
                    self.assertTrue((ROOT / value).exists(), f"{document}: {value}")

    def test_python_example_of_readme_runs(self):
        import dfq_tf

        (code,) = re.findall(
            r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
        )
        folder = new_folder()
        (folder / "teachers").symlink_to(ROOT / "teachers")
        few_steps = functools.partial(
            dfq_tf.quantize,
            config=dfq_tf.DistillationConfig(
                batch_size=8, warm_up_steps=2, calibration_images=8
            ),
            show_progress=False,
        )
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder)
        with mock.patch.object(dfq_tf, "quantize", few_steps):
            exec(compile(code, "README.md", "exec"), {})
        model = dfq_tf.TFLiteClassifier((folder / "model.tflite").read_bytes())
        self.assertEqual(model.image_shape, (32, 32, 3))
        self.assertEqual(model.num_classes, 10)

    def test_flags_in_flagfiles_exist(self):
        text = run_tool("run", "--help").stdout
        known = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
        for path in ROOT.glob("tools/flagfiles/*.cfg"):
            for flag in shlex.split(path.read_text(), comments=True):
                self.assertIn(flag[2:].split("=")[0], known, path.name)


if __name__ == "__main__":
    tf.test.main()
