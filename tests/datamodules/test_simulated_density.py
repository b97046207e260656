"""Simulated densities: what makes a mixture, and points that do not depend on the process that they are dealt to."""

import logging

import pytest
import torch

from datamodules.simulated_density import Draws, SimulatedDensity, draw, mixture


def density(**changes):
    settings = {"weights": [0.3, 0.7], "means": [[-1.4], [0.6]], "covariances": [0.16, 0.16]}
    settings |= {"name": "simulated_density", "batch_size": 12, "steps": 5, "held_out": 4, "seed": 1, "limit": None}
    return SimulatedDensity(**(settings | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": [0.5, -0.5]}, r"data.weights=\[0.5, -0.5\]: weights of a mixture are at least 0"),
        ({"weights": []}, "with a positive sum"),
        ({"weights": [float("nan"), 1.0]}, "weights of a mixture"),
        ({"means": [[0.0]]}, "data.means has 1 entries for the 2 of data.weights"),
        ({"covariances": [0.1]}, "data.covariances has 1 entries"),
        ({"means": [[0.0, 1.0], [1.0]]}, "give all the same number of coordinates"),
        ({"covariances": [-0.1, 0.1]}, r"data.covariances\[0\] is not positive definite, .* -0.1"),
        ({"covariances": [[0.1, 0.1], 0.1]}, r"data.covariances\[0\] has the shape \(2,\) in 1 dimensions"),
        ({"batch_size": 0}, "data.batch_size=0 must be positive"),
        ({"limit": 0}, "data.limit=0 must be positive"),
    ],
)
def test_what_makes_no_mixture_is_refused_by_its_key(changes, said):
    with pytest.raises(ValueError, match=said):
        density(**changes)


def test_covariances_must_be_symmetric_and_positive_definite():
    for matrix, said in (
        ([[1.0, 2.0], [2.0, 1.0]], "not positive definite, its smallest eigenvalue is -1"),
        ([[1.0, 0.5], [0.0, 1.0]], "not symmetric and finite"),
        ([[1.0, 0.0], [0.0, 0.0]], "not positive definite, its smallest eigenvalue is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            mixture([1.0], [[0.0, 0.0]], [matrix])


def test_weights_are_scaled_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert mixture([1.0, 3.0], [[0.0], [1.0]], [1.0, 1.0]).weights.tolist() == [0.25, 0.75]
    assert "data.weights sum to 4: they are scaled" in caplog.text


def test_a_variance_a_diagonal_a_matrix_and_a_point_mass_are_covariances():
    found = mixture([0.25] * 4, [[0.0, 0.0]] * 4, [2.0, [1.0, 3.0], [[1.0, 0.2], [0.2, 1.0]], 0]).covariances
    assert found[0].tolist() == [[2, 0], [0, 2]]
    assert found[1].tolist() == [[1, 0], [0, 3]]
    assert found[3].tolist() == [[0, 0], [0, 0]]


def test_points_have_the_moments_of_the_mixture():
    law = mixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 2.0]], [[[0.5, 0.3], [0.3, 0.4]], 0.2])
    points = draw(law, 200_000, torch.Generator().manual_seed(0))
    mean = law.weights @ law.means
    spread = law.means - mean
    covariance = torch.einsum("k,kij->ij", law.weights, law.covariances + spread[:, :, None] * spread[:, None])
    torch.testing.assert_close(points.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(points.T), covariance, rtol=0, atol=0.02)


def test_a_step_has_the_same_points_however_it_is_dealt_out():
    data = density()
    alone = Draws(data, rank=0, world=1, accumulate=1)[3]
    dealt = [Draws(data, rank, world=2, accumulate=2)[3 * 2 + part] for part in (0, 1) for rank in (0, 1)]
    for name, values in alone.items():
        together = torch.cat([micro[name] for micro in dealt])
        torch.testing.assert_close(together.sort(0)[0], values.sort(0)[0], rtol=0, atol=0)
    assert not torch.equal(alone["points"], data.drawn(12, 4)["points"])
    with pytest.raises(ValueError, match="cannot be dealt out to 5 processes"):
        Draws(data, rank=0, world=5, accumulate=1)
