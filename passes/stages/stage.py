"""What a stage of a sparse attention is: its state, its nodes, its work and what it tells, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from svg2_compile.passes.records import StateSpec

if TYPE_CHECKING:
    from svg2_compile.passes.plan import SitePlan
    from svg2_compile.passes.stages.flow import Flow, SiteWriter

States = Sequence[Mapping[str, Tensor]]
"""The state tensors of one site by name, one mapping per CFG branch (and thread) that has called."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage computes in a call that is not the first of its generation: counted, not timed."""

    product_flops: float = 0.0
    """Operations of matrix products."""
    product_rate_ratio: float = 1.0
    """What these reach of the rate of a large matrix product."""
    passed_elements: float = 0.0
    """Elements of tokens that are read from memory or written to it."""
    pair_flops: float = 0.0
    """Operations of the attention between all video tokens, of which the density is computed."""


class Stage:
    """One step of a sparse attention; a frozen dataclass that says everything about itself."""

    __slots__ = ()

    def state(self, site: SitePlan) -> tuple[StateSpec, ...]:
        """Return the tensors that this stage carries from one denoising step to the next."""
        return ()

    def emit(self, writer: SiteWriter, flow: Flow) -> Flow:
        """Write the nodes of this stage and return the flow with what they give."""
        raise NotImplementedError

    def work(self, site: SitePlan) -> Work:
        """Return what a call computes, for ``svg2 explain``."""
        return Work()

    def shows(self, site: SitePlan, states: States) -> Mapping[str, Any]:
        """Return what the report says of this stage, by name; ``None`` for what is not known yet."""
        return {}


def summed(states: States, name: str, over: Callable[[Tensor], Tensor] = lambda each: each) -> Tensor | None:
    """Return one tensor of the state, less its batch axis, in fp64 and summed over everything; None without any.

    ``over`` is taken of each before they are added: what makes those of different sizes alike.
    """
    found = [over(tensors[name].double().sum(dim=0).cpu()) for tensors in states if name in tensors]
    return sum(found[1:], start=found[0]) if found else None
