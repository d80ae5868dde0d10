"""RDP and PRDP: the optimum, the proximal gate, ties, offsets, and the two passes' exact gradient."""

from __future__ import annotations

import weakref
from typing import Any

import chains
import pytest
import torch

from difftune.advantage import pairs_of
from difftune.algorithm import Batch, Context, build_algorithm
from difftune.algorithms.rdp import difference_loss, proximal_loss
from difftune.reward import FunctionReward
from difftune.types import RewardOutput


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_optimum_is_the_tilted_distribution() -> None:
    """C10: five atoms, all pairs."""
    reference, rewards, beta = double(0.1, 0.2, 0.3, 0.25, 0.15), double(0.0, 1.0, -0.5, 2.0, 0.3), 0.7
    pairs = pairs_of(rewards, [list(range(5))], ties=True)
    assert len(pairs) == 10
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=400, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        log_ratio = torch.log_softmax(logits, 0) - reference.log()
        loss = difference_loss(log_ratio, rewards, pairs, beta).mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    tilted = reference * torch.exp(rewards / beta)
    torch.testing.assert_close(torch.softmax(logits, 0).detach(), tilted / tilted.sum(), atol=1e-6, rtol=0)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    r_hat, old = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(4, generator=generator, dtype=torch.float64)
    return r_hat, old, rewards, pairs_of(rewards, [[0, 1, 2, 3]])


def test_clipping_never_lowers_the_loss(drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]) -> None:
    """C15: larger or equal; equal at theta = old and for a wide clip."""
    r_hat, old, rewards, pairs = drawn
    plain = difference_loss(r_hat.sum(1), rewards, pairs, 0.5)
    assert bool((proximal_loss(r_hat, old, rewards, pairs, 0.5, 0.1) >= plain).all())
    torch.testing.assert_close(proximal_loss(r_hat, old, rewards, pairs, 0.5, 1e6), plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(proximal_loss(r_hat, old, rewards, pairs, 0.5, None), plain, atol=1e-12, rtol=0)
    on_policy = difference_loss(old.sum(1), rewards, pairs, 0.5)
    torch.testing.assert_close(proximal_loss(old, old, rewards, pairs, 0.5, 1e-4), on_policy, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("target", "clipped_wins"), [(5.0, True), (-5.0, False)])
def test_the_gate_stops_only_what_clipping_makes_worse(target: float, clipped_wins: bool) -> None:
    """C16: a step beyond old + eps has no gradient if the clipped loss is larger, its full one if it is not."""
    r_hat = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(2, 2, dtype=torch.float64)
    # Sample 0 wins by ``target`` rewards (a negative one: loses), so raising its r-hat helps or hurts.
    rewards = double(target, 0.0)
    pairs = pairs_of(rewards, [[0, 1]])
    proximal_loss(r_hat, old, rewards, pairs, 1.0, 0.1).sum().backward()
    got = r_hat.grad
    assert got is not None
    free = r_hat.detach().clone().requires_grad_()
    difference_loss(free.sum(1), rewards, pairs, 1.0).sum().backward()
    assert free.grad is not None
    if clipped_wins:
        assert got[0, 0] == 0 and got[0, 1] != 0
    else:
        torch.testing.assert_close(got, free.grad, atol=1e-8, rtol=0)


def test_offsets_change_nothing(drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]) -> None:
    """C19: a constant on the rewards, or on the log-ratios, of a prompt."""
    r_hat, old, rewards, pairs = drawn
    base = proximal_loss(r_hat, old, rewards, pairs, 0.5, 0.1)
    torch.testing.assert_close(proximal_loss(r_hat, old, rewards + 3, pairs, 0.5, 0.1), base, atol=1e-6, rtol=0)
    torch.testing.assert_close(proximal_loss(r_hat + 2, old + 2, rewards, pairs, 0.5, 0.1), base, atol=1e-6, rtol=0)


def test_tied_prompts_are_left_out_unless_ties_are_kept() -> None:
    """C18."""
    prompts, rewards = ["a", "a", "b", "b"], RewardOutput(torch.tensor([1.0, 1.0, 2.0, 3.0]))
    assert build_algorithm("rdp").prepare(prompts, rewards).units == [[2, 3]]
    assert build_algorithm("rdp", ties="keep").prepare(prompts, rewards).units == [[0, 1], [2, 3]]


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_two_passes_give_the_gradient_of_the_whole_graph(chain: str, reduce: str) -> None:
    sampler = chains.sampler(chain, shift=torch.zeros(chains.DIMS, dtype=torch.float64))
    parameter = sampler.policy.parameters()[0]
    traj = sampler.rollout(["a"] * 3)
    parameter.data += 0.03  # a later update: the policy has left the one that sampled, and the reference
    rewards = torch.tensor([0.3, -0.2, 0.9])
    beta, clip = 0.8, 0.05
    algorithm = build_algorithm("rdp", beta=beta, clip_range=clip, reduce=reduce)
    batch = Batch(traj.prompts, traj.keys, {"reward": rewards}, traj, units=[[0, 1, 2]])
    reward = FunctionReward("r", lambda images, p: chains.logits(images).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    metrics = algorithm.accumulate(batch, context)
    assert parameter.grad is not None
    got, parameter.grad = parameter.grad.clone(), None

    log_probs: list[torch.Tensor] = []
    with sampler.policy.reference():
        base = {k: g.log_prob(traj.step_out(k)) for k, g in sampler.transitions(traj).items()}
    sampler.replay(traj, lambda view: log_probs.append(view.log_prob))
    steps = traj.stochastic_steps
    unit = traj.dims if reduce == "sum" else 1 / len(steps)
    ratio = (torch.stack(log_probs, 1) - torch.stack([base[k] for k in steps], 1)) * unit
    old = (traj.log_probs[:, steps] - torch.stack([base[k] for k in steps], 1)) * unit
    clip = clip if reduce == "sum" else clip / len(steps)
    loss = proximal_loss(ratio, old, rewards.double(), pairs_of(rewards, [[0, 1, 2]]), beta, clip).mean()
    loss.backward()
    torch.testing.assert_close(got, parameter.grad, atol=1e-8, rtol=1e-5)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


def linear_chain(a: float, beta: float) -> tuple[list[float], list[float], float]:
    """Return the 50-step chain's noise, the shifts of the predicted noise that tilt it by e^{a x / beta}, and kappa_T.

    The best policy moves each step's mean by S^2 kappa a / beta, where kappa is how the final number follows the state.
    """
    bars = [1.0, *torch.cumprod(1 - torch.linspace(1e-3, 0.25, 50, dtype=torch.float64), 0).tolist()]
    slopes, stds, coefficients = [], [], []
    for t in range(50, 0, -1):
        bar, below = bars[t], bars[t - 1]
        std = ((1 - below) / (1 - bar) * (1 - bar / below)) ** 0.5
        c1 = (1 - below - std**2) ** 0.5 / (1 - bar) ** 0.5
        c2 = below**0.5 - bar**0.5 * c1
        gain = bar**0.5 * chains.S0**2 / (bar * chains.S0**2 + 1 - bar)
        slopes.append(c1 + c2 * gain)
        stds.append(std)
        coefficients.append((1 - below - std**2) ** 0.5 - (below * (1 - bar) / bar) ** 0.5)
    kappa, shifts = 1.0, []
    for slope, std, coefficient in zip(slopes[::-1], stds[::-1], coefficients[::-1], strict=True):
        shifts.append(std**2 * kappa * a / beta / coefficient)
        kappa *= slope
    return stds, shifts, kappa  # shifts[t] belongs to timestep t, the last step first


@pytest.mark.parametrize("initial_noise", ["prompt", "sample"])
def test_at_the_optimum_only_the_initial_noise_is_left(initial_noise: Any) -> None:
    """The loss of a pair is (a kappa_T / beta)^2 (x_T - x_T')^2 there, hence 0 where the pair shares x_T."""
    a, beta = 0.8, 0.5
    _, shifts, kappa = linear_chain(a, beta)
    assert kappa == pytest.approx(0.0157036623, abs=1e-9)
    sampler = chains.t1(initial_noise=initial_noise)
    sampler.policy.parameters()[0].data[:, 0] = torch.tensor(shifts, dtype=torch.float64)
    traj = sampler.rollout(["a", "a"])
    start, final = traj.states[:, 0, 0], traj.states[:, -1, 0]
    assert bool(start[0] == start[1]) == (initial_noise == "prompt") and final[0] != final[1]
    algorithm = build_algorithm("rdp", beta=beta, clip_range=None, reduce="sum", ties="keep")
    batch = Batch(traj.prompts, traj.keys, {"reward": a * final}, traj, units=[[0, 1]])
    reward = FunctionReward("r", lambda images, p: images.flatten(1).mean(1), True)
    metrics = algorithm.accumulate(batch, Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0))
    floor = (a * kappa / beta * float(start[0] - start[1])) ** 2
    assert metrics["loss"] == pytest.approx(floor, rel=1e-4, abs=1e-8)
    assert float((a * (final[0] - final[1]) / beta) ** 2) > 1e-3  # what it would be at the base model


def test_rebels_repeats_tilt_the_policy_again_and_again() -> None:
    """C28: regression from the policy that sampled gives p1 = p0 e^{A / eta} / Z, and n of them e^{n A / eta}."""
    start, advantage, eta = double(0.1, 0.2, 0.3, 0.25, 0.15), double(0.5, -1.0, 0.2, 1.5, -0.7), 1.3
    pairs = pairs_of(advantage, [list(range(5))], ties=True)
    policy = start.log()
    for repeat in range(1, 4):
        logits = policy.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=400, tolerance_grad=1e-14, tolerance_change=1e-16)

        def closure(logits: Any = logits, optimizer: Any = optimizer, old: torch.Tensor = policy) -> torch.Tensor:
            optimizer.zero_grad()
            loss = difference_loss(torch.log_softmax(logits, 0) - old, advantage, pairs, eta).mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        policy = torch.log_softmax(logits, 0).detach()
        tilted = start * torch.exp(repeat * advantage / eta)
        torch.testing.assert_close(policy.exp(), tilted / tilted.sum(), atol=1e-6, rtol=0)


def test_rebel_begins_at_nothing_predicted_wherever_the_policy_is() -> None:
    sampler = chains.sampler("diffusion")
    sampler.policy.parameters()[0].data += 0.2  # far from the base model, and sampled like that
    traj = sampler.rollout(["a", "a"])
    batch = Batch(traj.prompts, traj.keys, {"reward": torch.tensor([1.0, 0.0])}, traj, units=[[0, 1]])
    reward = FunctionReward("r", lambda images, p: images.flatten(1).mean(1), True)
    explained = {}
    for reference in ("rollout", "base"):
        algorithm = build_algorithm("rdp", reference=reference, clip_range=None, beta=0.5)
        context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
        explained[reference] = algorithm.accumulate(batch, context)["explained"]
    assert explained["rollout"] == pytest.approx(0, abs=1e-6) and abs(explained["base"]) > 1e-4


def test_the_units_convert() -> None:
    """Means over T steps and d dimensions with beta are sums with beta / (T d), up to a factor of the loss."""
    r_hat, rewards = torch.randn(3, 4, dtype=torch.float64), double(1.0, 0.0, 2.0)
    pairs = pairs_of(rewards, [[0, 1, 2]])
    d, count, beta = 12, 4, 0.3
    mean = difference_loss(r_hat.sum(1) / count, rewards, pairs, beta)
    total = difference_loss(r_hat.sum(1) * d, rewards, pairs, beta / (count * d))
    torch.testing.assert_close(total, mean * (count * d) ** 2, atol=1e-8, rtol=1e-10)


def test_one_step_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a step is handed over, nothing of the step before is alive any more: in either pass."""
    sampler = chains.sampler("diffusion", steps=6)
    traj = sampler.rollout(["a"] * 2)
    replay = sampler.replay
    graphs: list[bool] = []

    def watched(trajectory: Any, on_step: Any, steps: Any = None, *, grad: bool = True) -> None:
        before: list[weakref.ref[torch.Tensor]] = []

        def step(view: Any) -> None:
            assert all(reference() is None for reference in before)
            before.append(weakref.ref(view.gaussian.mean))
            graphs.append(view.log_prob.requires_grad)
            on_step(view)

        replay(trajectory, step, steps, grad=grad)

    monkeypatch.setattr(sampler, "replay", watched)
    batch = Batch(traj.prompts, traj.keys, {"reward": torch.tensor([1.0, 0.0])}, traj, units=[[0, 1]])
    reward = FunctionReward("r", lambda images, p: images.flatten(1).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    build_algorithm("rdp").accumulate(batch, context)
    steps = len(traj.stochastic_steps)
    assert graphs == [False] * 2 * steps + [True] * steps
