"""Arguments of ``svg2::block_sparse_attention``, at random or as told, and how exact its results must be."""

import dataclasses
import math

import torch
from hypothesis import strategies as st
from sizes_of_clusters import random_sizes

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.work_list import kept_runs_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op, the runs as the key clusters that are kept."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_sizes: torch.Tensor
    k_sizes: torch.Tensor
    keep: torch.Tensor
    runs: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    context_k: torch.Tensor | None = None
    context_v: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    q_order: torch.Tensor | None = None
    scale: float = 0.2

    def arguments(self):
        if self.runs is None:
            kept = kept_runs_reference(self.keep, self.k_sizes)
            return self.replace(runs=kept.runs, counts=kept.counts).arguments()
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["k_sizes"], values["keep"]
        return tuple(values.values())

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def attend(self):
        return torch.ops.svg2.block_sparse_attention(*self.arguments())

    def to(self, dtype):
        names = ("q", "k", "v", "context_k", "context_v")
        return self.replace(**{name: x.to(dtype) for name in names if (x := getattr(self, name)) is not None})

    def exact(self):
        """Return the specification in fp64."""
        return block_sparse_attention_reference(*self.to(torch.float64).arguments())

    def mask(self):
        """Return who attends to whom, bool [B, H, N, N_k + M], spelled out token by token, in the order of ``q``."""
        (batch, heads, tokens, _), (_, groups, k_tokens, _) = self.q.shape, self.k.shape
        rows = []
        for b in range(batch):
            for h in range(heads):
                blocks = self.keep[b, h].repeat_interleave(self.k_sizes[b, h * groups // heads].long(), dim=1)
                rows.append(blocks.repeat_interleave(self.q_sizes[b, h].long(), dim=0))
        mask = torch.stack(rows).view(batch, heads, tokens, k_tokens)
        if self.q_order is not None:
            place = self.q_order.argsort(-1).unsqueeze(-1).expand(mask.shape)  # of every query in the cluster order
            mask = mask.gather(2, place)
        if self.context_k is None:
            return mask
        visible = torch.ones(1, 1, 1, self.context_k.shape[2], dtype=torch.bool)
        visible = visible if self.context_mask is None else self.context_mask
        return torch.cat((mask, visible.expand(batch, heads, tokens, -1)), dim=-1)

    def low_precision(self):
        """Return the same attention from plain operations that each round to the dtype of q."""
        repeats = self.q.shape[1] // self.k.shape[1]
        k = self.k if self.context_k is None else torch.cat((self.k, self.context_k), dim=2)
        v = self.v if self.context_v is None else torch.cat((self.v, self.context_v), dim=2)
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        scores = (self.q @ k.mT * self.scale).masked_fill(~self.mask(), -math.inf)
        return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)

    def largest_score(self):
        """Return the largest magnitude among the scaled scores, context included."""
        k = self.k if self.context_k is None else torch.cat((self.k, self.context_k), dim=2)
        k = k.nan_to_num(0).double().repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)
        return (self.q.double() @ k.mT * self.scale).abs().max().item() if k.numel() and self.q.numel() else 0.0


def assert_as_accurate(actual, low_precision, exact, largest_score):
    """Assert that out and lse err at most twice as much as low-precision arithmetic plus one rounding step, vs fp64.

    The step is one of the result and one of the largest score, which every order of operations rounds before it
    exponentiates: it moves the lse by as much, and the weights of the output by as much relative to themselves.
    Log-sum-exps of -inf must match exactly.
    """
    for is_output, got, rounded, wanted in zip((True, False), actual, low_precision, exact):
        finite = wanted.isfinite()
        assert torch.equal(got[~finite].double(), wanted[~finite])
        got, rounded, wanted = got[finite].double(), rounded[finite], wanted[finite]
        if wanted.numel():
            sensitivity = wanted.abs().max() if is_output else 1.0
            step = torch.finfo(rounded.dtype).eps * (wanted.abs().max() + largest_score * sensitivity)
            assert (got - wanted).abs().max() <= 2 * (rounded.double() - wanted).abs().max() + step


def random_case(
    seed=0, dtype=torch.float32, batch=2, groups=2, repeats=2, tokens=65, k_tokens=63, dim=24, q_clusters=5,
    k_clusters=7, q_kind="uneven", k_kind="uneven", density=0.5, strided=True, context=15, context_mask=True,
    shuffled=False,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    heads = groups * repeats

    def normal(heads, tokens):
        if strided:
            return torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)

    return Case(
        q=normal(heads, tokens),
        k=normal(groups, k_tokens),
        v=normal(groups, k_tokens),
        q_sizes=random_sizes(generator, batch, heads, q_clusters, tokens, q_kind),
        k_sizes=random_sizes(generator, batch, groups, k_clusters, k_tokens, k_kind),
        keep=torch.rand(batch, heads, q_clusters, k_clusters, generator=generator) < density,
        context_k=normal(groups, context) if context else None,
        context_v=normal(groups, context) if context else None,
        context_mask=torch.rand(batch, 1, 1, context, generator=generator) < 0.5 if context and context_mask else None,
        q_order=torch.rand(batch, heads, tokens, generator=generator).argsort(-1).int() if shuffled else None,
    )


@st.composite
def block_cases(draw, dtypes=DTYPES, **fixed):
    kinds = st.sampled_from(["uneven", "half empty", "giant", "singletons"])
    tokens = st.sampled_from([1, 15, 63, 64, 65, 200])
    drawn = {
        "seed": draw(st.integers(0, 2**31)),
        "dtype": draw(st.sampled_from(dtypes)),
        "batch": draw(st.integers(1, 2)),
        "groups": draw(st.integers(1, 2)),
        "repeats": draw(st.integers(1, 2)),
        "tokens": draw(tokens),
        "k_tokens": draw(tokens),
        "dim": draw(st.sampled_from([8, 24, 64])),
        "q_clusters": draw(st.sampled_from([1, 2, 9])),
        "k_clusters": draw(st.sampled_from([1, 2, 9, 33])),
        "q_kind": draw(kinds),
        "k_kind": draw(kinds),
        "density": draw(st.sampled_from([0.0, 0.2, 0.8, 1.0])),
        "strided": draw(st.booleans()),
        "context": draw(st.sampled_from([0, 0, 1, 15])),
        "context_mask": draw(st.booleans()),
        "shuffled": draw(st.booleans()),
    }
    return random_case(**(drawn | fixed))
