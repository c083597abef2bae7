"""``svg2::permute_tokens`` and ``svg2::unpermute_tokens`` in Triton: the reference's bits."""

import pytest
import torch
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.permute import empty_token_major, permute_tokens_reference, unpermute_tokens_reference


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


def tokens_in(layout, batch, heads, tokens, dim, dtype):
    """Return random tokens [B, H, N, D] in one of the layouts models use, or in none of them."""
    generator = torch.Generator().manual_seed(tokens)
    if layout == "token-major":
        x = torch.randn(batch, tokens, heads, dim, generator=generator).transpose(1, 2)
    elif layout == "slice of fused qkv":
        x = torch.randn(batch, tokens, 3, heads, dim, generator=generator)[:, :, 1].transpose(1, 2)
    elif layout == "transposed rows":
        x = torch.randn(batch, heads, dim, tokens, generator=generator).transpose(2, 3)
    else:
        x = torch.randn(batch, heads, tokens, dim, generator=generator)
    return x.to(device=DEVICE, dtype=dtype)


def random_order(batch, heads, tokens):
    return torch.rand(batch, heads, tokens).argsort(-1).int().to(DEVICE)


@runs_kernels
def test_a_row_that_is_not_written_is_no_number():
    from svg2_compile.kernels.permute_triton import unpermute_tokens_triton

    x = tokens_in("contiguous", 1, 1, 65, 16, torch.float32)
    order = torch.arange(65, dtype=torch.int32, device=DEVICE).view(1, 1, 65).clamp(max=63)  # nothing goes to the last
    rows = unpermute_tokens_triton(x, order)[0, 0]
    assert torch.equal(rows[:63], x[0, 0, :63]) and rows[64].isnan().all()


LAYOUTS = ["contiguous", "token-major", "slice of fused qkv", "transposed rows"]


@runs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (15, 128), (65, 80), (64, 1), (257, 64), (63, 256)])
def test_both_directions_equal_the_reference(tokens, dim, dtype, layout):
    from svg2_compile.kernels.permute_triton import permute_tokens_triton, unpermute_tokens_triton

    x = tokens_in(layout, 2, 3, tokens, dim, dtype)
    order = random_order(2, 3, tokens)
    there, back = permute_tokens_triton(x, order), unpermute_tokens_triton(x, order)
    assert torch.equal(there, permute_tokens_reference(x, order))
    assert torch.equal(back, unpermute_tokens_reference(x, order))
    assert there.is_contiguous()
    assert back.stride() == empty_token_major(x).stride()


@runs_kernels
@pytest.mark.parametrize("scatter", [False, True])
def test_every_element_is_written(scatter):
    from svg2_compile.kernels.permute_triton import _move_rows

    x = tokens_in("token-major", 2, 3, 257, 80, torch.float32)
    y = empty_token_major(x).fill_(float("nan"))
    assert not _move_rows(x, random_order(2, 3, 257), y, scatter).isnan().any()


@runs_kernels
def test_strided_order_and_no_tokens():
    from svg2_compile.kernels.permute_triton import permute_tokens_triton

    x = tokens_in("contiguous", 2, 3, 65, 16, torch.float32)
    order = random_order(2, 3, 65).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(permute_tokens_triton(x, order), permute_tokens_reference(x, order))
    assert permute_tokens_triton(x[:, :, :0], order[:, :, :0]).shape == (2, 3, 0, 16)
