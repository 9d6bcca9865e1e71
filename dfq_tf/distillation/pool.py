"""What students learn from that need no generator in each step, all of it in variables.

Images go into the `Store` of a run. Batches of them, changed at random, with images
that a formula makes, are put to the teacher: its answers and the images as the
teacher saw them are the `Store` from which student steps draw. So each answer is to
the very crop that the student sees, and serves several steps. The recipe `budget`
adds to the first store all the time; a `Pool` is filled once.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.distillation.batch_size import BANK_MEMORY
from dfq_tf.distillation.generator import ANSWER, STUDENT
from dfq_tf.distillation.teacher import ObservedTeacher
from dfq_tf.procedural import natural_noise
from dfq_tf.settings import BudgetConfig, DistillationConfig
from dfq_tf.training import augment_pixels

# Answered batches that are kept, from which student steps draw; images of each kind
# that needs no generator, cropped and flipped anew each time.
_ANSWERED, _OTHERS = 32, 4096
# Added to the seed for images of formulas: students are judged by those of the seed.
OTHERS_SEED = 4


class Store(tf.Module):
    """A ring of batches: the newest takes the place of the oldest.

    Args:
      num_batches: how many it holds.
      **shapes: name -> (shape with the batch, dtype) of each part of a batch.

    Attributes:
      added: how many batches have been added, a scalar int64 variable.
    """

    def __init__(self, num_batches: int, **shapes: tuple[tuple[int, ...], tf.DType]):
        super().__init__(name="store")
        self.num_batches = num_batches
        self._size = next(iter(shapes.values()))[0][0]
        rows = num_batches * self._size
        self._parts = {
            name: tf.Variable(tf.zeros((rows, *shape[1:]), dtype))
            for name, (shape, dtype) in shapes.items()
        }
        # TensorFlow keeps int32 in the memory of the CPU, where a step that XLA
        # compiles for a GPU does not reach it.
        self.added = tf.Variable(0, dtype=tf.int64)

    def add(self, **parts: tf.Tensor) -> None:
        """Takes a batch in."""
        place = tf.cast(self.added, tf.int32) % self.num_batches
        rows = place * self._size + tf.range(self._size)
        for name, variable in self._parts.items():
            variable.scatter_update(tf.IndexedSlices(parts[name], rows))
        self.added.assign_add(1)

    def all(self) -> dict[str, np.ndarray]:
        """All rows that it holds, by the names of their parts."""
        filled = min(int(self.added), self.num_batches) * self._size
        return {name: v.numpy()[:filled] for name, v in self._parts.items()}

    def draw(self, count: int, seed: tf.Tensor) -> list[tf.Tensor]:
        """`count` rows of all parts, each row as likely, with repetition."""
        added = tf.cast(self.added, tf.int32)
        filled = tf.minimum(added, self.num_batches) * self._size
        rows = tf.random.stateless_uniform((count,), seed, 0, filled, tf.int32)
        # Out of the variable: to read all of it first would copy it.
        return [tf.gather(variable, rows) for variable in self._parts.values()]


def capacity(
    batch_size: int, image_shape: tuple[int, int, int], times: int = 1
) -> tuple[int, int]:
    """How many answered batches are kept, and images of each kind of `Answers.others`.

    Fewer where they take more than a quarter of BANK_MEMORY each.

    Args:
      batch_size: images in a batch.
      image_shape: (height, width, channels).
      times: how many times as many batches as usual are wanted.
    """
    images = BANK_MEMORY // 4 // math.prod(image_shape)
    batches = images // batch_size
    return max(2, min(times * _ANSWERED, batches)), max(1, min(_OTHERS, images))


def answer_store(teacher: ObservedTeacher, size: int, num_batches: int) -> Store:
    """An empty store for images and the teacher's answers to them."""
    return Store(
        num_batches,
        images=((size, *teacher.image_shape), tf.uint8),
        logits=((size, teacher.num_classes), tf.float32),
    )


class Answers(tf.Module):
    """Images with the teacher's answers, made from those of a bank and from others.

    Args:
      teacher: answers.
      bank: the images that were generated, a Store with one part.
      others: kind -> uint8 (n, height, width, channels): images that nothing has to
        learn to make, such as 1/f noise.
      config: batch size; `share_of` each kind; how images are changed.
      store: takes them, of `answer_store`.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        bank: Store,
        others: Mapping[str, np.ndarray],
        config: BudgetConfig | DistillationConfig,
        store: Store,
    ) -> None:
        super().__init__(name="answers")
        self._teacher, self._bank, self._config = teacher, bank, config
        self._others = {k: tf.constant(v) for k, v in others.items()}
        self.store = store
        mixtures = [kind for kind in ("mixup", "cutmix") if config.share_of(kind)]
        kinds = (*mixtures, *others)
        self.shares = {kind: tf.Variable(config.share_of(kind)) for kind in kinds}

    def refresh(self, seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        """Answers one more batch, of (seed, step), int32 (2,).

        Returns:
          The mean of the logits, for who waits for the end.
        """
        config = self._config
        seeds = tf.random.split(tf.random.fold_in(seed_and_step, ANSWER), 2)
        images = self._drawn(config.batch_size, seeds[0])
        mean = self._teacher.description.input_mean
        changed = augment_pixels(images, mean, config.student_augmentation, seeds[1])
        changed = tf.round(changed)
        logits, _ = self._teacher(changed)
        self.store.add(images=tf.cast(changed, tf.uint8), logits=logits)
        return {"mean_logit": tf.reduce_mean(logits)}

    def _drawn(self, count: int, seed: tf.Tensor) -> tf.Tensor:
        """float32 images, of each kind about its share, the rest from the bank."""
        seeds = tf.random.split(seed, 5 + len(self._others))

        def generated(s: tf.Tensor) -> tf.Tensor:
            return tf.cast(self._bank.draw(count, s)[0], tf.float32)

        first, made = generated(seeds[0]), {}
        if {"mixup", "cutmix"} & self.shares.keys():
            second = generated(seeds[1])
            weights = tf.random.stateless_uniform((count, 1, 1, 1), seeds[2])
            made["mixup"] = weights * first + (1 - weights) * second
            made["cutmix"] = tf.where(_boxes(first.shape, seeds[3]), second, first)
        for (kind, images), s in zip(self._others.items(), tf.unstack(seeds[5:])):
            rows = tf.random.stateless_uniform((count,), s, 0, len(images), tf.int32)
            made[kind] = tf.cast(tf.gather(images, rows), tf.float32)
        draws = tf.random.stateless_uniform((count, 1, 1, 1), seeds[4])
        result, begin = first, tf.constant(0.0)
        for kind, share in self.shares.items():
            chosen = (draws >= begin) & (draws < begin + share)
            result = tf.where(chosen, made[kind], result)
            begin += share
        return result


class Pool:
    """Images, and the newest crops of them with the teacher's answers.

    It is empty until it is filled: a run that has no round left needs no images.

    Args:
      teacher: answers.
      images: makes them, uint8 (count, height, width, channels), where no checkpoint
        has them.
      count: how many it makes, a batch or more.
      config: shares, how images are changed and how often crops are used; its batch
        size is that of student steps.
      seed: decides all that is drawn.
      compiled: compiles a step for one device.
    """

    def __init__(
        self,
        teacher: ObservedTeacher,
        images: Callable[[], np.ndarray],
        count: int,
        config: DistillationConfig,
        seed: int,
        compiled: Callable[..., Any],
    ) -> None:
        self._teacher, self._make, self._config = teacher, images, config
        self._seed, self._compiled = seed, compiled
        size, shape = config.batch_size, teacher.image_shape
        self.images = Store(count // size, images=((size, *shape), tf.uint8))
        self._num_answered, self._num_others = capacity(size, shape)
        self.answered = answer_store(teacher, size, self._num_answered)
        self._refresh: Any = None
        self._draw = compiled(lambda seed: self.answered.draw(size, seed))

    def fill(self) -> None:
        """Makes the images, at the first call, and those that a formula makes."""
        if self._refresh is not None:
            return
        if not int(self.images.added):
            self.add(self._make())
        others = {}
        if self._config.noise_share:
            seed, shape = self._seed + OTHERS_SEED, self._teacher.image_shape
            others["noise"] = natural_noise(seed, self._num_others, shape)
        answers = Answers(
            self._teacher, self.images, others, self._config, self.answered
        )
        self._refresh = self._compiled(answers.refresh)

    def add(self, images: np.ndarray) -> None:
        """Takes whole batches of images in, in place of the oldest."""
        size = self._config.batch_size
        for i in range(len(images) // size):
            self.images.add(images=images[i * size : (i + 1) * size])

    def draw(self, number: int) -> list[tf.Tensor]:
        """A batch of crops and the answers to them, of which some may be new.

        It must have been filled.

        Args:
          number: of the step. The first steps ask for a batch of answers each, later
            ones now and then: so all steps must be taken in turn.

        Returns:
          uint8 (batch, height, width, channels), float32 (batch, num_classes).
        """
        late = number - self._num_answered
        if late < 0:
            self._refresh(tf.constant([self._seed, number]))
        elif late % self._config.answer_uses == 0:
            batch = self._num_answered + late // self._config.answer_uses
            self._refresh(tf.constant([self._seed, batch]))
        return self._draw(tf.random.fold_in([self._seed, number], STUDENT))

    @property
    def usual_steps(self) -> tuple[int, int]:
        """Number of the first step that is like all later ones; steps per answer."""
        return self._num_answered, self._config.answer_uses

    def changing(self, grows: bool) -> list[Store]:
        """What a checkpoint must keep: images that none are added to come back alike.

        Args:
          grows: whether generator steps add to them.
        """
        return [self.answered, self.images] if grows else [self.answered]


def _boxes(shape: tf.TensorShape, seed: tf.Tensor) -> tf.Tensor:
    """A box in each image, bool (batch, height, width, 1), its area drawn evenly.

    Its centre is anywhere, and what lies outside of the image is cut off (Yun et al.
    2019, "CutMix").
    """
    batch, height, width, _ = shape
    draws = tf.random.stateless_uniform((3, batch, 1), seed)
    half = tf.sqrt(draws[0]) / 2

    def inside(centre: tf.Tensor, side: int) -> tf.Tensor:
        places = (tf.range(side, dtype=tf.float32) + 0.5) / side
        return tf.abs(places - centre) < half

    rows, columns = inside(draws[1], height), inside(draws[2], width)
    return (rows[:, :, tf.newaxis] & columns[:, tf.newaxis])[..., tf.newaxis]
