"""The autoencoder that both generators share: 64 x 64 pictures to 4 x 16 x 16 latents and back."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from difftune.zoo.training import fit, half_precision
from difftune.zoo.world import SIZE, render_scenes

STEPS = 3800
BATCH = 8
SCENES = 20_000
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-3
SEED = 1


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of 0.65 M parameters; two halvings of the side, so ``vae_scale_factor`` is 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )


def to_model(pictures: np.ndarray) -> Tensor:
    """8-bit pictures (N, 3, H, W) -> float tensor in [-1, 1], the range that autoencoders work in."""
    return torch.from_numpy(pictures).float() / 127.5 - 1


def train_autoencoder(steps: int = STEPS) -> AutoencoderKL:
    """Trains the autoencoder and sets its scaling factor so that latents have unit variance."""
    torch.manual_seed(SEED)
    vae = new_autoencoder()
    _, pictures = render_scenes(min(SCENES, BATCH * steps), SEED)
    rng = np.random.default_rng(SEED)

    def loss_of_step(step: int) -> Tensor:
        x = to_model(pictures[rng.integers(len(pictures), size=BATCH)])
        with half_precision():
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + error.pow(2).mean() + KL_WEIGHT * kl

    fit(loss_of_step, [vae], label="autoencoder", steps=steps, learning_rate=LEARNING_RATE, weight_decay=0.0)
    vae.eval().requires_grad_(False)
    spread = encode(vae, pictures[:1000]).std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, batch: int = 100) -> Tensor:
    """Posterior means (N, 4, H/4, W/4) of 8-bit pictures (N, 3, H, W), without the scaling factor."""
    chunks = [pictures[start : start + batch] for start in range(0, len(pictures), batch)]
    return torch.cat([vae.encode(to_model(chunk)).latent_dist.mean for chunk in chunks])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 100) -> Tensor:
    """Pictures (N, 3, 4h, 4w) in [0, 1] of unscaled latents (N, 4, h, w)."""
    pictures = torch.cat([vae.decode(chunk).sample for chunk in latents.split(batch)])
    return (pictures / 2 + 0.5).clamp(0, 1)
