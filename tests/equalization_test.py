import functools

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.graph import running
from dfq_tf.graph.equalization import equalize, equalized_pairs
from dfq_tf.graph.nodes import Graph
from dfq_tf.importing.reading import read_layers
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import helpers, networks

layers = keras.layers


def uneven(model, seed=0):
    """The model's graph, with random weights of very different sizes."""
    helpers.randomise(model, seed)
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if layer.weights:
            kernel, *bias = layer.get_weights()
            sizes = 10 ** rng.uniform(-2, 2, kernel.shape[-2:])
            layer.set_weights([kernel * sizes, *bias])
    return read_layers(model).graph


def computed(graph, images):
    images = tf.constant(images, tf.float32)
    return running.compute(graph, images, [graph.output])[0].numpy()


def first_conv(filters=4, **settings):
    return layers.Conv2D(filters, 3, padding="same", name="first", **settings)


def second_conv(**settings):
    return layers.Conv2D(6, 1, name="second", **settings)


def chain(*between, first=None, second=None, shape=(8, 8, 3)):
    """Two layers with kernels, what lies between them, and a flatten."""
    image = x = layers.Input(shape)
    for layer in (first or first_conv(), *between, second or second_conv()):
        x = layer(x)
    return uneven(keras.Model(image, layers.Flatten()(x)))


def joined(join):
    """first -> ReLU -> join with another convolution -> second."""
    image = layers.Input((8, 8, 3))
    x = layers.ReLU()(first_conv()(image))
    x = join([x, layers.Conv2D(4, 1, name="other")(image)])
    return uneven(keras.Model(image, layers.Flatten()(second_conv()(x))))


def joined_beside():
    """first -> second and, past it, into a sum: one reader of two can be scaled."""
    image = layers.Input((8, 8, 3))
    x = layers.ReLU()(first_conv()(image))
    y = layers.Conv2D(4, 1, name="second", activation="relu6")(x)
    return uneven(keras.Model(image, layers.Flatten()(layers.Add()([x, y]))))


def output_beside():
    """first -> ReLU, the output."""
    graph = chain(layers.ReLU(name="relu"))
    return Graph(graph.nodes.values(), "relu")


def written(node):
    """Largest magnitude of each output channel of a kernel."""
    kernel = np.abs(node.weights["kernel"])
    if node.kind == "depthwise_conv":
        _, _, channels, multiplier = kernel.shape
        pairs = [(c, j) for c in range(channels) for j in range(multiplier)]
        return np.array([kernel[:, :, c, j].max() for c, j in pairs])
    return np.array([kernel[..., c].max() for c in range(kernel.shape[-1])])


def read(node):
    """Largest magnitude of each input channel of a kernel."""
    kernel = np.abs(node.weights["kernel"])
    if node.kind == "dense":
        return kernel.max(axis=1)
    return np.array([kernel[:, :, c].max() for c in range(kernel.shape[2])])


@functools.cache
def random_model(seed):
    """Branches and joins of layers that all give (8, 8, 4)."""
    rng = np.random.default_rng(seed)
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 1)(image)
    makers = [
        lambda: layers.Conv2D(4, 3, padding="same", activation="relu"),
        lambda: layers.Conv2D(4, 3, padding="same", use_bias=False),
        lambda: layers.Conv2D(4, 1),
        lambda: layers.Conv2D(4, 3, padding="same", groups=2),
        lambda: layers.DepthwiseConv2D(3, padding="same"),
        lambda: layers.ReLU(),
        lambda: layers.LeakyReLU(0.2),
        lambda: layers.MaxPooling2D(3, 1, padding="same"),
        lambda: layers.AveragePooling2D(3, 1, padding="same"),
        lambda: layers.ReLU(6.0),
    ]
    for _ in range(12):
        if rng.uniform() < 0.6:
            x = rng.choice(makers)()(x)
        else:
            x = layers.Add()([rng.choice(makers)()(x) for _ in range(2)])
    return keras.Model(image, layers.Flatten()(x))


_PASSED = {
    "nothing": lambda: chain(),
    "relu": lambda: chain(layers.ReLU()),
    "relu_activation": lambda: chain(layers.Activation("relu")),
    "linear_activation": lambda: chain(layers.Activation("linear")),
    "relu_inside_conv": lambda: chain(first=first_conv(activation="relu")),
    "no_bias": lambda: chain(layers.ReLU(), first=first_conv(use_bias=False)),
    "leaky_relu": lambda: chain(layers.LeakyReLU(0.2)),
    "max_pooling": lambda: chain(layers.MaxPooling2D(3, 2, padding="same")),
    "average_pooling": lambda: chain(layers.AveragePooling2D()),
    "zero_padding": lambda: chain(layers.ReLU(), layers.ZeroPadding2D()),
    "pooling_to_one_pixel": lambda: chain(layers.GlobalMaxPooling2D(keepdims=True)),
    "pooling_to_vector": lambda: chain(
        layers.GlobalAveragePooling2D(), layers.Reshape((1, 1, 4))
    ),
    "flatten_of_one_pixel": lambda: chain(
        layers.AveragePooling2D(8), layers.Flatten(), layers.Reshape((1, 1, 4))
    ),
    "several": lambda: chain(
        layers.MaxPooling2D(), layers.ReLU(), layers.ZeroPadding2D(), layers.ReLU()
    ),
    "relu6_behind_second": lambda: chain(second=second_conv(activation="relu6")),
    "groups_in_first": lambda: chain(first=first_conv(6, groups=3)),
    "strided_same_second": lambda: chain(
        second=layers.Conv2D(6, 3, 2, padding="same", name="second")
    ),
    "depthwise_first": lambda: chain(
        layers.ReLU(), first=layers.DepthwiseConv2D(3, name="first")
    ),
    "depthwise_first_of_two_outputs": lambda: chain(
        layers.ReLU(),
        first=layers.DepthwiseConv2D(3, depth_multiplier=2, name="first"),
    ),
    "depthwise_second": lambda: chain(
        layers.ReLU(), second=layers.DepthwiseConv2D(3, padding="same", name="second")
    ),
    "depthwise_second_of_two_outputs": lambda: chain(
        layers.ReLU(),
        second=layers.DepthwiseConv2D(3, depth_multiplier=2, name="second"),
    ),
    "depthwise_twice": lambda: chain(
        first=layers.DepthwiseConv2D(3, depth_multiplier=2, name="first"),
        second=layers.DepthwiseConv2D(3, depth_multiplier=3, name="second"),
    ),
    "dense_second": lambda: chain(
        layers.ReLU(),
        layers.GlobalAveragePooling2D(),
        second=layers.Dense(5, name="second"),
    ),
    "dense_twice": lambda: chain(
        first=layers.Dense(6, activation="relu", name="first"),
        second=layers.Dense(5, use_bias=False, name="second"),
        shape=(7,),
    ),
    "dense_of_pixels": lambda: chain(
        layers.MaxPooling2D(),
        first=layers.Dense(4, activation="relu", name="first"),
        second=layers.Dense(5, name="second"),
    ),
}

_ENDED = {
    "relu6": lambda: chain(layers.ReLU(6.0)),
    "relu6_activation": lambda: chain(layers.Activation(tf.nn.relu6)),
    "relu6_inside_conv": lambda: chain(first=first_conv(activation="relu6")),
    "relu6_behind_relu": lambda: chain(layers.ReLU(), layers.ReLU(6.0)),
    "tanh": lambda: chain(layers.Activation("tanh")),
    "flatten": lambda: chain(layers.Flatten(), layers.Reshape((1, 1, 256))),
    "reshape_of_channels": lambda: chain(layers.Reshape((8, 16, 2))),
    "maximum_of_channels": lambda: chain(
        lambda x: tf.reduce_max(x, axis=-1, keepdims=True)
    ),
    "groups_in_second": lambda: chain(second=second_conv(groups=2)),
    "add": lambda: joined(layers.Add()),
    "multiply": lambda: joined(layers.Multiply()),
    "concatenate": lambda: joined(layers.Concatenate()),
    "add_beside": joined_beside,
    "output": output_beside,
}


class EqualizeTest(tf.test.TestCase, parameterized.TestCase):
    def _check_same_function(self, graph, equalized, images=None):
        if images is None:
            rng = np.random.default_rng(0)
            images = rng.normal(size=(20, *graph.image.shape))
        expected = computed(graph, images)
        tolerance = 1e-4 * np.ptp(expected)
        self.assertGreater(tolerance, 0)
        self.assertAllClose(computed(equalized, images), expected, 0, tolerance)

    def _check_same_weights(self, graph, other):
        for name, node in graph.nodes.items():
            weights = other.nodes[name].weights
            self.assertEqual(weights.keys(), node.weights.keys())
            for role, value in node.weights.items():
                self.assertAllEqual(weights[role], value)

    @parameterized.parameters(*networks.NETWORKS)
    def test_network_keeps_its_function(self, name):
        network = unequalized(networks.build(name))
        graph, fed = network.graph, network.description
        equalized = equalize(graph)
        pairs = equalized_pairs(equalized)
        self.assertNotEmpty(pairs)
        for first, readers in pairs:
            before = graph.nodes[first.name]
            self.assertNotAllClose(
                first.weights["kernel"], before.weights["kernel"], rtol=0.01
            )
            second = np.max([read(node) for node in readers], axis=0)
            self.assertAllClose(written(first), second, rtol=0.01)
        images = networks.images(network.image_shape, 20).astype(np.float32)
        self._check_same_function(graph, equalized, fed.normalize(images))

    @parameterized.parameters(range(12))
    def test_random_network_keeps_its_function(self, seed):
        graph = uneven(random_model(seed), seed)
        equalized = equalize(graph)
        for first, _ in equalized_pairs(graph):
            other = equalized.nodes[first.name]
            self.assertNotAllClose(
                other.weights["kernel"], first.weights["kernel"], rtol=0.01
            )
        self._check_same_function(graph, equalized)

    def test_random_networks_hold_what_they_are_to_test(self):
        graphs = [read_layers(random_model(seed)).graph for seed in range(12)]
        pairs = [pair for graph in graphs for pair in equalized_pairs(graph)]
        self.assertGreater(len(pairs), 12)
        self.assertGreater(sum(len(readers) > 1 for _, readers in pairs), 2)
        self.assertIn("depthwise_conv", {first.kind for first, _ in pairs})

    @parameterized.named_parameters(_PASSED.items())
    def test_pair_gets_equal_ranges(self, make):
        graph = make()
        equalized = equalize(graph)
        before = written(graph.nodes["first"]), read(graph.nodes["second"])
        expected = np.sqrt(before[0].astype(np.float64) * before[1])
        self.assertNotAllClose(expected, before[0], rtol=0.1)
        self.assertAllClose(written(equalized.nodes["first"]), expected, rtol=1e-5)
        self.assertAllClose(read(equalized.nodes["second"]), expected, rtol=1e-5)
        self._check_same_function(graph, equalized)

    @parameterized.named_parameters(_ENDED.items())
    def test_what_a_factor_does_not_pass_ends_the_pair(self, make):
        graph = make()
        self.assertEmpty(equalized_pairs(graph))
        self._check_same_weights(graph, equalize(graph))

    def test_weights_equal_numpy(self):
        graph = chain(layers.ReLU())
        nodes = graph.nodes
        first, second = written(nodes["first"]), read(nodes["second"])
        self.assertGreater(first.max() / first.min(), 5)
        s = np.sqrt(first.astype(np.float64) * second) / second
        equalized = equalize(graph).nodes
        for name, role, expected in (
            ("first", "kernel", nodes["first"].weights["kernel"] / s),
            ("first", "bias", nodes["first"].weights["bias"] / s),
            ("second", "kernel", nodes["second"].weights["kernel"] * s[:, None]),
            ("second", "bias", nodes["second"].weights["bias"]),
        ):
            # Half a step of float32: the work between is in float64.
            got = equalized[name].weights[role]
            self.assertAllClose(got, expected, rtol=6e-8, atol=0)

    def test_all_readers_are_scaled_as_one(self):
        image = layers.Input((8, 8, 3))
        x = layers.ReLU()(first_conv()(image))
        readers = [
            layers.Conv2D(6, 3, padding="same", name="a")(x),
            layers.Conv2D(6, 1, name="b")(layers.LeakyReLU(0.2)(x)),
        ]
        output = layers.Flatten()(layers.Add()(readers))
        graph = uneven(keras.Model(image, output))
        ((first, found),) = equalized_pairs(graph)
        self.assertEqual(first.name, "first")
        self.assertCountEqual([node.name for node in found], ["a", "b"])

        def read_by_both(graph):
            return np.maximum(read(graph.nodes["a"]), read(graph.nodes["b"]))

        equalized = equalize(graph)
        expected = np.sqrt(written(first).astype(np.float64) * read_by_both(graph))
        self.assertAllClose(written(equalized.nodes["first"]), expected, rtol=1e-5)
        self.assertAllClose(read_by_both(equalized), expected, rtol=1e-5)
        self._check_same_function(graph, equalized)

    def test_chain_converges_to_the_geometric_mean(self):
        # The depthwise kernel has one range per channel, in both of its pairs.
        depthwise = layers.DepthwiseConv2D(3, padding="same", name="middle")
        graph = chain(layers.ReLU(), depthwise, layers.ReLU())
        ranges = [
            written(graph.nodes["first"]),
            read(graph.nodes["middle"]),
            read(graph.nodes["second"]),
        ]
        expected = np.prod(np.asarray(ranges, np.float64), axis=0) ** (1 / 3)
        equalized = equalize(graph)
        for values in (
            written(equalized.nodes["first"]),
            written(equalized.nodes["middle"]),
            read(equalized.nodes["second"]),
        ):
            self.assertAllClose(values, expected, rtol=2e-3)
        self.assertNotAllClose(
            written(equalize(graph, iterations=1).nodes["first"]), expected, rtol=0.1
        )
        self._check_same_function(graph, equalized)

    def test_ends_when_converged(self):
        graph = chain(layers.ReLU(), layers.Conv2D(5, 3), layers.ReLU())
        # Would take hours.
        self._check_same_weights(equalize(graph, 10**9), equalize(graph, 1000))

    def test_no_iterations_leave_all_as_it_is(self):
        graph = chain(layers.ReLU())
        self._check_same_weights(graph, equalize(graph, iterations=0))

    @parameterized.parameters((0.0, 1.0), (1.0, 0.0), (0.0, 0.0))
    def test_dead_channel_stays_as_it_is(self, written_size, read_size):
        image = layers.Input((8, 8, 3))
        first, second = first_conv(), second_conv()
        model = keras.Model(image, layers.Flatten()(second(first(image))))
        uneven(model)
        kernel, bias = first.get_weights()
        kernel[..., 1] *= written_size
        first.set_weights([kernel, bias])
        next_kernel, next_bias = second.get_weights()
        next_kernel[:, :, 1] *= read_size
        second.set_weights([next_kernel, next_bias])
        graph = read_layers(model).graph
        equalized = equalize(graph)
        new = equalized.nodes["first"].weights
        self.assertAllEqual(new["kernel"][..., 1], kernel[..., 1])
        self.assertEqual(new["bias"][1], bias[1])
        self.assertAllEqual(
            equalized.nodes["second"].weights["kernel"][:, :, 1], next_kernel[:, :, 1]
        )
        alive = [0, 2, 3]
        self.assertAllClose(
            written(equalized.nodes["first"])[alive],
            read(equalized.nodes["second"])[alive],
            rtol=1e-5,
        )
        for node in equalized.nodes.values():
            for weight in node.weights.values():
                self.assertAllInRange(weight, -1e6, 1e6)  # neither is NaN
        self._check_same_function(graph, equalized)

    def test_bias_next_to_nothing_of_a_kernel_stays_small(self):
        graph = chain(layers.ReLU())
        weights = {r: w.copy() for r, w in graph.nodes["first"].weights.items()}
        weights["kernel"][..., 2] *= 1e-7
        weights["bias"][2] = 1.0
        graph = graph.with_weights({"first": weights})
        new = equalize(graph).nodes["first"].weights
        self.assertEqual(new["bias"][2], 1.0)
        self.assertAllEqual(new["kernel"][..., 2], weights["kernel"][..., 2])

    def test_factors_do_not_pass_a_grouped_convolution(self):
        # Its outputs mix the channels of a group.
        middle = layers.Conv2D(4, 1, groups=2, use_bias=False, name="middle")
        graph = chain(layers.ReLU(), middle, layers.ReLU())
        ((first, readers),) = equalized_pairs(graph)
        self.assertEqual(
            (first.name, [node.name for node in readers]), ("middle", ["second"])
        )
        self._check_same_function(graph, equalize(graph))

    def test_graph_given_is_unchanged(self):
        graph = unequalized(networks.build("wrn_10_1")).graph
        before = {
            name: helpers.copies(node.weights.values())
            for name, node in graph.nodes.items()
        }
        equalized = equalize(graph)
        self.assertEqual(list(equalized.nodes), list(graph.nodes))
        self.assertEqual(equalized.output, graph.output)
        for name, node in graph.nodes.items():
            self.assertTrue(
                helpers.all_equal(list(node.weights.values()), before[name])
            )
            other = equalized.nodes[name]
            for field in ("kind", "inputs", "shape", "settings", "layers"):
                self.assertEqual(getattr(other, field), getattr(node, field))
            self.assertEqual(list(other.weights), list(node.weights))
            for role, new in other.weights.items():
                self.assertEqual(
                    (new.dtype, new.shape), (np.float32, node.weights[role].shape)
                )

    def test_per_tensor_network_comes_nearer_to_the_float_network(self):
        classifier = badly_scaled()
        images = networks.images(classifier.image_shape, 64)
        expected = classifier.scores(images)

        def error(equalize):
            config = CalibrationConfig(equalize=equalize, bias_correction=False)
            network = float_network(classifier, config)
            widths = BitWidths(per_channel=False)
            scores = post_training(network, images, widths, config).scores(images)
            return np.sqrt(np.mean((scores - expected) ** 2))

        self.assertLess(error(True), error(False) / 5)


def unequalized(classifier):
    """The float network, its neighbouring kernels as they are."""
    return float_network(classifier, CalibrationConfig(equalize=False))


def badly_scaled():
    """A classifier whose channels have sizes that the next layer makes up for."""
    image = layers.Input((8, 8, 3))
    chain = [
        layers.Conv2D(16, 3, padding="same", activation="relu"),
        layers.Conv2D(16, 3, activation="relu"),
        layers.Dense(networks.NUM_CLASSES),
    ]
    x = layers.GlobalAveragePooling2D()(chain[1](chain[0](image)))
    model = helpers.randomise(keras.Model(image, chain[2](x)))
    rng = np.random.default_rng(0)
    for first, second in zip(chain, chain[1:]):
        sizes = 10 ** rng.uniform(-1.5, 1.5, 16)
        kernel, bias = first.get_weights()
        first.set_weights([kernel * sizes, bias * sizes])
        kernel, bias = second.get_weights()
        second.set_weights([kernel / sizes[:, None], bias])
    return helpers.classifier(model)


if __name__ == "__main__":
    tf.test.main()
