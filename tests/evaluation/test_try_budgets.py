"""What is measured beside an attention is what the backend would do there, and the attention stays exact."""

import pytest
import torch
from torch import nn

import svg2_compile
from svg2_compile.calibration.try_budgets import Recorder

pytestmark = pytest.mark.usefixtures("no_grad_and_a_fresh_start")

HEADS, TOKENS, WIDTH = 3, 96, 48
OPTIONS = {"min_tokens": 64, "dense_layers": 0, "dense_steps": 0, "q_clusters": 4, "k_clusters": 8, "lowering": "eager"}
OPTIONS |= {"min_keep_ratio": 0.2}
CANDIDATES = (0.2, 0.6, 1.0)


class Attention(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(), Attention()])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, q, k, v):
        for attention in self.attentions:
            v = attention(q * self.scale, k, v)
        return v


def tokens():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, TOKENS, 16, generator=generator) for _ in "qkv")
    return q * torch.tensor([1.0, 3.0, 6.0]).view(1, -1, 1, 1), k, v * torch.tensor([1.0, 2.0, 1.0]).view(1, -1, 1, 1)


def measured(options=None, candidates=CANDIDATES):
    model = Layers()
    recorder = Recorder(model, candidates)
    recorder.compile({**OPTIONS, **(options or {})})
    return model(*tokens()), recorder


@pytest.mark.parametrize(
    "options", [{}, {"compensate": "centroids"}, {"estimate_by": "queries"}, {"cluster_metric": "queries"}]
)
def test_errors_and_densities_are_those_of_the_backend(options):
    out, recorder = measured(options)
    exact = Layers()(*tokens())
    torch.testing.assert_close(out, exact)
    found = recorder.take()
    assert list(found) == ["attentions.0", "attentions.1"] and not recorder.take()
    first = Attention()(*tokens())
    for place, top_p in enumerate(CANDIDATES):
        svg2_compile.reset()
        torch._dynamo.reset()
        model = Attention()
        sparse = torch.compile(model, backend="svg2", options={**OPTIONS, **options, "top_p": top_p})(*tokens())
        wrong = (sparse - first).double().square().sum((0, 2, 3))
        given = first.double().square().sum((0, 2, 3))
        densities, of_head, of_attention = found["attentions.0"].values[:, :, place]
        torch.testing.assert_close(of_head, wrong / given, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(of_attention, wrong / given.mean(), rtol=1e-3, atol=1e-9)
        (site,) = svg2_compile.report(model).sparse_sites
        assert densities.tolist() == pytest.approx(site.density_per_head)
    assert found["attentions.0"].tokens == TOKENS and found["attentions.0"].calls == 1


def test_calls_add_up_by_attention():
    model = Layers()
    recorder = Recorder(model, CANDIDATES)
    recorder.compile(OPTIONS)
    model(*tokens())
    once = recorder.take()
    svg2_compile.reset()
    for _ in range(2):
        model(*tokens())
        svg2_compile.reset()
    twice = recorder.take()
    for path, each in once.items():
        assert twice[path].calls == 2
        torch.testing.assert_close(twice[path].values, 2 * each.values)


def test_profiles_are_taken_where_there_are_no_candidates():
    out, recorder = measured(candidates=())
    torch.testing.assert_close(out, Layers()(*tokens()))
    found = recorder.take()["attentions.0"].values
    assert found.shape == (1, HEADS, 1)
    # sharper heads need fewer keys
    assert found[0, :, 0].tolist() == sorted(found[0, :, 0].tolist(), reverse=True) and (found > 0).all()
