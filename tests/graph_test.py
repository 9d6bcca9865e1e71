import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph.graph import Graph, Node, unique_name
from tests import helpers

layers = keras.layers


def _sequential():
    return keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )


def _branches():
    image = layers.Input((8, 8, 3))
    stem = layers.Conv2D(4, 3, padding="same")(image)
    left = layers.Conv2D(4, 1, activation="relu")(stem)
    right = layers.DepthwiseConv2D(3, padding="same")(stem)
    both = layers.Concatenate()([right, left, stem])
    # The order of the inputs matters.
    difference = layers.Subtract()([layers.Conv2D(12, 1)(both), both])
    return keras.Model(image, layers.GlobalAveragePooling2D()(difference))


def _model_in_model():
    inner_input = layers.Input((8, 8, 4))
    inner = keras.Model(
        inner_input, layers.Add()([layers.Conv2D(4, 1)(inner_input), inner_input])
    )
    image = layers.Input((8, 8, 3))
    x = inner(layers.Conv2D(4, 3, padding="same")(image))
    return keras.Model(image, layers.GlobalMaxPooling2D()(layers.ReLU()(x)))


def _model_in_model_in_model():
    image = layers.Input((8, 8, 3))
    return keras.Model(image, layers.Softmax()(_model_in_model()(image)))


def _sequential_in_functional():
    image = layers.Input((8, 8, 3))
    body = keras.Sequential([layers.Conv2D(4, 3), layers.BatchNormalization()])
    head = keras.Sequential([layers.Flatten(), layers.Dense(3)])
    return keras.Model(image, head(layers.ReLU()(body(image))))


def _functional_in_sequential():
    return keras.Sequential([_model_in_model(), layers.Dense(3)])


def _shared_layer():
    image = layers.Input((8, 8, 3))
    conv = layers.Conv2D(3, 3, padding="same")
    x = layers.Subtract()([conv(conv(image)), image])
    return keras.Model(image, layers.Flatten()(x))


def _shared_model():
    image = layers.Input((8, 8, 3))
    inner = keras.Sequential([layers.Conv2D(3, 3, padding="same"), layers.ReLU()])
    x = layers.Subtract()([inner(inner(image)), inner(image)])
    return keras.Model(image, layers.Flatten()(x))


def _model_with_several_inputs_inside():
    one, other = layers.Input((8, 8, 3)), layers.Input((8, 8, 3))
    inner = keras.Model([one, other], layers.Subtract()([one, layers.ReLU()(other)]))
    image = layers.Input((8, 8, 3))
    x = inner([layers.Conv2D(3, 1)(image), layers.Conv2D(3, 1)(image)])
    return keras.Model(image, layers.Flatten()(x))


def _same_tensor_twice():
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(2, 3)(image)
    return keras.Model(image, layers.Flatten()(layers.Multiply()([x, x])))


def _unused_branch():
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(2, 3)(image)
    layers.BatchNormalization()(x)  # leads nowhere
    return keras.Model(image, layers.Flatten()(x))


class GraphTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        _sequential,
        _branches,
        _model_in_model,
        _model_in_model_in_model,
        _sequential_in_functional,
        _functional_in_sequential,
        _shared_layer,
        _shared_model,
        _model_with_several_inputs_inside,
        _same_tensor_twice,
        _unused_branch,
    )
    def test_from_model_and_build_give_equal_outputs(self, make):
        model = helpers.randomise(make())
        graph = Graph.from_model(model)
        built = graph.build()
        inputs = helpers.random_inputs(model)
        self.assertAllEqual(
            built(inputs, training=False), model(inputs, training=False)
        )
        self.assertFalse([n for n in graph.nodes.values() if n.kind == "Sequential"])

    def test_built_model_has_weights_of_its_own(self):
        model = helpers.randomise(_sequential())
        before = helpers.copies(model.weights)
        built = Graph.from_model(model).build()
        for variable in built.weights:
            variable.assign(tf.zeros_like(variable))
        self.assertTrue(helpers.all_equal(model.weights, before))

    def test_nodes_come_after_their_inputs(self):
        graph = Graph.from_model(_branches())
        seen = set()
        for node in graph.nodes.values():
            self.assertContainsSubset(node.inputs, seen)
            seen.add(node.name)
        self.assertEqual(graph.nodes[graph.input_name].kind, "InputLayer")
        self.assertEqual(list(graph.nodes)[0], graph.input_name)
        self.assertEqual(graph.nodes[graph.output_name].kind, "GlobalAveragePooling2D")

    def test_each_call_of_a_shared_layer_is_a_node(self):
        graph = Graph.from_model(helpers.randomise(_shared_layer()))
        first, second = (n for n in graph.nodes.values() if n.kind == "Conv2D")
        self.assertEqual(second.inputs, (first.name,))
        self.assertTrue(helpers.all_equal(first.weights, second.weights))

    def test_what_leads_nowhere_is_left_out(self):
        graph = Graph.from_model(_unused_branch())
        kinds = [node.kind for node in graph.nodes.values()]
        self.assertEqual(kinds, ["InputLayer", "Conv2D", "Flatten"])

    def test_shapes_are_those_of_the_model(self):
        graph = Graph.from_model(_sequential())
        shapes = [node.shape for node in graph.nodes.values()]
        self.assertEqual(shapes, [(8, 8, 3), (6, 6, 4), (6, 6, 4), (144,), (2,)])

    def test_layer_with_several_outputs_is_refused(self):
        @keras.utils.register_keras_serializable("test")
        class Halves(layers.Layer):
            def call(self, inputs):
                return tf.split(inputs, 2, axis=-1)

        image = layers.Input((8, 8, 4))
        left, right = Halves(name="halves")(image)
        model = keras.Model(image, layers.Add()([left, right]))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"layer halves \(Halves\) cannot be .*it gives several outputs; only",
        ):
            Graph.from_model(model)

    @parameterized.named_parameters(
        ("sum", lambda x: x + tf.nn.relu(x)),
        ("constant", lambda x: x * 2.0),
        ("axis", lambda x: tf.reduce_mean(x, axis=[1, 2], keepdims=True)),
        ("slope", lambda x: tf.nn.leaky_relu(x, alpha=0.5)),
        ("batch_statistics", lambda x: layers.BatchNormalization()(x, training=True)),
    )
    def test_call_with_further_arguments_is_refused(self, function):
        # A graph has no place for them: without them it is another function.
        image = layers.Input((8, 8, 3))
        model = keras.Model(image, layers.Flatten()(function(image)))
        with self.assertRaisesRegex(UnsupportedLayerError, "^layer "):
            Graph.from_model(model)

    def test_call_that_asks_for_inference_is_read(self):
        # As transfer learning does, to keep BN layers from moving.
        image = layers.Input((8, 8, 3))
        x = layers.BatchNormalization()(_model_in_model()(image, training=False))
        x = layers.BatchNormalization()(x, training=False)
        model = helpers.randomise(keras.Model(image, tf.nn.relu6(x)))
        inputs = helpers.random_inputs(model)
        built = Graph.from_model(model).build()
        self.assertAllEqual(built(inputs), model(inputs))

    def test_consumers_are_each_listed_once(self):
        graph = Graph.from_model(_same_tensor_twice())
        conv = next(n for n in graph.nodes.values() if n.kind == "Conv2D")
        self.assertEqual([n.kind for n in graph.consumers(conv.name)], ["Multiply"])

    def test_outputs_chooses_what_the_model_gives(self):
        model = helpers.randomise(_sequential())
        graph = Graph.from_model(model)
        conv = model.layers[0]
        built = graph.build(outputs=[graph.output_name, conv.name, graph.input_name])
        inputs = helpers.random_inputs(model)
        output, between, image = built(inputs, training=False)
        self.assertAllEqual(output, model(inputs, training=False))
        self.assertAllEqual(between, conv(inputs))
        self.assertAllEqual(image, inputs)

    def test_wrap_stands_in_for_each_layer(self):
        model = helpers.randomise(_sequential())
        wrapped = []

        class Doubled(layers.Wrapper):
            def call(self, inputs):
                return 2 * self.layer(inputs)

        def wrap(node, layer):
            wrapped.append(node.kind)
            return Doubled(layer) if node.kind == "Dense" else layer

        built = Graph.from_model(model).build(wrap)
        self.assertEqual(wrapped, ["Conv2D", "BatchNormalization", "Flatten", "Dense"])
        inputs = helpers.random_inputs(model)
        self.assertAllClose(
            built(inputs, training=False), 2 * model(inputs, training=False)
        )

    def test_replaced_exchanges_and_removes_nodes(self):
        model = helpers.randomise(_sequential())
        graph = Graph.from_model(model)
        _, conv, bn, flatten, dense = graph.nodes
        relu = layers.ReLU()
        node = Node("relu", layers.ReLU, relu.get_config(), (), (conv,), (6, 6, 4))
        changed = graph.replaced({bn: [node], dense: []}, {bn: "relu", dense: flatten})
        self.assertEqual(list(changed.nodes)[1:], [conv, "relu", flatten])
        self.assertEqual(changed.output_name, flatten)
        inputs = helpers.random_inputs(model)
        expected = np.maximum(model.layers[0](inputs).numpy(), 0).reshape(4, -1)
        self.assertAllEqual(changed.build()(inputs), expected)
        # The graph itself is as it was.
        self.assertEqual(list(graph.nodes)[1:], [conv, bn, flatten, dense])

    def test_head_stands_between_the_input_and_all_that_reads_it(self):
        image = layers.Input((4, 4, 1))
        model = keras.Model(image, layers.Subtract()([layers.ReLU()(image), image]))
        graph = Graph.from_model(model)
        head = []
        for name, source in (("up", graph.input_name), ("down", "up")):
            config = layers.Rescaling(3.0, offset=-1.0).get_config()
            head.append(Node(name, layers.Rescaling, config, (), (source,), (4, 4, 1)))
        inputs = helpers.random_inputs(model)
        self.assertAllClose(
            graph.with_head(head).build()(inputs),
            model(3 * (3 * inputs - 1) - 1),
            rtol=1e-6,
        )

    def test_unique_name_takes_the_first_free_number(self):
        self.assertEqual(unique_name([], "a"), "a")
        self.assertEqual(unique_name(["b"], "a"), "a")
        self.assertEqual(unique_name(["a", "a_2", "a_4"], "a"), "a_3")


if __name__ == "__main__":
    tf.test.main()
