"""Decoding against a cache of factors: the public function, which chooses, and the registration with PyTorch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.tpa.contraction.ops import refuse_no_rank
from kernels.tpa.decode import configs, reference
from kernels.tpa.dispatch import Impl, refuse_mixed, takes_kernel


def decode(
    q: Float[Tensor, "batch new heads dim"],
    a_k: Float[Tensor, "blocks size rank_k padded"],
    b_k: Float[Tensor, "blocks size rank_k dim"],
    a_v: Float[Tensor, "blocks size rank_v padded"],
    b_v: Float[Tensor, "blocks size rank_v value"],
    lengths: Int[Tensor, " batch"],
    pages: Int[Tensor, "batch slots"] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "batch new heads value"]:
    """Attention of each row's last `new` tokens to a cache of factors, whose keys and values are never formed.

    `q` comes from `contract`, `b_k` is rotated. Row i has `lengths[i]` tokens, the new ones among them; what lies
    behind may be anything, and a length of 0 gives zeros. Without `pages` block i is the cache of row i (`size` is its
    capacity); with it, block `pages[i, j]` (one that exists, also where unused) holds the tokens from j * size on of
    row i. Head factors may be padded beyond `heads` (to a multiple of 8, for long loads). `scale` is 1 / sqrt(dim)
    by default.

    Raises ValueError for mixed dtypes, fewer head factors than heads, a table or lengths that do not fit, and as
    `dispatch.takes_kernel`. The kernel has no gradient: where one is wanted, the reference runs.
    """
    _refuse(q, a_k, b_k, a_v, b_v, lengths, pages)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cache = (a_k, b_k, a_v, b_v)
    if not takes_kernel("decode", impl, _unsupported(q, *cache), q, *cache):
        return reference.decode(q, *cache, lengths, pages, scale)
    lengths = lengths.clamp(0, configs.capacity(a_k, pages))
    return torch.ops.tessera.tpa_decode(q, *cache, lengths, pages, scale, 0)


def _refuse(
    q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor, lengths: Tensor, pages: Tensor | None
) -> None:
    refuse_mixed("decode", q=q, a_k=a_k, b_k=b_k, a_v=a_v, b_v=b_v)
    refuse_no_rank("decode", a_k.shape[2], a_v.shape[2])
    heads = q.shape[2]
    for name, a in (("a_k", a_k), ("a_v", a_v)):
        if a.shape[-1] < heads:
            raise ValueError(f"decode: {name} has factors of {a.shape[-1]} heads, but q has heads={heads}")
    if pages is None and len(a_k) != len(q):
        raise ValueError(
            f"decode: the cache has {len(a_k)} rows, but q has {len(q)}: give a table of pages, or as many"
        )
    # a look at lengths on a GPU waits for it, and breaks a compiled graph; there they are clamped
    if lengths.is_cuda or torch.compiler.is_compiling() or not lengths.numel():
        return
    capacity = configs.capacity(a_k, pages)
    if lengths.max() > capacity or lengths.min() < 0:
        raise ValueError(f"decode: lengths={lengths.tolist()} do not fit a cache of {capacity} tokens a row: make room")


def _unsupported(q: Tensor, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor) -> str | None:
    """Why the kernel cannot take these tensors, None if it can."""
    tensors = {"q": q, "a_k": a_k, "b_k": b_k, "a_v": a_v, "b_v": b_v}
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        return "it has no gradient, and one is wanted (use torch.no_grad)"
    if q.shape[1] > configs.MOST_NEW:
        return f"{q.shape[1]} new tokens are more than {configs.MOST_NEW} (use attention)"
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"{name} is not contiguous in its last axis (use contiguous)"
    if max(q.shape[3], b_v.shape[3]) > 256:
        return f"heads of dim={max(q.shape[3], b_v.shape[3])} are wider than 256"
    return None


# not a custom_op: its wrapper costs three times as much for each call, and a decoding step is a few microseconds
_library = torch.library.Library("tessera", "FRAGMENT")
_library.define(
    "tpa_decode(Tensor q, Tensor a_k, Tensor b_k, Tensor a_v, Tensor b_v, Tensor lengths, Tensor? pages, "
    "float scale, int splits) -> Tensor"
)


def _decode(q, a_k, b_k, a_v, b_v, lengths, pages, scale, splits):
    from kernels.tpa.decode import launch

    pages = None if pages is None else pages.contiguous()
    return launch.decode(q.contiguous(), a_k, b_k, a_v, b_v, lengths.contiguous(), pages, scale, splits)


_library.impl("tpa_decode", _decode, "CPU")
_library.impl("tpa_decode", _decode, "CUDA")


@torch.library.register_fake("tessera::tpa_decode")
def _(q, a_k, b_k, a_v, b_v, lengths, pages, scale, splits):
    return q.new_empty(*q.shape[:3], b_v.shape[3])
