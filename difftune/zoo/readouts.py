"""Read-outs that teach a network to look, and are thrown away when it has been trained.

Captions, and the error of a predicted noise, say little about where the objects are and what they are, so that shapes
and counts are learnt late. A read-out asks a layer's features for just that, as representation alignment (REPA, Yu et
al. 2024, arXiv 2410.06940) does with the features of a pretrained encoder; here the world itself knows the answers.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from difftune.zoo.world import CLAUSES, COLOURS, COUNTS, PATTERNS, SHAPES, SIZE, Scene, layout, outline

PATCH = 8
"""Side of a patch, in pixels: tiny-clip's, and two latent cells of the generators."""

CELLS = 2
"""Latent cells along a side of a patch."""

VALUES: dict[str, tuple] = {
    "count": COUNTS,
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(COLOURS),
    "pattern": PATTERNS,
}
"""The values of every clause, in the order of their labels."""


class Readouts(nn.Module):
    """Says what a picture shows from features of the whole and of its patches.

    Args:
        projected: Width of the features of the whole.
        width: Width of a patch's features.
        hidden: Width of a hidden layer before each answer; 0 reads linearly.
        cells: Whether patches are also asked how much of each of their latent cells an object covers.
    """

    def __init__(self, projected: int, width: int, hidden: int = 0, cells: bool = False) -> None:
        super().__init__()
        self.clauses = nn.ModuleDict({name: _head(projected, len(v), hidden) for name, v in VALUES.items()})
        self.patches = _head(width, 1 + 2 * len(SHAPES), hidden)
        self.cells = _head(width, CELLS**2, hidden) if cells else None

    def forward(
        self,
        features: Tensor,
        patches: Tensor,
        clause_labels: Tensor,
        patch_labels: Tensor,
        cell_labels: Tensor | None = None,
    ) -> Tensor:
        """Sum of the mean cross-entropies of the answers.

        Args:
            features: Features of the whole (B, projected).
            patches: Features of the patches (B, 64, width).
            clause_labels: Labels (B, 5) in the order of `CLAUSES`.
            patch_labels: Labels (B, 64) of `label_patches`.
            cell_labels: Labels (B, 64, 4) of `label_cells`, where cells are asked for.
        """
        losses = [cross_entropy(self.clauses[name](features), clause_labels[:, i]) for i, name in enumerate(CLAUSES)]
        loss = torch.stack(losses).mean() + cross_entropy(self.patches(patches).flatten(0, 1), patch_labels.flatten())
        if self.cells is not None and cell_labels is not None:
            # Outlines are a small part of a picture and what goes wrong first: they count twice.
            loss = loss + 2 * binary_cross_entropy_with_logits(self.cells(patches), cell_labels)
        return loss


def _head(width: int, answers: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, answers)
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, answers))


def label_clauses(scenes: list[Scene]) -> Tensor:
    """Index of every clause's value: (scenes, 5), in the order of `CLAUSES`."""
    return torch.tensor([[VALUES[name].index(getattr(scene, name)) for name in CLAUSES] for scene in scenes])


def label_patches(scenes: list[Scene]) -> Tensor:
    """What every patch lies on: (scenes, 64), row by row.

    0 is background, 1 to 4 an object of each shape, 5 to 8 the middle of one.
    """
    middles = PATCH * (np.arange(SIZE // PATCH) + 0.5)
    labels = np.zeros((len(scenes), SIZE // PATCH, SIZE // PATCH), dtype=np.int64)
    for label, scene in zip(labels, scenes, strict=True):
        shape = SHAPES.index(scene.shape)
        for x, y, radius in layout(scene):
            label[np.hypot(middles[None, :] - x, middles[:, None] - y) < radius] = 1 + shape
            label[int(y // PATCH), int(x // PATCH)] = 1 + len(SHAPES) + shape
    return torch.from_numpy(labels).flatten(1)


def label_cells(scenes: list[Scene]) -> Tensor:
    """How much of each latent cell an object covers, in [0, 1]: (scenes, 64, 4), patch by patch."""
    side = SIZE // PATCH * CELLS
    labels = np.zeros((len(scenes), side, side), dtype=np.float32)
    for label, scene in zip(labels, scenes, strict=True):
        picture = Image.new("L", (2 * SIZE, 2 * SIZE))
        draw = ImageDraw.Draw(picture)
        for x, y, radius in layout(scene):
            corners = 2 * (np.array([x, y]) + radius * outline(scene.shape))
            draw.polygon([(float(px), float(py)) for px, py in corners], fill=255)
        label[:] = np.asarray(picture.reduce(2 * SIZE // side), dtype=np.float32) / 255
    folded = labels.reshape(len(scenes), SIZE // PATCH, CELLS, SIZE // PATCH, CELLS).swapaxes(2, 3)
    return torch.from_numpy(folded.reshape(len(scenes), -1, CELLS**2).copy())
