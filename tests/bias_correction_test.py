from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.graph import evaluation
from dfq_tf.graph.classifier import Classifier
from dfq_tf.quantization import apply, bias_correction
from dfq_tf.quantization.calibration import calibrate
from dfq_tf.settings import BitWidths
from dfq_tf.training import memory
from tests import digits, helpers, networks

# So few bits that rounding shifts the means a lot.
WIDTHS = BitWidths(
    num_bits_weight=4, num_bits_first=4, num_bits_last=4, num_bits_depthwise=4
)
# More than a batch, and no multiple of it.
NUM_IMAGES = 133


class Case:
    """A float network and its uncorrected student."""

    def __init__(self, classifier, images, widths=WIDTHS):
        self.images = images
        self.graph, self.description = apply.integer_ready(classifier)
        ranges = calibrate(self.graph, self.description, images, widths)
        self.student = apply.quantize_graph(
            self.graph, self.description, widths, ranges
        )
        self._reference = self.graph.build()
        mean, scale = self.description.input_mean, self.description.input_scale
        self._inputs = ((images - np.array(mean)) * np.array(scale)).astype(np.float32)

    @classmethod
    def of(cls, name, **settings):
        classifier = networks.build(name, **settings)
        images = networks.images(classifier.image_shape, NUM_IMAGES, seed=1)
        return cls(classifier, images)

    def correct(self):
        bias_correction.correct_biases(
            self.graph, self.description, self.student, self.images
        )

    @property
    def names(self):
        """Layers with a kernel and a bias, in order."""
        return [
            layer.layer.name
            for layer in self.student.model.layers
            if "bias" in apply.range_variables(layer)
        ]

    def variables(self, name):
        return apply.range_variables(self.student.model.get_layer(f"quant_{name}"))

    def float_outputs(self):
        """Of the layers `names`, on all images at once."""
        return self._outputs(self._reference, self.names)

    def student_outputs(self):
        return self._outputs(self.student.model, [f"quant_{n}" for n in self.names])

    def _outputs(self, model, names):
        tensors = [model.get_layer(name).output for name in names]
        outputs = keras.Model(model.input, tensors)(self._inputs, training=False)
        return [np.asarray(output, np.float64) for output in outputs]


def means(output):
    """Of each channel, over images and positions."""
    return output.mean(axis=tuple(range(output.ndim - 1)))


class MeansTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*networks.NETWORKS)
    def test_are_those_of_the_float_network(self, name):
        case = Case.of(name)
        before = [means(output) for output in case.student_outputs()]
        case.correct()
        expected, outputs = case.float_outputs(), case.student_outputs()
        self.assertGreaterEqual(len(outputs), 3)
        errors = []
        for layer, goal, output in zip(case.names, expected, outputs):
            variables = case.variables(layer)
            # What goes into a ReLU of its own is exact: the bias alone decides it.
            tolerance = 1e-4 * np.ptp(goal)
            if "output_max" in variables:
                # An output that is rounded and cut off, to less than one of 255 steps.
                step = (variables["output_max"] - variables["output_min"]) / 255
                tolerance = 0.7 * step.numpy()
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
        for goal, output in zip(case.float_outputs()[:3], case.student_outputs()[:3]):
            self.assertAllClose(
                means(output), means(goal), rtol=0, atol=1e-3 * np.ptp(goal)
            )

    def test_all_layers_at_once_would_miss_them(self):
        case, naive = Case.of("resnet_like"), Case.of("resnet_like")
        case.correct()
        # Each layer by its shift before any correction: the shifts of those before
        # it are taken back twice.
        pairs = list(zip(naive.names, naive.float_outputs(), naive.student_outputs()))
        for name, goal, output in pairs:
            naive.variables(name)["bias"].assign_add(means(goal) - means(output))

        def error(of):
            goal, output = of.float_outputs()[-1], of.student_outputs()[-1]
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
            results.append([case.variables(n)["bias"].numpy() for n in case.names])
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
            sizes = [np.prod(node.shape) for node in case.graph.nodes.values()]
            # Four tensors as large as the largest are alive, of 4 bytes each.
            with mock.patch.object(
                memory, "PASS_MEMORY", budget * 4 * 4 * int(max(sizes))
            ):
                case.correct()
            results.append([case.variables(n)["bias"].numpy() for n in case.names])
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
            results.append([case.variables(n)["bias"].numpy() for n in case.names])
        self.assertTrue(helpers.all_equal(*results))


class StudentTest(tf.test.TestCase, parameterized.TestCase):
    def test_biases_move_and_nothing_else(self):
        case = Case.of("mobilenet_like")
        before = [(v.name, v.numpy()) for v in case.student.model.weights]
        weights = [w for n in case.graph.nodes.values() for w in n.weights]
        copies = helpers.copies(weights)
        case.correct()
        for (name, value), variable in zip(before, case.student.model.weights):
            if name.endswith("bias:0"):
                self.assertNotAllEqual(variable, value, msg=name)
            else:
                self.assertAllEqual(variable, value, msg=name)
        self.assertTrue(helpers.all_equal(weights, copies))

    def test_is_nearer_to_the_digits_teacher_on_images_it_has_not_seen(self):
        teacher, test = digits.teacher(), digits.split("test")
        goal = teacher.scores(test.images)
        case = Case(teacher, digits.split("train").images[:500])
        before = case.student.scores(test.images)
        case.correct()
        after = case.student.scores(test.images)
        self.assertLess(
            np.abs((after - goal).mean(axis=0)).mean(),
            0.5 * np.abs((before - goal).mean(axis=0)).mean(),
        )
        self.assertLess(np.abs(after - goal).mean(), np.abs(before - goal).mean())
        self.assertGreater(
            evaluation.agreement(goal, after), evaluation.agreement(goal, before)
        )

    @parameterized.parameters("wrn_10_1", "vgg_like", "mobilenet_like")
    def test_is_nearer_on_images_it_has_not_seen(self, name):
        classifier = networks.build(name)
        case = Case.of(name)
        images = networks.images(classifier.image_shape, 200, seed=7)
        goal = classifier.scores(images)
        before = case.student.scores(images)
        case.correct()
        after = case.student.scores(images)
        self.assertLess(
            np.abs((after - goal).mean(axis=0)).mean(),
            0.5 * np.abs((before - goal).mean(axis=0)).mean(),
        )
        self.assertLess(np.abs(after - goal).mean(), np.abs(before - goal).mean())

    def test_layer_that_errs_nowhere_keeps_its_bias(self):
        image = keras.layers.Input((4, 4, 1))
        x = keras.layers.Conv2D(2, 1, name="exact")(image)
        x = keras.layers.Flatten()(keras.layers.ReLU()(x))
        model = helpers.randomise(keras.Model(image, keras.layers.Dense(3)(x)))
        # Each kernel is a whole number of its own steps, 7 in all.
        kernel = np.array([7.0, -3.0]).reshape(1, 1, 1, 2)
        bias = np.array([1.0, 2.0])
        model.get_layer("exact").set_weights([kernel, bias])
        classifier = Classifier(model, helpers.description(3))
        case = Case(classifier, networks.images((4, 4, 1), 20))
        case.correct()
        self.assertAllClose(case.variables("exact")["bias"], bias, atol=1e-5)


if __name__ == "__main__":
    tf.test.main()
