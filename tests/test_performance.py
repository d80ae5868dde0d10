"""The command for real sizes: every model's twin is measured, and the sizes are those of the models."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from difftune import performance

#: Weights of the denoisers, in billions, as their authors and diffusers' own checkpoints have them.
SIZES = {"sd15": 0.8595, "sdxl": 2.5675, "sd35-medium": 2.2434, "flux": 11.9014}


#: One is enough where time counts.
TWINS = [pytest.param(name, marks=[] if name == "sd35-medium" else [pytest.mark.slow]) for name in SIZES]


@pytest.mark.parametrize("model", TWINS)
def test_a_twin_is_measured_with_ratio_1(model: str) -> None:
    row = performance.measure(model, tiny=True, batch=2, steps=2, rounds=1)
    assert row.ratio_error == 0 and row.dtype == "bf16"
    assert row.rollout > 0 and row.update > 0 and row.peak > 2**20 and row.first > 0
    assert row.weights < 0.01
    assert row.line().count("|") == performance.HEADER.splitlines()[0].count("|")


@pytest.mark.parametrize(("model", "size"), SIZES.items())
def test_the_geometry_is_the_models(model: str, size: float) -> None:
    assert SIZES.keys() == performance.GEOMETRIES.keys()
    with torch.device("meta"):
        pipe = performance.GEOMETRIES[model].build(False)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(size, abs=1e-3)


@pytest.mark.slow
def test_the_command_prints_a_row_for_each_and_says_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "--steps", "2", "--rounds", "1", "--model", "sd15", "--compile", "no", "--device", "cpu"]
    performance.main([*arguments, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"] == "sd15" and row["ratio_error"] == 0
    performance.main([*arguments[:-1], "nowhere"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and err.startswith("sd15, compile no: ") and err.count("\n") == 1


def test_a_row_that_fails_is_told_by_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = argparse.Namespace(returncode=1, stderr="Traceback\n  x\ntorch.OutOfMemoryError: 2 GiB\n", stdout="")
    monkeypatch.setattr(performance.subprocess, "run", lambda *a, **k: failed)
    options = argparse.Namespace(
        batch=1, steps=1, rounds=1, device="cpu", dtype="bf16", tiny=True, no_checkpointing=False
    )
    assert performance._in_its_own_process(options, "flux", "no") == "torch.OutOfMemoryError: 2 GiB"
