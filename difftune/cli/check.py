"""``difftune check``: one real cycle."""

from __future__ import annotations

from difftune.cli.messages import say
from difftune.cli.options import Config, Overrides


def check(config: Config, overrides: Overrides = None) -> None:
    """Validate a configuration, load it and run one real cycle: seconds, memory, and what the run will take."""
    from difftune.config import load_config
    from difftune.doctor import preflight

    loaded = load_config(config, overrides or [])
    say(f"configuration is valid; loading {loaded.model.id}")
    for line in preflight(loaded).lines():
        say(line)
