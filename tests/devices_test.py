import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import types
import warnings
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError, TrainingError
from dfq_tf.settings import AUTO
from dfq_tf.training import devices, replicas
from tests import helpers

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _tf_config(index=0, kind="worker", workers=("a:1", "b:2"), **cluster):
    task = {"type": kind, "index": index}
    return json.dumps({"cluster": {"worker": workers, **cluster}, "task": task})


class OneDeviceTest(tf.test.TestCase):
    """Nothing of it costs a single device anything."""

    def test_nothing_is_added_to_a_step(self):
        tensor = tf.ones((4, 2))
        for function in (
            replicas.replica_mean,
            replicas.replica_slice,
            replicas.replica_concat,
        ):
            self.assertIs(function(tensor), tensor)
        self.assertEqual(replicas.num_replicas(), 1)

    def test_step_and_models_are_themselves(self):
        def step():
            raise AssertionError("not called")

        model = helpers.small_learner().model
        one_mirror = tf.distribute.MirroredStrategy(["/cpu:0"])
        for strategy in (None, devices.make_strategy("none"), one_mirror):
            copies = devices.Copies(strategy)
            self.assertIs(devices.everywhere(step, strategy), step)
            self.assertIs(copies.of(model), model)
            self.assertIs(copies.up_to_date(step), step)
            self.assertEqual(devices.worker_index(strategy), 0)
            devices.check_batch(strategy, 7, 3)
            rows = devices.of_all_workers([3, 5], strategy=strategy)
            self.assertAllEqual(rows, [[3, 5]])

    def test_errors_of_one_device_are_no_lost_workers(self):
        @devices.names_lost_workers(None)
        def train():
            raise tf.errors.UnavailableError(None, None, "a device is gone")

        with self.assertRaises(tf.errors.UnavailableError):
            train()
        with (
            mock.patch.object(devices, "_num_workers", return_value=2),
            self.assertRaisesRegex(TrainingError, "a worker was lost"),
        ):
            train()


class RoundBatchTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        (1, 1, 128, 128),
        (1, 3, 128, 128),
        (1, 5, 4, 5),  # an image of each generator
        (2, 1, 128, 128),
        (3, 1, 128, 126),
        (3, 2, 128, 126),
        (5, 2, 128, 120),
        (8, 2, 4, 16),  # an image of each generator on each replica
    )
    def test_gives_what_is_allowed(self, replicas, generators, size, expected):
        strategy = mock.Mock(num_replicas_in_sync=replicas)
        rounded = devices.round_batch(strategy, size, generators)
        self.assertEqual(rounded, expected)
        devices.check_batch(strategy, rounded, generators)

    def test_a_batch_without_a_number_is_refused(self):
        for strategy in (None, mock.Mock(num_replicas_in_sync=2)):
            with self.assertRaisesRegex(
                ConfigError, "^batch_size is 0, auto, where a number is needed"
            ):
                devices.check_batch(strategy, AUTO)


class MirroredTest(tf.test.TestCase):
    def made(self, *names):
        """What is made where TensorFlow sees these CPUs and no GPU."""
        found = [types.SimpleNamespace(name=n, device_type="CPU") for n in names]

        def listed(kind):
            return found if kind == "CPU" else []

        with (
            mock.patch.object(tf.config, "list_logical_devices", listed),
            mock.patch.object(tf.distribute, "MirroredStrategy") as made,
        ):
            devices.make_strategy("mirrored")
        made.assert_called_once_with([*names])

    def test_cpu_in_the_place_of_gpus_is_told(self):
        with self.assertWarnsRegex(
            UserWarning,
            "^distribute is mirrored, .* TensorFlow sees none: the CPU trains. "
            "docs/devices.md, in the project's folder, says how TensorFlow finds a G",
        ):
            self.made("/device:CPU:0")

    def test_cpus_that_a_program_has_made_are_what_it_wants(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.made("/device:CPU:0", "/device:CPU:1")


class TFConfigTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("", "it is not set"),
        ("{", "it is not JSON"),
        ("[]", "its cluster must list workers"),
        ('{"task": {"type": "worker", "index": 0}}', "its cluster must list workers"),
        (_tf_config(ps=["c:3"]), "its cluster must list workers, and nothing else"),
        (_tf_config(workers=[]), "its workers must be a list of host:port"),
        (_tf_config(workers="a:1"), "its workers must be a list of host:port"),
        (_tf_config(workers=["a:1", "b"]), "its workers must be a list of host:port"),
        (_tf_config(workers=["a:1", ":2"]), "its workers must be a list of host:port"),
        (_tf_config(workers=["a:1", "b:0"]), "its workers must be a list of host:port"),
        (_tf_config(workers=["a:1", 2]), "its workers must be a list of host:port"),
        (_tf_config(workers=["a:1", "a:1"]), "two of its workers have the same"),
        ('{"cluster": {"worker": ["a:1"]}}', "its task must be of type worker"),
        (_tf_config(kind="chief"), "its task must be of type worker"),
        (_tf_config(index=2), "the index of its task must be in 0 to 1"),
        (_tf_config(index=-1), "the index of its task must be in 0 to 1"),
        (_tf_config(index="0"), "the index of its task must be in 0 to 1"),
        (_tf_config(index=None), "the index of its task must be in 0 to 1"),
        (_tf_config(index=True), "the index of its task must be in 0 to 1"),
    )
    def test_what_is_wrong_is_said_with_an_example(self, text, problem):
        with (
            mock.patch.dict(os.environ, TF_CONFIG=text),
            mock.patch.object(tf.distribute, "MultiWorkerMirroredStrategy") as made,
            self.assertRaises(ConfigError) as caught,
        ):
            devices.make_strategy("multi_worker")
        made.assert_not_called()
        message = str(caught.exception)
        self.assertStartsWith(message, f"TF_CONFIG is {text!r}: {problem}")
        example = message.partition(" such as TF_CONFIG='")[2].removesuffix("'")
        with (
            mock.patch.dict(os.environ, TF_CONFIG=example),
            mock.patch.object(tf.distribute, "MultiWorkerMirroredStrategy") as made,
        ):
            devices.make_strategy("multi_worker")
        made.assert_called_once_with()

    def test_absent_is_not_set(self):
        with mock.patch.dict(os.environ):
            os.environ.pop("TF_CONFIG", None)
            with self.assertRaisesRegex(ConfigError, "it is not set"):
                devices.make_strategy("multi_worker")

    def test_strategy_that_comes_too_late_is_one_message(self):
        tf.ones(1).numpy()
        with (
            mock.patch.dict(os.environ, TF_CONFIG=_tf_config()),
            self.assertRaisesRegex(ConfigError, "cannot be started, for .*startup"),
        ):
            devices.make_strategy("multi_worker")

    def test_unknown_name(self):
        with self.assertRaisesRegex(ConfigError, "distribute is 'all'; .*mirrored"):
            devices.make_strategy("all")

    @parameterized.parameters("distill", "train_teacher")
    @pytest.mark.long
    def test_tool_ends_with_one_message(self, tool):
        folder = helpers.new_folder()
        process = subprocess.run(
            [
                sys.executable,
                f"tools/{tool}.py",
                "--distribute=multi_worker",
                f"--workdir={folder}/run",
                *(
                    ["--teacher=a.keras", "--student=wrn_10_1"]
                    if tool == "distill"
                    else []
                ),
            ],
            env={**os.environ, "TF_CONFIG": _tf_config(index=2)},
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=100,
        )
        self.assertEqual(process.returncode, 2, process.stderr)
        self.assertRegex(process.stderr, "^error: TF_CONFIG is .* index of its task")
        self.assertLen(process.stderr.splitlines(), 1)
        self.assertEmpty(list(folder.iterdir()))


class TwoDevicesTest(tf.test.TestCase):
    @pytest.mark.long
    def test_replicas_and_a_step_of_two_devices_equal_one(self):
        self.check("ReplicasTest", "StepTest.test_warm_up")

    @pytest.mark.long
    def test_two_devices_equal_one(self):
        self.check()

    def check(self, *names):
        process = subprocess.run(
            [sys.executable, "-m", "tests.two_devices", *names],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertRegex(process.stderr, r"Ran \d+ tests")


def _free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("localhost", 0))
    addresses = [f"localhost:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def _run_workers(workdir, killed_at=-1):
    """Two workers, of which the second may be killed: their codes, texts, errors."""
    addresses = _free_addresses(2)
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "tests/worker.py",
                "--distribute=multi_worker",
                "--precision=float32",
                f"--workdir={workdir}",
                f"--killed_at={killed_at if index else -1}",
                f"--offset={index}",
            ],
            env={**os.environ, "TF_CONFIG": _tf_config(index, workers=addresses)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in range(2)
    ]
    try:
        texts, errors = zip(*(p.communicate(timeout=200) for p in processes))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts, errors


def _weights(workdir):
    with np.load(workdir / "weights.npz") as saved:
        return dict(saved)


@pytest.mark.long
class WorkersTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = helpers.new_folder()
        cls.whole = cls.folder / "whole"
        cls.codes, cls.texts, cls.errors = _run_workers(cls.whole)

    def test_they_equal_one_device(self):
        self.assertEqual(self.codes, [0, 0], self.errors)
        self.assertEqual(self.errors, ("", ""))
        alone = self.folder / "alone"
        process = subprocess.run(
            [
                sys.executable,
                "tests/worker.py",
                "--precision=float32",
                f"--workdir={alone}",
            ],
            cwd=ROOT,
        )
        self.assertEqual(process.returncode, 0)
        expected = _weights(alone)
        first, second = (_weights(self.whole / name) for name in ("", "worker_1"))
        self.assertGreater(len(expected), 10)
        for name, value in expected.items():
            self.assertAllEqual(first[name], second[name], msg=name)
            self.assertAllClose(first[name], value, rtol=0.01, atol=0.01, msg=name)
        measured, of_workers = (
            json.loads((path / "measurements.json").read_text())
            for path in (alone, self.whole)
        )
        self.assertGreater(measured["distillation_loss"], 0)
        self.assertAllClose(of_workers, measured, rtol=0.001, atol=0.001)

    def test_each_has_a_folder_with_the_same_checkpoints(self):
        names = [
            {path.name for path in folder.glob("checkpoints/distillation/*.index")}
            for folder in (self.whole, self.whole / "worker_1")
        ]
        self.assertEqual(names, [{"ckpt-4.index", "ckpt-6.index"}] * 2)

    def test_killed_worker_ends_the_other_and_all_continue(self):
        workdir = self.folder / "killed"
        codes, _, errors = _run_workers(workdir, killed_at=3)
        self.assertEqual(codes, [1, -signal.SIGKILL], errors)
        self.assertRegex(errors[0], r"(?m)^error: a worker was lost: .*same commands")
        self.assertNotIn("Traceback", errors[0])
        self.assertFalse((workdir / "weights.npz").exists())
        codes, texts, errors = _run_workers(workdir)
        self.assertEqual(codes, [0, 0], errors)
        # The checkpoint after two steps is the last that both had.
        steps = [f"step {index}" for index in range(2, 6)]
        for text in texts:
            self.assertEqual(text.splitlines()[1:], steps)
        whole = _weights(self.whole)
        for folder in (workdir, workdir / "worker_1"):
            for name, value in _weights(folder).items():
                self.assertAllEqual(value, whole[name], msg=name)


if __name__ == "__main__":
    tf.test.main()
