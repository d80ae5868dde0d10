"""RWR and RAFT: weights, quantiles, the best of K, and what they converge to on Gaussians."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from difftune.advantage import above_quantile, best_of_groups, exponential_weights
from difftune.algorithm import Plan, build_algorithm
from difftune.algorithms.raft import RAFT, best_of_kl
from difftune.algorithms.rwr import weighted_error
from difftune.policy import LoraConfig, Policy
from difftune.reward import FunctionReward
from difftune.sampler import Sampler
from difftune.types import RewardOutput, UserError

GENERATOR = torch.Generator().manual_seed(0)
DATA = 0.3 + 0.7 * torch.randn(400_000, generator=GENERATOR, dtype=torch.float64)


def test_the_weighted_mean_of_a_gaussian_is_the_tilted_ones() -> None:
    """C30: N(0.3, 0.49) tilted by exp(0.6 x) has mean 0.3 + 0.6 * 0.49."""
    weight = exponential_weights(DATA, 0.6).double()
    assert float((weight * DATA).mean()) == pytest.approx(0.594, abs=4e-3)


def test_sparse_weights_keep_the_upper_tail() -> None:
    """C32: the mean above the 90 % quantile is mu + s phi(z) / 0.1."""
    kept = above_quantile(DATA[:200_000], 0.9) > 0
    assert float(DATA[:200_000][kept].mean()) == pytest.approx(1.528488, abs=6e-3)
    assert int(kept.sum()) == 20_000


def test_softmax_weights_have_mean_one_and_know_no_offset() -> None:
    """C33: they add up to N; a constant changes nothing; beta multiplies the reward."""
    rewards = torch.tensor([0.0, 1.0, 3.0, -2.0])
    weight = exponential_weights(rewards, 0.2)
    assert float(weight.sum()) == pytest.approx(4, abs=1e-6)
    torch.testing.assert_close(exponential_weights(rewards + 50, 0.2), weight, atol=1e-5, rtol=0)
    assert float(weight[1] / weight[0]) == pytest.approx(math.exp(0.2), abs=1e-6)
    by_prompt = exponential_weights(rewards, 0.2, ["a", "a", "b", "b"])
    assert float(by_prompt[:2].sum()) == pytest.approx(2, abs=1e-6)


def test_rwrs_beta_multiplies_the_reward() -> None:
    """C33, through the algorithm."""
    weight = build_algorithm("rwr", beta=0.2).prepare(["a"] * 3, RewardOutput(torch.tensor([0.0, 1.0, 3.0])))
    got = weight.values["weight"]
    assert float(got[1] / got[0]) == pytest.approx(math.exp(0.2), abs=1e-6) and float(got.sum()) == pytest.approx(3)


def test_plain_exponential_weights_scale_with_the_offset() -> None:
    """C50: adding c to all rewards multiplies Flow-RWR's loss by e^c and leaves its minimiser."""
    rwr = build_algorithm("rwr", weights="exp", beta=1.0)
    rewards = torch.tensor([0.1, -0.4, 0.7])
    a, b = (rwr.prepare(["p"] * 3, RewardOutput(rewards + c)).values["weight"] for c in (0.0, 2.0))
    torch.testing.assert_close(b, a * math.exp(2.0), atol=1e-5, rtol=1e-6)
    error = torch.tensor([1.0, 2.0, 3.0])
    loss = weighted_error(error, b).mean() / weighted_error(error, a).mean()
    assert float(loss) == pytest.approx(math.exp(2.0), rel=1e-6)


@pytest.mark.parametrize(("count", "mean"), [(2, 0.564190), (4, 1.029375), (8, 1.423600)])
def test_the_best_of_k_normals(count: int, mean: float) -> None:
    """C34."""
    draws = torch.randn(12_000, count, generator=torch.Generator().manual_seed(count))
    prompts = [str(i) for i in range(len(draws)) for _ in range(count)]
    best = draws.flatten()[best_of_groups(draws.flatten(), prompts)]
    assert len(best) == len(draws)
    assert float(best.mean()) == pytest.approx(mean, abs=4 * float(best.std()) / len(best) ** 0.5)


def test_the_kl_of_the_best_of_k() -> None:
    """C35."""
    assert best_of_kl(2) == pytest.approx(0.193147, abs=1e-6)
    assert best_of_kl(8) == pytest.approx(1.204442, abs=1e-6)
    assert best_of_kl(1) == 0


def test_raft_keeps_the_best_and_skips_prompts_without_one() -> None:
    raft = build_algorithm("raft")
    rewards = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 7.0])
    prepared = raft.prepare(["a", "a", "a", "b", "b", "c"], RewardOutput(rewards))
    assert prepared.units == [[1]]  # b's samples are equal, c has only one
    assert best_of_groups(rewards, ["a"] * 6, keep=2) == [5, 3]


def test_raft_refuses_to_choose_from_too_few() -> None:
    sampler = Sampler(Policy(tiny.sd_pipeline(), LoraConfig(rank=2)), steps=2)
    reward = FunctionReward("r", lambda images, prompts: images.flatten(1).mean(1), True)
    with pytest.raises(UserError, match="chooses the best within a prompt's samples, and samples_per_prompt is 1"):
        RAFT(RAFT.Config()).check(sampler, reward, Plan(4, 1, 1))
    with pytest.raises(UserError, match="algorithm.keep: got 4, expected fewer than the 4"):
        RAFT(RAFT.Config(keep=4)).check(sampler, reward, Plan(4, 4, 1))


def test_a_reward_that_many_share_keeps_these_and_no_others() -> None:
    """More samples are right than the quantile leaves: the wrong ones are not trained on for that."""
    assert above_quantile(torch.tensor([1.0] * 3 + [0.0] * 7), 0.9).tolist() == [1.0] * 3 + [0.0] * 7
    mixed = torch.tensor([1.0] * 15 + [0.5] * 80 + [0.0] * 5)
    assert above_quantile(mixed, 0.9).tolist() == [1.0] * 15 + [0.0] * 85


def test_equal_rewards_keep_everything_in_the_sparse_variant() -> None:
    assert above_quantile(torch.ones(5), 0.9).eq(1).all()
    rwr = build_algorithm("rwr", weights="sparse", quantile=0.5)
    assert rwr.prepare(["a"] * 4, RewardOutput(torch.tensor([1.0, 4.0, 2.0, 3.0]))).units == [[1], [3]]
