"""The TFLite file: writing, running and checking it."""

from dfq_tf.tflite.metadata import labels_text
from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import (
    Feeding,
    TFLiteClassifier,
    dequantized,
    kernel_types,
    open_interpreter,
)
from dfq_tf.tflite.sizing import (
    SizedLayer,
    as_table,
    check_size,
    file_bytes,
    sized_widths,
)
from dfq_tf.tflite.targets import check_target_takes, check_types
from dfq_tf.tflite.writer import Outline, check_target, outline

__all__ = [
    "Feeding",
    "Outline",
    "SizedLayer",
    "TFLiteClassifier",
    "as_table",
    "check_size",
    "check_target_takes",
    "check_target",
    "check_types",
    "convert",
    "dequantized",
    "file_bytes",
    "kernel_types",
    "labels_text",
    "open_interpreter",
    "outline",
    "sized_widths",
]
