"""From a relevance curve to a moment, and what a moment is worth."""
import pytest
import torch

from prvr_nb.data.corpus import Moment
from prvr_nb.files import UserError
from prvr_nb.videos.moments import (
    clock,
    find_moments,
    inside,
    localize_moment,
    moment_metrics,
    pack_moments,
    temporal_iou,
    token_times,
)


def walk(curve, fraction):
    "The moment by walking from the peak to both sides."
    peak = first = last = max(range(len(curve)), key=lambda i: curve[i])
    ordered, n = sorted(curve), len(curve)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    threshold = middle + fraction * (curve[peak] - middle)
    while first > 0 and curve[first - 1] >= threshold:
        first -= 1
    while last < n - 1 and curve[last + 1] >= threshold:
        last += 1
    return first, last, peak


@pytest.mark.parametrize("length", [1, 2, 7, 32, 33])
def test_a_moment_equals_a_walk(length):
    curves = torch.randint(-8, 8, (300, length), generator=torch.Generator().manual_seed(length)).float() / 4
    for fraction in (0, 0.25, 0.5, 0.75, 1):
        found = zip(*(x.tolist() for x in localize_moment(curves, fraction)), strict=True)
        assert list(found) == [walk(curve, fraction) for curve in curves.tolist()]


@pytest.mark.parametrize("curve, fraction, want", [
    ([9, 8, 1, 1, 1], 0.5, (0, 1, 0)), ([1, 1, 1, 8, 9], 0.5, (3, 4, 4)), # peak at an edge
    ([1, 9, 9, 9, 1, 1, 1], 1, (1, 3, 1)), # plateau
    ([2, 2, 2, 2], 0.5, (0, 3, 0)), ([2, 2, 2, 2], 1, (0, 3, 0)), # flat
    ([5], 0.5, (0, 0, 0)), # one token
    ([1, 9, 1, 9, 1], 0.5, (1, 1, 1)), # of two equal peaks the first
    ([0, 6, 2, 7, 0, 0, 0], 0.5, (3, 3, 3)), ([0, 6, 4, 7, 0, 0, 0], 0.5, (1, 3, 3)), # a gap ends it
])
def test_a_moment_by_hand(curve, fraction, want):
    assert tuple(x.item() for x in localize_moment(torch.tensor([curve]).float(), fraction)) == want


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_outside_its_range(fraction):
    with pytest.raises(UserError, match="fraction"):
        localize_moment(torch.rand(1, 4), fraction)


@pytest.mark.parametrize("n_frames", [1, 2, 3, 15, 16, 17, 40, 200])
def test_token_times_cover_the_frames_of_each_token(n_frames):
    start, end = (x[0] * n_frames for x in token_times(torch.tensor([n_frames]), 16))
    for i in range(16):
        low, high = (min(round(j * n_frames / 16), n_frames - 1) for j in (i, i + 1)) # Python rounds half to even, too
        assert start[i].item() == pytest.approx(low)
        assert end[i].item() == pytest.approx(n_frames if i == 15 else max(high, low + 1))


def test_find_moments_by_hand():
    curve = torch.tensor([[0., 0, 9, 8, 0, 0, 0, 0]])
    window = find_moments(curve, torch.tensor([40]), 0.5) # tokens of five frames
    assert [x.item() * 40 for x in window] == pytest.approx([10, 20, 12.5])


def test_iou_and_inside_by_hand():
    truth = torch.tensor([[[4., 8], [2, 2]]])
    windows = [(4, 8, 1), (2, 6, 1 / 3), (0, 4, 0), (8, 9, 0), (5, 6, 1 / 4), (0, 16, 1 / 4)]
    iou = temporal_iou(*(torch.tensor([[float(w[i]) for w in windows]]) for i in (0, 1)), truth)
    assert iou[0].tolist() == pytest.approx([w[2] for w in windows])
    assert inside(torch.tensor([[4., 7.99, 8, 2, 0]]), truth).tolist() == [[True, True, False, False, False]]


def test_pack_moments_clips_to_the_video_and_pads():
    packed = pack_moments([[Moment(-1, 5, 10)], [Moment(2, 4, 8), Moment(6, 99, 8)]])
    assert packed.tolist() == [[[0, .5], [2, 2]], [[.25, .5], [.75, 1]]]


def test_moment_metrics_by_hand():
    curves = [torch.tensor([0., 9, 9, 0, 0, 0, 0, 0]), torch.tensor([9., 0, 0, 0])] # tokens of one second and of two
    m = moment_metrics(curves, torch.tensor([8, 8]), [[Moment(1, 3, 8)], [Moment(4, 8, 8)]], 0.5)
    assert (m["queries"], m["hit"], m["hit_chance"]) == (2, 50, 100 * (2 / 8 + 4 / 8) / 2)
    assert m["iou"] == pytest.approx(50) and m["iou_whole"] == pytest.approx(100 * (2 / 8 + 4 / 8) / 2)
    assert m["hit_middle"] == 50 and m["iou_middle"] == pytest.approx(100 * (1 / 5 + 2 / 6) / 2)
    placed = [1 / 3, 1, 1 / 3, 0, 0, 0, 0] # a window of two tokens at seven places, then one of one token at four
    assert m["iou_chance"] == pytest.approx(100 * (sum(placed) / 7 + (1 / 2 + 1 / 2) / 4) / 2)
    with pytest.raises(UserError, match="annotated"):
        moment_metrics([], torch.zeros(0, dtype=torch.long), [])


def test_clock():
    times = [clock(s) for s in (0, 9.9, 59.99, 60, 3599, 3600, 36061)]
    assert times == ["0:00", "0:09", "0:59", "1:00", "59:59", "1:00:00", "10:01:01"]
