"""Each layer and function of Keras 2 and 3, held against Keras itself."""

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph import rewriting, running
from dfq_tf.importing.reading import outputs_of, read_layers
from tests import helpers

K = keras3()
L, ops = K.layers, K.ops
LIBRARIES = {"keras2": keras, "keras3": K}
SHAPE = (9, 8, 3)


def by_extremes(x):
    """From the lowest value to the highest; of a model's symbols, anything."""
    values = np.asarray(x) if hasattr(x, "numpy") else np.array([0.0, 1.0])
    return (x - values.min()) / (values.max() - values.min())


def fails(x):
    """Of a model's symbols, the same; of images, an error."""
    if x.shape[0] is not None:
        raise KeyError("mine")
    return x


def named(name):
    """Lets a function have the name of another one."""

    def rename(function):
        function.__name__ = name
        return function

    return rename


@named("hard_swish")
def hard_swish_of_keras_2(x):
    return x * tf.clip_by_value(0.2 * x + 0.5, 0.0, 1.0)


@named("gelu")
def gelu_doubled(x):
    return 2 * tf.nn.gelu(x)


@named("swish")
def swish_of_ones_own(x):
    return x * tf.sigmoid(x)


@named("gelu")
def gelu_by_tanh(x):
    return 0.5 * x * (1 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def chain(*links, library=K, shape=SHAPE):
    """A functional model of layers and functions, one behind the other."""
    image = x = library.layers.Input(shape)
    for link in links:
        x = link(x)
    return library.Model(image, x)


def twice(library, shared):
    """A layer or model inside, called twice with the same weights."""
    image = library.layers.Input(SHAPE)
    x = shared(shared(image))
    return library.Model(image, library.layers.Add()([x, image]))


def branches(library):
    layers = library.layers
    image = layers.Input(SHAPE)
    parts = [layers.Conv2D(4, 3, padding="same")(image) for _ in range(3)]
    x = layers.Add()(parts)
    x = layers.Multiply()([x, layers.Subtract()(parts[:2]), parts[2]])
    y = layers.Dense(4)(layers.GlobalAveragePooling2D(name="g")(x))
    x = layers.Multiply()([y, x])  # a vector meets each pixel
    x = layers.Average()([x, *parts])
    x = layers.Minimum()([layers.Maximum()([y, x]), *parts[:2]])
    return library.Model(image, layers.Concatenate()([x, image]))


def concatenated():
    image = L.Input(SHAPE)
    x = L.Conv2D(4, 3, padding="same")(image)
    return K.Model(image, ops.concatenate([x, image], axis=-1))


def small(library):
    layers = library.layers
    return library.Sequential(
        [layers.Input(SHAPE), layers.Conv2D(3, 3, padding="same"), layers.ReLU()]
    )


def nested(library):
    layers = library.layers
    wrapped = library.Sequential(
        [layers.Input(SHAPE), small(library), layers.BatchNormalization()]
    )
    return chain(wrapped, layers.Flatten(), layers.Dense(4), library=library)


VECTOR = np.array([1.0, -2.0, 3.0], np.float32)
# Links of a chain, of either library's layers.
CHAINS = {
    "conv": lambda L: [L.Conv2D(4, 3, 2, padding="same", activation="relu")],
    "conv_dilated_grouped": lambda L: [
        L.Conv2D(6, (3, 2), dilation_rate=2, groups=3, use_bias=False)
    ],
    "depthwise": lambda L: [
        L.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2)
    ],
    "depthwise_dilated": lambda L: [
        L.DepthwiseConv2D((3, 2), dilation_rate=(2, 3), use_bias=False)
    ],
    "separable": lambda L: [L.SeparableConv2D(5, 3, activation="relu")],
    "separable_strided": lambda L: [
        L.SeparableConv2D(5, 3, 2, "same", depth_multiplier=2, use_bias=False)
    ],
    "bn": lambda L: [L.BatchNormalization(epsilon=0.01)],
    "bn_without_scale": lambda L: [L.BatchNormalization(scale=False)],
    "bn_without_center": lambda L: [L.BatchNormalization(center=False)],
    "bn_of_vectors": lambda L: [L.Flatten(), L.BatchNormalization(axis=1)],
    "layer_normalization": lambda L: [L.LayerNormalization(epsilon=0.01)],
    "layer_normalization_of_a_list": lambda L: [
        L.LayerNormalization([3], center=False),
        L.LayerNormalization([-1], scale=False),
        L.LayerNormalization(center=False, scale=False),
    ],
    "layer_normalization_of_vectors": lambda L: [
        L.Flatten(),
        L.LayerNormalization(1),
        L.Dense(4),
    ],
    "group_normalization": lambda L: [
        L.Conv2D(6, 3),
        L.GroupNormalization(3, epsilon=0.01),
        L.GroupNormalization(1, center=False),
        L.GroupNormalization(-1, scale=False),
        L.GroupNormalization(2, center=False, scale=False),
    ],
    "unit_normalization": lambda L: [L.UnitNormalization(), L.UnitNormalization(3)],
    "dense_of_pixels": lambda L: [L.Dense(4)],
    "dense": lambda L: [L.Flatten(), L.Dense(4, activation="softmax")],
    "relu": lambda L: [L.ReLU(), L.ReLU(0.5)],
    "relu_of_a_slope": lambda L: [L.ReLU(negative_slope=0.1)],
    "leaky": lambda L: [L.LeakyReLU(0.3)],
    "activation_objects": lambda L: [
        L.Conv2D(4, 3, activation=L.LeakyReLU(0.1)),
        L.SeparableConv2D(4, 1, activation=L.ReLU(0.7)),
        L.Dense(4, activation=L.ReLU(negative_slope=0.3)),
        L.Dense(4, activation=L.Activation("hard_sigmoid")),
        L.Activation(L.Activation("tanh")),
    ],
    "softmax": lambda L: [L.Flatten(), L.Softmax()],
    "softmax_of_an_axis": lambda L: [L.Flatten(), L.Softmax(axis=1)],
    "pooling": lambda L: [
        L.MaxPooling2D(3, 2, padding="same"),
        L.AveragePooling2D(2, 1),
    ],
    "pooling_same": lambda L: [L.AveragePooling2D((3, 2), padding="same")],
    "global_average": lambda L: [L.GlobalAveragePooling2D()],
    "global_average_kept": lambda L: [L.GlobalAveragePooling2D(keepdims=True)],
    "global_max": lambda L: [L.GlobalMaxPooling2D()],
    "padding": lambda L: [L.ZeroPadding2D(((0, 1), (2, 3)))],
    "reshape": lambda L: [L.Reshape((-1, 12))],
    "cropping": lambda L: [L.Cropping2D(((0, 1), (2, 1)))],
    "upsampling": lambda L: [
        L.UpSampling2D((2, 1)),
        L.UpSampling2D((1, 3), interpolation="bilinear"),
    ],
    "upsampling_by_one": lambda L: [L.UpSampling2D(1, interpolation="bilinear")],
    "permuted": lambda L: [L.Permute((2, 3, 1)), L.Flatten()],
    "prelu": lambda L: [L.PReLU(shared_axes=[1, 2]), L.Flatten(), L.PReLU()],
    "prelu_of_one_slope": lambda L: [L.PReLU(shared_axes=[1, 2, 3])],
    "transposed": lambda L: [
        L.Conv2DTranspose(4, (3, 2), 2, "same", activation="relu"),
        L.Conv2DTranspose(3, 3, use_bias=False),
    ],
    "transposed_by_two_strides": lambda L: [L.Conv2DTranspose(4, 3, (1, 2))],
    "dropped": lambda L: [
        L.RandomFlip(),
        L.RandomRotation(0.1),
        L.RandomZoom(0.1),
        L.RandomContrast(0.1),
        L.RandomTranslation(0.1, 0.1),
        L.GaussianNoise(1.0),
        L.Dropout(0.5),
        L.SpatialDropout2D(0.5),
        L.Activation("linear"),
    ],
    "normalization": lambda L: [
        L.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])
    ],
    "normalization_inverted": lambda L: [
        L.Normalization(mean=2.0, variance=5.0, axis=None, invert=True)
    ],
    "rescaling": lambda L: [L.Rescaling([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])],
    "resizing_to_the_same": lambda L: [L.Resizing(9, 8)],
    "sigmoid_of_a_flatten": lambda L: [L.Dense(2), L.Flatten(), L.Dense(3, "sigmoid")],
    **{
        f"activation_{name}": lambda L, name=name: [
            L.Activation(name),
            L.Conv2D(4, 3, activation=name),
            L.Dense(3, name),
        ]
        for name in (
            "relu relu6 sigmoid tanh silu swish hard_sigmoid leaky_relu linear"
        ).split()
    },
}
# Models of either library.
MODELS = {
    "branches": branches,
    "nested": nested,
    "nested_twice": lambda library: twice(library, small(library)),
    "layer_twice": lambda library: twice(
        library, library.layers.Conv2D(3, 3, padding="same")
    ),
    "sequential": lambda library: library.Sequential(
        [
            library.layers.Input(SHAPE),
            library.layers.Conv2D(4, 3),
            library.layers.Flatten(),
            library.layers.Dense(3),
        ]
    ),
    **{
        name: lambda library, links=links: chain(
            *links(library.layers), library=library
        )
        for name, links in CHAINS.items()
    },
}
# Models of functions of Keras 3. Those of TensorFlow are in importing_test.
FUNCTIONS = {
    "concatenated": concatenated,
    "dropped": lambda: chain(
        L.Identity(), lambda x: L.Dropout(0.5)(x, training=True), ops.relu
    ),
    "constants": lambda: chain(
        lambda x: x / 127.5 - 1,
        lambda x: 2 - x,
        lambda x: x * VECTOR + VECTOR,
        lambda x: -x,
        lambda x: ops.add(3.0, x),
        lambda x: ops.subtract(x2=x, x1=0.5),
    ),
    "tensors": lambda: chain(lambda x: x * (x + x) - x),
    "maximum": lambda: chain(
        lambda x: ops.maximum(ops.minimum(x, 2 * x), -x), lambda x: ops.maximum(0.0, x)
    ),
    "functions": lambda: chain(
        ops.relu, ops.sigmoid, ops.tanh, ops.silu, ops.hard_sigmoid, ops.hard_silu
    ),
    "functions_by_name": lambda: chain(
        lambda x: ops.tanh(x=x), lambda x: ops.leaky_relu(x=x, negative_slope=0.3)
    ),
    "activations_called": lambda: chain(
        lambda x: K.activations.relu(x, negative_slope=0.2),
        lambda x: K.activations.relu(x, max_value=1.5),
        K.activations.relu,
    ),
    "elu_called": lambda: chain(K.activations.elu, lambda x: ops.elu(x, alpha=0.3)),
    "gelu_called": lambda: chain(
        K.activations.gelu, ops.gelu, lambda x: ops.gelu(x, approximate=False)
    ),
    "rms_normalization": lambda: chain(
        L.RMSNormalization(epsilon=0.01), L.Conv2D(3, 2), L.RMSNormalization([3])
    ),
    "cast": lambda: chain(lambda x: ops.cast(x, "float32")),
    "channels": lambda: chain(
        L.Conv2D(4, 3, padding="same"),
        lambda x: x[:, :, :, 1:],
        lambda x: ops.stack([x[..., i] for i in (1, 2, 0)], axis=-1),
        lambda x: x[..., -2:],
    ),
    "orders_of_channels": lambda: chain(
        L.Conv2D(3, 3),
        lambda x: x[..., ::-1],
        lambda x: ops.stack([x[..., i] for i in (1, 2, 0)], axis=-1),
        L.Conv2D(4, 3),
    ),
    "order_of_channels": lambda: chain(
        lambda x: ops.stack([x[..., i] for i in (2, 0, 1)], axis=3),
        lambda x: x * VECTOR,
        lambda x: L.Concatenate()(
            [
                L.Conv2D(4, 3, padding="same")(x),
                L.Conv2D(3, 2, use_bias=False)(L.ZeroPadding2D(((0, 1), (1, 0)))(x)),
            ]
        ),
    ),
    "clip": lambda: chain(lambda x: ops.clip(x, 0.0, 0.75), ops.relu6),
    "mean": lambda: chain(lambda x: ops.mean(x, axis=(1, 2))),
    "mean_kept": lambda: chain(lambda x: ops.mean(x, axis=[-3, -2], keepdims=True)),
    "max": lambda: chain(lambda x: ops.max(x, axis=(1, 2))),
    "mean_of_channels": lambda: chain(
        lambda x: ops.mean(x, axis=-1, keepdims=True) * x,
        lambda x: ops.mean(x, axis=3),
    ),
    "max_of_channels": lambda: chain(
        lambda x: ops.max(x, axis=3, keepdims=True) * x, lambda x: ops.max(x, axis=-1)
    ),
    "reshaped_by_function": lambda: chain(
        lambda x: ops.reshape(x, (-1, 216)), ops.softmax
    ),
    **{
        f"activation_{name}": lambda name=name: chain(
            L.Activation(name), L.Conv2D(4, 3, activation=name), L.Dense(3, name)
        )
        for name in ("hard_silu", "hard_swish")
    },
}


def read(model):
    """The graph of a model whose layers can all be read."""
    reading = read_layers(model)
    if reading.problems:
        raise UnsupportedLayerError.of(reading.problems)
    return reading.graph


def computed(graph, images, names=None):
    return running.compute(graph, tf.constant(images), names or [graph.output])


def kinds(graph):
    return [node.kind for node in graph.nodes.values()]


class OutputsTest(parameterized.TestCase, tf.test.TestCase):
    def check_outputs(self, model):
        rng = np.random.default_rng(1)
        images = (2 * rng.normal(size=(5, *SHAPE))).astype(np.float32)
        expected = outputs_of(model, images)
        self.assertGreater(np.ptp(expected), 0)
        graph = read(model)
        self.assertAllClose(computed(graph, images)[0], expected, atol=1e-5)
        for name, values in zip(graph.nodes, computed(graph, images, [*graph.nodes])):
            self.assertEqual(graph.nodes[name].shape, tuple(values.shape[1:]), name)
        # And so are those of the network without BN and the like.
        folded = rewriting.fold(graph)
        self.assertAllClose(computed(folded, images)[0], expected, atol=1e-4)

    @parameterized.product(library=list(LIBRARIES), name=list(MODELS))
    def test_outputs_are_those_of_keras(self, library, name):
        model = MODELS[name](LIBRARIES[library])
        if library == "keras3":
            helpers.randomise_keras3(model)
        else:
            helpers.randomise(model)
        self.check_outputs(model)

    @parameterized.named_parameters(FUNCTIONS.items())
    def test_outputs_of_functions_are_those_of_keras_3(self, make):
        self.check_outputs(helpers.randomise_keras3(make()))


class NodesTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*LIBRARIES)
    def test_activation_is_a_node_of_the_same_layer(self, library):
        library = LIBRARIES[library]
        layers = library.layers
        graph = read(
            chain(
                layers.Conv2D(4, 3, activation="hard_sigmoid", name="conv"),
                layers.Flatten(name="flat"),
                layers.Dense(2, activation="softmax", name="last"),
                library=library,
            )
        )
        self.assertEqual(
            list(graph.nodes)[1:],
            [
                "conv",
                "conv_hard_sigmoid_affine",
                "conv_hard_sigmoid",
                "flat",
                "last",
                "last_softmax",
            ],
        )
        self.assertEqual(
            kinds(graph)[1:],
            ["conv", "affine", "relu", "reshape", "dense", "softmax"],
        )
        owners = [node.layers for node in graph.nodes.values()][1:]
        self.assertEqual(owners, [("conv",)] * 3 + [("flat",)] + [("last",)] * 2)

    @parameterized.product(
        library=list(LIBRARIES),
        kind=("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply"),
    )
    def test_what_merges_one_input_passes_it_on(self, library, kind):
        library = LIBRARIES[library]
        layer = getattr(library.layers, kind)()
        flat = library.layers.Flatten()
        graph = read(chain(lambda x: layer([x]), flat, library=library))
        self.assertEqual(kinds(graph), ["image", "reshape"])

    @parameterized.parameters(*LIBRARIES)
    def test_so_does_a_function(self, library):
        library = LIBRARIES[library]
        concatenate = tf.concat if library is keras else ops.concatenate
        flat = library.layers.Flatten()
        graph = read(chain(lambda x: concatenate([x], -1), flat, library=library))
        self.assertEqual(kinds(graph), ["image", "reshape"])

    def test_pipeline_of_layers_that_only_train_is_no_node(self):
        pipeline = L.Pipeline([L.RandomFlip(), L.RandomRotation(0.1)])
        self.assertEqual(kinds(read(chain(pipeline))), ["image"])

    @parameterized.parameters(*LIBRARIES)
    def test_groups_of_one_channel_are_a_depthwise_convolution(self, library):
        library = LIBRARIES[library]
        conv = library.layers.Conv2D(6, 3, groups=3, name="conv")
        node = read(chain(conv, library=library)).nodes["conv"]
        self.assertEqual(node.kind, "depthwise_conv")
        self.assertEqual(node.weights["kernel"].shape, (3, 3, 3, 2))

    @parameterized.parameters(*LIBRARIES)
    def test_normalization_gives_the_output_of_its_layer(self, library):
        library = LIBRARIES[library]
        layers = library.layers
        graph = read(
            chain(
                layers.LayerNormalization(name="rows"),
                layers.GroupNormalization(3, name="groups"),
                layers.Flatten(name="flat"),
                library=library,
            )
        )
        names, nodes = list(graph.nodes), graph.nodes
        self.assertEqual(names[1:3], ["rows_normalized", "rows"])
        self.assertEqual(names[-2:], ["groups", "flat"])
        owners = {node.layers for node in nodes.values() if "groups" in node.name}
        self.assertEqual(owners, {("groups",)})

    @parameterized.parameters(*LIBRARIES)
    def test_groups_of_images_of_any_size_are_refused(self, library):
        library = LIBRARIES[library]
        layer = library.layers.GroupNormalization(3, name="norm")
        model = chain(layer, library=library, shape=(None, None, 3))
        with self.assertRaisesRegex(
            UnsupportedLayerError, "norm .* images of any size; give the model one size"
        ):
            read(model)

    def test_name_of_an_activation_leaves_the_users_names_alone(self):
        graph = read(
            chain(
                L.Conv2D(4, 3, activation="relu", name="conv"), L.ReLU(name="conv_relu")
            )
        )
        self.assertEqual(list(graph.nodes)[1:], ["conv", "conv_relu_2", "conv_relu"])
        self.assertEqual(graph.nodes["conv_relu"].layers, ("conv_relu",))

    @parameterized.parameters(*LIBRARIES)
    def test_layers_that_do_nothing_are_no_nodes(self, library):
        library = LIBRARIES[library]
        links = CHAINS["dropped"](library.layers)
        reading = read_layers(chain(*links, library=library))
        self.assertEqual(kinds(reading.graph), ["image"])
        self.assertLen(reading.layers, len(links) + 1)
        self.assertEqual(reading.graph.image.layers, (reading.layers[0].name,))

    def test_stack_of_channels_stands_for_their_layers_too(self):
        model = chain(
            L.Conv2D(3, 3, name="conv"),
            lambda x: ops.stack([x[..., i] for i in (2, 0, 1)], axis=-1),
        )
        reading = read_layers(model)
        last = reading.graph.last
        self.assertEqual((last.kind, last.inputs), ("channels", ("conv",)))
        self.assertEqual(last.settings["order"], (2, 0, 1))
        self.assertLen(last.layers, 4)
        picks = [layer for layer in reading.layers if layer.kind == "GetItem"]
        self.assertLen(picks, 3)
        for pick in picks:
            of = [n.name for n in reading.graph.nodes.values() if pick.name in n.layers]
            self.assertEqual(of, [last.name])

    @parameterized.parameters(*LIBRARIES)
    def test_settings_are_plain_values(self, library):
        library = LIBRARIES[library]
        for name in CHAINS:
            for node in read(MODELS[name](library)).nodes.values():
                for setting in node.settings.values():
                    hash(setting)
                    self.assertIn(
                        type(setting), (int, float, str, bool, tuple, type(None))
                    )

    def test_float64_constants_are_kept(self):
        graph = read(chain(lambda x: x * (1 / 3), L.Rescaling(1 / 255, 0.1)))
        scales = [node.settings["scale"] for node in list(graph.nodes.values())[1:]]
        self.assertEqual(scales, [1 / 3, 1 / 255])


class RefusedTest(parameterized.TestCase, tf.test.TestCase):
    def test_all_layers_that_are_not_known_are_named(self):
        model = chain(
            L.Softmax(axis=1, name="rows"),
            L.Conv2D(3, 3, name="conv"),
            L.Masking(name="masked"),
            ops.erf,
        )
        with self.assertRaises(UnsupportedLayerError) as caught:
            read(model)
        found = {problem.name: problem for problem in caught.exception.problems}
        self.assertLen(found, 3)
        self.assertEqual(found["rows"].kind, "Softmax")
        self.assertEqual(found["masked"].kind, "Masking")
        self.assertIn("erf", {name.split("_")[0] for name in found})
        self.assertRegex(
            str(caught.exception),
            r"layer rows \(Softmax\) cannot be quantized: it is over the axis 1; "
            r".*; layer masked .* Keras 3 layers of this class are not known "
            r"here; layer erf",
        )

    @parameterized.parameters(
        (lambda x: ops.mean(x, axis=1), r"over the axes \[1\] of \(9, 8, 3\)"),
        (lambda x: 1 / x, "division by a tensor"),
        (lambda x: ops.minimum(x, 2.0), "the minimum of a tensor and 2.0"),
        (lambda x: ops.maximum(x, 0.5), "the maximum of a tensor and 0.5"),
        (lambda x: L.RMSNormalization(axis=(1, 3))(x), r"it has axis \(1, 3\); only"),
        (
            lambda x: L.LayerNormalization(rms_scaling=True)(x),
            "it has rms_scaling; RMSNormalization has an integer form",
        ),
        (lambda x: x / 0.0, "it divides by 0"),
        (
            lambda x: x + np.ones((9, 8, 1), np.float32),
            r"constant of shape \(9, 8, 1\)",
        ),
        (lambda x: x[:, 1:], r"it takes \(slice.* of \(9, 8, 3\); only channels"),
        (lambda x: ops.relu(x[..., 0]), "reads one channel alone, get_item"),
        (lambda x: ops.stack([x, x], axis=-1), "only a stack of channels of one image"),
        (
            lambda x: ops.stack([x[..., 0], (2 * x)[..., 0]], axis=-1),
            "only a stack of channels of one image",
        ),
        (lambda x: ops.stack([x[..., 0]], axis=1), "only a stack of channels"),
        (lambda x: ops.sort(x), "no integer form of this operation"),
        (lambda x: ops.clip(x, -1.0, 1.0), "it clips to -1.0 .. 1.0"),
        (lambda x: L.Activation("softsign")(x), "its activation is softsign"),
        (lambda x: ops.cast(x, "int32"), "it casts to int32"),
        (lambda x: x[:, 1:, None], r"it takes .*None.* of \(9, 8, 3\)"),
        (lambda x: ops.softmax(x, axis=1), "it is over the axis 1; only the last"),
        (
            lambda x: ops.concatenate([x, np.ones((1, 9, 8, 3), "float32")], axis=0),
            "one of its inputs is a constant",
        ),
        (lambda x: L.Resizing(4, 4)(x), r"it makes images of \(4, 4, 3\) of those of"),
        (
            lambda x: L.Lambda(lambda y: y * y)(x),
            "Python function is not one scale .*, nor a mean or maximum .* a reshape",
        ),
        (
            lambda x: L.Lambda(lambda y: ops.mean(ops.abs(y), -1))(L.Conv2D(2, 3)(x)),
            "Python function is not one scale",
        ),
        (
            lambda x: L.Lambda(lambda y: ops.transpose(y, (0, 2, 1, 3)))(x),
            "Python function is not one scale",
        ),
        (
            lambda x: L.Lambda(ops.relu)(L.Conv2D(2, 3)(x)),
            "Python function is not one scale",
        ),
        (lambda x: L.AutoContrast()(x), "it stretches the values of each image"),
        (
            lambda x: L.Lambda(lambda both: both[0] + both[1])([x, x]),
            "it has 2 inputs in place of 1",
        ),
        (
            lambda x: L.Pipeline([L.RandomFlip(), L.Rescaling(1 / 255)])(x),
            "it has keras.layers.Rescaling in it, .*; put its layers into the model",
        ),
    )
    def test_reason_says_what_is_wrong(self, function, reason):
        with self.assertRaisesRegex(UnsupportedLayerError, reason):
            read(chain(function))

    @parameterized.product(
        library=list(LIBRARIES),
        case=(
            (lambda L: L.ReLU(0.0), "its largest value is 0; only one above 0"),
            (lambda L: L.ReLU(threshold=0.5), "its threshold is 0.5; only a ReLU"),
            (
                lambda L: L.ReLU(6.0, negative_slope=0.1),
                r"a largest value \(6\) and a slope .* \(0.1\); only a ReLU with one",
            ),
            (lambda L: L.Softmax(axis=1), "it is over the axis 1; only the last"),
            (lambda L: L.BatchNormalization(axis=1), "it has axis 1; only the last"),
            (
                lambda L: L.MaxPooling2D(data_format="channels_first"),
                "its data_format is channels_first",
            ),
            (
                lambda L: L.Conv2D(4, 3, activation="softsign"),
                "its activation is softs",
            ),
            (lambda L: L.Dense(4, activation="softsign"), "its activation is softs"),
            (
                lambda L: L.Dense(4, activation=lambda x: 2 * x),
                "its activation is a function of your own",
            ),
            (lambda L: L.Activation("softsign"), "its activation is softsign"),
            (lambda L: L.Masking(), "here"),
            (
                lambda L: L.UpSampling2D(interpolation="bicubic"),
                "its interpolation is bicubic; only nearest and bilinear",
            ),
            (
                lambda L: L.Conv2DTranspose(4, 3, 2, output_padding=1),
                "it has an output_padding; only None",
            ),
            (
                lambda L: L.Conv2DTranspose(4, 3, dilation_rate=2),
                "it has a dilation or groups",
            ),
            (
                lambda L: L.LayerNormalization([1, 2, 3]),
                r"it has axis \(1, 2, 3\); only the last axis",
            ),
            (lambda L: L.GroupNormalization(1, axis=1), "it has axis 1; only the last"),
            (
                lambda L: L.PReLU("random_normal"),
                r"slopes of shape \(9, 8, 3\), which differ .* shared_axes=\[1, 2\]",
            ),
            (
                lambda L: L.PReLU("random_normal", shared_axes=[1]),
                r"slopes of shape \(1, 8, 3\), which differ",
            ),
            (
                lambda L: L.Lambda(lambda x: x * x, output_shape=SHAPE),
                "its Python function is not one scale and one offset",
            ),
            (
                lambda L: L.Lambda(fails, output_shape=SHAPE),
                r"its Python function fails on images of \(9, 8, 3\): KeyError. Write",
            ),
            (  # x / 255 of any batch that holds black and white
                lambda L: L.Lambda(by_extremes, output_shape=SHAPE),
                "its Python function is not one scale and one offset",
            ),
            (
                lambda L: L.Normalization(mean=[1.0, 2.0, 0.0], variance=[9, 4, 0]),
                "it scales channel 2 .* as far as the others, .* set its variance",
            ),
        ),
    )
    def test_layer_that_cannot_be_is_an_unknown_node(self, library, case):
        library = LIBRARIES[library]
        make, reason = case
        layer = make(library.layers)
        reading = read_layers(
            chain(layer, library.layers.GlobalAveragePooling2D(), library=library)
        )
        ((name, kind, said),) = reading.problems
        self.assertEqual((name, kind), (layer.name, type(layer).__name__))
        self.assertRegex(said, reason)
        self.assertEqual(
            kinds(reading.graph), ["image", "unknown", "global_average_pool"]
        )
        self.assertEqual(reading.graph.nodes[name].settings["reason"], said)

    @parameterized.parameters(*LIBRARIES)
    def test_class_of_the_users_own_is_not_taken_for_its_namesake(self, library):
        layers = LIBRARIES[library].layers

        class Conv2D(layers.Conv2D):
            def call(self, inputs):
                return 2 * super().call(inputs)

        with self.assertRaisesRegex(UnsupportedLayerError, "a class of your own"):
            read(chain(Conv2D(4, 3), library=LIBRARIES[library]))

    @parameterized.product(
        library=list(LIBRARIES), function=(hard_swish_of_keras_2, gelu_doubled)
    )
    def test_function_of_ones_own_is_not_taken_for_its_namesake(
        self, library, function
    ):
        library = LIBRARIES[library]
        dense = library.layers.Dense(4, activation=function, name="dense")
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            rf"layer dense .* function of your own, .* than the {function.__name__} of",
        ):
            read(chain(dense, library=library))

    @parameterized.product(
        library=list(LIBRARIES), function=(swish_of_ones_own, gelu_by_tanh)
    )
    def test_function_of_ones_own_that_is_its_namesake(self, library, function):
        library = LIBRARIES[library]
        self.check_activation(library, function)

    def test_operations_of_keras_3_as_activations(self):
        for function in (ops.gelu, ops.relu6, ops.hard_sigmoid, ops.leaky_relu):
            self.check_activation(K, function)

    def check_activation(self, library, function):
        layers = library.layers
        links = [layers.Conv2D(4, 3, activation=function), layers.Activation(function)]
        model = chain(*links, library=library)
        rng = np.random.default_rng(1)
        images = (4 * rng.normal(size=(5, *SHAPE))).astype(np.float32)
        expected = outputs_of(model, images)
        self.assertAllClose(computed(read(model), images)[0], expected, atol=1e-5)

    @parameterized.parameters(*LIBRARIES)
    def test_activation_of_ones_own_class_is_not_taken_for_its_namesake(self, library):
        layers = LIBRARIES[library].layers

        class ReLU(layers.Layer):
            def call(self, inputs):
                return 2 * inputs

        dense = layers.Dense(4, activation=ReLU())
        with self.assertRaisesRegex(UnsupportedLayerError, "a class of your own, ReLU"):
            read(chain(dense, library=LIBRARIES[library]))

    def test_operation_of_ones_own_is_not_taken_for_its_namesake(self):
        class Gelu(K.Operation):
            def call(self, x):
                return 2 * x

            def compute_output_spec(self, x):
                return K.KerasTensor(x.shape, x.dtype)

        with self.assertRaisesRegex(UnsupportedLayerError, "a class of your own"):
            read(chain(Gelu()))

    def test_integer_weights_are_refused(self):
        model = chain(L.Dense(4, name="dense"))
        model.quantize("int8")
        with self.assertRaisesRegex(
            UnsupportedLayerError, "layer dense .*weights are int8; give a float"
        ):
            read(model)

    @parameterized.product(
        library=list(LIBRARIES),
        case=(
            ("mean", -1, True, ["conv"]),
            ("mean", 3, False, ["conv", "reshape"]),
            ("max", -1, True, ["channel_max"]),
            ("mean", (1, 2), False, ["global_average_pool"]),
            ("max", (1, 2), True, ["global_max_pool"]),
        ),
    )
    def test_lambda_is_known_by_what_it_computes(self, library, case):
        name, axis, keepdims, expected = case
        library = LIBRARIES[library]
        names = {"mean": tf.reduce_mean, "max": tf.reduce_max}
        reduce = names[name] if library is keras else getattr(ops, name)
        layer = library.layers.Lambda(lambda x: reduce(x, axis, keepdims=keepdims))
        conv = library.layers.Conv2D(4, 3)
        model = chain(conv, layer, library=library)
        graph = read(model)
        self.assertEqual(kinds(graph)[2:], expected)
        images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
        self.assertAllClose(computed(graph, images)[0], outputs_of(model, images))

    def test_lambda_behind_a_layer_that_cannot_be(self):
        odd = L.UpSampling2D(interpolation="bicubic", name="odd")
        mean = L.Lambda(lambda x: ops.mean(x, (1, 2)))
        reading = read_layers(chain(odd, mean, shape=(None, None, 3)), SHAPE)
        self.assertEqual([problem.name for problem in reading.problems], ["odd"])
        expected = ["image", "unknown", "global_average_pool"]
        self.assertEqual(kinds(reading.graph), expected)

    def test_reshaping_lambda_is_a_reshape(self):
        model = chain(L.Conv2D(4, 2), L.Lambda(lambda x: ops.reshape(x, (-1, 7, 32))))
        self.assertEqual(kinds(read(model))[2:], ["reshape"])

    def test_affine_lambda_is_affine(self):
        model = chain(L.Lambda(lambda x: (x - VECTOR) / 127.5))
        graph = read(model)
        self.assertEqual(kinds(graph)[1:], ["affine"])
        images = np.random.default_rng(0).uniform(0, 255, (2, *SHAPE))
        images = images.astype(np.float32)
        self.assertAllClose(computed(graph, images)[0], model(images), atol=1e-5)

    def test_half_precision_becomes_float32(self):
        conv = L.Conv2D(4, 3, dtype="bfloat16")
        graph = read(chain(conv))
        weights = graph.last.weights
        self.assertEqual({w.dtype for w in weights.values()}, {np.dtype("float32")})
        kernel = ops.convert_to_numpy(conv.kernel).astype(np.float32)
        self.assertAllEqual(weights["kernel"], kernel)


if __name__ == "__main__":
    tf.test.main()
