"""What is written: definitions, the figures that decide, the printed tables, the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from PIL.Image import Resampling
from PIL.PngImagePlugin import PngInfo

from ddpm_basics.evaluation.copies import Neighbours
from ddpm_basics.evaluation.distances import SOURCES, SPLITS
from ddpm_basics.evaluation.folders import Fabrics
from ddpm_basics.files import read_json, write_atomically
from ddpm_basics.images import tile

TOOL = "ddpm_basics.evaluation"  # stands in what it writes, so that it replaces nothing else
OUR_TOOLS = (TOOL, "evaluate_fabrics.py")  # the latter in older files
HEADER = f"  {'':<33}{'samples':>11}{'train':>11}{'floor':>11}   ratio to floor"
DEFINITIONS = {
    "floor": "the same figure for held-out images, against other held-out ones (copies: against "
    "the training images), so what real fabrics show by chance",
    "copy": "ratio_to_second_nearest: d1/d2 < 1/3, with d1 and d2 the distances in pixels to the "
    "nearest and second nearest training image, an image and its mirror image counting as one "
    "(Yoon et al. 2023); ratio_to_mean_of_nearest: d1 < 0.5 x the mean distance of the 50 nearest "
    "(after Carlini et al. 2023)",
    "nearest_distance": "root mean square difference over pixels and channels, range 0 to 1",
    "pixels": "images reduced to 4x4 by area averages, 48 numbers",
    "patches": "8 per image, 5x5 pixels at three levels of a Laplacian pyramid, 225 numbers each",
    "convolutions": "means and spreads of the rectified answers of fixed random filters, two "
    "layers at three scales, 96 numbers",
    "classifier": "last layer but one of the tradition classifier, 64 numbers",
    "scaling": "each number is shifted and scaled to mean 0 and spread 1 over the held-out images",
    "sliced_wasserstein": "root mean square 2-Wasserstein distance over 128 random directions",
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


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """Pick the figures that decide: ratios at the median and at worst, copies, extreme shares."""
    ratios = {
        f"{space}, {measure.replace('_', ' ')}": values["samples_over_floor"]["ratio"]
        for space, measures in report["distances"].items()
        for measure, values in measures.items()
    }
    worst = max(ratios, key=lambda name: ratios[name])
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


def print_report(report: dict[str, Any]) -> None:
    """Print the readable form of the report."""
    print_copies(report["copies"])
    print_distances(report["distances"], report["sizes"]["per_side"])
    if report["traditions"]:
        print_traditions(report["traditions"])
    print_colours(report["colours"])
    if "inception" in report:
        print_inception(report["inception"], report["sizes"]["per_side"])
    print_headline(report["headline"])


def print_copies(copies: dict[str, Any]) -> None:
    """Print the shares of copies."""
    print("\nCopies of training images (mirrored ones included)    samples  95 % interval")
    rules = {
        "ratio_to_second_nearest": "d1/d2 < 1/3",
        "ratio_to_mean_of_nearest": "d1 < half the mean of the 50 nearest",
    }
    for rule, text in rules.items():
        for key, who in (("samples", text), ("heldout", "  the same for held-out images")):
            row = copies[rule][key]
            low, high = row["wilson_95"]
            print(f"  {who:<50}{row['share']:>9.2%}  {low:.2%} to {high:.2%}")
    nearest = copies["nearest_distance"]
    own, floor = (nearest[key]["d1_over_d2"][2] for key in ("samples", "heldout"))
    print(f"  median d1/d2: samples {own:.3f}, held-out {floor:.3f}")
    nearer = f"{nearest['sample_nearer_than_heldout']:.0%} of pairs"
    print(f"  a sample is nearer to the training images than a held-out image in {nearer}")


def print_distances(distances: dict[str, Any], n: int) -> None:
    """Print the table of distances."""
    print(f"\nDistances to held-out images, {n} against {n}, mean of {SPLITS} random splits")
    print(HEADER)
    for space, measures in distances.items():
        for measure, row in measures.items():
            print_distance(f"{space}, {measure.replace('_', ' ')}", row)


def print_distance(name: str, row: dict[str, Any]) -> None:
    """Print a distance of the samples and of the training images beside its floor."""
    values = "".join(f"{row[pair]['value']:>11.3g}" for pair in SOURCES)
    ratio, (low, high) = row["samples_over_floor"].values()
    print(f"  {name:<33}{values}   {ratio:5.2f}  ({low:.2f} to {high:.2f})")


def print_inception(found: dict[str, Any], n: int) -> None:
    """Print FID, KID and the Inception Score."""
    print(f"\nBy Inception's features and classes, {n} against {n}, mean of {SPLITS} random splits")
    print(HEADER)
    for name, row in found["distances"].items():
        print_distance(name.upper(), row)
    scores = "".join(f"{found['inception_score'][pair]['value']:>11.3g}" for pair in SOURCES)
    low, high = found["inception_score"]["samples"]["interval_95"]
    print(f"  {'Inception Score':<33}{scores}   samples {low:.3g} to {high:.3g}")
    row = found["all"]
    print(
        f"  All {row['samples']} samples, {row['heldout']} held-out images: FID {row['fid']:.4g}, "
        f"KID {row['kid']:.3g} ± {row['kid_spread']:.2g},\n"
        f"  Inception Score {row['inception_score']:.3g} ± {row['inception_score_spread']:.2g}. "
        "FID depends on the number of images: compare equal counts only."
    )


def print_traditions(traditions: dict[str, Any]) -> None:
    """Print the shares of the traditions."""
    error, (low, high) = traditions["classifier_error"], traditions["classifier_error_wilson_95"]
    wrong = f"{error:.2%} of held-out images, {low:.2%} to {high:.2%}"
    print(f"\nTraditions (classifier wrong on {wrong})")
    print(f"  {'':<24}{'share':>8}  {'95 % interval':<17}  of its fair share")
    columns = ("names", "share", "share_bootstrap_95", "share_over_fair")
    for name, share, (low, high), relative in zip(*(traditions[c] for c in columns), strict=True):
        mark = "" if 0.5 <= relative <= 2 else "  <- under half or over twice"
        bounds = f"{low:.2%} to {high:.2%}"
        print(f"  {name:<24}{share:>8.2%}  {bounds:<17}  {relative:.2f}{mark}")
    own, floor = traditions["unclear_share"], traditions["unclear_share_heldout"]
    print(f"  unclear images: {own:.2%} of the samples, {floor:.2%} of the held-out")


def print_colours(colours: dict[str, Any]) -> None:
    """Print the channel statistics."""
    print("\nColours (red green blue, 0 to 1)")
    print(" " * 12 + "".join(f"{key:<22}" for key in colours["samples"]))
    for folder, values in colours.items():
        cells = [" ".join(f"{v:.3f}" for v in value["rgb"]) for value in values.values()]
        print(f"  {folder:<10}" + "".join(f"{cell:<22}" for cell in cells))


def print_headline(result: dict[str, Any]) -> None:
    """Print the figures that decide."""
    print(
        f"\nDistance: {result['median_ratio']:.2f} times the floor at the median, "
        f"{result['worst_ratio']:.2f} at worst ({result['worst_ratio_of']})."
    )
    verdict = "more than" if result["more_copies_than_heldout"] else "no more than"
    print(
        f"Copies: {result['copy_share']:.2%} of the samples, {verdict} among held-out images "
        f"({result['copy_share_heldout']:.2%})."
    )
    if "rarest_tradition" in result:
        (rare, low), (common, high) = result["rarest_tradition"], result["commonest_tradition"]
        print(f"Traditions: {rare} at {low:.2f} of its fair share, {common} at {high:.2f}.")


def save_figure(
    path: Path, samples: Fabrics, train: Fabrics, found: Neighbours, rng: Generator
) -> None:
    """Draw samples above their nearest training images: the most alike, then a random choice."""
    groups = {
        "The samples most like one training image": torch.argsort(found.ratio, stable=True),
        "Samples picked at random": torch.from_numpy(rng.permutation(len(samples))),
    }
    halves = []
    for title, order in groups.items():
        images, captions = [], []
        for row in order[:16].reshape(2, 8):
            nearest = train.pixels[found.index[row, 0]]
            mirrored = found.mirrored[row, 0, None, None, None]
            images += [*samples.pixels[row], *torch.where(mirrored, nearest.flip(-1), nearest)]
            captions += [f"sample {i}" for i in row]
            captions += [f"d1 {found.distance[i, 0]:.2f}, d1/d2 {found.ratio[i]:.2f}" for i in row]
        title += " (above), and their nearest training images (below)"
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        halves.append(
            tile(pictures, 8, cell=128, title=title, captions=captions, resample=Resampling.NEAREST)
        )
    note = PngInfo()
    note.add_text("Software", TOOL)
    with write_atomically(path) as temporary:
        tile(halves, 1).save(temporary, pnginfo=note)


def is_ours(path: Path) -> bool:
    """Tell whether an earlier run wrote this report, or this figure."""
    if path.suffix.lower() == ".json":
        return (read_json(path) or {}).get("tool") in OUR_TOOLS
    try:
        with Image.open(path) as image:
            return image.info.get("Software") in OUR_TOOLS
    except (OSError, ValueError, Image.DecompressionBombError):
        return False
