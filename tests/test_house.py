"""The house stays in order: who imports whom, how long a module is, how long a lesson takes to read."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted(p for p in (ROOT / "prvr_nb").rglob("*.py") if p.name != "_modidx.py")
LESSONS = sorted((ROOT / "nbs" / "method").glob("*.ipynb"))
# Each module may import what stands to its left, and its own folder.
ORDER = [
    "files plots",
    "config",
    "method",
    "data videos/frames videos/clip",
    "evaluation",
    "training",
    "evidence videos",
    "demo panel speed app commands",
    "cli",
]
PLACE = {name: place for place, names in enumerate(ORDER) for name in names.split()}


def name_of(path):
    return path.relative_to(ROOT / "prvr_nb").with_suffix("").as_posix()


def place_of(module):
    return PLACE.get(module, PLACE.get(module.split("/")[0]))


def imported(path):
    "Modules of the package that a file imports anywhere, inside functions too."
    here = path.relative_to(ROOT / "prvr_nb").with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("prvr_nb.")):
            base = (
                (*here[: len(here) - node.level], *(node.module or "").split("."))
                if node.level
                else node.module.split(".")[1:]
            )
            base = [part for part in base if part]
            yield from (
                "/".join(parts)
                for parts in (base, *((*base, alias.name) for alias in node.names))
                if (ROOT / "prvr_nb").joinpath(*parts).with_suffix(".py").exists()
            )
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.split(".", 1)[1].replace(".", "/")
                for alias in node.names
                if alias.name.startswith("prvr_nb.")
            )


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name != "__init__.py"], ids=name_of)
def test_imports_go_down(path):
    module = name_of(path)
    assert place_of(module) is not None, f"{module} has no place in the order of imports"
    for other in imported(path):
        assert other != "cli", f"{module} imports the command line"
        same_folder = "/" in module and module.split("/")[0] == other.split("/")[0]
        assert same_folder or place_of(other) <= place_of(module), f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_module_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_package_and_the_method_stay_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    assert sum(lines.values()) <= 8500
    assert sum(n for path, n in lines.items() if path.parent.name == "method") <= 1000


def test_what_the_package_offers_is_no_folder():
    import prvr_nb

    assert not set(prvr_nb.__all__) & {p.name for p in (ROOT / "prvr_nb").iterdir() if p.is_dir()}
    for name in prvr_nb.__all__:
        assert getattr(prvr_nb, name).__module__.startswith("prvr_nb.")


def reading(path):
    "Words, lines of code and cells of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = (re.sub(r"<[^>]+>|https?://\S+", "", "".join(c["source"])) for c in cells if c["cell_type"] == "markdown")
    code = [
        line
        for c in cells
        if c["cell_type"] == "code"
        for line in "".join(c["source"]).splitlines()
        if line.strip() and not line.lstrip().startswith("#|")
    ]
    return sum(len(text.split()) for text in prose), len(code), len(cells)


def test_the_method_takes_one_evening():
    words, lines, _ = reading(ROOT / "nbs" / "00_one_evening.ipynb")
    assert words <= 3000 and lines <= 300
    of_lessons = [reading(path) for path in LESSONS]
    assert len(LESSONS) == 7
    assert sum(words for words, _, _ in of_lessons) <= 9000 and sum(lines for _, lines, _ in of_lessons) <= 1300


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_is_short_and_complete(path):
    words, lines, cells = reading(path)
    assert words <= 1300 and lines <= 200 and cells <= 40
    text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    assert "arxiv.org" in text, "no link to a paper"
    assert text.count("<details>") == 3, "three exercises, each with its answer"
    assert "method_strip(" in text and "Next" in text
