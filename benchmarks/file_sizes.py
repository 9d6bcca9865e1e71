"""Bytes, latency and forms of files of 8, 4 and 2 bits, of random networks.

    python benchmarks/file_sizes.py

Weights are random: no accuracy is measured. Run it on an idle machine.
"""

import collections
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf.compat import keras
from dfq_tf.importing import as_classifier
from dfq_tf.models import build_model
from dfq_tf.quantization import float_network
from dfq_tf.quantization.post_training import post_training
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig
from dfq_tf.tflite import TFLiteClassifier, writer
from dfq_tf.tflite.forms import chosen

_CALIBRATION = CalibrationConfig(
    activation_range="min_max",
    pooled_margin=1.0,
    logits_margin=1.0,
    bias_correction=False,
)


def networks() -> Iterator[tuple[str, keras.Model]]:
    """Name and model, of ten classes each."""
    yield "WRN-16-1", build_model("wrn_16_1", (32, 32, 3), 10)
    for side in (96, 224):
        common = dict(input_shape=(side, side, 3), weights=None, classes=10)
        v1 = keras.applications.MobileNet(alpha=0.25, **common)
        yield f"MobileNet V1 25 %, {side}", v1
        yield f"MobileNet V2, {side}", keras.applications.MobileNetV2(**common)


def main() -> None:
    """Prints a line for each network, width and --favor."""
    for name, model in networks():
        teacher = as_classifier(model, input_mean=127.5, input_scale=1 / 127.5)
        network, whole = float_network(teacher), 0
        shape = (4, *teacher.image_shape)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        for bits in (8, 4, 2):
            quantized = post_training(network, images, BitWidths(bits), _CALIBRATION)
            for favor in ("balanced", "size", "speed"):
                config = FileConfig(favor=favor)
                content = writer.write(quantized, config)
                whole = whole or len(content)
                tflite = TFLiteClassifier(content)
                forms = collections.Counter(
                    form.name for form in chosen(quantized, config).values()
                )
                print(
                    f"{name}, W{bits}A8, {favor}: {len(content):,} bytes, "
                    f"{len(content) / whole:.3f}x, {tflite.latency(100):.3f} ms, "
                    f"{tflite.num_pieces} pieces, {dict(forms)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
