import os
import platform
import subprocess
import sys
import unittest

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


if __name__ == "__main__":
    tf.test.main()
