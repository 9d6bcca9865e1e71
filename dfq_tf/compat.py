"""The one place that imports Keras 2 (`tf_keras`) and quiets TensorFlow's start-up.

tfmot accepts Keras 2 models only, while `tf.keras` has been Keras 3 since
TensorFlow 2.16. Every other module writes `from dfq_tf.compat import keras`.
"""

import os

# Read once, when TensorFlow's libraries load: hide the C++ INFO and WARNING lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# tfmot picks `tf_keras` itself, but only if `tf.keras` was not asked for first.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

__all__ = ["keras", "tf"]
