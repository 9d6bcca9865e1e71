import dataclasses
import fractions
import math
import pathlib
import re

import numpy as np
from absl.testing import parameterized

from dfq_tf import settings
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError

_CLASSES = (
    settings.TeacherConfig,
    settings.RunConfig,
    settings.BitWidths,
    settings.CalibrationConfig,
    settings.DistillationConfig,
    settings.BudgetConfig,
    settings.ReconstructionConfig,
)


def _fields_with(limit):
    for cls in _CLASSES:
        for field in dataclasses.fields(cls):
            if field.metadata[limit] is not None:
                yield f"{cls.__name__}_{field.name}", cls, field


def _just_beyond(field, limit, sign):
    """The nearest value outside a limit: one off for integers, a little for floats."""
    if isinstance(field.default, int):
        return limit + sign
    return math.nextafter(float(limit), sign * math.inf)


class SettingsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*_CLASSES)
    def test_every_number_has_a_limit_and_every_field_a_help(self, cls):
        for field in dataclasses.fields(cls):
            self.assertTrue(field.metadata["help"].endswith("."), field.name)
            limits = [
                field.metadata[k] for k in ("minimum", "maximum", "above", "choices")
            ]
            # A folder has any name.
            if not isinstance(field.default, bool) and field.name != "images":
                self.assertTrue(any(v is not None for v in limits), field.name)

    @parameterized.named_parameters(_fields_with("minimum"))
    def test_minimum_is_allowed_and_less_is_refused(self, cls, field):
        limit = field.metadata["minimum"]
        kept = cls(**{field.name: type(field.default)(limit)})
        self.assertEqual(getattr(kept, field.name), limit)
        # Where 0 stands for auto, what is refused lies beyond it.
        rest = ", or 0 for auto" if field.metadata["auto"] else ""
        beyond = -1 if field.metadata["auto"] else _just_beyond(field, limit, -1)
        with self.assertRaisesRegex(
            ConfigError, f"^{field.name} is .*; it must be at least {limit}{rest}$"
        ):
            cls(**{field.name: beyond})

    @parameterized.named_parameters(_fields_with("maximum"))
    def test_maximum_is_allowed_and_more_is_refused(self, cls, field):
        limit = field.metadata["maximum"]
        kept = cls(**{field.name: type(field.default)(limit)})
        self.assertEqual(getattr(kept, field.name), limit)
        with self.assertRaisesRegex(
            ConfigError, f"^{field.name} is .*; it must be at most {limit}$"
        ):
            cls(**{field.name: _just_beyond(field, limit, 1)})

    @parameterized.named_parameters(_fields_with("above"))
    def test_open_limit_itself_is_refused(self, cls, field):
        limit = field.metadata["above"]
        smallest = _just_beyond(field, limit, 1)
        self.assertEqual(getattr(cls(**{field.name: smallest}), field.name), smallest)
        for value in (limit, limit - 1):
            with self.assertRaisesRegex(
                ConfigError, f"^{field.name} is {value}; it must be above {limit}$"
            ):
                cls(**{field.name: value})

    @parameterized.named_parameters(_fields_with("choices"))
    def test_each_choice_is_allowed_and_any_other_refused(self, cls, field):
        for choice in field.metadata["choices"]:
            kept = cls(**{field.name: choice})
            self.assertEqual(getattr(kept, field.name), choice)
        with self.assertRaisesRegex(
            ConfigError, rf"^{field.name} is 'other'; it must be one of \['"
        ):
            cls(**{field.name: "other"})

    @parameterized.parameters(math.nan, math.inf, -math.inf)
    def test_numbers_that_are_not_finite_are_refused(self, value):
        for cls in _CLASSES:
            for field in dataclasses.fields(cls):
                if isinstance(field.default, float):
                    with self.assertRaisesRegex(
                        ConfigError, f"^{field.name} is .*; it must be a finite number"
                    ):
                        cls(**{field.name: value})

    @parameterized.parameters(
        (settings.BitWidths, "num_bits_weight", 2, 8),
        (settings.BitWidths, "num_bits_activation", 2, 16),
        (settings.BitWidths, "num_bits_first", 2, 8),
        (settings.BitWidths, "num_bits_last", 2, 8),
        (settings.BitWidths, "num_bits_depthwise", 2, 8),
        (settings.CalibrationConfig, "activation_percentile", None, 100),
    )
    def test_numbers_of_quantization_have_these_limits(self, cls, name, low, high):
        for limit, sign in ((low, -1), (high, 1)):
            if limit is not None:
                self.assertEqual(getattr(cls(**{name: limit}), name), limit)
                with self.assertRaisesRegex(ConfigError, f"{name} is {limit + sign};"):
                    cls(**{name: limit + sign})

    def test_large_images_need_fewer_for_calibration(self):
        auto = settings.CalibrationConfig()
        for side, count in ((8, 1024), (64, 1024), (96, 455), (128, 256), (512, 256)):
            self.assertEqual(auto.image_count((side, side, 3)), count)
        self.assertEqual(auto.image_count((32, 256, 1)), 512)
        asked = settings.CalibrationConfig(calibration_images=7)
        self.assertEqual(asked.image_count((512, 512, 3)), 7)
        with self.assertRaisesRegex(ConfigError, "is -1; it must be at least 1, or 0"):
            settings.CalibrationConfig(calibration_images=-1)

    def test_images_come_from_somewhere(self):
        for name in (*settings.SOURCES, "~/pictures"):
            self.assertEqual(settings.CalibrationConfig(images=name).images, name)
        with self.assertRaisesRegex(ConfigError, "images is empty; it takes one of"):
            settings.CalibrationConfig(images="")

    def test_a_percentile_is_more_than_half(self):
        # Half the values below the upper end and half above the lower: no range.
        kept = settings.CalibrationConfig(activation_percentile=50.5)
        self.assertEqual(kept.activation_percentile, 50.5)
        with self.assertRaisesRegex(
            ConfigError, "activation_percentile is 50; it must be above 50"
        ):
            settings.CalibrationConfig(activation_percentile=50)

    def test_weights_have_no_percentile(self):
        for method in ("min_max", "percentile", "mse"):
            kept = settings.CalibrationConfig(activation_range=method)
            self.assertEqual(kept.activation_range, method)
        with self.assertRaisesRegex(
            ConfigError,
            r"weight_range is 'percentile'; it must be one of \['min_max', 'mse'\]",
        ):
            settings.CalibrationConfig(weight_range="percentile")

    def test_unknown_precision_names_the_choices(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"precision is 'float16'; it must be one of "
            r"\['auto', 'float32', 'bfloat16'\]",
        ):
            settings.RunConfig(precision="float16")

    def test_numbers_that_are_equal_are_one_setting(self):
        """Also as texts, by which a run knows its own checkpoints."""
        whole, point = (settings.BudgetConfig(minutes=m) for m in (30, 30.0))
        self.assertEqual(str(whole), str(point))
        self.assertIs(type(settings.BudgetConfig(steps=3).steps), int)

    @parameterized.parameters(
        (settings.BitWidths, "per_channel", "no", "True or False"),
        (settings.BitWidths, "per_channel", 1, "True or False"),
        (settings.CalibrationConfig, "equalize", "false", "True or False"),
        (settings.CalibrationConfig, "equalize", None, "True or False"),
        (settings.BitWidths, "num_bits_weight", 4.5, "an integer"),
        (settings.BitWidths, "num_bits_weight", "4", "an integer"),
        (settings.BitWidths, "num_bits_weight", True, "an integer"),
        (settings.ReconstructionConfig, "rec_steps", 1.5, "an integer"),
        (settings.ReconstructionConfig, "rec_steps", 3.0, "an integer"),
        (settings.DistillationConfig, "rounds", "3", "an integer"),
        (settings.DistillationConfig, "rounds", "auto", "an integer"),
        (settings.CalibrationConfig, "calibration_images", 16.5, "an integer, or"),
        (settings.BudgetConfig, "batch_size", "many", "an integer, or 'auto'"),
        (settings.DistillationConfig, "batch_size", None, "an integer, or 'auto'"),
        (settings.DistillationConfig, "temperature", "1", "a number"),
        (settings.DistillationConfig, "temperature", True, "a number"),
        (settings.DistillationConfig, "temperature", np.ones(2), "a number"),
        (settings.CalibrationConfig, "images", 5, r"a text \(str\)"),
        (settings.FileConfig, "model_name", 3, r"a text \(str\)"),
        (settings.FileConfig, "model_name", b"x", r"a text \(str\)"),
        (settings.FileConfig, "target_size", 0.5, r"a text \(str\)"),
        (settings.FileConfig, "target", pathlib.Path("micro"), r"one of \['android'"),
        (settings.RunConfig, "seed", np.float32(1), "an integer"),
    )
    def test_another_type_is_refused(self, cls, name, value, wanted):
        with self.assertRaisesRegex(ConfigError, f"^{name} is .*; it must be {wanted}"):
            cls(**{name: value})

    @parameterized.parameters(
        (settings.BitWidths, "per_channel", np.bool_(False), False),
        (settings.BitWidths, "num_bits_weight", np.int64(4), 4),
        (settings.DistillationConfig, "temperature", 2, 2.0),
        (settings.DistillationConfig, "temperature", np.float32(0.5), 0.5),
        (settings.DistillationConfig, "temperature", np.int32(2), 2.0),
        (settings.DistillationConfig, "temperature", fractions.Fraction(1, 2), 0.5),
        (settings.CalibrationConfig, "images", pathlib.Path("a/b"), "a/b"),
        (settings.FileConfig, "kernel_costs", pathlib.Path("costs.json"), "costs.json"),
        (settings.CalibrationConfig, "calibration_images", "auto", settings.AUTO),
        (settings.DistillationConfig, "batch_size", "auto", settings.AUTO),
        (settings.BudgetConfig, "batch_size", "auto", settings.AUTO),
    )
    def test_what_stands_for_a_value_becomes_one_of_python(
        self, cls, name, value, wanted
    ):
        kept = getattr(cls(**{name: value}), name)
        self.assertEqual(kept, wanted)
        self.assertIs(type(kept), type(wanted))

    @parameterized.parameters(*_CLASSES)
    def test_settings_are_frozen(self, cls):
        name = dataclasses.fields(cls)[0].name
        with self.assertRaisesRegex(dataclasses.FrozenInstanceError, name):
            setattr(cls(), name, 1)

    def test_unknown_method_names_the_choices(self):
        limits = {"choices": settings.METHODS}
        for method in settings.METHODS:
            self.assertIsNone(settings.check_value("method", method, limits))
        with self.assertRaisesRegex(
            ConfigError,
            r"method is 'qat'; it must be one of "
            r"\['df_q', 'df_rec', 'df_qat_kd', 'df_rec_kd'\]",
        ):
            settings.check_value("method", "qat", limits)


class BitWidthsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*range(9, 16))
    def test_activations_that_no_file_can_hold_are_refused(self, num_bits):
        with self.assertRaisesRegex(
            ConfigError,
            f"^num_bits_activation is {num_bits}; TFLite stores activations in 8 or 16 "
            "bits, so it must be 2 to 8, or 16$",
        ):
            settings.BitWidths(num_bits_activation=num_bits)

    @parameterized.parameters(2, 3, 4, 5, 6, 7, 8, 16)
    def test_other_activations_are_allowed(self, num_bits):
        widths = settings.BitWidths(num_bits_activation=num_bits)
        self.assertEqual(widths.num_bits_activation, num_bits)

    @parameterized.parameters(((8, 8), "W8A8"), ((4, 16), "W4A16"), ((2, 5), "W2A5"))
    def test_name_tells_weights_and_activations(self, bits, name):
        self.assertEqual(settings.BitWidths(*bits).name, name)
        others = dict(num_bits_first=3, num_bits_last=6, num_bits_depthwise=7)
        self.assertEqual(settings.BitWidths(*bits, **others).name, name)


class MixedWidthsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ({"stem": 4, "last": np.int64(2)},),
        ([["stem", 4], ["last", 2]],),
        ((("stem", 4), ("last", 2)),),
    )
    def test_bits_of_kernels_are_a_mapping_or_pairs(self, given):
        widths = settings.MixedWidths(layer_bits=given)
        self.assertEqual(widths.layer_bits, (("stem", 4), ("last", 2)))
        self.assertIsInstance(hash(widths), int)

    @parameterized.parameters(
        ("stem",), (5,), (None,), (("stem", 4),), ({3: 4},), ([("stem", 4, 8)],)
    )
    def test_what_names_no_kernels_is_refused(self, given):
        with self.assertRaisesRegex(
            ConfigError, "^layer_bits is .*; give the bits .*, such as {'conv': 4}$"
        ):
            settings.MixedWidths(layer_bits=given)

    def test_a_kernel_that_is_named_twice_is_refused(self):
        given = [("stem", 4), ("last", 2), ("stem", 8)]
        with self.assertRaisesRegex(ConfigError, "^layer_bits has 'stem' twice"):
            settings.MixedWidths(layer_bits=given)

    @parameterized.parameters(4.0, "4", True, None)
    def test_bits_that_are_no_integer_are_refused(self, bits):
        with self.assertRaisesRegex(
            ConfigError, f"^layer_bits of stem is {bits!r}; it must be an integer$"
        ):
            settings.MixedWidths(layer_bits={"stem": bits})


class EffectsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        (
            settings.CalibrationConfig(activation_percentile=99.0),
            "activation_percentile is 99.0, which has no effect where activation_range "
            "is 'auto'. Leave activation_percentile out, or give "
            "activation_range='percentile'",
        ),
        (
            settings.CalibrationConfig(images="photographs", logits_margin=3.0),
            "logits_margin is 3.0, which has no effect where images is 'photographs'. "
            "Leave logits_margin out, or give photographs_logits_margin",
        ),
        *(
            (
                settings.CalibrationConfig(images=images, **{name: 1.25}),
                f"{name} is 1.25, which has no effect where images is {images!r}. "
                f"Leave {name} out, or give logits_margin",
            )
            for images, name in (
                ("generated", "photographs_logits_margin"),
                ("my/pictures", "photographs_logits_margin"),
            )
        ),
        *(
            (
                settings.CalibrationConfig(images=images, **{name: 0.25}),
                f"{name} is 0.25, which has no effect where images is {images!r}. "
                f"Leave {name} out, or give images={wanted!r}",
            )
            for images, name, wanted in (
                ("photographs", "synthesized_in_lessons", "generated"),
                ("my/pictures", "synthesized_in_lessons", "generated"),
                ("generated", "photographs_in_lessons", "auto"),
            )
        ),
        (
            settings.DistillationConfig(student_momentum=0.5),
            "student_momentum is 0.5, which has no effect where student_optimizer is "
            "'adam'. Leave student_momentum out, or give student_optimizer='sgd'",
        ),
        *(
            (
                settings.DistillationConfig(pool_images=0, **{name: value}),
                f"{name} is {value}, which has no effect where pool_images is 0. Leave "
                f"{name} out, or give pool_images",
            )
            for name, value in (
                ("noise_share", 0.3),
                ("mixup_share", 0.1),
                ("cutmix_share", 0.1),
                ("answer_uses", 7),
                ("pool_batch_size", 7),
            )
        ),
        (
            settings.BudgetConfig(student_optimizer="sgd", muon_learning_rate=0.125),
            "muon_learning_rate is 0.125, which has no effect where student_optimizer "
            "is 'sgd'. Leave muon_learning_rate out, or give student_optimizer='muon'",
        ),
    )
    def test_what_another_setting_leaves_without_effect_is_refused(self, kept, message):
        with self.assertRaisesRegex(ConfigError, f"^{re.escape(message)}$"):
            kept.check_effects()

    @parameterized.parameters(
        settings.CalibrationConfig(
            activation_range="percentile", activation_percentile=99.0
        ),
        # What auto takes decides.
        settings.CalibrationConfig(
            logits_margin=3.0,
            photographs_logits_margin=1.25,
            photographs_in_lessons=0.25,
            synthesized_in_lessons=0.25,
        ),
        settings.CalibrationConfig(
            images="photographs",
            photographs_logits_margin=1.25,
            photographs_in_lessons=0.0,
            synthesized_in_lessons=0.0,
        ),
        settings.CalibrationConfig(images="generated", synthesized_in_lessons=0.25),
        settings.CalibrationConfig(images="my/pictures", logits_margin=3.0),
        settings.DistillationConfig(student_optimizer="sgd", student_momentum=0.5),
        settings.BudgetConfig(student_optimizer="sgd", student_momentum=0.5),
        settings.BudgetConfig(muon_learning_rate=0.125, student_momentum=0.5),
        *map(settings.recipe, settings.RECIPES),
        *map(settings.qat_recipe, settings.QAT_RECIPES),
        *(cls() for cls in _CLASSES),
    )
    def test_what_has_an_effect_is_taken(self, kept):
        self.assertIsNone(kept.check_effects())


class RangesLearnTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((True, "adam"), (True, "sgd"), (False, "adam"))
    def test_ranges_train_with_adam_alone(self, learn, optimizer):
        config = settings.DistillationConfig(
            learn_ranges=learn, student_optimizer=optimizer
        )
        self.assertEqual(config.trains_ranges, learn and optimizer == "adam")


class ParseWidthsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("W4A8", 4, 8), ("w4a8", 4, 8), ("W2a16", 2, 16), (" W8A4\n", 8, 4)
    )
    def test_reads_weights_then_activations(self, name, weight, activation):
        widths = settings.parse_widths(name)
        self.assertEqual(widths.num_bits_weight, weight)
        self.assertEqual(widths.num_bits_activation, activation)

    def test_every_name_reads_as_what_it_names(self):
        for weight in range(2, 9):
            for activation in (4, 5, 6, 7, 8, 16):
                widths = settings.BitWidths(weight, activation)
                self.assertEqual(settings.parse_widths(widths.name), widths)

    def test_keeps_all_other_settings(self):
        others = dict(
            per_channel=False, num_bits_first=3, num_bits_last=6, num_bits_depthwise=7
        )
        widths = settings.parse_widths("W4A16", settings.BitWidths(5, 6, **others))
        self.assertEqual(widths, settings.BitWidths(4, 16, **others))

    @parameterized.parameters(
        "", "W4", "A8", "4/8", "48", "A8W4", "W4A", "WA", "W-4A8", "W4A8.0", "W4 A8"
    )
    def test_another_form_is_refused(self, name):
        with self.assertRaisesRegex(
            ConfigError,
            f"^widths is {name!r}; write the bits of weights and activations as W4A8$",
        ):
            settings.parse_widths(name)

    @parameterized.parameters(
        ("W1A8", "num_bits_weight is 1; it must be at least 2"),
        ("W9A8", "num_bits_weight is 9; it must be at most 8"),
        ("W4A1", "num_bits_activation is 1; it must be at least 2"),
        ("W4A17", "num_bits_activation is 17; it must be at most 16"),
        *(
            (f"W4A{bits}", f"num_bits_activation is {bits}; TFLite stores")
            for bits in range(9, 16)
        ),
    )
    def test_a_width_out_of_its_limits_is_refused(self, name, message):
        with self.assertRaisesRegex(ConfigError, f"^widths is '{name}': {message}"):
            settings.parse_widths(name)


class DistillationConfigTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        (
            dict(num_generators=5, batch_size=4),
            "num_generators is 5, more than the batch_size 4: a batch has an image of "
            "each generator",
        ),
        (
            dict(bank_images=10, pool_images=0),
            "bank_images is 10 and generator_steps is 0; the images are those of "
            "generator steps",
        ),
        (
            dict(share_images=True, pool_images=0),
            "share_images is True and generator_steps is 0; the images are those of "
            "generator steps",
        ),
        (
            dict(pool_images=0, bank_images=10, share_images=True),
            "bank_images is 10 and share_images is True; a student step takes its "
            "images from one of them. Set bank_images to 0, or leave share_images out",
        ),
        (
            dict(pool_images=7, bank_images=10, generator_steps=1),
            "pool_images is 7 and bank_images is 10; a student step takes its images "
            "from one of them. Set pool_images to 0, or leave bank_images out",
        ),
        (
            dict(noise_share=0.75, mixup_share=0.5, cutmix_share=0.0),
            "the shares are noise_share 0.75, mixup_share 0.5, cutmix_share 0, 1.25 "
            "together; they must be at most 1, and what is left is generated images",
        ),
    )
    def test_contradictions_are_refused(self, fields, message):
        with self.assertRaisesRegex(ConfigError, f"^{message}$"):
            settings.DistillationConfig(**fields)

    def test_shares_of_no_pool_may_be_left_out_or_0(self):
        for shares in ({}, dict(noise_share=0.0, mixup_share=0.0)):
            config = settings.DistillationConfig(pool_images=0, **shares)
            self.assertIsNone(config.check_effects())

    def test_what_hangs_on_the_network_is_auto_by_default(self):
        self.assertEqual(settings.AUTO, 0)
        fields = [f for cls in _CLASSES for f in dataclasses.fields(cls)]
        names = [field.name for field in fields if field.metadata["auto"]]
        self.assertEqual(names, ["calibration_images", "batch_size", "batch_size"])
        for name in settings.RECIPES:
            self.assertEqual(settings.recipe(name).batch_size, settings.AUTO)
        self.assertEqual(settings.DistillationConfig().batch_size, settings.AUTO)
        # There is nothing yet that the generators could be more than.
        kept = settings.DistillationConfig(batch_size=settings.AUTO, num_generators=500)
        self.assertEqual((kept.batch_size, kept.num_generators), (0, 500))

    def test_paper_is_the_loop_of_choi_et_al(self):
        paper = settings.recipe("paper")
        self.assertEqual((paper.generator_steps, paper.student_steps), (1, 1))
        # Every step on fresh noise, the losses as they are published.
        self.assertEqual((paper.bank_images, paper.share_images), (0, False))
        self.assertEqual(paper.temperature, 1.0)
        self.assertEqual((paper.adversarial_ramp_steps, paper.alpha), (0, 1.0))
        self.assertEqual(paper.noise_dim, 512)
        self.assertEqual(paper.generator_learning_rate, 1e-3)
        self.assertEqual(paper.student_optimizer, "sgd")
        self.assertEqual(
            (paper.student_learning_rate, paper.student_momentum), (0.1, 0.9)
        )

    def test_recipes_of_quantized_students(self):
        pool = settings.qat_recipe("pool")
        self.assertEqual(pool, settings.DistillationConfig())
        self.assertEqual(pool.generator_steps, 0)
        shares = [pool.share_of(kind) for kind in ("noise", "photographs")]
        self.assertEqual(shares, [0.15, 0.0])
        paper = settings.qat_recipe("paper", rounds=7)
        # Every round trains a generator; student steps are on fresh noise.
        self.assertEqual((paper.rounds, paper.generator_steps), (7, 1))
        self.assertEqual(
            (paper.pool_images, paper.bank_images, paper.share_images), (0, 0, False)
        )
        self.assertEqual(paper.student_augmentation, "none")
        with self.assertRaisesRegex(
            ConfigError, "^noise_share is 0.5, but the recipe paper has no such setting"
        ):
            settings.qat_recipe("paper", noise_share=0.5)

    def test_changes_take_the_place_of_the_recipes_settings(self):
        for name in settings.RECIPES:
            changed = settings.recipe(name, student_steps=7, temperature=2.0)
            expected = dataclasses.replace(
                settings.recipe(name), student_steps=7, temperature=2.0
            )
            self.assertEqual(changed, expected)

    def test_setting_of_another_recipe_is_refused(self):
        for name, setting in (
            ("budget", "rounds"),
            ("bank", "minutes"),
            ("bank", "noise_share"),
            ("paper", "pool_images"),
        ):
            with self.assertRaisesRegex(
                ConfigError, f"^{setting} is 7, but the recipe {name} has no such setti"
            ):
                settings.recipe(name, **{setting: 7})

    def test_shares_of_more_than_all_are_refused(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"^the shares are noise_share 0\.5, .* 1\.15 together; they must be at mo",
        ):
            settings.recipe("budget", noise_share=0.5, photographs_share=0.5)
        # Floats of these add up to more than 1.
        tenths = dict(noise_share=0.4, photographs_share=0.2)
        tenths |= dict(mixup_share=0.3, cutmix_share=0.1)
        self.assertEqual(settings.recipe("budget", **tenths).mixup_share, 0.3)
        whole = dict(noise_share=0.5, photographs_share=0.35)
        budget = settings.recipe("budget", **whole)
        self.assertEqual(budget.share_of("photographs"), 0.35)

    def test_unknown_recipe_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"^recipe is 'soup'; it must be one of \['budget', 'bank', 'paper'\]$",
        ):
            settings.recipe("soup")

    def test_settings_of_a_phase_are_settings(self):
        names = [
            field.name for field in dataclasses.fields(settings.DistillationConfig)
        ]
        self.assertContainsSubset(settings.PHASE_SETTINGS, names)
        self.assertContainsSubset(
            {name for recipe in settings.RECIPES.values() for name in recipe},
            settings.PHASE_SETTINGS,
        )


if __name__ == "__main__":
    tf.test.main()
