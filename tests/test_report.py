"""The report and the sample grid: whole on any run, safe on any text, drawn from the numbers that are there."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont

from difftune.report import charts, files, grids, sample_grid, write_report

HOSTILE = '<script>alert("x")</script>&\'\x1b[31m'


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = {"meta", "img", "line", "polyline", "polygon", "br"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def record(epoch: int, **extra: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 2 * epoch,
        "reward/mean": -2.0 + 0.1 * epoch,
        "reward/std": 0.25,
        "reward/scene/lost/count": -0.5 / epoch,
        "kl": 1e-4 * epoch,
        "clip_fraction": 0.1,
        "my_metric": 3.0,
        "seconds/rollout": 3.0,
        "seconds/update": 1.0,
        **extra,
    }


def run(folder: Path, records: list[dict[str, Any]] | None = None, tail: str = "") -> Path:
    """Make a run's folder, named so that the name must be escaped."""
    folder = folder / "run <b>&amp;"
    (folder / "samples").mkdir(parents=True)
    (folder / "adapter").mkdir()
    lines = [json.dumps(r) for r in (records if records is not None else [record(e) for e in range(1, 9)])]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    config = {"algorithm": {"name": "ddpo"}, "reward": [HOSTILE, {"name": "scene"}], "prompts": [HOSTILE]}
    (folder / "config.yaml").write_text(json.dumps(config))
    for epoch in range(0, 45, 5):
        sample_grid(
            torch.rand(4, 3, 8, 8), 2, path=folder / "samples" / f"epoch_{epoch:04d}.png", captions=[HOSTILE] * 4
        )
    (folder / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"x" * 1_500_000)
    (folder / "adapter" / "README.md").write_text('```python\npipe.load_lora_weights("path/to/this/folder")\n```\n')
    return folder


def page_of(folder: Path) -> Reader:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Reader(path.read_text(encoding="utf-8"))


# The report


def test_a_full_run_has_every_section(tmp_path: Path) -> None:
    page = page_of(run(tmp_path))
    headings = re.findall(r"Reward|Parts|Samples|In between|Training|Time|Adapter|Configuration", page.text)
    assert list(dict.fromkeys(headings)) == [
        "Reward", "Parts", "Samples", "In between", "Training", "Time", "Adapter", "Configuration",
    ]  # fmt: skip
    for text in (
        "algorithm ddpo",
        "+ scene",
        "epochs 8",
        "scene/lost/count",
        "KL to reference",
        "my_metric",
        "1.50 MB",
    ):
        assert text in page.text, text
    assert "rollout 24 s 75 %" in page.text and "update 8.0 s 25 %" in page.text
    assert f'load_lora_weights("{tmp_path}' in page.text


def test_the_headline_compares_first_and_last_epoch_in_base_deviations(tmp_path: Path) -> None:
    text = page_of(run(tmp_path)).text
    assert "before −1.9 → after −1.2 +0.7 +2.8 base sd" in text
    assert "samples trained on, epoch 1 and epoch 8" in text


def test_a_summary_takes_the_headline(tmp_path: Path) -> None:
    folder = run(tmp_path)
    summary = {"before": {"reward/mean": 0.5, "reward/std": 0.2}, "after": {"reward/mean": 0.4}}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = page_of(folder).text
    assert "before 0.5 → after 0.4 −0.1 −0.5 base sd" in text and "held-out" in text


def test_the_page_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(run(tmp_path))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "b>"}
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in (tmp_path / "run <b>&amp;" / "report.html").read_text()


def test_what_users_wrote_is_text(tmp_path: Path) -> None:
    raw = write_report(run(tmp_path, [record(1, **{f"reward/{HOSTILE}": 1.0, HOSTILE: 2.0})])).read_text()
    assert "<script" not in raw and "&lt;script&gt;alert(" in raw
    assert "run &lt;b&gt;&amp;amp;" in raw and "<b>&amp;amp;" not in raw
    # Quotes cannot end an attribute.
    assert all("alert" not in name for _, attributes in Reader(raw).tags for name in attributes)


@pytest.mark.parametrize("tail", ['{"epoch": 9, "rew', "[1, 2]", '{"step": 3}', "null", "\x00\xff", '{"epoch": "x"}'])
def test_a_torn_line_is_left_out_and_said(tail: str, tmp_path: Path) -> None:
    text = page_of(run(tmp_path, tail=tail)).text
    assert "epochs 8" in text and "1 line of metrics.jsonl could not be read" in text


def test_an_epoch_written_twice_counts_once(tmp_path: Path) -> None:
    again = [record(1), record(2), record(3), record(2, **{"reward/mean": 5.0})]
    folder = run(tmp_path, again)
    page = page_of(folder)
    assert "epochs 3" in page.text
    tips = [a["data-tip"] for t, a in page.tags if "data-tip" in a]
    assert tips[:3] == ["epoch 1: −1.9 ± 0.25", "epoch 2: 5 ± 0.25", "epoch 3: −1.7 ± 0.25"]


def test_missing_and_odd_values_leave_gaps_and_no_fault(tmp_path: Path) -> None:
    records = [record(1), {"epoch": 2}, record(3, kl=float("nan")), record(4, kl=None), record(5, kl="x")]
    page = page_of(run(tmp_path, records))
    kl = [a["data-tip"] for t, a in page.tags if "data-tip" in a and "0.0001" in (a["data-tip"] or "")]
    assert kl == ["epoch 1: 0.0001"]
    numbers = [a.get(k) or "" for _, a in page.tags for k in ("points", "style", "data-tip", "aria-label")]
    assert not any("nan" in number for number in numbers)


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert tmp_path.name in page.text and "Reward" not in page.text
    with pytest.raises(FileNotFoundError, match="run folder '.*nowhere' does not exist"):
        write_report(tmp_path / "nowhere")


def test_broken_files_are_passed_over(tmp_path: Path) -> None:
    folder = run(tmp_path)
    (folder / "config.yaml").write_text("a: [unclosed")
    (folder / "summary.json").write_text("{")
    (folder / "samples" / "epoch_0045.png").write_bytes((folder / "samples" / "epoch_0040.png").read_bytes()[:200])
    (folder / "samples" / "epoch_9x.png").write_bytes(b"")
    page = page_of(folder)
    assert "a: [unclosed" in page.text and "epoch 40" in page.text and "epoch 45" not in page.text


def test_pictures_are_base_last_and_six_between(tmp_path: Path) -> None:
    folder = run(tmp_path)
    images = [a for t, a in page_of(folder).tags if t == "img"]
    assert [a["alt"] for a in images] == [
        f"samples, {name}" for name in ["base model", "epoch 40", *(f"epoch {e}" for e in (5, 10, 15, 25, 30, 35))]
    ]
    stored = (folder / "samples" / "epoch_0000.png").read_bytes()
    assert base64.b64decode((images[0]["src"] or "").split(",")[1]) == stored


def test_large_grids_are_shrunk(tmp_path: Path) -> None:
    noise = torch.rand(1, 3, 2000, 900)
    sample_grid(noise, 1, path=tmp_path / "samples" / "epoch_0000.png")
    url = next(a["src"] for t, a in page_of(tmp_path).tags if t == "img") or ""
    assert url.startswith("data:image/jpeg;base64,")
    assert max(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size) == 1600


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path) -> None:
    page = page_of(run(tmp_path, [record(e) for e in range(1, 5001)]))
    lines = [a["points"] or "" for t, a in page.tags if t == "polyline"]
    assert 120 <= max(len(line.split()) for line in lines) <= charts._MAX_POINTS
    tips = [a["data-tip"] or "" for t, a in page.tags if "data-tip" in a]
    assert tips[0].startswith("epoch 1–21: ")
    assert (tmp_path / "run <b>&amp;" / "report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [1e12, -1e12], [1.0, 1.0 + 1e-15]])
def test_marks_stay_inside_the_chart(values: list[float]) -> None:
    points = charts.points_of([(e, v) for e, v in enumerate(values, start=1)], {1: 0.5})
    drawn = charts.line_chart(points, "x", tall=True)
    numbers = [float(n) for group in re.findall(r'points="([^"]*)"', drawn) for n in re.split("[ ,]", group)]
    assert numbers and all(-0.01 <= n <= 100.01 for n in numbers)
    assert "nan" not in drawn and "inf" not in drawn


@pytest.mark.parametrize(("low", "high"), [(-2.6, -1.2), (0, 1), (0.9998, 1.0003), (1e-7, 9e-7), (-3e5, 12e5), (3, 3)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = charts._ticks(low, high, 5)
    assert 1 <= len(ticks) <= 9 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    if high > low:
        step = ticks[1] - ticks[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5, 10)) < 1e-3


def test_the_report_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path)
    before = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == before

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


# Sample grids


def test_a_grid_holds_the_pictures_in_rows(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]])
    images = colours[:, :, None, None].expand(5, 3, 64, 64)
    path = sample_grid(images, 3, path=tmp_path / "deep" / "grid.png")
    sheet = Image.open(path)
    # 64 pixels are enlarged three times; 6 pixels of white around each.
    assert sheet.size == (3 * 198 + 6, 2 * 198 + 6)
    for index, colour in enumerate(colours):
        x, y = 6 + index % 3 * 198, 6 + index // 3 * 198
        expected = tuple(int(255 * c) for c in colour)
        assert sheet.getpixel((x, y)) == sheet.getpixel((x + 191, y + 191)) == expected
        assert sheet.getpixel((x - 1, y)) == (255, 255, 255)
    assert sheet.getpixel((6 + 2 * 198, 6 + 198)) == (255, 255, 255)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_large_pictures_keep_their_size_and_values_are_rounded(tmp_path: Path) -> None:
    images = torch.full((1, 3, 200, 300), 127.6 / 255)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 7.0, -3.0
    sheet = Image.open(sample_grid(images, 4, path=tmp_path / "x.png"))
    assert sheet.size == (312, 212)
    assert [sheet.getpixel((6 + x, 6)) for x in range(3)] == [(255, 128, 128), (0, 128, 128), (128, 128, 128)]


def test_captions_fit_below_their_picture(tmp_path: Path) -> None:
    captions = ["two stars", "", "word " * 500, "x" * 100_000, "a\nb\x1b[31m\x00", "日本語 🦊"]
    images = torch.zeros(6, 3, 64, 64)
    with Image.open(sample_grid(images, 3, path=tmp_path / "a.png")) as plain:
        plain.load()
    titled = Image.open(sample_grid(images, 3, path=tmp_path / "b.png", captions=captions))
    assert titled.width == plain.width and titled.height == plain.height + 2 * 36
    # Nothing is written between the columns.
    for x in range(198, 204):
        assert {titled.getpixel((x, y)) for y in range(titled.height)} == {(255, 255, 255)}
    font = ImageFont.load_default(13)
    assert grids._caption_lines("", font, 192) == ["(empty prompt)"]
    assert grids._caption_lines("a\nb\x1b[31m\x00", font, 192) == ["a b [31m"]
    long = grids._caption_lines("two yellow stars on a dotted purple background and then some more", font, 192)
    assert len(long) == 2 and long[1].endswith("…") and max(map(font.getlength, long)) <= 192


@pytest.mark.parametrize(
    ("images", "columns", "captions", "message"),
    [
        (torch.zeros(2, 1, 8, 8), 2, None, r"got images \(2, 1, 8, 8\), expected \(B, 3, H, W\)"),
        (torch.zeros(0, 3, 8, 8), 2, None, "B at least 1"),
        (torch.zeros(2, 3, 8, 8), 0, None, "got 0 columns"),
        (torch.zeros(2, 3, 8, 8), 2, ["x"], "got 1 captions for 2 images"),
    ],
)
def test_wrong_grids_are_refused(images: Any, columns: int, captions: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        sample_grid(images, columns, captions=captions, path=tmp_path / "x.png")
