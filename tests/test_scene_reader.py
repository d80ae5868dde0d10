"""The world is read back exactly, wrong clauses are caught, and blur or another size does not matter."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from difftune.zoo.reader import SceneReading, read_scene, score_clauses
from difftune.zoo.world import CLAUSES, COLOURS, COUNTS, PATTERNS, SHAPES, Scene, render, render_scenes

VALUES = {"count": COUNTS, "colour": COLOURS, "shape": SHAPES, "background": COLOURS, "pattern": PATTERNS}


@pytest.fixture(scope="module")
def rendered() -> tuple[list[Scene], np.ndarray]:
    scenes, pictures = render_scenes(500, seed=20)
    return scenes, pictures / np.float32(255)


@pytest.fixture(scope="module")
def readings(rendered) -> list[SceneReading]:
    return [read_scene(picture) for picture in rendered[1]]


def test_rendered_scenes_are_read_exactly(rendered, readings):
    exact = [reading.clauses == scene.clauses for reading, scene in zip(readings, rendered[0], strict=True)]
    assert np.mean(exact) >= 0.99


def test_true_clauses_score_one(rendered, readings):
    scores = [score_clauses(reading, scene.clauses) for reading, scene in zip(readings, rendered[0], strict=True)]
    assert np.mean([list(score.values()) for score in scores]) >= 0.998
    assert list(scores[0]) == list(CLAUSES)


@pytest.mark.parametrize("name", CLAUSES)
def test_every_wrong_clause_is_caught(name, rendered, readings):
    for scene, reading in zip(rendered[0][:100], readings, strict=False):
        if reading.clauses != scene.clauses:
            continue
        wrong: Any
        for wrong in VALUES[name]:
            if wrong != getattr(scene, name):
                assert score_clauses(reading, {name: wrong})[name] < 1
                if name != "count":
                    assert score_clauses(reading, {name: wrong})[name] == 0


def test_the_count_is_graded_as_geneval_does():
    reading = read_scene(_picture(Scene(2, "red", "circle", "white", "plain")))
    assert [score_clauses(reading, {"count": asked})["count"] for asked in (1, 2, 3)] == [0, 1, pytest.approx(2 / 3)]


def test_shape_and_colour_score_the_share_of_objects():
    left = _picture(Scene(1, "red", "circle", "white", "plain", seed=1))
    right = _picture(Scene(1, "blue", "square", "white", "plain", seed=1))
    reading = read_scene(np.concatenate([left, right], axis=2)[:, ::2, ::2].repeat(2, axis=1))
    assert {found.colour for found in reading.objects} == {"red", "blue"}
    scores = score_clauses(reading, {"count": 2, "colour": "red", "background": "white"})
    assert scores == {"count": 1, "colour": 0.5, "background": 1}
    assert reading.colour is None and not reading.readable


@pytest.mark.parametrize("sigma", [0.4, 0.7])
def test_slight_blur_is_read(sigma, rendered):
    scenes, pictures = rendered
    scores = []
    for scene, picture in zip(scenes[:100], pictures, strict=False):
        blurred = ndimage.gaussian_filter(picture, (0, sigma, sigma))
        scores.append(list(score_clauses(read_scene(blurred), scene.clauses).values()))
    assert np.mean(scores) >= 0.98


def test_slight_noise_is_read(rendered):
    scenes, pictures = rendered
    rng = np.random.default_rng(0)
    scores = []
    for scene, picture in zip(scenes[:100], pictures, strict=False):
        noisy = picture + 0.04 * rng.standard_normal(picture.shape)
        scores.append(list(score_clauses(read_scene(noisy), scene.clauses).values()))
    assert np.mean(scores) >= 0.98


@pytest.mark.parametrize("zoom", [2, 4])
def test_other_sizes_are_read_alike(zoom, rendered):
    for scene, picture in zip(rendered[0][:20], rendered[1], strict=False):
        assert read_scene(picture.repeat(zoom, axis=1).repeat(zoom, axis=2)).clauses == scene.clauses


def test_tensors_and_arrays_are_read_alike(rendered):
    picture = rendered[1][0]
    assert read_scene(torch.from_numpy(picture)) == read_scene(picture)  # type: ignore[arg-type]


def test_noise_is_not_readable():
    noise = np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)
    reading = read_scene(noise)
    assert not reading.readable
    assert sum(score_clauses(reading, Scene(1, "red", "circle", "white", "striped").clauses).values()) < 1


def test_an_empty_background_has_no_objects():
    grey = np.broadcast_to(np.array(COLOURS["green"], dtype=np.float32)[:, None, None] / 255, (3, 64, 64))
    reading = read_scene(grey)
    assert (reading.count, reading.background, reading.pattern, reading.shape) == (0, "green", "plain", None)
    assert score_clauses(reading, {"count": 1, "shape": "star"}) == {"count": 0, "shape": 0}


def test_readings_are_values(rendered):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_scene(rendered[1][0]).background = "red"  # type: ignore[misc]


def test_a_wrong_layout_is_refused():
    with pytest.raises(ValueError, match=r"shape \(64, 64, 3\).*expected \(3, height, width\)"):
        read_scene(np.zeros((64, 64, 3), dtype=np.float32))


def _picture(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene), dtype=np.float32).transpose(2, 0, 1) / 255
