"""Each layer and operation of Keras 3, held against Keras 3 itself."""

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph import rewriting
from dfq_tf.graph.graph import Graph
from dfq_tf.importing.keras3 import Keras3Reader
from tests import helpers

K = keras3()
L, ops = K.layers, K.ops
SHAPE = (9, 8, 3)


def chain(*links, shape=SHAPE):
    """A functional model of layers and functions, one behind the other."""
    image = x = L.Input(shape)
    for link in links:
        x = link(x)
    return K.Model(image, x)


def twice(shared):
    """A model inside, called twice with the same weights."""
    image = L.Input(SHAPE)
    x = shared(shared(image))
    return K.Model(image, L.Add()([x, image]))


def branches():
    image = L.Input(SHAPE)
    parts = [L.Conv2D(4, 3, padding="same")(image) for _ in range(3)]
    x = L.Add()(parts)
    x = L.Multiply()([x, L.Subtract()(parts[:2]), parts[2]])
    x = L.Concatenate()([x, image])
    return K.Model(image, ops.concatenate([x, parts[0]], axis=-1))


def nested():
    inner = K.Sequential([L.Input(SHAPE), L.Conv2D(3, 3, padding="same"), L.ReLU()])
    wrapped = K.Sequential([L.Input(SHAPE), inner, L.BatchNormalization()])
    return chain(wrapped, L.Flatten(), L.Dense(4))


VECTOR = np.array([1.0, -2.0, 3.0], np.float32)
MODELS = {
    "conv": lambda: chain(L.Conv2D(4, 3, 2, padding="same", activation="relu")),
    "conv_dilated_grouped": lambda: chain(
        L.Conv2D(6, (3, 2), dilation_rate=2, groups=3, use_bias=False)
    ),
    "depthwise": lambda: chain(
        L.DepthwiseConv2D(3, 2, padding="same", depth_multiplier=2)
    ),
    "separable": lambda: chain(L.SeparableConv2D(5, 3, activation="relu")),
    "bn": lambda: chain(L.BatchNormalization(epsilon=0.01)),
    "bn_without_scale": lambda: chain(L.BatchNormalization(scale=False)),
    "bn_without_center": lambda: chain(L.BatchNormalization(center=False)),
    "dense_of_pixels": lambda: chain(L.Dense(4)),
    "dense": lambda: chain(L.Flatten(), L.Dense(4, activation="softmax")),
    "relu": lambda: chain(L.ReLU(), L.ReLU(0.5)),
    "relu_of_a_slope": lambda: chain(L.ReLU(negative_slope=0.1, threshold=0.2)),
    "leaky": lambda: chain(L.LeakyReLU(0.3)),
    "softmax": lambda: chain(L.Flatten(), L.Softmax()),
    "pooling": lambda: chain(
        L.MaxPooling2D(3, 2, padding="same"), L.AveragePooling2D(2, 1)
    ),
    "global_average": lambda: chain(L.GlobalAveragePooling2D()),
    "global_average_kept": lambda: chain(L.GlobalAveragePooling2D(keepdims=True)),
    "global_max": lambda: chain(L.GlobalMaxPooling2D()),
    "padding": lambda: chain(L.ZeroPadding2D(((0, 1), (2, 3)))),
    "reshape": lambda: chain(L.Reshape((-1, 12))),
    "dropped": lambda: chain(
        L.RandomFlip(),
        L.RandomRotation(0.1),
        L.RandomZoom(0.1),
        L.RandomContrast(0.1),
        L.RandomTranslation(0.1, 0.1),
        L.GaussianNoise(1.0),
        L.Dropout(0.5),
        L.SpatialDropout2D(0.5),
        L.Identity(),
        lambda x: L.Dropout(0.5)(x, training=True),
    ),
    "normalization": lambda: chain(
        L.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0])
    ),
    "rescaling": lambda: chain(L.Rescaling([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])),
    "resizing_to_the_same": lambda: chain(L.Resizing(9, 8)),
    "branches": branches,
    "nested": nested,
    "nested_twice": lambda: twice(
        K.Sequential([L.Input(SHAPE), L.Conv2D(3, 3, padding="same"), L.ReLU()])
    ),
    "layer_twice": lambda: twice(L.Conv2D(3, 3, padding="same")),
    "sequential": lambda: K.Sequential(
        [L.Input(SHAPE), L.Conv2D(4, 3), L.Flatten(), L.Dense(3)]
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
    "functions": lambda: chain(
        ops.relu, ops.sigmoid, ops.tanh, ops.silu, ops.hard_sigmoid, ops.hard_silu
    ),
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
    "reshaped_by_function": lambda: chain(
        lambda x: ops.reshape(x, (-1, 216)), ops.softmax
    ),
    **{
        f"activation_{name}": lambda name=name: chain(
            L.Activation(name), L.Conv2D(4, 3, activation=name), L.Dense(3, name)
        )
        for name in (
            "relu relu6 sigmoid tanh silu swish hard_sigmoid hard_silu hard_swish "
            "leaky_relu linear"
        ).split()
    },
}


def read(model):
    return Graph.from_model(model, Keras3Reader(K))


class Keras3ReaderTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.named_parameters(MODELS.items())
    def test_outputs_are_those_of_keras_3(self, make):
        model = helpers.randomise_keras3(make())
        rng = np.random.default_rng(1)
        images = (2 * rng.normal(size=(5, *SHAPE))).astype(np.float32)
        expected = ops.convert_to_numpy(model(images, training=False))
        self.assertGreater(np.ptp(expected), 0)
        graph = read(model)
        rebuilt = graph.build()
        self.assertIsInstance(rebuilt, keras.Model)
        self.assertAllClose(rebuilt(images, training=False), expected, atol=1e-5)
        for node in graph.nodes.values():
            self.assertEqual(
                node.shape, tuple(rebuilt.get_layer(node.name).output.shape[1:])
            )
        # And so are those of the network without BN and the like.
        folded = rewriting.fold(graph).build()
        self.assertAllClose(folded(images, training=False), expected, atol=1e-4)

    def test_all_layers_that_are_not_known_are_named(self):
        model = chain(
            L.LayerNormalization(name="norm"),
            L.Conv2D(3, 3, name="conv"),
            L.UpSampling2D(name="bigger"),
            ops.erf,
        )
        with self.assertRaises(UnsupportedLayerError) as caught:
            read(model)
        found = {problem.name: problem for problem in caught.exception.problems}
        self.assertLen(found, 3)
        self.assertEqual(found["norm"].kind, "LayerNormalization")
        self.assertEqual(found["bigger"].kind, "UpSampling2D")
        self.assertIn("erf", {name.split("_")[0] for name in found})
        self.assertRegex(
            str(caught.exception),
            r"layer norm \(LayerNormalization\) cannot be quantized: Keras 3 layers of "
            r"this class are not known here; layer bigger .*; layer erf",
        )

    @parameterized.parameters(
        (lambda x: ops.mean(x, axis=-1), r"over the axes \[-1\] of \(9, 8, 3\)"),
        (lambda x: 1 / x, "division by a tensor"),
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
        (lambda x: L.Activation("gelu")(x), "its activation is gelu"),
        (lambda x: L.Resizing(4, 4)(x), r"it makes images of \(4, 4, 3\) of those of"),
        (lambda x: L.Lambda(lambda y: y * y)(x), "Python function is not one scale"),
    )
    def test_reason_says_what_is_wrong(self, function, reason):
        with self.assertRaisesRegex(UnsupportedLayerError, reason):
            read(chain(function))

    def test_class_of_the_users_own_is_not_taken_for_its_namesake(self):
        class Conv2D(L.Conv2D):
            def call(self, inputs):
                return 2 * super().call(inputs)

        with self.assertRaisesRegex(UnsupportedLayerError, "a class of your own"):
            read(chain(Conv2D(4, 3)))

    def test_affine_lambda_is_a_rescaling(self):
        model = chain(L.Lambda(lambda x: (x - VECTOR) / 127.5))
        graph = read(model)
        self.assertEqual([n.kind for n in graph.nodes.values()][1:], ["Rescaling"])
        images = np.random.default_rng(0).uniform(0, 255, (2, *SHAPE))
        self.assertAllClose(graph.build()(images), model(images), atol=1e-5)

    def test_half_precision_becomes_float32(self):
        conv = L.Conv2D(4, 3, dtype="mixed_bfloat16")
        graph = read(chain(conv))
        rebuilt = graph.build()
        self.assertEqual({w.dtype for w in rebuilt.weights}, {tf.float32})
        self.assertEqual(rebuilt.layers[-1].compute_dtype, "float32")


if __name__ == "__main__":
    tf.test.main()
