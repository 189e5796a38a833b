"""Make what the lesson's playground loads, from the small network and from C.

    python docs/make_playground.py               the engine, the weights, the still strip
    python docs/make_playground.py --weights     without the engine, whose compiler uv fetches

Writes docs/_static/playground/engine.js (docs/playground/unet.c as WebAssembly), weights.js (those
of models/playground_32.pt in int8, one scale for each output channel) and the strip that stands on
the page where nothing can run. Both scripts hold gzipped bytes as base64: a page that was opened
as a file may load scripts, and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch import denoising_diffusion_pytorch as library
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from make_figures import publish  # noqa: E402

from ddpm_basics.weight_files import load_weights  # noqa: E402

SOURCE = ROOT / "docs" / "playground" / "unet.c"
WEIGHTS = ROOT / "models" / "playground_32.pt"
ASSETS = ROOT / "docs" / "_static" / "playground"
STILLS = (0, 4, 8, 11, 14, 17, 20)  # steps in the strip
TILE = 8  # output channels that unet.c computes at once
COMPILE = [
    sys.executable, "-m", "uv", "run", "--no-project", "--with", "ziglang==0.16.0",
    "python", "-m", "ziglang", "cc", "-target", "wasm32-freestanding", "-O3", "-msimd128",
    "-mbulk-memory", "-nostdlib", "-Wall", "-Wextra", "-Wl,--no-entry", "-Wl,--strip-all",
    *(f"-Wl,--export={name}" for name in ("unet", "picture_at", "waves_at", "label_at")),
]  # fmt: skip


# ---- Weights -------------------------------------------------------------------------------------


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, ...] to int8; returns it and the scale [out] of each output channel."""
    scale = weight.flatten(1).abs().amax(1) / 127
    scale = scale.clamp(min=1e-12)
    steps = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round()
    return steps.to(torch.int8), scale


def dequantise(diffusion: GaussianDiffusion) -> None:
    """Give a diffusion's network the weights that the playground computes with."""
    for layer in diffusion.model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            steps, scale = quantise(layer.weight.data)
            layer.weight.data = steps * scale.view(-1, *[1] * (steps.dim() - 1))


def pack_layer(layer: nn.Conv2d | nn.Linear, shuffled: bool = False) -> bytes:
    """Pack a convolution as conv() of unet.c reads it: tile by tile scale, bias, weights.

    shuffled: its input is the library's Downsample, whose channels are ordered otherwise there.
    """
    steps, scale = quantise(layer.weight.data)
    bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias.data
    if steps.dim() == 2:
        steps = steps[..., None, None]
    if shuffled:  # (c p1 p2) to (p1 p2 c)
        steps = steps.unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)
    missing = -len(scale) % TILE
    steps = torch.cat([steps, torch.zeros(missing, *steps.shape[1:], dtype=torch.int8)])
    scale, bias = (torch.cat([own, torch.zeros(missing)]) for own in (scale, bias))
    # [out, in, ky, kx] to [tile][ky][kx][in][out of the tile]
    tiles = steps.unflatten(0, (-1, TILE)).permute(0, 3, 4, 2, 1)
    return b"".join(
        floats(scale[i * TILE :][:TILE]) + floats(bias[i * TILE :][:TILE]) + tile.numpy().tobytes()
        for i, tile in enumerate(tiles.contiguous())
    )


def floats(values: Tensor) -> bytes:
    """Return the bytes of fp32 numbers."""
    return values.detach().float().contiguous().numpy().astype("<f4").tobytes()


def pack_block(block: library.ResnetBlock) -> Iterator[bytes]:
    """Pack a residual block in the order in which unet.c takes it."""
    yield pack_layer(block.mlp[1])
    for half in (block.block1, block.block2):
        yield pack_layer(half.proj)
        yield floats(half.norm.g)
    if isinstance(block.res_conv, nn.Conv2d):
        yield pack_layer(block.res_conv)


def pack_attention(attention: library.Attention | library.LinearAttention) -> Iterator[bytes]:
    """Pack an attention: norm, shared keys and values as [2][memory][heads x channels], layers."""
    is_linear = isinstance(attention, library.LinearAttention)
    yield floats(attention.norm.g)
    order = (0, 3, 1, 2) if is_linear else (0, 2, 1, 3)
    yield floats(attention.mem_kv.permute(order))
    yield pack_layer(attention.to_qkv)
    if is_linear:
        yield pack_layer(attention.to_out[0])
        yield floats(attention.to_out[1].g)
    else:
        yield pack_layer(attention.to_out)


def pack_network(unet: library.Unet) -> Iterator[bytes]:
    """Pack the whole U-Net in the order of its forward pass."""
    yield pack_layer(unet.time_mlp[1])
    yield pack_layer(unet.time_mlp[3])
    yield pack_layer(unet.init_conv)
    for first, second, attention, down in unet.downs:
        yield from pack_block(first)
        yield from pack_block(second)
        yield from pack_attention(attention)
        halves = isinstance(down, nn.Sequential)
        yield pack_layer(down[1] if halves else down, shuffled=halves)
    yield from pack_block(unet.mid_block1)
    yield from pack_attention(unet.mid_attn)
    yield from pack_block(unet.mid_block2)
    for first, second, attention, up in unet.ups:
        yield from pack_block(first)
        yield from pack_block(second)
        yield from pack_attention(attention)
        yield pack_layer(up[1] if isinstance(up, nn.Sequential) else up)
    yield from pack_block(unet.final_res_block)
    yield pack_layer(unet.final_conv)


def pack(diffusion: GaussianDiffusion) -> bytes:
    """Pack what the page needs: alpha [T], sigma [T], label vectors [names, 4 dim], network."""
    levels = (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
    parts = [*map(floats, levels), floats(diffusion.label_table), *pack_network(diffusion.model)]
    return b"".join(parts)


def write_script(name: str, content: bytes, **more: object) -> None:
    """Write docs/_static/playground/NAME.js, a classic script that sets playground.NAME."""
    packed = base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / f"{name}.js"
    path.write_text(f"playground.{name} = {json.dumps({**more, 'bytes': packed})};\n")
    print(f"wrote {path.relative_to(ROOT)} ({path.stat().st_size / 1000:,.0f} kB)")


# ---- The engine ----------------------------------------------------------------------------------


def compile_engine() -> bytes:
    """Compile docs/playground/unet.c; the pinned compiler gives the same bytes on any machine."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SOURCE, folder)
        command = [*COMPILE, SOURCE.name, "-o", "unet.wasm"]
        subprocess.run(command, cwd=folder, check=True)
        return Path(folder, "unet.wasm").read_bytes()


def run_engine(jobs: list[dict[str, Any]]) -> np.ndarray:
    """Have Node do jobs with what the page loads (see docs/playground/draw.cjs); fp32 numbers."""
    done = subprocess.run(
        ["node", SOURCE.with_name("draw.cjs")], input=json.dumps(jobs).encode(),
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return np.frombuffer(done.stdout, np.float32)


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Return pictures in [-1, 1] as the page shows them, in 256 steps."""
    return ((x.astype(float) + 1) / 2 * 255).clip(0, 255).round().astype(np.uint8)


# ---- The still strip -----------------------------------------------------------------------------


def draw_strip() -> Image.Image:
    """Draw a kuba of 20 steps as the page does: x_t above, the guess of x_0 below, some steps."""
    job = {"seed": 7, "label": 8, "guidance": 2, "steps": 20, "all": True}
    walk = to_bytes(run_engine([job]).reshape(-1, 2, 32, 32, 3))[list(STILLS)]
    walk = np.pad(walk, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=255)
    strip = Image.fromarray(np.vstack([np.hstack(list(row)) for row in walk.swapaxes(0, 1)]))
    return strip.resize((4 * strip.width, 4 * strip.height), Image.Resampling.NEAREST)


def main() -> int:
    """Make all of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", action="store_true", help="only them; needs no compiler")
    options = parser.parse_args()
    diffusion, facts = load_weights(WEIGHTS)
    write_script("weights", pack(diffusion), labels=facts.labels, timesteps=facts.timesteps)
    if not options.weights:
        write_script("engine", compile_engine())
    made_from = [ASSETS / "engine.js", ASSETS / "weights.js", ASSETS / "sampling.js"]
    publish(draw_strip(), "playground.webp", made_from, 90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
