"""Notebooks, package and README belong together; stored outputs are fit to be read."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def test_the_package_is_what_the_notebooks_export(tmp_path):
    for name in "nbs", "prvr_nb", "settings.ini", "README.md", "setup.py":
        source = ROOT / name
        shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(source, tmp_path / name)
    for path in (tmp_path / "prvr_nb").glob("*.py"):
        if path.name not in ("__init__.py", "_modidx.py"):
            path.unlink()
    export = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([export], cwd=tmp_path, check=True, capture_output=True)
    held, exported = ({p.name: p.read_text() for p in (folder / "prvr_nb").glob("*.py")} for folder in (ROOT, tmp_path))
    assert held.keys() == exported.keys()
    for name in held:
        assert held[name] == exported[name], f"{name} differs from its notebook; run make notebooks"


def test_the_readme_is_what_the_index_says():
    sys.path.insert(0, str(ROOT / "nbs"))
    from make_readme import readme_text
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text(), "run make notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_notebook(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(?:tmp|root|home|Users)/|widget-view\+json|\bit/s\b", text)
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert "import *" not in text
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, "no stored output; run make notebooks"
    assert not [o for o in outputs if o.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS + [ROOT / "README.md", ROOT / "data" / "README.md"], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (path.parent / target).exists(), target
