"""The site: API pages say what the code says, everything is reachable, and a broken link is found."""
import ast
import re
import subprocess
import sys
from importlib import import_module
from inspect import unwrap
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "nbs" / "docs"))
import api
import make_docs

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = api.read_package(ROOT / "prvr_nb")

MODULE = '''"""A module."""
__all__ = ["LIMIT", "A", "B", "Pair", "Setting", "Mistake", "Box", "join", "Ghost"]
# %% ../nbs/01_tiny.ipynb #aa11
from typing import NamedTuple

LIMIT = 3 # *most* pieces

A, B = 1, 2

class Pair(NamedTuple):
    "Two `things`."
    left:str|None # the_first
    right:int=0 # the second

# %% ../nbs/01_tiny.ipynb #bb22
class Setting:
    "What a run depends on."
    rate:float = option(1e-3, "per step | per epoch", ("a", "b"))

class Mistake(ValueError): "Not right."

class Box:
    "Holds a pair."
    def __init__(self,
        pair:Pair, # what it holds
        *,
        open:bool=False, # at once
    ): self.pair = pair

    @property
    def left(self)->str: # of the pair
        return self.pair.left

    def swap(self, times): # how often → a box
        "Turn round."

    def _hidden(self): pass

def join(
    pairs:list[Pair], # in order
    by:str="|", # goes between
    *more, # further pairs
    strict:bool=True,
)->Pair|None: # one pair, or None
    "Make one of many."

class Ghost: pass
'''


@pytest.fixture
def page(tmp_path):
    (tmp_path / "tiny.py").write_text(MODULE, encoding="utf-8")
    source = api.read_package(tmp_path)["tiny"]
    return api.module_page(source, "01 · Tiny", {"aa11": "Data", "bb22": "Boxes"})


def test_an_entry_has_signature_docstring_parameters_and_result(page):
    entry = page[page.index("{py:function} join"):]
    assert entry.startswith('{py:function} join(pairs, by = "|", *more, strict = True) -> prvr_nb.tiny.Pair|None\n')
    assert "Make one of many. [In the notebook](#code-bb22)." in entry
    assert "| parameter | type | default | meaning |" in entry
    assert "| `pairs` | `list[Pair]` |  | in order |" in entry
    assert r'| `by` | `str` | `"\|"` | goes between |' in entry
    assert "| `*more` |  |  | further pairs |" in entry
    assert "| `strict` | `bool` | `True` |  |" in entry
    assert "*Returns* `Pair|None` — one pair, or None" in entry


def test_fields_properties_methods_constants_and_errors(page):
    assert "## Data" in page and "## Boxes" in page and page.index("## Data") < page.index("## Boxes")
    assert "{py:class} Pair(left, right = 0)" in page and r"| `left` | `str\|None` |  | the\_first |" in page
    assert "Two `things`. A `NamedTuple`. [In the notebook](#code-aa11)." in page
    assert r"| `rate` | `float` | `1e-3` | per step \| per epoch |" in page
    assert "{py:exception} Mistake\n" in page and "{py:class} Ghost\n" in page
    assert "| `pair` | {py:class}`~prvr_nb.tiny.Pair` |  | what it holds |" in page and "| `open` | `bool` | `False` | at once |" in page
    assert "{py:property} left\n:type: str\n\nof the pair" in page
    assert "{py:method} swap(times)\n\nTurn round." in page and "how often → a box" in page
    assert "_hidden" not in page
    assert "{py:data} LIMIT\n\n\\*most\\* pieces [In" in page and "```python\n3\n```" in page
    assert "{py:data} A\n" in page and "{py:data} B\n" in page


def cells(line):
    "What stands between the bars of a table's row that are not escaped."
    return re.split(r"(?<!\\)\|", line)[1:-1]


def test_bars_do_not_break_tables(page):
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert len(tables) == 4
    for lines in (t.splitlines() for t in tables):
        assert {len(cells(line)) for line in lines} == {len(cells(lines[0]))}


def public_functions(source):
    "Definitions of a module's public functions."
    return [source.defined[name] for name in source.public if isinstance(source.defined[name], ast.FunctionDef)]


@pytest.mark.parametrize("source", MODULES.values(), ids=MODULES)
def test_docments_are_those_that_nbdev_reads(source):
    module, compared = import_module(f"prvr_nb.{source.name}"), 0
    for node in public_functions(source):
        function = unwrap(getattr(module, node.name))
        theirs = {name: text or "" for name, text in docments(function, args_kwargs=True).items()}
        ours = {row.name.strip("*"): row.comment for row in api.parameter_rows(source, node)}
        returned = api.result_row(source, node)
        if node.returns: ours["return"] = returned.comment
        for name, comment in ours.items():
            assert comment == theirs[name], f"{source.name}.{node.name}: {name}"
            compared += bool(comment)
    assert compared


def test_every_notebook_is_in_the_navigation():
    found = make_docs.chapters(NOTEBOOKS)
    listed = [path for paths in found.values() for path in paths]
    assert sorted([*listed, ROOT / "nbs" / "index.ipynb"]) == NOTEBOOKS
    assert [p.stem for p in found["The method"]] == [p.stem for p in NOTEBOOKS if p.stem[:2] in {f"{i:02}" for i in range(9)}]
    assert make_docs.chapters([Path("99_new.ipynb"), Path("more.ipynb")]) == {
        **{title: [] for title in make_docs.CHAPTERS}, "Evidence": [Path("99_new.ipynb")], "Your own videos": [Path("more.ipynb")]}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry(name):
    source = MODULES[name]
    text = api.module_page(source, "", {})
    entries = re.findall(r"^:+\{py:(?:function|class|exception|data)\} (\w+)", text, re.MULTILINE)
    assert sorted(entries) == sorted(source.public) and entries
    stem = source.notebook
    assert (ROOT / "nbs" / f"{stem}.ipynb").exists()
    ids = {cell.id for cell in nbformat.read(ROOT / "nbs" / f"{stem}.ipynb", as_version=4).cells}
    assert set(re.findall(r"\(#code-(\w+)\)", text)) <= ids


def test_steering_comments_are_not_shown():
    shown = make_docs.without_directives(new_code_cell("#| export\n#| eval: false\nx = 1 #| 2\n"))
    assert shown.source == "x = 1 #| 2" and shown.metadata["tags"] == ["export"]
    assert make_docs.without_directives(new_code_cell("#| hide\nx = 1")) is None
    assert make_docs.without_directives(new_code_cell("#| default_exp tiny")) is None
    assert make_docs.without_directives(new_code_cell("# README: output only\nx")).metadata["tags"] == ["remove-input"]
    assert make_docs.without_directives(new_code_cell("# README: results.png\nx")).source == "x"
    assert make_docs.without_directives(new_code_cell("#|hide_line\nx")).source == "x"


def test_links_lead_to_pages_or_into_the_repository():
    new = lambda text, folder="nbs": make_docs.relinked(text, ROOT / folder, ROOT, "https://git")
    assert new("[a](00_task.ipynb#chance) [b](#c) [d](https://e/f)") == "[a](00_task.ipynb#chance) [b](#c) [d](https://e/f)"
    assert new("[a](../data/README.md)") == "[a](data.md)"
    assert new("[a](../nbs/02_toy.ipynb)", "data") == "[a](02_toy.ipynb)"
    assert new("[a](../settings.ini) [b](../runs)") == "[a](https://git/blob/main/settings.ini) [b](https://git/tree/main/runs)"
    assert new("[a](nowhere.ipynb)") == "[a](nowhere.ipynb)" # Sphinx reports it


def test_every_command_has_a_page():
    scripts = make_docs.settings(ROOT)["console_scripts"]
    told = list(make_docs.commands(scripts))
    assert [name for name, _, _ in told] == [line.partition("=")[0] for line in scripts.split()]
    pages = {name: make_docs.command_page(name, parser, module) for name, parser, module in told}
    assert "--merge-schedule" in pages["prvr_train"] and "(../api/cli.md)" in pages["prvr_train"]
    assert "$ prvr_data check --help" in pages["prvr_data"] and "--limit" in pages["prvr_data"]
    assert all(f"$ {name} --help" in page for name, page in pages.items())


# --- the site itself

def need_sphinx(): pytest.importorskip("myst_nb", reason="the site is built where `make docs` has installed what it needs")


def site(folder, **pages):
    "Build a few pages as the site is built."
    (folder / "source").mkdir()
    for name, text in pages.items(): (folder / "source" / f"{name}.md").write_text(text, encoding="utf-8")
    make_docs.build(folder / "source", folder / "html")
    return folder / "html"


GOOD = {"index": "# Home\n\n[other](other.md#a-part) $x^2$ {py:class}`~tiny.Pair`\n\n```{toctree}\nother\n```\n",
        "other": "# Other\n\n## A part\n\n[back](index.md)\n\n```{py:module} tiny\n```\n:::{py:class} Pair\n:::\n"}


def test_links_within_pages_are_checked(tmp_path):
    need_sphinx()
    html = site(tmp_path, **GOOD)
    make_docs.check_links(html)
    text = (html / "other.html").read_text(encoding="utf-8")
    assert "<math" in (html / "index.html").read_text(encoding="utf-8")
    for broken in '<a href="nowhere.html">x</a>', '<a href="index.html#nothing">x</a>', '<img src="none.png">':
        (html / "other.html").write_text(text.replace("</article>", broken + "</article>"), encoding="utf-8")
        with pytest.raises(subprocess.CalledProcessError): make_docs.check_links(html)
    (html / "other.html").write_text(text, encoding="utf-8")
    make_docs.check_links(html)


def test_broken_links_stop_the_build(tmp_path, capfd):
    need_sphinx()
    broken = "[x](nowhere.md) [x](other.md#no-part) [x](#no-anchor) ![x](none.png) {py:class}`~prvr_nb.tiny.Nothing`"
    with pytest.raises(subprocess.CalledProcessError): site(tmp_path, **{**GOOD, "index": GOOD["index"] + "\n" + broken})
    said = capfd.readouterr().err
    for name in "nowhere.md", "no-part", "no-anchor", "none.png", "tiny.Nothing": assert name in said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    need_sphinx()
    folder = tmp_path_factory.mktemp("docs")
    make_docs.prepare(folder / "source")
    make_docs.build(folder / "source", folder / "html")
    return folder / "html"


def test_the_whole_site_has_no_broken_link(whole): make_docs.check_links(whole)


def test_the_whole_site_shows_every_notebook_and_every_name(whole):
    home = (whole / "index.html").read_text(encoding="utf-8")
    for path in NOTEBOOKS: assert path.stem == "index" or f'href="{path.stem}.html"' in home
    for name, source in MODULES.items():
        text = (whole / "api" / f"{name}.html").read_text(encoding="utf-8")
        for public in source.public: assert f'id="prvr_nb.{name}.{public}"' in text


def test_no_page_loads_anything_from_elsewhere(whole):
    pages = [p for p in whole.rglob("*.html") if "_static" not in p.parts]
    assert len(pages) > 60
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//", text), path
        assert not re.search(r"<link\b[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"(?:https?:)?//", text), path
        assert not re.search(r">#\|\s*(?:export|hide|default_exp)", text), path
        assert "merror" not in text and not re.search(r"<mtext[^>]*>\\", text), path
