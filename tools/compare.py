"""Compares bit widths and methods for one teacher: one table, one command.

    python tools/compare.py --teacher=teachers/wrn_16_1_cifar10.keras \
        --dataset=cifar10 --compare_widths=W8A8,W4A8

Columns: float, and for each width Q, QAT, QAT-KD (on real images, as yardsticks),
DF-Q with noise, DF-Q, DF-QAT-KD; with --columns also REC, DF-REC and DF-REC-KD. Writes
WORKDIR/table.txt, table.csv, size.png (accuracy against size) and curves.png (agreement
over training steps); each file, and where it loses accuracy, in WORKDIR/WIDTHS/. Give
the same command again after an interruption, or after a row failed, or with more widths
or columns: rows that are done are not repeated, but for QAT and QAT-KD where DF-QAT-KD
has since taken another number of rounds.
"""

import csv
import dataclasses
import io
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from tools import common, quantize, teacher_flags
from dfq_tf import api
from dfq_tf.context import Context
from dfq_tf.distillation import phases, with_batch_size
from dfq_tf.errors import ConfigError, DfqError
from dfq_tf.files import write_bytes, write_text
from dfq_tf.graph import Classifier, agreement, model_name
from dfq_tf.quantization import Calibrated, QuantizedNetwork, run_names
from dfq_tf.quantization.post_training import post_training
from dfq_tf.reports import layer_noise, plots, record
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUGMENTATIONS,
    RECONSTRUCTING,
    TRAINING,
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    FileConfig,
    ReconstructionConfig,
    check_value,
    parse_widths,
)
from dfq_tf.tflite import TFLiteClassifier, proof
from dfq_tf.training import Learner, begin_anew, seconds_in_steps
from dfq_tf.with_data import datasets, yardsticks
from dfq_tf.with_data.datasets import accuracy

FLAGS = common.FLAGS

# Method -> its title in the table. Those of the first line need labelled images.
TITLES = {
    "q": "Q *",
    "rec": "REC *",
    "qat": "QAT *",
    "qat_kd": "QAT-KD *",
    "noise": "DF-Q, noise",
    "df_q": "DF-Q",
    "df_rec": "DF-REC",
    "df_qat_kd": "DF-QAT-KD",
    "df_rec_kd": "DF-REC-KD",
}
_DATA_DEPENDENT = ("q", "rec", "qat", "qat_kd")
# Those that take as many rounds as DF-QAT-KD took, which is limited by the clock.
_AS_LONG = ("qat", "qat_kd")
# Those that learn from the teacher's answers, or as it did.
_LEARNING = (*_AS_LONG, *TRAINING)
# Those that are made only where they are named.
_ASKED_FOR = ("rec", *RECONSTRUCTING)
_FIELDS = (
    "widths",
    "method",
    "accuracy",
    "agreement",
    "bytes",
    "weights",
    "latency_ms",
    "pieces",
    "minutes",
    "rounds",
    "photographs_share",
    "steps_to_student",
    "worst_layer",
    "failure",
)
_WRITTEN = ("table.txt", "table.csv", "size.png", "curves.png")
# Images for the layers' noise, and for the points of the curves.
_NOISE_IMAGES, _CURVE_IMAGES = 64, 1000
_COMPARED_IMAGES = 1000


class Shared:
    """What rows share: made once, while its minutes count in each row that needs it.

    Args:
      workdir: its metrics.json keeps the minutes: a later call finds much of it made.
    """

    def __init__(self, workdir: Workdir) -> None:
        self._workdir = workdir
        self._made: dict[str, Any] = {}
        self.begin()

    def begin(self, earlier: float = 0.0) -> None:
        """From here on is counted what the next row takes.

        Args:
          earlier: seconds that calls which were interrupted have spent on it.
        """
        self._began, self._waited = time.monotonic() - earlier, 0.0
        self._needed: set[str] = set()

    @property
    def minutes(self) -> float:
        """What the row has taken until now, as if it were the only one."""
        known = self._workdir.metrics().get("shared_minutes", {})
        own = time.monotonic() - self._began - self._waited
        return own / 60 + sum(known[name] for name in self._needed)

    def __call__(self, name: str, make: Callable[[], Any], earlier: float = 0.0) -> Any:
        """What the row needs, made now unless another row has needed it.

        Args:
          name: of it.
          make: makes it.
          earlier: seconds that calls which were interrupted have spent on it.
        """
        began = time.monotonic()
        if name not in self._made:
            self._made[name] = make()
        seconds = time.monotonic() - began
        known = self._workdir.metrics().get("shared_minutes", {})
        if name not in known:
            minutes = (seconds + earlier) / 60
            self._workdir.add_metrics(shared_minutes={**known, name: minutes})
        self._needed.add(name)
        self._waited += seconds
        return self._made[name]


def _own_runs(method: str) -> tuple[str, ...]:
    """Patterns of the names of the runs that a row shares with none."""
    if method == "rec":
        return run_names(method)
    return phases.run_names(method) if method in TRAINING else (method,)


class Comparison:
    """One teacher, measured in many ways.

    Args:
      teacher: the trained classifier.
      dataset: for yardsticks and accuracy; None without.
      workdir: for all results.
    """

    def __init__(
        self, teacher: Classifier, dataset: datasets.Dataset | None, workdir: Workdir
    ) -> None:
        self.workdir = workdir
        self._teacher = teacher
        config = with_batch_size(
            quantize.qat_config(), teacher, strategy=common.strategy()
        )
        self._calibration = common.config_from_flags(CalibrationConfig)
        if "batch_size" not in workdir.metrics():
            workdir.add_metrics(batch_size=config.batch_size)
        self._config = config
        self._shared = Shared(workdir)
        warm_up = seconds_in_steps(workdir.path, "warm_up")
        self._prepared = self._shared("images", self._prepare, warm_up)
        source = self._prepared.source
        count = len(self._prepared.calibrated.calibrating)
        common.say(f"Images for the ranges, {count}: {source}")
        self._train = dataset.load("train") if dataset else None
        test = dataset.load("test") if dataset else None
        self._images = test.images if test else self._prepared.held_out
        self._labels = test.labels if test else None
        with common.stage("evaluation of the teacher"):
            self._scores = teacher.scores(self._images)

    def _prepare(self) -> api.Prepared:
        """Where the images for the ranges come from, and these."""
        context = common.context(self._config, self.workdir.path)
        prepared = api.prepare(self._teacher, self._teacher, self._calibration, context)
        _ = prepared.images  # they take the warm-up
        return prepared

    def add_float_row(self) -> None:
        """Measures the teacher itself."""
        measured = self._accuracy(self._scores)
        self._add("float", "float", measured | {"bytes": self._teacher.num_bytes})

    def methods(self, widths: BitWidths, columns: Sequence[str]) -> list[str]:
        """What to look at, in this order: the columns, and rows that hang on them.

        Args:
          widths: of a line of the table.
          columns: what is asked for. An earlier call may have been asked for others,
            which are made again where DF-QAT-KD takes another number of rounds now.
        """
        rows = self.workdir.metrics().get("rows", {})
        found = [*columns]
        for method in _AS_LONG:
            row = rows.get(f"{widths.name}/{method}", {"failure": "it is not there"})
            if common.agreed(not row.get("failure")) and method not in columns:
                found.append(method)
        return in_order(found)

    def add_row(self, widths: BitWidths, method: str) -> None:
        """Makes and measures one file; a failure becomes the row's result."""
        rows = self.workdir.metrics().get("rows", {})
        if common.agreed(is_made(rows, widths.name, method, self._config)):
            return
        common.say(f"{widths.name} {TITLES[method]}")
        folder = self.workdir.path / widths.name
        folder.mkdir(exist_ok=True)
        try:
            if method in _AS_LONG:
                # DF-QAT-KD may have been made since, by another number of rounds.
                rounds = rounds_of(rows, widths.name, self._config)
                begin_anew(method, folder, {"rounds": str(rounds)})
            self._shared.begin(seconds_in_steps(folder, *_own_runs(method)))
            network, told = self._network(widths, method, folder)
            with common.stage("file and its proof"):
                content = proof.convert(network, config=file_config())
            write_bytes(folder / f"{method}.tflite", content)
            minutes = self._shared.minutes
            with common.stage("evaluation"):
                result = self._measured(network, content, folder / method)
            self._add(widths.name, method, result | {"minutes": minutes, **told})
        except DfqError as error:
            print(f"  failed: {error}", flush=True)
            self._add(widths.name, method, {"failure": str(error)})

    def _network(
        self, widths: BitWidths, method: str, folder: pathlib.Path
    ) -> tuple[QuantizedNetwork, dict[str, float]]:
        """The network; and its rounds and share of photographs, if it has learnt."""
        if method in _DATA_DEPENDENT:
            return self._with_data(widths, method, folder)
        if method == "noise":
            return self._by_noise(widths), {}
        prepared = self._shared("images", self._prepare)
        with common.stage("calibration"):
            network = self._calibrated("", prepared.calibrated, widths)
        context = common.context(self._config, folder)
        told: dict[str, float] = {}
        behind: ReconstructionConfig | None = None
        if method != "df_q":
            self._shared("images to judge by", lambda: prepared.judging)
        if method in RECONSTRUCTING:
            behind = common.config_from_flags(ReconstructionConfig)
            network, found = self._reconstructed(widths, network, behind, context)
            told = _share(found)
        if method not in TRAINING:
            return network, told
        if self._config.needs_generators and not prepared.generators:
            # Else it counts in the images, which the generators have made.
            warm_up = seconds_in_steps(self.workdir.path, "warm_up")
            self._shared("warm-up", lambda: prepared.warmed, warm_up)
        if self._config.pool_images:
            self._shared("pool", lambda: prepared.pool)
        network, _, found = api.trained(
            prepared, network, context, self._on_the_way, method, behind
        )
        rounds = int(found.get("rounds", self._config.rounds))
        if "rounds" in found:
            common.say(f"  {quantize.training_line(rounds, self._config)}")
        return network, told | _share(found) | {"rounds": rounds}

    def _by_noise(self, widths: BitWidths) -> QuantizedNetwork:
        """Ranges alone, of noise, whose means would only mislead the biases."""
        prepared = self._prepared
        calibration = dataclasses.replace(prepared.calibration, bias_correction=False)
        rng = np.random.default_rng(FLAGS.seed)
        images = rng.integers(0, 256, prepared.images.shape, np.uint8)
        with common.stage("calibration"):
            return post_training(prepared.network, images, widths, calibration)

    def _calibrated(
        self, images: str, calibrated: Calibrated, widths: BitWidths
    ) -> QuantizedNetwork:
        """An untrained network; what hangs on no widths is shared by all of them.

        Args:
          images: their name in what is shared: real ones, or none for those of DF-Q.
          calibrated: by them.
          widths: of the network.
        """
        self._shared(f"outputs{images}", lambda: calibrated.histograms)
        name = f"{widths.name}{images}"
        return self._shared(name, lambda: calibrated.quantized(widths))

    def _reconstructed(
        self,
        widths: BitWidths,
        network: QuantizedNetwork,
        config: ReconstructionConfig,
        context: Context[DistillationConfig],
    ) -> tuple[QuantizedNetwork, dict[str, float]]:
        """DF-REC's network, and what was measured; metrics.json has it too."""
        prepared, name = self._prepared, f"{widths.name} reconstruction"
        lessons = seconds_in_steps(self.workdir.path, "lessons")
        self._shared("lessons", lambda: prepared.lessons, lessons)
        made, _, found = self._shared(
            name,
            lambda: api.reconstructed(prepared, network, config, context),
            seconds_in_steps(self.workdir.path / widths.name, *run_names()),
        )
        done = self.workdir.metrics().get("reconstructions", {})
        if widths.name not in done:
            self.workdir.add_metrics(reconstructions={**done, widths.name: found})
        return made, found

    def _with_data(
        self, widths: BitWidths, method: str, folder: pathlib.Path
    ) -> tuple[QuantizedNetwork, dict[str, float]]:
        """Q, REC, QAT or QAT-KD, on real images; and its rounds, see `_network`."""
        assert self._train is not None
        images, labels = self._train.images, self._train.labels
        with common.stage("calibration with real images"):
            calibrated = self._shared(
                "real images",
                lambda: yardsticks.calibrated_with_data(
                    self._teacher, images, self._calibration
                ),
            )
            network = self._calibrated(" of real images", calibrated, widths)
        if method == "q":
            return network, {}
        rows = self.workdir.metrics().get("rows", {})
        rounds = rounds_of(rows, widths.name, self._config)
        settings = dataclasses.replace(self._config, rounds=rounds)
        context = common.context(settings, folder, on_one_device=True)
        if method == "rec":
            config = common.config_from_flags(ReconstructionConfig)
            network = yardsticks.reconstruct_with_data(
                network, calibrated, config, context
            )
            return network, {}
        network, _ = yardsticks.train_with_data(
            self._teacher,
            network,
            images,
            labels if method == "qat" else None,
            context,
            augmentation=FLAGS.augmentation,
            evaluate=self._on_the_way,
        )
        return network, {"rounds": rounds}

    def _on_the_way(self, student: Learner) -> dict[str, float]:
        """Measures for the curve; they select nothing."""
        scores = student.scores(self._prepared.held_out)
        same = agreement(scores, self._prepared.answers)
        values = {"agreement_on_held_out_images": same}
        if self._labels is not None:
            some = slice(_CURVE_IMAGES)
            scores = student.scores(self._images[some])
            values["accuracy"] = accuracy(scores, self._labels[some])
            values["agreement"] = agreement(scores, self._scores[some])
        return values

    def _measured(
        self, network: QuantizedNetwork, content: bytes, path: pathlib.Path
    ) -> dict[str, Any]:
        tflite = TFLiteClassifier(content)
        images = self._prepared.held_out[:_NOISE_IMAGES]
        noise = layer_noise.measure(self._prepared.network, content, images)
        title = f"{path.parent.name} {TITLES[path.name]}"
        layer_noise.write_report(noise, f"{path}_noise", title)
        worst = layer_noise.worst(noise)
        kinds = sorted({layer.weights for layer in noise if layer.weights})
        return self._accuracy(tflite.scores(self._images)) | {
            "bytes": len(content),
            "weights": "+".join(kinds),
            "latency_ms": tflite.latency(),
            "pieces": tflite.num_pieces,
            "steps_to_student": proof.largest_difference(
                network, content, self._images[:_COMPARED_IMAGES]
            ),
            "worst_layer": f"{worst.name} ({worst.own_db:.1f} dB)",
        }

    def _accuracy(self, scores: np.ndarray) -> dict[str, Any]:
        labels = self._labels
        return {
            "accuracy": None if labels is None else accuracy(scores, labels),
            "agreement": agreement(scores, self._scores),
        }

    def _add(self, widths: str, method: str, result: dict[str, Any]) -> None:
        rows = self.workdir.metrics().get("rows", {})
        row = {"widths": widths, "method": method, **result}
        self.workdir.add_metrics(rows={**rows, f"{widths}/{method}": row})


def summary(rows: list[dict[str, Any]]) -> str:
    """The paper's table: a line per width, a column per method."""
    methods = [m for m in TITLES if any(row["method"] == m for row in rows)]
    is_accuracy = any(row.get("accuracy") is not None for row in rows)
    key = "accuracy" if is_accuracy else "agreement"
    floats = [row for row in rows if row["method"] == "float"]
    by_place = {(row["widths"], row["method"]): row for row in rows}
    widths = list(dict.fromkeys(r["widths"] for r in rows if r["widths"] != "float"))
    lines = [
        f"{key}, %".ljust(12)
        + "float".rjust(8)
        + "".join(TITLES[m].rjust(13) for m in methods)
    ]
    for name in widths:
        cells = [_cell(by_place.get((name, method)), key) for method in methods]
        value = f"{100 * floats[0][key]:.2f}" if floats else ""
        lines.append(
            name.ljust(12) + value.rjust(8) + "".join(cell.rjust(13) for cell in cells)
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, key: str) -> str:
    if row is None:
        return "-"
    return "failed" if row.get("failure") else f"{100 * row[key]:.2f}"


def details(rows: list[dict[str, Any]]) -> str:
    """A line per file: size, latency, minutes, and the rest."""
    lines = [
        f"{'':19}{'accuracy':>9}{'agreement':>11}{'size':>10}{'weights':>11}"
        f"{'latency':>11}{'pieces':>8}{'minutes':>9}{'rounds':>8}  worst layer"
    ]
    for row in rows:
        name = row["widths"]
        if row["method"] != "float":
            name += f" {TITLES[row['method']]}"
        if row.get("failure"):
            lines.append(f"{name:19}failed: {row['failure']}")
            continue
        accuracy = row["accuracy"]
        line = (
            f"{name:19}"
            f"{'-' if accuracy is None else f'{100 * accuracy:.2f} %':>9}"
            f"{100 * row['agreement']:>9.2f} %"
            f"{row['bytes'] / 1000:>7.1f} kB"
        )
        if row["method"] != "float":
            line += (
                f"{row['weights']:>11}{row['latency_ms']:>8.3f} ms{row['pieces']:>8}"
                f"{row['minutes']:>9.1f}{row.get('rounds', '-'):>8}"
                f"  {row['worst_layer']}"
            )
        lines.append(line)
    return "\n".join(lines)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A line per row, with a header; a figure that is not there is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _share(found: Mapping[str, float]) -> dict[str, float]:
    """How many of the images photographs were, for a network that learnt from them.

    Args:
      found: while it learnt, see `api.reconstructed` and `api.trained`.
    """
    return {name: v for name, v in found.items() if name == "photographs_share"}


def notes(rows: list[dict[str, Any]]) -> str:
    """What a reader of the table has to know."""
    lines = [
        "minutes: of all that a file is made by, as if it were the only one; what rows "
        "share is made once, and counts in each"
    ]
    if any(row["method"] in _DATA_DEPENDENT for row in rows):
        lines.append("* data-dependent yardsticks: real images set ranges, and train")
    shared = [row for row in rows if row.get("photographs_share")]
    if shared:
        names = ", ".join(f"{row['widths']} {TITLES[row['method']]}" for row in shared)
        lines.append(
            "learnt from crops of the photographs that ship, alone or among others "
            f"(--images=generated: none): {names}"
        )
    for row in rows:
        weight, activation = _numbers(row["widths"])
        if weight == 3:
            text = "W3: stored as int4 at the least, as LiteRT has nothing between"
        elif weight in (5, 6, 7):
            text = f"W{weight}: stored as int8, as TFLite has nothing between"
        else:
            text = ""
        if activation and activation < 8:
            lines.append(f"A{activation}: stored as int8, of which it uses a part")
        if text:
            lines.append(text)
    return "\n".join(dict.fromkeys(lines))


def _numbers(widths: str) -> tuple[int, int]:
    if widths == "float":
        return 0, 0
    parsed = parse_widths(widths)
    return parsed.num_bits_weight, parsed.num_bits_activation


# Accuracies further than this below the best are drawn at the plot's lower edge.
_PLOTTED_RANGE = 0.16


def write_results(workdir: Workdir) -> str:
    """Writes table.txt, table.csv and, with matplotlib, plots; returns the text."""
    folder, methods = workdir.path, ["float", *TITLES]
    rows = list(workdir.metrics()["rows"].values())
    names = list(dict.fromkeys(row["widths"] for row in rows))
    rows.sort(
        key=lambda row: (names.index(row["widths"]), methods.index(row["method"]))
    )
    text = "\n\n".join(filter(None, [summary(rows), details(rows), notes(rows)]))
    write_text(folder / "table.txt", text + "\n")
    write_text(folder / "table.csv", as_csv(rows))
    if plots.has_pyplot():
        _plot_sizes(rows, folder / "size.png")
        _plot_curves(rows, folder)
    return text


def _plot_sizes(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A point per file: the color says the method, the marker the widths."""
    done = [row for row in rows if not row.get("failure")]
    key = "agreement" if done[0]["accuracy"] is None else "accuracy"
    lowest = max(row[key] for row in done) - _PLOTTED_RANGE
    methods, widths = (
        list(dict.fromkeys(row[kind] for row in done)) for kind in ("method", "widths")
    )
    colors = {name: f"C{i}" for i, name in enumerate(methods)}
    markers = {name: "soDP*X<>^"[i % 9] for i, name in enumerate(widths)}
    figure, axes = plots.pyplot().subplots(figsize=(9, 5))
    for row in done:
        axes.plot(
            row["bytes"] / 1000,
            100 * max(row[key], lowest),
            "v" if row[key] < lowest else markers[row["widths"]],
            color=colors[row["method"]],
            markersize=8,
            alpha=0.8,
        )
    handles = [
        *(
            axes.plot([], [], "s", color=color, label=TITLES.get(name, name))[0]
            for name, color in colors.items()
        ),
        *(
            axes.plot([], [], marker, color="0.4", label=name)[0]
            for name, marker in markers.items()
            if name not in colors
        ),
    ]
    axes.set_xlim(left=0)
    axes.set_xlabel("size in kB")
    axes.set_ylabel(f"{key} in % (at the lower edge: that or less)")
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, loc="best")
    plots.save(figure, path)


def _plot_curves(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
    """Agreement with the teacher over the student's training steps.

    It tells more of a few images than accuracy does. A training that was interrupted,
    or failed, or was of no rounds, has no share of its steps to show.
    """
    styles = {"df_qat_kd": "-", "df_rec_kd": "-.", "qat_kd": "--", "qat": ":"}
    curves = {
        (row["widths"], row["method"]): record.columns(path)
        for row in rows
        if row["method"] in styles and not row.get("failure")
        if (path := folder / row["widths"] / f"{row['method']}_curve.csv").exists()
    }
    if not curves:
        return
    figure, axes = plots.pyplot().subplots(figsize=(8, 5))
    colors = {name: f"C{i}" for i, name in enumerate(sorted({w for w, _ in curves}))}
    for (widths, method), curve in curves.items():
        key = "agreement" if "agreement" in curve else "agreement_on_held_out_images"
        axes.plot(
            [step / curve["step"][-1] for step in curve["step"]],
            [100 * same for same in curve[key]],
            styles[method],
            color=colors[widths],
            label=f"{widths} {TITLES[method].rstrip(' *')}",
        )
    axes.set_xlabel("share of the training steps")
    axes.set_ylabel(f"{key.replace('_', ' ')} of student and teacher in %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plots.save(figure, folder / "curves.png")


def file_config() -> FileConfig:
    """What the flags say of the files, whose model has the name of the teacher's."""
    return common.file_config(model_name(FLAGS.teacher))


def checked_columns(has_data: bool) -> list[str]:
    """The methods of --columns.

    Raises:
      ConfigError: one is unknown, or needs labelled images and there are none.
    """
    columns = FLAGS.columns or [
        name
        for name in TITLES
        if (has_data or name not in _DATA_DEPENDENT) and name not in _ASKED_FOR
    ]
    for name in columns:
        if name not in TITLES:
            raise ConfigError(
                f"columns has {name!r}; each must be one of {list(TITLES)}"
            )
        if name in _DATA_DEPENDENT and not has_data:
            raise ConfigError(
                f"columns has {name!r}, which needs real images; name them with "
                "--dataset, or leave it out"
            )
    return columns


def taught_by(teacher: Classifier, columns: list[str]) -> list[str]:
    """The methods, without those that have no such teacher, where none is named.

    Raises:
      ConfigError: one that is named needs another teacher, see `api.check_trains`.
    """
    if set(columns).isdisjoint(_LEARNING):
        return columns
    try:
        api.check_trains(teacher)
    except ConfigError as error:
        if FLAGS.columns:
            raise
        left = [name for name in columns if name not in _LEARNING]
        print(f"Without the methods that learn: {error}", flush=True)
        return left
    return columns


def rounds_of(
    rows: Mapping[str, Mapping[str, Any]], widths: str, config: DistillationConfig
) -> int:
    """Of _AS_LONG: all of them, where DF-QAT-KD was not made before."""
    return rows.get(f"{widths}/df_qat_kd", {}).get("rounds", config.rounds)


def is_made(
    rows: Mapping[str, Mapping[str, Any]],
    widths: str,
    method: str,
    config: DistillationConfig,
) -> bool:
    """Whether a row is there, and of as many rounds as it would have now."""
    row = rows.get(f"{widths}/{method}")
    if not row or row.get("failure"):
        return False
    rounds = rounds_of(rows, widths, config)
    return method not in _AS_LONG or row.get("rounds", rounds) == rounds


def in_order(columns: Sequence[str]) -> list[str]:
    """The methods, those behind the others that hang on what these have taken."""
    return sorted(columns, key=lambda method: method in _AS_LONG)


def main() -> None:
    """Makes every row that is not there yet, and the tables."""
    if not FLAGS.teacher:
        raise ConfigError("teacher is empty; name a model file with --teacher")
    base = common.config_from_flags(BitWidths)
    names = [name.strip() for name in FLAGS.compare_widths]
    widths = [parse_widths(name, base, "compare_widths") for name in names]
    if not widths:
        raise ConfigError("compare_widths is empty; name some, such as W8A8,W4A8")
    if len({each.name for each in widths}) < len(widths):
        raise ConfigError(
            f"compare_widths is {','.join(names)!r}; name each pair of widths once"
        )
    columns = checked_columns(bool(FLAGS.dataset))
    file_config()
    check_value("augmentation", FLAGS.augmentation, {"choices": AUGMENTATIONS})
    reconstructing = [each for each in columns if each in RECONSTRUCTING]
    quantize.check_settings(None, reconstructing, *widths)
    # More rows may be asked for later: those that are there stay as they are.
    free, resolved = ("compare_widths", "columns"), quantize.resolved_flags()
    common.check_workdir(free, resolved)
    teacher = teacher_flags.read_teacher(FLAGS.teacher)
    quantize.check_settings(teacher, [])
    columns = taught_by(teacher, columns)
    teacher, dataset = teacher_flags.with_dataset(teacher)
    files = [f"{each.name}/{method}.tflite" for each in widths for method in columns]
    workdir = common.open_workdir(
        free=free, resolved=resolved, makes=[*_WRITTEN, *files]
    )
    comparison = Comparison(teacher, dataset, workdir)
    comparison.add_float_row()
    for each in widths:
        for method in comparison.methods(each, columns):
            comparison.add_row(each, method)
            write_results(workdir)
    print(write_results(workdir))
    written = ", ".join(name for name in _WRITTEN if (workdir.path / name).exists())
    print(f"\nWrote {workdir.path}/{written}")
    if any(row.get("failure") for row in workdir.metrics()["rows"].values()):
        raise DfqError("a row failed; see the table. The same command tries it again")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Teacher", "teacher", pathlib.Path, None, "Model file (.keras or .h5)."
    )
    teacher_flags.define()
    common.define_dataset_flags(None)
    common.define(
        "Comparison",
        "compare_widths",
        list,
        ["W8A8", "W4A8"],
        "Bit widths of weights and activations, a line of the table each.",
    )
    common.define(
        "Comparison",
        "columns",
        list,
        [],
        f"Methods, of {', '.join(TITLES)} (default: all that the data allow, "
        "but those of reconstruction).",
    )
    common.define(
        "Comparison",
        "augmentation",
        str,
        "crop_flip",
        f"Changes to the real images of QAT and QAT-KD: {', '.join(AUGMENTATIONS)}.",
    )
    quantize.define_generator_flags()
    quantize.define_quantization_flags()
    common.define_file_flags()
    common.define_run_flags("runs/compare")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
