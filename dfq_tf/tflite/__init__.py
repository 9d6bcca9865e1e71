"""The TFLite file: writing, running and checking it."""

from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import TFLiteClassifier, kernel_types, open_interpreter
from dfq_tf.tflite.writer import Outline

__all__ = [
    "Outline",
    "TFLiteClassifier",
    "convert",
    "kernel_types",
    "open_interpreter",
]
