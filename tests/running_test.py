from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.graph import layers, running
from dfq_tf.graph.nodes import Graph

CHANNELS = 4


def small_graph():
    """conv -> bn -> relu, which an Add and a pooling read; dense at the end."""
    rng = np.random.default_rng(0)
    image = layers.image("image", (6, 6, 3))
    kernel, bias = rng.normal(size=(3, 3, 3, CHANNELS)), rng.normal(size=CHANNELS)
    conv = layers.node(
        "conv", "conv", [image], weights={"kernel": kernel, "bias": bias}
    )
    roles = ("gamma", "beta", "mean", "variance")
    statistics = {role: rng.uniform(0.5, 2, CHANNELS) for role in roles}
    bn = layers.node("batch_normalization", "bn", [conv], {"epsilon": 1e-3}, statistics)
    relu = layers.node("relu", "relu", [bn])
    both = layers.node("add", "both", [relu, relu])
    pool = layers.node("global_average_pool", "pool", [both])
    weights = {"kernel": rng.normal(size=(CHANNELS, 5))}
    dense = layers.node("dense", "dense", [pool], weights=weights)
    return Graph([image, conv, bn, relu, both, pool, dense], "dense")


def images(count=2):
    shape = (count, 6, 6, 3)
    return tf.constant(np.random.default_rng(1).normal(size=shape), tf.float32)


class ComputeTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.graph, self.images = small_graph(), images()
        self.all = running.compute(self.graph, self.images, list(self.graph.nodes))
        self.outputs = dict(zip(self.graph.nodes, self.all))

    def test_each_output_is_the_function_of_its_inputs(self):
        for name, node in list(self.graph.nodes.items())[1:]:
            inputs = [self.outputs[source] for source in node.inputs]
            expected = layers.KINDS[node.kind].compute(node, inputs, node.weights)
            self.assertAllEqual(self.outputs[name], expected)

    def test_whole_network_equals_numpy(self):
        conv, bn, dense = (self.graph.nodes[n].weights for n in ("conv", "bn", "dense"))
        x = self.images.numpy()
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = np.einsum("bhwcij,ijco->bhwo", windows, conv["kernel"]) + conv["bias"]
        x = (x - bn["mean"]) / np.sqrt(bn["variance"] + 1e-3) * bn["gamma"] + bn["beta"]
        x = 2 * np.maximum(x, 0).mean(axis=(1, 2)) @ dense["kernel"]
        self.assertAllClose(self.outputs["dense"], x, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(
        [["dense"]],
        [["pool", "conv", "dense"]],
        [["relu", "relu", "conv", "relu"]],
        [["image"]],
        [["conv", "image", "both"]],
        [[]],
    )
    def test_outputs_come_in_the_order_that_is_wanted(self, wanted):
        outputs = running.compute(self.graph, self.images, wanted)
        self.assertLen(outputs, len(wanted))
        for name, output in zip(wanted, outputs):
            self.assertAllEqual(output, self.outputs[name])

    def test_image_alone_is_a_network(self):
        graph = Graph([self.graph.image], "image")
        (output,) = running.compute(graph, self.images, ["image"])
        self.assertIs(output, self.images)

    def test_kernel_hook_changes_kernels_and_nothing_else(self):
        seen = []

        def doubled(node, kernel):
            seen.append(node.name)
            self.assertAllEqual(kernel, node.weights["kernel"])
            return 2 * kernel

        outputs = running.compute(
            self.graph, self.images, ["conv", "dense"], kernel=doubled
        )
        self.assertEqual(seen, ["conv", "dense"])
        changed = self.graph.with_weights(
            {
                name: {"kernel": 2 * self.graph.nodes[name].weights["kernel"]}
                for name in seen
            }
        )
        expected = running.compute(changed, self.images, ["conv", "dense"])
        for output, wanted in zip(outputs, expected):
            self.assertAllEqual(output, wanted)
        self.assertNotAllClose(outputs[1], self.outputs["dense"])

    def test_later_nodes_read_what_the_output_hook_gives(self):
        seen = []

        def shifted(node, values):
            seen.append(node.name)
            return values + 1 if node.name == "relu" else values

        outputs = running.compute(
            self.graph, self.images, ["relu", "both", "bn", "dense"], output=shifted
        )
        # The image is no output of a node.
        self.assertEqual(seen, list(self.graph.nodes)[1:])
        self.assertAllEqual(outputs[0], self.outputs["relu"] + 1)
        self.assertAllEqual(outputs[1], 2 * (self.outputs["relu"] + 1))
        self.assertAllEqual(outputs[2], self.outputs["bn"])

    def test_hooks_may_be_together(self):
        (output,) = running.compute(
            self.graph,
            self.images,
            ["dense"],
            kernel=lambda node, kernel: 2 * kernel,
            output=lambda node, values: values / 2 if node.name == "conv" else values,
        )
        bias = self.graph.nodes["conv"].weights["bias"]
        graph = self.graph.with_weights({"conv": {"bias": bias / 2}})
        (expected,) = running.compute(graph, self.images, ["dense"])
        self.assertAllClose(output, 2 * expected, rtol=1e-5)

    def test_given_weights_take_the_place_of_the_graphs_own(self):
        weights = {
            name: {role: tf.constant(value) for role, value in node.weights.items()}
            for name, node in self.graph.nodes.items()
        }
        weights["conv"]["bias"] = weights["conv"]["bias"] + 1
        outputs = running.compute(
            self.graph, self.images, ["conv", "dense"], weights=weights
        )
        self.assertAllClose(outputs[0], self.outputs["conv"] + 1, rtol=1e-6)
        self.assertNotAllClose(outputs[1], self.outputs["dense"])

    def test_gradients_reach_images_and_given_weights(self):
        weights = running.frozen_weights(self.graph)
        kernel = weights["conv"]["kernel"]
        with tf.GradientTape() as tape:
            tape.watch([self.images, kernel])
            (output,) = running.compute(
                self.graph, self.images, ["dense"], weights=weights
            )
            loss = tf.reduce_sum(output**2)
        for gradient in tape.gradient(loss, [self.images, kernel]):
            self.assertGreater(np.abs(gradient).max(), 1e-3)

    def test_what_is_not_wanted_is_let_go(self):
        alive, most = set(), []

        class Values(np.ndarray):
            def __array_finalize__(self, source):
                alive.add(id(self))
                most.append(len(alive))

            def __del__(self):
                alive.discard(id(self))

        image = layers.image("image", (1000,))
        nodes = [image]
        for i in range(20):
            nodes.append(layers.node("relu", f"relu{i}", [nodes[-1]]))
        graph = Graph(nodes, "relu19")

        def copied(node, values):
            return np.array(values).view(Values)

        outputs = running.compute(
            graph, tf.ones((1, 1000)), ["relu19", "relu3"], output=copied
        )
        self.assertLen(outputs, 2)
        self.assertLess(max(most), 8)


class FrozenWeightsTest(tf.test.TestCase, parameterized.TestCase):
    def test_are_the_graphs_own(self):
        graph, pixels = small_graph(), images()
        weights = running.frozen_weights(graph)
        self.assertEqual(weights.keys(), graph.nodes.keys())
        for name, node in graph.nodes.items():
            self.assertEqual(weights[name].keys(), node.weights.keys())
            for role, value in node.weights.items():
                self.assertAllEqual(weights[name][role], value)
                self.assertEqual(weights[name][role].dtype, tf.float32)
        (output,) = running.compute(graph, pixels, ["dense"], weights=weights)
        (expected,) = running.compute(graph, pixels, ["dense"])
        self.assertAllEqual(output, expected)

    def test_are_variables_that_nothing_trains(self):
        weights = running.frozen_weights(small_graph())
        for roles in weights.values():
            for variable in roles.values():
                self.assertIsInstance(variable, tf.Variable)
                self.assertFalse(variable.trainable)
        with tf.GradientTape() as tape:
            running.compute(small_graph(), images(), ["dense"], weights=weights)
        self.assertEmpty(tape.watched_variables())

    def test_bfloat16_is_that_of_kernels_and_biases_alone(self):
        graph = small_graph()
        weights = running.frozen_weights(graph, "bfloat16")
        types = {
            (name, role): variable.dtype
            for name, roles in weights.items()
            for role, variable in roles.items()
        }
        narrow = {key for key, dtype in types.items() if dtype == tf.bfloat16}
        self.assertEqual(
            narrow, {("conv", "kernel"), ("conv", "bias"), ("dense", "kernel")}
        )
        self.assertEqual({*types.values()}, {tf.bfloat16, tf.float32})
        inputs = tf.cast(images(), tf.bfloat16)
        outputs = running.compute(graph, inputs, list(graph.nodes), weights=weights)
        self.assertEqual({output.dtype for output in outputs}, {tf.bfloat16})
        (expected,) = running.compute(graph, images(), ["dense"])
        size = np.abs(expected).max()
        self.assertAllClose(
            tf.cast(outputs[-1], tf.float32), expected, rtol=0, atol=0.03 * size
        )

    @parameterized.parameters("my layer", "a/b", "1:2", "größe")
    def test_node_may_have_any_name(self, name):
        image = layers.image("image", (3,))
        weights = {"kernel": np.ones((3, 2))}
        node = layers.node("dense", name, [image], weights=weights)
        frozen = running.frozen_weights(Graph([image, node], name))
        self.assertAllEqual(frozen[name]["kernel"], np.ones((3, 2)))


class SizesTest(tf.test.TestCase, parameterized.TestCase):
    def test_values_of_all_outputs(self):
        graph = small_graph()
        each = [6 * 6 * 3, *[4 * 4 * CHANNELS] * 4, CHANNELS, 5]
        self.assertEqual(running.num_values(graph), sum(each))
        self.assertEqual(running.largest_output(graph), 6 * 6 * 3)

    def test_nodes_behind_what_is_wanted_are_not_computed(self):
        image = layers.image("image", (6, 6, 3))
        relu = layers.node("relu", "relu", [image])
        # Raises where it is computed.
        bad = layers.unknown("bad", [relu], (6, 6, 3), "Lambda", "it is not known")
        graph = Graph([image, relu, bad], "bad")
        images = tf.constant(np.full((1, 6, 6, 3), -1.0), tf.float32)
        self.assertAllEqual(running.compute(graph, images, ["relu"])[0], 0 * images)
        with self.assertRaisesRegex(ValueError, "bad cannot be computed"):
            running.compute(graph, images, ["bad"])

    def test_sizes_that_may_be_any_count_as_one(self):
        image = layers.image("image", (None, None, 3))
        graph = Graph([image, layers.node("relu", "relu", [image])], "relu")
        self.assertEqual(running.num_values(graph), 6)
        self.assertEqual(running.largest_output(graph), 3)

    @parameterized.parameters(
        (1000, 10, 1, 10),
        (99, 10, 1, 9),
        (9, 10, 1, 1),
        (9, 10, 2, 2),
        (0, 10, 1, 1),
    )
    def test_a_pass_takes_what_there_is_room_for(self, size, most, least, expected):
        with mock.patch.object(running, "PASS_MEMORY", size):
            self.assertEqual(running.images_per_pass(10, most, least), expected)


if __name__ == "__main__":
    tf.test.main()
