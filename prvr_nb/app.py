"""The search panel as a page of this machine."""
import html
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

try:
    import ipywidgets as widgets
except ImportError: # check_app says so in a sentence
    widgets = None

from prvr_nb.files import UserError, write_json
from prvr_nb.videos.cards import STYLE
from prvr_nb.videos.panel import SearchPanel, named
from prvr_nb.videos.search import open_searchers

TITLE = "Find a moment in a video"
INTRODUCTION = f"<h1>{TITLE}</h1><p>The curve in a card shows how well the sentence fits each part of the video.</p>"
COLUMNS_NOTE = "<p>Every column ranks the same videos with another model.</p>"
DEMO_NOTE = """<p><b>This is a demonstration on toy videos</b>, which have features and no pictures. Its models were
trained for seconds: they show how the page works, not how good the methods are.</p>"""
IDLE_SECONDS, LOOK_SECONDS = 60, 5 # a kernel without a page ends after so long; how often the server looks

# Voilà's own template, whose icons would be fetched from another machine; those of the widgets come with them.
TEMPLATE = """{% extends 'voila/templates/lab/index.html.j2' %}
{% block notebook_css %}{{ super() | replace('rel="stylesheet" href="https:', 'data-omitted="') }}{% endblock %}"""


def check_app():
    "Raise UserError when what a page needs is not installed."
    missing = [name for name in ("ipywidgets", "voila") if not find_spec(name)]
    if missing:
        raise UserError(f"prvr_app needs {' and '.join(missing)}; install prvr_nb[app]")

def check_port(port:int)->int: # the same, or a free one for 0
    "Raise UserError when a port of this machine cannot be had."
    with socket.socket() as probe:
        if os.name == "posix": # as the server does: connections of an earlier page may still be closing
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"port {port} cannot be used ({reason}); choose another --port") from None
        return probe.getsockname()[1]

def index_names(folders:list)->dict: # name for people → folder of an index
    "A name for each index: its folder's, or of the run that it lies in."
    short = [folder.resolve().parent.name if folder.name == "index" else folder.name for folder in folders]
    return {str(folder) if short.count(name) > 1 else name: folder
            for name, folder in zip(short, folders, strict=True)}

def page(indexes:dict, demo:bool=False)->Any: # name of a method → folder; whether they are the demo's
    "The page that Voilà serves; an index that cannot be opened becomes a sentence."
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar() # of transformers; it would stay on the page
    try:
        body = SearchPanel(open_searchers(indexes)).widget
    except UserError as error:
        body = named(widgets.HTML(html.escape(str(error))), "prvr-status")
    head = STYLE + INTRODUCTION + COLUMNS_NOTE * (len(indexes) > 1) + DEMO_NOTE * demo
    return named(widgets.VBox([widgets.HTML(head), body]), "prvr-page")

def write_page(path:Path, indexes:dict, demo:bool)->Path: # see page
    "The notebook behind the page: one cell."
    folders = {name: str(Path(folder).resolve()) for name, folder in indexes.items()}
    cell = {"cell_type": "code", "id": "page", "metadata": {}, "execution_count": None, "outputs": [],
            "source": f"from prvr_nb.app import page\npage({folders!r}, {demo})"}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    write_json(path, {"cells": [cell], "metadata": {"kernelspec": kernel, "title": TITLE},
                      "nbformat": 4, "nbformat_minor": 5})
    return path

@contextmanager
def own_settings(folder:Path)->Iterator: # empty
    "Work in a folder without any settings, where neither those of the current one nor the user's are seen."
    before, temporary = dict(os.environ), tempfile.tempdir
    for name in before:
        if name.startswith(("JUPYTER", "VOILA", "IPYTHON")):
            del os.environ[name]
    places = dict.fromkeys(("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "TMPDIR"), str(folder))
    os.environ.update(places, JUPYTER_NO_CONFIG="1")
    tempfile.tempdir = str(folder) # what is left in it goes with the folder
    try:
        with chdir(folder):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = temporary

def serve(path:Path, port:int, token:str): # notebook of a page; what a visitor must know
    "Run Voilà until it is interrupted; only this machine can reach it, and no settings but these count."
    path = path.resolve()
    with tempfile.TemporaryDirectory() as name, own_settings(Path(name)):
        template = Path("voila/templates/prvr")
        template.mkdir(parents=True)
        write_json(template/"conf.json", {"base_template": "lab"})
        (template/"index.html.j2").write_text(TEMPLATE, encoding="utf-8")
        from voila.app import Voila
        Voila.launch_instance([str(path), "--no-browser", "--strip_sources=True", "--template=prvr",
                               f"--MappingKernelManager.cull_idle_timeout={IDLE_SECONDS}",
                               f"--MappingKernelManager.cull_interval={LOOK_SECONDS}"],
                              config_file_paths=[name], ip="127.0.0.1", port=port, port_retries=0, token=token)
