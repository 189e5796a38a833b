"""Shares of the traditions, corrected for the classifier's errors, and statistics of colours."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ddpm_basics.evaluation.features import Classifier, in_batches
from ddpm_basics.evaluation.folders import Fabrics
from ddpm_basics.evaluation.intervals import BOOTSTRAPS, interval, wilson


def predict(classifier: Classifier, fabrics: Fabrics, device) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest tradition of each image (N,) and its probability (N,)."""
    scores = in_batches(lambda x, where: classifier(x), fabrics, device, "classifying")
    confidence, guess = scores.softmax(1).max(1)
    return guess.numpy(), confidence.numpy()


def confusion_matrix(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Count pairs (classes, classes): row = true tradition, column = guess."""
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth, guess), 1)
    return counts


def true_shares(guessed: np.ndarray, confusion: np.ndarray, steps: int = 500) -> np.ndarray:
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
    names: list[str],
    samples: tuple[np.ndarray, np.ndarray],
    heldout: tuple[np.ndarray, np.ndarray],
    truth: np.ndarray,
    fair: np.ndarray,
    rng: np.random.Generator,
) -> dict:
    """Shares of the traditions among the samples, from predictions (guess, confidence).

    The bootstrap draws the samples and the held-out images behind the confusion matrix anew.
    """
    k, (guess, confidence), (checked, sure) = len(names), samples, heldout
    confusion = confusion_matrix(truth, checked, k)
    guessed = np.bincount(guess, minlength=k) / len(guess)
    shares = true_shares(guessed, confusion)
    guesses = rng.multinomial(len(guess), guessed, BOOTSTRAPS) / len(guess)
    rows = confusion.sum(1).astype(int)
    rates = confusion / rows[:, None]
    confusions = np.stack(
        [rng.multinomial(n, rate, BOOTSTRAPS) for n, rate in zip(rows, rates, strict=True)], 1
    )
    resampled = true_shares(guesses, confusions, steps=200)
    wrong = int((truth != checked).sum())
    threshold = float(np.quantile(sure, 0.05))
    return {
        "names": names,
        "fair_share": fair.tolist(),
        "guessed_share": guessed.tolist(),
        "share": shares.tolist(),
        "share_bootstrap_95": [interval(resampled[:, i]) for i in range(k)],
        "share_over_fair": (shares / fair).tolist(),
        "recall_on_heldout": np.diag(rates).tolist(),
        "confusion_on_heldout": confusion.astype(int).tolist(),
        "classifier_error": wrong / len(truth),
        "classifier_error_wilson_95": wilson(wrong, len(truth)),
        "unclear_share": float((confidence < threshold).mean()),
        "unclear_share_heldout": float((sure < threshold).mean()),
    }


def fair_shares(names: list[str], train: Fabrics, heldout: Fabrics) -> np.ndarray:
    """Shares of the traditions among the training images, or, if unlabelled, the held-out ones."""
    counts = Counter(train.labels)
    if set(counts) != set(names):
        print(
            f"The subfolders of {train.folder} and {heldout.folder} differ: the fair shares are "
            "those of the latter."
        )
        counts = Counter(heldout.labels)
    return np.array([counts[name] for name in names]) / counts.total()


def colour_report(folders: dict[str, Fabrics], rng: np.random.Generator) -> dict:
    """Channel statistics in units of the range 0 to 1, each with a bootstrap interval over images.

    mean, spread: over all pixels of all images; palette: spread of the images' mean colours;
    contrast: spread inside an image, averaged (root mean square).
    """
    report = {}
    for name, fabrics in folders.items():
        flat = fabrics.pixels.flatten(2).double() / 255
        mean, power = flat.mean(2).numpy(), flat.square().mean(2).numpy()  # (N, 3) each
        weights = rng.multinomial(len(mean), np.full(len(mean), 1 / len(mean)), BOOTSTRAPS // 4)
        resampled = colour_moments(weights / len(mean), mean, power)
        exact = colour_moments(np.full((1, len(mean)), 1 / len(mean)), mean, power)
        report[name] = {
            key: {
                "rgb": exact[key][0].tolist(),
                "bootstrap_95": [interval(resampled[key][:, c]) for c in range(3)],
            }
            for key in exact
        }
    return report


def colour_moments(weights: np.ndarray, mean: np.ndarray, power: np.ndarray) -> dict:
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
