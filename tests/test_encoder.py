"""The encoder's pieces: windows, attention, blocks side by side, the mixture (test_model has the oracle)."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from prvr_nb.method.encoder import WIDTHS, Blocks, CrossAttention, Dropout, GaussianBlocks, attend, gaussian_window

close = dict(rtol=1e-4, atol=1e-5)


def random(module, std=0.4):
    "The module with random parameters, so that no swapped bias or norm goes unseen."
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module.eval()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 32, 128])
@pytest.mark.parametrize("width", [*sorted(WIDTHS), 0.])
def test_windows_are_finite_and_reach_one(width, length):
    window = gaussian_window(width, length)
    assert window.shape == (length, length) and window.dtype == torch.float32
    assert ((window >= 0) & (window <= 1)).all()
    assert_close(window.amax(1), torch.ones(length))


def test_wider_windows_are_larger():
    means = torch.stack([gaussian_window(w, 32) for w in sorted(WIDTHS)]).mean((1, 2))
    assert (means.diff() > 0).all()


def test_attention_without_window_and_bias_is_pytorchs():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    assert_close(attend(query, key, value), nn.functional.scaled_dot_product_attention(query, key, value))


def test_the_window_comes_before_the_bias():
    window, bias = torch.tensor([[1., 0.5]]), torch.tensor([[0., 1.]])
    weights = attend(torch.tensor([[1., 2.]]), torch.eye(2) * 2**0.5, torch.eye(2), window, bias)
    assert_close(weights, torch.tensor([[1., 2 * 0.5 + 1.]]).softmax(1))


def test_attention_weights_are_dropped():
    torch.manual_seed(0)
    weights = attend(torch.randn(200, 8), torch.randn(50, 8), torch.eye(50), dropout=Dropout(0.3).train())
    assert 0.28 < (weights == 0).double().mean() < 0.32


def test_eight_blocks_equal_eight_single_ones():
    eight, windows = random(Blocks(8, 2, 0., n=8)), torch.rand(8, 1, 1, 6, 6)
    x, sizes = torch.randn(3, 6, 8), torch.randint(1, 9, (3, 6)).float()
    together = eight(x, windows, sizes.log())
    for i in range(8):
        one = Blocks(8, 2, 0.)
        one.load_state_dict({name: t[i:i + 1] for name, t in eight.state_dict().items()})
        assert_close(one(x, windows[i:i + 1], sizes.log())[0], together[i], **close)


def test_log_sizes_stand_for_copies():
    block, clips, sizes = random(Blocks(8, 2, 0.)), torch.randn(1, 4, 8), torch.tensor([[3, 1, 2, 5]])
    copies = block(clips.repeat_interleave(sizes[0], dim=1))[:, :, sizes[0].cumsum(0) - sizes[0]]
    assert_close(block(clips, bias=sizes.float().log()), copies, **close)


def test_a_token_that_asks_itself():
    "Cross-attention to a sequence of one token is self-attention of that token."
    block, token = random(CrossAttention(8, 2, 0., n=3, ffn=1)), torch.randn(1, 1, 8)
    assert_close(block(token, token), Blocks.forward(block, token), **close)
    assert block(token, torch.randn(5, 7, 8)).shape == (3, 5, 1, 8)


def test_only_block_zero_forgets_the_order():
    encoder, x = random(GaussianBlocks(8, 2, 0.3, 12, 0.3)), torch.randn(1, 12, 8)
    order = torch.randperm(12)
    shuffled, plain = encoder.blocks(x[:, order], encoder.windows), encoder.blocks(x, encoder.windows)[:, :, order]
    differs = (shuffled - plain).abs().amax((1, 2, 3))
    assert differs[0] < 1e-5 and (differs[1:] > 1e-3).all()


def test_the_mixture_is_a_weighted_mean_and_equal_blocks_need_none():
    encoder, x, token = random(GaussianBlocks(8, 2, 0., 12, 0.3)), torch.randn(4, 12, 8), torch.randn(1, 1, 8)
    weights = encoder.mixture(encoder.blocks(x, encoder.windows), token)
    assert weights.shape == (8, 4, 12) and (weights > 0).all()
    assert_close(weights.sum(0), torch.ones(4, 12))
    encoder.windows.fill_(1.)
    for p in encoder.blocks.parameters():
        p.data[:] = p.data[:1].clone()
    assert_close(encoder(x, token), encoder.blocks(x)[0], **close)


def test_what_softmax_does_not_notice_learns_nothing():
    encoder, token = random(GaussianBlocks(8, 2, 0., 12, 0.3)), torch.randn(1, 1, 8)
    out = encoder(torch.randn(4, 12, 8), token, torch.randint(1, 6, (4, 12)).float())
    (out * torch.randn_like(out)).sum().backward()
    largest = {name: p.grad.abs().max() for name, p in encoder.named_parameters()}
    assert [name for name, size in largest.items() if size < 1e-4] == ["to_logits.3.bias"]
    keys, cross = (module.qkv.bias.grad[:, 1].abs().amax(1) for module in (encoder.blocks, encoder.cross))
    assert keys[0] < 1e-5 and cross < 1e-5 and (keys[1:] > 1e-4).all()  # without a window it shifts a whole row


def test_another_number_of_tokens_is_refused():
    with pytest.raises(RuntimeError, match=r"10.*12"):
        GaussianBlocks(8, 2, 0., 12, 0.3)(torch.randn(1, 10, 8), torch.randn(1, 1, 8))
