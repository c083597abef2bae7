"""The figures of the evaluation's page, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from svg2_compile.evaluation.summary import Summary
from svg2_compile.video.pictures import shortened

FLOOR_GAP_DB = 20
"""A noise floor this far above all configurations is named and not drawn."""
INK, GREY = "#1c2733", "#8792a0"
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7c3aed", "#b91c1c", "#0e7490", "#a16207", "#be185d")
PARTS = {"attention": "#0b6bcb", "clustering": "#f59e0b", "rest": "#cbd2da"}


def pareto(noise: Summary, summaries: Sequence[Summary]) -> Any:
    """Speed against quality; a configuration that differs in no pixel has no place in it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 3.9), layout="constrained")
    axis = figure.subplots()
    speedups, bounds = [1.0], []
    for colour, each in zip(_colours(summaries), summaries):
        mean, least, greatest = each.psnr_db.mean, each.psnr_db.least, each.psnr_db.greatest
        if each.speed is None or mean is None or least is None or greatest is None:
            continue
        place = (each.speed["step_speedup"], mean)
        whiskers = [[mean - least], [greatest - mean]]
        axis.errorbar(*place, yerr=whiskers, fmt="o", color=colour, capsize=3, markersize=7)
        axis.annotate(shortened(each.name, 40), place, (8, 6), textcoords="offset points", fontsize=9, color=INK)
        speedups.append(place[0])
        bounds += [least, greatest]
    margin = 0.25 * (max(speedups) - min(speedups)) + 0.05
    axis.set_xlim(min(speedups) - margin / 2, max(speedups) + margin)
    floor = noise.psnr_db.mean
    text = "noise floor: no difference at all" if floor is None else f"noise floor {floor:.1f} dB"
    if floor is not None and bounds and floor > max(bounds) + FLOOR_GAP_DB:
        text += ", far above"
    elif floor is not None:
        bounds.append(floor)
        axis.axhline(floor, color=GREY, linestyle="--", linewidth=1)
    if bounds:
        axis.set_ylim(min(bounds) - 4, max(bounds) + 6)
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    axis.text(0.99, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=9, color=GREY, bbox=paper)
    axis.set_xlabel("measured speed-up of a sparse step over a compiled dense step")
    axis.set_ylabel("PSNR to dense, dB")
    _plain(axis)
    return figure


def times(summaries: Sequence[Summary]) -> Any:
    """Where the time of a step goes, dense and for every configuration."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, dict[str, float]]] = []
    for each in summaries:
        if each.speed:
            bars.append((f"dense, beside {each.name}", each.speed["dense_step_seconds"], each.speed["split"]["dense"]))
            bars.append((each.name, each.speed["sparse_step_seconds"], each.speed["split"]["sparse"]))
    figure = Figure(figsize=(6.2, 1.1 + 0.42 * len(bars)), layout="constrained")
    axis = figure.subplots()
    for row, (_, seconds, split) in enumerate(bars):
        left = 0.0
        for part, colour in PARTS.items():
            width = seconds * max(split[part], 0.0)
            axis.barh(row, width, left=left, color=colour, height=0.64, label=part if row == 0 else None)
            left += width
        axis.text(left, row, f"  {seconds:.3g} s", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(bars)), [shortened(name, 36) for name, _, _ in bars])
    axis.invert_yaxis()
    axis.set_xlabel("seconds a step, median")
    axis.margins(x=0.15)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    _plain(axis)
    return figure


def by_frame(qualities: dict[str, dict[str, Any]]) -> Any:
    """Distance to the dense video, frame by frame."""
    from matplotlib.figure import Figure

    names = {"psnr_db_per_frame": "PSNR, dB", "ssim_per_frame": "SSIM", "lpips_per_frame": "LPIPS"}
    names = {name: label for name, label in names.items() if any(each[name] for each in qualities.values())}
    figure = Figure(figsize=(12.6, 2.6), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items()):
        for colour, (configuration, quality) in zip(_colours(list(qualities)), qualities.items()):
            values = [float("nan") if each is None else each for each in quality[name]]
            axis.plot(
                values, color=colour, label=shortened(configuration, 40), marker="." if len(values) < 40 else None
            )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("frame")
        axis.set_ylabel(label)
        _plain(axis)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e8ebef", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)


def _colours(things: Sequence[object]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(things))]
