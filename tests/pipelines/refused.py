"""Classes that cannot be trained."""

from __future__ import annotations

from typing import Any

import diffusers as df
import tiny

from pipelines.parts import case


@case("LTX2Pipeline", family="LTX", refused="steps copies of its scheduler")
def _() -> Any:
    return refused("LTX2Pipeline")


@case("SkyReelsV2DiffusionForcingPipeline", family="SkyReels", refused="steps copies of its scheduler")
def _() -> Any:
    return refused("SkyReelsV2DiffusionForcingPipeline")


@case("HeliosPipeline", family="Helios", refused="growing stages of latents")
def _() -> Any:
    return refused("HeliosPipeline")


@case("ShapEPipeline", family="Shap-E", refused="scheduler HeunDiscreteScheduler: its steps are not single Gaussian")
def _() -> Any:
    return refused("ShapEPipeline", df.HeunDiscreteScheduler())


@case("StableDiffusionAttendAndExcitePipeline", family="Stable Diffusion", refused="along gradients of the denoiser")
def _() -> Any:
    return refused("StableDiffusionAttendAndExcitePipeline")


@case("StableDiffusionPanoramaPipeline", family="Stable Diffusion", refused="steps copies of its scheduler")
def _() -> Any:
    return refused("StableDiffusionPanoramaPipeline")


@case("LLaDA2Pipeline", family="LLaDA", refused="samples discrete tokens")
def _() -> Any:
    return refused("LLaDA2Pipeline")


def refused(name: str, scheduler: Any = None) -> Any:
    """A stand-in by the class's name: refusals look at the class and the scheduler, before anything runs."""
    pipe = type(name, (tiny.sd_pipeline().__class__,), {})(**tiny.sd_pipeline().components)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe
