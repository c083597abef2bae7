"""What is done to the scores before their softmax, and the softmax itself, in the spellings of public code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from svg2_compile.passes.canonicalize import CanonicalizeResult, canonicalize
from svg2_compile.passes.nodes import is_sdpa

BATCH, HEADS, TOKENS, CHANNELS = 2, 3, 7, 4
SCALE = CHANNELS**-0.5
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def operands(*leading: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = leading or (BATCH, HEADS)
    return tuple(torch.randn(*shape, TOKENS, CHANNELS, dtype=torch.float64) for _ in range(3))


def canonical(function: Function, inputs: tuple[Tensor, ...]) -> tuple[CanonicalizeResult, GraphModule, Tensor, Tensor]:
    """Return what was found, the graph, its output, and that of the function."""
    found: list[tuple[CanonicalizeResult, GraphModule, list[Tensor]]] = []

    def backend(gm: GraphModule, _: list[Tensor]) -> Callable[..., object]:
        def run(*args: Tensor) -> object:
            found.append((result, gm, list(args)))
            return gm(*args)

        result = canonicalize(gm)
        again = canonicalize(gm)
        assert again.rewritten == () and again.declined == result.declined
        gm.graph.lint()
        return run

    expected = function(*inputs)
    with torch.no_grad():
        output = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    ((result, gm, _),) = found
    return result, gm, output, expected


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def shifted(shift: Callable[[Tensor], Tensor]) -> Function:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        return (scores - shift(scores)).softmax(-1) @ v

    return attend


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores -= scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ v


def by_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def by_parts_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).exp()
    return torch.div(weights, torch.sum(weights, -1, keepdim=True)) @ v


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - torch.logsumexp(scores, dim=-1, keepdim=True)).exp() @ v


def by_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(scores_of(q, k), dim=-1).exp() @ v


def masked_then_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(torch.arange(TOKENS) >= TOKENS - 2, -math.inf)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


SHIFTED: dict[str, Function] = {
    "amax": shifted(lambda s: s.amax(-1, keepdim=True)),
    "amax of a tuple": shifted(lambda s: s.amax((-1,), keepdim=True)),
    "max.values": shifted(lambda s: s.max(dim=-1, keepdim=True).values),
    "max[0]": shifted(lambda s: torch.max(s, dim=-1, keepdim=True)[0]),
    "max, another axis": shifted(lambda s: s.max(-1).values.unsqueeze(-1)),
    "max, indexed": shifted(lambda s: s.amax(-1)[..., None]),
    "detached": shifted(lambda s: s.amax(-1, keepdim=True).detach()),
    "detached before": shifted(lambda s: s.detach().amax(-1, keepdim=True)),
    "of all scores": shifted(lambda s: s.max()),
    "mean": shifted(lambda s: s.mean(-1, keepdim=True)),
    "logsumexp": shifted(lambda s: s.logsumexp(-1, keepdim=True)),
    "in place": in_place,
    "by parts": by_parts,
    "by parts, without the maximum": by_parts_alone,
    "by logsumexp": by_logsumexp,
    "by log_softmax": by_log_softmax,
    "masked before": masked_then_shifted,
}


@pytest.mark.parametrize("name", SHIFTED)
def test_what_is_the_same_for_all_keys_may_be_subtracted(name):
    result, gm, output, expected = canonical(SHIFTED[name], operands())
    assert (len(result.rewritten), result.declined) == (1, ())
    assert not {"amax", "max", "exp", "logsumexp", "detach"} & {node.name for node in gm.graph.nodes}
    torch.testing.assert_close(output, expected)


FACTORS = {
    "a number": (),
    "one element": (1,),
    "each head": (HEADS, 1, 1),
    "each head of one batch": (1, HEADS, 1, 1),
    "each batch element": (BATCH, 1, 1, 1),
    "each query": (TOKENS, 1),
    "each query of each head": (BATCH, HEADS, TOKENS, 1),
}


class Scaled(nn.Module):
    """A temperature that is learned."""

    def __init__(self, shape: tuple[int, ...], how: str) -> None:
        super().__init__()
        self.how = how
        temperature = (torch.rand(shape, dtype=torch.float64) + 0.5) * 3
        if "buffer" in how:
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = nn.Parameter(temperature)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-2, -1)
        match self.how:
            case "divided" | "divided buffer":
                scores = scores / self.temperature
            case "clamped, exponential":
                scores = self.temperature.clamp(max=4.0).exp() * scores
            case "twice":
                scores = scores * self.temperature * 0.5 / self.temperature
            case "then biased":
                scores = scores * self.temperature + torch.arange(TOKENS)
            case "in place":
                scores *= self.temperature
            case _:
                scores = scores * self.temperature
        return F.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize(
    "how", ["times", "divided", "divided buffer", "clamped, exponential", "twice", "then biased", "in place"]
)
@pytest.mark.parametrize("name", FACTORS)
def test_a_temperature_that_is_the_same_for_all_keys_scales_the_queries(name, how):
    result, _, output, expected = canonical(Scaled(FACTORS[name], how), operands())
    assert (len(result.rewritten), result.declined) == (1, ())
    torch.testing.assert_close(output, expected.detach())


@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 2)], ids=["four axes", "three axes", "five axes"])
def test_a_temperature_fits_attention_of_any_rank(leading):
    shape = (*(leading or (BATCH, HEADS))[-1:], 1, 1)
    result, _, output, expected = canonical(Scaled(shape, "times"), operands(*leading))
    assert (len(result.rewritten), result.declined) == (1, ())
    torch.testing.assert_close(output, expected.detach())


@pytest.mark.parametrize("equation", ["bhid,bhjd->bhij", "b h i d, b h j d -> b h i j", "...id,...jd->...ij"])
def test_a_temperature_of_heads_fits_an_einsum(equation):
    temperature = torch.rand(HEADS, 1, 1, dtype=torch.float64) * 4

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhij,bhjd->bhid", (torch.einsum(equation, q, k) * temperature).softmax(-1), v)

    result, _, output, expected = canonical(attend, operands())
    assert len(result.rewritten) == 1
    torch.testing.assert_close(output, expected)


def kept(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def attend() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        scores = scores_of(q, k)
        before = scores.clone()
        weights = scores.softmax(-1)
        return weights @ v, (before, weights.clone())

    return attend()[0]


def statistics_that_nobody_reads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    entropy = -(weights * weights.log()).sum(-1)
    entropy.mean()
    return weights @ v


@pytest.mark.parametrize("function", [kept, statistics_that_nobody_reads])
def test_what_is_made_of_scores_and_read_by_nobody_goes_with_them(function):
    result, gm, output, expected = canonical(function, operands())
    assert (len(result.rewritten), result.declined) == (1, ())
    assert sum(is_sdpa(node) for node in gm.graph.nodes) == 1
    torch.testing.assert_close(output, expected)


def returned_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.cat((scores.softmax(-1) @ v, scores[..., :1]), -1)


def maximum_read_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    top = scores.amax(-1, keepdim=True)
    return (scores - top).softmax(-1) @ v + top


def bias_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores + scores.mean(-2, keepdim=True)).softmax(-1) @ v


def factor_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores * scores.std(-1, keepdim=True)).softmax(-1) @ v


def scaled_after_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((scores_of(q, k) + torch.arange(TOKENS)) * q[..., :1]).softmax(-1) @ v


def copied_into_elsewhere(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, log = scores_of(q, k), torch.zeros(BATCH, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    log.copy_(scores)
    return scores.softmax(-1) @ v + log[..., :1]


def sum_without_its_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).exp()
    return (weights / weights.sum(-1)) @ v


STAYS: dict[Function, str] = {
    returned_scores: "also used by",
    maximum_read_elsewhere: "also used by",
    bias_of_scores: "made of the scores",
    factor_of_scores: "made of the scores",
    scaled_after_a_bias: "by a tensor after masking",
    copied_into_elsewhere: "also used by",
}


@pytest.mark.parametrize("function", STAYS, ids=lambda function: function.__name__)
def test_what_means_something_else_stays_as_it_is_written(function):
    result, _, output, expected = canonical(function, operands())
    assert result.rewritten == ()
    assert [STAYS[function] in each.reason for each in result.declined] == [True]
    assert all(each.hint for each in result.declined)
    torch.testing.assert_close(output, expected)


def test_a_sum_that_lost_its_axis_divides_by_something_else():
    """With as many heads and batch elements as tokens, it has a shape that the weights take."""
    result, _, output, expected = canonical(sum_without_its_axis, operands(TOKENS, TOKENS))
    assert result == CanonicalizeResult((), ())
    torch.testing.assert_close(output, expected)
