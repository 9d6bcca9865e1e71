import dataclasses
import io
import os
import pathlib
import types
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from dfq_tf import context as context_module
from dfq_tf.context import TrainingShown, counted, lines_alone, stage
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

    def test_seed_of_numpy_is_an_integer_that_does_not_overflow(self):
        seed = helpers.context(seed=np.uint8(255)).seed
        self.assertIs(type(seed), int)
        self.assertEqual(seed + 1, 256)

    @parameterized.parameters("~/run", pathlib.Path("~/run"))
    def test_directory_may_begin_at_home(self, directory):
        with mock.patch.dict(os.environ, HOME="/home/me"):
            context = helpers.context(directory=directory)
        self.assertEqual(context.directory, pathlib.Path("/home/me/run"))


class StageTest(parameterized.TestCase):
    def said(self, seconds, is_terminal, progress=True, **settings):
        """What a stage that lasts so long has written, before and after its end."""
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        clock = iter([10.0, 10.0 + seconds])
        with (
            mock.patch("sys.stderr", stream),
            mock.patch.object(context_module.time, "monotonic", lambda: next(clock)),
        ):
            with stage("calibration", progress, **settings):
                before = stream.getvalue()
        return before, stream.getvalue().removeprefix(before)

    def test_log_has_a_line_for_what_took_long(self):
        self.assertEqual(self.said(3.4, False), ("", "calibration: done in 3 s\n"))
        self.assertEqual(self.said(1.9, False), ("", ""))

    def test_line_may_take_longer(self):
        self.assertEqual(self.said(4.9, False, least_seconds=5.0), ("", ""))
        _, line = self.said(5.0, False, least_seconds=5.0)
        self.assertEqual(line, "calibration: done in 5 s\n")

    def test_terminal_is_told_at_once_and_cleared(self):
        cleared = f"\r{' ' * len('calibration ...')}\r"
        self.assertEqual(self.said(1.0, True), ("calibration ...", cleared))
        self.assertEqual(
            self.said(60.0, True),
            ("calibration ...", f"{cleared}calibration: done in 60 s\n"),
        )

    def test_nothing_is_said_unless_asked_for(self):
        self.assertEqual(self.said(60.0, True, progress=False), ("", ""))

    def test_terminal_has_the_lines_of_a_log_where_they_are_wanted(self):
        with lines_alone():
            said = self.said(60.0, True)
        self.assertEqual(said, ("", "calibration: done in 60 s\n"))
        with lines_alone(False):
            self.assertNotEqual(self.said(60.0, True), said)
        self.assertNotEqual(self.said(60.0, True), said)

    def test_what_raises_leaves_no_line(self):
        stream = io.StringIO()
        with mock.patch("sys.stderr", stream), self.assertRaises(ConfigError):
            with stage("calibration", True):
                raise ConfigError("no")
        self.assertEqual(stream.getvalue(), "")

    def counted_on_a_terminal(self, is_terminal=True, **settings):
        """What stderr has while parts are counted, and after each of them."""
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        seen = []
        with (
            mock.patch("sys.stderr", stream),
            mock.patch.object(context_module, "_WORTH_A_BAR", 0),
            stage("calibration", **{"progress": True, **settings}),
        ):
            for layer in counted(["a", "b"], "layers"):
                inner = list(counted([1, 2, 3], "images"))
                seen.append((layer, inner, stream.getvalue()))
            end = stream.getvalue()
        return seen, end

    def test_terminal_has_a_bar_for_the_parts_alone(self):
        seen, end = self.counted_on_a_terminal()
        self.assertEqual([each[:2] for each in seen], [(p, [1, 2, 3]) for p in "ab"])
        self.assertIn("calibration: layers:   0%", seen[0][2])
        self.assertNotIn("images", end)
        self.assertEndsWith(end, "\rcalibration ...")

    @parameterized.parameters({"is_terminal": False}, {"progress": False})
    def test_no_bar_where_nobody_looks(self, **settings):
        seen, end = self.counted_on_a_terminal(**settings)
        self.assertEqual([each[:2] for each in seen], [(p, [1, 2, 3]) for p in "ab"])
        self.assertEqual(end, "")

    def test_parts_outside_of_a_stage_say_nothing(self):
        with mock.patch("sys.stderr", io.StringIO()) as stream:
            self.assertEqual(list(counted(range(3), "layers")), [0, 1, 2])
        self.assertEqual(stream.getvalue(), "")


class StreamTest(absltest.TestCase):
    def test_error_stream_may_be_absent_closed_or_able_to_write_alone(self):
        written, closed = [], io.StringIO()
        closed.close()
        plain = types.SimpleNamespace(write=written.append)
        for stream in (None, closed, plain):
            with mock.patch("sys.stderr", stream), stage("calibration", True, 0.0):
                self.assertEqual(list(counted(range(2), "layers")), [0, 1])
                shown = TrainingShown("warm_up", 1, 0, True)
                shown.step(1)
                shown.measured({"loss": 1.0})
                shown.close(True)
        self.assertRegex("".join(written), r"^calibration: done in \d s\n$")


class TrainingShownTest(parameterized.TestCase):
    def said(
        self,
        times,
        is_terminal=False,
        progress=True,
        first=0,
        is_done=True,
        steps=5,
        total=10,
        seconds_left=None,
    ):
        """What five steps of ten write; `times` are those of the clock."""
        stream = io.StringIO()
        stream.isatty = lambda: is_terminal
        clock = iter(times)
        with mock.patch("sys.stderr", stream):
            with mock.patch.object(
                context_module.time, "monotonic", lambda: next(clock)
            ):
                shown = TrainingShown("warm_up", 10, first, progress, seconds_left)
                for _ in range(steps):
                    shown.step(total)
                    shown.measured({"loss": 0.123456, "agreement": 1.0})
                shown.close(is_done)
        return stream.getvalue()

    def test_log_has_a_line_a_minute_and_one_at_the_end(self):
        # Steps end at 30, 59, 60, 100 and 121 s: of the third and the last are lines.
        times = [10.0, 40, 69, 70, 110, 131, 131]
        self.assertEqual(
            self.said(times),
            "warm_up: step 3 of 10, about 140 s left, loss 0.1235, agreement 1\n"
            "warm_up: step 5 of 10, about 121 s left, loss 0.1235, agreement 1\n"
            "warm_up: 5 steps, done in 121 s, loss 0.1235, agreement 1\n",
        )

    def test_pace_is_that_of_this_run(self):
        times = [10.0, 20, 30, 40, 50, 110, 110]  # five steps in 100 s, one is left
        said = self.said(times, first=4)
        self.assertIn("warm_up: step 9 of 10, about 20 s left", said)
        self.assertIn("warm_up: 5 more steps, done in 100 s", said)

    def test_length_may_change_on_the_way(self):
        said = self.said([10.0, 80, 80], steps=1, total=3)
        self.assertIn("step 1 of 3, about 140 s left", said)

    def test_training_that_knows_its_time_says_that(self):
        """1 h 28 min 41 s: a step of 70 s, of ten, would make it 630 s."""

        def left():
            return 5321.0

        said = self.said([10.0, 80, 80], steps=1, seconds_left=left)
        self.assertIn("warm_up: step 1 of 10, about 5321 s left", said)
        said = self.said([10.0] * 6 + [70.0], is_terminal=True, seconds_left=left)
        self.assertRegex(said, r"warm_up: .*0/10 \[00:00<1:28:41,")

    def test_short_or_broken_training_has_no_line(self):
        times = [10.0, 10, 10, 10, 10, 10, 11.9]
        self.assertEqual(self.said(times), "")
        times[-1] = 12.0
        self.assertIn("done in 2 s", self.said(times))
        self.assertEqual(self.said(times, is_done=False), "")

    def test_one_step_is_one(self):
        self.assertStartsWith(
            self.said([10.0, 12, 12], steps=1), "warm_up: 1 step, done in 2 s, loss"
        )

    def test_nothing_is_said_unless_asked_for_or_left_to_do(self):
        times = [10.0] * 6 + [70.0]
        for is_terminal in (False, True):
            self.assertEqual(self.said(times, is_terminal, progress=False), "")
            self.assertEqual(self.said(times, is_terminal, first=10), "")

    def test_terminal_has_a_bar_and_no_line(self):
        with mock.patch.object(context_module, "_TimedBar") as made:
            self.assertEqual(self.said([10.0] * 6 + [70.0], is_terminal=True), "")
            self.assertFalse(made.call_args.kwargs["disable"])
            self.assertEqual(made.return_value.update.call_count, 5)
            self.said([10.0] * 6 + [70.0])
        self.assertTrue(made.call_args.kwargs["disable"])


if __name__ == "__main__":
    absltest.main()
