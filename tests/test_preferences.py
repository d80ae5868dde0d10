"""Pairs, D3PO, Diffusion-DPO and Flow-DPO, Diffusion-KTO: labels, identities at the reference, optima."""

from __future__ import annotations

import math
from typing import Any

import chains
import numpy as np
import pytest
import torch

from difftune.advantage import Pairs, pairs_of, preference_units
from difftune.algorithm import Batch, Endpoints, Point, build_algorithm, squared_error
from difftune.algorithms import d3po, diffusion_dpo, kto, seppo
from difftune.transition import Level
from difftune.types import RewardOutput

LN2 = math.log(2)
PROMPTS = ["a", "a", "a", "b", "b", "c"]
REWARDS = torch.tensor([1.0, 3.0, 2.0, 4.0, 4.0, 9.0])


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- pairs -------------------------------------------------------------------------------------------------------


def test_units_are_the_best_and_worst_or_the_whole_prompt() -> None:
    assert preference_units(REWARDS, PROMPTS) == [[1, 0]]  # b is tied, c is alone
    assert preference_units(REWARDS, PROMPTS, "all") == [[0, 1, 2]]
    assert preference_units(REWARDS, PROMPTS, margin=2.0) == []


def test_pairs_are_ordered_and_every_sample_counts_the_same() -> None:
    pairs = pairs_of(REWARDS, [[0, 1, 2], [3, 4], [5, 3]])
    assert list(zip(pairs.winners.tolist(), pairs.losers.tolist(), strict=True)) == [(1, 0), (2, 0), (1, 2), (5, 3)]
    # Three pairs share the first unit's three samples, the second unit has none, the third has one for two samples.
    torch.testing.assert_close(pairs.weights * 7 / 4, torch.tensor([1.0, 1.0, 1.0, 2.0]))
    tied = pairs_of(REWARDS, [[3, 4]], ties=True)
    assert len(tied) == 1 and tied.weights.tolist() == [1.0]
    assert len(pairs_of(REWARDS, [[0, 1, 2]], margin=1.0)) == 1


def test_pairs_follow_the_samples_when_the_batch_is_permuted() -> None:
    order = [2, 0, 1]
    a, b = pairs_of(REWARDS[:3], [[0, 1, 2]]), pairs_of(REWARDS[order], [[0, 1, 2]])
    names = {(order[w], order[x]) for w, x in zip(b.winners.tolist(), b.losers.tolist(), strict=True)}
    assert names == set(zip(a.winners.tolist(), a.losers.tolist(), strict=True))


# -- D3PO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_ratio", "slope"), [(0.0, -0.05), (0.2, 0.0), (-0.2, 0.0)])
def test_d3pos_gradient_ends_at_the_clamp(log_ratio: float, slope: float) -> None:
    """C43: -beta / 2 at the reference, exactly 0 beyond 1 +- 0.1."""
    winner = double(log_ratio).requires_grad_()
    loss = d3po.preference_loss(winner, double(0.0), 0.1, 0.1)
    loss.sum().backward()
    assert winner.grad is not None
    assert float(winner.grad) == pytest.approx(slope, abs=1e-6)


def test_a_tie_costs_ln_2_and_pulls_nowhere() -> None:
    """C43 with c = 0, whatever the ratio is: the logit is 0. The algorithm leaves ties out, and that constant."""
    log_ratio = double(-0.09, 0.0, 0.05, 0.2).requires_grad_()
    loss = d3po.preference_loss(0 * log_ratio, 0 * log_ratio, 0.1, 0.1)
    torch.testing.assert_close(loss, torch.full_like(loss, LN2), atol=1e-12, rtol=0)
    same = d3po.preference_loss(log_ratio, log_ratio, 0.1, 0.1)
    torch.testing.assert_close(same, torch.full_like(same, LN2), atol=1e-12, rtol=0)
    (loss + same).sum().backward()
    assert log_ratio.grad is not None and log_ratio.grad.eq(0).all()
    tied = pairs_of(torch.tensor([2.0, 5.0, 5.0]), [[0, 1, 2]])
    algorithm: Any = build_algorithm("d3po")
    found = double(0.01, 0.02, 0.03).requires_grad_()
    algorithm.pair_loss(found, tied)[0].mean().backward()
    # The winners are the tied two, each against the loser: -beta / 2 at most, and nothing between them.
    assert found.grad is not None and list(zip(tied.winners, tied.losers, strict=True)) == [(1, 0), (2, 0)]
    assert float(found.grad.sum()) == pytest.approx(0, abs=1e-12) and bool((found.grad[1:] < 0).all())


def test_both_preference_losses_are_ln_2_at_the_reference() -> None:
    """C47."""
    zero = double(0.0)
    assert float(d3po.preference_loss(zero, zero, 0.1, 0.1)) == pytest.approx(LN2, abs=1e-12)
    assert float(diffusion_dpo.preference_loss(zero, zero, 5000.0)) == pytest.approx(LN2, abs=1e-12)


@pytest.mark.parametrize("name", ["d3po", "diffusion_dpo"])
@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_the_first_update_costs_ln_2(name: str, chain: str, pairs: str) -> None:
    """C47 through the trainer, for any number of pairs and any cut into micro-batches."""
    from difftune.reward import FunctionReward
    from difftune.trainer import Trainer

    sampler = chains.sampler(chain)
    trainer = Trainer(
        policy=sampler.policy, sampler=sampler, algorithm=build_algorithm(name, pairs=pairs),
        reward=FunctionReward("mean", lambda images, prompts: images.flatten(1).mean(1), True),
        prompts=["a", "b"], epochs=1, prompts_per_epoch=2, samples_per_prompt=5, updates_per_epoch=1, micro_batch=5,
    )  # fmt: skip
    metrics = next(iter(trainer))
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-5)


def test_d3po_takes_the_ratio_to_the_base_model_not_to_the_sampling_one() -> None:
    sampler = chains.sampler("diffusion")
    sampler.policy.parameters()[0].data += 0.1  # away from the reference, and sampled like that
    traj = sampler.rollout(["a"] * 2)
    algorithm: Any = build_algorithm("d3po")
    with sampler.policy.reference():
        base = sampler.transitions(traj)
    seen = []

    def look(view: Any) -> None:
        log_ratio = view.log_prob - base[view.index].log_prob(traj.step_out(view.index))
        pair = Pairs(torch.tensor([0]), torch.tensor([1]), torch.ones(1))
        loss, stats = algorithm.pair_loss(log_ratio, pair)
        seen.append(float(log_ratio.detach().abs().max()))
        expected = -torch.nn.functional.logsigmoid(
            0.1 * (log_ratio.exp().clamp(0.9, 1.1).log()[0] - log_ratio.exp().clamp(0.9, 1.1).log()[1])
        )
        torch.testing.assert_close(loss[0], expected)
        assert float(stats["implicit_accuracy"]) == float(log_ratio[0] > log_ratio[1])

    sampler.replay(traj, look)
    assert max(seen) > 1e-3


# -- Diffusion-DPO -----------------------------------------------------------------------------------------------


def test_dpos_optimum_is_the_tilted_distribution() -> None:
    """C44: three atoms, pairs uniform, labels by Bradley and Terry: p* = p_ref e^{r / beta} / Z."""
    reference, rewards, beta = double(0.2, 0.5, 0.3), double(0.4, -0.3, 1.1), 0.5
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    i, j = torch.tensor([(a, b) for a in range(3) for b in range(3) if a != b]).T
    chance = torch.sigmoid(rewards[i] - rewards[j])
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=400, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        log_ratio = torch.log_softmax(logits, 0) - reference.log()
        # The loss takes errors, which are minus log-ratios, and halves beta.
        losses = diffusion_dpo.preference_loss(-2 * log_ratio[i], -2 * log_ratio[j], beta)
        (chance * losses).sum().backward()
        return (chance * losses).sum()

    for _ in range(5):
        optimizer.step(closure)
    tilted = reference * torch.exp(rewards / beta)
    torch.testing.assert_close(torch.softmax(logits, 0).detach(), tilted / tilted.sum(), atol=1e-6, rtol=0)


def test_exchanging_winner_and_loser_complements_the_probability() -> None:
    """C46."""
    winner, loser = double(0.3, -1.0), double(-0.2, 0.5)
    a = diffusion_dpo.preference_loss(winner, loser, 2.0)
    b = diffusion_dpo.preference_loss(loser, winner, 2.0)
    torch.testing.assert_close((-a).exp() + (-b).exp(), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0)


def point(t: float, others: dict[str, Endpoints], predicted: Endpoints, truth: Endpoints) -> Point:
    return Point(1000 * t, Level.flow(t), "velocity", truth, predicted, others)


def on_path(x_t: torch.Tensor, v: torch.Tensor, t: float) -> Endpoints:
    return Endpoints(x_t - t * v, x_t + (1 - t) * v)


def test_errors_of_noise_velocity_and_picture_convert() -> None:
    """C03: (1 - t)^2, 1 and t^2."""
    t = 0.3
    x0, noise, v = (torch.randn(2, 6, dtype=torch.float64) for _ in range(3))
    truth = Endpoints(x0, noise)
    predicted = on_path((1 - t) * x0 + t * noise, v, t)
    base = squared_error(predicted, truth, "velocity")
    torch.testing.assert_close(squared_error(predicted, truth, "noise"), (1 - t) ** 2 * base, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(squared_error(predicted, truth, "x0"), t**2 * base, atol=1e-12, rtol=1e-12)


def test_the_derived_schedule_is_diffusion_dpo_on_the_noise() -> None:
    """C49."""
    t = 0.4
    x0, noise, v, w = (torch.randn(2, 6, dtype=torch.float64) for _ in range(4))
    x_t = (1 - t) * x0 + t * noise
    here = point(t, {"reference": on_path(x_t, w, t)}, on_path(x_t, v, t), Endpoints(x0, noise))
    derived: Any = build_algorithm("diffusion_dpo", beta=7.0, schedule="derived")
    delta_v = here.error() - here.error("reference")
    delta_e = here.error(space="noise") - here.error("reference", "noise")
    a = diffusion_dpo.preference_loss(delta_v[:1], delta_v[1:], derived.beta_at(here))
    b = diffusion_dpo.preference_loss(delta_e[:1], delta_e[1:], 7.0)
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    constant: Any = build_algorithm("diffusion_dpo", beta=7.0)
    assert constant.beta_at(here) == 7.0


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_a_pair_shares_noise_and_level(chain: str) -> None:
    sampler = chains.sampler(chain)
    seen: list[Point] = []
    algorithm: Any = build_algorithm("diffusion_dpo")
    original = algorithm.point_loss

    def watched(point: Point, batch: Any) -> Any:
        seen.append(point)
        return original(point, batch)

    algorithm.point_loss = watched
    accumulate(algorithm, sampler, ["a", "a", "b", "b"], [[0, 1], [2, 3]])
    assert len(seen) == 4
    for one in seen:
        assert torch.equal(one.truth.noise[0], one.truth.noise[1])
        assert not torch.equal(one.truth.noise[0], one.truth.noise[2])
    assert not torch.equal(seen[0].truth.noise, seen[1].truth.noise)
    assert len({p.timestep for p in seen}) == 4


def accumulate(algorithm: Any, sampler: Any, prompts: list[str], units: list[list[int]]) -> dict[str, float]:
    """One micro-batch without a trainer; rewards are 3, 2, 1, ..."""
    from difftune.algorithm import Context
    from difftune.reward import FunctionReward

    traj = sampler.rollout(prompts)
    rewards = torch.arange(len(prompts), 0, -1).float()
    values = dict(algorithm.prepare(prompts, RewardOutput(rewards)).values)
    batch = Batch(tuple(prompts), traj.keys, values, traj, units=units, metadata=[{}] * len(prompts))
    reward = FunctionReward("r", lambda images, p: chains.logits(images).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator().manual_seed(3), 1, 0)
    return algorithm.accumulate(batch, context)


# -- KTO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [1.0, -1.0])
def test_ktos_utility_at_the_reference(label: float) -> None:
    """C57: half, with slope -+ beta / 4; falling for desirable, rising for undesirable samples."""
    gain = double(0.0).requires_grad_()
    loss = kto.utility_loss(gain, double(label), double(0.0), 3.0)
    loss.sum().backward()
    assert gain.grad is not None
    assert float(loss.detach()) == pytest.approx(0.5, abs=1e-12)
    assert float(gain.grad) == pytest.approx(-label * 3.0 / 4, abs=1e-12)


def test_ktos_baseline_is_constant_and_not_negative() -> None:
    gain = double(0.2, 0.4, -1.0, -2.0).requires_grad_()
    baseline = kto.unit_means(gain, [[0, 1], [2, 3]]).clamp(min=0)
    torch.testing.assert_close(baseline.detach(), double(0.3, 0.3, 0.0, 0.0))
    kto.utility_loss(gain, torch.ones(4, dtype=torch.float64), baseline, 1.0)[0].backward()
    assert gain.grad is not None
    assert gain.grad[1] == 0  # a baseline with a graph would reach the other sample


@pytest.mark.parametrize("mean_gain", [-0.4, 0.3])
def test_ktos_loss_measures_gains_from_what_is_gained_on_the_whole(mean_gain: float) -> None:
    """w (1 - sigmoid(+-beta (g - z))) with z = max(0, the mean gain): where the policy has lost, z is 0."""
    beta, t = 3.0, 0.4
    gains = double(-0.3, 0.1, 0.4, -0.2) + mean_gain
    assert float(gains.mean()) == pytest.approx(mean_gain)
    x0, noise = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, one = (1 - t) * x0 + t * noise, torch.ones(4, 6, dtype=torch.float64)
    # An error of 1 for the base model, and of 1 - gain for the policy.
    offset = (1 - gains).sqrt().requires_grad_()
    base, predicted = (noise - x0 + one * shift for shift in (1.0, offset[:, None]))
    here = point(t, {"reference": on_path(x_t, base, t)}, on_path(x_t, predicted, t), Endpoints(x0, noise))
    judge: Any = build_algorithm("kto", beta=beta, desirable_weight=2.0, undesirable_weight=0.5)
    prompts = ("a",) * 4
    prepared = judge.prepare(prompts, RewardOutput(torch.tensor([0.0, 3.0, 1.0, 4.0])))
    loss, stats = judge.point_loss(here, Batch(prompts, (), prepared.values, units=prepared.units))
    sign, weight = double(-1.0, 1.0, -1.0, 1.0), double(0.5, 2.0, 0.5, 2.0)
    expected = weight * (1 - torch.sigmoid(sign * beta * (1 - offset.square() - max(mean_gain, 0.0))))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    assert float(stats["baseline"].mean()) == pytest.approx(max(mean_gain, 0.0), abs=1e-6)
    (got,) = torch.autograd.grad(loss.sum(), offset, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), offset)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_ktos_labels_are_about_the_prompts_mean() -> None:
    prepared = build_algorithm("kto").prepare(PROMPTS, RewardOutput(REWARDS))
    assert prepared.values["label"].tolist() == [-1, 1, 0, 0, 0, 0]
    assert prepared.units == [[0, 1, 2]]


def test_a_threshold_judges_samples_by_themselves() -> None:
    """Labels do not depend on the prompt's other samples, and z is a mean over as many samples as asked for."""
    judge = build_algorithm("kto", threshold=2.0, baseline_samples=2)
    prepared = judge.prepare(PROMPTS, RewardOutput(REWARDS))
    assert prepared.values["label"].tolist() == [-1, 1, 0, 1, 1, 1]
    assert prepared.units == [[0, 1], [3, 4], [5]]


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_ktos_first_update_costs_half_the_weight(chain: str) -> None:
    """C47 for Diffusion-KTO: w / 2 at theta = ref."""
    kto_: Any = build_algorithm("kto", desirable_weight=2.0, undesirable_weight=2.0)
    metrics = accumulate(kto_, chains.sampler(chain), ["a"] * 4, [[0, 1, 2, 3]])
    assert metrics["loss"] == pytest.approx(1.0, abs=1e-5) and metrics["gain"] == pytest.approx(0, abs=1e-6)


# -- SePPO -------------------------------------------------------------------------------------------------------


def test_the_anchor_says_who_fits_the_winner_better() -> None:
    """C54: s = 1 where the policy does, -1 where the reference does, 0 where they are equal."""
    gain = double(0.3, -0.2, 0.0).requires_grad_()
    assert seppo.anchor_sign(gain, "sign").tolist() == [1.0, -1.0, 0.0]
    assert seppo.anchor_sign(gain, "indicator").tolist() == [1.0, 0.0, 0.0]
    assert seppo.anchor_sign(gain, "off").tolist() == [1.0, 1.0, 1.0]
    assert not seppo.anchor_sign(gain, "sign").requires_grad


def test_at_the_reference_only_the_winner_has_a_gradient() -> None:
    """C54 and C47: ln 2, -beta / 4 by the winner's gain and exactly 0 by the reference sample's."""
    winner, sample = double(0.0).requires_grad_(), double(0.0).requires_grad_()
    loss = seppo.semi_policy_loss(winner, sample, seppo.anchor_sign(winner, "sign"), 3.0)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(LN2, abs=1e-12)
    assert winner.grad is not None and sample.grad is not None
    assert float(winner.grad) == pytest.approx(-3.0 / 4, abs=1e-12) and float(sample.grad) == 0


@pytest.mark.parametrize(("s", "direction"), [(1.0, 1.0), (-1.0, -1.0)])
def test_a_reference_sample_is_a_loser_or_another_winner(s: float, direction: float) -> None:
    """C54: with s = 1 the loss is Diffusion-DPO's; with s = -1 the logit is the sum of two winners' terms."""
    winner, sample, beta = double(0.4), double(0.1).requires_grad_(), 2.0
    loss = seppo.semi_policy_loss(winner, sample, double(s), beta)
    expected = -torch.nn.functional.logsigmoid(beta / 2 * (winner - s * sample))
    torch.testing.assert_close(loss, expected)
    if s > 0:
        torch.testing.assert_close(loss, diffusion_dpo.preference_loss(-winner, -sample, beta))
    loss.sum().backward()
    assert sample.grad is not None and float(sample.grad) * direction > 0


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_seppos_first_update_costs_ln_2(chain: str) -> None:
    sampler = chains.sampler(chain)
    algorithm = build_algorithm("seppo")
    algorithm.setup(sampler.policy)
    metrics = accumulate(algorithm, sampler, ["a", "a"], [[0, 1]])
    assert metrics["loss"] == pytest.approx(LN2, abs=1e-6) and metrics["anchor"] == 0


def test_the_reference_is_a_checkpoint_of_the_run() -> None:
    """After n checkpoints it is one of the newest, or the base model; first and latest are what they say."""
    for form, allowed in (("uniform", {0.0, 3.0, 4.0, 5.0}), ("first", {0.0}), ("latest", {5.0})):
        policy = chains.sampler("flow").policy
        algorithm = build_algorithm("seppo", reference=form, checkpoint_every=2, checkpoints=3)
        algorithm.setup(policy)
        found = set()
        for step in range(1, 11):
            policy.parameters()[0].data.fill_(step / 2)
            algorithm.after_step(policy, step)
        for epoch in range(40):
            # The draw is keyed by the step, so other steps draw others; 5 checkpoints exist throughout.
            algorithm.config = algorithm.config.model_copy(update={"checkpoint_every": 2 + epoch})
            algorithm.after_epoch(policy, 5 * (2 + epoch))
            with policy.adapter("anchor"):
                found.add(float(policy.parameters()[0][0]))
        assert found == allowed, (form, found)


def test_d3pos_clamp_holds_ratios_that_no_float_can() -> None:
    winner = double(500.0, -500.0).requires_grad_()
    loss = d3po.preference_loss(winner, double(0.0, 0.0), 0.1, 0.1)
    loss.sum().backward()
    assert winner.grad is not None and winner.grad.eq(0).all() and bool(torch.isfinite(loss).all())
    near = double(-0.09, 0.0, 0.08)
    torch.testing.assert_close(d3po.preference_logit(near, double(0.0, 0.0, 0.0), 0.1, 0.1), 0.1 * near)


# -- units in the trainer ----------------------------------------------------------------------------------------


def trainer(**settings: Any) -> Any:
    from difftune.reward import FunctionReward
    from difftune.trainer import Trainer

    sampler = chains.sampler("flow")
    sizes: dict[str, Any] = {"epochs": 1, "prompts_per_epoch": 3, "samples_per_prompt": 4, "updates_per_epoch": 2}
    return Trainer(
        policy=sampler.policy, sampler=sampler, algorithm=build_algorithm("d3po", pairs="all"),
        reward=settings.pop("reward", FunctionReward("r", lambda images, p: images.flatten(1).mean(1), True)),
        prompts=["a", "b", "c"], **{**sizes, **settings},
    )  # fmt: skip


def test_an_epoch_without_pairs_takes_no_step() -> None:
    from difftune.reward import FunctionReward

    run = trainer(reward=FunctionReward("flat", lambda images, p: torch.ones(len(p)), False))
    metrics = next(iter(run))
    assert run.step == 0 and metrics["reward/std"] == 0 and "loss" not in metrics.values


@pytest.mark.parametrize(("labels", "expected"), [("soft", -0.026796), ("hard", -0.065457)])
def test_d3pos_gradient_on_the_50_step_chain(labels: str, expected: float) -> None:
    """C40: the slope by a step's standardised shift, at the reference, to the digits of the closed forms.

    -2 beta a S kappa E[sigma'(a d)] where the better one wins with probability sigma(a d), d the difference of the
    final numbers; -beta S kappa sqrt(2 / pi) / sd(d) where it always wins. Expectations are by Gauss and Hermite's
    rule: over the step's noise of both samples, of which the log-ratios are functions, and over the rest of d. That the
    chain has this S, kappa and variance is C01's test.
    """
    a, beta, step, count = 0.8, 0.5, 40, 40
    noise_std, kappa = 0.19594121, 0.76604211
    rest = math.sqrt(2 * (0.4186846664 - 0.0157036623**2 - (noise_std * kappa) ** 2))  # of d, with x_T shared
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    z, chance_of = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    sampler = chains.t1()
    traj = sampler.rollout(["a"] * count)
    base = sampler.transitions(traj, [step])[step]
    assert base.std == pytest.approx(noise_std, abs=1e-6)
    traj.states[:, step + 1, 0] = base.mean[:, 0] + base.std * z
    i, j = torch.cartesian_prod(torch.arange(count), torch.arange(count)).T
    gap = noise_std * kappa * (z[i] - z[j])
    if labels == "soft":
        wins = (torch.sigmoid(a * (gap[:, None] + rest * z)) * chance_of).sum(1)
    else:
        wins = torch.special.ndtr(gap / rest)

    def loss_of(view: Any) -> None:
        log_ratio = (view.log_prob - base.log_prob(traj.step_out(step))) * view.dims
        won = d3po.preference_loss(log_ratio[i], log_ratio[j], beta, 0.1)
        lost = d3po.preference_loss(log_ratio[j], log_ratio[i], beta, 0.1)
        (chance_of[i] * chance_of[j] * (wins * won + (1 - wins) * lost)).sum().backward()

    sampler.replay(traj, loss_of, [step])
    # From the shift of the predicted noise to that of the step's mean, in units of its std.
    bars = sampler.policy.pipe.brain.alpha_bars
    bar, below = float(bars[49 - step]), float(bars[48 - step])
    coefficient = math.sqrt(1 - below - base.std**2) - math.sqrt(below * (1 - bar) / bar)
    gradient = sampler.policy.parameters()[0].grad
    assert gradient is not None
    slope = float(gradient[49 - step, 0]) * base.std / coefficient
    assert slope == pytest.approx(expected, abs=2e-6)
