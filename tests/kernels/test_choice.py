"""One predicate says which attention kernel takes which tensors, and why not a faster one."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import why_not
from svg2_compile.kernels.why_not import ATTENTIONS, AttentionChoice, capability_of, choose_attention, why_not_attention

GPU = torch.device("cuda", 0)
WAN = {"dim": 128, "clusters": 500, "keys": 75_600, "rows": 40 * 75_600}


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that sets the compute capability of a GPU that only Python sees."""

    def set_capability(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(why_not, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: None)
    set_capability(9, 0)
    return set_capability


def why_not_descriptor(dtype=torch.bfloat16, **changes):
    return why_not.why_not_descriptor(GPU, dtype, **({"dim": 128, "rows": 1} | changes))


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descriptors_take_rows_of_whole_16_bytes_up_to_dimension_128(dim, dtype, gpu):
    assert why_not_descriptor(dtype, dim=dim) is None


@pytest.mark.parametrize("dim", [0, 1, 4, 12, 100, 136, 256])
def test_descriptors_take_no_other_rows(dim, gpu):
    assert why_not_descriptor(dim=dim) == f"head dimension: a multiple of 8 and at most 128, got {dim}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descriptors_take_16_bit_types_only(dtype, gpu):
    assert why_not_descriptor(dtype) == f"{str(dtype)[6:]} has no descriptor kernel"


@pytest.mark.parametrize(("rows", "fits"), [(0, False), (1, True), (2**31 - 1, True), (2**31, False)])
def test_descriptors_count_rows_in_31_bits(rows, fits, gpu):
    assert why_not_descriptor(rows=rows) == (None if fits else f"keys of all heads: 1 to 2^31 - 1, got {rows:,}")


@pytest.mark.parametrize(
    ("capability", "fits"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 1), True)]
)
def test_descriptors_need_hopper_or_newer(capability, fits, gpu):
    gpu(*capability)
    got = ".".join(map(str, capability))
    needed = f"compute capability 9.0 or newer is needed, the GPU has {got}"
    assert why_not_descriptor() == (None if fits else needed)


def test_descriptors_need_a_gpu_and_their_module(gpu, monkeypatch):
    cpu = torch.device("cpu")
    assert why_not.why_not_descriptor(cpu, torch.float16, dim=64, rows=1) == "no kernel for the cpu"
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: name)
    assert why_not_descriptor() == "svg2_compile.kernels.block_sparse_attention_descriptor"
    name = why_not.why_not_gluon(GPU, torch.float16, dim=64, rows=1)
    assert name == "svg2_compile.kernels.block_sparse_attention_gluon"


def test_a_module_that_cannot_be_imported_is_a_reason():
    reason = why_not._why_no_module("svg2_compile.kernels.no_such_module")
    assert reason.startswith("it does not go with this Triton: No module named")
    assert why_not._why_no_module("svg2_compile.kernels.tiles") is None


def test_the_first_that_can_run_is_chosen_and_the_ones_before_it_have_reasons(gpu):
    assert choose_attention(GPU, torch.bfloat16, **WAN) == AttentionChoice("gluon", {})
    # On Hopper the pointer kernel was timed as faster than the one by descriptors.
    padded = choose_attention(GPU, torch.bfloat16, **WAN | {"dim": 80})
    assert padded == AttentionChoice("pointer", {"gluon": "head dimension: 64 or 128, got 80"})
    gpu(12, 0)
    made_for = {"gluon": "made for compute capability 9.0"}
    assert choose_attention(GPU, torch.bfloat16, **WAN) == AttentionChoice("descriptor", made_for)
    exact = choose_attention(GPU, torch.float32, **WAN)
    assert exact.implementation == "pointer"
    assert list(exact.why_not) == ["gluon", "descriptor"]


@pytest.mark.parametrize("change", [{"dim": 257}, {"clusters": 1025}, {"keys": 2**31}], ids=str)
def test_beyond_the_limits_of_all_kernels_the_reference_runs(change, gpu):
    choice = choose_attention(GPU, torch.bfloat16, **WAN | change)
    assert choice.implementation == "reference"
    assert list(choice.why_not) == ["gluon", "pointer", "descriptor"]
    assert len(set(choice.why_not.values())) == 1
    for name in ATTENTIONS:
        with pytest.raises(ValueError, match=f"^the {name} attention cannot run: .*, which takes 'reference'$"):
            choose_attention(GPU, torch.bfloat16, **WAN | change, implementation=name)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_named_attention_that_can_run_does(name, gpu):
    assert choose_attention(GPU, torch.bfloat16, **WAN, implementation=name) == AttentionChoice(name, {})


@pytest.mark.parametrize(
    ("name", "reason", "best"),
    [
        ("gluon", "made for compute capability 9.0", "pointer"),
        ("descriptor", "compute capability 9.0 or newer is needed, the GPU has 8.9", "pointer"),
    ],
)
def test_a_named_attention_that_cannot_run_is_refused_with_what_could(name, reason, best, gpu):
    gpu(8, 9)
    refusal = f"^the {name} attention cannot run: {reason}; leave the choice to 'auto', which takes '{best}'$"
    with pytest.raises(ValueError, match=refusal):
        choose_attention(GPU, torch.bfloat16, **WAN, implementation=name)


def test_an_unknown_attention_is_refused():
    known = "'auto' or one of 'gluon', 'descriptor', 'pointer', got 'triton'"
    with pytest.raises(ValueError, match=known):
        choose_attention(torch.device("cpu"), torch.float32, **WAN, implementation="triton")


@pytest.mark.parametrize("rows", [1, 2**31])
def test_the_rows_reach_the_kernels_that_count_them(rows, gpu):
    reasons = [why_not_attention(name, GPU, torch.bfloat16, dim=128, rows=rows) for name in ATTENTIONS]
    assert [reason is None for reason in reasons] == [rows == 1, rows == 1, True]


def test_a_capability_is_a_number_on_a_gpu_only(gpu):
    gpu(10, 3)
    assert capability_of(GPU) == 103
    assert capability_of(torch.device("cpu")) is None
