"""The command dfq-tf, and what an installed package holds and needs."""

import re
import subprocess
import sys
import zipfile

import pytest
from absl.testing import absltest, parameterized

import dfq_tf_command
from tests.helpers import new_folder
from tests.tool_runner import ROOT, run_in_process

# What is loaded only where it is used: for data sets, charts, scalars and pages.
OPTIONAL = ("tensorflow_datasets", "matplotlib", "tensorboard", "jinja2", "sklearn")


def run(*arguments, code=None):
    """Runs the command in a process, or some Python."""
    start = ["-c", code] if code else ["-m", "dfq_tf_command"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )


class CommandTest(parameterized.TestCase):
    def test_help_has_a_line_for_each_subcommand_which_is_a_tool(self):
        text = dfq_tf_command.help_text()
        for name, tool in dfq_tf_command.SUBCOMMANDS.items():
            self.assertRegex(text, rf"(?m)^  {name} +[A-Z].+\.$")
            self.assertTrue((ROOT / f"tools/{tool}.py").is_file(), tool)
        documents = (ROOT / "docs/cli.md").read_text()
        self.assertIn("dfq-tf", documents)
        for name in re.findall(r"^ +dfq-tf (\w+)", documents, re.M):
            self.assertIn(name, dfq_tf_command.SUBCOMMANDS)

    def test_versions_are_those_of_the_packages(self):
        import numpy
        import tensorflow

        import dfq_tf

        lines = dfq_tf_command.versions().splitlines()
        self.assertEqual(lines[0], f"dfq_tf {dfq_tf.__version__}")
        self.assertIn(f"tensorflow {tensorflow.__version__}", lines)
        self.assertIn(f"numpy {numpy.__version__}", lines)

    def test_help_and_versions_do_not_wait_for_tensorflow(self):
        code = (
            "import sys, dfq_tf_command as c; c.help_text(); c.versions();"
            "print([m for m in ('tensorflow', 'dfq_tf', 'numpy') if m in sys.modules])"
        )
        self.assertEqual(run(code=code).stdout.strip(), "[]")

    def test_unknown_subcommand_is_one_message(self):
        process = run("qantize")
        self.assertEqual(process.returncode, 2)
        self.assertStartsWith(process.stderr, "error: 'qantize' is no subcommand;")
        self.assertIn("quantize", process.stderr)

    def test_subcommand_is_the_tool(self):
        """With the model's name alone."""
        path = ROOT / "dfq_tf_command/__main__.py"
        flags = ("absent.keras", "--workdir=absent/run")
        process = run_in_process(path, "run", *flags)
        self.assertEqual(process.returncode, 1)
        self.assertEqual(process.stderr, "error: there is no model file absent.keras\n")


class PackageTest(absltest.TestCase):
    @pytest.mark.long
    def test_quantizing_needs_nothing_optional(self):
        """None of it can be imported in the process."""
        code = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
import dfq_tf
from tests.graphs import Sketch

sketch = Sketch(pixels=False)
sketch.conv("conv")
sketch.normalization("bn")
sketch("relu", "relu")
sketch("global_average_pool", "pool")
sketch.dense("logits", outputs=4)
made = dfq_tf.quantize(
    sketch.classifier(output="logits"),
    method="df_q",
    config=dfq_tf.DistillationConfig(batch_size=8, warm_up_steps=1),
    calibration=dfq_tf.CalibrationConfig(calibration_images=8),
    show_progress=False,
)
print(len(made.tflite), [m for m in {OPTIONAL} if m in sys.modules])
"""
        process = run(code=code)
        self.assertRegex(process.stdout, r"^[1-9]\d+ \[\]$", process.stderr)

    @pytest.mark.long
    def test_wheel_holds_the_command_its_tools_and_the_templates(self):
        folder = new_folder()
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w"]
        subprocess.run([*build, str(folder), str(ROOT)], check=True, timeout=300)
        (path,) = folder.glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
        tops = {name.split("/")[0] for name in names}
        self.assertEqual(
            {top for top in tops if not top.endswith(".dist-info")},
            {"dfq_tf", "dfq_tf_command"},
        )
        wanted = {
            f"dfq_tf_command/tools/{path.name}" for path in ROOT.glob("tools/*.py")
        }
        for pattern in ("dfq_tf/**/*.py", "dfq_tf/**/*.tsv", "dfq_tf/**/templates/*"):
            wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        self.assertEmpty(wanted - names)

    def test_lock_is_within_the_ranges(self):
        """What the tests run on is what the package asks for."""
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        text = (ROOT / "pyproject.toml").read_text()
        listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]
        extras = re.search(r"^\[project.optional.*?(?=^\[)", text, re.M | re.S)[0]
        ranges = {}
        for item in re.findall(r'"([\w-]+[^"]*)"', listed + extras):
            ranges[canonicalize_name(Requirement(item).name)] = Requirement(item)
        locked = [
            Requirement(line)
            for line in (ROOT / "requirements.txt").read_text().splitlines()
            if line and not line.startswith("#")
        ]
        self.assertGreater(len(locked), 10)
        for each in locked:
            name = canonicalize_name(each.name)
            if name in ranges:
                (version,) = [spec.version for spec in each.specifier]
                self.assertIn(version, ranges[name].specifier, name)
        names = {canonicalize_name(each.name) for each in locked}
        dev = {"ipykernel", "mypy", "nbclient", "pytest", "pytest-xdist", "requests"}
        dev |= {"ruff", "selenium"}
        self.assertEmpty(ranges.keys() - names - dev)

    def test_gpu_page_names_the_locked_version(self):
        lock = (ROOT / "requirements.txt").read_text()
        (version,) = re.findall(r"(?m)^tensorflow==(\S+)$", lock)
        page = (ROOT / "docs/devices.md").read_text()
        self.assertIn(f"'tensorflow[and-cuda]=={version}'", page)


if __name__ == "__main__":
    absltest.main()
