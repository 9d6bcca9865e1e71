import json
import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from dfq_tf.errors import ConfigError, DfqError
from dfq_tf.tflite import kernel_costs, open_interpreter

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

AXES = {"positions": [4, 16, 64], "inputs": [8, 32], "outputs": [8, 32]}


def table(**changes):
    """What a file says: times go with the work, times a factor of the form."""
    positions, inputs, outputs = map(np.array, AXES.values())
    work = positions[:, None, None] * inputs[:, None] * outputs / 1000
    times = {
        f"{name} {window}": (work * (1 + i) * size**2 / stride).tolist()
        for i, name in enumerate(kernel_costs.NAMES)
        for window, (size, stride) in kernel_costs.WINDOWS.items()
    }
    return {
        "format": kernel_costs.FORMAT,
        "version": kernel_costs.VERSION,
        "processor": "a processor",
        "runtime": "a runtime",
        "axes": AXES,
        "milliseconds": {"1": times},
        **changes,
    }


class Folder(parameterized.TestCase):
    """Has a folder of its own."""

    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def path_of(self, said):
        path = self.folder / "table.json"
        path.write_text(said if isinstance(said, str) else json.dumps(said))
        return str(path)


class TableTest(Folder):
    def ms(self, *layer, name="CONV_2D int8", size=(1, 1), strides=(1, 1)):
        costs = kernel_costs.read(self.path_of(table()))
        return costs.of(name, size, strides, *layer)

    @parameterized.parameters(
        (4, 8, 8),  # as it stands there
        (64, 32, 32),
        (30, 19, 11),  # between
        (1, 3, 5),  # below
        (10_000, 1000, 300),  # above
        (1, 32, 1000),
    )
    def test_time_goes_with_the_work(self, *layer):
        self.assertAlmostEqual(self.ms(*layer) / (np.prod(layer) / 1000), 1, delta=1e-6)

    def test_each_form_has_its_own(self):
        int2 = self.ms(4, 8, 8, name="FULLY_CONNECTED int2")
        self.assertAlmostEqual(int2 / self.ms(4, 8, 8), 5, delta=1e-6)

    @parameterized.parameters(
        ((3, 3), (1, 1), 9.0),
        ((3, 3), (2, 2), 4.5),
        ((1, 1), (2, 2), 0.5),
        ((1, 1), (1, 4), 0.5),
        ((5, 5), (1, 1), 25.0),  # as the 3x3 kernel of as many weights
        ((1, 7), (1, 1), 7.0),
    )
    def test_windows(self, size, strides, factor):
        found = self.ms(16, 16, 16, size=size, strides=strides)
        self.assertAlmostEqual(found / self.ms(16, 16, 16), factor, delta=1e-6)

    def test_says_where_it_was_made(self):
        costs = kernel_costs.read(self.path_of(table()))
        self.assertEqual((costs.processor, costs.runtime), ("a processor", "a runtime"))

    def test_the_projects_own(self):
        costs = kernel_costs.read()
        self.assertNotEmpty(costs.processor)
        self.assertStartsWith(costs.runtime, "ai-edge-litert")
        layer = (1, 1), (1, 1), 28 * 28, 128, 128
        # XNNPACK has no int4 convolution; see docs/bits.md.
        slow, fast = (
            costs.of(f"{operator} int4", *layer)
            for operator in ("CONV_2D", "FULLY_CONNECTED")
        )
        self.assertGreater(slow, 1.5 * fast)

    def test_no_file(self):
        with self.assertRaisesRegex(ConfigError, "kernel_costs is '/no/file', which"):
            kernel_costs.read("/no/file")

    def test_other_version(self):
        path = self.path_of(table(version=7))
        message = "a table of version 7; this release reads version 1: make it again"
        with self.assertRaisesRegex(ConfigError, message):
            kernel_costs.read(path)

    @parameterized.parameters(
        ("no json", "it is no JSON"),
        ("[1]", "its 'format' is not"),
        (table(format="other"), "its 'format' is not"),
        (table(axes={"positions": [1]}), "it lacks 'inputs'"),
        (table(axes={**AXES, "inputs": [32, 8]}), r"inputs are \[32, 8\], not rising"),
        (table(axes={**AXES, "inputs": []}), r"inputs are \[\], not rising"),
        (table(axes=3), "not subscriptable"),
        (table(milliseconds={}), "it lacks '1'"),
        (table(milliseconds={"1": {}}), "it lacks 'CONV_2D int8 1x1/1'"),
        (table(axes={**AXES, "outputs": [8, 9, 10]}), r"must have \(3, 2, 3\) times"),
    )
    def test_what_is_no_table(self, said, message):
        with self.assertRaisesRegex(ConfigError, f"{message}.* Please make it again"):
            kernel_costs.read(self.path_of(said))

    @parameterized.parameters(0.0, -1.0, float("inf"), float("nan"), "soon", None)
    def test_what_is_no_time(self, time):
        said = table()
        said["milliseconds"]["1"]["CONV_2D int4 3x3/2"][0][0][0] = time
        with self.assertRaisesRegex(ConfigError, "no table of kernel costs"):
            kernel_costs.read(self.path_of(said))


class BenchmarkTest(Folder):
    """Of benchmarks/kernels.py."""

    def setUp(self):
        super().setUp()
        import kernels

        self.kernels = kernels
        changes = dict(SIDES=(1, 2), CHANNELS=(4, 8), _SECONDS=0.0)
        self.enter_context(mock.patch.multiple(kernels, **changes))

    def test_makes_a_table(self):
        found = self.kernels.measured(1, [1])
        costs = kernel_costs.read(self.path_of(found.written("this", "that")))
        self.assertEqual(costs.processor, "this")
        self.assertEqual(costs.axes["positions"], (1, 4))
        point = self.kernels.Point("3x3/2", 2, 4, 8)
        expected = found.of(1, "FULLY_CONNECTED int2", point)
        layer = (3, 3), (2, 2), 4, 4, 8
        ms = costs.of("FULLY_CONNECTED int2", *layer)
        self.assertAlmostEqual(ms / expected, 1, delta=0.01)
        # All but int4 convolutions are exact.
        lines = found.compared().splitlines()
        exact = [line for line in lines if "at most 0 steps" in line]
        self.assertLen(lines, len(kernel_costs.NAMES))
        self.assertContainsSubset({li for li in lines if "int4" not in li[:12]}, exact)

    def test_reads_times_of_another_device(self):
        names = [
            point.file_name(name)
            for point in self.kernels.points()
            for name in kernel_costs.NAMES
        ]
        said = (
            f"file {name}\nINFO: Graph: [../{name}]\nINFO: [x.cc] Inference timings "
            "in us: Init: 5, First "
            f"inference: 9, Warmup (avg): 7.5, Inference (avg): {1000 + i}\n"
            for i, name in enumerate(names)
        )
        path = pathlib.Path(self.path_of("".join(said)))
        found = self.kernels.read_times(path)
        point = self.kernels.Point("1x1/1", 1, 4, 4)
        self.assertAlmostEqual(found.of(1, "CONV_2D int8", point), 1.0)
        self.assertAlmostEqual(found.of(1, "CONV_2D int4", point), 1.001)
        last = self.kernels.Point("3x3/2", 2, 8, 8)
        expected = (999 + len(names)) / 1000
        self.assertAlmostEqual(found.of(1, "FULLY_CONNECTED int2", last), expected)
        path.write_text(f"file {names[0]}\nInference (avg): 12")
        with self.assertRaisesRegex(DfqError, "has no time of CONV_2D-int4-1x1-1-1-4"):
            self.kernels.read_times(path)

    def test_writes_files_that_run(self):
        folder = self.folder / "files"
        self.kernels.write_files(folder)
        self.assertLen(list(folder.iterdir()), 4 * 2 * 2 * 2 * 5)
        point = self.kernels.Point("3x3/1", 2, 8, 4)
        for name in kernel_costs.NAMES:
            content = (folder / point.file_name(name)).read_bytes()
            (output,) = open_interpreter(content).get_output_details()
            self.assertEqual(output["shape"].tolist(), [1, 2, 2, 4])


if __name__ == "__main__":
    absltest.main()
