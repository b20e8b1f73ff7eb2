"""Search: moments and their metrics, exactness, what an index survives and what it refuses, text encoders, the command."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock

from prvr_nb.videos import index as module
from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.data.corpus import Moment, corpus_paths, read_moments
from prvr_nb.evaluation.embeddings import embed
from prvr_nb.evaluation.metrics import retrieval_ranks
from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import save_checkpoint, to_released
from prvr_nb.data.prepared import prepare
from prvr_nb.cli import search_command
from prvr_nb.data.toy import toy_seed
from prvr_nb.speed import search_latency
from prvr_nb.training.checkpoints import open_checkpoint
from prvr_nb.videos.actions import strip_text
from prvr_nb.videos.embedder import Embedder, TextEncoder, check_text, describe_text, open_text, text_encoder
from prvr_nb.videos.index import VideoIndex, build_index, open_all, video_bytes
from prvr_nb.videos.moments import (
    clock, find_moments, localize_moment, inside, moment_metrics, temporal_iou, pack_moments, token_times,
)
from prvr_nb.videos.search import Searcher, evaluate_moments, moment_text, open_searcher, search, top_k
from prvr_nb.data.toy import ToyWorld, sentence_features, write_toy

CONFIG = published_config("toy", merge_schedule=(16, 10, 8), hidden_size=16, heads=2, dropout=0.)
N_TRAIN, N_VAL = 12, 14


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    write_toy(folder, N_TRAIN, N_VAL)
    return folder


def make_model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return PRVRModel(config, 64, 64).eval()


@pytest.fixture(scope="module")
def embedder():
    return Embedder(make_model())


@pytest.fixture
def small_shards(monkeypatch):
    "Files of a few videos, so that an index has several."
    embedded = module.embedded_videos
    monkeypatch.setattr(module, "embedded_videos", lambda *args: embedded(*args, block=5))
    monkeypatch.setattr(module, "SHARD_BLOCKS", 1)


@pytest.fixture
def index(root, embedder, small_shards, tmp_path):
    return build_index(tmp_path / "index", embedder, root, "toy", "val", "fp32", quiet=True)


def ask(n=6, d=16, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def answers(index, embedder, k=50):
    return [[(hit.id, round(hit.score, 5), hit.seconds) for hit in hits] for hits in search(index, ask(), k)]


# ---------------------------------------------------------------- moments

def walk(curve, fraction):
    "The moment by walking from the peak to both sides."
    peak = first = last = max(range(len(curve)), key=lambda i: curve[i])
    ordered, n = sorted(curve), len(curve)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    threshold = middle + fraction * (curve[peak] - middle)
    while first > 0 and curve[first - 1] >= threshold: first -= 1
    while last < n - 1 and curve[last + 1] >= threshold: last += 1
    return first, last, peak


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33])
def test_stretch_equals_a_walk(length):
    curves = torch.randint(-8, 8, (300, length), generator=torch.Generator().manual_seed(length)).float() / 4
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        assert list(zip(*(x.tolist() for x in localize_moment(curves, fraction)))) == [walk(curve, fraction) for curve in curves.tolist()]


@pytest.mark.parametrize("curve, fraction, want", [
    ([9, 8, 1, 1, 1], 0.5, (0, 1, 0)), ([1, 1, 1, 8, 9], 0.5, (3, 4, 4)), # peak at an edge
    ([1, 9, 9, 9, 1, 1, 1], 1, (1, 3, 1)), # plateau
    ([2, 2, 2, 2], 0.5, (0, 3, 0)), ([2, 2, 2, 2], 1, (0, 3, 0)), # flat
    ([5], 0.5, (0, 0, 0)), # one token
    ([1, 9, 1, 9, 1], 0.5, (1, 1, 1)), # of two equal peaks the first
    ([0, 6, 2, 7, 0, 0, 0], 0.5, (3, 3, 3)), # a gap ends it
    ([0, 6, 4, 7, 0, 0, 0], 0.5, (1, 3, 3)),
])
def test_stretch_by_hand(curve, fraction, want):
    assert tuple(x.item() for x in localize_moment(torch.tensor([curve]).float(), fraction)) == want


def test_the_peak_belongs_to_its_moment():
    curves = torch.rand(2000, 31, generator=torch.Generator().manual_seed(0))
    for fraction in (0.1, 0.3, 0.7, 0.9, 1):
        first, last, peak = localize_moment(curves, fraction)
        assert ((first <= peak) & (peak <= last)).all()
    assert (localize_moment(curves, 1)[0] == curves.argmax(1)).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_its_range(fraction):
    with pytest.raises(UserError, match="fraction"): localize_moment(torch.rand(1, 4), fraction)


@pytest.mark.parametrize("n_frames", [1, 2, 3, 15, 16, 17, 40, 200])
def test_token_times_cover_the_frames_of_each_token(n_frames):
    start, end = (x[0] * n_frames for x in token_times(torch.tensor([n_frames]), 16))
    for i in range(16):
        low, high = (min(round(j * n_frames / 16), n_frames - 1) for j in (i, i + 1)) # Python rounds half to even, too
        assert start[i].item() == pytest.approx(low) and end[i].item() == pytest.approx(n_frames if i == 15 else max(high, low + 1))


def test_find_moments_by_hand():
    curve = torch.tensor([[0., 0, 9, 8, 0, 0, 0, 0]])
    window = find_moments(curve, torch.tensor([40]), 0.5) # tokens of five frames
    assert [x.item() * 40 for x in window] == pytest.approx([10, 20, 12.5])


def test_overlap_and_inside_by_hand():
    truth = torch.tensor([[[4., 8], [2, 2]]])
    windows = [(4, 8, 1), (2, 6, 1 / 3), (0, 4, 0), (8, 9, 0), (5, 6, 1 / 4), (0, 16, 1 / 4)]
    iou = temporal_iou(*(torch.tensor([[float(w[i]) for w in windows]]) for i in (0, 1)), truth)
    assert iou[0].tolist() == pytest.approx([w[2] for w in windows])
    assert inside(torch.tensor([[4., 7.99, 8, 2, 0]]), truth).tolist() == [[True, True, False, False, False]]


def test_pack_moments_clips_to_the_video_and_pads():
    packed = pack_moments([[Moment(-1, 5, 10)], [Moment(2, 4, 8), Moment(6, 99, 8)]])
    assert packed.tolist() == [[[0, .5], [2, 2]], [[.25, .5], [.75, 1]]]


def test_moment_metrics_by_hand():
    curves = torch.tensor([[0., 9, 9, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]) # eight tokens of one second
    m = moment_metrics(curves, torch.tensor([8, 8]), [[Moment(1, 3, 8)], [Moment(4, 8, 8)]], 0.5)
    assert m["queries"] == 2 and m["hit"] == 50 and m["hit_chance"] == 100 * (2 / 8 + 4 / 8) / 2 and m["hit_middle"] == 50
    assert m["iou"] == pytest.approx(50) and m["iou_whole"] == pytest.approx(100 * (2 / 8 + 4 / 8) / 2)
    assert m["iou_middle"] == pytest.approx(100 * (1 / 5 + 2 / 6) / 2)
    placed = [1 / 3, 1, 1 / 3, 0, 0, 0, 0] # a window of two tokens at seven places
    assert m["iou_chance"] == pytest.approx(100 * (sum(placed) / 7 + 4 * (1 / 4) / 8) / 2)


def test_moment_metrics_without_annotations():
    with pytest.raises(UserError, match="annotated"): moment_metrics(torch.rand(0, 4), torch.zeros(0, dtype=torch.long), [])


# ---------------------------------------------------------------- exactness

def brute_force(index, queries, weight):
    "All scores, one pair at a time."
    scores = torch.empty(len(queries), len(index))
    for v, entry in enumerate(index.entries):
        shard = index.shards[entry.shard]
        for q, query in enumerate(queries):
            scores[q, v] = weight * max(query @ x.float() for x in shard.clips[entry.row]) + (1 - weight) * max(query @ x.float() for x in shard.frames[entry.row])
    return scores


@pytest.mark.parametrize("weight", [0., 0.4, 1.])
@pytest.mark.parametrize("budget", [1, 9000, 2**30]) # one video, a few, all
def test_search_is_exact(index, embedder, weight, budget):
    index.remove([index.entries[i].id for i in (0, 6, 13)])
    assert len(index.shards) == 3 and len(index) == N_VAL - 3
    scores = brute_force(index, ask(), weight)
    for k in (1, 4, 11, 99):
        best, where = top_k(index, ask(), k, weight, budget)
        want = scores.sort(dim=1, descending=True, stable=True)
        torch.testing.assert_close(best, want.values[:, :k])
        assert torch.equal(where, want.indices[:, :k])


def test_queries_in_blocks(index):
    queries = ask(9)
    whole, parts = search(index, queries, 3), search(index, queries, 3, block=2)
    assert [[hit.id for hit in hits] for hits in whole] == [[hit.id for hit in hits] for hits in parts] and len(parts) == 9


def test_of_equal_scores_the_first_indexed_wins(index):
    copy = [shard._replace(frames=torch.ones_like(shard.frames), clips=torch.ones_like(shard.clips)) for shard in index.shards]
    index.shards = copy
    for budget in (1, 9000, 2**30): assert top_k(index, ask(2), 4, 0.4, budget)[1].tolist() == [[0, 1, 2, 3]] * 2


def test_k_larger_than_the_index(index):
    assert [len(hits) for hits in search(index, ask(2), 1000)] == [N_VAL, N_VAL]


def test_search_ranks_as_the_evaluation_does(index, embedder, root):
    corpus, = prepare(root, CONFIG, ("val",), quiet=True)
    e = embed(embedder.model, corpus)
    ids = corpus.split.videos
    ranked = [[hit.id for hit in hits] for hits in search(index, e.queries, len(ids))]
    ranks = [1 + hits.index(ids[video]) for hits, video in zip(ranked, corpus.queries.video)]
    assert ranks == retrieval_ranks(e, corpus.queries.video).tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embeddings_are_those_of_the_evaluation(root, tmp_path, precision):
    config = replace(CONFIG, precision=precision)
    embedder = Embedder(make_model(config=config))
    index = build_index(tmp_path / "index", embedder, root, "toy", "val", "fp32", quiet=True)
    corpus, = prepare(root, config, ("val",), quiet=True)
    e = embed(embedder.model, corpus)
    assert [entry.id for entry in index.entries] == corpus.split.videos
    torch.testing.assert_close(index.shards[0].frames, e.frames, atol=1e-5, rtol=0)
    torch.testing.assert_close(index.shards[0].clips, e.clips, atol=1e-5, rtol=0)


def test_half_precision_is_close(index, root, embedder, tmp_path):
    half = build_index(tmp_path / "half", embedder, root, "toy", "val", quiet=True)
    assert half.shards[0].frames.dtype == torch.float16 and half.n_bytes == N_VAL * video_bytes(16, 8, 16)
    assert index.n_bytes == N_VAL * video_bytes(16, 8, 16, "fp32")
    (a, i), (b, j) = (top_k(x, ask(50), N_VAL, 0.4) for x in (index, half))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    near = (a - a.gather(1, (i[:, :, None] == j[:, None]).int().argmax(1))).abs() # what changed places had nearly the same score
    assert near.max() < 4e-3


def test_hits_carry_moment_and_curves(index, embedder, root):
    hit = search(index, ask(1), 1)[0][0]
    entry = index.entries[index.position(hit.id)]
    shard, query = index.shards[entry.shard], ask(1)[0]
    frames, clips = shard.frames[entry.row] @ query, (shard.clips[entry.row] @ query).repeat_interleave(shard.sizes[entry.row].long())
    torch.testing.assert_close(hit.frames, frames)
    torch.testing.assert_close(hit.clips, clips)
    torch.testing.assert_close(hit.curve, 0.4 * clips + 0.6 * frames)
    assert hit.score == pytest.approx(0.4 * clips.max().item() + 0.6 * frames.max().item(), abs=1e-5)
    assert 0 <= hit.start <= hit.peak <= hit.end <= 1 and hit.seconds == pytest.approx([x * entry.duration for x in (hit.start, hit.end, hit.peak)])
    window = find_moments(hit.curve[None], torch.tensor([entry.n_frames]))
    assert (hit.start, hit.end, hit.peak) == tuple(x.item() for x in window)


def test_weight_and_fraction_count(index):
    for weight in (0., 1.):
        hit = search(index, ask(1), 1, weight)[0][0]
        torch.testing.assert_close(hit.curve, hit.clips if weight else hit.frames)
    wide, narrow = (search(index, ask(1), 1, fraction=f)[0][0] for f in (0, 1))
    assert wide.end - wide.start >= narrow.end - narrow.start and wide.id == narrow.id


def test_zero_shot_equals_cosines_of_the_features(root, tmp_path):
    embedder = Embedder(None, CONFIG)
    index = build_index(tmp_path / "index", embedder, root, "toy", "val", "fp32", quiet=True)
    searcher = Searcher(index, embedder, text_encoder(root, "toy"))
    sentence = "a chef in red bakes bread"
    corpus, = prepare(root, CONFIG, ("val",), quiet=True)
    eos = torch.from_numpy(sentence_features(ToyWorld(0), sentence)[-1])
    want = (F.normalize(corpus.videos.frames, dim=-1) @ F.normalize(eos, dim=0)).amax(1)
    hits = searcher.search([sentence], k=N_VAL)[0]
    assert [hit.id for hit in hits] == [corpus.split.videos[i] for i in want.argsort(descending=True)]
    torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), want.sort(descending=True).values, atol=1e-5, rtol=0)


def test_judge_moments_agrees_with_the_curves(index, embedder, root):
    corpus, = prepare(root, CONFIG, ("val",), quiet=True)
    e, annotated = embed(embedder.model, corpus), read_moments(root, "toy", "val")
    video = corpus.queries.video
    frames = torch.einsum("qd,qld->ql", e.queries, e.frames[video])
    clips = torch.einsum("qd,qld->ql", e.queries, e.clips[video]).gather(1, corpus.videos.frame_to_clip[video])
    truth = [annotated[c.video, c.sentence] for c in corpus.split.captions]
    want = moment_metrics(0.4 * clips + 0.6 * frames, torch.tensor([int(t[0].duration) for t in truth]), truth)
    assert evaluate_moments(index, embedder, root, "toy") == pytest.approx(want, abs=0.2)
    with pytest.raises(UserError, match="no annotated moments"): evaluate_moments(index, embedder, root, "toy", "train") # none of its videos is here


# ---------------------------------------------------------------- what an index survives

def test_append_and_remove_equal_a_fresh_index(root, embedder, small_shards, tmp_path):
    every = build_index(tmp_path / "every", embedder, root, "toy", "all", quiet=True)
    assert len(every) == N_TRAIN + N_VAL
    gone = [entry.id for entry in every.entries[::4]]
    every.remove(gone)
    grown = build_index(tmp_path / "grown", embedder, root, "toy", "train", quiet=True)
    grown.remove([id for id in gone if id in grown.positions])
    assert grown.append(embedder, root, "toy", "val", quiet=True) == N_VAL
    grown.remove([id for id in gone if id in grown.positions])
    assert answers(grown, embedder) == answers(every, embedder) == answers(VideoIndex(tmp_path / "grown"), embedder)
    assert set(grown.positions) == {entry.id for entry in every.entries} and not set(gone) & set(grown.positions)


def test_append_adds_only_what_is_missing(index, root, embedder):
    before = index.entries
    assert index.append(embedder, root, "toy", "val", quiet=True) == 0 and index.entries == before
    index.remove([before[3].id])
    assert index.append(embedder, root, "toy", "val", quiet=True) == 1 and index.entries[-1].id == before[3].id
    assert len(index.about["sources"]) == 1


def test_room_is_freed_when_most_is_gone(index, embedder):
    kept = [entry.id for entry in index.entries[::3]]
    want = [[answer for answer in hits if answer[0] in kept] for hits in answers(index, embedder)]
    index.remove([entry.id for entry in index.entries if entry.id not in kept])
    assert index.n_bytes == len(kept) * video_bytes(16, 8, 16, "fp32") and len(list(index.folder.glob("shard-*"))) == 1
    assert answers(index, embedder) == want
    index.remove(kept)
    assert len(index) == 0 and search(index, ask(2), 3) == [[], []] and not list(index.folder.glob("shard-*"))


def test_removing_the_unknown(index):
    with pytest.raises(UserError, match="no video nobody"): index.remove([index.entries[0].id, "nobody"])
    assert len(VideoIndex(index.folder)) == N_VAL


def test_a_reader_keeps_its_view_until_it_reopens(index, embedder):
    reader = VideoIndex(index.folder)
    before = answers(reader, embedder)
    index.remove([entry.id for entry in index.entries[2:]]) # the old files are deleted
    assert answers(reader, embedder) == before
    reader.reopen()
    assert len(reader) == 2


def test_a_reader_who_comes_while_files_are_replaced(index, monkeypatch):
    calls, read = [], module.read_index
    def outdated(folder):
        calls.append(folder)
        about = read(folder)
        return about if len(calls) > 1 else {**about, "shards": [{"file": "shard-gone.safetensors", "rows": 5}] * 3}
    monkeypatch.setattr(module, "read_index", outdated)
    assert len(open_all(index.folder)[1]) == N_VAL and len(calls) >= 2


KILLED = """
import os, signal, sys
from prvr_nb.videos import index as search
from prvr_nb.training.checkpoints import load_checkpoint
write, count = search.write_shard, []
def dying(*args):
    name = write(*args)
    count.append(name)
    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return name
embedded = search.embedded_videos
search.write_shard, search.SHARD_BLOCKS, search.embedded_videos = dying, 1, lambda *args: embedded(*args, block=5)
embedder = search.Embedder(load_checkpoint(sys.argv[1]))
if sys.argv[4] == "build": search.build_index(sys.argv[2], embedder, sys.argv[3], "toy", "val", quiet=True)
else: search.VideoIndex(sys.argv[2]).append(embedder, sys.argv[3], "toy", "train", quiet=True)
"""


def run_killed(checkpoint, folder, root, action):
    done = subprocess.run([sys.executable, "-c", KILLED, checkpoint, folder, root, action], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_build_leaves_no_index_and_a_killed_append_the_old_one(root, embedder, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", embedder.model)
    folder = tmp_path / "index"
    run_killed(tmp_path / "best.safetensors", folder, root, "build")
    assert len(list(folder.glob("shard-*"))) == 2
    with pytest.raises(UserError, match="no finished index"): VideoIndex(folder)
    index = build_index(folder, embedder, root, "toy", "val", quiet=True)
    assert len(list(folder.glob("shard-*"))) == len(index.shards) == 1
    before = answers(index, embedder)
    run_killed(tmp_path / "best.safetensors", folder, root, "append")
    assert len(list(folder.glob("shard-*"))) == 3 and answers(VideoIndex(folder), embedder) == before
    assert index.append(embedder, root, "toy", "train", quiet=True) == N_TRAIN and len(list(folder.glob("shard-*"))) == 2


def test_a_build_that_finds_broken_features_leaves_nothing(root, embedder, tmp_path):
    write_toy(tmp_path, 2, 8)
    with h5py.File(corpus_paths(tmp_path, "toy").video, "a") as file:
        for number in 1, 5: file[f"toy_val_{number:04d}"][0, 0] = np.nan
    with pytest.raises(UserError, match="2 problems(.|\n)*toy_val_0001 holds NaN(.|\n)*toy_val_0005"): build_index(tmp_path / "index", embedder, tmp_path, "toy", "val", quiet=True)
    with pytest.raises(UserError, match="no finished index"): VideoIndex(tmp_path / "index")


def test_strangers_in_the_folder_are_left_alone(root, embedder, tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", embedder.model)
    build_index(tmp_path, embedder, root, "toy", "val", quiet=True)
    assert (tmp_path / "best.safetensors").exists()


def test_two_writers(index, root, embedder):
    with FileLock(index.folder / ".lock"):
        for work in lambda: index.remove([index.entries[0].id]), lambda: index.append(embedder, root, "toy", "train", quiet=True), lambda: build_index(index.folder, embedder, root, "toy", quiet=True):
            with pytest.raises(UserError, match="another process"): work()
    index.remove([index.entries[0].id])
    assert len(index) == N_VAL - 1


def remove_one(folder, number):
    for _ in range(100):
        try: return VideoIndex(folder).remove([f"toy_val_{number:04d}"])
        except UserError as error:
            if "another process" not in str(error): raise


def test_writers_at_the_same_time_lose_nothing(index):
    with get_context("spawn").Pool(2) as pool: pool.starmap(remove_one, [(index.folder, number) for number in range(4)])
    index.reopen()
    assert len(index) == N_VAL - 4


# ---------------------------------------------------------------- what an index refuses

def test_another_checkpoint_is_refused(index, root, embedder):
    for other in Embedder(make_model(1)), Embedder(make_model(), replace(CONFIG, uniform_clips=True)), Embedder(None, CONFIG):
        with pytest.raises(UserError, match="another checkpoint"): Searcher(index, other, text_encoder(root, "toy"))
        with pytest.raises(UserError, match="another checkpoint"): index.append(other, root, "toy", "train", quiet=True)
        with pytest.raises(UserError, match="another checkpoint"): evaluate_moments(index, other, root, "toy")
    Searcher(index, Embedder(make_model(), replace(CONFIG, clip_score_weight=0.1, epochs=3)), text_encoder(root, "toy")) # what changes no embedding may differ


def test_damaged_shards_are_refused(index):
    path = index.folder / index.about["shards"][1]["file"]
    content = path.read_bytes()
    other = (index.folder / index.about["shards"][2]["file"]).read_bytes() # four videos, not five
    for damaged in content[:-1], content[:100], b"", b"\x80\x04nonsense", other:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name): VideoIndex(index.folder)
    path.unlink()
    with pytest.raises(UserError, match=path.name): VideoIndex(index.folder)


@pytest.mark.parametrize("content, message", [("{", "not JSON"), ("[]", "another version"), ('{"format": "prvr_nb index 0"}', "another version"), ('{"format": "prvr_nb index 1"}', "damaged"),
                                              ('{"format": "prvr_nb index 1", "videos": [[1]], "shards": [], "dtype": "fp16"}', "damaged")])
def test_damaged_manifests_are_refused(index, content, message):
    (index.folder / "index.json").write_text(content)
    with pytest.raises(UserError, match=message): VideoIndex(index.folder)


def test_scores_that_are_no_numbers(index):
    index.shards[1].frames[2, 3] = torch.nan # what a damaged disk may give; the mapping is private
    with pytest.raises(UserError, match="no numbers"): search(index, ask(1), 3)
    index.reopen()
    assert len(search(index, ask(1), 3)[0]) == 3


def test_requests_that_make_no_sense(index, embedder, root):
    searcher = Searcher(index, embedder, text_encoder(root, "toy"))
    for sentences in ["a man", ""], ["   "]:
        with pytest.raises(UserError, match="empty"): searcher.search(sentences)
    assert searcher.search([]) == []
    with pytest.raises(UserError, match="k is 0"): searcher.search(["a man"], 0)
    for weight in (-0.1, 1.1):
        with pytest.raises(UserError, match="clip weight"): searcher.search(["a man"], clip_score_weight=weight)
    with pytest.raises(UserError, match="fraction"): searcher.search(["a man"], fraction=2)
    with pytest.raises(UserError, match="different spaces"): search(index, ask(1, 17))
    with pytest.raises(UserError, match="dtype"): build_index(index.folder / "x", embedder, root, dtype="fp8")


def test_words_that_nobody_knows_and_very_long_sentences(index, embedder, root):
    searcher = Searcher(index, embedder, text_encoder(root, "toy"))
    hits = searcher.search(["zyx", "...", " ".join(["opens the fridge"] * 99), "日本"], 2)
    assert [len(found) for found in hits] == [2] * 4


def test_features_of_another_width(embedder, tmp_path):
    write_toy(tmp_path, 2, 4)
    with h5py.File(corpus_paths(tmp_path, "toy").video, "a") as file:
        for id in list(file):
            rows = file[id][:, :32]
            del file[id]
            file[id] = rows
    with pytest.raises(UserError, match="width 64, these have 32"): build_index(tmp_path / "index", embedder, tmp_path, "toy", "val", quiet=True)


# ---------------------------------------------------------------- text encoders

def test_the_toy_world_is_recognised(root, tmp_path):
    assert describe_text(root, "toy") == {"toy": 0}
    write_toy(tmp_path, 2, 4, seed=3)
    assert toy_seed(tmp_path) == 3
    rows, = text_encoder(tmp_path, "toy").encode(["a man bakes bread"])
    assert np.array_equal(rows, sentence_features(ToyWorld(3), "a man bakes bread"))
    with h5py.File(corpus_paths(tmp_path, "toy").text, "a") as file:
        for id in file: file[id][0] += 1
    with pytest.raises(UserError, match="no toy world"): toy_seed(tmp_path)


def test_another_text_encoder_is_refused(index, embedder, root, tmp_path):
    with pytest.raises(UserError, match="text features of"): Searcher(index, embedder, TextEncoder(None, {"toy": 1}))
    write_toy(tmp_path, 4, 4, seed=1)
    with pytest.raises(UserError, match="text features of"): index.append(embedder, tmp_path, "toy", "val", quiet=True)
    with pytest.raises(UserError, match="--text-model"): open_text(None)
    check_text({"model": "a", "fingerprint": "f"}, {"model": "b", "fingerprint": "f"}, Path("x")) # the same model elsewhere


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A collection of own videos, without captions, and its text model."
    av = pytest.importorskip("av")
    assert av
    from PIL import Image
    from prvr_nb.videos.clip import write_tiny_clip
    from prvr_nb.videos.features import extract_videos
    from prvr_nb.videos.frames import write_video
    folder = tmp_path_factory.mktemp("own")
    (folder / "videos").mkdir()
    for number, colour in enumerate(["red", "green", "blue"]): write_video(folder / "videos" / f"{colour}.mp4", [Image.new("RGB", (48, 48), colour)] * (4 + 2 * number), rate=1)
    model = write_tiny_clip(folder / "clip", ["a red film", "a green film", "a blue film"])
    extract_videos(folder / "videos", folder / "data", "mine", model=str(model), quiet=True)
    return folder


def test_videos_without_captions(own, tmp_path, capsys):
    assert search_command(["build", "--index", str(tmp_path / "index"), "--zero-shot", "--dataset", "mine", "--root", str(own / "data")]) == 0
    index = VideoIndex(tmp_path / "index")
    assert [(entry.title, entry.duration, entry.n_frames) for entry in index.entries] == [("blue.mp4", 8., 8), ("green.mp4", 6., 6), ("red.mp4", 4., 4)]
    root, dataset = index.source(index.entries[0])
    assert dataset == "mine" and root.resolve() == (own / "data").resolve()
    capsys.readouterr()
    assert search_command(["--index", str(tmp_path / "index"), "a red film", "--k", "9"]) == 0
    assert sum(name in capsys.readouterr().out for name in ("red.mp4",)) == 1


def test_the_text_model_is_checked(own, tmp_path):
    from prvr_nb.videos.clip import write_tiny_clip
    build_index(tmp_path / "index", Embedder(None, published_config("mine")), own / "data", "mine", quiet=True)
    other = write_tiny_clip(tmp_path / "other", ["a red film"], seed=1)
    with pytest.raises(UserError, match="not the text encoder"): open_searcher(tmp_path / "index", text_model=str(other))
    moved = (own / "clip").rename(own / "moved")
    try:
        with pytest.raises(UserError): open_searcher(tmp_path / "index")
        assert len(open_searcher(tmp_path / "index", text_model=str(moved)).search(["a red film"])[0]) == 3
    finally: moved.rename(own / "clip")


@pytest.mark.parametrize("raw", [False, True])
def test_a_pack_that_does_not_name_its_text_model(own, tmp_path, raw):
    from prvr_nb.videos.clip import encode_text, load_encoder, write_tiny_clip
    encoder = load_encoder(str(own / "clip"), "cpu")
    paths = corpus_paths(tmp_path, "pack", "val")
    for path in paths: path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(paths.video, "w") as video, h5py.File(paths.text, "w") as text:
        for name in "ab":
            video[name] = np.random.default_rng(0).normal(size=(9, 24)).astype(np.float32)
            text[f"{name}#enc#0"], = encode_text([f"a {name} film"], encoder, raw)
    paths.captions.write_text("a#enc#0 a a film\nb#enc#0 a b film\n")
    assert describe_text(tmp_path, "pack") is None
    about = describe_text(tmp_path, "pack", str(own / "clip"))
    assert about["raw_tokens"] == raw
    with pytest.raises(UserError, match="other features"): describe_text(tmp_path, "pack", str(write_tiny_clip(tmp_path / "other", ["a film"], seed=1)))
    embedder = Embedder(None, published_config("pack"))
    if raw:
        with pytest.raises(UserError, match="--raw-tokens"): build_index(tmp_path / "index", embedder, tmp_path, text_model=str(own / "clip"), quiet=True)
        return
    index = build_index(tmp_path / "index", embedder, tmp_path, quiet=True)
    assert index.about["text"] is None and index.entries[0].duration is None
    with pytest.raises(UserError, match="--text-model"): open_searcher(tmp_path / "index")
    known = build_index(tmp_path / "known", embedder, tmp_path, text_model=str(own / "clip"), quiet=True)
    hit = open_searcher(known.folder).search(["a film"])[0][0]
    assert hit.seconds is None and moment_text(hit).endswith("%")


# ---------------------------------------------------------------- words on a screen

def test_clock():
    assert [clock(s) for s in (0, 9.9, 59.99, 60, 3599, 3600, 36061)] == ["0:00", "0:09", "0:59", "1:00", "59:59", "1:00:00", "10:01:01"]


def test_strips_mark_the_moment(index):
    hit = search(index, ask(1), 1)[0][0]._replace(curve=torch.tensor([0., 0, 1, .5]), start=0.5, end=0.75)
    assert strip_text(hit, 0, 1) == "▁▁[█]▅" and strip_text(hit, 0, 1, width=2) == "▁[█]"
    assert strip_text(hit._replace(start=0., end=1.), 0, 1) == "[▁▁█▅]" and strip_text(hit, 3, 3) == "▁▁[▁]▁"


def test_latency_runs():
    found = search_latency(30, k=3, budget=0.01)
    assert found["bytes"] == 30 * 122_944 and found["videos"] == 30 and found["median"] > 0
    with pytest.raises(UserError, match="GB of memory"): search_latency(10**9)


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def run(root, embedder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    save_checkpoint(folder / "best.safetensors", embedder.model)
    return folder


def test_measurements_are_kept_in_files(run, root, tmp_path, capsys):
    folder = tmp_path / "index"
    assert said(capsys, "build", "--checkpoint", run, "--root", root, "--index", folder, "--split", "val")[0] == 0
    status, out, _ = said(capsys, "moments", "--index", folder, "--out", tmp_path / "moments.json")
    kept = json.loads((tmp_path / "moments.json").read_text())
    assert status == 0 and f"{kept['hit']:.1f}" in out and (kept["dataset"], kept["split"], kept["kind"]) == ("toy", "val", "model")
    status, out, _ = said(capsys, "latency", "--videos", "3", "20", "--budget", "0.1", "--out", tmp_path / "latency.json")
    kept = json.loads((tmp_path / "latency.json").read_text())
    assert status == 0 and [(row["videos"], row["dtype"]) for row in kept["rows"]] == [(3, "fp16"), (20, "fp16"), (3, "fp32"), (20, "fp32")]
    assert all(row["low"] <= row["median"] <= row["high"] and row["bytes"] == row["videos"] * module.video_bytes(dtype=row["dtype"]) for row in kept["rows"])
    assert len(out.splitlines()) == 4 and kept["machine"]["torch"] == torch.__version__


def said(capsys, *argv):
    status = search_command([str(a) for a in argv])
    return status, *capsys.readouterr()


def test_command_from_build_to_removal(root, run, tmp_path, capsys):
    folder = tmp_path / "index"
    status, out, _ = said(capsys, "build", "--index", folder, "--checkpoint", run, "--root", root, "--split", "val")
    assert status == 0 and f"{N_VAL} videos" in out
    status, out, _ = said(capsys, "--index", folder, "a man opens the fridge", "somebody sings", "--k", "3")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "a man opens the fridge" and lines[5] == "somebody sings" and len(lines) == 9
    assert all("[" in line and "–" in line and "toy_val_" in line for line in lines[1:4])
    assert said(capsys, "ask", "--index", folder, "a man opens the fridge", "--k", "3")[1].splitlines() == lines[:4]
    status, out, _ = said(capsys, "a man", "--index", folder, "--json", "--clip-weight", "0.2", "--fraction", "0.8") # the sentence first
    found = json.loads(out)
    assert [row["query"] for row in found] == ["a man"] and len(found[0]["results"]) == 5
    assert set(found[0]["results"][0]["seconds"]) == {"start", "end", "peak"} and len(found[0]["results"][0]["relevance"]) == 16
    status, out, _ = said(capsys, "moments", "--index", folder)
    assert status == 0 and "chance" in out and "whole video" in out
    assert f"{N_TRAIN} new videos, {N_TRAIN + N_VAL} in all" in said(capsys, "add", "--index", folder)[1]
    assert f"{N_TRAIN + N_VAL - 2} videos are left" in said(capsys, "remove", "--index", folder, "toy_val_0000", "toy_val_0001")[1]


def test_command_says_what_is_wrong(root, run, tmp_path, capsys):
    folder = tmp_path / "index"
    assert said(capsys, "build", "--index", folder, "--checkpoint", run, "--root", root, "--split", "val")[0] == 0
    save_checkpoint(tmp_path / "other.safetensors", make_model(1))
    torch.save(to_released(make_model().state_dict()), tmp_path / "released.ckpt")
    for argv, message in [(["--index", folder, ""], "empty"), (["--index", tmp_path / "nothing", "a man"], "no finished index"),
                          (["--index", folder, "a man", "--checkpoint", tmp_path / "other.safetensors"], "another checkpoint"),
                          (["--index", folder, "a man", "--checkpoint", tmp_path / "gone"], "gone is not there"), (["--index", folder, "a man", "--k", "0"], "k is 0"),
                          (["build", "--index", folder, "--checkpoint", run, "--root", root], "holds an index already"),
                          (["build", "--index", tmp_path / "x", "--checkpoint", tmp_path / "released.ckpt", "--root", root], "--dataset"),
                          (["build", "--index", tmp_path / "x", "--zero-shot", "--root", root], "--dataset"),
                          (["build", "--index", tmp_path / "x", "--checkpoint", run, "--root", tmp_path], "does not exist"),
                          (["remove", "--index", folder, "nobody"], "no video nobody"), (["moments", "--index", folder, "--split", "train"], "no annotated moments")]:
        status, out, err = said(capsys, *argv)
        assert status == 1 and not out and message in err and len(err.strip().splitlines()) <= 3, (argv, err)
    for argv in [], ["--index", folder], ["build", "--index", folder], ["ask", "a man"]:
        with pytest.raises(SystemExit) as stopped: search_command([str(a) for a in argv])
        assert stopped.value.code == 2


def test_an_index_moves_together_with_its_run(root, embedder, tmp_path):
    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.safetensors", embedder.model)
    build_index(folder / "index", embedder, root, "toy", "val", checkpoint=folder / "best.safetensors", quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(open_searcher(tmp_path / "b" / "run" / "index").search(["a man"], 3)[0]) == 3


def test_released_checkpoints(tmp_path):
    torch.save(to_released(PRVRModel(published_config("toy"), 64, 64).state_dict()), tmp_path / "released.ckpt")
    assert open_checkpoint(tmp_path / "released.ckpt", "toy")[0].config == published_config("toy")


def test_as_a_process(root, run, tmp_path):
    command = [sys.executable, "-c", "import sys; from prvr_nb.search import search_command; sys.exit(search_command())"]
    def call(*argv): return subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert call("build", "--index", tmp_path / "index", "--checkpoint", run, "--root", root, "--split", "val").returncode == 0
    done = call("--index", tmp_path / "index", "a man opens the fridge", "--k", "2")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3 and not done.stderr
    wrong = call("--index", tmp_path / "index", " ")
    assert wrong.returncode == 1 and wrong.stderr.strip() == "prvr_search: query 1 is empty; write a sentence"
