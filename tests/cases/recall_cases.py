"""Tokens in clusters and what is kept of them: for the ops that look at a few rows."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.sort_labels import sort_labels_reference
from svg2_compile.kernels.work_list import kept_runs_reference

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

    def in_cluster_order(self, x):
        """Return rows of keys [B, G, N_k, D] in the order of their clusters."""
        order, _ = sort_labels_reference(self.k_labels, self.keep.shape[3] + 1)
        return x.gather(2, order.long().unsqueeze(-1).expand_as(x))

    def selection(self):
        """Return the order and the sizes of the query clusters, the sizes of the key clusters, runs and counts."""
        q_clusters, k_clusters = self.keep.shape[2:]
        q_order, q_sizes = sort_labels_reference(self.q_labels, q_clusters)
        _, k_sizes = sort_labels_reference(self.k_labels, k_clusters + 1)
        k_sizes = k_sizes[..., :k_clusters].contiguous()
        kept = kept_runs_reference(self.keep, k_sizes)
        return q_order, q_sizes, k_sizes, kept.runs, kept.counts

    def arguments(self, calls=1, rows=EVERY_ROW, interval=1, seed=0):
        """Return the arguments of the op."""
        counter = torch.tensor([calls], dtype=torch.int32)
        return (
            self.q,
            self.in_cluster_order(self.k),
            *self.selection(),
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
        weights, kept = self.weights()
        return (weights * kept).sum(-1)

    def weights(self):
        """Return all attention weights in fp64 [B, H, N, N_k + M], 0 of hidden keys, and which keys are kept."""
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
        scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
        weights = torch.where(visible.any(-1)[..., None, None], scores.softmax(-1), 0)
        return weights, kept


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
