"""What a run's folder holds, as far as it can be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class RunData:
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


def read_run(folder: Path) -> RunData:
    """Read a run's folder; what is missing or torn is left out."""
    records, unreadable = _read_metrics(folder / "metrics.jsonl")
    config_text = read_text(folder / "config.yaml")
    config: Any = {}
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        pass
    summary: Any = {}
    try:
        summary = json.loads(read_text(folder / "summary.json") or "{}")
    except ValueError:
        pass
    samples = {}
    for file in sorted((folder / "samples").glob("epoch_*.png")):
        match = re.fullmatch(r"epoch_(\d+)\.png", file.name)
        if match:
            samples[int(match[1])] = file
    return RunData(
        name=folder.resolve().name,
        folder=folder,
        records=records,
        unreadable=unreadable,
        samples=dict(sorted(samples.items())),
        config_text=config_text,
        config=config if isinstance(config, Mapping) else {},
        summary=summary if isinstance(summary, Mapping) else {},
    )


def read_text(path: Path) -> str:
    """Return a file's text, its bad bytes replaced; empty if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _read_metrics(path: Path) -> tuple[list[dict[str, float]], int]:
    """Return the records by epoch (a later line replaces an earlier one of its epoch) and the count of bad lines."""
    by_epoch: dict[float, dict[str, float]] = {}
    bad = 0
    for line in read_text(path).split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            numbers = {str(k): float(v) for k, v in record.items() if is_number(v)}
            by_epoch[numbers["epoch"]] = numbers
        except (ValueError, AttributeError, KeyError):
            bad += 1
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], bad


def is_number(value: Any) -> bool:
    """Say whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
