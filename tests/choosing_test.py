import dataclasses
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.quantization import (
    calibration,
    choosing,
    grids,
    noise,
    post_training,
)
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import graphs
from tests.graphs import Sketch

PLAIN = CalibrationConfig(
    activation_range="mse",
    pooled_margin=1.0,
    logits_margin=1.0,
    bias_correction=False,
)
WIDE = CalibrationConfig(bias_correction=False)


def few(bits):
    """The same bits for weights and activations."""
    return BitWidths(num_bits_weight=bits, num_bits_activation=bits)


def gated():
    """A network with a gate (squeeze and excite), a pool, and two dense layers."""
    sketch = Sketch(pixels=False)
    features = sketch("relu", "features", sketch.conv("conv", outputs=4))
    sketch("global_average_pool", "squeezed", features, keepdims=True)
    sketch.conv("excite", outputs=4, size=1)
    sketch("sigmoid", "gate")
    product = sketch("multiply", "product", features, "gate")
    sketch("global_average_pool", "pool", product)
    sketch("relu", "hidden", sketch.dense("hidden_sums"), top=6.0)
    sketch.dense("logits")
    return post_training.float_network(sketch.classifier())


class MarginsTest(tf.test.TestCase, parameterized.TestCase):
    def test_what_is_pooled_has_one_position_and_lies_behind_a_global_pool(self):
        self.assertEqual(
            grids.pooled(gated().graph),
            {"squeezed", "excite", "gate", "pool", "hidden_sums", "hidden", "logits"},
        )

    def test_ends_of_the_network_are_wider_and_nothing_else(self):
        graph = gated().graph
        ranges = {name: (-2.0, 3.0) for name in grids.measured(graph)}
        config = CalibrationConfig(pooled_margin=1.5, logits_margin=2.5)
        found = calibration.with_margins(graph, ranges, config)
        for name in ("features", "product"):
            self.assertEqual(found[name], (-2.0, 3.0))
        for name in ("squeezed", "excite", "pool", "hidden"):
            self.assertEqual(found[name], (-3.0, 4.5))
        # 2.5 times as wide about 0.5.
        self.assertEqual(found["logits"], (-5.75, 6.75))

    def test_the_score_that_two_logits_are_made_of_is_as_much_wider(self):
        sketch = Sketch()
        x = sketch.flatten("flat", sketch.conv("conv"))
        sketch("add", "score", *(sketch.dense(name, x, outputs=1) for name in "ab"))
        sketch("dense", "two", weights={"kernel": np.array([[-0.5, 0.5]])})
        graph = sketch.graph()
        ranges = {name: (-2.0, 3.0) for name in grids.measured(graph)}
        config = CalibrationConfig(logits_margin=2.5)
        found = calibration.with_margins(graph, ranges, config)
        for name in ("conv", "a", "b"):
            self.assertEqual(found[name], (-2.0, 3.0))
        for name in ("score", "two"):
            self.assertEqual(found[name], (-5.75, 6.75))

    def test_no_further_than_the_top_of_a_relu(self):
        network = gated()
        ranges = {name: (0.0, 5.0) for name in grids.measured(network.graph)}
        config = CalibrationConfig(pooled_margin=1.5)
        wide = calibration.with_margins(network.graph, ranges, config)
        found = calibration.with_ranges(network, wide, BitWidths()).ranges
        for name, high in {"hidden": 6.0, "pool": 7.5}.items():
            self.assertEqual(wide[name], (0.0, high))
            self.assertEqual(found[name], (0.0, high))


class ChosenTest(tf.test.TestCase, parameterized.TestCase):
    """The ratings are given: what they decide is seen in the ranges."""

    def chosen(self, ratings, config):
        network, images = gated(), graphs.noise((8, 8, 3), 40)
        calls = mock.Mock(side_effect=ratings)
        with mock.patch.multiple(choosing, sqnr=calls, scale_free_sqnr=calls):
            found = choosing.Calibrated(network, images, config).quantized(BitWidths())
        self.assertEqual(calls.call_count, len(ratings))
        return network, images[10:], found

    @parameterized.named_parameters(
        ("all_of_it", [20.0, 18.0, 16.0], {"activation_range": "min_max"}),
        ("no_min_max", [20.0, 18.0, 15.9], {"activation_range": "mse"}),
        (
            "no_margins",
            [20.0, 17.9, 18.0],
            {"activation_range": "min_max", "pooled_margin": 1.0, "logits_margin": 1.0},
        ),
        ("nothing", [20.0, 17.9, 17.9], None),
        ("what_is_high_may_cost", [40.0, 25.0, 25.0], {"activation_range": "min_max"}),
    )
    def test_wider_ranges_are_kept_where_they_cost_little(self, ratings, changes):
        network, images, found = self.chosen(ratings, WIDE)
        settings = PLAIN if changes is None else dataclasses.replace(WIDE, **changes)
        expected = calibration.calibrate(network, images, BitWidths(), settings)
        self.assertEqual(dict(found.ranges), expected)

    @parameterized.parameters((20.5, True), (20.4, False))
    def test_corrected_biases_are_kept_where_they_gain(self, rating, is_kept):
        config = dataclasses.replace(PLAIN, bias_correction=True)
        _, _, found = self.chosen([19.0, rating, 20.0], config)
        _, _, plain = self.chosen([], PLAIN)
        same = np.array_equal(
            found.graph.nodes["conv"].weights["bias"],
            plain.graph.nodes["conv"].weights["bias"],
        )
        self.assertEqual(same, not is_kept)

    def test_too_few_images_choose_nothing(self):
        network, images = gated(), graphs.noise((8, 8, 3), 3)
        found = choosing.Calibrated(network, images, WIDE).quantized(BitWidths())
        config = dataclasses.replace(WIDE, activation_range="mse")
        expected = calibration.calibrate(network, images, BitWidths(), config)
        self.assertEqual(dict(found.ranges), expected)

    def test_networks_of_several_widths_look_at_the_float_network_once(self):
        network, images = gated(), graphs.noise((8, 8, 3), 40)
        config = CalibrationConfig()
        calibrated = choosing.Calibrated(network, images, config)
        with mock.patch.object(choosing, "observe", wraps=choosing.observe) as looked:
            found = {bits: calibrated.quantized(few(bits)) for bits in (8, 4)}
            self.assertEqual(looked.call_count, 1)
        self.assertIs(calibrated.quantized(few(4)), found[4])
        for bits, each in found.items():
            alone = post_training.post_training(network, images, few(bits), config)
            self.assertEqual(each.graph.digest(), alone.graph.digest())
            self.assertEqual(each.ranges, alone.ranges)
            self.assertEqual(each.kernel_bits, alone.kernel_bits)
            for name, expected in alone.kernel_ranges.items():
                self.assertAllEqual(each.kernel_ranges[name], expected)

    def test_ratings_are_those_of_images_held_out(self):
        network, images = gated(), graphs.noise((8, 8, 3), 40)
        with mock.patch.object(choosing, "sqnr", wraps=noise.sqnr) as rated:
            choosing.Calibrated(network, images, WIDE).quantized(BitWidths())
        exact, scores = rated.call_args_list[0].args
        self.assertAllClose(exact, network.scores(images[:10]), rtol=1e-5, atol=1e-5)
        ranges = calibration.calibrate(network, images[10:], BitWidths(), PLAIN)
        narrow = calibration.with_ranges(network, ranges, BitWidths())
        expected = narrow.scores(images[:10])
        step = narrow.grid("logits").scale[0]
        self.assertAllClose(scores, expected, rtol=0, atol=1.01 * step)


class SqnrTest(tf.test.TestCase, parameterized.TestCase):
    def test_is_signal_over_noise_in_db(self):
        exact = np.array([[3.0, -4.0], [0.0, 5.0]], np.float32)
        scores = exact + np.array([[0.5, 0.0], [0.0, -0.5]], np.float32)
        self.assertAllClose(noise.sqnr(exact, scores), 20.0)

    @parameterized.parameters(0.5, 1.0, 3.0)
    def test_a_common_factor_is_no_noise_where_classes_are_compared(self, factor):
        rng = np.random.default_rng(0)
        exact = rng.normal(0, 3, (50, 4)).astype(np.float32)
        scores = exact + rng.normal(0, 0.5, exact.shape).astype(np.float32)
        # The best factor, found by trying many.
        tried = [noise.sqnr(exact, each * scores) for each in np.arange(0.9, 1.1, 1e-4)]
        found = noise.scale_free_sqnr(exact, factor * scores)
        self.assertAllClose(found, max(tried), atol=1e-4)

    def test_scores_that_say_nothing_or_the_contrary_have_no_signal(self):
        exact = np.array([[3.0, -4.0], [0.0, 5.0]], np.float32)
        for scores in (-exact, 0 * exact, exact[:, ::-1]):
            self.assertAllClose(noise.scale_free_sqnr(exact, scores), 0.0)

    def test_no_noise_is_the_best(self):
        exact = np.ones((2, 2), np.float32)
        self.assertGreater(noise.sqnr(exact, exact), 1000)


if __name__ == "__main__":
    tf.test.main()
