"""The world's captions, the builders' parts, and the shipped models as the stock classes load them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from difftune.zoo import MODELS, PREFIX, model_path, quality
from difftune.zoo.clip import contrastive_loss, holds, truth
from difftune.zoo.readouts import Readouts, label_cells, label_clauses, label_patches
from difftune.zoo.tokenizer import new_tokenizer
from difftune.zoo.training import AveragedWeights, fit
from difftune.zoo.world import (
    CLAUSES,
    GAP,
    MARGIN,
    PARTIAL,
    SIZE,
    Scene,
    caption,
    layout,
    parse_caption,
    render,
    sample_caption,
    sample_scene,
    vocabulary,
)

WEIGHTS = model_path("difftune/tiny-sd").parent


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


# The world


@pytest.mark.parametrize("parts", [(), *PARTIAL, CLAUSES])
def test_captions_are_parsed_back(parts):
    for scene in scenes(50):
        named = {name: value for name, value in scene.clauses.items() if name in parts}
        assert parse_caption(caption(scene, parts)) == named


def test_captions_read_as_english():
    scene = Scene(2, "yellow", "star", "purple", "dotted")
    assert caption(scene) == "two yellow stars on a dotted purple background"
    assert caption(scene, ("count", "shape")) == "two stars"
    assert caption(scene, ("pattern",)) == "a dotted background"
    assert caption(Scene(1, "orange", "circle", "red", "plain"), ("count", "colour")) == "an orange shape"
    assert caption(scene, ()) == ""


@pytest.mark.parametrize("text", ["", "a photo of a cat", "two", "on", "two stars on", "a background", "two red"])
def test_other_text_names_nothing(text):
    assert parse_caption(text) == {}


def test_parsing_forgives_case_spaces_and_a_full_stop():
    assert parse_caption("  Two Yellow  stars. ") == {"count": 2, "colour": "yellow", "shape": "star"}


def test_a_caption_of_a_colour_needs_the_count():
    with pytest.raises(ValueError, match="without their count; add 'count'"):
        caption(scenes(1)[0], ("colour",))


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="both 'red'"):
        Scene(1, "red", "star", "red", "plain")
    with pytest.raises(ValueError, match="Scene.count is 4; expected one of 1, 2, 3"):
        Scene(4, "red", "star", "blue", "plain")


def test_sampled_captions_are_true_and_an_eighth_are_empty():
    rng = np.random.default_rng(0)
    sampled = [(scene, sample_caption(scene, rng)) for scene in scenes(2000)]
    assert all(holds(scene, parse_caption(text)) for scene, text in sampled)
    assert np.mean([text == "" for _, text in sampled]) == pytest.approx(0.12, abs=0.03)
    assert np.mean([text == caption(scene) for scene, text in sampled]) == pytest.approx(0.38, abs=0.04)


def test_a_scene_determines_its_picture():
    scene = scenes(1)[0]
    assert render(scene).tobytes() == render(scene).tobytes()
    assert render(scene).size == (SIZE, SIZE)
    moved = render(scene, np.random.default_rng(scene.seed + 1))
    assert moved.tobytes() != render(scene).tobytes()


def test_objects_keep_their_distance():
    for scene in scenes(200):
        places = layout(scene)
        assert len(places) == scene.count
        centres, radii = places[:, :2], places[:, 2]
        assert (centres.min(1) - radii * 0.88 >= MARGIN).all() and (
            centres.max(1) + radii * 0.88 <= SIZE - MARGIN
        ).all()
        for i in range(scene.count):
            for j in range(i):
                assert np.hypot(*(centres[i] - centres[j])) >= radii[i] + radii[j] + GAP


# The parts of the builders


def test_every_word_is_one_token_and_no_text_is_unknown():
    tokenizer = new_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in vocabulary())
    assert tokenizer.decode(tokenizer("two red stars").input_ids, skip_special_tokens=True) == "two red stars"
    other = tokenizer("Ünï @ 7").input_ids
    assert tokenizer.eos_token_id not in other[:-1]
    assert max(len(tokenizer(caption(scene)).input_ids) for scene in scenes(200)) <= tokenizer.model_max_length


def test_partial_captions_are_true_of_several_scenes():
    batch = [Scene(1, "red", "star", "blue", "plain"), Scene(2, "red", "star", "blue", "plain")]
    expected = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    assert torch.equal(truth(batch, ["a blue background", "two stars", "a red star"]), expected)


def test_the_contrastive_loss_is_least_at_the_true_pairs():
    true = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    good = contrastive_loss(20 * true, true)
    assert good < contrastive_loss(torch.zeros(2, 2), true) < contrastive_loss(-20 * true, true)


def test_patches_know_what_they_lie_on():
    scene = Scene(3, "red", "triangle", "blue", "plain", seed=3)
    labels = label_patches([scene])
    assert labels.shape == (1, 64)
    assert (labels == 1 + 4 + 2).sum() == 3 and set(labels.unique().tolist()) <= {0, 3, 7}


def test_cells_know_how_much_of_them_is_covered():
    scene = Scene(1, "white", "square", "black", "plain", seed=3)
    labels = label_cells([scene])
    assert labels.shape == (1, 64, 4)
    # The square is white on black, so a cell's brightness is what is covered of it.
    brightness = np.asarray(render(scene), dtype=np.float32).mean(2).reshape(8, 2, 4, 8, 2, 4).mean((2, 5)) / 255
    assert np.abs(labels[0].reshape(8, 8, 2, 2).numpy() - brightness.transpose(0, 2, 1, 3)).max() < 0.1


def test_read_outs_cost_least_where_they_are_right():
    scene = Scene(3, "red", "triangle", "blue", "plain", seed=3)
    labels = (label_clauses([scene]), label_patches([scene]), label_cells([scene]))
    torch.manual_seed(0)
    readouts = Readouts(8, 8, hidden=8, cells=True)
    features, patches = torch.randn(1, 8), torch.randn(1, 64, 8)
    optimizer = torch.optim.Adam(readouts.parameters(), 0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = readouts(features, patches, *labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    other = Scene(1, "green", "circle", "white", "dotted", seed=4)
    wrong = (label_clauses([other]), label_patches([other]), label_cells([other]))
    assert readouts(features, patches, *wrong) > losses[-1]


@pytest.mark.parametrize("muon", [False, True])
def test_fit_minimises_and_leaves_the_average(muon):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    snapshots = []
    fit(
        lambda step: (model(torch.ones(4, 2)) - 3).pow(2).mean(),
        [model],
        label="test",
        steps=300,
        learning_rate=0.01 if muon else 0.1,
        muon=muon,
        snapshot=lambda: snapshots.append(model.weight.clone()),
        snapshot_every=100,
    )
    assert len(snapshots) == 2
    assert model(torch.ones(1, 2)).item() == pytest.approx(3, abs=0.05)


def test_fit_stops_on_a_gradient_that_is_not_finite():
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="test: the gradient is not finite at step 0"):
        fit(lambda step: (model.weight / 0).sum(), [model], label="test", steps=1, learning_rate=0.1)


def test_swapping_twice_restores_the_parameters():
    model = torch.nn.Linear(2, 2)
    averaged = AveragedWeights([model])
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    averaged.swap()
    assert torch.equal(model.weight, before)
    averaged.swap()
    assert torch.equal(model.weight, before + 1)


# The shipped models


def test_names_lead_to_folders():
    for name in MODELS:
        assert model_path(name).is_dir() and model_path(name).name == name.removeprefix(PREFIX)
    with pytest.raises(KeyError, match="no embedded model 'difftune/huge'; expected one of difftune/tiny-sd"):
        model_path("difftune/huge")


def test_importing_the_zoo_imports_no_torch():
    code = "import sys; import difftune.zoo; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_weights_fit_into_30_megabytes():
    files = [file for file in WEIGHTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 30e6
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}


@pytest.fixture(scope="module")
def tiny_sd():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "tiny-sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tiny_flow():
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(WEIGHTS / "tiny-flow")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_flow"])
def test_the_stock_pipeline_draws_64_pixels_by_default(name, request):
    pipeline = request.getfixturevalue(name)  # loaded without a word about dtypes
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {part.dtype for part in parts} == {torch.float32}
    assert pipeline.vae_scale_factor == 4
    assert pipeline("a red circle", num_inference_steps=2).images[0].size == (SIZE, SIZE)


def test_the_t5_slot_adds_zeros(tiny_flow):
    prompt_embeds, _, _, _ = tiny_flow.encode_prompt("two stars", None, None, max_sequence_length=12)
    assert prompt_embeds.shape == (1, 16 + 12, tiny_flow.transformer.config.joint_attention_dim)
    assert prompt_embeds[:, 16:].abs().max() == 0 and prompt_embeds[:, :16].abs().max() > 0


def test_the_autoencoder_keeps_the_scene(tiny_sd):
    assert quality.measure_autoencoder(tiny_sd.vae, 100).clauses >= 0.97


def test_clip_finds_the_caption_among_64():
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(WEIGHTS / "tiny-clip")
    processor = CLIPProcessor.from_pretrained(WEIGHTS / "tiny-clip")
    assert quality.measure_retrieval(model, processor, rounds=2) >= 0.9


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_flow"])
def test_guidance_draws_what_the_caption_says(name, request):
    captions = quality.held_out_captions(16, full=True)
    pictures = quality.generate(request.getfixturevalue(name), captions, guidance_scale=4.0, steps=10)
    assert quality.score_pictures(pictures, captions).clauses >= 0.5


def test_scoring_needs_a_caption_of_the_world():
    with pytest.raises(ValueError, match="'a cat' names no clause"):
        quality.score_pictures(np.zeros((1, 3, SIZE, SIZE), dtype=np.float32), ["a cat"])


def test_grids_are_written(tmp_path):
    from PIL import Image

    quality.save_grid(np.zeros((3, 3, SIZE, SIZE), dtype=np.float32), tmp_path / "grid.png", columns=2, zoom=1)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * SIZE, 2 * SIZE)


@pytest.mark.slow
def test_everything_can_be_rebuilt(tmp_path):
    command = [sys.executable, "-m", "difftune.zoo.build", "all", "--out", str(tmp_path), "--steps-scale", "0.0005"]
    root = Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    for name in MODELS:
        folder = tmp_path / name.removeprefix(PREFIX)
        shipped = {file.relative_to(model_path(name)) for file in model_path(name).rglob("*") if file.is_file()}
        assert {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()} == shipped
