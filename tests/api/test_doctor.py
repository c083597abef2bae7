"""``svg2 doctor`` says what dispatch does."""

import pytest
import torch
from typer.testing import CliRunner

from svg2_compile import doctor
from svg2_compile.cli import app
from svg2_compile.doctor import Workload, diagnose
from svg2_compile.kernels import why_not
from svg2_compile.kernels.ops import CARDS

GPU = torch.device("cuda", 0)


def choices(**changes):
    return {choice.op: choice for choice in diagnose(Workload(**{"device": GPU} | changes)).choices}


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as Python can tell."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(why_not, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: None)
    monkeypatch.setattr(doctor, "_driver", lambda: "1.2")


def test_every_op_is_in_the_table():
    assert set(choices(device=torch.device("cpu"))) == set(CARDS)


def test_nothing_is_triton_on_a_cpu():
    found = choices(device=torch.device("cpu"))
    assert {choice.implementation for choice in found.values()} == {"cpu", "sdpa", "pytorch"}
    assert found["kmeans_"].why_not == {"triton": "no kernel for the cpu"}
    assert found["block_sparse_attention"].why_not == dict.fromkeys(why_not.ATTENTIONS, "no kernel for the cpu")
    assert found["context_attention"].why_not == {}


def test_attention_is_gluon_and_the_rest_triton_on_hopper(hopper):
    found = choices()
    without_kernels = {op: found.pop(op).implementation for op, card in CARDS.items() if card.kernels is None}
    assert without_kernels == {
        "context_attention": "sdpa",
        "dense_attention": "sdpa",
        "gram": "pytorch",
        "judge_heads_": "pytorch",
        "least_keys_": "pytorch",
        "keep_dense_heads_": "pytorch",
        "key_mask": "pytorch",
        "redo_densely_": "sdpa",
    }
    assert found.pop("block_sparse_attention").implementation == "gluon"
    assert [found.pop(op).implementation for op in ("cluster_tokens_", "kmeans_")] == ["triton, gluon"] * 2
    assert {choice.implementation for choice in found.values()} == {"triton"}
    assert not any(choice.why_not for choice in found.values())


def test_clustering_says_why_gluon_does_not_assign(hopper):
    found = choices(dim=80)
    assert found["kmeans_"].implementation == "triton"
    assert found["cluster_tokens_"].why_not == {"gluon": "head dimension: 64 or 128, got 80"}
    assert found["permute_tokens"].why_not == {}


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        (
            {"dim": 257},
            {
                "cluster_tokens_",
                "kmeans_",
                "permute_tokens",
                "unpermute_tokens",
                "block_masses",
                "block_errors",
                "block_masses_by_keys",
                "select_blocks",
                "block_sparse_attention",
                "cluster_means",
                "log_dropped_weights",
                "measure_recall",
                "probe_rows",
                "repair_rows_",
            },
        ),
        (
            {"clusters": 1025},
            {
                "cluster_tokens_",
                "kmeans_",
                "sort_labels",
                "block_masses",
                "select_blocks",
                "log_dropped_sizes",
                "block_sparse_attention",
            },
        ),
        ({"tokens": 2**31}, {"block_sparse_attention"}),
        ({"tokens": 2**31 - 2, "dim": 256, "clusters": 1024}, set()),
        (
            {"dtype": torch.float64},
            {
                "cluster_tokens_",
                "kmeans_",
                "permute_tokens",
                "unpermute_tokens",
                "block_masses",
                "block_errors",
                "block_masses_by_keys",
                "select_blocks",
                "block_sparse_attention",
                "cluster_means",
                "log_dropped_weights",
                "measure_recall",
                "probe_rows",
                "repair_rows_",
            },
        ),
    ],
)
def test_the_limits_are_named_op_by_op(hopper, changes, slow):
    found = choices(**changes)
    assert {op for op, choice in found.items() if choice.implementation == "reference"} == slow
    assert all(found[op].why_not for op in slow)


@pytest.mark.parametrize(
    ("changes", "runs", "reasons"),
    [
        ({"dim": 80}, "pointer", {"gluon": "head dimension: 64 or 128, got 80"}),
        ({"dtype": torch.float32}, "pointer", {"gluon": "float32 has no Gluon kernel"}),
        ({"dim": 100}, "pointer", {"gluon": "head dimension: 64 or 128, got 100"}),
    ],
    ids=str,
)
def test_the_fastest_attention_that_can_runs_with_a_reason_against_each_faster_one(hopper, changes, runs, reasons):
    choice = choices(**changes)["block_sparse_attention"]
    assert (choice.implementation, choice.why_not) == (runs, reasons)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 0), "pointer"), ((8, 9), "pointer"), ((9, 0), "gluon"), ((10, 0), "descriptor"), ((12, 0), "descriptor")],
)
def test_every_generation_has_its_fastest_attention(hopper, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choices()["block_sparse_attention"]
    assert choice.implementation == runs
    old = f"compute capability 9.0 or newer is needed, the GPU has {capability[0]}.{capability[1]}"
    made_for_hopper = {} if runs == "gluon" else {"gluon": "made for compute capability 9.0"}
    assert choice.why_not == made_for_hopper | ({"descriptor": old} if runs == "pointer" else {})


def test_a_module_that_does_not_go_with_this_triton_is_passed_over(hopper, monkeypatch):
    reason = "it does not go with this Triton"
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: reason if name.endswith("_gluon") else None)
    choice = choices()["block_sparse_attention"]
    assert (choice.implementation, choice.why_not) == ("pointer", {"gluon": reason})
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: reason)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    choice = choices()["block_sparse_attention"]
    assert choice.implementation == "pointer"
    assert choice.why_not == {"gluon": "made for compute capability 9.0", "descriptor": reason}


def test_an_old_gpu_and_a_missing_triton_are_named(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0" in choices()["sort_labels"].why_not["triton"]
    assert set(choices()["block_sparse_attention"].why_not) == set(why_not.ATTENTIONS)
    monkeypatch.setattr(why_not, "_triton_is_installed", lambda: False)
    assert choices()["sort_labels"].why_not == {"triton": "triton is not installed"}


def test_a_reason_is_printed_once_for_all_that_it_holds_back():
    words = doctor.reasons_in_words({"gluon": "too old", "descriptor": "too old", "pointer": "too new"})
    assert words == "gluon, descriptor: too old\npointer: too new"
    assert doctor.reasons_in_words({}) == "–"


def test_dispatch_asks_the_same_predicate(monkeypatch):
    from svg2_compile.kernels import block_sparse_attention, op

    assert op.why_not_triton is doctor.why_not_triton
    assert doctor.choose_attention is why_not.choose_attention is block_sparse_attention.choose_attention


def test_the_command_prints_ops_versions_and_warnings():
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for word in ("kmeans_", "context_attention", "torch", "diffusers", "warning", "no kernel for the cpu"):
        assert word in result.output


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "mps"])
def test_a_device_that_is_not_here_is_refused_and_those_here_are_named(device):
    result = CliRunner().invoke(app, ["doctor", "--device", device])
    assert result.exit_code == 2
    assert "must be auto or one of cpu" in result.output and device in result.output


def test_a_failure_of_ours_is_not_taken_for_a_wrong_device(monkeypatch):
    def fail(workload):
        raise RuntimeError("ours")

    monkeypatch.setattr(doctor, "check", fail)
    assert isinstance(CliRunner().invoke(app, ["doctor", "--device", "cpu"]).exception, RuntimeError)


def test_an_unknown_dtype_is_refused():
    assert CliRunner().invoke(app, ["doctor", "--dtype", "int4"]).exit_code == 2
