"""Writes a quantized network as a TFLite file, node by node.

The file says what the network computes, and nothing else: every scale, zero point and
integer is the network's, and every tensor bears the name of its node. TensorFlow's
own converter does as well at W8A8 and W4A8; of the same networks it makes files that
answer differently at W3A8, files that LiteRT cannot run at W8A16, and none at W4A4
(docs/results.md).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.errors import ExportError
from dfq_tf.graph import KINDS, Graph, Node, by_output, frozen, title
from dfq_tf.quantization import Grid, QuantizedNetwork, grids
from dfq_tf.tflite import operators
from dfq_tf.tflite.flatbuffer import File, Tensor
from dfq_tf.tflite.operators import Integers, Operation

_LOWEST_INT8, _HIGHEST_INT8 = -128, 127


def write(network: QuantizedNetwork) -> bytes:
    """Writes a network as a TFLite file: uint8 pixels in, integer logits out.

    Args:
      network: from `post_training`, or back from its training.

    Returns:
      The content of the file.

    Raises:
      ExportError: a node cannot be written; it is named.
    """
    writer = _Writer(network)
    description = network.description
    scale = np.array(description.input_scale[:1], np.float32)
    writer.add_image(Grid(scale, round(description.input_mean[0]), 0, 255))
    for node in network.graph.nodes.values():
        writer.add(node)
    return writer.finish()


@dataclasses.dataclass(frozen=True)
class Outline:
    """What the file of a network would be.

    Attributes:
      operators: node -> the operators that are written for it, in order, such as
        'CONV_2D'; none where another node's operator has taken it in.
      taken_in: node -> the node whose operator has taken it in, as that of a
        convolution takes in a ReLU.
      num_bytes: size of the file.
    """

    operators: Mapping[str, tuple[str, ...]]
    taken_in: Mapping[str, str]
    num_bytes: int


def outline(graph: Graph) -> Outline:
    """Writes the file of a network at W8A8, with zeros for its integers.

    Args:
      graph: with pixels; a node that is refused is passed over.
    """
    blank = _Blank(graph)
    writer = _Writer(blank)
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
    return Outline(found, taken_in, len(writer.finish()))


class _Blank:
    """Stands for a network of 8 bits without ranges, all of whose integers are 0."""

    is_wide = False

    def __init__(self, graph: Graph) -> None:
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

    Attributes:
      file: what is written.
      stored: node -> the tensor of its output; none for one that is taken in.
    """

    def __init__(self, network: Integers) -> None:
        self.file = File()
        self.stored: dict[str, Tensor] = {}
        self._network = network
        self._graph = network.graph
        self._dtype = np.int16 if network.is_wide else np.int8

    def add_image(self, grid: Grid) -> None:
        """The uint8 input."""
        image = self._graph.image
        shape = (1, *(size or 1 for size in image.shape))
        self.stored[image.name] = self.file.tensor(image.name, shape, np.uint8, grid)

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
        if grids.is_taken_in(self._graph, node.name):
            (last,) = self._graph.consumers(node.name)
            activation = operators.fused_activation(last)
        grid = self._network.grid(last.name)
        output = self._output(last, grid)
        sources = [self.stored[name] for name in node.inputs]
        self._check_shared(node, sources, output)
        operators.write(
            Operation(self.file, self._network, node, sources, output, activation)
        )
        if self._may_be_below(last, grid):
            output = self._cut_off(output, last)
        self.stored[last.name] = output

    def pass_over(self, node: Node) -> None:
        """A node that has no operator: its output alone."""
        grid = self._network.grid(node.name)
        self.stored[node.name] = self._output(node, grid)

    def finish(self) -> bytes:
        """The file's content."""
        image = self.stored[self._graph.image.name]
        return self.file.finish(image, self.stored[self._graph.output])

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
