"""The model card: Markdown with the front matter that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difftune.export.files import WEIGHTS, WEIGHTS_2, commit, staging
from difftune.export.folding import FoldedAdapter
from difftune.types import UserError


def card_text(
    pipe: Any,
    adapters: list[FoldedAdapter],
    files: list[str],
    own_layout: list[Any],
    config: Mapping[str, Any],
    header: Mapping[str, str],
    base_model: str,
    name: str,
    figures: Mapping[str, Mapping[str, float]] | None,
) -> str:
    """Return the model card: Markdown with the front matter that model hubs read.

    JSON strings are valid YAML, and code spans and fences longer than any run of backticks inside keep what
    users wrote (prompts, names) from becoming markup.
    """
    kind = "LoRA" if adapters else "set of trained weights"
    facts = [("Base model", base_model or "not named"), ("Pipeline", type(pipe).__name__)]
    facts += [(title, _brief(config[key])) for key, title in _CARD_ROWS.items() if config.get(key) is not None]
    for adapter in adapters:
        ranks = sorted({v.shape[0] for k, v in adapter.tensors.items() if k.endswith("lora_A.weight")})
        layers = sum(key.endswith("lora_A.weight") for key in adapter.tensors)
        facts.append((f"Adapter on {adapter.component}", f"rank {', '.join(map(str, ranks))}, {layers} layers"))
    facts += [("Trained with", f"difftune {header['difftune.version']}")]
    tags = ["difftune", *(["lora"] if adapters else []), "reward-finetuning"]
    blocks = [
        "---",
        *([f"base_model: {json.dumps(base_model)}"] if base_model else []),
        "library_name: diffusers",
        f"tags: {json.dumps(tags)}",
        "---",
        "",
        f"# {name}",
        "",
        f"A {kind} for {_code(base_model or 'the base model')}, fine-tuned with rewards.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {title} | {_code(value)} |" for title, value in facts),
        "",
        *_figure_rows(figures),
        "## Use",
        "",
        *_usage(pipe, files, own_layout, base_model, bool(adapters)),
        "## Files",
        "",
        *(f"- {_code(file)}: {_describe(file)}" for file in files),
        "",
        "## Configuration",
        "",
        _fence(json.dumps(config, indent=2, sort_keys=True, default=str), "json"),
        "",
    ]
    return "\n".join(blocks)


_CARD_ROWS = {"algorithm": "Algorithm", "reward": "Reward", "prompts": "Prompts"}
"""Configuration keys that the card's table shows, with their titles."""


def _brief(value: Any, limit: int = 160) -> str:
    """Say a setting in one line: a name with its settings, a list by its first entries."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _code(text: str) -> str:
    """Return ``text`` as a Markdown code span that fits into a table cell."""
    flat = " ".join(str(text).split()).replace("|", "¦")
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{ticks}{pad}{flat or ' '}{pad}{ticks}"


def _fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _figure_rows(figures: Mapping[str, Mapping[str, float]] | None) -> list[str]:
    if not figures:
        return []
    columns = list(figures)
    names = list(dict.fromkeys(key for column in columns for key in figures[column]))
    rows = [f"| | {' | '.join(_code(column) for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key in names:
        cells = [f"{figures[c][key]:.4g}" if key in figures[c] else "" for c in columns]
        rows.append(f"| {_code(key)} | {' | '.join(cells)} |")
    return ["## Figures", "", *rows, ""]


def add_figures(folder: str | Path, figures: Mapping[str, Mapping[str, float]]) -> Path:
    """Put figures measured later into the model card of an adapter's folder, in place of those it has.

    Args:
        folder: where :func:`~difftune.export.save_adapter` wrote; the card is replaced whole.
        figures: ``{"before": {"reward/mean": ...}, "after": {...}}``.

    Raises:
        UserError: there is no card of ours.
    """
    card = Path(folder) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    # Above "Use" stand the front matter, the title and table rows: no line there begins as users please.
    head, use, rest = text.partition("\n## Use\n")
    if not use:
        raise UserError(f"{str(card)!r} is no model card of an adapter; expected a folder that save_adapter wrote")
    head = head.partition("\n## Figures\n")[0].rstrip("\n")
    with staging(folder) as stage:
        written = "\n".join([head, "", *_figure_rows(figures)]) + use + rest
        (stage / card.name).write_text(written, encoding="utf-8")
        commit(stage, Path(folder), [card.name])
    return card


def _usage(pipe: Any, files: list[str], own_layout: list[Any], base_model: str, lora: bool) -> list[str]:
    """Return how to load the files: by stock diffusers where it can, and why not where it cannot."""
    base = json.dumps(base_model or "path/to/the/base/model")
    # The embedded models are no hub ids: their folder has to be asked for.
    loaded = f"difftune.load_pipeline({base})" if base_model.startswith("difftune/") else None
    lines = ["import difftune" if loaded else "from diffusers import DiffusionPipeline", ""]
    lines.append(f"pipe = {loaded or f'DiffusionPipeline.from_pretrained({base})'}")
    if WEIGHTS in files:
        lines.append(f'pipe.load_lora_weights("path/to/this/folder", weight_name="{WEIGHTS}")')
    if WEIGHTS_2 in files:
        lines.append(
            f'pipe.load_lora_weights("path/to/this/folder", weight_name="{WEIGHTS_2}", load_into_transformer_2=True)'
        )
    text = []
    if own_layout:
        lines = ["from difftune.export import load_adapter", *lines, 'load_adapter(pipe, "path/to/this/folder")']
        what = "loads no LoRA of this kind" if lora else "does not load single trained parameters"
        text = [f"{_code(type(pipe).__name__)} {what} by itself, so difftune puts the files back:", ""]
    strength = "The strength (alpha / rank) is part of the weights: load at scale 1." if lora else ""
    return [*text, _fence("\n".join(lines), "python"), "", *([strength, ""] if strength else [])]


def _describe(file: str) -> str:
    if file in (WEIGHTS, WEIGHTS_2):
        return "diffusers" + (" (second expert)" if file == WEIGHTS_2 else "")
    return "ComfyUI and A1111" if file.endswith("_kohya.safetensors") else "one component, for difftune"
