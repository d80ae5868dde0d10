"""Prompts: sources, files with errors that name the line, the split, and the order of a run."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difftune import prompts as prompts_module
from difftune.prompts import (
    ANIMALS,
    Prompt,
    PromptStream,
    conditions_of,
    identities,
    list_prompts,
    load_prompts,
    split_prompts,
)
from difftune.types import UserError
from difftune.zoo.world import parse_caption


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Sources


def test_a_list_may_mix_strings_mappings_and_prompts() -> None:
    got = load_prompts(["two stars", {"prompt": "", "target": 3}, Prompt("x", {"y": 1})])
    assert got == [Prompt("two stars"), Prompt("", {"target": 3}), Prompt("x", {"y": 1})]


def test_animals_are_the_45_of_ddpo() -> None:
    got = texts(load_prompts("animals"))
    assert got == list(ANIMALS) and len(set(got)) == 45
    assert {"ant", "hedgehog", "raccoon", "zebra"} < set(got)


@pytest.mark.parametrize("name", ["scenes", "scenes-full"])
def test_scenes_are_distinct_captions_that_depend_on_the_seed_alone(name: str) -> None:
    got = texts(load_prompts(name, size=60, seed=3))
    assert len(set(got)) == len(got) == 60
    assert got == texts(load_prompts(name, size=60, seed=3)) == texts(load_prompts(name, size=80, seed=3))[:60]
    assert got != texts(load_prompts(name, size=60, seed=4))
    assert all(parse_caption(text) for text in got if text)


def test_full_scenes_name_every_clause_and_scenes_do_not() -> None:
    assert all(len(parse_caption(text)) == 5 for text in texts(load_prompts("scenes-full", size=50)))
    assert {len(parse_caption(text)) for text in texts(load_prompts("scenes", size=50))} >= {1, 2, 3}


def test_room_captions_leave_the_background_open() -> None:
    got = texts(load_prompts("scenes-room"))
    assert got[0] == "" and {"a dotted background", "two stars"} < set(got)
    assert len(set(got)) == len(got)
    clauses = [parse_caption(text) for text in got]
    assert not any("background" in named for named in clauses)
    assert sum("pattern" in named for named in clauses) < len(got) / 5
    assert max(map(len, clauses)) <= 2


def test_every_builtin_set_loads_and_a_mapping_carries_the_options() -> None:
    for name in list_prompts():
        spec = {"name": name, "size": 7, "seed": 2}
        assert len(load_prompts(spec)) == 7
        assert load_prompts(spec) == load_prompts(name, size=7, seed=2)


def test_size_chooses_by_seed_and_keeps_the_order() -> None:
    got = texts(load_prompts("animals", size=10, seed=1))
    assert got == sorted(got) and len(set(got)) == 10
    assert got != texts(load_prompts("animals", size=10, seed=2))


# Files


def test_txt_skips_blank_lines_and_writes_the_empty_prompt_as_quotes(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", '\ufefftwo stars\r\n\n  \n""\n# no comment\na\u2028b\n')
    assert texts(load_prompts(str(path))) == ["two stars", "", "# no comment", "a\u2028b"]


def test_jsonl_keeps_metadata(tmp_path: Path) -> None:
    rows = [{"prompt": "é\n{x}", "target": [1, 2]}, {"prompt": ""}]
    path = write(tmp_path, "p.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert load_prompts(path) == [Prompt("é\n{x}", {"target": [1, 2]}), Prompt("")]


def test_csv_keeps_metadata_and_multi_line_cells(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt,n\n"two, stars",2\n"a\nb",1\n,0\n')
    assert load_prompts(path) == [
        Prompt("two, stars", {"n": "2"}),
        Prompt("a\nb", {"n": "1"}),
        Prompt("", {"n": "0"}),
    ]


def picture(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder / name


def test_conditions_come_from_both_formats_alike(tmp_path: Path) -> None:
    door, mask = picture(tmp_path / "in", "door.png"), picture(tmp_path / "in", "mask.png")
    rows = [{"prompt": "x", "image": "in/door.png", "conditions": {"mask_image": "in/mask.png", "strength": 0.5},
             "num_frames": 9, "negative_prompt": "dull", "target": "a"}]  # fmt: skip
    got = load_prompts(write(tmp_path, "p.jsonl", json.dumps(rows[0])))
    expected = {"image": door, "mask_image": mask, "strength": 0.5, "num_frames": 9, "negative_prompt": "dull"}
    assert got == [Prompt("x", {"target": "a"}, expected)]
    table = "prompt,image,conditions.mask_image,conditions.strength,num_frames,negative_prompt,target\n"
    table += "x,in/door.png,in/mask.png,0.5,9,dull,a\n"
    assert load_prompts(write(tmp_path, "p.csv", table)) == got
    assert conditions_of(got * 2) == {name: [value] * 2 for name, value in expected.items()}


def test_a_prompt_is_its_text_and_what_it_is_conditioned_on(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "blue"), ("copy", "red")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")

    def named(**conditions: object) -> str:
        return identities([Prompt("x", {"m": 1}, conditions)])[0]

    assert identities([Prompt("x"), Prompt("")]) == ["x", ""], "a text alone is itself"
    one, other, copy = (named(image=tmp_path / f"{name}.png") for name in ("a", "b", "copy"))
    assert len({"x", one, other}) == 3 and one == copy and one.startswith("x [")
    assert named(image=[tmp_path / "a.png"]) != one != named(mask_image=tmp_path / "a.png")
    assert named(negative_prompt="a", num_frames=2) == named(num_frames=2, negative_prompt="a") != named(num_frames=2)
    red, blue = (Image.open(tmp_path / f"{name}.png") for name in ("a", "b"))
    assert named(image=red) == named(image=red.copy()) != named(image=blue)
    # The bytes of a picture with a palette say nothing of its colours.
    indexed = [colour.convert("P", palette=Image.Palette.ADAPTIVE) for colour in (red, blue)]
    assert indexed[0].tobytes() == indexed[1].tobytes() and named(image=indexed[0]) != named(image=indexed[1])
    # The file's content counts, also after it has changed.
    red.resize((9, 9)).save(tmp_path / "copy.png")
    os.utime(tmp_path / "copy.png", ns=(1, 1))
    assert named(image=tmp_path / "copy.png") != one


def test_conditions_are_told_apart_by_type_shape_and_content() -> None:
    zeros = [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.bfloat16)]
    large = torch.zeros(5000)
    changed = large.clone()
    changed[2500] = 1  # what repr leaves out
    values: list[object] = [
        *zeros, large, changed, torch.tensor(0.0), torch.tensor(1e-30, dtype=torch.float64), torch.tensor(True),
        np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32), np.zeros(()),
        np.array(["a", None], object), np.array(["b", None], object),
        {"x": large}, {"x": changed}, {"y": large}, {"x": [large]}, [large], [large, large], [[large], [large]],
        "0", 0, 0.0, False, None, [], {}, b"0",
    ]  # fmt: skip
    named = [identities([Prompt("x", {}, {"c": value})])[0] for value in values]
    assert len(set(named)) == len(values)
    copies = [identities([Prompt("x", {}, {"c": value})])[0] for value in copy.deepcopy(values)]
    assert copies == named
    both = {"a": large, "b": changed}
    assert identities([Prompt("x", {}, {"c": both}), Prompt("x", {}, {"c": dict(reversed(both.items()))})])[0] == (
        identities([Prompt("x", {}, {"c": dict(reversed(both.items()))})])[0]
    )
    with pytest.raises(UserError, match="prompts: a condition is object, expected text, numbers, pictures"):
        identities([Prompt("x", {}, {"c": object()})])


def test_several_pictures_may_stand_under_one_name(tmp_path: Path) -> None:
    paths = [picture(tmp_path, "a.png"), picture(tmp_path, "b.png")]
    got = load_prompts(write(tmp_path, "p.jsonl", '{"prompt": "x", "reference_image": ["a.png", "b.png"]}'))
    assert got[0].conditions == {"reference_image": paths} and not got[0].metadata
    assert load_prompts([{"prompt": "x", "image": str(paths[0])}])[0].conditions == {"image": paths[0]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": ""}\n{"prompt": "", "image": "no.png"}', r"a\.jsonl:2: image 'no\.png': no such file"),
        ("a.csv", "prompt,mask_image\nx,no.png\n", r"a\.csv:2: mask_image 'no\.png': no such file; .* the prompt file"),
        ("a.jsonl", '{"prompt": "x", "image": "a.jsonl"}', r"a\.jsonl:1: image 'a\.jsonl': no PNG, JPEG, WEBP picture"),
        ("a.jsonl", '{"prompt": "x", "conditions": 3}', r"a\.jsonl:1: has conditions 3, expected a mapping"),
        ("a.csv", "prompt,num_frames\nx,9\ny,\n", r"prompts: 1 of the 2 in .*a\.csv have 'num_frames', expected all"),
    ],
)
def test_a_condition_that_cannot_be_met_is_one_line_before_the_run(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": }', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"prompt": "x"}\n"y"', r"a\.jsonl:2: got 'y', expected an object"),
        ("a.jsonl", '{"text": "x"}', r"a\.jsonl:1: has only \['text'\], expected 'prompt' to be a string"),
        ("a.jsonl", '{"prompt": 3}', r"a\.jsonl:1: has prompt 3, expected 'prompt' to be a string"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.csv", "text\nx\n", r"a\.csv:1: columns are \['text'\], expected one called 'prompt'"),
        ("a.csv", "", r"a\.csv:1: columns are \[\]"),
        ("a.csv", "prompt,n\nx,1\ntwo, stars,2\n", r"a\.csv:3: expected 2 cells"),
        ("a.csv", "prompt,n\nx\n", r"a\.csv:2: expected 2 cells"),
        ("a.csv", 'prompt\n"x', r"a\.csv:2: "),
        ("a.txt", b"ok\nna\xefve\n", r"a\.txt:2: byte 0xef is not UTF-8"),
        ("a.txt", "\n \n", r"a\.txt has no prompt"),
        ("a.md", "x", r"ends in '\.md', expected \.txt, \.jsonl, \.csv"),
    ],
)
def test_a_bad_file_is_one_error_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_a_file_over_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "MAX_BYTES", 2**20)
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load_prompts(write(tmp_path, "a.txt", b"x" * (2**20 + 1)))
    assert len(load_prompts(write(tmp_path, "b.txt", b"x" * 2**20))) == 1


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("animal", {}, "unknown prompts 'animal', did you mean 'animals'"),
        ("a red circle", {}, r"or a list: \['a red circle'\]"),
        ("missing.txt", {}, "'missing.txt' cannot be read: No such file"),
        ([], {}, "the list has no prompt"),
        (["a", 3], {}, r"prompts\[1\] is 3, expected a string"),
        ([{"prompt": None}], {}, r"prompts\[0\] has prompt None"),
        (7, {}, "got int, expected a list, a file name or a built-in set"),
        ({"size": 3}, {}, "expected name"),
        ({"name": "animals", "sise": 3}, {}, "expected name"),
        ("animals", {"size": 46}, "size is 46, but animals has 45"),
        ("animals", {"size": 0}, "size is 0, expected a whole number"),
        ("animals", {"size": 1.5}, "size is 1.5, expected a whole number"),
    ],
)
def test_a_bad_spec_says_what_is_expected(spec: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(spec, **options)


def test_a_prompt_checks_itself() -> None:
    with pytest.raises(UserError, match="prompt 3 is int"):
        Prompt(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="metadata of prompt 'x' is list"):
        Prompt("x", [1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="conditions of prompt 'x' are list"):
        Prompt("x", {}, [1])  # type: ignore[arg-type]
    assert str(Prompt("x")) == "x" and len({Prompt("x"), Prompt("x")}) == 1


# The split


@pytest.mark.parametrize(("held_out", "count"), [(0.2, 9), (5, 5), (0, 0), (0.0, 0), (0.001, 1), (44, 44)])
def test_the_split_is_disjoint_complete_and_ordered(held_out: float, count: int) -> None:
    prompts = load_prompts("animals")
    train, rest = split_prompts(prompts, held_out, seed=1)
    assert len(rest) == count
    assert sorted(texts(train) + texts(rest)) == texts(prompts)
    assert texts(train) == sorted(texts(train)) and texts(rest) == sorted(texts(rest))
    assert (train, rest) == split_prompts(prompts, held_out, seed=1)


def test_the_split_depends_on_the_seed_and_never_separates_equal_texts() -> None:
    prompts = load_prompts("animals")
    assert split_prompts(prompts, 5, seed=1) != split_prompts(prompts, 5, seed=2)
    train, rest = split_prompts(prompts * 3, 5, seed=1)
    assert not set(texts(train)) & set(texts(rest)) and len(rest) == 15


@pytest.mark.parametrize("held_out", [1.0, 45, -1, 1.5, -0.1])
def test_a_split_without_training_prompts_is_refused(held_out: float) -> None:
    with pytest.raises(UserError, match="expected a share below 1 or fewer than the 45"):
        split_prompts(load_prompts("animals"), held_out)


# The stream


def test_epochs_are_slices_of_one_endless_sequence() -> None:
    stream = PromptStream(load_prompts("animals"), seed=5)
    whole = [stream[index].text for index in range(180)]
    for count in (1, 7, 45, 60):
        epochs = [text for epoch in range(180 // count) for text in texts(stream.epoch(epoch, count))]
        assert epochs == whole[: len(epochs)]
    # A fresh stream asked out of order gives the same: a resumed run needs no cursor.
    assert texts(PromptStream(load_prompts("animals"), seed=5).epoch(3, 45)) == whole[135:180]


def test_every_pass_has_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(load_prompts("animals"), seed=0)
    passes = [tuple(texts(stream.epoch(number, 45))) for number in range(4)]
    assert all(set(one) == set(ANIMALS) for one in passes)
    assert len(set(passes)) == 4
    assert Counter(texts(stream.epoch(0, 90))) == Counter(list(ANIMALS) * 2)


def test_the_order_depends_on_the_seed_and_is_fixed_for_good() -> None:
    prompts = load_prompts(list("abcdef"))
    assert PromptStream(prompts, 1).epoch(0, 6) != PromptStream(prompts, 2).epoch(0, 6)
    # Written down once: a change here would break the resume of every run under way.
    assert "".join(texts(PromptStream(prompts, 0).epoch(0, 12))) == "dbcafedfeabc"


def test_shuffles_are_uniform() -> None:
    prompts = load_prompts(list("abcd"))
    firsts = Counter(PromptStream(prompts, seed)[0].text for seed in range(2000))
    # Binomial with p = 1/4: standard deviation 19; 100 is five of them.
    assert all(abs(count - 500) < 100 for count in firsts.values())


def test_an_empty_stream_and_a_negative_epoch_are_refused() -> None:
    with pytest.raises(UserError, match="got none"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        PromptStream([Prompt("x")], seed=0).epoch(-1, 4)
