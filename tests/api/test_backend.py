"""The backend on tiny diffusers models: exact under full selection, dense and sparse on schedule, state kept apart."""

import copy
import gc
import threading

import pytest
import torch
from tiny_pipelines import hunyuan_transformer as hunyuan
from tiny_pipelines import wan_transformer as wan

import svg2_compile
from svg2_compile import ConfigError, denoise_step, svg2_backend
from svg2_compile.kernels.known_state import is_known_as_clustered
from svg2_compile.region import Region, Variant
from svg2_compile.state import SiteState, store

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

FULL = {"top_p": 1.0, "dense_steps": 1, "dense_layers": 0, "min_tokens": 64}
SPARSE = {**FULL, "top_p": 0.3}
EAGER = {"lowering": "eager"}
TIMESTEPS = (900, 800, 700)


def wan_inputs(seed: int = 0, size: int = 16, batch: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 2, size, 16, generator=random),
        "encoder_hidden_states": torch.randn(batch, 12, 16, generator=random),
    }


def hunyuan_inputs(seed: int = 0, size: int = 16, batch: int = 1) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 12, dtype=torch.bool)
    mask[:, 7:] = False
    return {
        "hidden_states": torch.randn(batch, 4, 1, size, 16, generator=random),
        "encoder_hidden_states": torch.randn(batch, 12, 16, generator=random),
        "pooled_projections": torch.randn(batch, 8, generator=random),
        "encoder_attention_mask": mask,
        "guidance": torch.full((batch,), 1000.0),
    }


MODELS = {"wan": (wan, wan_inputs), "hunyuan": (hunyuan, hunyuan_inputs)}


def forward(model: torch.nn.Module, timestep: float, **inputs: torch.Tensor) -> torch.Tensor:
    batch = inputs["hidden_states"].shape[0]
    return model(**inputs, timestep=torch.full((batch,), timestep), return_dict=False)[0]


def assert_equal_to_rounding(output: torch.Tensor, reference: torch.Tensor, exact: torch.Tensor) -> None:
    """Both are fp32 evaluations of ``exact`` (fp64): the sparse one may be off by twice what the dense one is."""
    allowed = 2 * (reference.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (output.double() - exact).abs().max() <= 2 * allowed


def compile_model(model: torch.nn.Module, options: dict, regional: bool = False, **arguments) -> torch.nn.Module:
    torch._dynamo.reset()
    if regional:
        model.compile_repeated_blocks(backend=svg2_backend, options=options, fullgraph=True, **arguments)
        return model
    return torch.compile(model, backend=svg2_backend, options=options, fullgraph=True, **arguments)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", MODELS)
def test_full_selection_equals_dense_to_rounding_through_inductor(name, regional):
    make, make_inputs = MODELS[name]
    model = make()
    eager, judge = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = compile_model(model, FULL, regional)
    torch._dynamo.utils.counters.clear()
    for timestep in TIMESTEPS:
        for seed in (0, 1):
            inputs = make_inputs(seed)
            exact = forward(
                judge, timestep, **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            )
            assert_equal_to_rounding(forward(compiled, timestep, **inputs), forward(eager, timestep, **inputs), exact)
    assert not torch._dynamo.utils.counters["graph_break"]
    report = svg2_compile.report(compiled)
    assert [site.sparse_calls for site in report.sparse_sites] == [4] * len(report.sparse_sites)
    assert [site.dense_calls for site in report.sparse_sites] == [2] * len(report.sparse_sites)
    assert len(report.sparse_sites) == {"wan": 2, "hunyuan": 3}[name]
    assert report.density == pytest.approx(1.0)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("name", MODELS)
def test_sparse_differs_from_dense_only_in_the_sparse_steps(name, regional):
    make, make_inputs = MODELS[name]
    model = make()
    eager = copy.deepcopy(model)
    compiled = compile_model(model, SPARSE | EAGER, regional)
    errors = [
        (forward(compiled, timestep, **make_inputs()) - forward(eager, timestep, **make_inputs())).abs().max().item()
        for timestep in TIMESTEPS
    ]
    assert errors[0] < 1e-5 and all(1e-4 < each < 1 for each in errors[1:])
    assert svg2_compile.report(compiled).density < 0.6


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_the_first_layers_stay_dense_in_every_step(regional):
    compiled = compile_model(wan(3), SPARSE | EAGER | {"dense_layers": 1}, regional)
    for timestep in TIMESTEPS:
        forward(compiled, timestep, **wan_inputs())
    calls = {site.path: site.sparse_calls for site in svg2_compile.report(compiled).sites if "attn1" in site.path}
    assert calls == {"blocks.0.attn1": 0, "blocks.1.attn1": 2, "blocks.2.attn1": 2}


def test_one_block_is_compiled_for_all_blocks():
    torch._dynamo.utils.counters.clear()
    compiled = compile_model(wan(4), SPARSE | EAGER, regional=True)
    for timestep in TIMESTEPS:
        forward(compiled, timestep, **wan_inputs())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(svg2_compile.report(compiled).sparse_sites) == 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_state_survives_a_change_of_grad_mode(context):
    compiled = compile_model(wan(), SPARSE | EAGER)
    for timestep in TIMESTEPS:
        with context():
            forward(compiled, timestep, **wan_inputs())
    forward(compiled, 600, **wan_inputs())
    assert svg2_compile.report(compiled).sparse_sites[0].sparse_calls == 3


def states() -> dict[str, list[SiteState]]:
    """Return the state of all sites by CFG branch."""
    found: dict[str, list[SiteState]] = {}
    for region in Region.instances:
        for owner in region.owners():
            for site in region.plan.sites:
                for stream, each in store.states_of(owner, site).items():
                    found.setdefault(stream, []).extend(each)
    return found


def test_cfg_branches_do_not_see_each_other():
    """The unconditional branch ends with the same centroids whatever the conditional one was fed."""
    centroids = []
    for other in (1, 2):
        svg2_compile.reset()
        compiled = compile_model(wan(), SPARSE | EAGER)
        for timestep in TIMESTEPS:
            forward(compiled, timestep, **wan_inputs(other))
            forward(compiled, timestep, **wan_inputs(0))
        kept = {stream: each[0].tensors["q_centroids"] for stream, each in states().items()}
        assert set(kept) == {"0", "1"}
        centroids.append(kept["1"].clone())
        assert not torch.equal(kept["0"], kept["1"])
    assert torch.equal(*centroids)


def test_a_new_generation_starts_from_tokens_and_gives_the_same_bits():
    compiled = compile_model(wan(), SPARSE | EAGER)

    def generation() -> list[torch.Tensor]:
        return [forward(compiled, timestep, **wan_inputs()) for timestep in TIMESTEPS]

    first, second = generation(), generation()
    svg2_compile.reset()
    third = generation()
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_centroids_are_reused_within_a_generation():
    compiled = compile_model(wan(), SPARSE | EAGER)
    for timestep in TIMESTEPS:
        forward(compiled, timestep, **wan_inputs())
    assert [int(each.tensors["q_calls"]) for each in states()["0"]] == [2, 2]


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_state_is_vouched_for_from_the_second_sparse_call_of_a_generation_and_branch(regional, monkeypatch):
    compiled = compile_model(wan(), SPARSE | EAGER, regional)

    def forward_as(step, stream):
        seen = []

        def spy(self, *args):
            counters = [each for each in args if each.dtype == torch.int32 and each.shape == (1,)]
            # that the counters have moved on is what is vouched for
            assert all(each.item() > 0 for each in counters if is_known_as_clustered(each))
            seen.append([is_known_as_clustered(each) for each in counters])
            return run(self, *args)

        with monkeypatch.context() as patch:
            run = Variant.__call__
            patch.setattr(Variant, "__call__", spy)
            with denoise_step(step, 5, stream):
                forward(compiled, 900 - step, **wan_inputs())
        known = [each for counters in seen for each in counters]
        assert len(known) == (4 if step else 0)  # two layers, queries and keys
        assert len(set(known)) <= 1
        return bool(known) and known[0]

    for _ in range(2):  # generations
        known = [[forward_as(step, stream) for stream in ("cond", "uncond")] for step in range(3)]
        assert known == [[False, False], [False, False], [True, True]]
    svg2_compile.reset()
    assert not forward_as(3, "cond")
    assert forward_as(4, "cond")


def test_state_is_not_vouched_for_by_a_call_that_failed_or_was_only_recorded(monkeypatch):
    compiled = compile_model(wan(), SPARSE | EAGER)
    known = []

    def sparse_forward(step):
        with denoise_step(step, 6):
            forward(compiled, 900 - step, **wan_inputs())

    run = Variant.__call__

    def spy(self, *args):
        counters = [each for each in args if each.dtype == torch.int32 and each.shape == (1,)]
        known.append(is_known_as_clustered(*counters))
        outputs = run(self, *args)
        if len(known) == 1:
            raise RuntimeError("out of memory, say")
        return outputs

    monkeypatch.setattr(Variant, "__call__", spy)
    with pytest.raises(RuntimeError, match="out of memory"):
        sparse_forward(1)
    with monkeypatch.context() as patch:
        patch.setattr("svg2_compile.region.is_capturing", lambda: True)
        sparse_forward(2)
    sparse_forward(3)
    sparse_forward(4)
    assert known == [False, False, False, True]


def test_two_models_of_one_class_have_their_own_state_and_reports():
    one, two = wan(), wan()
    torch._dynamo.reset()
    one_compiled = torch.compile(one, backend="svg2", options=SPARSE | EAGER)
    two_compiled = torch.compile(two, backend="svg2", options=SPARSE | EAGER)
    alone = [forward(one_compiled, timestep, **wan_inputs()) for timestep in TIMESTEPS]
    svg2_compile.reset()
    together = []
    for timestep in TIMESTEPS:
        together.append(forward(one_compiled, timestep, **wan_inputs()))
        forward(two_compiled, timestep, **wan_inputs(5))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))
    assert svg2_compile.report(one_compiled).sparse_sites[0].sparse_calls == 2
    assert svg2_compile.report(two_compiled).sparse_sites[0].sparse_calls == 2


def test_state_goes_with_its_model():
    compiled = compile_model(wan(), SPARSE | EAGER)
    for timestep in TIMESTEPS:
        forward(compiled, timestep, **wan_inputs())
    assert states()
    del compiled
    torch._dynamo.reset()
    gc.collect()
    assert not store.owners()


def test_threads_do_not_share_centroids():
    compiled = compile_model(wan(), SPARSE | EAGER)
    alone = [forward(compiled, timestep, **wan_inputs()) for timestep in TIMESTEPS]
    outputs: dict[int, list[torch.Tensor]] = {}
    turn = threading.Barrier(2)

    def generate(index: int) -> None:
        with torch.no_grad():
            outputs[index] = []
            for timestep in TIMESTEPS:
                turn.wait(timeout=60)
                outputs[index].append(forward(compiled, timestep, **wan_inputs(0 if index == 0 else 7)))

    threads = [threading.Thread(target=generate, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, outputs[0]))


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_shapes_serve_several_sizes_with_one_compilation(name):
    make, make_inputs = MODELS[name]
    model = make()
    eager = copy.deepcopy(model)
    compiled = compile_model(model, FULL | EAGER, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for size in (16, 24, 20):
        for timestep in TIMESTEPS:
            inputs = make_inputs(size, size)
            difference = forward(compiled, timestep, **inputs) - forward(eager, timestep, **inputs)
            assert difference.abs().max() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_batched_cfg_needs_no_branches():
    compiled = compile_model(wan(), FULL | EAGER)
    for timestep in TIMESTEPS:
        forward(compiled, timestep, **wan_inputs(0, batch=2))
    assert set(states()) == {"0"}


def test_graph_breaks_leave_blocks_sparse():
    class Breaking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = wan(2)

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            hidden_states = hidden_states * 1.0
            torch._dynamo.graph_break()
            return self.inner(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]

    model = Breaking()
    compiled = torch.compile(model, backend="svg2", options=SPARSE | EAGER)
    for timestep in TIMESTEPS:
        inputs = wan_inputs()
        compiled(inputs["hidden_states"], torch.tensor([timestep]), inputs["encoder_hidden_states"])
    assert [site.sparse_calls for site in svg2_compile.report(compiled).sparse_sites] == [2, 2]


def test_an_attention_in_a_helper_that_breaks_the_graph_is_sparse_on_schedule_and_named():
    class Helper:
        def __call__(self, attn, x):
            q, k, v = attn.qkv(x).unflatten(2, (2, -1)).transpose(1, 2).chunk(3, -1)
            torch._dynamo.graph_break()
            return attn.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.helper = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16), Helper()

        def forward(self, x):
            return self.helper(self, x)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Attention(), Attention()])

        def forward(self, x, timestep):
            for block in self.blocks:
                x = x + block(x) * timestep
            return x

    model = Model()
    compiled = torch.compile(model, backend="svg2", options=SPARSE | EAGER)
    x = torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(0))
    for timestep in (0.9, 0.8, 0.7):
        compiled(x, torch.tensor([timestep]))
    calls = {site.path: (site.dense_calls, site.sparse_calls) for site in svg2_compile.report(model).sites}
    assert list(calls.values()) == [(1, 2), (1, 2)]
    assert [path.rsplit(".", 1)[0] for path in calls] == ["blocks.0", "blocks.1"]


def test_a_model_inside_an_eager_wrapper_is_still_a_whole_model():
    """As with data parallel wrappers: only the first layer stays dense, and the timestep still counts the steps."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            return self.inner(**inputs)

    model = wan(3)
    wrapper = Wrapper(compile_model(model, SPARSE | EAGER | {"dense_layers": 1}))
    for timestep in TIMESTEPS:
        wrapper(**wan_inputs(), timestep=torch.tensor([timestep]))
    calls = {site.path: site.sparse_calls for site in svg2_compile.report(model).sites if "attn1" in site.path}
    assert calls == {"blocks.0.attn1": 0, "blocks.1.attn1": 2, "blocks.2.attn1": 2}


def test_autocast_runs_the_sparse_attention_in_its_dtype():
    model = wan()
    eager = copy.deepcopy(model)
    compiled = compile_model(model, FULL)
    with torch.autocast("cpu", torch.bfloat16):
        for timestep in TIMESTEPS:
            output, reference = forward(compiled, timestep, **wan_inputs()), forward(eager, timestep, **wan_inputs())
            assert output.dtype is reference.dtype
            # both round to bf16 after every layer, in a different order of operations
            assert (output - reference).abs().max() <= 0.05 * reference.abs().max()
    assert {site.sparse_calls for site in svg2_compile.report(compiled).sparse_sites} == {2}


def test_denoise_step_decides_the_schedule():
    compiled = compile_model(wan(), SPARSE | EAGER | {"dense_steps": 0.5})
    for index in range(4):
        with denoise_step(index, total=4):
            forward(compiled, 900, **wan_inputs())
    site = svg2_compile.report(compiled).sparse_sites[0]
    assert (site.dense_calls, site.sparse_calls) == (2, 2)


def test_with_gradients_the_model_stays_dense_and_trains():
    model = wan()
    compiled = compile_model(model, SPARSE)
    with torch.enable_grad():
        forward(compiled, 900, **wan_inputs()).sum().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
    plans = [site.plan for site in svg2_compile.report(compiled).sites if "attn1" in site.path]
    assert plans == ["gradients are required"] * 2


def test_float64_stays_dense_with_a_reason():
    compiled = compile_model(wan().double(), SPARSE | EAGER)
    inputs = {name: value.double() for name, value in wan_inputs().items()}
    assert forward(compiled, 900, **inputs).dtype is torch.float64
    plans = [site.plan for site in svg2_compile.report(compiled).sites if "attn1" in site.path]
    assert plans == ["float64 attention"] * 2


def test_layers_that_share_a_graph_without_any_site_are_all_reported():
    model = compile_model(wan(), EAGER | {"min_tokens": 10_000}, regional=True)
    forward(model, 900, **wan_inputs())
    reasons = {site.path: site.plan for site in svg2_compile.report(model).sites}
    assert reasons == {
        f"blocks.{layer}.{name}": reason
        for layer in (0, 1)
        for name, reason in (("attn1", "short: 128 tokens"), ("attn2", "cross-attention: 128 queries, 12 keys"))
    }
    assert svg2_compile.report(wan()).sites == ()


def test_on_unsupported_error_names_the_layer_and_the_way_out():
    compiled = compile_model(wan().double(), SPARSE | EAGER | {"on_unsupported": "error"})
    inputs = {name: value.double() for name, value in wan_inputs().items()}
    with pytest.raises(Exception, match=r"blocks\.0\.attn1 stays dense: float64 attention; run the model in float32"):
        forward(compiled, 900, **inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_q": 0.9}, "unknown option 'top_q'; did you mean 'top_p'"),
        ({"svg2.nonsense": 1}, "unknown option 'svg2.nonsense'; known options are top_p"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"q_clusters": 0}, "q_clusters must be in .1, 1024., got 0"),
        (
            {"lowering": "tensorrt"},
            r"needs TensorRT: torch_tensorrt is not installed; pip install .svg2-compile.tensorrt",
        ),
    ],
)
def test_bad_options_are_refused_with_advice(options, message):
    with pytest.raises(Exception, match=message):
        forward(compile_model(wan(), SPARSE | EAGER | options), 900, **wan_inputs())


def test_more_clusters_than_tokens_leaves_the_layer_dense():
    compiled = compile_model(wan(), SPARSE | EAGER | {"k_clusters": 1000})
    forward(compiled, 900, **wan_inputs())
    assert "1000 clusters for 128 video tokens" in str(svg2_compile.report(compiled))


def test_prefixed_and_inductor_options_mix():
    options = {f"svg2.{name}": value for name, value in FULL.items()} | {"max_autotune": False}
    compiled = compile_model(wan(), options)
    for timestep in TIMESTEPS[:2]:
        forward(compiled, timestep, **wan_inputs())
    assert svg2_compile.report(compiled).sparse_sites


def test_options_for_kernels_reach_the_attention_through_inductor():
    class Block(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))
    options, outputs = SPARSE | {"dense_steps": 0}, []
    for extra, told in (
        ({}, ()),
        ({"svg2.attention": "pointer", "num_stages": 5}, ("pointer", [32, 32, 4, 5])),
        ({"autotune": True}, ("auto", None, True)),
    ):
        compiled = compile_model(Block(), options | extra)
        outputs.append(compiled(x))
        (region,) = (each for each in Region.instances if each.owners())
        (attention,) = (node for node in region.plan.gm.graph.nodes if "block_sparse" in str(node.target))
        assert attention.args[11:] == told
        svg2_compile.reset()
    # the CPU has one attention and takes no notice
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_configure_gives_defaults_where_options_cannot_be_given():
    with svg2_compile.configure(**FULL):
        compiled = torch.compile(wan(), backend="svg2", mode="reduce-overhead")
        for timestep in TIMESTEPS[:2]:
            forward(compiled, timestep, **wan_inputs())
    assert len(svg2_compile.report(compiled).sparse_sites) == 2
    with pytest.raises(ConfigError, match="did you mean 'top_p'"):
        svg2_compile.configure(top_pp=1)


def test_a_model_without_attention_is_reported_with_advice():
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="svg2")
    compiled(torch.zeros(2, 4))
    assert "no attention was found" in str(svg2_compile.report(compiled))


def test_flex_attention_is_reported_as_invisible():
    from torch.nn.attention.flex_attention import flex_attention

    class Model(torch.nn.Module):
        def forward(self, x):
            return flex_attention(x, x, x)

    model = Model()
    compiled = torch.compile(model, backend="svg2", options=EAGER)
    compiled(torch.randn(1, 2, 128, 16))
    text = str(svg2_compile.report(compiled))
    assert "runs flex_attention, not SDPA" in text and 'set_attention_backend("native")' in text


def test_explain_computes_nothing_and_says_everything():
    model = hunyuan()
    with svg2_compile.configure(min_tokens=64, dense_layers=0):
        explained = svg2_compile.explain(model, **hunyuan_inputs(), timestep=torch.tensor([1]))
    assert len(explained.sparse_sites) == 3
    assert [site.plan for site in explained.sites if not site.sparse] == ["short: 12 tokens"]
    compiled = compile_model(model, FULL | EAGER)
    forward(compiled, 900, **hunyuan_inputs())
    assert [site.path for site in svg2_compile.report(compiled).sites] == [site.path for site in explained.sites]


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    import subprocess
    import sys

    code = "import sys, svg2_compile; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    )
