"""TCPL in its clear form, against loops over triples and at the edges; its fast twin is compared in test_fast.py."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.method.tcpl import angle_cosines, angle_loss, distance_loss, tcpl_loss


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    return value.detach().double(), torch.autograd.grad(value, student)[0].double()


def loop_distance(student, teacher, average="all"):
    q = len(student)

    def relative(x):
        d = {(i, j): (x[i] - x[j]).norm() if (x[i] != x[j]).any() else torch.tensor(1e-6)
             for i in range(q) for j in range(q) if i != j}
        return {pair: value / (sum(d.values()) / len(d)) for pair, value in d.items()}

    ours, theirs = relative(student), relative(teacher)
    total = sum(F.smooth_l1_loss(ours[pair], theirs[pair]) for pair in ours)
    return total / (q * q if average == "all" else q * (q - 1))


def loop_angle(student, teacher):
    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / (a.norm() * b.norm()) if a.any() and b.any() else x.new_zeros(())

    q = range(len(student))
    triples = [(i, j, k) for i in q for j in q for k in q]
    return sum(F.smooth_l1_loss(cosine(student, *t), cosine(teacher, *t)) for t in triples) / len(triples)


RANDOM, TEACHER = rand(6, 4, seed=1), rand(6, 7, seed=2)
STUDENTS = {"random": RANDOM, "repeated": RANDOM[[0, 0, 0, 3, 4, 4]], "large": 1e3 * RANDOM, "far away": RANDOM + 30,
            "on a line": RANDOM[:, :1] * rand(1, 4), "three": RANDOM[:3]}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("clear, loops", [(angle_loss, loop_angle), (distance_loss, loop_distance)])
def test_losses_against_loops(name, clear, loops):
    student = STUDENTS[name].double()
    for teacher in TEACHER[:len(student)].double(), TEACHER[[0, 1, 1, 2, 2, 2]][:len(student)].double():
        assert_close(value_and_gradient(clear, student, teacher), value_and_gradient(loops, student, teacher))


def near_duplicates(q, d, seed):
    "Queries of which some are equal and some differ by 1e-4 of their length."
    x = rand(q, d, seed=seed)
    x[1], x[7] = x[0], x[6]
    x[3:6] = x[2] * (1 + 1e-4 * rand(3, d, seed=seed + 1))
    x[8] = x[6] * (1 + 1e-4 * rand(d, seed=seed + 2))
    return x


@pytest.mark.parametrize("shift", [0, 30])
def test_float32_is_precise_for_near_duplicates(shift):
    student, teacher = near_duplicates(14, 9, 3) + shift, near_duplicates(14, 12, 6)
    cosines = angle_cosines(student)
    assert cosines.abs().max() <= 1
    assert_close(cosines.double(), angle_cosines(student.double()), rtol=0, atol=1e-4)
    exact = value_and_gradient(tcpl_loss, student.double(), teacher.double())
    assert_close(value_and_gradient(tcpl_loss, student, teacher), exact, rtol=1e-4, atol=1e-4)


def test_only_the_student_learns():
    student, teacher = rand(7, 4).requires_grad_(), rand(7, 6, seed=1).requires_grad_()
    tcpl_loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    assert_close(student.grad.sum(0), torch.zeros(4), rtol=0, atol=1e-6)  # moving all queries together changes nothing


def test_gradcheck():
    student, teacher = rand(5, 3, seed=1).double().requires_grad_(), rand(5, 4, seed=2).double()
    assert torch.autograd.gradcheck(lambda s: tcpl_loss(s, teacher), (student,))


@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("average", ["all", "off_diagonal"])
def test_few_queries(q, average):
    value, gradient = value_and_gradient(lambda s, t: tcpl_loss(s, t, average=average), rand(q, 8), rand(q, 8, seed=1))
    assert value.isfinite() and gradient.isfinite().all()
    assert (value > 1e-3) == (q == 3)  # one query has no relation, two have one, which the scaling removes


@pytest.mark.parametrize("which", ["student", "teacher", "both", "zero"])
@pytest.mark.parametrize("q", [2, 60])
def test_all_queries_equal(which, q):
    student, teacher = rand(q, 384), rand(q, 768, seed=1)
    if which in ("student", "both"):
        student = student[:1].repeat(q, 1)
    if which in ("teacher", "both"):
        teacher = teacher[:1].repeat(q, 1)
    value, gradient = value_and_gradient(tcpl_loss, 0 * student if which == "zero" else student, teacher)
    assert value.isfinite() and gradient.isfinite().all()
    if which != "teacher":
        assert gradient.abs().max() == 0
    if which == "both":
        assert value == 0


def test_similarity_transforms_cost_nothing():
    teacher = rand(20, 8)
    turn = torch.linalg.qr(rand(8, 8, seed=1)).Q
    assert tcpl_loss(3 * teacher @ turn + 2, teacher) < 1e-6 < tcpl_loss(rand(20, 8, seed=2), teacher)


def test_weights_and_the_average_of_the_paper():
    student, teacher = rand(7, 4).double(), rand(7, 6, seed=1).double()
    assert_close(distance_loss(student, teacher, "off_diagonal"), loop_distance(student, teacher, "off_diagonal"))
    parts = distance_loss(student, teacher), angle_loss(student, teacher)
    assert_close(tcpl_loss(student, teacher, 2., 3.), 2 * parts[0] + 3 * parts[1])
    with pytest.raises(KeyError, match="half"):
        distance_loss(student, teacher, "half")
