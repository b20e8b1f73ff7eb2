"""Uniformity, levels and bipartite merging against slow oracles: union-find, exact fractions, one video at a time."""
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from prvr_nb.method.segments import (
    bipartite_labels,
    choose_level,
    connected,
    cosines,
    gram_matrix,
    greedy_pairs,
    segment_labels,
    uniformity,
)
from prvr_nb.method.tokens import averaging_matrix, l2_normalise, op_tome, resample

LEVELS = (32, 20, 12, 8, 5)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


def members(labels):
    "Members of each label, in order."
    return [[i for i, label in enumerate(labels) if label == k] for k in range(max(labels) + 1)]


# ---- uniformity

def components(adjacent):
    "Union-find over a boolean matrix; the component of each index."
    parent = list(range(len(adjacent)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in product(range(len(adjacent)), repeat=2):
        if adjacent[i][j]:
            parent[root(i)] = root(j)
    return [root(i) for i in range(len(adjacent))]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 31, 32])
def test_connected(n):
    for seed in range(6):
        upper = torch.rand(4, n, n, generator=torch.Generator().manual_seed(seed)) < 0.5 * (1 + seed) / n
        adjacent = upper | upper.mT
        for got, given in zip(connected(adjacent), adjacent, strict=True):
            group = components(given.tolist())
            assert got.tolist() == [[a == b for b in group] for a in group]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 17, 32, 33, 65])
def test_connected_through_the_longest_chain_and_in_the_largest_group(n):
    chain = torch.eye(n + 1)[None].roll(1, 2)[:, :n, :n].bool()
    assert connected(chain | chain.mT).all()
    clique = torch.ones(1, n, n, dtype=torch.bool)
    clique[0, -1], clique[0, :, -1] = False, False
    assert connected(clique).sum() == (n - 1)**2 + 1


@pytest.mark.parametrize("tau", [-0.2, 0.3, 0.7])
def test_uniformity(tau):
    clips = l2_normalise(numbers(8, 32, 4, seed=3))
    unit = clips.double().numpy()
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    with_closure, without = uniformity(clips, tau), uniformity(clips, tau, closure=False)
    for x, closed, plain in zip(unit, with_closure.tolist(), without.tolist(), strict=True):
        alike = [[bool(a @ b > tau) for b in x] for a in x]
        group = components(alike)
        different = [(i, j) for i, j in product(range(32), repeat=2) if i != j]
        assert closed == sum(group[i] == group[j] for i, j in different) / 992
        assert plain == sum(alike[i][j] for i, j in different) / 992
        assert 0 <= plain <= closed <= 1
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniformity(clips[:, order], tau), with_closure)


def test_uniformity_counts_only_pairs_strictly_above_tau():
    clips = torch.tensor([[[1., 0.], [3., 4.]]], dtype=torch.double)  # cosine 0.6
    assert uniformity(clips, 0.6).item() == 0 and uniformity(clips, float(np.nextafter(0.6, 0))).item() == 1


@pytest.mark.parametrize("clips, tau, omega", [
    (torch.ones(1, 32, 4), 0.99, 1),  # a still video
    (torch.eye(32)[None], 0.1, 0),
    (torch.ones(1, 1, 4), 0.5, 0),  # a single clip has no pairs
    (torch.zeros(1, 3, 4), 0.5, 0),  # zero features are like nothing
])
def test_uniformity_of_degenerate_videos(clips, tau, omega):
    assert uniformity(clips, tau).item() == omega


# ---- levels

@pytest.mark.parametrize("n_levels", range(1, 9))
@pytest.mark.parametrize("n", [2, 4, 5, 6, 9, 10, 16, 32])
def test_choose_level_at_every_possible_omega(n, n_levels):
    total = n * (n - 1)
    omega = torch.arange(total + 1).double() / total  # the quotient that uniformity computes
    thresholds = [Fraction(k, n_levels) for k in range(1, n_levels)]
    exact = [Fraction(count, total) for count in range(total + 1)]
    reached, exceeded = choose_level(omega, n_levels), choose_level(omega, n_levels, strict=True)
    assert reached.tolist() == [sum(value >= t for t in thresholds) for value in exact]
    assert exceeded.tolist() == [sum(value > t for t in thresholds) for value in exact]


# ---- bipartite merging

def assigned(similarity, n_pairs):
    "One video: all pairs sorted once, taken from the top while both ends are free."
    ends = product(range(len(similarity)), range(len(similarity[0])))
    taken = []
    for a, b in sorted(ends, key=lambda pair: (-similarity[pair[0]][pair[1]], pair)):
        if len(taken) < n_pairs and all(a != other_a and b != other_b for other_a, other_b in taken):
            taken.append((a, b))
    return taken


def segments(clips, sizes, levels):
    "One video in float64: lists of clips, merged level by level; each mean comes from the original clips."
    groups = [[i] for i in range(len(clips))]
    for m in levels[1:]:
        means = np.stack([np.average(clips[g], axis=0, weights=sizes[g]) for g in groups])
        norm = np.linalg.norm(means, axis=1, keepdims=True)
        unit = np.divide(means, norm, out=np.zeros_like(means), where=norm > 0)
        pairs = assigned((unit[0::2] @ unit[1::2].T).tolist(), len(groups) - m)
        for a, b in pairs:
            groups[2 * a] = groups[2 * a] + groups[2 * b + 1]
        gone = {2 * b + 1 for _, b in pairs}
        groups = [g for i, g in enumerate(groups) if i not in gone]
    return [sorted(g) for g in groups]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3), (16, 16), (7, 6)])
@pytest.mark.parametrize("integer", [False, True])  # integers: nearly everything ties
def test_greedy_pairs(shape, integer):
    similarity = whole_numbers(-1, 2, 6, *shape, seed=4) if integer else numbers(6, *shape, seed=4)
    given = similarity.clone()
    for n_pairs in range(1, min(shape) + 1):
        a, b = greedy_pairs(similarity, n_pairs)
        for i in range(6):
            assert list(zip(a[i].tolist(), b[i].tolist(), strict=True)) == assigned(given[i].tolist(), n_pairs)
    assert torch.equal(similarity, given)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 32])
def test_bipartite_labels_with_exact_ties(n):
    # Vectors along the axes: every cosine is exactly −1, 0 or 1.
    axis, sign = whole_numbers(0, 3, 8, n, seed=n).long(), 2 * whole_numbers(0, 2, 8, n, seed=n + 1) - 1
    x = 4 * torch.nn.functional.one_hot(axis, 3) * sign[..., None]
    for m in range((n + 1) // 2, n):
        labels = bipartite_labels(cosines(gram_matrix(x)), m)
        for rows, got in zip(x.double().numpy(), labels.tolist(), strict=True):
            assert members(got) == segments(rows, np.ones(n), (n, m))


@pytest.mark.parametrize("n, m", [(32, 15), (5, 2), (32, 32), (8, 9)])
def test_bipartite_labels_refuses_impossible_steps(n, m):
    with pytest.raises(ValueError, match=f"{n} tokens cannot become {m}"):
        bipartite_labels(cosines(gram_matrix(numbers(1, n, 4))), m)


def test_cosines_of_tokens_that_cancel():
    x = torch.tensor([[[1., 2.], [-1., -2.], [3., 1.]]])
    average, _ = averaging_matrix(torch.ones(1, 3, dtype=torch.double), torch.tensor([[0, 0, 1]]), 2)
    merged = cosines(average @ gram_matrix(x) @ average.mT)
    assert merged[0, 0].tolist() == [0, 0] and merged.isfinite().all()


# ---- segments

@pytest.mark.parametrize("levels", [LEVELS, (32, 20, 12, 8, 6, 5), (20, 12, 8, 5), (7, 4, 3, 2), (5, 3), (2, 1), (32,)])
def test_segment_labels_at_every_level(levels):
    n, k = levels[0], len(levels)
    clips, sizes = l2_normalise(numbers(2 * k, n, 10, seed=6)), whole_numbers(1, 9, 2 * k, n, seed=7)
    level = torch.arange(2 * k) % k
    labels = segment_labels(clips, sizes, levels, level)
    assert labels.shape == clips.shape[:2]
    rows = zip(clips.double().numpy(), sizes.double().numpy(), level.tolist(), labels.tolist(), strict=True)
    for x, s, chosen, got in rows:
        assert members(got) == segments(x, s, levels[:chosen + 1])
        assert max(got) + 1 == levels[chosen]


def test_ties_of_any_single_frame_are_those_of_exact_numbers():
    # Clips of one frame are equal: every cosine is 1 on paper; sizes 8, 4, 2 and 1 make means that round differently.
    sizes = op_tome(resample(numbers(1, 48, seed=9), torch.tensor([1]))).sizes
    exact = torch.eye(4)[1].expand(1, 32, 4)
    assert choose_level(uniformity(exact, 0.8), 5).tolist() == [4]
    for k in range(5):
        level = torch.tensor([k])
        expected = segment_labels(exact, sizes, LEVELS, level)
        assert members(expected[0].tolist()) == segments(exact[0].numpy(), sizes[0].numpy(), LEVELS[:k + 1])
        for seed in range(20):
            clips = l2_normalise(numbers(1, 1, 48, seed=seed)).expand(1, 32, 48)
            assert torch.equal(segment_labels(clips, sizes, LEVELS, level), expected)


def test_a_gram_matrix_at_hand_changes_nothing():
    clips, sizes, level = numbers(5, 32, 8, seed=8), torch.full((5, 32), 4.), torch.arange(5)
    gram = gram_matrix(clips)
    kept = gram.clone()
    assert torch.equal(uniformity(clips, 0.3, True, gram), uniformity(clips, 0.3))
    assert torch.equal(segment_labels(clips, sizes, LEVELS, level, gram), segment_labels(clips, sizes, LEVELS, level))
    assert torch.equal(gram, kept)


def test_segments_do_not_depend_on_the_batch():
    frames = [numbers(T, 24, seed=T) for T in (1, 7, 31, 32, 50, 128, 300)]
    merged = op_tome(resample(torch.cat(frames), torch.tensor([len(f) for f in frames])))
    clips, level = l2_normalise(merged.tokens), torch.tensor([4, 3, 4, 2, 1, 4, 0])
    together, omega = segment_labels(clips, merged.sizes, LEVELS, level), uniformity(clips, 0.3)
    for i in range(len(frames)):
        one = slice(i, i + 1)
        assert torch.equal(segment_labels(clips[one], merged.sizes[one], LEVELS, level[one])[0], together[i])
        assert uniformity(clips[one], 0.3)[0] == omega[i]
