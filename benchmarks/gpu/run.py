"""Runs what benchmarks/gpu/export.py wrote, on the device that JAX finds.

    python benchmarks/gpu/run.py PROGRAMS RUNS.json --out=FOLDER [--seconds=500]

Needs jax and numpy. RUNS.json is a list of runs, which share the device from the
start. Each has a `name`; its `program`, a folder in PROGRAMS if that is not one itself;
`rounds`, or `seconds` for as many rounds as fit, or both for what comes first; and what
differs from the recipe: `first_share`, `student_steps`, `answer_uses`, and values of
variables by their names, such as `noise_share` or `adversarial_weight`; the program
says how many generator steps make a batch. Steps that several programs have are
compiled once. The steps of a run, and the numbers that they draw from, are those of
`dfq_tf.distillation.budget`.

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
from collections.abc import Iterable
from concurrent import futures
from typing import Any

os.environ.setdefault("JAX_ENABLE_X64", "1")  # optimizers count steps in int64

import jax
import numpy as np
from jax._src import compiler, xla_bridge
from jax._src.lib import xla_client

# As in dfq_tf.distillation.budget.
HELD_OUT, ANSWERED = 2, 32
# Seconds for what is written at the end.
_SPARE = 8
DEFAULTS = dict(
    student_steps=80,
    answer_uses=4,
    first_share=0.1,
    adversarial_weight=1.1,
)


class Compiled:
    """The steps of several programs; those that are alike are compiled once."""

    def __init__(self, folders: Iterable[pathlib.Path]) -> None:
        paths = {path for folder in folders for path in folder.glob("*.hlo")}
        read = {path: _read(path) for path in paths}
        with futures.ThreadPoolExecutor(len(paths)) as pool:
            modules = {module for module, _ in read.values()}
            jobs = {module: pool.submit(_compiled, module) for module in modules}
        self.count = len(jobs)
        self._found = {p: (jobs[m].result(), c) for p, (m, c) in read.items()}

    def get(self, path: pathlib.Path) -> tuple[Any, list[tuple[int, int]]]:
        """What runs the step of a file, and the pairs of results and parameters."""
        return self._found[path]


def _read(path: pathlib.Path) -> tuple[str, list[tuple[int, int]]]:
    """The module, and a pair for each variable that it changes."""
    computation = xla_client.XlaComputation(path.read_bytes())
    head = computation.as_hlo_text().split("\n", 1)[0]
    # {result}: (parameter, ...)
    pairs = re.findall(r"\{(\d+)\}: \((\d+),", head)
    changes = [(int(result), int(parameter)) for result, parameter in pairs]
    module = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    # A copy of a value is the value; GPUs' compilers do not take the operation.
    module = module.replace(" = mhlo.copy ", " = stablehlo.optimization_barrier ")
    # Names of modules are numbered, which would make all of them differ.
    return re.sub(r"(?m)^module @\S+", "module @step", module), changes


def _compiled(module: str) -> Any:
    options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
    devices = xla_client.DeviceList((jax.devices()[0],))
    return xla_bridge.get_backend().compile_and_load(module, devices, options)


class Step:
    """A compiled step, which changes values that it is given."""

    def __init__(self, compiled: tuple[Any, Any], specification: dict) -> None:
        self._run, self._changes = compiled
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

    def __init__(self, folder: pathlib.Path, compiled: Compiled) -> None:
        program = json.loads((folder / "program.json").read_text())
        self._arrays, self._values = folder.parent / "arrays", program["values"]
        if "generator_steps" not in program:
            raise ValueError(f"{folder} is of an earlier export.py: export it again")
        self.generator_steps = program["generator_steps"]
        self.steps = {
            name: Step(compiled.get(folder / f"{name}.hlo"), specification)
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
        if "generator_steps" in settings:
            raise ValueError("generator_steps is of the program: give it to export.py")
        self._generator_steps = program.generator_steps
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

    def _batch(self, number: int, gives_answers: bool = False) -> dict:
        self._take("begin", number)
        count = self._generator_steps
        for i in range(count):
            found = self._take("improve", number * count + i)
            if gives_answers and i >= count // 2:
                self._take("hand_over", number * count + i)
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
            found = self._batch(HELD_OUT + index, gives_answers=students_rounds > 0)
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
    """Compiles all programs, and takes all runs beside each other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("programs", type=pathlib.Path)
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="in all")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = json.loads(options.runs.read_text())
    compiled = Compiled({options.programs / each.get("program", "") for each in runs})
    seconds = time.monotonic() - began
    print(
        f"{jax.devices()[0]}: {compiled.count} compiled in {seconds:.0f} s", flush=True
    )
    left = options.seconds - seconds - _SPARE

    def take(settings: dict) -> None:
        if "seconds" in settings:
            settings["seconds"] = min(settings["seconds"], left)
        program = Program(options.programs / settings.get("program", ""), compiled)
        Run(program, settings, options.seed).take(options.out)

    with futures.ThreadPoolExecutor(len(runs)) as pool:
        for run in [pool.submit(take, each) for each in runs]:
            run.result()


if __name__ == "__main__":
    main()
