import re

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.models.layers import bn, conv
from tests import helpers


def _trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


def _types(model):
    return [type(layer).__name__ for layer in model.layers]


def _last_map(model):
    """Height, width and channels of what the last pooling averages."""
    return model.get_layer("pool").input_shape[1:]


def _wrn_parameters(depth, width, num_classes):
    """(trainable, stored BN statistics), counted from the paper's table."""
    kernels, bn_channels = 3 * 3 * 3 * 16, 0
    inputs = 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            kernels += 9 * inputs * outputs + 9 * outputs * outputs
            # A projection where the number of channels changes.
            kernels += inputs * outputs if inputs != outputs else 0
            bn_channels += inputs + outputs
            inputs = outputs
    bn_channels += inputs
    dense = inputs * num_classes + num_classes
    return kernels + 2 * bn_channels + dense, 2 * bn_channels


class WideResnetTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(("wrn_10_1", 10, 1), ("wrn_16_2", 16, 2))
    def test_has_the_parameters_of_the_paper(self, name, depth, width):
        self.check_parameters(name, depth, width)

    @parameterized.parameters(("wrn_16_1", 16, 1), ("wrn_40_2", 40, 2))
    @pytest.mark.long
    def test_so_have_the_others(self, name, depth, width):
        self.check_parameters(name, depth, width)

    def check_parameters(self, name, depth, width):
        model = models.build_model(name, (32, 32, 3), 10)
        trainable, stored = _wrn_parameters(depth, width, 10)
        self.assertEqual(_trainable(model), trainable)
        self.assertEqual(model.count_params(), trainable + stored)

    def test_has_the_published_millions_of_parameters(self):
        self.check_millions("wrn_16_1", 0.17)

    @parameterized.parameters(("wrn_16_2", 0.69), ("wrn_40_2", 2.2))
    @pytest.mark.long
    def test_so_have_the_larger_ones(self, name, published):
        self.check_millions(name, published)

    def check_millions(self, name, published):
        model = models.build_model(name, (32, 32, 3), 10)
        self.assertAllClose(_trainable(model) / 1e6, published, rtol=0.03)

    def test_projections_stand_where_the_channels_change(self):
        model = models.build_model("wrn_16_1", (32, 32, 3), 10)
        kinds = _types(model)
        names = [layer.name for layer in model.layers]
        shortcuts = sum("shortcut" in name for name in names)
        # The stem, two in each of six blocks, and the dense layer.
        self.assertEqual(kinds.count("Conv2D") - shortcuts + kinds.count("Dense"), 14)
        self.assertEqual(shortcuts, 2)

    def test_maps_images_of_any_shape_to_logits(self):
        model = models.build_model("wrn_10_1", (9, 13, 1), 4)
        self.assertEqual(model.input_shape, (None, 9, 13, 1))
        self.assertEqual(model.output_shape, (None, 4))
        logits = helpers.randomise(model)(helpers.random_inputs(model)).numpy()
        self.assertLess(logits.min(), 0.0)

    def test_second_and_third_group_halve_the_size(self):
        model = models.build_model("wrn_10_2", (32, 32, 3), 10)
        shapes = [
            model.get_layer(f"group{i}_block1_add").output_shape for i in (1, 2, 3)
        ]
        self.assertEqual(
            shapes, [(None, 32, 32, 32), (None, 16, 16, 64), (None, 8, 8, 128)]
        )

    @parameterized.parameters(4, 15, 41)
    def test_impossible_depth_names_the_possible_ones(self, depth):
        with self.assertRaisesRegex(
            ConfigError, rf"depth is {depth}; a WRN needs 10, 16, 22, 28, .*6 n \+ 4"
        ):
            models.build_model(f"wrn_{depth}_1", (32, 32, 3), 10)

    def test_width_of_zero_is_refused(self):
        with self.assertRaisesRegex(ConfigError, "width is 0; it must be at least 1"):
            models.build_model("wrn_16_0", (32, 32, 3), 10)


class Twin:
    """Computes what a network's layers should, in training, without Keras.

    Statistics of the batch, unlike random running ones, keep images apart through all
    layers, so that a mistake in the first of them shows in the logits.
    """

    def __init__(self, model):
        self._layer = model.get_layer

    def conv(self, x, name, strides=1):
        return tf.nn.conv2d(x, self._layer(name).kernel, strides, "SAME").numpy()

    def depthwise(self, x, name, strides):
        kernel = self._layer(name).depthwise_kernel
        steps = (1, strides, strides, 1)
        return tf.nn.depthwise_conv2d(x, kernel, steps, "SAME").numpy()

    def bn(self, x, name):
        bn = self._layer(f"{name}_bn")
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        x = (x - mean) / np.sqrt(variance + 1e-5)
        return x * bn.gamma.numpy() + bn.beta.numpy()

    def bn_relu(self, x, name):
        return np.maximum(self.bn(x, name), 0.0)

    def max_pool(self, x):
        batch, height, width, channels = x.shape
        height, width = height // 2, width // 2
        x = x[:, : 2 * height, : 2 * width]
        return x.reshape(batch, height, 2, width, 2, channels).max(axis=(2, 4))

    def logits(self, x):
        dense = self._layer("logits")
        return x.mean(axis=(1, 2)) @ dense.kernel.numpy() + dense.bias.numpy()


class NetworkTestCase(parameterized.TestCase, tf.test.TestCase):
    def assertComputes(self, model, function):
        """Compares a network with a function of its Twin and a batch of images."""
        images = helpers.random_inputs(helpers.randomise(model))
        expected = function(Twin(model), images)
        # Else nothing that comes before the last layers would matter.
        self.assertGreater(expected.std(axis=0).min(), 0.05)
        logits = model(images, training=True)
        self.assertAllClose(logits, expected, rtol=1e-3, atol=1e-3)


def _resnet_parameters(blocks, num_classes):
    """(trainable, stored BN statistics) of the paper's table, with a 3x3 stem."""
    kernels, bn_channels = 3 * 3 * 3 * 64, 64
    inputs = 64
    for outputs, repeats in zip((64, 128, 256, 512), blocks, strict=True):
        for _ in range(repeats):
            kernels += 9 * inputs * outputs + 9 * outputs * outputs
            bn_channels += 2 * outputs
            if inputs != outputs:  # A projection, with a BN of its own.
                kernels += inputs * outputs
                bn_channels += outputs
            inputs = outputs
    dense = inputs * num_classes + num_classes
    return kernels + 2 * bn_channels + dense, 2 * bn_channels


def _resnet_18(twin, images):
    x = twin.bn_relu(twin.conv(images, "stem_conv"), "stem")
    for stage in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"stage{stage}_block{block}"
            shortcut, strides = x, 1
            if stage > 1 and block == 1:
                strides = 2
                shortcut = twin.conv(x, f"{name}_shortcut_conv", strides)
                shortcut = twin.bn(shortcut, f"{name}_shortcut")
            y = twin.bn_relu(twin.conv(x, f"{name}_conv1", strides), f"{name}_1")
            y = twin.bn(twin.conv(y, f"{name}_conv2"), f"{name}_2")
            x = np.maximum(shortcut + y, 0.0)
    return twin.logits(x)


class ResnetTest(NetworkTestCase):
    def test_has_the_layers_and_parameters_of_the_paper(self):
        self.check_parameters(18, (2, 2, 2, 2), 11_173_962)

    @pytest.mark.long
    def test_so_has_the_larger_one(self):
        self.check_parameters(34, (3, 4, 6, 3), 21_282_122)

    def check_parameters(self, depth, blocks, known):
        model = models.build_model(f"resnet_{depth}", (32, 32, 3), 10)
        trainable, stored = _resnet_parameters(blocks, 10)
        self.assertEqual(trainable, known)
        self.assertEqual(_trainable(model), trainable)
        self.assertEqual(model.count_params(), trainable + stored)
        # Three projections apart, the depth counts all convolutions and the dense one.
        self.assertEqual(_types(model).count("Conv2D") - 3 + 1, depth)
        self.assertEqual(_last_map(model), (4, 4, 512))

    def test_all_stages_but_the_first_halve_the_size(self):
        model = models.build_model("resnet_18", (32, 48, 3), 10)
        shapes = [
            model.get_layer(f"stage{i}_block{block}_add").output_shape[1:]
            for i in (1, 2, 3, 4)
            for block in (1, 2)
        ]
        expected = [(32, 48, 64), (16, 24, 128), (8, 12, 256), (4, 6, 512)]
        self.assertEqual(shapes[::2], expected)
        self.assertEqual(shapes[1::2], expected)

    def test_computes_what_the_paper_says(self):
        model = models.build_model("resnet_18", (9, 13, 1), 4)
        self.assertEqual(model.input_shape, (None, 9, 13, 1))
        self.assertEqual(model.output_shape, (None, 4))
        self.assertComputes(model, _resnet_18)

    @parameterized.parameters(0, 10, 50, 101)
    def test_other_depth_names_the_possible_ones(self, depth):
        with self.assertRaisesRegex(
            ConfigError, rf"depth is {depth}; a ResNet here has \[18, 34\]"
        ):
            models.build_model(f"resnet_{depth}", (32, 32, 3), 10)


# Inputs and outputs of the convolutions in column A of the paper's table 1.
_VGG_11 = (
    *((3, 64), (64, 128), (128, 256), (256, 256)),
    *((256, 512), (512, 512), (512, 512), (512, 512)),
)


def _vgg_11(twin, images):
    x = images
    for group, convs in enumerate((1, 1, 2, 2, 2), start=1):
        for index in range(1, convs + 1):
            name = f"group{group}_{index}"
            x = twin.bn_relu(twin.conv(x, f"{name}_conv"), name)
        x = twin.max_pool(x)
    return twin.logits(x)


class VggTest(NetworkTestCase):
    def test_has_the_layers_and_parameters_of_the_paper(self):
        model = models.build_model("vgg_11", (32, 32, 3), 10)
        kernels = [
            layer.kernel.shape
            for layer in model.layers
            if isinstance(layer, keras.layers.Conv2D)
        ]
        self.assertEqual(kernels, [(3, 3, *channels) for channels in _VGG_11])
        bn_channels = sum(outputs for _, outputs in _VGG_11)
        trainable = sum(9 * i * o for i, o in _VGG_11) + 2 * bn_channels + 513 * 10
        self.assertEqual(_trainable(model), trainable)
        self.assertEqual(model.count_params(), trainable + 2 * bn_channels)

    @parameterized.parameters((32, 32, 1, 1), (63, 224, 1, 7))
    def test_halves_images_five_times(self, height, width, rows, columns):
        model = models.build_model("vgg_11", (height, width, 3), 10)
        self.assertEqual(_last_map(model), (rows, columns, 512))

    def test_computes_what_the_paper_says(self):
        model = models.build_model("vgg_11", (32, 67, 1), 4)
        self.assertEqual(model.input_shape, (None, 32, 67, 1))
        self.assertEqual(model.output_shape, (None, 4))
        self.assertComputes(model, _vgg_11)

    @parameterized.parameters(0, 13, 16, 19)
    def test_other_depth_names_the_possible_ones(self, depth):
        with self.assertRaisesRegex(
            ConfigError, rf"depth is {depth}; a VGG here has \[11\]"
        ):
            models.build_model(f"vgg_{depth}", (32, 32, 3), 10)

    @parameterized.parameters(((16, 16, 3),), ((31, 64, 3),), ((64, 31, 3),))
    def test_images_that_are_too_small_are_refused(self, shape):
        with self.assertRaisesRegex(
            ConfigError,
            rf"input_shape is {re.escape(str(shape))}; vgg_11 halves images 5 times, "
            "so it needs sides of at least 32 pixels",
        ):
            models.build_model("vgg_11", shape, 10)


def _mobilenet_parameters(widths, num_classes):
    """(trainable, stored BN statistics); the first width is the stem's."""
    kernels, bn_channels = 3 * 3 * 3 * widths[0], widths[0]
    for inputs, outputs in zip(widths, widths[1:]):
        kernels += 3 * 3 * inputs + inputs * outputs
        bn_channels += inputs + outputs
    dense = widths[-1] * num_classes + num_classes
    return kernels + 2 * bn_channels + dense, 2 * bn_channels


def _mobilenet(twin, images):
    """For images below 64 pixels."""
    x = twin.bn_relu(twin.conv(images, "stem_conv"), "stem")
    for block, strides in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1), start=1):
        name = f"block{block}"
        x = twin.depthwise(x, f"{name}_depthwise", strides)
        x = twin.conv(twin.bn_relu(x, f"{name}_1"), f"{name}_conv")
        x = twin.bn_relu(x, f"{name}_2")
    return twin.logits(x)


def _convolutions(model):
    """Type, kernel and output shape of every convolution, without Keras's classifier.

    Keras writes the dense layer of a MobileNet as a 1x1 convolution.
    """
    kinds = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
    return [
        (type(layer).__name__, layer.weights[0].shape, layer.output_shape)
        for layer in model.layers
        if isinstance(layer, kinds) and layer.name != "conv_preds"
    ]


class MobilenetTest(NetworkTestCase):
    # Channels of the stem and of the blocks: those of the paper's table 1 times the
    # percentage, to the nearest multiple of 8, by hand.
    @parameterized.parameters(
        (10, (8, 8, 16, 16, 24, 24, *(48,) * 6, 104, 104)),
        (30, (8, 16, 40, 40, 80, 80, *(152,) * 6, 304, 304)),
    )
    def test_has_the_channels_and_parameters_of_the_paper(self, percent, widths):
        self.check_parameters(percent, widths)

    @parameterized.parameters(
        (100, (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024)),
        (140, (48, 88, 176, 176, 360, 360, *(720,) * 6, 1432, 1432)),
    )
    @pytest.mark.long
    def test_so_have_the_large_ones(self, percent, widths):
        self.check_parameters(percent, widths)

    def check_parameters(self, percent, widths):
        model = models.build_model(f"mobilenet_v1_{percent}", (32, 32, 3), 10)
        outputs = [
            layer.filters
            for layer in model.layers
            if type(layer) is keras.layers.Conv2D
        ]
        self.assertEqual(outputs, list(widths))
        trainable, stored = _mobilenet_parameters(widths, 10)
        self.assertEqual(_trainable(model), trainable)
        self.assertEqual(model.count_params(), trainable + stored)
        self.assertEqual(_last_map(model), (2, 2, widths[-1]))
        self.assertEqual(_types(model).count("DepthwiseConv2D"), 13)

    @parameterized.parameters((100, 4.2), (75, 2.6), (25, 0.5))
    @pytest.mark.long
    def test_has_the_published_millions_of_parameters(self, percent, published):
        model = models.build_model(f"mobilenet_v1_{percent}", (64, 64, 3), 1000)
        self.assertEqual(round(_trainable(model) / 1e6, 1), published)

    def test_has_the_convolutions_of_keras_own(self):
        shape = (64, 96, 3)
        model = models.build_model("mobilenet_v1_50", shape, 10)
        keras_own = keras.applications.MobileNet(
            shape, alpha=0.5, weights=None, classes=10
        )
        self.assertLen(_convolutions(model), 27)
        self.assertEqual(_convolutions(model), _convolutions(keras_own))
        self.assertEqual(model.count_params(), keras_own.count_params())

    @parameterized.parameters(
        ((63, 64), (63, 64), (4, 4)),
        ((64, 63), (64, 63), (4, 4)),
        ((64, 64), (32, 32), (2, 2)),
        ((64, 128), (32, 64), (2, 4)),
    )
    @pytest.mark.long
    def test_stem_has_strides_from_64_pixels(self, sides, stem, last):
        model = models.build_model("mobilenet_v1_1", (*sides, 3), 10)
        self.assertEqual(model.get_layer("stem_conv").output_shape, (None, *stem, 8))
        self.assertEqual(_last_map(model), (*last, 8))

    def test_computes_what_the_paper_says(self):
        model = models.build_model("mobilenet_v1_10", (19, 35, 2), 4)
        self.assertEqual(model.input_shape, (None, 19, 35, 2))
        self.assertEqual(model.output_shape, (None, 4))
        self.assertComputes(model, _mobilenet)

    @parameterized.parameters(0, 401, 500)
    def test_impossible_width_names_the_possible_ones(self, percent):
        with self.assertRaisesRegex(
            ConfigError,
            rf"percent is {percent}; the width of a MobileNet is 1 to 400 percent",
        ):
            models.build_model(f"mobilenet_v1_{percent}", (32, 32, 3), 10)

    @pytest.mark.long
    def test_width_of_400_percent_is_possible(self):
        with tf.Graph().as_default():  # Its 50 million weights stay without values.
            model = models.build_model("mobilenet_v1_400", (32, 32, 3), 10)
            self.assertEqual(_last_map(model), (2, 2, 4096))


class SharedLayersTest(parameterized.TestCase, tf.test.TestCase):
    def test_kernels_keep_the_variance_through_relu(self):
        image = keras.layers.Input((5, 7, 64))
        model = keras.Model(image, conv(image, 128, 3, 2, name="conv"))
        self.assertEqual(model.output_shape, (None, 3, 4, 128))
        (kernel,) = model.get_weights()
        # Half of each variance of 1 comes through a ReLU, 3 * 3 * 64 times.
        self.assertAllClose(kernel.var() * 3 * 3 * 64 / 2, 1.0, rtol=0.03)

    def test_running_mean_takes_a_tenth_of_each_batch(self):
        image = keras.layers.Input((3, 5, 2))
        model = helpers.randomise(keras.Model(image, bn(image, "stem")))
        images = helpers.random_inputs(model)
        before = model.get_layer("stem_bn").moving_mean.numpy()
        model(images, training=True)
        expected = 0.9 * before + 0.1 * images.mean(axis=(0, 1, 2))
        self.assertAllClose(model.get_layer("stem_bn").moving_mean, expected)


class NamesTest(parameterized.TestCase, tf.test.TestCase):
    # The names that the list, which users read, gives in full.
    NAMES = re.findall(r"\b[a-z][a-z0-9_]*_\d+\b", " ".join(models.MODEL_NAMES))

    def test_list_shows_every_family(self):
        self.assertContainsSubset(
            {"wrn_16_1", "resnet_18", "resnet_34", "vgg_11", "mobilenet_v1_100"},
            self.NAMES,
        )

    @parameterized.parameters(*NAMES)
    @pytest.mark.long
    def test_listed_name_builds(self, name):
        self.assertTrue(models.is_model_name(name))
        model = models.build_model(name, (32, 40, 1), 7)
        self.assertEqual(model.name, name)
        self.assertEqual(model.input_shape, (None, 32, 40, 1))
        self.assertEqual(model.output_shape, (None, 7))

    @parameterized.parameters("wrn_10_1", "resnet_18", "vgg_11", "mobilenet_v1_1")
    @pytest.mark.long
    def test_layers_have_names_of_their_own(self, name):
        # Keras would number layers without a name on, from one network to the next.
        one, two = (
            [layer.name for layer in models.build_model(name, (32, 32, 3), 10).layers]
            for _ in range(2)
        )
        self.assertEqual(one, two)
        self.assertLen(set(one), len(one))

    @parameterized.parameters(
        *("resnet", "wrn_16", "wrn_16_1_2", "my_wrn_16_1", ""),
        *("resnet_18_1", "my_resnet_18", "vgg11", "mobilenet_100", "mobilenet_v1"),
    )
    def test_unknown_name_shows_the_known_ones(self, name):
        self.assertFalse(models.is_model_name(name))
        with self.assertRaisesRegex(
            ConfigError, f"model is '{name}'; the project builds: wrn_DEPTH_WIDTH"
        ) as raised:
            models.build_model(name, (32, 32, 3), 10)
        for known in self.NAMES:
            self.assertIn(known, str(raised.exception))

    @parameterized.parameters("wrn_16_1", "resnet_18", "vgg_11", "mobilenet_v1_25")
    def test_known_name_is_told(self, name):
        self.assertTrue(models.is_model_name(name))
        self.assertFalse(models.is_model_name(f"{name}.keras"))


if __name__ == "__main__":
    tf.test.main()
