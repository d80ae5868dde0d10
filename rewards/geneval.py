"""GenEval: are the objects there that the prompt asks for, as many, of the colour and where it says.

After Ghosh et al. 2023, "GenEval" (arXiv 2310.11513), with a detector of transformers in place of the paper's
Mask2Former of mmdet, so the numbers are not the paper's. Each prompt brings its clauses in the benchmark's own form::

    tag: position
    include: [{class: dog, count: 1}, {class: bench, count: 1, color: red, position: [left of, 0]}]
    exclude: [{class: bench, count: 2}]

An object is there where the detector is surer than 0.3, and 0.9 throughout a prompt whose tag is ``counting``; at most
16 of a class are. A clause looks at the ``count`` surest objects of its class and at no others: they must be as many,
all of its colour, and each where it should be beside every object of the clause that it names. So a second bench that
the detector is less sure of does not make up for the first one's colour. A clause that fails leaves nothing that later
ones could lie beside.

A colour is what CLIP calls the box. The benchmark paints what is not the object grey by the detector's mask; boxes have
none, and then the benchmark too shows CLIP the box as it is, of which CLIP's preprocessing keeps the middle square. A
position holds between the centres of two boxes::

    d = max(|c_a - c_b| - 0.1 (size_a + size_b), 0) sign(c_a - c_b), divided by |c_a - c_b|

a is left of b for ``d_x < -0.5``, right of it for ``d_x > 0.5``, above for ``d_y < -0.5`` and below for ``d_y > 0.5``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._clip import ClipReward, floating
from difftune.rewards._preprocess import Preprocess
from difftune.types import UserError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The benchmark's colours."""

POSITIONS = ("left of", "right of", "above", "below")
"""The benchmark's relations."""

_ALIASES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
"""The benchmark's names of classes that COCO's labels call something else."""

_TEMPLATES = ("a photo of a {colour} {kind}", "a photo of a {colour}-colored {kind}", "a photo of a {colour} object")
_MOST = 16  # objects of a class
_FAMILIES = ("yolos", "detr", "table-transformer")


@dataclass(frozen=True)
class Found:
    """An object: how sure the detector is, and its box (left, top, right, bottom) in pixels."""

    sure: float
    box: tuple[float, float, float, float]


@reward("geneval")
class GenEval(ClipReward):
    """How many of a prompt's clauses on objects, counts, colours and positions a detector and CLIP find fulfilled.

    Args:
        detector: folder or hub id of a detector of transformers: yolos, detr or table-transformer.
        correct: ``all``, 1 if every clause holds, else 0, as the benchmark; ``mean``, the mean over the clauses, where
            each gives ``found / wanted``: how many of the ``wanted`` surest objects are there, have the colour and lie
            where they should. Too many are not held against it but by a clause of ``exclude``, which gives 0 or 1.
        side: the shorter side that the detector's pictures are resized to.
        model: the CLIP that names colours: embedded name, folder, hub id, or a file with an OpenCLIP state dict.
        tokenizer: folder or hub id, where the CLIP brings none.
        revision: branch, tag or commit of the CLIP's hub id.
        dtype: precision of both models.
    """

    needs = MappingProxyType({"include": "the objects that must be there, in GenEval's form"})
    differentiable = False
    range = "[0, 1]"
    weights = "any yolos or detr, any CLIP; hub: hustvl/yolos-base, openai/clip-vit-large-patch14"
    licence = "Apache-2.0 (YOLOS), MIT (CLIP)"
    memory = "2.1 GiB in fp32"

    def __init__(
        self,
        detector: str = "hustvl/yolos-base",
        correct: Literal["all", "mean"] = "all",
        side: int = 800,
        model: str = "openai/clip-vit-large-patch14",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import AutoConfig, AutoModelForObjectDetection

        if correct not in ("all", "mean"):
            raise UserError(f"reward {self.name!r}: correct is {correct!r}, expected 'all' or 'mean'")
        family = AutoConfig.from_pretrained(detector).model_type
        if family not in _FAMILIES:
            raise UserError(f"reward {self.name!r}: {detector} is of the family {family!r}, expected {_FAMILIES}")
        super().__init__(model, tokenizer, revision, dtype)
        self.detector: Any = AutoModelForObjectDetection.from_pretrained(detector, dtype=floating(self.name, dtype))
        self.detector.eval().requires_grad_(False)
        self.correct = correct
        self._classes = {str(label).lower(): index for index, label in self.detector.config.id2label.items()}
        self._resized = Preprocess(side, None, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` in [0, 1]."""
        rows = []
        for image, prompt, extra in zip(images, prompts, metadata, strict=True):
            clauses = [self.checked(clause, prompt, number) for number, clause in enumerate(extra["include"])]
            refused = [self.checked(clause, prompt) for clause in extra.get("exclude") or ()]
            scores = self.clause_scores(image, clauses, refused, least_surety(extra.get("tag"), clauses))
            rows.append(sum(scores) / len(scores) if self.correct == "mean" else float(min(scores) == 1))
        return torch.tensor(rows, device=images.device)

    def checked(self, clause: Any, prompt: str, number: int = 0) -> Mapping[str, Any]:
        """Return the clause, ``number`` of which come before it.

        Raises:
            UserError: it names what the detector or the benchmark does not know.
        """
        where = f"reward {self.name!r}: a clause of prompt {prompt!r}"
        if not isinstance(clause, Mapping) or self._label(clause) not in self._classes:
            raise UserError(f"{where} is {clause!r}, expected {{class: ...}} with a class that the detector knows")
        if not isinstance(clause.get("count", 1), int) or clause.get("count", 1) < 1:
            raise UserError(f"{where} has count {clause['count']!r}, expected 1 or more")
        if clause.get("color", COLOURS[0]) not in COLOURS:
            raise UserError(f"{where} has color {clause['color']!r}, expected {', '.join(COLOURS)}")
        position = clause.get("position")
        if position is not None and (
            len(position) != 2 or position[0] not in POSITIONS or position[1] not in range(number)
        ):
            raise UserError(
                f"{where} has position {position!r}, expected [{' | '.join(POSITIONS)}, number of a clause before]"
            )
        return clause

    def _label(self, clause: Mapping[str, Any]) -> str:
        """Return what the detector calls a clause's class."""
        kind = str(clause.get("class")).lower()
        return kind if kind in self._classes else _ALIASES.get(kind, kind)

    def clause_scores(
        self,
        image: Tensor,
        include: Sequence[Mapping[str, Any]],
        exclude: Sequence[Mapping[str, Any]],
        least: float,
    ) -> list[float]:
        """Return each clause's score in [0, 1], 1 where it holds, by the objects that the detector is surer of."""
        there = {kind: [one for one in rows if one.sure > least][:_MOST] for kind, rows in self.detect(image).items()}
        scores: list[float] = []
        # What a clause found: later ones may lie beside it.
        matched: list[list[Found]] = []
        for clause in include:
            count = clause.get("count", 1)
            # Before colour and position are looked at, as in the benchmark: the surest object is the one that is meant.
            found = there[self._label(clause)][:count]
            if "color" in clause:
                kind = str(clause["class"]).lower()
                found = [one for one in found if self.colour(image, one, kind) == clause["color"]]
            if clause.get("position") is not None:
                relation, other = clause["position"]
                targets = matched[other]
                beside = [all(relation in relations(one.box, t.box) for t in targets) for one in found]
                found = [one for one, holds in zip(found, beside, strict=True) if targets and holds]
            matched.append(found if len(found) == count else [])
            # More than were asked for is what "exclude" is for, as in the benchmark.
            scores.append(len(found) / count)
        for clause in exclude:
            scores.append(float(len(there[self._label(clause)]) < clause.get("count", 1)))
        return scores or [1.0]

    @torch.no_grad()
    def detect(self, image: Tensor) -> dict[str, list[Found]]:
        """Return the objects in a picture ``(3, H, W)`` by class, the surest first."""
        out = self.detector(pixel_values=self._resized(image[None]).to(self.detector.device, self.detector.dtype))
        # The last class is "nothing".
        probabilities = out.logits[0].float().softmax(-1)[:, :-1].cpu()
        middle, half = out.pred_boxes[0].float().cpu().clamp(0, 1).split(2, -1)
        corners = torch.cat([middle - half / 2, middle + half / 2], -1).clamp(0, 1)
        height, width = image.shape[-2:]
        boxes = (corners * torch.tensor([width, height, width, height])).tolist()
        best = probabilities.argmax(-1).tolist()
        found: dict[str, list[Found]] = {}
        for kind, index in self._classes.items():
            rows = [row for row, label in enumerate(best) if label == index]
            objects = [Found(float(probabilities[row, index]), tuple(boxes[row])) for row in rows]
            found[kind] = sorted(objects, key=lambda one: -one.sure)
        return found

    def colour(self, image: Tensor, one: Found, kind: str) -> str:
        """Return the colour that CLIP gives an object, of the class ``kind``."""
        # At least one pixel, also of a box on the border.
        left, top = min(round(one.box[0]), image.shape[-1] - 1), min(round(one.box[1]), image.shape[-2] - 1)
        right, bottom = (max(round(end), start + 1) for end, start in zip(one.box[2:], (left, top), strict=True))
        seen = image[None, :, top:bottom, left:right]
        texts = [words.format(colour=colour, kind=kind) for colour in COLOURS for words in _TEMPLATES]
        embedded = self.embed_prompts(texts).view(len(COLOURS), len(_TEMPLATES), -1).mean(1)
        embedded = embedded / embedded.norm(dim=-1, keepdim=True)
        return COLOURS[int((embedded @ self.embed_images(seen)[0].cpu()).argmax())]


def least_surety(tag: Any, include: Sequence[Mapping[str, Any]]) -> float:
    """Return how sure the detector must be: surer where objects are counted.

    Args:
        tag: the benchmark's kind of prompt; where there is none, a clause that wants several objects makes it counting.
        include: the prompt's clauses.
    """
    counting = tag == "counting" if tag is not None else any(clause.get("count", 1) > 1 for clause in include)
    return 0.9 if counting else 0.3


def relations(first: Sequence[float], second: Sequence[float]) -> set[str]:
    """Return how the box ``first`` (left, top, right, bottom) lies to ``second``: none, one or two of the relations."""

    def centre_and_size(box: Sequence[float]) -> tuple[Tensor, Tensor]:
        corners = torch.tensor(box, dtype=torch.float32).view(2, 2)
        return corners.mean(0), corners[1] - corners[0]

    (middle, size), (other, extent) = centre_and_size(first), centre_and_size(second)
    offset = middle - other
    beyond = (offset.abs() - 0.1 * (size + extent)).clamp(min=0) * offset.sign()
    if bool((beyond.abs() < 1e-3).all()):
        return set()
    x, y = (beyond / offset.norm()).tolist()
    tests = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in tests.items() if holds}
