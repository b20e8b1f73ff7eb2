"""Embedding a split, ranks and recall, collapse, agreement with the teacher, and the memory that all of it takes."""
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.config import published_config
from prvr_nb.data.prepared import PreparedSplit, pack_queries
from prvr_nb.evaluation import collapse as collapse_module
from prvr_nb.evaluation.collapse import average_ranks, collapse, teacher_correlation
from prvr_nb.evaluation.embeddings import (
    BLOCK_SIZE,
    all_finite,
    embed,
    encoder_precision,
    exact_matmul,
    teacher_embeddings,
    teacher_features,
)
from prvr_nb.evaluation.metrics import blocked_max_scores, ranks, recall_at_k, retrieval_metrics, retrieval_ranks
from prvr_nb.evaluation.rows import evaluate, metrics_row, zero_shot
from prvr_nb.files import UserError
from prvr_nb.method.model import Embeddings, PRVRModel, prepare_videos
from prvr_nb.method.retrieval import max_scores


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(rand(*shape, seed=seed), dim=-1)


def embeddings(q, v, frames=6, clips=3, d=4):
    return Embeddings(unit(q, d), unit(v, frames, d, seed=1), unit(v, clips, d, seed=2))


# ---------------------------------------------------------------- ranks and recall

def naive_rank(row, own):
    "Mean of the best and the worst place among videos that tie."
    return sum(s > row[own] for s in row) + (1 + sum(s == row[own] for s in row)) / 2


@pytest.mark.parametrize("q, v", [(1, 1), (7, 3), (40, 60)])
def test_ranks_with_ties(q, v):
    scores = torch.randint(0, 9, (q, v), generator=torch.Generator().manual_seed(q)) / 10
    own = torch.arange(q) % v
    found = ranks(scores, own)
    assert found.tolist() == [naive_rank(row, i) for row, i in zip(scores.tolist(), own.tolist(), strict=True)]
    shuffle = torch.randperm(v)
    assert torch.equal(found, ranks(scores[:, shuffle].exp(), shuffle.argsort()[own]))  # only the order counts


@pytest.mark.parametrize("v", [1, 2, 11, 474])
def test_total_collapse_is_chance_not_perfection(v):
    row = retrieval_metrics(ranks(torch.ones(v, v), torch.arange(v)))
    assert row["median_rank"] == (v + 1) / 2 and (v == 1 or row["r1"] == 0)
    assert_close(row["mrr"], 200 / (v + 1))


def test_recall_by_hand_and_refusals():
    found = torch.tensor([1., 3., 2., 4.])
    assert [recall_at_k(found, k) for k in range(1, 5)] == [25., 50., 75., 100.]
    with pytest.raises(ValueError, match="no query"):
        retrieval_metrics(torch.tensor([]))
    with pytest.raises(ValueError, match="NaN"):
        ranks(torch.tensor([[0., torch.nan]]), torch.tensor([0]))


@pytest.mark.parametrize("q, v, weight", [(37, 11, 0.4), (1, 1, 0.4), (5, 3, 0.)])
def test_ranks_of_a_split(q, v, weight, monkeypatch):
    e, own = embeddings(q, v), torch.arange(q) % v
    scores = weight * max_scores(e.queries, e.clips) + (1 - weight) * max_scores(e.queries, e.frames)
    for side in 1, 6, 1000:
        monkeypatch.setitem(BLOCK_SIZE, "cpu", side)
        assert torch.equal(retrieval_ranks(e, own, weight), ranks(scores, own))
        assert_close(blocked_max_scores(e.queries, e.frames, side), max_scores(e.queries, e.frames))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_has_no_rank(which):
    for bad in torch.nan, torch.inf:
        e = embeddings(9, 13)
        assert all_finite(e)
        e[which].view(-1)[-1] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            retrieval_ranks(e, torch.arange(9))


# ---------------------------------------------------------------- collapse

def naive_collapse(x, group):
    similarity = x.double() @ x.double().T
    different, same = ~torch.eye(len(x), dtype=torch.bool), group[:, None] == group
    inner = [similarity[(group == v)[:, None] & same & different].mean() for v in group.unique()
             if (group == v).sum() > 1]
    intra, total = torch.stack(inner).mean(), similarity[different].mean()
    return torch.stack([intra, total, (intra - total) / (intra + total)])


GROUPS = [[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 2, 0, 3, 3, 5, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("group", GROUPS)
def test_collapse_against_the_matrix(group, monkeypatch):
    "Ragged groups, queries of one video apart from each other, videos with one query or none; blocks of any size."
    group, x = torch.tensor(group), F.normalize(rand(9, 5) + 0.5, dim=1)
    for side in 1, 3, 1024:
        monkeypatch.setitem(BLOCK_SIZE, "cpu", side)
        assert_close(torch.tensor(collapse(x, group, 8), dtype=torch.double), naive_collapse(x, group))


def test_collapse_at_its_ends():
    same_video = torch.arange(6) // 2
    assert_close(torch.tensor(collapse(unit(1, 8).repeat(6, 1), same_video, 3)), torch.tensor([1., 1., 0.]))
    one_point_a_video = torch.eye(3).repeat_interleave(2, 0)
    assert_close(torch.tensor(collapse(one_point_a_video, same_video, 3)), torch.tensor([1., 0.2, 2 / 3]))
    assert collapse(unit(4, 8), torch.arange(4), 4) == (None, None, None)


# ---------------------------------------------------------------- agreement with the teacher

def naive_spearman(x, y):
    pairs = [(i, j) for i in range(len(x)) for j in range(i + 1, len(x))]
    values = [[(z[i].double() @ z[j].double()).item() for i, j in pairs] for z in (x, y)]
    places = [[sum(w < v - 1e-6 for w in z) + sum(abs(w - v) < 1e-6 for w in z) / 2 for v in z] for z in values]
    return 100 * np.corrcoef(*places)[0, 1]


@pytest.mark.parametrize("q", [3, 12, 30])
def test_spearman_against_loops(q):
    student = unit(q, 6)
    teacher = F.normalize(student + 0.5 * unit(q, 6, seed=1), dim=1)
    assert_close(teacher_correlation(student, teacher), naive_spearman(student, teacher), rtol=0, atol=0.01)
    assert_close(teacher_correlation(teacher, teacher), 100.)
    turn = torch.linalg.qr(rand(6, 6)).Q
    assert_close(teacher_correlation(student @ turn, 3 * teacher), teacher_correlation(student, teacher))


def test_equal_captions_stay_ties():
    "Similarities 0 and 1 that a rotation has blurred in their last bits."
    caption, turn = torch.arange(40) % 6, torch.linalg.qr(rand(64, 64)).Q
    clean, teacher = torch.eye(64)[caption], torch.eye(64)[torch.arange(40) % 7]
    assert len((clean @ turn @ (clean @ turn).T).unique()) > 10
    assert_close(teacher_correlation(clean @ turn, teacher @ turn), naive_spearman(clean, teacher))
    assert average_ranks(torch.tensor([5., 5, 5])).tolist() == [1, 1, 1]


def test_a_part_of_many_queries_stands_for_all(monkeypatch):
    student = unit(1500, 32)
    teacher = F.normalize(student + 0.7 * unit(1500, 32, seed=1), dim=1)
    exact = teacher_correlation(student, teacher)
    monkeypatch.setattr(collapse_module, "EXACT_QUERIES", 500)
    assert 0 < abs(teacher_correlation(student, teacher) - exact) < 1.5


def test_no_order_no_correlation():
    x = unit(1, 384).repeat(50, 1)
    assert teacher_correlation(x, rand(50, 8)) is None and teacher_correlation(unit(50, 8), x) is None
    for q in 1, 2:
        assert teacher_correlation(unit(q, 8), rand(q, 8, seed=1)) is None  # two queries are one pair


# ---------------------------------------------------------------- embedding a split

CONFIG = published_config("toy", hidden_size=16, merge_schedule=(16, 12, 8))


def small_corpus(d_video=10, d_query=12, videos=11, dtype=torch.float):
    rows = np.random.default_rng(0)

    def draw(length, d):
        return rows.standard_normal((length, d)).astype(np.float32)
    v = prepare_videos([draw(20 + i, d_video) for i in range(videos)], CONFIG)
    owner = np.arange(3 * videos - 2) % videos
    q = pack_queries([draw(2 + i % 9, d_query) for i in range(len(owner))], owner)
    return PreparedSplit(None, v._replace(frames=v.frames.to(dtype), clips=v.clips.to(dtype)),
                         q._replace(tokens=q.tokens.to(dtype)))


def small_model(d_video=10, d_query=12, **changes):
    torch.manual_seed(0)
    return PRVRModel(replace(CONFIG, **changes), d_video, d_query)


@pytest.mark.parametrize("block", [1, 4, 100, None])
def test_embed_against_one_batch(block):
    "Blocks that do not divide the split, queries in the split's order whatever their length, dropout off and then on."
    corpus, model = small_corpus(), small_model().eval()
    with torch.no_grad():
        expected = model(corpus.batch(torch.arange(11)))
    order = torch.cat([(corpus.queries.video == v).nonzero()[:, 0] for v in range(11)])  # of the batch's queries
    e = embed(model.train(), corpus, block=block)
    assert model.training and not any(x.requires_grad for x in e)
    for ours, theirs in zip((e.queries[order], e.frames, e.clips), expected, strict=True):
        assert_close(ours, F.normalize(theirs, dim=-1))


@pytest.mark.parametrize("precision, cosine", [("fp32", 0.99999), ("bf16", 0.999)])
@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_embed_in_other_precisions(precision, cosine, dtype):
    with encoder_precision(replace(CONFIG, precision=precision), torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
    exact, e = embed(small_model(), small_corpus()), embed(small_model(precision=precision), small_corpus(dtype=dtype))
    for x, y in zip(e, exact, strict=True):
        assert x.dtype == torch.float and (x * y).sum(-1).min() > cosine
        assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))
    assert torch.equal(e.queries, exact.queries) == (precision == "fp32" and dtype == torch.float)


@pytest.mark.parametrize("changes, message", [
    (dict(d_video=9), r"width \(9, 12\), the corpus has \(10, 12\)"),
    (dict(d_query=9), r"width \(10, 9\), the corpus has \(10, 12\)"),
    (dict(merge_schedule=(14, 12, 8)), r"tokens \(14, 8\) per video, the corpus has \(16, 8\)")])
def test_corpus_of_another_model(changes, message):
    with pytest.raises(UserError, match=message):
        embed(small_model(**changes), small_corpus())


def test_embeddings_that_are_not_finite():
    model = small_model()
    with torch.no_grad():
        model.query.pool.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite.*lower --lr"):
        embed(model, small_corpus())


def test_one_video_with_one_query():
    row = evaluate(small_model(), small_corpus(videos=1))
    assert [row[f"r{k}"] for k in (1, 5, 10, 100)] == [100.] * 4 and row["mrr"] == 100 and row["median_rank"] == 1
    assert [row[name] for name in ("text_intra", "text_total", "text_diff_norm", "spearman")] == [None] * 4
    assert 0 < row["video_intra"] <= 1 and row["video_diff_norm"] == 0


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_the_teacher_encodes_like_a_model(dtype):
    corpus = small_corpus(d_video=12, dtype=dtype)
    last = torch.stack([corpus.queries.tokens[end - 1] for end in corpus.queries.start[1:]]).float()
    assert torch.equal(teacher_features(corpus), last)
    before = corpus.videos.frames.clone()
    found = teacher_embeddings(corpus)
    for x, y in zip(found, (last, corpus.videos.frames, corpus.videos.clips), strict=True):
        assert_close(x, F.normalize(y.float(), dim=-1))
    assert torch.equal(corpus.videos.frames, before)  # normalised in a copy
    assert_close(zero_shot(corpus)[0]["spearman"], 100.)
    assert teacher_embeddings(small_corpus()) is None and zero_shot(small_corpus()) == []  # no common space


def test_metrics_stay_in_float32():
    "A program that lets matrix products run in TF32 or bfloat16 gets the same metrics, and its setting back."
    e, video = embeddings(200, 50, d=256), torch.arange(200) % 50
    corpus = SimpleNamespace(queries=SimpleNamespace(video=video, tokens=rand(200, 300), start=torch.arange(201)))
    before, expected = torch.get_float32_matmul_precision(), metrics_row(e, corpus, 0.4)
    try:
        torch.set_float32_matmul_precision("medium")
        assert metrics_row(e, corpus, 0.4) == expected
        with pytest.raises(KeyError), exact_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from types import SimpleNamespace
from prvr_nb.config import published_config
from prvr_nb.data.prepared import PreparedSplit
from prvr_nb.evaluation.rows import evaluate, extra_bytes
from prvr_nb.method.model import PRVRModel, Videos
from prvr_nb.training.fast import keep_freed_memory
torch.set_num_threads(1)
q, v, d, d_query = (int(x) for x in sys.argv[1:])

class Cheap(PRVRModel): # embeddings of real size from encoders that cost nothing
    def encode_videos(self, frames, clips, sizes):
        return [x.float().repeat(1, 1, d // x.shape[2]) for x in (frames, clips)]

def status(name): # bytes of this program alone; ru_maxrss would start at the peak of whoever started it
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def corpus(q, v):
    videos = Videos(*(torch.randn(v, n, 8).half() for n in (128, 32)), torch.ones(v, 32), None, None, None)
    tokens, video = torch.randn(q, d_query).half(), torch.arange(q) % v
    queries = SimpleNamespace(tokens=tokens, start=torch.arange(q + 1), video=video)
    return PreparedSplit(None, videos, queries)

model = Cheap(published_config("tvr", hidden_size=d), 8, d_query)
evaluate(model, corpus(50, 20)) # loads the libraries
c = corpus(q, v)
keep_freed_memory() # as train() does
open("/proc/self/clear_refs", "w").write("5") # the peak so far is forgotten
before = status("VmRSS")
evaluate(model, c)
print(status("VmHWM") - before, 4 * d * (q + v * 160) + extra_bytes(q, v, 128, d, d_query))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is on Linux only")
def test_peak_memory():
    "PRVR_EVALUATION_SIZE=20000,5000,384,768 (queries, videos, model width, text width) measures the full size."
    size = os.environ.get("PRVR_EVALUATION_SIZE", "2500,600,384,96").split(",")
    out = subprocess.run([sys.executable, "-c", MEASURE, *size], capture_output=True, text=True, check=True).stdout
    peak, bound = map(float, out.split())
    print(f"{size}: peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB")
    assert 0.2 * bound < peak < bound
