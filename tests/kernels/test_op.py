"""Every op has one card, complete, and what the card says is what was registered."""

import dataclasses
import inspect
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from svg2_compile.kernels import op as op_module
from svg2_compile.kernels.ahead_of_time import kernel_names
from svg2_compile.kernels.card import PARTS, Kernels, Limits, same_dtype
from svg2_compile.kernels.op import define, function_of
from svg2_compile.kernels.ops import CARDS

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
name_of = attrgetter("name")
every_card = pytest.mark.parametrize("card", CARDS.values(), ids=name_of)
SCHEMAS = {
    "kmeans_": "(Tensor x, Tensor(a!) centroids, Tensor(b!) calls, int iters_init, int iters_step, int seed, "
    "Tensor? metric=None) -> Tensor",
    "sort_labels": "(Tensor labels, int clusters) -> (Tensor, Tensor)",
    "permute_tokens": "(Tensor x, Tensor order) -> Tensor",
    "unpermute_tokens": "(Tensor x, Tensor order) -> Tensor",
    "cluster_tokens_": "(Tensor q, Tensor k, Tensor v, Tensor(a!) q_centroids, Tensor(b!) k_centroids, "
    "Tensor(c!) q_calls, Tensor(d!) k_calls, int iters_init, int iters_step, int seed) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gram": "(Tensor centroids, int k_heads) -> Tensor",
    "block_masses": "(Tensor q, Tensor q_order, Tensor k_centroids, Tensor q_sizes, Tensor k_sizes, float scale) -> "
    "Tensor",
    "block_masses_by_keys": "(Tensor q_centroids, Tensor k, Tensor k_sizes, float scale) -> Tensor",
    "block_errors": "(Tensor q_centroids, Tensor k, Tensor v, Tensor k_means, Tensor v_means, Tensor k_sizes, "
    "float scale) -> Tensor",
    "cluster_means": "(Tensor x, Tensor sizes) -> Tensor",
    "log_dropped_sizes": "(Tensor runs, Tensor counts, Tensor k_sizes) -> Tensor",
    "log_dropped_weights": "(Tensor log_sizes, Tensor q_centroids, Tensor k, Tensor k_means, Tensor k_sizes, "
    "float scale) -> Tensor",
    "select_blocks": "(Tensor q_centroids, Tensor k_centroids, Tensor q_sizes, Tensor k_sizes, float scale, "
    "float top_p, float min_keep_ratio, Tensor(a!) statistics, Tensor? masses=None, Tensor? errors=None, "
    "Tensor? least_keys=None, Tensor? budgets=None) -> (Tensor, Tensor)",
    "least_keys_": "(Tensor call_statistics, Tensor k_sizes, Tensor(a!) floors) -> Tensor",
    "keep_dense_heads_": "(Tensor runs, Tensor counts, Tensor q_sizes, Tensor k_sizes, Tensor dense_heads, "
    "Tensor call_statistics, Tensor(a!) statistics) -> (Tensor, Tensor)",
    "measure_recall": "(Tensor q, Tensor k, Tensor q_order, Tensor q_sizes, Tensor k_sizes, Tensor runs, "
    "Tensor counts, Tensor? context_k, Tensor? context_mask, Tensor k_calls, float scale, int rows, int interval, "
    "int seed) -> Tensor",
    "probe_rows": "(Tensor q, Tensor k, Tensor v, Tensor q_order, Tensor q_sizes, Tensor k_sizes, Tensor runs, "
    "Tensor counts, Tensor? context_k, Tensor? context_v, Tensor? context_mask, Tensor k_calls, float scale, "
    "int rows, int interval, int seed) -> (Tensor, Tensor, Tensor)",
    "repair_rows_": "(Tensor(a!) out, Tensor places, Tensor exact) -> Tensor",
    "judge_heads_": "(Tensor found, Tensor k_calls, Tensor(a!) dense_heads, float min_recall) -> Tensor",
    "block_sparse_attention": "(Tensor q, Tensor k, Tensor v, Tensor q_sizes, Tensor runs, Tensor counts, "
    "Tensor? context_k, Tensor? context_v, Tensor? context_mask, Tensor? q_order, float scale, "
    "str implementation='auto', int[]? tiles=None, bool autotune=False, Tensor? pseudo_k=None, "
    "Tensor? pseudo_v=None, Tensor? pseudo_bias=None) -> (Tensor, Tensor)",
    "context_attention": "(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale) -> Tensor",
    "dense_attention": "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa) -> Tensor",
    "key_mask": "(Tensor mask) -> (Tensor, Tensor)",
    "redo_densely_": "(Tensor(a!) out, Tensor(b!) calls, Tensor is_key_mask, Tensor q, Tensor k, Tensor v, "
    "Tensor mask, float scale, bool refuses) -> ()",
}


def registered(name):
    return getattr(torch.ops.svg2, name).default


def with_letters(schema):
    """Return a schema as PyTorch writes it, with what is written to called a!, b! ... in their order."""
    marks = iter("abcdefgh")
    return re.sub(r"\(\w+!\)", lambda _: f"({next(marks)}!)", str(schema))


def test_schemas_are_what_exported_programs_were_made_with():
    found = {name: with_letters(registered(name)._schema) for name in CARDS}
    assert found == {name: str(torch._C.parse_schema(f"svg2::{name}{schema}")) for name, schema in SCHEMAS.items()}


@every_card
def test_a_card_says_everything_about_its_op(card):
    assert card.part in PARTS
    assert card.reference.__doc__
    assert torch.Tag.pt2_compliant_tag in registered(card.name).tags
    names = set(inspect.signature(card.reference).parameters)
    for function in (card.check, card.fake, card.kernels.seen if card.kernels else card.fake):
        assert set(inspect.signature(function).parameters) <= names
    if card.kernels is None:
        assert card.runs in ("sdpa", "pytorch")
        return
    assert card.runs == "triton"
    assert callable(function_of(card.kernels.self_check))
    assert isinstance(card.kernels.seen_dtype(torch.bfloat16), torch.dtype)
    assert (card.kernels.launch is None) == (card.name == "block_sparse_attention")
    assert card.kernels.modules


@pytest.mark.parametrize("card", [card for card in CARDS.values() if card.kernels and card.kernels.launch], ids=name_of)
def test_a_launcher_takes_what_its_reference_takes(card):
    pytest.importorskip("triton", reason="Triton is not installed")
    launcher = inspect.signature(function_of(card.kernels.launch))
    launcher.bind(*inspect.signature(card.reference).parameters)


@every_card
def test_an_op_stands_in_a_module_of_its_name(card):
    module = card.reference.__module__.rpartition(".")[2]
    both_directions = ("permute_tokens", "unpermute_tokens")
    assert module == ("permute" if card.name in both_directions else card.name.rstrip("_"))


def test_every_module_with_kernels_belongs_to_a_card():
    files = {path.stem for end in ("triton", "gluon", "descriptor", "pointer") for path in KERNELS.glob(f"*_{end}.py")}
    assert {module for card in CARDS.values() if card.kernels for module in card.kernels.modules} == files


def test_every_module_that_defines_an_op_is_imported():
    defining = {path.stem for path in KERNELS.glob("*.py") if re.search(r"^define\(", path.read_text(), re.MULTILINE)}
    assert {card.reference.__module__.rpartition(".")[2] for card in CARDS.values()} == defining


def test_every_kernel_can_be_compiled_ahead_of_time_and_counts_to_a_part():
    pytest.importorskip("triton", reason="Triton is not installed")
    written = {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        if "jit" in path.read_text()
    }
    assert {name for part in PARTS for name in kernel_names(part)} == written


@pytest.fixture
def double(monkeypatch):
    """An op with a kernel that notes its calls, and what CUDA would call for it."""
    registered, launched = {}, []
    monkeypatch.setattr(torch.library, "define", lambda *arguments, **more: None)
    monkeypatch.setattr(torch.library, "register_fake", lambda name, fake: registered.update(fake=fake))
    monkeypatch.setattr(torch.library, "impl", lambda name, device, function: registered.update({device: function}))
    monkeypatch.setattr(op_module, "CARDS", {})
    monkeypatch.setattr(op_module, "_module", lambda name: namespace)

    def launch(x, factor, times, more=None):
        launched.append((x, factor, times, more))
        return "launched"

    def reference(x: torch.Tensor, factor: float, times: int, more: torch.Tensor | None = None) -> torch.Tensor:
        return "reference"

    def check(factor, more):
        if factor < 0:
            raise ValueError("factor must not be negative")

    namespace = type("Module", (), {"launch": staticmethod(launch)})
    kernels = Kernels(
        Limits(clusters=9), lambda x, times: (x, x.shape[0], times, 2), same_dtype, "some_triton:launch", "", ()
    )
    define(
        reference, name="double", part="recall", check=check, fake=lambda times, x: (times, x.shape), kernels=kernels
    )
    return registered, launched


def test_dispatch_checks_then_asks_then_launches(double, monkeypatch):
    registered, launched = double
    asked = []
    monkeypatch.setattr(op_module, "why_not_triton", lambda *names, **sizes: asked.append((names, sizes)))
    x = torch.empty(5)
    assert registered["cuda"](x, 0.5, 3) == "launched"
    assert asked == [(("double", x.device, x.dtype), {"dim": 5, "clusters": 3})]
    assert registered["cuda"](x, 0.5, 1, x) == "launched"
    assert asked[1][1] == {"dim": 5, "clusters": 2}
    # what the dispatcher leaves out is as by default
    assert [each[1:] for each in launched] == [(0.5, 3, None), (0.5, 1, x)]
    with pytest.raises(ValueError, match="factor must not be negative"):
        registered["cuda"](x, -0.5, 3)
    assert len(asked) == len(launched) == 2


def test_where_no_kernel_can_run_the_reference_does(double, monkeypatch):
    registered, launched = double
    monkeypatch.setattr(op_module, "why_not_triton", lambda *names, **sizes: "too many")
    assert registered["cuda"](torch.empty(5), 0.5, 3) == "reference" == registered["cpu"](torch.empty(5), 0.5, 3)
    assert launched == []


def test_a_fake_checks_and_takes_what_it_names_however_it_is_given(double):
    registered, _ = double
    assert registered["fake"](torch.empty(5), times=3, factor=0.5) == (3, (5,))
    with pytest.raises(ValueError, match="factor must not be negative"):
        registered["fake"](torch.empty(5), -0.5, 3)


def test_a_card_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CARDS["kmeans_"].name = "other"
