"""How a network is fed, found from what its first BatchNormalization remembers.

A BatchNormalization stores mean and variance of what it was given while the network was
trained, on real pictures. Of the ways in which pixels are usually fed, only the right
one brings images that look like pictures near those. No picture is used: 1/f noise will
do.

One that was frozen remembers an earlier training, as that of a pretrained base: how its
base was fed then.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import Graph, Node, compute, leading_to
from dfq_tf.procedural import natural_noise


class Feeding(NamedTuple):
    """One usual way: the input is (pixel - mean) * scale.

    Attributes:
      mean: in pixels, one value or one per channel, in the order of the input.
      scale: like `mean`.
      is_bgr: whether the input has the channels in the order blue, green, red.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    is_bgr: bool = False

    def fed(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels, red first, as the input, float32 of the same shape."""
        ordered = pixels[..., ::-1] if self.is_bgr else pixels
        values = (ordered - np.array(self.mean)) * np.array(self.scale)
        return values.astype(np.float32)


# The names are those that --feeding takes.
FEEDINGS: dict[str, Feeding] = {
    "raw": Feeding((0.0,), (1.0,)),
    "0..1": Feeding((0.0,), (1 / 255,)),
    "-1..1": Feeding((127.5,), (1 / 127.5,)),
    "-0.5..0.5": Feeding((127.5,), (1 / 255,)),
    # Mean and standard deviation of the training images, of pixels / 255.
    "imagenet": Feeding(
        (123.675, 116.28, 103.53),
        (1 / (255 * 0.229), 1 / (255 * 0.224), 1 / (255 * 0.225)),
    ),
    "cifar10": Feeding(
        (255 * 0.4914, 255 * 0.4822, 255 * 0.4465),
        (1 / (255 * 0.2023), 1 / (255 * 0.1994), 1 / (255 * 0.2010)),
    ),
    "mnist": Feeding((255 * 0.1307,), (1 / (255 * 0.3081),)),
    # As keras.applications' ResNets. Who subtracts means and scales nothing does it so.
    "caffe": Feeding((103.939, 116.779, 123.68), (1.0,), is_bgr=True),
}
# Two ways too near to be told apart: their pixels differ by a tenth. The first is that
# of images up to this side.
ALIKE = ("cifar10", "imagenet")
_SMALL_SIDE = 64

_PIXELS = 2**20  # about as many are looked at, over all images
_MOST_IMAGES = 48
# A way is taken if it comes as near as this and the next one is so many times farther
# away. Wrong ways came to 0.12 and more, with pictures that are dark or light; the
# right one to 0.03 with CIFAR-10, to 0.12 with photographs (`benchmarks/feeding.py`).
_NEAR, _TIMES_FARTHER = 0.1, 2.0


@dataclasses.dataclass(frozen=True)
class Found:
    """What a BatchNormalization says.

    Attributes:
      layer: its name.
      distances: name of a way -> the median over channels of the distance between what
        it causes and what is stored: 0 for the same mean and variance; the nearest
        first. Of two ways that cannot be told apart there is one.
      said: the same distance, of what is said, which is far; None if nobody says.
      is_grey: whether the images have one channel.
      is_frozen: whether it kept what it knew of a training before the model's own.
    """

    layer: str
    distances: Mapping[str, float]
    said: float | None
    is_grey: bool
    is_frozen: bool = False

    @property
    def name(self) -> str:
        """The nearest way."""
        return next(iter(self.distances))

    @property
    def next_name(self) -> str:
        """The nearest but one."""
        return list(self.distances)[1]

    @property
    def is_clear(self) -> bool:
        """Whether the nearest way is near, and no other one is.

        Images of one channel are digits and X-rays more often than photographs: dark or
        light ones, of which another scale and offset make the same. Raw pixels alone
        can be told.
        """
        if self.is_grey and self.name != "raw":
            return False
        nearest, following, *_ = self.distances.values()
        return nearest <= _NEAR and following >= _TIMES_FARTHER * nearest

    @property
    def is_suggested(self) -> bool:
        """Whether nobody says, and one way is clear."""
        return self.is_clear and self.said is None

    @property
    def is_taken(self) -> bool:
        """Whether it is suggested by what the training itself left."""
        return self.is_suggested and not self.is_frozen


def find(
    graph: Graph, said: Feeding | None = None, frozen: Collection[str] = ()
) -> Found | None:
    """Compares the usual ways of feeding by the first BatchNormalization.

    Args:
      graph: a network, with the preprocessing that it does itself; layers that cannot
        be read are fine behind the first BatchNormalization.
      said: what the user, or the model, says.
      frozen: names of nodes that the training left as they were.

    Returns:
      None if there is nothing to compare with: no BatchNormalization, or one that has
      never seen an image, or that is called more than once. None also if what is said
      is not far, or if the BatchNormalization was frozen: it contradicts nobody.
    """
    remembering = [n for n in graph.nodes.values() if _has_statistics(n)]
    node = next((n for n in remembering if not _is_shared(n, remembering)), None)
    if node is None or not _can_compute(graph, node):
        return None
    is_frozen = node.name in frozen
    if is_frozen and said is not None:
        return None
    height, width, channels = graph.image.shape
    assert height and width and channels
    count = max(1, min(_MOST_IMAGES, _PIXELS // (height * width)))
    pixels = natural_noise(0, count, (height, width, channels))
    told = None if said is None else distance_of(graph, node, pixels, said)
    if told is not None and told < _TIMES_FARTHER * _NEAR:
        return None
    skipped = ALIKE[max(height, width) <= _SMALL_SIDE]
    distances = {
        name: distance_of(graph, node, pixels, way)
        for name, way in FEEDINGS.items()
        if name != skipped and fits(name, channels)
    }
    ordered = sorted(distances, key=lambda name: distances[name])
    return Found(
        node.name,
        {name: distances[name] for name in ordered},
        told,
        is_grey=channels == 1,
        is_frozen=is_frozen,
    )


def fits(name: str, channels: int) -> bool:
    """Whether images of so many channels may be fed so."""
    if name == "mnist":
        return channels == 1
    return len(FEEDINGS[name].mean) in (1, channels)


def _has_statistics(node: Node) -> bool:
    if node.kind != "batch_normalization":
        return False
    mean, variance = node.weights["mean"], node.weights["variance"]
    is_new = not mean.any() and (variance == 1).all()
    return not is_new and bool((variance > node.settings["epsilon"]).any())


def _is_shared(node: Node, others: Sequence[Node]) -> bool:
    """Whether its layer is called elsewhere too: it remembers what came to both."""
    mean = node.weights["mean"]
    return any(
        np.array_equal(mean, other.weights["mean"])
        and np.array_equal(node.weights["variance"], other.weights["variance"])
        for other in others
        if other is not node
    )


def _can_compute(graph: Graph, node: Node) -> bool:
    needed = leading_to(list(graph.nodes.values()), node.inputs)
    return all(graph.nodes[name].kind != "unknown" for name in needed)


def distance_of(graph: Graph, node: Node, pixels: np.ndarray, way: Feeding) -> float:
    """How far a BatchNormalization's input is from what it remembers.

    Of each channel, the mean of the two Kullback-Leibler divergences between two normal
    distributions, that of its input and the stored one; then the median over channels.

    Args:
      graph: the network.
      node: a batch_normalization.
      pixels: uint8 (count, height, width, channels), red first.
      way: how they are fed.
    """
    (values,) = compute(graph, tf.constant(way.fed(pixels)), node.inputs)
    mean, variance = (
        np.asarray(moment, np.float64)
        for moment in tf.nn.moments(values, range(values.shape.rank - 1))
    )
    epsilon = node.settings["epsilon"]
    # A channel that was the same for all images says nothing.
    is_alive = node.weights["variance"] > epsilon
    own = np.asarray(node.weights["variance"], np.float64)[is_alive] + epsilon
    variance = variance[is_alive] + epsilon
    shift = (mean[is_alive] - node.weights["mean"][is_alive]) ** 2
    divergences = (shift + variance) / own + (shift + own) / variance - 2
    return float(np.median(divergences) / 4)
