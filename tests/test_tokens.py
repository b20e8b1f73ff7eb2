"""Resampling and OP-ToMe against slow oracles, one video at a time, and the laws that both obey."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from prvr_nb.method.tokens import (
    Merged,
    averaging_matrix,
    group_means,
    l2_normalise,
    merge_step,
    op_tome,
    resample,
    resample_bounds,
    uniform_clips,
)

SCHEDULE = (128, 80, 52, 32)


def numbers(*shape, seed=0, integer=False):
    "Seeded random numbers; integers are −1, 0 or 1."
    generator = torch.Generator().manual_seed(seed)
    if integer:
        return torch.randint(-1, 2, shape, generator=generator).float()
    return torch.randn(shape, generator=generator)


def members(labels):
    "Members of each label, in order."
    return [[i for i, label in enumerate(labels) if label == k] for k in range(max(labels) + 1)]


# ---- resampling

def resampled(frames, n_tokens):
    "One video, in numpy's float32, every token from the rule's text."
    T, b = len(frames), []
    for i in range(n_tokens + 1):
        b.append(min(int(np.rint(np.float32(i) / np.float32(n_tokens) * np.float32(T))), T - 1))
    return np.stack([frames[b[i]:max(b[i + 1], b[i] + 1)].astype(np.float64).mean(0) for i in range(n_tokens)])


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 64, 128])
def test_resample_every_length(n_tokens):
    lengths = list(range(1, 20)) + [63, 64, 65, 127, 128, 129, 191, 192, 193, 333, 1000]
    videos = [numbers(T, 5, seed=T) for T in lengths]
    tokens = resample(torch.cat(videos), torch.tensor(lengths), n_tokens)
    assert tokens.shape == (len(lengths), n_tokens, 5)
    for video, got in zip(videos, tokens, strict=True):
        assert_close(got.double(), torch.from_numpy(resampled(video.numpy(), n_tokens)), rtol=1e-5, atol=1e-5)
        assert torch.equal(resample(video, torch.tensor([len(video)]), n_tokens)[0], got)  # videos do not mix


def test_half_way_cases_go_to_the_even_frame():
    assert resample_bounds(torch.tensor([4]), 8).tolist() == [[0, 0, 1, 2, 2, 2, 3, 3, 3]]  # 0.5→0, 1.5→2, 2.5→2
    assert resample_bounds(torch.tensor([12]), 8).tolist() == [[0, 2, 3, 4, 6, 8, 9, 10, 11]]


def test_resample_of_one_frame_and_of_as_many_frames_as_tokens():
    one, full = numbers(1, 6), numbers(128, 6)
    tokens = resample(torch.cat([one, full]), torch.tensor([1, 128]))
    assert torch.equal(tokens[0], one.expand(128, 6)) and torch.equal(tokens[1], full)


@pytest.mark.parametrize("T, missing", [(1, 0), (87, 0), (128, 0), (256, 1), (1000, 1)])
def test_only_the_last_frame_of_a_long_video_is_in_no_token(T, missing):
    tokens = resample(torch.eye(T), torch.tensor([T]))[0]
    assert (tokens.sum(0) == 0).nonzero()[:, 0].tolist() == list(range(T - missing, T))


@pytest.mark.parametrize("n_frames", [[5, 0], [2, 2], [3, 3], [6, -1]])
def test_resample_refuses_lengths_that_do_not_fit(n_frames):
    with pytest.raises(ValueError, match="5 frames cannot be shared out"):
        resample(numbers(5, 3), torch.tensor(n_frames))


def test_l2_normalise():
    x = torch.tensor([[3., 4.], [0., 0.], [-1e-5, 0.]])
    expected = torch.tensor([[3 / 5.00001, 4 / 5.00001], [0., 0.], [-0.5, 0.]])
    assert_close(l2_normalise(x), expected)
    assert l2_normalise(x, out=x) is x
    assert_close(x, expected)


# ---- groups and equal clips

def test_group_means_weigh_by_size():
    tokens, sizes = torch.tensor([[[1.], [5.], [9.]]]), torch.tensor([[1., 3., 2.]])
    labels = torch.tensor([[2, 2, 0]])
    means, total = group_means(tokens, sizes, labels, 4)
    assert means.tolist() == [[[9.], [0.], [4.], [0.]]] and total.tolist() == [[2., 0., 4., 0.]]  # 4 = (1·1 + 3·5)/4
    assert averaging_matrix(sizes, labels, 4)[0].sum(2).tolist() == [[1., 0., 1., 0.]]  # empty groups have zeros


def test_group_means_pass_the_gradient_on():
    tokens = numbers(2, 6, 3).double().requires_grad_()
    sizes, labels = torch.ones(2, 6, dtype=torch.double), torch.tensor([[0, 0, 2, 2, 2, 1], [4, 4, 4, 4, 4, 4]])
    assert torch.autograd.gradcheck(lambda x: group_means(x, sizes, labels, 5)[0], tokens)


@pytest.mark.parametrize("n, m", [(128, 32), (10, 3), (7, 7), (5, 1), (127, 32)])
def test_uniform_clips(n, m):
    x = numbers(2, n, 3)
    clips = uniform_clips(x, m)
    for i in range(2):
        groups = members(clips.labels[i].tolist())
        assert sum(groups, []) == list(range(n)) and len(groups) == m
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert clips.sizes[i].tolist() == [len(g) for g in groups]
        assert_close(clips.tokens[i], torch.stack([x[i, g].mean(0) for g in groups]))


# ---- OP-ToMe

def merged_slowly(rows, schedule, similarity="dot"):
    "One video in float64: groups of tokens, their means, the best pairs joined from the back."
    groups = [[k] for k in range(len(rows))]
    for m in schedule[1:]:
        means = np.stack([rows[g].mean(0) for g in groups])
        if similarity == "cosine":
            means /= np.linalg.norm(means, axis=1, keepdims=True)
        left = range(0, len(groups) - 1, 2)
        best = sorted(left, key=lambda i: (-(means[i] @ means[i + 1]), i))[:len(groups) - m]  # ties: the earliest
        for i in sorted(best, reverse=True):
            groups[i] += groups.pop(i + 1)
    return groups


@pytest.mark.parametrize("schedule", [SCHEDULE, (64, 40, 32), (127, 80, 53, 31), (9, 5, 3, 2, 1), (33, 17, 16), (1,)])
@pytest.mark.parametrize("kind", ["dot", "cosine", "ties"])
def test_op_tome(schedule, kind):
    # The features of "ties" are multiples of lcm(1…8), and no clip exceeds eight tokens here (the last step to a single
    # clip has no choice): means and dot products are exact in float32, and so are their many ties.
    x = 840 * numbers(8, schedule[0], 4, integer=True) if kind == "ties" else numbers(4, schedule[0], 12, seed=5)
    similarity = "dot" if kind == "ties" else kind
    merged = op_tome(x, schedule, similarity)
    for i, rows in enumerate(x.double().numpy()):
        groups = merged_slowly(rows, schedule, similarity)
        assert members(merged.labels[i].tolist()) == groups
        assert merged.sizes[i].tolist() == [len(group) for group in groups]
        means = torch.from_numpy(np.stack([rows[g].mean(0) for g in groups]))
        assert_close(merged.tokens[i].double(), means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_op_tome_laws(similarity):
    x = numbers(10, 128, 8, seed=1)
    merged = op_tome(x, SCHEDULE, similarity)
    assert set(merged.labels.diff(dim=1).unique().tolist()) == {0, 1}  # the order is kept and no label is skipped
    assert (merged.labels[:, 0] == 0).all() and (merged.labels[:, -1] == 31).all()
    means, sizes = group_means(x, torch.ones(10, 128), merged.labels, 32)
    assert_close(merged.tokens, means)  # a clip is the plain mean of its frame tokens
    assert torch.equal(merged.sizes, sizes) and sizes.max() <= 2**3
    assert torch.equal(op_tome(4 * x, SCHEDULE, similarity).labels, merged.labels)
    backwards = op_tome(x.flip(1), SCHEDULE, similarity).labels.flip(1)  # with even counts there is no first or last
    assert torch.equal(31 - backwards, merged.labels)


def test_op_tome_of_one_frame_takes_the_earliest_pairs():
    for seed in range(5):
        merged = op_tome(resample(numbers(1, 32, seed=seed), torch.tensor([1])))
        assert merged.sizes.tolist() == [[8.] * 12 + [4.] * 2 + [2.] * 6 + [1.] * 12]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_op_tome_does_not_depend_on_the_batch(similarity):
    x = torch.cat([numbers(5, 128, 16), resample(numbers(40, 16), torch.tensor([1, 2, 37]))])
    together = op_tome(x, SCHEDULE, similarity)
    for i in range(8):
        for part, whole in zip(op_tome(x[i:i + 1], SCHEDULE, similarity), together, strict=True):
            assert torch.equal(part[0], whole[i])


def test_merge_step_weighs_by_size_and_leaves_its_input_alone():
    labels = torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2]])
    before = Merged(torch.tensor([[[0.], [6.], [1.]]]), torch.tensor([[2., 1., 5.]]), labels)
    copies = [part.clone() for part in before]
    after = merge_step(before, 2)
    assert_close(after.tokens, torch.tensor([[[2.], [1.]]]))
    assert after.sizes.tolist() == [[3., 5.]] and after.labels.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    assert all(torch.equal(part, copy) for part, copy in zip(before, copies, strict=True))


@pytest.mark.parametrize("schedule", [(128, 63), (128, 129), (128, 80, 39), (128, 0)])
def test_op_tome_refuses_impossible_steps(schedule):
    with pytest.raises(ValueError, match=f"tokens cannot become {schedule[-1]}"):
        op_tome(numbers(2, 128, 4), schedule)


def test_op_tome_refuses_an_unknown_similarity():
    with pytest.raises(ValueError, match="'euclid'"):
        op_tome(numbers(1, 128, 4), similarity="euclid")
