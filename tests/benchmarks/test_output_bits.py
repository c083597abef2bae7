"""The record of bits: the same for the same tensors, and a difference is never passed over."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "models"
ENVIRONMENT = {"device": "a processor", "torch": "2.13.0"}


@pytest.fixture
def bits(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("output_bits")


@pytest.fixture
def record(bits):
    outputs = {"call 1": torch.arange(6.0), "call 2": torch.zeros(2, 3, dtype=torch.bfloat16)}
    found = {name: bits.recorded(bits.Case(name, lambda: outputs)) for name in ("model/one", "model/two", "aot/block")}
    return {"environment": ENVIRONMENT, "cases": found}


def test_equal_records_are_the_same(bits, record, capsys):
    assert bits.compare(record, copy.deepcopy(record), ["*"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[2:] == ["| model | 2 | 4 | 0 |", "| aot | 1 | 2 | 0 |", "every bit is the same"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cases: cases["model/two"]["call 2"].update(sha256="0" * 64), "model/two: call 2: "),
        (lambda cases: cases["model/two"]["call 2"].update(shape=[3, 2]), "bfloat16 [2, 3] and "),
        (lambda cases: cases["model/two"].pop("call 2"), "and missing"),
        (lambda cases: cases.pop("model/two"), "model/two: only in the first record"),
        (lambda cases: cases.update({"model/two": {"error": "x"}}), "model/two: failed in the second record: x"),
        (lambda cases: cases.update({"model/three": {}}), "model/three: only in the second record"),
    ],
)
def test_whatever_differs_is_told_and_is_an_error(bits, record, capsys, change, said):
    other = copy.deepcopy(record)
    change(other["cases"])
    assert bits.compare(record, other, ["*"]) == 1
    printed = capsys.readouterr().out
    assert said in printed and "NOT THE SAME" in printed
    assert bits.compare(record, other, ["aot/*"]) == 0


def test_two_failures_are_not_the_same(bits, record):
    record["cases"]["model/one"] = {"error": "x"}
    assert bits.compare(record, copy.deepcopy(record), ["*"]) == 1


def test_nothing_compared_is_an_error(bits, record):
    assert bits.compare(record, record, ["no such case"]) == 1


def test_a_case_that_fails_is_recorded_with_its_error(bits):
    def run():
        raise ValueError("no\nsecond line")

    assert bits.recorded(bits.Case("a", run)) == {"error": "ValueError: no"}


def test_one_bit_changes_the_digest_and_the_layout_in_memory_does_not(bits):
    x = torch.randn(4, 5)
    other = x.clone()
    other.view(torch.int32)[1, 2] ^= 1
    assert bits.bits_of(x) == bits.bits_of(x.t().contiguous().t()) != bits.bits_of(other)
    assert bits.bits_of(torch.zeros(1)) != bits.bits_of(-torch.zeros(1))


def test_a_case_gives_the_same_bits_again_and_depends_on_its_state(bits):
    case = bits.Case("export/block", bits.exported_block)
    first, again = bits.recorded(case), bits.recorded(case)
    assert first == again and len({each["sha256"] for name, each in first.items() if name.startswith("call")}) == 3
    assert "svg2_0_q_centroids" in first


def test_every_case_has_a_name_of_its_own_and_every_model_of_the_suite_has_one(bits, monkeypatch):
    from conformance.cases import CASES

    monkeypatch.setattr(sys, "path", list(sys.path))
    names = [case.name for case in bits.cases(bits.TESTS)]
    assert len(names) == len(set(names))
    assert {f"model/{case.id}" for case in CASES} <= set(names)
