"""Which networks of keras.applications are accepted, and why others are not.

    python benchmarks/scan.py
    python benchmarks/scan.py ResNet50 VGG16

Builds each network with random weights, as Keras 3 does by default, shows two images of
noise to its BatchNormalization, looks at it as tools/inspect_model.py does, and prints
a row of a table. A network that takes images of any size is given 224 x 224.
"""

import argparse
import inspect
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dfq_tf.compat import keras3
from dfq_tf.errors import DfqError
from dfq_tf.procedural import natural_noise
from dfq_tf.reports import inspection

_CLASSES = 1000
_SIZE = (224, 224)


def networks() -> list[str]:
    """Names of all networks, by the alphabet."""
    made = vars(keras3().applications).items()
    return sorted(name for name, each in made if inspect.isfunction(each))


def reasons(found: inspection.Inspection) -> Iterator[str]:
    """Each kind of layer that cannot be quantized, once, with its reason."""
    seen = set()
    for row in found.problems:
        if row.kind not in seen:
            seen.add(row.kind)
            yield f"{row.kind}: {row.problem}"


def show_images(model: Any, size: Sequence[int]) -> None:
    """Lets each BatchNormalization remember a batch.

    Random weights without it may give numbers so large that a deep network's answers
    change altogether when its input changes by a rounding.
    """
    for layer in model._flatten_layers():
        if type(layer).__name__ == "BatchNormalization":
            layer.momentum = 0.0
    model(natural_noise(0, 2, (*size, 3)).astype(np.float32), training=True)


def row(name: str) -> str:
    """The row of one network."""
    model = getattr(keras3().applications, name)(weights=None, classes=_CLASSES)
    own = model.input_shape[1:3]
    height, width = chosen = _SIZE if None in own else own
    size = f"{height} x {width}"
    show_images(model, chosen)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = inspection.inspect(model, feeding="raw", image_size=chosen)
    except DfqError as error:
        return f"| {name} | {size} | | refused: {error} |"
    text = "; ".join(reasons(found))
    file = "" if found.file_bytes is None else f"{found.file_bytes / 1e6:.1f} MB"
    return (
        f"| {name} | {size} | {file} | {'refused: ' + text if text else 'accepted'} |"
    )


def main() -> None:
    """Looks at the networks that are named, or at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=networks())
    print("| network | images | int8 file | |\n|---|---|---|---|")
    for name in parser.parse_args().names:
        print(row(name), flush=True)
        keras3().backend.clear_session()


if __name__ == "__main__":
    main()
