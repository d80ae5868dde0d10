"""A scorer on another machine, process or GPU, spoken to in JSON over HTTP.

The request is ``{"id", "prompts": [...], "metadata": [...], "images": [PNG in base64, ...]}``, the reply
``{"id", "scores": [...]}`` with ``"parts": {name: [...]}`` if the scorer has some. The id says which request a reply
answers; a reply with another id, another length, or a number that is not finite is discarded and asked for again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._remote import Asking, BadReply, Questions, Remote, Sample, finite, png, text_of
from difftune.types import RewardOutput, UserError


@reward("remote")
class RemoteReward(Asking):
    """The scores that a server gives, in batches, in parallel, retried within a deadline and remembered.

    Args:
        url: where the requests go, e.g. ``http://127.0.0.1:8000/score``.
        batch_size: samples per request.
        concurrency: requests at a time.
        timeout: seconds that one attempt may take.
        deadline: seconds that a call may take with all its attempts; then the run stops, and can be resumed.
        cache: remember scores by content (picture, prompt and metadata).
        key_env: name of the environment variable that holds the server's key; it is sent to this host only.
    """

    range = "the server's"
    weights = "the server's"
    licence = "the server's"
    memory = "the server's"

    def __init__(
        self,
        url: str,
        batch_size: int = 8,
        concurrency: int = 4,
        timeout: float = 30.0,
        deadline: float = 300.0,
        cache: bool = True,
        key_env: str = "",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"reward {self.name!r}: batch_size is {batch_size}, expected at least 1")
        self.server = Remote(self.name, url, timeout, deadline, concurrency, key_env)
        self.questions = Questions(self.server, request_of, read_reply, batch_size, cache)

    def samples(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Sample]:
        """Return the pictures with their prompts and metadata."""
        try:
            json.dumps([dict(extra) for extra in metadata])
        except TypeError as error:
            raise UserError(f"reward {self.name!r}: metadata cannot be sent as JSON ({error})") from None
        return [Sample((png(i),), prompt, extra) for i, prompt, extra in zip(images, prompts, metadata, strict=True)]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the server's scores and parts."""
        rows = self.questions.answers(self.samples(images, prompts, metadata))
        names = sorted({name for row in rows for name in row} - {""})
        if any(set(row) != {"", *names} for row in rows):
            raise UserError(f"reward {self.name!r}: {self.server.url} gives some samples other parts than the rest")
        values = {name: torch.tensor([row[name] for row in rows], device=images.device) for name in ["", *names]}
        return RewardOutput(values.pop(""), values)


def request_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the request that asks about samples, with an id of its own."""
    return {
        "id": uuid.uuid4().hex,
        "prompts": [sample.prompt for sample in samples],
        "metadata": [dict(sample.metadata) for sample in samples],
        "images": [text_of(sample.files[0]) for sample in samples],
    }


def read_reply(payload: Mapping[str, Any], reply: Any) -> list[dict[str, float]]:
    """Return each sample's parts, the total under the empty name.

    Raises:
        BadReply: the reply is another request's, too short, too long, or holds something else than numbers.
    """
    if not isinstance(reply, Mapping) or reply.get("id") != payload["id"]:
        raise BadReply("the reply has not the request's id")
    parts = reply.get("parts") or {}
    if not isinstance(parts, Mapping) or "" in parts:
        raise BadReply("parts is no mapping of names to scores")
    count = len(payload["prompts"])
    for name, values in {"": reply.get("scores"), **parts}.items():
        if not isinstance(values, list) or len(values) != count:
            got = len(values) if isinstance(values, list) else type(values).__name__
            raise BadReply(f"{name or 'scores'} has {got} numbers for {count} samples")
    columns = {"": reply["scores"], **parts}
    return [
        {name: finite(values[index], name or "a score") for name, values in columns.items()} for index in range(count)
    ]
