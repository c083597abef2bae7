"""``svg2::sort_labels`` in Triton: the reference's result, to the last element."""

import pytest
import torch
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.sort_labels import sort_labels_reference


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def sort(labels, clusters):
    from svg2_compile.kernels.sort_labels_triton import count_and_sort

    return count_and_sort(labels, clusters)


def random_labels(tokens, clusters, kind):
    generator = torch.Generator().manual_seed(tokens + clusters)
    labels = torch.randint(0, clusters, (2, tokens, 3), generator=generator, dtype=torch.int32).transpose(1, 2)
    if kind == "giant":
        labels = torch.full_like(labels, clusters - 1)
    elif kind == "singletons":
        labels = torch.rand(labels.shape, generator=generator).argsort(-1).int() % clusters
    elif kind == "half empty":
        labels = labels // 2 * 2
    return labels.to(DEVICE)


@runs_kernels
@pytest.mark.parametrize("kind", ["uneven", "half empty", "giant", "singletons"])
@pytest.mark.parametrize(
    ("tokens", "clusters"), [(1, 1), (15, 5), (63, 16), (64, 5), (65, 100), (257, 16), (1000, 100)]
)
def test_order_and_sizes_equal_the_reference(tokens, clusters, kind):
    labels = random_labels(tokens, clusters, kind)
    order, sizes = sort_labels_reference(labels, clusters)
    result = sort(labels, clusters)
    assert torch.equal(result.q_order, order)
    assert torch.equal(result.q_sizes, sizes)
    starts = result.starts.view(2, 3, clusters + 1)
    assert (starts[..., 0] == 0).all()
    assert torch.equal(starts[..., 1:], sizes.cumsum(-1).int())


@runs_kernels
def test_as_many_clusters_as_the_tiles_hold():
    labels = torch.randint(0, 1024, (1, 1, 2500), dtype=torch.int32).to(DEVICE)
    result = sort(labels, 1024)
    order, sizes = sort_labels_reference(labels, 1024)
    assert torch.equal(result.q_order, order)
    assert torch.equal(result.q_sizes, sizes)


@runs_kernels
def test_no_tokens():
    from svg2_compile.kernels.sort_labels_triton import sort_labels_triton

    order, sizes = sort_labels_triton(torch.empty((1, 2, 0), dtype=torch.int32, device=DEVICE), 3)
    assert order.shape == (1, 2, 0)
    assert (sizes == 0).all()


@runs_kernels
def test_strided_labels_and_the_same_bits_twice():
    from svg2_compile.kernels.sort_labels_triton import sort_labels_triton

    labels = random_labels(257, 16, "uneven")
    assert not labels.is_contiguous()
    for first, second in zip(sort_labels_triton(labels, 16), sort_labels_triton(labels, 16), strict=True):
        assert first.is_contiguous()
        assert torch.equal(first, second)
    assert torch.equal(sort_labels_triton(labels, 16)[0], sort_labels_reference(labels, 16)[0])


@runs_kernels
def test_two_sides_sort_what_each_would_alone():
    q_labels, k_labels = (random_labels(tokens, clusters, "uneven") for tokens, clusters in ((257, 16), (1000, 5)))
    result = sort_both(q_labels, k_labels[:, :2], 16, 5)
    for order, sizes, labels, clusters in (
        (result.q_order, result.q_sizes, q_labels, 16),
        (result.k_order, result.k_sizes, k_labels[:, :2], 5),
    ):
        expected_order, expected_sizes = sort_labels_reference(labels, clusters)
        assert torch.equal(order, expected_order)
        assert torch.equal(sizes, expected_sizes)


@runs_kernels
@pytest.mark.parametrize("needed", [(1, 3), (3, 1), (2, 2)])
def test_a_side_that_does_not_need_an_iteration_is_left_alone(needed):
    labels = random_labels(257, 16, "uneven")
    iterations = torch.tensor(needed, dtype=torch.int32, device=DEVICE)
    result = sort_both(labels, labels, 16, 16, needed=iterations, iteration=2)
    for order, sizes, count in zip((result.q_order, result.k_order), (result.q_sizes, result.k_sizes), needed):
        assert count > 2 or ((order == -1).all() and (sizes == -1).all())
        assert count <= 2 or torch.equal(order, sort_labels_reference(labels, 16)[0])


def sort_both(q_labels, k_labels, q_clusters, k_clusters, needed=None, iteration=0):
    """Sort two sides in shared launches, from the counts that each has alone."""
    from svg2_compile.kernels.counting_sort import COUNT_N, SortedLabels, launch_sort, table_columns
    from svg2_compile.kernels.sides import Sides

    def counted(labels, clusters):
        columns = table_columns(clusters)
        blocks = torch.nn.functional.pad(labels.long(), (0, -labels.shape[2] % COUNT_N), value=columns)
        members = torch.nn.functional.one_hot(blocks.unflatten(-1, (-1, COUNT_N)), columns + 1)
        return members.sum(-2)[..., :columns].int().flatten()

    (batch, q_heads, q_tokens), (_, k_heads, k_tokens) = q_labels.shape, k_labels.shape
    sides = Sides(batch, q_heads, k_heads, q_tokens, k_tokens, q_clusters, k_clusters)
    counts = torch.cat([counted(q_labels, q_clusters), counted(k_labels, k_clusters)])
    result = SortedLabels.empty(sides, counts)
    for tensor in (result.q_order, result.k_order, result.q_sizes, result.k_sizes, result.starts):
        tensor.fill_(-1)
    gate = None if needed is None else torch.zeros_like(needed)
    launches = launch_sort(torch.cat([q_labels.flatten(), k_labels.flatten()]), result, sides, gate)
    if gate is not None:
        gate.copy_(needed)
        for launch in launches:
            launch.again("iteration", iteration)
    return result
