import dataclasses

from absl.testing import absltest, parameterized

from dfq_tf.errors import ConfigError
from tests import helpers


class ContextTest(parameterized.TestCase):
    def test_nobody_changes_it(self):
        context = helpers.context()
        for field in dataclasses.fields(context):
            with self.assertRaisesRegex(dataclasses.FrozenInstanceError, field.name):
                setattr(context, field.name, None)

    def test_nothing_is_left_out(self):
        for field in dataclasses.fields(helpers.context()):
            self.assertIs(field.default, dataclasses.MISSING, field.name)

    @parameterized.parameters(
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        (dict(precision="float8"), "precision is 'float8'; it must be one of"),
    )
    def test_limits_are_those_of_the_settings(self, changes, message):
        with self.assertRaisesRegex(ConfigError, message):
            helpers.context(**changes)


if __name__ == "__main__":
    absltest.main()
