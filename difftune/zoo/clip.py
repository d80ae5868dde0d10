"""tiny-clip: a CLIP model of the world, trained contrastively on full and partial captions.

A partial caption is true of many scenes of a batch. Because the world knows of which, the contrastive targets are
spread over every true pair instead of calling all but one of them wrong.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

from difftune.zoo.autoencoder import to_model
from difftune.zoo.readouts import PATCH, Readouts, label_clauses, label_patches
from difftune.zoo.tokenizer import MAX_LENGTH, new_tokenizer, text_config
from difftune.zoo.training import fit, half_precision
from difftune.zoo.world import SIZE, Clauses, Scene, caption, parse_caption, render_scenes, sample_caption

STEPS = 3000
BATCH = 64
SCENES = 30_000
LEARNING_RATE = 1e-3
SEED = 2
WIDTH = 128
PROJECTION = 64


def new_clip() -> CLIPModel:
    """An untrained model of 0.9 M parameters: patches of 8 pixels, four layers of width 128, 64 shared dimensions."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=PROJECTION,
    )
    text = text_config(WIDTH, layers=2, projection=PROJECTION)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=PROJECTION))


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


def train_clip(steps: int = STEPS) -> tuple[CLIPModel, CLIPProcessor]:
    """Trains tiny-clip; half of the captions of a batch are full, half are sampled as for the generators."""
    torch.manual_seed(SEED)
    model, processor = new_clip(), new_processor()
    readouts = Readouts(PROJECTION, WIDTH)
    scenes, pictures = render_scenes(min(SCENES, BATCH * steps), SEED)
    clause_labels, patch_labels = label_clauses(scenes), label_patches(scenes)
    rng = np.random.default_rng(SEED)

    def loss_of_step(step: int) -> Tensor:
        chosen = rng.integers(len(scenes), size=BATCH)
        batch = [scenes[i] for i in chosen]
        captions = [caption(s) if i % 2 else sample_caption(s, rng) or caption(s) for i, s in enumerate(batch)]
        tokens = processor.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        with half_precision():
            output = model(**tokens, pixel_values=to_model(pictures[chosen]))
        features = output.vision_model_output.pooler_output.float()
        patches = output.vision_model_output.last_hidden_state[:, 1:].float()
        matching = contrastive_loss(output.logits_per_image.float(), truth(batch, captions))
        return matching + readouts(features, patches, clause_labels[chosen], patch_labels[chosen])

    fit(loss_of_step, [model, readouts], label="tiny-clip", steps=steps, learning_rate=LEARNING_RATE)
    return model.eval().requires_grad_(False), processor
