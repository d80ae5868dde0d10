"""Combinations: products, means, pessimistic ensembles, shapes, comparisons within a group, calibration, the tree."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from difftune.reward import REWARDS, build_reward, list_rewards, reward
from difftune.rewards.combine import entropic, mean_min
from difftune.rewards.shape import clip_rewards, delta_rewards, drawn_frames, segment_weights
from difftune.types import RewardOutput, UserError

PROMPTS = ["a", "a", "a", "b"]
FIRST, SECOND, SIGMA = [1.0, 2.0, 4.0, 3.0], [0.5, 3.0, 1.0, 2.0], [0.1, 0.2, 0.4, 0.5]


@pytest.fixture(autouse=True)
def terms() -> Iterator[None]:
    """Two scorers with known scores, the second with an uncertainty."""
    list_rewards()
    entries, origins = dict(REWARDS._entries), dict(REWARDS._origin)
    reward("first")(lambda images, prompts: torch.tensor(FIRST))
    reward("second")(
        lambda images, prompts: RewardOutput(torch.tensor(SECOND), {"p": torch.ones(4)}, torch.tensor(SIGMA))
    )
    reward("negative")(lambda images, prompts: torch.tensor([1.0, -2.0, 1.0, 1.0]))
    reward("even")(lambda images, prompts: images.mean((1, 2, 3)))
    yield
    REWARDS._entries, REWARDS._origin = entries, origins


def scored(spec: Any, prompts: list[str] = PROMPTS) -> RewardOutput:
    return build_reward(spec)(torch.zeros(len(prompts), 3, 8, 8), prompts)


def total(name: str, of: Any = ("first", "second"), **settings: Any) -> list[float]:
    of = list(of) if isinstance(of, tuple) else of
    return scored({"name": name, "of": of, **settings}).total.tolist()


HEAVY = [{"name": "first", "weight": 3.0}, "second"]


def test_products_and_harmonic_means() -> None:
    assert total("product") == pytest.approx([a * b for a, b in zip(FIRST, SECOND, strict=True)])
    heavy = [{"name": "first", "weight": 2.0}, "second"]
    assert total("product", heavy) == pytest.approx([a * a * b for a, b in zip(FIRST, SECOND, strict=True)])
    expected = [1 / (0.75 / a + 0.25 / b) for a, b in zip(FIRST, SECOND, strict=True)]
    assert total("harmonic_mean", HEAVY) == pytest.approx(expected, rel=1e-5)
    alone = [{"name": "first", "weight": 0.0}, "second"]
    assert total("harmonic_mean", alone) == pytest.approx(SECOND, rel=1e-5)
    with pytest.raises(UserError, match=r"'negative' gave -2 for sample 1 \(prompt 'a'\), expected 0 or more; shift"):
        total("harmonic_mean", ["first", "negative"])
    with pytest.raises(UserError, match="weights are .*expected none below 0"):
        total("harmonic_mean", [{"name": "first", "weight": -1.0}, "second"])


def test_mean_min_lies_between_its_limits() -> None:
    """The sheet's C124."""
    totals = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nominal = totals.mean(0)
    for balance in (0.0, 0.3, 1.0):
        got = mean_min(totals, nominal, balance)
        assert (got >= totals.amin(0) - 1e-9).all() and (got <= nominal + 1e-9).all()
    torch.testing.assert_close(mean_min(totals, nominal, 1.0), nominal, atol=1e-9, rtol=0)
    torch.testing.assert_close(mean_min(totals, nominal, 0.0), totals.amin(0), atol=1e-9, rtol=0)
    same = totals[:1].expand(5, -1)
    torch.testing.assert_close(mean_min(same, same[0], 0.4), same[0], atol=1e-9, rtol=0)
    expected = [0.3 * (3 * a + b) / 4 + 0.7 * min(a, b) for a, b in zip(FIRST, SECOND, strict=True)]
    assert total("mean_min", HEAVY, balance=0.3) == pytest.approx(expected)
    expected = [0.5 * a + 0.5 * min(a, b) for a, b in zip(FIRST, SECOND, strict=True)]
    assert total("mean_min", nominal="first") == pytest.approx(expected)


def test_entropic_contains_mean_minimum_and_variance() -> None:
    totals = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    torch.testing.assert_close(entropic(totals, shares, 1e-4), totals.amin(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropic(totals, shares, 1e6), totals.mean(0), atol=1e-5, rtol=0)
    beta = 50.0
    second = totals.mean(0) - totals.var(0, correction=0) / (2 * beta)
    torch.testing.assert_close(entropic(totals, shares, beta), second, atol=1e-3, rtol=0)
    assert (entropic(totals, shares, beta) - totals.mean(0)).abs().max() > 5e-3
    expected = [
        -2 * math.log(0.75 * math.exp(-a / 2) + 0.25 * math.exp(-b / 2)) for a, b in zip(FIRST, SECOND, strict=True)
    ]
    assert total("entropic", HEAVY, beta=2.0) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="beta is 0"):
        total("entropic", beta=0)


def test_uncertainty_is_used_and_passed_on() -> None:
    out = scored({"name": "mean_variance", "of": ["first", "second"], "penalty": 0.5})
    half = [(a - b) / 2 for a, b in zip(FIRST, SECOND, strict=True)]
    mean = [(a + b) / 2 for a, b in zip(FIRST, SECOND, strict=True)]
    assert out.total.tolist() == pytest.approx([m - 0.5 * h * h for m, h in zip(mean, half, strict=True)])
    assert out.uncertainty is not None and out.uncertainty.tolist() == pytest.approx([abs(h) for h in half], abs=1e-5)
    assert total("lower_bound", "second", k=2.0) == pytest.approx(
        [b - 2 * s for b, s in zip(SECOND, SIGMA, strict=True)]
    )
    with pytest.raises(UserError, match="'lower_bound': 'first' reports no uncertainty"):
        total("lower_bound", "first")
    twice = ["second", {"name": "sigmoid", "of": "second"}]
    with pytest.raises(UserError, match="'sigmoid' reports no uncertainty"):
        total("precision_weighted", twice)
    weighted = scored(["first", {"name": "second", "weight": -2.0}])
    assert weighted.uncertainty is not None
    assert weighted.uncertainty.tolist() == pytest.approx([2 * s for s in SIGMA])


def test_an_affine_map_scales_the_uncertainty_and_bends_drop_it() -> None:
    out = scored({"name": "affine", "of": "second", "scale": -2.0, "offset": 5.0})
    assert out.uncertainty is not None and out.uncertainty.tolist() == pytest.approx([2 * s for s in SIGMA])
    assert scored({"name": "affine", "of": "first", "scale": 2.0}).uncertainty is None
    for shape in ({"name": "hinge", "target": 2.0}, {"name": "clip", "eta": 1.0}, {"name": "sigmoid"}):
        assert scored({**shape, "of": "second"}).uncertainty is None
    # So a scaled scorer has its place beside others that know theirs.
    scaled = [{"name": "affine", "of": "second", "scale": 0.5}, "second"]
    assert scored({"name": "precision_weighted", "of": scaled}).uncertainty is not None


def test_precision_weights_the_surer_scorer() -> None:
    reward("sure")(lambda images, prompts: RewardOutput(torch.tensor(FIRST), {}, torch.full((4,), 0.1)))
    out = scored({"name": "precision_weighted", "of": ["sure", "second"]})
    for index, (a, b, s) in enumerate(zip(FIRST, SECOND, SIGMA, strict=True)):
        wa, wb = 1 / 0.01, 1 / s**2
        assert out.total[index].item() == pytest.approx((wa * a + wb * b) / (wa + wb), rel=1e-5)
        assert out.uncertainty is not None
        assert out.uncertainty[index].item() == pytest.approx((wa + wb) ** -0.5, rel=1e-5)


def test_shapes() -> None:
    assert total("affine", "first", scale=-2.0, offset=1.0) == [-1, -3, -7, -5]
    assert total("hinge", "first", target=2.5) == [-1.5, -0.5, 0, 0]
    assert total("target", "first", target=2.5) == [-1.5, -0.5, -1.5, -0.5]
    assert total("penalty", "first", above=2.5) == [0, 0, -1.5, -0.5]
    assert total("clip", "first", eta=2.5) == [-1.5, -0.5, 0, 0]
    assert total("clip", "first", eta=2.5, low=1.5) == [-1, -0.5, 0, 0]
    assert total("sigmoid", "first", centre=2.0, width=1.0)[1] == 0.5
    # A list under one-term shapes is a weighted sum.
    assert total("hinge", ["first", {"name": "second", "weight": 2.0}], target=5.0) == [-3, 0, 0, 0]
    parts = scored({"name": "hinge", "of": "second", "target": 1.0}).parts
    assert parts["second"].tolist() == SECOND and parts["second/p"].tolist() == [1] * 4
    with pytest.raises(UserError, match="'hinge' needs target"):
        total("hinge", "first")


def test_clip_and_delta() -> None:
    """The sheet's C126: differences telescope to the first score, clipped ones are never positive."""
    scores = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta = delta_rewards(scores)
    torch.testing.assert_close(delta.sum(1), scores[:, 0], atol=1e-9, rtol=0)
    assert (delta[:, -1] == 0).all() and torch.equal(delta[:, -2], scores[:, -2])
    assert (clip_rewards(scores, 0.7) <= 0).all()
    torch.testing.assert_close(clip_rewards(scores, 0.7), torch.minimum(scores - 0.7, torch.zeros(1)))


def test_segments() -> None:
    assert segment_weights(8, 4, 0.0) == ([1, 3, 5, 7], [0.25] * 4)
    frames, weights = segment_weights(9, 3, 1.0)
    assert frames == [1, 4, 7] and weights[1] / weights[0] == pytest.approx(math.e) and sum(weights) == pytest.approx(1)
    assert segment_weights(2, 5, 1.0)[0] == [0, 1]
    film = torch.linspace(0, 1, 9).view(1, 9, 1, 1, 1).expand(1, 9, 3, 8, 8)
    got = build_reward("segmental", of="even", segments=3, rate=1.0)(film, ["a"])
    assert got.total.item() == pytest.approx(0.5) and got.parts["even"].item() == pytest.approx(0.5)
    assert build_reward("segmental", of="even")(film[:, 3], ["a"]).total.item() == pytest.approx(3 / 8)


def test_a_films_uncertainty_is_its_frames_weighted_alike() -> None:
    reward("unsure")(lambda images, prompts: RewardOutput(images.mean((1, 2, 3)), {}, images.amax((1, 2, 3))))
    film = torch.linspace(0, 1, 9).view(1, 9, 1, 1, 1).expand(1, 9, 3, 8, 8)
    built = build_reward("segmental", of="unsure", segments=3, rate=1.0)
    out = built(film, ["a"])
    assert out.uncertainty is not None and out.uncertainty.item() == pytest.approx(out.total.item())
    still = built(film[:, 3], ["a"])
    assert still.uncertainty is not None and still.uncertainty.item() == pytest.approx(3 / 8)
    assert build_reward("segmental", of="even")(film, ["a"]).uncertainty is None


def test_segments_at_random_are_the_papers() -> None:
    """The sheet's C69: a reward of 1 on 16 frames in 4 segments at rate 1 is 0.135202 in expectation; frames from 0."""
    reward("one")(lambda images, prompts: torch.ones(len(images)))
    films = torch.rand(400, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"name": "segmental", "of": "one", "rate": 1.0, "random": True}
    prompts = ["a"] * len(films)
    # With as many segments as frames nothing is left to chance, and that is the expectation.
    whole = build_reward({**settings, "segments": 16})(films, prompts).total
    assert whole.tolist() == pytest.approx([0.135202] * 400, abs=1e-6)
    drawn = build_reward({**settings, "segments": 4})
    out = drawn(films, prompts)
    assert abs(out.total.mean() - 0.135202) < 4 * out.total.std() / 400**0.5
    assert torch.equal(drawn(films[7:9], ["a"] * 2).total, out.total[7:9])
    chosen = torch.tensor([drawn_frames(film, 4) for film in films])
    assert [sorted(set(column)) for column in chosen.T.tolist()] == [list(range(4 * i, 4 * i + 4)) for i in range(4)]
    assert out.total[0].item() == pytest.approx(float(torch.exp(-(chosen[0] - 8.0).abs()).mean()))


def test_the_gradient_of_a_film_is_the_mean_over_its_frames() -> None:
    """The sheet's C67 (VADER): of single frames' gradients; and that of ``-|r - 10|`` is theirs up to 10."""
    film = torch.rand(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def gradient(spec: Any, images: Tensor) -> Tensor:
        images = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(build_reward(spec)(images, ["a"]).total.sum(), images)
        return found

    singles = torch.stack([gradient("contrast", frame) for frame in film.unbind(1)], 1)
    torch.testing.assert_close(gradient("contrast", film), singles / 4, atol=1e-6, rtol=0)
    assert singles.abs().amax() > 1e-3
    for scale, sign in ((1.0, 1.0), (1000.0, -1.0)):
        one = {"name": "affine", "of": "contrast", "scale": scale}
        got = gradient({"name": "target", "target": 10.0, "of": one}, film[:, 0])
        torch.testing.assert_close(got, sign * scale * singles[:, 0], atol=1e-6 * scale, rtol=0)


def test_ranks_and_win_rates() -> None:
    assert total("group_rank", "second") == pytest.approx([1 / 3, 1, 2 / 3, 1])
    assert total("win_rate", "second") == pytest.approx(
        [
            (phi(-2.5, 0.1, 0.2) + phi(-0.5, 0.1, 0.4)) / 2,
            (phi(2.5, 0.1, 0.2) + phi(2.0, 0.2, 0.4)) / 2,
            (phi(0.5, 0.1, 0.4) + phi(-2.0, 0.2, 0.4)) / 2,
            0.5,
        ],
        abs=1e-6,
    )
    assert total("win_rate", "first") == [0, 0.5, 1, 0.5]
    soft = total("win_rate", "first", temperature=1.0)
    assert soft[0] == pytest.approx((1 / (1 + math.e) + 1 / (1 + math.e**3)) / 2, rel=1e-5)
    reward("ties")(lambda images, prompts: torch.tensor([1.0, 1.0, 0.0, 5.0]))
    assert total("group_rank", "ties") == pytest.approx([2.5 / 3, 2.5 / 3, 1 / 3, 1])
    assert total("win_rate", "ties") == [0.75, 0.75, 0, 0.5]
    built = build_reward("win_rate", of="clip_score")
    assert built.groupwise and not built.differentiable


def phi(difference: float, one: float, other: float) -> float:
    return 0.5 * (1 + math.erf(difference / math.hypot(one, other) / 2**0.5))


@pytest.mark.parametrize("name", ["group_rank", "win_rate", "gdpo"])
def test_one_text_under_two_conditions_is_two_groups(name: str) -> None:
    """As two texts would be, and not as one."""
    built, images = build_reward(name, of=["first"]), torch.zeros(4, 3, 8, 8)
    told = [*[{"conditions": "1f"}] * 2, *[{"conditions": "2e"}] * 2]
    apart = built(images, ["a"] * 4, told).total
    assert torch.equal(apart, built(images, ["a", "a", "b", "b"]).total)
    assert not torch.equal(apart, built(images, ["a"] * 4, [{"other": "1f"}] * 4).total)


def test_gdpo_normalises_before_it_sums() -> None:
    """The sheet's C128: multiplying one reward by a number changes nothing."""
    plain = total("gdpo")
    scaled = total("gdpo", ["first", {"name": "affine", "of": "second", "scale": 1000.0}])
    assert scaled == pytest.approx(plain, abs=2e-3)
    summed = scored(["first", {"name": "affine", "of": "second", "scale": 1000.0}]).total
    z = (summed[:3] - summed[:3].mean()) / summed[:3].std(correction=0)
    assert (torch.tensor(plain)[:3] - z).abs().max() > 0.1
    assert sum(plain) == pytest.approx(0, abs=1e-5)


# Calibration


def feed(built: Any, values: list[float]) -> Tensor:
    images = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    return built(images, [""] * len(values)).total


def test_calibration_is_the_running_standardisation() -> None:
    built = build_reward("calibrated", of="even")
    values = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for batch in range(3):
        got = feed(built, values[batch].tolist())
        seen = values[: batch + 1].flatten()
        torch.testing.assert_close(got, (values[batch] - seen.mean()) / seen.std(correction=0), atol=1e-4, rtol=1e-4)
    state = json.loads(json.dumps(built.state_dict()))
    fresh = build_reward("calibrated", of="even")
    fresh.load_state_dict(state)
    assert torch.equal(feed(fresh, [0.1, 0.9]), feed(built, [0.1, 0.9]))
    with pytest.raises(UserError, match="has no count, mean and squares"):
        fresh.load_state_dict({"mean": 1})
    with pytest.raises(UserError, match="got a state with mean, expected none"):
        build_reward("first").load_state_dict({"mean": 1})


def test_calibration_freezes_and_stands_equal_scores() -> None:
    built = build_reward("calibrated", of="even", freeze_after=4)
    feed(built, [0.0, 0.2, 0.4, 0.6])
    before = built.state_dict()
    assert feed(built, [0.3, 0.3]).tolist() == pytest.approx([0, 0], abs=1e-6) and built.state_dict() == before
    assert feed(build_reward("calibrated", of="even"), [0.7, 0.7]).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_with_gradients_the_statistics_are_those_of_the_steps_beginning() -> None:
    """However a step is cut, its scores and what is learned from it are the same."""
    values = torch.rand(8, generator=torch.Generator().manual_seed(0))
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    spec = [{"name": "calibrated", "of": {"name": "calibrated", "of": "brightness"}}, "brightness"]
    seen, states = [], []
    for size in (8, 3, 1):
        built = build_reward(spec)
        for step in range(2):
            parts = images.clone().requires_grad_().split(size)
            out = [built(part, [""] * len(part)) for part in parts]
            if step == 0:
                first = torch.cat([o.parts["calibrated"] for o in out])
                torch.testing.assert_close(first, values, atol=1e-6, rtol=0)
            assert all(o.total.requires_grad for o in out)
            before = built.state_dict()
            found = built.collect()
            assert built.collect() is None and built.state_dict() == before
            built.settle([found])
            assert built.state_dict() != before
        seen.append(torch.cat([o.parts["calibrated"] for o in out]).detach())
        states.append(built.state_dict())
    for other, state in zip(seen[1:], states[1:], strict=True):
        torch.testing.assert_close(other, seen[0], atol=1e-5, rtol=0)
        for key in ("count", "mean", "squares"):
            for one, same in ((state, states[0]), (state["calibrated"]["of"], states[0]["calibrated"]["of"])):
                got, expected = one["calibrated"][key], same["calibrated"][key]
                assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # The outer one has seen what the inner one gave in the first step: the scores as they were.
    z = (values - values.mean()) / values.std(correction=0)
    expected = (z - values.mean()) / values.std(correction=0)
    torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=1e-3)


def test_what_is_kept_back_is_given_up_with_the_state() -> None:
    built = build_reward("calibrated", of="brightness", freeze_after=4)
    feed(built, [0.1, 0.3])
    state = built.state_dict()
    built(torch.rand(3, 3, 4, 4).requires_grad_(), [""] * 3)
    built.load_state_dict(state)
    assert built.collect() is None
    # A step counts whole, and frozen statistics stay.
    for count in (5, 5):
        built(torch.rand(3, 3, 4, 4).requires_grad_(), [""] * 3)
        built.settle([built.collect()])
        assert built.state_dict()["count"] == count
    assert build_reward(["brightness", "contrast"]).collect() is None


def test_a_nested_state_reaches_its_term() -> None:
    spec = [{"name": "calibrated", "of": "even", "weight": 2.0}, "first"]
    built = build_reward(spec)
    built(torch.rand(4, 3, 4, 4), PROMPTS)
    state = built.state_dict()
    assert set(state) == {"calibrated"} and state["calibrated"]["count"] == 4
    fresh = build_reward(spec)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == state
    with pytest.raises(UserError, match="got a state of 'other', expected calibrated, first"):
        fresh.load_state_dict({"other": {}})


# The tree


def test_the_tree_is_written_in_yaml_and_printed() -> None:
    import yaml

    text = """
    - {name: hinge, target: 0.5, of: {name: harmonic_mean, of: [brightness, {name: contrast, weight: 2}]}}
    - {name: calibrated, weight: 0.1, of: jpeg_proxy}
    """
    built = build_reward(yaml.safe_load(text))
    assert built.differentiable and not built.groupwise
    assert built.describe().splitlines() == [
        "hinge + calibrated",
        "  1 x hinge {target: 0.5}",
        "    1 x harmonic_mean",
        "      1 x brightness",
        "      2 x contrast",
        "  0.1 x calibrated",
        "    1 x jpeg_proxy",
    ]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = built(images, ["a", "b"])
    out.total.sum().backward()
    assert {"hinge", "hinge/harmonic_mean/contrast", "calibrated/jpeg_proxy"} <= set(out.parts)
    torch.testing.assert_close(out.total, out.parts["hinge"] + 0.1 * out.parts["calibrated"])


def test_what_terms_can_and_need_is_the_trees() -> None:
    built = build_reward({"name": "product", "of": ["pixel_similarity", "scene"]})
    assert not built.differentiable and set(built.needs) == {"reference"}
    with pytest.raises(
        UserError, match="'product' needs 'reference' .a reference picture.*sample 1 .prompt 'b'. has none"
    ):
        built(torch.zeros(2, 3, 8, 8), ["a", "b"], [{"reference": torch.zeros(3, 8, 8)}, {}])
    assert build_reward(["brightness", {"name": "diversity", "weight": 0.1}]).groupwise
    for bad, message in (([], "got an empty list"), (3, "got int"), ([{"weight": 1}], "has no name")):
        with pytest.raises(UserError, match=message):
            build_reward("hinge", of=bad, target=1.0)


def test_a_function_declares_what_it_needs() -> None:
    @reward("matches", needs={"target": "the wanted brightness"}, groupwise=True)
    def matches(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return -(images.mean((1, 2, 3)) - torch.tensor([extra["target"] for extra in metadata])).abs()

    built = build_reward("matches")
    assert built.groupwise and not built.differentiable
    assert built(torch.zeros(2, 3, 4, 4), ["a", "b"], [{"target": 0.5}] * 2).total.tolist() == [-0.5, -0.5]
    with pytest.raises(UserError, match=r"'matches' needs 'target' \(the wanted brightness\) in the metadata"):
        built(torch.zeros(1, 3, 4, 4), ["a"])


def test_frames_of_a_function_are_averaged_with_parts_and_uncertainty() -> None:
    reward("full")(
        lambda images, prompts: RewardOutput(
            images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))}, images.amax((1, 2, 3))
        )
    )
    film = torch.rand(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = build_reward("full")(film, ["a", "b"])
    torch.testing.assert_close(out.total, film.mean((1, 2, 3, 4)))
    torch.testing.assert_close(out.parts["red"], film[:, :, 0].mean((1, 2, 3)))
    assert out.uncertainty is not None
    torch.testing.assert_close(out.uncertainty, film.amax((2, 3, 4)).mean(1))
    with pytest.raises(ValueError, match="'full' got images .*videos without frames"):
        build_reward("full")(film[:, :0], ["a", "b"])
