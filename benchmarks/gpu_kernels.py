"""Every kernel on an NVIDIA GPU: right first, then timed beside dense attention and against its goals.

    python -P benchmarks/gpu_kernels.py --out gpu_kernels.json

First the kernels' tests run on the GPU; on a failure nothing is timed. Then dense attention (cuDNN forced, flash,
FlexAttention), flash-kmeans and FlashInfer where they are installed, and our kernels. Cluster sizes are lognormal, kept
clusters random, tokens normal and stored as (B, N, H, D), bf16; times are medians. Without a GPU it checks what it can
and stops.

eps_tile: operations issued by the attention kernel per second over those of dense cuDNN; eps_sel: the same of selected
pairs. The time of the work list is not in them but in the overhead: k-means and sort of q and k, permutation of k and
v, selection and work list, in percent of dense cuDNN. The issued operations are those of the tiles of `tuning`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from dense_baselines import dense_ms, flash_kmeans_ms, flashinfer_ms, median_ms
from gpu_targets import EPS_TILE, eps_sel_goal, judged, overhead_goal
from plan_costs import issued_pairs, selected_pairs
from random_blocks import lognormal_sizes, random_blocks, shuffled_labels

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.launch import padded_power_of_two, why_not_gluon, why_not_triton
from svg2_compile.kernels.tuning import GLUON, AttentionTiles, attention_tiles
from svg2_compile.kernels.work_list import MAX_KEYS, max_pieces, max_tiles, work_list_reference

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("test_kernels_*_triton.py", "test_kernels_*_gluon.py")
DENSITIES = (0.15, 0.25, 0.4)
ITERS_INIT = 10
TOP_P, MIN_KEEP_RATIO = 0.9, 0.1
svg2 = torch.ops.svg2


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's attention, and the numbers of clusters to try."""

    name: str
    heads: int
    tokens: int
    dim: int
    clusters: tuple[tuple[int, int], ...]
    """(query clusters, key clusters) of a head."""


SHAPES = (
    Shape("Wan 14B 720p", 40, 75_600, 128, ((100, 500), (300, 1000))),
    Shape("HunyuanVideo 720p", 24, 118_800, 128, ((100, 500), (400, 1000))),
    Shape("Wan 1.3B 480p", 12, 32_760, 128, ((55, 218),)),
    Shape("head dimension 64", 24, 32_760, 64, ((55, 218),)),
)


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds of everything but attention, for one shape and its clusters."""

    shape: str
    heads: int
    clusters: tuple[int, int]
    ms: dict[str, float]
    flash_kmeans_ms: float | str
    """q and k, two iterations."""
    percent_of_dense: dict[int, float]
    """By k-means iterations."""
    verdicts: dict[int, str]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention."""

    shape: str
    heads: int
    clusters: tuple[int, int]
    density: float
    """Selected pairs over all pairs."""
    ms: float
    """Work list included."""
    work_list_ms: float
    flashinfer_ms: float | str
    eps_tile: float
    eps_sel: float
    speedup: float
    """Of the attention with its work list over dense cuDNN."""
    verdict_tile: str
    verdict_sel: str


def main() -> int:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, help="at most this many heads; default: all")
    parser.add_argument("--quick", action="store_true", help="8 heads, one density, fewer repetitions")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    max_heads = args.heads or (8 if args.quick else max(shape.heads for shape in SHAPES))
    check_plans(max_heads)
    if reason := why_no_gpu():
        print(f"no GPU: {reason}; imports, shapes and plan sizes are fine, nothing was timed")
        return 0
    if not args.skip_tests and not tests_are_green():
        print("the kernels' tests fail on this GPU: nothing is timed")
        return 1
    started = time.monotonic()
    rep_ms = 60.0 if args.quick else 150.0
    densities = DENSITIES[1:2] if args.quick else DENSITIES
    results = [measure(shape, min(shape.heads, max_heads), densities, rep_ms) for shape in SHAPES]
    record = {
        "environment": describe_environment() | {"capability": list(torch.cuda.get_device_capability())},
        "date": time.strftime("%Y-%m-%d"),
        "options": {"heads": max_heads, "quick": args.quick, "tests": not args.skip_tests},
        "shapes": [asdict(shape) for shape in SHAPES],
        "results": results,
        "seconds": time.monotonic() - started,
    }
    print(f"measured in {record['seconds']:.0f} s on {record['environment']}, {record['date']}")
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def why_no_gpu() -> str | None:
    """Return why the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    device = torch.device("cuda", torch.cuda.current_device())
    return why_not_triton("block_sparse_attention", device, torch.bfloat16, dim=128, clusters=1000, keys=118_800)


def check_plans(max_heads: int) -> None:
    """Print the lists of every shape, and check on a small case that issued pairs cover the selected ones."""
    titles = ("tile slots", "piece slots")
    print(f"{'shape':<18} {'heads':>5} {'tokens':>7} {'dim':>4} {'clusters':>10} {titles[0]:>10} {titles[1]:>11} MiB")
    for shape in SHAPES:
        tiles = attention_tiles(90, padded_power_of_two(shape.dim), torch.bfloat16)
        heads = min(shape.heads, max_heads)
        for q_clusters, k_clusters in shape.clusters:
            if shape.tokens >= MAX_KEYS:
                raise SystemExit(f"{shape.name}: a piece cannot address {shape.tokens} keys")
            tile_slots = max_tiles(shape.tokens, q_clusters, tiles.block_m)
            piece_slots = max_pieces(shape.tokens, k_clusters, tiles.piece)
            mib = 4 * heads * (3 * tile_slots + q_clusters * (piece_slots + 2)) / 2**20
            print(
                f"{shape.name:<18} {heads:>5} {shape.tokens:>7} {shape.dim:>4} {f'{q_clusters}/{k_clusters}':>10} "
                f"{tile_slots:>10} {piece_slots:>11} {mib:.0f}"
            )
    generator = torch.Generator().manual_seed(0)
    q_sizes, k_sizes = (lognormal_sizes(generator, 1, 1, clusters, 500) for clusters in (3, 10))
    keep = random_blocks(generator, 0.4, k_sizes, 3)
    counts = work_list_reference(q_sizes, k_sizes, keep, 500, 500, 128, 16).counts
    if issued_pairs(q_sizes, counts, 128, 64, 16) < selected_pairs(q_sizes, k_sizes, keep):
        raise SystemExit("fewer pairs are issued than selected")


def tests_are_green() -> bool:
    """Run the kernels' tests on the GPU and return whether all passed and none was missing."""
    files = sorted(str(path) for pattern in TESTS for path in (ROOT / "tests").glob(pattern))
    if not files or importlib.util.find_spec("pytest") is None:
        print("the tests or pytest are missing; --skip-tests times kernels that nobody checked")
        return False
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    print(f"running {len(files)} test files", flush=True)
    return subprocess.run(command, env=environment, cwd=ROOT).returncode == 0


def measure(
    shape: Shape, heads: int, densities: tuple[float, ...], rep_ms: float, device: str = "cuda"
) -> dict[str, object]:
    """Time one shape, print what came out, and return it."""
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (random_tokens(generator, heads, shape.tokens, shape.dim) for _ in range(3))
    dense = dense_ms(q, k, v, rep_ms)
    tflop = 4 * shape.dim * heads * shape.tokens**2 / 1e12
    print(f"\n{shape.name} (1, {heads}, {shape.tokens}, {shape.dim}), dense attention:")
    for name, ms in dense.items():
        print(f"  {name:<14} " + (ms if isinstance(ms, str) else f"{ms:8.2f} ms, {1000 * tflop / ms:4.0f} TFLOP/s"))
    yardstick = dense["cuDNN"]
    if isinstance(yardstick, str):
        raise SystemExit(f"no yardstick: dense cuDNN attention {yardstick}")
    overheads, attentions = [], []
    for clusters in shape.clusters:
        plan = Plan.random(generator, q, k, clusters)
        overheads.append(measure_overhead(shape, q, k, v, plan, yardstick, rep_ms))
        print_overhead(overheads[-1])
        for density in densities:
            attentions.append(measure_attention(shape, generator, q, k, v, plan, density, yardstick, rep_ms))
            print_attention(attentions[-1])
    rows = {"overhead": [asdict(row) for row in overheads], "attention": [asdict(row) for row in attentions]}
    return {"shape": shape.name, "heads": heads, "dense_ms": dense, **rows}


def random_tokens(generator: torch.Generator, heads: int, tokens: int, dim: int) -> Tensor:
    """Return normal bf16 tokens [1, H, N, D], stored as (1, N, H, D)."""
    shape = (1, tokens, heads, dim)
    rows = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return rows.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """Clusters of queries and keys, with lognormal sizes."""

    q_labels: Tensor
    k_labels: Tensor
    q_order: Tensor
    k_order: Tensor
    q_sizes: Tensor
    k_sizes: Tensor

    @classmethod
    def random(cls, generator: torch.Generator, q: Tensor, k: Tensor, clusters: tuple[int, int]) -> Plan:
        """Return labels in random order, and what sorting makes of them."""
        q_labels, k_labels = (
            shuffled_labels(generator, lognormal_sizes(generator, 1, x.shape[1], count, x.shape[2]))
            for x, count in zip((q, k), clusters)
        )
        q_order, q_sizes = svg2.sort_labels(q_labels, clusters[0])
        k_order, k_sizes = svg2.sort_labels(k_labels, clusters[1])
        return cls(q_labels, k_labels, q_order, k_order, q_sizes, k_sizes)

    @property
    def clusters(self) -> tuple[int, int]:
        """Query clusters and key clusters of a head."""
        return self.q_sizes.shape[2], self.k_sizes.shape[2]


def measure_overhead(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, plan: Plan, dense: float, rep_ms: float
) -> Overhead:
    """Time clustering, sorting, permuting, selecting and the work list."""
    rep_ms /= 3
    ms: dict[str, float] = {}
    centroids = {}
    for name, x, count in zip("qk", (q, k), plan.clusters):
        centroids[name] = torch.zeros((1, x.shape[1], count, x.shape[3]), device=x.device)
        calls = torch.zeros(1, dtype=torch.int32, device=x.device)
        cluster = partial(svg2.kmeans_, x, centroids[name], calls, ITERS_INIT)

        def start(cluster: partial[Tensor] = cluster, calls: Tensor = calls) -> None:
            calls.zero_()
            cluster(2, 0)

        ms[f"k-means {name}, first call"] = median_ms(start, rep_ms)
        for iterations in (1, 2):
            ms[f"k-means {name}, warm {iterations}"] = median_ms(partial(cluster, iterations, 0), rep_ms)
    for name, labels, count in zip("qk", (plan.q_labels, plan.k_labels), plan.clusters):
        ms[f"sort {name}"] = median_ms(partial(svg2.sort_labels, labels, count), rep_ms)
    for name, x in zip("kv", (k, v)):
        ms[f"permute {name}"] = median_ms(partial(svg2.permute_tokens, x, plan.k_order), rep_ms)
    statistics = torch.zeros((1, q.shape[1], 4), device=q.device)
    select = partial(
        svg2.select_blocks, centroids["q"], centroids["k"], plan.q_sizes, plan.k_sizes, shape.dim**-0.5, TOP_P
    )
    ms["select"] = median_ms(partial(select, MIN_KEEP_RATIO, statistics), rep_ms)
    keep = random_blocks(torch.Generator(device=q.device).manual_seed(1), 0.25, plan.k_sizes, plan.clusters[0])
    ms["work list"] = median_ms(partial(make_work_list, plan, keep, tiles_for(shape.dim)), rep_ms)
    once = sum(value for name, value in ms.items() if "k-means" not in name)
    percent = {n: 100 * (once + sum(ms[f"k-means {x}, warm {n}"] for x in "qk")) / dense for n in (1, 2)}
    theirs = [flash_kmeans_ms(x, count, 2, rep_ms) for x, count in zip((q, k), plan.clusters)]
    failed = next((answer for answer in theirs if isinstance(answer, str)), None)
    verdicts = {n: judged(percent[n], overhead_goal(shape.name, n, plan.clusters[1])) for n in percent}
    return Overhead(
        shape.name, q.shape[1], plan.clusters, ms, failed or math.fsum(map(float, theirs)), percent, verdicts
    )


def tiles_for(dim: int) -> AttentionTiles:
    """Return the tiles that the attention takes on this GPU for bf16."""
    if why_not_gluon(torch.device("cuda"), torch.bfloat16, dim=dim, rows=1) is None:
        return GLUON
    major, minor = torch.cuda.get_device_capability()
    return attention_tiles(10 * major + minor, padded_power_of_two(dim), torch.bfloat16)


def make_work_list(plan: Plan, keep: Tensor, tiles: AttentionTiles) -> Tensor:
    """Make the work list of the attention and return its counts."""
    from svg2_compile.kernels.work_list_triton import work_list_triton

    q_tokens, k_tokens = plan.q_labels.shape[2], plan.k_labels.shape[2]
    return work_list_triton(plan.q_sizes, plan.k_sizes, keep, q_tokens, k_tokens, tiles.block_m, tiles.piece).counts


def measure_attention(
    shape: Shape,
    generator: torch.Generator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    density: float,
    dense: float,
    rep_ms: float,
) -> Attention:
    """Time the attention, which gathers its queries, on permuted keys at one density."""
    keep = random_blocks(generator, density, plan.k_sizes, plan.clusters[0])
    k, v = (svg2.permute_tokens(x, plan.k_order) for x in (k, v))
    sizes = (plan.q_sizes, plan.k_sizes, keep)
    attend = partial(svg2.block_sparse_attention, q, k, v, *sizes, None, None, None, plan.q_order, shape.dim**-0.5)
    tiles = tiles_for(shape.dim)
    work_list_ms = median_ms(partial(make_work_list, plan, keep, tiles), rep_ms / 5)
    ms = median_ms(attend, rep_ms)
    issued = issued_pairs(plan.q_sizes, make_work_list(plan, keep, tiles), tiles.block_m, tiles.block_n, tiles.piece)
    pairs = q.shape[1] * shape.tokens**2
    selected = selected_pairs(*sizes)
    eps_tile, eps_sel = (done / pairs * dense / (ms - work_list_ms) for done in (issued, selected))
    theirs = flashinfer_ms(svg2.permute_tokens(q, plan.q_order), k, v, *sizes, rep_ms)
    return Attention(
        shape=shape.name,
        heads=q.shape[1],
        clusters=plan.clusters,
        density=selected / pairs,
        ms=ms,
        work_list_ms=work_list_ms,
        flashinfer_ms=theirs,
        eps_tile=eps_tile,
        eps_sel=eps_sel,
        speedup=dense / ms,
        verdict_tile=judged(eps_tile, EPS_TILE.get(shape.dim)),
        verdict_sel=judged(eps_sel, eps_sel_goal(shape.dim, plan.clusters[1])),
    )


def print_overhead(row: Overhead) -> None:
    """Print the times and the shares of dense attention."""
    print(f"  clusters {row.clusters[0]}/{row.clusters[1]}")
    print("    " + ", ".join(f"{name} {ms:.3f}" for name, ms in row.ms.items()) + " ms")
    theirs = row.flash_kmeans_ms
    print(f"    flash-kmeans, 2 iterations: {theirs if isinstance(theirs, str) else f'{theirs:.2f} ms'}")
    for iterations, percent in row.percent_of_dense.items():
        print(
            f"    overhead, {iterations} iterations: {percent:.2f} % of dense: {row.verdicts[iterations]}", flush=True
        )


def print_attention(row: Attention) -> None:
    """Print one attention in a line."""
    theirs = row.flashinfer_ms if isinstance(row.flashinfer_ms, str) else f"{row.flashinfer_ms:.2f} ms"
    print(
        f"    density {row.density:.3f}: {row.ms:.2f} ms (work list {row.work_list_ms:.3f}), {row.speedup:.2f}x, "
        f"eps_tile {row.eps_tile:.3f} {row.verdict_tile}, eps_sel {row.eps_sel:.3f} {row.verdict_sel}, "
        f"FlashInfer {theirs}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
