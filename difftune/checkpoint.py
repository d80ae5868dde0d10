"""Checkpoints that are whole or not there: staged, hashed, renamed; and the newest that verifies is used.

A checkpoint is a folder ``step_NNNNNN`` with ``tensors.safetensors`` (all tensors), ``state.json`` (all the rest) and
``manifest.json`` (the sha256 and size of both). It is written under a name that no reader looks at, flushed to the
disk, and renamed; older ones are pruned only after that. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 2
_NAME = re.compile(r"step_(\d{6,})")
_STAGING = ".staging-"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the message names it and the reason."""


def flatten(state: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Return ``state`` as plain JSON, moving its tensors to ``tensors`` under their path.

    Raises:
        TypeError: a leaf is neither a number, a string, a boolean, ``None`` nor a tensor; the message says where.
    """
    if isinstance(state, Tensor):
        # The key is a counter: paths hold prompts, which safetensors' header need not repeat.
        key = f"t{len(tensors):06d}"
        tensors[key] = state.detach().cpu().contiguous().clone()
        return {"__tensor__": key}
    if isinstance(state, Mapping):
        keys = list(state)
        if all(isinstance(key, str) and not key.startswith("__") for key in keys):
            return {key: flatten(state[key], tensors, f"{path}/{key}") for key in keys}
        return {"__items__": [[flatten(k, tensors, path), flatten(state[k], tensors, f"{path}/{k}")] for k in keys]}
    if isinstance(state, tuple):
        return {"__tuple__": [flatten(item, tensors, f"{path}/{i}") for i, item in enumerate(state)]}
    if isinstance(state, list):
        return [flatten(item, tensors, f"{path}/{i}") for i, item in enumerate(state)]
    if state is None or isinstance(state, (str, int, float, bool)):
        return state
    raise TypeError(f"state{path}: got {type(state).__name__}, expected numbers, strings, lists, dicts or tensors")


def unflatten(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`flatten`."""
    if isinstance(state, list):
        return [unflatten(item, tensors) for item in state]
    if not isinstance(state, dict):
        return state
    if "__tensor__" in state:
        return tensors[state["__tensor__"]]
    if "__items__" in state:
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in state["__items__"]}
    if "__tuple__" in state:
        return tuple(unflatten(item, tensors) for item in state["__tuple__"])
    return {key: unflatten(value, tensors) for key, value in state.items()}


def save_checkpoint(root: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``state`` as ``root/step_NNNNNN`` and prune all but the newest ``keep``; return the folder.

    Raises:
        OSError: the disk is full, read-only or not ours; earlier checkpoints are intact.
        CheckpointError: a tensor is not finite.
    """
    root.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = flatten(state, tensors)
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"step {step}: tensor {key} is not finite; nothing was written, resume from before")
    target = root / f"step_{step:06d}"
    staging = root / f"{_STAGING}{target.name}-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        save_file(tensors, staging / "tensors.safetensors")
        (staging / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "state": plain}))
        files = {name: _describe(staging / name) for name in ("tensors.safetensors", "state.json")}
        (staging / "manifest.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))
        for name in (*files, "manifest.json"):
            _flush(staging / name)
        _flush(staging)
        if _same(staging, target):
            # An interrupted run saves the epoch it began with, which is there already: leave it alone.
            shutil.rmtree(staging)
        elif target.exists():
            # A damaged or superseded one of the same step goes aside, since rename cannot replace a folder. Killed
            # between the two renames, the run resumes from the checkpoint before.
            aside = root / f"{_STAGING}old-{target.name}-{os.getpid()}"
            os.replace(target, aside)
            os.replace(staging, target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(staging, target)
        _flush(root)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _prune(root, keep)
    return target


def _same(staging: Path, target: Path) -> bool:
    """Whether ``target`` is a whole checkpoint with exactly the content of ``staging``."""
    try:
        load_checkpoint(target)
        return (target / "manifest.json").read_bytes() == (staging / "manifest.json").read_bytes()
    except (CheckpointError, OSError):
        return False


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(root: Path, keep: int) -> None:
    for folder in checkpoints(root)[max(keep, 1) :]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob(f"{_STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders below ``root``, newest first, verified or not."""
    if not root.is_dir():
        return []
    found = [(int(m.group(1)), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read one checkpoint and verify it.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or the format is not ours.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
        for name in ("tensors.safetensors", "state.json"):
            if _describe(folder / name) != manifest["files"][name]:
                raise CheckpointError(f"{folder}: {name} is damaged (its sha256 differs from the manifest)")
        plain = json.loads((folder / "state.json").read_text())
        if plain["step"] != manifest["step"] or folder.name != f"step_{manifest['step']:06d}":
            raise CheckpointError(f"{folder}: step {plain['step']} does not match the folder's name")
        return unflatten(plain["state"], load_file(folder / "tensors.safetensors"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from error


def load_latest(root: Path) -> tuple[dict[str, Any], Path] | None:
    """Return the newest checkpoint that verifies, and its folder; warn of every damaged one passed over.

    Returns ``None`` if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints and none verifies.
    """
    folders = checkpoints(root)
    problems = []
    for folder in folders:
        try:
            state = load_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            continue
        return state, folder
    if problems:
        raise CheckpointError("no checkpoint verifies: " + "; ".join(problems))
    return None


def rng_state() -> dict[str, Any]:
    """Return the state of every global random generator: torch (CPU and CUDA), numpy and Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def load_rng_state(state: Mapping[str, Any]) -> None:
    """Restore :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
