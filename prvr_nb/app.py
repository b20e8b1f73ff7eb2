"""The search panel as a page on this machine."""
import html
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import ipywidgets as widgets
except ImportError:  # the command says so in a sentence
    widgets = None

from prvr_nb.files import UserError, write_json
from prvr_nb.videos.cards import STYLE
from prvr_nb.videos.panel import SearchPanel, named
from prvr_nb.videos.search import open_searchers


INTRODUCTION = """<h1>Find a moment in a video</h1><p>Every column ranks the same videos with another model. The curve in a card says why: it shows how well the sentence fits each part of the video.</p>"""

DEMO_NOTE = """<p><b>This is a demonstration on toy videos</b>, which have features and no pictures. Its models were trained for seconds: they show how the panel works, not how good the methods are.</p>"""

@contextmanager
def silence()->Iterator:
    "No progress bars of transformers: on a page they would stay."
    from transformers.utils import logging
    logging.disable_progress_bar()
    try: yield
    finally: logging.enable_progress_bar()

def page(
    indexes:dict, # name of a method → folder of its index
    demo:bool=False, # whether they are the demo's
)->Any: # of ipywidgets
    "The page that Voilà serves; an index that cannot be opened becomes a sentence."
    try:
        with silence(): body = SearchPanel(open_searchers(indexes)).widget
    except UserError as error: body = named(widgets.HTML(html.escape(str(error))), "prvr-status")
    return named(widgets.VBox([widgets.HTML(STYLE + INTRODUCTION + DEMO_NOTE * demo), body]), "prvr-page")

def write_page(
    path:Path, # '*.ipynb' to write
    indexes:dict, # name of a method → folder of its index
    demo:bool, # whether they are the demo's
)->Path: # the same
    "The notebook behind the page: one cell."
    source = f"from prvr_nb.app import page\npage({({name: str(Path(folder).resolve()) for name, folder in indexes.items()})!r}, {demo})"
    cell = {"cell_type": "code", "id": "page", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    write_json(path, {"cells": [cell], "metadata": {"kernelspec": kernel, "title": "Find a moment in a video"}, "nbformat": 4, "nbformat_minor": 5})
    return path


def index_names(
    folders:list, # of indexes
)->dict: # name for people → folder
    "A name for each index: its folder's, or of the run that it lies in."
    short = [folder.resolve().parent.name if folder.name == "index" else folder.name for folder in folders]
    return {str(folder) if short.count(name) > 1 else name: folder for name, folder in zip(short, folders)}

def check_port(
    port:int, # of this machine
):
    "Raise UserError when a port cannot be had."
    with socket.socket() as probe:
        try: probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error: raise UserError(f"port {port} cannot be used ({getattr(error, 'strerror', None) or error}); choose another --port") from None


def serve(
    path:Path, # notebook of a page
    port:int, # of this machine
    token:str, # that a visitor must know
):
    "Run Voilà until it is interrupted; only this machine can reach it."
    from voila.app import Voila
    Voila.launch_instance([str(path), "--no-browser", "--strip_sources=True"], ip="127.0.0.1", port=port, port_retries=0, token=token)

def check_app():
    "Raise UserError when what a page needs is not installed."
    from importlib.util import find_spec
    missing = [name for name in ("ipywidgets", "voila") if not find_spec(name)]
    if missing: raise UserError(f"prvr_app needs {' and '.join(missing)}; install prvr_nb[app]")
