import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.distillation.teacher import observe
from tests import helpers

layers = keras.layers


def _pixels(shape=(5, 8, 8, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, shape).astype(np.float32)


def _weights(observed):
    return tf.nest.flatten(observed.weights)


class ObserveTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.model = helpers.small_learner().model
        self.teacher = helpers.classifier(self.model)

    def test_logits_are_those_of_the_teacher(self):
        logits, _ = observe(self.teacher)(_pixels())
        self.assertAllClose(logits, self.teacher.scores(_pixels()), atol=1e-5)

    def test_inputs_are_what_enters_each_bn_layer(self):
        _, inputs = observe(self.teacher)(_pixels())
        model = self.model
        x = (_pixels() - 120.0) / 64
        conv1 = model.get_layer("conv1")(x)
        between = model.get_layer("bn1")(conv1, training=False)
        conv2 = model.get_layer("conv2")(tf.nn.relu(between))
        self.assertLen(inputs, 2)
        self.assertAllClose(inputs[0], conv1, atol=1e-5)
        self.assertAllClose(inputs[1], conv2, atol=1e-5)

    def test_statistics_are_those_stored_in_the_order_of_the_inputs(self):
        observed = observe(self.teacher)
        for i, name in enumerate(("bn1", "bn2")):
            layer = self.model.get_layer(name)
            self.assertAllEqual(observed.means[i], layer.moving_mean)
            self.assertAllEqual(observed.variances[i], layer.moving_variance)

    def test_it_is_shown_without_its_statistics(self):
        shown = repr(observe(self.teacher))
        self.assertIn("precision='float32'", shown)
        self.assertNotIn("conv1", shown)
        self.assertNotIn("tf.Tensor", shown)

    def test_statistics_of_bn_without_scale_and_shift_are_found(self):
        image = layers.Input((8, 8, 3))
        bn = layers.BatchNormalization(scale=False, center=False)
        model = helpers.randomise(keras.Model(image, layers.Flatten()(bn(image))))
        observed = observe(helpers.classifier(model))
        self.assertAllEqual(observed.means[0], bn.moving_mean)
        self.assertAllEqual(observed.variances[0], bn.moving_variance)
        _, (entering,) = observed(_pixels())
        self.assertAllClose(entering, (_pixels() - 120) / 64, atol=1e-6)

    def test_softmax_is_taken_off(self):
        model = self.model
        softmax = keras.Model(model.input, layers.Softmax()(model.output))
        teacher = helpers.classifier(softmax, "softmax")
        logits, _ = observe(teacher)(_pixels())
        self.assertAllClose(logits, self.teacher.scores(_pixels()), atol=1e-5)

    def test_layers_inside_models_are_observed(self):
        image = layers.Input((8, 8, 3))
        nested = keras.Model(image, layers.ReLU()(self.model(image)))
        logits, inputs = observe(helpers.classifier(nested))(_pixels())
        _, expected = observe(self.teacher)(_pixels())
        for entering, other in zip(inputs, expected, strict=True):
            self.assertAllClose(entering, other, atol=1e-5)
        self.assertAllClose(
            logits, np.maximum(self.teacher.scores(_pixels()), 0), atol=1e-5
        )

    def test_dropout_stays_off(self):
        image = layers.Input((8, 8, 3))
        x = layers.Dropout(0.5)(image)
        model = keras.Model(image, layers.Flatten()(layers.BatchNormalization()(x)))
        observed = observe(helpers.classifier(model))
        _, (entering,) = observed(_pixels())
        self.assertAllClose(entering, (_pixels() - 120) / 64, atol=1e-6)

    def test_observed_teacher_is_a_copy(self):
        observed = observe(self.teacher)
        expected = observed(_pixels())[0].numpy()
        for variable in self.model.weights:
            variable.assign(tf.zeros_like(variable))
        self.assertAllEqual(observed(_pixels())[0], expected)

    def test_call_changes_nothing(self):
        observed = observe(self.teacher)
        before = helpers.copies(_weights(observed))
        observed(_pixels())
        self.assertTrue(helpers.all_equal(_weights(observed), before))

    def test_bfloat16_gives_float32_logits_and_bfloat16_inputs(self):
        logits, inputs = observe(self.teacher, "bfloat16")(_pixels())
        expected = self.teacher.scores(_pixels())
        self.assertEqual(logits.dtype, tf.float32)
        self.assertAllClose(logits, expected, atol=0.05 * np.abs(expected).max())
        self.assertEqual({x.dtype for x in inputs}, {tf.bfloat16})

    def test_bfloat16_ends_in_float32(self):
        observed = observe(self.teacher, "bfloat16")
        types = {
            name: {weight.dtype for weight in roles.values()}
            for name, roles in observed.weights.items()
            if roles
        }
        expected = {name: {tf.bfloat16} for name in ("conv1", "conv2")}
        expected |= {name: {tf.float32} for name in ("bn1", "bn2", "logits")}
        self.assertEqual(types, expected)
        # Between them, each layer rounds.
        x = tf.cast((_pixels() - 120) / 64, tf.bfloat16)
        for i in (1, 2):
            kernel = tf.cast(self.model.get_layer(f"conv{i}").kernel, tf.bfloat16)
            x = tf.nn.conv2d(x, kernel, i, "SAME")
            bn = self.model.get_layer(f"bn{i}")
            x = tf.cast(bn(tf.cast(x, tf.float32), training=False), tf.bfloat16)
            x = tf.nn.relu(x)
        pooled = tf.cast(tf.reduce_mean(x, (1, 2)), tf.float32)
        logits = self.model.get_layer("logits")(pooled)
        self.assertAllClose(observed(_pixels())[0], logits, rtol=0.01, atol=0.01)

    def test_bfloat16_ends_in_float32_behind_the_last_kernel(self):
        """Such as in keras.applications.MobileNet, which ends in a convolution."""
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="body")(image)
        x = layers.Conv2D(5, 6, name="head")(x)
        model = helpers.randomise(keras.Model(image, layers.Flatten()(x)))
        observed = observe(helpers.classifier(model), "bfloat16")
        for name, expected in (("body", tf.bfloat16), ("head", tf.float32)):
            self.assertEqual(observed.weights[name]["kernel"].dtype, expected)
        logits, _ = observed(_pixels())
        rounded = tf.cast(tf.cast(logits, tf.bfloat16), tf.float32)
        self.assertNotAllEqual(logits, rounded)
        expected = model((_pixels() - 120) / 64).numpy()
        self.assertAllClose(logits, expected, atol=0.05 * np.abs(expected).max())

    def test_bfloat16_sum_at_the_end_is_of_float32(self):
        image = layers.Input((8, 8, 3))
        x = layers.GlobalAveragePooling2D()(layers.BatchNormalization()(image))
        # Both are read once more by the sum, and one of them by the other.
        y = layers.LeakyReLU(0.5)(x)
        model = helpers.randomise(keras.Model(image, layers.Add()([x, y])))
        logits, _ = observe(helpers.classifier(model), "bfloat16")(_pixels())
        self.assertEqual(logits.dtype, tf.float32)
        rounded = tf.cast(tf.cast(logits, tf.bfloat16), tf.float32)
        self.assertNotAllEqual(logits, rounded)
        expected = model((_pixels() - 120) / 64)
        self.assertAllClose(logits, expected, rtol=0.05, atol=0.05)

    def test_teacher_without_bn_shows_nothing(self):
        image = layers.Input((8, 8, 3))
        model = helpers.randomise(
            keras.Model(image, layers.Dense(4)(layers.Flatten()(image)))
        )
        teacher = helpers.classifier(model)
        observed = observe(teacher)
        logits, inputs = observed(_pixels())
        self.assertEmpty(inputs)
        self.assertAllClose(logits, teacher.scores(_pixels()), atol=1e-5)


if __name__ == "__main__":
    tf.test.main()
