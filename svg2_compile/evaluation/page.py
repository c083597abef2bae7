"""The evaluation for people: a table on the console, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from svg2_compile.evaluation.evaluation import DENSE, EAGER, Configuration, Evaluation, EvaluationSettings
from svg2_compile.evaluation.figures import by_frame, pareto, times
from svg2_compile.evaluation.summary import Spread, Summary, summarise
from svg2_compile.formatting import number, percent
from svg2_compile.video.pictures import GAIN, Table, frame_strip, heat_map, to_bytes, write_video
from svg2_compile.video.quality import lpips_missing

PAGE = "report.html"
TEMPLATES = Path(__file__).resolve().parent / "templates"
PAIRS_SHOWN = 4
"""Prompts and seeds whose frames are put into the page, which would grow too large with all."""
WEAKEST_SHOWN = 8
WAITING_RATIO = 1.25
"""The rest of a step is the same work in both; by so much more, it is idle time."""
FIGURES = (
    "step faster", "loop faster", "predicted", "PSNR, dB", "SSIM", "LPIPS", "density", "with dense steps", "recall",
)  # fmt: skip


def evaluate_and_show(settings: EvaluationSettings, console: Any) -> None:
    """Do what is missing, write the page, and print the table.

    Raises:
        EvaluationError: something does not fit or went wrong; what is finished is kept.
    """
    evaluation = Evaluation(settings)
    evaluation.run(console)
    page = write_page(evaluation)
    console.print(console_table(evaluation))
    console.print(f"written to {page}")


def console_table(evaluation: Evaluation) -> Any:
    """Return the figures as a table for the console."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    summaries = _summaries(evaluation)
    title = f"{evaluation.settings.model} on {evaluation.environment['device']}"
    table = RichTable(title=escape(title), caption=escape(_notes(evaluation)))
    table.add_column("")
    for summary in summaries:
        table.add_column(escape(_name(summary)), justify="right", overflow="fold")
    for label, *cells in zip(FIGURES, *map(_cells, summaries)):
        table.add_row(label, *cells)
    return table


def write_page(evaluation: Evaluation) -> Path:
    """Write the page into the evaluation's folder and return its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"speed": _speed, "percent": _percent, "decibel": _decibel, "number": number}
    summaries = _summaries(evaluation)
    noise, *sparse = summaries
    settings = evaluation.settings
    rehearsal = evaluation.ledger[evaluation.rehearsal_key]
    page = environment.get_template("report.html.j2").render(
        model=settings.model,
        rehearsal=rehearsal,
        prompts=settings.prompts,
        seeds=settings.seeds,
        environment=evaluation.environment,
        noise=noise,
        summaries=sparse,
        figures=FIGURES,
        rows=[(_name(each), _cells(each)) for each in summaries],
        notes=_notes(evaluation),
        pareto=_picture(pareto(noise, sparse)),
        times=_picture(times(sparse)),
        memory=[each for each in sparse if each.speed and each.speed["peak_memory_gib"]],
        configurations=[_configuration(evaluation, each) for each in settings.configurations],
        pairs=[_pair(evaluation, *pair) for pair in evaluation.pairs[:PAIRS_SHOWN]],
        pairs_left_out=max(len(evaluation.pairs) - PAIRS_SHOWN, 0),
        options=_options(evaluation),
        on_cpu=settings.torch_device.type == "cpu",
        run=[
            ("compiled", "one block for all" if settings.blocks else "whole models"),
            ("recall", f"on {settings.recall_rows} rows a head; not while speed is measured"),
            ("speed", f"in {min(settings.speed_steps, rehearsal['steps'])} steps"),
        ],
    )
    path = settings.out / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _summaries(evaluation: Evaluation) -> list[Summary]:
    """Return the noise floor, then the configurations."""
    return [summarise(evaluation, each) for each in evaluation.compared]


def _name(summary: Summary) -> str:
    return f"{summary.name} (noise floor)" if summary.speed is None else summary.name


def _cells(summary: Summary) -> list[str]:
    """Return the figures in the order of ``FIGURES``."""
    speed = summary.speed or {}
    return [
        *(number(speed.get(name), unit="×") for name in ("step_speedup", "loop_speedup", "predicted_step_speedup")),
        "identical" if summary.identical else _decibel(summary.psnr_db.mean),
        number(summary.ssim.mean, 4),
        "skipped" if summary.lpips.mean is None else number(summary.lpips.mean, 4),
        *(_percent(getattr(summary, name)) for name in ("density", "density_with_dense_calls", "recall")),
    ]


def _notes(evaluation: Evaluation) -> str:
    rehearsal = evaluation.ledger[evaluation.rehearsal_key]
    reason = lpips_missing(rehearsal["height"], rehearsal["width"])
    parts = [
        f"Distances are to compiled dense generations with the same seed, means of {len(evaluation.pairs)}.",
        "Speed-ups of a sparse step and of the whole denoising loop are measured; the predicted one is ideal.",
        *([f"{reason}."] if reason else []),
        *(["Peak memory is not measured on the CPU."] if evaluation.settings.torch_device.type == "cpu" else []),
    ]
    if evaluation.settings.torch_device.type == "cuda":
        parts += filter(None, (waiting_note(each.name, each.speed) for each in _summaries(evaluation) if each.speed))
    return " ".join(parts)


def waiting_note(name: str, speed: dict[str, Any]) -> str | None:
    """Say that the GPU waited for the host in the sparse steps of a configuration, or return None where it did not."""
    dense, sparse = (1e3 * speed[f"{each}_step_seconds"] * speed["split"][each]["rest"] for each in ("dense", "sparse"))
    if sparse < WAITING_RATIO * dense:
        return None
    return (
        f"In a step of {name}, {sparse:,.0f} ms are neither attention nor clustering, in a dense one {dense:,.0f}: the "
        "GPU waited for the host's launches; replay CUDA graphs (docs/integration.md)."
    )


def _configuration(evaluation: Evaluation, configuration: Configuration) -> dict[str, Any]:
    """Return what the page shows about the layers of one configuration."""
    records = [evaluation.ledger[evaluation.generation_key(configuration, *pair)] for pair in evaluation.pairs]
    maps = []
    for name in ("density", "recall"):
        tables = [record["heads"][name] for record in records]
        views = {"step": _by_step(tables), "head": _by_head(tables)}
        known = [value for table in views.values() for row in table.values() for value in row if value is not None]
        if not known:
            continue
        # recall lies near 1, and what matters is where it does not
        lowest = 0.0 if name == "density" else min(math.floor(20 * min(known)) / 20, 0.95)
        for view, table in views.items():
            label = "denoising step (blank: dense)" if view == "step" else view
            maps.append((f"{name}, layer × {view}", _picture(heat_map(table, f"{name}, %", label, lowest, width=6.2))))
    sites = records[0]["report"]["sites"]
    left: dict[tuple[str, str], int] = {}
    for site in sites:
        if not site["sparse"]:
            left[site["plan"], site["hint"]] = left.get((site["plan"], site["hint"]), 0) + 1
    return {
        "name": configuration.name,
        "maps": maps,
        "weakest": _weakest(records),
        "has_recall": any(site.get("recall") is not None for site in sites),
        "sparse": [site for site in sites if site["sparse"]],
        "left": [(count, reason, hint) for (reason, hint), count in left.items()],
    }


def _weakest(records: list[dict[str, Any]]) -> list[tuple[str, int, float, float | None]]:
    """Return the heads with the lowest recall: path, head, recall, density."""
    recalls = _by_head([record["heads"]["recall"] for record in records])
    densities = _by_head([record["heads"]["density"] for record in records])
    heads = [
        (path, head, recall, densities[path][head])
        for path, row in recalls.items()
        for head, recall in enumerate(row)
        if recall is not None
    ]
    return sorted(heads, key=lambda each: each[2])[:WEAKEST_SHOWN]


Heads = dict[str, list[list[float] | None]]
"""By path, a list of heads for every step."""


def _by_step(tables: list[Heads]) -> Table:
    """Mean over heads and generations."""
    return _combine(tables, lambda steps: [None if heads is None else statistics.fmean(heads) for heads in steps])


def _by_head(tables: list[Heads]) -> Table:
    """Mean over steps and generations."""

    def over_steps(steps: list[list[float] | None]) -> list[float | None]:
        known = [heads for heads in steps if heads is not None]
        return [statistics.fmean(each) for each in zip(*known)]

    return _combine(tables, over_steps)


def _combine(tables: list[Heads], row_of: Callable[[list[list[float] | None]], list[float | None]]) -> Table:
    rows = [{path: row_of(steps) for path, steps in table.items()} for table in tables]
    return {
        path: [Spread.of(each).mean for each in zip(*(table[path] for table in rows if path in table))]
        for path in dict.fromkeys(path for table in rows for path in table)
    }


def _pair(evaluation: Evaluation, prompt: str, seed: int) -> dict[str, Any]:
    """Return the frames and videos of one prompt and seed, and the figures by frame."""
    dense = evaluation.ledger.pixels(evaluation.generation_key(DENSE, prompt, seed))
    names = [each.name for each in evaluation.settings.configurations]
    videos, qualities = {}, {}
    for name, configuration in zip(names, evaluation.settings.configurations):
        videos[name] = evaluation.ledger.pixels(evaluation.generation_key(configuration, prompt, seed))
        qualities[name] = evaluation.ledger[evaluation.comparison_key(configuration, prompt, seed)]
    is_video = len(dense) > 1
    return {
        "prompt": prompt, "seed": seed, "is_video": is_video, "gain": GAIN,
        "noise": evaluation.ledger[evaluation.comparison_key(EAGER, prompt, seed)],
        "dense": _video(dense) if is_video else None,
        "versions": [(name, qualities[name], _video(videos[name]) if is_video else None) for name in names],
        "strip": _picture(frame_strip(dense, videos), dpi=88),
        "by_frame": _picture(by_frame(qualities)) if is_video else None,
    }  # fmt: skip


def _options(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return every option with its value in each configuration, and whether it was set."""
    columns = []
    for configuration in evaluation.settings.configurations:
        given = evaluation.options(configuration)
        resolved = asdict(Configuration("", given).resolved)
        inductors = {
            name: value for name, value in given.items() if name.removeprefix("svg2.") not in _fields(resolved)
        }
        columns.append(({**_fields(resolved), **inductors}, {name.removeprefix("svg2.") for name in given}))
    names = dict.fromkeys(name for values, _ in columns for name in values)
    return [
        (name, [(json.dumps(values[name]) if name in values else "", name in given) for values, given in columns])
        for name in names
    ]


def _fields(resolved: dict[str, Any]) -> dict[str, Any]:
    return {**resolved["sparse"], **resolved["kernel"]}


def _picture(figure: Any, dpi: int = 110) -> str:
    return _data("image/png", to_bytes(figure, dpi))


def _video(pixels: Tensor) -> str:
    buffer = io.BytesIO()
    write_video(buffer, pixels)
    return _data("video/mp4", buffer.getvalue())


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _percent(share: float | None, digits: int = 1) -> str:
    return percent(share, digits, " %")


def _decibel(value: float | None) -> str:
    return number(value, 1)


def _speed(speedup: float) -> str:
    return f"{speedup:.2f}× faster" if speedup >= 1 else f"{1 / speedup:.2f}× slower"
