"""The student: a Keras model of tfmot's wrappers that trains, and its weights back.

tfmot wraps Keras layers only, so each node becomes one `GraphLayer`, which computes
what the table of layers says.
"""

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from dfq_tf.compat import keras, tf, tfmot
from dfq_tf.errors import ModelError
from dfq_tf.graph import (
    KINDS,
    Classifier,
    Graph,
    ModelDescription,
    Node,
    described_at,
    frozen,
    layers,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.quantizers import NodeQuantizeConfig
from dfq_tf.quantization.step_sizes import INSURED_BITS, clipped, growing


@keras.utils.register_keras_serializable("dfq_tf")
class GraphLayer(keras.layers.Layer):
    """One node as a Keras layer: what `KINDS[kind].compute` says, its weights trained.

    Args:
      node: without weights, as plain data: see `node_config`.
      weight_shapes: role -> shape of a weight.
      **kwargs: those of any layer.
    """

    def __init__(
        self, node: dict[str, Any], weight_shapes: dict[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.node = _node_of(node)
        self.weight_shapes = {r: tuple(shape) for r, shape in weight_shapes.items()}

    def build(self, input_shape: Any) -> None:
        """Makes the weights, as attributes of the roles' names."""
        if self.built:
            return
        for role, shape in self.weight_shapes.items():
            setattr(self, role, self.add_weight(role, shape, initializer="zeros"))
        super().build(input_shape)

    def call(self, inputs: Any) -> tf.Tensor:
        """Computes the node."""
        sources = inputs if isinstance(inputs, (list, tuple)) else [inputs]
        weights = {role: getattr(self, role) for role in self.weight_shapes}
        return _compute(self.node, sources, weights)

    def compute_output_shape(self, input_shape: Any) -> tf.TensorShape:
        """The shape that the node has."""
        return tf.TensorShape((None, *self.node.shape))

    def get_build_config(self) -> None:
        """None: Keras would build the layer once more when it loads a file."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "node": node_config(self.node),
            "weight_shapes": {
                r: list(shape) for r, shape in self.weight_shapes.items()
            },
        }


@keras.utils.register_keras_serializable("dfq_tf")
class NodeWrapper(tfmot.quantization.keras.QuantizeWrapperV2):
    """tfmot's wrapper, whose Python runs as it is: no condition in it is a tensor.

    AutoGraph would rewrite it at each trace, which takes longer than the rest.
    """

    call = tf.autograph.experimental.do_not_convert(
        tfmot.quantization.keras.QuantizeWrapperV2.call
    )


# Keras' reader of .h5 files looks a layer inside another one up by its bare name.
keras.utils.get_custom_objects()[GraphLayer.__name__] = GraphLayer


@tf.autograph.experimental.do_not_convert
def _compute(node: Node, sources: Any, weights: Any) -> tf.Tensor:
    return KINDS[node.kind].compute(node, sources, weights)


def node_config(node: Node) -> dict[str, Any]:
    """A node without its weights, as JSON can hold it."""
    return {
        "name": node.name,
        "kind": node.kind,
        "inputs": list(node.inputs),
        "shape": list(node.shape),
        "settings": dict(node.settings),
        "layers": list(node.layers),
    }


def _node_of(config: Mapping[str, Any]) -> Node:
    return Node(
        config["name"],
        config["kind"],
        tuple(config["inputs"]),
        tuple(config["shape"]),
        frozen({key: _plain(value) for key, value in config["settings"].items()}),
        layers=tuple(config["layers"]),
    )


def _plain(value: Any) -> Any:
    """A setting that JSON has made a list of, or Keras a wrapped one, as a tuple."""
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def build(network: QuantizedNetwork, learn_ranges: bool = False) -> keras.Model:
    """The student: its weights train as those of any model.

    Args:
      network: gives weights, bits and ranges.
      learn_ranges: whether step sizes of less than 8 bits train too, see `growing`;
        but for those that several roundings share.

    Returns:
      A functional model from normalised images to logits. It computes what
      `network.scores` does, bit for bit.
    """
    graph = network.graph
    most_growth = _most_growth(network) if learn_ranges else {}
    image = keras.layers.Input(graph.image.shape, name=_layer_name(0))
    tensors = {graph.image.name: image}
    for index, (name, node) in enumerate(list(graph.nodes.items())[1:], start=1):
        shapes = {role: weight.shape for role, weight in node.weights.items()}
        layer: Any = GraphLayer(node_config(node), shapes, name=_layer_name(index))
        ranges = network.kernel_ranges.get(name, np.zeros(()))
        bits, kernel_bits = network.bits.get(name), network.kernel_bits.get(name)
        if bits is not None or kernel_bits is not None:
            num_ranges = int(ranges.size) if np.ndim(ranges) else 0
            config = NodeQuantizeConfig(
                kernel_bits,
                num_ranges,
                bits,
                grids.is_average(node),
                learn_ranges and (kernel_bits or INSURED_BITS) < INSURED_BITS,
                most_growth.get(name),
            )
            layer = NodeWrapper(layer, config)
        inputs = [tensors[source] for source in node.inputs]
        tensors[name] = layer(inputs if len(inputs) > 1 else inputs[0])
    model = keras.Model(image, tensors[graph.output], name="student")
    for part in _parts(model):
        name = part.node.name
        values: dict[str, Any] = {**graph.nodes[name].weights}
        if name in network.bits:
            values["output_min"], values["output_max"] = network.ranges[name]
        if name in network.kernel_ranges:
            values["kernel_max"] = network.kernel_ranges[name]
        for role, value in values.items():
            part.variables[role].assign(value)
    return model


def _most_growth(network: QuantizedNetwork) -> dict[str, float]:
    """Of each output whose range learns: those that no other has to follow."""
    members, found = network.groups, {}
    for owner, most in growing(network).items():
        names = [name for name in members[owner] if name in network.bits]
        if len(names) == 1:
            found[names[0]] = most
    return found


def _layer_name(index: int) -> str:
    """Keras takes no names with blanks or slashes, which a user's layer may have."""
    return f"node_{index}"


def _index(layer_name: str) -> int:
    return int(layer_name.removeprefix("node_"))


def trained(network: QuantizedNetwork, model: keras.Model) -> QuantizedNetwork:
    """The network with weights and ranges that a student has now, and rounded biases.

    Args:
      network: what `build` was called with.
      model: what it gave, trained since.
    """
    parts = _parts(model)
    ranges = {p.node.name: p.range() for p in parts if p.has_grown("output")}
    kernels = {p.node.name: p.kernel_range() for p in parts if p.has_grown("kernel")}
    learnt = dataclasses.replace(
        network,
        ranges={**network.ranges, **ranges},
        kernel_ranges={**network.kernel_ranges, **kernels},
    )
    learnt = learnt.with_weights({part.node.name: part.weights() for part in parts})
    return learnt.with_room_for_biases().with_rounded_biases()


def save(network: QuantizedNetwork, path: str | os.PathLike[str]) -> None:
    """Writes the student to `path` (.keras or .h5) and the description beside it.

    Raises:
      ConfigError: no model file has such a name.
    """
    with described_at(path, network.description) as temporary:
        build(network).save(temporary)


def is_student_file(path: str | os.PathLike[str]) -> bool:
    """Whether a .keras or .h5 file holds wrapped nodes, as those of `save` do.

    Args:
      path: of any file, or of none.
    """
    wrapper = NodeWrapper.__name__
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_keras = "config.json" in archive.namelist()
            return is_keras and wrapper.encode() in archive.read("config.json")
    try:
        with h5py.File(path, "r") as file:
            return wrapper in str(file.attrs.get("model_config"))
    except OSError:  # none, or a damaged one: whoever reads it says so
        return False


def check_student(model: Any) -> None:
    """Raises ModelError unless a model is one of `build`."""
    if not _parts(model):
        raise ModelError(
            "the student is a float model without fake quantization; make a quantized "
            "one of it with dfq_tf.quantize or tools/quantize.py"
        )


def network_of(model: Any, description: ModelDescription) -> QuantizedNetwork:
    """The network that a student was built of, with the weights that it has now.

    Args:
      model: of `build`, perhaps read from a file.
      description: of the network.

    Raises:
      ModelError: the model is no student.
    """
    check_student(model)
    parts = _parts(model)
    (image,) = parts[0].node.inputs
    nodes = [layers.image(image, tuple(model.input_shape[1:]))]
    nodes += [part.node.with_weights(**part.weights()) for part in parts]
    outputs = [part for part in parts if part.bits is not None]
    kernels = [part for part in parts if part.kernel_bits is not None]
    return QuantizedNetwork(
        Classifier(Graph(nodes, nodes[-1].name), description),
        {part.node.name: part.bits or 0 for part in outputs},
        {part.node.name: part.range() for part in outputs},
        {part.node.name: part.kernel_bits or 0 for part in kernels},
        {part.node.name: part.kernel_range() for part in kernels},
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """One node of a student.

    Attributes:
      node: without weights.
      variables: by their short names: kernel, bias, kernel_max, output_min, ...
      bits: of the output; None if it is not quantized.
      kernel_bits: of the kernel; None without one.
      most_growth: see `quantizers.ActivationQuantizer`.
    """

    node: Node
    variables: dict[str, tf.Variable]
    bits: int | None
    kernel_bits: int | None
    most_growth: float | None

    def weights(self) -> dict[str, np.ndarray]:
        """The node's weights by role."""
        roles = [r for r in KINDS[self.node.kind].weights if r in self.variables]
        return {role: self.variables[role].numpy() for role in roles}

    def range(self) -> tuple[float, float]:
        """The range of the node's output."""
        low, high = (self.variables[f"output_{end}"].numpy() for end in ("min", "max"))
        growth = self._growth("output", self.most_growth)
        return float(low * growth), float(high * growth)

    def kernel_range(self) -> np.ndarray:
        """Largest magnitudes of the node's kernel."""
        return self.variables["kernel_max"].numpy() * self._growth("kernel", np.inf)

    def has_grown(self, role: str) -> bool:
        """Whether the range of its 'kernel' or 'output' learns."""
        return f"{role}_growth" in self.variables

    def _growth(self, role: str, most: float | None) -> np.ndarray:
        """What a range has grown to, of the shape of the range; 1 if it stays."""
        if not self.has_grown(role):
            return np.ones((), np.float32)
        return clipped(self.variables[f"{role}_growth"].numpy(), most)


def _parts(model: Any) -> list[_Part]:
    """The nodes of a student, in their graph's order; none of any other model."""
    parts = {}
    for layer in getattr(model, "layers", ()):
        is_wrapped = isinstance(layer, NodeWrapper)
        inner = layer.layer if is_wrapped else layer
        if isinstance(inner, GraphLayer):
            named = {v.name.split("/")[-1].split(":")[0]: v for v in layer.weights}
            config = layer.quantize_config if is_wrapped else None
            bits = getattr(config, "bits", None)
            kernel_bits = getattr(config, "kernel_bits", None)
            most_growth = getattr(config, "most_growth", None)
            part = _Part(inner.node, named, bits, kernel_bits, most_growth)
            parts[_index(inner.name)] = part
    # Keras sorts layers by how far they are from the end.
    return [parts[index] for index in sorted(parts)]
