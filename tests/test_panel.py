"""The search panel without a browser: cards, ranks, events, clips, mistakes, the demonstration and the command of the page."""
import html
import json
import re
import socket
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from prvr_nb import app, cli, demo
from prvr_nb.videos import panel as module
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.data.corpus import Moment, corpus_paths
from makers import write_tiny_clip, write_video
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.frames import video_images
from prvr_nb.app import index_names, page, write_page
from prvr_nb.cli import app_command
from prvr_nb.demo import demo_indexes, demo_searchers
from prvr_nb.videos.answers import Collection, Library, answer, find_events, rank_of, said_there
from prvr_nb.videos.cards import Card, card_html, events_html, peak_text, strip_html
from prvr_nb.videos.frames import cut_clip, fitted
from prvr_nb.videos.panel import SearchPanel, check_query, player
from prvr_nb.videos.search import open_searchers
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.index import build_index
from prvr_nb.videos.search import Hit, search, top_k

SENTENCE = "a <b>red</b> ball & a \"boat\""


@pytest.fixture(scope="module")
def quick():
    "A demonstration of a moment."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK_RUNS", dict(epochs=1, hidden_size=16, heads=2, dropout=0., merge_schedule=(16, 10, 8)))
        patch.setattr(demo, "N_TRAIN", 12)
        patch.setattr(demo, "N_VAL", 14)
        yield


@pytest.fixture(scope="module")
def folder(quick, tmp_path_factory):
    return tmp_path_factory.mktemp("app") / "demo"


@pytest.fixture(scope="module")
def searchers(folder):
    return demo_searchers(folder)


@pytest.fixture
def panel(searchers):
    return SearchPanel(searchers, k=4)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "Two videos of one's own with features of a small CLIP, and an index; brightness tells the time."
    root = tmp_path_factory.mktemp("own")
    (root / "videos").mkdir()
    for name, top in ("grey.mp4", 200), ("a <b> & \"c\".webm", 100):
        images = [Image.new("RGB", (96, 64), (round(top * t / 100),) * 3) for t in range(100)]
        write_video(root / "videos" / name, images, rate=10, codec="libx264" if name.endswith("mp4") else "libvpx-vp9")
    (root / "captions.csv").write_text(f'video,sentence,start,end\ngrey.mp4,"{SENTENCE.replace(chr(34), chr(34) * 2)}",2,6\n')
    extract_videos(root / "videos", root / "data", "mine", root / "captions.csv", write_tiny_clip(root / "clip", [SENTENCE]), quiet=True)
    build_index(root / "index", Embedder(None, published_config("mine", merge_schedule=(10, 8))), root / "data", "mine", quiet=True)
    return root


@pytest.fixture
def own_panel(own):
    return SearchPanel(open_searchers({"mine": own / "index"}), k=2)


def make_hit(curve=(0., 1., 0.), duration=10., **other):
    curve = torch.tensor(curve)
    return Hit(**{**dict(id="v", title="v.mp4", score=0.5, start=0.3, end=0.7, peak=0.5, duration=duration, curve=curve, frames=curve, clips=curve), **other})


def texts(widget):
    "Everything that a widget and its children say."
    said = [str(getattr(widget, name)) for name in ("value", "description") if isinstance(getattr(widget, name, None), str)]
    return "\n".join(said + [texts(child) for child in getattr(widget, "children", ())])


def with_class(widget, name):
    "The widgets of a class, in the order of the page."
    return [widget] * (name in getattr(widget, "_dom_classes", ())) + [found for child in getattr(widget, "children", ()) for found in with_class(child, name)]


def status(panel):
    return html.unescape(re.sub("<[^>]*>", "", panel.status.value))


def a_caption(searchers, n=0):
    library = Library(next(iter(searchers.values())).index)
    return [(sentence, video) for videos in library.collections[0].captions.values() for video, sentence in videos.items() if video in library.index.positions][n]


# ---------------------------------------------------------------- events

def test_events_are_cut_where_the_picture_changes():
    frames = np.repeat(np.eye(4), [5, 3, 7, 2], axis=0)
    assert np.bincount(find_events(frames)).tolist() == [5, 3, 7, 2]
    np.testing.assert_allclose(np.bincount(find_events(np.repeat(frames, 100, axis=0))), 128 * np.array([5, 3, 7, 2]) / 17, atol=0.7) # of 128 tokens
    assert find_events(np.repeat(np.eye(12), 4, axis=0)).max() == 7 # not more than there are colours
    assert find_events(np.zeros((6, 3), np.float16)).tolist() == [0] * 6


def test_events_are_drawn_in_proportion_with_the_peak():
    drawn = events_html(np.array([0, 0, 0, 1]), 0.9)
    assert re.findall(r'width="([\d.]+)" height', drawn) == ["225.0", "75.0"]
    assert 'x1="270.0"' in drawn and "the best frame lies in event 2" in drawn
    assert "neither the video file nor its features" in events_html(None, 0.5)


# ---------------------------------------------------------------- cards

def test_a_card_says_title_score_moment_and_escapes():
    card = Card(make_hit(title='<script>"x"</script>', score=0.1234), 3, "<svg/>", False, [], "<i>said</i>")
    drawn = card_html(card, 0., 1.)
    assert "<script>" not in drawn and "<i>" not in drawn
    assert "&lt;script&gt;&quot;x&quot;&lt;/script&gt;" in drawn and "&lt;i&gt;said&lt;/i&gt;" in drawn
    assert ">0.123<" in drawn and ">0:03–0:07<" in drawn and "best at 0:05" in drawn and ">3<" in drawn
    assert "own video" not in drawn and "own video" in card_html(card._replace(own=True), 0., 1.)


def test_a_strip_marks_moment_peak_and_annotation():
    drawn = strip_html(make_hit(), 0., 1., [Moment(2., 4., 10.)])
    assert '<rect class="prvr-moment" x="90.0" y="0" width="120.0"' in drawn and 'x1="150.0"' in drawn
    assert '<rect class="prvr-truth" x="60.0" y="46" width="60.0"' in drawn
    line = re.search(r'<polyline points="([^"]*)"', drawn)[1].split()
    assert line == ["0.0,42.0", "50.0,42.0", "150.0,4.0", "250.0,42.0", "300.0,42.0"] # the highest relevance on top


def test_a_constant_curve_and_an_unknown_length_can_be_drawn():
    hit = make_hit(curve=(0.5,) * 4, duration=None)
    assert "nan" not in strip_html(hit, 0.5, 0.5)
    assert peak_text(hit) == "at 50 %" and ">30–70 %<" in card_html(Card(hit, 1, "", False, [], None), 0., 1.)


def test_what_is_said_at_the_best_frame():
    annotated = [("before", Moment(0., 5., 10.)), ("there", Moment(5., 6., 10.))]
    assert said_there(make_hit(), annotated) == "there"
    assert said_there(make_hit(peak=0.7), annotated) is None


# ---------------------------------------------------------------- ranks

def test_ranks_are_places_in_the_whole_list(searchers):
    for name, searcher in searchers.items():
        query = searcher.embed(["a man opens the fridge"])
        _, order = top_k(searcher.index, query, 99, 0.3)
        ranks = [rank_of(searcher.index, query, 0.3, searcher.index.entries[i].id) for i in order[0]]
        assert ranks == list(range(1, len(searcher.index) + 1)), name


def test_of_equal_scores_the_first_indexed_is_better(searchers):
    index = searchers["baseline"].index
    query = torch.zeros(1, 16)
    assert [rank_of(index, query, 0.4, entry.id) for entry in index.entries] == list(range(1, len(index) + 1))


def test_the_captions_own_video_is_marked_with_its_annotation(searchers):
    sentence, video = a_caption(searchers)
    panel = SearchPanel(searchers, k=14)
    for name, found in panel.ask(f"  {sentence.upper()}. ").items():
        marked = [card for card in found.cards if card.own]
        assert [card.hit.id for card in marked] == [video] and marked[0].truth
        assert found.ranks == {video: marked[0].place}
        assert f"{name} {marked[0].place}" in status(panel)
    assert len(with_class(panel.widget, "prvr-mine")) == 3
    assert not any(card.own for card in panel.ask("something else")["baseline"].cards)
    assert "rank" not in status(panel)


# ---------------------------------------------------------------- the panel

def test_cards_show_what_search_finds(panel, searchers):
    answers = panel.ask("a man opens the fridge")
    columns = with_class(panel.widget, "prvr-column")
    assert [re.search('prvr-method">([^<]*)', texts(column))[1] for column in columns] == list(searchers)
    for column, (name, searcher) in zip(columns, searchers.items()):
        hits, = searcher.search(["a man opens the fridge"], 4)
        assert [hit.id for hit in answers[name].hits] == [hit.id for hit in hits]
        assert re.findall('prvr-score" title="fused cosine">([^<]*)', texts(column)) == [f"{hit.score:.3f}" for hit in hits]
        assert re.findall('class="prvr-title" title="([^"]*)', texts(column)) == [hit.title for hit in hits]
        assert len(with_class(column, "prvr-card")) == 4
    assert not with_class(panel.widget, "prvr-play") # there are no files
    assert "frames only" in texts(columns[2]) and "0.40 · clips + 0.60 · frames" in texts(columns[0])


def test_every_control_can_be_found(panel):
    for name in "query", "search", "history", "weight", "k", "status", "columns": assert len(with_class(panel.widget, f"prvr-{name}")) == 1, name
    assert "prvr-panel" in panel.widget._dom_classes and len(with_class(panel.widget, "prvr-show")) == 3
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def classes(widget):
    return {name for child in getattr(widget, "children", ()) for name in {*child._dom_classes, *classes(child)}}


def test_what_has_no_meaning_is_not_shown(searchers):
    frames_only = SearchPanel({"zero-shot CLIP": searchers["zero-shot CLIP"]}, k=2)
    assert "prvr-weight" in classes(SearchPanel(searchers).widget) and "prvr-weight" not in classes(frames_only.widget)  # no clips, nothing to weigh
    frames_only.ask("something that no caption says")
    assert "annotated moment" not in frames_only.legend.value and "its best frame" in frames_only.legend.value
    frames_only.ask(frames_only.ideas[0])
    marked = any(card.truth for card in frames_only.answers["zero-shot CLIP"].cards)
    assert ("annotated moment" in frames_only.legend.value) == marked


def test_the_weight_ranks_again_without_encoding_again(panel, searchers, monkeypatch):
    panel.ask("a man opens the fridge")
    for searcher in searchers.values(): monkeypatch.setattr(searcher, "embed", None)
    orders = []
    for weight in 0., 1.:
        panel.weight.value = weight
        for name in "full method", "baseline":
            hits, = search(searchers[name].index, panel.queries[name][1], 4, weight)
            assert [hit.id for hit in panel.answers[name].hits] == [hit.id for hit in hits]
            assert panel.answers[name].weight == weight
        assert panel.answers["zero-shot CLIP"].weight == 0.
        orders.append([hit.id for hit in panel.answers["full method"].hits])
    assert orders[0] != orders[1] and panel.history == ["a man opens the fridge"]


def test_number_of_results_and_methods(panel):
    panel.query.value = "a man opens the fridge"
    panel.k.value = 2
    panel.shown["baseline"].value = False
    assert {name: len(found.cards) for name, found in panel.answers.items()} == {"full method": 2, "zero-shot CLIP": 2}
    for name in "full method", "zero-shot CLIP": panel.shown[name].value = False
    assert status(panel) == "no method is ticked; tick at least one"


def test_history_is_short_unique_and_searches_again(panel, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    for query in "one", "two", "one", "three": panel.query.value = query
    assert panel.history == ["three", "one"] and panel.earlier.value == ""
    panel.earlier.value = "one"
    assert panel.asked == panel.query.value == "one" and panel.history == ["one", "three"]
    panel.button.click()
    assert panel.history == ["one", "three"]


def test_a_question_is_answered_once(panel, searchers, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "answer", lambda *args: (calls.append(1), answer(*args))[1])
    panel.ask("  two   words ")
    assert len(calls) == 3 and panel.query.value == "two words"
    panel.query.value = "another query"
    assert len(calls) == 6


def test_old_cards_are_forgotten(panel):
    panel.ask("one")
    old = with_class(panel.widget, "prvr-card")
    panel.ask("two")
    assert all(card.comm is None for card in old) and all(card.comm is not None for card in with_class(panel.widget, "prvr-card"))


def test_examples_search(panel):
    examples = with_class(panel.widget, "prvr-example")
    assert examples and not with_class(panel.widget, "prvr-card")
    examples[0].click()
    assert panel.asked == examples[0].description and with_class(panel.widget, "prvr-card") and not with_class(panel.widget, "prvr-example")


@pytest.mark.parametrize("query, message", [("", "the query is empty"), (" \n ", "the query is empty"), ("x" * 501, "501 characters")])
def test_a_query_that_cannot_be_answered(panel, query, message):
    before = panel.ask("a man opens the fridge")
    with pytest.raises(UserError, match=message): panel.ask(query)
    panel.respond(query)
    assert message in status(panel) and "\n" not in status(panel) and panel.answers is before
    assert check_query(" a  b ") == "a b"


def test_an_unexpected_error_is_a_sentence(panel, searchers, monkeypatch):
    monkeypatch.setattr(searchers["baseline"], "embed", lambda sentences: 1 / 0)
    panel.respond("a man")
    assert status(panel) == "the search failed: division by zero"
    monkeypatch.undo()
    panel.respond("a man")
    assert status(panel) == "“a man”"


def test_a_query_is_shown_not_run(panel):
    panel.ask("<img src=x onerror=alert(1)>")
    assert "<img src=x" not in panel.status.value + panel.html()


def test_stored_answers_have_every_card(panel):
    panel.ask("a man opens the fridge")
    stored = panel.html()
    for found in panel.answers.values():
        for hit in found.hits: assert hit.title in stored
    assert stored.count('class="prvr-card') == 12 and "<script" not in stored


def test_no_index_no_panel():
    with pytest.raises(UserError, match="at least one index"): SearchPanel({})


def test_without_ipywidgets_a_sentence(searchers, monkeypatch):
    monkeypatch.setattr(module, "widgets", None)
    with pytest.raises(UserError, match="ipywidgets"): SearchPanel(searchers)


# ---------------------------------------------------------------- own videos

def test_cards_of_own_videos_have_pictures_and_play(own_panel):
    found, = own_panel.ask(SENTENCE).values()
    assert all(card.picture.startswith("<img") and "base64," in card.picture for card in found.cards)
    assert [card.hit.title for card in found.cards if card.own] == ["grey.mp4"]
    assert [m[:2] for card in found.cards for m in card.truth] == [(2., 6.)]
    shown = texts(own_panel.widget)
    assert "a &lt;b&gt; &amp; &quot;c&quot;.webm" in shown and "a <b>" not in re.sub(r"Play from.*|value=.*", "", shown.replace(SENTENCE, ""))
    assert len(with_class(own_panel.widget, "prvr-play")) == 2


def test_play_shows_a_clip_that_starts_at_the_moment(own_panel, tmp_path):
    own_panel.ask(SENTENCE)
    for box, card in zip(with_class(own_panel.widget, "prvr-player"), own_panel.answers["mine"].cards):
        box.children[0].click()
        box.children[0].click() # again: still one video
        button, video = box.children
        clip = tmp_path / "clip.mp4"
        clip.write_bytes(video.value)
        top = 200 if card.hit.title == "grey.mp4" else 100
        image, _ = next(video_images(clip, 10., {}))
        assert np.asarray(image).mean() == pytest.approx(np.floor(card.hit.seconds[0] * 10 + 1e-6) / 100 * top, abs=4)


def test_a_damaged_file_is_said_and_hides_nothing(own, tmp_path):
    panel = SearchPanel(open_searchers({"mine": own / "index"}), k=2)
    path = own / "videos" / "grey.mp4"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"no video")
        cards = panel.ask(SENTENCE)["mine"].cards
        damaged = next(card for card in cards if card.hit.title == "grey.mp4")
        assert damaged.picture.startswith("<svg") and "event" in damaged.picture
        for button in with_class(panel.widget, "prvr-play"): button.click()
        assert "grey.mp4 cannot be played" in status(panel) or len(with_class(panel.widget, "prvr-player")[1].children) == 2
        player(damaged, path, panel.say).children[0].click()
        assert status(panel).startswith("grey.mp4 cannot be played: ") and "\n" not in status(panel)
        path.unlink()
        panel.ask(SENTENCE)
        assert len(with_class(panel.widget, "prvr-play")) == 1
    finally: path.write_bytes(whole)


@pytest.mark.parametrize("name", ["long.mp4", "long.avi", "long.webm"])
def test_a_clip_holds_no_more_than_it_should(tmp_path, name):
    codec = {"mp4": "libx264", "avi": "mpeg4", "webm": "libvpx-vp9"}[name[-4:].strip(".")]
    images = [Image.new("RGB", (1280, 722), (t,) * 3) for t in range(120)]
    path = write_video(tmp_path / name, images, rate=4, codec=codec)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(cut_clip(path, 5.1, seconds=2.))
    with av.open(clip) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frames = list(container.decode(stream))
    assert (frames[0].width, frames[0].height) == fitted(1280, 722) == (480, 270)
    greys = [frame.to_ndarray(format="gray").mean() for frame in frames]
    assert frames[0].time == 0 and greys[0] == pytest.approx(20, abs=3) and greys[-1] == pytest.approx(28, abs=3)
    assert all(late - early > 0.03 for early, late in pairwise(frame.time for frame in frames)) and frames[-1].time < 2
    assert clip.stat().st_size < 100_000


def test_a_clip_after_the_end_is_the_last_picture(tmp_path):
    path = write_video(tmp_path / "short.mp4", [Image.new("RGB", (64, 48), (10 * t,) * 3) for t in range(20)], rate=10)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(cut_clip(path, 99.))
    with av.open(clip) as container: greys = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert greys == [pytest.approx(190, abs=4)]


def test_a_turned_video_plays_upright(tmp_path):
    path = write_video(tmp_path / "turned.mp4", [Image.new("RGB", (96, 64), "red")] * 10, rate=10, rotation=90)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(cut_clip(path, 0.))
    with av.open(clip) as container: assert (container.streams.video[0].width, container.streams.video[0].height) == (64, 96)


def test_a_size_is_even_and_never_larger():
    for width, height in (1920, 1080), (101, 57), (1, 999), (480, 480), (3000, 2):
        fit = fitted(width, height)
        assert all(n % 2 == 0 and n > 0 for n in fit) and max(fit) <= 480


# ---------------------------------------------------------------- collections without files

def test_what_is_gone_is_not_shown(searchers, folder):
    toy = Collection(folder / "data", "toy")
    video = searchers["baseline"].index.entries[0].id
    assert toy.file(video) is None and toy.events(video) is toy.events(video)
    features = corpus_paths(folder / "data", "toy").video
    aside = features.rename(features.with_suffix(".aside"))
    try: assert Collection(folder / "data", "toy").events(video) is None
    finally: aside.rename(features)
    assert Collection(folder / "nothing", "toy").captions == {} and Collection(folder / "nothing", "toy").moments == {}


# ---------------------------------------------------------------- demonstration and page

def test_a_second_demonstration_changes_nothing(folder, searchers):
    state = lambda: {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    before = state()
    assert list(demo_searchers(folder)) == list(searchers) == ["full method", "baseline", "zero-shot CLIP"]
    assert state() == before


def test_a_demonstration_goes_on_where_it_was_killed(quick, tmp_path, monkeypatch):
    def killed(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_toy", killed)
        with pytest.raises(KeyboardInterrupt): demo_indexes(tmp_path / "demo")
    with monkeypatch.context() as patch:
        patch.setattr(demo, "build_index", killed)
        with pytest.raises(KeyboardInterrupt): demo_indexes(tmp_path / "demo")
    trained = (tmp_path / "demo/full/best.safetensors").stat().st_mtime_ns
    indexes = demo_indexes(tmp_path / "demo")
    assert all((index / "index.json").exists() for index in indexes.values())
    assert (tmp_path / "demo/full/best.safetensors").stat().st_mtime_ns == trained
    monkeypatch.setattr(demo, "N_VAL", 10) # other settings: made again
    assert len(open_searchers(demo_indexes(tmp_path / "demo"))["baseline"].index) == 10


def test_a_folder_with_something_else_is_refused(quick, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a demo"): demo_searchers(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_the_page_shows_the_panel_or_a_sentence(own, tmp_path):
    shown = page({"mine": own / "index"})
    assert with_class(shown, "prvr-panel") and "toy videos" not in texts(shown)
    assert "toy videos" in texts(page({"mine": own / "index"}, demo=True))
    missing, = with_class(page({"mine": tmp_path / "<gone>"}), "prvr-status")
    assert "holds no finished index" in missing.value and "&lt;gone&gt;" in missing.value


def test_the_pages_notebook_runs(own, tmp_path):
    import nbformat
    path = write_page(tmp_path / "search.ipynb", {'a "quoted" name': own / "index"}, False)
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    space = {}
    exec(notebook.cells[0].source.replace("\npage(", "\nshown = page("), space)
    assert 'a "quoted" name' not in texts(space["shown"]) and with_class(space["shown"], "prvr-panel")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_command_serves_what_it_prints(folder, searchers, own, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(cli, "serve", lambda path, port, token: served.append((json.loads(path.read_text())["cells"][0]["source"], port, token)))
    port = free_port()
    assert app_command(["--folder", str(folder), "--port", str(port)]) == 0
    source, at, token = served.pop()
    assert f"http://127.0.0.1:{port}/?token={token} " in capsys.readouterr().out and at == port and len(token) > 20
    assert source.endswith("True)") and str(folder / "full/index") in source
    assert app_command(["--index", str(own / "index"), "--index", str(folder / "zero-shot/index"), "--port", str(port)]) == 0
    assert served[0][2] != token and served[0][0].endswith("False)") and "zero-shot" in served[0][0]
    assert "demonstration" not in capsys.readouterr().out


def test_the_command_refuses_in_a_sentence(tmp_path, own, monkeypatch, capsys):
    monkeypatch.setattr(cli, "serve", lambda *args: pytest.fail("served"))
    said = lambda *argv: (app_command(list(argv)), capsys.readouterr().err)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, message = said("--port", str(taken.getsockname()[1]), "--index", str(own / "index"))
        assert status == 1 and "choose another --port" in message and message.count("\n") == 1
    assert said("--port", "99999", "--index", str(own / "index"))[0] == 1
    status, message = said("--port", str(free_port()), "--index", str(tmp_path / "gone"))
    assert status == 1 and "holds no finished index" in message
    with pytest.raises(SystemExit): app_command(["--nonsense"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "voila" else True)
    status, message = said("--index", str(own / "index"))
    assert status == 1 and "needs voila" in message


def test_names_of_indexes():
    names = index_names([Path("runs/a/index"), Path("runs/b/index"), Path("zero"), Path("x/a")])
    assert names == {"runs/a/index": Path("runs/a/index"), "b": Path("runs/b/index"), "zero": Path("zero"), "x/a": Path("x/a")}
