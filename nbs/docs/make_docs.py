"""The site: `make docs` prepares pages in _docs/source, lets Sphinx build _docs/html, and looks for broken links.

Pages are the notebooks with their stored outputs, without nbdev's directives; one API page per module (api.py); one page per command; data/README.md.
A notebook named NN_name.ipynb comes into the navigation by its number; nothing else lists notebooks.
"""
import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import nbformat
from api import module_page, read_package

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CHAPTERS = {"The method": range(9), "Training and measuring": range(9, 17), "Running it": range(18, 23),
            "Your own videos": range(23, 26), "Evidence": (17, *range(26, 100))}


def settings(root):
    "settings.ini, which names repository and commands."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# --- notebooks

def relinked(text, folder, root, git):
    "Markdown links to other files of the repository: to their page where there is one, else to the file in the repository."
    def new(match):
        path = (folder / match[2]).resolve()
        if not path.exists(): return match[0] # Sphinx reports it
        if path == root / "data" / "README.md": return f"{match[1]}data.md{match[3] or ''})"
        if path.is_relative_to(root / "nbs") and path.is_file(): return f"{match[1]}{path.relative_to(root / 'nbs')}{match[3] or ''})"
        return f"{match[1]}{git}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(root)})"
    return re.sub(r"(\]\()(?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", new, text)


def without_directives(cell):
    "A code cell without nbdev's and the README's steering comments, or None when nothing should be seen of it."
    lines = cell.source.split("\n")
    steering = [line for line in lines if re.match(r"#\s*\| ?|# README: ", line)]
    words = " ".join(steering)
    cell.source = "\n".join(line for line in lines if line not in steering).strip("\n")
    if re.search(r"\| ?hide\b", words) or not cell.source: return None
    tags = ["export"] * bool(re.search(r"\| ?export", words)) + ["remove-input"] * ("output only" in words)
    if tags: cell.metadata["tags"] = tags
    return cell


def label(path, notebook):
    "How the navigation calls a notebook: number and first heading."
    number = re.match(r"(\d+)_", path.stem)
    titles = (re.match(r"# (.+)", cell.source) for cell in notebook.cells if cell.cell_type == "markdown")
    return (f"{number[1]} · " if number else "") + next((title[1] for title in titles if title), path.stem)


def sections(notebook):
    "Cell id → the level-2 heading that it stands under."
    found, section = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for title in re.findall(r"^## (.+)$", cell.source, re.MULTILINE): section = re.sub(r"^[\d.]+\s+", "", title)
        found[cell.id] = section
    return found


def page_of(notebook, folder, root, git, module=None):
    "A notebook as the site shows it: anchors before exported cells, a line that names its module, no directives."
    cells, introduced = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell = without_directives(cell)
            if cell is None: continue
            if "export" in cell.metadata.get("tags", []): cells.append(nbformat.v4.new_markdown_cell(f"(code-{cell.id})="))
        else:
            cell.source = relinked(cell.source, folder, root, git)
            if module and not introduced and cell.source.startswith("# "):
                cell.source += f"\n\nExported as module [`prvr_nb.{module}`](api/{module}.md), from the cells marked as such."
                introduced = True
        cells.append(cell)
    notebook.cells = cells
    return notebook


def chapters(paths):
    "Chapter → notebooks in reading order; those without a number come last, after the chapter of users' own videos."
    numbers = {path: int(m[1]) for path in paths if (m := re.match(r"(\d+)_", path.stem))}
    found = {title: [p for p in sorted(numbers, key=numbers.get) if numbers[p] in chapter] for title, chapter in CHAPTERS.items()}
    found["Your own videos"] += sorted(p for p in paths if p not in numbers and p.stem != "index")
    return found


def toctree(entries, caption=""):
    "A table of contents that only the navigation shows."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *entries, "```"])


# --- commands

class Asked(Exception):
    "Carries the parser that a command would read its arguments with."


def parser_of(command):
    "The argparse parser of a console script, without running it."
    def ask(parser, *_, **__): raise Asked(parser)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", ask):
        try: command([])
        except Asked as asked: return asked.args[0]
    raise ValueError(f"{command} reads no arguments")


def command_page(name, parser, module):
    "What `NAME --help` and the help of its subcommands print."
    told = [(name, parser)] + [(f"{name} {word}", sub) for action in parser._actions if isinstance(action, argparse._SubParsersAction) for word, sub in action.choices.items()]
    lines = [f"# {name}", f"Defined in [`prvr_nb.{module}`](../api/{module}.md)."]
    with mock.patch.dict(os.environ, COLUMNS="92", NO_COLOR="1"):
        for title, one in told:
            if len(told) > 1: lines.append(f"## {title}")
            lines.append(f"```text\n$ {title} --help\n{one.format_help().rstrip()}\n```")
    return "\n\n".join(lines) + "\n"


def commands(scripts):
    "Name, parser and module of every console script."
    for line in scripts.split():
        name, _, place = line.partition("=")
        module, _, function = place.partition(":")
        yield name, parser_of(getattr(import_module(module), function)), module.rpartition(".")[2]


# --- all of it

def listing(head, rows):
    "A Markdown table of links."
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def prepare(out, root=ROOT):
    "Write everything that Sphinx reads into a folder."
    cfg = settings(root)
    shutil.rmtree(out, ignore_errors=True)
    for folder in "api", "commands": (out / folder).mkdir(parents=True)
    shutil.copytree(root / "nbs" / "images", out / "images")
    sources = read_package(root / "prvr_nb")
    module_of = {source.notebook: name for name, source in sources.items()}
    notebooks = {path: nbformat.read(path, as_version=4) for path in sorted((root / "nbs").glob("*.ipynb"))}
    labels = {path: label(path, notebook) for path, notebook in notebooks.items()}

    of_stem = {path.stem: path for path in notebooks}
    ordered = sorted(sources.values(), key=lambda s: s.notebook)
    for source in ordered:
        path = of_stem[source.notebook]
        (out / "api" / f"{source.name}.md").write_text(module_page(source, labels[path], sections(notebooks[path])), encoding="utf-8")
    short = ", ".join(f"{{py:obj}}`~prvr_nb.{module}.{name}`" for name, module in import_module("prvr_nb")._MODULE_OF.items())
    rows = [(f"[`prvr_nb.{s.name}`]({s.name}.md)", f"[{labels[of_stem[s.notebook]]}](../{s.notebook}.ipynb)", str(len(s.public))) for s in ordered]
    (out / "api" / "index.md").write_text(f"# API\n\nEvery module is exported from one notebook. For a script, `import prvr_nb` is enough: it offers {short}.\n\n" + listing(("module", "notebook", "names"), rows)
                                          + "\n\n" + toctree(s.name for s in ordered) + "\n", encoding="utf-8")

    told = list(commands(cfg["console_scripts"]))
    for name, parser, module in told: (out / "commands" / f"{name}.md").write_text(command_page(name, parser, module), encoding="utf-8")
    (out / "commands" / "index.md").write_text("# Commands\n\n" + listing(("command", ""), [(f"[`{n}`]({n}.md)", p.description or "") for n, p, _ in told])
                                               + "\n\n" + toctree(n for n, _, _ in told) + "\n", encoding="utf-8")

    text = (root / "data" / "README.md").read_text(encoding="utf-8")
    (out / "data.md").write_text(relinked(text, root / "data", root, cfg["git_url"]), encoding="utf-8")
    trees = [toctree([f"{labels[p]} <{p.stem}>" for p in found], title) for title, found in chapters(notebooks).items() if found]
    trees.append(toctree(["commands/index", "api/index", "data"], "Reference"))
    for path, notebook in notebooks.items():
        page = page_of(notebook, root / "nbs", root, cfg["git_url"], module_of.get(path.stem))
        if path.stem == "index": page.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(trees)))
        nbformat.write(page, out / path.name)


def build(source, html):
    "Let Sphinx make the site; every warning is an error."
    shutil.rmtree(html, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", "auto", "-c", HERE, "-d", source.parent / "doctrees", source, html], check=True)


def check_links(html):
    "Follow every link between pages, to its anchor, and every picture; other sites are not asked."
    lychee = shutil.which("lychee", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run([lychee, "--offline", "--include-fragments", "--no-progress", "--quiet", "--exclude-path", "_static|_sources", html], check=True)


if __name__ == "__main__":
    place = ROOT / "_docs"
    prepare(place / "source")
    build(place / "source", place / "html")
    check_links(place / "html")
    print(f"{(place / 'html' / 'index.html').relative_to(ROOT)} is ready")
