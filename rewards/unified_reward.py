"""UnifiedReward: a vision-language model that writes its judgement, on a server, read back from its words.

Wang et al. 2025, "Unified Reward Model for Multimodal Understanding and Generation" (arXiv 2503.05236). The models are
served (by vLLM or SGLang) and answer in fixed forms:

- ``point``: ``Final Score: 3.5``, from 1 to 5 (version 1);
- ``aspects``: ``Alignment Score (1-5): 4``, ``Coherence Score`` and ``Style Score`` (version 2), whose mean counts;
- ``pair``: ``Image 1 is better.``, ``Image 2 is better.`` or ``Both images are equally good.``, asked of every two
  samples of a prompt; the score is the share of comparisons won.

Pictures are shown at 512 x 512 pixels, as in code that trains with it. That code divides the final score by 5; here 1
to 5 becomes 0 to 1. An answer that cannot be read is asked for again, twice, and then the run stops, where that code
scores 0. The models were trained on instructions of their own: give theirs as ``question``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from difftune.advantage import groups_of
from difftune.prompts import told_apart
from difftune.reward import reward
from difftune.rewards._preprocess import resize
from difftune.rewards._rating import last_number
from difftune.rewards._remote import READINGS, Asking, BadReply, Questions, Remote, Sample, png, text_of
from difftune.types import RewardOutput, UserError

ASPECTS = ("Alignment", "Coherence", "Style")
"""What version 2 rates."""

QUESTIONS = {
    "point": 'Judge this image, made for the caption "{prompt}". Reason briefly, then give a score from 1 to 5 after '
    "'Final Score:'.",
    "aspects": 'Judge this image, made for the caption "{prompt}". Reason briefly, then give three lines: '
    "'Alignment Score (1-5): X', 'Coherence Score (1-5): Y', 'Style Score (1-5): Z'.",
    "pair": 'Both images were made for the caption "{prompt}". Reason briefly, then end with exactly one of: '
    "'Image 1 is better.', 'Image 2 is better.', 'Both images are equally good.'.",
}
"""Instructions where none is set; ``{prompt}`` becomes the sample's prompt."""


@reward("unified_reward")
class UnifiedReward(Asking):
    """What a UnifiedReward model on an OpenAI-compatible server writes: a score, three, or who wins; in [0, 1].

    Args:
        url: the server's base, e.g. ``http://127.0.0.1:8000/v1``.
        model: the model's name there.
        mode: ``point``, ``aspects`` or ``pair``.
        question: the instruction; ``{prompt}`` is replaced by the prompt.
        side: of the square that pictures are resized to, in pixels; ``None`` to send them as they are.
        max_tokens: of an answer.
        concurrency: requests at a time.
        timeout: seconds that one attempt may take.
        deadline: seconds that a call may take with all its attempts; then the run stops, and can be resumed. It stops
            earlier where an answer cannot be read three times.
        key_env: name of the environment variable that holds the key.
    """

    range = "[0, 1]"
    weights = "served; hub: CodeGoat24/UnifiedReward-qwen-7b and others"
    licence = "MIT"
    memory = "the server's"

    def __init__(
        self,
        url: str,
        model: str,
        mode: Literal["point", "aspects", "pair"] = "point",
        question: str | None = None,
        side: int | None = 512,
        max_tokens: int = 1024,
        concurrency: int = 8,
        timeout: float = 120.0,
        deadline: float = 1200.0,
        key_env: str = "",
    ) -> None:
        if mode not in QUESTIONS:
            raise UserError(f"reward {self.name!r}: mode is {mode!r}, expected {', '.join(QUESTIONS)}")
        if side is not None and side < 1:
            raise UserError(f"reward {self.name!r}: side is {side}, expected pixels, or null for pictures as they are")
        self.server = Remote(
            self.name, url.rstrip("/") + "/chat/completions", timeout, deadline, concurrency, key_env, READINGS
        )
        self.model_name, self.mode, self.side, self.max_tokens = model, mode, side, max_tokens
        self.question = question or QUESTIONS[mode]
        self.groupwise = mode == "pair"  # type: ignore[misc]
        self.questions = Questions(self.server, self._payload, self._read)

    def samples(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[Sample]:
        """Return the pictures with their prompts, or each two of a prompt in both orders."""
        shown = images if self.side is None else resize(images.detach().float().clamp(0, 1), (self.side, self.side))
        files = [png(image) for image in shown]
        if self.mode == "pair":
            pairs = ordered_pairs(told_apart(prompts, metadata))
            return [Sample((files[i], files[j]), prompts[i], {}) for i, j in pairs]
        return [Sample((file,), prompt, {}) for file, prompt in zip(files, prompts, strict=True)]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return ``(B,)`` scores, with the aspects as parts."""
        rows = self.questions.answers(self.samples(images, prompts, metadata))
        if self.mode == "pair":
            won = share_won([row["first"] for row in rows], told_apart(prompts, metadata))
            return RewardOutput(won.to(images.device))
        columns = {name: torch.tensor([row[name] for row in rows], device=images.device) for name in rows[0]}
        total = torch.stack(list(columns.values())).mean(0)
        return RewardOutput(total, columns if self.mode == "aspects" else {})

    def _payload(self, samples: Sequence[Sample]) -> dict[str, Any]:
        ((files, prompt, _),) = samples
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text_of(file)}"}} for file in files
        ]
        content.append({"type": "text", "text": self.question.replace("{prompt}", prompt)})
        messages = [{"role": "user", "content": content}]
        return {"model": self.model_name, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}

    def _read(self, payload: Any, reply: Any) -> list[dict[str, float]]:
        text = written(reply)
        if self.mode == "pair":
            return [{"first": winner(text)}]
        return [point_scores(text) if self.mode == "point" else aspect_scores(text)]


def ordered_pairs(groups: Sequence[str]) -> list[tuple[int, int]]:
    """Return every two samples of a prompt in both orders: these models favour a position."""
    return [(i, j) for group in groups_of(groups) for i in group for j in group if i != j]


def share_won(verdicts: Sequence[float], groups: Sequence[str]) -> Tensor:
    """Return the share of its comparisons that each sample won ``(B,)``, 1/2 for one that is alone.

    Args:
        verdicts: for each of :func:`ordered_pairs`, 1 if its first won, 0 if its second, 1/2 for neither.
        groups: what tells the B samples' prompts apart.
    """
    wins, counts = torch.zeros(len(groups)), torch.zeros(len(groups))
    for (i, j), first in zip(ordered_pairs(groups), verdicts, strict=True):
        wins[i] += first
        wins[j] += 1 - first
        counts[i] += 1
        counts[j] += 1
    return torch.where(counts > 0, wins / counts.clamp_min(1), torch.full_like(wins, 0.5))


def written(reply: Any) -> str:
    """Return the words of a chat server's reply, or raise :class:`BadReply`."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BadReply("the reply has no text")
    return text


def point_scores(text: str) -> dict[str, float]:
    """Return the last ``Final Score`` as a number in [0, 1]; :class:`BadReply` where there is none."""
    return {"score": _rating(text, "Final Score")}


def aspect_scores(text: str) -> dict[str, float]:
    """Return the three aspects' scores in [0, 1], by their names in lower case."""
    return {name.lower(): _rating(text, f"{name} Score") for name in ASPECTS}


def _rating(text: str, label: str) -> float:
    found = last_number(text, label)
    if found is None or not 1 <= found <= 5:
        raise BadReply(f"no {label} from 1 to 5 in {text[-60:]!r}")
    return (found - 1) / 4


def winner(text: str) -> float:
    """Return 1 if the first image is the better one, 0 if the second, 1/2 if both are equally good."""
    verdicts = {"image 1 is better": 1.0, "image 2 is better": 0.0, "equally good": 0.5}
    places = {text.lower().rfind(words): value for words, value in verdicts.items()}
    last = max(places)
    if last < 0:
        raise BadReply(f"no verdict in {text[-60:]!r}")
    return places[last]
