"""What a file takes and gives, against NumPy and the file of the bare network."""

import dataclasses
import functools
import itertools
from unittest import mock

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import interpreter as litert

from dfq_tf import api
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, ExportError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import student
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.reports import layer_noise
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite import metadata, proof, writer
from dfq_tf.tflite.running import TFLiteClassifier
from tests import graphs, helpers

SHAPE, CLASSES = (8, 8, 3), 4
IMAGES = graphs.noise(SHAPE, 40)
A8, A16 = BitWidths(), BitWidths(8, 16)
# LiteRT reads softmax and sigmoid of int16 from tables.
MAX_STEPS = {A8: 1, A16: 8}


# Arguments of `quantized`, among those of `network`.
KEYS = {"num_classes", "mean"}


@functools.cache
def quantized(widths=A8, num_classes=CLASSES, mean=120.0):
    small = helpers.small_classifier(SHAPE, num_classes)
    said = dataclasses.replace(
        small.description, input_mean=(mean,), input_scale=(1 / 20,)
    )
    classifier = Classifier(small.graph, said)
    return post_training(float_network(classifier), IMAGES, widths)


def network(probabilities=None, widths=A8, **changes):
    """A network of a model with such an end."""
    made = quantized(widths, **{k: changes.pop(k) for k in set(changes) & KEYS})
    said = dataclasses.replace(made.description, probabilities=probabilities, **changes)
    classifier = dataclasses.replace(made.classifier, description=said)
    return dataclasses.replace(made, classifier=classifier)


def run(content, images=IMAGES):
    """What a file gives for what it is fed with, and LiteRT's details of its ends."""
    interpreter = litert.Interpreter(model_content=content)
    interpreter.allocate_tensors()
    (image,) = interpreter.get_input_details()
    (output,) = interpreter.get_output_details()
    found = []
    for pixels in images:
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(output["index"])[0])
    return np.array(found), image, output


def operators(content):
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(
        model_content=content, experimental_op_resolver_type=resolver
    )
    return [each["op_name"] for each in interpreter._get_ops_details()]


def logits_of(made):
    """Integers of the bare network's file, and what they mean in float64."""
    integers, _, output = run(writer.write(made))
    scale, zero_point = output["quantization"]
    return integers, scale * (integers.astype(np.float64) - zero_point)


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


class ProbabilitiesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(end=("softmax", "sigmoid"), widths=(A8, A16))
    def test_are_what_the_model_gave(self, end, widths):
        made = network(end, widths)
        content = proof.convert(made, IMAGES)
        integers, image, output = run(content)
        self.assertEqual(image["dtype"], np.uint8)
        dtype, scale = (np.uint8, 256) if widths is A8 else (np.int16, 32768)
        self.assertEqual(output["dtype"], dtype)
        self.assertEqual(output["quantization"], (1 / scale, 0))
        _, logits = logits_of(made)
        expected = {"softmax": softmax, "sigmoid": sigmoid}[end](logits)
        self.assertGreater(np.ptp(expected), 0.2)
        expected = np.minimum(np.rint(scale * expected), scale - 1)
        steps = np.abs(integers.astype(int) - expected).max()
        self.assertLessEqual(steps, MAX_STEPS[widths])
        if end == "softmax":
            sums = integers.astype(int).sum(-1)
            self.assertLessEqual(np.abs(sums - scale).max(), CLASSES)

    def test_sixteen_bits_of_many_classes(self):
        # LiteRT's table takes unlikely classes for likelier than they are.
        made = network("softmax", A16, num_classes=100)
        dense = made.graph.last
        kernel = 20 * dense.weights["kernel"]
        loud = made.classifier.graph.with_weights({dense.name: {"kernel": kernel}})
        classifier = dataclasses.replace(made.classifier, graph=loud)
        made = post_training(classifier, IMAGES, A16)
        for output_type, scale, most in (("auto", 2**15, 200), ("uint8", 256, 2)):
            config = FileConfig(output_type=output_type)
            integers, _, _ = run(proof.convert(made, IMAGES, config))
            expected = scale * softmax(logits_of(made)[1])
            self.assertGreater(np.ptp(expected), 0.9 * scale)
            self.assertLess(np.abs(integers - expected).max(), most)

    def test_one_score_stays_one(self):
        made = network("score", num_classes=2, class_names=("0", "1"))
        content = proof.convert(made, IMAGES)
        integers, _, output = run(content)
        self.assertAllEqual(output["shape"], (1, 1))
        _, logits = logits_of(made)
        expected = 256 * sigmoid(logits[:, 1:] - logits[:, :1])
        self.assertGreater(np.ptp(expected), 20)
        self.assertLessEqual(np.abs(integers - expected).max(), 1.5)
        tflite = TFLiteClassifier(content)
        # Apps find the one label in the file; scores have a column for each class.
        self.assertEqual(metadata.read(content).class_names, ("1",))
        self.assertEqual((tflite.num_classes, tflite.class_names), (2, ("0", "1")))
        scores = tflite.scores(IMAGES)
        self.assertAllClose(scores[:, 1:], integers / 256)
        self.assertAllClose(scores.sum(-1), np.ones(len(IMAGES)))

    def test_one_score_of_two_named_classes_becomes_two(self):
        made = network("score", num_classes=2, class_names=("cat", "dog"))
        content = proof.convert(made, IMAGES)
        integers, _, _ = run(content)
        self.assertAllClose(integers / 256, softmax(logits_of(made)[1]), atol=1 / 256)
        self.assertEqual(TFLiteClassifier(content).class_names, ("cat", "dog"))

    def test_are_a_softmax_where_nobody_says_otherwise(self):
        made = network()
        content = proof.convert(made, IMAGES, FileConfig("probabilities"))
        integers, _, _ = run(content)
        self.assertAllClose(integers / 256, softmax(logits_of(made)[1]), atol=2 / 256)

    def test_takes_any_batch(self):
        content = proof.convert(
            network("score", num_classes=2, class_names=("0", "1")), IMAGES
        )
        interpreter = litert.Interpreter(model_content=content)
        (image,) = interpreter.get_input_details()
        interpreter.resize_tensor_input(image["index"], (len(IMAGES), *SHAPE))
        interpreter.allocate_tensors()
        interpreter.set_tensor(image["index"], IMAGES)
        interpreter.invoke()
        (output,) = interpreter.get_output_details()
        together = interpreter.get_tensor(output["index"])
        self.assertAllEqual(together, run(content)[0])

    def test_signature_names_what_is_given(self):
        for config, name in (
            (FileConfig(), "probabilities"),
            (FileConfig("logits"), "logits"),
        ):
            content = proof.convert(network("softmax"), IMAGES, config)
            interpreter = litert.Interpreter(model_content=content)
            self.assertEqual(
                interpreter.get_signature_list()["serving_default"],
                {"inputs": ["image"], "outputs": [name]},
            )


class LogitsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((None, "auto"), ("softmax", "logits"))
    def test_are_those_of_the_network_in_uint8(self, end, file_output):
        made = network(end)
        config = FileConfig(file_output)
        integers, _, output = run(proof.convert(made, IMAGES, config))
        logits, _ = logits_of(made)
        self.assertEqual(output["dtype"], np.uint8)
        self.assertAllEqual(integers, logits.astype(int) + 128)
        scale, zero_point = run(writer.write(made))[2]["quantization"]
        self.assertEqual(output["quantization"], (scale, zero_point + 128))

    @parameterized.parameters(A8, A16)
    def test_in_other_types(self, widths):
        made = network(None, widths)
        logits, values = logits_of(made)
        bare = operators(writer.write(made))
        for output_type, more in (("float32", ["DEQUANTIZE"]), ("int8", [])):
            config = FileConfig(output_type=output_type)
            content = proof.convert(made, IMAGES, config)
            found, _, output = run(content)
            self.assertEqual(output["dtype"], np.dtype(output_type))
            more = ["QUANTIZE"] if widths is A16 and output_type == "int8" else more
            self.assertEqual(operators(content), [*bare, *more])
            if output_type == "float32":
                self.assertAllEqual(found, values.astype(np.float32))
            elif widths is A8:
                self.assertAllEqual(found, logits)
            scores = TFLiteClassifier(content).scores(IMAGES)
            step = output["quantization"][0]
            self.assertLessEqual(np.abs(scores - values).max(), step + 1e-6)

    def test_sixteen_bits_in_uint8_go_by_int8(self):
        made = network(None, A16)
        content = proof.convert(made, IMAGES, FileConfig(output_type="uint8"))
        self.assertEqual(operators(content)[-2:], ["QUANTIZE", "QUANTIZE"])
        found, _, output = run(content)
        scale, zero_point = output["quantization"]
        values = scale * (found.astype(np.float64) - zero_point)
        self.assertLessEqual(np.abs(values - logits_of(made)[1]).max(), scale)


class InputTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        input_type=("int8", "float32"), mean=(120.0, 125.3), widths=(A8, A16)
    )
    def test_other_types_of_the_same_pixels(self, input_type, mean, widths):
        made = network("softmax", widths, mean=mean)
        expected, _, _ = run(proof.convert(made, IMAGES))
        content = proof.convert(made, IMAGES, FileConfig(input_type=input_type))
        fed = (IMAGES.astype(int) - 128).astype(np.int8)
        if input_type == "float32":
            # Any other normalisation than one whole number happens in the file.
            of_file, scale = (120.0, 1 / 20) if mean == 120 else (0.0, 1.0)
            fed = ((IMAGES - of_file) * scale).astype(np.float32)
        found, image, _ = run(content, fed)
        self.assertEqual(image["dtype"], np.dtype(input_type))
        self.assertAllEqual(found, expected)
        one = TFLiteClassifier(proof.convert(made, IMAGES)).scores(IMAGES)
        self.assertAllEqual(TFLiteClassifier(content).scores(IMAGES), one)
        head = operators(content).index(
            "CONV_2D" if mean == 120 else "DEPTHWISE_CONV_2D"
        )
        self.assertEqual(head, 0 if (input_type, widths) == ("int8", A8) else 1)

    def test_noise_of_the_layers_is_the_same(self):
        made = network("softmax")
        noise = [
            layer_noise.measure(
                made.classifier,
                proof.convert(made, IMAGES, FileConfig(input_type=input_type)),
                IMAGES[:8],
            )
            for input_type in ("uint8", "int8", "float32")
        ]
        self.assertEqual([layer.name for layer in noise[0]][-1], "logits")
        self.assertEqual(noise[1], noise[0])
        self.assertEqual(noise[2], noise[0])


class ProofTest(tf.test.TestCase, parameterized.TestCase):
    def test_other_operators_than_asked_for_are_found(self):
        content = writer.write(network("sigmoid"), FileConfig())
        with (
            mock.patch.object(writer, "write", lambda *_: content),
            self.assertRaisesRegex(ExportError, "has a QUANTIZE inside its graph"),
        ):
            proof.convert(network("softmax"), IMAGES)

    @parameterized.parameters(
        ("softmax", r"gives probabilities up to \d+ steps away .* SOFTMAX, QUANTIZE m"),
        (
            None,
            "gives logits up to 1 steps away from what QUANTIZE makes of its logits",
        ),
    )
    def test_an_end_that_computes_something_else_is_found(self, end, message):
        def other(logits, ends):
            if end == "softmax":
                return exact(3 * logits, ends)
            return exact(logits, ends) + ends.grid.scale  # a change of type is exact

        exact = proof.answers
        with (
            mock.patch.object(proof, "answers", other),
            self.assertRaisesRegex(ExportError, message),
        ):
            proof.convert(network(end), IMAGES)

    @parameterized.parameters("input_type", "output_type")
    def test_floats_at_an_end_must_be_asked_for(self, end):
        config = FileConfig(**{end: "float32"})
        content = writer.write(network("softmax"), config)
        with (
            mock.patch.object(writer, "write", lambda *_: content),
            self.assertRaisesRegex(ExportError, "is float32, not an integer"),
        ):
            proof.convert(network("softmax"), IMAGES)

    def test_every_pair_of_types_is_written(self):
        for types in itertools.product(
            ("uint8", "int8", "float32"), ("uint8", "int8", "float32")
        ):
            config = FileConfig("auto", *types)
            _, image, output = run(
                proof.convert(network("softmax"), IMAGES, config), ()
            )
            self.assertEqual(
                [np.dtype(each["dtype"]).name for each in (image, output)], [*types]
            )


class KnownEndsTest(tf.test.TestCase, parameterized.TestCase):
    """What a model ended with is known until its file is written."""

    @parameterized.parameters(
        (4, "softmax", "softmax"), (4, "sigmoid", "sigmoid"), (4, None, None),
        (1, "sigmoid", "score"), (1, None, None),
    )  # fmt: skip
    def test_of_a_model_and_its_student(self, units, activation, expected):
        image = keras.layers.Input(SHAPE)
        x = keras.layers.Flatten()(image)
        x = keras.layers.Dense(units, activation=activation)(x)
        classifier = as_classifier(
            keras.Model(image, x),
            input_mean=120,
            input_scale=1 / 20,
            output=activation or "logits",
        )
        self.assertEqual(classifier.description.probabilities, expected)
        made = post_training(float_network(classifier), IMAGES)
        self.assertEqual(made.description.output, "logits")
        self.assertEqual(made.description.probabilities, expected)
        path = helpers.new_folder() / "student.keras"
        student.save(made, path)
        said = type(made.description).load(path.with_suffix(".json"))
        self.assertEqual(said.probabilities, expected)
        _, _, output = run(proof.convert(made, IMAGES), ())
        outputs = {"score": 1}.get(expected, max(2, units))
        self.assertAllEqual(output["shape"], (1, outputs))

    @parameterized.parameters("sigmoid", "score")
    def test_one_logit_is_a_score_in_either_word(self, said):
        image = keras.layers.Input(SHAPE)
        model = keras.Model(image, keras.layers.Dense(1)(keras.layers.Flatten()(image)))
        kernel = np.zeros((192, 1))
        kernel[0] = 1
        model.set_weights([kernel, np.zeros(1)])
        path = helpers.new_folder() / "model.keras"
        model.save(path)
        description = dataclasses.replace(
            helpers.description(2),
            input_scale=(1 / 20,),
            class_names=("0", "1"),
            probabilities=said,
        )
        description.save(path.with_suffix(".json"))
        classifier = as_classifier(path)
        self.assertEqual(classifier.description.probabilities, "score")
        self.assertTrue(classifier.description.is_exclusive)
        made = post_training(float_network(classifier), IMAGES)
        pixels = np.full((1, *SHAPE), 120, np.uint8)
        pixels[0, 0, 0, 0] = 160  # the logit is (160 - 120) / 20
        integers, _, _ = run(proof.convert(made, IMAGES), pixels)
        self.assertAllClose(integers / 256, [[0.8808]], atol=0.02)

    def test_a_student_that_learns_from_it_has_its_end(self):
        learner = helpers.small_learner(SHAPE)
        softmax = keras.layers.Softmax()(learner.model.output)
        model = keras.Model(learner.model.input, softmax)
        teacher = helpers.classifier(model, "softmax")
        for student_of in (learner, learner.model):
            learnt = api._learner(student_of, teacher)
            self.assertEqual(learnt.description.output, "logits")
            self.assertEqual(learnt.description.probabilities, "softmax")
        again = as_classifier(api._learner(learner, teacher))
        self.assertEqual(again.description.probabilities, "softmax")

    def test_one_name_for_one_score_is_refused(self):
        image = keras.layers.Input(SHAPE)
        x = keras.layers.Dense(1, "sigmoid")(keras.layers.Flatten()(image))
        with self.assertRaisesRegex(
            ConfigError,
            "class_names has one name, 'cat', but a model of one score has two .* or "
            r'none; for none, write \["0", "1"\] in a .json beside the model$',
        ):
            as_classifier(
                keras.Model(image, x),
                input_mean=0,
                input_scale=1,
                class_names=("cat",),
            )


if __name__ == "__main__":
    tf.test.main()
