"""The Gluon attention of this tree beside other versions of its file, bit for bit and in turns, on an NVIDIA GPU.

    git show HEAD~3:kernels/block_sparse_attention_gluon.py > /tmp/older.py
    python -P benchmarks/kernels/compare_attention.py /tmp/older.py --out compare.json

What is tried on the kernel is judged here: the clusters and kept blocks are made as in `gpu_kernels.py`, for its shapes
and two more of head dimension 64; every version runs once in each round, and a time is that on the GPU alone. Dense
cuDNN attention of the same rounds is what eps_tile and eps_sel are ratios to, with the tiles of this tree. A version
that imports what this tree no longer has must be given it first. Without a GPU it says so and stops.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from dense_baselines import sdpa
from gpu_kernels import DENSITIES, SHAPES, Case, Plan
from shapes import COGVIDEOX, NARROW_FINE, Shape
from timing import device_ms

from svg2_compile.environment import describe_environment
from svg2_compile.kernels.tuning import GLUON

ROOT = Path(__file__).resolve().parents[2]
ALL_SHAPES = (*SHAPES, COGVIDEOX, NARROW_FINE)
FILE = ROOT / "kernels" / "block_sparse_attention_gluon.py"
OURS = "this tree"


def main() -> int:
    """Print a line for every attention, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", type=Path, help="other versions of the kernel's file")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES[:2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return 0
    modules = {OURS: load(FILE)} | {path.stem: load(path) for path in args.versions}
    launchers = {name: module.block_sparse_attention_gluon for name, module in modules.items()}
    rows: list[dict[str, object]] = []
    record = {"environment": describe_environment(), "date": time.strftime("%Y-%m-%d"), "rows": rows}
    for shape in ALL_SHAPES:
        for row in compare(shape, launchers, args.densities, args.rounds):
            rows.append(row)
            print(line(row), flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"on {record['environment']}, {record['date']}")
    return 0


def load(path: Path) -> ModuleType:
    """Return a version of the kernel's file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"attention_of_{path.stem}_{abs(hash(path))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compare(
    shape: Shape,
    launchers: dict[str, Callable[..., tuple[Tensor, Tensor]]],
    densities: list[float],
    rounds: int,
    device: str = "cuda",
) -> Iterator[dict[str, object]]:
    """Yield the times, ratios and equality of every version, for all clusters and densities of a shape."""
    generator = torch.Generator(device).manual_seed(0)
    size = (1, shape.tokens, shape.heads, shape.dim)
    q, k, v = (
        torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    )
    dense = partial(sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v)
    for clusters in shape.clusters:
        plan = Plan.random(generator, q, k, clusters)
        for density in densities:
            case = Case.random(generator, q, k, v, plan, density)
            calls = {name: partial(launch, *case.arguments) for name, launch in launchers.items()}
            results = {name: call() for name, call in calls.items()}
            everything = {"dense": dense, **calls}
            times = {name: [] for name in everything}
            names = list(everything)
            for begin in range(rounds):
                # What comes after the dense call finds the GPU hotter: every round begins with the next one.
                for name in names[begin % len(names) :] + names[: begin % len(names)]:
                    times[name].append(device_ms(everything[name]))
            ms = {name: statistics.median(each) for name, each in times.items()}
            shares = {"eps_tile": case.issued("gluon", GLUON[shape.dim]), "eps_sel": case.density}
            yield {
                "shape": shape.name,
                "clusters": clusters,
                "density": case.density,
                "ms": ms,
                **{eps: {name: share * ms["dense"] / ms[name] for name in calls} for eps, share in shares.items()},
                "same_bits": {name: all(map(torch.equal, each, results[OURS])) for name, each in results.items()},
            }


def line(row: dict[str, object]) -> str:
    """Return what one row says."""
    parts = [
        f"{name} {row['ms'][name]:.2f} ms, eps_tile {row['eps_tile'][name]:.3f}, eps_sel {row['eps_sel'][name]:.3f}"
        + ("" if same else ", OTHER BITS")
        for name, same in row["same_bits"].items()
    ]
    clusters = " / ".join(map(str, row["clusters"]))
    return f"{row['shape']}, {clusters}, density {row['density']:.3f}, dense {row['ms']['dense']:.1f} ms: " + "; ".join(
        parts
    )


if __name__ == "__main__":
    sys.exit(main())
