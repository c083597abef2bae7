"""The self-check passes what is right, finds what is wrong, and a wrong kernel is replaced by the next one, loudly."""

import contextlib
import dataclasses
import logging
import math

import pytest
import torch
from triton_interpreter import DEVICE, assert_passes_under_the_interpreter, runs_kernels, starts_the_interpreter

import svg2_compile
from svg2_compile import doctor, region
from svg2_compile.doctor import Workload, diagnose
from svg2_compile.kernels import block_sparse_attention, self_check, why_not
from svg2_compile.kernels.ops import CARDS
from svg2_compile.kernels.self_check import Kind, check_kernels, kernel_of, kinds_of, why_wrong
from svg2_compile.kernels.why_not import (
    GLUON_ASSIGNMENT,
    PSEUDO_KEYS,
    AttentionChoice,
    choose_attention,
    why_not_triton,
)

svg2 = torch.ops.svg2
GPU = torch.device("cuda", 0)
CPU_KIND = Kind(torch.device("cpu"), torch.float32, 16, q_clusters=3, k_clusters=7)
ON_GPU = Kind(GPU, torch.bfloat16, 128, q_clusters=100, k_clusters=500)
WITH_KERNELS = [card.name for card in CARDS.values() if card.kernels is not None]
every_op = pytest.mark.parametrize("op", WITH_KERNELS)
GIVEN_CONTEXT, GIVEN_MASSES, GIVEN_ERRORS, GIVEN_PSEUDO_KEYS, GIVEN_METRIC = (
    frozenset({name}) for name in ("context_k", "masses", "errors", "pseudo_k", "metric")
)


def name_of(changes):
    """Return the same name in every process, in which order a set may be."""
    return str({key: sorted(value) if isinstance(value, frozenset) else value for key, value in changes.items()})


@starts_the_interpreter
def test_the_kernels_pass_under_the_interpreter():
    assert_passes_under_the_interpreter(__file__)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.bfloat16, "given": GIVEN_CONTEXT | {"context_mask"}},
        {"dtype": torch.float16, "dim": 64, "given": GIVEN_CONTEXT},
        {"q_clusters": 1, "k_clusters": 1},
        {"given": GIVEN_MASSES},
        {"given": GIVEN_CONTEXT | GIVEN_PSEUDO_KEYS, "dtype": torch.float16},
        {"given": GIVEN_ERRORS},
        {"given": GIVEN_METRIC, "dtype": torch.bfloat16},
        {"given": GIVEN_METRIC, "dim": 64, "k_clusters": 300, "dtype": torch.float16},
        {"given": frozenset({"least_keys"})},
        {"dim": 128, "q_clusters": 60, "k_clusters": 300, "dtype": torch.bfloat16},
    ],
    ids=name_of,
)
@every_op
def test_what_is_right_passes(op, changes):
    assert why_wrong(op, dataclasses.replace(CPU_KIND, **changes)) is None


def with_result(position, change):
    """Return a plan for a wrong op: one of its results is changed in place."""

    def plant(op):
        def wrong(*arguments):
            results = getattr(svg2, op)(*arguments)
            change(results if isinstance(results, torch.Tensor) else results[position])
            return results

        return wrong

    return plant


def with_state(position, change):
    """Return a plan for a wrong op: one of its arguments is changed in place afterwards."""

    def plant(op):
        def wrong(*arguments):
            results = getattr(svg2, op)(*arguments)
            change(arguments[position])
            return results

        return wrong

    return plant


def with_argument(position, value):
    """Return a plan for a wrong op: one of its arguments is another one."""

    def plant(op):
        return lambda *arguments: getattr(svg2, op)(*arguments[:position], value(arguments), *arguments[position + 1 :])

    return plant


def set_at(index, value):
    return lambda x: x.__setitem__(index, value)


LAST = (0, 1, -1)
WRONG = [
    ("kmeans_", with_result(0, set_at(LAST, 0))),
    ("kmeans_", with_result(0, set_at(LAST, 99))),
    ("kmeans_", with_state(1, lambda centroids: centroids[0, 1, 2].mul_(1.01))),
    ("kmeans_", with_state(1, set_at(LAST, math.nan))),
    ("cluster_tokens_", with_result(0, lambda order: order.copy_(order.flip(-1)))),
    ("cluster_tokens_", with_result(1, lambda sizes: sizes.copy_(sizes.flip(-1) + 1))),
    ("cluster_tokens_", with_result(3, set_at(LAST, 0))),
    ("cluster_tokens_", with_result(4, lambda values: values.copy_(values.roll(1, 2)))),
    ("cluster_tokens_", with_state(4, lambda centroids: centroids.mul_(1.01))),
    ("sort_labels", with_result(0, set_at(LAST, 0))),
    ("sort_labels", with_result(1, set_at(LAST, 0))),
    ("permute_tokens", with_result(0, lambda x: x.copy_(x.roll(1, 2)))),
    ("unpermute_tokens", with_result(0, lambda x: x.copy_(x.roll(1, 2)))),
    ("select_blocks", with_argument(5, lambda arguments: 0.6)),
    ("select_blocks", with_argument(4, lambda arguments: 2 * arguments[4])),
    ("select_blocks", with_state(7, lambda statistics: statistics.mul_(1.05))),
    ("block_masses", with_argument(5, lambda arguments: 1.1 * arguments[5])),
    ("block_masses", with_argument(1, lambda arguments: arguments[1].roll(1, 2))),
    ("block_masses", with_argument(4, lambda arguments: torch.ones_like(arguments[4]))),
    ("block_masses", with_result(0, set_at(LAST, math.nan))),
    ("block_masses_by_keys", with_argument(3, lambda arguments: 1.1 * arguments[3])),
    ("block_masses_by_keys", with_argument(2, lambda arguments: arguments[2].flip(-1))),
    ("block_masses_by_keys", with_argument(1, lambda arguments: arguments[1].nan_to_num(0).roll(1, 2))),
    ("block_masses_by_keys", with_result(0, set_at(LAST, math.nan))),
    ("block_errors", with_argument(6, lambda arguments: 1.1 * arguments[6])),
    ("block_errors", with_argument(5, lambda arguments: arguments[5].flip(-1))),
    ("block_errors", with_argument(2, lambda arguments: arguments[2].nan_to_num(0).roll(1, 2))),
    ("block_errors", with_argument(4, lambda arguments: torch.zeros_like(arguments[4]))),
    ("block_errors", with_result(0, set_at(LAST, math.nan))),
    ("cluster_means", with_argument(1, lambda arguments: arguments[1].flip(-1))),
    ("cluster_means", with_argument(0, lambda arguments: arguments[0].nan_to_num(0).roll(1, 2))),
    ("cluster_means", with_result(0, set_at(LAST, math.nan))),
    ("log_dropped_sizes", with_argument(1, lambda arguments: (arguments[1] - 1).clamp(min=0))),
    ("log_dropped_sizes", with_argument(2, lambda arguments: arguments[2].clamp(max=1))),
    ("log_dropped_sizes", with_result(0, lambda logs: logs.add_(1e-3))),
    ("log_dropped_weights", with_argument(5, lambda arguments: 1.1 * arguments[5])),
    ("log_dropped_weights", with_argument(4, lambda arguments: arguments[4].flip(-1))),
    ("log_dropped_weights", with_argument(3, lambda arguments: torch.zeros_like(arguments[3]))),
    ("log_dropped_weights", with_argument(0, lambda arguments: torch.zeros_like(arguments[0]))),
    ("log_dropped_weights", with_result(0, set_at(LAST, math.nan))),
    ("block_sparse_attention", with_argument(10, lambda arguments: 1.1 * arguments[10])),
    ("block_sparse_attention", with_argument(5, lambda arguments: (arguments[5] - 1).clamp(min=0))),
    ("block_sparse_attention", with_argument(2, lambda arguments: arguments[2].roll(1, 2))),
    ("block_sparse_attention", with_result(0, set_at(LAST, math.nan))),
    ("block_sparse_attention", with_result(1, lambda lse: lse.add_(0.1))),
    ("measure_recall", with_argument(10, lambda arguments: 1.1 * arguments[10])),
    ("measure_recall", with_argument(6, lambda arguments: (arguments[6] - 1).clamp(min=0))),
    ("measure_recall", with_result(0, lambda found: found.mul_(0.99))),
    ("probe_rows", with_argument(12, lambda arguments: 1.1 * arguments[12])),
    ("probe_rows", with_argument(7, lambda arguments: (arguments[7] - 1).clamp(min=0))),
    ("probe_rows", with_argument(2, lambda arguments: arguments[2].nan_to_num(0).roll(1, 2))),
    ("probe_rows", with_argument(15, lambda arguments: 7)),
    ("probe_rows", with_result(1, set_at(LAST, math.nan))),
    ("probe_rows", with_result(2, lambda recall: recall.mul_(0.99))),
    ("repair_rows_", with_argument(2, lambda arguments: 1.1 * arguments[2])),
    ("repair_rows_", with_argument(1, lambda arguments: arguments[1].flip(-1).contiguous())),
    ("repair_rows_", with_state(0, lambda out: out[0, 0].mul_(1.05))),
    ("repair_rows_", with_state(0, set_at(LAST, math.nan))),
    ("repair_rows_", with_result(0, lambda found: found.mul_(0.9))),
]


def test_a_wrong_selection_of_given_masses_is_found():
    plant = with_argument(8, lambda arguments: None if arguments[8] is None else arguments[8].flip(-1))
    assert why_wrong("select_blocks", dataclasses.replace(CPU_KIND, given=GIVEN_MASSES), plant("select_blocks"))


def test_a_wrong_selection_by_errors_is_found():
    plant = with_argument(9, lambda arguments: None if len(arguments) < 10 else -arguments[9])
    assert why_wrong("select_blocks", dataclasses.replace(CPU_KIND, given=GIVEN_ERRORS), plant("select_blocks"))


@pytest.mark.parametrize("metric", [lambda given: None, lambda given: given.flip(1)], ids=["none", "of another head"])
def test_a_clustering_in_another_metric_is_found(metric):
    plant = with_argument(6, lambda arguments: metric(arguments[6]))
    for dim, k_clusters in ((16, 7), (64, 300)):
        kind = dataclasses.replace(CPU_KIND, dim=dim, k_clusters=k_clusters, given=GIVEN_METRIC)
        assert why_wrong("kmeans_", kind) is None
        assert why_wrong("kmeans_", kind, plant("kmeans_")) is not None


def test_a_floor_in_keys_that_is_forgotten_is_found():
    def forgets(*arguments):
        return svg2.select_blocks(*arguments[:10])

    kind = dataclasses.replace(CPU_KIND, given=GIVEN_MASSES | {"least_keys"})
    assert why_wrong("select_blocks", kind) is None
    assert why_wrong("select_blocks", kind, forgets).endswith("% of the pairs are chosen otherwise")


def test_a_wrong_weight_of_pseudo_keys_is_found():
    def forgets(*arguments):
        return svg2.block_sparse_attention(*arguments[:14], *arguments[14:16], arguments[16] - 0.1)

    kind = dataclasses.replace(CPU_KIND, given=GIVEN_PSEUDO_KEYS)
    assert why_wrong("block_sparse_attention", kind) is None
    assert why_wrong("block_sparse_attention", kind, forgets).startswith("off by ")


def test_dispatch_asks_what_can_run_before_pseudo_keys_where_there_are_some(monkeypatch):
    asked = []

    def choose(*arguments, pseudo_keys, **others):
        asked.append(pseudo_keys)
        return AttentionChoice("reference")

    monkeypatch.setattr(block_sparse_attention, "choose_attention", choose)
    on_a_gpu = block_sparse_attention._block_sparse_attention_cuda
    for given in (frozenset(), GIVEN_PSEUDO_KEYS):
        assert why_wrong("block_sparse_attention", dataclasses.replace(CPU_KIND, given=given), on_a_gpu) is None
    assert asked == [False, True]


@pytest.mark.parametrize(("op", "plant"), WRONG, ids=[f"{op}{i}" for i, (op, _) in enumerate(WRONG)])
def test_what_is_wrong_is_found(op, plant):
    assert why_wrong(op, CPU_KIND, plant(op)) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_in_16_bits_that_misses_one_cluster_is_found(dtype):
    def misses_one(*arguments):
        runs = arguments[4].clone()
        runs[:, :, 0, 0, 1] = runs[:, :, 0, 0, 0]
        return svg2.block_sparse_attention(*arguments[:4], runs, *arguments[5:])

    kind = dataclasses.replace(CPU_KIND, dtype=dtype, dim=64, k_clusters=30, given=GIVEN_CONTEXT)
    assert why_wrong("block_sparse_attention", kind, misses_one).startswith("off by ")


def test_a_kernel_that_fails_is_wrong_and_memory_that_is_out_is_not():
    def fails(*arguments):
        raise ValueError("no such instruction")

    def has_no_memory(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    assert why_wrong("sort_labels", CPU_KIND, fails) == "ValueError: no such instruction"
    with pytest.raises(torch.OutOfMemoryError):
        why_wrong("sort_labels", CPU_KIND, has_no_memory)


@runs_kernels
@every_op
def test_the_kernels_are_right(op):
    from svg2_compile.kernels import (
        block_errors_triton,
        block_masses_by_keys_triton,
        block_masses_triton,
        block_sparse_attention_pointer,
        cluster_means_triton,
        cluster_tokens_triton,
        kmeans_triton,
        log_dropped_sizes_triton,
        log_dropped_weights_triton,
        measure_recall_triton,
        permute_triton,
        probe_rows_triton,
        repair_rows_triton,
        select_blocks_triton,
        sort_labels_triton,
    )

    launchers = {
        "cluster_tokens_": cluster_tokens_triton.cluster_tokens_triton,
        "kmeans_": kmeans_triton.kmeans_triton,
        "sort_labels": sort_labels_triton.sort_labels_triton,
        "permute_tokens": permute_triton.permute_tokens_triton,
        "unpermute_tokens": permute_triton.unpermute_tokens_triton,
        "block_errors": block_errors_triton.block_errors_triton,
        "block_masses": block_masses_triton.block_masses_triton,
        "block_masses_by_keys": block_masses_by_keys_triton.block_masses_by_keys_triton,
        "cluster_means": cluster_means_triton.cluster_means_triton,
        "log_dropped_sizes": log_dropped_sizes_triton.log_dropped_sizes_triton,
        "log_dropped_weights": log_dropped_weights_triton.log_dropped_weights_triton,
        "select_blocks": select_blocks_triton.select_blocks_triton,
        "block_sparse_attention": block_sparse_attention_pointer.block_sparse_attention_pointer,
        "measure_recall": measure_recall_triton.measure_recall_triton,
        "probe_rows": probe_rows_triton.probe_rows_triton,
        "repair_rows_": repair_rows_triton.repair_rows_triton,
    }
    kind = dataclasses.replace(CPU_KIND, device=torch.device(DEVICE), dtype=torch.float16, given=GIVEN_CONTEXT)
    assert why_wrong(op, kind, launchers[op]) is None
    assert why_wrong(op, dataclasses.replace(kind, given=GIVEN_MASSES), launchers[op]) is None
    if op == "select_blocks":
        for given in (GIVEN_ERRORS, frozenset({"least_keys"}), GIVEN_ERRORS | {"least_keys"}):
            assert why_wrong(op, dataclasses.replace(kind, given=given), launchers[op]) is None
    if op == "kmeans_":
        assert why_wrong(op, dataclasses.replace(kind, given=GIVEN_METRIC), launchers[op]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nothing_is_wrong_on_this_gpu(dtype, dim, monkeypatch):
    monkeypatch.setattr(why_not, "wrong_kernels", {})
    monkeypatch.setattr(self_check, "_checked", set())
    kind = Kind(GPU, dtype, dim, q_clusters=100, k_clusters=500, given=GIVEN_CONTEXT | {"context_mask"})
    check_kernels([(op, kind) for op in WITH_KERNELS])
    check_kernels([("select_blocks", dataclasses.replace(kind, given=GIVEN_MASSES))])
    for given in (GIVEN_ERRORS, frozenset({"least_keys"}), GIVEN_ERRORS | {"least_keys"}):
        check_kernels([("select_blocks", dataclasses.replace(kind, given=given))])
    check_kernels([("block_sparse_attention", dataclasses.replace(kind, given=GIVEN_PSEUDO_KEYS))])
    check_kernels([("kmeans_", dataclasses.replace(kind, given=GIVEN_METRIC))])
    assert why_not.wrong_kernels == {}
    assert {key[0] for key in self_check._checked} == set(WITH_KERNELS)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as Python can tell, on which nothing was checked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(why_not, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(why_not, "_why_no_module", lambda name: None)
    monkeypatch.setattr(why_not, "wrong_kernels", {})
    monkeypatch.setattr(self_check, "_checked", set())
    monkeypatch.setattr(doctor, "_driver", lambda: "1.2")
    return monkeypatch


@pytest.fixture
def broken(hopper):
    """Return a set: the names of the kernels that give wrong results; and what was checked, in order."""
    names, checked = set(), []

    def why_wrong(op, kind):
        checked.append(kernel_of(op, kind))
        return "off by 1" if checked[-1] in names else None

    hopper.setattr(self_check, "why_wrong", why_wrong)
    return names, checked


ATTENTION = "block_sparse_attention"
WAN = {"dim": 128, "clusters": 500, "keys": 75_600, "rows": 40 * 75_600}


@pytest.mark.parametrize(
    ("wrong", "runs"),
    [
        ((), "gluon"),
        (("gluon",), "pointer"),
        (("gluon", "pointer"), "descriptor"),
        (("gluon", "pointer", "descriptor"), "reference"),
        (("pointer",), "gluon"),
    ],
    ids=str,
)
def test_a_wrong_attention_is_replaced_by_the_next_one(broken, wrong, runs, caplog):
    names, checked = broken
    names.update(wrong)
    with caplog.at_level(logging.WARNING):
        check_kernels([(ATTENTION, ON_GPU)])
    choice = choose_attention(GPU, torch.bfloat16, **WAN)
    assert choice.implementation == runs
    assert all(choice.why_not[each] == "its self-check failed: off by 1" for each in checked if each in wrong)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(set(wrong) & set(checked))
    assert all("is wrong on cuda:0 with torch.bfloat16" in record.message for record in caplog.records)


def test_a_named_attention_that_is_wrong_is_an_error_with_the_way_out(broken):
    broken[0].add("gluon")
    with pytest.raises(ValueError, match=r"gluon attention cannot run: its self-check failed: off by 1; .*'auto'"):
        check_kernels([(ATTENTION, dataclasses.replace(ON_GPU, attention="gluon"))])


WITH_PSEUDO_KEYS = dataclasses.replace(ON_GPU, given=GIVEN_PSEUDO_KEYS)


@pytest.fixture
def broken_with_pseudo_keys(hopper):
    """Return a set: the kernels that are wrong, of which that for pseudo-keys runs only where there are some."""
    names = set()

    def why_wrong(op, kind):
        wrong = {kernel_of(op, kind), *([PSEUDO_KEYS] if kind.given else [])} & names
        return "off by 1" if wrong else None

    hopper.setattr(self_check, "why_wrong", why_wrong)
    return names


def test_a_wrong_kernel_for_pseudo_keys_is_blamed_and_not_the_attention_before_it(broken_with_pseudo_keys, caplog):
    broken_with_pseudo_keys.add(PSEUDO_KEYS)
    with caplog.at_level(logging.WARNING):
        check_kernels([(ATTENTION, WITH_PSEUDO_KEYS)])
    assert why_not.wrong_kernels == {(PSEUDO_KEYS, GPU, torch.bfloat16): "off by 1"}
    assert [record.args[0] for record in caplog.records] == [PSEUDO_KEYS]
    # without pseudo-keys the attention is as fast as ever
    assert choose_attention(GPU, torch.bfloat16, **WAN).implementation == "gluon"
    choice = choose_attention(GPU, torch.bfloat16, **WAN, pseudo_keys=True)
    assert choice.implementation == "reference"
    assert set(choice.why_not.values()) == {"the kernel for pseudo-keys: its self-check failed: off by 1"}


def test_a_wrong_attention_before_pseudo_keys_is_blamed_itself(broken_with_pseudo_keys):
    broken_with_pseudo_keys.add("gluon")
    check_kernels([(ATTENTION, WITH_PSEUDO_KEYS)])
    assert set(why_not.wrong_kernels) == {("gluon", GPU, torch.bfloat16)}
    assert choose_attention(GPU, torch.bfloat16, **WAN, pseudo_keys=True).implementation == "pointer"


def test_where_both_are_wrong_both_are_found(broken_with_pseudo_keys):
    broken_with_pseudo_keys.update(["gluon", PSEUDO_KEYS])
    check_kernels([(ATTENTION, WITH_PSEUDO_KEYS)])
    assert set(why_not.wrong_kernels) == {(name, GPU, torch.bfloat16) for name in ("gluon", PSEUDO_KEYS)}


def test_a_named_attention_before_a_wrong_kernel_for_pseudo_keys_is_an_error(broken_with_pseudo_keys):
    broken_with_pseudo_keys.add(PSEUDO_KEYS)
    with pytest.raises(
        ValueError, match=r"gluon attention cannot run: the kernel for pseudo-keys: .*takes 'reference'"
    ):
        check_kernels([(ATTENTION, dataclasses.replace(WITH_PSEUDO_KEYS, attention="gluon"))])


def test_a_wrong_assignment_is_replaced_before_its_op_is_suspected(broken):
    names, checked = broken
    names.add(GLUON_ASSIGNMENT)
    check_kernels([("cluster_tokens_", ON_GPU)])
    assert checked == [GLUON_ASSIGNMENT, "cluster_tokens_"]
    assert why_not_triton("cluster_tokens_", GPU, torch.bfloat16, dim=128, clusters=500) is None


@every_op
def test_any_op_can_be_replaced_by_plain_pytorch_and_the_doctor_says_so(broken, op):
    broken[0].update([op, GLUON_ASSIGNMENT, *why_not.ATTENTIONS])
    doctor.check(Workload(GPU))
    (choice,) = (each for each in diagnose(Workload(GPU)).choices if each.op == op)
    assert choice.implementation == "reference"
    assert set(choice.why_not.values()) == {"its self-check failed: off by 1"}


def test_each_kernel_is_checked_once_per_device_dtype_and_head_dimension(broken):
    _, checked = broken
    for kind in (ON_GPU, dataclasses.replace(ON_GPU, k_clusters=300), ON_GPU):
        check_kernels([("sort_labels", kind), (ATTENTION, kind)])
    assert checked == ["sort_labels", "gluon"]
    check_kernels([(ATTENTION, dataclasses.replace(ON_GPU, dim=80))])
    check_kernels([(ATTENTION, dataclasses.replace(ON_GPU, device=torch.device("cuda", 1)))])
    assert checked == ["sort_labels", "gluon", "pointer", "gluon"]


def test_a_kernel_wrong_in_one_dtype_or_on_one_gpu_runs_elsewhere(broken):
    broken[0].add("gluon")
    check_kernels([(ATTENTION, ON_GPU)])
    assert choose_attention(torch.device("cuda", 1), torch.bfloat16, **WAN).implementation == "gluon"
    assert choose_attention(GPU, torch.float16, **WAN).implementation == "gluon"


def test_nothing_is_checked_while_a_graph_is_captured_or_without_a_gpu(broken, hopper):
    hopper.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_kernels([(op, kind) for op in WITH_KERNELS for kind in (ON_GPU, CPU_KIND)])
    assert broken[1] == []


def test_what_kernels_will_be_given_is_read_off_the_arguments():
    x, masses = torch.empty(1, 2, 96, 64, dtype=torch.bfloat16), torch.empty(1, 2, 3, 8)
    centroids = torch.empty(1, 2, 8, 64)
    runs, mask = torch.empty(1, 2, 3, 4, 2), torch.empty(1, 1, 1, 9, dtype=torch.bool)
    context = {"context_k": x, "context_v": x, "context_mask": mask}
    attention = {"q": x, "runs": runs, **context, "implementation": "gluon"}
    selection = {"q_centroids": centroids[:, :, :3], "k_centroids": centroids}
    kinds = kinds_of(
        [
            ("sort_labels", {"labels": torch.empty(1, 2, 96, dtype=torch.int32), "clusters": 8}),
            ("select_blocks", {**selection, "masses": None}),
            ("select_blocks", {**selection, "masses": masses}),
            ("block_sparse_attention", attention),
            ("block_sparse_attention", attention),
            ("context_attention", {"q": x}),
            ("of_somebody_else", {"q": x}),
        ]
    )
    cpu = torch.device("cpu")
    assert kinds == (
        ("sort_labels", Kind(cpu, torch.int32, 0, 8, 8)),
        ("select_blocks", Kind(cpu, torch.float32, 64, 3, 8)),
        ("select_blocks", Kind(cpu, torch.float32, 64, 3, 8, GIVEN_MASSES)),
        (ATTENTION, Kind(cpu, torch.bfloat16, 64, 3, 8, GIVEN_CONTEXT | {"context_mask"}, "gluon")),
    )


class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("self_check_option", [True, False])
def test_the_first_sparse_call_is_preceded_by_the_check_unless_it_is_opted_out_of(monkeypatch, self_check_option):
    asked = []
    monkeypatch.setattr(region, "check_kernels", lambda kinds: asked.extend(kinds))
    options = {"min_tokens": 64, "dense_layers": 0, "dense_steps": 1, "lowering": "eager"}
    torch._dynamo.reset()
    svg2_compile.reset()
    model = torch.compile(Model(), backend="svg2", options=options | {"self_check": self_check_option}, fullgraph=True)
    q = torch.randn(1, 2, 96, 16)
    seen = []
    with torch.no_grad():
        for step in range(3):
            with svg2_compile.denoise_step(step, 3):
                model(q, q, q)
            seen.append(len(asked))
    assert seen == ([0, len(asked), len(asked)] if self_check_option else [0, 0, 0])
    if self_check_option:
        kinds = dict(asked)
        assert len(kinds) == len(asked)
        assert {"cluster_tokens_", "select_blocks", "block_sparse_attention"} <= set(kinds)
        for kind in kinds.values():
            assert (kind.device, kind.dtype, kind.dim) == (torch.device("cpu"), torch.float32, 16)
            assert (kind.q_clusters, kind.given, kind.attention) == (16, frozenset(), "auto")


def test_the_report_shows_wrong_kernels(hopper):
    why_not.report_wrong_kernel("gluon", GPU, torch.bfloat16, "off by 1")
    from svg2_compile import reporting

    hopper.setattr(reporting, "wrong_kernels", why_not.wrong_kernels)
    report = svg2_compile.report(torch.nn.Linear(1, 1))
    assert report.wrong_kernels == ("gluon on cuda:0, torch.bfloat16: off by 1",)
    assert "WRONG KERNEL, not used: gluon on cuda:0, torch.bfloat16: off by 1" in str(report)
