"""The embedded models: a world rendered by code, a reader that reads it back, and four tiny models trained on it.

Importing this package is cheap: it needs neither torch nor diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

PREFIX = "difftune/"
"""What the names of embedded models start with, as an organisation's name on a hub does."""


@dataclass(frozen=True)
class EmbeddedModel:
    """An entry of `MODELS`.

    Attributes:
        description: One line for people.
        kind: "pipeline" for a diffusers pipeline, "clip" for a CLIPModel with its CLIPProcessor, "vlm" for what
            AutoModelForImageTextToText and AutoProcessor load.
        call: Keyword arguments that a call of the pipeline should pass besides the prompt.
    """

    description: str
    kind: Literal["pipeline", "clip", "vlm"]
    call: dict[str, Any] = field(default_factory=dict)


MODELS = MappingProxyType(
    {
        "difftune/tiny-sd": EmbeddedModel(
            "StableDiffusionPipeline: a UNet of 5.3 M parameters that predicts noise, 64 x 64 scenes",
            "pipeline",
        ),
        "difftune/tiny-flow": EmbeddedModel(
            "StableDiffusion3Pipeline: a transformer of 4.7 M parameters, flow matching, 64 x 64 scenes",
            "pipeline",
            # The pipeline's own default appends 256 empty tokens, which makes every step four times as slow.
            call={"max_sequence_length": 12},
        ),
        "difftune/tiny-clip": EmbeddedModel(
            "CLIPModel of 1.1 M parameters for 64 x 64 scenes and their captions",
            "clip",
        ),
        "difftune/tiny-vlm": EmbeddedModel(
            "LlavaForConditionalGeneration of 1.2 M parameters: says yes or no to what a 64 x 64 scene shows",
            "vlm",
        ),
    }
)
"""Name -> what is known of each embedded model."""


def model_path(name: str) -> Path:
    """The folder of an embedded model, for the `from_pretrained` of its stock class.

    Args:
        name: A key of `MODELS`, e.g. "difftune/tiny-sd".

    Raises:
        KeyError: no embedded model has that name.
    """
    if name not in MODELS:
        raise KeyError(f"there is no embedded model {name!r}; expected one of {', '.join(MODELS)}.")
    return Path(__file__).parent / "weights" / name.removeprefix(PREFIX)


def list_models() -> list[str]:
    """The names of the embedded models."""
    return sorted(MODELS)
