"""Local vision-language models as judges: the logits of the next token, with gradients to the pixels.

A model's own processor turns pictures into patches by way of 8-bit PIL images, which cuts the graph (and some need
packages that are not required here). What those processors compute is done on tensors, for two families:

- ``llava``: one picture of a fixed size, preprocessed as for its vision tower, of which every patch becomes a token;
- ``qwen2_vl`` and ``qwen2_5_vl``: pictures in their own proportions, cut into patches that are doubled in time; and
  films, of which every two frames share their patches.
"""

from __future__ import annotations

import math
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

    def resize_to(self, most: int, least: int | None = None) -> None:
        """Take pictures at ``least`` to ``most`` pixels (``most`` by default), whatever the model's own bounds.

        Raises:
            UserError: the model's pictures have one size.
        """
        if not isinstance(self._pictures, _Qwen):
            raise UserError(f"reward {self.name!r}: the family {self.family!r} takes pictures of one size only")
        self._pictures.most, self._pictures.least = most, most if least is None else least

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

    def hidden_states(self, shown: Sequence[Tensor], question: str, tokens: Sequence[str]) -> Tensor:
        """Return the last hidden states ``(n, D)``, fp32, where one of the special tokens stands, in their order.

        Positions are counted straight through, without the grids of pictures: so did the code that the published heads
        were trained with (transformers 4.45, whose forward left positions to the caller, and which were not given).

        Args:
            shown: pictures ``(3, H, W)`` or films ``(F, 3, H, W)`` in [0, 1], all of one kind.
            question: the user's words, with the tokens.
            tokens: tokens of the model's tokenizer.
        """
        inputs = self._inputs(shown, question)
        ids = inputs["input_ids"]
        straight = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        out = self.model.model(**inputs, position_ids=straight, use_cache=False).last_hidden_state[0]
        wanted = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(tokens)), device=ids.device)
        return out[torch.isin(ids[0], wanted)].float()

    def _inputs(self, shown: Sequence[Tensor], question: str) -> dict[str, Any]:
        """Return what the network takes for pictures or films and a question."""
        device = self.model.device
        extra, counts = self._pictures([one.to(device) for one in shown], self.model.dtype)
        film = bool(shown) and shown[0].ndim == 4
        token = self.model.config.video_token_id if film else self.model.config.image_token_id
        pieces = self._text(len(shown), question, token, "video" if film else "image").split(_MARK)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += self.tokenizer(piece, add_special_tokens=index == 0).input_ids if piece or index == 0 else []
            if index < len(counts):
                ids += [token] * counts[index]
        tokens = torch.tensor([ids], device=device)
        if self.family in _QWEN:
            extra["mm_token_type_ids"] = (tokens == token).long() * (2 if film else 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **extra}

    def _text(self, count: int, question: str, token: int, kind: str) -> str:
        """Return the conversation as text, with a mark where each of ``count`` pictures or films goes."""
        # The mark stands for the pictures' tokens: a prompt that contains it, or the token, must not add one.
        question = question.replace(_MARK, " ")
        special = self.tokenizer.convert_ids_to_tokens(token)
        if isinstance(special, str):
            question = question.replace(special, " ")
        if getattr(self.tokenizer, "chat_template", None):
            content = [{"type": kind}] * count + [{"type": "text", "text": question}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if isinstance(special, str) and text.count(special) == count:
                return text.replace(special, _MARK)
        if self.family in _QWEN:
            seen = f"<|vision_start|>{_MARK}<|vision_end|>" * count
            return f"<|im_start|>user\n{seen}{question}<|im_end|>\n<|im_start|>assistant\n"
        return "USER: " + f"{_MARK}\n" * count + f"{question} ASSISTANT:"


_MARK = "\x00"


_MOVED = {"visual.": "model.visual.", "model.": "model.language_model."}
_TOWERS = re.compile(r"^(visual\.|model\.(?!visual\.|language_model\.))")


def moved(key: str) -> str:
    """Return today's name of a weight of transformers 4.45, where the language model's layers alone lay in "model"."""
    return _TOWERS.sub(lambda match: _MOVED[match[0]], key)


def filled(name: str, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a Qwen2-VL of a configuration with weights in the layout of transformers 4.45: ``visual``, ``model``.

    The vocabulary is as long as the weights say. No random weights are drawn on the way.

    Raises:
        UserError: weights are missing, left over, or of another size.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    renamed = {moved(key): value for key, value in state.items()}
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
    """Pictures and films in their own proportions: patches ``(all, C * t * p * p)``, grids, and the tokens of each."""

    def __init__(self, source: str, pinned: dict[str, Any], config: Any) -> None:
        from transformers import Qwen2VLImageProcessor

        processor: Any = Qwen2VLImageProcessor.from_pretrained(source, **pinned)
        self.patch, self.time, self.merge = processor.patch_size, processor.temporal_patch_size, processor.merge_size
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        size = processor.size
        self.least, self.most = size["shortest_edge"], size["longest_edge"]

    def __call__(self, shown: list[Tensor], dtype: torch.dtype) -> tuple[dict[str, Any], list[int]]:
        patches, grids, counts = [], [], []
        for one in shown:
            flat, *grid = self.patches(one)
            patches.append(flat)
            grids.append(grid)
            counts.append(math.prod(grid) // self.merge**2)
        sizes = torch.tensor(grids, device=patches[0].device)
        pixels = torch.cat(patches).to(dtype)
        if shown[0].ndim == 4:
            return {"pixel_values_videos": pixels, "video_grid_thw": sizes}, counts
        return {"pixel_values": pixels, "image_grid_thw": sizes}, counts

    def patches(self, shown: Tensor) -> tuple[Tensor, int, int, int]:
        """Return the patches of a picture or film, and how many there are in time, down and across."""
        frames = shown[None] if shown.ndim == 3 else shown
        size = fitted(frames.shape[-2], frames.shape[-1], self.patch * self.merge, self.least, self.most)
        pixels = resize(frames.float().clamp(0, 1), size)
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (pixels - mean) / std
        # A still is a film whose one frame is shown ``time`` times, and so is the last frame of an odd film.
        pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % self.time, -1, -1, -1)])
        rows, columns = size[0] // self.patch, size[1] // self.patch
        m, p = self.merge, self.patch
        # Patches that are merged lie together.
        x = pixels.reshape(-1, self.time, 3, rows // m, m, p, columns // m, m, p)
        return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(x.shape[0] * rows * columns, -1), len(x), rows, columns


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
