"""A scorer on loopback that errs, hangs, lies and stutters on request, for the tests of the remote rewards."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

FAULTS = ("error", "hang", "short", "long", "nan", "garbage", "swapped", "closed", "drip", "text")


def decoded(text: str | list[str]) -> np.ndarray:
    """Return a picture of a request as ``(H, W, 3)`` bytes, a film (a list of them) as ``(F, H, W, 3)``."""
    if not isinstance(text, str):
        return np.stack([decoded(frame) for frame in text])
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def brightness(body: dict[str, Any]) -> dict[str, Any]:
    """Answer the protocol of ``remote``: the mean of the pixels, and of the red ones as a part."""
    pixels = [decoded(image) / 255 for image in body["images"]]
    parts = {"red": [float(p[..., 0].mean()) for p in pixels]}
    return {"id": body["id"], "scores": [float(p.mean()) for p in pixels], "parts": parts}


class FaultServer(ThreadingHTTPServer):
    """A server whose share ``rate`` of replies is one of ``faults``.

    Attributes:
        url: where it listens.
        counts: how often each fault, and ``fine``, happened.
        headers: those of the last request.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[dict[str, Any]], Any], rate: float, faults: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.rate, self.faults = answer, rate, faults
        self.counts: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.chance, self.lock, self.over = random.Random(0), threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that gave up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.headers = dict(self.headers.items())
            fault = server.chance.choice(server.faults) if server.chance.random() < server.rate else "fine"
            server.counts[fault] += 1
        answer = server.answer(body)
        if fault == "hang":
            server.over.wait(60)
            return
        elif fault == "closed":
            self.close_connection = True
            return
        elif fault == "short":
            answer["scores"] = answer["scores"][:-1]
        elif fault == "long":
            answer["scores"] = [*answer["scores"], 0.5]
        elif fault == "nan":
            answer["scores"][0] = float("nan")
        elif fault == "text":
            answer["scores"][0] = "0.5"
        elif fault == "swapped":
            answer["id"] = "another request's"
        data = b"{not json" if fault == "garbage" else json.dumps(answer).encode()
        self.send_response(500 if fault == "error" else 403 if fault == "forbidden" else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "drip":
            for byte in data:
                if server.over.is_set():
                    break
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(data)


@contextmanager
def serving(
    answer: Callable[[dict[str, Any]], Any] = brightness, rate: float = 0.0, faults: tuple[str, ...] = FAULTS
) -> Iterator[FaultServer]:
    """Serve on loopback until the block ends."""
    server = FaultServer(answer, rate, faults)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
