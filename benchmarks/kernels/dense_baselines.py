"""Other people's kernels, timed beside ours: dense attention, FA4 with fixed blocks, flash-kmeans, FlashInfer.

    python -P benchmarks/kernels/dense_baselines.py --out dense_baselines.json

times what sparse attention is compared with, in one session: dense attention by cuDNN, flash, FlexAttention and, where
it is installed, FA4 (`flash-attn-4`) at the sizes of large models, normal tokens stored as (B, N, H, D), bf16; FA4 with
a quarter of its fixed blocks, drawn at random; and what the GPU can do at most, a large bf16 matrix product and a copy.
Times are medians. Without a GPU it says so and stops.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from shapes import HUNYUAN_720P_WITH_TEXT, NARROW, NARROW_FINE, WAN_1_3B_480P, WAN_14B_720P, Shape
from timing import median_ms

from svg2_compile.environment import describe_environment

WORKSPACE_BYTES = 256 << 20  # FlashInfer's own scratch memory
FLASHINFER_BACKENDS = ("fa2", "fa3")
FA4_BLOCKS = {64: (192, 128), 128: (128, 128)}  # its tiles on Hopper, by head dimension: queries, keys
FA4_DENSITY = 0.25
DENSE_SHAPES = (
    WAN_14B_720P,
    HUNYUAN_720P_WITH_TEXT,
    WAN_1_3B_480P,
    replace(NARROW_FINE, name=NARROW.name),
)
MATRIX = 8192
COPIED_BYTES = 1 << 30


def main() -> int:
    """Time the ceilings and every shape, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rep-ms", type=float, default=300.0, help="how long a fast call is repeated")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was timed")
        return 0
    limits = ceilings(args.rep_ms)
    print(f"matrix product {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_gbs']:.0f} GB/s")
    dense: list[dict[str, object]] = []
    record = {
        "environment": describe_environment() | {"capability": list(torch.cuda.get_device_capability())},
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": limits,
        "dense": dense,
    }
    for shape in DENSE_SHAPES:
        dense.append(dense_record(shape, args.rep_ms))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"on {record['environment']}, {record['date']}")
    return 0


def ceilings(rep_ms: float, device: str = "cuda") -> dict[str, float]:
    """Return the rate of a large bf16 matrix product, and of a copy, bytes read and written."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b, rep_ms)
    source = torch.empty(COPIED_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), rep_ms)
    return {"matmul_tflops": 2 * MATRIX**3 / matmul_ms / 1e9, "copy_gbs": 2 * COPIED_BYTES / copy_ms / 1e6}


def dense_record(shape: Shape, rep_ms: float, device: str = "cuda") -> dict[str, object]:
    """Time dense attention at one size, print what came out, and return it."""
    generator = torch.Generator(device).manual_seed(0)
    stored = (1, shape.tokens, shape.heads, shape.dim)
    q, k, v = (
        torch.randn(stored, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv"
    )
    ms = dense_ms(q, k, v, rep_ms)
    flop = 4 * shape.dim * shape.heads * shape.tokens**2
    tflops = {each: flop / value / 1e9 for each, value in ms.items() if not isinstance(value, str)}
    print(f"{shape.name} {tuple(shape.size)}")
    for each, value in ms.items():
        print(f"  {each:<14} " + (value if isinstance(value, str) else f"{value:8.2f} ms, {tflops[each]:4.0f} TFLOP/s"))
    blocks = fa4_blocks(q, k, v, generator, rep_ms)
    print("  FA4, fixed blocks: " + ", ".join(f"{each} {value}" for each, value in blocks.items()), flush=True)
    return {"shape": shape.name, "size": shape.size, "ms": ms, "tflops": tflops, "FA4 blocks": blocks}


def dense_ms(q: Tensor, k: Tensor, v: Tensor, rep_ms: float) -> dict[str, float | str]:
    """Return the time of dense attention by each implementation, or why it has none."""
    flex = torch.compile(_flex_attention(), dynamic=False)

    return {
        "cuDNN": attempt(partial(sdpa, SDPBackend.CUDNN_ATTENTION, q, k, v), rep_ms),
        "flash": attempt(partial(sdpa, SDPBackend.FLASH_ATTENTION, q, k, v), rep_ms),
        "FlexAttention": attempt(lambda: flex(q, k, v), rep_ms),
        "FA4": fa4_ms(q, k, v, rep_ms),
    }


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute dense attention by one of PyTorch's implementations."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def has_fa4() -> bool:
    """Return whether FA4 is installed; older versions of flash-attn share its name."""
    return all(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn.cute"))


def fa4_ms(q: Tensor, k: Tensor, v: Tensor, rep_ms: float) -> float | str:
    """Return the time of dense FA4."""
    if not has_fa4():
        return "not installed"

    def measure() -> float:
        from flash_attn.cute import flash_attn_func

        rows = [x.transpose(1, 2) for x in (q, k, v)]
        return median_ms(lambda: flash_attn_func(*rows), rep_ms)

    return _or_failure(measure)


def fa4_blocks(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator, rep_ms: float) -> dict[str, float | str]:
    """Time FA4 with as many random blocks for every tile of queries; tokens that fill no block are left out."""
    if not has_fa4():
        return {"ms": "not installed"}
    block_q, block_k = FA4_BLOCKS[q.shape[3]]
    tokens = q.shape[2] // math.lcm(block_q, block_k) * math.lcm(block_q, block_k)
    q, k, v = (x[:, :, :tokens] for x in (q, k, v))
    rows, columns = tokens // block_q, tokens // block_k
    kept = round(FA4_DENSITY * columns)
    draws = torch.rand((1, q.shape[1], rows, columns), generator=generator, device=q.device)
    columns_kept = draws.topk(kept).indices.sort().values.int()
    counts = torch.full((1, q.shape[1], rows), kept, dtype=torch.int32, device=q.device)

    def measure() -> float:
        from flash_attn.cute import flash_attn_func
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        rows_of = [x.transpose(1, 2) for x in (q, k, v)]
        blocks = BlockSparseTensorsTorch(
            torch.zeros_like(counts), columns_kept, counts, columns_kept, block_size=(block_q, block_k)
        )
        return median_ms(lambda: flash_attn_func(*rows_of, block_sparse_tensors=blocks), rep_ms)

    ms = _or_failure(measure)
    result: dict[str, float | str] = {"density": kept / columns, "ms": ms}
    if not isinstance(ms, str):
        flop = 4 * q.shape[3] * q.shape[1] * tokens**2 * kept / columns
        result["tflops"] = flop / ms / 1e9
    return result


def _flex_attention() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def attempt(function: Callable[[], object], rep_ms: float) -> float | str:
    """Return the time of a call in ms, or the first line of what went wrong: the baseline is not ours to mend."""
    return _or_failure(lambda: median_ms(function, rep_ms))


def _or_failure(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Exception as error:
        return f"failed: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"


def flash_kmeans_ms(x: Tensor, clusters: int, iterations: int, rep_ms: float) -> float | str:
    """Return the time of flash-kmeans for the tokens of ``x`` [1, H, N, D], started from the first tokens."""
    if importlib.util.find_spec("flash_kmeans") is None:
        return "not installed"
    from flash_kmeans import batch_kmeans_Euclid

    tokens = x[0].contiguous()
    start = tokens[:, :clusters].contiguous()
    return attempt(
        lambda: batch_kmeans_Euclid(tokens, clusters, max_iters=iterations, tol=-1.0, init_centroids=start), rep_ms
    )


def flashinfer_ms(
    backend: str, q: Tensor, k: Tensor, v: Tensor, q_sizes: Tensor, k_sizes: Tensor, keep: Tensor, rep_ms: float
) -> float | str:
    """Return the time of FlashInfer's variable-block attention, planning left out, for one batch element."""
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    from flashinfer import VariableBlockSparseAttentionWrapper

    def plan_and_time() -> float:
        wrapper = VariableBlockSparseAttentionWrapper(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device), backend=backend
        )
        heads, dim = q.shape[1], q.shape[3]
        wrapper.plan(keep[0], q_sizes[0], k_sizes[0], heads, k.shape[1], dim, q_data_type=q.dtype)
        return median_ms(lambda: wrapper.run(q[0], k[0], v[0]), rep_ms)

    return _or_failure(plan_and_time)


if __name__ == "__main__":
    sys.exit(main())
