"""Compile time of the dense model, of its sparse variant, and of both, for a Wan of 40 blocks.

    python -P benchmarks/models/compile_time.py --out docs/images/compile_time.json --write PAGE

PAGE is docs/lab/2026-11-25-19-compile-time.md.
Every figure is a process of its own: CPU seconds (its own and its compilers', one thread each) of the first forwards
less a later one. Tracing, passes, lowering and loading are all in it, and the run of the dense forward of ``both``;
imports are not. CPU seconds, because other work on the machine stretches the clock's; these are in the JSON as well.
``dense`` is Inductor alone; ``sparse`` makes every step sparse, so that no dense variant is compiled; ``both`` is a
dense step followed by sparse ones, as users have it. Cold is an empty cache folder, warm the next process with the
folder that the cold one filled. The three take turns in every round. Real blocks (self-attention with rotary
positions, cross-attention, feed-forward), tiny widths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from marked_table import write_between

VARIANTS = ("dense", "sparse", "both")
MODES = ("regional", "whole model")
GOAL = 0.5
"""What compiling the sparse variant too may add to the dense compile time, regional."""


def cpu_seconds() -> float:
    """Return what this process and its finished children have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(mode: str, variant: str, layers: int) -> dict[str, Any]:
    """Compile one variant in this process and say what it took."""
    from diffusers import WanTransformer3DModel

    from svg2_compile.backend import svg2_backend
    from svg2_compile.region import Region

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=256, ffn_dim=32, num_layers=layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()  # fmt: skip
    how: dict[str, Any] = {"backend": "inductor"}
    if variant != "dense":
        dense_steps = 1 if variant == "both" else 0
        options = {"min_tokens": 256, "top_p": 0.9, "dense_steps": dense_steps, "dense_layers": 0}
        how = {"backend": svg2_backend, "options": options}
    if mode == "regional":
        model.compile_repeated_blocks(fullgraph=True, **how)
    else:
        model.compile(fullgraph=True, **how)
    latent, text = torch.randn(1, 4, 2, 32, 32), torch.randn(1, 12, 16)
    forwards: list[tuple[float, float]] = []
    with torch.no_grad():
        for step in range(5):
            started = cpu_seconds(), time.perf_counter()
            model(latent, torch.tensor([999.0 - step]), text)
            forwards.append((cpu_seconds() - started[0], time.perf_counter() - started[1]))
    first = 2 if variant == "both" else 1
    cpu, wall = ([each[kind] for each in forwards] for kind in (0, 1))
    result = {
        "seconds": sum(cpu[:first]) - statistics.median(cpu[first:]),
        "wall_seconds": sum(wall[:first]) - statistics.median(wall[first:]),
        "cpu_forwards_s": cpu,
        "wall_forwards_s": wall,
    }
    for region in list(Region.instances):
        result |= {
            "passes_ms": region.plan.timings_ms,
            "dense_lowering_s": region.dense.compile_seconds,
            "sparse_lowering_s": region.sparse.compile_seconds,
            "dense_nodes": len(region.dense._gm.graph.nodes),
            "sparse_nodes": len(region.sparse._gm.graph.nodes),
            "sites": len(region.plan.sites),
        }
    return result


def in_a_process(mode: str, variant: str, layers: int, cache: str) -> dict[str, Any]:
    """Run ``measure`` in a fresh process that keeps its caches in ``cache``."""
    command = [sys.executable, "-P", __file__, "--measure", mode, variant, "--layers", str(layers)]
    # compilers that a pool of workers starts would be nobody's finished children
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{mode}, {variant}: {done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def added(row: dict[str, float]) -> float:
    """Return the share of the dense compile time that the sparse variant adds to it."""
    return row["both"] / row["dense"] - 1


def medians(runs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the median seconds of every variant, by mode and caches."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for mode in MODES:
        for caches in ("cold", "warm"):
            found = [run for run in runs if (run["mode"], run["caches"]) == (mode, caches)]
            if {run["variant"] for run in found} == set(VARIANTS):
                rows[mode, caches] = {
                    each: statistics.median(run["seconds"] for run in found if run["variant"] == each)
                    for each in VARIANTS
                }
    return rows


def table(record: dict[str, Any]) -> str:
    """Return the Markdown table of a record."""
    lines = [
        "| compiled | caches | rounds | dense, CPU s | sparse alone, CPU s | both, CPU s | sparse adds | passes, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (mode, caches), row in medians(record["runs"]).items():
        found = [
            run for run in record["runs"] if (run["mode"], run["caches"], run["variant"]) == (mode, caches, "both")
        ]
        passes = statistics.median(sum(run["passes_ms"].values()) for run in found)
        times = " | ".join(f"{row[each]:.1f}" for each in VARIANTS)
        lines.append(f"| {mode} | {caches} | {len(found)} | {times} | {added(row):.0%} | {passes:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of every mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, help="JSON, written after every process; what it has already is kept")
    parser.add_argument("--write", type=Path, help="Markdown page with the markers of the table")
    parser.add_argument("--measure", nargs=2, metavar=("MODE", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.layers)))
        return
    record: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
    record |= {"layers": arguments.layers, "runs": []}
    if arguments.out and arguments.out.exists():
        record = json.loads(arguments.out.read_text())
        if record["layers"] != arguments.layers:
            raise SystemExit(f"{arguments.out} has {record['layers']} layers, not {arguments.layers}")
    for _ in range(arguments.rounds):
        for mode in arguments.modes:
            for variant in VARIANTS:
                with tempfile.TemporaryDirectory() as cache:
                    for caches in ("cold", "warm"):
                        run = in_a_process(mode, variant, arguments.layers, cache)
                        record["runs"].append({"mode": mode, "caches": caches, "variant": variant} | run)
                        print(f"{mode}, {variant}, {caches}: {run['seconds']:.1f} CPU s", flush=True)
                        if arguments.out:
                            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    regional = medians(record["runs"]).get(("regional", "cold"))
    if regional:
        verdict = "met" if added(regional) <= GOAL else "missed"
        print(f"goal of {GOAL:.0%} in regional mode: {verdict}, {added(regional):.0%}")
    if arguments.write:
        write_between(arguments.write, "compile time", table(record))


if __name__ == "__main__":
    main()
