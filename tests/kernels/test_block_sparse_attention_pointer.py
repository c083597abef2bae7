"""Block-sparse attention in Triton: as exact as the reference."""

import math

import attention_cases
import pytest
import torch
from attention_cases import assert_as_accurate
from pairs import every_two
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

# Triton's interpreter computes wrong bf16 products.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


@pytest.fixture(params=["pointer", "descriptor, 64 keys", "descriptor, 128 keys"])
def attend(request):
    """Return a function that returns a kernel's results; the tiles decide which loop the one by descriptors takes."""
    from svg2_compile.kernels.block_sparse_attention_descriptor import block_sparse_attention_descriptor
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer
    from svg2_compile.kernels.tuning import AttentionTiles

    is_descriptor = request.param.startswith("descriptor")
    if DEVICE == "cuda" and is_descriptor and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need compute capability 9.0")
    implementation = block_sparse_attention_descriptor if is_descriptor else block_sparse_attention_pointer
    block_n = 128 if request.param.endswith("128 keys") else 64
    tiles = AttentionTiles(block_m=64, block_n=block_n, piece=16, num_warps=8, num_stages=2)
    if DEVICE == "cuda" and not is_descriptor:
        tiles = None

    def attend(case):
        values = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.arguments())
        return tuple(x.cpu() for x in implementation(*values, tiles=tiles))

    return attend


@pytest.fixture
def assert_kernel_is_accurate(attend):
    """Return a function that asserts it."""

    def assert_kernel_is_accurate(case):
        assert_as_accurate(attend(case), case.low_precision(), case.exact(), case.largest_score())

    return assert_kernel_is_accurate


def random_case(**changes):
    small = {"batch": 1, "groups": 1, "repeats": 2, "dim": 16, "q_clusters": 3, "context": 0}
    return attention_cases.random_case(**(small | changes))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65])
def test_any_number_of_tokens(assert_kernel_is_accurate, tokens, dtype):
    assert_kernel_is_accurate(random_case(tokens=tokens, k_tokens=tokens, dtype=dtype))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_keys(assert_kernel_is_accurate, dtype):
    case = random_case(tokens=500, k_tokens=1000, q_clusters=7, k_clusters=31, density=0.3, repeats=1, dtype=dtype)
    assert_kernel_is_accurate(case)


@runs_kernels
@pytest.mark.parametrize(("k_clusters", "seed"), [(3, 0), (7, 1), (13, 0)])
def test_runs_of_many_tiles(assert_kernel_is_accurate, k_clusters, seed):
    case = random_case(seed=seed, tokens=100, k_tokens=1000, k_clusters=k_clusters, density=0.75, dtype=torch.float16)
    assert_kernel_is_accurate(case)


@runs_kernels
@pytest.mark.parametrize("kept", ["1010101", "0111010", "1111111", "0001000"])
def test_runs_that_are_whole_pieces_and_tiles(assert_kernel_is_accurate, kept):
    sizes = torch.tensor([128, 16, 256, 3, 64, 1, 48], dtype=torch.int32)
    case = random_case(k_tokens=int(sizes.sum()), repeats=1, q_clusters=1, context=15)
    keep = torch.tensor([digit == "1" for digit in kept]).expand(1, 1, 1, 7)
    assert_kernel_is_accurate(case.replace(k_sizes=sizes.expand(1, 1, 7), keep=keep))


@runs_kernels
@every_two(dim=[16, 64, 80, 128], strided=[False, True], shuffled=[False, True], dtype=DTYPES)
def test_any_head_dimension_layout_and_order(assert_kernel_is_accurate, dim, strided, shuffled, dtype):
    assert_kernel_is_accurate(random_case(dim=dim, strided=strided, shuffled=shuffled, dtype=dtype, context=15))


@runs_kernels
@pytest.mark.parametrize("q_kind", ["half empty", "giant", "singletons"])
@pytest.mark.parametrize("k_kind", ["half empty", "giant", "singletons"])
def test_clusters_of_any_size(assert_kernel_is_accurate, q_kind, k_kind):
    assert_kernel_is_accurate(random_case(q_kind=q_kind, k_kind=k_kind, k_clusters=33, tokens=200, k_tokens=200))


@runs_kernels
@every_two(context=[1, 15, 70], context_mask=[False, True], density=[0.0, 0.5])
def test_context_keys_are_attended_to_where_the_mask_admits(assert_kernel_is_accurate, context, context_mask, density):
    assert_kernel_is_accurate(random_case(context=context, context_mask=context_mask, density=density))


@runs_kernels
def test_a_context_that_is_masked_out_is_as_good_as_none(attend):
    case = random_case(context=15)
    case = case.replace(context_mask=torch.zeros_like(case.context_mask))
    expected = attend(case.replace(context_k=None, context_v=None, context_mask=None))
    for got, wanted in zip(attend(case), expected, strict=True):
        assert torch.equal(got, wanted)


@runs_kernels
@pytest.mark.parametrize(("batch", "groups", "repeats"), [(1, 1, 1), (2, 1, 3), (2, 3, 1)])
def test_any_batch_and_queries_sharing_key_heads(assert_kernel_is_accurate, batch, groups, repeats):
    assert_kernel_is_accurate(random_case(batch=batch, groups=groups, repeats=repeats, context=15))


@runs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(assert_kernel_is_accurate, scale):
    assert_kernel_is_accurate(random_case(context=15).replace(scale=scale))


@runs_kernels
def test_keeping_everything_is_dense_attention(attend):
    case = random_case(density=1.1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q.double(), case.k.double(), case.v.double(), scale=case.scale, enable_gqa=True
    )
    assert_as_accurate(attend(case)[:1], case.low_precision()[:1], [dense], case.largest_score())


@runs_kernels
def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity(attend):
    out, lse = attend(random_case(density=-1.0))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@runs_kernels
@pytest.mark.parametrize("dropped_cluster", [0, 3, 6])
@pytest.mark.parametrize("k_tokens", [63, 300])
def test_dropped_keys_cannot_influence_the_output(attend, k_tokens, dropped_cluster):
    case = random_case(k_tokens=k_tokens, density=0.7, context=15)
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
def test_what_is_found_in_memory_makes_no_difference(attend, monkeypatch, shuffled, density):
    case = random_case(density=density, q_kind="half empty", shuffled=shuffled)
    expected = attend(case)
    # No kernel may rely on what it finds in memory, neither in results nor in lists: it found no numbers, now zeros.
    monkeypatch.setattr(torch, "empty", torch.zeros)
    for got, wanted in zip(attend(case), expected, strict=True):
        assert torch.equal(got, wanted)


@runs_kernels
def test_same_input_gives_the_same_bits(attend):
    case = random_case(context=15)
    for first, second in zip(attend(case), attend(case), strict=True):
        assert torch.equal(first, second)


@runs_kernels
def test_rows_of_any_stride(attend):
    case = random_case(context=15)
    awkward = {name: getattr(case, name).mT.contiguous().mT for name in ("q", "k", "v", "context_k", "context_v")}
    for got, expected in zip(attend(case.replace(**awkward)), attend(case), strict=True):
        assert torch.equal(got, expected)


@runs_kernels
def test_no_tokens_at_all(attend):
    case = random_case()
    out, lse = attend(case.replace(q=case.q[:, :, :0], q_sizes=torch.zeros_like(case.q_sizes)))
    assert out.shape == (1, 2, 0, 16)
    assert lse.shape == (1, 2, 0)


@runs_kernels
def test_no_keys_at_all(attend):
    case = random_case()
    out, lse = attend(case.replace(k=case.k[:, :, :0], v=case.v[:, :, :0], k_sizes=torch.zeros_like(case.k_sizes)))
    assert (out == 0).all()
    assert (lse == -math.inf).all()
