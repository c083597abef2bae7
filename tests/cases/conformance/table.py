"""Write what the backend makes of every transformer class of the installed diffusers.

    python -P tests/cases/conformance/table.py docs/models.md

The suite tests/api/test_conformance.py makes each line again and compares it with the page.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[3] / "benchmarks"))

import diffusers
from conformance.examine import ModelCase, Verdict, examine
from conformance.image_models import IMAGE_MODELS
from conformance.other_models import OTHER_MODELS
from conformance.video_models import VIDEO_MODELS

GROUPS = {"Video": VIDEO_MODELS, "Images": IMAGE_MODELS, "Sound, caches and masks of their own": OTHER_MODELS}

NOT_COVERED = {
    "MiniMaxMusic3RVQDepthDecoder": "predicts one token after the other; the diffusion model has a case",
    "RFD4ProteinaTransformer": "proteins: attention with a bias for each pair of residues",
    "T5FilmDecoder": "a decoder of spectrograms whose pipeline is deprecated",
}
"""Classes without a case, and why."""

REASONS = {
    "cross-attention": (
        "queries and keys are rows of different things, video and text say",
        "nothing: it is short on one side and costs little",
    ),
    "short": ("fewer tokens than `min_tokens`, as in the refiner of a text", "lower `min_tokens`, if it ever mattered"),
    "attn_mask is bool …, not a key mask": (
        "the mask says for each query which keys it may see",
        "drop the mask if it is all true; give a key mask, (batch, 1, 1, keys), if it only hides padding",
    ),
    "attn_mask is float32 …, not a key mask": (
        "numbers are added to the scores: causal, windowed, or a bias",
        "give a boolean key mask if it only hides padding, none if it is all zero",
    ),
    "runs flex_attention, not SDPA": (
        "the model chose another attention than scaled_dot_product_attention",
        '`model.set_attention_backend("native")`; with a block mask of its own it is sparse already',
    ),
    "its lengths are known only at run time": (
        "the graph was traced whole, across a length that depends on data",
        "compile without `fullgraph=True`: after the break the lengths are numbers",
    ),
}
"""What each reason means, and what can be done."""


def row(case: ModelCase, verdict: Verdict) -> str:
    """Return the line of the table for a case."""
    left = ", ".join(f"{count} {reason}" for reason, count in sorted(verdict.left_by_reason.items()))
    if case.unseen:
        left = ", ".join(filter(None, (f"{case.unseen} unseen", left)))
    rows = " / ".join(dict.fromkeys(", ".join(site.order) for site in verdict.sites))
    masks = "key mask" if any(site.has_mask for site in verdict.sites) else ""
    one_graph = "yes" if verdict.fullgraph else f"no: {case.breaks}" if case.breaks else "no, as asked"
    name = f"{case.name}, {case.variant}" if case.variant else case.name
    by_block = "" if verdict.sparse_by_block is None else str(verdict.sparse_by_block)
    counts = str(len(verdict.sparse.sparse_sites)), by_block
    cells = (name, *counts, left, rows, masks, one_graph, guidance(case.name), case.note)
    return f"| {' | '.join(cells)} |"


def guidance(name: str) -> str:
    """Return how diffusers' pipelines call a class for guidance, read from their sources."""
    forms: dict[str, None] = {}
    used = re.compile(rf"transformer\w*: [^\n]*\b{name}\b|\b{name}\b[^\n]*transformer")
    for source in pipeline_sources():
        # the expression alone looks through every file for minutes, all classes together
        if name in source and used.search(source):
            forms[_guidance_in(source)] = None
    return " / ".join(sorted(forms))


@cache
def pipeline_sources() -> tuple[str, ...]:
    """Return the sources of diffusers' pipelines."""
    paths = (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")
    return tuple(path.read_text(encoding="utf-8") for path in sorted(paths))


def _guidance_in(source: str) -> str:
    names = sorted(set(re.findall(r'cache_context\(\s*"(\w+)"', source)))
    if names:
        return f"named {', '.join(names)}"
    if re.search(r"latents\w*\] \* 2|torch\.cat\(\[latents, latents\]", source):
        return "one batch"
    calls = len(re.findall(r"= self\.transformer(?:_2)?\(|= transformer\(|= current_model\(", source))
    return "two calls" if calls > 1 else "one call"


def page(rows: dict[str, list[str]], classes: int) -> str:
    """Return the generated part of the page."""
    header = "| class | sparse | by block | dense, and why | rows | mask | one graph | guidance | |\n|" + 9 * "---|"
    parts = [
        f"diffusers {diffusers.__version__}: {classes - len(NOT_COVERED)} of {classes} classes have a case, "
        f"{sum(map(len, rows.values()))} cases in all."
    ]
    for group, lines in rows.items():
        parts += [f"## {group}", "\n".join([header, *lines])]
    reasons = [f"| {reason} | {meaning} | {advice} |" for reason, (meaning, advice) in REASONS.items()]
    parts += [
        "## Why an attention stays dense",
        "\n".join(["| reason | meaning | advice |", "|---|---|---|", *reasons]),
    ]
    missing = [f"| {name} | {reason} |" for name, reason in NOT_COVERED.items()]
    parts += ["## Without a case", "\n".join(["| class | reason |", "|---|---|", *missing])]
    return "\n\n".join(parts)


def main() -> None:
    from conformance.examine import transformer_classes
    from marked_table import write_between

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = {group: [row(case, examine(case)) for case in cases] for group, cases in GROUPS.items()}
    text = page(rows, len(transformer_classes()))
    print(text)
    for path in sys.argv[1:]:
        write_between(Path(path), "models", text)


if __name__ == "__main__":
    main()
