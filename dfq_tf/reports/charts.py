"""Charts as inline SVG, made of plain numbers.

Colours come from the page's style by class, so that they fit light and dark. Nothing
is told by colour alone: marks have other shapes, and names stand beside them.
"""

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Room around the field of a chart: left, right, top, bottom.
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 14.0, 22.0, 30.0


@dataclasses.dataclass(frozen=True)
class _Field:
    """Where numbers are on a chart."""

    width: float
    height: float
    low: float
    high: float
    count: float

    def x(self, place: float) -> float:
        """Of the middle of one of `count` places."""
        inner = self.width - _LEFT - _RIGHT
        return _LEFT + inner * (place + 0.5) / self.count

    def y(self, value: float) -> float:
        inner = self.height - _TOP - _BOTTOM
        share = (value - self.low) / (self.high - self.low)
        return _TOP + inner * (1 - min(1.0, max(0.0, share)))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` of them, from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few digits, without a needless point."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def noise(layers: Sequence[Mapping[str, Any]], width: float) -> str:
    """SQNR along the network: a stem per layer, a line from the pixels on.

    Args:
      layers: as `facts.layers` gives them.
      width: of the chart, in pixels at which its text is read well.
    """
    known = [
        v for la in layers for v in (la["own_db"], la["total_db"]) if v is not None
    ]
    if not known:
        return ""
    marks = ticks(min(0.0, *known), max(known))
    field = _Field(width, 270, marks[0], marks[-1], len(layers))
    worst = min(
        (i for i, layer in enumerate(layers) if layer["own_db"] is not None),
        key=lambda i: layers[i]["own_db"],
    )
    parts = _grid(field, marks, "SQNR, dB (more is better)")
    for i, layer in enumerate(layers):
        value = layer["own_db"]
        if value is None:
            continue
        x, kind = field.x(i), "worst" if i == worst else "main"
        parts.append(
            f'<g class="{kind}"><title>{_text(layer["name"])}: alone {value:.1f} dB, '
            f"from the pixels on {_db(layer['total_db'])}</title>"
            + _line(x, field.y(field.low), x, field.y(value), "stem")
            + _mark(x, field.y(value), i == worst)
            + "</g>"
        )
    totals = [
        (field.x(i), field.y(la["total_db"]))
        for i, la in enumerate(layers)
        if la["total_db"] is not None
    ]
    parts.append(_path(totals, "total"))
    parts.append(_named(field, worst, layers[worst]))
    parts.append(_axis_name(field, f"{len(layers)} layers, from the pixels to the end"))
    label = (
        f"Noise along the network. The noisiest layer is {layers[worst]['name']} with "
        f"{layers[worst]['own_db']:.1f} dB."
    )
    return _svg(field, parts, label)


def _db(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f} dB"


def _named(field: _Field, place: int, layer: Mapping[str, Any]) -> str:
    """The name of the worst layer at the foot of its stem, where there are no marks."""
    x, y = field.x(place), field.y(field.low)
    left = x > field.width / 2
    anchor, gap = ("end", -9) if left else ("start", 9)
    room = (x - _LEFT if left else field.width - x) / 6.6
    name = layer["name"]
    if len(name) + 9 > room:
        name = "…" + name[-max(6, int(room) - 10) :]
    text = f"{name} {layer['own_db']:.1f} dB"
    return (
        f'<text class="label worst halo" x="{x + gap:.1f}" y="{y - 6:.1f}" '
        f'text-anchor="{anchor}">{_text(text)}</text>'
    )


def ranges(layers: Sequence[Mapping[str, Any]], width: float) -> str:
    """The range of each layer's integers beside what BatchNormalization remembers."""
    ends = [
        layer[key]
        for layer in layers
        for key in ("low", "high", "bn_low", "bn_high")
        if layer[key] is not None
    ]
    if not ends:
        return ""
    # One layer of a far wider range would flatten all others.
    sizes = sorted(max(abs(la["low"]), abs(la["high"])) for la in layers)
    most = 1.6 * sizes[int(0.85 * (len(sizes) - 1))] or 1.0
    low, high = max(min(ends), -most), min(max(ends), most)
    marks = ticks(min(0.0, low), max(0.0, high), 6)
    field = _Field(width, 270, marks[0], marks[-1], len(layers))
    parts = _grid(field, marks, "value of an output")
    thick = min(9.0, 0.5 * (width - _LEFT - _RIGHT) / len(layers))
    for i, layer in enumerate(layers):
        x, top, bottom = field.x(i), field.y(layer["high"]), field.y(layer["low"])
        body = (
            f'<rect class="range" x="{x - thick / 2:.1f}" y="{top:.1f}" '
            f'width="{thick:.1f}" height="{max(1.0, bottom - top):.1f}" rx="1.5"/>'
        )
        said = f"{layer['low']:.3g} to {layer['high']:.3g}"
        if layer["high"] > field.high:
            body += _label(x, _TOP - 5, f"↑ {number(layer['high'])}", "middle")
        if layer["low"] < field.low:
            below = field.height - _BOTTOM + 12
            body += _label(x, below, f"↓ {number(layer['low'])}", "middle")
        if layer["bn_low"] is not None:
            said += (
                f", BatchNormalization {layer['bn_low']:.3g} to {layer['bn_high']:.3g}"
            )
            body += _bracket(
                x, field.y(layer["bn_high"]), field.y(layer["bn_low"]), thick
            )
        parts.append(
            f"<g><title>{_text(layer['name'])}: {_text(said)}</title>{body}</g>"
        )
    parts.append(_line(_LEFT, field.y(0), width - _RIGHT, field.y(0), "zero"))
    parts.append(_axis_name(field, f"{len(layers)} layers, from the pixels to the end"))
    return _svg(
        field, parts, "Range of each layer, beside what BatchNormalization says."
    )


def _bracket(x: float, top: float, bottom: float, thick: float) -> str:
    half = thick / 2 + 2
    return (
        f'<path class="memory" d="M{x - half:.1f} {top:.1f}h{2 * half:.1f}'
        f'M{x:.1f} {top:.1f}V{bottom:.1f}M{x - half:.1f} {bottom:.1f}h{2 * half:.1f}"/>'
    )


def curve(points: Sequence[tuple[float, float]], is_share: bool = False) -> str:
    """A measurement over the steps of a training, its last value named.

    Args:
      points: (step, value), at least two.
      is_share: whether values are shares in [0, 1], shown in percent.
    """
    times = 100 if is_share else 1
    values = [times * value for _, value in points]
    low, high = _without_outliers(values)
    if is_share:  # no mark is above 100, and one at least below
        marks = [mark for mark in ticks(min(low, 99.0), high, 3) if mark <= 100]
    else:
        marks = ticks(low, high, 3)
    field = _Field(270, 150, marks[0], marks[-1], 1)
    first, last = points[0][0], points[-1][0]
    inner = field.width - _LEFT - _RIGHT
    placed = [
        (_LEFT + inner * (step - first) / ((last - first) or 1), field.y(value))
        for (step, _), value in zip(points, values)
    ]
    end = f"{number(values[-1])}{' %' if is_share else ''}"
    parts = _grid(field, marks, "%" if is_share else "")
    parts.append(_path(placed, "curve"))
    x, y = placed[-1]
    parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
    parts.append(_label(x - 4, y - 8 if y > _TOP + 14 else y + 16, end, "end", "halo"))
    bottom = field.height - _BOTTOM + 14
    parts.append(_label(_LEFT, bottom, number(first), "start"))
    parts.append(_label(field.width - _RIGHT, bottom, f"step {number(last)}", "end"))
    return _svg(field, parts, f"From {number(values[0])} to {end} over the steps.")


def _without_outliers(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value, but for a few first ones far above all others."""
    ordered = sorted(values)
    high = ordered[-1]
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    spread = usual - ordered[0]
    if spread > 0 and high > usual + 2 * spread:
        high = usual + 0.3 * spread
    return ordered[0], high


def classes(names: Sequence[str], counts: Sequence[int], width: float) -> str:
    """How many images each class has: a bar each, the fewest and the most named."""
    marks = ticks(0, max(1, *counts), 3)
    field = _Field(width, 190, 0, marks[-1], len(counts))
    parts = _grid(field, marks, "images")
    pitch = (width - _LEFT - _RIGHT) / len(counts)
    thick = max(0.8, min(34.0, pitch - (4 if pitch > 8 else 0.3)))
    fits = pitch > 7 * max(map(len, names)) + 4
    for i, (name, count) in enumerate(zip(names, counts)):
        x, y = field.x(i), field.y(count)
        parts.append(
            f'<g><title>{_text(name)}: {count}</title><rect class="bar" '
            f'x="{x - thick / 2:.1f}" y="{y:.1f}" width="{thick:.1f}" '
            f'height="{field.y(0) - y:.1f}"/></g>'
        )
        if pitch > 7 * len(str(max(counts))) + 2:
            parts.append(_label(x, y - 4, str(count), "middle"))
        if fits:
            parts.append(_label(x, field.y(0) + 15, name, "middle"))
    if not fits:
        parts.append(_axis_name(field, f"{len(counts)} classes, in the file's order"))
    return _svg(field, parts, "How many images each class has.")


def share(value: float, low: float, high: float) -> str:
    """A share and its interval on a line from 0 to 100 %, or a part of it."""
    start = 0.0 if low < 0.5 else 0.5 if low < 0.9 else 0.9 if low < 0.99 else 0.99
    left, right, middle = (
        4 + 92 * (each - start) / (1 - start) for each in (low, high, value)
    )
    return (
        '<svg class="share" viewBox="0 0 100 16" role="img" '
        f'aria-label="on a line from {100 * start:g} to 100 percent">'
        f'<path class="track" d="M4 8H96M4 4v8M96 4v8"/>'
        f'<path class="spread" d="M{left:.1f} 8H{max(right, left + 1):.1f}"/>'
        f'<circle class="dot" cx="{middle:.1f}" cy="8" r="3.4"/></svg>'
    )


def _grid(field: _Field, marks: Iterable[float], name: str) -> list[str]:
    parts = []
    for mark in marks:
        y = field.y(mark)
        parts.append(_line(_LEFT, y, field.width - _RIGHT, y, "grid"))
        parts.append(_label(_LEFT - 6, y + 4, number(mark), "end"))
    if name:
        parts.append(_label(4, 12, name, "start"))
    return parts


def _axis_name(field: _Field, name: str) -> str:
    middle = (_LEFT + field.width - _RIGHT) / 2
    return _label(middle, field.height - 8, name, "middle")


def _label(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return (
        f'<text class="label {kind}" x="{x:.1f}" y="{y:.1f}" '
        f'text-anchor="{anchor}">{_text(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _mark(x: float, y: float, is_worst: bool) -> str:
    """A circle; of the worst a diamond, so that it is not told by its colour alone."""
    if is_worst:
        d = f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"
        return f'<path class="point" d="{d}"/>'
    return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'


def _path(points: Sequence[tuple[float, float]], kind: str) -> str:
    d = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind}" d="M{d}"/>' if points else ""


def _text(text: str) -> str:
    return html.escape(str(text))


def _svg(field: _Field, parts: Iterable[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {field.width:g} {field.height:g}" role="img" '
        f'aria-label="{_text(label)}">{"".join(parts)}</svg>'
    )
