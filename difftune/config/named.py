"""The sections whose settings belong to what they name: the algorithm, and the reward or rewards."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from difftune.algorithm import ALGORITHMS
from difftune.config.messages import Problems, error_lines, shown
from difftune.config.yaml12 import parse_value
from difftune.registry import RegistryError, nearest
from difftune.reward import REWARDS, ComposedReward, reward_settings
from difftune.types import UserError


def checked_algorithm(value: Any) -> dict[str, Any]:
    """Return ``{name, ...all settings}`` of a name or a mapping."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise Problems([f"algorithm: got {shown(value)}, expected a name (known: {', '.join(ALGORITHMS)})"])
    try:
        found = ALGORITHMS.get(given["name"])
    except RegistryError as error:
        raise Problems([f"algorithm.name: {error}"]) from None
    try:
        settings = found.Config.model_validate({key: item for key, item in given.items() if key != "name"})
    except ValidationError as error:
        raise Problems(error_lines(error, found.Config, ("algorithm",))) from None
    return {"name": given["name"], **settings.model_dump(mode="json")}


def checked_reward(value: Any, path: str = "reward") -> Any:
    """Return the reward as it was given, its settings and those of the rewards it is made of coerced to their types.

    ``path`` is the key it stands under, for messages.
    """
    problems: list[str] = []
    checked = _checked_terms(value, path, problems)
    if problems:
        raise Problems(problems)
    return checked


def parse_reward(text: str) -> Any:
    """Return the reward that a line of YAML stands for, as :func:`checked_reward` returns it.

    Raises:
        UserError: with one line per mistake.
    """
    try:
        return checked_reward(parse_value(text, "reward"))
    except Problems as error:
        raise UserError("\n".join((error.context or {})["lines"])) from None


def _checked_terms(value: Any, path: str, problems: list[str]) -> Any:
    """Check one term, or a list of them, which may hold lists again (sums within sums)."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _checked_term(value, path, problems)
    if not value:
        problems.append(f"{path}: got an empty list, expected at least one reward")
    return [_checked_terms(item, f"{path}.{index}", problems) for index, item in enumerate(value)]


def _checked_term(value: Any, path: str, problems: list[str]) -> Any:
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        problems.append(f"{path}: got {shown(value)}, expected a name or a mapping with one")
        return value
    name = given["name"]
    try:
        allowed = reward_settings(name)
    except RegistryError as error:
        problems.append(f"{path}.name: {error}")
        return value
    checked = {"name": name}
    hints = {"weight": float, **setting_types(name)}
    for key, item in given.items():
        if key == "name":
            continue
        if key != "weight" and key not in allowed:
            known = sorted([*allowed, "name", "weight"])
            problems.append(f"{path}.{key}: unknown setting{nearest(str(key), known)} (expected {', '.join(known)})")
            continue
        try:
            checked[key] = TypeAdapter(hints.get(key, Any)).validate_python(item)
        except ValidationError as error:
            problems.extend(error_lines(error, None, (*path.split("."), key)))
        else:
            if key == "of" and is_composed(name):
                checked[key] = _checked_terms(checked[key], f"{path}.of", problems)
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            problems.append(f"{path}.{key}: missing, reward {name!r} needs it")
    return checked if isinstance(value, Mapping) else value


def is_composed(name: str) -> bool:
    """Say whether the reward is made of others, which stand under its setting ``of``."""
    builder = REWARDS.get(name)
    return inspect.isclass(builder) and issubclass(builder, ComposedReward) and "of" in reward_settings(name)


def setting_types(name: str) -> dict[str, Any]:
    """Return the annotations of a reward's settings, as far as they can be resolved."""
    builder = REWARDS.get(name)
    target = getattr(builder, "__wrapped__", None) or getattr(builder, "__init__", builder)
    with contextlib.suppress(Exception):  # annotations are the plug-in author's and need not resolve
        hints = typing.get_type_hints(target)
        return {key: hints[key] for key in reward_settings(name) if key in hints}
    return {}
