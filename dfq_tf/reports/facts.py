"""What a run keeps for its page, beside its metrics: plain data in NAME_page.json."""

import base64
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.files import read_object, write_text
from dfq_tf.graph import (
    Classifier,
    Graph,
    ModelDescription,
    Node,
    has_kernel,
    macs_of,
    model_name,
    softmax,
)
from dfq_tf.quantization import QuantizedNetwork, check_widths
from dfq_tf.reports import layer_noise
from dfq_tf.settings import GENERATED, BitWidths

# Images on the page, and the most pixels a side that one has there.
NUM_SHOWN, MOST_PIXELS = 48, 80
# How far the values of a channel spread around what BatchNormalization remembers.
_DEVIATIONS = 3.0


def generated(
    images: np.ndarray,
    scores: np.ndarray,
    description: ModelDescription,
    kind: str = GENERATED,
) -> dict[str, Any]:
    """What images held out look like, and what the teacher takes them for.

    Args:
      images: uint8 (n, height, width, channels), of 1, 3 or 4 channels.
      scores: (n, num_classes), the teacher's for them.
      description: of the teacher.
      kind: of the images, see `Source.kind`.

    Returns:
      kind, and count: n. class_names: of all classes. is_exclusive: whether a class
      excludes all others. per_class: how many images have each. shown: the first of
      them: png (base64), class (an index), confidence (in [0, 1]).
    """
    classes = scores.argmax(-1)
    confidences = _probabilities(scores, description)[np.arange(len(scores)), classes]
    shown = [
        {
            "png": _png(image),
            "class": int(classes[i]),
            "confidence": round(float(confidences[i]), 4),
        }
        for i, image in enumerate(images[:NUM_SHOWN])
    ]
    return {
        "kind": kind,
        "count": len(images),
        "class_names": list(description.class_names),
        "is_exclusive": description.is_exclusive,
        "per_class": np.bincount(classes, minlength=scores.shape[-1]).tolist(),
        "shown": shown,
    }


def _probabilities(scores: np.ndarray, description: ModelDescription) -> np.ndarray:
    if description.output != "logits":
        return scores
    if not description.is_exclusive:
        return 1 / (1 + np.exp(-scores.astype(np.float64)))
    return softmax(scores)


def _png(image: np.ndarray) -> str:
    """A picture of an image; of a large one, the means of its blocks of pixels."""
    times = -(-max(image.shape[:2]) // MOST_PIXELS)
    if times > 1:
        height, width = (times * (side // times) for side in image.shape[:2])
        blocks = image[:height, :width].reshape(
            height // times, times, width // times, times, -1
        )
        image = np.rint(blocks.mean((1, 3))).astype(np.uint8)
    return base64.b64encode(tf.io.encode_png(image).numpy()).decode()


def layers(
    source: Classifier,
    network: QuantizedNetwork,
    noise: Sequence[layer_noise.LayerNoise],
    has_memory: bool = True,
) -> list[dict[str, Any]]:
    """What each layer of a file holds and loses.

    Args:
      source: the float network, before it was made ready for integers.
      network: quantized.
      noise: of the file's layers, from `layer_noise.measure`.
      has_memory: whether the quantized layers still have the scales of the source's,
        so that its BatchNormalization can be compared: not after equalization.

    Returns:
      For each layer: name, kind, weights (the type that stores them), kernel_bits (that
      they have; None without a kernel), own_db, total_db (None for infinite), low and
      high (what its integers can mean), bits (of them), bytes (of its weights), macs
      (multiply-accumulates of one image), and bn_low and bn_high, the mean plus and
      minus 3 deviations that BatchNormalization remembers, over all channels; None
      where none is.
    """
    bias_bytes, bits = 8 if network.is_wide else 4, network.kernel_bits
    rows = []
    for layer in noise:
        low, high = network.ranges[layer.name]
        nodes = [
            network.graph.nodes[name]
            for name in layer_noise.nodes_inside(network.graph, layer.name)
            if network.graph.nodes[name].weights
        ]
        memory = _remembered(source, layer.name) if has_memory else None
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "weights": layer.weights,
                "kernel_bits": next(
                    (bits[node.name] for node in nodes if node.name in bits), None
                ),
                "own_db": _finite(layer.own_db),
                "total_db": _finite(layer.total_db),
                "low": round(float(low), 5),
                "high": round(float(high), 5),
                "bits": network.bits[layer.name],
                "bytes": sum(_bytes(node, layer.weights, bias_bytes) for node in nodes),
                "macs": macs_of(nodes),
                "bn_low": memory and round(memory[0], 5),
                "bn_high": memory and round(memory[1], 5),
            }
        )
    return rows


def _finite(decibels: float) -> float | None:
    return round(decibels, 2) if math.isfinite(decibels) else None


def _bytes(node: Node, weights: str, bias_bytes: int) -> int:
    """Bytes of a node's weights in the file; few bits are packed, biases always there.

    Args:
      node: of the quantized network.
      weights: the type of its kernel in the file, such as 'int4'.
      bias_bytes: of the bias of one output.
    """
    sizes = {role: values.size for role, values in node.weights.items()}
    kernel = sizes.pop("kernel", 0)
    sizes.pop("bias", None)  # zeros are written where there is none
    biases = bias_bytes * (node.shape[-1] or 0) if kernel else 0
    num_bits = int(weights.removeprefix("int") or 8)
    return -(-kernel * num_bits // 8) + biases + sum(sizes.values())


def _remembered(source: Classifier, name: str) -> tuple[float, float] | None:
    """What BatchNormalization says of a layer's outputs; None where none does."""
    graph = source.graph
    if name not in graph.nodes:
        return None
    node = graph.nodes[name]
    before = graph.nodes[node.inputs[0]] if node.kind == "relu" else node
    if before.kind == "batch_normalization":
        ends = _spread(before, "beta", "gamma")
        if node.kind == "relu":
            top = node.settings["top"]
            ends = np.clip(ends, 0, np.inf if top is None else top)
        return float(ends[0]), float(ends[1])
    after = graph.consumers(name)
    for reader in after:
        if reader.kind == "batch_normalization":
            # One that alone reads a kernel's output has gone into that kernel.
            is_inside = has_kernel(node) and len(after) == 1
            of = ("beta", "gamma") if is_inside else ("mean", "variance")
            low, high = _spread(reader, *of)
            return float(low), float(high)
    return None


def _spread(node: Node, mean: str, deviation: str) -> np.ndarray:
    """Lowest and highest of the channels' means minus and plus some deviations."""
    means, sizes = (node.weights[r].astype(np.float64) for r in (mean, deviation))
    sizes = np.sqrt(sizes) if deviation == "variance" else np.abs(sizes)
    spread = _DEVIATIONS * sizes
    return np.array([(means - spread).min(), (means + spread).max()])


def takes_16_bits(graph: Graph) -> bool:
    """Whether all layers of a network can have activations of 16 bits.

    Args:
      graph: rewritten for integers.
    """
    try:
        check_widths(graph, BitWidths(num_bits_activation=16))
    except UnsupportedLayerError:
        return False
    return True


def network_name(flags: Mapping[str, str]) -> str:
    """What the network is called that flags say is quantized; empty if none do.

    Args:
      flags: of a run, name -> value, as a flagfile has them.
    """
    return model_name(flags.get("student") or flags.get("teacher") or "")


def read(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """What was kept of a method or phase; empty if nothing was."""
    return read_object(_path(folder, name))


def add(folder: str | os.PathLike[str], name: str, **more: Any) -> None:
    """Adds to what is kept of a method or phase, replacing what has the same name."""
    merged = {**read(folder, name), **more}
    write_text(_path(folder, name), json.dumps(merged) + "\n")


def _path(folder: str | os.PathLike[str], name: str) -> pathlib.Path:
    return pathlib.Path(folder) / f"{name}_page.json"
