"""DiffusionNFT and AWM: implicit policies, their identity, the old policy, distances that give an optimum."""

from __future__ import annotations

from typing import Any

import chains
import pytest
import torch

from difftune.algorithm import SampleConfig, build_algorithm, draw_times, is_flow
from difftune.algorithms import awm, nft
from difftune.reward import FunctionReward
from difftune.trainer import Trainer
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
    with pytest.raises(ValueError, match="timestep_range: got"):
        SampleConfig(timestep_range=(0.5, 0.5))


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
