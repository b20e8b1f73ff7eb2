"""How Sphinx reads the pages that make_docs.py prepares."""
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

about = ConfigParser(delimiters=["="])
about.read(Path(__file__).parents[2] / "settings.ini", encoding="utf-8")
project = html_title = about["DEFAULT"]["lib_name"]
author = about["DEFAULT"]["author"]
extensions = ["myst_nb"]
templates_path, html_static_path, html_css_files = [], ["static"], ["site.css"]

# notebooks: shown as they are stored; nothing is executed, nothing is loaded from elsewhere
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_render_markdown_format = "myst"
nb_merge_streams = True
highlight_language = "none" # of a block that names no language
suppress_warnings = ["myst.header"] # a heading that skips a level
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

# API pages
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
nitpicky, nitpick_ignore_regex = True, [("py:.*", r"(?!prvr_nb\.).*")] # our own names must be found; Tensor and the like are not ours
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "repository_url": about["DEFAULT"]["git_url"],
    "use_repository_button": True, "use_download_button": True, "use_fullscreen_button": False,
    "navbar_persistent": [], "show_toc_level": 2, "navigation_with_keys": False, "home_page_in_toc": True,
}
html_context = {"default_mode": "auto"} # light or dark, as the reader's system is
html_math_renderer = "mathml"


def formula(display):
    "Writes formulas as MathML, which browsers draw themselves: no script, no picture."
    def visit(translator, node):
        translator.body.append(convert(node.astext(), display=display))
        raise SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
