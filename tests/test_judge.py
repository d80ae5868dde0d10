"""tiny-vlm: what it is trained on, that it sees, and the rewards that a judge with sight gives, at home and served."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_server import serving
from PIL import Image
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards.vlm_server import YES_NO
from difftune.rewards.vqa_score import QUESTION
from difftune.serve import ScoreServer
from difftune.zoo import model_path, quality
from difftune.zoo.clip import holds
from difftune.zoo.vlm import (
    IMAGE,
    QUESTIONS,
    Conversation,
    false_caption,
    near_miss,
    new_tokenizer,
    new_vlm,
    pack,
    sample_question,
    true_words,
)
from difftune.zoo.world import (
    CLAUSES,
    Scene,
    caption,
    parse_caption,
    render,
    sample_caption,
    sample_scene,
    vocabulary,
)

MODEL = "difftune/tiny-vlm"


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


# What it is trained on


def test_the_questions_of_the_rewards_are_among_those_it_knows() -> None:
    assert {QUESTION, YES_NO} < set(QUESTIONS)


def test_a_question_has_a_token_a_word_and_other_text_is_cut_into_bytes() -> None:
    tokenizer = new_tokenizer()
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in [*vocabulary(), "Yes", "no"])
    told = tokenizer(f"USER: {IMAGE}\n{QUESTION.format(prompt='two red stars')} ASSISTANT:").input_ids
    assert len(told) == 22 and told[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in told
    assert 'user : does this figure show " two red stars "' in tokenizer.decode(told, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer("Ünï @ 7").input_ids, skip_special_tokens=True) == "ünï @ 7"


def test_a_near_miss_is_wrong_in_one_clause() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(100):
        for clause in CLAUSES:
            other = near_miss(scene, clause, rng)
            assert [name for name in CLAUSES if getattr(other, name) != getattr(scene, name)] == [clause]
            named = parse_caption(false_caption(scene, rng, clause))
            assert [name for name, value in named.items() if getattr(scene, name) != value] == [clause]


def test_half_of_the_questions_are_true_and_most_others_nearly_so() -> None:
    rng = np.random.default_rng(0)
    asked = [(scene, *sample_question(scene, rng)) for scene in scenes(1500)]
    assert all(true == holds(scene, parse_caption(text)) for scene, text, true in asked)
    assert np.mean([true for *_, true in asked]) == pytest.approx(0.52, abs=0.04)
    wrong = [true_words(text, scene).count(0) for scene, text, true in asked if not true]
    assert np.mean(np.array(wrong) == 1) > 0.7


def test_words_are_true_where_their_clause_is() -> None:
    for scene in scenes(100):
        labels = true_words(caption(scene), scene)
        assert labels.count(1) == 5 and 0 not in labels
        for clause in CLAUSES:
            wrong = true_words(caption(near_miss(scene, clause, np.random.default_rng(0))), scene)
            assert wrong.count(0) == 1 and wrong.count(1) == 4
    scene = Scene(2, "blue", "star", "red", "plain")
    assert true_words("a red background", scene) == [-100, 1, -100]
    assert true_words("a red star", scene) == [0, 0, 1] and true_words("", scene) == []


@torch.no_grad()
def test_conversations_in_one_row_are_what_they_are_alone() -> None:
    torch.manual_seed(0)
    model, tokenizer = new_vlm().eval(), new_tokenizer()
    prefix = tokenizer(f"USER: {IMAGE}").input_ids
    prefix = prefix[:-1] + prefix[-1:] * model.config.image_seq_length
    asked = ["Does this image show two stars? ASSISTANT:", "Does this image show a red star on a plain one? ASSISTANT:"]
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in asked]
    row = [Conversation(ids, [7, 8], [1] * len(ids)) for ids in tokens]
    inputs, labels = pack([row], prefix, 1)
    pixels = torch.rand(1, 3, 64, 64)
    packed = model(pixel_values=pixels, **inputs).logits[0]
    longest = len(tokens[1]) + 2
    for index, ids in enumerate(tokens):
        end = len(prefix) + index * longest + len(ids)
        alone = model(pixel_values=pixels, input_ids=torch.tensor([[*prefix, *ids]])).logits[0, -1]
        torch.testing.assert_close(packed[end - 1], alone, atol=1e-5, rtol=1e-5)
        assert labels["next"][0, end - 1 : end + 1].tolist() == [7, 8]
    assert (labels["next"] >= 0).sum() == 4 and (labels["words"] >= 0).sum() == len(tokens[0]) + len(tokens[1])


# The shipped model


@pytest.fixture(scope="module")
def judge() -> Iterator[tuple[Any, Any]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_path(MODEL)
    yield AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_the_stock_classes_load_it(judge: tuple[Any, Any]) -> None:
    model, processor = judge
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 1.25e6
    picture = render(Scene(2, "yellow", "star", "blue", "plain", seed=1))
    question = {"type": "text", "text": "Does this image show a circle?"}
    told = [{"role": "user", "content": [{"type": "image"}, question]}]
    text = processor.apply_chat_template(told, add_generation_prompt=True)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert processor.decode(written, skip_special_tokens=True) == "no"


def test_it_is_right_about_scenes_it_has_not_seen_and_about_near_misses(judge: tuple[Any, Any]) -> None:
    found = quality.measure_judge(*judge, count=40)
    # Of 80, 40 and 200 answers, so that a figure may fall short of the page's, which are of 100 scenes: see below.
    assert found["true"] >= 0.92 and found["other"] >= 0.95 and found["near misses"] >= 0.93, found


@pytest.mark.slow
def test_it_is_as_often_right_as_its_page_says(judge: tuple[Any, Any]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "Right answers about 100 held-out scenes" in page
    found = quality.measure_judge(*judge, count=100)
    assert min(found["true"], found["other"], found["near misses"]) >= 0.95, found
    for row, name in (
        ("captions of everything", "true"),
        ("the full caption", "other"),
        ("near misses", "near misses"),
    ):
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {row}"))
        assert found[name] == pytest.approx(float(line.split("|")[2]), abs=0.006), (line, found)


def shown(count: int = 12, seed: int = 5) -> tuple[Tensor, list[str], list[str]]:
    """Return pictures ``(count, 3, 64, 64)``, captions that are true of them, and captions of which a clause is not."""
    rng = np.random.default_rng(seed)
    chosen = scenes(count, seed)
    pictures = np.stack([np.asarray(render(scene)) for scene in chosen])
    true = [sample_caption(scene, rng) or caption(scene) for scene in chosen]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, true, [false_caption(s, rng) for s in chosen]


def seen_by(score: Any) -> float:
    """Return how often a reward finds the true caption likelier than the one of which a clause is wrong."""
    pictures, true, false = shown()
    return float((score(pictures, true).total > score(pictures, false).total).float().mean())


@pytest.mark.parametrize("among", ["all", "two"])
def test_vqa_score_sees(among: str) -> None:
    score = build_reward("vqa_score", model=MODEL, among=among)
    assert seen_by(score) >= 11 / 12
    pictures, true, false = shown()
    sure = [score(pictures, captions).total for captions in (true, false)]
    assert sure[0].median() > 0.8 and sure[1].median() < 0.2


def test_vqa_score_is_the_stock_model_behind_its_own_processor(judge: tuple[Any, Any]) -> None:
    model, processor = judge
    pictures, captions, _ = shown(3)
    got = build_reward("vqa_score", model=MODEL)(pictures, captions).total
    yes = processor.tokenizer("Yes", add_special_tokens=False).input_ids[0]
    for index, text in enumerate(captions):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(prompt=text)}]
        told = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        file = Image.fromarray((pictures[index].permute(1, 2, 0) * 255).round().byte().numpy())
        with torch.no_grad():
            logits = model(**processor(text=[told], images=[file], return_tensors="pt")).logits[0, -1]
        assert got[index].item() == pytest.approx(logits.softmax(-1)[yes].item(), abs=1e-5)


def test_its_gradient_points_to_what_is_asked_for() -> None:
    """A small step on the pixels along the gradient makes the judge believe more of the caption."""
    score = build_reward("vqa_score", model=MODEL, among="two")
    pictures, _, false = shown(4)
    moved = pictures.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(moved, false).total.log().sum(), moved)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    after = (pictures + 0.02 * gradient.sign()).clamp(0, 1)
    assert (score(after, false).total > score(pictures, false).total).float().mean() >= 0.75


def test_it_sees_from_behind_a_score_server(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    monkeypatch.setenv("SCORER_KEY", "open-sesame")
    local = build_reward("vqa_score", model=MODEL)
    server = ScoreServer(local, "open-sesame")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        remote = build_reward("remote", url=server.url, key_env="SCORER_KEY")
        pictures, captions, _ = shown(6)
        torch.testing.assert_close(remote(pictures, captions).total, local(pictures, captions).total)
    finally:
        server.shutdown()
        server.server_close()


def test_it_sees_from_behind_a_chat_server(judge: tuple[Any, Any]) -> None:
    """An OpenAI-compatible server around the stock model: picture and question in, log-probabilities out."""
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    model, processor = judge
    lock = threading.Lock()

    @torch.no_grad()
    def chat(body: dict[str, Any]) -> dict[str, Any]:
        picture, words = body["messages"][0]["content"]
        file = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].split(",")[1])))
        told = [{"role": "user", "content": [{"type": "image"}, words]}]
        text = processor.apply_chat_template(told, add_generation_prompt=True)
        with lock:
            logits = model(**processor(text=[text], images=[file], return_tensors="pt")).logits[0, -1]
        found = logits.log_softmax(-1).topk(body["top_logprobs"])
        words_of = [processor.tokenizer.decode([token]) for token in found.indices.tolist()]
        top = [{"token": w, "logprob": p} for w, p in zip(words_of, found.values.tolist(), strict=True)]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}

    with serving(chat) as server:
        assert seen_by(build_reward("vlm_server", url=server.url + "/v1", model="tiny-vlm")) >= 11 / 12


def test_what_it_is_and_where_it_comes_from_is_beside_it() -> None:
    page = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "`difftune/tiny-vlm`" in page and "## The judge" in page
