"""A model that is compiled for several sizes: its report tells what each of them is, and adds them up."""

from __future__ import annotations

import pytest
import torch
from loop_cases import CHANNELS, OPTIONS, Dit

import svg2_compile


def generated(model: Dit, tokens: int, steps: int) -> None:
    text = torch.randn(1, 1, CHANNELS)
    for step in range(steps):
        model(torch.randn(1, tokens, CHANNELS), torch.tensor([900.0 - 100 * step]), text)


def compiled(way: str) -> Dit:
    model = Dit().eval()
    for part in (model,) if way == "whole" else model.blocks:
        part.compile(backend="svg2", options=OPTIONS | {"dense_steps": 1}, dynamic=False)
    return model


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_each_size_has_its_own_plan_calls_and_density(way):
    model = compiled(way)
    for tokens, steps in ((96, 3), (160, 4), (96, 5), (40, 2)):
        generated(model, tokens, steps)
    report = svg2_compile.report(model)
    assert len(report.sites) == 2
    for site in report.sites:
        small, large, short = site.plans
        assert [each.shape for each in site.plans] == ["1×1×96×16", "1×1×160×16", ""]
        assert [each.sparse for each in site.plans] == [True, True, False]
        assert (small.sparse_calls, large.sparse_calls) == (2 + 4, 3)
        assert (small.dense_calls, large.dense_calls) == (2, 1)
        assert short.plan == "short: 40 tokens"
        assert all(each.density is not None and 0 < each.density <= 1 for each in (small, large))
    text = str(report)
    assert all(text.count(f"of these: {words}") == 2 for words in ("1×1×96×16", "1×1×160×16", "dense: short"))


@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_what_was_let_go_stays_with_its_size():
    model = compiled("whole")
    for _ in range(3):
        for tokens in (96, 160):  # each lets the states of the generations before it go
            generated(model, tokens, 2)
            generated(model, tokens, 3)
    (site, _) = svg2_compile.report(model).sites
    assert [(each.sparse_calls, each.dense_calls) for each in site.plans] == [(9, 6), (9, 6)]
    assert site.sparse_calls == 18
    assert site.dense_calls == 12


@pytest.mark.usefixtures("no_grad_and_a_fresh_start")
def test_one_size_needs_no_plans():
    model = compiled("whole")
    generated(model, 96, 3)
    report = svg2_compile.report(model)
    assert all(site.plans == () for site in report.sites)
    assert "of these" not in str(report)
