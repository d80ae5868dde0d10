"""AlignProp, DRaFT, ReFL, DRTune: truncation, loss forms, and gradients that are known."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import chains
import pytest
import tiny
import torch

from difftune.algorithm import Batch, Context, build_algorithm, reward_loss
from difftune.algorithms.alignprop import AlignPropConfig, first_step
from difftune.algorithms.drtune import spaced_steps, stopped_inputs
from difftune.algorithms.refl import middle_step
from difftune.policy import LoraConfig, Policy
from difftune.reward import FunctionReward
from difftune.sampler import Sampler, sample_keys
from difftune.types import UserError

PROMPTS = ["a", "b", "a"]


def gradient(name: str, sampler: Sampler, scale: float = 1.0, seed: int = 0, **settings: Any) -> torch.Tensor:
    """The gradient an algorithm accumulates for the reward ``scale`` times the mean final number."""
    sampler.rollout(PROMPTS, seed=7)
    keys = sampler.rollout(PROMPTS, seed=7, decode=False).keys
    reward = FunctionReward("r", lambda images, p: scale * chains.logits(images).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator().manual_seed(seed), 1, 0)
    parameter = sampler.policy.parameters()[0]
    parameter.grad = None
    build_algorithm(name, **settings).accumulate(Batch(tuple(PROMPTS), keys, {}, metadata=[{}] * 3), context)
    assert parameter.grad is not None
    return parameter.grad.clone()


def test_loss_forms() -> None:
    reward = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    for form, slopes in {"negative": [-0.1, -0.1], "target": [-0.1, 0.1], "hinge": [-0.1, 0.0]}.items():
        (got,) = torch.autograd.grad(reward_loss(reward, form, 2.0, 0.1).sum(), reward)
        assert got.tolist() == pytest.approx(slopes, abs=1e-12), form
    assert reward_loss(reward, "hinge", 2.0, 1e-3).tolist() == pytest.approx([1e-3, 0.0])


def test_a_target_is_asked_for() -> None:
    with pytest.raises(ValueError, match="loss: hinge needs a target: set algorithm.target"):
        build_algorithm("alignprop", loss="hinge")


def test_black_box_rewards_are_refused() -> None:
    from difftune.algorithm import Plan

    reward = FunctionReward("jpeg", lambda images, prompts: images.flatten(1).mean(1), False)
    for name in ("alignprop", "draft", "refl", "drtune"):
        with pytest.raises(UserError, match="needs a reward with gradients, and 'jpeg' has none"):
            build_algorithm(name).check(chains.sampler("flow"), reward, Plan(1, 1, 1))


def test_truncation_is_drawn_as_named() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = [first_step(AlignPropConfig(), 50, generator) for _ in range(2000)]
    assert min(gaussian) >= 1 and max(gaussian) <= 49
    assert sum(gaussian) / 2000 == pytest.approx(41.3, abs=0.6)  # 42, less the redrawn tail and the rounding
    uniform = Counter(first_step(AlignPropConfig(truncation="uniform"), 10, generator) for _ in range(2000))
    assert set(uniform) == set(range(10)) and min(uniform.values()) > 120
    fixed = AlignPropConfig(truncation="fixed", truncation_steps=3)
    assert first_step(fixed, 50, generator) == 47
    assert first_step(AlignPropConfig(truncation="none"), 50, generator) == 0


def chain_slopes(sampler: Sampler) -> list[float]:
    """d(final number) / d(shift at step k) of the deterministic chain, by moving each step's output alone."""
    slopes = []
    brain = sampler.policy.pipe.brain
    forward = brain.forward
    for wanted in range(sampler.steps):
        finals = []
        for nudge in (0.0, 1.0):
            calls = [0]

            def nudged(x: Any, t: Any, nudge: float = nudge, calls: list[int] = calls, wanted: int = wanted) -> Any:
                calls[0] += 1
                return forward(x, t) + (nudge if calls[0] - 1 == wanted else 0.0)

            brain.forward = nudged
            finals.append(sampler.rollout(PROMPTS, seed=7).states[:, -1].mean())
        slopes.append(float(finals[1] - finals[0]))
    del brain.forward
    return slopes


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize("last", [1, 3, 6])
def test_the_last_k_steps_and_no_others_are_differentiated(chain: str, last: int) -> None:
    """On a linear chain the gradient is the sum of the last K steps' slopes, through the exact denoiser's own slope."""
    zero = torch.zeros(chains.DIMS, dtype=torch.float64)
    sampler = chains.sampler(chain, steps=6, shift=zero, dynamics="ode", eta=0.0)
    slopes = chain_slopes(sampler)
    assert len({round(s, 6) for s in slopes}) == 6
    expected = sum(slopes[-last:]) / chains.DIMS
    for name, settings in (
        ("draft", {"last_steps": last}),
        ("alignprop", {"truncation": "fixed", "truncation_steps": last, "loss_scale": 1.0}),
    ):
        got = gradient(name, sampler, **settings)
        torch.testing.assert_close(got, torch.full_like(got, -expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_stopped_inputs_leave_the_schedulers_linear_terms(chain: str) -> None:
    """DRTune: no Jacobian of the denoiser: the product of the scheduler's own coefficients only."""
    zero = torch.zeros(chains.DIMS, dtype=torch.float64)
    sampler = chains.sampler(chain, steps=6, shift=zero, dynamics="ode", eta=0.0)
    got = gradient("drtune", sampler, trained_steps=6)
    grid, puppet = sampler._puppet._difftune.grid, sampler._puppet
    sampler.rollout(PROMPTS)
    levels = [grid.levels(puppet, float(t), i) for i, t in enumerate(puppet.timesteps)]
    slope, carry = 0.0, 1.0
    for now, nxt in reversed(levels):
        if chain == "flow":
            through, outer = 1.0, nxt.sigma - now.sigma
        else:
            through, outer = nxt.alpha / now.alpha, nxt.sigma - nxt.alpha / now.alpha * now.sigma
        slope += carry * outer
        carry *= through
    torch.testing.assert_close(got, torch.full_like(got, -slope / chains.DIMS), atol=1e-4, rtol=1e-4)
    full = gradient("draft", sampler, last_steps=6)
    assert not torch.allclose(got, full, rtol=1e-2)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_early_stop_scores_what_the_step_predicts(stop: int) -> None:
    """DRTune on the flow chain: from any x_m, x0-hat moves by -sigma_0 = -1 with a shift of all velocities up to m.

    The steps' own slopes, sigma_{k+1} - sigma_k, and the prediction's, -sigma_m, add up to that.
    """
    zero = torch.zeros(chains.DIMS, dtype=torch.float64)
    sampler = chains.sampler("flow", steps=6, shift=zero, dynamics="ode", eta=0.0)
    share = (stop + 0.1) / 6
    sampler.rollout(PROMPTS)
    calls = sampler.denoiser_calls
    got = gradient("drtune", sampler, trained_steps=6, stop_range=(share, share + 0.05))
    torch.testing.assert_close(got, torch.full_like(got, 1.0 / chains.DIMS), atol=1e-5, rtol=1e-4)
    # Two whole rollouts inside ``gradient``, then as many steps as were sampled.
    assert sampler.denoiser_calls - calls == 2 * 6 + stop + 1


def test_spaced_steps_are_even_and_within() -> None:
    assert spaced_steps(4, 20, 0.0) == [0, 5, 10, 15]
    assert spaced_steps(4, 20, 0.99) == [4, 9, 14, 19]
    assert spaced_steps(9, 3, 0.5) == [0, 1, 2]


def test_hooks_are_taken_away() -> None:
    policy = Policy(tiny.sd_pipeline(), LoraConfig(rank=2))
    with stopped_inputs(policy):
        assert policy.pipe.unet._forward_pre_hooks
    assert not policy.pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("settings", [{}, {"renoised": 2}])
def test_draft_1_is_refl_at_the_last_step_where_it_lands_on_the_data(settings: dict[str, Any]) -> None:
    """C65: without noise, on the flow chain, x0 is the last step's own prediction. Re-noised draws scatter about it."""
    zero = torch.zeros(chains.DIMS, dtype=torch.float64)
    sampler = chains.sampler("flow", steps=6, shift=zero, dynamics="ode", eta=0.0)
    draft = gradient("draft", sampler, **settings)
    refl = gradient("refl", sampler, loss="negative", loss_scale=1.0, step_range=(0.99, 1.0))
    # The prediction's slope by the shift does not depend on x_t, so that re-noising changes nothing here.
    torch.testing.assert_close(draft, refl, atol=1e-6, rtol=1e-5)


def test_draft_lvs_further_draws_are_noised_anew() -> None:
    """alpha x0 + sigma z, with a z for each draw and update, told from what the exact denoiser predicts there."""
    sampler = chains.sampler("diffusion", shift=torch.zeros(chains.DIMS, dtype=torch.float64))
    prompts = tuple(f"p{i}" for i in range(30))
    traj = sampler.rollout(prompts, seed=7)
    level = sampler.level(float(traj.times[-1]))
    slope = level.alpha * chains.S0**2 / (level.alpha**2 * chains.S0**2 + level.sigma**2)

    def draws(step: int) -> list[torch.Tensor]:
        drawn: list[torch.Tensor] = []

        def score(images: torch.Tensor, _: Any) -> torch.Tensor:
            numbers = chains.logits(images)
            drawn.append(numbers.detach().double())
            return numbers.mean(1)

        context = Context(
            sampler, sampler.policy, FunctionReward("r", score, True), 1.0, torch.Generator().manual_seed(0), 1, step
        )
        build_algorithm("draft", renoised=2).accumulate(Batch(prompts, traj.keys, {}, metadata=[{}] * 30), context)
        return drawn

    first, *further = draws(0)
    torch.testing.assert_close(first, traj.states[:, -1], atol=1e-5, rtol=0)
    further += draws(1)[1:]
    x_t = (torch.stack(further) - chains.MU) / slope + level.alpha * chains.MU
    z = ((x_t - level.alpha * traj.states[:, -1]) / level.sigma).flatten(1)
    assert z.shape == (4, 360)
    assert float(z.mean()) == pytest.approx(0, abs=4 / 1440**0.5) and float(z.std()) == pytest.approx(1, abs=0.08)
    # Of one another, and of the sample that the rollout's own last step began from.
    between = torch.corrcoef(torch.cat([z, traj.states[:, -2].reshape(1, -1)])) - torch.eye(5)
    assert float(between.abs().max()) < 4 / 360**0.5


def test_refls_gradient_is_its_formula() -> None:
    """C64: -scale dR/dx0 dx0/deps, with dx0/deps = -sigma/alpha; exactly 0 above the target."""
    zero = torch.zeros(chains.DIMS, dtype=torch.float64)
    sampler = chains.sampler("diffusion", steps=6, shift=zero)
    traj = sampler.rollout(PROMPTS, seed=7)
    level = sampler.level(float(traj.times[4]))
    got = gradient("refl", sampler, step_range=(0.7, 0.8))
    assert middle_step((0.7, 0.8), 6, torch.Generator()) == 4
    expected = -1e-3 * -(level.sigma / level.alpha) / chains.DIMS
    torch.testing.assert_close(got, torch.full_like(got, expected), atol=1e-8, rtol=1e-4)
    assert gradient("refl", sampler, target=-50.0).eq(0).all()
    assert -math.sqrt((1 - 0.4) / 0.4) == pytest.approx(-1.224745, abs=1e-6)


@pytest.mark.parametrize("kind", sorted(tiny.PIPELINES))
def test_decoding_is_the_pipelines_own(kind: str) -> None:
    sampler = Sampler(Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2)), steps=3, eta=0.5)
    traj = sampler.rollout(["a red cat", "two dog"])
    latents = traj.states[:, -1].clone().requires_grad_()
    calls = sampler.denoiser_calls
    images = sampler.decode(latents, traj.prompts, traj.keys)
    assert sampler.denoiser_calls == calls
    torch.testing.assert_close(images.detach(), traj.images, atol=1e-6, rtol=0)
    images.sum().backward()
    assert latents.grad is not None and float(latents.grad.norm()) > 0


def test_gradient_algorithms_log_their_rewards_and_resume() -> None:
    from difftune.trainer import Trainer

    def make() -> Trainer:
        sampler = chains.sampler("flow")
        return Trainer(
            policy=sampler.policy, sampler=sampler, algorithm=build_algorithm("alignprop"),
            reward=FunctionReward("r", lambda i, p: {"x": i.flatten(1).mean(1), "y": i[:, 0].mean((1, 2))}, True),
            prompts=["a", "b"], epochs=2, prompts_per_epoch=4, samples_per_prompt=2, updates_per_epoch=2, micro_batch=3,
        )  # fmt: skip

    whole, first, second = make(), make(), make()
    records = list(whole)
    assert {"reward/mean", "reward/std", "reward/x", "reward/y", "grad_norm", "loss"} <= records[0].values.keys()
    assert records[0]["reward/mean"] == pytest.approx((records[0]["reward/x"] + records[0]["reward/y"]) / 2, abs=1e-6)
    next(iter(first))
    second.load_state_dict(first.state_dict())
    list(second)
    for a, b in zip(whole.policy.parameters(), second.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["alignprop", "draft", "refl", "drtune", "adjoint_matching"])
def test_cutting_into_micro_batches_changes_nothing(name: str) -> None:
    from difftune.trainer import Trainer

    results = []
    for micro in (2, 8):
        sampler = chains.sampler("diffusion")
        settings = {"renoised": 2} if name == "draft" else {}
        run = Trainer(
            policy=sampler.policy, sampler=sampler, algorithm=build_algorithm(name, lr=0.05, **settings),
            reward=FunctionReward("r", lambda images, p: chains.logits(images).square().mean(1), True),
            prompts=["a", "b"], epochs=2, prompts_per_epoch=4, samples_per_prompt=2, updates_per_epoch=2,
            micro_batch=micro,
        )  # fmt: skip
        rewards = [metrics["reward/std"] for metrics in run]
        results.append((run.policy.parameters()[0].detach(), rewards))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-4, rtol=0)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-4)


@pytest.mark.parametrize("name", ["alignprop", "draft", "refl", "drtune", "adjoint_matching"])
def test_where_the_pixels_do_not_matter_the_gradient_is_0(name: str) -> None:
    """A scorer may have nothing to look for in some samples, such as text where none is asked for."""
    sampler = chains.sampler("diffusion")
    keys = sample_keys(["a"] * 2, 0, 1)
    reward = FunctionReward("nothing", lambda images, prompts: torch.ones(len(images)), True)
    traj = sampler.rollout(["a"] * 2, keys=keys) if name == "adjoint_matching" else None
    batch = Batch(("a", "a"), keys, {}, traj, metadata=[{}] * 2)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    settings = {} if name == "adjoint_matching" else {"loss": "negative"}
    metrics = build_algorithm(name, **settings).accumulate(batch, context)
    expected = 0.0 if name == "adjoint_matching" else -build_algorithm(name).config.loss_scale
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert all(p.grad is not None and not bool(p.grad.any()) for p in sampler.policy.parameters())


def test_latents_that_are_decoded_without_a_graph_are_told() -> None:
    sampler = chains.sampler("diffusion")
    traj = sampler.rollout(["a"])
    latents = traj.states[:, -1].clone().requires_grad_()
    assert sampler.decode(latents, traj.prompts, traj.keys).requires_grad
    pictures = sampler._pictures
    sampler._pictures = lambda *args, **settings: pictures(*args, **settings).detach()  # type: ignore[method-assign]
    with pytest.raises(UserError, match="decodes without a graph, so no reward's gradient reaches its latents"):
        sampler.decode(latents, traj.prompts, traj.keys)
