"""The page of a run: one HTML file that needs nothing beside it.

Everything on it comes from a `Record`; what was not measured is not there. Templates
escape all text, so that a class named `<script>` is text.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dfq_tf.errors import ConfigError
from dfq_tf.files import write_text
from dfq_tf.reports import charts, facts, record, verdict
from dfq_tf.reports.record import Record, Row
from dfq_tf.settings import GENERATED, PHOTOGRAPHS, PROCEDURAL

NAME = "report.html"

# Widths of charts, in pixels: on a screen, and on a phone.
_WIDE, _NARROW = 920.0, 350.0
# Rows of a table of layers that is folded up at first.
_MANY_LAYERS = 40
_LEVELS = {
    "good": "Good",
    "fair": "Look closer",
    "poor": "Poor",
    "unknown": "",
}
# Measurements that are shares in [0, 1].
_SHARES = ("agreement", "accuracy")
# The types of inputs and outputs that MediaPipe takes.
_MEDIAPIPE = {"uint8", "float32"}
# What stands for the data type of an input in numpy code of the page.
_PIXELS = {
    "uint8": "pixels",
    "int8": "(pixels.astype(np.int16) - 128).astype(np.int8)",
    "float32": "(pixels.astype(np.float32) - {mean}) / {std}",
}


def write(folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `report.html` into a workdir, and returns its path.

    Raises:
      WorkdirError: there is no run in the folder.
    """
    path = pathlib.Path(folder) / NAME
    write_text(path, of_run(record.read(folder)))
    return path


def of_run(run: Record) -> str:
    """The page of one run, as HTML."""
    layers = run.page.get("layers", [])
    worst = verdict.worst_layer(layers)
    made = [row.key for row in run.rows]
    tries = ""
    if worst:
        tries = verdict.advice(
            layers,
            worst,
            made,
            run.flags,
            is_exclusive=run.is_exclusive,
            # An earlier version did not keep it.
            takes_16_bits=run.page.get("takes_16_bits", True),
        )
    said = verdict.of(run)
    generated = run.page.get("generated", {})
    return _rendered(
        "run.html",
        is_generated=generated.get("kind", GENERATED) == GENERATED,
        title=_title(run),
        run=run,
        verdict=said,
        level=_LEVELS[said.level],
        tiles=_tiles(run),
        rows=[_cells(row, run) for row in run.rows],
        sqnr_images=_sqnr_images(run),
        generated=generated,
        calibration=_calibration(run),
        class_charts=_class_charts(generated),
        noise_charts=_both(charts.noise, layers),
        range_charts=_both(charts.ranges, layers),
        layers=_layer_rows(layers),
        is_long=len(layers) > _MANY_LAYERS,
        worst=worst,
        advice=tries,
        blocks=run.best.training.get("blocks", []) if run.best else [],
        phases=_phases(run),
        file=_app(run),
    )


def comparison(runs: Sequence[Record]) -> str:
    """A page with several runs side by side, as HTML."""
    names = _distinct([run.path for run in runs])
    flags = _comparable_flags(runs)
    differing = {
        flag: values
        for flag in flags
        if len(set(values := [run.flags.get(flag, "–") for run in runs])) > 1
    }
    rows = [
        {**_cells(row, run), "run": name}
        for name, run in zip(names, runs)
        for row in run.rows
    ]
    sections = []
    for name, run in zip(names, runs):
        layers = run.page.get("layers", [])
        sections.append(
            {
                "name": name,
                "verdict": (said := verdict.of(run)),
                "level": _LEVELS[said.level],
                "noise_charts": _both(charts.noise, layers),
                "method": run.best.title if run.best else "",
            }
        )
    return _rendered(
        "comparison.html",
        title="Runs side by side",
        reference="teacher" if any(run.is_distilled for run in runs) else "float model",
        names=names,
        rows=rows,
        differing=differing,
        tools=len({run.tool for run in runs}),
        sections=sections,
    )


def _comparable_flags(runs: Sequence[Record]) -> list[str]:
    """All flags of runs of one tool; of several tools, those that all of them have."""
    given = [set(run.flags) for run in runs]
    is_one = len({run.tool for run in runs}) == 1
    return sorted(set.union(*given) if is_one else set.intersection(*given))


def _rendered(template: str, **values: Any) -> str:
    import jinja2  # takes time to load, and only pages need it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = verdict.percent
    environment.filters["size"] = size
    environment.filters["duration"] = duration
    environment.filters["latency"] = latency
    environment.filters["short"] = charts.number
    return environment.get_template(template).render(**values)


def size(count: float) -> str:
    """Bytes, such as '98.5 kB'."""
    if count < 1000:
        return f"{count:.0f} B"
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """Such as '21 s', '4.5 min' or '2.1 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def latency(milliseconds: float) -> str:
    """Such as '3.2 ms' or '39 µs'."""
    if milliseconds < 0.1:
        return f"{1000 * milliseconds:.3g} µs"
    return f"{charts.number(milliseconds)} ms"


def _title(run: Record) -> str:
    """The network that was quantized, and to what."""
    said = run.page.get("file", {}).get("model")
    name = said or facts.network_name(run.flags) or run.name
    return f"{name}, {run.best.title}" if run.best else name


def _distinct(paths: Sequence[pathlib.Path]) -> list[str]:
    """Last parts of paths, as many as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(
        f"a workdir is given twice among {', '.join(map(str, paths))}; name each once"
    )


def _cells(row: Row, run: Record) -> dict[str, Any]:
    """What a line of the table of models shows; None for what was not measured."""
    right, count = (row.measured.get(name) for name in ("accuracy", "images"))
    same = row.agreement
    return {
        "title": row.title,
        "is_file": row is run.best and "bytes" in row.measured,
        "accuracy": _with_interval(right, count),
        "agreement": None
        if row.key == "teacher"
        else _with_interval(*(same or (None, None))),
        "sqnr": row.sqnr,
        "bytes": row.measured.get("bytes"),
        "latency": row.measured.get("latency_ms"),
        "seconds": row.seconds,
    }


def _sqnr_images(run: Record) -> str:
    """What the images are that the SQNR of each row is of, in words."""
    rows: dict[str, list[str]] = {}
    for row in run.rows:
        if row.sqnr is not None:
            rows.setdefault(record.IMAGES.get(row.kind, row.kind), []).append(row.title)
    if len(rows) < 2:
        return run.images
    said = [f"{images} ({', '.join(titles)})" for images, titles in rows.items()]
    return f"{' and '.join(said)}, which do not compare"


def _with_interval(share: float | None, count: int | None) -> dict[str, Any] | None:
    if share is None:
        return None
    if not count:
        return {"share": share, "count": None}
    low, high = verdict.interval(share, count)
    return {
        "share": share,
        "count": count,
        "low": low,
        "high": high,
        "chart": _safe(charts.share(share, low, high)),
    }


def _tiles(run: Record) -> list[tuple[str, str, str]]:
    """The figures that are read first: what, how much, and in which sense."""
    best = run.best
    if best is None:
        return []
    tiles, measured = [], best.measured
    if measured.get("accuracy") is not None:
        exact = run.source.measured.get("accuracy") if run.source else None
        name = "float student" if run.is_distilled else "float"
        said = "" if exact is None else f"{name}: {verdict.percent(exact)}"
        tiles.append(("Accuracy", verdict.percent(measured["accuracy"]), said))
    if best.agreement is not None:
        share, count = best.agreement
        of = "" if count is None else f"of {count:,} images"
        name = "teacher" if run.is_distilled else "float"
        tiles.append((f"Same class as {name}", verdict.percent(share), of))
    if measured.get("bytes"):
        whole = run.source.measured.get("bytes", 0) if run.source else 0
        times = whole / measured["bytes"]
        said = f"{times:.1f} times smaller than float32" if times > 1.05 else ""
        tiles.append(("Size of the file", size(measured["bytes"]), said))
    if measured.get("latency_ms"):
        value = latency(measured["latency_ms"])
        tiles.append(("One image", value, "one thread of this machine"))
    if best.seconds:
        # What the first method draws and finds, those behind it take.
        first = run.first
        behind = f", behind {first.title}" if first and first is not best else ""
        said = f"on this machine{behind}"
        tiles.append(("Time to make it", duration(best.seconds), said))
    return tiles


def _calibration(run: Record) -> dict[str, Any]:
    """Which images have set the ranges."""
    if run.best is None:
        return {"count": 0, "words": "", "claim": ""}
    sources = run.best.training.get("calibration_sources", {})
    count = run.flags.get("calibration_images", "0")
    if not sources and count.isdigit():  # of an earlier version
        sources = {GENERATED: int(count)}
    words = [f"{n:,} {record.IMAGES.get(kind, kind)}" for kind, n in sources.items()]
    claim = "none of them is of the task's data"
    if not set(sources) <= {GENERATED, PHOTOGRAPHS, PROCEDURAL}:
        claim = "the pictures are of the folder that --images names"
    return {
        "count": sum(sources.values()),
        "words": " and ".join(words),
        "claim": claim,
    }


def _class_charts(generated: Mapping[str, Any]) -> list[str]:
    if not generated:
        return []
    names, counts = generated["class_names"], generated["per_class"]
    if len(names) != len(counts):  # one score stands for two classes
        names = [*map(str, range(len(counts)))]
    return [_safe(charts.classes(names, counts, w)) for w in (_WIDE, _NARROW)]


def _both(draw: Any, layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A chart for screens, and one for phones; none where nothing is known."""
    if not layers:
        return []
    made = [draw(layers, width) for width in (_WIDE, _NARROW)]
    return [_safe(each) for each in made] if all(made) else []


def _safe(svg: str) -> Any:
    """Marks SVG that `charts` has made, and escaped, as no text to be escaped."""
    import markupsafe

    return markupsafe.Markup(svg)


def _layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers with their shares of bytes and multiply-accumulates, for bars."""
    most = {key: max([1, *(la[key] for la in layers)]) for key in ("bytes", "macs")}
    return [
        {
            **layer,
            "place": place,
            "bytes_share": layer["bytes"] / most["bytes"],
            "macs_share": layer["macs"] / most["macs"],
        }
        for place, layer in enumerate(layers)
    ]


def _phases(run: Record) -> list[dict[str, Any]]:
    phases = []
    for phase in run.phases:
        drawn = [
            (
                name.replace("_", " "),
                _safe(charts.curve(points, name.startswith(_SHARES))),
            )
            for name, points in phase.curves.items()
            if len(points) > 1
        ]
        if drawn:
            phases.append({"title": phase.title, "curves": drawn})
    return phases


def _app(run: Record) -> dict[str, Any] | None:
    """How an app reads the file; None where there is none."""
    file = run.page.get("file")
    if not file or run.best is None:
        return None
    image, output = file["input"], file["output"]
    channels = image["shape"][-1]
    feed = _PIXELS[image["type"]].format(
        mean=_floats(image["mean"]), std=_floats(image["std"])
    )
    return {
        "name": f"{run.best.key}.tflite",
        "input": image,
        "output": output,
        "feed": feed,
        "mode": {1: "L", 3: "RGB", 4: "RGBA"}[channels],
        "by_mediapipe": channels == 3 and {image["type"], output["type"]} <= _MEDIAPIPE,
        "labels": run.page.get("generated", {}).get("class_names", []),
    }


def _floats(values: Sequence[float]) -> str:
    numbers = [f"{value:.8g}" for value in values]
    if len(numbers) == 1:
        return numbers[0]
    return f"np.array([{', '.join(numbers)}], np.float32)"
