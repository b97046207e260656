"""The orthogonal factor by Newton-Schulz and by singular values."""

import pytest
import torch

from lightning_modules.optimizers.orthogonal import newton_schulz, polar, shape_factor


def with_singular_values(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(values)))[0]
    v = torch.linalg.qr(torch.randn(cols, len(values)))[0]
    return (u * values) @ v.T


@pytest.mark.parametrize(("least", "low", "high"), [(0.002, 0.68, 1.21), (0.0052, 0.68, 1.14)])
def test_five_steps_bring_singular_values_near_one(least, low, high):
    values = torch.logspace(0, torch.tensor(least).log10().item(), 200, dtype=torch.float64)
    for _ in range(5):  # the same polynomial of a singular value, exactly
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert low <= values.min() <= values.max() <= high


@pytest.mark.parametrize(("rows", "cols"), [(20, 48), (48, 20), (30, 30)])
def test_the_matrix_iteration_does_that_to_all_singular_values(rows, cols):
    matrix = with_singular_values(torch.linspace(0.05, 1, min(rows, cols)), rows, cols)
    found = torch.linalg.svdvals(newton_schulz(matrix).float())
    assert 0.6 <= found.min() <= found.max() <= 1.25


def test_both_turn_with_the_matrix():
    torch.manual_seed(1)
    turn, matrix = torch.linalg.qr(torch.randn(12, 12))[0], with_singular_values(torch.linspace(0.3, 1, 7), 12, 7)
    torch.testing.assert_close(polar(turn @ matrix), turn @ polar(matrix), rtol=0, atol=1e-5)
    turned = turn @ newton_schulz(matrix).float()
    assert (newton_schulz(turn @ matrix).float() - turned).norm() < 3e-2 * turned.norm()  # bfloat16


def test_the_polar_factor_is_orthogonal_and_zero_where_the_matrix_is():
    matrix = with_singular_values(torch.tensor([1.0, 0.1, 0.0]), 5, 4)
    torch.testing.assert_close(
        torch.linalg.svdvals(polar(matrix)), torch.tensor([1.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-5
    )
    assert torch.equal(polar(torch.zeros(3, 2)), torch.zeros(3, 2))
    assert torch.equal(newton_schulz(torch.zeros(3, 2)), torch.zeros(3, 2, dtype=torch.bfloat16))


def test_the_factors_of_shape():
    assert shape_factor(8, 2, "original") == 2
    assert shape_factor(2, 8, "original") == 1
    assert shape_factor(25, 100, "match_rms_adamw") == pytest.approx(2)
    assert shape_factor(25, 100, "none") == 1
