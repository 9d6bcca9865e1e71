import dataclasses
import functools
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import TrainingError
from dfq_tf.graph import running
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import calibration, grids
from dfq_tf.quantization.post_training import float_network
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import graphs, networks
from tests.graphs import PIXELS, Sketch

layers = keras.layers

METHODS = ("min_max", "percentile", "mse")


@functools.cache
def case(name):
    """A user's model, which nothing changes, and its float network."""
    learner = networks.learner(name)
    return learner, float_network(as_classifier(learner))


def calibrated(network, images, method="mse", bits=8, percentile=99.0, **kwargs):
    """The ranges of a float network's outputs, without margins."""
    config = CalibrationConfig(
        activation_range=method,
        activation_percentile=percentile,
        pooled_margin=1.0,
        logits_margin=1.0,
    )
    widths = BitWidths(8, bits, num_bits_sum=min(bits, 8))
    return calibration.calibrate(network, images, widths, config, **kwargs)


def activations(learner, images, ranges):
    """The outputs that mean the same in the float network and in Keras, by name."""
    kinds = (layers.ReLU, layers.Activation, layers.Add, layers.GlobalAveragePooling2D)
    common = [
        layer
        for layer in learner.model.layers
        if isinstance(layer, kinds) and layer.name in ranges
    ]
    assert len(common) >= 3
    observed = keras.Model(learner.model.input, [la.output for la in common])
    pixels = learner.description.normalize(images.astype(np.float32))
    outputs = observed(pixels, training=False)
    return {la.name: output.numpy() for la, output in zip(common, outputs)}


def with_last(network, kernel, bias):
    """The network with one value in the last kernel, and another bias."""
    last = network.graph.last
    weights = {"kernel": np.full(last.weights["kernel"].shape, kernel), "bias": bias}
    graph = network.graph.with_weights({last.name: weights})
    return dataclasses.replace(network, graph=graph)


def squared_error(values, low, high, num_bits):
    """Mean over the values of what affine quantization in a range changes, squared."""
    scale = (high - low) / (2**num_bits - 1)
    zero_point = np.round(-low / scale)
    integers = np.clip(np.round(values / scale) + zero_point, 0, 2**num_bits - 1)
    return np.mean(np.square(scale * (integers - zero_point) - values))


def least_squared_error(values, num_bits):
    """Over all ranges of fine steps that hold 0 and lie within the extremes."""
    low, high = min(values.min(), 0.0), values.max()
    shares = np.linspace(0.04, 1, 33 if low < 0 else 250)
    lows = low * shares if low < 0 else [0.0]
    return min(
        squared_error(values, a, high * b, num_bits) for a in lows for b in shares
    )


class CalibrateTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=("vgg_like", "resnet_like", "mobilenet_like"), bits=(4, 8)
    )
    def test_ranges_are_the_extremes_of_the_float_network(self, name, bits):
        learner, network = case(name)
        images = networks.images(network.image_shape, 50, seed=3)
        ranges = calibrated(network, images, "min_max", bits, batch_size=16)
        for layer, output in activations(learner, images, ranges).items():
            low, high = ranges[layer]
            self.assertAllClose(low, min(np.min(output), 0.0), atol=1e-4)
            self.assertAllClose(high, np.max(output), rtol=1e-4)

    @parameterized.product(
        name=("vgg_like", "resnet_like", "mobilenet_like"), percentile=(80, 99)
    )
    def test_percentiles_are_those_of_the_float_network(self, name, percentile):
        learner, network = case(name)
        images = networks.images(network.image_shape, 50, seed=3)
        ranges = calibrated(
            network, images, "percentile", percentile=percentile, batch_size=16
        )
        for layer, output in activations(learner, images, ranges).items():
            low, high = ranges[layer]
            expected = np.percentile(
                output, [100 - percentile, percentile], method="inverted_cdf"
            )
            bin_width = np.ptp(output) / 2048
            self.assertAllClose(low, min(expected[0], 0), rtol=0, atol=bin_width)
            self.assertAllClose(high, max(expected[1], 0), rtol=0, atol=bin_width)
            self.assertLess(high, np.max(output) - bin_width)

    @parameterized.product(
        name=("vgg_like", "resnet_like", "mobilenet_like"), bits=(4, 6)
    )
    def test_no_range_errs_less_in_the_float_network(self, name, bits):
        learner, network = case(name)
        images = networks.images(network.image_shape, 24, seed=3)
        ranges = calibrated(network, images, "mse", bits, batch_size=16)
        gains = []
        for layer, output in activations(learner, images, ranges).items():
            output = output.astype(np.float64)
            error = squared_error(output, *ranges[layer], bits)
            self.assertLess(error, 1.05 * least_squared_error(output, bits), layer)
            extremes = min(output.min(), 0.0), output.max()
            gains.append(squared_error(output, *extremes, bits) / error)
        self.assertGreater(np.mean(gains), 1.04)

    def test_squared_error_is_that_of_each_output_s_bits(self):
        _, network = case("resnet_like")
        images = networks.images(network.image_shape, 50)
        coarse, fine = (calibrated(network, images, bits=b) for b in (4, 8))
        *inner, logits = (name for name in coarse if name != "pixels")
        # The logits have 8 bits in both.
        self.assertEqual(coarse[logits], fine[logits])
        for name in inner:
            self.assertLess(np.ptp(coarse[name]), np.ptp(fine[name]), name)

    @parameterized.parameters("percentile", "mse")
    def test_sixteen_bits_have_the_extremes_whatever_the_method(self, method):
        _, network = case("resnet_like")
        images = networks.images(network.image_shape, 50)
        extremes = calibrated(network, images, "min_max", 16)
        self.assertEqual(calibrated(network, images, method, 16), extremes)
        self.assertNotAllClose(
            list(calibrated(network, images, method).values()),
            list(extremes.values()),
            atol=1e-2,
        )

    def test_least_squared_error_at_eight_bits_is_the_default(self):
        _, network = case("vgg_like")
        images = networks.images(network.image_shape, 32)
        config = CalibrationConfig(pooled_margin=1.0, logits_margin=1.0)
        ranges = calibration.calibrate(network, images, config=config)
        self.assertEqual(ranges, calibrated(network, images, "mse", 8))
        self.assertNotEqual(ranges, calibrated(network, images, "min_max", 8))

    @parameterized.parameters(*METHODS)
    def test_last_short_batch_counts(self, method):
        _, network = case("resnet_like")
        # The only image that is not black comes last, in a batch of its own.
        images = np.zeros((5, *network.image_shape), np.uint8)
        images[4] = networks.images(network.image_shape, 1)
        ranges = calibrated(network, images, method, batch_size=4)
        black = calibrated(network, images[:1], method)
        both = calibrated(network, images, method, batch_size=5)
        self.assertNotAllClose(list(ranges.values()), list(black.values()))
        self.assertAllClose(list(ranges.values()), list(both.values()), atol=1e-4)

    @parameterized.parameters(*METHODS)
    def test_one_image_is_enough(self, method):
        learner, network = case("resnet_like")
        images = networks.images(network.image_shape, 1)
        ranges = calibrated(network, images, method)
        for layer, output in activations(learner, images, ranges).items():
            # The percentile of so few values is near them, too.
            low, high = ranges[layer]
            self.assertBetween(low, min(np.min(output), 0) - 1e-4, 0)
            self.assertBetween(high, 0.4 * np.max(output), np.max(output) * 1.0001)

    @parameterized.parameters(*METHODS)
    def test_every_quantized_output_has_a_range(self, method):
        _, network = case("densenet_like")
        images = networks.images(network.image_shape, 8)
        ranges = calibrated(network, images, method)
        self.assertEqual(list(ranges), grids.measured(network.graph))
        for low, high in ranges.values():
            self.assertLessEqual(low, 0.0)
            self.assertGreater(high, low)

    @parameterized.parameters(*METHODS)
    def test_pixels_have_their_full_range_whatever_the_images(self, method):
        _, network = case("resnet_like")
        images = np.full((2, *network.image_shape), 100, np.uint8)
        images[1] = 101
        ranges = calibrated(network, images, method)
        self.assertEqual(ranges["pixels"], PIXELS)

    @parameterized.parameters(*METHODS)
    def test_layers_that_are_constant_have_a_range(self, method):
        sketch = Sketch()
        for name, bias in (("none", 0.0), ("above", 2.0), ("below", -3.0)):
            weights = {"kernel": np.zeros((3, 3, 3, 4)), "bias": np.full(4, bias)}
            sketch("conv", name, "pixels", weights=weights, padding="same")
        x = sketch("leaky_relu", "leaky", sketch.conv("conv", "pixels"), slope=0.3)
        for name in ("none", "above", "below"):
            x = sketch("add", f"add_{name}", x, name)
        sketch.flatten("flat")
        sketch.dense("logits")
        ranges = calibrated(sketch.classifier(), networks.images((8, 8, 3), 4), method)
        # Where there is nothing to represent, any range will do.
        self.assertEqual(ranges["none"], (0.0, 1.0))
        self.assertAllClose(ranges["above"], (0.0, 2.0))
        self.assertAllClose(ranges["below"], (-3.0, 0.0))


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(count=(2, 5), value=(0, 100))
    def test_images_that_are_all_the_same(self, count, value):
        _, network = case("resnet_like")
        images = np.full((count, *network.image_shape), value, np.uint8)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the {count} calibration images are all the same; ranges need images "
            "that differ",
        ):
            calibrated(network, images)

    def test_copies_of_one_image(self):
        _, network = case("resnet_like")
        image = networks.images(network.image_shape, 1)
        images = np.repeat(image, 3, axis=0).astype(np.float32)
        with self.assertRaisesRegex(TrainingError, "^the 3 .* are all the same"):
            calibrated(network, images)
        images[2, 7, 7, 2] += 1
        self.assertIn("pixels", calibrated(network, images))

    @parameterized.product(method=METHODS, spread=(0.0, 1.0))
    def test_logits_that_are_the_same_for_all_images(self, method, spread):
        _, network = case("resnet_like")
        name = network.graph.output
        network = with_last(network, 0.0, 1.5 + spread * np.arange(5))
        images = networks.images(network.image_shape, 4)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the output of layer {name}, the last, is the same for "
            f"all 4 calibration images, from 1.5 to {1.5 + 4 * spread}; the network is "
            "damaged",
        ):
            calibrated(network, images, method)

    @parameterized.parameters(*METHODS)
    def test_an_infinite_output(self, method):
        _, network = case("resnet_like")
        name = network.graph.output
        # Finite weights whose output is not.
        network = with_last(network, 3e38, [0, 0, 3e38, 0, 0])
        images = networks.images(network.image_shape, 2)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the output of layer {name} is not finite on the "
            "calibration images: its range is .* to inf$",
        ):
            calibrated(network, images, method)

    def test_a_pass_takes_as_many_images_as_memory_has_room_for(self):
        _, network = case("resnet_like")
        images = networks.images(network.image_shape, 140, seed=1)
        each = 4 * sum(np.prod(n.shape) for n in network.graph.nodes.values())
        sizes, ranges = [], []
        traced = calibration.traced

        def spy(*arguments):
            compiled = traced(*arguments)

            def call(pixels):
                sizes.append(len(pixels))
                return compiled(pixels)

            return call

        # Never one: images of a pass are compared with each other.
        for budget in (2**32, 20 * each, 1):
            with (
                mock.patch.object(running, "PASS_MEMORY", budget),
                mock.patch.object(calibration, "traced", spy),
            ):
                ranges.append(calibrated(network, images))
        self.assertEqual(sizes, 2 * [128, 12] + 14 * [20] + 140 * [2])
        for other in ranges[1:]:
            for name, (low, high) in ranges[0].items():
                self.assertAllClose(other[name], (low, high), rtol=1e-3, atol=1e-3)

    @parameterized.parameters(*METHODS)
    def test_one_nan_among_the_outputs(self, method):
        _, network = case("resnet_like")
        images = networks.images(network.image_shape, 6).astype(np.float32)
        images[3, 4, 4, 1] = np.nan
        with self.assertRaisesRegex(
            TrainingError, "^the output of layer pixels is not finite .* nan"
        ):
            calibrated(network, images, method, batch_size=4)


class FittedRangesTest(tf.test.TestCase, parameterized.TestCase):
    def fitted(self, sketch, width=8, **ranges):
        """Ranges made fit; those that are not given are from 0 to 1."""
        graph = grids.separated(sketch.graph())
        bits = grids.activation_bits(graph, BitWidths(num_bits_activation=width))
        given = {n: ranges.get(n, (0.0, 1.0)) for n in grids.measured(graph)}
        return calibration.fitted_ranges(graph, given, bits)

    def joined(self):
        """Two convolutions in one grid, and one beside them."""
        sketch = Sketch()
        a, b = (sketch.conv(name, "pixels") for name in "ab")
        sketch("concatenate", "ab", a, sketch("max_pool", "pool", b, **SAME))
        sketch.conv("c")
        return sketch

    def test_hold_zero(self):
        ranges = self.fitted(self.joined(), ab=(0.5, 2.0), c=(-3.0, -1.0))
        self.assertEqual(ranges["ab"], (0.0, 2.0))
        self.assertEqual(ranges["c"], (-3.0, 0.0))

    def test_outputs_of_one_grid_share_the_widest(self):
        ranges = self.fitted(
            self.joined(), a=(-2.0, 1.0), b=(0.0, 1.0), ab=(-1.0, 5.0), c=(-9.0, 9.0)
        )
        for name in ("a", "b", "ab"):
            self.assertEqual(ranges[name], (-2.0, 5.0))
        self.assertEqual(ranges["c"], (-9.0, 9.0))
        self.assertNotIn("pool", ranges)

    @parameterized.parameters((0.0, 0.0), (-1e-38, 1e-40), (0.0, 1e-25))
    def test_output_of_zeros_gets_a_range(self, low, high):
        nothing = (low, high)
        ranges = self.fitted(self.joined(), a=nothing, b=nothing, ab=nothing)
        self.assertEqual(ranges["a"], (0.0, 1.0))
        # And leaves that of others which share its grid.
        ranges = self.fitted(self.joined(), a=nothing, b=(0, 0.01), ab=(0, 0.01))
        self.assertAllClose(ranges["a"], (0.0, 0.01))

    @parameterized.parameters((float("nan"), 1.0), (0.0, float("inf")))
    def test_not_finite_is_refused(self, low, high):
        with self.assertRaisesRegex(
            TrainingError, f"output of layer b is not finite.* {low} to {high}"
        ):
            self.fitted(self.joined(), b=(low, high))

    def test_pixels_have_their_own(self):
        for width in (8, 16):
            ranges = self.fitted(self.joined(), width, pixels=(0.0, 0.1))
            self.assertEqual(ranges["pixels"], PIXELS)

    @parameterized.parameters(8, 16)
    def test_factors_of_pixels_have_what_black_and_white_become(self, width):
        sketch = Sketch()
        kernel, bias = np.array([[[[1.0], [-2.0], [0.5]]]]), np.array([1.0, 0.0, -3.0])
        sketch("depthwise_conv", "first", weights={"kernel": kernel, "bias": bias})
        kernel = np.array([[[[4.0, -1.0], [0.5, 0.0], [1.0, 1.0]]]])
        sketch("depthwise_conv", "second", weights={"kernel": kernel})
        sketch("relu", "relu")
        sketch.conv("conv")
        ranges = self.fitted(sketch, width)
        # The channels of the first: -0.875 to 3.109375, -4.21875 to 3.75, below 0.
        expected = {"first": (-4.21875, 3.75), "relu": (0.0, 4 * 3.109375)}
        if width == 16:
            expected = {"first": (-4.21875, 4.21875), "relu": (-12.4375, 12.4375)}
        self.assertEqual({name: ranges[name] for name in expected}, expected)

    def test_a_channel_scaled_much_farther_than_most_is_measured(self):
        """As one that was the same in all images, which BatchNormalization blows up."""
        for largest, expected in ((4.0, (0.0, 4 * PIXELS[1])), (31.6, (0.0, 1.0))):
            sketch = Sketch()
            kernel = np.array([[[[1.0], [1.0], [largest]]]])
            sketch("depthwise_conv", "factor", weights={"kernel": kernel})
            sketch("relu", "relu")
            sketch.conv("conv")
            self.assertEqual(self.fitted(sketch)["relu"], expected)

    def test_factors_of_each_place_are_measured(self):
        sketch = Sketch()
        sketch("reshape", "row", shape=(1, 1, -1))
        sketch.depthwise("scaled", size=1)
        sketch.dense("logits", sketch.flatten("flat"))
        self.assertEqual(self.fitted(sketch)["scaled"], (0.0, 1.0))

    def test_sixteen_bits_are_symmetric(self):
        ranges = self.fitted(self.joined(), 16, b=(-3.0, 1.0), c=(-1.0, 4.0))
        self.assertEqual(ranges["a"], (-3.0, 3.0))
        self.assertEqual(ranges["c"], (-4.0, 4.0))

    @parameterized.product(measured=((0.0, 1.2), (0.1, 3.0)), width=(8, 16))
    def test_a_top_is_where_a_range_ends(self, measured, width):
        sketch = Sketch()
        sketch("relu", "top", sketch.conv("conv"), top=2.5)
        sketch("max_pool", "pool", **SAME)
        sketch("relu", "again")
        sketch.conv("last")
        ranges = self.fitted(sketch, width, top=measured, again=(0.0, 0.5))
        high = min(measured[1], 2.5)
        expected = (-high, high) if width == 16 else (0.0, high)
        self.assertEqual((ranges["top"], ranges["again"]), (expected, expected))

    @parameterized.parameters(
        ("sigmoid", 8, (0.0, 255 / 256)),
        ("tanh", 8, (-1.0, 127 / 128)),
        ("sigmoid", 16, (-32767 / 32768, 32767 / 32768)),
        ("tanh", 16, (-32767 / 32768, 32767 / 32768)),
    )
    def test_a_curve_has_its_own(self, kind, width, expected):
        sketch = Sketch()
        a = sketch(kind, "a", sketch.conv("conv1", "pixels"))
        b = sketch(kind, "b", sketch.conv("conv2", "pixels"))
        sketch("concatenate", "ab", a, sketch("max_pool", "pool", b, **SAME))
        x = sketch("concatenate", "abc", sketch.conv("c", "pixels"), "ab")
        sketch.conv("last", x)
        ranges = self.fitted(
            sketch, width, a=(0.1, 0.7), b=(0.0, 2.0), c=(0.0, 5.0), abc=(-1.0, 5.0)
        )
        for name in ("a", "b", "ab"):
            self.assertEqual(ranges[name], expected)
        shared = (-5.0, 5.0) if width == 16 else (-1.0, 5.0)
        for name in ("c", "ab_requantized", "abc"):
            self.assertEqual(ranges[name], shared)


SAME = dict(size=(2, 2), strides=(1, 1), padding="same")


class ObserveTest(tf.test.TestCase, parameterized.TestCase):
    def test_counts_what_lies_between_the_extremes(self):
        network = two_answers(0.5)
        images = graphs.noise((4, 4, 3), 30)
        found = calibration.observe(network, images, 7, with_counts=True)
        self.assertEqual(list(found), grids.measured(network.graph))
        pixels = (images.astype(np.float32) - 120) / 64
        histogram = found["pixels"]
        self.assertEqual((histogram.low, histogram.high), (pixels.min(), pixels.max()))
        self.assertEqual(histogram.counts.sum(), pixels.size)
        counts, _ = np.histogram(pixels, 2048, (histogram.low, histogram.high))
        # A pixel may fall on the border of two bins.
        self.assertLess(np.abs(np.cumsum(counts - histogram.counts)).max(), 60)

    def test_without_counts_there_are_the_extremes(self):
        network = two_answers(0.5)
        images = graphs.noise((4, 4, 3), 30)
        found = calibration.observe(network, images, 7, with_counts=False)
        for name, histogram in found.items():
            self.assertIsNone(histogram.counts)
            self.assertEqual(histogram.low < histogram.high, name != "first")

    def test_one_of_two_halves_of_the_answer_may_be_constant(self):
        # The logits are two vectors side by side, of which only one says something.
        images = graphs.noise((4, 4, 3), 30)
        ranges = calibrated(two_answers(0.5), images)
        self.assertEqual(ranges["first"], ranges["both"])
        with self.assertRaisesRegex(TrainingError, "layer both, the last, is the same"):
            calibrated(two_answers(0.0), images)


def two_answers(size):
    """Logits of a constant, and of a kernel of some size, flattened together."""
    sketch = Sketch((4, 4, 3))
    mean = sketch("global_average_pool", "mean", keepdims=True)
    zeros = {"kernel": np.zeros((1, 1, 3, 2)), "bias": np.ones(2)}
    first = sketch("conv", "first", mean, weights=zeros)
    second = sketch.conv("second", mean, outputs=2, size=1, bias=False)
    node = sketch.nodes["second"]
    kernel = size * node.weights["kernel"]
    sketch.nodes["second"] = node.with_weights(kernel=kernel)
    sketch("concatenate", "both", first, second)
    sketch.flatten("logits")
    return sketch.classifier()


if __name__ == "__main__":
    tf.test.main()
