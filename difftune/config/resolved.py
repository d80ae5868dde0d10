"""A validated configuration as plain data: to be written, to be published, to be compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from difftune.config.schema import RunConfig
from difftune.types import UserError

HARMLESS = (
    "out",
    "device",
    "threads",
    "evaluate",
    "monitor.action",
    "preset",
    "gradient_checkpointing",
    "compile",
    "offload",
    "model.attention",
    "model.vae_slicing",
    "train.epochs",
    "train.micro_batch",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.sample_count",
    "train.sharding",
    "sampler.batch_size",
    "sampler.store",
)
"""Keys that a resumed run may change: how long, how often, where and how much at once. Results stay what they would
have been, up to rounding."""


def resolve(config: RunConfig) -> dict[str, Any]:
    """Return every value of ``config`` as plain data, defaults included; :func:`validate` gives back its equal."""
    return config.model_dump(mode="json")


def published(config: RunConfig) -> dict[str, Any]:
    """Return :func:`resolve` without anything that names this machine: paths are cut to their last part."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

    data = {key: value for key, value in resolve(config).items() if key not in ("out", "device", "threads")}
    # Prompts are data: a prompt that looks like a path stays what it is.
    source = data["prompts"]["source"]
    data = cut(data)
    if not isinstance(source, str):
        data["prompts"]["source"] = source
    return data


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which two resolved configurations differ such that a resumed run would be another.

    What ``old`` does not say, since it was written before there was such a setting, is the setting's default.
    """
    before, after = dict(_flat(_completed(old))), dict(_flat(new))
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return sorted(key for key in differing if key.split(".")[0] not in HARMLESS and key not in HARMLESS)


def _completed(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``data`` with defaults where it says nothing; as it is, if it is no valid configuration any more."""
    try:
        # Without its preset: what the preset sets stands in the file, and what it has come to set since was not set.
        return resolve(RunConfig.model_validate({key: value for key, value in data.items() if key != "preset"}))
    except (ValidationError, UserError):
        return data


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, data
