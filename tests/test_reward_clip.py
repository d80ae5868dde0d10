"""The CLIP family: parity with the original architectures in their own file formats, and the formulas on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_makers import (
    TOKENIZER,
    aesthetic_file,
    clip_file,
    hps_file,
    linear_head,
    open_clip,
    pal_file,
    pal_state,
    siglip_folder,
    tokens_of,
)
from torch import Tensor
from torch.nn.functional import normalize, relu

from difftune.reward import build_reward
from difftune.rewards._clip import MEAN, STD, ClipReward, from_open_clip
from difftune.rewards._preprocess import Preprocess
from difftune.rewards._weights import collapse, linear_stack, load_state
from difftune.rewards.social_reward import triplet_loss
from difftune.rewards.vlm_rm import goal_baseline
from difftune.types import UserError

PROMPTS = ["two yellow stars on a dotted purple background", "a red circle", "", "three"]


def images(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def clip_reward(name: str, **settings: Any) -> ClipReward:
    built = build_reward(name, **settings)
    assert isinstance(built, ClipReward)
    return built


# Conversion


def test_open_clip_weights_give_the_original_scores(tmp_path: Path) -> None:
    reference = open_clip()
    expected = reference.cosines(normalised(images()), tokens_of(PROMPTS))
    assert expected.std() > 0.01
    settings = clip_file(tmp_path)
    got = build_reward("social_reward", **settings, activation="gelu")(images(), PROMPTS).total
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    # OpenAI's activation is another function; the tensors cannot tell.
    assert (build_reward("social_reward", **settings)(images(), PROMPTS).total - got).abs().max() > 1e-4


def test_the_conversion_is_exact_in_fp64() -> None:
    reference = open_clip(seed=3).double()
    model = from_open_clip("x", reference.state_dict(), end=606).double()
    pixels, tokens = normalised(images()).double(), tokens_of(PROMPTS)
    got = model.get_image_features(pixel_values=pixels)
    torch.testing.assert_close(getattr(got, "pooler_output", got), reference.visual(pixels), atol=1e-6, rtol=0)
    text = model.get_text_features(input_ids=tokens)
    torch.testing.assert_close(getattr(text, "pooler_output", text), reference.encode_text(tokens), atol=1e-6, rtol=0)
    assert model.logit_scale.item() == 2.5


def test_every_number_of_the_checkpoint_is_used() -> None:
    state = open_clip().state_dict()
    converted = from_open_clip("x", state, end=606).state_dict()
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in state.values())


def test_the_published_geometries_are_inferred() -> None:
    """ViT-H/14: heads 80 wide in the vision tower, 64 in the text tower. On the meta device, without its 4 GB."""
    with torch.device("meta"):
        from reward_makers import _Visual

        tower = _Visual(1280, 16, 2, 224, 14, 1024).state_dict()
        text = open_clip_text(1024, 16)
    state = {**{f"visual.{key}": value for key, value in tower.items()}, **text}
    config = from_open_clip("x", state, end=49407).config
    vision = config.vision_config
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
    assert (config.text_config.num_attention_heads, config.text_config.max_position_embeddings) == (16, 77)
    assert config.projection_dim == 1024


def open_clip_text(width: int, heads: int) -> dict[str, Tensor]:
    """Return the text tower's tensors, as empty ones where the device is meta."""
    from reward_makers import _Blocks

    blocks = _Blocks(width, heads, 2).state_dict()
    return {
        **{f"transformer.{key}": value for key, value in blocks.items()},
        "token_embedding.weight": torch.empty(49408, width),
        "positional_embedding": torch.empty(77, width),
        "ln_final.weight": torch.empty(width),
        "ln_final.bias": torch.empty(width),
        "text_projection": torch.empty(width, 1024),
        "logit_scale": torch.empty(()),
    }


def test_files_of_another_kind_are_refused_in_one_line(tmp_path: Path) -> None:
    state = open_clip().state_dict()
    cases: dict[str, tuple[Any, str]] = {
        "short.pt": ({k: v for k, v in state.items() if k != "ln_final.bias"}, "final_layer_norm.bias is missing"),
        "more.pt": ({**state, "extra.weight": torch.zeros(1)}, "extra.weight has no place"),
        "other.pt": ({"layers.0.weight": torch.zeros(2, 2)}, "no OpenCLIP state dict, it has no visual.conv1.weight"),
        "list.pt": ([1, 2], "holds no state dict"),
    }
    for file, (content, message) in cases.items():
        torch.save(content, tmp_path / file)
        with pytest.raises(UserError, match=message) as caught:
            build_reward("social_reward", model=str(tmp_path / file), tokenizer=TOKENIZER)
        assert "\n" not in str(caught.value) and "'social_reward'" in str(caught.value)
    with pytest.raises(UserError, match=r"there is no file '.*none.pt'"):
        build_reward("hpsv2", model=str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="text.pt is no file of plain weights"):
        load_state("x", tmp_path / "text.pt")
    with pytest.raises(UserError, match="brings no tokenizer"):
        build_reward("pickscore", model=clip_file(tmp_path)["model"])


class Evil:
    """Unpickled by a careless loader, it would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-ran"),))


def test_a_file_that_holds_code_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, "evil.pt")
    with pytest.raises(UserError, match="evil.pt is no file of plain weights"):
        build_reward("hpsv2", model="evil.pt")
    assert not Path("evil-ran").exists()


# Scores


def test_hps_pads_with_black_and_leaves_out_the_logit_scale(tmp_path: Path) -> None:
    settings = hps_file(tmp_path)
    reference = open_clip()
    tall = images(64, 32)
    padded = torch.zeros(4, 3, 64, 64)
    padded[..., 16:48] = tall
    for name in ("hpsv2", "hpsv2_1"):
        got = build_reward(name, **settings)(tall, PROMPTS).total
        expected = reference.cosines(normalised(padded), tokens_of(PROMPTS))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    # A folder is searched for the published file's name.
    folder = build_reward("hpsv2", **{**settings, "model": str(tmp_path)}, scale=100)(images(), PROMPTS).total
    square = reference.cosines(normalised(images()), tokens_of(PROMPTS))
    torch.testing.assert_close(folder, 100 * square, atol=1e-4, rtol=0)


def test_hps_resizes_the_longer_side(tmp_path: Path) -> None:
    score = clip_reward("hpsv2", **hps_file(tmp_path))
    assert score.preprocess(images(100, 300)).shape == (4, 3, 64, 64)
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    pixels = score.preprocess(torch.ones(1, 3, 100, 300))
    torch.testing.assert_close(pixels[0, :, 0, 0], black)
    rows = (pixels[0, 0, :, 32] > 0).nonzero().flatten()
    assert rows.min() == (64 - 21) // 2 and len(rows) == 21  # 100 * 64 / 300 = 21.3


def test_pickscore_scales(tmp_path: Path) -> None:
    settings = clip_file(tmp_path)
    cosine = open_clip().cosines(normalised(images()), tokens_of(PROMPTS))
    own = build_reward("pickscore", **settings)(images(), PROMPTS).total
    torch.testing.assert_close(own, torch.tensor(2.5).exp() * cosine, atol=2e-5, rtol=0)
    for extra, expected in (({"divide_by": 26.0}, own / 26), ({"scale": 1.0}, cosine)):
        got = build_reward("pickscore", **settings, **extra)(images(), PROMPTS).total
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def bare_folder(folder: Path, **geometry: Any) -> str:
    """Write a CLIP as config.json and model.safetensors alone, as a fine-tuned one is often published."""
    from_open_clip("x", open_clip(**geometry).state_dict(), end=606).save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    return str(folder)


def test_a_folder_without_a_processor_takes_that_of_the_tokenizers_source(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPTokenizer

    from difftune.zoo import model_path

    words = tmp_path / "words"
    CLIPTokenizer.from_pretrained(model_path(TOKENIZER)).save_pretrained(words)
    model = bare_folder(tmp_path / "bare")
    cosine = open_clip().cosines(normalised(images()), tokens_of(PROMPTS))
    # There is none there either: CLIP's own, at the model's size.
    got = build_reward("pickscore", model=model, tokenizer=str(words), scale=1.0)(images(), PROMPTS).total
    torch.testing.assert_close(got, cosine, atol=2e-6, rtol=0)
    # There is one, of another mean.
    half: Any = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sizes: Any = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessor(**sizes, **half).save_pretrained(words)
    got = build_reward("pickscore", model=model, tokenizer=str(words), scale=1.0)(images(), PROMPTS).total
    expected = open_clip().cosines(2 * images() - 1, tokens_of(PROMPTS))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)
    # It is for pictures of another size than the model's.
    small = bare_folder(tmp_path / "small", image=48)
    score = clip_reward("pickscore", model=small, tokenizer=str(words), scale=1.0)
    torch.testing.assert_close(score.preprocess(images(48, 48)), normalised(images(48, 48)))
    assert torch.isfinite(score(images(), PROMPTS).total).all()
    # The model's own comes first.
    CLIPImageProcessor(**sizes).save_pretrained(tmp_path / "bare")
    got = build_reward("pickscore", model=model, tokenizer=str(words), scale=1.0)(images(), PROMPTS).total
    torch.testing.assert_close(got, cosine, atol=2e-6, rtol=0)


@pytest.mark.parametrize("extra", range(8))
def test_the_middle_is_cut_out_as_the_original_does(tmp_path: Path, extra: int) -> None:
    """transformers starts at half of what is too much, rounded down; torchvision rounds halves to the even number."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    sizes: Any = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    processor: Any = CLIPImageProcessorPil(**sizes)
    picture = (images(64, 64 + extra)[:1] * 255).round() / 255
    for shown in (picture, picture.transpose(-1, -2)):
        file = (shown[0] * 255).round().to(torch.uint8).numpy()
        expected = processor(images=file, return_tensors="pt", input_data_format="channels_first").pixel_values
        torch.testing.assert_close(Preprocess.from_processor(processor)(shown), expected, atol=1e-5, rtol=0)
    start = {3: 2, 7: 4}.get(extra, extra // 2)
    score = clip_reward("social_reward", **clip_file(tmp_path))
    torch.testing.assert_close(score.preprocess(picture), normalised(picture[..., start : start + 64]))


def test_what_is_too_small_is_padded_as_the_original_does() -> None:
    from transformers.image_transforms import center_crop

    transformers = Preprocess(None, None, (5, 5), (0.0,) * 3, (1.0,) * 3)
    picture = images(2, 8)[:1]
    expected = torch.from_numpy(center_crop(picture[0].numpy(), (5, 5)))
    assert torch.equal(transformers(picture)[0], expected)
    padded = replace(transformers, torchvision=True)(picture)
    assert torch.equal(padded[..., 1:3, :], picture[..., 2:7]) and padded.count_nonzero() == 30


def embedded_pictures() -> Tensor:
    return clip_reward("clip_score").embed_images(images())


@pytest.mark.parametrize("kind", ["linear", "relu"])
def test_laion_heads(tmp_path: Path, kind: str) -> None:
    """The linear heads are numbered 0, 2, 4, 6, 7, the ReLU head 0, 3, 6, 9, 11."""
    state = linear_head(64, (0, 2, 4, 6, 7) if kind == "linear" else (0, 3, 6, 9, 11))
    torch.save(state, tmp_path / "head.pth")
    x = embedded_pictures()
    numbers = sorted({int(key.split(".")[1]) for key in state})
    for number in numbers:
        x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
        x = relu(x) if kind == "relu" and number != numbers[-1] else x
    score = build_reward("aesthetic", head=str(tmp_path / "head.pth"), model="difftune/tiny-clip")
    torch.testing.assert_close(score(images(), PROMPTS).total, x.squeeze(-1), atol=1e-5, rtol=0)
    other = "relu" if kind == "linear" else "none"
    forced = build_reward("aesthetic", head=str(tmp_path / "head.pth"), model="difftune/tiny-clip", activation=other)
    assert (forced(images(), PROMPTS).total - x.squeeze(-1)).abs().max() > 1e-2


def test_a_linear_head_is_one_affine_map() -> None:
    layers, numbers = linear_stack("x", linear_head(64), r"layers\.")
    assert numbers == [0, 2, 4, 6, 7]
    x = normalize(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    torch.testing.assert_close(collapse(layers)(x), layers(x), atol=1e-5, rtol=0)
    relus, _ = linear_stack("x", linear_head(64), r"layers\.", "relu")
    with pytest.raises(ValueError, match="with ReLU is not affine"):
        collapse(relus)
    with pytest.raises(UserError, match="no stack of linear layers"):
        linear_stack("x", {"a.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match="activation is 'tanh'"):
        linear_stack("x", linear_head(64), r"layers\.", "tanh")


@pytest.mark.parametrize("numbers", [(0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 6), (0, 3, 6, 9, 12), (0, 2, 4, 6, 9), (1, 3)])
def test_a_head_of_unknown_numbers_is_not_guessed_at(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """Every other number may be ReLU as well as dropout: what stands between the layers is the user's to say."""
    state = linear_head(64, numbers)
    last = state[f"layers.{numbers[-1]}.weight"]
    state[f"layers.{numbers[-1]}.weight"], state[f"layers.{numbers[-1]}.bias"] = last[:1], torch.zeros(1)
    torch.save(state, tmp_path / "head.pth")
    settings = {"head": str(tmp_path / "head.pth"), "model": "difftune/tiny-clip"}
    with pytest.raises(UserError, match=rf"the numbers .*\({str(numbers)[1:-1]}\) do not tell .*set activation") as e:
        build_reward("aesthetic", **settings)
    assert "\n" not in str(e.value)
    plain, relus = (
        build_reward("aesthetic", **settings, activation=kind)(images(), PROMPTS).total for kind in ("none", "relu")
    )
    assert (plain - relus).abs().max() > 1e-3


def test_a_single_layer_is_a_head() -> None:
    state = {"fc.0.weight": torch.ones(1, 3), "fc.0.bias": torch.ones(1)}
    layers, numbers = linear_stack("x", state, ".*?")
    assert numbers == [0] and layers(torch.ones(1, 3)).item() == 4


def test_two_stacks_in_a_file_are_not_merged(tmp_path: Path) -> None:
    both = {**linear_head(64), **linear_head(64, (1, 3, 5), "other.layers")}
    torch.save(both, tmp_path / "head.pth")
    with pytest.raises(
        UserError, match=r"holds 2 stacks of layers \('layers.', 'other.layers.'\), expected one"
    ) as caught:
        build_reward("aesthetic", head=str(tmp_path / "head.pth"), model="difftune/tiny-clip", activation="none")
    assert "\n" not in str(caught.value)
    # Named, one of them is read.
    assert linear_stack("x", both, r"other\.layers\.", "relu")[1] == [1, 3, 5]


def test_a_head_for_another_model_is_refused(tmp_path: Path) -> None:
    torch.save(linear_head(48), tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"the head maps 48 numbers to 1, expected 64 \(the model's embedding\) to 1"):
        build_reward("aesthetic", head=str(tmp_path / "head.pth"), model="difftune/tiny-clip")


def test_aesthetic_v25_is_the_head_on_the_pooled_output(tmp_path: Path) -> None:
    from transformers import SiglipVisionModel

    settings = siglip_folder(tmp_path)
    model = SiglipVisionModel.from_pretrained(settings["model"]).eval()
    pictures = images(48, 48)
    with torch.no_grad():
        x = normalize(model(pixel_values=pictures * 2 - 1).pooler_output, dim=-1)
    state = torch.load(settings["head"], weights_only=True)
    for number in (0, 2, 4, 6, 8):
        weight, bias = (state[f"scoring_head.{number}.{kind}"].float() for kind in ("weight", "bias"))
        x = x @ weight.T + bias
    got = build_reward("aesthetic_v25", **settings)(pictures, PROMPTS).total
    torch.testing.assert_close(got, x.squeeze(-1), atol=1e-5, rtol=0)


def test_the_aesthetic_score_does_not_read_the_prompt(tmp_path: Path) -> None:
    score = build_reward("aesthetic", **aesthetic_file(tmp_path))
    assert torch.equal(score(images(), PROMPTS).total, score(images(), PROMPTS[::-1]).total)


# VLM-RM (the sheet's check C120)


def unit(seed: int) -> Tensor:
    return normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_goal_baseline_limits() -> None:
    x, g, b = unit(0), unit(1), unit(2)
    direction = g - b
    torch.testing.assert_close(goal_baseline(x, g, b, 0.0), (x * g).sum(-1), atol=1e-9, rtol=0)
    across = torch.linalg.cross(direction[:, :3], x[:, :3])
    across = torch.cat([across, torch.zeros(5, 5, dtype=torch.float64)], 1)
    assert ((across * direction).sum(-1).abs() < 1e-12).all() and across.norm(dim=-1).min() > 1e-3
    moved = goal_baseline(x + across, g, b, 1.0)
    torch.testing.assert_close(moved, goal_baseline(x, g, b, 1.0), atol=1e-9, rtol=0)
    torch.testing.assert_close(goal_baseline(b, g, b, 1.0), (b * g).sum(-1), atol=1e-9, rtol=0)
    torch.testing.assert_close(goal_baseline(g, g, b, 0.7), torch.ones(5, dtype=torch.float64), atol=1e-9, rtol=0)
    eye = torch.eye(8, dtype=torch.float64)
    for row in range(5):  # the projector written out
        d = direction[row]
        matrix = 0.3 * torch.outer(d, d) / (d @ d) + 0.7 * eye
        expected = 1 - (matrix @ (x[row] - g[row])).square().sum() / 2
        assert goal_baseline(x[row], g[row], b[row], 0.3).item() == pytest.approx(expected.item(), abs=1e-9)


def test_vlm_rm_uses_prompt_goal_and_baselines() -> None:
    cosine = build_reward("clip_score")(images(), PROMPTS).total
    torch.testing.assert_close(build_reward("vlm_rm", alpha=0.0)(images(), PROMPTS).total, cosine, atol=1e-6, rtol=0)
    score = clip_reward("vlm_rm", goal="a red circle", baseline=["two stars", "a square"], alpha=1.0)
    g, b = score.embed_prompts(["a red circle"])[0], score.embed_prompts(["two stars", "a square"]).mean(0)
    expected = goal_baseline(score.embed_images(images()), g, b, 1.0)
    torch.testing.assert_close(score(images(), PROMPTS).total, expected, atol=1e-6, rtol=0)
    same = build_reward("vlm_rm", goal="a picture", alpha=1.0)(images(), PROMPTS).total
    assert torch.isfinite(same).all()
    with pytest.raises(UserError, match="alpha is 2"):
        build_reward("vlm_rm", alpha=2)


# PAL and Social Reward


def projected(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    hidden = relu(x @ state[f"{prefix}.layers.0.weight"].T + state[f"{prefix}.layers.0.bias"])
    return hidden @ state[f"{prefix}.layers.3.weight"].T + state[f"{prefix}.layers.3.bias"]


def test_pal_b_is_the_angle_to_a_mixture_of_maps(tmp_path: Path) -> None:
    settings, state, clip = pal_file(tmp_path), pal_state("b"), clip_reward("clip_score")
    x = projected(state, "item_learner.projector", clip.embed_images(images()))
    texts = clip.embed_prompts(PROMPTS)
    maps = [projected(state, f"user_learner.projectors.{k}", texts) for k in range(2)]
    ann, bob = (state[f"user_learner.W.{user}"].softmax(0) for user in ("ann", "bob"))
    for user, weights in (("ann", ann), ("bob", bob), (None, (ann + bob) / 2)):
        ideal = weights[0] * maps[0] + weights[1] * maps[1]
        expected = torch.tensor(2.0).exp() * torch.cosine_similarity(x, ideal)
        got = build_reward("pal", **settings, user=user)(images(), PROMPTS).total
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="knows no user 'anne', did you mean 'ann'"):
        build_reward("pal", **settings, user="anne")
    big = {**state, "logit_scale": torch.tensor(9.0)}
    torch.save(big, tmp_path / "big.pt")
    capped = build_reward("pal", **{**settings, "head": str(tmp_path / "big.pt")})(images(), PROMPTS).total
    torch.testing.assert_close(capped, expected * 100 / torch.tensor(2.0).exp(), atol=1e-4, rtol=0)


def test_pal_a_is_the_distance_to_a_mixture_of_prototypes(tmp_path: Path) -> None:
    state = pal_state("a")
    torch.save(state, tmp_path / "a.pt")
    x = projected(state, "item_learner.projector", embedded_pictures())
    ideal = state["user_learner.W.bob"].softmax(0) @ state["user_learner.P"]
    score = build_reward("pal", head=str(tmp_path / "a.pt"), model="difftune/tiny-clip", user="bob")
    torch.testing.assert_close(score(images(), PROMPTS).total, -(x - ideal).norm(dim=1), atol=1e-5, rtol=0)
    del state["user_learner.P"]
    torch.save(state, tmp_path / "none.pt")
    with pytest.raises(UserError, match="neither user_learner.projectors nor user_learner.P"):
        build_reward("pal", head=str(tmp_path / "none.pt"), model="difftune/tiny-clip")


def test_triplet_loss() -> None:
    """The sheet's C123: squared distances, margin 0.3."""
    a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.3**0.5 + 1e-3]])
    assert triplet_loss(a, a, n).item() == 0
    assert triplet_loss(a, n, n).item() == pytest.approx(0.3)
    assert triplet_loss(a, a, torch.tensor([[1.0, 0.3]])).item() == pytest.approx(0.3 - 0.09)
