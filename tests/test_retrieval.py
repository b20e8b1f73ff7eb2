"""Scores, the query encoder and the retrieval losses against naive loops, and at the edges: one video, one query."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from prvr_nb.method.retrieval import (
    QueryEncoder,
    cosine_scores,
    fuse,
    info_nce,
    max_scores,
    sample_negatives,
    triplet_loss,
)

# scores


def test_scores_are_those_of_the_best_token():
    g = torch.Generator().manual_seed(0)
    queries, tokens = torch.randn(5, 8, generator=g), torch.randn(3, 6, 8, generator=g)
    raw = [[max((q @ t).item() for t in v) for v in tokens] for q in queries]
    cosine = [[max((q @ t / q.norm() / t.norm()).item() for t in v) for v in tokens] for q in queries]
    assert_close(max_scores(queries, tokens), torch.tensor(raw))
    assert_close(cosine_scores(queries, tokens), torch.tensor(cosine))
    assert cosine_scores(queries[:1], tokens).shape == (1, 3)


def test_the_maximum_sends_a_gradient_to_one_token_per_pair():
    pairs = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    queries = torch.eye(5)  # so that a video's tokens are its scores
    max_scores(queries, pairs.permute(1, 2, 0)).sum().backward()
    assert ((pairs.grad != 0).sum(2) == 1).all()


def test_fusion_by_hand():
    assert_close(fuse(torch.tensor([[0.5]]), torch.tensor([[1.]])), torch.tensor([[0.8]]))  # 0.4 · 0.5 + 0.6 · 1


# query encoder


def random_encoder():
    torch.manual_seed(0)
    encoder = QueryEncoder(6, 8, 2, 0.3).eval()
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.4)
    mask = torch.arange(7) < torch.tensor([5, 1, 7, 3])[:, None]
    return encoder, torch.randn(4, 7, 6) * mask[..., None], mask


def test_padding_does_not_reach_query_embeddings():
    encoder, x, mask = random_encoder()
    queries = encoder(x, mask)
    assert torch.equal(encoder(torch.where(mask[..., None], x, torch.randn_like(x) * 100), mask), queries)
    wider = encoder(F.pad(x, (0, 0, 0, 20), value=5.), F.pad(mask, (0, 20)))
    assert_close(wider, queries, rtol=1e-4, atol=1e-5)
    for i, n in enumerate(mask.sum(1).tolist()):
        assert_close(encoder(x[i:i + 1, :n], mask[i:i + 1, :n])[0], queries[i], rtol=1e-4, atol=1e-5)


def test_a_query_of_one_token_is_pooled_to_it():
    encoder, x, mask = random_encoder()
    alone = encoder.block(encoder.tokens(x[1:2, :1]))[0, 0]
    assert_close(encoder(x, mask)[1:2], alone, rtol=1e-4, atol=1e-5)


def test_a_sentence_longer_than_the_positions_is_refused():
    encoder, *_ = random_encoder()
    with pytest.raises(RuntimeError, match=r"78.*77"):
        encoder(torch.zeros(1, 78, 6), torch.ones(1, 78, dtype=torch.bool))


# InfoNCE


def naive_info_nce(scores, video):
    s, own = scores.double(), video.tolist()
    text = [-(s[q, own[q]].exp() / s[q].exp().sum()).log() for q in range(len(s))]
    videos = [-(s[video == b, b].exp().sum() / s[:, b].exp().sum()).log() for b in range(s.shape[1])]
    return sum(text) / len(text) + sum(videos) / len(videos)


RAGGED = torch.tensor([0, 0, 1, 2, 2, 2, 3])


@pytest.mark.parametrize("video", [RAGGED, RAGGED[[3, 0, 6, 4, 2, 1, 5]], torch.tensor([1, 0])],
                         ids=["sorted", "shuffled", "one each"])
def test_info_nce(video):
    torch.manual_seed(0)
    scores = (3 * torch.randn(len(video), int(video.max()) + 1)).requires_grad_()
    ours, naive = info_nce(scores, video), naive_info_nce(scores, video)
    assert ours.shape == ()
    assert_close(ours.double(), naive, rtol=1e-5, atol=1e-6)
    assert_close(*(torch.autograd.grad(x, scores)[0] for x in (ours, naive)), rtol=1e-4, atol=1e-6)


def test_one_query_per_video_is_cross_entropy_both_ways():
    scores, video = 3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    assert_close(info_nce(scores, video), F.cross_entropy(scores, video) + F.cross_entropy(scores.T, video))


def test_a_query_of_no_video_in_the_batch_is_refused():
    with pytest.raises(RuntimeError, match="out of bounds"):
        info_nce(torch.zeros(2, 3), torch.tensor([0, 3]))


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
@pytest.mark.parametrize("queries", [1, 3])
def test_one_video_costs_nothing(queries, hard):
    scores, video = cosines(queries=queries, videos=1), torch.zeros(queries, dtype=torch.long)
    loss = triplet_loss(scores, video, 0.2, hard) + info_nce(scores, video)
    loss.backward()
    assert loss == 0 and scores.grad.shape == (queries, 1) and (scores.grad == 0).all()


@pytest.mark.parametrize("hard", [False, True])
def test_one_query_per_video(hard):
    scores, video = cosines(queries=2, videos=2), torch.tensor([1, 0])
    # one negative each leaves nothing to chance
    assert_close(triplet_loss(scores, video, 0.2, hard), naive_triplet(scores, video, 0.2, hard, 20))


@pytest.mark.parametrize("pool, size", [(None, 9), (20, 9), (9, 9), (4, 4), (1, 1)])
def test_negatives_are_never_the_own_video_and_uniform_in_their_pool(pool, size):
    torch.manual_seed(0)
    n = 9000
    row = torch.tensor([0.9, -0.3, 0.5, 0.1, 0.8, -0.9, 0.2, 0.7, -0.1, 0.4])
    own = torch.arange(n) % 10  # every candidate is the own one in a tenth of the rows
    allowed = F.one_hot(own, 10) == 0
    chosen = sample_negatives(row.expand(n, 10), allowed, pool)
    assert chosen.shape == (n,) and (chosen != own).all()
    order = row.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True)
    place = (order == chosen[:, None]).nonzero()[:, 1]
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


def test_harder_pools_cost_more():
    scores = cosines().detach()
    costs = [naive_triplet(scores, RAGGED, 0.2, True, 1), naive_triplet(scores, RAGGED, 0.2, True, 2),
             naive_triplet(scores, RAGGED, 0.2, False, 20)]
    assert costs[0] >= costs[1] >= costs[2] > triplet_loss(F.one_hot(RAGGED, 4).float(), RAGGED, 0.2, True) == 0


def test_choosing_a_negative_passes_no_gradient():
    scores = cosines()
    chosen = sample_negatives(scores, torch.ones(7, 4, dtype=torch.bool), None)
    assert chosen.dtype == torch.long and not chosen.requires_grad
