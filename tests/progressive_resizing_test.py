import numpy as np
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.with_data import progressive_resizing
from tests import helpers


class ResizedShapeTest(parameterized.TestCase):
    def test_grows_evenly_over_four_fifths_of_the_epochs(self):
        sides = [
            progressive_resizing.resized_shape(32, 32, 0.5, epoch, 10)[0]
            for epoch in range(10)
        ]
        # 16 pixels more in 8 epochs: 2 an epoch, of which multiples of 4 are kept.
        self.assertEqual(sides, [16, 16, 20, 20, 24, 24, 28, 28, 32, 32])

    @parameterized.parameters(0.1, 0.3, 0.7, 0.9, 1.0)
    def test_ends_at_the_full_size(self, scale):
        for num_epochs in (5, 35, 60):
            last = int(np.ceil(0.8 * num_epochs))
            for epoch in range(last, num_epochs):
                shape = progressive_resizing.resized_shape(
                    32, 48, scale, epoch, num_epochs
                )
                self.assertEqual(shape, (32, 48))

    @parameterized.parameters((1, [32]), (2, [16, 32]), (3, [16, 20, 32]))
    def test_last_epoch_is_full_however_few_there_are(self, num_epochs, sides):
        for epoch, side in enumerate(sides):
            self.assertEqual(
                progressive_resizing.resized_shape(32, 32, 0.5, epoch, num_epochs),
                (side, side),
            )

    def test_scale_1_is_the_full_size_throughout(self):
        for epoch in range(3):
            self.assertEqual(
                progressive_resizing.resized_shape(28, 30, 1.0, epoch, 3), (28, 30)
            )

    def test_is_never_empty(self):
        self.assertEqual(progressive_resizing.resized_shape(8, 2, 0.01, 0, 9), (1, 1))


class ResizeTest(tf.test.TestCase):
    def test_full_size_stays_as_it_is(self):
        images = tf.constant(np.random.default_rng(0).normal(size=(2, 4, 6, 1)))
        self.assertIs(progressive_resizing.resize(images, (4, 6)), images)

    def test_half_the_size_averages_over_four_pixels_each_way(self):
        row = np.random.default_rng(0).normal(size=8).astype(np.float32)
        images = np.broadcast_to(row[None, None, :, None], (1, 8, 8, 1))
        small = progressive_resizing.resize(tf.constant(images), (4, 4))
        # A triangle of twice the width, at the distances 0.5 and 1.5 of its 2 pixels.
        expected = [
            np.dot(row[start : start + 4], [1, 3, 3, 1]) / 8 for start in (1, 3)
        ]
        self.assertAllClose(small[0, 0, 1:3, 0], expected, atol=1e-6)


class OfAnySizeTest(tf.test.TestCase):
    def test_answers_as_the_model_and_takes_other_sizes(self):
        model = helpers.randomise(models.build_model("wrn_10_1", (16, 16, 3), 4))
        copy = progressive_resizing.of_any_size(model, (8, 8))
        rng = np.random.default_rng(0)
        inputs = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
        self.assertAllClose(copy(inputs), model(inputs), atol=1e-6)
        small = models.build_model("wrn_10_1", (8, 8, 3), 4)
        small.set_weights(model.get_weights())
        inputs = inputs[:, :8, :8]
        self.assertAllClose(copy(inputs), small(inputs), atol=1e-6)

    def test_variables_are_its_own(self):
        model = helpers.small_learner().model
        copy = progressive_resizing.of_any_size(model, (4, 4))
        before = helpers.copies(model.weights)
        for variable in copy.weights:
            variable.assign_add(tf.ones_like(variable))
        self.assertTrue(helpers.all_equal(model.weights, before))

    def test_refuses_a_model_of_one_size(self):
        image = keras.layers.Input((2, 2, 1))
        logits = keras.layers.Dense(3)(keras.layers.Flatten()(image))
        model = keras.Model(image, logits, name="flat")
        with self.assertRaisesRegex(
            ConfigError,
            "teacher_initial_scale makes images of 1 x 1 pixels, which flat .* to 1$",
        ):
            progressive_resizing.of_any_size(model, (1, 1))

    def test_refuses_images_of_which_pooling_leaves_nothing(self):
        model = models.build_model("vgg_11", (32, 32, 3), 4)
        progressive_resizing.of_any_size(model, (32, 32))
        with self.assertRaisesRegex(ConfigError, "of 28 x 28 pixels, which vgg_11"):
            progressive_resizing.of_any_size(model, (28, 28))


if __name__ == "__main__":
    tf.test.main()
