"""What LiteRT's kernels cost: a table of milliseconds by form and size.

`benchmarks/kernels.py` makes such a table. The one beside this module was made on the
processor that it names; another may be given instead of it.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.errors import ConfigError
from dfq_tf.files import read_text

FORMAT, VERSION = "dfq_tf kernel costs", 1
# The forms that a table has: an operator, and the type in which it has its kernel.
NAMES = (
    "CONV_2D int8",
    "CONV_2D int4",
    "FULLY_CONNECTED int8",
    "FULLY_CONNECTED int4",
    "FULLY_CONNECTED int2",
)
# The windows that it has: sides of the kernel, and the stride.
WINDOWS = {"1x1/1": (1, 1), "1x1/2": (1, 2), "3x3/1": (3, 1), "3x3/2": (3, 2)}
# What its arrays go along.
AXES = ("positions", "inputs", "outputs")

_OWN = "kernel_costs.json"
_ADVICE = "make it again with benchmarks/kernels.py, or leave it out"


@dataclasses.dataclass(frozen=True)
class KernelCosts:
    """Times of single layers.

    Attributes:
      processor: where they were measured.
      runtime: by which they were run, such as 'ai-edge-litert 2.3.0'.
      axes: name of AXES -> the sizes that were measured, rising.
      milliseconds: such as 'CONV_2D int8 3x3/1' -> float64 (positions, inputs,
        outputs): of one image, on one thread.
    """

    processor: str
    runtime: str
    axes: Mapping[str, Sequence[int]]
    milliseconds: Mapping[str, np.ndarray]

    def of(
        self,
        name: str,
        size: tuple[int, int],
        strides: tuple[int, int],
        positions: int,
        inputs: int,
        outputs: int,
    ) -> float:
        """Milliseconds of a layer, between those that were measured.

        A kernel larger than 1x1 counts as the 3x3 kernel that has as many weights, and
        any stride above 1 as 2. Beyond what was measured, time goes with the work.

        Args:
          name: one of NAMES.
          size: of the kernel, (height, width).
          strides: of the kernel.
          positions: height times width of the output.
          inputs: channels.
          outputs: channels.
        """
        area = math.prod(size)
        sides, stride = "1x1" if area == 1 else "3x3", min(2, max(strides))
        inputs_here = inputs if area == 1 else inputs * area / 9
        values = np.log(self.milliseconds[f"{name} {sides}/{stride}"])
        beyond = 1.0
        for axis, wanted in zip(AXES, (positions, inputs_here, outputs)):
            sizes = self.axes[axis]
            within = min(max(wanted, sizes[0]), sizes[-1])
            beyond *= wanted / within
            values = _between(values, np.log(sizes), math.log(within))
        return float(np.exp(values)) * beyond


def _between(values: np.ndarray, sizes: np.ndarray, wanted: float) -> np.ndarray:
    """Values at a place on the first axis, straight between the nearest two."""
    if len(sizes) == 1:
        return values[0]
    i = int(np.clip(np.searchsorted(sizes, wanted) - 1, 0, len(sizes) - 2))
    share = (wanted - sizes[i]) / (sizes[i + 1] - sizes[i])
    return values[i] * (1 - share) + values[i + 1] * share


def read(path: str = "") -> KernelCosts:
    """Reads a table.

    Args:
      path: of a file of `benchmarks/kernels.py`; empty for the project's own.

    Raises:
      ConfigError: there is none, or it is no such table, or of another version.
    """
    file = pathlib.Path(path) if path else pathlib.Path(__file__).with_name(_OWN)
    try:
        said = json.loads(read_text(file))
    except OSError as error:
        raise ConfigError(
            f"kernel_costs is {path!r}, which cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise _malformed(path, "it is no JSON") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise _malformed(path, f"its 'format' is not {FORMAT!r}")
    if said.get("version") != VERSION:
        raise ConfigError(
            f"kernel_costs is {path!r}, a table of version {said.get('version')!r}; "
            f"this release reads version {VERSION}: {_ADVICE}"
        )
    try:
        return _checked(said)
    except (KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise _malformed(path, what) from error


def _malformed(path: str, what: str) -> ConfigError:
    return ConfigError(
        f"kernel_costs is {path!r}, which is no table of kernel costs: {what}. Please "
        + _ADVICE
    )


def _checked(said: Mapping[str, Any]) -> KernelCosts:
    """The table that a file says.

    Raises:
      KeyError, TypeError, ValueError: it does not say one.
    """
    axes = {axis: tuple(map(int, said["axes"][axis])) for axis in AXES}
    for axis, sizes in axes.items():
        if not sizes or sizes[0] < 1 or sorted(set(sizes)) != list(sizes):
            raise ValueError(f"its {axis} are {list(sizes)}, not rising from 1 on")
    milliseconds = {}
    for key in (f"{name} {window}" for name in NAMES for window in WINDOWS):
        values = np.array(said["milliseconds"]["1"][key], np.float64)
        shape = tuple(map(len, axes.values()))
        if values.shape != shape or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{key!r} must have {shape} times above 0")
        milliseconds[key] = values
    return KernelCosts(str(said["processor"]), str(said["runtime"]), axes, milliseconds)
