"""Checkpoints: whole or absent, verified when read."""

from __future__ import annotations

import errno
import os
import random
import select
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difftune import checkpoint
from difftune.checkpoint import CheckpointError, load_checkpoint, load_latest, save_checkpoint

STATE: dict[str, Any] = {
    "epoch": 3,
    "weights": {"a.b": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0)},
    "optimizer": {0: {"step": torch.tensor(2.0)}, 1: {"exp_avg": torch.ones(2)}},
    "betas": (0.9, 0.999),
    "statistics": {"a prompt, __odd__": [1.5, -2.25e-7], "": []},
    "nothing": None,
    "flag": True,
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 3, STATE)
    assert folder.name == "step_000003"
    assert same(load_checkpoint(folder), STATE)


def test_newest_first_and_pruned_after_the_commit(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, {**STATE, "epoch": step}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_000004", "step_000003"]
    found = load_latest(tmp_path)
    assert found is not None and found[0]["epoch"] == 4
    assert load_latest(tmp_path / "nowhere") is None


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, STATE)
    inode = (tmp_path / "step_000001").stat().st_ino
    save_checkpoint(tmp_path, 1, STATE)
    assert (tmp_path / "step_000001").stat().st_ino == inode  # equal content is left where it is
    save_checkpoint(tmp_path, 1, {**STATE, "epoch": 9})
    assert load_latest(tmp_path)[0]["epoch"] == 9  # type: ignore[index]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_every_kind_of_damage_is_seen_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    save_checkpoint(tmp_path, 1, {**STATE, "epoch": 1})
    clean = save_checkpoint(tmp_path, 2, {**STATE, "epoch": 2})
    content = (clean / name).read_bytes()
    damages = [content[: rng.randrange(len(content))] for _ in range(10)]
    for _ in range(20):
        flipped = bytearray(content)
        position = rng.randrange(len(flipped))
        flipped[position] ^= 1 << rng.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        (clean / name).write_bytes(damage)
        with pytest.warns(UserWarning, match="step_000002"):
            found = load_latest(tmp_path)
        assert found is not None and found[0]["epoch"] == 1
    (clean / name).unlink()
    with pytest.warns(UserWarning, match="step_000002"):
        assert load_latest(tmp_path)[0]["epoch"] == 1  # type: ignore[index]


def test_when_none_verifies_the_run_does_not_start_over_silently(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, STATE)
    (folder / "state.json").write_text("{")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no checkpoint verifies"):
        load_latest(tmp_path)


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, STATE)
    shutil.move(folder, tmp_path / "step_000007")
    with pytest.raises(CheckpointError, match="does not match"):
        load_checkpoint(tmp_path / "step_000007")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["mkdir", "save_file", "write_text", "fsync", "replace"])
def test_a_failing_disk_leaves_earlier_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    save_checkpoint(tmp_path, 1, {**STATE, "epoch": 1})

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if where == "save_file":
            patch.setattr(checkpoint, "save_file", fail)
        elif where in ("fsync", "replace"):
            patch.setattr(os, where, fail)
        elif where == "mkdir":
            real = Path.mkdir
            patch.setattr(Path, "mkdir", lambda s, *a, **k: fail() if ".staging" in s.name else real(s, *a, **k))
        else:
            patch.setattr(Path, where, fail)
        with pytest.raises(OSError) as error:
            save_checkpoint(tmp_path, 2, STATE)
        assert error.value.errno == code
    assert load_latest(tmp_path)[0]["epoch"] == 1  # type: ignore[index]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_killed_save_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".staging-step_000002-1").mkdir(parents=True)
    (tmp_path / ".staging-step_000002-1" / "tensors.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path) is None
    save_checkpoint(tmp_path, 1, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_non_finite_weights_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        save_checkpoint(tmp_path, 1, {"w": torch.tensor([1.0, float("nan")])})
    assert not list(tmp_path.iterdir())


def test_a_leaf_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="state/a/b: got set"):
        save_checkpoint(tmp_path, 1, {"a": {"b": {1, 2}}})


def test_random_generators_go_on_where_they_stopped(tmp_path: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    np.random.standard_normal()
    folder = save_checkpoint(tmp_path, 1, checkpoint.rng_state())
    expected = (torch.rand(3), np.random.standard_normal(3), random.random())
    torch.rand(7), np.random.rand(7), random.random()
    checkpoint.load_rng_state(load_checkpoint(folder))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.standard_normal(3), expected[1])
    assert random.random() == expected[2]


def _save_forever(root: Path, first: int, report: int) -> None:
    """In a forked child: save checkpoint after checkpoint, reporting each once it is committed, until killed."""
    step = first
    while True:
        state = {"epoch": step, "weights": torch.full((40_000,), float(step))}
        save_checkpoint(root, step, state, keep=2)
        os.write(report, step.to_bytes(8, "little"))
        step += 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_nothing_committed_is_lost(tmp_path: Path) -> None:
    """SIGKILL at random times, during recovery too: the newest committed checkpoint is there, whole, and used."""
    rng = random.Random(0)
    committed, inside, rounds = 0, 0, 60
    for _ in range(rounds):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                # The threads of the parent are not there after a fork: work that waits for them would hang.
                torch.set_num_threads(1)
                found = load_latest(tmp_path)  # what a resumed run does first
                _save_forever(tmp_path, 1 if found is None else found[0]["epoch"] + 1, write)
            finally:
                os._exit(1)
        os.close(write)
        # From the first commit on, so that start-up does not take all of the kills.
        if not select.select([read], [], [], 60)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child saved nothing within a minute")
        committed = max(committed, int.from_bytes(os.read(read, 8), "little"))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while data := os.read(read, 8):
            committed = max(committed, int.from_bytes(data, "little"))
        os.close(read)
        inside += any(p.name.startswith(".staging") for p in tmp_path.iterdir())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_latest(tmp_path)
        assert found is not None
        state, _ = found
        # The child may have committed one more than it could report.
        assert state["epoch"] in (committed, committed + 1)
        assert torch.equal(state["weights"], torch.full((40_000,), float(state["epoch"])))
        committed = state["epoch"]
    assert inside >= 0.3 * rounds, f"only {inside} of {rounds} kills fell inside a save"
