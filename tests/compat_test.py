import gc
import os
import platform
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

import pytest
from absl.testing import parameterized

from dfq_tf.compat import gpu_names, native_output_hidden, no_garbage_collection, tf

_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
KERAS, ONEDNN = "TF_USE_LEGACY_KERAS", "TF_ENABLE_ONEDNN_OPTS"
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
# What TensorFlow and the packages that it imports set for themselves.
OF_TENSORFLOW = (
    "ENABLE_RUNTIME_UPTIME_TELEMETRY",
    "HDF5_PLUGIN_PATH",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "TF2_BEHAVIOR",
    "TPU_ML_PLATFORM",
    "TPU_ML_PLATFORM_VERSION",
)


def without(*names):
    """The environment without these variables."""
    return {key: value for key, value in os.environ.items() if key not in names}


class EnvironmentTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((None, "1"), ("0", "0"))
    @unittest.skipUnless(_IS_X86, "oneDNN is set on x86 processors alone")
    def test_onednn_is_on_unless_the_user_says_no(self, before, after):
        """TensorFlow finds it when it is imported, and its log level as it was."""
        others = without(ONEDNN, LOG_LEVEL)
        script = (
            "import builtins, os; load = builtins.__import__\n"
            "def watched(module, *args, **kwargs):\n"
            "    if module == 'tensorflow':\n"
            f"        print(*map(os.environ.get, {(ONEDNN, LOG_LEVEL)}))\n"
            "        os._exit(0)\n"
            "    return load(module, *args, **kwargs)\n"
            "builtins.__import__ = watched\n"
            "import dfq_tf"
        )
        process = subprocess.run(
            [sys.executable, "-u", "-c", script],
            env=others if before is None else {**others, ONEDNN: before},
            capture_output=True,
            text=True,
        )
        self.assertEqual(process.stdout.split(), [after, "None"], process.stderr)

    def test_importing_leaves_no_trace_and_keras_3_is_keras_3(self):
        """In variables, log levels and paths, nothing but what TensorFlow does."""
        self.check_keras_3("dfq_tf", False)

    @pytest.mark.long
    def test_so_does_one_that_is_there_before(self):
        self.check_keras_3("keras", True)

    def check_keras_3(self, first, is_there):
        script = (
            f"import gc, logging, os, sys, {first}\n"
            "def state():\n"
            "    levels = [logging.getLogger(n).level for n in ('', 'tensorflow')]\n"
            "    return levels, sys.path[:], os.getcwd(), gc.isenabled()\n"
            "environment, others = set(os.environ.items()), state()\n"
            "import dfq_tf\n"
            "changed = {n for n, _ in environment ^ set(os.environ.items())}\n"
            f"print(changed <= set({OF_TENSORFLOW}), state() == others)\n"
            "print('keras' in sys.modules)\n"
            "import keras, tensorflow as tf\n"
            "from tensorflow.keras import layers\n"
            "model = keras.Sequential([keras.Input((4,)), tf.keras.layers.Dense(2)])\n"
            "print(keras.__version__[0], tf.keras.version()[0], model.count_params(),"
            " os.environ.get('TF_USE_LEGACY_KERAS'), layers is tf.keras.layers,"
            " tf.keras.layers.Dense is keras.layers.Dense)"
        )
        others = without(KERAS, ONEDNN, LOG_LEVEL)
        process = subprocess.run(
            [sys.executable, "-c", script], env=others, capture_output=True, text=True
        )
        same = ["True", "True"]
        expected = [*same, str(is_there), "3", "3", "10", "None", *same]
        self.assertEqual(process.stdout.split(), expected, process.stderr)


class NativeOutputTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        stream = self.enter_context(tempfile.TemporaryFile("w+"))
        self.enter_context(mock.patch.object(sys, "stderr", stream))
        self.descriptor = stream.fileno()

    def prints(self, text):
        os.write(self.descriptor, text)

    def assertShown(self, text):
        self.assertEqual(os.pread(self.descriptor, 100, 0), text)

    def test_is_shown_after_a_block_that_raises_alone(self):
        with native_output_hidden():
            self.prints(b"GPUs")
        with self.assertRaises(KeyError), native_output_hidden():
            self.prints(b"why ")
            raise KeyError
        self.prints(b"after")
        self.assertShown(b"why after")

    def test_is_back_after_the_last_of_blocks_that_overlap(self):
        """As those of two threads do."""
        for error, text in ((None, b"after"), (KeyError, b"GPUs after")):
            os.ftruncate(self.descriptor, 0)
            os.lseek(self.descriptor, 0, os.SEEK_SET)
            one, other = native_output_hidden(), native_output_hidden()
            one.__enter__()
            other.__enter__()
            one.__exit__(error, None, None)
            self.prints(b"GPUs ")
            other.__exit__(None, None, None)
            self.prints(b"after")
            self.assertShown(text)

    def test_is_not_hidden_where_no_temporary_file_can_be(self):
        refused = FileNotFoundError("no usable temporary directory")
        with mock.patch.object(tempfile, "TemporaryFile", side_effect=refused):
            with native_output_hidden():
                self.prints(b"GPUs ")
        self.prints(b"after")
        self.assertShown(b"GPUs after")

    def test_is_not_hidden_where_the_stream_has_no_descriptor(self):
        closed = mock.Mock(fileno=lambda: 1_000_000)
        for stream in (closed, None):
            with mock.patch.object(sys, "stderr", stream), native_output_hidden():
                self.prints(b".")
        self.assertShown(b"..")


class GarbageTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(True, False)
    def test_it_is_looked_for_afterwards_if_it_was_before(self, before):
        self.addCleanup(gc.enable)
        (gc.enable if before else gc.disable)()
        with self.assertRaises(KeyError), no_garbage_collection():
            self.assertFalse(gc.isenabled())
            raise KeyError
        self.assertEqual(gc.isenabled(), before)


class GpuTest(tf.test.TestCase):
    def test_name_is_what_the_driver_says_or_else_tensorflow(self):
        gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{i}") for i in (0, 1)]
        details = [{"device_name": "NVIDIA H200"}, {}]
        with (
            mock.patch.object(tf.config, "get_visible_devices", return_value=gpus),
            mock.patch.object(
                tf.config.experimental, "get_device_details", side_effect=details
            ),
        ):
            self.assertEqual(gpu_names(), ["NVIDIA H200", "/physical_device:GPU:1"])


if __name__ == "__main__":
    tf.test.main()
