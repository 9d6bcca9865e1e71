"""Small graphs, made node by node, for tests that need no Keras model."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dfq_tf.graph import layers
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.nodes import Graph, Node

# Pixels become (pixel - 120) / 64.
PIXELS = (-120 / 64, 135 / 64)


class Sketch:
    """A graph that grows: each call adds a node and gives its name.

    Args:
      shape: of the image, (height, width, channels).
      seed: decides the weights.
      pixels: whether the quantization of the pixels is there, as behind
        `post_training.with_pixels`.
    """

    def __init__(
        self, shape: tuple[int, ...] = (8, 8, 3), *, seed: int = 0, pixels: bool = True
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: dict[str, Node] = {"image": layers.image("image", shape)}
        self.last = "image"
        if pixels:
            self("pixels", "pixels", low=PIXELS[0], high=PIXELS[1])

    def __call__(
        self,
        kind: str,
        name: str,
        *sources: str,
        weights: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> str:
        """Adds a node; without sources, it reads the one that was added before."""
        read = [self.nodes[source] for source in sources or (self.last,)]
        made = layers.node(kind, name, read, settings, weights, layers=(f"my {name}",))
        assert name not in self.nodes, name
        self.nodes[name] = made
        self.last = name
        return name

    def conv(
        self,
        name: str,
        *sources: str,
        outputs: int = 4,
        size: int = 3,
        bias: bool = True,
        **settings: Any,
    ) -> str:
        """A convolution with random weights; 'same' unless said otherwise."""
        inputs = self._channels(sources) // settings.get("groups", 1)
        weights = self._weights((size, size, inputs, outputs), 1, bias)
        return self(
            "conv", name, *sources, weights=weights, **{"padding": "same", **settings}
        )

    def depthwise(
        self,
        name: str,
        *sources: str,
        multiplier: int = 1,
        size: int = 3,
        bias: bool = True,
        **settings: Any,
    ) -> str:
        """A depthwise convolution with random weights."""
        shape = (size, size, self._channels(sources), multiplier)
        weights = self._weights(shape, 2, bias)
        return self("depthwise_conv", name, *sources, weights=weights, **settings)

    def dense(
        self, name: str, *sources: str, outputs: int = 5, bias: bool = True
    ) -> str:
        """A dense layer with random weights."""
        weights = self._weights((self._channels(sources), outputs), 1, bias)
        return self("dense", name, *sources, weights=weights)

    def normalization(self, name: str, *sources: str) -> str:
        """A batch normalisation with random statistics, scales and shifts."""
        channels = self._channels(sources)
        limits = dict(gamma=(0.3, 2), beta=(-0.5, 0.5), mean=(-0.5, 0.5))
        weights = {
            role: self.rng.uniform(*pair, channels)
            for role, pair in {**limits, "variance": (0.2, 3)}.items()
        }
        return self(
            "batch_normalization", name, *sources, weights=weights, epsilon=1e-3
        )

    def flatten(self, name: str, *sources: str) -> str:
        """All values in one vector."""
        return self("reshape", name, *sources, shape=(-1,))

    def graph(self) -> Graph:
        """The nodes that lead to the last one."""
        return Graph(self.nodes.values(), self.last)

    def classifier(self, **settings: Any) -> Classifier:
        """The graph with a description, see `description`."""
        graph = self.graph()
        return Classifier(graph, description(graph.last.shape[0] or 0, **settings))

    def _channels(self, sources: tuple[str, ...]) -> int:
        (source,) = sources or (self.last,)
        return self.nodes[source].shape[-1] or 0

    def _weights(
        self, shape: tuple[int, ...], trailing: int, bias: bool
    ) -> dict[str, np.ndarray]:
        """A kernel whose outputs, so many trailing axes, are of all sizes."""
        inputs, outputs = shape[:-trailing], shape[-trailing:]
        sizes = np.geomspace(0.3, 1, math.prod(outputs)).reshape(outputs)
        kernel = self.rng.normal(0, 1 / math.sqrt(math.prod(inputs)), shape) * sizes
        if not bias:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": self.rng.normal(0, 0.2, sizes.size)}


def description(
    num_classes: int,
    mean: tuple[float, ...] = (120.0,),
    scale: tuple[float, ...] = (1 / 64,),
    output: str = "logits",
) -> ModelDescription:
    """By default, what PIXELS says."""
    names = tuple(f"class {i}" for i in range(num_classes))
    return ModelDescription(mean, scale, output, names)


def noise(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """uint8 images of random pixels, (count, *shape)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
