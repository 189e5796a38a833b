"""FID, KID and the Inception Score under their own names, through torch-fidelity.

Its Inception sees the pixels that our own distances see, and gives 2,048 features and 1,008 scores
an image. Of all images they make what torch-fidelity itself reports, its cache unused; of sets of
equal size, the floors and intervals that our distances have, too.

FID is biased upwards, the more the fewer the images, and not equally for all models (Chong &
Forsyth 2020, "Effectively unbiased FID and Inception Score and where to find them", arXiv
1911.07023); its authors recommend 10,000 images or more (github.com/bioinf-jku/TTUR, the code of
Heusel et al. 2017). On the course's 1,059 it is no figure to hold against published ones: compare
it with its floor, or between equally many images. KID is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_basics.console import UserError, import_extra, one_line
from ddpm_basics.evaluation.distances import (
    SOURCES,
    Split,
    compare_kernels,
    frechet_of_points,
    summarise,
)  # fmt: skip
from ddpm_basics.evaluation.folders import Fabrics
from ddpm_basics.evaluation.intervals import split_interval
from ddpm_basics.weight_files import read_checkpoint

EXTRACTOR = "inception-v3-compat"  # torch-fidelity's default
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # that it fetches
SCORE_PARTS, SHUFFLE_SEED = 10, 2020  # its defaults, too: sets behind an Inception Score
SHOWN = 64  # images at a time, 299 pixels a side in there
KERNEL_SUBSET = 1000  # images in each of KID's subsets, as there; fewer where there are fewer
DEFINITIONS = {
    "all": "what torch-fidelity reports with its own settings for all samples, and all held-out "
    "images that are measured; KID on those drawn for the splits",
    "fid": "frechet, on Inception's 2,048 features as they are",
    "kid": "kernel, on the same; `chance` as there",
    "inception_score": "exp(mean divergence of the classes seen in an image from those of its set)",
}

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What Inception sees in a folder: sums over all images, and a few of them one by one."""

    count: int
    statistics: dict[str, Doubles]  # "mu" (d,) and "sigma" (d, d) of all features
    scores: list[float]  # the Inception Score of each of SCORE_PARTS sets
    features: Tensor  # (n, d) of the few
    logits: Tensor  # (n, classes)


def load_inception(file: str, device: torch.device) -> Any:
    """Return torch-fidelity's Inception with the weights of a file; "" has it fetch its own.

    Raises UserError for a missing package or file, other weights, and no network.
    """
    registry = import_extra("torch_fidelity.utils", "torch-fidelity").FEATURE_EXTRACTORS_REGISTRY
    if file:
        check_weights(Path(file))
    network = registry[EXTRACTOR]
    layers = [network.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    try:
        extractor = network(EXTRACTOR, layers, feature_extractor_weights_path=file or None)
    except OSError as error:
        raise UserError(
            f"Inception's weights cannot be fetched ({one_line(error)}): get {WEIGHTS} from "
            "torch-fidelity's releases on another machine, and name it with --inception FILE."
        ) from None
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{file} holds other weights than torch-fidelity's {WEIGHTS} ({one_line(error)})."
        ) from None
    return extractor.to(device)


def check_weights(path: Path) -> None:
    """Refuse a file that is missing, damaged, or wants to run code when torch-fidelity opens it."""
    if not path.is_file():
        raise UserError(
            f"--inception {path} is no file: name torch-fidelity's {WEIGHTS}, or leave the name "
            "out to have it fetched."
        )
    read_checkpoint(path)


@torch.no_grad()
def look(extractor: Any, fabrics: Fabrics, few: NDArray[np.int64], device: torch.device) -> Seen:
    """Show a folder to Inception, part by part; keep what it says of the images in few, sorted."""
    count, parts = len(fabrics), len(range(0, len(fabrics), SHOWN))
    place = np.argsort(RandomState(SHUFFLE_SEED).permutation(count))  # of each image, shuffled
    ends = np.arange(1, SCORE_PARTS + 1) * count // SCORE_PARTS
    score_part = torch.from_numpy(np.searchsorted(ends, place, side="right"))
    sums: list[Tensor] = []
    kept: list[Tensor] = []
    bar = tqdm(fabrics.in_parts(SHOWN), f"Inception on {fabrics.folder.name}", parts)
    for start, pixels in zip(range(0, count, SHOWN), bar, strict=True):
        told = [layer.cpu() for layer in extractor(pixels.to(device))]
        features, logits = (layer.double() for layer in told)
        own = sum_up(features, logits, score_part[start : start + SHOWN])
        kept = kept or [layer.new_empty(len(few), layer.shape[1]) for layer in told]
        sums = sums or [torch.zeros_like(part) for part in own]
        for whole, part in zip(sums, own, strict=True):
            whole += part
        first, last = np.searchsorted(few, [start, start + SHOWN])
        for rows, layer in zip(kept, told, strict=True):
            rows[first:last] = layer[few[first:last] - start]
    total, products, classes, information = sums
    mean, sizes = total / count, torch.bincount(score_part, minlength=SCORE_PARTS)
    covariance = (products - count * mean.outer(mean)) / (count - 1)
    marginal = classes / sizes[:, None]
    scores = (information / sizes - torch.special.entr(marginal).neg().sum(1)).exp()
    statistics = {"mu": mean.numpy(), "sigma": covariance.numpy()}
    return Seen(count, statistics, scores.tolist(), *kept)


def sum_up(features: Tensor, logits: Tensor, part: Tensor) -> list[Tensor]:
    """Sum what FID and Inception Score need over images, the latter for each of SCORE_PARTS.

    Features (d,), their products (d, d), probabilities (parts, classes), p log p (parts,).
    """
    probability = logits.softmax(1)
    information = (probability * logits.log_softmax(1)).sum(1)
    classes = torch.zeros(SCORE_PARTS, logits.shape[1], dtype=torch.float64)
    return [
        features.sum(0),
        features.T @ features,
        classes.index_add(0, part, probability),
        torch.zeros(SCORE_PARTS, dtype=torch.float64).index_add(0, part, information),
    ]


def inception_report(
    seen: dict[str, Seen], splits: list[Split], device: torch.device
) -> dict[str, Any]:
    """Report all images' figures, and those of the splits with floors and intervals."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    n, pools = len(splits[0]["heldout"]), {name: len(own.features) for name, own in seen.items()}
    fid, score = ({pair: np.empty(len(splits)) for pair in SOURCES} for _ in range(2))
    for i, split in enumerate(tqdm(splits, "FID")):
        reference = seen["heldout"].features[split["heldout"]]
        for pair, source in SOURCES.items():
            own, rows = seen[source], split[pair]
            fid[pair][i] = frechet_of_points(own.features[rows], reference)
            score[pair][i] = isc_features_to_metric(own.logits[rows])[KEY_METRIC_ISC_MEAN]
    points = {name: own.features[:, None] for name, own in seen.items()}
    kid, chance = compare_kernels(points, splits, device)
    return {
        "definitions": DEFINITIONS,
        "all": figures_of_all(seen["samples"], seen["heldout"]),
        "distances": {
            "fid": summarise(fid, n, pools, power=0.5),
            "kid": summarise(kid, n, pools, power=0.5, shift=chance) | {"chance": chance},
        },
        "inception_score": {
            pair: {
                "value": float(own.mean()),
                "interval_95": split_interval(own.mean(), own, n, pools[SOURCES[pair]]),
            }
            for pair, own in score.items()
        },
    }


def figures_of_all(samples: Seen, heldout: Seen) -> dict[str, Any]:
    """Ask torch-fidelity for its own figures."""
    from torch_fidelity import metric_fid, metric_kid

    subset = min(KERNEL_SUBSET, len(samples.features), len(heldout.features))
    kid = metric_kid.kid_features_to_metric(
        samples.features, heldout.features, kid_subset_size=subset, verbose=False
    )
    fid = metric_fid.fid_statistics_to_metric(samples.statistics, heldout.statistics, False)
    return {
        "samples": samples.count,
        "heldout": heldout.count,
        "fid": fid[metric_fid.KEY_METRIC_FID],
        "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
        "kid_spread": kid[metric_kid.KEY_METRIC_KID_STD],
        "kid_subset": subset,
        "inception_score": float(np.mean(samples.scores)),
        "inception_score_spread": float(np.std(samples.scores)),
    }
