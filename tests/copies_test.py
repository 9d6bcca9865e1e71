import random
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.training import copies
from dfq_tf.training.learner import random_states
from tests import helpers, networks

layers = keras.layers


def nested():
    """A model inside of another one."""
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(16, 3, use_bias=False, name="conv")(image)
    body = keras.Model(image, layers.BatchNormalization()(x))
    return keras.Sequential([body, layers.GlobalAveragePooling2D(), layers.Dense(9)])


class HasFastBfloat16Test(parameterized.TestCase, tf.test.TestCase):
    @parameterized.named_parameters(
        ("amd", "vendor_id : AuthenticAMD\nflags : fpu avx512_bf16 sse2\n", True),
        ("intel", "vendor_id : GenuineIntel\nflags : fpu avx512_bf16 sse2\n", False),
        ("old_amd", "vendor_id : AuthenticAMD\nflags : fpu avx2 sse2\n", False),
        ("amx", "flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("neither", "flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("part_of_a_word", "flags\t\t: fpu xavx512_bf16 amx_bf16x\n", False),
        ("nothing", "", False),
    )
    def test_is_told_by_the_flags_of_the_processor(self, cpuinfo, expected):
        with mock.patch.object(tf.config, "get_visible_devices", return_value=[]):
            self.assertEqual(copies.has_fast_bfloat16(cpuinfo), expected)

    @parameterized.parameters(((7, 5), False), ((8, 0), True), ((9, 0), True))
    def test_gpu_decides_where_there_is_one(self, capability, expected):
        with (
            mock.patch.object(tf.config, "get_visible_devices", return_value=[0]),
            mock.patch.object(
                tf.config.experimental,
                "get_device_details",
                return_value={"compute_capability": capability},
            ),
        ):
            self.assertEqual(copies.has_fast_bfloat16("amx_bf16"), expected)
            self.assertEqual(copies.has_fast_bfloat16(""), expected)

    def test_gpu_that_the_program_has_hidden_decides_nothing(self):
        with (
            mock.patch.object(tf.config, "list_physical_devices", return_value=[0]),
            mock.patch.object(tf.config, "get_visible_devices", return_value=[]),
            mock.patch.object(
                tf.config.experimental,
                "get_device_details",
                return_value={"compute_capability": (9, 0)},
            ),
        ):
            self.assertFalse(copies.has_fast_bfloat16(""))


class ResolvePrecisionTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((True, "bfloat16"), (False, "float32"))
    def test_auto_takes_what_is_fast(self, is_fast, expected):
        with mock.patch.object(copies, "has_fast_bfloat16", return_value=is_fast):
            self.assertEqual(copies.resolve_precision("auto"), expected)
            self.assertEqual(copies.resolve_precision("float32"), "float32")
            self.assertEqual(copies.resolve_precision("bfloat16"), "bfloat16")

    def test_unknown_precision_names_the_choices(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"precision is 'half'; it must be one of \['auto', 'float32', 'bfloat16'\]",
        ):
            copies.resolve_precision("half")


class WithPrecisionTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.model = helpers.small_learner().model
        self.inputs = helpers.random_inputs(self.model)

    def test_float32_gives_equal_outputs(self):
        copy = copies.with_precision(self.model, "float32")
        self.assertAllEqual(copy(self.inputs), self.model(self.inputs))

    @parameterized.parameters("float32", "bfloat16")
    def test_copy_has_float32_variables_of_its_own(self, name):
        before = helpers.copies(self.model.weights)
        copy = copies.with_precision(self.model, name)
        self.assertTrue(helpers.all_equal(copy.weights, before))
        for variable in copy.weights:
            self.assertEqual(variable.dtype, tf.float32)
            variable.assign(tf.ones_like(variable) * 7)
        self.assertTrue(helpers.all_equal(self.model.weights, before))

    def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(self):
        copy = copies.with_precision(self.model, "bfloat16")
        self.assertEqual(copy.get_layer("conv1").compute_dtype, "bfloat16")
        self.assertEqual(copy.get_layer("bn2").compute_dtype, "bfloat16")
        self.assertEqual(copy.get_layer("logits").compute_dtype, "float32")
        output = copy(self.inputs)
        self.assertEqual(output.dtype, tf.float32)
        expected = self.model(self.inputs).numpy()
        self.assertAllClose(output, expected, atol=0.05 * np.abs(expected).max())
        self.assertNotAllEqual(output, expected)

    def test_scores_of_a_last_convolution_are_of_float32(self):
        image = layers.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, name="body")(image)
        x = layers.Conv2D(5, 6, name="head")(x)
        model = keras.Model(image, layers.Flatten()(x))
        for outputs, expected in (
            (model.output, ["bfloat16", "float32"]),
            (layers.ReLU()(x), ["bfloat16", "bfloat16"]),  # images
        ):
            copy = copies.with_precision(keras.Model(image, outputs), "bfloat16")
            found = [copy.get_layer(name).compute_dtype for name in ("body", "head")]
            self.assertEqual(found, expected)
        scores = copies.with_precision(model, "bfloat16")(helpers.random_inputs(model))
        rounded = tf.cast(tf.cast(scores, tf.bfloat16), tf.float32)
        self.assertNotAllEqual(scores, rounded)

    def test_further_outputs_are_bfloat16(self):
        outputs = [self.model.output, self.model.get_layer("bn1").output]
        several = keras.Model(self.model.input, outputs)
        copy = copies.with_precision(several, "bfloat16")
        logits, between = copy(self.inputs)
        self.assertEqual(logits.dtype, tf.float32)
        self.assertEqual(between.dtype, tf.bfloat16)

    def test_model_given_is_unchanged(self):
        copies.with_precision(self.model, "bfloat16")
        for layer in self.model.layers:
            self.assertEqual(layer.compute_dtype, "float32")

    def test_copy_draws_numbers_as_the_user_had_it(self):
        model = helpers.noisy_learner().model
        before = [layer.get_config() for layer in model.layers]
        random_states([model])
        copy = copies.with_precision(model, "float32")
        for layer, config in zip(copy.layers, before):
            self.assertEqual(layer.get_config(), config)

    def test_sequential_models_are_copied_too(self):
        model = keras.Sequential(
            [layers.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.Flatten()]
        )
        copy = copies.with_precision(model, "bfloat16")
        inputs = helpers.random_inputs(model)
        self.assertEqual(copy(inputs).dtype, tf.float32)
        self.assertAllClose(copy(inputs), model(inputs), atol=0.05)

    def test_models_inside_are_copied_too(self):
        """Such as a base of keras.applications below layers of one's own."""
        model = nested()
        self.assertIsInstance(model.layers[0], keras.Model)
        inputs = helpers.random_inputs(model)
        copy = copies.with_precision(model, "float32")
        self.assertAllEqual(copy(inputs), model(inputs))
        quick = copies.with_precision(model, "bfloat16")
        body, _, last = quick.layers
        self.assertEqual(body.get_layer("conv").compute_dtype, "bfloat16")
        self.assertEqual(last.compute_dtype, "float32")
        alone = copies.with_precision(keras.Sequential([nested()]), "bfloat16")
        (inner,) = alone.layers
        self.assertEqual(inner.layers[0].get_layer("conv").compute_dtype, "bfloat16")
        self.assertEqual(inner.layers[-1].compute_dtype, "float32")


class RandomizedTest(parameterized.TestCase, tf.test.TestCase):
    def test_seed_decides_the_kernels_of_models_inside(self):
        self.check(nested())

    def test_seed_decides_every_kernel(self):
        model = networks.NETWORKS["mobilenet_like"]()
        names = {weight.name.split("/")[-1] for weight in model.weights}
        self.assertContainsSubset({"kernel:0", "depthwise_kernel:0"}, names)
        self.check(model)

    @parameterized.parameters("wrn_10_1", "mobilenet_v1_25", "vgg_11")
    @pytest.mark.long
    def test_seed_decides_every_kernel_of_large_networks(self, name):
        self.check(models.build_model(name, (32, 32, 3), 10))

    def test_seed_decides_where_an_initializer_is_none_or_a_name(self):
        class Named(layers.Dense):
            def get_config(self):
                return {**super().get_config(), "kernel_initializer": "he_normal"}

        image = layers.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, kernel_initializer=None)(image)
        self.check(keras.Model(image, Named(5)(layers.Flatten()(x))))

    def test_seed_decides_the_kernels_of_layers_inside_layers(self):
        image = layers.Input((8, 8, 1))
        x = layers.TimeDistributed(layers.Conv1D(32, 3))(image)
        self.check(keras.Model(image, layers.Flatten()(x)))

    def test_wrapper_that_draws_leaves_the_random_state_as_it_is(self):
        image = layers.Input((8, 8, 1))
        x = layers.SpectralNormalization(layers.Conv2D(4, 3))(image)
        model = keras.Model(image, layers.Flatten()(x))
        keras.utils.set_random_seed(5)
        expected = random.random(), keras.src.backend._SEED_GENERATOR.generator.random()
        keras.utils.set_random_seed(5)
        one, same = (copies.randomized(model, 1).get_layer(index=1) for _ in range(2))
        found = random.random(), keras.src.backend._SEED_GENERATOR.generator.random()
        self.assertEqual(found, expected)
        self.assertAllEqual(one.layer.kernel, same.layer.kernel)
        self.assertAllEqual(one.vector_u, same.vector_u)

    def check(self, model):
        one, same, other = (copies.randomized(model, seed) for seed in (1, 1, 2))
        self.assertTrue(helpers.all_equal(one.weights, same.weights))
        for each in (model, other):
            for variable, another in zip(one.weights, each.weights):
                if "kernel" in variable.name:
                    self.assertNotAllEqual(variable, another, msg=variable.name)
                    # Drawn from the same distribution.
                    ratio = np.std(variable) / np.std(another)
                    self.assertBetween(ratio, 0.6, 1.7)
                else:
                    self.assertAllEqual(variable, another)

    def test_layers_of_one_shape_differ(self):
        model = copies.randomized(models.build_model("wrn_16_1", (8, 8, 1), 3), 0)
        kernels = [w.numpy() for w in model.weights if w.shape == (3, 3, 16, 16)]
        self.assertGreater(len(kernels), 2)
        self.assertLen({kernel.tobytes() for kernel in kernels}, len(kernels))

    def test_network_itself_and_the_random_state_stay(self):
        model = models.build_model("wrn_10_1", (8, 8, 1), 3)
        before = helpers.copies(model.weights)
        tf.random.set_seed(5)
        expected = tf.random.normal((3,))
        tf.random.set_seed(5)
        copies.randomized(model, 1)
        self.assertAllEqual(tf.random.normal((3,)), expected)
        self.assertTrue(helpers.all_equal(model.weights, before))


if __name__ == "__main__":
    tf.test.main()
