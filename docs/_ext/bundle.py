"""The lesson's download: ddpm_basics.zip, made beside the pages when the lesson is built.

It holds the folder ddpm_basics/ with what a learner runs, laid out as in the repository: the
exercises, the package, the weights and their card, requirements, README and licence.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
NAME = "ddpm_basics"
CONTENTS = ("exercise*.py", "ddpm_basics/**/*.py", "docs/labs/*.ipynb",
            "models/ddpm_african_fabrics.pt", "models/README.md", "requirements.txt",
            "requirements-extras.txt", "README.rst", "LICENSE")  # fmt: skip

logger = logging.getLogger(__name__)


def write_bundle(app, exception) -> None:
    """Write the zip; the same contents make the same bytes, whatever the clock says."""
    if exception or app.builder.format != "html":
        return
    with zipfile.ZipFile(Path(app.outdir, f"{NAME}.zip"), "w") as bundle:
        for pattern in CONTENTS:
            paths = sorted(ROOT.glob(pattern))
            if not paths:
                logger.warning("%s.zip lacks %s", NAME, pattern, type="lesson", subtype="bundle")
            for path in paths:
                entry = zipfile.ZipInfo(f"{NAME}/{path.relative_to(ROOT).as_posix()}")
                entry.external_attr = 0o644 << 16
                if path.suffix != ".pt":  # weights hardly shrink
                    entry.compress_type = zipfile.ZIP_DEFLATED
                bundle.writestr(entry, path.read_bytes())


def setup(app):
    app.connect("build-finished", write_bundle)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
