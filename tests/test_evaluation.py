"""Evaluation against naive versions (loops over pairs, sorting), in blocks of any size, within the stated memory, without waiting for a device."""
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close

from prvr_nb.config import published_config
from prvr_nb.files import UserError
from prvr_nb.evaluation.collapse import (
    collapse, count_steps, group_sums, mean_similarity, pair_blocks, rank_moments, teacher_correlation,
)
from prvr_nb.evaluation.embeddings import (
    all_finite, embed, encoder_precision, exact_matmul, teacher_embeddings, teacher_features,
)
from prvr_nb.evaluation.metrics import blocked_max_scores, retrieval_ranks, score_blocks
from prvr_nb.evaluation.rows import evaluate, metrics_row, zero_shot
from prvr_nb.evaluation.metrics import count_ranks, ranks
from prvr_nb.method.model import Embeddings, PRVRModel
from prvr_nb.data.prepared import PreparedSplit, pack_queries
from prvr_nb.method.model import prepare_videos
from prvr_nb.method.retrieval import max_scores


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(rand(*shape, seed=seed), dim=-1)


# ---------------------------------------------------------------- collapse

def naive_collapse(x, group, n):
    similarity = x.double() @ x.double().T
    inner = []
    for v in range(n):
        own = (group == v).nonzero()[:, 0].tolist()
        pairs = [similarity[i, j].item() for i in own for j in own if i != j]
        if pairs: inner.append(sum(pairs) / len(pairs))
    outer = [similarity[i, j].item() for i in range(len(x)) for j in range(len(x)) if i != j]
    intra, total = sum(inner) / len(inner), sum(outer) / len(outer)
    return intra, total, (intra - total) / (intra + total)


@pytest.mark.parametrize("group", [[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 2, 0, 3, 3, 5, 5], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("side", [1, 3, 1024])
def test_collapse(group, side, monkeypatch):
    "Ragged groups, queries of one video apart from each other, videos with a single query, videos without any; blocks of any size."
    monkeypatch.setitem(sys.modules["prvr_nb.evaluation"].BLOCK_SIZE, "cpu", side)
    group, x = torch.tensor(group), F.normalize(rand(9, 5) + 0.5, dim=1)
    assert_close(torch.tensor(collapse(x, group, 8), dtype=torch.double), torch.tensor(naive_collapse(x, group, 8), dtype=torch.double), rtol=1e-9, atol=1e-12)


def test_collapse_of_collapsed_queries():
    x = unit(4, 64).repeat_interleave(3, 0)
    intra, total, gap = collapse(x, torch.arange(4).repeat_interleave(3), 4)
    assert abs(intra - 1) < 1e-6 and total < intra and gap > 0


def test_collapse_without_pairs():
    assert collapse(unit(4, 6), torch.arange(4), 5) == (None, None, None)
    assert collapse(unit(1, 6), torch.zeros(1, dtype=torch.long), 1) == (None, None, None)
    opposite = torch.tensor([[1., 0.], [-1., 0.]])
    assert collapse(opposite, torch.zeros(2, dtype=torch.long), 1) == (-1., -1., -0.)


# ---------------------------------------------------------------- Spearman

def naive_ranks(x):
    return torch.tensor([(x < v).sum().item() + ((x == v).sum().item() - 1) / 2 for v in x], dtype=torch.double)


def naive_spearman(a, b):
    return 100 * torch.corrcoef(torch.stack([naive_ranks(a), naive_ranks(b)]))[0, 1].item()


def sorted_spearman(a, b):
    def ranked(x):
        _, which, count = np.unique(x.numpy(), return_inverse=True, return_counts=True)
        return (count.cumsum() - (count + 1) / 2)[which]
    return 100 * np.corrcoef(ranked(a), ranked(b))[0, 1]


def upper(x):
    return (x @ x.T)[torch.ones(len(x), len(x)).triu(1).bool()]


def test_sorted_spearman():
    for a, b in (rand(40), rand(40, seed=1)), (rand(40).round(), rand(40, seed=1).round()):
        assert abs(sorted_spearman(a, b) - naive_spearman(a, b)) < 1e-9


@pytest.mark.parametrize("n, side", [(7, 3), (6, 3), (6, 1), (5, 100), (1, 2), (0, 4)])
def test_pair_blocks_cover_every_ordered_pair_once(n, side):
    seen = torch.zeros(n, n)
    for rows, columns, times in pair_blocks(n, side):
        seen[rows, columns] += 1
        if times == 2: seen[columns, rows] += 1
        assert times == 1 + (rows != columns)
    assert (seen == 1).all()


@pytest.mark.parametrize("q, side", [(12, 5), (40, 40), (41, 16), (3, 1), (300, 128), (300, 300)])
def test_teacher_correlation(q, side):
    queries, teacher = unit(q, 5), rand(q, 7, seed=1)
    expected = sorted_spearman(upper(queries.double()), upper(F.normalize(teacher.double(), dim=1)))
    assert abs(teacher_correlation(queries, teacher, side=side) - expected) < 2e-3
    assert abs(teacher_correlation(queries, 3 * queries, side=side) - 100) < 1e-9


def test_teacher_correlation_is_exact_when_no_two_values_share_a_step():
    "Similarities are multiples of 1/4 with many ties; 8 steps of 1/4 hold them apart, 2 steps do not."
    choose = lambda seed: torch.eye(8)[rand(60, 8, seed=seed).argsort(1)[:, :4]].sum(1) / 2 # four of eight words
    a, b = choose(1), choose(2)
    b[30:], b[:15] = b[:30].clone(), a[:15] # each of the teacher's captions occurs twice or more
    exact = naive_spearman(upper(a), upper(b))
    assert 1 < abs(exact) < 99 and upper(a).unique().tolist() == upper(b).unique().tolist() == [0., 0.25, 0.5, 0.75, 1.]
    for steps in (8, 16, 2**20): assert abs(teacher_correlation(a, b, steps, side=17) - exact) < 1e-9
    assert abs(teacher_correlation(a, b, 2, side=17) - exact) > 1e-3


@pytest.mark.parametrize("steps", [2**6, 2**10, 2**14])
@pytest.mark.parametrize("spread", [1., 0.05])
def test_error_of_the_histogram_is_within_its_bound(steps, spread):
    "The angle by which the steps turn the ranks, from the histogram; also for queries that crowd into a small part of the range."
    student, teacher = (F.normalize(spread * rand(200, 16, seed=s) + torch.eye(16)[0] * (spread < 1), dim=1) for s in (1, 2))
    def angle(x):
        n = count_steps(x, steps, 64).double() / 2
        assert n.sum() == 200 * 199 / 2
        return ((n**3 - n).sum() / (n.sum()**3 - n.sum())).sqrt().asin().item()
    teacher = F.normalize(student + 0.3 * teacher, dim=1)
    exact = sorted_spearman(upper(student.double()), upper(teacher.double()))
    assert abs(teacher_correlation(student, teacher, steps) - exact) <= 100 * (angle(student) + angle(teacher)) + 1e-4


def test_equal_captions_stay_ties():
    "Similarities 0, 1 and −1 that rounding has blurred: the steps see the ties, sorting does not."
    caption, turn = torch.randint(6, (80,), generator=torch.Generator().manual_seed(0)), torch.linalg.qr(rand(64, 64)).Q
    clean = torch.eye(64)[caption // 2] * (1 - 2 * (caption[:, None] % 2)) # three captions and their opposites
    teacher = torch.eye(64)[torch.arange(80) % 7]
    exact = naive_spearman(upper(clean), upper(teacher))
    blurred = clean @ turn
    assert len(upper(blurred).unique()) > 10 and upper(blurred).max() > 1
    assert abs(teacher_correlation(blurred, teacher @ turn, side=30) - exact) < 1e-9


def test_similarity_beyond_one_falls_on_the_last_step():
    counts = count_steps(1.01 * unit(1, 8).repeat(5, 1), 64, 2)
    assert counts[64] == 5 * 4 and counts.sum() == 5 * 4


def test_no_order_no_correlation():
    x = unit(1, 384).repeat(50, 1)
    assert teacher_correlation(x, rand(50, 8)) is None and teacher_correlation(unit(50, 8), x) is None
    assert teacher_correlation(unit(50, 8), torch.zeros(50, 8)) is None
    for q in (0, 1, 2): assert teacher_correlation(unit(q, 8), rand(q, 8, seed=1)) is None # two queries are one pair


def test_teacher_in_half_precision():
    queries, teacher = unit(60, 16), unit(60, 16, seed=1).half()
    assert teacher_correlation(queries, teacher) == teacher_correlation(queries, teacher.float())


# ---------------------------------------------------------------- scores and ranks

def embeddings(q, v, frames=6, clips=3, d=4):
    return Embeddings(unit(q, d), unit(v, frames, d, seed=1), unit(v, clips, d, seed=2))


@pytest.mark.parametrize("q, v, clip_score_weight", [(37, 11, 0.4), (1, 1, 0.4), (5, 3, 0.)])
def test_retrieval_ranks(q, v, clip_score_weight):
    e, video = embeddings(q, v), torch.arange(q) % v
    expected = []
    for i in range(q):
        scores = [clip_score_weight * max(e.queries[i] @ token for token in e.clips[j]) + (1 - clip_score_weight) * max(e.queries[i] @ token for token in e.frames[j]) for j in range(v)]
        expected.append(1 + sum((s > scores[video[i]] + 1e-6).item() for s in scores))
    assert retrieval_ranks(e, video, clip_score_weight).tolist() == expected
    blocks = list(score_blocks(e, clip_score_weight, side=4))
    assert [start for start, _ in blocks] == list(range(0, q, 4))
    assert_close(torch.cat([scores for _, scores in blocks]), next(score_blocks(e, clip_score_weight))[1])


def test_equal_videos_share_a_rank():
    e = embeddings(3, 4)
    same = Embeddings(e.queries, e.frames[:1].repeat(4, 1, 1), e.clips[:1].repeat(4, 1, 1))
    assert retrieval_ranks(same, torch.tensor([0, 2, 3])).tolist() == [1, 1, 1]


@pytest.mark.parametrize("side", [1, 6, 13, 30, 1000])
def test_blocked_scores(side):
    e = embeddings(9, 13)
    assert_close(blocked_max_scores(e.queries, e.frames, side), max_scores(e.queries, e.frames))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_finite(bad, which):
    e = embeddings(9, 13)
    assert all_finite(e)
    e[which].view(-1)[-1] = bad
    assert not all_finite(e)
    with pytest.raises(ValueError, match="NaN or infinity"): retrieval_ranks(e, torch.arange(9))


def test_checked_and_unchecked_ranks():
    scores, own = rand(8, 5), torch.arange(8) % 5
    assert torch.equal(ranks(scores, own), count_ranks(scores, own))
    scores[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"): ranks(scores, own)


def test_metrics_stay_in_float32(monkeypatch):
    "A program that lets matrix products run in TF32 or bfloat16 gets the same metrics, and its setting back."
    e, video = embeddings(200, 50, d=256), torch.arange(200) % 50
    corpus = SimpleNamespace(queries=SimpleNamespace(video=video, tokens=rand(200, 300), start=torch.arange(201)))
    before, expected = torch.get_float32_matmul_precision(), metrics_row(e, corpus, 0.4)
    try:
        torch.set_float32_matmul_precision("medium")
        assert metrics_row(e, corpus, 0.4) == expected and torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(KeyError):
            with exact_matmul():
                assert torch.get_float32_matmul_precision() == "highest"
                raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally: torch.set_float32_matmul_precision(before)


def test_host_never_waits_within_the_loops():
    "Tensors without values, in the blocks of a GPU: an operation that needs a value raises; all_finite, asked once, is one."
    with FakeTensorMode():
        e = Embeddings(*(torch.randn(*shape) for shape in ((20_000, 16), (300, 128, 16), (300, 32, 16))))
        video, teacher = torch.zeros(20_000, dtype=torch.long), torch.randn(20_000, 24)
        found = torch.cat([count_ranks(scores, video[start:start + len(scores)]) for start, scores in score_blocks(e, side=2**13)])
        moments = rank_moments(e.queries, teacher, 2**20, 2**13)
        means = mean_similarity(*group_sums(e.queries, video, 300))
        assert [tuple(x.shape) for x in (found, moments, means)] == [(20_000,), (3,), (300,)]
        with pytest.raises(DataDependentOutputException): all_finite(e)


# ---------------------------------------------------------------- embedding a corpus

CONFIG = published_config("toy", hidden_size=16, merge_schedule=(16, 12, 8))


def small_corpus(config=CONFIG, d_video=10, d_query=12, videos=11, dtype=torch.float):
    rows = np.random.default_rng(0)
    draw = lambda length, d: rows.standard_normal((length, d)).astype(np.float32)
    v = prepare_videos([draw(20 + i, d_video) for i in range(videos)], config)
    q = pack_queries([draw(2 + i % 9, d_query) for i in range(3 * videos - 2)], np.arange(3 * videos - 2) % videos)
    return PreparedSplit(None, v._replace(frames=v.frames.to(dtype), clips=v.clips.to(dtype)), q._replace(tokens=q.tokens.to(dtype)))


def small_model(d_video=10, d_query=12, **changes):
    torch.manual_seed(0)
    return PRVRModel(replace(CONFIG, **changes), d_video, d_query)


@pytest.mark.parametrize("block", [1, 4, 11, 100, None])
def test_embed_against_one_batch(block):
    "Blocks that do not divide the corpus, queries in the corpus's order whatever their length, dropout off and then on again."
    corpus, model = small_corpus(), small_model()
    model.eval()
    batch = corpus.batch(torch.arange(11))
    with torch.no_grad(): expected = model(batch)
    order = torch.cat([(corpus.queries.video == v).nonzero()[:, 0] for v in range(11)]) # of the batch's queries
    model.train()
    e = embed(model, corpus, block=block)
    assert model.training and not any(x.requires_grad for x in e)
    for ours, theirs in zip((e.queries[order], e.frames, e.clips), expected): assert_close(ours, F.normalize(theirs, dim=-1))


@pytest.mark.parametrize("precision, cosine", [("fp32", 0.99999), ("bf16", 0.999)])
@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_embed_in_other_precisions(precision, cosine, dtype):
    exact, e = embed(small_model(), small_corpus()), embed(small_model(precision=precision), small_corpus(dtype=dtype))
    for x, y in zip(e, exact):
        assert x.dtype == torch.float
        assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))
        assert (x * y).sum(-1).min() > cosine
    assert torch.equal(e.queries, exact.queries) == (precision == "fp32" and dtype == torch.float)


def test_autocast_only_where_asked():
    for precision in "fp32", "bf16":
        with encoder_precision(replace(CONFIG, precision=precision), torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


@pytest.mark.parametrize("changes, message", [
    (dict(d_video=9), r"width \(9, 12\), the corpus has \(10, 12\)"), (dict(d_query=9), r"width \(10, 9\), the corpus has \(10, 12\)"),
    (dict(merge_schedule=(16, 12, 6)), r"tokens \(16, 6\) per video, the corpus has \(16, 8\)"),
    (dict(merge_schedule=(14, 12, 8)), r"tokens \(14, 8\) per video, the corpus has \(16, 8\)")])
def test_corpus_of_another_model(changes, message):
    with pytest.raises(UserError, match=message) as error: embed(small_model(**changes), small_corpus())
    assert "\n" not in str(error.value)


def test_embeddings_that_are_not_finite():
    model = small_model()
    with torch.no_grad(): model.query.pool.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite.*lower --lr"): embed(model, small_corpus())


def test_one_video_with_one_query():
    corpus = small_corpus(videos=1)
    row = evaluate(small_model(), corpus)
    assert [row[f"r{k}"] for k in (1, 5, 10, 100)] == [100.] * 4
    assert row["text_intra"] is None and row["text_total"] is None and row["text_diff_norm"] is None and row["spearman"] is None
    assert 0 < row["video_intra"] <= 1 and row["video_diff_norm"] == 0


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
def test_teacher(dtype):
    corpus = small_corpus(d_video=12, dtype=dtype)
    last = torch.stack([corpus.queries.tokens[end - 1] for end in corpus.queries.start[1:]]).float()
    assert torch.equal(teacher_features(corpus), last) and teacher_features(corpus).dtype == torch.float
    before = corpus.videos.frames.clone()
    e = teacher_embeddings(corpus)
    for x, y in zip(e, (last, corpus.videos.frames.float(), corpus.videos.clips.float())):
        assert x.dtype == torch.float
        assert_close(x, F.normalize(y, dim=-1))
    assert torch.equal(corpus.videos.frames, before) # normalised in a copy
    row, = zero_shot(corpus)
    assert abs(row["spearman"] - 100) < 1e-9
    assert teacher_embeddings(small_corpus()) is None and zero_shot(small_corpus()) == []


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, time, torch
from prvr_nb.config import published_config
from prvr_nb.evaluation.rows import evaluate, extra_bytes
from prvr_nb.method.model import PRVRModel
from prvr_nb.data.prepared import PreparedSplit
from prvr_nb.method.model import Videos
from prvr_nb.training.fast import keep_freed_memory
from types import SimpleNamespace
torch.set_num_threads(1)
q, v, d, d_query = (int(x) for x in sys.argv[1:])
config = published_config("tvr", hidden_size=d)

class Cheap(PRVRModel): # embeddings of real size from encoders that cost nothing
    def encode_videos(self, frames, clips, sizes):
        return [x.float().repeat(1, 1, d // x.shape[2]) for x in (frames, clips)]

def status(name): # bytes of this program alone; ru_maxrss would start at the peak of whoever started it
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def corpus(q, v):
    videos = Videos(*(torch.randn(v, n, 8).half() for n in (128, 32)), torch.ones(v, 32), None, None, None)
    queries = SimpleNamespace(tokens=torch.randn(q, d_query).half(), start=torch.arange(q + 1), video=torch.arange(q) % v)
    return PreparedSplit(None, videos, queries)

model = Cheap(config, 8, d_query)
evaluate(model, corpus(50, 20)) # loads the libraries
c = corpus(q, v)
keep_freed_memory() # as prepare() does
open("/proc/self/clear_refs", "w").write("5") # the peak so far is forgotten
before, start = status("VmRSS"), time.process_time()
row = evaluate(model, c)
print(status("VmHWM") - before, 4 * d * (q + v * 160) + extra_bytes(q, v, 128, d, d_query), time.process_time() - start, row["sum_r"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is on Linux only")
def test_peak_memory():
    """Embedding and all metrics within the embeddings and extra_bytes. PRVR_EVALUATION_SIZE=20000,5000,384,768 (queries, videos, model width, width
    of the text features) measures the full size (two minutes, and 2 GB)."""
    size = os.environ.get("PRVR_EVALUATION_SIZE", "4000,1000,384,96").split(",")
    out = subprocess.run([sys.executable, "-c", MEASURE, *size], capture_output=True, text=True, check=True).stdout
    peak, bound, seconds, _ = (float(x) for x in out.split())
    print(f"{size}: peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f} MiB, {seconds:.1f} s")
    assert 0.2 * bound < peak < bound
