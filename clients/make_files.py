"""Makes the files that clients/check.py runs, from a finished quickstart.

    python clients/make_files.py runs/quickstart runs/clients

Four networks: the quickstart's, a MobileNet V1 of 96x96 pixels, and two small ones with
what these have not. Each at W8A8 and W4A8, for each target that takes it. No data is
used.
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

import numpy as np

from dfq_tf import api
from dfq_tf.compat import keras
from dfq_tf.errors import ConfigError, UnsupportedLayerError
from dfq_tf.files import write_text
from dfq_tf.graph import Classifier, layers
from dfq_tf.importing import as_classifier
from dfq_tf.quantization import QuantizedNetwork, float_network
from dfq_tf.quantization.post_training import post_training
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite import check_target_takes, convert, targets

WIDTHS = (BitWidths(), BitWidths(4))
IMAGES = 100
_CALIBRATED = 128
_SMALL = (16, 16, 3)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that files are made of.

    Attributes:
      name: of its files.
      title: for the table.
      quantized: at each of WIDTHS.
      images: uint8 (IMAGES, height, width, channels), which the clients are given.
      default: content of the default file at the first width, where there is one.
      in_micro: whether TFLite Micro takes the file for android at the first width, too.
    """

    name: str
    title: str
    quantized: dict[str, QuantizedNetwork]
    images: np.ndarray
    default: bytes | None = None
    in_micro: bool = True


def quickstart(folder: pathlib.Path) -> Network:
    """The quickstart's network, and its file as it is.

    Args:
      folder: the workdir of `make quickstart`.
    """
    teacher = as_classifier(folder / "teacher.keras")
    generated = np.load(folder / "df_q_images.npy")
    trained = api.load_quantized(folder / "df_qat_kd.keras")
    few = _post_training(teacher, generated[:_CALIBRATED], WIDTHS[1])
    half = IMAGES // 2
    pixels = _noise(teacher.image_shape, IMAGES - half, seed=1)
    return Network(
        "quickstart",
        "quickstart 8x8",
        {WIDTHS[0].name: trained, WIDTHS[1].name: few},
        np.concatenate([generated[-half:], pixels]),
        (folder / "df_qat_kd.tflite").read_bytes(),
    )


def mobilenet() -> Network:
    """The repository's MobileNet V1, a quarter of the width, for images of 96x96.

    It was trained on images of 32x32, so its answers mean nothing; but its layers are
    those of a trained network, which does not blow roundings up as a random one does.
    """
    teacher = as_classifier(_ROOT / "teachers/mobilenet_v1_25_cifar10.keras")
    shape = (96, 96, 3)
    description = dataclasses.replace(teacher.description, probabilities="softmax")
    classifier = Classifier(layers.resized(teacher.graph, shape), description)
    calibrated = _noise(shape, _CALIBRATED, seed=3)
    quantized = {w.name: _post_training(classifier, calibrated, w) for w in WIDTHS}
    images = _noise(shape, IMAGES, seed=4)
    return Network("mobilenet", "MobileNet V1 25 % 96x96", quantized, images)


def with_tables() -> Network:
    """Functions of single values, which a file has as tables; two targets lack them."""
    keras.utils.set_random_seed(0)
    image = keras.layers.Input(_SMALL)
    x = keras.layers.Conv2D(8, 3, 2, "same", activation="elu")(image)
    x = keras.layers.Conv2D(8, 3, 2, "same", activation="gelu")(x)
    return _small("tables", "tables 16x16", image, x)


def with_branches() -> Network:
    """A RELU6 that no operator takes in, and twelve tensors side by side."""
    keras.utils.set_random_seed(1)
    image = keras.layers.Input(_SMALL)
    x = keras.layers.Conv2D(8, 3, 2, "same")(image)
    x = keras.layers.Add()([x, keras.layers.ReLU(6.0)(x)])
    branches = [keras.layers.Conv2D(2, 1, activation="relu")(x) for _ in range(12)]
    x = keras.layers.Concatenate()(branches)
    return _small("branches", "branches 16x16", image, x)


def _small(name: str, title: str, image: Any, x: Any) -> Network:
    """A network of random weights, with five classes behind its layers."""
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(5, "softmax")(x))
    classifier = as_classifier(model, feeding="0..1")
    calibrated = _noise(_SMALL, _CALIBRATED, seed=5)
    quantized = {w.name: _post_training(classifier, calibrated, w) for w in WIDTHS}
    images = _noise(_SMALL, IMAGES, seed=6)
    return Network(name, title, quantized, images, in_micro=False)


def _post_training(
    classifier: Classifier, images: np.ndarray, widths: BitWidths
) -> QuantizedNetwork:
    return post_training(float_network(classifier), images, widths)


def _noise(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """Coloured noise, as smooth as photographs are: uint8 (count, *shape)."""
    rng = np.random.default_rng(seed)
    frequencies = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, shape[1::-1])))
    frequencies[0, 0] = 1
    images = []
    for _ in range(count):
        spectrum = np.fft.fft2(rng.normal(size=shape), axes=(0, 1))
        spectrum /= frequencies[..., None] ** rng.uniform(0.8, 1.8)
        values = np.fft.ifft2(spectrum, axes=(0, 1)).real
        values = (values - values.mean((0, 1))) / values.std((0, 1))
        images.append(rng.uniform(60, 190, shape[-1]) + rng.uniform(15, 80) * values)
    return np.clip(images, 0, 255).astype(np.uint8)


def file(
    network: Network, widths: BitWidths, target: str, folder: pathlib.Path
) -> dict[str, Any]:
    """Writes a file of a network; what clients/check.py must know of it.

    Raises:
      ConfigError: the target does not take these widths.
      UnsupportedLayerError: it lacks an operator.
    """
    config, entry = FileConfig(target=target), targets.TARGETS[target]
    check_target_takes(config, widths)
    is_default = target == "android" and widths == WIDTHS[0]
    content = network.default if is_default else None
    quantized = network.quantized[widths.name]
    path = folder / f"{network.name}_{widths.name.lower()}_{target}.tflite"
    path.write_bytes(content or convert(quantized, network.images[:4], config))
    return {
        "title": f"{network.title} {widths.name}",
        "path": path.name,
        "target": target,
        # At 4 bits, the file for android has operators that TFLite Micro lacks.
        "for_micro": target == "micro" or (is_default and network.in_micro),
        "images": f"{network.name}.npy",
        "labels": quantized.description.class_names,
        "versions": None if entry.versions is None else dict(entry.versions),
        "source": entry.source,
    }


def main(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the files and cases.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files, refused = [], []
    for network in (quickstart(source), mobilenet(), with_tables(), with_branches()):
        np.save(folder / f"{network.name}.npy", network.images)
        for widths, target in itertools.product(WIDTHS, targets.TARGETS):
            try:
                files.append(file(network, widths, target, folder))
            except (ConfigError, UnsupportedLayerError) as error:
                title = f"{network.title} {widths.name}"
                says = f"refused: {error}"
                refused.append({"file": title, "client": target, "says": says})
    found = {"files": files, "refused": refused}
    write_text(folder / "cases.json", json.dumps(found, indent=1))
    print(f"Wrote {len(files)} files to {folder}")


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
