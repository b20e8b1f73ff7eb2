"""Every row of tests/golden/README.md against our code: the released code's values and gradients on seeded inputs.

`PRVR_GOLDEN` names the directories to compare with, separated by colons; the default is tests/golden.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from prvr_nb.config import published_config
from prvr_nb.evaluation.metrics import ranks, retrieval_metrics
from prvr_nb.method.cbva import cbva_loss
from prvr_nb.method.encoder import gaussian_window
from prvr_nb.method.model import Batch, PRVRModel, compute_losses
from prvr_nb.method.retrieval import cosine_scores, info_nce, max_scores, triplet_loss
from prvr_nb.method.segments import choose_level, segment_labels, uniformity
from prvr_nb.method.tcpl import tcpl_loss
from prvr_nb.method.tokens import l2_normalise, op_tome, resample
from prvr_nb.training.checkpoints import build_model, from_released, to_released
from prvr_nb.training.fast import TWINS, use_fast_modules
from prvr_nb.training.optimizer import BertAdam, parameter_groups, warmup_linear

DEFAULT = Path(__file__).with_name("golden")
DIRECTORIES = [Path(d) for d in os.environ.get("PRVR_GOLDEN", str(DEFAULT)).split(":") if d]
close = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=DIRECTORIES, ids=str)
def golden(request):
    "Loader of one directory's arrays as tensors."
    def load(name):
        with np.load(request.param / f"{name}.npz", allow_pickle=False) as held:
            return {key: torch.from_numpy(held[key]) for key in held.files}
    return load


def test_resampling_and_op_tome(golden):
    held = golden("resample_and_op_tome")
    lengths = sorted(int(key.split("_")[1]) for key in held if key.startswith("video_"))
    assert len(lengths) >= 2
    videos = [held[f"video_{t}"] for t in lengths]
    tokens = resample(torch.cat(videos), torch.tensor(lengths))  # all lengths in one ragged batch
    merged = op_tome(tokens)
    for i, t in enumerate(lengths):
        assert_close(tokens[i], held[f"frames_{t}"], **close)
        assert_close(l2_normalise(tokens[i]), held[f"frames_l2_{t}"], **close)
        if f"clips_{t}" not in held:
            continue
        assert torch.equal(merged.labels[i], held[f"labels_{t}"])
        assert torch.equal(merged.sizes[i], held[f"sizes_{t}"])
        assert_close(merged.tokens[i], held[f"clips_{t}"], **close)
        assert_close(l2_normalise(merged.tokens[i]), held[f"clips_l2_{t}"], **close)


def test_gaussian_windows(golden):
    for key, window in golden("gaussian_windows").items():
        width, length = key[1:].split("_L")
        assert_close(gaussian_window(float(width), int(length)), window, **close)


@pytest.fixture(params=["clear", "fast"])
def twins(request):
    "What makes the losses and the layers of a form: fast functions by clear ones, and a change of the model in place."
    return (TWINS, use_fast_modules) if request.param == "fast" else ({}, lambda model: model)


def batch_and_model(golden, twins):
    "The golden batch, its segments made by our code, and a model with the golden weights."
    held = golden("model")
    state = {key.removeprefix("sd/"): value for key, value in held.items() if key.startswith("sd/")}
    config = published_config("tvr", hidden_size=16, dropout=0., tau=0.7, hard_pool_size=1, hard_negative_start_epoch=0)
    model = build_model(from_released(state), config, "golden/model.npz")
    clips, mask = held["clips"], held["text_mask"].bool()
    level = choose_level(uniformity(clips, config.tau), len(config.levels))
    segments = segment_labels(clips, held["sizes"], config.levels, level)
    teacher = held["text"][torch.arange(len(mask)), mask.sum(1) - 1]
    batch = Batch(held["frames"], clips, held["sizes"], held["labels"], segments, held["text"], mask, teacher,
                  held["text_labels"])
    return held, state, config, twins[1](model), batch


def test_model(golden, twins):
    held, state, config, model, batch = batch_and_model(golden, twins)
    e = model(batch)
    assert_close(batch.teacher, held["teacher"], **close)
    assert_close(e.queries, held["query"], **close)
    assert_close(cosine_scores(e.queries, e.clips), held["clip_scores"], **close)
    assert_close(max_scores(e.queries, e.clips), held["clip_scores_raw"], **close)
    assert_close(cosine_scores(e.queries, e.frames), held["frame_scores"], **close)
    assert_close(max_scores(e.queries, e.frames), held["frame_scores_raw"], **close)
    assert_close(model.cbva_projection(e.clips), held["clip_proj"], **close)
    assert_close(model.cbva_projection(e.frames), held["frame_proj"], **close)
    assert_close(uniformity(batch.clips, config.tau), held["diversity"], **close)


def test_released_names_round_trip(golden, twins):
    _, state, _, model, _ = batch_and_model(golden, twins)
    back = to_released(model.state_dict())
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name


TERMS = {"clip_nce": "clip_nce", "clip_trip": "clip_triplet", "frame_nce": "frame_nce", "frame_trip": "frame_triplet",
         "vidlvlctl": "cbva", "txt_rkd": "tcpl"}


def test_losses_and_gradients(golden, twins):
    held, (_, _, config, model, batch) = golden("losses"), batch_and_model(golden, twins)
    losses = compute_losses(model, model(batch), batch, config, epoch=0, twins=twins[0])
    for theirs, ours in TERMS.items():
        assert_close(losses[ours], held[theirs].float(), **close)
    total = sum(losses.values())
    assert_close(total, held["total"], **close)
    segments = (batch.clip_to_segment.max(1).values + 1).double().mean()
    assert_close(segments, held["clip_num"])
    total.backward()
    gradients = to_released({name: p.grad for name, p in model.named_parameters()})
    expected = {key.removeprefix("grad/"): value for key, value in held.items() if key.startswith("grad/")}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_cbva_for_every_number_of_segments(golden):
    held = golden("cbva_by_rank")
    levels = published_config("tvr").levels
    for number, r in enumerate(levels):
        segments = segment_labels(held["clips_in"], held["sizes"], levels, torch.full((len(held["clips_in"]),), number))
        assert (segments.max(1).values + 1 == r).all() and int(held[f"segments_{r}"]) == r
        frame, clip = held["frame"].clone().requires_grad_(), held["clip"].clone().requires_grad_()
        loss = cbva_loss(frame, clip, held["sizes"], held["labels"], segments)
        loss.backward()
        assert_close(loss, held[f"loss_{r}"], **close)
        assert_close(frame.grad, held[f"dframe_{r}"], **close)
        assert_close(clip.grad, held[f"dclip_{r}"], **close)


@pytest.mark.parametrize("name", ["tcpl_a", "tcpl_b"])
def test_tcpl(golden, twins, name):
    held, loss_of = golden(name), twins[0].get(tcpl_loss, tcpl_loss)
    for term, weights in ("distance", (1., 0.)), ("angle", (0., 1.)):
        student = held["student"].clone().requires_grad_()
        loss = loss_of(student, held["teacher"], *weights)
        loss.backward()
        assert_close(loss, held[term], **close)
        assert_close(student.grad, held[f"d_{term}"], **close)


def test_retrieval_losses(golden):
    held = golden("retrieval_losses")
    raw, cosine = held["raw_scores"].requires_grad_(), held["cos_scores"].requires_grad_()
    nce = info_nce(raw, held["text_labels"])
    hinge = triplet_loss(cosine, held["text_labels"], 0.1, hard=True, hard_pool_size=1)
    (nce + hinge).backward()
    assert_close(nce, held["nce"], **close)
    assert_close(raw.grad, held["d_nce"], **close)
    assert_close(hinge, held["triplet_hard_pool1_margin01"], **close)
    assert_close(cosine.grad, held["d_triplet"], **close)


def test_bert_adam(golden):
    held = golden("bert_adam")
    p0, p1 = (torch.nn.Parameter(held[name].clone()) for name in ("p0", "p1"))
    optimizer = BertAdam([dict(params=[p0], weight_decay=0.01), dict(params=[p1], weight_decay=0.)], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: warmup_linear(t / 50, 0.1))
    for x, y, after in zip(held["X"], held["Y"], held["trajectory"], strict=True):
        optimizer.zero_grad()
        (5 * (p0 * x).sum() + 0.1 * (p1 * y).pow(2).sum()).backward()
        optimizer.step()
        schedule.step()
        assert_close(torch.cat([p0.detach().flatten(), p1.detach()]), after, **close)


def test_metrics(golden):
    held = golden("metrics")
    row = retrieval_metrics(ranks(held["scores"], held["gt"]))
    recalls = torch.tensor([row[k] for k in ("r1", "r5", "r10", "r100")], dtype=torch.double)
    assert_close(recalls, held["recalls"].double(), **close)


def test_trajectory(golden, twins):
    held, (_, _, config, model, batch) = golden("trajectory"), batch_and_model(golden, twins)
    model.train()
    total = int(held["t_total"])
    optimizer = BertAdam(parameter_groups(model), lr=held["lr"].item())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: warmup_linear(t / total, held["warmup"].item()))
    for step, expected in enumerate(held["losses"]):
        losses = compute_losses(model, model(batch), batch, config, epoch=0, twins=twins[0])
        row = torch.stack([sum(losses.values())] + [losses[ours] for ours in TERMS.values()]).double()
        assert_close(row, expected, **close, msg=lambda text, step=step: f"step {step}: {text}")
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()


def test_published_size():
    for widths, size in ((768, 768), 30_660_640), ((2816, 512), 32_142_880):
        assert sum(p.numel() for p in PRVRModel(published_config("tvr"), *widths).parameters()) == size
