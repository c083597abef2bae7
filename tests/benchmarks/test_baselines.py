"""The rivals that SVG2 is compared with, and the arithmetic of the comparison."""

import importlib
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from svg2_compile import tiny_wan
from svg2_compile.video.measure import TINY_OPTIONS, Video, generate

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCALE = 0.25
OPTIONS = {**TINY_OPTIONS, "q_clusters": 4, "k_clusters": 16, "dense_steps": 0.35, "min_tokens": 64, "top_p": 0.6}
svg2 = torch.ops.svg2


@pytest.fixture
def module(monkeypatch):
    """Import a module of the benchmarks folder by name."""
    for folder in (BENCHMARKS, *BENCHMARKS.glob("*/")):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


@pytest.fixture
def ops(module):
    return module("swapped_ops")


@pytest.fixture
def tokens():
    return torch.randn((3, 1, 2, 203, 16), generator=torch.Generator().manual_seed(0))


def state(q_clusters, k_clusters):
    return torch.zeros(1, 2, q_clusters, 16), torch.zeros(1, 2, k_clusters, 16)


def counters():
    return torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)


@pytest.fixture
def blocks(ops, tokens):
    q, k, v = tokens
    means = state(7, 13)
    order, q_sizes, k_sizes, keys, _ = svg2.cluster_tokens_(q, k, v, *means, *counters(), 5, 1, 0)
    statistics = torch.zeros(1, 2, 7, 5)
    return ops.Blocks(q, order, keys, *means, q_sizes, k_sizes, SCALE, 0.6, 0.1, statistics)


def true_mass(blocks, runs, counts, ops):
    """Return the share of the exact softmax that the runs keep, for every query in cluster order."""
    from svg2_compile.kernels.work_list import kept_keys

    q = svg2.permute_tokens(blocks.q, blocks.q_order)
    probability = (q @ blocks.k.transpose(-1, -2) * SCALE).softmax(-1)
    kept = kept_keys(runs, counts, blocks.k.shape[2]).float()
    return (probability * (ops.membership(blocks.q_sizes, q.shape[2]) @ kept)).sum(-1)


def test_the_masses_of_blocks_are_those_of_the_attention_matrix(ops, blocks):
    masses = ops.block_masses(blocks)
    assert_close(masses.sum(-1), torch.ones_like(masses[..., 0]))
    q = svg2.permute_tokens(blocks.q, blocks.q_order)[0, 1, : blocks.q_sizes[0, 1, 0]]
    keys = slice(int(blocks.k_sizes[0, 1, 0]), int(blocks.k_sizes[0, 1, :2].sum()))
    probability = (q @ blocks.k[0, 1].T * SCALE).softmax(-1)
    assert_close(masses[0, 1, 0, 1], probability[:, keys].sum(-1).mean())


def test_the_masses_do_not_depend_on_how_many_rows_are_taken_at_a_time(ops, blocks, monkeypatch):
    masses = ops.block_masses(blocks)
    monkeypatch.setattr(ops, "MAX_SCORES", 10 * blocks.k.shape[2])
    assert_close(ops.block_masses(blocks), masses)


def test_the_oracle_keeps_the_true_mass_it_was_asked_for(ops, blocks):
    kept = true_mass(blocks, *ops.by_true_mass(blocks), ops)
    members = ops.membership(blocks.q_sizes, 203)
    of_clusters = (members.transpose(-1, -2) @ kept.unsqueeze(-1)).squeeze(-1) / blocks.q_sizes
    assert (of_clusters >= blocks.top_p - 1e-6).all()


def test_the_oracle_keeps_less_than_everything_and_more_mass_than_chance(ops, blocks):
    runs, counts = ops.by_true_mass(blocks)
    density = float(ops.density_of(blocks.q_sizes, runs, counts, 203))
    assert 0 < density < float(true_mass(blocks, runs, counts, ops).mean())


@pytest.mark.parametrize(("side", "exact"), [("q", "by_queries"), ("k", "by_keys")])
def test_with_a_cluster_a_token_on_the_other_side_an_estimate_is_the_oracle(ops, tokens, side, exact):
    q, k, v = (each[:, :, :64] for each in tokens)
    one_each = torch.arange(64, dtype=torch.int32).expand(1, 2, -1).contiguous()
    few = svg2.kmeans_(q, torch.zeros(1, 2, 5, 16), counters()[0], 5, 1, 0)
    labels, means = ((few, one_each), state(5, 64)) if side == "q" else ((one_each, few), state(64, 5))
    order, q_sizes, k_sizes, keys, _ = ops.with_labels(q, k, v, means, labels)
    blocks = ops.Blocks(
        q, order, keys, *means, q_sizes, k_sizes, SCALE, 0.6, 0.1, torch.zeros(1, 2, means[0].shape[2], 5)
    )
    assert_close(getattr(ops, exact)(blocks), ops.by_true_mass(blocks))


def test_keys_of_one_value_have_no_spread_to_add(ops, tokens):
    q, _, v = tokens
    points = torch.randn((1, 2, 13, 16), generator=torch.Generator().manual_seed(1))
    k = points.repeat_interleave(16, dim=2)[:, :, :203]
    labels = torch.arange(203, dtype=torch.int32) // 16
    means = state(13, 13)
    both = (labels.expand(1, 2, -1).contiguous(),) * 2
    order, q_sizes, k_sizes, keys, _ = ops.with_labels(q, k, v, means, both)
    blocks = ops.Blocks(q, order, keys, *means, q_sizes, k_sizes, SCALE, 0.6, 0.1, torch.zeros(1, 2, 13, 5))
    assert_close(ops.by_spread(blocks), ops.by_centroids(blocks))


def test_random_clusters_hold_as_many_keys_as_svg2_keeps(ops, blocks):
    ours = ops.density_of(blocks.q_sizes, *ops.by_centroids(blocks), 203)
    draws = [ops.AtRandom(torch.Generator().manual_seed(seed))(blocks) for seed in range(20)]
    densities = torch.stack([ops.density_of(blocks.q_sizes, *draw, 203) for draw in draws])
    assert_close(densities.mean(), ours, rtol=0.05, atol=0)
    assert densities.std() > 0


def test_labels_of_kmeans_make_what_the_op_makes(ops, tokens):
    q, k, v = tokens
    means, expected_means = state(7, 13), state(7, 13)
    expected = svg2.cluster_tokens_(q, k, v, *expected_means, *counters(), 5, 1, 0)
    labels = tuple(svg2.kmeans_(x, torch.zeros_like(c), counters()[0], 5, 1, 0) for x, c in zip((q, k), means))
    assert_close(ops.with_labels(q, k, v, means, labels), expected)
    assert_close(means, expected_means)


@pytest.mark.parametrize("boxes", [False, True])
def test_blocks_by_position_are_of_one_size(ops, boxes):
    labels = ops.ByPosition((4, 8, 16), boxes).labels(64)
    assert (labels.bincount(minlength=64) == 8).all()


def test_boxes_are_compact_and_stretches_are_not(ops):
    grid = (4, 8, 16)
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    extent = {}
    for boxes in (False, True):
        inside = place[:, ops.ByPosition(grid, boxes).labels(64) == 5]
        extent[boxes] = (inside.amax(1) - inside.amin(1) + 1).tolist()
    assert extent == {False: [1, 1, 8], True: [2, 2, 2]}
    with pytest.raises(SystemExit, match="powers of two, got 48"):
        ops.box_splits(grid, 48)


def test_a_curve_is_read_between_its_points_and_not_beyond(ops):
    points = [ops.Point(psnr, 0.0, density, 0.0, 0.0, 0.0) for psnr, density in ((30.0, 0.4), (20.0, 0.1))]
    assert ops.at_density(points, 0.2) == pytest.approx(25)
    assert ops.at_density(points, 0.4) == pytest.approx(30)
    assert ops.at_density(points, 0.09) is ops.at_density(points, 0.41) is None
    assert ops.density_at(points, 25.0) == pytest.approx(0.2)
    assert ops.density_at(points, 31.0) is None


def test_partitions_are_compared_whatever_their_names(module):
    index = module("ablations").adjusted_rand_index
    labels = torch.randint(0, 8, (5000,), generator=torch.Generator().manual_seed(0))
    assert index(labels, 7 - labels) == pytest.approx(1)
    other = torch.randint(0, 5, (5000,), generator=torch.Generator().manual_seed(1))
    assert index(labels, other) == pytest.approx(0, abs=0.01)
    # by hand: of 6 pairs, 2 are together in a, 3 in b, 1 in both; by chance 2 * 3 / 6
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    assert index(a, b) == pytest.approx((1 - 1) / (2.5 - 1))


def test_inertia_is_the_distance_to_the_mean_of_the_cluster(module, tokens):
    q = tokens[0]
    centroids = torch.zeros(1, 2, 7, 16)
    found = list(module("ablations").inertias(q, centroids, 0, 6, 0))
    assert all((later <= before + 1e-9).all() for before, later in pairwise(found))
    labels = svg2.kmeans_(q, centroids.clone(), torch.ones(1, dtype=torch.int32), 1, 1, 0)
    (last,) = module("ablations").inertias(q, centroids, 1, 1, 0)
    by_hand = torch.stack(
        [
            sum(((q[0, h][labels[0, h] == c] - q[0, h][labels[0, h] == c].mean(0)) ** 2).sum() for c in range(7)) / 203
            for h in range(2)
        ]
    )
    assert_close(last.float(), by_hand)


def test_without_iterations_the_centroids_stay(module, tokens):
    ablations = module("ablations")
    means, calls = state(7, 13), counters()
    cluster = ablations.iterating(3, 0)
    cluster(*tokens, *means, *calls, 5, 1, 0)
    before = [each.clone() for each in means]
    cluster(*(tokens + 1), *means, *calls, 5, 1, 0)
    assert_close(list(means), before, rtol=0, atol=0)
    ablations.iterating(3, 1)(*(tokens + 1), *means, *calls, 5, 1, 0)
    assert not torch.equal(means[0], before[0])


def test_from_tokens_forgets_the_last_step(module, tokens):
    means, calls = state(7, 13), counters()
    cluster = module("ablations").from_tokens(3)
    first = cluster(*tokens, *means, *calls, 5, 1, 0)
    assert_close(cluster(*tokens, *means, *calls, 5, 1, 0), first, rtol=0, atol=0)


@pytest.mark.parametrize(("sides", "side"), [("q", 0), ("k", 1)])
def test_shared_labels_put_keys_where_queries_are(module, tokens, sides, side):
    means, calls = state(8, 8), counters()
    order, q_sizes, k_sizes, keys, values = module("ablations").Sharing(sides)(*tokens, *means, *calls, 5, 1, 0)
    assert torch.equal(q_sizes, k_sizes)
    assert torch.equal(keys, svg2.permute_tokens(tokens[1], order))
    assert torch.equal(values, svg2.permute_tokens(tokens[2], order))
    own = state(8, 8)[side]
    svg2.kmeans_(tokens[side], own, counters()[0], 5, 1, 0)
    assert_close(means[side], own)


def test_svg2_through_the_replaced_ops_is_the_backend_bit_by_bit(ops):
    video = replace(Video(), frames=2, height=64, width=64, steps=3)
    pipeline = tiny_wan.load_pipeline()
    bench = ops.Workbench(pipeline, [video])
    swapped = bench.compile(**OPTIONS)
    point = bench.measure(swapped, 0)
    pixels = generate(pipeline, video).pixels
    torch._dynamo.reset()
    options = {**OPTIONS, "lowering": "eager"}
    pipeline.transformer = torch.compile(bench.eager, backend="svg2", options=options, fullgraph=True)
    alone = generate(pipeline, video)
    assert torch.equal(pixels, alone.pixels)
    assert point.density == pytest.approx(alone.report.density, abs=1e-5)
    assert 0 < point.low_true_mass < point.true_mass < 1
    assert point.output_error > 0 and math.isfinite(point.psnr_db)


def test_everything_kept_is_dense_whatever_the_clusters(ops):
    video = replace(Video(), frames=2, height=64, width=64, steps=3)
    bench = ops.Workbench(tiny_wan.load_pipeline(), [video])
    swapped = bench.compile(**OPTIONS)
    swapped.cluster, swapped.top_p = ops.ByPosition((2, 8, 8), boxes=True), 1.0
    point = bench.measure(swapped, 0)
    assert point.psnr_db > 80
    assert (point.density, point.true_mass) == (pytest.approx(1), pytest.approx(1, abs=1e-4))
    assert point.output_error < 1e-4


LAB = BENCHMARKS.parent / "docs" / "lab"
FIGURES = BENCHMARKS.parent / "docs" / "images"


def between(marker):
    (page,) = (page for path in LAB.glob("*.md") if f"<!-- {marker} -->" in (page := path.read_text(encoding="utf-8")))
    return page.split(f"<!-- {marker} -->\n")[1].split(f"\n<!-- end of {marker} -->")[0]


@pytest.mark.parametrize("name", ["baselines", "baselines_32k", "baselines_why"])
def test_the_page_has_the_tables_of_the_committed_figures(module, name):
    result = json.loads((FIGURES / f"{name}.json").read_text())
    baselines = module("baselines")
    assert baselines.compare(result["points"]) == result["comparison"]
    _, comparison, presets = baselines.table(result).split("\n\n")
    assert between(name.replace("_", " ")) == comparison
    if name == "baselines":
        assert between("baselines presets") == presets


@pytest.mark.parametrize("name", ["warm", "iterations", "shared", "clusters", "dense", "floor"])
def test_the_page_has_the_ablations_of_the_committed_figures(module, name):
    result = json.loads((FIGURES / "ablations.json").read_text())
    rows = [line for line in module("ablations").table({name: result[name]}).split("\n") if line.startswith("|")]
    assert between(f"ablation {name}") == "\n".join(rows)


def test_the_page_has_the_table_of_the_committed_estimates(module):
    result = json.loads((FIGURES / "estimates.json").read_text())
    assert between("estimates") == module("estimates").table(result).split("\n\n")[1]


def test_our_presets_are_those_that_were_measured():
    from svg2_compile import preset

    measured = json.loads((FIGURES / "baselines.json").read_text())["presets"]
    assert {row["name"]: row["options"] for row in measured} == {
        name: preset(name) for name in ("quality", "balanced", "turbo")
    }


def test_the_figures_can_be_drawn_again(module, tmp_path):
    module("baselines").plot(tmp_path / "a.png", json.loads((FIGURES / "baselines_why.json").read_text()))
    module("ablations").plot(tmp_path / "b.png", json.loads((FIGURES / "ablations.json").read_text()))
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_selections_are_tried_beside_svg2_without_changing_the_video(ops, module):
    video = replace(Video(), frames=2, height=64, width=64, steps=3, guidance_scale=1.0)
    pipeline = tiny_wan.load_pipeline()
    eager, pixels = pipeline.transformer, []
    for watching in (False, True):
        torch._dynamo.reset()
        trial = module("estimates").Trial(**OPTIONS)
        trial.watching = watching
        pipeline.transformer = trial.compile(eager)
        pixels.append(generate(pipeline, video).pixels)
    assert torch.equal(*pixels)
    found = {key: ops.Kept(*torch.stack(each).mean(0).tolist()) for key, each in trial.found.items()}
    assert found["oracle", 0.95].output_error < found["oracle", 0.8].output_error
    assert found["oracle", 0.9].true_mass > found["svg2", 0.9].true_mass
