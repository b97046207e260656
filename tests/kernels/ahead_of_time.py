"""Compiles the kernels at their configured tiles for an H100 or H200: `python -m tests.kernels.ahead_of_time`.

Needs no GPU. Prints one JSON line for each: registers of a thread, bytes of stack and of shared memory, matrix
instructions, whether it asserts, and the rows of its tile; then how often a growing cache would compile its kernel.
`--quick` takes one size and one precision.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from kernels.tpa.attention import configs as attention_configs
from kernels.tpa.attention import kernels as attention
from kernels.tpa.contraction import kernels as contraction
from kernels.tpa.contraction.configs import ASSERTING, power_of_two, warps
from kernels.tpa.decode import configs as decode_configs
from kernels.tpa.decode import kernels as decoding
from kernels.tpa.decode.launch import split_arguments

HOPPER = GPUTarget("cuda", 90, 32)
HEADS_OF_SIZES = {"small": 34, "medium": 47, "large": 61, "xl": 78}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
INTEGERS = ("position", "table", "splits", "chunk", "rows", "longest_q", "longest_k", "tokens_q", "pages_row")
INDICES = {"lengths": "*i32", "pages": "*i32", "positions": "*i64"}
SUMS = {"lse": "*fp32", "part": "*fp32", "delta": "*fp32", "cos": "*fp32", "sin": "*fp32"}


def argument(name: str, dtype: str) -> str:
    """The type of a kernel's argument by its name."""
    if name in INTEGERS or name.endswith(("_token", "_rank", "_block")):
        return "i32"
    return {**INDICES, **SUMS}.get(name, f"*{dtype}")


def compiled(
    kernel, dtype: str, constants: dict, num_warps: int, num_stages: int = 2, options: dict | None = None, **types: str
):
    """One kernel compiled; pointers and strides are multiples of 16, as those of whole tensors are."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, argument(n, dtype)) for n in names}
    known = [
        i for i, n in enumerate(names) if signature[n].startswith("*") or n.endswith(("_token", "_rank", "_block"))
    ]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in known})
    every = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    return triton.compile(source, target=HOPPER, options=every)


def resources(kernel) -> dict:
    """What the assembler says that a kernel needs."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{key}:(\d+)", said.stdout).group(1)) for key in ("REG", "STACK"))
    matrix = [name for name in ("wgmma.mma_async", "mma.sync") if name in kernel.asm["ptx"]]
    asserts = "__assertfail" in kernel.asm["ptx"]
    return {
        **{"registers": registers, "stack": stack, "shared": kernel.metadata.shared},
        **{"matrix": matrix, "asserts": asserts},
    }


def specialisations() -> int:
    """How many versions of the split kernel Triton tells apart while a cache, its splits and its pages grow."""
    kernel = decoding.split_kernel
    tell = create_function_from_signature(kernel.signature, kernel.params, make_backend(HOPPER))
    found = set()
    for tokens, slots in ((1, 1), (16, 2), (1000, 16), (1001, 17), (4096, 64)):
        q, pool = torch.zeros(2, 1, 47, 64), [torch.zeros(tokens, 64, 2, width) for width in (48, 64, 48, 64)]
        lengths, pages = torch.tensor([tokens, 1]), torch.zeros(2, slots, dtype=torch.int32)
        for splits in (1, 2, 16, 17):
            given, constants = split_arguments(q, *pool, lengths, pages, 0.125, splits)
            _, versions, options = tell(q, q, *given, **constants)
            found.add(repr((versions, options)))
    return len(found)


def factor_constants(heads: int, dim: int, ranks: tuple[int, int, int]) -> dict:
    return {
        **dict(zip(("RANK_Q", "RANK_K", "RANK_V"), ranks)),
        **{"HEADS": heads, "HALF": dim // 2, "HALF_V": dim // 2, "ACC": tl.float32},
        **{"BLOCK_H": power_of_two(heads), "BLOCK_D": power_of_two(dim // 2), "BLOCK_E": power_of_two(dim // 2)},
    }


def only(kernel, constants: dict) -> dict:
    return {name: value for name, value in constants.items() if name in inspect.signature(kernel.fn).parameters}


def contractions(dtype: str, heads: int, dim: int, ranks: tuple[int, int, int]):
    constants = {**factor_constants(heads, dim, ranks), "RANK": ranks[0], "BACKWARD": False}
    for kernel in ("contract", "contract_backward", "rotate", "qkv", "qkv_backward"):
        made = getattr(contraction, f"{kernel}_kernel")
        options = {} if kernel.startswith("contract") else ASSERTING
        shared_by = 1 if kernel == "rotate" else warps(heads, dim)
        yield kernel, 0, compiled(made, dtype, only(made, constants), shared_by, options=options)


def decodings(dtype: str, heads: int, dim: int, ranks: tuple[int, int, int], new: int, page: int):
    tile = decode_configs.tile(new * heads, max(ranks[1:]))
    constants = {
        **{"SCALE": dim**-0.5, "NEW": new, "HEADS": heads, "PADDED": -(-heads // 8) * 8, "DIM": dim, "VALUE": dim},
        **{"RANK_K": ranks[1], "RANK_V": ranks[2], "PAGE": page, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys},
        **{"BLOCK_D": power_of_two(dim, 16), "BLOCK_E": power_of_two(dim, 16)},
        **{"ACC": tl.float32, "DOT": getattr(tl, str(DTYPES[dtype]).removeprefix("torch."))},
    }
    yield "split", tile.rows, compiled(decoding.split_kernel, dtype, constants, tile.warps, tile.stages, out="*fp32")


def attentions(dtype: str, heads: int, dim: int, ranks: tuple[int, int, int]):
    places = dict.fromkeys(("q_starts", "q_lengths", "k_starts", "k_lengths"))
    for which, kernel in (("forward", "forward"), ("queries", "backward_queries"), ("keys", "backward_keys")):
        tile = attention_configs.tile(which, DTYPES[dtype], dim, 4096)
        constants = {
            **places,
            **{"SCALE": dim**-0.5, "CAUSAL": True, "HEADS": heads, "DIM": dim, "VALUE": dim},
            **dict(zip(("RANK_Q", "RANK_K", "RANK_V"), ranks)),
            **{"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "BLOCK_D": power_of_two(dim, 16)},
            **{"BLOCK_E": power_of_two(dim, 16), "ACC": tl.float32},
            "DOT": getattr(tl, str(DTYPES[dtype]).removeprefix("torch.")),
        }
        made = getattr(attention, f"{kernel}_kernel")
        yield (
            which,
            tile.keys if which == "keys" else tile.queries,
            compiled(made, dtype, constants, tile.warps, tile.stages),
        )


def everything(dtypes: list[str], sizes: list[str]):
    """Name, rows and compiled kernel of the configured tiles."""
    for dtype in dtypes:
        for size in sizes:
            heads = HEADS_OF_SIZES[size]
            for name, rows, kernel in contractions(dtype, heads, 64, (6, 2, 2)):
                yield f"{name} {size} {dtype}", rows, kernel
            for new, page in ((1, 0), (1, decode_configs.PAGE), (4, 0))[: 1 if len(sizes) == 1 else 3]:
                for name, rows, kernel in decodings(dtype, heads, 64, (6, 2, 2), new, page):
                    yield f"{name} {size} new={new} page={page} {dtype}", rows, kernel
        for heads in (32, 64):
            for name, rows, kernel in decodings(dtype, heads, 64, (16, 1, 1), 1, 0):
                yield f"{name} rank 1 heads={heads} {dtype}", rows, kernel
        for dim in (64, 128)[: 1 if len(sizes) == 1 else 2]:
            for name, rows, kernel in attentions(dtype, 47, dim, (6, 2, 2)):
                yield f"{name} dim={dim} {dtype}", rows, kernel
        combined = {"VALUE": 64, "BLOCK_E": 64, "ACC": tl.float32}
        yield f"combine {dtype}", 0, compiled(decoding.combine_kernel, dtype, combined, 1)


if __name__ == "__main__":
    chosen = (["bf16"], ["medium"]) if sys.argv[1:] == ["--quick"] else (list(DTYPES), list(HEADS_OF_SIZES))
    for name, rows, kernel in everything(*chosen):
        print(json.dumps({"kernel": name, "rows": rows, **resources(kernel)}), flush=True)
    print(json.dumps({"specialisations": specialisations()}))
