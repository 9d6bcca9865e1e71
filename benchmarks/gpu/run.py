"""Runs what benchmarks/gpu/export.py wrote, on the device that JAX finds.

    python benchmarks/gpu/run.py PROGRAM RUNS.json --out=FOLDER [--seconds=500]

Needs jax and numpy. RUNS.json is a list of runs. Each has a `name`; `rounds`, or
`seconds` for as many rounds as fit, or both for what comes first; `least`, the seconds
without which it is left out; and what differs from the recipe: `first_share`,
`student_steps`, `answer_uses`, `generator_steps`, and values of variables by their
names, such as `noise_share` or `adversarial_weight`. The steps of a run, and the
numbers that they draw from, are those of `dfq_tf.distillation.budget`.

FOLDER/NAME.npz has the student's weights; with `snapshots`, NAME_K.npz those on the
way, and NAME_images.npz some images of the bank.
"""

import argparse
import json
import math
import os
import pathlib
import re
import time

os.environ.setdefault("JAX_ENABLE_X64", "1")  # optimizers count steps in int64

import jax
import numpy as np
from jax._src import compiler, xla_bridge
from jax._src.lib import xla_client

# As in dfq_tf.distillation.budget.
HELD_OUT, ANSWERED = 2, 32
DEFAULTS = dict(
    generator_steps=10,
    student_steps=80,
    answer_uses=4,
    first_share=0.1,
    adversarial_weight=1.1,
)


class Step:
    """A compiled step, which changes values that it is given."""

    def __init__(self, path: pathlib.Path, specification: dict) -> None:
        computation = xla_client.XlaComputation(path.read_bytes())
        head = computation.as_hlo_text().split("\n", 1)[0]
        # {result}: (parameter, ...) for each variable that the step changes.
        pairs = re.findall(r"\{(\d+)\}: \((\d+),", head)
        self._changes = [(int(result), int(parameter)) for result, parameter in pairs]
        module = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
        # A copy of a value is the value; GPUs' compilers do not take the operation.
        module = module.replace(" = mhlo.copy ", " = stablehlo.optimization_barrier ")
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
        devices = xla_client.DeviceList((jax.devices()[0],))
        backend = xla_bridge.get_backend()
        self._run = backend.compile_and_load(module, devices, options)
        self._names = specification["parameters"]
        self._measurements = specification["measurements"]

    def __call__(self, at: jax.Array, values: dict) -> dict:
        """Takes the step; returns its measurements."""
        results = self._run.execute([at, *(values[name] for name in self._names)])
        for result, parameter in self._changes:
            values[self._names[parameter - 1]] = results[result]
        return dict(zip(self._measurements, results))


class Program:
    """The steps, and the values that a run begins with."""

    def __init__(self, folder: pathlib.Path) -> None:
        program = json.loads((folder / "program.json").read_text())
        self._arrays, self._values = folder.parent / "arrays", program["values"]
        self.steps = {
            name: Step(folder / f"{name}.hlo", specification)
            for name, specification in program["steps"].items()
        }

    def values(self) -> dict:
        """New copies of all of them, on the device."""
        return {name: jax.device_put(self._read(v)) for name, v in self._values.items()}

    def _read(self, kept: dict) -> np.ndarray:
        kind = jax.numpy.dtype(kept["dtype"])
        if "file" not in kept:
            return np.zeros(kept["shape"], kind)
        with np.load(self._arrays / f"{kept['file']}.npz") as file:
            return file["value"].view(kind).reshape(kept["shape"])


class Run:
    """One distillation."""

    def __init__(self, program: Program, settings: dict, seed: int) -> None:
        self._steps, self._values = program.steps, program.values()
        self._settings, self._seed = {**DEFAULTS, **settings}, seed
        # The part of the run without students, in whole rounds as the recipe has it.
        self._first = self._settings["first_share"]
        if rounds := settings.get("rounds"):
            self._first = min(int(self._first * rounds), rounds - 1) / rounds
        for name, value in settings.items():
            if name in self._values and name != "adversarial_weight":
                self._set(name, value)

    def _set(self, name: str, value: float) -> None:
        old = self._values[name]
        self._values[name] = jax.device_put(np.asarray(value, old.dtype))

    def _take(self, kind: str, number: int) -> dict:
        at = jax.device_put(np.array([self._seed, number], np.int32))
        return self._steps[kind](at, self._values)

    def _batch(self, number: int) -> dict:
        self._take("begin", number)
        count = self._settings["generator_steps"]
        for i in range(count):
            found = self._take("improve", number * count + i)
        self._take("keep", number)
        return found

    def _students(self, done: int) -> dict:
        count, uses = self._settings["student_steps"], self._settings["answer_uses"]
        answered = ANSWERED + done * math.ceil(count / uses)
        for i in range(count):
            if i % uses == 0:
                self._take("answer", answered + i // uses)
            found = self._take("student", done * count + i)
        return found

    def take(self, out: pathlib.Path) -> None:
        """All rounds; prints how they go, and writes the student."""
        settings, name = self._settings, self._settings["name"]
        shown = settings.get("snapshots", 1)
        began, students_rounds, index, part, reported = time.monotonic(), 0, 0, 0.0, 0
        for number in range(HELD_OUT):  # which the recipe holds out; here they stay
            self._batch(number)
        while part < 1:
            found = self._batch(HELD_OUT + index)
            if part >= self._first:
                if not students_rounds:
                    self._begin_students()
                self._schedule(students_rounds, part)
                found |= self._students(students_rounds)
                students_rounds += 1
            self._values["student/0"].block_until_ready()
            if students_rounds == 1 and not np.isfinite(found["distillation_loss"]):
                raise FloatingPointError(f"{name}: {found}")
            index += 1
            seconds = time.monotonic() - began
            part = max(
                index / settings.get("rounds", math.inf),
                seconds / settings.get("seconds", math.inf),
            )
            if part * shown >= reported + 1 or part >= 1:
                reported = int(part * shown)
                self._report(index, seconds, found)
                if shown > 1:
                    self._write(out / f"{name}_{index}.npz")
        self._write(out / f"{name}.npz")
        if shown > 1:
            bank = np.asarray(self._values["bank"])
            places = np.linspace(0, len(bank) - 1, 256).astype(int)
            np.savez_compressed(out / f"{name}_images.npz", images=bank[places])

    def _begin_students(self) -> None:
        self._set("adversarial_weight", self._settings["adversarial_weight"])
        for number in range(ANSWERED):
            self._take("answer", number)

    def _schedule(self, done: int, part: float) -> None:
        """Lets the learning rate reach 0 at the end of the rounds, or of the time."""
        settings, first = self._settings, self._first
        count = settings["student_steps"]
        if "seconds" not in settings:
            total = round((1 - first) * settings["rounds"]) * count
        elif done:
            total = done * count * (1 - first) / (part - first)
        else:
            total = 10**6
        self._set("total_student_steps", total)

    def _report(self, rounds: int, seconds: float, found: dict) -> None:
        if "evaluate" in self._steps:
            found = found | self._take("evaluate", 0)
        measured = {k: round(float(np.asarray(v)), 4) for k, v in found.items()}
        line = {
            "name": self._settings["name"],
            "rounds": rounds,
            "seconds": round(seconds, 1),
        }
        print(json.dumps(line | measured), flush=True)

    def _write(self, path: pathlib.Path) -> None:
        student = {
            k: np.asarray(v)
            for k, v in self._values.items()
            if k.startswith("student/")
        }
        np.savez_compressed(path, **student)


def main() -> None:
    """Compiles once, and takes one run after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="in all")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    program = Program(options.program)
    print(
        f"{jax.devices()[0]}: compiled in {time.monotonic() - began:.0f} s", flush=True
    )
    for settings in json.loads(options.runs.read_text()):
        left = options.seconds - (time.monotonic() - began)
        if left < settings.get("least", 10):
            print(f"{settings['name']}: no time is left", flush=True)
            continue
        if "seconds" in settings:
            settings["seconds"] = min(settings["seconds"], left - 8)
        Run(program, settings, options.seed).take(options.out)


if __name__ == "__main__":
    main()
