import functools
from unittest import mock

import numpy as np
from absl.testing import absltest

from tools import common, compare
from dfq_tf import api
from dfq_tf.compat import tf
from dfq_tf.errors import DfqError
from dfq_tf.quantization import Calibrated
from dfq_tf.reports import plots
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    BitWidths,
    DistillationConfig,
    ReconstructionConfig,
    qat_recipe,
)
from tests import helpers


class RoundsTest(absltest.TestCase):
    """Yardsticks take as many rounds as DF-QAT-KD took."""

    def test_those_that_there_was_time_for_or_all(self):
        config = DistillationConfig(rounds=100)
        rows = {"W8A8/df_qat_kd": {"rounds": 7}, "W4A8/df_qat_kd": {"failure": "NaN"}}
        for widths, expected in (("W8A8", 7), ("W4A8", 100), ("W4A4", 100)):
            self.assertEqual(compare.rounds_of(rows, widths, config), expected)

    def test_a_row_of_other_rounds_is_made_again(self):
        config = DistillationConfig(rounds=100)
        rows = {
            "W8A8/df_q": {"accuracy": 0.5},
            "W8A8/df_qat_kd": {"rounds": 7},
            "W8A8/qat": {"rounds": 100},
            "W8A8/qat_kd": {"rounds": 7},
            "W4A8/qat": {"failure": "NaN"},
            "W4A8/qat_kd": {"rounds": 100},
            "W4A4/qat": {"accuracy": 0.5},  # of a version that kept no rounds
        }
        made = {
            name for name in rows if compare.is_made(rows, *name.split("/"), config)
        }
        self.assertEqual(made, rows.keys() - {"W8A8/qat", "W4A8/qat"})
        self.assertFalse(compare.is_made(rows, "W4A4", "df_q", config))

    def test_they_come_behind_it(self):
        columns = ["q", "qat", "df_q", "df_qat_kd"]
        self.assertEqual(compare.in_order(columns), ["q", "df_q", "df_qat_kd", "qat"])


class SharedTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.seconds = 0.0
        clock = mock.patch.object(compare.time, "monotonic", lambda: self.seconds)
        self.enter_context(clock)
        self.workdir = Workdir(helpers.new_folder(), {})

    def making(self, seconds):
        """What takes so long and gives a number."""

        def make():
            self.seconds += seconds
            return seconds

        return make

    def row(self, shared, *needed, own=0):
        """The minutes of a row that needs so much, as (name, seconds to make it)."""
        shared.begin()
        for name, seconds in needed:
            shared(name, self.making(seconds))
        self.seconds += own
        return shared.minutes

    def test_what_rows_share_is_made_once_and_counts_in_each(self):
        shared = compare.Shared(self.workdir)
        shared("images", self.making(60))
        images, lessons = ("images", 60), ("lessons", 120)
        self.assertEqual(self.row(shared, images, own=30), 1.5)
        self.assertEqual(self.row(shared, images, lessons, own=30), 3.5)
        self.assertEqual(self.row(shared, images, lessons), 3.0)
        self.assertEqual(self.row(shared, own=30), 0.5)
        self.assertEqual(self.row(shared, images), 1.0)
        self.assertEqual(self.seconds, 60 + 30 + 120 + 30 + 30)
        self.assertEqual(shared("images", self.fail), 60)

    def test_a_later_call_knows_what_it_took(self):
        self.row(compare.Shared(self.workdir), ("images", 60))
        later = compare.Shared(self.workdir)
        self.assertEqual(self.row(later, ("images", 6), own=30), 1.5)
        self.assertEqual(self.workdir.metrics()["shared_minutes"], {"images": 1.0})

    def test_calls_that_were_interrupted_count(self):
        shared = compare.Shared(self.workdir)
        shared.begin(earlier=30)
        shared("lessons", self.making(60), earlier=120)
        self.seconds += 30
        self.assertEqual(shared.minutes, 4.0)
        # It is known since: what its checkpoints say counts no second time.
        later = compare.Shared(self.workdir)
        later("lessons", self.making(6), earlier=180)
        self.assertEqual(later.minutes, 3.0)

    def test_warm_up_that_a_training_needs_counts_in_each(self):
        """Where photographs calibrate; generated images have it in them already."""
        test = self

        class Prepared:
            judging, calibrated = None, mock.Mock()

            @functools.cached_property
            def warmed(self):
                test.seconds += 60

        def trained(prepared, *_):
            _ = prepared.warmed
            self.seconds += 30
            return None, [], {}

        for generators, expected in (([], [1.5, 1.5]), ([None], [0.5, 0.5])):
            comparison, prepared = object.__new__(compare.Comparison), Prepared()
            prepared.generators = generators
            if generators:
                _ = prepared.warmed
            comparison.workdir = Workdir(helpers.new_folder(), {})
            comparison._shared = compare.Shared(comparison.workdir)
            comparison._config = qat_recipe("paper", batch_size=8)
            comparison._prepare = mock.Mock(return_value=prepared)
            minutes = []
            for bits in (8, 4):
                widths = BitWidths(num_bits_weight=bits)
                comparison._shared.begin()
                with (
                    mock.patch.object(common, "context"),
                    mock.patch.object(api, "trained", trained),
                ):
                    folder = comparison.workdir.path
                    comparison._network(widths, "df_qat_kd", folder)
                minutes.append(comparison._shared.minutes)
            self.assertEqual(minutes, expected)

    def test_images_for_the_ranges_are_those_that_set_them(self):
        images = np.zeros((8, 8, 8, 3), np.uint8)
        calibrated = Calibrated(helpers.small_classifier(), images)
        prepared = mock.Mock(calibrated=calibrated, images=images)
        prepared.source = "made up"
        with (
            mock.patch.object(compare, "with_batch_size"),
            mock.patch.object(compare.quantize, "qat_config"),
            mock.patch.object(common, "strategy"),
            mock.patch.object(common, "config_from_flags"),
            mock.patch.object(common, "say") as said,
            mock.patch.object(compare.Comparison, "_prepare", return_value=prepared),
            mock.patch.object(self.workdir, "add_metrics"),
        ):
            compare.Comparison(mock.Mock(), None, self.workdir)
        # A quarter of them chooses between settings.
        said.assert_called_once_with("Images for the ranges, 6: made up")

    def test_student_of_reconstructed_blocks_hangs_on_how_they_were(self):
        config = ReconstructionConfig(rec_steps=7)
        for method, expected in (("df_rec_kd", config), ("df_qat_kd", None)):
            comparison = object.__new__(compare.Comparison)
            comparison.workdir = self.workdir
            comparison._shared = compare.Shared(self.workdir)
            comparison._config = qat_recipe("pool", batch_size=8)
            comparison._prepare = mock.Mock()
            comparison._reconstructed = mock.Mock(return_value=(None, {}))
            with (
                mock.patch.object(common, "context"),
                mock.patch.object(common, "config_from_flags", return_value=config),
                mock.patch.object(api, "trained", return_value=(None, [], {})) as made,
            ):
                comparison._network(BitWidths(), method, self.workdir.path)
            self.assertIs(made.call_args.args[-1], expected)


class RowTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.comparison = object.__new__(compare.Comparison)
        self.comparison.workdir = Workdir(helpers.new_folder(), {})
        self.comparison._shared = compare.Shared(self.comparison.workdir)
        self.comparison._config = DistillationConfig()
        self.enter_context(mock.patch.object(common, "agreed", bool))

    def interrupt(self, name):
        """Leaves a checkpoint of a run, behind a minute of steps; gives its folder."""
        folder = self.comparison.workdir.path / "W8A8/checkpoints" / name
        checkpoint = tf.train.Checkpoint(
            seconds_in_steps=tf.Variable(60.0, dtype=tf.float64)
        )
        tf.train.CheckpointManager(checkpoint, str(folder), 1).save()
        return folder

    def test_rows_of_an_earlier_call_that_hang_on_this_one_are_looked_at_too(self):
        rows = {"W8A8/qat": {"rounds": 300}, "W8A8/qat_kd": {"failure": "NaN"}}
        self.comparison.workdir.add_metrics(rows={**rows, "W8A8/q": {}})
        for bits, found in ((8, ["df_qat_kd", "qat"]), (4, ["df_qat_kd"])):
            widths = BitWidths(num_bits_weight=bits)
            self.assertEqual(self.comparison.methods(widths, ["df_qat_kd"]), found)
        asked = self.comparison.methods(BitWidths(), ["qat_kd", "qat", "df_q"])
        self.assertEqual(asked, ["df_q", "qat_kd", "qat"])

    def test_what_is_damaged_fails_its_own_row_and_no_other(self):
        (self.interrupt("qat") / "identity.json").write_text("{")
        (index,) = self.interrupt("df_qat_kd").glob("*.index")
        index.write_bytes(b"")
        for method, message in (("qat", "identity.json"), ("df_qat_kd", "is damaged")):
            self.comparison.add_row(BitWidths(), method)
            row = self.comparison.workdir.metrics()["rows"][f"W8A8/{method}"]
            self.assertIn(message, row["failure"])

    def test_steps_that_rows_share_are_not_their_own(self):
        self.interrupt("df_rec_timing")
        self.comparison._network = mock.Mock(side_effect=DfqError("of no matter"))
        with mock.patch.object(self.comparison._shared, "begin") as begin:
            self.comparison.add_row(BitWidths(), "df_rec")
        begin.assert_called_once_with(0.0)

    def test_steps_of_an_interrupted_call_count_and_those_that_timed_a_round(self):
        for name in ("df_qat_kd", "df_qat_kd_timing"):
            self.interrupt(name)
        self.comparison._network = mock.Mock(side_effect=DfqError("of no matter"))
        with mock.patch.object(self.comparison._shared, "begin") as begin:
            self.comparison.add_row(BitWidths(), "df_qat_kd")
        begin.assert_called_once_with(120.0)


class ResultsTest(absltest.TestCase):
    def test_pictures_are_drawn_where_something_draws(self):
        row = dict(widths="W8A8", method="df_q", accuracy=None, agreement=0.5)
        row |= dict(bytes=1000, latency_ms=1.0, pieces=1, minutes=0.1, weights="int8")
        row["worst_layer"] = "conv (30.0 dB)"
        for has_pyplot in (False, True):
            workdir = Workdir(helpers.new_folder(), {})
            workdir.add_metrics(rows={"W8A8/df_q": row})
            with mock.patch.object(plots, "has_pyplot", return_value=has_pyplot):
                text = compare.write_results(workdir)
            self.assertEqual((workdir.path / "table.txt").read_text(), text + "\n")
            self.assertEqual((workdir.path / "size.png").exists(), has_pyplot)

    def test_training_of_no_rounds_has_no_curve(self):
        row = dict(widths="W8A8", accuracy=None, agreement=0.5, bytes=1000, rounds=0)
        row |= dict(latency_ms=1.0, pieces=1, minutes=0.1, weights="int8")
        row["worst_layer"] = "conv (30.0 dB)"
        workdir = Workdir(helpers.new_folder(), {})
        methods = ("df_qat_kd", "df_rec_kd")
        rows = {f"W8A8/{name}": {**row, "method": name} for name in methods}
        workdir.add_metrics(rows=rows)
        compare.write_results(workdir)
        self.assertFalse((workdir.path / "curves.png").exists())
        table = "step,minutes,agreement\n0,0,0.25\n10,1,0.5\n"
        (workdir.path / "W8A8").mkdir()
        (workdir.path / "W8A8/df_rec_kd_curve.csv").write_text(table)
        with mock.patch.object(plots, "save") as save:
            compare.write_results(workdir)
        figure, _ = save.call_args.args
        _, names = figure.axes[0].get_legend_handles_labels()
        self.assertEqual(names, ["W8A8 DF-REC-KD"])


if __name__ == "__main__":
    absltest.main()
