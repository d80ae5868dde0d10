"""Linear-Gaussian chains: pipelines of a few numbers whose samples, gradients and optima are known in closed form.

The denoiser is the exact one for data N(MU, S0^2) in every dimension, plus a trainable shift of its output. The same
sampler and trainer drive it as any diffusers pipeline.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from torch import nn

from difftune.policy import Policy
from difftune.sampler import Sampler

MU, S0 = 0.3, 0.7
DIMS = 12


class Exact(nn.Module):
    """The exact denoiser of Gaussian data; its output has a trainable ``shift``: ``(dims,)`` or ``(steps, dims)``."""

    def __init__(self, kind: str, alpha_bars: torch.Tensor | None, shift: torch.Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.alpha_bars = alpha_bars
        self.shift = nn.Parameter(shift)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, which diffusers' ``pipe.to`` asks every module for."""
        return self.shift.dtype

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise (``diffusion``) or velocity (``flow``) of ``x`` at timestep ``t``."""
        shift = self.shift.to(x) if self.shift.ndim == 1 else self.shift[int(t)].to(x)
        if self.kind == "flow":
            time = float(t) / 1000
            centred = (x - (1 - time) * MU) / ((1 - time) ** 2 * S0**2 + time**2)
            return time * centred - (MU + (1 - time) * S0**2 * centred) + shift
        assert self.alpha_bars is not None
        bar = float(self.alpha_bars[int(t)])
        clean = MU + math.sqrt(bar) * S0**2 / (bar * S0**2 + 1 - bar) * (x - math.sqrt(bar) * MU)
        return (x - math.sqrt(bar) * clean) / math.sqrt(1 - bar) + shift


class Chain(diffusers.DiffusionPipeline):
    """A pipeline around :class:`Exact`: its pictures are the final numbers themselves, squashed into [0, 1]."""

    def __init__(self, brain: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(brain=brain, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 5, generator: Any = None) -> Any:
        """Sample one vector per prompt."""
        shift = self.brain.shift
        x = torch.stack([torch.randn(shift.shape[-1], generator=g, dtype=shift.dtype) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.brain(x, t), t, x).prev_sample
        pixels = torch.sigmoid(x)
        return (pixels.repeat(1, 12 // x.shape[1]).reshape(-1, 3, 2, 2),)

    def difftune_encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the numbers that a picture ``(B, 3, 2, 2)`` stands for."""
        return logits(images).to(self.brain.shift)


def logits(images: torch.Tensor) -> torch.Tensor:
    """Return the final numbers ``(B, 12)`` behind the pictures."""
    return torch.logit(images.flatten(1).clamp(1e-6, 1 - 1e-6))


def pipeline(kind: str, shift: torch.Tensor | None = None) -> Chain:
    """A chain of ``DIMS`` numbers, ``diffusion`` (DDIM) or ``flow``."""
    shift = torch.zeros(DIMS) if shift is None else shift
    if kind == "flow":
        return Chain(Exact("flow", None, shift), diffusers.FlowMatchEulerDiscreteScheduler())
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return Chain(Exact("diffusion", scheduler.alphas_cumprod.double(), shift), scheduler)


def sampler(kind: str, steps: int = 6, shift: torch.Tensor | None = None, **settings: Any) -> Sampler:
    """A sampler over :func:`pipeline` that trains the shift."""
    policy = Policy(pipeline(kind, shift), lora=None)
    return Sampler(policy, steps=steps, **{"eta": 1.0 if kind == "diffusion" else 0.7, "batch_size": 512, **settings})


def t1(shift: torch.Tensor | None = None, **settings: Any) -> Sampler:
    """The 50-step DDPM chain of one dimension: beta from 1e-3 to 0.25, a shift of its own at every step."""
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=50, trained_betas=torch.linspace(1e-3, 0.25, 50).tolist(), clip_sample=False
    )
    bars = torch.cumprod(1 - torch.linspace(1e-3, 0.25, 50, dtype=torch.float64), 0)
    scheduler.alphas_cumprod = bars
    shift = torch.zeros(50, 1, dtype=torch.float64) if shift is None else shift
    policy = Policy(Chain(Exact("diffusion", bars, shift), scheduler), lora=None)
    return Sampler(policy, steps=50, eta=1.0, batch_size=4096, **settings)
