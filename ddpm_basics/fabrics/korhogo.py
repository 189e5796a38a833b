"""Korhogo cloth: strips painted with animals and masks in mud."""

from __future__ import annotations

import numpy as np

from ddpm_basics.fabrics.cloth import Cloth
from ddpm_basics.fabrics.colour import Array
from ddpm_basics.fabrics.shapes import Shape, each, fold, grid, lookup, radius, wave


def fish(u: Array, v: Array) -> Array:
    """A fish, its head to the right, with its scales left open."""
    body = np.abs(v) - 0.21 * (1 - ((u - 0.05) / 0.36) ** 2)
    tail = np.maximum(np.abs(v) + (u + 0.26) * 1.1 - 0.04, -(u + 0.46))
    fins = np.maximum(np.abs(v) - 0.30 + 1.2 * np.abs(u), -0.4 + np.abs(u))
    scales = np.maximum(np.abs(fold((u + np.abs(v) * 0.8) * 7)) / 7 - 0.022, np.abs(u) - 0.2)
    eye = np.abs(radius(u - 0.27, v + 0.04) - 0.035) - 0.016
    return np.maximum(np.minimum(np.minimum(body, tail), fins), -np.minimum(scales, eye))


def turtle(u: Array, v: Array) -> Array:
    """A turtle from above, with a chequered shell."""
    shell = radius(u, v * 0.85) - 0.27
    legs = radius(np.abs(u) - 0.27, np.abs(v) - 0.27) - 0.085
    head = radius(u, v + 0.40) - 0.09
    tail = np.maximum(np.abs(u) - 0.03, np.abs(v - 0.36) - 0.11)
    p, q = fold((u + v) * 5), fold((u - v) * 5)
    net = np.maximum(np.minimum(0.5 - np.abs(p), 0.5 - np.abs(q)) / 5 - 0.02, shell + 0.05)
    outer = np.minimum(np.minimum(shell, legs), np.minimum(head, tail))
    return np.maximum(outer, -net)


def bird(u: Array, v: Array) -> Array:
    """A long-legged bird, looking right."""
    body = radius((u + 0.06) * 0.72, v + 0.02 + 0.25 * (u + 0.06)) - 0.17
    neck = np.maximum(np.abs(u - 0.20 + 0.25 * (v + 0.2)) - 0.05, np.abs(v + 0.20) - 0.15)
    head = radius(u - 0.25, v + 0.35) - 0.075
    beak = np.maximum(np.abs(v + 0.34) + 0.35 * (u - 0.46), 0.3 - u) - 0.01
    legs = np.maximum(np.abs(np.abs(u + 0.03) - 0.08) - 0.026, np.abs(v - 0.28) - 0.17)
    feet = np.maximum(np.abs(v - 0.43) - 0.025, np.abs(u) - 0.20)
    wing = np.maximum(np.abs(fold((v * 1.0 + 0.5 * u) * 8)) / 8 - 0.022, body + 0.06)
    outer = np.minimum(
        np.minimum(np.minimum(body, neck), np.minimum(head, beak)), np.minimum(legs, feet)
    )
    return np.maximum(outer, -wing)


def crocodile(u: Array, v: Array) -> Array:
    """A crocodile from above, along the cell, with bands on its back."""
    half = np.interp(u, [-0.47, -0.2, 0.0, 0.2, 0.27, 0.46], [0.0, 0.11, 0.15, 0.12, 0.085, 0.06])
    body = np.maximum(np.abs(v) - half, u - 0.46)
    legs = np.maximum(np.abs(np.abs(u) - 0.17 - 0.1 * np.abs(v)) - 0.042, np.abs(v) - 0.31)
    spine = np.abs(fold(u * 7)) / 7 + np.abs(v) * 0.7 - 0.042
    return np.maximum(np.minimum(body, legs), -np.maximum(spine, np.abs(u) - 0.25))


def mask_face(u: Array, v: Array) -> Array:
    """A carved face with horns."""
    face = radius(u * 1.25, (v - 0.05) * 0.82) - 0.30
    horns = np.abs(radius(np.abs(u) - 0.18, v + 0.24) - 0.17) - 0.04
    horns = np.maximum(horns, v + 0.20)
    eyes = np.maximum(np.abs(v + 0.02) - 0.03, np.abs(np.abs(u) - 0.11) - 0.065)
    nose = np.maximum(np.abs(u) - 0.024, np.abs(v - 0.06) - 0.11)
    mouth = np.maximum(np.abs(v - 0.25) - 0.03, np.abs(u) - 0.075)
    return np.maximum(np.minimum(face, horns), -np.minimum(np.minimum(eyes, nose), mouth))


def mirrored(shape: Shape) -> Shape:
    """The same, looking the other way."""
    return lambda u, v: shape(-u, v)


KORHOGO_DYES = """
e8dcc0 2a1c16 a9703c
f0e7d2 1c1715 b5843f
dfcba2 33201a 8c4f2a
ead9b5 3e2a1c c08a45
e3d6c0 241a20 7a4a34
"""


def korhogo(cloth: Cloth) -> None:
    """Korhogo cloth: strips painted with animals and masks in mud; Senufo, Côte d'Ivoire.

    Freehand or stencilled in brown-black on undyed cotton: fish, turtle, bird, crocodile, masked
    dancer, within bands of geometry. See John Gillow, "African Textiles" (2003); Picton and Mack,
    "African Textiles" (1979).
    """
    rng = cloth.rng
    cloth.hold(turn=6, hand=0.013)
    ground, ink, warm = cloth.dyes(KORHOGO_DYES)
    cloth.fill(ground)
    kinds = [fish, turtle, bird, crocodile, mask_face, *map(mirrored, (fish, turtle, bird))]
    layout = rng.integers(4)
    scale = [0.56, 0.62, 0.95, 0.95][layout] * rng.uniform(0.9, 1.15)
    i, j, u, v = grid(cloth, scale, aspect=1.0 if layout != 2 else 1.25)
    if layout == 0:  # one animal
        u, v = cloth.x * scale + rng.uniform(-0.05, 0.05), cloth.y * scale
        i, j = np.zeros(u.shape, int), np.zeros(u.shape, int)
    table = rng.integers(0, 8, (1, 1) if layout == 0 else (3, 3))
    if layout == 2:  # rows of one animal
        table = rng.permutation(8)[:3][None, :]
    which = lookup(table, i, j)
    room = 1.18 if layout else 1.3
    distance = each(which, kinds, u * room, v * room) / room
    edge = 0.5 - np.maximum(np.abs(u), np.abs(v))
    if layout == 0:
        far = np.maximum(np.abs(u), np.abs(v)) - 0.42
        teeth = np.maximum(np.abs(far - 0.05) - 0.018 - 0.04 * wave(u * 9) * wave(v * 9), -far)
        distance = np.minimum(distance, teeth)
        cloth.paint(0.75 * cloth.ink(-far, scale), warm)
    elif layout == 2:
        band = 0.5 - np.abs(v)
        distance = np.minimum(distance, np.maximum(band - 0.05, wave(u * 5) * 0.1 - 0.05))
        cloth.paint(0.7 * cloth.ink(band - 0.06, scale), warm)
    elif layout == 3:
        cloth.paint(0.6 * ((i + j) % 2 == 0), warm)
        distance = np.minimum(distance, edge - 0.02)
    else:
        distance = np.minimum(distance, np.abs(edge - 0.015) - 0.02)
    cloth.paint(cloth.ink(distance + 0.008 * cloth.noise(24), scale, 2), ink)
    cloth.slub, cloth.mottle = 0.026, 0.02
