"""The retrieval losses and CBVA against naive loops, and at the edges: one video, one segment, one query, large features."""
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.testing import assert_close

from prvr_nb.method.cbva import cbva_loss
from prvr_nb.method.retrieval import cosine_scores, info_nce, max_scores, sample_negatives, triplet_loss
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


# scores


def test_scores_are_those_of_the_best_token():
    g = torch.Generator().manual_seed(0)
    queries, tokens = torch.randn(5, 8, generator=g), torch.randn(3, 6, 8, generator=g)
    raw = [[max((q @ t).item() for t in v) for v in tokens] for q in queries]
    cosine = [[max((q @ t / q.norm() / t.norm()).item() for t in v) for v in tokens] for q in queries]
    assert_close(max_scores(queries, tokens), torch.tensor(raw))
    assert_close(cosine_scores(queries, tokens), torch.tensor(cosine))
    assert cosine_scores(queries[:1], tokens).shape == (1, 3)


# InfoNCE


def naive_info_nce(scores, video):
    s, own = scores.double(), video.tolist()
    text = [-(s[q, own[q]].exp() / s[q].exp().sum()).log() for q in range(len(s))]
    videos = [-(sum(s[q, b].exp() for q in range(len(s)) if own[q] == b) / s[:, b].exp().sum()).log() for b in range(s.shape[1])]
    return sum(text) / len(text) + sum(videos) / len(videos)


RAGGED = torch.tensor([0, 0, 1, 2, 2, 2, 3])


@pytest.mark.parametrize("video", [RAGGED, RAGGED[torch.tensor([3, 0, 6, 4, 2, 1, 5])], torch.tensor([1, 0])], ids=["sorted", "shuffled", "one each"])
def test_info_nce(video):
    torch.manual_seed(0)
    scores = (3 * torch.randn(len(video), int(video.max()) + 1)).requires_grad_()
    ours, naive = info_nce(scores, video), naive_info_nce(scores, video)
    assert ours.shape == ()
    assert_close(ours.double(), naive, rtol=1e-5, atol=1e-6)
    assert_close(*(torch.autograd.grad(x, scores)[0] for x in (ours, naive)), rtol=1e-4, atol=1e-6)


def test_info_nce_of_large_scores_is_finite():
    scores = (1e4 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = info_nce(scores, RAGGED)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


# triplet


def naive_triplet(scores, video, margin, hard, pool):
    "Expectation over the draws: the hinge averaged over every negative of the pool."
    own, (n_queries, n_videos) = video.tolist(), scores.shape

    def expected(right, wrong, size):
        wrong = sorted(wrong, key=torch.Tensor.item, reverse=True)[:size]
        return sum((margin + w - right).clamp(min=0) for w in wrong) / len(wrong)

    video_side, query_side = [], []
    for b in range(n_videos):
        right = [scores[q, b] for q in range(n_queries) if own[q] == b]
        wrong = [scores[q, b] for q in range(n_queries) if own[q] != b]
        video_side.append(expected(sum(right) / len(right), wrong, 1 if hard else None))
    for q in range(n_queries):
        wrong = [scores[q, b] for b in range(n_videos) if b != own[q]]
        query_side.append(expected(scores[q, own[q]], wrong, pool if hard else None))
    return sum(video_side) / len(video_side) + sum(query_side) / len(query_side)


def cosines(seed=0, queries=7, videos=4):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(queries, videos, generator=g) * 2 - 1).requires_grad_()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("margin", [0.1, 0.2])
def test_triplet_with_the_hardest_negatives(seed, margin):
    scores = cosines(seed)
    ours, naive = triplet_loss(scores, RAGGED, margin, True, 1), naive_triplet(scores, RAGGED, margin, True, 1)
    assert_close(ours, naive)
    assert_close(*(torch.autograd.grad(x, scores)[0] for x in (ours, naive)))


@pytest.mark.parametrize("hard, pool", [(False, 20), (True, 2), (True, 3), (True, 20)])
def test_triplet_with_drawn_negatives_on_average(hard, pool):
    torch.manual_seed(0)
    scores = cosines().detach()
    drawn = torch.stack([triplet_loss(scores, RAGGED, 0.2, hard, pool) for _ in range(1500)])
    error = drawn.std() / len(drawn) ** 0.5
    assert error > 0
    assert abs(drawn.mean() - naive_triplet(scores, RAGGED, 0.2, hard, pool)) < 4 * error


def test_a_pool_larger_than_the_other_videos_holds_all_of_them():
    scores = cosines().detach()
    for pool in 3, 4, 20, 10**6:
        torch.manual_seed(0)
        loss = triplet_loss(scores, RAGGED, 0.2, True, pool)
        torch.manual_seed(0)
        assert loss == triplet_loss(scores, RAGGED, 0.2, True, scores.shape[1] - 1)
        assert loss.isfinite()


@pytest.mark.parametrize("hard", [False, True])
def test_triplet_of_one_video(hard):
    scores = cosines(queries=3, videos=1)
    loss = triplet_loss(scores, torch.zeros(3, dtype=torch.long), 0.2, hard)
    loss.backward()
    assert loss == 0 and scores.grad.shape == (3, 1) and (scores.grad == 0).all()


@pytest.mark.parametrize("hard", [False, True])
def test_one_query(hard):
    scores, video = cosines(queries=1, videos=1), torch.tensor([0])
    loss = triplet_loss(scores, video, 0.2, hard) + info_nce(scores, video)
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()


@pytest.mark.parametrize("hard", [False, True])
def test_one_query_per_video(hard):
    scores, video = cosines(queries=2, videos=2), torch.tensor([1, 0])
    assert_close(triplet_loss(scores, video, 0.2, hard), naive_triplet(scores, video, 0.2, hard, 20))  # one negative each: no chance


@pytest.mark.parametrize("pool, size", [(None, 9), (20, 9), (9, 9), (4, 4), (1, 1)])
def test_negatives_are_never_the_own_video_and_uniform_in_their_pool(pool, size):
    torch.manual_seed(0)
    n = 9000
    row = torch.tensor([0.9, -0.3, 0.5, 0.1, 0.8, -0.9, 0.2, 0.7, -0.1, 0.4])
    own = torch.arange(n) % 10  # every candidate is the own one in a tenth of the rows
    allowed = F.one_hot(own, 10) == 0
    chosen = sample_negatives(row.expand(n, 10), allowed, pool)
    assert chosen.shape == (n,) and (chosen != own).all()
    place = row.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1).gather(1, chosen[:, None])[:, 0]
    assert place.max() < size
    counts = place.bincount(minlength=size).double()
    chi_square = ((counts - n / size) ** 2 / (n / size)).sum()
    assert chi_square < 30  # 8 degrees of freedom at most: exceeded by chance once in 5,000 seeds


def test_negatives_of_neighbouring_rows_are_independent():
    torch.manual_seed(0)
    chosen = sample_negatives(torch.zeros(20000, 3), torch.ones(20000, 3, dtype=torch.bool), None).unflatten(0, (-1, 2))
    counts = (3 * chosen[:, 0] + chosen[:, 1]).bincount(minlength=9).double()
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 30


def test_choosing_a_negative_passes_no_gradient():
    scores = cosines()
    chosen = sample_negatives(scores, torch.ones(7, 4, dtype=torch.bool), None)
    assert chosen.dtype == torch.long and not chosen.requires_grad
