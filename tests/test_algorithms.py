"""The common suite: every registered algorithm, on a noise-prediction and on a flow pipeline."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch

from difftune.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, build_algorithm, list_algorithms
from difftune.policy import LoraConfig, Policy
from difftune.registry import RegistryError
from difftune.reward import FunctionReward
from difftune.sampler import Sampler
from difftune.trainer import Trainer

ETA = {"sd": 1.0, "sd3": 0.7}
PROMPTS = ["a red cat", "two dog"]


def brightness(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


def make(name: str, kind: str, function: Any = brightness, **settings: Any) -> Trainer:
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    sizes: dict[str, Any] = {"epochs": 2, "prompts_per_epoch": 4, "samples_per_prompt": 4, "micro_batch": 8}
    algorithm = build_algorithm(name, **settings.pop("algorithm", {}))
    return Trainer(
        policy=policy,
        sampler=Sampler(policy, steps=4, guidance_scale=2.0, eta=ETA[kind], batch_size=16),
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
    assert not torch.equal(before, values(trainer))
    after = {n: p for m in pipe.components.values() if isinstance(m, torch.nn.Module) for n, p in m.named_parameters()}
    assert all(torch.equal(value, after[n]) for n, value in frozen.items())


def test_a_step_along_the_gradient_raises_the_reward(name: str, kind: str) -> None:
    """The same samples, drawn again after the update, score higher; under the negated reward they score lower."""
    gains = []
    for sign in (1.0, -1.0):
        trainer = make(name, kind, lambda images, prompts, sign=sign: sign * brightness(images, prompts),
                       prompts_per_epoch=16, updates_per_epoch=1, micro_batch=64, algorithm={"lr": 1e-2})  # fmt: skip
        texts = PROMPTS * 16

        def score(trainer: Trainer = trainer, texts: list[str] = texts) -> float:
            images = trainer.sampler.rollout(texts, seed=99).images
            assert images is not None
            return float(brightness(images, texts).mean())

        before = score()
        list(trainer)
        gains.append(score() - before)
    assert gains[0] > 0 > gains[1], gains


def test_constant_rewards_do_not_move_it(name: str, kind: str) -> None:
    if ALGORITHMS.get(name).evidence == "gradient":
        pytest.skip("a constant has no gradient")
    trainer = make(name, kind, lambda images, prompts: torch.ones(len(prompts)), algorithm={"weight_decay": 0.0})
    before = values(trainer)
    next(iter(trainer))
    assert torch.equal(before, values(trainer))


def test_it_resumes(name: str, kind: str) -> None:
    whole, first, second = make(name, kind), make(name, kind), make(name, kind)
    list(whole)
    next(iter(first))
    second.load_state_dict(first.state_dict())
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
