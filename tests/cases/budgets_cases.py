"""Budgets for any model, and files of them."""

from __future__ import annotations

from pathlib import Path

from torch.nn import Module

from svg2_compile.fingerprint import fingerprint_of
from svg2_compile.passes.budgets import AttentionBudgets, Budgets, MadeFrom, ModelBudgets
from svg2_compile.passes.read_budgets import write_budgets

MADE_FROM = MadeFrom(
    prompts=("a cat", "ein Kätzchen"),
    seeds=(0,),
    steps=4,
    measured_steps=(1, 3),
    size=(("frames", 16), ("guidance_scale", 1.5), ("height", None)),
    options=(("top_p", 0.9), ("estimate_by", "queries")),
    environment=(("torch", "2.13.0"),),
    outcome=(("density", 0.4),),
)


def budgets_for_models(models: dict[str, Module], **attentions: AttentionBudgets) -> Budgets:
    """Return the same budgets for every model."""
    of_models = (
        ModelBudgets(name, fingerprint_of(model), tuple(attentions.values())) for name, model in models.items()
    )
    return Budgets("heart", MADE_FROM, tuple(of_models), "", "")


def write_for(path: Path, model: Module, *attentions: AttentionBudgets) -> str:
    """Write a file of budgets of a model and return its path."""
    given = {str(place): each for place, each in enumerate(attentions)}
    return write_budgets(budgets_for_models({"transformer": model}, **given), path).source
