"""What is written: definitions, the figures that decide, the printed tables, the picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from ddpm_basics.console import UserError
from ddpm_basics.evaluation.copies import Neighbours
from ddpm_basics.evaluation.distances import PAIRS, SPLITS
from ddpm_basics.evaluation.folders import Fabrics
from ddpm_basics.files import write_atomically

TOOL = "ddpm_basics.evaluation"  # stands in what it writes, so that it replaces nothing else
OUR_TOOLS = (TOOL, "evaluate_fabrics.py")  # the latter is the command's former name
DEFINITIONS = {
    "floor": "the same figure for held-out images against other held-out images (copies: for "
    "held-out images against the training images), so what real fabrics show by chance",
    "copy": "ratio_to_second_nearest: d1/d2 < 1/3, with d1 and d2 the distances in pixels to the "
    "nearest and second nearest training image, an image and its mirror image counting as one "
    "(Yoon et al. 2023); ratio_to_mean_of_nearest: d1 < 0.5 x the mean distance of the 50 nearest "
    "(after Carlini et al. 2023)",
    "nearest_distance": "root mean square difference over pixels and channels, range 0 to 1",
    "pixels": "images reduced to 4x4 by area averages, 48 numbers",
    "patches": "8 patches of 5x5 pixels per image at three levels of a Laplacian pyramid, 225 "
    "numbers each",
    "convolutions": "means and spreads of the rectified answers of fixed random filters, two "
    "layers at three scales, 96 numbers",
    "classifier": "last layer but one of the tradition classifier, 64 numbers",
    "scaling": "each of these numbers is shifted and scaled to mean 0 and spread 1 over the "
    "held-out images that are measured",
    "sliced_wasserstein": "square root of the mean squared 2-Wasserstein distance over 128 random "
    "directions",
    "frechet": "squared Fréchet distance between Gaussian fits, as FID reports it; biased upwards "
    "in the same way in samples, train and floor, as all sets have equal size",
    "kernel": "KID: unbiased squared MMD with the kernel (a.b/d + 1)^3; negative values are "
    "chance; `chance` is what a biased estimate shows on average for two equal distributions",
    "ratio": "distance over floor, both as lengths: the square root is taken of frechet and of "
    "kernel + chance; depends on `per_side`, so compare ratios of equal `per_side` only",
    "interval_95": "from the spread between random splits, by the delete-d jackknife; rather too "
    "wide than too narrow where a distance is near its floor",
    "bootstrap_95": "central 95 % of the figure when images are drawn anew, with replacement",
    "wilson_95": "Wilson interval of a share, which has a width at 0 hits too",
    "share": "maximum-likelihood share, corrected by the classifier's confusion matrix on held-out "
    "images it was not trained on; fair_share is the share among the training images",
    "unclear_share": "images of which the classifier is less sure than of 95 % of the held-out",
}


def headline(report: dict) -> dict:
    """Pick the figures that decide: ratios at the median and at worst, copies, extreme shares."""
    ratios = {
        f"{space}, {measure.replace('_', ' ')}": values["samples_over_floor"]["ratio"]
        for space, measures in report["distances"].items()
        for measure, values in measures.items()
    }
    worst = max(ratios, key=ratios.get)
    copies = report["copies"]["ratio_to_second_nearest"]
    result = {
        "median_ratio": float(np.median(list(ratios.values()))),
        "worst_ratio": ratios[worst],
        "worst_ratio_of": worst,
        "copy_share": copies["samples"]["share"],
        "copy_share_heldout": copies["heldout"]["share"],
        "more_copies_than_heldout": copies["difference_bootstrap_95"][0] > 0,
    }
    if report["traditions"]:
        names, shares = report["traditions"]["names"], report["traditions"]["share_over_fair"]
        order = np.argsort(shares)
        result["rarest_tradition"] = [names[order[0]], shares[order[0]]]
        result["commonest_tradition"] = [names[order[-1]], shares[order[-1]]]
    return result


def print_report(report: dict) -> None:
    """Print the readable form of the report."""
    print_copies(report["copies"])
    print_distances(report)
    if report["traditions"]:
        print_traditions(report["traditions"])
    print_colours(report["colours"])
    print_headline(report["headline"])


def percent(share: float) -> str:
    """Write a share as a percentage of fixed width."""
    return f"{100 * share:6.2f} %"


def print_copies(copies: dict) -> None:
    """Print the shares of copies."""
    print("\nCopies of training images (mirrored ones included)     samples   95 % interval")
    rules = {
        "ratio_to_second_nearest": "d1/d2 < 1/3",
        "ratio_to_mean_of_nearest": "d1 < half the mean of the 50 nearest",
    }
    for rule, text in rules.items():
        for key, who in (("samples", text), ("heldout", "  the same for held-out images")):
            row = copies[rule][key]
            low, high = row["wilson_95"]
            print(f"  {who:<50} {percent(row['share'])}  {percent(low)} to {percent(high).strip()}")
    nearest = copies["nearest_distance"]
    print(
        f"  median d1/d2: samples {nearest['samples']['d1_over_d2'][2]:.3f}, held-out "
        f"{nearest['heldout']['d1_over_d2'][2]:.3f}\n  a sample is nearer to the training images "
        f"than a held-out image in {100 * nearest['sample_nearer_than_heldout']:.0f} % of pairs"
    )


def print_distances(report: dict) -> None:
    """Print the table of distances."""
    n = report["sizes"]["per_side"]
    print(f"\nDistances to held-out images, {n} against {n}, mean of {SPLITS} random splits")
    print(f"  {'':<33}{'samples':>11}{'train':>11}{'floor':>11}   ratio to floor")
    for space, measures in report["distances"].items():
        for measure, row in measures.items():
            name = f"{space}, {measure.replace('_', ' ')}"
            values = "".join(f"{row[pair]['value']:>11.3g}" for pair in PAIRS)
            ratio = row["samples_over_floor"]
            low, high = ratio["interval_95"]
            print(f"  {name:<33}{values}   {ratio['ratio']:5.2f}  ({low:.2f} to {high:.2f})")


def print_traditions(traditions: dict) -> None:
    """Print the shares of the traditions."""
    low, high = traditions["classifier_error_wilson_95"]
    print(
        f"\nTraditions (classifier wrong on {percent(traditions['classifier_error']).strip()} of "
        f"held-out images, {percent(low).strip()} to {percent(high).strip()})"
    )
    print(f"  {'':<24}{'share':>9}   95 % interval       of its fair share")
    rows = zip(
        traditions["names"],
        traditions["share"],
        traditions["share_bootstrap_95"],
        traditions["share_over_fair"],
        strict=True,
    )
    for name, share, (low, high), relative in rows:
        mark = "" if 0.5 <= relative <= 2 else "  <- under half or over twice"
        print(
            f"  {name:<24}{percent(share)}  {percent(low)} to {percent(high)}  "
            f"{relative:5.2f}{mark}"
        )
    print(
        f"  unclear images: {percent(traditions['unclear_share']).strip()} of the samples, "
        f"{percent(traditions['unclear_share_heldout']).strip()} of the held-out"
    )


def print_colours(colours: dict) -> None:
    """Print the channel statistics."""
    print("\nColours (red green blue, 0 to 1)")
    keys = list(next(iter(colours.values())))
    print(" " * 12 + "".join(f"{key:<22}" for key in keys))
    for folder, values in colours.items():
        cells = "".join(f"{' '.join(f'{v:.3f}' for v in values[key]['rgb']):<22}" for key in keys)
        print(f"  {folder:<10}{cells}")


def print_headline(result: dict) -> None:
    """Print the figures that decide."""
    print(
        f"\nDistance: {result['median_ratio']:.2f} times the floor at the median, "
        f"{result['worst_ratio']:.2f} at worst ({result['worst_ratio_of']})."
    )
    verdict = "more than" if result["more_copies_than_heldout"] else "no more than"
    print(
        f"Copies: {percent(result['copy_share']).strip()} of the samples, {verdict} among held-out "
        f"images ({percent(result['copy_share_heldout']).strip()})."
    )
    if "rarest_tradition" in result:
        (rare, low), (common, high) = result["rarest_tradition"], result["commonest_tradition"]
        print(f"Traditions: {rare} at {low:.2f} of its fair share, {common} at {high:.2f}.")


def draw_pairs(axis, samples: Fabrics, train: Fabrics, found: Neighbours, chosen: list) -> None:
    """Draw samples, eight to a row, each above its nearest training image and their distances."""
    height, width = samples.pixels.shape[2:]
    gap, foot = width // 8, height // 2
    rows = math.ceil(len(chosen) / 8)
    shape = (rows * (2 * height + gap + foot), 8 * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for place, i in enumerate(chosen):
        top, left = place // 8 * (2 * height + gap + foot), place % 8 * (width + gap)
        nearest = train.pixels[found.index[i, 0]]
        nearest = nearest.flip(-1) if found.mirrored[i, 0] else nearest
        for y, image in ((top, samples.pixels[i]), (top + height + gap // 2, nearest)):
            sheet[y : y + height, left : left + width] = image.permute(1, 2, 0).numpy()
        text = f"d1 {found.distance[i, 0]:.3f}\nd1/d2 {found.ratio[i]:.2f}"
        axis.text(left + width / 2, top + 2 * height + gap, text, ha="center", va="top", size=8)
    axis.imshow(sheet)
    axis.set_axis_off()


def save_figure(path: Path, samples: Fabrics, train: Fabrics, found: Neighbours, rng) -> None:
    """Draw samples above their nearest training images: the most alike, then a random choice."""
    figure = Figure(figsize=(11, 13.4))
    groups = {
        "The samples most like one training image": torch.argsort(found.ratio, stable=True),
        "Samples picked at random": rng.permutation(len(samples)),
    }
    for row, (title, order) in enumerate(groups.items()):
        axis = figure.add_axes((0.02, 0.5 * (1 - row) + 0.005, 0.96, 0.465))
        axis.set_title(f"{title} (above), and their nearest training images (below)")
        draw_pairs(axis, samples, train, found, order[:16].tolist())
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": TOOL})


def check_target(path: Path, suffix: str, ours) -> None:
    """Refuse, before the work, a path that cannot be written or holds what others wrote."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file that ends in {suffix}.")
    if path.suffix.lower() != suffix:
        raise UserError(f"{path} has to end in {suffix}.")
    if path.exists() and not ours(path):
        raise UserError(f"{path} exists and this command did not write it: name another file.")
    try:
        with write_atomically(path) as temporary:
            temporary.touch()
            raise FileExistsError  # leaves the probe without renaming it
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name another one."
        ) from error


def is_our_report(path: Path) -> bool:
    """Whether an earlier run wrote this file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("tool") in OUR_TOOLS
    except (OSError, ValueError, AttributeError):
        return False


def is_our_figure(path: Path) -> bool:
    """Whether an earlier run wrote this picture."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") in OUR_TOOLS
    except OSError:
        return False
