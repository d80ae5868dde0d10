"""Rewards: a common suite over every registered scorer, the contract's messages, and each scorer's own facts."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_makers import CASES, Case, Subject
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from difftune.registry import RegistryError, load_plugin
from difftune.reward import REWARDS, WeightedReward, build_reward, list_rewards, reward, reward_settings
from difftune.rewards._preprocess import Preprocess
from difftune.rewards.clip import ClipScore
from difftune.rewards.scene import asked_clauses
from difftune.types import NonFiniteError, RewardOutput, UserError
from difftune.zoo import model_path
from difftune.zoo.world import Scene, caption, render, render_scenes

FULL = "two yellow stars on a dotted purple background"
PROMPTS = [
    "two yellow stars on a dotted purple background",
    "a red circle",
    "",
    "a photo of a cat",
    "two stars",
    "é{x}",
]
BATCH = len(PROMPTS)

#: Rewards that see a video as a whole, not as the mean of its frames.
WHOLE_VIDEO = {"product", "harmonic_mean", "mean_min", "entropic", "mean_variance", "precision_weighted", "lower_bound"}
WHOLE_VIDEO |= {"sigmoid", "segmental", "group_rank", "win_rate", "gdpo", "video_reward"}


@pytest.fixture
def registry() -> Iterator[None]:
    """Undo what a test registers."""
    list_rewards()
    entries, origins = dict(REWARDS._entries), dict(REWARDS._origin)
    yield
    REWARDS._entries, REWARDS._origin = entries, origins


def pictures(count: int = BATCH, seed: int = 0) -> Tensor:
    """Return ``(count, 3, 64, 64)``: smooth, different, away from 0 and 1 where clamping would hide a gradient."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return 0.1 + 0.8 * torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bilinear")


def scenes() -> tuple[Tensor, list[str]]:
    drawn, pixels = render_scenes(BATCH, 3)
    return torch.tensor(pixels) / 255, [caption(scene) for scene in drawn]


# The common suite: a new reward is tested by being registered

BUILTIN = ["clip_score", "jpeg_compressibility", "jpeg_incompressibility", "scene"]


def test_the_first_four_are_there() -> None:
    assert set(BUILTIN) <= set(list_rewards())


def subjects() -> list[Any]:
    """Return the names of all rewards, those that are heavy marked slow."""
    return [pytest.param(n, marks=pytest.mark.slow if CASES.get(n, Case()).slow else ()) for n in list_rewards()]


@pytest.fixture(scope="module", params=subjects())
def scorer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    case = CASES.get(request.param, Case())
    if case.module is not None:
        pytest.importorskip(case.module, reason=f"reward {request.param} needs the optional package {case.module}")
    return Subject(request.param, case.settings(tmp_path_factory.mktemp(request.param)), case)


def assert_same_scores(got: Tensor, expected: Tensor) -> None:
    """The rounding of a score is that of its size: 2e-6 below 1, where batched kernels differ in the last bits."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, atol=2e-6 * scale, rtol=0)


def test_scores_are_finite_fp32_one_per_sample(scorer: Subject) -> None:
    for images in (pictures(), scenes()[0], torch.zeros(BATCH, 3, 64, 64), torch.ones(BATCH, 3, 64, 64)):
        out = scorer(images, PROMPTS)
        for value in (out.total, *out.parts.values()):
            assert value.shape == (BATCH,) and value.dtype == torch.float32 and torch.isfinite(value).all()


def test_scores_tell_pictures_apart(scorer: Subject) -> None:
    drawn, captions = scenes()
    assert len(set(scorer(torch.cat([drawn, pictures()]), captions * 2).total.tolist())) > 1


def test_scores_follow_their_sample(scorer: Subject) -> None:
    images, captions = scenes()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    images[0], captions[1] = pictures(1)[0], PROMPTS[0]
    straight = scorer(images, captions)
    shuffled = scorer(images[order], [captions[i] for i in order])
    assert straight.parts.keys() == shuffled.parts.keys()
    for name, value in {"total": straight.total, **straight.parts}.items():
        assert_same_scores(shuffled.total if name == "total" else shuffled.parts[name], value[order])


def test_scores_do_not_depend_on_the_batch(scorer: Subject) -> None:
    if scorer.reward.groupwise:
        pytest.skip("scores depend on the other samples by design")
    images, captions = scenes()
    images[0] = pictures(1)[0]
    whole = scorer(images, captions)
    for size in (1, 4):
        chunks = [scorer(images[i : i + size], captions[i : i + size]) for i in range(0, BATCH, size)]
        assert all(chunk.parts.keys() == whole.parts.keys() for chunk in chunks)
        assert_same_scores(torch.cat([c.total for c in chunks]), whole.total)
        for name, value in whole.parts.items():
            assert_same_scores(torch.cat([c.parts[name] for c in chunks]), value)


def test_scores_repeat_to_the_bit(scorer: Subject) -> None:
    scorer = scorer.fresh()
    if scorer.reward.state_dict():
        pytest.skip("scores depend on those before by design")
    first, again = scorer(pictures(), PROMPTS), scorer(pictures(), PROMPTS)
    fresh = scorer.fresh()(pictures().flip(0), PROMPTS[::-1])
    assert torch.equal(first.total, again.total)
    # What a scorer remembers (embeddings of prompts) must not depend on what it saw before.
    assert_same_scores(fresh.total.flip(0), first.total)


def test_the_input_stays_as_it_was(scorer: Subject) -> None:
    images, prompts = pictures(), list(PROMPTS)
    metadata = scorer.metadata(prompts)
    keys = [set(extra) for extra in metadata]
    scorer.reward(images, prompts, metadata)
    assert torch.equal(images, pictures()) and prompts == PROMPTS and [set(extra) for extra in metadata] == keys


def test_half_precision_and_borders_are_accepted(scorer: Subject) -> None:
    images = pictures()
    expected = scorer(images, PROMPTS).total
    # bf16 keeps 8 bits of a pixel, so scores move a little; their type does not.
    rounded = scorer(images.bfloat16(), PROMPTS).total
    assert rounded.dtype == torch.float32 and (rounded - expected).abs().max() < 0.1 * (1 + expected.abs().max())
    assert torch.isfinite(scorer(pictures() * 0 - 9e-4, PROMPTS).total).all()


def group_prompts() -> list[str]:
    """Two groups of three: what a groupwise scorer looks at."""
    return [PROMPTS[0]] * (BATCH // 2) + [PROMPTS[1]] * (BATCH // 2)


def test_gradients_reach_the_pixels_if_and_only_if_the_scorer_says_so(scorer: Subject) -> None:
    prompts = group_prompts() if scorer.reward.groupwise else PROMPTS
    if scorer.reward.state_dict():
        # What learns from its first samples has learned before it is differentiated.
        scorer(pictures(), prompts)
    images = pictures().requires_grad_(True)
    total = scorer(images, prompts).total
    assert total.requires_grad == scorer.reward.differentiable
    if not scorer.reward.differentiable:
        return
    (gradient,) = torch.autograd.grad(total.sum(), images)
    norms = gradient.flatten(1).norm(dim=1)
    assert (norms > 0).all()
    # Along its own gradient a smooth score rises by the gradient's norm, at a step that is neither so long that the
    # score bends nor so short that rounding shows.
    direction = gradient / norms.view(-1, 1, 1, 1)
    noise = 1e-6 * max(1.0, float(total.detach().abs().max()))

    def agrees(step: float) -> bool:
        with torch.no_grad():
            up, down = (scorer(images + sign * step * direction, prompts).total for sign in (1, -1))
        if scorer.reward.groupwise:  # the pixels of one sample move the scores of its group
            return bool(((up - down).sum() / (2 * step) - norms.sum()).abs() < 0.02 * norms.sum() + noise / step)
        return bool((((up - down) / (2 * step) - norms).abs() < 0.02 * norms + noise / step).all())

    assert any(agrees(step) for step in (0.05, 0.01, 0.002, 0.0005))
    assert noise / 0.05 < 0.3 * norms.max(), "the test could not fail: rounding is as large as the gradient"


def test_networks_are_listed_once_frozen_and_in_eval_mode(scorer: Subject) -> None:
    networks = scorer.reward.modules()
    assert len({id(module) for module in networks}) == len(networks)
    for module in networks:
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_a_still_counts_like_a_video_of_itself(scorer: Subject) -> None:
    if scorer.reward.state_dict():
        pytest.skip("scores depend on those before by design")
    (still, captions), other = scenes(), pictures()
    one = scorer(still, captions)
    same = scorer(torch.stack([still, still], dim=1), captions)
    assert same.parts.keys() == one.parts.keys()
    torch.testing.assert_close(same.total, one.total, atol=1e-5, rtol=1e-5)
    film = scorer(torch.stack([still, still, other], dim=1), captions)
    assert film.total.shape == (BATCH,) and torch.isfinite(film.total).all()
    if scorer.name not in WHOLE_VIDEO:
        expected = (2 * one.total + scorer(other, captions).total) / 3
        torch.testing.assert_close(film.total, expected, atol=1e-5, rtol=1e-5)


def test_declarations_are_complete(scorer: Subject) -> None:
    kind = type(scorer.reward)
    assert kind.range, "say between which numbers the scores are"
    assert bool(kind.weights) == bool(kind.licence), "weights have a licence"
    assert scorer.reward.describe().startswith(scorer.name) and isinstance(scorer.reward.state_dict(), dict)
    assert json.loads(json.dumps(scorer.reward.state_dict())) == scorer.reward.state_dict()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.linspace(-1, 1, BATCH * 3 * 4096).view(BATCH, 3, 64, 64), r"got images in \[-1, 1\], expected \[0, 1\]"),
        (torch.rand(BATCH, 3, 64, 64) * 255, r"expected \[0, 1\]"),
        (torch.full((BATCH, 3, 64, 64), float("nan")), r"in \[nan, nan\], expected \[0, 1\]"),
        (torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8), "got torch.uint8 images.*divide by 255"),
        (torch.rand(BATCH, 64, 64, 3), r"expected a tensor \(B, 3, H, W\)"),
        (np.zeros((BATCH, 3, 64, 64)), "got images ndarray"),
        (torch.rand(BATCH + 1, 3, 64, 64), "got 7 images for 6 prompts"),
    ],
)
def test_wrong_images_are_refused_by_name(scorer: Subject, images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        scorer(images, PROMPTS)
    assert f"reward {scorer.name!r}" in str(caught.value)


def test_metadata_of_another_length_is_refused(scorer: Subject) -> None:
    with pytest.raises(ValueError, match="1 metadata records for 6 prompts"):
        scorer.reward(pictures(), PROMPTS, [{}])


def test_missing_metadata_is_named(scorer: Subject) -> None:
    if not scorer.reward.needs:
        pytest.skip("needs none")
    key = next(iter(scorer.reward.needs))
    with pytest.raises(UserError, match=f"{scorer.name!r} needs {key!r} .* sample 0 .prompt 'two yellow stars on") as e:
        scorer.reward(pictures(), PROMPTS)
    assert "\n" not in str(e.value)


# JPEG


def test_jpeg_is_the_size_of_pils_file() -> None:
    images = torch.cat([pictures(3), torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))])
    expected = []
    for image in images:
        file = io.BytesIO()
        array = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        Image.fromarray(array).save(file, format="JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    got = build_reward("jpeg_incompressibility")(images, PROMPTS).total
    assert got.tolist() == pytest.approx(expected, abs=1e-6)
    assert build_reward("jpeg_compressibility")(images, PROMPTS).total.tolist() == (-got).tolist()
    assert got[:3].max() < got[3:].min()


def test_jpeg_quality_is_a_setting() -> None:
    low = build_reward("jpeg_incompressibility", quality=30)(pictures(), PROMPTS).total
    assert (low < build_reward("jpeg_incompressibility")(pictures(), PROMPTS).total).all()
    with pytest.raises(UserError, match="'jpeg_compressibility': quality is 0, expected 1 to 100"):
        build_reward("jpeg_compressibility", quality=0)


def test_jpeg_rounds_and_does_not_truncate() -> None:
    """254.6 is white: a picture a hair below it must weigh what the white one does."""
    white = torch.ones(1, 3, 64, 64)
    noisy = white - 0.4 / 255 * torch.rand(1, 3, 64, 64)
    score = build_reward("jpeg_compressibility")
    assert torch.equal(score(white, ["x"]).total, score(noisy, ["x"]).total)


# Scene


def scene_image(**changes: Any) -> Tensor:
    facts = {"count": 2, "colour": "yellow", "shape": "star", "background": "purple", "pattern": "dotted", **changes}
    return torch.tensor(np.asarray(render(Scene(**facts, seed=4)))).permute(2, 0, 1)[None] / 255


def test_scene_scores_what_is_asked() -> None:
    score = build_reward("scene")
    assert score(scene_image(), [FULL]).total.item() == 1
    wrong: dict[str, dict[str, Any]] = {
        "count": {"count": 3},
        "colour": {"colour": "red"},
        "shape": {"shape": "circle"},
        "background": {"background": "green"},
        "pattern": {"pattern": "striped"},
    }
    for name, changes in wrong.items():
        out = score(scene_image(**changes), [FULL])
        lost = {key for key, value in out.parts.items() if value.item() < 0}
        assert lost == {f"lost/{name}"}, name
        # A wrong count of 3 for 2 keeps half of its fifth.
        assert out.total.item() == pytest.approx(0.9 if name == "count" else 0.8)
        # A prompt that does not name the clause does not mind.
        unnamed = "a dotted background" if name != "pattern" else "two yellow stars"
        assert score(scene_image(**changes), [unnamed]).total.item() == 1


def test_scene_parts_add_up_and_leave_out_what_is_not_named() -> None:
    images = torch.cat([scene_image(), scene_image(count=3), scene_image(colour="red"), pictures(1)])
    prompts = [FULL, "two stars", "a dotted background", ""]
    for correct in ("mean", "all"):
        out = build_reward("scene", correct=correct)(images, prompts)
        total = 1 + torch.stack(list(out.parts.values())).sum(0)
        torch.testing.assert_close(out.total, total, atol=1e-6, rtol=0)
        assert out.parts["lost/colour"].tolist() == [0, 0, 0, 0]
        assert out.parts["lost/count"][1] < 0
        assert out.total.tolist() == pytest.approx([1, 0.75 if correct == "mean" else 0, 1, 0])
        assert out.parts["lost/readable"].tolist() == [0, 0, 0, -1]


def test_scene_all_is_exactly_zero_or_one() -> None:
    images, captions = scenes()
    out = build_reward("scene", correct="all")(images, captions[1:] + captions[:1])
    assert set(out.total.tolist()) == {0.0}
    assert set(build_reward("scene", correct="all")(images, captions).total.tolist()) == {1.0}
    with pytest.raises(UserError, match="correct is 'some', expected 'mean' or 'all'"):
        build_reward("scene", correct="some")


def test_scene_without_clauses_asks_for_a_readable_picture() -> None:
    score = build_reward("scene")
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for prompt in ("", "a photo of a cat"):
        assert score(torch.cat([scene_image(), noise]), [prompt] * 2).total.tolist() == [1, 0]


def test_scene_metadata_wins() -> None:
    score = build_reward("scene")
    clauses = {"clauses": {"count": 3, "shape": "star"}}
    assert score(scene_image(), [FULL], [clauses]).total.item() == pytest.approx(5 / 6)
    assert score(scene_image(), ["three circles"], [{"clauses": {}}]).total.item() == 1
    assert asked_clauses("two stars", {"other": 1}) == {"count": 2, "shape": "star"}
    with pytest.raises(UserError, match="asks for shape 'hexagon' in its metadata, expected circle, square"):
        score(scene_image(), ["x"], [{"clauses": {"shape": "hexagon"}}])
    with pytest.raises(UserError, match="asks for size 'big' in its metadata, expected count, colour"):
        score(scene_image(), ["x"], [{"clauses": {"size": "big"}}])
    with pytest.raises(UserError, match="are 'two', expected a mapping"):
        score(scene_image(), ["x"], [{"clauses": "two"}])


def test_scene_reads_larger_pictures() -> None:
    large = torch.nn.functional.interpolate(scene_image(), scale_factor=3, mode="nearest")
    assert build_reward("scene")(large, [FULL]).total.item() == 1


# CLIP


TINY_CLIP = model_path("difftune/tiny-clip")


def test_clip_score_is_the_plain_forward_of_model_and_processor() -> None:
    images = (pictures() * 255).round() / 255
    model = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(TINY_CLIP)
    pil = [Image.fromarray((i.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for i in images]
    inputs = processor(text=PROMPTS, images=pil, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    got = build_reward("clip_score")(images, PROMPTS).total
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    scaled = build_reward("clip_score", scale=2.5)(images, PROMPTS).total
    torch.testing.assert_close(scaled, 2.5 * expected, atol=1e-6, rtol=0)


def test_clip_prefers_the_true_caption() -> None:
    images, captions = scenes()
    true = build_reward("clip_score")(images, captions).total
    false = build_reward("clip_score")(images, captions[1:] + captions[:1]).total
    assert (true > false).all()


def test_clip_takes_a_folder_and_a_dtype_and_names_its_mistakes() -> None:
    full = build_reward("clip_score", model=str(TINY_CLIP))(pictures(), PROMPTS).total
    half = build_reward("clip_score", model=str(TINY_CLIP), dtype="bfloat16")
    assert isinstance(half, ClipScore) and half.model.dtype == torch.bfloat16
    assert (half(pictures(), PROMPTS).total - full).abs().max() < 0.02
    with pytest.raises(UserError, match="dtype is 'int8'"):
        build_reward("clip_score", dtype="int8")
    with pytest.raises(UserError, match="no embedded model 'difftune/tiny-clop', did you mean 'difftune/tiny-clip'"):
        build_reward("clip_score", model="difftune/tiny-clop")


def test_clip_encodes_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    score = build_reward("clip_score")
    assert isinstance(score, ClipScore)
    calls = []
    encode = score.model.get_text_features

    def counted(*tokens: Tensor) -> Any:
        calls.append(tokens)
        return encode(*tokens)

    monkeypatch.setattr(score.model, "get_text_features", counted)
    with torch.inference_mode():
        score(pictures(2), ["a red circle", "a red circle"])
    score(pictures(2).requires_grad_(), ["a red circle", "two stars"]).total.sum().backward()
    assert len(calls) == 2


def test_clip_clears_its_memory_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difftune.rewards._clip._CACHE_LIMIT", 3)
    score = build_reward("clip_score")
    expected = build_reward("clip_score")(pictures(), PROMPTS).total
    for _repeat in range(2):
        for index in range(BATCH):
            got = score(pictures()[index : index + 1], PROMPTS[index : index + 1]).total
            assert got.item() == pytest.approx(expected[index].item(), abs=1e-6)
    assert torch.equal(score(pictures(), PROMPTS).total, expected)


def uint8_pictures(height: int, width: int, smooth: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if not smooth:
        return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(2, 3, 6, 6, generator=generator)
    wide = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (wide * 255).round().to(torch.uint8)


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 512), (512, 301), (100, 120), (64, 64)])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_is_pils_up_to_its_rounding(height: int, width: int, smooth: bool, resample: int) -> None:
    """The bound, 1.2/255, is PIL's rounding after each of its two passes; without antialiasing noise is 137 off."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(resample=resample)
    pixels = uint8_pictures(height, width, smooth)
    pil = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    expected = processor(images=pil, return_tensors="pt")["pixel_values"]
    got = Preprocess.from_processor(processor)(pixels / 255)
    assert got.shape == expected.shape
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    assert ((got - expected) * std * 255).abs().max() <= 1.2


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"size": {"height": 40, "width": 20}, "do_center_crop": False}, (40, 20)),
        ({"size": {"shortest_edge": 20}, "do_center_crop": False}, (20, 26)),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 25, "width": 31}}, (25, 31)),
        ({"do_resize": False, "crop_size": {"height": 7, "width": 9}}, (7, 9)),
        ({"do_resize": False, "do_center_crop": False, "do_normalize": False}, (60, 80)),
    ],
)
def test_preprocessing_follows_the_processors_settings(settings: dict, shape: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(**settings)
    pixels = uint8_pictures(60, 80, smooth=True)
    expected = processor(images=list(pixels.numpy()), return_tensors="pt")["pixel_values"]
    got = Preprocess.from_processor(processor)(pixels / 255)
    assert got.shape[-2:] == expected.shape[-2:] == shape
    # 1/255 of rounding, divided by the smallest standard deviation.
    assert (got - expected).abs().max() <= 1.2 / 255 / 0.26
    with pytest.raises(ValueError, match="PIL filter 0"):
        Preprocess.from_processor(CLIPImageProcessor(resample=0))
    with pytest.raises(ValueError, match="resizes by"):
        Preprocess.from_processor(CLIPImageProcessor(size={"longest_edge": 8}))


# The contract: what a scorer may return


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((torch.zeros(2), {}), "'odd' returned a tuple of 2, expected a tensor of 2 scores"),
        (torch.zeros(3), r"'odd' returned shape \(3,\), expected \(2,\): one score per sample"),
        (torch.zeros(2, 1), r"'odd' returned shape \(2, 1\)"),
        (torch.tensor(1.0), r"'odd' returned shape \(\)"),
        ("ab", "'odd' returned str, expected 2 numbers"),
        (None, "'odd' returned NoneType, expected 2 numbers"),
        ({}, "'odd' returned no parts"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, r"'odd/b' returned shape \(1,\)"),
        (torch.zeros(2, dtype=torch.complex64), "'odd' returned torch.complex64, expected real numbers"),
    ],
)
def test_a_wrong_return_names_the_scorer(registry: None, returned: Any, message: str) -> None:
    reward("odd")(lambda images, prompts: returned)
    with pytest.raises(ValueError, match=message):
        build_reward("odd")(pictures(2), ["a", "b"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_score_names_sample_and_prompt(registry: None, value: float) -> None:
    reward("odd")(lambda images, prompts: {"fine": [0.0, 1.0], "bad": [0.0, value]})
    with pytest.raises(NonFiniteError, match=rf"'odd/bad' gave {value} for sample 1 \(prompt 'two stars'\)"):
        build_reward("odd")(pictures(2), ["a", "two stars"])


@pytest.mark.parametrize(
    "returned",
    [
        torch.tensor([1, 2]),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([True, True]) * torch.tensor([1, 2]),
        np.array([1, 2]),
        [1, 2.0],
        RewardOutput(torch.tensor([1, 2])),
    ],
)
def test_numbers_of_any_kind_become_fp32(registry: None, returned: Any) -> None:
    reward("odd")(lambda images, prompts: returned)
    total = build_reward("odd")(pictures(2), ["a", "b"]).total
    assert total.dtype == torch.float32 and total.tolist() == [1, 2]


def test_parts_make_the_total(registry: None) -> None:
    reward("odd")(lambda images, prompts: {"a": [0, 1], "b": torch.tensor([1.0, 1.0])})
    out = build_reward("odd")(pictures(2), ["a", "b"])
    assert out.total.tolist() == [0.5, 1.0] and {k: v.tolist() for k, v in out.parts.items()} == {
        "a": [0, 1],
        "b": [1, 1],
    }


def test_uncertainty_is_kept_and_checked(registry: None) -> None:
    reward("odd")(lambda i, p: RewardOutput(torch.zeros(2), {}, torch.tensor([1.0, float("nan")])))
    with pytest.raises(NonFiniteError, match="'odd/uncertainty' gave nan for sample 1"):
        build_reward("odd")(pictures(2), ["a", "b"])


def test_a_plain_function_gets_no_graph_unless_it_says_so(registry: None) -> None:
    def brightness(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    reward("plain")(brightness)
    reward("smooth", differentiable=True)(brightness)
    images = pictures(2).requires_grad_()
    assert not build_reward("plain")(images, ["a", "b"]).total.requires_grad
    assert build_reward("smooth")(images, ["a", "b"]).total.requires_grad


# Names, settings, weights


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        RegistryError, match="unknown reward 'jpeg_compresibility', did you mean 'jpeg_compressibility'"
    ):
        build_reward("jpeg_compresibility")
    with pytest.raises(RegistryError, match="did you mean 'scene'"):
        build_reward("Scene")


def test_lists_of_tensors_keep_their_gradients(registry: None) -> None:
    reward("listed", differentiable=True)(lambda images, prompts: [image.mean() for image in images])
    reward("parted", differentiable=True)(
        lambda images, prompts: {"mean": [image.mean() for image in images], "red": [i[:1].mean() for i in images]}
    )
    reward("mixed", differentiable=True)(lambda images, prompts: [images[0].mean(), 0.5, images[1].amax().view(1)])
    for name, count in (("listed", 3), ("parted", 3), ("mixed", 3)):
        images = pictures(count).requires_grad_()
        out = build_reward(name)(images, [""] * count)
        (gradient,) = torch.autograd.grad(out.total.sum(), images)
        assert float(gradient[0].abs().max()) > 0 and out.total.shape == (count,)
    with pytest.raises(UserError, match="returned list, expected 2 numbers"):
        reward("ragged")(lambda images, prompts: [torch.zeros(2), torch.zeros(3)])
        build_reward("ragged")(pictures(2), ["", ""])


@pytest.mark.parametrize(
    "lost",
    [
        lambda images, prompts: [image.std().item() for image in images],
        lambda images, prompts: images.detach().mean((1, 2, 3)),
        lambda images, prompts: {"red": images[:, 0].mean((1, 2)).tolist()},
    ],
)
def test_a_gradient_that_is_lost_on_the_way_is_named(registry: None, lost: Any) -> None:
    reward("lossy", differentiable=True)(lost)
    message = "'lossy' is declared differentiable, but its scores carry no gradient to the pixels.*or declare it"
    for images in (pictures(2), pictures(4).unflatten(0, (2, 2))):
        with pytest.raises(UserError, match=message) as caught:
            build_reward(["brightness", "lossy"])(images.requires_grad_(), ["a", "b"])
        assert "\n" not in str(caught.value)
        # Where nobody asks for gradients, nothing is lost.
        build_reward("lossy")(images.detach(), ["a", "b"])
        with torch.no_grad():
            build_reward("lossy")(images, ["a", "b"])
    reward("honest")(lost)
    build_reward("honest")(pictures(2).requires_grad_(), ["a", "b"])


def test_scores_that_do_not_depend_on_the_pixels_need_no_gradient(registry: None) -> None:
    reward("lengths", differentiable=True)(lambda images, prompts: [float(len(prompt)) for prompt in prompts])
    images = pictures(2).requires_grad_()
    built = build_reward(["lengths", {"name": "calibrated", "of": "lengths"}])
    for _ in range(2):
        assert built(images, ["a", "bcd"]).parts["lengths"].tolist() == [1, 3]
        # The check's own look is not counted.
        (kept,) = built.collect().values()
        assert kept["own"]["count"] == 2 and built.state_dict()["calibrated"]["count"] == 0
    assert build_reward(["lengths", "brightness"])(images, ["a", "b"]).total.requires_grad


def test_a_name_means_one_thing(registry: None) -> None:
    def other(images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean((1, 2, 3))

    with pytest.raises(RegistryError, match="'scene' is already registered by difftune.rewards.scene.SceneReward"):
        reward("scene")(other)
    with pytest.raises(RegistryError, match="'My Reward' is not usable.*'my_reward'"):
        reward("My Reward")(other)
    with pytest.raises(TypeError, match="expected a subclass of Reward"):
        reward("fine")(dict)
    reward("twice")(other)
    reward("twice")(other)


def test_settings_are_checked_by_name(registry: None) -> None:
    @reward("threshold")
    def threshold(images: Tensor, prompts: list[str], level: float, metadata: Any = None, *, sign: int = 1) -> Tensor:
        return sign * (images.mean((1, 2, 3)) > level).float()

    assert set(reward_settings("threshold")) == {"level", "sign"}
    assert set(reward_settings("clip_score")) == {"model", "scale", "revision", "dtype"}
    assert build_reward("threshold", level=2.0)(pictures(2), ["a", "b"]).total.tolist() == [0, 0]
    with pytest.raises(UserError, match="'threshold' needs level"):
        build_reward("threshold")
    with pytest.raises(UserError, match=r"no setting 'leval' \(its settings: level, sign\)"):
        build_reward("threshold", leval=1)
    with pytest.raises(UserError, match="'jpeg_compressibility' has no setting 'metadata'"):
        build_reward("jpeg_compressibility", metadata=1)


def test_weights_sum_and_parts_stay_unweighted() -> None:
    images, captions = scenes()
    scene, jpeg = build_reward("scene")(images, captions), build_reward("jpeg_compressibility")(images, captions)
    both = build_reward([{"name": "scene", "weight": 2}, {"name": "jpeg_compressibility", "weight": -0.5}])
    out = both(images, captions)
    torch.testing.assert_close(out.total, 2 * scene.total - 0.5 * jpeg.total)
    assert torch.equal(out.parts["jpeg_compressibility"], jpeg.total)
    assert torch.equal(out.parts["scene"], scene.total) and "scene/lost/count" in out.parts
    assert not both.differentiable and both.name == "scene + jpeg_compressibility"


def test_a_weighted_sum_keeps_gradients_and_equal_names_apart() -> None:
    both = build_reward(["clip_score", {"name": "clip_score", "scale": 3.0, "weight": 2.0}])
    assert isinstance(both, WeightedReward) and both.differentiable and len(both.modules()) == 2
    out = both(pictures().requires_grad_(), PROMPTS)
    torch.testing.assert_close(out.total, 7 * out.parts["clip_score"])
    torch.testing.assert_close(out.parts["clip_score_"], 3 * out.parts["clip_score"])
    assert out.total.requires_grad
    single = build_reward({"name": "scene", "weight": 3})
    assert isinstance(single, WeightedReward)
    assert build_reward(single) is single


@pytest.mark.parametrize(
    ("spec", "message"),
    [([], "got an empty list"), ({"weight": 1}, "has no name"), (3, "got int"), ([{"weight": 2}], "has no name")],
)
def test_bad_specs_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reward(spec)


# Plug-ins

PLUGIN = '''
from difftune.reward import reward

@reward("redness", differentiable=True)
def redness(images, prompts, gain=1.0):
    """How red a picture is: (B, 3, H, W) in [0, 1] -> (B,)."""
    return gain * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))
'''


def test_a_ten_line_file_is_a_reward(registry: None, tmp_path: Path) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text(PLUGIN)
    assert load_plugin(file) == load_plugin(str(file))
    red = torch.zeros(1, 3, 64, 64)
    red[:, 0] = 1
    assert build_reward("redness", gain=2)(red, ["x"]).total.item() == 2
    assert "redness" in list_rewards() and build_reward("redness").differentiable
    with pytest.raises(FileNotFoundError, match=r"plug-in file '.*nothing.py' does not exist"):
        load_plugin(tmp_path / "nothing.py")


def test_a_plugin_that_fails_can_be_mended_and_loaded_again(registry: None, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import difftune\n1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_plugin(file)
    file.write_text(PLUGIN.replace("redness", "mended"))
    load_plugin(file)
    assert "mended" in list_rewards()


def test_entry_points_are_loaded(registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package.py").write_text(PLUGIN.replace("redness", "installed"))
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint("installed", "some_package", "difftune.rewards")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point] if group == "difftune.rewards" else []
    )
    monkeypatch.setattr(REWARDS, "_loaded", False)
    assert "installed" in list_rewards()


def test_a_broken_package_is_left_out_with_one_line(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sound_package.py").write_text(PLUGIN.replace("redness", "sound"))
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('wants numpy 1\\nand more')\n")
    (tmp_path / "broken_package-2.1.dist-info").mkdir()
    (tmp_path / "broken_package-2.1.dist-info" / "METADATA").write_text("Name: broken-package\nVersion: 2.1\n")
    named = "[difftune.rewards]\nbad = broken_package\nworse = no_such_module:x\n"
    (tmp_path / "broken_package-2.1.dist-info" / "entry_points.txt").write_text(named)
    monkeypatch.syspath_prepend(tmp_path)
    (package,) = importlib.metadata.distributions(name="broken-package", path=[str(tmp_path)])
    sound = importlib.metadata.EntryPoint("sound", "sound_package", "difftune.rewards")
    points = [*package.entry_points, sound]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(REWARDS, "_loaded", False)
    monkeypatch.setattr(REWARDS, "_broken", [])
    with pytest.warns(UserWarning, match="cannot be loaded") as told:
        assert "sound" in list_rewards() and "brightness" in list_rewards()
    lines = [str(one.message) for one in told]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    assert "reward 'bad' of the installed package broken-package 2.1" in lines[0]
    assert "(RuntimeError: wants numpy 1)" in lines[0] and "(ModuleNotFoundError: " in lines[1]
    with pytest.raises(RegistryError, match=r"unknown reward 'bad'.*not loaded: broken-package 2.1\)"):
        build_reward("bad")


SETUP_CFG = """
[metadata]
name = some-package
version = 1

[options]
py_modules = some_package

[options.entry_points]
difftune.rewards =
    installed = some_package
"""


@pytest.mark.slow
def test_a_reward_of_an_installed_package_scores_and_trains_by_its_name(tmp_path: Path) -> None:
    """pip installs a package of one module; the command line lists it, scores with it, and a run trains on it."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "some_package.py").write_text(PLUGIN.replace("redness", "installed"))
    (source / "setup.cfg").write_text(SETUP_CFG)
    (source / "setup.py").write_text("import setuptools\nsetuptools.setup()\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}

    def call(*arguments: Any) -> str:
        command = [sys.executable, "-m", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    call("pip", "install", "--quiet", *offline, "--target", site, source)
    assert "installed" in call("difftune", "list", "rewards")
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    (scored,) = json.loads(call("difftune", "score", "installed", "red.png", "--set", "gain=2", "--json"))
    assert scored["score"] == 2
    small = ["sampler.steps=2", "sampler.window=null", "lora.rank=1", "train.epochs=1", "train.prompts_per_epoch=2"]
    small += ["train.samples_per_prompt=2", "train.updates_per_epoch=1", "evaluate.samples=2", "prompts.held_out=2"]
    call("difftune", "train", "demo", "reward={name: installed, gain: 2}", "out=run", *small)
    (epoch,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(epoch)["reward/std"] > 0
