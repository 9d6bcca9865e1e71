"""A tool that runs inside a test does what it does in a process."""

import logging
import os
import random
import re
import signal
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging
from absl.testing import flagsaver, parameterized

from tools import common
from dfq_tf.compat import tf
from tests import helpers
from tests.tool_runner import run_in_process, run_tool

# Says something in each way there is, changes what it can, and ends as it is told.
TOOL = """
import os
import random
import signal
import sys
import warnings

sys.path.insert(0, os.getcwd())

import numpy as np
from absl import logging

from dfq_tf.compat import tf
from tools import common

FLAGS = common.FLAGS


def main():
    print("seed", FLAGS.seed, FLAGS.logtostderr, sorted(common._groups), sys.argv[1:])
    os.write(2, b"past Python\\n")
    warnings.warn("a warning")
    warnings.warn("of __main__", DeprecationWarning)
    tf.get_logger().warning("of TensorFlow")
    logging.warning("of absl")
    logging.info("below the level")
    os.environ["DFQ_TF_LEFT"] = "1"
    random.seed(0)
    np.random.seed(0)
    warnings.simplefilter("error")
    tf.get_logger().setLevel("ERROR")
    common.strategy()
    os.chdir("..")
    if FLAGS.end == "crash":
        return {}["absent"]
    if FLAGS.end == "interrupt":
        raise KeyboardInterrupt
    if FLAGS.end == "terminate":
        signal.raise_signal(signal.SIGTERM)
    if FLAGS.end == "text":
        sys.exit("a last word")


if __name__ == "__main__":
    common.define("Test", "end", str, "well", "How it ends.")
    common.define_run_flags(None)
    common.run(main, "A tool.")
"""


def without_times(text):
    """The text, with absl's log lines less the time and the thread."""
    return re.sub(r"(?m)^W\d{4} \S+ +\d+ ", "W ", text)


def state():
    """What a tool may change."""
    loggers = (logging.root, absl_logging.get_absl_logger(), tf.get_logger())
    return {
        "argv": list(sys.argv),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "streams": (sys.stdout, sys.stderr, sys.modules["__main__"]),
        "descriptors": [os.fstat(number)[1:3] for number in (1, 2)],
        "flags": [(flag, flag.value, flag.present) for flag in _flags()],
        "groups": dict(common._groups),
        "strategy": (common.strategy, common.strategy.cache_info()),
        "warnings": (
            warnings.formatwarning,
            warnings.showwarning,
            list(warnings.filters),
        ),
        "loggers": [(each.level, list(each.handlers)) for each in loggers],
        "verbosity": absl_logging.get_verbosity(),
        "stream": absl_logging.get_absl_handler().python_handler.stream,
        "signal": signal.getsignal(signal.SIGTERM),
        "random": (random.getstate(), np.random.get_state()[1].tolist()),
    }


def _flags():
    return [flags.FLAGS[name] for name in flags.FLAGS]


class ToolRunnerTest(parameterized.TestCase, tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tool = helpers.new_folder() / "tool.py"
        cls.tool.write_text(TOOL)

    def setUp(self):
        super().setUp()
        self.before = state()

    def tearDown(self):
        after = state()
        for name, value in self.before.items():
            self.assertEqual(value, after[name], f"{name} is not as it was")
        super().tearDown()

    @pytest.mark.long
    def test_result_is_that_of_a_process(self):
        self.check(2, "run", "--batch_size=0")

    # One of each exit code.
    @parameterized.parameters(
        (0, "benchmark", "--help"),
        (1, "run", "--teacher=absent.keras"),
        (1, None, "--end=crash", "--seed=3"),
        (130, None, "--end=interrupt"),
        (143, None, "--end=terminate"),
    )
    @pytest.mark.long
    def test_so_it_is_with_every_exit_code(self, code, tool, *flags):
        self.check(code, tool, *flags)

    def check(self, code, tool, *flags):
        tool = tool or self.tool
        expected, result = run_tool(tool, *flags), run_in_process(tool, *flags)
        self.assertEqual(expected.returncode, code, expected.stderr)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertEqual(result.stdout, expected.stdout)
        self.assertEqual(without_times(result.stderr), without_times(expected.stderr))
        self.assertEqual("Traceback" in result.stderr, "--end=crash" in flags)
        self.assertEqual(list(map(str, result.args)), list(map(str, expected.args)))

    def test_sigterm_ends_it_with_a_line(self):
        result = run_in_process(self.tool, "--end=terminate")
        self.assertEqual(result.returncode, 143)
        last = result.stderr.splitlines()[-1]
        self.assertStartsWith(last, "error: ended by SIGTERM; give the same command")

    @parameterized.parameters("well", "crash", "text")
    def test_nothing_is_left_behind_however_it_ends(self, end):
        result = run_in_process(self.tool, f"--end={end}", "--verbosity=1")
        self.assertEqual(result.returncode, int(end != "well"), result.stderr)
        self.assertIn("of TensorFlow", result.stderr)
        self.assertEqual(result.stderr.endswith("a last word\n"), end == "text")

    def test_flags_of_a_test_and_of_a_tool_do_not_meet(self):
        with flagsaver.flagsaver(), mock.patch.dict(common._groups):
            for name in ("seed", "mine"):
                if name not in flags.FLAGS:  # another test in this process has them
                    common.define("Mine", name, int, 0, "Of another tool.")
            flags.FLAGS(["test", "--seed=7", "--logtostderr"])
            for _ in range(2):
                result = run_in_process(self.tool)
                self.assertEqual(result.returncode, 0, result.stderr)
                self.assertEqual(result.stdout, "seed 0 False ['Run', 'Test'] []\n")
            result = run_in_process(self.tool, "--mine=1")
            self.assertEqual(result.returncode, 2)
            self.assertRegex(result.stderr, "^error: Unknown command line flag 'mine'")
            self.assertEqual((flags.FLAGS.seed, flags.FLAGS.logtostderr), (7, True))


if __name__ == "__main__":
    tf.test.main()
