"""Every kernel on an NVIDIA GPU: right first, then timed beside dense attention and against its goals.

    python -P benchmarks/kernels/gpu_kernels.py --out gpu_kernels.json

First the kernels' tests run on the GPU; on a failure nothing is timed. Then dense attention (cuDNN forced, flash,
FlexAttention), flash-kmeans and FlashInfer where they are installed, and our kernels. Cluster sizes are lognormal, kept
clusters random, tokens normal and stored as (B, N, H, D), bf16; times are medians. Without a GPU it checks what it can
and stops.

eps_tile: operations issued by the attention kernel per second over those of dense cuDNN; eps_sel: the same of selected
pairs. The overhead is clustering (k-means and sort of q and k, permutation of k and v) and selection, in percent of
dense cuDNN, on the GPU alone. The issued operations are those of the tiles of `tuning`; in Gluon, groups of rows
without a query issue none. Every attention that runs here is timed; the first is the one that is chosen.
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

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from dense_baselines import FLASHINFER_BACKENDS, attempt, dense_ms, flash_kmeans_ms, flashinfer_ms
from gpu_targets import EPS_TILE, eps_sel_goal, judged, overhead_goal
from plan_costs import issued_pairs, selected_pairs
from random_blocks import lognormal_sizes, random_blocks, shuffled_labels
from shapes import HUNYUAN_720P, NARROW, WAN_1_3B_480P, WAN_14B_720P, Shape
from timing import device_median_ms, median_ms

from svg2_compile.environment import describe_environment
from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.known_state import known_as_clustered
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.tuning import GLUON, GLUON_ROWS, AttentionTiles, attention_tiles
from svg2_compile.kernels.why_not import ATTENTIONS, capability_of, why_not_attention, why_not_triton
from svg2_compile.kernels.work_list import COUNTS, MAX_KEYS, kept_runs_reference, max_runs, max_tiles

ROOT = Path(__file__).resolve().parents[2]
TESTS = tuple(f"test_*_{kind}.py" for kind in ("triton", "descriptor", "gluon"))
SHAPES = (WAN_14B_720P, HUNYUAN_720P, WAN_1_3B_480P, NARROW)
DENSITIES = (0.15, 0.25, 0.4)
ITERS_INIT = 10
TOP_P, MIN_KEEP_RATIO = 0.9, 0.1
OVERHEAD_ROUNDS = 11
svg2 = torch.ops.svg2


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
    other_ms: dict[str, float | str]
    """Of the implementations that were not chosen."""
    flashinfer_ms: dict[str, float | str]
    """By backend; planning left out."""
    eps_tile: float
    eps_sel: float
    speedup: float
    """Of the attention over dense cuDNN."""
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
    results: list[dict[str, object]] = []
    record: dict[str, object] = {
        "environment": describe_environment() | {"capability": list(torch.cuda.get_device_capability())},
        "date": time.strftime("%Y-%m-%d"),
        "options": {"heads": max_heads, "quick": args.quick, "tests": not args.skip_tests},
        "shapes": [asdict(shape) for shape in SHAPES],
        "results": results,
    }
    for shape in SHAPES:
        results.append(measure(shape, min(shape.heads, max_heads), densities, rep_ms))
        record["seconds"] = time.monotonic() - started
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"measured in {record['seconds']:.0f} s on {record['environment']}, {record['date']}")
    return 0


def why_no_gpu() -> str | None:
    """Return why the kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    device = torch.device("cuda", torch.cuda.current_device())
    return why_not_triton(
        "block_sparse_attention", device, torch.bfloat16, dim=128, clusters=1000, keys=HUNYUAN_720P.tokens
    )


def check_plans(max_heads: int) -> None:
    """Print the lists of every shape, and check on a small case that issued pairs cover the selected ones."""
    titles = ("tile slots", "run slots")
    print(f"{'shape':<18} {'heads':>5} {'tokens':>7} {'dim':>4} {'clusters':>10} {titles[0]:>10} {titles[1]:>10} MiB")
    for shape in SHAPES:
        heads = min(shape.heads, max_heads)
        for q_clusters, k_clusters in shape.clusters:
            if shape.tokens > MAX_KEYS:
                raise SystemExit(f"{shape.name}: a run cannot address {shape.tokens} keys")
            tile_slots, run_slots = max_tiles(shape.tokens, q_clusters, GLUON[shape.dim].block_m), max_runs(k_clusters)
            mib = 4 * heads * (3 * tile_slots + q_clusters * (2 * run_slots + len(COUNTS))) / 2**20
            print(
                f"{shape.name:<18} {heads:>5} {shape.tokens:>7} {shape.dim:>4} {f'{q_clusters}/{k_clusters}':>10} "
                f"{tile_slots:>10} {run_slots:>10} {mib:.0f}"
            )
    generator = torch.Generator().manual_seed(0)
    q_sizes, k_sizes = (lognormal_sizes(generator, 1, 1, clusters, 500) for clusters in (3, 10))
    keep = random_blocks(generator, 0.4, k_sizes, 3)
    counts = kept_runs_reference(keep, k_sizes).counts
    if issued_pairs(q_sizes, counts, 128, 64, 16) < selected_pairs(q_sizes, k_sizes, keep):
        raise SystemExit("fewer pairs are issued than selected")


def tests_are_green() -> bool:
    """Run the kernels' tests on the GPU and return whether all passed and none was missing."""
    files = sorted(str(path) for pattern in TESTS for path in (ROOT / "tests" / "kernels").glob(pattern))
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


@dataclass(frozen=True, slots=True)
class Case:
    """An attention to be timed."""

    arguments: tuple[Tensor | float | None, ...]
    """Those of the op, before the name of a kernel: queries in token order, keys and values in that of the clusters."""
    keep: Tensor
    plan: Plan
    counts: Tensor
    pairs: int
    """Of queries and keys, kept or not."""

    @classmethod
    def random(cls, generator: torch.Generator, q: Tensor, k: Tensor, v: Tensor, plan: Plan, density: float) -> Case:
        """Return one with random key clusters kept."""
        keep = random_blocks(generator, density, plan.k_sizes, plan.clusters[0])
        kept = kept_runs_reference(keep, plan.k_sizes)
        k, v = (svg2.permute_tokens(x, plan.k_order) for x in (k, v))
        scale = q.shape[3] ** -0.5
        arguments = (q, k, v, plan.q_sizes, kept.runs, kept.counts, None, None, None, plan.q_order, scale)
        return cls(arguments, keep, plan, kept.counts, q.shape[1] * q.shape[2] * k.shape[2])

    @property
    def density(self) -> float:
        """Selected pairs over all pairs."""
        return selected_pairs(self.plan.q_sizes, self.plan.k_sizes, self.keep) / self.pairs

    def issued(self, implementation: str, tiles: AttentionTiles) -> float:
        """Return the pairs that a kernel multiplies over all pairs."""
        rows = GLUON_ROWS if implementation == "gluon" else tiles.block_m
        return issued_pairs(self.plan.q_sizes, self.counts, rows, tiles.block_n, tiles.piece) / self.pairs


def measure_overhead(
    shape: Shape, q: Tensor, k: Tensor, v: Tensor, plan: Plan, dense: float, rep_ms: float
) -> Overhead:
    """Time clustering and selecting."""
    rep_ms /= 3
    ms: dict[str, float] = {}
    centroids = [
        torch.zeros((1, x.shape[1], count, shape.dim), device=x.device) for x, count in zip((q, k), plan.clusters)
    ]
    calls = [torch.zeros(1, dtype=torch.int32, device=q.device) for _ in "qk"]
    cluster = partial(svg2.cluster_tokens_, q, k, v, *centroids, *calls, ITERS_INIT)

    def start() -> None:
        for each in calls:
            each.zero_()
        cluster(2, 0)

    ms["cluster, first call"] = median_ms(start, rep_ms)

    def later(iterations: int) -> None:
        # as the region that owns the state
        with known_as_clustered(frozenset(each.data_ptr() for each in calls)):
            cluster(iterations, 0)

    for iterations in (1, 2):
        ms[f"cluster, warm {iterations}"] = device_median_ms(partial(later, iterations), OVERHEAD_ROUNDS)
    measured = torch.zeros((*plan.q_sizes.shape, len(STATISTICS)), device=q.device)
    select = partial(svg2.select_blocks, *centroids, plan.q_sizes, plan.k_sizes, shape.dim**-0.5, TOP_P)
    ms["select"] = device_median_ms(partial(select, MIN_KEEP_RATIO, measured), OVERHEAD_ROUNDS)
    estimate = partial(svg2.block_masses, q, plan.q_order, centroids[1], plan.q_sizes, plan.k_sizes, shape.dim**-0.5)
    ms["masses by query"] = device_median_ms(estimate, OVERHEAD_ROUNDS)
    percent = {n: 100 * (ms["select"] + ms[f"cluster, warm {n}"]) / dense for n in (1, 2)}
    theirs = [flash_kmeans_ms(x, count, 2, rep_ms) for x, count in zip((q, k), plan.clusters)]
    failed = next((answer for answer in theirs if isinstance(answer, str)), None)
    verdicts = {n: judged(percent[n], overhead_goal(shape.name, n, plan.clusters[1])) for n in percent}
    return Overhead(
        shape.name, q.shape[1], plan.clusters, ms, failed or math.fsum(map(float, theirs)), percent, verdicts
    )


def implementations(dim: int) -> dict[str, AttentionTiles]:
    """Return the attentions that run on this GPU for bf16, with their tiles, the chosen one first."""
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        name: attention_tiles(capability_of(device), padded_power_of_two(dim), torch.bfloat16, name)
        for name in ATTENTIONS
        if why_not_attention(name, device, torch.bfloat16, dim=dim) is None
    }


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
    case = Case.random(generator, q, k, v, plan, density)
    (chosen, tiles), *others = implementations(shape.dim).items()
    ms = median_ms(partial(svg2.block_sparse_attention, *case.arguments, chosen), rep_ms)
    other_ms = {
        name: attempt(partial(svg2.block_sparse_attention, *case.arguments, name), rep_ms) for name, _ in others
    }
    density = case.density
    eps_tile, eps_sel = (share * dense / ms for share in (case.issued(chosen, tiles), density))
    _, k, v, *_ = case.arguments
    clustered = svg2.permute_tokens(q, plan.q_order)
    theirs = {
        backend: flashinfer_ms(backend, clustered, k, v, plan.q_sizes, plan.k_sizes, case.keep, rep_ms)
        for backend in FLASHINFER_BACKENDS
    }
    return Attention(
        shape=shape.name,
        heads=q.shape[1],
        clusters=plan.clusters,
        density=density,
        ms=ms,
        other_ms=other_ms,
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
    others, theirs = (
        "".join(f", {name} {ms if isinstance(ms, str) else f'{ms:.2f}'}" for name, ms in times.items())
        for times in (row.other_ms, row.flashinfer_ms)
    )
    print(
        f"    density {row.density:.3f}: {row.ms:.2f} ms{others}; {row.speedup:.2f}x, "
        f"eps_tile {row.eps_tile:.3f} {row.verdict_tile}, eps_sel {row.eps_sel:.3f} {row.verdict_sel}, "
        f"FlashInfer{theirs.removeprefix(',')}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
