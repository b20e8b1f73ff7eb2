"""Run notebooks top to bottom and store their outputs: `python nbs/execute.py [NOTEBOOK ...]` (default: all).

Stored outputs must be the same on every machine, so what differs from run to run is left out: widget views (the static
figure beside them stays), progress bars and warnings on stderr, execution counts and timing metadata.
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def storable(output):
    "True for outputs that are the same in every run."
    if output.output_type == "stream":
        return output.name == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def stored(outputs):
    "The outputs to keep; pieces of stdout become one, since a kernel cuts them where it happens to flush."
    kept = []
    for output in filter(storable, outputs):
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def execute(path: Path):
    "Run one notebook in place; the file is replaced only when every cell has run."
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = stored(cell.outputs)
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    notebook.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    aside = path.with_suffix(".tmp")
    nbformat.write(notebook, aside)
    aside.replace(path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    for name in [Path(argument) for argument in sys.argv[1:]] or sorted(HERE.rglob("[!.]*.ipynb")):
        execute(name)
