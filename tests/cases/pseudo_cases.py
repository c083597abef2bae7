"""Arguments of ``svg2::block_sparse_attention`` with pseudo-keys: those of a case, and means of what it drops."""

import dataclasses
import math

import torch
from attention_cases import Case, assert_as_accurate
from hypothesis import strategies as st

from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.cluster_means import cluster_means_reference
from svg2_compile.kernels.log_dropped_sizes import log_dropped_sizes_reference
from svg2_compile.kernels.work_list import kept_runs_reference


@dataclasses.dataclass(frozen=True)
class Compensated:
    """An attention, and the pseudo-keys beside it."""

    case: Case
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor

    def arguments(self):
        return (*self.case.arguments(), "auto", None, False, self.k, self.v, self.bias)

    def attend(self):
        return torch.ops.svg2.block_sparse_attention(*self.arguments())

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def to(self, dtype):
        return self.replace(case=self.case.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def exact(self):
        """Return the specification in fp64."""
        return block_sparse_attention_reference(*self.to(torch.float64).arguments())

    def low_precision(self):
        """Return the same attention from plain operations that each round to the dtype of q."""
        case = self.case
        repeats = case.q.shape[1] // case.k.shape[1]
        parts = [(case.k, case.v), (self.k, self.v)]
        parts[1:1] = [] if case.context_k is None else [(case.context_k, case.context_v)]
        k, v = (torch.cat(each, 2).repeat_interleave(repeats, dim=1) for each in zip(*parts))
        mask, bias = self.mask_and_bias()
        scores = ((case.q @ k.mT * case.scale) + bias.to(case.q.dtype)).masked_fill(~mask, -math.inf)
        return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)

    def mask_and_bias(self):
        """Return who attends to whom, and what is added, [B, H, N, N_k + M + P], spelled out token by token."""
        case = self.case
        (batch, heads, tokens, _), mask = case.q.shape, case.mask()
        rows = [
            self.bias[b, h].repeat_interleave(case.q_sizes[b, h].long(), dim=0)
            for b in range(batch)
            for h in range(heads)
        ]
        bias = torch.stack(rows).view(batch, heads, tokens, -1)
        if case.q_order is not None:
            bias = bias.gather(2, case.q_order.argsort(-1).unsqueeze(-1).expand(bias.shape))
        added = torch.cat((torch.zeros(mask.shape), bias), dim=-1)
        return torch.cat((mask, bias > -math.inf), dim=-1), added.masked_fill(added == -math.inf, 0)

    def largest_score(self):
        pseudo = dataclasses.replace(self.case, k=self.k, context_k=None).largest_score()
        bias = self.bias[self.bias > -math.inf]
        return max(self.case.largest_score(), pseudo + (bias.abs().max().item() if bias.numel() else 0.0))

    def assert_right(self, actual=None):
        actual = self.attend() if actual is None else actual
        assert_as_accurate(actual, self.low_precision(), self.exact(), self.largest_score())


def compensated(case):
    """Return a case with the means of the clusters that each query cluster drops."""
    kept = kept_runs_reference(case.keep, case.k_sizes)
    return Compensated(
        case,
        cluster_means_reference(case.k, case.k_sizes),
        cluster_means_reference(case.v, case.k_sizes),
        log_dropped_sizes_reference(kept.runs, kept.counts, case.k_sizes),
    )


def with_any_bias(case, pseudo, seed, admitted=0.5):
    """Return a case with ``pseudo`` further keys, whose biases have nothing to do with clusters."""
    generator = torch.Generator().manual_seed(seed)
    batch, groups, _, dim = case.k.shape
    k, v = (torch.randn(batch, groups, pseudo, dim, generator=generator).to(case.q.dtype) for _ in "kv")
    shape = (*case.q_sizes.shape, pseudo)
    bias = 2 * torch.randn(shape, generator=generator)
    return Compensated(case, k, v, bias.masked_fill(torch.rand(shape, generator=generator) > admitted, -math.inf))


@st.composite
def some_bias(draw, cases):
    """Draw a case with pseudo-keys, more than a tile of them or few, all, some or none of which are admitted."""
    pseudo, admitted = draw(st.sampled_from([1, 9, 33, 70])), draw(st.sampled_from([0.0, 0.5, 1.0]))
    return with_any_bias(draw(cases), pseudo, draw(st.integers(0, 2**31)), admitted)
