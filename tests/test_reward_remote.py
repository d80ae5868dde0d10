"""Remote scorers: the protocol, faults of every kind within bounded time, nothing misassigned, keys kept."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from fault_server import FAULTS, brightness, serving
from torch import Tensor

from difftune.reward import build_reward
from difftune.rewards._remote import BadReply, RemoteError
from difftune.rewards.unified_reward import point_scores, winner
from difftune.rewards.vlm_server import last_rating, yes_probability
from difftune.types import UserError

pytest.importorskip("httpx", reason="the remote rewards need the extra remote")
pytest.importorskip("tenacity", reason="the remote rewards need the extra remote")


def pictures(count: int, seed: int = 0) -> Tensor:
    """Return pictures whose brightness tells them apart, in values that 8 bits can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), generator=generator) / 255


def expected(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def test_scores_and_parts_arrive_in_order() -> None:
    images = pictures(10)
    with serving() as server:
        score = build_reward("remote", url=server.url, batch_size=3)
        out = score(images, [f"prompt {index}" for index in range(10)])
        torch.testing.assert_close(out.total, expected(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(out.parts["red"], images[:, 0].mean((1, 2)), atol=1e-6, rtol=0)
        assert server.counts["fine"] == 4
        # What is known is not asked about again, nor twice within a batch.
        score(images, [f"prompt {index}" for index in range(10)])
        assert server.counts["fine"] == 4
        score(images[:1].expand(9, -1, -1, -1), ["same"] * 9)
        assert server.counts["fine"] == 5
        # Another prompt or other metadata is another sample.
        score(images[:1], ["same"], [{"a": 1}])
        assert server.counts["fine"] == 6
        build_reward("remote", url=server.url, cache=False)(images, [""] * 10)
        assert server.counts["fine"] == 8


def test_an_uncertainty_is_taken_and_a_wrong_one_is_asked_for_again() -> None:
    def unsure(body: dict[str, Any]) -> dict[str, Any]:
        answer = brightness(body)
        replies.append(next(wrong, [0.1 * score for score in answer["scores"]]))
        return {**answer, "uncertainty": replies[-1]}

    replies: list[Any] = []
    wrong = iter([[0.1], [float("nan")] * 4, [-0.1] * 4, "0.1", [None] * 4])
    with serving(unsure) as server:
        images = pictures(4)
        out = build_reward("remote", url=server.url, deadline=30)(images, ["a"] * 4)
        assert out.uncertainty is not None and len(replies) == 6
        torch.testing.assert_close(out.uncertainty, 0.1 * expected(images), atol=1e-6, rtol=0)
    with serving(lambda body: {**brightness(body), "uncertainty": None}) as server:
        assert build_reward("remote", url=server.url)(images, ["a"] * 4).uncertainty is None


def test_films_travel_as_lists_of_frames() -> None:
    films = pictures(12).unflatten(0, (3, 4))
    asked: list[Any] = []

    def noting(body: dict[str, Any]) -> dict[str, Any]:
        asked.extend(body["images"])
        return brightness(body)

    with serving(noting) as server:
        score = build_reward("remote", url=server.url)
        out = score(films, ["a"] * 3)
        torch.testing.assert_close(out.total, films.mean((1, 2, 3, 4)), atol=1e-6, rtol=0)
        assert [len(film) for film in asked] == [4] * 3
        # A film of one frame is another sample than the picture, whose score may not be its own.
        score(films[:, :1], ["a"] * 3)
        score(films[:, 0], ["a"] * 3)
        assert [type(one) for one in asked[3:]] == [list] * 3 + [str] * 3
        score = build_reward("remote", url=server.url, films="frames")
        torch.testing.assert_close(score(films, ["a"] * 3).total, out.total, atol=1e-6, rtol=0)
        assert all(isinstance(one, str) for one in asked[9:]) and len(asked) == 9 + 12


def hammer(calls: int, samples: int) -> tuple[int, float]:
    """Score with 30 % of all replies at fault; return requests and seconds."""
    started = time.monotonic()
    with serving(rate=0.3) as server:
        patience = {"concurrency": 16, "timeout": 1.0, "deadline": 120}
        score = build_reward("remote", url=server.url, batch_size=4, cache=False, **patience)
        for call in range(calls):
            images = pictures(samples, seed=call)
            out = score(images, [f"{call}/{index}" for index in range(samples)])
            torch.testing.assert_close(out.total, expected(images), atol=1e-6, rtol=0)
            torch.testing.assert_close(out.parts["red"], images[:, 0].mean((1, 2)), atol=1e-6, rtol=0)
        assert set(FAULTS) <= set(server.counts), "every fault happened"
        return sum(server.counts.values()), time.monotonic() - started


def test_a_third_of_faults_is_survived() -> None:
    requests, _ = hammer(1, 600)
    assert requests > 150


@pytest.mark.slow
def test_thousands_of_calls_at_a_third_of_faults() -> None:
    requests, seconds = hammer(20, 600)
    assert requests > 3000 and seconds < 600


@pytest.mark.parametrize("fault", FAULTS)
def test_a_scorer_that_never_answers_ends_at_the_deadline(fault: str) -> None:
    with serving(rate=1.0, faults=(fault,)) as server:
        score = build_reward("remote", url=server.url, timeout=0.1, deadline=0.4)
        started = time.monotonic()
        with pytest.raises(RemoteError, match="no usable scores from http://127.0.0.1:.* within 0.4 s .*resume") as e:
            score(pictures(2), ["a", "b"])
        assert time.monotonic() - started < 10 and "\n" not in str(e.value)


def test_nobody_listens() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(RemoteError, match="last: ConnectError"):
        build_reward("remote", url=url, deadline=3)(pictures(1), ["a"])


def test_a_refusal_is_not_asked_again() -> None:
    with serving(rate=1.0, faults=("forbidden",)) as server:
        with pytest.raises(UserError, match="refuses with status 403"):
            build_reward("remote", url=server.url, deadline=30)(pictures(1), ["a"])
        assert server.counts["forbidden"] == 1


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    with serving() as server:
        score = build_reward("remote", url=server.url, key_env="MY_KEY", deadline=30)
        score(pictures(1), ["a"])
        assert server.headers["Authorization"] == "Bearer very-secret"
        assert "very-secret" not in score.describe() + repr(vars(score)) + repr(score.state_dict())
    with pytest.raises(UserError, match="the environment variable NO_KEY is not set"):
        build_reward("remote", url="http://127.0.0.1:1", key_env="NO_KEY")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:80"}, "url is '127.0.0.1:80', expected e.g. http"),
        ({"url": "file:///etc/passwd"}, "expected e.g. http"),
        ({"url": "http://ann:pw@host/"}, "the url holds a password"),
        ({"url": "http://host/", "timeout": 0}, "must be positive"),
        ({"url": "http://host/", "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_reward("remote", **settings)


def test_metadata_that_is_no_json_is_refused() -> None:
    with pytest.raises(UserError, match="metadata cannot be sent as JSON"):
        build_reward("remote", url="http://127.0.0.1:1")(pictures(1), ["a"], [{"x": torch.zeros(1)}])


# A vision-language model behind a server


def answering(body: dict[str, Any]) -> dict[str, Any]:
    """Answer yes with the probability of the picture's brightness, as a chat server does."""
    picture, words = body["messages"][0]["content"]
    mean = brightness({"id": "", "images": [picture["image_url"]["url"].split(",")[1]]})["scores"][0]
    assert words["text"].count("{prompt}") == (1 if "{braces}" in words["text"] else 0)
    if "logprobs" not in body:
        return {"choices": [{"message": {"content": f"It has 3 stars. Score: {1 + 4 * mean:.3f}"}}]}
    top = [("Yes", 0.8 * mean), (" yes", 0.1 * mean), ("No", 0.9 * (1 - mean)), ("Maybe", 0.1)]
    entries = [{"token": token, "logprob": math.log(max(p, 1e-9))} for token, p in top]
    return {"choices": [{"logprobs": {"content": [{"top_logprobs": entries}]}}]}


def test_yes_and_ratings_of_a_chat_server() -> None:
    images, prompts = pictures(6), [f"prompt {index} {{braces}} {{prompt}}" for index in range(6)]
    with serving(answering, rate=0.2, faults=("error", "closed", "garbage")) as server:
        settings = {"url": server.url + "/v1/", "model": "m", "timeout": 5.0, "deadline": 60.0}
        yes = build_reward("vlm_server", **settings)
        torch.testing.assert_close(yes(images, prompts).total, expected(images), atol=1e-5, rtol=0)
        count = sum(server.counts.values())
        yes(images, prompts)
        assert sum(server.counts.values()) == count
        rating = build_reward("vlm_server", **settings, mode="rating")
        torch.testing.assert_close(rating(images, prompts).total, expected(images), atol=2e-3, rtol=0)
    with pytest.raises(UserError, match="mode is 'ask' from 1.0 to 5.0"):
        build_reward("vlm_server", url="http://127.0.0.1:1", model="m", mode="ask")


@pytest.mark.parametrize("name", ["vlm_server", "unified_reward"])
def test_an_answer_that_cannot_be_read_is_asked_for_three_times(name: str) -> None:
    """At temperature 0 it would be the same until the deadline; what does not arrive is not counted."""

    def evading(body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": {"content": "I would rather not say."}}]}

    modes = {"vlm_server": {"mode": "rating"}, "unified_reward": {"mode": "point"}}
    with serving(evading) as server:
        score = build_reward(name, url=server.url, model="m", deadline=600.0, **modes[name])
        started = time.monotonic()
        message = "gave no answer that can be read, in 3 attempts .*I would rather not say.*change the question"
        with pytest.raises(RemoteError, match=message) as caught:
            score(pictures(1), ["a"])
        assert time.monotonic() - started < 30 and "\n" not in str(caught.value)
        assert server.counts["fine"] == 3
    replies = iter([evading, evading, answering if name == "vlm_server" else judging])
    with serving(lambda body: next(replies)(body)) as server:
        score = build_reward(name, url=server.url, model="m", deadline=600.0, **modes[name])
        torch.testing.assert_close(score(pictures(1), ["a"]).total, expected(pictures(1)), atol=2e-3, rtol=0)
    with serving(evading, rate=1.0, faults=("error", "garbage")) as server:
        score = build_reward(name, url=server.url, model="m", deadline=1.0, **modes[name])
        with pytest.raises(RemoteError, match="no usable scores from .* within 1 s"):
            score(pictures(1), ["a"])
        assert sum(server.counts.values()) > 3


def test_answers_are_read_and_missing_ones_are_not_made_up() -> None:
    def entries(**values: float) -> list[dict[str, Any]]:
        return [{"token": token, "logprob": math.log(value)} for token, value in values.items()]

    assert yes_probability(entries(Yes=0.3, no=0.1, No=0.1, other=0.5)) == pytest.approx(0.6)
    assert yes_probability(entries(NO=0.5)) == 0
    with pytest.raises(BadReply, match="neither yes nor no"):
        yes_probability(entries(maybe=0.9))
    assert last_rating("Score: 2 ... final **Score:** 3.5", 1, 5) == 3.5
    assert last_rating(" 4. ", 1, 5) == 4
    for text in ("no idea", "Score: 7", "three 3 of 5", ""):
        with pytest.raises(BadReply, match="no rating from 1 to 5"):
            last_rating(text, 1, 5)


# UnifiedReward


def judging(body: dict[str, Any]) -> dict[str, Any]:
    """Write a judgement by the brightness of one picture or two."""
    pictures = [entry["image_url"]["url"].split(",")[1] for entry in body["messages"][0]["content"][:-1]]
    means = brightness({"id": "", "images": pictures})["scores"]
    if len(means) == 2:
        verdict = f"Image {1 if means[0] > means[1] else 2} is better."
        return {"choices": [{"message": {"content": f"Image 1 is better lit? No matter. {verdict}"}}]}
    rating = 1 + 4 * means[0]
    aspects = "".join(f"{name} Score (1-5): {rating:.3f}\n" for name in ("Alignment", "Coherence", "Style"))
    return {"choices": [{"message": {"content": f"{aspects}Final Score: {rating:.3f}"}}]}


def test_unified_reward_is_read_in_all_its_forms() -> None:
    images = pictures(5)
    prompts = ["a", "a", "b", "a", "c"]
    with serving(judging) as server:
        settings = {"url": server.url + "/v1", "model": "m", "deadline": 20.0}
        for mode in ("point", "aspects"):
            out = build_reward("unified_reward", **settings, mode=mode)(images, prompts)
            torch.testing.assert_close(out.total, expected(images), atol=2e-3, rtol=0)
            assert set(out.parts) == ({"alignment", "coherence", "style"} if mode == "aspects" else set())
        pairs = build_reward("unified_reward", **settings, mode="pair")
        assert pairs.groupwise
        ranks = expected(images)[[0, 1, 3]].argsort().argsort() / 2
        won = pairs(images, prompts).total
        assert won[[0, 1, 3]].tolist() == ranks.tolist() and won[[2, 4]].tolist() == [0.5, 0.5]
        # One text under two conditions is two prompts.
        told = [{"conditions": prompt} for prompt in prompts]
        assert torch.equal(pairs(images, ["a"] * len(prompts), told).total, won)
    with pytest.raises(UserError, match="mode is 'both', expected point, aspects, pair"):
        build_reward("unified_reward", url="http://127.0.0.1:1", model="m", mode="both")


def test_unified_answers_that_cannot_be_read_are_refused() -> None:
    assert point_scores("Final Score: 2\n... Final Score: **4.5**") == {"score": 0.875}
    assert winner("Both images are equally good.") == 0.5
    for text in ("Final Score: 7", "Final Score: 45", "Score 3", ""):
        with pytest.raises(BadReply, match="no Final Score from 1 to 5"):
            point_scores(text)
    with pytest.raises(BadReply, match="no verdict"):
        winner("neither")
