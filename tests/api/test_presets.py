"""Named settings."""

from pathlib import Path

import pytest

import svg2_compile
from svg2_compile.options import split_options
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError

OURS = ("quality", "balanced", "turbo")


@pytest.mark.parametrize("name", svg2_compile.preset_names())
def test_a_preset_is_a_valid_configuration_of_nothing_but_the_picture(name):
    config = SparseConfig(**svg2_compile.preset(name))
    assert all(getattr(config, field) == value for field, value in svg2_compile.preset(name).items())


@pytest.mark.parametrize("name", svg2_compile.preset_names())
def test_a_preset_can_be_named_among_the_options(name):
    options, inductors = split_options({"preset": name})
    assert (options.sparse, inductors) == (SparseConfig(**svg2_compile.preset(name)), {})


@pytest.mark.parametrize("options", [{"preset": "turbo", "top_p": 0.85}, {"top_p": 0.85, "svg2.preset": "turbo"}])
def test_fields_given_beside_a_preset_win_in_either_order(options):
    sparse = split_options(options)[0].sparse
    assert sparse == SparseConfig(**svg2_compile.preset("turbo") | {"top_p": 0.85})


def test_balanced_is_the_default():
    assert SparseConfig(**svg2_compile.preset("balanced")) == SparseConfig()


def test_ours_leave_the_counts_to_the_sequence_and_go_from_more_to_less():
    presets = [svg2_compile.preset(name) for name in OURS]
    assert not any({"q_clusters", "k_clusters"} & set(each) for each in presets)
    assert [each["top_p"] for each in presets] == sorted((each["top_p"] for each in presets), reverse=True)


def test_what_the_caller_changes_stays_his():
    svg2_compile.preset("turbo")["top_p"] = 1.0
    assert svg2_compile.preset("turbo")["top_p"] < 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blanced", "did you mean 'balanced'"),
        ("fast", "unknown preset 'fast'; there are quality, balanced, turbo, paper-wan-2.1"),
        (None, "unknown preset None; there are"),
        (["turbo"], r"unknown preset \['turbo'\]"),
    ],
)
def test_an_unknown_name_lists_the_names(name, said):
    with pytest.raises(ConfigError, match=said):
        split_options({"preset": name})


def test_the_page_of_the_method_has_the_published_settings():
    page = (Path(__file__).resolve().parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    named = [name for name in svg2_compile.preset_names() if name not in OURS]
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `paper-")] == named
    for name in named:
        given = svg2_compile.preset(name)
        row = (
            f"| `{name}` | {given['q_clusters']} / {given['k_clusters']} | {given['top_p']} "
            f"| {100 * given['dense_steps']:.0f} % | {given['dense_layers']} |"
        )
        assert row in page
        assert (given["min_keep_ratio"], given["kmeans_iters_init"], given["kmeans_iters_step"]) == (0.1, 50, 2)
