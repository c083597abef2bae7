"""``svg2 doctor`` says what dispatch does."""

import pytest
import torch
from typer.testing import CliRunner

from svg2_compile import doctor
from svg2_compile.cli import app
from svg2_compile.doctor import Workload, diagnose
from svg2_compile.kernels import launch, ops

GPU = torch.device("cuda", 0)


def choices(**changes):
    return {choice.op: choice for choice in diagnose(Workload(**{"device": GPU} | changes)).choices}


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as Python can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(launch, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(launch, "_why_no_gluon_module", lambda: None)
    monkeypatch.setattr(doctor, "_driver", lambda: "1.2")


def test_every_op_is_in_the_table():
    modules = set(ops.__all__) - {"cluster_tokens", "kmeans", "permute"} | {
        "cluster_tokens_",
        "kmeans_",
        "permute_tokens",
    }
    assert set(choices(device=torch.device("cpu"))) == modules


def test_nothing_is_triton_on_a_cpu():
    found = choices(device=torch.device("cpu"))
    assert {choice.implementation for choice in found.values()} == {"cpu", "sdpa"}
    assert found["kmeans_"].why_not_triton == "no kernel for the cpu"


def test_attention_is_gluon_and_the_rest_triton_on_hopper(hopper):
    found = choices()
    assert found.pop("context_attention").implementation == "sdpa"
    assert found.pop("block_sparse_attention").implementation == "gluon"
    assert {choice.implementation for choice in found.values()} == {"triton"}


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({"dim": 257}, {"cluster_tokens_", "kmeans_", "permute_tokens", "select_blocks", "block_sparse_attention"}),
        ({"clusters": 1025}, {"cluster_tokens_", "kmeans_", "sort_labels", "select_blocks", "block_sparse_attention"}),
        ({"tokens": 2**26}, {"block_sparse_attention"}),
        ({"tokens": 2**26 - 1, "dim": 256, "clusters": 1024}, set()),
        (
            {"dtype": torch.float64},
            {"cluster_tokens_", "kmeans_", "permute_tokens", "select_blocks", "block_sparse_attention"},
        ),
    ],
)
def test_the_limits_are_named_op_by_op(hopper, changes, slow):
    found = choices(**changes)
    assert {op for op, choice in found.items() if choice.implementation == "reference"} == slow
    assert all(found[op].why_not_triton for op in slow)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 80}, "head dimension: 64 or 128, got 80"),
        ({"dtype": torch.float32}, "float32 has no Gluon kernel"),
    ],
)
def test_what_gluon_cannot_take_is_triton_with_a_reason(hopper, changes, reason):
    choice = choices(**changes)["block_sparse_attention"]
    assert (choice.implementation, choice.why_not_gluon) == ("triton", reason)


def test_other_gpus_and_other_versions_of_gluon_get_triton(hopper, monkeypatch):
    monkeypatch.setattr(launch, "_why_no_gluon_module", lambda: "this Triton has another Gluon")
    assert choices()["block_sparse_attention"].why_not_gluon == "this Triton has another Gluon"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert choices()["block_sparse_attention"].why_not_gluon == "made for compute capability 9.0"


def test_an_old_gpu_and_a_missing_triton_are_named(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in choices()["sort_labels"].why_not_triton
    monkeypatch.setattr(launch, "_triton_is_installed", lambda: False)
    assert choices()["sort_labels"].why_not_triton == "triton is not installed"


def test_dispatch_asks_the_same_predicate(monkeypatch):
    from svg2_compile.kernels import block_sparse_attention, cluster_tokens, kmeans, permute, select_blocks, sort_labels

    for module in (block_sparse_attention, cluster_tokens, kmeans, permute, select_blocks, sort_labels):
        assert module.why_not_triton is doctor.why_not_triton
    assert block_sparse_attention.why_not_gluon is doctor.why_not_gluon


def test_the_command_prints_ops_versions_and_warnings():
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for word in ("kmeans_", "context_attention", "torch", "diffusers", "warning"):
        assert word in result.output


def test_an_unknown_dtype_is_refused():
    assert CliRunner().invoke(app, ["doctor", "--dtype", "int4"]).exit_code == 2
