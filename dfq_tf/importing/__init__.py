"""From what a user has, a file or a model, to a classifier."""

from dfq_tf.importing.classifiers import as_classifier, load_classifier
from dfq_tf.importing.files import MODEL_SUFFIXES, read_model
from dfq_tf.importing.parts import files_of
from dfq_tf.importing.preprocessing import Preprocessing
from dfq_tf.importing.reading import LayerRead

__all__ = [
    "LayerRead",
    "MODEL_SUFFIXES",
    "Preprocessing",
    "as_classifier",
    "files_of",
    "load_classifier",
    "read_model",
]
