"""The headline claims, held to on the embedded models: slow, and run in CI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from difftune import bench, cli
from difftune.sampler import Sampler

pytestmark = pytest.mark.slow

SAMPLE = 4 * 16 * 16 * 4
"""Bytes of one sample of the embedded models: four channels, 16 by 16, in fp32."""


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


@pytest.mark.parametrize("method", ["ddpo", "rdp"])
def test_live_tensors_grow_by_the_recorded_samples_alone(method: str) -> None:
    """A step's graph is gone before the next one's is there: what four steps more add is what the rollout recorded."""
    few, many = (bench.peak_tensors(method, "difftune/tiny-sd", steps) for steps in (2, 6))
    recorded = 4 * 2 * SAMPLE / 2**20  # of two samples; twice over, while the record is put together
    assert recorded < few / 100
    assert 0 <= many - few <= 2.1 * recorded


def test_alignprop_through_one_step_holds_as_much_at_fifty_steps_as_at_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    ten, fifty = (bench.peak_tensors("alignprop", "difftune/tiny-sd", steps) for steps in (10, 50))
    assert fifty < 1.15 * ten
    # The measure sees a graph that is kept: all steps differentiated, and nothing computed anew.
    monkeypatch.setitem(bench.METHODS, "alignprop", ({"truncation": "none"}, "jpeg_proxy"))
    backprop = Sampler.backprop
    monkeypatch.setattr(Sampler, "backprop", lambda *args, **more: backprop(*args, **more, checkpointing=False))
    two, four = (bench.peak_tensors("alignprop", "difftune/tiny-sd", steps) for steps in (2, 4))
    assert four > 1.3 * two
