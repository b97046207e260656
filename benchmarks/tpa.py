"""Tensor product attention beside MHA, GQA and MQA: `python benchmarks/tpa.py [--device cuda --output <folder>]`.

Four parts: decoding against a cache, the contraction of factors, attention forward and forward + backward, and what
training keeps. On a CPU a small version on the PyTorch references (a minute or two); on a GPU the kernels beside
PyTorch's attention by backend, FlexAttention and the compiled einsum. All contestants of a part run in turn. Printed
are medians with the 20th and 80th percentile, what was moved and computed at least, and the share of the roofline:
the time that these would take at the copy bandwidth and the matrix rate measured in the same run, over the time taken.
Writes tpa_<device>.csv and tpa_<device>.png.
"""

import argparse
import csv
import functools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import tpa

DIM = 64


class Size(NamedTuple):
    """Heads of each attention at equal parameters (arXiv 2501.06425, tables 9 and 10), and the ranks of TPA."""

    name: str
    tpa: int
    ranks: tuple[int, int, int]
    mha: int
    gqa: tuple[int, int]  # query heads, groups
    mqa: int


SMALL = Size("small", 34, (6, 2, 2), 12, (22, 2), 23)
MEDIUM = Size("medium", 47, (6, 2, 2), 16, (30, 2), 31)
DECODING = Size("2048", 32, (16, 1, 1), 32, (32, 4), 32)  # the paper's decoding benchmark: equal heads, not parameters


class Job(NamedTuple):
    """One thing to time, and the bytes and FLOPs that it cannot do without."""

    method: str
    run: Callable[[], object]
    bytes: float
    flops: float
    kept: float = 0.0  # bytes that it keeps: of a cache for each token, of training for the backward pass


class Row(NamedTuple):
    """A line of the CSV."""

    part: str
    size: str
    tokens: int
    method: str
    ms: float
    ms_20: float
    ms_80: float
    gb_s: float
    tflop_s: float
    roofline: float
    kept: float
    peak_mib: float


class Machine:
    """Timing on one device, and its roofline as measured here."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats, self.cuda = device, repeats, device.startswith("cuda")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.flush = torch.empty(2**28 if self.cuda else 0, dtype=torch.uint8, device=device)
        block = torch.empty(2**30 if self.cuda else 2**26, dtype=torch.uint8, device=device)
        side = torch.randn(8192 if self.cuda else 1024, 8192 if self.cuda else 1024, dtype=self.dtype, device=device)
        copied, product = (torch.empty_like(x) for x in (block, side))
        self.bandwidth = 2 * block.numel() / self._fastest(lambda: copied.copy_(block))
        self.rate = 2 * len(side) ** 3 / self._fastest(lambda: torch.mm(side, side, out=product))

    def _fastest(self, run: Callable[[], object]) -> float:
        return min(self.seconds(run) for _ in range(10))

    def seconds(self, run: Callable[[], object]) -> float:
        """Once, on a GPU with a cold L2."""
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def compare(self, part: str, size: str, tokens: int, jobs: list[Job]) -> Iterator[Row]:
        """The jobs in turn; those that cannot run here are named and left out."""
        able = [job for job in jobs if self._runs(job)]
        taken = {job.method: [] for job in able}
        for _ in range(self.repeats):
            for job in able:
                taken[job.method].append(self.seconds(job.run))
        for job in able:
            low, middle, high = torch.tensor(taken[job.method]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            ideal = max(job.bytes / self.bandwidth, job.flops / self.rate)
            speed = (job.bytes / middle / 1e9, job.flops / middle / 1e12, ideal / middle)
            ms = (1e3 * middle, 1e3 * low, 1e3 * high)
            yield Row(part, size, tokens, job.method, *ms, *speed, job.kept, self._peak(job))

    def _runs(self, job: Job) -> bool:
        try:
            for _ in range(2):
                job.run()
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"  {job.method} cannot run here: {str(error).splitlines()[0]}")
            return False
        return True

    def _peak(self, job: Job) -> float:
        if not self.cuda:
            return float("nan")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def normal(self, *shape: int, grad: bool = False) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device, requires_grad=grad)

    def graphed(self, run: Callable[[], object]) -> Callable[[], object]:
        """On a GPU the call as one CUDA graph, as it would be served; elsewhere itself."""
        if not self.cuda:
            return run
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def backends(machine: Machine) -> dict[str, Callable]:
    """PyTorch's attention, on a GPU by backend."""
    if not machine.cuda:
        return {"SDPA": F.scaled_dot_product_attention}
    names = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    names["cuDNN"] = SDPBackend.CUDNN_ATTENTION

    def chosen(backend, *given, **options):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*given, **options)

    return {f"SDPA {name}": functools.partial(chosen, backend) for name, backend in names.items()}


def flex(machine: Machine) -> dict[str, Callable]:
    """FlexAttention, compiled; only where a compiler for it is worth the wait."""
    if not machine.cuda:
        return {}
    from torch.nn.attention.flex_attention import flex_attention

    return {"FlexAttention": torch.compile(flex_attention, dynamic=False)}


def itemsize(machine: Machine) -> int:
    return machine.dtype.itemsize


def decoding(machine: Machine, size: Size, batch: int, tokens: int) -> Iterator[Row]:
    """One new token of each row against its cache."""
    jobs = [*tpa_steps(machine, size, batch, tokens)]
    for name, heads, groups in (
        ("MHA", size.mha, size.mha),
        (f"GQA-{size.gqa[1]}", *size.gqa),
        ("MQA", size.mqa, 1),
    ):
        jobs += full_steps(machine, name, heads, groups, batch, tokens)
    yield from machine.compare("decode", size.name, tokens, jobs)


def tpa_steps(machine: Machine, size: Size, batch: int, tokens: int) -> Iterator[Job]:
    """The cache of factors read as it is, and made into keys and values first."""
    heads, (_, rank_k, rank_v) = size.tpa, size.ranks
    padded = -(-heads // 8) * 8 if machine.cuda else heads
    q = machine.normal(batch, 1, heads, DIM)
    widths = ((rank_k, padded), (rank_k, DIM), (rank_v, padded), (rank_v, DIM))
    cache = [machine.normal(batch, tokens, rank, width) for rank, width in widths]
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=machine.device)
    kept = (rank_k + rank_v) * (heads + DIM) * itemsize(machine)
    flops = 2 * batch * tokens * (rank_k + rank_v) * heads * (DIM + 1)

    def materialised() -> Tensor:
        a_k, b_k, a_v, b_v = cache
        k, v = tpa.contract(a_k[..., :heads], b_k), tpa.contract(a_v[..., :heads], b_v)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    step = machine.graphed(functools.partial(tpa.decode, q, *cache, lengths))
    yield Job("TPA, factor cache", step, batch * tokens * kept, flops, kept)
    if batch * tokens * heads * DIM * 4 * itemsize(machine) < 60e9:
        yield Job("TPA, K and V made first", machine.graphed(materialised), batch * tokens * kept, flops, kept)


def full_steps(machine: Machine, name: str, heads: int, groups: int, batch: int, tokens: int) -> Iterator[Job]:
    """A cache of keys and values of `groups` heads."""
    q = machine.normal(batch, heads, 1, DIM)
    k, v = (machine.normal(batch, groups, tokens, DIM) for _ in range(2))
    kept = 2 * groups * DIM * itemsize(machine)
    flops = 4 * batch * tokens * heads * DIM
    for how, attend in {**backends(machine), **flex(machine)}.items():
        step = functools.partial(attend, q, k, v, enable_gqa=groups != heads)
        yield Job(f"{name}, {how}", step, batch * tokens * kept, flops, kept)


def projected(machine: Machine, size: Size, batch: int, tokens: int) -> tuple[Tensor, tuple]:
    """A merged projection that wants a gradient, and what else `tpa.qkv` takes."""
    row = machine.normal(batch, tokens, sum(size.ranks) * (size.tpa + DIM), grad=True)
    positions = torch.arange(tokens, device=machine.device).expand(batch, tokens)
    tables = tpa.rotary_table(tokens, DIM, device=machine.device)
    return row, (*tables, positions, size.ranks, size.tpa, (DIM, DIM, DIM))


def contractions(machine: Machine, size: Size, batch: int, tokens: int) -> Iterator[Row]:
    """Split, rotation and three contractions of a projection."""
    row, rest = projected(machine, size, batch, tokens)
    reference = functools.partial(tpa.qkv, row, *rest, impl="torch")
    ways = {"PyTorch": reference}
    if machine.cuda:
        ways = {"Triton": functools.partial(tpa.qkv, row, *rest), "PyTorch compiled": torch.compile(reference)}
        ways["PyTorch"] = reference
    moved = (row.numel() + batch * tokens * 3 * size.tpa * DIM) * itemsize(machine)
    forward = [Job(name, torch.no_grad()(run), moved, 0.0) for name, run in ways.items()]
    yield from machine.compare("contract forward", size.name, batch * tokens, forward)
    both = [Job(name, functools.partial(trained, run, row), 3 * moved, 0.0, saved(run)) for name, run in ways.items()]
    yield from machine.compare("contract both", size.name, batch * tokens, both)


def attentions(machine: Machine, size: Size, batch: int, tokens: int) -> Iterator[Row]:
    """Causal attention from the projection on: tiles of factors against heads made first; and MHA without factors."""
    row, rest = projected(machine, size, batch, tokens)
    ways = {
        f"heads made, {how}": functools.partial(materialised, row, rest, run) for how, run in backends(machine).items()
    }
    if machine.cuda:
        compiled = torch.compile(functools.partial(tpa.qkv, impl="torch"))
        ways |= {
            "tiles of factors": functools.partial(tiled, row, rest),
            "compiled einsum, SDPA": functools.partial(
                materialised, row, rest, F.scaled_dot_product_attention, made=compiled
            ),
            "heads made, FlexAttention": functools.partial(materialised, row, rest, causal_flex(tokens, machine)),
        }
    flops = 2 * batch * tokens * tokens * size.tpa * DIM  # two products, half of each masked
    moved = (row.numel() + batch * tokens * size.tpa * DIM) * itemsize(machine)
    forward = [Job(name, torch.no_grad()(run), moved, flops) for name, run in ways.items()]
    yield from machine.compare("attention forward", size.name, tokens, forward)
    both = [
        Job(name, functools.partial(trained, run, row), 3 * moved, 3.5 * flops, saved(run))
        for name, run in ways.items()
    ]
    yield from machine.compare("attention both", size.name, tokens, both)


def causal_flex(tokens: int, machine: Machine) -> Callable:
    """FlexAttention with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=machine.device)
    (run,) = flex(machine).values()
    return lambda q, k, v, is_causal: run(q, k, v, block_mask=block)


def materialised(row: Tensor, rest: tuple, attend: Callable, made: Callable = tpa.qkv) -> Tensor:
    """Heads made from the projection, then PyTorch's attention."""
    return attend(*(x.transpose(1, 2) for x in made(row, *rest)), is_causal=True)


def tiled(row: Tensor, rest: tuple) -> Tensor:
    """Attention that makes heads tile by tile."""
    cos, sin, positions, ranks, heads, _ = rest
    widths = [rank * width for rank in ranks for width in (heads, DIM)]
    parts = [part.unflatten(-1, (-1, width)) for part, width in zip(row.split(widths, -1), 3 * (heads, DIM))]
    for i in (1, 3):
        parts[i] = tpa.rotate(parts[i], cos, sin, positions)
    return tpa.attention(*parts, impl="triton")


def trained(run: Callable[[], object], row: Tensor) -> None:
    """Forward and backward of the sum of what `run` gives."""
    given = run()
    row.grad = None
    torch.autograd.backward(given, [torch.ones_like(x) for x in ([given] if isinstance(given, Tensor) else given)])


def saved(run: Callable[[], object]) -> float:
    """Bytes that autograd keeps between forward and backward, each storage once."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            held = run()
    except (RuntimeError, ValueError):
        return float("nan")
    del held
    return float(sum(kept.values()))


def everything(machine: Machine) -> Iterator[Row]:
    """All parts, at sizes that suit the device."""
    if not machine.cuda:
        with torch.no_grad():
            for tokens in (256, 1024, 4096):
                yield from decoding(machine, SMALL, 1, tokens)
        yield from contractions(machine, SMALL, 1, 512)
        yield from attentions(machine, SMALL, 1, 512)
        return
    with torch.no_grad():
        for size in (DECODING, MEDIUM):
            for batch, tokens in ((1, 4096), (16, 4096), (16, 32768), (16, 131072)):
                yield from decoding(machine, size._replace(name=f"{size.name} x{batch}"), batch, tokens)
    yield from contractions(machine, MEDIUM, 16, 1024)
    for batch, tokens in ((16, 1024), (8, 2048), (4, 4096), (2, 8192)):
        yield from attentions(machine, MEDIUM, batch, tokens)


def shown(row: Row) -> str:
    """One line for the terminal."""
    kept = f"{row.kept:.0f} B/token" if row.part == "decode" else f"{row.kept / 2**20:.1f} MiB kept" if row.kept else ""
    peak = "" if row.peak_mib != row.peak_mib else f"{row.peak_mib:9.0f} MiB peak"
    times = f"{row.ms:9.3f} [{row.ms_20:.3f}, {row.ms_80:.3f}] ms"
    speed = f"{row.gb_s:8.1f} GB/s {row.tflop_s:8.3f} TFLOP/s {100 * row.roofline:5.1f} %"
    return f"{row.part:18}{row.size:10}{row.tokens:>7} {row.method:28}{times:34}{speed}  {kept:18}{peak}"


def figure(rows: list[Row], path: Path) -> None:
    """Time of a decoding step against the cached tokens, and the bytes of a cached token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.part == "decode"]
    last = [row for row in rows if row.size == rows[-1].size]
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for method in dict.fromkeys(row.method for row in last):
        points = [row for row in last if row.method == method]
        left.plot([row.tokens for row in points], [row.ms for row in points], marker="o", label=method)
        left.fill_between([r.tokens for r in points], [r.ms_20 for r in points], [r.ms_80 for r in points], alpha=0.15)
    left.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="ms for one decoding step of a layer")
    cached = sorted({row.tokens for row in last})
    left.set_xticks(cached, [f"{tokens:,}" for tokens in cached])
    left.set_xticks([], minor=True)
    left.legend(fontsize=7)
    bytes_kept = {row.method.split(",")[0]: row.kept for row in last}
    right.barh(list(bytes_kept), list(bytes_kept.values()))
    right.set(xlabel="bytes of cache for a token and layer")
    right.invert_yaxis()
    drawn.suptitle(f"Decoding, size {last[0].size}")
    drawn.savefig(path, dpi=100)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=0, help="of each measurement; 0: 15 on a CPU, 100 on a GPU")
    parser.add_argument("--output", type=Path, default=Path("outputs/tpa"))
    words = parser.parse_args()
    torch.manual_seed(0)
    machine = Machine(words.device, words.repeats or (100 if words.device.startswith("cuda") else 15))
    name = torch.cuda.get_device_name(words.device) if machine.cuda else platform.machine()
    threads = "" if machine.cuda else f", {torch.get_num_threads()} thread(s)"
    print(f"{name}{threads}, torch {torch.__version__}, {machine.dtype}, {machine.repeats} repeats in turn")
    print(f"copy {machine.bandwidth / 1e9:.1f} GB/s, matrix product {machine.rate / 1e12:.3f} TFLOP/s")
    rows = []
    for row in everything(machine):
        print(shown(row), flush=True)
        rows.append(row)
    words.output.mkdir(parents=True, exist_ok=True)
    stem = words.output / f"tpa_{words.device.split(':')[0]}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Row._fields, "device", "torch"))
        writer.writerows((*row, name, torch.__version__) for row in rows)
    figure(rows, stem.with_suffix(".png"))
    print(f"{stem}.csv, {stem}.png")


if __name__ == "__main__":
    main()
