"""The U-Net with its labels, and the diffusion process around it.

A label is told by a vector that is added to the embedding of the timestep, so that without a label
the network is the library's plain U-Net. The table of these vectors stands outside the U-Net, as
`label_table` of the diffusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from torch import Tensor


def build_diffusion(
    dim: int = 64,
    dim_mults: Sequence[int] = (1, 2, 4, 8),
    channels: int = 3,
    image_size: int = 64,
    timesteps: int = 1000,
    objective: str = "pred_v",
    beta_schedule: str = "sigmoid",
    labels: Sequence[str] = (),
    weights_on: str = "cpu",
) -> GaussianDiffusion:
    """Build the U-Net and the diffusion process around it, untrained; labels mean nothing yet.

    Every choice is passed on by name: the objective is no matter of shapes, so a wrong one gives
    garbage without an error. weights_on="meta" leaves out the random weights: half a second less,
    where a file replaces them anyway.
    """
    with torch.device(weights_on):
        unet = Unet(dim=dim, dim_mults=tuple(dim_mults), channels=channels, flash_attn=False)
    unet.time_mlp.__class__ = TimeAndLabel
    diffusion = GaussianDiffusion(
        unet,
        image_size=image_size,
        timesteps=timesteps,
        objective=objective,
        beta_schedule=beta_schedule,
    )
    diffusion.label_names = tuple(labels)
    table = torch.nn.Parameter(torch.zeros(len(labels), 4 * dim)) if labels else None
    diffusion.register_parameter("label_table", table)
    return diffusion


class TimeAndLabel(torch.nn.Sequential):
    """The library's embedding of the timestep; a label's vector may be added to it.

    So the class is told in the networks of Dhariwal & Nichol (2021, arXiv 2105.05233).
    """

    def forward(self, time: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Embed timesteps (n,), or timesteps and label vectors (n, 4 dim), in (n, 4 dim)."""
        t, vectors = (time, None) if isinstance(time, Tensor) else time
        embedding: Tensor = super().forward(t)  # type: ignore[no-untyped-call]
        return embedding if vectors is None else embedding + vectors.to(embedding.dtype)


class LabelledUnet(torch.nn.Module):
    """A diffusion's U-Net and label table, as they are trained together."""

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        super().__init__()
        self.unet, self.label_table = diffusion.model, diffusion.label_table

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the network's output (n, c, h, w) for timesteps and labels (n,), -1 for none."""
        output: Tensor
        if self.label_table is None:
            output = self.unet(x_t, t)
        else:
            # By a factor of zero, so that the table has a gradient whatever the batch.
            told = (labels >= 0)[:, None] * self.label_table[labels.clamp(min=0)]
            output = self.unet(x_t, (t, told))
        return output


def label_vectors(
    diffusion: GaussianDiffusion, labels: Sequence[str], indices: Iterable[int]
) -> Tensor | None:
    """Return the vectors (n, 4 dim) of images that take labels in turn; None without labels.

    Image i has label i modulo their number.
    """
    if not labels:
        return None
    places = [diffusion.label_names.index(labels[i % len(labels)]) for i in indices]
    vectors: Tensor = diffusion.label_table[places]
    return vectors
