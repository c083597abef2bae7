"""``svg2::measure_recall``: the share of the softmax that the kept keys hold, on some rows, exactly."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels import measure_recall as recall_module
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_runs_reference

PROPERTY = settings(max_examples=60, deadline=None)
SCALE = 0.3
EVERY_ROW = 10**6


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens in token order and a selection; the arguments of the op follow from them."""

    q: torch.Tensor
    k: torch.Tensor
    q_labels: torch.Tensor
    k_labels: torch.Tensor
    """The cluster of each key; ``k_clusters`` for a hidden one."""
    keep: torch.Tensor
    context_k: torch.Tensor | None
    context_mask: torch.Tensor | None

    def arguments(self, calls=1, rows=EVERY_ROW, interval=1, seed=0):
        """Return the arguments of the op."""
        q_clusters, k_clusters = self.keep.shape[2:]
        q_order, q_sizes = sort_labels_reference(self.q_labels, q_clusters)
        k_order, k_sizes = sort_labels_reference(self.k_labels, k_clusters + 1)
        k_sizes = k_sizes[..., :k_clusters].contiguous()
        k = self.k.gather(2, k_order.long().unsqueeze(-1).expand_as(self.k))
        kept = kept_runs_reference(self.keep, k_sizes)
        counter = torch.tensor([calls], dtype=torch.int32)
        selection = (q_order, q_sizes, k_sizes, kept.runs, kept.counts)
        return (
            self.q,
            k,
            *selection,
            self.context_k,
            self.context_mask,
            counter,
            SCALE,
            rows,
            interval,
            seed,
        )

    def measure(self, **numbers):
        """Return what the op finds: calls and recall [B, H]."""
        return torch.ops.svg2.measure_recall(*self.arguments(**numbers)).unbind(-1)

    def exact(self):
        """Return the recall of every row in fp64 [B, H, N], from the dense matrix of attention weights."""
        repeats = self.q.shape[1] // self.k.shape[1]
        keys, k_labels = self.k, self.k_labels
        context = 0 if self.context_k is None else self.context_k.shape[2]
        if self.context_k is not None:
            keys = torch.cat((keys, self.context_k), 2)
        scores = self.q.double() @ keys.double().repeat_interleave(repeats, 1).mT * SCALE
        k_clusters = self.keep.shape[3]
        labels = k_labels.repeat_interleave(repeats, 1)
        visible = torch.cat((labels < k_clusters, torch.ones(*labels.shape[:2], context).bool()), -1)
        if self.context_mask is not None:
            visible[..., labels.shape[2] :] &= self.context_mask[:, :, 0]
        keep = torch.nn.functional.pad(self.keep, (0, 1))  # hidden keys belong to the cluster after the last
        of_rows = keep.gather(2, self.q_labels.long().unsqueeze(-1).expand(-1, -1, -1, k_clusters + 1))
        kept = of_rows.gather(3, labels.long().unsqueeze(2).expand(-1, -1, of_rows.shape[2], -1))
        kept = torch.nn.functional.pad(kept, (0, context), value=True)
        weights = scores.masked_fill(~visible.unsqueeze(2), -math.inf).softmax(-1)
        return (weights * kept).sum(-1)


@st.composite
def recall_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    tokens, keys = draw(st.sampled_from([1, 37, 64])), draw(st.sampled_from([1, 50, 129]))
    q_clusters, k_clusters = draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 2, 9]))
    heads, context, dim = groups * repeats, draw(st.sampled_from([None, 0, 1, 12])), draw(st.sampled_from([4, 24]))
    sharpness = draw(st.sampled_from([0.0, 1.0, 6.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    k_labels = torch.randint(0, k_clusters, (batch, groups, keys), generator=generator)
    if draw(st.booleans()):
        is_hidden = torch.rand(batch, 1, keys, generator=generator) < 0.4
        is_hidden[..., 0] = False
        k_labels = k_labels.masked_fill(is_hidden, k_clusters)
    masked = context is not None and draw(st.booleans())
    return Case(
        q=(sharpness * torch.randn(batch, tokens, heads, dim, generator=generator)).to(dtype).transpose(1, 2),
        k=torch.randn(batch, groups, keys, dim, generator=generator).to(dtype),
        q_labels=torch.randint(0, q_clusters, (batch, heads, tokens), generator=generator).int(),
        k_labels=k_labels.int(),
        keep=torch.rand(batch, heads, q_clusters, k_clusters, generator=generator) < 0.5,
        context_k=None if context is None else torch.randn(batch, groups, context, dim, generator=generator).to(dtype),
        context_mask=(
            torch.rand(draw(st.sampled_from([1, batch])), 1, 1, context, generator=generator) < 0.5 if masked else None
        ),
    )


def tolerance(case):
    """Return what fp32 may err by: a step of the largest score, and one per product summed into it and per key."""
    largest = case.q.float().norm(dim=-1).max() * case.k.float().norm(dim=-1).max() * SCALE
    if case.context_k is not None and case.context_k.numel():
        largest = max(largest, case.q.float().norm(dim=-1).max() * case.context_k.float().norm(dim=-1).max() * SCALE)
    return torch.finfo(torch.float32).eps * (case.q.shape[3] * float(largest) + case.k.shape[2] + 16)


@PROPERTY
@given(recall_cases())
def test_recall_of_every_row_is_that_of_the_dense_matrix(case):
    calls, recall = case.measure()
    assert (calls == 1).all()
    torch.testing.assert_close(recall.double(), case.exact().mean(-1), rtol=0, atol=tolerance(case))


@PROPERTY
@given(recall_cases(), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31 - 1))
def test_recall_of_some_rows_is_the_mean_of_theirs(case, rows, calls, seed):
    _, recall = case.measure(rows=rows, calls=calls, seed=seed)
    q_order = sort_labels_reference(case.q_labels, case.keep.shape[2])[0].long()
    tokens = case.q.shape[2]
    positions = recall_module._sampled_positions(tokens, min(rows, tokens), torch.tensor([calls]), seed)
    assert positions.unique().numel() == min(rows, tokens) and positions.min() >= 0 and positions.max() < tokens
    expected = case.exact().gather(2, q_order[..., positions]).mean(-1)
    torch.testing.assert_close(recall.double(), expected, rtol=0, atol=tolerance(case))


@PROPERTY
@given(recall_cases())
def test_recall_is_one_where_everything_is_kept(case):
    _, recall = dataclasses.replace(case, keep=torch.ones_like(case.keep)).measure()
    assert (recall == 1).all()


@PROPERTY
@given(recall_cases())
def test_hidden_keys_cannot_influence_it(case):
    is_hidden = (case.k_labels == case.keep.shape[3]).unsqueeze(-1)
    context_k = case.context_k
    if case.context_mask is not None:
        context_k = context_k.masked_fill(~case.context_mask.mT, math.nan)
    poisoned = dataclasses.replace(case, k=case.k.masked_fill(is_hidden, math.nan), context_k=context_k)
    assert all(map(torch.equal, case.measure(), poisoned.measure()))


@PROPERTY
@given(recall_cases())
def test_the_chunks_of_heads_make_no_difference(case):
    whole = case.measure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall_module, "CHUNK_BYTES", 1)
        for one, other in zip(whole, case.measure()):
            torch.testing.assert_close(one, other, rtol=0, atol=2 * tolerance(case))


def plain_case(seed=0, context=5):
    generator = torch.Generator().manual_seed(seed)
    return Case(
        q=torch.randn(2, 4, 40, 8, generator=generator),
        k=torch.randn(2, 2, 50, 8, generator=generator),
        q_labels=torch.randint(0, 3, (2, 4, 40), generator=generator).int(),
        k_labels=torch.randint(0, 6, (2, 2, 50), generator=generator).int(),
        keep=torch.rand(2, 4, 3, 6, generator=generator) < 0.5,
        context_k=torch.randn(2, 2, context, 8, generator=generator) if context else None,
        context_mask=torch.ones(2, 1, 1, context).bool() if context else None,
    )


def test_different_calls_look_at_different_rows_and_together_at_all():
    seen = [
        recall_module._sampled_positions(1000, 10, torch.tensor([call], dtype=torch.int32), 3) for call in range(60)
    ]
    assert all(((each[1:] - each[:-1] - 100).abs() <= 1).all() for each in seen)
    gaps = torch.cat(seen).unique().diff()
    assert gaps.max() <= 4  # 60 calls of 10 rows over 1000 leave 1.7 between; a golden section at most a few times that


def test_positions_of_the_longest_sequence_do_not_overflow():
    positions = recall_module._sampled_positions(2**31 - 1, 64, torch.tensor([2**31 - 1], dtype=torch.int32), 2**31 - 1)
    assert positions.min() >= 0 and positions.max() < 2**31 - 1 and (positions.diff() > 0).all()


def test_only_every_interval_th_call_of_a_generation_is_measured():
    case = plain_case()
    measured = [bool(case.measure(calls=call, interval=3)[0].all()) for call in range(1, 8)]
    assert measured == [True, False, False, True, False, False, True]


def test_a_row_that_sees_no_key_has_lost_nothing():
    case = dataclasses.replace(plain_case(), keep=torch.zeros(2, 4, 3, 6).bool())
    blind = dataclasses.replace(
        case, k_labels=torch.full_like(case.k_labels, 6), context_mask=torch.zeros_like(case.context_mask)
    )
    assert (blind.measure()[1] == 1).all()


def test_autocast_does_not_round_the_scores():
    case = plain_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = case.measure()
    assert all(map(torch.equal, rounded, case.measure()))


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 40, 8).int(), TypeError, "q must be .* got torch.int32"),
        (1, torch.zeros(2, 3, 50, 8), ValueError, "multiple of the key/value heads, got 4 and 3"),
        (2, torch.zeros(2, 4, 41).int(), ValueError, r"q_order must have shape \(2, 4, 40\), got \(2, 4, 41\)"),
        (7, None, ValueError, "context_mask must come with context_k"),
        (9, torch.zeros(2).int(), ValueError, r"k_calls must have shape \(1,\), got \(2,\)"),
        (11, 0, ValueError, "rows must be at least 1, got 0"),
        (12, 0, ValueError, "interval must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(position, value, error, message):
    arguments = list(plain_case().arguments())
    arguments[position] = value
    with pytest.raises(error, match=message):
        torch.ops.svg2.measure_recall(*arguments)


@pytest.mark.parametrize("context", [0, 5])
def test_opcheck(context):
    torch.library.opcheck(torch.ops.svg2.measure_recall.default, plain_case(context=context).arguments(rows=7))
