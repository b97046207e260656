"""Time grids fall strictly between exactly the two ends that were asked for."""

import pytest
import torch

from lightning_modules.processes.grids import check_grid, exponential_decay, karras, log_snr, uniform
from lightning_modules.processes.paths import VE, VP, Linear

GRIDS = [uniform, log_snr, exponential_decay, karras]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("path", [VP(), VE(), Linear()], ids=lambda path: type(path).__name__)
def test_every_grid_falls_from_start_to_stop(grid, path):
    for start, stop, steps in [(0.9, 1e-2, 1), (0.9, 1e-3, 7), (0.999, 1e-2, 200)]:
        times = grid(path, steps, start, stop)
        check_grid(path, times)
        assert times.dtype == torch.float64
        assert len(times) == steps + 1
        assert times[0] == start
        assert times[-1] == stop


def test_grids_are_even_in_what_they_are_named_after():
    path = VP()
    even = path.log_snr(log_snr(path, 10, 8.0, 1e-2)).diff()
    torch.testing.assert_close(even, even.mean().expand(10), rtol=1e-9, atol=0)
    seventh = torch.exp(-path.log_snr(karras(path, 10, 8.0, 1e-2)) / 7).diff()
    torch.testing.assert_close(seventh, seventh.mean().expand(10), rtol=1e-9, atol=0)
    times = exponential_decay(path, 64, 8.0, 1e-2)
    kappa = -times.diff() / times[:-1].clamp(max=1)
    torch.testing.assert_close(kappa, kappa.mean().expand(64), rtol=1e-9, atol=0)


def test_uniform_and_karras_grids_reach_the_data():
    assert uniform(Linear(), 4, 1.0, 0.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert karras(VP(), 4, 8.0, 0.0)[-1] == 0


@pytest.mark.parametrize(
    ("grid", "arguments", "said"),
    [
        (uniform, (VP(), 0, 8.0, 0.0), "steps=0: a grid has at least one step"),
        (uniform, (VP(), 4, 1.0, 2.0), "expected 0 <= stop < start <= inf"),
        (uniform, (VP(), 4, 1.0, -0.1), "expected 0 <= stop"),
        (uniform, (Linear(), 4, 1.5, 0.0), "start <= 1, the end of the path"),
        (log_snr, (VP(), 4, 8.0, 0.0), "infinite at the ends of the path"),
        (exponential_decay, (VP(), 4, 8.0, 0.01), "steps=4 are too few .* from 8.0: take 8"),
        (karras, (Linear(), 4, 1.0, 0.0), "no data left on Linear"),
    ],
)
def test_impossible_grids_are_refused(grid, arguments, said):
    with pytest.raises(ValueError, match=said):
        grid(*arguments)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([0.5], "1 times: a sampler needs at least one step"),
        ([0.5, 0.5, 0.1], "must fall strictly"),
        ([0.1, 0.5], "must fall strictly"),
        ([1.2, 0.5], r"times in \[0, 1\]"),
        ([0.5, -0.1], r"times in \[0, 1\]"),
        ([float("nan"), 0.1], "must fall strictly"),
    ],
)
def test_grids_that_do_not_fall_or_leave_the_path_are_refused(times, said):
    with pytest.raises(ValueError, match=said):
        check_grid(Linear(), torch.tensor(times))
