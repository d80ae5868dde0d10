"""Adjoint matching on the 50-step chain: the adjoint, its optimum, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import chains
import pytest
import torch

from difftune.algorithm import Batch, Context, Plan, build_algorithm
from difftune.algorithms.adjoint_matching import matching_loss
from difftune.reward import FunctionReward
from difftune.types import UserError

#: Sensitivity of the final number to the state after step k, and the step's noise, of the 50-step chain.
KAPPA = {0: 0.01813619, 10: 0.06421322, 20: 0.17268740, 30: 0.38897469, 40: 0.76604211, 45: 0.94910218, 48: 0.99846066}
NOISE = {0: 0.49991440, 10: 0.44553882, 20: 0.38168036, 30: 0.30266381, 40: 0.19594121, 45: 0.11531095, 48: 0.02931770}
REWARD = FunctionReward("linear", lambda images, prompts: 0.8 * chains.logits(images).mean(1), True)


def setup(scale: float = 2.0) -> tuple[Any, Any, Batch, Context]:
    sampler = chains.t1()
    algorithm = build_algorithm("adjoint_matching", reward_scale=scale)
    traj = sampler.rollout(["a"] * 3)
    batch = Batch(traj.prompts, traj.keys, {}, traj, metadata=[{}] * 3)
    return sampler, algorithm, batch, Context(sampler, sampler.policy, REWARD, 1.0, torch.Generator(), 1, 0)


def test_the_adjoint_of_a_linear_reward_is_the_sensitivity() -> None:
    """C94: after step k it is -lambda a kappa_k for every sample, also when the policy has left the base model."""
    sampler, algorithm, batch, context = setup()
    sampler.policy.parameters()[0].data += 0.3
    adjoints = algorithm.adjoints(batch, context)
    assert len(adjoints) == 50
    for k, kappa in KAPPA.items():
        expected = torch.full((3, 1), -2.0 * 0.8 * kappa, dtype=torch.float64)
        torch.testing.assert_close(adjoints[k].double(), expected, atol=1e-5, rtol=1e-4)


def test_the_loss_is_zero_at_the_tilt_and_its_gradient_there_too() -> None:
    """The optimum moves each step's mean by lambda a S_k^2 kappa_k, in every state."""
    sampler, algorithm, batch, context = setup()
    traj = batch.trajectory
    assert traj is not None
    adjoints = algorithm.adjoints(batch, context)
    with sampler.policy.reference():
        base = sampler.transitions(traj)
    for k in KAPPA:
        assert base[k].std == pytest.approx(NOISE[k], abs=1e-6)
        best = base[k].mean + 2.0 * 0.8 * base[k].std ** 2 * KAPPA[k]
        assert float(matching_loss(best, base[k].mean, base[k].std, adjoints[k]).max()) < 1e-8
    metrics = algorithm.accumulate(batch, context)
    expected = sum(float((g.std * adjoints[k]).square().mean()) for k, g in base.items()) / len(base)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)


def test_what_the_pipeline_overwrites_is_matched_by_nothing() -> None:
    """Of a sample that is overwritten whole, neither the loss nor its gradient is anything."""
    sampler, algorithm, batch, context = setup()
    traj = batch.trajectory
    assert traj is not None
    kept = torch.zeros_like(traj.states[:, 1:], dtype=torch.bool)
    sampler.policy.parameters()[0].data += 0.3
    metrics = algorithm.accumulate(replace(batch, trajectory=replace(traj, kept=kept)), context)
    assert metrics["loss"] == 0.0 and metrics["kl"] == 0.0
    assert all(p.grad is None or not bool(p.grad.any()) for p in sampler.policy.parameters())
    # The mean goes on dividing by all dimensions, as log-probs and KLs do.
    mean, base, adjoint = (torch.randn(2, 4) for _ in range(3))
    mask = torch.tensor([[True, True, False, False]])
    half = matching_loss(mean[:, :2], base[:, :2], 0.5, adjoint[:, :2]) / 2
    torch.testing.assert_close(matching_loss(mean, base, 0.5, adjoint, mask), half)


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_it_needs_memoryless_noise_and_a_differentiable_reward(chain: str) -> None:
    algorithm, plan = build_algorithm("adjoint_matching"), Plan(1, 1, 1)
    eta = 1.0 if chain == "diffusion" else math.sqrt(2)
    algorithm.check(chains.sampler(chain, eta=eta), REWARD, plan)
    with pytest.raises(UserError, match="needs memoryless noise at every step, got dynamics=.*eta=0.5"):
        algorithm.check(chains.sampler(chain, eta=0.5), REWARD, plan)
    black_box = FunctionReward("jpeg", lambda images, prompts: images.flatten(1).mean(1), False)
    with pytest.raises(UserError, match="needs a reward with gradients, and 'jpeg' has none"):
        algorithm.check(chains.sampler(chain, eta=eta), black_box, plan)


# -- the flow chain ----------------------------------------------------------------------------------------------

#: Reward per number of the flow chain below, and lambda.
SLOPE, SCALE = 0.8 / 3, 2.0


class Flow:
    """Ten memoryless SDE steps on the exact velocity of N(MU, S0^2), in closed form, for every one of 3 numbers.

    Attributes:
        slopes: A of step k, x' = A x + B + S z.
        by_velocity: how far the step's mean moves with the velocity.
        noise: S.
        kappas: the sensitivity of the final number to the state after step k, the product of the later slopes.
    """

    def __init__(self, times: list[float]) -> None:
        self.slopes, self.by_velocity, self.noise = [], [], []
        for t, s in zip(times, [*times[1:], 0.0], strict=True):
            g2 = 2 * t / (1 - min(t, times[1])) if t == 1 else 2 * t / (1 - t)
            dt = s - t
            velocity = (t - (1 - t) * chains.S0**2) / ((1 - t) ** 2 * chains.S0**2 + t**2)
            self.by_velocity.append((1 + g2 * (1 - t) / (2 * t)) * dt)
            self.slopes.append(1 + g2 / (2 * t) * dt + velocity * self.by_velocity[-1])
            self.noise.append(math.sqrt(-g2 * dt))
        self.kappas = [math.prod(self.slopes[k + 1 :]) for k in range(len(times))]


def flow_setup() -> tuple[Any, Any, Batch, Context, Flow]:
    """A chain of 3 numbers with a shift of the velocity at every timestep, and the reward a sum over them."""
    shift = torch.zeros(1001, 3, dtype=torch.float64)
    sampler = chains.sampler("flow", steps=10, shift=shift, eta=math.sqrt(2))
    algorithm = build_algorithm("adjoint_matching", reward_scale=SCALE)
    traj = sampler.rollout(["a"] * 4)
    batch = Batch(traj.prompts, traj.keys, {}, traj, metadata=[{}] * 4)
    # Pictures repeat the 3 numbers four times.
    reward = FunctionReward("linear", lambda images, prompts: 3 * SLOPE * chains.logits(images).mean(1), True)
    context = Context(sampler, sampler.policy, reward, 1.0, torch.Generator(), 1, 0)
    return sampler, algorithm, batch, context, Flow([float(t) / 1000 for t in traj.times])


def test_on_the_flow_chain_the_adjoint_is_the_sensitivity_too() -> None:
    """C94's twin: -lambda a kappa_k after step k, also when the policy has left the base model."""
    sampler, algorithm, batch, context, flow = flow_setup()
    traj = batch.trajectory
    assert traj is not None
    for k, gaussian in sampler.transitions(traj).items():
        assert gaussian.std == pytest.approx(flow.noise[k], rel=1e-6)
    sampler.policy.parameters()[0].data += 0.3
    adjoints = algorithm.adjoints(batch, context)
    assert len(adjoints) == 10 and len({round(kappa, 3) for kappa in flow.kappas}) == 10
    for adjoint, kappa in zip(adjoints, flow.kappas, strict=True):
        expected = torch.full((4, 3), -SCALE * SLOPE * kappa, dtype=torch.float64)
        torch.testing.assert_close(adjoint.double(), expected, atol=1e-5, rtol=1e-4)


def test_on_the_flow_chain_the_optimum_is_the_tilt() -> None:
    """The velocity that moves every mean by lambda a S^2 kappa has no loss, no gradient, and draws the tilt.

    Of N(m, V), tilted by exp(lambda a x), the mean is m + lambda a V; the noise is memoryless but for the grid's step
    from pure noise, whose share of V is kappa_T^2.
    """
    sampler, algorithm, batch, context, flow = flow_setup()
    traj, parameter = batch.trajectory, sampler.policy.parameters()[0]
    assert traj is not None
    steps = traj.stochastic_steps
    # At the base model the loss is the adjoint's alone, and its slope by a step's velocity that of the square.
    metrics = algorithm.accumulate(batch, context)
    sizes = [SCALE * SLOPE * flow.kappas[k] * flow.noise[k] for k in steps]
    assert metrics["loss"] == pytest.approx(sum(size**2 for size in sizes) / len(steps), rel=1e-4)
    for k, size in zip(steps, sizes, strict=True):
        slope = -2 * size * flow.by_velocity[k] / flow.noise[k] / len(steps) / 3
        got = parameter.grad[int(traj.times[k])]
        torch.testing.assert_close(got, torch.full_like(got, slope), atol=1e-6, rtol=1e-4)
    size = float(parameter.grad.norm())
    parameter.grad = None
    for k in steps:
        shift = SCALE * SLOPE * flow.noise[k] ** 2 * flow.kappas[k] / flow.by_velocity[k]
        parameter.data[int(traj.times[k])] = shift
    metrics = algorithm.accumulate(batch, context)
    assert metrics["loss"] < 1e-8 and metrics["kl"] > 0 and float(parameter.grad.norm()) < 1e-4 * size
    moved = sampler.rollout(["a"] * 4).states[:, -1] - traj.states[:, -1]
    noisy = sum((flow.noise[k] * flow.kappas[k]) ** 2 for k in steps)
    torch.testing.assert_close(moved, torch.full_like(moved, SCALE * SLOPE * noisy), atol=1e-6, rtol=1e-5)
    assert math.prod(flow.slopes) ** 2 < 0.01 * noisy
