"""Plausible one-line bugs of clustering, and of the state that it starts from."""

from mutant import Mutant

CLUSTERING = "kernels/kmeans.py"

KMEANS = ("tests/kernels/test_kmeans.py",)
SORT = ("tests/kernels/test_sort_labels.py",)
KNOWN = ("tests/kernels/test_known_state.py",)
CLUSTER_TRITON = ("tests/kernels/test_cluster_tokens_triton.py",)

MUTANTS = (
    Mutant(
        "farthest centroid instead of nearest",
        CLUSTERING,
        "tile, directions.T, beta=-1).argmax(-1)",
        "tile, directions.T, beta=-1).argmin(-1)",
        KMEANS,
    ),
    Mutant(
        "half of the squared norm forgotten",
        CLUSTERING,
        "return centroids, centroids.square().sum(-1) / 2",
        "return centroids, torch.zeros_like(centroids[:, 0])",
        KMEANS,
    ),
    Mutant(
        "whole squared norm instead of half",
        CLUSTERING,
        "return centroids, centroids.square().sum(-1) / 2",
        "return centroids, centroids.square().sum(-1)",
        KMEANS,
    ),
    Mutant(
        "the length of a centroid in the metric forgotten",
        CLUSTERING,
        "directions / squares.clamp(min=0).sqrt()",
        "directions",
        KMEANS,
    ),
    Mutant(
        "half of the squared norm subtracted from a cosine",
        CLUSTERING,
        "squares.new_zeros(len(centroids))",
        "centroids.square().sum(-1) / 2",
        KMEANS,
    ),
    Mutant(
        "a metric of the first head for all",
        CLUSTERING,
        "None if metric is None else metric[b, h]",
        "None if metric is None else metric[0, 0]",
        KMEANS,
    ),
    Mutant(
        "query heads dealt to key heads in turns for the metric",
        "kernels/gram.py",
        "rows = centroids.reshape(batch, k_heads, -1, dim)",
        "rows = centroids.unflatten(1, (-1, k_heads)).transpose(1, 2).reshape(batch, k_heads, -1, dim)",
        ("tests/kernels/test_gram.py",),
    ),
    Mutant(
        "a metric that autocast rounds",
        "kernels/gram.py",
        "enabled=False",
        "enabled=torch.is_autocast_enabled(centroids.device.type)",
        ("tests/kernels/test_gram.py",),
    ),
    Mutant(
        "the kernel forgets the length of a centroid in the metric",
        "kernels/centroids_triton.py",
        "tl.sqrt_rn(tl.where(squares > 0, squares, 1.0))",
        "tl.where(squares > 0, 1.0, 1.0)",
        ("tests/kernels/test_kmeans_triton.py",),
    ),
    Mutant(
        "the metric is not told to a later iteration",
        "kernels/clustering.py",
        "                self._measure()\n",
        "                if iteration == 0:\n                    self._measure()\n",
        ("tests/kernels/test_kmeans_triton.py",),
    ),
    Mutant(
        "a product of the metric that is wider than a row",
        "kernels/centroids_triton.py",
        "return min(MOST_METRIC_COLUMNS, block_d)",
        "return MOST_METRIC_COLUMNS",
        ("tests/kernels/test_kmeans_triton.py",),
    ),
    Mutant(
        "empty cluster reset to zero",
        CLUSTERING,
        "sums / sizes.clamp(min=1), centroids)",
        "sums / sizes.clamp(min=1), torch.zeros_like(centroids))",
        KMEANS,
    ),
    Mutant("calls not counted", CLUSTERING, "calls.add_(1)", "calls.add_(0)", KMEANS),
    Mutant(
        "iteration counts of first and later calls swapped",
        CLUSTERING,
        "range(iters_step if starts is None else iters_init)",
        "range(iters_init if starts is None else iters_step)",
        KMEANS,
    ),
    Mutant(
        "chain goes to the farthest centroid",
        CLUSTERING,
        'masked_fill(~is_left, float("inf")).argmin()',
        'masked_fill(~is_left, float("-inf")).argmax()',
        KMEANS,
    ),
    Mutant(
        "chain applied on later calls too",
        CLUSTERING,
        "if starts is not None and remaining == 0",
        "if remaining == 0",
        KMEANS,
    ),
    Mutant(
        "chain visits centroids again", CLUSTERING, "is_left[order[-1]] = False", "is_left[order[-1]] = True", KMEANS
    ),
    Mutant(
        "chain after the first iteration", CLUSTERING, "and remaining == 0", "and remaining == iters_init - 1", KMEANS
    ),
    Mutant("seed ignored", CLUSTERING, "_mix32(seed * 0x9E3779B9 % 2**32 + head)", "_mix32(head)", KMEANS),
    Mutant(
        "order of tokens within a cluster reversed",
        "kernels/sort_labels.py",
        "order = labels.sort(dim=-1, stable=True).indices.int()",
        "order = (labels.shape[2] - 1 - labels.flip(-1).sort(dim=-1, stable=True).indices).int()",
        SORT,
    ),
    Mutant(
        "inverse order returned",
        "kernels/sort_labels.py",
        "labels.sort(dim=-1, stable=True).indices.int()",
        "labels.sort(dim=-1, stable=True).indices.argsort(-1).int()",
        SORT,
    ),
    Mutant("counters known while a CUDA graph records", "kernels/known_state.py", " and not is_capturing()", "", KNOWN),
    Mutant("one known counter is enough", "kernels/known_state.py", "and all(", "and any(", KNOWN),
    Mutant("counters known for ever", "kernels/known_state.py", "_clustered.reset(token)", "pass", KNOWN),
    Mutant(
        "all iterations launched for known state",
        "kernels/clustering.py",
        "iterations = iters_step if is_later else",
        "iterations = iters_init if is_later else",
        CLUSTER_TRITON,
    ),
    Mutant(
        "order launched for known state",
        "kernels/clustering.py",
        "if iteration == iters_init - 1 and not is_later:",
        "if iteration == iters_init - 1:",
        CLUSTER_TRITON,
    ),
)
