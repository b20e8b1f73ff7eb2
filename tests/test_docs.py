"""The site, as `make docs` has built it: a page for everything, no broken link, nothing that comes from elsewhere."""
import ast
import configparser
import html
import inspect
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_docs" / "html"
NOTEBOOKS = [path.relative_to(ROOT / "nbs").with_suffix("") for path in (ROOT / "nbs").rglob("[!.]*.ipynb")]
MODULES = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "prvr_nb").rglob("[!_]*.py")]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
COMMANDS = re.findall(r"(\w+)=", SETTINGS["DEFAULT"]["console_scripts"])



def stored(folder, path):
    file = ROOT / folder / f"{path}.ipynb"
    return file.read_bytes() if file.exists() else b""


if not SITE.exists() or any(stored("nbs", path) != stored("_docs/source", path) for path in NOTEBOOKS):
    pytest.skip("no site, or one of other notebooks; make docs builds it", allow_module_level=True)


def page(name):
    return (SITE / f"{name}.html").read_text(encoding="utf-8")


def letters(text):
    "What is left of a text when quotation marks, spaces and markup may differ."
    return re.sub(r"\W|_", "", html.unescape(re.sub(r"<[^>]+>", "", text)))


@pytest.fixture(scope="module")
def front():
    return page("index")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_every_notebook_has_a_page_without_steering_comments(path, front):
    text = page(path)
    assert path.name == "index" or f'href="{path}.html"' in front
    assert not re.search(r">#\s?\|\s*(?:export|hide|default_exp|echo)|# README: ", text)
    assert "merror" not in text  # a formula that could not be read


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_every_public_function_has_its_parameters(path):
    name = ".".join(path.parts)
    text, module = page(f"api/{name}"), import_module(name)
    for node in ast.parse((ROOT / f"{path}.py").read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if node.name not in getattr(module, "__all__", [node.name]):  # a helper that its module does not list
            continue
        start = text.index(f'id="{name}.{node.name}"')
        entry = letters(text[start:text.index("</dd></dl>", start)])
        function = inspect.unwrap(getattr(module, node.name))
        told = docments(function, args_kwargs=True) if inspect.isfunction(function) else {}
        for key, comment in told.items():
            assert key == "return" or letters(key) in entry
            assert letters(comment or "") in entry, f"{node.name}: {key}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_page_of_options_that_wrap(name, capsys):
    text = page(f"commands/{name}")
    assert text.count('<dl class="std option">') > 1
    assert not re.search(r"<(?:pre|table|svg)\b", text[text.index("<article"):text.index("</article>")])


def test_every_local_link_leads_somewhere():
    lychee = shutil.which("lychee", path=Path(sys.executable).parent) or pytest.skip("lychee comes with make docs")
    found = subprocess.run([lychee, "--offline", "--include-fragments", "--exclude-path", "_static|_sources", SITE],
                           capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_nothing_is_loaded_from_elsewhere(front):
    for path in SITE.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//", text), path
        assert not re.search(r"<link\b[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"(?:https?:)?//", text), path
    assert ("mybinder.org" in page("see_it_move")) == bool(SETTINGS["DEFAULT"]["git_url"])
    assert 'id="collapse"' in page("see_it_move") and 'id="curve"' in page("see_it_move")
