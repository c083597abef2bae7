"""``svg2::cluster_tokens_`` in Triton: the kernels of k-means, with queries and keys in the same launches.

The labels are sorted inside anyway, and the last sum of the keys has their rows in registers: it writes them, and the
values beside them, to their places. Nothing is sorted twice, and the keys are not read once more.
"""

from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.cluster_sums import sum_variant
from svg2_compile.kernels.clustering import Clustering, Copies, Side
from svg2_compile.kernels.token_variants import NAMES, ROWS


def cluster_tokens_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_centroids: Tensor,
    k_centroids: Tensor,
    q_calls: Tensor,
    k_calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute ``cluster_tokens_reference`` within the limits of ``kmeans_triton``, and rounded as there."""
    sides = Side.of(q, q_centroids, q_calls), Side.of(k, k_centroids, k_calls)
    copies = Copies.of(k, v)
    clustering = Clustering.prepare(*sides, copies)
    clustering.launch(iters_init, iters_step, seed)
    sort = clustering.sort
    return sort.q_order, sort.q_sizes, sort.k_sizes, copies.k_clustered, copies.v_clustered


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the sum that writes keys and values; the other kernels are those of k-means."""
    return [
        sum_variant(f"sum_and_permute_kernel_{NAMES[dtype]}_d{dim}", dtype, dim, {}, capability) for dtype, dim in ROWS
    ]
