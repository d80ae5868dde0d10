"""How an artifact's files are written and read: staged, synced and renamed, with sorted headers.

The safetensors library orders header entries at random, and two equal runs would leave different bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from difftune.types import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA."""

WEIGHTS_2 = "pytorch_lora_weights_transformer_2.safetensors"
"""The second expert's LoRA (Wan 2.2), loaded with ``load_into_transformer_2=True``."""

_RESERVED = ("format", "lora_adapter_metadata")
"""Header entries that diffusers reads; ours never replace them."""


def file_name(name: str) -> str:
    """Return ``name`` with whatever could lead out of a folder, or be markup, replaced.

    Not refused: the name is often a folder's, and the run it belongs to has just finished.
    """
    return re.sub(r"[^\w.+\- ]+", "_", name).strip(". ") or "adapter"


def header_of(config: Mapping[str, Any], metadata: Mapping[str, str], base_model: str, name: str) -> dict[str, str]:
    """Return the entries of a file's header: ours, and ``metadata`` except what diffusers keeps for itself.

    Raises:
        UserError: ``metadata`` holds something other than strings.
    """
    from difftune import __version__

    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"metadata {key!r} is {type(value).__name__}, expected strings: safetensors holds no other")
    own = {
        "difftune.version": __version__,
        "difftune.config": json.dumps(config, sort_keys=True, default=str),
        "difftune.base_model": base_model,
        "difftune.name": name,
    }
    return {**own, **{key: value for key, value in metadata.items() if key not in _RESERVED}}


@contextlib.contextmanager
def staging(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder on the same file system as ``folder``, removed afterwards."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def commit(stage: Path, folder: Path, names: list[str]) -> list[Path]:
    """Sync the staged files and rename them into place, in the order given."""
    for name in names:
        with (stage / name).open("rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(stage / name, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return [folder / name for name in names]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors of any layout as a safetensors file whose header is sorted."""
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    rewrite_header(path, header)


def rewrite_header(path: Path, extra: Mapping[str, str]) -> None:
    """Merge ``extra`` below the file's own header entries and sort them; the tensors' bytes stay as they
    are."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    merged = {**extra, **header.pop("__metadata__", {})}
    text = json.dumps({"__metadata__": dict(sorted(merged.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(data)


def read_header(path: Path) -> dict[str, str]:
    """Return the header's metadata; :class:`UserError` if it is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {error}") from None


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of ``folder`` that :func:`~difftune.export.load_adapter` has to load.

    Raises:
        UserError: there are none; the message says what is there instead.
    """
    if not folder.is_dir():
        raise UserError(f"no adapter at {str(folder)!r}: expected a folder with {WEIGHTS}, or a .safetensors file")
    files = [folder / name for name in (WEIGHTS, WEIGHTS_2) if (folder / name).is_file()]
    others = [file for file in sorted(folder.glob("*.safetensors")) if file not in files]
    files += [file for file in others if "difftune.component" in read_header(file)]
    if not files:
        found = ", ".join(file.name for file in others) or "no .safetensors file"
        raise UserError(f"no adapter in {str(folder)!r} (it holds {found}): expected {WEIGHTS}, or name the file")
    return files
