"""What the remote scorers share: requests that end within a deadline, in parallel, with retries and a memory.

Everything that travels is JSON; pictures are PNG files in base64, so that a scorer elsewhere sees the same 8 bits that
a file would have. A reply counts only if it is whole: the right request's, the right length, finite numbers. What fails
is asked again until it succeeds or the deadline has passed; then the call raises, and no score is made up.

Requests can be *begun* before their scores are wanted, so that the server works while the next samples are drawn. What
has been begun changes when a score is there, never what it is: an answer that failed is asked for again by the call.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import threading
import time
import urllib.parse
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image
from torch import Tensor

from difftune.reward import Reward
from difftune.rewards._preprocess import to_uint8
from difftune.types import UserError

T = TypeVar("T")

_REPLY_LIMIT = 16_000_000
"""Bytes of a reply; a longer one is not a list of scores."""

_MEMORY = 20_000
"""Scores that are remembered."""

READINGS = 3
"""Times that an answer of a language model is asked for which arrives whole and cannot be read: at temperature 0 the
next one is nearly always the same."""

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
        readings: attempts after which a reply that arrives whole and cannot be read is given up before the deadline;
            0 for no such limit.
    """

    name: str
    url: str
    timeout: float = 30.0
    deadline: float = 300.0
    concurrency: int = 4
    key_env: str = ""
    readings: int = 0

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

    def post_all(self, payloads: Sequence[Any], read: Callable[[int, Any], T], end: float | None = None) -> list[T]:
        """Post every payload and return what ``read(index, reply)`` makes of the replies, in order.

        ``read`` raises :class:`BadReply` for a reply that is to be asked for again. ``end`` is when to give up, on the
        monotonic clock; a deadline from now by default.

        Raises:
            RemoteError: a request did not succeed within the deadline, or its reply cannot be read.
            UserError: the server refuses the request as such (status 4xx).
        """
        if not payloads:
            return []
        channel = Channel(self)
        try:
            jobs = [
                channel.post(payload, lambda reply, i=index: read(i, reply), end)  # type: ignore[misc]
                for index, payload in enumerate(payloads)
            ]
            return [job.result() for job in jobs]
        finally:
            # An interrupt, or the first request that fails for good, must not wait for the others.
            channel.close()


class Channel:
    """The requests to one scorer that are under way at a time.

    Its threads are daemons, unlike those of an executor: the end of the process does not wait for a scorer that hangs.

    Args:
        remote: where they go.
    """

    def __init__(self, remote: Remote) -> None:
        import httpx

        self.remote = remote
        headers = {"Authorization": f"Bearer {os.environ[remote.key_env]}"} if remote.key_env else {}
        host = urllib.parse.urlsplit(remote.url).hostname
        # A proxy is of no use on this machine, and redirects would carry the key to another host.
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=host not in ("127.0.0.1", "::1", "localhost"),
            limits=httpx.Limits(max_connections=remote.concurrency),
        )
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0
        self._over = threading.Event()

    def post(self, payload: Any, read: Callable[[Any], T], end: float | None = None) -> Future[T]:
        """Post a payload as soon as there is room, until ``read(reply)`` returns or it is ``end``."""
        end = time.monotonic() + self.remote.deadline if end is None else end
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, lambda: self._until_answered(payload, read, end)))
            if self._threads < self.remote.concurrency:
                threading.Thread(target=self._work, name=f"reward-{self.remote.name}", daemon=True).start()
                self._threads += 1
        return future

    def close(self) -> None:
        """Give up what is under way, without waiting for it."""
        self._over.set()
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[0].cancel()
        self._client.close()

    def _work(self) -> None:
        """Do what waits, until nothing does."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, job = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:  # whoever asks for the result gets it
                future.set_exception(error)

    def _until_answered(self, payload: Any, read: Callable[[Any], T], end: float) -> T:
        import httpx
        import tenacity

        last, unread = "it was not reached in time", 0

        def attempt() -> T:
            nonlocal last, unread
            if time.monotonic() >= end or self._over.is_set():
                raise BadReply(last)  # what went wrong before says more than that time is up
            try:
                reply = self._post(payload, end)
                try:
                    return read(reply)
                except BadReply:
                    unread += 1
                    raise
            except (httpx.HTTPError, httpx.StreamError, BadReply, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                last = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise BadReply(last) from None

        def given_up() -> bool:
            return 0 < self.remote.readings <= unread

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(BadReply),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=5),
            stop=lambda state: self._over.is_set() or given_up() or time.monotonic() + state.upcoming_sleep >= end,
            sleep=tenacity.sleep_using_event(self._over),
            reraise=False,
        )
        try:
            return retrying(attempt)
        except tenacity.RetryError:
            remote = self.remote
            if given_up():
                raise RemoteError(
                    f"reward {remote.name!r}: {remote.url} gave no answer that can be read, in {unread} attempts "
                    f"(last: {last}); the run stops before the update, change the question and resume"
                ) from None
            raise RemoteError(
                f"reward {remote.name!r}: no usable scores from {remote.url} within {remote.deadline:g} s (last: "
                f"{last}); the run stops before the update, start the scorer and resume"
            ) from None

    def _post(self, payload: Any, end: float) -> Any:
        remote = self.remote
        left = max(0.01, min(remote.timeout, end - time.monotonic()))
        started, body = time.monotonic(), bytearray()
        with self._client.stream("POST", remote.url, json=payload, timeout=left) as reply:
            if reply.status_code in _FINAL:
                text = reply.read()[:200].decode("utf-8", "replace").replace("\n", " ")
                raise UserError(f"reward {remote.name!r}: {remote.url} refuses with status {reply.status_code}: {text}")
            if reply.status_code != 200:
                raise BadReply(f"status {reply.status_code}")
            # The client's own limit holds for each piece; a server that drips would never end.
            for piece in reply.iter_bytes():
                body += piece
                if len(body) > _REPLY_LIMIT or time.monotonic() - started > left:
                    raise BadReply("the reply is too long or too slow")
        return json.loads(body)


class Sample(NamedTuple):
    """What is asked about.

    Attributes:
        files: the pictures as PNG files.
        prompt: the prompt.
        metadata: what else is sent.
    """

    files: tuple[bytes, ...]
    prompt: str
    metadata: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """What the files are, where that is not plain: a film of one frame is another sample than the picture."""
        return ""

    def key(self) -> str:
        """Return what identifies the sample by its content.

        Raises:
            TypeError: the metadata cannot be written as JSON.
        """
        words = json.dumps([self.prompt, dict(self.metadata), self.kind], sort_keys=True, ensure_ascii=True)
        digests = b"".join(hashlib.sha256(file).digest() for file in self.files)
        return hashlib.sha256(digests + words.encode()).hexdigest()


class Film(Sample):
    """A sample whose files are the frames of one film."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """Tells it from a picture."""
        return "film"


class Questions(Generic[T]):
    """Samples to be asked about, each content once: what is known, what is under way, and what is still to be asked.

    Args:
        server: where the questions go.
        ask: some samples to the request that asks about them.
        read: a request and its reply to the answers, one for each sample; raises :class:`BadReply`.
        batch_size: samples per request.
        remember: keep answers for later calls.
    """

    def __init__(
        self,
        server: Remote,
        ask: Callable[[Sequence[Sample]], Any],
        read: Callable[[Any, Any], list[T]],
        batch_size: int = 1,
        remember: bool = True,
    ) -> None:
        self.server, self.ask, self.read = server, ask, read
        self.batch_size, self.remember = batch_size, remember
        self._known: OrderedDict[str, T] = OrderedDict()
        self._channel: Channel | None = None
        self._begun: dict[str, tuple[Future[list[T]], int]] = {}
        self._held: dict[str, Sample] = {}

    def begin(self, samples: Sequence[Sample]) -> None:
        """Ask about samples in the background; what comes of it is seen by :meth:`answers`.

        What does not fill a request is held back until more samples do, or until answers are wanted.
        """
        keyed = [(sample.key(), sample) for sample in samples]
        self._held.update((key, s) for key, s in keyed if key not in self._known and key not in self._begun)
        self._send(len(self._held) // self.batch_size * self.batch_size)

    def _send(self, count: int) -> None:
        """Ask about the first ``count`` samples that are held back."""
        sent = {key: self._held.pop(key) for key in list(self._held)[:count]}
        for keys, payload in self._requests(sent):
            self._channel = self._channel or Channel(self.server)
            future = self._channel.post(payload, lambda reply, asked=payload: self.read(asked, reply))  # type: ignore[misc]
            self._begun.update({key: (future, place) for place, key in enumerate(keys)})

    def drop(self) -> None:
        """Give up what was begun and has not been answered."""
        self._begun.clear()
        self._held.clear()
        if self._channel is not None:
            self._channel.close()
        self._channel = None

    def answers(self, samples: Sequence[Sample]) -> list[T]:
        """Return the samples' answers, in order.

        Raises:
            RemoteError: there was none within the deadline, or none that can be read.
            UserError: the server refuses.
        """
        end = time.monotonic() + self.server.deadline
        self._send(len(self._held))
        keys = [sample.key() for sample in samples]
        found = {key: self._known[key] for key in keys if key in self._known} if self.remember else {}
        for key in keys:
            future, place = self._begun.pop(key, (None, 0))
            if future is not None and key not in found:
                # What failed in the background is asked for again below, and fails there with its reason.
                with contextlib.suppress(Exception):
                    found[key] = future.result(max(0.0, end - time.monotonic()))[place]
        if not self._begun:
            self.drop()
        requests = self._requests({key: s for key, s in zip(keys, samples, strict=True) if key not in found})
        payloads = [payload for _, payload in requests]
        replies = self.server.post_all(payloads, lambda index, reply: self.read(payloads[index], reply), end)
        for (asked, _), answers in zip(requests, replies, strict=True):
            found.update(zip(asked, answers, strict=True))
        if self.remember:
            self._known.update(found)
            while len(self._known) > _MEMORY:
                self._known.popitem(last=False)
        return [found[key] for key in keys]

    def _requests(self, wanted: Mapping[str, Sample]) -> list[tuple[list[str], Any]]:
        """Return the keys of each request and its payload."""
        keys, size = list(wanted), self.batch_size
        batches = [keys[start : start + size] for start in range(0, len(keys), size)]
        return [(batch, self.ask([wanted[key] for key in batch])) for batch in batches]


class Asking(Reward):
    """A reward whose samples are asked about elsewhere, and can be begun while others are drawn.

    Attributes:
        questions: what asks, set by ``__init__``.
    """

    questions: Questions[Any]

    @abstractmethod
    def samples(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Return what is asked about pictures ``(B, 3, H, W)``, or films ``(B, F, 3, H, W)`` if it takes them whole."""

    def begin(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Send the requests that are full and return."""
        for part in images.unbind(1) if images.ndim == 5 and not self.video else (images,):
            self.questions.begin(self.samples(part, prompts, metadata))

    def drop(self) -> None:
        """Give up the requests that are under way."""
        self.questions.drop()


def png(picture: Tensor) -> bytes:
    """Return ``(3, H, W)`` in [0, 1] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy(), "RGB").save(file, format="PNG", compress_level=1)
    return file.getvalue()


def text_of(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode("ascii")


def finite(value: Any, what: str) -> float:
    """Return a reply's number, or raise :class:`BadReply` where it is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadReply(f"{what} is {str(value)[:40]!r}, expected a number")
    return float(value)
