"""The algebra of preference embeddings against dense matrices, closed forms and what is known of cycles."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.alignment.preference_embedding import (
    cross_entropy,
    cyclic_share,
    direct_embedding,
    regression,
    right,
    scalar_embedding,
    score,
    score_matrix,
    spectral_embedding,
)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(n: int, d: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=generator(seed), dtype=dtype)


def random_skew(n: int, seed: int = 0) -> torch.Tensor:
    matrix = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return matrix - matrix.T


def cycle(n: int, dominant: bool = False) -> torch.Tensor:
    """+1 where i beats j: each item the next one, and the last item, where it is dominant, all the others."""
    table = torch.zeros(n + dominant, n + dominant)
    for i in range(n):
        table[i, (i + 1) % n] += 1
        table[(i + 1) % n, i] -= 1
    if dominant:
        table[n, :n], table[:n, n] = 1, -1
    return table


def operator(k: int) -> torch.Tensor:
    """R: k blocks [[0, -1], [1, 0]]."""
    return torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * k)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d", [2, 4, 6, 8])
def test_the_score_is_the_dense_one_and_the_negative_of_the_printed_one(d, dtype):
    first, second = embeddings(50, d, dtype), embeddings(50, d, dtype, seed=1)
    scale = torch.rand(50, d // 2, generator=generator(), dtype=dtype)
    dense = operator(d // 2).to(dtype)
    close = {"rtol": 0, "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(score(first, second), ((first @ dense.T) * second).sum(1), **close)
    torch.testing.assert_close(score(first, second), -(first * (second @ dense.T)).sum(1), **close)
    weighted = dense * scale.repeat_interleave(2, 1)[:, None]
    torch.testing.assert_close(
        score(first, second, scale), torch.einsum("pij,pj,pi->p", weighted, first, second), **close
    )
    one, other = (torch.view_as_complex(v.unflatten(1, (-1, 2)).contiguous()) for v in (first, second))
    torch.testing.assert_close(score(first, second), (one.conj() * other).imag.sum(1), **close)


def test_the_matrix_is_all_pairs_at_once_and_exactly_antisymmetric():
    vectors, scale = embeddings(7, 6, torch.float32), torch.rand(3, generator=generator())
    matrix = score_matrix(vectors, scale)
    assert torch.equal(matrix, -matrix.T)
    assert not matrix.diagonal().any()
    for i, j in itertools.permutations(range(7), 2):
        torch.testing.assert_close(matrix[i, j], score(vectors[i], vectors[j], scale), rtol=0, atol=1e-6)
    # antisymmetry leaves no room for an offset: the mean over all pairs, which a policy's target has, is 0
    assert abs(matrix.mean()) < 1e-7


def test_one_rotation_of_a_plane_changes_nothing_and_a_reflection_turns_the_sign():
    vectors, angle = embeddings(5, 4), torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = (vectors.unflatten(1, (2, 2)) @ turn.T).flatten(1)
    torch.testing.assert_close(score_matrix(turned), score_matrix(vectors), rtol=0, atol=1e-12)
    mirrored = (vectors.unflatten(1, (2, 2)) * torch.tensor([1.0, -1.0])).flatten(1)
    torch.testing.assert_close(score_matrix(mirrored), -score_matrix(vectors), rtol=0, atol=1e-12)


def test_embeddings_with_a_constant_second_coordinate_are_bradley_terry():
    rewards = embeddings(2, 9).requires_grad_()
    first, second = scalar_embedding(rewards[0][:, None]), scalar_embedding(rewards[1][:, None])
    ours = cross_entropy(score(first, second), torch.ones(9, dtype=torch.float64), tau=1.0).sum()
    (gradient,) = torch.autograd.grad(ours, rewards)
    theirs = -F.logsigmoid(rewards[0] - rewards[1]).sum()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, rewards)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4, 5, 6, 10])
def test_any_skew_matrix_has_an_exact_embedding(n):
    skew = random_skew(n, seed=n)
    assert direct_embedding(skew).shape == (n, 2 * n)
    assert spectral_embedding(skew).shape == (n, 2 * (n // 2))
    for construction in (direct_embedding, spectral_embedding):
        torch.testing.assert_close(score_matrix(construction(skew)), skew, rtol=0, atol=5e-14)


def test_a_table_that_is_not_antisymmetric_has_none():
    with pytest.raises(ValueError, match="average both orders"):
        direct_embedding(random_skew(4) + torch.eye(4))


@pytest.mark.parametrize(("n", "s", "loss"), [(3, 0.8660, 1.733e-4), (4, 1.0, 4.540e-5), (5, 0.9511, 7.406e-5)])
def test_unit_vectors_around_the_circle_are_a_cycle(n, s, loss):
    angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    scores = score_matrix(torch.stack([angles.cos(), angles.sin()], 1)).diagonal(1)
    torch.testing.assert_close(scores, torch.full_like(scores, s), rtol=0, atol=5e-5)
    losses = cross_entropy(scores, torch.ones_like(scores), tau=0.1)
    torch.testing.assert_close(losses, torch.full_like(losses, loss), rtol=5e-4, atol=0)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_best_scalar_on_a_balanced_cycle_is_constant_and_right_on_all_edges_but_one(n):
    reward = torch.randn(n, generator=generator(n), dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([reward], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(reward - reward.roll(-1), torch.ones(n, dtype=torch.float64), tau=1.0).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(math.log(2), abs=1e-9)
    assert (reward - reward.mean()).abs().max() < 1e-4
    orders = (torch.tensor(order).double() for order in itertools.permutations(range(n)))
    assert max((order > order.roll(-1)).double().mean().item() for order in orders) == pytest.approx((n - 1) / n)


def best_accuracy(table: torch.Tensor, d: int, normalise: bool, restarts: int = 30, steps: int = 300) -> float:
    """Of embeddings fitted to who beats whom, the best of all restarts; soft labels keep the loss from saturating."""
    vectors = torch.randn(restarts, len(table), d, generator=generator(d)).requires_grad_()
    optimizer, known = torch.optim.Adam([vectors], lr=0.1), table.triu(1) != 0
    for _ in range(steps):
        unit = F.normalize(vectors, dim=-1) if normalise else vectors
        scores = score_matrix(unit)[:, known]
        label = (table[known] > 0).float().expand_as(scores)
        loss = cross_entropy(scores.flatten(), label.flatten(), tau=0.1 if normalise else 1.0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (scores * table[known] > 0).float().mean(1).max().item()


@pytest.mark.parametrize("normalise", [True, False])
def test_a_cycle_below_a_dominant_item_needs_four_dimensions(normalise):
    """The item that beats all others confines them to a half-plane, where no cycle fits."""
    assert best_accuracy(cycle(3), 2, normalise) == 1.0
    assert best_accuracy(cycle(3, dominant=True), 2, normalise) == pytest.approx(5 / 6)
    assert best_accuracy(cycle(3, dominant=True), 4, normalise) == 1.0


def test_unit_embeddings_score_at_most_the_largest_scale():
    first, second = (F.normalize(embeddings(2000, 6, seed=seed), dim=1) for seed in (0, 1))
    scale = torch.softmax(embeddings(2000, 3, seed=2), 1)
    assert (score(first, second, scale).abs() <= scale.amax(1)).all()


def test_soft_labels_are_weighted_hard_ones_and_a_margin_shifts_the_better_ones_score():
    scores, ones = embeddings(1, 20)[0], torch.ones(20, dtype=torch.float64)
    hard = cross_entropy(scores, ones, 0.3), cross_entropy(scores, 0 * ones, 0.3)
    torch.testing.assert_close(cross_entropy(scores, 0.7 * ones, 0.3), 0.7 * hard[0] + 0.3 * hard[1])
    torch.testing.assert_close(cross_entropy(scores, ones, 0.3, margin=0.2), -F.logsigmoid((scores - 0.2) / 0.3))
    torch.testing.assert_close(cross_entropy(-scores, 0 * ones, 0.3, margin=0.2), -F.logsigmoid((scores - 0.2) / 0.3))
    target = torch.sigmoid(scores / 0.3)
    torch.testing.assert_close(regression(scores, target, 0.3), 0 * ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(regression(0 * scores, ones, 0.3), 100 * ones)


def test_a_tie_of_the_scores_is_wrong():
    verdicts = right(torch.tensor([0.0, 0.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.2]))
    assert verdicts.tolist() == [False, False, True, False, True]


def test_the_cyclic_share_is_none_of_an_order_and_all_of_a_cycle():
    reward = torch.tensor([3.0, 1.0, 0.0, -2.0])
    assert cyclic_share(reward[:, None] - reward) < 1e-12
    assert cyclic_share(cycle(3)) == 1
    assert cyclic_share(cycle(3, dominant=True)) == pytest.approx(0.5)


def test_an_odd_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match="3 dimensions, which is odd"):
        score(torch.ones(3), torch.ones(3))
