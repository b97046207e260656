"""Cutting a map and blending it again (cryofm.md, check 10)."""

import pytest
import torch

from lightning_modules.cryo.tiling import Tiling


@pytest.mark.parametrize(
    ("side", "tile", "overlap"), [(24, 24, 12), (40, 24, 12), (41, 16, 5), (33, 32, 31), (30, 10, 0), (21, 8, 7)]
)
def test_what_is_cut_and_blended_is_the_map(side, tile, overlap):
    tiling, volume = Tiling(side, tile, overlap), torch.randn(side, side, side)
    assert (tiling.blend(tiling.cut(volume, tiling.corners)) - volume).abs().max() < 1e-6


def test_tiles_reach_the_border_and_overlap_at_least_as_asked():
    starts = sorted({corner[0] for corner in Tiling(50, 16, 6).corners})
    assert starts == [0, 10, 20, 30, 34]
    assert Tiling(16, 16, 6).corners == [(0, 0, 0)]


def test_tiles_added_in_parts_are_tiles_added_at_once():
    tiling, volume = Tiling(30, 12, 6), torch.randn(30, 30, 30)
    total = torch.zeros(30, 30, 30, dtype=torch.float64)
    for start in range(0, len(tiling.corners), 5):
        some = tiling.corners[start : start + 5]
        tiling.add(total, some, tiling.cut(volume, some))
    torch.testing.assert_close(total.float(), volume)


def test_the_middle_of_a_tile_counts_more_than_its_edge():
    profile = Tiling(40, 16, 8).profile
    assert (profile[:8].diff() > 0).all()
    torch.testing.assert_close(profile, profile.flip(0))
    assert profile[0] > 0


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Tiling(16, 24, 8)
    with pytest.raises(ValueError, match="overlap=24"):
        Tiling(32, 24, 24)
