# %% [markdown]
# # Lab 2: denoising
# Three gaps beside page 2 of the lesson. With them filled you have a sampler of your own, and it
# draws from the lesson's weights.

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
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

from ddpm_basics.labs import check
from ddpm_basics.model import LabelledUnet
from ddpm_basics.sampling import even_times, noise_levels, starting_noise
from ddpm_basics.weight_files import load_weights

diffusion, facts = load_weights(root / "models" / "ddpm_african_fabrics.pt")
diffusion.eval()
alpha_bar = diffusion.alphas_cumprod
x_T, _ = starting_noise(range(4), (3, 64, 64))  # [4, 3, 64, 64]

# %% [markdown]
# ## From v to the picture
# The network answers v. What does it then believe the picture to be?


# %%
def predict_x_0(x_t, t, v):
    """Return the guess of x_0, before it is clipped, from x_t, the timestep and v."""
    # GAP equation 9, its left half
    return alpha_bar[t].sqrt() * x_t - (1 - alpha_bar[t]).sqrt() * v
    # END


some_v = torch.randn(x_T.shape, generator=torch.Generator().manual_seed(1))
times = torch.full((4,), 600)
right = diffusion.predict_start_from_v(x_T, times, some_v)
check("predict_x_0", predict_x_0(x_T, 600, some_v), right)

# %% [markdown]
# ## One step of DDIM
# Split x_t into guessed picture and guessed noise, and mix them again at an earlier time s. (The
# last step goes to s = -1, the clean picture, where alpha-bar is 1.)


# %%
def ddim_step(x_t, x_0, t, s):
    """Return x_s from x_t and the guess of x_0."""
    at_s = alpha_bar[s] if s >= 0 else torch.tensor(1.0)
    # GAP the noise that x_t and x_0 imply, then equation 15
    noise = (x_t - alpha_bar[t].sqrt() * x_0) / (1 - alpha_bar[t]).sqrt()
    return at_s.sqrt() * x_0 + (1 - at_s).sqrt() * noise
    # END


some_x_0 = torch.rand(x_T.shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
before = diffusion.q_sample(some_x_0, times, some_v)
after = diffusion.q_sample(some_x_0, torch.full((4,), 300), some_v)
check("ddim_step", ddim_step(before, some_x_0, 600, 300), after)
check("ddim_step to the end", ddim_step(after, some_x_0, 300, -1), some_x_0)

# %% [markdown]
# ## Guidance
# Ask twice, with the label and without, and exaggerate the difference by w.


# %%
def guided(without, with_label, w):
    """Return what guidance makes of the two answers: at 0 the first, at 1 the second."""
    # GAP equation 14
    return without + w * (with_label - without)
    # END


zeros, ones = torch.zeros(2), torch.ones(2)
for w in (0.0, 0.5, 1.0, 3.0):
    check(f"guided at w = {w}", guided(zeros, ones, w), w * ones)

# %% [markdown]
# ## Your own sampler
# Four fabrics from four noises, the traditions of your choice, in twenty steps: less than a minute.

# %%
network = LabelledUnet(diffusion)
wanted = ["kente", "adinkra", "wax_print", "ndebele"]
labels = torch.tensor([facts.labels.index(name) for name in wanted])
none = torch.full((4,), -1)

x_t = x_T
with torch.inference_mode():
    for t, s in pairwise(even_times(noise_levels(diffusion), 20)):  # 20 steps from 999 to -1
        now = torch.full((4,), t)
        v = guided(network(x_t, now, none), network(x_t, now, labels), w=2)
        x_0 = predict_x_0(x_t, t, v).clamp(-1, 1)
        x_t = ddim_step(x_t, x_0, t, s)

# %%
figure, axes = plt.subplots(1, 4, figsize=(8, 2.4))
for place, image, name in zip(axes, x_t, wanted, strict=True):
    place.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0))
    place.set(title=name, xticks=[], yticks=[])
plt.show()
