"""The artifact: a LoRA file that stock diffusers, ComfyUI and A1111 load at full strength, and its model
card.

What other programs do with a file decides what is written (all of it tested):

- ``alpha / r`` is **folded into B** in fp32, also where rank or alpha differ by layer, and with
  rank-stabilised scaling. A reader that ignores alpha would otherwise apply the adapter at the wrong strength
  without a word.
- The pipeline class's own ``save_lora_weights`` writes ``pytorch_lora_weights.safetensors``; the settings it
  stores say ``lora_alpha == r``.
- ComfyUI and A1111 do not match the attention keys of a UNet's diffusers file, so UNet families get a second
  file in kohya's layout.
- Two Wan-style experts need two files: the second one's is loaded with ``load_into_transformer_2=True``.
- A pipeline without ``save_lora_weights`` gets one file per component in peft's layout, read by
  :func:`load_adapter`.

Every file is written beside its place, synced and renamed. Its header is written with sorted keys, because
the safetensors library orders them at random and two equal runs would leave different bytes.
"""

from __future__ import annotations

from difftune.export.card import add_figures
from difftune.export.files import WEIGHTS, WEIGHTS_2
from difftune.export.inspection import inspect_adapter
from difftune.export.loading import load_adapter
from difftune.export.saving import save_adapter, save_weights

__all__ = ["WEIGHTS", "WEIGHTS_2", "add_figures", "inspect_adapter", "load_adapter", "save_adapter", "save_weights"]
