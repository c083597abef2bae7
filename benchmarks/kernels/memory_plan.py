"""Device memory of a sparse layer: every allocation of every launcher, without a GPU.

    python -P benchmarks/kernels/memory_plan.py --write docs/kernels.md

The launchers themselves run, on tensors without data and with launches that do nothing, while every allocation and
every release is counted: the figures cannot drift from the code. bf16, tiles of compute capability 9.0. Per op, the
most that is held at once beside arguments and results. A layer keeps its results as long as something reads them: the
order of the queries until the end. Needs triton, no device. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from marked_table import write_between
from shapes import HUNYUAN_720P, WAN_14B_720P

from svg2_compile.kernels.launch import padded_power_of_two
from svg2_compile.kernels.selection_statistics import STATISTICS
from svg2_compile.kernels.tuning import attention_tiles

MODELS = (WAN_14B_720P, HUNYUAN_720P)
CLUSTERS = ((100, 500), (300, 1000))


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._enter(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor, tensor.untyped_storage().nbytes())
        return result

    def _enter(self, tensor: Tensor, size: int) -> None:
        """Note a storage the first time it is seen; one that comes from outside counts nothing."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


@contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Let every Triton launch return at once."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    JITFunction.run = lambda *args, **kwargs: None
    try:
        yield
    finally:
        JITFunction.run = run


def bytes_of(*tensors: Tensor) -> int:
    """Return the bytes of the storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer."""

    workspace: dict[str, int]
    """Per op, the most held at once beside arguments and results."""
    copies: int
    """K and V in cluster order."""
    peak: int
    """The most that the layer holds at once, all ops, beside q, k, v, centroids and the output."""

    @property
    def beside_copies(self) -> int:
        """The largest workspace of an op."""
        return max(self.workspace.values())


def measure(heads: int, tokens: int, dim: int, q_clusters: int, k_clusters: int) -> LayerMemory:
    """Run one sparse layer on tensors without data and return what it allocates."""
    from svg2_compile.kernels.block_sparse_attention_pointer import block_sparse_attention_pointer
    from svg2_compile.kernels.cluster_tokens_triton import cluster_tokens_triton
    from svg2_compile.kernels.select_blocks_triton import select_blocks_triton

    q, k, v = (torch.empty((1, tokens, heads, dim), dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in "qkv")
    centroids = [torch.empty((1, heads, count, dim), device="meta") for count in (q_clusters, k_clusters)]
    calls = [torch.empty(1, dtype=torch.int32, device="meta") for _ in "qk"]
    statistics = torch.empty((1, heads, q_clusters, len(STATISTICS)), device="meta")
    workspace: dict[str, int] = {}

    def run(name: str, launcher: Callable[..., Any], *args: Any) -> Any:
        before, layer_peak = ledger.held, ledger.peak
        ledger.peak = before
        result = launcher(*args)
        results = bytes_of(*(tensor for tensor in tree_leaves(result)))
        workspace[name] = max(workspace.get(name, 0), ledger.peak - before - results)
        ledger.peak = max(ledger.peak, layer_peak)
        return result

    with launches_do_nothing(), Ledger() as ledger:
        clustered = run("cluster", cluster_tokens_triton, q, k, v, *centroids, *calls, 10, 2, 0)
        q_order, q_sizes, k_sizes, keys, values = clustered
        del clustered
        sizes = (q_sizes, k_sizes)
        runs, counts = run("select", select_blocks_triton, *centroids, *sizes, dim**-0.5, 0.9, 0.1, statistics)
        tiles = attention_tiles(90, padded_power_of_two(dim), q.dtype)
        attend = (q, keys, values, q_sizes, runs, counts, None, None, None, q_order, dim**-0.5, tiles)
        out, _ = run("attention", block_sparse_attention_pointer, *attend)
        return LayerMemory(workspace, bytes_of(keys, values), ledger.peak - bytes_of(out))


def table() -> str:
    """Return the table, in Markdown."""
    columns = ("cluster", "select", "attention")
    lines = [
        f"torch {torch.__version__}; MB.",
        "",
        f"| model | clusters | {' | '.join(columns)} | largest | K and V copies | peak less copies |",
        "| --- | --- |" + " --- |" * (len(columns) + 3),
    ]
    for model in MODELS:
        for q_clusters, k_clusters in CLUSTERS:
            memory = measure(model.heads, model.tokens, model.dim, q_clusters, k_clusters)
            figures = [memory.workspace[column] for column in columns]
            figures += [memory.beside_copies, memory.copies, memory.peak - memory.copies]
            cells = " | ".join(f"{figure / 1e6:.1f}" for figure in figures)
            lines.append(f"| {model.name} | {q_clusters} / {k_clusters} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file with the markers of the table")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.write:
        write_between(args.write, "memory", text)


if __name__ == "__main__":
    main()
