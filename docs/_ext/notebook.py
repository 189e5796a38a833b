"""A script with `# %%` marks as a notebook: docs/ddpm_from_scratch.ipynb comes from the .py."""

from __future__ import annotations

import json
import re


def notebook_of(source: str) -> str:
    """Cut a script at its `# %%` lines; return a notebook (format 4.5), without any output."""
    cells = []
    for mark, body in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source, re.M | re.S):
        text = re.sub(r"^# ?", "", body, flags=re.M) if mark else body
        text = text.strip("\n")
        if "__main__" in text:  # a notebook has no command line
            text = text.replace('if __name__ == "__main__":\n    main()', "main([])")
        cells.append({
            "cell_type": "markdown" if mark else "code",
            "id": f"cell-{len(cells):02d}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        } | ({} if mark else {"execution_count": None, "outputs": []}))  # fmt: skip
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
