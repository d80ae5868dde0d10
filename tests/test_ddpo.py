"""DDPO's own properties: the clipped surrogate, the score function, units and the KL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch

from difftune.algorithms.ddpo import DDPO, DDPOConfig, importance_sampling_loss, score_function_loss
from difftune.policy import LoraConfig, Policy
from difftune.sampler import Sampler, StepView
from difftune.types import RewardOutput

EPS = 0.1


def surrogate_gradient(ratio: float, advantage: float) -> float:
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = importance_sampling_loss(log_prob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), EPS)
    loss.sum().backward()
    assert log_prob.grad is not None
    return float(log_prob.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 1.0, -1.0),
        (1.0, -1.0, 1.0),
        (1.05, 2.0, -2.1),
        (1.2, 1.0, 0.0),  # already raised enough
        (0.8, -1.0, 0.0),  # already lowered enough
        (1.2, -1.0, 1.2),  # raised though it should fall: pulled back
        (0.8, 1.0, -0.8),
    ],
)
def test_the_gradient_is_zero_only_where_going_on_would_help(ratio: float, advantage: float, expected: float) -> None:
    assert surrogate_gradient(ratio, advantage) == pytest.approx(expected, abs=1e-10)


def test_at_ratio_one_both_variants_have_the_same_gradient() -> None:
    log_prob = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(5, dtype=torch.float64)
    (a,) = torch.autograd.grad(importance_sampling_loss(log_prob, log_prob.detach(), advantage, EPS).sum(), log_prob)
    (b,) = torch.autograd.grad(score_function_loss(log_prob, advantage).sum(), log_prob)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    loss = importance_sampling_loss(log_prob, log_prob, advantage, EPS)
    assert float(loss.mean()) == pytest.approx(-float(advantage.mean()), abs=1e-12)


def make(**settings: Any) -> tuple[Sampler, DDPO]:
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    for parameter in policy.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05
    return Sampler(policy, steps=4, eta=1.0), DDPO(DDPOConfig(**settings))


def test_ratios_are_against_the_policy_that_sampled() -> None:
    """After the weights move, the ratio is to the recorded log-prob, not to the base model's."""
    sampler, algorithm = make()
    traj = sampler.rollout(["a", "b"])
    for parameter in sampler.policy.parameters():
        parameter.data += 0.02
    values = {"advantage": torch.tensor([1.0, -1.0])}
    seen: list[tuple[StepView, torch.Tensor]] = []
    sampler.replay(traj, lambda view: seen.append((view, algorithm.step_loss(view, values, None)[1]["ratio"])))
    for view, ratio in seen:
        torch.testing.assert_close(ratio, (view.log_prob - traj.log_probs[:, view.index]).exp().detach())
        assert float((ratio - 1).abs().max()) > 1e-5


def test_the_kl_term_is_the_gaussians_kl_to_the_base() -> None:
    sampler, plain = make()
    _, with_kl = make(kl_weight=2.0)
    traj = sampler.rollout(["a", "b"])
    with sampler.policy.reference():
        reference = sampler.transitions(traj)
    values = {"advantage": torch.tensor([1.0, -1.0])}

    def compare(view: StepView) -> None:
        base = reference[view.index]
        expected = ((view.mean - base.mean) ** 2 / (2 * view.std**2)).flatten(1).mean(1)
        a, _ = plain.step_loss(view, values, None)
        b, stats = with_kl.step_loss(view, values, base)
        torch.testing.assert_close(b - a, 2.0 * expected, atol=1e-6, rtol=1e-5)
        assert float(stats["kl"].min()) > 0
        (grad,) = torch.autograd.grad((b - a).sum(), sampler.policy.parameters()[1], retain_graph=True)
        assert float(grad.norm()) > 0  # a KL under no_grad would have none

    sampler.replay(traj, compare)


def test_advantages_are_clipped_and_statistics_are_kept() -> None:
    _, algorithm = make(normalize="batch", advantage_clip=1.0)
    rewards = torch.tensor([0.0] * 30 + [100.0])
    advantage = algorithm.prepare(["a"] * 31, RewardOutput(rewards)).values["advantage"]
    assert float(advantage.max()) == 1.0
    _, running = make()
    running.prepare(["a"] * 31, RewardOutput(rewards))
    assert len(running.state_dict()["statistics"]["a"]) == 31


def test_the_log_prob_is_a_mean_and_its_unit_converts() -> None:
    sampler, _ = make()
    traj = sampler.rollout(["a"])

    def check(view: StepView) -> None:
        out = traj.step_out(view.index)
        total = torch.distributions.Normal(view.mean, view.std).log_prob(out).flatten(1).sum(1)
        torch.testing.assert_close(view.log_prob * view.dims, total, rtol=1e-5, atol=1e-3)

    sampler.replay(traj, check)


def test_statistics_that_could_never_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the 8 rewards that prompt_buffer keeps"):
        DDPOConfig(prompt_buffer=8, prompt_min_count=16)
