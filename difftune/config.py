"""Configuration: YAML and ``a.b.c=value`` overrides become one validated tree, and the tree becomes objects.

This is the only place where names (of models, rewards, algorithms, prompts, recipes) are resolved. Everything that is
wrong is said at once, one line per mistake: the dotted path, what was got, what was expected, the nearest name.

- :func:`load_config` reads a file, a recipe or a run's folder; :func:`resolve` writes it back;
- :func:`build` makes the policy, the sampler, the reward and the rest of a :class:`Run`;
- :func:`json_schema` describes it all to editors; :func:`recipes` lists what ships with the package.

YAML is read safely and by the rules of YAML 1.2: ``1e-4`` is a number, ``no`` and ``on`` are words, a key comes once.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from difftune.algorithm import ALGORITHMS, Algorithm, Plan, build_algorithm
from difftune.policy import LoraConfig, ModelConfig, Policy, load_pipeline
from difftune.prompts import SUFFIXES, Prompt, list_prompts, load_prompts, split_prompts
from difftune.puppet import grid_of, resolve_dynamics
from difftune.registry import RegistryError, load_plugin, nearest
from difftune.reward import REWARDS, Reward, build_reward, reward_settings
from difftune.sampler import Sampler
from difftune.trainer import Listener, Trainer, TrainerConfig
from difftune.types import UserError
from difftune.zoo import MODELS

MAX_BYTES = 2**20
"""Largest configuration file that is read: 1 MiB."""

MAX_NODES = 20_000
"""Most values a configuration may hold once its aliases are expanded."""

ETA = {"ddim": 1.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.9, "lcm": 1.0, "ode": 0.0}
"""Noise level of each dynamics where the configuration leaves ``sampler.eta`` open: DDPM, Flow-GRPO's a,
DanceGRPO's eta, Flow-CPS's eta; ``lcm`` and ``ode`` have no choice."""

HARMLESS = (
    "out",
    "device",
    "threads",
    "evaluate",
    "gradient_checkpointing",
    "train.epochs",
    "train.micro_batch",
    "train.save_every",
    "train.keep_checkpoints",
    "train.sample_every",
    "train.sample_count",
    "sampler.batch_size",
    "sampler.store",
)
"""Keys that a resumed run may change: how long, how often, where and how much at once. Results stay what they would
have been, up to rounding."""


# -- the tree --------------------------------------------------------------------------------------------------------


def _under(key: str) -> BeforeValidator:
    """Return a validator that reads a bare value as the mapping ``{key: value}``."""
    return BeforeValidator(lambda value: value if isinstance(value, (Mapping, BaseModel)) else {key: value})


class SamplerConfig(BaseModel):
    """How samples are drawn, in the rollouts and hence in training."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(20, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0, description="Classifier-free guidance, in rollout and training alike; null: the pipeline's default."
    )
    eta: float | None = Field(
        None,
        ge=0,
        description="Noise level of the dynamics; null: ddim 1 (DDPM), flow_sde 0.7, dance_sde 0.3, cps 0.9.",
    )
    dynamics: Literal["auto", "ddim", "flow_sde", "dance_sde", "cps", "lcm", "ode"] = Field(
        "auto", description="The steps' Gaussians; auto goes by the scheduler: ddim, flow_sde or lcm."
    )
    window: list[int] | None = Field(
        None, description="Steps that carry noise and can be trained, counted from 0; null: all. Others are ODE steps."
    )
    batch_size: int = Field(16, ge=1, description="Samples per pipeline call; changes memory, not the noise.")
    height: int | None = Field(None, ge=8, description="Height in pixels; null: the pipeline's default.")
    width: int | None = Field(None, ge=8, description="Width in pixels; null: the pipeline's default.")
    negative_prompt: str | None = Field(None, description="One negative prompt for all samples.")
    store: Literal["device", "host"] = Field(
        "device", description="Where trajectories are kept: on the device, or in pinned host memory."
    )
    call: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the pipeline's call, the same for every sample."
    )


class PromptsConfig(BaseModel):
    """Which prompts are trained on, and which are held out."""

    model_config = ConfigDict(extra="forbid")

    source: Any = Field(
        description="A built-in set, a .txt, .jsonl or .csv file (relative to the configuration), or a list of "
        "prompts or of mappings with prompt and metadata."
    )
    size: int | None = Field(None, ge=1, description="How many prompts; null: all (256 of the endless sets).")
    seed: int = Field(0, ge=0, description="Seed of the sampled sets, of the choice and of the held-out split.")
    held_out: int | float = Field(
        0, ge=0, description="Prompts kept for evaluation: a number, or a share below 1. 0: none."
    )


class EvaluateConfig(BaseModel):
    """What is drawn after training, base beside tuned, by the stock pipeline and the saved file."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(64, ge=2, description="Pictures drawn by each of the base and the tuned model.")
    steps: int | None = Field(None, ge=1, description="Denoising steps; null: those of the sampler.")
    guidance_scale: float | None = Field(None, ge=0, description="Guidance; null: that of the sampler.")
    seed: int = Field(0, ge=0, description="Seed of the pictures' noise, which training never sees.")
    call: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the pipeline's call.")


class RunConfig(BaseModel):
    """A whole run. Unknown keys are errors everywhere."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    model: Annotated[ModelConfig, _under("id")] = Field(
        description="An embedded model, a hub id or a folder; or a mapping with id and how to load it."
    )
    lora: LoraConfig | None = Field(
        default_factory=LoraConfig,
        description="The adapter that is trained; null trains every weight of the denoiser.",
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig, description="How samples are drawn.")
    reward: Any = Field(description="A reward's name, a mapping with name, weight and settings, or a list of those.")
    algorithm: Any = Field(description="An algorithm's name, or a mapping with name and its settings.")
    prompts: Annotated[PromptsConfig, _under("source")] = Field(
        description="A built-in set, a file or a list; or a mapping with source, size, seed and held_out."
    )
    train: TrainerConfig = Field(
        default_factory=lambda: TrainerConfig.model_validate({}), description="How long and how large the run is."
    )
    evaluate: EvaluateConfig | None = Field(
        None, description="Evaluation on held-out prompts after training; null: none."
    )
    out: str | None = Field(None, description="The run's folder; null: runs/ and the configuration's name.")
    plugins: list[str] = Field(
        default_factory=list, description="Python files with rewards or algorithms, relative to the configuration."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the run computes.")
    threads: int | None = Field(None, ge=1, description="CPU threads; null: leave as they are.")
    gradient_checkpointing: bool = Field(False, description="Trade time for memory in the denoiser.")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Dtype of torch.autocast around the pipeline, in rollout and training alike."
    )

    @field_validator("algorithm", mode="before")
    @classmethod
    def _resolve_algorithm(cls, value: Any) -> dict[str, Any]:
        return _checked_algorithm(value)

    @field_validator("reward", mode="before")
    @classmethod
    def _resolve_reward(cls, value: Any) -> Any:
        return _checked_reward(value)

    @field_validator("prompts", mode="after")
    @classmethod
    def _resolve_prompts(cls, value: PromptsConfig) -> PromptsConfig:
        try:
            _load_split(value)
        except UserError as error:
            raise _Problems([_located("prompts", str(error))]) from None
        return value

    @field_validator("model", mode="after")
    @classmethod
    def _resolve_model(cls, value: ModelConfig) -> ModelConfig:
        known = [name for name, model in MODELS.items() if model.kind == "pipeline"]
        if value.id.startswith("difftune/") and value.id not in known:
            raise _Problems(
                [f"model.id: unknown model {value.id!r}{nearest(value.id, known)} (embedded: {', '.join(known)})"]
            )
        if value.id.startswith((".", "/", "~")) and not Path(value.id).expanduser().is_dir():
            raise _Problems([f"model.id: got {value.id!r}, which is not a folder; expected a folder or a hub id"])
        return value


class _Problems(PydanticCustomError):
    """Lines that are complete already, for what a field alone cannot describe."""

    def __new__(cls, lines: Sequence[str]) -> _Problems:
        return super().__new__(cls, "difftune", "{text}", {"text": "; ".join(lines), "lines": list(lines)})


def _located(path: str, message: str) -> str:
    return message if message.startswith((f"{path}:", f"{path}.")) else f"{path}: {message}"


def _checked_algorithm(value: Any) -> dict[str, Any]:
    """Return ``{name, ...all settings}`` of a name or a mapping."""
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise _Problems([f"algorithm: got {_shown(value)}, expected a name (known: {', '.join(ALGORITHMS)})"])
    try:
        found = ALGORITHMS.get(given["name"])
    except RegistryError as error:
        raise _Problems([f"algorithm.name: {error}"]) from None
    try:
        settings = found.Config.model_validate({key: item for key, item in given.items() if key != "name"})
    except ValidationError as error:
        raise _Problems(_lines(error, found.Config, ("algorithm",))) from None
    return {"name": given["name"], **settings.model_dump(mode="json")}


def _checked_reward(value: Any) -> Any:
    """Return the reward as it was given, its settings coerced to their types."""
    problems: list[str] = []
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            raise _Problems(["reward: got an empty list, expected at least one reward"])
        checked: Any = [_checked_term(item, f"reward.{index}", problems) for index, item in enumerate(value)]
    else:
        checked = _checked_term(value, "reward", problems)
    if problems:
        raise _Problems(problems)
    return checked


def _checked_term(value: Any, path: str, problems: list[str]) -> Any:
    given = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        problems.append(f"{path}: got {_shown(value)}, expected a name or a mapping with one")
        return value
    name = given["name"]
    try:
        allowed = reward_settings(name)
    except RegistryError as error:
        problems.append(f"{path}.name: {error}")
        return value
    checked = {"name": name}
    hints = {"weight": float, **_setting_types(name)}
    for key, item in given.items():
        if key == "name":
            continue
        if key != "weight" and key not in allowed:
            known = sorted([*allowed, "name", "weight"])
            problems.append(f"{path}.{key}: unknown setting{nearest(str(key), known)} (expected {', '.join(known)})")
            continue
        try:
            checked[key] = TypeAdapter(hints.get(key, Any)).validate_python(item)
        except ValidationError as error:
            problems.extend(_lines(error, None, (*path.split("."), key)))
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            problems.append(f"{path}.{key}: missing, reward {name!r} needs it")
    return checked if isinstance(value, Mapping) else value


def _setting_types(name: str) -> dict[str, Any]:
    """Return the annotations of a reward's settings, as far as they can be resolved."""
    builder = REWARDS.get(name)
    target = getattr(builder, "__wrapped__", None) or getattr(builder, "__init__", builder)
    with contextlib.suppress(Exception):  # annotations are the plug-in author's and need not resolve
        hints = typing.get_type_hints(target)
        return {key: hints[key] for key in reward_settings(name) if key in hints}
    return {}


# -- from files and the command line ---------------------------------------------------------------------------------


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a configuration.

    Args:
        source: a YAML file, the name of a recipe, or the folder of a run (its ``config.yaml``).
        overrides: ``a.b.c=value`` strings; values are read as YAML, items of lists by their number.

    Raises:
        UserError: with one line per mistake, all of them.
    """
    data, base, name = _read_source(source)
    data, problems = _absolute(data, base), []
    if Path(source).is_dir():
        # A run that was moved or copied is where it is now, not where it was made.
        data["out"] = str(source)
    for override in overrides:
        try:
            _override(data, override)
        except UserError as error:
            problems.append(str(error))
    data.setdefault("out", None)
    if data["out"] is None:
        data["out"] = f"runs/{name}"
    return validate(data, problems)


def validate(data: Mapping[str, Any], problems: Sequence[str] = (), *, trains: bool = True) -> RunConfig:
    """Validate a configuration that is a mapping already; plug-ins that it names are run first.

    Args:
        data: the mapping.
        problems: mistakes that were found before, to be reported with the others.
        trains: whether the settings must also go together for training; evaluation does not ask that.

    Raises:
        UserError: with one line per mistake, all of them.
    """
    problems = [*problems, *_load_plugins(data.get("plugins"))]
    try:
        config = RunConfig.model_validate(dict(data))
    except ValidationError as error:
        problems += _lines(error, RunConfig)
    else:
        problems += _conflicts(config) if trains else []
        if not problems:
            return config
    raise UserError("\n".join(dict.fromkeys(problems)))


def resolve(config: RunConfig) -> dict[str, Any]:
    """Return every value of ``config`` as plain data, defaults included; :func:`validate` gives back its equal."""
    return config.model_dump(mode="json")


def published(config: RunConfig) -> dict[str, Any]:
    """Return :func:`resolve` without anything that names this machine: paths are cut to their last part."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value

    data = {key: value for key, value in resolve(config).items() if key not in ("out", "device", "threads")}
    # Prompts are data: a prompt that looks like a path stays what it is.
    source = data["prompts"]["source"]
    data = cut(data)
    if not isinstance(source, str):
        data["prompts"]["source"] = source
    return data


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys in which two resolved configurations differ such that a resumed run would be another."""
    before, after = dict(_flat(old)), dict(_flat(new))
    differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return sorted(key for key in differing if key.split(".")[0] not in HARMLESS and key not in HARMLESS)


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, data


def _read_source(source: str | Path) -> tuple[dict[str, Any], Path, str]:
    """Return the data, the folder that its paths are relative to, and its name."""
    text, path = str(source), Path(source).expanduser()
    known = recipes()
    if isinstance(source, str) and text in known:
        return parse_yaml(recipe_text(text), f"recipe {text}"), Path.cwd(), text
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            raise UserError(f"config: {text} is a folder without config.yaml; expected a file, a recipe or a run")
        return read_yaml(path / "config.yaml"), path.resolve(), path.name
    if path.is_file():
        return read_yaml(path), path.resolve().parent, path.stem
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"config: {text!r} does not exist; expected a file, a run's folder or a recipe's name")
    raise UserError(f"config: unknown recipe {text!r}{nearest(text, sorted(known))} (known: {', '.join(known)})")


def _absolute(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Return the data with its paths made absolute: they are relative to the file that names them."""
    data = dict(data)
    if isinstance(data.get("plugins"), list):
        data["plugins"] = [_anchored(item, base) if isinstance(item, str) else item for item in data["plugins"]]
    for section, key, is_path in (("prompts", "source", _is_prompt_file), ("model", "id", _is_model_folder)):
        value = data.get(section)
        if isinstance(value, str) and is_path(value, base):
            data[section] = _anchored(value, base)
        elif isinstance(value, Mapping) and isinstance(value.get(key), str) and is_path(value[key], base):
            data[section] = {**value, key: _anchored(value[key], base)}
    return data


def _anchored(path: str, base: Path) -> str:
    return os.path.normpath(base / Path(path).expanduser())


def _is_prompt_file(value: str, base: Path) -> bool:
    return Path(value).suffix.lower() in SUFFIXES


def _is_model_folder(value: str, base: Path) -> bool:
    # "owner/name" may be a folder or a hub id: it is a folder if there is a pipeline in it.
    return value.startswith((".", "~")) or (base / value / "model_index.json").is_file()


_SHORTHAND = {"model": "id", "prompts": "source", "reward": "name", "algorithm": "name"}
"""Sections that may be a bare value, and the key under which it then stands."""


def _override(data: dict[str, Any], override: str) -> None:
    """Put ``a.b.c=value`` into ``data``, in place."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"override: got {override!r}, expected key=value, e.g. train.epochs=10")
    value = _parse(text, f"override {override!r}")
    value = _absolute({path[0]: _nested(path[1:], value)}, Path.cwd())[path[0]]
    if len(path) == 1:
        data[path[0]] = value
        return
    current = data.get(path[0])
    if path[0] in _SHORTHAND and isinstance(current, str | list) and not (path[0] == "reward" and path[1].isdigit()):
        current = {_SHORTHAND[path[0]]: current}
    data[path[0]] = _merged(current, path[1:], value, override)


def _nested(path: Sequence[str], value: Any) -> Any:
    return {path[0]: _nested(path[1:], value)} if path else value


def _merged(current: Any, path: Sequence[str], nested: Any, override: str) -> Any:
    """Return ``current`` with the value at ``path`` of ``nested`` in place."""
    if not path:
        return nested
    if isinstance(current, list):
        if not path[0].isdigit() or int(path[0]) >= len(current):
            raise UserError(f"override {override!r}: {path[0]!r} is no item of a list of {len(current)} (from 0)")
        index = int(path[0])
        item = {"name": current[index]} if isinstance(current[index], str) and len(path) > 1 else current[index]
        return [*current[:index], _merged(item, path[1:], nested[path[0]], override), *current[index + 1 :]]
    if current is not None and not isinstance(current, Mapping):
        raise UserError(f"override {override!r}: {_shown(current)} is there, which has no key {path[0]!r}")
    inner = (current or {}).get(path[0])
    return {**(current or {}), path[0]: _merged(inner, path[1:], nested[path[0]], override)}


def _load_plugins(paths: Any) -> list[str]:
    """Run the plug-in files; return what went wrong."""
    problems = []
    for index, path in enumerate(paths if isinstance(paths, list) else []):
        try:
            load_plugin(path)
        except FileNotFoundError as error:
            problems.append(f"plugins.{index}: {error}")
        except Exception as error:  # the file is the user's: whatever it raises is theirs to know of, in one line
            problems.append(f"plugins.{index}: {path} failed{_where(error, path)}: {type(error).__name__}: {error}")
    return problems


def _where(error: BaseException, path: Any) -> str:
    """Return the plug-in's own line at which it failed."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == Path(str(path)).expanduser().resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" at line {line}" if line else ""


# -- YAML ------------------------------------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", "<<", ["<"]),
]


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, firsts in _SCALARS:
        for first in firsts:
            found.setdefault(first, []).append((_TAG + kind, re.compile(f"^(?:{pattern})$")))
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, no key twice."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what :class:`_Loader` reads back; words that YAML 1.1 takes for something else are quoted as well."""

    yaml_implicit_resolvers = {
        first: [*_resolvers().get(first, []), *yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])]
        for first in {*_resolvers(), *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(data: Any) -> str:
    """Return ``data`` as YAML that :func:`parse_yaml` reads back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        UserError: missing, too large, not UTF-8, not YAML, not a mapping, or a key comes twice.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"config: {str(path)!r} cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"config: {str(path)!r} is larger than {MAX_BYTES // 2**20} MiB; put prompts into a file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"config: {str(path)!r} is not UTF-8 (byte {error.start})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse a configuration; ``name`` is what messages call it.

    Raises:
        UserError: not YAML, not a mapping, too many values, or a key comes twice.
    """
    data = _parse(text, name)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{name}: got {_shown(data)}, expected a mapping of sections such as model, reward and train")
    return data


def _parse(text: str, name: str) -> Any:
    try:
        node = yaml.compose(text, Loader=_Loader)
        _check_size(node, name)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise UserError(f"{name}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not YAML: {error}") from None


def _check_size(root: Any, name: str) -> None:
    """Refuse what is small to write and endless to read: aliases within aliases."""
    stack, seen = [root], 0
    while stack:
        node = stack.pop()
        seen += 1
        if seen > MAX_NODES:
            raise UserError(f"{name}: more than {MAX_NODES} values; put prompts into a file, and mind the aliases")
        if isinstance(node, yaml.MappingNode):
            stack.extend(part for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)


# -- messages --------------------------------------------------------------------------------------------------------


def _shown(value: Any, limit: int = 60) -> str:
    text = repr(dict(value)) if isinstance(value, Mapping) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _lines(error: ValidationError, model: type[BaseModel] | None, prefix: tuple[str, ...] = ()) -> list[str]:
    """Return one line per mistake: path, got, expected, nearest name."""
    lines: dict[str, str] = {}
    for item in error.errors():
        if item["type"] == "difftune":
            lines.update({line: line for line in item["ctx"]["lines"]})
            continue
        # A union reports each of its members under a name of its own, which is no key of the user's.
        loc = tuple(str(part) for part in item["loc"] if not re.search(r"[\[\]-]|^(str|int|float|bool)$", str(part)))
        path = ".".join((*prefix, *loc)) or "config"
        if item["type"] == "extra_forbidden":
            known = _fields(model, loc[:-1])
            lines[path] = f"{path}: unknown key{nearest(loc[-1], known)} (expected {', '.join(known)})"
        elif item["type"] == "missing":
            lines[path] = f"{path}: missing{_purpose(model, loc)}"
        elif path in lines:
            lines[path] += f" or {_expected(item)}"
        else:
            hint = ""
            if item["type"] == "literal_error" and isinstance(item["input"], str):
                hint = nearest(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            lines[path] = f"{path}: got {_shown(item['input'])}, expected {_expected(item)}{hint}"
    return list(lines.values())


def _expected(item: Any) -> str:
    if item["type"] == "string_pattern_mismatch":
        return " or ".join(re.findall(r"[^^$()|]+", item["ctx"]["pattern"]))
    message = re.split(r", unable to|, got| or instance of", item["msg"])[0]
    message = re.sub(r"^(Input|Value|List|String|Dictionary|Tuple) should (be|have) ", "", message)
    message = re.sub(r"^(greater|less) than", r"a value \1 than", message)
    for theirs, ours in (("valid dictionary", "mapping"), ("valid integer", "whole number"), ("a valid ", "a ")):
        message = message.replace(theirs, ours)
    return message[:1].lower() + message[1:]


def _model_at(model: type[BaseModel] | None, loc: Sequence[str]) -> type[BaseModel] | None:
    for part in loc:
        field = model.model_fields.get(part) if model is not None else None
        candidates = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        model = next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)
    return model


def _fields(model: type[BaseModel] | None, loc: Sequence[str]) -> list[str]:
    found = _model_at(model, loc)
    return [] if found is None else list(found.model_fields)


def _purpose(model: type[BaseModel] | None, loc: Sequence[str]) -> str:
    found = _model_at(model, loc[:-1])
    description = found.model_fields[loc[-1]].description if found and loc[-1] in found.model_fields else None
    return f", expected {description[0].lower()}{description[1:].rstrip('.')}" if description else ""


# -- combinations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SamplerSketch:
    """What an algorithm's check asks of a sampler, known before a model is loaded."""

    dynamics: str
    eta: float
    window: tuple[int, ...] | None
    steps: int


@dataclass(frozen=True)
class _RewardSketch:
    """What an algorithm's check asks of a reward, known before its weights are loaded."""

    name: str
    differentiable: bool
    groupwise: bool


def _conflicts(config: RunConfig) -> list[str]:
    """Return why the settings do not go together, as far as it shows without the model."""
    problems = []
    sampler, train = config.sampler, config.train
    bad = [step for step in sampler.window or () if not 0 <= step < sampler.steps]
    if bad:
        problems.append(f"sampler.window: got step {bad[0]}, expected steps from 0 to {sampler.steps - 1}")
    if train.updates_per_epoch > train.samples_per_epoch:
        problems.append(
            f"train.updates_per_epoch: got {train.updates_per_epoch}, expected at most the {train.samples_per_epoch} "
            "samples of an epoch (prompts_per_epoch * samples_per_prompt)"
        )
    if config.lora is None and config.model.dtype != "fp32":
        problems.append(
            f"lora: null trains the denoiser itself, in fp32, and model.dtype is {config.model.dtype}; set model.dtype "
            "to fp32 (with mixed_precision for speed), or train an adapter"
        )
    if config.mixed_precision == "fp16":
        problems.append("mixed_precision: fp16 loses small gradients, and there is no loss scaling; use bf16")
    eta = ETA.get(sampler.dynamics, 1.0) if sampler.eta is None else sampler.eta
    window = None if sampler.window is None else tuple(sampler.window)
    plan = Plan(train.prompts_per_epoch, train.samples_per_prompt, train.updates_per_epoch)
    try:
        sketch: Any = _SamplerSketch(sampler.dynamics, eta, window, sampler.steps)
        build_algorithm(config.algorithm).check(sketch, _sketched(config.reward), plan)
    except UserError as error:
        problems.append(str(error))
    except AttributeError:
        # This algorithm's check wants the real objects: the trainer asks it again.
        pass
    return problems


def _sketched(spec: Any) -> Any:
    terms = [spec] if isinstance(spec, (str, Mapping)) else list(spec)
    names = [term if isinstance(term, str) else term["name"] for term in terms]
    kinds = [_reward_kind(name) for name in names]
    return _RewardSketch(
        name=" + ".join(names),
        differentiable=all(kind.differentiable for kind in kinds),
        groupwise=any(kind.groupwise for kind in kinds),
    )


def _reward_kind(name: str) -> Any:
    """Return something that knows whether the reward is differentiable: its class, or the object a function makes."""
    builder: Any = REWARDS.get(name)
    return builder if inspect.isclass(builder) else builder()


# -- objects ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a configuration is made of, once it is loaded.

    Attributes:
        config: the configuration.
        policy, sampler, algorithm, reward: the objects.
        prompts: prompts to train on.
        held_out: prompts to evaluate on; those trained on where none are held out.
    """

    config: RunConfig
    policy: Policy
    sampler: Sampler
    algorithm: Algorithm
    reward: Reward
    prompts: list[Prompt]
    held_out: list[Prompt]

    def trainer(
        self,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        listener: Listener | None = None,
        train: TrainerConfig | None = None,
    ) -> Trainer:
        """Return the trainer of the run.

        Args:
            out: the folder; the configuration's if ``None``.
            resume: continue from the newest checkpoint in it.
            listener: called with (phase, done, total).
            train: sizes in place of the configuration's.

        Raises:
            UserError: a combination that cannot work, or a folder that already holds a run.
        """
        return Trainer(
            policy=self.policy,
            sampler=self.sampler,
            algorithm=self.algorithm,
            reward=self.reward,
            prompts=self.prompts,
            sample_prompts=self.held_out,
            out=out if out is not None else self.config.out,
            config=train if train is not None else self.config.train,
            resume=resume,
            base_model=base_model_name(self.config.model),
            description=published(self.config),
            listener=listener,
        )


def base_model_name(model: ModelConfig) -> str:
    """Return the model's name as a card may show it: a hub id, or a folder's last part."""
    return Path(model.id).name if os.path.isabs(model.id) else model.id


def build(config: RunConfig) -> Run:
    """Load everything a run needs, and seed the process.

    Raises:
        UserError: something cannot be loaded, or does not fit together.
    """
    prepare_process(config)
    prompts, held_out = _load_split(config.prompts)
    reward = load_reward(config.reward)
    pipe = load_model(config.model)
    # What the adapter begins with must not depend on what was loaded before it.
    torch.manual_seed(config.train.seed)
    policy = Policy(pipe, config.lora, gradient_checkpointing=config.gradient_checkpointing)
    return Run(
        config=config,
        policy=policy,
        sampler=_build_sampler(policy, config),
        algorithm=build_algorithm(config.algorithm),
        reward=reward,
        prompts=prompts,
        held_out=held_out,
    )


def prepare_process(config: RunConfig) -> None:
    """Set threads, device and seeds for the process.

    Raises:
        UserError: the device is not there.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if device == "cpu":
        # Denormal numbers cost up to a hundred times a normal one's time and change nothing that is looked at.
        torch.set_flush_denormal(True)
    if config.device == "cpu":
        # The trainer's accelerate reads its choice of device from here.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate.utils import set_seed

    set_seed(config.train.seed)


def pick_device(device: str = "auto") -> str:
    """Return ``cuda``, ``mps`` or ``cpu``: the one asked for, or with ``auto`` the best there is.

    Raises:
        UserError: it is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if not there.get(device, False):
        raise UserError(f"device: got {device}, which torch {torch.__version__} does not find here; use auto or cpu")
    return device


def load_model(model: ModelConfig) -> Any:
    """Load the pipeline, without its safety checker: that one blackens pictures, and a reward would score the black.

    Raises:
        UserError: it cannot be loaded.
    """
    pipe = load_pipeline(
        str(Path(model.id).expanduser()) if model.id.startswith("~") else model.id,
        dtype=model.dtype,
        revision=model.revision,
        variant=model.variant,
        scheduler=model.scheduler,
    )
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    return pipe


def load_reward(spec: Any) -> Reward:
    """Build a reward, and say in one line when its weights cannot be had.

    Raises:
        UserError: a setting is wrong, or weights are missing.
    """
    try:
        return build_reward(spec)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"reward: {_shown(spec)} could not be loaded ({reason}); check model and network") from error


def load_held_out(prompts: PromptsConfig) -> list[Prompt]:
    """Return the prompts to evaluate on: the held-out ones, or all where none are held out."""
    return _load_split(prompts)[1]


def _load_split(prompts: PromptsConfig) -> tuple[list[Prompt], list[Prompt]]:
    loaded = load_prompts(prompts.source, size=prompts.size, seed=prompts.seed)
    if not prompts.held_out:
        return loaded, loaded
    return split_prompts(loaded, prompts.held_out, prompts.seed)


def _build_sampler(policy: Policy, config: RunConfig) -> Sampler:
    sampler = config.sampler
    dynamics = resolve_dynamics(sampler.dynamics, grid_of(policy.pipe.scheduler))
    return Sampler(
        policy,
        steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        eta=ETA[dynamics] if sampler.eta is None else sampler.eta,
        dynamics=dynamics,
        window=sampler.window,
        batch_size=sampler.batch_size,
        height=sampler.height,
        width=sampler.width,
        negative_prompt=sampler.negative_prompt,
        store=sampler.store,
        call=sampler.call,
        autocast={"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision],
    )


# -- for editors and people ------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, for ``# yaml-language-server: $schema=FILE`` in its first line."""
    schema = RunConfig.model_json_schema()
    properties = schema["properties"]
    for section, (title, extra) in {
        "model": ("ModelConfig", {"type": "string", "examples": list(MODELS)}),
        "prompts": ("PromptsConfig", None),
    }.items():
        source = {"anyOf": [{"enum": list_prompts()}, {"type": "string"}, {"type": "array"}]}
        properties[section] = {
            "description": properties[section].get("description", ""),
            "anyOf": [extra or source, {"$ref": f"#/$defs/{title}"}],
        }
        if section == "prompts":
            schema["$defs"][title]["properties"]["source"].update(source)
    properties["reward"] = {"description": properties["reward"]["description"], **_reward_schema(schema["$defs"])}
    properties["algorithm"] = {
        "description": properties["algorithm"]["description"],
        **_algorithm_schema(schema["$defs"]),
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "difftune run", **schema}


def _algorithm_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    names, choices = list(ALGORITHMS), []
    for name in names:
        own = ALGORITHMS.get(name).Config.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        own["properties"] = {"name": {"const": name}, **own["properties"]}
        own["required"] = ["name", *own.get("required", [])]
        definitions[f"algorithm_{name}"] = own
        choices.append({"$ref": f"#/$defs/algorithm_{name}"})
    return {"anyOf": [{"enum": names}, {"type": "string"}, *choices, _plugged_in(names)]}


def _reward_schema(definitions: dict[str, Any]) -> dict[str, Any]:
    names, choices = list(REWARDS), []
    for name in names:
        settings, hints = reward_settings(name), _setting_types(name)
        properties: dict[str, Any] = {"name": {"const": name}, "weight": {"type": "number", "default": 1.0}}
        for key, parameter in settings.items():
            properties[key] = _type_schema(hints.get(key, Any))
            if parameter.default is not inspect.Parameter.empty:
                properties[key]["default"] = parameter.default
        needed = [key for key, p in settings.items() if p.default is inspect.Parameter.empty]
        definitions[f"reward_{name}"] = {
            "type": "object",
            "description": first_line(REWARDS.get(name)),
            "properties": properties,
            "required": ["name", *needed],
            "additionalProperties": False,
        }
        choices.append({"$ref": f"#/$defs/reward_{name}"})
    definitions["reward_term"] = {"anyOf": [{"enum": names}, {"type": "string"}, *choices, _plugged_in(names)]}
    term = {"$ref": "#/$defs/reward_term"}
    return {"anyOf": [term, {"type": "array", "items": term, "minItems": 1}]}


def _plugged_in(names: Sequence[str]) -> dict[str, Any]:
    """Return the schema of an entry that a plug-in brings: any settings, under a name that is not ours."""
    return {
        "type": "object",
        "description": "Registered by a plug-in.",
        "properties": {"name": {"type": "string", "not": {"enum": list(names)}}},
        "required": ["name"],
    }


def _type_schema(hint: Any) -> dict[str, Any]:
    try:
        schema = TypeAdapter(hint).json_schema()
        json.dumps(schema)
    except Exception:  # an annotation that JSON cannot express constrains nothing
        return {}
    return {} if "$defs" in schema else dict(schema)


def first_line(thing: Any) -> str:
    """Return the first line of an object's docstring."""
    lines = (inspect.getdoc(thing) or "").strip().splitlines()
    return lines[0].replace("``", "") if lines else ""


def recipes() -> dict[str, str]:
    """Return the recipes that ship with the package: name to the description in their first line."""
    folder = importlib.resources.files("difftune.configs")
    found = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name: recipe_text(name).splitlines()[0].lstrip("# ").strip() for name in found}


def recipe_text(name: str) -> str:
    """Return a recipe as it was written, comments included.

    Raises:
        UserError: there is none of that name; the message has the nearest one.
    """
    folder = importlib.resources.files("difftune.configs")
    file = folder / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", name) or not file.is_file():
        known = list(recipes())
        raise UserError(f"unknown recipe {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    return file.read_text(encoding="utf-8")
