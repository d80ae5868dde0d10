"""Where prompts and their metadata come from: lists, files and built-in sets, and the order in which a run
sees them.

File formats, all UTF-8:

- ``.txt``: one prompt a line; blank lines are skipped; a line that holds only ``""`` is the empty prompt.
- ``.jsonl``: one object a line, ``{"prompt": "two stars", ...}``; the other entries are the prompt's
  conditions and metadata.
- ``.csv``: a header with a column ``prompt``; the other columns are conditions and metadata (strings). An empty
  cell is the empty prompt, or no condition.

Conditions are what the pipeline's call takes beside the prompt: the entries named in :data:`CONDITIONS`, and any
other argument of the pipeline under ``conditions`` (in a csv, the column ``conditions.NAME``)::

    {"prompt": "a red door", "image": "house.png", "mask_image": "door.png", "negative_prompt": "blurry"}
    {"prompt": "a red door", "conditions": {"ip_adapter_image": "style.png", "strength": 0.6}}

Pictures are PNG, JPEG or WEBP files, relative to the prompt file. All other entries are metadata, for rewards.

Prompts are data: they are never formatted, evaluated or looked up.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difftune.registry import nearest
from difftune.types import UserError

MAX_BYTES = 64 * 2**20
"""Largest prompt file that is read: 64 MiB, about a million prompts."""

SUFFIXES = (".txt", ".jsonl", ".csv")
"""Endings of prompt files."""

ANIMALS = (
    "ant bat bear bee beetle bird butterfly camel cat chicken cow deer dog dolphin duck fish fly fox frog "
    "goat goose gorilla hedgehog horse kangaroo lion lizard llama monkey mouse pig rabbit raccoon rat shark "
    "sheep snake spider squirrel tiger turkey turtle whale wolf zebra"
).split()
"""The 45 animals of DDPO (Black et al. 2023, arXiv 2305.13301, section 5.1), each a prompt by itself."""


CONDITIONS = (
    "image",
    "mask_image",
    "control_image",
    "reference_image",
    "last_image",
    "negative_prompt",
    "num_frames",
)
"""Entries of a prompt that are arguments of the pipeline's call by their name alone."""

PICTURES = ("PNG", "JPEG", "WEBP")
"""Formats of pictures that prompts may name."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: what the pipeline is asked for; may be empty.
        metadata: what a reward may want to know beside the text, e.g. ``{"clauses": {"count": 2}}``.
        conditions: further arguments of the pipeline's call for this prompt, by name; a :class:`~pathlib.Path` (or a
            list of them) stands for the picture in that file, which is opened when the pipeline is called.

    Raises:
        UserError: the text is no string, or the metadata or the conditions no mapping.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    conditions: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"prompt {self.text!r} is {type(self.text).__name__}, expected a string")
        if not isinstance(self.metadata, Mapping):
            got = type(self.metadata).__name__
            raise UserError(f"metadata of prompt {self.text!r} is {got}, expected a mapping")
        if not isinstance(self.conditions, Mapping):
            got = type(self.conditions).__name__
            raise UserError(f"conditions of prompt {self.text!r} are {got}, expected a mapping")

    def __str__(self) -> str:
        return self.text


def load_prompts(spec: Any, *, size: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return the prompts that ``spec`` names.

    Args:
        spec: a list of strings, of mappings with ``prompt`` (the other entries are conditions and metadata) or of
            :class:`Prompt`; a path to a ``.txt``, ``.jsonl`` or ``.csv`` file; the name of a built-in set
            (:func:`list_prompts`); or ``{"name": NAME_OR_PATH, "size": ..., "seed": ...}``.
        size: how many prompts. Sampled sets (``scenes``, ``scenes-full``) give 256 by default; of other
            sources ``size`` prompts are chosen by ``seed``, in their own order; all by default.
        seed: of the sampled sets and of the choice.

    Raises:
        UserError: unknown name (with the nearest one), missing or unreadable file, a bad line (with file and
            line number), a picture that is not there, a condition that only some prompts have, no prompt at all, or a
            size that the source cannot give.
    """
    if isinstance(spec, Mapping):
        options = dict(spec)
        name = options.pop("name", None)
        if name is None or set(options) - {"size", "seed"}:
            raise UserError(f"prompts: got {dict(spec)!r}, expected name (a set or a file), size and seed")
        return load_prompts(name, **{"size": size, "seed": seed, **options})
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"prompts: size is {size!r}, expected a whole number of at least 1")
    if isinstance(spec, (str, Path)):
        if isinstance(spec, str) and spec in _SAMPLED:
            return [Prompt(text) for text in _sample_scenes(_SAMPLED[spec], size or 256, seed)]
        prompts = _named(spec)
        what = str(spec)
    elif isinstance(spec, Sequence):
        prompts = [_entry(item, f"prompts[{index}]") for index, item in enumerate(spec)]
        what = "the list"
    else:
        raise UserError(f"prompts: got {type(spec).__name__}, expected a list, a file name or a built-in set")
    if not prompts:
        raise UserError(f"prompts: {what} has no prompt, expected at least one")
    for name in {name for prompt in prompts for name in prompt.conditions}:
        having = sum(name in prompt.conditions for prompt in prompts)
        if having < len(prompts):
            raise UserError(f"prompts: {having} of the {len(prompts)} in {what} have {name!r}, expected all or none")
    return prompts if size is None else _choose(prompts, size, seed, what)


def conditions_of(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """Return the prompts' conditions by name, one value per prompt, as :meth:`difftune.Sampler.rollout` takes them."""
    names = prompts[0].conditions if prompts else ()
    return {name: [prompt.conditions[name] for prompt in prompts] for name in names}


def metadata_of(prompts: Sequence[Prompt]) -> list[Mapping[str, Any]]:
    """Return what a reward is told beside each text: the metadata, and a digest of the conditions where there are any.

    The digest stands under ``conditions``, a name that prompt files cannot give to metadata.
    """
    return [
        {**prompt.metadata, "conditions": _digest(sorted(prompt.conditions.items()))}
        if prompt.conditions
        else prompt.metadata
        for prompt in prompts
    ]


def told_apart(texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what tells each sample's prompt from the others, given what its reward is told (:func:`metadata_of`).

    Two prompts of one text over two pictures are two: their samples are not compared with one another.
    """
    return [
        f"{text} [{extra['conditions']}]" if "conditions" in extra else text
        for text, extra in zip(texts, metadata, strict=True)
    ]


def identities(prompts: Sequence[Prompt]) -> list[str]:
    """Return what tells each prompt from the others: its text, and a digest of its conditions where it has any."""
    return told_apart([prompt.text for prompt in prompts], metadata_of(prompts))


def _digest(value: Any) -> str:
    return hashlib.blake2b(_content(value), digest_size=8).hexdigest()


def _content(value: Any) -> bytes:
    """Return the bytes that a condition is: of a picture its content, wherever its file lies.

    Raises:
        UserError: an object that only its address tells from others.
    """
    if isinstance(value, Mapping):
        return b"mapping" + "".join(sorted(_digest(pair) for pair in value.items())).encode()
    if isinstance(value, (list, tuple)):
        return b"sequence" + "".join(map(_digest, value)).encode()
    if isinstance(value, Path):
        return b"file" + _content_of_file(value, value.stat().st_mtime_ns)
    if hasattr(value, "getbands"):  # a picture of PIL: the bytes of one with a palette are indices
        picture = value.convert("RGBA") if value.mode in ("P", "PA") else value
        return f"picture {picture.mode} {picture.size} ".encode() + picture.tobytes()
    if hasattr(value, "detach"):  # a tensor
        import torch

        plain = value.detach().cpu().contiguous()
        raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"tensor {plain.dtype} {tuple(plain.shape)} ".encode() + raw
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array
        if value.dtype.hasobject:
            return _content(["objects", value.shape, value.tolist()])
        return f"array {value.dtype.descr} {value.shape} ".encode() + value.tobytes()
    shown = repr(value)
    if not isinstance(value, (str, bytes)) and " at 0x" in shown:
        raise UserError(
            f"prompts: a condition is {type(value).__name__}, expected text, numbers, pictures, arrays, tensors, or "
            "lists and mappings of them, which their content tells from others"
        )
    return shown.encode()


@functools.lru_cache(maxsize=4096)
def _content_of_file(path: Path, changed: int) -> bytes:
    return hashlib.blake2b(path.read_bytes()).digest()


def list_prompts() -> list[str]:
    """Return the names of the built-in sets.

    ``animals``: DDPO's 45 animals. ``scenes``: distinct captions of the embedded world that name a random
    part of a scene. ``scenes-full``: captions that name everything. ``scenes-room``: captions that leave much
    of the picture open, the empty one first, as a reward on the whole picture needs.
    """
    return sorted([*_FIXED, *_SAMPLED])


def split_prompts(prompts: Sequence[Prompt], held_out: float | int, seed: int = 0) -> tuple[list[Prompt], list[Prompt]]:
    """Split into prompts to train on and prompts held out, both in their given order.

    Equal texts stay together, so that no held-out prompt is trained on.

    Args:
        prompts: what to split.
        held_out: a share in (0, 1) or a number of distinct prompts; 0 holds nothing out.
        seed: of the choice.

    Raises:
        UserError: nothing would be left to train on, or the share is negative.
    """
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    share = isinstance(held_out, float) and held_out != 0
    count = max(1, round(held_out * len(texts))) if share else int(held_out)
    if held_out < 0 or count >= len(texts) or (share and held_out >= 1):
        raise UserError(
            f"held_out is {held_out}, expected a share below 1 or fewer than the {len(texts)} distinct prompts"
        )
    chosen = {texts[index] for index in _shuffled(len(texts), f"held-out/{seed}")[:count]}
    train = [prompt for prompt in prompts if prompt.text not in chosen]
    return train, [prompt for prompt in prompts if prompt.text in chosen]


class PromptStream:
    """The order in which a run sees its prompts: an endless sequence of shuffled passes.

    Epoch e of ``count`` prompts is the slice ``[e * count, (e + 1) * count)`` of that sequence: a pure
    function of (seed, epoch, count), so that a resumed run needs no cursor and every process can compute it
    by itself. Each pass has every prompt once; an epoch that straddles two passes can hold a prompt twice.

    Args:
        prompts: at least one.
        seed: of the shuffles, which are the same on every platform and version.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise UserError("prompts: got none, expected at least one")
        self.prompts = tuple(prompts)
        self.seed = seed
        self._pass: tuple[int, list[int]] = (-1, [])

    def epoch(self, epoch: int, count: int) -> list[Prompt]:
        """Return the ``count`` prompts of epoch number ``epoch`` (from 0)."""
        if epoch < 0 or count < 0:
            raise ValueError(f"epoch {epoch} and count {count} must not be negative")
        return [self[index] for index in range(epoch * count, (epoch + 1) * count)]

    def __getitem__(self, index: int) -> Prompt:
        """Return prompt number ``index`` (from 0) of the endless sequence."""
        number, place = divmod(index, len(self.prompts))
        if self._pass[0] != number:
            self._pass = (number, _shuffled(len(self.prompts), f"pass/{self.seed}/{number}"))
        return self.prompts[self._pass[1][place]]


def _shuffled(count: int, key: str) -> list[int]:
    """Return 0 ... count - 1 in an order that depends on ``key`` alone.

    Sorted by hash, because random generators only promise their streams within one version of their library.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{key}/{index}".encode()).digest())


def _choose(prompts: list[Prompt], size: int, seed: int, what: str) -> list[Prompt]:
    if size > len(prompts):
        raise UserError(f"prompts: size is {size}, but {what} has {len(prompts)}; leave size out to take all")
    return [prompts[index] for index in sorted(_shuffled(len(prompts), f"choice/{seed}")[:size])]


def _entry(item: Any, where: str, folder: Path | None = None) -> Prompt:
    """Turn a string, a mapping with ``prompt`` or a :class:`Prompt` into a :class:`Prompt`.

    ``folder`` is where the paths of pictures begin; the working directory by default.
    """
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt(item)
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {item!r}, expected a string or a mapping with 'prompt'")
    if not isinstance(item.get("prompt"), str):
        got = f"prompt {item['prompt']!r}" if "prompt" in item else f"only {sorted(map(str, item))}"
        raise UserError(f"{where} has {got}, expected 'prompt' to be a string")
    rest = {key: value for key, value in item.items() if key != "prompt"}
    further = rest.pop("conditions", {})
    if not isinstance(further, Mapping):
        raise UserError(f"{where} has conditions {further!r}, expected a mapping of the pipeline's arguments")
    given = {**{name: rest.pop(name) for name in CONDITIONS if name in rest}, **further}
    return Prompt(
        item["prompt"], rest, {name: _condition(name, value, where, folder) for name, value in given.items()}
    )


def _condition(name: str, value: Any, where: str, folder: Path | None) -> Any:
    """Return a condition's value: a checked path for the name of a picture, anything else as it is."""
    if isinstance(value, list):
        return [_condition(name, item, where, folder) for item in value]
    if not isinstance(value, (str, Path)) or not ("image" in name or "mask" in name):
        return value
    path = (folder or Path()) / Path(value).expanduser()
    from PIL import Image

    try:
        with Image.open(path, formats=PICTURES):
            return path
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"no {', '.join(PICTURES)} picture"
        beside = "the working directory" if folder is None else "the prompt file"
        raise UserError(f"{where} {name} {str(value)!r}: {why}; paths are relative to {beside}") from None


def _named(spec: str | Path) -> list[Prompt]:
    name = str(spec)
    if name in _FIXED and isinstance(spec, str):
        return [Prompt(text) for text in _FIXED[name]()]
    path = Path(spec).expanduser()
    if path.suffix.lower() in SUFFIXES:
        return _read_file(path)
    if path.exists():
        raise UserError(f"prompt file {name!r} ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}")
    known = list_prompts()
    raise UserError(
        f"unknown prompts {name!r}{nearest(name, known)} (built-in: {', '.join(known)}; else a file in "
        f"{', '.join(SUFFIXES)}, or a list: [{name!r}])"
    )


def _read_file(path: Path) -> list[Prompt]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    return readers[path.suffix.lower()](path, read_text(path))


def read_text(path: Path, what: str = "prompt file") -> str:
    """Return the text of a UTF-8 file of at most 64 MiB.

    Raises:
        UserError: the file cannot be read, is too large or is not UTF-8; ``what`` says what it was to be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{what} {str(path)!r} is larger than {MAX_BYTES // 2**20} MiB: split it")
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = f"{data[error.start]:#04x}"
        raise UserError(f"{path}:{line}: byte {byte} is not UTF-8: save the file as UTF-8") from None


def _lines(text: str) -> list[tuple[int, str]]:
    """Return (line number, stripped line) of the lines that are not blank.

    Split at newlines only: ``str.splitlines`` also cuts at form feeds and separators that a prompt may hold.
    """
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    return [(number, line) for number, line in numbered if line]


def _read_txt(path: Path, text: str) -> list[Prompt]:
    return [Prompt("" if line == '""' else line) for _, line in _lines(text)]


def _read_jsonl(path: Path, text: str) -> list[Prompt]:
    prompts = []
    for number, line in _lines(text):
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}:{number}: not JSON ({error}), expected {{"prompt": "..."}}') from None
        if not isinstance(item, dict):
            raise UserError(f'{path}:{number}: got {item!r}, expected an object {{"prompt": "..."}}')
        prompts.append(_entry(item, f"{path}:{number}:", path.parent))
    return prompts


def _read_csv(path: Path, text: str) -> list[Prompt]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    prompts = []
    try:
        if "prompt" not in (reader.fieldnames or []):
            raise UserError(f"{path}:1: columns are {reader.fieldnames or []}, expected one called 'prompt'")
        for row in reader:
            # DictReader files surplus cells under None and fills missing ones with None.
            if None in row or None in row.values():
                cells = len(reader.fieldnames or [])
                raise UserError(f"{path}:{reader.line_num}: expected {cells} cells: quote those with commas")
            prompts.append(_entry(_without_strings(row), f"{path}:{reader.line_num}:", path.parent))
    except csv.Error as error:
        # The inner reader's count: DictReader's own lags one row behind when a row fails.
        raise UserError(f"{path}:{reader.reader.line_num}: {error}") from None
    return prompts


def _without_strings(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of a csv with its conditions as they are in a jsonl: numbers as numbers, empty cells left out."""
    rest: dict[str, Any] = {}
    conditions: dict[str, Any] = {}
    for column, cell in row.items():
        name = column.removeprefix("conditions.")
        if name == column and name not in CONDITIONS:
            rest[name] = cell
        elif cell:
            conditions[name] = _number(cell)
    return {**rest, "conditions": conditions} if conditions else rest


def _number(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _sample_scenes(describe: Callable[[Any, Any], str], size: int, seed: int) -> list[str]:
    """Draw ``size`` distinct captions of random scenes of the embedded world."""
    import numpy as np

    from difftune.zoo.world import sample_scene

    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    for _ in range(100 * size):
        texts.setdefault(describe(sample_scene(rng), rng))
        if len(texts) == size:
            return list(texts)
    raise UserError(f"prompts: size is {size}, but the world has only about {len(texts)} such captions")


def _partial_caption(scene: Any, rng: Any) -> str:
    from difftune.zoo.world import sample_caption

    return sample_caption(scene, rng)


def _full_caption(scene: Any, rng: Any) -> str:
    from difftune.zoo.world import caption

    return caption(scene)


def _room() -> list[str]:
    """Captions that leave most of the picture open: nothing, objects without a ground, only a pattern."""
    from difftune.zoo.world import COLOURS, COUNTS, PATTERNS, SHAPES, Scene, caption

    def scene(count: int = 1, colour: str = "red", shape: str = "circle", pattern: str = "plain") -> Scene:
        return Scene(count, colour, shape, "black" if colour != "black" else "white", pattern)

    objects = [caption(scene(count), ["count"]) for count in COUNTS]
    shaped = [caption(scene(count, shape=shape), ["count", "shape"]) for shape in SHAPES for count in COUNTS]
    coloured = [caption(scene(count, colour), ["count", "colour"]) for colour in COLOURS for count in COUNTS]
    grounds = [caption(scene(pattern=pattern), ["pattern"]) for pattern in PATTERNS]
    return ["", *grounds, *objects, *shaped, *coloured]


_FIXED: dict[str, Callable[[], list[str]]] = {"animals": lambda: list(ANIMALS), "scenes-room": _room}
_SAMPLED: dict[str, Callable[[Any, Any], str]] = {"scenes": _partial_caption, "scenes-full": _full_caption}
