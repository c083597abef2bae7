"""The example scripts, as a user runs them, with tiny local weights in place of the real ones."""

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import tiny_folders
import torch
from typer.testing import CliRunner

import svg2_compile
from svg2_compile.cli import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ("--frames", "5", "--height", "128", "--width", "128", "--steps", "3")
# the tiny sequences are short, and whether Inductor compiles them is tested elsewhere
TINY = {"min_tokens": 16, "lowering": "eager"}


@pytest.fixture
def run(monkeypatch, capsys):
    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        torch._dynamo.reset()
        with svg2_compile.configure(**TINY):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.mark.parametrize(
    ("name", "make", "size"),
    [
        ("generate_wan.py", lambda: tiny_folders.wan(experts=2), SMALL),
        ("generate_hunyuan_video.py", tiny_folders.hunyuan, (*SMALL, "--preset", "balanced")),
        ("generate_cogvideox.py", tiny_folders.cogvideox, SMALL),
        ("generate_ltx.py", tiny_folders.ltx, ("--frames", "9", "--height", "256", "--width", "256", "--steps", "3")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_example_generates_a_video_with_sparse_attention(run, tmp_path, name, make, size):
    model = tiny_folders.save(make, tmp_path / "model")
    printed = run(name, "a cat walks on the grass", "--model", model, "--out", tmp_path / "video.mp4", *size)
    assert (tmp_path / "video.mp4").stat().st_size > 500
    densities = [float(each) for each in re.findall(r"density ([\d.]+)% in sparse calls", printed)]
    assert densities and all(0 < each < 100 for each in densities), printed


def test_many_prompts_leave_no_state_behind(run, tmp_path):
    model = tiny_folders.save(tiny_folders.wan, tmp_path / "model")
    arguments = ("a cat walks", "the boat sails", "--model", model, "--folder", tmp_path / "videos", *SMALL)
    printed = run("many_prompts.py", *arguments)
    assert "the first prompt gave the same bits at the end" in printed
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["0.mp4", "1.mp4", "2.mp4"]
    first, second, third = re.findall(r"^\d: [\d.]+ s, (\w+),", printed, re.MULTILINE)
    assert first == third != second


def commands() -> list[list[str]]:
    walk = (EXAMPLES / "evaluate_walk.md").read_text()
    return [shlex.split(line)[1:] for line in walk.splitlines() if line.startswith("svg2 ")]


def test_the_question_of_the_walk_is_understood(monkeypatch):
    asked = []
    monkeypatch.setattr("svg2_compile.explaining.explanation.explain_model", asked.append)
    monkeypatch.setattr("svg2_compile.explaining.explanation.print_explanation", lambda *_: None)
    done = CliRunner().invoke(app, commands()[0])
    assert done.exit_code == 0, done.output
    assert (asked[0].frames, asked[0].height, asked[0].gpu) == (81, 480, "h100")


@pytest.mark.parametrize("command", commands()[1:], ids=" ".join)
def test_an_evaluation_of_the_walk_is_understood(command, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("svg2_compile.evaluation.page.evaluate_and_show", lambda settings, _: seen.append(settings))
    (tmp_path / "prompts.txt").write_text("a cat")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert len(seen[0].configurations) >= 3


def test_the_code_of_the_walk_uses_options_that_exist():
    walk = (EXAMPLES / "evaluate_walk.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", walk, re.DOTALL)
    (options,) = re.findall(r"options = (\{.*?\})", code, re.DOTALL)
    svg2_compile.SparseConfig(**ast.literal_eval(options))
    compile(code, "evaluate_walk.md", "exec")
