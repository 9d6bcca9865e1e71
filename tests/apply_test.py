import numpy as np
from absl.testing import parameterized

from dfq_tf import calibration
from dfq_tf.classifier import Classifier
from dfq_tf.compat import keras, tf
from dfq_tf.config import BitWidths
from dfq_tf.description import ModelDescription
from dfq_tf.errors import ConfigError, ModelError, TrainingError, UnsupportedLayerError
from dfq_tf.graph import Graph
from dfq_tf.quantization import apply
from tests import networks

layers = keras.layers


def description(mean=(120.0,), scale=(1 / 64,), num_classes=networks.NUM_CLASSES):
    names = tuple(f"class {i}" for i in range(num_classes))
    return ModelDescription(mean, scale, "logits", names)


def conv_dense():
    """Convolution with BN and ReLU, flatten, dense: small enough for a NumPy twin."""
    keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Dense(networks.NUM_CLASSES, name="logits")(layers.Flatten()(x))
    model = keras.Model(image, x)
    networks.randomize(model, 0)
    return Classifier(model, description())


def folded(model):
    """Kernel and bias of `conv` with `bn` in them, float64."""
    gamma, beta, mean, variance = (
        w.astype(np.float64) for w in model.get_layer("bn").get_weights()
    )
    (kernel,) = model.get_layer("conv").get_weights()
    scale = gamma / np.sqrt(variance + model.get_layer("bn").epsilon)
    return kernel * scale, beta - mean * scale


def symmetric(kernel, num_bits, per_channel):
    """Quantizes and dequantizes a kernel by its largest magnitude, float64."""
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.abs(kernel).max(axis=axes) / (2 ** (num_bits - 1) - 1)
    return np.round(kernel / scale) * scale


def affine(values, low, high, num_bits):
    """Quantizes and dequantizes values, 0 being one of them, float64."""
    scale = (high - low) / (2**num_bits - 1)
    zero_point = np.round(-low / scale)
    integers = np.floor(values / scale + zero_point + 0.5)
    return (np.clip(integers, 0, 2**num_bits - 1) - zero_point) * scale


def quantized(classifier, widths=BitWidths(), ranges=None, count=32):
    """The student of a network, calibrated on images unless ranges are given."""
    graph, fed = apply.integer_ready(classifier)
    if ranges is None:
        images = networks.images(classifier.image_shape, count)
        ranges = calibration.calibrate(graph, fed, images)
    return apply.quantize_graph(graph, fed, widths, ranges)


class IntegerReadyTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=list(networks.NETWORKS), normalisation=("integer", "fraction", "channels")
    )
    def test_equals_the_float_network_on_raw_pixels(self, name, normalisation):
        channels = networks.NETWORKS[name]().input_shape[-1]
        mean, scale = {
            "integer": ((120.0,), (1 / 64,)),
            "fraction": ((125.3,), (1 / 50,)),
            "channels": ((123.7, 116.3, 103.5), (0.017, 0.0175, 0.02)),
        }[normalisation]
        if normalisation == "channels" and channels == 1:
            self.skipTest("the network has one channel")
        classifier = networks.build(name, mean=mean, scale=scale)
        images = networks.images(classifier.image_shape, 20)
        expected = classifier.scores(images)
        graph, fed = apply.integer_ready(classifier)
        logits = Classifier(graph.build(), fed).scores(images)
        if classifier.description.output == "softmax":
            exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
            logits = exponentials / exponentials.sum(axis=-1, keepdims=True)
        self.assertEqual(fed.output, "logits")
        self.assertAllClose(logits, expected, rtol=1e-4, atol=1e-4)
        kinds = {node.kind for node in graph.nodes.values()}
        self.assertNoCommonElements(kinds, {"BatchNormalization", "Dense", "Dropout"})

    @parameterized.parameters(
        ((120.0,), (1 / 64,), True),
        ((0.0, 0.0, 0.0), (1.0,), True),
        ((120.5,), (1 / 64,), False),
        ((-1.0,), (1 / 64,), False),
        ((256.0,), (1 / 64,), False),
        ((120.0, 120.0, 110.0), (1 / 64,), False),
        ((120.0,), (0.1, 0.2, 0.3), False),
    )
    def test_a_zero_point_needs_no_layer(self, mean, scale, is_zero_point):
        classifier = networks.build("resnet_like", mean=mean, scale=scale)
        graph, fed = apply.integer_ready(classifier)
        self.assertEqual("normalize" not in graph.nodes, is_zero_point)
        if not is_zero_point:
            self.assertEqual((fed.input_mean, fed.input_scale), ((0.0,), (1.0,)))
        self.assertEqual(apply.quantized_nodes(graph)[0], "pixels")

    def test_names_the_layer_without_integer_form(self):
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, activation="tanh", name="odd")(image)
        x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
        classifier = Classifier(keras.Model(image, x), description())
        with self.assertRaisesRegex(UnsupportedLayerError, "layer odd .*tanh"):
            apply.integer_ready(classifier)

    def test_names_the_layer_with_nan_weights(self):
        classifier = networks.build("vgg_like")
        layer = next(la for la in classifier.model.layers if la.weights)
        kernel, *others = layer.get_weights()
        kernel[0, 0, 0, 0] = np.nan
        layer.set_weights([kernel, *others])
        with self.assertRaisesRegex(ModelError, f"layer {layer.name} .*has NaN"):
            apply.integer_ready(classifier)

    def test_leaves_the_network_as_it_was(self):
        classifier = networks.build("vgg_like")
        before = classifier.model.get_weights()
        apply.integer_ready(classifier)
        for weight, value in zip(classifier.model.get_weights(), before):
            self.assertAllEqual(weight, value)


class QuantizeGraphTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(num_bits=(2, 4, 8), per_channel=(False, True))
    def test_kernel_equals_numpy(self, num_bits, per_channel):
        classifier = conv_dense()
        widths = BitWidths(num_bits_weight=num_bits, per_channel=per_channel)
        student = quantized(classifier, widths)
        wrapper = student.model.get_layer("quant_conv")
        wrapper(tf.zeros((1, 8, 8, 3)))  # puts the quantized kernel in place
        kernel, bias = folded(classifier.model)
        self.assertAllClose(
            wrapper.layer.kernel, symmetric(kernel, num_bits, per_channel), atol=1e-5
        )
        self.assertAllClose(wrapper.layer.bias, bias, atol=1e-5)

    @parameterized.parameters(1, 2)
    def test_depthwise_kernel_has_a_range_per_output(self, multiplier):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.DepthwiseConv2D(3, depth_multiplier=multiplier, name="depth")(image)
        x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
        model = keras.Model(image, x)
        kernel = np.random.default_rng(0).normal(size=(3, 3, 3, multiplier))
        kernel *= np.geomspace(0.01, 1, 3 * multiplier).reshape(3, multiplier)
        model.get_layer("depth").depthwise_kernel.assign(kernel)
        student = quantized(Classifier(model, description()))
        wrapper = student.model.get_layer("quant_depth")
        wrapper(tf.zeros((1, 8, 8, 3)))
        scale = np.abs(kernel).max(axis=(0, 1)) / 127
        expected = np.round(kernel / scale) * scale
        self.assertAllClose(
            wrapper.layer.depthwise_kernel / scale, expected / scale, atol=1e-3
        )

    @parameterized.parameters(BitWidths(), BitWidths(4, 6, False))
    def test_student_equals_float_layers_fed_with_quantized_numbers(self, widths):
        classifier = conv_dense()
        images = networks.images(classifier.image_shape, 16)
        ranges = {"pixels": (-120 / 64, 135 / 64), "relu": (0.0, 2.0)}
        ranges["logits_as_conv"] = (-3.0, 4.0)
        student = quantized(classifier, widths, ranges)

        weight_bits, bits = widths.num_bits_weight, widths.num_bits_activation
        kernel, bias = folded(classifier.model)
        kernel = symmetric(kernel, weight_bits, widths.per_channel)
        x = affine((images.astype(np.float64) - 120) / 64, *ranges["pixels"], bits)
        x = tf.nn.conv2d(x, kernel, 1, "SAME").numpy() + bias
        x = affine(np.maximum(x, 0), *ranges["relu"], bits)
        dense, dense_bias = classifier.model.get_layer("logits").get_weights()
        dense = symmetric(dense.astype(np.float64), weight_bits, widths.per_channel)
        x = x.reshape(len(x), -1) @ dense + dense_bias
        expected = affine(x, *ranges["logits_as_conv"], bits)

        step = 7.0 / (2**bits - 1)
        steps = np.round(np.abs(student.scores(images) - expected) / step)
        self.assertLessEqual(steps.max(), 1)  # where float32 falls on the other side
        self.assertLess(np.mean(steps > 0), 0.05)

    def test_fine_widths_come_close_to_the_float_network(self):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 32)
        scores = classifier.scores(images)
        errors = []
        for bits in (2, 4, 8):
            student = quantized(classifier, BitWidths(bits, bits))
            errors.append(np.mean(np.abs(student.scores(images) - scores)))
        self.assertGreater(errors[0], errors[1])
        self.assertGreater(errors[1], errors[2])
        self.assertLess(errors[2], 0.02 * np.ptp(scores))

    def test_outputs_lie_on_the_grid_of_their_range(self):
        classifier = conv_dense()
        ranges = {"pixels": (-120 / 64, 135 / 64), "relu": (0.0, 2.0)}
        ranges["logits_as_conv"] = (-255.0, 0.0)
        scores = quantized(classifier, ranges=ranges).scores(
            networks.images(classifier.image_shape, 16)
        )
        self.assertAllClose(scores, np.round(scores), atol=1e-4)
        self.assertLessEqual(scores.max(), 0.0)
        self.assertGreater(len(np.unique(scores)), 1)

    def test_training_leaves_the_ranges(self):
        student = quantized(conv_dense())
        trained = {v.name.split("/")[-1] for v in student.model.trainable_variables}
        self.assertEqual(trained, {"kernel:0", "bias:0"})
        ranges = [v.numpy() for v in student.model.non_trainable_variables]
        images = tf.random.stateless_uniform((4, 8, 8, 3), (0, 0), -50, 50)
        student.model(images, training=True)
        for variable, value in zip(student.model.non_trainable_variables, ranges):
            self.assertAllEqual(variable, value)

    def test_frozen_teacher_gives_a_student_that_trains(self):
        classifier = conv_dense()
        expected = quantized(classifier)
        classifier.model.trainable = False
        student = quantized(classifier)
        images = networks.images(classifier.image_shape, 4)
        self.assertAllEqual(student.scores(images), expected.scores(images))
        self.assertLen(student.model.trainable_variables, 4)

    def test_channel_of_zeros_stays_zero(self):
        classifier = conv_dense()
        gamma = classifier.model.get_layer("bn").gamma
        gamma.assign(np.where(np.arange(6) == 2, 0.0, gamma.numpy()))
        student = quantized(classifier)
        wrapper = student.model.get_layer("quant_conv")
        wrapper(tf.zeros((1, 8, 8, 3)))
        kernel = wrapper.layer.kernel.numpy()
        self.assertAllEqual(kernel[..., 2], np.zeros((3, 3, 3)))
        self.assertAllInRange(np.abs(kernel).max(axis=(0, 1, 2))[3:], 1e-3, 10)


class CheckedRangesTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        image = layers.Input((8, 8, 3))
        a = layers.Conv2D(4, 3, padding="same", name="a")(image)
        b = layers.ReLU(name="b")(a)
        x = layers.Concatenate(name="ab")([a, b])
        self.graph = Graph.from_model(keras.Model(image, x))
        pixels = apply.Node(
            "pixels",
            layers.Activation,
            {"activation": "linear"},
            (),
            (self.graph.input_name,),
            (8, 8, 3),
        )
        self.graph = self.graph.with_head([pixels])

    def checked(self, **ranges):
        return apply.checked_ranges(self.graph, description(), ranges)

    def test_holds_zero(self):
        graph, fed = apply.integer_ready(conv_dense())
        measured = {"relu": (0.5, 2.0), "logits_as_conv": (-3.0, -1.0)}
        ranges = apply.checked_ranges(graph, fed, measured)
        self.assertEqual(ranges["relu"], (0.0, 2.0))
        self.assertEqual(ranges["logits_as_conv"], (-3.0, 0.0))

    def test_tied_outputs_share_the_widest(self):
        ranges = self.checked(a=(-2.0, 1.0), b=(0.0, 1.0), ab=(-1.0, 5.0))
        for name in ("a", "b", "ab"):
            self.assertEqual(ranges[name], (-2.0, 5.0))

    def test_output_of_zeros_gets_a_range(self):
        ranges = self.checked(a=(0.0, 0.0), b=(0.0, 0.0), ab=(0.0, 0.0))
        self.assertEqual(ranges["a"], (0.0, 1.0))

    def test_not_finite_is_refused(self):
        for low, high in ((float("nan"), 1.0), (0.0, float("inf"))):
            with self.assertRaisesRegex(
                TrainingError, f"output of layer b is not finite.* {low} to {high}"
            ):
                self.checked(a=(0.0, 1.0), b=(low, high))

    def test_pixels_have_their_own(self):
        ranges = self.checked(pixels=(0.0, 0.1), a=(0.0, 1.0))
        self.assertEqual(ranges["pixels"], (-120 / 64, 135 / 64))
        raw = description((0.0,), (1.0,))
        self.assertEqual(apply.pixel_range(raw), (0.0, 255.0))


class CheckWidthsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((4, 8), (8, 4), (2, 2))
    def test_refuses_what_cannot_be_written(self, weight, activation):
        with self.assertRaisesRegex(
            ConfigError,
            f"num_bits_weight is {weight} and num_bits_activation is {activation}; "
            "only 8 and 8",
        ):
            apply.check_widths(BitWidths(weight, activation))

    def test_takes_eight_bits_per_channel_or_not(self):
        for per_channel in (True, False):
            self.assertIsNone(apply.check_widths(BitWidths(per_channel=per_channel)))


if __name__ == "__main__":
    tf.test.main()
