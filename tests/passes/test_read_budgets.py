"""The file of budgets: what is written is read, and everything else is refused with a sentence."""

import copy
import json

import pytest
import torch
from budgets_cases import MADE_FROM, budgets_for_models
from hypothesis import given, settings
from hypothesis import strategies as st

from svg2_compile.passes.budgets import AttentionBudgets, rows_of
from svg2_compile.passes.config import SparseConfig
from svg2_compile.passes.errors import ConfigError
from svg2_compile.passes.read_budgets import MAX_BYTES, parse_budgets, read_budgets, write_budgets

ATTENTIONS = {
    "one": AttentionBudgets("blocks.0.attn1", 2, top_p=(0.5, 0.9), min_keep_ratio=(0.1, 0.2)),
    "other": AttentionBudgets("blocks.1.attn1", 2, max_keep_ratio=(0.25, 1.0)),
}
BUDGETS = budgets_for_models(
    {"transformer": torch.nn.Linear(8, 16), "transformer_2": torch.nn.Linear(8, 9)}, **ATTENTIONS
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "budgets.json"


def test_what_is_written_is_read_and_written_alike(path):
    written = write_budgets(BUDGETS, path)
    assert (written.made_from, written.models, written.method) == (MADE_FROM, BUDGETS.models, "heart")
    data = path.read_bytes()
    assert read_budgets(path) == written == SparseConfig(budgets=path).budgets
    assert write_budgets(written, path) == written and path.read_bytes() == data
    assert [each.name for each in path.parent.iterdir()] == ["budgets.json"]


def test_settings_are_compared_by_what_is_in_the_file(path):
    write_budgets(BUDGETS, path)
    before = SparseConfig(budgets=str(path))
    assert before == SparseConfig(budgets=str(path)) and hash(before) == hash(SparseConfig(budgets=str(path)))
    text = path.read_text()
    path.write_text(text.replace("0.25", "0.3"))
    changed = SparseConfig(budgets=str(path))
    assert changed != before and repr(changed) != repr(before)


def test_a_failed_write_leaves_what_was_there(path, monkeypatch):
    write_budgets(BUDGETS, path)
    data = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_budgets(BUDGETS.only("transformer"), path)
    assert path.read_bytes() == data and len(list(path.parent.iterdir())) == 1


def changed(value, *keys):
    """Return the bytes of a file with another value at a place; ``...`` removes it."""
    plain = json.loads(write_text())
    place = plain
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return json.dumps(plain).encode()


def write_text():
    from svg2_compile.passes import read_budgets as module

    return json.dumps(module._plain(BUDGETS))


OF_HEADS = ("models", 0, "attentions", "blocks.0.attn1")
PRINT = ("models", 0, "fingerprint")
WRONG = {
    "another format": (("format",), "svg2 weights", "format must be 'svg2_compile budgets', got 'svg2 weights'"),
    "a later version": (("version",), 2, "version must be 1, got 2"),
    "a version that is no number": (("version",), True, "version must be 1, got True"),
    "an unknown method": (("method",), "magic", "method must be one of heart, svoo, svoo-clipped, got 'magic'"),
    "a method of another kind": (("method",), [], "method must be one of"),
    "an unknown key": (("extra",), 1, "must be an object with format, version"),
    "a missing key": (("made_from",), ..., "got 'none with made_from'"),
    "no models": (("models",), [], "models must be models of different names, one at least"),
    "models that are none": (("models",), {"a": 1}, "models must be a list of at most 8"),
    "too many models": (("models",), [None] * 9, "models must be a list of at most 8"),
    "twice the same model": (("models", 1, "name"), "transformer", "models must be models of different names"),
    "no attentions": (("models", 0, "attentions"), {}, "attentions must be one attention at least"),
    "a share above 1": ((*OF_HEADS, "top_p", 1), 1.5, "blocks.0.attn1.top_p[1] must be in (0, 1], got 1.5"),
    "a share of 0": ((*OF_HEADS, "top_p", 0), 0, "blocks.0.attn1.top_p[0] must be in (0, 1], got 0"),
    "a floor below 0": ((*OF_HEADS, "min_keep_ratio", 0), -0.1, "min_keep_ratio[0] must be in [0, 1], got -0.1"),
    "a share that is text": ((*OF_HEADS, "top_p", 0), "0.5", "top_p[0] must be a finite number, got '0.5'"),
    "a share that is true": ((*OF_HEADS, "top_p", 0), True, "top_p[0] must be a finite number, got True"),
    "too few heads": ((*OF_HEADS, "top_p"), [0.5], "top_p must be 2 numbers, one a head, got '1 numbers'"),
    "no number of heads": ((*OF_HEADS, "heads"), 0, "heads must be an integer in [1, 1024], got 0"),
    "heads by halves": ((*OF_HEADS, "heads"), 2.0, "heads must be an integer in [1, 1024], got 2.0"),
    "an unknown number": ((*OF_HEADS, "top_k"), [1, 1], "top_p, min_keep_ratio, max_keep_ratio only, got 'top_k'"),
    "nothing about an attention": (
        OF_HEADS,
        {"heads": 2},
        "with one of top_p, min_keep_ratio, max_keep_ratio at least",
    ),
    "a floor above the cap": ((*OF_HEADS, "max_keep_ratio"), [1.0, 0.1], "min_keep_ratio at most max_keep_ratio"),
    "a fingerprint without a class": ((*PRINT, "class"), "", "class must be text of 1 to 4096 characters"),
    "weights that are no numbers": ((*PRINT, "weights"), {"a": [None]}, "weights.a[0] must be a finite number"),
    "prompts that are numbers": (
        ("made_from", "prompts"),
        [3],
        "prompts[0] must be text of 1 to 4096 characters, got 3",
    ),
    "no steps": (("made_from", "steps"), 0, "steps must be an integer in [1, "),
    "an option that is a list": (("made_from", "options", "top_p"), [1], "options.top_p must be text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_budget_is_refused_with_its_place(name):
    keys, value, words = WRONG[name]
    with pytest.raises(ConfigError) as refusal:
        parse_budgets(changed(value, *keys), "file.json")
    message = str(refusal.value)
    assert message.startswith("budgets file.json: ") and words in message
    assert message.endswith("make it anew with svg2 calibrate")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"{" * 100_000, "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b'{"format": NaN}', "NaN is no number"),
        (b'{"format": 1, "format": 1}', "'format' is there twice"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "must be JSON"),
        (b"[]", "the file must be an object"),
        (b"null", "the file must be an object"),
    ],
)
def test_what_is_no_json_object_is_refused(data, words):
    with pytest.raises(ConfigError, match=r"budgets f: ?|budgets f ") as refusal:
        parse_budgets(data, "f")
    assert words in str(refusal.value) and "svg2 calibrate" in str(refusal.value)


def test_numbers_that_overflow_are_refused():
    data = write_text().replace("0.9", "1e999", 1).encode()
    with pytest.raises(ConfigError, match="must be a finite number, got inf"):
        parse_budgets(data, "f")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_reads_as_budgets(data):
    text = bytearray(write_text().encode())
    place = data.draw(st.integers(0, len(text) - 1))
    if data.draw(st.booleans()):
        text[place] = data.draw(st.integers(0, 255))
    else:
        del text[place:]
    try:
        found = parse_budgets(bytes(text), "f")
    except ConfigError:
        return
    shares = [each for model in found.models for of in model.attentions for each in of.top_p or ()]
    assert all(0 < share <= 1 for share in shares)


def test_a_file_that_is_not_there_or_too_large_is_refused(path, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*svg2 calibrate wrote"):
        read_budgets(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        SparseConfig(budgets=tmp_path)
    path.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"at most {MAX_BYTES} bytes"):
        read_budgets(path)


def test_an_attention_is_found_by_its_path_also_in_a_wrapped_model():
    model = BUDGETS.models[0]
    assert model.of("blocks.1.attn1") is model.of("model.module.blocks.1.attn1") is ATTENTIONS["other"]
    assert model.of("attn1") is model.of("myblocks.1.attn1") is model.of("") is None


def test_of_several_models_one_must_be_named():
    with pytest.raises(ConfigError, match=r"of transformer, transformer_2, each with.*only\('transformer'\)"):
        BUDGETS.of("blocks.0.attn1")
    assert BUDGETS.only("transformer_2").of("blocks.0.attn1") is ATTENTIONS["one"]
    with pytest.raises(ConfigError, match="holds budgets of transformer, transformer_2, got 'unet'"):
        BUDGETS.only("unet")


def test_rows_are_shares_and_whole_clusters():
    assert rows_of(None, 2, 10, 0.9, 0.29) == ((0.9, 2, 10),) * 2
    # in fp32 this floor would be 29
    assert rows_of(None, 1, 100, 0.9, 0.29) == ((0.9, 28, 100),)
    assert rows_of(ATTENTIONS["one"], 2, 10, 0.9, 0.0) == ((0.5, 1, 10), (0.9, 2, 10))
    assert rows_of(ATTENTIONS["other"], 2, 3, 0.9, 0.5) == ((0.9, 1, 1), (0.9, 1, 3))
    whole = AttentionBudgets("a", 2, top_p=(1.0, 0.5), max_keep_ratio=(0.1, 0.1))
    assert rows_of(whole, 2, 10, 0.9, 0.0) == ((1.0, 10, 10), (0.5, 0, 1))
    assert rows_of(whole, 2, 10, 1, 0.0) == ((1.0, 10, 10),) * 2
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn1 must be of 3 heads, got 2"):
        rows_of(ATTENTIONS["one"], 3, 10, 0.9, 0.0)


def test_budgets_are_not_changed_by_reading(path):
    before = copy.deepcopy(BUDGETS)
    write_budgets(BUDGETS, path)
    assert before == BUDGETS
