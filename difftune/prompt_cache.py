"""Prompt embeddings, encoded once per prompt and kept.

The pipeline goes on calling its own ``encode_prompt``; for the time of a sampler's call that method answers from a
cache. Each prompt is encoded by itself, so that its embedding does not depend on the batch it comes in. Which outputs
have a row per prompt is found out by encoding one prompt and then the same prompt twice; encoders whose rows depend on
the batch (padding to the longest) are cached whole batch by whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_Key = tuple[Any, ...]


class _Store:
    """Values by key, the least recently used dropped once they hold more bytes than ``capacity``."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held = 0
        self._values: OrderedDict[_Key, tuple[Any, int]] = OrderedDict()

    def get(self, key: _Key, make: Callable[[], Any]) -> Any:
        """Return the value of ``key``, made if it is not there."""
        if key not in self._values:
            value = make()
            size = _bytes_of(value)
            self._values[key] = (value, size)
            self._held += size
            while self._held > self._capacity and len(self._values) > 1:
                _, (_, dropped) = self._values.popitem(last=False)
                self._held -= dropped
        self._values.move_to_end(key)
        return self._values[key][0]

    def clear(self) -> None:
        """Drop everything."""
        self._values.clear()
        self._held = 0


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_bytes_of, items))


class PromptCache:
    """Answers ``pipe.encode_prompt`` from memory.

    Args:
        pipe: the pipeline; one without ``encode_prompt`` is left alone.
        capacity: bytes of embeddings that are kept, on the device they were made on; the least recently used go
            first.
    """

    def __init__(self, pipe: Any, capacity: int = 2**30) -> None:
        self._pipe = pipe
        self._rows = _Store(capacity)
        # Whole batches are seldom met again: shuffled micro-batches are all different.
        self._batches = _Store(capacity // 4)
        self._layouts: dict[_Key, Any] = {}

    def clear(self) -> None:
        """Forget everything (after the text encoders changed)."""
        self._rows.clear()
        self._batches.clear()
        self._layouts.clear()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Put the cache in front of ``encode_prompt`` for the time of the block."""
        original = getattr(self._pipe, "encode_prompt", None)
        if original is None or isinstance(inspect.getattr_static(self._pipe, "encode_prompt"), staticmethod):
            yield
            return
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return original(*args, **kwargs)
            bound.apply_defaults()
            return self._encode(original, dict(bound.arguments), signature)

        own = "encode_prompt" in vars(self._pipe)
        vars(self._pipe)["encode_prompt"] = encode_prompt
        try:
            yield
        finally:
            if own:
                vars(self._pipe)["encode_prompt"] = original
            else:
                del vars(self._pipe)["encode_prompt"]

    def _encode(self, original: Any, arguments: dict[str, Any], signature: inspect.Signature) -> Any:
        def call(values: dict[str, Any]) -> Any:
            values = dict(values)
            extra = {}
            for name, parameter in signature.parameters.items():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    extra = values.pop(name, {})
                elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                    values.pop(name, ())
            with torch.no_grad():
                return original(**values, **extra)

        prompts = arguments.get("prompt")
        hashable = all(_hashable(v) for v in arguments.values())
        if not isinstance(prompts, list) or not prompts or not hashable:
            return call(arguments)
        count = len(prompts)
        listed = [name for name, v in arguments.items() if isinstance(v, list) and len(v) == count]
        rest = tuple((name, _frozen(v)) for name, v in arguments.items() if name not in listed)
        layout = self._layout(call, arguments, listed, rest)
        if layout is None:
            key = (rest, tuple((name, tuple(arguments[name])) for name in listed))
            return self._batches.get(key, lambda: call(arguments))
        rows = []
        for i in range(count):
            key = (rest, tuple((name, arguments[name][i]) for name in listed))
            one = _chosen(arguments, listed, [i])
            rows.append(self._rows.get(key, functools.partial(call, one)))
        try:
            return _merge(rows, layout)
        except _RaggedError:
            # Rows of different lengths: this encoder pads to the longest prompt, so batches are cached as they are.
            self._layouts[rest] = None
            return self._encode(original, arguments, signature)

    def _layout(self, call: Any, arguments: dict[str, Any], listed: list[str], rest: _Key) -> Any:
        if rest not in self._layouts:
            one = call(_chosen(arguments, listed, [0]))
            two = call(_chosen(arguments, listed, [0, 0]))
            self._layouts[rest] = _compare(one, two)
        return self._layouts[rest]


def _chosen(arguments: dict[str, Any], listed: list[str], rows: list[int]) -> dict[str, Any]:
    """Return the arguments of chosen rows, with the number of prompts that some encoders want beside them."""
    counted = {"batch_size": len(rows)} if arguments.get("batch_size") == len(arguments["prompt"]) else {}
    return {**arguments, **counted, **{name: [arguments[name][row] for row in rows] for name in listed}}


class _RaggedError(Exception):
    """Rows do not fit together."""


def _hashable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_hashable(item) for item in value)
    if isinstance(value, dict):
        return all(_hashable(item) for item in value.values())
    return value is None or isinstance(value, (str, int, float, bool, torch.device, torch.dtype))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return str(value) if isinstance(value, (torch.device, torch.dtype)) else value


def _compare(one: Any, two: Any) -> Any:
    """Return which leaves double with the prompts: ``rows``, ``same``, a list of those, or ``None`` if unclear."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.ndim and two.shape[0] == 2 * one.shape[0] and one.shape[1:] == two.shape[1:]:
            return "rows"
        return "same" if one.shape == two.shape else None
    if isinstance(one, list) and isinstance(two, list) and len(two) == 2 * len(one) and len(one):
        return "rows"
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        inner = [_compare(a, b) for a, b in zip(one, two, strict=True)]
        return None if any(item is None for item in inner) else (type(one), inner)
    return "same" if type(one) is type(two) else None


def _merge(rows: list[Any], layout: Any) -> Any:
    first = rows[0]
    if layout == "same":
        return first
    if layout == "rows":
        if isinstance(first, list):
            return [item for row in rows for item in row]
        if any(row.shape[1:] != first.shape[1:] for row in rows):
            raise _RaggedError
        return torch.cat(rows)
    kind, inner = layout
    merged = [_merge([row[i] for row in rows], inner[i]) for i in range(len(inner))]
    return kind(merged)
