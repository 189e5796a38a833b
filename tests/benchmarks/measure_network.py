"""Count and weigh what the lesson states about the network, the process and the files.

    python tests/benchmarks/measure_network.py

Layers, operations and memory of one pass of one picture; noise schedules; sizes of weight files.
Writes training_results/reference/lesson_facts.json; nothing is timed, any machine finds the same.
"""

import copy
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ddpm_basics.data import DEFAULT  # noqa: E402
from ddpm_basics.fabrics.folder import draw_fabrics  # noqa: E402
from ddpm_basics.files import write_json  # noqa: E402
from ddpm_basics.images import read_folder  # noqa: E402
from ddpm_basics.model import build_diffusion  # noqa: E402
from ddpm_basics.sampling import SCHEDULES  # noqa: E402

REPORT = ROOT / "training_results" / "reference" / "lesson_facts.json"
KINDS = {library.ResnetBlock: "residual block", library.LinearAttention: "linear attention",
         library.Attention: "full attention"}  # fmt: skip
SHOWN = re.compile(r"init_conv|final_conv|(up|down)s\.\d\.3")  # besides those
IDLE = ("view", "permute", "transpose", "expand", "slice", "split", "select", "detach",
        "squeeze", "as_strided", "alias", "t.default")  # fmt: skip


class CountKernels(TorchDispatchMode):
    """Counts operations that do something; views and reshapes only relabel memory."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(word in str(function) for word in IDLE)
        return function(*args, **(kwargs or {}))


def watch_pass(unet):
    """Send one picture through; return its layers, and what it computes, moves and starts."""
    layers, by_size, activations = [], Counter(), 0

    def watch(name, module):
        def hook(_, inputs, output):
            nonlocal activations
            size, whole = output.shape[-1], not list(module.children())
            activations += output.numel() * whole
            if isinstance(module, torch.nn.Conv2d):
                by_size[size] += 2 * module.weight.numel() * size**2
            if type(module) in KINDS or SHOWN.fullmatch(name):
                other = "convolution" if isinstance(module, torch.nn.Conv2d) else "resampling"
                layers.append({
                    "name": name, "kind": KINDS.get(type(module), other),
                    "channels_in": inputs[0].shape[1],
                    "channels_out": output.shape[1], "size_in": inputs[0].shape[-1],
                    "size_out": size,
                })  # fmt: skip

        return module.register_forward_hook(hook)

    hooks = [watch(name, module) for name, module in unet.named_modules()]
    with torch.no_grad(), CountKernels() as kernels:
        unet(torch.zeros(1, 3, 64, 64), torch.tensor([0]))
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), FlopCounterMode(display=False) as flop:
        unet(torch.zeros(1, 3, 64, 64), torch.tensor([0]))
    parameters = sum(weight.numel() for weight in unet.parameters())
    network = {"parameters": parameters, "gflop_forward": flop.get_total_flops() / 1e9}
    work = {
        "kernels": kernels.count,
        "conv_share_by_size": [
            {"size": size, "gflop": by_size[size] / 1e9, "share": by_size[size] / by_size.total()}
            for size in sorted(by_size, reverse=True)
        ],
        "activation_mb_fp32": 4 * activations / 1e6,
        "weight_mb_fp32": 4 * parameters / 1e6,
        "adam_mb": 4 * 4 * parameters / 1e6,  # weights, gradients and two moments
    }
    return network | {"layers": layers}, work


def file_sizes(diffusion):
    """Weigh each kind of weight file, in units of 10^6 bytes."""
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4)
    for weight in diffusion.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = diffusion.state_dict()
    half = {name: x.half() if name.startswith("model.") else x for name, x in state.items()}
    checkpoint = {"step": 1, "model": state, "opt": optimizer.state_dict(),
                  "ema": {"ema_model": copy.deepcopy(state)}}  # fmt: skip
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("fp32", state), ("fp16", half), ("checkpoint", checkpoint)):
            torch.save(content, path := Path(folder, "file.pt"))
            sizes[f"{name}_mb"] = path.stat().st_size / 1e6
    return sizes


def measure():
    """Return the report."""
    torch.manual_seed(0)
    diffusion = build_diffusion()
    modules = list(diffusion.model.modules())
    draw_fabrics(ROOT / DEFAULT)
    fabrics = torch.from_numpy(read_folder(ROOT / DEFAULT, 64).pixels[::11]).float() / 127.5 - 1
    t = torch.linspace(0, 999, len(fabrics)).long()
    with torch.no_grad():
        untrained = float(diffusion.p_losses(fabrics, t))
    network, work = watch_pass(diffusion.model)
    network["rms_norms"] = sum(isinstance(m, library.RMSNorm) for m in modules)
    network["group_norms"] = sum(isinstance(m, torch.nn.GroupNorm) for m in modules)
    betas = {name: getattr(library, f"{name}_beta_schedule")(1000) for name in SCHEDULES}
    alpha_bar = {name: (1 - beta).cumprod(0).tolist() for name, beta in betas.items()}
    at = {t: {name: values[t] for name, values in alpha_bar.items()}
          for t in (0, 100, 250, 499, 750, 999)}  # fmt: skip
    # Equation 12 of Ho et al. with sigma^2 = beta-tilde; index 0 has no variance and no factor.
    a, b, v = (x.double() for x in (diffusion.alphas_cumprod, diffusion.betas,
                                    diffusion.posterior_variance))  # fmt: skip
    factors = b**2 / (2 * v * (1 - b) * (1 - a))
    return {
        "library": library.__version__,
        "network": network, "work": work,
        "schedules": [{"t": t, **row, "snr": row["sigmoid"] / (1 - row["sigmoid"])}
                      for t, row in at.items()],
        "alpha_bar_at_499": at[499],
        "elbo_weights": [{"t": t, "weight": factors[t].item()}
                         for t in (1, 10, 100, 500, 900, 990, 998, 999)],
        "posterior_variance_at_0": float(diffusion.posterior_variance[0]),
        "sqrt_alpha_bar_at_T": float(diffusion.sqrt_alphas_cumprod[-1]),
        "untrained_loss": untrained,
        # The mean square of v times alpha-bar: what an answer of zero costs.
        "zero_loss": float((a * (a + (1 - a) * fabrics.square().mean())).mean()),
        "files": file_sizes(diffusion),
        "all_timesteps_mib": 16 * 1001 * 3 * 64 * 64 * 4 / 2**20,
        "training": {"images": 1059, "batch": 32, "steps": 100_000,
                     "passes": 100_000 * 32 / 1059,
                     # Going backward costs twice as much as going forward.
                     "flop": 3 * 1e9 * network["gflop_forward"] * 100_000 * 32,
                     "data_mb_uint8": 1059 * 3 * 64 * 64 / 1e6},
    }  # fmt: skip


if __name__ == "__main__":
    write_json(REPORT, measure())
    print(f"Wrote {REPORT}")
