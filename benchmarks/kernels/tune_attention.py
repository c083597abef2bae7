"""Which tiles the Triton attention runs fastest with on this GPU: the numbers for `kernels/tuned/`.

python -P benchmarks/kernels/tune_attention.py

bf16, 4 heads of 32,760 tokens, 55 and 218 clusters of lognormal sizes, random key clusters kept at density 0.3;
medians.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from dense_baselines import attempt
from random_blocks import lognormal_sizes, random_blocks

from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.tuning import AttentionTiles, attention_tiles
from svg2_compile.kernels.why_not import capability_of
from svg2_compile.kernels.work_list import kept_runs_reference

HEADS, TOKENS, Q_CLUSTERS, K_CLUSTERS, DENSITY = 4, 32_760, 55, 218, 0.3
# block_m, block_n, num_warps, num_stages
CANDIDATES = (
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


def main() -> None:
    """Print the time of every candidate, the fastest last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--rep-ms", type=float, default=150.0, help="time spent on each candidate")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device")
        return
    for dim in args.dims:
        times = measure(dim, args.rep_ms)
        for tiles, ms in sorted(times.items(), key=lambda item: -item[1]):
            print(f"D={dim} {tiles.block_m}x{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages} {ms:8.3f} ms")
        print(
            f"in use: {attention_tiles(capability_of(torch.device('cuda')), padded_power_of_two(dim), torch.bfloat16)}"
        )


def measure(dim: int, rep_ms: float) -> dict[AttentionTiles, float]:
    """Return the time of every candidate that runs here."""
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer

    generator = torch.Generator(device="cuda").manual_seed(0)
    shape = (1, HEADS, TOKENS, dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q_sizes, k_sizes = (lognormal_sizes(generator, 1, HEADS, count, TOKENS) for count in (Q_CLUSTERS, K_CLUSTERS))
    keep = random_blocks(generator, DENSITY, k_sizes, Q_CLUSTERS)
    kept = kept_runs_reference(keep, k_sizes)
    times: dict[AttentionTiles, float] = {}
    for block_m, block_n, num_warps, num_stages in CANDIDATES:
        tiles = AttentionTiles(block_m, block_n, 16, num_warps, num_stages)
        arguments = (q, k, v, q_sizes, kept.runs, kept.counts, None, None, None, None, dim**-0.5, tiles)
        answer = attempt(partial(block_sparse_attention_pointer, *arguments), rep_ms)
        if isinstance(answer, str):
            print(f"D={dim} {tiles}: {answer}")
        else:
            times[tiles] = answer
    return times


if __name__ == "__main__":
    main()
