"""Which of the two ways an op goes: its Triton kernel, or the PyTorch reference beside it.

`impl="auto"` takes the kernel on a GPU wherever it can run, and else the reference. `impl="triton"` asks for the kernel
and is refused by name where it cannot run; `impl="torch"` asks for the reference.
"""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
# read once, as Triton does when a kernel is decorated
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes_kernel(op: str, impl: str, unsupported: str | None, *tensors: Tensor) -> bool:
    """Whether `op` runs its kernel on these tensors. `unsupported` says why their shapes cannot, None if they can.

    Raises ValueError where impl="triton" and the kernel cannot run, and for any other `impl` than the three.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl={impl} is none of auto, triton, torch")
    if impl == "torch":
        return False
    reason = _unavailable(tensors) or unsupported
    if impl == "triton" and reason:
        raise ValueError(f"the Triton kernel of {op} cannot run: {reason}; impl=auto takes the PyTorch reference")
    # the interpreter is for tests: it is slower than any reference, so it runs only when it is asked for
    return reason is None and (impl == "triton" or tensors[0].is_cuda)


def refuse_mixed(op: str, **tensors: Tensor) -> None:
    """Raises ValueError where the tensors differ in dtype or device."""
    (first, one), *others = tensors.items()
    for name, x in others:
        if x.dtype != one.dtype or x.device != one.device:
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device}, but {first} is {one.dtype} on {one.device}: convert one"
            )


def _unavailable(tensors: tuple[Tensor, ...]) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed (pip install 'tessera[kernels]')"
    if not INTERPRETED and not tensors[0].is_cuda:
        return f"the tensors are on {tensors[0].device.type}, not on a GPU (set TRITON_INTERPRET=1 to interpret it)"
    dtypes = (*DTYPES, torch.float64) if INTERPRETED else DTYPES
    if tensors[0].dtype not in dtypes:
        return f"it has no {tensors[0].dtype}, but {', '.join(str(dtype) for dtype in dtypes)}"
    return None
