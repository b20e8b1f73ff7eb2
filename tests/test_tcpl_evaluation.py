"""TCPL and the evaluation metrics against naive versions: all differences in float64, loops over pairs, sorting."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.evaluation import average_ranks, blocked_max_scores, collapse, retrieval_ranks, score_blocks, spearman, teacher_correlation
from prvr_nb.model import Embeddings
from prvr_nb.retrieval import max_scores
from prvr_nb.tcpl import angle_cosines, angle_loss, distance_loss, gram, inverse_distances, tcpl_loss


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_cosines(x):
    "All cosines from all differences, zero directions counting as 0."
    difference = x[None] - x[:, None]
    zero = (difference == 0).all(2, keepdim=True)
    unit = torch.where(zero, 0., difference / torch.where(zero, 1., difference).norm(dim=2, keepdim=True))
    return torch.einsum("ijd,ikd->ijk", unit, unit)


def naive_angle(student, teacher):
    return F.smooth_l1_loss(naive_cosines(student), naive_cosines(teacher))


def naive_distance(student, teacher, average="all"):
    def relative(x):
        d = (x[None] - x[:, None]).pow(2).sum(2).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x), dtype=x.dtype))
        return d / d[d > 0].mean() if len(x) > 1 else d
    total = F.smooth_l1_loss(relative(student), relative(teacher), reduction="sum")
    return total / (len(student)**2 if average == "all" else len(student) * (len(student) - 1))


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach().double(), student.grad.double()


def near_duplicates(q, d, seed):
    "Queries of which some are equal and some differ by 1e-4 of their length."
    x = rand(q, d, seed=seed)
    x[1] = x[0]
    x[3:6] = x[2] * (1 + 1e-4 * rand(3, d, seed=seed + 1))
    x[7] = x[6]
    x[8] = x[6] * (1 + 1e-4 * rand(d, seed=seed + 2))
    return x


CASES = {"random": (rand(14, 9, seed=1), rand(14, 12, seed=2)), "both near": (near_duplicates(14, 9, 3), near_duplicates(14, 12, 6)),
         "student near": (near_duplicates(14, 9, 3), rand(14, 12, seed=2)), "teacher near": (rand(14, 9, seed=1), near_duplicates(14, 12, 6)),
         "two": (rand(2, 9, seed=1), rand(2, 12, seed=2)), "three": (rand(3, 9, seed=1), rand(3, 12, seed=2)),
         "far from the origin": (near_duplicates(14, 9, 3) + 30, rand(14, 12, seed=2)),
         "tiny": (1e-3 * rand(14, 9, seed=1), rand(14, 12, seed=2)), "large": (1e6 * rand(14, 9, seed=1), rand(14, 12, seed=2))}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ours, naive", [(angle_loss, naive_angle), (distance_loss, naive_distance)])
def test_losses_against_naive_float64(case, ours, naive):
    student, teacher = CASES[case]
    expected, gradient = value_and_gradient(naive, student.double(), teacher.double())
    value, ours_gradient = value_and_gradient(ours, student, teacher)
    assert value.isfinite() and ours_gradient.shape == student.shape
    assert_close(value, expected, rtol=1e-5, atol=1e-7)
    error = (ours_gradient - gradient).norm(dim=1) / gradient.norm(dim=1).clamp(min=1e-6 * gradient.norm() + 1e-30)
    assert error.max() < 2e-3 if gradient.norm() > 1e-9 else ours_gradient.norm() < 1e-7, error


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-4])
def test_cosines_of_near_duplicates(difference, shift):
    base = rand(1, 384, seed=1)
    x = torch.cat([base * (1 + difference * rand(8, 384, seed=2)), base, base, rand(4, 384, seed=3)]) + shift
    g = gram(x)
    cosines = angle_cosines(g, inverse_distances(g).float(), slice(None))
    assert cosines.dtype == torch.float and cosines.shape == (14, 14, 14)
    assert cosines.abs().max() <= 1
    assert_close(cosines.double(), naive_cosines(x.double()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("q", [4, 33])
def test_gradcheck(q):
    student, teacher = rand(q, 3, seed=1).double().requires_grad_(), rand(q, 5, seed=2).double()
    assert torch.autograd.gradcheck(lambda s: tcpl_loss(s, teacher), (student,))


def test_block_size_does_not_matter():
    student, teacher = rand(41, 16), rand(41, 24, seed=1)
    reference = value_and_gradient(angle_loss, student, teacher)
    for block_bytes in (1, 32 * 41, 32 * 41 * 7, 32 * 41**2, 32 * 41**2 * 5, 2**26):
        for a, b in zip(value_and_gradient(lambda s, t: angle_loss(s, t, block_bytes), student, teacher), reference):
            assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("average", ["all", "off_diagonal"])
def test_few_queries(q, average):
    value, gradient = value_and_gradient(lambda s, t: tcpl_loss(s, t, average=average), rand(q, 8), rand(q, 8, seed=1))
    assert value.isfinite() and gradient.isfinite().all()
    assert (value > 1e-3) == (q == 3)  # one query has no relation, two have one, which the scaling removes


@pytest.mark.parametrize("which", ["student", "teacher", "both", "zero"])
@pytest.mark.parametrize("q", [2, 9, 60])
def test_all_queries_equal(which, q):
    student, teacher = rand(q, 384), rand(q, 768, seed=1)
    if which in ("student", "both"): student = student[:1].repeat(q, 1)
    if which in ("teacher", "both"): teacher = teacher[:1].repeat(q, 1)
    if which == "zero": student = student * 0
    value, gradient = value_and_gradient(tcpl_loss, student, teacher)
    assert value.isfinite() and gradient.isfinite().all()
    if which != "teacher": assert gradient.abs().max() < 1e-4
    if which == "both": assert_close(value, torch.zeros((), dtype=torch.double), rtol=0, atol=1e-6)


def test_similarity_transforms_cost_nothing():
    teacher = rand(20, 8)
    turn = torch.linalg.qr(rand(8, 8, seed=1)).Q
    assert tcpl_loss(3 * teacher @ turn + 2, teacher) < 1e-6 < tcpl_loss(rand(20, 8, seed=2), teacher)


def test_paper_average():
    student, teacher = rand(7, 4), rand(7, 6, seed=1)
    assert_close(distance_loss(student, teacher, "off_diagonal").double(), naive_distance(student.double(), teacher.double(), "off_diagonal"), rtol=1e-5, atol=0)
    assert_close(tcpl_loss(student, teacher, 2., 3.), 2 * distance_loss(student, teacher) + 3 * angle_loss(student, teacher))


def test_bad_input():
    for loss in distance_loss, angle_loss, tcpl_loss:
        with pytest.raises(ValueError, match=r"\(5, 4\).*\(1, 4\).*one row per query"):
            loss(rand(5, 4), rand(1, 4))
    with pytest.raises(ValueError, match="'half'.*'off_diagonal'"):
        distance_loss(rand(5, 4), rand(5, 4), "half")


MEASURE = """
import sys, torch
from prvr_nb.tcpl import tcpl_loss
torch.set_num_threads(1)
q = int(sys.argv[1])
def step(q):
    tcpl_loss(torch.randn(q, 384, requires_grad=True), torch.randn(q, 768)).backward()
def peak(): # of this program alone; ru_maxrss would start at the peak of whoever started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
step(50)
before = peak()
step(q)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is on Linux only")
def test_peak_memory():
    """At Q = 2560 a step may take 1 GB more. Its arrays are Q × Q, so a quarter of that is allowed at half of Q, which takes an eighth of
    the time; PRVR_TCPL_MEMORY_Q=2560 measures the full size (minutes)."""
    q = int(os.environ.get("PRVR_TCPL_MEMORY_Q", 1280))
    out = subprocess.run([sys.executable, "-c", MEASURE, str(q)], capture_output=True, text=True, check=True).stdout
    assert 0 < int(out) * 1024 < 1e9 * (q / 2560)**2, f"{int(out) / 1024:.0f} MiB at Q = {q}"


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
def test_collapse(group):
    "Ragged groups, queries of one video apart from each other, videos with a single query, videos without any."
    group, x = torch.tensor(group), F.normalize(rand(9, 5) + 0.5, dim=1)
    assert_close(torch.tensor(collapse(x, group, 8), dtype=torch.double), torch.tensor(naive_collapse(x, group, 8), dtype=torch.double), rtol=1e-9, atol=1e-12)


def test_collapse_of_collapsed_queries():
    x = F.normalize(rand(4, 64), dim=1).repeat_interleave(3, 0)
    intra, total, gap = collapse(x, torch.arange(4).repeat_interleave(3), 4)
    assert abs(intra - 1) < 1e-6 and total < intra and gap > 0


def naive_ranks(x):
    return torch.tensor([(x < v).sum().item() + ((x == v).sum().item() - 1) / 2 for v in x], dtype=torch.double)


@pytest.mark.parametrize("values", [[3., 1., 2.], [1., 1., 1., 2.], [0., 2., 2., -1., 2., 0.], [5.]])
def test_average_ranks(values):
    assert torch.equal(average_ranks(torch.tensor(values)), naive_ranks(torch.tensor(values)))


def test_spearman():
    a, b = rand(60), rand(60, seed=1)
    for a, b in (a, b), (a.round(), b.round()), (a, a.exp()), (a, -a**3):
        expected = torch.corrcoef(torch.stack([naive_ranks(a), naive_ranks(b)]))[0, 1].item()
        assert abs(spearman(a, b) - expected) < 1e-9
    assert abs(spearman(a, a.exp()) - 1) < 1e-12 and abs(spearman(a, -a) + 1) < 1e-12


def test_teacher_correlation():
    queries, teacher = F.normalize(rand(12, 5), dim=1), rand(12, 7, seed=1)
    unit = F.normalize(teacher, dim=1)
    pairs = [(i, j) for i in range(12) for j in range(i + 1, 12)]
    ours, theirs = (naive_ranks(torch.tensor([(x[i] @ x[j]).item() for i, j in pairs])) for x in (queries, unit))
    assert abs(teacher_correlation(queries, teacher) - 100 * torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()) < 1e-2
    assert abs(teacher_correlation(unit, 3 * teacher) - 100) < 1e-2


def embeddings(q, v, frames=6, clips=3, d=4):
    return Embeddings(*(F.normalize(rand(*shape, seed=i), dim=-1) for i, shape in enumerate([(q, d), (v, frames, d), (v, clips, d)])))


@pytest.mark.parametrize("q, v, clip_weight", [(37, 11, 0.4), (1, 1, 0.4), (5, 3, 0.)])
def test_retrieval_ranks(q, v, clip_weight):
    e, video = embeddings(q, v), torch.arange(q) % v
    expected = []
    for i in range(q):
        scores = [clip_weight * max(e.queries[i] @ token for token in e.clips[j]) + (1 - clip_weight) * max(e.queries[i] @ token for token in e.frames[j]) for j in range(v)]
        expected.append(1 + sum((s > scores[video[i]] + 1e-6).item() for s in scores))
    ours = retrieval_ranks(e, video, clip_weight)
    assert ours.tolist() == expected
    blocks = list(score_blocks(e, clip_weight, block=4))
    assert [start for start, _ in blocks] == list(range(0, q, 4))
    assert_close(torch.cat([scores for _, scores in blocks]), next(score_blocks(e, clip_weight))[1])


def test_equal_videos_share_a_rank():
    e = embeddings(3, 4)
    same = Embeddings(e.queries, e.frames[:1].repeat(4, 1, 1), e.clips[:1].repeat(4, 1, 1))
    assert retrieval_ranks(same, torch.tensor([0, 2, 3])).tolist() == [1, 1, 1]


def test_blocked_scores():
    e = embeddings(9, 13)
    for budget in (1, 9 * 6 * 2, 2**26):
        assert_close(blocked_max_scores(e.queries, e.frames, budget), max_scores(e.queries, e.frames))
