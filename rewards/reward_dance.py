"""RewardDance: the probability that a vision-language model finds the picture better than a reference picture.

Wu et al. 2025, "RewardDance" (arXiv 2509.08826): ``r = P("yes" | reference, picture, prompt, instruction)``. Its model
is not published; the form is used with any model that takes two pictures. As ``sigmoid(l_yes - l_no)`` it depends on
the order in which the two pictures are shown, so that by default both orders count::

    r = (p(picture better, picture second) + 1 - p(picture better, picture first)) / 2

with the second question asked of the swapped pair, which makes r exactly 1/2 for a picture that is its own reference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from difftune.reward import Reward, reward
from difftune.rewards._reference import NEED, reference_pictures
from difftune.rewards._vlm import Judge

INSTRUCTION = (
    'Both images were made for the prompt "{prompt}". Is the second image better than the first, in how well it '
    "follows the prompt and how well it is made? Answer yes or no."
)
"""The instruction where none is set; ``{prompt}`` becomes the sample's prompt."""


def order_averaged(forward: Tensor, backward: Tensor) -> Tensor:
    """Return ``(r(a, b) + 1 - r(b, a)) / 2``."""
    return (forward + 1 - backward) / 2


@reward("reward_dance")
class RewardDance(Reward):
    """Probability that a local vision-language model finds the picture better than its reference picture.

    Args:
        model: folder or hub id of a model of transformers' ``AutoModelForImageTextToText``; gradients reach the pixels
            with the families llava, qwen2_vl and qwen2_5_vl only.
        instruction: what is asked about two pictures, the reference first; ``{prompt}`` is replaced by the prompt.
        both_orders: ask with the pictures swapped too, and average.
        yes: the answer that counts.
        no: the other one.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    differentiable = True
    needs = MappingProxyType({"reference": NEED})
    range = "[0, 1]"
    weights = "any image-text-to-text model (gradients: llava, qwen2_vl, qwen2_5_vl)"
    licence = "the model's"
    memory = "4.1 GiB as Qwen2-VL-2B in bf16"

    def __init__(
        self,
        model: str,
        instruction: str = INSTRUCTION,
        both_orders: bool = True,
        yes: str = "yes",
        no: str = "no",
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self.judge = Judge(self.name, model, revision, dtype)
        self.instruction, self.both_orders = instruction, both_orders
        self.differentiable = self.judge.differentiable  # type: ignore[misc]
        self.answers = self.judge.two_answers(yes, no)

    def modules(self) -> list[nn.Module]:
        """Return the model."""
        return [self.judge.model]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` probabilities; with several references, the mean over them."""
        rows = []
        for image, prompt, extra in zip(images, prompts, metadata, strict=True):
            question = self.judge.asked(self.instruction, prompt)
            found = [
                self._compared(reference.to(image.device), image, question)
                for reference in reference_pictures(self.name, prompt, extra)
            ]
            rows.append(torch.stack(found).mean())
        return torch.stack(rows).to(images.device)

    def _compared(self, reference: Tensor, image: Tensor, question: str) -> Tensor:
        forward = self._better(reference, image, question)
        return order_averaged(forward, self._better(image, reference, question)) if self.both_orders else forward

    def _better(self, first: Tensor, second: Tensor, question: str) -> Tensor:
        yes, no = self.judge.answer_log_probs([first, second], question, self.answers)
        return torch.sigmoid(yes - no)
