"""A workdir as a run leaves it, made up: what the tests of its page share."""

import json
import pathlib

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph.description import ModelDescription
from dfq_tf.reports import facts

# Class names that a page must not take for its own markup.
NAMES = ("<script>alert(1)</script>", 'a "b" & c', "plain")

LAYERS = [
    {
        "name": name,
        "kind": kind,
        "weights": weights,
        "own_db": own,
        "total_db": total,
        "low": -2.5,
        "high": 3.25,
        "bits": 8,
        "bytes": count,
        "macs": 10 * count,
        "bn_low": remembered and -1.0,
        "bn_high": remembered and 2.0,
    }
    for name, kind, weights, own, total, count, remembered in (
        ("pixels", "pixels", "", None, None, 0, None),
        ("stem<b>", "conv+relu", "int4", 31.24, 31.24, 1480, 1.0),
        ("middle", "depthwise_conv", "int4", 12.34, 11.5, 90, 1.0),
        ("logits", "dense", "int8", 40.5, 11.75, 64, None),
    )
]
FILE = {
    "model": "tiny & small",
    "input": {
        "name": "image",
        "shape": [1, 4, 4, 3],
        "type": "uint8",
        "scale": 0.5,
        "zero_point": 3,
        "mean": [0.0],
        "std": [1.0],
    },
    "output": {
        "name": "probabilities",
        "shape": [1, 3],
        "type": "uint8",
        "scale": 0.00390625,
        "zero_point": 0,
    },
}
RUN = {
    "command": "python tools/run.py",
    "seed": "7",
    "python": "3.11.7",
    "machine": "made_up, 2 cores",
    "versions": {"tensorflow": "2.21.0"},
    "digests": {"teacher": "0123abc"},
}
FLAGS = {
    "teacher": "tiny.keras",
    "widths": "W4A8",
    "dataset": "digits",
    "calibration_images": "auto",
}
METRICS = {
    "df_q_training": {
        "seconds": 4.0,
        "agreement_on_held_out_images": 0.9375,
        "calibration_sources": {"generated": 512},
        "expected_agreement": 0.984375,
    },
    "df_q_seconds": 5.5,
    "teacher": {"accuracy": 0.875, "agreement": 1.0, "images": 160, "bytes": 64000},
    "df_q": {
        "accuracy": 0.8625,
        "agreement": 0.9625,
        "images": 160,
        "bytes": 16000,
        "latency_ms": 0.25,
        "xnnpack_pieces": 1,
        "worst_layer": "middle, 12.3 dB",
        "largest_difference_in_steps": 2,
    },
    "peak_memory_mib": 1234,
}


def write(
    folder: pathlib.Path,
    metrics=METRICS,
    page=("generated", "layers", "file"),
    flags=FLAGS,
    curves=True,
    num_images=60,
) -> pathlib.Path:
    """Writes a workdir whose best method is DF-Q.

    Args:
      folder: new.
      metrics: of metrics.json.
      page: what is kept for the page.
      flags: of flags.cfg.
      curves: whether there are TensorBoard scalars of the warm-up.
      num_images: generated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [f"--{name}={value}\n" for name, value in flags.items()]
    (folder / "flags.cfg").write_text("".join(lines))
    (folder / "df_q.tflite").write_bytes(b"of no meaning")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 4, 4, 3), np.uint8)
    scores = rng.normal(size=(num_images, 3)).astype(np.float32)
    description = ModelDescription((0.0,), (1.0,), "logits", NAMES)
    kept = {
        "generated": facts.generated(images, scores, description),
        "layers": LAYERS,
        "file": FILE,
    }
    facts.add(folder, "df_q", **{name: kept[name] for name in page})
    if curves:
        path = str(folder / "tensorboard" / "warm_up")
        writer = tf.summary.create_file_writer(path)
        with writer.as_default():
            for step in range(10, 60, 10):
                tf.summary.scalar("auxiliary_loss", 100 / step, step=step)
        writer.close()
    return folder
