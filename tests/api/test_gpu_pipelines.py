"""Compiled tiny models on a GPU: full selection equals dense, CUDA graphs replay what mutates state, nobody waits."""

import contextlib
import copy
import importlib
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch._inductor import cudagraph_trees
from torch.nn.functional import scaled_dot_product_attention

import svg2_compile
from svg2_compile import denoise_step, svg2_backend
from svg2_compile.region import Region
from svg2_compile.state import store

DEVICE = "cuda"
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# launches are counted, and the self-check makes some
FULL = {"top_p": 1.0, "dense_steps": 1, "dense_layers": 0, "min_tokens": 1024, "self_check": False}
SPARSE = FULL | {"top_p": 0.9}
ALWAYS_SPARSE = SPARSE | {"dense_steps": 0}
CUDA_GRAPHS = {"triton.cudagraphs": True}
# Inductor chooses its kernels without timing them, so that two compilations round alike on a busy GPU too. An option,
# because the same setting of the process is gone after the first compilation.
SAME_KERNELS = {"deterministic": True}
STREAMS = ("cond", "uncond")
FRAMES, HEIGHT, WIDTH, TEXT = 5, 50, 58, 77
VIDEO_TOKENS = FRAMES * (HEIGHT // 2) * (WIDTH // 2)


def wan(dim: int) -> torch.nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=3, attention_head_dim=dim, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=256, ffn_dim=256, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )  # fmt: skip


def hunyuan(dim: int) -> torch.nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=dim, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=32,
        pooled_projection_dim=16, rope_axes_dim=(dim // 4, 3 * dim // 8, 3 * dim // 8),
    )  # fmt: skip


SPARSE_SITES = {wan: 2, hunyuan: 3}


def make(model, dim: int) -> torch.nn.Module:
    """Return the model in bf16, with large values: random attention averages them away to nothing."""
    torch.manual_seed(0)
    made = model(dim).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if "to_v." in name or "add_v_proj." in name:
            weight *= 32
    return made.to(DEVICE, torch.bfloat16)


def make_inputs(model, seed: int) -> dict[str, torch.Tensor]:
    """Return bf16 inputs; HunyuanVideo's prompt is shorter than its text."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (1, 4, FRAMES, HEIGHT, WIDTH), "encoder_hidden_states": (1, TEXT, 32)}
    if model is hunyuan:
        shapes["pooled_projections"] = (1, 16)
    inputs = {name: torch.randn(shape, generator=random).to(DEVICE, torch.bfloat16) for name, shape in shapes.items()}
    if model is hunyuan:
        mask = torch.arange(TEXT) < 50
        inputs |= {
            "encoder_attention_mask": mask[None].to(DEVICE),
            "guidance": torch.full((1,), 1000.0, device=DEVICE, dtype=torch.bfloat16),
        }
    return inputs


def forward(model: torch.nn.Module, timestep: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, timestep=timestep, return_dict=False)[0]


def exactly(model: torch.nn.Module, timestep: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the dense output in fp64, from the same bf16 weights and inputs."""
    wide = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    return forward(copy.deepcopy(model).double(), timestep, wide)


def compile_model(model: torch.nn.Module, options: dict, regional: bool) -> torch.nn.Module:
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    if regional:
        model.compile_repeated_blocks(backend=svg2_backend, options=options, fullgraph=True)
    else:
        model.compile(backend=svg2_backend, options=options, fullgraph=True)
    return model


def at(step: int) -> torch.Tensor:
    return torch.full((1,), 900 - 100 * step, device=DEVICE)


@pytest.fixture(autouse=True)
def no_graphs_left(no_grad_and_a_fresh_start):
    yield
    cudagraph_trees.reset_cudagraph_trees()


# every model, head dimension and way of compiling, and every two of them that can go wrong together
CASES = [(wan, 128, False), (wan, 64, True), (hunyuan, 64, False), (hunyuan, 128, True)]
IDS = ["wan-128-whole", "wan-64-regional", "hunyuan-64-whole", "hunyuan-128-regional"]


def largest_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    return (output.double() - exact).abs().max().item()


@pytest.mark.parametrize(("model", "dim", "regional"), CASES, ids=IDS)
def test_full_selection_is_as_exact_as_dense(model, dim, regional):
    eager = make(model, dim)
    compiled = compile_model(eager, FULL, regional)
    torch._dynamo.utils.counters.clear()
    for step in range(3):
        inputs = make_inputs(model, step)
        exact = exactly(eager, at(step), inputs)
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
        allowed = 2 * largest_error(forward(eager, at(step), inputs), exact) + rounding
        assert largest_error(forward(compiled, at(step), inputs), exact) <= allowed
    assert not torch._dynamo.utils.counters["graph_break"]
    sites = svg2_compile.report(compiled).sparse_sites
    assert [(site.dense_calls, site.sparse_calls) for site in sites] == [(1, 2)] * SPARSE_SITES[model]
    assert all(site.density == pytest.approx(1.0) for site in sites)


@pytest.mark.parametrize(("model", "dim", "regional"), CASES, ids=IDS)
def test_sparse_steps_differ_from_dense_by_more_than_rounding_and_not_by_much(model, dim, regional):
    eager = make(model, dim)
    compiled = compile_model(eager, SPARSE, regional)
    for step in range(3):
        inputs = make_inputs(model, step)
        exact = exactly(eager, at(step), inputs)
        spread = exact.std().item()
        rounded, sparse = (
            (forward(each, at(step), inputs).double() - exact).square().mean().sqrt().item() / spread
            for each in (eager, compiled)
        )
        # a tenth of the mass is dropped, of attention, which is a part of the output
        assert sparse <= 2 * rounded if step == 0 else 2 * rounded < sparse < 0.1
    assert 0.5 < svg2_compile.report(compiled).density < 0.95


def generate(compiled: torch.nn.Module, model, steps: int) -> list[torch.Tensor]:
    """Return the outputs of all steps, two CFG branches each."""
    outputs = []
    for step in range(steps):
        for seed, stream in enumerate(STREAMS):
            # layers compiled one by one are graphs of one step only if told where a step begins
            torch.compiler.cudagraph_mark_step_begin()
            with denoise_step(step, steps, stream):
                outputs.append(forward(compiled, at(step), make_inputs(model, 10 * step + seed)).clone())
    return outputs


def state() -> dict[tuple, torch.Tensor]:
    """Return a copy of every state tensor, by (kind of layer, layer, attention, CFG branch, name)."""
    found = {}
    regions = sorted((region for region in Region.instances if region.owners()), key=lambda region: region.number)
    for kind, region in enumerate(regions):
        for layer, owner in enumerate(region.owners()):
            for site in region.plan.sites:
                for stream, (each,) in store.states_of(owner, site).items():
                    for name, tensor in each.tensors.items():
                        found[kind, layer, site.path, stream, name] = tensor.clone()
    return found


def assert_same(first: dict[tuple, torch.Tensor], second: dict[tuple, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Return a list that gets an entry for every replay of one of Inductor's CUDA graphs."""
    seen: list[int] = []
    replay = cudagraph_trees.CUDAGraphNode.run

    def run(node, new_inputs):
        seen.append(node.id.id)
        return replay(node, new_inputs)

    monkeypatch.setattr(cudagraph_trees.CUDAGraphNode, "run", run)
    return seen


@pytest.fixture
def launches(monkeypatch) -> list[None]:
    """Return a list that gets an entry whenever the host launches the selection of one attention."""
    from svg2_compile.kernels import select_blocks_triton as selecting

    seen: list[None] = []
    launch = selecting.select_blocks_triton

    def select_blocks_triton(*arguments):
        seen.append(None)
        return launch(*arguments)

    monkeypatch.setattr(selecting, "select_blocks_triton", select_blocks_triton)
    return seen


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("model", [wan, hunyuan])
def test_cuda_graphs_of_inductor_replay_both_cfg_branches_bit_for_bit(model, regional, replays, launches):
    steps, eager = 6, make(model, 64)
    expected = generate(compile_model(eager, ALWAYS_SPARSE | SAME_KERNELS, regional), model, steps)
    expected_state = state()
    assert not replays and len(launches) == steps * len(STREAMS) * SPARSE_SITES[model]
    launches.clear()
    svg2_compile.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compile_model(eager, ALWAYS_SPARSE | SAME_KERNELS | CUDA_GRAPHS, regional)
    outputs = generate(compiled, model, steps)
    assert [index for index, pair in enumerate(zip(outputs, expected)) if not torch.equal(*pair)] == []
    assert_same(state(), expected_state)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    # one call warms up, each branch is recorded, and all later steps are replays, in which the host launches no kernel
    assert len(launches) == (1 + len(STREAMS)) * SPARSE_SITES[model]
    graphs = len(STREAMS) * (SPARSE_SITES[model] if regional else 1)
    assert len(set(replays)) >= graphs
    assert len(replays) >= (steps - 2) * graphs
    calls = {int(tensor) for key, tensor in state().items() if key[-1] in ("q_calls", "k_calls")}
    assert calls == {steps}


VARIANTS: tuple[dict[str, object], ...] = ({}, {"min_recall": 0.9}, {"estimate_by": "queries"})


class Layer(torch.nn.Module):
    """One self-attention, between products that round the same however they are launched."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 1, 3, 1, 64, generator=random), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*(x * each for each in self.weight))


def tokens(seed: int) -> torch.Tensor:
    """Return bf16 [B, H, N, D]."""
    return torch.randn(1, 3, 4099, 64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


@pytest.mark.parametrize("guard", VARIANTS, ids=str)
def test_a_captured_step_replays_with_new_inputs_and_the_state_moves_on(guard):
    """A graph of our own for each CFG branch, as a serving loop captures them."""
    layer = Layer().to(DEVICE, torch.bfloat16)
    compiled = torch.compile(layer, backend=svg2_backend, options=ALWAYS_SPARSE | guard, fullgraph=True)
    warm, steps = 2, 5
    inputs = {stream: [tokens(10 * step + each) for step in range(steps)] for each, stream in enumerate(STREAMS)}

    def run(step: int, stream: str, x: torch.Tensor) -> torch.Tensor:
        with denoise_step(step, steps, stream):
            return compiled(x)

    expected = {(stream, step): run(step, stream, inputs[stream][step]) for step in range(steps) for stream in STREAMS}
    expected_state = state()
    svg2_compile.reset()

    static = {stream: torch.empty_like(inputs[stream][0]) for stream in STREAMS}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(warm):
            for stream in STREAMS:
                static[stream].copy_(inputs[stream][step])
                assert torch.equal(run(step, stream, static[stream]), expected[stream, step])
    torch.cuda.current_stream().wait_stream(side)
    graphs = {stream: torch.cuda.CUDAGraph() for stream in STREAMS}
    outputs = {}
    for stream in STREAMS:
        with torch.cuda.graph(graphs[stream]):
            outputs[stream] = run(warm, stream, static[stream])
    for step in range(warm, steps):
        for stream in STREAMS:
            static[stream].copy_(inputs[stream][step])
            graphs[stream].replay()
            assert torch.equal(outputs[stream], expected[stream, step]), (stream, step)
    assert_same(state(), expected_state)
    assert not torch.equal(outputs["cond"], outputs["uncond"])


def test_what_the_host_knows_of_the_state_saves_launches_and_changes_no_bits(monkeypatch):
    from svg2_compile.kernels.clustering import Clustering

    layer = Layer().to(DEVICE, torch.bfloat16)
    compiled = torch.compile(layer, backend=svg2_backend, options=ALWAYS_SPARSE, fullgraph=True)
    orders = []

    def order(clustering, launch=Clustering._order):
        orders.append(None)
        return launch(clustering)

    monkeypatch.setattr(Clustering, "_order", order)

    def run() -> list[torch.Tensor]:
        svg2_compile.reset()
        orders.clear()
        outputs = []
        for step in range(4):
            for each, stream in enumerate(STREAMS):
                with denoise_step(step, 4, stream):
                    outputs.append(compiled(tokens(10 * step + each)))
        return outputs

    outputs, known = run(), len(orders)
    monkeypatch.setattr("svg2_compile.region.known_as_clustered", lambda _: contextlib.nullcontext())
    expected = run()
    assert all(map(torch.equal, outputs, expected))
    # only the first step of each branch orders its clusters
    assert (known, len(orders)) == (len(STREAMS), 4 * len(STREAMS))


def waits(call) -> list[str]:
    """Return where a call made the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    messages = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
    return [f"{each.filename}:{each.lineno}" for each in messages]


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
@pytest.mark.parametrize("model", [wan, hunyuan])
def test_a_warm_sparse_step_waits_for_the_device_no_more_often_than_a_dense_one(model, regional):
    compiled = compile_model(make(model, 64), SPARSE | {"dense_steps": 2}, regional)
    inputs = [make_inputs(model, step) for step in range(4)]
    timesteps = [at(step) for step in range(4)]
    forward(compiled, timesteps[0], inputs[0])
    dense = waits(lambda: forward(compiled, timesteps[1], inputs[1]))
    forward(compiled, timesteps[2], inputs[2])
    sparse = waits(lambda: forward(compiled, timesteps[3], inputs[3]))
    assert len(sparse) == len(dense), (sparse, dense)
    assert svg2_compile.report(compiled).sparse_sites[0].sparse_calls == 2
    if model is wan:
        # the clock reads the timestep, once for all layers
        assert len(sparse) == 1, sparse


@pytest.mark.parametrize("guard", VARIANTS, ids=str)
def test_a_layer_without_a_timestep_never_waits(guard):
    compiled = torch.compile(
        Layer().to(DEVICE, torch.bfloat16), backend=svg2_backend, options=ALWAYS_SPARSE | guard, fullgraph=True
    )
    inputs = [tokens(seed) for seed in range(3)]
    for x in inputs[:2]:
        compiled(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(inputs[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_a_layer_takes_no_more_memory_than_the_plan_promises(monkeypatch):
    for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
        monkeypatch.syspath_prepend(str(folder))
    heads, count, dim, clusters = 8, 32_760, 128, (55, 218)
    promised = importlib.import_module("memory_plan").measure(heads, count, dim, *clusters).peak
    options = ALWAYS_SPARSE | {"q_clusters": clusters[0], "k_clusters": clusters[1]}
    compiled = torch.compile(Attention(), backend=svg2_backend, options=options, fullgraph=True)
    q, k, v = (torch.randn(1, count, heads, dim, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    compiled(q, k, v)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # what was asked for; the allocator rounds it up
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = compiled(q, k, v)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert peak - out.untyped_storage().nbytes() <= promised
