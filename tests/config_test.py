import dataclasses
import math

from absl.testing import parameterized

from dfq_tf import config
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError

_CLASSES = (
    config.TeacherConfig,
    config.RunConfig,
    config.BitWidths,
    config.DistillationConfig,
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


class ConfigTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*_CLASSES)
    def test_every_number_has_a_limit_and_every_field_a_help(self, cls):
        for field in dataclasses.fields(cls):
            self.assertTrue(field.metadata["help"].endswith("."), field.name)
            limits = [
                field.metadata[k] for k in ("minimum", "maximum", "above", "choices")
            ]
            if not isinstance(field.default, bool):
                self.assertTrue(any(v is not None for v in limits), field.name)

    @parameterized.named_parameters(_fields_with("minimum"))
    def test_minimum_is_allowed_and_less_is_refused(self, cls, field):
        limit = field.metadata["minimum"]
        kept = cls(**{field.name: type(field.default)(limit)})
        self.assertEqual(getattr(kept, field.name), limit)
        with self.assertRaisesRegex(
            ConfigError, f"^{field.name} is .*; it must be at least {limit}$"
        ):
            cls(**{field.name: _just_beyond(field, limit, -1)})

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

    def test_unknown_precision_names_the_choices(self):
        with self.assertRaisesRegex(
            ConfigError,
            r"precision is 'float16'; it must be one of "
            r"\['auto', 'float32', 'bfloat16'\]",
        ):
            config.RunConfig(precision="float16")

    @parameterized.parameters(*_CLASSES)
    def test_settings_are_frozen(self, cls):
        name = dataclasses.fields(cls)[0].name
        with self.assertRaisesRegex(dataclasses.FrozenInstanceError, name):
            setattr(cls(), name, 1)

    def test_unknown_method_names_the_choices(self):
        for method in config.METHODS:
            self.assertIsNone(config.check_method(method))
        with self.assertRaisesRegex(
            ConfigError, r"method is 'qat'; it must be one of \['df_q', 'df_qat_kd'\]"
        ):
            config.check_method("qat")


if __name__ == "__main__":
    tf.test.main()
