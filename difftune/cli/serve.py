"""``difftune serve``: a reward behind HTTP."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from difftune.cli.messages import say
from difftune.cli.options import Device, Plugins
from difftune.cli.score import build_scorer


def serve(
    reward: Annotated[str, typer.Argument(help="A reward's name (difftune list rewards).")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the reward, KEY=VALUE.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; this machine only by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 for a free one.")] = 8000,
    key_env: Annotated[
        str | None, typer.Option(help="The environment variable with the key; without it a key is made and printed.")
    ] = None,
    plugin: Plugins = None,
    device: Device = "auto",
) -> None:
    """Serve a reward over HTTP, for runs that name it as {name: remote, url: ..., key_env: ...}."""
    import secrets

    from difftune.config import pick_device
    from difftune.registry import load_plugin
    from difftune.serve import ScoreServer
    from difftune.types import UserError

    for file in plugin or []:
        load_plugin(Path(file))
    key = secrets.token_urlsafe(24) if key_env is None else os.environ.get(key_env, "")
    if not key:
        raise UserError(f"--key-env: the environment variable {key_env} is not set")
    scorer = build_scorer(reward, settings or [])
    server = ScoreServer(scorer, key, host=host, port=port, device=pick_device(device), log=say)
    name = key_env or "DIFFTUNE_KEY"
    say(f"serving {scorer.name} on {server.device}; name it in a run's configuration as")
    say(f"  reward: {{name: remote, url: {server.url!r}, key_env: {name}}}")
    if key_env is None:
        say(f"and start the run with {name}={key}")
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
