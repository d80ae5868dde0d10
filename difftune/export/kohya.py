"""The layout of kohya's scripts, which ComfyUI and A1111 read, and the ModelSpec entries of a header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difftune.export.files import write_tensors
from difftune.export.folding import FoldedAdapter


def write_kohya(
    pipe: Any, group: Mapping[str, FoldedAdapter], stage: Path, name: str, header: Mapping[str, str]
) -> None:
    """Write the same tensors in kohya's layout, with the entries that A1111 and ComfyUI nodes look at."""
    from diffusers.utils import convert_state_dict_to_kohya

    tensors = {f"{prefix}.{key}": value for prefix, a in group.items() for key, value in a.tensors.items()}
    converted = convert_state_dict_to_kohya(_equal_ranks(tensors))
    # The converter writes alpha = rank as an integer: the right number for folded tensors, in the wrong type.
    ready = {k: (v.float() if k.endswith(".alpha") else v).contiguous() for k, v in converted.items()}
    ranks = [value.shape[0] for key, value in ready.items() if key.endswith("lora_down.weight")]
    version = _kohya_version(pipe)
    own = {
        "format": "pt",
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)),
        "ss_network_alpha": str(float(max(ranks))),
        "ss_network_args": "{}",
        "ss_output_name": name,
    }
    write_tensors(stage / f"{name}_kohya.safetensors", ready, {**model_spec(pipe, name), **header, **own})


def _equal_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad every pair A, B with zeros to the largest rank, which changes no product B A.

    diffusers' reader of kohya files loses the alphas of layers that differ from the rest and scales those wrongly.
    """
    rank = max(value.shape[0] for key, value in tensors.items() if key.endswith("lora_A.weight"))
    padded = {}
    for key, value in tensors.items():
        axis = 0 if key.endswith("lora_A.weight") else 1
        shape = [rank - size if i == axis else size for i, size in enumerate(value.shape)]
        padded[key] = torch.cat([value, value.new_zeros(shape)], dim=axis)
    return padded


def _kohya_version(pipe: Any) -> str:
    """Return kohya's name of the base model's generation, by which A1111 decides whether to offer the
    file."""
    if getattr(pipe, "text_encoder_2", None) is not None:
        return "sdxl_base_v1-0"
    return "sd_v2" if getattr(pipe.unet.config, "cross_attention_dim", 768) == 1024 else "sd_v1"


_ARCHITECTURES = {
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v1": "stable-diffusion-v1",
}


def model_spec(pipe: Any, name: str) -> dict[str, str]:
    """Return the ModelSpec entries, for the families whose architecture id is known; no date, two runs would differ."""
    kind = type(pipe).__name__
    if kind.startswith("StableDiffusion3"):
        architecture = "stable-diffusion-3"
    elif kind.startswith("Flux") and not kind.startswith(("Flux2", "Flux3")):
        architecture = "flux-1-dev"
    elif kind.startswith("StableDiffusion") and getattr(pipe, "unet", None) is not None:
        architecture = _ARCHITECTURES[_kohya_version(pipe)]
        if architecture.endswith("v2-512") and pipe.scheduler.config.get("prediction_type") == "v_prediction":
            architecture = "stable-diffusion-v2-768-v"
    else:
        return {}
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.description": "Trained with rewards by difftune",
    }
    sides = [getattr(pipe, key, None) for key in ("default_sample_size", "vae_scale_factor")]
    if all(isinstance(side, int) for side in sides):
        pixels = int(sides[0]) * int(sides[1])  # type: ignore[arg-type]
        spec["modelspec.resolution"] = f"{pixels}x{pixels}"
    return spec
