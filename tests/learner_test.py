import os
import pathlib
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf, traced
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph import running
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.files import read_model
from dfq_tf.training.learner import (
    Learner,
    drawn_by,
    largest_tensor,
    random_states,
)
from tests import helpers, networks

layers = keras.layers


def _pixels(count=7, shape=(8, 8, 3)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *shape)).astype(np.uint8)


class LearnerTest(tf.test.TestCase, parameterized.TestCase):
    def test_shapes_are_those_of_the_model(self):
        learner = helpers.small_learner((6, 8, 3), 4)
        self.assertEqual(learner.image_shape, (6, 8, 3))
        self.assertEqual(learner.num_classes, 4)

    @parameterized.parameters(None, 1, 3, 100)
    def test_scores_are_those_of_the_normalised_pixels(self, batch_size):
        learner = helpers.small_learner()
        expected = learner.model((_pixels() - np.float32(120)) / 64, training=False)
        scores = learner.scores(_pixels(), batch_size)
        self.assertEqual(scores.dtype, np.float32)
        self.assertAllClose(scores, expected, atol=1e-5)

    def test_scores_follow_the_weights(self):
        learner = helpers.small_learner()
        before = learner.scores(_pixels())
        kernel, bias = learner.model.get_layer("logits").weights
        bias.assign_add(np.ones(4))
        self.assertAllClose(learner.scores(_pixels()), before + 1, atol=1e-5)
        kernel.assign(np.zeros_like(kernel))
        self.assertAllClose(learner.scores(_pixels())[0], bias, atol=1e-6)

    def test_largest_tensor_is_found_inside_of_layers_too(self):
        def function(values):
            wide = tf.tile(values[:, None], (1, 7, 1)) + tf.ones((1000, 1, 1, 1))[0]
            return tf.reduce_sum(wide, axis=1)

        compiled = traced(function, tf.TensorSpec((None, 5), tf.float32))
        self.assertEqual(largest_tensor(compiled), 35)

    def test_images_that_do_not_fit_together_go_one_by_one(self):
        learner = helpers.small_learner()
        expected = learner.scores(_pixels())
        seen = []
        one_by_one = helpers.small_learner()
        call = one_by_one._compiled

        def watched(pixels):
            seen.append(len(pixels))
            return call(pixels)

        self.enter_context(mock.patch.object(running, "PASS_MEMORY", 1))
        one_by_one.__dict__["_compiled"] = watched
        watched.graph = call.graph
        self.assertAllClose(one_by_one.scores(_pixels()), expected, atol=1e-5)
        self.assertEqual(seen, [1] * 7)

    def test_saved_model_and_description_are_read_again(self):
        learner = helpers.small_learner()
        path = helpers.new_folder() / "model.keras"
        learner.save(path)
        description = ModelDescription.load(path.with_suffix(".json"))
        read = Learner(read_model(path), description)
        self.assertEqual(read.description, learner.description)
        self.assertAllEqual(read.scores(_pixels()), learner.scores(_pixels()))

    def test_several_outputs_are_refused(self):
        image = layers.Input((8, 8, 3))
        x = layers.Flatten()(image)
        model = keras.Model(image, [layers.Dense(5)(x), layers.Dense(5)(x)])
        with self.assertRaisesRegex(ModelError, "inputs and outputs are .*take one im"):
            Learner(model, helpers.description(5))

    def test_unknown_size_is_refused(self):
        image = layers.Input((None, None, 3))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3)(image))
        with self.assertRaisesRegex(
            ModelError, r"\(None, None, None, 3\).*fixed sizes"
        ):
            Learner(keras.Model(image, x), helpers.description(5))

    def test_description_of_another_model_is_refused(self):
        model = helpers.small_learner().model
        with self.assertRaisesRegex(ConfigError, "class_names has 5 names for a model"):
            Learner(model, helpers.description(5))

    @parameterized.named_parameters(
        ("none", None, "the model is a builtins.NoneType"),
        ("subclass", type("Own", (keras.Model,), {})(), "the model is a .*Own; a netw"),
        ("unbuilt", keras.Sequential([layers.Dense(2)]), "it must be built"),
        (
            "image",
            keras.Sequential([layers.Input((8, 8, 3)), layers.ReLU()]),
            r"\(None, 8, 8, 3\)\]; it must be built, take one image",
        ),
        (
            "vector",
            keras.Sequential([layers.Input((8,)), layers.Dense(2)]),
            r"are \[\(None, 8\), \(None, 2\)\]; it must be built, take one image",
        ),
    )
    def test_other_models_are_refused(self, model, message):
        with self.assertRaisesRegex(ModelError, message):
            Learner(model, helpers.description(2))


class DrawnTest(tf.test.TestCase, parameterized.TestCase):
    def test_seed_and_step_decide_what_layers_draw(self):
        learner, pixels = helpers.noisy_learner(), tf.constant(_pixels(2), tf.float32)
        states = random_states([learner.model])
        self.assertLen(states, 3)

        @tf.function
        def scores(pixels, seed_and_step):
            return learner.logits(pixels, training=True)

        step = drawn_by(scores, states)
        pairs = ((3, 0), (3, 1), (4, 0), (2**31 - 1, 2**31 - 1))
        drawn = [step(pixels, tf.constant(pair)).numpy() for pair in pairs]
        self.assertLen({each.tobytes() for each in drawn}, len(pairs))
        for pair, expected in zip(pairs, drawn):
            self.assertAllEqual(step(pixels, tf.constant(pair)), expected)

    def test_layers_draw_other_numbers_than_each_other(self):
        image = layers.Input((8, 8, 3))
        first = layers.GaussianNoise(1.0)(image)
        model = keras.Model(image, [first, layers.GaussianNoise(1.0)(first)])

        def noise(seed_and_step):
            return model(tf.zeros((1, 8, 8, 3)), training=True)

        one, both = drawn_by(noise, random_states([model]))(tf.constant((3, 0)))
        self.assertNotAllClose(both - one, one)


class SaveTest(tf.test.TestCase, parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.get_temp_dir()) / "model.keras"

    def _loaded(self, path):
        description = ModelDescription.load(path.with_suffix(".json"))
        return Learner(read_model(path), description)

    @parameterized.parameters(("wrn_10_1", ".h5"), ("mobilenet_like", ".keras"))
    def test_network_comes_back_bit_for_bit(self, name, suffix):
        self.check_comes_back(name, suffix)

    @parameterized.parameters(("wrn_10_1", ".keras"), ("mobilenet_like", ".h5"))
    @pytest.mark.long
    def test_network_comes_back_bit_for_bit_from_the_other(self, name, suffix):
        self.check_comes_back(name, suffix)

    def check_comes_back(self, name, suffix):
        learner = networks.learner(name)
        path = self.path.with_suffix(suffix)
        learner.save(path)
        images = networks.images(learner.image_shape, 8)
        loaded = self._loaded(path)
        self.assertAllEqual(loaded.scores(images), learner.scores(images))
        self.assertEqual(loaded.description, learner.description)

    def test_loaded_network_trains_as_the_saved_one(self):
        learner = networks.learner("mobilenet_like")
        learner.save(self.path)
        loaded = self._loaded(self.path)
        before = loaded.scores(_pixels())
        for each in (learner, loaded):
            _take_step(each.model, _pixels())
        self.assertNotAllClose(loaded.scores(_pixels()), before)
        for variable, other in zip(
            loaded.model.weights, learner.model.weights, strict=True
        ):
            self.assertAllClose(variable, other, atol=1e-6)

    @parameterized.parameters("model", "model.tf", "model.model")
    def test_other_endings_are_refused_before_anything_is_written(self, name):
        folder = helpers.new_folder()
        with self.assertRaisesRegex(
            ConfigError, f"^path is '.*/{name}'; .* must end in .keras or .h5, such as"
        ):
            helpers.small_learner().save(folder / name)
        self.assertEmpty([*folder.iterdir()])

    def test_failing_save_leaves_the_old_file(self):
        networks.learner("vgg_like").save(self.path)
        before = self.path.read_bytes()
        files = sorted(os.listdir(self.path.parent))

        def fail(model, path, *args, **kwargs):
            pathlib.Path(path).write_bytes(b"half")
            raise OSError("no space left on device")

        with mock.patch.object(keras.Model, "save", fail):
            with self.assertRaisesRegex(OSError, "no space left"):
                networks.learner("resnet_like").save(self.path)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(sorted(os.listdir(self.path.parent)), files)


def _take_step(model, images):
    """One step of plain gradient descent on the sum of squared scores."""
    with tf.GradientTape() as tape:
        scores = model(images.astype(np.float32) / 64, training=True)
        loss = tf.reduce_sum(scores**2)
    variables = model.trainable_variables
    for variable, gradient in zip(variables, tape.gradient(loss, variables)):
        variable.assign_sub(1e-3 * gradient)


if __name__ == "__main__":
    tf.test.main()
