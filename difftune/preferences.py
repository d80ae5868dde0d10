"""Files of labelled pictures: what people (or a scorer) said of pictures that exist already.

Three kinds of file hold the same records, all text in UTF-8: ``.jsonl`` (one object a line), ``.csv`` (a header) and
``.parquet`` (needs pyarrow). A record is in one of these layouts; other columns are ignored:

- a pair: ``prompt``, ``chosen``, ``rejected``;
- one picture: ``prompt``, ``image``, ``label`` (higher is better; yes and no, true and false are 1 and 0);
- any number (not in CSV): ``prompt``, ``images``, ``labels``, lists of the same length;
- Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): ``caption``, ``jpg_0``, ``jpg_1``, ``label_0``, ``label_1``, and
  ``has_label``, whose rows without a label are left out. Ties have the labels 0.5 and 0.5.

A picture is a path, relative to the file, or in Parquet the bytes of an image file, read when they are needed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from difftune.prompts import Prompt, read_text
from difftune.types import UserError

#: Endings of preference files.
SUFFIXES = (".jsonl", ".csv", ".parquet")

#: Layouts: the columns that tell them, which ones hold pictures and which labels (``None``: first best).
_LAYOUTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...] | None], ...] = (
    ("prompt", ("chosen", "rejected"), None),
    ("caption", ("jpg_0", "jpg_1"), ("label_0", "label_1")),
    ("prompt", ("image",), ("label",)),
)
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}


@dataclass(frozen=True)
class StoredPicture:
    """The bytes of an image file in a cell of a Parquet file.

    Attributes:
        file: the Parquet file.
        group: its row group.
        row: the row in that group.
        column: the column's name.
    """

    file: Path
    group: int
    row: int
    column: str

    def read(self) -> bytes:
        """Return the bytes."""
        value = _column(self.file, self.group, self.column)[self.row]
        # Hugging Face's image columns are structs of bytes and a path.
        return value["bytes"] if isinstance(value, Mapping) else value


def load_preferences(path: str | Path) -> list[Prompt]:
    """Return a file's records: prompts whose metadata has ``images`` and ``labels``, tuples of the same length.

    Images are paths or :class:`StoredPicture`; labels are floats, higher is better. ``where`` is the record's place.

    Raises:
        UserError: the file or a picture in it does not exist, a record is in none of the layouts, a label is no number,
            or there is no record; the message names the line.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"preference file {str(path)!r} ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"preference file {str(path)!r} does not exist; expected a file of labelled pictures")
    rows = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix.lower()](path)
    records = [_record(row, where, path.parent) for where, row in rows if _is_labelled(row)]
    if not records:
        raise UserError(f"preference file {str(path)!r} has no labelled record, expected at least one")
    return records


def _record(row: Mapping[str, Any], where: str, folder: Path) -> Prompt:
    name, pictures, labels = _cells(row, where)
    if not isinstance(row.get(name), str):
        raise UserError(f"{where}: {name!r} is {row.get(name)!r}, expected the prompt's text")
    if not pictures or len(pictures) != len(labels):
        raise UserError(f"{where}: {len(pictures)} pictures and {len(labels)} labels, expected one label per picture")
    found = tuple(_picture(picture, where, folder) for picture in pictures)
    scores = tuple(_number(label, where) for label in labels)
    return Prompt(row[name], {"images": found, "labels": scores, "where": where})


def _cells(row: Mapping[str, Any], where: str) -> tuple[str, list[Any], list[Any]]:
    """Return the prompt's column, the pictures and the labels."""
    if isinstance(row.get("images"), list) and isinstance(row.get("labels"), list):
        return "prompt", row["images"], row["labels"]
    for prompt, pictures, labels in _LAYOUTS:
        if {prompt, *pictures, *(labels or ())} <= row.keys():
            values = [1.0, 0.0] if labels is None else [row[name] for name in labels]
            return prompt, [row[name] for name in pictures], values
    raise UserError(
        f"{where}: got {', '.join(map(str, row)) or 'nothing'}, expected prompt with chosen and rejected, with image "
        "and label, or with images and labels; or Pick-a-Pic's caption, jpg_0, jpg_1, label_0 and label_1"
    )


def _is_labelled(row: Mapping[str, Any]) -> bool:
    return str(row.get("has_label", True)).lower() not in ("false", "0")


def _picture(value: Any, where: str, folder: Path) -> Path | StoredPicture:
    if isinstance(value, StoredPicture):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: got {value!r} for a picture, expected the path of an image file")
    path = folder / Path(value).expanduser()
    if not path.is_file():
        raise UserError(f"{where}: picture {value!r} does not exist; paths are relative to the file that names them")
    return path


def _number(value: Any, where: str) -> float:
    try:
        return _WORDS[value.lower()] if isinstance(value, str) and value.lower() in _WORDS else float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: label {value!r} is no number, expected e.g. 1 or 0, higher is better") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path, "preference file").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON ({error}), expected an object") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: got {row!r}, expected an object")
        yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(read_text(path, "preference file"), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                cells = len(reader.fieldnames or [])
                raise UserError(f"{path}:{reader.line_num}: expected {cells} cells: quote those with commas")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    file = _parquet(path)
    pictures = {name for _, names, _ in _LAYOUTS for name in names} & set(file.schema_arrow.names)
    stored = {name for name in pictures if not _is_text(file.schema_arrow.field(name).type)}
    # Pictures stay in the file: a shard of Pick-a-Pic is larger than memory likes.
    columns = [name for name in file.schema_arrow.names if name not in stored]
    number = 0
    for group in range(file.num_row_groups):
        for row, values in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
            number += 1
            yield f"{path}:{number}", {**values, **{name: StoredPicture(path, group, row, name) for name in stored}}


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(
            f"preference file {str(path)!r}: reading Parquet needs pyarrow: install difftune[preferences]"
        ) from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"preference file {str(path)!r} is no Parquet file ({str(error).splitlines()[0]})") from None


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string")


@lru_cache(maxsize=4)
def _column(file: Path, group: int, column: str) -> list[Any]:
    return _parquet(file).read_row_group(group, columns=[column]).column(column).to_pylist()
