"""VQAScore: the probability that a vision-language model answers "Yes" to whether the picture shows the prompt.

Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv 2404.01291). Two forms are
in use, and both are here: the probability of "Yes" among *all* tokens (the authors' code for decoder models), and among
yes and no alone, ``sigmoid(l_yes - l_no)``, which does not fall when the model would rather say something else. The
probability of an answer of several tokens is their geometric mean, as in the authors' code.

Gradients reach the pixels with the families llava, qwen2_vl and qwen2_5_vl, whose preprocessing is done on tensors.
Other models are asked through their own processor; what is built on one declares that it is not differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difftune.reward import Reward, reward
from difftune.rewards._vlm import Judge
from difftune.types import UserError

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
"""The question of the paper's code; ``{prompt}`` becomes the sample's prompt."""


def yes_score(log_probs: Tensor) -> Tensor:
    """Return P(yes) ``(...)``: from its log-probability ``(..., 1)``, or among yes and no from both ``(..., 2)``."""
    if log_probs.shape[-1] == 1:
        return log_probs[..., 0].exp()
    return torch.sigmoid(log_probs[..., 0] - log_probs[..., 1])


@reward("vqa_score")
class VqaScore(Reward):
    """Probability that a local vision-language model answers yes to whether the picture shows the prompt.

    Args:
        model: embedded name (``difftune/tiny-vlm``, which knows the embedded world only), or folder or hub id of a
            model of transformers' ``AutoModelForImageTextToText``.
        question: what is asked; ``{prompt}`` is replaced by the prompt.
        yes: the answer that counts.
        no: the other one.
        among: ``all`` tokens, or ``two``, the answers alone.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
    """

    differentiable = True
    range = "[0, 1]"
    weights = "embedded (difftune/tiny-vlm), or any image-text-to-text model (gradients: llava, qwen2_vl, qwen2_5_vl)"
    licence = "Apache-2.0 (embedded), else the model's"
    memory = "4.1 GiB as Qwen2-VL-2B in bf16"

    def __init__(
        self,
        model: str,
        question: str = QUESTION,
        yes: str = "Yes",
        no: str = "No",
        among: Literal["all", "two"] = "all",
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if among not in ("all", "two"):
            raise UserError(f"reward {self.name!r}: among is {among!r}, expected 'all' or 'two'")
        self.judge = Judge(self.name, model, revision, dtype)
        self.differentiable = self.judge.differentiable  # type: ignore[misc]
        self.question = question
        # Among all tokens, the other answer has no part in it.
        self.answers = (self.judge.tokens(yes),) if among == "all" else self.judge.two_answers(yes, no)

    def modules(self) -> list[nn.Module]:
        """Return the model."""
        return [self.judge.model]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` probabilities."""
        rows = [
            self.judge.answer_log_probs([image], self.judge.asked(self.question, prompt), self.answers)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return yes_score(torch.stack(rows)).to(images.device)
