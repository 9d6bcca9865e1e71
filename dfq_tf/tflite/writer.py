"""Writes a quantized network as a TFLite file, node by node.

The file says what the network computes, and nothing else: every scale, zero point and
integer is the network's, and every tensor bears the name of its node. TensorFlow's
own converter does as well at W8A8 and W4A8; of the same networks it makes files that
answer differently at W3A8, files that LiteRT cannot run at W8A16, and none at W4A4
(docs/experiments/files.md).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.errors import ExportError
from dfq_tf.graph import (
    KINDS,
    Classifier,
    Graph,
    ModelDescription,
    Node,
    by_output,
    frozen,
    title,
)
from dfq_tf.quantization import Grid, QuantizedNetwork, is_taken_in, kernel_bits
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite import forms, metadata, operators, targets
from dfq_tf.tflite.ends import Ends, add_answers, ends_of, image_grid
from dfq_tf.tflite.flatbuffer import File, Tensor
from dfq_tf.tflite.forms import Integers
from dfq_tf.tflite.metadata import Metadata
from dfq_tf.tflite.operators import Operation

_LOWEST_INT8, _HIGHEST_INT8 = -128, 127
# How far scales may be apart that are the same: rounding to float32.
_TOLERANCE = 1e-6


def write(network: QuantizedNetwork, config: FileConfig | None = None) -> bytes:
    """Writes a network as a TFLite file.

    Args:
      network: from `post_training`, or back from its training.
      config: what the file takes and gives, and what it says of itself; None for uint8
        pixels in, the network's own integers for logits out, and no word.

    Returns:
      The content of the file.

    Raises:
      ExportError: a node cannot be written; it is named.
    """
    ends = ends_of(network, config)
    writer = _Writer(network, ends, config or FileConfig())
    writer.add_image(image_grid(network, ends.input_type))
    for node in network.graph.nodes.values():
        writer.add(node)
    return writer.finish(None if config is None else _metadata(network, ends, config))


def _metadata(network: QuantizedNetwork, ends: Ends, config: FileConfig) -> Metadata:
    """What the file says of itself."""
    description = network.description
    mean, std = {
        "uint8": (0.0, 1.0),
        "int8": (128.0, 1.0),
        "float32": (description.input_mean[0], 1 / description.input_scale[0]),
    }[ends.input_type.name]
    output_range = (0.0, 1.0) if ends.output_name == "probabilities" else None
    if ends.output_type != np.float32:
        limits = np.iinfo(ends.output_type)
        output_range = float(limits.min), float(limits.max)
    return Metadata(
        name=config.model_name,
        description=config.model_description,
        version=config.model_version,
        author=config.model_author,
        license=config.model_license,
        channels=network.classifier.image_shape[-1],
        mean=(mean,),
        std=(std,),
        input_range=((0 - mean) / std, (255 - mean) / std),
        output_name=ends.output_name,
        output_range=output_range,
        class_names=ends.class_names,
    )


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the file of a network would be.

    Attributes:
      operators: node -> the operators that are written for it, in order, such as
        'CONV_2D'; none where another node's operator has taken it in.
      taken_in: node -> the node whose operator has taken it in, as that of a
        convolution takes in a ReLU.
      behind: the operators behind the logits, in order.
    """

    operators: Mapping[str, tuple[str, ...]]
    taken_in: Mapping[str, str]
    behind: tuple[str, ...]


def outline(
    graph: Graph, description: ModelDescription, config: FileConfig = FileConfig()
) -> Outline:
    """Writes the file of a network at W8A8, with zeros for its integers.

    Args:
      graph: with pixels; a node that is refused is passed over.
      description: of the network.
      config: what the file takes and gives, and what it is for.
    """
    blank = _Blank(graph, description)
    ends = ends_of(blank, config)
    writer = _Writer(blank, ends, config)
    found: dict[str, tuple[str, ...]] = {}
    taken_in: dict[str, str] = {}
    writer.add_image(blank.grid(graph.image.name))
    for name, node in blank.graph.nodes.items():
        done, stored = len(writer.file.operators), set(writer.stored)
        if KINDS[node.kind].refuses(node) and name not in stored:
            writer.pass_over(node)
        else:
            writer.add(node)
        found[name] = tuple(writer.file.operators[done:])
        others = set(writer.stored) - stored - {name}
        taken_in.update(dict.fromkeys(others, name))
    done = len(writer.file.operators)
    add_answers(writer.file, blank, writer.stored[blank.graph.output], ends)
    return Outline(found, taken_in, tuple(writer.file.operators[done:]))


def check_target(network: Classifier, widths: BitWidths, config: FileConfig) -> None:
    """Refuses, before any work, what no file for a target can have.

    Args:
      network: rewritten for integers, see `float_network`.
      widths: bits of weights and activations.
      config: what the file takes and gives, and what it is for.

    Raises:
      ConfigError: a width or a type; it says which ones the target takes.
      UnsupportedLayerError: layers are not for the target; they are named.
    """
    targets.check_target_takes(config, widths)
    bits = dict.fromkeys(network.graph.nodes, widths.num_bits_activation)
    check_layers(network, config, kernel_bits(network.graph, widths), bits)


def check_layers(
    network: Classifier, config: FileConfig, *bits: Mapping[str, int]
) -> None:
    """Refuses the layers that a target does not take.

    Args:
      network: rewritten for integers.
      config: what the file takes and gives, and what it is for.
      *bits: of each kernel, and of each output, where they are known.

    Raises:
      UnsupportedLayerError: naming all of them.
    """
    if targets.TARGETS[config.target].versions is None:
        return  # LiteRT, in which the proof runs, says it itself
    found = outline(network.graph, network.description, config)
    targets.check_layers(config.target, network.graph, found.operators, *bits)


class _Blank:
    """Stands for a network of 8 bits without ranges, all of whose integers are 0."""

    is_wide = False

    def __init__(self, graph: Graph, description: ModelDescription) -> None:
        self.description = description
        nodes = [
            dataclasses.replace(
                node,
                # A size that may be any counts as one: nothing hangs on it here.
                shape=tuple(size or 1 for size in node.shape),
                weights=frozen(
                    {
                        role: np.broadcast_to(np.float32(0), weight.shape)
                        for role, weight in node.weights.items()
                    }
                ),
            )
            for node in graph.nodes.values()
        ]
        self.graph = Graph(nodes, graph.output)
        self.kernel_bits = {name: 8 for name in graph.nodes}

    def grid(self, name: str) -> Grid:
        """The integers of int8 as they are."""
        return Grid(np.ones(1, np.float32), 0, _LOWEST_INT8, _HIGHEST_INT8)

    def kernel_integers(self, name: str) -> tuple[np.ndarray, Grid]:
        """Zeros, and a scale for each output."""
        node = self.graph.nodes[name]
        kernel = np.zeros(node.weights["kernel"].shape, np.int8)
        scale = self.bias_scale(name).astype(np.float32)
        return kernel, Grid(scale, 0, -_HIGHEST_INT8, _HIGHEST_INT8)

    def bias_scale(self, name: str) -> np.ndarray:
        """Ones."""
        node = self.graph.nodes[name]
        return np.ones(by_output(node, node.weights["kernel"]).shape[-1])


class _Writer:
    """Goes through the nodes of a network and writes them.

    Args:
      network: has the integers.
      ends: what the file takes and gives.
      config: says what the file is for.

    Attributes:
      file: what is written.
      stored: node -> the tensor of its output; none for one that is taken in.
    """

    def __init__(self, network: Integers, ends: Ends, config: FileConfig) -> None:
        self.file = File()
        self.stored: dict[str, Tensor] = {}
        self._ends = ends
        self._network = network
        self._graph = network.graph
        self._dtype = np.int16 if network.is_wide else np.int8
        self._instead = targets.TARGETS[config.target].instead
        self._forms = forms.chosen(network, config)

    def add_image(self, grid: Grid | None) -> None:
        """The input; what its integers mean, None for floats.

        Where the network has the very integers of the input, it needs no operator.
        """
        image, pixels = self._graph.image, list(self._graph.nodes)[1]
        own, dtype = self._network.grid(pixels), self._ends.input_type
        is_own = (
            dtype == self._dtype
            and grid is not None
            and own.zero_point == grid.zero_point
            and np.allclose(own.scale, grid.scale, rtol=_TOLERANCE, atol=0)
        )
        name, grid = (pixels, own) if is_own else (image.name, grid)
        shape = (1, *(size or 1 for size in image.shape))
        tensor = self.file.tensor(name, shape, dtype, grid)
        self.stored[image.name] = self.stored[name] = tensor

    def add(self, node: Node) -> None:
        """The operator of one node; none if another node has taken it in.

        Raises:
          ExportError: it cannot be written.
        """
        if node.name in self.stored:
            return
        reason = KINDS[node.kind].refuses(node)
        if reason:
            raise ExportError(
                f"layer {node.name} ({title(node)}) cannot be written: {reason}"
            )
        last, activation = node, "NONE"
        if is_taken_in(self._graph, node.name):
            (last,) = self._graph.consumers(node.name)
            activation = operators.fused_activation(last)
        grid = self._network.grid(last.name)
        output = self._output(last, grid)
        sources = [self.stored[name] for name in node.inputs]
        self._check_shared(node, sources, output)
        operation = Operation(
            self.file,
            self._network,
            node,
            sources,
            output,
            activation,
            self._instead,
            self._forms.get(node.name),
        )
        operators.write(operation)
        if self._may_be_below(last, grid):
            output = self._cut_off(output, last)
        self.stored[last.name] = output

    def pass_over(self, node: Node) -> None:
        """A node that has no operator: its output alone."""
        grid = self._network.grid(node.name)
        self.stored[node.name] = self._output(node, grid)

    def finish(self, said: Metadata | None) -> bytes:
        """The file's content; what it says of itself, None for nothing."""
        ends, image = self._ends, self.stored[self._graph.image.name]
        logits = self.stored[self._graph.output]
        output = add_answers(self.file, self._network, logits, ends)
        if said is None:
            return self.file.finish(image, output, ends.output_name, {})
        buffers = {metadata.BUFFER_NAME: metadata.as_bytes(said)}
        content = self.file.finish(image, output, ends.output_name, buffers)
        labels = metadata.labels_text(said.class_names)
        return metadata.with_files(content, {metadata.LABELS_FILE: labels})

    def _output(self, node: Node, grid: Grid) -> Tensor:
        shape = (1, *(size or 1 for size in node.shape))
        return self.file.tensor(node.name, shape, self._dtype, grid)

    def _check_shared(self, node: Node, sources: list[Tensor], output: Tensor) -> None:
        """Raises ExportError where an operator that copies would have to rescale."""
        assert output.grid is not None
        if KINDS[node.kind].grid != "shared":
            return
        for name, source in zip(node.inputs, sources):
            assert source.grid is not None
            if not output.grid.same_as(source.grid):
                raise ExportError(
                    f"layer {node.name} ({title(node)}) has another grid than "
                    f"{name}, which it reads, and its operator cannot rescale"
                )

    def _may_be_below(self, node: Node, grid: Grid) -> bool:
        """Whether an operator may give integers below the lowest of its grid.

        Above, int8 itself ends where the grid does. A ReLU ends at the zero point, a
        table has no other values, and who copies integers has none below.
        """
        kind = KINDS[node.kind]
        ends_itself = node.kind == "relu" or kind.operator == "LOOKUP"
        return (
            not (self._network.is_wide or ends_itself or kind.grid == "shared")
            and grid.lowest > _LOWEST_INT8
        )

    def _cut_off(self, tensor: Tensor, node: Node) -> Tensor:
        """Keeps a tensor of fewer than 8 bits from going below its lowest integer."""
        grid = tensor.grid
        assert grid is not None
        self.file.rename(tensor, f"{node.name}/raw")
        lowest = np.full((1,) * len(tensor.shape), grid.lowest, np.int8)
        output = self._output(node, grid)
        operation = Operation(self.file, self._network, node, [tensor], output, "NONE")
        ends = self.file.constant(f"{node.name}/lowest", lowest, grid)
        operation.add("MAXIMUM", [tensor, ends], schema.MaximumMinimumOptionsT())
        return output
