"""Weights of 4 bits, in a smaller file.

    python examples/four_bits.py my_model.keras my_model.tflite

Its blocks learn to round to the fewer bits, on generated images, and on crops of the
photographs that ship where these help (images="generated" leaves them out). First and
last layer keep 8 bits, which costs little and helps much.
"""

import pathlib
import sys

import dfq_tf

source, target = sys.argv[1:]
teacher = dfq_tf.load_classifier(source)
quantized = dfq_tf.quantize(
    teacher,
    method="df_rec",
    widths=dfq_tf.BitWidths(num_bits_weight=4),
    file=dfq_tf.FileConfig(favor="size"),
)
pathlib.Path(target).write_bytes(quantized.tflite)
print(f"{target} has {len(quantized.tflite):,} bytes")
