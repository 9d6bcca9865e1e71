"""What a workdir says of its run, read back: what a page is made of."""

import csv
import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

from dfq_tf.errors import WorkdirError
from dfq_tf.files import digest, read_object, read_text
from dfq_tf.reports import facts, scalars
from dfq_tf.reports.scalars import Curve
from dfq_tf.reports.workdir import FLAGS, METRICS, RUN, parse_flagfile
from dfq_tf.settings import GENERATED, METHODS, PHOTOGRAPHS, PROCEDURAL

# The tools whose workdirs have a page.
_TOOLS = ("run", "quantize", "distill")
# What a run makes, in the order in which it does. Key in metrics.json -> title.
TITLES = {
    "teacher": "Float teacher",
    "student": "Float student",
    "q": "Q, real images",
    "df_q": "DF-Q",
    "df_rec": "DF-REC",
    "df_qat_kd": "DF-QAT-KD",
    "df_rec_kd": "DF-REC-KD",
}
# Kind of images, see `Source.kind` -> words.
IMAGES = {
    GENERATED: "generated images",
    PHOTOGRAPHS: "crops of photographs",
    PROCEDURAL: "images of 1/f noise",
    "pictures": "crops of pictures",
}
# Folder of TensorBoard's scalars -> title.
_PHASES = {
    "teacher": "Training of the teacher, on real images",
    "warm_up": "Warm-up: the generator alone",
    "distillation": "Distillation into another network",
    "df_qat_kd": "Quantization-aware training (DF-QAT-KD)",
    "df_rec_kd": "Quantization-aware training of reconstructed blocks (DF-REC-KD)",
}
# Columns of NAME_curve.csv that are no measurement.
NO_CURVES = ("step", "minutes")


@dataclasses.dataclass(frozen=True)
class Row:
    """A model of a run: the float one, or a file.

    Attributes:
      key: as in metrics.json, such as 'df_q'.
      title: for a reader, such as 'DF-Q W8A8'.
      measured: what was measured; empty where nothing was.
      training: what was measured while it was made.
      seconds: that making it took; None where it was not measured.
      sqnr: of the scores, from the pixels on, in dB; None likewise.
      num_held_out: images that its agreement in `training` was measured on.
      kind: of its images held out, which its SQNR is of, see `Source.kind`.
    """

    key: str
    title: str
    measured: Mapping[str, Any]
    training: Mapping[str, Any]
    seconds: float | None = None
    sqnr: float | None = None
    num_held_out: int | None = None
    kind: str = GENERATED

    @property
    def agreement(self) -> tuple[float, int | None] | None:
        """Share of images with the teacher's class, of how many; None if unknown.

        Of the images that measured all models; else of those held out.
        """
        if "agreement" in self.measured:
            return self.measured["agreement"], self.measured["images"]
        same = self.training.get(
            "agreement_on_held_out_images",
            # As an earlier version called it.
            self.training.get("agreement_on_generated_images"),
        )
        if same is None and self.training.get("agreements_on_generated_images"):
            same = max(self.training["agreements_on_generated_images"])
        return None if same is None else (same, self.num_held_out)


@dataclasses.dataclass(frozen=True)
class Phase:
    """The curves of a training, name -> (step, value)."""

    title: str
    curves: Mapping[str, Curve]


@dataclasses.dataclass(frozen=True)
class Record:
    """All that a workdir says.

    Attributes:
      path: of the workdir.
      rows: of the table of models.
      best: the row whose file is given on; None where there is no quantized network.
      page: what was kept for the page of the best row, or of the student, see `facts`.
      metrics: as in metrics.json.
      flags: name -> value.
      run: as in run.json.
      phases: the trainings that left curves.
      files: name -> (bytes, SHA-256) of the models that the run has made.
    """

    path: pathlib.Path
    rows: list[Row]
    best: Row | None
    page: Mapping[str, Any]
    metrics: Mapping[str, Any]
    flags: Mapping[str, str]
    run: Mapping[str, Any]
    phases: list[Phase]
    files: Mapping[str, tuple[int, str]]

    @property
    def name(self) -> str:
        """How the run is called beside others."""
        return self.path.resolve().name

    @property
    def widths(self) -> str:
        """What the file was to be, 'W8A8' or '0.5x'; empty for nothing quantized."""
        return asked_widths(self.flags) if self.best else ""

    @property
    def source(self) -> Row | None:
        """The float model that was quantized: the student, where there is one."""
        rows = {row.key: row for row in self.rows}
        return rows.get("student", rows.get("teacher"))

    @property
    def first(self) -> Row | None:
        """The quantized network that was made first: --methods gives the order."""
        made = {row.key: row for row in self.rows if row.key in METHODS}
        asked = self.flags.get("methods", "").split(",")
        # Of auto, and of tools/quantize.py, it is the first of METHODS.
        return next((made[key] for key in (*asked, *METHODS) if key in made), None)

    @property
    def is_distilled(self) -> bool:
        """Whether the teacher, with which all agreements are, is another model."""
        return self.source is not None and self.source.key == "student"

    @property
    def exact(self) -> str:
        """What the model that was quantized is called."""
        return "float student" if self.is_distilled else "float model"

    @property
    def reference(self) -> str:
        """What the model is called with which all agreements are."""
        return "teacher" if self.is_distilled else "float model"

    @property
    def images(self) -> str:
        """What images held out are, in words."""
        kind = self.page.get("generated", {}).get("kind", GENERATED)
        return IMAGES.get(kind, kind)

    @property
    def images_agreed_on(self) -> str:
        """What the images are, in words, that the best row's agreement is of.

        Without labels, those that the first method held out measure all files.
        """
        kind = self.best.measured.get("kind") if self.best else None
        return IMAGES.get(kind, kind) if kind else self.images

    @property
    def is_exclusive(self) -> bool:
        """Whether a class excludes all others: no sigmoid stands behind each score."""
        return self.page.get("generated", {}).get("is_exclusive", True)

    @property
    def has_labels(self) -> bool:
        """Whether real images with labels have measured the models."""
        return any(row.measured.get("accuracy") is not None for row in self.rows)

    @property
    def command(self) -> str:
        """What repeats the run, in another folder."""
        called = self.run.get("command") or "python tools/run.py"
        flagfile = shlex.quote(str(self.path / FLAGS))
        return f"{called} --flagfile={flagfile} --workdir=runs/again"

    @property
    def tool(self) -> str:
        """Name of the tool that ran, however it was called."""
        return _tool(self.run)


def asked_widths(flags: Mapping[str, str]) -> str:
    """What flags ask of a file: its size, such as '0.5x' or '90 KiB', or its widths.

    Args:
      flags: name -> value, as a flagfile has them.
    """
    kibibytes = flags.get("target_kib", "0")
    asked = f"{kibibytes} KiB" if kibibytes not in ("", "0") else ""
    return flags.get("target_size") or asked or flags.get("widths", "")


def read(folder: str | os.PathLike[str]) -> Record:
    """Reads a workdir.

    Raises:
      WorkdirError: there is no run in it, or a file there is not as it was written.
    """
    path = pathlib.Path(folder)
    if not (path / METRICS).is_file():
        raise WorkdirError(
            f"there is no {METRICS} in {str(path)!r}, so no run has ended there; "
            "name the workdir of tools/run.py, tools/quantize.py or tools/distill.py"
        )
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkdirError(
            f"{str(path)!r} cannot be read as a workdir: {error!r}. Run the tool that "
            "made it again"
        ) from error


def _read(path: pathlib.Path) -> Record:
    metrics, run = read_object(path / METRICS), read_object(path / RUN)
    if (tool := _tool(run)) not in _TOOLS:
        raise WorkdirError(
            f"{str(path)!r} holds what tools/{tool}.py made, which has no page; name "
            "the workdir of tools/run.py, tools/quantize.py or tools/distill.py"
        )
    flagfile = path / FLAGS
    flags = parse_flagfile(read_text(flagfile)) if flagfile.is_file() else {}
    rows = [
        row for key in TITLES if (row := _row(path, key, metrics, flags)) is not None
    ]
    made = [row for row in rows if row.key in METHODS]
    # Of equal ones the later, which has had more done to it.
    best = max(reversed(made), key=_goodness, default=None)
    of_page = best.key if best else "student"
    return Record(
        path,
        rows,
        best,
        facts.read(path, of_page),
        metrics,
        flags,
        run,
        [*_phases(path)],
        {
            each.name: (each.stat().st_size, digest(each))
            for pattern in ("*.tflite", "*.keras")
            for each in sorted(path.glob(pattern))
        },
    )


def _tool(run: Mapping[str, Any]) -> str:
    """Name of the tool that ran: an earlier version kept no command of `run`."""
    return pathlib.Path(shlex.split(run.get("command") or "run")[-1]).stem


def _goodness(row: Row) -> float:
    """Accuracy where there are labels, else agreement; less than 0 if not measured."""
    accuracy, same = (row.measured.get(k) for k in ("accuracy", "agreement"))
    return next((value for value in (accuracy, same) if value is not None), -1.0)


def _row(
    path: pathlib.Path,
    key: str,
    metrics: Mapping[str, Any],
    flags: Mapping[str, str],
) -> Row | None:
    measured = metrics.get(key)
    training = metrics.get(f"{key}_training")
    if measured is None and training is None:
        return None
    if key == "student" and "student_accuracy" in metrics:  # of tools/distill.py
        right, images = metrics["student_accuracy"], metrics.get("student_images")
        measured = {"accuracy": right, "images": images}
    title = TITLES[key]
    if key not in ("teacher", "student"):
        # The yardstick has the widths alone.
        widths = flags.get("widths", "") if key == "q" else asked_widths(flags)
        title = f"{title} {widths}"
    training = training or {}
    seconds = metrics.get(f"{key}_seconds", training.get("seconds"))
    page = facts.read(path, key)
    noise = page.get("layers")
    sqnr = noise[-1]["total_db"] if noise else None
    shown = page.get("generated", {})
    # Those shown may be fewer.
    count = training.get("held_out_images", shown.get("count"))
    kind = shown.get("kind", GENERATED)
    title, measured = title.strip(), measured or {}
    return Row(key, title, measured, training, seconds, sqnr, count, kind)


def _phases(path: pathlib.Path) -> list[Phase]:
    phases = []
    for name, title in _PHASES.items():
        found = scalars.read(path / "tensorboard" / name)
        # What is in a curve's table too has another name in TensorBoard.
        curves = {k: v for k, v in found.items() if not k.startswith("evaluation/")}
        table = path / f"{name}_curve.csv"
        if table.is_file():
            curves |= _table(table)
        if curves:
            phases.append(Phase(title, curves))
    return phases


def _table(path: pathlib.Path) -> dict[str, Curve]:
    """The columns of NAME_curve.csv over its steps."""
    table = columns(path)
    names = [name for name in table if name not in NO_CURVES]
    return {name: list(zip(table["step"], table[name])) for name in names}


def columns(path: pathlib.Path) -> dict[str, list[float]]:
    """The columns of a NAME_curve.csv by name; none of a table without rows.

    Args:
      path: of the table.

    Raises:
      OSError: it cannot be read.
      TypeError, ValueError, csv.Error: it is not a table of numbers.
    """
    rows = list(csv.DictReader(read_text(path).splitlines()))
    return {
        name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())
    }
