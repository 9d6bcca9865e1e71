import pathlib
from unittest import mock

from absl.testing import parameterized

from tools import curves
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError
from dfq_tf.reports import plots
from tests.tool_runner import run_in_process

TABLE = "step,minutes,accuracy,agreement\n0,0,0.1,0.2\n8,1.5,0.5,0.4\n9,3,0.75,0.6\n"


class CurvesTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.get_temp_dir())

    def table(self, text=TABLE, name="curve.csv"):
        path = self.folder / name
        path.write_text(text)
        return path

    def test_lines_are_the_column_in_percent_over_minutes(self):
        tables = {
            "one": curves.read(self.table()),
            "two": curves.read(self.table("step,minutes,accuracy\n0,0,0\n4,2,1\n")),
        }
        pyplot, drawn = plots.pyplot(), {}
        subplots = pyplot.subplots

        def watched(**kwargs):
            figure, axes = subplots(**kwargs)
            drawn["axes"] = axes
            return figure, axes

        path = self.folder / "curves.png"
        with mock.patch.object(pyplot, "subplots", watched):
            curves.draw(tables, "accuracy", path)
        lines = {
            line.get_label(): line.get_xydata().tolist()
            for line in drawn["axes"].get_lines()
        }
        self.assertEqual(lines["one"], [[0, 10], [1.5, 50], [3, 75]])
        self.assertEqual(lines["two"], [[0, 0], [2, 100]])
        self.assertEqual(tf.io.decode_png(path.read_bytes()).shape.rank, 3)

    def test_without_matplotlib_the_way_out_is_told(self):
        with mock.patch.object(plots, "has_pyplot", return_value=False):
            with self.assertRaisesRegex(ConfigError, r"install '\.\[report\]' in the"):
                plots.pyplot()

    @parameterized.parameters(
        ("", "not a table of numbers"),
        ("step,minutes\n", "no row of numbers.*Name a table that a run has written"),
        ("step,minutes\n0,few\n", "not a table of numbers"),
        ("step,accuracy\n0,1\n", "has no column minutes"),
    )
    def test_another_table_is_refused(self, text, message):
        path = self.table(text)
        with self.assertRaisesRegex(ConfigError, f"^curves has '{path}', .*{message}"):
            curves.read(path)

    def test_absent_file_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError, "not a table of numbers: FileNotFound"
        ):
            curves.read(self.folder / "absent.csv")

    def test_absent_column_is_refused_with_those_that_are_there(self):
        tables = {"one": curves.read(self.table())}
        path = self.folder / "curves.png"
        with self.assertRaisesRegex(
            ConfigError,
            "^column is 'speed', but one has step, minutes, accuracy, agreement$",
        ):
            curves.draw(tables, "speed", path)
        self.assertFalse(path.exists())

    @parameterized.parameters("step", "minutes")
    def test_column_that_is_no_share_is_refused(self, column):
        tables, path = {"one": curves.read(self.table())}, self.folder / "curves.png"
        with self.assertRaisesRegex(ConfigError, f"^column is '{column}', .* no share"):
            curves.draw(tables, column, path)
        self.assertFalse(path.exists())

    def test_mark_at_the_begin_of_a_table_is_no_text(self):
        table = curves.read(self.table("\ufeffminutes,accuracy\n1,0.5\n"))
        self.assertEqual(table, {"minutes": [1], "accuracy": [0.5]})

    @parameterized.parameters(
        ("a:{0},a:{0}", "a.png", "curves has the label 'a' twice; give each curve"),
        ("a:{0}", "a.html", "out is '.*a.html'; .* must end in .png"),
        ("a:{0}", "", "out is '.*'; .* must end in .png"),
        ("a", "a.png", "curves has 'a'; it must be LABEL:FILE"),
        ("a:~of_nobody/a", "a.png", "curves has '~of_nobody/a', which is not a table"),
    )
    def test_wrong_flags_are_one_message(self, given, out, message):
        path = self.table()
        process = run_in_process(
            "curves", f"--curves={given.format(path)}", f"--out={self.folder / out}"
        )
        self.assertEqual(process.returncode, 2, process.stderr)
        self.assertRegex(process.stderr, f"^error: {message}")
        self.assertEqual([*self.folder.iterdir()], [path])


if __name__ == "__main__":
    tf.test.main()
