"""The monitor: its rule on series that are made up, its measures on pictures, its state, and a run that is watched."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from difftune import config as cf
from difftune.algorithm import build_algorithm
from difftune.monitor import Monitor, MonitorAlarm, MonitorConfig, distance, smoothed, spread, standard_error
from difftune.policy import LoraConfig, Policy
from difftune.reward import FunctionReward, build_reward
from difftune.sampler import Sampler
from difftune.trainer import Trainer
from difftune.types import UserError

PROMPTS = [f"prompt {index // 4}" for index in range(32)]
Course = Callable[[int], float]


def still(epoch: int) -> float:
    return 0.0


def ramp(start: int, slope: float) -> Course:
    """Return a course that is 0 up to an epoch and then a line."""
    return lambda epoch: slope * max(0, epoch - start)


def watched(
    trained: Course,
    clip: Course = still,
    *,
    epochs: int = 40,
    seed: int = 0,
    width: Course = lambda epoch: 1.0,
    apart: Course = lambda epoch: 1.0,
    brightness: Course = still,
    kl: Course | None = None,
    limit: float | None = None,
    **config: Any,
) -> tuple[Monitor, list[str]]:
    """Record epochs of samples with standard deviation 1 around the courses; return the monitor and its warnings."""
    monitor = Monitor(MonitorConfig(rewards=["clip_score"], kl=limit, **config))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(1, epochs + 1):
            measured = {
                "clip_score": clip(epoch) + normal(32),
                "brightness": brightness(epoch) + normal(32),
                "saturation": normal(32),
                "sharpness": normal(32),
                "thumbnail": apart(epoch) * normal(32, 12),
            }
            scores = trained(epoch) + width(epoch) * normal(32)
            monitor.record(epoch, scores, PROMPTS, measured, None if kl is None else kl(epoch))
    return monitor, [str(item.message) for item in caught]


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the watched reward be a light one: the rule looks at numbers only."""

    def build(specs: Any) -> list[tuple[str, float, Any]]:
        return [(spec, 1.0, build_reward("contrast")) for spec in specs]

    monkeypatch.setattr("difftune.monitor.build_terms", build)


# The rule


def test_a_reward_that_rises_while_another_falls_is_an_alarm_with_the_epoch_before_the_fall() -> None:
    monitor, said = watched(ramp(0, 0.1), ramp(20, -0.2), epochs=32)
    assert len(said) == 1 and "the trained reward still rises while clip_score fell by" in said[0]
    back = int(said[0].split("go back to epoch ")[1].split(",")[0])
    # The window that ends there is one of the last good ones.
    assert 15 <= back <= 23 and f"train.epochs={back}" in said[0] and "\n" not in said[0]
    assert not monitor.alarm, "it warns by default"


def test_a_monitored_reward_that_rose_first_is_followed_to_its_top() -> None:
    _, said = watched(ramp(0, 0.1), lambda epoch: 0.2 * min(epoch, 40 - epoch), epochs=36)
    assert len(said) == 1
    assert abs(int(said[0].split("go back to epoch ")[1].split(",")[0]) - 22) <= 2, "the window of 18 to 22 is the top"


@pytest.mark.parametrize(
    ("trained", "clip"),
    [
        (ramp(0, 0.1), still),
        (ramp(0, 0.1), ramp(0, 0.1)),
        (still, ramp(10, -0.2)),  # a run that gets worse altogether
        (ramp(0, -0.1), ramp(10, -0.2)),
        (ramp(0, 0.1), ramp(10, -0.008)),  # less than half a standard deviation
    ],
)
def test_all_else_is_no_alarm(trained: Course, clip: Course) -> None:
    assert watched(trained, clip)[1] == []


def test_noise_alone_gives_no_alarm() -> None:
    """50 runs of 40 epochs with a rising reward and a monitor that only jitters, at a rule without its least fall."""
    alarms = sum(bool(watched(ramp(0, 0.1), fall=1e-9, collapse=0, seed=seed)[1]) for seed in range(50))
    assert alarms <= 3, f"{alarms} of 50 runs"
    assert not any(watched(ramp(0, 0.1), seed=seed)[1] for seed in range(20))


def test_the_alarm_tells_how_the_pictures_drifted() -> None:
    _, said = watched(ramp(0, 0.1), ramp(20, -0.2), brightness=ramp(20, 0.3), epochs=34)
    assert "meanwhile brightness +" in said[0] and "sharpness" not in said[0]


def test_stop_sets_the_reason_and_warn_does_not() -> None:
    monitor, said = watched(ramp(0, 0.1), ramp(20, -0.2), action="stop")
    assert "go back to epoch" in monitor.alarm and said


def test_an_alarm_is_said_once() -> None:
    assert len(watched(ramp(0, 0.1), ramp(20, -0.2), epochs=60)[1]) == 1


def test_collapse_of_the_rewards_and_of_the_samples() -> None:
    def shrinking(epoch: int) -> float:
        return 1.0 if epoch < 20 else 0.05

    _, said = watched(still, width=shrinking)
    assert len(said) == 1 and "rewards of a prompt's samples are hardly apart" in said[0] and "of epoch " in said[0]
    _, said = watched(still, apart=shrinking, action="stop")
    assert len(said) == 1 and "samples of a prompt are nearly the same" in said[0]
    assert watched(still, width=shrinking, apart=shrinking, collapse=0.0)[1] == []


def test_kl_has_a_limit_of_its_own() -> None:
    _, said = watched(still, kl=ramp(10, 0.01), limit=0.105)
    assert said == ["monitor: the KL to the base model is 0.11, above 0.105"]
    with pytest.raises(UserError, match="monitor.kl: the algorithm gives no KL .*set algorithm.kl_weight"):
        watched(still, limit=0.1)


# Measures


def test_measures_of_known_series() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.5, 2.5, 3.5] and smoothed([1.0], 2) == []
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0)).double()
    trend = torch.arange(4000.0).double() / 100
    assert standard_error((noise + trend).tolist(), 4) == pytest.approx(0.5, rel=0.05)
    scores = torch.tensor([0.0, 2.0, 5.0, 5.0, 9.0])
    assert spread(scores, ["a", "a", "b", "b", "c"]) == pytest.approx(math.sqrt(0.5))
    assert spread(scores, list("abcde")) is None
    pictures = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    assert distance(pictures, ["a", "a", "b", "b"]) == pytest.approx(0.5)
    assert distance(pictures, list("abcd")) is None


def test_pictures_and_films_are_measured() -> None:
    monitor = Monitor(MonitorConfig(rewards=["clip_score"]))
    images = torch.rand(4, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    found = monitor.measure(images, ["a"] * 4)
    assert set(found) == {"clip_score", "brightness", "saturation", "sharpness", "thumbnail"}
    assert found["thumbnail"].shape == (4, 768) and found["saturation"].shape == (4,)
    film = monitor.measure(images[:, None].expand(-1, 3, -1, -1, -1), ["a"] * 4)
    for name, value in found.items():
        torch.testing.assert_close(film[name], value)
    values = monitor.record(1, torch.rand(4), ["a"] * 4, found)
    assert set(values) == {
        *(f"monitor/{name}" for name in ("clip_score", "brightness", "saturation", "sharpness")),
        "monitor/reward_spread",
        "monitor/sample_distance",
        "monitor/alarms",
    }
    assert all(math.isfinite(value) for value in values.values())


def test_single_samples_have_no_spread() -> None:
    monitor = Monitor(MonitorConfig(rewards=["clip_score"]))
    values = monitor.record(1, torch.rand(2), ["a", "b"], monitor.measure(torch.rand(2, 3, 8, 8), ["a", "b"]))
    assert "monitor/reward_spread" not in values and "monitor/sample_distance" not in values


# State


def test_the_state_goes_on_where_it_was() -> None:
    half, _ = watched(ramp(0, 0.1), ramp(20, -0.2), epochs=22)
    state = json.loads(json.dumps(half.state_dict()))
    other = Monitor(MonitorConfig(rewards=["clip_score"]))
    other.load_state_dict(state)
    assert other.state_dict() == half.state_dict()
    measured = {name: torch.full((32,), -9.0) for name in ("clip_score", "brightness", "saturation", "sharpness")}
    measured["thumbnail"] = torch.rand(32, 12)
    for monitor in (half, other):
        with pytest.warns(UserWarning, match="clip_score fell by"):
            for epoch in range(23, 28):
                monitor.record(epoch, torch.full((32,), 9.0) + torch.randn(32), PROMPTS, measured)
    with pytest.raises(UserError, match="watched clip_score, this run watches hpsv2"):
        Monitor(MonitorConfig(rewards=["hpsv2"])).load_state_dict(state)


@pytest.mark.parametrize("wrong", [{}, {"rewards": []}, {"rewards": ["a"], "window": 1}, {"rewards": ["a"], "x": 1}])
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MonitorConfig(**wrong)


# A run


class Scripted(FunctionReward):
    """A reward that says its course, whatever the pictures: a script of what training may do."""

    def __init__(self, name: str, course: Course) -> None:
        self.calls = 0
        super().__init__(name, lambda images, prompts: self.next(images), False)
        self.course = course

    def next(self, images: Tensor) -> Tensor:
        """Return the next epoch's scores, which differ a little from sample to sample."""
        self.calls += 1
        return self.course(self.calls) + images.mean((1, 2, 3)) * 0.01


def run(
    out: Path | None = None, algorithm: str = "ddpo", monitor: Any = None, reward: Any = None, **settings: Any
) -> Trainer:
    policy = Policy(tiny.PIPELINES["sd"](), LoraConfig(rank=2))
    sizes = {"epochs": 8, "prompts_per_epoch": 2, "samples_per_prompt": 2, "updates_per_epoch": 1, "sample_every": 0}
    return Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=2, guidance_scale=2.0, batch_size=4),
        algorithm=build_algorithm(algorithm, lr=1e-4),
        reward=reward or build_reward("brightness"),
        prompts=["a cat", "a dog"],
        out=out,
        monitor=monitor,
        **{**sizes, "save_every": 1, **settings},
    )


def scripted(course: Course, **config: Any) -> Monitor:
    monitor = Monitor(MonitorConfig(rewards=["clip_score"], window=2, **config))
    monitor._watched = {"clip_score": Scripted("clip_score", course)}
    return monitor


@pytest.mark.parametrize("algorithm", ["ddpo", "alignprop"])
def test_a_watched_run_logs_what_it_sees_and_trains_the_same(tmp_path: Path, algorithm: str) -> None:
    """Also where a reward that learns is scored on samples that are drawn for the monitor alone."""

    def trainer(out: Path | None, **settings: Any) -> Trainer:
        torch.manual_seed(0)
        return run(out, algorithm, reward=build_reward("calibrated", of="brightness"), epochs=2, **settings)

    runs = trainer(None), trainer(tmp_path / "run", monitor=["clip_score"])
    plain, seen = map(list, runs)
    assert runs[0].reward.state_dict() == runs[1].reward.state_dict() and runs[0].reward.state_dict()["count"] == 8
    for one, other in zip(*(trainer.policy.parameters() for trainer in runs), strict=True):
        assert torch.equal(one, other)
    for before, after in zip(plain, seen, strict=True):
        added = {name for name in after.values if name.startswith("monitor/")}
        assert {"monitor/clip_score", "monitor/brightness", "monitor/sample_distance", "monitor/alarms"} <= added
        kept = {name: value for name, value in after.values.items() if name not in added}
        del kept["samples_per_second"]
        assert kept == {name: value for name, value in before.values.items() if name != "samples_per_second"}
        assert after.seconds["monitor"] > 0
    assert "monitor/alarms" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_stops_after_the_epoch_of_the_alarm_and_resumes_once_told_to_warn(tmp_path: Path) -> None:
    rising = Scripted("rising", lambda epoch: float(epoch))
    trainer = run(
        tmp_path / "run", reward=rising, monitor=scripted(lambda epoch: -5.0 * max(0, epoch - 4), action="stop")
    )
    done = []
    stops = pytest.raises(MonitorAlarm, match="go back to epoch [45],")
    with pytest.warns(UserWarning, match="clip_score fell by"), stops:
        for metrics in trainer:
            done.append(metrics)
    assert done[-1]["monitor/alarms"] == 1 and 5 <= done[-1].epoch < 8
    again: dict[str, Any] = {"reward": Scripted("rising", lambda epoch: 9.0 + epoch), "resume": True}
    with pytest.raises(MonitorAlarm, match="go back to epoch [45],"):
        list(run(tmp_path / "run", monitor=scripted(lambda epoch: -99.0, action="stop"), **again))
    assert list(run(tmp_path / "run", monitor=scripted(lambda epoch: -99.0), **again))[-1].epoch == 8


def test_a_monitored_reward_that_learns_goes_on_where_it_was(tmp_path: Path) -> None:
    def state(name: str, epochs: int, **settings: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        monitor = Monitor(MonitorConfig(rewards=["calibrated"]))
        monitor._watched = {"calibrated": build_reward("calibrated", of="contrast")}
        list(run(tmp_path / name, monitor=monitor, epochs=epochs, **settings))
        return monitor.state_dict()

    whole = state("whole", 3)
    assert whole["watched"]["calibrated"]["count"] == 12
    state("cut", 2)
    assert state("cut", 3, resume=True) == whole


def test_a_gradient_method_is_watched_on_samples_of_its_own() -> None:
    metrics = next(iter(run(algorithm="alignprop", monitor=["contrast"], epochs=1)))
    assert math.isfinite(metrics["monitor/contrast"]) and metrics["monitor/sample_distance"] > 0


# The configuration


def section(value: Any) -> Any:
    given = {"model": "difftune/tiny-sd", "reward": "brightness", "algorithm": "ddpo", "prompts": ["a"]}
    return cf.validate({**given, "monitor": value}).monitor


def test_the_section_is_a_list_or_a_mapping() -> None:
    assert section(None) is None
    assert section(["clip_score"]) == MonitorConfig(rewards=["clip_score"])
    config = section({"rewards": ["contrast", {"name": "ocr", "side": "64"}], "action": "stop", "window": 3})
    assert config.rewards[1] == {"name": "ocr", "side": 64} and config.action == "stop"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["clip_scor"], "monitor.rewards.0.name: unknown reward 'clip_scor'"),
        ([{"name": "ocr", "sid": 3}], "monitor.rewards.0.sid: unknown setting"),
        ({"rewards": ["contrast"], "windows": 3}, "monitor.windows"),
        ({"rewards": ["contrast"], "action": "shout"}, "monitor.action"),
        ([], "monitor.rewards"),
    ],
)
def test_mistakes_in_the_section_are_named(value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        section(value)
    assert message in str(caught.value)
