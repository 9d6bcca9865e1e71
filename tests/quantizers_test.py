import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.quantization import student
from dfq_tf.quantization.quantizers import (
    ActivationQuantizer,
    NodeQuantizeConfig,
    WeightQuantizer,
)
from tests.graphs import Sketch

BITS = tuple(range(2, 9))


def affine(values, low, high, num_bits):
    """Quantizes and dequantizes in float64, 0 being one of the values."""
    scale = (high - low) / (2**num_bits - 1)
    zero_point = np.clip(np.floor(-low / scale + 0.5), 0, 2**num_bits - 1)
    integers = np.floor(values.astype(np.float64) / scale + zero_point + 0.5)
    return (np.clip(integers, 0, 2**num_bits - 1) - zero_point) * scale


def symmetric(values, largest, num_bits):
    """Quantizes to -(2^(n-1) - 1) .. 2^(n-1) - 1 and dequantizes, in float64."""
    most = 2 ** (num_bits - 1) - 1
    scale = largest / most
    return np.clip(np.floor(values / scale + 0.5), -most, most) * scale


def built(quantizer, **values):
    """The range of a quantizer, as variables with these values."""
    ranges = quantizer.build(tf.TensorShape(None), "kernel", keras.layers.Layer())
    assert ranges.keys() == values.keys()
    for name, value in values.items():
        ranges[name].assign(value)
    return ranges


class ActivationQuantizerTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        num_bits=BITS, limits=((-1.0, 3.0), (0.0, 6.0), (-2.5, 0.0), (-0.7, 0.9))
    )
    def test_equals_the_affine_formula(self, num_bits, limits):
        values = np.random.default_rng(num_bits).uniform(-4, 7, (500, 8, 8, 1))
        values = values.astype(np.float32)
        quantizer = ActivationQuantizer(num_bits)
        ranges = built(quantizer, min=limits[0], max=limits[1])
        quantized = quantizer(tf.constant(values), False, ranges).numpy()
        self.assertAllClose(quantized, affine(values, *limits, num_bits), atol=1e-5)
        # All 2^b values occur, and no other.
        self.assertLen(np.unique(quantized), 2**num_bits)

    def test_four_bits_have_these_sixteen_values(self):
        quantizer = ActivationQuantizer(4)
        ranges = built(quantizer, min=-1.0, max=2.0)
        values = tf.linspace(-3.0, 4.0, 2001)
        quantized = np.unique(quantizer(values, False, ranges))
        self.assertAllClose(quantized, [i / 5 for i in range(-5, 11)], atol=1e-6)
        pairs = {0.09: 0.0, 0.11: 0.2, -0.09: 0.0, -0.31: -0.4, 1.89: 1.8, 9.0: 2.0}
        some = tf.constant(list(pairs))
        self.assertAllClose(quantizer(some, False, ranges), list(pairs.values()))

    @parameterized.parameters(0.01, 3.0, 700.0)
    def test_sixteen_bits_equal_the_symmetric_formula(self, largest):
        values = np.random.default_rng(0).uniform(-1.3, 1.3, 100_000) * largest
        values = np.append(values, [0.0, largest, -largest]).astype(np.float32)
        quantizer = ActivationQuantizer(16)
        ranges = built(quantizer, min=-largest, max=largest)
        integers = quantizer(tf.constant(values), False, ranges).numpy()
        integers = integers * (32767 / largest)
        self.assertAllClose(integers, np.round(integers), rtol=0, atol=0.02)
        expected = symmetric(values, largest, 16) * (32767 / largest)
        steps = np.round(np.abs(integers - expected))
        self.assertLessEqual(steps.max(), 1)  # where float32 falls on the other side
        self.assertLess(np.mean(steps > 0), 0.02)
        self.assertAllEqual(np.round(integers[-3:]), [0, 32767, -32767])
        # The lowest int16, -32768, is not used.
        self.assertEqual(np.round(integers).min(), -32767)

    @parameterized.parameters(*BITS, 16)
    def test_zero_stays_zero(self, num_bits):
        quantizer = ActivationQuantizer(num_bits)
        lowest = -1.91 if num_bits == 16 else -0.37
        ranges = built(quantizer, min=lowest, max=1.91)
        quantized = quantizer(tf.constant([0.0, 1.0]), False, ranges).numpy()
        self.assertEqual(quantized[0], 0.0)
        self.assertGreater(quantized[1], 0.0)

    @parameterized.parameters(4, 8, 16)
    def test_gradient_is_one_inside_the_range_and_zero_outside(self, num_bits):
        quantizer = ActivationQuantizer(num_bits)
        ranges = built(quantizer, min=-1.0, max=1.0)
        values = tf.constant([-3.0, -1.2, -0.9, 0.0, 0.33, 0.9, 1.2, 3.0])
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = tf.reduce_sum(quantizer(values, True, ranges))
        self.assertAllEqual(tape.gradient(total, values), [0, 0, 1, 1, 1, 1, 0, 0])

    def test_training_neither_moves_the_range_nor_changes_the_result(self):
        quantizer = ActivationQuantizer(4)
        ranges = built(quantizer, min=-1.0, max=2.0)
        values = tf.linspace(-100.0, 100.0, 401)
        expected = affine(values.numpy(), -1.0, 2.0, 4)
        self.assertAllClose(quantizer(values, True, ranges), expected, atol=1e-6)
        self.assertEqual(ranges["min"].numpy(), -1.0)
        self.assertEqual(ranges["max"].numpy(), 2.0)

    def test_range_is_not_trained(self):
        layer = keras.layers.Layer()
        ActivationQuantizer(8).build(tf.TensorShape((1,)), "output", layer)
        self.assertEmpty(layer.trainable_weights)
        names = [v.name.split(":")[0] for v in layer.non_trainable_weights]
        self.assertCountEqual(names, ["output_min", "output_max"])

    def test_config_gives_the_arguments_back(self):
        config = dict(num_bits=5, is_average=True, most_growth=2.0)
        self.assertEqual(ActivationQuantizer(**config).get_config(), config)


class WeightQuantizerTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*BITS)
    def test_per_tensor_equals_the_symmetric_formula(self, num_bits):
        kernel = np.random.default_rng(num_bits).normal(size=(3, 3, 16, 16))
        kernel = kernel.astype(np.float32)
        quantizer = WeightQuantizer(num_bits, 0)
        largest = np.abs(kernel).max()
        ranges = built(quantizer, max=largest)
        self.assertEqual(ranges["max"].shape, ())
        quantized = quantizer(tf.constant(kernel), False, ranges).numpy()
        self.assertAllClose(quantized, symmetric(kernel, largest, num_bits), atol=1e-5)
        self.assertLessEqual(len(np.unique(quantized)), 2**num_bits - 1)

    @parameterized.parameters(*BITS)
    def test_per_channel_has_one_range_per_output(self, num_bits):
        kernel = np.random.default_rng(num_bits).normal(size=(3, 3, 8, 4))
        kernel = (kernel * [0.01, 0.1, 1, 10]).astype(np.float32)
        quantizer = WeightQuantizer(num_bits, 4)
        largest = np.abs(kernel).max(axis=(0, 1, 2))
        ranges = built(quantizer, max=largest)
        quantized = quantizer(tf.constant(kernel), False, ranges).numpy()
        expected = symmetric(kernel, largest, num_bits)
        self.assertAllClose(quantized / largest, expected / largest, atol=1e-5)
        for channel in range(4):
            levels = np.unique(quantized[..., channel])
            self.assertBetween(len(levels), 2, 2**num_bits - 1)
            self.assertAllClose(np.abs(levels).max(), largest[channel])

    @parameterized.parameters(1, 2)
    def test_depthwise_has_one_range_per_channel_and_multiplier(self, multiplier):
        kernel = np.random.default_rng(0).normal(size=(3, 3, 6, multiplier))
        kernel *= np.geomspace(0.01, 10, 6 * multiplier).reshape(6, multiplier)
        kernel = kernel.astype(np.float32)
        largest = np.abs(kernel).max(axis=(0, 1))
        quantizer = WeightQuantizer(4, 6 * multiplier)
        ranges = built(quantizer, max=largest.ravel())
        quantized = quantizer(tf.constant(kernel), False, ranges).numpy()
        self.assertEqual(quantized.shape, kernel.shape)
        expected = symmetric(kernel, largest, 4)
        self.assertAllClose(quantized / largest, expected / largest, atol=1e-5)

    def test_the_kernel_of_a_dense_layer_is_a_matrix(self):
        kernel = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
        largest = np.abs(kernel).max(axis=0)
        quantizer = WeightQuantizer(3, 3)
        quantized = quantizer(tf.constant(kernel), False, built(quantizer, max=largest))
        self.assertAllClose(quantized, symmetric(kernel, largest, 3), atol=1e-5)

    def test_one_output_has_one_range(self):
        quantizer = WeightQuantizer(3, 1)
        ranges = built(quantizer, max=[6.0])
        kernel = tf.reshape(tf.constant([1.2, -3.9, 7.0]), (1, 3, 1, 1))
        self.assertAllClose(
            tf.reshape(quantizer(kernel, False, ranges), [-1]), [2.0, -4.0, 6.0]
        )

    @parameterized.parameters(0, 2)
    def test_training_leaves_the_range(self, num_ranges):
        quantizer = WeightQuantizer(8, num_ranges)
        ranges = built(quantizer, max=[1.0, 2.0] if num_ranges else 2.0)
        kernel = tf.constant([[[[50.0, -50.0]]]])
        largest = 1.0 if num_ranges else 2.0
        self.assertAllClose(quantizer(kernel, True, ranges), [[[[largest, -2.0]]]])
        self.assertAllEqual(ranges["max"], [1.0, 2.0] if num_ranges else 2.0)

    @parameterized.parameters((1, 1, 3, 1), (1, 1, 1, 3), (1, 3))
    def test_gradient_passes_straight_through(self, *shape):
        quantizer = WeightQuantizer(8, 3)
        ranges = built(quantizer, max=[1.0, 1.0, 4.0])
        kernel = tf.reshape(tf.constant([0.3, -2.0, -2.0]), shape)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            total = tf.reduce_sum(quantizer(kernel, True, ranges))
        gradient = tf.reshape(tape.gradient(total, kernel), [-1])
        self.assertAllEqual(gradient, [1, 0, 1])

    def test_gradient_of_one_range_passes_straight_through(self):
        quantizer = WeightQuantizer(8, 0)
        ranges = built(quantizer, max=1.0)
        kernel = tf.constant([[0.3, -2.0, -0.9]])
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            total = tf.reduce_sum(quantizer(kernel, True, ranges))
        self.assertAllEqual(tape.gradient(total, kernel), [[1, 0, 1]])

    @parameterized.parameters(0, 5)
    def test_range_is_not_trained(self, num_ranges):
        layer = keras.layers.Layer()
        WeightQuantizer(8, num_ranges).build(tf.TensorShape((2, 5)), "kernel", layer)
        self.assertEmpty(layer.trainable_weights)
        (variable,) = layer.non_trainable_weights
        self.assertEqual(variable.name, "kernel_max:0")
        self.assertEqual(variable.shape, (5,) if num_ranges else ())

    def test_config_gives_the_arguments_back(self):
        config = dict(num_bits=3, num_ranges=7, grows=True)
        self.assertEqual(WeightQuantizer(**config).get_config(), config)


class LearntRangeTest(tf.test.TestCase, parameterized.TestCase):
    """What a range that learns gives, and how it moves (Esser et al. 2020)."""

    def test_kernels_are_rounded_in_the_range_as_it_has_grown(self):
        quantizer = WeightQuantizer(4, 2, grows=True)
        ranges = built(quantizer, max=[1.0, 2.0], growth=[0.5, 1.5])
        kernel = np.random.default_rng(0).uniform(-4, 4, (3, 3, 5, 2))
        found = quantizer(tf.constant(kernel, tf.float32), True, ranges)
        for channel, largest in enumerate((0.5, 3.0)):
            self.assertAllClose(
                found[..., channel], symmetric(kernel[..., channel], largest, 4)
            )

    @parameterized.parameters(((3,), [0.9, 1.0, 1.2]), ((), 1.1))
    def test_gradients_of_kernels(self, shape, growth):
        largest, most = 1.4, 7
        quantizer = WeightQuantizer(4, *shape or (0,), grows=True)
        ranges = built(
            quantizer, max=np.full(shape, largest), growth=np.reshape(growth, shape)
        )
        rng = np.random.default_rng(0)
        kernel = rng.uniform(-2, 2, (5, 4, 3)).astype(np.float32)
        upstream = rng.normal(0, 1, kernel.shape)
        variable = tf.Variable(kernel)
        with tf.GradientTape() as tape:
            rounded = quantizer(tf.convert_to_tensor(variable), True, ranges)
            loss = tf.reduce_sum(rounded * tf.constant(upstream, tf.float32))
        of_kernel, of_growth = tape.gradient(loss, [variable, ranges["growth"]])
        step = largest * np.array(growth) / most
        is_inside = np.abs(kernel) <= step * most
        self.assertAllClose(of_kernel, np.where(is_inside, upstream, 0), rtol=1e-5)
        # round(v) - v inside, -7 or 7 outside; a step is largest / 7 times the growth.
        v = kernel / step
        moves = np.where(is_inside, np.rint(v) - v, np.sign(v) * most)
        expected = (upstream * moves * largest / most).reshape(-1, *shape).sum(axis=0)
        self.assertAllClose(of_growth, expected, rtol=1e-3)

    def test_outputs_learn_their_range_up_to_a_limit(self):
        quantizer = ActivationQuantizer(4, most_growth=1.2)
        ranges = built(quantizer, min=0.0, max=3.0, growth=1.1)
        values = tf.constant([9.0, 1.0])
        with tf.GradientTape() as tape:
            found = quantizer(values, True, ranges)
            total = tf.reduce_sum(found)
        self.assertAllClose(found, affine(values.numpy(), 0.0, 3.3, 4))
        self.assertAllClose(
            tape.gradient(total, ranges["growth"]), 3.0 + (found[1] - 1.0) / 1.1
        )
        ranges["growth"].assign(2.0)
        self.assertAllClose(quantizer(tf.constant([9.0]), True, ranges), [3.6])

    def test_growth_is_trained_and_is_1_at_first(self):
        for quantizer in (
            ActivationQuantizer(4, most_growth=1.2),
            WeightQuantizer(4, 5, grows=True),
        ):
            layer = keras.layers.Layer()
            quantizer.build(tf.TensorShape((2, 5)), "kernel", layer)
            (variable,) = layer.trainable_weights
            self.assertEqual(variable.name, "kernel_growth:0")
            self.assertAllEqual(variable, np.ones(variable.shape))


class NodeQuantizeConfigTest(tf.test.TestCase, parameterized.TestCase):
    def layer(self):
        sketch = Sketch()
        sketch.depthwise("depth", multiplier=2)
        node = sketch.nodes["depth"]
        shapes = {role: weight.shape for role, weight in node.weights.items()}
        layer = student.GraphLayer(student.node_config(node), shapes)
        layer.build((None, 8, 8, 3))
        return layer

    @parameterized.parameters(
        (5, 12, 7, False), (None, 0, 8, True), (3, 0, None, False)
    )
    def test_config_gives_the_arguments_back(self, kernel_bits, ranges, bits, average):
        config = dict(
            kernel_bits=kernel_bits,
            kernel_ranges=ranges,
            bits=bits,
            is_average=average,
            kernel_grows=average,
            most_growth=1.5 if average else None,
        )
        self.assertEqual(NodeQuantizeConfig(**config).get_config(), config)

    @parameterized.parameters(6, 0)
    def test_the_kernel_alone_of_the_weights_is_quantized(self, num_ranges):
        layer, config = self.layer(), NodeQuantizeConfig(5, num_ranges, None)
        ((weight, quantizer),) = config.get_weights_and_quantizers(layer)
        self.assertIs(weight, layer.kernel)
        self.assertEqual((quantizer.num_bits, quantizer.num_ranges), (5, num_ranges))
        self.assertEmpty(config.get_activations_and_quantizers(layer))
        self.assertEmpty(config.get_output_quantizers(layer))
        bias, value = layer.bias, tf.ones(weight.shape)
        config.set_quantize_weights(layer, [value])
        self.assertIs(layer.kernel, value)
        self.assertIs(layer.bias, bias)

    def test_without_a_kernel_the_output_alone_is(self):
        layer, config = self.layer(), NodeQuantizeConfig(None, 0, 7)
        self.assertEmpty(config.get_weights_and_quantizers(layer))
        (quantizer,) = config.get_output_quantizers(layer)
        self.assertEqual(quantizer.num_bits, 7)
        kernel = layer.kernel
        config.set_quantize_weights(layer, [])
        self.assertIs(layer.kernel, kernel)


if __name__ == "__main__":
    tf.test.main()
