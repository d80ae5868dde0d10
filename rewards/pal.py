"""PAL: pluralistic alignment, the distance of a picture to the ideal point of a user or of a mixture of users.

Chen et al. 2024, "PAL: Pluralistic Alignment Framework" (arXiv 2406.08469). On frozen features x of the picture and p
of the prompt, with a projector f, K groups and a user's weights w on the simplex (softmax of what is learned):

- model A: ideal point ``u = sum_k w_k P_k`` of prototypes P (or f of them), reward ``-|f(x) - u|``;
- model B: ideal point ``u = sum_k w_k g_k(p)`` of maps g_k of the prompt, reward ``min(exp(s), 100) cos(f(x), u)``.

The head is a state dict of the original code: ``item_learner.projector`` is f, ``user_learner.projectors.<k>`` are the
g_k, ``user_learner.P`` the prototypes, ``user_learner.W.<user>`` the weights and ``logit_scale`` is s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from difftune.registry import nearest
from difftune.reward import reward
from difftune.rewards._clip import LAION_H, ClipReward
from difftune.rewards._weights import linear_stack, load_state
from difftune.types import UserError


@reward("pal")
class Pal(ClipReward):
    """How near the picture is to the ideal point of a user, or of the mean over all users.

    Args:
        head: file with the state dict of a PAL model A or B on CLIP's features; which one shows by its tensors.
        model: the CLIP its features come from.
        user: whose weights on the groups; by default the mean of all users' weights.
        prototypes: of a model A: ``Pw`` if the prototypes lie in the projected space, ``f(P)w`` if the projector
            maps them first.
        activation: between the layers of the projectors.
        tokenizer: folder or hub id, where the model brings none.
        revision: branch, tag or commit of the model's hub id.
        dtype: precision of the CLIP model.
    """

    range = "A: at most 0; B: [-100, 100]"
    weights = "user-supplied head; any CLIP"
    licence = "the weights' own"
    memory = "1.6 GiB as ViT-L/14 in fp32"

    def __init__(
        self,
        head: str,
        model: str = LAION_H,
        user: str | None = None,
        prototypes: Literal["Pw", "f(P)w"] = "Pw",
        activation: str = "relu",
        tokenizer: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
    ) -> None:
        state = load_state(self.name, head)
        super().__init__(model, tokenizer, revision, dtype)
        self.head = _PalHead(self.name, state, user, prototypes, activation).eval().requires_grad_(False)
        if self.head.width != self.model.config.projection_dim:
            raise UserError(
                f"reward {self.name!r}: the head takes {self.head.width} features and the model has "
                f"{self.model.config.projection_dim}; name the CLIP it was trained on"
            )

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` rewards."""
        device = self.model.device
        return self.head(self.embed_images(images).to(device), self.embed_prompts(prompts).to(device)).to(images.device)


class _PalHead(nn.Module):
    def __init__(self, name: str, state: Mapping[str, Tensor], user: str | None, prototypes: str, act: str) -> None:
        super().__init__()
        if prototypes not in ("Pw", "f(P)w"):
            raise UserError(f"reward {name!r}: prototypes is {prototypes!r}, expected 'Pw' or 'f(P)w'")
        self.project, _ = linear_stack(name, state, r"(?:.*\.)?item_learner\.projector\.(?:.*\.)?", act)
        first = self.project[0]
        assert isinstance(first, nn.Linear)
        self.width = first.in_features
        found = (re.search(r"user_learner\.projectors\.(\d+)\.", key) for key in state)
        numbers = sorted({int(match[1]) for match in found if match})
        self.groups = nn.ModuleList(
            linear_stack(name, state, rf"(?:.*\.)?user_learner\.projectors\.{k}\.(?:.*\.)?", act)[0] for k in numbers
        )
        points = [value for key, value in state.items() if re.search(r"(^|\.)user_learner\.P$", key)]
        if not numbers and not points:
            raise UserError(f"reward {name!r}: the head has neither user_learner.projectors nor user_learner.P")
        self.register_buffer("shares", _shares(name, state, user, len(numbers) or len(points[0])))
        if not numbers:
            ideal = points[0].float() if prototypes == "Pw" else self.project(points[0].float())
            self.register_buffer("points", ideal.detach())
        scale = [value for key, value in state.items() if re.search(r"(^|\.)logit_scale$", key)]
        self.scale = float(scale[0].float().exp().clamp(max=100)) if scale else 1.0

    def forward(self, pictures: Tensor, texts: Tensor) -> Tensor:
        mapped, shares = self.project(pictures), self.get_buffer("shares")
        if not len(self.groups):
            return -(mapped - shares @ self.get_buffer("points")).norm(dim=-1)
        ideal = torch.stack([group(texts) for group in self.groups], -1) @ shares
        return self.scale * (normalize(mapped, dim=-1) * normalize(ideal, dim=-1)).sum(-1)


def _shares(name: str, state: Mapping[str, Tensor], user: str | None, count: int) -> Tensor:
    """Return the weights on the groups ``(K,)``: one user's, or the mean of all users'."""
    users = {
        match[1]: value.float().softmax(0)
        for key, value in state.items()
        if (match := re.search(r"user_learner\.W\.(.+)$", key))
    }
    if user is not None:
        if user not in users:
            raise UserError(f"reward {name!r}: the head knows no user {user!r}{nearest(user, list(users))}")
        return users[user]
    return torch.stack(list(users.values())).mean(0) if users else torch.full((count,), 1 / count)
