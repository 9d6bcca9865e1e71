from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.graph import running
from dfq_tf.graph.classifier import agreement
from dfq_tf.quantization import bias_correction, float_network, with_ranges
from dfq_tf.quantization.calibration import calibrate
from dfq_tf.settings import BitWidths
from tests import digits, helpers, networks
from tests.graphs import Sketch

# So few bits that rounding shifts the means a lot.
WIDTHS = BitWidths(
    num_bits_weight=4, num_bits_first=4, num_bits_last=4, num_bits_depthwise=4
)
# More than a batch, and no multiple of it.
NUM_IMAGES = 133


class Case:
    """A float network, and its quantized twin, uncorrected at first."""

    def __init__(self, teacher, images, widths=WIDTHS):
        self.images = images
        self.reference = float_network(teacher)
        ranges = calibrate(self.reference, images, widths)
        self.network = with_ranges(self.reference, ranges, widths)

    @classmethod
    def of(cls, name, **settings):
        teacher = networks.build(name, **settings)
        images = networks.images(teacher.image_shape, NUM_IMAGES, seed=1)
        return cls(teacher, images)

    def correct(self):
        self.network = bias_correction.with_corrected_biases(self.network, self.images)

    @property
    def names(self):
        """Nodes with a kernel and a bias, in order."""
        nodes = self.reference.graph.nodes.values()
        return [node.name for node in nodes if "bias" in node.weights]

    def bias(self, name):
        return self.network.graph.nodes[name].weights["bias"]

    def biases(self):
        return [self.bias(name) for name in self.names]

    def float_outputs(self):
        """Of the nodes `names`, on all images at once."""
        fed = self.reference.description
        mean, scale = np.array(fed.input_mean), np.array(fed.input_scale)
        inputs = ((self.images - mean) * scale).astype(np.float32)
        graph = self.reference.graph
        outputs = running.compute(graph, tf.constant(inputs), self.names)
        return [np.asarray(output, np.float64) for output in outputs]

    def quantized_outputs(self):
        outputs = self.network.outputs(self.images, self.names)
        return [np.asarray(output, np.float64) for output in outputs]


def means(output):
    """Of each channel, over images and positions."""
    return output.mean(axis=tuple(range(output.ndim - 1)))


class MeansTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*networks.FEW)
    def test_are_those_of_the_float_network(self, name):
        self.check_means(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_they_are_in_the_others(self, name):
        self.check_means(name)

    def check_means(self, name):
        case = Case.of(name)
        before = [means(output) for output in case.quantized_outputs()]
        case.correct()
        expected, outputs = case.float_outputs(), case.quantized_outputs()
        self.assertGreaterEqual(len(outputs), 3)
        errors = []
        for layer, goal, output in zip(case.names, expected, outputs):
            # What goes into a ReLU of its own is exact: the bias alone decides it.
            tolerance = 1e-4 * np.ptp(goal)
            if layer in case.network.ranges:
                # An output that is rounded and cut off, to less than one of 255 steps.
                tolerance = 0.7 * np.ptp(case.network.ranges[layer]) / 255
            self.assertAllClose(
                means(output), means(goal), rtol=0, atol=tolerance, msg=layer
            )
            errors.append(np.abs(means(output) - means(goal)).mean())
        first = [np.abs(b - means(g)).mean() for b, g in zip(before, expected)]
        self.assertLess(np.sum(errors), 0.1 * np.sum(first))

    def test_of_a_network_that_normalises_inside(self):
        case = Case.of(
            "mobilenet_like", mean=(123.7, 116.3, 103.5), scale=(0.017, 0.0175, 0.02)
        )
        case.correct()
        for goal, output in zip(case.float_outputs()[:3], case.quantized_outputs()[:3]):
            self.assertAllClose(
                means(output), means(goal), rtol=0, atol=1e-3 * np.ptp(goal)
            )

    def test_all_layers_at_once_would_miss_them(self):
        case, naive = Case.of("resnet_like"), Case.of("resnet_like")
        case.correct()
        # Each layer by its shift before any correction: the shifts of those before
        # it are taken back twice.
        changed = {
            name: {"bias": naive.bias(name) + means(goal) - means(output)}
            for name, goal, output in zip(
                naive.names, naive.float_outputs(), naive.quantized_outputs()
            )
        }
        naive.network = naive.network.with_weights(changed)

        def error(of):
            goal, output = of.float_outputs()[-1], of.quantized_outputs()[-1]
            return np.abs(means(goal) - means(output)).mean()

        self.assertLess(error(case), 0.1 * error(naive))

    def test_of_batches_weigh_as_many_images_as_they_have(self):
        # A last batch of two images that are unlike all others.
        images = networks.images((8, 8, 3), 42, seed=1)
        images[:40] //= 8
        images[40:] = 255
        results = []
        for batch_size in (42, 40, 5):
            case = Case(networks.build("vgg_like"), images)
            with mock.patch.object(bias_correction, "_BATCH_SIZE", batch_size):
                case.correct()
            results.append(case.biases())
        for result in results[1:]:
            for bias, expected in zip(result, results[0]):
                self.assertAllClose(bias, expected, atol=1e-5)

    def test_of_large_layers_are_those_of_the_first_images(self):
        images = networks.images((8, 8, 3), 40, seed=1)
        images[25:] = 255
        results = []
        for chosen, budget in ((images, 25), (images[:25], 10**6)):
            case = Case(networks.build("vgg_like"), images)
            case.images = chosen
            graph = case.reference.graph
            sizes = [np.prod(node.shape) for node in graph.nodes.values()]
            # Four tensors as large as the largest are alive, of 4 bytes each.
            with mock.patch.object(
                running, "PASS_MEMORY", budget * 4 * 4 * int(max(sizes))
            ):
                case.correct()
            results.append(case.biases())
        for bias, expected in zip(*results):
            self.assertAllClose(bias, expected, atol=1e-5)

    def test_of_large_images_are_those_of_the_first(self):
        images = networks.images((8, 8, 3), 40, seed=1)
        images[25:] = 255
        results = []
        for chosen, most in ((images, 25 * 8 * 8 * 3 + 5), (images[:25], 10**9)):
            case = Case(networks.build("vgg_like"), images)
            case.images = chosen
            with mock.patch.object(bias_correction, "_MOST_VALUES", most):
                case.correct()
            results.append(case.biases())
        self.assertTrue(helpers.all_equal(*results))


class NetworkTest(tf.test.TestCase, parameterized.TestCase):
    def test_biases_move_and_nothing_else(self):
        case = Case.of("mobilenet_like")
        before = case.network
        weights = [
            weight
            for node in case.reference.graph.nodes.values()
            for weight in node.weights.values()
        ]
        copies = helpers.copies(weights)
        case.correct()
        after = case.network
        self.assertIsNot(after, before)
        for name, node in before.graph.nodes.items():
            for role, weight in node.weights.items():
                found = after.graph.nodes[name].weights[role]
                self.assertEqual(found.dtype, np.float32)
                is_same = np.array_equal(found, weight)
                self.assertEqual(is_same, role != "bias", f"{name} {role}")
        for field in ("bits", "ranges", "kernel_bits", "kernel_ranges", "description"):
            self.assertIs(getattr(after, field), getattr(before, field), field)
        self.assertTrue(helpers.all_equal(weights, copies))

    def test_is_nearer_to_the_digits_teacher_on_images_it_has_not_seen(self):
        teacher, test = digits.teacher(), digits.split("test")
        goal = teacher.scores(test.images)
        case = Case(teacher, digits.split("train").images[:500])
        before = case.network.scores(test.images)
        case.correct()
        after = case.network.scores(test.images)
        self.assertLess(
            np.abs((after - goal).mean(axis=0)).mean(),
            0.5 * np.abs((before - goal).mean(axis=0)).mean(),
        )
        self.assertLess(np.abs(after - goal).mean(), np.abs(before - goal).mean())
        self.assertGreater(agreement(goal, after), agreement(goal, before))

    @parameterized.parameters("wrn_10_1", "vgg_like", "mobilenet_like")
    def test_is_nearer_on_images_it_has_not_seen(self, name):
        classifier = networks.build(name)
        case = Case.of(name)
        images = networks.images(classifier.image_shape, 200, seed=7)
        goal = classifier.scores(images)
        before = case.network.scores(images)
        case.correct()
        after = case.network.scores(images)
        self.assertLess(
            np.abs((after - goal).mean(axis=0)).mean(),
            0.5 * np.abs((before - goal).mean(axis=0)).mean(),
        )
        self.assertLess(np.abs(after - goal).mean(), np.abs(before - goal).mean())

    def test_layer_that_errs_nowhere_keeps_its_bias(self):
        # Each kernel is a whole number of its own steps, 7 in all.
        kernel = np.array([7.0, -3.0]).reshape(1, 1, 1, 2)
        bias = np.array([1.0, 2.0])
        sketch = Sketch((4, 4, 1), pixels=False)
        sketch("conv", "exact", weights={"kernel": kernel, "bias": bias})
        sketch("relu", "relu")
        sketch.flatten("flat")
        sketch.dense("logits")
        case = Case(sketch.classifier(), networks.images((4, 4, 1), 20))
        case.correct()
        self.assertAllClose(case.bias("exact"), bias, atol=1e-5)

    def test_what_a_layer_without_a_bias_shifts_the_next_one_takes_back(self):
        sketch = Sketch(pixels=False)
        sketch("leaky_relu", "leaky", sketch.conv("bare", bias=False), slope=0.5)
        sketch.conv("next", size=1)
        sketch("relu", "relu")
        sketch.flatten("flat")
        sketch.dense("logits")
        case = Case(sketch.classifier(), networks.images((8, 8, 3), 60))
        self.assertEqual(case.names, ["next", "logits"])
        before = means(case.quantized_outputs()[0])
        case.correct()
        goal = means(case.float_outputs()[0])
        self.assertNotAllClose(before, goal, atol=1e-3)
        self.assertAllClose(means(case.quantized_outputs()[0]), goal, atol=1e-5)

    def test_a_node_of_several_inputs_is_run_with_all(self):
        # One branch is read at once, the other long after; both are kept till then.
        sketch = Sketch(pixels=False)
        early = sketch("relu", "early", sketch.conv("first", outputs=4))
        x = sketch("tanh", "tanh", sketch.conv("second", early))
        x = sketch("sigmoid", "sigmoid", sketch.conv("third", x))
        sketch("subtract", "both", early, x)
        sketch("multiply", "twice", "both", "both")
        sketch.flatten("flat")
        sketch.dense("logits")
        case = Case(sketch.classifier(), networks.images((8, 8, 3), 60))
        case.correct()
        for goal, output in zip(case.float_outputs()[:-1], case.quantized_outputs()):
            self.assertAllClose(
                means(output), means(goal), rtol=0, atol=4e-3 * np.ptp(goal)
            )


if __name__ == "__main__":
    tf.test.main()
