"""How a reference becomes an op: its schema, its fake and its dispatch all follow from one card."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from types import ModuleType
from typing import Any

import torch

from svg2_compile.kernels.card import CARDS, Card, Kernels, Part
from svg2_compile.kernels.why_not import why_not_triton

NAMESPACE = "svg2"


def define(
    reference: Callable[..., Any],
    *,
    name: str,
    part: Part,
    fake: Callable[..., Any],
    check: Callable[..., None] = lambda: None,
    mutates: tuple[str, ...] = (),
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    kernels: Kernels | None = None,
    runs: str = "triton",
) -> None:
    """Define ``svg2::name`` and put its card into ``CARDS``.

    ``check``, ``fake`` and ``kernels.seen`` take those arguments of the reference that they name, and no others.

    Args:
        reference: what the op means, with types.
        name: of the op, without the namespace.
        part: which part of the time it is counted to.
        fake: returns empty results.
        check: raises for arguments that do not go together; absent, whatever computes the op does.
        mutates: the arguments that are written to.
        cpu: what runs on the CPU; the reference, if absent.
        cuda: what runs on a GPU; if absent, the launcher of ``kernels`` where it can, else the reference, or what runs
            on the CPU where there are no kernels.
        kernels: the kernels of the op; None where PyTorch computes it everywhere.
        runs: what computes it where it can, in a word.
    """
    # our numbers are settings, never sizes of a graph
    schema = torch.library.infer_schema(reference, mutates_args=mutates).replace("SymInt", "int")
    card = Card(name, reference, schema, part, check, fake, cpu or reference, kernels, runs)
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "cpu", card.cpu)
    torch.library.impl(qualified, "cuda", cuda or (card.cpu if kernels is None else _dispatch(card, kernels)))
    torch.library.register_fake(qualified, _checked_fake(card))
    CARDS[name] = card


def _dispatch(card: Card, kernels: Kernels) -> Callable[..., Any]:
    """Return what CUDA calls. It runs dozens of times an attention: all that can be known is found out here, once."""
    assert kernels.launch is not None
    name, reference, check, seen = card.name, card.reference, card.check, kernels.seen
    parameters = inspect.signature(reference).parameters.values()
    count, defaults = len(parameters), tuple(each.default for each in parameters)
    checked, looked_at = _selection(check, reference), _selection(seen, reference)
    module_name, _, function_name = kernels.launch.partition(":")

    def dispatch(*arguments: Any) -> Any:
        # the dispatcher leaves out what is as by default
        if len(arguments) < count:
            arguments += defaults[len(arguments) :]
        check(*checked(arguments))
        tensor, dim, q_clusters, k_clusters = seen(*looked_at(arguments))
        clusters = q_clusters if q_clusters > k_clusters else k_clusters
        if why_not_triton(name, tensor.device, tensor.dtype, dim=dim, clusters=clusters) is not None:
            return reference(*arguments)
        return getattr(_module(module_name), function_name)(*arguments)

    return dispatch


def _checked_fake(card: Card) -> Callable[..., Any]:
    """Return the fake: the check, then empty results."""
    signature = inspect.signature(card.reference)
    checked, looked_at = _selection(card.check, card.reference), _selection(card.fake, card.reference)

    def fake(*positional: Any, **named: Any) -> Any:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        card.check(*checked(bound.args))
        return card.fake(*looked_at(bound.args))

    return fake


def _selection(function: Callable[..., Any], reference: Callable[..., Any]) -> Callable[[tuple[Any, ...]], Any]:
    """Return what takes, from all arguments of the reference, those that a function names."""
    names = list(inspect.signature(reference).parameters)
    places = [names.index(name) for name in inspect.signature(function).parameters]
    if places == list(range(places[0], places[0] + len(places)) if places else []):
        return itemgetter(slice(places[0], places[-1] + 1) if places else slice(0))
    return itemgetter(*places)


def function_of(path: str) -> Callable[..., Any]:
    """Return a function of this room from its ``module:function``."""
    module_name, _, function_name = path.partition(":")
    function: Callable[..., Any] = getattr(_module(module_name), function_name)
    return function


@cache
def _module(name: str) -> ModuleType:
    """Return a module of this room, imported when it is first wanted: launchers need Triton."""
    return importlib.import_module(f"svg2_compile.kernels.{name}")
