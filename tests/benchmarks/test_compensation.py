"""What means weigh in the comparison of ways to stand in for dropped clusters, and its arithmetic."""

import importlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from budgets_cases import write_for

from svg2_compile import tiny_wan
from svg2_compile.passes.budgets import AttentionBudgets
from svg2_compile.video.measure import TINY_OPTIONS, Video

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCALE = 0.25


@pytest.fixture
def compensation(monkeypatch):
    for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("compensation")


@pytest.fixture
def clusters():
    """Mean queries of two heads, keys of one, their means and sizes, an empty cluster among them, and a bias."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), 2 * torch.randn(1, 1, 40, 8, generator=generator)
    k_sizes = torch.tensor([[[10, 0, 29, 1]]], dtype=torch.int32)
    bias = torch.randn(1, 2, 3, 4, generator=generator)
    bias[..., 1] = -torch.inf
    return bias, q, k, torch.ops.svg2.cluster_means(k, k_sizes), k_sizes


def scores_of(clusters):
    """Return the scores of the keys of every cluster that has some, and of its mean."""
    _, q, k, k_means, k_sizes = clusters
    first = 0
    for cluster, size in enumerate(k_sizes[0, 0].tolist()):
        if size:
            yield cluster, q @ k[:, :, first : first + size].mT * SCALE, q @ k_means[:, :, cluster, :, None] * SCALE
        first += size


def test_the_second_order_is_half_the_variance_of_the_scores(compensation, clusters):
    found = compensation.by_variance(*clusters, SCALE) - clusters[0]
    for cluster, scores, _ in scores_of(clusters):
        wanted = scores.var(-1, correction=0) / 2
        torch.testing.assert_close(found[..., cluster], wanted, rtol=1e-4, atol=1e-4)


def test_what_is_left_out_stays_left_out(compensation, clusters):
    weighed = compensation.by_variance(*clusters, SCALE)
    assert torch.equal(weighed == -torch.inf, clusters[0] == -torch.inf)


def test_a_gain_is_read_at_the_density_of_the_other_way_and_nowhere_else(compensation):
    def curve(way, points):
        points = [compensation.Point(level, 1.0, density, 1.0, 0.0) for level, density in points]
        return [{"way": way, "top_p": 0.0, **asdict(point)} for point in points]

    video = {"points": curve("plain", [(20.0, 0.1), (30.0, 0.4)]) + curve("other", [(25.0, 0.05), (29.0, 0.2)])}
    assert compensation.gain(video, "plain", "other", 0) == pytest.approx(7.0)
    assert compensation.gain(video, "plain", "other", 1) is None


def test_a_way_is_run_and_everything_kept_is_dense(compensation, tmp_path):
    pipeline = tiny_wan.load_pipeline()
    options = {**TINY_OPTIONS, "q_clusters": 4, "k_clusters": 16, "dense_steps": 0.35, "min_tokens": 64}
    videos = [Video(frames=2, height=64, width=64, steps=2, seed=seed) for seed in (0, 1)]
    bench = compensation.Bench(pipeline, videos, options)
    assert all(floor > 60 for floor in bench.floor())
    everything = bench.sparse(compensation.WAYS["second order"], 1.0)
    assert all(point.density == 1.0 and point.psnr_db > 60 for point in everything)
    for way in ("keys", "oracle"):
        less = bench.sparse(compensation.WAYS[way], 0.3)
        assert all(0 < point.density < 1 for point in less)
        assert all(point.psnr_db < whole.psnr_db for point, whole in zip(less, everything))
    # a file with a share for each head, whatever top_p says
    layers, heads = bench.eager.config.num_layers, bench.eager.config.num_attention_heads
    shares = [AttentionBudgets(f"blocks.{layer}.attn1", heads, (1.0,) * heads) for layer in range(layers)]
    path = write_for(tmp_path / "b.json", bench.eager, *shares)
    whole = bench.sparse(compensation.Way({}, files={0.3: path}), 0.3)
    assert all(point.density == 1.0 and point.psnr_db > 60 for point in whole)


def test_ways_measured_apart_are_put_together(compensation):
    def measured(way, prompt):
        points = [{"way": way, "top_p": 0.5}]
        return {"tokens": 64, "dtype": "float32", "options": {}, "videos": [{"video": prompt, "points": points}]}

    both = compensation.joined([measured("centroids", "cat"), measured("queries", "cat")])
    assert [point["way"] for point in both["videos"][0]["points"]] == ["centroids", "queries"]
    with pytest.raises(SystemExit, match="same videos"):
        compensation.joined([measured("centroids", "cat"), measured("queries", "dog")])


def test_the_cost_is_timed_beside_dense_attention(monkeypatch):
    for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
        monkeypatch.syspath_prepend(str(folder))
    cost = importlib.import_module("compensation_cost")
    shape = cost.Shape("small", 2, 300, 16, ((3, 9),))
    found = cost.table(shape, 1, 257, (3, 9), torch.float32, 1)
    assert "small: 1 heads, 257 tokens of 16, torch.float32, 3 / 9 clusters" in found
    for name in (
        "dense attention",
        "the same with means",
        "**compensation, alto",
        "**routing by error, alto",
        "**floor of a head, alto",
        "**repair, alto",
    ):
        assert f"| {name}" in found
