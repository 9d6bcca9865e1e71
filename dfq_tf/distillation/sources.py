"""Where images come from that stand for those of the task.

Generators make images that cause the statistics which the teacher's BatchNormalization
remembers, and must be trained for it, which takes minutes for large images. Crops of
photographs cost nothing: where the task is photographs they cause those statistics too.
How near they come says whether it is (docs/experiments/images_and_ranges.md).
"""

import dataclasses

import numpy as np

from dfq_tf import photographs
from dfq_tf.compat import tf
from dfq_tf.distillation.teacher import ObservedTeacher, distance_of
from dfq_tf.errors import ConfigError
from dfq_tf.procedural import natural_noise
from dfq_tf.settings import GENERATED, PHOTOGRAPHS, PROCEDURAL, SOURCES, is_small

# Photographs are taken whose distance is at most this, in nats per channel. They had
# 0.10 and 0.15 where they calibrate as well as generated images, else 0.25 and more.
NEAR = 0.2
# Nothing is learnt from photographs that are farther. Those of 0.52 and less made
# lessons better, those of 22 (traffic signs) worse (docs/experiments/few_bits.md).
FAR = 1.0
_PICTURES = "pictures"
_TITLES = {
    GENERATED: "Generated images",
    PHOTOGRAPHS: "Crops of the photographs that ship with the project",
    PROCEDURAL: "Procedural images (1/f noise)",
    _PICTURES: "Crops of the pictures in the folder",
}
# So many pixels are looked at, in at most so many images.
_PIXELS, _MOST_IMAGES = 2**22, 128


@dataclasses.dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
      name: one of SOURCES but 'auto', or a folder of pictures.
      distance: of its images, see `teacher.distance_of`; of the photographs, if they
        were turned down for generated images; None where nothing was measured.
    """

    name: str
    distance: float | None = None

    @property
    def kind(self) -> str:
        """What its images are: generated, photographs, procedural or pictures."""
        return self.name if self.name in SOURCES else _PICTURES

    def __str__(self) -> str:
        """One line for the user: what was taken, and why."""
        title = _TITLES[self.kind]
        if self.distance is None:
            return title
        found = (
            f"{self.distance:.2f} nats from what BatchNormalization remembers "
            f"({NEAR} is near)"
        )
        if self.kind == GENERATED:
            return f"{title}; photographs are {found}"
        return f"{title}, {found}"

    def draw(self, seed: int, count: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Images, uint8 (count, *shape); generated ones come of their generators."""
        if self.name == PROCEDURAL:
            return natural_noise(seed, count, shape)
        folder = photographs.FOLDER if self.name == PHOTOGRAPHS else self.name
        return photographs.crops(seed, count, shape, folder)


def check_source(name: str) -> None:
    """Raises ConfigError if no images of a source can be had.

    Args:
      name: as of `choose_source`.
    """
    if name in SOURCES:
        return
    try:
        photographs.check_pictures(name)
    except ConfigError as error:
        raise ConfigError(
            f"images is {name!r}: {error}. Name a folder of pictures, or one of "
            f"{', '.join(SOURCES)}"
        ) from error


def known_source(
    name: str, image_shape: tuple[int, int, int], has_memory: bool
) -> str | None:
    """The source before any image is looked at; None where photographs must be.

    Args:
      name: as of `choose_source`.
      image_shape: (height, width, channels).
      has_memory: whether the teacher has BatchNormalization.
    """
    if name != "auto":
        return name
    if not has_memory:
        return PROCEDURAL
    return GENERATED if is_small(image_shape) else None


def choose_source(
    teacher: ObservedTeacher,
    name: str,
    seed: int,
    strategy: tf.distribute.Strategy | None = None,
) -> Source:
    """The source that is asked for, or the one that 'auto' stands for.

    Auto takes the photographs that ship with the project if images are larger than
    SMALL_IMAGE and photographs are near, see NEAR; and procedural images where there is
    no BatchNormalization, from which generators could learn. Else it takes generated
    images.

    Args:
      teacher: has the statistics that images are compared with.
      name: one of SOURCES, or a folder of pictures.
      seed: of the draws.
      strategy: the devices of the run; None for one. All workers take what the first
        one finds.

    Raises:
      ConfigError: see `check_source`.
    """
    check_source(name)
    is_auto = name == "auto"
    known = known_source(name, teacher.image_shape, bool(teacher.bn_inputs))
    if known == GENERATED or (is_auto and known == PROCEDURAL):
        return Source(known)
    source = Source(PHOTOGRAPHS if is_auto else name)
    distance = _distance(teacher, source, seed, strategy)
    if is_auto and distance is not None and distance > NEAR:
        return Source(GENERATED, distance)
    return Source(source.name, distance)


def _distance(
    teacher: ObservedTeacher,
    source: Source,
    seed: int,
    strategy: tf.distribute.Strategy | None,
) -> float | None:
    """Of some of a source's images, see `teacher.distance_of`."""
    height, width, _ = shape = teacher.image_shape
    count = max(1, min(_MOST_IMAGES, _PIXELS // (height * width)))
    return distance_of(teacher, source.draw(seed + 2, count, shape), strategy)


def photographs_share(
    teacher: ObservedTeacher,
    source: Source,
    most: float,
    seed: int,
    strategy: tf.distribute.Strategy | None = None,
) -> float:
    """Share of photographs among what is learnt from: none where they are FAR.

    Args:
      teacher: has the statistics that photographs are compared with.
      source: of the images; photographs are photographs, all of them, and only
        generated ones have some among them.
      most: the share where they are not far.
      seed: of the draws.
      strategy: as of `choose_source`.
    """
    if source.name == PHOTOGRAPHS:
        return 1.0
    if source.name != GENERATED or not most:
        return 0.0
    distance = source.distance
    if distance is None:
        distance = _distance(teacher, Source(PHOTOGRAPHS), seed, strategy)
    return 0.0 if distance is None or distance > FAR else most


def with_photographs(images: np.ndarray, share: float, seed: int) -> np.ndarray:
    """What blocks and students learn from: some of the images become photographs.

    Args:
      images: uint8 (n, height, width, channels).
      share: of photographs, from `photographs_share`.
      seed: of the crops.

    Returns:
      As many images, those of both kinds evenly spread.
    """
    count = round(share * len(images))
    if not count:
        return images
    mixed = images.copy()
    places = np.arange(count) * len(images) // count
    mixed[places] = photographs.crops(seed, count, images.shape[1:])
    return mixed
