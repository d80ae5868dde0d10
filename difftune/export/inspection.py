"""Describe a LoRA file, whoever wrote it, and predict who will load how much of it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.export.files import adapter_files, read_header


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Describe a LoRA file without loading a model.

    Args:
        path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors``.

    Returns:
        ``file``; ``format`` (``diffusers``, ``kohya``, ``peft``, ``comfy``, ``weights`` or ``unknown``);
        ``family``, a guess from the keys; ``components``; ``layers``, ``tensors`` and ``parameters``
        (counts); ``dtypes``; ``ranks`` (sorted); ``alphas`` (sorted; where the file has none, alpha is the
        rank); ``scales``, the factors alpha / rank that a reader has to apply; ``norm``, the Frobenius norm
        of all updates scale * B A together; ``finite``;
        ``loaders``: for diffusers, ComfyUI and A1111 ``{"matched": layers it will apply, "total": layers,
        "note": why}``, predicted from the rules by which they match keys; ``metadata``, the header.

    Raises:
        UserError: no such file, or not a safetensors file.
    """
    from safetensors.torch import load_file

    source = Path(path)
    file = source if source.is_file() else adapter_files(source)[0]
    header = read_header(file)
    tensors = load_file(file)
    pairs = _pairs(tensors)
    layout = _layout(tensors, pairs, header)
    family = _family(tensors, header)
    ranks = {layer: down.shape[0] for layer, (down, _) in pairs.items()}
    alphas = _alphas(tensors, header, ranks, layout)
    scales = {layer: alphas[layer] / ranks[layer] for layer in pairs}
    squares = sum(scales[layer] ** 2 * _square_norm(*pair) for layer, pair in pairs.items())
    return {
        "file": str(file),
        "format": layout,
        "family": family,
        "components": sorted({_component(layer, header) for layer in pairs or tensors}),
        "layers": len(pairs),
        "tensors": len(tensors),
        "parameters": sum(v.numel() for k, v in tensors.items() if not k.endswith(".alpha")),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}),
        "ranks": sorted(set(ranks.values())),
        "alphas": sorted(set(alphas.values())),
        "scales": sorted(set(scales.values())),
        "norm": math.sqrt(squares) if math.isfinite(squares) else squares,
        "finite": all(bool(torch.isfinite(value).all()) for value in tensors.values()),
        "loaders": _loaders(list(pairs), layout, family, alphas, ranks),
        "metadata": header,
    }


_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight")

_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight")


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> (A, B) for every complete pair."""
    pairs = {}
    for down, up in zip(_DOWN, _UP, strict=True):
        for key in tensors:
            layer = key.removesuffix(down)
            if layer != key and layer + up in tensors:
                pairs[layer] = (tensors[key], tensors[layer + up])
    return pairs


def _square_norm(down: Tensor, up: Tensor) -> float:
    """Return the squared Frobenius norm of B A without forming it: trace(A A^T B^T B)."""
    a, b = down.double().flatten(1), up.double().flatten(1)
    return float(((a @ a.T) * (b.T @ b)).sum())


def _layout(tensors: Mapping[str, Tensor], pairs: Mapping[str, Any], header: Mapping[str, str]) -> str:
    if header.get("difftune.kind") == "weights":
        return "weights"
    layers = list(pairs)
    if any(layer.startswith(("lora_unet_", "lora_te")) for layer in layers):
        return "kohya"
    if "difftune.component" in header or any(layer.startswith("base_model.model.") for layer in layers):
        return "peft"
    if any(layer.startswith("diffusion_model.") for layer in layers):
        return "comfy"
    known = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")
    return "diffusers" if layers and all(layer.startswith(known) for layer in layers) else "unknown"


def _component(layer: str, header: Mapping[str, str]) -> str:
    if "difftune.component" in header:
        return header["difftune.component"]
    kohya = {"lora_unet_": "unet", "lora_te2_": "text_encoder_2", "lora_te": "text_encoder"}
    for prefix, component in kohya.items():
        if layer.startswith(prefix):
            return component
    return layer.split(".")[0]


def _family(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Guess the model family from the keys, or from what a header says."""
    keys = " ".join(tensors)
    if "unet." in keys or "lora_unet_down_blocks" in keys or "lora_unet_input_blocks" in keys:
        named = header.get("ss_base_model_version", header.get("modelspec.architecture", ""))
        if named.startswith(("sdxl", "stable-diffusion-xl")) or "text_encoder_2" in keys or "lora_te2" in keys:
            return "SDXL"
        return "SD 2" if named.startswith(("sd_v2", "stable-diffusion-v2")) else _unet_by_width(tensors)
    if "single_transformer_blocks" in keys or "double_blocks" in keys:
        return "Flux"
    if re.search(r"transformer\.transformer_blocks\.\d+\.attn2?\.add_[qkv]_proj", keys):
        return "SD 3"
    return str(header.get("modelspec.architecture", "unknown")).removesuffix("/lora") or "unknown"


def _unet_by_width(tensors: Mapping[str, Tensor]) -> str:
    """Tell SD 1, SD 2 and SDXL apart by the width of the text features that cross-attention reads."""
    for key, value in tensors.items():
        if re.search(r"attn2[._]to_k[._].*(lora_A|down)", key):
            return {1024: "SD 2", 2048: "SDXL"}.get(value.shape[1], "SD 1")
    return "SD 1"


def _alphas(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], ranks: Mapping[str, int], layout: str
) -> dict[str, float]:
    """Return each layer's alpha: its own tensor, else the stored settings', else the rank."""
    stored: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        stored = dict(json.loads(header.get("lora_adapter_metadata", "{}")))
    alphas = {}
    for layer, rank in ranks.items():
        component, _, path = layer.partition(".") if layout == "diffusers" else ("", "", layer)
        settings = {k.removeprefix(f"{component}."): v for k, v in stored.items()} if component else stored
        alpha = settings.get("lora_alpha", rank)
        # A pattern is the end of a layer's path. peft reads it as a regular expression, which is not safe to run
        # from somebody's file.
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if f".{path}".endswith(f".{pattern.lstrip('^')}"):
                alpha = value
        own = tensors.get(f"{layer}.alpha")
        alphas[layer] = float(own) if own is not None and layout != "diffusers" else float(alpha)
    return alphas


_COMFY_TRANSFORMERS = ("SD 3", "Flux")

_ATTENTION = re.compile(r"\.to_(q|k|v|out\.0)$")


def _loaders(
    layers: list[str], layout: str, family: str, alphas: Mapping[str, float], ranks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Predict how many layers each program applies, by the rules with which it matches keys."""
    total = len(layers)
    kohya_only = (0, "reads kohya's layout only")
    if layout == "kohya":
        return _loader_table(total, diffusers=(total, ""), ComfyUI=(total, ""), A1111=(total, ""))
    if layout == "diffusers":
        comfy = _comfy_on_diffusers(layers, family, all(alphas[layer] == ranks[layer] for layer in layers))
        return _loader_table(total, diffusers=(total, ""), ComfyUI=comfy, A1111=kohya_only)
    if layout == "comfy":
        return _loader_table(total, diffusers=(0, "depends on the family"), ComfyUI=(total, ""), A1111=kohya_only)
    why = "difftune.export.load_adapter loads it" if layout in ("peft", "weights") else "unknown layout"
    return _loader_table(total, diffusers=(0, why), ComfyUI=(0, why), A1111=(0, why))


def _comfy_on_diffusers(layers: list[str], family: str, folded: bool) -> tuple[int, str]:
    """Return how many layers of a diffusers file ComfyUI applies, and what is to be said of it."""
    lost = [layer for layer in layers if layer.startswith("unet.") and _ATTENTION.search(layer)]
    notes = ["attention keys of a UNet need the kohya file"] if lost else []
    if any(layer.startswith("transformer.") for layer in layers) and family not in _COMFY_TRANSFORMERS:
        notes.append("if it knows the model family")
    if not folded:
        notes.append("at the wrong strength, because alpha is not in the tensors")
    return len(layers) - len(lost), "; ".join(notes)


def _loader_table(total: int, **programs: tuple[int, str]) -> dict[str, dict[str, Any]]:
    return {name: {"matched": hits, "total": total, "note": note} for name, (hits, note) in programs.items()}
