"""How long a page takes, computed: `:minutes:`1_noise`` of reading and of running its commands.

Words that can be seen are read at 200 a minute; folded answers and code do not count. Commands that
can be seen took the seconds of commands.json and transcripts.json when docs/make_figures.py ran
them. `:minutes:`1_noise reading`` and `:minutes:`1_noise running`` are the two parts.
"""

from __future__ import annotations

from docutils import nodes
from lesson_parts import QuizNode
from measured import Missing, look_up, read_measurements
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

WORDS_A_MINUTE = 200

logger = logging.getLogger(__name__)


class Minutes(nodes.General, nodes.Inline, nodes.Element):
    """A number that is known when all pages have been read."""


class MinutesRole(SphinxRole):
    """`:minutes:`PAGE``, with `reading` or `running` behind it for a part."""

    def run(self):
        page, _, part = self.text.partition(" ")
        return [Minutes(page=page, part=part, location=self.get_location())], []


def is_folded(node: nodes.Node) -> bool:
    """Say whether a reader has to open something to see a node."""
    while node is not None:
        if isinstance(node, QuizNode):
            return True
        if isinstance(node, nodes.Element) and node.get("design_component") == "dropdown":
            return True
        node = node.parent
    return False


def count(app, doctree: nodes.document) -> None:
    """Note the words and the commands of a page that can be seen."""
    hidden = (nodes.literal_block, nodes.math, nodes.math_block, nodes.raw, nodes.comment)
    words, commands = 0, []
    for text in doctree.findall(nodes.Text):
        if not is_folded(text) and not isinstance(text.parent, hidden):
            words += len(text.astext().split())
    for block in doctree.findall(nodes.literal_block):
        shown = block.get("language") == "console" and not is_folded(block)
        if shown and "no-test" not in block["classes"]:
            lines = block.astext().splitlines()
            commands += [line[2:] for line in lines if line.startswith("$ ")]
    pages = getattr(app.env, "lesson_minutes", {})
    pages[app.env.docname] = words, commands
    app.env.lesson_minutes = pages


def seconds(command: str) -> float:
    """Look up how long a command took. Raises Missing."""
    for run in read_measurements("transcripts.json").values():
        if run["command"] == command:
            return run["seconds"]
    return look_up("commands.json", f"seconds[{command}]")


def fill(app, doctree: nodes.document, docname: str) -> None:
    """Put the numbers in."""
    for node in list(doctree.findall(Minutes)):
        words, commands = app.env.lesson_minutes[node["page"]]
        try:
            running = sum(map(seconds, commands)) / 60
        except Missing as error:
            logger.warning("%s", error, location=node["location"], type="lesson")
            running = 0
        parts = {"reading": round(words / WORDS_A_MINUTE), "running": round(running)}
        node.replace_self(nodes.Text(str(parts.get(node["part"], sum(parts.values())))))


def setup(app):
    app.add_node(Minutes)
    app.add_role("minutes", MinutesRole())
    app.connect("doctree-read", count)
    app.connect("doctree-resolved", fill)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
