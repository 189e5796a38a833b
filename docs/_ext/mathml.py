"""Write the lesson's LaTeX as MathML, which every current browser sets without a script.

Nothing is fetched, nothing runs in the page, and screen readers read it as mathematics. The
translation is latex2mathml's; what it leaves rough is smoothed here.
"""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

STRUT = '<mspace width="0" height="0.95em" depth="0"></mspace>'
FUNCTIONS = "log|exp|min|max|cos|sin|clip"


def to_mathml(latex: str, block: bool) -> str:
    """Translate one formula. Raises ValueError where a command was not understood."""
    if block and "&" in latex and "\\begin" not in latex:
        latex = r"\begin{align*}" + latex + r"\end{align*}"
    mathml = convert(latex, display="block" if block else "inline")
    if leftover := re.search(r">[^<]*(\\|&amp;)[^<]*<", mathml):
        raise ValueError(leftover.group(0))
    # \mathrm{simple} comes as six one-letter identifiers; to a reader it is one word.
    mathml = re.sub(
        r'(?:<mi mathvariant="normal">[A-Za-z]</mi>){2,}',
        lambda word: f"<mtext>{''.join(re.findall(r'>([A-Za-z])<', word.group()))}</mtext>",
        mathml,
    )
    # \sim comes as the character ~ and as an identifier; a relation has space around it.
    mathml = re.sub(r"<m([io])>(?:&#x0007E;|~|&#x0223C;)</m\1>", "<mo>&#x0223C;</mo>", mathml)
    # log x: a thin space, which the browser gives to operators but not to identifiers.
    mathml = re.sub(
        rf"<m[io]>({FUNCTIONS})</m[io]>",
        r'<mo form="prefix" lspace="0.1em" rspace="0.17em">\1</mo>',
        mathml,
    )
    # A strut keeps the bar of a root away from what is under it: otherwise, at ordinary sizes, the
    # root of alpha reads as that of alpha-bar.
    mathml = mathml.replace("<msqrt>", f"<msqrt>{STRUT}")
    source = re.sub(r"\s+", " ", latex.strip())
    source = source.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return mathml.replace("<math ", f'<math alttext="{source}" ', 1)


def checked(translator, node: nodes.Element, block: bool) -> str:
    latex = node.astext()
    try:
        return to_mathml(latex, block)
    except Exception as error:  # latex2mathml raises a dozen kinds
        logger.warning("formula not understood (%s): %s", error, latex, location=node)
        return translator.encode(latex)


def visit_inline(translator, node: nodes.math) -> None:
    translator.body.append(checked(translator, node, block=False))
    raise nodes.SkipNode


def visit_block(translator, node: nodes.math_block) -> None:
    body = translator.body
    body.append(translator.starttag(node, "div", CLASS="equation"))
    body.append('<div class="scroll-box equation-box" data-label="Equation">')
    body.append(checked(translator, node, block=True))
    body.append("</div>")
    if node.get("number"):
        number = get_node_equation_number(translator, node)
        body.append(f'<span class="eqno">({number})</span>')
    body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
