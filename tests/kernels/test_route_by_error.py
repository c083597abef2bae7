"""``svg2::select_blocks`` with errors: as many keys as the masses would keep, where means would be most wrong."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import selection_cases

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.select_blocks import block_logits
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.work_list import kept_keys

PROPERTY = settings(max_examples=60, deadline=None)


@dataclasses.dataclass(frozen=True)
class Routed:
    """A selection, and errors that choose."""

    case: object
    errors: torch.Tensor

    def select(self, **changes):
        """Return who attends to which key, and the statistics."""
        *arguments, statistics = dataclasses.replace(self.case, **changes).arguments()
        runs, counts = torch.ops.svg2.select_blocks(*arguments, statistics, None, self.errors)
        return kept_keys(runs, counts, 100), statistics

    def keep(self, **changes):
        """Return which clusters with keys are kept."""
        keys = torch.nn.functional.pad(self.select(**changes)[0], (0, 1))
        sizes = self.sizes().expand(-1, -1, keys.shape[2], -1).long()
        return keys.gather(-1, sizes.cumsum(-1) - sizes) & (sizes > 0)

    def sizes(self):
        return self.case.for_every_query_head(self.case.k_sizes).unsqueeze(2)

    def per_key(self):
        return (self.errors - self.sizes().clamp(min=1).log()).masked_fill(self.sizes() == 0, -math.inf)

    def guaranteed(self):
        case = self.case
        logits = block_logits(case.q_centroids, case.k_centroids, case.k_sizes, case.scale)
        count = max(1, math.floor(case.min_keep_ratio * logits.shape[3] / 2))
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :count], True)
        return kept & (self.sizes() > 0)


@st.composite
def routed_cases(draw):
    case = draw(selection_cases())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    errors = 10 * torch.randn(*case.q_sizes.shape, case.k_sizes.shape[2], generator=generator)
    return Routed(case, errors)


@PROPERTY
@given(routed_cases())
def test_it_keeps_as_many_keys_as_the_masses_would_and_at_most_one_cluster_more(case):
    keep, budget = case.keep(), (case.case.keep() * case.sizes()).sum(-1)
    kept = (keep * case.sizes()).sum(-1)
    assert (kept >= budget).all()
    # whatever was taken last, there was room before it
    last = case.per_key().masked_fill(case.guaranteed(), math.inf).masked_fill(~keep, math.inf).argmin(-1, keepdim=True)
    of_last = case.sizes().expand_as(keep).gather(-1, last).squeeze(-1)
    only_guaranteed = (keep == case.guaranteed()).all(-1)
    assert ((kept - of_last < budget) | only_guaranteed).all()


@PROPERTY
@given(routed_cases())
def test_the_likeliest_are_kept_in_any_case_and_of_the_others_the_worst(case):
    keep, guaranteed = case.keep(), case.guaranteed()
    assert (keep | ~guaranteed).all()
    per_key = case.per_key()
    least_kept = per_key.masked_fill(~keep | guaranteed, math.inf).amin(-1)
    most_dropped = per_key.masked_fill(keep, -math.inf).amax(-1)
    assert (least_kept >= most_dropped).all()


@PROPERTY
@given(routed_cases())
def test_errors_per_key_in_the_order_of_the_masses_keep_what_the_masses_keep(case):
    plain = case.case
    logits = block_logits(plain.q_centroids, plain.k_centroids, plain.k_sizes, plain.scale)
    ranks = logits.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    alike = dataclasses.replace(case, errors=case.sizes().clamp(min=1).log() - ranks.float())
    assert torch.equal(alike.keep(), plain.keep() & (case.sizes() > 0))


@PROPERTY
@given(routed_cases())
def test_everything_is_kept_where_masses_keep_everything(case):
    assert torch.equal(case.keep(top_p=1.0), (case.sizes() > 0).expand_as(case.errors))


@PROPERTY
@given(routed_cases())
def test_statistics_are_those_of_what_is_kept(case):
    keys, statistics = case.select()
    density, mass = (statistics[..., STATISTICS.index(name)].sum(-1) for name in ("density_sum", "kept_mass_sum"))
    share = case.case.q_sizes / case.case.q_sizes.sum(-1, keepdim=True)
    torch.testing.assert_close(density, (share * keys.sum(-1) / 100).sum(-1), rtol=1e-5, atol=1e-6)
    of_keep = (case.case.probability() * case.keep()).sum(-1)
    torch.testing.assert_close(mass.double(), (share * of_keep).sum(-1), rtol=0, atol=10 * case.case.tolerance())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_still_keeps_keys_within_bounds(value):
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4)
    q_sizes, k_sizes = torch.full((1, 1, 2), 3).int(), torch.tensor([[[2, 0, 3, 1, 4, 5]]]).int()
    errors = torch.full((1, 1, 2, 6), value)
    statistics = torch.zeros(1, 1, 2, len(STATISTICS))
    runs, counts = torch.ops.svg2.select_blocks(q, k, q_sizes, k_sizes, 1.0, 0.5, 0.0, statistics, None, errors)
    kept = kept_keys(runs, counts, 15).sum(-1)
    assert (kept >= 8).all() and (kept < 15).all()


@pytest.mark.parametrize(
    ("errors", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 5), ValueError, r"errors must have shape \(1, 1, 2, 6\), got \(1, 1, 2, 5\)"),
        (torch.zeros(1, 1, 2, 6).double(), TypeError, "errors must be torch.float32, got torch.float64"),
    ],
)
def test_bad_errors_are_named(errors, error, message):
    q, k, sizes = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 6, 4), torch.ones(1, 1, 6).int()
    statistics = torch.zeros(1, 1, 2, len(STATISTICS))
    with pytest.raises(error, match=message):
        torch.ops.svg2.select_blocks(q, k, sizes[..., :2], sizes, 1.0, 0.5, 0.0, statistics, None, errors)


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, count, 4, generator=generator) for heads, count in ((4, 3), (2, 7)))
    q_sizes, k_sizes = torch.full((2, 4, 3), 3).int(), torch.full((2, 2, 7), 5).int()
    errors, statistics = torch.randn(2, 4, 3, 7, generator=generator), torch.zeros(2, 4, 3, len(STATISTICS))
    torch.library.opcheck(
        torch.ops.svg2.select_blocks.default, (q, k, q_sizes, k_sizes, 0.5, 0.6, 0.1, statistics, None, errors)
    )
