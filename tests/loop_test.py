import csv
import functools
import glob
import itertools
import os
import pathlib
import time
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, TrainingError
from dfq_tf.training import loop
from dfq_tf.training.loop import run_loop
from tests import helpers


@functools.cache
def _learning(place):
    """A model, its optimizer, a compiled step, and the variables' first values.

    Compiling it takes longer than the steps of a test: tests have it in turn.
    """
    image = keras.layers.Input((3,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(4)(image))
    model = helpers.randomise(keras.Model(image, keras.layers.Dense(1)(x)))
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.01, 40), momentum=0.9
    )
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step(seed):
        inputs = tf.random.stateless_normal((8, 3), seed)
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = tf.reduce_mean(tf.square(outputs - 2 * inputs[:, :1]))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables))
        return loss

    values = helpers.copies([*model.variables, *optimizer.variables])
    return model, optimizer, step, values


class _Task:
    """A model that learns, and counts, from data that depends on the step alone."""

    taken = 0  # so many there are in this test

    def __init__(self):
        self.model, self.optimizer, self._step, values = _learning(_Task.taken)
        _Task.taken += 1
        for variable, value in zip(self.variables, values):
            variable.assign(value)
        self.seen = []

    @property
    def trackables(self):
        return {"model": self.model, "optimizer": self.optimizer}

    @property
    def variables(self):
        return [*self.model.variables, *self.optimizer.variables]

    def step(self, index):
        self.seen.append(index)
        loss = self._step(tf.constant([1, index]))
        return {"loss": loss, "index": tf.constant(float(index))}


def _run(task, num_steps, directory=None, step=None, **kwargs):
    return run_loop(
        "task",
        step or task.step,
        num_steps,
        task.trackables,
        helpers.context(directory=directory),
        **kwargs,
    )


def _scalars(directory):
    """(step, name, value) of all scalars that were written."""
    result = []
    for path in sorted(glob.glob(os.path.join(directory, "tensorboard", "task", "*"))):
        for record in tf.data.TFRecordDataset(path):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor).item()
                result.append((event.step, value.tag, number))
    return result


class LoopTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        _Task.taken = 0
        self.directory = self.get_temp_dir()

    def _checkpoints(self):
        folder = os.path.join(self.directory, "checkpoints", "task")
        names = tf.train.get_checkpoint_state(folder).all_model_checkpoint_paths
        return [os.path.basename(name) for name in names]

    @parameterized.parameters(True, False)
    def test_each_step_is_taken_once_in_order(self, has_directory):
        task = _Task()
        last = _run(task, 7, self.directory if has_directory else None)
        self.assertEqual(task.seen, list(range(7)))
        self.assertEqual(last["index"], 6.0)

    def test_length_may_be_decided_on_the_way(self):
        """A step says how many there are; the one that goes on asks for what holds."""
        lengths = {0: 5, 1: 5, 2: 3, 3: 3}
        task = _Task()
        _run(task, lengths.get, self.directory)
        self.assertEqual(task.seen, [0, 1, 2])
        self.assertEqual(self._checkpoints(), ["ckpt-3"])
        again = _Task()
        self.assertEqual(_run(again, lengths.get, self.directory), {})
        self.assertEqual(again.seen, [])
        self.assertTrue(helpers.all_equal(again.variables, task.variables))

    def test_without_directory_nothing_is_written(self):
        with mock.patch.object(tf.train, "CheckpointManager") as manager:
            _run(_Task(), 3)
        manager.assert_not_called()

    def test_interrupted_run_continues_to_the_same_weights(self):
        self.check_interrupted(13)

    @parameterized.parameters(1, 19, 20, 24)
    @pytest.mark.long
    def test_so_it_does_wherever_it_is_interrupted(self, interrupted_at):
        self.check_interrupted(interrupted_at)

    def check_interrupted(self, interrupted_at):
        whole = _Task()
        _run(whole, 25, measure_every=5)

        interrupted = _Task()

        def step(index):
            if index == interrupted_at:
                raise KeyboardInterrupt
            return interrupted.step(index)

        settings = dict(measure_every=5, save_seconds=0)
        with self.assertRaises(KeyboardInterrupt):
            _run(interrupted, 25, self.directory, step, **settings)
        continued = _Task()
        last = _run(continued, 25, self.directory, **settings)
        first = 5 * (interrupted_at // 5)
        self.assertEqual(continued.seen, list(range(first, 25)))
        self.assertTrue(helpers.all_equal(continued.variables, whole.variables))
        self.assertEqual(last["index"], 24.0)

    def test_finished_run_is_not_repeated_but_restored(self):
        first = _Task()
        _run(first, 12, self.directory)
        second = _Task()
        self.assertEqual(_run(second, 12, self.directory), {})
        self.assertEqual(second.seen, [])
        self.assertTrue(helpers.all_equal(second.variables, first.variables))

    @parameterized.parameters(
        ([5, 10], [10, 12], 10), ([5, 10], [5, 10], 10), ([5, 10], [-1, 5], 5)
    )
    def test_workers_continue_from_the_newest_checkpoint_of_all(
        self, mine, others, first
    ):
        settings = dict(measure_every=5, save_seconds=0)
        _run(_Task(), 10, self.directory, **settings)
        task, asked = _Task(), []

        def of_all_workers(values, strategy):
            asked.append(values)
            return np.array([values, others if values == mine else values])

        with mock.patch.object(loop, "of_all_workers", of_all_workers):
            _run(task, 12, self.directory, **settings)
        self.assertEqual(asked[0], mine)
        self.assertEqual(task.seen, list(range(first, 12)))

    @parameterized.parameters(
        ([[5, 10], [-1, -1]], "worker 0 of 5 and 10, worker 1 of none"),
        ([[-1, -1], [5, 10]], "worker 0 of none, worker 1 of 5 and 10"),
        ([[5, 10], [12, 15]], "worker 0 of 5 and 10, worker 1 of 12 and 15"),
    )
    def test_workers_without_a_checkpoint_in_common_are_told(self, found, message):
        with (
            mock.patch.object(loop, "of_all_workers", return_value=np.array(found)),
            self.assertRaisesRegex(
                TrainingError, f"^task: .*{message}. Copy .*checkpoints/task .*delete"
            ),
        ):
            _run(_Task(), 12, self.directory)

    def test_all_workers_save_when_one_is_due(self):
        def of_all_workers(values, strategy):
            others = [is_due or done for is_due in values]
            return np.array([values, others])

        done = False
        task = _Task()

        def step(index):
            nonlocal done
            done = index == 4
            return task.step(index)

        with mock.patch.object(loop, "of_all_workers", of_all_workers):
            _run(task, 12, self.directory, step, measure_every=5, save_seconds=1e9)
        self.assertEqual(self._checkpoints(), ["ckpt-5", "ckpt-12"])

    def test_seconds_of_an_interrupted_run_are_those_of_its_newest_checkpoint(self):
        def slow(task):
            def step(index):
                if index == 8:
                    raise KeyboardInterrupt
                time.sleep(0.1)
                return task.step(index)

            return step

        settings = dict(measure_every=5, save_seconds=0)
        self.assertEqual(loop.seconds_in_steps(self.directory, "task", "no*"), 0)
        task = _Task()
        with self.assertRaises(KeyboardInterrupt):
            _run(task, 12, self.directory, slow(task), **settings)
        first = loop.seconds_in_steps(self.directory, "task")
        self.assertBetween(first, 0.5, 5)  # of five steps, without the three behind
        _run(_Task(), 12, self.directory, **settings)
        both = loop.seconds_in_steps(self.directory, "ta*", "task", "other")
        self.assertGreater(both, first)
        self.assertLess(both, first + 5)

    def test_longer_run_continues_a_finished_one(self):
        _run(_Task(), 12, self.directory)
        longer = _Task()
        _run(longer, 15, self.directory)
        self.assertEqual(longer.seen, [12, 13, 14])

    @parameterized.parameters("optimizer", "shape")
    def test_checkpoint_that_does_not_fit_is_refused(self, what):
        _run(_Task(), 12, self.directory)
        task = _Task()
        if what == "optimizer":
            task.optimizer = keras.optimizers.legacy.SGD(0.1, momentum=0.9)
            task.optimizer._create_all_weights(task.model.trainable_variables)
        else:
            task.model = keras.Sequential([keras.layers.Dense(2, input_shape=(3,))])
        with self.assertRaisesRegex(
            TrainingError, "^task: the checkpoint .*ckpt-12 is of another .*--workdir"
        ):
            _run(task, 15, self.directory)
        self.assertEqual(task.seen, [])

    def test_checkpoint_with_a_number_of_another_type_is_one_message(self):
        """Counters were int32 in earlier versions."""

        def run(kind, num_steps):
            changed = {"count": tf.Variable(0, dtype=kind)}
            context = helpers.context(directory=self.directory)
            run_loop("task", lambda index: {}, num_steps, changed, context)

        run(tf.int32, 1)
        with self.assertRaisesRegex(
            TrainingError, "ckpt-1 is of another version .*int64.*--workdir"
        ):
            run(tf.int64, 2)

    @parameterized.product(
        part=("data-00000-of-00001", "index"), content=(None, b"", b"half of it")
    )
    def test_checkpoint_that_is_damaged_is_one_message(self, part, content):
        _run(_Task(), 12, self.directory)
        folder = pathlib.Path(self.directory) / "checkpoints/task"
        path = folder / f"ckpt-12.{part}"
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        task = _Task()
        message = r"^task: the checkpoint .*ckpt-12 is damaged, or .*gone \(.+--workdir"
        with self.assertRaisesRegex(TrainingError, message):
            _run(task, 15, self.directory)
        self.assertEqual(task.seen, [])
        if part == "index" and content is None:  # it is as if there were none
            self.assertEqual(loop.seconds_in_steps(self.directory, "task"), 0)
            return
        with self.assertRaisesRegex(TrainingError, message):
            loop.seconds_in_steps(self.directory, "t*")

    def test_checkpoint_of_another_run_is_refused(self):
        _run(_Task(), 12, self.directory, identity={"teacher": "a", "seed": "1"})
        for identity, difference in (
            ({"teacher": "b", "seed": "1"}, "  teacher: a -> b"),
            ({"seed": "1", "widths": "W4A8"}, r"  widths: \(not known\) -> W4A8"),
        ):
            task = _Task()
            with self.assertRaisesRegex(
                TrainingError,
                "^task: .*checkpoints/task has the checkpoints of another run. .*"
                f"--workdir.*, or delete that folder. What differs:\n{difference}$",
            ):
                _run(task, 15, self.directory, identity=identity)
            self.assertEqual(task.seen, [])
        kept = pathlib.Path(self.directory) / "checkpoints/task/identity.json"
        before = kept.read_text()
        kept.write_text("")
        with self.assertRaisesRegex(ConfigError, "identity.json is not as a run has"):
            _run(_Task(), 15, self.directory, identity={"teacher": "a", "seed": "1"})
        kept.write_text(before)
        # What a run does not hang on does not matter to it.
        for identity in ({"seed": "1"}, None):
            task = _Task()
            _run(task, 12, self.directory, identity=identity)
            self.assertEqual(task.seen, [])
        with self.assertRaisesRegex(TrainingError, "teacher: a -> c$"):
            _run(_Task(), 15, self.directory, identity={"teacher": "c"})

    def test_run_of_another_identity_begins_anew_where_it_is_to(self):
        same, other = {"rounds": "3"}, {"rounds": "2"}
        _run(_Task(), 3, self.directory, identity=same)
        for identity, seen in ((same, []), (other, [0, 1])):
            loop.begin_anew("task", self.directory, identity)
            task = _Task()
            _run(task, int(identity["rounds"]), self.directory, identity=identity)
            self.assertEqual(task.seen, seen)

    def test_directory_is_refused_to_others_until_the_run_has_ended(self):
        task, other = _Task(), _Task()

        def step(index):
            with self.assertRaisesRegex(
                TrainingError,
                f"^task: another process is at work in {self.directory}. Wait until "
                "it has ended, or name another directory",
            ):
                _run(other, 3, self.directory)
            return task.step(index)

        _run(task, 2, self.directory, step)
        self.assertEqual((task.seen, other.seen), ([0, 1], []))
        _run(other, 3, self.directory)
        self.assertEqual(other.seen, [2])

    def test_run_without_checkpoints_leaves_the_folder_to_another(self):
        def step(index):
            raise KeyboardInterrupt

        with self.assertRaises(KeyboardInterrupt):
            _run(_Task(), 3, self.directory, step, identity={"teacher": "a"})
        task = _Task()
        _run(task, 3, self.directory, identity={"teacher": "b"})
        self.assertEqual(task.seen, [0, 1, 2])
        with self.assertRaisesRegex(TrainingError, "teacher: b -> a$"):
            _run(_Task(), 3, self.directory, identity={"teacher": "a"})

    @parameterized.parameters(
        tf.errors.ResourceExhaustedError(
            None, None, "{{function_node x}} a; No space left [Op:SaveV2]\nMore"
        ),
        OSError("a; No space left"),
    )
    def test_full_disk_is_one_message_and_leaves_no_half_checkpoint(self, error):
        save = tf.train.CheckpointManager.save

        def full(manager, checkpoint_number):
            if checkpoint_number < 10:
                return save(manager, checkpoint_number=checkpoint_number)
            folder = pathlib.Path(manager.directory)
            (folder / "ckpt-10_temp").mkdir()
            for name in ("ckpt-10_temp/part", "ckpt-10.index", "checkpoint.tmp01"):
                (folder / name).write_bytes(b"half")
            raise error

        settings = dict(measure_every=5, save_seconds=0)
        with (
            mock.patch.object(tf.train.CheckpointManager, "save", full),
            self.assertRaisesRegex(
                TrainingError,
                "^task: .* cannot be written at step 10: a; No space left; the last "
                "good checkpoint is .*ckpt-5. Make room .* same command .*folder$",
            ),
        ):
            _run(_Task(), 20, self.directory, **settings)
        names = os.listdir(os.path.join(self.directory, "checkpoints", "task"))
        self.assertEqual(
            {name.split(".")[0] for name in names}, {"checkpoint", "ckpt-5"}
        )
        self.assertLen(names, 3)
        task = _Task()
        _run(task, 12, self.directory, **settings)
        self.assertEqual(task.seen, list(range(5, 12)))

    def test_names_keep_runs_apart(self):
        task = _Task()
        _run(task, 3, self.directory)
        context = helpers.context(directory=self.directory)
        run_loop("other", task.step, 2, task.trackables, context)
        self.assertEqual(task.seen, [0, 1, 2, 0, 1])

    def test_checkpoints_are_saved_when_due_and_at_the_end(self):
        _run(_Task(), 12, self.directory, measure_every=5, save_seconds=1e9)
        self.assertEqual(self._checkpoints(), ["ckpt-12"])

    def test_last_two_checkpoints_are_kept(self):
        _run(_Task(), 12, self.directory, measure_every=5, save_seconds=0)
        self.assertEqual(self._checkpoints(), ["ckpt-10", "ckpt-12"])

    def test_measurements_are_written(self):
        _run(_Task(), 7, self.directory, measure_every=3)
        written = [s for s in _scalars(self.directory) if s[1] == "index"]
        self.assertEqual(
            written, [(3, "index", 2.0), (6, "index", 5.0), (7, "index", 6)]
        )

    @parameterized.parameters(np.nan, np.inf, -np.inf)
    def test_measurement_that_is_not_finite_names_the_term(self, value):
        task = _Task()

        def step(index):
            bad = value if index >= 7 else 1.0
            return {**task.step(index), "bn_statistics_loss": tf.constant(bad)}

        with self.assertRaisesRegex(
            TrainingError,
            r"^task: bn_statistics_loss is not finite at step 8; the last good "
            r"checkpoint is .*ckpt-5\. Lower the learning rate",
        ):
            _run(task, 20, self.directory, step, measure_every=5, save_seconds=0)

    def test_good_checkpoint_outlives_a_bad_measurement(self):
        good = _Task()
        _run(good, 5)
        bad = _Task()

        def step(index):
            measurements = bad.step(index)
            return {"loss": tf.constant(np.nan)} if index >= 5 else measurements

        settings = dict(measure_every=5, save_seconds=0)
        with self.assertRaisesRegex(TrainingError, "loss is not finite at step 6"):
            _run(bad, 20, self.directory, step, **settings)
        self.assertEqual(self._checkpoints(), ["ckpt-5"])
        restored = _Task()
        _run(restored, 5, self.directory, **settings)
        self.assertEqual(restored.seen, [])
        self.assertTrue(helpers.all_equal(restored.variables, good.variables))

    def test_first_bad_measurement_says_that_nothing_was_saved(self):
        for directory in (self.directory, None):
            with self.assertRaisesRegex(
                TrainingError, "a is not .*; nothing was saved"
            ):
                _run(
                    _Task(),
                    3,
                    directory,
                    lambda _: {"a": tf.constant(np.nan)},
                    measure_every=1,
                )

    @parameterized.parameters(True, False)
    def test_weight_that_is_not_finite_is_named(self, has_directory):
        task = _Task()

        def step(index):
            measurements = task.step(index)
            if index == 7:
                # A moving average: no loss in training mode shows it.
                mean = task.model.layers[2].moving_mean
                mean.assign(mean * np.nan)
            return measurements

        kept = "last good checkpoint is .*ckpt-5" if has_directory else "nothing was"
        with self.assertRaisesRegex(
            TrainingError,
            f"^task: the weight .*moving_mean.* of model is not finite .*; .*{kept}",
        ):
            _run(
                task,
                10,
                self.directory if has_directory else None,
                step,
                measure_every=5,
                save_seconds=0,
            )
        if has_directory:
            self.assertEqual(self._checkpoints(), ["ckpt-5"])


class CurveTest(parameterized.TestCase, tf.test.TestCase):
    """`evaluate`, and the file that it fills."""

    def setUp(self):
        super().setUp()
        _Task.taken = 0
        self.directory = self.get_temp_dir()
        self.path = os.path.join(self.directory, "task_curve.csv")
        # A clock by which each step takes half a minute.
        clock = mock.Mock(monotonic=itertools.count(0, 30).__next__)
        patch = mock.patch.object(loop, "time", clock)
        patch.start()
        self.addCleanup(patch.stop)

    def _read(self):
        with open(self.path) as file:
            return file.read()

    def _rows(self):
        """Of the file: each step, and what was measured there."""
        header, *rows = self._read().splitlines()
        self.assertEqual(header, "step,minutes,error,seen")
        return [tuple(map(float, row.split(","))) for row in rows]

    @staticmethod
    def _evaluate(task):
        """Measures the model on inputs of its own, and how many steps it has seen."""
        inputs = tf.random.stateless_normal((50, 3), (9, 9))
        error = task.model(inputs, training=False) - 2 * inputs[:, :1]
        seen = task.optimizer.iterations.numpy()
        return {"error": float(tf.reduce_mean(tf.square(error))), "seen": seen}

    def _run(self, task, num_steps, step=None, directory=None, **kwargs):
        settings = dict(evaluate_every=3, measure_every=5, save_seconds=0)
        return _run(
            task,
            num_steps,
            directory or self.directory,
            step,
            evaluate=lambda: self._evaluate(task),
            **{**settings, **kwargs},
        )

    @parameterized.parameters(
        (11, 4, [0, 4, 8, 11]),
        (8, 4, [0, 4, 8]),
        (3, 1, [0, 1, 2, 3]),
        (3, 50, [0, 3]),
    )
    def test_rows_are_measured_at_0_now_and_then_and_at_the_end(
        self, num_steps, every, expected
    ):
        task = _Task()
        start = self._evaluate(task)["error"]
        self._run(task, num_steps, evaluate_every=every)
        rows = self._rows()
        # Each at the step that it says: so many steps had been taken.
        self.assertEqual([row[0] for row in rows], expected)
        self.assertEqual([row[3] for row in rows], expected)
        # Of the steps alone, and of all of them.
        self.assertEqual([row[1] for row in rows], [n / 2 for n in expected])
        self.assertAllClose(rows[0][2], start, rtol=1e-5)
        self.assertAllClose(rows[-1][2], self._evaluate(task)["error"], rtol=1e-5)

    def _whole(self, num_steps):
        """The file of a run that is not interrupted."""
        directory = os.path.join(self.directory, "whole")
        self._run(_Task(), num_steps, directory=directory)
        with open(os.path.join(directory, "task_curve.csv")) as file:
            return file.read()

    def test_damaged_curve_is_named(self):
        self._run(_Task(), 4)
        for content in ("", "step,minutes\nthree,0\n"):
            pathlib.Path(self.path).write_text(content)
            with self.assertRaisesRegex(ConfigError, "task_curve.csv is not as a run"):
                self._run(_Task(), 8)

    def test_other_measurements_do_not_go_under_the_names_of_before(self):
        self._run(_Task(), 4)
        before = pathlib.Path(self.path).read_text()
        with (
            mock.patch.object(self, "_evaluate", return_value={"speed": 1.0}),
            self.assertRaisesRegex(
                TrainingError, "has the columns step,minutes,error.* now are .*,speed"
            ),
        ):
            self._run(_Task(), 8)
        self.assertEqual(pathlib.Path(self.path).read_text(), before)

    def test_names_may_have_commas_and_quotes(self):
        values = {"error, of 50": 0.25, 'of "seen"': 0.5}
        with mock.patch.object(self, "_evaluate", return_value=values):
            self._run(_Task(), 2)
            self._run(_Task(), 4)
        with open(self.path) as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([*rows[0]], ["step", "minutes", *values])
        self.assertEqual([row["step"] for row in rows], ["0", "3", "4"])
        for row in rows:
            self.assertEqual((row["error, of 50"], row['of "seen"']), ("0.25", "0.5"))

    def test_interrupted_run_ends_with_the_file_of_an_uninterrupted_one(self):
        self.check_interrupted(13)

    @parameterized.parameters(1, 7, 15, 18)
    @pytest.mark.long
    def test_so_it_does_wherever_it_is_interrupted(self, interrupted_at):
        self.check_interrupted(interrupted_at)

    def check_interrupted(self, interrupted_at):
        interrupted = _Task()

        def step(index):
            if index == interrupted_at:
                raise KeyboardInterrupt
            return interrupted.step(index)

        # Checkpoints lie at 5, 10 and 15, and rows at 0, 3, 6, 9, 12, 15 and 18.
        with self.assertRaises(KeyboardInterrupt):
            self._run(interrupted, 19, step)
        self._run(_Task(), 19)
        self.assertEqual(self._read(), self._whole(19))

    def test_run_interrupted_before_its_last_checkpoint_measures_the_end_again(self):
        with mock.patch.object(
            tf.train.CheckpointManager, "save", side_effect=KeyboardInterrupt
        ):
            with self.assertRaises(KeyboardInterrupt):
                self._run(_Task(), 10, save_seconds=1e9)
        self.assertEqual([row[0] for row in self._rows()], [0, 3, 6, 9, 10])
        self._run(_Task(), 10)
        self.assertEqual(self._read(), self._whole(10))

    @parameterized.parameters(10, 12)
    def test_longer_run_has_no_row_for_the_end_of_the_shorter_one(self, num_steps):
        self._run(_Task(), num_steps)
        self._run(_Task(), 14)
        self.assertEqual([row[0] for row in self._rows()], [0, 3, 6, 9, 12, 14])

    def test_finished_run_leaves_the_file_and_measures_nothing(self):
        self._run(_Task(), 6)
        before = self._read()
        _run(_Task(), 6, self.directory, evaluate=self.fail)
        self.assertEqual(self._read(), before)

    def test_run_from_the_start_begins_a_new_file(self):
        with open(self.path, "w") as file:
            file.write("step,minutes,accuracy\n0,0,7\n")
        self._run(_Task(), 2)
        self.assertEqual([row[0] for row in self._rows()], [0, 2])

    def test_file_is_complete_after_each_row(self):
        task, contents = _Task(), []

        def step(index):
            contents.append(self._rows())
            return task.step(index)

        self._run(task, 6, step, evaluate_every=2)
        self.assertEqual([len(rows) for rows in contents], [1, 1, 2, 2, 3, 3])
        self.assertLen(self._rows(), 4)

    def test_measurements_go_to_tensorboard_too(self):
        self._run(_Task(), 6, evaluate_every=4)
        written = [s for s in _scalars(self.directory) if s[1] == "evaluation/seen"]
        self.assertEqual([s[::2] for s in written], [(0, 0.0), (4, 4.0), (6, 6.0)])

    def test_without_evaluation_there_is_no_file(self):
        _run(_Task(), 6, self.directory)
        self.assertFalse(os.path.exists(self.path))

    def test_without_directory_there_is_no_file(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.directory)
        task = _Task()
        _run(task, 6, evaluate=lambda: self._evaluate(task))
        self.assertEmpty(os.listdir(self.directory))

    def test_training_is_the_same_with_and_without(self):
        seeing, blind = _Task(), _Task()
        last = self._run(seeing, 11)
        self.assertEqual(_run(blind, 11, measure_every=5), last)
        self.assertEqual(seeing.seen, blind.seen)
        self.assertTrue(helpers.all_equal(seeing.variables, blind.variables))


if __name__ == "__main__":
    tf.test.main()
