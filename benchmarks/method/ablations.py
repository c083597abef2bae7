"""The parts of the method one at a time, on the trained tiny Wan, as the paper's ablations: what each is worth.

    python -P benchmarks/method/ablations.py --out docs/images
    python -P benchmarks/method/ablations.py --out docs/images --only clusters

Sections: ``warm`` (inertia of k-means from the last step's centroids and from tokens, and the time of either),
``iterations``, ``shared`` (queries and keys by the labels of one of them), ``clusters``, ``dense``, ``floor``. All but
the first give the PSNR at equal density: every setting has a curve over ``top_p``, read where the density is that of
the usual settings at ``top_p`` 0.9, video by video (``at_density``); and the density that reaches the same PSNR.
Writes ``ablations.json``, where sections that are not measured again stay, and ``ablations.png``; prints tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from swapped_ops import ClusterBy, Clustered, Point, SwappedOps, Workbench, at_density, density_at, svg2, with_labels

from svg2_compile import tiny_wan
from svg2_compile.environment import describe_environment
from svg2_compile.video.measure import TINY_OPTIONS, Video

TOP_P = (0.6, 0.8, 0.9, 0.97)
USUAL_TOP_P = 0.9
PROMPTS = tiny_wan.example_prompts()[:2]
STEP_ITERATIONS = (0, 1, 2, 5, 10)
COLD_ITERATIONS = (1, 2, 5, 10, 20)
MOST_ITERATIONS = 20
Q_CLUSTERS, K_CLUSTERS = (16, 32, 64, 128), (64, 128, 256, 512)
SHARED_CLUSTERS = 128
"""Of queries and keys alike: as many pairs of clusters as 64 and 256 make."""
DENSE_STEPS = (0, 1, 2, 3)
FLOORS = (0.0, 0.05, 0.1, 0.2, 0.3)


# ---- clusterings


def iterating(first: int, later: int) -> ClusterBy:
    """Cluster with other numbers of iterations; with 0, tokens join the last step's centroids, which stay."""

    def cluster(*arguments: Any) -> Clustered:
        *tensors, _, _, seed = arguments
        centroids, calls = tensors[3:5], tensors[5]
        if later > 0 or int(calls) == 0:
            return svg2.cluster_tokens_(*tensors, first, max(later, 1), seed)
        before = [each.clone() for each in centroids]
        clustered = svg2.cluster_tokens_(*tensors, first, 1, seed)
        for each, old in zip(centroids, before):
            each.copy_(old)
        return clustered

    return cluster


def from_tokens(iterations: int) -> ClusterBy:
    """Cluster from tokens in every step, as if there were no last one."""

    def cluster(*arguments: Any) -> Clustered:
        *tensors, _, _, seed = arguments
        for calls in tensors[5:7]:
            calls.zero_()
        return svg2.cluster_tokens_(*tensors, iterations, 1, seed)

    return cluster


class Sharing:
    """Cluster queries, keys or both; a side that is not clustered takes the labels of the other."""

    def __init__(self, sides: str) -> None:
        self.sides = sides
        self.rand_indices: list[float] = []

    def __call__(self, *arguments: Any) -> Clustered:
        q, k, v, q_centroids, k_centroids, q_calls, k_calls, *rest = arguments
        labels = {}
        if "q" in self.sides:
            labels["q"] = svg2.kmeans_(q, q_centroids, q_calls, *rest)
        if "k" in self.sides:
            labels["k"] = svg2.kmeans_(k, k_centroids, k_calls, *rest)
        of_q, of_k = labels.get("q", labels.get("k")), labels.get("k", labels.get("q"))
        if len(labels) == 2:
            pairs = zip(of_q.flatten(0, 1), of_k.flatten(0, 1))
            self.rand_indices += [adjusted_rand_index(*pair) for pair in pairs]
        return with_labels(q, k, v, (q_centroids, k_centroids), (of_q, of_k))


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Return how alike two partitions of the same tokens are: 1 the same, 0 as by chance."""
    width = int(b.max()) + 1
    table = (a.long() * width + b.long()).bincount(minlength=(int(a.max()) + 1) * width).view(-1, width).double()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, of_a, of_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = of_a * of_b / pairs(table.sum().view(1))
    return (together - chance) / ((of_a + of_b) / 2 - chance)


class InertiaLog:
    """Beside the usual clustering, iterate from the last step's centroids and from tokens, and note the inertia."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, *arguments: Any) -> Clustered:
        q, k, _, q_centroids, k_centroids, q_calls, k_calls, *_, seed = arguments
        for side, x, centroids, calls in (("q", q, q_centroids, q_calls), ("k", k, k_centroids, k_calls)):
            if int(calls) > 0:
                warm = list(inertias(x, centroids.clone(), 1, MOST_ITERATIONS, seed))
                cold = list(inertias(x, torch.zeros_like(centroids), 0, MOST_ITERATIONS, seed))
                for head in range(x.shape[1]):
                    of_head = {
                        name: [float(each[head]) for each in found] for name, found in (("warm", warm), ("cold", cold))
                    }
                    self.rows.append({"side": side, **of_head})
        return svg2.cluster_tokens_(*arguments)


def inertias(x: Tensor, centroids: Tensor, calls: int, iterations: int, seed: int) -> Iterator[Tensor]:
    """Yield the squared distance of tokens to the mean of their cluster, a token's, [H], after each iteration."""
    counter = torch.full((1,), calls, dtype=torch.int32, device=x.device)
    squares = x.double().square().sum((0, 2, 3))
    for _ in range(iterations):
        labels = svg2.kmeans_(x, centroids, counter, 1, 1, seed)
        _, sizes = svg2.sort_labels(labels, centroids.shape[2])
        means = (sizes * centroids.double().square().sum(-1)).sum((0, 2))
        yield (squares - means) / (x.shape[0] * x.shape[2])


# ---- sections


class Ablations:
    """The sections; every one returns what goes into the file."""

    def __init__(self, bench: Workbench, top_p: tuple[float, ...]) -> None:
        self.bench, self.top_p = bench, top_p
        self.options = {**TINY_OPTIONS, "dense_steps": 0.35}

    def curves(self, ops: SwappedOps, name: str) -> dict[str, Any]:
        """Return the points over ``top_p`` of every video."""
        videos = []
        for index in range(len(self.bench.videos)):
            points = []
            for top_p in self.top_p:
                ops.top_p = top_p
                points.append({"top_p": top_p, **asdict(self.bench.measure(ops, index))})
            videos.append(points)
        usual = [next(each for each in points if each["top_p"] == USUAL_TOP_P) for points in videos]
        shown = ", ".join(f"{each['psnr_db']:.1f} dB at {100 * each['density']:.1f} %" for each in usual)
        print(f"{name}: {shown}", flush=True)
        return {"name": name, "videos": videos}

    def warm(self) -> dict[str, Any]:
        """Inertia by iterations, warm and cold, in the later sparse steps; and the time of either."""
        ops = self.bench.compile(**self.options)
        log = ops.cluster = InertiaLog()
        for index in range(len(self.bench.videos)):
            self.bench.measure(ops, index)
        timer = ops.cluster = ClusteringTimer()
        self.bench.measure(ops, 0)
        needed = {
            str(after): statistics.median(iterations_to(row["cold"], row["warm"][after - 1]) for row in log.rows)
            for after in (1, 2)
        }
        within = [[value / row["cold"][-1] - 1 for value in row["cold"]] for row in log.rows]
        warm = [[value / row["cold"][-1] - 1 for value in row["warm"]] for row in log.rows]
        return {
            "steps": self.bench.videos[0].steps,
            "cold_excess": [statistics.mean(column) for column in zip(*within)],
            "warm_excess": [statistics.mean(column) for column in zip(*warm)],
            "iterations_needed": needed,
            "iterations_needed_by_side": {
                f"{side}{after}": statistics.median(
                    iterations_to(row["cold"], row["warm"][after - 1]) for row in log.rows if row["side"] == side
                )
                for after in (1, 2)
                for side in "qk"
            },
            "never": sum(iterations_to(row["cold"], row["warm"][0]) > MOST_ITERATIONS for row in log.rows)
            / len(log.rows),
            "milliseconds": timer.medians(),
        }

    def iterations(self) -> dict[str, Any]:
        """Iterations of a step that starts warm, and of every step started from tokens."""
        ops, rows = self.bench.compile(**self.options), []
        for later in STEP_ITERATIONS:
            ops.cluster = iterating(5, later)
            rows.append(self.curves(ops, f"warm, {later}"))
        for iterations in COLD_ITERATIONS:
            ops.cluster = from_tokens(iterations)
            rows.append(self.curves(ops, f"from tokens, {iterations}"))
        return {"rows": rows, "usual": "warm, 1"}

    def shared(self) -> dict[str, Any]:
        """Labels of their own for queries and keys, or shared ones."""
        counts = {"q_clusters": SHARED_CLUSTERS, "k_clusters": SHARED_CLUSTERS}
        ops, rows = self.bench.compile(**self.options | counts), []
        for name, sides in (("separate", "qk"), ("labels of q", "q"), ("labels of k", "k")):
            sharing = ops.cluster = Sharing(sides)
            row = self.curves(ops, name)
            if sharing.rand_indices:
                row["adjusted_rand_index"] = statistics.mean(sharing.rand_indices)
            rows.append(row)
        return {"rows": rows, "usual": "separate"}

    def clusters(self) -> dict[str, Any]:
        """A grid of cluster counts."""
        rows = []
        for q_clusters in Q_CLUSTERS:
            for k_clusters in K_CLUSTERS:
                counts = {"q_clusters": q_clusters, "k_clusters": k_clusters}
                ops = self.bench.compile(**self.options | counts)
                rows.append({**self.curves(ops, f"{q_clusters} / {k_clusters}"), **counts})
        return {"rows": rows, "usual": "64 / 256"}

    def dense(self) -> dict[str, Any]:
        """How many first steps are dense."""
        rows = []
        for count in (each for each in DENSE_STEPS if each < self.bench.videos[0].steps):
            ops = self.bench.compile(**self.options | {"dense_steps": count})
            rows.append(self.curves(ops, f"{count} dense"))
        return {"rows": rows, "usual": "2 dense"}

    def floor(self) -> dict[str, Any]:
        """``min_keep_ratio``."""
        ops, rows = self.bench.compile(**self.options), []
        for floor in FLOORS:
            ops.min_keep_ratio = floor
            rows.append(self.curves(ops, f"floor {floor:g}"))
        return {"rows": rows, "usual": "floor 0.1"}


class ClusteringTimer:
    """Time the clustering of a warm step and of one from tokens on the same tokens, by the number of iterations."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, *arguments: Any) -> Clustered:
        *tensors, _, _, seed = arguments
        if int(tensors[5]) > 0:
            for name, calls, iterations in (
                *(("warm", 1, each) for each in (1, 2)),
                *(("cold", 0, each) for each in (5, 10, MOST_ITERATIONS)),
            ):
                state = [each.clone() for each in tensors[3:7]]
                for counter in state[2:]:
                    counter.fill_(calls)
                call = lambda: svg2.cluster_tokens_(*tensors[:3], *state, iterations, iterations, seed)  # noqa: B023, E731
                self.seconds.setdefault(f"{name} {iterations}", []).append(seconds_of(call, tensors[0].device))
        return svg2.cluster_tokens_(*arguments)

    def medians(self) -> dict[str, float]:
        """Return milliseconds."""
        return {name: 1e3 * statistics.median(found) for name, found in self.seconds.items()}


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def iterations_to(curve: list[float], inertia: float) -> int:
    """Return how many iterations reach an inertia, one more than there are if none does."""
    return next((count for count, value in enumerate(curve, 1) if value <= inertia), len(curve) + 1)


SECTIONS = ("warm", "iterations", "shared", "clusters", "dense", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=Video().steps)
    parser.add_argument("--top-p", type=float, nargs="+", default=TOP_P, help=f"must include {USUAL_TOP_P}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = replace(Video(), frames=arguments.frames, steps=arguments.steps)
    videos = [replace(base, prompt=prompt) for prompt in arguments.prompts]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "ablations.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    bench = Workbench(tiny_wan.load_pipeline(getattr(torch, arguments.dtype), device), videos)
    ablations = Ablations(bench, tuple(arguments.top_p))
    for name in arguments.only:
        result[name] = {
            "environment": describe_environment(),
            "date": time.strftime("%Y-%m-%d"),
            "video": asdict(base),
            "prompts": list(arguments.prompts),
            "tokens": base.tokens,
            "dtype": arguments.dtype,
            "options": ablations.options,
            **getattr(ablations, name)(),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
    plot(path.with_suffix(".png"), result)
    print(table(result))


def summaries(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Return, for every setting, the PSNR at the usual setting's density and the density at its PSNR, over videos."""
    usual = next(row for row in section["rows"] if row["name"] == section["usual"])
    found = []
    for row in section["rows"]:
        levels, ratios, densities, own = [], [], [], []
        for points, usual_points in zip(row["videos"], usual["videos"]):
            target = next(each for each in usual_points if each["top_p"] == USUAL_TOP_P)
            here = next(each for each in points if each["top_p"] == USUAL_TOP_P)
            curve = [Point(**{key: each[key] for key in each if key != "top_p"}) for each in points]
            level, needed = at_density(curve, target["density"]), density_at(curve, target["psnr_db"])
            levels += [] if level is None else [level]
            ratios += [] if needed is None else [needed / target["density"]]
            densities.append(here["density"])
            own.append(here["psnr_db"])
        found.append(
            {
                "name": row["name"],
                "density": statistics.mean(densities),
                "psnr_db": statistics.mean(own),
                "psnr_at_usual_density_db": statistics.mean(levels) if len(levels) == len(densities) else None,
                "density_ratio_at_usual_psnr": statistics.mean(ratios) if len(ratios) == len(densities) else None,
            }
        )
    return found


def table(result: dict[str, Any]) -> str:
    lines = []
    for name, section in result.items():
        environment = section["environment"]
        lines += [
            "",
            f"{name}: {section['tokens']} tokens, {section['video']['steps']} steps, {', '.join(section['prompts'])}, "
            f"{section['dtype']}; {environment['device']}, torch {environment['torch']}, {section['date']}",
            "",
        ]
        if name == "warm":
            lines += warm_table(section)
            continue
        lines += [
            "| setting | density at top_p 0.9 | PSNR there, dB | PSNR at usual density, dB | density at usual PSNR |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in summaries(section):
            level, ratio = row["psnr_at_usual_density_db"], row["density_ratio_at_usual_psnr"]
            lines.append(
                f"| {row['name']} | {100 * row['density']:.1f} % | {row['psnr_db']:.1f} "
                f"| {'off the curve' if level is None else f'{level:.1f}'} "
                f"| {'off the curve' if ratio is None else f'{ratio:.2f} ×'} |"
            )
        for row in section["rows"]:
            if "adjusted_rand_index" in row:
                lines.append(f"\nadjusted Rand index between q and k: {row['adjusted_rand_index']:.3f}")
    return "\n".join(lines)


def warm_table(section: dict[str, Any]) -> list[str]:
    cold, warm = section["cold_excess"], section["warm_excess"]
    milliseconds = section["milliseconds"]
    lines = [
        "| iterations | inertia from tokens, over that of 20 | from the last step's centroids |",
        "| --- | --- | --- |",
    ]
    for iterations in (1, 2, 3, 5, 10, 20):
        lines.append(f"| {iterations} | {100 * cold[iterations - 1]:+.2f} % | {100 * warm[iterations - 1]:+.2f} % |")
    for after, needed in section["iterations_needed"].items():
        lines.append(f"\nfrom tokens, {needed:g} iterations (median) reach the inertia of {after} warm ones")
    lines.append(f"\nnever within {MOST_ITERATIONS}: {100 * section['never']:.0f} %")
    lines.append("\nms a call: " + ", ".join(f"{name} {each:.2f}" for name, each in milliseconds.items()))
    return lines


def plot(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = dict(zip(SECTIONS, figure.subplots(2, 3).flat))
    for name, axis in panels.items():
        section = result.get(name)
        axis.set_title(name, fontsize=10)
        if section is None:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        elif name == "warm":
            count = range(1, MOST_ITERATIONS + 1)
            axis.plot(count, [100 * each for each in section["cold_excess"]], "o-", ms=3, label="from tokens")
            axis.plot(count, [100 * each for each in section["warm_excess"]], "o-", ms=3, label="from the last step")
            axis.set_xlabel("iterations")
            axis.set_ylabel("inertia over that of 20 from tokens, %")
            axis.legend(fontsize=8)
        elif name == "clusters":
            draw_grid(axis, section)
        else:
            draw_curves(axis, section)
    described = next(iter(result.values()))
    figure.suptitle(
        f"tiny Wan, {described['tokens']} tokens, {described['dtype']}, {described['environment']['device']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=100)


def draw_curves(axis: Any, section: dict[str, Any]) -> None:
    """PSNR over density, the mean over videos of every setting."""
    for index, row in enumerate(section["rows"]):
        means = [
            {key: statistics.mean(each[key] for each in column) for key in ("density", "psnr_db")}
            for column in zip(*row["videos"])
        ]
        style = ":" if row["name"].startswith("from tokens") else "-"
        density, level = ([each[key] for each in means] for key in ("density", "psnr_db"))
        axis.plot([100 * each for each in density], level, f"o{style}", ms=3, color=f"C{index % 5}", label=row["name"])
    axis.set_xlabel("density in the sparse steps, %")
    axis.set_ylabel("PSNR to dense, dB")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def draw_grid(axis: Any, section: dict[str, Any]) -> None:
    """PSNR at the usual density, by cluster counts."""
    found = {row["name"]: row["psnr_at_usual_density_db"] for row in summaries(section)}
    values = [[found[f"{q} / {k}"] for k in K_CLUSTERS] for q in Q_CLUSTERS]
    axis.imshow([[float("nan") if each is None else each for each in row] for row in values], cmap="viridis")
    for y, row in enumerate(values):
        for x, each in enumerate(row):
            axis.text(x, y, "" if each is None else f"{each:.1f}", ha="center", va="center", color="white")
    axis.set_xticks(range(len(K_CLUSTERS)), K_CLUSTERS)
    axis.set_yticks(range(len(Q_CLUSTERS)), Q_CLUSTERS)
    axis.set_xlabel("key clusters")
    axis.set_ylabel("query clusters")
    axis.set_title("clusters: PSNR at the usual density, dB", fontsize=10)


if __name__ == "__main__":
    main()
