import dataclasses
import itertools
from unittest import mock

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ExportError, ModelError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.quantization import apply, calibration
from dfq_tf.quantization.integers import round_biases
from dfq_tf.settings import BitWidths, CalibrationConfig
from dfq_tf.tflite import export
from tests import helpers, networks

layers = keras.layers

# Student and file round the same numbers, one in float32, one in integers; where a
# number lies just between two integers they may part, and later layers spread that.
# Measured on these images: 0 steps, but for the networks below.
MAX_STEPS = 1
# Ten layers (measured: 2 in 1 % of the outputs), and a leaky ReLU, whose slope XNNPACK
# holds in 8 bits (1 to 2). An average, which the file rounds and the student does not,
# is the third (2), and the products behind sigmoids the fourth (2).
MAX_STEPS_OF = dict.fromkeys(
    ("wrn_10_1", "bn_first", "densenet_like", "padded_pooling", "mobilenet_v3_like"), 3
)
# The one step of int16 is 1/256 of that of int8.
MAX_STEPS_INT16 = 8


def student_of(classifier, widths=BitWidths(), config=CalibrationConfig()):
    images = networks.images(classifier.image_shape, 64, seed=1)
    graph, description = apply.integer_ready(classifier)
    ranges = calibration.calibrate(graph, description, images, widths, config)
    student = apply.quantize_graph(
        graph, description, widths, ranges, config.weight_range
    )
    round_biases(student.model)
    return student


def steps_apart(student, tflite):
    """Differences of all outputs on 200 images, in integer steps of the output."""
    images = networks.images(student.image_shape, 200, seed=2)
    difference = np.abs(student.scores(images) - tflite.scores(images))
    return np.round(difference / tflite.output_scale)


def classifier_of(image, x, output="logits"):
    x = layers.Dense(networks.NUM_CLASSES)(layers.Flatten()(x))
    model = keras.Model(image, x)
    networks.randomize(model, 0)
    names = tuple("abcde")
    return Classifier(model, ModelDescription((120.0,), (1 / 64,), output, names))


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
    @parameterized.parameters(*networks.NETWORKS)
    def test_file_is_integer_and_agrees_with_the_student(self, name):
        student = student_of(networks.build(name))
        content = export.convert(student)
        image, output, tensors = details_of(content)
        self.assertEqual(image["dtype"], np.uint8)
        self.assertAllEqual(image["shape"], (1, *student.image_shape))
        # (pixel - 120) / 64 is what the description says.
        self.assertEqual(image["quantization"], (1 / 64, 120))
        self.assertEqual(output["dtype"], np.int8)
        self.assertAllEqual(output["shape"], (1, networks.NUM_CLASSES))
        for tensor in tensors:
            self.assertEqual(np.dtype(tensor["dtype"]).kind in "iu", True, tensor)
        steps = steps_apart(student, export.TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS_OF.get(name, MAX_STEPS))
        self.assertLess(steps.mean(), 0.6 if name in MAX_STEPS_OF else 0.01)

    def test_sixteen_bit_activations_give_sixteen_bit_logits(self):
        student = student_of(networks.build("resnet_like"), BitWidths(8, 16))
        content = export.convert(student)
        image, output, tensors = details_of(content)
        self.assertEqual(image["dtype"], np.uint8)
        self.assertEqual(image["quantization"], (1 / 64, 120))
        self.assertEqual(output["dtype"], np.int16)
        (scale,) = output["quantization_parameters"]["scales"]
        steps = steps_apart(student, export.TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS_INT16)
        # The same logits as with 8 bits, on a finer grid.
        coarse = student_of(networks.build("resnet_like"))
        _, output, _ = details_of(export.convert(coarse))
        self.assertLess(scale, output["quantization"][0] / 100)

    @parameterized.parameters(
        dict(input_mean=(125.3,), input_scale=(1 / 50,)),
        dict(input_mean=(123.7, 116.3, 103.5), input_scale=(0.017, 0.0175, 0.02)),
    )
    def test_other_normalisations_happen_inside_the_file(self, **fields):
        small = helpers.small_classifier()
        description = dataclasses.replace(small.description, **fields)
        student = student_of(Classifier(small.model, description))
        content = export.convert(student)
        image, _, _ = details_of(content)
        self.assertEqual(image["quantization"], (1.0, 0))
        steps = steps_apart(student, export.TFLiteClassifier(content))
        self.assertLessEqual(steps.max(), MAX_STEPS)

    @parameterized.parameters(False, True)
    def test_kernels_have_the_scales_of_the_student(self, per_channel):
        widths = BitWidths(per_channel=per_channel)
        student = student_of(helpers.small_classifier(), widths)
        content = export.convert(student)
        _, _, tensors = details_of(content)
        (scales,) = (
            tensor["quantization_parameters"]["scales"]
            for tensor in tensors
            if tuple(tensor["shape"]) == (6, 3, 3, 3)
        )
        variables = apply.range_variables(student.model.get_layer("quant_conv1"))
        largest = np.atleast_1d(variables["kernel_max"].numpy())
        self.assertLen(largest, 6 if per_channel else 1)
        self.assertAllClose(scales, largest / 127)
        steps = steps_apart(student, export.TFLiteClassifier(content))
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
        classifier = classifier_of(image, x)
        for name in ("first", "second"):
            batch_norm = classifier.model.get_layer(name)
            gamma, beta, *rest = batch_norm.get_weights()
            gamma[:3] = 1e-6, 1e-9, 1e-12
            beta[:3] = 1.0
            batch_norm.set_weights([gamma, beta, *rest])
        student = student_of(classifier, widths)
        tflite = export.TFLiteClassifier(export.convert(student))
        self.assertLessEqual(steps_apart(student, tflite).max(), limit)

    @parameterized.parameters(layers.MaxPooling2D, layers.AveragePooling2D)
    def test_relu_behind_a_pooling(self, pooling):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(8, 3, padding="same")(image)
        student = student_of(classifier_of(image, layers.ReLU()(pooling()(x))))
        tflite = export.TFLiteClassifier(export.convert(student))
        # The student does not round averages, the file does.
        limit = MAX_STEPS if pooling is layers.MaxPooling2D else 3
        self.assertLessEqual(steps_apart(student, tflite).max(), limit)

    def test_refuses_a_float_model(self):
        with self.assertRaisesRegex(ModelError, "without fake quantization"):
            export.convert(networks.build("padded_pooling"))


class CheckIntegerOnlyTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("float", "dynamic range")
    def test_names_the_float_tensor(self, kind):
        converter = tf.lite.TFLiteConverter.from_keras_model(
            networks.build("padded_pooling").model
        )
        if kind == "dynamic range":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        with self.assertRaisesRegex(
            ExportError, r"tensor \S.* of the TFLite file is float32, not an integer"
        ):
            export.check_integer_only(converter.convert())

    def test_refuses_a_dequantization(self):
        @tf.function(input_signature=[tf.TensorSpec((1, 4, 4, 1), tf.float32)])
        def half_float(x):
            x = tf.quantization.fake_quant_with_min_max_args(x, -1.0, 1.0)
            return tf.math.sin(tf.nn.max_pool2d(x, 2, 2, "VALID"))

        with self.assertRaisesRegex(ExportError, "float32, not an integer"):
            export.check_integer_only(_converted(half_float))

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
            export.check_integer_only(content)

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
        content = export.convert(student_of(classifier_of(image, x), widths))
        names = [name for name, _, _ in operators_of(content)]
        self.assertEqual(names.count("QUANTIZE"), 2)
        export.check_integer_only(content)

    @parameterized.parameters(b"", b"not a model", b"\0" * 1000)
    def test_refuses_garbage(self, content):
        with self.assertRaisesRegex(ExportError, "not a TFLite model that LiteRT"):
            export.check_integer_only(content)
        with self.assertRaisesRegex(ExportError, "not a TFLite model that LiteRT"):
            export.TFLiteClassifier(content)


class TFLiteClassifierTest(tf.test.TestCase):
    def test_refuses_a_float_input(self):
        converter = tf.lite.TFLiteConverter.from_keras_model(
            networks.build("padded_pooling").model
        )
        with self.assertRaisesRegex(ExportError, "input is float32 .*must be uint8"):
            export.TFLiteClassifier(converter.convert())

    def test_latency_is_the_median_in_milliseconds(self):
        content = export.convert(student_of(networks.build("padded_pooling")))
        tflite = export.TFLiteClassifier(content)
        self.assertGreater(tflite.latency(runs=5), 0.0)
        # A clock by which the runs take 1 to 10 ms, and the one before them 9 s.
        ticks = itertools.chain(
            [0.0, 9.0], *([i, i + (i + 1) / 1000] for i in range(10))
        )
        with mock.patch.object(export.time, "perf_counter", lambda: next(ticks)):
            self.assertAllClose(tflite.latency(runs=10), 5.5)
        self.assertRaises(StopIteration, lambda: next(ticks))

    def test_one_piece_where_xnnpack_has_all_operators(self):
        classifier = networks.build("resnet_like")
        pieces = [
            export.TFLiteClassifier(
                export.convert(student_of(classifier, widths))
            ).num_pieces
            for widths in (BitWidths(), BitWidths(4), BitWidths(8, 16))
        ]
        # Kernels of 4 bits break it up; nothing of 16 bits is taken over.
        self.assertEqual(pieces[0], 1)
        self.assertGreater(pieces[1], 1)
        self.assertEqual(pieces[2], 0)

    def test_scores_are_the_dequantized_integers(self):
        student = student_of(networks.build("padded_pooling"))
        content = export.convert(student)
        tflite = export.TFLiteClassifier(content)
        self.assertEqual(tflite.image_shape, (8, 8, 1))
        self.assertEqual(tflite.num_classes, networks.NUM_CLASSES)
        images = networks.images(tflite.image_shape, 3)
        interpreter = litert.Interpreter(model_content=content)
        interpreter.allocate_tensors()
        image, output, _ = details_of(content)
        scale, zero_point = output["quantization"]
        self.assertEqual(tflite.output_scale, scale)
        scores = tflite.scores(images)
        for pixels, row in zip(images, scores):
            interpreter.set_tensor(image["index"], pixels[None])
            interpreter.invoke()
            integers = interpreter.get_tensor(output["index"])[0].astype(int)
            self.assertAllClose(row, (integers - zero_point) * scale)
        # The same numbers as the student's, and counted as apart where they are not.
        limit = MAX_STEPS_OF["padded_pooling"]
        self.assertLessEqual(export.largest_difference(student, tflite, images), limit)
        bias = student.model.layers[-2].layer.bias
        bias.assign(bias + 10 * scale * np.eye(networks.NUM_CLASSES)[1])
        apart = np.abs(student.scores(images) - scores).max() / scale
        self.assertGreater(apart, 3)
        self.assertEqual(
            export.largest_difference(student, tflite, images), round(float(apart))
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
