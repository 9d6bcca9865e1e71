"""DF-Q of a network of keras.applications with random weights: time, memory, agreement.

    python benchmarks/applications.py MobileNetV2 224 --alpha=1.0

One network per process, so that the peak memory is its own. BN layers hold the
statistics of a pass over random smooth images (tests/applications.py). Prints one row
of the table in docs/experiments/networks.md.
"""

import argparse
import pathlib
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.api import quantize
from dfq_tf.compat import keras3
from dfq_tf.graph.classifier import agreement
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.settings import DistillationConfig
from dfq_tf.tflite.running import TFLiteClassifier
from tests import applications

_CLASSES = 10


def main() -> None:
    """Builds, quantizes and measures one network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=applications.NETWORKS)
    parser.add_argument("side", type=int)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--method", default="df_q")
    parser.add_argument("--warm_up_steps", type=int, default=100)
    arguments = parser.parse_args()
    shape = (arguments.side, arguments.side, 3)
    settings = {} if arguments.alpha is None else {"alpha": arguments.alpha}
    model, fed = applications.build(
        keras3(), arguments.network, shape, _CLASSES, **settings
    )
    began = time.monotonic()
    teacher = as_classifier(model, **fed)
    imported = time.monotonic() - began
    config = DistillationConfig(warm_up_steps=arguments.warm_up_steps)
    result = quantize(teacher, method=arguments.method, config=config)
    seconds = time.monotonic() - began
    tflite = TFLiteClassifier(result.tflite)
    smooth = applications.smooth_images(shape, 200, seed=0)
    agreements = [
        agreement(tflite.scores(images), teacher.scores(images))
        for images in (result.held_out[:200], smooth)
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{arguments.network} {arguments.side} | {model.count_params():,} | "
        f"{imported:.1f} s | {seconds / 60:.1f} min | {peak:.2f} GiB | "
        f"{100 * agreements[0]:.1f} % | {100 * agreements[1]:.1f} % | "
        f"{len(result.tflite) / 1000:.0f} kB | {tflite.latency(50):.2f} ms | "
        f"{tflite.num_pieces}"
    )


if __name__ == "__main__":
    main()
