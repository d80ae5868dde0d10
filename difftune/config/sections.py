"""The sections of a configuration that say how samples are drawn, on which prompts, and how a run is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from difftune.prompts import Prompt, load_prompts, split_prompts
from difftune.window import Window

ETA = {"ddim": 1.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.9, "lcm": 1.0, "ode": 0.0}
"""Noise level of each dynamics where the configuration leaves ``sampler.eta`` open: DDPM, Flow-GRPO's a,
DanceGRPO's eta, Flow-CPS's eta; ``lcm`` and ``ode`` have no choice."""


def noise_level(eta: float | None, dynamics: str, needed: Mapping[str, float]) -> float:
    """Return ``eta``, or where it is open the level that the algorithm needs, or else the dynamics' own."""
    return {**ETA, **needed}.get(dynamics, 1.0) if eta is None else eta


class SamplerConfig(BaseModel):
    """How samples are drawn, in the rollouts and hence in training."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(20, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0, description="Classifier-free guidance, in rollout and training alike; null: the pipeline's default."
    )
    eta: float | None = Field(
        None,
        ge=0,
        description="Noise level of the dynamics; null: ddim 1 (DDPM), flow_sde 0.7, dance_sde 0.3, cps 0.9, or what "
        "the algorithm needs.",
    )
    dynamics: Literal["auto", "ddim", "flow_sde", "dance_sde", "cps", "lcm", "ode"] = Field(
        "auto", description="The steps' Gaussians; auto goes by the scheduler: ddim, flow_sde or lcm."
    )
    window: list[int] | Window | None = Field(
        None,
        description="Steps that carry noise and can be trained, counted from 0; null: all. Others are ODE steps. A "
        "mapping with kind: random or sliding draws or moves them from epoch to epoch.",
    )
    initial_noise: Literal["sample", "prompt"] = Field(
        "sample", description="Whether each sample begins from noise of its own, or all of a prompt from the same."
    )
    batch_size: int = Field(16, ge=1, description="Samples per pipeline call; changes memory, not the noise.")
    height: int | None = Field(None, ge=8, description="Height in pixels; null: the pipeline's default.")
    width: int | None = Field(None, ge=8, description="Width in pixels; null: the pipeline's default.")
    negative_prompt: str | None = Field(None, description="One negative prompt for all samples.")
    store: Literal["device", "host"] = Field(
        "device", description="Where trajectories are kept: on the device, or in pinned host memory."
    )
    call: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the pipeline's call, the same for every sample."
    )


class PromptsConfig(BaseModel):
    """Which prompts are trained on, and which are held out."""

    model_config = ConfigDict(extra="forbid")

    source: Any = Field(
        description="A built-in set, a .txt, .jsonl or .csv file (relative to the configuration), or a list of "
        "prompts or of mappings with prompt and metadata."
    )
    size: int | None = Field(None, ge=1, description="How many prompts; null: all (256 of the endless sets).")
    seed: int = Field(0, ge=0, description="Seed of the sampled sets, of the choice and of the held-out split.")
    held_out: int | float = Field(
        0, ge=0, description="Prompts kept for evaluation: a number, or a share below 1. 0: none."
    )


class EvaluateConfig(BaseModel):
    """What is drawn after training, base beside tuned, by the stock pipeline and the saved file."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(64, ge=2, description="Pictures drawn by each of the base and the tuned model.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; null: those of the sampler.")
    guidance_scale: float | None = Field(None, ge=0, description="Guidance; null: that of the sampler.")
    seed: int = Field(0, ge=0, description="Seed of the pictures' noise, which training never sees.")
    call: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the pipeline's call.")


def load_held_out(prompts: PromptsConfig) -> list[Prompt]:
    """Return the prompts to evaluate on: the held-out ones, or all where none are held out."""
    return load_split(prompts)[1]


def load_split(prompts: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to train on and those to evaluate on, the same where none are held out.

    Raises:
        UserError: there is no such source, or not enough prompts for the split.
    """
    loaded = load_prompts(prompts.source, size=prompts.size, seed=prompts.seed)
    if not prompts.held_out:
        return loaded, loaded
    return split_prompts(loaded, prompts.held_out, prompts.seed)
