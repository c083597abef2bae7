"""``svg2::sort_labels`` and the two permutations: together they are a lossless change of order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

PROPERTY = settings(max_examples=40, deadline=None)


@st.composite
def label_cases(draw):
    """Labels int32 [B, H, N] and the number of clusters, some of them empty."""
    clusters = draw(st.sampled_from([1, 2, 7, 64]))
    tokens = draw(st.sampled_from([1, 15, 63, 64, 65, 1000]))
    used = draw(st.integers(1, clusters))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), tokens)
    return torch.randint(0, used, shape, generator=generator, dtype=torch.int32), clusters


@PROPERTY
@given(label_cases())
def test_order_is_a_stable_sort_by_label(case):
    labels, clusters = case
    order, sizes = torch.ops.svg2.sort_labels(labels, clusters)
    expected = [[sorted(range(len(row)), key=row.__getitem__) for row in head] for head in labels.tolist()]
    assert order.tolist() == expected
    assert order.dtype == sizes.dtype == torch.int32


@PROPERTY
@given(label_cases())
def test_sizes_count_the_tokens_of_every_cluster(case):
    labels, clusters = case
    _, sizes = torch.ops.svg2.sort_labels(labels, clusters)
    assert sizes.tolist() == [[[row.count(c) for c in range(clusters)] for row in head] for head in labels.tolist()]


def test_strided_labels_are_sorted_like_contiguous_ones():
    labels = torch.randint(0, 5, (2, 65, 3), dtype=torch.int32).transpose(1, 2)
    for strided, contiguous in zip(
        torch.ops.svg2.sort_labels(labels, 5), torch.ops.svg2.sort_labels(labels.contiguous(), 5), strict=True
    ):
        assert torch.equal(strided, contiguous)
        assert strided.is_contiguous()


@pytest.mark.parametrize(
    ("labels", "clusters", "error", "message"),
    [
        (torch.zeros(1, 1, 4, dtype=torch.int64), 2, TypeError, "labels must be torch.int32, got torch.int64"),
        (torch.zeros(1, 4, dtype=torch.int32), 2, ValueError, "labels must have 3 axes"),
        (torch.zeros(1, 1, 4, dtype=torch.int32), 0, ValueError, "clusters must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(labels, clusters, error, message):
    with pytest.raises(error, match=message):
        torch.ops.svg2.sort_labels(labels, clusters)


def test_opcheck():
    labels = torch.randint(0, 5, (2, 65, 3), dtype=torch.int32).transpose(1, 2)
    torch.library.opcheck(torch.ops.svg2.sort_labels.default, (labels, 5))


def test_compiled_equals_eager():
    labels = torch.randint(0, 5, (2, 3, 65), dtype=torch.int32)
    compiled = torch.compile(lambda x: torch.ops.svg2.sort_labels(x, 5), fullgraph=True)
    for got, expected in zip(compiled(labels), torch.ops.svg2.sort_labels(labels, 5), strict=True):
        assert torch.equal(got, expected)
