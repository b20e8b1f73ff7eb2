"""Engines propose, one rescoring decides: answers are exact, and damage is noticed."""
import json
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.files import UserError
from prvr_nb.videos import search as search_module
from prvr_nb.videos.engines import ENGINES, FaissEngine, Tokens, open_engine
from prvr_nb.videos.index import FORMAT, Entry, VideoIndex, digest, write_index
from prvr_nb.videos.search import score_all, search, top_k, upper_bounds


def ask(n, d=24, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def unit(rng, n, d=24):
    x = rng.standard_normal((n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-9)).astype(np.float16)


def some_videos(seed, n=60):
    "Videos of various lengths; some are copies, some share tokens, so that scores tie."
    rng = np.random.default_rng(seed)
    videos = [Tokens(unit(rng, int(rng.integers(3, 12))), unit(rng, 3)) for _ in range(n)]
    for i in range(0, n, 7):
        videos[(5 * i + 3) % n] = videos[i]
    return [v._replace(frames=np.concatenate([v.frames[:2], videos[0].frames[:1]])) if i % 11 == 5 else v
            for i, v in enumerate(videos)]


def random_index(folder, videos, engine="faiss"):
    engine = ENGINES[engine](folder)
    folder.mkdir()
    engine.add(videos)
    about = {"format": FORMAT, "kind": "model", "fingerprint": "", "clip_score_weight": 0.4, "checkpoint": None,
             "config": {}, "text": None, "sources": [{"root": ".", "dataset": "random"}]}
    entries = [Entry(f"v{i}", f"v{i}", None, None, len(v.frames), 0, [len(v.frames) - 2, 1, 1])
               for i, v in enumerate(videos)]
    write_index(folder, about, entries, engine)
    return VideoIndex(folder)


def exhaustive(videos, query, weight):
    "All scores in float64, and the order that they give."
    best = [[(x.astype(np.float64) @ query).max() for x in video] for video in videos]
    scores = np.array([(1 - weight) * frame + weight * clip for frame, clip in best])
    return scores, np.argsort(-scores.round(6), kind="stable")


@pytest.mark.parametrize("first", [1, 4, 1024])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_equals_looking_at_every_video(tmp_path, monkeypatch, seed, first):
    monkeypatch.setattr(search_module, "FIRST_TOKENS", first)
    videos = some_videos(seed)
    index = random_index(tmp_path / "index", videos)
    for weight in (0., 0.4, 1., np.random.default_rng(seed).random()):
        for query in unit(np.random.default_rng(seed + 9), 4).astype(np.float32):
            scores, order = exhaustive(videos, query, weight)
            assert_close(score_all(index, query, weight), scores, atol=2e-6, rtol=0, check_dtype=False)
            for k in (1, 3, 20, 999):
                found = top_k(index, query, k, weight)
                assert list(found) == order[:k].tolist() # of equal scores the first
                assert [score for score, _ in found.values()] == score_all(index, query, weight)[order[:k]].tolist()


def test_bounds_hold_and_the_certificate_needs_them(tmp_path):
    videos = some_videos(5)
    index = random_index(tmp_path / "index", videos)
    for query in unit(np.random.default_rng(1), 5).astype(np.float32):
        scores = score_all(index, query, 0.4)
        for n_tokens in (1, 2, 8, 64, 500, 9999):
            bounds, unseen = upper_bounds(index, query, n_tokens, 0.4)
            assert (bounds >= scores).all() and (bounds >= unseen).all()
        assert unseen == -np.inf # everything was seen
        assert_close(bounds, scores, atol=1e-5, rtol=0)


def test_the_best_of_both_is_first_in_neither(tmp_path, monkeypatch):
    "Fifty videos with a better frame and fifty with a better clip than the one that is best by the sum."
    def rows(*cosines):
        return np.array([[c, (1 - c * c)**0.5] for c in cosines], np.float16)
    videos = [Tokens(rows(0.9, 0, 0), rows(0, 0, 0))] * 50 + [Tokens(rows(0, 0, 0), rows(0.9, 0, 0))] * 50
    videos.insert(70, Tokens(rows(0.8, 0, 0), rows(0.8, 0, 0)))
    index, asked = random_index(tmp_path / "index", videos), []
    monkeypatch.setattr(search_module, "FIRST_TOKENS", 4)
    candidates = index.engine.candidates
    monkeypatch.setattr(index.engine, "candidates", lambda *args: asked.append(args[2]) or candidates(*args))
    assert list(top_k(index, np.array([1, 0], np.float32), 1, 0.5)) == [70]
    assert asked == [4, 4, 8, 8, 16, 16, 32, 32, 64, 64] # the 51st token of each branch is the one


def test_equal_videos_have_equal_scores(tmp_path):
    videos = some_videos(0)
    index = random_index(tmp_path / "index", videos[:9] + videos[:9][::-1] + [videos[0]] * 5)
    for query in unit(np.random.default_rng(2), 20).astype(np.float32):
        scores = score_all(index, query, 0.4)
        assert (scores[:9] == scores[9:18][::-1]).all() and (scores[18:] == scores[0]).all()


def test_one_video_and_none(tmp_path):
    index = random_index(tmp_path / "index", some_videos(0, 1))
    assert [[hit.id for hit in hits] for hits in search(index, ask(2, 24), 5)] == [["v0"], ["v0"]]
    index.remove(["v0"])
    assert len(index) == index.n_bytes == 0 and search(index, ask(2, 24)) == [[], []]


@pytest.mark.parametrize("name", ENGINES)
def test_what_an_engine_promises(tmp_path, name):
    videos, kept, engine = some_videos(3), [], ENGINES[name](tmp_path)
    query = unit(np.random.default_rng(4), 1)[0].astype(np.float32)
    for gone, new in (set(), videos[:20]), (set(), videos[20:45]), ({0, 1, 30, 44}, []), ({5}, videos[45:]):
        if gone:
            engine.remove(gone)
        engine.add(new)
        engine.close()
        kept = [v for i, v in enumerate(kept) if i not in gone] + new
        assert len(list(tmp_path.iterdir())) == 1 # what a change replaces is gone
        opened = open_engine(tmp_path, json.loads(json.dumps(engine.state)))
        assert opened.n_bytes == sum(x.nbytes for v in kept for x in v) and opened.width == 24
        held = list(opened.vectors(range(len(kept))))
        assert all(np.array_equal(x, y) for a, b in zip(held, kept, strict=True) for x, y in zip(a, b, strict=True))
        for branch in "frames", "clips":
            own = [(getattr(v, branch).astype(np.float32) @ query).round(5) for v in kept]
            scores, owners = opened.candidates(branch, query, 40)
            assert (np.diff(scores) <= 0).all() and len(scores) == len(owners) == 40
            assert all(np.abs(own[i] - score).min() < 2e-5 for score, i in zip(scores, owners, strict=True))
            nearest = np.sort(np.concatenate(own))[::-1][:40]
            found = np.isclose(nearest[:, None], scores, atol=2e-5).any(1).mean()
            assert found == 1 if name == "faiss" else found > 0.9 # a graph may miss some


def test_an_answer_does_not_depend_on_the_engine(tmp_path):
    videos = some_videos(1, 300)
    exact, graph = (random_index(tmp_path / name, videos, name) for name in ENGINES)
    hits = [(a, b) for exact_hits, graph_hits in zip(*(search(x, ask(20, 24), 5) for x in (exact, graph)), strict=True)
            for a in exact_hits for b in graph_hits if a.id == b.id]
    assert len(hits) > 80 # of a hundred: a graph may miss some, above all copies
    assert all(a.score == b.score and torch.equal(a.curve, b.curve) and a.start == b.start for a, b in hits)


def test_vectors_of_another_width_are_refused(tmp_path):
    engine = FaissEngine(tmp_path)
    engine.add(some_videos(0, 3))
    with pytest.raises(UserError, match="different spaces"):
        engine.add([Tokens(np.zeros((2, 16), np.float16), np.zeros((1, 16), np.float16))])
    engine.close()
    assert len(engine) == 3 and len(list(tmp_path.iterdir())) == 1


def damaged(content, rng):
    "A file as failing disks and killed copies leave it."
    yield from (b"", content[:len(content) // 2], content[:-1], content + b"x", bytes(len(content)))
    for place in rng.sample(range(len(content)), 20):
        yield content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1:]


@pytest.mark.parametrize("name", ENGINES)
def test_damage_is_noticed(tmp_path, name):
    index, rng = random_index(tmp_path / "index", some_videos(0, 9), name), random.Random(0)
    files = [path for path in index.folder.rglob("*") if path.is_file()]
    assert len(files) == 1 + len(ENGINES[name].files)
    for path in files:
        content = path.read_bytes()
        for found in damaged(content, rng):
            path.write_bytes(found)
            with pytest.raises(UserError, match=f"{path.name}.* build the index again"):
                VideoIndex(index.folder)
        path.unlink()
        with pytest.raises(UserError, match="build"):
            VideoIndex(index.folder)
        os.mkfifo(path) # whoever opens it waits
        with pytest.raises(UserError, match="build"):
            VideoIndex(index.folder)
        path.unlink()
        path.write_bytes(content)
    assert len(VideoIndex(index.folder)) == 9


@pytest.mark.parametrize("change", [{"videos": [1]}, {"sources": "x"}, {"engine": {"name": "faiss"}}, {"text": 1},
                                    {"clip_score_weight": True}, {"videos": [{"id": 1}]}, {"engine": {}}])
def test_manifests_of_another_shape_are_refused(tmp_path, change):
    index = random_index(tmp_path / "index", some_videos(0, 3))
    about = {**index.about, **change}
    (index.folder / "manifest.json").write_text(json.dumps({**about, "checksum": digest(about)}))
    with pytest.raises(UserError, match="damaged"):
        VideoIndex(index.folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b'{"format": "prvr_nb index 3"}', b'"a"'])
def test_other_manifests_are_refused(tmp_path, content):
    index = random_index(tmp_path / "index", some_videos(0, 3))
    (index.folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match="manifest.json is not"):
        VideoIndex(index.folder)


def test_names_of_videos(tmp_path):
    index = random_index(tmp_path / "index", some_videos(0, 4))
    titles = ["a/red.mp4", "b/red.mp4", "red.mp4", "a/blue film.mkv"]
    index.entries = [entry._replace(title=title) for entry, title in zip(index.entries, titles, strict=True)]
    write_index(index.folder, index.about, index.entries, index.engine)
    index.reopen()
    assert [index.position(name) for name in ("v1", "a/red.mp4", "red.mp4", "blue film.mkv")] == [1, 0, 2, 3]
    index.remove(["red.mp4"])
    with pytest.raises(UserError, match="2 videos red.mp4; name one of a/red.mp4, b/red.mp4"):
        index.remove(["v0", "red.mp4"])
    with pytest.raises(UserError, match="no video nobody"):
        index.remove(["nobody"])
    index.remove(["blue film.mkv", "v0"])
    assert [entry.title for entry in VideoIndex(index.folder).entries] == ["b/red.mp4"]
