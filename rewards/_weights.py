"""Weights that users bring: state dicts in files of other projects, loaded as data only, and stacks of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difftune.types import UserError

_LAYOUTS: dict[tuple[int, ...], str] = {
    (0, 2, 4, 6, 7): "none",  # LAION's linear heads, ImageReward: dropout between the layers, but before the last
    (0, 2, 4, 6, 8): "none",  # aesthetic predictor v2.5: dropout
    (0, 3, 6, 9, 11): "relu",  # LAION's ReLU head: ReLU and dropout, before the last ReLU
}
"""The published heads: numbers of their layers -> activation."""

_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def is_weights_file(source: str) -> bool:
    """Say whether ``source`` names a file of weights, in place of a folder or a hub id."""
    return source.endswith(_FILES)


def weights_file(name: str, source: str, file: str, revision: str | None = None) -> Path:
    """Return the file of weights that ``source`` names.

    Args:
        name: the reward, for messages.
        source: a path, or a hub id whose repository has ``file``.
        file: the file's name in a repository or folder.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: there is no such file.
        OSError: the hub cannot be reached or has no such file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / file
    if path.is_file():
        return path
    if is_weights_file(source) or path.parent.is_dir() and path.exists():
        raise UserError(f"reward {name!r}: there is no file {source!r}; give the path of {file}")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, file, revision=revision))


def load_state(name: str, path: str | Path) -> dict[str, Tensor]:
    """Load a state dict, on the CPU, without running any code that the file may hold.

    A mapping under ``state_dict`` or ``model`` is taken in place of what is around it, and the prefix ``module.``
    that data-parallel training leaves is dropped.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"reward {name!r}: there is no file {str(path)!r}")
    loaded: Any
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"reward {name!r}: {file.name} is no file of plain weights ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"reward {name!r}: {file.name} holds no state dict (a mapping of names to tensors)")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def linear_stack(
    name: str, state: Mapping[str, Tensor], prefix: str = "", activation: str = "auto"
) -> tuple[nn.Sequential, list[int]]:
    """Rebuild an ``nn.Sequential`` of linear layers from its state dict, whatever its sizes.

    Args:
        name: the reward, for messages.
        state: tensors whose names end in ``<number>.weight`` and ``<number>.bias``.
        prefix: a regular expression for what stands before the number; names that do not match are left alone.
        activation: what stands between two layers: ``none``, ``relu``, ``gelu`` or ``auto``. ``auto`` knows the
            published heads by the numbers of their layers; a single layer has nothing between.

    Returns:
        The layers in fp32, frozen, without the dropout, and their numbers.

    Raises:
        UserError: no layers are found, or those of two stacks; they do not fit on one another; ``auto`` does not know
            their numbers.
    """
    pattern = re.compile(rf"(?P<prefix>{prefix})(?P<number>\d+)\.(?P<kind>weight|bias)")
    found: dict[int, dict[str, Tensor]] = {}
    stacks: dict[str, None] = {}
    for key, value in state.items():
        match = pattern.fullmatch(key)
        if match:
            stacks[match["prefix"]] = None
            found.setdefault(int(match["number"]), {})[match["kind"]] = value
    if len(stacks) > 1:
        raise UserError(
            f"reward {name!r}: the file holds {len(stacks)} stacks of layers ({_few(map(repr, stacks))}), expected "
            "one; save the head alone"
        )
    # A normalisation layer among them has a weight of one dimension: the formula would be another one.
    if not found or any(entry.get("weight", torch.zeros(0)).ndim != 2 for entry in found.values()):
        raise UserError(f"reward {name!r}: the file holds no stack of linear layers (names: {_few(state)})")
    numbers = sorted(found)
    if activation == "auto":
        layout = tuple(numbers)
        if len(layout) > 1 and layout not in _LAYOUTS:
            raise UserError(
                f"reward {name!r}: the numbers of the head's layers ({', '.join(map(str, layout))}) do not tell what "
                "stands between them; set activation to none, relu or gelu"
            )
        activation = _LAYOUTS.get(layout, "none")
    kinds: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
    if activation not in ("none", *kinds):
        raise UserError(f"reward {name!r}: activation is {activation!r}, expected auto, none, relu or gelu")
    modules: list[nn.Module] = []
    width: int | None = None
    for number in numbers:
        weight = found[number]["weight"].float()
        if width is not None and weight.shape[1] != width:
            raise UserError(f"reward {name!r}: layer {number} takes {weight.shape[1]} numbers and gets {width}")
        width = weight.shape[0]
        if modules and activation != "none":
            modules.append(kinds[activation]())
        layer = nn.Linear(weight.shape[1], width, bias="bias" in found[number])
        layer.weight.data = weight
        if "bias" in found[number]:
            layer.bias.data = found[number]["bias"].float()
        modules.append(layer)
    return nn.Sequential(*modules).eval().requires_grad_(False), numbers


def collapse(layers: nn.Sequential) -> nn.Linear:
    """Return the one affine map that a stack of linear layers without activations is, computed in fp64.

    Raises:
        ValueError: there is an activation among the layers.
    """
    weight: Tensor | None = None
    bias: Tensor | None = None
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"a stack with {type(layer).__name__} is not affine")
        matrix = layer.weight.double()
        offset = layer.bias.double() if layer.bias is not None else matrix.new_zeros(len(matrix))
        bias = offset if bias is None else matrix @ bias + offset
        weight = matrix if weight is None else matrix @ weight
    assert weight is not None and bias is not None
    out = nn.Linear(weight.shape[1], weight.shape[0])
    out.weight.data, out.bias.data = weight.float(), bias.float()
    return out.eval().requires_grad_(False)


def scalar_head(name: str, layers: nn.Sequential, width: int) -> nn.Module:
    """Return the head, collapsed where it is affine; it takes ``width`` numbers and gives one."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if linear[0].in_features != width or linear[-1].out_features != 1:
        raise UserError(
            f"reward {name!r}: the head maps {linear[0].in_features} numbers to {linear[-1].out_features}, expected "
            f"{width} (the model's embedding) to 1; is it for another model?"
        )
    return collapse(layers) if len(linear) == len(layers) else layers


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
