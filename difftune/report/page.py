"""The report's page, put together from its sections."""

from __future__ import annotations

from pathlib import Path

from difftune.report.charts import escaped
from difftune.report.data import read_run
from difftune.report.files import replace_file
from difftune.report.pictures import pictures_section
from difftune.report.sections import (
    adapter_section,
    config_section,
    headline,
    metrics_section,
    reward_section,
    time_section,
)
from difftune.report.style import STYLE


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
    run = read_run(folder)
    sections = [
        headline(run),
        reward_section(run),
        pictures_section(run),
        metrics_section(run),
        time_section(run),
        adapter_section(run),
        config_section(run),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(run.name)} · difftune</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(section for section in sections if section)}
</main>
</body>
</html>
"""
    return replace_file(folder / "report.html", page.encode("utf-8", errors="replace"))
