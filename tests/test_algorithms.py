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

from difftune.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, build_algorithm, list_algorithms
from difftune.checkpoint import load_checkpoint, save_checkpoint
from difftune.policy import LoraConfig, Policy
from difftune.registry import RegistryError
from difftune.reward import FunctionReward
from difftune.sampler import Sampler
from difftune.trainer import Trainer

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
