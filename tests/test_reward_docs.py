"""The table in docs/rewards.md is the registry's; ``python tests/test_reward_docs.py`` writes it anew."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from difftune.reward import REWARDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards.md"
START, END = "<!-- rewards: begin -->", "<!-- rewards: end -->"


def table() -> str:
    """Return the table of the rewards that ship with the package, as Markdown."""
    lines = ["| name | what it says | range | gradients | needs | weights | their licence | memory |"]
    lines.append("|" + "---|" * 8)
    for name in REWARDS:
        kind: Any = REWARDS.get(name)
        if not REWARDS.origin(name).startswith("difftune.rewards."):
            continue
        assert inspect.isclass(REWARDS.get(name)), f"{name} is a function; the shipped rewards are classes"
        assert bool(kind.weights) == bool(kind.licence) == bool(kind.memory), f"{name} says only some of it"
        first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ").replace("``", "`").rstrip(".")
        needs = ", ".join(f"`{key}`" for key in kind.needs) + (" the prompt's group" if kind.groupwise else "")
        made_of = "of" in inspect.signature(kind).parameters
        gradients = "no" if not kind.differentiable else "as its terms" if made_of else "yes"
        cells = [f"`{name}`", first, kind.range, gradients, needs, kind.weights, kind.licence, kind.memory]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |")
    return "\n".join(lines)


def test_the_table_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    written = text.split(START)[1].split(END)[0].strip()
    assert written == table(), "stale: run python tests/test_reward_docs.py"


def test_every_reward_in_the_text_exists() -> None:
    text = PAGE.read_text(encoding="utf-8").split(END)[1]
    named = set(re.findall(r"name: (\w+)", text)) - {"NAME", "redness"}
    assert named and named <= set(REWARDS)


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
