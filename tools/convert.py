"""Converts a quantized student to an integer-only TFLite file.

    python tools/convert.py --student=runs/quantize/df_qat_kd.keras

Writes the file, by default beside the student, and labels.txt beside the file.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.errors import ConfigError
from dfq_tf.files import write_bytes, write_text
from dfq_tf.graph.classifier import Classifier
from dfq_tf.importing.classifiers import load_classifier
from dfq_tf.tflite import export
from tools import common

FLAGS = common.FLAGS


def convert_student(student: Classifier, path: pathlib.Path) -> bytes:
    """Writes `path` and, beside it, labels.txt with one class name per line.

    Args:
      student: the fake-quantized model.
      path: of the TFLite file; an existing one is kept and read.

    Returns:
      The content of the file.
    """
    if path.exists():
        return path.read_bytes()
    content = export.convert(student)
    names = student.description.class_names
    write_text(path.with_name("labels.txt"), "".join(f"{name}\n" for name in names))
    write_bytes(path, content)
    return content


def main() -> None:
    """Converts and reports."""
    if not FLAGS.student:
        raise ConfigError("student is empty; name a .keras file with --student")
    student = load_classifier(FLAGS.student)
    path = pathlib.Path(
        FLAGS.tflite or pathlib.Path(FLAGS.student).with_suffix(".tflite")
    )
    if path.exists():
        raise ConfigError(
            f"tflite is {str(path)!r}, which exists; name another file with --tflite, "
            "or delete it"
        )
    # A folder of the user's choice may hold another tool's run.
    workdir = common.open_workdir(
        path.with_suffix(".convert"), replaces=FLAGS.workdir is None
    )
    content = convert_student(student, path)
    workdir.add_metrics(tflite=str(path), bytes=len(content))
    print(f"Wrote {path}, {len(content):,} bytes, and {path.with_name('labels.txt')}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Conversion", "student", str, None, "Quantized student, from tools/quantize.py."
    )
    common.define(
        "Conversion",
        "tflite",
        str,
        None,
        "TFLite file to write (default: the student's name with .tflite).",
    )
    common.define_run_flags(None, trains=False)


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
