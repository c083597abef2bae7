"""Runs of kept keys, and tiles of queries."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.work_list import (
    COUNTS,
    PIECES,
    kept_keys,
    kept_runs_reference,
    max_runs,
    max_tiles,
    query_tiles_reference,
)

PROPERTY = settings(max_examples=60, deadline=None)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of ``kept_runs_reference``."""

    keep: torch.Tensor
    k_sizes: torch.Tensor

    def kept(self):
        return kept_runs_reference(self.keep, self.k_sizes)

    def rows(self):
        """Return (index of a row, its selection, the sizes of its key clusters) of every query cluster."""
        batch, heads, q_clusters, _ = self.keep.shape
        repeats = heads // self.k_sizes.shape[1]
        for b, h, i in itertools.product(range(batch), range(heads), range(q_clusters)):
            yield (b, h, i), self.keep[b, h, i].tolist(), self.k_sizes[b, h // repeats].tolist()

    def keys(self):
        """Return who attends to which key, one by one: bool [B, H, C_q, N_k]; keys that a head lacks are dropped."""
        result = torch.zeros(*self.keep.shape[:3], int(self.k_sizes.sum(-1).max()), dtype=torch.bool)
        for row, keep, sizes in self.rows():
            flags = [flag for flag, size in zip(keep, sizes) for _ in range(size)]
            result[row][: len(flags)] = torch.tensor(flags, dtype=torch.bool)
        return result


def stretches(flags):
    """Return (first, after the last) of every stretch of True."""
    edges, is_inside = [], False
    for index, flag in enumerate([*flags, False]):
        if flag != is_inside:
            edges.append(index)
        is_inside = flag
    return list(zip(edges[::2], edges[1::2]))


@st.composite
def selections(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_clusters, k_clusters = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 15, 40]))
    largest = draw(st.sampled_from([1, 20, 200]))
    k_sizes = torch.randint(0, largest + 1, (batch, groups, k_clusters), generator=generator).int()
    if draw(st.booleans()):
        k_sizes[torch.rand(k_sizes.shape, generator=generator) < 0.5] = 0
    shape = (batch, groups * repeats, q_clusters, k_clusters)
    keep = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
    return Case(keep, k_sizes)


@PROPERTY
@given(selections())
def test_runs_are_the_stretches_of_kept_keys_long_classes_first(case):
    kept, keys = case.kept(), case.keys()
    for row, _, _ in case.rows():
        expected = stretches(keys[row].tolist())
        # Sorting is stable: key order remains within a class.
        expected.sort(key=lambda run: sum(run[1] - run[0] < piece for piece in PIECES))
        number = int(kept.counts[row][0])
        assert [tuple(run) for run in kept.runs[row][:number].tolist()] == expected


@PROPERTY
@given(selections())
def test_counts_are_the_runs_and_the_full_pieces_that_fit_into_them(case):
    counts, keys = case.kept().counts, case.keys()
    assert counts.shape == (*case.keep.shape[:3], len(COUNTS))
    for row, _, _ in case.rows():
        lengths = [stop - start for start, stop in stretches(keys[row].tolist())]
        assert counts[row].tolist() == [len(lengths), *(sum(n // piece for n in lengths) for piece in PIECES)]


@PROPERTY
@given(selections())
def test_runs_with_a_full_piece_come_first_whatever_the_piece(case):
    kept = case.kept()
    lengths = kept.runs[..., 1] - kept.runs[..., 0]
    for piece in PIECES:
        is_long = (lengths >= piece).int()
        assert torch.equal(is_long.cummin(-1).values, is_long)


@PROPERTY
@given(selections())
def test_slots_left_over_are_zero(case):
    kept = case.kept()
    slot = torch.arange(kept.runs.shape[3])
    assert kept.runs[slot >= kept.counts[..., :1]].eq(0).all()
    assert (kept.runs[..., 1] > kept.runs[..., 0])[slot < kept.counts[..., :1]].all()


@PROPERTY
@given(selections())
def test_the_list_cannot_overflow(case):
    kept = case.kept()
    assert kept.runs.shape == (*case.keep.shape[:3], max_runs(case.keep.shape[3]), 2)
    assert (kept.counts[..., 0] <= max_runs(case.keep.shape[3])).all()


@pytest.mark.parametrize("k_clusters", [1, 2, 3, 15, 500])
def test_a_selection_can_fill_the_list(k_clusters):
    keep = (torch.arange(k_clusters) % 2 == 0).view(1, 1, 1, k_clusters)
    kept = kept_runs_reference(keep, torch.ones(1, 1, k_clusters).int())
    assert kept.counts[0, 0, 0, 0] == kept.runs.shape[3] == max_runs(k_clusters)


@PROPERTY
@given(selections())
def test_kept_keys_reads_the_runs_back(case):
    kept, keys = case.kept(), case.keys()
    assert torch.equal(kept_keys(kept.runs, kept.counts, keys.shape[3]), keys)


@PROPERTY
@given(selections(), st.integers(-(2**31), 2**31 - 1))
def test_kept_keys_does_not_read_slots_left_over(case, garbage):
    kept, keys = case.kept(), case.keys()
    is_run = (torch.arange(kept.runs.shape[3]) < kept.counts[..., :1]).unsqueeze(-1)
    runs = kept.runs.where(is_run, torch.tensor(garbage, dtype=torch.int32))
    assert torch.equal(kept_keys(runs, kept.counts, keys.shape[3]), keys)


@PROPERTY
@given(selections())
def test_whether_empty_clusters_are_kept_does_not_matter(case):
    kept = case.kept()
    empty = case.k_sizes.repeat_interleave(case.keep.shape[1] // case.k_sizes.shape[1], 1).unsqueeze(2) == 0
    for other in (case.keep | empty, case.keep & ~empty, case.keep ^ empty):
        again = kept_runs_reference(other, case.k_sizes)
        assert torch.equal(again.runs, kept.runs)
        assert torch.equal(again.counts, kept.counts)


def test_an_empty_cluster_does_not_break_a_run_and_a_dropped_one_does():
    keep = torch.tensor([True, False, True, False, True]).view(1, 1, 1, 5)
    kept = kept_runs_reference(keep, torch.tensor([[[3, 0, 4, 2, 20]]]).int())
    # 20 keys are a longer class than 7.
    assert kept.runs.flatten(0, 3).tolist() == [[9, 29], [0, 7], [0, 0]]
    assert kept.counts.flatten().tolist() == [2, 1, 0, 0]


@st.composite
def query_clusters(draw):
    """Return q_sizes that sum to the same number of tokens for every head, and the rows of a tile."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tokens, clusters = draw(st.sampled_from([1, 2, 63, 200])), draw(st.sampled_from([1, 3, 16]))
    used = draw(st.integers(1, clusters))
    labels = torch.randint(clusters - used, clusters, (2, 2, tokens), generator=generator)
    q_sizes = torch.nn.functional.one_hot(labels, clusters).sum(2).int()
    return q_sizes, tokens, draw(st.sampled_from([1, 16, 64]))


@PROPERTY
@given(query_clusters())
def test_every_row_lies_in_exactly_one_tile_of_its_cluster(case):
    q_sizes, tokens, block = case
    tiles = query_tiles_reference(q_sizes, tokens, block)
    for head_tiles, sizes in zip(tiles.flatten(0, 1).tolist(), q_sizes.flatten(0, 1).tolist()):
        clusters = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
        of_rows = [(row, cluster) for cluster, start, stop in head_tiles for row in range(start, stop)]
        assert of_rows == list(enumerate(clusters))


@PROPERTY
@given(query_clusters())
def test_only_the_last_tile_of_a_cluster_is_not_full(case):
    q_sizes, tokens, block = case
    tiles = query_tiles_reference(q_sizes, tokens, block)
    rows = tiles[..., 2] - tiles[..., 1]
    assert ((rows >= 0) & (rows <= block)).all()
    assert torch.equal((rows > 0).sum(-1), ((q_sizes + block - 1) // block).sum(-1))
    assert tiles[rows == 0].eq(0).all()


@PROPERTY
@given(query_clusters())
def test_there_are_never_more_tiles_than_room(case):
    q_sizes, tokens, block = case
    assert query_tiles_reference(q_sizes, tokens, block).shape == (2, 2, max_tiles(tokens, q_sizes.shape[2], block), 3)
    assert (((q_sizes + block - 1) // block).sum(-1) <= max_tiles(tokens, q_sizes.shape[2], block)).all()


@PROPERTY
@given(st.integers(1, 30), st.integers(0, 500), st.integers(1, 130))
def test_some_sizes_need_all_the_room_for_tiles(clusters, beyond, block):
    # One row in each cluster; the first takes the others.
    sizes = [1 + beyond, *[1] * (clusters - 1)]
    needed = sum(-(-size // block) for size in sizes)
    assert needed == max_tiles(sum(sizes), clusters, block)
