"""The check below each gap of the notebooks in docs/labs/."""

from __future__ import annotations

from typing import Any

import torch


def check(name: str, found: Any, wanted: Any) -> None:
    """Compare what a filled gap gives, a tensor or a number, with what is right.

    Prints that it is right, or raises AssertionError with a sentence that says what is not.
    """
    assert found is not None, f"{name} gives nothing yet: fill its gap."
    found, wanted = torch.as_tensor(found).detach(), torch.as_tensor(wanted).detach()
    assert found.shape == wanted.shape, (
        f"{name} gives {list(found.shape)} numbers where {list(wanted.shape)} are right: look at "
        "the dimensions."
    )
    apart = (found.float() - wanted.float()).abs().max().item()
    assert apart < 1e-4, f"{name} is off by up to {apart:.3g}: look at its formula again."
    print(f"{name}: right.")
