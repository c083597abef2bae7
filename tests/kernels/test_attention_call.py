"""The three attention kernels are launched with what the op was given, each argument in its place."""

from __future__ import annotations

import importlib

import pytest
import torch

from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.why_not import ATTENTIONS

pytest.importorskip("triton", reason="Triton is not installed")

TILES = AttentionTiles(block_m=128, block_n=128, piece=16, num_warps=8, num_stages=2)
BATCH, HEADS, K_HEADS, TOKENS, K_TOKENS, DIM, CONTEXT = 2, 6, 3, 40, 48, 64, 8
Q_CLUSTERS, RUNS, TILE_SLOTS = 4, 5, 7


def arguments(**changes):
    """Return those of the op before the scale, by name."""
    given = {
        "q": torch.randn(BATCH, HEADS, TOKENS, DIM, dtype=torch.float16),
        "k": torch.randn(BATCH, K_HEADS, K_TOKENS, DIM, dtype=torch.float16),
        "v": torch.randn(BATCH, K_HEADS, K_TOKENS, DIM, dtype=torch.float16),
        "q_sizes": torch.full((BATCH, HEADS, Q_CLUSTERS), 10, dtype=torch.int32),
        "runs": torch.zeros(BATCH, HEADS, Q_CLUSTERS, RUNS, 2, dtype=torch.int32),
        "counts": torch.zeros(BATCH, HEADS, Q_CLUSTERS, 4, dtype=torch.int32),
        "context_k": torch.randn(BATCH, K_HEADS, CONTEXT, DIM, dtype=torch.float16),
        "context_v": torch.randn(BATCH, K_HEADS, CONTEXT, DIM, dtype=torch.float16),
        "context_mask": torch.ones(BATCH, 1, 1, CONTEXT, dtype=torch.bool),
        "q_order": torch.arange(TOKENS, dtype=torch.int32).expand(BATCH, HEADS, TOKENS),
        "scale": 0.5,
    }
    return given | changes


WITHOUT_CONTEXT = dict.fromkeys(("context_k", "context_v", "context_mask"))


def call_of(**changes):
    from svg2_compile.kernels.attention_call import AttentionCall

    return AttentionCall.of(**arguments(**changes), tiles=TILES)


@pytest.fixture(params=ATTENTIONS)
def launch(request, monkeypatch):
    """Return a function that calls a launcher and returns its results, and its kernel's arguments by name."""
    from svg2_compile.kernels import attention_call

    module = importlib.import_module(f"svg2_compile.kernels.block_sparse_attention_{request.param}")
    name = f"attention_{request.param}_kernel"
    names = getattr(module, name).arg_names
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *values, **options: launches.append((grid, values, options))

    monkeypatch.setattr(module, name, Kernel())
    query_tiles = torch.zeros(BATCH, HEADS, TILE_SLOTS, 3, dtype=torch.int32)
    monkeypatch.setattr(attention_call, "query_tiles_triton", lambda *_: query_tiles)

    def launch(**changes):
        launches.clear()
        tiles = {} if request.param == "gluon" else {"tiles": TILES}
        results = getattr(module, module.__name__.rpartition(".")[2])(**arguments(**changes), **tiles)
        if not launches:
            return results, None
        ((grid, values, options),) = launches
        assert grid == (BATCH * HEADS * TILE_SLOTS,)
        assert set(names[len(values) :]) == options.keys() - {"num_warps", "num_stages"}
        return results, dict(zip(names, values)) | options

    return launch


def strides_of(x, name):
    return {f"stride_{name}_{axis}": stride for axis, stride in zip("bhn", x.stride())}


@pytest.mark.parametrize("context", [{}, WITHOUT_CONTEXT], ids=["context", "no context"])
@pytest.mark.parametrize("q_order", [{}, {"q_order": None}], ids=["order", "no order"])
def test_every_argument_is_in_its_place(launch, context, q_order):
    given = arguments(**context, **q_order)
    (out, lse), told = launch(**given)
    expected = {"heads": HEADS, "repeats": HEADS // K_HEADS, "tokens": TOKENS, "k_tokens": K_TOKENS}
    expected |= {"context": 0 if context else CONTEXT, "q_clusters": Q_CLUSTERS, "tile_slots": TILE_SLOTS}
    expected |= {"run_slots": RUNS, "stride_mask_b": CONTEXT, "DIM": DIM}
    expected |= {
        "HAS_CONTEXT": not context,
        "HAS_CONTEXT_MASK": not context,
        "scale_log2": 0.5 / torch.log(torch.tensor(2.0)).item(),
    }
    if context:
        expected.pop("stride_mask_b")
    for name, tensor in (("q", given["q"]), ("k", given["k"]), ("v", given["v"]), ("out", out)):
        expected |= strides_of(tensor, name)
    for name, stand_in in (("k", "k"), ("v", "v")):
        tensor = given[stand_in if context else f"context_{name}"]
        expected |= strides_of(tensor, f"c{name}")
    assert {name: told[name] for name in expected if name in told} == pytest.approx(
        {name: value for name, value in expected.items() if name in told}
    )
    for name, tensor in (("q_ptr", given["q"]), ("k_ptr", given["k"]), ("v_ptr", given["v"])):
        assert name not in told or torch.equal(told[name].reshape(tensor.shape), tensor)
    assert told["out_ptr"] is out and told["lse_ptr"] is lse
    assert (told["order_ptr"] is None) == (given["q_order"] is None)
    assert told["runs_ptr"].dtype in (torch.int64, torch.int32)


def test_nothing_is_launched_for_no_queries(launch):
    (out, lse), told = launch(q=torch.empty(BATCH, HEADS, 0, DIM), q_order=None)
    assert told is None
    assert out.shape == (BATCH, HEADS, 0, DIM) and lse.shape == (BATCH, HEADS, 0)


@pytest.mark.parametrize("scale", [0.5, -0.5, 0.0])
def test_no_kernel_sees_a_scale_that_is_not_above_zero(scale):
    given = arguments()
    call = call_of(q=given["q"], scale=scale)
    assert call.scale > 0
    assert torch.equal(call.q * call.scale, given["q"] * scale)


def test_an_empty_context_is_none():
    empty = {"context_k": torch.empty(BATCH, K_HEADS, 0, DIM), "context_v": torch.empty(BATCH, K_HEADS, 0, DIM)}
    call = call_of(**empty, context_mask=torch.empty(BATCH, 1, 1, 0, dtype=torch.bool))
    assert call.context == 0 and call.context_mask is None
    assert call.context_k is call.k and call.context_v is call.v and call.mask_or_stand_in is call.counts


def test_rows_of_any_stride_become_plain_ones_and_plain_ones_stay_where_they_are():
    given = arguments()
    call = call_of(**{name: given[name].mT.contiguous().mT for name in ("q", "k", "v", "context_k", "context_v")})
    for rows in (call.q, call.k, call.v, call.context_k, call.context_v):
        assert rows.stride(-1) == 1
    plain = call_of(**given)
    for name in ("q", "k", "v", "context_k", "context_v"):
        assert getattr(plain, name) is given[name]


def test_a_mask_is_bytes_and_of_one_batch_entry_has_no_stride(launch):
    _, told = launch(context_mask=torch.ones(1, 1, 1, CONTEXT, dtype=torch.bool))
    assert told["context_mask_ptr"].dtype == torch.uint8 and told["stride_mask_b"] == 0


def test_both_ends_of_a_run_are_one_number():
    runs = torch.randint(0, 2**30, (BATCH, HEADS, Q_CLUSTERS, RUNS, 2), dtype=torch.int32)
    packed = call_of(runs=runs).packed_runs.squeeze(-1)
    assert torch.equal(packed & 0xFFFFFFFF, runs[..., 0].long()) and torch.equal(packed >> 32, runs[..., 1].long())
