import numpy as np
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ModelError, UnsupportedLayerError
from dfq_tf.graph import rewriting
from dfq_tf.graph.graph import Graph
from tests import helpers

layers = keras.layers
BN = layers.BatchNormalization

_GONE = {
    "BatchNormalization",
    "Dropout",
    "SpatialDropout2D",
    "AlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "ActivityRegularization",
    "SeparableConv2D",
    "Dense",
}


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
    "after_transposed_conv": lambda: _model(layers.Conv2DTranspose(4, 3, 2), BN()),
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


class FoldTest(parameterized.TestCase, tf.test.TestCase):
    def _check_equal(self, graph, model):
        inputs = helpers.random_inputs(model)
        expected = model(inputs, training=False).numpy()
        size = np.abs(expected).max()
        self.assertGreater(size, 0.01)
        output = graph.build()(inputs, training=False)
        self.assertAllClose(output, expected, rtol=0, atol=2e-5 * size)

    def _rewritten(self, model):
        """The rewritten graph, after a check that its outputs are the model's."""
        graph = rewriting.dense_as_convolution(rewriting.fold(Graph.from_model(model)))
        self.assertEmpty(_GONE & {node.kind for node in graph.nodes.values()})
        self._check_equal(graph, model)
        return graph

    @parameterized.named_parameters(_FOLDED.items())
    def test_bn_goes_into_the_weights_before_it(self, make):
        model = helpers.randomise(make())
        before = Graph.from_model(model)
        graph = rewriting.fold(before)
        self._check_equal(graph, model)
        gone = ("BatchNormalization", "Dropout", "Activation")
        kept = [
            node.kind
            for node in before.nodes.values()
            if node.kind not in gone or rewriting.is_relu(node)
        ]
        self.assertEqual([node.kind for node in graph.nodes.values()], kept)

    @parameterized.named_parameters(_STANDALONE.items())
    def test_bn_with_nothing_to_go_into_becomes_a_depthwise_conv(self, make):
        graph = self._rewritten(helpers.randomise(make()))
        affine = [
            node
            for node in graph.nodes.values()
            if node.kind == "DepthwiseConv2D" and node.weights[0].shape[:2] == (1, 1)
        ]
        self.assertNotEmpty(affine)

    @parameterized.named_parameters(_OTHER.items())
    def test_other_layers_keep_the_outputs(self, make):
        self._rewritten(helpers.randomise(make()))

    def test_hard_swish_in_pieces_is_an_affine_a_relu_and_a_product(self):
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3)(image)
        gate = layers.ReLU(6.0)(layers.Rescaling(1.0, 3.0)(x))
        x = layers.Multiply()([x, layers.Rescaling(1 / 6)(gate)])
        graph = self._rewritten(keras.Model(image, layers.Flatten()(x)))
        kinds = [node.kind for node in graph.nodes.values()]
        self.assertEqual(
            kinds,
            ["InputLayer", "Conv2D", "DepthwiseConv2D", "ReLU", "Multiply", "Flatten"],
        )
        (relu,) = (node for node in graph.nodes.values() if node.kind == "ReLU")
        self.assertAlmostEqual(rewriting.relu_top(relu), 1.0)

    def test_scale_that_is_not_of_all_channels_stays_behind_the_relu(self):
        model = _model(layers.ReLU(6.0), layers.Rescaling([1.0, 2.0, 3.0]))
        graph = self._rewritten(model)
        kinds = [node.kind for node in graph.nodes.values()]
        self.assertEqual(kinds, ["InputLayer", "ReLU", "DepthwiseConv2D", "Flatten"])

    def test_fixed_ranges_are_not_shared(self):
        graph = self._rewritten(helpers.randomise(_concatenation_of_fixed_ranges()))
        for node in graph.nodes.values():
            if node.kind == "Concatenate":
                sources = [graph.nodes[name] for name in node.inputs]
                self.assertEmpty(
                    [s for s in sources if s.kind in ("Activation", "ReLU")]
                )

    @parameterized.parameters("wrn_10_1", "wrn_16_1")
    def test_wide_resnet_keeps_the_outputs(self, name):
        model = helpers.randomise(models.build_model(name, (16, 16, 3), 5))
        self._rewritten(model)

    @parameterized.parameters(range(25))
    def test_random_network_keeps_the_outputs(self, seed):
        self._rewritten(helpers.randomise(_random_model(seed), seed))

    def test_random_networks_hold_what_they_are_to_test(self):
        kinds, joined = set(), 0
        for seed in range(10):
            graph = Graph.from_model(_random_model(seed))
            kinds |= {node.kind for node in graph.nodes.values()}
            joined += any(len(graph.consumers(name)) > 1 for name in graph.nodes)
        expected = {"BatchNormalization", "SeparableConv2D", "DepthwiseConv2D", "Add"}
        self.assertContainsSubset(expected, kinds)
        self.assertGreater(joined, 7)

    def test_two_bns_in_a_row_become_one_depthwise_conv(self):
        graph = self._rewritten(helpers.randomise(_STANDALONE["two_in_a_row"]()))
        kinds = [node.kind for node in graph.nodes.values()]
        self.assertEqual(
            kinds, ["InputLayer", "MaxPooling2D", "DepthwiseConv2D", "Flatten"]
        )

    def test_bn_may_be_the_output(self):
        image = layers.Input((6,))
        for producer in (layers.Dense(4), layers.ReLU()):
            model = helpers.randomise(keras.Model(image, BN()(producer(image))))
            self._rewritten(model)

    def test_nothing_to_fold_leaves_the_graph_as_it_is(self):
        model = helpers.randomise(_model(layers.Conv2D(4, 3), layers.ReLU()))
        graph = Graph.from_model(model)
        folded = rewriting.fold(graph)
        self.assertEqual(list(folded.nodes), list(graph.nodes))
        self.assertAllEqual(
            folded.build()(helpers.random_inputs(model)),
            model(helpers.random_inputs(model)),
        )

    def test_model_given_is_unchanged(self):
        model = helpers.small_classifier().model
        before = helpers.copies(model.weights)
        rewriting.fold(Graph.from_model(model)).build()
        self.assertTrue(helpers.all_equal(model.weights, before))

    def test_dense_becomes_conv_of_the_same_weights(self):
        model = helpers.randomise(_model(layers.Dense(5, "relu"), shape=(7,)))
        graph = rewriting.dense_as_convolution(Graph.from_model(model))
        (conv,) = (n for n in graph.nodes.values() if n.kind == "Conv2D")
        kernel, bias = model.get_weights()
        self.assertAllEqual(conv.weights[0][0, 0], kernel)
        self.assertAllEqual(conv.weights[1], bias)
        inputs = helpers.random_inputs(model)
        self.assertAllClose(
            graph.build()(inputs), np.maximum(inputs @ kernel + bias, 0), atol=1e-5
        )

    @parameterized.parameters(1, 2)
    def test_bn_of_another_axis_is_refused(self, axis):
        model = _model(layers.Conv2D(4, 3), BN(axis=axis, name="bn"))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            rf"layer bn \(BatchNormalization\) .* has axis {axis}; only the last axis",
        ):
            rewriting.fold(Graph.from_model(model))

    def test_bn_of_sequences_is_refused(self):
        model = _model(layers.Reshape((64, 3)), BN(name="bn"))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"layer bn .* input of shape \(64, 3\); only images and vectors",
        ):
            rewriting.fold(Graph.from_model(model))

    def test_dense_of_pixels_becomes_a_convolution(self):
        model = helpers.randomise(_model(layers.Dense(4, activation="relu")))
        graph = rewriting.dense_as_convolution(Graph.from_model(model))
        self.assertEqual(
            [n.kind for n in graph.nodes.values()], ["InputLayer", "Conv2D", "Flatten"]
        )
        inputs = helpers.random_inputs(model)
        self.assertAllClose(graph.build()(inputs), model(inputs), atol=1e-5)

    def test_dense_of_rows_is_refused(self):
        model = _model(layers.Reshape((8, 24)), layers.Dense(4, name="mix"))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"layer mix \(Dense\) .* has an input of shape \(8, 24\); .*Flatten",
        ):
            rewriting.dense_as_convolution(Graph.from_model(model))


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
            graph = rewriting.logits_graph(
                Graph.from_model(model), helpers.description(3, "softmax")
            )
            inputs = helpers.random_inputs(model)
            logits = graph.build()(inputs).numpy()
            self.assertGreater(np.abs(logits.sum(axis=-1) - 1).max(), 0.01)
            expected = model(inputs).numpy()
            self.assertAllClose(tf.nn.softmax(logits), expected, atol=1e-6)

    def test_logits_are_left_as_they_are(self):
        model = _model(layers.Dense(3), layers.Softmax(), shape=(7,))
        graph = Graph.from_model(model)
        self.assertIs(rewriting.logits_graph(graph, helpers.description(3)), graph)

    @parameterized.parameters(
        ([layers.Dense, 3], "Dense"), ([layers.Activation, "sigmoid"], "Activation")
    )
    def test_model_without_softmax_is_refused(self, last, kind):
        layer_class, argument = last
        model = _model(layer_class(argument, name="last"), shape=(7,))
        with self.assertRaisesRegex(
            ModelError,
            rf"gives softmax, but its last layer last \({kind}\) has no softmax; "
            "if it gives logits, say so",
        ):
            rewriting.logits_graph(
                Graph.from_model(model), helpers.description(3, "softmax")
            )


class LayerQuestionsTest(parameterized.TestCase, tf.test.TestCase):
    def _last(self, layer):
        graph = Graph.from_model(_model(layer, shape=(7,)))
        return graph.nodes[graph.output_name]

    @parameterized.parameters(
        ("relu", True), ("relu6", True), ("tanh", False), ("linear", False)
    )
    def test_activation_layers_are_told_by_name(self, name, expected):
        node = self._last(layers.Activation(name))
        self.assertEqual(rewriting.activation_name(node), name)
        self.assertEqual(rewriting.is_relu(node), expected)

    def test_relu_layers_are_told_by_their_limits(self):
        self.assertTrue(rewriting.is_relu(self._last(layers.ReLU())))
        self.assertTrue(rewriting.is_relu(self._last(layers.ReLU(6))))
        self.assertTrue(rewriting.is_relu(self._last(layers.Activation(tf.nn.relu6))))
        self.assertTrue(rewriting.is_relu(self._last(layers.ReLU(1.0))))
        self.assertFalse(rewriting.is_relu(self._last(layers.ReLU(0.0))))
        self.assertFalse(rewriting.is_relu(self._last(layers.ReLU(negative_slope=0.1))))
        self.assertFalse(rewriting.is_relu(self._last(layers.ReLU(threshold=1.0))))
        self.assertFalse(rewriting.is_relu(self._last(layers.LeakyReLU())))

    def test_bn_affine_equals_the_layer(self):
        model = helpers.randomise(_model(BN(epsilon=0.01), shape=(7,)))
        node = Graph.from_model(model).nodes[model.layers[-1].name]
        scale, shift = rewriting.batch_normalization_affine(node)
        inputs = helpers.random_inputs(model)
        self.assertAllClose(
            inputs * scale + shift, model(inputs, training=False), atol=1e-5
        )


if __name__ == "__main__":
    tf.test.main()
