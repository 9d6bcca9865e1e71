"""Shows a person what the generator makes."""

import os
import pathlib

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.files import write_bytes


def _grid(images: np.ndarray) -> np.ndarray:
    """Images in rows of ten, one white pixel apart; the last row may be shorter."""
    columns = 10
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    shape = (rows * (height + 1) - 1, columns * (width + 1) - 1, channels)
    grid = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image
    return grid


def write_preview(
    images: np.ndarray, directory: str | os.PathLike[str], name: str
) -> None:
    """Writes a grid as `DIRECTORY/NAME.png`, and to TensorBoard.

    Each pixel of an image is 3 x 3 pixels large there, or fewer if the image has more
    than 64 pixels a side.

    Args:
      images: uint8 (n, height, width, channels); with 1, 3 or 4 channels.
      directory: of the run.
      name: of the picture.
    """
    grid = _grid(images)
    times = min(3, max(1, 192 // max(images.shape[1:3])))
    enlarged = np.repeat(np.repeat(grid, times, axis=0), times, axis=1)
    picture = tf.io.encode_png(enlarged).numpy()
    write_bytes(pathlib.Path(directory) / f"{name}.png", picture)
    folder = pathlib.Path(directory) / "tensorboard" / name
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=0):
        tf.summary.image(name, grid[None])
    writer.close()
