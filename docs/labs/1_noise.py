# %% [markdown]
# # Lab 1: noise
# Three gaps beside page 1 of the lesson. Fill a gap, run the cell below it: the check compares your
# function with the library's.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "ddpm_basics").is_dir())
sys.path.insert(0, str(root))
if importlib.util.find_spec("denoising_diffusion_pytorch") is None:  # on Colab, for example
    packages = ["-r", str(root / "requirements.txt")]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *packages], check=True)

# %%
import matplotlib.pyplot as plt
import torch

from ddpm_basics.fabrics.drawing import render
from ddpm_basics.images import from_picture
from ddpm_basics.labs import check
from ddpm_basics.model import build_diffusion

diffusion = build_diffusion(dim=8, dim_mults=(1,))  # for its schedule; no network is used here
fabrics = torch.stack([torch.from_numpy(from_picture(render(0, i))) for i in range(4)])
x_0 = fabrics * 2 - 1  # [4, 3, 64, 64] in [-1, 1]

# %% [markdown]
# ## What is left of the picture
# `betas[t]` is the share of variance that step t swaps for noise. How much of the picture's own is
# left after all steps up to t? (Equation 2; `torch` has running sums and products.)


# %%
def what_is_left(betas):
    """Return alpha-bar [T] of betas [T]."""
    # GAP equation 2
    return (1 - betas).cumprod(0)
    # END


check("what_is_left", what_is_left(diffusion.betas), diffusion.alphas_cumprod)

# %% [markdown]
# ## Any t in a single step
# The closed form, equation 3.


# %%
def q_sample(x_0, t, noise):
    """Return x_t [n, 3, 64, 64] at timesteps t [n]."""
    alpha_bar = diffusion.alphas_cumprod[t][:, None, None, None]
    # GAP equation 3
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    # END


t = torch.tensor([0, 250, 500, 999])
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
x_t = q_sample(x_0, t, noise)
check("q_sample", x_t, diffusion.q_sample(x_0, t, noise))

# %%
figure, axes = plt.subplots(1, 4, figsize=(8, 2.4))
for place, image, level in zip(axes, x_t, t, strict=True):
    place.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0))
    place.set(title=f"t = {level}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Half picture, half noise
# At which timestep are they equally strong, that is, where is the signal-to-noise ratio nearest to
# 1? Page 1 says it for sigmoid. And under the linear schedule?


# %%
def half_way(alphas_cumprod):
    """Return the timestep, a whole number, at which the SNR is nearest to 1."""
    # GAP a line
    return (alphas_cumprod - 0.5).abs().argmin().item()
    # END


linear = build_diffusion(dim=8, dim_mults=(1,), beta_schedule="linear")
check("half_way", half_way(diffusion.alphas_cumprod), 499)
print("under the linear schedule:", half_way(linear.alphas_cumprod))
