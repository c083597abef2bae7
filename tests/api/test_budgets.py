"""``budgets``: layers and heads keep what a file says, however the model is compiled, and nothing else changes."""

import json
import os

import pytest
import torch
from budgets_cases import budgets_for_models, write_for
from torch import nn
from typer.testing import CliRunner

import svg2_compile
from svg2_compile import denoise_step, svg2_backend, tiny_wan
from svg2_compile.cli import app
from svg2_compile.explaining.tracing import explain
from svg2_compile.options import split_options
from svg2_compile.passes.budgets import AttentionBudgets
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.read_budgets import write_budgets
from svg2_compile.passes.sparsify import sparsify

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

HEADS, TOKENS, WIDTH = 2, 96, 32
OPTIONS = {"min_tokens": 64, "dense_layers": 0, "dense_steps": 0, "q_clusters": 4, "k_clusters": 8, "lowering": "eager"}
OPTIONS |= {"top_p": 0.6, "min_keep_ratio": 0.3}
PATHS = ("blocks.0.attn", "blocks.1.attn")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(x)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x)


def tokens(step=0):
    return 3 * torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def of(path, *shares, **more):
    return AttentionBudgets(path, HEADS, tuple(shares) or None, **more)


DIFFERENT = of(PATHS[0], 0.2, 1.0), of(PATHS[1], 0.9, 0.4)


def as_a_whole(model, **options):
    return torch.compile(model, backend="svg2", options=OPTIONS | options, fullgraph=True)


def block_by_block(model, **options):
    for block in model.blocks:
        block.compile(backend="svg2", options=OPTIONS | options, fullgraph=True)
    return model


compilations = pytest.mark.parametrize("compiled", [as_a_whole, block_by_block])


def generate(model, generation="one", steps=2):
    outputs = []
    for step in range(steps):
        with denoise_step(step, steps, generation):
            outputs.append(model(tokens(step)))
    return torch.stack(outputs)


def in_force(model):
    """Return the share of every head, by attention."""
    return {site.path: site.more["budgets"].top_p for site in svg2_compile.report(model).sparse_sites}


def by_site(attentions):
    return {each.path: pytest.approx(list(each.top_p)) for each in attentions}


@compilations
def test_every_layer_has_its_own_budgets(compiled, tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    compiled_model = compiled(model, budgets=path)
    generate(compiled_model)
    assert in_force(model) == by_site(DIFFERENT)
    density = {site.path: site.density_per_head for site in svg2_compile.report(model).sparse_sites}
    assert density[PATHS[0]][1] == pytest.approx(1.0) and density[PATHS[0]][0] < 0.6
    assert density[PATHS[1]][0] > density[PATHS[1]][1]


@compilations
def test_the_same_for_all_is_what_the_options_say_bit_by_bit(compiled, tmp_path):
    plain = generate(compiled(Model(), top_p=0.7, min_keep_ratio=0.2))
    svg2_compile.reset()
    torch._dynamo.reset()
    model = Model()
    alike = [of(path, 0.7, 0.7, min_keep_ratio=(0.2, 0.2)) for path in PATHS]
    path = write_for(tmp_path / "b.json", model, *alike)
    assert torch.equal(generate(compiled(model, budgets=path)), plain)


def test_both_ways_of_compiling_give_the_same(tmp_path):
    outputs = []
    for compiled in (as_a_whole, block_by_block):
        model = Model()
        path = write_for(tmp_path / "b.json", model, *DIFFERENT)
        outputs.append(generate(compiled(model, budgets=path)))
        svg2_compile.reset()
        torch._dynamo.reset()
    torch.testing.assert_close(*outputs)


def test_what_the_file_does_not_say_is_left_to_the_options(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, of(PATHS[0], max_keep_ratio=(0.25, 1.0)))
    generate(as_a_whole(model, budgets=path))
    first, second = svg2_compile.report(model).sparse_sites
    assert first.more["budgets"].top_p == second.more["budgets"].top_p == pytest.approx([0.6, 0.6])
    assert first.more["budgets"].most_clusters == [2, 8] and first.more["budgets"].least_clusters == [2, 2]
    assert first.density_per_head[0] < second.density_per_head[0]
    assert not first.hint and "holds no budgets of blocks.1.attn" in second.hint
    assert "top p 0.6" in str(svg2_compile.report(model))


@compilations
def test_a_changed_file_takes_effect_with_the_next_generation_and_compiles_nothing(compiled, tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    compiled_model = compiled(model, budgets=path)
    before = generate(compiled_model)
    frames = dict(torch._dynamo.utils.counters["frames"])
    other = [of(path, 0.9, 0.9) for path in PATHS]
    with denoise_step(0, 2, "two"):
        compiled_model(tokens(0))
    write_for(tmp_path / "b.json", model, *other)
    with denoise_step(1, 2, "two"):
        compiled_model(tokens(1))
    assert in_force(model) == by_site(DIFFERENT)
    after = generate(compiled_model, "three")
    assert in_force(model) == by_site(other)
    assert dict(torch._dynamo.utils.counters["frames"]) == frames
    write_for(tmp_path / "b.json", model, *DIFFERENT)
    assert not torch.equal(after, before) and torch.equal(generate(compiled_model, "four"), before)


def test_compiling_again_with_a_changed_file_gives_what_it_says(tmp_path):
    path = tmp_path / "b.json"
    first = Model()
    write_for(path, first, *DIFFERENT)
    generate(as_a_whole(first, budgets=str(path)))
    second = Model()
    other = [of(each, 0.9, 0.9) for each in PATHS]
    write_for(path, second, *other)
    # equal options: Dynamo may run the graph of the first
    generate(as_a_whole(second, budgets=str(path)))
    assert in_force(second) == by_site(other)


def test_a_file_that_is_gone_keeps_what_it_held_and_a_broken_one_is_refused(tmp_path, caplog):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    compiled = as_a_whole(model, budgets=path)
    before = generate(compiled)
    os.unlink(path)
    with caplog.at_level("WARNING"):
        assert torch.equal(generate(compiled, "two"), before)
    assert "what was read before stays in force" in caplog.text
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ConfigError, match="must be an object with format"):
        generate(compiled, "three")
    write_for(tmp_path / "b.json", Model(seed=1), *DIFFERENT)
    with pytest.raises(ConfigError, match="has other weights"):
        generate(compiled, "four")


class Narrow(Model):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(4, 4)


def renamed(model, name):
    model.__class__ = type(name, (type(model),), {})
    return model


@compilations
@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (lambda: Model(seed=1), "transformer has other weights"),
        (lambda: renamed(Narrow(), "Model"), "transformer has other parameters"),
        (lambda: renamed(nn.Linear(8, 9), "Other"), "it is no Other"),
    ],
)
def test_budgets_of_another_model_are_refused(compiled, foreign, words, tmp_path):
    path = write_for(tmp_path / "b.json", foreign(), *DIFFERENT)
    with pytest.raises(Exception, match="svg2 calibrate") as refusal:
        generate(compiled(Model(), budgets=path))
    assert words in str(refusal.value) and "must be of the model that is compiled" in str(refusal.value)


def test_other_numbers_of_heads_are_refused(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, AttentionBudgets(PATHS[0], 3, (0.5, 0.5, 0.5)))
    with pytest.raises(Exception, match=r"blocks\.0\.attn must be of 2 heads, got 3"):
        generate(as_a_whole(model, budgets=path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_dtype_are_the_same_model(dtype, tmp_path):
    path = write_for(tmp_path / "b.json", Model(), *DIFFERENT)
    model = Model().to(dtype)
    as_a_whole(model, budgets=path)(tokens().to(dtype))
    assert in_force(model) == by_site(DIFFERENT)


def test_a_model_inside_of_another_module_is_found(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    whole = Wrapped(model)
    generate(as_a_whole(whole, budgets=path))
    assert in_force(whole) == {f"inner.{each}": shares for each, shares in by_site(DIFFERENT).items()}


def test_two_models_of_one_file_that_share_a_graph_have_their_own(tmp_path):
    models = {"transformer": Model(seed=0), "transformer_2": Model(seed=1)}
    one, other = (budgets_for_models({name: each}) for name, each in models.items())
    sets = DIFFERENT, [of(each, 0.9, 0.8) for each in PATHS]
    pairs = zip((*one.models, *other.models), sets)
    made = [type(each)(each.name, each.fingerprint, tuple(chosen)) for each, chosen in pairs]
    both = type(one)("heart", one.made_from, tuple(made), "", "")
    path = write_budgets(both, tmp_path / "b.json").source
    for model, chosen in zip(models.values(), sets):
        generate(as_a_whole(model, budgets=path))
        assert in_force(model) == by_site(chosen)
    # and again by turns
    for model, chosen in zip(models.values(), sets):
        generate(as_a_whole(model, budgets=path), "again")
        assert in_force(model) == by_site(chosen)


def test_a_top_p_of_1_is_exactly_dense_with_budgets_too(tmp_path):
    outputs = []
    for options in ({}, {"budgets": True}):
        model = Model()
        capped = [of(path, 0.2, 0.3, max_keep_ratio=(0.25, 0.25)) for path in PATHS]
        given = {name: write_for(tmp_path / "b.json", model, *capped) for name in options}
        outputs.append(generate(as_a_whole(model, top_p=1, **given)))
        svg2_compile.reset()
        torch._dynamo.reset()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("options", [{"compensate": "centroids", "route": "error"}, {"estimate_by": "queries"}])
def test_budgets_go_with_the_other_stages(options, tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    generate(as_a_whole(model, budgets=path, **options))
    first, _ = svg2_compile.report(model).sparse_sites
    assert first.density_per_head[1] == pytest.approx(1.0) and first.density_per_head[0] < 0.6


def test_a_head_that_the_guard_makes_dense_is_dense(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    guarded = generate(as_a_whole(model, budgets=path, min_recall=1.0))
    torch.testing.assert_close(guarded[0], Model()(tokens(0)), rtol=1e-4, atol=1e-4)


def test_inductor_gives_the_same(tmp_path):
    outputs = []
    for lowering in ("eager", "inductor"):
        model = Model()
        path = write_for(tmp_path / "b.json", model, *DIFFERENT)
        outputs.append(generate(as_a_whole(model, budgets=path, lowering=lowering)))
        assert in_force(model) == by_site(DIFFERENT)
        svg2_compile.reset()
        torch._dynamo.reset()
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped])
def test_an_exported_graph_carries_them(wrap, tmp_path):
    model = Model().eval()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    config = SparseConfig(**OPTIONS | {"budgets": path})
    plan = sparsify(torch.export.export(wrap(model), (tokens(),)).module(), config, state="buffers")
    buffers = {name: buffer for name, buffer in plan.gm.named_buffers() if name.endswith("budgets")}
    assert [each[:, 0].tolist() for each in buffers.values()] == [pytest.approx(list(each.top_p)) for each in DIFFERENT]
    torch.testing.assert_close(plan.gm(tokens()), generate(as_a_whole(model, budgets=path))[0])


def test_explain_tells_them_before_a_run(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    with svg2_compile.configure(**OPTIONS, budgets=path):
        report = explain(model, tokens())
        assert [site.more["budgets"].top_p for site in report.sites] == [[0.2, 1.0], [0.9, 0.4]]
        with pytest.raises(Exception, match="it is no Model"):
            explain(nn.Sequential(Block(), Block()), tokens())


def test_the_command_explain_shows_them_and_refuses_those_of_another_model(tmp_path):
    model = tiny_wan.load_pipeline().transformer
    heads = model.config.num_attention_heads
    shares = (0.25, *(0.75,) * (heads - 1))
    path = write_for(tmp_path / "b.json", model, AttentionBudgets("blocks.1.attn1", heads, shares))
    size = ("--frames", "16", "--height", "128", "--width", "256")
    done = CliRunner().invoke(app, ["explain", "tiny", *size, "--config", f"budgets={path}"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "0.25" in told and "0.75" in told and f"over {heads} heads" in told
    path = write_for(tmp_path / "b.json", Model(), *DIFFERENT)
    done = CliRunner().invoke(app, ["explain", "tiny", *size, "--config", f"budgets={path}"])
    assert done.exit_code == 2 and "it is no Model" in done.output


def test_a_folder_that_is_left_does_not_lose_the_file(tmp_path, monkeypatch, caplog):
    model = Model()
    write_for(tmp_path / "b.json", model, *DIFFERENT)
    monkeypatch.chdir(tmp_path)
    compiled = as_a_whole(model, budgets="b.json")
    generate(compiled)
    monkeypatch.chdir("/")
    write_for(tmp_path / "b.json", model, *(other := [of(path, 0.9, 0.9) for path in PATHS]))
    generate(compiled, "two")
    assert in_force(model) == by_site(other) and "stays in force" not in caplog.text


def test_the_report_is_plain_values_for_json(tmp_path):
    model = Model()
    path = write_for(tmp_path / "b.json", model, *DIFFERENT)
    generate(as_a_whole(model, budgets=path))
    told = json.loads(json.dumps(svg2_compile.report(model).to_dict()))
    assert told["sites"][0]["more"]["budgets"]["top_p"] == pytest.approx([0.2, 1.0])


def test_code_without_a_module_is_refused(tmp_path):
    path = write_for(tmp_path / "b.json", Model(), *DIFFERENT)
    attend = nn.functional.scaled_dot_product_attention
    function = torch.compile(lambda x: attend(x, x, x), backend="svg2", options=OPTIONS | {"budgets": path})
    with pytest.raises(Exception, match=r"must be of a torch\.nn\.Module"):
        function(torch.randn(1, 2, TOKENS, 16))


def test_a_branch_that_begins_in_the_last_step_keeps_the_states_of_all_its_attentions(tmp_path):
    model = Model()
    compiled = as_a_whole(model, budgets=write_for(tmp_path / "b.json", model, *DIFFERENT))
    for stream in ("one", "other"):
        with denoise_step(0, 1, stream):
            compiled(tokens())
    assert ["other" in site.branches for site in svg2_compile.report(model).sparse_sites] == [True, True]
    assert in_force(model) == by_site(DIFFERENT)


def test_the_option_is_read_when_it_is_given(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        split_options({"budgets": str(tmp_path / "nothing.json")})
    assert svg2_backend is not None
