"""Files of labelled pictures: how they are read, what becomes of the pictures, and that methods learn from them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import chains
import pytest
import tiny
import torch
from PIL import Image

from difftune.algorithm import build_algorithm
from difftune.labelled import LabelledPictures, encode, read_picture
from difftune.policy import LoraConfig, Policy
from difftune.preferences import StoredPicture, load_preferences
from difftune.reward import FunctionReward
from difftune.sampler import Sampler, sample_keys
from difftune.trainer import Trainer
from difftune.types import UserError


def paint(folder: Path, name: str, level: float, size: tuple[int, int] = (2, 2)) -> str:
    """Write a picture of one grey and return its name."""
    Image.new("RGB", size, (round(255 * level),) * 3).save(folder / name)
    return name


def png(level: float) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (round(255 * level),) * 3).save(out, "PNG")
    return out.getvalue()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name, level in (("good.png", 0.7), ("bad.png", 0.3), ("other.png", 0.5)):
        paint(tmp_path, name, level)
    return tmp_path


PICK = {"caption": "a cat", "jpg_0": "bad.png", "jpg_1": "good.png", "label_0": 0.0, "label_1": 1.0, "has_label": True}


# -- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "names", "labels"),
    [
        ({"prompt": "a cat", "chosen": "good.png", "rejected": "bad.png"}, ["good.png", "bad.png"], (1.0, 0.0)),
        ({"prompt": "a cat", "image": "good.png", "label": "yes"}, ["good.png"], (1.0,)),
        ({"prompt": "a cat", "image": "bad.png", "label": False}, ["bad.png"], (0.0,)),
        (PICK, ["bad.png", "good.png"], (0.0, 1.0)),
        (
            {"prompt": "a cat", "images": ["good.png", "bad.png", "other.png"], "labels": [3, 1, 2]},
            ["good.png", "bad.png", "other.png"],
            (3.0, 1.0, 2.0),
        ),
    ],
)
def test_every_layout_of_a_line(pictures: Path, row: dict[str, Any], names: list[str], labels: Any) -> None:
    (record,) = load_preferences(write_lines(pictures / "p.jsonl", [row]))
    assert record.text == "a cat" and record.metadata["labels"] == labels
    assert [path.name for path in record.metadata["images"]] == names


def test_csv_files_and_rows_without_a_label(pictures: Path) -> None:
    with (pictures / "p.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(PICK))
        writer.writeheader()
        writer.writerow(PICK)
        writer.writerow({**PICK, "has_label": False})
        writer.writerow({**PICK, "caption": "a dog, asleep", "label_0": 0.5, "label_1": 0.5})
    records = load_preferences(pictures / "p.csv")
    assert [(r.text, r.metadata["labels"]) for r in records] == [("a cat", (0.0, 1.0)), ("a dog, asleep", (0.5, 0.5))]


def test_parquet_files_keep_their_pictures_until_they_are_asked_for(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{**PICK, "caption": f"cat {n}", "jpg_0": png(0.2), "jpg_1": png(0.1 * n)} for n in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=2)
    records = load_preferences(tmp_path / "p.parquet")
    assert [record.text for record in records] == [f"cat {n}" for n in range(5)]
    stored = records[4].metadata["images"][1]
    assert isinstance(stored, StoredPicture) and (stored.group, stored.row) == (2, 0)
    assert float(read_picture(stored, (2, 2), "here").mean()) == pytest.approx(0.4, abs=1 / 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "chosen": "good.png"}', "p.jsonl:1: got prompt, chosen, expected prompt with chosen and rej"),
        ('\n{"prompt": "a", "image": "no.png", "label": 1}', "p.jsonl:2: picture 'no.png' does not exist; paths are"),
        ('{"prompt": "a", "image": "good.png", "label": "fine"}', "label 'fine' is no number, expected e.g. 1 or 0"),
        ('{"prompt": 3, "image": "good.png", "label": 1}', "'prompt' is 3, expected the prompt's text"),
        ('{"prompt": "a", "images": ["good.png"], "labels": [1, 2]}', "1 pictures and 2 labels, expected one label"),
        ('{"prompt": "a", "image": null, "label": 1}', "got None for a picture, expected the path of an image file"),
        ("[1]", r"got \[1\], expected an object"),
        ("{", "not JSON"),
        ("", "has no labelled record, expected at least one"),
    ],
)
def test_mistakes_are_named_with_their_line(pictures: Path, text: str, message: str) -> None:
    (pictures / "p.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_preferences(pictures / "p.jsonl")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; expected a file of labelled pictures"):
        load_preferences(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=r"ends in '.txt', expected .jsonl, .csv, .parquet"):
        load_preferences(tmp_path / "p.txt")
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(UserError, match="p.jsonl:1: picture .* cannot be read"):
        read_picture(tmp_path / "x.png", (2, 2), "p.jsonl:1")


# -- from pictures to samples ------------------------------------------------------------------------------------


def test_pictures_are_cut_to_the_middle(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 4), (255, 0, 0))
    picture.paste((0, 0, 255), (2, 0, 6, 4))
    picture.save(tmp_path / "wide.png")
    got = read_picture(tmp_path / "wide.png", (4, 4), "here")
    assert got.shape == (3, 4, 4) and got[2].eq(1).all() and got[0].eq(0).all()


@pytest.mark.parametrize("kind", sorted(tiny.PIPELINES))
def test_latents_are_the_vaes_own_scaled_by_its_constants(kind: str) -> None:
    sampler = Sampler(Policy(tiny.PIPELINES[kind](), LoraConfig(rank=2)), steps=2)
    vae = sampler.policy.pipe.vae
    images = torch.rand(3, 3, 16, 16)
    latents = encode(sampler, images, (4, 8, 8))
    with torch.no_grad():
        raw = vae.encode(2 * images - 1).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    torch.testing.assert_close(latents, (raw - shift) * vae.config.scaling_factor)
    # What diffusers decodes is the inverse of that.
    torch.testing.assert_close(latents / vae.config.scaling_factor + shift, raw)
    with pytest.raises(UserError, match="cannot be encoded for .*, whose latents have the shape"):
        encode(sampler, images, (4, 4, 4))


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
def test_steps_drawn_given_the_picture_are_the_forward_process(chain: str, pictures: Path) -> None:
    """Each state scatters about alpha x0 by sigma, as the noised picture does, and the steps replay without a rift.

    DDIM with eta 1 keeps that exactly; a flow SDE's steps do up to their discretisation.
    """
    sampler = chains.sampler(chain, steps=50)
    records = load_preferences(write_lines(pictures / "p.jsonl", [{"prompt": "a", "image": "good.png", "label": 1}]))
    count = 400
    prompts = ["a"] * count
    labelled = LabelledPictures(sampler, build_algorithm("d3po"), 1)
    traj = labelled.trajectory(range(count), prompts, sample_keys(prompts, 0, 1), [records[0].metadata] * count)
    x0 = float(torch.logit(torch.tensor(round(0.7 * 255) / 255)))
    for step in (10, 25, 40):
        level = sampler.level(float(traj.times[step]))
        state = traj.states[:, step]
        assert float(state.mean()) == pytest.approx(level.alpha * x0, abs=4 * level.sigma / (count * 12) ** 0.5 + 0.01)
        assert float(state.std()) == pytest.approx(level.sigma, rel=0.03 if chain == "diffusion" else 0.1)
    seen: list[int] = []
    sampler.replay(traj.select(range(4)), lambda view: seen.append(view.index))
    assert seen == traj.stochastic_steps


# -- learning ----------------------------------------------------------------------------------------------------


def trainer(name: str, chain: str, data: Path, per_prompt: int, **settings: Any) -> Trainer:
    sampler = chains.sampler(chain)
    return Trainer(
        policy=sampler.policy, sampler=sampler,
        algorithm=build_algorithm(name, **{"data": str(data), "lr": 0.05, **settings}),
        reward=FunctionReward("unused", lambda images, prompts: torch.full((len(prompts),), float("nan")), False),
        prompts=["a", "b"], epochs=8, prompts_per_epoch=16, samples_per_prompt=per_prompt, updates_per_epoch=1,
        micro_batch=8,
    )  # fmt: skip


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """Eight bright and eight dark pictures."""
    for number in range(8):
        paint(tmp_path, f"bright{number}.png", 0.75 + 0.02 * number)
        paint(tmp_path, f"dark{number}.png", 0.25 - 0.02 * number)
    return tmp_path


@pytest.mark.parametrize("chain", ["diffusion", "flow"])
@pytest.mark.parametrize("chosen", ["bright", "dark"])
@pytest.mark.parametrize("name", ["diffusion_dpo", "d3po", "kto", "seppo"])
def test_what_was_chosen_becomes_likelier(name: str, chosen: str, chain: str, shades: Path) -> None:
    rejected = {"bright": "dark", "dark": "bright"}[chosen]
    if name == "kto":
        # One picture a line, good or bad by itself.
        rows = [
            {"prompt": "ab"[n % 2], "image": f"{kind}{n}.png", "label": kind == chosen}
            for kind in (chosen, rejected)
            for n in range(8)
        ]
        run = trainer(name, chain, write_lines(shades / "p.jsonl", rows), 1, threshold=0.5)
    else:
        rows = [{"prompt": "a", "chosen": f"{chosen}{n}.png", "rejected": f"{rejected}{n}.png"} for n in range(8)]
        settings = {"timesteps": 16, "checkpoint_every": 2} if name == "seppo" else {}
        run = trainer(name, chain, write_lines(shades / "p.jsonl", rows), 2, **settings)
    drawn = run.sampler.rollout(["a"] * 128, seed=99).states[:, -1].mean()
    records = list(run)
    moved = float(run.sampler.rollout(["a"] * 128, seed=99).states[:, -1].mean() - drawn)
    assert moved * (1 if chosen == "bright" else -1) > 0.05
    assert records[0]["reward/mean"] == 0.5 and run.parity is not None and run.parity["max_ratio_error"] == 0


def test_comparisons_stay_within_a_record(shades: Path) -> None:
    """Two records of one prompt in one epoch are two pairs, not one group of four."""
    rows = [{"prompt": "a", "chosen": f"bright{n}.png", "rejected": f"dark{n}.png"} for n in range(8)]
    run = trainer("diffusion_dpo", "flow", write_lines(shades / "p.jsonl", rows), 2, pairs="all")
    prepare, found = run.algorithm.prepare, []

    def watched(prompts: Any, rewards: Any) -> Any:
        found.append(prepare(prompts, rewards))
        return found[-1]

    run.algorithm.prepare = watched  # type: ignore[method-assign]
    next(iter(run))
    assert found[0].units == [[2 * n, 2 * n + 1] for n in range(16)]


def test_seppo_takes_winners_alone_and_draws_the_rest(shades: Path) -> None:
    """Of two records one is a tie, in which nothing won."""
    tie = {**PICK, "jpg_0": "dark0.png", "jpg_1": "dark1.png", "label_0": 0.5, "label_1": 0.5}
    rows: list[dict[str, Any]] = [{"prompt": "a", "chosen": "bright0.png", "rejected": "dark0.png"}, tie]
    run = trainer("seppo", "diffusion", write_lines(shades / "p.jsonl", rows), 2)
    examples = run.algorithm.examples()
    assert examples is not None and [len(example.metadata["images"]) for example in examples] == [1]
    samples = run._plan(1)
    trajectory = run._draw(samples)
    assert trajectory is not None
    winners, drawn = trajectory.states[0::2, -1], trajectory.states[1::2, -1]
    expected = torch.logit(torch.tensor(round(0.75 * 255) / 255))
    torch.testing.assert_close(winners, expected.expand_as(winners), atol=1e-4, rtol=0)
    own = run.sampler.rollout(samples.texts[1::2], keys=samples.keys[1::2]).states[:, -1]
    torch.testing.assert_close(drawn, own)


def test_a_run_on_pictures_resumes(shades: Path) -> None:
    rows = [{"prompt": "a", "chosen": f"bright{n}.png", "rejected": f"dark{n}.png"} for n in range(8)]
    data = write_lines(shades / "p.jsonl", rows)
    whole, first, second = (trainer("d3po", "diffusion", data, 2) for _ in range(3))
    list(whole)
    steps = iter(first)
    next(steps), next(steps)
    second.load_state_dict(first.state_dict())
    list(second)
    assert torch.equal(whole.policy.parameters()[0], second.policy.parameters()[0])


def test_a_number_of_samples_that_does_not_fit_is_refused(shades: Path) -> None:
    rows = [{"prompt": "a", "chosen": "bright0.png", "rejected": "dark0.png"}]
    single: dict[str, Any] = {"prompt": "a", "image": "dark0.png", "label": 1}
    data = write_lines(shades / "p.jsonl", rows)
    with pytest.raises(UserError, match="the file has 2 pictures a line, and samples_per_prompt is 4; set .* to 2"):
        trainer("diffusion_dpo", "flow", data, 4)
    with pytest.raises(UserError, match="the file has 1 pictures a line, and samples_per_prompt is 1; set .* to 2"):
        trainer("seppo", "flow", write_lines(shades / "w.jsonl", [single]), 1)
    mixed = [*rows, single]
    with pytest.raises(UserError, match="the file has from 1 to 2 pictures a line, expected the same number"):
        trainer("diffusion_dpo", "flow", write_lines(shades / "m.jsonl", mixed), 2)
