"""What a block learns when it is reconstructed: rounding, step sizes, biases.

A kernel is rounded softly while it learns (AdaRound, Nagel et al. 2020): with the step
size s of its grid, h from 0 to 1 for each weight and the largest integer L,

    w' = s clip(floor(w / s) + h(v), -L, L),   h(v) = clip(1.2 sigmoid(b v) - 0.1, 0, 1)

With a sharpness b of 1 it starts at w' = w, but for what the range cuts off. The
sharpness grows from step to step, evenly in its logarithm (as in Savarese et al. 2020):
one h after another arrives at 0 or 1, and those that still move make up for its error.
AdaRound's penalty on what lies between needs thousands of steps for that. The step
sizes of kernels and activations learn too (LSQ, Esser et al. 2020), and so do biases.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_tf.compat import tf, traced
from dfq_tf.graph import (
    Graph,
    Node,
    by_output,
    compute,
    frozen_weights,
    has_kernel,
)
from dfq_tf.quantization import grids
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.ranges import Range, largest_integer
from dfq_tf.quantization.step_sizes import clipped, growing, grown_output, within
from dfq_tf.settings import ReconstructionConfig

_LOW, _HIGH = -0.1, 1.1
# Sharpness of the rounding at the end, where hardly an h is left between 0 and 1.
_SHARPEST = 1e4
# Learning rate of the step sizes, which are in units of what they were.
_GROWTH_RATE = 1e-2
# Learning rate of biases, see `LearntBias`.
_SHIFT_RATE = 1e-2
# Adam's.
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-8
# A block without an error has this one.
_LEAST_ERROR = 1e-12
_TIMED_STEPS = 3
# A step has `rec_batch_size` images if they are so large within the block, and fewer if
# they are larger: each position teaches, and takes time. But it has so many at least.
_POSITIONS, _FEWEST_IMAGES = 32 * 32, 4
# More than a step draws random tensors.
_MOST_DRAWS = 1000


class LearntKernel:
    """The kernel of a node, of which rounding and step sizes are learnt.

    Args:
      node: with its float kernel.
      magnitudes: half the range, float32 (outputs,), or () for all.
      num_bits: 2 to 8.

    Attributes:
      rounding: the variable v, (weights of an output, outputs).
      growth: step size over what it was at first, a variable of the shape of
        `magnitudes`.
    """

    def __init__(self, node: Node, magnitudes: np.ndarray, num_bits: int) -> None:
        kernel = node.weights["kernel"]
        self._shape, self._magnitudes = kernel.shape, np.float32(magnitudes)
        self._largest = np.float32(largest_integer(num_bits))
        steps = by_output(node, kernel) / (self._magnitudes / self._largest)
        self._floor = np.floor(steps)
        share = (steps - self._floor - _LOW) / (_HIGH - _LOW)
        self.rounding = tf.Variable(np.log(share / (1 - share)), dtype=tf.float32)
        self.growth = tf.Variable(np.ones_like(self._magnitudes))

    def soft(self, sharpness: tf.Tensor | float) -> tf.Tensor:
        """w', float32, in the kernel's shape."""
        share = (_HIGH - _LOW) * tf.sigmoid(sharpness * self.rounding) + _LOW
        return self._of(tf.clip_by_value(share, 0.0, 1.0))

    def hard(self) -> np.ndarray:
        """The same with each h at 0 or 1, whichever is nearer."""
        return self._of(tf.cast(self.rounding >= 0, tf.float32)).numpy()

    def magnitudes(self) -> np.ndarray:
        """Half the range, as learnt."""
        return self._magnitudes * clipped(self.growth.numpy())

    def _of(self, share: tf.Tensor) -> tf.Tensor:
        steps = tf.clip_by_value(self._floor + share, -self._largest, self._largest)
        scale = self._magnitudes * within(self.growth) / self._largest
        return tf.reshape(steps * scale, self._shape)


class LearntRange:
    """The range of activations, of which the step size is learnt.

    Args:
      low: lowest value, at most 0.
      high: highest value, at least 0.
      num_bits: 2 to 7.
      most_growth: how many times as wide it may become.

    Attributes:
      growth: step size over what it was at first, a scalar variable.
    """

    def __init__(
        self, low: float, high: float, num_bits: int, most_growth: float
    ) -> None:
        self._bits, self._most = num_bits, np.float32(most_growth)
        self._low, self._high = grids.activation_grid(low, high, num_bits).ends
        self.growth = tf.Variable(1.0)

    def __call__(self, values: tf.Tensor, is_average: bool = False) -> tf.Tensor:
        """Values on the grid, see `grown_output`."""
        growth = within(self.growth, self._most)
        return grown_output(
            values, self._low, self._high, growth, self._bits, is_average
        )

    def range(self) -> Range:
        """As learnt."""
        growth = clipped(self.growth.numpy(), self._most)
        return float(self._low * growth), float(self._high * growth)


class LearntBias:
    """The bias of a layer, which learns too: rounded weights move means.

    Args:
      bias: float32 (outputs,).
      width: of the range of the layer's outputs.

    Attributes:
      shift: what is added to it, in units of a quarter of the width, a variable.
    """

    def __init__(self, bias: np.ndarray, width: float) -> None:
        self._bias, self._unit = bias, np.float32(width / 4)
        self.shift = tf.Variable(np.zeros_like(bias))

    def __call__(self) -> tf.Tensor:
        """The bias as it is now."""
        return self._bias + self._unit * self.shift


class _Trained(NamedTuple):
    """A variable that Adam changes.

    Attributes:
      variable: float32.
      mean: of past gradients, decaying.
      square: of the squares of past gradients, decaying.
      rate: the learning rate, which falls to 0 as half a cosine.
    """

    variable: tf.Variable
    mean: tf.Variable
    square: tf.Variable
    rate: float


def _trained(variable: tf.Variable, rate: float) -> _Trained:
    mean, square = (tf.Variable(tf.zeros_like(variable)) for _ in range(2))
    return _Trained(variable, mean, square, rate)


class BlockLearner:
    """A block that learns.

    Args:
      block: of `blocks_of`, with the network's weights.
      network: the whole, before any block has learnt.
      config: of the reconstruction.
      seed: numbers that decide what is random.
    """

    def __init__(
        self,
        block: Graph,
        network: QuantizedNetwork,
        config: ReconstructionConfig,
        seed: Sequence[int],
    ) -> None:
        self._block, self._network, self._config = block, network, config
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
        self._kernels = {
            name: LearntKernel(
                node, network.kernel_ranges[name], network.kernel_bits[name]
            )
            for name, node in block.nodes.items()
            if has_kernel(node)
        }
        self._num_images = _images_of_a_step(block, config.rec_batch_size)
        self._ranges = _ranges_of(block, network)
        self._biases = {
            name: LearntBias(
                block.nodes[name].weights["bias"], _width_of(network, name)
            )
            for name in self._kernels
            if "bias" in block.nodes[name].weights
        }
        rate, kernels = config.rec_learning_rate, self._kernels.values()
        growths = [each.growth for each in kernels]
        growths += [each.growth for each in self._ranges.values()]
        self._trained = [
            *(_trained(kernel.rounding, rate) for kernel in kernels),
            *(_trained(growth, _GROWTH_RATE) for growth in growths),
            *(_trained(b.shift, _SHIFT_RATE) for b in self._biases.values()),
        ]
        self._weights = frozen_weights(block)
        inputs = tf.TensorSpec((None, *block.image.shape), tf.float32)
        outputs = tf.TensorSpec((None, *block.last.shape), tf.float32)
        error, number = (tf.TensorSpec((), kind) for kind in (tf.float32, tf.int32))
        self._specs = [inputs, inputs, outputs, number, error, number, number]

    @property
    def trackables(self) -> dict[str, tf.Variable]:
        """All that a step changes, by name."""
        return {
            f"{role}_{i}": getattr(each, role)
            for i, each in enumerate(self._trained)
            for role in ("variable", "mean", "square")
        }

    @functools.cached_property
    def _compiled(self) -> Any:
        return traced(self._take, *self._specs)

    def step(
        self,
        exact: tf.Tensor,
        fed: tf.Tensor,
        wanted: tf.Tensor,
        first: int,
        error: tf.Tensor,
        num_steps: int,
    ) -> Callable[[int], Mapping[str, tf.Tensor]]:
        """A step that takes its number, changes variables and gives measurements.

        Args:
          exact: what the float network feeds the block with, (n, ...).
          fed: what the quantized network feeds it with, (n, ...).
          wanted: what the float block gives, (n, ...).
          first: of the n, it learns from this one and those behind it.
          error: mean squared error with nearest rounding, scalar.
          num_steps: of the whole run.
        """
        images = exact, fed, wanted, tf.constant(first)
        unit, total = tf.maximum(error, _LEAST_ERROR), tf.constant(num_steps)

        def take(index: int) -> Mapping[str, tf.Tensor]:
            now = tf.constant(index)
            return {"error": self._compiled(*images, unit, now, total)}

        return take

    def step_seconds(self) -> float:
        """How long a step takes. It changes nothing."""
        before = {name: each.numpy() for name, each in self.trackables.items()}
        exact, fed, wanted = (
            tf.zeros((self._num_images, *s.shape[1:])) for s in self._specs[:3]
        )
        step = self.step(exact, fed, wanted, 0, tf.constant(1.0), 1)
        times = []
        for _ in range(_TIMED_STEPS):
            began = time.monotonic()
            float(step(0)["error"])  # waits for its end
            times.append(time.monotonic() - began)
        for name, each in self.trackables.items():
            each.assign(before[name])
        return min(times)

    def result(self, network: QuantizedNetwork) -> QuantizedNetwork:
        """The network with what the block has learnt: kernels on their grids."""
        kernels, members = self._kernels, network.groups
        ranges = {
            name: learnt.range()
            for owner, learnt in self._ranges.items()
            for name in members[owner]
            if name in network.ranges
        }
        magnitudes = {name: each.magnitudes() for name, each in kernels.items()}
        changed = dataclasses.replace(
            network,
            ranges={**network.ranges, **ranges},
            kernel_ranges={**network.kernel_ranges, **magnitudes},
        )
        weights = {name: {"kernel": each.hard()} for name, each in kernels.items()}
        for name, learnt_bias in self._biases.items():
            weights[name]["bias"] = learnt_bias().numpy()
        return changed.with_weights(weights)

    def _take(
        self,
        exact: tf.Tensor,
        fed: tf.Tensor,
        wanted: tf.Tensor,
        first: tf.Tensor,
        unit: tf.Tensor,
        index: tf.Tensor,
        num_steps: tf.Tensor,
    ) -> tf.Tensor:
        """One step; gives the error."""
        random = _Random(self._seed, index)
        # Those before the first are here too: a tensor without them would be a copy.
        count = tf.shape(exact)[0] - first
        chosen = first + random.integers(self._num_images, count)
        exact, fed, wanted = (tf.gather(each, chosen) for each in (exact, fed, wanted))
        progress = tf.cast(index, tf.float32) / tf.cast(num_steps, tf.float32)
        with tf.GradientTape() as tape:
            inputs = self._mixed(exact, fed, random)
            given = self._given(inputs, random, _SHARPEST**progress)
            error = tf.reduce_mean(tf.square(given - wanted)) / unit
        gradients = tape.gradient(error, [each.variable for each in self._trained])
        for each, gradient in zip(self._trained, gradients):
            if gradient is not None:
                _descend(each, gradient, index, progress)
        return error

    def _mixed(self, exact: tf.Tensor, fed: tf.Tensor, random: "_Random") -> tf.Tensor:
        """The first where chance says so, else the second."""
        return tf.where(random.mask(exact, self._config.rec_drop), exact, fed)

    def _given(
        self, inputs: tf.Tensor, random: "_Random", sharpness: tf.Tensor
    ) -> tf.Tensor:
        """What the block gives; within it, some activations stay float."""

        def kernel(node: Node, values: Any) -> tf.Tensor:
            return self._kernels[node.name].soft(sharpness)

        def output(node: Node, values: Any) -> tf.Tensor:
            rounded = self._rounded(node, values)
            if rounded is values or node.name == self._block.output:
                return rounded
            return self._mixed(values, rounded, random)

        weights: dict[str, Mapping[str, Any]] = dict(self._weights)
        for name, bias in self._biases.items():
            weights[name] = {**weights[name], "bias": bias()}
        (given,) = compute(
            self._block,
            inputs,
            [self._block.output],
            weights=weights,
            kernel=kernel,
            output=output,
        )
        return given

    def _rounded(self, node: Node, values: tf.Tensor) -> tf.Tensor:
        """An output on its grid; the same tensor if it has none of its own."""
        learnt = self._ranges.get(self._network.owners.get(node.name, ""))
        if learnt is None or node.name not in self._network.bits:
            return self._network.rounded_output(node, values)
        return learnt(values, grids.is_average(node))


def _images_of_a_step(block: Graph, most: int) -> int:
    """As many as asked for, or fewer where they have many positions."""
    positions = max(
        math.prod(side or 1 for side in node.shape[:-1])
        for node in block.nodes.values()
    )
    return min(most, max(_FEWEST_IMAGES, most * _POSITIONS // positions))


def _width_of(network: QuantizedNetwork, name: str) -> float:
    """Of the range in which a layer's output is stored, behind its ReLU if need be."""
    graph = network.graph
    if grids.is_taken_in(graph, name):
        (relu,) = graph.consumers(name)
        name = relu.name
    low, high = network.ranges[network.owners[name]]
    return high - low


def _ranges_of(block: Graph, network: QuantizedNetwork) -> dict[str, LearntRange]:
    """Owner of a grid -> its range, if it is learnt: not where it leaves the block."""
    members = network.groups
    return {
        owner: LearntRange(*network.ranges[owner], network.bits[owner], most)
        for owner, most in growing(network).items()
        if block.nodes.keys() >= {*members[owner]} and owner != block.image.name
    }


def _descend(
    trained: _Trained, gradient: tf.Tensor, index: tf.Tensor, progress: tf.Tensor
) -> None:
    """One step of Adam."""
    count = tf.cast(index + 1, tf.float32)
    rate = trained.rate * 0.5 * (1 + tf.cos(np.pi * progress))
    tf.raw_ops.ResourceApplyAdam(
        var=trained.variable.handle,
        m=trained.mean.handle,
        v=trained.square.handle,
        beta1_power=_BETA_1**count,
        beta2_power=_BETA_2**count,
        lr=rate,
        beta1=_BETA_1,
        beta2=_BETA_2,
        epsilon=_EPSILON,
        grad=gradient,
    )


class _Random:
    """Random numbers of one step, which are the same whenever it is taken.

    Args:
      seed: of the run.
      index: of the step.
    """

    def __init__(self, seed: int, index: tf.Tensor) -> None:
        self._seed, self._index, self._count = seed, index, 0

    def _next(self) -> tf.Tensor:
        self._count += 1
        return tf.stack([self._seed, self._index * _MOST_DRAWS + self._count])

    def integers(self, count: int, limit: tf.Tensor) -> tf.Tensor:
        """Numbers from 0 to below the limit, int32 (count,)."""
        return tf.random.stateless_uniform((count,), self._next(), 0, limit, tf.int32)

    def mask(self, values: tf.Tensor, share: float) -> tf.Tensor:
        """Booleans, so large a share of them true.

        They are drawn for one image and hold for the whole batch: drawing them for each
        would take as long as all else.
        """
        return tf.random.stateless_uniform((1, *values.shape[1:]), self._next()) < share
