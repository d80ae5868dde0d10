"""The embedded world: captioned 64 x 64 scenes of one to three coloured shapes on a patterned background.

A scene is known exactly, so which captions are true of it is known exactly too. Captions name a random subset of
what is there; the empty caption is part of the distribution and doubles as the unconditional one of guidance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Side of a scene in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
"""Colour name -> 8-bit RGB."""

SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "striped", "dotted", "checkered")
COUNTS = (1, 2, 3)
CLAUSES = ("count", "colour", "shape", "background", "pattern")
"""What a caption can name: three clauses about the objects, two about the background."""

CELL = 8
"""Width of a stripe or of a checker cell and diameter of a dot, in pixels; patterns repeat every two cells."""

MARGIN = 3.0
"""Free border around every object, in pixels."""

GAP = 2.5
"""Least distance between two objects, in pixels."""

EMPTY_SHARE = 0.12
"""Share of empty captions in `sample_caption`."""

FULL_SHARE = 0.38
"""Share of captions that name everything in `sample_caption`; the rest name a random part."""

_SUPERSAMPLING = 4
_NUMERALS = {2: "two", 3: "three"}
_RADII = {1: (12.0, 18.0), 2: (9.0, 12.0), 3: (7.0, 9.0)}

Clauses = dict[str, int | str]
"""Clause name (one of `CLAUSES`) -> value, e.g. ``{"count": 2, "shape": "star"}``."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `seed` places the objects, so that a scene determines its picture.

    Raises:
        ValueError: a value outside the world, or objects of the background's colour.
    """

    count: int
    colour: str
    shape: str
    background: str
    pattern: str
    seed: int = 0

    def __post_init__(self) -> None:
        allowed = {"count": COUNTS, "colour": COLOURS, "shape": SHAPES, "background": COLOURS, "pattern": PATTERNS}
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"Scene.{name} is {value!r}; expected one of {', '.join(map(str, values))}.")
        if self.colour == self.background:
            raise ValueError(f"objects and background are both {self.colour!r}; choose two colours.")

    @property
    def clauses(self) -> Clauses:
        """Every clause that is true of the scene, in the order of `CLAUSES`."""
        return {name: getattr(self, name) for name in CLAUSES}


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene uniformly (objects never have the background's colour)."""
    colour, background = rng.permutation(list(COLOURS))[:2]
    return Scene(
        count=int(rng.integers(COUNTS[0], COUNTS[-1] + 1)),
        colour=str(colour),
        shape=str(rng.choice(SHAPES)),
        background=str(background),
        pattern=str(rng.choice(PATTERNS)),
        seed=int(rng.integers(2**31)),
    )


def accent(colour: str) -> tuple[int, int, int]:
    """The 8-bit RGB in which a pattern is drawn on a background of `colour`: darker, for black lighter."""
    if colour == "black":
        return (80, 80, 80)
    red, green, blue = (round(0.7 * channel) for channel in COLOURS[colour])
    return (red, green, blue)


def outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1 around the origin, y downwards: an array (corners, 2)."""
    if shape == "circle":
        angles = np.linspace(0, 2 * math.pi, 96, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "square":
        return 0.88 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=float)
    if shape == "triangle":
        return np.array([[0.0, -1.05], [1.1, 0.85], [-1.1, 0.85]])
    angles = -math.pi / 2 + np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.25, 0.55)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def render(scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
    """Draws a scene, antialiased, as a 64 x 64 RGB picture.

    Args:
        scene: What to draw.
        rng: Places the objects; None takes ``scene.seed``.
    """
    side = SIZE * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side), COLOURS[scene.background])
    draw = ImageDraw.Draw(picture)
    _draw_pattern(draw, scene.pattern, accent(scene.background))
    corners = outline(scene.shape)
    for x, y, radius in layout(scene, rng):
        points = (np.array([x, y]) + radius * corners) * _SUPERSAMPLING
        draw.polygon([(float(px), float(py)) for px, py in points], fill=COLOURS[scene.colour])
    return picture.reduce(_SUPERSAMPLING)


def _draw_pattern(draw: ImageDraw.ImageDraw, pattern: str, fill: tuple[int, int, int]) -> None:
    side, cell = SIZE * _SUPERSAMPLING, CELL * _SUPERSAMPLING
    if pattern == "striped":
        for x in range(0, side, 2 * cell):
            draw.rectangle([x, 0, x + cell - 1, side], fill=fill)
    elif pattern == "dotted":
        for x in range(cell // 2, side, 2 * cell):
            for y in range(cell // 2, side, 2 * cell):
                draw.ellipse([x, y, x + cell - 1, y + cell - 1], fill=fill)
    elif pattern == "checkered":
        for x in range(0, side, cell):
            for y in range(x % (2 * cell), side, 2 * cell):
                draw.rectangle([x, y, x + cell - 1, y + cell - 1], fill=fill)


def layout(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """Places the objects so that they neither touch nor enter the margin.

    Args:
        scene: What is drawn.
        rng: Places the objects; None takes ``scene.seed``.

    Returns:
        One row (x, y, radius) for each object, in pixels.
    """
    rng = np.random.default_rng(scene.seed) if rng is None else rng
    reach = float(np.linalg.norm(outline(scene.shape), axis=1).max())
    low, high = _RADII[scene.count]
    radii = rng.uniform(low, high) * rng.uniform(0.92, 1.0, size=scene.count)
    while True:
        reaches = radii * reach
        start, stop = MARGIN + reaches, SIZE - MARGIN - reaches
        layouts = start[:, None] + rng.random((64, scene.count, 2)) * (stop - start)[:, None]
        distances = np.linalg.norm(layouts[:, :, None] - layouts[:, None], axis=-1)
        needed = reaches[:, None] + reaches[None] + GAP
        apart = (distances >= needed) | np.eye(scene.count, dtype=bool)
        valid = np.flatnonzero(apart.all(axis=(1, 2)))
        if valid.size:
            return np.concatenate([layouts[valid[0]], radii[:, None]], axis=1)
        radii = 0.96 * radii


def caption(scene: Scene, parts: Collection[str] = CLAUSES) -> str:
    """Describes the named parts of a scene, e.g. ``"two yellow stars on a dotted purple background"``.

    Args:
        scene: The scene.
        parts: Clauses to name, from `CLAUSES`. Colour and shape need the count, because English cannot name an object
            without its number; a count without a shape speaks of "shapes".

    Raises:
        ValueError: an unknown part, or colour or shape without the count.
    """
    chosen = set(parts)
    if unknown := chosen - set(CLAUSES):
        raise ValueError(f"unknown caption parts {sorted(unknown)}; expected a subset of {', '.join(CLAUSES)}.")
    if chosen & {"colour", "shape"} and "count" not in chosen:
        raise ValueError(f"parts {sorted(chosen)} name objects without their count; add 'count'.")
    phrases = []
    if "count" in chosen:
        noun = (scene.shape if "shape" in chosen else "shape") + ("s" if scene.count > 1 else "")
        words = ([scene.colour] if "colour" in chosen else []) + [noun]
        phrases.append(" ".join([_NUMERALS.get(scene.count) or _article(words[0]), *words]))
    if chosen & {"background", "pattern"}:
        words = [getattr(scene, name) for name in ("pattern", "background") if name in chosen] + ["background"]
        phrases.append(" ".join([_article(words[0]), *words]))
    return " on ".join(phrases)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


OBJECT_PARTS = ((), ("count",), ("count", "shape"), ("count", "colour"), ("count", "colour", "shape"))
BACKGROUND_PARTS = ((), ("pattern",), ("background",), ("background", "pattern"))
PARTIAL = tuple(o + b for o in OBJECT_PARTS for b in BACKGROUND_PARTS if 0 < len(o + b) < len(CLAUSES))
"""Every proper, non-empty selection of clauses that English can put into one caption."""


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that is true of the scene: empty (12 %), of everything (38 %), or of a random part (50 %)."""
    draw = rng.random()
    if draw < EMPTY_SHARE:
        return ""
    if draw < EMPTY_SHARE + FULL_SHARE:
        return caption(scene)
    return caption(scene, PARTIAL[rng.integers(len(PARTIAL))])


_CAPTION = re.compile(
    r"(?:(?P<count>an?|one|two|three) (?:(?P<colour>{c}) )?(?P<shape>{s}|shape)s?)?"
    r"(?P<on> on )?"
    r"(?:an? (?:(?P<pattern>{p}) )?(?:(?P<background>{c}) )?(?P<ground>background))?".replace("{c}", "|".join(COLOURS))
    .replace("{s}", "|".join(SHAPES))
    .replace("{p}", "|".join(PATTERNS))
)
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}


def parse_caption(text: str) -> Clauses:
    """The clauses a caption names: the inverse of `caption`. Text that is not of this world gives ``{}``.

    >>> parse_caption("two yellow stars on a dotted background")
    {'count': 2, 'colour': 'yellow', 'shape': 'star', 'pattern': 'dotted'}
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None or bool(match["on"]) != bool(match["count"] and match["ground"]):
        return {}
    named = {name: match[name] for name in CLAUSES if match[name] and match[name] != "shape"}
    return {name: _NUMBERS[value] if name == "count" else value for name, value in named.items()}


def vocabulary() -> list[str]:
    """Every word that a caption of this world can contain, sorted."""
    words = {"a", "an", "on", "background", "shape", "shapes", *_NUMERALS.values(), *COLOURS, *PATTERNS}
    return sorted(words | set(SHAPES) | {shape + "s" for shape in SHAPES})


def render_scenes(count: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """Draws `count` scenes; returns them and their pictures as an array (count, 3, 64, 64) of uint8."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = np.empty((count, 3, SIZE, SIZE), dtype=np.uint8)
    for index, scene in enumerate(scenes):
        pictures[index] = np.asarray(render(scene)).transpose(2, 0, 1)
    return scenes, pictures
