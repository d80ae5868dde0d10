"""Presets by GPU memory: named compositions of the memory and speed settings.

They are meant for the models of the recipes, up to SDXL's size (2.6 billion weights) at the recipes' picture sizes; for
larger denoisers take the next smaller preset, or quantise (``model.quantize``). They are forecasts: ``difftune check``
measures. Batch sizes change memory and time, not results; a quantised base is another base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from difftune.algorithm import ALGORITHMS

PresetName = Literal["8GB", "12GB", "24GB", "80GB"]
"""A GPU's memory."""

_SMALL: dict[str, Any] = {
    "model": {"dtype": "bf16", "vae_slicing": True, "vae_tiling": True},
    "gradient_checkpointing": True,
    "offload": ["text_encoders", "reward"],
    "sampler": {"batch_size": 1, "store": "host"},
    "train": {"micro_batch": 1},
}

PRESETS: dict[str, dict[str, Any]] = {
    "8GB": {**_SMALL, "model": {**_SMALL["model"], "quantize": {"denoiser": "bnb-4bit", "text_encoders": "bnb-4bit"}}},
    "12GB": {**_SMALL, "model": {**_SMALL["model"], "quantize": {"text_encoders": "bnb-4bit"}}},
    "24GB": {
        "model": {"dtype": "bf16", "vae_slicing": True},
        "gradient_checkpointing": True,
        "offload": ["text_encoders", "reward"],
        "sampler": {"batch_size": 4, "store": "host"},
        "train": {"micro_batch": 2},
    },
    "80GB": {
        "model": {"dtype": "bf16"},
        "gradient_checkpointing": False,
        "offload": [],
        "sampler": {"batch_size": 16, "store": "device"},
        "train": {"micro_batch": 8},
    },
}
"""Preset to what it sets."""


def with_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with what its ``preset`` says filled in where it says nothing itself."""
    return merged(_settings_of(data.get("preset"), data), data)


def over_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with what its ``preset`` says in place of what it says itself.

    What is offloaded depends on the algorithm, which may still change: that is left to :func:`with_preset`.
    """
    settings = dict(_settings_of(data.get("preset"), data))
    left = "offload" if settings.pop("offload", None) is not None else None
    return merged({key: value for key, value in data.items() if key != left}, settings)


def _settings_of(preset: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a preset sets for a run; nothing if there is none of that name, which validation will say."""
    if not isinstance(preset, str) or preset not in PRESETS:
        return {}
    settings = PRESETS[preset]
    algorithm = data.get("algorithm")
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm
    if isinstance(name, str) and name in ALGORITHMS and ALGORITHMS.get(name).needs_gradient:
        # The reward's gradient is part of the update, so the reward is never idle.
        settings = {**settings, "offload": [what for what in settings["offload"] if what != "reward"]}
    return settings


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return both mappings in one, section by section; where both say something, ``over`` counts."""
    out = dict(under)
    for key, value in over.items():
        before: Any = out.get(key)
        if key == "model" and isinstance(value, str):
            value = {"id": value}
        if key == "model" and isinstance(before, str):
            before = {"id": before}
        # A quantisation is one choice: two mappings of it do not mix.
        nested = isinstance(before, Mapping) and isinstance(value, Mapping) and key != "quantize"
        out[key] = merged(before, value) if nested else value
    return out
