"""Other people's kernels, timed beside ours: dense attention, flash-kmeans, FlashInfer's variable blocks."""

import importlib.util
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

WORKSPACE_BYTES = 256 << 20  # FlashInfer's own scratch memory


def median_ms(function: Callable[[], object], rep_ms: float) -> float:
    """Return the median time of a call, of at least three calls and about ``rep_ms``."""
    from triton.testing import do_bench

    function()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    once_ms = max(start.elapsed_time(stop), 1e-3)
    if once_ms * 3 > rep_ms:
        return statistics.median([once_ms, *(time_once_ms(function) for _ in range(2))])
    return float(do_bench(function, warmup=min(10.0, rep_ms), rep=rep_ms, return_mode="median"))


def time_once_ms(function: Callable[[], object]) -> float:
    """Return the time of one call."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def dense_ms(q: Tensor, k: Tensor, v: Tensor, rep_ms: float) -> dict[str, float | str]:
    """Return the time of dense attention by each implementation, or why it has none."""
    flex = torch.compile(_flex_attention(), dynamic=False)

    def sdpa(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return call

    return {
        "cuDNN": attempt(sdpa(SDPBackend.CUDNN_ATTENTION), rep_ms),
        "flash": attempt(sdpa(SDPBackend.FLASH_ATTENTION), rep_ms),
        "FlexAttention": attempt(lambda: flex(q, k, v), rep_ms),
    }


def _flex_attention() -> Callable[..., object]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


def attempt(function: Callable[[], object], rep_ms: float) -> float | str:
    """Return the time of a call in ms, or the first line of what went wrong: the baseline is not ours to mend."""
    try:
        return median_ms(function, rep_ms)
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
    q: Tensor, k: Tensor, v: Tensor, q_sizes: Tensor, k_sizes: Tensor, keep: Tensor, rep_ms: float
) -> float | str:
    """Return the time of FlashInfer's variable-block attention, planning left out, for one batch element."""
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    from flashinfer import VariableBlockSparseAttentionWrapper

    def plan_and_time() -> float:
        wrapper = VariableBlockSparseAttentionWrapper(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device), backend="auto"
        )
        heads, dim = q.shape[1], q.shape[3]
        wrapper.plan(keep[0], q_sizes[0], k_sizes[0], heads, k.shape[1], dim, q_data_type=q.dtype)
        return median_ms(lambda: wrapper.run(q[0], k[0], v[0]), rep_ms)

    try:
        return plan_and_time()
    except Exception as error:
        return f"failed: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}"
