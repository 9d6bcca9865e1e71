"""A quantized network: the float network with bits and ranges, and its integers."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.context import counted
from dfq_tf.errors import ExportError
from dfq_tf.graph import (
    ALIVE,
    FLOAT,
    KINDS,
    Classifier,
    Exactly,
    Graph,
    ModelDescription,
    Node,
    NoFurther,
    by_output,
    check_images,
    compute,
    images_per_pass,
    in_batches,
    largest_output,
    num_values,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.grids import Grid
from dfq_tf.quantization.ranges import SMALLEST_RANGE, Range, largest_integer

# Images per pass.
_BATCH_SIZE = 128
# So few are run without compiling.
_FEW_IMAGES = 32
# How far a range may pass a bound: rounding to float32.
_TOLERANCE = 1e-6
# Least range of a kernel as a share of its bias: behind the tiny kernel of a dead
# channel, the steps of the bias would be too fine for its integers.
_SMALLEST_KERNEL = 1e-4
# Steps that a bias may have: of int32, and of the 40 bits that Vela takes beside int16
# (its constraint_bias_40bit, which counts the sign; LiteRT takes 48). Room is left for
# the products that are added to it: of int16 and int8, for 2**16 of them.
_MOST_BIAS_STEPS, _MOST_WIDE_BIAS_STEPS = 2**29, 2**38
# By how much of a step an average is moved that lies just between two integers.
_LITTLE = 1e-3


@dataclasses.dataclass(frozen=True)
class QuantizedNetwork:
    """A float network and all that makes integers of it.

    Attributes:
      classifier: from `post_training.float_network`; gives logits. Training moves its
        weights.
      bits: of each output of `grids.measured`: 2 to 8, or 16.
      ranges: of each output of `grids.measured`: (low, high), which hold 0.
      kernel_bits: of each kernel: 2 to 8.
      kernel_ranges: largest magnitude in each kernel, float32 (channels,), or () for
        one range per layer.

    Raises:
      ExportError: outputs that share a grid have different ranges, or a range is not
        what its operator demands.
    """

    classifier: Classifier
    # With these, a notebook would show pages.
    bits: Mapping[str, int] = dataclasses.field(repr=False)
    ranges: Mapping[str, Range] = dataclasses.field(repr=False)
    kernel_bits: Mapping[str, int] = dataclasses.field(repr=False)
    kernel_ranges: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name in self.bits:
            owner = self.owners[name]
            own, shared = ((self.ranges[n], self.bits[n]) for n in (name, owner))
            if own != shared:
                raise ExportError(
                    f"{name} has the range {own[0]} in {own[1]} bits and shares a grid "
                    f"with {owner}, which has {shared[0]} in {shared[1]} bits"
                )
            self._check_bounds(name)

    def _check_bounds(self, name: str) -> None:
        node, (low, high) = self.graph.nodes[name], self.ranges[name]
        bounds = KINDS[node.kind].bounds(node, self.bits[name])
        is_kept = True
        if isinstance(bounds, Exactly):
            is_kept = bool(np.allclose((low, high), bounds, rtol=_TOLERANCE, atol=0))
        elif isinstance(bounds, NoFurther):
            is_kept = high <= bounds.high * (1 + _TOLERANCE)
        if not is_kept:
            raise ExportError(
                f"{name} ({node.kind}) has the range {(low, high)}, but its operator "
                f"demands {bounds}"
            )

    @property
    def graph(self) -> Graph:
        """The float network's."""
        return self.classifier.graph

    @property
    def description(self) -> ModelDescription:
        """How the network is fed and read."""
        return self.classifier.description

    @functools.cached_property
    def owners(self) -> dict[str, str]:
        """Each node -> the one whose grid it has, see `grids.owners`."""
        return grids.owners(self.graph)

    @functools.cached_property
    def groups(self) -> dict[str, list[str]]:
        """Owner of a grid -> all nodes that have it, see `grids.groups`."""
        return grids.groups(self.graph)

    @functools.cached_property
    def is_wide(self) -> bool:
        """Whether activations are int16."""
        return any(map(grids.is_symmetric, self.bits.values()))

    @property
    def is_per_channel(self) -> bool:
        """Whether kernels have a range for each output channel."""
        return any(np.ndim(each) for each in self.kernel_ranges.values())

    # The integers.

    def grid(self, name: str) -> Grid:
        """What the integers of a node's stored output mean.

        Args:
          name: of any node but the image and those that `grids.is_taken_in`.
        """
        owner = self.owners[name]
        grid = grids.activation_grid(*self.ranges[owner], self.bits[owner])
        is_narrow = not grids.is_symmetric(self.bits[owner])
        return grids.as_int16(grid) if self.is_wide and is_narrow else grid

    def kernel_grid(self, name: str) -> Grid:
        """What the integers of a kernel mean."""
        largest = largest_integer(self.kernel_bits[name])
        high = np.atleast_1d(self.kernel_ranges[name]).astype(np.float32)
        return Grid(high / np.float32(largest), 0, -largest, largest)

    def kernel_integers(self, name: str) -> tuple[np.ndarray, Grid]:
        """A kernel in integers, int8 in the layout of `graph.layers`, and its grid."""
        node, grid = self.graph.nodes[name], self.kernel_grid(name)
        values = np.asarray(self.rounded_kernel(node, node.weights["kernel"]))
        integers = np.rint(by_output(node, values) / grid.scale)
        return integers.astype(np.int8).reshape(values.shape), grid

    def bias_scale(self, name: str) -> np.ndarray:
        """What one step of a kernel node's bias is worth, float64 (channels,) or (1,).

        A bias is added to the sums of products of input and kernel, so it comes in
        steps of (input scale * kernel scale).
        """
        (source,) = self.graph.nodes[name].inputs
        input_scale = self.grid(source).scale.astype(np.float64)
        return input_scale * self.kernel_grid(name).scale

    def with_room_for_biases(self) -> "QuantizedNetwork":
        """The network whose kernels' ranges are wide enough for their biases.

        A kernel whose range is next to nothing beside its bias, as that of a dead
        channel, is given a wider range, so that the bias fits its integer. A kernel of
        zeros, or of values that are none in practice, has any range.
        """
        most = _MOST_WIDE_BIAS_STEPS if self.is_wide else _MOST_BIAS_STEPS
        ranges = {}
        for name, magnitudes in self.kernel_ranges.items():
            (source,) = self.graph.nodes[name].inputs
            wide = np.asarray(magnitudes, np.float64)
            bias = self.graph.nodes[name].weights.get("bias")
            if bias is not None:
                size = np.abs(bias).astype(np.float64)
                steps = largest_integer(self.kernel_bits[name])
                share = steps / (most * float(self.grid(source).scale[0]))
                least = max(_SMALLEST_KERNEL, share) * size
                wide = np.maximum(wide, least if wide.ndim else least.max())
            wide = np.where(wide > SMALLEST_RANGE, wide, 1.0)
            ranges[name] = wide.astype(np.float32)
        return dataclasses.replace(self, kernel_ranges=ranges)

    def with_rounded_biases(
        self, names: Collection[str] | None = None
    ) -> "QuantizedNetwork":
        """The network whose biases are the integers that a file will hold.

        Steps of a bias are coarse where widths are small. After this, the network
        computes what its file does.

        Args:
          names: of the nodes whose biases are rounded; None for all.
        """
        rounded = {}
        for name in self.kernel_bits:
            if names is not None and name not in names:
                continue
            weights = self.graph.nodes[name].weights
            if "bias" in weights:
                scale = self.bias_scale(name)
                rounded[name] = {"bias": np.rint(weights["bias"] / scale) * scale}
        return self.with_weights(rounded)

    def with_weights(
        self, weights: Mapping[str, Mapping[str, np.ndarray]]
    ) -> "QuantizedNetwork":
        """The network with other float weights: name of a node -> role -> array."""
        graph = self.graph.with_weights(weights)
        return dataclasses.replace(self, classifier=Classifier(graph, self.description))

    # Its own run, by fake quantization.

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Logits, float32 (n, num_classes), of pixels, (n, height, width, channels).

        Raises:
          ModelError: there is no image, or they are of another shape, or no pixels.
        """
        check_images(images, self.classifier.image_shape)
        size = FLOAT * largest_output(self.graph)
        batch_size = images_per_pass(ALIVE * size, _BATCH_SIZE)
        # Compiling takes longer than a few images do.
        compiles = len(images) > _FEW_IMAGES or "_compiled" in vars(self)
        function = self._compiled if compiles else self._scorer()
        return in_batches(function, images, self.classifier.image_shape, batch_size)

    @functools.cached_property
    def _compiled(self) -> Any:
        shape = (None, *self.classifier.image_shape)
        return traced(self._scorer(), tf.TensorSpec(shape, tf.float32))

    def _scorer(self) -> Callable[[tf.Tensor], tf.Tensor]:
        weights = self.classifier.weights  # made outside of compiled functions

        def scores(pixels: tf.Tensor) -> tf.Tensor:
            return self._compute(pixels, [self.graph.output], weights)[0]

        return scores

    def uncompiled_scores(self, images: np.ndarray) -> np.ndarray:
        """As `scores`, of a network that is asked once and for few images."""
        count = images_per_pass(FLOAT * num_values(self.graph), _BATCH_SIZE)
        starts = counted(range(0, len(images), count), "passes of images")
        passes = (images[i : i + count] for i in starts)
        output = [self.graph.output]
        return np.concatenate([self.outputs(each, output)[0] for each in passes])

    def outputs(self, images: np.ndarray, names: Sequence[str]) -> list[np.ndarray]:
        """Quantized outputs of some nodes, float32 (n, ...) each.

        Args:
          images: pixels, (n, height, width, channels), all in one pass.
          names: of nodes.
        """
        weights = self.classifier.weights
        outputs = self._compute(tf.constant(images, tf.float32), names, weights)
        return [output.numpy() for output in outputs]

    def _compute(
        self, pixels: tf.Tensor, names: Sequence[str], weights: Mapping[str, Any]
    ) -> list[tf.Tensor]:
        return compute(
            self.graph,
            self.description.normalize(pixels),
            names,
            weights=weights,
            kernel=self.rounded_kernel,
            output=self.rounded_output,
        )

    def rounded_kernel(self, node: Node, kernel: Any) -> Any:
        """A kernel of the node on its grid, float32."""
        high = self.kernel_ranges[node.name]
        return fake_quantized_kernel(kernel, high, self.kernel_bits[node.name])

    def rounded_output(self, node: Node, values: Any) -> Any:
        """The output of a node on its grid; as it is if it has none of its own."""
        if node.name not in self.bits:
            return values
        low, high = self.ranges[node.name]
        bits, is_average = self.bits[node.name], grids.is_average(node)
        return fake_quantized_output(values, low, high, bits, is_average)


def fake_quantized_output(
    values: Any, low: Any, high: Any, num_bits: int, is_average: bool = False
) -> Any:
    """A tensor of any shape on a grid, see `grids.activation_grid`; float32.

    Args:
      values: float32.
      low: the range's lower end, a number or a variable.
      high: the range's upper end.
      num_bits: 2 to 8, or 16, whose range is symmetric.
      is_average: whether the values are averages of integers, many of which lie just
        between two. LiteRT rounds those away from the integer 0, and this function
        all others of them upwards.
    """
    is_symmetric = grids.is_symmetric(num_bits)
    if is_average:
        largest = 2**num_bits - (2 if is_symmetric else 1)
        scale = (high - low) / largest
        zero = 0.0
        if not is_symmetric:
            zero = tf.floor(0.5 - low / scale) + (grids.LARGEST_INT8 - largest)
        values += _LITTLE * scale * tf.sign(values / scale + zero)
    return tf.quantization.fake_quant_with_min_max_vars(
        values, low, high, num_bits, narrow_range=is_symmetric
    )


def fake_quantized_kernel(kernel: Any, high: Any, num_bits: int) -> Any:
    """A kernel on its grid, -(2^(n-1) - 1) .. 2^(n-1) - 1 steps; float32.

    Args:
      kernel: float32, its outputs on the last axes.
      high: largest magnitude, () or (channels,), float32.
      num_bits: 2 to 8.
    """
    if len(high.shape) == 0:  # an empty TensorShape is not false
        return tf.quantization.fake_quant_with_min_max_vars(
            kernel, -high, high, num_bits, narrow_range=True
        )
    matrix = tf.reshape(kernel, (-1, high.shape[0]))
    rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        matrix, -high, high, num_bits, narrow_range=True
    )
    return tf.reshape(rounded, kernel.shape)
