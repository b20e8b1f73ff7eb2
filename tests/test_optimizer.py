"""BERT's Adam against a loop over floats, stacked against separate parameters, decay against the released names."""
import math

import pytest
import torch
from conftest import small_config
from torch import nn
from torch.testing import assert_close

from prvr_nb.method.model import PRVRModel
from prvr_nb.training.checkpoints import released_names
from prvr_nb.training.optimizer import BertAdam, make_schedule, parameter_groups, slices, warmup_linear


def naive_step(p, g, m, v, lr, decay):
    "BERT's Adam on one tensor as a list of floats."
    scale = min(1., 1. / (math.sqrt(sum(x * x for x in g)) + 1e-6))
    for i, x in enumerate(g):
        m[i] = 0.9 * m[i] + 0.1 * x * scale
        v[i] = 0.999 * v[i] + 0.001 * (x * scale) ** 2
        p[i] -= lr * (m[i] / (math.sqrt(v[i]) + 1e-6) + decay * p[i])


def test_bert_adam_against_a_loop():
    torch.manual_seed(0)
    shapes, decays = [(3, 4), (5,), (1, 1, 2)], [0.01, 0., 0.1]
    params = [nn.Parameter(torch.randn(s, dtype=torch.double)) for s in shapes]
    groups = [dict(params=[p], weight_decay=d) for p, d in zip(params, decays, strict=True)]
    optimizer = BertAdam(groups, lr=0.02)
    slow = [(p.detach().flatten().tolist(), [0.] * p.numel(), [0.] * p.numel()) for p in params]
    for step in range(25):
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
        for p, state, group in zip(params, slow, optimizer.param_groups, strict=True):
            p.grad = torch.randn_like(p) * 10. ** (step % 4 - 2)
            naive_step(state[0], p.grad.flatten().tolist(), *state[1:], group["lr"], group["weight_decay"])
        optimizer.step()
    for p, (expected, *_) in zip(params, slow, strict=True):
        assert_close(p.detach().flatten(), torch.tensor(expected, dtype=torch.double))


@pytest.mark.parametrize("stacked_dims", [1, 2])
def test_stacked_parameters_are_separate_parameters(stacked_dims):
    torch.manual_seed(1)
    stack = nn.Parameter(torch.randn(2, 3, 4))
    parts = [nn.Parameter(x.clone()) for x in stack.detach().flatten(0, stacked_dims - 1)]
    uncut = nn.Parameter(stack.detach().clone())
    optimizers = [BertAdam([dict(params=p, stacked_dims=dims)], lr=0.01)
                  for p, dims in (([stack], stacked_dims), (parts, 0), ([uncut], 0))]
    for _ in range(15):
        g = torch.randn(2, 3, 4) * 10 ** torch.randn(2, 3, 1)
        stack.grad, uncut.grad = g.clone(), g.clone()
        for part, own in zip(parts, g.flatten(0, stacked_dims - 1), strict=True):
            part.grad = own.clone()
        for optimizer in optimizers:
            optimizer.step()
    separate = torch.stack([p.detach() for p in parts]).reshape(stack.shape)
    assert_close(stack.detach(), separate, rtol=0, atol=1e-6)
    assert (uncut.detach() - separate).abs().max() > 1e-3


def test_parameters_without_gradient_stay():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    BertAdam([p, q], lr=0.1).step()
    assert torch.equal(q.detach(), torch.ones(3)) and not torch.equal(p.detach(), torch.ones(3))


def test_slices_are_views():
    t = torch.zeros(2, 3, 4)
    views = slices([t], 2)
    assert [tuple(x.shape) for x in views] == [(4,)] * 6
    views[-1] += 1
    assert t.sum() == 4 and torch.equal(t[1, 2], torch.ones(4))
    assert slices([t], 0)[0] is t


def test_parameter_groups_follow_the_released_names():
    model = PRVRModel(small_config(), 24, 20)
    groups, ours = parameter_groups(model, 0.03), dict(model.named_parameters())
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in ours.values())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, _, released in released_names():
        expected = 0. if "bias" in released or "LayerNorm" in released else 0.03
        assert decay[id(ours[name])] == expected, released
    for name in "token", "frame.tokens.positions.weight", "query.block.norm1.weight":
        assert decay[id(ours[name])] == 0.03, name
    assert sum(len(slices(g["params"], g["stacked_dims"])) for g in groups) == len(released_names())


def test_learning_rate():
    for progress, factor in {0.: 0., 0.005: 0.5, 0.01: 1., 0.505: 0.5, 1.: 0., 1.2: 0.}.items():
        assert warmup_linear(progress) == pytest.approx(factor)
    assert warmup_linear(0., 0.) == 1. and warmup_linear(0.5, 1.) == 0.5 and warmup_linear(1., 1.) == 0.
    rates = []
    for done in 0, 7: # a schedule that starts anywhere goes on as one that started at its beginning
        optimizer = BertAdam([nn.Parameter(torch.ones(1))], lr=0.5)
        schedule = make_schedule(optimizer, small_config(lr=0.1, warmup_ratio=0.2), 20, done)
        rates.append([(schedule.get_last_lr()[0], optimizer.step(), schedule.step())[0] for _ in range(20 - done)])
    assert rates[0][0] == 0 and max(rates[0]) == pytest.approx(0.1) and rates[0][7:] == rates[1]
