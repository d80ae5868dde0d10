"""Safe YAML, by the rules of version 1.2: ``1e-4`` is a number, ``no`` and ``on`` are words, a key comes once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from difftune.config.messages import shown
from difftune.types import UserError

MAX_BYTES = 2**20
"""Largest configuration file that is read: 1 MiB."""

MAX_NODES = 20_000
"""Most values a configuration may hold once its aliases are expanded."""

_TAG = "tag:yaml.org,2002:"

_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", "<<", ["<"]),
]


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, firsts in _SCALARS:
        for first in firsts:
            found.setdefault(first, []).append((_TAG + kind, re.compile(f"^(?:{pattern})$")))
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, no key twice."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back; words that YAML 1.1 takes for something else are quoted as well."""

    yaml_implicit_resolvers = {
        first: [*_resolvers().get(first, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
        for first in {*_resolvers(), *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(data: Any) -> str:
    """Return ``data`` as YAML that :func:`parse_yaml` reads back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UserError: missing, too large, not UTF-8, not YAML, not a mapping, or a key comes twice.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"config: {str(path)!r} cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"config: {str(path)!r} is larger than {MAX_BYTES // 2**20} MiB; put prompts into a file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"config: {str(path)!r} is not UTF-8 (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a configuration; ``name`` is what messages call it.

    Raises:
        UserError: not YAML, not a mapping, too many values, or a key comes twice.
    """
    data = parse_value(text, name)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{name}: got {shown(data)}, expected a mapping of sections such as model, reward and train")
    return data


def parse_value(text: str, name: str) -> Any:
    """Parse any YAML; ``name`` is what messages call it.

    Raises:
        UserError: not YAML, or too many values.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_size(node, name)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise UserError(f"{name}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not YAML: {error}") from None


def _check_size(root: Any, name: str) -> None:
    """Refuse what is small to write and endless to read: aliases within aliases."""
    stack, seen = [root], 0
    while stack:
        node = stack.pop()
        seen += 1
        if seen > MAX_NODES:
            raise UserError(f"{name}: more than {MAX_NODES} values; put prompts into a file, and mind the aliases")
        if isinstance(node, yaml.MappingNode):
            stack.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)
