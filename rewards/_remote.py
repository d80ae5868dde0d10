"""What the remote scorers share: requests that end within a deadline, in parallel, with retries and a memory.

Everything that travels is JSON; pictures are PNG files in base64, so that a scorer elsewhere sees the same 8 bits that
a file would have. A reply counts only if it is whole: the right request's, the right length, finite numbers. What fails
is asked again until it succeeds or the deadline has passed; then the call raises, and no score is made up.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from difftune.rewards._preprocess import to_uint8
from difftune.types import UserError

T = TypeVar("T")

_REPLY_LIMIT = 16_000_000
"""Bytes of a reply; a longer one is not a list of scores."""

_MEMORY = 20_000
"""Scores that are remembered."""

_FINAL = {400, 401, 403, 404, 405, 413, 415, 422}
"""HTTP statuses that asking again does not change."""


class RemoteError(RuntimeError):
    """A remote scorer gave no usable scores within the deadline; nothing was scored, so the run can be resumed."""


class BadReply(Exception):
    """A reply that is not what was asked for; the request is tried again."""


@dataclass(frozen=True)
class Remote:
    """Where a remote scorer is and how long it may take.

    Attributes:
        name: the reward, for messages.
        url: where requests are posted.
        timeout: seconds that one attempt may take.
        deadline: seconds that all attempts for one batch of samples may take together.
        concurrency: requests at a time.
        key_env: name of the environment variable with the key; empty for none.
    """

    name: str
    url: str
    timeout: float = 30.0
    deadline: float = 300.0
    concurrency: int = 4
    key_env: str = ""

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"reward {self.name!r}: url is {self.url!r}, expected e.g. http://127.0.0.1:8000/score")
        if parts.username or parts.password:
            raise UserError(f"reward {self.name!r}: the url holds a password; put the key into an environment variable")
        if self.timeout <= 0 or self.deadline <= 0 or self.concurrency < 1:
            raise UserError(f"reward {self.name!r}: timeout, deadline and concurrency must be positive")
        if self.key_env and not os.environ.get(self.key_env):
            raise UserError(f"reward {self.name!r}: the environment variable {self.key_env} is not set")
        for module in ("httpx", "tenacity"):
            try:
                __import__(module)
            except ImportError:
                raise UserError(
                    f"reward {self.name!r} needs {module}: install the extra, pip install 'difftune[remote]'"
                ) from None

    def post_all(self, payloads: Sequence[Any], read: Callable[[int, Any], T]) -> list[T]:
        """Post every payload and return what ``read(index, reply)`` makes of the replies, in order.

        ``read`` raises :class:`BadReply` for a reply that is to be asked for again.

        Raises:
            RemoteError: a request did not succeed within the deadline.
            UserError: the server refuses the request as such (status 4xx).
        """
        import httpx

        end = time.monotonic() + self.deadline
        headers = {"Authorization": f"Bearer {os.environ[self.key_env]}"} if self.key_env else {}
        host = urllib.parse.urlsplit(self.url).hostname
        # A proxy is of no use on this machine, and redirects would carry the key to another host.
        client = httpx.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=host not in ("127.0.0.1", "::1", "localhost"),
            limits=httpx.Limits(max_connections=self.concurrency),
        )
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix=f"reward-{self.name}")
        over = threading.Event()
        try:
            jobs = [
                pool.submit(self._until_answered, client, payload, end, over, lambda reply, i=index: read(i, reply))
                for index, payload in enumerate(payloads)
            ]
            return [job.result() for job in jobs]
        finally:
            # An interrupt, or the first request that fails for good, must not wait for the others.
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()

    def _until_answered(
        self, client: Any, payload: Any, end: float, over: threading.Event, read: Callable[[Any], T]
    ) -> T:
        import httpx
        import tenacity

        last = "it was not reached in time"

        def attempt() -> T:
            nonlocal last
            if time.monotonic() >= end or over.is_set():
                raise BadReply(last)  # what went wrong before says more than that time is up
            try:
                return read(self._post(client, payload, end))
            except (httpx.HTTPError, httpx.StreamError, BadReply, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                last = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise BadReply(last) from None

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BadReply),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=5),
            stop=lambda state: over.is_set() or time.monotonic() + state.upcoming_sleep >= end,
            sleep=tenacity.sleep_using_event(over),
            reraise=False,
        )
        try:
            return retrying(attempt)
        except tenacity.RetryError:
            raise RemoteError(
                f"reward {self.name!r}: no usable scores from {self.url} within {self.deadline:g} s (last: {last}); "
                "the run stops before the update, start the scorer and resume"
            ) from None

    def _post(self, client: Any, payload: Any, end: float) -> Any:
        left = max(0.01, min(self.timeout, end - time.monotonic()))
        started, body = time.monotonic(), bytearray()
        with client.stream("POST", self.url, json=payload, timeout=left) as reply:
            if reply.status_code in _FINAL:
                text = reply.read()[:200].decode("utf-8", "replace").replace("\n", " ")
                raise UserError(f"reward {self.name!r}: {self.url} refuses with status {reply.status_code}: {text}")
            if reply.status_code != 200:
                raise BadReply(f"status {reply.status_code}")
            # The client's own limit holds for each piece; a server that drips would never end.
            for piece in reply.iter_bytes():
                body += piece
                if len(body) > _REPLY_LIMIT or time.monotonic() - started > left:
                    raise BadReply("the reply is too long or too slow")
        return json.loads(body)


class Memory:
    """Scores by content: the same picture, prompt and metadata are asked about once."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Any] = OrderedDict()

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Return where the keys that are not known stand, each key once."""
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, index)
        return list(first.values())

    def add(self, key: str, value: Any) -> None:
        """Remember a score."""
        self._known[key] = value

    def take(self, keys: Sequence[str]) -> list[Any]:
        """Return the scores of the keys, and forget the oldest beyond the limit."""
        found = [self._known[key] for key in keys]
        while len(self._known) > _MEMORY:
            self._known.popitem(last=False)
        return found


def png(picture: Tensor) -> bytes:
    """Return ``(3, H, W)`` in [0, 1] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy(), "RGB").save(file, format="PNG", compress_level=1)
    return file.getvalue()


def text_of(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def content_key(picture: bytes, prompt: str, metadata: Mapping[str, Any]) -> str:
    """Return what identifies a sample by its content.

    Raises:
        TypeError: metadata cannot be written as JSON.
    """
    words = json.dumps([prompt, dict(metadata)], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(hashlib.sha256(picture).digest() + words.encode()).hexdigest()


def finite(value: Any, what: str) -> float:
    """Return a reply's number, or raise :class:`BadReply` where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadReply(f"{what} is {str(value)[:40]!r}, expected a number")
    return float(value)
