"""The sampler itself on chains whose every number is known, and guidance on pipelines of diffusers."""

from __future__ import annotations

from typing import Any

import chains
import diffusers
import numpy as np
import pytest
import tiny
import torch

from difftune.policy import LoraConfig, Policy
from difftune.sampler import Sampler

#: Slope and noise of step k of the 50-step chain, and the sensitivity of the final number to the state after it.
STEPS = {
    0: (0.86587427, 0.49991440, 0.01813619),
    10: (0.89333837, 0.44553882, 0.06421322),
    20: (0.91472765, 0.38168036, 0.17268740),
    30: (0.92683645, 0.30266381, 0.38897469),
    40: (0.94442816, 0.19594121, 0.76604211),
    45: (0.96921192, 0.11531095, 0.94910218),
    48: (0.99069636, 0.02931770, 0.99846066),
}


def test_the_ddpm_chain_ends_in_the_exact_distribution() -> None:
    """C01: each step is affine, x' = A x + B + S z, so that mean and variance of the final number follow exactly."""
    sampler = chains.t1()
    traj = sampler.rollout(["a"] * 3)
    gaussians = sampler.transitions(traj)
    mean, variance, slopes = 0.0, 1.0, []
    for k in range(50):
        x = traj.states[:, k, 0].double()
        # The last step lands on the data: it carries no noise, and what it returned is its mean.
        after = gaussians[k].mean[:, 0].double() if k in gaussians else traj.step_out(k)[:, 0].double()
        std = gaussians[k].std if k in gaussians else 0.0
        slope = float((after[1] - after[0]) / (x[1] - x[0]))
        offset = float(after[0] - slope * x[0])
        assert float(after[2]) == pytest.approx(slope * float(x[2]) + offset, abs=1e-5)
        if k in STEPS:
            assert (slope, std) == pytest.approx(STEPS[k][:2], abs=1e-5)
        mean, variance = slope * mean + offset, slope**2 * variance + std**2
        slopes.append(slope)
    assert (mean, variance) == pytest.approx((0.2998490963, 0.4186846664), abs=1e-5)
    for k, (_, _, sensitivity) in STEPS.items():
        assert float(np.prod(slopes[k + 1 :])) == pytest.approx(sensitivity, abs=1e-5)
    assert float(np.prod(slopes)) == pytest.approx(0.0157036623, abs=1e-5)


class From(chains.Chain):
    """A flow chain that begins at one number and takes even steps from time 1 to 0."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
        """Sample one number per prompt."""
        x = torch.full((len(prompt), 12), 1.5, dtype=torch.float64)
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.brain(x, t), t, x).prev_sample
        return (torch.sigmoid(x).reshape(-1, 3, 2, 2),)


@pytest.mark.parametrize(("steps", "expected"), [(10, 1.218207), (100, 1.336066)])
def test_eulers_error_on_the_flow_chain_is_the_known_one(steps: int, expected: float) -> None:
    """C02: the exact map takes 1.5 to 0.3 + 0.7 * 1.5 = 1.35; Euler's N steps come as near as they should."""
    brain = chains.Exact("flow", None, torch.zeros(12, dtype=torch.float64))
    policy = Policy(From(brain, diffusers.FlowMatchEulerDiscreteScheduler()), lora=None)
    traj = Sampler(policy, steps=steps, dynamics="ode", eta=0.0).rollout(["a"])
    assert not traj.stochastic.any()
    final = traj.states[:, -1].double()
    torch.testing.assert_close(final, torch.full_like(final, expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_guidance_is_affine_between_the_prompts_prediction_and_the_empty_ones(kind: str) -> None:
    """C04: m = m_u + s (m_c - m_u): at scale 1 the prompt's own, at 0 (where the line leads) the empty prompt's."""
    x, found = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), {}
    policy = Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2))
    for prompt, scale in (("a red cat", 1.0), ("a red cat", 2.0), ("a red cat", 5.0), ("", 1.0)):
        sampler = Sampler(policy, steps=3, guidance_scale=scale)
        views: list[Any] = []
        sampler.probe([prompt], [(501.0, x)], views.append, grad=False)
        found[prompt, scale] = views[0].output
    own, empty = found["a red cat", 1.0], found["", 1.0]
    assert float((own - empty).abs().max()) > 1e-3
    for scale in (2.0, 5.0):
        line = empty + scale * (own - empty)
        torch.testing.assert_close(found["a red cat", scale], line, atol=1e-5, rtol=1e-5)
    led = (5 * found["a red cat", 2.0] - 2 * found["a red cat", 5.0]) / 3
    torch.testing.assert_close(led, empty, atol=1e-5, rtol=1e-5)
