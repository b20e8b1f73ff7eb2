"""Write README.md from index.ipynb, and the pictures that it shows.

The first line of a code cell steers it: `# README: output only` (in index.ipynb) hides the code, `# README: NAME.png`
stores the cell's first picture as images/NAME.png. Links are turned to where README.md stands.
"""
import base64
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
NOTE = "<!-- Generated from nbs/index.ipynb by nbs/make_readme.py; edit the notebook. -->\n\n"


def without_steering(cell):
    "A cell as the README shows it."
    if cell.cell_type == "code" and cell.source.startswith("# README: output only"):
        text = "\n".join(output.data["text/markdown"] for output in cell.outputs)
        return nbformat.v4.new_markdown_cell(text)
    return cell


def readme_text():
    "README.md as index.ipynb has it."
    notebook = nbformat.read(HERE / "index.ipynb", as_version=4)
    notebook.cells = [without_steering(cell) for cell in notebook.cells]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"\]\((?!https?://|#|\.\./)([^)]+)\)", r"](nbs/\1)", text)  # a neighbour of the notebook lies in nbs/
    return NOTE + re.sub(r"\]\(\.\./([^)]+)\)", r"](\1)", text).strip() + "\n"


def pictures():
    "Name and bytes of every picture that a notebook makes for the README."
    for path in sorted(HERE.rglob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            steered = re.match(r"# README: (\w+\.png)$", cell.source.partition("\n")[0])
            if steered:
                drawn = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
                yield steered[1], base64.b64decode(drawn)


if __name__ == "__main__":
    (HERE / "images").mkdir(exist_ok=True)
    for name, data in pictures():
        (HERE / "images" / name).write_bytes(data)
    (HERE.parent / "README.md").write_text(readme_text(), encoding="utf-8")
