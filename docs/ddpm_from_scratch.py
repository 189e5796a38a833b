# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "numpy>=1.26", "pillow>=10.1"]
# ///
"""Denoising diffusion from scratch, in the order of the paper's equations.

    python ddpm_from_scratch.py --data african_fabric_processed     five minutes on two CPU cores

One file, plain PyTorch: the noise schedule, q_sample, the loss, p_sample, DDIM, a small U-Net
with a timestep embedding, and the training loop. Equations are those of Ho et al. (2020, arXiv
2006.11239) and Song et al. (2020, arXiv 2010.02502). Writes from_scratch.json (settings, times
and the loss curve), from_scratch.pt (the weights) and from_scratch.png (new fabrics).
"""

# %% [markdown]
# # DDPM from scratch
# Everything a denoising diffusion model needs, in the order of the equations. Images are tensors
# `[n, 3, h, w]` in [-1, 1]; `t` is a tensor `[n]` of whole numbers from 0 to T - 1, where index 0
# is already one step noised.

# %%
from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

IMAGE_SIZE = 16  # pixels, both sides
WIDTH = 48  # channels of the U-Net at full size
TIMESTEPS = 1000  # T
BATCH_SIZE = 32  # images per step
TRAIN_STEPS = 2000  # optimizer steps
LEARNING_RATE = 2e-3  # at its peak; it rises for 100 steps and falls to zero along a cosine
EMA_DECAY = 0.995  # of the averaged weights that draw the samples
RANDOM_SEED = 0

# %% [markdown]
# ## 1. The noise schedule
# `betas[t]` is the share of variance that step t replaces by noise; `alphas_cumprod[t]`, the
# product of all (1 - beta) so far, is the share of the signal's variance that is left.


# %%
def sigmoid_schedule(timesteps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return betas [T] and alphas_cumprod [T] of the sigmoid schedule (arXiv 2212.11972)."""
    s = torch.linspace(-3, 3, timesteps + 1, dtype=torch.float64)
    curve = torch.sigmoid(-s)
    curve = (curve - curve[-1]) / (curve[0] - curve[-1])  # from exactly 1 to exactly 0
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return betas.float(), (1 - betas).cumprod(0).float()


def at(values: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Look up values[t] and shape it [n, 1, 1, 1], to multiply images with."""
    return values[t][:, None, None, None]


# %% [markdown]
# ## 2. Forward: any noise level in one jump (equation 4)


# %%
def q_sample(x_0, t, noise, alphas_cumprod):
    """Draw x_t ~ q(x_t | x_0): the image fades and the noise grows, total variance kept."""
    a = at(alphas_cumprod, t)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


# %% [markdown]
# ## 3. The loss (equation 14)
# All of the variational bound comes down to this: look at x_t, guess the noise, be judged by the
# squared error.


# %%
def simple_loss(model, x_0, t, noise, alphas_cumprod):
    """L_simple: the mean squared error of the guessed noise."""
    return F.mse_loss(model(q_sample(x_0, t, noise, alphas_cumprod), t), noise)


# %% [markdown]
# ## 4. Reverse: one ancestral step (equations 7 and 15, algorithm 2)


# %%
def predict_x_0(model, x_t, t, alphas_cumprod):
    """Solve equation 4 for x_0 with the guessed noise; pixels cannot leave [-1, 1]."""
    a = at(alphas_cumprod, t)
    return ((x_t - (1 - a).sqrt() * model(x_t, t)) / a.sqrt()).clamp(-1, 1)


def p_sample(model, x_t, t, noise, betas, alphas_cumprod):
    """Draw x_(t-1) from the posterior q(x_(t-1) | x_t, x_0) at the guessed x_0."""
    beta, a = at(betas, t), at(alphas_cumprod, t)
    a_prev = a / (1 - beta)
    x_0 = predict_x_0(model, x_t, t, alphas_cumprod)
    mean = (a_prev.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - a_prev) * x_t) / (1 - a)
    variance = (1 - a_prev) / (1 - a) * beta  # beta-tilde
    last = (t == 0)[:, None, None, None]
    return torch.where(last, x_0, mean + variance.clamp(min=0).sqrt() * noise)


# %% [markdown]
# ## 5. DDIM: the same network, no noise, few steps (Song 2020, equation 12 with sigma = 0)


# %%
@torch.no_grad()
def ddim_sample(model, x_T, steps, alphas_cumprod):
    """Walk from the noise x_T to images in [-1, 1] in `steps` network evaluations."""
    times = torch.linspace(-1, len(alphas_cumprod) - 1, steps + 1).int().tolist()[::-1]
    x_t = x_T
    for now, then in itertools.pairwise(times):
        t = torch.full((len(x_T),), now)
        x_0 = predict_x_0(model, x_t, t, alphas_cumprod)
        if then < 0:
            return x_0
        a = alphas_cumprod[now]
        noise = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
        x_t = q_sample(x_0, torch.full_like(t, then), noise, alphas_cumprod)


# %% [markdown]
# ## 6. A small U-Net
# The network has to know how noisy its input is, so t enters every block: as sines and cosines of
# many wavelengths, turned into one scale and one shift per channel.


# %%
def timestep_embedding(t, dim):
    """Turn t [n] into [n, dim]: sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    frequencies = torch.exp(torch.arange(dim // 2) * (-math.log(10_000) / (dim // 2 - 1)))
    angles = t[:, None] * frequencies[None]
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RMSNorm(nn.Module):
    """Scale the channel vector of each pixel to length sqrt(channels), then by learned gains."""

    def __init__(self, dim):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.g * self.g.shape[1] ** 0.5


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; t scales and shifts what is between them."""

    def __init__(self, dim_in, dim_out, time_dim):
        super().__init__()
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, dim_out * 2))
        self.conv1, self.norm1 = nn.Conv2d(dim_in, dim_out, 3, padding=1), RMSNorm(dim_out)
        self.conv2, self.norm2 = nn.Conv2d(dim_out, dim_out, 3, padding=1), RMSNorm(dim_out)
        self.shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x, time_embedding):
        scale, shift = self.time(time_embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift)
        return self.shortcut(x) + F.silu(self.norm2(self.conv2(h)))


class UNet(nn.Module):
    """Three sizes down and up again, with skip connections between equal sizes."""

    def __init__(self, dim):
        super().__init__()
        self.dim, time_dim = dim, dim * 4
        self.time = nn.Sequential(
            nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim)
        )
        self.stem = nn.Conv2d(3, dim, 3, padding=1)
        widths = [(dim, dim), (dim, dim * 2), (dim * 2, dim * 4)]
        self.down = nn.ModuleList([ResBlock(a, b, time_dim) for a, b in widths])
        self.middle = ResBlock(dim * 4, dim * 4, time_dim)
        self.up = nn.ModuleList([ResBlock(b * 2, a, time_dim) for a, b in reversed(widths)])
        self.head = nn.Conv2d(dim, 3, 1)

    def forward(self, x, t):
        time_embedding = self.time(timestep_embedding(t, self.dim))
        x, skips = self.stem(x), []
        for block in self.down:
            x = block(x if not skips else F.avg_pool2d(x, 2), time_embedding)
            skips.append(x)
        x = self.middle(x, time_embedding)
        for block in self.up:
            x = block(torch.cat((x, skips.pop()), dim=1), time_embedding)
            x = F.interpolate(x, scale_factor=2) if skips else x
        return self.head(x)


# %% [markdown]
# ## 7. The training loop (algorithm 1)


# %%
def load_images(folder: str, size: int) -> torch.Tensor:
    """Read all pictures of a folder and its subfolders as [n, 3, size, size] in [-1, 1]."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in {".png", ".jpg"})
    if not files:
        raise SystemExit(
            f"Error: no pictures in {folder}: python -m ddpm_basics.fabrics draws some."
        )
    small = [Image.open(f).convert("RGB").resize((size, size), Image.Resampling.BOX) for f in files]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(model, images, steps, batch_size, learning_rate=LEARNING_RATE):
    """Train in place; return (averaged model, losses [steps])."""
    _, alphas_cumprod = sigmoid_schedule(TIMESTEPS)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    plan = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, steps, pct_start=min(0.3, 100 / steps))  # fmt: skip
    losses = []
    for step in range(steps):
        x_0 = images[torch.randint(len(images), (batch_size,))]
        x_0 = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, x_0, x_0.flip(-1))
        t = torch.randint(TIMESTEPS, (batch_size,))
        loss = simple_loss(model, x_0, t, torch.randn_like(x_0), alphas_cumprod)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"step {step + 1:5,}  loss {np.mean(losses[-100:]):.4f}", flush=True)
    return average.module, losses


# %% [markdown]
# ## 8. All together


# %%
def save_sheet(images: torch.Tensor, path: str, columns: int = 8, zoom: int = 6) -> None:
    """Save images [n, 3, h, w] in [-1, 1] as one picture."""
    n, _, height, width = images.shape
    rows = images.reshape(n // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = rows.reshape(n // columns * height, columns * width, 3).add(1).mul(127.5)
    sheet = Image.fromarray(pixels.round().clamp(0, 255).byte().numpy())
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)


def main(argv: list[str] | None = None) -> None:
    """Train on a folder of pictures, then draw 16 new ones with 50 DDIM steps."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="african_fabric_processed", help="folder of pictures")
    parser.add_argument("--steps", type=int, default=TRAIN_STEPS, help="optimizer steps")
    parser.add_argument("--dim", type=int, default=WIDTH, help="channels")
    options = parser.parse_args(argv)

    torch.manual_seed(RANDOM_SEED)
    images = load_images(options.data, IMAGE_SIZE)
    model = UNet(options.dim)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{len(images):,} images, {parameters:,} parameters, {options.steps:,} steps")
    started, processor = time.perf_counter(), time.process_time()
    average, losses = train(model, images, options.steps, BATCH_SIZE)
    training = time.perf_counter() - started
    processor = time.process_time() - processor  # seconds of all threads together

    _, alphas_cumprod = sigmoid_schedule(TIMESTEPS)
    x_T = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE)
    started = time.perf_counter()
    save_sheet(ddim_sample(average, x_T, 50, alphas_cumprod), "from_scratch.png")
    sampling = time.perf_counter() - started
    torch.save(average.state_dict(), "from_scratch.pt")
    facts = {"parameters": parameters, "images": len(images), "steps": options.steps,
             "batch_size": BATCH_SIZE, "image_size": IMAGE_SIZE,
             "training_seconds": training, "processor_seconds": processor,
             "sampling_seconds": sampling,
             "threads": torch.get_num_threads(), "losses": losses}  # fmt: skip
    Path("from_scratch.json").write_text(json.dumps(facts))
    print(f"Wrote from_scratch.png, .pt and .json; {training:.0f} s of training.")


if __name__ == "__main__":
    main()
