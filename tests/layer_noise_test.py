import csv
import dataclasses
import functools
import io
import math
import os
import warnings
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ExportError
from dfq_tf.graph import running
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import grids
from dfq_tf.quantization.bias_correction import with_corrected_biases
from dfq_tf.quantization.calibration import calibrate, with_ranges
from dfq_tf.quantization.choosing import as_stored
from dfq_tf.quantization.post_training import float_network
from dfq_tf.reports import layer_noise, plots
from dfq_tf.reports.layer_noise import LayerNoise
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig
from dfq_tf.tflite import writer
from dfq_tf.training.learner import Learner
from tests import helpers, networks

layers = keras.layers

ALL_4_BITS = BitWidths(num_bits_weight=4, num_bits_first=4, num_bits_last=4)


def chain(filters=(6, 6, 6), num_classes=4, seed=0, prefix=""):
    """Three conv-BN-ReLU blocks, pooling and a dense layer, all of them named."""
    image = x = layers.Input((8, 8, 3), name="image")
    for i, count in enumerate(filters, start=1):
        x = layers.Conv2D(
            count, 3, padding="same", use_bias=False, name=f"{prefix}conv{i}"
        )(x)
        x = layers.BatchNormalization(name=f"{prefix}bn{i}")(x)
        x = layers.ReLU(name=f"{prefix}relu{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(num_classes, name="logits")(x)
    model = helpers.randomise(keras.Model(image, x), seed)
    return Learner(model, helpers.description(num_classes))


def float_twin(learner):
    return float_network(as_classifier(learner))


@functools.cache
def network_of(learner, widths=BitWidths()):
    images = networks.images(learner.image_shape, 40, seed=1)
    # Nothing is chosen: least squares, and biases that are corrected in any case.
    config = CalibrationConfig(
        activation_range="mse", pooled_margin=1.0, logits_margin=1.0
    )
    network = float_twin(learner)
    ranges = calibrate(network, images, widths, config)
    corrected = with_corrected_biases(with_ranges(network, ranges, widths), images)
    return as_stored(corrected)


def file_of(learner, widths=BitWidths(), damaged=None, factor=1.0):
    """A file; the kernel range of one layer may be damaged."""
    network = network_of(learner, widths)
    if damaged is not None:
        ranges = dict(network.kernel_ranges)
        ranges[damaged] = np.float32(factor) * ranges[damaged]
        network = dataclasses.replace(network, kernel_ranges=ranges)
    return writer.write(network, FileConfig(favor="size"))


def measured(learner, content, images=None):
    """Noise of each layer, by its name."""
    if images is None:
        images = networks.images(learner.image_shape, 24, seed=2)
    noise = layer_noise.measure(float_twin(learner), content, images)
    return {layer.name: layer for layer in noise}


def stored(content, images, *names):
    """Tensors of a file by their names, as real numbers: float64 (n, ...)."""
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(
        model_content=content,
        experimental_op_resolver_type=resolver,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    details = {tensor["name"]: tensor for tensor in interpreter.get_tensor_details()}
    values = {name: [] for name in names}
    for image in images:
        index = interpreter.get_input_details()[0]["index"]
        interpreter.set_tensor(index, image[None])
        interpreter.invoke()
        for name in names:
            scale, zero_point = details[name]["quantization"]
            integers = interpreter.get_tensor(details[name]["index"])[0]
            values[name].append((integers.astype(np.float64) - zero_point) * scale)
    return [np.stack(values[name]) for name in names]


def decibels(exact, noisy):
    return 10 * np.log10(np.sum(exact**2) / np.sum((noisy - exact) ** 2))


def convolved(inputs, kernel):
    """A 3x3 convolution with padding 'same', in NumPy."""
    padded = np.pad(inputs, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


def float_layer(model, i, inputs):
    """Block i of a chain on some inputs, in float64."""
    (kernel,) = model.get_layer(f"conv{i}").get_weights()
    gamma, beta, mean, variance = (
        weight.astype(np.float64) for weight in model.get_layer(f"bn{i}").get_weights()
    )
    scale = gamma / np.sqrt(variance + model.get_layer(f"bn{i}").epsilon)
    outputs = convolved(inputs, kernel.astype(np.float64))
    return np.maximum((outputs - mean) * scale + beta, 0)


class MeasureTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.learner = chain()
        cls.images = networks.images((8, 8, 3), 24, seed=2)
        cls.content = file_of(cls.learner)
        cls.noise = measured(cls.learner, cls.content, cls.images)

    def test_lists_each_stored_output_in_order(self):
        self.assertEqual(
            [(layer.name, layer.kind, layer.weights) for layer in self.noise.values()],
            [
                ("pixels", "pixels", ""),
                ("relu1", "conv+relu", "int8"),
                ("relu2", "conv+relu", "int8"),
                ("relu3", "conv+relu", "int8"),
                ("pool", "global_average_pool", ""),
                ("logits", "dense", "int8"),
            ],
        )

    def test_is_the_same_of_as_few_images_at_a_time_as_memory_has_room_for(self):
        graph = float_twin(self.learner).graph
        sizes = [int(np.prod(node.shape)) for node in graph.nodes.values()]
        stored_outputs, seen = layer_noise._stored_outputs, []

        def spy(graph, content, images):
            seen.append(len(images))
            return stored_outputs(graph, content, images)

        with (
            mock.patch.object(running, "PASS_MEMORY", 10 * 3 * 4 * sum(sizes)),
            mock.patch.object(layer_noise, "_stored_outputs", spy),
        ):
            noise = measured(self.learner, self.content, self.images)
        self.assertEqual(seen, [10, 10, 4])
        self.assertEqual(noise.keys(), self.noise.keys())
        for name, layer in self.noise.items():
            self.assertEqual(noise[name].kind, layer.kind)
            self.assertAllClose(noise[name].own_db, layer.own_db, rtol=1e-4)
            self.assertAllClose(noise[name].total_db, layer.total_db, rtol=1e-4)

    def test_own_db_is_the_layer_alone_on_the_integers_before_it(self):
        names = ["pixels", "relu1", "relu2", "relu3"]
        tensors = stored(self.content, self.images, *names)
        for i in (1, 2, 3):
            exact = float_layer(self.learner.model, i, tensors[i - 1])
            self.assertAllClose(
                self.noise[f"relu{i}"].own_db, decibels(exact, tensors[i]), atol=0.02
            )

    def test_own_db_of_a_mean_and_of_the_logits(self):
        before, pool, logits = stored(
            self.content, self.images, "relu3", "pool", "logits"
        )
        exact = before.mean(axis=(1, 2))
        self.assertAllClose(self.noise["pool"].own_db, decibels(exact, pool), atol=0.02)
        kernel, bias = self.learner.model.get_layer("logits").get_weights()
        exact = pool @ kernel.astype(np.float64) + bias
        self.assertAllClose(
            self.noise["logits"].own_db,
            decibels(exact, logits),
            atol=0.02,
        )

    def test_total_db_compares_with_the_float_network(self):
        model = self.learner.model
        names = ["relu1", "relu2", "relu3", "pool"]
        observed = keras.Model(model.input, [model.get_layer(n).output for n in names])
        inputs = ((self.images - 120.0) / 64).astype(np.float32)
        tensors = stored(self.content, self.images, *names)
        for name, exact, noisy in zip(names, observed(inputs), tensors):
            self.assertAllClose(
                self.noise[name].total_db,
                decibels(exact.numpy().astype(np.float64), noisy),
                atol=0.02,
            )

    def test_pixels_that_are_stored_as_they_are_have_no_noise(self):
        with np.errstate(all="raise"):  # known, and not divided by 0
            noise = measured(self.learner, self.content, self.images)["pixels"]
        self.assertEqual((noise.own_db, noise.total_db), (math.inf, math.inf))

    def test_output_that_should_be_0_and_is_not_is_worst_of_all(self):
        dead = chain()
        *rest, mean, variance = dead.model.get_layer("bn2").get_weights()
        dead.model.get_layer("bn2").set_weights([*rest, mean + 1e3, variance])
        with np.errstate(all="raise"):
            noise = measured(dead, self.content, self.images)
        self.assertEqual(noise["relu2"].own_db, -math.inf)
        self.assertEqual(noise["relu2"].total_db, -math.inf)
        self.assertEqual(layer_noise.worst(list(noise.values())).name, "relu2")

    @parameterized.product(damaged=(1, 2, 3), factor=(8.0, 1 / 8))
    def test_layer_whose_range_is_damaged_is_named(self, damaged, factor):
        content = file_of(self.learner, BitWidths(), f"conv{damaged}", factor)
        noise = measured(self.learner, content, self.images)
        worst = layer_noise.worst(list(noise.values()))
        self.assertEqual(worst.name, f"relu{damaged}")
        self.assertLess(worst.own_db, self.noise[worst.name].own_db - 8)

    @parameterized.product(damaged=(1, 2), factor=(32.0, 1 / 8))
    def test_damage_is_seen_behind_it_in_total_and_nowhere_else(self, damaged, factor):
        content = file_of(self.learner, BitWidths(), f"conv{damaged}", factor)
        noise = measured(self.learner, content, self.images)
        names = list(noise)
        place = names.index(f"relu{damaged}")
        for name in names[:place]:
            self.assertEqual(noise[name], self.noise[name])
        for name in names[place:]:
            self.assertLess(noise[name].total_db, self.noise[name].total_db - 5)
        # They do what they did, though what they are fed is off.
        for name in names[place + 1 :]:
            self.assertAllClose(noise[name].own_db, self.noise[name].own_db, atol=8)
            self.assertGreater(noise[name].own_db, noise[name].total_db + 10)

    def test_more_bits_of_activations_make_less_noise(self):
        four, eight, sixteen = (
            measured(self.learner, file_of(self.learner, widths), self.images)
            for widths in (
                BitWidths(8, 4, num_bits_sum=4),
                BitWidths(),
                BitWidths(8, 16),
            )
        )
        for name in ("relu1", "relu2", "relu3", "pool"):
            for kind in ("own_db", "total_db"):
                values = [getattr(n[name], kind) for n in (four, eight, sixteen)]
                self.assertAllEqual(values, sorted(values), msg=f"{name} {kind}")
                self.assertGreater(values[1], values[0] + 10)
        self.assertGreater(sixteen["logits"].total_db, 42)
        # A mean has no weights: each bit is worth 6 dB.
        pool = [n["pool"].own_db for n in (four, eight, sixteen)]
        self.assertAllClose(np.diff(pool), [6.02 * 4, 6.02 * 8], atol=8)

    def test_more_bits_of_weights_make_less_noise(self):
        four = measured(self.learner, file_of(self.learner, ALL_4_BITS), self.images)
        for name in ("relu1", "relu2", "relu3", "logits"):
            self.assertGreater(self.noise[name].own_db, four[name].own_db + 10)

    @parameterized.parameters(3, 4, 5)
    def test_weights_are_what_the_file_stores_them_in(self, bits):
        widths = BitWidths(num_bits_weight=bits, num_bits_first=8, num_bits_last=4)
        noise = measured(self.learner, file_of(self.learner, widths), self.images[:2])
        inner = "int4" if bits <= 4 else "int8"
        self.assertEqual(
            [layer.weights for layer in noise.values()],
            ["", "int8", inner, inner, "", "int4"],
        )

    @parameterized.parameters(*networks.FEW)
    def test_no_layer_of_a_sound_file_is_far_off(self, name):
        self.check_sound(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_nor_is_one_of_the_others(self, name):
        self.check_sound(name)

    def check_sound(self, name):
        learner = networks.learner(name)
        images = networks.images(learner.image_shape, 16, seed=1)
        noise = measured(learner, file_of(learner), images)
        self.assertEqual(list(noise), grids.measured(float_twin(learner).graph))
        for layer in noise.values():
            self.assertGreater(layer.own_db, 30, msg=layer)
            self.assertGreater(layer.total_db, 15, msg=layer)
        self.assertEqual(
            sum(bool(layer.weights) for layer in noise.values()),
            sum("conv" in n.kind or "dense" in n.kind for n in noise.values()),
        )

    def test_sum_and_its_relu_are_one(self):
        learner = networks.learner("resnet_like")
        content = file_of(learner)
        images = networks.images(learner.image_shape, 8, seed=3)
        noise = measured(learner, content, images)
        sums = [la for la in learner.model.layers if isinstance(la, layers.Add)]
        graph = float_twin(learner).graph
        for add in sums:
            (relu,) = (node.outbound_layer for node in add.outbound_nodes)
            sources = graph.nodes[add.name].inputs
            first, second, output = stored(content, images, *sources, relu.name)
            self.assertEqual(noise[relu.name].kind, "add+relu")
            self.assertAllClose(
                noise[relu.name].own_db,
                decibels(np.maximum(first + second, 0), output),
                atol=0.02,
            )

    def test_file_of_another_teacher_is_refused(self):
        other = chain(prefix="other_")
        with self.assertRaisesRegex(
            ExportError,
            r"the file has no tensor for layer other_relu1 of shape \(8, 8, 6\); it "
            "was not made of this teacher",
        ):
            measured(other, self.content, self.images)

    @parameterized.parameters(5, 1, 7)
    def test_file_of_a_teacher_of_other_sizes_is_refused(self, count):
        other = chain(filters=(6, count, 6))
        with self.assertRaisesRegex(ExportError, "relu2.* not made of this teacher"):
            measured(other, self.content, self.images)

    @parameterized.parameters((8, 8, 1), (9, 8, 3))
    def test_images_of_another_shape_are_refused(self, *shape):
        images = np.zeros((2, *shape), np.uint8)
        with self.assertRaisesRegex(ExportError, "file takes images of .*these are"):
            measured(self.learner, self.content, images)

    def test_shapes_are_told_in_plain_numbers(self):
        images = np.zeros((2, 8, 8, 1), np.uint8)
        with self.assertRaisesRegex(ExportError, r"\(8, 8, 3\), but .* \(8, 8, 1\)$"):
            measured(self.learner, self.content, images)


def row(name, own_db, total_db=10.0, weights="int8"):
    return LayerNoise(name, "conv", weights, own_db, total_db)


class WorstTest(tf.test.TestCase):
    def test_is_the_lowest_own_db(self):
        noise = [row("a", 30.0, 1.0), row("b", 20.0, 9.0), row("c", math.inf, 0.5)]
        self.assertEqual(layer_noise.worst(noise).name, "b")

    def test_output_that_should_be_0_is_worst_of_all(self):
        noise = [row("a", -40.0), row("b", -math.inf), row("c", 5.0)]
        self.assertEqual(layer_noise.worst(noise).name, "b")


class CsvTest(tf.test.TestCase):
    def test_parses_back(self):
        noise = [
            row("pixels", math.inf, math.inf, weights=""),
            row('odd, "name"', 41.239, -3.5, weights="int4"),
            row("dead", -math.inf, 12.0),
        ]
        (header, *_), rows = (
            list(csv.reader(io.StringIO(layer_noise.as_csv(noise)))),
            list(csv.DictReader(io.StringIO(layer_noise.as_csv(noise)))),
        )
        self.assertEqual(header, ["name", "kind", "weights", "own_db", "total_db"])
        self.assertLen(rows, 3)
        for fields, layer in zip(rows, noise):
            own_db, total_db = float(fields["own_db"]), float(fields["total_db"])
            self.assertAllClose(
                [own_db, total_db], [layer.own_db, layer.total_db], atol=0.0051
            )
            parsed = LayerNoise(**{**fields, "own_db": own_db, "total_db": total_db})
            self.assertEqual(
                dataclasses.replace(parsed, own_db=0, total_db=0),
                dataclasses.replace(layer, own_db=0, total_db=0),
            )


RED, BLUE = (214, 39, 40), (31, 119, 180)


class ReportTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.get_temp_dir(), "noise")

    def _write(self, noise):
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            layer_noise.write_report(noise, self.path, "W8A8")

    def _picture(self):
        with open(f"{self.path}.png", "rb") as file:
            return tf.io.decode_png(file.read(), channels=3).numpy()

    def _places(self, color):
        """Rows and columns of the pixels of one colour."""
        return np.nonzero((self._picture() == color).all(axis=-1))

    def test_writes_a_table_and_a_picture_and_nothing_else(self):
        noise = [row("a", 30.0), row("b", 20.0)]
        self._write(noise)
        folder = os.path.dirname(self.path)
        self.assertCountEqual(os.listdir(folder), ["noise.csv", "noise.png"])
        with open(f"{self.path}.csv") as file:
            self.assertEqual(file.read(), layer_noise.as_csv(noise))
        self.assertGreater(self._picture().std(), 10)

    @parameterized.parameters(0, 1, 2, 3)
    def test_worst_layer_is_the_red_bar(self, worst):
        values = [30.0, 25.0, 40.0, 35.0]
        values[worst] = 10.0
        self._write([row(f"layer{i}", value) for i, value in enumerate(values)])
        red, columns = self._places(RED)
        blue, blue_columns = self._places(BLUE)
        top = min(red.min(), blue.min())
        bottom = max(red.max(), blue.max())
        self.assertEqual(4 * (red.mean() - top) // (bottom - top), worst)
        self.assertFalse(set(red) & set(blue))
        # All bars begin at the same place, and 10 dB are a quarter of 40.
        self.assertEqual(columns.min(), blue_columns.min())
        self.assertAllClose(
            np.ptp(columns) / np.ptp(blue_columns), 10 / max(values), atol=0.03
        )

    def test_layer_without_noise_has_a_bar_as_long_as_the_longest(self):
        self._write(
            [row("a", math.inf, math.inf), row("b", 20.0), row("c", 50.0, math.inf)]
        )
        rows, columns = self._places(BLUE)
        upper = rows < rows.mean()
        self.assertAllClose(columns[upper].max(), columns[~upper].max(), rtol=0, atol=1)

    @parameterized.parameters(
        ([math.inf], [math.inf]),
        ([math.inf, math.inf], [math.inf, math.inf]),
        ([math.inf, 20.0], [math.inf, -4.0]),
    )
    def test_infinite_noise_ratios_can_be_drawn(self, own, total):
        self._write([row(f"l{i}", *pair) for i, pair in enumerate(zip(own, total))])
        self.assertGreater(self._picture().std(), 5)

    def test_output_that_should_be_0_leaves_the_other_bars(self):
        self._write([row("a", -math.inf, 3.0), row("b", 20.0), row("c", 30.0, 9.0)])
        rows = np.unique(self._places(BLUE)[0])
        bars = np.split(rows, np.nonzero(np.diff(rows) > 1)[0] + 1)
        self.assertLen(bars, 2)
        self.assertAllClose(len(bars[0]), len(bars[1]), atol=1)
        # There is as much room for the first as for the others.
        self.assertGreater(bars[0][0], bars[1][0] - bars[0][0])

    def test_new_report_takes_the_place_of_an_old_one(self):
        self._write([row("a", 30.0)])
        before = self._picture()
        self._write([row("a", 30.0), row("b", 20.0)])
        self.assertNotEqual(self._picture().shape, before.shape)
        with open(f"{self.path}.csv") as file:
            self.assertLen(file.readlines(), 3)
        self.assertLen(os.listdir(os.path.dirname(self.path)), 2)

    def test_failing_picture_leaves_the_old_one(self):
        self._write([row("a", 30.0)])
        with open(f"{self.path}.png", "rb") as file:
            before = file.read()

        def fail(figure, path, **kwargs):
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError("no space left on device")

        pyplot = plots.pyplot()
        with mock.patch.object(pyplot.Figure, "savefig", fail):
            with self.assertRaisesRegex(OSError, "no space left"):
                self._write([row("a", 30.0), row("b", 20.0)])
        with open(f"{self.path}.png", "rb") as file:
            self.assertEqual(file.read(), before)
        self.assertLen(os.listdir(os.path.dirname(self.path)), 2)

    def test_without_matplotlib_there_is_a_table_and_no_picture(self):
        for has_pyplot, written in ((True, ("csv", "png")), (False, ("csv",))):
            path = str(helpers.new_folder() / "noise")
            with mock.patch.object(plots, "has_pyplot", return_value=has_pyplot):
                found = layer_noise.write_report([row("a", 30.0)], path, "W8A8")
            self.assertEqual(found, [f"{path}.{suffix}" for suffix in written])
            files = sorted(os.listdir(os.path.dirname(path)))
            self.assertEqual(files, [f"noise.{suffix}" for suffix in written])

    def test_no_figure_stays_open(self):
        pyplot = plots.pyplot()
        before = pyplot.get_fignums()
        self._write([row("a", 30.0)])
        self.assertEqual(pyplot.get_fignums(), before)


if __name__ == "__main__":
    tf.test.main()
