"""From what a user has, a file or a model, to a classifier."""

from dfq_tf.files import MODEL_SUFFIXES
from dfq_tf.importing.classifiers import as_classifier, load_classifier, takes_pixels
from dfq_tf.importing.feeding import FEEDINGS
from dfq_tf.importing.files import read_model
from dfq_tf.importing.parts import files_of

__all__ = [
    "FEEDINGS",
    "MODEL_SUFFIXES",
    "as_classifier",
    "files_of",
    "load_classifier",
    "read_model",
    "takes_pixels",
]
