import dataclasses
import functools
import pathlib

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf, tfmot
from dfq_tf.errors import ModelError
from dfq_tf.graph import layers, running
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.layers import has_kernel
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import float_network, grids, student, with_ranges
from dfq_tf.quantization.student import GraphLayer
from dfq_tf.settings import BitWidths
from tests import graphs, helpers, networks
from tests.graphs import PIXELS, Sketch

WIDTHS = (
    BitWidths(),
    BitWidths(4, 8, True, 4, 4, 4),
    BitWidths(2, 6, True, 2, 2, 2),
    BitWidths(3, 5, False, 3, 3, 3),
    BitWidths(8, 16),
)
# What a user's layers may be called; Keras takes none of them for its own.
NAMES = {
    "conv": "block 1/conv",
    "relu": "_relu",
    "depth": "tiefe Schicht ü",
    "leaky": "漏れ/0",
    "sum": "quant_sum",
    "pool": "a:b;c",
    "other": "node_3",
    "logits": "kernel",
}


def all_kinds(names=None):
    """A network with nearly every kind that an integer file has."""
    names = names or {}
    sketch = Sketch()

    def name(given):
        return names.get(given, given)

    sketch.conv(name("conv"), outputs=6)
    x = sketch("relu", name("relu"))
    x = sketch("max_pool", name("pool"), x, size=(2, 2), strides=(2, 2))
    x = sketch("pad", "pad", x, margins=((1, 0), (0, 1)))
    x = sketch.depthwise(name("depth"), x, multiplier=2, padding="same")
    x = sketch("leaky_relu", name("leaky"), x, slope=0.1)
    curve = sketch("tanh", "tanh", sketch.conv(name("other"), x, groups=2))
    top = sketch("relu", "top", sketch.conv("conv2", x, bias=False), top=1.5)
    gate = sketch("multiply", "gate", top, sketch("sigmoid", "sigmoid", curve))
    x = sketch("concatenate", "both", gate, top, axis=3)
    x = sketch("average_pool", "mean", x, size=(2, 2), strides=(1, 1), padding="same")
    far = sketch.dense("dense", sketch.flatten("flat", x), outputs=6)
    vector = sketch("global_max_pool", "most", x)
    near = sketch.dense("dense2", vector, outputs=6, bias=False)
    sketch("subtract", "difference", far, near)
    sketch("relu", "relu6", top=6.0)
    mean = sketch("global_average_pool", "average", "both", keepdims=True)
    mean = sketch("reshape", "vector", mean, shape=(8,))
    mean = sketch.dense("dense3", mean, outputs=6)
    sketch("add", name("sum"), "relu6", mean)
    sketch.dense(name("logits"))
    classifier = sketch.classifier()
    return dataclasses.replace(classifier, graph=grids.separated(classifier.graph))


def quantized(classifier, widths=BitWidths()):
    """With ranges that cut some values off, and rounded biases."""
    images = networks.images(classifier.image_shape, 32)
    inputs = classifier.description.normalize(images.astype(np.float32))
    names = grids.measured(classifier.graph)
    outputs = running.compute(classifier.graph, tf.constant(inputs), names)
    ranges = {
        n: (0.9 * float(np.min(o)), 0.9 * float(np.max(o)))
        for n, o in zip(names, outputs)
    }
    network = with_ranges(classifier, {**ranges, "pixels": PIXELS}, widths)
    return network.with_rounded_biases()


@functools.cache
def example(widths=BitWidths()):
    """The network of all kinds, quantized; the same each time."""
    return quantized(all_kinds(), widths)


def inputs_of(network, count=20, seed=3):
    """Images and what a model is fed for them."""
    images = networks.images(network.classifier.image_shape, count, seed)
    return images, network.description.normalize(images.astype(np.float32))


def loaded(path):
    """A model file opened as any user of tfmot opens one."""
    with tfmot.quantization.keras.quantize_scope():
        return keras.models.load_model(path)


class Helpers(tf.test.TestCase, parameterized.TestCase):
    def assert_same_network(self, first, second):
        """Everything but the image's own layers, which no student holds."""
        self.assertEqual(list(first.graph.nodes), list(second.graph.nodes))
        self.assertEqual(first.graph.output, second.graph.output)
        for name, node in list(first.graph.nodes.items())[1:]:
            other = second.graph.nodes[name]
            for field in ("kind", "inputs", "shape", "settings", "layers"):
                found, expected = getattr(other, field), getattr(node, field)
                self.assertEqual(found, expected, f"{name}: {field}")
            self.assertEqual(list(other.weights), list(node.weights))
            for role, weight in node.weights.items():
                self.assertAllEqual(other.weights[role], weight)
        self.assertEqual(first.description, second.description)
        self.assertEqual(dict(first.bits), dict(second.bits))
        self.assertEqual(dict(first.kernel_bits), dict(second.kernel_bits))
        self.assertEqual(list(first.ranges), list(second.ranges))
        for name, ends in first.ranges.items():
            self.assertAllEqual(np.float32(ends), np.float32(second.ranges[name]))
        self.assertEqual(list(first.kernel_ranges), list(second.kernel_ranges))
        for name, magnitudes in first.kernel_ranges.items():
            self.assertAllEqual(second.kernel_ranges[name], magnitudes)
            self.assertEqual(second.kernel_ranges[name].dtype, np.float32)


class BuildTest(Helpers):
    @parameterized.parameters(WIDTHS[0], WIDTHS[3], WIDTHS[4])
    def test_scores_are_the_network_s_own(self, widths):
        self.check_scores(widths)

    @parameterized.parameters(WIDTHS[1], WIDTHS[2])
    @pytest.mark.long
    def test_so_they_are_with_further_widths(self, widths):
        self.check_scores(widths)

    def check_scores(self, widths):
        network = example(widths)
        images, inputs = inputs_of(network)
        expected = network.scores(images)
        model = student.build(network)
        self.assertGreater(len(np.unique(expected)), 20)
        for found in (
            model(inputs, training=False).numpy(),
            model(inputs, training=True).numpy(),
            model.predict(inputs, verbose=0),
        ):
            if widths.num_bits_activation == 16:
                step = network.grid(network.graph.output).scale[0]
                self.assertAllClose(found, expected, rtol=0, atol=2.01 * step)
            else:
                self.assertAllEqual(found, expected)

    @parameterized.parameters(*networks.FEW)
    def test_so_they_are_for_every_network(self, name):
        self.check_scores_of(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_they_are_for_the_others(self, name):
        self.check_scores_of(name)

    def check_scores_of(self, name):
        network = quantized(float_network(networks.build(name)), WIDTHS[1])
        images, inputs = inputs_of(network)
        found = student.build(network)(inputs, training=False)
        self.assertAllEqual(found, network.scores(images))

    def test_each_layer_gives_what_its_node_does(self):
        network = example(WIDTHS[2])
        images, inputs = inputs_of(network)
        model = student.build(network)
        observed = keras.Model(model.input, [la.output for la in model.layers[1:]])
        wrapped = [getattr(la, "layer", la) for la in model.layers[1:]]
        names = [layer.node.name for layer in wrapped]
        self.assertCountEqual(names, list(network.graph.nodes)[1:])
        expected = network.outputs(images, names)
        for name, found, each in zip(names, observed(inputs), expected):
            self.assertAllEqual(found, each, name)

    def test_tfmot_wraps_what_is_quantized_and_nothing_else(self):
        network = example()
        wrapper = tfmot.quantization.keras.QuantizeWrapperV2
        for layer in student.build(network).layers[1:]:
            inner = layer.layer if isinstance(layer, wrapper) else layer
            self.assertIsInstance(inner, GraphLayer)
            name = inner.node.name
            is_quantized = name in network.bits or has_kernel(network.graph.nodes[name])
            self.assertEqual(isinstance(layer, wrapper), is_quantized, name)
            self.assertEqual(
                inner.compute_output_shape(layer.input_shape),
                (None, *network.graph.nodes[name].shape),
            )

    def test_kernels_and_biases_are_trained(self):
        network = example()
        model = student.build(network)
        trained = [v.name.split("/")[-1] for v in model.trainable_variables]
        weights = [w for n in network.graph.nodes.values() for w in n.weights]
        self.assertCountEqual(trained, [f"{role}:0" for role in weights])
        others = {v.name.split("/")[-1] for v in model.non_trainable_variables}
        ranges = {"kernel_max:0", "output_min:0", "output_max:0"}
        self.assertEqual(others, {*ranges, "optimizer_step:0"})

    def test_leaves_the_network_as_it_was(self):
        network = example()
        weights = [w for n in network.graph.nodes.values() for w in n.weights.values()]
        before = helpers.copies(weights)
        model = student.build(network)
        for variable in model.trainable_variables:
            variable.assign_add(tf.ones_like(variable))
        self.assertTrue(helpers.all_equal(weights, before))

    def test_a_frozen_teacher_gives_a_student_that_trains(self):
        learner = helpers.small_learner()
        learner.model.trainable = False
        network = quantized(float_network(as_classifier(learner)))
        self.assertLen(student.build(network).trainable_variables, 6)

    def test_two_students_share_nothing(self):
        network = example()
        first, second = student.build(network), student.build(network)
        _, inputs = inputs_of(network)
        before = second(inputs).numpy()
        for variable in first.trainable_variables:
            variable.assign(tf.zeros_like(variable))
        self.assertAllEqual(second(inputs), before)


class NamesTest(Helpers):
    def test_any_name_is_taken_and_comes_back(self):
        plain, named = example(), quantized(all_kinds(NAMES))
        self.assertContainsSubset(NAMES.values(), named.graph.nodes)
        images, inputs = inputs_of(plain)
        expected = plain.scores(images)
        self.assertAllEqual(named.scores(images), expected)
        model = student.build(named)
        self.assertAllEqual(model(inputs), expected)
        self.assert_same_network(student.trained(named, model), named)

    @parameterized.parameters("keras", "h5")
    def test_files_keep_them(self, suffix):
        network = quantized(all_kinds(NAMES))
        path = helpers.new_folder() / f"student.{suffix}"
        student.build(network).save(path)
        found = student.network_of(loaded(path), network.description)
        self.assert_same_network(found, network)
        kept = [node.layers for node in found.graph.nodes.values()]
        self.assertIn(("my _relu",), kept)


class SaveTest(Helpers):
    @parameterized.parameters(WIDTHS[3], WIDTHS[4])
    def test_a_file_gives_the_network_back(self, widths):
        self.check_file(widths)

    @pytest.mark.long
    def test_so_does_a_file_of_four_bits(self):
        self.check_file(WIDTHS[1])

    def check_file(self, widths):
        network = example(widths)
        path = helpers.new_folder() / "student.keras"
        student.save(network, path)
        model = loaded(path)
        found = student.network_of(
            model, ModelDescription.load(path.with_suffix(".json"))
        )
        self.assert_same_network(found, network)
        images, inputs = inputs_of(network)
        expected = network.scores(images)
        self.assertAllEqual(found.scores(images), expected)
        step = network.grid(network.graph.output).scale[0]
        is_wide = widths.num_bits_activation == 16
        self.assertAllClose(model(inputs), expected, 0, 2.01 * step if is_wide else 0)
        for name in grids.owners(network.graph):
            self.assertTrue(found.grid(name).same_as(network.grid(name)))

    def test_the_model_is_compiled_for_nothing_and_trains_on(self):
        network = example()
        path = helpers.new_folder() / "student.keras"
        student.save(network, path)
        model = loaded(path)
        moved = [v for v in model.trainable_variables if "bias" in v.name]
        for variable in moved:
            variable.assign_add(tf.ones_like(variable))
        found = student.trained(network, model)
        for name, node in network.graph.nodes.items():
            if "bias" in node.weights:
                bias = found.graph.nodes[name].weights["bias"]
                self.assertAllClose(bias, node.weights["bias"] + 1, atol=0.1)

    def test_both_files_are_whole_or_not_there(self):
        network = example()
        folder = helpers.new_folder()
        student.save(network, str(folder / "student.keras"))
        self.assertCountEqual(
            [path.name for path in folder.iterdir()], ["student.keras", "student.json"]
        )
        with self.assertRaises(OSError):
            student.save(network, folder / "student.keras" / "inner.keras")
        self.assertLen(list(folder.iterdir()), 2)

    def test_a_file_of_it_is_told_from_others(self):
        folder = helpers.new_folder()
        students, others = ("student.keras", "old.h5"), ("float.keras", "float.h5")
        for name in students:
            student.save(example(), folder / name)
        for name in others:
            helpers.small_learner().save(folder / name)
        for name in (*students, *others, "student.json", "absent.keras", "absent.h5"):
            found = student.is_student_file(str(folder / name))
            self.assertEqual(found, name in students, name)

    def test_branches_keep_the_order_of_the_graph(self):
        # Keras sorts the layers of a model by their distance from its end.
        sketch = Sketch()
        short = sketch.conv("short", "pixels", outputs=5)
        long = sketch.conv("long", sketch.conv("long0", "pixels"), outputs=5)
        sketch("add", "add", long, short)
        sketch("global_average_pool", "mean")
        network = quantized(sketch.classifier())
        found = student.network_of(student.build(network), network.description)
        self.assertEqual(list(found.graph.nodes), list(network.graph.nodes))
        self.assertEqual(list(found.graph.nodes)[2:5], ["short", "long0", "long"])

    @parameterized.parameters(
        lambda: helpers.small_learner().model, lambda: object(), lambda: None
    )
    def test_a_float_model_is_no_student(self, make):
        description = graphs.description(4)
        with self.assertRaisesRegex(
            ModelError, "^the student is a float model without fake quantization; make"
        ):
            student.network_of(make(), description)


class TrainedTest(Helpers):
    def test_reading_changes_nothing(self):
        network = example()
        model = student.build(network)
        before = helpers.copies(model.weights)
        student.trained(network, model)
        student.network_of(model, network.description)
        self.assertTrue(helpers.all_equal(model.weights, before))

    def test_without_training_nothing_changes(self):
        network = example(WIDTHS[1])
        self.assert_same_network(
            student.trained(network, student.build(network)), network
        )

    def test_weights_are_read_back_by_the_node_s_name(self):
        network = example()
        model = student.build(network)
        rng = np.random.default_rng(0)
        expected = {}
        for layer in model.layers[1:]:
            node = getattr(layer, "layer", layer).node
            for variable in layer.trainable_weights:
                role = variable.name.split("/")[-1].split(":")[0]
                variable.assign_add(rng.normal(0, 0.01, variable.shape))
                expected[node.name, role] = variable.numpy()
        model(tf.zeros((1, 8, 8, 3)))  # the wrappers put tensors in the kernels' place
        found = student.trained(network, model)
        for (name, role), value in expected.items():
            weight = found.graph.nodes[name].weights[role]
            if role == "kernel":
                self.assertAllEqual(weight, value)
            else:
                step = found.bias_scale(name)
                self.assertAllInRange((weight - value) / step, -0.51, 0.51)
                multiples = (np.rint(weight / step) * step).astype(np.float32)
                self.assertAllEqual(weight, multiples)
        self.assertEqual(dict(found.ranges), dict(network.ranges))
        self.assertEqual(dict(found.bits), dict(network.bits))

    def test_biases_that_have_grown_get_room(self):
        network = example()
        model = student.build(network)
        for variable in model.trainable_variables:
            if "kernel" in variable.name:
                variable.assign(1e-6 * variable)
            else:
                variable.assign(1e4 * tf.ones_like(variable))
        narrow = {n: 1e-6 * m for n, m in network.kernel_ranges.items()}
        found = student.trained(
            dataclasses.replace(network, kernel_ranges=narrow), model
        )
        for name in found.kernel_bits:
            weights = found.graph.nodes[name].weights
            if "bias" in weights:
                steps = weights["bias"] / found.bias_scale(name)
                self.assertAllInRange(steps, -(2**30), 2**30)
                self.assertGreater(np.abs(steps).max(), 2**10)
                self.assertAllClose(weights["bias"], np.full_like(weights["bias"], 1e4))


def hand_written(network):
    """The student of `two_blocks`, as tf_keras layers and fake quantization.

    Returns:
      The model's function of inputs, and its trained weights in the student's order.
    """
    nodes = network.graph.nodes
    made = {
        "conv": keras.layers.Conv2D(6, 3, strides=2, padding="same"),
        "depth": keras.layers.DepthwiseConv2D(3, padding="same"),
        "narrow": keras.layers.Conv2D(6, 1),
        "logits": keras.layers.Dense(5),
    }
    shapes = {"conv": (8, 8, 3), "depth": (4, 4, 6), "narrow": (4, 4, 6)}
    for name, layer in made.items():
        layer.build((None, *shapes.get(name, (24,))))
        layer.set_weights([nodes[name].weights[role] for role in ("kernel", "bias")])

    def output(name, values):
        low, high = network.ranges[name]
        return tf.quantization.fake_quant_with_min_max_args(
            values, low, high, network.bits[name]
        )

    def kernel(name):
        high, bits = network.kernel_ranges[name], network.kernel_bits[name]
        values = made[name].weights[0]
        flat = tf.reshape(values, (-1, high.size))
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            flat, -high, high, bits, narrow_range=True
        )
        return tf.reshape(rounded, values.shape)

    def bias(name):
        return made[name].weights[1]

    def function(x):
        x = output("pixels", x)
        x = tf.nn.conv2d(x, kernel("conv"), 2, "SAME") + bias("conv")
        x = output("relu", tf.nn.relu6(x))
        y = tf.nn.depthwise_conv2d(x, kernel("depth"), (1, 1, 1, 1), "SAME")
        y = output("leaky", tf.nn.leaky_relu(output("depth", y + bias("depth")), 0.1))
        y = tf.nn.conv2d(y, kernel("narrow"), 1, "VALID") + bias("narrow")
        x = output("top", tf.minimum(tf.nn.relu(x + output("narrow", y)), 2.0))
        x = tf.nn.max_pool2d(x, 2, 2, "VALID")
        x = tf.reshape(x, (-1, 24))
        return output("logits", x @ kernel("logits") + bias("logits"))

    return function, [w for layer in made.values() for w in layer.weights]


def two_blocks():
    sketch = Sketch()
    sketch.conv("conv", outputs=6, strides=(2, 2))
    x = sketch("relu", "relu", top=6.0)
    y = sketch(
        "leaky_relu", "leaky", sketch.depthwise("depth", padding="same"), slope=0.1
    )
    sketch("add", "sum", x, sketch.conv("narrow", y, outputs=6, size=1))
    sketch("relu", "top", top=2.0)
    sketch("max_pool", "pool", size=(2, 2), strides=(2, 2))
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.classifier()


class GradientsTest(Helpers):
    @parameterized.parameters(WIDTHS[0], WIDTHS[1], WIDTHS[2])
    def test_equal_those_of_a_hand_written_model(self, widths):
        network = quantized(two_blocks(), widths)
        self.assertNotIn("sum", network.bits)
        _, inputs = inputs_of(network)
        function, weights = hand_written(network)
        model = student.build(network)
        goal = np.random.default_rng(0).normal(size=(len(inputs), 5))
        losses, gradients = [], []
        for forward, variables in (
            (lambda x: model(x, training=True), model.trainable_variables),
            (function, weights),
        ):
            with tf.GradientTape() as tape:
                scores = forward(tf.constant(inputs))
                loss = tf.reduce_sum(tf.square(scores - tf.cast(goal, tf.float32)))
            losses.append(scores)
            gradients.append(tape.gradient(loss, variables))
        self.assertAllEqual(*losses)
        by_name = dict(zip(_names(network, model), gradients[0]))
        expected = dict(zip(_roles("conv", "depth", "narrow", "logits"), gradients[1]))
        self.assertEqual(by_name.keys(), expected.keys())
        for name, gradient in expected.items():
            size = np.abs(gradient).max()
            self.assertGreater(size, 0)
            self.assertAllClose(by_name[name], gradient, rtol=0, atol=1e-6 * size)

    def test_are_one_inside_the_range_and_zero_outside(self):
        network = quantized(two_blocks(), WIDTHS[1])
        narrow = {n: m / np.float32(2) for n, m in network.kernel_ranges.items()}
        network = dataclasses.replace(network, kernel_ranges=narrow)
        model = student.build(network)
        _, inputs = inputs_of(network)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(inputs) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        for name, gradient in zip(_names(network, model), gradients):
            node, role = name
            if role == "kernel":
                kernel = network.graph.nodes[node].weights["kernel"]
                high = narrow[node].reshape(
                    kernel.shape[-2:] if node == "depth" else -1
                )
                is_outside = np.abs(kernel) > high * 1.1
                self.assertGreater(is_outside.sum(), 0)
                self.assertAllEqual(
                    gradient.numpy()[is_outside], 0 * kernel[is_outside]
                )
                self.assertGreater(np.mean(gradient.numpy()[~is_outside] != 0), 0.5)

    def fit(self, model, inputs):
        """Trains a student until its error has fallen."""
        model.compile(keras.optimizers.Adam(0.01), "mse")
        labels = np.random.default_rng(0).normal(size=(len(inputs), 5))
        first = model.evaluate(inputs, labels, verbose=0)
        model.fit(inputs, labels, batch_size=10, epochs=10, verbose=0, shuffle=False)
        self.assertLess(model.evaluate(inputs, labels, verbose=0), 0.9 * first)

    def test_ranges_do_not_move_in_training(self):
        network = quantized(two_blocks(), BitWidths(4, 8))
        model = student.build(network)
        _, inputs = inputs_of(network)
        before = helpers.copies(model.non_trainable_variables)
        weights = helpers.copies(model.trainable_variables)
        self.fit(model, inputs)
        self.assertTrue(helpers.all_equal(model.non_trainable_variables, before))
        for variable, value in zip(model.trainable_variables, weights):
            self.assertNotAllEqual(variable, value)
        found = student.trained(network, model)
        self.assertEqual(dict(found.ranges), dict(network.ranges))
        images, _ = inputs_of(network)
        # The file computes what the student has learnt, but for rounded biases.
        step = network.grid("logits").scale[0]
        steps = (found.scores(images) - model(inputs).numpy()) / step
        self.assertLessEqual(np.abs(steps).max(), 2.01)

    def test_ranges_move_where_they_learn(self):
        network = quantized(two_blocks(), BitWidths(4, 4, num_bits_sum=4))
        model = student.build(network, learn_ranges=True)
        images, inputs = inputs_of(network)
        self.assertAllClose(model(inputs), network.scores(images), atol=1e-5)
        self.fit(model, inputs)
        found = student.trained(network, model)
        step = found.grid("logits").scale[0]
        steps = (found.scores(images) - model(inputs).numpy()) / step
        self.assertLessEqual(np.abs(steps).max(), 2.01)
        # Those of 8 bits stay, and so do those behind a global pool.
        few = {name for name, bits in network.bits.items() if bits < 8}
        stays = grids.pooled(network.graph) | (network.bits.keys() - few)
        for name, ends in network.ranges.items():
            self.assertEqual(found.ranges[name] == ends, name in stays, name)
        for name, bits in network.kernel_bits.items():
            same = np.array_equal(
                found.kernel_ranges[name], network.kernel_ranges[name]
            )
            self.assertEqual(same, bits == 8, name)
        self.assertContainsSubset({4, 8}, {*network.kernel_bits.values()})
        self.assertNotEmpty(few - stays)

    def test_ranges_of_one_grid_stay_alike(self):
        network = example(BitWidths(2, 6, True, 2, 2, 2))
        model = student.build(network, learn_ranges=True)
        for variable in model.trainable_variables:
            if "growth" in variable.name:
                variable.assign(0.8 * variable)
        found = student.trained(network, model)  # raises if they are not
        moved = {n for n, ends in network.ranges.items() if found.ranges[n] != ends}
        self.assertNotEmpty(moved)
        self.assertLess(len(moved), len(network.ranges))


def _roles(*names):
    return [(name, role) for name in names for role in ("kernel", "bias")]


def _names(network, model):
    """Node and role of each of a student's trained variables, in order."""
    found = {}
    for layer in model.layers[1:]:
        node = getattr(layer, "layer", layer).node
        for variable in layer.trainable_weights:
            role = variable.name.split("/")[-1].split(":")[0]
            found[id(variable)] = node.name, role
    return [found[id(variable)] for variable in model.trainable_variables]


# Settings of each kind that a graph of integers may have.
SETTINGS = {
    "max_pool": dict(size=(2, 2), strides=(1, 2), padding="same"),
    "average_pool": dict(size=(3, 2), strides=(2, 2)),
    "pad": dict(margins=((1, 2), (0, 3))),
    "crop": dict(margins=((1, 2), (0, 3))),
    "nearest_upsampling": dict(size=(2, 3)),
    "bilinear_upsampling": dict(size=(2, 1)),
    "transpose": dict(order=(3, 1, 2)),
    "depth_to_space": dict(block=2),
    "prelu": dict(slopes=(0.1, -0.2, 0.0, 0.5)),
    "relu": dict(top=2.5),
    "leaky_relu": dict(slope=0.3),
    "reshape": dict(shape=(4, -1, 4)),
    "global_average_pool": dict(keepdims=True),
    "global_max_pool": dict(),
    "sigmoid": dict(),
    "tanh": dict(),
    "requantize": dict(),
    "pixels": dict(low=-1.5, high=2.25),
}


class GraphLayerTest(Helpers):
    @parameterized.product(kind=list(SETTINGS), suffix=("keras", "h5"))
    def test_is_stored_with_its_settings(self, kind, suffix):
        sketch = Sketch((8, 8, 4), pixels=False)
        sketch(kind, "a node", **SETTINGS[kind])
        self.check(sketch, suffix)

    @parameterized.product(
        kind=("conv", "depthwise", "dense", "grouped"), suffix=("keras", "h5")
    )
    def test_is_stored_with_its_weights(self, kind, suffix):
        sketch = Sketch((8, 8, 4), pixels=False)
        if kind == "grouped":
            sketch.conv("a node", groups=2, strides=(2, 1))
        elif kind == "conv":
            sketch.conv("a node", bias=False, dilation=(2, 1))
        else:
            getattr(sketch, kind)("a node")
        self.check(sketch, suffix)

    @parameterized.parameters("keras", "h5")
    def test_of_two_inputs(self, suffix):
        for kind in ("add", "subtract", "multiply", "concatenate"):
            sketch = Sketch((8, 8, 4), pixels=False)
            sketch("relu", "positive")
            sketch(kind, "a node", "image", "positive")
            self.check(sketch, suffix)
        sketch = Sketch((8, 8, 4), pixels=False)
        sketch("add", "a node", "image", "image")
        self.check(sketch, suffix)

    def check(self, sketch, suffix):
        """A model of one layer for each node, before and after it was in a file."""
        graph = sketch.graph()
        image = keras.layers.Input(graph.image.shape)
        tensors = {"image": image}
        for index, node in enumerate(list(graph.nodes.values())[1:]):
            shapes = {role: w.shape for role, w in node.weights.items()}
            config = student.node_config(node)
            layer = GraphLayer(config, shapes, name=f"node_{index}")
            sources = [tensors[name] for name in node.inputs]
            tensors[node.name] = layer(sources if len(sources) > 1 else sources[0])
            layer.set_weights(list(node.weights.values()))
        model = keras.Model(image, tensors[graph.output])
        path = pathlib.Path(helpers.new_folder()) / f"model.{suffix}"
        model.save(path)
        again = keras.models.load_model(path)
        values = np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype(np.float32)
        (expected,) = running.compute(graph, tf.constant(values), [graph.output])
        self.assertAllEqual(model(values), expected)
        self.assertAllEqual(again(values), expected)
        self.assertLen(again.weights, len(model.weights))
        self.assertEqual(again.layers[-1].node, _bare(graph.last))
        self.assertEqual(again.layers[-1].get_config(), model.layers[-1].get_config())
        self.assertEqual(again.output_shape, (None, *graph.last.shape))

    def test_builds_its_weights_once(self):
        sketch = Sketch()
        sketch.conv("conv")
        node = sketch.nodes["conv"]
        shapes = {role: w.shape for role, w in node.weights.items()}
        layer = GraphLayer(student.node_config(node), shapes)
        for _ in range(2):
            layer.build((None, 8, 8, 3))
        self.assertLen(layer.weights, 2)
        self.assertIsNone(layer.get_build_config())


def _bare(node):
    """A node without its weights, which a layer holds by itself."""
    return layers.Node(
        node.name, node.kind, node.inputs, node.shape, node.settings, layers=node.layers
    )


if __name__ == "__main__":
    tf.test.main()
