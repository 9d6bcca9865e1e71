"""Reads the TensorBoard scalars that the training loop has written."""

import os
import pathlib
import re
import struct
from collections.abc import Iterator

from dfq_tf.compat import tf

# Points of a curve that is drawn.
_MOST_POINTS = 240

Curve = list[tuple[float, float]]


def read(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """The scalars in a folder of event files, by name.

    Args:
      folder: such as `WORKDIR/tensorboard/warm_up`; what is not there has no scalars.

    Returns:
      (step, value) in the order of the steps, thinned out to a few hundred. Of a step
      that was taken twice, as after an interruption, the later value.
    """
    found: dict[str, dict[float, float]] = {}
    for path in sorted(pathlib.Path(folder).glob("events.out.tfevents.*"), key=_age):
        for record in _records(path.read_bytes()):
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    number = float(tf.make_ndarray(value.tensor))
                    found.setdefault(value.tag, {})[event.step] = number
    return {name: _thinned(sorted(curve.items())) for name, curve in found.items()}


def _age(path: pathlib.Path) -> str:
    """Sorts files by the numbers in their names: the tenth stands behind the ninth."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), path.name)


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum.

    One that a run was interrupted in is left out.
    """
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        end = place + 12 + length
        if end + 4 > len(content):
            return
        yield content[place + 12 : end]
        place = end + 4


def _thinned(curve: Curve) -> Curve:
    every = -(-len(curve) // _MOST_POINTS)
    return [*curve[:-1][::every], *curve[-1:]]
