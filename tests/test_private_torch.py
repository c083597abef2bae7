"""What we use of PyTorch's private names: each is asked for by name here, and stands in one file per room.

After an upgrade of torch, the tests that fail are the list of what to mend.
"""

import ast
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph, GraphModule, symbolic_trace

from svg2_compile import dynamo
from svg2_compile.kernels import private_torch
from svg2_compile.passes import dynamo_graphs, nodes
from svg2_compile.tensorrt import private_names

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = (
    "kernels/private_torch.py",
    "passes/dynamo_graphs.py",
    "svg2_compile/dynamo.py",
    "svg2_compile/tensorrt/private_names.py",
)
OTHERS = sorted(
    path
    for room in ("kernels", "passes", "svg2_compile")
    for path in (ROOT / room).rglob("*.py")
    if str(path.relative_to(ROOT)) not in PRIVATE
)
OF_OTHERS = {"_getframe", "_hf_hook", "_diffusers_hook", "_attention_backend", "_num_timesteps", "_repeated_blocks"}
"""Private names of Python, accelerate and diffusers; who reads them does without where they are missing."""

NAMES = {
    "torch": ("_check_value", "_check_type"),
    "torch._C._dynamo.eval_frame": ("reset_code",),
    "torch._C._nn": ("scaled_dot_product_attention",),
    "torch._dynamo": ("mark_static_address",),
    "torch._dynamo.cache_size": ("exceeds_recompile_limit",),
    "torch._dynamo.config": ("recompile_limit", "accumulated_recompile_limit"),
    "torch._dynamo.convert_frame": ("ConvertFrameAssert",),
    "torch._dynamo.eval_frame": ("OptimizedModule", "innermost_backend"),
    "torch._dynamo.guards": ("GuardBuilder", "install_guard"),
    "torch._dynamo.source": ("AttrSource",),
    "torch._dynamo.symbolic_convert": ("InstructionTranslator",),
    "torch._dynamo.utils": ("get_hook_for_recompile_user_context", "register_hook_for_recompile_user_context"),
    "torch._functorch._aot_autograd.descriptors": ("BufferAOTInput", "ParamAOTInput", "PlainAOTInput"),
    "torch._functorch.aot_autograd": ("aot_module_simplified",),
    "torch._guards": ("TracingContext", "tracing"),
    "torch._inductor": ("list_mode_options",),
    "torch._inductor.compile_fx": ("compile_fx",),
    "torch._inductor.config": ("get_config_copy",),
    "torch._inductor.runtime.cache_dir_utils": ("cache_dir",),
    "torch._ops": ("OpOverload", "OpOverloadPacket"),
    "torch._subclasses.fake_tensor": ("FakeTensor", "FakeTensorMode"),
    "torch.compiler.config": ("cache_key_tag", "patch"),
    "torch.fx.experimental.symbolic_shapes": ("RelaxedUnspecConstraint", "ShapeEnv", "StrictMinMaxConstraint"),
    "torch.ops.aten": ("_scaled_dot_product_flash_attention_for_cpu",),
    "torch.ops.higher_order": ("auto_functionalized_v2",),
    "torch.utils._python_dispatch": ("_disable_current_modes",),
}


KEPT_GRAPHS = ({"_get_cache_entries_for_region", "_get_total_cache_entry_count"}, {"_debug_get_cache_entry_list"})
"""What lists Dynamo's graphs: where ``torch.compile`` can isolate recompilations, and where it cannot."""


def test_dynamo_lists_the_graphs_that_it_keeps():
    assert any(each <= vars(torch._dynamo.eval_frame).keys() for each in KEPT_GRAPHS)

    def function(x):
        return x + 1

    torch._dynamo.reset()
    torch.compile(function, backend="eager")(torch.ones(3))
    torch.compile(function, backend="eager")(torch.ones(3, dtype=torch.float64))
    code = function.__code__
    assert len(dynamo._kept_graphs(code, dynamo.NO_REGION)) == dynamo._count_of_kept_graphs(code) == 2


@pytest.mark.parametrize("module", NAMES)
def test_torch_has_the_names_that_we_use(module):
    first, *rest = module.split(".")
    found = importlib.import_module(first)
    for name in rest:
        found = getattr(found, name, None) or importlib.import_module(f"{found.__name__}.{name}")
    missing = [name for name in NAMES[module] if not hasattr(found, name)]
    assert not missing


def traced(function, *args, **options):
    """Return Dynamo's graph of a function, and whatever ``look`` makes of it while Dynamo waits for its backend."""
    graphs = []
    look = options.pop("look", lambda gm: None)

    def backend(gm, inputs):
        graphs.append((gm, look(gm)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, **options)(*args)
    return graphs[0]


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, timestep):
        x = (self.weight * timestep)[None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_dynamo_writes_the_attention_that_we_look_for_and_says_where_inputs_come_from():
    gm, _ = traced(Attention(), torch.ones(()))
    assert gm.graph.find_nodes(op="call_function", target=dynamo_graphs.SDPA)
    sources = [dynamo_graphs.source_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    assert sorted(sources) == ["L['self']._parameters['weight']", "L['timestep']"]


def test_dynamos_translator_knows_the_variables_of_the_traced_code():
    model = Attention()
    _, ((code, variables), mode) = traced(
        model, torch.ones(()), look=lambda gm: (dynamo.traced_function(), dynamo.fake_mode_of_trace())
    )
    assert code is Attention.forward.__code__
    assert variables["self"] is model and isinstance(mode, dynamo_graphs.FakeTensorMode)
    assert dynamo.traced_function() is None


def test_dynamo_tells_which_code_it_compiles_and_how_many_graphs_it_keeps_of_it():
    model = Attention()
    _, found = traced(model, torch.ones(()), look=lambda gm: dynamo.code_under_compilation())
    assert found.code is Attention.forward.__code__ and found.root is Attention and found.name == "forward"
    assert callable(found.backend.compiler_fn) and found.called(found.backend.compiler_fn) == {}
    assert found.called(traced) is None and found.limit_exceeded() is None and found.limit_reached() is None
    with torch._dynamo.config.patch(recompile_limit=1):
        assert found.limit_reached() == dynamo.Limit("torch._dynamo.config.recompile_limit", 1)
    found.forget()
    assert found.limit_reached(8) is None and found.limit_reached(9) is not None
    assert dynamo.code_under_compilation() is None


guarded = SimpleNamespace(word="first")


def test_a_guard_on_our_own_attribute_lets_dynamo_compile_again_and_a_hook_is_called_before():
    called, hook = [], lambda: called.append(dynamo.code_under_compilation().name) or ""
    dynamo.call_before_compiling(hook)
    dynamo.call_before_compiling(hook)
    compiled = []

    def backend(gm, inputs):
        dynamo.guard_attribute(__name__, "guarded", "word")
        compiled.append(guarded.word)
        return gm.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    try:
        for word in ("first", "first", "second", "first"):
            guarded.word = word
            function(torch.ones(2))
    finally:
        torch._dynamo.utils.get_hook_for_recompile_user_context().remove(hook)
    assert compiled == ["first", "second"] and called == ["<lambda>"] * 2


@pytest.mark.parametrize(("bounds", "heeded"), [(None, True), ({}, True), ({"min": 2, "max": 9}, False)])
def test_dynamo_heeds_guards_on_sizes_while_it_waits_and_promises_are_known(bounds, heeded):
    x = torch.ones(4)
    if bounds is not None:
        torch._dynamo.mark_dynamic(x, 0, **bounds)

    def size_of(gm):
        size = next(value.shape[0] for node in gm.graph.nodes if (value := nodes.tensor_of(node)) is not None)
        return size, dynamo_graphs.heeds_guards(size), dynamo_graphs.heeds_guards(size, fixing=True)

    options = {"dynamic": True} if bounds is None else {}
    _, (size, may_guard, may_fix) = traced(lambda x: x + 1, x, look=size_of, **options)
    assert (may_guard, may_fix) == (heeded, bounds is None)
    assert not dynamo_graphs.heeds_guards(size)


def test_a_copy_carries_what_dynamo_hung_onto_its_module():
    gm, carried = traced(Attention(), torch.ones(()), look=lambda gm: set(dynamo_graphs.CARRIED) & gm.__dict__.keys())
    assert carried >= {"_param_name_to_source", "meta", "_source_to_user_stacks", "compile_subgraph_reason"}
    copy = GraphModule(gm, Graph())
    dynamo_graphs.carry_over(gm, copy)
    assert all(copy.__dict__[name] is gm.__dict__[name] for name in carried)


def test_inputs_without_a_source_and_with_a_fixed_address_are_marked_as_aotautograd_reads_it():
    graph = Graph()
    old, new, state = (graph.placeholder(name) for name in ("old", "new", "state"))
    old._dynamo_source = "source"
    dynamo_graphs.copy_source(old, new)
    dynamo_graphs.mark_sourceless(state)
    dynamo_graphs.mark_static_input(state)
    assert new._dynamo_source == "source" and state._dynamo_source is None
    assert dynamo_graphs.source_name(state) == ""
    # who reads the mark
    sources = [Path(torch.__file__).parent / each for each in ("_functorch/aot_autograd.py", "_dynamo/utils.py")]
    assert any("_dynamo_static_input_type" in source.read_text() for source in sources)


def test_ops_tell_their_schema_and_name():
    copy, add = torch.ops.aten.copy_.default, torch.ops.aten.add
    schema = dynamo_graphs.schema_of(copy)
    assert schema.is_mutable and schema.arguments[0].is_write and len(schema.returns) == 1
    assert dynamo_graphs.name_of_op(copy) == "aten::copy_" and dynamo_graphs.name_of_packet(add) == "aten::add"


def test_a_graph_has_a_codegen_and_its_nodes_can_be_renamed():
    gm = symbolic_trace(torch.nn.ReLU())
    codegen = dynamo_graphs.codegen_of(gm.graph)
    gm.graph.set_codegen(codegen)
    assert dynamo_graphs.codegen_of(gm.graph) is codegen
    node = next(iter(gm.graph.nodes))
    private_names.rename(node, "renamed")
    assert node.name == "renamed"


def test_views_share_their_memory_fake_or_not():
    with dynamo.fake_mode_of_fixed_sizes():
        fake = torch.zeros(4)
        assert dynamo_graphs.memory_of(fake[1:]) == dynamo_graphs.memory_of(fake)
        assert dynamo_graphs.memory_of(fake) != dynamo_graphs.memory_of(torch.zeros(4))
        assert isinstance(fake, dynamo_graphs.FakeTensor)
    real = torch.zeros(4)
    assert dynamo_graphs.memory_of(real[1:]) == dynamo_graphs.memory_of(real)


def test_a_functionalized_op_names_the_tensors_that_it_updates():
    import svg2_compile.kernels.ops  # noqa: F401  # defines svg2::kmeans_

    op = torch.ops.svg2.kmeans_.default
    written = [each.name for each in dynamo_graphs.schema_of(op).arguments if each.is_write]
    seen = []

    def compiled(gm, inputs):
        for node in gm.graph.find_nodes(op="call_function", target=dynamo_graphs.AUTO_FUNCTIONALIZED):
            assert node.args[0] is op
            seen.append([dynamo_graphs.bases_of(node)[dynamo_graphs.place_among_bases(node, name)] for name in written])
        return gm.forward

    def cluster(x, centroids, calls):
        return op(x, centroids, calls, 1, 1, 0)

    def backend(gm, inputs):
        return private_names.aot_module_simplified(gm, inputs, fw_compiler=compiled, inference_compiler=compiled)

    torch._dynamo.reset()
    x, centroids, calls = torch.randn(1, 2, 32, 8), torch.zeros(1, 2, 4, 8), torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        torch.compile(cluster, backend=backend)(x, centroids, calls)
    assert seen and all(node.op == "placeholder" for node in seen[0])


def test_a_compiler_finds_our_fake_mode_where_it_looks_for_dynamos():
    mode = dynamo.fake_mode_of_fixed_sizes()
    with dynamo.tracing_with(mode):
        assert dynamo.fake_mode_of_trace() is mode


def test_inductor_tells_its_options_and_modes():
    assert callable(dynamo.load_compile_fx())
    assert dynamo.has_inductor_option("max-autotune") and not dynamo.has_inductor_option("top_p")
    assert dynamo.options_of_mode("reduce-overhead") == {"triton.cudagraphs": True}


def test_compiled_and_disabled_code_is_known_for_what_it_is():
    module = torch.nn.ReLU()
    assert dynamo.uncompiled(torch.compile(module)) is module is dynamo.uncompiled(module)
    function = module.forward
    assert dynamo.is_compiled(torch.compile(function)) and not dynamo.is_compiled(function)
    assert dynamo.is_kept_from_dynamo(torch.compiler.disable(function)) and not dynamo.is_kept_from_dynamo(function)


def test_code_after_a_graph_break_is_called_as_we_expect():
    class Broken(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x.sin()

    _, name = traced(Broken(), torch.ones(2), look=lambda gm: dynamo.InstructionTranslator.current_tx().f_code.co_name)
    assert name.startswith(dynamo.RESUMED)


def test_tensors_of_a_model_can_be_replaced_and_marked():
    model = dynamo.over_all_tensors(torch.nn.Linear(2, 2), lambda tensor: tensor.double())
    assert model.weight.dtype is torch.float64
    state = torch.zeros(2)
    dynamo.mark_static_address(state)


def test_the_cpus_attention_returns_the_log_sum_exp_and_checks_raise():
    q = torch.randn(1, 1, 4, 8)
    out, lse = private_torch.flash_attention_for_cpu(q, q, q, scale=1.0)
    assert out.shape == q.shape
    torch.testing.assert_close(lse.reshape(-1), (q @ q.mT).logsumexp(-1).reshape(-1))
    with pytest.raises(ValueError, match="said"):
        private_torch.check_value_of_torch(False, lambda: "said")
    with pytest.raises(TypeError, match="said"):
        private_torch.check_type_of_torch(False, lambda: "said")


def test_what_the_lowering_with_tensorrt_needs_of_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert private_names.folder_of_caches() == tmp_path
    tensor = torch.zeros(2)
    before = dynamo.version_of(tensor)
    tensor.add_(1)
    assert dynamo.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert dynamo.version_of(torch.zeros(2)) == 0
    with dynamo.fake_mode_of_fixed_sizes():
        with private_names.without_modes():
            assert type(torch.zeros(2)) is torch.Tensor
        assert isinstance(torch.zeros(2), dynamo_graphs.FakeTensor)


@pytest.fixture(scope="module")
def defined_by_us() -> set[str]:
    """Every name that our own files give to a function, a class, a variable or an attribute."""
    names: set[str] = set()
    for path in OTHERS:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_stand_nowhere_else(path, defined_by_us):
    """Neither imported, nor an attribute that no file of ours defines, nor asked for by ``getattr``.

    ATen's own ops may begin with an underscore: there it is a part of the name that graphs and users see.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)) if any(map(is_private, module.split("."))):
                found.append(module)
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "torch":
                found += [alias.name for alias in names if is_private(alias.name)]
            case ast.Import(names=names):
                found += [alias.name for alias in names if any(map(is_private, alias.name.split(".")))]
            case ast.Attribute(value=value, attr=name) if is_private(name) and not ast.unparse(value).endswith("aten"):
                found += [] if name in defined_by_us | OF_OTHERS else [ast.unparse(node)]
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]):
                found += [name] if is_private(name) and name not in OF_OTHERS else []
    assert not found, f"belongs into one of {PRIVATE}: {found}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
