"""The pages of docs/algorithms/ say what the code says; ``python tests/test_algorithm_docs.py`` writes them anew.

What stands between the markers is made from the algorithm's docstring, settings and metrics; the rest is written by
hand and kept.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import annotated_types
import pytest
import yaml

from difftune.algorithm import ALGORITHMS
from difftune.config import load_config, recipe_text, recipes

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "algorithms"
START, END = "<!-- algorithm: begin -->", "<!-- algorithm: end -->"
BUILT_IN = [name for name in ALGORITHMS if ALGORITHMS.origin(name).startswith("difftune.algorithms.")]

#: Where an algorithm has no recipe for an embedded model, this one with other settings runs it on the embedded model.
BASE = "ddpo-compressibility-tiny-sd"

EVIDENCE = {
    "transitions": "transitions: the log-probs of the sampler's noisy steps, replayed",
    "samples": "samples: finished pictures, noised again and denoised at a few levels",
    "gradient": "gradient: pictures with a graph back to the weights",
}


def prose(text: str) -> str:
    """Return a docstring as Markdown: formulas between dollars, code in single backticks, one line a paragraph."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = [line.strip() for line in block.splitlines()]
        if lines[0].startswith(".. math::"):
            formula = "\n".join([lines[0].removeprefix(".. math::").strip(), *lines[1:]])
            blocks.append(f"$$\n{formula}\n$$")
        elif lines[0].startswith("- "):
            items = re.split(r"\n- ", "\n".join(lines))
            blocks.append("\n".join("- " + item.removeprefix("- ").replace("\n", " ") for item in items))
        else:
            blocks.append(" ".join(lines))
    joined = "\n\n".join(blocks).replace("``", "`")
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", joined)


def allowed(info: Any) -> str:
    """Return what a setting may be: choices, type and bounds."""
    kinds = [info.annotation] if get_origin(info.annotation) is Literal else get_args(info.annotation)
    if get_origin(info.annotation) is tuple:
        kinds = [info.annotation]
    names = []
    for kind in kinds or [info.annotation]:
        if get_origin(kind) is Literal:
            names += [f"`{choice}`" for choice in get_args(kind)]
        elif get_origin(kind) is tuple:
            names.append(f"{len(get_args(kind))} numbers")
        else:
            names.append({float: "number", int: "whole number", bool: "true, false", str: "text"}.get(kind, "null"))
    signs = ((annotated_types.Gt, "gt", ">"), (annotated_types.Ge, "ge", "≥"),
             (annotated_types.Lt, "lt", "<"), (annotated_types.Le, "le", "≤"))  # fmt: skip
    bounds = [
        f"{sign} {getattr(item, name):g}" for item in info.metadata for kind, name, sign in signs
        if isinstance(item, kind)
    ]  # fmt: skip
    return " ".join([", ".join(names), *([", ".join(bounds)] if bounds else [])])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{item:g}" for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(name: str) -> str:
    """Return the table of an algorithm's settings, its own before those that all have."""
    fields = ALGORITHMS.get(name).Config.model_fields
    rows = [
        [f"`{key}`", f"`{shown(info.default)}`", allowed(info), (info.description or "").replace("``", "`")]
        for key, info in fields.items()
    ]
    return table(["setting", "default", "values", "what it is, its unit, and where the value comes from"], rows)


def recipes_of(name: str) -> list[str]:
    """Return the recipes of an algorithm."""
    found = []
    for recipe in recipes():
        spec = yaml.safe_load(recipe_text(recipe))["algorithm"]
        if (spec if isinstance(spec, str) else spec["name"]) == name:
            found.append(recipe)
    return found


def on_embedded_model(recipe: str) -> bool:
    """Whether the recipe trains a model that ships with the package."""
    return load_config(recipe).model.id.startswith("difftune/")


def overrides_of(name: str) -> list[str]:
    """Return the settings that make the base recipe one of this algorithm."""
    reward = ["reward=jpeg_proxy"] if ALGORITHMS.get(name).needs_gradient else []
    return [f"algorithm={{name: {name}}}", *reward]


def commands_of(name: str) -> str:
    own = recipes_of(name)
    embedded = [recipe for recipe in own if on_embedded_model(recipe)]
    real = [recipe for recipe in own if recipe not in embedded]
    quoted = " ".join(f"'{item}'" if " " in item else item for item in overrides_of(name))
    blocks = ["On the embedded models:" if embedded else "On the embedded model, unmeasured:"]
    blocks.append("\n".join(f"    difftune train {recipe}" for recipe in embedded or [f"{BASE} {quoted}"]))
    if real:
        blocks.append("On real models, each value with its source; we have not run these at their size:")
        blocks.append("\n".join(f"    difftune train {recipe}" for recipe in real))
    return "\n\n".join(blocks)


def curves_of(name: str) -> list[str]:
    """Return the picture of the algorithm's measured curves, where there are any."""
    if not (FOLDER.parent / "results" / f"{name}.svg").exists():
        return []
    return [f"[Measured](../results.md) on the embedded models:\n\n![Training reward of {name}](../results/{name}.svg)"]


def generated(name: str) -> str:
    """Return what stands between the markers of an algorithm's page."""
    kind: Any = ALGORITHMS.get(name)
    title, *body = (sys.modules[kind.__module__].__doc__ or "").split("\n\n", 1)
    needs = [
        f"- evidence: {EVIDENCE[kind.evidence]}",
        f"- reward: {'differentiable' if kind.needs_gradient else 'any'}",
        f"- samples per prompt: {'two or more' if kind.compares else 'any number'}",
    ]
    if "data" in kind.Config.model_fields:
        needs.append("- or labelled pictures in place of rollouts: [preference files](preferences.md)")
    metrics = table(["metric", "what it says"], [[f"`{key}`", text] for key, text in kind.metrics.items()])
    return "\n\n".join(
        [
            f"# {prose(title).rstrip('.')}",
            f"Paper: {kind.paper}. Code: [`algorithms/{name}.py`](../../algorithms/{name}.py).",
            *(prose(text) for text in body),
            "## What it needs",
            "\n".join(needs),
            "## Run it",
            commands_of(name),
            *curves_of(name),
            "## Settings",
            f"Under `algorithm:`, with `name: {name}`.",
            settings_of(name),
            "## Metrics",
            "In every line of `metrics.jsonl`, beside those that [all algorithms have](index.md#metrics).",
            metrics,
        ]
    )


def listing() -> str:
    """Return the index's table."""
    rows = []
    for name in BUILT_IN:
        kind = ALGORITHMS.get(name)
        reward = "differentiable" if kind.needs_gradient else "any"
        rows.append([f"[`{name}`]({name}.md)", kind.evidence, reward, kind.paper])
    return table(["name", "evidence", "reward", "paper"], rows)


def between(text: str) -> str:
    return text.split(START)[1].split(END)[0].strip()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_page_is_up_to_date(name: str) -> None:
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert between(text) == generated(name), "stale: run python tests/test_algorithm_docs.py"
    assert "results.md" in text.split(END)[1], "the page says where measured curves are"


def test_the_index_is_up_to_date() -> None:
    assert between((FOLDER / "index.md").read_text(encoding="utf-8")) == listing(), (
        "stale: run python tests/test_algorithm_docs.py"
    )
    pages = {path.stem for path in FOLDER.glob("*.md")} - {"index", "preferences"}
    assert pages == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_commands_are_configurations(name: str) -> None:
    for recipe in recipes_of(name):
        assert load_config(recipe).algorithm["name"] == name
    if not any(map(on_embedded_model, recipes_of(name))):
        assert load_config(BASE, overrides_of(name)).algorithm["name"] == name


@pytest.mark.parametrize("name", BUILT_IN)
def test_settings_in_the_text_exist(name: str) -> None:
    """YAML of the hand-written part is checked against the settings."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8").split(END)[1]
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        spec = yaml.safe_load(block).get("algorithm", {})
        assert spec.pop("name", name) == name
        ALGORITHMS.get(name).Config.model_validate(spec)


if __name__ == "__main__":
    for page, block in [("index", listing()), *((name, generated(name)) for name in BUILT_IN)]:
        path = FOLDER / f"{page}.md"
        before, rest = path.read_text(encoding="utf-8").split(START)
        path.write_text(f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}", encoding="utf-8")
