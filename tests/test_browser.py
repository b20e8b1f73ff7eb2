"""The search panel in front of a user: JupyterLab with notebook 25, and the page of prvr_app, driven in a headless Chromium.

Without playwright or a Chromium these tests are skipped; with PRVR_BROWSER=required, as in .ci/run, they fail instead."""
import configparser
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image

from prvr_nb.config import published_config
from makers import write_tiny_clip, write_video
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.index import build_index
from prvr_nb.videos.search import moment_text, open_searcher

ROOT = Path(__file__).parent.parent
PATIENCE = int(os.environ.get("PRVR_PATIENCE", 600)) # seconds until something that should happen has not happened; only a broken panel waits so long
BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
QUIET = """--disable-background-networking --disable-component-update --disable-sync --disable-gpu --disable-quic --disable-domain-reliability --disable-dev-shm-usage
    --no-first-run --no-default-browser-check --no-pings""".split() + ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
FIRST, SECOND = "a man opens the fridge", "a woman picks apples" # the toy world understands both
ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/" # Voilà's template links to icons there; those of the panel come with the widgets
PANEL = ".prvr-panel:has(.prvr-query)" # a stored picture of one has no controls
HTML = "a <b>bold</b> & <img src=x> film"


def missing(what):
    "Skip, or fail where a browser is required."
    if os.environ.get("PRVR_BROWSER") == "required": pytest.fail(f"PRVR_BROWSER=required, but {what}", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium():
    for module in "playwright", "voila", "jupyterlab":
        if not importlib.util.find_spec(module): missing(f"{module} is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path: missing(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=QUIET, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


# ---------------------------------------------------------------- servers

def wait_for(condition, what, pause=time.sleep):
    "The first true value of a condition; `pause` waits for some seconds."
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > end: pytest.fail(f"{what} has not happened in {PATIENCE} seconds")
        pause(0.2)
    return found


def fetch(url):
    "Status, address after redirections, and text."
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as reply: return reply.status, reply.url, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error: return error.code, error.url, error.read().decode(errors="replace")
    except OSError: return None, url, ""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family(process):
    "A process and its descendants."
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def stop(process, how=signal.SIGTERM):
    "End a server as a user does; returns the processes that stayed, which are killed."
    if process.poll() is not None: return []
    all_of_them = family(process)
    os.killpg(process.pid, how)
    _, stayed = psutil.wait_procs(all_of_them, timeout=60, callback=lambda _: process.poll())
    for one in stayed: one.kill()
    process.wait()
    return stayed


def as_from_a_terminal():
    "In a new process: Ctrl-C ends it, whatever started the tests; on Linux it also ends when they are killed."
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux": ctypes.CDLL(None).prctl(1, signal.SIGTERM) # PR_SET_PDEATHSIG


@contextmanager
def server(command, folder, pattern):
    "A process group that answers at the address that it prints; ended in any case."
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "jupyter" / "lab" / "user-settings" / "@jupyterlab" # not the user's
    for name, content in ("notebook-extension/tracker", {"windowingMode": "none"}), ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}):
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(content))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1",
           "JUPYTER_CONFIG_DIR": str(folder / "jupyter"), "JUPYTER_DATA_DIR": str(folder / "share"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "IPYTHONDIR": str(folder / "ipython")}
    log = folder / "log"
    with open(log, "w") as file: process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=as_from_a_terminal)
    def address():
        if process.poll() is not None: pytest.fail(f"{command} ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        found = re.search(pattern, log.read_text())
        return found and fetch(found[0])[0] == 200 and found[0]
    try: yield process, wait_for(address, f"an answer of {command[:4]}")
    finally: stop(process)


def app(*flags):
    "The command line of prvr_app, as its entry point in settings.ini starts it."
    config = configparser.ConfigParser()
    config.read(ROOT / "settings.ini")
    module, function = re.search(r"prvr_app=([\w.]+):(\w+)", config["DEFAULT"]["console_scripts"]).groups()
    return [sys.executable, "-c", f"import sys; from {module} import {function}; sys.exit({function}())", *map(str, flags)]


ADDRESS = r"http://127\.0\.0\.1:\d+/\S*token=[\w-]+"


@pytest.fixture(scope="module")
def demo(chromium, tmp_path_factory):
    "What `make app` starts, on a machine without data; another folder and port."
    folder = tmp_path_factory.mktemp("demo")
    with server(app("--folder", folder / "app", "--port", free_port()), folder, ADDRESS) as found: yield found


@pytest.fixture(scope="module")
def own_index(tmp_path_factory):
    "An index of three own videos, one of them with a name that is not HTML."
    folder = tmp_path_factory.mktemp("own")
    (folder / "videos").mkdir()
    for number, (name, colours) in enumerate({"tom & <i>jerry.mp4": ("red", "blue"), "garden.webm": ("green", "yellow"), "Äpfel.mkv": ("black", "white")}.items()):
        images = [Image.new("RGB", (96, 64), colour) for colour in colours for _ in range(4 + 3 * number)]
        write_video(folder / "videos" / name, images, rate=1, codec="libvpx-vp9" if name.endswith("webm") else "libx264")
    clip = write_tiny_clip(folder / "clip", [FIRST, SECOND])
    extract_videos(folder / "videos", folder / "data", "mine", model=str(clip), quiet=True)
    build_index(folder / "index", Embedder(None, published_config("mine")), folder / "data", quiet=True)
    return folder / "index"


# ---------------------------------------------------------------- what a user sees and does

@contextmanager
def opened(browser, url, **settings):
    "A page; at the end it must have logged no error of its own and have asked no other machine for anything."
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, **settings)
    context.set_default_timeout(1000 * PATIENCE)
    errors, elsewhere, page = [], [], context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and not message.location["url"].startswith(ICONS) and errors.append(f"{message.text} {message.location['url']}"))
    page.on("request", lambda request: urlsplit(request.url).hostname not in ("127.0.0.1", None) and not request.url.startswith(ICONS) and elsewhere.append(request.url))
    try:
        page.goto(url, timeout=1000 * PATIENCE)
        yield page
        assert errors == [] and elsewhere == []
    finally:
        if folder := os.environ.get("PRVR_PICTURES"): page.screenshot(path=f"{folder}/{time.time():.0f}.png", full_page=True)
        context.close()


READ = """root => [...root.querySelectorAll('.prvr-column')].map(column => ({
    method: column.querySelector('.prvr-method').innerText.trim(),
    cards: [...column.querySelectorAll('.prvr-card')].map(card => {
        const text = name => card.querySelector(name).innerText.trim(), box = name => { const {left, right, width, height} = card.querySelector(name).getBoundingClientRect(); return {left, right, width, height} }
        return {title: text('.prvr-title'), score: parseFloat(text('.prvr-score').match(/-?[0-9.]+/)[0]), when: text('.prvr-when'), thumb: box('.prvr-thumb'), strip: box('.prvr-strip'), moment: box('.prvr-moment')}
    })}))"""


def said(columns):
    "What the cards say, wherever they stand."
    return [(column["method"], [(card["title"], card["score"], card["when"]) for card in column["cards"]]) for column in columns]


def answer(page, panel, wanted):
    "The columns of cards, once they are as wanted, have come to rest and nothing is being searched."
    before = []
    def read():
        now = panel.evaluate(READ)
        still = now == before and "earching" not in panel.locator(".prvr-status").first.inner_text()
        before[:] = now
        return still and now and all(column["cards"] for column in now) and wanted(now) and now
    return wait_for(read, "the answer", lambda seconds: page.wait_for_timeout(1000 * seconds))


def type_query(panel, sentence):
    box = panel.locator(".prvr-query input")
    box.fill(sentence)
    box.press("Enter")


def earlier(panel):
    "The queries of the history; the options of a list have spaces that do not break."
    return [text.replace("\xa0", " ").strip() for text in panel.locator(".prvr-history option").all_inner_texts()]


def check_cards(columns):
    "What every answer has to be: different videos, the best first, each with a picture and a moment inside its strip."
    for column in columns:
        titles, scores = [card["title"] for card in column["cards"]], [card["score"] for card in column["cards"]]
        assert column["method"] and len(set(titles)) == len(titles) > 1 and all(titles) and scores == sorted(scores, reverse=True)
        for card in column["cards"]:
            assert card["strip"]["width"] > 50 and card["strip"]["height"] > 5 and card["thumb"]["width"] > 10 and card["thumb"]["height"] > 5 and re.search(r"\d.*–.*\d", card["when"])
            assert card["strip"]["left"] - 1 <= card["moment"]["left"] < card["moment"]["right"] <= card["strip"]["right"] + 1


def use_panel(page, panel):
    "A user's walk: two queries, the first once more out of the history, the slider, an empty query, one with HTML."
    panel.scroll_into_view_if_needed()
    before = panel.evaluate(READ)
    type_query(panel, FIRST)
    first = answer(page, panel, lambda now: said(now) != said(before))
    check_cards(first)
    panel.locator(".prvr-query input").fill(SECOND)
    panel.locator(".prvr-search").click()
    second = answer(page, panel, lambda now: said(now) != said(first))
    check_cards(second)
    assert {FIRST, SECOND} <= set(earlier(panel))
    panel.locator(".prvr-history select").select_option(index=earlier(panel).index(FIRST))
    answer(page, panel, lambda now: said(now) == said(first))
    panel.locator(".prvr-weight .noUi-handle").press("End")
    moved = answer(page, panel, lambda now: said(now) != said(first))
    check_cards(moved)
    type_query(panel, "")
    wait_for(lambda: "sentence" in panel.locator(".prvr-status").first.inner_text(), "a word about the empty query", lambda seconds: page.wait_for_timeout(1000 * seconds))
    type_query(panel, HTML)
    answer(page, panel, lambda now: said(now) != said(moved))
    assert HTML in earlier(panel) and not panel.locator("img[src='x'], b:text-is('bold')").count()
    return first


# ---------------------------------------------------------------- JupyterLab

ERRORS = ".jp-Notebook [data-mime-type='application/vnd.jupyter.error']"

def finished(page):
    "Whether every code cell that can be run has a number, or one has failed."
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt").all_text_contents()
    return prompts and all(re.search(r"\[\d+\]", prompt) for prompt in prompts) or page.locator(ERRORS).count()


def kernel_is_there(address):
    "Whether a page is connected to a kernel that waits for work."
    sessions = json.loads(fetch(f"{address}/api/sessions?token=secret")[2] or "[]")
    return any(session["kernel"]["connections"] and session["kernel"]["execution_state"] == "idle" for session in sessions)


def test_the_notebook_in_jupyterlab(chromium, tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "work" / "nbs", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={free_port()}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret",
               f"--ServerApp.root_dir={tmp_path / 'work'}", *["--allow-root"] * (os.geteuid() == 0)]
    with server(command, tmp_path / "server", r"http://127\.0\.0\.1:\d+/lab\?token=\S+|http://127\.0\.0\.1:\d+/lab") as (process, url):
        address = url.partition("/lab")[0]
        with opened(chromium, f"{address}/lab/tree/nbs/25_panel.ipynb?token=secret") as page:
            wait_for(lambda: kernel_is_there(address), "a kernel", lambda seconds: page.wait_for_timeout(1000 * seconds))
            page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", state="attached")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            wait_for(lambda: finished(page), "the end of all cells", lambda seconds: page.wait_for_timeout(1000 * seconds))
            assert page.locator(ERRORS).all_inner_texts() == []
            panel = page.locator(PANEL)
            panel.wait_for()
            columns = use_panel(page, panel)
            assert len(columns) > 1 # side by side
        assert not stop(process)


# ---------------------------------------------------------------- the page

def test_the_page_shows_the_panel(demo, chromium):
    with opened(chromium, demo[1]) as page:
        panel = page.locator(PANEL)
        panel.wait_for()
        columns = use_panel(page, panel)
        assert len(columns) > 1 and not page.locator(".jp-InputArea, .highlight").count() # no code on it


def test_the_page_needs_its_token(demo, chromium):
    address = demo[1].partition("?")[0]
    assert "prvr" in fetch(demo[1])[2]
    for other in "", "?token=", "?token=wrong", "voila/render/app.ipynb", "voila/files/app.ipynb", "api/kernels":
        status, url, text = fetch(address + other)
        assert status in (401, 403, 404) or status == 200 and "/login" in url, other
        assert "prvr" not in text
    with opened(chromium, address) as page:
        page.wait_for_selector("input[type=password]")
        assert not page.locator(".prvr-panel").count()


def test_nobody_else_can_connect(demo, chromium):
    "The page and its kernels listen on this machine's own address only."
    process, url = demo
    with opened(chromium, url) as page:
        page.locator(PANEL).wait_for()
        listening = [c.laddr.ip for one in family(process) for c in one.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 1 and set(listening) <= {"127.0.0.1", "::1"}


def test_own_videos_on_the_page(own_index, chromium, tmp_path):
    "The cards say what Python says; the pictures and the film are those of the files; Ctrl-C ends all processes."
    hits, = open_searcher(own_index).search([FIRST], 5)
    with server(app("--index", own_index, "--port", free_port(), "--folder", tmp_path / "app"), tmp_path, ADDRESS) as (process, url):
        with opened(chromium, url) as page:
            panel = page.locator(PANEL)
            panel.wait_for()
            type_query(panel, FIRST)
            column, = answer(page, panel, lambda now: True)
            assert [(card["title"], card["when"]) for card in column["cards"]] == [(hit.title, moment_text(hit)) for hit in hits] and len(hits) == 3
            assert [card["score"] for card in column["cards"]] == pytest.approx([hit.score for hit in hits], abs=0.006)
            for card in panel.locator(".prvr-card").all():
                assert card.locator("img.prvr-thumb").evaluate("image => image.complete && image.naturalWidth > 0")
            card = panel.locator(".prvr-card").filter(has_text="garden.webm")
            card.locator(".prvr-play").click()
            film = page.locator(".prvr-player video")
            film.wait_for()
            wait_for(lambda: film.evaluate("video => video.readyState > 0 && video.videoWidth == 96"), "the film", lambda seconds: page.wait_for_timeout(1000 * seconds))
            garden, = (hit for hit in hits if hit.title == "garden.webm")
            rest = garden.duration - garden.seconds[0] # the film begins with the moment, or is wound forward to it
            assert film.evaluate("video => video.duration") == pytest.approx(min(rest, 20), abs=1.5) or film.evaluate("video => video.currentTime") >= garden.seconds[0] - 0.5
        family_now = family(process)
        assert len(family_now) > 1 and not stop(process, signal.SIGINT) and not any(one.is_running() for one in family_now)
