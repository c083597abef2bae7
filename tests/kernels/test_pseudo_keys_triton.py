"""Pseudo-keys in Triton: the softmax goes on where the attention left it, as exact as one softmax over all."""

import math

import attention_cases
import pytest
import torch
from pseudo_cases import compensated, with_any_bias
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

# Triton's interpreter computes wrong bf16 products.
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def on_device(values):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]


def attend(compensated):
    """Return what the kernel by pointers gives, and then this one."""
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer
    from svg2_compile.kernels.pseudo_keys_triton import attend_pseudo_keys

    q, k, v, q_sizes, *others, q_order, scale = on_device(compensated.case.arguments())
    out, lse = block_sparse_attention_pointer(q, k, v, q_sizes, *others, q_order, scale)
    pseudo = on_device((compensated.k, compensated.v, compensated.bias))
    attend_pseudo_keys(out, lse, q, q_sizes, q_order, *pseudo, scale)
    return out.cpu(), lse.cpu()


def random_case(**changes):
    small = {"batch": 1, "groups": 1, "repeats": 2, "dim": 16, "q_clusters": 3, "context": 0}
    return attention_cases.random_case(**(small | changes))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pseudo", [1, 31, 32, 33, 130])
@pytest.mark.parametrize("density", [0.0, 0.5])
def test_any_number_of_pseudo_keys(pseudo, density, dtype):
    case = with_any_bias(random_case(dtype=dtype, density=density), pseudo, seed=pseudo)
    case.assert_right(attend(case))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("shuffled", [False, True])
def test_any_head_dimension_and_order(dim, shuffled, dtype):
    case = with_any_bias(random_case(dim=dim, shuffled=shuffled, dtype=dtype, context=5), 9, seed=0)
    case.assert_right(attend(case))


@runs_kernels
@pytest.mark.parametrize(("batch", "groups", "repeats"), [(1, 1, 1), (2, 1, 3), (2, 3, 1)])
@pytest.mark.parametrize("q_kind", ["half empty", "giant", "singletons"])
def test_any_batch_heads_and_clusters_of_any_size(batch, groups, repeats, q_kind):
    shape = {"batch": batch, "groups": groups, "repeats": repeats, "tokens": 90}
    case = compensated(random_case(**shape, q_kind=q_kind, shuffled=True))
    case.assert_right(attend(case))


@runs_kernels
@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_any_scale(scale):
    case = compensated(random_case(dtype=torch.float16).replace(scale=scale))
    case.assert_right(attend(case))


@runs_kernels
def test_where_nothing_is_dropped_the_bits_stay():
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer

    case = random_case(density=1.1, dtype=torch.float16, shuffled=True)
    plain = block_sparse_attention_pointer(*on_device(case.arguments()))
    for got, wanted in zip(attend(compensated(case)), plain, strict=True):
        assert torch.equal(got, wanted.cpu())


@runs_kernels
def test_what_is_left_out_is_not_even_read():
    case = with_any_bias(random_case(), 40, seed=0)
    unseen = ~(case.bias > -math.inf).any(2).any(1, keepdim=True).unsqueeze(-1)
    case = case.replace(bias=case.bias.index_fill(3, torch.tensor([3, 37]), -math.inf))
    unseen[:, :, [3, 37]] = True
    poisoned = case.replace(k=case.k.masked_fill(unseen, math.nan), v=case.v.masked_fill(unseen, math.nan))
    for got, wanted in zip(attend(poisoned), attend(case), strict=True):
        assert torch.equal(got, wanted)


@runs_kernels
def test_a_row_that_attends_to_nothing_is_zero_with_lse_minus_infinity():
    case = random_case(density=-1.0)
    bias = torch.full((1, 2, 3, 5), -math.inf)
    bias[:, :, 1] = 0.0
    case = with_any_bias(case, 5, seed=0).replace(bias=bias)
    out, lse = attend(case)
    ends = case.case.q_sizes.cumsum(-1)
    for head in range(2):
        first, last = ends[0, head, :2].tolist()
        rows = torch.cat((torch.arange(first), torch.arange(last, out.shape[2])))
        assert (out[0, head, rows] == 0).all() and (lse[0, head, rows] == -math.inf).all()
        assert lse[0, head, first:last].isfinite().all()


@runs_kernels
def test_rows_of_any_stride_and_every_time_the_same_bits():
    case = compensated(random_case(context=5))
    awkward = {name: getattr(case, name).mT.contiguous().mT for name in "kv"}
    q = case.case.q.mT.contiguous().mT
    for other in (case, case.replace(**awkward, case=case.case.replace(q=q))):
        for got, wanted in zip(attend(other), attend(case), strict=True):
            assert torch.equal(got, wanted)


@runs_kernels
def test_nothing_to_do():
    case = random_case()
    empty = with_any_bias(case.replace(q=case.q[:, :, :0], q_sizes=torch.zeros_like(case.q_sizes)), 4, seed=0)
    assert attend(empty)[0].shape == (1, 2, 0, 16)
    for got, wanted in zip(attend(with_any_bias(case, 0, seed=0)), case.attend(), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", ["gluon", "descriptor", "pointer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_op_does_it_after_every_kernel(dim, dtype, implementation):
    if implementation != "pointer" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("made for compute capability 9.0")
    case = compensated(random_case(tokens=700, k_tokens=700, dim=dim, dtype=dtype, k_clusters=40, shuffled=True))
    arguments = list(case.arguments())
    arguments[11] = implementation
    case.assert_right([x.cpu() for x in torch.ops.svg2.block_sparse_attention(*on_device(arguments))])
