from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import TrainingError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.quantization import apply, calibration
from dfq_tf.settings import BitWidths, CalibrationConfig
from dfq_tf.training import memory
from tests import networks

layers = keras.layers

METHODS = ("min_max", "percentile", "mse")


def calibrated(classifier, images, method="mse", bits=8, percentile=99.0, **kwargs):
    """The ranges of a network's outputs."""
    graph, description = apply.integer_ready(classifier)
    config = CalibrationConfig(
        activation_range=method, activation_percentile=percentile
    )
    widths = BitWidths(8, bits)
    return calibration.calibrate(graph, description, images, widths, config, **kwargs)


def activations(classifier, images, ranges):
    """The outputs that mean the same in the rewritten network and before, by name."""
    kinds = (layers.ReLU, layers.Activation, layers.Add, layers.GlobalAveragePooling2D)
    common = [
        layer
        for layer in classifier.model.layers
        if isinstance(layer, kinds) and layer.name in ranges
    ]
    assert len(common) >= 3
    observed = keras.Model(classifier.model.input, [la.output for la in common])
    pixels = classifier.description.normalize(images.astype(np.float32))
    outputs = observed(pixels, training=False)
    return {la.name: output.numpy() for la, output in zip(common, outputs)}


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
        classifier = networks.build(name)
        images = networks.images(classifier.image_shape, 50, seed=3)
        ranges = calibrated(classifier, images, "min_max", bits, batch_size=16)
        for layer, output in activations(classifier, images, ranges).items():
            low, high = ranges[layer]
            self.assertAllClose(low, min(np.min(output), 0.0), atol=1e-4)
            self.assertAllClose(high, np.max(output), rtol=1e-4)

    @parameterized.product(
        name=("vgg_like", "resnet_like", "mobilenet_like"), percentile=(80, 99)
    )
    def test_percentiles_are_those_of_the_float_network(self, name, percentile):
        classifier = networks.build(name)
        images = networks.images(classifier.image_shape, 50, seed=3)
        ranges = calibrated(
            classifier, images, "percentile", percentile=percentile, batch_size=16
        )
        for layer, output in activations(classifier, images, ranges).items():
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
        classifier = networks.build(name)
        images = networks.images(classifier.image_shape, 24, seed=3)
        ranges = calibrated(classifier, images, "mse", bits, batch_size=16)
        gains = []
        for layer, output in activations(classifier, images, ranges).items():
            output = output.astype(np.float64)
            error = squared_error(output, *ranges[layer], bits)
            self.assertLess(error, 1.05 * least_squared_error(output, bits), layer)
            extremes = min(output.min(), 0.0), output.max()
            gains.append(squared_error(output, *extremes, bits) / error)
        self.assertGreater(np.mean(gains), 1.04)

    def test_squared_error_is_that_of_each_output_s_bits(self):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 50)
        coarse, fine = (calibrated(classifier, images, bits=b) for b in (4, 8))
        *inner, logits = (name for name in coarse if name != "pixels")
        # The logits have 8 bits in both.
        self.assertEqual(coarse[logits], fine[logits])
        for name in inner:
            self.assertLess(np.ptp(coarse[name]), np.ptp(fine[name]), name)

    @parameterized.parameters("percentile", "mse")
    def test_sixteen_bits_have_the_extremes_whatever_the_method(self, method):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 50)
        extremes = calibrated(classifier, images, "min_max", 16)
        self.assertEqual(calibrated(classifier, images, method, 16), extremes)
        self.assertNotAllClose(
            list(calibrated(classifier, images, method).values()),
            list(extremes.values()),
            atol=1e-2,
        )

    def test_least_squared_error_at_eight_bits_is_the_default(self):
        classifier = networks.build("vgg_like")
        images = networks.images(classifier.image_shape, 32)
        graph, description = apply.integer_ready(classifier)
        ranges = calibration.calibrate(graph, description, images)
        self.assertEqual(ranges, calibrated(classifier, images, "mse", 8))
        self.assertNotEqual(ranges, calibrated(classifier, images, "min_max", 8))

    @parameterized.parameters(*METHODS)
    def test_last_short_batch_counts(self, method):
        classifier = networks.build("resnet_like")
        # The only image that is not black comes last, in a batch of its own.
        images = np.zeros((5, *classifier.image_shape), np.uint8)
        images[4] = networks.images(classifier.image_shape, 1)
        ranges = calibrated(classifier, images, method, batch_size=4)
        black = calibrated(classifier, images[:1], method)
        both = calibrated(classifier, images, method, batch_size=5)
        self.assertNotAllClose(list(ranges.values()), list(black.values()))
        self.assertAllClose(list(ranges.values()), list(both.values()), atol=1e-4)

    @parameterized.parameters(*METHODS)
    def test_one_image_is_enough(self, method):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 1)
        ranges = calibrated(classifier, images, method)
        for layer, output in activations(classifier, images, ranges).items():
            # The percentile of so few values is near them, too.
            low, high = ranges[layer]
            self.assertBetween(low, min(np.min(output), 0) - 1e-4, 0)
            self.assertBetween(high, 0.4 * np.max(output), np.max(output) * 1.0001)

    @parameterized.parameters(*METHODS)
    def test_every_quantized_output_has_a_range(self, method):
        classifier = networks.build("densenet_like")
        graph, _ = apply.integer_ready(classifier)
        images = networks.images(classifier.image_shape, 8)
        ranges = calibrated(classifier, images, method)
        self.assertCountEqual(ranges, apply.quantized_nodes(graph))
        for low, high in ranges.values():
            self.assertLessEqual(low, 0.0)
            self.assertGreater(high, low)

    @parameterized.parameters(*METHODS)
    def test_pixels_have_their_full_range_whatever_the_images(self, method):
        classifier = networks.build("resnet_like")
        images = np.full((2, *classifier.image_shape), 100, np.uint8)
        images[1] = 101
        ranges = calibrated(classifier, images, method)
        self.assertEqual(ranges["pixels"], (-120 / 64, 135 / 64))

    @parameterized.parameters(*METHODS)
    def test_layers_that_are_constant_have_a_range(self, method):
        image = layers.Input((8, 8, 3))
        outputs = {}
        for name, bias in (("none", 0.0), ("above", 2.0), ("below", -3.0)):
            outputs[name] = layers.Conv2D(
                4,
                3,
                kernel_initializer="zeros",
                bias_initializer=keras.initializers.Constant(bias),
                name=name,
            )(image)
        x = layers.Flatten()(layers.LeakyReLU()(layers.Conv2D(4, 3)(image)))
        for output in outputs.values():
            x = layers.Add()([x, layers.Flatten()(output)])
        model = keras.Model(image, layers.Dense(networks.NUM_CLASSES)(x))
        names = tuple(f"class {i}" for i in range(networks.NUM_CLASSES))
        fed = ModelDescription((120.0,), (1 / 64,), "logits", names)
        ranges = calibrated(
            Classifier(model, fed), networks.images((8, 8, 3), 4), method
        )
        # Where there is nothing to represent, any range will do.
        self.assertEqual(ranges["none"], (0.0, 1.0))
        self.assertAllClose(ranges["above"], (0.0, 2.0))
        self.assertAllClose(ranges["below"], (-3.0, 0.0))


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(count=(2, 5), value=(0, 100))
    def test_images_that_are_all_the_same(self, count, value):
        classifier = networks.build("resnet_like")
        images = np.full((count, *classifier.image_shape), value, np.uint8)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the {count} calibration images are all the same; ranges need images "
            "that differ",
        ):
            calibrated(classifier, images)

    def test_copies_of_one_image(self):
        classifier = networks.build("resnet_like")
        image = networks.images(classifier.image_shape, 1)
        images = np.repeat(image, 3, axis=0).astype(np.float32)
        with self.assertRaisesRegex(TrainingError, "^the 3 .* are all the same"):
            calibrated(classifier, images)
        images[2, 7, 7, 2] += 1
        self.assertIn("pixels", calibrated(classifier, images))

    @parameterized.product(method=METHODS, spread=(0.0, 1.0))
    def test_logits_that_are_the_same_for_all_images(self, method, spread):
        classifier = networks.build("resnet_like")
        logits = classifier.model.layers[-1]
        logits.kernel.assign(np.zeros(logits.kernel.shape))
        logits.bias.assign(1.5 + spread * np.arange(networks.NUM_CLASSES))
        images = networks.images(classifier.image_shape, 4)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the output of layer {logits.name}_as_conv, the last, is the same for "
            f"all 4 calibration images, from 1.5 to {1.5 + 4 * spread}; the network is "
            "damaged",
        ):
            calibrated(classifier, images, method)

    @parameterized.parameters(*METHODS)
    def test_an_infinite_output(self, method):
        classifier = networks.build("resnet_like")
        logits = classifier.model.layers[-1]
        # Finite weights whose output is not.
        logits.kernel.assign(np.full(logits.kernel.shape, 3e38))
        logits.bias.assign([0, 0, 3e38, 0, 0])
        images = networks.images(classifier.image_shape, 2)
        with self.assertRaisesRegex(
            TrainingError,
            f"^the output of layer {logits.name}_as_conv is not finite on the "
            "calibration images: its range is .* to inf$",
        ):
            calibrated(classifier, images, method)

    def test_a_pass_takes_as_many_images_as_memory_has_room_for(self):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 140, seed=1)
        graph, _ = apply.integer_ready(classifier)
        each = 4 * sum(np.prod(node.shape) for node in graph.nodes.values())
        observe, sizes, ranges = calibration.observe, [], []

        def spy(graph, description, images, batch_size, with_counts):
            sizes.append(batch_size)
            return observe(graph, description, images, batch_size, with_counts)

        # Never one: images of a pass are compared with each other.
        for budget in (2**32, 20 * each, 1):
            with (
                mock.patch.object(memory, "PASS_MEMORY", budget),
                mock.patch.object(calibration, "observe", spy),
            ):
                ranges.append(calibrated(classifier, images))
        self.assertEqual(sizes, [128, 20, 2])
        for other in ranges[1:]:
            for name, (low, high) in ranges[0].items():
                self.assertAllClose(other[name], (low, high), rtol=1e-3, atol=1e-3)

    @parameterized.parameters(*METHODS)
    def test_one_nan_among_the_outputs(self, method):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 6).astype(np.float32)
        images[3, 4, 4, 1] = np.nan
        with self.assertRaisesRegex(
            TrainingError, "^the output of layer pixels is not finite .* nan"
        ):
            calibrated(classifier, images, method, batch_size=4)


if __name__ == "__main__":
    tf.test.main()
