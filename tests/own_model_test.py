"""README's first example, unchanged, on a model that a user might bring."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import dfq_tf
from dfq_tf.compat import keras3, tf
from dfq_tf.with_data import datasets
from dfq_tf.with_data.datasets import accuracy
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EPOCHS = 30
# How far an integer file may be from the float model, as a share of the test images.
TOLERANCE = 0.005


def trained_model(split):
    """A Keras 3 classifier of digits, trained by plain `fit`."""
    K = keras3()
    layers = K.layers
    K.utils.set_random_seed(0)
    links = [layers.Input((8, 8, 1)), layers.RandomTranslation(0.1, 0.1)]
    links.append(layers.Rescaling(1 / 255))
    for filters, strides in ((16, 1), (32, 2), (64, 2)):
        links.append(layers.Conv2D(filters, 3, strides, "same", use_bias=False))
        links += [layers.BatchNormalization(), layers.ReLU()]
    links += [layers.GlobalAveragePooling2D(), layers.Dropout(0.2)]
    links.append(layers.Dense(10, activation="softmax"))
    model = K.Sequential(links)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(split.images, split.labels, epochs=EPOCHS, batch_size=64, verbose=0)
    return model


@pytest.mark.long
class OwnModelTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        digits = datasets.open_dataset("digits")
        cls.test = digits.load("test")
        cls.folder = helpers.new_folder()
        model = trained_model(digits.load("train"))
        model.save(cls.folder / "my_model.keras")
        names = [f"digit {name}" for name in digits.class_names]
        (cls.folder / "my_labels.txt").write_text("\n".join(names) + "\n")
        scores = model.predict(cls.test.images, verbose=0)
        cls.accuracy = accuracy(scores, cls.test.labels)

    def assertAccurate(self, path):
        scores = dfq_tf.TFLiteClassifier(path.read_bytes()).scores(self.test.images)
        share = accuracy(scores, self.test.labels)
        self.assertGreaterEqual(share, self.accuracy - TOLERANCE, path.name)

    def test_model_is_worth_something(self):
        self.assertGreater(self.accuracy, 0.95)

    def test_python_example(self):
        code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
        self.assertEqual(len(code.splitlines()), 8)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        scope: dict = {}
        exec(compile(code, "README.md", "exec"), scope)
        self.assertAccurate(self.folder / "my_model.tflite")

    def test_command(self):
        command = re.search(r"^    (\S+ tools/run.py --teacher=my_.*)$", README, re.M)
        _, tool, *flags = shlex.split(command.group(1))
        process = subprocess.run(
            [sys.executable, ROOT / tool, *flags],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        # By itself the tool trains nothing where DF-Q is expected to do.
        made = [path.name for path in (self.folder / "runs/run").glob("*.tflite")]
        self.assertEqual(made, ["df_q.tflite"])
        self.assertAccurate(self.folder / "runs/run/df_q.tflite")
        labels = (self.folder / "runs/run/labels.txt").read_text().splitlines()
        self.assertEqual(labels, [f"digit {i}" for i in range(10)])
        self.assertIn("DF-Q W8A8", process.stdout)


if __name__ == "__main__":
    tf.test.main()
