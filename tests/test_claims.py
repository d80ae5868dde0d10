"""The headline claims, held to on the embedded models: slow, and run in CI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difftune import bench, cli

pytestmark = pytest.mark.slow


def test_the_demo_raises_the_held_out_reward_by_a_standard_deviation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert summary["gain_in_base_std"] >= 1.0
    out = capsys.readouterr().out
    for name in ("adapter", "before_after.png", "report.html"):
        assert (tmp_path / "demo" / name).exists() and name in out


def test_peak_memory_does_not_grow_with_the_number_of_steps() -> None:
    few, many = (bench.peak_memory("difftune/tiny-sd", steps) for steps in (4, 16))
    assert many <= 1.1 * few
