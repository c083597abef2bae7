"""Options are refused where they mean nothing, and cluster counts follow the sequence."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svg2_compile.kernels.card import MAX_PROBES
from svg2_compile.passes.config import FIELD_NAMES, MAX_CLUSTERS, MIN_AUTO_CLUSTERS, SparseConfig
from svg2_compile.passes.errors import ConfigError

NOT_NUMBERS = st.one_of(st.none(), st.text(), st.booleans(), st.lists(st.integers(), max_size=2))
ADVICE = {
    "top_p": ("(0, 1]", "0.9 is a good start"),
    "min_keep_ratio": ("[0, 1]", "0.1 is the paper's setting"),
    "budgets": ("the path of a file", "svg2 calibrate"),
    "estimate_by": ("'centroids', 'queries', 'keys'", "must be one of"),
    "cluster_metric": ("'tokens', 'queries'", "must be one of"),
    "compensate": ("'none', 'centroids'", "must be one of"),
    "route": ("'mass', 'error'", "must be one of"),
    "max_context_ratio": ("[0, 1]", "0.5 is the default"),
    "q_clusters": ("[1, 1024]", '"auto"'),
    "k_clusters": ("[1, 1024]", '"auto"'),
    "kmeans_iters_init": ("[1, 1000]", "10 is the default"),
    "kmeans_iters_step": ("[1, 1000]", "2 is the paper's setting"),
    "dense_layers": ("at least 0", "1 is the default"),
    "min_tokens": ("at least 1", "4096 is the default"),
    "min_recall": ("[0, 1]", "0 guards nothing"),
    "exact_rows": ("(start, end)", "0:333/-50:"),
    "recall_rows": ("at least 0", "0 measures nothing"),
    "head_floor": ("'online', None", "must be one of"),
    "repair_rows": ("[0, 64]", "0 repairs nothing"),
    "recall_interval": ("at least 1", "1 measures at every sparse call"),
    "seed": ("[0, 2147483647]", "0 is the default"),
    "dense_steps": ("0", "count"),
    "lowering": ("'inductor', 'eager', 'tensorrt'", "must be one of"),
    "on_unsupported": ("'dense', 'error'", "must be one of"),
}
LOWEST = {
    "q_clusters": 1,
    "k_clusters": 1,
    "kmeans_iters_init": 1,
    "kmeans_iters_step": 1,
    "dense_layers": 0,
    "min_tokens": 1,
    "recall_rows": 0,
    "repair_rows": 0,
    "recall_interval": 1,
    "seed": 0,
    "dense_steps": 0,
}
HIGHEST = {
    "q_clusters": MAX_CLUSTERS,
    "k_clusters": MAX_CLUSTERS,
    "kmeans_iters_init": 1000,
    "kmeans_iters_step": 1000,
    "repair_rows": MAX_PROBES,
    "seed": 2**31 - 1,
}
SHARES = ("top_p", "min_keep_ratio", "max_context_ratio", "min_recall", "dense_steps")


def outside_of_shares() -> st.SearchStrategy[float]:
    above = st.floats(min_value=1, exclude_min=True, allow_infinity=True)
    below = st.floats(max_value=0, exclude_max=True, allow_infinity=True).filter(lambda value: value < 0)
    return st.one_of(above, below, st.just(float("nan")))


def bad_value(name: str) -> st.SearchStrategy[object]:
    """Return values that the option ``name`` must refuse."""
    values: list[st.SearchStrategy[object]] = [NOT_NUMBERS.filter(lambda value: value != "auto")]
    if name in SHARES:
        values.append(outside_of_shares())
    if name == "top_p":
        values.append(st.sampled_from([0, 0.0]))
    if name in LOWEST:
        values.append(st.integers(max_value=LOWEST[name] - 1))
    if name in HIGHEST:
        values.append(st.integers(min_value=HIGHEST[name] + 1))
    if name in LOWEST and name != "dense_steps":
        values.append(st.floats())
    if name == "exact_rows":
        pairs = [(5, 5), (5, 2), (-2, -5), (0, 0), (0.0, 3), (True, 3), (1, 2, 3), (None, 4), ("0", "3"), 7]
        values = [
            NOT_NUMBERS.filter(lambda value: value != []),
            st.integers(),
            st.sampled_from(pairs).map(lambda pair: (pair,)),
            st.sampled_from(["5:2", "0", "0:333,400:500", "a:b", "0:3/", "::"]),
        ]
    if name == "budgets":
        values = [st.one_of(st.booleans(), st.integers(), st.lists(st.integers(), max_size=2))]
    if name in ("estimate_by", "cluster_metric", "compensate", "route", "head_floor", "lowering", "on_unsupported"):
        values = [
            st.one_of(st.text(), st.integers(), st.none()).filter(lambda value: repr(value) not in ADVICE[name][0])
        ]
    return st.one_of(values)


@given(st.sampled_from(sorted(ADVICE)).flatmap(lambda name: st.tuples(st.just(name), bad_value(name))))
def test_a_bad_value_is_refused_with_its_name_the_value_the_range_and_advice(case):
    name, value = case
    with pytest.raises(ConfigError) as refusal:
        SparseConfig(**{name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name} must be ")
    assert f"got {value!r}" in message or f"got {value}" in message
    bounds, advice = ADVICE[name]
    assert bounds in message
    assert advice in message


def test_every_option_has_a_refusal():
    assert set(ADVICE) == set(FIELD_NAMES)


@pytest.mark.parametrize(
    "good",
    [
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_keep_ratio": 0},
        {"min_keep_ratio": 1.0},
        {"max_context_ratio": 0.0},
        {"max_context_ratio": 1},
        {"q_clusters": 1, "k_clusters": MAX_CLUSTERS},
        {"kmeans_iters_init": 1, "kmeans_iters_step": 1000},
        {"dense_steps": 0},
        {"dense_steps": 1.0},
        {"dense_steps": 500},
        {"dense_layers": 0},
        {"min_tokens": 1},
        {"exact_rows": ()},
        {"exact_rows": ((0, 1), (-1, None), (-7, 3), (5, -5))},
        {"seed": 2**31 - 1},
        {"lowering": "eager"},
        {"on_unsupported": "error"},
    ],
    ids=str,
)
def test_the_ends_of_every_range_are_accepted(good):
    config = SparseConfig(**good)
    assert {name: getattr(config, name) for name in good} == good


@given(st.integers(1, 10**7))
def test_automatic_cluster_counts_stay_in_range_and_below_the_tokens(tokens):
    q_clusters, k_clusters = SparseConfig().clusters_for(tokens)
    assert min(tokens, MIN_AUTO_CLUSTERS) <= q_clusters <= k_clusters <= min(tokens, MAX_CLUSTERS)


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_longer_sequence_never_has_fewer_clusters(tokens, more):
    config = SparseConfig()
    shorter, longer = config.clusters_for(tokens), config.clusters_for(tokens + more)
    assert shorter[0] <= longer[0] and shorter[1] <= longer[1]


@given(st.integers(1, 1024), st.integers(1, 1024), st.integers(1, 10**6))
def test_given_cluster_counts_are_taken_as_they_are(q_clusters, k_clusters, tokens):
    config = SparseConfig(q_clusters=q_clusters, k_clusters=k_clusters)
    assert config.clusters_for(tokens) == (q_clusters, k_clusters)


def test_wan_at_720p_has_the_clusters_of_the_documented_rule():
    assert SparseConfig().clusters_for(75600) == (126, 504)


@pytest.mark.parametrize(
    ("given", "ranges"),
    [
        ("0:333", ((0, 333),)),
        ("0:333/-50:", ((0, 333), (-50, None))),
        (":333/400:-3", ((0, 333), (400, -3))),
        ([[0, 333], [-50, None]], ((0, 333), (-50, None))),
        ([], ()),
    ],
)
def test_ranges_of_rows_are_pairs_however_they_are_given(given, ranges):
    config = SparseConfig(exact_rows=given)
    assert config.exact_rows == ranges
    assert config == SparseConfig(exact_rows=ranges) and hash(config) == hash(SparseConfig(exact_rows=ranges))
    assert dataclasses.replace(config, top_p=0.5).exact_rows == ranges


def test_a_config_is_frozen_hashable_and_takes_no_stray_attribute():
    config = SparseConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_p = 0.5
    assert hash(config) == hash(SparseConfig()) and config == SparseConfig()
    assert not hasattr(config, "__dict__")


def test_errors_of_means_choose_only_where_means_stand_in():
    with pytest.raises(
        ConfigError, match=r"route='error' must come with compensate='centroids' or 'keys', got compensate='none'"
    ):
        SparseConfig(route="error")
    assert SparseConfig(route="error", compensate="centroids").route == "error"
