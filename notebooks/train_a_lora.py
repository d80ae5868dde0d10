# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train a LoRA by reward, and generate with it
#
# A base model, a reward, an algorithm and prompts: that is all a run is made of. Here the model is the embedded
# `difftune/tiny-sd` (a real `StableDiffusionPipeline` of 5 M parameters, so a laptop's CPU will do), the reward is the
# size of the picture as a JPEG file (smaller is better), and the algorithm is DDPO. Put any diffusers pipeline in its
# place and the cells stay the same.

# %%
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import difftune as dt

torch.set_flush_denormal(True)  # tiny numbers slow CPUs down
FAST = os.environ.get("DIFFTUNE_FAST") == "1"  # a shorter run, for the test suite

# %% [markdown]
# ## The pieces
#
# The **policy** is the pipeline with a LoRA adapter on its denoiser. The **sampler** drives the pipeline's own
# `__call__` and records how each picture came about.

# %%
pipe = dt.load_pipeline("difftune/tiny-sd")
policy = dt.Policy(pipe, lora=dt.LoraConfig(rank=8))
sampler = dt.Sampler(policy, steps=10, guidance_scale=1.0, eta=1.0, batch_size=32)

prompts = ["", "a dotted background", "two stars", "a red circle"]
before = sampler.rollout(prompts * 4, seed=7)
before.images.shape, before.log_probs.shape

# %% [markdown]
# A **reward** maps images in [0, 1] and prompts to one score per sample. This one is minus the kilobytes.

# %%
reward = dt.build_reward("jpeg_compressibility")
reward(before.images, before.prompts).total

# %% [markdown]
# ## Training
#
# The trainer is a generator: it yields one record per epoch, and what happens with it is up to you. Before the first
# update it replays a rollout and verifies that every probability ratio is exactly 1.
#
# A run has a folder of its own, named by the time: run the notebook again and there is another.

# %%
out = Path("runs", time.strftime("notebook-lora-%Y%m%d-%H%M%S"))
trainer = dt.Trainer(
    policy=policy,
    sampler=sampler,
    algorithm=dt.build_algorithm("ddpo", lr=5e-3, normalize="batch", timestep_fraction=0.5),
    reward=reward,
    prompts=prompts,
    epochs=3 if FAST else 30,
    prompts_per_epoch=16,
    samples_per_prompt=4,
    micro_batch=32,
    out=out,
)
history = []
for metrics in trainer:
    history.append(metrics)
    print(f"epoch {metrics.epoch:3d}  reward {metrics['reward/mean']:.3f}  grad norm {metrics['grad_norm']:.2g}")
assert np.isfinite([m["reward/mean"] for m in history]).all()
trainer.parity

# %%
plt.plot([m.epoch for m in history], [m["reward/mean"] for m in history])
plt.xlabel("epoch")
plt.ylabel("reward: minus JPEG kB")
plt.show()

# %% [markdown]
# ## The artifact
#
# `save` writes a LoRA file that stock diffusers loads, beside a report. From here on difftune is not needed.

# %%
files = trainer.save()
assert (out / "adapter/pytorch_lora_weights.safetensors").is_file()
[str(file) for file in files]

# %%
from diffusers import StableDiffusionPipeline

from difftune.zoo import model_path

stock = StableDiffusionPipeline.from_pretrained(model_path("difftune/tiny-sd"))
stock.set_progress_bar_config(disable=True)


def draw(pipeline):
    """Sixteen pictures, the same noise every time."""
    generator = [torch.Generator().manual_seed(i) for i in range(16)]
    return pipeline(prompts * 4, num_inference_steps=20, guidance_scale=1.0, generator=generator).images


base = draw(stock)
stock.load_lora_weights(str(out / "adapter"))
tuned = draw(stock)
# The file changes what the stock pipeline draws.
assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(base, tuned, strict=True))

# %% [markdown]
# Base above, tuned below: same prompts, same noise.

# %%
figure, axes = plt.subplots(4, 8, figsize=(12, 6))
for column in range(8):
    for row, picture in enumerate((base[column], base[8 + column], tuned[column], tuned[8 + column])):
        axes[row, column].imshow(picture)
        axes[row, column].axis("off")
figure.tight_layout()
plt.show()
