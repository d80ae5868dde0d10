"""GRPO and DPOK: group advantages, the two surrogates, the step KL, the guard, settings that stand for papers."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import chains
import pytest
import tiny
import torch

from difftune.advantage import normalize_groups
from difftune.algorithm import Batch, Context, Plan, build_algorithm, importance_sampling_loss
from difftune.algorithms import grpo as grpo_module
from difftune.algorithms._value import ValueNet, features
from difftune.algorithms.dpok import clamped_loss
from difftune.algorithms.grpo import guarded_log_ratio
from difftune.policy import LoraConfig, Policy
from difftune.reward import FunctionReward, WeightedReward
from difftune.sampler import Sampler, StepView
from difftune.trainer import Trainer
from difftune.transition import Gaussian, flow_sde
from difftune.types import RewardOutput, SampleKey, UserError

PROMPTS = ["a", "a", "a", "b", "b"]
REWARDS = torch.tensor([1.0, 2.0, 6.0, 4.0, 5.0])


def test_group_advantages_sum_to_zero_and_know_no_affine_map() -> None:
    """C24, for both divisors."""
    for global_std in (False, True):
        grpo = build_algorithm("grpo", global_std=global_std)
        advantage = grpo.prepare(PROMPTS, RewardOutput(REWARDS)).values["advantage"]
        assert float(advantage[:3].sum()) == pytest.approx(0, abs=1e-5)
        again = grpo.prepare(PROMPTS, RewardOutput(3 * REWARDS - 7)).values["advantage"]
        torch.testing.assert_close(advantage, again, atol=3e-4, rtol=0)
        flat = grpo.prepare(PROMPTS, RewardOutput(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0]))).values["advantage"]
        assert flat.eq(0).all()
        assert grpo.prepare(["x"], RewardOutput(torch.tensor([3.0]))).values["advantage"].eq(0).all()


def test_parts_are_standardised_apart() -> None:
    """C128: each part's scale drops out, which it does not when totals are standardised."""
    parts = {"x": REWARDS, "y": REWARDS.flip(0)}
    scaled = {"x": REWARDS, "y": 100 * REWARDS.flip(0), "y/inner": REWARDS * 7}
    grpo = build_algorithm("grpo", mix="parts", global_std=False)
    a = grpo.prepare(PROMPTS, RewardOutput(parts["x"] + parts["y"], parts)).values["advantage"]
    b = grpo.prepare(PROMPTS, RewardOutput(scaled["x"] + scaled["y"], scaled)).values["advantage"]
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert not torch.allclose(normalize_groups(scaled["x"] + scaled["y"], PROMPTS), b, atol=0.1)
    with pytest.raises(UserError, match="mix: parts needs a reward with parts"):
        grpo.prepare(PROMPTS, RewardOutput(REWARDS))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("ratio", "slope"), [(1.0, 1.0), (1.05, 1.05), (1.2, 0.0), (0.8, 0.0)])
def test_a_plain_clamp_has_no_gradient_outside_the_band(ratio: float, slope: float, advantage: float) -> None:
    """C27: on either side and for either sign, unlike PPO's maximum (test_ddpo)."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    clamped_loss(log_prob, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), 0.1).sum().backward()
    assert log_prob.grad is not None
    assert float(log_prob.grad) == pytest.approx(-advantage * slope, abs=1e-10)


def test_the_kl_of_two_sde_steps_is_the_papers() -> None:
    """C75: |dt| / 2 (g (1 - t) / (2 t) + 1 / g)^2 dv^2 per dimension."""
    t, s, eta = 0.6, 0.5, 0.7
    x = torch.randn(3, 5, dtype=torch.float64)
    v, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    g = eta * math.sqrt(t / (1 - t))
    kl = flow_sde(x, v, t, s, eta, 0.9).kl(flow_sde(x, w, t, s, eta, 0.9))
    expected = (t - s) / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2 * (v - w).square().mean(1)
    torch.testing.assert_close(kl, expected, atol=1e-10, rtol=1e-10)


def test_the_guard_leaves_the_noise_times_the_shift() -> None:
    """std (log w + |shift|^2 / (2 std^2)) is the mean over dimensions of noise times shift: no bias, no scale."""
    torch.manual_seed(0)
    mean, noise = torch.randn(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    shift, std = 0.1 * torch.randn(4, 7, dtype=torch.float64), 0.3
    x = mean + std * noise
    log_ratio = Gaussian(mean + shift, std).log_prob(x) - Gaussian(mean, std).log_prob(x)
    guarded = guarded_log_ratio(log_ratio, mean + shift, mean, std)
    torch.testing.assert_close(guarded, (noise * shift).mean(1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", sorted(tiny.PIPELINES))
def test_the_guards_ratio_is_one_at_first_in_low_precision_too(kind: str) -> None:
    """What bf16 rounds off a sample is no shift of the mean: nothing may be clipped before anything is learnt."""
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    policy.pipe.to(torch.bfloat16)
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()
    sampler = Sampler(policy, steps=4, guidance_scale=2.0, eta=0.7)
    grpo = build_algorithm("grpo", kl_weight=0.0, ratio="guard", clip_range=1e-9)
    grpo.setup(policy)
    traj = sampler.rollout(["a red cat"] * 3)
    batch = Batch(traj.prompts, traj.keys, {"advantage": torch.ones(3)}, traj)
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    context = Context(sampler, policy, reward, 1.0, torch.Generator(), 1, 0)
    metrics = grpo.accumulate(batch, context)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())


def test_terms_that_are_standardised_apart_are_added_by_weight() -> None:
    """Only the weights' proportions and signs tell how much each term counts; a sum of one reward has no terms."""
    rewards = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0]), "b": torch.tensor([30.0, 10.0, 20.0, 0.0])}
    sampler = chains.sampler("flow")

    def advantage(*weights: float) -> torch.Tensor:
        terms = [(name, weight, FunctionReward(name, lambda images, p: images.flatten(1).mean(1), True))
                 for name, weight in zip(rewards, weights, strict=True)]  # fmt: skip
        grpo = build_algorithm("grpo", mix="parts", advantage_clip=100.0)
        grpo.check(sampler, WeightedReward(terms), Plan(1, 4, 1))
        total = weights[0] * rewards["a"] + weights[1] * rewards["b"]
        scored = RewardOutput(total, {**rewards, "b/part": rewards["a"]})
        return grpo.prepare(["x"] * 4, scored).values["advantage"]

    first, second = advantage(1, 0), advantage(0, 1)
    torch.testing.assert_close(advantage(2, -0.5), 2 * first - 0.5 * second)
    torch.testing.assert_close(first, normalize_groups(rewards["a"], ["x"] * 4, True))
    with pytest.raises(UserError, match=r"mix: parts standardises the terms of a sum, and 'r' is none"):
        build_algorithm("grpo", mix="parts").check(
            sampler, FunctionReward("r", lambda images, p: images.flatten(1).mean(1), True), Plan(1, 4, 1)
        )


def test_the_guard_leaves_out_what_the_pipeline_overwrites() -> None:
    """A known region's mean may lie anywhere: the ratio of the rest is what it is without the region."""
    torch.manual_seed(0)
    sampler = chains.sampler("diffusion")
    grpo: Any = build_algorithm("grpo", kl_weight=0.0, ratio="guard")
    traj = sampler.rollout(["a"] * 4)
    # Nothing is kept: log-probs are 0, and so must be the bias of their ratios, wherever the policy has gone.
    kept = torch.zeros_like(traj.states[:, 1:], dtype=torch.bool)
    traj = replace(traj, kept=kept, log_probs=torch.zeros_like(traj.log_probs))
    grpo.setup(sampler.policy)
    sampler.policy.parameters()[0].data += 0.5
    batch = Batch(traj.prompts, traj.keys, {"advantage": torch.ones(4)}, traj, metadata=[{}] * 4)
    reward = FunctionReward("none", lambda images, prompts: images.mean((1, 2, 3)), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    seen: list[float] = []

    def keep(log_ratio: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.extend(log_ratio.detach().abs().tolist())
        return importance_sampling_loss(log_ratio, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_module, "importance_sampling_loss", keep)
        grpo.accumulate(batch, context)
    assert seen and max(seen) == 0.0
    mask = torch.tensor([[True, False, True]])
    mean, old_mean = torch.randn(2, 3), torch.randn(2, 3)
    other = torch.where(mask, old_mean, old_mean + 9.0)
    one, two = (guarded_log_ratio(torch.ones(2), mean, each, 0.3, mask) for each in (old_mean, other))
    assert torch.equal(one, two) and not torch.equal(one, guarded_log_ratio(torch.ones(2), mean, old_mean, 0.3))


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize("settings", [{}, {"ratio": "guard"}, {"timestep_fraction": 0.6, "global_std": False}])
def test_the_first_update_has_ratio_one_and_loss_minus_the_mean_advantage(chain: str, settings: dict[str, Any]) -> None:
    """C20 through the sampler, for each setting."""
    sampler = chains.sampler(chain)
    grpo: Any = build_algorithm("grpo", kl_weight=0.0, **settings)
    traj = sampler.rollout(["a"] * 4)
    advantage = torch.tensor([1.0, -2.0, 0.5, 2.0])
    old = sampler.transitions(traj)

    def check(view: StepView) -> None:
        old_mean = old[view.index].mean if settings.get("ratio") == "guard" else None
        loss, stats = grpo.step_loss(view, {"advantage": advantage}, None, old_mean)
        torch.testing.assert_close(loss.detach(), -advantage, atol=1e-5, rtol=0)
        assert stats["ratio"].eq(1).all() and stats["clip_fraction"].eq(0).all()

    sampler.replay(traj, check)


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_the_guard_divides_by_the_steps_size(chain: str) -> None:
    """At the first update every ratio is 1, so equal advantages A cost -A / |dt| at each step."""
    sampler = chains.sampler(chain)
    traj = sampler.rollout(["a"] * 3)
    levels = [sampler.level(float(t)).sigma for t in traj.times] + [0.0]
    sizes = [levels[k] - levels[k + 1] for k in traj.stochastic_steps]
    batch = Batch(traj.prompts, traj.keys, {"advantage": torch.full((3,), 2.0)}, traj)
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    grpo = build_algorithm("grpo", kl_weight=0.0, ratio="guard")
    grpo.setup(sampler.policy)
    metrics = grpo.accumulate(batch, context)
    assert metrics["loss"] == pytest.approx(-2.0 * sum(1 / size for size in sizes) / len(sizes), rel=1e-3)


def test_samples_of_a_prompt_may_begin_from_the_same_noise() -> None:
    """DanceGRPO: x_T is the prompt's, the noise of the steps the sample's; another epoch has another x_T."""
    sampler = chains.sampler("flow", initial_noise="prompt")
    traj = sampler.rollout(["a", "b", "a"])
    assert torch.equal(traj.states[0, 0], traj.states[2, 0]) and not torch.equal(traj.states[0, 0], traj.states[1, 0])
    assert not torch.equal(traj.states[0, -1], traj.states[2, -1])
    assert not torch.equal(sampler.rollout(["a"], epoch=1).states[0, 0], traj.states[0, 0])
    assert sampler.check_parity(traj)["max_ratio_error"] == 0


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "cps"])
def test_every_published_dynamics_trains(dynamics: str) -> None:
    sampler = chains.sampler("flow", dynamics=dynamics, eta=0.5, window=[1, 2])
    traj = sampler.rollout(["a"] * 3)
    assert traj.stochastic_steps == [1, 2]
    grpo: Any = build_algorithm("grpo", kl_weight=0.0)
    values = {"advantage": torch.tensor([1.0, -1.0, 0.5])}
    sampler.replay(traj, lambda view: grpo.step_loss(view, values, None)[0].mean().backward())
    assert float(sampler.policy.parameters()[0].grad.norm()) > 0  # type: ignore[union-attr]


def surrogate_slope(name: str, ratio: float, advantage: float) -> float:
    """The derivative of a method's loss of one step by the log-prob, through its own settings."""
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    view: Any = SimpleNamespace(log_prob=log_prob, old_log_prob=torch.zeros(1, dtype=torch.float64), dims=1)
    method: Any = build_algorithm(name, clip_range=0.1, kl_weight=0.0)
    values = {"advantage": torch.tensor([advantage], dtype=torch.float64)}
    method.step_loss(view, values, None)[0].sum().backward()
    assert log_prob.grad is not None
    return float(log_prob.grad)


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize(("name", "reward_weight"), [("ddpo", 1.0), ("dpok", 10.0), ("grpo", 1.0)])
def test_ratios_are_to_what_sampled_and_the_kl_is_to_the_base(name: str, reward_weight: float, chain: str) -> None:
    """The whole loss of an update that is not a run's first: -A p / p_old + lambda KL(p || p_ref), and its gradient.

    Three policies differ: the base model, the one that sampled, and the one that is trained.
    """
    sampler = chains.sampler(chain, shift=torch.zeros(chains.DIMS, dtype=torch.float64))
    parameter = sampler.policy.parameters()[0]
    parameter.data += 0.05 * torch.linspace(-1, 2, chains.DIMS)
    traj = sampler.rollout(["a"] * 6)
    parameter.data += 0.04 * torch.linspace(1, 0, chains.DIMS)
    # No clipping: that is another test's.
    method = build_algorithm(name, clip_range=1e3, kl_weight=0.7)
    values = method.prepare(traj.prompts, RewardOutput(torch.tensor([1.0, 4.0, 2.0, 0.5, 3.0, -1.0]))).values
    with sampler.policy.reference():
        base = sampler.transitions(traj)
    totals: list[float] = []

    def by_hand(view: StepView) -> None:
        density = torch.distributions.Normal(view.mean, view.std).log_prob(traj.step_out(view.index)).mean(1)
        ratio = (density - traj.log_probs[:, view.index]).exp()
        kl = (view.mean - base[view.index].mean).square().mean(1) / (2 * view.std**2)
        loss = (0.7 * kl - reward_weight * values["advantage"] * ratio).mean()
        (loss / len(base)).backward()
        totals.append(float(loss.detach()))
        far = (density.detach() - base[view.index].log_prob(traj.step_out(view.index))).abs().max()
        assert float((ratio.detach() - 1).abs().max()) > 1e-4 and float(far) > 1e-4 and float(kl.detach().min()) > 1e-5

    sampler.replay(traj, by_hand)
    assert parameter.grad is not None
    expected, parameter.grad = parameter.grad.clone(), None
    batch = Batch(traj.prompts, traj.keys, values, traj, metadata=[{}] * 6, units=[[i] for i in range(6)])
    reward = FunctionReward("none", lambda images, prompts: images.mean((1, 2, 3)), True)
    metrics = method.accumulate(batch, Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0))
    assert metrics["loss"] == pytest.approx(sum(totals) / len(totals), rel=1e-5, abs=1e-5)
    torch.testing.assert_close(parameter.grad, expected, atol=1e-6 * float(expected.norm()), rtol=1e-5)


def test_dpoks_loss_is_the_plain_clamp_and_ddpos_the_maximum() -> None:
    """C27, through the algorithms: raised though it should fall, DPOK has no gradient and DDPO is pulled back."""
    assert surrogate_slope("dpok", 1.2, -1.0) == 0
    assert surrogate_slope("dpok", 1.05, -1.0) == pytest.approx(10.0 * 1.05, abs=1e-10)  # reward_weight is 10
    for name in ("ddpo", "grpo"):
        assert surrogate_slope(name, 1.2, -1.0) == pytest.approx(1.2, abs=1e-10)
        assert surrogate_slope(name, 1.2, 1.0) == 0


def test_the_value_network_learns_what_the_states_tell() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, 8, 8, generator=generator) + torch.randn(400, 1, 1, 1, generator=generator)
    target = x.flatten(1).mean(1)
    rows = features(x, 0.5, ["a red cat"] * 400)
    net = ValueNet(lr=1e-3, buffer=1000)
    assert net(rows).eq(0).all()
    keys = [SampleKey(0, 1, "a red cat", number) for number in range(400)]
    net.show(keys, 3, rows, target)
    before = float(target.square().mean())
    net.fit(300, 128)
    assert float((net(rows) - target).square().mean()) < 0.1 * before
    again = ValueNet(lr=1e-3, buffer=1000)
    again.load_state_dict(net.state_dict())
    for either in (net, again):
        either.fit(2, 16)
    assert torch.equal(net(rows), again(rows))
    for step in (3, 4):
        net.show(keys, step, rows, target)
    net.fit(1, 16)
    assert len(net.state_dict()["rows"]) == 1000


def test_the_value_network_does_not_depend_on_the_order_that_it_is_shown_things_in() -> None:
    rows, target = torch.randn(12, 136), torch.randn(12)
    keys = [SampleKey(0, 1, "ab"[number % 2], number // 2) for number in range(12)]
    one, other = ValueNet(1e-2, 100), ValueNet(1e-2, 100)
    one.show(keys, 0, rows, target)
    for part in (slice(7, 12), slice(0, 7), slice(3, 5)):
        other.show(keys[part], 0, rows[part], target[part])
    for net in (one, other):
        net.fit(5, 8)
    assert torch.equal(one(rows), other(rows)) and not one(rows).eq(0).any()


def test_dpok_with_a_value_network_does_not_depend_on_the_micro_batch() -> None:
    weights = []
    for size in (2, 16):
        sampler = chains.sampler("diffusion")
        trainer = Trainer(
            policy=sampler.policy, sampler=sampler, algorithm=build_algorithm("dpok", baseline="value", value_lr=1e-2),
            reward=FunctionReward("r", lambda images, p: chains.logits(images).mean(1), True), prompts=["a", "b"],
            epochs=4, prompts_per_epoch=2, samples_per_prompt=8, updates_per_epoch=1, micro_batch=size,
        )  # fmt: skip
        list(trainer)
        weights.append(trainer.policy.parameters()[0].detach().clone())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def test_value_features_tell_words_levels_and_pictures_apart() -> None:
    x = torch.randn(2, 4, 6)
    a = features(x, 0.5, ["red cat", "blue cat"])
    assert a.shape == features(torch.randn(2, 40, 40, 40), 0.1, ["", "a"]).shape
    assert not torch.equal(a[:1, 64:], a[1:, 64:]) and not torch.equal(features(x, 0.4, ["red cat"] * 2), a)


def test_dpok_measures_from_the_value_network_and_resumes() -> None:
    def make() -> Trainer:
        sampler = chains.sampler("diffusion")
        return Trainer(
            policy=sampler.policy, sampler=sampler, algorithm=build_algorithm("dpok", baseline="value", value_lr=1e-2),
            reward=FunctionReward("r", lambda images, p: chains.logits(images).mean(1), True), prompts=["a", "b"],
            epochs=3, prompts_per_epoch=2, samples_per_prompt=8, updates_per_epoch=2, micro_batch=8,
        )  # fmt: skip

    whole, first, second = make(), make(), make()
    records = list(whole)
    assert "value_error" in records[0].values and records[0]["value_error"] > 0
    next(iter(first))
    second.load_state_dict(first.state_dict())
    list(second)
    assert torch.equal(whole.policy.parameters()[0], second.policy.parameters()[0])


def test_dpok_subtracts_what_a_prompt_usually_gets() -> None:
    dpok = build_algorithm("dpok")
    first = dpok.prepare(PROMPTS, RewardOutput(REWARDS)).values["advantage"]
    torch.testing.assert_close(first, torch.tensor([-2.0, -1.0, 3.0, -0.5, 0.5]))
    second = dpok.prepare(["a"], RewardOutput(torch.tensor([3.0]))).values["advantage"]
    assert float(second[0]) == pytest.approx(0.0, abs=1e-6)  # the mean of 1, 2, 6 and 3
    again = build_algorithm("dpok")
    again.load_state_dict(dpok.state_dict())
    assert again.state_dict() == dpok.state_dict()
    once = build_algorithm("dpok").prepare(["x", "y", "z"], RewardOutput(torch.tensor([1.0, 5.0, -3.0])))
    torch.testing.assert_close(once.values["advantage"], torch.tensor([0.0, 4.0, -4.0]))
    plain = build_algorithm("dpok", baseline="none").prepare(PROMPTS, RewardOutput(REWARDS)).values["advantage"]
    torch.testing.assert_close(plain, REWARDS)


@pytest.mark.parametrize("name", ["grpo", "d3po", "diffusion_dpo", "rdp", "kto", "nft", "awm"])
def test_single_samples_are_refused_with_the_reason(name: str) -> None:
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    with pytest.raises(UserError, match="within a prompt's samples, and samples_per_prompt is 1; set train"):
        build_algorithm(name).check(chains.sampler("flow"), reward, Plan(8, 1, 1))
