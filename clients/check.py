"""Runs the files of clients/make_files.py in the clients that read TFLite files.

    make clients

Prints one table. The exit code is 1 if something does not hold, or if a client could
not be had. Runs in an environment of its own, and imports nothing of the project.
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# LiteRT's own kernels and TFLite Micro's round alike: twice, where XNNPACK rounds once.
MOST_STEPS_OF_MICRO = 4  # measured: 2
# One step of a logit is several of a probability.
MOST_STEPS_OF_KERNELS = 16  # measured: 9
ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")
# The interpreter for microcontrollers runs slow reference kernels here.
MICRO_IMAGES = 20
ARENA_BYTES = 16 * 2**20

_ARENA = re.compile(r"Arena allocation total (\d+) bytes")


@dataclasses.dataclass(frozen=True)
class Case:
    """A file, and what it is held against.

    Attributes:
      title: for the table.
      path: of the file.
      target: what it was written for.
      for_micro: whether TFLite Micro can run it.
      images: uint8 (n, height, width, channels).
      labels: the names of the classes.
      versions: operator -> the highest version that the target has; None for any.
      source: where `versions` is from.
    """

    title: str
    path: pathlib.Path
    target: str
    for_micro: bool
    images: np.ndarray
    labels: Sequence[str]
    versions: Mapping[str, int] | None
    source: str


class Row(NamedTuple):
    """A line of the table; `holds` is None where nothing was asked."""

    file: str
    client: str
    holds: bool | None
    says: str


def read_cases(folder: pathlib.Path) -> tuple[list[Case], list[Row]]:
    """What clients/make_files.py has written, and what it was refused."""
    found = json.loads((folder / "cases.json").read_text())
    cases = [
        Case(
            **{
                **each,
                "path": folder / each["path"],
                "images": np.load(folder / each["images"]),
            }
        )
        for each in found["files"]
    ]
    return cases, [Row(**each, holds=None) for each in found["refused"]]


# LiteRT.


def _interpreter(case: Case, num_threads: int = 1, *, delegates: bool = True) -> Any:
    from ai_edge_litert import interpreter as litert

    resolver = litert.OpResolverType
    interpreter = litert.Interpreter(
        str(case.path),
        num_threads=num_threads,
        experimental_op_resolver_type=(
            resolver.AUTO if delegates else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        ),
    )
    interpreter.allocate_tensors()
    return interpreter


def interpreted(
    case: Case, num_threads: int = 1, *, delegates: bool = True
) -> np.ndarray:
    """What LiteRT's Interpreter gives, integers (n, classes)."""
    interpreter = _interpreter(case, num_threads, delegates=delegates)
    (image,) = interpreter.get_input_details()
    (output,) = interpreter.get_output_details()
    answers = []
    for pixels in case.images:
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(output["index"])[0])
    return np.stack(answers)


def compiled(case: Case, num_threads: int = 1, *, delegates: bool = True) -> np.ndarray:
    """What LiteRT's CompiledModel gives, integers (n, classes)."""
    from ai_edge_litert import compiled_model as litert

    modes = litert.CpuKernelMode
    cpu = litert.CpuOptions(
        num_threads=num_threads,
        kernel_mode=modes.DELEGATE if delegates else modes.BUILTIN,
    )
    options = litert.Options(
        hardware_accelerators=litert.HardwareAccelerator.CPU, cpu_options=cpu
    )
    model = litert.CompiledModel.from_file(str(case.path), options=options)
    (key,) = model.get_signature_list()
    (output,) = model.get_output_tensor_details(key).values()
    dtype = np.dtype(output["dtype"])
    (image,), (answer,) = model.create_input_buffers(0), model.create_output_buffers(0)
    answers = []
    for pixels in case.images:
        image.write(pixels[None])
        model.run_by_index(0, [image], [answer])
        answers.append(np.array(answer.read(len(case.labels), dtype)))
    return np.stack(answers)


def check_litert(case: Case) -> Iterator[Row]:
    """Interpreter and CompiledModel, one thread and four, with XNNPACK and without."""
    first = {}
    for delegates in (True, False):
        answers = [
            run(case, num_threads, delegates=delegates)
            for run in (interpreted, compiled)
            for num_threads in (1, 4)
        ]
        first[delegates] = answers[0]
        steps = max(_steps(answers[0], each) for each in answers[1:])
        kernels = "XNNPACK" if delegates else "its own kernels"
        yield Row(
            case.title,
            f"LiteRT, {kernels}",
            steps == 0,
            "Interpreter and CompiledModel, 1 and 4 threads: "
            + ("the same integers" if steps == 0 else f"up to {steps} steps apart"),
        )
    steps = _steps(first[True], first[False])
    says = f"at most {steps} steps apart"
    yield Row(case.title, "LiteRT, both kernels", steps <= MOST_STEPS_OF_KERNELS, says)


def _steps(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(np.int64) - other.astype(np.int64)).max())


# MediaPipe Tasks.


def check_mediapipe(case: Case) -> Iterator[Row]:
    """ImageClassifier: its class, score and name are those of the Interpreter."""
    import mediapipe as mp
    from mediapipe.tasks.python import BaseOptions
    from mediapipe.tasks.python.vision import ImageClassifier, ImageClassifierOptions

    options = ImageClassifierOptions(
        base_options=BaseOptions(model_asset_path=str(case.path)), max_results=-1
    )
    client = "MediaPipe ImageClassifier"
    if case.images.shape[-1] == 1:
        with contextlib.suppress(ValueError):
            ImageClassifier.create_from_options(options)
            raise AssertionError("MediaPipe takes gray images now: compare them")
        yield Row(case.title, client, None, "takes images of 3 channels, not of 1")
        return
    (output,) = _interpreter(case).get_output_details()
    scale, zero_point = output["quantization"]
    expected = (interpreted(case).astype(np.float32) - zero_point) * np.float32(scale)
    wrong = unnamed = 0
    with ImageClassifier.create_from_options(options) as classifier:
        for pixels, scores in zip(case.images, expected):
            image = mp.Image(mp.ImageFormat.SRGB, np.ascontiguousarray(pixels))
            result = classifier.classify(image)
            best = result.classifications[0].categories[0]
            is_right = scores[best.index] == scores.max() == np.float32(best.score)
            wrong += not is_right
            unnamed += best.category_name != case.labels[best.index]
    count = len(case.images)
    yield Row(
        case.title,
        client,
        not wrong and not unnamed,
        f"class and score of {count - wrong} of {count} images as the Interpreter's, "
        f"names of {count - unnamed}",
    )


# TFLite Micro.


def check_micro(case: Case) -> Iterator[Row]:
    """TFLite Micro: it runs, as LiteRT does, and says how much memory it takes."""
    from tflite_micro import runtime

    if not case.for_micro:
        return
    few = dataclasses.replace(case, images=case.images[:MICRO_IMAGES])
    with _native_output() as output:
        interpreter = runtime.Interpreter.from_file(
            str(case.path), arena_size=ARENA_BYTES
        )
        answers = []
        for pixels in few.images:
            interpreter.set_input(pixels[None], 0)
            interpreter.invoke()
            answers.append(np.array(interpreter.get_output(0)[0]))
        interpreter.print_allocations()
    arena = _ARENA.search(output())
    own, xnnpack = (
        _steps(np.stack(answers), interpreted(few, delegates=delegates))
        for delegates in (False, True)
    )
    size = f"arena {int(arena[1]) / 1024:.1f} KiB" if arena else "no word of its arena"
    says = f"at most {own} steps from LiteRT's own kernels, {xnnpack} from XNNPACK; "
    yield Row(
        case.title,
        f"TFLite Micro, file of {case.target}",
        own <= MOST_STEPS_OF_MICRO and arena is not None,
        says + size,
    )


@contextlib.contextmanager
def _native_output() -> Iterator[Callable[[], str]]:
    """What native code prints in the block, which no `sys.stderr` sees."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            sys.stdout.flush()
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text = file.read().decode(errors="replace")


# Vela.


def check_vela(case: Case) -> Iterator[Row]:
    """Vela: all operators on the NPU, for each of the accelerators."""
    for accelerator in ACCELERATORS:
        yield _vela(case, accelerator)


def _vela(case: Case, accelerator: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                pathlib.Path(sys.executable).with_name("vela"),
                case.path,
                f"--accelerator-config={accelerator}",
                f"--output-dir={folder}",
            ],
            capture_output=True,
            text=True,
        )
        client = f"Vela, {accelerator}"
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            return Row(case.title, client, False, f"vela failed: {''.join(last)}")
        (summary,) = pathlib.Path(folder).glob("*_summary_*.csv")
        with summary.open(newline="") as file:
            (found,) = csv.DictReader(file)
    on_npu, on_cpu = (
        int(re.findall(rf"{kind} operators = (\d+)", done.stdout)[0])
        for kind in ("NPU", "CPU")
    )
    return Row(
        case.title,
        client,
        on_cpu == 0,
        f"{on_npu} of {on_npu + on_cpu} operators on the NPU, "
        f"{float(found['cycles_total']):,.0f} cycles, "
        f"{float(found['sram_memory_used']):.1f} KiB SRAM",
    )


# Versions.


def check_versions(case: Case) -> Iterator[Row]:
    """No operator that the target lacks, and none of a version that is too new."""
    from ai_edge_litert import schema_py_generated as schema

    if case.versions is None:
        return
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if k.isupper()}
    model = schema.Model.GetRootAs(case.path.read_bytes(), 0)
    found: dict[str, int] = {}
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        name = names[code.BuiltinCode()]
        found[name] = max(code.Version(), found.get(name, 0))
    new = [
        f"{name} {version}"
        for name, version in found.items()
        if version > case.versions.get(name, 0)
    ]
    says = f"too new or absent: {', '.join(new)}" if new else "none too new"
    yield Row(case.title, f"operators of {case.target}", not new, says)


# All of it.

# Client -> its package, its check, and the targets whose files go into it.
CLIENTS: dict[str, tuple[str, Callable[[Case], Iterator[Row]], set[str]]] = {
    "LiteRT": ("ai-edge-litert", check_litert, {"android"}),
    "MediaPipe": ("mediapipe", check_mediapipe, {"android"}),
    "TFLite Micro": ("tflite-micro", check_micro, {"android", "micro"}),
    "Vela": ("ethos-u-vela", check_vela, {"ethos_u"}),
    "versions": ("ai-edge-litert", check_versions, {"micro", "ethos_u", "edge_tpu"}),
}


def rows_of(case: Case) -> list[Row]:
    """What each client says to a file."""
    rows = []
    for client, (_, check, targets) in CLIENTS.items():
        if case.target not in targets:
            continue
        try:
            with _native_output():  # LiteRT tells of accelerators that are not there
                rows += list(check(case))
        except Exception as error:  # whatever a client dies of is its answer
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            rows.append(Row(case.title, client, False, reason[:300]))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A line for each row."""
    lines = [("file", "client", "", "what was found")]
    words = {True: "holds", False: "FAILS", None: "-"}
    lines += [(r.file, r.client, words[r.holds], r.says) for r in rows]
    widths = [max(map(len, column)) for column in list(zip(*lines))[:3]]
    return "\n".join(
        "  ".join([*(f"{c:{w}}" for c, w in zip(line, widths)), line[3]]).rstrip()
        for line in lines
    )


def version(package: str) -> str:
    """The installed version of a package, or that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: Any) -> int:
    """Prints the table, and says whether all of it holds."""
    began = time.monotonic()
    (folder,) = arguments
    cases, refused = read_cases(pathlib.Path(folder))
    rows = [row for case in cases for row in rows_of(case)] + refused
    rows.sort(key=lambda row: row.file)
    print(table(rows))
    packages = dict.fromkeys(package for package, *_ in CLIENTS.values())
    print("\n" + ", ".join(f"{each} {version(each)}" for each in packages))
    asked = [row for row in rows if row.holds is not None]
    failed = sum(not row.holds for row in asked)
    seconds = time.monotonic() - began
    print(f"{len(asked) - failed} of {len(asked)} hold; {seconds:.0f} seconds")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LiteRT tells of its end
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
