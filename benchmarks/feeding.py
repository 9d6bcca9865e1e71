"""How often the feeding of a network is found by its BatchNormalization, or wrongly.

    python benchmarks/feeding.py --data_dir=... --seeds=10

Builds first convolutions with random kernels, whose BatchNormalization remembers images
of a kind, fed in each of the usual ways; then asks `importing.feeding` for the way.
Prints for each kind of image how many were found, left open, and told wrongly. The
kinds: CIFAR-10 (where --data_dir has it), the same in grey, dark and light; crops of
scikit-learn's two photographs; its digits, as they are and inverted. All are training
images, since the limits are chosen by this table.
"""

import argparse
import collections
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.compat import tf
from dfq_tf.graph import Graph, layers
from dfq_tf.importing import feeding
from dfq_tf.with_data import datasets

_IMAGES = 400
_SIDE = 32


def photographs(rng: np.random.Generator) -> np.ndarray:
    """Crops of two photographs, of 32 to 400 pixels a side, made 32 x 32."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    crops = []
    for _ in range(_IMAGES):
        picture = pictures[rng.integers(len(pictures))]
        side = rng.integers(_SIDE, 400)
        top, left = (rng.integers(size - side + 1) for size in picture.shape[:2])
        crop = picture[top : top + side, left : left + side]
        crops.append(tf.image.resize(crop, (_SIDE, _SIDE), method="area").numpy())
    return np.stack(crops)


def kinds(rng: np.random.Generator, data_dir: str | None) -> dict[str, np.ndarray]:
    """Name of a kind -> float images (count, 32, 32, channels) in 0 to 255."""
    found = {"photographs": photographs(rng)}
    if data_dir:
        cifar = datasets.open_dataset("cifar10", data_dir, None)
        found["cifar10"] = cifar.load("train").images[:_IMAGES].astype(float)
        grey = found["cifar10"].mean(axis=-1, keepdims=True)
        found["cifar10, grey"] = np.repeat(grey, 3, axis=-1)
        found["cifar10, one channel"] = grey
    for name in list(found):
        found[f"{name}, dark"] = np.clip((found[name] - 130) * 1.2, 0, 255)
        found[f"{name}, light"] = 255 - np.clip((found[name] - 130) * 1.2, 0, 255)
    digits = datasets.open_dataset("digits", None, None).load("train")
    found["digits"] = digits.images[:_IMAGES].astype(float)
    found["digits, inverted"] = 255 - found["digits"]
    return found


def network(images: np.ndarray, way: feeding.Feeding, seed: int) -> Graph:
    """A convolution and a BatchNormalization that remembers images, fed in a way."""
    channels = images.shape[-1]
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(3, 3, channels, 16)) / np.sqrt(9 * channels)
    kernel = kernel.astype(np.float32)
    outputs = tf.nn.conv2d(way.fed(images), kernel, 2, "VALID")
    moments = tf.nn.moments(outputs, (0, 1, 2))
    mean, variance = (moment.numpy() for moment in moments)
    image = layers.image("image", images.shape[1:])
    strides = {"strides": (2, 2)}
    conv = layers.node("conv", "conv", [image], strides, {"kernel": kernel})
    weights = dict(gamma=np.ones(16), beta=np.zeros(16), mean=mean, variance=variance)
    normalized = layers.node(
        "batch_normalization", "bn", [conv], {"epsilon": 1e-3}, weights
    )
    return Graph([image, conv, normalized], "bn")


def main() -> None:
    """Counts what is found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", default=None)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{'images':32} found  open wrong  right way, at most  wrong way, at least")
    for kind, images in kinds(np.random.default_rng(0), arguments.data_dir).items():
        counts: collections.Counter[str] = collections.Counter()
        nearest: dict[str, float] = {}
        farthest: dict[str, float] = {}
        for seed in range(arguments.seeds):
            for name, way in feeding.FEEDINGS.items():
                if not feeding.fits(name, images.shape[-1]):
                    continue
                found = feeding.find(network(images, way, seed))
                assert found is not None
                # Of ImageNet's and CIFAR-10's, what the size of the image says.
                right = {name} | ({*feeding.ALIKE} if name in feeding.ALIKE else set())
                said = "found" if found.name in right else "wrong"
                counts[said if found.is_clear else "open"] += 1
                nearest[said] = min(nearest.get(said, 9.0), found.distances[found.name])
                farthest[said] = max(
                    farthest.get(said, 0.0), found.distances[found.name]
                )
        print(
            f"{kind:32} {counts['found']:5} {counts['open']:5} {counts['wrong']:5}",
            f"{farthest.get('found', 0):18.2f} {nearest.get('wrong', 0):18.2f}",
        )


if __name__ == "__main__":
    main()
