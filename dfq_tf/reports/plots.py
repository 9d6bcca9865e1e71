"""Pictures that matplotlib draws. It is optional: without it there are none."""

import importlib.util
import os
from typing import Any

from dfq_tf.errors import ConfigError, not_installed
from dfq_tf.files import replacing


def has_pyplot() -> bool:
    """Whether matplotlib is installed, which draws PNG files and nothing else."""
    return importlib.util.find_spec("matplotlib") is not None


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; slow to import.

    Raises:
      ConfigError: it is not installed.
    """
    if not has_pyplot():
        raise ConfigError(
            not_installed("matplotlib, which draws this picture", "report")
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure of `pyplot` as a PNG file, in place of an old one, and closes it.

    Args:
      figure: a matplotlib Figure.
      path: of the file.
    """
    figure.tight_layout()
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot().close(figure)
