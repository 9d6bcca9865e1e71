"""Images that are crops of photographs: of those that ship here, or of a user's folder.

Real pictures reach as far as images of a task that is photographs too, whatever they
show (Asano and Saeed, ICLR 2023, "The Augmented Image Prior").
"""

import collections
import functools
import os
import pathlib

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.context import counted
from dfq_tf.errors import ConfigError
from dfq_tf.files import expanded

# Those that ship here; README.md beside them names their authors and licences.
FOLDER = pathlib.Path(__file__).parent
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_BEGINNINGS = (b"\xff\xd8", b"\x89PNG", b"BM", b"GIF8")
# Pictures too, which TensorFlow does not read.
_UNREAD = (".webp", ".tif", ".tiff", ".heic", ".avif")
# Pictures of so many bytes, together, are read before any work, which takes seconds.
_READ_FIRST = 256 * 2**20

# Drawn for each crop. Its share of the picture's area, as an exponential of even draws:
_LEAST_SHARE = 0.04
# contrast, as the natural logarithm of a factor; how much of the colour stays;
_CONTRAST, _COLOUR = 0.5, (0.0, 1.5)
# each channel's factor, as the standard deviation of its logarithm; what is added.
_TINT, _BRIGHTNESS = 0.1, 40.0


def crops(
    seed: int,
    count: int,
    shape: tuple[int, int, int],
    folder: str | os.PathLike[str] = FOLDER,
) -> np.ndarray:
    """Random crops, turned, flipped, and changed in contrast, colour and brightness.

    Args:
      seed: of the draws; the same seed gives the same images.
      count: number of images.
      shape: (height, width, channels), of 1, 3 or 4 channels; the fourth is 255.
      folder: has the pictures, see `files_in`.

    Returns:
      uint8 (count, *shape).

    Raises:
      ConfigError: the folder has no picture, or one that cannot be read.
    """
    paths = pictures_in(folder)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(paths), size=count)
    images = np.empty((count, *shape), np.uint8)
    # Each picture is read once, and let go.
    for number in counted(np.unique(chosen), "pictures"):
        sizes = _halved(_read(paths[number]))
        for i in map(int, np.flatnonzero(chosen == number)):
            images[i] = _crop(np.random.default_rng((seed, i)), sizes, shape)
    return images


def pictures_in(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The pictures of a folder, by name; see `files_in`.

    Raises:
      ConfigError: it has none, or is no folder.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise ConfigError(f"the folder of pictures {str(folder)!r} is not there")
    paths = files_in(folder)
    if not paths:
        raise ConfigError(
            f"the folder {str(folder)!r} has no picture{_left_out(folder)}; it, or the "
            f"folders in it, must have files that end in {', '.join(SUFFIXES)}"
        )
    return paths


def check_pictures(folder: str | os.PathLike[str]) -> None:
    """Reads the pictures of a folder, in seconds: of very many the first ones.

    Of the others it looks at how they begin.

    Raises:
      ConfigError: see `pictures_in`; or a file is no picture, whatever its name.
    """
    size = 0
    for path in counted(pictures_in(folder), "pictures"):
        with path.open("rb") as file:
            if not file.read(8).startswith(_BEGINNINGS):
                raise _unreadable(path)
        status = path.stat()
        size += status.st_size
        if size <= _READ_FIRST:
            _read_once(path, status.st_size, status.st_mtime_ns)


def described(folder: str | os.PathLike[str]) -> str:
    """How many pictures a folder has, and how many of other kinds, for the user.

    Raises:
      ConfigError: see `pictures_in`.
    """
    count = len(pictures_in(folder))
    left_out = _left_out(expanded(folder))
    return f"{count:,} picture{'' if count == 1 else 's'}{left_out}"


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that are pictures by name, sorted; perhaps none.

    If it has none itself, those of the folders in it, as of one for each class. Hidden
    ones are none: macOS writes such beside each picture.
    """
    places = _places(folder)
    return [path for place in places for path in _ending_in(place, SUFFIXES)]


def _places(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders whose pictures count."""
    if _ending_in(folder, SUFFIXES):
        return [folder]
    folders = [path for path in _visible(folder) if path.is_dir()]
    return [each for each in folders if os.access(each, os.R_OK | os.X_OK)]


def _ending_in(folder: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    return [
        path
        for path in _visible(folder)
        if path.suffix.lower() in suffixes and path.is_file()
    ]


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != ".")


def _left_out(folder: pathlib.Path) -> str:
    """Such as ' (left out: 3 .tif, 40 .webp)'; empty where nothing is."""
    places = dict.fromkeys([folder, *_places(folder)])
    paths = [path for place in places for path in _ending_in(place, _UNREAD)]
    counts = collections.Counter(path.suffix.lower() for path in paths)
    each = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return f" (left out: {each})" if each else ""


@functools.cache
def _read_once(path: pathlib.Path, *state: int) -> None:
    """Raises ConfigError for what cannot be read; knows a file by its state."""
    _read(path)


def _read(path: pathlib.Path) -> np.ndarray:
    """uint8 (height, width, 3); raises ConfigError for what cannot be read."""
    try:
        decoded = tf.io.decode_image(
            tf.io.read_file(str(path)), channels=3, expand_animations=False
        )
    except tf.errors.OpError as error:
        raise _unreadable(path) from error
    return decoded.numpy()


def _unreadable(path: pathlib.Path) -> ConfigError:
    return ConfigError(
        f"the picture {str(path)!r} cannot be read; take it out of the folder, or save "
        "it anew as JPEG or PNG"
    )


def _halved(picture: np.ndarray) -> list[np.ndarray]:
    """A picture, and smaller ones of half the sides each, by the mean of 2x2 pixels."""
    sizes = [picture.astype(np.float32)]
    while min(sizes[-1].shape[:2]) >= 2:
        height, width = (side // 2 * 2 for side in sizes[-1].shape[:2])
        blocks = sizes[-1][:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
        sizes.append(blocks.mean(axis=(1, 3)))
    return sizes


def _crop(
    rng: np.random.Generator, sizes: list[np.ndarray], shape: tuple[int, int, int]
) -> np.ndarray:
    """One image, uint8 of `shape`, of a picture from `_halved`."""
    height, width, channels = shape
    # The picture's side, and the crop's, in units of the image's.
    whole = np.sqrt(sizes[0][..., 0].size / height / width)
    scale = whole * _LEAST_SHARE ** (rng.random() / 2)
    # Of the sizes the smallest of which the crop has no fewer pixels than the image.
    level = int(np.clip(np.log2(scale), 0, len(sizes) - 1))
    picture, scale = sizes[level], scale / 2**level
    if rng.random() < 0.5:
        picture = np.swapaxes(picture, 0, 1)
    rows = int(np.clip(scale * height, 1, picture.shape[0]))
    columns = int(np.clip(scale * width, 1, picture.shape[1]))
    top = rng.integers(picture.shape[0] - rows + 1)
    left = rng.integers(picture.shape[1] - columns + 1)
    part = picture[top : top + rows, left : left + columns]
    part = part[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
    # What tf.image.resize calls, which takes ten times as long for small images. It
    # takes tensors faster than arrays.
    (values,) = tf.raw_ops.ResizeBilinear(
        images=tf.constant(part[None]),
        size=tf.constant((height, width)),
        half_pixel_centers=True,
    ).numpy()
    mean, grey = values.mean(), values.mean(axis=-1, keepdims=True)
    values = grey + rng.uniform(*_COLOUR) * (values - grey)
    values = mean + np.exp(rng.uniform(-_CONTRAST, _CONTRAST)) * (values - mean)
    values *= np.exp(_TINT * rng.standard_normal(3))
    values += rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    if channels == 1:
        values = values.mean(axis=-1, keepdims=True)
    if channels == 4:
        values = np.concatenate([values, np.full((height, width, 1), 255.0)], axis=-1)
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
