"""Finds activation ranges from images, without any gradient."""

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.description import ModelDescription
from dfq_tf.graph import Graph
from dfq_tf.quantization import apply


def calibrate(
    graph: Graph,
    description: ModelDescription,
    images: np.ndarray,
    batch_size: int = 128,
) -> dict[str, apply.Range]:
    """Lowest and highest output of each quantized layer of the float network.

    Args:
      graph: from `quantization.apply.integer_ready`.
      description: from `quantization.apply.integer_ready`.
      images: uint8 or float32 pixels in [0, 255], (n, height, width, channels).
        Generated ones, for data-free quantization; real ones are the yardstick.
      batch_size: images per pass.

    Returns:
      node name -> range, holding 0. The input's is that of pixels 0 to 255.

    Raises:
      TrainingError: an output is not finite.
    """
    names = apply.quantized_nodes(graph)
    model = graph.build(outputs=names)

    @tf.function(reduce_retracing=True, autograph=False)
    def extremes(pixels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        inputs = description.normalize(tf.cast(pixels, tf.float32))
        # Keras gives a lone output bare, and not in a list.
        outputs = tf.nest.flatten(model(inputs, training=False))
        return (
            tf.stack([tf.reduce_min(o) for o in outputs]),
            tf.stack([tf.reduce_max(o) for o in outputs]),
        )

    batches = [
        extremes(tf.constant(images[i : i + batch_size]))
        for i in range(0, len(images), batch_size)
    ]
    lows = np.min([low.numpy() for low, _ in batches], axis=0)
    highs = np.max([high.numpy() for _, high in batches], axis=0)
    ranges = {
        name: (float(low), float(high)) for name, low, high in zip(names, lows, highs)
    }
    return apply.checked_ranges(graph, description, ranges)
