"""What a TFLite file says of itself, as MediaPipe and its kin read it.

That is a flatbuffer of tflite-support's schema (metadata_schema.fbs) in a buffer of the
file, and the class names in a text file, packed as a ZIP archive behind the file. No
library that is kept up writes them, so the few tables that a classifier needs are
written here by the numbers of their fields.
"""

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import number_types
from flatbuffers.table import Table

BUFFER_NAME = "TFLITE_METADATA"
LABELS_FILE = "labels.txt"

_IDENTIFIER = b"M001"
# The oldest version of the schema that has all that is written here.
_MIN_PARSER_VERSION = "1.0.0"
# Fields of the tables, by their place in the schema.
_MODEL = dict(name=0, description=1, version=2, author=4, license=5)
_SUBGRAPHS, _PARSER_VERSION = 3, 7
_INPUTS, _OUTPUTS = 2, 3
_NAME, _DESCRIPTION, _CONTENT, _PROCESS_UNITS, _STATS, _FILES = 0, 1, 3, 4, 5, 6
_TYPE, _VALUE = 0, 1  # of a union
_MEAN, _STD, _MAX, _MIN, _FILE_TYPE = 0, 1, 0, 1, 2
# What the schema calls them: the kinds of a union, of a file, of an image's colors.
_FEATURE, _IMAGE, _NORMALIZATION, _AXIS_LABELS = 1, 2, 1, 2
_COLOR_SPACES = {1: 2, 3: 1}  # gray and RGB, by the number of channels
_UNKNOWN_COLORS = 0

_UOFFSET = number_types.UOffsetTFlags


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a file of a classifier says of itself.

    Attributes:
      name: of the model.
      description: of the model.
      version: of the model.
      author: of the model.
      license: of the model.
      channels: of the image; 0 if the colors are not known.
      mean: the file takes (pixel - mean) / std of pixels, 0 to 255; one for all
        channels, or one for each.
      std: see `mean`.
      input_range: the lowest and highest value that the file takes.
      output_name: what the file gives, such as 'probabilities'.
      output_range: the lowest and highest value that it gives, where these are known.
      class_names: one for each output.
    """

    name: str = ""
    description: str = ""
    version: str = ""
    author: str = ""
    license: str = ""
    channels: int = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    input_range: tuple[float, float] = (0.0, 255.0)
    output_name: str = ""
    output_range: tuple[float, float] | None = None
    class_names: tuple[str, ...] = ()


def as_bytes(metadata: Metadata) -> bytes:
    """The flatbuffer for the buffer `BUFFER_NAME` of a file."""
    texts = {slot: getattr(metadata, name) for name, slot in _MODEL.items()}
    model = {
        **{slot: text for slot, text in texts.items() if text},
        _SUBGRAPHS: [{_INPUTS: [_input(metadata)], _OUTPUTS: [_output(metadata)]}],
        _PARSER_VERSION: _MIN_PARSER_VERSION,
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_written(builder, model), _IDENTIFIER)
    return bytes(builder.Output())


def _input(metadata: Metadata) -> dict[int, Any]:
    colors = _COLOR_SPACES.get(metadata.channels, _UNKNOWN_COLORS)
    normalization = {_MEAN: _floats(*metadata.mean), _STD: _floats(*metadata.std)}
    return {
        _NAME: "image",
        _DESCRIPTION: "The image to be classified.",
        _CONTENT: {_TYPE: _IMAGE, _VALUE: {0: colors}},
        _PROCESS_UNITS: [{_TYPE: _NORMALIZATION, _VALUE: normalization}],
        _STATS: _stats(*metadata.input_range),
    }


def _output(metadata: Metadata) -> dict[int, Any]:
    labels = {
        _NAME: LABELS_FILE,
        _DESCRIPTION: "The name of each class.",
        _FILE_TYPE: _AXIS_LABELS,
    }
    output = {
        _NAME: metadata.output_name,
        _DESCRIPTION: f"The {metadata.output_name} of the classes.",
        _CONTENT: {_TYPE: _FEATURE, _VALUE: {}},
        _FILES: [labels],
    }
    if metadata.output_range is not None:
        output[_STATS] = _stats(*metadata.output_range)
    return output


def _stats(low: float, high: float) -> dict[int, Any]:
    return {_MIN: _floats(low), _MAX: _floats(high)}


def _floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _written(builder: Any, value: Any) -> int:
    """Writes a text, an array of numbers, a list, or a table: number of field -> value.

    A number in a table is one byte.

    Returns:
      Where it stands.
    """
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, Sequence):
        places = [_written(builder, each) for each in value]
        builder.StartVector(4, len(places), 4)
        for place in reversed(places):
            builder.PrependUOffsetTRelative(place)
        return builder.EndVector()
    written = {
        slot: each if isinstance(each, int) else _written(builder, each)
        for slot, each in value.items()
    }
    builder.StartObject(1 + max(written, default=-1))
    for slot, each in written.items():
        if isinstance(value[slot], int):
            builder.PrependInt8Slot(slot, each, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, each, 0)
    return builder.EndObject()


def with_files(content: bytes, files: Mapping[str, str]) -> bytes:
    """A file with text files packed behind it.

    Args:
      content: of the TFLite file.
      files: name -> text. They are stored as they are: readers map them into memory.
    """
    whole = io.BytesIO(content)
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
        for name, text in files.items():
            # A date would make two files of the same model different.
            archive.writestr(zipfile.ZipInfo(name), text.encode())
    return whole.getvalue()


def labels_text(class_names: Sequence[str]) -> str:
    """What a file of labels holds: a line for each class."""
    return "".join(f"{name}\n" for name in class_names)


def read(content: bytes) -> Metadata | None:
    """What a TFLite file of an image classifier says of itself; None if nothing.

    Args:
      content: of a file that LiteRT can read.
    """
    model = schema.Model.GetRootAs(content, 0)
    entries = (model.Metadata(i) for i in range(model.MetadataLength()))
    places = [
        entry.Buffer() for entry in entries if entry.Name() == BUFFER_NAME.encode()
    ]
    if not places:
        return None
    buffer = model.Buffers(places[0]).DataAsNumpy().tobytes()
    root = _Reader(Table(buffer, Table(buffer, 0).Get(_UOFFSET, 0)))
    subgraph = root.first(_SUBGRAPHS)
    image, output = subgraph.first(_INPUTS), subgraph.first(_OUTPUTS)
    colors = image.table(_CONTENT).table(_VALUE).byte(0)
    channels = {color: number for number, color in _COLOR_SPACES.items()}
    units = [u for u in image.tables(_PROCESS_UNITS) if u.byte(_TYPE) == _NORMALIZATION]
    normalization = (*units, _Reader(None))[0].table(_VALUE)
    return Metadata(
        **{name: root.text(slot) for name, slot in _MODEL.items()},
        channels=channels.get(colors, 0),
        mean=normalization.floats(_MEAN) or (0.0,),
        std=normalization.floats(_STD) or (1.0,),
        input_range=_range(image) or (0.0, 255.0),
        output_name=output.text(_NAME),
        output_range=_range(output),
        class_names=_class_names(content, output),
    )


def _range(tensor: "_Reader") -> tuple[float, float] | None:
    stats = tensor.table(_STATS)
    ends = stats.floats(_MIN)[:1] + stats.floats(_MAX)[:1]
    return ends if len(ends) == 2 else None  # type: ignore[return-value]


def _class_names(content: bytes, output: "_Reader") -> tuple[str, ...]:
    """The lines of the file that names the classes; none without one."""
    files = output.tables(_FILES)
    names = [f.text(_NAME) for f in files if f.byte(_FILE_TYPE) == _AXIS_LABELS]
    packed = io.BytesIO(content)
    if not names or not zipfile.is_zipfile(packed):
        return ()
    with zipfile.ZipFile(packed) as archive:
        return tuple(archive.read(names[0]).decode().splitlines())


class _Reader:
    """A table of a flatbuffer, by the numbers of its fields.

    What is not there is empty, or 0.

    Args:
      table: of the flatbuffers library; None for one that is not there.
    """

    def __init__(self, table: Any) -> None:
        self._table = table

    def byte(self, slot: int) -> int:
        """A number of one byte."""
        place = self._place(slot)
        return self._table.Get(number_types.Uint8Flags, place) if place else 0

    def text(self, slot: int) -> str:
        """A text."""
        place = self._place(slot)
        return self._table.String(place).decode() if place else ""

    def table(self, slot: int) -> "_Reader":
        """A table."""
        place = self._place(slot)
        return self._at(place) if place else _Reader(None)

    def tables(self, slot: int) -> list["_Reader"]:
        """The tables of a list."""
        return [self._at(place) for place in self._elements(slot)]

    def first(self, slot: int) -> "_Reader":
        """The first table of a list."""
        return (*self.tables(slot), _Reader(None))[0]

    def floats(self, slot: int) -> tuple[float, ...]:
        """A list of numbers."""
        places = self._elements(slot)
        return tuple(self._table.Get(number_types.Float32Flags, p) for p in places)

    def _place(self, slot: int) -> int:
        """Where a field stands; 0 if it is not there."""
        offset = self._table.Offset(4 + 2 * slot) if self._table else 0
        return self._table.Pos + offset if offset else 0

    def _elements(self, slot: int) -> list[int]:
        """Where the elements of a list stand, of four bytes each."""
        place = self._place(slot)
        if not place:
            return []
        offset = place - self._table.Pos
        start, length = self._table.Vector(offset), self._table.VectorLen(offset)
        return [start + 4 * i for i in range(length)]

    def _at(self, place: int) -> "_Reader":
        return _Reader(Table(self._table.Bytes, self._table.Indirect(place)))
