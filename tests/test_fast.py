"""Every fast twin against its clear form: values, gradients, and what only the fast form promises."""
import copy
import inspect
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_config
from test_tcpl import near_duplicates, rand
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.testing import assert_close

from prvr_nb.method.encoder import CrossAttention, Dropout
from prvr_nb.method.model import PRVRModel
from prvr_nb.method.tcpl import angle_cosines, tcpl_loss
from prvr_nb.training.fast import (
    MODULE_TWINS,
    TWINS,
    angle_tile,
    cosines_of_tile,
    fast_dropout,
    fast_tcpl_loss,
    gram,
    pairs,
    triangle_of_tiles,
    twins_for,
    use_fast_modules,
)


def golden(name):
    with np.load(Path(__file__).with_name("golden") / f"{name}.npz") as held:
        return torch.from_numpy(held["student"]), torch.from_numpy(held["teacher"])


STUDENT, TEACHER = rand(14, 9, seed=1), rand(14, 12, seed=2)
CLOSE, CLOSE_TEACHER = near_duplicates(14, 9, 3), near_duplicates(14, 12, 6)
QUERIES = {
    "random": (STUDENT, TEACHER), "both near": (CLOSE, CLOSE_TEACHER), "student near": (CLOSE, TEACHER),
    "teacher near": (STUDENT, CLOSE_TEACHER), "one": (STUDENT[:1], TEACHER[:1]), "two": (STUDENT[:2], TEACHER[:2]),
    "three": (STUDENT[:3], TEACHER[:3]), "equal captions": (STUDENT[[0] * 5 + [1] * 9], TEACHER[[0] * 5 + [1] * 9]),
    "all equal": (STUDENT[[0] * 14], TEACHER), "all zero": (0 * STUDENT, TEACHER),
    "teacher all equal": (STUDENT, TEACHER[[0] * 14]),
    "on a line": (STUDENT[:, :1] * 2.**torch.arange(-4, 5), TEACHER), "far from the origin": (CLOSE + 30, TEACHER),
    "tiny": (1e-3 * STUDENT, TEACHER), "large": (1e6 * STUDENT, TEACHER), "several tiles": (rand(90, 16), rand(90, 24)),
    "golden a": golden("tcpl_a"), "golden b": golden("tcpl_b"),
}
WEIGHTS = {"distance": (1., 0.), "angle": (0., 1.), "paper": (15., 30., "off_diagonal")}


def with_gradients(function, *inputs):
    "Value and gradients by all inputs that have one."
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return value.detach().double(), [g.double() for g in torch.autograd.grad(value.sum(), inputs)]


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("clear, fast", [(tcpl_loss, TWINS[tcpl_loss])])
def test_a_function_and_its_twin(clear, fast, weights, name):
    "The clear form in float64 is the truth; every query's gradient is compared by its own size."
    student, teacher = QUERIES[name]
    value, (gradient,) = with_gradients(lambda s: clear(s, teacher.double(), *WEIGHTS[weights]), student.double())
    ours, (our_gradient,) = with_gradients(lambda s: fast(s, teacher, *WEIGHTS[weights]), student)
    assert_close(ours, value, rtol=1e-5, atol=1e-6)
    size = gradient.norm()
    error = (our_gradient - gradient).norm(dim=1) / gradient.norm(dim=1).clamp(min=1e-6 * size + 1e-30)
    assert error.max() < 2e-3 if size > 1e-7 else our_gradient.norm() < 1e-4


SEQUENCES = {"random": rand(3, 7, 16), "one token": rand(3, 1, 16), "equal tokens": rand(3, 1, 16).repeat(1, 7, 1),
             "zeros": torch.zeros(3, 7, 16), "large": 30 * rand(3, 7, 16)}


def cross_attention(blocks):
    torch.manual_seed(0)
    layer = CrossAttention(16, 4, 0.3, n=blocks, ffn=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("layer", [Dropout(0.3).eval(), cross_attention(1), cross_attention(8)],
                         ids=["dropout", "cross-attention", "eight cross-attentions"])
def test_a_layer_and_its_twin(layer, name):
    inputs = 1 if type(layer) is Dropout else 2
    arguments = (rand(1, 1, 16, seed=5), SEQUENCES[name])[-inputs:]
    clear, fast = copy.deepcopy(layer).double(), use_fast_modules(copy.deepcopy(layer).double())
    assert type(fast) is MODULE_TWINS[type(clear)]
    results = []
    for layer in clear, fast:
        leaves = [*(x.double().requires_grad_() for x in arguments), *layer.parameters()]
        y = layer(*leaves[:inputs])
        results.append((y.detach(), torch.autograd.grad((y * rand(*y.shape, seed=9)).sum(), leaves, allow_unused=True)))
    assert results[0][0].shape == results[1][0].shape
    assert_close(results[1][0], results[0][0])
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_every_twin_takes_what_its_clear_form_takes():
    for clear, fast in TWINS.items():
        ours, theirs = (list(inspect.signature(f).parameters.values()) for f in (fast, clear))
        assert [(p.name, p.default) for p in ours[:len(theirs)]] == [(p.name, p.default) for p in theirs]
    for clear, fast in MODULE_TWINS.items():
        assert issubclass(fast, clear) and fast.__init__ is clear.__init__
    assert twins_for(False) == TWINS and twins_for(True).keys() == TWINS.keys()


def test_use_fast_modules_changes_classes_and_nothing_else():
    model = PRVRModel(small_config(), 12, 12)
    before = {name: (type(module), list(module.parameters())) for name, module in model.named_modules()}
    assert use_fast_modules(use_fast_modules(model)) is model
    for name, module in model.named_modules():
        kind, parameters = before[name]
        assert type(module) is MODULE_TWINS.get(kind, kind)
        assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert {kind for kind, _ in before.values()} >= {*MODULE_TWINS, nn.Dropout}  # the plain one stays what it is


# TCPL from Gram matrices


@pytest.mark.parametrize("shift", [0, 5, 5000])
@pytest.mark.parametrize("difference", [1e-1, 1e-3, 1e-4])
def test_cosines_of_near_duplicates(difference, shift):
    base = rand(1, 384, seed=1)
    x = torch.cat([base * (1 + difference * rand(8, 384, seed=2)), base, base, rand(4, 384, seed=3)]).double() + shift
    cosines = cosines_of_tile(pairs(gram(x)))
    assert cosines.dtype == torch.float and cosines.shape == (14, 14, 14) and cosines.abs().max() <= 1
    assert_close(cosines.double(), angle_cosines(x).permute(1, 2, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("noise", [0, 1e-16, 1e-15, -1e-15])
def test_equal_queries_have_no_direction(noise):
    "Rounding may leave a distance between them; it must not be taken for one."
    x = F.normalize(rand(5, 384).repeat(2, 1), dim=1)
    equal = torch.arange(10)[:, None] % 5 == torch.arange(10) % 5
    g = gram(x) - noise * equal.logical_xor(torch.eye(10, dtype=torch.bool))
    assert torch.equal(pairs(g).inverse == 0, equal)


@pytest.mark.parametrize("q", [4, 33])
def test_gradcheck(q):
    student, teacher = rand(q, 3, seed=1).double().requires_grad_(), rand(q, 5, seed=2).double()
    assert torch.autograd.gradcheck(lambda s: fast_tcpl_loss(s, teacher), (student,))


def test_tile_size_does_not_matter():
    student, teacher = rand(41, 16), rand(41, 24, seed=1)
    reference = with_gradients(lambda s: tcpl_loss(s, teacher.double()), student.double())
    for tile_bytes in (1, *(32 * 41 * edge**2 for edge in (2, 7, 20, 21, 40, 41)), 2**26):
        ours = with_gradients(lambda s, n=tile_bytes: fast_tcpl_loss(s, teacher, tile_bytes=n), student)
        assert_close(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n, edge", [(1, 1), (1, 9), (5, 0), (5, 2), (7, 7), (41, 7), (160, 20)])
def test_tiles_cover_every_pair_once(n, edge):
    seen = torch.zeros(n, n)
    for j, k in triangle_of_tiles(n, edge):
        assert max(j.stop - j.start, k.stop - k.start) <= max(edge, 1)
        seen[j, k] += 1
        if j is not k:
            seen[k, j] += 1
    assert (seen == 1).all()


def test_a_tile_compiles_in_one_graph():
    "aot_eager captures and functionalises the graph as a GPU compiler does, without generating code."
    compiled = torch.compile(angle_tile, fullgraph=True, dynamic=True, backend="aot_eager")
    for q in 9, 14:
        student, teacher = near_duplicates(q, 9, 3), rand(q, 12, seed=2)
        ours, plain = (with_gradients(partial(fast_tcpl_loss, teacher=teacher, tile=tile), student)
                       for tile in (compiled, angle_tile))
        assert_close(ours, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", [tcpl_loss, fast_tcpl_loss])
def test_the_device_is_never_asked_for_a_value(loss):
    "Tensors without values raise where code needs one: .item(), boolean indexing, nonzero, `if tensor`."
    with FakeTensorMode():
        student = torch.randn(30, 16, requires_grad=True)
        loss(student, torch.randn(30, 24)).backward()
        assert student.grad.shape == (30, 16)
        with pytest.raises(DynamicOutputShapeException):
            student[student > 0]  # the mode does raise


MEASURE = """
import sys, torch
from prvr_nb.training.fast import fast_tcpl_loss
torch.set_num_threads(1)
q = int(sys.argv[1])
def step(q):
    fast_tcpl_loss(torch.randn(q, 384, requires_grad=True), torch.randn(q, 768)).backward()
def peak(): # of this program alone; ru_maxrss would start at the peak of whoever started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
step(50)
before = peak()
step(q)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is on Linux only")
def test_peak_memory():
    """At Q = 2560 a step may take 1 GB more. Its arrays are Q × Q, so an eighth of that is allowed at Q = 900, which
    takes a twentieth of the time; PRVR_TCPL_MEMORY_Q=2560 measures the full size (minutes)."""
    q = int(os.environ.get("PRVR_TCPL_MEMORY_Q", 900))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # a freed array goes back at once: the peak was alive
    run = subprocess.run([sys.executable, "-c", MEASURE, str(q)], env=env, capture_output=True, text=True, check=True)
    out = run.stdout
    assert 0 < int(out) * 1024 < 1e9 * (q / 2560)**2, f"{int(out) / 1024:.0f} MiB at Q = {q}"


# Dropout with 16 bits


def test_sixteen_bit_dropout():
    torch.manual_seed(0)
    ones = torch.ones(1001, 999, requires_grad=True)  # the number of elements is no multiple of four
    out = fast_dropout(ones, 0.3)
    out.sum().backward()
    kept = (out > 0).double()
    assert abs(kept.mean() - 0.7) < 0.003 and abs(out.mean() - 1) < 0.004  # six standard deviations of a million draws
    assert_close(out[out > 0].unique(), torch.tensor([2**16 / (2**16 - round(0.3 * 2**16))]))
    assert_close(ones.grad, out.detach())  # what is dropped gets no gradient
    flat = kept.flatten()
    for distance in 1, 2, 3:  # elements that share a draw are independent
        assert abs(torch.corrcoef(torch.stack([flat[:-distance], flat[distance:]]))[0, 1]) < 0.006
    assert fast_dropout(ones, 0.) is ones and fast_dropout(ones, 0.99999).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_layers_drop_only_in_training(dtype):
    layer, x = use_fast_modules(Dropout(0.5)), torch.ones(64, 64, dtype=dtype)
    assert layer(x).dtype == dtype and 0.4 < (layer(x) == 0).float().mean() < 0.6
    assert torch.equal(layer.eval()(x), x)
