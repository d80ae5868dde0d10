"""Scoring elsewhere overlaps with the rollout: the same run, bit for bit, in less time, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fault_server import FAULTS, FaultServer, brightness, serving
from torch import Tensor

from difftune.algorithm import build_algorithm
from difftune.policy import LoraConfig, Policy
from difftune.reward import Reward, build_reward
from difftune.rewards._remote import Asking
from difftune.sampler import Sampler
from difftune.trainer import Trainer
from difftune.types import UserError

pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
pytest.importorskip("tenacity", reason="the remote rewards need the extra remote")

PAUSE = 0.2
"""Seconds that a request takes at the server, and a batch of samples on the device."""


SIZES = {"epochs": 2, "prompts_per_epoch": 4, "samples_per_prompt": 2, "updates_per_epoch": 1, "sample_every": 0}


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator) / 255


def slow(body: dict[str, Any]) -> dict[str, Any]:
    time.sleep(PAUSE)
    return brightness(body)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving(slow) as running:
        yield running


def remote(server: FaultServer, **settings: Any) -> Reward:
    return build_reward("remote", url=server.url, batch_size=2, concurrency=1, **settings)


def make(reward: Reward, out: Path | None = None, patch: pytest.MonkeyPatch | None = None, **more: Any) -> Trainer:
    """A run whose epoch is four batches of two samples; with ``patch`` each takes as long as on a device."""
    policy = Policy(tiny.PIPELINES["sd"](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    sampler = Sampler(policy, steps=2, guidance_scale=1.0, batch_size=2)
    if patch is not None:
        draw = sampler.rollout

        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(PAUSE)
            return draw(*args, **kwargs)

        patch.setattr(sampler, "rollout", slowly)
    return Trainer(
        policy=policy,
        sampler=sampler,
        algorithm=build_algorithm("ddpo", lr=1e-2),
        reward=reward,
        prompts=["a red cat", "a star"],
        out=out,
        **{**SIZES, **more},
    )


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


@pytest.mark.slow
def test_an_epoch_takes_less_time_and_gives_the_same(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = make(remote(server), patch=monkeypatch)
    *_, overlapped = ahead
    with monkeypatch.context() as without:
        without.setattr(Asking, "begin", Reward.begin)
        behind = make(remote(server), patch=monkeypatch)
        *_, waited = behind
    assert torch.equal(weights(ahead), weights(behind))
    values = [{k: v for k, v in one.values.items() if k != "samples_per_second"} for one in (overlapped, waited)]
    assert values[0] == values[1]
    # One after the other, four requests are waited for; side by side, the last of them.
    assert waited.seconds["score"] >= 4 * PAUSE and overlapped.seconds["score"] < waited.seconds["score"] - 2 * PAUSE
    waits = [one.seconds["rollout"] + one.seconds["score"] for one in (overlapped, waited)]
    assert waits[0] < waits[1] - PAUSE


def test_a_monitor_elsewhere_overlaps_as_well(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(build_reward("brightness"), patch=monkeypatch, monitor=[remote(server)])
    *_, metrics = trainer
    assert metrics["monitor/remote"] == pytest.approx(metrics["reward/mean"], abs=0.05)
    assert metrics.seconds["monitor"] < 3 * PAUSE and server.counts["fine"] == 8


@pytest.mark.slow
def test_an_interrupted_rollout_leaves_no_request_and_resumes_to_the_bit(server: FaultServer, tmp_path: Path) -> None:
    whole = make(remote(server), tmp_path / "whole")
    list(whole)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "rollout" and done == 4 and trainer.epoch == 1:
            raise KeyboardInterrupt

    reward = remote(server)
    trainer = make(reward, tmp_path / "cut", save_every=1, listener=interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    assert isinstance(reward, Asking) and not reward.questions._begun and reward.questions._channel is None
    resumed = make(remote(server), tmp_path / "cut", resume=True)
    list(resumed)
    assert torch.equal(weights(resumed), weights(whole))
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    assert len(logs[0]) == 2
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one["reward/mean"] == other["reward/mean"]


def test_what_fails_in_the_background_is_asked_again() -> None:
    images, prompts = pictures(40), [f"prompt {index}" for index in range(40)]
    with serving(rate=0.3) as server:
        patience = {"concurrency": 8, "timeout": 0.5, "deadline": 60.0}
        score = build_reward("remote", url=server.url, batch_size=2, cache=False, **patience)
        for rows in (slice(10), slice(10, 25), slice(20, 30)):
            score.begin(images[rows], prompts[rows], [{}] * len(prompts[rows]))
        torch.testing.assert_close(score(images, prompts).total, images.mean((1, 2, 3)), atol=1e-6, rtol=0)
        assert set(server.counts) & set(FAULTS)


def test_samples_drawn_one_at_a_time_fill_requests() -> None:
    """Seventeen samples, eight to a request: two full ones while they are drawn, and the last when it is wanted."""
    images, prompts, sizes = pictures(17), [f"prompt {index}" for index in range(17)], []

    def counting(body: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(body["images"]))
        return brightness(body)

    with serving(counting) as server:
        score = build_reward("remote", url=server.url, batch_size=8)
        for row in range(17):
            score.begin(images[row : row + 1], prompts[row : row + 1], [{}])
        began = time.monotonic()
        while server.counts["fine"] < 2 and time.monotonic() - began < 5:
            time.sleep(0.01)
        assert server.counts["fine"] == 2
        total = score(images, prompts).total
        assert sorted(sizes) == [1, 8, 8]
        assert torch.equal(total, build_reward("remote", url=server.url, batch_size=1)(images, prompts).total)
        # What is held back is given up with the rest.
        score.begin(pictures(1, seed=1), ["a"], [{}])
        score.drop()
        assert torch.equal(score(images[:1], prompts[:1]).total, total[:1]) and sizes[3:] == [1] * 17


def test_a_refusal_is_raised_by_the_call_and_not_before() -> None:
    with serving(rate=1.0, faults=("forbidden",)) as server:
        score = remote(server, deadline=30)
        score.begin(pictures(2), ["a", "b"], [{}] * 2)
        with pytest.raises(UserError, match="refuses with status 403"):
            score(pictures(2), ["a", "b"])


def test_what_hangs_is_given_up_without_waiting() -> None:
    with serving(rate=1.0, faults=("hang",)) as server:
        score = remote(server, timeout=1.0, deadline=60)
        score.begin(pictures(8), ["a"] * 8, [{}] * 8)
        started = time.monotonic()
        score.drop()
        assert time.monotonic() - started < 0.5
        for thread in threading.enumerate():
            if thread.name.startswith("reward-remote"):
                thread.join(5)
                assert not thread.is_alive()
        server.rate = 0.0
        assert len(score(pictures(8), ["a"] * 8).total) == 8


def test_the_process_ends_while_a_scorer_hangs() -> None:
    """What was begun is not waited for at exit, given up or not."""
    script = """
import sys, time, torch
from difftune.reward import build_reward
for drop in (True, False):
    score = build_reward("remote", url=sys.argv[1], batch_size=1, concurrency=2, timeout=20, deadline=20)
    score.begin(torch.rand(4, 3, 4, 4), ["a"] * 4, [{}] * 4)
    time.sleep(0.5)
    if drop:
        score.drop()
print(time.time())
"""
    with serving(rate=1.0, faults=("hang",)) as server:
        command = [sys.executable, "-c", script, server.url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        ended = time.time()
        assert ran.returncode == 0 and not ran.stderr, ran.stderr
        assert ended - float(ran.stdout) < 3 and server.counts["hang"] > 0


def test_terms_and_chosen_frames_are_begun(server: FaultServer) -> None:
    """A combination lets its terms begin, on a film's chosen frames alone, and no picture is asked for twice;
    the frames of a film share a request."""
    films = torch.stack([pictures(4, seed) for seed in range(6)], 1)
    score = build_reward("segmental", segments=2, of={"name": "sigmoid", "of": {"name": "remote", "url": server.url}})
    score.begin(films, ["a"] * 4, [{}] * 4)
    began = time.monotonic()
    while server.counts["fine"] < 1 and time.monotonic() - began < 5:
        time.sleep(0.01)
    assert server.counts["fine"] == 1
    assert len(score(films, ["a"] * 4).total) == 4
    assert server.counts["fine"] == 1


def test_pairs_within_a_batch_are_begun() -> None:
    def judge(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": {"content": "Image 1 is better."}}]}

    images, prompts = pictures(4), ["a", "a", "a", "b"]
    with serving(judge) as server:
        score = build_reward("unified_reward", url=server.url, model="m", mode="pair")
        score.begin(images[:2], prompts[:2], [{}] * 2)
        assert score(images, prompts).total.tolist() == [0.5] * 4
        assert server.counts["fine"] == 6
