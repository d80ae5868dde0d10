"""DiffusionNFT and AWM: implicit policies, their identity, the old policy, distances that give an optimum."""

from __future__ import annotations

from typing import Any

import chains
import pytest
import torch

from difftune.algorithm import Batch, Context, Endpoints, Point, SampleConfig, build_algorithm, draw_times, is_flow
from difftune.algorithms import awm, nft
from difftune.reward import FunctionReward
from difftune.trainer import Trainer
from difftune.transition import Level
from difftune.types import RewardOutput


def test_the_mixtures_are_symmetric_about_the_old_policy() -> None:
    """v+ and v- lie at equal distances from the old prediction, beta times the new one's; at beta = 1 v+ is the new."""
    predicted, old = torch.randn(2, 3, 5, dtype=torch.float64)
    positive, negative = nft.mixtures(predicted, old, 0.3)
    torch.testing.assert_close((positive + negative) / 2, old, atol=1e-12, rtol=0)
    torch.testing.assert_close(positive - old, 0.3 * (predicted - old), atol=1e-12, rtol=0)
    torch.testing.assert_close(nft.mixtures(predicted, old, 1.0)[0], predicted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_on_policy_nft_is_awm_with_advantage_2r_minus_1(beta: float) -> None:
    """C92: at theta = old the gradients agree, in the space of x0, without self-normalisation."""
    old, x0 = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    predicted = old.clone().requires_grad_()
    (a,) = torch.autograd.grad(nft.contrastive_loss(predicted, old, x0, r, beta, False).sum(), predicted)
    error = (predicted - x0).square().flatten(1).mean(1)
    surrogate = awm.surrogate_log_prob(error, 0.7, "uniform")
    ratio = (surrogate - surrogate.detach()).exp()
    (b,) = torch.autograd.grad((-(2 * r - 1) * ratio).sum(), predicted)
    torch.testing.assert_close(a, b, atol=1e-8, rtol=0)


def test_the_optimum_moves_by_two_over_beta_times_the_preference() -> None:
    """For one sample and no normalisation: minimising over the prediction gives old + (2 r - 1) (x0 - old) / beta."""
    old, x0 = torch.randn(2, 1, 5, dtype=torch.float64)
    r, beta = torch.tensor([0.8], dtype=torch.float64), 0.5
    predicted = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([predicted], lr=1, max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nft.contrastive_loss(predicted, old, x0, r, beta, False).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(predicted.detach(), old + 0.6 * (x0 - old) / beta, atol=1e-8, rtol=0)


def test_optimality_is_in_the_unit_interval() -> None:
    advantage = torch.tensor([-9.0, -5.0, 0.0, 2.5, 9.0])
    assert nft.optimality(advantage, 5.0).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.75, 1.0])
    equal = build_algorithm("nft").prepare(["a"] * 3, RewardOutput(torch.full((3,), 2.0)))
    assert equal.values["optimality"].eq(0.5).all()


def test_self_normalisation_divides_by_a_constant() -> None:
    predicted = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x0 = torch.randn(3, 4, dtype=torch.float64)
    r = torch.ones(3, dtype=torch.float64)
    (a,) = torch.autograd.grad(nft.contrastive_loss(predicted, predicted.detach(), x0, r, 1.0).sum(), predicted)
    (b,) = torch.autograd.grad(nft.contrastive_loss(predicted, predicted.detach(), x0, r, 1.0, False).sum(), predicted)
    scale = (predicted.detach() - x0).abs().mean(1, keepdim=True)
    torch.testing.assert_close(a * scale, b, atol=1e-12, rtol=1e-10)
    exact = x0.clone().requires_grad_()
    assert torch.isfinite(nft.contrastive_loss(exact, exact, x0, r, 1.0)).all()  # the floor of 1e-5


@pytest.mark.parametrize("weighting", ["ghuber", "uniform", "t", "t2"])
def test_surrogates_fall_with_the_error(weighting: str) -> None:
    error = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    values = awm.surrogate_log_prob(error, 0.5, weighting)
    assert float(values[0]) == pytest.approx(0, abs=1e-12) and bool((values.diff() < 0).all())
    if weighting == "ghuber":
        assert float(values[1]) == pytest.approx(-(((0.5 + 1e-10) ** 0.25 - 1e-10**0.25) * 0.5 / 0.25), abs=1e-12)
    else:
        assert float(values[1]) == pytest.approx(-0.5 * {"uniform": 1, "t": 0.5, "t2": 0.25}[weighting], abs=1e-12)


SIZES = {"epochs": 2, "prompts_per_epoch": 2, "samples_per_prompt": 4, "updates_per_epoch": 2, "micro_batch": 8}


def trainer(name: str, **settings: Any) -> Trainer:
    sampler = chains.sampler("flow")
    return Trainer(
        policy=sampler.policy, sampler=sampler,
        algorithm=build_algorithm(name, lr=0.05, **settings.pop("algorithm", {})),
        reward=FunctionReward("r", lambda images, p: chains.logits(images).mean(1), True),
        prompts=["a", "b"],
        **{**SIZES, **settings},
    )  # fmt: skip


def test_the_old_policy_samples_and_follows_after_the_epoch() -> None:
    run = trainer("nft", algorithm={"decay_slope": 0.1, "decay_max": 0.15})
    start = run.policy.parameters()[0].detach().clone()
    drawn: list[torch.Tensor] = []
    rollout = run.sampler.rollout

    def watched(*args: Any, **kwargs: Any) -> Any:
        drawn.append(run.policy.parameters()[0].detach().clone())
        return rollout(*args, **kwargs)

    run.sampler.rollout = watched  # type: ignore[method-assign]
    steps = iter(run)
    first = next(steps)
    assert first["old_distance"] >= 0 and run.parity is not None and run.parity["max_ratio_error"] == 0
    after = run.policy.parameters()[0].detach().clone()
    next(steps)
    torch.testing.assert_close(drawn[0], start)
    # Two steps have been taken: the decay is min(0.1 * 2, 0.15).
    torch.testing.assert_close(drawn[1], 0.15 * start + 0.85 * after)


def test_awms_ratio_is_one_on_the_first_update_of_every_epoch() -> None:
    run = trainer("awm")
    records = list(run)
    assert records[0]["ratio"] == pytest.approx(1, abs=0.3)
    seen: list[float] = []
    algorithm: Any = run.algorithm
    point_loss = algorithm.point_loss

    def watched(point: Any, batch: Any) -> Any:
        loss, stats = point_loss(point, batch)
        seen.append(float((stats["ratio"] - 1).abs().max()))
        return loss, stats

    algorithm.point_loss = watched
    run.epoch, run.config = 1, run.config.model_copy(update={"epochs": 2})
    next(iter(run))
    assert seen[: run.algorithm.config.timesteps] == [0.0] * run.algorithm.config.timesteps
    assert max(seen) > 0


def test_negative_advantages_are_held_by_the_distances() -> None:
    run = trainer("awm", algorithm={"kl_weight": 0.5, "ema_weight": 0.5})
    metrics = list(run)[-1]
    assert metrics["reference_distance"] > 0 and metrics["ema_distance"] >= 0
    bare = trainer("awm", algorithm={"kl_weight": 0.0, "ema_weight": 0.0})
    assert "reference_distance" not in list(bare)[-1].values


def test_noise_levels_are_stratified_and_within_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        times = draw_times(4, (0.2, 0.6), "uniform", generator)
        assert [int((t - 0.2) / 0.1) for t in times] == [0, 1, 2, 3]
    normal = torch.tensor([draw_times(8, (0.0, 1.0), "logit_normal", generator) for _ in range(300)]).flatten()
    assert 0 < float(normal.min()) and float(normal.max()) < 1
    assert float(torch.logit(normal).mean()) == pytest.approx(0, abs=0.05)
    assert float(torch.logit(normal).std()) == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match=r"timestep_range\n.*got \(0.5, 0.5\)"):
        SampleConfig(timestep_range=(0.5, 0.5))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.5, 1.0)])
def test_noise_levels_may_be_those_of_the_samplers_own_steps(bounds: tuple[float, float]) -> None:
    """As many different ones as there are steps to choose from; the noisy half is the first half of the steps."""
    sampler = chains.sampler("flow", steps=6)
    count = 6 if bounds[0] == 0 else 3
    algorithm = build_algorithm("raft", timesteps=count, timestep_sampling="sampler", timestep_range=bounds)
    traj = sampler.rollout(["a"] * 2)
    seen: list[float] = []
    original = algorithm.point_loss  # type: ignore[attr-defined]

    def watched(point: Point, batch: Batch) -> Any:
        seen.append(point.timestep)
        return original(point, batch)

    algorithm.point_loss = watched  # type: ignore[attr-defined]
    values = {"reward": torch.ones(2)}
    batch = Batch(traj.prompts, traj.keys, values, traj, metadata=[{}] * 2)
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    algorithm.accumulate(batch, Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0))
    assert sorted(seen, reverse=True) == pytest.approx(traj.times[:count].tolist())
    seen.clear()
    algorithm.config.timesteps = 20  # more than there are: each once
    algorithm.accumulate(batch, Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0))
    assert sorted(seen, reverse=True) == pytest.approx(traj.times[:count].tolist())


def test_flow_models_are_told_from_diffusion_models() -> None:
    assert is_flow(chains.sampler("flow")) and not is_flow(chains.sampler("diffusion"))


@pytest.mark.parametrize("name", ["rwr", "diffusion_dpo", "nft", "awm", "kto"])
def test_cutting_into_micro_batches_changes_nothing(name: str) -> None:
    results = []
    for micro in (4, 8):
        run = trainer(name, micro_batch=micro)
        list(run)
        results.append(run.policy.parameters()[0].detach())
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=0)


# -- whole losses, term by term ----------------------------------------------------------------------------------

#: Rewards of two samples of either of two prompts, and their advantages: from the mean of the prompt, by the
#: population's std of all of them, to which 1e-4 is added.
PAIRS = ("a", "a", "b", "b")
REWARDS = torch.tensor([1.0, 4.0, 2.0, 0.5])
ADVANTAGES = ((REWARDS - torch.tensor([2.5, 2.5, 1.25, 1.25])) / (REWARDS.std(correction=0) + 1e-4)).double()


def velocities(*names: str) -> tuple[torch.Tensor, Endpoints, Any]:
    """A velocity with its graph, the truth, and the point at time 0.4 where adapters ``names`` have others."""
    t = 0.4
    generator = torch.Generator().manual_seed(5)
    x0, noise, predicted, *others = torch.randn(3 + len(names), 4, 6, dtype=torch.float64, generator=generator)
    predicted.requires_grad_()
    x_t = (1 - t) * x0 + t * noise

    def on_path(v: torch.Tensor) -> Endpoints:
        return Endpoints(x_t - t * v, x_t + (1 - t) * v)

    found = {name: on_path(v) for name, v in zip(names, others, strict=True)}
    truth = Endpoints(x0, noise)
    return predicted, truth, Point(1000 * t, Level.flow(t), "velocity", truth, on_path(predicted), found)


def loss_at(algorithm: Any, point: Point) -> torch.Tensor:
    """The losses of four samples with :data:`REWARDS`."""
    values = algorithm.prepare(PAIRS, RewardOutput(REWARDS)).values
    return algorithm.point_loss(point, Batch(PAIRS, (), values, units=[[i] for i in range(4)]))[0]


def assert_same(loss: torch.Tensor, expected: torch.Tensor, predicted: torch.Tensor) -> None:
    """Losses and their gradients by the prediction agree."""
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    (got,) = torch.autograd.grad(loss.sum(), predicted, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), predicted, retain_graph=True)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("clip", "beta", "kl_weight"), [(5.0, 1.0, 0.3), (0.8, 0.2, 0.0), (2.0, 0.5, 2.0)])
def test_nfts_loss_is_its_expansion(clip: float, beta: float, kl_weight: float) -> None:
    """(c / beta) (|o - x0|^2 + beta^2 |p - o|^2 + 2 beta (2r - 1) (p - o)(o - x0)) + lambda |v - v_ref|^2.

    p and o are the new and the old prediction of x0, 2r - 1 is the advantage by its clip c, within plus and minus 1.
    """
    nft_: Any = build_algorithm("nft", advantage_clip=clip, beta=beta, kl_weight=kl_weight, self_normalize=False)
    predicted, truth, point = velocities("old", "reference")
    new, old, base = point.predicted, point.others["old"], point.others["reference"]
    preference = (ADVANTAGES / clip).clamp(-1, 1)[:, None]
    step, gap = new.x0 - old.x0, old.x0 - truth.x0
    inner = gap.square() + (beta * step).square() + 2 * beta * preference * step * gap
    expected = (clip / beta * inner + kl_weight * (predicted - base.velocity).square()).mean(1)
    assert_same(loss_at(nft_, point), expected, predicted)


@pytest.mark.parametrize("distances", [(0.0, 0.0), (0.7, 0.0), (0.0, 1.3), (0.7, 1.3)])
def test_awms_loss_is_the_ratio_and_two_distances(distances: tuple[float, float]) -> None:
    """-A exp(m_old - m) + lambda_ref |v - v_ref|^2 + lambda_ema |v - v_ema|^2: both distances hold the policy back."""
    kl_weight, ema_weight = distances
    awm_: Any = build_algorithm(
        "awm", weighting="uniform", advantage_clip=0.8, clip_range=1e3, kl_weight=kl_weight, ema_weight=ema_weight
    )
    predicted, truth, point = velocities("rollout", "reference", "ema")
    error = (predicted - truth.velocity).square().mean(1)
    old_error = (point.others["rollout"].velocity - truth.velocity).square().mean(1)
    expected = -(ADVANTAGES.clamp(-0.8, 0.8) / 0.8) * (old_error - error).exp()
    for name, weight in (("reference", kl_weight), ("ema", ema_weight)):
        expected = expected + weight * (predicted - point.others[name].velocity).square().mean(1)
    assert_same(loss_at(awm_, point), expected, predicted)


def test_awms_std_is_the_epochs_or_the_groups() -> None:
    for global_std, stds in ((True, REWARDS.std(correction=0)), (False, torch.tensor([1.5, 1.5, 0.75, 0.75]))):
        got = build_algorithm("awm", global_std=global_std).prepare(PAIRS, RewardOutput(REWARDS)).values["advantage"]
        expected = torch.tensor([-1.5, 1.5, 0.75, -0.75]) / (stds + 1e-4) / 5.0
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
