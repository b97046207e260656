"""How many warps share the heads x dim numbers of a token (not yet tuned on a GPU), and which kernels assert."""

LARGEST = 2**15  # numbers of a token that eight warps can hold in registers
# of kernels that look positions up: Triton compiles assertions only so, and would add its own of integers that overflow
ASSERTING = {"debug": True, "sanitize_overflow": False}


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is neither below n nor below `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def warps(heads: int, dim: int) -> int:
    """At most 64 numbers of the tile for each thread, while eight warps suffice for that."""
    return min(8, max(1, power_of_two(heads) * power_of_two(dim) // 2048))


def unsupported(heads: int, *dims: int) -> str | None:
    """Why a tile of `heads` x dim cannot be held, None if it can."""
    if any(dim % 2 for dim in dims):
        return f"dim={next(dim for dim in dims if dim % 2)} is odd and has no halves"
    if power_of_two(heads) * power_of_two(max(dims)) > LARGEST:
        return f"heads={heads} times dim={max(dims)} is more than the {LARGEST} numbers that a program holds"
    return None
