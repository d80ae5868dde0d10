"""tiny-clip: a CLIP model of the world, trained contrastively on full and partial captions.

A partial caption is true of many scenes of a batch. Because the world knows of which, the contrastive targets are
spread over every true pair instead of calling all but one of them wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

from difftune.zoo.autoencoder import to_model
from difftune.zoo.tokenizer import MAX_LENGTH, new_tokenizer, text_config
from difftune.zoo.training import fit
from difftune.zoo.world import (
    CLAUSES,
    COLOURS,
    COUNTS,
    PATTERNS,
    SHAPES,
    SIZE,
    Clauses,
    Scene,
    caption,
    parse_caption,
    render_scenes,
    sample_caption,
)

STEPS = 1800
BATCH = 64
SCENES = 30_000
LEARNING_RATE = 1e-3
READOUT_WEIGHT = 0.3
SEED = 2

_VALUES: dict[str, tuple] = {
    "count": COUNTS,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(COLOURS),
    "pattern": PATTERNS,
}


def new_clip() -> CLIPModel:
    """An untrained model of 1.2 M parameters: patches of 8 pixels, four layers of width 128, 64 shared dimensions."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=64,
    )
    text = text_config(width=128, layers=3)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def new_processor() -> CLIPProcessor:
    """Resizes to 64 pixels, maps [0, 1] to [-1, 1] and tokenizes."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=new_tokenizer())


def holds(scene: Scene, clauses: Clauses) -> bool:
    """Whether every clause is true of the scene."""
    return all(getattr(scene, name) == value for name, value in clauses.items())


def truth(scenes: list[Scene], captions: list[str]) -> Tensor:
    """Which caption is true of which scene: a float tensor (scenes, captions) of zeros and ones."""
    parsed = [parse_caption(text) for text in captions]
    return torch.tensor([[float(holds(scene, clauses)) for clauses in parsed] for scene in scenes])


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Mean cross-entropy of both directions against targets spread evenly over the true pairs.

    Args:
        logits: Scaled cosines (images, captions).
        true: Zeros and ones of the same shape; each row and each column holds a one.
    """
    of_images = cross_entropy(logits, true / true.sum(1, keepdim=True))
    of_captions = cross_entropy(logits.T, (true / true.sum(0, keepdim=True)).T)
    return (of_images + of_captions) / 2


class ClauseReadout(nn.Module):
    """Linear read-outs of each clause from the image features; they speed training up and are then thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in _VALUES.items()})

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of features (B, width) against labels (B, 5) in the order of `CLAUSES`."""
        losses = [cross_entropy(self.heads[name](features), labels[:, i]) for i, name in enumerate(CLAUSES)]
        return torch.stack(losses).mean()


def _labels(scenes: list[Scene]) -> Tensor:
    return torch.tensor([[_VALUES[name].index(getattr(scene, name)) for name in CLAUSES] for scene in scenes])


def train_clip(steps: int = STEPS) -> tuple[CLIPModel, CLIPProcessor]:
    """Trains tiny-clip; half of the captions of a batch are full, half are sampled as for the generators."""
    torch.manual_seed(SEED)
    model, processor = new_clip(), new_processor()
    readout = ClauseReadout(model.config.projection_dim)
    scenes, pictures = render_scenes(min(SCENES, BATCH * steps), SEED)
    labels = _labels(scenes)
    rng = np.random.default_rng(SEED)

    def loss_of_step(step: int) -> Tensor:
        chosen = rng.integers(len(scenes), size=BATCH)
        batch = [scenes[i] for i in chosen]
        captions = [caption(s) if i % 2 else sample_caption(s, rng) or caption(s) for i, s in enumerate(batch)]
        tokens = processor.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        output = model(**tokens, pixel_values=to_model(pictures[chosen]))
        features = output.vision_model_output.pooler_output
        matching = contrastive_loss(output.logits_per_image, truth(batch, captions))
        return matching + READOUT_WEIGHT * readout(features, labels[chosen])

    fit(loss_of_step, [model, readout], label="tiny-clip", steps=steps, learning_rate=LEARNING_RATE)
    return model.eval().requires_grad_(False), processor
