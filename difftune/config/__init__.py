"""Configuration: YAML and ``a.b.c=value`` overrides become one validated tree, and the tree becomes objects.

This is the only place where names (of models, rewards, algorithms, prompts, recipes) are resolved. Everything that is
wrong is said at once, one line per mistake: the dotted path, what was got, what was expected, the nearest name.

- :func:`load_config` reads a file, a recipe or a run's folder; :func:`resolve` writes it back;
- :func:`build` makes the policy, the sampler, the reward and the rest of a :class:`Run`;
- :func:`json_schema` describes it all to editors; :func:`recipes` lists what ships with the package.

YAML is read safely and by the rules of YAML 1.2: ``1e-4`` is a number, ``no`` and ``on`` are words, a key comes once.
"""

from __future__ import annotations

from difftune.config.editors import first_line, json_schema
from difftune.config.loading import load_config, validate
from difftune.config.named import parse_reward
from difftune.config.objects import (
    Run,
    base_model_name,
    build,
    check_metadata,
    load_model,
    load_reward,
    pick_device,
    prepare_process,
)
from difftune.config.presets import recipe_text, recipes
from difftune.config.resolved import HARMLESS, changed_keys, published, resolve
from difftune.config.schema import RunConfig
from difftune.config.sections import ETA, EvaluateConfig, PromptsConfig, SamplerConfig, load_held_out
from difftune.config.yaml12 import MAX_BYTES, MAX_NODES, parse_yaml, read_yaml, to_yaml

__all__ = [
    "ETA",
    "EvaluateConfig",
    "HARMLESS",
    "MAX_BYTES",
    "MAX_NODES",
    "PromptsConfig",
    "Run",
    "RunConfig",
    "SamplerConfig",
    "base_model_name",
    "build",
    "changed_keys",
    "check_metadata",
    "first_line",
    "json_schema",
    "load_config",
    "load_held_out",
    "load_model",
    "load_reward",
    "parse_reward",
    "parse_yaml",
    "pick_device",
    "prepare_process",
    "published",
    "read_yaml",
    "recipe_text",
    "recipes",
    "resolve",
    "to_yaml",
    "validate",
]
