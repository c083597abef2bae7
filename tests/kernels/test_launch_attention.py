"""An attention kernel is launched with the tiles that are given, timed or tuned."""

from __future__ import annotations

import pytest
import torch

from svg2_compile.kernels import autotune
from svg2_compile.kernels import launch_attention as module
from svg2_compile.kernels.autotune import TuningKey
from svg2_compile.kernels.launch_attention import CONTEXT_K, launch_attention
from svg2_compile.kernels.tiles import AttentionTiles
from svg2_compile.kernels.why_not import ATTENTIONS

A, B = AttentionTiles(64, 32, 16, 4, 3), AttentionTiles(128, 64, 16, 8, 2)


@pytest.fixture
def launches(monkeypatch):
    """What the launchers were called with; nothing runs."""
    calls: list[tuple[str, tuple, dict]] = []

    def launcher(implementation):
        def launch(*arguments, **keywords):
            calls.append((implementation, arguments, keywords))
            return torch.zeros(1), torch.zeros(1)

        return launch

    monkeypatch.setattr(module, "_launcher", launcher)
    autotune.clear()
    yield calls
    autotune.clear()


def arguments(context: bool = False, dim: int = 80, dtype: torch.dtype = torch.float16) -> tuple:
    q = torch.zeros(1, 2, 3, dim, dtype=dtype)
    return (q, q, q, *[None] * 3, *[q if context else None] * 2, None, None)


@pytest.mark.parametrize("implementation", ATTENTIONS)
def test_without_tiles_the_launcher_takes_its_own(implementation, launches):
    given = arguments()
    launch_attention(implementation, given, 0.5, None, False)
    assert launches == [(implementation, (*given, 0.5), {})]


@pytest.mark.parametrize("implementation", ["pointer", "descriptor"])
@pytest.mark.parametrize("tune", [False, True])
def test_given_tiles_are_taken_as_they_are(implementation, tune, launches):
    launch_attention(implementation, arguments(), 0.5, [128, 64, 8, 2], tune)
    ((_, _, keywords),) = launches
    assert keywords == {"tiles": AttentionTiles(128, 64, 16, 8, 2)}


def test_gluon_takes_no_tiles_and_is_not_tuned(launches):
    with pytest.raises(ValueError, match=r"has tiles of its own, got \[128, 64, 8, 2\]; leave tiles out"):
        launch_attention("gluon", arguments(), 0.5, [128, 64, 8, 2], False)
    launch_attention("gluon", arguments(), 0.5, None, True)
    assert [keywords for _, _, keywords in launches] == [{}]


@pytest.mark.parametrize("context", [False, True])
def test_autotuning_times_the_candidates_of_the_kind_and_launches_the_fastest(context, launches, monkeypatch):
    asked = []

    def candidates(*question):
        asked.append(question)
        return A, B

    def time_ms(launch):
        launch()
        return {A: 2.0, B: 1.0}[launches[-1][2]["tiles"]]

    monkeypatch.setattr(module, "attention_candidates", candidates)
    monkeypatch.setattr(module, "capability_of", lambda device: 90)
    monkeypatch.setattr(autotune, "cuda_ms", time_ms)
    given = arguments(context)
    for _ in range(2):
        launch_attention("pointer", given, 0.5, None, True)
    assert set(asked) == {(90, 128, torch.float16, "pointer")}
    assert [keywords["tiles"] for _, _, keywords in launches] == [A, B, B, B]
    assert all(each == (*given, 0.5) for _, each, _ in launches)
    assert autotune._fastest == {TuningKey(90, "pointer", 128, torch.float16, context): B}


def test_the_context_keys_are_where_the_schema_has_them():
    from svg2_compile.kernels import ops  # noqa: F401

    schema = torch.ops.svg2.block_sparse_attention.default._schema
    assert schema.arguments[CONTEXT_K].name == "context_k"


def test_every_implementation_has_a_launcher():
    pytest.importorskip("triton", reason="Triton is not installed")
    for implementation in ATTENTIONS:
        assert module._launcher(implementation).__name__ == f"block_sparse_attention_{implementation}"
