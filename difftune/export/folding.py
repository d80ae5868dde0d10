"""From peft's layers to tensors ready to be written: ``alpha / r`` folded into B, in fp32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difftune.policy import pipeline_modules
from difftune.types import NonFiniteError, UserError

_PEFT_DEFAULTS = ("peft_type", "inference_mode", "init_lora_weights", "lora_dropout", "base_model_name_or_path")
"""Settings that matter to training only; a reader of another peft version may not know every field, so few
are kept."""


@dataclass(frozen=True)
class FoldedAdapter:
    """One component's adapter, ready to be written: ``W x + B A x`` with no scale beside the tensors.

    Attributes:
        component: name in the pipeline, e.g. ``unet``.
        tensors: peft keys without the adapter's name -> fp32 tensors on the CPU, alpha folded in.
        settings: the entries of a ``peft.LoraConfig`` that rebuild it, with ``lora_alpha == r``.
    """

    component: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether it is nothing but pairs A, B, which is all that kohya's layout holds."""
        return all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in self.tensors)


def carriers(pipe: Any, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (component, network) of every component that carries the adapter."""
    for component, module in pipeline_modules(pipe).items():
        if adapter_name in _configs(module):
            yield component, module


def _configs(module: nn.Module) -> Mapping[str, Any]:
    """Return the adapters a module carries: name -> peft configuration."""
    configs: Any = getattr(module, "peft_config", None)
    return configs or {}


def collect(component: str, module: nn.Module, adapter_name: str) -> FoldedAdapter:
    """Read a component's adapter and fold its scales into B.

    Raises:
        NonFiniteError: a tensor is NaN or infinite.
        UserError: it is no LoRA, or a LoRA that a file cannot hold.
    """
    from peft import LoraConfig, get_peft_model_state_dict

    config = _configs(module)[adapter_name]
    if not isinstance(config, LoraConfig):
        raise UserError(f"{component}: adapter {adapter_name!r} is {type(config).__name__}, expected a LoRA")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal"):
        # PiSSA, OLoRA and their kin change the base weights, which a LoRA file does not hold.
        raise UserError(
            f"{component}: initialised by {config.init_lora_weights!r}, which alters the base model; "
            "expected true, 'gaussian' or 'orthogonal'"
        )
    state = get_peft_model_state_dict(module, adapter_name=adapter_name, save_embedding_layers=False)
    foreign = [key for key in state if "lora_" not in key]
    if foreign:
        raise UserError(f"{component}: {foreign[0]} is trained beside the LoRA and fits into no LoRA file")
    check_finite(component, state)
    scales = _scales(module, adapter_name)
    tensors = {}
    for key, value in state.items():
        path, _, part = key.partition(".lora_")
        folded = value.detach().float().cpu()
        if part.startswith(("B.", "embedding_B")):
            folded = folded * scales[path]
        tensors[_published(key, module)] = folded.contiguous()
    check_finite(component, tensors)
    return FoldedAdapter(component, tensors, _settings(config, list(scales)))


def _scales(module: nn.Module, adapter_name: str) -> dict[str, float]:
    """Return the trained strength of every adapted layer: alpha / r, or alpha / sqrt(r) when rank-stabilised.

    Taken from the layer's own r and alpha, which know the per-layer patterns. The layer's ``scaling`` is not
    used: it is also what ``set_adapters(weights=...)`` turns for one session.
    """
    scales = {}
    for path, layer in module.named_modules():
        if adapter_name in getattr(layer, "lora_alpha", {}):
            rank, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
            stabilised = layer.use_rslora.get(adapter_name, False)
            scales[path] = alpha / (math.sqrt(rank) if stabilised else rank)
    return scales


def _published(key: str, module: nn.Module) -> str:
    """Return the key under the name that files use.

    transformers 5.6 dropped the ``text_model.`` level of CLIPTextModel; files, ComfyUI and A1111 still have
    it, and diffusers takes it off again on loading.
    """
    flat = type(module).__name__ == "CLIPTextModel" and not hasattr(module, "text_model")
    return f"text_model.{key}" if flat else key


def _settings(config: Any, layers: list[str]) -> dict[str, Any]:
    """Return the entries of a LoraConfig that rebuild the folded adapter: what differs from the defaults.

    ``layers`` are the adapted ones: targets given as a regular expression are written out, since a reader would have
    to run the expression.
    """
    default = type(config)().to_dict()
    settings = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if key not in _PEFT_DEFAULTS and value != default.get(key)
    }
    settings.pop("use_rslora", None)
    ranks = dict(config.rank_pattern or {})
    settings.update(r=config.r, lora_alpha=config.r, rank_pattern=ranks, alpha_pattern=dict(ranks))
    targets = config.target_modules
    settings["target_modules"] = sorted(layers if isinstance(targets, str) else targets or [])
    return settings


def check_finite(component: str, tensors: Mapping[str, Tensor]) -> None:
    """Stop before anything is written.

    Raises:
        NonFiniteError: a tensor holds NaN or infinite values.
    """
    for key, value in tensors.items():
        if not torch.isfinite(value.detach()).all():
            raise NonFiniteError(
                f"{component}.{key} holds NaN or infinite values; nothing was written, "
                "the last checkpoint is intact: resume from it with a lower learning rate"
            )
