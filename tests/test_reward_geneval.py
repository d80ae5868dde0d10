"""GenEval's clauses on detections that are made up, and the detector's boxes against its own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reward_makers import yolos_folder
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards.geneval import Found, GenEval, relations
from difftune.types import UserError

LEFT, RIGHT, TOP, WIDE = (0, 20, 20, 40), (40, 20, 60, 40), (22, 0, 38, 10), (0, 0, 64, 64)


@pytest.fixture(scope="module")
def geneval(tmp_path_factory: pytest.TempPathFactory) -> GenEval:
    built = build_reward("geneval", **yolos_folder(tmp_path_factory.mktemp("yolos")))
    assert isinstance(built, GenEval)
    return built


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (TOP, (20, 40, 40, 60), {"above"}),
        ((20, 40, 40, 60), TOP, {"below"}),
        ((0, 0, 10, 10), (50, 50, 60, 60), {"left of", "above"}),
        (WIDE, (5, 0, 60, 64), set()),  # nearer than a tenth of both
        (LEFT, LEFT, set()),
    ],
)
def test_relations_of_boxes(first: Any, second: Any, expected: set[str]) -> None:
    assert relations(first, second) == expected


def found(**objects: list[tuple[float, Any]]) -> dict[str, list[Found]]:
    none: dict[str, list[Found]] = {kind: [] for kind in ("cat", "dog", "bench", "cup")}
    return {**none, **{kind: [Found(sure, box) for sure, box in rows] for kind, rows in objects.items()}}


SCENE = found(cat=[(0.95, LEFT), (0.92, RIGHT), (0.4, TOP)], dog=[(0.5, RIGHT)])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([{"class": "cat"}], [], [1]),
        ([{"class": "cat", "count": 2}], [], [1]),
        ([{"class": "cat", "count": 3}], [], [2 / 3]),  # the third is not sure enough to be counted
        ([{"class": "cat", "count": 2}], [{"class": "cat", "count": 3}], [1, 1]),
        ([{"class": "cat", "count": 1}], [{"class": "cat", "count": 2}], [1, 0]),
        ([{"class": "cup"}], [{"class": "bench"}], [0, 1]),
        ([{"class": "dog"}, {"class": "cat", "position": ["left of", 0]}], [], [1, 1]),
        ([{"class": "dog"}, {"class": "cat", "position": ["right of", 0]}], [], [1, 0]),
        ([{"class": "cup"}, {"class": "cat", "position": ["left of", 0]}], [], [0, 0]),
        ([{"class": "cat", "color": "red"}], [], [1]),
        ([{"class": "dog", "color": "red"}], [], [0]),
    ],
)
def test_clauses_of_a_known_scene(
    geneval: GenEval, monkeypatch: pytest.MonkeyPatch, include: Any, exclude: Any, expected: list[float]
) -> None:
    monkeypatch.setattr(geneval, "detect", lambda image: SCENE)
    monkeypatch.setattr(geneval, "colour", lambda image, one, kind: "red" if one.box == LEFT else "blue")
    image = torch.zeros(3, 64, 64)
    assert geneval.clause_scores(image, include, exclude) == pytest.approx(expected)
    metadata = [{"include": include, "exclude": exclude}]
    assert geneval(image[None], ["x"], metadata).total.item() == pytest.approx(sum(expected) / len(expected))
    monkeypatch.setattr(geneval, "correct", "all")
    assert geneval(image[None], ["x"], metadata).total.item() == float(min(expected) == 1)


def test_the_boxes_are_the_detectors(geneval: GenEval) -> None:
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    seen = geneval.detect(image)
    with torch.no_grad():
        out = geneval.detector(pixel_values=geneval._resized(image[None]))
    sure, label = out.logits[0].softmax(-1)[:, :-1].max(-1)
    assert sum(len(rows) for rows in seen.values()) == 8
    for row in range(8):
        x, y, w, h = (out.pred_boxes[0, row] * torch.tensor([96, 64, 96, 64])).tolist()
        box = (max(0, x - w / 2), max(0, y - h / 2), min(96, x + w / 2), min(64, y + h / 2))
        kind = geneval.detector.config.id2label[int(label[row])]
        assert any(
            one.sure == pytest.approx(float(sure[row])) and one.box == pytest.approx(box, abs=1e-3)
            for one in seen[kind]
        )


def test_the_colour_is_asked_of_the_box_on_grey(geneval: GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(3, 64, 64)
    image[0, 20:40, 10:20] = 1
    shown: list[Tensor] = []

    def embed(images: Tensor) -> Tensor:
        shown.append(images)
        return geneval.embed_prompts(["a photo of a green cat"])

    monkeypatch.setattr(geneval, "embed_images", embed)
    geneval.colour(image, Found(1.0, (10, 20, 20, 40)), "cat")
    assert shown[0].shape == (1, 3, 20, 20) and shown[0][0, 0].sum() == pytest.approx(200 + 200 * 0.6, rel=1e-3)
    # A box on the border has a pixel too.
    geneval.colour(image, Found(1.0, (64, 64, 64, 64)), "cat")
    assert shown[1].shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "unicorn"}, "expected {class: ...} with a class that the detector knows"),
        ("cat", "expected {class: ...}"),
        ({"class": "cat", "count": 0}, "has count 0, expected 1 or more"),
        ({"class": "cat", "color": "puce"}, "has color 'puce', expected red, orange"),
        ({"class": "cat", "position": ["near", 0]}, "has position .'near', 0., expected .left of"),
    ],
)
def test_wrong_clauses_are_named(geneval: GenEval, clause: Any, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")) as caught:
        geneval(torch.zeros(1, 3, 64, 64), ["x"], [{"include": [clause]}])
    assert "\n" not in str(caught.value)


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="correct is 'some', expected 'all' or 'mean'"):
        build_reward("geneval", **{**yolos_folder(tmp_path), "correct": "some"})
    with pytest.raises(UserError, match="is of the family 'clip', expected"):
        build_reward("geneval", **{**yolos_folder(tmp_path), "detector": str(_clip())})


def _clip() -> Path:
    from difftune.zoo import model_path

    return Path(model_path("difftune/tiny-clip"))
