import os
import platform
import subprocess
import sys
import unittest

import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class EnvironmentTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((None, "1"), ("0", "0"))
    @unittest.skipUnless(_IS_X86, "oneDNN is set on x86 processors alone")
    def test_onednn_is_on_unless_the_user_says_no(self, before, after):
        name = "TF_ENABLE_ONEDNN_OPTS"
        others = {key: value for key, value in os.environ.items() if key != name}
        # TensorFlow must find it when it is imported, not only afterwards.
        script = (
            "import builtins, os; load = builtins.__import__\n"
            "def watched(module, *args, **kwargs):\n"
            "    if module == 'tensorflow':\n"
            f"        print(os.environ.get('{name}')); os._exit(0)\n"
            "    return load(module, *args, **kwargs)\n"
            "builtins.__import__ = watched\n"
            "import dfq_tf"
        )
        process = subprocess.run(
            [sys.executable, "-u", "-c", script],
            env=others if before is None else {**others, name: before},
            capture_output=True,
            text=True,
        )
        self.assertEqual(process.stdout.strip(), after, process.stderr)

    def test_keras_3_stays_keras_3_for_the_rest_of_the_program(self):
        self.check_keras_3("dfq_tf", False)

    @pytest.mark.long
    def test_so_does_one_that_is_there_before(self):
        self.check_keras_3("keras", True)

    def check_keras_3(self, first, is_there):
        script = (
            f"import os, sys, {first}\n"
            "import dfq_tf\n"
            "print('keras' in sys.modules)\n"
            "import keras, tensorflow as tf\n"
            "from tensorflow.keras import layers\n"
            "model = keras.Sequential([keras.Input((4,)), tf.keras.layers.Dense(2)])\n"
            "print(keras.__version__[0], tf.keras.version()[0], model.count_params(),"
            " os.environ.get('TF_USE_LEGACY_KERAS'), layers is tf.keras.layers,"
            " tf.keras.layers.Dense is keras.layers.Dense)"
        )
        others = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
        process = subprocess.run(
            [sys.executable, "-c", script], env=others, capture_output=True, text=True
        )
        expected = [str(is_there), "3", "3", "10", "None", "True", "True"]
        self.assertEqual(process.stdout.split(), expected, process.stderr)


if __name__ == "__main__":
    tf.test.main()
