import json
import pathlib
from unittest import mock

from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.distillation import plan as plans
from dfq_tf.errors import ConfigError
from dfq_tf.settings import BudgetConfig
from tests import helpers

PACE = plans.Pace(start=3.2, batch=2.0, answers=0.1, student=0.25)
CONFIG = BudgetConfig(student_steps=5, answer_uses=4, first_share=0.2)


class PlanTest(parameterized.TestCase):
    def test_seconds_are_those_of_all_steps(self):
        plan = plans.Plan(rounds=10, first=2, student_steps=5, answer_uses=4)
        self.assertEqual(plan.total_student_steps, 8 * 5)
        # Two batches are answered in a round, beside those of the beginning.
        expected = 3.2 + 10 * 2.0 + 8 * 2 * 0.1 + 40 * 0.25
        self.assertAlmostEqual(plan.seconds(PACE), expected)

    @parameterized.parameters(60, 333, 5000)
    def test_as_many_rounds_as_fit(self, seconds):
        config = BudgetConfig()
        plan = plans.plan_for(config, PACE, seconds, spent=0)
        self.assertLessEqual(plan.seconds(PACE), seconds)
        longer = plans.plan_of_rounds(config, plan.rounds + 1)
        self.assertGreater(longer.seconds(PACE), seconds)

    @parameterized.parameters(
        (7, 3, 0.4, 2, 9),
        (1000, 1, 0.1, 111, 1000),
        (10, 80, 0.9, 9, 80),
        (160, 80, 0.0, 0, 160),
    )
    def test_steps_that_are_asked_for(self, steps, each, share, first, total):
        """All of them, in whole rounds, behind the share of the other rounds."""
        config = BudgetConfig(steps=steps, student_steps=each, first_share=share)
        plan = plans.plan_of_steps(config)
        self.assertEqual((plan.first, plan.total_student_steps), (first, total))

    @parameterized.parameters((0.0, 0), (0.1, 2), (0.5, 10), (0.9, 18))
    def test_share_of_batches_before_the_students(self, share, first):
        config = BudgetConfig(first_share=share)
        self.assertEqual(plans.plan_of_rounds(config, 20).first, first)

    def test_too_short_a_time_says_the_least(self):
        config = BudgetConfig(minutes=0.5)
        # A batch, 32 + 20 answers, 80 student steps, and 4 s that are gone: 31.2 s.
        with self.assertRaisesRegex(
            ConfigError, r"^minutes is 0\.5; this machine needs at least 0\.6 for one"
        ):
            plans.plan_for(config, PACE, 26.0, spent=4.0)
        plan = plans.plan_for(config, PACE, 27.3, spent=4.0)
        self.assertEqual(plan.rounds, 1)

    def test_the_least_has_the_spare_time_in_it(self):
        """Of 36 s, 8.5 are gone and 3 % of the others stay: 26.675 for rounds."""
        with self.assertRaisesRegex(ConfigError, r"at least 0\.7 for one"):
            plans.plan_for(BudgetConfig(minutes=0.6), PACE, 26.675, spent=8.5)

    @parameterized.parameters(
        (1.0, "or lower batch_size, generator_steps or student_steps$"),
        (-1.0, "or lower generator_steps, or a batch_size above 128: the beginning"),
    )
    def test_what_is_to_be_lowered_takes_time(self, seconds, way_out):
        """Below 128 a smaller batch makes nothing of the images held out faster."""
        with self.assertRaisesRegex(ConfigError, way_out):
            plans.plan_for(BudgetConfig(minutes=0.5), PACE, seconds, 30.0 - seconds)


class KeptPlanTest(parameterized.TestCase, tf.test.TestCase):
    def kept(self, directory=None):
        plan = plans.KeptPlan(directory, CONFIG)
        plan.begin(plans.plan_of_rounds(CONFIG, 30), PACE, {"a": "b"})
        return plan

    def test_revision_holds_from_its_round_on(self):
        plan = self.kept()
        plan.revise(9, left=50.0, each=2.4)  # 20 more
        plan.revise(12, left=1.0, each=2.4)
        rounds = [plan.at(index).rounds for index in (0, 8, 9, 11, 12, 40)]
        self.assertEqual(rounds, [30, 30, 29, 29, 13, 13])
        self.assertEqual({plan.at(index).first for index in range(40)}, {6})
        self.assertEqual(plan.at(9).total_student_steps, (29 - 6) * 5)
        plan.begin(plans.plan_of_rounds(CONFIG, 20), PACE, {})
        self.assertEqual(plan.at(40).rounds, 20)

    def test_time_is_looked_at_each_tenth_of_the_way(self):
        plan = self.kept()  # 24 rounds with student steps
        due = [index for index in range(30) if plan.is_due(index)]
        self.assertEqual(due, [9, 12, 15, 18, 21, 24, 27])
        plan.revise(9, left=50.0, each=2.4)
        self.assertFalse(plan.is_due(9))  # decided is decided

    def test_another_run_of_the_folder_finds_it(self):
        folder = helpers.new_folder()
        self.assertIsNone(plans.KeptPlan(folder, CONFIG).first)
        self.kept(folder).revise(9, left=50.0, each=2.4)
        found = plans.KeptPlan(folder, CONFIG)
        self.assertEqual(found.first, plans.plan_of_rounds(CONFIG, 30))
        self.assertEqual((found.at(8).rounds, found.at(9).rounds), (30, 29))
        self.assertEqual(found.identity, {"a": "b"})
        found.revise(12, left=5.0, each=2.4)
        known = json.loads((folder / "distillation_plan.json").read_text())
        self.assertEqual(known["revised"], {"9": 29, "12": 14})
        self.assertEqual(known["pace"]["student"], 0.25)

    @parameterized.parameters(
        ('{"pace": {}}', "it says no rounds"),
        ('{"rounds": 9, "revised": [3]}', "what it says of revised rounds"),
        ('{"rounds": 9, "revised": {"a": 3}}', "what it says of revised rounds"),
        ('{"rounds": 9, "revised": {"5": null}}', "what it says of revised rounds"),
    )
    def test_damaged_file_is_named(self, text, reason):
        folder = pathlib.Path(helpers.new_folder())
        (folder / "distillation_plan.json").write_text(text)
        with self.assertRaisesRegex(ConfigError, f"distillation_plan.json .*{reason}"):
            plans.KeptPlan(folder, CONFIG)

    def test_without_a_folder_nothing_is_written(self):
        with mock.patch.object(plans, "write_text") as write:
            self.kept().revise(9, left=50.0, each=2.4)
        write.assert_not_called()


if __name__ == "__main__":
    tf.test.main()
