"""In which order the tests run: the classes that take longest come first.

No process then waits for another at the end. All tests of a class run in one process
(`--dist loadscope`), so that what they share is set up once.
"""

import pytest

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
