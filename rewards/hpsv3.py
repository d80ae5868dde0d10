"""HPSv3: what people prefer, by a Qwen2-VL with a head that gives a score and how sure it is.

Ma et al. 2025, "HPSv3" (arXiv 2508.03789). The picture and an instruction with the caption end in the token
``<|Reward|>``; the last hidden state h there goes through a head of three layers in fp32::

    (mu, log sigma) = W3 relu(W2 relu(W1 h))      r = mu, uncertainty = sigma

mu and sigma are trained so that ``mu_a - mu_b`` plus noise of the two sigmas tells which of two pictures people chose.
The published package takes the picture at 256 tokens and drops the caption where no special token is used; here the
caption is always there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from difftune.reward import Reward, reward
from difftune.rewards._vlm import Judge
from difftune.rewards._weights import linear_stack, load_state, weights_file
from difftune.types import RewardOutput, UserError

TOKEN = "<|Reward|>"
"""Where the hidden state is read."""

CLOSING = f"Please provide the overall ratings of this image: {TOKEN}\n\nEND"
"""What follows the instruction."""


@reward("hpsv3")
class HpsV3(Reward):
    """HPS v3: people's preference by a Qwen2-VL with a head; it knows its own uncertainty.

    Args:
        instruction: what the model is told, as published with the weights; ``{text_prompt}`` becomes the prompt.
        model: folder or hub id whose configuration and tokenizer the weights belong to.
        weights: folder, file or hub id of ``HPSv3.safetensors``.
        pixels: pixels that a picture is resized to; the published 256 tokens of 28 x 28 by default.
        revision: branch, tag or commit of the hub id of the weights.
        dtype: precision of the model; the head is fp32.
    """

    differentiable = True
    range = "unbounded, about -5 to 15 with the published weights"
    weights = "hub: MizzenAI/HPSv3, on Qwen/Qwen2-VL-7B-Instruct"
    licence = "MIT (head), Apache-2.0 (Qwen2-VL)"
    memory = "15.5 GiB in bf16"

    def __init__(
        self,
        instruction: str,
        model: str = "Qwen/Qwen2-VL-7B-Instruct",
        weights: str = "MizzenAI/HPSv3",
        pixels: int = 256 * 28 * 28,
        revision: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if "{text_prompt}" not in instruction:
            raise UserError(f"reward {self.name!r}: the instruction has no {{text_prompt}}, where the prompt goes")
        state = load_state(self.name, weights_file(self.name, weights, "HPSv3.safetensors", revision))
        head = {key: value for key, value in state.items() if key.startswith("rm_head.")}
        self.head, _ = linear_stack(self.name, head, r"rm_head\.", "relu")
        rest = {key: value for key, value in state.items() if key not in head}
        self.judge = Judge(self.name, model, None, dtype, rest, [TOKEN])
        self.judge.resize_to(pixels)
        self.instruction = instruction

    def modules(self) -> list[nn.Module]:
        """Return the model and the head."""
        return [self.judge.model, self.head]

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return mu ``(B,)`` and, as uncertainty, sigma ``(B,)``."""
        rows = []
        for image, prompt in zip(images, prompts, strict=True):
            told = self.instruction.replace("{text_prompt}", self.judge.plain(prompt)) + CLOSING
            rows.append(self.head(self.judge.hidden_states([image], told, [TOKEN])[-1]))
        mean, log_sigma = torch.stack(rows).to(images.device).unbind(1)
        return RewardOutput(mean, {}, log_sigma.exp())
