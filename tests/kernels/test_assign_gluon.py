"""The k-means assignment in Gluon: why it is not taken, and on a Hopper GPU, nearest centroids."""

import clustering_cases
import pytest
import torch

from svg2_compile.kernels.why_not import why_not_boxes, why_not_gluon_assign

TOKENS = torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16).transpose(1, 2)
CUDA = torch.device("cuda")
REASON = why_not_gluon_assign(CUDA, torch.bfloat16, dim=64) if torch.cuda.is_available() else "no GPU"
runs_gluon = pytest.mark.skipif(REASON is not None, reason=f"not run by Gluon: {REASON}")
DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.bfloat16, 64, "made for compute capability 9.0"),
        (torch.float32, 64, "float32 has no Gluon kernel"),
        (torch.float16, 32, "head dimension: 64 or 128, got 32"),
    ],
)
def test_why_gluon_does_not_assign(dtype, dim, reason):
    assert why_not_gluon_assign(torch.device("cpu"), dtype, dim=dim) == reason


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (TOKENS, None),
        (TOKENS.contiguous(), None),
        (TOKENS[:, :1, :1].expand(1, 1, 1, 64), None),
        (TOKENS[:, :, :0], "there are no tokens"),
        (torch.zeros(1, 2, 5, 65, dtype=torch.bfloat16)[..., :64], "rows must begin at different multiples of 16"),
        (torch.zeros(1, 2, 6 * 64, dtype=torch.bfloat16)[..., 1:321].unflatten(2, (5, 64)), "rows must begin"),
        (TOKENS[:, :1].expand(1, 2, 5, 64), "rows must begin at different multiples of 16"),
    ],
)
def test_why_rows_cannot_be_read_box_by_box(x, reason):
    answer = why_not_boxes(x)
    assert answer is None if reason is None else reason in answer


@runs_gluon
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 511, 512, 513, 1000])
def test_labels_of_any_number_of_tokens_are_nearest(tokens, dim, dtype):
    clustering_cases.check_labels_and_means(clustering_cases.random_tokens(tokens, dim, dtype, 2, 3), tokens // 4 + 1)


@runs_gluon
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("clusters", [1, 64, 65, 128, 500, 513, 1024])
def test_labels_among_any_number_of_clusters_are_nearest(clusters, dim):
    # More blocks of tokens than processors, so that a program goes from head to head.
    x = clustering_cases.random_tokens(20_000, dim, torch.bfloat16, 2, 5)
    clustering_cases.check_labels_and_means(x, clusters)


@runs_gluon
@pytest.mark.gpu
@pytest.mark.parametrize(("q_clusters", "k_clusters"), [(100, 500), (1000, 100), (7, 1000)])
def test_both_sides_of_one_launch_are_labelled_among_their_own_centroids(q_clusters, k_clusters):
    from svg2_compile.kernels.cluster_tokens_triton import cluster_tokens_triton

    q, k = (clustering_cases.random_tokens(n, 128, torch.bfloat16, 1, heads) for n, heads in ((7000, 6), (20_000, 3)))
    state = [x[:, :, :count].float().contiguous() for x, count in ((q, q_clusters), (k, k_clusters))]
    before = [each.clone() for each in state]
    calls = [torch.ones(1, dtype=torch.int32, device="cuda") for _ in "qk"]
    q_order, q_sizes, k_sizes, k_clustered, _ = cluster_tokens_triton(q, k, k, *state, *calls, 1, 1, 0)
    labels = torch.arange(q_clusters, device="cuda").expand(1, 6, -1)
    labels = torch.stack([row.repeat_interleave(size) for row, size in zip(labels[0], q_sizes[0])])[None]
    labels = torch.empty_like(labels).scatter_(2, q_order.long(), labels)
    clustering_cases.assert_labels_are_nearest(q, labels, before[0])
    sorted_labels = torch.stack(
        [torch.arange(k_clusters, device="cuda").repeat_interleave(size) for size in k_sizes[0]]
    )[None]
    clustering_cases.assert_labels_are_nearest(k_clustered, sorted_labels, before[1])


@runs_gluon
@pytest.mark.gpu
def test_of_equal_centroids_the_lowest_is_taken_and_not_a_number_gets_a_label():
    from svg2_compile.kernels.kmeans_triton import kmeans_triton

    x = torch.ones(1, 1, 200, 64, dtype=torch.bfloat16, device="cuda")
    x[:, :, 150:] = float("nan")
    centroids = torch.full((1, 1, 300, 64), 5.0, device="cuda")
    centroids[:, :, [3, 40, 67, 299]] = 1.0
    labels = kmeans_triton(x, centroids, torch.ones(1, dtype=torch.int32, device="cuda"), 1, 1, 0)
    assert (labels[0, 0, :150] == 3).all()
    assert (labels[0, 0, 150:] == 0).all()
