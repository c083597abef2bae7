"""Every kernel at small sizes under NVIDIA's compute-sanitizer: stray accesses and races in shared memory.

    python -P benchmarks/kernels/sanitize.py

runs `--run` once as it is, which compiles everything, and then once under each tool. Tensors are allocated one by one,
so that an access behind the end of one is seen. racecheck does not follow every way in which the Hopper kernels hand
over shared memory: it is run on `race_control.py` too, which takes the same steps in the smallest kernel, and so shows
whether a report is the tool's. Without the tool or a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from random_blocks import lognormal_sizes, random_blocks, shuffled_labels

from svg2_compile.kernels import ops  # noqa: F401  (registers the ops)
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.why_not import ATTENTIONS, why_not_attention
from svg2_compile.kernels.work_list import kept_runs_reference

SANITIZER = "compute-sanitizer"
CUDA_BIN = "/usr/local/cuda/bin"
TOOLS = ("memcheck", "racecheck")
OPTIONS = {"memcheck": ("--report-api-errors", "no")}
CONTROL = Path(__file__).resolve().parent / "race_control.py"
CONTROLS = ((), ("--histogram",), ("--no-wait",))
FOUND = 9
"""Exit status of the sanitizer where it found something."""
FOUND_SOMETHING = "found something, see above"
# No multiple of any tile; queries and keys differ.
HEADS, Q_TOKENS, K_TOKENS, CONTEXT = 2, 389, 517, 33
Q_CLUSTERS, K_CLUSTERS = 7, 23
svg2 = torch.ops.svg2


def main() -> int:
    """Run the cases, under the tools or as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=TOOLS, help="of compute-sanitizer")
    parser.add_argument("--timeout-s", type=float, default=240.0, help="of each tool")
    parser.add_argument("--run", action="store_true", help="only run the cases")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device; nothing was checked")
        return 0
    if args.run:
        run_cases("cuda")
        return 0
    sanitizer = shutil.which(SANITIZER, path=os.pathsep.join((os.environ.get("PATH", ""), CUDA_BIN)))
    if sanitizer is None:
        print(f"no {SANITIZER}: it comes with CUDA's toolkit; nothing was checked")
        return 0
    if subprocess.run(cases_command(), env=environment()).returncode != 0:
        print("the cases fail without any tool: nothing was checked")
        return 1
    results = {tool: check(sanitizer, tool, cases_command(), args.timeout_s) for tool in args.tools}
    if results.get("racecheck") == FOUND_SOMETHING:
        for options in CONTROLS:
            command = [sys.executable, "-P", str(CONTROL), *options]
            results[" ".join(["control", *options])] = check(sanitizer, "racecheck", command, args.timeout_s)
    print("; ".join(f"{tool}: {result}" for tool, result in results.items()))
    return 0 if set(results.values()) == {"nothing found"} else 1


def cases_command() -> list[str]:
    """Return the command that runs the cases."""
    return [sys.executable, "-P", str(Path(__file__).resolve()), "--run"]


def environment() -> dict[str, str]:
    """Return the environment in which every tensor is an allocation of its own."""
    return os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def check(sanitizer: str, tool: str, program: list[str], timeout_s: float) -> str:
    """Run a program under one tool and return what came of it."""
    print(f"--- {tool}", flush=True)
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *OPTIONS.get(tool, ())]
    try:
        status = subprocess.run([*command, *program], env=environment(), timeout=timeout_s).returncode
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:.0f} s"
    return {0: "nothing found", FOUND: FOUND_SOMETHING}.get(status, f"failed with status {status}")


def run_cases(device: str) -> None:
    """Run all cases and print the name of each before it, so that a report can be told apart."""
    for name, case in cases(device):
        started = time.perf_counter()
        print(name, end=" ", flush=True)
        case()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{time.perf_counter() - started:.1f} s", flush=True)


def cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Return every op with bf16 tokens of both head dimensions, every attention with and without a context."""
    for dim in (64, 128):
        generator = torch.Generator(device).manual_seed(dim)

        def tokens(count: int, generator: torch.Generator = generator, dim: int = dim) -> Tensor:
            shape = (1, count, HEADS, dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

        q, k, v = tokens(Q_TOKENS), tokens(K_TOKENS), tokens(K_TOKENS)
        centroids = [torch.zeros((1, HEADS, count, dim), device=device) for count in (Q_CLUSTERS, K_CLUSTERS)]
        calls = [torch.zeros(1, dtype=torch.int32, device=device) for _ in "qk"]
        cluster = partial(svg2.cluster_tokens_, q, k, v, *centroids, *calls, 3, 2, 0)
        yield f"cluster_tokens_, first call, D={dim}", cluster
        yield f"cluster_tokens_, later call, D={dim}", cluster
        yield f"kmeans_, D={dim}", partial(svg2.kmeans_, q, centroids[0].clone(), calls[0].clone(), 3, 2, 0)

        q_sizes = lognormal_sizes(generator, 1, HEADS, Q_CLUSTERS, Q_TOKENS)
        k_sizes = lognormal_sizes(generator, 1, HEADS, K_CLUSTERS, K_TOKENS)
        q_labels, k_labels = (shuffled_labels(generator, sizes) for sizes in (q_sizes, k_sizes))
        (q_order, _), (k_order, _) = svg2.sort_labels(q_labels, Q_CLUSTERS), svg2.sort_labels(k_labels, K_CLUSTERS)
        yield f"sort_labels, D={dim}", partial(svg2.sort_labels, k_labels, K_CLUSTERS)
        yield f"permute_tokens, D={dim}", partial(svg2.permute_tokens, k, k_order)
        yield f"unpermute_tokens, D={dim}", partial(svg2.unpermute_tokens, k, k_order)
        statistics = torch.zeros((*q_sizes.shape, len(STATISTICS)), device=device)
        selection = (*centroids, q_sizes, k_sizes, dim**-0.5, 0.9, 0.1, statistics)
        yield f"select_blocks, D={dim}", partial(svg2.select_blocks, *selection)

        kept = kept_runs_reference(random_blocks(generator, 0.4, k_sizes, Q_CLUSTERS), k_sizes)
        context = (
            tokens(CONTEXT),
            tokens(CONTEXT),
            torch.arange(CONTEXT, device=device).view(1, 1, 1, -1) < CONTEXT - 5,
        )
        for implementation in runnable_attentions(device, dim):
            for kind, extra in (("", (None, None, None)), (" with context", context)):
                arguments = (q, k, v, q_sizes, kept.runs, kept.counts, *extra, q_order, dim**-0.5, implementation)
                name = f"block_sparse_attention, {implementation}{kind}, D={dim}"
                yield name, partial(svg2.block_sparse_attention, *arguments)


def runnable_attentions(device: str, dim: int) -> list[str]:
    """Return the attention kernels that can run there; a CPU has but one, of no name."""
    if device == "cpu":
        return ["auto"]
    here = torch.device(device, torch.cuda.current_device())
    return [name for name in ATTENTIONS if why_not_attention(name, here, torch.bfloat16, dim=dim) is None]


if __name__ == "__main__":
    sys.exit(main())
