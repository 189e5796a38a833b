"""Sphinx settings of the lesson. Build it with: python -m sphinx -n -W docs docs/_build."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "DDPM Basics"
author = "the authors of the course"
copyright = "the authors of the course, MIT licence"
version = release = "12.3.1"
language = "en"

extensions = ["sphinx_design", "sphinx_copybutton", "mathml", "measured", "minutes", "lesson_parts",
              "bundle", "playground"]  # fmt: skip
exclude_patterns = ["_build"]
math_number_all = False
math_eqref_format = "({number})"
numfig = True
numfig_format = {"figure": "Figure %s", "table": "Table %s", "code-block": "Listing %s"}
highlight_language = "python"
colab_repository = ""  # "owner/name/blob/branch" on GitHub: each lab then links to Colab
nitpicky = True
smartquotes = False

html_theme = "pydata_sphinx_theme"
html_title = "12.3.1 - DDPM Basics"
html_static_path = ["_static"]
html_css_files = ["lesson.css"]
html_js_files = [("lesson.js", {"defer": "defer"})]
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"**": []}  # three pages: the header holds them all
html_theme_options = {
    "logo": {"text": "12.3.1 - DDPM Basics"},
    "show_toc_level": 2,
    "navbar_persistent": [],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
    "back_to_top_button": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

copybutton_prompt_text = "$ "
