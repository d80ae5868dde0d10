"""A reward behind HTTP, for runs on another process, GPU or machine: what the reward ``remote`` asks.

One ``POST`` to ``/score`` is ``{"id", "prompts": [...], "metadata": [...], "images": [PNG in base64, ...]}``, with the
key as ``Authorization: Bearer KEY``; a film is a list of PNGs in place of one. The reply is
``{"id", "scores": [...], "parts": {name: [...]}}``, and ``"uncertainty": [...]`` where the reward knows it; what cannot
be scored gets ``{"error": "one line"}`` with a status that the client does not try again. Nothing that travels is code.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difftune.reward import Reward
from difftune.types import NonFiniteError, RewardOutput, UserError

_BODY = 256_000_000
"""Bytes of a request; a longer one is refused unread."""

_PIXELS = 64_000_000
"""Pixels of a picture; a larger one is refused before it is decoded."""

_PATIENCE = 60.0
"""Seconds that a client may let a connection rest."""


class Refused(Exception):
    """A request that is not scored: the HTTP status, and one line for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request:
    """What a client asks: ``B`` samples.

    Attributes:
        id: the client's name for the request, given back with the reply.
        prompts, metadata: the samples' prompts and what belongs to them.
        pictures: each ``(3, H, W)`` in [0, 1], a film ``(F, 3, H, W)``.
    """

    id: str
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    pictures: Sequence[Tensor]


class ScoreServer(ThreadingHTTPServer):
    """A server that scores with one reward, one request at a time.

    Args:
        reward: the scorer.
        key: what clients must send; not empty.
        host: where to listen; this machine only by default. What travels, the key too, is not encrypted.
        port: the port; 0 for a free one.
        device: where the pictures are scored.
        log: gets one line per request.

    Raises:
        UserError: no key, a port that is taken, or a reward whose scores depend on more than the sample itself.

    Attributes:
        url: where the requests go.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        reward: Reward,
        key: str,
        host: str = "127.0.0.1",
        port: int = 0,
        device: torch.device | str = "cpu",
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if not key or not key.isascii() or not key.isprintable():
            raise UserError("serve: the key is empty or has other characters than printable ASCII, expected a password")
        why = "depend on the other samples of the prompt" if reward.groupwise else ""
        if reward.state_dict():
            why = "depend on the samples before, and a run that is resumed could not get that state back"
        if why:
            raise UserError(
                f"serve: the scores of {reward.name!r} {why}; serve the rewards it is made of, and combine them in "
                "the run's configuration"
            )
        self.reward, self.device, self.log = reward.to(device), device, log
        self._key, self._turn = key, threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"serve: cannot listen at {host}:{port} ({error}); choose another --port") from None
        self.url = f"http://{host}:{self.server_address[1]}/score"

    def admits(self, header: str) -> bool:
        """Say whether an ``Authorization`` header has the key, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(header.encode("utf-8", "replace"), f"Bearer {self._key}".encode())

    def answer(self, body: bytes) -> dict[str, Any]:
        """Score a request's samples and return the reply.

        Raises:
            Refused: the request is malformed, or the reward cannot score it.
        """
        request = read_request(body)
        try:
            with self._turn, torch.no_grad():
                out = self._scores(request)
        except (UserError, NonFiniteError) as error:
            raise Refused(422, str(error).splitlines()[0]) from None
        parts = {name: values.tolist() for name, values in out.parts.items()}
        reply = {"id": request.id, "scores": out.total.tolist(), "parts": parts}
        return reply if out.uncertainty is None else {**reply, "uncertainty": out.uncertainty.tolist()}

    def _scores(self, request: Request) -> RewardOutput:
        """Score pictures of one size, or films of one size and length, in one batch, others one by one."""
        if len({picture.shape for picture in request.pictures}) == 1:
            return self.reward(torch.stack(list(request.pictures)).to(self.device), request.prompts, request.metadata)
        outputs = [
            self.reward(picture[None].to(self.device), [prompt], [extra])
            for picture, prompt, extra in zip(request.pictures, request.prompts, request.metadata, strict=True)
        ]
        names = outputs[0].parts
        parts = {name: torch.cat([out.parts[name] for out in outputs]) for name in names}
        known = [out.uncertainty for out in outputs if out.uncertainty is not None]
        uncertainty = torch.cat(known) if len(known) == len(outputs) else None
        return RewardOutput(torch.cat([out.total for out in outputs]), parts, uncertainty)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line that a client went away; others are served."""
        self.log(f"{client_address[0]}: connection lost")


def read_request(body: bytes) -> Request:
    """Read a request's JSON.

    Raises:
        Refused: it is no JSON, something is missing or of another kind, or a picture is no PNG file.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is no JSON") from None
    if not isinstance(asked, dict) or not isinstance(asked.get("id"), str):
        raise Refused(400, "the request has no id, expected an object with id, prompts, metadata and images")
    prompts = _list_of(asked, "prompts", str, "strings")
    images = _list_of(asked, "images", str | list, "strings, or lists of them")
    metadata = _list_of(asked, "metadata", dict, "objects") if "metadata" in asked else [{}] * len(prompts)
    if not prompts or not len(prompts) == len(images) == len(metadata):
        raise Refused(
            400,
            f"the request has {len(prompts)} prompts, {len(images)} images and {len(metadata)} metadata, "
            "expected as many of each and at least one",
        )
    return Request(asked["id"], prompts, metadata, [_picture_or_film(i, sent) for i, sent in enumerate(images)])


def _list_of(asked: Mapping[str, Any], name: str, kind: Any, word: str) -> list[Any]:
    values = asked.get(name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise Refused(400, f"{name} is no list of {word}")
    return values


def _picture_or_film(index: int, sent: str | list[Any]) -> Tensor:
    if isinstance(sent, str):
        return _picture(index, sent)
    if not sent or not all(isinstance(text, str) for text in sent):
        raise Refused(400, f"image {index} is no list of frames, expected PNG files in base64 and at least one")
    frames = [_picture(index, text) for text in sent]
    if len({frame.shape for frame in frames}) > 1:
        raise Refused(400, f"image {index} is a film whose frames are not of one size")
    return torch.stack(frames)


def _picture(index: int, text: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as picture:
            if picture.width * picture.height > _PIXELS:
                raise Refused(413, f"image {index} has {picture.width} x {picture.height} pixels, more than {_PIXELS}")
            pixels = np.array(picture.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Refused(400, f"image {index} is no PNG file in base64") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class _Handler(BaseHTTPRequestHandler):
    """Checks who asks and how much, and passes on what was asked."""

    server: ScoreServer
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the lines to :attr:`ScoreServer.log`: those of the base class name paths and times only."""

    def do_GET(self) -> None:
        """Refuse: scores are posted for."""
        self._reply(405, {"error": "POST samples to /score"})

    def do_POST(self) -> None:
        """Score a request."""
        try:
            status, reply = 200, self.server.answer(self._body())
        except Refused as error:
            status, reply = error.status, {"error": str(error)}
        except Exception as error:  # the reward's own fault: the client may try again, the others go on
            traceback.print_exc()
            status, reply = 500, {"error": f"the reward failed with {type(error).__name__}"}
        self._reply(status, reply)

    def _body(self) -> bytes:
        """Return the request's body if the client may ask.

        Raises:
            Refused: another path, no key or a wrong one, no length or too long a body.
        """
        if self.path.split("?")[0] != "/score":
            raise Refused(404, "there is nothing here, POST to /score")
        if not self.server.admits(self.headers.get("Authorization", "")):
            raise Refused(401, "the key is missing or wrong; name the variable that holds it under key_env")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(411, "the request has no Content-Length")
        if int(length) > _BODY:
            raise Refused(413, f"the request has {length} bytes, more than {_BODY}; ask for fewer samples at a time")
        return self.rfile.read(int(length))

    def _reply(self, status: int, reply: Mapping[str, Any]) -> None:
        data = json.dumps(reply).encode()
        # What a refused client still sends is not read, so the connection cannot be used again.
        self.close_connection = status != 200
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        scored = f"{len(reply['scores'])} samples" if status == 200 else reply["error"]
        self.server.log(f"{self.client_address[0]} {status} {scored}")
