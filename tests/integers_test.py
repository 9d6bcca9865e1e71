import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply, calibration, integers
from dfq_tf.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import helpers, networks

layers = keras.layers


def unrounded(classifier, widths=BitWidths()):
    """A student whose biases are still those of the float network."""
    images = networks.images(classifier.image_shape, 32, seed=1)
    graph, description = apply.integer_ready(classifier)
    config = CalibrationConfig(activation_range="min_max")
    ranges = calibration.calibrate(graph, description, images, widths, config)
    return apply.quantize_graph(graph, description, widths, ranges)


def classifier_of(image, x):
    x = layers.Dense(networks.NUM_CLASSES, name="logits")(x)
    model = keras.Model(image, x)
    networks.randomize(model, 0)
    names = tuple("abcde")
    return Classifier(model, ModelDescription((120.0,), (1 / 64,), "logits", names))


def chained():
    """Layers that keep the scale between two with kernels; one without a bias."""
    keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, name="first")(image)
    x = layers.ZeroPadding2D(name="pad")(layers.MaxPooling2D(name="pool")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    x = layers.ReLU(name="relu")(x)
    x = layers.Conv2D(4, 1, use_bias=False, name="bare")(x)
    return classifier_of(image, layers.Flatten(name="flat")(x))


def variables_of(student, name):
    return apply.range_variables(student.model.get_layer(f"quant_{name}"))


def output_step(student, name, num_bits):
    """What one integer of an output is worth, float32 as in a file."""
    variables = variables_of(student, name)
    low, high = (variables[f"output_{end}"].numpy() for end in ("min", "max"))
    if num_bits == 16:
        return high / np.float32(32767)
    return (high - low) / np.float32(2**num_bits - 1)


class ActivationGridTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        num_bits=(2, 3, 4, 5, 6, 7, 8),
        limits=((-1.0, 3.0), (0.0, 6.0), (-2.5, 0.0), (-0.37, 1.91), (-1e-4, 0.9)),
    )
    def test_holds_the_values_of_the_fake_quantization(self, num_bits, limits):
        grid = integers.activation_grid(*limits, num_bits)
        self.assertEqual(grid.highest, 127)
        self.assertEqual(grid.lowest, 127 - (2**num_bits - 1))
        self.assertBetween(grid.zero_point, grid.lowest, grid.highest)
        self.assertEqual((grid.scale.dtype, grid.scale.shape), (np.float32, (1,)))
        values = grid.scale * (np.arange(grid.lowest, 128) - grid.zero_point)
        self.assertAllClose(values, fake_quantized(*limits, num_bits), atol=1e-6)

    def test_holds_them_wherever_the_range_lies(self):
        rng = np.random.default_rng(0)
        for low, high in zip(-rng.exponential(size=50), rng.exponential(size=50)):
            grid = integers.activation_grid(low, high, 4)
            values = grid.scale * (np.arange(112, 128) - grid.zero_point)
            self.assertAllClose(values, fake_quantized(low, high, 4), atol=1e-5)

    def test_sixteen_bits_are_symmetric(self):
        grid = integers.activation_grid(-3.0, 3.0, 16)
        self.assertEqual(
            (grid.lowest, grid.zero_point, grid.highest), (-32767, 0, 32767)
        )
        self.assertAllClose(grid.scale, [3 / 32767], rtol=1e-6)
        values = fake_quantized(-3.0, 3.0, 16)
        self.assertAllClose(values, grid.scale * np.arange(-32767, 32768), atol=1e-6)


def fake_quantized(low, high, num_bits):
    """All values that the student's quantizer gives, in order."""
    margin = 0.1 * (high - low)
    inputs = np.linspace(low - margin, high + margin, 2 ** (num_bits + 5) + 1)
    quantizer = ActivationQuantizer(num_bits)
    weights = {
        "min": tf.constant(low, tf.float32),
        "max": tf.constant(high, tf.float32),
    }
    outputs = quantizer(tf.constant(inputs, tf.float32), False, weights).numpy()
    step = (high - low) / 2**num_bits
    outputs = np.unique(outputs)
    return outputs[np.diff(outputs, prepend=-np.inf) > 0.1 * step]


class KernelIntegersTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        num_bits=(2, 3, 4, 8),
        kind=("per channel", "per tensor", "depthwise", "depthwise per tensor"),
    )
    def test_are_the_fake_quantized_kernel(self, num_bits, kind):
        is_depthwise, per_channel = "depthwise" in kind, "tensor" not in kind
        shape = (3, 3, 4, 2) if is_depthwise else (3, 3, 4, 5)
        rng = np.random.default_rng(num_bits)
        kernel = rng.normal(size=shape).astype(np.float32)
        outputs = 8 if is_depthwise else 5
        sizes = np.geomspace(0.01, 1, outputs).astype(np.float32)
        kernel *= sizes.reshape(shape[2:] if is_depthwise else shape[3:])
        high = 2 * sizes if per_channel else np.float32(1.5)
        quantizer = WeightQuantizer(num_bits, per_channel, is_depthwise)
        values, grid = integers.kernel_integers(quantizer, kernel, -high, high)
        largest = 2 ** (num_bits - 1) - 1
        self.assertEqual(values.dtype, np.int8)
        self.assertEqual(values.shape, shape)
        self.assertEqual(np.abs(values).max(), largest)
        self.assertEqual((grid.lowest, grid.highest), (-largest, largest))
        self.assertEqual(grid.zero_point, 0)
        self.assertAllClose(grid.scale, np.atleast_1d(high) / largest)
        scale = grid.scale
        if is_depthwise and per_channel:
            scale = scale.reshape(4, 2)
        expected = quantizer(kernel, False, {"min": -high, "max": high}).numpy()
        self.assertAllClose(values, expected / scale, atol=1e-3)


class IntegerLayersTest(tf.test.TestCase, parameterized.TestCase):
    def test_network_is_that_without_wrappers(self):
        student = unrounded(chained(), BitWidths(4, 5))
        graph, found = integers.integer_layers(student.model)
        self.assertIsInstance(graph, Graph)
        names = ["input", "pixels", "first", "pool", "pad", "depth", "relu", "bare"]
        names += ["flat", "logits_as_pixel", "logits_as_conv", "logits"]
        self.assertEqual(list(found)[1:], names[1:])
        self.assertEqual(list(graph.nodes), list(found))
        self.assertEqual(graph.output_name, "logits")
        self.assertEqual(graph.nodes["relu"].inputs, ("depth",))
        for name, layer in found.items():
            self.assertIs(layer.node, graph.nodes[name])
        self.assertEqual(graph.nodes["depth"].kind, "DepthwiseConv2D")
        self.assertEqual(graph.nodes["depth"].shape, (3, 3, 12))

    def test_only_what_is_stored_has_a_grid(self):
        student = unrounded(chained(), BitWidths(4, 5))
        _, found = integers.integer_layers(student.model)
        with_grid = [name for name, layer in found.items() if layer.output is not None]
        stored = ["pixels", "first", "relu", "bare", "logits_as_conv"]
        self.assertEqual(with_grid, stored)
        self.assertEqual(found["first"].output.lowest, 127 - 31)
        self.assertEqual(found["pixels"].output.lowest, -128)
        self.assertEqual(found["logits_as_conv"].output.lowest, -128)
        step = output_step(student, "relu", 5)
        self.assertAllClose(found["relu"].output.scale, [step], rtol=1e-6)
        self.assertEqual(found["relu"].output.zero_point, 127 - 31)

    def test_kernels_and_biases_are_the_students(self):
        widths = BitWidths(4, 8, True, 5, 6, 3)
        student = unrounded(chained(), widths)
        _, found = integers.integer_layers(student.model)
        with_kernel = {
            name: layer.num_bits_weight
            for name, layer in found.items()
            if layer.kernel is not None
        }
        expected = {"first": 5, "depth": 3, "bare": 4, "logits_as_conv": 6}
        self.assertEqual(with_kernel, expected)
        for name, bits in expected.items():
            wrapper = student.model.get_layer(f"quant_{name}")
            wrapper(tf.zeros((1, *wrapper.input_shape[1:])))  # quantizes the kernel
            is_depthwise = name == "depth"
            attribute = "depthwise_kernel" if is_depthwise else "kernel"
            kernel = getattr(wrapper.layer, attribute).numpy()
            scale = found[name].kernel_grid.scale
            scale = scale.reshape(kernel.shape[2:]) if is_depthwise else scale
            self.assertAllClose(found[name].kernel, kernel / scale, atol=1e-3)
            self.assertEqual(np.abs(found[name].kernel).max(), 2 ** (bits - 1) - 1)
        self.assertIsNone(found["bare"].bias)
        bias = variables_of(student, "first")["bias"]
        self.assertAllEqual(found["first"].bias, bias)

    def test_pixels_among_sixteen_bits_have_a_finer_grid(self):
        student = unrounded(chained(), BitWidths(8, 16))
        _, found = integers.integer_layers(student.model)
        pixels = found["pixels"].output
        # A pixel's step is 1 / 64; 128 of the finer steps make one.
        self.assertAllClose(pixels.scale, [1 / 64 / 128])
        self.assertEqual((pixels.zero_point, pixels.highest), (0, 32767))
        step = output_step(student, "relu", 16)
        self.assertAllClose(found["relu"].output.scale, [step], rtol=1e-6)

    def test_reading_changes_nothing(self):
        student = unrounded(chained(), BitWidths(4, 4))
        before = helpers.copies(student.model.weights)
        integers.integer_layers(student.model)
        self.assertTrue(helpers.all_equal(before, student.model.weights))


# Name -> the layer whose output it reads, as far as the scale goes.
SOURCES = {"first": "pixels", "depth": "first", "logits_as_conv": "bare"}


class RoundBiasesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        BitWidths(),
        BitWidths(per_channel=False),
        BitWidths(4, 4, True, 4, 4, 4),
        BitWidths(2, 6, False, 2, 2, 2),
        BitWidths(8, 16),
    )
    def test_biases_become_multiples_of_their_step(self, widths):
        student = unrounded(chained(), widths)
        before = {name: variables_of(student, name)["bias"].numpy() for name in SOURCES}
        integers.round_biases(student.model)
        for name, source in SOURCES.items():
            wrapper = student.model.get_layer(f"quant_{name}")
            variables = apply.range_variables(wrapper)
            kernel = "depthwise_kernel" if name == "depth" else "kernel"
            largest = 2 ** (wrapper.quantize_config.num_bits_weight - 1) - 1
            kernel_step = variables[f"{kernel}_max"].numpy() / np.float32(largest)
            self.assertEqual(kernel_step.ndim, int(widths.per_channel))
            if source == "pixels":
                input_step = 1 / 64 / (128 if widths.num_bits_activation == 16 else 1)
            else:
                input_step = output_step(student, source, widths.num_bits_activation)
            step = np.float64(input_step) * kernel_step
            bias = variables["bias"].numpy()
            multiples = (np.round(bias / step) * step).astype(np.float32)
            self.assertAllEqual(bias, multiples)
            # It was not so before. None has moved by more than half a step, and by
            # what float32 makes of millions of steps.
            self.assertNotAllEqual(before[name], bias)
            self.assertAllInRange((bias - before[name]) / step, -0.7, 0.7)

    @parameterized.product(
        name=("mobilenet_like", "bn_first"),
        widths=(BitWidths(), BitWidths(4, 4), BitWidths(8, 16)),
    )
    def test_no_layer_moves_by_more_than_a_step(self, name, widths):
        student = unrounded(networks.build(name), widths)
        graph = Graph.from_model(student.model)
        wrappers = {name: student.model.get_layer(name) for name in graph.nodes}
        outputs = [wrapper.output for wrapper in wrappers.values()]
        pixels = networks.images(student.image_shape, 16, seed=2).astype(np.float32)
        inputs = student.description.normalize(pixels)
        outputs = keras.Model(student.model.input, outputs)(inputs)
        outputs = dict(zip(graph.nodes, outputs))

        def unquantized_outputs():
            result = {}
            for name, wrapper in wrappers.items():
                if "bias" in apply.range_variables(wrapper):
                    x = outputs[graph.nodes[name].inputs[0]]
                    wrapper(x)  # puts the quantized kernel in place
                    result[name] = wrapper.layer(x).numpy()
            return result

        before = unquantized_outputs()
        integers.round_biases(student.model)
        after = unquantized_outputs()
        moved = 0
        for name in before:
            distance = np.abs(after[name] - before[name]).max()
            # What it is rounded to is its own grid, or that of its ReLU.
            stored = wrappers[name]
            if "output_max" not in apply.range_variables(stored):
                (consumer,) = graph.consumers(name)
                stored = wrappers[consumer.name]
            bits = stored.quantize_config.num_bits_activation
            self.assertLess(distance, output_step(student, stored.layer.name, bits))
            moved += distance > 0
        self.assertGreater(moved, 2)

    @parameterized.parameters(
        BitWidths(), BitWidths(3, 5, True, 3, 3, 3), BitWidths(8, 16)
    )
    def test_twice_is_once(self, widths):
        student = unrounded(networks.build("mobilenet_like"), widths)
        before = helpers.copies(student.model.weights)
        integers.round_biases(student.model)
        once = helpers.copies(student.model.weights)
        self.assertFalse(helpers.all_equal(before, once))
        integers.round_biases(student.model)
        self.assertTrue(helpers.all_equal(once, student.model.weights))

    def test_changes_biases_and_nothing_else(self):
        student = unrounded(chained(), BitWidths(4, 4))
        before = helpers.copies(student.model.weights)
        integers.round_biases(student.model)
        for variable, value in zip(student.model.weights, before):
            name = variable.name.split("/")[-1].split(":")[0]
            self.assertEqual(np.array_equal(variable.numpy(), value), name != "bias")

    def test_large_steps_of_a_tiny_kernel_are_rounded_once_too(self):
        # A bias of 10^9 steps and more: float32 does not hold each of them.
        classifier = chained()
        kernel, bias = classifier.model.get_layer("first").get_weights()
        kernel[..., :3] *= 1e-9
        bias[:3] += 10
        classifier.model.get_layer("first").set_weights([kernel, bias])
        student = unrounded(classifier, BitWidths(8, 16))
        before = variables_of(student, "first")["bias"].numpy()
        integers.round_biases(student.model)
        once = variables_of(student, "first")["bias"].numpy()
        self.assertAllClose(once, before, rtol=1e-6)
        integers.round_biases(student.model)
        self.assertAllEqual(variables_of(student, "first")["bias"], once)


if __name__ == "__main__":
    tf.test.main()
