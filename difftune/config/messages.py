"""What is wrong with a configuration, in one line per mistake: path, got, expected, nearest name."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from difftune.registry import nearest


class Problems(PydanticCustomError):
    """Lines that are complete already, for what a field alone cannot describe."""

    def __new__(cls, lines: Sequence[str]) -> Problems:
        return super().__new__(cls, "difftune", "{text}", {"text": "; ".join(lines), "lines": list(lines)})


def located(path: str, message: str) -> str:
    """Return ``message`` with ``path`` in front, unless it says so itself."""
    return message if message.startswith((f"{path}:", f"{path}.")) else f"{path}: {message}"


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as it is shown in a message, cut where it is long."""
    text = repr(dict(value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def error_lines(error: ValidationError, model: type[BaseModel] | None, prefix: tuple[str, ...] = ()) -> list[str]:
    """Return one line per mistake: path, got, expected, nearest name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        if item["type"] == "difftune":
            lines.update({line: line for line in item["ctx"]["lines"]})
            continue
        # A union reports each of its members under a name of its own, which is no key of the user's.
        loc = tuple(str(part) for part in item["loc"] if not re.search(r"[\[\]-]|^(str|int|float|bool)$", str(part)))
        path = ".".join((*prefix, *loc)) or "config"
        if item["type"] == "extra_forbidden":
            known = _fields(model, loc[:-1])
            lines[path] = f"{path}: unknown key{nearest(loc[-1], known)} (expected {', '.join(known)})"
        elif item["type"] == "missing":
            lines[path] = f"{path}: missing{_purpose(model, loc)}"
        elif path in lines:
            lines[path] += f" or {_expected(item)}"
        else:
            hint = ""
            if item["type"] == "literal_error" and isinstance(item["input"], str):
                hint = nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            lines[path] = f"{path}: got {shown(item['input'])}, expected {_expected(item)}{hint}"
    return list(lines.values())


def _expected(item: Any) -> str:
    if item["type"] == "string_pattern_mismatch":
        return " or ".join(re.findall(r"[^^$()|]+", item["ctx"]["pattern"]))
    message = re.split(r", unable to|, got| or instance of", item["msg"])[0]
    message = re.sub(r"^(Input|Value|List|String|Dictionary|Tuple) should (be|have) ", "", message)
    message = re.sub(r"^(greater|less) than", r"a value \1 than", message)
    for theirs, ours in (("valid dictionary", "mapping"), ("valid integer", "whole number"), ("a valid ", "a ")):
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]


def _model_at(model: type[BaseModel] | None, loc: Sequence[str]) -> type[BaseModel] | None:
    for part in loc:
        field = model.model_fields.get(part) if model is not None else None
        candidates = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        model = next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)
    return model


def _fields(model: type[BaseModel] | None, loc: Sequence[str]) -> list[str]:
    found = _model_at(model, loc)
    return [] if found is None else list(found.model_fields)


def _purpose(model: type[BaseModel] | None, loc: Sequence[str]) -> str:
    found = _model_at(model, loc[:-1])
    description = found.model_fields[loc[-1]].description if found and loc[-1] in found.model_fields else None
    return f", expected {description[0].lower()}{description[1:].rstrip('.')}" if description else ""
