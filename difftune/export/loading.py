"""Put a saved adapter, or saved weights, back into a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from difftune.export.files import WEIGHTS_2, adapter_files, read_header
from difftune.policy import pipeline_modules
from difftune.types import UserError


def load_adapter(pipe: Any, path: str | Path, adapter_name: str = "default") -> None:
    """Load what :func:`save_adapter` or :func:`save_weights` wrote into ``pipe``.

    LoRA files go through the pipeline's own ``load_lora_weights``; files in peft's layout, and trained
    weights, are put into the components they name.

    Args:
        pipe: a pipeline of the class the file was made for.
        path: the folder, or one of its ``.safetensors`` files (also a kohya file, or a LoRA made elsewhere).
        adapter_name: the name the adapter gets; unused for trained weights.

    Raises:
        UserError: there is no adapter at ``path``, or the pipeline has no such component or parameter.
    """
    source = Path(path)
    files = [source] if source.is_file() else adapter_files(source)
    for file in files:
        header = read_header(file)
        component = header.get("difftune.component")
        if component is not None:
            _load_component(pipe, component, file, header, adapter_name)
        elif not hasattr(pipe, "load_lora_weights"):
            raise UserError(f"{file} is a LoRA file, but {type(pipe).__name__} cannot load one: wrong base model?")
        else:
            options = {"load_into_transformer_2": True} if file.name == WEIGHTS_2 else {}
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name, **options)


def _load_component(pipe: Any, component: str, file: Path, header: Mapping[str, str], adapter_name: str) -> None:
    from safetensors.torch import load_file

    module = pipeline_modules(pipe).get(component)
    if module is None:
        raise UserError(f"{file} is for the component {component!r}, which {type(pipe).__name__} does not have")
    tensors = load_file(file)
    if header.get("difftune.kind") == "weights":
        own = dict(module.named_parameters())
        odd = [key for key, value in tensors.items() if key not in own or own[key].shape != value.shape]
        if odd:
            raise UserError(f"{file} does not fit {component}: {odd[0]} is missing there or has another shape")
        with torch.no_grad():
            for key, value in tensors.items():
                own[key].copy_(value)
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    try:
        settings = dict(json.loads(header["lora_adapter_metadata"]))
        if not isinstance(settings.get("target_modules"), list):
            # peft would run a string as a regular expression, and this one comes from somebody's file.
            raise TypeError("target_modules is no list")
        config = LoraConfig(**settings)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file}: the adapter's settings in its header cannot be read ({error})") from error
    try:
        if hasattr(module, "add_adapter"):
            module.add_adapter(config, adapter_name=adapter_name)  # type: ignore[operator]
        else:
            inject_adapter_in_model(config, module, adapter_name=adapter_name)
        result = set_peft_model_state_dict(module, tensors, adapter_name=adapter_name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{file} does not fit {component}: {str(error).splitlines()[0]}") from error
    if result is not None and result.unexpected_keys:
        raise UserError(f"{file} does not fit {component}: it has no {result.unexpected_keys[0]}")
    module.to(next(module.parameters()).device)
