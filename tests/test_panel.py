"""The search panel without a browser: cards, ranks, events, clips, mistakes."""
import html
import re
from itertools import pairwise

import av
import numpy as np
import pytest
import torch
from makers import write_tiny_clip, write_video
from PIL import Image

from prvr_nb import demo
from prvr_nb.config import published_config
from prvr_nb.data.corpus import Moment, corpus_paths
from prvr_nb.demo import demo_indexes
from prvr_nb.files import UserError
from prvr_nb.videos import panel as module
from prvr_nb.videos.answers import DatasetDetails, Method, find_events, rank_of
from prvr_nb.videos.cards import Card, card_html, events_html, peak_text, strip_html, weight_text
from prvr_nb.videos.embedder import Embedder
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.frames import cut_clip, fitted
from prvr_nb.videos.index import build_index
from prvr_nb.videos.panel import SearchPanel, check_query, player
from prvr_nb.videos.search import Hit, open_searchers, search, top_k

SENTENCE, FRIDGE = "a <b>red</b> ball & a \"boat\"", "a man opens the fridge"
TINY = dict(epochs=1, hidden_size=16, heads=2, dropout=0., merge_schedule=(16, 10, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A demonstration of a moment: 14 videos."
    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"QUICK_RUNS": TINY, "N_TRAIN": 12, "N_VAL": 14}.items():
            patch.setattr(demo, name, value)
        demo_indexes(folder)
    return folder


@pytest.fixture(scope="module")
def searchers(folder):
    return open_searchers({title: folder / name / "index" for title, name in demo.COLUMNS.items()})


@pytest.fixture
def panel(searchers):
    return SearchPanel(searchers, k=4)


def greys(top, n=100, size=(96, 64)): # brightness tells the time
    return [Image.new("RGB", size, (round(top * t / n),) * 3) for t in range(n)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "Two videos of one's own with features of a small CLIP, and an index."
    root = tmp_path_factory.mktemp("own")
    (root / "videos").mkdir()
    write_video(root / "videos/grey.mp4", greys(200), rate=10)
    write_video(root / "videos/a <b> & \"c\".webm", greys(100), rate=10, codec="libvpx-vp9")
    quoted = SENTENCE.replace('"', '""')
    (root / "captions.csv").write_text(f'video,sentence,start,end\ngrey.mp4,"{quoted}",2,6\n')
    model = str(write_tiny_clip(root / "clip", [SENTENCE]))
    extract_videos(root / "videos", root / "data", "mine", root / "captions.csv", model, quiet=True)
    embedder = Embedder(None, published_config("mine", merge_schedule=(10, 8)))
    build_index(root / "index", embedder, root / "data", "mine", quiet=True)
    return root


@pytest.fixture
def own_panel(own):
    return SearchPanel(open_searchers({"mine": own / "index"}), k=2)


def make_hit(**changes):
    hit = Hit("v", "v.mp4", 0.5, 0.3, 0.7, 0.5, 10., torch.tensor([0., 1., 0.]))
    return hit._replace(**changes)


def texts(widget):
    "Everything that a widget and its children say."
    said = [getattr(widget, name, None) for name in ("value", "description")]
    return "\n".join([text for text in said if isinstance(text, str)]
                     + [texts(child) for child in getattr(widget, "children", ())])


def with_class(widget, name):
    "The widgets of a class, in the order of the page."
    inside = [found for child in getattr(widget, "children", ()) for found in with_class(child, name)]
    return [widget] * (name in getattr(widget, "_dom_classes", ())) + inside


def status(panel):
    return html.unescape(re.sub("<[^>]*>", "", panel.status.value))


def stored_clip(path, data):
    "Frames of a clip, and their brightness."
    path.write_bytes(data)
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    return frames, [frame.to_ndarray(format="gray").mean() for frame in frames]


# ---------------------------------------------------------------- events and cards

def test_events_are_cut_where_the_picture_changes():
    frames = np.repeat(np.eye(4), [5, 3, 7, 2], axis=0)
    assert np.bincount(find_events(frames)).tolist() == [5, 3, 7, 2]
    long = np.bincount(find_events(np.repeat(frames, 100, axis=0)))
    np.testing.assert_allclose(long, 128 * np.array([5, 3, 7, 2]) / 17, atol=0.7) # of 128 tokens
    assert find_events(np.repeat(np.eye(12), 4, axis=0)).max() == 7 # not more than there are colours
    assert find_events(np.zeros((6, 3), np.float16)).tolist() == [0] * 6
    assert find_events(np.ones((1, 3))).tolist() == [0]


def test_events_follow_wards_rule():
    "The rule by its definition: variation around the mean, before and after each possible merge."
    def variation(x):
        return ((x - x.mean(0))**2).sum()

    def by_definition(x, most, share):
        parts = [row[None] for row in x]
        while len(parts) > 1:
            costs = [variation(np.concatenate(two)) - sum(map(variation, two)) for two in pairwise(parts)]
            i = int(np.argmin(costs))
            if costs[i] > share * variation(x) and len(parts) <= most:
                break
            parts[i:i + 2] = [np.concatenate(parts[i:i + 2])]
        return np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    rng = np.random.default_rng(0)
    for share in [0.01, 0.05, 0.3] * 7:
        x = rng.normal(size=(int(rng.integers(2, 30)), 4)) + rng.normal(size=4)
        np.testing.assert_array_equal(find_events(x, 6, share), by_definition(x, 6, share))


def test_events_are_drawn_in_proportion_with_the_peak():
    drawn = events_html(np.array([0, 0, 0, 1]), 0.9)
    assert re.findall(r'width="([\d.]+)" height', drawn) == ["225.0", "75.0"]
    assert 'x1="270.0"' in drawn and "the best frame lies in event 2" in drawn
    assert "neither the video file nor its features" in events_html(None, 0.5)


def test_a_card_says_title_score_moment_and_escapes():
    card = Card(make_hit(title='<script>"x"</script>', score=0.1234), 3, "<svg/>", False, [], "<i>said</i>")
    drawn = card_html(card, 0., 1.)
    assert "<script>" not in drawn and "<i>" not in drawn
    assert "&lt;script&gt;&quot;x&quot;&lt;/script&gt;" in drawn and "&lt;i&gt;said&lt;/i&gt;" in drawn
    assert ">0.123<" in drawn and ">0:03–0:07<" in drawn and "best at 0:05" in drawn and ">3<" in drawn
    assert "60 % best frame, 40 % best clip" in weight_text(0.4) and weight_text(1.).endswith("best clip")
    assert "prvr-own" not in drawn and "prvr-own" in card_html(card._replace(own=True), 0., 1.)


def test_a_strip_marks_moment_peak_and_annotation():
    drawn = strip_html(make_hit(), 0., 1., [Moment(2., 4., 10.)])
    assert '<rect class="prvr-moment" x="90.0" y="0" width="120.0"' in drawn and 'x1="150.0"' in drawn
    assert '<rect class="prvr-truth" x="60.0" y="46" width="60.0"' in drawn
    line = re.search(r'<polyline points="([^"]*)"', drawn)[1].split()
    assert line == ["0.0,42.0", "50.0,42.0", "150.0,4.0", "250.0,42.0", "300.0,42.0"] # the highest relevance on top


def test_a_constant_curve_and_an_unknown_length_can_be_drawn():
    hit = make_hit(curve=torch.full((4,), 0.5), duration=None)
    assert "nan" not in strip_html(hit, 0.5, 0.5)
    assert peak_text(hit) == "at 50 %" and ">30–70 %<" in card_html(Card(hit, 1, "", False, [], None), 0., 1.)


def test_ranks_are_places_in_the_whole_list(searchers):
    for name, searcher in searchers.items():
        index, query = searcher.index, searcher.embed([FRIDGE])
        weight = 0.3 if searcher.embedder.model else 0.
        order = top_k(index, query[0].numpy(), 99, weight)
        ranks = [rank_of(index, query, weight, index.entries[i].id) for i in order]
        assert ranks == list(range(1, len(index) + 1)), name


def test_of_equal_scores_the_first_indexed_is_better(searchers):
    index = searchers["baseline"].index
    ranks = [rank_of(index, torch.zeros(1, 16), 0.4, entry.id) for entry in index.entries]
    assert ranks == list(range(1, len(index) + 1))


def test_the_captions_own_video_is_marked_with_its_annotation(searchers):
    method = Method(searchers["baseline"])
    captions = method.datasets[0].captions.values()
    video, sentence = next(pair for videos in captions for pair in videos.items() if pair[0] in method.index.positions)
    panel = SearchPanel(searchers, k=14)
    for name, found in panel.ask(f"  {sentence.upper()}. ").items():
        marked = [card for card in found.cards if card.own]
        assert [card.hit.id for card in marked] == [video] and marked[0].truth
        assert found.ranks == {video: marked[0].place}
        assert f"{marked[0].place} ({name})" in status(panel)
    assert len(with_class(panel.widget, "prvr-mine")) == 3 and "annotated moment" in panel.legend.value
    assert not any(card.own for card in panel.ask("<img src=x onerror=alert(1)>")["baseline"].cards)
    assert "<img src=x" not in panel.status.value + panel.html() # shown, not run
    assert "number" not in status(panel) and "annotated moment" not in panel.legend.value


# ---------------------------------------------------------------- the panel

def test_cards_show_what_search_finds(panel, searchers):
    answers = panel.ask(FRIDGE)
    columns = with_class(panel.widget, "prvr-column")
    assert [re.search('prvr-method">([^<]*)', texts(column))[1] for column in columns] == list(searchers)
    stored = panel.html()
    for column, (name, searcher) in zip(columns, searchers.items(), strict=True):
        hits, = searcher.search([FRIDGE], 4)
        assert [hit.id for hit in answers[name].hits] == [hit.id for hit in hits]
        assert re.findall('class="prvr-score"[^>]*>([^<]*)', texts(column)) == [f"{hit.score:.3f}" for hit in hits]
        assert re.findall('class="prvr-title" title="([^"]*)', texts(column)) == [hit.title for hit in hits]
        assert len(with_class(column, "prvr-card")) == 4 and all(hit.title in stored for hit in hits)
    assert not with_class(panel.widget, "prvr-play") # there are no files
    assert stored.count('class="prvr-card') == 12 and "<script" not in stored
    assert weight_text(0.) in texts(columns[2]) and weight_text(0.4) in texts(columns[0])


def test_every_control_can_be_found(panel, searchers):
    for name in "query", "search", "history", "weight", "k", "status", "columns":
        assert len(with_class(panel.widget, f"prvr-{name}")) == 1, name
    assert "prvr-panel" in panel.widget._dom_classes and len(with_class(panel.widget, "prvr-show")) == 3
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()
    teacher = SearchPanel({"zero-shot CLIP": searchers["zero-shot CLIP"]})
    for name in "weight", "show": # no clips, nothing to weigh; one method, nothing to choose
        assert not with_class(teacher.widget, f"prvr-{name}")


def test_the_weight_ranks_again_without_encoding_again(panel, searchers, monkeypatch):
    panel.ask(FRIDGE)
    orders = []
    for searcher in searchers.values():
        monkeypatch.setattr(searcher, "embed", None)
    for weight in 0., 1.:
        panel.weight.value = weight
        for name in "full method", "baseline":
            hits, = search(searchers[name].index, panel.methods[name].query, 4, weight)
            assert [hit.id for hit in panel.answers[name].hits] == [hit.id for hit in hits]
            assert panel.answers[name].weight == weight
        assert panel.answers["zero-shot CLIP"].weight == 0.
        orders.append([hit.id for hit in panel.answers["full method"].hits])
    assert orders[0] != orders[1] and panel.history == [FRIDGE]


def test_number_of_results_and_methods(panel):
    panel.query.value = FRIDGE
    panel.k.value = 2
    panel.shown["baseline"].value = False
    assert {name: len(found.cards) for name, found in panel.answers.items()} == {"full method": 2, "zero-shot CLIP": 2}
    for name in "full method", "zero-shot CLIP":
        panel.shown[name].value = False
    assert status(panel) == "no method is ticked; tick at least one"


def test_history_is_short_unique_and_searches_again(panel, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 2)
    for query in "one", "two", "one", "three":
        panel.query.value = query
    assert panel.history == ["three", "one"] and panel.earlier.value == ""
    panel.earlier.value = "one"
    assert panel.asked == panel.query.value == "one" and panel.history == ["one", "three"]
    panel.button.click()
    assert panel.history == ["one", "three"]


def test_a_question_is_answered_once_and_old_cards_are_forgotten(panel, monkeypatch):
    calls, answer = [], Method.answer
    monkeypatch.setattr(Method, "answer", lambda *args: (calls.append(1), answer(*args))[1])
    panel.ask("  two   words ")
    assert len(calls) == 3 and panel.query.value == "two words"
    old = with_class(panel.widget, "prvr-card")
    panel.query.value = "another query"
    assert len(calls) == 6 and all(card.comm is None for card in old)
    assert all(card.comm is not None for card in with_class(panel.widget, "prvr-card"))


def test_examples_search(panel):
    examples = with_class(panel.widget, "prvr-example")
    assert examples and not with_class(panel.widget, "prvr-card")
    examples[0].click()
    assert panel.asked == examples[0].description
    assert with_class(panel.widget, "prvr-card") and not with_class(panel.widget, "prvr-example")


@pytest.mark.parametrize("query, message", [(" \n ", "the query is empty"), ("x" * 501, "501 characters")])
def test_a_query_that_cannot_be_answered(panel, query, message):
    before = panel.ask(FRIDGE)
    with pytest.raises(UserError, match=message):
        panel.ask(query)
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


def test_without_an_index_or_ipywidgets_a_sentence(searchers, monkeypatch):
    with pytest.raises(UserError, match="at least one index"):
        SearchPanel({})
    monkeypatch.setattr(module, "widgets", None)
    with pytest.raises(UserError, match="ipywidgets"):
        SearchPanel(searchers)


# ---------------------------------------------------------------- own videos

def test_cards_of_own_videos_have_pictures_and_play(own_panel, tmp_path):
    found, = own_panel.ask(SENTENCE).values()
    assert all(card.picture.startswith("<img") and "base64," in card.picture for card in found.cards)
    assert [card.hit.title for card in found.cards if card.own] == ["grey.mp4"]
    assert [m[:2] for card in found.cards for m in card.truth] == [(2., 6.)]
    shown = texts(own_panel.columns)
    assert "a &lt;b&gt; &amp; &quot;c&quot;.webm" in shown and "a <b>" not in shown
    for box, card in zip(with_class(own_panel.widget, "prvr-player"), found.cards, strict=True):
        box.children[0].click()
        box.children[0].click() # again: still one video
        button, video = box.children
        top = 200 if card.hit.title == "grey.mp4" else 100
        first = stored_clip(tmp_path / "clip.mp4", video.value)[1][0]
        assert first == pytest.approx(np.floor(card.hit.seconds[0] * 10 + 1e-6) / 100 * top, abs=4)


def test_a_damaged_file_is_said_and_hides_nothing(own, own_panel):
    path = own / "videos/grey.mp4"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"no video")
        damaged, = (card for card in own_panel.ask(SENTENCE)["mine"].cards if card.hit.title == "grey.mp4")
        assert damaged.picture.startswith("<svg") and "event" in damaged.picture
        player(damaged, path, own_panel.say).children[0].click()
        assert status(own_panel).startswith("grey.mp4 cannot be played: ") and "\n" not in status(own_panel)
        path.unlink()
        own_panel.ask(SENTENCE)
        assert len(with_class(own_panel.widget, "prvr-play")) == 1
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name, codec", [("mp4", "libx264"), ("avi", "mpeg4")])
def test_a_clip_holds_no_more_than_it_should(tmp_path, name, codec):
    path = write_video(tmp_path / f"long.{name}", greys(120, 120, (640, 362)), rate=4, codec=codec)
    frames, shown = stored_clip(tmp_path / "clip.mp4", cut_clip(path, 5.1, seconds=2.))
    assert (frames[0].width, frames[0].height) == fitted(640, 362) == (480, 272)
    assert frames[0].time == 0 and shown[0] == pytest.approx(20, abs=3) and shown[-1] == pytest.approx(28, abs=3)
    assert all(b - a > 0.03 for a, b in pairwise(frame.time for frame in frames)) and frames[-1].time < 2
    assert (tmp_path / "clip.mp4").stat().st_size < 100_000


def test_a_clip_after_the_end_is_the_last_picture_upright(tmp_path):
    path = write_video(tmp_path / "turned.mp4", greys(200, 20), rate=10, rotation=90)
    frames, shown = stored_clip(tmp_path / "clip.mp4", cut_clip(path, 99.))
    assert shown == [pytest.approx(190, abs=4)] and (frames[0].width, frames[0].height) == (64, 96)


def test_what_is_gone_is_not_shown(searchers, folder, tmp_path):
    toy, nothing = DatasetDetails(folder / "data", "toy"), DatasetDetails(tmp_path, "toy")
    video = searchers["baseline"].index.entries[0].id
    assert toy.file(video) is None and toy.events(video) is toy.events(video)
    features = corpus_paths(folder / "data", "toy").video
    aside = features.rename(features.with_suffix(".aside"))
    try:
        assert DatasetDetails(folder / "data", "toy").events(video) is None
    finally:
        aside.rename(features)
    assert nothing.captions == {} and nothing.moments == {}


def test_what_is_said_at_the_best_frame(tmp_path):
    dataset = DatasetDetails(tmp_path, "mine")
    dataset.moments = {"v": [("before", Moment(0., 5., 10.)), ("there", Moment(5., 6., 10.))]}
    assert dataset.caption_at(make_hit()) == "there" and dataset.caption_at(make_hit(peak=0.7)) is None
