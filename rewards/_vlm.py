"""Local vision-language models as judges: the probabilities of answers, with gradients to the pixels.

A model's own processor turns pictures into patches by way of 8-bit PIL images, which cuts the graph (and some need
packages that are not required here). What those processors compute is done on tensors, for three families:

- ``llava``: one picture of a fixed size, preprocessed as for its vision tower, of which every patch becomes a token;
- ``qwen2_vl`` and ``qwen2_5_vl``: pictures in their own proportions, cut into patches that are doubled in time; and
  films, of which every two frames share their patches.

Every other family answers by way of its own processor, without gradients.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from difftune.rewards._clip import embedded, floating
from difftune.rewards._preprocess import Preprocess, resize, to_uint8
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
        state: weights in place of the model's own, of which only the configuration and the tokenizer are read then; for
            the families with gradients only.
        tokens: special tokens that the tokenizer gets on top.

    Attributes:
        model: the network, frozen.
        differentiable: answers carry gradients to the pixels.

    Raises:
        UserError: the model answers no questions about pictures, or its processor needs what is not installed.
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
        from transformers import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            AutoConfig,
            AutoModelForImageTextToText,
            AutoTokenizer,
        )

        source = embedded(name, model)
        pinned: dict[str, Any] = {} if revision is None else {"revision": revision}
        config = AutoConfig.from_pretrained(source, **pinned)
        self.name, self.family = name, str(config.model_type)
        self.differentiable = self.family in _FAMILIES
        if not self.differentiable and state is not None:
            raise UserError(
                f"reward {name!r}: {model} is of the family {self.family!r}, expected {', '.join(_FAMILIES)}"
            )
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                f"reward {name!r}: {model} is of the family {self.family!r}, expected one that goes on with a text "
                "about pictures (AutoModelForImageTextToText, no encoder for the text)"
            )
        precision = floating(name, dtype)
        self._pictures: _Llava | _Qwen | _Other
        if not self.differentiable:
            # Before the weights are read: it is what may be missing.
            self._pictures = _Other(name, model, source, pinned)
        if state is None:
            self.model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=precision, **pinned)
        else:
            self.model = filled(name, config, state).to(precision)
        self.model.eval().requires_grad_(False)
        if self.differentiable:
            self._pictures = (_Qwen if self.family in _QWEN else _Llava)(source, pinned, self.model.config)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source, **pinned)
            self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        else:
            assert isinstance(self._pictures, _Other)
            self.tokenizer = self._pictures.processor.tokenizer
        self._special = special_tokens(self.tokenizer, getattr(self._pictures, "places", ()))

    def resize_to(self, most: int, least: int | None = None) -> None:
        """Take pictures at ``least`` to ``most`` pixels (``most`` by default), whatever the model's own bounds.

        Raises:
            UserError: the model's pictures have one size.
        """
        if not isinstance(self._pictures, _Qwen):
            raise UserError(f"reward {self.name!r}: the family {self.family!r} takes pictures of one size only")
        self._pictures.most, self._pictures.least = most, most if least is None else least

    def plain(self, prompt: str) -> str:
        """Return a prompt without the tokenizer's special tokens, a space in the place of each.

        A prompt is data: it must not end its turn, begin the judge's or bring a picture.
        """
        while self._special.search(prompt):
            prompt = self._special.sub(" ", prompt)
        return prompt

    def asked(self, question: str, prompt: str) -> str:
        """Return a question with the prompt, made plain, in the place of ``{prompt}``."""
        return question.replace("{prompt}", self.plain(prompt))

    def tokens(self, answer: str) -> tuple[int, ...]:
        """Return the tokens of an answer.

        Raises:
            UserError: the tokenizer does not know it.
        """
        ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        if not ids or self.tokenizer.unk_token_id in ids:
            raise UserError(f"reward {self.name!r}: the model's tokenizer does not know {answer!r}; set another answer")
        return tuple(int(token) for token in ids)

    def two_answers(self, yes: str, no: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of two answers.

        Raises:
            UserError: the tokenizer does not know one, or does not tell them apart.
        """
        first, second = self.tokens(yes), self.tokens(no)
        if first == second:
            raise UserError(
                f"reward {self.name!r}: the answers {yes!r} and {no!r} are the same to the model's tokenizer; set "
                "another yes or no"
            )
        return first, second

    def answer_log_probs(self, pictures: Sequence[Tensor], question: str, answers: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the logarithms ``(n,)`` of the answers' probabilities, fp32, on the model's device.

        That of an answer of several tokens is the mean over them, each given those before it: the probability is their
        geometric mean, as in VQAScore's code, so that a long answer is not the less likely for its length.

        Args:
            pictures: what the question is about, each ``(3, H, W)`` in [0, 1].
            question: the user's words.
            answers: the tokens of each of the n answers.
        """
        found: dict[tuple[int, ...], Tensor] = {}
        first: Tensor | None = None
        # The longest first: it tells about the first token of the others too.
        for answer in sorted(set(answers), key=len, reverse=True):
            if first is None or len(answer) > 1:
                rows = self.answer_logits(pictures, question, answer[:-1]).log_softmax(-1)
                first = rows[:1]
            else:
                rows = first
            found[answer] = rows.gather(1, torch.tensor(answer, device=rows.device)[:, None]).mean()
        return torch.stack([found[answer] for answer in answers])

    def answer_logits(self, pictures: Sequence[Tensor], question: str, begun: Sequence[int] = ()) -> Tensor:
        """Return the logits ``(1 + n, V)`` of an answer's first token and of each after the n that are ``begun``.

        They are fp32 and on the model's device.

        Args:
            pictures: what the question is about, each ``(3, H, W)`` in [0, 1].
            question: the user's words.
            begun: tokens that the answer begins with.
        """
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            out = self.model(**self._inputs(pictures, question, begun))
        return out.logits[0, -1 - len(begun) :].float()

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
        out = self.model.model(**inputs, position_ids=straight).last_hidden_state[0]
        wanted = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(tokens)), device=ids.device)
        return out[torch.isin(ids[0], wanted)].float()

    def _inputs(self, shown: Sequence[Tensor], question: str, begun: Sequence[int] = ()) -> dict[str, Any]:
        """Return what the network takes for pictures or films, a question and an answer that has begun."""
        device = self.model.device
        if isinstance(self._pictures, _Other):
            return self._pictures(shown, question, begun, device, self.model.dtype)
        extra, counts = self._pictures([one.to(device) for one in shown], self.model.dtype)
        film = bool(shown) and shown[0].ndim == 4
        token = self.model.config.video_token_id if film else self.model.config.image_token_id
        pieces = self._text(len(shown), question, token, "video" if film else "image").split(_MARK)
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += self.tokenizer(piece, add_special_tokens=index == 0).input_ids if piece or index == 0 else []
            if index < len(counts):
                ids += [token] * counts[index]
        tokens = torch.tensor([[*ids, *begun]], device=device)
        if self.family in _QWEN:
            extra["mm_token_type_ids"] = (tokens == token).long() * (2 if film else 1)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False, **extra}

    def _text(self, count: int, question: str, token: int, kind: str) -> str:
        """Return the conversation as text, with a mark where each of ``count`` pictures or films goes."""
        # The mark stands for the pictures' tokens: a question that contains it, or the token, must not add one.
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


def special_tokens(tokenizer: Any, more: Sequence[str] = ()) -> re.Pattern[str]:
    """Return what matches every special token of a tokenizer, and ``more``, in either case of letters."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    known = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special), *more}
    longest_first = sorted((word for word in known if word.strip()), key=len, reverse=True)
    # Some tokenizers look for them in the text in lower case.
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)", re.IGNORECASE)


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


class _Other:
    """What a model's own processor makes of pictures and a question: all that the network takes, without gradients.

    Attributes:
        processor: transformers' ``AutoProcessor``.
        places: what it takes in a text for the place of a picture or film.
    """

    def __init__(self, name: str, model: str, source: str, pinned: dict[str, Any]) -> None:
        from transformers import AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(source, **pinned)
        except (ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            # transformers names it for most processors; some fail on a class that is not there without it.
            if importlib.util.find_spec("torchvision") is None and (
                "torchvision" in reason.lower() or isinstance(error, AttributeError)
            ):
                reason = "it needs torchvision; install the one that is built for this torch"
            raise UserError(
                f"reward {name!r}: the processor of {model} does not load ({reason}), or serve the model and use "
                "vlm_server"
            ) from None
        except OSError:
            # Of a hub id, it may be the network.
            if not Path(source).is_dir():
                raise
            self.processor = None
        if not hasattr(self.processor, "image_processor") or not hasattr(self.processor, "tokenizer"):
            raise UserError(f"reward {name!r}: {model} has no processor for pictures and text")
        named = (getattr(self.processor, key, None) for key in ("image_token", "video_token", "boi_token"))
        self.places = [str(token) for token in named if token is not None]

    def __call__(
        self, pictures: Sequence[Tensor], question: str, begun: Sequence[int], device: Any, dtype: torch.dtype
    ) -> dict[str, Any]:
        files = [Image.fromarray(to_uint8(picture).permute(1, 2, 0).numpy()) for picture in pictures]
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image", "image": file} for file in files), {"type": "text", "text": question}]
            inputs = self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            # BLIP-2 and its kin put the pictures' tokens before the text themselves.
            place = "" if hasattr(self.processor, "num_query_tokens") else getattr(self.processor, "image_token", None)
            places = str(place or "") * len(files)
            text = f"{places}Question: {question} Answer:"
            # Several pictures of one text are told from one picture of each text by the inner list.
            inputs = self.processor(text=[text], images=[files] if len(files) > 1 else files, return_tensors="pt")
        placed = dict(inputs.to(device=device, dtype=dtype))
        return _continued(placed, begun) if begun else placed


def _continued(inputs: dict[str, Any], begun: Sequence[int]) -> dict[str, Any]:
    """Return inputs for a text with more tokens, which are seen as the last one was: no pictures, not masked."""
    ids = inputs["input_ids"]
    out = dict(inputs)
    for key, value in inputs.items():
        along = isinstance(value, Tensor) and not value.is_floating_point() and value.shape[:2] == ids.shape
        if along and key != "input_ids":
            out[key] = torch.cat([value, value[:, -1:].expand(-1, len(begun), *value.shape[2:])], 1)
    out["input_ids"] = torch.cat([ids, ids.new_tensor([list(begun)])], 1)
    return out


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
