"""The bank: the last images that generators made, with the teacher's answers.

A student step on banked images costs one pass of the student, and neither generator
nor teacher; and what was learnt from earlier images is not forgotten (Fang et al.
2022, "Up to 100x Faster Data-free Knowledge Distillation").
"""

import io

import numpy as np

from dfq_tf.compat import tf


class ImageBank(tf.train.experimental.PythonState):
    """A ring of images in memory; a checkpoint can hold it.

    Args:
      capacity: how many images it keeps; older ones make room for new ones.
      image_shape: (height, width, channels).
      num_classes: length of an answer.
      seed: decides what `draw` gives.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        seed: int,
    ) -> None:
        self._images = np.zeros((capacity, *image_shape), np.uint8)
        self._logits = np.zeros((capacity, num_classes), np.float32)
        self._seed = seed
        self._num_added = 0

    def __len__(self) -> int:
        return min(self._num_added, len(self._images))

    def add(self, images: np.ndarray, logits: np.ndarray) -> None:
        """Takes images in, in place of the oldest where there is no room.

        Args:
          images: uint8 (n, height, width, channels).
          logits: the teacher's answers, float32 (n, num_classes).
        """
        slots = (self._num_added + np.arange(len(images))) % len(self._images)
        self._images[slots] = images
        self._logits[slots] = logits
        self._num_added += len(images)

    def draw(self, count: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and answers at random, each image as likely, with repetition.

        Args:
          count: how many.
          index: number of the step: the same one draws the same places.
        """
        rng = np.random.default_rng((self._seed, index))
        chosen = rng.integers(len(self), size=count)
        return self._images[chosen], self._logits[chosen]

    def serialize(self) -> bytes:
        """What a checkpoint keeps."""
        buffer = io.BytesIO()
        filled = len(self)
        np.savez(
            buffer,
            images=self._images[:filled],
            logits=self._logits[:filled],
            num_added=self._num_added,
        )
        return buffer.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        """Takes back what `serialize` gave."""
        with np.load(io.BytesIO(string_value)) as saved:
            filled = len(saved["images"])
            self._images[:filled] = saved["images"]
            self._logits[:filled] = saved["logits"]
            self._num_added = int(saved["num_added"])
