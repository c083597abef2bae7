"""``svg2::dense_attention`` is PyTorch's attention, bit for bit, and opaque."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile.kernels.ops  # noqa: F401  (registers the ops)

GENERATOR = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(2, n, 4, d, generator=GENERATOR).transpose(1, 2) for n, d in ((7, 8), (9, 8), (9, 6)))
MASK = torch.rand(2, 1, 7, 9, generator=GENERATOR) < 0.7
CASES = {
    "plain": (QUERY, KEY, VALUE, None, 0.0, False, None, False),
    "masked": (QUERY, KEY, VALUE, MASK, 0.0, False, 0.3, False),
    "additive mask": (QUERY, KEY, VALUE, torch.randn(7, 9, generator=GENERATOR), 0.0, False, None, False),
    "causal": (QUERY, QUERY, QUERY, None, 0.0, True, None, False),
    "grouped": (QUERY, KEY[:, :2], VALUE[:, :2], None, 0.0, False, None, True),
    "three axes": (QUERY[0], KEY[0], VALUE[0], None, 0.0, False, None, False),
    "contiguous": (*(x.contiguous() for x in (QUERY, KEY, KEY)), None, 0.0, False, None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_output_is_pytorchs_own(case):
    *tensors, mask, dropout, causal, scale, gqa = CASES[case]
    wanted = scaled_dot_product_attention(*tensors, mask, dropout, causal, scale=scale, enable_gqa=gqa)
    out = torch.ops.svg2.dense_attention(*CASES[case])
    assert torch.equal(out, wanted)
    assert (out.transpose(-2, -3) if out.dim() == 4 else out).is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_the_op_keeps_its_contract(case):
    torch.library.opcheck(torch.ops.svg2.dense_attention.default, CASES[case])


def test_no_compiler_sees_inside():
    graph = make_fx(torch.ops.svg2.dense_attention)(*CASES["masked"]).graph
    (call,) = [node for node in graph.nodes if node.op == "call_function"]
    assert call.target is torch.ops.svg2.dense_attention.default
