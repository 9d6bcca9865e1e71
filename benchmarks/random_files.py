"""How far the files of random networks are from the students that they were made of.

    python benchmarks/random_files.py 0 2000

Prints a line for each seed of tests/random_networks.py: its widths, and the largest
difference of a logit in integer steps; or the error that refused it.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.compat import keras
from dfq_tf.errors import DfqError
from dfq_tf.importing import as_classifier
from dfq_tf.quantization import float_network
from dfq_tf.quantization.post_training import post_training
from dfq_tf.settings import CalibrationConfig, FileConfig, parse_widths
from dfq_tf.tflite import proof
from tests import random_networks

# Of 64 images, a quarter is held out by the calibration; the file runs on eight others.
_CALIBRATING, _COMPARED = 64, 8
_OTHERS = 1_000_000  # added to the seed
_CONFIG = CalibrationConfig(
    pooled_margin=1.0, logits_margin=1.0, activation_range="mse"
)


def steps(seed: int) -> int:
    """The largest difference between the logits of a seed's file and its student."""
    teacher = as_classifier(
        random_networks.random_model(seed), input_mean=120.0, input_scale=1 / 64
    )
    shape = teacher.image_shape
    network = post_training(
        float_network(teacher, _CONFIG),
        random_networks.random_images(seed, shape, _CALIBRATING),
        parse_widths(random_networks.widths_of(seed)),
        _CONFIG,
    )
    content = proof.convert(network, None, FileConfig(file_output="logits"))
    images = random_networks.random_images(seed + _OTHERS, shape, _COMPARED)
    return proof.largest_difference(network, content, images)


def main() -> None:
    """Measures seeds from the first up to the last, which is left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    arguments = parser.parse_args()
    for seed in range(arguments.first, arguments.last):
        keras.backend.clear_session()
        try:
            found: int | str = steps(seed)
        except DfqError as error:
            found = f"{type(error).__name__}: {error}"
        print(seed, random_networks.widths_of(seed), found, flush=True)


if __name__ == "__main__":
    main()
