import dataclasses
import json
import os
import pathlib
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph import layers, running
from dfq_tf.graph.classifier import Classifier, agreement, in_batches, softmax
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.nodes import Graph
from dfq_tf.importing.classifiers import load_classifier
from tests import helpers, networks

NAMES = ("cat", "dog", "mouse")
DESCRIPTION = ModelDescription((1, 2), (0.1, 0.5), "logits", NAMES)


def small_graph(shape=(4, 6, 2)):
    """The mean of each channel, and a dense layer."""
    image = layers.image("image", shape)
    pool = layers.node("global_average_pool", "pool", [image])
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    return Graph(
        [image, pool, layers.node("dense", "dense", [pool], weights=weights)], "dense"
    )


def pixels(count=7, shape=(4, 6, 2)):
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


class ClassifierTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(None, 1, 3, 100)
    def test_scores_equal_numpy(self, batch_size):
        classifier = Classifier(small_graph(), DESCRIPTION)
        inputs = (pixels() - np.array([1, 2])) * np.array([0.1, 0.5])
        dense = classifier.graph.last.weights
        expected = inputs.mean(axis=(1, 2)) @ dense["kernel"] + dense["bias"]
        scores = classifier.scores(pixels(), batch_size)
        self.assertEqual(scores.dtype, np.float32)
        self.assertAllClose(scores, expected, rtol=1e-5, atol=1e-5)
        floats = pixels().astype(np.float32)
        self.assertAllEqual(classifier.scores(floats, batch_size), scores)

    def test_scores_are_the_model_on_normalised_pixels(self):
        fed = {"mean": (1.0, 2.0, 3.0), "scale": (0.1, 0.2, 1.0)}
        model = networks.learner("resnet_like", **fed).model
        classifier = networks.build("resnet_like", **fed)
        images = networks.images(classifier.image_shape, 7)
        inputs = (images - np.array([1, 2, 3])) * np.array([0.1, 0.2, 1])
        expected = model(inputs.astype(np.float32), training=False)
        scores = classifier.scores(images, batch_size=3)
        self.assertAllClose(scores, expected, rtol=1e-4, atol=1e-4)

    def test_shapes_are_those_of_the_graph(self):
        classifier = Classifier(small_graph(), DESCRIPTION)
        self.assertEqual(classifier.image_shape, (4, 6, 2))
        self.assertEqual(classifier.num_classes, 3)

    def test_a_pass_takes_as_many_images_as_memory_has_room_for(self):
        images = networks.images((8, 8, 3), 300)
        seen = []
        # The largest output of the network has 8 x 8 x 6 values.
        for budget, expected in ((4 * 4 * 384 * 70, 70), (2**32, 250), (1, 1)):
            classifier = dataclasses.replace(helpers.small_classifier())
            compiled = classifier._compiled

            def spy(batch, compiled=compiled):
                seen.append(len(batch))
                return compiled(batch)

            classifier.__dict__["_compiled"] = spy
            with mock.patch.object(running, "PASS_MEMORY", budget):
                scores = classifier.scores(images)
            self.assertLen(scores, 300)
            self.assertEqual((max(seen), sum(seen)), (expected, 300))
            seen.clear()

    def test_is_compiled_once(self):
        classifier = Classifier(small_graph(), DESCRIPTION)
        with mock.patch.object(running, "compute", wraps=running.compute) as compute:
            for count in (1, 5, 2):
                classifier.scores(pixels(count))
        self.assertEqual(compute.call_count, 1)

    def test_refuses_an_unknown_size(self):
        with self.assertRaisesRegex(
            ModelError, r"images of \(None, None, 2\); .*fixed sizes"
        ):
            Classifier(small_graph((None, None, 2)), DESCRIPTION)

    def test_refuses_an_output_that_is_no_row(self):
        graph = small_graph()
        image = Graph(graph.nodes.values(), "image")
        with self.assertRaisesRegex(ModelError, r"the network makes \(4, 6, 2\) of"):
            Classifier(image, DESCRIPTION)

    def test_refuses_a_vector_for_an_image(self):
        image = layers.image("image", (3,))
        with self.assertRaisesRegex(ModelError, r"of images of \(3,\); a classifier"):
            Classifier(Graph([image], "image"), DESCRIPTION)

    def test_refuses_a_description_of_another_model(self):
        description = ModelDescription((0.0,), (1.0,), "logits", ("a", "b"))
        with self.assertRaisesRegex(ConfigError, "2 names for a model with 3 outputs"):
            Classifier(small_graph(), description)
        description = ModelDescription((0.0,) * 3, (1.0,), "logits", NAMES)
        with self.assertRaisesRegex(ConfigError, "3 values for a model with 2 input"):
            Classifier(small_graph(), description)


class InBatchesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (8, [7]))
    def test_images_go_some_at_a_time(self, batch_size, expected):
        seen = []

        def function(batch):
            self.assertEqual(batch.dtype, tf.float32)
            seen.append(len(batch))
            return tf.reduce_sum(batch, axis=(1, 2))

        sums = in_batches(function, pixels(), pixels().shape[1:], batch_size)
        self.assertAllEqual(sums, pixels().sum(axis=(1, 2)))
        self.assertEqual(seen, expected)

    @parameterized.parameters([(0, 4, 6, 2)], [(4, 6, 2)], [(2, 8)])
    def test_no_images_are_refused(self, shape):
        with self.assertRaisesRegex(
            ModelError, r"an array of shape \(.*\); give at least one, as"
        ):
            in_batches(lambda batch: batch, np.zeros(shape, np.uint8), (4, 6, 2), 3)

    @parameterized.parameters([(5, 6, 2)], [(4, 5, 2)], [(4, 6, 1)])
    def test_images_of_another_shape_are_refused(self, shape):
        expected = rf"the images are \({shape[0]}, .* takes .* = \(4, 6, 2\)"
        for scores in (
            lambda images: in_batches(lambda batch: batch, images, (4, 6, 2), 3),
            Classifier(small_graph(), DESCRIPTION).scores,
        ):
            with self.assertRaisesRegex(ModelError, expected):
                scores(np.zeros((2, *shape), np.uint8))

    @parameterized.parameters(
        ([pixels(1)[0]], "the images are a builtins.list; give an array of NumPy, "),
        (None, "the images are a builtins.NoneType; give an array of NumPy"),
        (np.zeros((1, 4, 6, 2), bool), "the images are bool; give uint8 or float32 p"),
        (np.full((1, 4, 6, 2), "a"), "the images are <U1; give uint8 or float32 pix"),
        (np.full((1, 4, 6, 2), np.nan), "have values from nan to nan; give pixels"),
        (np.full((1, 4, 6, 2), -0.5), "have values from -0.5 to -0.5; give pixels as"),
        (np.full((1, 4, 6, 2), 256), "from 256 to 256; .* says how they are normal"),
        (np.linspace(0, 1, 48).reshape(1, 4, 6, 2), "from 0 to 1; give pixels as they"),
        (np.eye(8, 6).reshape(1, 4, 6, 2), "from 0 to 1; give pixels as they are, 0"),
    )
    def test_what_is_no_pixels_is_refused(self, images, message):
        with self.assertRaisesRegex(ModelError, message):
            Classifier(small_graph(), DESCRIPTION).scores(images)

    def test_dark_pixels_are_taken_as_floats_too(self):
        classifier = Classifier(small_graph(), DESCRIPTION)
        images = np.zeros((2, 4, 6, 2), np.uint8)
        images[1] = 1
        expected = classifier.scores(images)
        self.assertAllEqual(classifier.scores(images.astype(int)), expected)
        for pixel in (0, 2):
            images[1] = pixel
            expected = classifier.scores(images)
            floats = images.astype(np.float32)
            self.assertAllEqual(classifier.scores(floats), expected)
        faint = np.linspace(0, 2, 48, dtype=np.float32).reshape(1, 4, 6, 2)
        self.assertEqual(classifier.scores(faint).shape, (1, 3))


class AgreementTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.scores = np.array([[3.0, 1, 2], [0, 5, 1], [0.1, 0.2, 0.3], [9, 0, 0]])

    def test_compares_classes_and_not_scores(self):
        other = np.array([[0.1, 0.0, 0.0], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
        self.assertEqual(agreement(self.scores, other), 0.5)
        self.assertEqual(agreement(self.scores, -100 + self.scores / 7), 1.0)

    def test_is_symmetric(self):
        a, b = np.random.default_rng(0).normal(size=(2, 50, 3))
        self.assertEqual(agreement(a, b), agreement(b, a))
        self.assertEqual(agreement(a, b), np.mean(a.argmax(axis=1) == b.argmax(axis=1)))


class SoftmaxTest(tf.test.TestCase):
    def test_equals_tensorflow_and_takes_large_scores(self):
        scores = np.random.default_rng(0).normal(size=(5, 4), scale=300)
        found = softmax(scores.astype(np.float32))
        self.assertEqual(found.dtype, np.float64)
        self.assertAllClose(found, tf.nn.softmax(scores), rtol=1e-4)


class LoadTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.get_temp_dir())

    @parameterized.parameters(("wrn_10_1", ".h5"), ("mobilenet_like", ".keras"))
    def test_saved_network_comes_back(self, name, suffix):
        self.check_comes_back(name, suffix)

    @parameterized.parameters(("wrn_10_1", ".keras"), ("mobilenet_like", ".h5"))
    @pytest.mark.long
    def test_saved_network_comes_back_from_the_other(self, name, suffix):
        self.check_comes_back(name, suffix)

    def check_comes_back(self, name, suffix):
        learner = networks.learner(name)
        path = self.folder / f"model{suffix}"
        learner.save(path)
        loaded = load_classifier(path)
        images = networks.images(loaded.image_shape, 8)
        # Bit for bit what its graph gave before.
        self.assertAllEqual(loaded.scores(images), networks.build(name).scores(images))
        self.assertAllClose(loaded.scores(images), learner.scores(images), atol=1e-4)
        self.assertEqual(loaded.description, learner.description)

    @parameterized.product(suffix=(".keras", ".h5"), share=(0.0, 0.5, 0.95))
    def test_truncated_file(self, suffix, share):
        path = self.folder / f"model{suffix}"
        networks.learner("vgg_like").save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with self.assertRaisesRegex(ModelError, f"{path} cannot be read .*truncated"):
            load_classifier(path)

    def test_a_model_is_no_file(self):
        model = networks.learner("vgg_like").model
        for given, kind in ((model, r"tf_keras\S+"), (None, "builtins.NoneType")):
            with self.assertRaisesRegex(
                ModelError,
                f"^path is a {kind}; load_classifier reads files; give a model to "
                "as_classifier$",
            ):
                load_classifier(given)

    def test_missing_file(self):
        path = self.folder / "absent.keras"
        with self.assertRaisesRegex(ModelError, f"there is no model file {path}"):
            load_classifier(path)

    def test_path_may_begin_at_home(self):
        message = f"there is no model file {self.folder}/absent.keras"
        with mock.patch.dict(os.environ, HOME=str(self.folder)):
            with self.assertRaisesRegex(ModelError, message):
                load_classifier("~/absent.keras")

    def test_wrong_suffix(self):
        path = self.folder / "model.onnx"
        path.write_bytes(b"")
        with self.assertRaisesRegex(
            ModelError, f"{path} is not a model file; .* end in .keras, .h5"
        ):
            load_classifier(path)

    def test_missing_description(self):
        path = self.folder / "model.keras"
        networks.learner("vgg_like").save(path)
        path.with_suffix(".json").unlink()
        with self.assertRaisesRegex(
            ConfigError,
            "input_mean and input_scale are not given, and the model has",
        ):
            load_classifier(path)

    def test_given_description_goes_before_the_file(self):
        path = self.folder / "model.keras"
        networks.learner("vgg_like").save(path)
        loaded = load_classifier(path, input_mean=7, input_scale=0.5)
        self.assertEqual(loaded.description.input_mean, (7.0,))
        names = tuple(f"class {i}" for i in range(5))  # nothing else is given
        self.assertEqual(loaded.description.class_names, names)
        loaded = load_classifier(path, class_names=tuple("vwxyz"))
        self.assertEqual(loaded.description.class_names, tuple("vwxyz"))
        self.assertEqual(loaded.description.input_mean, (120.0,))
        for half in (dict(input_scale=0.5), dict(input_mean=7)):
            with self.assertRaisesRegex(ConfigError, "give both or neither"):
                load_classifier(path, **half)

    def test_architecture_of_keras_is_no_description(self):
        path = self.folder / "model.h5"
        model = networks.learner("vgg_like").model
        model.save(path)
        path.with_suffix(".json").write_text(model.to_json())
        with self.assertRaisesRegex(ConfigError, "input_mean and input_scale are not"):
            load_classifier(path)
        loaded = load_classifier(path, input_mean=120, input_scale=1 / 64)
        images = networks.images(loaded.image_shape, 3)
        expected = networks.build("vgg_like").scores(images)
        self.assertAllClose(loaded.scores(images), expected, atol=1e-4)

    def test_description_of_another_model(self):
        path = self.folder / "model.keras"
        networks.learner("vgg_like").save(path)
        fields = json.loads(path.with_suffix(".json").read_text())
        fields["class_names"] = ["cat", "dog"]
        path.with_suffix(".json").write_text(json.dumps(fields))
        with self.assertRaisesRegex(ConfigError, "2 names for a model with 5 outputs"):
            load_classifier(path)


if __name__ == "__main__":
    tf.test.main()
