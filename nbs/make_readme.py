"""Write README.md from index.ipynb: its markdown, its code as examples, its links pointing into nbs/."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
NOTE = "<!-- Generated from nbs/index.ipynb by nbs/make_readme.py; edit the notebook. -->\n\n"


def readme_text():
    "README.md as index.ipynb has it."
    notebook = nbformat.read(HERE / "index.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    # a link to a neighbour of the notebook becomes a link into nbs/, one that climbs out of nbs/ loses the climb
    text = re.sub(r"\]\((?!https?://|#|\.\./)([^)]+)\)", r"](nbs/\1)", text)
    return NOTE + re.sub(r"\]\(\.\./([^)]+)\)", r"](\1)", text).strip() + "\n"


if __name__ == "__main__":
    (HERE.parent / "README.md").write_text(readme_text(), encoding="utf-8")
    print("README.md written", file=sys.stderr)
