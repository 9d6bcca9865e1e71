import json
import pathlib
from importlib import metadata
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import WorkdirError
from dfq_tf.reports.workdir import Workdir

_SETTINGS = {"seed": "3", "alpha": "1.0", "model": "a=b.keras"}


class WorkdirTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.get_temp_dir())
        self.path = self.folder / "deep" / "run"

    def test_flags_and_run_are_written(self):
        Workdir(self.path, _SETTINGS)
        self.assertEqual(
            (self.path / "flags.cfg").read_text(),
            "--alpha=1.0\n--model=a=b.keras\n--seed=3\n",
        )
        run = json.loads((self.path / "run.json").read_text())
        self.assertEqual(run["seed"], "3")
        self.assertEqual(run["versions"]["tensorflow"], tf.__version__)
        self.assertEqual(run["versions"]["numpy"], np.__version__)

    def test_package_in_whose_place_another_is_installed_stops_nothing(self):
        def version(name):
            if name == "tensorflow":  # but tensorflow-cpu
                raise metadata.PackageNotFoundError(name)
            return "1.0"

        with mock.patch.object(metadata, "version", version):
            Workdir(self.path, _SETTINGS)
        found = json.loads((self.path / "run.json").read_text())["versions"]
        self.assertEqual(found["tensorflow"], "(not known)")
        self.assertEqual(found["numpy"], "1.0")

    def test_gpus_are_named(self):
        for gpus, end in (([], " cores"), (["H200", "T4"], " cores, H200, T4")):
            path = self.folder / f"{len(gpus)} gpus"
            with mock.patch("dfq_tf.reports.workdir.gpu_names", return_value=gpus):
                Workdir(path, _SETTINGS)
            machine = json.loads((path / "run.json").read_text())["machine"]
            self.assertEndsWith(machine, end)

    def test_places_of_later_calls_stand_beside_that_of_the_first(self):
        Workdir(self.path, _SETTINGS)
        first = json.loads((self.path / "run.json").read_text())
        for version in ("3.98.0", "3.99.0", "3.98.0", first["python"]):
            with mock.patch("platform.python_version", return_value=version):
                Workdir(self.path, _SETTINGS)
        run = json.loads((self.path / "run.json").read_text())
        later = run.pop("later")
        self.assertEqual(run, first)
        self.assertEqual([each["python"] for each in later], ["3.98.0", "3.99.0"])
        self.assertEqual(later[0]["versions"], first["versions"])
        others = {**_SETTINGS, "alpha": "2.0"}
        with mock.patch("platform.python_version", return_value="3.98.0"):
            Workdir(self.path, others, replaces=True)  # another run
        run = json.loads((self.path / "run.json").read_text())
        self.assertEqual((run["python"], "later" in run), ("3.98.0", False))

    def test_same_flags_are_accepted_and_keep_the_metrics(self):
        Workdir(self.path, _SETTINGS).add_metrics(accuracy=0.5)
        again = Workdir(self.path, dict(reversed(_SETTINGS.items())))
        self.assertEqual(again.metrics(), {"accuracy": 0.5})

    @parameterized.named_parameters(
        ("changed", {**_SETTINGS, "alpha": "2.0"}, r"--alpha: 1\.0 -> 2\.0$"),
        ("added", {**_SETTINGS, "new": "1"}, r"--new: \(absent\) -> 1$"),
        (
            "removed",
            {"seed": "3", "alpha": "1.0"},
            r"--model: a=b\.keras -> \(absent\)$",
        ),
    )
    def test_other_flags_are_refused_showing_the_difference(self, settings, difference):
        Workdir(self.path, _SETTINGS)
        with self.assertRaisesRegex(
            WorkdirError, rf"holds a run with other flags.*differs:\n  {difference}"
        ) as caught:
            Workdir(self.path, settings)
        self.assertIn("--workdir", str(caught.exception))
        self.assertNotIn("--seed", str(caught.exception))
        # The folder still belongs to the first run.
        self.assertIsInstance(Workdir(self.path, _SETTINGS), Workdir)

    def test_folder_given_up_takes_other_flags_if_nothing_was_made(self):
        others = {**_SETTINGS, "alpha": "2.0"}
        Workdir(self.path, _SETTINGS).release()
        self.assertEqual([*self.path.iterdir()], [])
        made = Workdir(self.path, others)
        made.add_metrics(accuracy=0.5)
        made.release()
        with self.assertRaisesRegex(WorkdirError, r"--alpha: 2\.0 -> 1\.0$"):
            Workdir(self.path, _SETTINGS)
        self.assertEqual(Workdir(self.path, others).metrics(), {"accuracy": 0.5})

    def test_training_that_saved_nothing_leaves_its_folder_to_other_flags(self):
        begun = ["checkpoints/warm_up/identity.json", "tensorboard/warm_up/events.1"]
        begun += ["checkpoints/teacher/identity.json", "teacher_curve.csv"]
        begun += ["distillation_plan.json"]
        cases = (
            [],
            ["checkpoints/warm_up/ckpt-1.index"],
            ["tensorboard/of_somebody/events.1"],
            ["df_q.keras"],
        )
        for i, made in enumerate(cases):
            workdir = Workdir(self.folder / f"run {i}", _SETTINGS)
            for name in begun + made:
                (workdir.path / name).parent.mkdir(parents=True, exist_ok=True)
                (workdir.path / name).write_text("{}")
            workdir.release()
            left = [path for path in workdir.path.rglob("*") if path.is_file()]
            self.assertLen(left, 8 if made else 0)
            self.assertEqual(any(workdir.path.iterdir()), bool(made))

    def test_folder_that_has_gone_is_given_up_in_silence(self):
        workdir = Workdir(self.path, _SETTINGS)
        self.path.rename(self.folder / "elsewhere")
        workdir.release()
        self.assertTrue((self.folder / "elsewhere/flags.cfg").exists())

    def test_folder_that_is_looked_at_stays_as_it_is(self):
        Workdir(self.path, _SETTINGS, writes=False)
        self.assertFalse(self.path.exists())
        Workdir(self.path, _SETTINGS).add_metrics(accuracy=0.5)
        before = {path: path.read_bytes() for path in self.path.iterdir()}
        Workdir(self.path, _SETTINGS, writes=False)
        with self.assertRaisesRegex(WorkdirError, "holds a run with other flags"):
            Workdir(self.path, {}, writes=False)
        Workdir(self.path, {}, replaces=True, writes=False)
        now = {path: path.read_bytes() for path in self.path.iterdir()}
        self.assertEqual(now, before)

    def test_free_flags_may_change_and_are_written(self):
        Workdir(self.path, _SETTINGS, free=("model",))
        Workdir(self.path, {**_SETTINGS, "model": "c"}, free=("model",))
        self.assertIn("--model=c\n", (self.path / "flags.cfg").read_text())
        with self.assertRaisesRegex(WorkdirError, "--alpha: 1.0 -> 2.0$"):
            Workdir(self.path, {"seed": "3", "alpha": "2.0"}, free=("model",))

    def test_flag_that_an_earlier_version_had_not_counts_as_its_default(self):
        Workdir(self.path, _SETTINGS)
        for defaults in ({}, {"new": "1"}, {"other": "2"}):
            with self.assertRaisesRegex(WorkdirError, r"--new: .* -> 2$"):
                Workdir(self.path, {**_SETTINGS, "new": "2"}, defaults=defaults)
        Workdir(self.path, {**_SETTINGS, "new": "2"}, defaults={"new": "2"})
        # From here on the folder knows it.
        with self.assertRaisesRegex(WorkdirError, "--new: 2 -> 3$"):
            Workdir(self.path, {**_SETTINGS, "new": "3"}, defaults={"new": "3"})

    def test_flag_that_is_gone_is_passed_over_where_it_did_nothing(self):
        Workdir(self.path, {**_SETTINGS, "leaves_share": "0.0"})
        Workdir(self.path, _SETTINGS)
        self.assertNotIn("leaves", (self.path / "flags.cfg").read_text())
        other = self.folder / "other"
        Workdir(other, {**_SETTINGS, "leaves_share": "0.2"})
        with self.assertRaisesRegex(WorkdirError, r"leaves_share: 0\.2 -> \(absent\)$"):
            Workdir(other, _SETTINGS)

    def test_default_does_not_stand_for_a_flag_that_changed(self):
        Workdir(self.path, _SETTINGS)
        with self.assertRaisesRegex(WorkdirError, r"--alpha: 1\.0 -> 2\.0$"):
            Workdir(self.path, {**_SETTINGS, "alpha": "2.0"}, defaults={"alpha": "2.0"})

    def test_run_that_replaces_another_leaves_none_of_its_metrics(self):
        Workdir(self.path, _SETTINGS, replaces=True).add_metrics(agreement=0.5)
        again = Workdir(self.path, _SETTINGS, replaces=True)
        self.assertEqual(again.metrics(), {"agreement": 0.5})
        other = Workdir(self.path, {**_SETTINGS, "alpha": "2.0"}, replaces=True)
        self.assertEqual(other.metrics(), {})
        self.assertIn("--alpha=2.0\n", (self.path / "flags.cfg").read_text())

    def test_file_of_the_same_name_and_other_content_is_refused(self):
        Workdir(self.path, _SETTINGS, digests={"model": "1"}).add_metrics(accuracy=0.5)
        with self.assertRaisesRegex(
            WorkdirError, "or files.*:\n  --model: a=b.keras, whose content has changed"
        ):
            Workdir(self.path, _SETTINGS, digests={"model": "2"})
        again = Workdir(self.path, _SETTINGS, digests={"model": "1"})
        self.assertEqual(again.metrics(), {"accuracy": 0.5})
        # A run that may take the folder leaves no metrics of the other file.
        for digest in ("2", "2"):
            taken = Workdir(
                self.path, _SETTINGS, digests={"model": digest}, replaces=True
            )
            self.assertEqual(taken.metrics(), {})
        with self.assertRaisesRegex(WorkdirError, "--model: a=b.keras, whose"):
            Workdir(self.path, _SETTINGS, digests={"model": "1"})

    def test_file_that_has_moved_is_the_same_under_its_name(self):
        Workdir(self.path, _SETTINGS, digests={"model": "1"}).add_metrics(accuracy=0.5)
        moved = {**_SETTINGS, "model": "elsewhere/a=b.keras"}
        again = Workdir(self.path, moved, digests={"model": "1"})
        self.assertEqual(again.metrics(), {"accuracy": 0.5})
        text = (self.path / "flags.cfg").read_text()
        self.assertIn("--model=elsewhere/a=b.keras\n", text)
        for name, digest in (("c.keras", "1"), ("a=b.keras", "2")):
            with self.assertRaisesRegex(WorkdirError, f"re/a=b.keras -> {name}$"):
                settings = {**_SETTINGS, "model": name}
                Workdir(self.path, settings, digests={"model": digest})

    def test_file_of_another_name_is_named_once(self):
        Workdir(self.path, _SETTINGS, digests={"model": "1"})
        with self.assertRaises(WorkdirError) as caught:
            settings = {**_SETTINGS, "model": "c.keras"}
            Workdir(self.path, settings, digests={"model": "2"})
        self.assertEndsWith(str(caught.exception), "\n  --model: a=b.keras -> c.keras")

    def test_digest_that_an_earlier_version_did_not_keep_counts_as_this_one(self):
        Workdir(self.path, _SETTINGS)
        Workdir(self.path, _SETTINGS, digests={"model": "1"})
        with self.assertRaisesRegex(WorkdirError, "--model: a=b.keras, whose"):
            Workdir(self.path, _SETTINGS, digests={"model": "2"})

    def test_folder_that_cannot_be_made_is_refused(self):
        (self.folder / "file").write_text("")
        for path in (self.folder / "file", self.folder / "file" / "run"):
            with self.assertRaisesRegex(
                WorkdirError,
                "workdir is '.*file.*', which cannot be written: .*--workd",
            ):
                Workdir(path, _SETTINGS)

    def test_folder_without_permission_is_refused(self):
        with mock.patch("os.access", return_value=False):
            with self.assertRaisesRegex(WorkdirError, "no permission to write there"):
                Workdir(self.path, _SETTINGS)

    def test_folder_of_something_else_is_refused_and_kept(self):
        for name in ("run.json", "metrics.json"):
            folder = self.folder / name.removesuffix(".json")
            folder.mkdir()
            (folder / name).write_text('{"accuracy": 0.9}')
            told = f"has {name} of something else: there is no flags.cfg beside it"
            with self.assertRaisesRegex(WorkdirError, told):
                Workdir(folder, _SETTINGS)
            self.assertLen(list(folder.iterdir()), 1)
            self.assertEqual((folder / name).read_text(), '{"accuracy": 0.9}')

    def test_file_that_no_run_has_made_is_refused_and_kept(self):
        self.path.mkdir(parents=True)
        (self.path / "student.keras").write_text("of somebody")
        Workdir(self.path, _SETTINGS, makes=["teacher.keras"])
        Workdir(self.path, _SETTINGS, makes=["student.keras"])  # its own now
        (self.path / "flags.cfg").unlink()
        (self.path / "run.json").unlink()
        with self.assertRaisesRegex(WorkdirError, "has student.keras of something els"):
            Workdir(self.path, _SETTINGS, makes=["student.keras"])
        self.assertEqual((self.path / "student.keras").read_text(), "of somebody")

    @parameterized.parameters(
        ("flags.cfg", b"--alpha=\xff"),
        ("run.json", b""),
        ("metrics.json", b"epoch,loss"),
        ("metrics.json", b"[1]"),
    )
    def test_file_that_no_run_writes_is_told_before_the_work(self, name, content):
        Workdir(self.path, _SETTINGS)
        (self.path / name).write_bytes(content)
        with self.assertRaisesRegex(
            WorkdirError,
            f"^workdir is .*: .*/{name} is not as a run has written it .*Delete the",
        ) as caught:
            Workdir(self.path, _SETTINGS)
        self.assertEqual(str(caught.exception).count("--workdir"), 1)
        self.assertEqual((self.path / name).read_bytes(), content)

    def test_flags_without_a_value_are_true_or_false(self):
        settings = {"seed": "3", "equalize": "false", "allow_code": "true"}
        Workdir(self.path, settings)
        text = "# by hand\n--noequalize\n--allow_code\n--seed=3\n"
        (self.path / "flags.cfg").write_text(text)
        self.assertIsInstance(Workdir(self.path, settings), Workdir)
        with self.assertRaisesRegex(WorkdirError, "--equalize: true -> false"):
            (self.path / "flags.cfg").write_text(text.replace("noeq", "eq"))
            Workdir(self.path, settings)

    def test_metrics_are_merged(self):
        workdir = Workdir(self.path, _SETTINGS)
        self.assertEqual(workdir.metrics(), {})
        workdir.add_metrics(accuracy=0.5, loss=1.0)
        workdir.add_metrics(accuracy=0.75, agreement=0.9)
        expected = {"accuracy": 0.75, "loss": 1.0, "agreement": 0.9}
        self.assertEqual(workdir.metrics(), expected)
        written = json.loads((self.path / "metrics.json").read_text())
        self.assertEqual(written, expected)


if __name__ == "__main__":
    tf.test.main()
