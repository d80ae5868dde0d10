"""Curves as SVG under labels that are HTML, so that text keeps its size on a phone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MAX_POINTS = 240
"""Points a curve is drawn with; longer runs are averaged over neighbouring epochs."""


@dataclass(frozen=True)
class Point:
    """One drawn point: ``first`` to ``last`` are the epochs it stands for."""

    first: float
    last: float
    x: float
    y: float
    spread: float | None


def points_of(values: list[tuple[float, float]], spreads: Mapping[float, float] | None = None) -> list[Point]:
    """Return (epoch, value) pairs as points to draw, neighbours averaged where there are too many.

    ``spreads`` are the standard deviations by epoch, where they are known.
    """
    size = max(1, math.ceil(len(values) / _MAX_POINTS))
    points = []
    for start in range(0, len(values), size):
        bunch = values[start : start + size]
        known = [spreads[x] for x, _ in bunch if x in spreads] if spreads else []
        points.append(
            Point(
                first=bunch[0][0],
                last=bunch[-1][0],
                x=sum(x for x, _ in bunch) / len(bunch),
                y=sum(y for _, y in bunch) / len(bunch),
                spread=sum(known) / len(known) if known else None,
            )
        )
    return points


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers within [low, high]."""
    raw = (high - low) / max(count, 1)
    if not raw > 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)][: 3 * count]


def number_text(value: float, digits: int = 4) -> str:
    """Write a number in few characters, with a true minus sign."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def _range(points: Sequence[Point]) -> tuple[float, float]:
    lows = [p.y - (p.spread or 0) for p in points]
    highs = [p.y + (p.spread or 0) for p in points]
    low, high = min(lows), max(highs)
    # A flat curve is drawn in the middle and not magnified into noise.
    margin = 0.06 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(low) * 0.1, 1e-6)
    return low - margin, high + margin


def line_chart(points: Sequence[Point], label: str, tall: bool = False) -> str:
    """Return a line chart: SVG for the marks, HTML for text and hover targets.

    Args:
        points: at least one, by rising x.
        label: what is drawn, for hover texts and screen readers.
        tall: the large form, with more ticks.
    """
    low, high = _range(points)
    left, right = points[0].x, points[-1].x
    span = right - left or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / span if right > left else 0.5
        return 100 * along, 100 * (high - y) / (high - low)

    marks = []
    if any(p.spread for p in points):
        upper = [place(p.x, p.y + (p.spread or 0)) for p in points]
        lower = [place(p.x, p.y - (p.spread or 0)) for p in reversed(points)]
        marks.append(f'<polygon class="band" points="{_path([*upper, *lower])}"/>')
    marks.append(f'<polyline class="line" points="{_path([place(p.x, p.y) for p in points])}"/>')
    rows = []
    for value in _ticks(low, high, 5 if tall else 3):
        top = place(left, value)[1]
        marks.insert(0, f'<line class="rule" x1="0" x2="100" y1="{top:.2f}" y2="{top:.2f}"/>')
        rows.append(f'<span class="y" style="top:{top:.2f}%">{number_text(value)}</span>')
    for value in _ticks(left, right, 6 if tall else 3):
        if value == int(value):
            rows.append(f'<span class="x" style="left:{place(value, low)[0]:.2f}%">{int(value)}</span>')
    end_x, end_y = place(points[-1].x, points[-1].y)
    rows.append(f'<span class="dot" style="left:{end_x:.2f}%;top:{end_y:.2f}%"></span>')
    rows += _hover(points, [place(p.x, p.y) for p in points], label)
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(marks)}</svg>'
    summary = (
        f"{label}: {number_text(points[0].y)} at epoch {points[0].first:g}, {number_text(points[-1].y)} at the end"
    )
    kind = "plot tall" if tall else "plot"
    return f'<div class="{kind}" role="img" aria-label="{escaped(summary)}">{svg}{"".join(rows)}</div>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in places)


def _hover(points: Sequence[Point], places: Sequence[tuple[float, float]], label: str) -> list[str]:
    """Return one invisible column per point, which shows the point's numbers while it is pointed at."""
    spans = []
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        start = 0 if index == 0 else (places[index - 1][0] + x) / 2
        stop = 100 if index == len(points) - 1 else (places[index + 1][0] + x) / 2
        epochs = f"{point.first:g}" if point.first == point.last else f"{point.first:g}–{point.last:g}"
        spread = "" if point.spread is None else f" ± {number_text(point.spread, 3)}"
        tip = f"epoch {epochs}: {number_text(point.y)}{spread}"
        side = " left" if x > 50 else ""
        place = f"left:{start:.2f}%;width:{stop - start:.2f}%"
        dot = f'<b style="left:{100 * (x - start) / (stop - start or 1):.1f}%;top:{y:.2f}%"></b>'
        spans.append(f'<i class="hit{side}" style="{place}" data-tip="{escaped(tip)}">{dot}</i>')
    return spans


def escaped(value: Any) -> str:
    """Return ``value`` as text that is safe in HTML, in attributes too."""
    return html.escape(str(value), quote=True)
