from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError
from dfq_tf.training import copies as precision
from tests import helpers

layers = keras.layers


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
        with mock.patch.object(tf.config, "list_physical_devices", return_value=[]):
            self.assertEqual(precision.has_fast_bfloat16(cpuinfo), expected)

    @parameterized.parameters(((7, 5), False), ((8, 0), True), ((9, 0), True))
    def test_gpu_decides_where_there_is_one(self, capability, expected):
        with (
            mock.patch.object(tf.config, "list_physical_devices", return_value=[0]),
            mock.patch.object(
                tf.config.experimental,
                "get_device_details",
                return_value={"compute_capability": capability},
            ),
        ):
            self.assertEqual(precision.has_fast_bfloat16("amx_bf16"), expected)
            self.assertEqual(precision.has_fast_bfloat16(""), expected)


class ResolvePrecisionTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((True, "bfloat16"), (False, "float32"))
    def test_auto_takes_what_is_fast(self, is_fast, expected):
        with mock.patch.object(precision, "has_fast_bfloat16", return_value=is_fast):
            self.assertEqual(precision.resolve_precision("auto"), expected)
            self.assertEqual(precision.resolve_precision("float32"), "float32")
            self.assertEqual(precision.resolve_precision("bfloat16"), "bfloat16")

    def test_unknown_precision_names_the_choices(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"precision is 'half'; it must be one of \['auto', 'float32', 'bfloat16'\]",
        ):
            precision.resolve_precision("half")


class WithPrecisionTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.model = helpers.small_classifier().model
        self.inputs = helpers.random_inputs(self.model)

    def test_float32_gives_equal_outputs(self):
        copy = precision.with_precision(self.model, "float32")
        self.assertAllEqual(copy(self.inputs), self.model(self.inputs))

    @parameterized.parameters("float32", "bfloat16")
    def test_copy_has_float32_variables_of_its_own(self, name):
        before = helpers.copies(self.model.weights)
        copy = precision.with_precision(self.model, name)
        self.assertTrue(helpers.all_equal(copy.weights, before))
        for variable in copy.weights:
            self.assertEqual(variable.dtype, tf.float32)
            variable.assign(tf.ones_like(variable) * 7)
        self.assertTrue(helpers.all_equal(self.model.weights, before))

    def test_bfloat16_computes_in_bfloat16_and_answers_in_float32(self):
        copy = precision.with_precision(self.model, "bfloat16")
        self.assertEqual(copy.get_layer("conv1").compute_dtype, "bfloat16")
        self.assertEqual(copy.get_layer("bn2").compute_dtype, "bfloat16")
        self.assertEqual(copy.get_layer("logits").compute_dtype, "float32")
        output = copy(self.inputs)
        self.assertEqual(output.dtype, tf.float32)
        expected = self.model(self.inputs).numpy()
        self.assertAllClose(output, expected, atol=0.05 * np.abs(expected).max())
        self.assertNotAllEqual(output, expected)

    def test_further_outputs_are_bfloat16(self):
        outputs = [self.model.output, self.model.get_layer("bn1").output]
        several = keras.Model(self.model.input, outputs)
        copy = precision.with_precision(several, "bfloat16")
        logits, between = copy(self.inputs)
        self.assertEqual(logits.dtype, tf.float32)
        self.assertEqual(between.dtype, tf.bfloat16)

    def test_model_given_is_unchanged(self):
        precision.with_precision(self.model, "bfloat16")
        for layer in self.model.layers:
            self.assertEqual(layer.compute_dtype, "float32")

    def test_sequential_models_are_copied_too(self):
        model = keras.Sequential(
            [layers.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.Flatten()]
        )
        copy = precision.with_precision(model, "bfloat16")
        inputs = helpers.random_inputs(model)
        self.assertEqual(copy(inputs).dtype, tf.float32)
        self.assertAllClose(copy(inputs), model(inputs), atol=0.05)


if __name__ == "__main__":
    tf.test.main()
