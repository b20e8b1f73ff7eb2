"""Search: moments, engines and exactness, what an index survives and refuses, text encoders, the command."""
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from filelock import FileLock
from makers import write_tiny_clip, write_video
from PIL import Image
from torch.testing import assert_close

from prvr_nb.cli import search_command
from prvr_nb.config import published_config
from prvr_nb.data.corpus import corpus_paths, read_moments
from prvr_nb.data.prepared import prepare
from prvr_nb.data.toy import ToyWorld, sentence_features, toy_seed, write_toy
from prvr_nb.evaluation.embeddings import embed
from prvr_nb.files import UserError
from prvr_nb.method.model import PRVRModel
from prvr_nb.method.retrieval import fuse, max_scores
from prvr_nb.speed import search_latency
from prvr_nb.training.checkpoints import save_checkpoint, to_released
from prvr_nb.videos import index as index_module
from prvr_nb.videos.clip import encode_text, load_encoder
from prvr_nb.videos.embedder import Embedder, TextEncoder, check_text, describe_text, open_text
from prvr_nb.videos.features import extract_videos
from prvr_nb.videos.index import VideoIndex, build_index
from prvr_nb.videos.moments import (
    find_moments,
    moment_metrics,
)
from prvr_nb.videos.search import (
    Searcher,
    evaluate_moments,
    moment_text,
    open_searcher,
    score_all,
    search,
)

CONFIG = small_config(merge_schedule=(16, 10, 8))
N_TRAIN, N_VAL = 20, 12 # of the fixture root


def make_model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return PRVRModel(config, 64, 64).eval()


@pytest.fixture(scope="module")
def embedder():
    return Embedder(make_model())


@pytest.fixture
def index(root, embedder, tmp_path):
    return build_index(tmp_path / "index", embedder, root, "toy", "val", quiet=True)


def ask(n=6, d=16, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def answers(index, k=50):
    return [[(hit.id, hit.score, hit.seconds) for hit in hits] for hits in search(index, ask(), k)]


# ---------------------------------------------------------------- scores, hits, moments

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_search_scores_as_the_evaluation_does(root, tmp_path, precision):
    config = replace(CONFIG, precision=precision)
    embedder, (corpus,) = Embedder(make_model(config=config)), prepare(root, config, ("val",), quiet=True)
    index, e = build_index(tmp_path / "index", embedder, root, "toy", "val", quiet=True), embed(embedder.model, corpus)
    assert [entry.id for entry in index.entries] == corpus.split.videos
    assert index.n_bytes == N_VAL * (16 + 8) * 16 * 2
    for i, tokens in enumerate(index.engine.vectors(range(N_VAL))):
        for x, y in zip(tokens, (e.frames[i], e.clips[i]), strict=True):
            assert_close(torch.tensor(x).float(), y, atol=2e-3, rtol=0)
    want = fuse(*(max_scores(e.queries, x) for x in (e.clips, e.frames)))
    found = np.stack([score_all(index, query, 0.4) for query in e.queries.numpy()])
    assert_close(torch.from_numpy(found).float(), want, atol=2e-3, rtol=0)
    best = torch.tensor([corpus.split.videos.index(hits[0].id) for hits in search(index, e.queries, 1)])
    assert (want.amax(1) - want.gather(1, best[:, None])[:, 0]).max() < 4e-3


def test_hits_carry_moment_and_curve(index):
    query, (hits,) = ask(1)[0], search(index, ask(1), 99)
    assert len(hits) == N_VAL and [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    for hit in hits[:3]:
        entry = index.entries[index.position(hit.id)]
        frames, clips = (torch.from_numpy(x.astype(np.float32)) @ query
                         for x in next(index.engine.vectors([index.position(hit.id)])))
        assert_close(hit.curve, fuse(clips.repeat_interleave(torch.tensor(entry.sizes)), frames))
        assert hit.score == pytest.approx(fuse(clips.max(), frames.max()).item(), abs=1e-6)
        assert 0 <= hit.start <= hit.peak <= hit.end <= 1
        assert hit.seconds == pytest.approx([x * entry.duration for x in (hit.start, hit.end, hit.peak)])
        window = find_moments(hit.curve[None], torch.tensor([entry.n_frames]))
        assert (hit.start, hit.end, hit.peak) == tuple(x.item() for x in window)
    wide, narrow = (search(index, ask(1), 1, fraction=f)[0][0] for f in (0, 1))
    assert wide.end - wide.start >= narrow.end - narrow.start and wide.id == narrow.id
    assert moment_text(hit._replace(duration=None)).endswith("%")


def test_zero_shot_equals_cosines_of_the_features(root, tmp_path):
    config = published_config("toy", merge_schedule=(40, 24, 16))
    index = build_index(tmp_path / "index", Embedder(None, config), root, "toy", "val", quiet=True)
    counts = index.engine.state["counts"]
    assert counts["clips"] == [0] * N_VAL and counts["frames"] == [min(e.n_frames, 40) for e in index.entries]
    assert 40 in counts["frames"] and min(counts["frames"]) < 40
    corpus, = prepare(root, config, ("val",), quiet=True)
    sentence = "a chef in red bakes bread"
    eos = torch.from_numpy(sentence_features(ToyWorld(0), sentence)[-1])
    cosines = F.normalize(corpus.videos.frames.float(), dim=-1) @ F.normalize(eos, dim=0) # (V, 40)
    hits, = open_searcher(index.folder).search([sentence], N_VAL)
    assert [hit.id for hit in hits] == [corpus.split.videos[i] for i in cosines.amax(1).argsort(descending=True)]
    for hit in hits: # the same instants, without the tokens that repeat a frame
        i = index.position(hit.id)
        peak = find_moments(cosines[i:i + 1], torch.tensor([index.entries[i].n_frames])).peak.item()
        assert hit.peak == pytest.approx(peak, abs=0.6 / index.entries[i].n_frames)
        assert hit.score == pytest.approx(cosines[i].max().item(), abs=1e-3)


def test_evaluate_moments_agrees_with_the_curves(index, embedder, root):
    corpus, = prepare(root, CONFIG, ("val",), quiet=True)
    e, annotated, video = embed(embedder.model, corpus), read_moments(root, "toy", "val"), corpus.queries.video
    frames = torch.einsum("qd,qld->ql", e.queries, e.frames[video])
    clips = torch.einsum("qd,qld->ql", e.queries, e.clips[video]).gather(1, corpus.videos.frame_to_clip[video])
    truth = [annotated[c.video, c.sentence] for c in corpus.split.captions]
    want = moment_metrics(list(fuse(clips, frames)), torch.tensor([int(t[0].duration) for t in truth]), truth)
    assert evaluate_moments(index, embedder, root, "toy") == pytest.approx(want, abs=3)
    with pytest.raises(UserError, match="no annotated moments"):
        evaluate_moments(index, embedder, root, "toy", "train") # none of its videos is here


# ---------------------------------------------------------------- what an index survives

def test_append_and_remove_equal_a_fresh_index(root, embedder, tmp_path):
    every = build_index(tmp_path / "every", embedder, root, "toy", "all", quiet=True)
    assert len(every) == N_TRAIN + N_VAL
    gone = [entry.id for entry in every.entries[::4]]
    every.remove(gone)
    grown = build_index(tmp_path / "grown", embedder, root, "toy", "train", quiet=True)
    grown.remove([id for id in gone if id in grown.positions])
    assert grown.append(embedder, root, "toy", "val", quiet=True) == N_VAL
    grown.remove([id for id in gone if id in grown.positions])
    assert answers(grown) == answers(every) == answers(VideoIndex(tmp_path / "grown"))
    assert set(grown.positions) == set(every.positions) and not set(gone) & set(grown.positions)


def test_append_adds_only_what_is_missing(index, root, embedder):
    before = index.entries
    assert index.append(embedder, root, "toy", "val", quiet=True) == 0 and index.entries == before
    index.remove([entry.id for entry in before])
    assert len(index) == 0
    assert index.append(embedder, root, "toy", "val", quiet=True) == N_VAL and index.entries == before


def test_a_reader_keeps_its_view_until_it_reopens(index):
    reader, before = VideoIndex(index.folder), answers(index)
    index.remove([entry.id for entry in index.entries[2:]]) # the old files are deleted
    assert answers(reader) == before
    reader.reopen()
    assert len(reader) == 2


def test_a_reader_who_comes_while_files_are_replaced(index, monkeypatch):
    read, seen = index_module.read_manifest, [index.about]
    index.remove([index.entries[0].id])
    monkeypatch.setattr(index_module, "read_manifest", lambda folder: seen.pop() if seen else read(folder))
    assert len(VideoIndex(index.folder)) == N_VAL - 1


KILLED = """
import os, signal, sys
from prvr_nb.training.checkpoints import load_checkpoint
from prvr_nb.videos import embedder, index
videos, count = embedder.Embedder.embed_videos, []
def dying(*args):
    count.append(1)
    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return videos(*args)
embedder.Embedder.embed_videos = dying
made = embedder.Embedder(load_checkpoint(sys.argv[1]))
if sys.argv[4] == "build": index.build_index(sys.argv[2], made, sys.argv[3], "toy", "val", quiet=True)
else: index.VideoIndex(sys.argv[2]).append(made, sys.argv[3], "toy", "train", quiet=True)
"""


def test_a_killed_build_leaves_no_index_and_a_killed_append_the_old_one(root, embedder, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", embedder.model)
    folder = tmp_path / "index"
    def kill(action):
        command = [sys.executable, "-c", KILLED, tmp_path / "best.safetensors", folder, root, action]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == -signal.SIGKILL, done.stderr
    kill("build")
    with pytest.raises(UserError, match="no finished index"):
        VideoIndex(folder)
    index = build_index(folder, embedder, root, "toy", "val", quiet=True)
    before, files = answers(index), set(folder.rglob("*"))
    kill("append")
    assert answers(VideoIndex(folder)) == before and len(set(folder.rglob("*")) - files) >= 2
    assert index.append(embedder, root, "toy", "train", quiet=True) == N_TRAIN
    assert len(list(folder.iterdir())) == 3 # .lock, manifest.json and one folder: what the dead left is gone


def test_a_build_that_finds_broken_features_leaves_nothing(embedder, tmp_path):
    write_toy(tmp_path, 2, 20)
    with h5py.File(corpus_paths(tmp_path, "toy").video, "a") as file:
        for number in 1, 15:
            file[f"toy_val_{number:04d}"][0, 0] = np.nan
    with pytest.raises(UserError, match="2 problems(.|\n)*toy_val_0001 (.|\n)*toy_val_0015"):
        build_index(tmp_path / "index", embedder, tmp_path, "toy", "val", quiet=True)
    assert [path.name for path in (tmp_path / "index").iterdir()] == [".lock"]


def test_strangers_in_the_folder_are_left_alone(root, embedder, tmp_path):
    strangers = "shard-1.safetensors", "shard-2.safetensors.part", "frames.npy", "clips.hnsw", "tokens", "a.part"
    for name in strangers:
        (tmp_path / name).write_text(name)
    index = build_index(tmp_path, embedder, root, "toy", "val", quiet=True)
    index.remove([index.entries[0].id])
    index.append(embedder, root, "toy", "val", quiet=True)
    assert all((tmp_path / name).read_text() == name for name in strangers)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="choose another folder"):
        build_index(tmp_path / "other", embedder, root, "toy", "val", quiet=True)
    assert (tmp_path / "other" / "manifest.json").read_text() == "{}"


def remove_one(folder, number):
    while True:
        try:
            return VideoIndex(folder).remove([f"toy_val_{number:04d}"])
        except UserError as error:
            if "another process" not in str(error):
                raise


def test_writers_wait_for_each_other(index, root, embedder):
    with FileLock(index.folder / ".lock"):
        for work in (lambda: index.remove([index.entries[0].id]),
                     lambda: index.append(embedder, root, "toy", "train", quiet=True),
                     lambda: build_index(index.folder, embedder, root, "toy", quiet=True)):
            with pytest.raises(UserError, match="another process"):
                work()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: remove_one(index.folder, number), range(4)))
    index.reopen()
    assert len(index) == N_VAL - 4


# ---------------------------------------------------------------- what an index refuses

def test_another_checkpoint_is_refused(index, root, embedder):
    text, others = open_text({"toy": 0}), [Embedder(make_model(1)), Embedder(None, CONFIG)]
    for other in (*others, Embedder(make_model(), replace(CONFIG, uniform_clips=True))):
        with pytest.raises(UserError, match="another checkpoint"):
            Searcher(index, other, text)
        with pytest.raises(UserError, match="another checkpoint"):
            index.append(other, root, "toy", "train", quiet=True)
        with pytest.raises(UserError, match="another checkpoint"):
            evaluate_moments(index, other, root, "toy")
    Searcher(index, Embedder(make_model(), replace(CONFIG, clip_score_weight=0.1, epochs=3)), text) # changes nothing


def test_an_index_of_the_old_format_says_how_to_build_anew(tmp_path, root, embedder):
    (tmp_path / "index.json").write_text('{"format": "prvr_nb index 1", "videos": []}')
    (tmp_path / "shard-0.safetensors").write_bytes(b"old")
    with pytest.raises(UserError, match="an index of an older version; build one with prvr_search build --index"):
        VideoIndex(tmp_path)
    assert len(build_index(tmp_path, embedder, root, "toy", "val", quiet=True)) == N_VAL
    assert (tmp_path / "shard-0.safetensors").read_bytes() == b"old"


def test_requests_that_make_no_sense(index, embedder, root):
    searcher = Searcher(index, embedder, open_text({"toy": 0}))
    assert searcher.search([]) == []
    for call, message in [(lambda: searcher.search(["a man", ""]), "query 2 is empty"),
                          (lambda: searcher.search(["a man"], 0), "k is 0"),
                          (lambda: searcher.search(["a man"], clip_score_weight=1.1), "clip weight"),
                          (lambda: searcher.search(["a man"], clip_score_weight=float("nan")), "clip weight"),
                          (lambda: searcher.search(["a man"], fraction=2), "fraction"),
                          (lambda: search(index, ask(1, 17)), "different spaces"),
                          (lambda: build_index(index.folder / "x", embedder, root, engine="x"), "engine")]:
        with pytest.raises(UserError, match=message):
            call()
    odd = searcher.search(["zyx", "...", " ".join(["opens the fridge"] * 99), "日本"], 2)
    assert [len(found) for found in odd] == [2] * 4


def test_features_of_another_width(embedder):
    for embed_some, what in (embedder.embed_videos, "video"), (embedder.embed_queries, "query"):
        with pytest.raises(UserError, match=f"{what} features of width 64, these have 32"):
            embed_some([np.ones((3, 32), np.float32)])


# ---------------------------------------------------------------- text encoders

def test_the_toy_world_is_recognised(index, root, embedder, tmp_path):
    assert describe_text(root, "toy") == {"toy": 0}
    write_toy(tmp_path, 2, 4, seed=3)
    assert toy_seed(tmp_path) == 3
    rows, = open_text(describe_text(tmp_path, "toy")).encode(["a man bakes bread"])
    assert np.array_equal(rows, sentence_features(ToyWorld(3), "a man bakes bread"))
    with pytest.raises(UserError, match="text features of"):
        Searcher(index, embedder, TextEncoder(None, {"toy": 1}))
    with pytest.raises(UserError, match="text features of"):
        index.append(embedder, tmp_path, "toy", "val", quiet=True)
    with pytest.raises(UserError, match="--text-model"):
        open_text(None)
    check_text({"model": "a", "fingerprint": "f"}, {"model": "b", "fingerprint": "f"}, "x") # the same model elsewhere


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A dataset of own videos, without captions, and its text model."
    folder = tmp_path_factory.mktemp("own")
    (folder / "videos").mkdir()
    for n, colour in (8, "blue"), (6, "green"), (4, "red"):
        write_video(folder / "videos" / f"{colour}.mp4", [Image.new("RGB", (48, 48), colour)] * n, rate=1)
    write_tiny_clip(folder / "clip", ["a red film", "a green film", "a blue film"])
    extract_videos(folder / "videos", folder / "data", "mine", model=str(folder / "clip"), quiet=True)
    return folder


def test_own_videos_and_their_text_model(own, tmp_path):
    index = build_index(tmp_path / "index", Embedder(None, published_config("mine")), own / "data", "mine", quiet=True)
    assert [(e.title, e.duration, e.n_frames) for e in index.entries] == [("blue.mp4", 8, 8), ("green.mp4", 6, 6),
                                                                           ("red.mp4", 4, 4)]
    assert all(e.file[0] == (own / "videos" / e.title).stat().st_size for e in index.entries)
    assert [(root.resolve(), name) for root, name in index.sources] == [((own / "data").resolve(), "mine")]
    other = write_tiny_clip(tmp_path / "other", ["a red film"], seed=1)
    with pytest.raises(UserError, match="not the text encoder"):
        open_searcher(index.folder, text_model=str(other))
    moved = (own / "clip").rename(own / "moved")
    try:
        with pytest.raises(UserError):
            open_searcher(index.folder)
        assert len(open_searcher(index.folder, text_model=str(moved)).search(["a red film"])[0]) == 3
    finally:
        moved.rename(own / "clip")


@pytest.mark.parametrize("raw", [False, True])
def test_a_pack_that_does_not_name_its_text_model(own, tmp_path, raw):
    model, paths = str(own / "clip"), corpus_paths(tmp_path, "pack", "val")
    encoder = load_encoder(model, "cpu")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(paths.video, "w") as video, h5py.File(paths.text, "w") as text:
        for seed, name in enumerate("ab"):
            video[name] = np.random.default_rng(seed).normal(size=(9, 24)).astype(np.float32)
            text[f"{name}#enc#0"], = encode_text([f"a {name} film"], encoder, raw)
    paths.captions.write_text("a#enc#0 a a film\nb#enc#0 a b film\n")
    assert describe_text(tmp_path, "pack") is None and describe_text(tmp_path, "pack", model)["raw_tokens"] == raw
    with pytest.raises(UserError, match="other features"):
        describe_text(tmp_path, "pack", str(write_tiny_clip(tmp_path / "other", ["a film"], seed=1)))
    embedder = Embedder(None, published_config("pack"))
    if raw:
        with pytest.raises(UserError, match="--raw-tokens"):
            build_index(tmp_path / "index", embedder, tmp_path, text_model=model, quiet=True)
        return
    with pytest.raises(UserError, match="--text-model"):
        open_searcher(build_index(tmp_path / "index", embedder, tmp_path, quiet=True).folder)
    known = build_index(tmp_path / "known", embedder, tmp_path, text_model=model, quiet=True)
    assert moment_text(open_searcher(known.folder).search(["a film"])[0][0]).endswith("%") # no duration is known


# ---------------------------------------------------------------- the command

def said(capsys, *argv):
    status = search_command([str(a) for a in argv])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(embedder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    save_checkpoint(folder / "best.safetensors", embedder.model)
    return folder


def test_the_command_from_build_to_removal(root, run, tmp_path, capsys):
    folder = tmp_path / "index"
    status, out, _ = said(capsys, "build", "--index", folder, "--checkpoint", run, "--root", root, "--split", "val")
    assert status == 0 and f"{N_VAL} videos" in out
    status, out, _ = said(capsys, "--index", folder, "a man opens the fridge", "somebody sings", "--k", "3")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "a man opens the fridge" and lines[5] == "somebody sings" and len(lines) == 9
    assert all("[" in line and "–" in line and "toy_val_" in line for line in lines[1:4])
    assert said(capsys, "ask", "--index", folder, lines[0], "--k", "3")[1].splitlines() == lines[:4]
    status, out, _ = said(capsys, "a man", "--index", folder, "--json", "--clip-weight", "0.2", "--fraction", "0.8")
    found, = json.loads(out)
    assert found["query"] == "a man" and len(found["results"]) == 5
    best = found["results"][0]
    assert set(best["seconds"]) == {"start", "end", "peak"} and len(best["relevance"]) == 16
    out, kept = said(capsys, "moments", "--index", folder, "--out", tmp_path / "m.json")[1], tmp_path / "m.json"
    assert "chance" in out and f"{json.loads(kept.read_text())['hit']:.1f}" in out
    assert f"{N_TRAIN} new videos, {N_TRAIN + N_VAL} in all" in said(capsys, "add", "--index", folder)[1]
    assert f"{N_TRAIN + N_VAL - 1} videos are left" in said(capsys, "remove", "--index", folder, "toy_val_0000")[1]
    status, out, _ = said(capsys, "latency", "--videos", "3", "--budget", "0.1", "--out", tmp_path / "latency.json")
    row, = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert status == 0 and row["bytes"] == 3 * 122_880 and row["low"] <= row["median"] <= row["high"]


def test_the_command_says_what_is_wrong(root, run, tmp_path, capsys):
    folder = tmp_path / "index"
    assert said(capsys, "build", "--index", folder, "--checkpoint", run, "--root", root, "--split", "val")[0] == 0
    save_checkpoint(tmp_path / "other.safetensors", make_model(1))
    torch.save(to_released(make_model().state_dict()), tmp_path / "released.ckpt")
    build, question = ("build", "--root", root, "--index"), ("--index", folder, "a man")
    for argv, message in [(("--index", folder, ""), "empty"),
                          (("--index", tmp_path / "no", "a man"), "no finished index"),
                          ((*question, "--checkpoint", tmp_path / "other.safetensors"), "another checkpoint"),
                          ((*question, "--checkpoint", tmp_path / "gone"), "gone is not there"),
                          ((*build, folder, "--checkpoint", run), "holds an index already"),
                          ((*build, tmp_path / "x", "--checkpoint", tmp_path / "released.ckpt"), "--dataset"),
                          ((*build, tmp_path / "x", "--zero-shot"), "--dataset"),
                          ((*build, tmp_path / "x", "--checkpoint", run, "--root", tmp_path), "does not exist"),
                          (("remove", "--index", folder, "nobody"), "no video nobody")]:
        status, out, err = said(capsys, *argv)
        assert status == 1 and not out and message in err and len(err.strip().splitlines()) <= 3, (argv, err)
    for argv in [], ["--index", folder], ["build", "--index", folder], ["ask", "a man"]:
        with pytest.raises(SystemExit) as stopped:
            search_command([str(a) for a in argv])
        assert stopped.value.code == 2
    with pytest.raises(UserError, match="GB of memory"):
        search_latency(10**9)


def test_an_index_moves_together_with_its_run(root, embedder, tmp_path):
    path = tmp_path / "a" / "run" / "best.safetensors"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, embedder.model)
    build_index(path.parent / "index", embedder, root, "toy", "val", checkpoint=path, quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(open_searcher(tmp_path / "b" / "run" / "index").search(["a man"], 3)[0]) == 3
