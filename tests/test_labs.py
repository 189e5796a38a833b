"""The notebooks: made from their scripts, right where filled, helpful where not."""

import re
import sys

import nbclient
import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
from notebook import GAP, notebook_of

LABS = sorted((ROOT / "docs" / "labs").glob("*.py"))
GAPS = [(lab, gap) for lab in LABS for gap in range(len(GAP.findall(lab.read_text("utf-8"))))]


def notebooks():
    """Every notebook, and what it has to be."""
    script = ROOT / "docs" / "ddpm_from_scratch.py"
    yield script.with_suffix(".ipynb"), notebook_of(script.read_text("utf-8"))
    for lab in LABS:
        yield lab.with_suffix(".ipynb"), notebook_of(lab.read_text("utf-8"), solved=False)
        yield lab.with_name(f"{lab.stem}_solved.ipynb"), notebook_of(lab.read_text("utf-8"))


def test_notebooks_are_made_from_their_scripts():
    assert len(LABS) == 3
    for path, wanted in notebooks():
        found = path.read_text(encoding="utf-8")
        assert found == wanted, f"{path}: run python docs/make_figures.py --only notebooks"


@pytest.mark.parametrize(("lab", "gap"), GAPS, ids=lambda x: getattr(x, "stem", x))
def test_an_unfilled_gap_says_so(lab, gap, monkeypatch):
    """All gaps but one are filled, and the check of that one fails with a sentence."""
    monkeypatch.chdir(lab.parent)
    source, number = lab.read_text("utf-8"), iter(range(99))

    def fill(match):
        return match[0] if next(number) != gap else f"{match[1]}...\n"

    source = GAP.sub(fill, source).replace("range(300)", "range(120)").replace("plt.show()", "")
    name = re.findall(r"def (\w+)\(.*\n(?:    .*\n)*?    \.\.\.\n", source)[-1]
    with pytest.raises(AssertionError, match=rf"^{name}.* gives nothing yet: fill its gap\.$"):
        exec(compile(source, lab.name, "exec"), {"__name__": "notebook"})


@pytest.mark.parametrize("lab", [
    pytest.param(lab, id=lab.stem, marks=[] if lab.stem == "1_noise" else pytest.mark.slow)
    for lab in LABS
])  # fmt: skip
@pytest.mark.parametrize("place", ["docs/labs", "."])
def test_solutions_run(lab, place):
    """From their own folder and from the clone's, by the plain kernel."""
    notebook = nbformat.read(lab.with_name(f"{lab.stem}_solved.ipynb"), as_version=4)
    where = {"metadata": {"path": str(ROOT / place)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells if cell.cell_type == "code"
                      for out in cell.outputs)  # fmt: skip
    assert printed.count(": right.") >= 2


def test_labs_name_the_equations_of_the_pages():
    """Sphinx counts the labelled equations of the pages in their order; labs say the numbers."""
    pages = [ROOT / "docs" / f"{name}.rst" for name in ("1_noise", "2_denoising")]
    labels = re.findall(
        r"math::\n   :label: (\w+)", "".join(page.read_text("utf-8") for page in pages)
    )
    named = {
        int(number) for lab in LABS for number in re.findall(r"quation (\d+)", lab.read_text())
    }
    wanted = ("alphabar", "closed", "fromv", "guidance", "ddim")
    assert named == {labels.index(label) + 1 for label in wanted}
