"""Write a LoRA, or the trained weights of a run without one, and the model card beside it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from difftune.export.card import card_text
from difftune.export.files import (
    WEIGHTS,
    WEIGHTS_2,
    commit,
    file_name,
    header_of,
    rewrite_header,
    staging,
    write_tensors,
)
from difftune.export.folding import FoldedAdapter, carriers, check_finite, collect
from difftune.export.kohya import model_spec, write_kohya
from difftune.policy import pipeline_modules
from difftune.types import UserError


def save_adapter(
    pipe: Any,
    adapter_name: str,
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    base_model: str,
    name: str,
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write the LoRA ``adapter_name`` of every component of ``pipe`` that carries it, and a model card.

    Args:
        pipe: the pipeline; its components are only read.
        adapter_name: peft's name of the adapter, e.g. ``default``.
        folder: where to write; made if missing.
        config: the run's resolved configuration, for the header and the card.
        metadata: further header entries, strings, e.g. ``{"difftune.rewards": "clip_score"}``.
        base_model: id or folder of the model the adapter belongs to.
        name: the artifact's name, for the kohya file and the card's title; odd characters become ``_``.
        figures: ``{"before": {"reward/mean": ...}, "after": {...}}`` for the card.

    Returns:
        The files written, the weights first.

    Raises:
        NonFiniteError: an adapter tensor is NaN or infinite; nothing was written.
        UserError: no component carries the adapter, it is no LoRA that a file can hold, or ``name`` or
            ``metadata`` are unusable.
    """
    name = file_name(name)
    adapters = [collect(component, module, adapter_name) for component, module in carriers(pipe, adapter_name)]
    if not adapters:
        raise UserError(f"no component of {type(pipe).__name__} carries an adapter {adapter_name!r}")
    header = header_of(config, metadata, base_model, name)
    by_name = {adapter.component: adapter for adapter in adapters}
    stock = _stock_groups(pipe, by_name)
    with staging(folder) as stage:
        for filename, group in stock.items():
            _write_stock(pipe, group, stage, filename, header)
        first = stock.get(WEIGHTS, {})
        if "unet" in first and all(adapter.plain for adapter in first.values()):
            write_kohya(pipe, first, stage, name, header)
        written = {id(adapter) for group in stock.values() for adapter in group.values()}
        others = [adapter for adapter in adapters if id(adapter) not in written]
        for adapter in others:
            own = {"format": "pt", "difftune.component": adapter.component}
            own["lora_adapter_metadata"] = json.dumps(adapter.settings, sort_keys=True)
            write_tensors(stage / f"{adapter.component}.safetensors", adapter.tensors, {**header, **own})
        weights = sorted(path.name for path in stage.iterdir())
        card = card_text(pipe, adapters, weights, others, config, header, base_model, name, figures)
        (stage / "README.md").write_text(card, encoding="utf-8")
        weights.sort(key=lambda file: (file != WEIGHTS, file))
        return commit(stage, Path(folder), [*weights, "README.md"])


def save_weights(
    pipe: Any,
    folder: str | Path,
    *,
    names: Collection[str] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    base_model: str = "",
    name: str = "weights",
    figures: Mapping[str, Mapping[str, float]] | None = None,
) -> list[Path]:
    """Write the trained parameters of a run without LoRA, one file per component, and a model card.

    The files hold the parameters under their own names and dtypes; :func:`load_adapter` puts them back, and so does
    ``module.load_state_dict(..., strict=False)``.

    Args:
        pipe: the pipeline; its components are only read.
        folder: where to write; made if missing.
        names: which parameters, as ``component.path``; by default those that require grad.
        config: as in :func:`save_adapter`, like ``metadata``, ``base_model``, ``name`` and ``figures``.

    Raises:
        NonFiniteError: a parameter is NaN or infinite; nothing was written.
        UserError: there is nothing to save, or ``names`` has one that the pipeline has not.
    """
    name = file_name(name)
    header = header_of(config or {}, metadata or {}, base_model, name)
    trained: dict[str, dict[str, Tensor]] = {}
    for component, module in pipeline_modules(pipe).items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad if names is None else f"{component}.{key}" in names:
                trained.setdefault(component, {})[key] = parameter.detach().cpu()
    found = {f"{component}.{key}" for component, tensors in trained.items() for key in tensors}
    missing = sorted(set(names or ()) - found)
    if missing or not found:
        what = f"it has no {missing[0]}" if missing else "no parameter requires grad"
        raise UserError(f"nothing to save of {type(pipe).__name__}: {what}")
    for component, tensors in trained.items():
        check_finite(component, tensors)
    with staging(folder) as stage:
        for component, tensors in trained.items():
            own = {"format": "pt", "difftune.component": component, "difftune.kind": "weights"}
            write_tensors(stage / f"{component}.safetensors", tensors, {**header, **own})
        weights = sorted(path.name for path in stage.iterdir())
        card = card_text(pipe, [], weights, list(trained), config or {}, header, base_model, name, figures)
        (stage / "README.md").write_text(card, encoding="utf-8")
        return commit(stage, Path(folder), [*weights, "README.md"])


def _stock_groups(pipe: Any, adapters: Mapping[str, FoldedAdapter]) -> dict[str, dict[str, FoldedAdapter]]:
    """Return file name -> (argument prefix of ``save_lora_weights`` -> adapter) for what diffusers can load."""
    save = getattr(type(pipe), "save_lora_weights", None)
    if save is None or not hasattr(pipe, "load_lora_weights"):
        return {}
    accepted = inspect.signature(save).parameters
    groups: dict[str, dict[str, FoldedAdapter]] = {}
    for component, adapter in adapters.items():
        if f"{component}_lora_layers" in accepted:
            groups.setdefault(WEIGHTS, {})[component] = adapter
        elif component == "transformer_2" and "transformer_lora_layers" in accepted:
            groups.setdefault(WEIGHTS_2, {})["transformer"] = adapter
    return groups


def _write_stock(
    pipe: Any, group: Mapping[str, FoldedAdapter], stage: Path, filename: str, header: Mapping[str, str]
) -> None:
    """Let the pipeline class write the file, then add our entries to its header."""
    save = type(pipe).save_lora_weights
    accepted = inspect.signature(save).parameters
    arguments: dict[str, Any] = {}
    for prefix, adapter in group.items():
        arguments[f"{prefix}_lora_layers"] = adapter.tensors
        if f"{prefix}_lora_adapter_metadata" in accepted:
            arguments[f"{prefix}_lora_adapter_metadata"] = dict(adapter.settings)
    save(save_directory=str(stage), weight_name=filename, safe_serialization=True, **arguments)
    spec = model_spec(pipe, header["difftune.name"])
    rewrite_header(stage / filename, {**spec, **header})
