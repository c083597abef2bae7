"""``svg2::kmeans_`` in Triton: a clustering of one side, whose labels are wanted."""

from torch import Tensor

from svg2_compile.kernels.ahead_of_time import AotVariant
from svg2_compile.kernels.cluster_sums import sum_variant
from svg2_compile.kernels.clustering import Clustering, Side
from svg2_compile.kernels.token_variants import NAMES, ROWS


def kmeans_triton(
    x: Tensor,
    centroids: Tensor,
    calls: Tensor,
    iters_init: int,
    iters_step: int,
    seed: int,
    metric: Tensor | None = None,
) -> Tensor:
    """Compute ``kmeans_reference`` for rows of at most ``MAX_HEAD_DIM`` and at most ``MAX_CLUSTERS`` clusters.

    For fp16 and bf16 tokens the assignment rounds the centroids to the dtype of the tokens, products and norms alike:
    a label is the exact nearest of the rounded centroids; where ``assign_gluon`` runs, on Hopper, any of those whose
    scores x . c - ||c||^2 / 2 differ by less than a part in 2^18. The means, kept in fp32, are those of the returned
    labels. With a metric, what is rounded is M c / sqrt(c . M c).
    Rows whose elements are not neighbours are copied.
    """
    clustering = Clustering.prepare(Side.of(x, centroids, calls), metric=metric)
    clustering.launch(iters_init, iters_step, seed)
    return clustering.labels.view(x.shape[:3])


def aot_variants(capability: int) -> list[AotVariant]:
    """Return the sum alone; the other kernels have modules of their own."""
    absent: dict[str, object] = {"k_clustered_ptr": None, "v_clustered_ptr": None}
    return [sum_variant(f"sum_kernel_{NAMES[dtype]}_d{dim}", dtype, dim, absent, capability) for dtype, dim in ROWS]
