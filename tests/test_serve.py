"""A served reward and the reward ``remote``: the same scores as at home, and refusals in one line."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from difftune import cli
from difftune.reward import Reward, build_reward
from difftune.serve import ScoreServer
from difftune.types import UserError

KEY = "open-sesame"
PROMPTS = ["two yellow stars", "a red circle", "", "é\nnewline"]


@contextmanager
def served(scorer: Reward | str, **settings: Any) -> Iterator[ScoreServer]:
    """Serve a reward on loopback until the block ends."""
    server = ScoreServer(build_reward(scorer), KEY, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def pictures(count: int = 4) -> Tensor:
    """Return ``(count, 3, 24, 20)`` in values that a file of 8 bits holds."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 24, 20), generator=generator) / 255


def png(width: int = 4, height: int = 4, form: str = "PNG") -> str:
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, format=form)
    return base64.b64encode(file.getvalue()).decode()


def posted(url: str, body: Any, key: str | None = KEY, **headers: str) -> tuple[int, dict[str, Any]]:
    """Return the status and the reply to a body, which is written as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def asked(**changes: Any) -> dict[str, Any]:
    return {"id": "1", "prompts": ["a"], "metadata": [{}], "images": [png()], **changes}


@pytest.mark.parametrize("spec", ["clip_score", [{"name": "brightness", "weight": 2.0}, "contrast"]])
def test_a_run_gets_the_scores_that_it_would_get_at_home(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    monkeypatch.setenv("SCORER_KEY", KEY)
    local = build_reward(spec)
    lines: list[str] = []
    with served(local, log=lines.append) as server:
        remote = build_reward("remote", url=server.url, key_env="SCORER_KEY", batch_size=3, deadline=20)
        got = remote(pictures(), PROMPTS)
    expected = local(pictures(), PROMPTS)
    torch.testing.assert_close(got.total, expected.total, atol=2e-6, rtol=0)
    assert got.parts.keys() == expected.parts.keys()
    for name, value in expected.parts.items():
        torch.testing.assert_close(got.parts[name], value, atol=2e-6, rtol=0)
    assert sorted(lines) == ["127.0.0.1 200 1 samples", "127.0.0.1 200 3 samples"]


def films(count: int = 3, frames: int = 5) -> Tensor:
    """Return ``(count, frames, 3, 24, 20)`` in values that a file of 8 bits holds."""
    return pictures(count * frames).unflatten(0, (count, frames))


class Motion(Reward):
    """How much a film changes from frame to frame: nothing that a single frame tells."""

    name = "motion"
    video = True

    def score(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        whole = images if images.ndim == 5 else images[:, None]
        return whole.diff(dim=1).abs().sum((1, 2, 3, 4)) / whole[0, 0].numel()


@pytest.mark.parametrize(
    "spec", [{"name": "segmental", "of": "brightness", "segments": 3, "rate": 1.0}, Motion(), "brightness"]
)
def test_films_are_scored_as_at_home(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, with all their frames; a film of one frame and the picture are told apart."""
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    monkeypatch.setenv("SCORER_KEY", KEY)
    local = build_reward(spec)
    with served(local) as server:
        settings: dict[str, Any] = {"url": server.url, "key_env": "SCORER_KEY", "batch_size": 2, "deadline": 20}
        remote, single = build_reward("remote", **settings), build_reward("remote", **settings, films="frames")
        for images in (films(), films(4, 1), films()[:, 0]):
            expected, got = local(images, PROMPTS[: len(images)]), remote(images, PROMPTS[: len(images)])
            torch.testing.assert_close(got.total, expected.total, atol=2e-6, rtol=0)
            assert got.parts.keys() == expected.parts.keys()
        by_frame = single(films(), PROMPTS[:3]).total
        one = torch.stack([local(frame, PROMPTS[:3]).total for frame in films().unbind(1)]).mean(0)
        torch.testing.assert_close(by_frame, one, atol=2e-6, rtol=0)
        remote.begin(films(), PROMPTS[:3], [{}] * 3)
        remote.drop()
        with pytest.raises(UserError, match="videos without frames"):
            remote(films()[:, :0], PROMPTS[:3])
    with pytest.raises(UserError, match="films is 'all', expected whole or frames"):
        build_reward("remote", url="http://127.0.0.1:1", films="all")


def test_films_of_several_lengths_and_broken_ones() -> None:
    with served(Motion()) as server:
        images = [[png(), png()], [png()] * 3, png()]
        status, reply = posted(server.url, asked(prompts=[""] * 3, metadata=[{}] * 3, images=images))
        assert status == 200 and reply["scores"] == [0, 0, 0] and "uncertainty" not in reply
        for film, message in (
            ([], "image 0 is no list of frames"),
            ([png(), 5], "image 0 is no list of frames"),
            ([png(), "!"], "image 0 is no PNG file"),
            ([png(), png(5, 4)], "image 0 is a film whose frames are not of one size"),
        ):
            status, reply = posted(server.url, asked(images=[film]))
            assert status == 400 and message in reply["error"]


@pytest.mark.parametrize("sizes", [(24, 24), (24, 16)])
def test_the_uncertainty_travels(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one batch, and for pictures of two sizes, which are scored one by one."""
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    monkeypatch.setenv("SCORER_KEY", KEY)
    local = build_reward({"name": "mean_variance", "of": ["brightness", "contrast"]})
    with served(local) as server:
        remote = build_reward("remote", url=server.url, key_env="SCORER_KEY", deadline=20)
        got, expected = remote(pictures(), PROMPTS), local(pictures(), PROMPTS)
        assert got.uncertainty is not None and expected.uncertainty is not None
        torch.testing.assert_close(got.uncertainty, expected.uncertainty, atol=2e-6, rtol=0)
        images = [png(sizes[0], 24), png(sizes[1], 24)]
        _, reply = posted(server.url, asked(prompts=["", ""], metadata=[{}, {}], images=images))
        assert len(reply["uncertainty"]) == 2


def test_metadata_arrives_and_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with served("scene") as server:
        status, reply = posted(server.url, asked(metadata=[{"clauses": {"count": 2}}]))
        assert status == 200 and reply["id"] == "1" and len(reply["scores"]) == 1 and "lost/count" in reply["parts"]
        status, reply = posted(server.url, asked(metadata=[{"clauses": {"count": "many"}}]))
        assert status == 422 and "asks for count 'many' in its metadata" in reply["error"]
    pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
    monkeypatch.setenv("SCORER_KEY", KEY)
    with served("pixel_similarity") as server:
        remote = build_reward("remote", url=server.url, key_env="SCORER_KEY", deadline=20)
        with pytest.raises(UserError, match="refuses with status 422: .*needs 'reference'") as caught:
            remote(pictures(1), ["a"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [None, "", "open-sesam", "open-sesame!", "é"])
def test_without_the_key_nothing_is_scored(key: str | None) -> None:
    with served("brightness") as server:
        header = {} if key is None else {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        status, reply = posted(server.url, asked(), None, **header)
        assert (status, list(reply)) == (401, ["error"]) and "key is missing or wrong" in reply["error"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{not json", 400, "no JSON"),
        (b"\x80\x04\x95pickle", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        ([], 400, "has no id"),
        (asked(id=5), 400, "has no id"),
        (asked(prompts="a"), 400, "prompts is no list of strings"),
        (asked(prompts=["a", "b"]), 400, "2 prompts, 1 images and 1 metadata"),
        (asked(prompts=[], images=[], metadata=[]), 400, "at least one"),
        (asked(images=[5]), 400, "images is no list of strings, or lists of them"),
        (asked(metadata=[5]), 400, "metadata is no list of objects"),
        (asked(images=["!"]), 400, "image 0 is no PNG file in base64"),
        (asked(images=[base64.b64encode(b"GIF89a").decode()]), 400, "image 0 is no PNG"),
        (asked(images=[png(form="JPEG")]), 400, "image 0 is no PNG"),
        (asked(images=[png()[:40]]), 400, "image 0 is no PNG"),
    ],
)
def test_bad_requests_get_one_clear_line(body: Any, status: int, message: str) -> None:
    with served("brightness") as server:
        got, reply = posted(server.url, body)
        assert got == status and message in reply["error"] and "\n" not in reply["error"]
        assert posted(server.url, asked())[0] == 200, "the server goes on"


def test_pictures_of_several_sizes_are_scored_one_by_one() -> None:
    white = io.BytesIO()
    Image.new("RGB", (3, 9), "white").save(white, format="PNG")
    images = [png(), base64.b64encode(white.getvalue()).decode()]
    with served("brightness") as server:
        _, reply = posted(server.url, asked(prompts=["", ""], metadata=[{}, {}], images=images))
    assert reply["scores"] == pytest.approx([0, 1])


def test_other_paths_methods_and_lengths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("difftune.serve._BODY", 1000)
    monkeypatch.setattr("difftune.serve._PIXELS", 100)
    with served("brightness") as server:
        assert posted(server.url.replace("/score", "/etc/passwd"), asked())[0] == 404
        assert posted(server.url, b" " * 1001)[0] == 413
        status, reply = posted(server.url, asked(images=[png(11, 10)]))
        assert status == 413 and "11 x 10 pixels" in reply["error"]
        with pytest.raises(urllib.error.HTTPError, match="405"):
            urllib.request.urlopen(server.url, timeout=20)


def test_a_reward_that_fails_does_not_end_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Reward):
        name = "broken"

        def score(self, images: Tensor, prompts: Any, metadata: Any) -> Any:
            if prompts[0] == "nan":
                return [float("nan")]
            raise RuntimeError("secret path")

    with served(Broken()) as server:
        status, reply = posted(server.url, asked())
        assert (status, reply["error"]) == (500, "the reward failed with RuntimeError")
        status, reply = posted(server.url, asked(prompts=["nan"]))
        assert status == 422 and "'broken' gave nan for sample 0" in reply["error"]
    assert "secret path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("diversity", {}, "'diversity' depend on the other samples"),
        ({"name": "calibrated", "of": "brightness"}, {}, "'calibrated' depend on the samples before"),
        ("brightness", {"key": ""}, "the key is empty"),
        ("brightness", {"port": 70000}, "cannot listen at 127.0.0.1:70000"),
    ],
)
def test_what_cannot_be_served_is_refused(spec: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoreServer(build_reward(spec), **{"key": KEY, **settings})


def test_it_listens_on_this_machine_only() -> None:
    with served("brightness") as server:
        assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")


def test_the_command_refuses_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for arguments, message in (
        (["brightness", "--key-env", "NO_SUCH_KEY"], "--key-env: the environment variable NO_SUCH_KEY is not set"),
        (["brightnes"], "unknown reward 'brightnes'"),
        (["calibrated", "--set", "of=brightness"], "'calibrated' depend on the samples before"),
        (["brightness", "--port", "70000"], "choose another --port"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted() -> None:
    command = [sys.executable, "-m", "difftune", "serve", "brightness", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(3))
        url, key = re.search(r"url: '(\S+)'", said), re.search(r"DIFFTUNE_KEY=(\S+)", said)
        assert url is not None and key is not None, said
        assert posted(url[1], asked(), key[1])[1]["scores"] == [0.0]
        assert posted(url[1], asked(), "another")[0] == 401
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
