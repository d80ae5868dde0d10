"""What a person looks at: sample grids, and a report of the run in one HTML file.

The report needs nothing but itself: no script, no font, no request leaves it (a content policy forbids all three).
Curves are drawn as SVG under labels that are HTML, so that text keeps its size on a phone. Everything that came from
users (prompts, names, configuration) is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Sample grids

_TILE = 144
"""Least side of a picture in a grid, in pixels: smaller ones are enlarged by a whole factor."""

_GAP = 6
_CAPTION_LINES = 2
_FONT_SIZE = 13


def sample_grid(images: Tensor, columns: int, *, path: str | Path, captions: Sequence[str] | None = None) -> Path:
    """Write pictures as one PNG, in rows.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1], at least one. Small pictures are enlarged by a whole factor, unsmoothed.
        columns: pictures in a row, at least 1.
        path: where to write; the folder is made, the file replaced atomically.
        captions: ``B`` lines to put below the pictures; cut where they do not fit.

    Returns:
        ``path``.

    Raises:
        ValueError: wrong shapes or counts.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"sample_grid got images {tuple(images.shape)}, expected (B, 3, H, W) with B at least 1")
    if columns < 1:
        raise ValueError(f"sample_grid got {columns} columns, expected at least 1")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"sample_grid got {len(captions)} captions for {len(images)} images")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    factor = max(1, math.ceil(_TILE / max(pixels.shape[1:3])))
    height, width = pixels.shape[1] * factor, pixels.shape[2] * factor
    font = ImageFont.load_default(_FONT_SIZE)
    text_height = 0 if captions is None else _CAPTION_LINES * (_FONT_SIZE + 3) + 4
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    sheet_size = (columns * (width + _GAP) + _GAP, rows * (height + text_height + _GAP) + _GAP)
    sheet = Image.new("RGB", sheet_size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pixels):
        x = _GAP + index % columns * (width + _GAP)
        y = _GAP + index // columns * (height + text_height + _GAP)
        tile = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if captions is not None:
            for row, line in enumerate(_caption_lines(captions[index], font, width)):
                draw.text((x, y + height + 3 + row * (_FONT_SIZE + 3)), line, fill=(70, 70, 70), font=font)
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return _replace(Path(path), file.getvalue())


def _caption_lines(caption: str, font: Any, width: int) -> list[str]:
    """Cut a caption into at most two lines of ``width`` pixels; control characters are dropped."""
    # A caption can be a whole page: what cannot fit need not be measured.
    words = "".join(c if c.isprintable() else " " for c in caption[:width]).split() or ["(empty prompt)"]
    lines = [""]
    while words:
        longer = f"{lines[-1]} {words[0]}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
            words.pop(0)
        elif len(lines) < _CAPTION_LINES:
            lines.append("")
        else:
            lines[-1] += " …"
            break
    return [_fit(line, font, width) for line in lines]


def _fit(line: str, font: Any, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _replace(path: Path, content: bytes) -> Path:
    """Write a file beside its place, sync it and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a report is to be shown around.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


# Reading a run

_MAX_PICTURE = 2**20
"""Bytes of a sample grid that go into the report as they are; larger ones are shrunk."""


@dataclass(frozen=True)
class _Run:
    """What a run's folder holds, as far as it could be read.

    Attributes:
        name: the folder's name.
        folder: the folder.
        records: the lines of ``metrics.jsonl`` by rising epoch, one per epoch; only numbers.
        unreadable: lines that were no record (a line that was being written when the run was killed).
        samples: epoch -> PNG of its sample grid.
        config_text: ``config.yaml`` as it stands.
        config: the same, parsed; empty if it cannot be.
        summary: ``summary.json``; empty if there is none.
    """

    name: str
    folder: Path
    records: list[dict[str, float]]
    unreadable: int
    samples: dict[int, Path]
    config_text: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (epoch, value) where the metric was recorded."""
        return [(record["epoch"], record[key]) for record in self.records if key in record]

    def keys(self) -> list[str]:
        """Return the names of all metrics, in the order they were first written."""
        return list(dict.fromkeys(key for record in self.records for key in record if key not in ("epoch", "step")))


def _read_run(folder: Path) -> _Run:
    records, unreadable = _read_metrics(folder / "metrics.jsonl")
    config_text = _read_text(folder / "config.yaml")
    config: Any = {}
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        pass
    summary: Any = {}
    try:
        summary = json.loads(_read_text(folder / "summary.json") or "{}")
    except ValueError:
        pass
    samples = {}
    for file in sorted((folder / "samples").glob("epoch_*.png")):
        match = re.fullmatch(r"epoch_(\d+)\.png", file.name)
        if match:
            samples[int(match[1])] = file
    return _Run(
        name=folder.resolve().name,
        folder=folder,
        records=records,
        unreadable=unreadable,
        samples=dict(sorted(samples.items())),
        config_text=config_text,
        config=config if isinstance(config, Mapping) else {},
        summary=summary if isinstance(summary, Mapping) else {},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _read_metrics(path: Path) -> tuple[list[dict[str, float]], int]:
    """Return the records by epoch (a later line replaces an earlier one of its epoch) and the count of bad lines."""
    by_epoch: dict[float, dict[str, float]] = {}
    bad = 0
    for line in _read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            numbers = {str(k): float(v) for k, v in record.items() if _is_number(v)}
            by_epoch[numbers["epoch"]] = numbers
        except (ValueError, AttributeError, KeyError):
            bad += 1
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], bad


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Charts

_MAX_POINTS = 240
"""Points a curve is drawn with; longer runs are averaged over neighbouring epochs."""


@dataclass(frozen=True)
class _Point:
    """One drawn point: ``first`` to ``last`` are the epochs it stands for."""

    first: float
    last: float
    x: float
    y: float
    spread: float | None


def _points(values: list[tuple[float, float]], spreads: Mapping[float, float] | None = None) -> list[_Point]:
    size = max(1, math.ceil(len(values) / _MAX_POINTS))
    points = []
    for start in range(0, len(values), size):
        bunch = values[start : start + size]
        known = [spreads[x] for x, _ in bunch if x in spreads] if spreads else []
        points.append(
            _Point(
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


def _number(value: float, digits: int = 4) -> str:
    """Write a number in few characters, with a true minus sign."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def _range(points: Sequence[_Point]) -> tuple[float, float]:
    lows = [p.y - (p.spread or 0) for p in points]
    highs = [p.y + (p.spread or 0) for p in points]
    low, high = min(lows), max(highs)
    # A flat curve is drawn in the middle and not magnified into noise.
    margin = 0.06 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(low) * 0.1, 1e-6)
    return low - margin, high + margin


def _chart(points: Sequence[_Point], label: str, tall: bool = False) -> str:
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
        rows.append(f'<span class="y" style="top:{top:.2f}%">{_number(value)}</span>')
    for value in _ticks(left, right, 6 if tall else 3):
        if value == int(value):
            rows.append(f'<span class="x" style="left:{place(value, low)[0]:.2f}%">{int(value)}</span>')
    end_x, end_y = place(points[-1].x, points[-1].y)
    rows.append(f'<span class="dot" style="left:{end_x:.2f}%;top:{end_y:.2f}%"></span>')
    rows += _hover(points, [place(p.x, p.y) for p in points], label)
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(marks)}</svg>'
    summary = f"{label}: {_number(points[0].y)} at epoch {points[0].first:g}, {_number(points[-1].y)} at the end"
    kind = "plot tall" if tall else "plot"
    return f'<div class="{kind}" role="img" aria-label="{_text(summary)}">{svg}{"".join(rows)}</div>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in places)


def _hover(points: Sequence[_Point], places: Sequence[tuple[float, float]], label: str) -> list[str]:
    """Return one invisible column per point, which shows the point's numbers while it is pointed at."""
    spans = []
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        start = 0 if index == 0 else (places[index - 1][0] + x) / 2
        stop = 100 if index == len(points) - 1 else (places[index + 1][0] + x) / 2
        epochs = f"{point.first:g}" if point.first == point.last else f"{point.first:g}–{point.last:g}"
        spread = "" if point.spread is None else f" ± {_number(point.spread, 3)}"
        tip = f"epoch {epochs}: {_number(point.y)}{spread}"
        side = " left" if x > 50 else ""
        place = f"left:{start:.2f}%;width:{stop - start:.2f}%"
        dot = f'<b style="left:{100 * (x - start) / (stop - start or 1):.1f}%;top:{y:.2f}%"></b>'
        spans.append(f'<i class="hit{side}" style="{place}" data-tip="{_text(tip)}">{dot}</i>')
    return spans


# The report


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's folder from what is there, and return its path.

    Reads ``metrics.jsonl`` (missing metrics and a torn last line are no fault), ``config.yaml``, ``samples/``,
    ``adapter/`` and ``summary.json`` (``{"before": {"reward/mean": ..., "reward/std": ...}, "after": {...}}``, scores
    of held-out prompts; without it the first and the last epoch stand in). The file is replaced atomically.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {str(run_dir)!r} does not exist")
    run = _read_run(folder)
    sections = [
        _headline(run),
        _reward_section(run),
        _pictures_section(run),
        _metrics_section(run),
        _time_section(run),
        _adapter_section(run),
        _config_section(run),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(run.name)} · difftune</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{"".join(section for section in sections if section)}
</main>
</body>
</html>
"""
    return _replace(folder / "report.html", page.encode("utf-8", errors="replace"))


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str, note: str = "") -> str:
    aside = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{aside}{body}</section>\n"


def _setting(config: Mapping[str, Any], key: str) -> str:
    """Return a component's name from the configuration, whether it is written as a string, a mapping or a list."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("name", value.get("id", ""))
    if isinstance(value, (list, tuple)):
        names = [str(item.get("name", "?")) if isinstance(item, Mapping) else str(item) for item in value]
        value = " + ".join(names[:4]) + (" + …" if len(names) > 4 else "")
    return str(value) if value else ""


@dataclass(frozen=True)
class _Change:
    """Reward before and after: means, the base's standard deviation where it is known, and what was compared."""

    before: float
    after: float
    spread: float | None
    basis: str


def _change(run: _Run) -> _Change | None:
    before, after = (run.summary.get(key) for key in ("before", "after"))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        means = [next((x[k] for k in ("reward/mean", "mean") if _is_number(x.get(k))), None) for x in (before, after)]
        spread = next((before[k] for k in ("reward/std", "std") if _is_number(before.get(k))), None)
        if means[0] is not None and means[1] is not None:
            return _Change(means[0], means[1], spread, "Mean reward before and after training, on held-out samples.")
    series = run.series("reward/mean")
    if not series:
        return None
    spreads = dict(run.series("reward/std"))
    first, last = series[0], series[-1]
    basis = f"Mean reward of the samples trained on, epoch {first[0]:g} and epoch {last[0]:g}."
    return _Change(first[1], last[1], spreads.get(first[0]), basis)


def _headline(run: _Run) -> str:
    facts = [
        ("algorithm", _setting(run.config, "algorithm")),
        ("reward", _setting(run.config, "reward")),
        ("model", _setting(run.config, "model")),
        ("epochs", f"{run.records[-1]['epoch']:g}" if run.records else ""),
    ]
    chips = "".join(f"<li><span>{key}</span> {_text(value)}</li>" for key, value in facts if value)
    change = _change(run)
    figure = "" if change is None else _headline_figure(change)
    return f'<header><h1>{_text(run.name)}</h1><ul class="chips">{chips}</ul>{figure}</header>\n'


def _headline_figure(change: _Change) -> str:
    gain = change.after - change.before
    gain_text = f"{'+' if gain >= 0 else ''}{_number(gain, 3)}"
    if change.spread:
        size = gain / change.spread
        spread = f"{'+' if size >= 0 else ''}{_number(size, 3)} base sd"
        aside = f" Base sd {_number(change.spread, 3)}."
    else:
        spread, aside = "", ""
    extra = f"<small>{spread}</small>" if spread else ""
    mood = "up" if gain >= 0 else "down"
    return f"""<div class="headline">
<div><span>before</span><strong>{_number(change.before)}</strong></div>
<div class="arrow" aria-hidden="true">→</div>
<div><span>after</span><strong class="after">{_number(change.after)}</strong></div>
<div class="gain {mood}"><strong>{gain_text}</strong>{extra}</div>
</div>
<p class="note">{_text(change.basis + aside)}</p>"""


def _reward_section(run: _Run) -> str:
    values = run.series("reward/mean")
    if not values:
        return ""
    body = _chart(_points(values, dict(run.series("reward/std"))), "mean reward", tall=True)
    parts = [k for k in run.keys() if k.startswith("reward/") and k not in ("reward/mean", "reward/std")]
    cards = "".join(_card(run, key, key.removeprefix("reward/")) for key in parts)
    note = "Mean over the epoch’s samples; the band is one standard deviation of the samples."
    if run.unreadable:
        note += f" {run.unreadable} line{'s' * (run.unreadable > 1)} of metrics.jsonl could not be read."
    grid = f'<h3>Parts</h3><div class="cards">{cards}</div>' if cards else ""
    return _section("Reward", body + grid, note)


def _card(run: _Run, key: str, title: str) -> str:
    points = _points(run.series(key))
    if not points:
        return ""
    head = f"<figcaption>{_text(title)}<b>{_number(points[-1].y)}</b></figcaption>"
    return f'<figure class="card">{head}{_chart(points, title)}</figure>'


_TITLES = {
    "kl": "KL to reference",
    "kl_old": "KL to old policy",
    "clip_fraction": "Clip fraction",
    "ratio": "Importance ratio",
    "ratio/mean": "Importance ratio",
    "grad_norm": "Gradient norm",
    "log_prob": "Log-probability",
    "loss": "Loss",
    "samples_per_second": "Samples per second",
}
"""Known metrics with their titles, in the order they are shown; others follow under their own names."""


def _metrics_section(run: _Run) -> str:
    keys = [key for key in run.keys() if not key.startswith(("reward/", "seconds/"))]
    known = [key for key in _TITLES if key in keys]
    cards = "".join(_card(run, key, _TITLES.get(key, key)) for key in [*known, *(k for k in keys if k not in known)])
    return _section("Training", f'<div class="cards">{cards}</div>') if cards else ""


def _time_section(run: _Run) -> str:
    totals = {
        key.removeprefix("seconds/"): sum(value for _, value in run.series(key))
        for key in run.keys()
        if key.startswith("seconds/")
    }
    whole = sum(totals.values())
    if whole <= 0:
        return ""
    bars, legend = [], []
    for index, (name, seconds) in enumerate(sorted(totals.items(), key=lambda item: -item[1])):
        colour = f"var(--c{index % 6})"
        share = 100 * seconds / whole
        tip = _text(f"{name}: {_duration(seconds)} ({share:.0f} %)")
        bars.append(f'<i style="width:{share:.2f}%;background:{colour}" title="{tip}"></i>')
        legend.append(
            f'<li><i style="background:{colour}"></i>{_text(name)} <b>{_duration(seconds)}</b> {share:.0f} %</li>'
        )
    body = f'<div class="bar">{"".join(bars)}</div><ul class="legend">{"".join(legend)}</ul>'
    return _section("Time", body, f"{_duration(whole)} in {len(run.records)} epochs, by phase.")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _pictures_section(run: _Run) -> str:
    pictures = {epoch: picture for epoch, file in run.samples.items() if (picture := _picture(file)) is not None}
    if not pictures:
        return ""
    epochs = list(pictures)
    ends = "".join(_figure(epoch, pictures[epoch]) for epoch in dict.fromkeys((epochs[0], epochs[-1])))
    strip = "".join(_figure(epoch, pictures[epoch]) for epoch in _spread_out(epochs[1:-1], 6))
    # Wide grids would be too small beside each other.
    shape = " wide" if pictures[epochs[0]].aspect > 1.7 else ""
    row = f'<h3>In between</h3><div class="strip{shape}">{strip}</div>' if strip else ""
    note = "The same prompts and the same noise every time."
    return _section("Samples", f'<div class="pair{shape}">{ends}</div>{row}', note)


def _figure(epoch: int, picture: _Picture) -> str:
    name = "base model" if epoch == 0 else f"epoch {epoch}"
    image = f'<img src="{picture.url}" alt="samples, {name}" loading="lazy">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"


def _spread_out(items: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of ``items``, evenly spread."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


@dataclass(frozen=True)
class _Picture:
    """A sample grid as a data URL, and its width over its height."""

    url: str
    aspect: float


def _picture(file: Path) -> _Picture | None:
    """Return a sample grid, shrunk where it is large; ``None`` if it is no whole picture."""
    kind = "png"
    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            aspect = picture.width / picture.height
            if len(data) > _MAX_PICTURE:
                small = picture.convert("RGB")
                small.thumbnail((1600, 1600))
                out = io.BytesIO()
                small.save(out, format="JPEG", quality=88)
                kind, data = "jpeg", out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return _Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", aspect)


def _adapter_section(run: _Run) -> str:
    folder = run.folder / "adapter"
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file()) if folder.is_dir() else []
    files.sort(key=lambda file: not file.name.startswith("pytorch_lora_weights"))
    if not files:
        return ""
    rows = "".join(
        f"<tr><td><code>{_text(file)}</code></td><td>{file.stat().st_size / 1e6:.2f} MB</td></tr>" for file in files
    )
    # The card is where the code is written that fits the pipeline; the report repeats it.
    match = re.search(r"^(`{3,})python\n(.*?)\n\1$", _read_text(folder / "README.md"), re.DOTALL | re.MULTILINE)
    code = match[2].replace("path/to/this/folder", str(folder)) if match else ""
    use = f"<pre><code>{_text(code)}</code></pre>" if code else ""
    return _section("Adapter", f'<div class="scroll"><table>{rows}</table></div>{use}')


def _config_section(run: _Run) -> str:
    if not run.config_text.strip():
        return ""
    text = run.config_text if len(run.config_text) <= 100_000 else run.config_text[:100_000] + "\n…"
    return _section("Configuration", f"<details><summary>config.yaml</summary><pre>{_text(text)}</pre></details>")


_STYLE = """
:root{--paper:#fbfbf9;--card:#fff;--ink:#1d2129;--soft:#5d6470;--faint:#8a919c;--rule:#e6e6e1;--accent:#2563c9;
--band:#2563c922;--up:#15784a;--upbg:#e3f4ea;--down:#b3372f;--downbg:#fbe9e7;
--c0:#2563c9;--c1:#e08a1e;--c2:#2f9e77;--c3:#b0509c;--c4:#8a919c;--c5:#c9b037}
@media(prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1c1f25;--ink:#eceef1;--soft:#a9b0bb;--faint:#7d8591;
--rule:#2c3038;--accent:#79a8f5;--band:#79a8f52b;--up:#6fd3a0;--upbg:#173427;--down:#f09890;--downbg:#3d2220;
--c0:#79a8f5;--c1:#e9a857;--c2:#5cc49f;--c3:#d488c4;--c4:#7d8591;--c5:#d9c766}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:0 0 .2rem;letter-spacing:-.005em}
h3{font-size:.95rem;margin:2.2rem 0 .6rem;color:var(--soft);font-weight:600}
section{margin-top:44px}
.note{color:var(--soft);font-size:.9rem;margin:0 0 .9rem}
.chips{list-style:none;display:flex;flex-wrap:wrap;gap:6px 22px;margin:0;padding:0;font-size:.95rem}
.chips span{color:var(--faint)}
.chips li{overflow-wrap:anywhere}
.headline{display:flex;flex-wrap:wrap;align-items:center;gap:10px 28px;margin:26px 0 12px;padding:22px 26px;
background:var(--card);border:1px solid var(--rule);border-radius:14px}
.headline span{display:block;color:var(--faint);font-size:.85rem}
.headline strong{font-size:2.5rem;line-height:1.15;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.headline .after{color:var(--accent)}
.headline .arrow{font-size:1.9rem;color:var(--faint)}
.gain{margin-left:auto;padding:8px 16px;border-radius:10px;text-align:right}
.gain strong{display:block;font-size:1.35rem}
.gain small{font-size:.9rem}
.gain.up{color:var(--up);background:var(--upbg)}
.gain.down{color:var(--down);background:var(--downbg)}
.plot{position:relative;height:96px;margin:10px 8px 26px 46px;font-size:.72rem;color:var(--faint);
font-variant-numeric:tabular-nums}
.plot.tall{height:300px;margin:14px 10px 30px 56px;font-size:.8rem}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.line{fill:none;stroke:var(--accent);stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.tall .line{stroke-width:2.25}
.band{fill:var(--band)}
.rule{stroke:var(--rule);stroke-width:1;vector-effect:non-scaling-stroke}
.plot .y{position:absolute;right:100%;transform:translateY(-50%);padding-right:8px;white-space:nowrap}
.plot .x{position:absolute;top:100%;transform:translateX(-50%);padding-top:6px}
.plot .dot,.hit b{position:absolute;width:8px;height:8px;margin:-4px;border-radius:50%;background:var(--accent);
box-shadow:0 0 0 2px var(--card)}
.hit{position:absolute;top:0;bottom:0}
.hit b{visibility:hidden}
.hit:hover b{visibility:visible}
.hit:hover::after{content:attr(data-tip);position:absolute;bottom:calc(100% + 4px);left:0;z-index:2;padding:3px 9px;
border-radius:6px;background:var(--ink);color:var(--paper);font-style:normal;font-size:.8rem;white-space:nowrap;
pointer-events:none}
.hit.left:hover::after{left:auto;right:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px}
.card{margin:0;padding:12px 14px 2px;background:var(--card);border:1px solid var(--rule);border-radius:12px;min-width:0}
.card figcaption{display:flex;justify-content:space-between;gap:10px;font-size:.88rem;color:var(--soft);
overflow-wrap:anywhere}
.card b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.hit b{padding:0}
figure{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:18px}
.pair figure:only-child{grid-column:1/-1}
.pair.wide{grid-template-columns:1fr}
.pair img,.strip img{display:block;width:100%;height:auto;border:1px solid var(--rule);border-radius:10px;
background:#fff}
.pair figcaption,.strip figcaption{font-size:.88rem;color:var(--soft);padding-top:6px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px}
.strip.wide{grid-template-columns:repeat(auto-fill,minmax(300px,1fr))}
.bar{display:flex;height:22px;border-radius:7px;overflow:hidden;gap:2px}
.bar i{min-width:2px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 22px;margin:12px 0 0;padding:0;font-size:.9rem;
color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
.legend b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;width:100%}
td{border-top:1px solid var(--rule);padding:7px 12px 7px 0;white-space:nowrap}
td:last-child{text-align:right;padding-right:0;color:var(--soft)}
code,pre{font:.85rem/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:14px 16px;
overflow-x:auto;margin:14px 0 0}
summary{cursor:pointer;color:var(--soft);font-size:.95rem}
@media(max-width:640px){main{padding:24px 16px 56px}.pair{grid-template-columns:1fr}.plot.tall{height:220px}
.headline{gap:6px 18px;padding:16px 18px}.headline strong{font-size:1.9rem}.gain{margin-left:0}
.gain strong{font-size:1.2rem}}
"""
