r"""All sampler mathematics: one denoising step as a Gaussian, for every dynamics.

Conventions. A noisy sample is ``x = alpha * x0 + sigma * noise``; a :class:`Level` is the pair (alpha, sigma).
Noise-prediction models are variance preserving (alpha^2 + sigma^2 = 1) or exploding (alpha = 1); flow models are
straight (alpha = 1 - sigma, t = sigma, velocity v = noise - x0). A step goes from level t to the less noisy level s and
is the Gaussian ``x_s ~ N(mean, std^2 I)``; ``std = 0`` is an ODE step, which has no log-prob.

Everything is computed in fp32 (or fp64 when the sample is), whatever the pipeline's dtype; the scalars are Python
floats, so a step costs no device synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["mean", "sum"]
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True)
class Level:
    """A noise level: ``x = alpha * x0 + sigma * noise``."""

    alpha: float
    sigma: float

    @staticmethod
    def flow(t: float) -> Level:
        """Return the level of a flow model at time ``t`` in [0, 1]: alpha = 1 - t, sigma = t."""
        return Level(1.0 - t, t)

    @staticmethod
    def vp(alpha_bar: float) -> Level:
        """Return the variance-preserving level of cumulative product ``alpha_bar``."""
        return Level(math.sqrt(alpha_bar), math.sqrt(max(1.0 - alpha_bar, 0.0)))


def working(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype steps are computed in: fp32, or fp64 if it is fp64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _reduce(values: Tensor, reduce: Reduce) -> Tensor:
    flat = values.flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


@dataclass(frozen=True)
class Gaussian:
    """The transition of one step, ``N(mean, std^2 I)``.

    Attributes:
        mean: ``(B, *latent)``.
        std: one standard deviation for all dimensions; 0 for an ODE step.
        mask: broadcastable to ``mean``, False where the pipeline overwrites what was drawn (inpainting): those
            dimensions add nothing to log-probs and KLs. Means go on dividing by all d dimensions, so that the sum is d
            times the mean whatever a sample's mask is.
    """

    mean: Tensor
    std: float
    mask: Tensor | None = None

    def log_prob(self, x: Tensor, reduce: Reduce = "mean") -> Tensor:
        """Return ``(B,)`` log-densities of ``x`` ``(B, *latent)``, averaged or summed over the latent's dimensions.

        The mean over dimensions is the unit of the published clip ranges (1e-4); the sum is the density itself.

        Raises:
            ValueError: the step carries no noise.
        """
        if self.std <= 0:
            raise ValueError("an ODE step (std = 0) has no log-prob: leave the step out or give it noise (eta > 0)")
        per_dim = -((working(x) - self.mean) ** 2) / (2 * self.std**2) - (
            math.log(self.std) + 0.5 * math.log(2 * math.pi)
        )
        return _reduce(self._masked(per_dim), reduce)

    def kl(self, other: Gaussian, reduce: Reduce = "mean") -> Tensor:
        """Return ``(B,)`` KL(self || other), averaged or summed over the latent's dimensions."""
        if self.std <= 0 or other.std <= 0:
            raise ValueError("the KL of an ODE step (std = 0) is not defined: leave the step out")
        spread = (self.std / other.std) ** 2
        per_dim = (self.mean - other.mean) ** 2 / (2 * other.std**2) + 0.5 * (spread - 1 - math.log(spread))
        return _reduce(self._masked(per_dim), reduce)

    def to(self, device: torch.device | str) -> Gaussian:
        """Return it with its tensors on ``device``."""
        mask = None if self.mask is None else self.mask.to(device)
        return Gaussian(self.mean.to(device), self.std, mask)

    def _masked(self, per_dim: Tensor) -> Tensor:
        return per_dim if self.mask is None else per_dim * self.mask

    def sample(self, noise: Tensor) -> Tensor:
        """Return ``mean + std * noise``."""
        return self.mean + self.std * noise if self.std > 0 else self.mean


def split_prediction(
    output: Tensor, x: Tensor, level: Level, kind: PredictionType
) -> tuple[Tensor, Tensor]:
    """Return ``(x0, noise)`` predicted by a model output at sample ``x`` of noise level ``level``.

    ``epsilon``: output = noise. ``v_prediction`` (Salimans & Ho 2022): output = alpha noise - sigma x0. ``sample``:
    output = x0. ``flow``: output = noise - x0.
    """
    alpha, sigma = level.alpha, level.sigma
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    if kind == "flow":
        return x - sigma * output, x + (1 - sigma) * output
    raise ValueError(f"prediction type {kind!r}, expected epsilon, v_prediction, sample or flow")


def add_noise(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Return the forward process at ``level``: ``alpha * x0 + sigma * noise``."""
    return level.alpha * x0 + level.sigma * noise


def ddim(x0: Tensor, noise: Tensor, now: Level, nxt: Level, eta: float) -> Gaussian:
    r"""DDIM with noise eta (Song et al. 2021, eqs. 12 and 16), for any pair of levels.

    .. math::
        \mathrm{std}^2 = \eta^2\,\frac{\sigma_s^2}{\sigma_t^2}
                         \left(\sigma_t^2 - \frac{\alpha_t^2}{\alpha_s^2}\sigma_s^2\right), \qquad
        \mathrm{mean} = \alpha_s\,\hat x_0 + \sqrt{\sigma_s^2 - \mathrm{std}^2}\;\hat\epsilon

    eta = 0 is deterministic DDIM (Euler on the probability-flow ODE); eta = 1 is DDPM's posterior, and the ancestral
    Euler step when alpha = 1.
    """
    variance = 0.0
    if eta > 0 and now.sigma > 0:
        variance = (nxt.sigma / now.sigma) ** 2 * (now.sigma**2 - (now.alpha / nxt.alpha * nxt.sigma) ** 2)
    std = eta * math.sqrt(max(variance, 0.0))
    rest = math.sqrt(max(nxt.sigma**2 - std**2, 0.0))
    return Gaussian(nxt.alpha * x0 + rest * noise, std)


def flow_ode(x: Tensor, v: Tensor, t: float, s: float) -> Gaussian:
    """Euler's step on the flow ODE: ``x + v (s - t)``, no noise."""
    return Gaussian(x + v * (s - t), 0.0)


def flow_sde(x: Tensor, v: Tensor, t: float, s: float, eta: float, t_below_one: float) -> Gaussian:
    r"""The SDE step of Flow-GRPO (Liu et al. 2025, eq. 9): same marginals as the ODE, noise g.

    .. math::
        g = \eta\sqrt{t/(1-t)}, \quad
        \mathrm{mean} = x + \Big[v + \tfrac{g^2}{2t}\big(x + (1-t)v\big)\Big]\Delta t, \quad
        \mathrm{std} = g\sqrt{|\Delta t|}, \quad \Delta t = s - t < 0

    At t = 1 the denominator 1 - t is 0; like the authors' code it is taken at ``t_below_one``, the grid's next time.
    """
    dt = s - t
    g2 = eta**2 * t / (1 - (t if t < 1 else t_below_one))
    mean = x * (1 + g2 / (2 * t) * dt) + v * ((1 + g2 * (1 - t) / (2 * t)) * dt)
    return Gaussian(mean, math.sqrt(g2 * -dt))


def dance_sde(x: Tensor, v: Tensor, t: float, s: float, eta: float) -> Gaussian:
    r"""DanceGRPO's constant-noise SDE step (Xue et al. 2025): g = eta at every t.

    .. math::
        \mathrm{mean} = x + \Big[v + \tfrac{\eta^2}{2t}\big(x + (1-t)v\big)\Big]\Delta t, \quad
        \mathrm{std} = \eta\sqrt{|\Delta t|}
    """
    dt = s - t
    mean = x * (1 + eta**2 / (2 * t) * dt) + v * ((1 + eta**2 * (1 - t) / (2 * t)) * dt)
    return Gaussian(mean, eta * math.sqrt(-dt))


def cps(x: Tensor, v: Tensor, t: float, s: float, eta: float) -> Gaussian:
    r"""Coefficients-preserving sampling (Wang & Yu 2025): the noise level of x_s is exactly s.

    .. math::
        \mathrm{std} = s\,\sin(\eta\pi/2), \qquad
        \mathrm{mean} = (1-s)\,\hat x_0 + \sqrt{s^2-\mathrm{std}^2}\;\hat x_1
    """
    x0, x1 = x - t * v, x + (1 - t) * v
    std = s * math.sin(eta * math.pi / 2)
    return Gaussian((1 - s) * x0 + math.sqrt(max(s**2 - std**2, 0.0)) * x1, std)


def lcm(denoised: Tensor, nxt: Level, last: bool) -> Gaussian:
    """The multistep consistency step (Luo et al. 2023): renoise the denoised sample; the last step delivers it."""
    if last:
        return Gaussian(denoised, 0.0)
    return Gaussian(nxt.alpha * denoised, nxt.sigma)


#: A flow dynamics: ``(x, v, t, s, eta, t_below_one) -> Gaussian``.
FlowStep = Callable[[Tensor, Tensor, float, float, float, float], Gaussian]

FLOW_DYNAMICS: dict[str, FlowStep] = {
    "ode": lambda x, v, t, s, eta, below: flow_ode(x, v, t, s),
    "flow_sde": flow_sde,
    "dance_sde": lambda x, v, t, s, eta, below: dance_sde(x, v, t, s, eta),
    "cps": lambda x, v, t, s, eta, below: cps(x, v, t, s, eta),
}

#: Dynamics by the scheduler's family; the first of each is what ``auto`` means.
DYNAMICS: dict[str, tuple[str, ...]] = {
    "flow": ("flow_sde", "dance_sde", "cps", "ode"),
    "diffusion": ("ddim", "ode"),
    "lcm": ("lcm", "ddim", "ode"),
}
