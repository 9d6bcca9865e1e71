"""The examples use public names alone, and do what they say."""

import ast
import functools
import json
import os
import runpy
import sys
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

import dfq_tf
from tests import helpers
from tests.tool_runner import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
NOTEBOOK = "quantize.ipynb"
# What a user has who has installed the package, and for the notebook its extra `data`.
INSTALLED = {"dfq_tf", "keras", "numpy", "pathlib", "sys", "tf_keras"}


def code_of(name):
    """The Python of a script, or of all cells of the notebook."""
    text = (FOLDER / name).read_text()
    if name.endswith(".py"):
        return text
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def imported(tree):
    """Top names of the packages that are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


class ExamplesTest(parameterized.TestCase):
    @parameterized.parameters(*SCRIPTS, NOTEBOOK)
    def test_only_public_names_are_used(self, name):
        tree = ast.parse(code_of(name))
        used = {
            node.attr: node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "dfq_tf"
        }
        self.assertNotEmpty(used)
        self.assertContainsSubset(set(used), set(dfq_tf.__all__))
        more = {"sklearn"} if name == NOTEBOOK else set()
        self.assertContainsSubset(set(imported(tree)), INSTALLED | more)

    @parameterized.parameters(*SCRIPTS)
    def test_script_says_how_it_is_called(self, name):
        said = ast.get_docstring(ast.parse(code_of(name)))
        self.assertIn(f"\n    python examples/{name} my_model.keras ", said)

    def test_documents_name_all_of_them(self):
        text = (ROOT / "docs/own_model.md").read_text()
        for name in (*SCRIPTS, NOTEBOOK):
            self.assertIn(f"examples/{name}", text)

    def test_notebook_holds_no_outputs(self):
        for cell in json.loads((FOLDER / NOTEBOOK).read_text())["cells"]:
            self.assertEmpty(cell.get("outputs", []))


@pytest.mark.long
class RunTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = helpers.new_folder()
        helpers.small_learner((8, 8, 3)).save(cls.folder / "my_model.keras")

    def run_script(self, name, target):
        config = dfq_tf.DistillationConfig(batch_size=8, warm_up_steps=2, rounds=1)
        calibration = dfq_tf.CalibrationConfig(calibration_images=8)
        few = dict(config=config, show_progress=False)
        short = dict(
            quantize=functools.partial(dfq_tf.quantize, calibration=calibration, **few),
            distill=functools.partial(dfq_tf.distill, **few),
        )
        source = str(self.folder / "my_model.keras")
        with (
            helpers.eagerly(),
            mock.patch.multiple(dfq_tf, **short),
            mock.patch.object(sys, "argv", [name, source, str(target)]),
        ):
            runpy.run_path(str(FOLDER / name), run_name="__main__")

    def test_scripts_write_and_check_files(self):
        sizes = {}
        for name in ("own_model.py", "four_bits.py", "smaller_network.py"):
            target = self.folder / f"{name}.tflite"
            self.run_script(name, target)
            sizes[name] = target.stat().st_size
            file = dfq_tf.TFLiteClassifier(target.read_bytes())
            self.assertEqual(file.image_shape, (8, 8, 3))
        self.assertLess(sizes["four_bits.py"], sizes["own_model.py"])
        with mock.patch("builtins.print") as printed:
            self.run_script("check_file.py", self.folder / "own_model.py.tflite")
        ((first,), _), _ = printed.call_args_list
        self.assertRegex(first, r"answers as .* on (2[5-9]|3[0-2]) of 32 random images")

    def test_notebook_runs_and_its_file_answers_as_the_model(self):
        import nbclient
        import nbformat

        notebook = nbformat.read(FOLDER / NOTEBOOK, as_version=4)
        environment = {"PYTHONPATH": str(ROOT)}
        with mock.patch.dict(os.environ, environment):
            nbclient.NotebookClient(
                notebook,
                timeout=600,
                kernel_name="python3",
                resources={"metadata": {"path": str(self.folder)}},
            ).execute()
        said = "".join(
            "".join(output.get("text", ""))
            for cell in notebook.cells
            for output in cell.get("outputs", [])
        )
        self.assertRegex(said, r"float: 9\d\.\d % of 360 test images")
        self.assertRegex(said, r"int8: 9\d\.\d % of 360 test images")
        self.assertRegex(said, r"the same answer: (9[5-9]|100)\.\d %")
        self.assertTrue((self.folder / "digits.tflite").is_file())


if __name__ == "__main__":
    absltest.main()
