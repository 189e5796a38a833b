"""The data card: README.md in a drawn folder, in the form that hubs of data sets read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ddpm_basics.fabrics.manifest import MANIFEST, Manifest
from ddpm_basics.files import write_atomically

CARD = "README.md"
BEGINNING = "---\n# Written by ddpm_basics.fabrics.\n"  # so that nobody else's is replaced
TEXT = """license: mit
pretty_name: African fabrics, drawn by a program
task_categories:
- unconditional-image-generation
- image-classification
size_categories:
- {size_category}
annotations_creators:
- machine-generated
source_datasets:
- original
tags:
- synthetic
- textiles
- diffusion
configs:
- config_name: default
  drop_labels: false
  data_files:
  - split: {split}
    path: "*/*.png"
---

# African fabrics, drawn by a program

{count} pictures of {size}x{size} pixels, RGB, PNG: cloth after {kinds} African textile traditions,
drawn for the module DDPM Basics, where a diffusion model learns to draw more of it.

## Uses

For learning how generative models and classifiers work. Labels are exact, more pictures of the same
kind can be drawn at will, and held-out ones show what a model has learned by heart.

Not as a source on textiles. These are drawings in homage, made by rules that were taken from books;
they are no authentic cloth, the people whose work they look up to had no part in them, and they
should not be shown or sold as theirs.

## Structure

A folder for each label, one file a picture; `{manifest}` holds what was drawn, the label and a
checksum of every file. There are no other annotations, and no people or personal data.

| label | pictures |
| --- | --- |
{table}

## Creation

```
python -m ddpm_basics.fabrics --split {command_split} --seed {seed} --count {count} --size {size}
```

draws the same pixels again, on any machine: version {version} of the drawings, SHA-256 of all
pixels `{sha256}`. A picture's number, seed and split decide it
alone. `train` and `heldout` share no picture.

## Limits

Each tradition is a program of a hundred lines, so there is less in it than in one cloth: no weave
that could be zoomed into, no meanings, few of a tradition's motifs. All labels are about equally
frequent, which no collection is.

## Licence

MIT, like the module; its `CITATION.cff` says how to cite it.
"""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Describe a folder of drawn fabrics; a README.md that somebody else wrote stays."""
    path = folder / CARD
    if path.exists() and not is_card(path):
        return
    counts = Counter(manifest.traditions.values())
    text = BEGINNING + TEXT.format(
        **{key: getattr(manifest, key) for key in ("count", "size", "seed", "version", "sha256")},
        split="train" if manifest.split == "train" else "test",  # the word of the hubs
        command_split=manifest.split,
        size_category=size_category(manifest.count),
        kinds=len(counts),
        manifest=MANIFEST,
        table="\n".join(f"| {name} | {count} |" for name, count in sorted(counts.items())),
    )
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with write_atomically(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def is_card(path: Path) -> bool:
    """Tell whether a file is a card that this package wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except (OSError, ValueError):
        return False


def size_category(count: int) -> str:
    """Return the hubs' word for so many pictures."""
    sizes, names = [10**3, 10**4, 10**5, 10**6, 10**7], ["1K", "10K", "100K", "1M", "10M"]
    above = sum(count >= size for size in sizes)
    if above == 0:
        return "n<1K"
    return f"{names[above - 1]}<n<{names[above]}" if above < len(names) else "n>10M"
