"""README quotes measured figures: they are the ones in the measurement files."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import readme_figures


def test_the_table_is_made_from_the_measurements():
    found = readme_figures.BLOCK.search(readme_figures.README.read_text(encoding="utf-8"))
    assert found, "the comments around the table are gone"
    assert found[0] == readme_figures.table(), "run: python tests/benchmarks/readme_figures.py"


def test_a_line_for_every_kind_of_measurement():
    words = " ".join(what for what, _ in readme_figures.rows())
    for kind in ("fabrics drawn", "sample()", "Training step of 32", "kill -9", "memory"):
        assert kind in words
