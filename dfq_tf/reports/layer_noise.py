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
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.errors import ExportError
from dfq_tf.files import replacing, write_text
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply
from dfq_tf.tflite.export import open_interpreter
from dfq_tf.training import memory


@dataclasses.dataclass(frozen=True)
class LayerNoise:
    """The quantization noise of one layer's output.

    Attributes:
      name: the layer's.
      kind: such as 'Conv2D'; with the activation that it took in, 'Conv2D+ReLU'.
      weights: what the file stores the kernel in, 'int8' or 'int4'; empty without one.
      own_db: SQNR of what this layer alone adds, in decibels; infinite if nothing.
      total_db: SQNR from the pixels up to here, in decibels.
    """

    name: str
    kind: str
    weights: str
    own_db: float
    total_db: float


def measure(
    graph: Graph, description: ModelDescription, content: bytes, images: np.ndarray
) -> list[LayerNoise]:
    """Measures the noise of every layer that a file stores.

    Args:
      graph: the float network that the file was made of, `pipeline.float_network`.
      description: how that network is fed.
      content: of a TFLite file that the project wrote: its tensors have the names of
        the layers.
      images: uint8 (n, height, width, channels).

    Returns:
      One for each layer with a scale of its own, in order.

    Raises:
      ExportError: the file's tensors are not those of the network.
    """
    names = apply.quantized_nodes(graph)
    model = graph.build(outputs=list(graph.nodes))
    # All outputs at a time: of the network, of the file, and the widened ones below.
    size = 3 * memory.FLOAT * memory.graph_size(graph)
    batch_size = memory.images_per_pass(size, len(images))
    types = _kernel_types(content)
    chains: dict[str, list[str]] = {}
    own = {name: np.zeros(2) for name in names}
    total = {name: np.zeros(2) for name in names}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        stored = _stored_outputs(graph, content, batch)
        _check_stored(graph, names, stored)
        inputs = description.normalize(tf.cast(batch, tf.float32))
        exact = dict(zip(graph.nodes, model(inputs, training=False)))
        for name in names:
            chains[name] = chain = _chain(graph, name, stored)
            sources = [stored[source] for source in graph.nodes[chain[0]].inputs]
            alone = sources if len(sources) > 1 else sources[0]
            for node in chain:
                alone = model.get_layer(node)(alone, training=False)
            own[name] += _powers(np.asarray(alone), stored[name])
            total[name] += _powers(np.asarray(exact[name]), stored[name])
    result = []
    for name in names:
        kind = "+".join(graph.nodes[node].kind for node in chains[name])
        kernels = [types[node] for node in chains[name] if node in types]
        result.append(
            LayerNoise(
                name,
                kind,
                kernels[0] if kernels else "",
                _decibels(*own[name]),
                _decibels(*total[name]),
            )
        )
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
) -> None:
    """Writes PATH.csv and PATH.png, a bar chart with the worst layer marked.

    Args:
      noise: from `measure`.
      path: of the two files, without a suffix.
      title: of the chart.
    """
    write_text(f"{os.fspath(path)}.csv", as_csv(noise))
    bad = worst(noise)
    # A layer without noise gets a bar as long as the longest.
    finite = [v for n in noise for v in (n.own_db, n.total_db) if math.isfinite(v)]
    limits = min([0.0, *finite]), max([0.0, *finite])
    own = np.clip([n.own_db for n in noise], *limits)
    total = np.clip([n.total_db for n in noise], *limits)
    rows = np.arange(len(noise))
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.24 * len(noise)))
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
    figure.tight_layout()
    with replacing(f"{os.fspath(path)}.png") as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files; slow to import."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _chain(graph: Graph, name: str, stored: dict[str, np.ndarray]) -> list[str]:
    """The nodes inside one operator of the file, the last of which is `name`."""
    chain = [name]
    while True:
        (source, *others) = graph.nodes[chain[0]].inputs
        if others or source in stored:
            return chain
        chain.insert(0, source)


def _powers(signal: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Sums of the squares of a signal, and of its noise: float64 (2,)."""
    power = np.sum(np.square(signal, dtype=np.float64))
    noise = np.sum(np.square(noisy.astype(np.float64) - signal))
    return np.array([power, noise])


def _decibels(power: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return float(10 * np.log10(power / noise)) if power else -math.inf


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
    for pixels in images:
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        for tensor in tensors:
            scale, zero_point = tensor["quantization"]
            integers = interpreter.get_tensor(tensor["index"])[0].astype(np.float32)
            values[tensor["name"]].append((integers - zero_point) * scale)
    return {name: np.stack(each) for name, each in values.items()}


def _kernel_types(content: bytes) -> dict[str, str]:
    """Node name -> type in which the file stores its kernel."""
    from ai_edge_litert import schema_py_generated as schema

    names = {v: k.lower() for k, v in vars(schema.TensorType).items() if k.isupper()}
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    return {
        tensor.name.decode().removesuffix("/kernel"): names[tensor.type]
        for tensor in model.subgraphs[0].tensors
        if tensor.name.decode().endswith("/kernel")
    }
