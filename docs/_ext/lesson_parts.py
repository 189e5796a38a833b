"""Two parts of the page that plain Sphinx does not have: sliders and quiz questions.

Both work without JavaScript: a slider then shows its still figure, a question its explanation.
"""

from __future__ import annotations

import json
from html import escape

from docutils import nodes
from docutils.parsers.rst import directives
from measured import REFERENCE, Missing, look_up, show
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


class SliderNode(nodes.General, nodes.Element):
    """A sprite strip with a range input; its first child is the still figure's caption."""


class Slider(SphinxDirective):
    """`.. slider:: name`: frames side by side in a strip, one of which is seen at a time.

    The frames' numbers are the list `frames` of training_results/reference/slider_NAME.json.
    """

    required_arguments = 1
    has_content = True
    option_spec = {  # noqa: RUF012
        "still": directives.unchanged_required,  # the figure without JavaScript
        "sprite": directives.unchanged_required,
        "alt": directives.unchanged_required,
        "label": directives.unchanged_required,  # of the range input
        "readout": directives.unchanged_required,  # one per line: Label = field | format
        "start": directives.nonnegative_int,  # first frame shown
        "width": directives.nonnegative_int,  # of the picture, CSS pixels
    }

    def run(self):
        name = f"slider_{self.arguments[0]}.json"
        assets = getattr(self.env, "lesson_assets", set())
        assets |= {self.options["sprite"], self.options["still"]}
        self.env.lesson_assets = assets
        try:
            frames = look_up(name, "frames")
            readouts = [self.read(name, i) for i in range(len(frames))]
        except (Missing, ValueError) as error:
            logger.warning("%s", error, location=self.get_location(), type="lesson")
            return []
        self.env.note_dependency(str(REFERENCE / name))
        node = SliderNode(
            name=self.arguments[0], readouts=readouts, count=len(frames), **{
                key: self.options[key] for key in ("still", "sprite", "alt", "label")
            },
            start=self.options.get("start", 0), width=self.options.get("width", 512),
        )  # fmt: skip
        node += self.parse_content_to_nodes()
        return [node]

    def read(self, name: str, i: int) -> list[list[str]]:
        """Return the label and the formatted number of every readout of frame i."""
        pairs = []
        for line in filter(str.strip, self.options["readout"].splitlines()):
            label, _, rest = line.partition("=")
            field, _, form = rest.partition("|")
            value = look_up(name, f"frames[{i}].{field.strip()}")
            pairs.append([label.strip(), "-" if value is None else show(value, form.strip())])
        return pairs


def visit_slider(translator, node) -> None:
    name, start = node["name"], node["start"]
    still, sprite = (copy_asset(translator, node[key]) for key in ("still", "sprite"))
    data = escape(json.dumps(node["readouts"], ensure_ascii=False))
    translator.body.append(f"""
<figure class="slider" id="slider-{name}" data-frames="{node["count"]}" data-readouts="{data}">
<div class="slider-still"><img src="{still}" alt="{escape(node["alt"])}" loading="lazy"></div>
<div class="slider-live" hidden>
<div class="slider-window" style="max-width:{node["width"]}px">
<img class="slider-strip" src="{sprite}" alt="{escape(node["alt"])}"
 style="width:{node["count"] * 100}%" draggable="false"></div>
<div class="slider-controls">
<button type="button" class="slider-play" aria-label="Play the frames of this slider">Play</button>
<label for="range-{name}">{escape(node["label"])}</label>
<input type="range" id="range-{name}" min="0" max="{node["count"] - 1}" step="1" value="{start}">
</div>
<dl class="slider-readout"></dl>
</div>
<figcaption>""")


def depart_slider(translator, node) -> None:
    translator.body.append("</figcaption></figure>\n")


class MorphNode(nodes.General, nodes.Element):
    """A short film in a loop, still until it is known that motion is welcome."""


class Morph(SphinxDirective):
    """`.. morph::` with `:video:`, `:poster:` and `:alt:`; the content is the caption."""

    has_content = True
    option_spec = {key: directives.unchanged_required for key in ("video", "poster", "alt")}  # noqa: RUF012

    def run(self):
        assets = getattr(self.env, "lesson_assets", set())
        self.env.lesson_assets = assets | {self.options["video"], self.options["poster"]}
        node = MorphNode(**self.options)
        node += self.parse_content_to_nodes()
        return [node]


def visit_morph(translator, node) -> None:
    video, poster = (copy_asset(translator, node[key]) for key in ("video", "poster"))
    translator.body.append(f"""
<figure class="morph-figure">
<video class="morph" controls loop muted playsinline preload="metadata" width="256" height="256"
 poster="{poster}" aria-label="{escape(node["alt"])}"><source src="{video}" type="video/mp4">
<img src="{poster}" alt="{escape(node["alt"])}"></video>
<figcaption>""")


def copy_asset(translator, path: str) -> str:
    """Let the builder copy a picture that no image node names; return its address."""
    name = path.rsplit("/", 1)[1]
    translator.builder.images[path] = name
    return f"{translator.builder.imgpath}/{name}"


class Lab(SphinxDirective):
    """`.. lab:: name`: the notebooks docs/labs/NAME.ipynb and NAME_solved.ipynb."""

    required_arguments = 1

    def run(self):
        name, repository = self.arguments[0], self.config.colab_repository
        text = (
            f"**Lab.** :download:`{name}.ipynb <labs/{name}.ipynb>` has gaps to fill, a check "
            f"below each; :download:`{name}_solved.ipynb <labs/{name}_solved.ipynb>` the "
            "solutions. Both lie in the folder ``docs/labs`` and run in Jupyter (``pip install "
            "notebook``)."
        )
        if repository:
            colab = f"https://colab.research.google.com/github/{repository}/docs/labs/{name}.ipynb"
            text += f" `Open in Colab <{colab}>`__."
        return self.parse_text_to_nodes(text)


class QuizNode(nodes.General, nodes.Element):
    """One question: a bullet list of answers, then the explanation."""


class Quiz(SphinxDirective):
    """`.. quiz:: question`: a bullet list of answers, `:answer:` counts from 1, explanation."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec = {"answer": directives.positive_int}  # noqa: RUF012

    def run(self):
        number = self.env.new_serialno("quiz") + 1
        node = QuizNode(number=number, answer=self.options["answer"])
        question, _ = self.parse_inline(self.arguments[0])
        node += nodes.inline("", "", *question, classes=["quiz-question"])
        node += self.parse_content_to_nodes()
        if not isinstance(node.children[1], nodes.bullet_list):
            raise self.error("a quiz question needs a list of answers")
        if not 1 <= self.options["answer"] <= len(node.children[1].children):
            raise self.error("the right answer is none of the list")
        return [node]


def visit_quiz(translator, node) -> None:
    number = node["number"]
    question, answers, *explanation = node.children
    body = translator.body
    body.append(f'<fieldset class="quiz" data-answer="{node["answer"]}"><legend>{number}. ')
    question.walkabout(translator)
    body.append("</legend>")
    for i, item in enumerate(answers.children, 1):
        field = f'id="quiz-{number}-{i}" name="quiz-{number}" value="{i}"'
        body.append(f'<div class="quiz-answer"><input type="radio" {field}>')
        body.append(f'<label for="quiz-{number}-{i}">')
        for paragraph in item.children:
            for child in paragraph.children:
                child.walkabout(translator)
        body.append("</label></div>")
    body.append('<p class="quiz-verdict" role="status"></p>')
    body.append("<details><summary>Explained answer</summary>")
    body.append(f"<p><strong>Answer {'ABCDEFGH'[node['answer'] - 1]}.</strong></p>")
    for child in explanation:
        child.walkabout(translator)
    body.append("</details></fieldset>\n")
    raise nodes.SkipNode


def visit_citation(translator, node) -> None:
    """Write a reference as an item of a list; docutils gives it a role that ARIA has dropped."""
    type(translator).visit_citation(translator, node)
    translator.body[-1] = translator.body[-1].replace("doc-biblioentry", "listitem")


def depart_citation(translator, node) -> None:
    type(translator).depart_citation(translator, node)


def setup(app):
    app.add_node(nodes.citation, override=True, html=(visit_citation, depart_citation))
    app.add_node(SliderNode, html=(visit_slider, depart_slider))
    app.add_node(QuizNode, html=(visit_quiz, None))
    app.add_node(MorphNode, html=(visit_morph, depart_slider))
    app.add_directive("slider", Slider)
    app.add_directive("morph", Morph)
    app.add_directive("quiz", Quiz)
    app.add_directive("lab", Lab)
    app.add_config_value("colab_repository", "", "env", str)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
