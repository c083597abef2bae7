"""Engines on disk: what is read is what was written, by us, for this graph and this machine, or nothing."""

import dataclasses
import json
import os

import pytest

from svg2_compile.tensorrt import engine_files
from svg2_compile.tensorrt.engine_files import EngineFile, default_folder, read_engine, write_engine

HERE = {"torch": "2.13.0", "gpu": "some GPU"}
ENGINE = EngineFile(
    key="k", environment=HERE, weights="w", inputs=("input_0",), outputs=("output0", "output1"),
    needs_output_allocator=False, plan=bytes(range(256)) + b"\n{}\n",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "engines" / "k.engine"
    write_engine(path, ENGINE)
    return path


def test_what_is_read_is_what_was_written(path):
    assert read_engine(path, "k", HERE) == ENGINE
    assert [each.name for each in path.parent.iterdir()] == ["k.engine"]
    assert path.parent.stat().st_mode & 0o077 == 0


def test_there_is_nothing_where_no_file_is(tmp_path, caplog):
    assert read_engine(tmp_path / "none.engine", "k", HERE) is None
    assert not caplog.records


def test_what_cannot_be_read_is_no_engine(tmp_path, caplog):
    (tmp_path / "folder.engine").mkdir()
    assert read_engine(tmp_path / "folder.engine", "k", HERE) is None
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("place", [0, 20, 100, -1])
def test_a_single_changed_bit_anywhere_is_noticed(path, caplog, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert read_engine(path, "k", HERE) is None
    assert "the engine is built anew" in caplog.text


@pytest.mark.parametrize("length", [0, 5, 50, 200])
def test_a_file_cut_short_is_refused(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert read_engine(path, "k", HERE) is None


def test_an_engine_for_another_graph_version_or_gpu_is_refused(path, caplog):
    assert read_engine(path, "other", HERE) is None
    assert read_engine(path, "k", HERE | {"gpu": "another GPU"}) is None
    assert "was made for {'torch': '2.13.0', 'gpu': 'some GPU'}" in caplog.text


def test_an_engine_of_another_user_is_refused(path, caplog, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: os.stat(path).st_uid + 1)
    assert read_engine(path, "k", HERE) is None
    assert "belongs to another user" in caplog.text


def test_a_new_engine_replaces_the_old_one_whole(path, monkeypatch):
    write_engine(path, dataclasses.replace(ENGINE, weights="other"))
    assert read_engine(path, "k", HERE).weights == "other"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(engine_files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_engine(path, ENGINE)
    assert read_engine(path, "k", HERE).weights == "other"
    assert len(list(path.parent.iterdir())) == 1


def test_the_file_is_json_and_the_plan(path):
    magic, digest, facts, plan = path.read_bytes().split(b"\n", 3)
    assert magic == b"svg2 engine 1" and len(digest) == 64 and plan == ENGINE.plan
    assert json.loads(facts)["environment"] == HERE


def test_the_default_folder_follows_inductors(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert default_folder() == tmp_path / "svg2_engines"
