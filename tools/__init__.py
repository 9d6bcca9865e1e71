"""The command-line tools; each is also a module that tests import."""

import gc
import os

# Programs of their own, they choose what they show: not the INFO and WARNING lines of
# TensorFlow's libraries, which read this once, when they load. So this package is
# imported before dfq_tf.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Python looks for garbage less often: of what libraries and models are made of, hardly
# anything is garbage.
gc.set_threshold(10_000, 10, 10)
