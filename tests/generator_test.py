import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import generator as generator_module
from dfq_tf.distillation.generator import (
    SAMPLE,
    Sampler,
    ToPixels,
    UpsampledConv2D,
    build_generator,
    draw_parts,
    generate,
    held_out_count,
    make_generators,
    sample_noise,
)
from dfq_tf.errors import ConfigError
from dfq_tf.settings import DistillationConfig
from tests import helpers

layers = keras.layers

_CONFIG = DistillationConfig(batch_size=4, noise_dim=3)


# Height and width of images, and most values that a pixel takes in all layers.
MOST_VALUES = (
    ((9, 9), 575),
    ((9, 33), 710),
    ((17, 31), 500),
    ((32, 32), 320),
    ((33, 65), 500),
    ((96, 100), 300),
    ((224, 224), 112),
    ((511, 512), 84),
    ((512, 512), 80),
    ((513, 513), 120),
    ((640, 640), 80),
    ((8, 512), 80),
    ((512, 9), 142),
    ((31, 512), 88),
)


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

    @parameterized.parameters(
        # Of the first published version: results for such images can be repeated.
        (
            (8, 8, 1),
            [(2, 2, 128), (4, 4, 128), (8, 8, 64), (8, 8, 1)],
            [0.0173653, -0.0447182, -0.0126316, 0.0500453],
        ),
        (
            (28, 28, 1),
            [(7, 7, 128), (14, 14, 128), (28, 28, 64), (28, 28, 1)],
            [0.00498371, -0.0447182, -0.0126316, 0.0500453],
        ),
        (
            (32, 32, 3),
            [(8, 8, 128), (16, 16, 128), (32, 32, 64), (32, 32, 3)],
            [0.00436115, -0.0447182, -0.0126316, 0.0492927],
        ),
        (
            (64, 64, 3),
            [(8, 8, 128), (16, 16, 128), (32, 32, 128), (64, 64, 64), (64, 64, 3)],
            [-0.0237082, -0.0109393, 0.0252174, 0.00288186, 0.0513948],
        ),
        (
            (33, 64, 4),
            [(5, 8, 128), (10, 16, 128), (20, 32, 128), (40, 64, 64), (40, 64, 4)],
            [-0.0299832, -0.0109393, 0.0252174, 0.00288186, 0.0510155],
        ),
    )
    def test_up_to_64_pixels_it_is_what_it_always_was(self, shape, sizes, firsts):
        generator = build_generator(5, shape, seed=1)
        convolutions = [f"up_conv{i}" for i in range(1, len(sizes) - 1)]
        found = [
            generator.get_layer(name).output_shape[1:]
            for name in ("grid", *convolutions, "to_image")
        ]
        self.assertEqual(found, sizes)
        kernels = [w.numpy() for w in generator.weights if "kernel" in w.name]
        self.assertAllClose([k.ravel()[0] for k in kernels], firsts, rtol=1e-5)

    def test_filters_halve_as_sides_double_beyond_32_pixels(self):
        for side, expected in (
            (128, [128, 128, 64, 32]),
            (224, [128, 128, 73, 36, 18]),
            (512, [128, 128, 64, 32, 16, 16]),
        ):
            generator = build_generator(2, (side, side, 3))
            filters = [
                layer.filters
                for layer in generator.layers
                if isinstance(layer, UpsampledConv2D)
            ]
            self.assertEqual(filters, expected)

    @parameterized.parameters(*MOST_VALUES)
    @pytest.mark.long
    def test_memory_is_bounded_for_each_pixel(self, shape, most):
        self.check_memory(shape, most, depth=3)

    @parameterized.product(case=MOST_VALUES, depth=(1, 4))
    @pytest.mark.long
    def test_so_it_is_with_other_channels(self, case, depth):
        self.check_memory(*case, depth)

    def check_memory(self, shape, most, depth):
        generator = build_generator(1, (*shape, depth))
        self.assertEqual(generator.output_shape, (None, *shape, depth))
        values = sum(
            math.prod(layer.output.shape[1:])
            for layer in generator.layers
            if layer.name != "noise"
        )
        self.assertLessEqual(values / math.prod(shape), most)
        # The weights' memory: no grid is larger than a square image's.
        grid = generator.get_layer("grid").output.shape[1:]
        self.assertLessEqual(math.prod(grid), 8 * 8 * 128)

    @parameterized.parameters(
        ((8, 512), (1, 64)), ((512, 8), (64, 1)), ((9, 512), (1, 32))
    )
    def test_narrow_images_come_from_a_long_grid(self, shape, grid):
        generator = build_generator(2, (*shape, 1), channels=2)
        self.assertEqual(generator.get_layer("grid").output_shape, (None, *grid, 2))
        images = generator(tf.random.stateless_normal((2, 2), (0, 0)))
        self.assertEqual(images.shape, (2, *shape, 1))

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


class MakeGeneratorTest(tf.test.TestCase):
    def test_seed_decides_the_weights(self):
        one, same, other = (
            make_generators((5, 4, 3), helpers.context(_CONFIG, seed=seed))[0]
            for seed in (1, 1, 2)
        )
        self.assertTrue(helpers.all_equal(one.weights, same.weights))
        self.assertFalse(helpers.all_equal(one.weights, other.weights))
        self.assertEqual(one.output_shape, (None, 5, 4, 3))
        self.assertEqual(one.input_shape, (None, 3))

    def test_bfloat16_gives_float32_images(self):
        context = helpers.context(_CONFIG, seed=1, precision="bfloat16")
        (made,) = make_generators((4, 4, 1), context)
        images = made(tf.ones((2, 3)))
        self.assertEqual(images.dtype, tf.float32)
        self.assertEqual(made.get_layer("up_conv1").compute_dtype, "bfloat16")


class SampleNoiseTest(parameterized.TestCase, tf.test.TestCase):
    def _noise(self, seed, step, stream, **changes):
        config = dataclasses.replace(_CONFIG, **changes)
        return sample_noise(config, tf.constant([seed, step]), stream).numpy()

    def test_depends_on_seed_step_and_stream(self):
        base = self._noise(1, 2, 3)
        self.assertNotAllClose(base, self._noise(2, 2, 3))
        self.assertNotAllClose(base, self._noise(1, 3, 3))
        self.assertNotAllClose(base, self._noise(1, 2, 0))
        self.assertNotAllClose(base, self._noise(2, 1, 3))

    def test_depends_on_nothing_else(self):
        base = self._noise(1, 2, 3)
        tf.random.set_seed(99)
        tf.random.normal((3,))
        self.assertAllEqual(base, self._noise(1, 2, 3))
        graph = tf.function(lambda s: sample_noise(_CONFIG, s, 3))
        self.assertAllEqual(base, graph(tf.constant([1, 2])))

    def test_is_standard_normal(self):
        noise = self._noise(0, 0, 0, batch_size=200, noise_dim=100)
        self.assertEqual(noise.shape, (200, 100))
        self.assertAllClose(noise.mean(), 0.0, atol=0.03)
        self.assertAllClose(noise.std(), 1.0, atol=0.03)
        self.assertAllClose(np.mean(np.abs(noise) < 1), 0.6827, atol=0.02)


class GenerateTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.generator = build_generator(3, (4, 4, 1), channels=8, seed=1)

    def test_leaves_the_generator_bit_for_bit(self):
        before = helpers.copies(self.generator.weights)
        generate([self.generator], _CONFIG, 5, seed=1)
        self.assertTrue(helpers.all_equal(self.generator.weights, before))

    def test_a_sampler_compiles_once_and_follows_the_generator(self):
        with mock.patch.object(generator_module, "draw_parts", wraps=draw_parts) as f:
            sampler = Sampler([self.generator], _CONFIG)
            found = [sampler(n, seed) for n, seed in ((5, 1), (9, 2), (5, 1))]
            self.assertEqual(f.call_count, 1)
            expected = generate([self.generator], _CONFIG, 9, seed=2)
            self.assertAllEqual(found[1], expected)
            self.assertAllEqual(found[0], found[2])
            weight = self.generator.trainable_variables[0]
            weight.assign(-weight)
            self.assertNotAllEqual(sampler(5, 1), found[0])
        self.assertAllEqual(
            sampler(5, 1), generate([self.generator], _CONFIG, 5, seed=1)
        )

    def test_depends_on_the_seed_alone(self):
        images = generate([self.generator], _CONFIG, 5, seed=1)
        tf.random.set_seed(77)
        again = generate([self.generator], _CONFIG, 5, seed=1)
        other = generate([self.generator], _CONFIG, 5, seed=2)
        self.assertAllEqual(images, again)
        self.assertNotAllEqual(images, other)

    @parameterized.parameters(1, 4, 9)
    def test_gives_so_many_different_pixels(self, number):
        images = generate([self.generator], _CONFIG, number, seed=1)
        self.assertEqual(images.shape, (number, 4, 4, 1))
        self.assertEqual(images.dtype, np.uint8)
        self.assertLen(np.unique(images.reshape(number, -1), axis=0), number)

    def test_rounds_what_the_generator_makes_of_batches(self):
        images = generate([self.generator], _CONFIG, 8, seed=1)
        for i in range(2):
            noise = sample_noise(_CONFIG, tf.constant([1, i]), SAMPLE)
            pixels = self.generator(noise, training=True).numpy()
            batch = images[4 * i : 4 * (i + 1)]
            self.assertAllClose(batch.astype(float), pixels, rtol=0, atol=0.501)


class HeldOutTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ((8, 8, 1), 1000),
        ((96, 96, 3), 1000),
        ((224, 224, 3), 222),
        ((512, 512, 4), 100),
    )
    def test_large_images_are_fewer(self, shape, expected):
        self.assertEqual(held_out_count(shape), expected)


if __name__ == "__main__":
    tf.test.main()
