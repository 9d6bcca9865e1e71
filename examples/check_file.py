"""Runs a file with TensorFlow Lite's interpreter, and compares it with its model.

    python examples/check_file.py my_model.keras my_model.tflite

The images are random here, which shows that the file runs, and no more: take some of
your own, uint8 of shape (images, height, width, channels).
"""

import pathlib
import sys

import dfq_tf
import numpy as np

source, target = sys.argv[1:]
model = dfq_tf.load_classifier(source)
file = dfq_tf.TFLiteClassifier(pathlib.Path(target).read_bytes())
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (32, *file.image_shape), dtype=np.uint8)
same = file.scores(images).argmax(-1) == model.scores(images).argmax(-1)
print(f"{target} answers as {source} on {same.sum()} of {len(images)} random images")
print(f"It takes {file.latency():.2f} ms per image here")
