"""Scene score: is the picture what the caption says, read back from the pixels of the embedded world.

A verifiable reward in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513): count, colour, shape, background and
pattern are recognised by classical image processing, and each clause that the prompt names is scored by itself. The
total is the mean over the named clauses, or, with ``correct: all``, GenEval's "every clause right".

**The parts.** A prompt names only some clauses, so "the score of the count" does not exist for every sample, and any
number put in its place would bend the logged mean. The parts are therefore what each clause *cost*: minus the points
the sample lost to it, 0 where nothing was lost or nothing was asked. They add up: ``total = 1 + sum of the parts``, for
every sample and hence for every mean. ``lost/count: -0.12`` in the log says that the mean reward would be 0.12 higher
if every count had been right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.reward import Reward, reward
from difftune.rewards._preprocess import per_frame
from difftune.types import RewardOutput, UserError
from difftune.zoo.reader import SceneReading, read_scene, score_clauses
from difftune.zoo.world import CLAUSES, COLOURS, COUNTS, PATTERNS, SHAPES, Clauses, parse_caption

_ALLOWED: dict[str, Sequence[Any]] = {
    "count": COUNTS,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(COLOURS),
    "pattern": PATTERNS,
}


@reward("scene")
class SceneReward(Reward):
    """How many of the clauses that the prompt names the picture fulfils, in [0, 1].

    A prompt that names no clause (the empty one, or text of another world) scores 1 if the picture can be read as a
    scene at all, else 0. Metadata with ``clauses`` (e.g. ``{"clauses": {"count": 2, "colour": "red"}}``) wins over
    what the prompt says. A video counts as the mean of its frames.

    Parts: ``lost/count``, ``lost/colour``, ``lost/shape``, ``lost/background``, ``lost/pattern`` and ``lost/readable``
    (prompts without clauses), each in [-1, 0]; the total is 1 plus their sum (see the module's text for why).

    Args:
        correct: ``mean``, the mean of the clauses' scores (which have partial credit: two objects of three are right);
            ``all``, 1 if every clause is fully right, else 0.
    """

    video = True
    range = "[0, 1]"

    def __init__(self, correct: Literal["mean", "all"] = "mean") -> None:
        if correct not in ("mean", "all"):
            raise UserError(f"reward 'scene': correct is {correct!r}, expected 'mean' or 'all'")
        self.correct = correct

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return totals ``(B,)`` and what each clause cost."""
        pictures, frames = per_frame(images)
        asked = [asked_clauses(prompt, extra) for prompt, extra in zip(prompts, metadata, strict=True)]
        scored = [
            self._score_one(read_scene(picture), asked[index // frames])
            for index, picture in enumerate(pictures.float().cpu().numpy())
        ]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32).view(-1, frames).mean(1).to(images.device)

        parts = {
            f"lost/{name}": column([0.0 - costs.get(name, 0.0) for _, costs in scored])
            for name in (*CLAUSES, "readable")
        }
        return RewardOutput(column([total for total, _ in scored]), parts)

    def _score_one(self, reading: SceneReading, asked: Clauses) -> tuple[float, dict[str, float]]:
        """Return one picture's total and the points it loses to each clause; those of ``all`` are shared out."""
        if not asked:
            return (1.0, {}) if reading.readable else (0.0, {"readable": 1.0})
        scores = score_clauses(reading, asked)
        whole = sum(1 - score for score in scores.values())
        if self.correct == "mean":
            return sum(scores.values()) / len(scores), {k: (1 - v) / len(scores) for k, v in scores.items()}
        return (0.0, {k: (1 - v) / whole for k, v in scores.items()}) if whole > 0 else (1.0, {})


def asked_clauses(prompt: str, metadata: Mapping[str, Any]) -> Clauses:
    """Return the clauses that a sample is held to: ``metadata["clauses"]`` if there is one, else the prompt's.

    Raises:
        UserError: the metadata names an unknown clause or value.
    """
    given = metadata.get("clauses")
    if given is None:
        return parse_caption(prompt)
    if not isinstance(given, Mapping):
        raise UserError(f"reward 'scene': clauses of prompt {prompt!r} are {given!r}, expected a mapping")
    for name, value in given.items():
        if value not in _ALLOWED.get(name, ()):
            expected = ", ".join(map(str, _ALLOWED.get(name, CLAUSES)))
            raise UserError(
                f"reward 'scene': prompt {prompt!r} asks for {name} {value!r} in its metadata, expected {expected}"
            )
    return dict(given)
