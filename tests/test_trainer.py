"""The trainer: one state, bitwise resume, and what must stop a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch

import difftune as dt
from difftune import checkpoint
from difftune.algorithm import build_algorithm
from difftune.policy import LoraConfig, Policy
from difftune.reward import FunctionReward, Reward, build_reward
from difftune.sampler import Sampler
from difftune.trainer import Trainer, _micro_batches, _split
from difftune.types import Metrics, NonFiniteError, ParityError, UserError

PROMPTS = ["a red cat", "two dog", "a star"]
ETA = {"sd": 1.0, "sd3": 0.7}


def redness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def make(out: Path | None = None, kind: str = "sd", reward: Any = None, **settings: Any) -> Trainer:
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    sampler = Sampler(policy, steps=4, guidance_scale=2.0, eta=ETA[kind], batch_size=8)
    algorithm = {"lr": 1e-2, "normalize": "batch", **settings.pop("algorithm", {})}
    algorithm = {key: value for key, value in algorithm.items() if value is not None}
    sizes = {"epochs": 3, "prompts_per_epoch": 4, "samples_per_prompt": 2, "micro_batch": 4, "save_every": 1}
    return Trainer(
        policy=policy,
        sampler=sampler,
        algorithm=build_algorithm(settings.pop("name", "ddpo"), **algorithm),
        reward=reward or FunctionReward("redness", redness, True),
        prompts=settings.pop("prompts", PROMPTS),
        out=out,
        **{**sizes, "sample_count": 4, "sample_every": 2, **settings},
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy.named_parameters().items()}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def timeless(path: Path) -> list[dict[str, Any]]:
    """The log without its wall-clock fields, the only ones that may differ."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("seconds/", "samples_per_second"))} for line in lines]


@pytest.mark.parametrize("kind", sorted(tiny.PIPELINES))
def test_a_run_yields_metrics_and_leaves_its_folder(tmp_path: Path, kind: str) -> None:
    trainer = make(tmp_path / "run", kind)
    before = weights(trainer)
    records = list(trainer)
    assert [m.epoch for m in records] == [1, 2, 3] and [m.step for m in records] == [2, 4, 6]
    assert not same(before, weights(trainer))
    first = records[0]
    assert {"reward/mean", "reward/std", "ratio", "clip_fraction", "log_prob", "grad_norm"} <= first.values.keys()
    assert {"rollout", "score", "update", "gate"} <= first.seconds.keys()
    assert trainer.parity is not None and trainer.parity["max_ratio_error"] == 0
    # 8 samples in one pipeline call of 4 steps; two updates of one micro-batch each replay the noisy ones.
    noisy = 4 if kind == "sd" else 3
    assert first["denoiser_calls"] == 4 + 2 * noisy
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        "epoch_0000.png", "epoch_0002.png", "epoch_0003.png",
    ]  # fmt: skip
    files = trainer.save()
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors") in files
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_first_update_is_on_policy() -> None:
    trainer = make(updates_per_epoch=1)
    metrics = next(iter(trainer))
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_old"] == pytest.approx(0, abs=1e-6)


def test_a_notebook_needs_no_folder() -> None:
    trainer = make()
    assert isinstance(next(iter(trainer)), Metrics)
    with pytest.raises(UserError, match="no folder"):
        trainer.save()


def test_two_runs_with_one_seed_are_byte_equal(tmp_path: Path) -> None:
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    list(a), list(b)
    assert same(weights(a), weights(b))
    assert timeless(tmp_path / "a/metrics.jsonl") == timeless(tmp_path / "b/metrics.jsonl")
    for name in ("epoch_0000.png", "epoch_0003.png"):
        assert (tmp_path / "a/samples" / name).read_bytes() == (tmp_path / "b/samples" / name).read_bytes()
    other = make(seed=1)
    list(other)
    assert not same(weights(a), weights(other))


def test_one_text_under_two_conditions_is_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a star", "negative_prompt": negative} for negative in ("two dog", "a red cat")]
    sizes: dict[str, Any] = {"prompts_per_epoch": 2, "samples_per_prompt": 4, "updates_per_epoch": 1, "epochs": 2}
    running = {"normalize": "prompt", "prompt_min_count": 2}
    trainer = make(prompts=rows, algorithm=running, **sizes)
    list(trainer)
    buffers = trainer.algorithm.state_dict()
    (found,) = [value for value in buffers.values() if isinstance(value, dict)] or [buffers]
    assert len(found) == 2 and all(name.startswith("a star [") for name in found)
    assert [len(values) for values in found.values()] == [8, 8]
    # No pair has its winner under one condition and its loser under the other.
    seen: list[Any] = []
    paired = make(prompts=rows, name="d3po", algorithm={"normalize": None}, **sizes)
    prepare, samples = paired.algorithm.prepare, paired._plan(1)
    assert len(set(samples.groups)) == 2 and len(set(samples.texts)) == 1

    def note(groups: Any, rewards: Any) -> Any:
        prepared = prepare(groups, rewards)
        seen.extend({groups[i] for i in unit} for unit in prepared.units or [])
        return prepared

    monkeypatch.setattr(paired.algorithm, "prepare", note)
    list(paired)
    assert seen and all(len(unit) == 1 for unit in seen)


def test_scorers_that_compare_samples_see_the_groups_that_the_algorithm_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a star", "negative_prompt": negative} for negative in ("two dog", "a red cat")]
    sizes: dict[str, Any] = {"prompts_per_epoch": 2, "samples_per_prompt": 4, "updates_per_epoch": 1, "epochs": 1}
    trainer = make(prompts=rows, reward={"name": "group_rank", "of": "brightness"}, **sizes)
    prepare, samples = trainer.algorithm.prepare, trainer._plan(1)
    seen: list[Any] = []

    def note(groups: Any, scores: Any) -> Any:
        seen.append((groups, scores))
        return prepare(groups, scores)

    monkeypatch.setattr(trainer.algorithm, "prepare", note)
    list(trainer)
    ((groups, scores),) = seen
    assert groups == samples.groups and len(set(groups)) == 2
    for name in set(groups):
        ranks = scores.total[[i for i, group in enumerate(groups) if group == name]]
        assert sorted(ranks.tolist()) == [0.25, 0.5, 0.75, 1.0]


def test_micro_batches_change_memory_not_results() -> None:
    a, b = make(micro_batch=1), make(micro_batch=4)
    ra, rb = list(a), list(b)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], atol=2e-4, rtol=0)
    assert ra[0]["reward/mean"] == rb[0]["reward/mean"]


PHASES = ["rollout", "score", "update"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("normalize", ["prompt", "batch"])
def test_interrupted_anywhere_a_run_resumes_to_the_bit(tmp_path: Path, phase: str, epoch: int, normalize: str) -> None:
    settings: dict[str, Any] = {"algorithm": {"normalize": normalize, "prompt_min_count": 3, "timestep_fraction": 0.5}}
    whole = make(tmp_path / "whole", **settings)
    list(whole)

    cut = make(tmp_path / "cut", save_every=3, **settings)

    def interrupt(name: str, done: int, total: int) -> None:
        # The first update of the epoch has been taken when the phase "update" reports.
        if name == phase and cut.epoch + 1 == epoch:
            raise KeyboardInterrupt

    cut.listener = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(cut)
    torch.rand(5)  # whatever else the process does with the global generators in between

    resumed = make(tmp_path / "cut", save_every=3, resume=True, **settings)
    assert resumed.epoch == epoch - 1
    list(resumed)
    assert same(weights(whole), weights(resumed))
    assert timeless(tmp_path / "whole/metrics.jsonl") == timeless(tmp_path / "cut/metrics.jsonl")
    a, b = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    assert whole.algorithm.state_dict() == resumed.algorithm.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["prepared", "accumulated", "saving"])
def test_interrupted_inside_a_phase_a_run_resumes_to_the_bit(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the rewards have entered the statistics, between two micro-batches, and with half a checkpoint written."""
    settings: dict[str, Any] = {"algorithm": {"normalize": "prompt", "prompt_min_count": 3}, "micro_batch": 2}
    whole = make(tmp_path / "whole", **settings)
    list(whole)

    cut = make(tmp_path / "cut", **settings)
    raised: list[str] = []

    def then_interrupt(work: Any) -> Any:
        def interrupted(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if not raised and cut.epoch == (2 if moment == "saving" else 1):
                raised.append(moment)
                raise KeyboardInterrupt
            return result

        return interrupted

    place: tuple[Any, str] = {
        "prepared": (cut.algorithm, "prepare"),
        "accumulated": (cut.algorithm, "accumulate"),
        "saving": (checkpoint, "save_file"),
    }[moment]
    monkeypatch.setattr(*place, then_interrupt(getattr(*place)))
    with pytest.raises(KeyboardInterrupt):
        list(cut)
    assert raised and not any(p.name.startswith(".") for p in cut.checkpoint_root.iterdir())

    resumed = make(tmp_path / "cut", resume=True, **settings)
    assert resumed.epoch == 1
    list(resumed)
    assert same(weights(whole), weights(resumed))
    assert timeless(tmp_path / "whole/metrics.jsonl") == timeless(tmp_path / "cut/metrics.jsonl")
    assert whole.algorithm.state_dict() == resumed.algorithm.state_dict()


def test_a_killed_run_resumes_from_its_checkpoint_and_rewrites_the_log(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", epochs=4, save_every=2)
    list(whole)
    killed = make(tmp_path / "killed", epochs=4, save_every=2)
    steps = iter(killed)
    for _ in range(3):
        next(steps)  # killed after epoch 3, whose checkpoint was not due
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "rew')  # and in the middle of a line
    resumed = make(tmp_path / "killed", epochs=4, save_every=2, resume=True)
    assert resumed.epoch == 2
    list(resumed)
    assert same(weights(whole), weights(resumed))
    assert timeless(tmp_path / "whole/metrics.jsonl") == timeless(tmp_path / "killed/metrics.jsonl")


class Running(Reward):
    """A reward with a memory: redness above the mean of all it has seen."""

    name = "running"

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        scores = redness(images, prompts)
        self.total += float(scores.sum())
        self.count += len(scores)
        return scores - self.total / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]


def test_a_reward_with_a_memory_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", reward=Running())
    list(whole)
    cut = make(tmp_path / "cut", reward=Running(), save_every=3)

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "update" and cut.epoch == 1:
            raise KeyboardInterrupt

    cut.listener = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(cut)
    resumed = make(tmp_path / "cut", reward=Running(), resume=True)
    assert resumed.epoch == 1
    list(resumed)
    assert timeless(tmp_path / "whole/metrics.jsonl") == timeless(tmp_path / "cut/metrics.jsonl")
    assert whole.reward.state_dict() == resumed.reward.state_dict()
    assert same(weights(whole), weights(resumed))


def test_the_gate_measures_what_the_updates_replay() -> None:
    trainer = make(micro_batch=3)
    next(iter(trainer))
    assert trainer.parity is not None and trainer.parity["micro_batch_ratio_error"] < 1e-5


def test_seconds_of_saving_stand_in_the_next_record(tmp_path: Path) -> None:
    records = list(make(tmp_path / "run"))
    assert "save" not in records[0].seconds and records[1].seconds["save"] > 0


def test_a_plain_object_is_a_pipeline_too() -> None:
    class Plain:
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.brain = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12))
            self.vae = torch.nn.Linear(2, 2)
            self.scheduler = diffusers.DDIMScheduler()

        def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
            x = torch.stack([torch.randn(12, generator=g) for g in generator])
            self.scheduler.set_timesteps(num_inference_steps)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.brain(x), t, x).prev_sample
            return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)

    pipe = Plain()
    policy = Policy(pipe, LoraConfig(rank=2))
    assert not any(p.requires_grad for p in pipe.vae.parameters()) and not pipe.vae.training
    trainer = Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=4),
        algorithm=build_algorithm("ddpo", normalize="batch"),
        reward=FunctionReward("redness", redness, True),
        prompts=PROMPTS,
        epochs=1,
    )
    before = weights(trainer)
    next(iter(trainer))
    assert not same(before, weights(trainer))


def test_a_resumed_step_moves_the_adapter_the_pipeline_uses(tmp_path: Path) -> None:
    list(make(tmp_path / "run", epochs=1))
    resumed = make(tmp_path / "run", epochs=2, resume=True)
    before = weights(resumed)
    list(resumed)
    assert not same(before, weights(resumed))
    optimized = {id(p) for group in resumed.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in resumed.policy.parameters()}


def test_a_run_is_not_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    list(make(tmp_path / "run", epochs=1))
    with pytest.raises(UserError, match="already holds a run"):
        make(tmp_path / "run")
    with pytest.raises(UserError, match="use the same seed"):
        make(tmp_path / "run", resume=True, seed=7)
    with pytest.raises(UserError, match="does not exist"):
        make(tmp_path / "nowhere", resume=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_reward_stops_the_run_before_the_update(tmp_path: Path, bad: float) -> None:
    def planted(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        scores = redness(images, prompts)
        scores[3] = bad if trainer.epoch == 1 else scores[3]
        return scores

    trainer = make(tmp_path / "run", reward=FunctionReward("planted", planted, False))
    steps = iter(trainer)
    next(steps)
    kept = weights(trainer)
    with pytest.raises(NonFiniteError, match=r"reward 'planted' gave (nan|inf) for sample 3 \(prompt '.*'\)"):
        next(steps)
    assert same(kept, weights(trainer))
    assert make(tmp_path / "run", resume=True).epoch == 1


def test_a_bad_gradient_stops_before_the_optimizer_steps(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run")
    name, parameter = next(iter(trainer.policy.named_parameters().items()))
    kept = weights(trainer)
    parameter.register_hook(lambda grad: grad * float("nan") if trainer.parity is not None else grad)
    with pytest.raises(NonFiniteError, match=f"the gradient of {name} is not finite"):
        next(iter(trainer))
    assert same(kept, weights(trainer))


def test_a_bad_loss_names_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    original = trainer.algorithm.step_loss  # type: ignore[attr-defined]

    def planted(*args: Any) -> Any:
        loss, stats = original(*args)
        return loss * torch.tensor([1.0, float("inf"), 1.0, 1.0]), stats

    monkeypatch.setattr(trainer.algorithm, "step_loss", planted)
    with pytest.raises(NonFiniteError, match="algorithm 'ddpo': the loss of sample 1"):
        next(iter(trainer))


def test_a_failing_gate_stops_before_the_first_update() -> None:
    trainer = make()
    kept = weights(trainer)
    rollout = trainer._rollout

    def planted(*args: Any) -> Any:
        out = rollout(*args)
        trainer.sampler._fixed["guidance_scale"] = 1.0
        return out

    trainer._rollout = planted  # type: ignore[method-assign,assignment]
    with pytest.raises(ParityError):
        next(iter(trainer))
    assert same(kept, weights(trainer))


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="group standardises .* set train.samples_per_prompt to 2"):
        make(algorithm={"normalize": "group"}, samples_per_prompt=1)
    with pytest.raises(UserError, match="score_function is right for one update"):
        make(algorithm={"variant": "score_function"})
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    with pytest.raises(UserError, match=r"the sampler is deterministic \(dynamics=ode"):
        Trainer(
            policy=policy,
            sampler=Sampler(policy, steps=4, dynamics="ode"),
            algorithm=build_algorithm("ddpo"),
            reward="jpeg_compressibility",
            prompts=PROMPTS,
        )


def test_equal_rewards_change_nothing_but_weight_decay() -> None:
    flat = FunctionReward("flat", lambda images, prompts: torch.full((len(prompts),), 7), False)
    trainer = make(reward=flat, algorithm={"weight_decay": 0})
    kept = weights(trainer)
    metrics = next(iter(trainer))
    assert metrics["grad_norm"] == 0 and metrics["reward/std"] == 0
    assert same(kept, weights(trainer))


def test_lora_none_trains_the_whole_denoiser(tmp_path: Path) -> None:
    policy = dt.Policy(tiny.sd_pipeline(), lora=None)
    trainer = dt.Trainer(
        policy=policy,
        sampler=dt.Sampler(policy, steps=3),
        algorithm=dt.build_algorithm("ddpo", lr=1e-3, normalize="batch"),
        reward=FunctionReward("redness", redness, True),
        prompts=PROMPTS,
        out=tmp_path / "run",
        epochs=1,
        prompts_per_epoch=2,
        samples_per_prompt=2,
    )
    kept = weights(trainer)
    list(trainer)
    assert not same(kept, weights(trainer))
    assert (tmp_path / "run" / "adapter").is_dir() if trainer.save() else False


def calibrated(name: str = "alignprop", out: Path | None = None, **settings: Any) -> Trainer:
    """A run whose reward learns from the samples of each step, on the tiny model."""
    method = {"normalize": None, "lr": 1e-2, "adam_eps": 1e-2}
    reward = build_reward([{"name": "calibrated", "of": "contrast"}, {"name": "brightness", "weight": 0.1}])
    sizes = {"sample_every": 0, "epochs": 2, "micro_batch": 2}
    return make(out, reward=reward, name=name, algorithm=method, **{**sizes, **settings})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alignprop", "draft", "adjoint_matching"])
def test_a_reward_that_learns_does_so_once_per_step(name: str) -> None:
    """Micro-batches of one and of four reach the same weights, by the same statistics."""
    if name == "adjoint_matching":
        pytest.importorskip("difftune.algorithms.adjoint_matching")
    runs = [calibrated(name, micro_batch=micro) for micro in (1, 4)]
    before = weights(runs[0])
    for trainer in runs:
        list(trainer)
    assert not same(before, weights(runs[0]))
    one, four = (weights(trainer) for trainer in runs)
    for key, value in four.items():
        torch.testing.assert_close(one[key], value, atol=1e-5, rtol=0)
    states = [trainer.reward.state_dict()["calibrated"] for trainer in runs]
    # Two epochs of eight samples, each counted once.
    assert states[0]["count"] == states[1]["count"] == 16
    assert states[0]["mean"] == pytest.approx(states[1]["mean"], rel=1e-4)
    assert states[0]["squares"] == pytest.approx(states[1]["squares"], rel=1e-3)


def test_what_a_reward_learns_from_steps_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = calibrated(epochs=3)
    list(whole)
    list(calibrated(out=tmp_path / "run", epochs=2))
    resumed = calibrated(out=tmp_path / "run", epochs=3, resume=True)
    assert resumed.epoch == 2
    list(resumed)
    assert same(weights(whole), weights(resumed)) and whole.reward.state_dict() == resumed.reward.state_dict()


def test_what_a_failed_micro_batch_taught_is_forgotten() -> None:
    """Memory gives out once the second micro-batch of the first step has been scored; the step is begun again."""
    plain, short = calibrated(micro_batch=1), calibrated(micro_batch=2)
    accumulate, calls = short.algorithm.accumulate, [0]

    def limited(batch: Any, context: Any) -> dict[str, float]:
        found = accumulate(batch, context)
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    short.algorithm.accumulate = limited  # type: ignore[method-assign]
    list(plain)
    with pytest.warns(UserWarning, match="train.micro_batch is 1 from here on"):
        list(short)
    assert same(weights(plain), weights(short)) and plain.reward.state_dict() == short.reward.state_dict()


def test_cutting_into_minibatches_and_micro_batches() -> None:
    assert [list(p) for p in _split(range(7), 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert len(_split(range(2), 5)) == 2
    units = [[0, 1], [2, 3], [4, 5], [6]]
    assert list(_micro_batches(units, 4)) == [[[0, 1], [2, 3]], [[4, 5], [6]]]
    assert list(_micro_batches(units, 1)) == [[u] for u in units]
