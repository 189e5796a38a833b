"""Tiny networks, the library's own objects: built, taught, saved by no function of ours."""

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet

SIZE = 16  # pixels per side


def make_diffusion(objective="pred_v", beta_schedule="sigmoid", channels=3, timesteps=1000, **more):
    """The same untrained network each time."""
    torch.manual_seed(1)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=channels, flash_attn=False)
    return GaussianDiffusion(unet, image_size=SIZE, timesteps=timesteps, objective=objective,
                             beta_schedule=beta_schedule, **more)  # fmt: skip


def teach(diffusion):
    """Show it colour ramps until its images differ, and not all of x_0 is clipped any more."""
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    ramp = torch.linspace(0, 1, SIZE)
    for _ in range(60):
        colors, slopes = torch.rand(8, 3, 1, 1), torch.rand(8, 1, 1, 1)
        loss = diffusion((colors + slopes * ramp) / 2 * torch.ones(SIZE, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.6, "it has learned nothing"
    return diffusion.eval()


def labelled(state):
    """Give a weight file a table of three labels that make a difference."""
    table = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    return {**state, "labels": {"names": ["a", "b", "c/d"], "embedding": table}}


def bundled(diffusion, **changes):
    """The format of models/ddpm_african_fabrics.pt: parameters in fp16, buffers in fp32."""
    parameters = {name for name, _ in diffusion.named_parameters()}
    ema = {
        f"ema_model.{name}": value.half() if name in parameters else value
        for name, value in diffusion.state_dict().items()
    }
    config = {
        "objective": diffusion.objective, "schedule": "sigmoid",
        "timesteps": diffusion.num_timesteps, "image_size": SIZE, "channels": diffusion.channels,
        "dim": 8, "dim_mults": [1, 2],
    }  # fmt: skip
    return {"step": 1234, "version": "2.3.4", "ema": ema, "config": config, **changes}
