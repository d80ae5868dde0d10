"""The command line: what it prints, what it leaves behind, and with which code it ends."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import difftune as dt
from difftune import cli, doctor, tracking
from difftune import config as cf
from difftune.checkpoint import checkpoints
from difftune.cli.adapters import model_of
from difftune.cli.interrupts import Interrupts
from difftune.cli.score import read_picture
from difftune.prompts import load_prompts
from difftune.reward import Reward
from difftune.types import Metrics, RewardOutput, UserError

Capture = pytest.CaptureFixture[str]

PLUGIN = """
import time
import difftune as dt

@dt.reward("brightness_of_test_cli")
def brightness(images, prompts, wait: float = 0.0, bad_after: int = -1):
    brightness.calls += 1
    time.sleep(wait)
    scores = images.mean((1, 2, 3))
    return scores * float("nan") if 0 <= bad_after < brightness.calls else scores

brightness.calls = 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a few thousand random parameters, a plug-in and a configuration."""
    folder = tmp_path_factory.mktemp("place")
    tiny.sd_pipeline().save_pretrained(folder / "tiny")
    (folder / "plugin.py").write_text(PLUGIN)
    config = {
        "model": "./tiny",
        "plugins": ["plugin.py"],
        "reward": "brightness_of_test_cli",
        "algorithm": {"name": "ddpo", "lr": 1e-2, "normalize": "batch", "timestep_fraction": 0.5},
        "prompts": {"source": ["a red cat", "two dog", "a star", "star", "cat", "dog"], "held_out": 2},
        "lora": {"rank": 2},
        "sampler": {"steps": 4, "guidance_scale": 2.0, "batch_size": 8},
        "train": {
            "epochs": 3, "prompts_per_epoch": 4, "samples_per_prompt": 2, "micro_batch": 4, "save_every": 2,
            "sample_every": 2, "sample_count": 4,
        },
        "evaluate": {"samples": 4},
        "device": "cpu",
    }  # fmt: skip
    (folder / "my.yaml").write_text(cf.to_yaml(config))
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command in that folder, and leave the process as it was."""
    monkeypatch.chdir(place)
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setitem(os.environ, name, value)


def refused(capsys: Capture, *argv: str) -> str:
    """Run a command that is the user's mistake; return its one line."""
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.startswith("difftune: ") and err.count("\n") == 1
    return err


def timeless(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "samples_per_second"))} for line in lines]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished run."""
    before = Path.cwd()
    os.chdir(place)
    try:
        assert cli.main(["train", "my.yaml"]) == 0
    finally:
        os.chdir(before)
    return place / "runs/my"


# -- train -------------------------------------------------------------------------------------------------------


def test_train_leaves_a_whole_run_behind_and_says_where(place: Path, capsys: Capture) -> None:
    assert cli.main(["train", "my.yaml", "train.epochs=2", "--out", "runs/said"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^epoch 1/2  reward 0\.\d+ ± .* samples/s  \d+:\d\d left$", out, re.M)
    assert re.search(r"^epoch 2/2 ", out, re.M)
    assert re.search(r"reward in training: 0\.\d+ in the first epoch, 0\.\d+ in the last", out)
    assert re.search(r"held out: .* before, .* after: [+-]\d+\.\d\d standard deviations of the base", out)
    for name in ("adapter", "before_after.png", "report.html"):
        assert f"runs/said/{name}" in out
    assert out.index("next:") > 0 and " generate runs/said" in out.rstrip().splitlines()[-3]
    folder = place / "runs/said"
    assert {path.name for path in folder.iterdir()} == {
        "adapter", "before_after.png", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "samples",
        "summary.json",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"].keys() == summary["after"].keys() == {"reward/mean", "reward/std"}
    resolved = cf.load_config(folder)
    # A run is where its folder is, wherever that was moved to.
    assert resolved.train.epochs == 2 and resolved.out == str(folder)
    assert cf.load_config("my.yaml", ["train.epochs=2", f"out={folder}"]) == resolved
    # The artifact names no folder of this machine, and the held-out prompts were not trained on.
    card = (folder / "adapter/README.md").read_text()
    assert str(place) not in card
    # The card has the figures of the evaluation, as the summary has them.
    cells = [f"{summary[when]['reward/mean']:.4g}" for when in ("before", "after")]
    assert f"| `reward/mean` | {cells[0]} | {cells[1]} |" in card and card.count("## Figures") == 1
    # What is to be typed next runs the plug-in that the reward is from.
    assert re.search(r"^  \S*.* evaluate runs/said -n 128 --plugin plugin\.py +#", out, re.M)


def test_a_second_start_in_the_same_folder_is_refused_and_changes_nothing(run: Path, capsys: Capture) -> None:
    before = (run / "config.yaml").read_bytes()
    assert "already holds a run" in refused(capsys, "train", "my.yaml", "algorithm.lr=1")
    assert (run / "config.yaml").read_bytes() == before


def test_of_several_processes_the_first_claims_the_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difftune.cli.train import _claim

    config, out = cf.load_config("my.yaml", ["out=runs/shared"]), place / "runs/shared"
    monkeypatch.setenv("RANK", "1")
    _claim(out, config, resume=False)
    assert not out.exists()
    monkeypatch.setenv("RANK", "0")
    _claim(out, config, resume=False)
    assert cf.load_config(out).sampler == config.sampler
    (out / "metrics.jsonl").touch()
    written = (out / "config.yaml").stat().st_mtime_ns
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="already holds a run"):
        _claim(out, config, resume=False)
    _claim(out, config, resume=True)
    with pytest.raises(UserError, match="other values of lora.rank"):
        _claim(out, cf.load_config("my.yaml", ["out=runs/shared", "lora.rank=5"]), resume=True)
    assert (out / "config.yaml").stat().st_mtime_ns == written


def test_resume_names_the_settings_that_would_alter_results(run: Path, capsys: Capture) -> None:
    line = refused(capsys, "train", "my.yaml", "--resume", "algorithm.lr=1", "lora.rank=4", "train.epochs=9")
    assert "has other values of algorithm.lr, lora.rank, which alter its results" in line
    assert "does not exist" in refused(capsys, "train", "my.yaml", "--resume", "--out", "runs/none")


def test_a_finished_run_resumes_for_more_epochs_from_its_own_configuration(place: Path, capsys: Capture) -> None:
    assert cli.main(["train", "my.yaml", "evaluate=null", "--out", "runs/whole"]) == 0
    assert cli.main(["train", "my.yaml", "evaluate=null", "train.epochs=2", "--out", "runs/more"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "runs/more", "--resume", "train.epochs=3"]) == 0
    out = capsys.readouterr().out
    assert "resumed after epoch 2" in out and "epoch 3/3" in out and "epoch 2/3" not in out
    assert timeless(place / "runs/more/metrics.jsonl") == timeless(place / "runs/whole/metrics.jsonl")
    name = "adapter/pytorch_lora_weights.safetensors"
    more, whole = load_file(place / "runs/more" / name), load_file(place / "runs/whole" / name)
    assert more.keys() == whole.keys() and all(torch.equal(more[key], whole[key]) for key in whole)


def test_a_run_that_diverges_ends_with_one_and_its_checkpoint(place: Path, capsys: Capture) -> None:
    assert cli.main(["train", "my.yaml", "reward.bad_after=100000", "train.save_every=1", "--out", "runs/nan"]) == 0
    (place / "nan.py").write_text(PLUGIN.replace("of_test_cli", "that_fails"))
    reward = "reward={name: brightness_that_fails, bad_after: 1}"
    assert cli.main(["train", "my.yaml", "plugins=[nan.py]", reward, "train.save_every=1", "--out", "runs/nans"]) == 1
    err = capsys.readouterr().err
    assert "brightness_that_fails' gave nan for sample 0" in err and "Traceback" not in err
    assert "step_000001; resume with: difftune train runs/nans --resume" in err
    assert len(checkpoints(place / "runs/nans/checkpoints")) == 1


def test_a_plugins_wrong_scores_are_the_users_line(place: Path, capsys: Capture) -> None:
    """No traceback: the file that returned them is the user's."""
    code = (
        "import difftune as dt\n\n@dt.reward('one_too_few')\ndef f(images, prompts):\n    return images[1:, 0, 0, 0]\n"
    )
    (place / "short.py").write_text(code)
    line = refused(capsys, "train", "my.yaml", "plugins=[short.py]", "reward=one_too_few", "--out", "runs/short")
    assert re.search(r"'one_too_few' returned shape \(\d,\), expected \(\d,\): one score per sample; reduce", line)
    Image.new("RGB", (8, 8)).save(place / "one.png")
    assert "returned shape (0,), expected (1,)" in refused(capsys, "score", "one_too_few", "one.png")


def test_missing_metadata_is_told_before_anything_is_trained(place: Path, capsys: Capture) -> None:
    code = (
        "import difftune as dt\n\n@dt.reward('needs_a_count', needs={'count': 'how many'})\n"
        "def f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    (place / "needy.py").write_text(code)
    line = refused(capsys, "train", "my.yaml", "plugins=[needy.py]", "reward=needs_a_count", "--out", "runs/needy")
    assert "'needs_a_count' needs 'count' (how many) in the metadata of every prompt" in line
    assert not (place / "runs/needy/samples").exists() and not (place / "runs/needy/metrics.jsonl").exists()


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("difftune.cli.train._run_epochs", full)
    assert cli.main(["train", "my.yaml", "--out", "runs/full"]) == 1
    assert "No space left on device: metrics.jsonl" in capsys.readouterr().err


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("difftune.cli.train._run_epochs", broken)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["train", "my.yaml", "--out", "runs/ours"])


def test_demo_takes_the_next_free_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[cf.RunConfig] = []

    def take(config: cf.RunConfig, resume: bool) -> int:
        taken.append(config)
        return 0

    monkeypatch.setattr("difftune.cli.demo.run_config", take)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    (tmp_path / "runs/demo").mkdir(parents=True)
    assert cli.main(["demo", "train.epochs=3"]) == 0
    assert [config.out for config in taken] == ["runs/demo", "runs/demo-2"]
    assert taken[0].evaluate is not None and taken[1].train.epochs == 3
    assert taken[0].threads == min(doctor.cores(), 4)


# -- interruption, in a process of its own ---------------------------------------------------------------------------


def start(place: Path, out: str, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "difftune", "train", "my.yaml", "reward.wait=0.3", "--out", out, *more],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_epoch(folder: Path, process: subprocess.Popen[str], epoch: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        log = folder / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) >= epoch:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"no epoch {epoch}: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume_and_resumes_to_the_bit(
    place: Path, number: signal.Signals, capsys: Capture
) -> None:
    # Sums of pictures round differently on other numbers of threads.
    sizes = ["threads=1", "train.epochs=6", "train.save_every=4", "evaluate=null"]
    whole, cut = f"runs/whole-{number}", f"runs/cut-{number}"
    assert cli.main(["train", "my.yaml", "reward.wait=0", *sizes, "--out", whole]) == 0
    process = start(place, cut, *sizes)
    wait_for_epoch(place / cut, process, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == f"difftune: interrupted; resume with: difftune train {cut} --resume"
    assert "Traceback" not in err
    # Every epoch that was finished is kept, whatever save_every says.
    done = len((place / cut / "metrics.jsonl").read_text().splitlines())
    assert 2 <= done < 6
    assert int(checkpoints(place / cut / "checkpoints")[0].name.removeprefix("step_")) >= 2
    # The very command that was printed. The wait is part of the run's own configuration.
    assert cli.main(["train", cut, "--resume"]) == 0
    assert "resumed after epoch" in capsys.readouterr().out
    assert timeless(place / cut / "metrics.jsonl") == timeless(place / whole / "metrics.jsonl")
    for name in ("epoch_0000.png", "epoch_0006.png"):
        assert (place / cut / "samples" / name).read_bytes() == (place / whole / "samples" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["time.sleep(wait)", "__import__('hashlib').pbkdf2_hmac('md5', b'', b'', 2 * 10**8)"])
def test_a_second_signal_leaves_at_once(place: Path, tmp_path: Path, hang: str) -> None:
    """Also while the scorer hangs, be it in a system call or in a long computation, during which no handler runs."""
    plugin = PLUGIN.replace("time.sleep(wait)", f"print('scoring', flush=True); {hang}")
    (tmp_path / "hangs.py").write_text(plugin)
    out = f"runs/twice-{len(hang)}"
    process = start(place, out, f"plugins=[{tmp_path}/hangs.py]", "reward.wait=60", "evaluate=null")
    assert process.stdout is not None
    while "scoring" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    # Where the first signal was enough already, the second may find the process on its way out.
    assert process.returncode in (130, -signal.SIGINT) and time.monotonic() - started < 15


def test_a_swallowed_signal_is_raised_at_the_next_phase() -> None:
    with Interrupts() as interrupts:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler, None)


# -- adapters ----------------------------------------------------------------------------------------------------


def test_generate_draws_base_beside_tuned(run: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments = ["generate", str(run), "--prompt", "a cat", "--prompt", "a \x1b[31mdog", "-n", "2", "--seed", "3"]
    assert cli.main([*arguments, "--compare", "--out", str(tmp_path / "a")]) == 0
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"grid.png", *(f"{i:03d}_{kind}.png" for i in range(4) for kind in ("base", "tuned"))}
    assert cli.main([*arguments, "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/002_tuned.png").read_bytes() == (tmp_path / "b/002.png").read_bytes()
    assert (tmp_path / "a/002_tuned.png").read_bytes() != (tmp_path / "a/003_tuned.png").read_bytes()
    assert "\x1b" not in capsys.readouterr().out


def test_generate_uses_the_runs_prompts_when_none_are_given(run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["generate", str(run / "adapter"), "--out", str(tmp_path / "own")]) == 0
    assert "2 pictures in" in capsys.readouterr().out  # the two that were held out


def test_the_kernel_of_the_machine_that_trained_is_not_asked_for() -> None:
    stated = {"model": {"id": "a/b", "attention": "flash", "vae_tiling": True, "quantize": "bnb-4bit"}}
    model = model_of(stated, None)
    assert (model.attention, model.vae_tiling, model.quantize) == ("auto", True, "bnb-4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="model.quantize: bnb-4bit needs bitsandbytes, which is not installed"):
            cf.load_model(model)


def test_generate_asks_for_what_a_file_does_not_say(run: Path, tmp_path: Path, capsys: Capture) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "adapter/pytorch_lora_weights.safetensors").read_bytes())
    arguments = ["generate", str(alone), "--prompt", "a cat", "--out", str(tmp_path / "out")]
    # Its header names a folder's last part only: there is no such model here.
    assert "tiny" in refused(capsys, *arguments, "--model", "nowhere")
    assert cli.main([*arguments, "--model", "tiny"]) == 0
    assert "no adapter at" in refused(capsys, "generate", "nowhere", "--prompt", "x")


def test_evaluate_scores_the_saved_file_with_the_stock_pipeline(run: Path, tmp_path: Path, capsys: Capture) -> None:
    figures = tmp_path / "figures.json"
    arguments = ["evaluate", str(run), "-n", "4", "--plugin", "plugin.py", "--device", "cpu", "--out", str(figures)]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"reward/mean +0\.\d+ +0\.\d+", out)
    first = json.loads(figures.read_text())
    assert first == {**json.loads((run / "summary.json").read_text())}
    assert cli.main([*arguments, "--seed", "1"]) == 0
    assert json.loads(figures.read_text())["before"] != first["before"]


def test_evaluate_runs_no_plugin_that_only_the_run_names(run: Path, place: Path, capsys: Capture) -> None:
    copied = place / "copied"
    (copied / "adapter").mkdir(parents=True)
    text = (run / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("plugin.py", "wicked.py").replace("of_test_cli", "of_wicked"))
    name = "adapter/pytorch_lora_weights.safetensors"
    (copied / name).write_bytes((run / name).read_bytes())
    (place / "wicked.py").write_text("open('ran', 'w')\n")
    line = refused(capsys, "evaluate", "copied")
    assert "unknown reward 'brightness_of_wicked'" in line
    assert line.rstrip().endswith("; the run took it from a plug-in: add --plugin wicked.py")
    assert "--plugin" not in refused(capsys, "evaluate", "copied", "--reward", "scen")
    assert not (place / "ran").exists()
    assert cli.main(["evaluate", "copied", "--reward", "jpeg_compressibility", "-n", "2"]) == 0


def test_inspect_says_what_a_file_holds(run: Path, capsys: Capture) -> None:
    assert cli.main(["inspect", str(run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ranks +2$", out, re.M) and re.search(r"^diffusers +\d+ of \d+ layers$", out, re.M)
    assert cli.main(["inspect", str(run / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == [2]


def test_export_writes_the_other_layout_and_back(run: Path, tmp_path: Path, capsys: Capture) -> None:
    from difftune.export import inspect_adapter

    assert cli.main(["export", str(run), "--format", "kohya", "--out", str(tmp_path)]) == 0
    (kohya,) = tmp_path.glob("*_kohya.safetensors")
    back = tmp_path / "back.safetensors"
    assert cli.main(["export", str(kohya), "--format", "diffusers", "--out", str(back), "--model", "tiny"]) == 0
    there, again = inspect_adapter(run / "adapter"), inspect_adapter(back)
    assert inspect_adapter(kohya)["format"] == "kohya" and again["format"] == "diffusers"
    assert again["layers"] == there["layers"] and again["norm"] == pytest.approx(there["norm"], rel=1e-6)
    assert "expected diffusers or kohya" in refused(capsys, "export", str(run), "--format", "x", "--out", "y")


def test_report_is_written_again(run: Path, capsys: Capture) -> None:
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 1000
    assert "is no run's folder" in refused(capsys, "report", ".")


# -- check -------------------------------------------------------------------------------------------------------


def test_check_runs_one_cycle_and_leaves_nothing(place: Path, capsys: Capture) -> None:
    before = sorted(place.iterdir())
    assert cli.main(["check", "my.yaml", "--", "train.epochs=100"]) == 0
    out = capsys.readouterr().out
    for phase in ("load", "rollout", "score", "gate", "update", "samples", "save"):
        assert re.search(rf"{phase} \d+\.\d\d s", out)
    assert "parity: |ratio - 1| at most 0 over 4 steps" in out
    assert re.search(r"peak memory: [\d.]+ .B \(process\)", out) and re.search(r"forecast: .* of disk", out)
    assert sorted(place.iterdir()) == before


def test_a_cycle_is_as_large_as_the_worst_case_and_no_larger() -> None:
    def cycle(batch: int, micro: int, prompts: int, samples: int) -> tuple[int, int]:
        minimal = {"model": "difftune/tiny-sd", "reward": "scene", "algorithm": "ddpo", "prompts": ["a"]}
        sizes = {"prompts_per_epoch": prompts, "samples_per_prompt": samples, "micro_batch": micro}
        config = cf.validate({**minimal, "sampler": {"batch_size": batch}, "train": sizes})
        one = doctor._one_cycle(config)
        return one.prompts_per_epoch, one.samples_per_prompt

    assert cycle(8, 4, 256, 1) == (8, 1)
    assert cycle(8, 16, 48, 4) == (4, 4)
    assert cycle(64, 64, 4, 2) == (4, 2)
    assert cycle(8, 4, 16, 24) == (1, 24)


# -- score -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for level, name in ((0, "a.png"), (51, "b.jpg"), (255, "c.webp")):
        Image.new("RGB", (16 + level % 7, 16), (level, level, level)).save(folder / name)
    return folder


def test_score_reads_pictures_of_all_sizes(pictures: Path, capsys: Capture) -> None:
    arguments = ["score", "brightness_of_test_cli", str(pictures), "--plugin", "plugin.py"]
    assert cli.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.jpg", "c.webp"]
    assert [row["score"] for row in rows] == pytest.approx([0, 0.2, 1], abs=0.01)
    assert cli.main([*arguments, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "image,prompt,score"
    assert cli.main(arguments) == 0
    assert "mean of 3" in capsys.readouterr().out


def test_score_asks_for_pictures_of_one_size_together(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 16, in their order, on the device that a run would take."""
    widths = [8] * 17 + [9] * 2 + [8]
    for index, width in enumerate(widths):
        Image.new("RGB", (width, 8), (10 * index, 0, 0)).save(tmp_path / f"{index:02}.png")
    batches: list[tuple[int, int]] = []
    moved: list[str] = []

    class Seen(Reward):
        name = "seen"

        def to(self, device: Any) -> Reward:
            moved.append(str(device))
            return self

        def score(self, images: Any, prompts: Any, metadata: Any) -> Any:
            batches.append((len(images), images.shape[-1]))
            return images[:, 0].amax((1, 2))

    monkeypatch.setattr("difftune.cli.score.build_scorer", lambda reward, settings: Seen())
    assert cli.main(["score", "seen", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["score"] for row in rows] == pytest.approx([10 * index / 255 for index in range(20)])
    assert batches == [(16, 8), (1, 8), (2, 9), (1, 8)]
    assert moved == [cf.pick_device()]
    assert cli.main(["score", "seen", str(tmp_path), "--device", "cpu"]) == 0 and moved[1:] == ["cpu"]
    capsys.readouterr()
    assert "device: got tpu" in refused(capsys, "score", "seen", str(tmp_path), "--device", "tpu")


def test_score_tells_the_uncertainty(pictures: Path, capsys: Capture) -> None:
    unsure = ["score", "mean_variance", "--set", "of=[brightness, contrast]", str(pictures)]
    assert cli.main([*unsure, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["uncertainty"] for row in rows] == pytest.approx([0, 0.1, 0.5], abs=0.01)
    assert cli.main([*unsure, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "image,prompt,score,uncertainty,brightness,contrast"
    assert cli.main(unsure) == 0
    assert "uncertainty 0.5  brightness 1" in capsys.readouterr().out.splitlines()[2]


def test_score_compares_pictures_where_the_reward_does(pictures: Path, tmp_path: Path, capsys: Capture) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name, pixels in {"noise": noise, "plain": 0 * noise}.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    ranked = ["score", "win_rate", "--set", "of=jpeg_compressibility"]
    assert cli.main([*ranked, str(tmp_path / "noise.png"), str(tmp_path / "plain.png"), "--json"]) == 0
    assert [row["score"] for row in json.loads(capsys.readouterr().out)] == [0, 1]
    assert "compares pictures with one another, expected one size" in refused(capsys, *ranked, str(pictures))


def test_score_refuses_what_it_should_not_decode(
    pictures: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = "jpeg_compressibility"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.bmp")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    assert "cannot be read as PNG" in refused(capsys, "score", reward, str(tmp_path / "x.bmp"))
    assert "cannot be read as PNG" in refused(capsys, "score", reward, str(tmp_path / "x.png"))
    assert "does not exist" in refused(capsys, "score", reward, str(tmp_path / "none.png"))
    (tmp_path / "empty").mkdir()
    assert "no pictures" in refused(capsys, "score", reward, str(tmp_path / "empty"))
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert "has 2 prompts for 3 pictures" in refused(
        capsys, "score", reward, str(pictures), "--prompts", str(tmp_path / "p.txt")
    )
    assert "no setting 'qualty'" in refused(capsys, "score", reward, str(pictures), "--set", "qualty=3")
    monkeypatch.setattr("difftune.cli.score.MAX_PIXELS", 100)
    assert "expected at most 100 pixels" in refused(capsys, "score", reward, str(pictures))


def test_score_takes_a_transparent_and_a_turned_picture(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 6), (255, 0, 0, 10)).save(tmp_path / "rgba.png")
    assert read_picture(tmp_path / "rgba.png").shape == (1, 3, 6, 4)
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").shape == (1, 3, 6, 4)


# -- looking around ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("algorithms", ["ddpo"]),
        ("rewards", ["clip_score", "jpeg_compressibility", "scene"]),
        ("models", ["difftune/tiny-clip", "difftune/tiny-flow", "difftune/tiny-sd"]),
        ("recipes", ["ddpo-scene-tiny-sd", "demo"]),
    ],
)
def test_list_names_what_there_is(what: str, names: list[str], capsys: Capture) -> None:
    assert cli.main(["list", what]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(names) <= set(listed)


def test_list_describes_a_reward(place: Path, capsys: Capture) -> None:
    assert cli.main(["list", "rewards", "scene"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scene" and "range           [0, 1]" in lines and "differentiable  no" in lines
    assert "settings        correct='mean'" in lines
    (place / "described.py").write_text(
        "import difftune as dt\n\n@dt.reward('described', differentiable=True, needs={'count': 'how many'})\n"
        "def f(images, prompts, scale=2.0):\n    'Say it.'\n    return images.mean((1, 2, 3)) * scale\n"
    )
    assert cli.main(["list", "rewards", "described", "--plugin", "described.py"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "described", "Say it.", "needs           count: how many", "differentiable  yes", "settings        scale=2.0",
    ]  # fmt: skip
    tree = "{name: product, of: [scene, {name: affine, of: jpeg_compressibility, scale: 2, weight: 3}]}"
    assert cli.main(["list", "rewards", tree]) == 0
    out = capsys.readouterr().out
    assert out.startswith("product\n  1 x scene\n  3 x affine {scale: 2.0}\n    1 x jpeg_compressibility\nrange ")
    assert cli.main(["list", "rewards", "clip_score"]) == 0  # no weights are loaded for it
    out = capsys.readouterr().out
    assert re.search(r"^licence +\S", out, re.M) and re.search(r"^memory +1\.6 GiB", out, re.M)


def test_list_describes_only_rewards_that_there_are(capsys: Capture) -> None:
    assert "did you mean 'scene'" in refused(capsys, "list", "rewards", "scen")
    assert "reward.of.0.name: unknown reward 'scen'" in refused(
        capsys, "list", "rewards", "{name: product, of: [scen]}"
    )
    assert "only rewards are described" in refused(capsys, "list", "models", "difftune/tiny-sd")


def test_list_refuses_what_there_is_not(capsys: Capture) -> None:
    assert "did you mean 'recipes'" in refused(capsys, "list", "recepies")


def test_new_copies_a_recipe_with_its_comments_once(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "sub/mine.yaml"
    assert cli.main(["new", "demo", str(file)]) == 0
    assert file.read_text() == cf.recipe_text("demo")
    assert f"difftune check {file}" in capsys.readouterr().out
    file.write_text("changed")
    assert "exists already" in refused(capsys, "new", "demo", str(file))
    assert file.read_text() == "changed"
    assert "did you mean 'demo'" in refused(capsys, "new", "demmo")
    assert "unknown recipe" in refused(capsys, "new", "../demo")


def test_schema_is_json(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert cli.main(["schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == printed == cf.json_schema()


def test_doctor_tells_what_is_there_and_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "diffusers", "device", "memory", "threads", "torchvision"):
        assert re.search(rf"^{name} +\S", out, re.M)
    assert re.search(r"^hub token +present", out, re.M) and "verysecret" not in out
    assert re.search(r"^extra dev ", out, re.M)


def test_doctor_calls_a_broken_torchvision_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1")
    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = doctor._torchvision()
    assert finding.value == "0.1, broken (operator torchvision::nms does not exist)" and "uninstall" in finding.remedy


def test_usage_errors_and_no_arguments(capsys: Capture) -> None:
    assert cli.main([]) == 2
    assert cli.main(["nonsense"]) == 2
    assert cli.main(["train"]) == 2
    assert cli.main(["--version"]) == 0
    assert "difftune 0." in capsys.readouterr().out


def test_help_is_quick() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "difftune", "--help"]
    took = []
    for _ in range(4):
        # The processor's seconds: what else the machine is doing must not count.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and "Usage" in done.stdout
    assert min(took) < 0.5


# -- progress ----------------------------------------------------------------------------------------------------


def epoch(number: int, reward: float = 0.0, **seconds: float) -> Metrics:
    values = {"reward/mean": reward, "reward/std": 0.1, "samples_per_second": 4.0, "loss": 0.5}
    return Metrics(number, number, values, seconds)


def test_the_forecast_counts_sample_grids_once() -> None:
    eta = tracking.Eta(epochs=10, sample_every=5)
    assert eta.left(0) is None
    for number in range(1, 5):
        eta.add(epoch(number), 2.0 + (8.0 if number == 1 else 0.0))
        if number == 1:
            eta = tracking.Eta(epochs=10, sample_every=5)
            eta.add(epoch(1, gate=8.0), 10.0)  # the gate comes once
    assert eta.left(4) == pytest.approx(12.0)  # no grid was seen yet: six epochs of 2 s
    eta.add(epoch(5, samples=7.0), 9.0)
    assert eta.left(5) == pytest.approx(5 * 2.0 + 7.0)  # and one grid, at epoch 10
    assert eta.left(10) == pytest.approx(0.0)
    last = tracking.Eta(epochs=7, sample_every=5)
    last.add(epoch(5, samples=7.0), 9.0)
    assert last.left(5) == pytest.approx(2 * 2.0 + 7.0)  # the last epoch always has one


def test_the_live_display_shows_phase_reward_and_time() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with tracking.LiveProgress(4, 2, 0, console) as live:
        live.phase("rollout", 3, 8)
        assert "rollout 3/8" in live._panel().plain and "epoch  1/4" in live._panel().plain
        live.finished(epoch(1, -2.0))
        live.finished(epoch(2, -1.0))
        text = live._panel().plain
    assert "reward -1 (began at -2)  ▁█" in text and "left" in text and "epoch  3/4" in text


@pytest.mark.parametrize(
    ("values", "bars"),
    [([], ""), ([1.0], "▁"), ([2.0, 2.0], "▁▁"), ([0, 1, 2, float("nan")], "▁▅█"), (list(range(30)), None)],
)
def test_sparkline(values: list[float], bars: str | None) -> None:
    line = tracking.sparkline(values)
    assert line == bars if bars is not None else len(line) == 24


def test_clock() -> None:
    assert [tracking.clock(s) for s in (0, 59.6, 61, 3600, -1)] == ["0:00", "1:00", "1:01", "1:00:00", "0:00"]


# -- evaluation --------------------------------------------------------------------------------------------------


def test_drawing_does_not_depend_on_the_batch_and_never_uses_training_noise() -> None:
    pipe = tiny.sd_pipeline()
    prompts = ["a cat", "a cat", "two dog"]
    whole = tracking.draw(pipe, prompts, steps=3, guidance_scale=2.0)
    single = tracking.draw(pipe, prompts, steps=3, guidance_scale=2.0, batch_size=1)
    assert whole.shape == (3, 3, 16, 16) and 0 <= float(whole.min()) <= float(whole.max()) <= 1
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=0)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, tracking.draw(pipe, prompts, steps=3, guidance_scale=2.0, seed=1))


class Asked:
    """A pipeline that takes down what it is called with; ``lists`` says whether it takes several pictures at once."""

    def __init__(self, lists: bool = True) -> None:
        self.lists, self.calls = lists, list[dict[str, Any]]()

    def __call__(
        self, prompt: Any, image: Any = None, negative_prompt: Any = None, num_frames: int = 16, generator: Any = None
    ) -> Any:
        if isinstance(prompt, list) and not self.lists:
            raise TypeError("prompt must be a string")
        count = len(prompt) if isinstance(prompt, list) else 1
        self.calls.append({"prompt": prompt, "image": image, "negative_prompt": negative_prompt, "frames": num_frames})
        single = generator if isinstance(generator, torch.Generator) else None
        draws = [torch.rand(3, 4, 4, generator=single or generator[row]) for row in range(count)]
        return (torch.stack(draws),)


def test_stock_pictures_are_drawn_under_the_prompts_conditions(tmp_path: Path) -> None:
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    given = {"prompt": "a", "num_frames": 4}
    lines = [{**given, "image": f"{name}.png", "negative_prompt": name} for name in ("red", "blue")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[0]])))
    prompts = load_prompts(tmp_path / "p.jsonl")
    reward = dt.build_reward("jpeg_compressibility")
    loaded: list[int] = []
    pipe = Asked()
    found = tracking.compare(pipe, lambda: loaded.append(len(pipe.calls)), reward, prompts, batch_size=2)
    assert loaded == [2] and pipe.calls[:2] == pipe.calls[2:]
    assert [call["negative_prompt"] for call in pipe.calls[:2]] == [["red", "blue"], ["red"]]
    assert [call["frames"] for call in pipe.calls] == [4] * 4
    assert [image.getpixel((0, 0)) for image in pipe.calls[0]["image"]] == [(255, 0, 0), (0, 0, 255)]
    # One by one, without lists around them, where the pipeline does not take lists: the same noise.
    one = Asked(lists=False)
    assert torch.equal(tracking.compare(one, lambda: None, reward, prompts).base, found.base)
    assert [call["negative_prompt"] for call in one.calls[:3]] == ["red", "blue", "red"]
    # A negative prompt for all stands beside those of the prompts as a list too, and theirs win.
    tracking.draw(pipe, ["a", "b"], call={"negative_prompt": "grey"})
    assert pipe.calls[-1]["negative_prompt"] == ["grey", "grey"]
    tracking.draw(pipe, ["a", "b"], call={"negative_prompt": "grey"}, conditions={"negative_prompt": ["x", "y"]})
    assert pipe.calls[-1]["negative_prompt"] == ["x", "y"]
    with pytest.raises(UserError, match="prompts: Asked takes no 'strength'; its arguments are prompt, image"):
        tracking.draw(pipe, ["a"], conditions={"strength": [0.5]})
    with pytest.raises(UserError, match="num_frames is 4 and 8, and Asked takes one for all"):
        tracking.draw(pipe, ["a", "b"], conditions={"num_frames": [4, 8]})


def test_what_a_pipeline_lacks_is_one_line() -> None:
    class NeedsImage(Asked):
        def __call__(self, prompt: Any, image: Any, generator: Any = None) -> Any:  # type: ignore[override]
            return super().__call__(prompt, image, generator=generator)

    with pytest.raises(UserError, match=r"NeedsImage refused the call \(.*'image'.*\); .* stands in the prompt file"):
        tracking.draw(NeedsImage(), ["a"])


def test_generate_passes_conditions_on(run: Path, tmp_path: Path) -> None:
    for name, negative in (("one", "dog"), ("two", "a star")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "a cat", "negative_prompt": negative}))
        arguments = ["generate", str(run), "--prompts", str(tmp_path / f"{name}.jsonl"), "--out", str(tmp_path / name)]
        assert cli.main(arguments) == 0
    assert (tmp_path / "one/000.png").read_bytes() != (tmp_path / "two/000.png").read_bytes()


def test_the_gain_is_in_units_of_the_base() -> None:
    picture = torch.zeros(2, 3, 4, 4)
    base, tuned = RewardOutput(torch.tensor([0.0, 2.0])), RewardOutput(torch.tensor([3.0, 1.0]))
    comparison = tracking.Comparison(["a", "b"], picture, picture, base, tuned)
    assert comparison.gain == pytest.approx(1.0) and comparison.better == 0.5
    flat = RewardOutput(torch.ones(2))
    assert tracking.Comparison(["a", "b"], picture, picture, flat, flat).gain == 0
    summary = tracking.Comparison(["a", "b"], picture, picture, flat, tuned).summary()
    assert summary["gain_in_base_std"] is None and json.dumps(summary)


def test_warnings_of_the_package_are_lines_wherever_it_lies() -> None:
    from difftune.cli.app import _as_a_line

    ours, theirs = str(Path(dt.__file__).with_name("trainer.py")), "difftune/.venv/lib/torch/nn.py"
    assert _as_a_line("less", UserWarning, ours, 1) == "difftune: less\n"
    assert _as_a_line("less", UserWarning, theirs, 1, "x()").startswith(f"{theirs}:1: UserWarning: less\n")
