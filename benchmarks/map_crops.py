"""Training crops per second from the cache of processed maps: `PYTHONPATH=$PWD python benchmarks/map_crops.py <maps>`.

    PYTHONPATH=$PWD python benchmarks/map_crops.py <maps> --workers 0 1 12 --words data.rotation=so3

The loader that `data=emdb` trains from, with nothing behind it. Maps are processed, and read once, before the clock
starts. Settings of loaders take turns.
"""

import argparse
import statistics
import tempfile
import time
from itertools import islice
from types import SimpleNamespace

from hydra.utils import instantiate

from tessera.compose import compose

PASS = "data.crops_per_map=10000"  # so that no pass over the maps ends while it is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", help="a folder of maps, or a manifest")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--voxel-size", type=float, default=1.5)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--words", nargs="*", default=[], help="more words of the command line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        words = [f"data.path={args.maps}", f"data.box={args.box}", f"data.voxel_size={args.voxel_size}", *args.words]
        config, _ = compose(["model=cryofm", "data=emdb", "data.batch_size=32", f"data.cache={cache}", PASS, *words])
        data = instantiate(config.data, _convert_="all")
        data.trainer = SimpleNamespace(global_rank=0, world_size=1, accumulate_grad_batches=1, global_step=0)
        found = {workers: [] for workers in args.workers}
        for _ in range(args.repeats):
            for workers in args.workers:
                data.workers = workers
                found[workers].append(rate(data, args.batches))
    print(f"{len(data.parts['train'])} maps, crops of {args.box}^3 voxels of {args.voxel_size} A {args.words or ''}")
    for workers, rates in found.items():
        print(f"{workers} workers: {statistics.median(rates):.0f} [{min(rates):.0f}, {max(rates):.0f}] crops a second")


def rate(data, batches: int) -> float:
    """Crops a second, after as many batches as the workers had ahead."""
    loader = iter(data.train_dataloader())
    for _ in islice(loader, 2 * data.workers + 1):
        pass
    began = time.perf_counter()
    crops = sum(len(batch["voxels"]) for batch in islice(loader, batches))
    return crops / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
