"""Networks of `keras.applications` with random weights, as if they had been trained.

BN layers hold the statistics of a pass over random smooth images, so that activations
are of the size that they have in a trained network.
"""

from typing import Any

import numpy as np

from dfq_tf.compat import tf

# Network -> arguments that make a small one, where there are any.
NETWORKS: dict[str, dict[str, Any]] = {
    "MobileNet": dict(alpha=0.25),
    "MobileNetV2": dict(alpha=0.35),
    "MobileNetV3Small": {},
    "EfficientNetB0": {},
    "ResNet50V2": {},
    "DenseNet121": {},
    "NASNetMobile": {},
}


def build(
    library: Any,
    name: str,
    image_shape: tuple[int, int, int],
    classes: int,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Any, dict[str, float]]:
    """A network, and how it is fed, for `dfq_tf.as_classifier`.

    Args:
      library: keras of version 3, or tf_keras.
      name: key of NETWORKS.
      image_shape: (height, width, channels).
      classes: number of classes.
      seed: decides the weights.
      **arguments: of the network; by default those of NETWORKS.
    """
    library.utils.set_random_seed(seed)
    model = getattr(library.applications, name)(
        weights=None,
        input_shape=image_shape,
        classes=classes,
        **(arguments or NETWORKS[name]),
    )
    has_own = any(type(layer).__name__ == "Rescaling" for layer in model.layers)
    fed = {} if has_own else dict(input_mean=127.5, input_scale=1 / 127.5)
    images = smooth_images(image_shape, 32, seed).astype(np.float32)
    norms = [la for la in model.layers if type(la).__name__ == "BatchNormalization"]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # the statistics of the last pass
    model(images if has_own else images / 127.5 - 1, training=True)
    for layer, momentum in zip(norms, momenta):
        layer.momentum = momentum
    return model, fed


def smooth_images(
    image_shape: tuple[int, int, int], count: int, seed: int
) -> np.ndarray:
    """uint8 images: random colours on a coarse grid, smoothed between."""
    rng = np.random.default_rng(seed)
    grid = rng.uniform(-50, 305, (count, 4, 4, image_shape[-1]))
    images = tf.image.resize(grid, image_shape[:2], "bicubic").numpy()
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)
