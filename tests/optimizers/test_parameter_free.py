"""AdaGrad++ and Adam++ against traces in float64, DoG, and robust regression without a learning rate."""

import io
import math

import numpy as np
import pytest
import torch
from dog import DoG
from torch import nn

from lightning_modules.optimizers.parameter_free import AdaGradPP, AdamPP

NEARLY_ZERO = 1e-300  # the traces are for delta = 0, which would divide 0 by 0 elsewhere
VARIANTS = {
    "adagrad": lambda p, **options: AdaGradPP(p, **options),
    "1": lambda p, **options: AdamPP(p, case=1, **options),
    "2": lambda p, **options: AdamPP(p, case=2, **options),
    "2s": lambda p, **options: AdamPP(p, case="2s", **options),
}
TRACES = {  # eta, x1, x2 after each step
    "adagrad": [
        (0.1, 0.9, -1.9),
        (0.1, 0.8331035268, -1.8311250538),
        (0.1678886241, 0.7447146229, -1.7382767034),
        (0.2585243777, 0.6346302469, -1.6181069969),
    ],
    "1": [
        (0.1, 0.99, -1.99),
        (0.1, 0.9765686940, -1.9765667855),
        (0.1, 0.9609362683, -1.9609272544),
        (0.1, 0.9437733527, -1.9437476750),
    ],
    "2": [
        (0.1, 0.9, -1.9),
        (0.1, 0.8051316702, -1.8049091375),
        (0.1949796279, 0.6300101099, -1.6286235506),
        (0.3706838181, 0.3186332764, -1.3109496860),
    ],
}
TRACES["2s"] = TRACES["2"]  # v increases


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def point(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def iterates(make, steps: int, scale: float = 1.0, size: float = 1.0, noise: float = 0.0, **options) -> torch.Tensor:
    """x after each step on scale * 0.5 (x1^2 + 0.25 x2^2) with targets of that size, from size * (1, -2)."""
    x = nn.Parameter(size * torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make([x], **options)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        random = noise * size * torch.randn(2, generator=generator, dtype=torch.float64)
        x.grad = scale * (torch.tensor([1.0, 0.25], dtype=torch.float64) * x.detach() + random)
        optimizer.step()
        found.append(x.detach().clone())
    return torch.stack(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_steps_on_a_quadratic(name):
    x = point(1, -2)
    betas = {} if name == "adagrad" else {"betas": (0.9, 0.99)}
    optimizer = VARIANTS[name]([x], eta_init=0.1, delta=NEARLY_ZERO, **betas)
    for eta, *after in TRACES[name]:
        x.grad = torch.tensor([1, 0.25], dtype=torch.float64) * x.detach()
        optimizer.step()
        assert optimizer.scales()["eta"].item() == pytest.approx(eta, abs=1e-9)
        assert x.tolist() == pytest.approx(after, abs=1e-9)


def test_in_one_dimension_adagrad_pp_is_dog():
    ours, theirs = point(1.0), point(1.0)
    pair = (
        (ours, AdaGradPP([ours], eta_init=1e-4, eta_init_mode="rel_norm", delta=NEARLY_ZERO)),
        (theirs, DoG([theirs], reps_rel=1e-4, eps=NEARLY_ZERO)),
    )
    noise = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for xi in noise:
        for x, optimizer in pair:
            x.grad = x.detach() - 3 + xi
            optimizer.step()
        assert ours.item() == pytest.approx(theirs.item(), abs=4e-15)


def test_case_1_without_momentum_is_adagrad_pp():
    options = {"noise": 0.5, "eta_init": 1e-2}
    ours = iterates(VARIANTS["1"], 50, betas=(0.0, 0.99), **options)
    assert torch.equal(ours, iterates(VARIANTS["adagrad"], 50, **options))


def test_the_maximum_matters_once_the_squares_decrease():
    growing = {"eta_init": 1e-3, "scale": -1.0}  # away from the minimum
    assert torch.equal(iterates(VARIANTS["2"], 20, **growing), iterates(VARIANTS["2s"], 20, **growing))
    shrinking = {"eta_init": 0.5, "betas": (0.9, 0.9)}
    assert not torch.equal(iterates(VARIANTS["2"], 20, **shrinking), iterates(VARIANTS["2s"], 20, **shrinking))


def test_the_scale_of_the_loss_does_not_matter(variant):
    plain = iterates(variant, 40, noise=0.3, eta_init=1e-3, delta=NEARLY_ZERO)
    scaled = iterates(variant, 40, scale=1e4, noise=0.3, eta_init=1e-3, delta=NEARLY_ZERO)
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-14)
    nearly = iterates(variant, 40, noise=0.3, eta_init=1e-3, delta=1e-9)
    torch.testing.assert_close(nearly, plain, rtol=0, atol=1e-6)


def test_the_iterates_scale_with_the_problem(variant):
    plain = iterates(variant, 40, noise=0.3, eta_init=1e-3, delta=NEARLY_ZERO)
    large = iterates(variant, 40, noise=0.3, size=1e3, eta_init=1.0, delta=NEARLY_ZERO)
    torch.testing.assert_close(large / 1e3, plain, rtol=1e-12, atol=1e-14)


def test_eta_grows_to_the_greatest_distance_and_no_further(variant):
    x = point(1, -2)
    optimizer = variant([x], eta_init=1e-3)
    noise = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, farthest = 0.0, 1e-3
    for xi in noise:
        farthest = max(farthest, ((x.detach() - torch.tensor([1, -2])).norm() / math.sqrt(2)).item())
        x.grad = x.detach() + 0.3 * xi
        optimizer.step()
        eta = optimizer.scales()["eta"].item()
        assert before <= eta == pytest.approx(farthest, rel=1e-12)
        before = eta


@pytest.mark.parametrize(("eta_init", "steps"), [(1e-8, 129), (1e-6, 80), (1e-4, 42), (1e-2, 16)])
def test_a_tiny_start_costs_only_a_logarithm_of_steps(eta_init, steps):
    x = point(0.0)
    optimizer = AdaGradPP([x], eta_init=eta_init)
    taken = 0
    while x.item() < 1:
        x.grad = torch.sign(x.detach() - 1)
        optimizer.step()
        taken += 1
    assert taken == steps


# Robust regression


def robust_gaps(eta_init: float, seed: int, steps: list[int]) -> tuple[list[float], float]:
    """f - f* of the mean iterate at these steps, and of the last iterate, on mean |A x - b| row by row."""
    generator = np.random.default_rng(0)
    n, d = 500, 10
    solution = 2 * generator.standard_normal(d)
    A = generator.standard_normal((n, d)) * np.logspace(0, -1, d)
    b = A @ solution + 0.5 * generator.laplace(size=n)
    rows = np.random.default_rng(seed).integers(n, size=steps[-1])
    A, b = torch.from_numpy(A), torch.from_numpy(b)
    x = nn.Parameter(torch.zeros(d, dtype=torch.float64))
    optimizer = AdaGradPP([x], eta_init=eta_init, average=True)
    gaps = []

    def gap(y: torch.Tensor) -> float:
        return (A @ y - b).abs().mean().item() - 0.490137

    assert gap(x.detach()) == pytest.approx(0.578726, abs=1e-5)
    for t, row in enumerate(rows, start=1):
        a = A[row]
        x.grad = torch.sign(a @ x.detach() - b[row]) * a
        optimizer.step()
        if t in steps:
            gaps.append(gap(optimizer.state[x]["average"]))
    return gaps, gap(x.detach())


def test_robust_regression_needs_no_learning_rate():
    gaps, last = robust_gaps(1e-2, 0, [500, 3000])
    assert gaps[1] <= min(0.004, last)
    assert math.log(gaps[1] / gaps[0]) / math.log(6) <= -0.5


@pytest.mark.slow
def test_robust_regression_over_eight_decades_of_the_start():
    published = {1e-8: 0.0085, 1e-6: 0.0074, 1e-4: 0.0069, 1e-2: 0.0067, 1.0: 0.0102}  # of the last iterate
    ends = []
    for eta_init, theirs in published.items():
        runs = [robust_gaps(eta_init, seed, [3000, 30000]) for seed in range(3)]
        middle, end = np.mean([gaps for gaps, _ in runs], axis=0)
        print(eta_init, middle, end, np.mean([last for _, last in runs]))
        assert end <= 0.001
        assert math.log(end / middle) / math.log(10) <= -0.5
        assert np.mean([last for _, last in runs]) == pytest.approx(theirs, abs=2e-3)
        ends.append(end)
    assert max(ends) <= 2 * min(ends)
    assert max(ends) <= 3 * 0.0003  # AdaGrad at the best of its learning rates


# State


def network() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (4,), ())]


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], seed: int, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_it_goes_on_from_a_saved_state_to_the_bit(variant):
    whole, halves = network(), network()
    options = {"eta_init": 1e-2, "weight_decay": 0.1, "average": True}
    optimizer = variant([{"params": whole[:1]}, {"params": whole[1:]}], **options)
    descend(optimizer, whole, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for p, q in zip(halves, whole):
        p.data.copy_(q.data)
    other = variant([{"params": halves[:1]}, {"params": halves[1:]}])
    other.load_state_dict(torch.load(file, weights_only=True))
    for each, parameters in ((optimizer, whole), (other, halves)):
        descend(each, parameters, 2)
    assert all(torch.equal(p, q) for p, q in zip(whole, halves))
    assert all(torch.equal(optimizer.scales()[name], other.scales()[name]) for name in optimizer.scales())
    assert other.param_groups[0]["eta"] is other.param_groups[1]["eta"]
    assert optimizer.scales()["distance"] > 1e-3


def test_the_distance_is_over_all_groups():
    parts, one = network(), network()
    descend(AdamPP([{"params": parts[:1]}, {"params": parts[1:]}], eta_init=0.1), parts, 0)
    descend(AdamPP(one, eta_init=0.1), one, 0)
    assert all(torch.equal(p, q) for p, q in zip(parts, one))


def test_the_start_is_scaled_by_the_norm_of_the_parameters():
    for mode, factor in (("flat", 1), ("rel_norm", 4), ("rel_sq", 10)):
        x = nn.Parameter(torch.tensor([3.0, 0.0]))
        optimizer = AdamPP([x], eta_init=0.1, eta_init_mode=mode)
        x.grad = torch.zeros(2)
        optimizer.step()
        assert optimizer.scales()["eta"].item() == pytest.approx(0.1 * factor)
        assert torch.equal(x.detach(), torch.tensor([3.0, 0.0]))


def test_the_mean_of_the_iterates_takes_the_place_of_the_parameters_and_gives_it_back():
    x = point(1, -2)
    optimizer = AdaGradPP([x], eta_init=0.1, average=True)
    weighted, total = torch.zeros(2, dtype=torch.float64), 0.0
    for _ in range(10):
        before = x.detach().clone()
        x.grad = x.detach().clone()
        optimizer.step()
        eta = optimizer.scales()["eta"].item()
        weighted, total = weighted + eta * before, total + eta
    last = x.detach().clone()
    optimizer.eval()
    optimizer.eval()
    torch.testing.assert_close(x.detach(), weighted / total, rtol=1e-12, atol=0)
    optimizer.train()
    assert torch.equal(x, last)


def test_the_decay_is_that_of_an_adam_of_equal_steps():
    x = point(1.0)
    optimizer = AdamPP([x], eta_init=0.1, weight_decay=0.5)
    expected = 1.0
    for t in range(5):
        x.grad = torch.zeros(1, dtype=torch.float64)
        optimizer.step()
        scales = optimizer.scales()
        expected *= 1 - scales["eta"].item() * 0.5 / math.sqrt(t + 1)
        assert scales["lr_eff"].item() == pytest.approx(scales["eta"].item() / math.sqrt(t + 1))
        assert x.item() == pytest.approx(expected)


def test_a_factor_of_zero_leaves_the_parameters():
    parameters = network()
    before = [p.detach().clone() for p in parameters]
    descend(AdamPP(parameters, lr=0.0, weight_decay=0.1), parameters, 0)
    assert all(torch.equal(p, start) for p, start in zip(parameters, before))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"eta_init": 0.0}, r"optimizer\.eta_init=0\.0"),
        ({"delta": 0.0}, r"optimizer\.delta"),
        ({"lr": -1.0}, r"optimizer\.lr"),
        ({"betas": (1.0, 0.9)}, r"optimizer\.betas"),
        ({"lam": 0.0}, "lam=0"),
        ({"case": "3"}, "adagrad, 1, 2, 2s"),
        ({"eta_init_mode": "norm"}, "rel_norm"),
        ({"decay_mode": "linear"}, "sqrt, full"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        AdamPP(network(), **options)


def test_parameters_too_coarse_for_the_first_steps_are_refused():
    with pytest.raises(ValueError, match=r"bfloat16.*trainer\.precision"):
        AdamPP([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        AdamPP(embedding.parameters()).step()
