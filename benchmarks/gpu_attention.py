"""Block-sparse attention on an NVIDIA GPU: is it right, and how long does it take beside dense attention?

``python -P benchmarks/gpu_attention.py --out attention.json``, with svg2_compile installed, or with a folder on
PYTHONPATH in which svg2_compile/kernels is the folder kernels. Needs torch with CUDA and triton. Dense attention is
PyTorch's with cuDNN forced. Cluster sizes are lognormal; query clusters keep random key clusters up to a density. Times
are medians; the attention includes making its work list, not clustering and permuting.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.block_sparse_attention_triton import block_sparse_attention_triton
from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import AttentionTiles, attention_tiles
from svg2_compile.kernels.work_list import work_list_reference
from svg2_compile.kernels.work_list_triton import work_list_triton

# name, heads, tokens, head dimension, query clusters, key clusters
SHAPES = (
    ("Wan 14B 720p", 40, 75_600, 128, 100, 500),
    ("HunyuanVideo 720p", 24, 118_800, 128, 100, 500),
    ("Wan 1.3B 480p", 12, 32_760, 128, 55, 218),
    ("D=64", 24, 32_760, 64, 55, 218),
)
CANDIDATES = [
    AttentionTiles(block_m, block_n, 16, num_warps, num_stages)
    for block_m, block_n, num_warps, num_stages in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
        (128, 32, 8, 4),
        (64, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 128, 4, 3),
    )
]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    shape: str
    heads: int
    tokens: int
    dim: int
    density: float
    """Kept pairs over all pairs; 0 for the dense yardstick."""
    tiles: str
    ms: float
    plan_ms: float
    tflops: float
    """Of the kept pairs, 4 D operations each."""
    share_of_dense: float
    """Operations per second of kept pairs over those of dense attention."""


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--heads", type=int, default=8, help="at most this many heads, to save time")
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.15])
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))), help="which of the shapes")
    parser.add_argument("--rep-ms", type=int, default=150, help="time spent on each measurement")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--skip-tuning", action="store_true")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    failures = [] if args.skip_checks else check()
    if failures:
        print("\n".join(["FAILED", *failures]))
        sys.exit(1)
    best: dict[int, AttentionTiles] = {}
    tuning: dict[str, float] = {}
    if not args.skip_tuning:
        for dim in sorted({SHAPES[i][3] for i in args.shapes}, reverse=True):
            best[dim], times = tune(dim, args.rep_ms)
            tuning |= {f"D={dim} {tiles}": ms for tiles, ms in times.items()}
    rows = [
        row
        for index in args.shapes
        for row in measure(index, args.heads, args.densities, args.rep_ms, best.get(SHAPES[index][3]))
    ]
    print(
        f"{'shape':<18} {'H':>3} {'N':>7} {'D':>4} {'density':>7} {'tiles':>14} {'ms':>8} {'plan':>6} {'TF/s':>5} share"
    )
    for row in rows:
        print(
            f"{row.shape:<18} {row.heads:>3} {row.tokens:>7} {row.dim:>4} {row.density:7.3f} {row.tiles:>14} "
            f"{row.ms:8.3f} {row.plan_ms:6.3f} {row.tflops:5.0f} {row.share_of_dense:.3f}"
        )
    if args.out:
        device = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        args.out.write_text(json.dumps(device | {"tuning_ms": tuning, "rows": [asdict(row) for row in rows]}, indent=1))


def check() -> list[str]:
    """Compare the kernel to the reference in fp64 on small cases; return what is wrong."""
    failures = []
    for seed, (dtype, dim, context, groups) in enumerate(
        itertools.product((torch.bfloat16, torch.float16, torch.float32), (64, 128, 80), (0, 70), (1, 2, 4))
    ):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        arguments = small_case(generator, dtype, dim, context, groups)
        if message := compare(arguments):
            failures.append(f"{dtype} D={dim} context={context} groups={groups}: {message}")
    print(f"{seed + 1} cases checked against fp64, {len(failures)} wrong", flush=True)
    return failures


def compare(arguments: tuple[Tensor | float | None, ...]) -> str | None:
    """Return what is wrong with one case, or None."""
    exact = block_sparse_attention_reference(
        *(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    )
    rounded = low_precision(*arguments)
    got, again = block_sparse_attention_triton(*arguments), block_sparse_attention_triton(*arguments)
    if not all(torch.equal(x, y) for x, y in zip(got, again, strict=True)):
        return "two runs differ"
    for name, mine, theirs, wanted in zip(("out", "lse"), got, rounded, exact, strict=True):
        finite = wanted.isfinite()
        if not torch.equal(mine[~finite].double(), wanted[~finite]):
            return f"{name} is infinite or not where it should be"
        error = (mine.double() - wanted)[finite].abs().max().item()
        # The rule of the tests: twice the error of low-precision arithmetic, plus one rounding step.
        step = torch.finfo(theirs.dtype).eps * wanted[finite].abs().max().item()
        allowed = 2 * (theirs.double() - wanted)[finite].abs().max().item() + step
        if not error <= allowed:
            return f"{name} errs by {error:.2e}, allowed are {allowed:.2e}"
    q, k, _, q_sizes, k_sizes, keep = arguments[:6]
    lists = [
        make(q_sizes, k_sizes, keep, q.shape[2], k.shape[2], 128, 16)
        for make in (work_list_triton, work_list_reference)
    ]
    used = torch.arange(lists[0].pieces.shape[3], device="cuda") < lists[1].counts[..., 1:]
    same = torch.equal(lists[0].tiles, lists[1].tiles) and torch.equal(lists[0].counts, lists[1].counts)
    return None if same and torch.equal(lists[0].pieces[used], lists[1].pieces[used]) else "the work lists differ"


def low_precision(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor,
    k_sizes: Tensor,
    keep: Tensor,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the same attention from plain operations that each round to the dtype of ``q``."""
    repeats = q.shape[1] // k.shape[1]
    blocks = [
        [
            keep[b, h].repeat_interleave(k_sizes[b, h // repeats], 1).repeat_interleave(q_sizes[b, h], 0)
            for h in range(q.shape[1])
        ]
        for b in range(q.shape[0])
    ]
    mask = torch.stack([torch.stack(heads) for heads in blocks])
    if context_k is not None and context_v is not None and context_mask is not None:
        k, v = torch.cat((k, context_k), 2), torch.cat((v, context_v), 2)
        mask = torch.cat((mask, context_mask.expand(*mask.shape[:3], -1)), -1)
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


def small_case(
    generator: torch.Generator, dtype: torch.dtype, dim: int, context: int, groups: int
) -> tuple[Tensor | float | None, ...]:
    """Return the arguments of the op for 1,003 tokens: odd, strided, with empty clusters."""
    batch, heads, tokens, q_clusters, k_clusters = 2, 4, 1_003, 7, 40

    def rows(heads: int, tokens: int) -> Tensor:
        return torch.randn((batch, tokens, heads, dim), generator=generator, device="cuda").to(dtype).transpose(1, 2)

    q_sizes = lognormal_sizes(generator, batch, heads, q_clusters, tokens)
    k_sizes = lognormal_sizes(generator, batch, groups, k_clusters, tokens)
    k_sizes[..., 1] += k_sizes[..., 0]
    k_sizes[..., 0] = 0
    keep = torch.rand((batch, heads, q_clusters, k_clusters), generator=generator, device="cuda") < 0.4
    keep[0, 0, 2] = False
    mask = torch.rand((batch, 1, 1, context), generator=generator, device="cuda") < 0.5 if context else None
    context_k, context_v = (rows(groups, context), rows(groups, context)) if context else (None, None)
    q, k, v = rows(heads, tokens), rows(groups, tokens), rows(groups, tokens)
    return q, k, v, q_sizes, k_sizes, keep, context_k, context_v, mask, dim**-0.5


def lognormal_sizes(generator: torch.Generator, batch: int, heads: int, clusters: int, tokens: int) -> Tensor:
    """Return int32 [B, H, C] sizes that sum to ``tokens``, lognormal with a standard deviation of 0.8 of the mean."""
    sigma = 0.703  # sqrt(log(1 + 0.8 ** 2))
    device = generator.device
    weights = (torch.randn((batch, heads, clusters), generator=generator, device=device) * sigma).exp().double()
    edges = (weights.cumsum(-1) / weights.sum(-1, keepdim=True) * tokens).round().int()
    edges[..., -1] = tokens
    return torch.diff(edges, prepend=torch.zeros_like(edges[..., :1])).int()


def random_blocks(generator: torch.Generator, density: float, k_sizes: Tensor, q_clusters: int) -> Tensor:
    """Return bool [B, H, C_q, C_k]: per query cluster, random key clusters of about that share of the keys."""
    batch, heads, k_clusters = k_sizes.shape
    shape = (batch, heads, q_clusters, k_clusters)
    order = torch.rand(shape, generator=generator, device=k_sizes.device).argsort(-1)
    sizes = k_sizes.unsqueeze(2).expand(shape).gather(-1, order)
    middles = sizes.cumsum(-1) - sizes / 2
    kept = middles < density * sizes.sum(-1, keepdim=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept)


def tune(dim: int, rep_ms: int) -> tuple[AttentionTiles, dict[str, float]]:
    """Return the fastest tiles at density 0.3 of 4 heads of 32,760 tokens, and the times of all in ms."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn((1, 4, 32_760, dim), generator=generator, device="cuda").bfloat16() for _ in range(3))
    q_sizes, k_sizes = (lognormal_sizes(generator, 1, 4, clusters, 32_760) for clusters in (55, 218))
    keep = random_blocks(generator, 0.3, k_sizes, 55)
    times: dict[AttentionTiles, float] = {}
    for tiles in CANDIDATES:
        arguments = (q, k, v, q_sizes, k_sizes, keep, None, None, None, None, dim**-0.5, tiles)
        try:
            times[tiles] = median_ms(lambda arguments=arguments: block_sparse_attention_triton(*arguments), rep_ms)
        except triton.runtime.errors.OutOfResources as error:
            print(f"D={dim} {short(tiles)}: {error}")
            continue
        print(f"D={dim} {short(tiles):>14} {times[tiles]:8.3f} ms", flush=True)
    return min(times, key=times.__getitem__), {short(tiles): ms for tiles, ms in times.items()}


def measure(index: int, max_heads: int, densities: list[float], rep_ms: int, best: AttentionTiles | None) -> list[Row]:
    """Return the dense yardstick and the sparse times of one shape."""
    name, heads, tokens, dim, q_clusters, k_clusters = SHAPES[index]
    heads = min(heads, max_heads)
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn((1, heads, tokens, dim), generator=generator, device="cuda").bfloat16() for _ in range(3))
    q_sizes, k_sizes = (lognormal_sizes(generator, 1, heads, count, tokens) for count in (q_clusters, k_clusters))
    capability = torch.cuda.get_device_capability()
    tiles = best or attention_tiles(10 * capability[0] + capability[1], padded_power_of_two(dim), q.dtype)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        dense_ms = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), rep_ms)
    dense_tflops = 4 * dim * heads * tokens**2 / dense_ms / 1e9
    rows = [Row(name, heads, tokens, dim, 0.0, "dense cuDNN", dense_ms, 0.0, dense_tflops, 1.0)]
    for density in densities:
        keep = random_blocks(generator, density, k_sizes, q_clusters)
        pairs = (keep * q_sizes.long().unsqueeze(-1) * k_sizes.long().unsqueeze(-2)).sum().item()
        arguments = (q, k, v, q_sizes, k_sizes, keep, None, None, None, None, dim**-0.5, tiles)
        ms = median_ms(lambda arguments=arguments: block_sparse_attention_triton(*arguments), rep_ms)
        lists = (q_sizes, k_sizes, keep, tokens, tokens, tiles.block_m, tiles.piece)
        plan_ms = median_ms(lambda lists=lists: work_list_triton(*lists), 20)
        tflops = 4 * dim * pairs / ms / 1e9
        reached = pairs / (heads * tokens**2)
        rows.append(Row(name, heads, tokens, dim, reached, short(tiles), ms, plan_ms, tflops, tflops / dense_tflops))
    return rows


def median_ms(function: Callable[[], object], rep_ms: int) -> float:
    """Return the median time of a call."""
    return statistics.median(triton.testing.do_bench(function, warmup=50, rep=rep_ms, return_mode="all"))


def short(tiles: AttentionTiles) -> str:
    """Return rows x keys, warps and stages in a few letters."""
    return f"{tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages}"


if __name__ == "__main__":
    main()
