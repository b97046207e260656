"""MARS against the traces of the authors' class, and against the optimizers that it contains."""

import io
import itertools
import warnings

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

from lightning_modules.optimizers.mars import MARS

W0 = torch.tensor([[1, -2], [3, 0.5]], dtype=torch.float64)
CURVATURE = torch.tensor([[1, 4], [0.25, 1]], dtype=torch.float64)
Q = {"lr": 0.1, "betas": (0.95, 0.99), "eps": 1e-8, "weight_decay": 0.01, "gamma": 0.025, "clip": 1.0}
PATHS = {
    "single": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}


@pytest.fixture(params=PATHS)
def path(request) -> dict[str, bool]:
    return PATHS[request.param]


def quadratic_trace(start: torch.Tensor, steps: int, **options) -> list[list[float]]:
    """W, row by row, after each step on 0.5 sum(CURVATURE W^2)."""
    w = nn.Parameter(start.clone())
    optimizer = MARS([w], **{**Q, **options})
    trace = []
    for _ in range(steps):
        w.grad = CURVATURE * w.detach()
        optimizer.step()
        trace.append(w.flatten().tolist())
    return trace


def exactly(ours, theirs) -> None:
    torch.testing.assert_close(
        torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-9
    )


# The authors' class


@pytest.mark.parametrize("first_grad", ["zero", "same"])
def test_mars_adamw_while_the_clip_is_active(path, first_grad):
    # the clip normalises c_1, so that both conventions of the first step are one
    exactly(
        quadratic_trace(W0, 3, first_grad=first_grad, **path),
        [
            [0.8990000081, -1.8980000010, 2.8970000108, 0.3995000162],
            [0.7982674034, -1.7961002499, 2.7940839708, 0.3002770826],
            [0.6978611953, -1.6943003100, 2.6912428437, 0.2030315828],
        ],
    )


def test_mars_adamw_below_the_clip(path):
    exactly(
        quadratic_trace(0.05 * W0, 3, **path),
        [
            [-0.0500499864, 0.0000999983, 0.0498500181, -0.0750249729],
            [-0.0336982905, 0.0434567453, -0.0200162686, -0.0254600181],
            [-0.0083391418, 0.0520579812, -0.0598352320, 0.0149337937],
        ],
    )
    exactly(
        quadratic_trace(0.05 * W0, 3, first_grad="same", **path),
        [
            [-0.0500499800, 0.0000999975, 0.0498500267, -0.0750249600],
            [-0.0169256664, 0.0311515348, -0.0203675216, -0.0177947656],
            [0.0101235666, 0.0306551640, -0.0524116923, 0.0231221281],
        ],
    )


def test_mars_lion(path):
    steps = quadratic_trace(W0, 3, algo="mars-lion", **path)
    exactly(steps[-1], [0.6973028990, -1.6943058980, 2.6913088970, 0.1988013995])
    steps = quadratic_trace(0.05 * W0, 3, algo="mars-lion", **path)
    exactly(steps[-1], [-0.0500499500, -0.0000001999, -0.1501496501, 0.1250249750])


def test_mars_shampoo_with_singular_values(path):
    exactly(
        quadratic_trace(W0, 3, algo="mars-shampoo", orth="svd", **path),
        [
            [0.9821036185, -1.8994377745, 2.8984377745, 0.4826036185],
            [0.9638861336, -1.7990348260, 2.7970358260, 0.4648856336],
            [0.9454006055, -1.6987827970, 2.6957857960, 0.4468991060],
        ],
    )


# The exact variant

NOISE = (0, 0.02, -0.01, 0.03, -0.02)


def noisy_gradient(w: torch.Tensor, xi: float) -> torch.Tensor:
    return CURVATURE * (1 + 10 * xi) * w - xi


def noisy_trace(**options) -> list[list[float]]:
    w = nn.Parameter(0.05 * W0)
    optimizer = MARS([w], **{**Q, "lr": 0.01, **options})
    trace = []
    for xi in NOISE[:4]:

        def closure(xi=xi):
            w.grad = noisy_gradient(w.detach(), xi)

        optimizer.step(closure)
        trace.append(w.flatten().tolist())
    return trace


def test_the_exact_variant(path):
    exactly(
        noisy_trace(exact=True, **path),
        [
            [0.0399950014, -0.0899900002, 0.1399850018, 0.0149975027],
            [0.0312793726, -0.0801356625, 0.1309683943, 0.0097229569],
            [0.0224596448, -0.0706903250, 0.1216369289, 0.0034330143],
            [0.0154233937, -0.0611640089, 0.1131804761, 0.0022678168],
        ],
    )
    same = noisy_trace(exact=True, first_grad="same", **path)
    exactly(same[-1], [0.0140135786, -0.0604010270, 0.1118642997, 0.0038567944])
    exactly(noisy_trace(**path)[-1], [0.0166176117, -0.0614633227, 0.1149543171, 0.0049675860])


def test_looking_back_is_looking_ahead_at_the_next_batch():
    """The authors evaluate the next batch before the update, in the place of this batch at the old parameters."""
    w = nn.Parameter(0.05 * W0)
    optimizer = MARS([w], **{**Q, "lr": 0.01})
    for xi, following in itertools.pairwise(NOISE):
        w.grad = noisy_gradient(w.detach(), xi)
        ahead = noisy_gradient(w.detach(), following)
        optimizer.step()
        optimizer.state[w]["last_grad"].copy_(ahead)
    ours = torch.tensor(noisy_trace(exact=True)[-1], dtype=torch.float64)
    torch.testing.assert_close(w.detach().flatten(), ours, rtol=0, atol=1e-12)


def test_both_evaluations_draw_the_same_random_numbers():
    drawn = []
    w = nn.Parameter(torch.ones(3))
    optimizer = MARS([w], exact=True)

    def closure():
        drawn.append((optimizer.looking_back, torch.rand(())))
        w.grad = w.detach() * drawn[-1][1]

    for _ in range(3):
        optimizer.step(closure)
    assert [back for back, _ in drawn] == [False, False, True, False, True]
    assert drawn[1][1] == drawn[2][1] != drawn[3][1] == drawn[4][1]


def test_an_error_in_the_second_evaluation_leaves_the_parameters_where_they_were():
    w = nn.Parameter(torch.ones(3))
    optimizer = MARS([w], exact=True)

    def closure():
        if optimizer.looking_back:
            raise FloatingPointError
        w.grad = w.detach().clone()

    optimizer.step(closure)
    before = w.detach().clone()
    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert torch.equal(w, before)
    assert not optimizer.looking_back


# What it contains


def matrices(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((7, 5), (4, 9), (6, 6))]


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int, size: float = 1.0) -> None:
    """Steps on random gradients, the same ones at every call."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def both(ours, theirs, steps: int, dtype: torch.dtype = torch.float32, size: float = 1.0):
    pairs = []
    for make in (ours, theirs):
        parameters = matrices(dtype)
        descend(make(parameters), parameters, steps, size)
        pairs.append(torch.cat([p.detach().flatten() for p in parameters]))
    return pairs


@pytest.mark.parametrize(("clip", "size"), [(None, 1.0), (1.0, 0.05)])
def test_without_correction_it_is_adamw_to_the_bit(path, clip, size):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = both(
        lambda p: MARS(p, gamma=0.0, clip=clip, **options, **path),
        lambda p: torch.optim.AdamW(p, **options, **path),
        200,
        size=size,
    )
    assert torch.equal(ours, theirs)


def test_a_group_of_algo_adamw_is_adamw_to_the_bit(path):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = both(
        lambda p: MARS(p, algo="adamw", **options, **path), lambda p: torch.optim.AdamW(p, **options, **path), 20
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lion_is_a_mars_lion(path, dtype):
    beta1, beta2 = 0.9, 0.99
    ours, theirs = both(
        lambda p: MARS(
            p, 1e-2, (beta2, 0.0), weight_decay=0.1, gamma=1 - beta1 / beta2, clip=None, algo="mars-lion", **path
        ),
        lambda p: Lion(p, 1e-2, (beta1, beta2), weight_decay=0.1),
        200,
        dtype,
    )
    assert torch.equal(ours, theirs)


def muon(gamma: float):
    return lambda p: MARS(
        p,
        1e-2,
        (0.95, 0.0),
        1e-7,
        weight_decay=0.1,
        gamma=gamma,
        clip=None,
        algo="mars-shampoo",
        shape_scale="original",
    )


def test_muon_with_nesterov_momentum_is_a_mars_shampoo():
    def theirs(p):
        return torch.optim.Muon(p, 1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original")

    assert torch.equal(*both(muon(0.05), theirs, 10))
    long = both(muon(0.05), theirs, 200)
    assert (long[0] - long[1]).norm() < 1.3e-3 * long[1].norm()


def test_muon_without_nesterov_momentum_is_a_mars_shampoo_without_correction():
    def theirs(p):
        return torch.optim.Muon(p, 1e-2, weight_decay=0.1, momentum=0.95, nesterov=False, adjust_lr_fn="original")

    assert torch.equal(*both(muon(0.0), theirs, 50))


def test_all_paths_agree():
    for options in ({}, {"algo": "mars-lion"}, {"clip_scope": "global"}):
        ends = []
        for path in PATHS.values():
            parameters = matrices()
            descend(MARS(parameters, lr=1e-2, weight_decay=0.1, **options, **path), parameters, 20)
            ends.append(torch.cat([p.detach().flatten() for p in parameters]))
        assert (ends[1] - ends[0]).norm() < 1e-6 * ends[0].norm()
        assert (ends[2] - ends[0]).norm() < 1e-6 * ends[0].norm()


# The momentum


def momenta(gradients, previous=None, **options) -> torch.Tensor:
    """m_t of each step of MARS on a row of gradients, with those at x_{t-1} on the same batch where they are given."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = MARS([p], lr=0.0, betas=(0.95, 0.99), clip=None, **options)
    found = []
    for t, gradient in enumerate(gradients):
        if previous is not None and t:
            optimizer.state[p]["last_grad"].copy_(previous[t])
        p.grad = gradient.clone()
        optimizer.step()
        found.append(optimizer.state[p]["exp_avg"].clone())
    return torch.stack(found)


def test_the_momentum_is_quasi_hyperbolic():
    gradients = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    average = momenta(gradients, gamma=0.0)
    error = momenta(gradients, gamma=0.025) - ((1 - 0.025) * average + 0.025 * gradients)
    assert error.abs().max() < 1e-15


@pytest.mark.parametrize("first_grad", ["zero", "same"])
def test_without_noise_and_at_full_strength_the_exact_momentum_is_the_gradient(first_grad):
    w = nn.Parameter(W0.clone())
    optimizer = MARS([w], lr=0.01, gamma=1.0, clip=None, first_grad=first_grad, exact=True)
    for t in range(1, 30):
        now = CURVATURE * w.detach()
        first = now if t == 1 else first

        def closure():
            w.grad = CURVATURE * w.detach()

        optimizer.step(closure)
        missing = 0.95**t * first if first_grad == "same" else 0
        torch.testing.assert_close(optimizer.state[w]["exp_avg"], now - missing, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("gamma", "variance"), [(0.0, 0.025641), (0.025, 0.027438), (0.05, 0.030391), (1.0, 1.0)])
def test_the_variance_of_the_momentum_at_a_fixed_point(gamma, variance):
    gradients = torch.randn(500, 4000, generator=torch.Generator().manual_seed(0))
    settled = momenta(gradients, gamma=gamma)[150:]
    assert settled.var() == pytest.approx(variance, rel=0.015)
    if gamma < 1:  # the same noise at x_t and x_{t-1} cancels, whatever gamma
        assert momenta(gradients, gradients, gamma=gamma)[150:].var() == pytest.approx(0.025641, rel=0.015)


def test_the_lag_behind_a_drifting_gradient_and_the_order_of_the_errors():
    noise = torch.randn(400, 4000, generator=torch.Generator().manual_seed(0))
    mean = 0.02 * torch.arange(400)[:, None]

    def errors(gamma: float, exact: bool) -> torch.Tensor:
        found = momenta(mean + noise, mean - 0.02 + noise if exact else None, gamma=gamma)
        return (found - mean)[200:]

    for exact in (False, True):
        for gamma, lag in ((0.0, 0.380), (0.025, 0.3705), (1.0, 0.0)):
            assert errors(gamma, exact).mean() == pytest.approx(-lag, abs=3e-3)
    squared = [errors(*way).square().mean() for way in ((1.0, True), (0.025, True), (0.025, False), (0.0, False))]
    assert squared == sorted(squared)
    assert squared[0] == pytest.approx(0.026, abs=1e-3)
    assert squared[1:] == pytest.approx([0.163, 0.165, 0.170], abs=2e-3)
    assert errors(1.0, False).square().mean() == pytest.approx(1.0, rel=0.01)


# The clip, and gradients that are zero or missing


def test_the_corrected_gradient_of_each_tensor_is_clipped(path):
    parameters = matrices()
    optimizer = MARS(parameters, betas=(0.0, 0.99), clip=0.5, **path)
    descend(optimizer, parameters, 1, size=100.0)
    for p in parameters:
        assert optimizer.state[p]["exp_avg"].norm() == pytest.approx(0.5, rel=1e-5)


def test_the_global_clip_bounds_the_norm_over_all_groups():
    parameters = matrices()
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    optimizer = MARS(groups, betas=(0.0, 0.99), clip_scope="global")
    descend(optimizer, parameters, 1, size=100.0)
    moments = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in parameters])
    assert moments.norm() == pytest.approx(1.0, rel=1e-5)


def test_the_scale_of_all_gradients_does_not_matter_to_mars_shampoo():
    def make(p):
        return MARS(p, algo="mars-shampoo", orth="svd")

    ends = []
    for size in (10.0, 1e7):
        parameters = matrices(torch.float64)
        descend(make(parameters), parameters, 5, size)
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("algo", ["mars-adamw", "mars-lion", "mars-shampoo"])
@pytest.mark.parametrize("orth", ["ns", "svd"])
def test_zero_gradients_leave_only_the_decay(algo, orth, path):
    parameters = matrices()
    before = [p.detach().clone() for p in parameters]
    optimizer = MARS(parameters, lr=0.1, weight_decay=0.1, algo=algo, orth=orth, **path)
    descend(optimizer, parameters, 3, size=0.0)
    for p, start in zip(parameters, before):
        torch.testing.assert_close(p.detach(), start * 0.99**3)


def test_gradients_may_be_zeroed_in_place():
    ends = []
    for set_to_none in (True, False):
        parameters = matrices()
        optimizer = MARS(parameters, lr=0.1)
        torch.manual_seed(1)
        for _ in range(5):
            sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(*ends)


def test_a_parameter_without_a_gradient_is_left_alone_with_one_warning():
    parameters = matrices()
    optimizer = MARS(parameters, lr=0.1)
    descend(optimizer, parameters, 2)
    alone = parameters[0].detach().clone()
    parameters[0].grad = None
    with pytest.warns(UserWarning, match="no gradient"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert torch.equal(parameters[0], alone)


def test_a_step_without_any_gradient_does_nothing():
    parameters = matrices()
    optimizer = MARS(parameters, lr=0.1, weight_decay=0.1)
    descend(optimizer, parameters, 2)
    before = [p.detach().clone() for p in parameters]
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert all(torch.equal(p, start) for p, start in zip(parameters, before))


# Saving


@pytest.mark.parametrize("options", [{}, {"algo": "mars-lion"}, {"algo": "mars-shampoo"}, {"fused": True}], ids=str)
def test_it_goes_on_from_a_saved_state_with_the_saved_options(options):
    whole, halves = matrices(), matrices()
    optimizer = MARS(whole, lr=0.02, gamma=0.05, clip=0.7, betas=(0.9, 0.95), **options)
    descend(optimizer, whole, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for p, q in zip(halves, whole):
        p.data.copy_(q.data)
    other = MARS(halves)
    other.load_state_dict(torch.load(file, weights_only=True))
    descend(optimizer, whole, 5)
    descend(other, halves, 5)
    assert all(torch.equal(p, q) for p, q in zip(whole, halves))
    assert all(isinstance(value, torch.Tensor) for state in other.state.values() for value in state.values())


# Refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "optimizer.lr=-1.0"),
        ({"betas": (1.0, 0.99)}, "optimizer.betas"),
        ({"gamma": -0.1}, "optimizer.gamma=-0.1"),
        ({"gamma": 1.5}, "optimizer.gamma=1.5"),
        ({"clip": 0.0}, "optimizer.clip=0.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"algo": "mars"}, "mars-adamw, mars-lion"),
        ({"orth": "qr"}, "ns, svd"),
        ({"clip_scope": "layer"}, "tensor, global"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        MARS(matrices(), **options)


def test_orthogonalising_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*optimizer.groups"):
        MARS([nn.Parameter(torch.ones(3))], algo="mars-shampoo")


def test_looking_back_with_some_groups_only_is_refused():
    groups = [{"params": matrices()}, {"params": [nn.Parameter(torch.ones(3))], "exact": True}]
    with pytest.raises(ValueError, match=r"optimizer\.exact"):
        MARS(groups)


def test_sparse_and_complex_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        MARS(embedding.parameters()).step()
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="real"):
        MARS([p]).step()


def test_looking_back_needs_a_closure_from_the_second_step_on():
    parameters = matrices()
    optimizer = MARS(parameters, exact=True)
    descend(optimizer, parameters, 1)  # as torch's checkpoints do to make the state
    with pytest.raises(ValueError, match="closure"):
        descend(optimizer, parameters, 1)
