"""T6 going on behind a long text, with each attention: `python benchmarks/t6_decode.py [--device cuda]`.

Whole networks of the paper's sizes, at about equal parameters, with untrained weights. Each reads the same tokens in
pieces until its caches hold as many as asked, then adds tokens one by one, as `generate` does. All of them do so in
turn, from the same length again, so what else the machine does hits all alike. Printed are the tokens per second of one
row (median with the 20th and 80th percentile), the seconds that reading the text took, and the bytes that the caches
keep of a token. On a CPU seconds are those of the processor, which other jobs change less than the wall's, and those
of the wall stand beside them; on a GPU attention in factors is measured with its kernels and without. Writes a CSV.
"""

import argparse
import csv
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch
from hydra.utils import instantiate

from lightning_modules.language.attention import Cache
from lightning_modules.language.t6 import ATTENTIONS, T6
from tessera.compose import compose

PIECE = 256  # tokens of the text that are read at once


class Row(NamedTuple):
    """A line of the CSV."""

    size: str
    attention: str
    heads: int
    parameters: int
    tokens: int
    tokens_s: float
    tokens_s_20: float
    tokens_s_80: float
    wall_tokens_s: float
    read_s: float
    cache_bytes: int  # of a token and layer, at the precision of the run
    cache_mib: float  # of this many tokens in all layers


class Contestant:
    """A network and its caches, which hold as much of the text as has been read."""

    def __init__(self, network: T6, room: int, device: str) -> None:
        self.network, self.device, self.read_s = network.eval(), device, 0.0
        self.caches = [Cache(room) for _ in network.blocks]

    @torch.no_grad()
    def read(self, text: torch.Tensor) -> None:
        """Take up what of the text the caches do not hold yet."""
        begin, _ = self._now()
        for piece in text[:, self.caches[0].length :].split(PIECE, 1):
            self.network(piece, caches=self.caches, last=True)
        self.read_s += self._now()[0] - begin

    @torch.no_grad()
    def tokens_per_second(self, text: torch.Tensor, new: int) -> tuple[float, float]:
        """Add so many tokens to the text, each the most probable one, and forget them; by both clocks."""
        token, begin = text[:, -1:], self._now()
        for _ in range(new):
            token = self.network(token, caches=self.caches, last=True)[:, -1].argmax(-1, keepdim=True)
        taken = [end - start for start, end in zip(begin, self._now())]
        for cache in self.caches:
            cache.length = text.shape[1]
        return tuple(new / seconds for seconds in taken)

    def _now(self) -> tuple[float, float]:
        """Seconds of the clock that counts, and of the wall's."""
        if not self.device.startswith("cuda"):
            return time.process_time(), time.perf_counter()
        torch.cuda.synchronize()
        return (time.perf_counter(),) * 2


def contestants(size: str, names: list[str], room: int, device: str) -> dict[str, Contestant]:
    """The networks by the name of their attention, on a GPU those in factors without their kernels as well."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    ways = {name: [f"model.network.attention={name}"] for name in names}
    if device.startswith("cuda"):
        plain = {
            f"{name}, PyTorch": [*words, "model.network.impl=torch"] for name, words in ways.items() if "tpa" in name
        }
        ways |= plain
    made = {}
    for name, words in ways.items():
        config, _ = compose([f"model=t6_{size}", "data.vocab_size=50257", f"data.context={room}", *words])
        torch.manual_seed(0)
        with torch.device(device):
            network = instantiate(config.model.network, _convert_="all")().to(dtype)
        made[name] = Contestant(network, room, device)
    return made


def measured(size: str, names: list[str], lengths: list[int], new: int, repeats: int, device: str) -> list[Row]:
    """All contestants at all lengths."""
    room, rows = max(lengths) + new, []
    running = contestants(size, names, room, device)
    every = torch.randint(50257, (1, max(lengths)), generator=torch.Generator().manual_seed(1)).to(device)
    for length in sorted(lengths):
        text = every[:, :length]
        for contestant in running.values():
            contestant.read(text)
            contestant.tokens_per_second(text, 2)
        taken = {name: [] for name in running}
        for _ in range(repeats):
            for name, contestant in running.items():
                taken[name].append(contestant.tokens_per_second(text, new))
        rows += [row(size, name, contestant, length, taken[name]) for name, contestant in running.items()]
    return rows


def row(size: str, name: str, contestant: Contestant, length: int, speeds: list[tuple[float, float]]) -> Row:
    """What is known of a contestant at a length."""
    (low, middle, high), (_, wall, _) = torch.tensor(speeds).quantile(torch.tensor([0.2, 0.5, 0.8]), 0).T.tolist()
    network, dtype = contestant.network, contestant.network.wte.weight.dtype
    cache, parameters = network.cache_bytes_per_token(dtype), sum(p.numel() for p in network.parameters())
    sizes = (network.config["heads"], parameters, length)
    kept = (cache // len(network.blocks), cache * length / 2**20)
    return Row(size, name, *sizes, middle, low, high, wall, contestant.read_s, *kept)


def shown(row: Row) -> str:
    """One line for the terminal."""
    speed = (
        f"{row.tokens_s:8.2f} [{row.tokens_s_20:.2f}, {row.tokens_s_80:.2f}] tokens/s (wall {row.wall_tokens_s:.2f})"
    )
    network = f"{row.attention:20}{row.heads:>3} heads {row.parameters:>13,} parameters"
    kept = f"{row.cache_bytes:>6} B/token/layer {row.cache_mib:8.1f} MiB"
    return f"{row.tokens:>7} tokens  {network}  {speed:52}{kept}  read in {row.read_s:.1f} s"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("small", "medium", "large", "xl"), default="small")
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=["mha", "gqa", "mla", "tpa"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024, 4096], help="lengths of the text")
    parser.add_argument("--new", type=int, default=4, help="tokens added in each repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("outputs/t6_decode"))
    words = parser.parse_args()
    cuda = words.device.startswith("cuda")
    name = (
        torch.cuda.get_device_name(words.device)
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    )
    print(f"{name}, torch {torch.__version__}, {'bfloat16' if cuda else 'float32'}, {words.repeats} repeats in turn")
    rows = measured(words.size, words.attentions, words.tokens, words.new, words.repeats, words.device)
    print("\n".join(shown(row) for row in rows))
    words.output.mkdir(parents=True, exist_ok=True)
    path = words.output / f"t6_decode_{words.device.split(':')[0]}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Row._fields, "device", "torch"))
        writer.writerows((*row, name, torch.__version__) for row in rows)
    print(path)


if __name__ == "__main__":
    main()
