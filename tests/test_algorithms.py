"""The common suite: every registered algorithm, on a noise-prediction and on a flow pipeline."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chains
import pytest
import tiny
import torch

from difftune.algorithm import (
    ALGORITHMS,
    Algorithm,
    AlgorithmConfig,
    Batch,
    Context,
    Point,
    build_algorithm,
    list_algorithms,
)
from difftune.checkpoint import load_checkpoint, save_checkpoint
from difftune.policy import LoraConfig, Policy
from difftune.registry import RegistryError
from difftune.reward import FunctionReward
from difftune.sampler import Sampler
from difftune.trainer import Trainer
from difftune.types import RewardOutput

ETA = {"sd": 1.0, "sd3": 0.7}

#: Settings under which nothing but the reward moves the weights: what regularises is off.
BARE: dict[str, dict[str, Any]] = {
    "dpok": {"kl_weight": 0.0},
    "grpo": {"kl_weight": 0.0},
    "awm": {"kl_weight": 0.0, "ema_weight": 0.0},
}

#: Settings of the test that trains, where the defaults are for pictures and their rewards.
LEARN: dict[str, dict[str, Any]] = {
    "rwr": {"beta": 5.0, "lr": 0.1},
    "raft": {"keep": 4, "lr": 0.1},
    "seppo": {"timesteps": 16, "checkpoint_every": 2},
    "adjoint_matching": {"reward_scale": 10_000.0},
}

#: Methods that move without a difference in rewards: supervised fine-tuning on equal weights, a pull to the base model.
RESTLESS = {"rwr", "adjoint_matching"}
PROMPTS = ["a red cat", "two dog"]

#: What the trainer adds to every record.
EVERYONES = {"grad_norm", "samples_per_second", "denoiser_calls", "denoiser_rows"}


def noise_for(name: str, kind: str) -> float:
    """The noise level: memoryless on flow models where the method needs that."""
    return math.sqrt(2) if name == "adjoint_matching" and kind == "sd3" else ETA[kind]


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


def make(name: str, kind: str, function: Any = brightness, **settings: Any) -> Trainer:
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    sizes: dict[str, Any] = {"epochs": 2, "prompts_per_epoch": 2, "samples_per_prompt": 4, "micro_batch": 4}
    algorithm = build_algorithm(name, **settings.pop("algorithm", {}))
    return Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=3, guidance_scale=2.0, eta=noise_for(name, kind), batch_size=16),
        algorithm=algorithm,
        reward=FunctionReward("test", function, True),
        prompts=PROMPTS,
        **{**sizes, **settings},
    )


def values(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


@pytest.fixture(params=list_algorithms())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(tiny.PIPELINES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_it_says_what_it_is(name: str) -> None:
    cls = ALGORITHMS.get(name)
    module = sys.modules[cls.__module__]
    assert issubclass(cls, Algorithm) and cls.evidence in ("transitions", "samples", "gradient")
    assert cls.paper and ".. math::" in (module.__doc__ or ""), "the paper's equation belongs in the module's docstring"
    assert issubclass(cls.Config, AlgorithmConfig)
    assert cls.metrics and all(cls.metrics.values())
    for field, info in cls.Config.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
    assert len(inspect.getsource(module).splitlines()) < 300


def test_an_update_is_finite_and_moves_the_adapter_only(name: str, kind: str) -> None:
    trainer = make(name, kind)
    pipe = trainer.policy.pipe
    frozen = {n: p.detach().clone() for m in pipe.components.values() if isinstance(m, torch.nn.Module)
              for n, p in m.named_parameters() if not p.requires_grad}  # fmt: skip
    before = values(trainer)
    metrics = next(iter(trainer))
    assert all(isinstance(v, float) and v == v and abs(v) != float("inf") for v in metrics.values.values())
    told = trainer.algorithm.metrics.keys()
    assert {n for n in metrics.values if "/" not in n} - EVERYONES <= told, "a metric without a meaning"
    assert not torch.equal(before, values(trainer))
    after = {n: p for m in pipe.components.values() if isinstance(m, torch.nn.Module) for n, p in m.named_parameters()}
    assert all(torch.equal(value, after[n]) for n, value in frozen.items())


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_it_raises_the_reward_and_under_the_negated_reward_lowers_it(name: str, chain: str) -> None:
    """On a chain with the exact denoiser, where nothing but the reward has a reason to move the samples' mean."""
    for sign in (1.0, -1.0):
        sampler = chains.sampler(chain, eta=noise_for(name, "sd" if chain == "diffusion" else "sd3"))
        trainer = Trainer(
            policy=sampler.policy,
            sampler=sampler,
            algorithm=build_algorithm(name, **{"lr": 0.05, **LEARN.get(name, {})}),
            reward=FunctionReward("sign", lambda images, _, sign=sign: sign * chains.logits(images).mean(1), True),
            prompts=PROMPTS,
            epochs=8,
            prompts_per_epoch=2,
            samples_per_prompt=32,
            updates_per_epoch=1,
            micro_batch=64,
        )
        before = chains.logits(sampler.rollout(PROMPTS * 64, seed=99).images).mean()  # type: ignore[arg-type]
        list(trainer)
        after = chains.logits(sampler.rollout(PROMPTS * 64, seed=99).images).mean()  # type: ignore[arg-type]
        assert sign * float(after - before) > 0.05, (sign, float(after - before))


def test_constant_rewards_do_not_move_it(name: str, kind: str) -> None:
    if ALGORITHMS.get(name).evidence == "gradient":
        pytest.skip("a constant has no gradient")
    if name in RESTLESS:
        pytest.skip("equal rewards are not silence")
    settings = {"weight_decay": 0.0, **BARE.get(name, {})}
    trainer = make(name, kind, lambda images, prompts: torch.ones(len(prompts)), algorithm=settings)
    before = values(trainer)
    next(iter(trainer))
    assert torch.equal(before, values(trainer))


def test_it_resumes(name: str, kind: str, tmp_path: Path) -> None:
    whole, first, second = make(name, kind), make(name, kind), make(name, kind)
    list(whole)
    next(iter(first))
    # By way of the disk: a state may hold keys or values there that come back as others.
    second.load_state_dict(load_checkpoint(save_checkpoint(tmp_path, 1, first.state_dict())))
    list(second)
    assert torch.equal(values(whole), values(second))


def test_low_precision_bases_train(name: str, kind: str) -> None:
    trainer = make(name, kind)
    for component in trainer.policy.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
    before = values(trainer)
    metrics = next(iter(trainer))
    assert metrics["grad_norm"] > 0 and not torch.equal(before, values(trainer))


def test_unknown_settings_and_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        build_algorithm(name, no_such_setting=1)
    with pytest.raises(RegistryError, match="unknown algorithm 'dpo0'"):
        build_algorithm("dpo0")


# -- what a gradient may depend on -------------------------------------------------------------------------------

#: The samples of an epoch: eight of each prompt, in the order in which they are drawn.
EPOCH = ["a", "b", "c"] * 8

#: Their rewards: no two are equal, and an offset of a whole number is exact in floats.
REWARDS = torch.randperm(24, generator=torch.Generator().manual_seed(1)) / 8

#: Rewards that are equal but for the rounding of floats.
JITTER = 0.5 + 6e-8 * torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))

#: Settings, beside the defaults, under which a method's gradient is the same whatever is added to all rewards.
RELATIVE: dict[str, list[dict[str, Any]]] = {
    "ddpo": [{}, {"normalize": "group"}, {"normalize": "batch"}],
    "grpo": [{}, {"global_std": False}],
    "awm": [{}, {"global_std": False}],
    "dpok": [{}, {"baseline": "value"}],
    "rwr": [{}, {"per_prompt": True}, {"weights": "sparse"}],
    "d3po": [{}, {"pairs": "all"}],
    "diffusion_dpo": [{}, {"pairs": "all"}],
    "rdp": [{}, {"reduce": "sum"}, {"reference": "rollout", "clip_range": None}],
    "raft": [{}, {"keep": 3}],
    "refl": [{"loss": "negative"}],
}

#: The others: settings under which a reward's own value is aimed at, and how.
ABSOLUTE: list[tuple[str, dict[str, Any], str]] = [
    ("refl", {}, "a hinge, by default: there is no gradient above the target"),
    ("alignprop", {"loss": "hinge", "target": 2.0}, "there is no gradient above the target"),
    ("draft", {"loss": "target", "target": 2.0}, "the gradient turns at the target"),
    ("drtune", {"loss": "hinge", "target": 2.0}, "there is no gradient above the target"),
    ("rwr", {"weights": "exp"}, "exp(beta r) is not normalised"),
    ("kto", {"threshold": 1.5}, "samples are desirable above a reward, not above the mean of their prompt"),
    ("dpok", {"baseline": "none"}, "the reward stands where an advantage would"),
]

CHAIN = pytest.mark.parametrize("chain", ["diffusion", "flow"])


class Epoch:
    """One epoch of an algorithm on a chain, as the trainer runs it, in a minibatch whose order is the test's.

    Args:
        away: how far the weights are from the base model, and then, where samples are noised anew, from those that
            sampled; 0 is the first update of a run.
    """

    def __init__(self, name: str, chain: str, away: float = 2e-3, **settings: Any) -> None:
        zero = torch.zeros(chains.DIMS, dtype=torch.float64)
        self.sampler = chains.sampler(chain, shift=zero, eta=noise_for(name, "sd3" if chain == "flow" else "sd"))
        self.parameter = self.sampler.policy.parameters()[0]
        self.parameter.data += away * torch.linspace(-1, 2, chains.DIMS)
        self.algorithm = build_algorithm(name, **settings)
        self.algorithm.setup(self.sampler.policy)
        self.trajectory = self.sampler.rollout(EPOCH, seed=7)
        if self.algorithm.evidence == "samples":
            self.parameter.data += away * torch.linspace(1, -1, chains.DIMS)

    def units(self, rewards: torch.Tensor) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """The values and units of rewards that came twice: methods that remember rewards know them by then."""
        for _ in range(2):
            prepared = self.algorithm.prepare(EPOCH, RewardOutput(rewards))
        units = [[i] for i in range(len(EPOCH))] if prepared.units is None else prepared.units
        return dict(prepared.values), [list(unit) for unit in units]

    def gradient(
        self, rewards: torch.Tensor, offset: float = 0.0, order: int | None = None, only: str | None = None
    ) -> torch.Tensor:
        """The gradient of the epoch as one minibatch, in an order of its own, or of one prompt's samples.

        ``offset`` is added to the reward that methods which differentiate it are given.
        """
        values, units = self.units(rewards + offset)
        units = [unit for unit in units if only in (None, EPOCH[unit[0]])]
        rows = [i for unit in units for i in unit]
        if order is not None:
            generator = torch.Generator().manual_seed(order)
            rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            units = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        self.parameter.grad = None
        if not rows:
            return torch.zeros_like(self.parameter)
        place = {row: number for number, row in enumerate(rows)}
        batch = Batch(
            prompts=tuple(EPOCH[i] for i in rows),
            keys=tuple(self.trajectory.keys[i] for i in rows),
            values={name: value[rows] for name, value in values.items()},
            trajectory=None if self.algorithm.evidence == "gradient" else self.trajectory.select(rows),
            metadata=[{}] * len(rows),
            units=[[place[i] for i in unit] for unit in units],
        )
        reward = FunctionReward("square", lambda images, _: chains.logits(images).square().mean(1) + offset, True)
        generator = torch.Generator().manual_seed(3)
        context = Context(self.sampler, self.sampler.policy, reward, 1.0, generator, epoch=1, step=0)
        metrics = self.algorithm.accumulate(batch, context)
        assert all(math.isfinite(value) for value in metrics.values())
        assert self.parameter.grad is not None and bool(torch.isfinite(self.parameter.grad).all())
        return self.parameter.grad.clone()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far ``a`` is from ``b``, as a share of b, which is not 0."""
    assert float(b.norm()) > 0
    return float((a - b).norm() / b.norm())


@CHAIN
def test_a_constant_added_to_all_rewards_changes_nothing(name: str, chain: str) -> None:
    """Only differences of rewards say what is better; a baseline, a pair or a normalisation takes the rest off."""
    for settings in RELATIVE.get(name, [{}]):
        before = Epoch(name, chain, **settings).gradient(REWARDS)
        for offset in (-4.0, 8.0):
            after = Epoch(name, chain, **settings).gradient(REWARDS, offset)
            assert distance(after, before) < 1e-5, (settings, offset)


@CHAIN
@pytest.mark.parametrize(("name", "settings", "why"), ABSOLUTE, ids=[name for name, _, _ in ABSOLUTE])
def test_where_a_reward_itself_is_aimed_at_a_constant_counts(
    name: str, settings: dict[str, Any], why: str, chain: str
) -> None:
    """The exceptions to the test above are ones: a list of them that is too long would hide errors."""
    before = Epoch(name, chain, **settings).gradient(REWARDS)
    assert distance(Epoch(name, chain, **settings).gradient(REWARDS, 4.0), before) > 0.05, why


@CHAIN
def test_the_order_of_a_minibatch_changes_nothing(name: str, chain: str) -> None:
    """Noise belongs to a sample's key and comparisons to its unit, so that a place in the batch means nothing."""
    for settings in RELATIVE.get(name, [{}]):
        before = Epoch(name, chain, **settings).gradient(REWARDS)
        for order in (1, 2):
            after = Epoch(name, chain, **settings).gradient(REWARDS, order=order)
            assert distance(after, before) < 1e-5, settings


@CHAIN
def test_rewards_that_differ_by_rounding_do_not_move_it(name: str, chain: str) -> None:
    """Equal up to 1e-7, or equal and large: nothing is not finite, and no gradient has the size of a real one."""
    if ALGORITHMS.get(name).evidence == "gradient" or name == "adjoint_matching":
        pytest.skip("the reward's own gradient is followed")
    for settings in RELATIVE.get(name, [{}]):
        if settings.get("weights") == "sparse":
            continue  # a tenth of the samples is fitted as data, whichever they are
        settings = {**BARE.get(name, {}), **settings}

        def gradient(rewards: torch.Tensor, settings: Any = settings, **choice: Any) -> torch.Tensor:
            return Epoch(name, chain, away=0.0, **settings).gradient(rewards, **choice)

        size = float(gradient(REWARDS).norm())
        assert size > 0
        equal = torch.full((24,), 1e6)
        if name in RESTLESS:
            # All weights are 1, whatever the rewards that are equal.
            torch.testing.assert_close(gradient(JITTER), gradient(equal), atol=1e-5 * size, rtol=0)
            continue
        assert float(gradient(equal).norm()) < 1e-6 * size, settings
        assert float(gradient(JITTER).norm()) < 1e-2 * size, settings
        # One prompt says nothing, beside others that do.
        mixed = torch.where(torch.tensor([prompt == "a" for prompt in EPOCH]), JITTER, REWARDS)
        if settings.get("normalize") != "batch":
            assert float(gradient(mixed, only="a").norm()) < 1e-2 * size, settings


def plain_error_gradient(epoch: Epoch, points: list[Point], rows: list[int]) -> torch.Tensor:
    """The gradient of the denoising error of ``rows`` at ``points``, by way of the denoiser alone."""
    brain = epoch.sampler.policy.pipe.brain
    epoch.parameter.grad = None
    for point in points:
        x0, noise = epoch.trajectory.states[rows, -1], point.truth.noise
        torch.testing.assert_close(point.truth.x0, x0)
        x_t = point.level.alpha * x0 + point.level.sigma * noise
        target = noise - x0 if brain.kind == "flow" else noise
        predicted = brain(x_t, torch.tensor(point.timestep))
        ((predicted - target).square().mean() / len(points)).backward()
    assert epoch.parameter.grad is not None
    return epoch.parameter.grad.clone()


@CHAIN
@pytest.mark.parametrize(
    ("name", "settings"),
    [("rwr", {}), ("rwr", {"per_prompt": True}), ("rwr", {"weights": "sparse", "quantile": 0.0}), ("raft", {}),
     ("raft", {"keep": 3})],
)  # fmt: skip
def test_equal_weights_are_supervised_fine_tuning(name: str, settings: dict[str, Any], chain: str) -> None:
    """With equal rewards RWR fits all samples as data, and RAFT the best of each prompt."""
    epoch = Epoch(name, chain, **settings)
    points: list[Point] = []
    algorithm: Any = epoch.algorithm
    original = algorithm.point_loss

    def watched(point: Point, batch: Batch) -> Any:
        points.append(point)
        return original(point, batch)

    algorithm.point_loss = watched
    if name == "rwr":
        rewards, rows = torch.full((24,), 0.7), list(range(24))
    else:
        rewards, rows = REWARDS, []
        for prompt in "abc":
            group = [i for i in range(24) if EPOCH[i] == prompt]
            rows += sorted(group, key=lambda i: -float(REWARDS[i]))[: settings.get("keep", 1)]
    got = epoch.gradient(rewards)
    assert len(points) == algorithm.config.timesteps and len({point.timestep for point in points}) == len(points)
    assert distance(got, plain_error_gradient(epoch, points, rows)) < 1e-6
