"""Settings take effect when they change, equal ones cost nothing, and the end of recompilation is told."""

import functools
import logging
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import svg2_compile
from svg2_compile.backend import svg2_backend
from svg2_compile.options import configure
from svg2_compile.passes.errors import UnsupportedError
from svg2_compile.region import Region

WIDTH = 16
BASE = {"dense_steps": 0, "dense_layers": 0, "min_tokens": 64, "lowering": "eager"}
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(4 * q, 4 * k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, timestep):
        x = x + timestep[:, None, None] / 1000
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    svg2_compile.reset()
    with configure():
        yield
    torch._dynamo.reset()


def made():
    torch.manual_seed(0)
    return DiT().eval()


def run(model, tokens=256):
    """Run one generation of one step, and return the report."""
    svg2_compile.reset()
    x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(x, torch.tensor([1000.0]))
    return svg2_compile.report(model)


def whole(model, **arguments):
    model.compile(backend="svg2", **arguments)
    return model


def by_blocks(model, **arguments):
    for block in model.blocks:
        block.compile(backend="svg2", **arguments)
    return model


def wrapped(model, **arguments):
    return torch.compile(model, backend=svg2_backend, **arguments)


WAYS = pytest.mark.parametrize("way", [whole, by_blocks, wrapped])


@pytest.fixture
def graphs():
    """How many graphs were compiled, since it was asked last."""
    known = set(Region.instances)

    def new():
        found = set(Region.instances) - known
        known.update(found)
        return len(found)

    return new


@WAYS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_changed_default_takes_effect_and_one_that_is_back_costs_nothing(way, fullgraph, graphs):
    with configure(**BASE):
        model = way(made(), fullgraph=fullgraph)
        densities, compiled = [], []
        for top_p in (0.95, 0.2, 0.95, 0.2):
            with configure(top_p=top_p):
                densities.append(run(model).density)
            compiled.append(graphs())
    assert densities[0] == densities[2] > densities[1] + 0.1 and densities[1] == densities[3]
    assert compiled[0] == compiled[1] > 0 and compiled[2:] == [0, 0]


@WAYS
def test_a_default_is_changed_for_good_without_a_block(way):
    configure(**BASE, top_p=0.95)
    model = way(made())
    before = run(model).density
    configure(top_p=0.2)
    assert run(model).density < before - 0.1


def test_equal_settings_and_those_that_options_give_compile_nothing_again(graphs):
    model = whole(made(), options=BASE | {"top_p": 0.5})
    run(model)
    assert graphs() == 1
    for fields in ({"top_p": 0.1}, {"lowering": "inductor"}, {"min_keep_ratio": 0.1}, {"min_tokens": 10**6}):
        with configure(**fields):
            run(model)
    assert graphs() == 0
    with configure(min_keep_ratio=0.9):
        run(model)
    assert graphs() == 1


def test_a_count_of_steps_is_not_mistaken_for_a_share_of_them(graphs):
    base = {name: value for name, value in BASE.items() if name != "dense_steps"}
    model = whole(made(), options=base)
    with configure(dense_steps=1):
        assert not run(model).sparse_sites[0].sparse_calls
    with configure(dense_steps=1.0):
        run(model)
    assert graphs() == 2


def test_what_was_dense_becomes_sparse_when_the_default_that_made_it_so_changes():
    with configure(**BASE | {"min_tokens": 10_000}):
        model = whole(made())
        assert not run(model).sparse_sites
        with configure(min_tokens=64):
            assert run(model).density


def test_a_block_of_settings_can_be_entered_again():
    model = whole(made(), options={name: value for name, value in BASE.items() if name != "min_tokens"})
    sparse = configure(min_tokens=64)
    with sparse:
        assert run(model).density
    assert not any(site.sparse_calls for site in run(model).sites)
    with sparse as options:
        assert options.sparse.min_tokens == 64 and run(model).density
    assert not any(site.sparse_calls for site in run(model).sites)


@WAYS
def test_more_settings_than_dynamo_has_places_take_effect_all_the_same(way, limit, graphs):
    model = way(made(), dynamic=False)
    with configure(**BASE):
        for top_p in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            with configure(top_p=top_p):
                assert 0 < run(model).density <= top_p + 0.2
                assert graphs() > 0
                assert run(model).density and not graphs()


def test_a_setting_finds_places_for_as_many_sizes_as_the_one_before(limit):
    model = whole(made(), dynamic=False)
    for top_p in (0.2, 0.3, 0.4):
        with configure(**BASE, top_p=top_p):
            for tokens in sizes(2):
                assert run(model, tokens).density


def test_a_default_that_the_options_give_drops_no_graphs(graphs):
    with configure(**BASE):
        run(by_blocks(made()))  # whose concern it is
    graphs()
    model = whole(made(), options={**BASE, "top_p": 0.5}, dynamic=False)
    first, second = sizes(2)
    for tokens in (first, second):
        run(model, tokens)
    with configure(seed=1):
        run(model, first)
        assert graphs() == 3
        # it has no place left now, and one size less in this setting than in the one before
        with torch._dynamo.config.patch(recompile_limit=3), configure(top_p=0.8):
            assert run(model, first).density and not graphs()


def test_what_ran_is_told_after_its_graphs_were_dropped(limit):
    model = whole(made(), dynamic=False)
    for top_p in (0.2, 0.3, 0.4, 0.5):
        with configure(**BASE, top_p=top_p):
            density = run(model).density
        assert density and svg2_compile.report(model).density == density


def test_what_was_compiled_before_dynamo_was_reset_takes_no_place(limit, graphs):
    model = whole(made(), dynamic=False)
    for _ in range(limit + 1):
        torch._dynamo.reset()
        with configure(**BASE, top_p=0.2):
            run(model)
    with configure(**BASE, top_p=0.3):
        run(model)
    graphs()
    with configure(**BASE, top_p=0.2):
        run(model)
    assert not graphs()


def test_a_change_that_concerns_nobody_drops_nothing(limit, graphs):
    model = whole(made(), options=BASE | {"top_p": 0.4}, dynamic=False)
    for tokens in sizes(limit):
        run(model, tokens)
    graphs()
    with configure(top_p=0.2):
        for tokens in sizes(limit):
            assert run(model, tokens).density
    assert not graphs()


def test_the_clusters_follow_the_size_whatever_ran_before():
    model, found = whole(made(), options=BASE), {}
    for tokens in (3000, 4800, 3000, 3900, 4800, 3000):
        plan = run(model, tokens).sparse_sites[0].plan
        assert found.setdefault(tokens, plan) == plan
    torch._dynamo.reset()
    assert {tokens: run(model, tokens).sparse_sites[0].plan for tokens in found} == found


def sizes(count):
    return [256 + 16 * number for number in range(count)]


@pytest.fixture
def limit():
    with torch._dynamo.config.patch(recompile_limit=3):
        yield 3


@WAYS
def test_the_report_says_when_no_further_size_is_compiled(way, limit):
    model = way(made(), options=BASE, dynamic=False)
    for tokens in sizes(limit - 1):
        assert not run(model, tokens).exhausted
    last, beyond = (run(model, tokens) for tokens in sizes(limit + 1)[-2:])
    assert last.sparse_sites and not beyond.sparse_sites
    for report in (last, beyond):
        (line,) = report.exhausted
        assert "torch._dynamo.config.recompile_limit" in line and "dense" in line and line in str(report)


@WAYS
def test_the_first_call_that_runs_dense_for_want_of_a_place_warns_once(way, limit, caplog):
    model, expected = way(made(), options=BASE, dynamic=False), made()
    for tokens in sizes(limit):
        run(model, tokens)
    assert not [each for each in caplog.records if "allows; Dynamo" in each.getMessage()]
    for tokens in (1024, 1088):
        x, timestep = torch.randn(1, tokens, WIDTH), torch.tensor([500.0])
        with torch.no_grad():
            torch.testing.assert_close(model(x, timestep), expected(x, timestep))
    (record,) = [each for each in caplog.records if "allows; Dynamo" in each.getMessage()]
    assert record.levelname == "WARNING"
    assert f"compiled {limit} times" in record.getMessage()
    assert "torch._dynamo.config.recompile_limit" in record.getMessage()


def test_a_class_is_told_of_its_own_code_only(limit):
    class Other(DiT):
        def forward(self, x, timestep):
            return -super().forward(x, timestep)

    class Same(DiT):
        pass

    for tokens in sizes(limit):
        run(whole(made(), options=BASE, dynamic=False), tokens)
    assert not run(whole(Other().eval(), options=BASE)).exhausted
    assert run(whole(Same().eval(), options=BASE)).exhausted


@WAYS
@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_size_that_would_run_dense_is_an_error_for_who_asked_to_be_told(way, fullgraph, limit):
    options = BASE | {"on_unsupported": "error"}
    model = way(made(), options=options, dynamic=False, fullgraph=fullgraph)
    for tokens in sizes(limit):
        assert run(model, tokens).density
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"3 times.*torch\._dynamo\.config\.recompile_limit higher"):
            run(model, 1024)
    assert run(model, sizes(1)[0]).density
    with torch._dynamo.config.patch(recompile_limit=4):
        assert run(model, 1024).density


def test_the_error_is_asked_for_by_configure_or_by_a_backend_around_ours_too(limit):
    with configure(**BASE, on_unsupported="error"):
        model = whole(made(), dynamic=False)
        for tokens in sizes(limit):
            run(model, tokens)
        with pytest.raises(UnsupportedError):
            run(model, 1024)
    torch._dynamo.reset()
    model = made()
    around = functools.partial(svg2_backend, options=BASE | {"on_unsupported": "error"})
    model.compile(backend=around, dynamic=False)
    for tokens in sizes(limit):
        run(model, tokens)
    with pytest.raises(UnsupportedError):
        run(model, 1024)


def test_a_second_model_of_the_class_asks_for_itself(limit):
    first = whole(made(), options=BASE, dynamic=False)
    for tokens in sizes(limit):
        run(first, tokens)
    second = whole(made(), options=BASE | {"on_unsupported": "error"}, dynamic=False)
    with pytest.raises(UnsupportedError):
        run(second, 1024)
    assert not run(first, 1024).sparse_sites


@pytest.mark.skipif("recompile_limit" not in signature(torch.compile).parameters, reason="a limit of torch 2.13")
def test_the_limit_of_torch_compile_itself_is_named():
    model = whole(made(), options=BASE, dynamic=False, recompile_limit=2)
    for tokens in sizes(2):
        report = run(model, tokens)
    assert "torch.compile(recompile_limit=...)" in report.exhausted[0]


def test_the_limit_of_all_graphs_is_named():
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        model = whole(made(), options=BASE | {"on_unsupported": "error"}, dynamic=False)
        for tokens in sizes(2):
            report = run(model, tokens)
        assert "torch._dynamo.config.accumulated_recompile_limit" in report.exhausted[0]
        with pytest.raises(UnsupportedError, match="accumulated"):
            run(model, 1024)


def test_the_limit_of_another_backends_code_is_none_of_ours(limit):
    run(whole(made(), options=BASE | {"on_unsupported": "error"}))
    torch._dynamo.reset()
    model = made()
    model.compile(backend="eager", dynamic=False)
    for tokens in sizes(limit + 2):
        run(model, tokens)
