"""What other tools make of a teacher where there is no data, beside ours.

    python benchmarks/peers.py --dataset=cifar10 --aeq_python=PYTHON

TensorFlow's converter and AI Edge Quantizer need images for the ranges of activations;
where there are none, noise is what is left. AI Edge Quantizer can also leave
activations in floating point. PYTHON is an interpreter of an environment with
`ai-edge-quantizer`, which has pins of its own; without it, its rows are left out.
Prints a table: accuracy on test images, whether the file computes in integers alone,
its size, its latency with one thread, and processor seconds of what made it, imports
included.
"""

import argparse
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing import load_classifier
from dfq_tf.with_data.datasets import accuracy, open_dataset

_NOISE_IMAGES = 200
# AI Edge Quantizer's own recipes; the last word is what its documentation calls them.
_AEQ = """
import sys
import numpy as np
from ai_edge_quantizer import quantizer, recipe
source, target, images, name = sys.argv[1:]
made = quantizer.Quantizer(source, getattr(recipe, name)())
found = None
if made.need_calibration:
    from ai_edge_litert.interpreter import Interpreter
    (signature,) = Interpreter(source).get_signature_list()
    (key,) = Interpreter(source).get_signature_runner(signature)._inputs
    rows = [{key: image[None]} for image in np.load(images)]
    found = made.calibrate({signature: rows})
made.quantize(found).export_model(target)
"""
_CONVERTER = """
import sys
import numpy as np
sys.path.insert(0, {root!r})
from dfq_tf.compat import tf
from dfq_tf.importing.files import read_model
model, images = read_model(sys.argv[1]), np.load(sys.argv[3])
converter = tf.lite.TFLiteConverter.from_keras_model(model)
if sys.argv[4] != "float":
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None]] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
open(sys.argv[2], "wb").write(converter.convert())
"""
_OURS = """
import sys
sys.path.insert(0, {root!r})
import dfq_tf
made = dfq_tf.quantize(sys.argv[1], method=sys.argv[3], show_progress=False,
                       widths=dfq_tf.settings.parse_widths(sys.argv[4]))
open(sys.argv[2], "wb").write(made.tflite)
"""


def run(python: str, code: str, *arguments: str) -> float:
    """Runs code in a process of its own; returns the processor seconds it took."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    code = code.replace("{root!r}", repr(root))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [python, "-c", code, *arguments],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def files(
    teacher: str, folder: pathlib.Path, aeq_python: str | None
) -> Iterator[tuple[str, pathlib.Path, float]]:
    """What each tool makes: its name, its file, processor seconds."""
    noise = str(folder / "noise.npy")
    for name, method, widths in (
        ("ours, DF-Q W8A8", "df_q", "W8A8"),
        ("ours, DF-Q W4A8", "df_q", "W4A8"),
    ):
        path = folder / f"{method}_{widths}.tflite"
        yield name, path, run(sys.executable, _OURS, teacher, str(path), method, widths)
    source = folder / "float.tflite"
    run(sys.executable, _CONVERTER, teacher, str(source), noise, "float")
    path = folder / "converter.tflite"
    seconds = run(sys.executable, _CONVERTER, teacher, str(path), noise, "int8")
    yield "TensorFlow's converter, int8, noise", path, seconds
    recipes = {
        "static_wi8_ai8": "AI Edge Quantizer, int8, noise",
        "dynamic_wi8_afp32": "AI Edge Quantizer, int8 weights, float activations",
        "dynamic_wi4_afp32": "AI Edge Quantizer, int4 weights, float activations",
    }
    for recipe, name in recipes.items() if aeq_python else ():
        path = folder / f"{recipe}.tflite"
        yield name, path, run(aeq_python, _AEQ, str(source), str(path), noise, recipe)


class File:
    """A TFLite file of any tool.

    Args:
      path: of the file.
      description: how pixels become the input of a file that does not take pixels.
    """

    def __init__(self, path: pathlib.Path, description: ModelDescription) -> None:
        self._description = description
        self._interpreter = Interpreter(str(path), num_threads=1)
        self._interpreter.allocate_tensors()
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The outputs, (n, classes), of uint8 images (n, height, width, channels)."""
        return np.stack([self._run(self._fed(image)) for image in images])

    def latency(self, image: np.ndarray, runs: int = 300) -> float:
        """The median of some runs, in milliseconds."""
        value, seconds = self._fed(image), []
        for _ in range(runs):
            began = time.perf_counter()
            self._run(value)
            seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds)

    @property
    def is_integer(self) -> bool:
        """Whether no tensor that an operator reads or gives is floating point."""
        details = self._interpreter.get_tensor_details()
        return all(detail["dtype"] != np.float32 for detail in details)

    def _fed(self, image: np.ndarray) -> np.ndarray:
        if self._input["dtype"] == np.uint8:  # ours takes pixels
            return image[None]
        value = self._description.normalize(image[None].astype(np.float32))
        scale, zero = self._input["quantization"]
        if scale:
            value = np.clip(np.round(value / scale + zero), -128, 127)
        return value.astype(self._input["dtype"])

    def _run(self, value: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input["index"], value)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output["index"])[0].copy()


def main() -> None:
    """Makes all files, and measures them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="teachers/wrn_16_1_cifar10.keras")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_dir")
    parser.add_argument("--aeq_python")
    parser.add_argument("--out", type=pathlib.Path, help="keeps the files")
    options = parser.parse_args()
    teacher = load_classifier(options.teacher)
    test = open_dataset(options.dataset, options.data_dir).load("test")
    folder = options.out or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0).integers(
        0, 256, (_NOISE_IMAGES, *teacher.image_shape)
    )
    noise = teacher.description.normalize(draws.astype(np.float32))
    np.save(folder / "noise.npy", np.asarray(noise, np.float32))
    print("| tool | accuracy | integers alone | size | latency | processor seconds |")
    print("|---|---|---|---|---|---|")
    exact = 100 * accuracy(teacher.scores(test.images), test.labels)
    print(f"| float | {exact:.2f} % | | | | |", flush=True)
    for name, path, seconds in files(options.teacher, folder, options.aeq_python):
        file = File(path, teacher.description)
        found = 100 * accuracy(file.scores(test.images), test.labels)
        print(
            f"| {name} | {found:.2f} % | {'yes' if file.is_integer else 'no'} | "
            f"{path.stat().st_size / 1000:.0f} kB | "
            f"{file.latency(test.images[0]):.2f} ms | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
