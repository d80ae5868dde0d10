"""GenEval's clauses on detections that are made up, and the detector's boxes against its own output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reward_makers import yolos_folder
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards.geneval import Found, GenEval, least_surety, relations
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
        ((0, 0, 10, 10), (2.0005, 0, 12.0005, 10), set()),  # by less than the benchmark's 1e-3
    ],
)
def test_relations_of_boxes(first: Any, second: Any, expected: set[str]) -> None:
    assert relations(first, second) == expected


def found(**objects: list[tuple[float, Any]]) -> dict[str, list[Found]]:
    none: dict[str, list[Found]] = {kind: [] for kind in ("cat", "dog", "bench", "cup")}
    return {**none, **{kind: [Found(sure, box) for sure, box in rows] for kind, rows in objects.items()}}


# Colours are those of the places: LEFT and TOP are red, RIGHT is blue.
SCENE = found(cat=[(0.95, LEFT), (0.92, RIGHT), (0.4, TOP)], dog=[(0.5, RIGHT)], bench=[(0.8, RIGHT), (0.4, LEFT)])


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([{"class": "cat"}], [], [1]),
        ([{"class": "cat", "count": 2}], [], [1]),
        ([{"class": "cat", "count": 3}], [], [2 / 3]),  # the third is not sure enough to be counted
        ([{"class": "dog"}, {"class": "cat", "count": 2}], [], [0, 1]),  # nor is any other object of such a prompt
        ([{"class": "cat", "count": 2}], [{"class": "cat", "count": 3}], [1, 1]),
        ([{"class": "cat", "count": 1}], [{"class": "cat", "count": 2}], [1, 0]),
        ([{"class": "cup"}], [{"class": "bench"}], [0, 0]),
        ([{"class": "cat", "color": "red"}], [], [1]),
        ([{"class": "dog", "color": "red"}], [], [0]),
        # The surest bench is blue: that a less sure one is red does not make it a red bench.
        ([{"class": "bench", "color": "red"}], [], [0]),
        ([{"class": "bench", "color": "blue"}], [], [1]),
        ([{"class": "cat", "count": 2, "color": "red"}], [], [1 / 2]),
        ([{"class": "cup", "color": "red"}], [], [0]),
        ([{"class": "dog"}, {"class": "cat", "position": ["left of", 0]}], [], [1, 1]),
        ([{"class": "dog"}, {"class": "cat", "position": ["right of", 0]}], [], [1, 0]),
        # The surest bench is where the dog is, a less sure one left of it.
        ([{"class": "dog"}, {"class": "bench", "position": ["left of", 0]}], [], [1, 0]),
        # A cat on each side: not every one is left of the other clause's objects, on either side of the relation.
        ([{"class": "cat", "count": 2}, {"class": "cat", "position": ["left of", 0]}], [], [1, 0]),
        ([{"class": "cat"}, {"class": "cat", "count": 2, "position": ["right of", 0]}], [], [1, 1 / 2]),
        # What fails is no target, though some of it is there.
        ([{"class": "cup"}, {"class": "cat", "position": ["left of", 0]}], [], [0, 0]),
        ([{"class": "dog", "color": "red"}, {"class": "cat", "position": ["left of", 0]}], [], [0, 0]),
        ([{"class": "cat", "count": 2, "color": "blue"}, {"class": "cat", "position": ["left of", 0]}], [], [1 / 2, 0]),
    ],
)
def test_clauses_of_a_known_scene(
    geneval: GenEval, monkeypatch: pytest.MonkeyPatch, include: Any, exclude: Any, expected: list[float]
) -> None:
    monkeypatch.setattr(geneval, "detect", lambda image: SCENE)
    monkeypatch.setattr(geneval, "colour", lambda image, one, kind: "blue" if one.box == RIGHT else "red")
    image = torch.zeros(3, 64, 64)
    scores = geneval.clause_scores(image, include, exclude, least_surety(None, include))
    assert scores == pytest.approx(expected)
    metadata = [{"include": include, "exclude": exclude}]
    assert geneval(image[None], ["x"], metadata).total.item() == pytest.approx(sum(expected) / len(expected))
    monkeypatch.setattr(geneval, "correct", "all")
    assert geneval(image[None], ["x"], metadata).total.item() == float(min(expected) == 1)


def test_the_tag_says_how_sure_the_detector_must_be(geneval: GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval, "detect", lambda image: found(cat=[(0.8, LEFT), (0.4, RIGHT)], dog=[(0.3, TOP)]))

    def score(**metadata: Any) -> float:
        return geneval(torch.zeros(1, 3, 64, 64), ["x"], [metadata]).total.item()

    two, one = [{"class": "cat", "count": 2}], [{"class": "cat"}]
    assert score(tag="position", include=two) == 1 and score(tag="counting", include=two) == 0 == score(include=two)
    assert score(tag="counting", include=one) == 0 and score(tag="colors", include=one) == 1 == score(include=one)
    # An exclusion does not make the prompt one that counts; both clauses take the prompt's surety.
    assert score(include=one, exclude=two) == 0.5 and score(tag="counting", include=one, exclude=two) == 0.5
    assert score(include=[{"class": "dog"}]) == 0


def test_sixteen_objects_of_a_class_are_looked_at(geneval: GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval, "detect", lambda image: found(cat=[(0.95, LEFT)] * 20))
    image = torch.zeros(3, 64, 64)
    include = [{"class": "cat", "count": 20}]
    assert geneval.clause_scores(image, include, [{"class": "cat", "count": 17}], 0.9) == [0.8, 1]


def test_the_benchmarks_names_are_found_in_coco(geneval: GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
    monkeypatch.setattr(geneval, "_classes", {coco: index for index, coco in enumerate(names.values())})
    monkeypatch.setattr(geneval, "detect", lambda image: {coco: [Found(0.8, LEFT)] for coco in names.values()})
    named: list[str] = []

    def colour(image: Tensor, one: Found, kind: str) -> str:
        named.append(kind)
        return "red"

    monkeypatch.setattr(geneval, "colour", colour)
    for name in names:
        clause = {"class": name, "color": "red"}
        assert geneval(torch.zeros(1, 3, 64, 64), ["x"], [{"include": [clause]}]).total.item() == 1
    # CLIP is asked in the benchmark's words.
    assert named == list(names)
    # A detector that knows the benchmark's own name is asked for that.
    monkeypatch.setattr(geneval, "_classes", {"computer mouse": 0, "mouse": 1})
    monkeypatch.setattr(geneval, "detect", lambda image: {"computer mouse": [], "mouse": [Found(0.8, LEFT)]})
    metadata = [{"include": [{"class": "computer mouse"}]}]
    assert geneval(torch.zeros(1, 3, 64, 64), ["x"], metadata).total.item() == 0


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


def test_the_colour_is_asked_of_the_box(geneval: GenEval, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(3, 64, 64)
    image[0, 20:40, 10:20] = 1
    shown: list[Tensor] = []

    def embed(images: Tensor) -> Tensor:
        shown.append(images)
        return geneval.embed_prompts(["a photo of a green cat"])

    monkeypatch.setattr(geneval, "embed_images", embed)
    assert geneval.colour(image, Found(1.0, (10.4, 19.6, 19.6, 40.4)), "cat") == "green"
    assert torch.equal(shown[0], image[None, :, 20:40, 10:20])
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
        ({"class": "cat", "position": ["above", 0]}, "has position .'above', 0., expected .*number of a clause before"),
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
