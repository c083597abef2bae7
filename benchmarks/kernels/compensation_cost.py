"""Time what stands in for dropped key clusters, routing by error, floors and repair, as shares of dense attention.

Run from anywhere: ``python -P benchmarks/kernels/compensation_cost.py``, for Wan 14B and HunyuanVideo at 720p on a GPU.
Tokens are random around some centres; the ops themselves cluster and select them, at their defaults.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import HUNYUAN_720P, WAN_14B_720P, Shape
from timing import cpu_ms, device_ms, medians_in_turns_ms

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.environment import describe_environment
from svg2_compile.kernels.card import MAX_PROBES
from svg2_compile.kernels.least_keys import FLOORS
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.passes.config import SparseConfig
from svg2_compile.video.measure import fastest_attention

svg2 = torch.ops.svg2
SHAPES = {"wan": WAN_14B_720P, "hunyuan": HUNYUAN_720P}
CENTRES = 100


def main() -> None:
    """Print a table for every size and number of clusters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--heads", type=int, help="at most this many; default: all")
    parser.add_argument("--tokens", type=int, help="at most this many; default: all")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in describe_environment().items()))
    for shape in (SHAPES[name] for name in args.shapes):
        tokens = shape.tokens if args.tokens is None else min(args.tokens, shape.tokens)
        heads = shape.heads if args.heads is None else min(args.heads, shape.heads)
        for clusters in shape.clusters:
            print(table(shape, heads, tokens, clusters, getattr(torch, args.dtype), args.repeats))


def table(shape: Shape, heads: int, tokens: int, clusters: tuple[int, int], dtype: torch.dtype, repeats: int) -> str:
    """Return the times of one size as a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = SparseConfig()
    generator = torch.Generator(device=device).manual_seed(0)
    size = (1, heads, tokens, shape.dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    centres = 2 * normal(1, heads, CENTRES, shape.dim)
    which = torch.randint(CENTRES, (2, 1, heads, tokens, 1), generator=generator, device=device)
    q, k = ((centres.gather(2, each.expand(size)) + normal(*size)).to(dtype) for each in which)
    v = normal(*size).to(dtype)
    state = [torch.zeros(1, heads, count, shape.dim, device=device) for count in clusters]
    calls = [torch.zeros(1, dtype=torch.int32, device=device) for _ in clusters]
    scale, iterations = shape.dim**-0.5, (config.kmeans_iters_init, config.kmeans_iters_step, config.seed)
    q_order, q_sizes, k_sizes, keys, values = svg2.cluster_tokens_(q, k, v, *state, *calls, *iterations)
    statistics = torch.zeros(1, heads, clusters[0], len(STATISTICS), device=device)
    sides = (*state, q_sizes, k_sizes, scale, config.top_p, config.min_keep_ratio, statistics)
    runs, counts = svg2.select_blocks(*sides)
    density = float(statistics[..., 1].sum() / heads)
    means = [svg2.cluster_means(each, k_sizes) for each in (keys, values)]
    bias = svg2.log_dropped_sizes(runs, counts, k_sizes)
    errors = svg2.block_errors(state[0], keys, values, *means, k_sizes, scale)
    attend = (q, keys, values, q_sizes, runs, counts, None, None, None, q_order, scale, "auto", None, False)
    floors = torch.zeros(1, heads, len(FLOORS), device=device)
    least = svg2.least_keys_(statistics, k_sizes, floors)
    selection = (q_order, q_sizes, k_sizes, runs, counts, None, None, None, calls[1], scale, MAX_PROBES)
    result = svg2.block_sparse_attention(*attend)[0]
    places, exact, _ = svg2.probe_rows(q, keys, values, *selection, 0, config.seed)
    # a repair leaves nothing to repair: by turns, results are to be one more and one less
    targets = itertools.cycle((exact + 1, exact))
    timed = {
        "dense attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "sparse attention": lambda: svg2.block_sparse_attention(*attend),
        "the same with means": lambda: svg2.block_sparse_attention(*attend, *means, bias),
        "means of keys and values": lambda: [svg2.cluster_means(each, k_sizes) for each in (keys, values)],
        "weights of the means": lambda: svg2.log_dropped_sizes(runs, counts, k_sizes),
        "their weights by keys": lambda: svg2.log_dropped_weights(bias, state[0], keys, means[0], k_sizes, scale),
        "selection": lambda: svg2.select_blocks(*sides),
        "errors": lambda: svg2.block_errors(state[0], keys, values, *means, k_sizes, scale),
        "selection by errors": lambda: svg2.select_blocks(*sides, None, errors),
        "floor of a head": lambda: svg2.least_keys_(statistics.zero_(), k_sizes, floors),
        "selection with a floor": lambda: svg2.select_blocks(*sides, None, None, least),
        "dense rows": lambda: svg2.probe_rows(q, keys, values, *selection, 0, config.seed),
        "dense rows and recall": lambda: svg2.probe_rows(q, keys, values, *selection, 1, config.seed),
        "repair": lambda: svg2.repair_rows_(result, places, next(targets)),
    }
    with fastest_attention(device):
        time_ms = device_ms if device.type == "cuda" else cpu_ms
        found = medians_in_turns_ms(*timed.values(), repeats=repeats, time_ms=time_ms)
    ms = dict(zip(timed, found, strict=True))
    compensation = ms["the same with means"] - ms["sparse attention"]
    compensation += ms["means of keys and values"] + ms["weights of the means"]
    by_keys = compensation + ms["their weights by keys"]
    routing = ms["errors"] + ms["selection by errors"] - ms["selection"]
    altogether = {
        "compensation": compensation,
        "compensation with weights by keys": by_keys,
        "routing by error": routing,
        "floor of a head": ms["floor of a head"] + ms["selection with a floor"],
        "repair": ms["dense rows"] + ms["repair"],
    }
    rows = ms | {f"**{name}, altogether**": each for name, each in altogether.items()}
    lines = [
        "",
        f"{shape.name}: {heads} heads, {tokens} tokens of {shape.dim}, {dtype}, {clusters[0]} / {clusters[1]} "
        f"clusters, density {density:.3f}; medians of {repeats} in turns",
        "",
        "| | ms | of dense attention |",
        "| --- | --- | --- |",
    ]
    return "\n".join(
        lines + [f"| {name} | {each:.3f} | {100 * each / ms['dense attention']:.2f} % |" for name, each in rows.items()]
    )


if __name__ == "__main__":
    main()
