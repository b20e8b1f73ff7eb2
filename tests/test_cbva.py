"""CBVA against the released formula in loops, and at the edges: one segment, padding, huge dot products."""
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from prvr_nb.method.cbva import cbva_loss

LAYOUTS = (8, 5, 3, 2)  # segments of the four videos of a batch
CLOSE = dict(rtol=1e-4, atol=1e-5)
FORMS = [("projected_dot", "mean"), ("projected_dot", "softmax"), ("cosine", "mean"), ("cosine", "softmax")]


def batch_of(scale=1.0, seed=0, segments=LAYOUTS, dtype=torch.float32):
    "Videos of 24 frames and 8 clips of unequal sizes; clips are dealt to segments in turn, so segments are scattered."
    g = torch.Generator().manual_seed(seed)
    b = len(segments)
    others = torch.randint(0, 8, (b, 16), generator=g)
    frame_to_clip = torch.cat([torch.arange(8).expand(b, 8), others], 1).sort(1).values
    sizes = torch.zeros(b, 8, dtype=dtype).scatter_add_(1, frame_to_clip, torch.ones(b, 24, dtype=dtype))
    clip_to_segment = torch.stack([torch.arange(8) % n for n in segments])
    frames, clips = (scale * torch.randn(b, n, 6, generator=g).to(dtype) for n in (24, 8))
    return frames.requires_grad_(), clips.requires_grad_(), sizes, frame_to_clip, clip_to_segment


def with_gradients(loss, batch, *options):
    value = loss(*batch, *options)
    return (value, *torch.autograd.grad(value, batch[:2]))


def segments_and_owners(frames, clips, sizes, frame_to_clip, clip_to_segment):
    "Of one video: (S, d) segment means and (L_f, S) which segment a frame belongs to, by loops."
    labels = clip_to_segment.tolist()
    names, means = sorted(set(labels)), []
    for s in names:
        members = [i for i, label in enumerate(labels) if label == s]
        means.append(sum(sizes[i] * clips[i] for i in members) / sum(sizes[i] for i in members))
    return torch.stack(means), torch.tensor([[labels[c] == s for s in names] for c in frame_to_clip.tolist()])


def released_rows(logits, own, eps=1e-8):
    "The released formula: subtract the row's maximum, means of exp, 1e-8 in counts and denominator."
    e = (logits - logits.amax(1, keepdim=True)).exp()
    p, n = (e * own).sum(1) / (own.sum(1) + eps), (e * ~own).sum(1) / ((~own).sum(1) + eps)
    return -(p / (p + n + eps)).log()


def questions(*batch, detach=lambda x: x):
    "Frame → segment and segment → frame by loops, means over videos; `detach` is done to the side that teaches."
    by_frame, by_segment = [], []
    for video in zip(*batch, strict=True):
        frames, (segments, own) = video[0], segments_and_owners(*video)
        by_frame.append(released_rows(frames @ detach(segments).T, own).mean())
        by_segment.append(released_rows(segments @ detach(frames).T, own.T).mean())
    return torch.stack(by_frame).mean(), torch.stack(by_segment).mean()


def released_cbva(*batch):
    return sum(questions(*batch, detach=torch.detach))


def softmax_cbva(frames, clips, sizes, frame_to_clip, clip_to_segment, similarity, normalisation):
    "The paper's form by loops: softmax sums, nothing detached."
    total = 0
    for video in zip(frames, clips, sizes, frame_to_clip, clip_to_segment, strict=True):
        f, (g, own) = video[0], segments_and_owners(*video)
        if similarity == "cosine":
            f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
        e = (f @ g.T).exp()
        rows = [-(e[i, own[i]].sum() / e[i].sum()).log() for i in range(len(f))]
        columns = [-(e[own[:, s], s].sum() / e[:, s].sum()).log() for s in range(len(g))]
        total = total + sum(rows) / len(rows) + sum(columns) / len(columns)
    return total / len(frames)


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("segments", [LAYOUTS, (2,)])
def test_the_released_formula_where_that_is_finite(scale, segments):
    "The oracle has no padding; a video of two segments has room for six that it does not use."
    ours, theirs = (with_gradients(loss, batch_of(scale, segments=segments)) for loss in (cbva_loss, released_cbva))
    assert theirs[0].isfinite()
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("similarity", ["projected_dot", "cosine"])
def test_the_form_of_the_paper(similarity):
    ours, theirs = (with_gradients(loss, batch_of(), similarity, "softmax") for loss in (cbva_loss, softmax_cbva))
    assert_close(ours, theirs, **CLOSE)


def test_finite_where_the_released_formula_is_not():
    assert released_cbva(*batch_of(100.0)).isinf()
    ours, exact = (with_gradients(cbva_loss, batch_of(100.0, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in ours)
    assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)


def test_one_row_far_below_its_maximum():
    frames = torch.tensor([[[100.0], [-100.0]]], requires_grad=True)  # each frame looks like the other's segment
    clips = torch.tensor([[[-10.0], [10.0]]], requires_grad=True)
    maps = torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    value, d_frames, d_clips = with_gradients(cbva_loss, (frames, clips, *maps))
    assert_close(value, torch.tensor(4000.0))  # 2000 for each direction, by hand
    assert_close(d_frames.flatten(), torch.tensor([10.0, -10.0]))  # half of g_other − g_own
    assert_close(d_clips.flatten(), torch.tensor([-100.0, 100.0]))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0, 1e4])
def test_every_form_is_finite(form, scale):
    "Rows of padding have neither positives nor negatives; anomaly mode sees NaN even where a mask hides it later."
    with torch.autograd.detect_anomaly():
        results = with_gradients(cbva_loss, batch_of(scale, segments=(8, 3, 1)), *form)
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("form", FORMS)
def test_one_segment_costs_nothing(form):
    value, d_frames, d_clips = with_gradients(cbva_loss, batch_of(segments=(1, 1)), *form)
    assert value == 0 and (d_frames == 0).all() and (d_clips == 0).all()


def test_no_structure_costs_log_4():
    flat = cbva_loss(torch.ones(4, 24, 6), torch.ones(4, 8, 6), *batch_of()[2:])
    assert_close(flat, torch.tensor(4.).log())


@pytest.mark.parametrize("form", FORMS)
def test_a_video_costs_the_same_in_any_company(form):
    "Neither other videos of the batch nor the numbers of its segments matter: padding may lie between them."
    batch = batch_of(segments=(*LAYOUTS, 1))
    reference = with_gradients(cbva_loss, batch, *form)
    names = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    assert_close(with_gradients(cbva_loss, (*batch[:4], names[batch[4]]), *form), reference)
    each = [with_gradients(cbva_loss, [x[i:i + 1].detach().requires_grad_(x.requires_grad) for x in batch], *form)
            for i in range(5)]
    assert_close(torch.stack([value for value, _, _ in each]).mean(), reference[0])
    assert_close(torch.cat([d_frames for _, d_frames, _ in each]) / 5, reference[1])


def test_frames_learn_from_the_first_question_and_clips_from_the_second():
    batch = batch_of()
    by_frame, by_segment = questions(*batch)
    frames_first, clips_first = torch.autograd.grad(by_frame, batch[:2], retain_graph=True)
    frames_second, clips_second = torch.autograd.grad(by_segment, batch[:2])
    assert_close(with_gradients(cbva_loss, batch), (by_frame + by_segment, frames_first, clips_second), **CLOSE)
    assert frames_second.abs().max() > 1e-3 and clips_first.abs().max() > 1e-3  # what is stopped is not nothing


@pytest.mark.parametrize("form", FORMS)
def test_the_projection_comes_first_and_learns_from_both_branches(form):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    frames, clips, *maps = batch_of(dtype=torch.float64)
    leaves = frames, clips, layer.weight, layer.bias
    inside = cbva_loss(frames, clips, *maps, *form, layer)
    outside = cbva_loss(layer(frames), layer(clips), *maps, *form)
    gradients = torch.autograd.grad(inside, leaves)
    assert_close((inside, *gradients), (outside, *torch.autograd.grad(outside, leaves)))
    assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("segments", [LAYOUTS, (1, 3)])
def test_gradcheck(segments):
    "Of the form in which both sides learn; with stopped gradients, the change of the loss is not the gradient."
    frames, clips, *maps = batch_of(0.7, segments=segments, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, c: cbva_loss(f, c, *maps, normalisation="softmax"), (frames, clips))


@pytest.mark.parametrize("form", FORMS)
def test_the_device_is_never_asked_for_a_value(form):
    "Tensors without values raise where code needs one."
    with FakeTensorMode():
        frames, clips = (torch.randn(4, n, 6, requires_grad=True) for n in (24, 8))
        maps = torch.ones(4, 8), torch.zeros(4, 24, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)
        cbva_loss(frames, clips, *maps, *form, nn.Linear(6, 6)).backward()
        assert frames.grad.shape == (4, 24, 6) and clips.grad.shape == (4, 8, 6)
