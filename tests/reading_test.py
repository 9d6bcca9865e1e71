"""Walking Keras models: nested ones, shared layers, names, and what cannot be."""

import functools

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.graph import running
from dfq_tf.importing.reading import outputs_of, read_layers
from tests import helpers

layers = keras.layers
K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}


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


def computed(graph, images):
    return running.compute(graph, tf.constant(images), [graph.output])[0]


def kinds(graph):
    return [node.kind for node in graph.nodes.values()]


def reasons(model):
    return {problem.name: problem.reason for problem in read_layers(model).problems}


class ReadingTest(parameterized.TestCase, tf.test.TestCase):
    def check_outputs(self, model):
        reading = read_layers(model)
        self.assertEmpty(reading.problems)
        shape = (4, *model.inputs[0].shape[1:])
        images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        expected = outputs_of(model, images)
        self.assertAllClose(computed(reading.graph, images), expected, atol=1e-5)
        return reading

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
    def test_graph_gives_the_models_outputs(self, make):
        reading = self.check_outputs(helpers.randomise(make()))
        self.assertFalse([n for n in reading.layers if n.kind == "Sequential"])

    def test_graph_has_weights_of_its_own(self):
        model = helpers.randomise(_sequential())
        graph = read_layers(model).graph
        before = [np.array(w) for n in graph.nodes.values() for w in n.weights.values()]
        for variable in model.weights:
            variable.assign(tf.zeros_like(variable))
        after = [w for n in graph.nodes.values() for w in n.weights.values()]
        self.assertTrue(helpers.all_equal(before, after))

    def test_nodes_come_after_their_inputs(self):
        graph = read_layers(_branches()).graph
        seen = set()
        for node in graph.nodes.values():
            self.assertContainsSubset(node.inputs, seen)
            seen.add(node.name)
        self.assertEqual(graph.image.kind, "image")
        self.assertEqual(list(graph.nodes)[0], graph.image.name)
        self.assertEqual(graph.last.kind, "global_average_pool")

    def test_each_call_of_a_shared_layer_is_a_node(self):
        reading = read_layers(helpers.randomise(_shared_layer()))
        first, second = (n for n in reading.graph.nodes.values() if n.kind == "conv")
        self.assertEqual(second.inputs, (first.name,))
        self.assertTrue(
            helpers.all_equal([*first.weights.values()], [*second.weights.values()])
        )
        self.assertEqual(first.layers + second.layers, (first.name, second.name))
        names = [layer.name for layer in reading.layers]
        self.assertLen(set(names), len(names))

    def test_what_leads_nowhere_is_left_out(self):
        reading = read_layers(_unused_branch())
        self.assertEqual(kinds(reading.graph), ["image", "conv", "reshape"])
        self.assertEqual(
            [layer.kind for layer in reading.layers],
            ["InputLayer", "Conv2D", "Flatten"],
        )

    def test_shapes_are_those_of_the_model(self):
        reading = read_layers(_sequential())
        shapes = [node.shape for node in reading.graph.nodes.values()]
        self.assertEqual(shapes, [(8, 8, 3), (6, 6, 4), (6, 6, 4), (144,), (2,)])
        self.assertEqual([layer.shape for layer in reading.layers], shapes)

    def test_shapes_are_those_of_the_images_that_are_asked_for(self):
        model = keras.Sequential(
            [
                layers.Input((None, None, 3)),
                layers.Conv2D(4, 3, strides=2, padding="same"),
                layers.Resizing(5, 6),
                layers.GlobalAveragePooling2D(),
            ]
        )
        reading = read_layers(model, (10, 11, 3))
        self.assertEmpty(reading.problems)
        shapes = [node.shape for node in reading.graph.nodes.values()]
        self.assertEqual(shapes, [(10, 11, 3), (5, 6, 4), (4,)])
        self.assertEqual(reading.layers[1].shape, (None, None, 4))
        self.assertIn("it makes images of (5, 6, 4)", *reasons(model).values())

    def test_layers_are_what_was_found(self):
        model = _sequential_in_functional()
        reading = read_layers(model)
        self.assertEqual(
            [(layer.kind, layer.parameters) for layer in reading.layers],
            [
                ("InputLayer", 0),
                ("Conv2D", 4 * 28),
                ("BatchNormalization", 16),
                ("ReLU", 0),
                ("Flatten", 0),
                ("Dense", 3 * 145),
            ],
        )
        self.assertEqual(
            [node.layers for node in reading.graph.nodes.values()],
            [(layer.name,) for layer in reading.layers],
        )

    def test_layer_with_several_outputs_is_refused(self):
        @keras.utils.register_keras_serializable("test")
        class Halves(layers.Layer):
            def call(self, inputs):
                return tf.split(inputs, 2, axis=-1)

        image = layers.Input((8, 8, 4))
        left, right = Halves(name="halves")(image)
        model = keras.Model(image, layers.Add()([left, right]))
        self.assertRegex(reasons(model)["halves"], "it gives several outputs; only")

    @parameterized.named_parameters(
        ("slope", lambda x: tf.nn.silu(x, beta=0.5), "called with beta, which is not"),
        (
            "batch_statistics",
            lambda x: layers.BatchNormalization()(x, training=True),
            "called with training=True, so that it does what it does in training",
        ),
        (
            "batch_statistics_by_place",
            lambda x: layers.BatchNormalization()(x, True),
            "called with training=True, so that",
        ),
        (
            "random_numbers",
            lambda x: layers.Dropout(0.5)(x, training=True),
            "called with training=True, so that",
        ),
        (
            "augmentation",
            lambda x: keras.Sequential([layers.RandomFlip()])(x, training=True),
            "called with training=True, so that",
        ),
        (
            "computed",
            lambda x: tf.clip_by_value(x, 0.0, tf.reduce_max(x)),
            "one of its settings is computed",
        ),
        ("ranks", lambda x: x * tf.reduce_mean(x, [1, 2]), "it merges shapes"),
    )
    def test_call_with_further_arguments_is_refused(self, function, reason):
        # A graph has no place for them: without them it is another function.
        image = layers.Input((3, 3, 3))
        model = keras.Model(image, layers.Flatten()(function(image)))
        self.assertRegex(" ".join(reasons(model).values()), reason)

    @parameterized.parameters(False, True)
    def test_call_that_asks_for_inference_is_read(self, by_place):
        # As transfer learning does, to keep BN layers from moving.
        args, kwargs = ((False,), {}) if by_place else ((), {"training": False})
        image = layers.Input((8, 8, 3))
        x = layers.BatchNormalization()(_model_in_model()(image, *args, **kwargs))
        x = layers.BatchNormalization()(x, *args, **kwargs)
        model = helpers.randomise(keras.Model(image, tf.nn.relu6(x)))
        norms = [
            layer.is_frozen
            for layer in self.check_outputs(model).layers
            if layer.kind == "BatchNormalization"
        ]
        self.assertEqual(norms, [False, True])

    @parameterized.parameters(*LIBRARIES)
    def test_model_inside_may_be_called_with_a_list_or_a_dictionary(self, library):
        library = LIBRARIES[library]
        layers = library.layers
        inside = layers.Input((8, 8, 3), name="inside")
        x = layers.Conv2D(4, 3)(inside)
        named = library.Model({"inside": inside}, x)
        listed = library.Model([inside], x)
        image = layers.Input((8, 8, 3))
        x = layers.Concatenate()([named({"inside": image}), listed([image])])
        reading = self.check_outputs(library.Model(image, x))
        self.assertEqual(kinds(reading.graph), ["image", "conv", "conv", "concatenate"])

    @parameterized.product(library=list(LIBRARIES), by_name=(False, True))
    def test_dictionary_feeds_a_model_inside_by_name(self, library, by_name):
        library = LIBRARIES[library]
        layers = library.layers
        one, other = (layers.Input((8, 8, 3), name=name) for name in "za")
        given = {"z": one, "a": other} if by_name else [one, other]
        inner = library.Model(given, layers.Subtract()([one, layers.ReLU()(other)]))
        image = layers.Input((8, 8, 3))
        x = inner({"a": layers.Conv2D(3, 1)(image), "z": layers.Conv2D(3, 1)(image)})
        self.check_outputs(library.Model(image, layers.Flatten()(x)))

    @parameterized.product(
        # Keras 3 itself takes no constant as the first input.
        case=(("keras2", False), ("keras2", True), ("keras3", False)),
        kind=("Add", "Subtract", "Average", "Maximum"),
    )
    def test_merge_with_a_constant_is_refused(self, case, kind):
        library, is_first = LIBRARIES[case[0]], case[1]
        layers = library.layers
        image = layers.Input((8, 8, 3))
        inputs = [layers.ReLU()(image), tf.fill((1, 8, 8, 3), 2.0)]
        x = getattr(layers, kind)(name="merge")(inputs[::-1] if is_first else inputs)
        found = reasons(library.Model(image, layers.Flatten()(x)))
        self.assertRegex(found["merge"], "one of its inputs is a constant; only arith")

    @parameterized.parameters(*LIBRARIES)
    def test_model_inside_with_a_constant_is_refused(self, library):
        library = LIBRARIES[library]
        layers = library.layers
        inputs = [layers.Input((8, 8, 3), batch_size=1) for _ in range(2)]
        inner = library.Model(inputs, layers.Subtract()(inputs), name="inner")
        image = layers.Input((8, 8, 3), batch_size=1)
        x = inner([image, tf.fill((1, 8, 8, 3), 2.0)])
        found = reasons(library.Model(image, layers.Flatten()(x)))
        self.assertRegex(found["inner"], "one of its inputs is a constant")

    @parameterized.parameters(*LIBRARIES)
    def test_regularizer_of_ones_own_does_not_count(self, library):
        library = LIBRARIES[library]
        layers = library.layers

        class Small(library.regularizers.Regularizer):  # it has no get_config
            def __call__(self, x):
                return 0.0

        small = Small()
        conv = layers.Conv2D(4, 3, kernel_regularizer=small)
        norm = layers.BatchNormalization(gamma_regularizer=Small())
        image = layers.Input((8, 8, 3))
        self.check_outputs(library.Model(image, layers.Flatten()(norm(conv(image)))))
        self.assertIs(conv.kernel_regularizer, small)

    @parameterized.product(
        library=list(LIBRARIES),
        activation=(
            functools.partial(tf.nn.leaky_relu, alpha=0.5),
            eval("lambda x: 2 * x"),  # its source is nowhere
        ),
    )
    def test_settings_that_keras_cannot_write_down(self, library, activation):
        library = LIBRARIES[library]
        layers = library.layers
        image = layers.Input((8, 8, 3))
        x = layers.Dense(4, activation=activation, name="odd")(image)
        found = reasons(library.Model(image, layers.Flatten()(x)))
        self.assertRegex(found["odd"], r"write its settings down \(\w+\): one of them")

    def test_function_without_a_public_name_is_refused(self):
        @tf.__internal__.dispatch.add_dispatch_support
        def doubled(x):
            return tf.raw_ops.AddV2(x=x, y=x)

        image = layers.Input((8, 8, 3))
        model = keras.Model(image, layers.Flatten()(doubled(image)))
        (reason,) = reasons(model).values()
        self.assertRegex(reason, "of TensorFlow's doubled, which is not public")

    @parameterized.parameters(*LIBRARIES)
    def test_model_inside_that_is_a_class_is_refused_by_name(self, library):
        library = LIBRARIES[library]

        class Own(library.Model):
            def call(self, x):
                return 2 * x

        image = library.layers.Input((8, 8, 3))
        model = library.Model(image, library.layers.Flatten()(Own(name="own")(image)))
        self.assertRegex(reasons(model)["own"], "it is a class of your own")

    def test_names_may_be_any(self):
        names = ["_conv", "two words", "größer_日本", "-> %s {}", "1st"]
        links = [K.layers.Conv2D(2, 1, name=name, activation="relu") for name in names]
        model = K.Sequential([K.layers.Input((8, 8, 3), name="an image"), *links])
        reading = self.check_outputs(model)
        self.assertEqual([layer.name for layer in reading.layers[1:]], names)
        self.assertContainsSubset(names, reading.graph.nodes)
        with_slash = layers.Dense(2, name="a/b")
        model = keras.Sequential([layers.Input((8, 8, 3)), with_slash])
        self.assertIn("a/b", self.check_outputs(model).graph.nodes)

    def test_layers_of_one_name_in_two_models_are_told_apart(self):
        def inner():
            return keras.Sequential(
                [layers.Input((8, 8, 3)), layers.Conv2D(3, 1, name="conv")]
            )

        model = keras.Sequential([layers.Input((8, 8, 3)), inner(), inner()])
        reading = self.check_outputs(helpers.randomise(model))
        self.assertEqual(list(reading.graph.nodes)[1:], ["conv", "conv_2"])


if __name__ == "__main__":
    tf.test.main()
