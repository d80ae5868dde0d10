"""The rows of the matrix test, one module a group of families; importing them fills :data:`CASES`, in this order."""

from pipelines import stable_diffusion, sdxl, sd3, flux, images, pixels, kandinsky, video, audio, refused  # isort: skip
from pipelines.parts import CASES, PROMPTS, Case

__all__ = ["CASES", "PROMPTS", "Case", "audio", "flux", "images", "kandinsky", "pixels", "refused", "sd3", "sdxl"]
__all__ += ["stable_diffusion", "video"]
