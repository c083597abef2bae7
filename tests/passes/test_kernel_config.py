"""The options that can only change the time are refused where they mean nothing, and reach the op where they do."""

from __future__ import annotations

import dataclasses

import pytest
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st

import svg2_compile
from svg2_compile.kernels import block_sparse_attention
from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.why_not import ATTENTIONS
from svg2_compile.options import Options, configure, current_defaults, split_options
from svg2_compile.passes import config as sparse_config
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.kernel_config import FIELD_NAMES, TILES, KernelConfig

POWERS = {"block_m": (16, 256), "block_n": (16, 256), "num_warps": (1, 16)}
NO_NUMBERS = st.one_of(st.text(), st.booleans(), st.floats(), st.lists(st.integers(), max_size=2))


def bad_value(name: str) -> st.SearchStrategy[object]:
    """Return values that the option ``name`` must refuse."""
    if name == "attention":
        return st.one_of(st.none(), st.integers(), st.text().filter(lambda word: word not in ("auto", *ATTENTIONS)))
    if name in ("autotune", "self_check"):
        return st.one_of(st.none(), st.integers(), st.text())
    if name == "engine_folder":
        return st.one_of(st.just(""), st.booleans(), st.integers())
    if name == "num_stages":
        return st.one_of(NO_NUMBERS, st.integers(max_value=0), st.integers(min_value=9))
    low, high = POWERS[name]
    fits = {1 << bit for bit in range(9) if low <= 1 << bit <= high}
    return st.one_of(
        NO_NUMBERS,
        st.integers().filter(lambda value: value not in fits),
        st.integers(low + 1, high - 1).filter(lambda value: value not in fits),
    )


RANGES = {
    "attention": "'auto', 'gluon', 'descriptor', 'pointer'",
    "block_m": "a power of two in [16, 256]",
    "block_n": "a power of two in [16, 256]",
    "num_warps": "a power of two in [1, 16]",
    "num_stages": "in [1, 8]",
    "autotune": "True or False",
    "self_check": "True or False",
    "engine_folder": "a path as text or None",
}


def test_every_option_has_a_refusal():
    assert set(RANGES) == set(FIELD_NAMES)


@given(st.sampled_from(sorted(RANGES)).flatmap(lambda name: st.tuples(st.just(name), bad_value(name))))
def test_a_bad_value_is_refused_with_its_name_the_value_and_the_range(case):
    name, value = case
    with pytest.raises(ConfigError) as refusal:
        KernelConfig(**{"attention": "pointer"} | {name: value})
    message = str(refusal.value)
    assert message.startswith(f"{name} must be ")
    assert f"got {value!r}" in message or f"got {value}" in message
    assert RANGES[name] in message


@pytest.mark.parametrize("name", POWERS)
def test_every_power_of_two_in_the_range_is_accepted(name):
    low, high = POWERS[name]
    for value in (1 << bit for bit in range(low.bit_length() - 1, high.bit_length())):
        assert getattr(KernelConfig(attention="pointer", **{name: value}), name) == value


@pytest.mark.parametrize("stages", range(1, 9))
def test_any_number_of_stages_from_1_to_8_is_accepted(stages):
    assert KernelConfig(attention="descriptor", num_stages=stages).given_tiles == {"num_stages": stages}


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({}, r'=2 must come with a named attention, got attention="auto".*add attention="pointer"'),
        ({"attention": "gluon"}, r"=2 must be left out with attention=\"gluon\", whose tiles are part of its code"),
        ({"attention": "pointer", "autotune": True}, "=2 must be left out with autotune=True, which chooses the tiles"),
    ],
    ids=["auto", "gluon", "autotune"],
)
def test_tiles_that_nothing_could_take_are_refused_with_a_reason(name, others, reason):
    value = 2 if name.startswith("num") else 32
    with pytest.raises(ConfigError, match=f"^{name}{reason.replace('=2', f'={value}', 1)}"):
        KernelConfig(**others, **{name: value})


@pytest.mark.parametrize("block_n", [16, 32, 64, 128, 256])
def test_with_descriptors_a_tile_of_keys_is_one_of_the_pieces_that_are_counted(block_n):
    if block_n in (16, 64, 128):
        assert KernelConfig(attention="descriptor", block_n=block_n).block_n == block_n
        return
    with pytest.raises(
        ConfigError, match=f'^block_n must be one of 16, 64, 128 with .*"descriptor", .*, got {block_n}$'
    ):
        KernelConfig(attention="descriptor", block_n=block_n)


def test_without_tiles_every_attention_can_be_named_and_tuned():
    for attention in ("auto", *ATTENTIONS):
        assert KernelConfig(attention=attention, autotune=True).given_tiles == {}


def test_the_tiles_are_in_the_order_of_the_op_and_named_as_in_the_tables():
    given = KernelConfig(attention="pointer", num_stages=3, num_warps=8, block_n=64, block_m=128).given_tiles
    assert list(given.items()) == [("block_m", 128), ("block_n", 64), ("num_warps", 8), ("num_stages", 3)]
    assert set(TILES) < {field.name for field in dataclasses.fields(AttentionTiles)}


def test_the_op_knows_the_same_attentions():
    assert block_sparse_attention.ATTENTIONS == ATTENTIONS


def test_a_config_is_frozen_hashable_and_takes_no_stray_attribute():
    config = KernelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.attention = "pointer"
    assert hash(config) == hash(KernelConfig()) and config == KernelConfig()
    assert not hasattr(config, "__dict__")


def test_the_public_name_is_the_config():
    assert svg2_compile.KernelConfig is KernelConfig


# Options


def test_no_option_has_two_meanings():
    names = [*sparse_config.FIELD_NAMES, *FIELD_NAMES]
    assert len(set(names)) == len(names)
    assert not set(names) & set(torch._inductor.config.get_config_copy())


def test_options_are_dealt_to_the_config_that_has_the_field():
    options = {"svg2.attention": "pointer", "num_warps": 4, "top_p": 0.5, "svg2.seed": 7, "max_autotune": True}
    ours, inductors = split_options(options)
    assert ours == Options(SparseConfig(top_p=0.5, seed=7), KernelConfig(attention="pointer", num_warps=4))
    assert inductors == {"max_autotune": True}


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("svg2.block_mm", "did you mean 'block_m'"),
        ("autotunes", "did you mean 'autotune'"),
        ("top_pp", "did you mean 'top_p'"),
        ("zzz", "known options are top_p, .*, attention, block_m, .*, and Inductor's own"),
    ],
)
def test_an_unknown_option_gets_advice_from_both_configs(key, advice):
    with pytest.raises(ConfigError, match=f"unknown option '{key}'; {advice}"):
        split_options({key: 1})


def test_configure_changes_both_configs_and_restores_both():
    before = current_defaults()
    with configure(top_p=0.5, autotune=True) as inside:
        assert inside == current_defaults() == before.replace({"top_p": 0.5, "autotune": True})
        assert (inside.sparse.top_p, inside.kernel.autotune) == (0.5, True)
        assert split_options({"attention": "descriptor"})[0].kernel == KernelConfig("descriptor", autotune=True)
    assert current_defaults() == before


@pytest.mark.parametrize("fields", [{"top_p": 0.5, "block_m": 64}, {"autotune": True, "top_p": 2.0}])
def test_configure_changes_nothing_when_one_of_its_fields_is_refused(fields):
    before = current_defaults()
    with pytest.raises(ConfigError):
        configure(**fields)
    assert current_defaults() == before
