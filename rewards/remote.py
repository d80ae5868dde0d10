"""A scorer on another machine, process or GPU, spoken to in JSON over HTTP.

The request is ``{"id", "prompts": [...], "metadata": [...], "images": [PNG in base64, ...]}``, where a film is the list
of its frames' PNGs. The reply is ``{"id", "scores": [...]}``, with ``"parts": {name: [...]}`` if the scorer has some,
and ``"uncertainty": [...]`` if it knows that. The id says which request a reply answers; a reply with another id,
another length, or a number that is not finite is discarded and asked for again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._remote import Asking, BadReply, Film, Questions, Remote, Sample, finite, png, text_of
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
        films: ``whole``, as ``difftune serve`` takes them; or ``frames``, for a server that knows pictures only: every
            frame is scored as a picture, and the mean counts.
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
        films: Literal["whole", "frames"] = "whole",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"reward {self.name!r}: batch_size is {batch_size}, expected at least 1")
        if films not in ("whole", "frames"):
            raise UserError(f"reward {self.name!r}: films is {films!r}, expected whole or frames")
        self.video = films == "whole"  # type: ignore[misc]
        self.server = Remote(self.name, url, timeout, deadline, concurrency, key_env)
        self.questions = Questions(self.server, request_of, read_reply, batch_size, cache)

    def samples(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Return the pictures or films with their prompts and metadata."""
        try:
            json.dumps([dict(extra) for extra in metadata])
        except TypeError as error:
            raise UserError(f"reward {self.name!r}: metadata cannot be sent as JSON ({error})") from None
        rows = zip(images, prompts, metadata, strict=True)
        if images.ndim == 5:
            return [Film(tuple(png(frame) for frame in film), prompt, extra) for film, prompt, extra in rows]
        return [Sample((png(image),), prompt, extra) for image, prompt, extra in rows]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the server's scores and parts, and the uncertainty if it gives one."""
        if images.ndim == 5 and images.shape[1] == 0:
            raise UserError(
                f"reward {self.name!r} got images {tuple(images.shape)}: videos without frames, expected at least one"
            )
        rows = self.questions.answers(self.samples(images, prompts, metadata))
        names = sorted({name for row in rows for name in row.parts})
        known = [row.uncertainty for row in rows if row.uncertainty is not None]
        if any(set(row.parts) != set(names) for row in rows) or len(known) not in (0, len(rows)):
            raise UserError(f"reward {self.name!r}: {self.server.url} gives some samples other parts than the rest")

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=images.device)

        parts = {name: column([row.parts[name] for row in rows]) for name in names}
        return RewardOutput(column([row.total for row in rows]), parts, column(known) if known else None)


class Scored(NamedTuple):
    """What a server says of one sample.

    Attributes:
        total: its score.
        parts: what the score is made of, by name.
        uncertainty: one standard deviation of the score, ``None`` where the server gives none.
    """

    total: float
    parts: Mapping[str, float]
    uncertainty: float | None = None


def request_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the request that asks about samples, with an id of its own."""
    return {
        "id": uuid.uuid4().hex,
        "prompts": [sample.prompt for sample in samples],
        "metadata": [dict(sample.metadata) for sample in samples],
        "images": [_written(sample) for sample in samples],
    }


def _written(sample: Sample) -> str | list[str]:
    texts = [text_of(file) for file in sample.files]
    return texts if isinstance(sample, Film) else texts[0]


def read_reply(payload: Mapping[str, Any], reply: Any) -> list[Scored]:
    """Return what is said of each sample.

    Raises:
        BadReply: the reply is another request's, too short, too long, or holds something else than numbers.
    """
    if not isinstance(reply, Mapping) or reply.get("id") != payload["id"]:
        raise BadReply("the reply has not the request's id")
    parts = reply.get("parts") or {}
    if not isinstance(parts, Mapping) or "" in parts:
        raise BadReply("parts is no mapping of names to scores")
    count = len(payload["prompts"])
    totals = _numbers("scores", reply.get("scores"), count)
    columns = {name: _numbers(name, values, count) for name, values in parts.items()}
    unsure: Sequence[float | None] = [None] * count
    if reply.get("uncertainty") is not None:
        unsure = _numbers("uncertainty", reply["uncertainty"], count)
        if any(sigma is not None and sigma < 0 for sigma in unsure):
            raise BadReply("an uncertainty is below 0")
    rows = [{name: values[index] for name, values in columns.items()} for index in range(count)]
    return [Scored(*row) for row in zip(totals, rows, unsure, strict=True)]


def _numbers(name: str, values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise BadReply(f"{name} has {got} numbers for {count} samples")
    return [finite(value, f"one of {name}") for value in values]
