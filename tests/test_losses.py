"""CBVA against naive loops, and at the edges: one segment, large features."""
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.testing import assert_close

from prvr_nb.method.cbva import cbva_loss
from prvr_nb.method.tcpl import tcpl_loss

LAYOUTS = (8, 5, 3, 2)  # segments of the four videos of a batch


def cbva_batch(scale=1.0, seed=0, segments=LAYOUTS, dtype=torch.float32):
    "Videos of 24 frames and 8 clips of unequal sizes; clips are dealt to segments in turn, so segments are not contiguous."
    g = torch.Generator().manual_seed(seed)
    b = len(segments)
    extra = torch.randint(0, 8, (b, 16), generator=g)
    frame_to_clip = torch.cat([torch.arange(8).expand(b, 8), extra], 1).sort(1).values
    sizes = torch.zeros(b, 8, dtype=dtype).scatter_add_(1, frame_to_clip, torch.ones(b, 24, dtype=dtype))
    clip_to_segment = torch.stack([torch.arange(8) % n for n in segments])
    frames, clips = (scale * torch.randn(b, n, 6, generator=g).to(dtype) for n in (24, 8))
    return frames.requires_grad_(), clips.requires_grad_(), sizes, frame_to_clip, clip_to_segment


def segments_and_owners(frames, clips, sizes, frame_to_clip, clip_to_segment):
    "Of one video: (S, d) segment means and (L_f, S) which segment a frame belongs to, by loops."
    names = sorted(set(clip_to_segment.tolist()))
    means = []
    for s in names:
        members = [i for i, label in enumerate(clip_to_segment.tolist()) if label == s]
        means.append(sum(sizes[i] * clips[i] for i in members) / sum(sizes[i] for i in members))
    home = [clip_to_segment.tolist()[c] for c in frame_to_clip.tolist()]
    return torch.stack(means), torch.tensor([[h == s for s in names] for h in home])


def released_rows(logits, own, eps=1e-8):
    "The released formula: subtract the row's maximum, means of exp, 1e-8 in counts and denominator."
    e = (logits - logits.amax(1, keepdim=True)).exp()
    p, n = (e * own).sum(1) / (own.sum(1) + eps), (e * ~own).sum(1) / ((~own).sum(1) + eps)
    return -(p / (p + n + eps)).log()


def released_cbva(*batch):
    "Mean over videos of both directions, the teaching side detached."
    total = 0
    for video in zip(*batch):
        segments, own = segments_and_owners(*video)
        frames = video[0]
        total = total + released_rows(frames @ segments.detach().T, own).mean() + released_rows(segments @ frames.detach().T, own.T).mean()
    return total / len(batch[0])


def value_and_gradients(loss, batch):
    value = loss(*batch)
    return (value, *torch.autograd.grad(value, batch[:2]))


# CBVA


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_cbva_equals_the_released_formula_where_that_is_finite(scale, seed):
    ours, theirs = (value_and_gradients(f, cbva_batch(scale, seed)) for f in (cbva_loss, released_cbva))
    assert theirs[0].isfinite()
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cbva_is_finite_where_the_released_formula_is_not():
    assert released_cbva(*cbva_batch(100.0)).isinf()
    ours = value_and_gradients(cbva_loss, cbva_batch(100.0))
    exact = value_and_gradients(cbva_loss, cbva_batch(100.0, dtype=torch.float64))
    for a, b in zip(ours, exact):
        assert a.dtype == torch.float32 and a.isfinite().all() and a.abs().max() > 0
    assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("similarity", ["projected_dot", "cosine"])
@pytest.mark.parametrize("normalisation", ["mean", "softmax"])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 100.0, 1e4])
def test_every_variant_is_finite(similarity, normalisation, scale):
    results = value_and_gradients(lambda *b: cbva_loss(*b, similarity, normalisation), cbva_batch(scale))
    assert all(x.isfinite().all() for x in results)


def test_cbva_where_one_row_is_far_below_its_maximum():
    frames = torch.tensor([[[100.0], [-100.0]]], requires_grad=True)  # each frame looks like the other's segment
    clips = torch.tensor([[[-10.0], [10.0]]], requires_grad=True)
    maps = torch.ones(1, 2), torch.tensor([[0, 1]]), torch.tensor([[0, 1]])
    value, d_frames, d_clips = value_and_gradients(cbva_loss, (frames, clips, *maps))
    assert_close(value, torch.tensor(4000.0))  # 2000 for each direction, by hand
    assert_close(d_frames.flatten(), torch.tensor([10.0, -10.0]))  # half of g_other − g_own
    assert_close(d_clips.flatten(), torch.tensor([-100.0, 100.0]))


@pytest.mark.parametrize("normalisation", ["mean", "softmax"])
def test_one_segment_costs_nothing(normalisation):
    value, d_frames, d_clips = value_and_gradients(lambda *b: cbva_loss(*b, normalisation=normalisation), cbva_batch(segments=(1, 1)))
    assert value == 0 and (d_frames == 0).all() and (d_clips == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_sends_nan_backwards():
    "Rows of padding have neither positives nor negatives; anomaly mode sees NaN even where a mask hides it later."
    for normalisation in "mean", "softmax":
        with torch.autograd.detect_anomaly():
            value_and_gradients(lambda *b: cbva_loss(*b, normalisation=normalisation), cbva_batch(100.0, segments=(8, 3, 1)))


def test_one_segment_beside_videos_with_several():
    alone, mixed = cbva_batch(segments=(3,)), cbva_batch(segments=(3, 1))
    frames, clips, *maps = (torch.cat([a, m[1:]]) for a, m in zip(alone, mixed))
    frames, clips = frames.detach().requires_grad_(), clips.detach().requires_grad_()
    value, d_frames, d_clips = value_and_gradients(cbva_loss, (frames, clips, *maps))
    one = value_and_gradients(cbva_loss, alone)
    assert_close(value, one[0] / 2)
    assert_close(d_frames[0], one[1][0] / 2)
    assert (d_frames[1] == 0).all() and (d_clips[1] == 0).all()


@pytest.mark.parametrize("similarity", ["projected_dot", "cosine"])
@pytest.mark.parametrize("normalisation", ["mean", "softmax"])
def test_padding_segments_do_not_matter(similarity, normalisation):
    loss = lambda *b: cbva_loss(*b, similarity, normalisation)
    batch = cbva_batch()
    reference = value_and_gradients(loss, batch)
    names = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])  # the same segments under other numbers: padding lies between them
    renamed = value_and_gradients(loss, (*batch[:4], names[batch[4]]))
    each = torch.stack([loss(*(x[i:i + 1] for x in batch)) for i in range(len(LAYOUTS))])
    for a, b in zip(renamed, reference):
        assert_close(a, b)
    assert_close(each.mean(), reference[0])


def test_more_padding_does_not_matter():
    "The oracle has no padding at all; a video of two segments has room for six that it does not use."
    batch = cbva_batch(segments=(2,))
    for a, b in zip(value_and_gradients(cbva_loss, batch), value_and_gradients(released_cbva, batch)):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def directions(batch):
    "The two questions apart, both sides left free, by loops: frame → segment and segment → frame."
    by_frame, by_segment = 0, 0
    for video in zip(*batch):
        segments, own = segments_and_owners(*video)
        logits = video[0] @ segments.T
        by_frame = by_frame + released_rows(logits, own).mean() / len(batch[0])
        by_segment = by_segment + released_rows(logits.T, own.T).mean() / len(batch[0])
    return by_frame, by_segment


def test_frames_learn_from_the_first_question_and_clips_from_the_second():
    batch = cbva_batch()
    by_frame, by_segment = directions(batch)
    wanted = [torch.autograd.grad(q, batch[:2], retain_graph=True) for q in (by_frame, by_segment)]
    value, d_frames, d_clips = value_and_gradients(cbva_loss, batch)
    assert_close(value, by_frame + by_segment, rtol=1e-4, atol=1e-5)
    assert_close(d_frames, wanted[0][0], rtol=1e-4, atol=1e-5)
    assert_close(d_clips, wanted[1][1], rtol=1e-4, atol=1e-5)
    assert (wanted[1][0].abs() > 1e-3).any() and (wanted[0][1].abs() > 1e-3).any()  # what is stopped is not nothing


@pytest.mark.parametrize("normalisation", ["mean", "softmax"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_projection_of_all_tokens_and_the_short_way(normalisation, scale):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4).double()
    frames, clips, *maps = cbva_batch(scale, dtype=torch.float64)
    leaves = frames, clips, layer.weight, layer.bias
    short = cbva_loss(frames, clips, *maps, normalisation=normalisation, project=layer)
    long = cbva_loss(layer(frames), layer(clips), *maps, normalisation=normalisation)
    assert_close(short, long)
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in (short, long))):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_cosine_takes_no_projection():
    with pytest.raises(ValueError, match="project must be None"):
        cbva_loss(*cbva_batch(), "cosine", project=torch.nn.Linear(6, 6))


@pytest.mark.parametrize("segments", [LAYOUTS, (1, 3)])
def test_gradcheck(segments):
    "Of the form in which both sides learn; with stopped gradients, the change of the loss is not the gradient."
    frames, clips, *maps = cbva_batch(0.7, segments=segments, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f, c: cbva_loss(f, c, *maps, normalisation="softmax"), (frames, clips))


def test_no_loss_asks_the_device_for_a_value():
    "Tensors without values raise where code needs one: .item(), boolean indexing, nonzero, `if tensor`."
    with FakeTensorMode():
        frames, clips, student = (torch.randn(*shape, requires_grad=True) for shape in ((4, 24, 6), (4, 8, 6), (30, 16)))
        maps, layer = (torch.ones(4, 8), torch.zeros(4, 24, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)), torch.nn.Linear(6, 6)
        for options in {}, {"project": layer}, {"similarity": "cosine", "normalisation": "softmax"}:
            cbva_loss(frames, clips, *maps, **options).backward()
        for average in "all", "off_diagonal":
            tcpl_loss(student, torch.randn(30, 24), average=average).backward()
        assert frames.grad.shape == (4, 24, 6) and clips.grad.shape == (4, 8, 6) and student.grad.shape == (30, 16)
        with pytest.raises(DynamicOutputShapeException):
            student[student > 0]  # the mode does raise


def softmax_cbva(frames, clips, sizes, frame_to_clip, clip_to_segment, cosine):
    "The paper's form by loops: softmax sums, nothing detached."
    total = 0
    for video in zip(frames, clips, sizes, frame_to_clip, clip_to_segment):
        g, own = segments_and_owners(*video)
        f = video[0]
        if cosine: f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
        rows = [-((f[i] @ g.T).exp()[own[i]].sum() / (f[i] @ g.T).exp().sum()).log() for i in range(len(f))]
        columns = [-((f @ g[s]).exp()[own[:, s]].sum() / (f @ g[s]).exp().sum()).log() for s in range(len(g))]
        total = total + sum(rows) / len(rows) + sum(columns) / len(columns)
    return total / len(frames)


@pytest.mark.parametrize("similarity", ["projected_dot", "cosine"])
def test_softmax_variant(similarity):
    batch = cbva_batch()
    ours = value_and_gradients(lambda *b: cbva_loss(*b, similarity, "softmax"), batch)
    naive = value_and_gradients(lambda *b: softmax_cbva(*b, similarity == "cosine"), batch)
    for a, b in zip(ours, naive):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
