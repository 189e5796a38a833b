"""Shares of the traditions, corrected for the classifier's errors, and statistics of colours."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from ddpm_basics.evaluation.features import Classifier, in_batches
from ddpm_basics.evaluation.folders import BATCH, Fabrics, collect
from ddpm_basics.evaluation.intervals import BOOTSTRAPS, interval, wilson

Floats = NDArray[np.float64]


def predict(
    classifier: Classifier, fabrics: Fabrics, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the likeliest tradition of each image (N,) and its probability (N,)."""
    confidence, guess = in_batches(classifier, device, "classifying", fabrics).softmax(1).max(1)
    return guess.numpy(), confidence.numpy()


def true_shares(guessed: Floats, confusion: Floats, steps: int = 500) -> Floats:
    """Shares p that explain the guessed shares q through the classifier's errors: q = p C.

    `guessed` (..., K) are shares, `confusion` (..., K, K) counts with true traditions in rows. The
    maximum-likelihood p, which cannot go negative as C's inverse makes it do, by EM
    (Saerens, Latinne & Decaestecker 2002): p_i <- sum_j q_j p_i C_ij / (p C)_j.
    """
    rates = (confusion + 1e-6) / (confusion + 1e-6).sum(-1, keepdims=True)
    shares = np.full(guessed.shape, 1 / guessed.shape[-1])
    for _ in range(steps):
        expected = np.einsum("...i,...ij->...j", shares, rates)
        shares = shares * np.einsum("...ij,...j->...i", rates, guessed / expected)
    return shares


def tradition_report(
    classifier: Classifier,
    folders: dict[str, Fabrics],
    rng: Generator,
    device: torch.device,
) -> dict[str, Any]:
    """Shares of the traditions among the samples, beside those among the training images.

    folders: "samples", "train", and the "heldout" that the classifier was not trained on.
    """
    names, k, heldout = classifier.names, len(classifier.names), folders["heldout"]
    guess, confidence = predict(classifier, folders["samples"], device)
    checked, sure = predict(classifier, heldout, device)
    truth = np.array([names.index(label) for label in heldout.labels])
    fair = fair_shares(names, folders["train"], heldout)
    confusion = np.zeros((k, k))  # row = true tradition, column = guess
    np.add.at(confusion, (truth, checked), 1)
    guessed = np.bincount(guess, minlength=k) / len(guess)
    shares = true_shares(guessed, confusion)
    resampled = resample_shares(guessed, len(guess), confusion, rng)
    wrong = int((truth != checked).sum())
    threshold = float(np.quantile(sure, 0.05))
    return {
        "names": names,
        "fair_share": fair.tolist(),
        "guessed_share": guessed.tolist(),
        "share": shares.tolist(),
        "share_bootstrap_95": [interval(column) for column in resampled.T],
        "share_over_fair": (shares / fair).tolist(),
        "recall_on_heldout": (np.diag(confusion) / confusion.sum(1)).tolist(),
        "confusion_on_heldout": confusion.astype(int).tolist(),
        "classifier_error": wrong / len(truth),
        "classifier_error_wilson_95": wilson(wrong, len(truth)),
        "unclear_share": float((confidence < threshold).mean()),
        "unclear_share_heldout": float((sure < threshold).mean()),
    }


def resample_shares(guessed: Floats, count: int, confusion: Floats, rng: Generator) -> Floats:
    """Draw the samples and the held-out images behind the confusion matrix anew: (B, K) shares."""
    guesses = rng.multinomial(count, guessed, BOOTSTRAPS) / count
    rows = [rng.multinomial(int(row.sum()), row / row.sum(), BOOTSTRAPS) for row in confusion]
    return true_shares(guesses, np.stack(rows, 1), steps=200)


def fair_shares(names: list[str], train: Fabrics, heldout: Fabrics) -> Floats:
    """Shares of the traditions among the training images, or, if unlabelled, the held-out ones."""
    counts = Counter(train.labels)
    if set(counts) != set(names):
        print(
            f"The subfolders of {train.folder} and {heldout.folder} differ: the fair shares are "
            "those of the latter."
        )
        counts = Counter(heldout.labels)
    return np.array([counts[name] for name in names]) / counts.total()


def colour_report(folders: dict[str, Fabrics], rng: Generator) -> dict[str, Any]:
    """Channel statistics in units of the range 0 to 1, each with a bootstrap interval over images.

    mean, spread: over all pixels of all images; palette: spread of the images' mean colours;
    contrast: spread inside an image, averaged (root mean square).
    """
    report = {}
    for name, fabrics in folders.items():
        n, parts = len(fabrics), map(channel_moments, fabrics.in_parts(BATCH))
        mean, power = (moments.numpy() for moments in collect(n, parts))
        even = np.full(n, 1 / n)
        resampled = [
            colour_moments(rng.multinomial(n, even, 1) / n, mean, power)
            for _ in range(BOOTSTRAPS // 4)
        ]
        exact = colour_moments(even[None], mean, power)
        report[name] = {
            key: {
                "rgb": exact[key][0].tolist(),
                "bootstrap_95": [
                    interval(channel)
                    for channel in np.concatenate([own[key] for own in resampled]).T
                ],
            }
            for key in exact
        }
    return report


def channel_moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Means and mean squares (N, 3) of the channels of images (N, 3, H, W) uint8, as 0 to 1."""
    flat = pixels.flatten(2).double() / 255
    return flat.mean(2), flat.square().mean(2)


def colour_moments(weights: Floats, mean: Floats, power: Floats) -> dict[str, Floats]:
    """Moments (B, 3) under weights (B, N) of images with channel means and mean squares (N, 3)."""
    centre = weights @ mean
    palette = np.maximum(weights @ mean**2 - centre**2, 0)
    contrast = np.maximum(weights @ (power - mean**2), 0)
    return {
        "mean": centre,
        "spread": np.sqrt(palette + contrast),
        "palette": np.sqrt(palette),
        "contrast": np.sqrt(contrast),
    }
