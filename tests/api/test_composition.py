"""Living with others: adapters, offloading, quantisation and caches, each with each way to compile.

Each cell of docs/composition.md is a test here: it runs the pipeline and compares what happened with the page.

    python -P tests/api/test_composition.py docs/composition.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "cases"))

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
)
from diffusers.hooks import apply_group_offloading
from tiny_pipelines import (
    OPTIONS,
    PIPELINES,
    STEPS,
    Entry,
    PipelineCase,
    generate_wan,
    numbered,
    record_calls,
    sparse,
    wan_pipeline,
)

import svg2_compile
from svg2_compile import svg2_backend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "composition.md"
CPU = torch.device("cpu")
FAMILY = {case.name: case for case in PIPELINES}

SPARSE = "sparse"
REFUSED = "refused"
DENSE = "dense, with a reason"

WAYS = ("model, fullgraph", "model", "blocks", "forwards")
"""How the transformer is compiled; ``forwards`` before the other is enabled, the rest after."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Something that changes how a transformer runs, and what becomes of sparse attention with it."""

    name: str
    enable: Callable[[Any], Any]
    """Takes the pipeline."""

    verdicts: tuple[str, str, str, str]
    """What happens, for each of ``WAYS``."""

    note: str
    steps: tuple[tuple[int, ...], tuple[int, ...]] = (tuple(range(STEPS)),) * 2
    """The steps in which the first block and the others run their attention."""

    keeps_output: bool = False
    """True where the output is the same, bit by bit, as without it."""

    family: str = "Wan 2.1"
    package: str = "diffusers"
    options: str = ""
    """A mode of ``torch.compile``."""


def add_lora(pipeline: Any) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    pipeline.transformer.add_adapter(adapter, adapter_name="style")


def offload_model(pipeline: Any) -> None:
    """Do what ``enable_model_cpu_offload`` does to each model; it asks for an accelerator before that."""
    from accelerate import cpu_offload_with_hook

    pipeline.transformer, _ = cpu_offload_with_hook(pipeline.transformer, CPU)


def offload_sequentially(pipeline: Any) -> None:
    """Do what ``enable_sequential_cpu_offload`` does to each model."""
    from accelerate import cpu_offload

    cpu_offload(pipeline.transformer, CPU, offload_buffers=True)


def offload_groups(pipeline: Any, kind: str) -> None:
    count = 1 if kind == "block_level" else None
    apply_group_offloading(pipeline.transformer, CPU, CPU, offload_type=kind, num_blocks_per_group=count)


def quantize(pipeline: Any, config: str) -> None:
    from torchao import quantization

    quantization.quantize_(pipeline.transformer, getattr(quantization, config)())


def timestep_of(pipeline: Any) -> Callable[[], Any]:
    return lambda: pipeline.current_timestep


def enable(make_config: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda pipeline: pipeline.transformer.enable_cache(make_config(pipeline))


def pyramid(pipeline: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=timestep_of(pipeline),
    )  # fmt: skip


def faster(pipeline: Any) -> FasterCacheConfig:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.5, current_timestep_callback=timestep_of(pipeline),
    )  # fmt: skip


def taylor(pipeline: Any) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r"(transformer_)?blocks\.\d+\.attn1"]
    )


def magnitude(pipeline: Any) -> MagCacheConfig:
    return MagCacheConfig(
        mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, threshold=0.06, max_skip_steps=2, retention_ratio=0.4
    )


def enable_cache_dit(pipeline: Any) -> None:
    import cache_dit

    always = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=100.0
    )
    cache_dit.enable_cache(pipeline, cache_config=always)


EVERYWHERE = (SPARSE,) * 4
IN_PIECES = (REFUSED, SPARSE, SPARSE, SPARSE)
INSIDE_BLOCKS = (REFUSED, SPARSE, SPARSE, REFUSED)
NEVER_WHOLE = (REFUSED, DENSE, DENSE, REFUSED)

NEIGHBOURS = (
    Neighbour(
        "LoRA (peft)", add_lora, EVERYWHERE,
        "the weights are not ours: adapters may be added, scaled, switched off and fused before or after",
        package="peft",
    ),
    Neighbour(
        "`enable_model_cpu_offload`", offload_model, IN_PIECES,
        "the output is the same; the hook cannot be traced as part of one graph: compile blocks",
        keeps_output=True, package="accelerate",
    ),
    Neighbour(
        "group offloading, `block_level`", lambda pipeline: offload_groups(pipeline, "block_level"), IN_PIECES,
        "the output is the same",
        keeps_output=True,
    ),
    Neighbour(
        "group offloading, `leaf_level`", lambda pipeline: offload_groups(pipeline, "leaf_level"), NEVER_WHOLE,
        "hooks on each layer break the graph around every projection: offload by `block_level`",
    ),
    Neighbour(
        "`enable_sequential_cpu_offload`", offload_sequentially, NEVER_WHOLE,
        "the same: offload models or blocks",
        package="accelerate",
    ),
    Neighbour(
        "torchao, int8 weights", lambda pipeline: quantize(pipeline, "Int8WeightOnlyConfig"), EVERYWHERE,
        "linear layers are not ours", package="torchao",
    ),
    Neighbour(
        "torchao, fp8 weights", lambda pipeline: quantize(pipeline, "Float8WeightOnlyConfig"), EVERYWHERE,
        "linear layers are not ours", package="torchao",
    ),
    Neighbour(
        "FirstBlockCache", enable(lambda pipeline: FirstBlockCacheConfig(threshold=1e9)), IN_PIECES,
        "a block that is not called keeps its centroids for its next call",
        steps=(tuple(range(STEPS)), (0,)),
    ),
    Neighbour(
        "PyramidAttentionBroadcast", enable(pyramid), INSIDE_BLOCKS,
        "for pipelines that guide in one batch, as CogVideoX: the cache itself mixes up branches that are called "
        "one by one",
        steps=((0, 2, 4),) * 2, family="CogVideoX",
    ),
    Neighbour(
        "FasterCache", enable(faster), INSIDE_BLOCKS,
        "for pipelines that guide in one batch",
        steps=((0, 2, 4),) * 2, family="CogVideoX",
    ),
    Neighbour(
        "TaylorSeer", enable(taylor), INSIDE_BLOCKS,
        "name the attentions in `cache_identifiers`",
        steps=((0, 1, 3),) * 2,
    ),
    Neighbour(
        "MagCache", enable(magnitude), (REFUSED, DENSE, DENSE, SPARSE),
        "runs blocks outside the compiler, unless their forwards are compiled",
        steps=((0, 1, 4),) * 2,
    ),
    Neighbour(
        "cache-dit", enable_cache_dit, IN_PIECES,
        "the first block runs always, the others when it says so",
        steps=(tuple(range(STEPS)), (0, 1)), package="cache_dit",
    ),
    Neighbour(
        '`mode="reduce-overhead"`', lambda pipeline: None, EVERYWHERE,
        "passed on to Inductor; a CPU has no graphs to record",
        keeps_output=True, options="reduce-overhead",
    ),
)  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """What happened in one cell."""

    verdict: str
    pipeline: Any = None
    output: torch.Tensor | None = None
    again: torch.Tensor | None = None


def blocks_of(pipeline: Any) -> Any:
    transformer = getattr(pipeline.transformer, "_orig_mod", pipeline.transformer)
    return getattr(transformer, "transformer_blocks", None) or transformer.blocks


def compile_as(way: str, pipeline: Any, mode: str) -> None:
    """Compile in one of ``WAYS``; ``blocks`` is what ``compile_repeated_blocks`` does where the class allows it."""
    if way == "blocks":
        for block in blocks_of(pipeline):
            block.compile(**arguments(mode))
    elif way == "forwards":
        for block in blocks_of(pipeline):
            block.forward = torch.compile(block.forward, **arguments(mode, fullgraph=True))
    else:
        pipeline.transformer.compile(**arguments(mode, fullgraph=way == "model, fullgraph"))


def arguments(mode: str, fullgraph: bool = False) -> dict[str, Any]:
    """With a mode, ``torch.compile`` takes no options: ``configure`` gives them."""
    given = {"mode": mode} if mode else {"options": OPTIONS}
    return {"backend": svg2_backend, "fullgraph": fullgraph, **given}


def run(neighbour: Neighbour | None, way: str, family: PipelineCase) -> Outcome:
    pipeline = family.make()
    mode = neighbour.options if neighbour else ""
    if way == "forwards":
        compile_as(way, pipeline, mode)
    if neighbour is not None:
        neighbour.enable(pipeline)
    if way != "forwards":
        compile_as(way, pipeline, mode)
    try:
        output = family.generate(pipeline)
    except torch._dynamo.exc.Unsupported:
        return Outcome(REFUSED)
    again = family.generate(pipeline)
    report = svg2_compile.report(pipeline.transformer)
    if report.sparse_sites:
        return Outcome(SPARSE, pipeline, output, again)
    assert "hint: " in str(report), str(report)
    return Outcome(DENSE, pipeline, output, again)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Start anew; cache-dit replaces a method of the class of the pipeline."""
    torch._dynamo.reset()
    svg2_compile.reset()
    monkeypatch.setattr(WanPipeline, "__call__", WanPipeline.__call__)
    with svg2_compile.configure(**OPTIONS):
        yield


@pytest.fixture
def log(monkeypatch) -> list[Entry]:
    return record_calls(monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)
def test_cell(neighbour, way, log, monkeypatch):
    pytest.importorskip(neighbour.package)
    family = FAMILY[neighbour.family]
    if neighbour.verdicts[WAYS.index(way)] != DENSE:
        monkeypatch.setitem(OPTIONS, "on_unsupported", "error")  # nothing is left to complain about
    outcome = run(neighbour, way, family)
    assert outcome.verdict == neighbour.verdicts[WAYS.index(way)]
    if outcome.verdict == REFUSED:
        return
    assert outcome.output.isfinite().all() and torch.equal(outcome.output, outcome.again)
    if outcome.verdict == SPARSE:
        assert_calls_follow_the_schedule(neighbour, family, outcome, set(numbered(log)))
    if neighbour.keeps_output:
        assert torch.equal(output_alone(way, family.name), outcome.output)


@cache
def output_alone(way: str, family: str) -> torch.Tensor:
    """Return the output with nothing beside it, computed once for all that keep it."""
    torch._dynamo.reset()
    return run(None, way, FAMILY[family]).output


HIDDEN = [(each, way) for each in NEIGHBOURS for way, verdict in zip(WAYS, each.verdicts) if verdict == DENSE]


@pytest.mark.parametrize(("neighbour", "way"), HIDDEN, ids=lambda each: each if isinstance(each, str) else each.name)
def test_attention_that_hooks_hide_is_an_error_for_those_who_ask(neighbour, way, monkeypatch):
    monkeypatch.setitem(OPTIONS, "on_unsupported", "error")
    if (neighbour.name, way) == NEVER_ASKED:
        assert run(neighbour, way, FAMILY[neighbour.family]).verdict == DENSE
        return
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match=r"hook.*; (compile|choose) .*, or set on_unsupported"
    ):
        run(neighbour, way, FAMILY[neighbour.family])


NEVER_ASKED = ("MagCache", "blocks")
"""The hook keeps all of each compiled block away from Dynamo, so no graph ever reaches the backend."""


def test_the_report_of_attention_between_hooked_projections_gives_the_true_reason():
    outcome = run(next(each for each in NEIGHBOURS if "leaf" in each.name), "blocks", FAMILY["Wan 2.1"])
    reasons = {
        site.path.split(".out")[0]: site.plan for site in svg2_compile.report(outcome.pipeline.transformer).sites
    }
    assert reasons["blocks.0.attn1"].startswith("its queries and values are computed outside this graph")
    assert reasons["blocks.0.attn2"].startswith("cross-attention: 128 queries, ")
    assert any(reason.startswith("hooks on each layer ('group_offloading')") for reason in reasons.values())


def test_the_first_layer_alone_stays_dense_where_a_cache_breaks_the_graph_in_its_hooks(monkeypatch):
    """After the break, the hook of the first block holds no module: its parameters tell which block it runs."""
    monkeypatch.setitem(OPTIONS, "dense_layers", 1)
    pipeline = wan_pipeline()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    compile_as("model", pipeline, "")
    generate_wan(pipeline)
    first, second = svg2_compile.report(pipeline.transformer).sparse_sites
    assert (first.path, first.sparse_calls, first.dense_calls) == ("blocks.0.attn1", 0, 2 * STEPS)
    assert (second.path, second.sparse_calls, second.dense_calls) == ("blocks.1.attn1", 2 * (STEPS - 2), 2 * 2)


def assert_calls_follow_the_schedule(
    neighbour: Neighbour, family: PipelineCase, outcome: Outcome, seen: set[Entry]
) -> None:
    """Two generations, of which the first two steps are dense, whoever is asked; and nothing runs unseen."""
    first, others = neighbour.steps
    variants = {step: "dense" if step < 2 else "sparse" for step in range(STEPS)}
    branches = family.streams
    assert seen == {
        (run, step, name, variants[step]) for run in (0, 1) for step in {*first, *others} for name in branches
    }
    sites = svg2_compile.report(outcome.pipeline.transformer).sparse_sites
    assert len(sites) == len(blocks_of(outcome.pipeline))
    for block, (site, steps) in enumerate(zip(sites, (first, *[others] * (len(sites) - 1)))):
        kinds = [variants[step] for step in steps for _ in branches] * 2
        assert (site.sparse_calls, site.dense_calls) == (kinds.count("sparse"), kinds.count("dense"))
        # attention that runs in a hook's own graph has no module there: its node's name comes last
        assert re.fullmatch(rf"(transformer_)?blocks\.{block}\.attn1(\.\w+)?", site.path)


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "blocks"])
def test_lora_can_come_go_and_be_fused_after_compilation(regional):
    pytest.importorskip("peft")
    pipeline = wan_pipeline()
    model = sparse(pipeline.transformer, regional)
    without = generate_wan(pipeline)
    add_lora(pipeline)
    full = generate_wan(pipeline)
    model.set_adapters(["style"], [0.5])
    half = generate_wan(pipeline)
    assert not torch.equal(full, without) and not torch.equal(half, full)
    model.disable_adapters()
    assert torch.equal(generate_wan(pipeline), without)
    model.enable_adapters()
    model.set_adapters(["style"], [1.0])
    assert torch.equal(generate_wan(pipeline), full)
    model.fuse_lora()
    # the product of the adapter's factors is rounded once more, which five steps carry on
    assert (generate_wan(pipeline) - full).abs().max() <= 2e-5 * full.abs().max()


def test_pyramid_attention_broadcast_mixes_up_branches_that_are_called_one_by_one(log):
    """It counts calls and knows no branches, with or without us: every second call is the unconditional one's."""
    pipeline = wan_pipeline()
    pipeline.transformer.enable_cache(pyramid(pipeline))
    sparse(pipeline.transformer, regional=True, fullgraph=False)
    generate_wan(pipeline)
    assert {stream for _, _, stream, _ in log} == {"cond"}


def test_the_clock_of_a_model_compiled_in_pieces_is_not_traced():
    """It reads the timestep: traced, it would be a graph break of its own, inside our code."""
    family = FAMILY["CogVideoX"]
    pipeline = family.make()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    sparse(pipeline.transformer, fullgraph=False)
    torch._dynamo.utils.counters.clear()
    family.generate(pipeline)
    assert not [reason for reason in torch._dynamo.utils.counters["graph_break"] if "item()" in reason]


def test_a_mode_reaches_inductor(monkeypatch):
    from svg2_compile import backend

    patches = []

    def compile_fx(gm, inputs, config_patches=None):
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    with svg2_compile.configure(lowering="inductor"):
        pipeline = wan_pipeline()
        pipeline.transformer.compile(backend=svg2_backend, mode="reduce-overhead")
        generate_wan(pipeline)
    assert patches and all(each == {"triton.cudagraphs": True} for each in patches)


def page() -> str:
    """Return the page as it must be."""
    rows = [
        f"| {each.name} | {' | '.join(verdict for verdict in each.verdicts)} | {each.note} |" for each in NEIGHBOURS
    ]
    return "\n".join([HEAD, *rows, TAIL])


HEAD = """\
# Living with others

What becomes of sparse attention when something else changes how the transformer runs. Each cell is a test in
`tests/api/test_composition.py`, with the real pipelines of Wan or CogVideoX around tiny models, on a CPU; the tests
write this page:

    python -P tests/api/test_composition.py docs/composition.md

| | `model.compile(fullgraph=True)` | `model.compile()` | blocks | forwards of blocks | |
|---|---|---|---|---|---|"""

TAIL = """
- **sparse**: every long self-attention that is called is sparse, on the schedule, step by step and branch by branch;
  a second generation is the same, bit by bit. A step that a cache skips costs nothing and keeps the centroids.
- **refused**: Dynamo raises, and says what it cannot trace. Compile without `fullgraph=True`, or by blocks.
- **dense, with a reason**: it runs, the attention is not seen by the compiler, and `svg2_compile.report(model)` says
  which hooks are in the way and what to do. With `on_unsupported="error"` it is an error that says the same, but for
  MagCache with *blocks*: its hooks keep all of a compiled block away from the compiler, which never asks the backend
  for anything. Look at the report then, or at a timing.

*Blocks* is `model.compile_repeated_blocks(backend=svg2_backend)`, after the other is enabled. *Forwards of blocks* is

```python
for block in model.blocks:
    block.forward = torch.compile(block.forward, backend=svg2_backend, fullgraph=True)
```

*before* the other is enabled: hooks around blocks stay outside the graphs, which are whole. Hooks inside blocks, as
PyramidAttentionBroadcast, FasterCache and TaylorSeer have, are refused then; *blocks* goes with them.
"""

if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
else:

    def test_the_page_says_what_the_cells_test():
        assert PAGE.read_text(encoding="utf-8") == page(), f"run python -P tests/api/test_composition.py {PAGE}"
