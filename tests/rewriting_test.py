import functools

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ModelError, UnsupportedLayerError
from dfq_tf.graph import layers as own
from dfq_tf.graph import rewriting, running
from dfq_tf.graph.nodes import Graph
from dfq_tf.importing.reading import read_layers
from tests import helpers

layers = keras.layers
BN = layers.BatchNormalization

# Kinds that no folded network has.
_GONE = {"batch_normalization", "affine", "channels", "unknown"}


def _model(*chain, shape=(8, 8, 3)):
    """A chain of layers, flattened at its end."""
    image = x = layers.Input(shape)
    for layer in chain:
        x = layer(x)
    if len(x.shape) > 2:
        x = layers.Flatten()(x)
    return keras.Model(image, x)


def _after_add():
    image = layers.Input((8, 8, 3))
    x = layers.Add()([layers.Conv2D(3, 1)(image), image])
    return keras.Model(image, layers.Flatten()(layers.ReLU()(BN()(x))))


def _two_consumers():
    image = layers.Input((8, 8, 3))
    conv = layers.Conv2D(4, 3)(image)
    x = layers.Concatenate()([BN()(conv), conv])
    return keras.Model(image, layers.Flatten()(x))


def _two_bns_of_one_conv():
    image = layers.Input((8, 8, 3))
    conv = layers.Conv2D(4, 3)(image)
    x = layers.Subtract()([BN()(conv), BN()(conv)])
    return keras.Model(image, layers.Flatten()(x))


def _folded_bn_with_two_consumers():
    image = layers.Input((8, 8, 3))
    bn = BN()(layers.Conv2D(4, 3, use_bias=False)(image))
    x = layers.Concatenate()([BN()(bn), bn, layers.ReLU()(bn)])
    return keras.Model(image, layers.Flatten()(x))


def _shared_conv():
    image = layers.Input((8, 8, 3))
    conv = layers.Conv2D(3, 3, padding="same")
    # The same kernel with and without a BN behind it.
    x = layers.ReLU()(conv(BN()(conv(image))))
    return keras.Model(image, layers.Flatten()(x))


def _shared_bn():
    image = layers.Input((8, 8, 3))
    bn = BN()
    x = bn(layers.Conv2D(3, 3)(bn(image)))
    return keras.Model(image, layers.Flatten()(x))


def _dense_of_pixels():
    image = layers.Input((4, 4, 3))
    return keras.Model(image, layers.Flatten()(BN()(layers.Dense(5)(image))))


def _names_already_taken():
    image = layers.Input((8,))
    x = layers.Reshape((8,), name="bn_as_pixel")(layers.ReLU()(image))
    x = BN(name="bn")(layers.ReLU(name="bn_affine")(x))
    return keras.Model(image, layers.Dense(2, name="logits")(x))


def _merges_of_many():
    image = layers.Input((8, 8, 3))
    parts = [layers.Conv2D(4, 3)(image) for _ in range(4)]
    x = layers.Multiply()([layers.Add()(parts), parts[0], parts[1]])
    return keras.Model(image, layers.Flatten()(x))


def _concatenation_of_fixed_ranges():
    image = layers.Input((8, 8, 3))
    a = layers.Conv2D(4, 3)(image)
    parts = [layers.Activation("sigmoid")(a), a, layers.ReLU(2.0)(a)]
    x = layers.Concatenate()(parts)
    vectors = [layers.Flatten()(x), layers.GlobalAveragePooling2D()(a)]
    vectors[1] = layers.Activation("tanh")(vectors[1])
    return keras.Model(image, layers.Concatenate()(vectors))


# Each a function, so that no model is built before its test runs.
_FOLDED = {
    "conv": lambda: _model(layers.Conv2D(4, 3), BN()),
    "conv_without_bias": lambda: _model(layers.Conv2D(4, 3, use_bias=False), BN()),
    "conv_strided_relu": lambda: _model(
        layers.Conv2D(4, 3, 2, padding="same"), BN(), layers.ReLU()
    ),
    "conv_dilated_relu6": lambda: _model(
        layers.Conv2D(4, 3, dilation_rate=2), BN(), layers.ReLU(6.0)
    ),
    "conv_grouped": lambda: _model(layers.Conv2D(6, 3, groups=3), BN()),
    "conv_of_uneven_kernel": lambda: _model(
        layers.Conv2D(4, (1, 5), padding="same"), BN()
    ),
    "conv_with_named_linear_activation": lambda: _model(
        layers.Conv2D(4, 3, activation="linear"), BN()
    ),
    "depthwise": lambda: _model(layers.DepthwiseConv2D(3), BN()),
    "depthwise_strided_without_bias": lambda: _model(
        layers.DepthwiseConv2D(3, 2, padding="same", use_bias=False),
        BN(),
        layers.Activation("relu6"),
    ),
    "depthwise_of_two_outputs_per_channel": lambda: _model(
        layers.DepthwiseConv2D(3, depth_multiplier=2), BN()
    ),
    "depthwise_dilated": lambda: _model(
        layers.DepthwiseConv2D(3, dilation_rate=2, padding="same"), BN()
    ),
    "dense": lambda: _model(layers.Dense(5), BN(), layers.ReLU(), shape=(7,)),
    "dense_without_bias": lambda: _model(
        layers.Dense(5, use_bias=False), BN(), shape=(7,)
    ),
    "dense_of_pixels": _dense_of_pixels,
    "two_in_a_row": lambda: _model(layers.Conv2D(4, 3), BN(), BN(), BN()),
    "dropout_between": lambda: _model(
        layers.Conv2D(4, 3), layers.Dropout(0.5), BN(), layers.Dropout(0.5)
    ),
    "linear_activation_between": lambda: _model(
        layers.Conv2D(4, 3), layers.Activation("linear"), BN()
    ),
    "bn_without_scale": lambda: _model(layers.Conv2D(4, 3), BN(scale=False)),
    "bn_without_center": lambda: _model(layers.Conv2D(4, 3), BN(center=False)),
    "bn_of_mean_and_variance_only": lambda: _model(
        layers.Conv2D(4, 3), BN(scale=False, center=False)
    ),
    "bn_of_large_epsilon": lambda: _model(layers.Conv2D(4, 3), BN(epsilon=0.5)),
    "bn_of_named_axis": lambda: _model(layers.Conv2D(4, 3), BN(axis=3)),
    "bn_frozen": lambda: _model(layers.Conv2D(4, 3), BN(trainable=False)),
    "shared_conv": _shared_conv,
}

_STANDALONE = {
    "first_layer": lambda: _model(BN(), layers.Conv2D(4, 3)),
    "first_layer_padded": lambda: _model(BN(), layers.Conv2D(4, 3, padding="same")),
    "after_add": _after_add,
    "after_pool": lambda: _model(layers.MaxPooling2D(), BN()),
    "after_relu_inside_conv": lambda: _model(
        layers.Conv2D(4, 3, activation="relu"), BN()
    ),
    "after_relu": lambda: _model(layers.Conv2D(4, 3), layers.ReLU(), BN()),
    "of_vectors": lambda: _model(
        layers.GlobalAveragePooling2D(), BN(), layers.Dense(5)
    ),
    "of_vectors_two_in_a_row": lambda: _model(
        layers.GlobalAveragePooling2D(), BN(), BN(), layers.Dense(5)
    ),
    "two_in_a_row": lambda: _model(layers.MaxPooling2D(), BN(), BN(center=False)),
    "without_scale": lambda: _model(layers.MaxPooling2D(), BN(scale=False)),
    "conv_read_twice": _two_consumers,
    "two_of_one_conv": _two_bns_of_one_conv,
    "folded_one_read_twice": _folded_bn_with_two_consumers,
    "shared": _shared_bn,
    "names_already_taken": _names_already_taken,
    "only_layer_of_vectors": lambda: _model(BN(), shape=(7,)),
}

_OTHER = {
    "separable": lambda: _model(layers.SeparableConv2D(5, 3), BN(), layers.ReLU()),
    "separable_strided": lambda: _model(
        layers.SeparableConv2D(5, 3, 2, padding="same", use_bias=False)
    ),
    "separable_dilated_relu": lambda: _model(
        layers.SeparableConv2D(
            5, 3, dilation_rate=2, depth_multiplier=2, activation="relu"
        ),
        BN(),
    ),
    "separable_twice": lambda: _model(
        layers.SeparableConv2D(5, 3), layers.SeparableConv2D(4, (3, 1))
    ),
    "training_only": lambda: _model(
        layers.GaussianNoise(1.0),
        layers.Dropout(0.5),
        layers.Conv2D(4, 3),
        layers.SpatialDropout2D(0.5),
        layers.AlphaDropout(0.5),
        layers.GaussianDropout(0.5),
        layers.ActivityRegularization(0.1),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
        layers.Dropout(0.5),
    ),
    "activations_of_layers": lambda: _model(
        layers.Conv2D(4, 3, activation="swish"),
        BN(),
        layers.DepthwiseConv2D(3, activation="hard_sigmoid"),
        BN(),
        layers.Conv2D(4, 1, activation="tanh"),
        layers.SeparableConv2D(4, 1, activation="sigmoid"),
        layers.Flatten(),
        layers.Dense(5, activation="swish"),
        layers.Dense(3),
    ),
    "activations": lambda: _model(
        layers.Activation("swish"),
        layers.Conv2D(4, 3),
        layers.Activation("hard_sigmoid"),
        layers.Activation("swish"),
    ),
    "rescaling": lambda: _model(
        layers.Conv2D(4, 3),
        layers.Rescaling([1.0, -2.0, 3.0, 0.5], 3.0),
        layers.ReLU(6.0),
        layers.Rescaling(1 / 6),
        layers.MaxPooling2D(),
        layers.Rescaling(2.0, [1.0, 2.0, 3.0, 4.0]),
    ),
    "merges_of_many": _merges_of_many,
    "concatenation_of_fixed_ranges": _concatenation_of_fixed_ranges,
    "relu_with_a_top_behind_pooling": lambda: _model(
        layers.AveragePooling2D(), layers.ReLU(1.5)
    ),
    "dense_softmax": lambda: _model(
        layers.Flatten(), layers.Dense(6, "relu"), layers.Dense(3, "softmax")
    ),
}


@functools.cache
def _random_model(seed):
    """A random network of branches, joins, BN layers and what may surround them."""
    rng = np.random.default_rng(seed)
    image = layers.Input((8, 8, int(rng.integers(1, 4))))
    tensors = [image]

    def padded(layer_class, *arguments):
        return layer_class(
            *arguments,
            padding="same",
            use_bias=bool(rng.integers(2)),
            activation=rng.choice([None, None, "relu"]),
            dilation_rate=int(rng.integers(1, 3)),
        )

    def bn():
        return BN(scale=bool(rng.integers(2)), center=bool(rng.integers(2)))

    def conv():
        return padded(layers.Conv2D, int(rng.integers(1, 6)), 3)

    makers = [
        bn,
        bn,
        bn,
        conv,
        conv,
        lambda: padded(layers.DepthwiseConv2D, 3),
        lambda: padded(layers.SeparableConv2D, int(rng.integers(1, 6)), 3),
        lambda: layers.ReLU(rng.choice([None, 6.0])),
        lambda: layers.MaxPooling2D(3, 1, padding="same"),
        lambda: layers.Dropout(0.5),
    ]
    for _ in range(int(rng.integers(6, 14))):
        # Mostly the newest tensor, at times an older one: a branch.
        start = (
            tensors[-1] if rng.random() < 0.7 else tensors[rng.integers(len(tensors))]
        )
        if rng.random() < 0.25:
            other = tensors[rng.integers(len(tensors))]
            joins = [layers.Concatenate()]
            if start.shape == other.shape:
                joins += [layers.Add(), layers.Subtract()]
            join = joins[rng.integers(len(joins))]
            tensors.append(join([start, other]))
        else:
            tensors.append(makers[rng.integers(len(makers))]()(start))
    x = layers.Concatenate()([tensors[-1], tensors[len(tensors) // 2]])
    x = layers.GlobalAveragePooling2D()(x)
    for _ in range(int(rng.integers(0, 3))):
        x = bn()(x) if rng.random() < 0.5 else layers.Dense(int(rng.integers(2, 6)))(x)
    return keras.Model(image, layers.Dense(3, name="logits")(x))


def _read(model):
    return read_layers(model).graph


def _computed(graph, inputs):
    inputs = tf.constant(inputs, tf.float32)
    return running.compute(graph, inputs, [graph.output])[0].numpy()


def _kinds(graph):
    return [node.kind for node in graph.nodes.values()]


class WholeWayTest(parameterized.TestCase, tf.test.TestCase):
    """From the Keras model to the folded graph, the function stays as it is."""

    def _folded(self, model):
        """The folded graph, after a check that its outputs are the model's."""
        graph = rewriting.fold(_read(model))
        inputs = helpers.random_inputs(model)
        expected = model(inputs, training=False).numpy()
        size = np.abs(expected).max()
        self.assertGreater(size, 0.01)
        output = _computed(graph, inputs)
        self.assertAllClose(output, expected, rtol=0, atol=2e-5 * size)
        self.assertEmpty(_GONE.intersection(_kinds(graph)))
        return graph

    @parameterized.named_parameters(_FOLDED.items())
    def test_bn_goes_into_the_weights_before_it(self, make):
        model = helpers.randomise(make())
        before = _read(model)
        graph = self._folded(model)
        kept = [n for n in before.nodes.values() if n.kind != "batch_normalization"]
        self.assertEqual(
            [(node.name, node.kind) for node in graph.nodes.values()],
            [(node.name, node.kind) for node in kept],
        )

    @parameterized.named_parameters(_STANDALONE.items())
    def test_bn_with_nothing_to_go_into_becomes_a_depthwise_conv(self, make):
        graph = self._folded(helpers.randomise(make()))
        affine = [
            node
            for node in graph.nodes.values()
            if node.kind == "depthwise_conv"
            and node.weights["kernel"].shape[:2] == (1, 1)
        ]
        self.assertNotEmpty(affine)

    @parameterized.named_parameters(_OTHER.items())
    def test_other_layers_keep_the_outputs(self, make):
        self._folded(helpers.randomise(make()))

    def test_hard_swish_in_pieces_is_an_affine_a_relu_and_a_product(self):
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="conv")(image)
        gate = layers.ReLU(6.0, name="relu6")(layers.Rescaling(1.0, 3.0, name="up")(x))
        x = layers.Multiply()([x, layers.Rescaling(1 / 6, name="down")(gate)])
        graph = self._folded(keras.Model(image, layers.Flatten()(x)))
        self.assertEqual(
            _kinds(graph),
            ["image", "conv", "depthwise_conv", "relu", "multiply", "reshape"],
        )
        _, conv, line, relu, *_ = graph.nodes.values()
        self.assertAlmostEqual(relu.settings["top"], 1.0)
        # Each layer of the user's stands where its work is done.
        self.assertEqual(conv.layers, ("conv",))
        self.assertCountEqual(line.layers, ["up", "down"])
        self.assertEqual(relu.layers, ("relu6",))

    def test_scale_that_is_not_of_all_channels_stays_behind_the_relu(self):
        model = _model(layers.ReLU(6.0), layers.Rescaling([1.0, 2.0, 3.0]))
        graph = self._folded(model)
        self.assertEqual(_kinds(graph), ["image", "relu", "depthwise_conv", "reshape"])

    @parameterized.parameters("wrn_10_1", "wrn_16_1")
    def test_wide_resnet_keeps_the_outputs(self, name):
        model = helpers.randomise(models.build_model(name, (16, 16, 3), 5))
        self._folded(model)

    @parameterized.parameters(range(10))
    def test_random_network_keeps_the_outputs(self, seed):
        self._folded(helpers.randomise(_random_model(seed), seed))

    @parameterized.parameters(range(10, 25))
    @pytest.mark.long
    def test_so_do_further_ones(self, seed):
        self._folded(helpers.randomise(_random_model(seed), seed))

    def test_random_networks_hold_what_they_are_to_test(self):
        kinds, joined = set(), 0
        for seed in range(10):
            graph = _read(_random_model(seed))
            kinds.update(_kinds(graph))
            joined += any(len(graph.consumers(name)) > 1 for name in graph.nodes)
        expected = {"batch_normalization", "depthwise_conv", "add", "relu", "max_pool"}
        self.assertContainsSubset(expected, kinds)
        self.assertGreater(joined, 7)

    def test_two_bns_in_a_row_become_one_depthwise_conv(self):
        graph = self._folded(helpers.randomise(_STANDALONE["two_in_a_row"]()))
        self.assertEqual(
            _kinds(graph), ["image", "max_pool", "depthwise_conv", "reshape"]
        )

    def test_bn_may_be_the_output(self):
        image = layers.Input((6,))
        for producer in (layers.Dense(4), layers.ReLU()):
            model = helpers.randomise(keras.Model(image, BN()(producer(image))))
            self._folded(model)

    def test_nothing_to_fold_leaves_the_graph_as_it_is(self):
        model = helpers.randomise(_model(layers.Conv2D(4, 3), layers.ReLU()))
        graph = _read(model)
        folded = rewriting.fold(graph)
        self.assertEqual(list(folded.nodes), list(graph.nodes))
        inputs = helpers.random_inputs(model)
        self.assertAllEqual(_computed(folded, inputs), _computed(graph, inputs))

    def test_what_is_given_is_unchanged(self):
        model = helpers.small_learner().model
        before = helpers.copies(model.weights)
        graph = _read(model)
        nodes = dict(graph.nodes)
        arrays = {n: helpers.copies(o.weights.values()) for n, o in nodes.items()}
        rewriting.fold(graph)
        self.assertTrue(helpers.all_equal(model.weights, before))
        self.assertEqual(list(graph.nodes), list(nodes))
        for name, node in graph.nodes.items():
            self.assertIs(node, nodes[name])
            self.assertTrue(
                helpers.all_equal(list(node.weights.values()), arrays[name])
            )


# Graphs of nodes made by hand.


def _image(shape=(6, 6, 3), name="image"):
    return own.image(name, shape, ["input"])


def _conv(name, source, outputs=4, size=3, seed=0, **settings):
    """A convolution with a random kernel and bias."""
    rng = np.random.default_rng(seed)
    inputs = source.shape[-1] // settings.get("groups", 1)
    weights = {
        "kernel": rng.normal(size=(size, size, inputs, outputs)),
        "bias": rng.normal(size=outputs),
    }
    return own.node("conv", name, [source], settings, weights, [name])


def _node(kind, name, *sources, **settings):
    return own.node(kind, name, sources, settings, layers=[name])


def _graph(*nodes):
    return Graph(nodes, nodes[-1].name)


class PassesTest(parameterized.TestCase, tf.test.TestCase):
    def _folded(self, *nodes):
        """The folded graph of nodes, after a check that its function is the same."""
        graph = _graph(*nodes)
        folded = rewriting.fold(graph)
        shape = (4, *graph.image.shape)
        inputs = 5 * np.random.default_rng(0).normal(size=shape)
        expected = _computed(graph, inputs)
        size = np.abs(expected).max()
        self.assertGreater(size, 0.01)
        self.assertAllClose(_computed(folded, inputs), expected, atol=2e-6 * size)
        self.assertEqual(folded.last.shape, graph.last.shape)
        return folded

    def _with_order(self, order):
        image = _image()
        return [image, _node("channels", "order", image, order=order)]

    def test_order_of_channels_goes_into_the_convolutions_behind_it(self):
        image, order = self._with_order([2, 0, 1])
        pad = _node("pad", "pad", order, margins=((1, 1), (1, 1)))
        one, other = _conv("one", pad), _conv("other", pad, seed=1)
        both = _node("add", "both", one, other)
        graph = self._folded(image, order, pad, one, other, both)
        self.assertEqual(list(graph.nodes), ["image", "pad", "one", "other", "both"])
        self.assertEqual(graph.image.layers, ("input", "order"))
        for node in (one, other):
            self.assertAllEqual(
                graph.nodes[node.name].weights["kernel"][:, :, [2, 0, 1]],
                node.weights["kernel"],
            )

    @parameterized.parameters(None, 6.0)
    def test_relu_of_a_maximum_goes_before_it(self, top):
        image = _image()
        conv = _conv("conv", image)
        small = _node("max_pool", "small", conv, size=(2, 2), strides=(2, 2))
        least = _node("global_max_pool", "least", small)
        relu = _node("relu", "relu", least, top=top)
        graph = self._folded(image, conv, small, least, relu)
        self.assertEqual(
            _kinds(graph), ["image", "conv", "relu", "max_pool", "global_max_pool"]
        )
        nodes = list(graph.nodes.values())
        self.assertEqual(nodes[2].settings["top"], top)
        said = [node.layers for node in nodes[2:]]
        self.assertEqual(said, [("relu",), ("small",), ("least",)])

    @parameterized.parameters("pool", "conv")
    def test_relu_of_a_maximum_that_another_node_reads_stays(self, read):
        image = _image()
        conv = _conv("conv", image)
        pool = _node("max_pool", "pool", conv, size=(1, 1), strides=(1, 1))
        relu = _node("relu", "relu", pool)
        both = _node("add", "both", {"pool": pool, "conv": conv}[read], relu)
        graph = self._folded(image, conv, pool, relu, both)
        self.assertEqual(_kinds(graph), ["image", "conv", "max_pool", "relu", "add"])

    def test_relu_of_a_maximum_stays_where_nothing_takes_it_in(self):
        image = _image()
        pool = _node("max_pool", "pool", image, size=(2, 2), strides=(2, 2))
        graph = self._folded(image, pool, _node("relu", "relu", pool))
        self.assertEqual(_kinds(graph), ["image", "max_pool", "relu"])

    def test_two_orders_of_channels_in_a_row(self):
        image, order = self._with_order([2, 0, 1])
        again = _node("channels", "again", order, order=[1, 0, 2])
        graph = self._folded(image, order, again, _conv("conv", again))
        self.assertEqual(_kinds(graph), ["image", "conv", "conv"])

    @parameterized.named_parameters(
        ("relu", lambda order: [_node("relu", "relu", order)]),
        ("grouped", lambda order: [_conv("conv", order, 3, groups=3)]),
        (
            "relu_beside",
            lambda order: [
                _conv("conv", order, 3, size=1),
                _node("relu", "relu", order),
            ],
        ),
        (
            "relu_behind_padding",
            lambda order: [
                _node("pad", "pad", order, margins=((0, 1), (0, 1))),
                _conv("conv", order, 3, padding="same"),
            ],
        ),
    )
    def test_order_of_channels_that_another_node_reads_is_a_convolution(self, make):
        image, order = self._with_order([1, 2, 0])
        behind = make(order)
        if len(behind) > 1:
            pool = [_node("global_max_pool", f"{n.name}_pool", n) for n in behind]
            behind += [*pool, _node("add", "both", *pool)]
        graph = self._folded(image, order, *behind)
        conv = graph.nodes["order"]
        self.assertEqual(conv.kind, "conv")
        self.assertAllEqual(conv.weights["kernel"][0, 0], np.eye(3)[:, [1, 2, 0]])
        self.assertEqual(conv.layers, ("order",))

    @parameterized.parameters(([0],), ([2, 2, 0],), ([1, 0],), ([0, 1, 2, 0],))
    def test_some_channels_are_a_convolution(self, order):
        image, some = self._with_order(order)
        graph = self._folded(image, some, _conv("conv", some))
        self.assertEqual(list(graph.nodes), ["image", "order", "conv"])
        self.assertAllEqual(
            graph.nodes["order"].weights["kernel"][0, 0], np.eye(3)[:, order]
        )

    def test_order_of_channels_at_the_end_is_a_convolution(self):
        graph = self._folded(*self._with_order([2, 1, 0]))
        self.assertEqual(_kinds(graph), ["image", "conv"])

    def test_order_in_a_vector_is_left_to_be_refused(self):
        image = _image((4,))
        graph = _graph(image, _node("channels", "order", image, order=[3, 0, 1, 2]))
        (problem,) = rewriting.refused(rewriting.fold(graph))
        self.assertEqual((problem.name, problem.kind), ("order", "channels"))

    @parameterized.parameters((None, None), (6.0, 3.0), (1.5, 0.75))
    def test_scale_behind_a_relu_goes_before_it(self, top, expected):
        image = _image()
        conv = _conv("conv", image)
        relu = _node("relu", "relu", conv, top=top)
        scale = _node("affine", "scale", relu, scale=0.5, offset=0.0)
        graph = self._folded(image, conv, relu, scale)
        self.assertEqual(list(graph.nodes), ["image", "conv", "scale"])
        self.assertEqual(graph.last.kind, "relu")
        self.assertEqual(graph.last.settings["top"], expected)
        self.assertEqual(graph.last.layers, ("relu",))
        self.assertEqual(graph.nodes["conv"].layers, ("conv", "scale"))
        self.assertAllClose(
            graph.nodes["conv"].weights["kernel"], conv.weights["kernel"] / 2
        )

    @parameterized.named_parameters(
        ("below_0", {"scale": -2.0, "offset": 0.0}),
        ("offset", {"scale": 2.0, "offset": 0.1}),
        ("by_channel", {"scale": (1.0, 2.0, 3.0), "offset": 0.0}),
    )
    def test_other_affine_functions_stay_behind_the_relu(self, settings):
        image = _image()
        relu = _node("relu", "relu", image, top=6.0)
        graph = self._folded(image, relu, _node("affine", "line", relu, **settings))
        self.assertEqual(_kinds(graph), ["image", "relu", "depthwise_conv"])

    def test_scale_behind_a_relu_that_others_read_stays(self):
        image = _image()
        relu = _node("relu", "relu", image)
        scale = _node("affine", "scale", relu, scale=2.0, offset=0.0)
        graph = self._folded(image, relu, scale, _node("add", "both", relu, scale))
        self.assertEqual(_kinds(graph), ["image", "relu", "depthwise_conv", "add"])

    def test_scale_behind_a_leaky_relu_stays(self):
        image = _image()
        leaky = _node("leaky_relu", "leaky", image, slope=0.1)
        scale = _node("affine", "scale", leaky, scale=2.0, offset=0.0)
        graph = self._folded(image, leaky, scale)
        self.assertEqual(_kinds(graph), ["image", "leaky_relu", "depthwise_conv"])

    def test_affine_goes_into_a_kernel_without_bias(self):
        image = _image((5,))
        kernel = np.random.default_rng(0).normal(size=(5, 2))
        dense = own.node("dense", "dense", [image], weights={"kernel": kernel})
        line = _node("affine", "line", dense, scale=(2.0, -1.0), offset=(0.0, 3.0))
        graph = self._folded(image, dense, line)
        self.assertEqual(_kinds(graph), ["image", "dense"])
        self.assertAllClose(graph.last.weights["kernel"], kernel * [2, -1])
        self.assertAllClose(graph.last.weights["bias"], [0, 3])
        self.assertEqual(graph.last.layers, ("line",))

    @parameterized.parameters(
        ("conv", (3, 3, 3, 4), {}),
        ("conv", (1, 1, 3, 4), dict(padding="same", strides=(2, 2))),
        ("depthwise_conv", (2, 3, 3, 2), dict(dilation=(1, 2))),
        ("dense", (3, 4), {}),
    )
    def test_scale_and_offset_of_a_normalization_go_into_kernels_behind_it(
        self, kind, shape, settings
    ):
        nodes = self._normalized((0.5, -2.0, 3.0), (1.0, 0.0, -1.5))
        rng = np.random.default_rng(0)
        for i, weights in enumerate(({}, {"bias": rng.normal(size=4)})):
            if kind == "depthwise_conv":
                weights = {role: np.ones(6) for role in weights}
            weights["kernel"] = rng.normal(size=shape)
            nodes.append(own.node(kind, f"{i}", [nodes[2]], settings, weights))
        graph = self._folded(*nodes, _node("add", "sum", *nodes[-2:]))
        expected = ["image", "layer_normalization", kind, kind, "add"]
        self.assertEqual(_kinds(graph), expected)

    def test_zeros_around_a_normalized_image_have_no_offset(self):
        for offset, stays in ((0.0, False), (1.0, True)):
            image, norm, line = self._normalized((0.5, -2.0, 3.0), offset)
            conv = _conv("conv", line, padding="same")
            graph = self._folded(image, norm, line, conv)
            middle = ["depthwise_conv"] if stays else []
            expected = ["image", "layer_normalization", *middle, "conv"]
            self.assertEqual(_kinds(graph), expected)

    @parameterized.parameters(
        lambda line: _node("relu", "relu", line),
        lambda line: _conv("conv", line, outputs=6, groups=3),
        lambda line: _node("pad", "pad", line, margins=((1, 0), (0, 1))),
    )
    def test_scale_and_offset_of_a_normalization_that_others_read_stay(self, make):
        image, norm, line = self._normalized((0.5, -2.0, 3.0), 1.0)
        other = make(line)
        dense = own.node("dense", "dense", [line], weights={"kernel": np.ones((3, 2))})
        pools = [
            _node("global_max_pool", f"pool_{each.name}", each)
            for each in (other, dense)
        ]
        last = _node("concatenate", "last", *pools)
        graph = self._folded(image, norm, line, other, dense, *pools, last)
        self.assertIn("depthwise_conv", _kinds(graph))

    def test_scale_and_offset_of_a_normalization_may_be_the_output(self):
        graph = self._folded(*self._normalized((0.5, -2.0, 3.0), 1.0))
        kinds = ["image", "layer_normalization", "depthwise_conv"]
        self.assertEqual(_kinds(graph), kinds)

    def _normalized(self, scale, offset):
        image = _image()
        norm = _node("layer_normalization", "norm", image, epsilon=1e-3)
        return [image, norm, _node("affine", "line", norm, scale=scale, offset=offset)]

    def test_affine_behind_an_unknown_node_is_a_depthwise_convolution(self):
        image = _image()
        odd = own.unknown("odd", [image], (6, 6, 3), "Lambda", "it holds code")
        line = _node("affine", "line", odd, scale=2.0, offset=1.0)
        graph = rewriting.fold(_graph(image, odd, line))
        self.assertEqual(_kinds(graph), ["image", "unknown", "depthwise_conv"])

    def test_all_weights_of_a_batch_normalization_count(self):
        rng = np.random.default_rng(0)
        image = _image()
        conv = _conv("conv", image)
        weights = {
            role: rng.uniform(0.5, 2, 4)
            for role in ("gamma", "beta", "mean", "variance")
        }
        bn = own.node(
            "batch_normalization", "bn", [conv], {"epsilon": 0.1}, weights, ["bn"]
        )
        graph = self._folded(image, conv, bn)
        scale = weights["gamma"] / np.sqrt(weights["variance"] + 0.1)
        kernel, bias = (conv.weights[role] for role in ("kernel", "bias"))
        folded = graph.nodes["conv"].weights
        self.assertAllClose(folded["kernel"], kernel * scale, rtol=1e-6)
        expected = (bias - weights["mean"]) * scale + weights["beta"]
        self.assertAllClose(folded["bias"], expected, rtol=1e-6)
        self.assertEqual(graph.nodes["conv"].layers, ("conv", "bn"))
        self.assertEqual(graph.output, "conv")

    @parameterized.parameters(
        dict(size=(6, 5), strides=(6, 5)),
        dict(size=(6, 5), strides=(1, 1)),
        dict(size=(6, 5), strides=(6, 5), padding="same"),
        dict(size=(9, 8), strides=(6, 5), padding="same"),
    )
    def test_average_over_the_whole_image_is_the_global_one(self, **settings):
        image = _image((6, 5, 3))
        conv = _conv("conv", image, padding="same")
        folded = self._folded(image, conv, _node("average_pool", "p", conv, **settings))
        last = folded.last
        self.assertEqual((last.kind, last.name), ("global_average_pool", "p"))
        self.assertEqual((last.shape, last.layers), ((1, 1, 4), ("p",)))

    @parameterized.parameters(
        ("average_pool", dict(size=(6, 4), strides=(6, 5))),
        ("average_pool", dict(size=(4, 4), strides=(6, 5), padding="same")),
        ("average_pool", dict(size=(6, 5), strides=(3, 5), padding="same")),
        ("max_pool", dict(size=(6, 5), strides=(6, 5))),
    )
    def test_other_poolings_stay_as_they_are(self, kind, settings):
        image = _image((6, 5, 3))
        folded = self._folded(image, _node(kind, "pool", image, **settings))
        self.assertEqual(folded.last.kind, kind)

    def test_affine_of_gives_one_scale_and_shift_per_channel(self):
        image = _image()
        line = _node("affine", "line", image, scale=-2.0, offset=[1.0, 0.0, 3.0])
        scale, shift = rewriting.affine_of(line)
        self.assertAllEqual(scale, [-2, -2, -2])
        self.assertAllEqual(shift, [1, 0, 3])
        self.assertEqual((scale.dtype, shift.dtype), (np.float64, np.float64))

    def test_affine_of_a_batch_normalization_equals_the_layer(self):
        model = helpers.randomise(_model(BN(epsilon=0.01), shape=(7,)))
        node = _read(model).last
        scale, shift = rewriting.affine_of(node)
        inputs = helpers.random_inputs(model)
        self.assertAllClose(
            inputs * scale + shift, model(inputs, training=False), atol=1e-5
        )


class RefusedTest(parameterized.TestCase, tf.test.TestCase):
    def _refused(self, model, message):
        graph = rewriting.fold(_read(model))
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            rewriting.check_supported(graph)

    @parameterized.parameters(1, 2)
    def test_bn_of_another_axis_is_refused(self, axis):
        self._refused(
            _model(layers.Conv2D(4, 3), BN(axis=axis, name="bn")),
            rf"layer bn \(BatchNormalization\) .* has axis {axis}; only the last axis",
        )

    def test_bn_of_sequences_is_refused(self):
        self._refused(
            _model(layers.Reshape((64, 3)), BN(name="bn")),
            r"layer bn .* input of shape \(64, 3\); only images and vectors",
        )

    def test_dense_of_rows_is_refused(self):
        self._refused(
            _model(layers.Reshape((8, 24)), layers.Dense(4, name="mix")),
            r"layer mix \(dense\) .* has an input of shape \(8, 24\); .*Flatten",
        )

    def test_all_problems_are_named_by_the_users_layers(self):
        image = _image()
        odd = own.unknown("odd", [image], (6, 6, 3), "Lambda", "it holds code")
        soft = own.node("softmax", "act_softmax", [odd], layers=["act"])
        graph = _graph(image, odd, soft, _conv("conv", soft))
        problems = rewriting.refused(rewriting.fold(graph))
        self.assertEqual(
            problems,
            [
                ("odd", "Lambda", "it holds code"),
                (
                    "act",
                    "softmax",
                    "a softmax that is not at the network's end is not known",
                ),
            ],
        )
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"layer odd \(Lambda\) cannot be quantized: it holds code; layer act "
            r"\(softmax\) .*What can be: Conv2D, ",
        ) as caught:
            rewriting.check_supported(graph)
        self.assertEqual(caught.exception.problems, tuple(problems))

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_weights_that_are_not_finite_are_refused(self, value):
        image = _image()
        conv = _conv("conv", image)
        bias = np.append(conv.weights["bias"][:-1], value)
        graph = _graph(image, conv.with_weights(bias=bias))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer conv \(conv\) .* NaN or infinite weights"
        ):
            rewriting.check_supported(graph)

    def test_network_of_known_layers_passes(self):
        graph = rewriting.fold(_read(helpers.small_learner().model))
        self.assertEmpty(rewriting.refused(graph))
        rewriting.check_supported(graph)


class LogitsGraphTest(parameterized.TestCase, tf.test.TestCase):
    def _softmax_models(self):
        yield [layers.Dense(3), layers.Softmax()]
        yield [layers.Dense(3), layers.Activation("softmax")]
        yield [layers.Dense(3), layers.Activation(tf.nn.softmax)]
        yield [layers.Dense(3, activation="softmax")]
        yield [layers.Dense(3, activation=tf.nn.softmax)]
        yield [layers.Reshape((1, 1, 7)), layers.Conv2D(3, 1, activation="softmax")]

    def test_softmax_at_the_end_is_taken_off(self):
        for chain in self._softmax_models():
            model = helpers.randomise(_model(*chain, shape=(7,)))
            if isinstance(model.layers[-1], layers.Flatten):
                image = model.input
                model = keras.Model(image, model.layers[-2].output)
            graph = _read(model)
            self.assertEqual(rewriting.head_activation(graph), "softmax")
            graph = rewriting.logits_graph(graph, helpers.description(3, "softmax"))
            self.assertEqual(rewriting.head_activation(graph), "logits")
            inputs = helpers.random_inputs(model)
            logits = _computed(graph, inputs)
            self.assertGreater(np.abs(logits.sum(axis=-1) - 1).max(), 0.01)
            expected = model(inputs).numpy()
            self.assertAllClose(tf.nn.softmax(logits), expected, atol=1e-6)

    @parameterized.parameters(
        lambda: [layers.Dense(3, activation="sigmoid")],
        lambda: [layers.Dense(3), layers.Activation("sigmoid")],
    )
    def test_sigmoid_at_the_end_is_taken_off(self, chain):
        model = helpers.randomise(_model(*chain(), shape=(7,)))
        graph = _read(model)
        self.assertEqual(rewriting.head_activation(graph), "sigmoid")
        graph = rewriting.logits_graph(graph, helpers.description(3, "sigmoid"))
        inputs = helpers.random_inputs(model)
        logits = _computed(graph, inputs)
        self.assertAllClose(tf.nn.sigmoid(logits), model(inputs), atol=1e-6)

    def test_logits_are_left_as_they_are(self):
        model = _model(layers.Dense(3), layers.Softmax(), shape=(7,))
        graph = _read(model)
        self.assertIs(rewriting.logits_graph(graph, helpers.description(3)), graph)

    @parameterized.parameters(
        (lambda: layers.Dense(3, name="last"), "dense"),
        (lambda: layers.Activation("sigmoid", name="last"), "sigmoid"),
    )
    def test_model_without_softmax_is_refused(self, last, kind):
        model = _model(last(), shape=(7,))
        with self.assertRaisesRegex(
            ModelError,
            rf"gives softmax, but its last layer last \({kind}\) has no softmax; "
            "if it gives logits, say so",
        ):
            rewriting.logits_graph(_read(model), helpers.description(3, "softmax"))


class TwoClassLogitsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(True, False)
    def test_softmax_of_two_is_the_sigmoid_of_one(self, use_bias):
        model = helpers.randomise(
            _model(layers.Dense(1, use_bias=use_bias, name="last"), shape=(7,))
        )
        graph = rewriting.two_class_logits(_read(model))
        self.assertEqual(graph.last.shape, (2,))
        self.assertEqual((graph.last.name, graph.last.layers), ("last", ("last",)))
        inputs = helpers.random_inputs(model)
        (second,) = tf.nn.sigmoid(model(inputs)).numpy().T
        probabilities = tf.nn.softmax(_computed(graph, inputs))
        expected = np.stack([1 - second, second], axis=-1)
        self.assertAllClose(probabilities, expected, atol=1e-6)

    @parameterized.named_parameters(
        ("normalised", lambda: [layers.Dense(1), layers.BatchNormalization()]),
        ("scaled", lambda: [layers.Dense(1), layers.Rescaling(0.3, 0.2)]),
        ("pooled", lambda: [layers.GlobalAveragePooling2D()]),
        ("reshaped", lambda: [layers.Conv2D(1, 5), layers.Reshape((1,))]),
    )
    def test_what_lies_behind_the_layer_of_a_score(self, links):
        shape = (5, 5, 1)
        first = layers.Conv2D(1, 1)
        *_, last = links = [first, *links()]
        if isinstance(links[1], layers.Dense):
            links.insert(1, layers.Flatten())
        model = helpers.randomise(keras.Sequential([layers.Input(shape), *links]))
        graph = rewriting.two_class_logits(_read(model))
        self.assertEqual(graph.last.shape, (2,))
        self.assertEqual(graph.last.layers, (last.name,))
        # The layer that makes the score makes the logits: its bits are theirs.
        self.assertLen(graph.nodes, len(_read(model).nodes))
        inputs = helpers.random_inputs(model)
        (second,) = tf.nn.sigmoid(model(inputs)).numpy().T
        for each in (graph, rewriting.fold(graph)):
            probabilities = tf.nn.softmax(_computed(each, inputs))
            expected = np.stack([1 - second, second], axis=-1)
            self.assertAllClose(probabilities, expected, atol=1e-5)

    def test_mean_of_activations_is_halved_behind_it(self):
        chain = [layers.Conv2D(1, 3, activation="relu"), layers.GlobalMaxPooling2D()]
        model = helpers.randomise(
            keras.Sequential([layers.Input((5, 5, 1)), *chain, layers.Rescaling(2.0)])
        )
        graph = rewriting.two_class_logits(_read(model))
        inputs = helpers.random_inputs(model)
        score = model(inputs).numpy()
        expected = np.concatenate([-score / 2, score / 2], axis=-1)
        self.assertAllClose(_computed(graph, inputs), expected, atol=1e-5)

    @parameterized.parameters("relu", "tanh")
    def test_only_a_dense_node_can_be_split(self, activation):
        model = _model(layers.Dense(1, activation, name="last"), shape=(7,))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            rf"layer last \({activation}\) .* is the end of a model .* only a Dense "
            r"layer can .* normalisation behind one, .* nothing behind it\. Let the "
            r"model end with Dense\(1\)",
        ):
            rewriting.two_class_logits(_read(model))


if __name__ == "__main__":
    tf.test.main()
