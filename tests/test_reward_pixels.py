"""Statistics of the pixels, the JPEG proxy, likeness to references and diversity."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reward_makers import reference
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards._clip import ClipReward
from difftune.rewards._reference import reference_pictures
from difftune.rewards.diversity import vendi
from difftune.rewards.jpeg import jpeg_kilobytes
from difftune.rewards.jpeg_proxy import quantisation_tables
from difftune.rewards.similarity import harmonic
from difftune.types import UserError
from difftune.zoo.world import render_scenes


def flat(*colour: float) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 32, 32).clone()


def scored(name: str, images: Tensor, **settings: object) -> list[float]:
    return build_reward(name, **settings)(images, [""] * len(images)).total.tolist()


def blurred(count: int, side: int = 64) -> Tensor:
    generator, pictures = np.random.default_rng(1), []
    for sigma in np.linspace(0, 8, count):
        soft = gaussian_filter(generator.random((3, side, side)), (0, sigma, sigma))
        pictures.append((soft - soft.min()) / (soft.max() - soft.min()))
    return torch.tensor(np.stack(pictures)).float()


# Statistics


def test_statistics_of_known_pictures() -> None:
    half = torch.cat([flat(0, 0, 0)[..., :16], flat(1, 1, 1)[..., 16:]], -1)
    assert scored("brightness", torch.cat([flat(0, 0, 0), flat(1, 1, 1), flat(0, 1, 0), half])) == pytest.approx(
        [0, 1, 0.7152, 0.5]
    )
    assert scored("saturation", torch.cat([flat(0.3, 0.3, 0.3), flat(1, 0.25, 0.5)])) == pytest.approx([0, 0.75])
    assert scored("contrast", torch.cat([flat(0.3, 0.3, 0.3), half])) == pytest.approx([0, 0.5], abs=1e-4)
    assert scored("colour", torch.cat([flat(1, 0, 0), flat(0, 0, 0)]), rgb=[1.0, 0.0, 0.0]) == pytest.approx(
        [0, -1], abs=2e-4
    )
    # One column of 32 on each side of the border, each with half of the step.
    assert scored("edges", half) == pytest.approx([2 / 32 * 0.5], abs=1e-3)
    assert scored("edges", flat(0.4, 0.2, 0.9)) == [0]


def test_colourfulness_is_the_published_formula() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    r, g, b = (image * 255).double().numpy()
    rg, yb = r - g, 0.5 * (r + g) - b
    expected = np.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
    assert scored("colourfulness", image[None]) == pytest.approx([expected], rel=1e-5)
    assert scored("colourfulness", flat(0.5, 0.5, 0.5)) == pytest.approx([0], abs=1e-3)


def test_sharpness_falls_with_blur() -> None:
    scores = scored("sharpness", blurred(9))
    assert scores == sorted(scores, reverse=True) and scores[0] > 5 and scored("sharpness", flat(1, 0, 0)) == [0]


def test_the_wanted_colour_is_checked() -> None:
    with pytest.raises(UserError, match=r"rgb is \[1, 2\], expected three numbers in \[0, 1\]"):
        build_reward("colour", rgb=[1, 2])


# JPEG proxy


@pytest.mark.parametrize("quality", [50, 95])
def test_the_proxy_ranks_pictures_as_the_real_files_do(quality: int) -> None:
    drawn = torch.tensor(render_scenes(40, 9)[1]) / 255
    for images, least in ((drawn, 0.95), (blurred(40), 0.99), (blurred(12, 72), 0.99)):
        estimate = -torch.tensor(scored("jpeg_proxy", images, quality=quality))
        real = jpeg_kilobytes(images, quality)
        assert spearmanr(estimate, real).statistic > least
        assert ((estimate - real).abs() / real).mean() < 0.06


def test_quantisation_tables_are_pils() -> None:
    for quality in (10, 50, 95, 100):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
        tables = Image.open(file).quantization  # type: ignore[attr-defined]
        for number, table in enumerate(quantisation_tables(quality)):
            assert sorted(table.flatten().int().tolist()) == sorted(tables[number])


def test_the_proxy_takes_any_size_and_its_gradient_shrinks_the_file() -> None:
    images = blurred(3, 50)[:2]
    assert len(scored("jpeg_proxy", images)) == 2
    score, pictures = build_reward("jpeg_proxy"), blurred(4)[:2].clone()
    before = jpeg_kilobytes(pictures)
    for _ in range(20):
        pictures.requires_grad_()
        (gradient,) = torch.autograd.grad(score(pictures, ["", ""]).total.sum(), pictures)
        step = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        pictures = (pictures + 0.5 * step).clamp(0, 1).detach()
    assert (jpeg_kilobytes(pictures) < 0.95 * before).all()
    with pytest.raises(UserError, match="quality is 0"):
        build_reward("jpeg_proxy", quality=0)


# References


def clip() -> ClipReward:
    score = build_reward("clip_score")
    assert isinstance(score, ClipReward)
    return score


def test_image_similarity_is_clips_cosine(tmp_path: Path) -> None:
    images, other = blurred(3), blurred(5)[3:]
    embed = clip().embed_images
    Image.fromarray((other[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(tmp_path / "other.png")
    given: list[Any] = [images[0], str(tmp_path / "other.png"), list(other)]
    metadata = [{"reference": one} for one in given]
    got = build_reward("image_similarity")(images, ["a", "b", "c"], metadata).total
    assert got[0].item() == pytest.approx(1, abs=1e-5)
    assert got[1].item() == pytest.approx((embed(images[1:2]) @ embed(other[:1]).T).item(), abs=2e-3)
    assert got[2].item() == pytest.approx((embed(images[2:]) @ embed(other).T).mean().item(), abs=1e-6)
    pixels = build_reward("pixel_similarity")(images, ["a"] * 3, [{"reference": images[0]}] * 3).total
    expected = [1 - (image - images[0]).square().mean().item() for image in images]
    assert pixels.tolist() == pytest.approx(expected, abs=1e-6)


def test_references_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif")
    for given, message in (
        (str(tmp_path / "none.png"), "cannot be read: .*No such file"),
        (str(tmp_path / "text.png"), "cannot be read: cannot identify"),
        (str(tmp_path / "x.gif"), "cannot be read: cannot identify"),
        (3, "is int, expected the path"),
        (torch.zeros(4, 4), r"tensor \(4, 4\), expected floats"),
        ([], "the list 'reference' of prompt 'p' is empty"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            reference_pictures("image_similarity", "p", {"reference": given})
        assert "'image_similarity'" in str(caught.value) and "\n" not in str(caught.value)


def test_lambda_harmonic() -> None:
    """The sheet's C80, at i = 0.8 and t = 0.3."""
    i, t = torch.tensor([0.8]), torch.tensor([0.3])
    assert [harmonic(i, t, b).item() for b in (1.0, 0.0, 0.5)] == pytest.approx([0.8, 0.3, 0.436364], abs=1e-6)
    assert harmonic(i, i, 0.3).item() == pytest.approx(0.8, abs=1e-6)
    assert harmonic(i, t, 0.3) < 0.3 * i + 0.7 * t
    assert harmonic(i + 0.1, t, 0.3) > harmonic(i, t, 0.3) and harmonic(i, t + 0.1, 0.3) > harmonic(i, t, 0.3)
    images, prompts = blurred(3), ["a", "b", "c"]
    metadata = [reference(prompt) for prompt in prompts]
    out = build_reward("lambda_harmonic")(images, prompts, metadata)
    image = (build_reward("image_similarity")(images, prompts, metadata).total + 1) / 2
    torch.testing.assert_close(out.parts["image"], image)
    torch.testing.assert_close(out.total, harmonic(image, out.parts["text"], 0.3))
    with pytest.raises(UserError, match="balance is 2"):
        build_reward("lambda_harmonic", balance=2)


# Diversity


def test_diversity_is_the_distance_to_the_others_of_the_prompt() -> None:
    images = torch.cat([blurred(3), blurred(3)[:1]])
    x = clip().embed_images(images)
    d = 1 - x @ x.T
    prompts = ["a", "a", "b", "a"]
    out = build_reward("diversity")(images, prompts)
    expected = [d[0, 1] + d[0, 3], d[1, 0] + d[1, 3], d[0, 0] * 0, d[3, 0] + d[3, 1]]
    assert out.total.tolist() == pytest.approx([float(v) / 2 for v in expected], abs=1e-6)
    near = build_reward("diversity", to="nearest")(images, prompts).total
    assert near.tolist() == pytest.approx([0, float(d[0, 1]), 0, 0], abs=1e-6)
    assert out.parts["vendi"][2].item() == pytest.approx(1) and 1 < out.parts["vendi"][0].item() < 3
    with pytest.raises(UserError, match="to is 'all'"):
        build_reward("diversity", to="all")
    # One text under two conditions is two prompts.
    told = [{"conditions": prompt} for prompt in prompts]
    assert torch.equal(build_reward("diversity")(images, ["a"] * len(prompts), told).total, out.total)


def test_vendi_counts_different_samples() -> None:
    assert vendi(torch.eye(4)) == pytest.approx(4) and vendi(torch.eye(4)[:1].repeat(4, 1)) == pytest.approx(1)
