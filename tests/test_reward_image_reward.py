"""ImageReward: the published file format at small geometry, against the model written out with plain tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reward_makers import WORDS, image_reward_file, image_reward_state
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, softmax

from difftune.reward import build_reward
from difftune.rewards._clip import MEAN, STD
from difftune.types import UserError

PROMPTS = ["a red circle", "two yellow stars on the cat", "", "three"]
State = dict[str, Tensor]


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def dense(state: State, name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Scaled dot products of ``(B, L, D)``; ``mask`` ``(B, K)`` is 1 where a key may be looked at."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = split(query), split(key), split(value)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, float("-inf"))
    return (softmax(scores, -1) @ value).transpose(1, 2).flatten(2)


def picture_tokens(state: State, pixels: Tensor) -> Tensor:
    eye = "blip.visual_encoder"
    x = conv2d(pixels, state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=16)
    x = torch.cat([state[f"{eye}.cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state[f"{eye}.pos_embed"]
    for n in range(2):
        block = f"{eye}.blocks.{n}"
        query, key, value = dense(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + dense(state, f"{block}.attn.proj", attention(query, key, value, 2))
        hidden = gelu(dense(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + dense(state, f"{block}.mlp.fc2", hidden)
    return norm(state, f"{eye}.norm", x, 1e-6)


def first_state(state: State, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    ear = "blip.text_encoder"
    x = state[f"{ear}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{ear}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(state, f"{ear}.embeddings.LayerNorm", x, 1e-12)
    for n in range(2):
        layer = f"{ear}.encoder.layer.{n}"
        for kind, source, seen in (("attention", None, mask), ("crossattention", tokens, None)):
            looked_at = x if source is None else source
            key, value = (dense(state, f"{layer}.{kind}.self.{name}", looked_at) for name in ("key", "value"))
            query = dense(state, f"{layer}.{kind}.self.query", x)
            out = dense(state, f"{layer}.{kind}.output.dense", attention(query, key, value, 4, seen))
            x = norm(state, f"{layer}.{kind}.output.LayerNorm", out + x, 1e-12)
        out = dense(state, f"{layer}.output.dense", gelu(dense(state, f"{layer}.intermediate.dense", x)))
        x = norm(state, f"{layer}.output.LayerNorm", out + x, 1e-12)
    return x[:, 0]


def encoded(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return ``[CLS] words [SEP]`` padded to 35, with its mask."""
    ids, mask = torch.zeros(len(prompts), 35, dtype=torch.long), torch.zeros(len(prompts), 35)
    for row, prompt in enumerate(prompts):
        words = ["[CLS]", *prompt.split(), "[SEP]"]
        ids[row, : len(words)] = torch.tensor([WORDS.index(word) for word in words])
        mask[row, : len(words)] = 1
    return ids, mask


def test_scores_are_the_published_formula(tmp_path: Path) -> None:
    state = image_reward_state()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    x = first_state(state, *encoded(PROMPTS), picture_tokens(state, pixels))
    for number in (0, 2, 4, 6, 7):
        x = dense(state, f"mlp.layers.{number}", x)
    expected = (x.squeeze(-1) - 0.16717362830052426) / 1.0333394966054072
    settings = image_reward_file(tmp_path)
    got = build_reward("image_reward", **settings)(images, PROMPTS).total
    assert expected.std() > 0.1
    print("largest difference", float((got - expected).abs().max()))
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)
    # A folder will do; both texts and pictures matter.
    again = build_reward("image_reward", **{**settings, "model": str(tmp_path)})(images, PROMPTS).total
    assert torch.equal(again, got)
    assert (build_reward("image_reward", **settings)(images, PROMPTS[::-1]).total - got).abs().max() > 1e-3


def test_the_middle_is_torchvisions(tmp_path: Path) -> None:
    """Of 3 columns too many, torchvision's CenterCrop leaves out two on the left: int(round(1.5)) is 2."""
    score = build_reward("image_reward", **image_reward_file(tmp_path))
    wide = torch.rand(4, 3, 64, 67, generator=torch.Generator().manual_seed(0))
    got = score(wide, PROMPTS).total
    assert torch.equal(got, score(wide[..., 2:66], PROMPTS).total)
    assert (got - score(wide[..., 1:65], PROMPTS).total).abs().max() > 1e-3
    tall = wide.transpose(-1, -2)
    assert torch.equal(score(tall, PROMPTS).total, score(tall[..., 2:66, :], PROMPTS).total)


def test_a_file_that_lacks_something_is_refused(tmp_path: Path) -> None:
    settings = image_reward_file(tmp_path)
    state = image_reward_state()
    for key, message in {
        "blip.visual_encoder.blocks.1.norm2.bias": "lacks encoder.layers.1.layer_norm2.bias",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias": "lacks encoder.layer.1.crossattention.self",
        "blip.visual_encoder.pos_embed": "no blip.visual_encoder, is it ImageReward.pt",
        "blip.text_encoder.embeddings.word_embeddings.weight": "no blip.text_encoder",
    }.items():
        torch.save({name: value for name, value in state.items() if name != key}, tmp_path / "ImageReward.pt")
        with pytest.raises(UserError, match=message):
            build_reward("image_reward", **settings)
