"""Record the bits that fixed cases put out on the CPU, and compare two records: a refactoring must not change one.

    python -P benchmarks/models/output_bits.py record before.json
    python -P benchmarks/models/output_bits.py record after.json --only 'tiny_wan*' 'export*'
    python -P benchmarks/models/output_bits.py compare before.json after.json --only 'tiny_wan*' 'export*'

A record holds, for each case, the SHA-256 of the bytes of every output, its shape and dtype, and the densities and
recalls that the report tells. Two calls follow each other wherever a later one starts from the state of the first.
Cases, by the beginning of their names:

    model/       the models of the conformance suite, top_p 0.9, node by node
    inductor/    some of them, compiled
    policy/      some of them with a guard, with measured recall, with blocks chosen by every query
    tiny_wan/    generations of the tiny Wan with dense steps and guidance, so with both streams
    export/      exported graphs made sparse with their state in buffers, run as they are
    aot/         a package made by AOTInductor

``compare`` prints what differs and ends with 1 if anything does, a case that only one record has included. Bits are
those of one machine and one set of packages: both records name theirs, and Inductor starts from an empty cache.

It records an older tree too: run it by that tree's interpreter, with ``--tests`` for the folder in which the
conformance suite, or the folder ``cases`` around it, lies.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import svg2_compile
from svg2_compile import SparseConfig, denoise_step, sparsify, svg2_backend, tiny_wan
from svg2_compile.environment import describe_environment

TESTS = Path(__file__).resolve().parents[2] / "tests"
SHOWN = 40
"""Differences that are printed one by one."""
MODEL_OPTIONS = {"top_p": 0.9, "dense_steps": 0, "dense_layers": 0, "min_tokens": 64, "lowering": "eager"}
COMPILED = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel")
POLICIES: dict[str, dict[str, Any]] = {
    "guard": {"top_p": 0.5, "min_recall": 0.54},
    "recall": {"top_p": 0.5, "recall_rows": 16, "recall_interval": 2},
    "queries": {"top_p": 0.5, "estimate_by": "queries"},
    "queries and guard": {"top_p": 0.5, "estimate_by": "queries", "min_recall": 0.54, "recall_rows": 8},
}
"""The guard makes some heads dense and leaves others sparse."""
POLICY_MODELS = (*COMPILED, "FluxTransformer2DModel", "MochiTransformer3DModel")
VIDEO: dict[str, Any] = {"frames": 4, "height": 64, "width": 128, "steps": 5, "guidance_scale": 2.0}
"""512 tokens."""
TINY_OPTIONS = {
    "top_p": 0.6,
    "dense_steps": 0.4,
    "dense_layers": 1,
    "min_tokens": 256,
    "q_clusters": 12,
    "k_clusters": 40,
    "lowering": "eager",
}
TINY_WAN: dict[str, dict[str, Any]] = {"plain": {}, **POLICIES, "automatic clusters": {"q_clusters": "auto"}}
BLOCK_CONFIG = SparseConfig(top_p=0.6, min_tokens=256, q_clusters=5, k_clusters=11, dense_layers=0)

Outputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """Something that puts out tensors, the same ones each time."""

    name: str
    run: Callable[[], Outputs]


class Block(nn.Module):
    """A residual self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, N, 24] and what its tokens attend to."""
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases and write their bits")
    recording.add_argument("out", type=Path)
    recording.add_argument("--tests", type=Path, default=TESTS, help="where the conformance suite lies")
    comparing = commands.add_parser("compare", help="print what differs between two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    for each in (recording, comparing):
        each.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of cases, as in a shell")
    arguments = parser.parse_args()
    if arguments.command == "record":
        return record(arguments.out, arguments.tests, arguments.only)
    return compare(*(json.loads(each.read_text()) for each in (arguments.before, arguments.after)), arguments.only)


def record(out: Path, tests: Path, patterns: list[str]) -> int:
    """Run the cases whose names fit, write ``out`` after each, and return 1 if one failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"records {Path(svg2_compile.__file__).parent}")
    found: dict[str, Any] = {"environment": describe_environment(), "cases": {}}
    failed = False
    with tempfile.TemporaryDirectory() as cache:
        # what an earlier version of ours compiled must not be found again
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for case in chosen(cases(tests), patterns):
            started = time.perf_counter()
            found["cases"][case.name] = recorded(case)
            out.write_text(json.dumps(found, indent=1) + "\n")
            error = found["cases"][case.name].get("error")
            failed = failed or error is not None
            print(f"{case.name}: {time.perf_counter() - started:.1f} s{f', {error}' if error else ''}", flush=True)
    return int(failed)


def chosen(every: Iterator[Case], patterns: list[str]) -> Iterator[Case]:
    """Pick the cases whose names fit any of the patterns."""
    return (case for case in every if fits(case.name, patterns))


def fits(name: str, patterns: list[str]) -> bool:
    """Tell whether the name fits any of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def recorded(case: Case) -> dict[str, Any]:
    """Return what a case put out, or the error that it ended with."""
    torch._dynamo.reset()
    svg2_compile.reset()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            outputs = case.run()
    except Exception as error:  # the other cases are recorded all the same
        first_line = str(error).strip().split("\n")[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
    return {name: bits_of(x) for name, x in outputs.items()}


def bits_of(x: Tensor) -> dict[str, Any]:
    """Return the digest of a tensor's bytes in row-major order, its shape and its dtype."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "shape": list(x.shape), "dtype": str(x.dtype)}


def cases(tests: Path) -> Iterator[Case]:
    """Make every case, one at a time."""
    sys.path.append(str(tests / "cases" if (tests / "cases").is_dir() else tests))
    from conformance.cases import CASES

    by_class = {each.name: each for each in reversed(CASES)}  # the first of a class
    for name, changes in TINY_WAN.items():
        yield Case(f"tiny_wan/{name}", lambda changes=changes: generations(changes))
    lean = {"steps": 4, "guidance_scale": 1.0}
    yield Case("tiny_wan/no guidance", lambda: generations({}, video=lean))
    yield Case("tiny_wan/no guidance, bf16", lambda: generations({}, dtype=torch.bfloat16, video=lean))
    yield Case("tiny_wan/block by block, inductor", lambda: generations({"lowering": "inductor"}, by_block=True))
    yield Case("export/block", exported_block)
    for name in COMPILED:
        yield Case(f"export/{name}", lambda name=name: exported_model(by_class[name]))
    yield Case("aot/block", packaged_block)
    for name in COMPILED:
        yield Case(f"inductor/{name}", lambda name=name: calls(by_class[name], {"lowering": "inductor"}))
    for name in POLICY_MODELS:
        for policy, changes in POLICIES.items():
            yield Case(
                f"policy/{name}, {policy}", lambda name=name, changes=changes: calls(by_class[name], changes, count=3)
            )
    for each in CASES:
        yield Case(f"model/{each.id}", lambda each=each: calls(each, {}))


def calls(model_case: Any, changes: dict[str, Any], count: int = 2) -> Outputs:
    """Return what a model of the conformance suite puts out in some steps, sparse from the first one on."""
    from conformance.examine import output_of

    model, fullgraph = model_case.make(), model_case.ask_fullgraph and not model_case.breaks
    options = {**MODEL_OPTIONS, **changes}
    output_of(model, model_case.inputs())  # some fill tables of positions in a way that cannot be traced
    compiled = torch.compile(model, backend=svg2_backend, fullgraph=fullgraph, options=options)
    outputs: Outputs = {}
    for step in range(count):
        with denoise_step(step, count, "a stream"):
            outputs[f"step {step + 1}"] = output_of(compiled, model_case.inputs())
    return outputs | reported(model)


def generations(
    changes: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    by_block: bool = False,
    video: dict[str, Any] = VIDEO,
) -> Outputs:
    """Return the latents after each step of a generation of the tiny Wan, and of a second one's last step."""
    pipeline = tiny_wan.load_pipeline(dtype=dtype)
    model = pipeline.transformer
    options = {**TINY_OPTIONS, **changes}
    if by_block:
        model.compile_repeated_blocks(backend=svg2_backend, options=options)
    else:
        model.compile(backend=svg2_backend, options=options)
    outputs: Outputs = {}

    def keep(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs[f"step {step + 1}"] = tensors["latents"].clone()
        return tensors

    video = {**VIDEO, **video}
    first, _, another, *_ = tiny_wan.example_prompts()
    tiny_wan.generate(pipeline, first, callback_on_step_end=keep, **video)
    outputs |= reported(model)
    outputs["another generation"] = tiny_wan.generate(pipeline, another, **video)
    return outputs


def reported(model: nn.Module) -> Outputs:
    """Return the densities and recalls that the report tells of the sparse attentions."""
    sites = svg2_compile.report(model).sparse_sites
    figures = {
        "densities": [site.density_per_head for site in sites],
        "recalls": [site.recall_per_head for site in sites],
        "masses": [(site.kept_mass, site.lowest_kept_mass, site.k_padding) for site in sites],
        "dense heads": [(head.head, head.since_call) for site in sites for head in site.dense_heads],
    }
    return {name: torch.tensor(flat(values), dtype=torch.float64) for name, values in figures.items()}


def flat(rows: list[tuple[float | None, ...]]) -> list[float]:
    """Return the values of all rows in one list; what is not known is NaN."""
    return [float("nan") if value is None else value for row in rows for value in row]


def exported_block() -> Outputs:
    """Return what an exported attention puts out in three calls, and the state that it ends with."""
    x = torch.randn(3, 1, 301, 24)
    program = torch.export.export(Block().eval(), (x[0],))
    plan = sparsify(program.module(), BLOCK_CONFIG, state="buffers")
    outputs = {f"call {number + 1}": plan.gm(each) for number, each in enumerate(x)}
    return outputs | state_of(plan.gm)


def exported_model(model_case: Any) -> Outputs:
    """Return what an exported model puts out in two calls, and the state that it ends with."""
    inputs = {**model_case.inputs(), "return_dict": False}
    program = torch.export.export(model_case.make(), (), inputs)
    config = SparseConfig(top_p=0.9, dense_layers=0, min_tokens=64)
    plan = sparsify(program.module(), config, state="buffers")
    return {f"call {number}": plan.gm(**inputs)[0] for number in (1, 2)} | state_of(plan.gm)


def packaged_block() -> Outputs:
    """Return what a package of an attention puts out in three calls, its state its own."""
    x = torch.randn(3, 1, 301, 24)
    program = torch.export.export(Block().eval(), (x[0],))
    plan = sparsify(program.module(), BLOCK_CONFIG, state="buffers")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "block.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(plan.gm, (x[0],)), package_path=path)
        package: Any = torch._inductor.aoti_load_package(path)
        return {f"call {number + 1}": package(each).clone() for number, each in enumerate(x)}


def state_of(gm: nn.Module) -> Outputs:
    """Return the state in the buffers of a sparse graph, by its names."""
    return {name: x.clone() for name, x in gm.named_buffers() if name.startswith("svg2_")}


def compare(before: dict[str, Any], after: dict[str, Any], patterns: list[str]) -> int:
    """Print a table of the kinds of cases and the outputs that differ; return 1 if any does."""
    if before["environment"] != after["environment"]:
        print(f"environments differ: {before['environment']} and {after['environment']}")
    names = [name for name in {**before["cases"], **after["cases"]} if fits(name, patterns)]
    wrong = {name: differences(before["cases"].get(name), after["cases"].get(name)) for name in names}
    outputs = {name: len(before["cases"].get(name, {})) for name in names}
    print("| cases | number | outputs | cases that differ |\n|---|---:|---:|---:|")
    for kind in dict.fromkeys(name.split("/")[0] for name in names):
        of_kind = [name for name in names if name.split("/")[0] == kind]
        differing = sum(bool(wrong[name]) for name in of_kind)
        print(f"| {kind} | {len(of_kind)} | {sum(outputs[name] for name in of_kind)} | {differing} |")
    lines = [f"{name}: {each}" for name in names for each in wrong[name]]
    print(*lines[:SHOWN], sep="\n", end="\n" if lines else "")
    if len(lines) > SHOWN:
        print(f"and {len(lines) - SHOWN} more")
    if not names:
        print("no case fits")
    print("every bit is the same" if names and not lines else "NOT THE SAME")
    return int(bool(lines) or not names)


def differences(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """Say what differs between two records of a case; one that failed equals nothing."""
    if before is None or after is None:
        return [f"only in the {'second' if before is None else 'first'} record"]
    errors = [f"failed in the {which} record: {each['error']}" for which, each in
              (("first", before), ("second", after)) if "error" in each]  # fmt: skip
    if errors:
        return errors
    return [
        f"{name}: {told(before.get(name))} and {told(after.get(name))}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]


def told(bits: dict[str, Any] | None) -> str:
    """Return an output in one short word."""
    return f"{bits['sha256'][:8]} {bits['dtype']} {bits['shape']}" if bits else "missing"


if __name__ == "__main__":
    sys.exit(main())
