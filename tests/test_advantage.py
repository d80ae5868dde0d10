"""Advantages: sums, invariances, degenerate groups, running statistics."""

from __future__ import annotations

import pytest
import torch

from difftune.advantage import (
    PromptStatistics,
    groups_of,
    normalize_batch,
    normalize_groups,
    pairs_of,
    preference_units,
    signs_in_groups,
)

PROMPTS = ["a", "b", "a", "a", "b", "c"]
REWARDS = torch.tensor([1.0, 5.0, 2.0, 4.0, 7.0, 3.0])


def test_groups_keep_the_order_of_appearance() -> None:
    assert groups_of(PROMPTS) == [[0, 2, 3], [1, 4], [5]]


def test_group_advantages_sum_to_zero_and_have_unit_variance() -> None:
    """C24."""
    advantage = normalize_groups(REWARDS, PROMPTS)
    for group in groups_of(PROMPTS)[:2]:
        assert float(advantage[group].sum()) == pytest.approx(0, abs=1e-6)
        # Population variance (ddof 0), up to the 1e-4 in the divisor.
        assert float(advantage[group].square().mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("normalize", [normalize_batch, lambda r: normalize_groups(r, PROMPTS)])
def test_scale_and_offset_do_not_matter(normalize) -> None:
    torch.testing.assert_close(normalize(3 * REWARDS + 2), normalize(REWARDS), atol=2e-4, rtol=0)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6, 1e-7, -0.1])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
    rewards = torch.full((6,), value)
    assert normalize_batch(rewards).eq(0).all()
    assert normalize_groups(rewards, PROMPTS).eq(0).all()
    assert PromptStatistics(4, 2).update(PROMPTS, rewards).eq(0).all()


def test_jitter_does_not_become_an_advantage_of_one() -> None:
    rewards = 0.5 + 1e-7 * torch.arange(6.0)
    assert float(normalize_batch(rewards).abs().max()) < 1e-2
    assert float(normalize_groups(rewards, PROMPTS).abs().max()) < 1e-2


def test_jitter_makes_no_label_and_no_pair() -> None:
    """Rounding is no preference: a mean that is not hit exactly is hit, and rewards of 0.5 + 1e-7 k are equal."""
    prompts = ["a"] * 3 + ["b"] * 3
    rewards = torch.tensor([0.0, 0.1, 0.2, 0.8, 0.9, 1.0])
    assert signs_in_groups(rewards, prompts).tolist() == [-1, 0, 1, -1, 0, 1]
    jitter = 0.5 + 1e-7 * torch.arange(6)
    assert jitter.unique().numel() > 1 and signs_in_groups(jitter, prompts).eq(0).all()
    for mode in ("best_worst", "all"):
        assert preference_units(jitter, prompts, mode) == []
        assert len(preference_units(rewards, prompts, mode)) == 2
    assert len(pairs_of(jitter, [[0, 1, 2]])) == 0 and len(pairs_of(rewards, [[0, 1, 2]])) == 3


def test_a_group_of_one_gets_zero() -> None:
    assert normalize_groups(REWARDS, PROMPTS)[5] == 0
    assert torch.isfinite(normalize_groups(torch.tensor([3.0]), ["x"])).all()


def test_global_std_divides_by_the_batch() -> None:
    advantage = normalize_groups(REWARDS, PROMPTS, global_std=True)
    expected = (REWARDS[1] - 6.0) / (REWARDS.std(correction=0) + 1e-4)
    assert float(advantage[1]) == pytest.approx(float(expected), abs=1e-6)


def test_integers_and_low_precision_are_cast_first() -> None:
    rewards = torch.tensor([1, 2, 4])
    torch.testing.assert_close(normalize_batch(rewards), normalize_batch(rewards.float()))
    assert normalize_batch(rewards.bfloat16()).dtype == torch.float32


def test_statistics_use_the_batch_until_a_prompt_is_known() -> None:
    """C25: before ``min_count`` rewards of a prompt its batch counts, from then on its own."""
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    first = statistics.update(PROMPTS, REWARDS)
    batch = normalize_batch(REWARDS)
    # "a" has three rewards at once; "b" and "c" still use the batch.
    torch.testing.assert_close(first[[1, 4, 5]], batch[[1, 4, 5]])
    a = REWARDS[[0, 2, 3]]
    torch.testing.assert_close(first[[0, 2, 3]], (a - a.mean()) / (a.std(correction=0) + 1e-4))


def test_statistics_drop_the_oldest() -> None:
    """C25: beyond its size the buffer forgets what came first."""
    statistics = PromptStatistics(buffer_size=2, min_count=2)
    statistics.update(["a"] * 2, torch.tensor([100.0, 1.0]))
    got = statistics.update(["a"], torch.tensor([3.0]))
    assert float(got[0]) == pytest.approx(1.0 / (1.0 + 1e-4), abs=1e-6)
    assert statistics.state_dict() == {"a": [1.0, 3.0]}


def test_statistics_survive_a_checkpoint() -> None:
    first, second = PromptStatistics(4, 2), PromptStatistics(4, 2)
    first.update(PROMPTS, REWARDS)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.update(PROMPTS, REWARDS + 1), second.update(PROMPTS, REWARDS + 1))
