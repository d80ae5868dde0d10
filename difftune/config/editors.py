"""The configuration described to editors, as a JSON schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from difftune.algorithm import ALGORITHMS
from difftune.config.named import setting_types
from difftune.config.schema import RunConfig
from difftune.prompts import list_prompts
from difftune.reward import REWARDS, reward_settings
from difftune.zoo import MODELS


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, for ``# yaml-language-server: $schema=FILE`` in its first line."""
    schema = RunConfig.model_json_schema()
    properties = schema["properties"]
    for section, (title, extra) in {
        "model": ("ModelConfig", {"type": "string", "examples": list(MODELS)}),
        "prompts": ("PromptsConfig", None),
    }.items():
        source = {"anyOf": [{"enum": list_prompts()}, {"type": "string"}, {"type": "array"}]}
        properties[section] = {
            "description": properties[section].get("description", ""),
            "anyOf": [extra or source, {"$ref": f"#/$defs/{title}"}],
        }
        if section == "prompts":
            schema["$defs"][title]["properties"]["source"].update(source)
    properties["reward"] = {"description": properties["reward"]["description"], **_reward_schema(schema["$defs"])}
    properties["algorithm"] = {
        "description": properties["algorithm"]["description"],
        **_algorithm_schema(schema["$defs"]),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "difftune run", **schema}


def _algorithm_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    names, choices = list(ALGORITHMS), []
    for name in names:
        own = ALGORITHMS.get(name).Config.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        own["properties"] = {"name": {"const": name}, **own["properties"]}
        own["required"] = ["name", *own.get("required", [])]
        definitions[f"algorithm_{name}"] = own
        choices.append({"$ref": f"#/$defs/algorithm_{name}"})
    return {"anyOf": [{"enum": names}, {"type": "string"}, *choices, _plugged_in(names)]}


def _reward_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    names, choices = list(REWARDS), []
    for name in names:
        settings, hints = reward_settings(name), setting_types(name)
        properties: dict[str, Any] = {"name": {"const": name}, "weight": {"type": "number", "default": 1.0}}
        for key, parameter in settings.items():
            properties[key] = _type_schema(hints.get(key, Any))
            if parameter.default is not inspect.Parameter.empty:
                properties[key]["default"] = parameter.default
        needed = [key for key, p in settings.items() if p.default is inspect.Parameter.empty]
        definitions[f"reward_{name}"] = {
            "type": "object",
            "description": first_line(REWARDS.get(name)),
            "properties": properties,
            "required": ["name", *needed],
            "additionalProperties": False,
        }
        choices.append({"$ref": f"#/$defs/reward_{name}"})
    definitions["reward_term"] = {"anyOf": [{"enum": names}, {"type": "string"}, *choices, _plugged_in(names)]}
    term = {"$ref": "#/$defs/reward_term"}
    return {"anyOf": [term, {"type": "array", "items": term, "minItems": 1}]}


def _plugged_in(names: Sequence[str]) -> dict[str, Any]:
    """Return the schema of an entry that a plug-in brings: any settings, under a name that is not ours."""
    return {
        "type": "object",
        "description": "Registered by a plug-in.",
        "properties": {"name": {"type": "string", "not": {"enum": list(names)}}},
        "required": ["name"],
    }


def _type_schema(hint: Any) -> dict[str, Any]:
    try:
        schema = TypeAdapter(hint).json_schema()
        json.dumps(schema)
    except Exception:  # an annotation that JSON cannot express constrains nothing
        return {}
    return {} if "$defs" in schema else dict(schema)


def first_line(thing: Any) -> str:
    """Return the first line of an object's docstring."""
    lines = (inspect.getdoc(thing) or "").strip().splitlines()
    return lines[0].replace("``", "") if lines else ""
