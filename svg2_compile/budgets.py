"""Give every attention the budgets of its heads, when a generation of it begins.

Budgets are state of the sparse graph and no part of it: layers that share a graph have their own, and a file that has
changed takes effect with the next generation, without a compilation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import Module

from svg2_compile.fingerprint import budgets_for
from svg2_compile.formatting import dotted
from svg2_compile.forwards import Caller
from svg2_compile.passes.budgets import Budgets, rows_of
from svg2_compile.passes.plan import SitePlan
from svg2_compile.passes.read_budgets import read_budgets
from svg2_compile.site_paths import prefix_of
from svg2_compile.state import GivenBudgets, SiteState

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""Time, size and number of a file."""


@dataclass(slots=True)
class _Known:
    """A file as it was read last."""

    stamp: Stamp | None
    budgets: Budgets


_known: dict[str, _Known] = {}
"""By the path of the file."""


def current(budgets: Budgets) -> Budgets:
    """Return what the file of some budgets holds now; a file that is gone keeps what it held.

    Raises:
        ConfigError: it has changed, and holds no budgets any more.
    """
    source = Path(budgets.source).expanduser()
    known = _known.setdefault(budgets.source, _Known(None, budgets))
    try:
        status = source.stat()
    except OSError as error:
        if known.stamp is not None or known.budgets is budgets:
            log.warning("budgets %s: %s; what was read before stays in force", source, error.strerror or error)
            known.stamp = None
        return known.budgets
    stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
    if stamp != known.stamp:
        read = read_budgets(budgets.source)
        if read != known.budgets:
            known.budgets = read
        known.stamp = stamp
    return known.budgets


class BudgetsInForce:
    """The budgets of one compiled graph, which several models may run."""

    def __init__(self, budgets: Budgets, model: Module) -> None:
        """Args: ``model`` is the one for which the graph was compiled.

        Raises:
            ConfigError: the budgets are those of another model.
        """
        self.all = budgets
        """Of every model in the file."""
        self._model = weakref.ref(model)
        self._narrowed: weakref.WeakKeyDictionary[Module, tuple[Budgets, Budgets]] = weakref.WeakKeyDictionary()
        self.of_model(model, budgets)

    def of_model(self, model: Module, budgets: Budgets) -> Budgets:
        """Return the budgets of one model alone.

        Raises:
            ConfigError: there are none for it.
        """
        known = self._narrowed.get(model)
        if known is None or known[0] != budgets:
            known = self._narrowed[model] = budgets, budgets_for(model, budgets)
        return known[1]

    def give(self, caller: Caller, owner_name: str, sites: Sequence[SitePlan], states: Sequence[SiteState]) -> None:
        """Write the budgets into the states in which a generation begins.

        Raises:
            ConfigError: the file has changed and is of another model, or of none.
        """
        begun = [(site, state) for site, state in zip(sites, states, strict=True) if not state.is_clustered]
        if not begun:
            return
        budgets = current(self.all)
        model, prefix = self._place_of(caller, owner_name)
        of_model = self.of_model(model, budgets)
        for site, state in begun:
            path = None if prefix is None else dotted(prefix, site.path)
            given = GivenBudgets(budgets.digest, of_model.models[0].name, path or "", "")
            if state.budgets is not None and state.budgets.is_like(given):
                continue
            found = None if path is None else of_model.of(path)
            rows = rows_of(found, site.q_heads, site.k_clusters, site.top_p, site.min_keep_ratio)
            state.tensors["budgets"].copy_(torch.tensor(rows, dtype=torch.float32, device="cpu"))
            state.budgets = given if found is not None else given.without(_why_not(path, budgets))

    def _place_of(self, caller: Caller, owner_name: str) -> tuple[Module, str | None]:
        """Return the model that a caller is part of, and where in it."""
        compiled_for, own = self._model(), caller.model()
        models = [each for each in (compiled_for, own) if isinstance(each, Module)]
        for each in models:
            if (prefix := prefix_of(caller, each, owner_name)) is not None:
                return each, prefix
        return models[-1], None


def _why_not(path: str | None, budgets: Budgets) -> str:
    if path is None:
        return (
            f"which attention of the model it is cannot be told, so top_p is the same in all heads ({budgets.source})"
        )
    return f"{budgets.source} holds no budgets of {path}, so top_p is the same in all heads"
