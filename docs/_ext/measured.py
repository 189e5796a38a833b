"""Numbers, tables and program output that come from measurement files, never from the keyboard.

    :measured:`sampling.json ddim[steps=50].seconds | .1f`

looks into training_results/reference/sampling.json, takes the row of the list `ddim` whose
`steps` is 50, and writes its `seconds` with one decimal. A file, a key or a figure that is missing
or older than what it was made from is a warning by name; `sphinx-build -W` makes it an error.

Format: an optional factor (`/60`, `*100`) before a Python format (`.1f`, `,d`, `.0%`).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "training_results" / "reference"
MANIFEST = ROOT / "docs" / "images" / "figures.json"

logger = logging.getLogger(__name__)


class Missing(Exception):
    """A measurement or a figure that the lesson needs is not there."""


@cache
def read_measurements(name: str):
    """Read a JSON file as it is, or a CSV file as a list of rows with numbers where they fit."""
    path = REFERENCE / name
    if not path.is_file():
        raise Missing(f"the measurement file training_results/reference/{name} is missing")
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {key: as_number(value) for key, value in row.items()} for row in csv.DictReader(file)
        ]


def as_number(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def look_up(name: str, key: str):
    """Follow a key such as `ddim[steps=50].seconds` or `rows[-1].loss` into a file."""
    value = read_measurements(name)
    for part in re.findall(r"\[[^\]]*\]|[^.\[\]]+", key):
        try:
            if not part.startswith("["):
                value = value[part]
            elif "=" in part:
                field, wanted = part[1:-1].split("=", 1)
                value = next(row for row in value if row.get(field) == as_number(wanted))
            else:
                value = value[part[1:-1] if isinstance(value, dict) else int(part[1:-1])]
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            raise Missing(f"training_results/reference/{name} has no '{key}'") from error
    return value


def show(value, form: str) -> str:
    """Format a value; the factor comes first: `/60 .1f` shows seconds as minutes."""
    factor = re.match(r"([*/])\s*([\d.e+-]+)\s*", form)
    if factor:
        number = float(factor.group(2))
        value = value * number if factor.group(1) == "*" else value / number
        form = form[factor.end() :]
    if form.endswith("d"):
        value = round(value)
    return format(value, form) if form else str(value)


def measured_node(name: str, key: str, form: str, location) -> nodes.Node:
    """Make the inline node of one number; a warning by name where there is none."""
    try:
        text = show(look_up(name, key), form)
    except (Missing, ValueError, TypeError) as error:
        logger.warning("%s", error, location=location, type="lesson", subtype="measured")
        return nodes.problematic("", f"[{name} {key}]")
    return Measured(text, text, source=name, key=key, form=form)


def depend_on(env, name: str) -> None:
    """Have Sphinx read the page again when the file changes."""
    env.note_dependency(str(REFERENCE / name))


class Measured(nodes.inline):
    """A number with the place it came from, which the tests read in the page."""


def visit_measured(translator, node) -> None:
    source = {f"data-{key}": node[key] for key in ("source", "key", "form")}
    translator.body.append(translator.starttag(node, "span", "", CLASS="measured", **source))


def depart_measured(translator, node) -> None:
    translator.body.append("</span>")


class MeasuredRole(SphinxRole):
    """The role `measured`: file, key and format."""

    def run(self):
        match = re.fullmatch(r"(\S+)\s+([^|]+?)\s*(?:\|\s*(.*))?", self.text)
        if not match:
            logger.warning("not 'file key | format': %s", self.text, location=self.get_location())
            return [], []
        name, key, form = match.groups()
        depend_on(self.env, name)
        return [measured_node(name, key, form or "", self.get_location())], []


class MeasuredTable(SphinxDirective):
    """A table whose rows are a list in a measurement file: `.. measured-table:: file list`.

    Where the rows are a dictionary, the field `@` stands for their names, and `.` for the values
    where these are plain numbers.
    """

    required_arguments = 2
    option_spec = {  # noqa: RUF012
        "columns": directives.unchanged_required,  # one per line: Heading = field | format
        "where": directives.unchanged,  # field=value: only these rows
        "caption": directives.unchanged,
    }

    def run(self):
        name, key = self.arguments
        depend_on(self.env, name)
        columns = []
        for line in filter(str.strip, self.options["columns"].splitlines()):
            heading, _, cell = line.partition("=")
            field, _, form = cell.partition("|")
            columns.append((heading.strip(), field.strip(), form.strip()))
        try:
            rows = look_up(name, key)
            keys = list(rows) if isinstance(rows, dict) else range(len(rows))
            chosen = [i for i in keys if self.wanted(look_up(name, f"{key}[{i}]"))]
        except Missing as error:
            logger.warning("%s", error, location=self.get_location(), type="lesson")
            return []
        table = nodes.table(classes=["measured-table"])
        if "caption" in self.options:
            children, _ = self.parse_inline(self.options["caption"])
            table += nodes.title(self.options["caption"], "", *children)
        group = nodes.tgroup(cols=len(columns))
        table += group
        group += [nodes.colspec(colwidth=1) for _ in columns]
        head = nodes.thead()
        head += self.row([self.parse_inline(heading)[0] for heading, _, _ in columns])
        body = nodes.tbody()
        for i in chosen:
            body += self.row([self.cell(name, key, i, *column[1:]) for column in columns])
        group += [head, body]
        return [table]

    def cell(self, name: str, key: str, row: int | str, field: str, form: str) -> nodes.Node:
        if field == "@":
            return nodes.Text(str(row))
        path = f"{key}[{row}]" if field == "." else f"{key}[{row}].{field}"
        return measured_node(name, path, form, self.get_location())

    def wanted(self, row) -> bool:
        field, _, value = self.options.get("where", "").partition("=")
        return not field or row.get(field) == as_number(value)

    @staticmethod
    def row(cells) -> nodes.row:
        row = nodes.row()
        for content in cells:
            entry, paragraph = nodes.entry(), nodes.paragraph()
            paragraph += content
            entry += paragraph
            row += entry
        return row


class Transcript(SphinxDirective):
    """A command and what it printed when docs/make_figures.py ran it."""

    required_arguments = 1
    option_spec = {"output-only": directives.flag}  # noqa: RUF012

    def run(self):
        depend_on(self.env, "transcripts.json")
        try:
            run = look_up("transcripts.json", self.arguments[0])
        except Missing as error:
            logger.warning("%s", error, location=self.get_location(), type="lesson")
            return []
        text = f"$ {run['command']}\n{run['output'].rstrip()}\n"
        if "output-only" in self.options:
            text = run["output"].rstrip() + "\n"
        block = nodes.literal_block(text, text, language="console", classes=["transcript"])
        block["run"] = self.arguments[0]
        return [block]


# ---- Figures: there, and not older than what they were made from ---------------------------------


@cache
def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def figure_faults(name: str) -> list[str]:
    """Say what is wrong with a made file (a path from the repository's root)."""
    again = "run: python docs/make_figures.py"
    if not (ROOT / name).is_file():
        return [f"{name} is missing; {again}"]
    record = json.loads(MANIFEST.read_text()) if MANIFEST.is_file() else {}
    entry = record.get(name)
    if entry is None:
        return [f"{name} is not listed in docs/images/figures.json; {again}"]
    faults = []
    if sha256(ROOT / name) != entry["sha256"]:
        faults.append(f"{name} is not the file that docs/make_figures.py wrote; {again}")
    for source, digest in entry["made_from"].items():
        if not (ROOT / source).is_file():
            faults.append(f"{name} was made from {source}, which is missing")
        elif sha256(ROOT / source) != digest:
            faults.append(f"{name} is out of date: {source} has changed since; {again}")
    return faults


def check_figures(app, env) -> None:
    """Look at every made figure: those that the pages show, and those in the list."""
    shown = set(json.loads(MANIFEST.read_text())) if MANIFEST.is_file() else set()
    shown |= {f"docs/{path}" for path in env.images if path.startswith("images/")}
    shown |= {f"docs/{path}" for path in getattr(env, "lesson_assets", set())}
    for name in sorted(shown):
        for fault in figure_faults(name):
            logger.warning("%s", fault, type="lesson", subtype="figure")


def setup(app):
    app.add_node(Measured, html=(visit_measured, depart_measured))
    app.add_role("measured", MeasuredRole())
    app.add_directive("measured-table", MeasuredTable)
    app.add_directive("transcript", Transcript)
    app.connect("env-updated", lambda app, env: check_figures(app, env))
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
