import dataclasses
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ModelError, TrainingError, UnsupportedLayerError
from dfq_tf.graph import layers
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.layers import by_output, has_kernel
from dfq_tf.graph.nodes import Graph
from dfq_tf.quantization import choosing, grids, post_training
from dfq_tf.quantization.bias_correction import with_corrected_biases
from dfq_tf.quantization.calibration import calibrate, with_ranges
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import graphs, helpers, networks
from tests.graphs import PIXELS, Sketch

NORMALISATIONS = {
    "integer": ((120.0,), (1 / 64,)),
    "fraction": ((125.3,), (1 / 50,)),
    "channels": ((123.7, 116.3, 103.5), (0.017, 0.0175, 0.02)),
}


def conv_dense(**settings):
    """Convolution with BN and ReLU, flatten, dense: as a user's classifier."""
    sketch = Sketch(pixels=False)
    sketch.conv("conv", outputs=6, bias=False)
    sketch.normalization("bn")
    sketch("relu", "relu")
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.classifier(**settings)


RANGES = {"pixels": PIXELS, "relu": (0.0, 2.0), "logits": (-3.0, 4.0)}


def folded(classifier):
    """Kernel and bias of `conv` with `bn` in them, float64."""
    weights = classifier.graph.nodes["bn"].weights
    gamma, beta, mean, variance = (
        weights[role].astype(np.float64)
        for role in ("gamma", "beta", "mean", "variance")
    )
    scale = gamma / np.sqrt(variance + 1e-3)
    kernel = classifier.graph.nodes["conv"].weights["kernel"]
    return kernel * scale, beta - mean * scale


def depthwise(multiplier):
    """A network with a depthwise kernel of channels of all sizes, and that kernel."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, multiplier))
    kernel *= np.geomspace(0.01, 1, 3 * multiplier).reshape(3, multiplier)
    sketch = Sketch()
    bias = np.zeros(3 * multiplier)
    sketch("depthwise_conv", "depth", weights={"kernel": kernel, "bias": bias})
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.classifier(), kernel


def symmetric(kernel, num_bits, per_channel):
    """Quantizes and dequantizes a kernel by its largest magnitude, float64."""
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.abs(kernel).max(axis=axes) / (2 ** (num_bits - 1) - 1)
    return np.round(kernel / scale) * scale


def all_bits(num_bits, activation=8, per_channel=True):
    """Widths that are the same for all kernels, the first and last ones too."""
    return BitWidths(num_bits, activation, per_channel, num_bits, num_bits, num_bits)


def kernel_of(network, name):
    """The kernel that a node computes with, float64."""
    integers, grid = network.kernel_integers(name)
    matrix = by_output(network.graph.nodes[name], integers) * grid.scale
    return matrix.reshape(integers.shape).astype(np.float64)


def least_squared_errors(kernel, num_bits):
    """Of each output, over ranges in fine steps: (outputs,), float64."""
    values = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
    most = 2 ** (num_bits - 1) - 1
    errors = []
    for share in np.linspace(0.05, 1, 400):
        scale = share * np.abs(values).max(axis=0) / most
        rounded = scale * np.clip(np.round(values / scale), -most, most)
        errors.append(np.square(values - rounded).sum(axis=0))
    return np.min(errors, axis=0)


def ones(graph):
    """Any range for each measured output."""
    return dict.fromkeys(grids.measured(graph), (-1.0, 1.0))


class FloatNetworkTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        *((name, "fraction") for name in networks.NETWORKS),
        ("resnet_like", "integer"),
        ("resnet_like", "channels"),
    )
    def test_equals_the_teacher_on_raw_pixels(self, name, normalisation):
        self.check_float(name, normalisation)

    @parameterized.product(
        name=list(networks.NETWORKS), normalisation=("integer", "channels")
    )
    @pytest.mark.long
    def test_so_it_does_however_they_are_normalised(self, name, normalisation):
        self.check_float(name, normalisation)

    def check_float(self, name, normalisation):
        mean, scale = NORMALISATIONS[normalisation]
        if normalisation == "channels" and name == "padded_pooling":
            self.skipTest("the network has one channel")
        teacher = networks.build(name, mean=mean, scale=scale)
        images = networks.images(teacher.image_shape, 20)
        expected = teacher.scores(images)
        network = post_training.float_network(teacher)
        logits = network.scores(images)
        if teacher.description.output == "softmax":
            exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
            logits = exponentials / exponentials.sum(axis=-1, keepdims=True)
        self.assertEqual(network.description.output, "logits")
        self.assertAllClose(logits, expected, rtol=1e-4, atol=1e-4)
        kinds = {node.kind for node in network.graph.nodes.values()}
        gone = {"batch_normalization", "affine", "channels", "softmax", "unknown"}
        self.assertNoCommonElements(kinds, gone)
        second = list(network.graph.nodes.values())[1]
        self.assertEqual((second.kind, second.name), ("pixels", "pixels"))
        self.assertIs(grids.separated(network.graph), network.graph)

    @parameterized.parameters(*networks.FEW)
    def test_balanced_it_is_still_the_same_function(self, name):
        self.check_balanced(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_are_the_others(self, name):
        self.check_balanced(name)

    def check_balanced(self, name):
        teacher = networks.build(name)
        plain, balanced = (
            post_training.float_network(teacher, CalibrationConfig(equalize=equalize))
            for equalize in (False, True)
        )
        images = networks.images(teacher.image_shape, 10)
        self.assertAllClose(
            balanced.scores(images), plain.scores(images), rtol=1e-3, atol=1e-4
        )
        self.assertEqual(list(balanced.graph.nodes), list(plain.graph.nodes))
        changed = [
            name
            for name, node in plain.graph.nodes.items()
            if has_kernel(node)
            and not np.allclose(
                balanced.graph.nodes[name].weights["kernel"], node.weights["kernel"]
            )
        ]
        self.assertNotEmpty(changed)

    @parameterized.parameters(
        ((120.0,), (1 / 64,), True),
        ((0.0, 0.0, 0.0), (1.0,), True),
        ((255.0,), (0.1, 0.1, 0.1), True),
        ((120.5,), (1 / 64,), False),
        ((-1.0,), (1 / 64,), False),
        ((256.0,), (1 / 64,), False),
        ((120.0, 120.0, 110.0), (1 / 64,), False),
        ((120.0,), (0.1, 0.2, 0.3), False),
    )
    def test_a_zero_point_needs_no_layer(self, mean, scale, is_zero_point):
        teacher = conv_dense(mean=mean, scale=scale)
        network = post_training.float_network(teacher)
        graph, fed = network.graph, network.description
        self.assertEqual(grids.measured(graph)[0], "pixels")
        settings = graph.nodes["pixels"].settings
        if is_zero_point:
            self.assertNotIn("normalize", graph.nodes)
            self.assertEqual(fed, teacher.description)
            low, high = -mean[0] * scale[0], (255 - mean[0]) * scale[0]
            self.assertAllClose(settings["low"], low)
            self.assertAllClose(settings["high"], high)
        else:
            self.assertEqual((fed.input_mean, fed.input_scale), ((0.0,), (1.0,)))
            self.assertEqual((settings["low"], settings["high"]), (0.0, 255.0))
            node = graph.nodes["normalize"]
            self.assertEqual((node.kind, node.inputs), ("depthwise_conv", ("pixels",)))
            self.assertEqual(graph.nodes["conv"].inputs, ("normalize",))
            self.assertEqual(node.weights["kernel"].shape, (1, 1, 3, 1))
            self.assertAllClose(
                node.weights["kernel"].ravel(), np.broadcast_to(scale, 3)
            )
            self.assertAllClose(
                node.weights["bias"], -np.multiply(mean, scale) * np.ones(3)
            )
        images = graphs.noise((8, 8, 3), 10)
        self.assertAllClose(
            network.scores(images), teacher.scores(images), rtol=1e-4, atol=1e-4
        )

    def test_names_that_are_taken_are_left(self):
        sketch = Sketch(pixels=False)
        sketch.conv("pixels")
        sketch("relu", "normalize")
        sketch.flatten("flat")
        sketch.dense("logits")
        network = post_training.float_network(sketch.classifier(mean=(0.5,)))
        self.assertEqual(
            list(network.graph.nodes)[1:5],
            ["pixels_2", "normalize_2", "pixels", "normalize"],
        )

    def test_all_that_read_the_image_read_its_pixels(self):
        sketch = Sketch(pixels=False)
        a = sketch.conv("a", "image", outputs=3)
        sketch("add", "sum", a, "image")
        sketch("concatenate", "both", "sum", "image")
        sketch("global_average_pool", "mean")
        sketch.dense("logits")
        teacher = sketch.classifier()
        network = post_training.float_network(teacher)
        self.assertEqual([n.name for n in network.graph.consumers("image")], ["pixels"])
        self.assertEqual(network.graph.nodes["sum"].inputs, ("a", "pixels"))
        self.assertEqual(
            network.graph.nodes["both"].inputs, ("sum", "pixels_requantized")
        )
        images = graphs.noise((8, 8, 3), 5)
        self.assertAllClose(network.scores(images), teacher.scores(images), 1e-4)

    def test_a_curve_and_others_share_no_grid(self):
        sketch = Sketch(pixels=False)
        a = sketch("sigmoid", "sigmoid", sketch.conv("a", "image"))
        sketch("concatenate", "both", a, sketch.conv("b", "image"))
        sketch.flatten("flat")
        sketch.dense("logits")
        graph = post_training.float_network(sketch.classifier()).graph
        self.assertEqual(graph.nodes["both"].inputs, ("sigmoid_requantized", "b"))

    def test_leaves_the_teacher_as_it_was(self):
        teacher = conv_dense(mean=(1.5,))
        nodes = dict(teacher.graph.nodes)
        weights = [w for node in nodes.values() for w in node.weights.values()]
        before = helpers.copies(weights)
        post_training.float_network(teacher, CalibrationConfig(equalize=True))
        self.assertTrue(helpers.all_equal(weights, before))
        self.assertEqual(teacher.description.input_mean, (1.5,))
        for name, node in nodes.items():
            self.assertIs(teacher.graph.nodes[name], node)

    def test_knows_the_user_s_layers(self):
        graph = post_training.float_network(conv_dense()).graph
        self.assertEqual(graph.nodes["conv"].layers, ("my conv", "my bn"))
        self.assertEqual(graph.nodes["logits"].layers, ("my logits",))


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    def test_all_layers_without_an_integer_form_are_named(self):
        image = layers.image("image", (8, 8, 3))
        odd = layers.unknown("odd", [image], (8, 8, 3), "ELU", "it is unheard of")
        conv = layers.node(
            "conv", "conv", [odd], weights={"kernel": np.full((1, 1, 3, 3), np.nan)}
        )
        softmax = layers.node("softmax", "middle", [conv], layers=("my softmax",))
        rows = layers.node("reshape", "rows", [softmax], {"shape": (8, 24)})
        kernel = {"kernel": np.ones((24, 2))}
        dense = layers.node("dense", "rare", [rows], weights=kernel, layers=("rare",))
        affine = layers.node(
            "affine", "scaled", [dense], {"scale": 2.0, "offset": 1.0}, layers=("fold",)
        )
        flat = layers.node("reshape", "flat", [affine], {"shape": (-1,)})
        last = layers.node(
            "dense", "last", [flat], weights={"kernel": np.ones((16, 2))}
        )
        nodes = [image, odd, conv, softmax, rows, dense, affine, flat, last]
        teacher = Classifier(Graph(nodes, "last"), graphs.description(2))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"^layer odd \(ELU\) cannot be quantized: it is unheard of; "
            r"layer conv \(conv\) cannot be quantized: it has NaN or infinite weights; "
            "the model was damaged, or its training diverged; "
            r"layer my softmax \(softmax\) cannot be .*; "
            r"layer rare \(dense\) cannot be quantized: .* put a Flatten before it.*"
            "What can be: Conv2D, DepthwiseConv2D, .*Concatenate",
        ) as caught:
            post_training.float_network(teacher)
        problems = [(p.name, p.kind) for p in caught.exception.problems]
        self.assertEqual(
            problems,
            [
                ("odd", "ELU"),
                ("conv", "conv"),
                ("my softmax", "softmax"),
                ("rare", "dense"),
            ],
        )

    @parameterized.parameters("kernel", "bias", "gamma", "variance")
    def test_weights_that_are_not_finite_are_named(self, role):
        for value in (np.nan, np.inf):
            sketch = Sketch(pixels=False)
            sketch.conv("conv")
            sketch.normalization("bn")
            sketch.flatten("flat")
            sketch.dense("logits")
            name = "conv" if role in ("kernel", "bias") else "bn"
            node = sketch.nodes[name]
            weight = np.array(node.weights[role])
            weight.flat[0] = value
            sketch.nodes[name] = node.with_weights(**{role: weight})
            if (role, value) == ("variance", np.inf):
                continue  # its channel is 0, and so is all that comes of it
            with self.assertRaisesRegex(
                UnsupportedLayerError, "^layer my conv .*has NaN or infinite weights"
            ):
                post_training.float_network(sketch.classifier())

    def test_a_head_that_is_not_there(self):
        with self.assertRaisesRegex(
            ModelError,
            r"the description says that the model gives softmax, but its last layer "
            r"my logits \(dense\) has no softmax",
        ):
            post_training.float_network(conv_dense(output="softmax"))


class PixelRangeTest(tf.test.TestCase):
    def test_is_what_black_and_white_become(self):
        self.assertEqual(post_training.pixel_range(graphs.description(5)), PIXELS)
        raw = graphs.description(5, mean=(0.0,), scale=(1.0,))
        self.assertEqual(post_training.pixel_range(raw), (0.0, 255.0))


class WithRangesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(num_bits=(2, 4, 8), per_channel=(False, True))
    def test_kernel_equals_numpy(self, num_bits, per_channel):
        teacher = conv_dense()
        network = with_ranges(
            post_training.float_network(teacher),
            RANGES,
            all_bits(num_bits, per_channel=per_channel),
            "min_max",
        )
        kernel, bias = folded(teacher)
        self.assertAllClose(
            kernel_of(network, "conv"),
            symmetric(kernel, num_bits, per_channel),
            atol=1e-5,
        )
        self.assertAllClose(network.graph.nodes["conv"].weights["bias"], bias, 0, 1e-5)
        self.assertEqual(network.kernel_ranges["conv"].ndim, int(per_channel))

    @parameterized.parameters(1, 2)
    def test_depthwise_kernel_has_a_range_per_output(self, multiplier):
        classifier, kernel = depthwise(multiplier)
        network = with_ranges(
            classifier, ones(classifier.graph), BitWidths(), "min_max"
        )
        self.assertEqual(network.kernel_ranges["depth"].shape, (3 * multiplier,))
        scale = np.abs(kernel).max(axis=(0, 1)) / 127
        expected = np.round(kernel / scale) * scale
        self.assertAllClose(
            kernel_of(network, "depth") / scale, expected / scale, atol=1e-3
        )

    @parameterized.parameters(2, 3, 4)
    def test_weight_ranges_have_the_least_squared_error(self, num_bits):
        teacher = conv_dense()
        kernel, _ = folded(teacher)
        network = with_ranges(
            post_training.float_network(teacher), RANGES, all_bits(num_bits), "mse"
        )
        errors = np.square(kernel_of(network, "conv") - kernel).sum(axis=(0, 1, 2))
        least = least_squared_errors(kernel, num_bits)
        self.assertAllInRange(errors / least, 0.95, 1.05)
        extremes = np.square(symmetric(kernel, num_bits, True) - kernel)
        self.assertGreater(np.max(extremes.sum(axis=(0, 1, 2)) / least), 1.1)

    @parameterized.parameters(1, 2)
    def test_least_squared_error_of_a_depthwise_kernel(self, multiplier):
        classifier, kernel = depthwise(multiplier)
        network = with_ranges(classifier, ones(classifier.graph), all_bits(3), "mse")
        errors = np.square(kernel_of(network, "depth") - kernel).sum(axis=(0, 1))
        least = least_squared_errors(kernel.reshape(3, 3, -1), 3)
        self.assertAllInRange(errors.ravel() / least, 0.9, 1.05)

    def test_weight_ranges_have_the_least_squared_error_by_default(self):
        network = post_training.float_network(conv_dense())
        default = with_ranges(network, RANGES, all_bits(3))
        least = with_ranges(network, RANGES, all_bits(3), "mse")
        extremes = with_ranges(network, RANGES, all_bits(3), "min_max")
        kernel = kernel_of(default, "conv")
        self.assertAllEqual(kernel, kernel_of(least, "conv"))
        self.assertNotAllClose(kernel, kernel_of(extremes, "conv"), atol=1e-2)

    @parameterized.product(weight_range=("min_max", "mse"), per_channel=(False, True))
    def test_kernels_have_the_bits_of_their_place(self, weight_range, per_channel):
        widths = BitWidths(
            num_bits_weight=4,
            per_channel=per_channel,
            num_bits_first=5,
            num_bits_last=6,
            num_bits_depthwise=3,
        )
        classifier = post_training.float_network(networks.build("mobilenet_like"))
        network = with_ranges(classifier, ones(classifier.graph), widths, weight_range)
        kernels = [n for n in classifier.graph.nodes.values() if has_kernel(n)]
        first, *inner, last = kernels
        self.assertLen(inner, 5)
        bits = {first.name: 5, last.name: 6}
        for node in inner:
            bits[node.name] = 3 if node.kind == "depthwise_conv" else 4
        self.assertCountEqual(bits.values(), [5, 6, 3, 3, 3, 4, 4])
        self.assertEqual(dict(network.kernel_bits), bits)
        for node in kernels:
            integers, _ = network.kernel_integers(node.name)
            integers = by_output(node, integers.astype(int))
            largest = np.abs(integers).max(axis=0 if per_channel else None)
            self.assertAllEqual(largest, 0 * largest + 2 ** (bits[node.name] - 1) - 1)
            # Fewer bits would leave multiples of something.
            self.assertEqual(np.gcd.reduce(integers.ravel()), 1)

    def test_outputs_have_the_bits_and_ranges_of_their_grids(self):
        network = with_ranges(
            post_training.float_network(conv_dense()),
            {**RANGES, "relu": (-0.5, 1.0), "logits": (1.0, 2.0)},
            BitWidths(num_bits_activation=5),
        )
        self.assertEqual(dict(network.bits), {"pixels": 8, "relu": 5, "logits": 8})
        self.assertEqual(
            dict(network.ranges),
            {"pixels": PIXELS, "relu": (-0.5, 1.0), "logits": (0.0, 2.0)},
        )

    def test_a_channel_of_zeros_stays_one(self):
        teacher = conv_dense()
        gamma = teacher.graph.nodes["bn"].weights["gamma"]
        gamma = np.where(np.arange(6) == 2, 0.0, gamma)
        graph = teacher.graph.with_weights({"bn": {"gamma": gamma}})
        network = with_ranges(
            post_training.float_network(dataclasses.replace(teacher, graph=graph)),
            RANGES,
            BitWidths(),
        )
        kernel = kernel_of(network, "conv")
        self.assertAllEqual(kernel[..., 2], np.zeros((3, 3, 3)))
        largest = np.abs(kernel).max(axis=(0, 1, 2))
        self.assertAllInRange(np.delete(largest, 2), 1e-3, 10)

    def test_a_kernel_of_zeros_stays_one(self):
        sketch = Sketch()
        weights = {"kernel": np.zeros((3, 3, 3, 4)), "bias": np.zeros(4)}
        sketch("conv", "conv", weights=weights)
        sketch.flatten("flat")
        sketch.dense("logits")
        classifier = sketch.classifier()
        for per_channel in (True, False):
            widths = BitWidths(per_channel=per_channel)
            network = with_ranges(classifier, ones(classifier.graph), widths)
            integers, grid = network.kernel_integers("conv")
            self.assertAllEqual(integers, np.zeros((3, 3, 3, 4), np.int8))
            self.assertAllEqual(grid.scale, np.full_like(grid.scale, 1 / 127))


class PostTrainingTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(corrected=(False, True), weight_range=("min_max", "mse"))
    def test_is_its_parts_one_after_the_other(self, corrected, weight_range):
        network = post_training.float_network(conv_dense())
        images = graphs.noise((8, 8, 3), 40)
        widths = BitWidths(3, 5, True, 3, 3, 3)
        config = CalibrationConfig(
            activation_range="percentile",
            activation_percentile=95.0,
            weight_range=weight_range,
            pooled_margin=1.0,
            logits_margin=1.0,
            bias_correction=corrected,
        )
        with mock.patch.object(choosing, "LEAST_GAIN", -np.inf):
            found = post_training.post_training(network, images, widths, config)
        self.assertIsInstance(found, QuantizedNetwork)
        if corrected:
            images = images[10:]  # a quarter says whether the correction pays
        ranges = calibrate(network, images, widths, config)
        expected = with_ranges(network, ranges, widths, weight_range)
        if corrected:
            expected = with_corrected_biases(expected, images)
        expected = expected.with_rounded_biases()
        self.assertEqual(dict(found.ranges), ranges)
        for name, node in expected.graph.nodes.items():
            for role, weight in node.weights.items():
                self.assertAllEqual(found.graph.nodes[name].weights[role], weight)
        for name, magnitudes in expected.kernel_ranges.items():
            self.assertAllEqual(found.kernel_ranges[name], magnitudes)

    def test_defaults_are_eight_bits_and_corrected_biases(self):
        network = post_training.float_network(conv_dense())
        images = graphs.noise((8, 8, 3), 40)
        found = post_training.post_training(network, images)
        self.assertEqual(set(found.bits.values()), {8})
        expected = post_training.post_training(
            network, images, BitWidths(), CalibrationConfig(bias_correction=True)
        )
        self.assertAllEqual(found.scores(images), expected.scores(images))

    @parameterized.parameters(BitWidths(), BitWidths(4, 4), BitWidths(8, 16))
    def test_biases_are_whole_steps_and_kernels_as_they_were(self, widths):
        network = post_training.float_network(conv_dense(mean=(1.5,)))
        before = [
            w.copy() for n in network.graph.nodes.values() for w in n.weights.values()
        ]
        found = post_training.post_training(
            network, graphs.noise((8, 8, 3), 40), widths
        )
        for name in ("normalize", "conv", "logits"):
            weights = found.graph.nodes[name].weights
            scale = found.bias_scale(name)
            multiples = (np.rint(weights["bias"] / scale) * scale).astype(np.float32)
            self.assertAllEqual(weights["bias"], multiples)
            kernel = network.graph.nodes[name].weights["kernel"]
            self.assertAllEqual(weights["kernel"], kernel)
        after = [w for n in network.graph.nodes.values() for w in n.weights.values()]
        self.assertTrue(helpers.all_equal(before, after))

    @parameterized.parameters(*networks.FEW)
    def test_eight_bits_answer_as_the_float_network(self, name):
        self.check_eight_bits(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_they_do_in_the_others(self, name):
        self.check_eight_bits(name)

    def check_eight_bits(self, name):
        network = post_training.float_network(networks.build(name))
        images = networks.images(network.image_shape, 64)
        expected = network.scores(images)
        found = post_training.post_training(network, images).scores(images)
        error = np.abs(found - expected).mean()
        self.assertLess(error, 0.05 * np.ptp(expected, axis=0).mean())

    @parameterized.parameters(BitWidths(), BitWidths(4, 8, False), BitWidths(8, 16))
    def test_dead_channels_and_kernels_of_zeros_do_no_harm(self, widths):
        sketch = Sketch(pixels=False)
        sketch("relu", "relu", sketch.conv("conv", outputs=6))
        sketch("leaky_relu", "leaky", sketch.conv("zero"), slope=0.1)
        zero = sketch.nodes["zero"].weights
        dead = np.array([1, 1, 1, 0, 0, 0])
        conv = sketch.nodes["conv"].weights
        both = sketch("concatenate", "both", "leaky", "relu")
        sketch("global_average_pool", "mean", both)
        sketch.dense("logits")
        classifier = sketch.classifier()
        graph = classifier.graph.with_weights(
            {
                "zero": {"kernel": 0 * zero["kernel"], "bias": 0 * zero["bias"]},
                "conv": {"kernel": dead * conv["kernel"], "bias": conv["bias"] - dead},
            }
        )
        network = post_training.float_network(
            dataclasses.replace(classifier, graph=graph)
        )
        images = networks.images((8, 8, 3), 40)
        found = post_training.post_training(network, images, widths)
        expected = network.scores(images)
        error = np.abs(found.scores(images) - expected).mean()
        self.assertLess(error, 0.1 * np.ptp(expected))
        (leaky,) = found.outputs(images, ["leaky"])
        step = found.grid("leaky").scale[0]
        self.assertAllInRange(leaky, -1.01 * step, 1.01 * step)

    def test_corrected_biases_have_room_too(self):
        network = post_training.float_network(conv_dense())
        large = {"conv": {"bias": np.full(6, 1e9)}}
        with mock.patch.object(
            choosing,
            "with_corrected_biases",
            lambda network, images: network.with_weights(large),
        ):
            found = post_training.post_training(network, graphs.noise((8, 8, 3), 3))
        bias = found.graph.nodes["conv"].weights["bias"]
        self.assertAllClose(bias, np.full(6, 1e9))
        self.assertAllInRange(bias / found.bias_scale("conv"), 2**20, 2**30)

    def test_images_of_another_shape_are_refused(self):
        network = post_training.float_network(conv_dense())
        with self.assertRaisesRegex(ModelError, r"images are \(8, 9, 3\) each"):
            post_training.post_training(network, np.zeros((2, 8, 9, 3), np.uint8))

    def test_widths_that_a_layer_cannot_have_are_refused(self):
        sketch = Sketch((512, 512, 1), pixels=False)
        sketch("global_average_pool", "pool")
        sketch.dense("logits")
        network = post_training.float_network(sketch.classifier())
        images = np.zeros((1, 512, 512, 1), np.uint8)
        with self.assertRaisesRegex(UnsupportedLayerError, "layer my pool .*averages"):
            post_training.post_training(network, images, BitWidths(8, 16))

    def test_images_that_say_nothing_are_refused(self):
        network = post_training.float_network(conv_dense())
        images = np.full((5, 8, 8, 3), 7, np.uint8)
        with self.assertRaisesRegex(TrainingError, "^the 4 calibration images are all"):
            post_training.post_training(network, images)


if __name__ == "__main__":
    tf.test.main()
