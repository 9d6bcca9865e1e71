"""How pytest shares the tests out between its processes.

Tests of one class whose set-up takes long, as a run of a tool does, go to one process,
so that it happens once.
"""

import pytest


# First: pytest-xdist's own hook reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of each class that has a set-up of its own as one group."""
    for item in items:
        test_class = getattr(item, "cls", None)
        if test_class is not None and "setUpClass" in vars(test_class):
            group = f"{test_class.__module__}.{test_class.__name__}"
            item.add_marker(pytest.mark.xdist_group(group))
