"""The demonstration and the page, without a browser."""
import json
import os
import re
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from servers import ADDRESS, app, family, fetch, server, wait_for

import prvr_nb.app as module
from prvr_nb import demo
from prvr_nb.app import check_port, index_names, own_settings, page, write_page
from prvr_nb.cli import app_command
from prvr_nb.demo import demo_indexes, one_thread, run_demo
from prvr_nb.files import UserError
from prvr_nb.videos.index import MANIFEST
from prvr_nb.videos.search import open_searchers

TINY = dict(epochs=1, hidden_size=16, heads=2, dropout=0., merge_schedule=(16, 10, 8))


@pytest.fixture(scope="module")
def quick():
    "Demonstrations of a moment."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"QUICK_RUNS": TINY, "N_TRAIN": 12, "N_VAL": 14}.items():
            patch.setattr(demo, name, value)
        yield


@pytest.fixture(scope="module")
def folder(quick, tmp_path_factory):
    "Of a demonstration that is ready."
    folder = tmp_path_factory.mktemp("app") / "demo"
    demo_indexes(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return folder / "zero-shot/index"


@pytest.fixture
def killed_at(monkeypatch):
    "Run something that is killed at a step of the demonstration."
    def run(step, function, *args, **kwargs):
        def killed(*_, **__):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(demo, step, killed)
            function(*args, **kwargs)
    return run


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ---------------------------------------------------------------- demonstration

def test_a_second_demonstration_changes_nothing(folder):
    before = state(folder)
    assert list(demo_indexes(folder)) == ["full method", "baseline", "zero-shot CLIP"]
    assert state(folder) == before


def test_a_demonstration_goes_on_where_it_was_killed(quick, tmp_path, monkeypatch, killed_at):
    best = tmp_path / "full/best.safetensors"
    killed_at("write_toy", demo_indexes, tmp_path)
    killed_at("build_index", demo_indexes, tmp_path)
    trained = best.stat().st_mtime_ns
    assert all((index / MANIFEST).exists() for index in demo_indexes(tmp_path).values())
    assert best.stat().st_mtime_ns == trained
    before = state(tmp_path)
    monkeypatch.setattr(demo, "N_VAL", 10) # other settings: made again, but not before the corpus is there
    killed_at("write_toy", demo_indexes, tmp_path)
    assert before.keys() == state(tmp_path).keys() and best.stat().st_mtime_ns == trained
    assert len(open_searchers(demo_indexes(tmp_path))["baseline"].index) == 10


def test_an_older_comparison_goes_when_its_corpus_is_complete(tmp_path, killed_at):
    sizes = dict(quiet=True, n_train=12, n_val=10, **TINY)
    rows = run_demo(tmp_path / "data", tmp_path / "out", **sizes)
    assert [row["name"] for row in rows][1:] == ["baseline", "full"]
    before = state(tmp_path)
    killed_at("write_toy", run_demo, tmp_path / "data", tmp_path / "out", **sizes)
    assert state(tmp_path) == before


def test_a_folder_with_something_else_is_refused(quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for make in demo_indexes, lambda folder: run_demo(folder / "data", folder):
        with pytest.raises(UserError, match="not a demo"):
            make(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_one_thread_and_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the page

def texts(widget):
    "Everything that a widget and its children say, and their names in the style sheet."
    said = [getattr(widget, name, None) for name in ("value", "description")] + list(widget._dom_classes)
    return "\n".join([text for text in said if isinstance(text, str)]
                     + [texts(child) for child in getattr(widget, "children", ())])


def test_the_page_shows_the_panel_or_a_sentence(index, tmp_path):
    shown = texts(page({"mine": index}))
    assert "prvr-query" in shown and "toy videos" not in shown and "Every column" not in shown
    demonstration = texts(page({"mine": index, "other": index}, demo=True))
    assert "toy videos" in demonstration and "Every column" in demonstration
    missing = texts(page({"mine": tmp_path / "<gone>"}))
    assert "holds no finished index" in missing and "&lt;gone&gt;" in missing and "prvr-query" not in missing


def test_the_pages_notebook_runs(index, tmp_path):
    import nbformat
    notebook = nbformat.read(write_page(tmp_path / "search.ipynb", {'a "quoted" name': index}, False), 4)
    nbformat.validate(notebook)
    space = {}
    exec(notebook.cells[0].source.replace("\npage(", "\nshown = page("), space)
    assert "prvr-query" in texts(space["shown"])


def test_settings_are_out_of_sight_for_a_while(tmp_path, monkeypatch):
    from jupyter_core.paths import jupyter_config_path, jupyter_path
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/hostile")
    monkeypatch.setenv("JUPYTER_PATH", "/hostile")
    here = Path.cwd()
    with own_settings(tmp_path):
        assert Path.cwd() == tmp_path and str(tmp_path) in jupyter_path()
        assert "/hostile" not in jupyter_config_path() + jupyter_path()
    assert Path.cwd() == here and os.environ["JUPYTER_CONFIG_PATH"] == "/hostile"


def test_the_server_obeys_its_command_line_only(index, tmp_path):
    """Settings that lie in the current folder, or are the user's, neither run nor open the page.

    No other machine is asked for anything, and a kernel without a page ends.
    """
    left = set(Path(tempfile.gettempdir()).glob("jupyter-clean-cfg*"))
    ran, settings = tmp_path / "ran", {"Voila": {"ip": "127.0.0.2", "token": "", "port": 1, "base_url": "/else/"}}
    code = f"open({str(ran)!r}, 'a').write(__file__)\n"
    for name in "", "jupyter", ".jupyter":
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "voila.json").write_text(json.dumps(settings))
        for program in "voila.py", "jupyter_config.py":
            (tmp_path / name / program).write_text(code)
    startup, kernel = tmp_path / "ipython/profile_default/startup/0.py", tmp_path / "share/kernels/python3/kernel.json"
    for path, text in {startup: code, kernel: '{"argv": ["false"], "display_name": "", "language": ""}'}.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
    soon = "import prvr_nb.app as app; app.IDLE_SECONDS, app.LOOK_SECONDS = 5, 1"
    command = app("--index", index, "--port", 0, first=soon)
    with server(command, tmp_path, ADDRESS, HOME=str(tmp_path)) as (process, url):
        status, _, text = fetch(url)
        assert status == 200 and "prvr" in text and "prvr" not in fetch(url.partition("?")[0])[2]
        assert not re.search(r"<(link|script|img)[^>]*(href|src)=.https?:", text)
        wait_for(lambda: len(family(process)) == 1, "the end of kernels without a page")
    assert not ran.exists() and set(Path(tempfile.gettempdir()).glob("jupyter-clean-cfg*")) <= left


# ---------------------------------------------------------------- the command

@pytest.fixture
def served(monkeypatch):
    "What would be served: the page's cell, port and token."
    calls = []
    monkeypatch.setattr(module, "serve", lambda path, port, token:
                        calls.append((json.loads(path.read_text())["cells"][0]["source"], port, token)))
    return calls


def test_the_command_serves_what_it_prints(folder, index, served, capsys):
    assert app_command(["--folder", str(folder), "--port", "0"]) == 0
    source, port, token = served.pop()
    assert port > 0 and f"http://127.0.0.1:{port}/?token={token} " in capsys.readouterr().out and len(token) > 20
    assert source.endswith("True)") and str(folder / "full/index") in source
    assert app_command(["--index", str(folder / "full/index"), "--index", str(index), "--port", str(port)]) == 0
    source, again, other = served.pop()
    assert again == port and other != token and source.endswith("False)") and "zero-shot" in source
    assert "demonstration" not in capsys.readouterr().out


def test_the_command_refuses_in_a_sentence(tmp_path, index, served, monkeypatch, capsys):
    def said(*argv):
        status, message = app_command([str(arg) for arg in argv]), capsys.readouterr().err
        assert status == 1 and message.count("\n") == 1
        return message
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in said("--port", taken.getsockname()[1], "--index", index)
    assert "choose another --port" in said("--port", "99999", "--index", index)
    assert "holds no finished index" in said("--port", "0", "--index", tmp_path / "gone")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "voila" else True)
    assert "needs voila" in said("--index", index)
    assert served == []


def test_a_port_whose_connections_are_closing_can_be_had():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        listening.accept()[0].close() # the server hangs up first, as after Ctrl-C
        client.close()
    assert check_port(port) == port and 0 < check_port(0) < 65536


def test_names_of_indexes():
    names = index_names([Path("runs/a/index"), Path("runs/b/index"), Path("zero"), Path("x/a")])
    assert names == {"runs/a/index": Path("runs/a/index"), "b": Path("runs/b/index"), "zero": Path("zero"),
                     "x/a": Path("x/a")}
