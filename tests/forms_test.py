"""All forms of a layer give the same integers; which is taken hangs on bytes and time.

CONV_2D with the same weights in int8 is what all others are held against: that one is
held against NumPy in tflite_writer_test.
"""

import dataclasses
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig
from dfq_tf.tflite import (
    check_target_takes,
    convert,
    forms,
    kernel_costs,
    running,
    writer,
)
from dfq_tf.tflite.forms import Form
from tests.graphs import Sketch, noise

SHAPE = (9, 8, 4)
CONFIG = FileConfig(file_output="logits", output_type="int8")
CALIBRATION = CalibrationConfig(
    activation_range="min_max",
    pooled_margin=1.0,
    logits_margin=1.0,
    bias_correction=False,
)
CONV8, CONV4 = Form("CONV_2D", 8), Form("CONV_2D", 4)
FULL8, FULL4, FULL2 = (Form("FULLY_CONNECTED", bits) for bits in (8, 4, 2))
ALL = [CONV8, CONV4, FULL8, FULL4, FULL2]


def quantized(sketch, bits=2, activation=8):
    """A network whose kernels all have so few bits."""
    network = float_network(sketch.classifier())
    shape = network.image_shape
    widths = BitWidths(bits, activation, True, bits, bits, bits)
    return post_training(network, noise(shape, 24), widths, CALIBRATION)


def one_convolution(shape=SHAPE, bits=2, activation=8, outputs=8, **settings):
    """A convolution, a ReLU that it takes in, and a dense layer."""
    sketch = Sketch(shape)
    sketch.conv("conv", outputs=outputs, **settings)
    sketch("relu", "relu", top=None)
    sketch.flatten("flat")
    sketch.dense("dense")
    return quantized(sketch, bits, activation)


def file_in(network, form):
    """The file with one form for its convolution."""
    chosen = {**forms.chosen(network, CONFIG), "conv": form}
    with mock.patch.object(forms, "chosen", return_value=chosen):
        return writer.write(network, CONFIG)


def answers(content, images, delegates=True, batch=1):
    """int8 logits, run so many images at a time."""
    interpreter = running.open_interpreter(content, delegates=delegates)
    (image,), (output,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.resize_tensor_input(image["index"], (batch, *images.shape[1:]))
    interpreter.allocate_tensors()
    found = []
    for i in range(0, len(images), batch):
        interpreter.set_tensor(image["index"], images[i : i + batch])
        interpreter.invoke()
        found.append(interpreter.get_tensor(output["index"]).astype(int))
    return np.concatenate(found)


WINDOWS = {
    "1x1": dict(size=1),
    "1x1 by 2": dict(size=1, strides=(2, 2)),
    "1x1 by 2 and 3": dict(size=1, strides=(2, 3)),
    "3x3": dict(size=3),
    "3x3 valid": dict(size=3, padding="valid"),
    "3x3 by 2": dict(size=3, strides=(2, 2)),
    "3x3 by 1 and 2": dict(size=3, strides=(1, 2)),
    "3x3 by 2 and 1": dict(size=3, strides=(2, 1), padding="valid"),
    "3x3 dilated": dict(size=3, dilation=(2, 1)),
    "2x2 by 3": dict(size=2, strides=(3, 3)),
    "6x6": dict(size=6),  # more than are put side by side at a time
    "7x7 by 2": dict(size=7, strides=(2, 2)),
}


class IntegersTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*WINDOWS)
    def test_all_forms_give_the_same(self, window):
        network = one_convolution(**WINDOWS[window])
        images = noise(SHAPE, 8, seed=1)
        expected = running.stored_tensors(file_in(network, CONV8), images)["relu"]
        self.assertGreater(len(np.unique(expected.integers)), 50)
        (source,) = network.graph.sources(network.graph.nodes["conv"])
        node = network.graph.nodes["conv"]
        self.assertEqual(forms.possible(network, node), ALL, source.shape)
        for form in (FULL8, FULL4, FULL2):
            content = file_in(network, form)
            found = running.stored_tensors(content, images)["relu"]
            self.assertAllEqual(found.integers, expected.integers)
            # XNNPACK has the whole file.
            self.assertEqual(running.TFLiteClassifier(content).num_pieces, 1)
            types = running.kernel_types(content)
            self.assertEqual(types["conv"], f"int{form.num_bits}")

    @parameterized.parameters("1x1", "3x3 by 2", "6x6")
    def test_without_xnnpack_too_and_in_any_batch(self, window):
        network = one_convolution(**WINDOWS[window])
        images = noise(SHAPE, 6, seed=1)
        exact = answers(file_in(network, CONV8), images)
        slow = answers(file_in(network, FULL8), images, delegates=False)
        self.assertLessEqual(np.abs(slow - exact).max(), 3)  # they round twice
        for form in (FULL4, FULL2):
            content = file_in(network, form)
            found = answers(content, images, delegates=False)
            self.assertAllEqual(found, slow)
            for delegates in (True, False):
                one = answers(content, images, delegates)
                three = answers(content, images, delegates, batch=3)
                self.assertAllEqual(three, one)

    @parameterized.parameters("speed", "size", "balanced")
    def test_whole_files_are_proven(self, favor):
        sketch = Sketch((8, 8, 3))
        sketch.conv("stem", outputs=8, strides=(2, 2))
        sketch("relu", "relu", top=6.0)
        sketch.depthwise("depthwise", padding="same")
        sketch.conv("point", outputs=16, size=1)
        sketch("leaky_relu", "leaky", slope=0.1)
        sketch.conv("last", outputs=12)
        sketch("global_average_pool", "pool", keepdims=False)
        sketch.dense("dense")
        network = quantized(sketch)
        config = dataclasses.replace(CONFIG, favor=favor)
        content = convert(network, noise((8, 8, 3), 8, seed=2), config)
        types = running.kernel_types(content)
        self.assertEqual(types["depthwise"], "int4" if favor == "size" else "int8")

    def test_kernels_of_the_file_are_those_of_the_network(self):
        network = one_convolution(size=3)
        content = file_in(network, FULL2)
        integers, _ = network.kernel_integers("conv")
        interpreter = running.open_interpreter(content, delegates=False)
        names = [t["name"] for t in interpreter.get_tensor_details()]
        model = running.schema.ModelT.InitFromObj(
            running.schema.Model.GetRootAs(content, 0)
        )
        tensor = model.subgraphs[0].tensors[names.index("conv/kernel")]
        data = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
        bits = np.unpackbits(data, bitorder="little").reshape(-1, 2).astype(int)
        values = (bits[:, 0] - 2 * bits[:, 1]).reshape(tensor.shape)
        # (outputs, columns, rows, inputs)
        expected = np.transpose(integers, (3, 1, 0, 2)).reshape(values.shape)
        self.assertAllEqual(values, expected)
        self.assertAllEqual(np.unique(values), [-1, 0, 1])


class PossibleTest(tf.test.TestCase, parameterized.TestCase):
    def assertPossible(self, expected, **settings):
        network = one_convolution(**settings)
        found = forms.possible(network, network.graph.nodes["conv"])
        self.assertEqual(found, expected)

    def test_as_few_bits_as_the_kernel_has(self):
        self.assertPossible([CONV8, FULL8], bits=5)
        self.assertPossible([CONV8, CONV4, FULL8, FULL4], bits=3)

    def test_weights_of_an_output_fill_bytes(self):
        # 27, and 18: XNNPACK leaves others to slower kernels.
        self.assertPossible([CONV8, CONV4, FULL8], shape=(8, 8, 3))
        self.assertPossible([CONV8, CONV4, FULL8, FULL4], shape=(8, 8, 2))

    def test_groups(self):
        self.assertPossible([CONV8, CONV4], groups=2)

    def test_rows_that_no_kernel_meets(self):
        window = dict(size=2, strides=(2, 2), padding="valid")
        self.assertPossible([CONV8, CONV4], shape=(9, 8, 4), **window)
        self.assertPossible(ALL, shape=(8, 8, 4), **window)


def costs_of(**milliseconds):
    """A table in which a form costs the same in all sizes."""
    times = {
        f"{form.name} {window}": np.full((1, 1, 1), time)
        for form, time in zip(ALL, milliseconds.values())
        for window in kernel_costs.WINDOWS
    }
    axes = dict.fromkeys(kernel_costs.AXES, (1,))
    return kernel_costs.KernelCosts("none", "none", axes, times)


TIMES = dict(conv8=1.0, conv4=3.0, full8=0.9, full4=1.29, full2=1.31)
LARGE = dict(shape=(4, 4, 32), outputs=64, size=3)


class ChosenTest(tf.test.TestCase, parameterized.TestCase):
    def chosen(self, favor, times=TIMES, **settings):
        network = one_convolution(**settings)
        table = costs_of(**times)
        with mock.patch.object(kernel_costs, "read", return_value=table):
            return forms.chosen(network, FileConfig(favor=favor))

    @parameterized.parameters(
        ("speed", 2, FULL8),
        ("size", 2, FULL2),
        ("size", 4, CONV4),  # the other takes more operators
        ("balanced", 2, FULL4),
        ("balanced", 4, FULL4),
        ("balanced", 5, CONV8),
        ("size", 8, CONV8),
        ("speed", 8, FULL8),
    )
    def test_by_bytes_and_time(self, favor, bits, form):
        self.assertEqual(self.chosen(favor, bits=bits, **LARGE)["conv"], form)

    def test_all_that_are_smaller_take_too_long(self):
        times = {**TIMES, "full4": 1.31}
        self.assertEqual(self.chosen("balanced", times, **LARGE)["conv"], CONV8)

    def test_small_kernels_are_not_worth_the_operators(self):
        found = self.chosen("balanced", shape=(8, 8, 4), outputs=8)
        self.assertEqual(found["conv"], CONV8)
        found = self.chosen("balanced", shape=(8, 8, 4), outputs=8, size=1)
        self.assertEqual(found["conv"], FULL4)

    def test_layers_of_an_odd_number_of_weights(self):
        found = self.chosen("size", bits=4, shape=(8, 8, 3))
        self.assertEqual(found["conv"], CONV4)
        self.assertEqual(self.chosen("balanced", shape=(8, 8, 3))["conv"], CONV8)

    def test_dense_layers_are_what_they_are_in_fewer_bits(self):
        fast = {**TIMES, "full2": 1.0}
        self.assertEqual(self.chosen("balanced", fast)["dense"], FULL2)
        self.assertEqual(self.chosen("balanced")["dense"], FULL8)  # 1.29 of 0.9

    def test_wide_activations_have_the_operators_of_the_layers(self):
        found = self.chosen("balanced", activation=16)
        self.assertEqual(found, {"conv": CONV4, "dense": FULL4})

    def test_so_have_other_targets(self):
        network = one_convolution(**LARGE)
        found = forms.chosen(network, FileConfig(target="micro"))
        # A dense layer is a convolution of one pixel there.
        self.assertEqual(found, {"conv": CONV4, "dense": CONV4})

    @parameterized.parameters(
        ("android", 8, True), ("android", 16, False), ("micro", 8, False)
    )
    def test_times_are_litert_s_beside_int8(self, target, activation, has_times):
        network = one_convolution(activation=activation)
        found = forms.layer_costs(network, FileConfig(target=target))
        times = {name: each.milliseconds is not None for name, each in found.items()}
        self.assertEqual(times, {"conv": has_times, "dense": has_times})

    @parameterized.parameters(1, 2)
    def test_bytes_are_those_of_files(self, stride):
        network = one_convolution((8, 8, 32), strides=(stride, stride), size=3)
        node = network.graph.nodes["conv"]
        sizes = [
            (len(file_in(network, form)), forms.num_bytes(node, form))
            for form in (CONV8, FULL8, FULL4, FULL2)
        ]
        (first, expected), *others = sizes
        for size, said in others:
            # The first such layer also brings the numbers that all others share.
            self.assertBetween(said - expected, size - first - 1100, size - first)


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(("favor", "speed"), ("favor", "size"))
    def test_other_targets(self, name, value):
        message = f"{name} is '{value}', and the target is micro: .* Leave {name} out"
        config = FileConfig(target="micro", **{name: value})
        with self.assertRaisesRegex(ConfigError, message):
            check_target_takes(config, BitWidths())

    def test_unknown_favor(self):
        with self.assertRaisesRegex(ConfigError, "favor is 'fast'; it must be one of"):
            FileConfig(favor="fast")

    def test_table_that_is_not_there(self):
        config = FileConfig(kernel_costs="/nowhere/costs.json")
        with self.assertRaisesRegex(ConfigError, "kernel_costs is '/nowhere/costs"):
            check_target_takes(config, BitWidths())


if __name__ == "__main__":
    tf.test.main()
