"""Local vision-language models as judges: the logits of the next token, with gradients to the pixels.

A model's own processor turns pictures into patches by way of 8-bit PIL images, which cuts the graph (and some need
packages that are not required here). What those processors compute is done on tensors, for two families:

- ``llava``: one picture of a fixed size, preprocessed as for its vision tower, of which every patch becomes a token;
- ``qwen2_vl`` and ``qwen2_5_vl``: pictures in their own proportions, cut into patches that are doubled in time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from difftune.rewards._clip import embedded, floating
from difftune.rewards._preprocess import Preprocess, resize
from difftune.types import UserError

_QWEN = ("qwen2_vl", "qwen2_5_vl")
_FAMILIES = ("llava", *_QWEN)


class Judge:
    """A model of transformers' ``AutoModelForImageTextToText`` that answers questions about pictures.

    Args:
        name: the reward, for messages.
        model: embedded name, folder or hub id.
        revision: branch, tag or commit of a hub id.
        dtype: precision of the model.
        state: weights in place of the model's own, of which only the configuration and the tokenizer are read then.
        tokens: special tokens that the tokenizer gets on top.

    Attributes:
        model: the network, frozen.
    """

    def __init__(
        self,
        name: str,
        model: str,
        revision: str | None,
        dtype: str,
        state: Mapping[str, Tensor] | None = None,
        tokens: Sequence[str] = (),
    ) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

        source = embedded(name, model)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        self.name = name
        self.family = str(AutoConfig.from_pretrained(source, **pinned).model_type)
        if self.family not in _FAMILIES:
            raise UserError(
                f"reward {name!r}: {model} is of the family {self.family!r}, expected {', '.join(_FAMILIES)}; serve it "
                "and use vlm_server"
            )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(source, **pinned)
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        precision = floating(name, dtype)
        if state is None:
            self.model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=precision, **pinned)
        else:
            self.model = filled(name, AutoConfig.from_pretrained(source, **pinned), state).to(precision)
        self.model.eval().requires_grad_(False)
        self._pictures = (_Qwen if self.family in _QWEN else _Llava)(source, pinned, self.model.config)

    def resize_to(self, pixels: int) -> None:
        """Take pictures at ``pixels`` pixels, whatever the model's own bounds; for models of any size of picture.

        Raises:
            UserError: the model's pictures have one size.
        """
        if not isinstance(self._pictures, _Qwen):
            raise UserError(f"reward {self.name!r}: the family {self.family!r} takes pictures of one size only")
        self._pictures.least = self._pictures.most = pixels

    def token(self, word: str) -> int:
        """Return the first token of ``word``, as an answer begins with it."""
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        if not ids or ids[0] == self.tokenizer.unk_token_id:
            raise UserError(f"reward {self.name!r}: the model's tokenizer does not know {word!r}; set another answer")
        return int(ids[0])

    def answer_logits(self, pictures: Sequence[Tensor], question: str) -> Tensor:
        """Return the logits ``(V,)`` of the answer's first token, fp32, on the model's device.

        Args:
            pictures: what the question is about, each ``(3, H, W)`` in [0, 1].
            question: the user's words.
        """
        out = self.model(**self._inputs(pictures, question), use_cache=False)
        return out.logits[0, -1].float()

    def hidden_states(self, pictures: Sequence[Tensor], question: str, token: str) -> Tensor:
        """Return the last hidden states ``(n, D)``, fp32, where the special token ``token`` stands in the question."""
        inputs = self._inputs(pictures, question)
        out = self.model.model(**inputs, use_cache=False).last_hidden_state[0]
        return out[inputs["input_ids"][0] == self.tokenizer.convert_tokens_to_ids(token)].float()

    def _inputs(self, pictures: Sequence[Tensor], question: str) -> dict[str, Any]:
        """Return what the network takes for pictures and a question."""
        device = self.model.device
        extra, counts = self._pictures([picture.to(device) for picture in pictures], self.model.dtype)
        image = self.model.config.image_token_id
        pieces = self._text(len(pictures), question).split(_MARK)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += self.tokenizer(piece, add_special_tokens=index == 0).input_ids if piece or index == 0 else []
            if index < len(counts):
                ids += [image] * counts[index]
        tokens = torch.tensor([ids], device=device)
        if self.family in _QWEN:
            extra["mm_token_type_ids"] = (tokens == image).long()
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **extra}

    def _text(self, pictures: int, question: str) -> str:
        """Return the conversation as text, with a mark where each picture goes."""
        # The mark stands for the pictures' tokens: a prompt that contains it, or the token, must not add one.
        question = question.replace(_MARK, " ")
        special = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        if isinstance(special, str):
            question = question.replace(special, " ")
        if getattr(self.tokenizer, "chat_template", None):
            content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if isinstance(special, str) and text.count(special) == pictures:
                return text.replace(special, _MARK)
        if self.family in _QWEN:
            seen = f"<|vision_start|>{_MARK}<|vision_end|>" * pictures
            return f"<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n"
        return "USER: " + f"{_MARK}\n" * pictures + f"{question} ASSISTANT:"


_MARK = "\x00"


_MOVED = {"visual.": "model.visual.", "model.": "model.language_model."}
_TOWERS = re.compile(r"^(visual\.|model\.(?!visual\.|language_model\.))")


def filled(name: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a Qwen2-VL of a configuration with weights in the layout of transformers 4.45: ``visual``, ``model``.

    The vocabulary is as long as the weights say. No random weights are drawn on the way.

    Raises:
        UserError: weights are missing, left over, or of another size.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    renamed = {}
    for key, value in state.items():
        # Both towers moved below "model": the language model's layers were there alone before.
        renamed[_TOWERS.sub(lambda match: _MOVED[match[0]], key)] = value
    table = renamed.get("model.language_model.embed_tokens.weight")
    if table is not None:
        config.text_config.vocab_size = len(table)
    with init_empty_weights():
        network = AutoModelForImageTextToText.from_config(config)
    if "lm_head.weight" not in renamed and table is not None:
        renamed["lm_head.weight"] = table
    try:
        network.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"reward {name!r}: the weights do not fit the model ({reason})") from None
    return network


class _Llava:
    """Pictures of one fixed size: ``pixel_values (N, 3, h, w)``, and the tokens of each."""

    def __init__(self, source: str, pinned: dict[str, Any], config: Any) -> None:
        from transformers import AutoImageProcessor

        self.preprocess = Preprocess.from_processor(AutoImageProcessor.from_pretrained(source, **pinned))
        vision = config.vision_config
        whole = config.vision_feature_select_strategy == "full" and vision.model_type.startswith("clip")
        self.tokens = (vision.image_size // vision.patch_size) ** 2 + int(whole)

    def __call__(self, pictures: list[Tensor], dtype: torch.dtype) -> tuple[dict[str, Any], list[int]]:
        pixels = torch.cat([self.preprocess(picture[None]) for picture in pictures])
        return {"pixel_values": pixels.to(dtype)}, [self.tokens] * len(pictures)


class _Qwen:
    """Pictures in their own proportions: patches ``(all patches, C * t * p * p)``, their grids, the tokens of each."""

    def __init__(self, source: str, pinned: dict[str, Any], config: Any) -> None:
        from transformers import Qwen2VLImageProcessor

        processor: Any = Qwen2VLImageProcessor.from_pretrained(source, **pinned)
        self.patch, self.time, self.merge = processor.patch_size, processor.temporal_patch_size, processor.merge_size
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        size = processor.size
        self.least, self.most = size["shortest_edge"], size["longest_edge"]

    def __call__(self, pictures: list[Tensor], dtype: torch.dtype) -> tuple[dict[str, Any], list[int]]:
        patches, grids, counts = [], [], []
        for picture in pictures:
            flat, rows, columns = self.patches(picture)
            patches.append(flat)
            grids.append([1, rows, columns])
            counts.append(rows * columns // self.merge**2)
        grid = torch.tensor(grids, device=patches[0].device)
        return {"pixel_values": torch.cat(patches).to(dtype), "image_grid_thw": grid}, counts

    def patches(self, picture: Tensor) -> tuple[Tensor, int, int]:
        """Return one picture's patches, and how many there are down and across."""
        size = fitted(picture.shape[-2], picture.shape[-1], self.patch * self.merge, self.least, self.most)
        pixels = resize(picture[None].float().clamp(0, 1), size)
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (pixels - mean) / std
        rows, columns = size[0] // self.patch, size[1] // self.patch
        m, p = self.merge, self.patch
        # A still is a video whose one frame is shown ``time`` times; patches that are merged lie together.
        x = pixels.expand(self.time, -1, -1, -1).reshape(self.time, 3, rows // m, m, p, columns // m, m, p)
        return x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1), rows, columns


def fitted(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Return the size near ``height`` x ``width`` in multiples of ``factor`` with between least and most pixels."""
    tall, wide = (round(side / factor) * factor for side in (height, width))
    if tall * wide > most:
        scale = (height * width / most) ** 0.5
        tall, wide = (max(factor, int(side / scale / factor) * factor) for side in (height, width))
    elif tall * wide < least:
        scale = (least / (height * width)) ** 0.5
        tall, wide = (-int(-side * scale // factor) * factor for side in (height, width))
    return tall, wide
