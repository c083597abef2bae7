"""Every transformer class of the installed diffusers: sparse where it is long, dense elsewhere with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.cases import CASES
from conformance.examine import ModelCase, Verdict, examine, transformer_classes
from conformance.table import NOT_COVERED, REASONS, page, row

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore")
def test_a_model_is_sparse_where_it_is_long_and_dense_elsewhere_with_a_reason(case):
    verdict = examine(case)
    assert_full_selection_equals_dense_to_rounding(verdict)
    assert_block_by_block_as_much_is_sparse(case, verdict)
    assert_long_attentions_are_sparse_but_for_the_declared_ones(case, verdict)
    assert_the_rest_has_reasons_that_the_page_explains(verdict)
    if verdict.sparse.sparse_sites:
        assert_less_than_everything_is_different_but_close(verdict)
    else:
        assert case.note or case.dense
    assert verdict.fullgraph == (case.ask_fullgraph and not case.breaks)
    assert row(case, verdict) in PAGE.read_text(encoding="utf-8").splitlines(), (
        f"run python -P tests/cases/conformance/table.py {PAGE}"
    )


def assert_full_selection_equals_dense_to_rounding(verdict: Verdict) -> None:
    """Both are fp32 evaluations of ``exact`` (fp64): the sparse one may be off by twice what the dense one is."""
    exact = verdict.exact
    step = torch.finfo(torch.float32).eps * exact.abs().max()
    allowed = 2 * (verdict.dense_output.double() - exact).abs().max() + step
    for output in (verdict.full_output, verdict.by_block_output):
        assert (output.double() - exact).abs().max() <= 2 * allowed


def assert_long_attentions_are_sparse_but_for_the_declared_ones(case: ModelCase, verdict: Verdict) -> None:
    declared = case.unseen + sum(case.dense.values())
    assert len(verdict.sparse.sparse_sites) + declared == verdict.long_attentions
    assert all(verdict.left_by_reason[reason] >= count for reason, count in case.dense.items())
    for report in (verdict.full, verdict.sparse):
        assert all(site.sparse_calls == 1 for site in report.sparse_sites)


def assert_block_by_block_as_much_is_sparse(case: ModelCase, verdict: Verdict) -> None:
    if verdict.sparse_by_block is not None:
        dense = sum(case.dense.values()) if case.dense_by_block is None else case.dense_by_block
        declared = case.unseen_by_block + dense
        assert verdict.sparse_by_block + declared == verdict.long_attentions


def assert_the_rest_has_reasons_that_the_page_explains(verdict: Verdict) -> None:
    assert set(verdict.left_by_reason) <= set(REASONS)
    assert all(hint or reason in ("cross-attention", "short") for reason, hint in verdict.left)


def assert_less_than_everything_is_different_but_close(verdict: Verdict) -> None:
    """Different: by far more than rounding. Close: nearer to the dense output than half of what the attentions add."""
    difference = (verdict.sparse_output - verdict.dense_output).norm()
    assert difference > 10 * (verdict.full_output - verdict.dense_output).norm()
    assert difference < 0.5 * (verdict.removed_output - verdict.dense_output).norm()
    assert verdict.sparse.density < 1 and verdict.sparse.kept_mass >= 0.9


def test_every_class_has_a_case_or_a_reason_for_none():
    covered = {case.name for case in CASES}
    assert not covered & set(NOT_COVERED)
    assert covered | set(NOT_COVERED) == set(transformer_classes())


def test_the_page_has_the_lines_of_the_cases_and_no_others():
    """Each line is compared by its case; this is about what no case compares."""
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 8]
    names = [f"{case.name}, {case.variant}" if case.variant else case.name for case in CASES]
    assert [line[2:].split(" | ")[0] for line in lines if not line.startswith("| class")] == names
    frame = page({}, len(transformer_classes())).split("\n\n")
    assert all(part in text for part in frame[1:])
