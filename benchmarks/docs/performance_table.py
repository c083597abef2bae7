"""The tables of docs/measurements.md about GPUs, their plot and the README's line, from what GPU benchmarks wrote.

    python -P benchmarks/docs/performance_table.py

`KERNELS` and `STEPS` name what `gpu_kernels.py` and `denoising_step.py` wrote, in docs/images, the newest first: of an
older file only what no newer one has is shown. A new measurement gets a file of its own there, and its name here.
Nothing is measured, no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from marked_table import write_between
from shapes import HUNYUAN_720P_WITH_TEXT, WAN_1_3B_480P, WAN_14B_720P

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "images"
KERNELS = ("gpu_kernels_h200.json", "gpu_kernels_h200_two_stages.json")
STEPS = ("denoising_steps_h200.json", "denoising_steps_h200_two_stages.json", "denoising_steps_h200_more.json")
DENSE = "dense_h200.json"
"""What `dense_baselines.py` wrote on the same kind of GPU."""
PLOT = "performance.png"
DENSITY = 0.25
"""What the tables show; the plot has all curves."""
LAYER = (
    f"Self-attention of one layer at a density of {DENSITY:.0%}, bf16, random kept clusters, with everything that "
    "sparsity needs: two k-means iterations, sorting, permuting, selecting."
)
STEP = (
    "One forward of a model with random weights, every layer sparse, not the first step, the selection forced to a "
    f"density of {DENSITY:.0%}, against the same compiled with cuDNN's dense attention."
)
TOLERANCE = 0.02
"""Random clusters come only near to the density that was asked for."""
NAMES = {
    "wan-1.3b-480p": "Wan 2.1 1.3B, 480p",
    "wan-14b-720p": "Wan 2.1 14B, 720p",
    "hunyuan-720p": "HunyuanVideo, 720p",
}
HEADLINE = ("wan-14b-720p", "hunyuan-720p")
SIZES = {
    "wan-1.3b-480p": WAN_1_3B_480P.name,
    "wan-14b-720p": WAN_14B_720P.name,
    "hunyuan-720p": HUNYUAN_720P_WITH_TEXT.name,
}
"""Their attention in ``DENSE``."""


def main() -> None:
    """Write the table, and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-plot", action="store_true", help="write the table only")
    args = parser.parse_args()
    kernels, steps = load_kernels(), load_steps()
    for page, marker, text in texts(kernels, steps, load(DENSE)):
        print(text)
        write_between(ROOT / page, marker, text)
    if not args.no_plot:
        plot(kernels, steps, FIGURES / PLOT)


def load(name: str) -> dict[str, Any]:
    """Return what a benchmark wrote."""
    record: dict[str, Any] = json.loads((FIGURES / name).read_text(encoding="utf-8"))
    return record | {"file": name}


def load_kernels() -> list[dict[str, Any]]:
    """Return the figures of single layers, every size once."""
    return without_repeats(KERNELS, "results", lambda result: result["shape"])


def load_steps() -> list[dict[str, Any]]:
    """Return the figures of whole models, every model and way to compile it once."""
    return without_repeats(STEPS, "runs", lambda run: (run["model"], run["way"], run["layers"]))


def without_repeats(names: Sequence[str], rows: str, key: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """Return what benchmarks wrote, each record with those of its rows that no record before it has."""
    seen: set[object] = set()
    records = []
    for name in names:
        record = load(name)
        new = [row for row in record[rows] if key(row) not in seen]
        seen.update(map(key, new))
        if new:
            records.append(record | {rows: new})
    return records


def texts(
    kernels: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], dense: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Return each page, its marker there, and what stands between, in Markdown."""
    layer_tables = "\n\n".join([LAYER, *("\n".join(kernel_table(record)) for record in kernels)])
    step_tables = "\n\n".join([STEP, *("\n".join(step_table(record)) for record in steps), beside_fa4(steps, dense)])
    measurements = "docs/measurements.md"
    return [
        (measurements, "layers", layer_tables),
        (measurements, "steps", step_tables),
        ("README.md", "headline", headline(steps[0]["environment"]["device"], steps)),
    ]


def headline(device: str, steps: Iterable[dict[str, Any]]) -> str:
    """Return the README's line: how much faster one forward of the large models is, layers compiled one by one."""
    faster = {}
    for run in (run for record in steps for run in record["runs"]):
        if not (run["whole"] or run["cuda_graphs"]):
            faster.setdefault(NAMES[run["model"]], run["sparse"][f"{DENSITY:g}"]["speedup"])
    models = ", ".join(f"{NAMES[each].replace(', ', ' at ')} **{faster[NAMES[each]]:.2f}×**" for each in HEADLINE)
    return (
        f"On an {device.removeprefix('NVIDIA ')}, one forward (every layer sparse, density {DENSITY:.0%}) is this much "
        f"faster than with cuDNN's dense attention: {models} ([measurements](docs/measurements.md#steps-of-models))."
    )


def source(record: dict[str, Any]) -> str:
    """Return device, versions, date and file of some figures."""
    environment = record["environment"]
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("torch", "triton", "diffusers") if name in environment
    )
    return f"{environment['device']}, {versions}, {record['date']} ([all figures](images/{record['file']}))"


@dataclass(frozen=True, slots=True)
class Layer:
    """One self-attention at one density, with everything that sparsity needs."""

    name: str
    size: tuple[int, ...]
    """Batch, heads, tokens, head dimension."""
    clusters: str
    density: float
    dense_ms: float
    attention_ms: float
    overhead_ms: float
    """Two k-means iterations, sorting, permuting, selecting."""

    @property
    def speedup(self) -> float:
        """Return how much faster it is than dense, all counted."""
        return self.dense_ms / (self.attention_ms + self.overhead_ms)

    def cells(self) -> Iterator[str]:
        """Return its row of the table."""
        yield from (self.name, " × ".join(map(str, self.size)), self.clusters)
        yield from (f"{ms:.1f} ms" for ms in (self.dense_ms, self.attention_ms, self.overhead_ms))
        yield f"**{self.speedup:.1f}×**"


def layers(record: dict[str, Any]) -> list[Layer]:
    """Return every size, number of clusters and density."""
    shapes = {shape["name"]: shape for shape in record["shapes"]}
    rows = []
    for result in record["results"]:
        shape = shapes[result["shape"]]
        size = (1, result["heads"], shape["tokens"], shape["dim"])
        overheads = {tuple(each["clusters"]): each["ms"] for each in result["overhead"]}
        for each in result["attention"]:
            ms = overheads[tuple(each["clusters"])]
            clusters = " / ".join(map(str, each["clusters"]))
            overhead = ms["cluster, warm 2"] + ms["select"]
            dense = result["dense_ms"]["cuDNN"]
            rows.append(Layer(shape["name"], size, clusters, each["density"], dense, each["ms"], overhead))
    return rows


def kernel_table(record: dict[str, Any]) -> list[str]:
    """Return one layer's self-attention at the density of the table."""
    if record["options"]["quick"]:
        raise SystemExit(f"{record['file']} is from a quick run")
    head = ("attention of", "size", "query / key clusters", "dense, cuDNN", "sparse attention")
    rows = [row for row in layers(record) if abs(row.density - DENSITY) < TOLERANCE]
    return [
        f"{source(record)}:",
        "",
        *table((*head, "clustering and selection", "faster, all counted"), [list(row.cells()) for row in rows]),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines, in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def step_table(record: dict[str, Any]) -> list[str]:
    """Return one denoising step of whole models at the density of the table."""
    head = ("model", "compiled", "dense", "sparse", "faster (ideal)", "attention", "clustering", "rest", "peak memory")
    rows = []
    for run in record["runs"]:
        dense, sparse = run["dense"], run["sparse"].get(f"{DENSITY:g}")
        if sparse is None:
            continue
        times = [f"{each['ms']:.0f} ms" for each in (dense, sparse)]
        faster = f"**{sparse['speedup']:.2f}×** ({sparse['ideal']:.2f})"
        kinds = [f"{sparse['kinds_ms'][kind]:.0f} ms" for kind in ("attention", "clustering", "rest")]
        memory = f"{dense['peak_gib']:.1f} to {sparse['peak_gib']:.1f} GiB"
        rows.append([model_name(run), run["way"], *times, faster, *kinds, memory])
    return [
        f"{source(record)}:",
        "",
        *table(head, rows),
    ]


def beside_fa4(steps: Iterable[dict[str, Any]], dense: dict[str, Any]) -> str:
    """Say what is left of the speed-ups where dense attention is FlashAttention-4's, counted from its rate."""
    ms = {each["shape"]: each["ms"] for each in dense["dense"]}
    counted = []
    for run in (run for record in steps for run in record["runs"]):
        if run["whole"] or run["cuda_graphs"]:
            continue
        times = ms[SIZES[run["model"]]]
        saved = run["dense"]["kinds_ms"]["attention"] * (1 - times["FA4"] / times["cuDNN"])
        speedup = (run["dense"]["ms"] - saved) / run["sparse"][f"{DENSITY:g}"]["ms"]
        counted.append(f"{NAMES[run['model']]} {speedup:.2f}×")
    return (
        "cuDNN is the fastest attention that PyTorch's `scaled_dot_product_attention` takes by itself. The package "
        "`flash-attn-4` is faster. If all dense attention ran at its speed "
        f"([figures](images/{dense['file']})), the same steps would still be faster by (calculated, not measured): "
        f"{'; '.join(counted)}."
    )


def model_name(run: dict[str, Any]) -> str:
    """Return the model, and how many layers of it ran."""
    layers = "" if run["layers"] is None else f", {run['layers']} layers of a kind"
    return NAMES[run["model"]] + layers


def plot(kernels: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the speed-up over the density: of one layer, and of a step where some were timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if steps else 1, figsize=(10 if steps else 6, 4), squeeze=False)
    layer = axes[0, 0]
    groups: dict[str, list[Layer]] = {}
    for record in kernels:
        for row in layers(record):
            groups.setdefault(f"{row.name}, {row.clusters}", []).append(row)
    for label, rows in groups.items():
        layer.plot([row.density for row in rows], [row.speedup for row in rows], marker="o", label=label)
    ideal = [each / 100 for each in range(15, 41)]
    layer.plot(ideal, [1 / each for each in ideal], color="grey", linestyle=":", label="1 / density")
    layer.set_title("self-attention with clustering, over cuDNN")
    for record in steps:
        for run in record["runs"]:
            points = sorted((float(density), sparse) for density, sparse in run["sparse"].items())
            if len(points) < 2:
                continue  # no curve
            x = [density for density, _ in points]
            label = f"{model_name(run)}, {run['way']}"
            (line,) = axes[0, 1].plot(x, [sparse["speedup"] for _, sparse in points], marker="o", label=label)
            axes[0, 1].plot(x, [sparse["ideal"] for _, sparse in points], color=line.get_color(), linestyle=":")
        axes[0, 1].set_title("one denoising step (dotted: ideal)")
    for axis in axes[0]:
        axis.set_xlabel("density")
        axis.set_ylabel("times faster than dense")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    device, dates = kernels[0]["environment"]["device"], sorted({record["date"] for record in (*kernels, *steps)})
    figure.suptitle(f"{device}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
