"""README and the model card quote measured figures: they are the ones in the measurement files."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import readme_figures


@pytest.mark.parametrize("block", readme_figures.BLOCKS, ids=lambda block: block[3].__name__)
def test_figures_are_made_from_the_measurements(block):
    text = block[0].read_text(encoding="utf-8")
    assert text == readme_figures.filled(*block), "run: python tests/benchmarks/readme_figures.py"
