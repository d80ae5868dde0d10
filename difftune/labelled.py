"""Labelled pictures in place of rollouts: their latents, and the denoising steps that could have drawn them.

What an algorithm of ``samples`` evidence trains on is a finished sample, which a picture is once the pipeline's VAE has
encoded it. What one of ``transitions`` evidence trains on are steps that nobody recorded: they are drawn given the
picture, by the sampler's own dynamics with the true clean sample in place of a prediction. With DDPM's noise these are
the exact posterior steps of the forward process, the q(x_{t-1} | x_t, x_0) by which Diffusion-DPO's derivation (Wallace
et al. 2023, section 4) replaces the reverse process.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from difftune.algorithm import Algorithm
from difftune.preferences import StoredPicture
from difftune.sampler import Sampler
from difftune.transition import working
from difftune.types import RewardOutput, SampleKey, Trajectory, UserError

#: The label of samples that the policy draws beside labelled pictures.
DRAWN = 0.0


class LabelledPictures:
    """Turns records of labelled pictures into what a rollout would have given.

    Args:
        sampler: whose pipeline encodes and steps.
        algorithm: says which evidence is needed.
        per_prompt: samples per record; those beyond its pictures are drawn.
    """

    def __init__(self, sampler: Sampler, algorithm: Algorithm, per_prompt: int) -> None:
        self._sampler = sampler
        self._steps = algorithm.evidence == "transitions"
        self._per_prompt = per_prompt
        self._model: Trajectory | None = None

    def scores(self, metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        """Return the labels ``(B,)`` of an epoch's samples; what is drawn has the label 0."""
        labels = [self._nth(record["labels"], index, DRAWN) for index, record in enumerate(metadata)]
        return RewardOutput(torch.tensor(labels, dtype=torch.float32))

    def groups(self, count: int) -> list[str]:
        """Return a name per sample that is shared by the samples of one record, and by no others."""
        return [f"record {index // self._per_prompt}" for index in range(count)]

    def trajectory(
        self,
        rows: Sequence[int],
        prompts: Sequence[str],
        keys: Sequence[SampleKey],
        metadata: Sequence[Mapping[str, Any]],
    ) -> Trajectory:
        """Return the samples ``rows`` of an epoch, without images.

        Args:
            rows: indices into the epoch's samples.
            prompts, keys, metadata: of all of the epoch's samples; see :func:`~difftune.preferences.load_preferences`.

        Raises:
            UserError: a picture cannot be read, or the pipeline cannot encode it.
        """
        pictures = {row: self._nth(metadata[row]["images"], row, None) for row in rows}
        given = [row for row in rows if pictures[row] is not None]
        drawn = [row for row in rows if pictures[row] is None]
        parts = []
        for start in range(0, len(given), self._sampler.batch_size):
            part = given[start : start + self._sampler.batch_size]
            texts, names = tuple(prompts[row] for row in part), tuple(keys[row] for row in part)
            model = self._like(texts[0], names[0])
            size = _picture_size(model)
            images = torch.stack([read_picture(pictures[row], size, metadata[row]["where"]) for row in part])
            latents = encode(self._sampler, images, tuple(model.states.shape[2:]))
            parts.append(self._past(latents, texts, names, model))
        if drawn:
            rollout = self._sampler.rollout(
                [prompts[row] for row in drawn], keys=[keys[row] for row in drawn], decode=False
            )
            parts.append(rollout if self._steps else finished(rollout.states[:, -1], rollout.prompts, rollout.keys))
        place = {row: number for number, row in enumerate([*given, *drawn])}
        return Trajectory.cat(parts).select([place[row] for row in rows])

    def _nth(self, values: Sequence[Any], row: int, otherwise: Any) -> Any:
        number = row % self._per_prompt
        return values[number] if number < len(values) else otherwise

    def _like(self, prompt: str, key: SampleKey) -> Trajectory:
        """Return one rollout, which tells the size of pictures and latents and lets steps be skipped from then on."""
        if self._model is None:
            self._model = self._sampler.rollout([prompt], keys=[key])
        return self._model

    def _past(
        self, latents: Tensor, prompts: tuple[str, ...], keys: tuple[SampleKey, ...], model: Trajectory
    ) -> Trajectory:
        if not self._steps:
            return finished(latents, prompts, keys)
        return self._sampler.retrace(latents, prompts, keys, model.num_steps)


def finished(latents: Tensor, prompts: tuple[str, ...], keys: tuple[SampleKey, ...]) -> Trajectory:
    """Return a trajectory of which nothing is known but its end, ``(B, *latent)``."""
    return Trajectory(
        states=torch.stack([latents, latents], 1),
        times=torch.zeros(1),
        log_probs=torch.zeros(len(latents), 1, device=latents.device),
        stochastic=torch.zeros(1, dtype=torch.bool),
        prompts=prompts,
        keys=keys,
    )


def read_picture(picture: Path | StoredPicture, size: tuple[int, int], where: str) -> Tensor:
    """Return a picture ``(3, H, W)`` in [0, 1], cut to the middle in the shape of ``size`` (H, W) and resized to it.

    Raises:
        UserError: it is no image file; the message names its record.
    """
    source: Any = picture if isinstance(picture, Path) else io.BytesIO(picture.read() or b"")
    try:
        with Image.open(source) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: picture {picture} cannot be read ({error}); expected an image file") from None
    fitted = ImageOps.fit(upright, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).movedim(-1, 0).float() / 255


def encode(sampler: Sampler, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return pictures ``(B, 3, H, W)`` in [0, 1] as latents ``(B, *shape)``, in the form the scheduler steps.

    A pipeline of the user's own may have a method ``difftune_encode`` that does it. Otherwise its VAE does: the mean of
    the posterior, shifted and scaled by the VAE's own constants, packed by the pipeline's ``_pack_latents`` if it has
    one.

    Raises:
        UserError: the pipeline has no such VAE, or its latents have another form.
    """
    pipe = sampler.policy.pipe
    name = type(pipe).__name__
    own = getattr(pipe, "difftune_encode", None)
    if own is not None:
        return own(images.to(sampler.policy.device))
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(vae, "encode"):
        raise UserError(f"algorithm.data: {name} has no VAE to encode pictures with; give it a method difftune_encode")
    latents = _encoded(vae, images)
    if latents is not None and tuple(latents.shape[1:]) != shape and hasattr(pipe, "_pack_latents"):
        try:
            latents = pipe._pack_latents(latents, *latents.shape)
        except (TypeError, ValueError, RuntimeError):
            latents = None
    if latents is None or tuple(latents.shape[1:]) != shape:
        raise UserError(
            f"algorithm.data: pictures cannot be encoded for {name}, whose latents have the shape {shape}; give the "
            "pipeline a method difftune_encode"
        )
    return latents


@torch.no_grad()
def _encoded(vae: Any, images: Tensor) -> Tensor | None:
    try:
        out = vae.encode((2 * images - 1).to(vae.device, vae.dtype))
    except (TypeError, ValueError, RuntimeError):
        return None
    latents = working(out.latents if hasattr(out, "latents") else out.latent_dist.mode())
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is not None and std is not None:
        form = (1, -1, *[1] * (latents.ndim - 2))
        constants = (torch.tensor(values).view(form).to(latents) for values in (mean, std))
        shift, spread = constants
        return (latents - shift) * scale / spread
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * scale


def _picture_size(model: Trajectory) -> tuple[int, int]:
    images = model.images
    if images is None or images.ndim != 4 or images.shape[1] != 3:
        raise UserError("algorithm.data: labelled pictures need a pipeline that draws pictures, not videos or sound")
    return int(images.shape[-2]), int(images.shape[-1])
