"""The exceptions that a user of the package may meet.

Each message names the argument, the value it had and the way out. The tools print
the message alone, without a traceback, and exit with `exit_code`.
"""

from collections.abc import Sequence
from typing import NamedTuple

# How many layers a message names.
_MOST_NAMED = 5


def class_of(value: object) -> str:
    """The class of a value for messages, such as 'builtins.int'."""
    return f"{type(value).__module__}.{type(value).__name__}"


def not_installed(package: str, extra: str) -> str:
    """The message where a package is absent that an extra of dfq_tf brings.

    Args:
      package: its name and what it is for, such as 'matplotlib, which draws this'.
      extra: of dfq_tf, such as 'report'.
    """
    return (
        f"{package}, is not installed: pip install '.[{extra}]' in the project's "
        f"folder, or 'dfq_tf[{extra}]' where dfq_tf is installed"
    )


class DfqError(Exception):
    """Base of all errors that dfq_tf raises on purpose."""

    exit_code = 1


class ConfigError(DfqError, ValueError):
    """A setting is out of its range or contradicts another one."""

    exit_code = 2


class DataError(DfqError):
    """A data set is unknown, absent, or does not fit the model."""


class ModelError(DfqError):
    """A model file cannot be read, or its model cannot be used as asked."""


class LayerProblem(NamedTuple):
    """Why a layer has no integer form.

    Attributes:
      name: of the layer.
      kind: its class, such as 'Conv2D'.
      reason: the rest of a sentence that begins with 'it cannot be quantized:'.
    """

    name: str
    kind: str
    reason: str


class UnsupportedLayerError(ModelError):
    """Layers have no integer form that the project knows.

    Attributes:
      problems: one for each layer; empty if the message says it all.
    """

    problems: Sequence[LayerProblem] = ()

    @classmethod
    def of(
        cls, problems: Sequence[LayerProblem], advice: str = ""
    ) -> "UnsupportedLayerError":
        """An error that names the layers, the first ones if there are many.

        Args:
          problems: at least one.
          advice: a sentence for the end of the message.
        """
        named = [
            f"layer {p.name} ({p.kind}) cannot be quantized: {p.reason}"
            for p in problems[:_MOST_NAMED]
        ]
        if len(problems) > _MOST_NAMED:
            named.append(f"so it is with {len(problems) - _MOST_NAMED} more layers")
        error = cls("; ".join(named) + (f". {advice}" if advice else ""))
        error.problems = tuple(problems)
        return error


class TrainingError(DfqError):
    """A training run had to stop: a loss or a weight is no longer finite."""


class WorkdirError(DfqError):
    """A working directory cannot be written or belongs to another configuration."""


class ExportError(DfqError):
    """A written TFLite file is not what was asked for."""
