"""The exceptions that a user of the package may meet.

Each message names the argument, the value it had and the way out. The tools print
the message alone, without a traceback, and exit with `exit_code`.
"""


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


class UnsupportedLayerError(ModelError):
    """A layer has no integer form that the project knows."""


class TrainingError(DfqError):
    """A training run had to stop: a loss or a weight is no longer finite."""


class WorkdirError(DfqError):
    """A working directory cannot be written or belongs to another configuration."""


class ExportError(DfqError):
    """A written TFLite file is not what was asked for."""
