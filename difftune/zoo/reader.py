"""Reads a scene back from its pixels by classical image processing, as GenEval does with a detector.

The background's colour comes from the border, objects are what lies closer to another colour than to the background,
shapes are matched against silhouettes and patterns against templates folded to one period. No network is involved,
so a score says exactly which clause of a caption a picture misses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from difftune.zoo.world import CELL, CLAUSES, COLOURS, MARGIN, PATTERNS, SHAPES, SIZE, Clauses, accent, outline

MIN_AREA = 28
"""Smallest object in pixels of a 64 x 64 picture; the world's smallest has about 80."""

_NAMES = tuple(COLOURS)
_BASE = np.array([COLOURS[name] for name in _NAMES], dtype=np.float32)
_SPAN = np.array([accent(name) for name in _NAMES], dtype=np.float32) - _BASE
_SPAN_SQUARED = (_SPAN**2).sum(axis=1)
_PERIOD = 2 * CELL

# Distances are in 8-bit RGB units, where neighbouring palette colours are about 80 apart.
_FAR = 60.0
_MAX_BACKGROUND_DISTANCE = 35.0
_MIN_OBJECT_DISTANCE = 30.0
_MAX_COLOUR_DISTANCE = 60.0
_MIN_OVERLAP = 0.62
_MIN_CONTRAST = 0.18
_MIN_CORRELATION = 0.65
_MAX_PATTERN_ERROR = 0.33


@dataclass(frozen=True)
class ObjectReading:
    """One object of a picture: its names, None where unreadable, and its area in pixels of a 64 x 64 picture."""

    colour: str | None
    shape: str | None
    area: int


@dataclass(frozen=True)
class SceneReading:
    """What a picture shows, None where that cannot be read.

    Attributes:
        objects: Every object found, largest first.
        background: Colour of the background.
        pattern: Pattern of the background.
    """

    objects: tuple[ObjectReading, ...]
    background: str | None
    pattern: str | None

    @property
    def count(self) -> int | None:
        """Number of objects; None without a readable background, against which objects are found."""
        return None if self.background is None else len(self.objects)

    @property
    def colour(self) -> str | None:
        """The colour that all objects share."""
        return _unanimous([found.colour for found in self.objects])

    @property
    def shape(self) -> str | None:
        """The shape that all objects share."""
        return _unanimous([found.shape for found in self.objects])

    @property
    def clauses(self) -> dict[str, int | str | None]:
        """All five clauses in the order of `world.CLAUSES`, to be compared with ``Scene.clauses``."""
        return {name: getattr(self, name) for name in CLAUSES}

    @property
    def readable(self) -> bool:
        """Whether all five clauses could be read."""
        return None not in self.clauses.values()


def _unanimous(names: list[str | None]) -> str | None:
    return names[0] if len(set(names)) == 1 else None


def read_scene(image: np.ndarray) -> SceneReading:
    """Reads a picture.

    Args:
        image: Array or CPU tensor (3, H, W) in [0, 1]; anything but 64 x 64 is resized first.

    Raises:
        ValueError: the image has another number of dimensions or of channels.
    """
    pixels = _pixels(image)
    background, background_distance = _read_background(pixels)
    if background is None:
        return SceneReading((), None, None)
    to_background, position = _along_background(pixels, background)
    others = np.arange(len(_NAMES)) != background
    to_palette = _distances(pixels, _BASE[others])
    nearest = to_palette.min(axis=-1)
    mask = (to_background > nearest) & (to_background > _MIN_OBJECT_DISTANCE)
    objects = _read_objects(mask, pixels, to_background)
    return SceneReading(objects, _NAMES[background], _read_pattern(position, mask))


def score_clauses(reading: SceneReading, clauses: Clauses) -> dict[str, float]:
    """Scores each clause of a caption in [0, 1]; what cannot be read scores 0.

    Colour and shape score the share of the objects that have it, background and pattern 0 or 1, and the count
    1 - |read - asked| / asked, at least 0, as flow_grpo's GenEval reward does.

    Args:
        reading: What the picture shows.
        clauses: What the caption names, from `world.parse_caption`.
    """
    return {name: _score(reading, name, value) for name, value in clauses.items()}


def _score(reading: SceneReading, name: str, asked: int | str) -> float:
    if name == "count":
        read, number = reading.count, int(asked)
        return 0.0 if read is None else max(0.0, 1 - abs(read - number) / number)
    if name in ("colour", "shape"):
        values = [getattr(found, name) for found in reading.objects]
        return sum(value == asked for value in values) / len(values) if values else 0.0
    return float(getattr(reading, name) == asked)


def _pixels(image: np.ndarray) -> np.ndarray:
    """Array (64, 64, 3) of floats from 0 to 255."""
    array = np.asarray(image, dtype=np.float32)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"an image of shape {array.shape} was given; expected (3, height, width) in [0, 1].")
    array = 255 * array.transpose(1, 2, 0).clip(0, 1)
    if array.shape[:2] != (SIZE, SIZE):
        resized = Image.fromarray(array.round().astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BOX)
        array = np.asarray(resized, dtype=np.float32)
    return array


def _distances(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Euclidean distances (..., colours) of pixels (..., 3) to colours (colours, 3)."""
    squared = (pixels**2).sum(-1)[..., None] - 2 * pixels @ colours.T + (colours**2).sum(-1)
    return np.sqrt(squared.clip(min=0))


def _along_background(pixels: np.ndarray, colour: int) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the mixtures of a background's colour and its accent, and the accent's share in the nearest one."""
    offset = pixels - _BASE[colour]
    position = (offset @ _SPAN[colour] / _SPAN_SQUARED[colour]).clip(0, 1)
    return np.linalg.norm(offset - position[..., None] * _SPAN[colour], axis=-1), position


def _read_background(pixels: np.ndarray) -> tuple[int | None, float]:
    """Index of the colour whose mixtures with its accent fit the border best, and the mean distance to it."""
    width = int(MARGIN)
    border = np.concatenate(
        [pixels[:width], pixels[-width:], pixels[:, :width].swapaxes(0, 1), pixels[:, -width:].swapaxes(0, 1)]
    ).reshape(-1, 3)
    fits = [np.minimum(_along_background(border, colour)[0], _FAR).mean() for colour in range(len(_NAMES))]
    best = int(np.argmin(fits))
    return (best if fits[best] < _MAX_BACKGROUND_DISTANCE else None), float(fits[best])


def _read_objects(mask: np.ndarray, pixels: np.ndarray, contrast: np.ndarray) -> tuple[ObjectReading, ...]:
    labels, _ = ndimage.label(mask)
    found = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        silhouette = labels[window] == label
        area = int(silhouette.sum())
        if area >= MIN_AREA:
            colour = _read_colour(pixels[window][silhouette], contrast[window][silhouette])
            found.append(ObjectReading(colour, _read_shape(silhouette), area))
    return tuple(sorted(found, key=lambda reading: -reading.area))


def _read_colour(pixels: np.ndarray, contrast: np.ndarray) -> str | None:
    """The palette's name for the object's inner half, where the background does not shine through."""
    inner = np.median(pixels[contrast >= np.median(contrast)], axis=0)
    distances = _distances(inner, _BASE)
    best = int(distances.argmin())
    return _NAMES[best] if distances[best] < _MAX_COLOUR_DISTANCE else None


_GRID = 24
_BLURS = (0.0, 0.08, 0.16, 0.22)


@cache
def _silhouettes() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and silhouettes (templates, 24, 24) of every shape, sharp and blurred, stretched to the bounding box.

    Blur, in units of the radius, rounds the corners off and fills a star's notches, as an autoencoder does.
    """
    names, silhouettes = [], []
    for shape in SHAPES:
        for blur in _BLURS:
            picture = Image.new("L", (192, 192))
            corners = 96 + 64 * outline(shape)
            ImageDraw.Draw(picture).polygon([(float(x), float(y)) for x, y in corners], fill=255)
            solid = ndimage.gaussian_filter(np.asarray(picture, dtype=np.float32), 64 * blur) >= 127
            names.append(shape)
            silhouettes.append(_stretch(solid[ndimage.find_objects(solid.astype(int))[0]]))
    return tuple(names), np.stack(silhouettes)


def _stretch(silhouette: np.ndarray) -> np.ndarray:
    height, width = silhouette.shape
    centres = (np.arange(_GRID) + 0.5) / _GRID
    return silhouette[np.ix_((centres * height).astype(int), (centres * width).astype(int))]


def _read_shape(silhouette: np.ndarray) -> str | None:
    """The shape whose silhouette overlaps best (intersection over union after stretching to the bounding box)."""
    names, templates = _silhouettes()
    stretched = _stretch(silhouette)
    overlaps = (stretched & templates).sum((1, 2)) / (stretched | templates).sum((1, 2))
    best = int(overlaps.argmax())
    return names[best] if overlaps[best] >= _MIN_OVERLAP else None


@cache
def _pattern_templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and one period of every pattern with an accent at every phase, as (templates, 256) of zeros and ones."""
    x, y = np.meshgrid(np.arange(_PERIOD), np.arange(_PERIOD))
    centre = CELL - 0.5
    pictures = {
        "striped": [x < CELL, y < CELL],
        "dotted": [np.hypot(x - centre, y - centre) <= CELL / 2],
        "checkered": [(x < CELL) == (y < CELL)],
    }
    names, templates = [], []
    for name, variants in pictures.items():
        for template in variants:
            for shift in np.ndindex(_PERIOD, _PERIOD):
                names.append(name)
                templates.append(np.roll(template, shift, axis=(0, 1)).ravel().astype(np.float32))
    return tuple(names), np.stack(templates)


def _read_pattern(position: np.ndarray, mask: np.ndarray) -> str | None:
    """The pattern that explains the accent's share `position` (64, 64) outside of the objects, at any phase."""
    free = ~ndimage.binary_dilation(mask, iterations=2)
    if free.sum() < SIZE * SIZE / 10:
        return None
    fold = (SIZE // _PERIOD, _PERIOD, SIZE // _PERIOD, _PERIOD)
    weight = free.reshape(fold).sum((0, 2)).astype(np.float32).ravel()
    folded = np.where(free, position, 0).reshape(fold).sum((0, 2)).ravel() / weight.clip(min=1)
    mean = np.average(folded, weights=weight)
    contrast = np.sqrt(np.average((folded - mean) ** 2, weights=weight))
    if contrast < _MIN_CONTRAST:
        return PATTERNS[0] if np.abs(position[free] - mean).mean() < _MAX_PATTERN_ERROR else None
    names, templates = _pattern_templates()
    share = templates @ weight / weight.sum()
    covariance = templates @ (weight * (folded - mean)) / weight.sum()
    correlation = covariance / (contrast * np.sqrt((share * (1 - share)).clip(min=1e-6)))
    best = int(correlation.argmax())
    template = np.tile(templates[best].reshape(_PERIOD, _PERIOD), (SIZE // _PERIOD,) * 2)
    error = np.abs(position - template)[free].mean()
    return names[best] if correlation[best] >= _MIN_CORRELATION and error < _MAX_PATTERN_ERROR else None
