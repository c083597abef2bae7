"""``svg2::block_sparse_attention``: exact on what is kept, blind to what is not."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.block_sparse_attention import block_sparse_attention_reference
from svg2_compile.kernels.work_list import kept_runs_reference

PROPERTY = settings(max_examples=50, deadline=None)
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


def random_sizes(generator, batch, heads, clusters, tokens, kind):
    """Return int32 [B, H, C] cluster sizes that sum to ``tokens``."""
    if kind == "giant":
        labels = torch.full((batch, heads, tokens), clusters - 1)
    elif kind == "singletons":
        labels = torch.arange(tokens).clamp(max=clusters - 1).expand(batch, heads, tokens)
    else:
        used = max(1, clusters // 2) if kind == "half empty" else clusters
        labels = torch.randint(0, used, (batch, heads, tokens), generator=generator)
    return torch.nn.functional.one_hot(labels, clusters).sum(2).int()


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


@PROPERTY
@given(block_cases())
def test_output_is_as_accurate_as_plain_attention(case):
    out, lse = case.attend()
    assert out.dtype == case.q.dtype
    assert lse.dtype == torch.float32
    assert (out if case.q_order is None else out.transpose(1, 2)).is_contiguous()
    assert lse.is_contiguous()
    assert_as_accurate((out, lse), case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases())
def test_reference_is_as_accurate_as_plain_attention(case):
    reference = block_sparse_attention_reference(*case.arguments())
    assert_as_accurate(reference, case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases())
def test_reference_in_fp64_is_plain_attention_in_fp64(case):
    """A wrong reference would judge itself right and, as the yardstick above, widen every tolerance."""
    case = case.to(torch.float64)
    eps, keys, dim = torch.finfo(torch.float64).eps, case.mask().shape[-1], case.q.shape[-1]
    # Two orders of summation differ by at most a step of the sum of magnitudes per term: dim of them in a score, which
    # moves the lse by as much and every weight of the output by twice as much relative to itself, then all the keys.
    context_k = None if case.context_k is None else case.context_k.abs()
    magnitudes = case.replace(q=case.q.abs(), k=case.k.abs(), context_k=context_k).largest_score()
    scores = (dim + 1) * eps * magnitudes
    value = max(v.abs().max().item() for v in (case.v, case.context_v) if v is not None)
    for got, wanted, moved in zip(case.exact(), case.low_precision(), (2 * scores * value, scores), strict=True):
        largest = max(1.0, value, *wanted[wanted.isfinite()].abs().flatten().tolist())
        torch.testing.assert_close(got, wanted, rtol=0, atol=keys * eps * largest + moved)


@PROPERTY
@given(block_cases(density=1.0, context=0))
def test_keeping_everything_is_dense_attention(case):
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), scale=case.scale, enable_gqa=True
    )
    assert_as_accurate(case.attend()[:1], case.low_precision()[:1], [dense], case.largest_score())


@PROPERTY
@given(block_cases(density=0.2))
def test_dropped_keys_cannot_influence_the_output(case):
    # Keys no query attends to become NaN: the result must keep its bits.
    repeats = case.q.shape[1] // case.k.shape[1]
    seen = case.mask().any(2).unflatten(1, (-1, repeats)).any(2).unsqueeze(-1)  # [B, G, N_k + M, 1]
    split = [case.k.shape[2], seen.shape[2] - case.k.shape[2]]
    seen_tokens, seen_context = seen.split(split, dim=2)
    poisoned = {name: getattr(case, name).masked_fill(~seen_tokens, math.nan) for name in ("k", "v")}
    if case.context_k is not None:
        for name in ("context_k", "context_v"):
            poisoned[name] = getattr(case, name).masked_fill(~seen_context, math.nan)
    for got, expected in zip(case.replace(**poisoned).attend(), case.attend(), strict=True):
        assert torch.equal(got, expected)


@PROPERTY
@given(block_cases(dtypes=[torch.float32], batch=1, groups=1, repeats=1, k_kind="uneven", density=0.5, shuffled=False))
def test_a_dropped_cluster_is_invisible_to_its_row_even_if_others_see_it(case):
    out, _ = case.attend()
    row_of_token = torch.arange(case.q_sizes.shape[-1]).repeat_interleave(case.q_sizes[0, 0].long())
    cluster_of_key = torch.arange(case.k_sizes.shape[-1]).repeat_interleave(case.k_sizes[0, 0].long())
    poison = (cluster_of_key == 0)[:, None]
    poisoned = case.replace(k=case.k.masked_fill(poison, math.nan), v=case.v.masked_fill(poison, math.nan))
    blind = ~case.keep[0, 0, row_of_token, 0]
    assert torch.equal(poisoned.attend()[0][0, 0, blind], out[0, 0, blind])


@PROPERTY
@given(block_cases(), st.randoms(use_true_random=False))
def test_relabelling_key_clusters_changes_nothing(case, random):
    clusters = list(range(case.k_sizes.shape[-1]))
    random.shuffle(clusters)
    starts = case.k_sizes.cumsum(-1) - case.k_sizes
    token_order = torch.stack(
        [
            torch.cat([torch.arange(starts[b, g, c], starts[b, g, c] + case.k_sizes[b, g, c]) for c in clusters])
            for b in range(case.k.shape[0])
            for g in range(case.k.shape[1])
        ]
    ).view(case.k.shape[:3])
    index = token_order.unsqueeze(-1).expand(case.k.shape)
    relabelled = case.replace(
        k=case.k.gather(2, index),
        v=case.v.gather(2, index),
        k_sizes=case.k_sizes[..., clusters],
        keep=case.keep[..., clusters],
    )
    assert_as_accurate(relabelled.attend(), case.low_precision(), case.exact(), case.largest_score())


@PROPERTY
@given(block_cases(q_kind="giant", shuffled=False))
def test_permuting_queries_within_a_cluster_permutes_the_output(case):
    order = torch.randperm(case.q.shape[2], generator=torch.Generator().manual_seed(0))
    permuted = case.replace(q=case.q[:, :, order]).attend()
    low_precision, exact = ([x[:, :, order] for x in pair] for pair in (case.low_precision(), case.exact()))
    assert_as_accurate(permuted, low_precision, exact, case.largest_score())


@PROPERTY
@given(block_cases(shuffled=True))
def test_queries_in_their_own_order_are_the_permuted_attention_put_back(case):
    permuted = case.replace(q=torch.ops.svg2.permute_tokens(case.q, case.q_order), q_order=None)
    out, lse = permuted.attend()
    got_out, got_lse = case.attend()
    assert torch.equal(got_out, torch.ops.svg2.unpermute_tokens(out, case.q_order))
    assert torch.equal(got_lse.gather(2, case.q_order.long()), lse)


@PROPERTY
@given(block_cases())
def test_same_input_gives_the_same_bits(case):
    for first, second in zip(case.attend(), case.attend(), strict=True):
        assert torch.equal(first, second)


def test_two_halves_merge_by_their_log_sum_exp():
    case = random_case(context=0)
    (out_a, lse_a), (out_b, lse_b) = case.attend(), case.replace(keep=~case.keep).attend()
    lse = torch.logaddexp(lse_a, lse_b)
    merged = out_a * (lse_a - lse).exp().unsqueeze(-1) + out_b * (lse_b - lse).exp().unsqueeze(-1)
    everything = case.replace(keep=torch.ones_like(case.keep))
    torch.testing.assert_close(merged, everything.attend()[0], rtol=1e-5, atol=1e-6)


def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity():
    case = random_case(context=0)
    out, lse = case.replace(keep=torch.zeros_like(case.keep)).attend()
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_thousand_tokens():
    case = random_case(tokens=1000, k_tokens=1000, dim=64, q_clusters=7, k_clusters=31, density=0.3)
    assert_as_accurate(case.attend(), case.low_precision(), case.exact(), case.largest_score())


def test_rows_of_any_stride():
    case = random_case()
    awkward = {name: getattr(case, name).mT.contiguous().mT for name in ("q", "k", "v", "context_k", "context_v")}
    for got, expected in zip(case.replace(**awkward).attend(), case.attend(), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 65, 24).int()}, TypeError, "q must be .* got torch.int32"),
        ({"k": torch.zeros(2, 2, 63, 24).half()}, TypeError, "k must be torch.float32, got torch.float16"),
        ({"v": torch.zeros(2, 2, 62, 24)}, ValueError, r"v must have shape \(2, 2, 63, 24\), got \(2, 2, 62, 24\)"),
        ({"k": torch.zeros(2, 3, 63, 24)}, ValueError, "multiple of the key/value heads, got 4 and 3"),
        ({"runs": torch.ones(2, 4, 5, 4, 2)}, TypeError, "runs must be torch.int32, got torch.float32"),
        ({"runs": torch.ones(2, 4, 6, 4, 2).int()}, ValueError, r"counts must have shape \(2, 4, 6, 4\)"),
        ({"counts": torch.ones(2, 4, 5, 3).int()}, ValueError, r"counts must have shape \(2, 4, 5, 4\)"),
        ({"q_sizes": torch.ones(2, 4, 5).int()}, ValueError, "q_sizes must be non-negative and sum to 65"),
        ({"q_order": torch.zeros(2, 4, 64).int()}, ValueError, r"q_order must have shape \(2, 4, 65\)"),
        ({"q_order": torch.zeros(2, 4, 65)}, TypeError, "q_order must be torch.int32, got torch.float32"),
        ({"context_v": None}, ValueError, "context_k and context_v must be given together"),
        ({"context_k": None, "context_v": None}, ValueError, "context_mask only with them"),
        ({"context_mask": torch.ones(2, 1, 1, 14).bool()}, ValueError, r"context_mask must have shape \(2, 1, 1, 15\)"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        case = random_case()
        kept = kept_runs_reference(case.keep, case.k_sizes)
        case.replace(**({"runs": kept.runs, "counts": kept.counts} | changes)).attend()


@pytest.mark.parametrize("anything", [(0, 5), (2**31 - 1, 2**31 - 1), (-7, 3)])
def test_runs_past_their_number_may_hold_anything(anything):
    case = random_case(density=0.4)
    kept = kept_runs_reference(case.keep, case.k_sizes)
    unused = torch.arange(kept.runs.shape[3]) >= kept.counts[..., :1]
    assert unused.any()
    runs = torch.where(unused.unsqueeze(-1), torch.tensor(anything, dtype=torch.int32), kept.runs)
    poisoned = case.replace(runs=runs, counts=kept.counts)
    for implementation in (torch.ops.svg2.block_sparse_attention, block_sparse_attention_reference):
        for got, expected in zip(implementation(*poisoned.arguments()), implementation(*case.arguments()), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 15])
@pytest.mark.parametrize("shuffled", [False, True])
def test_opcheck(dtype, context, shuffled):
    case = random_case(dtype=dtype, context=context, shuffled=shuffled)
    torch.library.opcheck(torch.ops.svg2.block_sparse_attention.default, case.arguments())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_compiled_equals_eager(dynamic, shuffled):
    case = random_case(shuffled=shuffled)
    compiled = torch.compile(
        lambda *args: torch.ops.svg2.block_sparse_attention(*args), fullgraph=True, dynamic=dynamic
    )
    for got, expected in zip(compiled(*case.arguments()), case.attend(), strict=True):
        assert torch.equal(got, expected)
