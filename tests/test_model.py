"""The whole model against a plain oracle, its laws, and which loss reaches which weights."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.config import PAPER, paper_schedule, published_config
from prvr_nb.method.cbva import cbva_loss
from prvr_nb.method.model import Batch, PRVRModel, compute_losses
from prvr_nb.method.retrieval import info_nce, triplet_loss
from prvr_nb.method.tcpl import tcpl_loss
from prvr_nb.training.checkpoints import to_released

D_VIDEO, D_QUERY = 10, 6
close = dict(rtol=1e-4, atol=1e-5)


def config(**overrides):
    small = {"hidden_size": 8, "heads": 2, "merge_schedule": (12, 8), "segment_levels": (8, 5), "dropout": 0.3}
    return published_config("toy", **{**small, **overrides})


def random_model(seed=0, std=0.4, **overrides):
    "A small model; every parameter is random, so that no swapped bias or norm goes unseen."
    torch.manual_seed(seed)
    model = PRVRModel(config(**overrides), D_VIDEO, D_QUERY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.eval()


def random_batch(config, lengths=(5, 1, 7, 3), n_videos=3, seed=0):
    torch.manual_seed(seed)
    n_frames, n_clips = config.n_frames, config.n_clips
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randn(len(lengths), max(lengths), D_QUERY) * mask[..., None]
    sizes = torch.randint(1, 6, (n_videos, n_clips)).float()
    labels = (torch.arange(n_frames) * n_clips // n_frames).expand(n_videos, -1)
    segments = (torch.arange(n_clips) // 2).expand(n_videos, -1)
    frames, clips = (torch.randn(n_videos, n, D_VIDEO) for n in (n_frames, n_clips))
    return Batch(frames, clips, sizes, labels, segments, tokens, mask, torch.randn(len(lengths), D_QUERY),
                 torch.arange(len(lengths)) % n_videos)


# A plain oracle: one video or query, one head and one asking token at a time, under the released code's names.

def plain_linear(sd, name, x):
    return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]


def plain_norm(sd, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def plain_window(width, length):
    sigma = max(width, 0.01) / 9
    rows = [[math.exp(-(j / (length - 1) - i / length)**2 / (2 * sigma**2)) for j in range(length)]
            for i in range(length)]
    return torch.tensor([[value / max(row) for value in row] for row in rows])


def plain_block(sd, name, heads, asks, asked, window, sizes=None):
    roles = (("query", asks), ("key", asked), ("value", asked))
    q, k, v = (plain_linear(sd, f"{name}.self.{role}", x).chunk(heads, 1) for role, x in roles)
    shift = torch.zeros(len(asked)) if sizes is None else sizes.log()
    context = []
    for h in range(heads):
        rows = []
        for i in range(len(asks)):
            scores = torch.stack([q[h][i] @ k[h][j] / math.sqrt(q[h].shape[1]) * window[i, j] + shift[j]
                                  for j in range(len(asked))])
            rows.append(sum(p * v[h][j] for j, p in enumerate(scores.exp() / scores.exp().sum())))
        context.append(torch.stack(rows))
    x = plain_norm(sd, f"{name}.norm1", asks + torch.cat(context, 1))
    hidden = plain_linear(sd, f"{name}.output.layer1", x).clamp(min=0)
    return plain_norm(sd, f"{name}.norm2", x + plain_linear(sd, f"{name}.output.layer2", hidden))


def plain_tokens(sd, name, x):
    x = plain_linear(sd, f"{name}_input_proj.net.1", plain_norm(sd, f"{name}_input_proj.LayerNorm", x)).clamp(min=0)
    positions = sd[f"{name}_pos_embed.position_embeddings.weight"][:len(x)]
    return plain_norm(sd, f"{name}_pos_embed.LayerNorm", x + positions)


def plain_video(sd, branch, encoder, config, x, sizes=None):
    x, length = plain_tokens(sd, branch, x), len(x)
    windows = [torch.ones(length, length)] + [plain_window(w, length) for w in (0.5, 1, 5, 10, 3, 0.1, 8)]
    outputs = [plain_block(sd, f"{encoder}.attn{i}", config.heads, x, x, window, sizes)
               for i, window in enumerate(windows)]
    token, logits = sd["weight_token"].reshape(1, -1), []
    for output in outputs:
        summary = plain_block(sd, f"{encoder}.ca", config.heads, token, output, torch.ones(1, length))
        hidden = plain_linear(sd, f"{encoder}.layer1", summary).clamp(min=0)
        logits.append(plain_linear(sd, f"{encoder}.layer2", hidden)[0] / config.sft_factor)
    weights = torch.stack(logits).softmax(0) # (8, L)
    return sum(weight[:, None] * output for weight, output in zip(weights, outputs, strict=True))


def plain_query(sd, config, x):
    x = plain_tokens(sd, "query", x)
    y = plain_block(sd, "query_encoder", config.heads, x, x, torch.ones(len(x), len(x)))
    return (y @ sd["modular_vector_mapping.weight"][0]).softmax(0) @ y


@pytest.mark.parametrize("overrides", [{"heads": 1, "merge_schedule": (9, 5)},
                                       {"heads": 4, "sft_factor": 0.09, "merge_schedule": (6,)}], ids=str)
def test_model_equals_plain_oracle(overrides):
    model = random_model(**overrides)
    batch, c = random_batch(model.config, lengths=(3, 1, 5)), model.config
    sd = {name: t.detach().requires_grad_() for name, t in to_released(model.state_dict()).items()}
    plain = (torch.stack([plain_query(sd, c, x[m]) for x, m in zip(batch.tokens, batch.mask, strict=True)]),
             torch.stack([plain_video(sd, "frame", "frame_encoder_1", c, x) for x in batch.frames]),
             torch.stack([plain_video(sd, "clip", "clip_encoder", c, x, s)
                          for x, s in zip(batch.clips, batch.sizes, strict=True)]))
    torch.manual_seed(1)
    losses = [0, 0]
    for a, b in zip(model(batch), plain, strict=True):
        assert a.shape == b.shape
        assert_close(a, b, **close)
        weight = torch.randn_like(a)
        losses = [losses[0] + (a * weight).sum(), losses[1] + (b * weight).sum()]
    for loss in losses:
        loss.backward()
    held = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    gradients = to_released(held)
    for name, tensor in sd.items():
        expected = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert_close(gradients[name], expected, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("schedule", [(4, 3, 2), (2, 1), (1,)], ids=str)
def test_few_tokens_give_finite_embeddings(schedule):
    model = random_model(merge_schedule=schedule)
    for x in model(random_batch(model.config)):
        assert x.isfinite().all()


def test_padding_does_not_reach_query_embeddings():
    model = random_model()
    batch = random_batch(model.config)
    queries = model.query(batch.tokens, batch.mask)
    noisy = torch.where(batch.mask[..., None], batch.tokens, torch.randn_like(batch.tokens) * 100)
    assert torch.equal(model.query(noisy, batch.mask), queries)
    wider = F.pad(batch.tokens, (0, 0, 0, 20), value=5.), F.pad(batch.mask, (0, 20))
    assert_close(model.query(*wider), queries, **close)


def test_batch_composition_does_not_reach_embeddings():
    model = random_model()
    batch = random_batch(model.config)
    whole = model(batch)
    for i, n in enumerate(batch.mask.sum(1).tolist()):
        alone = model.query(batch.tokens[i:i + 1, :n], torch.ones(1, n, dtype=torch.bool))
        assert_close(alone[0], whole.queries[i], **close)
    for order in [2, 0, 1], [1], [2, 2]:
        frames, clips = model.encode_videos(batch.frames[order], batch.clips[order], batch.sizes[order])
        assert_close(frames, whole.frames[order], **close)
        assert_close(clips, whole.clips[order], **close)


def test_mean_pooling_is_the_mean_of_the_tokens():
    model, pooled = random_model(), random_model(pooling="mean", cbva=False)
    batch = random_batch(model.config)
    for mean, tokens in zip(pooled(batch)[1:], model(batch)[1:], strict=True):
        assert_close(mean, tokens.mean(1, keepdim=True))


def test_gradients_reach_every_parameter():
    model = random_model().train()
    batch = random_batch(model.config)
    e = model(batch)
    torch.manual_seed(1)
    sum((x * torch.randn_like(x)).sum() for x in (*e, model.cbva_projection(e.frames))).backward()
    for name, p in model.named_parameters():
        if name.endswith("to_logits.3.bias"): # shifts the logits of all eight blocks alike: softmax does not notice
            assert p.grad.abs().max() < 1e-4
        else:
            assert p.grad is not None and p.grad.abs().max() > 1e-4, name
    for branch in model.frame, model.clip: # every one of the eight blocks, in every one of its tensors
        for name, p in branch.gaussian.blocks.named_parameters():
            assert (p.grad.flatten(1).abs().amax(1) > 1e-5).all(), name
    used = model.clip.tokens.positions.weight.grad.any(1)
    assert used.tolist() == [True] * model.config.n_clips + [False] * (model.config.n_frames - model.config.n_clips)


def test_initial_weights():
    torch.manual_seed(0)
    model = PRVRModel(config(hidden_size=64, heads=4), 40, 40)
    for name, p in model.named_parameters():
        if name == "token":
            assert 0.7 < p.std() < 1.3
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert abs(p.mean()) < 0.01 and 0.015 < p.std() < 0.025, name


# ---------------------------------------------------------------- losses

def reached(loss, model):
    "Parts of the model that a loss has a gradient for."
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    names = (name.split(".")[0] for name, _ in model.named_parameters())
    return {name for name, g in zip(names, gradients, strict=True) if g is not None and g.any()}


def test_each_loss_reaches_its_own_part():
    model = random_model()
    batch = random_batch(model.config)
    losses = compute_losses(model, model(batch), batch, model.config, 0)
    video = {"token", "frame", "clip"}
    expected = {"clip_nce": {"query", "token", "clip"}, "clip_triplet": {"query", "token", "clip"},
                "frame_nce": {"query", "token", "frame"}, "frame_triplet": {"query", "token", "frame"},
                "cbva": {*video, "cbva_projection"}, "tcpl": {"query"}}
    assert {name: reached(loss, model) for name, loss in losses.items()} == expected
    paper = compute_losses(model, model(batch), batch, config(cbva_similarity="cosine"), 0)
    assert reached(paper["cbva"], model) == video


ROWS = {"base": dict(tcpl=False, cbva=False), "tcpl": dict(cbva=False), "mean": dict(pooling="mean", cbva=False),
        "full": {}, "paper": dict(PAPER, variant="paper"), **{name: {name: value} for name, value in PAPER.items()}}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_and_option_has_its_finite_losses(name):
    overrides = ROWS[name] | ({"merge_schedule": paper_schedule(32, 8)} if "merge_schedule" in ROWS[name] else {})
    model = random_model(**overrides, hard_negative_start_epoch=1)
    batch = random_batch(model.config)
    for epoch in 0, 1:
        losses = compute_losses(model, model(batch), batch, model.config, epoch)
        terms = ["clip_nce", "clip_triplet", "frame_nce", "frame_triplet"]
        assert list(losses) == terms + ["cbva"] * model.config.cbva + ["tcpl"] * model.config.tcpl
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_weights_and_twins():
    model = random_model()
    batch = random_batch(model.config)
    e, options = model(batch), dict(tcpl=True, lambda_cbva=0.5, lambda_distance=2., lambda_angle=0.)
    twice = {f: lambda *a, f=f, **k: 2 * f(*a, **k) for f in (info_nce, triplet_loss, cbva_loss, tcpl_loss)}
    found = []
    for settings, twins in (config(), None), (config(**options), None), (config(), twice):
        torch.manual_seed(0)
        found.append(compute_losses(model, e, batch, settings, 0, twins))
    plain, weighted, doubled = found
    assert_close(weighted["cbva"], plain["cbva"] * 5)
    assert_close(weighted["tcpl"], tcpl_loss(e.queries, batch.teacher, 2., 0.))
    for name, value in plain.items():
        assert_close(doubled[name], 2 * value)
