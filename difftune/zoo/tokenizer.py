"""A real CLIP tokenizer for the world's vocabulary: one token a word, bytes for everything else."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTokenizer

from difftune.zoo.world import vocabulary

MAX_LENGTH = 16
"""Tokens of a prompt, start and end included; the world's longest caption has ten."""

END_OF_WORD = "</w>"
"""What a word's last piece ends in."""


def new_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the generators and of tiny-clip; other text is cut into bytes and truncated, never unknown."""
    merges: Any = learn_merges(vocabulary())
    tokens = [*alphabet(), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=MAX_LENGTH,
    )


def text_config(width: int, layers: int, projection: int = 64) -> CLIPTextConfig:
    """A text encoder of `width` features for `new_tokenizer`'s tokens."""
    tokenizer = new_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def alphabet() -> list[str]:
    """Every byte as a letter within a word and as its last one: what text is cut into where no merge applies."""
    letters = sorted(ByteLevel.alphabet())
    return [*letters, *(letter + END_OF_WORD for letter in letters)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is a single token."""
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        frequency = Counter(pair for word in pieces for pair in pairwise(word))
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
