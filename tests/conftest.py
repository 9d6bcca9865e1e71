"""In which order the tests run, and what saves each process of them time.

The classes that take longest come first: no process then waits for another at the end.
All tests of a class run in one process (`--dist loadscope`), so that what they share is
set up once.
"""

import gc
import os
import sys

import pytest

# The processes share the cores already, and the networks are small: with threads of its
# own, TensorFlow spends a tenth more time on them. It reads this when it is imported.
for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(name, "1")
# As the tools have it, which run in these processes: no INFO and no WARNING lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Python looks for garbage less often, while TensorFlow is imported and afterwards.
gc.set_threshold(10_000, 10, 10)

# Files with the longest tests, longest first; the others come behind them.
SLOWEST = (
    "tools_test.py",
    "tflite_writer_test.py",
    "api_test.py",
    "devices_test.py",
    "proof_test.py",
    "generator_test.py",
    "student_test.py",
    "tool_runner_test.py",
    "post_training_test.py",
    "phases_test.py",
    "loop_test.py",
    "layer_noise_test.py",
    "calibration_test.py",
    "supervised_test.py",
    "models_test.py",
    "steps_test.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by their files, the slowest first."""
    order = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """What has been imported stays: Python need not look there for garbage.

    And TensorFlow's seed is set once. Its test case would set it for each test, and
    with it throw away all kernels, whose making is a sixth of the whole time. The
    project draws by seeds of its own, and Keras' initializers by Python's.
    """
    gc.collect()
    gc.freeze()
    tf = sys.modules.get("tensorflow")
    if tf is not None:
        tf.random.set_seed(0)
        tf.test.TestCase._set_default_seed = property(
            lambda self: False, lambda *_: None
        )
