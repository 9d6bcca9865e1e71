"""One of the workers of devices_test, as a tool: distils between small networks.

It saves at every other step, and may be killed at one. Without --distribute, it is the
one device that the workers together must equal.
"""

import functools
import json
import os
import pathlib
import signal
import sys
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common
from dfq_tf import api
from dfq_tf.distillation import generator, phases
from dfq_tf.settings import RunConfig, qat_recipe
from dfq_tf.training import loop
from tests import helpers

FLAGS = common.FLAGS
_CONFIG = qat_recipe(
    "paper",
    batch_size=8,
    noise_dim=4,
    warm_up_steps=2,
    rounds=6,
    student_steps=2,
    student_optimizer="sgd",
    student_learning_rate=0.01,
    bank_images=20,
)


def run_loop(name, step, *args, **kwargs):
    def watched(index):
        if name == "distillation":
            print(f"step {index}", flush=True)
            if index == FLAGS.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(index)

    settings = dict(measure_every=2, save_seconds=0)
    return loop.run_loop(name, watched, *args, **settings, **kwargs)


def main():
    run = common.config_from_flags(RunConfig)
    strategy = common.strategy()
    workdir = common.open_workdir(free=["killed_at", "offset"]).path
    small = functools.partial(generator.build_generator, channels=4)
    with (
        mock.patch.object(generator, "build_generator", small),
        mock.patch.object(phases, "run_loop", run_loop),
    ):
        result = api.distill(
            helpers.small_classifier((8, 8, 1), seed=1),
            # Other weights on each worker: those of the first must reach all.
            helpers.small_learner((8, 8, 1), seed=5 + FLAGS.offset),
            config=_CONFIG,
            seed=3,
            precision=run.precision,
            strategy=strategy,
            directory=workdir,
            show_progress=False,
        )
    models = [result.student.model, *result.generators]
    weights = {f"{i}/{w.name}": w for i, m in enumerate(models) for w in m.weights}
    np.savez(workdir / "weights.npz", **{k: w.numpy() for k, w in weights.items()})
    (workdir / "measurements.json").write_text(json.dumps(result.measurements))


if __name__ == "__main__":
    common.define("Test", "killed_at", int, -1, "Step at which it is killed.")
    common.define("Test", "offset", int, 0, "Changes the student's first weights.")
    common.define_run_flags(None)
    common.run(main, __doc__)
