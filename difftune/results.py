"""Trains every recipe of the embedded models and writes what it gave: ``python -m difftune.results`` (make results).

A cell is one recipe with one seed. It is trained, its file is loaded by the stock pipeline, and the same prompts that
were never trained on are drawn with it and without it, from the same fresh noise. What came out is kept as a JSON file
per cell beside the page, and the curves of each algorithm as a picture; a cell whose recipe has not changed since is
not run again, and one that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from difftune.checkpoint import write_atomically
from difftune.config import load_config, parse_yaml, recipe_text, recipes, resolve

MODELS = ("tiny-sd", "tiny-flow")

THREE_SEEDS = ("alignprop", "d3po", "ddpo", "diffusion_dpo", "grpo", "rdp", "rwr")
"""Algorithms whose compressibility recipes are run with three seeds; the others with one."""

HEAD = """# Results

What the recipes of the embedded models gave; a recipe that is not here has not been run to its end. *Base* and *tuned*
are mean rewards on prompts that were never trained on, drawn from fresh noise by the stock pipeline, without and with
the saved file; *gain* is their difference in standard errors of the difference of the two means, for each seed.
Denoiser calls count pictures, not batches: a guided step of one picture is two. Seconds are those of the epochs,
{threads} CPU thread{plural}, and noisy.

    make results                                   # all cells that are missing or whose recipe has changed
    python -m difftune.results --only 'rdp-*'      # some of them

The raw records, with the reward of every epoch, are in [results/](results).
"""


def cells(only: Sequence[str] = ("*",)) -> Iterator[tuple[str, int]]:
    """Yield (recipe, seed) for the recipes of embedded models whose names match one of the patterns.

    The first seed of every recipe comes before the second of any.
    """
    names = [name for name in sorted(recipes()) if name.endswith(MODELS)]
    names = [name for name in names if any(Path(name).match(pattern) for pattern in only)]
    yield from ((name, 0) for name in names)
    many = [name for name in names if "scene" not in name and load_config(name).algorithm["name"] in THREE_SEEDS]
    yield from ((name, seed) for seed in (1, 2) for name in many)


def settings_of(name: str, seed: int, threads: int) -> dict[str, Any]:
    """Return all settings of a cell, without those that name a place."""
    config = load_config(name, [f"train.seed={seed}", f"threads={threads}"])
    return {key: value for key, value in resolve(config).items() if key not in ("out", "device")}


def unchanged(recorded: dict[str, Any], current: dict[str, Any], written: dict[str, Any]) -> bool:
    """Return whether a record's settings are still those of its recipe.

    A setting that did not exist when the record was made counts as unchanged unless the recipe names it.

    Args:
        recorded: the settings in the record.
        current: what `settings_of` returns now.
        written: the recipe as it is written.
    """
    for key, value in current.items():
        if key not in recorded:
            if key in written:
                return False
        elif isinstance(value, dict) and isinstance(recorded[key], dict):
            deeper = written.get(key)
            if not unchanged(recorded[key], value, deeper if isinstance(deeper, dict) else {}):
                return False
        elif recorded[key] != value:
            return False
    return True


def up_to_date(record: dict[str, Any], threads: int) -> bool:
    """Return whether a record is of its recipe as it stands."""
    name = record["recipe"]
    current = settings_of(name, record["seed"], threads)
    return unchanged(record["settings"], current, parse_yaml(recipe_text(name), name))


def run_cell(name: str, seed: int, threads: int, runs: Path) -> dict[str, Any]:
    """Train one cell, or go on with it, and return its record.

    Raises:
        subprocess.CalledProcessError: the run failed; its message is on the terminal.
    """
    settings = settings_of(name, seed, threads)
    # A changed recipe is another run: the old one, finished or not, is left where it is.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    out = runs / f"{name}-{seed}-{digest}"
    resume = ["--resume"] if (out / "checkpoints").is_dir() else []
    overrides = [f"train.seed={seed}", f"threads={threads}", f"out={out}"]
    subprocess.run([sys.executable, "-m", "difftune", "train", name, *overrides, *resume], check=True)
    summary = json.loads((out / "summary.json").read_text())
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "recipe": name,
        "seed": seed,
        "settings": settings,
        **{key: summary[key] for key in ("before", "after", "better")},
        "pictures": summary["settings"]["samples"],
        "denoiser_rows": sum(epoch["denoiser_rows"] for epoch in epochs),
        "seconds": sum(sum(v for k, v in epoch.items() if k.startswith("seconds/")) for epoch in epochs),
        "rewards": [epoch["reward/mean"] for epoch in epochs],
    }


def gain(record: dict[str, Any]) -> float:
    """Return the gain of a record in standard errors: (after - before) / sqrt((s_before^2 + s_after^2) / n)."""
    before, after = record["before"], record["after"]
    error = math.sqrt((before["reward/std"] ** 2 + after["reward/std"] ** 2) / record["pictures"])
    difference: float = after["reward/mean"] - before["reward/mean"]
    return difference / error if error else math.copysign(math.inf, difference)


def page(records: Sequence[dict[str, Any]], threads: int) -> str:
    """Return the page: a line for each recipe, over its seeds."""
    lines = [HEAD.format(threads=threads, plural="" if threads == 1 else "s")]
    for model in MODELS:
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record["recipe"].endswith(model):
                rows.setdefault(record["recipe"], []).append(record)
        if not rows:
            continue
        lines += [f"\n## difftune/{model}\n", "| recipe | seeds | base | tuned | gain | denoiser calls | seconds |"]
        lines.append("|---|---:|---:|---:|---|---:|---:|")
        for name, of_seeds in sorted(rows.items()):
            base, tuned = (statistics.mean(r[key]["reward/mean"] for r in of_seeds) for key in ("before", "after"))
            gains = ", ".join(f"{gain(r):+.1f}" for r in of_seeds)
            calls = statistics.mean(r["denoiser_rows"] for r in of_seeds)
            seconds = statistics.mean(r["seconds"] for r in of_seeds)
            recipe = f"[{name.removesuffix('-' + model)}](../configs/{name}.yaml)"
            lines.append(
                f"| {recipe} | {len(of_seeds)} | {base:.3f} | {tuned:.3f} | {gains} | {calls:,.0f} | {seconds:.0f} |"
            )
    lines.append("\n## Curves\n\nTraining rewards, whose prompts differ from epoch to epoch, against denoiser calls.\n")
    lines += [f"![Training reward of {name}](results/{name}.svg)\n" for name in _by_algorithm(records)]
    return "\n".join(lines)


def _by_algorithm(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda one: one["settings"]["algorithm"]["name"]):
        found.setdefault(record["settings"]["algorithm"]["name"], []).append(record)
    return found


def curves(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the training reward of each epoch against the denoiser calls so far: a panel a recipe, a line a seed.

    Args:
        records: of one algorithm.
        file: SVG to write; the same records give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda one: (one["recipe"], one["seed"])):
        panels.setdefault(record["recipe"], []).append(record)
    figure = Figure(figsize=(4.2 * len(panels), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, of_seeds) in zip(axes, panels.items(), strict=True):
        for record in of_seeds:
            rewards = record["rewards"]
            calls = [record["denoiser_rows"] * (epoch + 1) / len(rewards) / 1000 for epoch in range(len(rewards))]
            axis.plot(calls, rewards, label=f"seed {record['seed']}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("thousands of denoiser calls", fontsize=8)
        axis.set_ylabel("training reward", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        if len(of_seeds) > 1:
            axis.legend(fontsize=7, frameon=False)
    # Letters stay text, and neither ids nor a date change from one drawing to the next.
    with matplotlib.rc_context({"svg.hashsalt": file.stem, "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None, "Creator": None}, facecolor="white")


def write_page(docs: Path, threads: int) -> None:
    """Write ``results.md`` and the curves of every algorithm from the records beside them."""
    records = read_records(docs / "results")
    write_atomically(docs / "results.md", page(records, threads))
    for algorithm, of_one in _by_algorithm(records).items():
        curves(of_one, docs / "results" / f"{algorithm}.svg")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records under ``folder``, in the order of their names."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def main() -> None:
    """Run the cells that are missing and write the page."""
    parser = argparse.ArgumentParser(prog="python -m difftune.results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of recipe names; default: all")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where results.md and results/ are")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="where the runs are kept")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run; part of its record")
    parser.add_argument("--list", action="store_true", help="only say which cells would be run")
    options = parser.parse_args()
    folder = options.docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in cells(options.only):
        file = folder / f"{name}-{seed}.json"
        if file.exists() and up_to_date(json.loads(file.read_text()), options.threads):
            continue
        print(f"{name}, seed {seed}", flush=True)
        if options.list:
            continue
        started = time.perf_counter()
        record = run_cell(name, seed, options.threads, options.runs)
        write_atomically(file, json.dumps(record, indent=1) + "\n")
        print(f"{name}, seed {seed}: {gain(record):+.1f} standard errors, {time.perf_counter() - started:.0f} s")
        write_page(options.docs, options.threads)
    if not options.list:
        write_page(options.docs, options.threads)


if __name__ == "__main__":
    main()
