"""Settings that do not go together, told before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from difftune.algorithm import ALGORITHMS, Plan, build_algorithm
from difftune.config.named import is_composed
from difftune.config.schema import RunConfig
from difftune.config.sections import noise_level
from difftune.reward import REWARDS
from difftune.transition import DYNAMICS
from difftune.types import UserError
from difftune.window import Window, resolve_window


@dataclass(frozen=True)
class _SamplerSketch:
    """What an algorithm's check asks of a sampler, known before a model is loaded."""

    dynamics: str
    eta: float
    window: tuple[int, ...] | Window | None
    steps: int


@dataclass(frozen=True)
class _RewardSketch:
    """What an algorithm's check asks of a reward, known before its weights are loaded."""

    name: str
    differentiable: bool
    groupwise: bool


def conflicts_of(config: RunConfig) -> list[str]:
    """Return why the settings do not go together, as far as it shows without the model."""
    problems = []
    sampler, train = config.sampler, config.train
    window = None
    try:
        window = resolve_window(sampler.window, sampler.steps)
    except UserError as error:
        problems.append(str(error))
    if train.updates_per_epoch > train.samples_per_epoch:
        problems.append(
            f"train.updates_per_epoch: got {train.updates_per_epoch}, expected at most the {train.samples_per_epoch} "
            "samples of an epoch (prompts_per_epoch * samples_per_prompt)"
        )
    if config.lora is None and config.model.dtype != "fp32":
        problems.append(
            f"lora: null trains the denoiser itself, in fp32, and model.dtype is {config.model.dtype}; set model.dtype "
            "to fp32 (with mixed_precision for speed), or train an adapter"
        )
    problems += _memory_conflicts(config)
    if config.mixed_precision == "fp16":
        problems.append("mixed_precision: fp16 loses small gradients, and there is no loss scaling; use bf16")
    plan = Plan(train.prompts_per_epoch, train.samples_per_prompt, train.updates_per_epoch)
    algorithm, reward = build_algorithm(config.algorithm), _sketched(config.reward)

    def refusal(dynamics: str) -> str:
        eta = noise_level(sampler.eta, dynamics, algorithm.noise)
        sketch: Any = _SamplerSketch(dynamics, eta, window, sampler.steps)
        try:
            algorithm.check(sketch, reward, plan)
        except UserError as error:
            return str(error)
        except AttributeError:
            # This algorithm's check wants the real objects: the trainer asks it again.
            pass
        return ""

    # What auto stands for is known with the model: it is refused if nothing that it can be will do.
    meant = [allowed[0] for allowed in DYNAMICS.values()] if sampler.dynamics == "auto" else [sampler.dynamics]
    refusals = [refusal(dynamics) for dynamics in meant]
    if all(refusals):
        problems.append(refusal(sampler.dynamics) or refusals[0])
    return problems


def _memory_conflicts(config: RunConfig) -> list[str]:
    """Return which memory and speed settings exclude one another."""
    model, problems = config.model, []
    if config.lora is None and "denoiser" in model.quantized_parts:
        problems.append("lora: null trains the denoiser itself, and quantised weights cannot be trained; set lora")
    if model.attention == "flash" and model.dtype == "fp32" and config.mixed_precision == "no":
        problems.append("model.attention: flash computes in half precision; set model.dtype to bf16, or choose sdpa")
    if config.train.sharding == "fsdp":
        for name, on in (("model.quantize", model.quantized_parts), ("compile", config.compile != "no")):
            if on:
                problems.append(f"{name}: not tried with train.sharding: fsdp; use one of the two")
    for how in sorted({how for how in model.quantized_parts.values() if how.startswith("bnb")}):
        if config.device in ("cpu", "mps"):
            problems.append(f"model.quantize: {how} needs a CUDA GPU, and device is {config.device}; use torchao-int8")
    if "reward" in config.offload and ALGORITHMS.get(config.algorithm["name"]).needs_gradient:
        problems.append(
            f"offload: algorithm {config.algorithm['name']!r} follows the reward's gradient, which needs it beside the "
            "model; leave reward out of offload"
        )
    return problems


def _sketched(spec: Any) -> Any:
    terms = [spec] if isinstance(spec, (str, Mapping)) else list(spec)
    kinds = [_reward_kind(name) for name in _names_in(terms)]
    return _RewardSketch(
        name=" + ".join("..." if isinstance(t, list) else t if isinstance(t, str) else t["name"] for t in terms),
        differentiable=all(kind.differentiable for kind in kinds),
        groupwise=any(kind.groupwise for kind in kinds),
    )


def _names_in(spec: Any) -> Iterator[str]:
    """Yield the names of all rewards in a specification, those that others are made of too."""
    if isinstance(spec, str):
        yield spec
    elif isinstance(spec, Mapping):
        yield spec["name"]
        if is_composed(spec["name"]):
            yield from _names_in(spec["of"])
    else:
        for term in spec:
            yield from _names_in(term)


def _reward_kind(name: str) -> Any:
    """Return something that knows whether the reward is differentiable: its class, or the object a function makes."""
    builder: Any = REWARDS.get(name)
    return builder if inspect.isclass(builder) else builder()
