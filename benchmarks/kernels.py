"""Times LiteRT's kernels in each form that a file may have them, by size.

    python benchmarks/kernels.py --output=kernel_costs.json

Prints a table, and writes what --kernel_costs takes. The layers are those of the
project's writer, with the same integers in each form; what they answer is compared with
CONV_2D of int8. For another device, see docs/android.md: --files=FOLDER writes the
layers as files, and --times=FILE reads what LiteRT's benchmark tool says of them.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import re
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dfq_tf.errors import DfqError
from dfq_tf.files import write_text
from dfq_tf.graph import Graph, ModelDescription, Node, layers
from dfq_tf.quantization import Grid
from dfq_tf.tflite import kernel_costs, open_interpreter, operators
from dfq_tf.tflite.flatbuffer import File
from dfq_tf.tflite.forms import Form
from dfq_tf.tflite.kernel_costs import AXES, NAMES, WINDOWS

SIDES = (1, 4, 8, 16, 32)  # of the output
CHANNELS = (8, 32, 128, 512)  # of input and output
# In a round, a point is run so often, or so long if that is more often.
_LEAST_RUNS, _MOST_RUNS, _SECONDS = 3, 200, 0.02
_STEP = 0.02


class Point(NamedTuple):
    """One layer of the table."""

    window: str
    side: int
    inputs: int
    outputs: int

    def file_name(self, form: str) -> str:
        """Such as 'CONV_2D-int8-3x3-2-16-32-128.tflite'."""
        parts = [form.replace(" ", "-"), self.window.replace("/", "-"), *self[1:]]
        return "-".join(map(str, parts)) + ".tflite"


class Layer:
    """A network of one convolution of int8 activations, whose weights are -1, 0 and 1.

    So its integers fit all forms.
    """

    is_wide = False
    description = ModelDescription((0.0,), (1.0,), "logits", ())

    def __init__(self, point: Point) -> None:
        size, stride = WINDOWS[point.window]
        side = point.side * stride
        image = layers.image("image", (side, side, point.inputs))
        rng = np.random.default_rng(0)
        shape = (size, size, point.inputs, point.outputs)
        self._integers = rng.integers(-1, 2, shape).astype(np.int8)
        deviation = 50 / math.sqrt(self._integers.size / point.outputs)
        self._scale = rng.uniform(0.5, 1, point.outputs) * deviation / 128
        settings = {"padding": "same", "strides": (stride, stride)}
        weights = {
            "kernel": self._integers,
            "bias": rng.integers(-99, 99, point.outputs) * self.bias_scale("layer"),
        }
        self.node: Node = layers.node("conv", "layer", [image], settings, weights)
        self.graph = Graph([image, self.node], "layer")
        self.kernel_bits = {"layer": 2}

    def grid(self, name: str) -> Grid:
        """The same for image and output."""
        return Grid(np.array([_STEP], np.float32), -5, -128, 127)

    def kernel_integers(self, name: str) -> tuple[np.ndarray, Grid]:
        """The weights, and a scale for each output."""
        return self._integers, Grid(self._scale.astype(np.float32), 0, -1, 1)

    def bias_scale(self, name: str) -> np.ndarray:
        """Of each output."""
        return _STEP * self._scale.astype(np.float32).astype(np.float64)

    def content(self, name: str) -> bytes:
        """The layer as a file, in one of NAMES."""
        operator, kind = name.split()
        file = File()
        grid = self.grid("image")
        source, output = (
            file.tensor(each, (1, *shape), np.int8, grid)
            for each, shape in (
                ("image", self.graph.image.shape),
                ("layer", self.node.shape),
            )
        )
        form = Form(operator, int(kind.removeprefix("int")))
        operation = operators.Operation(
            file, self, self.node, [source], output, "NONE", form=form
        )
        operators.write(operation)
        return file.finish(source, output, "output", {})


def points() -> Iterator[Point]:
    """All layers of the table, a window after the other."""
    for each in itertools.product(WINDOWS, SIDES, CHANNELS, CHANNELS):
        yield Point(*each)


def timed(content: bytes, num_threads: int) -> tuple[float, np.ndarray]:
    """Milliseconds of a file, the least of some runs; and its answer to noise.

    Whatever else the machine does only adds to a run.
    """
    interpreter = open_interpreter(content, num_threads=num_threads)
    (image,), (output,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    pixels = np.random.default_rng(1).integers(-128, 128, image["shape"])
    interpreter.set_tensor(image["index"], pixels.astype(np.int8))
    interpreter.invoke()
    answer = interpreter.get_tensor(output["index"])
    seconds: list[float] = []
    while len(seconds) < _LEAST_RUNS or (
        sum(seconds) < _SECONDS and len(seconds) < _MOST_RUNS
    ):
        began = time.perf_counter()
        interpreter.invoke()
        seconds.append(time.perf_counter() - began)
    return 1000 * min(seconds), answer


class Table:
    """Times by threads, form and point: the least of all rounds."""

    def __init__(self) -> None:
        self._times: dict[tuple[int, str, Point], list[float]] = {}
        self.differences: dict[str, list[tuple[int, int]]] = {n: [] for n in NAMES}

    def add(self, threads: int, name: str, point: Point, milliseconds: float) -> None:
        """One time of a point."""
        self._times.setdefault((threads, name, point), []).append(milliseconds)

    def of(self, threads: int, name: str, point: Point) -> float:
        """Milliseconds of a point."""
        return min(self._times[threads, name, point])

    def measure(self, point: Point, threads: int) -> None:
        """One round of all forms of a point, in turn."""
        layer, exact = Layer(point), None
        for name in NAMES:
            milliseconds, answer = timed(layer.content(name), threads)
            self.add(threads, name, point, milliseconds)
            exact = answer.astype(int) if exact is None else exact
            steps = np.abs(answer - exact)
            self.differences[name].append((int(steps.max()), int((steps > 0).sum())))

    def written(self, processor: str, runtime: str) -> str:
        """The table as `kernel_costs.read` takes it."""
        sizes = ([side**2 for side in SIDES], CHANNELS, CHANNELS)
        threads = sorted({key[0] for key in self._times})
        said = {
            "format": kernel_costs.FORMAT,
            "version": kernel_costs.VERSION,
            "processor": processor,
            "runtime": runtime,
            "date": str(datetime.date.today()),
            "axes": dict(zip(AXES, map(list, sizes))),
            "milliseconds": {str(n): self._nested(n) for n in threads},
        }
        return json.dumps(said, indent=1).replace("\n     ", " ") + "\n"

    def _nested(self, threads: int) -> dict[str, list]:
        return {
            f"{name} {window}": [
                [
                    [
                        self._rounded(threads, name, Point(window, side, i, o))
                        for o in CHANNELS
                    ]
                    for i in CHANNELS
                ]
                for side in SIDES
            ]
            for name in NAMES
            for window in WINDOWS
        }

    def _rounded(self, threads: int, name: str, point: Point) -> float:
        return float(f"{self.of(threads, name, point):.3g}")

    def compared(self) -> str:
        """How far the answers of each form are from those of the first."""
        lines = []
        for name, found in self.differences.items():
            most = max((steps for steps, _ in found), default=0)
            count = sum(count for _, count in found)
            lines.append(
                f"{name}: at most {most} steps from {NAMES[0]}, in {count} outputs of "
                f"{len(found)} runs"
            )
        return "\n".join(lines)

    def printed(self, threads: int) -> str:
        """For readers: a line for each point."""
        title = f"{'window':8}{'side':>5}{'in':>5}{'out':>5}"
        lines = [title + "".join(f"{name:>22}" for name in NAMES)]
        for point in points():
            start = f"{point.window:8}" + "".join(f"{n:>5}" for n in point[1:])
            times = [self.of(threads, name, point) for name in NAMES]
            lines.append(start + "".join(f"{each:>22.4f}" for each in times))
        return "\n".join(lines)


def measured(rounds: int, all_threads: list[int]) -> Table:
    """All points on this machine."""
    table = Table()
    for i, threads in itertools.product(range(rounds), all_threads):
        began = time.monotonic()
        for point in points():
            table.measure(point, threads)
        seconds = time.monotonic() - began
        print(f"round {i + 1}, {threads} threads: {seconds:.0f} s", file=sys.stderr)
    return table


def write_files(folder: pathlib.Path) -> None:
    """A file for each point and form."""
    folder.mkdir(parents=True, exist_ok=True)
    for point in points():
        layer = Layer(point)
        for name in NAMES:
            (folder / point.file_name(name)).write_bytes(layer.content(name))


def read_times(path: pathlib.Path) -> Table:
    """What LiteRT's benchmark tool said: names of files, and a time behind each.

    Raises:
      DfqError: a file of the table is not there.
    """
    text, table = path.read_text(encoding="utf-8", errors="replace"), Table()
    found: dict[str, float] = {}
    pattern = r"([\w-]+\.tflite)(?:(?!\.tflite).)*?Inference \(avg\): ([0-9.e+]+)"
    for name, microseconds in re.findall(pattern, text, re.DOTALL):
        found[name] = min(float(microseconds), found.get(name, math.inf))
    for point, name in itertools.product(points(), NAMES):
        file = point.file_name(name)
        if file not in found:
            raise DfqError(f"{path} has no time of {file}; run all files of --files")
        table.add(1, name, point, found[file] / 1000)
    return table


def processor() -> str:
    """Its name, and what it has for products of int8."""
    text, name = "", platform.machine()
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        text = path.read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = found[1] if found else name
    known = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
    words = set(text.split())
    return f"{name} ({', '.join(flag for flag in known if flag in words)})"


def main() -> None:
    """Measures, or writes files, or reads times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file")
    parser.add_argument("--rounds", type=int, default=3, help="the least time counts")
    parser.add_argument("--threads", default="1,4", help="numbers of threads")
    parser.add_argument("--files", type=pathlib.Path, help="write the layers there")
    parser.add_argument("--times", type=pathlib.Path, help="read times from there")
    parser.add_argument("--processor", default=processor(), help="its name")
    arguments = parser.parse_args()
    if arguments.files:
        write_files(arguments.files)
        return
    runtime = f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
    if arguments.times:
        table, threads = read_times(arguments.times), [1]
        runtime = "LiteRT's benchmark_model"
    else:
        threads = sorted({1, *map(int, arguments.threads.split(","))})
        table = measured(arguments.rounds, threads)
    for each in threads:
        print(f"\n{arguments.processor}, {runtime}, {each} threads, milliseconds\n")
        print(table.printed(each))
    print(f"\n{table.compared()}")
    if arguments.output:
        write_text(arguments.output, table.written(arguments.processor, runtime))


if __name__ == "__main__":
    main()
