"""From a configuration to the objects of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from difftune.algorithm import Algorithm, build_algorithm
from difftune.config.messages import shown
from difftune.config.resolved import published
from difftune.config.schema import RunConfig
from difftune.config.sections import load_split, noise_level
from difftune.memory import require, require_compiler
from difftune.policy import ModelConfig, Policy, load_pipeline
from difftune.prompts import Prompt
from difftune.puppet import grid_of, resolve_dynamics
from difftune.reward import Reward, build_reward
from difftune.sampler import Sampler
from difftune.trainer import Listener, Trainer, TrainerConfig
from difftune.types import UserError


@dataclass
class Run:
    """What a configuration is made of, once it is loaded.

    Attributes:
        config: the configuration.
        policy, sampler, algorithm, reward: the objects.
        prompts: prompts to train on.
        held_out: prompts to evaluate on; those trained on where none are held out.
    """

    config: RunConfig
    policy: Policy
    sampler: Sampler
    algorithm: Algorithm
    reward: Reward
    prompts: list[Prompt]
    held_out: list[Prompt]

    def trainer(
        self,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        listener: Listener | None = None,
        train: TrainerConfig | None = None,
    ) -> Trainer:
        """Return the trainer of the run.

        Args:
            out: the folder; the configuration's if ``None``.
            resume: continue from the newest checkpoint in it.
            listener: called with (phase, done, total).
            train: sizes in place of the configuration's.

        Raises:
            UserError: a combination that cannot work, or a folder that already holds a run.
        """
        return Trainer(
            policy=self.policy,
            sampler=self.sampler,
            algorithm=self.algorithm,
            reward=self.reward,
            prompts=self.prompts,
            sample_prompts=self.held_out,
            out=out if out is not None else self.config.out,
            config=train if train is not None else self.config.train,
            resume=resume,
            base_model=base_model_name(self.config.model),
            description=published(self.config),
            listener=listener,
            monitor=self.config.monitor,
            idle_rewards="reward" in self.config.offload,
        )


def base_model_name(model: ModelConfig) -> str:
    """Return the model's name as a card may show it: a hub id, or a folder's last part."""
    return Path(model.id).name if os.path.isabs(model.id) else model.id


def build(config: RunConfig) -> Run:
    """Load everything a run needs, and seed the process.

    Raises:
        UserError: something cannot be loaded, or does not fit together.
    """
    prepare_process(config)
    require_settings(config)
    prompts, held_out = load_split(config.prompts)
    reward = load_reward(config.reward)
    check_metadata(reward, [*prompts, *(held_out if config.evaluate is not None else [])])
    pipe = load_model(config.model)
    # What the adapter begins with must not depend on what was loaded before it.
    torch.manual_seed(config.train.seed)
    policy = Policy(
        pipe,
        config.lora,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        idle_encoders="text_encoders" in config.offload,
    )
    algorithm = build_algorithm(config.algorithm)
    return Run(
        config=config,
        policy=policy,
        sampler=_build_sampler(policy, config, algorithm.noise),
        algorithm=algorithm,
        reward=reward,
        prompts=prompts,
        held_out=held_out,
    )


def prepare_process(config: RunConfig) -> None:
    """Set threads, device and seeds for the process.

    Raises:
        UserError: the device is not there.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if device == "cpu":
        # Denormal numbers cost up to a hundred times a normal one's time and change nothing that is looked at.
        torch.set_flush_denormal(True)
    if config.device == "cpu":
        # The trainer's accelerate reads its choice of device from here.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate.utils import set_seed

    set_seed(config.train.seed)


def require_settings(config: RunConfig) -> None:
    """Refuse memory and speed settings that this machine cannot run.

    Raises:
        UserError: a package, a GPU or a compiler is missing.
    """
    device = pick_device(config.device)
    require_model_settings(config.model, device)
    if config.compile != "no":
        require_compiler(device)


def require_model_settings(model: ModelConfig, device: str) -> None:
    """Refuse a way to load the model that this machine cannot run.

    Raises:
        UserError: a package or a GPU is missing.
    """
    for how in model.quantized_parts.values():
        require("model.quantize", how, device)
    if model.attention not in ("auto", "sdpa", "math"):
        require("model.attention", model.attention, device)


def pick_device(device: str = "auto") -> str:
    """Return ``cuda``, ``mps`` or ``cpu``: the one asked for, or with ``auto`` the best there is.

    Raises:
        UserError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if not there.get(device, False):
        raise UserError(f"device: got {device}, which torch {torch.__version__} does not find here; use auto or cpu")
    return device


def load_model(model: ModelConfig) -> Any:
    """Load the pipeline, without its safety checker: that one blackens pictures, and a reward would score the black.

    Raises:
        UserError: it cannot be loaded, or not in this way on this machine.
    """
    require_model_settings(model, pick_device())
    pipe = load_pipeline(
        str(Path(model.id).expanduser()) if model.id.startswith("~") else model.id,
        dtype=model.dtype,
        revision=model.revision,
        variant=model.variant,
        scheduler=model.scheduler,
        quantize=model.quantized_parts,
        attention=model.attention,
        vae_tiling=model.vae_tiling,
        vae_slicing=model.vae_slicing,
    )
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    return pipe


def check_metadata(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Check, before anything is drawn, that the prompts carry the metadata that the reward needs.

    Raises:
        UserError: one has none; the message names the reward, the metadata and the prompt.
    """
    reward.check_metadata([prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])


def load_reward(spec: Any) -> Reward:
    """Build a reward, and say in one line when its weights cannot be had.

    Raises:
        UserError: a setting is wrong, or weights are missing.
    """
    try:
        return build_reward(spec)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"reward: {shown(spec)} could not be loaded ({reason}); check model and network") from error


def _build_sampler(policy: Policy, config: RunConfig, needed: Mapping[str, float]) -> Sampler:
    sampler = config.sampler
    dynamics = resolve_dynamics(sampler.dynamics, grid_of(policy.pipe.scheduler))
    return Sampler(
        policy,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        eta=noise_level(sampler.eta, dynamics, needed),
        dynamics=dynamics,
        window=sampler.window,
        initial_noise=sampler.initial_noise,
        batch_size=sampler.batch_size,
        height=sampler.height,
        width=sampler.width,
        negative_prompt=sampler.negative_prompt,
        store=sampler.store,
        call=sampler.call,
        autocast={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision],
    )
