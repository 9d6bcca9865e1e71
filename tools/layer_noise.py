"""Says which layer of a quantized file is the noisiest.

    python tools/layer_noise.py --teacher=teacher.keras --tflite=runs/run/df_q.tflite

Compares each layer of a TFLite file that the project wrote with the float teacher's:
signal-to-quantization-noise ratio in decibels. Prints a table, the worst layer last,
and writes NAME_noise.csv and NAME_noise.png, a bar chart, beside the file.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common, teacher_flags
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.files import may_write_in
from dfq_tf.quantization import float_network
from dfq_tf.reports import layer_noise
from dfq_tf.settings import CalibrationConfig

FLAGS = common.FLAGS


def read_images(path: str | None, tflite: pathlib.Path, count: int) -> np.ndarray:
    """The first images of a data set, of --images, or of those beside the file.

    Args:
      path: a .npy file, or None.
      tflite: the file; tools/quantize.py leaves images held out beside it.
      count: how many.

    Raises:
      ModelError: there is no such file, or it holds no images.
    """
    if FLAGS.dataset:
        return common.dataset_from_flags().load("test").images[:count]
    source = pathlib.Path(path or tflite.with_name(f"{tflite.stem}_images.npy"))
    if not source.is_file():
        is_folder = source.is_dir()
        what = (
            f"{source} is a folder" if is_folder else f"there are no images in {source}"
        )
        raise ModelError(
            f"{what}; name a .npy file of uint8 images with --images, or a data set "
            "with --dataset"
        )
    try:
        with open(source, "rb") as file:  # np.load takes other files too
            images = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ModelError(f"{source} is no .npy file of images: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ModelError(
            f"{source} holds {images.dtype} {images.shape}; it must hold uint8 images, "
            "(n, height, width, channels)"
        )
    return images[:count]


def table(noise: list[layer_noise.LayerNoise]) -> str:
    """A line per layer."""
    lines = [f"{'layer':36} {'weights':7} {'alone, dB':>9} {'from pixels, dB':>15}"]
    lines += [
        f"{n.name:36} {n.weights:7} {n.own_db:>9.1f} {n.total_db:>15.1f}" for n in noise
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and reports."""
    for name in ("teacher", "tflite"):
        if not FLAGS[name].value:
            raise ConfigError(f"{name} is empty; name a file with --{name}")
    if FLAGS.num_images < 1:
        raise ConfigError(f"num_images is {FLAGS.num_images}; it must be at least 1")
    if FLAGS.images and FLAGS.dataset:
        raise ConfigError(
            f"images is {FLAGS.images!r} and dataset is {FLAGS.dataset!r}; give one of "
            "them"
        )
    path = pathlib.Path(FLAGS.tflite)
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")
    folder = path.parent.absolute()
    if not may_write_in(folder):
        raise ConfigError(
            f"tflite is {str(path)!r}, but {folder}, which is to have "
            f"{path.stem}_noise.csv, cannot be written; copy the file, and its images "
            "if --images does not name them, to another folder"
        )
    teacher = teacher_flags.read_teacher(FLAGS.teacher)
    images = read_images(FLAGS.images, path, FLAGS.num_images)
    network = float_network(teacher, CalibrationConfig(equalize=FLAGS.equalize))
    report = path.with_name(f"{path.stem}_noise")
    with common.stage("noise of the layers"):
        noise = layer_noise.measure(network, path.read_bytes(), images)
        written = layer_noise.write_report(noise, report, path.name)
    worst = layer_noise.worst(noise)
    print(table(noise))
    print(f"The noisiest layer is {worst.name}, {worst.own_db:.1f} dB")
    print(f"Wrote {' and '.join(written)}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define("Files", "teacher", str, None, "Float model (.keras or .h5).")
    common.define("Files", "tflite", str, None, "Quantized file made of it.")
    teacher_flags.define()
    common.define(
        "Images",
        "images",
        str,
        None,
        "A .npy file of uint8 images (default: NAME_images.npy beside the file).",
    )
    common.define_dataset_flags(None)
    common.define("Images", "num_images", int, 64, "How many images are run.")
    common.define(
        "Files",
        "equalize",
        bool,
        False,
        "Whether the file was made with --equalize.",
    )
    common.define_progress_flag()


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
