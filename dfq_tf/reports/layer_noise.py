"""Where a file loses accuracy: signal-to-quantization-noise ratio, layer by layer.

SQNR = 10 log10(sum of float outputs^2 / sum of (file's outputs - float outputs)^2), in
decibels, over images, positions and channels. 6 dB are worth about one bit.

Each layer has two. `total_db` compares with the float network from the pixels on, so
it holds the noise of all layers before. `own_db` feeds the float layer with the very
integers that the file fed to its own: what this layer alone adds.
"""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.context import counted
from dfq_tf.errors import ExportError
from dfq_tf.files import write_text
from dfq_tf.graph import (
    FLOAT,
    KINDS,
    Classifier,
    Graph,
    compute,
    images_per_pass,
    num_values,
)
from dfq_tf.quantization import decibels, is_taken_in, measured, powers
from dfq_tf.reports import plots
from dfq_tf.tflite import Feeding, dequantized, kernel_types, open_interpreter


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """The quantization noise of one layer's output.

    Attributes:
      name: the layer's.
      kind: such as 'conv'; with the activation that it took in, 'conv+relu'.
      weights: what the file stores the kernel in, 'int8', 'int4' or 'int2'; empty
        without one.
      own_db: SQNR of what this layer alone adds, in decibels; infinite if nothing.
      total_db: SQNR from the pixels up to here, in decibels.
    """

    name: str
    kind: str
    weights: str
    own_db: float
    total_db: float


def measure(
    network: Classifier, content: bytes, images: np.ndarray
) -> list[LayerNoise]:
    """Measures the noise of every layer that a file stores.

    Args:
      network: the float network that the file was made of, from
        `post_training.float_network`.
      content: of a TFLite file that the project wrote: its tensors have the names of
        the nodes.
      images: uint8 (n, height, width, channels).

    Returns:
      One for each output that is quantized, in order.

    Raises:
      ExportError: the file's tensors are not those of the network.
    """
    graph = network.graph
    names = measured(graph)
    # All outputs at a time: of the network, of the file, and the widened ones below.
    size = 3 * FLOAT * num_values(graph)
    batch_size = images_per_pass(size, len(images))
    sums = {name: np.zeros((2, 2)) for name in names}
    for start in counted(range(0, len(images), batch_size), "passes of images"):
        batch = images[start : start + batch_size]
        stored = _stored_outputs(graph, content, batch)
        _check_stored(graph, names, stored)
        inputs = network.description.normalize(batch.astype(np.float32))
        stored[graph.image.name] = inputs  # in whatever type the file takes them
        exact = compute(graph, tf.constant(inputs), names)
        for name, values in zip(names, exact):
            alone = _alone(graph, name, stored)
            sums[name] += [
                powers(float_values.numpy(), stored[name])
                for float_values in (alone, values)
            ]
    types = kernel_types(content)
    result = []
    for name in names:
        inside = nodes_inside(graph, name)
        kinds = "+".join(graph.nodes[node].kind for node in inside)
        kernel = next((types[node] for node in inside if node in types), "")
        own, total = (decibels(*each) for each in sums[name])
        result.append(LayerNoise(name, kinds, kernel, own, total))
    return result


def worst(noise: Sequence[LayerNoise]) -> LayerNoise:
    """The layer that adds the most noise, measured against its own signal."""
    return min(noise, key=lambda layer: layer.own_db)


def as_csv(noise: Sequence[LayerNoise]) -> str:
    """A table with one line per layer and a header."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(LayerNoise)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for layer in noise:
        row = [getattr(layer, name) for name in names]
        writer.writerow([f"{v:.2f}" if isinstance(v, float) else v for v in row])
    return text.getvalue()


def write_report(
    noise: Sequence[LayerNoise], path: str | os.PathLike[str], title: str
) -> list[str]:
    """Writes PATH.csv and PATH.png, a bar chart with the worst layer marked.

    Without matplotlib there is no chart: the page of the run has one.

    Args:
      noise: from `measure`.
      path: of the two files, without a suffix.
      title: of the chart.

    Returns:
      The paths of the files that it wrote.
    """
    written = [f"{os.fspath(path)}.csv"]
    write_text(written[0], as_csv(noise))
    if not plots.has_pyplot():
        return written
    bad = worst(noise)
    # A layer without noise gets a bar as long as the longest.
    finite = [v for n in noise for v in (n.own_db, n.total_db) if math.isfinite(v)]
    limits = min([0.0, *finite]), max([0.0, *finite])
    own = np.clip([n.own_db for n in noise], *limits)
    total = np.clip([n.total_db for n in noise], *limits)
    rows = np.arange(len(noise))
    figure, axes = plots.pyplot().subplots(figsize=(8, 1.5 + 0.24 * len(noise)))
    axes.barh(rows, own, color=["tab:red" if n is bad else "tab:blue" for n in noise])
    axes.plot(total, rows, "k.", label="from the pixels on")
    axes.set_yticks(
        rows, [f"{n.name} ({n.weights})" if n.weights else n.name for n in noise]
    )
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR in dB: bars, what the layer alone adds (red: the worst)")
    axes.set_title(title)
    axes.legend(loc="lower right", fontsize=8)
    written.append(f"{os.fspath(path)}.png")
    plots.save(figure, written[-1])
    return written


def nodes_inside(graph: Graph, name: str) -> list[str]:
    """The nodes inside one operator of the file, the last of which is `name`."""
    (source, *_) = graph.nodes[name].inputs
    return [source, name] if is_taken_in(graph, source) else [name]


def _alone(graph: Graph, name: str, stored: Mapping[str, np.ndarray]) -> tf.Tensor:
    """What the float layer makes of what the file has stored before it."""
    inside = [graph.nodes[each] for each in nodes_inside(graph, name)]
    values = [tf.constant(stored[source]) for source in inside[0].inputs]
    for node in inside:
        values = [KINDS[node.kind].compute(node, values, node.weights)]
    return values[0]


def _check_stored(
    graph: Graph, names: Sequence[str], stored: dict[str, np.ndarray]
) -> None:
    """Raises ExportError unless a file has a tensor for each of some nodes."""
    for name in names:
        shape = graph.nodes[name].shape
        if name not in stored or stored[name].shape[1:] != shape:
            raise ExportError(
                f"the file has no tensor for layer {name} of shape {shape}; it was not "
                "made of this teacher, or not with these settings, or by another "
                "converter"
            )


def _stored_outputs(
    graph: Graph, content: bytes, images: np.ndarray
) -> dict[str, np.ndarray]:
    """What the file stores for each node, dequantized, float32 (n, ...)."""
    interpreter = open_interpreter(content, keeps_tensors=True)
    (image,) = interpreter.get_input_details()
    shape = tuple(map(int, image["shape"][1:]))
    if shape != images.shape[1:]:
        raise ExportError(
            f"the file takes images of {shape}, but these are {images.shape[1:]}"
        )
    tensors = [t for t in interpreter.get_tensor_details() if t["name"] in graph.nodes]
    values: dict[str, list[np.ndarray]] = {t["name"]: [] for t in tensors}
    for pixels in counted(Feeding(content, image).of(images), "images"):
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        for tensor in tensors:
            kept = interpreter.get_tensor(tensor["index"])[0]
            values[tensor["name"]].append(dequantized(kept, tensor))
    return {name: np.stack(each) for name, each in values.items()}
