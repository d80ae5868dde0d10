"""``difftune list``, ``new``, ``schema`` and ``doctor``: looking around, and a recipe to start from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

import difftune
from difftune.cli.messages import say
from difftune.cli.options import Plugins


def list_(
    what: Annotated[str, typer.Argument(help="algorithms, rewards, models or recipes.")],
    name: Annotated[
        str | None,
        typer.Argument(help="With rewards: one of them, or one as in YAML, e.g. '[scene, clip_score]'."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List what there is to choose from, or describe one reward."""
    from difftune.registry import load_plugin, nearest
    from difftune.types import UserError

    listings = {"algorithms": _algorithms, "rewards": _rewards, "models": _models, "recipes": _recipes}
    if what not in listings:
        raise UserError(f"list: got {what!r}{nearest(what, list(listings))}, expected {', '.join(listings)}")
    for file in plugin or []:
        load_plugin(file)
    if name is not None and what != "rewards":
        raise UserError(f"list {what}: got {name!r}, expected no name: only rewards are described one by one")
    if name is not None:
        for line in _reward_facts(name):
            say(line)
        return
    rows = listings[what]()
    width = max((len(name) for name, _ in rows), default=0)
    for name, description in rows:
        say(f"{name:<{width}}  {description}")


def _algorithms() -> list[tuple[str, str]]:
    from difftune.algorithm import ALGORITHMS

    rows = [("name", f"{'evidence':<13}{'reward':<16}paper")]
    for name in ALGORITHMS:
        kind = ALGORITHMS.get(name)
        reward = "differentiable" if kind.needs_gradient else "any"
        rows.append((name, f"{kind.evidence:<13}{reward:<16}{kind.paper}"))
    return rows


def _rewards() -> list[tuple[str, str]]:
    from difftune.config import first_line
    from difftune.reward import REWARDS, reward_settings

    rows = []
    for name in REWARDS:
        builder = REWARDS.get(name)
        gradient = " Differentiable." if getattr(builder, "differentiable", False) else ""
        settings = ", ".join(reward_settings(name))
        rows.append((name, f"{first_line(builder)}{gradient}{f' Settings: {settings}.' if settings else ''}"))
    return rows


def _reward_facts(spec: str) -> list[str]:
    """Describe a reward: of a bare name what it declares, of a specification the reward it stands for, as a tree."""
    from difftune.config import first_line, load_reward, parse_reward
    from difftune.reward import REWARDS, reward_settings

    if not spec.lstrip().startswith(("{", "[")):
        builder: Any = REWARDS.get(spec)
        # A function becomes a reward without being called; a class may load weights, and says what it is by itself.
        found: Any = builder if inspect.isclass(builder) else builder()
        settings = reward_settings(spec)
        lines = [spec, first_line(builder)]
        given = [key if p.default is p.empty else f"{key}={p.default!r}" for key, p in settings.items()]
    else:
        found = load_reward(parse_reward(spec))
        lines, given = found.describe().splitlines(), []
    facts = {
        "range": found.range,
        "needs": "; ".join(f"{key}: {meaning}" for key, meaning in found.needs.items()),
        "differentiable": "yes" if found.differentiable else "no",
        "groupwise": "yes: a score depends on the other samples of its prompt" if found.groupwise else "",
        "video": "yes: takes the frames together" if found.video else "",
        "weights": found.weights,
        "licence": found.licence,
        "memory": found.memory,
        "settings": ", ".join(given),
    }
    return [*lines, *(f"{key:<16}{value}" for key, value in facts.items() if value)]


def _models() -> list[tuple[str, str]]:
    from difftune.zoo import MODELS

    more = ("(any other)", "a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or a folder in its layout")
    return [*((name, model.description) for name, model in MODELS.items()), more]


def _recipes() -> list[tuple[str, str]]:
    from difftune.config import recipes

    return list(recipes().items())


def new(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (difftune list recipes).")],
    file: Annotated[Path | None, typer.Argument(help="The file to write; RECIPE.yaml by default.")] = None,
) -> None:
    """Copy a recipe, comments included, to start from."""
    from difftune.config import recipe_text
    from difftune.types import UserError

    text = recipe_text(recipe)
    target = file if file is not None else Path(f"{recipe}.yaml")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError:
        raise UserError(f"{str(target)!r} exists already; choose another name") from None
    say(f"wrote {target}; try it with: difftune check {target}")


def schema(out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None) -> None:
    """Print the JSON schema of a configuration.

    Editors complete and check a YAML file that begins with # yaml-language-server: $schema=FILE
    """
    import json

    from difftune.config import json_schema

    text = json.dumps(json_schema(), indent=2)
    if out is None:
        typer.echo(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    say(f"wrote {out}; first line of a configuration: # yaml-language-server: $schema={out}")


def doctor() -> None:
    """Look at versions, device, memory, extras and tokens, and say what to do about what is missing."""
    from difftune.doctor import environment, table

    say(f"difftune {difftune.__version__}")
    for line in table(environment()):
        say(line)
