"""How often a classifier is right, on labelled images."""

import numpy as np


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose highest score is that of their label, in [0, 1].

    Args:
      scores: (n, num_classes).
      labels: integer (n,).
    """
    return float(np.mean(np.argmax(scores, axis=-1) == labels))
