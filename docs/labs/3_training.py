# %% [markdown]
# # Lab 3: training
# Two gaps beside page 3 of the lesson: the loss, and the question whether a sample is a copy.

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

torch.manual_seed(0)
diffusion = build_diffusion(dim=16, dim_mults=(1, 2), image_size=16)  # tiny, and untrained
drawn = [from_picture(render(0, i, size=16)) for i in range(240)]
fabrics = torch.stack([torch.from_numpy(picture) for picture in drawn])
pictures = fabrics * 2 - 1  # [240, 3, 16, 16] in [-1, 1]

# %% [markdown]
# ## The loss
# Noise a picture to t, ask the network, compare its answer with v. Ho's simple loss counts the
# error of v alpha-bar times, which makes it the error of the noise.


# %%
def simple_loss(x_0, t, noise):
    """Return the squared error of v, alpha-bar times, averaged over pixels and pictures."""
    x_t = diffusion.q_sample(x_0, t, noise)
    v = diffusion.predict_v(x_0, t, noise)
    weight = diffusion.alphas_cumprod[t]
    # GAP the error of diffusion.model(x_t, t), per picture, weighted, averaged
    error = (diffusion.model(x_t, t) - v).square().mean((1, 2, 3))
    return (weight * error).mean()
    # END


x_0, t = pictures[:8], torch.arange(0, 1000, 125)
noise = torch.randn(x_0.shape)
check("simple_loss", simple_loss(x_0, t, noise), diffusion.p_losses(x_0, t, noise))

# %% [markdown]
# ## Training
# Three hundred steps of the tiny network, half a minute. Does the loss do what page 3 says?

# %%
optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
losses = []
for _ in range(300):
    x_0 = pictures[torch.randint(len(pictures), (16,))]
    loss = simple_loss(x_0, torch.randint(1000, (16,)), torch.randn(x_0.shape))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert sum(losses[-50:]) < sum(losses[:50]), "the loss has not fallen: look at its gap again"

# %%
plt.figure(figsize=(6, 2.4))
plt.plot(losses, lw=0.8)
plt.xlabel("step")
plt.ylabel("simple loss")
plt.yscale("log")
plt.show()

# %% [markdown]
# ## Is it a copy?
# A sample is a copy if its nearest training picture is less than a third as far away as the second
# nearest.


# %%
def is_copy(distances):
    """Say for each sample whether it is a copy: distances [samples, pictures] to bool [samples]."""
    # GAP two lines; topk helps
    nearest, second = distances.topk(2, largest=False).values.unbind(1)
    return nearest < second / 3
    # END


some = torch.tensor([[0.5, 0.6, 0.9], [0.9, 0.1, 0.4], [0.2, 0.8, 0.5]])
check("is_copy", is_copy(some), torch.tensor([False, True, False]))
almost = pictures[:5] + 0.01 * torch.randn(5, 3, 16, 16)
print("stolen fabrics:", is_copy(torch.cdist(almost.flatten(1), pictures.flatten(1))).tolist())
