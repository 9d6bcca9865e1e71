"""How good a classifier is: accuracy on labels, agreement with another classifier.

Everything here takes scores, (n, num_classes), and does not care who made them.
"""

import numpy as np


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose largest score is the label's, in [0, 1]."""
    return float(np.mean(np.argmax(scores, axis=-1) == labels))


def agreement(scores: np.ndarray, other_scores: np.ndarray) -> float:
    """Share of rows whose largest score is in the same class in both, in [0, 1]."""
    return accuracy(scores, np.argmax(other_scores, axis=-1))
