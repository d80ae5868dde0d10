"""Adapters and what they say they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftune.config import SamplerConfig
    from difftune.prompts import Prompt


def locate(adapter: Path) -> Path:
    """Return the adapter's folder or file: also when a run's folder is named."""
    from difftune.types import UserError

    if (adapter / "adapter").is_dir():
        return adapter / "adapter"
    if not adapter.exists():
        raise UserError(f"no adapter at {str(adapter)!r}: expected a folder or a .safetensors file")
    return adapter


def settings_of(adapter: Path) -> dict[str, Any]:
    """Return the configuration an adapter was made with: its run's ``config.yaml``, else what its header says.

    Plug-ins named there are for messages only: they run when the command line or a configuration of the user's names
    them, and not because a file from somewhere does.
    """
    import json

    from difftune.config import read_yaml
    from difftune.export import inspect_adapter
    from difftune.types import UserError

    folder = adapter if adapter.is_dir() else adapter.parent
    # Only a run's own adapter: a file that merely lies beside some run says itself what it was made with.
    if folder.name == "adapter" and (folder.parent / "config.yaml").is_file():
        settings = read_yaml(folder.parent / "config.yaml")
    else:
        header = inspect_adapter(adapter)["metadata"]
        try:
            settings = dict(json.loads(header.get("difftune.config", "{}")))
        except (ValueError, TypeError):
            raise UserError(f"{adapter}: the settings in its header are no JSON; give --model and --prompts") from None
        if "model" not in settings and "difftune.base_model" in header:
            settings["model"] = {"id": header["difftune.base_model"]}
    return settings


def model_of(settings: Mapping[str, Any], model: str | None) -> Any:
    """Return the base model: the one asked for, else the one the adapter names.

    Raises:
        UserError: there is neither.
    """
    from difftune.policy import ModelConfig
    from difftune.types import UserError

    if model is not None:
        return ModelConfig.model_validate({"id": model})
    if "model" not in settings:
        raise UserError("the adapter does not name its base model; give it with --model")
    # A kernel is a matter of the machine, which need not be the one that trained.
    stated = settings["model"]
    return ModelConfig.model_validate(
        {key: value for key, value in stated.items() if key != "attention"} if isinstance(stated, Mapping) else stated
    )


def asked_prompts(prompt: list[str] | None, prompts: str | None, settings: Mapping[str, Any]) -> list[Prompt]:
    """Return the prompts of the command line, else those the run held out."""
    from difftune.config import PromptsConfig, load_held_out
    from difftune.prompts import Prompt, load_prompts
    from difftune.types import UserError

    if prompt:
        return [Prompt(text) for text in prompt]
    if prompts is not None:
        return load_prompts(prompts)
    if "prompts" not in settings:
        raise UserError("no prompts: give --prompt 'two stars' or --prompts FILE")
    return load_held_out(PromptsConfig.model_validate(settings["prompts"]))


def call_of(sampler: SamplerConfig) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that a sampler's settings stand for."""
    wanted = {name: getattr(sampler, name) for name in ("height", "width", "negative_prompt")}
    return {**{name: value for name, value in wanted.items() if value is not None}, **sampler.call}
