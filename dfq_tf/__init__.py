"""dfq_tf: a trained Keras classifier in, an integer TFLite model out, no data used.

import dfq_tf

teacher = dfq_tf.load_classifier("teacher.keras")
quantized = dfq_tf.quantize(teacher)
pathlib.Path("model.tflite").write_bytes(quantized.tflite)
"""

from dfq_tf.api import Distilled, Quantized, distill, load_quantized, quantize
from dfq_tf.errors import (
    ConfigError,
    DfqError,
    ExportError,
    ModelError,
    TrainingError,
    UnsupportedLayerError,
)
from dfq_tf.graph import Classifier, ModelDescription
from dfq_tf.importing import as_classifier, load_classifier
from dfq_tf.settings import (
    BitWidths,
    BudgetConfig,
    CalibrationConfig,
    DistillationConfig,
    FileConfig,
    MixedWidths,
    ReconstructionConfig,
    qat_recipe,
    recipe,
)
from dfq_tf.tflite import TFLiteClassifier

__version__ = "0.1.0"

__all__ = [
    "BitWidths",
    "CalibrationConfig",
    "Classifier",
    "ConfigError",
    "DfqError",
    "Distilled",
    "BudgetConfig",
    "DistillationConfig",
    "ExportError",
    "FileConfig",
    "MixedWidths",
    "ModelDescription",
    "ModelError",
    "Quantized",
    "ReconstructionConfig",
    "TFLiteClassifier",
    "TrainingError",
    "UnsupportedLayerError",
    "as_classifier",
    "distill",
    "load_classifier",
    "load_quantized",
    "qat_recipe",
    "quantize",
    "recipe",
]
