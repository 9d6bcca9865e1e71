import json
import os
import pathlib
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import load_classifier
from dfq_tf.quantization import apply, calibration
from dfq_tf.settings import BitWidths
from dfq_tf.training import memory
from tests import helpers, networks

layers = keras.layers


def student_of(classifier, widths=BitWidths()):
    graph, description = apply.integer_ready(classifier)
    images = networks.images(classifier.image_shape, 32)
    ranges = calibration.calibrate(graph, description, images, widths)
    return apply.quantize_graph(graph, description, widths, ranges)


def take_step(model, images):
    """One step of plain gradient descent on the sum of squared scores."""
    with tf.GradientTape() as tape:
        scores = model(images.astype(np.float32) / 64, training=True)
        loss = tf.reduce_sum(scores**2)
    variables = model.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign_sub(1e-3 * gradient)


class ClassifierTest(tf.test.TestCase, parameterized.TestCase):
    def test_scores_are_the_model_on_normalised_pixels(self):
        classifier = networks.build("resnet_like", mean=(1, 2, 3), scale=(0.1, 0.2, 1))
        images = networks.images(classifier.image_shape, 7)
        inputs = (images - np.array([1, 2, 3])) * np.array([0.1, 0.2, 1])
        expected = classifier.model(inputs.astype(np.float32), training=False)
        scores = classifier.scores(images, batch_size=3)
        self.assertAllClose(scores, expected, rtol=1e-4, atol=1e-4)
        self.assertAllEqual(scores, classifier.scores(images.astype(np.float32), 3))

    def test_a_pass_takes_as_many_images_as_memory_has_room_for(self):
        images = networks.images((8, 8, 3), 300)
        seen = []
        # The largest tensor of the network has 8 x 8 x 6 values.
        for budget, expected in ((4 * 4 * 384 * 70, 70), (2**32, 250), (1, 1)):
            classifier = helpers.small_classifier()
            compiled = classifier._compiled_scores

            def spy(batch, compiled=compiled):
                seen.append(len(batch))
                return compiled(batch)

            spy.graph = compiled.graph
            classifier.__dict__["_compiled_scores"] = spy
            with mock.patch.object(memory, "PASS_MEMORY", budget):
                scores = classifier.scores(images)
            self.assertLen(scores, 300)
            self.assertEqual((max(seen), sum(seen)), (expected, 300))
            seen.clear()

    def test_refuses_several_outputs(self):
        image = layers.Input((8, 8, 3))
        x = layers.Flatten()(image)
        model = keras.Model(image, [layers.Dense(5)(x), layers.Dense(5)(x)])
        with self.assertRaisesRegex(ModelError, "has 1 inputs and 2 outputs; it must"):
            Classifier(model, networks.build("vgg_like").description)

    def test_refuses_an_unknown_size(self):
        image = layers.Input((None, None, 3))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3)(image))
        with self.assertRaisesRegex(
            ModelError, r"input shape is \(None, None, None, 3\).*fixed sizes"
        ):
            Classifier(keras.Model(image, x), networks.build("vgg_like").description)

    def test_refuses_an_output_that_is_no_row(self):
        image = layers.Input((8, 8, 3))
        model = keras.Model(image, layers.Conv2D(5, 3)(image))
        with self.assertRaisesRegex(ModelError, r"output shape is \(None, 6, 6, 5\)"):
            Classifier(model, networks.build("vgg_like").description)

    def test_refuses_a_subclassed_model(self):
        class Subclassed(keras.Model):
            def call(self, inputs):
                return inputs

        with self.assertRaisesRegex(ModelError, "is a .*Subclassed; it must be a func"):
            Classifier(Subclassed(), networks.build("vgg_like").description)

    def test_refuses_a_description_of_another_model(self):
        model = networks.vgg_like()
        description = ModelDescription((0.0,), (1.0,), "logits", ("a", "b"))
        with self.assertRaisesRegex(ConfigError, "2 names for a model with 5 outputs"):
            Classifier(model, description)


class SaveTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.get_temp_dir()) / "model.keras"

    @parameterized.product(
        name=("wrn_10_1", "mobilenet_like"), suffix=(".keras", ".h5")
    )
    def test_float_network_comes_back_bit_for_bit(self, name, suffix):
        classifier = networks.build(name)
        path = self.path.with_suffix(suffix)
        classifier.save(path)
        images = networks.images(classifier.image_shape, 8)
        loaded = load_classifier(path)
        self.assertAllEqual(loaded.scores(images), classifier.scores(images))
        self.assertEqual(loaded.description, classifier.description)

    @parameterized.product(
        name=("mobilenet_like", "densenet_like"), suffix=(".keras", ".h5")
    )
    def test_student_comes_back_bit_for_bit_and_can_be_trained(self, name, suffix):
        student = student_of(networks.build(name))
        path = self.path.with_suffix(suffix)
        student.save(path)
        images = networks.images(student.image_shape, 8)
        loaded = load_classifier(path)
        before = loaded.scores(images)
        self.assertAllEqual(before, student.scores(images))

        self.assertLen(
            loaded.model.trainable_variables, len(student.model.trainable_variables)
        )
        weights = [v.numpy() for v in loaded.model.trainable_variables]
        ranges = [v.numpy() for v in loaded.model.non_trainable_variables]
        take_step(loaded.model, images)
        for variable, value in zip(loaded.model.trainable_variables, weights):
            self.assertNotAllEqual(variable, value)
        for variable, value in zip(loaded.model.non_trainable_variables, ranges):
            self.assertAllEqual(variable, value)
        self.assertNotAllEqual(loaded.scores(images), before)

    @parameterized.parameters((4, 8), (8, 4), (3, 16))
    def test_student_keeps_its_bit_widths(self, weight, activation):
        classifier = networks.build("vgg_like")
        student = student_of(classifier, BitWidths(weight, activation))
        student.save(self.path)
        images = networks.images(student.image_shape, 8)
        scores = load_classifier(self.path).scores(images)
        self.assertAllEqual(scores, student.scores(images))
        self.assertNotAllClose(scores, student_of(classifier).scores(images))

    def test_loaded_student_trains_as_the_saved_one(self):
        student = student_of(networks.build("vgg_like"))
        student.save(self.path)
        loaded = load_classifier(self.path)
        images = networks.images(student.image_shape, 8)
        take_step(student.model, images)
        take_step(loaded.model, images)
        for variable, other in zip(loaded.model.weights, student.model.weights):
            self.assertAllClose(variable, other, atol=1e-6)

    def test_failing_save_leaves_the_old_file(self):
        networks.build("vgg_like").save(self.path)
        before = self.path.read_bytes()
        files = sorted(os.listdir(self.path.parent))

        def fail(model, path, *args, **kwargs):
            pathlib.Path(path).write_bytes(b"half")
            raise OSError("no space left on device")

        with mock.patch.object(keras.Model, "save", fail):
            with self.assertRaisesRegex(OSError, "no space left"):
                networks.build("resnet_like").save(self.path)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(sorted(os.listdir(self.path.parent)), files)


class LoadTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.get_temp_dir())

    @parameterized.product(suffix=(".keras", ".h5"), share=(0.0, 0.5, 0.95))
    def test_truncated_file(self, suffix, share):
        path = self.folder / f"model{suffix}"
        networks.build("vgg_like").save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with self.assertRaisesRegex(ModelError, f"{path} cannot be read .*truncated"):
            load_classifier(path)

    def test_missing_file(self):
        path = self.folder / "absent.keras"
        with self.assertRaisesRegex(ModelError, f"there is no model file {path}"):
            load_classifier(path)

    def test_wrong_suffix(self):
        path = self.folder / "model.onnx"
        path.write_bytes(b"")
        with self.assertRaisesRegex(
            ModelError, f"{path} is not a model file; .* end in .keras or .h5"
        ):
            load_classifier(path)

    def test_missing_description(self):
        path = self.folder / "model.keras"
        networks.build("vgg_like").save(path)
        path.with_suffix(".json").unlink()
        with self.assertRaisesRegex(
            ConfigError,
            "input_mean and input_scale are not given, and the model has",
        ):
            load_classifier(path)

    def test_given_description_goes_before_the_file(self):
        path = self.folder / "model.keras"
        networks.build("vgg_like").save(path)
        loaded = load_classifier(path, input_mean=7, input_scale=0.5)
        self.assertEqual(loaded.description.input_mean, (7.0,))
        self.assertEqual(loaded.description.class_names, ("0", "1", "2", "3", "4"))

    def test_description_of_another_model(self):
        path = self.folder / "model.keras"
        networks.build("vgg_like").save(path)
        fields = json.loads(path.with_suffix(".json").read_text())
        fields["class_names"] = ["cat", "dog"]
        path.with_suffix(".json").write_text(json.dumps(fields))
        with self.assertRaisesRegex(ConfigError, "2 names for a model with 5 outputs"):
            load_classifier(path)


if __name__ == "__main__":
    tf.test.main()
