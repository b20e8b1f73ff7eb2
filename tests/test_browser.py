"""The search panel in front of a user: JupyterLab with its notebook, and the page of prvr_app, in a headless Chromium.

Without playwright or a Chromium these tests are skipped; with PRVR_BROWSER=required, as in .ci/run, they fail instead.
"""
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import psutil
import pytest
from makers import write_tiny_clip, write_video
from PIL import Image
from servers import ADDRESS, PATIENCE, ROOT, app, family, fetch, server, stop, wait_for

from prvr_nb.config import published_config
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.index import build_index
from prvr_nb.videos.search import moment_text, open_searcher

BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
QUIET = """--disable-background-networking --disable-component-update --disable-sync --disable-gpu --disable-quic
    --disable-domain-reliability --disable-dev-shm-usage --no-first-run --no-default-browser-check
    --no-pings""".split() + ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
FIRST, SECOND = "a man opens the fridge", "a woman picks apples" # the toy world understands both
PANEL = ".prvr-panel:has(.prvr-query)" # a stored picture of one has no controls
HTML = "a <b>bold</b> & <img src=x> film"


def missing(what):
    "Skip, or fail where a browser is required."
    if os.environ.get("PRVR_BROWSER") == "required":
        pytest.fail(f"PRVR_BROWSER=required, but {what}", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def chromium():
    for module in "playwright", "voila", "jupyterlab":
        if not importlib.util.find_spec(module):
            missing(f"{module} is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        missing(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=QUIET, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo(chromium, tmp_path_factory):
    "What `make app` starts, on a machine without data; another folder, and any free port."
    folder = tmp_path_factory.mktemp("demo")
    with server(app("--folder", folder / "app", "--port", 0), folder, ADDRESS) as found:
        yield found


@pytest.fixture(scope="module")
def own_index(tmp_path_factory):
    "An index of three own videos, one of them with a name that is not HTML."
    folder = tmp_path_factory.mktemp("own")
    (folder / "videos").mkdir()
    colours = {"tom & <i>jerry.mp4": ("red", "blue"), "garden.webm": ("green", "yellow"),
               "Äpfel.mkv": ("black", "white")}
    for number, (name, two) in enumerate(colours.items()):
        images = [Image.new("RGB", (96, 64), colour) for colour in two for _ in range(4 + 3 * number)]
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        write_video(folder / "videos" / name, images, rate=1, codec=codec)
    clip = write_tiny_clip(folder / "clip", [FIRST, SECOND])
    extract_videos(folder / "videos", folder / "data", "mine", model=str(clip), quiet=True)
    build_index(folder / "index", Embedder(None, published_config("mine")), folder / "data", quiet=True)
    return folder / "index"


# ---------------------------------------------------------------- what a user sees and does

@contextmanager
def opened(browser, url, wanted=PANEL):
    """A page that shows what is wanted, and that.

    At the end it must have logged no error and have asked no other machine for anything.
    """
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    context.set_default_timeout(1000 * PATIENCE)
    errors, elsewhere, page = [], [], context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error"
            and errors.append(f"{message.text} {message.location['url']}"))
    page.on("request", lambda request: urlsplit(request.url).hostname not in ("127.0.0.1", None)
            and elsewhere.append(request.url))
    try:
        page.goto(url, wait_until="commit")
        found = page.locator(wanted)
        until(page, lambda: found.count() and found.first.is_visible(), wanted)
        yield page, found
        assert errors == [] and elsewhere == []
    finally:
        if folder := os.environ.get("PRVR_PICTURES"):
            page.screenshot(path=f"{folder}/{time.time():.0f}.png", full_page=True)
        context.close()


def until(page, condition, what):
    "Wait for something that happens on a page or behind it."
    return wait_for(condition, what, lambda seconds: page.wait_for_timeout(1000 * seconds))


READ = """root => [...root.querySelectorAll('.prvr-column')].map(column => ({
    method: column.querySelector('.prvr-method').innerText.trim(),
    cards: [...column.querySelectorAll('.prvr-card')].map(card => {
        const text = name => card.querySelector(name).innerText.trim()
        const box = name => {
            const {left, right, width, height} = card.querySelector(name).getBoundingClientRect()
            return {left, right, width, height}
        }
        return {title: text('.prvr-title'), score: parseFloat(text('.prvr-score')), when: text('.prvr-when'),
                thumb: box('.prvr-thumb'), strip: box('.prvr-strip'), moment: box('.prvr-moment')}
    })}))"""


def said(columns):
    "What the cards say, wherever they stand."
    return [(column["method"], [(card["title"], card["score"], card["when"]) for card in column["cards"]])
            for column in columns]


def status(panel):
    return panel.locator(".prvr-status").first.inner_text()


def answer(page, panel, wanted=lambda now: True):
    "The columns of cards, once they are as wanted, have come to rest and nothing is being searched."
    before = []

    def read():
        now = panel.evaluate(READ)
        still = now == before and "searching" not in status(panel)
        before[:] = now
        return still and now and all(column["cards"] for column in now) and wanted(now) and now
    return until(page, read, "the answer")


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
        titles, scores = ([card[name] for card in column["cards"]] for name in ("title", "score"))
        assert column["method"] and len(set(titles)) == len(titles) > 1 and all(titles)
        assert scores == sorted(scores, reverse=True)
        for card in column["cards"]:
            strip, moment, thumb = card["strip"], card["moment"], card["thumb"]
            assert min(strip["width"], 10 * strip["height"]) > 50 and min(thumb["width"], 2 * thumb["height"]) > 10
            assert strip["left"] - 1 <= moment["left"] < moment["right"] <= strip["right"] + 1
            assert re.search(r"\d.*–.*\d", card["when"])


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
    until(page, lambda: "write a sentence" in status(panel), "a word about the empty query")
    type_query(panel, HTML)
    answer(page, panel, lambda now: said(now) != said(moved))
    assert HTML in earlier(panel) and not panel.locator("img[src='x'], b:text-is('bold')").count()
    return first


# ---------------------------------------------------------------- JupyterLab

ERRORS = ".jp-Notebook [data-mime-type='application/vnd.jupyter.error']"


def finished(page):
    "Whether every code cell that can be run has a number, or one has failed."
    prompts = page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-prompt").all_text_contents()
    return prompts and all(re.search(r"\[\d+\]", text) for text in prompts) or page.locator(ERRORS).count()


def kernel_is_there(address):
    "Whether a page is connected to a kernel that waits for work."
    kernels = [session["kernel"] for session in json.loads(fetch(f"{address}/api/sessions?token=secret")[2] or "[]")]
    return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)


def test_the_notebook_in_jupyterlab(chromium, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(ROOT / "nbs/videos", work, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
               "--IdentityProvider.token=secret", f"--ServerApp.root_dir={work}"]
    command += ["--allow-root"] * (os.geteuid() == 0)
    idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
    with server(command, tmp_path / "server", r"http://127\.0\.0\.1:\d+/lab(\?token=\S+)?") as (process, url):
        address = url.partition("/lab")[0]
        with opened(chromium, f"{address}/lab/tree/05_panel.ipynb?token=secret", ".jp-Notebook") as (page, _):
            until(page, lambda: kernel_is_there(address), "a kernel")
            until(page, lambda: page.locator(idle).count(), "a notebook that is ready")
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            until(page, lambda: finished(page), "the end of all cells")
            assert page.locator(ERRORS).all_inner_texts() == []
            panel = page.locator(PANEL)
            until(page, panel.count, "the panel")
            assert len(use_panel(page, panel)) > 1 # side by side
        assert not stop(process)


# ---------------------------------------------------------------- the page

def test_the_page_shows_the_panel(demo, chromium):
    with opened(chromium, demo[1]) as (page, panel):
        assert len(use_panel(page, panel)) > 1 and not page.locator(".jp-InputArea, .highlight").count() # no code on it
        search = panel.locator(".prvr-search i") # an icon that came with the widgets
        assert "Awesome" in search.evaluate("icon => getComputedStyle(icon, '::before').fontFamily")


def test_the_page_needs_its_token(demo, chromium):
    address = demo[1].partition("?")[0]
    assert "prvr" in fetch(demo[1])[2]
    for other in "", "?token=", "?token=wrong", "voila/render/app.ipynb", "voila/files/app.ipynb", "api/kernels":
        code, url, text = fetch(address + other)
        assert code in (401, 403, 404) or code == 200 and "/login" in url, other
        assert "prvr" not in text
    with opened(chromium, address, "input[type=password]") as (page, _):
        assert not page.locator(".prvr-panel").count()


def test_nobody_else_can_connect(demo, chromium):
    "The page and its kernels listen on this machine's own address only."
    process, url = demo
    with opened(chromium, url):
        listening = [connection.laddr.ip for one in family(process) for connection in one.net_connections("tcp")
                     if connection.status == psutil.CONN_LISTEN]
    assert len(listening) > 1 and set(listening) <= {"127.0.0.1", "::1"}


def test_own_videos_on_the_page(own_index, chromium, tmp_path):
    "The cards say what Python says; pictures and film are those of the files; Ctrl-C ends all processes."
    hits, = open_searcher(own_index).search([FIRST], 5)
    with server(app("--index", own_index, "--port", 0), tmp_path, ADDRESS) as (process, url):
        with opened(chromium, url) as (page, panel):
            type_query(panel, FIRST)
            column, = answer(page, panel)
            shown = [(card["title"], card["when"]) for card in column["cards"]]
            assert shown == [(hit.title, moment_text(hit)) for hit in hits] and len(hits) == 3
            assert [card["score"] for card in column["cards"]] == pytest.approx([h.score for h in hits], abs=0.006)
            for picture in panel.locator(".prvr-card img.prvr-thumb").all():
                assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
            panel.locator(".prvr-card").filter(has_text="garden.webm").locator(".prvr-play").click()
            film, ready = page.locator(".prvr-player video"), "video => video.readyState > 0 && video.videoWidth == 96"
            until(page, lambda: film.count() and film.evaluate(ready), "the film")
            garden, = (hit for hit in hits if hit.title == "garden.webm")
            rest = garden.duration - garden.seconds[0] # the film begins with the moment
            assert film.evaluate("video => video.duration") == pytest.approx(min(rest, 20), abs=1.5)
        family_now = family(process)
        assert len(family_now) > 1 and not stop(process, signal.SIGINT)
        assert not any(one.is_running() for one in family_now)


def test_a_closed_page_costs_nothing(own_index, chromium, tmp_path):
    "Soon after the last look at a page its kernel has ended; the page that is still open keeps its own."
    soon = "import prvr_nb.app as app; app.IDLE_SECONDS, app.LOOK_SECONDS = 10, 2"
    with server(app("--index", own_index, "--port", 0, first=soon), tmp_path, ADDRESS) as (process, url):
        with opened(chromium, url) as (page, panel):
            with opened(chromium, url):
                assert len(family(process)) > 2
            until(page, lambda: len(family(process)) == 2, "the end of the closed page's kernel")
            type_query(panel, FIRST)
            check_cards(answer(page, panel))
