"""The U-Net and the diffusion process around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet


def build_diffusion(
    dim: int = 64,
    dim_mults: Sequence[int] = (1, 2, 4, 8),
    channels: int = 3,
    image_size: int = 64,
    timesteps: int = 1000,
    objective: str = "pred_v",
    beta_schedule: str = "sigmoid",
    weights_on: str = "cpu",
) -> GaussianDiffusion:
    """Build the U-Net and the diffusion process around it, untrained.

    Every choice is passed on by name: the objective is no matter of shapes, so a wrong one gives
    garbage without an error. weights_on="meta" leaves out the random weights: half a second less,
    where a file replaces them anyway.
    """
    with torch.device(weights_on):
        unet = Unet(dim=dim, dim_mults=tuple(dim_mults), channels=channels, flash_attn=False)
    return GaussianDiffusion(
        unet,
        image_size=image_size,
        timesteps=timesteps,
        objective=objective,
        beta_schedule=beta_schedule,
    )
