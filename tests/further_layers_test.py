"""Layers that few classifiers have go the whole way, from Keras 2 and 3 to LiteRT.

Each case is a small network around one layer. The float graph is held against Keras
itself, the folded one too, the file against the quantized network layer by layer and
as a whole, the student against the quantized network bit for bit, and a batch against
its images one by one.
"""

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.importing.reading import outputs_of
from dfq_tf.quantization import post_training, student
from dfq_tf.settings import CalibrationConfig, FileConfig, parse_widths
from dfq_tf.tflite import proof
from dfq_tf.tflite.running import TFLiteClassifier, open_interpreter
from tests import helpers, networks

LIBRARIES = {"keras2": keras, "keras3": keras3()}
SHAPE = (12, 10, 3)


def conv(L, outputs=6, **settings):
    return L.Conv2D(outputs, 3, padding="same", **settings)


def two(L, x, layer, count=2):
    """A layer that reads several convolutions, one of them behind a ReLU."""
    inputs = [conv(L)(x) for _ in range(count)]
    return layer([L.ReLU()(inputs[0]), *inputs[1:]])


def transposed(L, x, *arguments, **settings):
    return L.Conv2DTranspose(*arguments, **settings)(conv(L, activation="relu")(x))


def gate(L, x):
    """A vector beside an image."""
    x = conv(L)(x)
    return L.Maximum()([L.GlobalAveragePooling2D(keepdims=True)(x), x])


def gate_of_new_axes(L, x):
    """Squeeze and excite, as functions write it."""
    x = conv(L)(x)
    gate = L.Dense(6, activation="sigmoid")(L.GlobalAveragePooling2D()(x))
    return L.ReLU()(x * gate[:, None, None, :])


def functions(L):
    """Where models with layers of this library have their functions from."""
    return tf if L is keras.layers else keras3().ops


def shuffle(L, x):
    """Channels of two groups in turn, as ShuffleNet has them."""
    x = functions(L).reshape(conv(L, activation="relu")(x), (-1, 12, 10, 2, 3))
    x = functions(L).transpose(x, (0, 1, 2, 4, 3))
    return conv(L)(functions(L).reshape(x, (-1, 12, 10, 6)))


def encoder_decoder(L, x):
    """Most of them in one network: down, up again, and beside each other."""
    x = L.PReLU(shared_axes=[1, 2])(L.BatchNormalization()(conv(L)(x)))
    y = L.MaxPooling2D()(L.ZeroPadding2D(((1, 1), (0, 2)))(x))
    y = conv(L, 8, activation="relu")(y)
    z = L.Conv2DTranspose(6, 3, 2, padding="same", use_bias=False)(y)
    z = L.ReLU()(L.BatchNormalization()(z))
    z = L.Cropping2D(((1, 1), (0, 2)))(z)
    w = L.UpSampling2D(2, interpolation="bilinear")(L.Conv2D(6, 1)(y))
    w = L.Cropping2D(((0, 2), (2, 0)))(w)
    x = L.Concatenate()([x, L.Average()([z, w]), L.Maximum()([x, z])])
    x = L.UpSampling2D(2)(L.AveragePooling2D(2)(L.Permute((2, 1, 3))(x)))
    return L.GlobalMaxPooling2D()(conv(L, activation="relu")(x))


def normalized_twice(L, x):
    """Of two readers, one adds the normalized values to others."""
    x = L.LayerNormalization()(L.Conv2D(8, 2, 2)(x))
    return L.LayerNormalization()(L.Add()([x, conv(L, 8, activation="relu")(x)]))


def convnext(L, x):
    """A block of ConvNeXt, behind its stem."""
    x = L.LayerNormalization(epsilon=1e-6)(L.Conv2D(8, 2, 2)(x))
    y = L.Conv2D(8, 7, padding="same", groups=8)(x)
    y = L.Dense(32, activation="gelu")(L.LayerNormalization(epsilon=1e-6)(y))
    x = L.Add()([x, L.Dense(8)(y)])
    return L.LayerNormalization(epsilon=1e-6)(L.GlobalAveragePooling2D()(x))


def attention_to_places(L, x):
    """The second half of CBAM: means and maxima of channels decide on each place."""
    of = functions(L)
    mean, largest = (
        (of.reduce_mean, of.reduce_max) if L is keras.layers else (of.mean, of.max)
    )
    x = conv(L, activation="relu")(x)
    both = L.Concatenate()([mean(x, -1, keepdims=True), largest(x, 3, keepdims=True)])
    return L.Multiply()([x, L.Conv2D(1, 7, padding="same", activation="sigmoid")(both)])


# What each network has between its image and its dense layer.
CASES = {
    "encoder_decoder": encoder_decoder,
    "crop": lambda L, x: conv(L)(L.Cropping2D(((1, 0), (2, 3)))(x)),
    "crop_behind_a_convolution": lambda L, x: L.ReLU()(
        L.Cropping2D(((0, 2), (1, 0)))(conv(L)(x))
    ),
    "nearest": lambda L, x: conv(L)(L.UpSampling2D((2, 3))(conv(L)(x))),
    "nearest_of_pixels": lambda L, x: conv(L)(L.UpSampling2D(2)(x)),
    "nearest_of_three": lambda L, x: L.MaxPooling2D()(L.UpSampling2D(3)(conv(L)(x))),
    "bilinear": lambda L, x: conv(L)(
        L.UpSampling2D(2, interpolation="bilinear")(conv(L)(x))
    ),
    "bilinear_of_one_side": lambda L, x: L.ReLU()(
        L.UpSampling2D((4, 1), interpolation="bilinear")(conv(L)(x))
    ),
    "average": lambda L, x: L.ReLU()(two(L, x, L.Average())),
    "average_of_three": lambda L, x: two(L, x, L.Average(), 3),
    "maximum": lambda L, x: L.ReLU()(two(L, x, L.Maximum())),
    "maximum_of_three": lambda L, x: conv(L)(two(L, x, L.Maximum(), 3)),
    "maximum_with_a_pixel": gate,
    "minimum": lambda L, x: L.BatchNormalization()(two(L, x, L.Minimum())),
    "minimum_of_curves": lambda L, x: L.Minimum()(
        [conv(L, activation="sigmoid")(x), conv(L, activation="tanh")(x)]
    ),
    "prelu": lambda L, x: conv(L)(L.PReLU(shared_axes=[1, 2])(conv(L)(x))),
    "prelu_of_vectors": lambda L, x: L.PReLU()(
        L.Dense(7)(L.GlobalAveragePooling2D()(conv(L)(x)))
    ),
    "permute": lambda L, x: conv(L)(L.Permute((3, 1, 2))(conv(L)(x))),
    "permute_before_flatten": lambda L, x: L.Flatten()(
        L.Permute((2, 1, 3))(L.MaxPooling2D()(conv(L, activation="relu")(x)))
    ),
    "permute_of_nothing": lambda L, x: L.Permute((1, 2, 3))(conv(L)(x)),
    "transposed": lambda L, x: transposed(L, x, 5, 2, 2, activation="relu"),
    "transposed_with_bn": lambda L, x: L.ReLU(6.0)(
        L.BatchNormalization()(transposed(L, x, 5, 3, 2, padding="same"))
    ),
    "transposed_of_four": lambda L, x: conv(L)(
        transposed(L, x, 4, 4, 2, padding="same", use_bias=False)
    ),
    "transposed_valid": lambda L, x: transposed(L, x, 4, (5, 3), 2),
    "transposed_by_three": lambda L, x: transposed(L, x, 4, 4, 3, padding="same"),
    "transposed_of_a_pixel": lambda L, x: transposed(L, x, 4, 1, 2),
    "transposed_of_one_stride": lambda L, x: L.ReLU(1.5)(
        transposed(L, x, 4, 3, padding="same")
    ),
    "transposed_of_one_stride_even": lambda L, x: L.LeakyReLU(0.1)(
        transposed(L, x, 4, (2, 4), padding="same")
    ),
    "transposed_of_one_stride_valid": lambda L, x: transposed(L, x, 4, 3),
    # Known kinds in places where they seldom stand.
    "padding_behind_a_relu": lambda L, x: L.MaxPooling2D()(
        L.ZeroPadding2D(((0, 1), (2, 0)))(conv(L, activation="relu")(x))
    ),
    "padding_behind_a_curve": lambda L, x: L.AveragePooling2D(2)(
        L.ZeroPadding2D(1)(conv(L, activation="sigmoid")(x))
    ),
    "padding_before_a_dense_layer": lambda L, x: L.Dense(5)(
        L.ZeroPadding2D(((1, 0), (0, 1)))(L.ReLU()(L.MaxPooling2D()(conv(L)(x))))
    ),
    "padding_before_a_global_pooling": lambda L, x: L.GlobalMaxPooling2D()(
        L.ZeroPadding2D(((1, 0), (0, 2)))(conv(L)(x))
    ),
    "padding_twice": lambda L, x: L.BatchNormalization()(
        L.ZeroPadding2D(1)(L.ZeroPadding2D(((1, 0), (0, 1)))(conv(L)(x)))
    ),
    "padding_of_the_logits_features": lambda L, x: L.Flatten()(
        L.ZeroPadding2D(1)(L.GlobalMaxPooling2D(keepdims=True)(conv(L)(x)))
    ),
    "global_max_behind_batch_normalization": lambda L, x: L.ReLU()(
        L.BatchNormalization()(L.GlobalMaxPooling2D()(conv(L)(x)))
    ),
    "global_max_of_pixels": lambda L, x: L.GlobalMaxPooling2D()(x),
    "gate_of_new_axes": gate_of_new_axes,
    "shuffle": shuffle,
    "layer_normalization": lambda L, x: L.Conv2D(5, 3)(
        L.LayerNormalization(epsilon=0.01)(conv(L)(x))
    ),
    "layer_normalization_with_zeros_around": lambda L, x: conv(L, activation="relu")(
        L.LayerNormalization()(L.MaxPooling2D()(conv(L)(x)))
    ),
    "layer_normalization_that_others_read": normalized_twice,
    "layer_normalization_of_vectors": lambda L, x: L.LayerNormalization(scale=False)(
        L.GlobalAveragePooling2D()(conv(L, 12)(x))
    ),
    "group_normalization": lambda L, x: L.ReLU()(
        L.GroupNormalization(3, epsilon=0.01)(conv(L)(x))
    ),
    "group_normalization_of_all": lambda L, x: conv(L)(
        L.GroupNormalization(1)(L.MaxPooling2D()(conv(L, activation="relu")(x)))
    ),
    "group_normalization_of_each": lambda L, x: L.GroupNormalization(-1, center=False)(
        conv(L)(x)
    ),
    "unit_normalization": lambda L, x: L.UnitNormalization()(
        L.GlobalAveragePooling2D()(conv(L, 12)(x))
    ),
    "convnext": convnext,
    "attention_to_places": attention_to_places,
    "padding_by_a_function": lambda L, x: L.MaxPooling2D()(
        functions(L).pad(conv(L)(x), [[0, 0], [0, 1], [2, 0], [0, 0]])
    ),
}
# Those that cannot have activations of 16 bits.
NARROW = {name for name in CASES if name.startswith("transposed")}
NARROW |= {"encoder_decoder", "convnext"}
NARROW |= {name for name in CASES if "normalization" in name and "batch" not in name}
OTHER_WIDTHS = ("W4A6", "W8A16")
# Those that are checked each time: a third, and functions in place of layers.
CHECKED = [*list(CASES)[::3], "gate_of_new_axes", "shuffle", "padding_by_a_function"]
CHECKED += ["convnext", "group_normalization", "attention_to_places"]
NARROW -= {name for name in CASES if "one_stride" in name}


def model_of(name, library):
    """The network of a case, with random weights."""
    module = LIBRARIES[library]
    keras.utils.set_random_seed(0)
    L, image = module.layers, module.layers.Input(SHAPE)
    x = CASES[name](L, image)
    if len(x.shape) == 4:
        x = L.Flatten()(x)
    model = module.Model(image, L.Dense(networks.NUM_CLASSES, name="logits")(x))
    randomise = helpers.randomise if library == "keras2" else helpers.randomise_keras3
    return randomise(model)


def classifier_of(model):
    return as_classifier(model, input_mean=120.0, input_scale=1 / 64)


def quantized(name, widths="W8A8", library="keras2"):
    classifier = classifier_of(model_of(name, library))
    config = CalibrationConfig(activation_range="min_max")
    network = post_training.float_network(classifier, config)
    images = networks.images(SHAPE, 32, seed=1)
    return post_training.post_training(network, images, parse_widths(widths), config)


def in_one_batch(content, images):
    """The integers that a file gives for all images at once."""
    interpreter = open_interpreter(content)
    (image,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(image["index"], images.shape, strict=False)
    interpreter.allocate_tensors()
    interpreter.set_tensor(image["index"], images)
    interpreter.invoke()
    (output,) = interpreter.get_output_details()
    return interpreter.get_tensor(output["index"])


class FurtherLayersTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*CHECKED)
    def test_float_network_is_that_of_keras(self, name):
        # Each from one of the two; tests/keras_names_test.py has all kinds.
        libraries = list(LIBRARIES)
        library = libraries[list(CASES).index(name) % len(libraries)]
        self.check_float(name, library)

    @parameterized.product(name=list(CASES), library=list(LIBRARIES))
    @pytest.mark.long
    def test_float_network_is_that_of_both(self, name, library):
        self.check_float(name, library)

    def check_float(self, name, library):
        model = model_of(name, library)
        classifier = classifier_of(model)
        images = networks.images(SHAPE, 6, seed=2)
        fed = ((images.astype(np.float32) - 120) / 64).astype(np.float32)
        expected = outputs_of(model, fed)
        size = np.abs(expected).max()
        self.assertGreater(np.ptp(expected), 0.01)
        scores = classifier.scores(images)
        self.assertAllClose(scores, expected, rtol=0, atol=1e-5 * size)
        rewritten = post_training.float_network(classifier)
        scores = rewritten.scores(images)
        self.assertAllClose(scores, expected, rtol=0, atol=1e-4 * size)

    @parameterized.parameters(*CHECKED)
    def test_file_answers_as_its_student(self, name):
        self.check_file(name, "W8A8")

    @parameterized.parameters(*CASES)
    @pytest.mark.long
    def test_all_files_answer_as_their_students(self, name):
        self.check_file(name, "W8A8")

    @parameterized.parameters("bilinear", "transposed")
    def test_so_does_one_of_other_widths(self, name):
        for widths in OTHER_WIDTHS:
            self.check_file(name, widths)

    @parameterized.product(name=list(CASES), widths=OTHER_WIDTHS)
    @pytest.mark.long
    def test_so_do_all_of_other_widths(self, name, widths):
        self.check_file(name, widths)

    def check_file(self, name, widths):
        if widths == "W8A16" and name in NARROW:
            reason = "for 8 bits alone|few for squares of 16 bits"
            with self.assertRaisesRegex(UnsupportedLayerError, reason):
                quantized(name, widths)
            return
        network = quantized(name, widths)
        images = networks.images(SHAPE, 16, seed=3)
        logits = FileConfig(file_output="logits")
        content = proof.convert(network, images, logits)
        for layer, steps in proof.layer_differences(network, content, images).items():
            kind = network.graph.nodes[layer].kind
            most = 3 if (widths, kind) == ("W8A16", "tanh") else 1
            self.assertLessEqual(steps, most, f"{layer} ({kind})")
        file = TFLiteClassifier(content)
        single = file.scores(images)
        step = float(network.grid(network.graph.output).scale[0])
        most = {"W8A8": 2.01, "W4A6": 8.01, "W8A16": 8.01}[widths] * step
        self.assertAllClose(single, network.scores(images), rtol=0, atol=most)
        integers = in_one_batch(content, images)
        self.assertAllEqual(
            integers, np.concatenate([in_one_batch(content, i[None]) for i in images])
        )
        model = student.build(network)
        fed = network.description.normalize(images.astype(np.float32))
        self.assertAllEqual(model(fed), network.scores(images))


class RewrittenTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("transposed", ["conv", "relu", "depth_to_space"]),
        ("transposed_with_bn", ["pad", "conv", "relu", "depth_to_space"]),
        ("transposed_valid", ["pad", "conv", "depth_to_space", "crop"]),
        ("transposed_of_one_stride", ["conv", "relu"]),
        ("transposed_of_one_stride_even", ["pad", "conv", "leaky_relu"]),
        ("average", ["add", "depthwise_conv", "relu"]),
        # Its scale and offset go into the kernels behind it, without zeros around.
        ("layer_normalization", ["conv", "layer_normalization", "conv"]),
        (
            "layer_normalization_with_zeros_around",
            ["layer_normalization", "depthwise_conv", "conv", "relu"],
        ),
        (
            "layer_normalization_that_others_read",
            "layer_normalization depthwise_conv conv relu add layer_normalization "
            "depthwise_conv".split(),
        ),
        (
            "convnext",
            "layer_normalization depthwise_conv depthwise_conv layer_normalization "
            "dense gelu dense add global_average_pool layer_normalization".split(),
        ),
        ("permute_of_nothing", []),
    )
    def test_kinds(self, name, expected):
        classifier = classifier_of(model_of(name, "keras2"))
        graph = post_training.float_network(classifier).graph
        kinds = [node.kind for node in graph.nodes.values()]
        # Behind the pixels and convolutions, and before what makes logits.
        ends = ["dense"] if "convnext" in name else ["reshape", "dense"]
        self.assertEqual(kinds[-len(expected) - len(ends) :], expected + ends)
        self.assertNotIn("batch_normalization", kinds)

    @parameterized.product(
        library=list(LIBRARIES),
        case=(
            (
                lambda L: L.Conv2DTranspose(4, 3, (1, 2), name="odd"),
                r"Conv2DTranspose|conv_transpose",
                r"strides \(1, 2\); only one stride for both axes",
            ),
            (
                lambda L: L.UpSampling2D(3, interpolation="bilinear", name="odd"),
                "bilinear_upsampling",
                r"\(3, 3\) times as large .* Take them, or interpolation='nearest'",
            ),
        ),
    )
    def test_refused_by_name(self, library, case):
        make, kind, reason = case
        module = LIBRARIES[library]
        L, image = module.layers, module.layers.Input(SHAPE)
        x = L.Flatten()(make(L)(conv(L)(image)))
        classifier = classifier_of(module.Model(image, L.Dense(5)(x)))
        message = rf"layer odd \(({kind})\) cannot be quantized: .*{reason}"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            post_training.float_network(classifier)


class TrainingTest(parameterized.TestCase, tf.test.TestCase):
    def test_gradients_reach_all_weights_of_a_student(self):
        network = quantized("encoder_decoder")
        model = student.build(network)
        images = networks.images(SHAPE, 16, seed=3)
        fed = network.description.normalize(images.astype(np.float32))

        @tf.function
        def gradients(fed):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(model(fed)))
            return tape.gradient(loss, model.trainable_weights)

        for gradient, weight in zip(gradients(fed), model.trainable_weights):
            self.assertTrue(np.isfinite(gradient).all(), weight.name)
            self.assertGreater(np.abs(gradient).max(), 0, weight.name)
        # The weights go back as they are.
        images = networks.images(SHAPE, 8, seed=4)
        again = student.trained(network, model)
        self.assertAllEqual(again.scores(images), network.scores(images))


if __name__ == "__main__":
    tf.test.main()
