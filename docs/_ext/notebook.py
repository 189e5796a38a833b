"""A script with `# %%` marks as a notebook, by jupytext; labs have gaps, which may be filled.

In a lab, what stands between `# GAP hint` and `# END` is the solution: the notebook with solutions
has it below its hint, the other one has `...` and the hint.
"""

from __future__ import annotations

import re

import jupytext

GAP = re.compile(r"^( *)# GAP (.*)\n((?:.*\n)*?) *# END\n", re.M)


def notebook_of(source: str, solved: bool = True) -> str:
    """Return a notebook (format 4.5) of the cells of a script, without any output."""
    cells = source[source.index("# %%") :].replace(
        'if __name__ == "__main__":\n    main()',
        "main([])",  # a notebook has no command line
    )
    text = GAP.sub(r"\1# \2\n\3" if solved else r"\1...  # \2\n", cells)
    notebook = jupytext.reads(text, "py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"  # the same source makes the same file
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return jupytext.writes(notebook, "ipynb") + "\n"
