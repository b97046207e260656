"""The hourglass transformer: sizes of the paper, equal attention by every program, what its parts must not see."""

import pytest
import torch

from lightning_modules.cryo.hdit import AxialRoPE, HDiT, SelfAttention, coarser, places, turned, unit
from lightning_modules.cryo.neighborhood import attention, neighborhood_attention, neighborhood_mask, window_start

SMALL, LARGE = {"widths": (768, 1536), "depths": (4, 8)}, {"widths": (320, 640, 1280), "depths": (2, 2, 12)}
MINI = {"widths": (96, 192), "depths": (2, 4), "head": 48, "window": None, "time_width": 128, "time_mlp": True}


def toy(**changes) -> HDiT:
    torch.manual_seed(0)
    return HDiT(
        **{"widths": (24, 48), "depths": (1, 1), "head": 12, "patch": 2, "window": 3, "time_width": 16} | changes
    )


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Weights that are zero at first, drawn."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def heads(*grid: int, count: int = 2, channels: int = 12) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, *grid, count, channels) for _ in range(3)]


def size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_published_sizes_are_exact():
    with torch.device("meta"):
        assert size(HDiT(**SMALL)) == 335_184_929
        assert size(HDiT(**LARGE)) == 308_535_918
        assert size(HDiT(**MINI)) == 3_031_417  # 3.03 M


def test_the_output_is_zero_at_first_and_has_the_shape_of_the_input():
    x, t = torch.randn(2, 12, 12, 12), torch.tensor([0.2, 0.9])
    velocity = toy()(x, t)
    assert velocity.shape == x.shape
    assert not velocity.any()


def test_cubes_of_a_batch_do_not_see_each_other():
    network, x, t = awake(toy()), torch.randn(3, 12, 12, 12), torch.tensor([0.1, 0.5, 0.9])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(x[order], t[order]), network(x, t)[order], rtol=1e-5, atol=1e-6)


def test_the_time_matters():
    network, x, t = awake(toy()), torch.randn(1, 12, 12, 12), torch.tensor([0.3])
    assert (network(x, t) - network(x, t + 0.2)).abs().max() > 1e-3


def test_scores_depend_on_relative_places_alone():
    # the same query and key everywhere: a score is a function of where they are
    q, k = (part[:, :1, :1, :1].expand(-1, 5, 5, 5, -1, -1) for part in heads(1, 1, 1, channels=64)[:2])
    angles = AxialRoPE(2, 64)(places(5, 5, 5))
    scores = torch.einsum("bdhwnc,bxyznc->bndhwxyz", turned(q, angles), turned(k, angles))
    for shift in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        low, high = [slice(0, 5 - s) for s in shift], [slice(s, 5) for s in shift]
        torch.testing.assert_close(scores[(..., *low, *low)], scores[(..., *high, *high)], rtol=1e-5, atol=1e-5)
    assert scores[0, 0].std() > 0.1


def test_fifteen_of_thirty_two_pairs_are_turned():
    angles = AxialRoPE(12, 64)(places(4, 4, 4))
    assert angles.shape == (4, 4, 4, 12, 15)
    x = torch.randn(1, 4, 4, 4, 12, 64)
    after = turned(x, angles)
    assert torch.equal(after[..., 30:], x[..., 30:])
    torch.testing.assert_close(after.norm(dim=-1), x.norm(dim=-1))
    assert AxialRoPE(12, 64).freqs[0, 0] == pytest.approx(torch.pi)


def test_places_of_merged_tokens_are_their_centres():
    torch.testing.assert_close(coarser(places(8, 8, 8)), places(4, 4, 4))
    assert places(2, 4, 4)[:, 0, 0, 0].tolist() == [-0.25, 0.25]


def test_scores_are_cosines_whatever_the_lengths_of_queries():
    q = heads(2, 2, 2)[0]
    scale = torch.tensor([10.0, 3.0])
    long, short = unit(100 * q, scale), unit(q, scale)
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(short.norm(dim=-1)[0, 0, 0, 0], scale.sqrt(), rtol=1e-5, atol=1e-5)


# Neighbourhoods


def test_every_query_sees_343_tokens_also_at_the_border():
    mask = neighborhood_mask((9, 7, 8), 7)
    assert mask.sum(1).tolist() == [343] * (9 * 7 * 8)
    assert window_start(9, 7).tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2]


def test_the_border_moves_the_window_inwards():
    mask = neighborhood_mask((5, 5, 5), 3).view(5, 5, 5, 5, 5, 5)
    assert mask[0, 2, 4].nonzero().amin(0).tolist() == [0, 1, 2]
    assert mask[0, 2, 4].nonzero().amax(0).tolist() == [2, 3, 4]


@pytest.mark.parametrize("grid", [(3, 3, 3), (5, 5, 5)])
def test_a_window_that_covers_the_grid_is_attention_to_everything(grid):
    q, k, v = heads(*grid)
    expected = attention(q, k, v)
    for backend in ("masked", "flex", "auto"):
        torch.testing.assert_close(neighborhood_attention(q, k, v, 5, backend), expected, rtol=1e-5, atol=1e-6)


def test_masked_attention_is_the_sum_over_the_window():
    q, k, v = heads(4, 5, 4, count=1)
    found = neighborhood_attention(q, k, v, 3, "masked")
    keys, values = (part[1, 0:3, 2:5, 1:4, 0].reshape(-1, 12) for part in (k, v))
    weights = (keys @ q[1, 0, 4, 2, 0]).softmax(0)
    torch.testing.assert_close(found[1, 0, 4, 2, 0], weights @ values, rtol=1e-5, atol=1e-6)


def test_flex_attention_is_the_masked_one():
    q, k, v = heads(6, 5, 7, channels=16)
    expected = neighborhood_attention(q, k, v, 3, "masked")
    torch.testing.assert_close(neighborhood_attention(q, k, v, 3, "flex"), expected, rtol=1e-5, atol=1e-5)


def test_a_neighbourhood_is_all_that_a_token_sees():
    block = awake(SelfAttention(24, 12, 16, 3, "masked"))
    x, condition = torch.randn(1, 6, 6, 6, 24), torch.randn(1, 16)
    moved = x.clone()
    moved[0, 5, 5, 5] += 1
    changed = (block(moved, places(6, 6, 6), condition) - block(x, places(6, 6, 6), condition)).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().amin(0).tolist() == [4, 4, 4]


# Memory, precision


def test_checkpointing_changes_no_gradient():
    plain, again = awake(toy()), toy(checkpointing=True)
    again.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 12, 12, 12), torch.tensor([0.4])
    for network in (plain, again):
        network(x, t).square().mean().backward()
    for ours, theirs in zip(again.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_bfloat16_keeps_the_time():
    network = awake(toy())
    x, t = torch.randn(1, 12, 12, 12), torch.tensor([0.4])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, t)
    torch.testing.assert_close(rounded.float(), network(x, t), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"depths": (1,)}, "one number a level"), ({"head": 16}, "does not divide"), ({"head": 8}, "knows no places")],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        toy(**changes)
