import math

import pytest
import torch

from lightning_modules.alignment.kahneman_tversky import kto, reference_point

RIGHT, WRONG = torch.tensor([1.0]), torch.tensor([0.0])


def test_losses_are_the_papers() -> None:
    d, z0, beta = torch.tensor([1.5, 1.5], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), 0.1
    losses = kto(d, torch.tensor([1.0, 0.0], dtype=torch.float64), z0, beta, 1.33, 0.7)
    right = 1.33 * (1 - 1 / (1 + math.exp(-0.1)))
    wrong = 0.7 * (1 - 1 / (1 + math.exp(0.1)))
    assert losses.tolist() == pytest.approx([right, wrong], abs=1e-12)


def test_a_response_at_the_reference_point_loses_half_its_lambda() -> None:
    d = torch.tensor([0.3, 0.3])
    losses = kto(d, torch.tensor([1.0, 0.0]), torch.tensor(0.3), 0.1, 2.0, 4.0)
    assert losses.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("outcome", "sign"), [(RIGHT, -1.0), (WRONG, 1.0)])
def test_descent_raises_desirable_and_lowers_undesirable_responses(outcome: torch.Tensor, sign: float) -> None:
    d = torch.tensor([0.2], requires_grad=True)
    kto(d, outcome, torch.tensor(0.0), 0.1).sum().backward()
    assert d.grad.sign().item() == sign


def test_responses_far_from_the_reference_point_saturate_without_losing_digits() -> None:
    far = torch.tensor([500.0])
    assert kto(far, RIGHT, torch.tensor(0.0), 0.1).item() == pytest.approx(math.exp(-50), rel=1e-4)
    assert kto(-far, WRONG, torch.tensor(0.0), 0.1).item() == pytest.approx(math.exp(-50), rel=1e-4)
    assert kto(1e4 * far, WRONG, torch.tensor(0.0), 0.1).item() == 1.0


def test_the_reference_point_is_the_mean_and_never_negative() -> None:
    assert reference_point(torch.tensor([1.0, -0.5])).item() == 0.25
    assert reference_point(torch.tensor([-1.0, 0.5])).item() == 0.0


def test_the_reference_point_gets_no_gradient() -> None:
    mismatched = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not reference_point(mismatched).requires_grad
    z0 = torch.tensor(0.5, requires_grad=True)
    d = torch.tensor([0.2], requires_grad=True)
    kto(d, RIGHT, z0, 0.1).sum().backward()
    assert z0.grad is None
