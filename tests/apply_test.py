import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ModelError, TrainingError, UnsupportedLayerError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply, calibration, registry
from dfq_tf.settings import BitWidths
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


def depthwise(multiplier):
    """A network with a depthwise kernel of channels of all sizes, and that kernel."""
    keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 3))
    x = layers.DepthwiseConv2D(3, depth_multiplier=multiplier, name="depth")(image)
    x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
    model = keras.Model(image, x)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, multiplier))
    kernel *= np.geomspace(0.01, 1, 3 * multiplier).reshape(3, multiplier)
    model.get_layer("depth").depthwise_kernel.assign(kernel)
    return Classifier(model, description()), kernel


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


def all_bits(num_bits, activation=8, per_channel=True):
    """Widths that are the same for all kernels, the first and last ones too."""
    return BitWidths(num_bits, activation, per_channel, num_bits, num_bits, num_bits)


def quantized(classifier, widths=BitWidths(), ranges=None, weight_range="mse"):
    """The student of a network, calibrated on images unless ranges are given."""
    graph, fed = apply.integer_ready(classifier)
    if ranges is None:
        images = networks.images(classifier.image_shape, 32)
        ranges = calibration.calibrate(graph, fed, images, widths)
    return apply.quantize_graph(graph, fed, widths, ranges, weight_range)


def kernel_of(student, name):
    """The kernel that a layer of the student computes with."""
    wrapper = student.model.get_layer(f"quant_{name}")
    wrapper(tf.zeros((1, *wrapper.input_shape[1:])))  # puts it in place
    return getattr(wrapper.layer, wrapper.quantize_config.kernel).numpy()


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
        x = layers.Conv2D(4, 3, activation="elu", name="odd")(image)
        x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
        classifier = Classifier(keras.Model(image, x), description())
        with self.assertRaisesRegex(UnsupportedLayerError, "layer odd .*elu"):
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
        widths = all_bits(num_bits, per_channel=per_channel)
        student = quantized(classifier, widths, weight_range="min_max")
        kernel, bias = folded(classifier.model)
        self.assertAllClose(
            kernel_of(student, "conv"),
            symmetric(kernel, num_bits, per_channel),
            atol=1e-5,
        )
        layer = student.model.get_layer("quant_conv").layer
        self.assertAllClose(layer.bias, bias, atol=1e-5)

    @parameterized.parameters(1, 2)
    def test_depthwise_kernel_has_a_range_per_output(self, multiplier):
        classifier, kernel = depthwise(multiplier)
        student = quantized(classifier, weight_range="min_max")
        scale = np.abs(kernel).max(axis=(0, 1)) / 127
        expected = np.round(kernel / scale) * scale
        self.assertAllClose(
            kernel_of(student, "depth") / scale, expected / scale, atol=1e-3
        )

    @parameterized.parameters(2, 3, 4)
    def test_weight_ranges_have_the_least_squared_error(self, num_bits):
        classifier = conv_dense()
        kernel, _ = folded(classifier.model)
        student = quantized(classifier, all_bits(num_bits), weight_range="mse")
        errors = np.square(kernel_of(student, "conv") - kernel).sum(axis=(0, 1, 2))
        least = least_squared_errors(kernel, num_bits)
        self.assertAllInRange(errors / least, 0.95, 1.05)
        extremes = np.square(symmetric(kernel, num_bits, True) - kernel)
        self.assertGreater(np.max(extremes.sum(axis=(0, 1, 2)) / least), 1.1)

    @parameterized.parameters(1, 2)
    def test_least_squared_error_of_a_depthwise_kernel(self, multiplier):
        classifier, kernel = depthwise(multiplier)
        student = quantized(classifier, all_bits(3), weight_range="mse")
        errors = np.square(kernel_of(student, "depth") - kernel).sum(axis=(0, 1))
        least = least_squared_errors(kernel.reshape(3, 3, -1), 3)
        self.assertAllInRange(errors.ravel() / least, 0.9, 1.05)

    def test_weight_ranges_have_the_least_squared_error_by_default(self):
        classifier = conv_dense()
        graph, fed = apply.integer_ready(classifier)
        ranges = {"pixels": (-120 / 64, 135 / 64), "relu": (0.0, 2.0)}
        ranges["logits_as_conv"] = (-3.0, 4.0)
        default = apply.quantize_graph(graph, fed, all_bits(3), ranges)
        least = quantized(classifier, all_bits(3), ranges, "mse")
        extremes = quantized(classifier, all_bits(3), ranges, "min_max")
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
        classifier = networks.build("mobilenet_like")
        graph, _ = apply.integer_ready(classifier)
        kernels = [n for n in graph.nodes.values() if n.kind in registry.KERNELS]
        first, *inner, last = kernels
        self.assertLen(inner, 5)
        bits = {first.name: 5, last.name: 6}
        for node in inner:
            bits[node.name] = 3 if node.kind == "DepthwiseConv2D" else 4
        self.assertCountEqual(bits.values(), [5, 6, 3, 3, 3, 4, 4])
        student = quantized(classifier, widths, weight_range=weight_range)
        for node in kernels:
            kernel = kernel_of(student, node.name)
            outputs = 2 if node.kind == "DepthwiseConv2D" else 1
            axes = tuple(range(kernel.ndim - outputs)) if per_channel else None
            integers = kernel / np.abs(kernel).max(axis=axes, keepdims=True)
            integers *= 2 ** (bits[node.name] - 1) - 1
            self.assertAllClose(integers, np.round(integers), rtol=0, atol=1e-3)
            # Fewer bits would leave multiples of something.
            integers = np.round(integers).astype(int)
            self.assertEqual(np.gcd.reduce(integers.ravel()), 1)

    @parameterized.parameters(
        BitWidths(),
        all_bits(4, 6, False),
        BitWidths(8, 6, False, num_bits_first=4, num_bits_last=3),
        all_bits(8, 4),
    )
    def test_student_equals_float_layers_fed_with_quantized_numbers(self, widths):
        classifier = conv_dense()
        images = networks.images(classifier.image_shape, 16)
        ranges = {"pixels": (-120 / 64, 135 / 64), "relu": (0.0, 2.0)}
        ranges["logits_as_conv"] = (-3.0, 4.0)
        student = quantized(classifier, widths, ranges, "min_max")

        bits, per_channel = widths.num_bits_activation, widths.per_channel
        kernel, bias = folded(classifier.model)
        kernel = symmetric(kernel, widths.num_bits_first, per_channel)
        x = affine((images.astype(np.float64) - 120) / 64, *ranges["pixels"], 8)
        x = tf.nn.conv2d(x, kernel, 1, "SAME").numpy() + bias
        x = affine(np.maximum(x, 0), *ranges["relu"], bits)
        dense, dense_bias = classifier.model.get_layer("logits").get_weights()
        dense = dense.astype(np.float64)
        dense = symmetric(dense, widths.num_bits_last, per_channel)
        x = x.reshape(len(x), -1) @ dense + dense_bias
        expected = affine(x, *ranges["logits_as_conv"], 8)

        step = 7.0 / 255
        steps = np.round(np.abs(student.scores(images) - expected) / step)
        # A ReLU that float32 puts on the other side moves the logits by a share of
        # its own step, which is wider than theirs.
        self.assertLessEqual(steps.max(), 1 if bits == 8 else 8)
        self.assertLess(np.mean(steps > 0), 0.05)

    def test_fine_widths_come_close_to_the_float_network(self):
        classifier = networks.build("resnet_like")
        images = networks.images(classifier.image_shape, 32)
        scores = classifier.scores(images)
        errors = []
        for widths in (all_bits(2, 4), all_bits(4, 6), all_bits(8, 8), all_bits(8, 16)):
            student = quantized(classifier, widths)
            errors.append(np.mean(np.abs(student.scores(images) - scores)))
        for coarse, fine in zip(errors, errors[1:]):
            self.assertGreater(coarse, fine)
        self.assertLess(errors[2], 0.02 * np.ptp(scores))

    def test_sixteen_bits_are_symmetric(self):
        classifier = conv_dense()
        ranges = {"pixels": (-120 / 64, 135 / 64), "relu": (0.0, 2.0)}
        ranges["logits_as_conv"] = (-7.0, 4.0)
        student = quantized(classifier, BitWidths(8, 16), ranges)
        kept = {}
        for name in ranges:
            variables = apply.range_variables(student.model.get_layer(f"quant_{name}"))
            kept[name] = tuple(
                float(variables[f"output_{end}"].numpy()) for end in ("min", "max")
            )
        self.assertEqual(
            kept,
            {
                "pixels": ranges["pixels"],
                "relu": (-2.0, 2.0),
                "logits_as_conv": (-7.0, 7.0),
            },
        )
        scores = student.scores(networks.images(classifier.image_shape, 16))
        integers = scores * (32767 / 7.0)
        self.assertAllClose(integers, np.round(integers), rtol=0, atol=0.02)
        # No grid of 8 bits has them all.
        self.assertNotAllClose(
            scores * (127 / 7), np.round(scores * (127 / 7)), atol=0.1
        )

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
        kernel = kernel_of(student, "conv")
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


if __name__ == "__main__":
    tf.test.main()
