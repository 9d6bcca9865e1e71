import numpy as np
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.models.generator import ToPixels, UpsampledConv2D, build_generator
from tests import helpers


def _wrn_parameters(depth, width, num_classes):
    """(trainable, stored BN statistics), counted from the paper's table."""
    kernels, bn_channels = 3 * 3 * 3 * 16, 0
    inputs = 16
    for outputs in (16 * width, 32 * width, 64 * width):
        for _ in range((depth - 4) // 6):
            kernels += 9 * inputs * outputs + 9 * outputs * outputs
            # A projection where the number of channels changes.
            kernels += inputs * outputs if inputs != outputs else 0
            bn_channels += inputs + outputs
            inputs = outputs
    bn_channels += inputs
    dense = inputs * num_classes + num_classes
    return kernels + 2 * bn_channels + dense, 2 * bn_channels


class WideResnetTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("wrn_10_1", 10, 1),
        ("wrn_16_1", 16, 1),
        ("wrn_16_2", 16, 2),
        ("wrn_40_2", 40, 2),
    )
    def test_has_the_parameters_of_the_paper(self, name, depth, width):
        model = models.build_model(name, (32, 32, 3), 10)
        trainable, stored = _wrn_parameters(depth, width, 10)
        count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        self.assertEqual(count, trainable)
        self.assertEqual(model.count_params(), trainable + stored)

    @parameterized.parameters(("wrn_16_1", 0.17), ("wrn_16_2", 0.69), ("wrn_40_2", 2.2))
    def test_has_the_published_millions_of_parameters(self, name, published):
        model = models.build_model(name, (32, 32, 3), 10)
        count = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        self.assertAllClose(count / 1e6, published, rtol=0.03)

    def test_projections_stand_where_the_channels_change(self):
        model = models.build_model("wrn_16_1", (32, 32, 3), 10)
        kinds = [type(layer).__name__ for layer in model.layers]
        names = [layer.name for layer in model.layers]
        shortcuts = sum("shortcut" in name for name in names)
        # The stem, two in each of six blocks, and the dense layer.
        self.assertEqual(kinds.count("Conv2D") - shortcuts + kinds.count("Dense"), 14)
        self.assertEqual(shortcuts, 2)

    def test_maps_images_of_any_shape_to_logits(self):
        model = models.build_model("wrn_10_1", (9, 13, 1), 4)
        self.assertEqual(model.input_shape, (None, 9, 13, 1))
        self.assertEqual(model.output_shape, (None, 4))
        logits = helpers.randomise(model)(helpers.random_inputs(model)).numpy()
        self.assertLess(logits.min(), 0.0)

    def test_second_and_third_group_halve_the_size(self):
        model = models.build_model("wrn_10_2", (32, 32, 3), 10)
        shapes = [
            model.get_layer(f"group{i}_block1_add").output_shape for i in (1, 2, 3)
        ]
        self.assertEqual(
            shapes, [(None, 32, 32, 32), (None, 16, 16, 64), (None, 8, 8, 128)]
        )

    @parameterized.parameters(4, 15, 41)
    def test_impossible_depth_names_the_possible_ones(self, depth):
        with self.assertRaisesRegex(
            ConfigError, rf"depth is {depth}; a WRN needs 10, 16, 22, 28, .*6 n \+ 4"
        ):
            models.build_model(f"wrn_{depth}_1", (32, 32, 3), 10)

    def test_width_of_zero_is_refused(self):
        with self.assertRaisesRegex(ConfigError, "width is 0; it must be at least 1"):
            models.build_model("wrn_16_0", (32, 32, 3), 10)

    @parameterized.parameters("resnet", "wrn_16", "wrn_16_1_2", "my_wrn_16_1", "")
    def test_unknown_name_shows_the_known_ones(self, name):
        self.assertFalse(models.is_model_name(name))
        with self.assertRaisesRegex(
            ConfigError, f"model is '{name}'; the project builds: wrn_DEPTH_WIDTH"
        ):
            models.build_model(name, (32, 32, 3), 10)

    def test_known_name_is_told(self):
        self.assertTrue(models.is_model_name("wrn_16_1"))
        self.assertFalse(models.is_model_name("wrn_16_1.keras"))


class GeneratorTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ((32, 32, 3),),
        ((64, 32, 3),),
        ((28, 28, 1),),
        ((9, 21, 4),),
        ((1, 1, 1),),
        ((100, 7, 3),),
    )
    def test_gives_images_of_the_shape_asked_for(self, shape):
        generator = build_generator(6, shape, channels=2)
        images = generator(tf.random.stateless_normal((3, 6), (0, 0)))
        self.assertEqual(generator.output_shape, (None, *shape))
        self.assertEqual(images.shape, (3, *shape))
        self.assertEqual(images.dtype, tf.float32)

    def test_pixels_reach_the_whole_range_and_stay_in_it(self):
        generator = helpers.randomise(build_generator(6, (12, 12, 3), channels=4))
        kernel = generator.get_layer("to_image").kernel
        kernel.assign(kernel * 1000.0)
        images = generator(tf.random.stateless_normal((8, 6), (0, 0))).numpy()
        self.assertAllInRange(images, 0.0, 255.0)
        self.assertAllClose([images.min(), images.max()], [0.0, 255.0], atol=1e-3)

    def test_grid_stays_small_for_large_images(self):
        for side, grid in ((8, 2), (32, 8), (64, 8), (128, 8), (224, 7)):
            generator = build_generator(2, (side, side, 3), channels=2)
            shape = generator.get_layer("grid").output_shape
            self.assertEqual(shape, (None, grid, grid, 2))

    def test_every_weight_has_a_gradient(self):
        generator = build_generator(6, (9, 9, 1), channels=4)
        with tf.GradientTape() as tape:
            images = generator(
                tf.random.stateless_normal((3, 6), (0, 0)), training=True
            )
            loss = tf.reduce_sum(tf.square(images))
        self.assertNotIn(None, tape.gradient(loss, generator.trainable_variables))

    def test_forward_and_gradient_compile_with_xla(self):
        generator = helpers.randomise(build_generator(3, (8, 8, 1), channels=2))
        noise = tf.random.stateless_normal((2, 3), (0, 0))

        def gradient(noise):
            with tf.GradientTape() as tape:
                tape.watch(noise)
                loss = tf.reduce_sum(generator(noise, training=True) ** 2) / 1e4
            return loss, tape.gradient(loss, noise)

        compiled = tf.function(gradient, jit_compile=True, autograph=False)
        self.assertAllClose(compiled(noise), gradient(noise), rtol=1e-3, atol=1e-3)

    def test_seed_decides_the_weights_of_every_layer(self):
        one, same, other = (
            build_generator(3, (8, 8, 1), channels=4, seed=seed) for seed in (1, 1, 2)
        )
        self.assertTrue(helpers.all_equal(one.weights, same.weights))
        kernels = [
            variable.numpy()
            for generator in (one, other)
            for variable in generator.weights
            if "kernel" in variable.name
        ]
        self.assertLen(kernels, 8)
        # No two layers start with the same numbers, not even of two seeds.
        self.assertLen({kernel.ravel()[0] / kernel.ravel()[1] for kernel in kernels}, 8)

    def test_saved_generator_gives_equal_images(self):
        generator = helpers.randomise(build_generator(3, (8, 8, 1), channels=2))
        path = f"{self.get_temp_dir()}/generator.keras"
        generator.save(path)
        noise = tf.random.stateless_normal((2, 3), (0, 0))
        loaded = keras.models.load_model(path)
        self.assertAllEqual(loaded(noise), generator(noise))

    @parameterized.parameters(
        (0, (8, 8, 3), 4), (3, (0, 8, 3), 4), (3, (8, 8, 0), 4), (3, (8, 8, 3), 0)
    )
    def test_size_below_one_is_refused(self, noise_dim, shape, channels):
        with self.assertRaisesRegex(
            ConfigError,
            rf"noise_dim {noise_dim}, image_shape \({shape[0]}, .*\) and channels "
            rf"{channels} must all be at least 1",
        ):
            build_generator(noise_dim, shape, channels)


class GeneratorLayersTest(parameterized.TestCase, tf.test.TestCase):
    def _twins(self, input_shape, filters):
        """The layer, and upsampling followed by a convolution of the same weights."""
        image = keras.layers.Input(input_shape)
        layer = keras.Model(image, UpsampledConv2D(filters)(image))
        conv = keras.layers.Conv2D(filters, 3, padding="same")
        plain = keras.Model(image, conv(keras.layers.UpSampling2D()(image)))
        plain.set_weights(helpers.randomise(layer).get_weights())
        return layer, plain

    @parameterized.parameters(((3, 4, 5), 2), ((1, 1, 1), 1), ((4, 2, 1), 3))
    def test_upsampled_conv_equals_conv_of_repeated_pixels(self, shape, filters):
        layer, plain = self._twins(shape, filters)
        inputs = helpers.random_inputs(layer)
        expected = plain(inputs).numpy()
        self.assertEqual(layer.output_shape, plain.output_shape)
        self.assertAllClose(layer(inputs), expected, atol=1e-5)
        # The reference repeats pixels as NumPy does.
        repeated = inputs.repeat(2, axis=1).repeat(2, axis=2)
        self.assertAllClose(plain.layers[-1](repeated), expected, atol=1e-5)

    def test_upsampled_conv_has_the_gradients_of_its_twin(self):
        twins = self._twins((3, 4, 5), 2)
        inputs = tf.constant(helpers.random_inputs(twins[0]))
        weights = np.random.default_rng(1).normal(size=(4, 6, 8, 2))
        gradients = []
        for model in twins:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                loss = tf.reduce_sum(model(inputs) * weights.astype(np.float32))
            gradients.append(tape.gradient(loss, [inputs, *model.weights]))
        for ours, expected in zip(*gradients, strict=True):
            self.assertAllClose(ours, expected, atol=1e-4)

    def test_upsampled_conv_computes_in_bfloat16(self):
        layer, plain = self._twins((3, 4, 5), 2)
        low = UpsampledConv2D(2, dtype="mixed_bfloat16")
        inputs = helpers.random_inputs(layer)
        low.build(inputs.shape)
        low.set_weights(layer.get_weights())
        output = low(inputs)
        self.assertEqual(output.dtype, tf.bfloat16)
        self.assertEqual(low.kernel.dtype, tf.float32)
        self.assertAllClose(tf.cast(output, tf.float32), plain(inputs), atol=0.1)

    def test_to_pixels_is_half_a_tanh_of_255(self):
        inputs = np.array([-100.0, -1.0, 0.0, 0.5, 100.0], np.float32)
        expected = 255 * (1 + np.tanh(inputs)) / 2
        self.assertAllClose(ToPixels()(inputs), expected, rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    tf.test.main()
