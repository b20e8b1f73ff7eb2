"""Resampling, token merging and adaptive segments against slow oracles: exact fractions, union-find and plain loops, one video at a time."""
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from prvr_nb.method.segments import (
    bipartite_labels, choose_level, connected, cosines, gram_matrix, greedy_pairs, merge_gram, segment_labels,
    uniformity,
)
from prvr_nb.method.tokens import (
    Merged, group_means, l2_normalise, merge_step, op_tome, resample, resample_bounds, uniform_clips,
)

SCHEDULE, LEVELS = (128, 80, 52, 32), (32, 20, 12, 8, 5)


def numbers(*shape, seed=0, integer=False):
    "Seeded random numbers; integers are −1, 0 or 1."
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).float() if integer else torch.randn(shape, generator=generator)


def runs(labels):
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
    for video, got in zip(videos, tokens):
        assert_close(got.double(), torch.from_numpy(resampled(video.numpy(), n_tokens)), rtol=1e-5, atol=1e-5)


def test_resample_half_way_cases_go_to_the_even_frame():
    assert resample_bounds(torch.tensor([4]), 8).tolist() == [[0, 0, 1, 2, 2, 2, 3, 3, 3]]  # 0.5→0, 1.5→2, 2.5→2, 3.5→3 at most
    assert resample_bounds(torch.tensor([12]), 8).tolist() == [[0, 2, 3, 4, 6, 8, 9, 10, 11]]


def test_resample_of_one_frame_and_of_as_many_frames_as_tokens():
    one, full = numbers(1, 6), numbers(128, 6)
    tokens = resample(torch.cat([one, full]), torch.tensor([1, 128]))
    assert torch.equal(tokens[0], one.expand(128, 6)) and torch.equal(tokens[1], full)


def test_resample_does_not_mix_videos():
    lengths = [3, 1, 200, 128, 77]
    videos = [numbers(T, 4, seed=T) for T in lengths]
    together = resample(torch.cat(videos), torch.tensor(lengths))
    for video, tokens in zip(videos, together):
        assert torch.equal(resample(video, torch.tensor([len(video)]))[0], tokens)


@pytest.mark.parametrize("n_frames", [[5, 0], [2, 2], [3, 3], [6, -1]])
def test_resample_refuses_lengths_that_do_not_fit(n_frames):
    with pytest.raises(ValueError, match="5 frames cannot be shared out"):
        resample(numbers(5, 3), torch.tensor(n_frames))


def test_l2_normalise():
    x = torch.tensor([[3., 4.], [0., 0.], [-1e-5, 0.]])
    assert_close(l2_normalise(x), torch.tensor([[3 / 5.00001, 4 / 5.00001], [0., 0.], [-0.5, 0.]]))


# ---- OP-ToMe

def merged_exactly(rows, schedule):
    "Integer features, exact fractions: clips as (first, end), found by removing the best remaining candidate again and again."
    rows = [[int(v) for v in row] for row in rows]
    cumulative = [[0] * len(rows[0])]
    for row in rows:
        cumulative.append([a + b for a, b in zip(cumulative[-1], row)])
    mean = lambda first, end: [Fraction(b - a, end - first) for a, b in zip(cumulative[first], cumulative[end])]
    cuts = list(range(len(rows) + 1))
    for m in schedule[1:]:
        candidates = {cuts[i + 1]: sum(a * b for a, b in zip(mean(cuts[i], cuts[i + 1]), mean(cuts[i + 1], cuts[i + 2]))) for i in range(0, len(cuts) - 2, 2)}
        while len(cuts) - 1 > m:
            best = max(candidates.values())
            gone = min(cut for cut, value in candidates.items() if value == best)  # ties: the earliest
            del candidates[gone]
            cuts.remove(gone)
    return cuts, [mean(a, b) for a, b in zip(cuts, cuts[1:])]


@pytest.mark.parametrize("schedule", [SCHEDULE, (64, 40, 32), (9, 5, 3, 2, 1), (33, 17, 16), (5, 5, 4), (1,)])
@pytest.mark.parametrize("seed", range(4))
def test_op_tome_with_many_exact_ties(schedule, seed):
    # Features are multiples of lcm(1…8) and no clip exceeds eight tokens here (the last step to a single clip has no choice),
    # so means and dot products are exact in float32, and so are their ties.
    x = 840 * numbers(3, schedule[0], 4, seed=seed, integer=True)
    merged = op_tome(x, schedule)
    for i in range(3):
        cuts, means = merged_exactly(x[i].tolist(), schedule)
        expected = [[*range(a, b)] for a, b in zip(cuts, cuts[1:])]
        assert runs(merged.labels[i].tolist()) == expected
        assert merged.sizes[i].tolist() == [len(group) for group in expected]
        assert_close(merged.tokens[i], torch.tensor([[float(v) for v in row] for row in means]))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("schedule", [SCHEDULE, (127, 80, 53, 31), (7, 4, 2)])
def test_op_tome_on_random_features(schedule, similarity):
    x = numbers(4, schedule[0], 12, seed=5)
    merged = op_tome(x, schedule, similarity)
    for i, rows in enumerate(x.double().numpy()):
        groups = [[k] for k in range(len(rows))]
        for m in schedule[1:]:
            means = np.stack([rows[g].mean(0) for g in groups])
            if similarity == "cosine":
                compared = means / np.linalg.norm(means, axis=1, keepdims=True)
            else:
                compared = means
            score = np.full(len(groups), -np.inf)
            for right in range(1, len(groups), 2):
                score[right] = compared[right - 1] @ compared[right]
            for right in sorted(np.argsort(-score)[:len(groups) - m], reverse=True):  # from the back, so positions stay valid
                groups[right - 1] += groups.pop(right)
        assert runs(merged.labels[i].tolist()) == groups
        assert_close(merged.tokens[i].double(), torch.from_numpy(np.stack([rows[g].mean(0) for g in groups])), rtol=1e-5, atol=1e-5)


def test_op_tome_laws():
    x = numbers(10, 128, 8, seed=1)
    for similarity in ("dot", "cosine"):
        merged = op_tome(x, SCHEDULE, similarity)
        step = merged.labels.diff(dim=1)
        assert ((step == 0) | (step == 1)).all() and (merged.labels[:, 0] == 0).all() and (merged.labels[:, -1] == 31).all()
        assert (merged.sizes.sum(1) == 128).all() and merged.sizes.min() >= 1 and merged.sizes.max() <= 8
        assert_close((merged.tokens * merged.sizes[..., None]).sum(1) / 128, x.mean(1))


def test_op_tome_of_one_frame_takes_the_earliest_pairs():
    for seed in range(5):
        merged = op_tome(resample(numbers(1, 32, seed=seed), torch.tensor([1])))
        assert merged.sizes.tolist() == [[8.] * 12 + [4.] * 2 + [2.] * 6 + [1.] * 12]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_op_tome_does_not_depend_on_the_batch(similarity):
    x = torch.cat([numbers(5, 128, 16), resample(numbers(40, 16), torch.tensor([1, 2, 37]))])
    together = op_tome(x, SCHEDULE, similarity)
    order = torch.tensor([6, 0, 7, 3, 1, 5, 2, 4])
    shuffled = op_tome(x[order], SCHEDULE, similarity)
    for i in range(8):
        for part, whole in zip(op_tome(x[i:i + 1], SCHEDULE, similarity), together):
            assert torch.equal(part[0], whole[i])
    for a, b in zip(shuffled, together):
        assert torch.equal(a, b[order])


def test_only_cosine_ignores_lengths():
    x = numbers(6, 128, 8, seed=2)
    longer = x * 2. ** torch.randint(-2, 3, (6, 128, 1), generator=torch.Generator().manual_seed(0))
    first = lambda y, similarity: op_tome(y, (128, 80), similarity).labels
    assert torch.equal(first(x, "cosine"), first(longer, "cosine"))
    assert not torch.equal(first(x, "dot"), first(longer, "dot"))


def test_merge_step_weighs_by_size_and_leaves_its_input_alone():
    before = Merged(torch.tensor([[[0.], [6.], [1.]]]), torch.tensor([[2., 1., 5.]]), torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2]]))
    copies = [part.clone() for part in before]
    after = merge_step(before, 2)
    assert_close(after.tokens, torch.tensor([[[2.], [1.]]]))
    assert after.sizes.tolist() == [[3., 5.]] and after.labels.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    for part, copy in zip(before, copies):
        assert torch.equal(part, copy)


@pytest.mark.parametrize("schedule", [(128, 63), (128, 129), (128, 80, 39), (128, 0)])
def test_op_tome_refuses_impossible_steps(schedule):
    with pytest.raises(ValueError, match=f"tokens cannot become {schedule[-1]}"):
        op_tome(numbers(2, 128, 4), schedule)


def test_op_tome_refuses_an_unknown_similarity():
    with pytest.raises(ValueError, match="'euclid'"):
        op_tome(numbers(1, 128, 4), similarity="euclid")


# ---- groups and uniform clips

@pytest.mark.parametrize("n, m", [(128, 32), (10, 3), (7, 7), (5, 1), (127, 32)])
def test_uniform_clips(n, m):
    x = numbers(2, n, 3)
    clips = uniform_clips(x, m)
    for i in range(2):
        groups = runs(clips.labels[i].tolist())
        assert sum(groups, []) == list(range(n)) and len(groups) == m
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert clips.sizes[i].tolist() == [len(g) for g in groups]
        assert_close(clips.tokens[i], torch.stack([x[i, g].mean(0) for g in groups]))


def test_group_means_with_an_empty_group():
    means, total = group_means(torch.tensor([[[1.], [5.], [9.]]]), torch.tensor([[1., 3., 2.]]), torch.tensor([[2, 2, 0]]), 4)
    assert_close(means, torch.tensor([[[9.], [0.], [4.], [0.]]]))
    assert total.tolist() == [[2., 0., 4., 0.]]


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
        adjacent = upper | upper.transpose(1, 2)
        for got, given in zip(connected(adjacent), adjacent):
            group = components(given.tolist())
            assert got.tolist() == [[a == b for b in group] for a in group]


def test_connected_does_not_overflow():
    clique = torch.ones(1, 65, 65, dtype=torch.bool)
    clique[0, 64], clique[0, :, 64] = False, False
    assert connected(clique).sum() == 64 * 64 + 1


def test_connected_through_the_longest_chain():
    for n in (2, 3, 4, 5, 16, 17, 32, 33):
        chain = torch.zeros(1, n, n, dtype=torch.bool)
        chain[0, range(n - 1), range(1, n)] = True
        assert connected(chain | chain.transpose(1, 2)).all()


@pytest.mark.parametrize("tau", [-0.2, 0.3, 0.7])
def test_uniformity(tau):
    clips = l2_normalise(numbers(8, 32, 4, seed=3))
    unit = clips.double().numpy() / np.linalg.norm(clips.double().numpy(), axis=2, keepdims=True)
    with_closure, without = uniformity(clips, tau), uniformity(clips, tau, closure=False)
    for x, closed, plain in zip(unit, with_closure.tolist(), without.tolist()):
        alike = [[bool(a @ b > tau) for b in x] for a in x]
        group = components(alike)
        different = [(i, j) for i, j in product(range(32), repeat=2) if i != j]
        assert closed == sum(group[i] == group[j] for i, j in different) / 992
        assert plain == sum(alike[i][j] for i, j in different) / 992
        assert 0 <= plain <= closed <= 1


def test_uniformity_counts_only_pairs_strictly_above_tau():
    clips = torch.tensor([[[1., 0.], [3., 4.]]], dtype=torch.double)  # cosine 0.6
    assert uniformity(clips, 0.6).item() == 0 and uniformity(clips, float(np.nextafter(0.6, 0))).item() == 1


def test_uniformity_of_degenerate_videos():
    assert uniformity(torch.ones(1, 32, 4), 0.99).item() == 1  # T = 1
    assert uniformity(torch.eye(32)[None], 0.1).item() == 0
    assert uniformity(torch.ones(1, 1, 4), 0.5).item() == 0  # a single clip has no pairs
    assert uniformity(torch.zeros(1, 3, 4), 0.5).item() == 0  # zero features are like nothing


# ---- levels

@pytest.mark.parametrize("n_levels", range(1, 9))
@pytest.mark.parametrize("n", [2, 4, 5, 6, 9, 10, 16, 32])
def test_choose_level_at_every_possible_omega(n, n_levels):
    # omega is the quotient that uniformity computes; the oracle compares exact fractions
    total = n * (n - 1)
    omega = torch.arange(total + 1).double() / total
    for strict in (False, True):
        expected = []
        for count in range(total + 1):
            passed = [Fraction(count, total) > Fraction(k, n_levels) if strict else Fraction(count, total) >= Fraction(k, n_levels) for k in range(1, n_levels)]
            expected.append(sum(passed))
        assert choose_level(omega, n_levels, strict).tolist() == expected


def test_choose_level_next_to_the_released_thresholds():
    for level, threshold in enumerate((0.2, 0.4, 0.6, 0.8), 1):
        near = torch.tensor([np.nextafter(threshold, 0), threshold, np.nextafter(threshold, 1)], dtype=torch.double)
        assert choose_level(near, 5).tolist() == [level - 1, level, level]
        assert choose_level(near, 5, strict=True).tolist() == [level - 1, level - 1, level]


# ---- bipartite merging

def bipartite(tokens, m):
    "One step from the tokens themselves."
    return bipartite_labels(cosines(gram_matrix(tokens)), m)


def assigned(similarity, n_pairs):
    "One video: all pairs sorted once, taken from the top while both ends are free."
    order = sorted(product(range(len(similarity)), range(len(similarity[0]))), key=lambda p: (-similarity[p[0]][p[1]], p))
    used_a, used_b, out = set(), set(), []
    for a, b in order:
        if len(out) < n_pairs and a not in used_a and b not in used_b:
            used_a.add(a), used_b.add(b), out.append((a, b))
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3), (16, 16), (7, 6)])
@pytest.mark.parametrize("integer", [False, True])  # integers: nearly everything ties
def test_greedy_pairs(shape, integer):
    similarity = numbers(6, *shape, seed=4, integer=integer)
    given = similarity.clone()
    for n_pairs in range(1, min(shape) + 1):
        a, b = greedy_pairs(similarity, n_pairs)
        for i in range(6):
            assert list(zip(a[i].tolist(), b[i].tolist())) == assigned(similarity[i].tolist(), n_pairs)
    assert torch.equal(similarity, given)


def segments(clips, sizes, levels):
    "One video in float64: sets of clips, merged level by level; each mean comes from the original clips."
    groups = [[i] for i in range(len(clips))]
    for m in levels[1:]:
        means = np.stack([np.average(clips[g], axis=0, weights=sizes[g]) for g in groups])
        norm = np.linalg.norm(means, axis=1, keepdims=True)
        unit = np.divide(means, norm, out=np.zeros_like(means), where=norm > 0)
        gone = set()
        for a, b in assigned((unit[0::2] @ unit[1::2].T).tolist(), len(groups) - m):
            groups[2 * a] = groups[2 * a] + groups[2 * b + 1]
            gone.add(2 * b + 1)
        groups = [g for i, g in enumerate(groups) if i not in gone]
    return [sorted(g) for g in groups]


@pytest.mark.parametrize("levels", [LEVELS, (32, 20, 12, 8, 6, 5), (20, 12, 8, 5), (7, 4, 3, 2), (5, 3), (2, 1), (32,)])
def test_segment_labels_at_every_level(levels):
    n = levels[0]
    clips = l2_normalise(numbers(2 * len(levels), n, 10, seed=6))
    sizes = torch.randint(1, 9, clips.shape[:2], generator=torch.Generator().manual_seed(7)).float()
    level = torch.arange(2 * len(levels)) % len(levels)
    labels = segment_labels(clips, sizes, levels, level)
    assert labels.shape == clips.shape[:2]
    for x, s, k, got in zip(clips.double().numpy(), sizes.double().numpy(), level.tolist(), labels.tolist()):
        assert runs(got) == segments(x, s, levels[:k + 1])
        assert max(got) + 1 == levels[k]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 32])
def test_bipartite_labels_with_exact_ties(n):
    # Vectors along the axes: every cosine is exactly −1, 0 or 1.
    axis = torch.randint(0, 3, (8, n), generator=torch.Generator().manual_seed(n))
    sign = torch.randint(0, 2, (8, n), generator=torch.Generator().manual_seed(n + 1)) * 2. - 1
    x = torch.nn.functional.one_hot(axis, 3) * sign[..., None] * 4
    for m in range((n + 1) // 2, n):
        for rows, got in zip(x.double().numpy(), bipartite(x, m).tolist()):
            assert runs(got) == segments(rows, np.ones(n), (n, m))


def test_segments_of_a_still_video():
    clips, sizes = torch.eye(4)[1].expand(1, 32, 4), torch.full((1, 32), 4.)
    level = choose_level(uniformity(clips, 0.8), 5)
    labels = segment_labels(clips, sizes, LEVELS, level)
    assert level.tolist() == [4] and runs(labels[0].tolist()) == segments(clips[0].double().numpy(), sizes[0].double().numpy(), LEVELS)


def test_ties_of_any_single_frame_are_those_of_exact_numbers():
    # Clips of one frame are equal, so every cosine is 1 on paper; sizes 8, 4, 2 and 1 make means that round differently.
    frame = op_tome(resample(numbers(1, 48, seed=9), torch.tensor([1])))
    exact = torch.eye(4)[1].expand(1, 32, 4)
    for seed in range(20):
        clips = l2_normalise(numbers(1, 1, 48, seed=seed)).expand(1, 32, 48)
        for level in range(5):
            assert torch.equal(segment_labels(clips, frame.sizes, LEVELS, torch.tensor([level])), segment_labels(exact, frame.sizes, LEVELS, torch.tensor([level])))


def test_a_gram_matrix_at_hand_changes_nothing():
    clips, sizes, level = numbers(5, 32, 8, seed=8), torch.full((5, 32), 4.), torch.arange(5)
    gram = gram_matrix(clips)
    kept = gram.clone()
    assert torch.equal(uniformity(clips, 0.3, True, gram), uniformity(clips, 0.3))
    assert torch.equal(segment_labels(clips, sizes, LEVELS, level, gram), segment_labels(clips, sizes, LEVELS, level))
    assert torch.equal(gram, kept)


def test_cosines_of_tokens_that_cancel():
    x = torch.tensor([[[1., 2.], [-1., -2.], [3., 1.]]])
    merged, _ = merge_gram(gram_matrix(x), torch.ones(1, 3, dtype=torch.double), torch.tensor([[0, 0, 1]]), 2)
    assert cosines(merged)[0, 0].tolist() == [0, 0] and cosines(merged).isfinite().all()


def test_segments_are_nested_and_weighted_means():
    clips, sizes = numbers(5, 32, 8, seed=8), torch.randint(1, 9, (5, 32), generator=torch.Generator().manual_seed(8)).float()
    maps = [segment_labels(clips, sizes, LEVELS, torch.full((5,), k)) for k in range(5)]
    same = [m[:, :, None] == m[:, None] for m in maps]
    for finer, coarser in zip(same, same[1:]):
        assert (coarser | ~finer).all() and not torch.equal(coarser, finer)
    means, mass = clips, sizes
    for m in LEVELS[1:]:
        means, mass = group_means(means, mass, bipartite(means, m), m)
    direct, total = group_means(clips, sizes, maps[-1], 5)
    assert_close(means, direct)
    assert torch.equal(mass, total)


def test_segments_do_not_depend_on_the_batch():
    frames = [numbers(T, 24, seed=T) for T in (1, 7, 31, 32, 50, 128, 300)]
    merged = op_tome(resample(torch.cat(frames), torch.tensor([len(f) for f in frames])))
    clips, level = l2_normalise(merged.tokens), torch.tensor([4, 3, 4, 2, 1, 4, 0])
    together, omega = segment_labels(clips, merged.sizes, LEVELS, level), uniformity(clips, 0.3)
    for i in range(len(frames)):
        one = slice(i, i + 1)
        assert torch.equal(segment_labels(clips[one], merged.sizes[one], LEVELS, level[one])[0], together[i])
        assert uniformity(clips[one], 0.3)[0] == omega[i]


@pytest.mark.parametrize("n, m", [(32, 15), (5, 2), (32, 32), (8, 9)])
def test_bipartite_labels_refuses_impossible_steps(n, m):
    with pytest.raises(ValueError, match=f"{n} tokens cannot become {m}"):
        bipartite(numbers(1, n, 4), m)
