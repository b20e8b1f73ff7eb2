"""TCPL against naive versions: all differences in float64."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.method.tcpl import (
    angle_cosines, angle_loss, angle_tile, distance_loss, gram, inverse_distances, pairs, tcpl_loss, tiles,
)


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


@pytest.mark.parametrize("shift", [0, 5, 5000])
@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-4])
def test_cosines_of_near_duplicates(difference, shift):
    base = rand(1, 384, seed=1)
    x = torch.cat([base * (1 + difference * rand(8, 384, seed=2)), base, base, rand(4, 384, seed=3)]).double() + shift
    cosines = angle_cosines(pairs(gram(x)))
    assert cosines.dtype == torch.float and cosines.shape == (14, 14, 14)
    assert cosines.abs().max() <= 1
    assert_close(cosines.double(), naive_cosines(x.double()).permute(1, 2, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [0, 1e-16, 1e-15, -1e-15])
def test_equal_queries_have_no_direction(noise):
    "Rounding may leave a distance between them; it must not be taken for one."
    x = F.normalize(rand(5, 384).repeat(2, 1), dim=1)
    equal = torch.arange(10)[:, None] % 5 == torch.arange(10) % 5
    g = gram(x) - noise * equal.logical_xor(torch.eye(10, dtype=torch.bool))
    assert torch.equal(inverse_distances(g) == 0, equal)


def test_the_teacher_learns_nothing():
    student, teacher = rand(7, 4).requires_grad_(), rand(7, 6, seed=1).requires_grad_()
    tcpl_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None


@pytest.mark.parametrize("q", [4, 33])
def test_gradcheck(q):
    student, teacher = rand(q, 3, seed=1).double().requires_grad_(), rand(q, 5, seed=2).double()
    assert torch.autograd.gradcheck(lambda s: tcpl_loss(s, teacher), (student,))


def test_tile_size_does_not_matter():
    student, teacher = rand(41, 16), rand(41, 24, seed=1)
    reference = value_and_gradient(naive_angle, student.double(), teacher.double())
    for block_bytes in (1, *(32 * 41 * edge**2 for edge in (2, 7, 20, 21, 40, 41)), 2**26):
        for a, b in zip(value_and_gradient(lambda s, t: angle_loss(s, t, block_bytes), student, teacher), reference):
            assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("n, edge", [(1, 1), (1, 9), (5, 0), (5, 2), (7, 7), (41, 7), (160, 20)])
def test_tiles_cover_every_pair_once(n, edge):
    seen = torch.zeros(n, n)
    for j, k in tiles(n, edge):
        assert max(j.stop - j.start, k.stop - k.start) <= max(edge, 1)
        seen[j, k] += 1
        if j is not k: seen[k, j] += 1
    assert (seen == 1).all()


def test_a_tile_compiles_in_one_graph():
    "aot_eager captures and functionalises the graph as a GPU compiler does, without generating code."
    compiled = torch.compile(angle_tile, fullgraph=True, dynamic=True, backend="aot_eager")
    for q in 9, 14:
        student, teacher = near_duplicates(q, 9, 3), rand(q, 12, seed=2)
        ours, plain = (value_and_gradient(lambda s, t: tcpl_loss(s, t, tile=tile), student, teacher) for tile in (compiled, angle_tile))
        for a, b in zip(ours, plain):
            assert_close(a, b, rtol=1e-5, atol=1e-8)


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
from prvr_nb.method.tcpl import tcpl_loss
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
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # a freed array goes back at once, so that the peak is what was alive
    out = subprocess.run([sys.executable, "-c", MEASURE, str(q)], env=env, capture_output=True, text=True, check=True).stdout
    assert 0 < int(out) * 1024 < 1e9 * (q / 2560)**2, f"{int(out) / 1024:.0f} MiB at Q = {q}"
