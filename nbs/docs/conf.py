"""The site, by Sphinx' own means; `make docs` builds it. `fill` copies nbs/ to Sphinx' source folder and adds the list
of modules, whose pages autosummary makes, and a page per command. Notebooks and docstrings change as they are read."""
import argparse
import ast
import inspect
import json
import re
import shutil
from configparser import ConfigParser
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from unittest import mock

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.ext import autosummary
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parents[2]
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini", encoding="utf-8")
about = settings["DEFAULT"]

project, html_title, author = about["lib_name"], about["lib_name"], about["author"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
nb_execution_mode, nb_render_markdown_format, highlight_language, smartquotes = "off", "myst", "none", False
myst_enable_extensions, myst_heading_anchors, html_math_renderer = ["dollarmath"], 4, "mathml"
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource"}
autodoc_preserve_defaults, autodoc_inherit_docstrings, autodoc_typehints_format = True, False, "short"
autodoc_typehints, autodoc_typehints_description_target = "description", "documented_params"
autosummary.WELL_KNOWN_ABBREVIATIONS += ("Eq.",)  # no end of a sentence
autosummary_ignore_module_all = False  # helpers that a module does not list have no page
add_module_names, toc_object_entries_show_parents, python_maximum_signature_line_length = False, "hide", 80
nitpicky, nitpick_ignore_regex = True, [("py:.*", r"(?!prvr_nb\.).*")]  # our own names must be found
html_theme, html_static_path, html_css_files = "sphinx_book_theme", ["static"], ["site.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if about["git_url"]:
    hosts = {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"}
    html_theme_options |= {"repository_url": about["git_url"], "repository_branch": about["branch"],
                           "path_to_docs": "nbs", "use_repository_button": True, "launch_buttons": hosts}


def formula(translator, node):
    "Writes formulas as MathML, which browsers draw themselves: no script, no picture."
    translator.body.append(convert(node.astext(), display="block" if node.tagname == "math_block" else "inline"))
    raise SkipNode


def read_page(app, docname, source):
    "Sphinx' event `source-read`: links between folders as the site has them; notebooks as readers see them."
    source[0] = re.sub(r"\]\(((?:\.\./)*)(?:\.\./(?=[\w/]+\.md)|nbs/)", r"](\1", source[0])
    if app.env.doc2path(docname).suffix != ".ipynb":
        return
    signs = {"export": "export", "remove-input": "output only|echo: false", "remove-cell": "hide|default_exp"}
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        lines = "".join(cell["source"]).splitlines()
        steering = [line for line in lines if re.match(r"#\s*\||# README:", line)]  # nbdev's and make_readme's
        cell["source"] = "\n".join(line for line in lines if line not in steering).strip("\n")
        cell["metadata"]["tags"] = [tag for tag, sign in signs.items() if re.search(sign, "\n".join(steering))]
    title = next(cell for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    number = "".join(f"{n} · " for n in re.findall(r"(\d+)_\w+$", docname))
    modules = re.findall(r"#\| default_exp ([\w.]+)", source[0])
    added = [f"The marked cells are exported as {{py:mod}}`prvr_nb.{name}`." for name in modules]
    added += [(ROOT / "nbs/docs/navigation.md").read_text(encoding="utf-8")] * (docname == "index")
    title["source"] = "\n\n".join([title["source"].replace("# ", f"# {number}", 1), *added])
    source[0] = json.dumps(notebook)


def prose(text):
    "A docstring or comment as reStructuredText: code spans stay code, everything else is shown as it is written."
    return re.sub(r"`([^`]+)`|([\\*_|`])", lambda m: f"\\ ``{m[1]}``\\ " if m[1] else "\\" + m[2], text)


def docment(app, what, name, obj, options, lines):
    "Sphinx' event `autodoc-process-docstring`: docments, the comments beside parameters and result, become a list."
    lines[:] = [prose(line) for line in lines]
    if what == "module":
        notebook = re.search(r"File to edit: .*nbs/(.+)\.ipynb", inspect.getsource(obj))
        note_fields(obj)
        lines += ["", f"Exported from :doc:`/{notebook[1]}`." if notebook else "Written by hand.", ""]
    function = inspect.unwrap(getattr(obj, {"class": "__init__", "property": "fget"}.get(what, ""), obj))
    if not inspect.isfunction(function) or "prvr_nb" not in function.__code__.co_filename:  # not written by us
        return
    text = dedent(inspect.getsource(function))
    node = ast.parse(text).body[0]
    beside = {a.lineno: a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
    beside[(node.returns or node).lineno] = "return"  # on a signature of one line, the comment is the result's
    told = {key: re.search(r"(?:\s# ?(.*))?$", text.splitlines()[i - 1])[1] for i, key in beside.items()}
    listed = [key for key in inspect.signature(function).parameters if key not in ("self", "cls", "ctx")]
    lines += ["", *[f":param {key}: {prose(told.get(key) or '')}" for key in listed]]
    lines += [f":returns: {prose(told['return'])}"] if told["return"] and what != "class" else []


def note_fields(module):
    "The comments beside a module's constants and its classes' fields, into the table where Sphinx keeps its own."
    known = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in [module, *classes]:
        place = getattr(owner, "__qualname__", "")
        told = re.findall(rf"^{'    ' * bool(place)}(\w+) ?[:=].*?\s# (.*)$", inspect.getsource(owner), re.M)
        fields = getattr(owner, "__dataclass_fields__", {})
        told += [(key, field.metadata["help"]) for key, field in fields.items() if field.metadata]
        known.update({(place, own): [text] for own, text in told})


def usage(parser, name, underline="="):
    "The help of a command and of its subcommands, each flag as an option that other pages can link."
    lines = [name, underline * len(name), "", prose(parser.description or ""), "", f".. program:: {name}", ""]
    write = parser._get_formatter()
    for action in parser._actions[1:]:  # the first is --help
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                lines += usage(sub, f"{name} {word}", "-")
        elif action.help != argparse.SUPPRESS:
            flags, told = write._format_action_invocation(action), prose(write._expand_help(action))
            lines += [f".. option:: {flags}", "", f"   {told}", ""]
    return lines


def fill(app, config):
    "Sphinx' event `config-inited`: everything that Sphinx reads, in its source folder."
    out = Path(app.srcdir)
    shutil.copytree(ROOT / "nbs", out, ignore=shutil.ignore_patterns("*.py", "docs", ".*"), dirs_exist_ok=True)
    shutil.copytree(ROOT / "nbs" / "docs" / "pages", out, dirs_exist_ok=True)
    for page in ROOT / "data" / "README.md", *ROOT.glob("C*.md"):
        shutil.copy(page, out / page.relative_to(ROOT))
    modules = sorted(path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("prvr_nb/**/[!_]*.py"))
    with open(out / "api.rst", "a", encoding="utf-8") as file:
        file.writelines(f"   {'.'.join(module.parts)}\n" for module in modules)
    (out / "commands").mkdir()
    stopped = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=SystemExit)
    for name, module, function in re.findall(r"(\w+)\s*=\s*([\w.]+):(\w+)", about["console_scripts"]):
        with stopped as asked, suppress(SystemExit):
            getattr(import_module(module), function)([])
        (out / "commands" / f"{name}.rst").write_text("\n".join(usage(asked.call_args.args[0], name)), encoding="utf-8")


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("config-inited", fill)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", docment)
    app.connect("autodoc-process-signature",  # the fields of a dataclass stand below it
                lambda app, what, name, obj, *_: ("", None) if hasattr(obj, "__dataclass_fields__") else None)
