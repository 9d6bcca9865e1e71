"""Converts a quantized student to an integer-only TFLite file.

    python tools/convert.py --student=runs/quantize/df_qat_kd.keras

Writes the file, by default beside the student, and labels.txt beside the file.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common
from dfq_tf import api
from dfq_tf.errors import ConfigError
from dfq_tf.files import may_write_in, nearest_there, write_bytes, write_text
from dfq_tf.quantization import QuantizedNetwork
from dfq_tf.settings import FileConfig
from dfq_tf.tflite import check_types, convert, labels_text
from tools.teacher_flags import read_labels

FLAGS = common.FLAGS

_LABELS = "labels.txt"


def convert_network(
    network: QuantizedNetwork,
    path: pathlib.Path,
    config: FileConfig,
    content: bytes | None = None,
) -> bytes:
    """Writes `path` and, beside it, labels.txt with one class name per line.

    Args:
      network: the quantized network.
      path: of the TFLite file; an existing one is kept and read.
      config: what the file takes and gives, and what it says of itself.
      content: of the file, if it has been made already.

    Returns:
      The content of the file.

    Raises:
      ConfigError: labels.txt is there, and has other names.
    """
    if path.exists():
        return path.read_bytes()
    labels = check_labels(network.description.class_names, path.parent)
    if content is None:
        content = content_of(network, config)
    _write(path, content, labels)
    return content


def content_of(network: QuantizedNetwork, config: FileConfig) -> bytes:
    """The content of a network's file, with a line for how long it took."""
    with common.stage("file and its proof"):
        return convert(network, config=config)


def _write(path: pathlib.Path, content: bytes, labels: str | None) -> None:
    if labels is not None:
        write_text(path.with_name(_LABELS), labels)
    write_bytes(path, content)


def check_labels(class_names: Sequence[str], folder: pathlib.Path) -> str | None:
    """What labels.txt beside a file is to hold; None if it is there and says the same.

    Raises:
      ConfigError: it is there, and names other classes.
    """
    labels, beside = labels_text(class_names), folder / _LABELS
    if not beside.exists():
        return labels
    try:
        is_same = beside.read_bytes() == labels.encode()
        if is_same or read_labels(str(beside)) == tuple(class_names):
            return None
    except ConfigError:
        pass  # it names nothing
    flag = "tflite" if "tflite" in FLAGS else "workdir"
    raise ConfigError(
        f"{beside}, which is to name the classes of the file, is there and names "
        f"others; name another folder with --{flag}"
    )


def _check_path(path: pathlib.Path) -> None:
    """Raises ConfigError if the TFLite file cannot be written where it is to be."""
    if path.is_dir():
        raise ConfigError(
            f"tflite is {str(path)!r}, a folder; name a file with --tflite, such as "
            f"{str(path / 'model.tflite')!r}"
        )
    if path.suffix != ".tflite":
        raise ConfigError(
            f"tflite is {str(path)!r}; its name must end in .tflite, by which apps and "
            f"tools know the file: --tflite={shlex.quote(f'{path}.tflite')}"
        )
    if path.exists():
        raise ConfigError(
            f"tflite is {str(path)!r}, which exists; name another file with --tflite, "
            "or delete it"
        )
    folder = nearest_there(path.parent)
    if not folder.is_dir() or not may_write_in(folder):
        raise ConfigError(
            f"tflite is {str(path)!r}, but {folder} cannot be written; name a file in "
            "another folder with --tflite"
        )


def main() -> None:
    """Converts and reports."""
    if not FLAGS.student:
        raise ConfigError("student is empty; name a .keras file with --student")
    if FLAGS.workdir is not None:
        common.check_workdir()
    with common.stage(f"reading of {FLAGS.student}", common.LONG_READING):
        network = api.load_quantized(FLAGS.student)
    path = pathlib.Path(
        FLAGS.tflite or pathlib.Path(FLAGS.student).with_suffix(".tflite")
    )
    _check_path(path)
    labels = check_labels(network.description.class_names, path.parent)
    config = common.file_config(path.stem)
    check_types(config)
    # A folder of the user's choice may hold another tool's run.
    workdir = common.open_workdir(
        path.with_suffix(".convert"), replaces=FLAGS.workdir is None
    )
    content = content_of(network, config)
    _write(path, content, labels)
    workdir.add_metrics(tflite=str(path), bytes=len(content))
    print(f"Wrote {path}, {len(content):,} bytes, and {path.with_name('labels.txt')}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Conversion",
        "student",
        pathlib.Path,
        None,
        "Quantized student, from tools/quantize.py.",
    )
    common.define(
        "Conversion",
        "tflite",
        str,
        None,
        "TFLite file to write (default: the student's name with .tflite).",
    )
    common.define_file_flags()
    common.define_run_flags(None, trains=False)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="student")
