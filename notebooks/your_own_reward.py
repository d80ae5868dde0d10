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
# # Write your own reward and train on it
#
# A reward is a function of images and prompts. Register it with a decorator, and it is a name like any other: for
# `build_reward`, for the YAML of the command line (`plugins: [my_rewards.py]`), and for the trainer.

# %%
import os

import matplotlib.pyplot as plt
import torch

import difftune as dt

torch.set_flush_denormal(True)
FAST = os.environ.get("DIFFTUNE_FAST") == "1"


@dt.reward("blueness", differentiable=True)
def blueness(images, prompts, margin=0.0):  # (B, 3, H, W) in [0, 1], B strings -> (B,)
    """How much bluer than red and green the picture is, on average; ``margin`` is subtracted."""
    return images[:, 2].mean((1, 2)) - images[:, :2].mean((1, 2, 3)) - margin


dt.list_rewards()

# %% [markdown]
# What a scorer returns is checked: its shape, its type, and that it is finite. A mistake is named at once.

# %%
reward = dt.build_reward("blueness", margin=0.1)
reward(torch.rand(4, 3, 64, 64), ["a", "b", "c", "d"])

# %%
try:
    dt.build_reward("blueness")(torch.rand(4, 64, 64, 3), ["a", "b", "c", "d"])
except ValueError as error:
    print(error)

# %% [markdown]
# Rewards add up, with weights; every part is logged under its own name.

# %%
both = dt.build_reward([{"name": "blueness", "weight": 10.0}, "jpeg_compressibility"])
both(torch.rand(2, 3, 64, 64), ["a", "b"])

# %% [markdown]
# ## Training on it

# %%
policy = dt.Policy(dt.load_pipeline("difftune/tiny-sd"), lora=dt.LoraConfig(rank=8))
sampler = dt.Sampler(policy, steps=10, guidance_scale=1.0, eta=1.0, batch_size=32)
prompts = ["", "two stars", "a circle", "a dotted background"]
before = sampler.rollout(prompts * 4, seed=3)

trainer = dt.Trainer(
    policy=policy,
    sampler=sampler,
    algorithm=dt.build_algorithm("ddpo", lr=5e-3, normalize="batch", timestep_fraction=0.5),
    reward="blueness",
    prompts=prompts,
    epochs=3 if FAST else 30,
    prompts_per_epoch=16,
    samples_per_prompt=4,
    micro_batch=32,
)
curve = [metrics["reward/mean"] for metrics in trainer]
assert len(curve) == trainer.config.epochs and torch.tensor(curve).isfinite().all()
plt.plot(range(1, len(curve) + 1), curve)
plt.xlabel("epoch")
plt.ylabel("blueness")
plt.show()

# %% [markdown]
# The same noise under the base model (first row) and the tuned one (second row):

# %%
after = sampler.rollout(prompts * 4, seed=3)
assert (after.images != before.images).flatten(1).any(1).all()  # every picture has changed
print("blueness before", float(blueness(before.images, prompts * 4).mean()))
print("blueness after ", float(blueness(after.images, prompts * 4).mean()))
figure, axes = plt.subplots(2, 8, figsize=(12, 3))
for column in range(8):
    for row, images in enumerate((before.images, after.images)):
        axes[row, column].imshow(images[column].permute(1, 2, 0))
        axes[row, column].axis("off")
figure.tight_layout()
plt.show()
