"""Block-sparse attention in Triton: as exact as the reference, and its work lists cover just what is kept."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svg2_compile.kernels.work_list import LENGTH_BITS, max_pieces, runs, work_list_reference


def module_beside(name):
    """Return another test module: its cases are tested here, too."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


op_tests = module_beside("test_kernels_block_sparse_attention")
assert_as_accurate, random_sizes = op_tests.assert_as_accurate, op_tests.random_sizes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_the_kernels_pass_under_the_interpreter, in its own process"
)
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Triton's interpreter computes wrong bf16 products.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.mark.skipif(DEVICE == "cuda", reason="the device itself runs the tests below")
@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
def test_the_kernels_pass_under_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    # Triton decides at import whether to compile or to interpret, for the whole process.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Work lists


@st.composite
def selections(draw):
    """Return q_sizes, k_sizes, keep, q_tokens, k_tokens, block_m, piece."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kinds = st.sampled_from(["uneven", "half empty", "giant", "singletons"])
    batch, groups, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    q_tokens, k_tokens = draw(st.integers(1, 200)), draw(st.integers(1, 300))
    q_clusters, k_clusters = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    q_sizes = random_sizes(generator, batch, groups * repeats, q_clusters, q_tokens, draw(kinds))
    k_sizes = random_sizes(generator, batch, groups, k_clusters, k_tokens, draw(kinds))
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    keep = torch.rand(batch, groups * repeats, q_clusters, k_clusters, generator=generator) < density
    return q_sizes, k_sizes, keep, q_tokens, k_tokens, draw(st.sampled_from([16, 64])), draw(st.sampled_from([4, 16]))


@PROPERTY
@given(selections())
def test_pieces_cover_exactly_the_kept_keys(selection):
    _, k_sizes, keep, _, k_tokens, _, piece = selection
    work = work_list_reference(*selection)
    assert work.pieces.shape[3] == max_pieces(k_tokens, keep.shape[3], piece)
    repeats = keep.shape[1] // k_sizes.shape[1]
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        full, total = work.counts[b, h, i].tolist()
        pieces = [divmod(code, 1 << LENGTH_BITS) for code in work.pieces[b, h, i, :total].tolist()]
        assert all(length == piece for _, length in pieces[:full])
        assert all(0 < length < piece for _, length in pieces[full:])
        assert pieces == sorted(pieces[:full]) + sorted(pieces[full:])
        times_listed = torch.zeros(k_tokens, dtype=torch.int64)
        for start, length in pieces:
            times_listed[start : start + length] += 1
        kept = keep[b, h, i].repeat_interleave(k_sizes[b, h // repeats].long())
        assert torch.equal(times_listed, kept.long())
        # Clusters that follow one another share their pieces, with or without empty clusters in between.
        assert total == sum(math.ceil((stop - start) / piece) for start, stop in runs(kept))


@PROPERTY
@given(selections())
def test_tiles_cover_every_query_once_and_stay_in_their_cluster(selection):
    q_sizes, _, _, q_tokens, _, block_m, _ = selection
    tiles = work_list_reference(*selection).tiles
    for sizes, head_tiles in zip(q_sizes.flatten(0, 1), tiles.flatten(0, 1), strict=True):
        cluster_of_token = torch.arange(len(sizes)).repeat_interleave(sizes.long())
        times_listed = torch.zeros(q_tokens, dtype=torch.int64)
        for cluster, start, stop in head_tiles.tolist():
            assert 0 <= stop - start <= block_m
            assert (cluster_of_token[start:stop] == cluster).all()
            times_listed[start:stop] += 1
        assert (times_listed == 1).all()


@runs_kernels
@settings(PROPERTY, max_examples=15)
@given(selections())
def test_the_kernel_makes_the_same_lists(selection):
    from svg2_compile.kernels.work_list_triton import work_list_triton

    expected = work_list_reference(*selection)
    actual = work_list_triton(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in selection))
    assert torch.equal(actual.tiles.cpu(), expected.tiles)
    assert torch.equal(actual.counts.cpu(), expected.counts)
    used = torch.arange(expected.pieces.shape[3]) < expected.counts[..., 1:]
    assert torch.equal(actual.pieces.cpu()[used], expected.pieces[used])


# Attention


def attend(case):
    """Return the kernel's results; on the CPU in few and large tiles, which the interpreter likes."""
    from svg2_compile.kernels.block_sparse_attention_triton import block_sparse_attention_triton
    from svg2_compile.kernels.tuning import AttentionTiles

    tiles = None if DEVICE == "cuda" else AttentionTiles(block_m=64, block_n=64, piece=16, num_warps=4, num_stages=1)
    values = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.arguments())
    return tuple(x.cpu() for x in block_sparse_attention_triton(*values, tiles=tiles))


def assert_kernel_is_accurate(case):
    assert_as_accurate(attend(case), case.low_precision(), case.exact(), case.largest_score())


def random_case(**changes):
    small = {"batch": 1, "groups": 1, "repeats": 2, "dim": 16, "q_clusters": 3, "context": 0}
    return op_tests.random_case(**(small | changes))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65])
def test_any_number_of_tokens(tokens, dtype):
    assert_kernel_is_accurate(random_case(tokens=tokens, k_tokens=tokens, dtype=dtype))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_tokens(dtype):
    case = random_case(tokens=1000, k_tokens=1000, q_clusters=7, k_clusters=31, density=0.3, repeats=1, dtype=dtype)
    assert_kernel_is_accurate(case)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_any_head_dimension_layout_and_order(dim, strided, shuffled, dtype):
    assert_kernel_is_accurate(random_case(dim=dim, strided=strided, shuffled=shuffled, dtype=dtype, context=15))


@runs_kernels
@pytest.mark.parametrize("q_kind", ["half empty", "giant", "singletons"])
@pytest.mark.parametrize("k_kind", ["half empty", "giant", "singletons"])
def test_clusters_of_any_size(q_kind, k_kind):
    assert_kernel_is_accurate(random_case(q_kind=q_kind, k_kind=k_kind, k_clusters=33, tokens=200, k_tokens=200))


@runs_kernels
@pytest.mark.parametrize("context_mask", [False, True])
@pytest.mark.parametrize("context", [1, 15, 70])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_context_keys_are_attended_to_where_the_mask_admits(context, context_mask, density):
    assert_kernel_is_accurate(random_case(context=context, context_mask=context_mask, density=density))


@runs_kernels
def test_a_context_that_is_masked_out_is_as_good_as_none():
    case = random_case(context=15)
    case = case.replace(context_mask=torch.zeros_like(case.context_mask))
    expected = attend(case.replace(context_k=None, context_v=None, context_mask=None))
    for got, wanted in zip(attend(case), expected, strict=True):
        assert torch.equal(got, wanted)


@runs_kernels
@pytest.mark.parametrize(("batch", "groups", "repeats"), [(1, 1, 1), (2, 1, 3), (2, 3, 1)])
def test_any_batch_and_queries_sharing_key_heads(batch, groups, repeats):
    assert_kernel_is_accurate(random_case(batch=batch, groups=groups, repeats=repeats, context=15))


@runs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(scale):
    assert_kernel_is_accurate(random_case(context=15).replace(scale=scale))


@runs_kernels
def test_keeping_everything_is_dense_attention():
    case = random_case(density=1.1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), scale=case.scale, enable_gqa=True
    )
    assert_as_accurate(attend(case)[:1], case.low_precision()[:1], [dense], case.largest_score())


@runs_kernels
def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity():
    out, lse = attend(random_case(density=-1.0))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@runs_kernels
@pytest.mark.parametrize("dropped_cluster", [0, 3, 6])
def test_dropped_keys_cannot_influence_the_output(dropped_cluster):
    case = random_case(context=15)
    case.keep[..., dropped_cluster] = False
    cluster_of_key = torch.arange(case.k_sizes.shape[-1]).repeat_interleave(case.k_sizes[0, 0].long())
    unseen, unseen_context = (cluster_of_key == dropped_cluster)[:, None], ~case.context_mask[0, 0, 0][:, None]
    poisoned = case.replace(
        k=case.k.masked_fill(unseen, math.nan),
        v=case.v.masked_fill(unseen, math.nan),
        context_k=case.context_k.masked_fill(unseen_context, math.nan),
        context_v=case.context_v.masked_fill(unseen_context, math.nan),
    )
    for got, expected in zip(attend(poisoned), attend(case), strict=True):
        assert torch.equal(got, expected)


@runs_kernels
@pytest.mark.parametrize("density", [0.0, 0.5])
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_element_of_the_output_is_written(monkeypatch, shuffled, density):
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        # No kernel may rely on what it finds in memory, neither in results nor in lists.
        return tensor.fill_(math.nan if tensor.is_floating_point() else 2**31 - 1)

    case = random_case(density=density, q_kind="half empty", shuffled=shuffled)
    expected = attend(case)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    for got, wanted in zip(attend(case), expected, strict=True):
        assert torch.equal(got, wanted)


@runs_kernels
def test_same_input_gives_the_same_bits():
    case = random_case(context=15)
    for first, second in zip(attend(case), attend(case), strict=True):
        assert torch.equal(first, second)


@runs_kernels
def test_rows_of_any_stride():
    case = random_case(context=15)
    awkward = {name: getattr(case, name).mT.contiguous().mT for name in ("q", "k", "v", "context_k", "context_v")}
    for got, expected in zip(attend(case.replace(**awkward)), attend(case), strict=True):
        assert torch.equal(got, expected)


@runs_kernels
def test_no_tokens_at_all():
    case = random_case()
    out, lse = attend(case.replace(q=case.q[:, :, :0], q_sizes=torch.zeros_like(case.q_sizes)))
    assert out.shape == (1, 2, 0, 16)
    assert lse.shape == (1, 2, 0)


@runs_kernels
def test_no_keys_at_all():
    case = random_case()
    out, lse = attend(case.replace(k=case.k[:, :, :0], v=case.v[:, :, :0], k_sizes=torch.zeros_like(case.k_sizes)))
    assert (out == 0).all()
    assert (lse == -math.inf).all()
