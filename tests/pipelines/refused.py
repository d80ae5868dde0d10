"""Classes that cannot be trained, and what the sampler says of them."""

from __future__ import annotations

import functools
from typing import Any

import diffusers as df
import tiny

from difftune.quirks import QUIRKS, quirk_of
from pipelines.parts import case, exported

#: Classes that are refused for their scheduler.
SCHEDULERS: dict[str, Any] = {
    "ShapEPipeline": df.HeunDiscreteScheduler,
    "ShapEImg2ImgPipeline": df.HeunDiscreteScheduler,
    "KarrasVePipeline": df.KarrasVeScheduler,
    "RePaintPipeline": df.RePaintScheduler,
    "ScoreSdeVePipeline": df.ScoreSdeVeScheduler,
    "VQDiffusionPipeline": functools.partial(df.VQDiffusionScheduler, num_vec_classes=8),
}


def stand_in(name: str, scheduler: Any = None) -> Any:
    """A pipeline by the class's name: refusals look at the class and the scheduler, before anything runs."""
    base = tiny.sd_pipeline()
    pipe = type(name, (type(base),), {})(**base.components)
    if scheduler is not None:
        pipe.scheduler = scheduler()
    return pipe


for name in exported():
    if reason := quirk_of(name).refuse:
        key = max((key for key in QUIRKS if name.startswith(key)), key=len)
        case(name, family=key, refused=reason)(functools.partial(stand_in, name))
for name, scheduler in SCHEDULERS.items():
    case(name, family=name, refused="its steps are not single Gaussian")(functools.partial(stand_in, name, scheduler))
