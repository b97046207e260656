"""MARS: a variance-reduced gradient for AdamW, Lion and orthogonalised steps (arXiv 2411.10438).

With g_t the gradient at x_t and q_t a gradient at x_{t-1}, k = gamma beta1 / (1 - beta1) and m_0 = 0:

    c_t = g_t + k (g_t - q_t),   c_t <- c_t / max(1, ||c_t|| / clip),   m_t = beta1 m_{t-1} + (1 - beta1) c_t

q_t is g_{t-1}, or with `exact` the gradient at x_{t-1} on the batch of step t (Algorithm 1). gamma = 0 is the optimizer
itself; gamma = 1 - momentum under "mars-shampoo" is Muon with Nesterov momentum; gamma = 1 - beta1 / beta2 under
"mars-lion" is Lion (eq. 3.18).
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from lightning_modules.optimizers.orthogonal import QUINTIC, newton_schulz, polar, shape_factor
from lightning_modules.optimizers.sharding import gathered, local, share, squared_norms

CHOICES = {
    "algo": ("mars-adamw", "mars-lion", "mars-shampoo", "adamw"),
    "clip_scope": ("tensor", "global"),
    "first_grad": ("zero", "same"),
    "orth": ("ns", "svd"),
    "shape_scale": ("original", "match_rms_adamw", "none"),
}


class _Lists(NamedTuple):
    """What a step needs of a group's parameters that have a gradient: of each tensor, the share of this process."""

    group: dict[str, Any]
    params: list[Tensor]  # whole, possibly sharded
    values: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    lasts: list[Tensor]  # q_t, and c_t in its place once it is corrected
    steps: list[Tensor]


class MARS(Optimizer):
    """MARS-AdamW, MARS-Lion, MARS-Shampoo (Algorithms 2 to 4) and AdamW, chosen for each parameter group by `algo`.

    All options may differ from group to group but `exact`. `gamma` in [0, 1] is the strength of the correction. `clip`
    bounds the norm of c_t, of each tensor or ("global") of all that have this scope; None leaves it. `first_grad` is
    q_1: "zero" as in the authors' code, or "same", g_1, as in the paper. Matrices are orthogonalised by `ns_steps`
    steps of Newton-Schulz or by singular values, without the division of m_t by 1 - beta1 on which the
    result does not depend.
    `foreach` (the default) works on lists of tensors, `fused` gives c_t to torch's fused AdamW, and with neither there
    is one tensor after the other.

    With `exact`, `step` calls its closure twice, the second time at the previous parameters and with the same random
    numbers of torch; meanwhile `looking_back` is True.

    Raises ValueError where an option is out of range, a gradient is sparse or complex, or "mars-shampoo" meets a
    parameter that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: Sequence[float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        algo: str = "mars-adamw",
        clip: float | None = 1.0,
        clip_scope: str = "tensor",
        first_grad: str = "zero",
        orth: str = "ns",
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] = QUINTIC,
        shape_scale: str = "original",
        exact: bool = False,
        foreach: bool = True,
        fused: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        self.looking_back = False
        self._warned = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _refuse(self.param_groups[-1], self.param_groups[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self._evaluate(closure)
        groups = [lists for group in self.param_groups if (lists := self._lists(group)).params]
        corrected = [lists for lists in groups if lists.group["algo"] != "adamw"]
        for lists in corrected:
            _correct(lists)
        _clip([lists for lists in corrected if lists.group["clip"] is not None])
        for lists in groups:
            UPDATES[lists.group["algo"]](lists)
        for lists in corrected:
            # a copy: the next backward may zero or write over what a reference points at
            torch._foreach_copy_(lists.lasts, lists.grads)
        return loss

    # The exact variant

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """The loss and gradients at x_t; with `exact`, those at x_{t-1} are in `last_grad` afterwards."""
        previous = {p: state["prev_param"] for p, state in self.state.items() if "prev_param" in state}
        if closure is None:
            if previous:
                raise ValueError(
                    "optimizer.exact=true evaluates a batch twice, and step() was called without a closure: take "
                    "trainer.precision=bf16-mixed or 32-true, or optimizer.exact=false"
                )
            return None
        states = _random_states(previous)
        with torch.enable_grad():
            loss = closure()
        if previous:
            self._look_back(closure, previous, states)
        return loss

    def _look_back(self, closure: Callable[[], Any], previous: dict[Tensor, Tensor], states: list[Any]) -> None:
        """Put the gradient at x_{t-1} into `last_grad`, and x_t into `prev_param`."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = {p: p.grad.clone() for p in params if p.grad is not None}
        for p, before in previous.items():
            now = p.clone()
            p.copy_(before)
            before.copy_(now)
        self.looking_back = True
        try:
            for restore, state in states:
                restore(state)
            with torch.enable_grad():
                closure()
        finally:
            self.looking_back = False
            for p, now in previous.items():
                p.copy_(now)
        for p in params:
            if p.grad is not None and "last_grad" in self.state.get(p, ()):
                self.state[p]["last_grad"].copy_(p.grad)
            p.grad = None if p.grad is None else grads.get(p)

    # State

    def _lists(self, group: dict[str, Any]) -> _Lists:
        params = [p for p in group["params"] if p.grad is not None]
        if params and any(p.grad is None and "last_grad" in self.state.get(p, ()) for p in group["params"]):
            self._warn_of_stale()
        for p in params:
            if p.grad.is_sparse or p.is_complex():
                raise ValueError(f"MARS takes dense, real gradients, and one of shape {tuple(p.shape)} is not")
            if "exp_avg" not in self.state[p]:
                self._begin(p, group)
        states = [self.state[p] for p in params]
        columns = [local([s[name] for s in states if name in s]) for name in ("exp_avg", "exp_avg_sq", "last_grad")]
        steps = [state["step"] for state in states if "step" in state]
        return _Lists(group, params, local(params), local([p.grad for p in params]), *columns, steps)

    def _begin(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["exp_avg"] = torch.zeros_like(p)
        if group["algo"].endswith("adamw"):
            state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
            state["exp_avg_sq"] = torch.zeros_like(p)
        if group["algo"] != "adamw":
            state["last_grad"] = p.grad.clone() if group["first_grad"] == "same" else torch.zeros_like(p)
        if group["exact"]:
            state["prev_param"] = p.detach().clone()

    def _warn_of_stale(self) -> None:
        if not self._warned:
            warnings.warn(
                "a parameter had no gradient at a step: MARS takes its last one for the previous", stacklevel=4
            )
        self._warned = True


def _random_states(previous: dict[Tensor, Tensor]) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """What sets torch's generators, of the CPU and of the parameters' devices, and to which states."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    for device in {p.device for p in previous if p.device.type != "cpu"}:
        module = torch.get_device_module(device)
        states.append((functools.partial(module.set_rng_state, device=device), module.get_rng_state(device)))
    return states


def _refuse(group: dict[str, Any], first: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is out of range, or its parameters are not for its algorithm."""
    for key, choices in CHOICES.items():
        if group[key] not in choices:
            raise ValueError(f"optimizer.{key}={group[key]}: there are {', '.join(choices)}")
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"optimizer.{key}={group[key]} must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"optimizer.betas={list(group['betas'])} must lie in [0, 1)")
    if not 0 <= group["gamma"] <= 1:
        raise ValueError(f"optimizer.gamma={group['gamma']} must lie in [0, 1]")
    if group["clip"] is not None and not group["clip"] > 0:
        raise ValueError(f"optimizer.clip={group['clip']} must be positive, or null for none")
    if group["exact"] != first["exact"]:
        raise ValueError(
            "optimizer.exact looks back with all parameters or none: give it to the optimizer, not a group"
        )
    other = next((p for p in group["params"] if p.ndim != 2), None)
    if group["algo"] == "mars-shampoo" and other is not None:
        raise ValueError(
            f"mars-shampoo orthogonalises matrices, and a parameter has the shape {tuple(other.shape)}: give it a "
            "group of its own in optimizer.groups, with algo: adamw or mars-adamw"
        )


def _correct(lists: _Lists) -> None:
    """c_t in the place of q_t: the point beyond g_t on the line from q_t."""
    beta1 = lists.group["betas"][0]
    k = lists.group["gamma"] * beta1 / (1 - beta1)
    if lists.group["foreach"] or lists.group["fused"]:
        torch._foreach_lerp_(lists.lasts, lists.grads, 1 + k)
        return
    for last, grad in zip(lists.lasts, lists.grads):
        last.copy_(grad + k * (grad - last))


def _clip(groups: list[_Lists]) -> None:
    """Divide each c_t by max(1, norm / clip), without waiting for the norms on the host."""
    if not groups:
        return
    everything = list(itertools.chain.from_iterable(lists.lasts for lists in groups))
    params = list(itertools.chain.from_iterable(lists.params for lists in groups))
    squares = squared_norms(everything, params).split([len(lists.lasts) for lists in groups])
    total = sum(square.sum() for lists, square in zip(groups, squares) if lists.group["clip_scope"] == "global")
    for lists, square in zip(groups, squares):
        square = total.expand(len(square)) if lists.group["clip_scope"] == "global" else square
        factors = (square.sqrt() / lists.group["clip"]).clamp_min(1).to(lists.lasts[0].dtype)
        torch._foreach_div_(lists.lasts, list(factors.unbind()))


def _adamw(lists: _Lists) -> None:
    group = lists.group
    adam(
        lists.values,
        lists.lasts if group["algo"] == "mars-adamw" else lists.grads,
        lists.exp_avgs,
        lists.exp_avg_sqs,
        [],
        lists.steps,
        foreach=group["foreach"] and not group["fused"],
        fused=group["fused"],
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _lion(lists: _Lists) -> None:
    """x <- x - lr (sign(m) + weight_decay x)."""
    group = lists.group
    decay, lr, weight = 1 - group["lr"] * group["weight_decay"], group["lr"], 1 - group["betas"][0]
    if group["foreach"] or group["fused"]:
        torch._foreach_lerp_(lists.exp_avgs, lists.lasts, weight)
        torch._foreach_mul_(lists.values, decay)
        torch._foreach_copy_(lists.lasts, lists.exp_avgs)  # c_t is done with: no memory for the signs
        torch._foreach_sign_(lists.lasts)
        torch._foreach_add_(lists.values, lists.lasts, alpha=-lr)
        return
    for p, m, c in zip(lists.values, lists.exp_avgs, lists.lasts):
        m.lerp_(c, weight)
        p.mul_(decay).sub_(m.sign(), alpha=lr)


def _shampoo(lists: _Lists) -> None:
    """x <- x - lr (s U V^T + weight_decay x), on the whole matrix also where it is sharded."""
    group = lists.group
    for p, value, m, c in zip(lists.params, lists.values, lists.exp_avgs, lists.lasts):
        m.lerp_(c, 1 - group["betas"][0])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        scale = shape_factor(*p.shape, group["shape_scale"])
        value.add_(_direction(p, m, group), alpha=-group["lr"] * scale)


def _direction(p: Tensor, m: Tensor, group: dict[str, Any]) -> Tensor:
    matrix = gathered(m, p)
    if group["orth"] == "svd":
        return share(polar(matrix), p)
    return share(newton_schulz(matrix, group["ns_steps"], group["ns_coefficients"], group["eps"]), p)


UPDATES = {"mars-adamw": _adamw, "adamw": _adamw, "mars-lion": _lion, "mars-shampoo": _shampoo}
