"""How well DF-Q, or another method, does on a published network, and how long it takes.

    python benchmarks/published.py model.keras images.npz --seed=0

Prints one line: agreement with the float network, SQNR of the logits, how far the
logits reach, seconds; what was expected without data; and of the file, where the
archive has `labels`, accuracy beside the float network's, its size and latency. All is
measured on the archive's `images`, uint8 (n, height, width, channels), which
calibration does not see. With `--yardstick`, these images give the ranges: what data
would have brought.
"""

import argparse
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dfq_tf
from dfq_tf.graph import agreement
from dfq_tf.quantization import QuantizedNetwork, float_network, sqnr
from dfq_tf.tflite import TFLiteClassifier, convert
from dfq_tf.with_data.datasets import accuracy
from dfq_tf.with_data.yardsticks import calibrated_with_data


def main() -> None:
    """Measures one network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a file that Keras has saved")
    parser.add_argument("images", help="an .npz archive with `images`")
    parser.add_argument("--input_mean", type=float, nargs="+", default=None)
    parser.add_argument("--input_scale", type=float, nargs="+", default=None)
    parser.add_argument("--widths", default="W8A8")
    parser.add_argument("--method", default="df_q", help="as of the tools")
    parser.add_argument(
        "--images_from", default="auto", help="as --images of the tools"
    )
    parser.add_argument("--calibration_images", type=int, default=0)
    parser.add_argument("--most_images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--yardstick", action="store_true")
    arguments = parser.parse_args()
    fed = {
        name: getattr(arguments, name)
        for name in ("input_mean", "input_scale")
        if getattr(arguments, name) is not None
    }
    with np.load(arguments.images) as archive:
        images = archive["images"][: arguments.most_images]
        labels = archive["labels"][: len(images)] if "labels" in archive else None
    teacher = dfq_tf.load_classifier(arguments.model, **fed)
    exact = float_network(teacher)
    calibration = dfq_tf.CalibrationConfig(
        images=arguments.images_from, calibration_images=arguments.calibration_images
    )
    began, said = time.monotonic(), ""
    widths = dfq_tf.settings.parse_widths(arguments.widths)
    if arguments.yardstick:
        network = calibrated_with_data(teacher, images, calibration).quantized(widths)
    else:
        result = dfq_tf.quantize(
            teacher,
            method=arguments.method,
            widths=widths,
            calibration=calibration,
            seed=arguments.seed,
            show_progress=arguments.method != "df_q",
        )
        network = result.network
        found = result.measurements
        kind = result.source.kind
        said = (
            f"; expected {100 * found.get('expected_agreement', np.nan):.1f} %, SQNR "
            f"{found[f'sqnr_{kind}']:.1f} dB {kind}, "
            f"{found['sqnr_procedural']:.1f} procedural; {result.source}"
        )
    seconds = time.monotonic() - began
    scores, expected = network.scores(images), exact.scores(images)
    print(
        f"{pathlib.Path(arguments.model).stem} {arguments.widths} {arguments.method}: "
        f"agreement {100 * agreement(scores, expected):.1f} %, "
        f"SQNR {sqnr(expected, scores):.1f} dB on {len(images)} images, "
        f"logits to {np.abs(expected).max():.1f}, {seconds:.0f} s{said}"
        + ("" if labels is None else of_file(network, images, labels, expected))
    )


def of_file(
    network: QuantizedNetwork,
    images: np.ndarray,
    labels: np.ndarray,
    expected: np.ndarray,
) -> str:
    """Accuracy, size and latency of the TFLite file."""
    content = convert(network)
    file = TFLiteClassifier(content)
    return (
        f"; float {100 * accuracy(expected, labels):.1f} %, file "
        f"{100 * accuracy(file.scores(images), labels):.1f} %, "
        f"{len(content) / 1000:.0f} kB, {file.latency():.2f} ms"
    )


if __name__ == "__main__":
    main()
