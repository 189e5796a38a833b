"""What is compared: pixels, patches, random convolutions, and a tradition classifier's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ddpm_basics.evaluation.folders import BATCH, Fabrics, collect

PATCHES = 8  # patches taken from every image
PATCH_SIDE = 5  # pixels
FILTERS = 8  # random filters per scale
SCALES = 3  # full, half and quarter resolution
CONVOLUTION_SEED = 20  # the random convolutions are the same in every evaluation, anywhere
CLASSIFIER_STEPS = 400  # batches of 64
WIDTH = 24  # of the classifier


def pixel_features(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [0, 1] reduced to 4x4 by area averages: (N, 1, 48)."""
    return F.adaptive_avg_pool2d(x, 4).flatten(1).unsqueeze(1)


def patch_features(x: Tensor, places: Tensor) -> Tensor:
    """Multi-scale patches of images (N, 3, H, W) around places (N, P, 2) in [0, 1): (N, P, 225).

    Each point of the result is what stands at one place at three resolutions of a Laplacian
    pyramid (as in the sliced Wasserstein distance of Karras et al. 2018, section 5): fine detail,
    coarser detail, and colour; each a patch of 5x5 pixels.
    """
    levels = []
    for _ in range(SCALES - 1):
        smaller = F.avg_pool2d(x, 2)
        blurred = F.interpolate(smaller, size=x.shape[2:], mode="bilinear", align_corners=False)
        levels.append(x - blurred)
        x = smaller
    levels.append(x)
    return torch.cat([cut_patches(level, places) for level in levels], dim=2)


def cut_patches(x: Tensor, places: Tensor) -> Tensor:
    """Cut patches out of x (N, C, H, W), their corners at places (N, P, 2): (N, P, C * 25)."""
    room = torch.tensor([x.shape[2], x.shape[3]], device=x.device) - PATCH_SIDE + 1
    top, left = (places * room).long().unbind(-1)  # (N, P)
    step = torch.arange(PATCH_SIDE, device=x.device)
    rows = (top[..., None] + step)[..., :, None]  # (N, P, side, 1)
    columns = (left[..., None] + step)[..., None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x.permute(0, 2, 3, 1)[image, rows, columns].flatten(2)


class RandomConvolutions(nn.Module):
    """Fixed random filters, two layers at three scales; statistics of their answers (N, 1, 96).

    Weight-free: the filters come from CONVOLUTION_SEED, not from training. The mean and the spread
    of a filter's rectified answer say how much of a texture an image holds; a second layer over
    the first says how the textures lie beside each other.
    """

    first: Tensor
    second: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(CONVOLUTION_SEED)
        first = torch.randn(SCALES, FILTERS, 3, 5, 5, generator=generator) / math.sqrt(3 * 25)
        second = torch.randn(SCALES, 2 * FILTERS, FILTERS, 3, 3, generator=generator)
        self.register_buffer("first", first)
        self.register_buffer("second", second / math.sqrt(9 * FILTERS))

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (N, 3, H, W) in [0, 1]."""
        x, found = 2 * x - 1, []
        for first, second in zip(self.first, self.second, strict=True):
            texture = F.relu(F.conv2d(x, first, padding=2))
            layout = F.relu(F.conv2d(F.avg_pool2d(texture, 2), second, padding=1))
            found += [texture.mean((2, 3)), texture.std((2, 3)), layout.mean((2, 3))]
            x = F.avg_pool2d(x, 2)
        return torch.cat(found, 1).unsqueeze(1)


class Classifier(nn.Module):
    """A small network that tells traditions apart; its last layer but one is a feature space."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.body = nn.Sequential(
            *block(3, WIDTH, 5, 2),
            *block(WIDTH, 2 * WIDTH, 3, 2),
            *block(2 * WIDTH, 3 * WIDTH, 3, 2),
            *block(3 * WIDTH, 4 * WIDTH, 3, 1),
        )
        self.middle = nn.Sequential(nn.Linear(8 * WIDTH, 64), nn.ReLU())
        self.head = nn.Linear(64, len(names))

    def features(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [0, 1] to (N, 64)."""
        maps = self.body(4 * x - 2)
        found: Tensor = self.middle(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, classes), before the softmax."""
        scores: Tensor = self.head(self.features(x))
        return scores


def block(inputs: int, outputs: int, side: int, stride: int) -> list[nn.Module]:
    """Return the layers of one convolution."""
    convolution = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def train_classifier(
    fabrics: Fabrics,
    seed: int,
    device: torch.device,
    spoil: Callable[[Tensor], Tensor] | None = None,
) -> Classifier:
    """Train on labelled images for CLASSIFIER_STEPS batches of 64, mirrored and shifted at random.

    spoil: what else is done to the images (n, 3, H, W) in [0, 1] of a batch. The same seed gives
    the same network on the same device.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(sorted(set(fabrics.labels)))
    model.to(device).to(memory_format=torch.channels_last)
    targets = torch.tensor([model.names.index(label) for label in fabrics.labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, CLASSIFIER_STEPS)
    order = torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(CLASSIFIER_STEPS), "Training the classifier"):
        if len(order) < 64:
            order = torch.cat([order, torch.randperm(len(fabrics), generator=generator)])
        chosen, order = order[:64], order[64:]
        x = augment(fabrics.pixels[chosen].float() / 255, generator)
        x = (spoil(x) if spoil else x).to(device)
        loss = F.cross_entropy(model(x), targets[chosen].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()
    return model


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images (N, 3, H, W) and shift all of them by up to 4 pixels."""
    flip = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    height, width = x.shape[2:]
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4), mode="reflect")[..., down : down + height, right : right + width]


def feature_spaces(
    folders: dict[str, Fabrics], classifier: Classifier | None, seed: int, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Features of every folder in every space: {space: {folder: (N, points per image, d)}}.

    Each dimension is shifted and scaled to mean 0 and spread 1 over the held-out images.
    """
    convolutions = RandomConvolutions().to(device)
    spaces: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pixels": lambda x, places: pixel_features(x),
        "patches": patch_features,
        "convolutions": lambda x, places: convolutions(x),
    }
    if classifier is not None:
        spaces["classifier"] = lambda x, places: classifier.features(x).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    places = {n: torch.rand(len(f), PATCHES, 2, generator=generator) for n, f in folders.items()}
    found = {}
    for space, function in spaces.items():
        found[space] = standardise({
            name: in_batches(function, device, space, fabrics, places[name])
            for name, fabrics in folders.items()
        })  # fmt: skip
    return found


@torch.no_grad()
def in_batches(
    function: Callable[..., Tensor],
    device: torch.device,
    title: str,
    fabrics: Fabrics,
    *more: Tensor,
) -> Tensor:
    """Apply function(images in [0, 1], more of each) batch by batch; the results, on the CPU."""

    def parts() -> Iterator[list[Tensor]]:
        for start in tqdm(range(0, len(fabrics), BATCH), title, leave=False):
            x, *rest = (own[start : start + BATCH].to(device) for own in (fabrics.pixels, *more))
            yield [function(x.float() / 255, *rest).cpu()]

    return collect(len(fabrics), parts())[0]


def standardise(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shift and scale each dimension by its mean and spread over the held-out images.

    Dimensions that hardly vary there are scaled by a twentieth of the median spread instead, lest
    they drown all others.
    """
    reference = features["heldout"].flatten(0, 1)
    spread = reference.std(0)
    spread = spread.clamp(min=max(float(spread.median()) / 20, 1e-6))
    return {name: (own - reference.mean(0)) / spread for name, own in features.items()}
