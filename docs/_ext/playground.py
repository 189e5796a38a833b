"""`.. playground::`: fabrics drawn in the reader's own browser; a still strip where nothing runs.

The content is the caption of the strip. Scripts and looks are put into the page that has it, and
into no other one; the engine and its weights come at the first click.
"""

from __future__ import annotations

from html import escape

from docutils import nodes
from docutils.parsers.rst import directives
from lesson_parts import copy_asset
from measured import look_up
from sphinx.util.docutils import SphinxDirective

FORM = """
<div class="playground-live" hidden>
<form autocomplete="off">
<div><label for="playground-tradition">Tradition</label>
<select id="playground-tradition" name="tradition">{options}</select></div>
<div><label for="playground-guidance">Guidance w: <span></span></label>
<input type="range" id="playground-guidance" name="guidance" value="2" min="0" max="5" step="0.5">
</div>
<div><label for="playground-steps">Steps: <span></span></label>
<input type="range" id="playground-steps" name="steps" min="1" max="50" step="1" value="20"></div>
<div><label for="playground-seed">Seed</label>
<input type="number" id="playground-seed" name="seed" value="{seed}" min="0" max="999999" required>
</div>
<div><label for="playground-count">Fabrics at once</label>
<input type="number" id="playground-count" name="count" min="1" max="9" value="1" required></div>
<div class="playground-buttons"><button type="submit">Draw</button>
<button type="button" name="stop">Stop here</button>
<button type="button" name="another">The same noise, another tradition</button></div>
</form>
<p role="status"></p>
<ol class="playground-fabrics"></ol>
</div>
"""


class PlaygroundNode(nodes.General, nodes.Element):
    """The form, the fabrics, and the strip that stands there without them."""


class Playground(SphinxDirective):
    """`:still:` and `:alt:` are the strip, `:seed:` and `:label:` what the form begins with."""

    has_content = True
    option_spec = {  # noqa: RUF012
        "still": directives.unchanged_required,
        "alt": directives.unchanged_required,
        "seed": directives.nonnegative_int,
        "label": directives.unchanged_required,
    }

    def run(self):
        assets = getattr(self.env, "lesson_assets", set())
        self.env.lesson_assets = assets | {self.options["still"]}
        node = PlaygroundNode(**self.options)
        node += self.parse_content_to_nodes()
        return [node]


def visit_playground(translator, node) -> None:
    names = list(look_up("playground.json", "heldout.by_label"))
    options = ["<option value='-1'>no label</option>"]
    for i, name in enumerate(names):
        chosen = " selected" * (name == node["label"])
        options.append(f"<option value='{i}'{chosen}>{escape(name)}</option>")
    still = copy_asset(translator, node["still"])
    form = FORM.format(options="".join(options), seed=node["seed"])
    translator.body.append(f"""<div class="playground">{form}
<figure class="playground-still"><img src="{still}" alt="{escape(node["alt"])}"><figcaption>""")


def depart_playground(translator, node) -> None:
    translator.body.append("</figcaption></figure></div>\n")


def add_scripts(app, pagename, templatename, context, doctree) -> None:
    """Load the playground's scripts in the page that has one."""
    if doctree is not None and next(doctree.findall(PlaygroundNode), None):
        app.add_css_file("playground/page.css")
        for name in ("sampling", "page"):
            app.add_js_file(f"playground/{name}.js", defer="defer")


def setup(app):
    app.add_node(PlaygroundNode, html=(visit_playground, depart_playground))
    app.add_directive("playground", Playground)
    app.connect("html-page-context", add_scripts)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
