"""The report's sections, each a piece of HTML; empty where the run has nothing to show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from difftune.report.charts import escaped, line_chart, number_text, points_of
from difftune.report.data import RunData, is_number, read_text


def section_of(title: str, body: str, note: str = "") -> str:
    """Return a section: its title, a note below it, its body (both are HTML already)."""
    aside = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escaped(title)}</h2>{aside}{body}</section>\n"


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


def _change(run: RunData) -> _Change | None:
    before, after = (run.summary.get(key) for key in ("before", "after"))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        means = [next((x[k] for k in ("reward/mean", "mean") if is_number(x.get(k))), None) for x in (before, after)]
        spread = next((before[k] for k in ("reward/std", "std") if is_number(before.get(k))), None)
        if means[0] is not None and means[1] is not None:
            return _Change(means[0], means[1], spread, "Mean reward before and after training, on held-out samples.")
    series = run.series("reward/mean")
    if not series:
        return None
    spreads = dict(run.series("reward/std"))
    first, last = series[0], series[-1]
    basis = f"Mean reward of the samples trained on, epoch {first[0]:g} and epoch {last[0]:g}."
    return _Change(first[1], last[1], spreads.get(first[0]), basis)


def headline(run: RunData) -> str:
    """Return the run's name, what it is made of, and the reward before and after."""
    facts = [
        ("algorithm", _setting(run.config, "algorithm")),
        ("reward", _setting(run.config, "reward")),
        ("model", _setting(run.config, "model")),
        ("epochs", f"{run.records[-1]['epoch']:g}" if run.records else ""),
    ]
    chips = "".join(f"<li><span>{key}</span> {escaped(value)}</li>" for key, value in facts if value)
    change = _change(run)
    figure = "" if change is None else _headline_figure(change)
    return f'<header><h1>{escaped(run.name)}</h1><ul class="chips">{chips}</ul>{figure}</header>\n'


def _headline_figure(change: _Change) -> str:
    gain = change.after - change.before
    gain_text = f"{'+' if gain >= 0 else ''}{number_text(gain, 3)}"
    if change.spread:
        size = gain / change.spread
        spread = f"{'+' if size >= 0 else ''}{number_text(size, 3)} base sd"
        aside = f" Base sd {number_text(change.spread, 3)}."
    else:
        spread, aside = "", ""
    extra = f"<small>{spread}</small>" if spread else ""
    mood = "up" if gain >= 0 else "down"
    return f"""<div class="headline">
<div><span>before</span><strong>{number_text(change.before)}</strong></div>
<div class="arrow" aria-hidden="true">→</div>
<div><span>after</span><strong class="after">{number_text(change.after)}</strong></div>
<div class="gain {mood}"><strong>{gain_text}</strong>{extra}</div>
</div>
<p class="note">{escaped(change.basis + aside)}</p>"""


def reward_section(run: RunData) -> str:
    """Return the reward's curve and those of its parts."""
    values = run.series("reward/mean")
    if not values:
        return ""
    body = line_chart(points_of(values, dict(run.series("reward/std"))), "mean reward", tall=True)
    parts = [k for k in run.keys() if k.startswith("reward/") and k not in ("reward/mean", "reward/std")]
    cards = "".join(_card(run, key, key.removeprefix("reward/")) for key in parts)
    note = "Mean over the epoch’s samples; the band is one standard deviation of the samples."
    if run.unreadable:
        note += f" {run.unreadable} line{'s' * (run.unreadable > 1)} of metrics.jsonl could not be read."
    grid = f'<h3>Parts</h3><div class="cards">{cards}</div>' if cards else ""
    return section_of("Reward", body + grid, note)


def _card(run: RunData, key: str, title: str) -> str:
    points = points_of(run.series(key))
    if not points:
        return ""
    head = f"<figcaption>{escaped(title)}<b>{number_text(points[-1].y)}</b></figcaption>"
    return f'<figure class="card">{head}{line_chart(points, title)}</figure>'


_TITLES = {
    "kl": "KL to reference",
    "kl_old": "KL to old policy",
    "clip_fraction": "Clip fraction",
    "ratio": "Importance ratio",
    "ratio/mean": "Importance ratio",
    "grad_norm": "Gradient norm",
    "log_prob": "Log-probability",
    "loss": "Loss",
    "advantage/abs_mean": "Size of advantages",
    "samples_per_second": "Samples per second",
    "denoiser_calls": "Denoiser passes",
    "denoiser_rows": "Denoiser calls, by picture",
}
"""Known metrics with their titles, in the order they are shown; others follow under their own names."""


def metrics_section(run: RunData) -> str:
    """Return one small chart per metric."""
    keys = [key for key in run.keys() if not key.startswith(("reward/", "seconds/"))]
    known = [key for key in _TITLES if key in keys]
    cards = "".join(_card(run, key, _TITLES.get(key, key)) for key in [*known, *(k for k in keys if k not in known)])
    return section_of("Training", f'<div class="cards">{cards}</div>') if cards else ""


def time_section(run: RunData) -> str:
    """Return where the time went, by phase."""
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
        tip = escaped(f"{name}: {_duration(seconds)} ({share:.0f} %)")
        bars.append(f'<i style="width:{share:.2f}%;background:{colour}" title="{tip}"></i>')
        legend.append(
            f'<li><i style="background:{colour}"></i>{escaped(name)} <b>{_duration(seconds)}</b> {share:.0f} %</li>'
        )
    body = f'<div class="bar">{"".join(bars)}</div><ul class="legend">{"".join(legend)}</ul>'
    return section_of("Time", body, f"{_duration(whole)} in {len(run.records)} epochs, by phase.")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def adapter_section(run: RunData) -> str:
    """Return the files that were saved, and the card's code that loads them."""
    folder = run.folder / "adapter"
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file()) if folder.is_dir() else []
    files.sort(key=lambda file: not file.name.startswith("pytorch_lora_weights"))
    if not files:
        return ""
    rows = "".join(
        f"<tr><td><code>{escaped(file)}</code></td><td>{file.stat().st_size / 1e6:.2f} MB</td></tr>" for file in files
    )
    # The card is where the code is written that fits the pipeline; the report repeats it.
    match = re.search(r"^(`{3,})python\n(.*?)\n\1$", read_text(folder / "README.md"), re.DOTALL | re.MULTILINE)
    code = match[2].replace("path/to/this/folder", str(folder)) if match else ""
    use = f"<pre><code>{escaped(code)}</code></pre>" if code else ""
    return section_of("Adapter", f'<div class="scroll"><table>{rows}</table></div>{use}')


def config_section(run: RunData) -> str:
    """Return ``config.yaml``, folded away."""
    if not run.config_text.strip():
        return ""
    text = run.config_text if len(run.config_text) <= 100_000 else run.config_text[:100_000] + "\n…"
    return section_of("Configuration", f"<details><summary>config.yaml</summary><pre>{escaped(text)}</pre></details>")
