"""A vision-language model behind any server with OpenAI's chat interface (vLLM and its like): yes or no, or a rating.

- ``yes_no`` asks for one token with its log-probabilities: ``P(yes) / (P(yes) + P(no))``, summed over the spellings
  among the most likely tokens.
- ``rating`` lets it write and reads the last number of the form ``score: 3.5``; the score is the rating's place between
  the lowest and the highest.

A reply without an answer is asked for again, twice, and then the run stops: a silent 0 would be learned from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.reward import reward
from difftune.rewards._rating import last_number
from difftune.rewards._remote import READINGS, Asking, BadReply, Questions, Remote, Sample, png, text_of
from difftune.types import UserError

YES_NO = 'Does this image show "{prompt}"? Answer with yes or no.'
"""The question where none is set; ``{prompt}`` becomes the sample's prompt."""

RATING = (
    'Rate from 1 to 5 how well this image shows "{prompt}": 1 for not at all, 5 for completely and without flaws. '
    'Explain briefly, then end with "Score: " and the number.'
)
"""The request for a rating where none is set."""


@reward("vlm_server")
class VlmServer(Asking):
    """What a vision-language model behind an OpenAI-compatible server answers: P(yes), or a rating; in [0, 1].

    Args:
        url: the server's base, e.g. ``http://127.0.0.1:8000/v1``.
        model: the model's name there.
        mode: ``yes_no`` or ``rating``.
        question: what is asked; ``{prompt}`` is replaced by the prompt.
        low: the lowest rating.
        high: the highest rating.
        max_tokens: of a rating's answer.
        concurrency: requests at a time.
        timeout: seconds that one attempt may take.
        deadline: seconds that a call may take with all its attempts; then the run stops, and can be resumed. It stops
            earlier where an answer cannot be read three times.
        key_env: name of the environment variable that holds the key, e.g. ``OPENAI_API_KEY``.
    """

    range = "[0, 1]"
    weights = "the server's"
    licence = "the server's"
    memory = "the server's"

    def __init__(
        self,
        url: str,
        model: str,
        mode: Literal["yes_no", "rating"] = "yes_no",
        question: str | None = None,
        low: float = 1.0,
        high: float = 5.0,
        max_tokens: int = 512,
        concurrency: int = 8,
        timeout: float = 60.0,
        deadline: float = 600.0,
        key_env: str = "",
    ) -> None:
        if mode not in ("yes_no", "rating") or not low < high:
            raise UserError(f"reward {self.name!r}: mode is {mode!r} from {low} to {high}, expected yes_no or rating")
        self.server = Remote(
            self.name, url.rstrip("/") + "/chat/completions", timeout, deadline, concurrency, key_env, READINGS
        )
        self.model_name, self.mode, self.low, self.high = model, mode, low, high
        self.question = question or (YES_NO if mode == "yes_no" else RATING)
        self.max_tokens = max_tokens
        self.questions = Questions(self.server, self._payload, self._read)

    def samples(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Return the pictures with their prompts."""
        return [Sample((png(image),), prompt, {}) for image, prompt in zip(images, prompts, strict=True)]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` probabilities or ratings."""
        return torch.tensor(self.questions.answers(self.samples(images, prompts, metadata)), device=images.device)

    def _payload(self, samples: Sequence[Sample]) -> dict[str, Any]:
        ((files, prompt, _),) = samples
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(files[0])}"}}
        # A prompt is data: replaced, not formatted.
        words = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        body = {
            "model": self.model_name,
            "messages": [{"role": "user", "content": [picture, words]}],
            "temperature": 0,
            "max_tokens": 1 if self.mode == "yes_no" else self.max_tokens,
        }
        return {**body, "logprobs": True, "top_logprobs": 20} if self.mode == "yes_no" else body

    def _read(self, payload: Any, reply: Any) -> list[float]:
        try:
            choice = reply["choices"][0]
            if self.mode == "yes_no":
                return [yes_probability(choice["logprobs"]["content"][0]["top_logprobs"])]
            rating = last_rating(choice["message"]["content"], self.low, self.high)
            return [(rating - self.low) / (self.high - self.low)]
        except (KeyError, IndexError, TypeError) as error:
            raise BadReply(f"the reply has no answer ({type(error).__name__} {error})") from None


def yes_probability(entries: Sequence[Mapping[str, Any]]) -> float:
    """Return ``P(yes) / (P(yes) + P(no))`` from the most likely tokens with their log-probabilities.

    Raises:
        BadReply: neither is among them.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for entry in entries:
        word = str(entry["token"]).strip().strip("▁Ġ.,!'\"").lower()
        if word in mass:
            mass[word] += math.exp(float(entry["logprob"]))
    total = mass["yes"] + mass["no"]
    if not total > 0 or not math.isfinite(total):
        raise BadReply("neither yes nor no is among the most likely tokens")
    return mass["yes"] / total


def last_rating(text: str, low: float, high: float) -> float:
    """Return the last ``score: x`` of an answer, or the number that is all of it; ``score (1-5): x`` will do.

    Raises:
        BadReply: there is none between ``low`` and ``high``, or the last one is a range, as in ``score: 3-4``.
    """
    found = last_number(text, "score")
    if found is None:
        found = last_number(text)
    if found is None or not low <= found <= high:
        raise BadReply(f"no rating from {low:g} to {high:g} in {text[:60]!r}")
    return found
