import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ExportError, ModelError
from dfq_tf.graph.classifier import Classifier, agreement
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.layers import KINDS
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, FileConfig, parse_widths
from dfq_tf.tflite import proof, writer
from dfq_tf.tflite.running import TFLiteClassifier
from dfq_tf.training.learner import Learner
from tests import helpers, networks
from tests.graphs import Sketch

layers = keras.layers

# Network and file round the same numbers, one in float32, one in integers; where a
# number lies just between two integers they may part, and later layers spread that.
# Measured on these images: 0 steps, but for the networks below.
MAX_STEPS = 1
# Ten layers (measured: 2 in 1 % of the outputs), and a leaky ReLU, whose slope XNNPACK
# holds in 8 bits (1 to 2). The products behind sigmoids are the third (2); XNNPACK
# rescales what is to be concatenated by factors of 8 bits, too (3, and 0.61 on the
# average).
MAX_STEPS_OF = dict.fromkeys(
    ("wrn_10_1", "bn_first", "densenet_like", "mobilenet_v3_like"), 3
)
# What the network itself gives, whatever the model gave.
LOGITS = FileConfig(file_output="logits")
# The one step of int16 is 1/256 of that of int8.
MAX_STEPS_INT16 = 8


def network_of(classifier, widths=BitWidths()):
    images = networks.images(classifier.image_shape, 64, seed=1)
    return post_training(float_network(classifier), images, widths)


@functools.cache
def shared(make, *arguments, widths=BitWidths()):
    """The network of a classifier that tests share; nothing changes it."""
    return network_of(make(*arguments), widths)


def steps_apart(network, tflite):
    """Differences of all outputs on 200 images, in integer steps of the output."""
    images = networks.images(network.classifier.image_shape, 200, seed=2)
    difference = np.abs(network.scores(images) - tflite.scores(images))
    return np.round(difference / tflite.output_scale)


def model_of(image, x):
    x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
    model = keras.Model(image, x)
    networks.randomize(model, 0)
    return model


def classifier_of(image, x):
    return described(model_of(image, x))


def described(model):
    description = ModelDescription((120.0,), (1 / 64,), "logits", tuple("abcde"))
    return as_classifier(Learner(model, description))


def wide(image, activation=None):
    """A convolution whose outputs go far."""
    initializer = keras.initializers.RandomNormal(stddev=1.0)
    return layers.Conv2D(
        6, 3, padding="same", activation=activation, kernel_initializer=initializer
    )(image)


# What demands a range, and what moves its integers to where a ReLU's meet them; or both
# branches.
MEETING = {
    "top_pooled": lambda x: layers.MaxPooling2D()(layers.ReLU(1.0)(x)),
    "top_padded_and_averaged": lambda x: layers.AveragePooling2D()(
        layers.ZeroPadding2D(1)(layers.ReLU(2.0)(x))
    ),
    "tanh_pooled": lambda x: layers.MaxPooling2D()(layers.Activation("tanh")(x)),
    "sigmoid_flattened": lambda x: layers.Flatten()(layers.Activation("sigmoid")(x)),
    "hard_sigmoid_reshaped": lambda x: layers.Reshape((4, 8, 12))(
        layers.Activation("hard_sigmoid")(x)
    ),
    "two_tops": lambda x: [
        layers.MaxPooling2D()(layers.ReLU(top)(x)) for top in (1.0, 3.0)
    ],
}


def details_of(content):
    interpreter = litert.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    (output,) = interpreter.get_output_details()
    return image, output, interpreter.get_tensor_details()


def operators_of(content):
    """Name, inputs and outputs of each operator."""
    interpreter = litert.Interpreter(
        model_content=content,
        experimental_op_resolver_type=(
            litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        ),
    )
    return [
        (operator["op_name"], operator["inputs"], operator["outputs"])
        for operator in interpreter._get_ops_details()
    ]


class ConvertTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*networks.FEW)
    def test_file_is_integer_and_agrees_with_the_network(self, name):
        self.check_file(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_are_the_files_of_the_others(self, name):
        self.check_file(name)

    def check_file(self, name):
        network = shared(networks.build, name)
        content = proof.convert(network, config=LOGITS)
        image, output, tensors = details_of(content)
        self.assertEqual(image["dtype"], np.uint8)
        self.assertAllEqual(image["shape"], (1, *network.classifier.image_shape))
        # (pixel - 120) / 64 is what the description says.
        self.assertEqual(image["quantization"], (1 / 64, 120))
        self.assertEqual(output["dtype"], np.uint8)
        self.assertAllEqual(output["shape"], (1, networks.NUM_CLASSES))
        for tensor in tensors:
            self.assertEqual(np.dtype(tensor["dtype"]).kind in "iu", True, tensor)
        steps = steps_apart(network, TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS_OF.get(name, MAX_STEPS))
        self.assertLess(steps.mean(), 0.7 if name in MAX_STEPS_OF else 0.01)

    def test_sixteen_bit_activations_give_sixteen_bit_logits(self):
        network = shared(networks.build, "resnet_like", widths=BitWidths(8, 16))
        content = proof.convert(network)
        image, output, tensors = details_of(content)
        self.assertEqual(image["dtype"], np.uint8)
        self.assertEqual(image["quantization"], (1 / 64, 120))
        self.assertEqual(output["dtype"], np.int16)
        (scale,) = output["quantization_parameters"]["scales"]
        steps = steps_apart(network, TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS_INT16)
        # The same logits as with 8 bits, on a finer grid.
        coarse = shared(networks.build, "resnet_like")
        _, output, _ = details_of(proof.convert(coarse))
        self.assertLess(scale, output["quantization"][0] / 100)

    @parameterized.parameters(
        dict(input_mean=(125.3,), input_scale=(1 / 50,)),
        dict(input_mean=(123.7, 116.3, 103.5), input_scale=(0.017, 0.0175, 0.02)),
    )
    def test_other_normalisations_happen_inside_the_file(self, **fields):
        small = helpers.small_classifier()
        description = dataclasses.replace(small.description, **fields)
        network = network_of(Classifier(small.graph, description))
        content = proof.convert(network)
        image, _, _ = details_of(content)
        self.assertEqual(image["quantization"], (1.0, 0))
        steps = steps_apart(network, TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS)

    @parameterized.parameters(False, True)
    def test_kernels_have_the_scales_of_the_network(self, per_channel):
        widths = BitWidths(per_channel=per_channel)
        network = shared(helpers.small_classifier, widths=widths)
        content = proof.convert(network)
        _, _, tensors = details_of(content)
        (scales,) = (
            tensor["quantization_parameters"]["scales"]
            for tensor in tensors
            if tuple(tensor["shape"]) == (6, 3, 3, 3)
        )
        largest = np.atleast_1d(network.kernel_ranges["conv1"])
        self.assertLen(largest, 6 if per_channel else 1)
        self.assertAllClose(scales, largest / 127)
        steps = steps_apart(network, TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS)

    @parameterized.parameters(
        (BitWidths(), MAX_STEPS),
        (BitWidths(per_channel=False), MAX_STEPS),
        (BitWidths(8, 16), MAX_STEPS_INT16),
    )
    def test_channel_whose_kernel_vanished_keeps_its_bias(self, widths, limit):
        # Weight decay shrinks the kernels of dead channels to almost nothing. In
        # steps of their tiny scale the bias would not fit into 32 bits.
        keras.utils.set_random_seed(0)
        image = x = layers.Input((8, 8, 3))
        for name in ("first", "second"):
            x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(name=name)(x))
        model = model_of(image, x)
        for name in ("first", "second"):
            batch_norm = model.get_layer(name)
            gamma, beta, *rest = batch_norm.get_weights()
            gamma[:3] = 1e-6, 1e-9, 1e-12
            beta[:3] = 1.0
            batch_norm.set_weights([gamma, beta, *rest])
        network = network_of(described(model), widths)
        tflite = TFLiteClassifier(proof.convert(network))
        self.assertLessEqual(steps_apart(network, tflite).max(), limit)

    @parameterized.parameters(layers.MaxPooling2D, layers.AveragePooling2D)
    def test_relu_behind_a_pooling(self, pooling):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(8, 3, padding="same")(image)
        network = network_of(classifier_of(image, layers.ReLU()(pooling()(x))))
        tflite = TFLiteClassifier(proof.convert(network))
        self.assertLessEqual(steps_apart(network, tflite).max(), MAX_STEPS)

    @parameterized.parameters(*MEETING)
    def test_what_meets_with_grids_of_its_own(self, name):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        branches = MEETING[name](wide(image))
        if not isinstance(branches, list):
            branches = [branches, layers.MaxPooling2D()(wide(image, "relu"))]
        if branches[0].shape[1:] != branches[1].shape[1:]:
            branches = [layers.Flatten()(branch) for branch in branches]
        classifier = classifier_of(image, layers.Concatenate()(branches))
        network = network_of(classifier)
        images = networks.images((8, 8, 3), 200, seed=2)
        tflite = TFLiteClassifier(proof.convert(network, images))
        scores = tflite.scores(images)
        # XNNPACK rescales what is to be concatenated by factors of 8 bits.
        steps = np.round((scores - network.scores(images)) / tflite.output_scale)
        self.assertLessEqual(np.abs(steps).max(), 3)
        self.assertGreater(agreement(scores, classifier.scores(images)), 0.85)

    @parameterized.parameters("tanh", "relu", "sigmoid")
    def test_ends_of_the_network(self, head):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.GlobalAveragePooling2D()(wide(image, "relu"))
        model = keras.Model(image, layers.Dense(4, head)(x))
        output = "sigmoid" if head == "sigmoid" else "logits"
        fed = ModelDescription((120.0,), (1 / 64,), output, tuple("abcd"))
        classifier = as_classifier(Learner(model, fed))
        network = network_of(classifier)
        images = networks.images((8, 8, 3), 200, seed=2)
        tflite = TFLiteClassifier(proof.convert(network, images, LOGITS))
        scores, steps = tflite.scores(images), steps_apart(network, tflite)
        self.assertLessEqual(steps.max(), MAX_STEPS)
        if head == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
        expected = classifier.scores(images)
        self.assertLess(np.abs(scores - expected).max(), 0.05 * np.ptp(expected))

    def test_averages_of_16_bits_up_to_what_their_sum_holds(self):
        sketch = Sketch((256, 256, 1))
        sketch.conv("conv", size=1, outputs=2)
        sketch("global_average_pool", "mean")
        sketch.dense("logits", outputs=3)
        network = sketch.classifier()
        images = np.full((2, 256, 256, 1), 255, np.uint8)
        images[1] = 0  # all pixels the highest, or the lowest
        quantized = post_training(network, images, BitWidths(8, 16))
        tflite = TFLiteClassifier(proof.convert(quantized, images))
        scores = tflite.scores(images)
        self.assertGreater(np.abs(scores).max(), 0.1)
        self.assertAllClose(scores, network.scores(images), atol=0.01)

    def test_average_over_the_whole_image_has_a_scale_of_its_own(self):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.AveragePooling2D(8)(wide(image, "relu"))
        network = network_of(classifier_of(image, x))
        content = proof.convert(network)
        self.assertIn("MEAN", [name for name, *_ in operators_of(content)])
        tflite = TFLiteClassifier(content)
        self.assertLessEqual(steps_apart(network, tflite).max(), MAX_STEPS)

    def test_images_may_be_given(self):
        network = shared(networks.build, "padded_pooling")
        images = networks.images(network.classifier.image_shape, 3, seed=3)
        with mock.patch.object(proof, "_prove", wraps=proof._prove) as proved:
            content = proof.convert(network, images)
        self.assertEqual(content, proof.convert(network))
        _, _, seen, _ = proved.call_args.args
        self.assertAllEqual(seen[:3], images)
        self.assertGreater(len(seen), 3)
        with self.assertRaisesRegex(ModelError, "the images are .* each, but the"):
            proof.convert(network, images[:, 1:])


class ProofTest(tf.test.TestCase, parameterized.TestCase):
    """Files that do something else than their network."""

    def damaged(self, network, name, factor, role="kernel"):
        """The file of a network one of whose layers has other weights."""
        weight = network.graph.nodes[name].weights[role]
        return writer.write(network.with_weights({name: {role: factor * weight}}))

    @parameterized.product(
        name=("conv1", "conv2", "logits"),
        widths=(BitWidths(), BitWidths(4, 4, True, 4, 4, 4), BitWidths(8, 16)),
    )
    def test_names_the_first_layer_that_computes_something_else(self, name, widths):
        network = shared(helpers.small_classifier, widths=widths)
        content = self.damaged(network, name, -1.0)
        stored = {"conv1": "relu1", "conv2": "relu2"}.get(name, name)
        kind = "dense" if name == "logits" else "relu"
        with (
            mock.patch.object(writer, "write", lambda *_: content),
            self.assertRaisesRegex(
                ExportError,
                r"up to \d+ steps of its output away from the network that it was made "
                rf"of: layer {stored} \({kind}\) is the first to compute something "
                r"else, by up to \d+ steps",
            ),
        ):
            proof.convert(network)

    def test_names_the_layer_by_its_difference(self):
        network = shared(helpers.small_classifier)
        grid = network.grid("relu1")
        shifted = network.graph.nodes["conv1"].weights["bias"] + 40 * grid.scale[0]
        content = writer.write(network.with_weights({"conv1": {"bias": shifted}}))
        images = networks.images((8, 8, 3), 4)
        differences = proof.layer_differences(network, content, images)
        self.assertEqual(
            list(differences), ["pixels", "relu1", "relu2", "pool", "logits"]
        )
        self.assertBetween(differences.pop("relu1"), 39, 41)
        self.assertLessEqual(max(differences.values()), 1)

    @parameterized.parameters("mobilenet_v3_like", "densenet_like", "bn_first")
    @pytest.mark.long
    def test_roundings_that_a_network_spreads_are_no_fault(self, name):
        # With 4 bits, one value that falls on the other side moves all behind it.
        network = shared(networks.build, name, widths=BitWidths(4, 4, True, 4, 4, 4))
        # int4 convolutions, of which LiteRT rounds the sums twice.
        content = proof.convert(network, config=FileConfig(favor="size"))
        images = networks.images(network.classifier.image_shape, 50, seed=2)
        self.assertGreater(proof.largest_difference(network, content, images), 3)
        differences = proof.layer_differences(network, content, images[:8])
        self.assertLessEqual(max(differences.values()), 1)

    @parameterized.parameters(
        (100, 10, 10 + 16), (10**9, 10, 3 + 3), (10**12, 3, 1 + 1)
    )
    def test_large_networks_are_run_on_few_images(self, macs, given, most):
        network = network_of(helpers.small_classifier())
        dense = dataclasses.replace(KINDS["dense"], macs=lambda node: macs)
        images = networks.images((8, 8, 3), given)
        with mock.patch.dict(KINDS, {"dense": dense}):
            run = proof._images(network, images)
        self.assertLen(run, most)
        self.assertEqual(run.dtype, np.uint8)
        self.assertAllEqual(run[0], images[0])


class CheckIntegerOnlyTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("float", "dynamic range")
    def test_names_the_float_tensor(self, kind):
        image = layers.Input((8, 8, 1))
        x = layers.Flatten()(layers.Conv2D(4, 3)(image))
        # A kernel so large that the converter gives it 8 bits.
        model = keras.Model(image, layers.Dense(10)(x))
        converter = tf.lite.TFLiteConverter.from_keras_model(model)
        if kind == "dynamic range":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        with self.assertRaisesRegex(
            ExportError, r"tensor \S.* of the TFLite file is float32, not an integer"
        ):
            proof.check_integer_only(converter.convert())

    def test_refuses_a_dequantization(self):
        @tf.function(input_signature=[tf.TensorSpec((1, 4, 4, 1), tf.float32)])
        def half_float(x):
            x = tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.0)
            return tf.math.sin(tf.nn.max_pool2d(x, 2, 2, "VALID"))

        with self.assertRaisesRegex(ExportError, "float32, not an integer"):
            proof.check_integer_only(_converted(half_float))

    def test_names_a_requantization_inside(self):
        @tf.function(input_signature=[tf.TensorSpec((1, 4, 4, 1), tf.float32)])
        def two_ranges(x):
            x = tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.0)
            x = tf.quantization.fake_quant_with_min_max_args(x + x, -2.0, 2.0)
            x = tf.nn.max_pool2d(x, 2, 2, "VALID")
            return tf.quantization.fake_quant_with_min_max_args(x, -3.0, 3.0)

        content = _converted(two_ranges)
        _, _, tensors = details_of(content)
        self.assertNotIn(np.float32, [t["dtype"] for t in tensors])
        with self.assertRaisesRegex(ExportError, "has a QUANTIZE inside its graph"):
            proof.check_integer_only(content)

    @parameterized.parameters("concatenated", "pooled", "int16")
    def test_pixels_may_be_requantized(self, kind):
        keras.utils.set_random_seed(0)
        image = pixels = layers.Input((8, 8, 3))
        widths = BitWidths(8, 16) if kind == "int16" else BitWidths()
        if kind == "pooled":
            pixels = layers.MaxPooling2D()(image)
        x = layers.Conv2D(4, 3, padding="same")(pixels)
        if kind != "int16":
            x = layers.Concatenate()([pixels, x])
        network = network_of(classifier_of(image, x), widths)
        content = writer.write(network)
        names = [name for name, _, _ in operators_of(content)]
        is_wide = kind == "int16"  # from uint8 by way of int8
        self.assertEqual(names.count("QUANTIZE"), 1 + is_wide)
        self.assertEqual(names.count("MUL"), 0 if is_wide else 1)
        proof.check_integer_only(content)

    @parameterized.parameters("W8A8", "W8A4")
    def test_other_grids_hold_what_the_student_has(self, widths):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
        y = layers.Conv2D(4, 3, padding="same", activation="tanh")(image)
        x = layers.Conv2D(4, 3)(layers.Concatenate()([x, y]))
        network = network_of(classifier_of(image, x), parse_widths(widths))
        content = writer.write(network)
        images = networks.images(network.classifier.image_shape, 64, seed=2)
        self.assertEqual(proof.largest_difference(network, content, images), 0)

    @parameterized.parameters(b"", b"not a model", b"\0" * 1000)
    def test_refuses_garbage(self, content):
        with self.assertRaisesRegex(ExportError, "not a TFLite model that LiteRT"):
            proof.check_integer_only(content)
        with self.assertRaisesRegex(ExportError, "not a TFLite model that LiteRT"):
            TFLiteClassifier(content)


class LargestDifferenceTest(tf.test.TestCase):
    def test_counts_steps_of_the_logits(self):
        network = shared(networks.build, "padded_pooling")
        tflite = TFLiteClassifier(proof.convert(network, config=LOGITS))
        content = proof.convert(network)  # gives probabilities
        images = networks.images(tflite.image_shape, 3)
        difference = proof.largest_difference(network, content, images)
        self.assertLessEqual(difference, MAX_STEPS)
        scale, name = tflite.output_scale, network.graph.output
        bias = network.graph.nodes[name].weights["bias"]
        moved = bias + 10 * scale * np.eye(networks.NUM_CLASSES)[1]
        network = network.with_weights({name: {"bias": moved}})
        apart = np.abs(network.scores(images) - tflite.scores(images)).max() / scale
        self.assertGreater(apart, 3)
        self.assertEqual(
            proof.largest_difference(network, content, images), round(float(apart))
        )


def _converted(function):
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()]
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.int8
    return converter.convert()


if __name__ == "__main__":
    tf.test.main()
