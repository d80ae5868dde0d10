"""The configuration: what is read, what is refused and in which words, and that it comes back as it went."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from difftune import config as cf
from difftune.policy import ModelConfig
from difftune.types import UserError

MINIMAL: dict[str, Any] = {
    "model": "difftune/tiny-sd",
    "reward": "jpeg_compressibility",
    "algorithm": "ddpo",
    "prompts": ["a star", "two stars"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of a few thousand random parameters."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny.sd_pipeline().save_pretrained(folder)
    return folder


def written(folder: Path, text: str = "", **changes: Any) -> Path:
    """Write a configuration file: the minimal one with changes, or the text given."""
    file = folder / "my.yaml"
    file.write_text(text or cf.to_yaml({**MINIMAL, **changes}))
    return file


def refused(data: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        cf.validate(data)
    return str(caught.value).splitlines()


# -- YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("-3", -3),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("", None),
        ("null", None),
        ("'1e-4'", "1e-4"),
        ("[1e-3, no]", [1e-3, "no"]),
    ],
)
def test_scalars_are_read_by_the_rules_of_yaml_1_2(text: str, value: Any) -> None:
    found = cf.parse_yaml(f"key: {text}", "x")["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", ["no", "1e-4", "1_000", "yes", "~", "", "0x10", "012", "a: b", "# x", "<<", "null", "é\n"]
)
def test_words_that_look_like_something_else_survive_writing(value: str) -> None:
    data = {"key": value, "list": [value, 1e-8, 1e20, -0.0, True, None]}
    assert cf.parse_yaml(cf.to_yaml(data), "x") == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "'a' comes twice"),
        ("a: {b: 1, b: 2}", "'b' comes twice"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: [1", "not YAML"),
        ("- 1", "expected a mapping"),
        ("1: 2", "expected a mapping"),
        ("text", "expected a mapping"),
        ("a: &a [*a]", "more than"),
        ("a: &a [1,2,3,4,5,6,7,8,9]\n" + "\n".join(
            f"{name}: &{name} [{','.join(['*' + before] * 9)}]" for before, name in zip("abcdef", "bcdefg", strict=True)
        ), "more than"),
    ],
)  # fmt: skip
def test_bad_yaml_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        cf.parse_yaml(text, "my.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("my.yaml")


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_text("a: " + "x" * cf.MAX_BYTES)
    with pytest.raises(UserError, match="larger than 1 MiB"):
        cf.read_yaml(large)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        cf.read_yaml(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="does not exist"):
        cf.load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="without config.yaml"):
        cf.load_config(tmp_path)
    with pytest.raises(UserError, match="unknown recipe 'demmo', did you mean 'demo'"):
        cf.load_config("demmo")


# -- validation --------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_said_at_once() -> None:
    lines = refused(
        {
            "model": "difftune/tiny-sdd",
            "reward": [{"name": "jpeg_compressibilty"}, {"name": "scene", "corect": 1}],
            "algorithm": {"name": "ddpo", "clip_rnage": 3, "lr": "fast"},
            "prompts": "scenes-rom",
            "trian": {},
            "train": {"epochs": "many"},
            "lora": {"rank": 0},
            "sampler": {"dynamics": "dim", "call": 3},
        }
    )
    expected = {
        "model.id": "did you mean 'difftune/tiny-sd'",
        "reward.0.name": "did you mean 'jpeg_compressibility'",
        "reward.1.corect": "did you mean 'correct'",
        "algorithm.clip_rnage": "did you mean 'clip_range'",
        "algorithm.lr": "got 'fast', expected a number",
        "prompts": "did you mean 'scenes-room'",
        "trian": "did you mean 'train'",
        "train.epochs": "got 'many', expected a whole number",
        "lora.rank": "got 0, expected a value greater than or equal to 1",
        "sampler.dynamics": "did you mean 'ddim'",
        "sampler.call": "expected a mapping",
    }
    found = dict(line.split(": ", 1) for line in lines)
    assert found.keys() == expected.keys()
    assert all(text in found[path] for path, text in expected.items())


def test_a_mistake_inside_a_combination_is_found_by_its_path() -> None:
    """In the YAML's own words, at any depth, before a weight is loaded."""
    affine = {"name": "affine", "of": {"name": "jpeg_compressibility", "qualty": 3}, "scale": "wide"}
    lines = refused(
        {
            **MINIMAL,
            "reward": [
                {"name": "product", "of": ["scen", affine, ["scene", {"name": "hinge", "of": "scene"}]]},
                {"name": "mean_min", "of": []},
                {"name": "sigmoid", "of": {"weight": 2}},
            ],
        }
    )
    expected = {
        "reward.0.of.0.name": "did you mean 'scene'",
        "reward.0.of.1.of.qualty": "did you mean 'quality'",
        "reward.0.of.1.scale": "got 'wide', expected a number",
        "reward.0.of.2.1.target": "missing, reward 'hinge' needs it",
        "reward.1.of": "empty list",
        "reward.2.of": "expected a name or a mapping with one",
    }
    found = dict(line.split(": ", 1) for line in lines)
    assert found.keys() == expected.keys()
    assert all(text in found[path] for path, text in expected.items())


def test_a_combination_keeps_its_terms_and_is_as_differentiable_as_they_are() -> None:
    tree = {"name": "product", "of": ["jpeg_proxy", {"name": "affine", "of": "sharpness", "scale": "2", "weight": 1}]}
    config = cf.validate({**MINIMAL, "reward": tree, "algorithm": "refl"})
    assert config.reward["of"][1] == {"name": "affine", "of": "sharpness", "scale": 2.0, "weight": 1.0}
    assert cf.validate(cf.resolve(config)) == config
    tree["of"] = ["jpeg_proxy", {"name": "affine", "of": "jpeg_compressibility"}]
    assert "differentiable" in " ".join(refused({**MINIMAL, "reward": tree, "algorithm": "refl"}))


@pytest.mark.parametrize("section", ["model", "reward", "algorithm", "prompts"])
def test_a_missing_section_is_named_with_its_purpose(section: str) -> None:
    lines = refused({key: value for key, value in MINIMAL.items() if key != section})
    assert len(lines) == 1 and lines[0].startswith(f"{section}: missing, expected ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"dynamics": "ode"}}, "deterministic"),
        ({"sampler": {"eta": 0}}, "set sampler.eta above 0"),
        ({"sampler": {"window": []}}, "deterministic"),
        ({"sampler": {"steps": 4, "window": [1, 4]}}, "sampler.window: got step 4"),
        ({"algorithm": {"name": "ddpo", "normalize": "group"}, "train": {"samples_per_prompt": 1}}, "to 2 or more"),
        ({"algorithm": {"name": "ddpo", "variant": "score_function"}}, "one update"),
        ({"train": {"prompts_per_epoch": 1, "samples_per_prompt": 1}}, "train.updates_per_epoch: got 2"),
        ({"lora": None, "model": {"id": "difftune/tiny-sd", "dtype": "bf16"}}, "trains the denoiser itself"),
        ({"mixed_precision": "fp16"}, "fp16 loses small gradients"),
        ({"prompts": {"source": ["a", "b"], "held_out": 2}}, "held_out is 2"),
        ({"reward": []}, "empty list"),
        ({"model": "./nowhere"}, "not a folder"),
    ],
)
def test_what_cannot_go_together_is_refused_before_a_model_is_loaded(changes: dict[str, Any], message: str) -> None:
    lines = refused({**MINIMAL, **changes})
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({}, None),
        ({"dynamics": "ddim"}, None),
        ({"dynamics": "flow_sde"}, None),
        ({"eta": 1}, None),
        ({"eta": 0.7}, "got dynamics=auto, eta=0.7, window=None; leave sampler.dynamics, eta and window out, or set "),
        ({"dynamics": "flow_sde", "eta": 0.7}, "or flow_sde with eta: 1.4142136 (flow)"),
        ({"dynamics": "dance_sde"}, "got dynamics=dance_sde, eta=0.3"),
        ({"window": [0, 1]}, "window: null"),
    ],
)
def test_memoryless_noise_is_taken_where_it_is_left_open(sampler: dict[str, Any], message: str | None) -> None:
    changes = {"algorithm": "adjoint_matching", "reward": "jpeg_proxy", "sampler": sampler}
    if message is None:
        cf.validate({**MINIMAL, **changes})
    else:
        (line,) = refused({**MINIMAL, **changes})
        assert message in line


def test_resolved_values_reload_to_an_equal_configuration() -> None:
    prompts = ["no", "1e-4", "/a/b", ""]
    config = cf.validate({**MINIMAL, "algorithm": {"name": "ddpo", "lr": "1e-3"}, "prompts": prompts})
    data = cf.resolve(config)
    assert data["algorithm"]["lr"] == 1e-3 and data["algorithm"]["clip_range"] == 1e-4
    assert data["train"]["epochs"] == 20 and data["lora"]["rank"] == 8
    assert cf.validate(cf.parse_yaml(cf.to_yaml(data), "x")) == config
    assert cf.validate(json.loads(json.dumps(data))) == config


def test_null_takes_the_adapter_away() -> None:
    assert cf.validate({**MINIMAL, "lora": None}).lora is None
    assert cf.validate(MINIMAL).lora is not None


# -- overrides ---------------------------------------------------------------------------------------------------


def test_overrides_reach_every_corner(tmp_path: Path) -> None:
    file = written(tmp_path, reward=["scene", {"name": "jpeg_compressibility"}])
    config = cf.load_config(
        file,
        [
            "algorithm.lr=1e-3",
            "model.dtype=bf16",
            "reward.0.weight=2",
            "reward.1.quality=50",
            "prompts.held_out=1",
            "train={epochs: 3}",
            "train.seed=5",
            "sampler.window=[0, 1]",
            "evaluate.samples=8",
            "lora.rank=4",
            "mixed_precision=no",
        ],
    )
    assert config.algorithm["lr"] == 1e-3 and config.model.dtype == "bf16"
    assert config.reward == [{"name": "scene", "weight": 2.0}, {"name": "jpeg_compressibility", "quality": 50}]
    assert (config.train.epochs, config.train.seed) == (3, 5)
    assert config.sampler.window == [0, 1] and config.prompts.held_out == 1
    assert config.evaluate is not None and config.evaluate.samples == 8
    assert config.lora is not None and config.lora.rank == 4 and config.mixed_precision == "no"
    assert cf.load_config(file, ["reward=scene", "reward.correct=all"]).reward == {"name": "scene", "correct": "all"}
    assert cf.load_config(file, ["lora=null"]).lora is None


def test_bad_overrides_are_reported_with_the_rest(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        bad = ["train.epochs=x", "trian.epochs=3", "nothing", "=3", "prompts.0=b", "reward.x=3", "a=[1"]
        cf.load_config(written(tmp_path), bad)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for text in ("train.epochs: got 'x'", "trian: unknown key, did you mean 'train'", "got 'nothing', expected key="):
        assert any(text in line for line in lines)


# -- names and paths ---------------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "a", tmp_path / "b"
    for made in (folder, elsewhere):
        made.mkdir()
    (folder / "mine.txt").write_text("one\ntwo\n")
    (elsewhere / "mine.txt").write_text("three\n")
    plugin = "import difftune as dt\n\n@dt.reward('of_this_test')\ndef f(i, p):\n    return i.mean((1, 2, 3))\n"
    (folder / "rewards.py").write_text(plugin)
    file = written(folder, prompts="mine.txt", plugins=["rewards.py"], reward="of_this_test")
    monkeypatch.chdir(elsewhere)
    config = cf.load_config(file)
    assert config.prompts.source == str(folder / "mine.txt") and config.plugins == [str(folder / "rewards.py")]
    assert config.out == "runs/my"
    assert [p.text for p in cf.load_held_out(config.prompts)] == ["one", "two"]
    # On the command line, paths are relative to where it is typed.
    assert [p.text for p in cf.load_held_out(cf.load_config(file, ["prompts=mine.txt"]).prompts)] == ["three"]
    public = json.dumps(cf.published(config))
    assert str(tmp_path) not in public and "mine.txt" in public


def test_a_prompt_that_looks_like_a_path_stays_what_it_is() -> None:
    config = cf.validate({**MINIMAL, "prompts": ["/a/b", "c"]})
    assert cf.published(config)["prompts"]["source"] == ["/a/b", "c"]


def test_a_broken_plugin_is_one_line_with_its_line_number(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("a = 1\nb = a / 0\n")
    (tmp_path / "worse.py").write_text("def f(:\n")
    lines = refused({**MINIMAL, "plugins": [str(tmp_path / name) for name in ("bad.py", "worse.py", "none.py")]})
    assert "bad.py failed at line 2: ZeroDivisionError" in lines[0]
    assert "worse.py failed at line 1: SyntaxError" in lines[1]
    assert "does not exist" in lines[2]


def test_changed_keys_name_what_alters_results() -> None:
    old = cf.resolve(cf.validate(MINIMAL))
    new = cf.resolve(
        cf.validate(
            {
                **MINIMAL,
                "algorithm": {"name": "ddpo", "lr": 1},
                "lora": {"rank": 2},
                "reward": {"name": "jpeg_compressibility", "quality": 3},
                "train": {"epochs": 99, "seed": 4, "micro_batch": 1},
                "threads": 2,
                "out": "x",
                "evaluate": {},
            }
        )
    )
    reward = ["reward", "reward.name", "reward.quality"]
    assert cf.changed_keys(old, new) == ["algorithm.lr", "lora.rank", *reward, "train.seed"]
    assert cf.changed_keys(old, old) == []


def test_a_setting_that_an_old_file_does_not_know_is_its_default() -> None:
    new = cf.resolve(cf.validate(MINIMAL))
    old = cf.parse_yaml(cf.to_yaml(new), "x")
    del old["model"]["vae_tiling"], old["algorithm"]["adam_eps"], old["sampler"]["initial_noise"], old["monitor"]
    assert cf.changed_keys(old, new) == []
    tiled = {**new, "model": {**new["model"], "vae_tiling": True}}
    assert cf.changed_keys(old, tiled) == ["model.vae_tiling"]
    # Nor does a preset tell afterwards what it did not set then.
    assert cf.changed_keys({**old, "preset": "8GB"}, tiled) == ["model.vae_tiling"]
    # A file that is no configuration any more is compared as it is.
    assert "gone" in cf.changed_keys({**new, "gone": 1}, new)


# -- objects -----------------------------------------------------------------------------------------------------


def small(model: Path, **changes: Any) -> cf.RunConfig:
    sampler = {"steps": 3, "guidance_scale": 2.0, "batch_size": 4}
    return cf.validate({**MINIMAL, "model": str(model), "device": "cpu", "sampler": sampler, **changes})


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")


def test_build_is_seeded_and_fills_in_what_was_left_open(model: Path) -> None:
    torch.manual_seed(123)
    first = cf.build(small(model))
    torch.rand(7)
    second = cf.build(small(model))
    other = cf.build(small(model, train={"seed": 1}))
    a, b, c = (run.policy.named_parameters() for run in (first, second, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)
    assert (first.sampler.dynamics, first.sampler.eta, first.sampler.steps) == ("ddim", 1.0, 3)
    assert first.held_out == first.prompts
    assert first.reward.name == "jpeg_compressibility"


@pytest.mark.parametrize(("dynamics", "eta"), [("auto", 0.7), ("dance_sde", 0.3), ("cps", 0.9)])
def test_a_flow_models_noise_level_goes_by_its_dynamics(
    dynamics: str, eta: float, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difftune.config.objects.load_pipeline", lambda *args, **kwargs: tiny.sd3_pipeline())
    assert cf.build(small(model, sampler={"steps": 3, "dynamics": dynamics})).sampler.eta == eta
    if dynamics == "auto":
        memoryless = small(model, sampler={"steps": 3}, algorithm="adjoint_matching", reward="jpeg_proxy")
        assert cf.build(memoryless).sampler.eta == 2**0.5


def test_the_trainer_of_a_run_gets_its_parts(model: Path, tmp_path: Path) -> None:
    run = cf.build(small(model, prompts={"source": ["a", "b", "c"], "held_out": 1}, train={"epochs": 2}))
    trainer = run.trainer(out=tmp_path / "run")
    assert trainer.config.epochs == 2 and trainer.base_model == "tiny"
    assert [p.text for p in trainer.sample_prompts] == [p.text for p in run.held_out] and len(run.prompts) == 2
    assert str(model) not in json.dumps(trainer.description)


def test_a_safety_checker_does_not_blacken_what_is_scored(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd_pipeline()
    pipe.safety_checker = torch.nn.Identity()
    monkeypatch.setattr("difftune.config.objects.load_pipeline", lambda *args, **kwargs: pipe)
    assert cf.load_model(ModelConfig(id="x/y")).safety_checker is None


def test_missing_reward_weights_are_the_users_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be loaded"):
        cf.load_reward({"name": "clip_score", "model": str(tmp_path / "nowhere")})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="device: got cuda"):
        cf.pick_device("cuda")
    assert cf.pick_device("auto") in ("cpu", "mps")


# -- the schema --------------------------------------------------------------------------------------------------


def test_the_schema_accepts_the_recipes_and_refuses_what_they_are_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = cf.json_schema()
    json.dumps(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for name in cf.recipes():
        validator.validate(cf.parse_yaml(cf.recipe_text(name), name))
    validator.validate(cf.resolve(cf.validate(MINIMAL)))
    plugged = {"name": "of_a_plugin", "whatever": 1}
    validator.validate({**MINIMAL, "reward": [plugged, "scene"], "algorithm": plugged})
    wrong: list[dict[str, Any]] = [
        {"trian": {}},
        {"train": {"epoch": 3}},
        {"algorithm": {"name": "ddpo", "clip_rnage": 1}},
        {"reward": {"name": "scene", "corect": "all"}},
        {"reward": []},
        {"sampler": {"steps": 0}},
        {"lora": {"rank": "x"}},
    ]
    for changes in wrong:
        assert not validator.is_valid({**MINIMAL, **changes}), changes


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = cf.json_schema()
    objects = {"RunConfig": schema, **schema["$defs"]}
    bare = [
        f"{title}.{key}"
        for title, one in objects.items()
        if not title.startswith("reward_")
        for key, field in one.get("properties", {}).items()
        if "description" not in field and "const" not in field and key != "name"
    ]
    assert bare == []
