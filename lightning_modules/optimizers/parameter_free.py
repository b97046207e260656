"""AdaGrad++ and Adam++ (arXiv 2412.19444): the step scale is the distance from the start, so no learning rate is tuned.

With x_0 the start, d the number of all parameters, g_t the gradient and c the base factor `lr`, which a schedule moves:

    eta_t = max(eta_{t-1}, ||x_t - x_0|| / sqrt(d)),   eta_{-1} = eta_init
    x_{t+1} = x_t - c eta_t m_t / (delta + s_t)

AdaGrad++ (Algorithm 1) has m_t = g_t and s_t^2 = sum_{i <= t} g_i^2. Adam++ (Algorithm 2) has
m_t = beta1 lam^t m_{t-1} + (1 - beta1 lam^t) g_t, without bias correction, and s_t by its case.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.optimizers.sharding import local, squared_norms

CASES = ("adagrad", "1", "2", "2s")
INITIAL = ("flat", "rel_norm", "rel_sq")
DECAYS = ("sqrt", "full")
SCALARS = ("eta", "eta_sum", "distance")  # float64, the same tensors in every group


class AdamPP(Optimizer):
    """Adam++, and with weight decay AdamW++.

    `case` says what s_t is: "1", the root of the sum of squared gradients; "2", sqrt((t+1) max_{i<=t} v_i) with v_t the
    average of squared gradients by beta2; "2s", sqrt((t+1) v_t), which the paper's experiments use. `lr` is the factor
    c, 1 in the paper, and the only thing that a schedule moves. `eta_init` is taken as it is ("flat"), or
    times 1 + ||x_0|| ("rel_norm") or 1 + ||x_0||^2 ("rel_sq"). Decay multiplies the parameters by
    1 - c eta_t weight_decay, divided by sqrt(t+1) with `decay_mode` "sqrt" (ours: the paper gives none).
    `average` keeps the mean of the iterates weighted by eta, which `eval()` puts in the place of the parameters until
    `train()`.

    eta, its sum, the distance and the step are tensors in the groups: a state holds all that the method knows.
    Raises ValueError where an option is out of range, and for parameters below float32, where first steps vanish.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: Sequence[float] = (0.9, 0.999),
        lam: float = 1.0,
        delta: float = 1e-8,
        weight_decay: float = 0.0,
        case: str | int = "2s",
        eta_init: float = 1e-6,
        eta_init_mode: str = "flat",
        decay_mode: str = "sqrt",
        average: bool = False,
    ) -> None:
        defaults = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        defaults |= {"case": str(case), "averaged": False, "step": torch.zeros((), dtype=torch.int64)}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _refuse(self.param_groups[-1])
        first = self.param_groups[0]
        zero = torch.zeros((), dtype=torch.float64, device=first["params"][0].device)
        self._share({name: first.get(name, zero.clone()) for name in SCALARS})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        first = self.param_groups[0]
        device = first["params"][0].device
        self._share({name: first[name].to(device) for name in SCALARS} | {"step": first["step"].cpu()})

    def _share(self, scalars: dict[str, Tensor]) -> None:
        for group in self.param_groups:
            group.update(scalars)

    def scales(self) -> dict[str, Tensor]:
        """eta_t, the distance r_t = ||x_t - x_0|| / sqrt(d), and the learning rate of Adam that makes equal steps."""
        group = self.param_groups[0]
        root = 1.0 if group["case"] in ("adagrad", "1") else math.sqrt(max(1, int(group["step"])))
        return {"eta": group["eta"], "distance": group["distance"], "lr_eff": group["lr"] * group["eta"] / root}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        self._begin()
        self._grow()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                _update(group, params, [self.state[p] for p in params])
        self.param_groups[0]["step"].add_(1)
        return loss

    # The scale of a step

    def _begin(self) -> None:
        """The state of parameters that have a gradient for the first time."""
        first = not self.state
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and "x0" not in self.state[p]:
                    self.state[p].update(_state(p, group))
        if first:
            self._share({"eta": self._initial()})

    def _initial(self) -> Tensor:
        group = self.param_groups[0]
        params = [p for group in self.param_groups for p in group["params"]]
        squared = squared_norms(local(params), params).sum()
        norm = {"flat": torch.zeros_like(squared), "rel_norm": squared.sqrt(), "rel_sq": squared}
        return group["eta_init"] * (1 + norm[group["eta_init_mode"]])

    def _grow(self) -> None:
        """eta_t = max(eta_{t-1}, r_t), over all parameters of all groups, without waiting for it on the host."""
        group = self.param_groups[0]
        moved = [p for group in self.param_groups for p in group["params"] if "x0" in self.state.get(p, ())]
        away = torch._foreach_sub(local(moved), local([self.state[p]["x0"] for p in moved]))
        count = sum(p.numel() for group in self.param_groups for p in group["params"])
        group["distance"].copy_((squared_norms(away, moved).sum() / count).sqrt())
        torch.maximum(group["eta"], group["distance"], out=group["eta"])
        group["eta_sum"].add_(group["eta"])

    # The mean of the iterates

    def eval(self) -> None:
        """Put the mean of the iterates in the place of the parameters, if it is kept."""
        self._swap(True)

    def train(self) -> None:
        """Put the parameters back."""
        self._swap(False)

    @torch.no_grad()
    def _swap(self, averaged: bool) -> None:
        for group in self.param_groups:
            if group["average"] and group["averaged"] != averaged:
                group["averaged"] = averaged
                for p in group["params"]:
                    if "average" in self.state.get(p, ()):
                        mean = self.state[p]["average"].clone()
                        self.state[p]["average"].copy_(p)
                        p.copy_(mean)


class AdaGradPP(AdamPP):
    """AdaGrad++: as Adam++ without momentum, and s_t the root of the sum of squared gradients."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        delta: float = 1e-8,
        weight_decay: float = 0.0,
        eta_init: float = 1e-6,
        eta_init_mode: str = "flat",
        decay_mode: str = "sqrt",
        average: bool = False,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, case="adagrad", **options)


def _state(p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    if p.grad.is_sparse or p.is_complex():
        raise ValueError(f"Adam++ takes dense, real gradients, and one of shape {tuple(p.shape)} is not")
    state = {"x0": p.detach().clone(), "squares": torch.zeros_like(p)}
    if group["case"] != "adagrad":
        state["exp_avg"] = torch.zeros_like(p)
    if group["case"] == "2":
        state["max_squares"] = torch.zeros_like(p)
    if group["average"]:
        state["average"] = p.detach().clone()
    return state


def _update(group: dict[str, Any], params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
    """One step of a group's parameters, in place and on this process's shares."""
    values, grads = local(params), local([p.grad for p in params])
    columns = {name: local([state[name] for state in states]) for name in states[0]}
    if group["average"]:
        _average(columns["average"], values, group)
    t = int(group["step"])  # on the CPU: the device is not waited for
    scale = group["lr"] * group["eta"]
    if group["weight_decay"]:
        root = math.sqrt(t + 1) if group["decay_mode"] == "sqrt" else 1.0
        torch._foreach_mul_(values, (1 - scale * group["weight_decay"] / root).to(values[0].dtype))
    if "exp_avg" in columns:
        torch._foreach_lerp_(columns["exp_avg"], grads, 1 - group["betas"][0] * group["lam"] ** t)
    denominators = _denominators(group, columns, grads, t)
    torch._foreach_div_(denominators, scale.to(values[0].dtype))
    torch._foreach_addcdiv_(values, columns.get("exp_avg", grads), denominators, value=-1)


def _denominators(group: dict[str, Any], columns: dict[str, list[Tensor]], grads: list[Tensor], t: int) -> list[Tensor]:
    """delta + s_t."""
    squares, beta2 = columns["squares"], group["betas"][1]
    if group["case"] in ("adagrad", "1"):
        torch._foreach_addcmul_(squares, grads, grads)
        found = list(torch._foreach_sqrt(squares))
    else:
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        if group["case"] == "2":
            torch._foreach_maximum_(columns["max_squares"], squares)
        found = list(torch._foreach_sqrt(columns.get("max_squares", squares)))
        torch._foreach_mul_(found, math.sqrt(t + 1))
    torch._foreach_add_(found, group["delta"])
    return found


def _average(averages: list[Tensor], values: list[Tensor], group: dict[str, Any]) -> None:
    """xbar <- xbar + eta_t / sum(eta) (x_t - xbar)."""
    away = torch._foreach_sub(values, averages)
    torch._foreach_mul_(away, (group["eta"] / group["eta_sum"]).to(values[0].dtype))
    torch._foreach_add_(averages, away)


def _refuse(group: dict[str, Any]) -> None:
    """Raise ValueError where an option of a group is out of range, or its parameters are too coarse."""
    for key, choices in (("case", CASES), ("eta_init_mode", INITIAL), ("decay_mode", DECAYS)):
        if group[key] not in choices:
            raise ValueError(f"optimizer.{key}={group[key]}: there are {', '.join(choices)}")
    for key in ("eta_init", "delta"):
        if not group[key] > 0:
            raise ValueError(f"optimizer.{key}={group[key]} must be positive")
    for key in ("lr", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"optimizer.{key}={group[key]} must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]) or not 0 < group["lam"] <= 1:
        raise ValueError(f"optimizer.betas={list(group['betas'])} must lie in [0, 1), lam={group['lam']} in (0, 1]")
    coarse = next((p.dtype for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)), None)
    if coarse:
        raise ValueError(
            f"the first steps of Adam++ are below the resolution of {coarse} parameters, and it would never leave its "
            "start: take trainer.precision=bf16-mixed or 32-true"
        )
