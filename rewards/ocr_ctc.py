"""OCR with a gradient: the log-probability that a text recogniser gives to the wanted text.

PP-OCRv4's recogniser, which the package ``rapidocr-onnxruntime`` ships as an ONNX graph, is run by torch's operators.
For a line of text 48 pixels high it gives, every 8 pixels, logits over 6,623 characters, a space and "no character";
connectionist temporal classification (Graves et al. 2006) sums the probabilities of all ways in which these spell the
wanted text ``y``::

    r = log p(y | line) / |y|

Where the line is, the package's detector says, without gradients; of several lines the one that reads most like the
text counts. Where none is found the whole picture is taken for one line.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from difftune.reward import Reward, reward
from difftune.rewards._onnx import OnnxModule, package_file
from difftune.rewards._preprocess import resize, to_uint8
from difftune.rewards._rapidocr import reader
from difftune.rewards._text import wanted_text
from difftune.types import UserError

_HEIGHT, _WIDTH, _STRIDE = 48, 320, 8
"""The recogniser's line: its height, its least width and the pixels between two predictions."""


@reward("ocr_ctc")
class OcrCtc(Reward):
    """Log-probability per character that PP-OCRv4's recogniser gives to the wanted text; 0 is certain.

    The text is the metadata's ``text``, else what the prompt has in double quotes, else the whole prompt.

    Args:
        find: let the package's detector find the lines; otherwise the picture itself is one line.
        side: the shorter side that a smaller picture is enlarged to before lines are looked for, in pixels.
    """

    differentiable = True
    range = "at most 0"
    weights = "package rapidocr-onnxruntime: PP-OCRv4"
    licence = "Apache-2.0"
    memory = "0.02 GiB"

    def __init__(self, find: bool = True, side: int = 320) -> None:
        file = package_file(self.name, "ocr", "rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx")
        self.recogniser = OnnxModule(file, logits=True).eval()
        # Class 0 is "no character", the last one a space.
        letters = ["", *self.recogniser.metadata["character"].split("\n"), " "]
        self._classes = {letter: index for index, letter in enumerate(letters) if index}
        self._finder = reader(self.name, side) if find else None

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return ``(B,)`` log-probabilities per character."""
        pixels = images.float().clamp(0, 1)
        texts = [self.classes(prompt, extra) for prompt, extra in zip(prompts, metadata, strict=True)]
        scores = [
            torch.stack([self.log_prob(line, text) for line in self.lines(picture)]).max() / max(1, len(text))
            for picture, text in zip(pixels, texts, strict=True)
        ]
        return torch.stack(scores)

    def classes(self, prompt: str, metadata: Mapping[str, Any]) -> list[int]:
        """Return the wanted text as the recogniser's classes; accents that it does not know are dropped.

        Raises:
            UserError: it does not know a character at all.
        """
        out = []
        for letter in wanted_text(self.name, prompt, metadata):
            plain = letter if letter in self._classes else unicodedata.normalize("NFKD", letter)[0]
            if plain not in self._classes:
                raise UserError(
                    f"reward {self.name!r}: the recogniser does not know {letter!r} of prompt {prompt!r}; "
                    "name a text without it under 'text' beside the prompt"
                )
            out.append(self._classes[plain])
        return out

    def lines(self, picture: Tensor) -> list[Tensor]:
        """Return the upright rectangles ``(3, h, w)`` in which the detector finds text, or the whole picture."""
        if self._finder is None:
            return [picture]
        pixels = to_uint8(picture).permute(1, 2, 0).flip(-1).contiguous().numpy()
        boxes, _ = self._finder(pixels, use_rec=False)
        cuts = []
        for corners in boxes or ():
            across, down = zip(*corners, strict=True)
            left, top = (max(0, math.floor(min(values))) for values in (across, down))
            cuts.append(picture[:, top : math.ceil(max(down)), left : math.ceil(max(across))])
        return [cut for cut in cuts if cut.numel()] or [picture]

    def log_prob(self, line: Tensor, text: Sequence[int]) -> Tensor:
        """Return the log-probability of ``text`` in a line ``(3, h, w)`` in [0, 1], differentiably."""
        width = math.ceil(_HEIGHT * line.shape[-1] / line.shape[-2])
        # The recogniser reads lines of at least 320 pixels, grey after the text; twice the letters and one always
        # leave a path for letters that repeat.
        whole = max(_WIDTH, width, _STRIDE * (2 * len(text) + 1))
        pixels = 2 * resize(line[None], (_HEIGHT, width), "bilinear") - 1
        logits = self.recogniser(functional.pad(pixels, (0, whole - width)))
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        target = torch.tensor([list(text)], device=log_probs.device).long()
        steps, letters = torch.tensor([len(log_probs)]), torch.tensor([len(text)])
        return -functional.ctc_loss(log_probs, target, steps, letters, blank=0, reduction="none")[0]
