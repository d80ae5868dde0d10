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
from difftune.registry import RegistryError, nearest
from difftune.reward import REWARDS, reward_settings


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


def checked_reward(value: Any) -> Any:
    """Return the reward as it was given, its settings coerced to their types."""
    problems: list[str] = []
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise Problems(["reward: got an empty list, expected at least one reward"])
        checked: Any = [_checked_term(item, f"reward.{index}", problems) for index, item in enumerate(value)]
    else:
        checked = _checked_term(value, "reward", problems)
    if problems:
        raise Problems(problems)
    return checked


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
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            problems.append(f"{path}.{key}: missing, reward {name!r} needs it")
    return checked if isinstance(value, Mapping) else value


def setting_types(name: str) -> dict[str, Any]:
    """Return the annotations of a reward's settings, as far as they can be resolved."""
    builder = REWARDS.get(name)
    target = getattr(builder, "__wrapped__", None) or getattr(builder, "__init__", builder)
    with contextlib.suppress(Exception):  # annotations are the plug-in author's and need not resolve
        hints = typing.get_type_hints(target)
        return {key: hints[key] for key in reward_settings(name) if key in hints}
    return {}
