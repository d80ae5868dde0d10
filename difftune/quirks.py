"""What a pipeline cannot tell by itself, by class name: data, at most a few lines a family.

A pipeline without an entry is taken as it is. An entry holds for the classes whose name begins with its key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """One family's entry.

    Attributes:
        refuse: why the family cannot be trained.
        max_batch: how many samples its call takes at most, where it is fewer than any number.
    """

    refuse: str = ""
    max_batch: int | None = None


_STAGES = "its loop runs over growing stages of latents, which is not one list of transitions"
_COPIES = "it steps copies of its scheduler, one per stream or frame, so its loop has several chains of steps"
_STEERED = "it moves its latents along gradients of the denoiser between steps, which are no part of the transitions"
_NESTED = "it asks its scheduler for a clean sample before each step, so its loop has two steps to a transition"
_INVERTS = "it inverts an image in a call of its own before it denoises"
_NO_LOOP = "it has no loop of scheduler steps"
_DISCRETE = "it samples discrete tokens, which have no Gaussian transition"

QUIRKS: dict[str, Quirk] = {
    "Amused": Quirk(refuse=_DISCRETE),
    "AutoPipeline": Quirk(refuse="it is a factory; load the pipeline it makes"),
    "Cosmos3Omni": Quirk(refuse=_COPIES),
    "CosmosTextToWorld": Quirk(refuse=_NESTED),
    "CosmosVideoToWorld": Quirk(refuse=_NESTED),
    "CycleDiffusion": Quirk(refuse="each step's noise is solved for from a source picture, not drawn"),
    "DiffusionGemma": Quirk(refuse=_DISCRETE),
    "FluxPriorRedux": Quirk(refuse=_NO_LOOP),
    "Helios": Quirk(refuse=_STAGES),
    "Kandinsky6TI2VA": Quirk(refuse=_COPIES),
    "LEditsPP": Quirk(refuse=_INVERTS),
    "LLaDA2": Quirk(refuse=_DISCRETE),
    "LTX2": Quirk(refuse=_COPIES),
    "LTX2LatentUpsample": Quirk(refuse=_NO_LOOP),
    "LTX2VideoDiffusionDecode": Quirk(refuse=_NO_LOOP),
    "LTXI2VLongMultiPrompt": Quirk(refuse=_STAGES),
    "LTXLatentUpsample": Quirk(refuse=_NO_LOOP),
    "PRX": Quirk(max_batch=1),  # its guided call is given two times, whatever the batch
    "QwenImageEdit": Quirk(max_batch=1),
    "RFD4": Quirk(refuse="it moves coordinates of atoms by a scheduler of its own"),
    "SkyReelsV2DiffusionForcing": Quirk(refuse=_COPIES),
    "StableDiffusionAttendAndExcite": Quirk(refuse=_STEERED),
    "StableDiffusionDiffEdit": Quirk(refuse=_INVERTS),
    "StableDiffusionPanorama": Quirk(refuse=_COPIES),
    "StableDiffusionParadigms": Quirk(refuse="it iterates on all steps at once"),
    "StableDiffusionPix2PixZero": Quirk(refuse=_STEERED),
    "TextToVideoZero": Quirk(refuse=_COPIES),
}


def quirk_of(name: str) -> Quirk:
    """Return the entry of the class ``name``: the longest key it begins with, an empty one if there is none."""
    keys = [key for key in QUIRKS if name.startswith(key)]
    return QUIRKS[max(keys, key=len)] if keys else Quirk()
