"""Rounding and step sizes that are learnt, against NumPy and fake quantization."""

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.graph import layers
from dfq_tf.quantization import step_sizes
from dfq_tf.quantization.learnt import LearntKernel, LearntRange
from dfq_tf.quantization.network import fake_quantized_kernel, fake_quantized_output


def kernel_node(kind="conv", shape=(3, 3, 2, 5)):
    rng = np.random.default_rng(0)
    channels = shape[2]
    source = layers.image("image", (8, 8, channels))
    kernel = rng.normal(0, 1, shape).astype(np.float32)
    return layers.node(kind, "layer", [source], weights={"kernel": kernel})


def numpy_share(rounding, sharpness=1.0):
    """h(v) as Nagel et al. (2020) have it, with a sharpness."""
    sigmoid = 1 / (1 + np.exp(-sharpness * rounding.astype(np.float64)))
    return np.clip(1.2 * sigmoid - 0.1, 0, 1)


class LearntKernelTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        bits=(2, 3, 4, 8),
        case=(
            ("conv", (3, 3, 2, 5), (5,)),
            ("conv", (3, 3, 2, 5), ()),
            ("depthwise_conv", (3, 3, 2, 2), (4,)),
        ),
    )
    def test_it_begins_at_the_float_kernel_and_nearest_rounding(self, bits, case):
        kind, shape, ranges = case
        node = kernel_node(kind, shape)
        kernel = node.weights["kernel"]
        high = np.full(ranges, 1.5, np.float32)  # some weights are cut off
        learnt = LearntKernel(node, high, bits)
        self.assertAllClose(learnt.soft(1.0), np.clip(kernel, -1.5, 1.5), atol=1e-5)
        nearest = fake_quantized_kernel(tf.constant(kernel), high, bits)
        self.assertAllClose(learnt.hard(), nearest, atol=1e-6)
        self.assertAllEqual(learnt.magnitudes(), high)

    def test_soft_and_hard_are_those_of_the_formula(self):
        node = kernel_node()
        high = np.linspace(1, 2, 5).astype(np.float32)
        learnt = LearntKernel(node, high, 3)
        rng = np.random.default_rng(1)
        learnt.rounding.assign(rng.normal(0, 3, learnt.rounding.shape))
        learnt.growth.assign(rng.uniform(0.5, 1.5, 5))
        floor = np.floor(node.weights["kernel"].reshape(-1, 5) / (high / 3))
        scale = high / 3 * learnt.growth.numpy()
        for sharpness in (1.0, 5.0):
            share = numpy_share(learnt.rounding.numpy(), sharpness)
            soft = scale * np.clip(floor + share, -3, 3)
            self.assertAllClose(
                learnt.soft(sharpness), soft.reshape(3, 3, 2, 5), atol=1e-5
            )
        hard = scale * np.clip(floor + (share >= 0.5), -3, 3)
        self.assertAllClose(learnt.hard(), hard.reshape(3, 3, 2, 5), atol=1e-6)
        self.assertAllClose(learnt.magnitudes(), 3 * scale)

    def test_what_is_hard_quantizes_to_itself(self):
        learnt = LearntKernel(kernel_node(), np.linspace(1, 2, 5), 4)
        rng = np.random.default_rng(1)
        learnt.rounding.assign(rng.normal(0, 3, learnt.rounding.shape))
        learnt.growth.assign(rng.uniform(0.5, 1.5, 5))
        hard = learnt.hard()
        again = fake_quantized_kernel(tf.constant(hard), learnt.magnitudes(), 4)
        self.assertAllClose(again, hard, rtol=1e-6, atol=1e-7)

    def test_all_weights_arrive_at_integers(self):
        learnt = LearntKernel(kernel_node(), np.full(5, 2.0), 4)
        between = []
        for sharpness in (1, 10, 100, 1e3, 1e4):
            away = np.abs(learnt.soft(sharpness) - learnt.hard()) > 1e-6
            between.append(np.mean(away))
        self.assertEqual(between, sorted(between, reverse=True))
        self.assertGreater(between[0], 0.9)
        self.assertLess(between[-1], 0.02)


class LearntRangeTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((0.0, 6.0, 4), (-1.3, 2.9, 4), (-2.0, 0.0, 6))
    def test_values_are_those_of_fake_quantization(self, low, high, bits):
        learnt = LearntRange(low, high, bits, np.inf)
        values = tf.constant(np.linspace(-4, 8, 1000), tf.float32)
        for growth in (1.0, 0.7, 1.9):
            learnt.growth.assign(growth)
            expected = fake_quantized_output(values, *learnt.range(), bits)
            self.assertAllClose(learnt(values), expected, atol=1e-6)
            self.assertAllClose(
                learnt.range()[1] - learnt.range()[0], growth * (high - low), rtol=1e-5
            )

    def test_averages_between_two_integers_are_rounded_as_in_the_file(self):
        learnt = LearntRange(0.0, 0.73, 4, np.inf)
        step = np.float32(0.73) / np.float32(15)
        values = step * np.arange(16, dtype=np.float32)
        between = tf.nn.avg_pool1d(values[None, :, None], 2, 1, "VALID")
        # LiteRT rounds halves up, where all integers are above 0 as those of 4 bits.
        self.assertAllEqual(
            learnt(between, is_average=True)[0, :, 0], learnt(values)[1:]
        )
        self.assertNotAllEqual(learnt(between)[0, :, 0], learnt(values)[1:])

    def test_gradients_are_those_of_learnt_step_sizes(self):
        learnt = LearntRange(-1.0, 2.0, 4, np.inf)  # 16 values, steps of 0.2
        rng = np.random.default_rng(0)
        values = tf.constant(rng.uniform(-3, 4, 200), tf.float32)
        upstream = rng.normal(0, 1, 200)
        with tf.GradientTape() as tape:
            tape.watch(values)
            rounded = learnt(values)
            loss = tf.reduce_sum(rounded * tf.constant(upstream, tf.float32))
        of_values, of_growth = tape.gradient(loss, [values, learnt.growth])
        steps = values.numpy().astype(np.float64) / 0.2
        inside = (steps >= -5.5) & (steps <= 10.5)
        edges = (np.abs(steps + 5) < 0.51) | (np.abs(steps - 10) < 0.51)
        self.assertAllClose(
            of_values.numpy()[~edges], np.where(inside, upstream, 0)[~edges], rtol=1e-5
        )
        # Esser et al. 2020: round(v) - v inside; the lowest and highest outside.
        moves = np.where(of_values != 0, np.rint(steps) - steps, rounded / 0.2)
        self.assertAllClose(of_growth, 0.2 * np.sum(upstream * moves), rtol=1e-3)

    def test_no_range_goes_past_what_its_operator_takes(self):
        learnt = LearntRange(0.0, 6.0, 4, 1.0)
        learnt.growth.assign(1.5)
        self.assertAllClose(learnt.range(), (0.0, 6.0))
        self.assertAllClose(learnt(tf.constant([9.0])), [6.0])
        learnt.growth.assign(0.5)
        self.assertAllClose(learnt.range(), (0.0, 3.0))

    def test_a_growth_of_numpy_stays_one(self):
        for growth in (np.float32(0.01), np.array([0.01, 1, 9], np.float32)):
            found = step_sizes.clipped(growth, 2.0)
            self.assertIsInstance(found, (np.ndarray, np.generic))
            self.assertAllClose(found, np.clip(growth, 0.1, 2.0))

    def test_a_range_finds_the_way_back_from_its_limits(self):
        for growth, top in ((1.5, 6.0), (-0.5, 0.6)):
            learnt = LearntRange(0.0, 6.0, 4, 1.0)
            learnt.growth.assign(growth)
            with tf.GradientTape() as tape:
                value = learnt(tf.constant([9.0]))
            self.assertAllClose(value, [top], rtol=1e-5)
            self.assertAllClose(learnt.range(), (0.0, top), rtol=1e-5)
            self.assertGreater(tape.gradient(value, learnt.growth), 0.1)


if __name__ == "__main__":
    tf.test.main()
